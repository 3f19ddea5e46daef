"""The preflight: before a step is taken, whether the run can work is checked, and what it will be is said."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from covered_call.language_model.loading import (
    context_limit,
    control_beside,
    control_in,
    control_tokens,
    encode,
    load_config,
)
from covered_call.language_model.scoring import ROW_TOKENS
from covered_call.training.cost import describe_cost
from covered_call.training.examples import IGNORE, EpochOrder, Examples, is_trade, prompt_length, tasks_in
from covered_call.training.keys import SHORT_NAMES, DataArguments, ModelArguments
from covered_call.training.memory import CONTEXT_GIB, Plan, Work, choose, count_parameters, memory_there
from covered_call.training.mixture import describe_loss, lay_out_sources, settle_metric, thin_out_each
from covered_call.training.recipe import RunArguments, TrainingArguments
from covered_call.training.runs import RecipeError, begun_run
from covered_call.training.trainers import lora_config

ROLES = ("system", "user", "assistant")


# ---------------------------------------------------------------------------------------------------------------------
# Check


def preflight(model: ModelArguments, data: DataArguments, training: TrainingArguments, examples: Examples) -> str:
    """Checks that this can be trained, and says what it is, on what, and how long.

    Raises:
        RecipeError: for a record that does not fit max_length, or whose loss is not exactly its answer's.
    """
    splits, tokenizer, answers, sampler = examples.splits, examples.tokenizer, examples.answers, examples.sampler
    config = load_config(model.model_name_or_path)
    lengths = {name: check_records(name, split, answers, tokenizer) for name, split in splits.items()}
    check_lengths(splits, lengths, training.max_length, config)
    longest_answer = max(int(learnt.max()) for _, learnt in lengths.values())
    work = describe_model(config, model, training, longest_record(lengths), longest_answer)
    there = memory_for(training, model.quantization)
    plan = make_plan(work, training, there)
    training.settle(plan, model.quantization)
    sampler.group(lengths["train"][0], global_batch(training))
    rows = [longest_row(split, *lengths[name], answers) for name, split in splits.items()]
    evaluated = thin_out_each(splits["validation"], data.max_eval_records)
    training.metric_for_best_model = settle_metric(training.metric_for_best_model, data.configs)
    facts = {
        "tokens": describe_tokens(lengths, longest_answer, training.max_length),
        "answers": describe_answers(tokenizer, answers),
        "balance": f"{data.balance}: {'a pass over each takes' if data.mix else 'an epoch takes'} {sampler}",
        "loss": describe_loss(data),
        **describe_work(training, work, plan, there, max(rows), len(sampler)),
        "cost": cost_of(training, sampler, {name: total for name, (total, _) in lengths.items()}, evaluated),
    }
    what = f"{' and '.join(data.configs)} on {model.model_name_or_path}, {model.quantization}"
    sources = lay_out_sources(examples, count_steps(training, len(sampler))[1])
    return lay_out_preflight(what, shown_splits(examples), facts, sources)


def shown_splits(examples: Examples) -> dict[str, Dataset]:
    """The records of each split and, where there are several, of each task; of copies the first."""
    splits, sampler = examples.splits, examples.sampler
    if not examples.mix:
        return {**splits, "train": splits["train"].select(range(sampler.records))}
    found = {}
    for name, split in splits.items():
        for task, places in tasks_in(split).items():
            if task in SHORT_NAMES:
                own = [source["records"] for source in examples.mix if source["source"] == task and name == "train"]
                found[f"{name}, {SHORT_NAMES[task]}"] = split.select(places[: own[0]] if own else places)
    return found


def check_records(
    name: str, split: Dataset, answers: dict[str, tuple[int, ...]], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each record, and of its answer with what explains it; RecipeError unless the answer's loss is on its
    tokens and no others, and the record's control tokens are those of the chat template."""
    totals, learnt = np.zeros(len(split), int), np.zeros(len(split), int)
    control = control_tokens(tokenizer)
    [(prompt, answer)] = encode(tokenizer, [[{"role": role, "content": "x"} for role in ROLES]])
    template = control_in(prompt + answer, control)
    for index, row in enumerate(split.select_columns(["input_ids", "labels", "label", "decision_id", "task"])):
        ours = row["task"] in SHORT_NAMES  # the chats of files, of other roles perhaps, were looked at when encoded
        if ours and (strange := control_beside(template, row["input_ids"], control)):
            raise RecipeError(
                f"{name}, {row['decision_id']}: a name holds the text {strange}, which is a control token of the "
                "model. Correct the file."
            )
        label_ids = tuple(token for token in row["labels"] if token != IGNORE)
        if label_ids != answers.get(row["label"], label_ids):  # what a file's records answer need not be there
            raise RecipeError(
                f"{name}, {row['decision_id']}: the loss would be on the tokens {label_ids}, and the answer "
                f"{row['label']} is {answers[row['label']]}. The tokenizer reads this answer differently after "
                "different prompts: take another model."
            )
        totals[index], learnt[index] = len(row["labels"]), len(row["labels"]) - prompt_length(row["labels"])
    return totals, learnt


