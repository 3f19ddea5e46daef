"""TODO."""

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_fsdp_enabled

from covered_call.candidates.builder import load_candidates
from covered_call.candidates.prompts import admissible_answers
from covered_call.candidates.schema import NO_TRADE, SKIP
from covered_call.command_line import quiet
from covered_call.language_model.loading import (
    context_limit,
    control_beside,
    control_in,
    control_tokens,
    encode,
    load_config,
)
from covered_call.language_model.tiny_phi3 import build_tiny_base, tiny_base_path
from covered_call.training.first_checks import check_base, no_model
from covered_call.training.recipe import DataArguments, ModelArguments, TrainingArguments
from covered_call.training.runs import RecipeError

ROLES = ("system", "user", "assistant")
IGNORE = -100  # the label of a token that carries no loss
ALIKE, NEAR = 8, 512  # records of like length that come together, out of so many neighbours of an epoch's order


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


def load_splits(data: DataArguments, files: list[str], seed: int) -> DatasetDict:
    """The splits as load_candidates makes them, with an error for one that is too small to train or choose on."""
    splits = load_candidates(**loading_options(data), data_files=files, seed=seed)
    for split in ("train", "validation"):
        if split not in splits:
            raise RecipeError(f"The {split} split is empty: give more data, or set splits, or validation_from.")
    return splits


def loading_options(data: DataArguments) -> dict:
    """The options of load_candidates that a recipe gives. A shuffle is for training only: see load_epochs."""
    left_out = ("dataset_config", "balance", "max_eval_records", "data_files", "data_dir")
    options = {name: value for name, value in vars(data).items() if value is not None and name not in left_out}
    if data.candidate_order == "shuffle":
        del options["candidate_order"]
    return {"name": data.dataset_config, **options}


def load_epochs(data: DataArguments, files: list[str], seed: int, copies: int) -> Dataset:
    """The training split ``copies`` times over, each with its candidates shuffled anew."""
    epochs = []
    with quiet():  # the same files were loaded, and spoken of, a moment ago
        for epoch in range(copies):
            options = loading_options(data) | {"candidate_order": "shuffle", "seed": seed + epoch}
            epochs.append(load_candidates(**options, data_files=files)["train"])
    return concatenate_datasets(epochs)


def build_base_if_tiny(model: ModelArguments, train: Dataset, training: TrainingArguments) -> None:
    """Builds the tiny Phi-3 that a recipe with tiny_base_steps asks for, unless it stands there already."""
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
            raise RecipeError("The tiny base is built by one process: give this command once with python, --dry_run.")
        build_tiny_base(path, chats, model.tiny_base_steps, training.seed)
    model.model_name_or_path = path


