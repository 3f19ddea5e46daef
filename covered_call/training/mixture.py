"""A mixture: the records of several sources as one training split, each with an exact share of every epoch."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, Features, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from covered_call.candidates.builder import Backtest
from covered_call.candidates.prompts import admissible_answers
from covered_call.language_model.manifest import PolicyError
from covered_call.tables import align
from covered_call.training.examples import (
    IGNORE,
    EpochOrder,
    EpochSampler,
    Examples,
    encode_answers,
    encode_split,
    is_trade,
    load_splits,
    thin_out,
)
from covered_call.training.keys import RANKING, SHORT_NAMES, DataArguments
from covered_call.training.runs import RecipeError
from covered_call.training.sources import Foreign, Source, apportion, check_apart, read_chats


class MixtureSampler(EpochOrder):
    """Of each source an exact share of an epoch, which takes as many records as one pass over each has together.

    A source is gone through in passes, each an epoch of its own sampler: within an epoch and from one to the next, no
    record comes once more before all have come.

    Args:
        sources: in the order in which their records stand in the data set.
        samplers: of each source's records; one with copies holds them as often, one copy after another.
    """

    def __init__(self, sources: Sequence[Source], samplers: list[EpochSampler], seed: int):
        super().__init__(seed)
        self.samplers, self.names = samplers, [source.name for source in sources]
        self.records = sum(sampler.records for sampler in samplers)
        self.takes = apportion(sum(map(len, samplers)), [source.share for source in sources])
        if 0 in self.takes:
            source = sources[self.takes.index(0)]
            raise RecipeError(f"mix: {source.share:g} of {len(self)} records is none of {source.name}: give it more.")

    def __len__(self) -> int:
        return sum(self.takes)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        sizes = [sampler.records * sampler.copies for sampler in self.samplers]
        starts = np.cumsum([0, *sizes[:-1]])
        drawn = [
            start + draw(sampler, self.epoch * take, take)
            for start, sampler, take in zip(starts, self.samplers, self.takes, strict=True)
        ]
        return iter(self.alike(rng.permutation(np.concatenate(drawn)), rng).tolist())

    def passes(self, epochs: float) -> dict[str, float]:
        """How often each source is gone through in so many epochs."""
        sizes = map(len, self.samplers)
        return {name: epochs * take / size for name, take, size in zip(self.names, self.takes, sizes, strict=True)}

    def weight_of(self, answer: str) -> float:
        task = "per_candidate" if answer in admissible_answers("per_candidate", 1) else RANKING
        return self.samplers[self.names.index(task)].weight_of(answer)

    def __str__(self) -> str:
        both = zip(self.names, self.samplers, strict=True)
        return "; ".join(f"of {name} {sampler}" for name, sampler in both if name in SHORT_NAMES)


def draw(sampler: EpochSampler, start: int, count: int) -> np.ndarray:
    """The records from number ``start`` on of a sampler's epochs, one after another."""
    first = start // len(sampler)
    found = []
    for epoch in range(first, (start + count - 1) // len(sampler) + 1):
        sampler.set_epoch(epoch)
        found.append(np.array(list(sampler)))
    return np.concatenate(found)[start - first * len(sampler) :][:count]


def mixture_of(
    sources: Sequence[Source], ours: dict[str, EpochSampler], files: dict[str, Foreign], seed: int
) -> MixtureSampler:
    """Of the backtest's samplers by config, and of files, whose records are all alike."""
    samplers = ours | {path: EpochSampler([True] * len(its.records), "none", seed) for path, its in files.items()}
    return MixtureSampler(sources, [samplers[source.name] for source in sources], seed)


# ---------------------------------------------------------------------------------------------------------------------
# Records


class Read(NamedTuple):
    """The sources of a training: each task's splits and sampler, each file's chats, and the sampler of an epoch."""

    sources: Sequence[Source]
    asked: dict[str, DatasetDict]
    files: dict[str, Foreign]
    samplers: dict[str, EpochSampler]
    mixture: MixtureSampler | None

    @property
    def sampler(self) -> EpochOrder:
        return self.mixture or self.samplers[self.sources[0].name]


def read_sources(data: DataArguments, backtest: Backtest, seed: int) -> Read:
    more = {"explain": True} if data.explain else {}
    asked = {task: load_splits(backtest, task, seed, data.max_records_per_market, **more) for task in data.configs}
    files = {source.name: read_chats(source.name) for source in data.sources if source.is_file}
    check_apart(files.values(), judged_prompts(asked) if files else {})
    samplers = {
        task: EpochSampler([is_trade(label) for label in splits["train"]["label"]], data.balance, seed)
        for task, splits in asked.items()
    }
    mixture = mixture_of(data.sources, samplers, files, seed) if data.mix else None
    return Read(data.sources, asked, files, samplers, mixture)


def judged_prompts(asked: dict[str, DatasetDict]) -> dict[str, list[list[dict]]]:
    """Of validation and test, those of all tasks."""
    return {
        name: [chat[:-1] for splits in asked.values() if name in splits for chat in splits[name]["messages"]]
        for name in ("validation", "test")
    }


def encode_sources(read: Read, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The training records of all sources one after another, and of each other split those of all tasks."""
    encoded = {
        task: DatasetDict({name: encode_split(split, tokenizer, task) for name, split in splits.items()})
        for task, splits in read.asked.items()
    }
    like = next(iter(encoded.values()))["train"].features
    trained = [
        encode_chats(read.files[source.name], tokenizer, like) if source.is_file else encoded[source.name]["train"]
        for source in read.sources
    ]
    others = {
        name: join([splits[name] for splits in encoded.values() if name in splits])
        for name in ("validation", "test")
        if any(name in splits for splits in encoded.values())
    }
    return DatasetDict({"train": join(trained), **others})


def encode_chats(foreign: Foreign, tokenizer: PreTrainedTokenizerBase, like: Features) -> Dataset:
    chats = [record["messages"] for record in foreign.records]
    return encode_foreign(
        foreign, [chat[:-1] for chat in chats], [chat[-1]["content"] for chat in chats], tokenizer, like
    )


def chats_of(read: Read) -> Dataset:
    """What a tiny base learns to read from: the chats of an epoch of a mixture, else all of them."""
    features = next(iter(read.asked.values()))["train"].select_columns(["messages"]).features
    whole = [
        Dataset.from_list(read.files[source.name].records, features=features)
        if source.is_file
        else read.asked[source.name]["train"].select_columns(["messages"])
        for source in read.sources
    ]
    return join(whole).select(list(read.mixture)) if read.mixture else whole[0]


def encode_foreign(
    foreign: Foreign,
    prompts: list[list[dict]],
    answers: list[str],
    tokenizer: PreTrainedTokenizerBase,
    like: Features,
    choices: list[list[str]] | None = None,
) -> Dataset:
    """Token ids of each prompt with its answer as encode_split has them, of no decision.

    Args:
        choices: the answers that each admits; None: none to choose from.

    Raises:
        RecipeError: naming the line of a record that the tokenizer or the chat template refuses.
    """
    try:
        encoded = encode_answers(tokenizer, prompts, answers)
    except PolicyError:
        for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            try:
                encode_answers(tokenizer, [prompt], [answer])
            except PolicyError as error:
                raise RecipeError(f"{foreign.where(place)}: {error} Correct the line.") from error
        raise
    own = {
        "label": answers,
        "decision_id": [foreign.where(place) for place in range(len(answers))],
        "decision_time": [None] * len(answers),
        "answers": choices or [[]] * len(answers),
        "task": [foreign.path] * len(answers),
    }
    return Dataset.from_dict({**encoded, **own}, features=like)


def like(part: Dataset, first: Dataset) -> Dataset:
    """With the types of the first, of which a sample that holds no time, say, knows nothing."""
    return part if part.features == first.features else part.cast(first.features)


def join(parts: list[Dataset]) -> Dataset:
    return parts[0] if len(parts) == 1 else concatenate_datasets([like(part, parts[0]) for part in parts])


def add_files(
    sources: Sequence[Source],
    files: dict[str, Foreign],
    chosen: DatasetDict,
    rejected: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, tuple[int, ...]]:
    """Puts the pairs of files among those to train on, in the order of the sources; the tokens of their answers.

    What a text's tokens are is taken from where it stands first; the preflight checks that they are so everywhere.
    """
    tokens: dict[str, tuple[int, ...]] = {}
    for side, pairs in (("chosen", chosen), ("rejected", rejected)):
        ours = pairs["train"]
        encoded = {path: encode_side(foreign, side, tokenizer, ours.features) for path, foreign in files.items()}
        for part in encoded.values():
            for text, labels in zip(part["label"], part["labels"], strict=True):
                tokens.setdefault(text, tuple(token for token in labels if token != IGNORE))
        pairs["train"] = join([encoded.get(source.name, ours) for source in sources])
    return tokens


def encode_side(foreign: Foreign, side: str, tokenizer: PreTrainedTokenizerBase, like: Features) -> Dataset:
    prompts, own = ([record[key] for record in foreign.records] for key in ("prompt", side))
    both = [[record["chosen"], record["rejected"]] for record in foreign.records]
    return encode_foreign(foreign, prompts, own, tokenizer, like, both)


def thin_out_each(split: Dataset, limit: int | None) -> Dataset:
    """At most ``limit`` records of each task, see thin_out."""
    tasks = list(dict.fromkeys(split["task"]))
    if len(tasks) == 1:
        return thin_out(split, limit)
    of = np.array(split["task"])
    return concatenate_datasets([thin_out(split.select(np.flatnonzero(of == task)), limit) for task in tasks])


# ---------------------------------------------------------------------------------------------------------------------
# In words


def describe_sources(
    sources: list[Source], sampler: MixtureSampler, files: dict[str, Foreign], seen: dict[str, dict], hashes: dict
) -> list[dict]:
    """Of each source its share, its records, how many of them an epoch takes, and a hash: of a file, or of the hashes
    of the CSVs."""
    ours = f"sha256:{hashlib.sha256(''.join(sorted(hashes.values())).encode()).hexdigest()}"
    return [
        {
            "source": source.name,
            "share": source.share,
            "records": its.records,
            "in_an_epoch": take,
            "sha256": files[source.name].sha256 if source.is_file else ours,
            "tuned_on": seen.get(source.name),
        }
        for source, its, take in zip(sources, sampler.samplers, sampler.takes, strict=True)
    ]


def lay_out_sources(examples: Examples, epochs: float) -> list[str]:
    """A line a source for the preflight; none without a mix."""
    if not (examples.mix and isinstance(examples.sampler, MixtureSampler)):
        return []
    head = ["source", "share", "records", "an epoch takes", "run goes through it", "sha256"]
    passes = examples.sampler.passes(epochs)
    rows = [
        [
            source["source"], f"{source['share']:g}", f"{source['records']:,}", f"{source['in_an_epoch']:,}",
            f"{passes[source['source']]:.1f} times", source["sha256"].removeprefix("sha256:")[:12],
        ]
        for source in examples.mix
    ]  # fmt: skip
    return ["", *align([head, *rows], range(1, 5)).splitlines()]


def describe_loss(data: DataArguments) -> str:
    counts = "record" if data.weight_by == "record" else "token of an answer"
    return f"each {counts} counts the same" + (", whatever its source" if data.mix else "")


def settle_metric(metric: str | None, tasks: list[str]) -> str | None:
    """The metric that a checkpoint is chosen by: of the first task, where there are several."""
    name = str(metric).removeprefix("eval_")
    if metric is None or len(tasks) == 1 or name.startswith(tuple(f"{SHORT_NAMES[task]}_" for task in tasks)):
        return metric
    return f"{SHORT_NAMES[tasks[0]]}_{name}"