def check_lengths(splits: dict[str, Dataset], lengths: dict, max_length: int | None, config) -> None:
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
# Memory


def describe_model(config, model: ModelArguments, training: RunArguments, tokens: int, asked: int) -> Work:
    """What of a recipe decides the memory; for ``tokens`` and ``asked`` see memory.Work."""
    width = 2 if training.bf16 or training.fp16 else 4
    moment = 1 if "8bit" in training.optim else 4
    size = count_parameters(config, lora_config(model))
    return Work(config, size, model.quantization, width, moment, bool(model.lora_dropout), tokens, asked)


def memory_for(training: RunArguments, quantization: str) -> float | None:
    """GiB that each process has, or is to have: the same figure for all, whose plans must not differ."""
    gib = memory_there(quantization, None if training.awaits_gpu else training.device)
    return gib if gib is None or training.world_size == 1 else min(gather_object([gib]))


def make_plan(work: Work, training: RunArguments, there: float | None) -> Plan:
    """What the recipe leaves open, for so many GiB; a run that was begun keeps its micro-batch."""
    begun = None if training.overwrite_output_dir else begun_run(Path(training.output_dir))
    size, every = training.per_device_train_batch_size, int(training.gradient_checkpointing)
    if "per_device_train_batch_size" in training.open_keys:
        size = begun.get("micro_batch") if begun else None
    if "gradient_checkpointing" in training.open_keys:
        every = None
    return choose(work, training.records, size, every, there)


def longest_record(lengths: dict[str, tuple[np.ndarray, np.ndarray]]) -> int:
    return int(max(total.max() for total, _ in lengths.values()))


