"""Preferences: a model learns to prefer what paid more, by DPO on pairs of answers, from a fine-tune or a base."""

import datetime
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from peft import LoraConfig
from sklearn.metrics import accuracy_score
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_fsdp_enabled

from covered_call.candidates.context_lines import told_names
from covered_call.language_model.loading import ADAPTER, answer_tokens, load_config, load_tokenizer, pinned_revision
from covered_call.tables import markdown
from covered_call.training.card import SHARES, Panel, fill_card
from covered_call.training.examples import (
    CODE,
    EpochSampler,
    Examples,
    build_base_if_tiny,
    check_model,
    encode_answers,
    encode_split,
    is_trade,
    load_splits,
    offered,
    tasks_in,
    thin_out,
    tuned_on,
)
from covered_call.training.first_checks import read_start
from covered_call.training.keys import RANKING, PairArguments, StartArguments
from covered_call.training.mixture import (
    add_files,
    describe_sources,
    judged_prompts,
    lay_out_sources,
    mixture_of,
)
from covered_call.training.money import MONEY, add_outcomes, doubt_about, mean_money, settle_metric
from covered_call.training.preference_trainer import PreferenceTrainer, pair_metrics
from covered_call.training.preflight import (
    check_lengths,
    check_records,
    cost_of,
    count_labels,
    count_steps,
    describe_answers,
    describe_model,
    describe_tokens,
    describe_work,
    global_batch,
    lay_out_preflight,
    longest_record,
    longest_row,
    make_plan,
    memory_for,
)
from covered_call.training.recipe import DPO, PreferenceArguments
from covered_call.training.results import (
    RANDOM,
    begin_run,
    calibrate_on,
    cells,
    describe_run,
    name_of_base,
    random_base,
    save,
    table,
    what_next,
)
from covered_call.training.runs import RecipeError, of_the_run
from covered_call.training.sources import check_apart, read_pairs
from covered_call.training.trainers import balanced_accuracy, load_model, predictions

STAGE = DPO


@dataclass
class Pairs(Examples):
    """Examples whose training split are pairs with their chosen answers.

    Args:
        chosen, rejected: each pair's prompt with that answer, of all splits, as encode_pairs makes them.
        rankings: all decisions with the teacher's answers, as encode_split makes them.
        judged: those of validation and test, with their pairs and what each answer brings.
        doubt: why no checkpoint is to be chosen by money; None if it may be.
        checks: how far computed outcomes are from recorded ones.
    """

    chosen: DatasetDict
    rejected: DatasetDict
    rankings: DatasetDict
    judged: dict[str, Dataset]
    doubt: str | None
    checks: list[str]


def tune(model: StartArguments, data: PairArguments, training: PreferenceArguments, given: dict) -> None:
    """Loads, checks, trains and saves.

    Args:
        given: the keys of the recipe and of the command line, with their values.

    Raises:
        RecipeError, CandidatesError, PolicyError: if it cannot work; the message says why.
        TrainingStopped: if nothing is learnt.
    """
    if is_fsdp_enabled():
        raise RecipeError("covered-call prefer does not shard a model: run it alone, or with plain accelerate launch.")
    start = take_over(model, data, given)
    check_model(model)
    revision = pinned_revision(model.adapter, start) if start and model.adapter else None
    with training.main_process_first():
        pairs = load(model, data, training, start)
    ready = preflight(model, data, training, pairs)
    if training.is_first:
        print(ready)
    if training.dry_run:
        return
    manifest = describe_start(model, start, describe_run(model, data, training, given, pairs))
    checkpoint = begin_run(training, manifest)
    trainer = make_trainer(model, data, training, pairs, revision)
    trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer, pairs, manifest, model.adapter)


# ---------------------------------------------------------------------------------------------------------------------
# Load


def take_over(model: StartArguments, data: PairArguments, given: dict) -> dict | None:
    """The manifest of the fine-tune to start from, if any: base, quantisation and LoRA become its own.

    Raises:
        RecipeError: if it does not answer rankings with an adapter, or was shown candidates in another order.
        PolicyError: if it has not finished, or its prompts or base have changed.
    """
    if not model.adapter:
        return None
    start = read_start(model.adapter)
    orders = [
        "csv" if order == "csv" else "instrument"
        for order in (start["recipe"]["candidate_order"], data.candidate_order)
    ]
    if orders[0] != orders[1]:
        raise RecipeError(f"{model.adapter} was shown candidates in {orders[0]} order: set candidate_order to it.")
    told = start.get("context", []), told_names(data.backtest().options)
    if told[0] != told[1]:
        raise RecipeError(
            f"{model.adapter} was told {', '.join(told[0]) or 'nothing'} of the market's context, and these options "
            f"tell {', '.join(told[1]) or 'nothing'}: set context, context_columns, context_vols, analogues and "
            "opinions as they were."
        )
    lora = LoraConfig.from_pretrained(model.adapter)
    own = {
        "model_name_or_path": start["base_model"],
        "quantization": start["quantization"],
        "tiny_base_steps": 0,
        "lora_r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
    }
    for key, value in own.items():
        setattr(model, key, value)
        given.pop(key, None)
    return start


