"""Examples: the records that are trained on and judged by, as a recipe asks for them, in tokens and in an order."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_fsdp_enabled

from covered_call.candidates.builder import Backtest
from covered_call.candidates.columns import OPINION, Grounds, microseconds, opinion_of
from covered_call.candidates.explanations import explain
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import (
    admissible_answers,
    answer_of,
    order_candidates,
    pick_of,
    ranking_messages,
)
from covered_call.candidates.records import FEATURES
from covered_call.candidates.schema import NO_TRADE, SKIP, Candidate, Decision, Opinion
from covered_call.language_model import loading
from covered_call.language_model.loading import encode, first_line, load_config
from covered_call.language_model.tiny_phi3 import build_tiny_base, tiny_base_path
from covered_call.training.first_checks import check_base, no_model
from covered_call.training.keys import RANKING, ModelArguments
from covered_call.training.recipe import RunArguments
from covered_call.training.runs import RecipeError

IGNORE = -100  # the label of a token that carries no loss
# The library caches what ``map`` makes under the names of the functions it calls. This is given to each, so that the
# cache sees an edit of them, too.
CODE = hashlib.sha256(b"".join(Path(file).read_bytes() for file in (__file__, loading.__file__))).hexdigest()
ALIKE, NEAR = 8, 512  # records of like length that come together, out of so many neighbours of an epoch's order


@dataclass
class Examples:
    """What a model is trained on and judged by.

    Args:
        splits: as encode_split makes them; of a shuffled training split a copy for each epoch, one after another.
        tokenizer: of the model.
        answers: the tokens of each answer.
        labels: the answers that a decision admits.
        sampler: of the training records.
        commonest: of each task the answer that the teacher gave most often in the training split.
        seen: of each task; see tuned_on.
        hashes: of the data files by path, from before they were read.
        grounds: of what explains the answers; None if nothing does.
        mix: what each source of a mix is, as a manifest has it; None without a mix.
    """

    splits: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    answers: dict[str, tuple[int, ...]]
    labels: list[str]
    sampler: "EpochOrder"
    commonest: dict[str, str]
    seen: dict[str, dict]
    hashes: dict[str, str]
    grounds: Grounds | None
    mix: list[dict] | None


# ---------------------------------------------------------------------------------------------------------------------
# Load


def check_model(model: ModelArguments) -> None:
    """Raises RecipeError at once if there is no such model here, nor a way to download it, or FSDP cannot take it."""
    if is_fsdp_enabled() and model.quantization == "int8":
        raise RecipeError("quantization: FSDP cannot shard int8 weights. Use int4, or launch without FSDP.")
    if model.tiny_base_steps:
        return
    check_base(model.model_name_or_path)
    try:
        load_config(model.model_name_or_path)
    except OSError as error:
        raise no_model(model.model_name_or_path) from error
    except ValueError as error:
        raise RecipeError(f"{model.model_name_or_path} cannot be used: {str(error).splitlines()[0]}") from error


def load_splits(
    backtest: Backtest, name: str, seed: int, max_records_per_market: int | None = None, **options
) -> DatasetDict:
    """A config's splits, the training split capped, with an error for one that is too small to train or choose on."""
    splits = backtest.load(name, seed=seed, **options)
    for split in ("train", "validation"):
        if split not in splits:
            raise RecipeError(f"The {split} split is empty: give more data, or set splits, or validation_from.")
    if max_records_per_market:
        splits["train"] = cap_markets(splits["train"], max_records_per_market)
    return splits


def cap_markets(train: Dataset, most: int) -> Dataset:
    """At most so many records of each underlying and exit style, see one_of_each_stretch, all in their order."""
    markets = pd.Series(list(zip(train["underlying"], train["exit_style"], strict=True)))
    groups = markets.groupby(markets).indices.values()
    kept = [places[one_of_each_stretch(len(places), most)] for places in groups]
    return train.select(np.sort(np.concatenate(kept)))


def shuffle_epochs(train: Dataset, seed: int, copies: int, grounds: Grounds | None = None) -> Dataset:
    """The training split of rankings ``copies`` times over, the candidates of each in another order.

    Copy e is what load_candidates makes with candidate_order="shuffle" and seed + e.

    Args:
        grounds: of the answers' explanations, if they have any.
    """
    epochs = []
    for epoch in range(copies):
        options = CoveredCallCandidatesConfig(candidate_order="shuffle", seed=seed + epoch)
        given, said = {"options": options, "code": CODE, "grounds": grounds}, f"Shuffling for epoch {epoch + 1}"
        epochs.append(train.map(in_another_order, fn_kwargs=given, features=train.features, desc=said))
    return concatenate_datasets(epochs)