def longest_row(split: Dataset, totals: np.ndarray, learnt: np.ndarray, answers: dict) -> tuple[int, int]:
    """Tokens of the longest row of answers that an evaluation reads, and how many of them are answers'."""
    rows = Counter()
    asked = [sum(len(answers[answer]) for answer in offered) for offered in split["answers"]]
    lengths = totals - learnt + np.array(asked)
    for decision, length in zip(split["decision_id"], lengths.tolist(), strict=True):
        rows[decision] += length
    longest = max(int(lengths.max()), min(max(rows.values()), ROW_TOKENS))
    return longest, math.ceil(longest * max(a / n for a, n in zip(asked, lengths.tolist(), strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# In words


def describe_tokens(
    lengths: dict[str, tuple[np.ndarray, np.ndarray]], longest_answer: int, max_length: int | None
) -> str:
    prompts = np.concatenate([total - answer for total, answer in lengths.values()])
    return (
        f"prompt at most {prompts.max()}, 99 % up to {np.percentile(prompts, 99):.0f}; answer at most "
        f"{longest_answer}; record at most {longest_record(lengths)}, and none is over max_length {max_length}"
    )


def describe_answers(tokenizer: PreTrainedTokenizerBase, answers: dict[str, tuple[int, ...]]) -> str:
    endings = {str(tokenizer.convert_ids_to_tokens(tokens[-1])) for tokens in answers.values()}
    return (
        f"{len(answers)}, told apart by their tokens through {', '.join(sorted(endings))}, on which alone each "
        f"record's loss is; the pad token is {tokenizer.pad_token}"
    )


def describe_work(
    training: RunArguments, work: Work, plan: Plan, there: float | None, row: tuple[int, int], records: int
) -> dict[str, str]:
    """What is trained, in how much memory, for how long; an epoch takes so many records."""
    steps, epochs = count_steps(training, records)
    size, parts, evaluation = work.size, work.step(*plan), work.evaluation(*row)
    detail = ", ".join(f"{part} {gib:.1f}" for part, gib in parts.items())
    return {
        "parameters": f"{size.trainable:,} of {size.total + size.adapter:,} are trained",
        "memory": f"about {sum(parts.values()):.1f} GiB at the peak of a step, estimated, not measured ({detail})"
        + compare(sum(parts.values()), there, training.awaits_gpu),
        "evaluation": f"about {evaluation:.1f} GiB for the longest row of answers, of {row[0]} tokens at most; more "
        "rows at once as memory allows" + compare(evaluation, there, training.awaits_gpu),
        "steps": f"{steps:,} of {global_batch(training)} records: {epochs:.1f} epochs; {describe_plan(plan)}",
    }


def cost_of(training: RunArguments, sampler: EpochOrder, lengths: dict[str, np.ndarray], evaluated: Dataset) -> str:
    """What a run costs.

    Args:
        lengths: tokens of each record of the splits, of whose training records the sampler draws an epoch; see
            describe_cost.
        evaluated: the records that are scored each time while it trains.
    """
    steps, _ = count_steps(training, len(sampler))
    one = np.array([len(tokens) for tokens in evaluated["input_ids"]])
    read = lengths | {"train": lengths["train"][list(sampler)], "evaluated": one}
    return describe_cost(training, steps, global_batch(training), read)


def describe_plan(plan: Plan) -> str:
    kept = {0: "all activations kept", 1: "every layer computed twice"}
    twice = kept.get(plan.checkpoint_every, f"1 layer in {plan.checkpoint_every} computed twice")
    return f"micro-batches of {plan.micro_batch}, {twice}"


def compare(gib: float, there: float | None, awaited: bool) -> str:
    """How an estimate stands to the memory that there is."""
    if there is None:
        return ""
    whose = f"a card of {there + CONTEXT_GIB:.0f} GB leaves" if awaited else "this GPU has"
    return f"; {whose} only {there:.1f}" if gib > there else f", of {there:.1f} that {whose}"


def lay_out_preflight(
    what: str, splits: dict[str, Dataset], facts: dict[str, str], sources: Sequence[str] = ()
) -> str:
    width = max(11, *(len(name) + 1 for name in splits))
    return "\n".join(
        [
            f"\nPreflight of {what}\n",
            f"{'split':<{width}}{'records':>8}{'decisions':>10}  {'from':<11}{'to':<11}{'trades':>7}  answers",
            *(f"{name:<{width}}{describe_split(split)}" for name, split in splits.items()),
            *sources,
            "",
            *(f"{what:<11}{fact}" for what, fact in facts.items()),
            "",
        ]
    )


def describe_split(split: Dataset) -> str:
    times = split["decision_time"]
    share = sum(map(is_trade, split["label"])) / len(split)
    return (
        f"{len(split):>8,}{len(set(split['decision_id'])):>10,}  {min(times).date()!s:<11}"
        f"{max(times).date()!s:<11}{share:>7.1%}  {count_labels(split['label'])}"
    )


def count_labels(labels: list[str]) -> str:
    counts = Counter(labels)
    most = ", ".join(f"{label} {count:,}" for label, count in counts.most_common(6))
    return most + (f", {len(counts) - 6} more" if len(counts) > 6 else "")


def global_batch(training: RunArguments) -> int:
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def count_steps(training: RunArguments, records: int) -> tuple[int, float]:
    """Optimiser steps of the run, and how many epochs of so many records they are."""
    batches = records / (training.train_batch_size * training.world_size)
    batches = math.floor(batches) if training.dataloader_drop_last else math.ceil(batches)
    if not batches:
        raise RecipeError(f"{records} records do not fill a batch: lower per_device_train_batch_size.")
    per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
    if training.max_steps > 0:
        return training.max_steps, training.max_steps / per_epoch
    return math.ceil(training.num_train_epochs * per_epoch), training.num_train_epochs