def encode_split(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids of each chat, with labels on its answer alone, and the answers it could have, unless given."""

    def tokens(rows: dict) -> dict:
        encoded = encode(tokenizer, rows["messages"])
        answers = rows.get("answers")
        if answers is None and "candidates" in rows:
            answers = [admissible_answers("per_decision_ranking", len(listed)) for listed in rows["candidates"]]
        elif answers is None:
            answers = [admissible_answers("per_candidate", 1)] * len(encoded)
        return {
            "input_ids": [prompt + answer for prompt, answer in encoded],
            "labels": [[IGNORE] * len(prompt) + answer for prompt, answer in encoded],
            "answers": answers,
        }

    unused = set(split.column_names) - {"label", "decision_id", "decision_time", "answers"}
    return split.map(tokens, batched=True, remove_columns=list(unused), desc="Tokenising")


def count_labels(labels: list[str]) -> str:
    counts = Counter(labels)
    most = ", ".join(f"{label} {count:,}" for label, count in counts.most_common(6))
    return most + (f", {len(counts) - 6} more" if len(counts) > 6 else "")


def is_trade(label: str) -> bool:
    return label not in (SKIP, NO_TRADE)


def check_records(
    name: str, split: Dataset, answers: dict[str, tuple[int, ...]], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each record, and of its answer; RecipeError unless its loss is on exactly its answer's tokens, and its
    control tokens are those of the chat template."""
    totals, learnt = np.zeros(len(split), int), np.zeros(len(split), int)
    control = control_tokens(tokenizer)
    [(prompt, answer)] = encode(tokenizer, [[{"role": role, "content": "x"} for role in ROLES]])
    template = control_in(prompt + answer, control)
    for index, row in enumerate(split.select_columns(["input_ids", "labels", "label", "decision_id"])):
        if strange := control_beside(template, row["input_ids"], control):
            raise RecipeError(
                f"{name}, {row['decision_id']}: a name holds the text {strange}, which is a control token of the "
                "model. Correct the file."
            )
        label_ids = tuple(token for token in row["labels"] if token != IGNORE)
        if label_ids != answers[row["label"]]:
            raise RecipeError(
                f"{name}, {row['decision_id']}: the loss would be on the tokens {label_ids}, and the answer "
                f"{row['label']} is {answers[row['label']]}. The tokenizer reads this answer differently after "
                "different prompts: take another model."
            )
        totals[index], learnt[index] = len(row["labels"]), len(label_ids)
    return totals, learnt


def check_lengths(splits: DatasetDict, lengths: dict, max_length: int | None, config) -> None:
    """Raises RecipeError if a record is longer than max_length, which would cut its answer off, without a word."""
    context = context_limit(config)
    if (max_length or 0) > context:
        raise RecipeError(f"max_length {max_length} is more than the {context} tokens that the model sees at once.")
    limit = max_length or context
    over = {name: np.flatnonzero(total > limit) for name, (total, _) in lengths.items()}
    if not any(map(len, over.values())):
        return
    first = next(name for name, places in over.items() if len(places))
    place = int(over[first][0])
    counts = ", ".join(f"{len(places):,} of {len(splits[name]):,} in {name}" for name, places in over.items())
    raise RecipeError(
        f"Records longer than max_length {limit}: {counts}. The first is {splits[first]['decision_id'][place]} with "
        f"{lengths[first][0][place]} tokens; its answer would be cut off. Set max_length to "
        f"{max(total.max() for total, _ in lengths.values())} or more."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Train


class EpochSampler(torch.utils.data.Sampler):
    """The records of an epoch, in an order that is a law of the seed and the epoch alone.

    Args:
        trades: for each record of the training split, whether the teacher traded.
        balance: with "downsample", an epoch takes as many records of either kind; the others take turns.

    Attributes:
        copies: how many times over the data set holds the split, each differently shuffled inside; epoch e draws
            from copy e.
        lengths: tokens of each record of the data set, if those of like length are to come together.
        step: records of an optimiser step, on all processes.
    """

    def __init__(self, trades: list[bool], balance: str, seed: int):
        self.kinds = [np.flatnonzero(np.array(trades) == kind) for kind in (True, False)]
        self.records, self.balance, self.seed, self.copies, self.epoch = len(trades), balance, seed, 1, 0
        self.lengths, self.step = None, 1
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

    def group(self, lengths: np.ndarray, step: int) -> None:
        self.lengths, self.step = lengths, step

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def weights(self) -> list[float]:
        """Loss weight of a trade and of a non-trade: 1 on average, the same total for both."""
        return [self.records / (2 * len(kind)) if self.balance == "weight" else 1.0 for kind in self.kinds]

    def __str__(self) -> str:
        return " and ".join(
            f"{take:,} of {len(kind):,} {name}" + (f" at weight {weight:.2f}" if weight != 1 else "")
            for take, kind, name, weight in zip(
                self.takes, self.kinds, ("trades", "non-trades"), self.weights(), strict=True
            )
        )


def thin_out(split: Dataset, limit: int | None) -> Dataset:
    """At most ``limit`` records, evenly spaced."""
    if not limit or len(split) <= limit:
        return split
    return split.select(range(0, len(split), math.ceil(len(split) / limit)))


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