def check_dates(model: StartArguments, start: dict | None, splits: DatasetDict) -> None:
    """Raises RecipeError if the start was tuned on decisions that are to judge the result."""
    if start is None:
        return
    until = datetime.datetime.fromisoformat(start["splits"]["train"]["to"])
    since = min(splits["validation"]["decision_time"])
    if until >= since:
        raise RecipeError(
            f"{model.adapter} was tuned on decisions up to {until.date()}, and validation begins on {since.date()}: "
            "give the splits that it was tuned with."
        )


def load(model: StartArguments, data: PairArguments, training: PreferenceArguments, start: dict | None) -> Pairs:
    """Pairs and rankings of the same decisions in the tokens of the model, which is built if it is the tiny one."""
    backtest = data.backtest()
    paired = load_splits(backtest, "preference", training.seed, data.max_records_per_market, **data.pairing())
    asked = load_splits(backtest, RANKING, training.seed)
    train = asked["train"]
    check_dates(model, start, asked)
    files = {source.name: read_pairs(source.name) for source in data.sources if source.is_file}
    check_apart(files.values(), judged_prompts({RANKING: asked}) if files else {})
    build_base_if_tiny(model, train, training)
    tokenizer = load_tokenizer(model.adapter or model.model_name_or_path)
    rankings = DatasetDict({name: encode_split(split, tokenizer, RANKING) for name, split in asked.items()})
    chosen, rejected = (
        DatasetDict({name: encode_pairs(split, side, tokenizer) for name, split in paired.items()})
        for side in ("chosen", "rejected")
    )
    answers = answer_tokens(tokenizer, train[0]["messages"][:-1], offered(rankings))
    sampler = EpochSampler([is_trade(label) for label in chosen["train"]["label"]], data.balance, training.seed)
    seen = {"preference": tuned_on(train)}
    mixture = mixture_of(data.sources, {"preference": sampler}, files, training.seed) if data.mix else None
    foreign = add_files(data.sources, files, chosen, rejected, tokenizer) if files else {}
    fits = backtest.decisions.fits
    judged = {
        name: add_outcomes(add_pairs(name, rankings[name], chosen[name]), asked[name], fits)
        for name in ("validation", "test")
        if name in chosen
    }
    return Pairs(
        splits=DatasetDict({**rankings, "train": chosen["train"]}),
        tokenizer=tokenizer,
        answers=foreign | answers,
        labels=list(answers),
        sampler=mixture or sampler,
        commonest={RANKING: Counter(train["label"]).most_common(1)[0][0]},
        seen=seen,
        hashes=backtest.hashes,
        grounds=None,
        mix=describe_sources(data.sources, mixture, files, seen, backtest.hashes) if mixture else None,
        chosen=chosen,
        rejected=rejected,
        rankings=rankings,
        judged=judged,
        doubt=doubt_about(thin_out(judged["validation"], data.max_eval_records), fits),
        checks=backtest.decisions.checks(),
    )