def in_another_order(record: dict, options: CoveredCallCandidatesConfig, code: str, grounds: Grounds | None) -> dict:
    """What of a ranking's record changes with the order of its candidates."""
    rows = record["candidates"]
    if not rows:
        return {}
    candidates = tuple(Candidate(*(row[name] for name in Candidate._fields)) for row in rows)
    context = {name: value for name, value in record.items() if name not in FEATURES[RANKING]} or None
    time, underlying, exit_style = (record[name] for name in ("decision_time", "underlying", "exit_style"))
    state = Decision(time, underlying, exit_style, rows[0]["spot"], candidates, context, opinion_in(rows))
    decision, order = order_candidates(state, options)
    pick = pick_of(record["label"])
    pick = None if pick is None else order.index(pick)
    label = answer_of(pick)
    said = explain(decision, label, grounds) if grounds else label
    return {
        "messages": [*ranking_messages(decision), {"role": "assistant", "content": said}],
        "label": label,
        "candidates": [rows[i] for i in order],
        "chosen_index": None if pick is None else pick + 1,
    }


def opinion_in(rows: list[dict]) -> Opinion | None:
    """Of a ranking's candidates, where opinions are told."""
    if OPINION[0] not in rows[0]:
        return None
    *said, times = ([row[name] for row in rows] for name in OPINION)
    before = [None if time is None else microseconds(time) for time in times]
    return opinion_of([row["instrument"] for row in rows], *said, before)


def build_base_if_tiny(model: ModelArguments, train: Dataset, training: RunArguments) -> None:
    """Builds the tiny Phi-3 that a recipe with tiny_base_steps asks for, unless it stands there already.

    Args:
        train: chats, each with its answer last, under "messages".
    """
    if not model.tiny_base_steps or os.path.isdir(model.model_name_or_path):
        return
    chats = train.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns=train.column_names,
        desc="Splitting off the answers",
    )
    path = tiny_base_path(model.model_name_or_path, chats, model.tiny_base_steps, training.seed)
    if not os.path.isdir(path):
        if training.world_size > 1:
            raise RecipeError(
                "The tiny base is built by one process: give this command once without accelerate, --dry_run."
            )
        build_tiny_base(path, chats, model.tiny_base_steps, training.seed)
    model.model_name_or_path = path


def tuned_on(train: Dataset) -> dict:
    """What the training prompts show of a market: its names, and from where to where each number of a candidate goes.

    Args:
        train: as load_splits makes it of per_candidate or per_decision_ranking.
    """
    ranking = "candidates" in train.column_names
    shown = ["dte", "delta", "score"] if ranking else ["dte", "delta", "score", "iv", "ivrv_ratio"]
    if ranking:
        rows = pd.DataFrame(itertools.chain(*train["candidates"]), columns=shown)
    else:
        rows = train.select_columns(shown).to_pandas()
    ends = rows.astype(float).agg(["min", "max"]).dropna(axis=1)  # of what is always blank there are none
    return {
        "underlyings": sorted(set(train["underlying"])),
        "exit_styles": sorted(set(train["exit_style"])),
        "numbers": {name: ends[name].tolist() for name in ends},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Encode


def encode_split(split: Dataset, tokenizer: PreTrainedTokenizerBase, task: str) -> Dataset:
    """Token ids of each chat, with labels on its answer alone, and not on what explains it, its task, and the answers
    that this admits."""

    def tokens(rows: dict, code: str) -> dict:
        shown = map(len, rows["candidates"]) if task == RANKING else [1] * len(rows["label"])
        prompts, said = zip(*((chat[:-1], chat[-1]["content"]) for chat in rows["messages"]), strict=True)
        return {
            **encode_answers(tokenizer, list(prompts), list(said), explained="\n" in said[0]),
            "answers": [admissible_answers(task, number) for number in shown],
            "task": [task] * len(prompts),
        }

    unused = set(split.column_names) - {"label", "decision_id", "decision_time"}
    given = {"code": CODE}
    return split.map(tokens, batched=True, fn_kwargs=given, remove_columns=list(unused), desc="Tokenising")


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict]], answers: list[str], explained: bool = False
) -> dict:
    """Token ids of each prompt with its answer, and labels on the answer alone, by column; of an explained one on
    its first line."""
    chats = [
        [*prompt, {"role": "assistant", "content": answer}] for prompt, answer in zip(prompts, answers, strict=True)
    ]
    encoded = encode(tokenizer, chats)
    ends = [first_line(tokenizer, ids) if explained else len(ids) for _, ids in encoded]
    return {
        "input_ids": [prompt + ids for prompt, ids in encoded],
        "labels": [
            [IGNORE] * len(prompt) + ids[:end] + [IGNORE] * (len(ids) - end)
            for (prompt, ids), end in zip(encoded, ends, strict=True)
        ],
    }


def prompt_length(labels: list[int]) -> int:
    """Of a record: the tokens before its answer."""
    return next(place for place, label in enumerate(labels) if label != IGNORE)


