"""Teaches a model to prefer what paid more: DPO on pairs of answers, from a fine-tune of train_sft.py or from a base.

    python train_dpo.py --config tiny_dpo                            # CPU, minutes: from a tiny Phi-3 it builds itself
    python train_dpo.py --config tiny_dpo --adapter out/tiny_ranking # from a fine-tune of it
    python train_dpo.py --config preference                          # from out/ranking, Phi-3-mini on a CUDA GPU
    python train_dpo.py --config preference --dry_run                # only check that it would work

Recipes, the preflight, resuming and what is saved are those of train_sft.py. The loss of DPO
(https://arxiv.org/abs/2305.18290) compares the model with what it was at the start. What that start gives to the two
answers of each pair is scored once, before the first step, so that no second model is in memory. A step reads the
prompt of a pair once, with the two answers in branches behind it.
"""

import datetime
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from peft import LoraConfig
from sklearn.metrics import accuracy_score
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_fsdp_enabled
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from covered_call.candidates.builder import find_csvs, fingerprint
from covered_call.candidates.reading import hashes_of
from covered_call.candidates.source import HOME
from covered_call.command_line import quiet
from covered_call.language_model.loading import (
    ADAPTER,
    answer_tokens,
    check_adapter,
    load_config,
    load_tokenizer,
    pinned_revision,
)
from covered_call.language_model.scoring import Batch, Scored, asked_logits, collate, lay_out
from covered_call.training.card import SHARES, Panel, fill_card
from covered_call.training.examples import (
    EpochSampler,
    build_base_if_tiny,
    check_lengths,
    check_model,
    check_records,
    count_labels,
    encode_split,
    is_trade,
    load_splits,
    thin_out,
    tuned_on,
)
from covered_call.training.first_checks import RANKING, read_start
from covered_call.training.preflight import (
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
from covered_call.training.recipe import DPO, PairArguments, PreferenceArguments, StartArguments
from covered_call.training.results import calibrate_on, describe_run, save, what_next
from covered_call.training.runs import RecipeError, of_the_run, open_run
from covered_call.training.trainers import ScoringTrainer, answer_metrics, balanced_accuracy, load_model, predictions

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


def encode_side(pairs: Dataset, side: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Each pair's prompt with its chosen or its rejected answer as a record, of which the two are the answers."""

    def chat(pair: dict) -> dict:
        return {
            "messages": pair["prompt"] + pair[side],
            "label": pair[f"{side}_label"],
            "answers": [pair["chosen_label"], pair["rejected_label"]],
        }

    unused = set(pairs.column_names) - {"decision_id", "decision_time"}
    chats = pairs.map(chat, remove_columns=list(unused), desc=f"Answering with the {side}")
    return encode_split(chats, tokenizer)


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


def preflight(
    model: StartArguments,
    training: PreferenceArguments,
    pairs: DatasetDict,
    rejected: DatasetDict,
    rankings: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    answers: dict[str, tuple[int, ...]],
    sampler: EpochSampler,
) -> str:
    """Checks that this can be trained, and says what it is, on what, and how long.

    Args:
        pairs, rejected: as encode_side made them, of the chosen and the rejected answers.
        rankings: as encode_split made them.
        answers: the tokens of each answer.
        sampler: of the training pairs.

    Raises:
        RecipeError: for a record that does not fit max_length, or whose loss is not exactly its answer's.
    """
    config = load_config(model.model_name_or_path)
    sides = {"chosen": pairs, "rejected": rejected, "asked": rankings}
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
    rows = [longest_row(split, *lengths[f"{name}, asked"], answers) for name, split in rankings.items()]
    facts = {
        "chosen": "as above, against " + count_labels(rejected["train"]["label"]) + " in train",
        "tokens": describe_tokens(lengths, longest_answer, training.max_length),
        "answers": describe_answers(tokenizer, answers),
        "reference": "the model at the start, scored before the first step: no second model, no second adapter",
        **describe_work(training, work, plan, there, max(rows), len(sampler)),
    }
    origin = f", from {model.adapter}" if model.adapter else ""
    what = f"preference on {model.model_name_or_path}, {model.quantization}{origin}"
    return lay_out_preflight(what, pairs, facts)


# ---------------------------------------------------------------------------------------------------------------------
# Train


class PreferenceTrainer(ScoringTrainer, DPOTrainer):
    """DPOTrainer on tokenised pairs, whose reference is the model as it stands at the start.

    Args:
        adapter: a folder with the adapter's weights at the start; None for a new one, which changes nothing yet.
        train_dataset: as encode_side made it of the chosen answers.
        judged: the splits to evaluate on in the end, with their pairs.

    Attributes:
        at_start: for each decision of ``judged``, the scores of its answers before the first step.
    """

    def __init__(self, *args, adapter: str | None, judged: dict[str, Dataset], **kwargs):
        super().__init__(*args, **kwargs)
        if adapter:
            # Not attached before: TRL would copy it, keep the copy beside it, and round it to bfloat16.
            self.model.load_adapter(adapter, "default", is_trainable=True)
            check_adapter(self.model, adapter)
        self.train_dataset = self.with_reference(self.train_dataset)
        scored = {name: self.score(split) for name, split in judged.items()}
        self.at_start = {
            decision: one
            for name, split in judged.items()
            for decision, one in zip(split["decision_id"], scored[name], strict=True)
        }
        self.precompute_ref_logps = True  # the loss takes the reference from the columns
        self.aux_loss_enabled = False  # it balances the experts of a mixture, in the base, which is frozen
        self.data_collator = PairCollator(self.processing_class.pad_token_id)

    def _prepare_dataset(self, dataset: Dataset, *args) -> Dataset:
        return dataset  # tokenised already, as the preflight checked it

    def with_reference(self, pairs: Dataset) -> Dataset:
        """The pairs as TRL takes them: token ids, and the log-probabilities of both answers at the start."""
        prompts = [
            [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0] for row in pairs
        ]
        chosen, rejected = zip(*pairs["answers"], strict=True)
        scores = np.array([one.log_probabilities for one in self.score(pairs)], dtype=np.float32)
        return Dataset.from_dict(
            {
                "prompt_ids": prompts,
                "chosen_ids": [self.answers[answer] for answer in chosen],
                "rejected_ids": [self.answers[answer] for answer in rejected],
                "ref_chosen_logps": scores[:, 0],
                "ref_rejected_logps": scores[:, 1],
            }
        )

    def compute_loss(self, model, inputs, *args, **kwargs):
        """TRL's loss, of what ``read_pairs`` reads in the place of the model."""
        return super().compute_loss(lambda **_: read_pairs(model, inputs), inputs["answers"], *args, **kwargs)

    def measure(self, split: Dataset, scored: list[Scored]) -> dict[str, float]:
        start = [self.at_start[decision] for decision in split["decision_id"]]
        return answer_metrics(split, scored) | pair_metrics(split, scored, start, self.beta)


class PairCollator(DataCollatorForPreference):
    """Pairs as rows, each a prompt with its two answers in branches behind it, and as what TRL's loss makes of them.

    A batch holds a Batch's fields by name, and "answers": TRL's own arrays, of shape (2 * pairs, tokens), as if its
    last token were the whole prompt, the chosen answers above the rejected ones. ``read_at``, of the same shape, says
    which of the places asked predicts the next token, where that is an answer's.
    """

    def torch_call(self, examples: list[dict]) -> dict:
        rows = [lay_out([pair["prompt_ids"]], [[pair["chosen_ids"], pair["rejected_ids"]]]) for pair in examples]
        batch = collate(rows)
        answers = super().torch_call([{**pair, "prompt_ids": pair["prompt_ids"][-1:]} for pair in examples])
        sides = torch.tensor([side for row in rows for _, side, _, _ in row.asked])
        by_side = batch.asked[0, sides.argsort(stable=True)]  # as TRL has them: pair after pair, of one side
        before = answers["completion_mask"].roll(-1, dims=1)
        answers["read_at"] = torch.zeros_like(before).masked_scatter(before.bool(), by_side)
        answers["attention_mask"] = batch.ends > 0  # TRL only counts it: the tokens that are read
        return {**batch._asdict(), "answers": answers}


def read_pairs(model: torch.nn.Module, inputs: dict) -> SimpleNamespace:
    """All that TRL's loss takes from a model's outputs, after one pass over the rows of a PairCollator.

    TRL 0.29 takes the logits, of shape (2 * pairs, tokens, vocabulary). TRL 1 takes the rest, one token shorter: each
    token's predicts the next. Of it log_probs alone has a gradient, and is 0 where the next token is no answer's.
    """
    answers = inputs["answers"]
    logits = asked_logits(model, Batch(*(inputs[name] for name in Batch._fields))).float()[answers["read_at"]]
    by_token, tokens = logits[:, :-1].log_softmax(-1), answers["input_ids"][:, 1:]
    fixed = by_token.detach()
    return SimpleNamespace(
        logits=logits,
        log_probs=by_token.gather(2, tokens[..., None])[..., 0] * answers["completion_mask"][:, 1:],
        entropy=-(fixed.exp() * fixed).sum(-1),
        log_sum_sq_probs=(2 * fixed).logsumexp(-1),
        mean_logits=logits[:, :-1].detach().mean(-1),
        is_top1=fixed.argmax(-1) == tokens,
    )


def pair_metrics(split: Dataset, scored: list[Scored], start: list[Scored], beta: float) -> dict[str, float]:
    """How far the pairs' chosen answers are above the rejected ones.

    pairs_won is the share of pairs whose chosen answer scores higher; dpo_loss the mean of -log sigmoid(beta * gain),
    where gain is by how much (nats) the chosen answer has gained on the rejected one since the start.
    """
    won, losses = [], []
    for answers, pair, now, then in zip(split["answers"], split["pair"], scored, start, strict=True):
        if pair is None:
            continue
        chosen, rejected = (answers.index(answer) for answer in pair)
        above, before = (one.log_probabilities[chosen] - one.log_probabilities[rejected] for one in (now, then))
        won.append(above > 0)
        losses.append(np.logaddexp(0, -beta * (above - before)))
    return {"pairs_won": float(np.mean(won)), "dpo_loss": float(np.mean(losses))} if won else {}


# ---------------------------------------------------------------------------------------------------------------------
# Report and save


def describe_start(model: StartArguments, start: dict | None, manifest: dict) -> dict:
    """What a preference run's manifest says beside, or other than, a fine-tune's."""
    described = {**manifest, "task": RANKING, "method": "dpo", "start": None}
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


def report(trainer: PreferenceTrainer, splits: dict, scored: dict, adapter: str | None, commonest: str) -> list[dict]:
    """The tuned model beside its start, the untuned base and always the commonest answer, on each split."""
    results = []
    for name, split in splits.items():
        start = [trainer.at_start[decision] for decision in split["decision_id"]]
        scores = {"tuned model": scored[name], "its start" if adapter else "its base, untuned": start}
        if adapter:
            with trainer.model.disable_adapter():
                scores["its base, untuned"] = trainer.score(split)
        for who, found in scores.items():
            pairs = pair_metrics(split, found, start, trainer.beta)
            results.append({**judge(name, split, who, predictions(split, found)), **pairs})
        results.append(judge(name, split, f"always {commonest}", [commonest] * len(split)))
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


FIGURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "trade_rate": "trade rate",
    "pairs_won": "pairs won",
    "dpo_loss": "DPO loss",
}


def cells(result: dict) -> list[str]:
    """One row of the table as text."""
    known = [result["split"], str(result["records"]), str(result["pairs"]), result["answers_by"]]
    return known + [f"{result[key]:.3f}" if key in result else "-" for key in FIGURES]


def table(results: list[dict]) -> str:
    rows = [["split", "records", "pairs", "answers by", *FIGURES.values()], *map(cells, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        "  ".join(
            cell.ljust(width) if place in (0, 3) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(["", *aligned])


PREFERS = (
    "It was tuned by DPO to prefer, at a covered-call backtest's (the teacher's) decisions, the answer that brought "
    "more, by recorded or computed outcomes"
)
HINDSIGHT = (
    "what paid more on the markets of those dates need not on others; outcomes of calls that were not sold are "
    "computed; winning pairs is no evidence of profit."
)
EXPLAINED = (
    "Accuracy is agreement with the teacher; pairs won the share of pairs whose better answer scores higher; the DPO "
    f"loss is {math.log(2):.3f} at the start."
)


def model_card(manifest: dict, folder: str) -> ModelCard:
    head = ["split", "records", "pairs", "answers by", *FIGURES.values()]
    rows = [head, ["---"] * len(head), *map(cells, manifest["results"])]
    figures = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return fill_card(manifest, folder, "dpo", PREFERS, f"{figures}\n\n{EXPLAINED}", HINDSIGHT)


PANELS = (
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


STAGE = DPO


def tune(model: StartArguments, data: PairArguments, training: PreferenceArguments, given: dict) -> None:
    first = training.process_index == 0
    if is_fsdp_enabled():
        raise RecipeError("train_dpo.py does not shard a model: run it with python or plain accelerate launch.")
    start = take_over(model, data, given)
    check_model(model)
    revision = pinned_revision(model.adapter, start) if start else None
    with training.main_process_first():
        files = find_csvs(data.data_files, data.data_dir, str(HOME))
        hashes = hashes_of(fingerprint(files))
        pairs = load_splits(data, files, training.seed)
        with quiet():  # of the same decisions
            rankings = load_splits(data.rankings(), files, training.seed)
        check_dates(model, start, rankings)
        seen = tuned_on(rankings["train"])
        build_base_if_tiny(model, rankings["train"], training)
        tokenizer = load_tokenizer(model.adapter or model.model_name_or_path)
        commonest = Counter(rankings["train"]["label"]).most_common(1)[0][0]
        prompt = rankings["train"][0]["messages"][:-1]
        rankings = DatasetDict({name: encode_split(split, tokenizer) for name, split in rankings.items()})
        chosen, rejected = (
            DatasetDict({name: encode_side(split, side, tokenizer) for name, split in pairs.items()})
            for side in ("chosen", "rejected")
        )
        offered = {answer for split in rankings.values() for choices in split["answers"] for answer in choices}
        answers = answer_tokens(tokenizer, prompt, sorted(offered))
        judged = {
            name: add_pairs(name, rankings[name], chosen[name]) for name in ("validation", "test") if name in chosen
        }
    sampler = EpochSampler([is_trade(label) for label in chosen["train"]["label"]], data.balance, training.seed)
    ready = preflight(model, training, chosen, rejected, rankings, tokenizer, answers, sampler)
    if first:
        print(ready)
    if training.dry_run:
        return
    manifest = describe_run(
        model, data, training, given, hashes, {**rankings, "train": chosen["train"]}, answers, sampler, seen
    )
    manifest = describe_start(model, start, manifest)
    with training.main_process_first():
        checkpoint = open_run(Path(training.output_dir), manifest, training.overwrite_output_dir and first)
    set_seed(training.seed)  # the adapter is drawn before the Trainer sets its seed
    base, lora = load_model(model, training, revision)
    trainer = PreferenceTrainer(
        model=base,
        args=training,
        train_dataset=chosen["train"],
        eval_dataset=thin_out(judged["validation"], data.max_eval_records),
        processing_class=tokenizer,
        peft_config=lora,
        sampler=sampler,
        answers=answers,
        adapter=model.adapter,
        judged=judged,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    scored = {name: trainer.score(split) for name, split in judged.items()}
    results = report(trainer, judged, scored, model.adapter, commonest)
    save(trainer, manifest, results, calibrate_on(judged["validation"], scored["validation"]), PANELS, model_card)
    if first:
        print(table(results))
        print(what_next(training.output_dir))