def encode_pairs(pairs: Dataset, side: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids of each pair's prompt with its chosen or its rejected answer, of which the two are the answers."""

    def tokens(rows: dict, code: str) -> dict:
        return {
            **encode_answers(tokenizer, rows["prompt"], rows[f"{side}_label"]),
            "label": rows[f"{side}_label"],
            "answers": [list(both) for both in zip(rows["chosen_label"], rows["rejected_label"], strict=True)],
            "task": [RANKING] * len(rows["prompt"]),
        }

    unused = set(pairs.column_names) - {"decision_id", "decision_time"}
    given, said = {"code": CODE}, f"Tokenising the {side}"
    return pairs.map(tokens, batched=True, fn_kwargs=given, remove_columns=list(unused), desc=said)


def add_pairs(name: str, ranking: Dataset, pairs: Dataset) -> Dataset:
    """The records of a split with the two labels of their pair; None where they have none.

    Raises:
        RecipeError: if a pair's decision is not among the records.
    """
    labels = {pair["decision_id"]: pair["answers"] for pair in pairs.select_columns(["decision_id", "answers"])}
    strange = labels.keys() - set(ranking["decision_id"])
    if strange:
        raise RecipeError(f"{name}: the pair of {min(strange)} belongs to another split of {RANKING}.")
    return ranking.add_column("pair", [labels.get(decision) for decision in ranking["decision_id"]])


# ---------------------------------------------------------------------------------------------------------------------
# Check


def preflight(model: StartArguments, data: PairArguments, training: PreferenceArguments, pairs: Pairs) -> str:
    """Checks that this can be trained, and says what it is, on what, and how long.

    Raises:
        RecipeError: for a record that does not fit max_length, or whose loss is not exactly its answer's.
    """
    tokenizer, answers, sampler = pairs.tokenizer, pairs.answers, pairs.sampler
    config = load_config(model.model_name_or_path)
    sides = {"chosen": pairs.chosen, "rejected": pairs.rejected, "asked": pairs.rankings}
    records = {f"{name}, {side}": split for side, splits in sides.items() for name, split in splits.items()}
    lengths = {name: check_records(name, split, answers, tokenizer) for name, split in records.items()}
    check_lengths(records, lengths, training.max_length, config)
    # Both answers stand in one row, and the longest ones may follow the longest prompt.
    longest_answer = max(map(len, answers.values()))
    work = describe_model(config, model, training, longest_record(lengths) + longest_answer, 2 * longest_answer)
    there = memory_for(training, model.quantization)
    plan = make_plan(work, training, there)
    training.settle(plan, model.quantization)
    sampler.group(lengths["train, chosen"][0], global_batch(training))
    rows = [longest_row(split, *lengths[f"{name}, asked"], answers) for name, split in pairs.rankings.items()]
    shown = shown_pairs(pairs.chosen)
    facts = {
        "chosen": "as above, against " + count_labels(shown_pairs(pairs.rejected)["train"]["label"]) + " in train",
        "tokens": describe_tokens(lengths, longest_answer, training.max_length),
        "answers": describe_answers(tokenizer, answers),
        "reference": "the model at the start, scored before the first step: no second model, no second adapter",
        **describe_work(training, work, plan, there, max(rows), len(sampler)),
        "cost": cost_of(
            training, sampler, costing(lengths), thin_out(pairs.judged["validation"], data.max_eval_records)
        ),
        "checkpoint": settle_metric(training, pairs.doubt),
    }
    origin = f", from {model.adapter}" if model.adapter else ""
    what = f"preference on {model.model_name_or_path}, {model.quantization}{origin}"
    sources = lay_out_sources(pairs, count_steps(training, len(sampler))[1])
    return lay_out_preflight(what, shown, facts, sources)


def shown_pairs(pairs: DatasetDict) -> dict[str, Dataset]:
    """Those of the backtest."""
    ours = tasks_in(pairs["train"])[RANKING]
    return {**pairs, "train": pairs["train"] if len(ours) == len(pairs["train"]) else pairs["train"].select(ours)}


def costing(lengths: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Tokens of each pair, learnt and scored by the reference, and of each ranking that is judged."""
    both = {
        name: lengths[f"{name}, chosen"][0] + lengths[f"{name}, rejected"][0]
        for name in ("train", "validation", "test")
        if f"{name}, chosen" in lengths
    }
    asked = {name: lengths[f"{name}, asked"][0] for name in ("validation", "test") if f"{name}, asked" in lengths}
    return {"reference": np.concatenate(list(both.values())), "train": both["train"], **asked}


def describe_start(model: StartArguments, start: dict | None, manifest: dict) -> dict:
    """What a preference run's manifest says beside, or other than, a fine-tune's."""
    described = {**manifest, "task": RANKING, "tasks": [RANKING], "method": "dpo", "start": None}
    if start is None:
        return described
    seen, own = start["splits"]["train"], manifest["splits"]["train"]
    train = {**own, "from": min(own["from"], seen["from"]), "to": max(own["to"], seen["to"])}
    recipe = of_the_run(start["recipe"])
    return {
        **described,
        "base_revision": start["base_revision"],
        "start": {"adapter": model.adapter, "sha256": start["files"][ADAPTER], "recipe": recipe},
        "splits": {**manifest["splits"], "train": train},
        "tuned_on": on_both(start["tuned_on"], manifest["tuned_on"]),
    }


def on_both(first: dict, then: dict) -> dict:
    """What a model was tuned on first and then, as one; see tuned_on."""
    ranges = [*first["numbers"].items(), *then["numbers"].items()]
    ends = {name: [end for key, pair in ranges if key == name for end in pair] for name, _ in ranges}
    return {
        **{names: sorted({*first[names], *then[names]}) for names in ("underlyings", "exit_styles")},
        "numbers": {name: [min(found), max(found)] for name, found in ends.items()},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Train and judge


def make_trainer(
    model: StartArguments, data: PairArguments, training: PreferenceArguments, pairs: Pairs, revision: str | None
) -> PreferenceTrainer:
    set_seed(training.seed)  # the adapter is drawn before the Trainer sets its seed
    base, lora = load_model(model, training, revision)
    return PreferenceTrainer(
        model=base,
        args=training,
        train_dataset=pairs.chosen["train"],
        eval_dataset=thin_out(pairs.judged["validation"], data.max_eval_records),
        processing_class=pairs.tokenizer,
        peft_config=lora,
        sampler=pairs.sampler,
        answers=pairs.answers,
        adapter=model.adapter,
        judged=pairs.judged,
    )


def finish(trainer: PreferenceTrainer, pairs: Pairs, manifest: dict, adapter: str | None) -> None:
    """Judges what was tuned, saves it, and says what it is."""
    scored = {name: trainer.score(split) for name, split in pairs.judged.items()}
    results = report(trainer, pairs.judged, scored, adapter, pairs.commonest)
    calibration = calibrate_on(pairs.judged["validation"], scored["validation"])
    save(trainer, manifest, results, calibration, PANELS, model_card)
    if trainer.args.is_first:
        print(table(results, COLUMNS))
        print("\n".join(pairs.checks))
        print(what_next(trainer))


def report(trainer: PreferenceTrainer, splits: dict, scored: dict, adapter: str | None, commonest: dict) -> list[dict]:
    """The tuned model beside its start, its base, a random one if it is tiny, and always the commonest answer, on each
    split."""
    results, base, untrained = [], name_of_base(trainer), random_base(trainer)
    for name, split in splits.items():
        start = [trainer.at_start[decision] for decision in split["decision_id"]]
        scores = {"tuned model": scored[name], "its start" if adapter else base: start}
        if adapter:
            with trainer.model.disable_adapter():
                scores[base] = trainer.score(split)
        if untrained:
            scores[RANDOM] = trainer.score(split, untrained)
        for who, found in scores.items():
            given = predictions(split, found)
            more = mean_money(split, given) | pair_metrics(split, found, start, trainer.beta)
            results.append({**judge(name, split, who, given), **more})
        always = commonest[RANKING]
        results.append(judge(name, split, f"always {always}", [always] * len(split)))
    return results


def judge(name: str, split: Dataset, who: str, given: list[str]) -> dict:
    return {
        "split": name,
        "records": len(split),
        "pairs": sum(pair is not None for pair in split["pair"]),
        "answers_by": who,
        "accuracy": float(accuracy_score(split["label"], given)),
        "balanced_accuracy": balanced_accuracy(split["label"], given),
        "trade_rate": float(np.mean([is_trade(answer) for answer in given])),
    }


# ---------------------------------------------------------------------------------------------------------------------
# In words


COLUMNS = {
    "split": "split",
    "records": "records",
    "pairs": "pairs",
    "answers_by": "answers by",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "trade_rate": "trade rate",
    MONEY: "P&L vs HODL, % of spot",
    "pairs_won": "pairs won",
    "dpo_loss": "DPO loss",
}
PREFERS = (
    "It was tuned by DPO to prefer, at a covered-call backtest's (the teacher's) decisions, the answer that brought "
    "more, by recorded or computed outcomes"
)
HINDSIGHT = (
    "what paid more on the markets of those dates need not on others; outcomes of calls that were not sold are "
    "computed; winning pairs is no evidence of profit."
)
EXPLAINED = (
    "Accuracy is agreement with the teacher; P&L vs HODL the mean a decision, net of costs, where the outcomes of all "
    "candidates are known (never selling is 0; `covered-call evaluate` gives its intervals); pairs won the share of "
    f"pairs whose better answer scores higher; the DPO loss is {math.log(2):.3f} at the start."
)


PANELS = (
    Panel(
        "What do its answers bring on validation?",
        "P&L vs HODL a decision\n(% of spot, net of costs)",
        {"eval_" + MONEY: "validation"},
    ),
    Panel(
        "Does it come to prefer what paid more than it did at the start?",
        f"DPO loss (nats a pair)\n{math.log(2):.3f} at the start",
        {"loss": "training", "eval_dpo_loss": "validation"},
    ),
    Panel(
        "How often does the better answer score higher?", "share of validation pairs", {"eval_pairs_won": "pairs won"}
    ),
    Panel("How does it answer the validation records?", "share of the records", SHARES),
)


def model_card(manifest: dict, folder: str) -> ModelCard:
    figures = markdown(cells(manifest["results"], COLUMNS))
    return fill_card(manifest, folder, "dpo", PREFERS, f"{figures}\n\n{EXPLAINED}", HINDSIGHT)