def tasks_in(split: Dataset) -> dict[str, list[int]]:
    """The records of each task of a split, in their order."""
    found: dict[str, list[int]] = {}
    for place, task in enumerate(split["task"]):
        found.setdefault(task, []).append(place)
    return found


def times_in(split: Dataset) -> list:
    """When its decisions were taken; records of a file are of none."""
    return [time for time in split["decision_time"] if time is not None]


def offered(splits: DatasetDict) -> list[str]:
    """All answers that a record of these splits admits."""
    return sorted({answer for split in splits.values() for choices in split["answers"] for answer in choices})


def is_trade(label: str) -> bool:
    return label not in (SKIP, NO_TRADE)


# ---------------------------------------------------------------------------------------------------------------------
# Order


class EpochOrder(torch.utils.data.Sampler):
    """The records of an epoch, in an order that is a law of the seed and the epoch alone; a subclass draws them.

    Attributes:
        records: of the training data, each counted once.
        lengths: tokens of each record of the data set, if those of like length are to come together.
        step: records of an optimiser step, on all processes.
    """

    records: int

    def __init__(self, seed: int):
        self.seed, self.epoch, self.lengths, self.step = seed, 0, None, 1

    def __len__(self) -> int:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def group(self, lengths: np.ndarray, step: int) -> None:
        self.lengths, self.step = lengths, step

    def alike(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The order changed so that micro-batches hold records of like length, which need little padding.

        Up to eight of like length come together, and a step takes several such groups, drawn at random and sorted.
        Which records make up a step does not depend on how it is divided into micro-batches and processes. What does
        not fill a step stays last as it was drawn, lest the longest be left out.
        """
        if self.lengths is None:
            return order
        size = max(n for n in range(1, ALIKE + 1) if self.step % n == 0)
        whole = len(order) // self.step * self.step
        groups = []
        for near in np.split(order[:whole], range(NEAR * size // ALIKE, whole, NEAR * size // ALIKE)):
            groups.append(near[np.argsort(self.lengths[near], kind="stable")].reshape(-1, size))
        steps = rng.permutation(np.concatenate(groups)).reshape(-1, self.step)
        by_length = np.argsort(self.lengths[steps], axis=1, kind="stable")
        return np.concatenate([np.take_along_axis(steps, by_length, axis=1).ravel(), order[whole:]])

    def weight_of(self, answer: str) -> float:
        """Of an answer in the loss, 1 on average over an epoch's answers to decisions."""
        raise NotImplementedError


class EpochSampler(EpochOrder):
    """All records once an epoch, or as many trades as non-trades.

    Args:
        trades: for each record of the training split, whether the teacher traded.
        balance: with "downsample", an epoch takes as many records of either kind; the others take turns.

    Attributes:
        copies: how many times over the data set holds the split, each differently shuffled inside; epoch e draws
            from copy e.
    """

    def __init__(self, trades: list[bool], balance: str, seed: int):
        super().__init__(seed)
        self.kinds = [np.flatnonzero(np.array(trades) == kind) for kind in (True, False)]
        self.records, self.balance, self.copies = len(trades), balance, 1
        smaller = min(map(len, self.kinds))
        if balance != "none" and not smaller:
            raise RecipeError(f"balance: {balance} needs both trades and non-trades in the training split.")
        self.takes = [smaller if balance == "downsample" else len(kind) for kind in self.kinds]

    def __len__(self) -> int:
        return sum(self.takes)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        drawn = [rng.permutation(kind)[:take] for kind, take in zip(self.kinds, self.takes, strict=True)]
        start = self.epoch % self.copies * self.records
        return iter(self.alike(start + rng.permutation(np.concatenate(drawn)), rng).tolist())

    def weights(self) -> list[float]:
        """Loss weight of a trade and of a non-trade: 1 on average, the same total for both."""
        return [self.records / (2 * len(kind)) if self.balance == "weight" else 1.0 for kind in self.kinds]

    def weight_of(self, answer: str) -> float:
        trade, other = self.weights()
        return trade if is_trade(answer) else other

    def __str__(self) -> str:
        return " and ".join(
            f"{take:,} of {len(kind):,} {name}" + (f" at weight {weight:.2f}" if weight != 1 else "")
            for take, kind, name, weight in zip(
                self.takes, self.kinds, ("trades", "non-trades"), self.weights(), strict=True
            )
        )


def thin_out(split: Dataset, limit: int | None) -> Dataset:
    """At most ``limit`` records, see one_of_each_stretch."""
    return split.select(one_of_each_stretch(len(split), limit)) if limit and len(split) > limit else split


def one_of_each_stretch(count: int, most: int) -> np.ndarray:
    """At most so many places of ``count``, ascending, one of each of as many equal stretches; always the same ones.

    Which one of a stretch is drawn: where all decisions have as many candidates, every n-th record may be of the best
    of each alone.
    """
    edges = np.linspace(0, count, min(count, most) + 1).astype(int)
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])
