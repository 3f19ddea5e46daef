"""Supervised fine-tuning: a language model learns to answer as the teacher did, its loss on the answers alone."""

import math
from collections import Counter

from datasets import DatasetDict
from huggingface_hub import ModelCard
from peft import PeftModel
from sklearn.metrics import accuracy_score
from transformers import set_seed

from covered_call.language_model.loading import answer_tokens, load_tokenizer
from covered_call.language_model.scoring import Scored
from covered_call.tables import markdown
from covered_call.training.card import SFT_PANELS, fill_card
from covered_call.training.examples import (
    EpochSampler,
    Examples,
    build_base_if_tiny,
    check_model,
    encode_split,
    is_trade,
    load_splits,
    offered,
    shuffle_epochs,
    thin_out,
    tuned_on,
)
from covered_call.training.keys import RANKING, DataArguments, ModelArguments
from covered_call.training.preflight import count_steps, preflight
from covered_call.training.recipe import SFT, TrainingArguments
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
from covered_call.training.trainers import AnswerTrainer, balanced_accuracy, load_model, predictions

STAGE = SFT


def tune(model: ModelArguments, data: DataArguments, training: TrainingArguments, given: dict) -> None:
    """Loads, checks, trains and saves.

    Args:
        given: the keys of the recipe and of the command line, with their values.

    Raises:
        RecipeError, CandidatesError, PolicyError: if it cannot work; the message says why.
        TrainingStopped: if nothing is learnt.
    """
    check_model(model)
    with training.main_process_first():
        examples = load(model, data, training)
    ready = preflight(model, data, training, examples)
    if training.is_first:
        print(ready)
    if training.dry_run:
        return
    manifest = describe_run(model, data, training, given, examples)
    checkpoint = begin_run(training, manifest)
    trainer = make_trainer(model, data, training, examples)
    trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer, examples, manifest)


def load(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> Examples:
    """The splits in the tokens of the model, which is built here if it is the tiny one."""
    backtest = data.backtest()
    explained = {"explain": True} if data.explain else {}
    splits = load_splits(backtest, data.dataset_config, training.seed, **explained)
    grounds = backtest.grounds(data.dataset_config) if explained else None
    train = splits["train"]
    build_base_if_tiny(model, train, training)
    tokenizer = load_tokenizer(model.model_name_or_path)
    sampler = EpochSampler([is_trade(label) for label in train["label"]], data.balance, training.seed)
    if data.candidate_order == "shuffle" and data.dataset_config == RANKING:
        sampler.copies = math.ceil(count_steps(training, len(sampler))[1])
        splits["train"] = shuffle_epochs(train, training.seed, sampler.copies, grounds)
    task = data.dataset_config
    encoded = DatasetDict({name: encode_split(split, tokenizer, task) for name, split in splits.items()})
    return Examples(
        splits=encoded,
        tokenizer=tokenizer,
        answers=answer_tokens(tokenizer, train[0]["messages"][:-1], offered(encoded), bool(explained)),
        sampler=sampler,
        commonest=Counter(train["label"]).most_common(1)[0][0],
        seen=tuned_on(train),
        hashes=backtest.hashes,
        grounds=grounds,
    )


def make_trainer(
    model: ModelArguments, data: DataArguments, training: TrainingArguments, examples: Examples
) -> AnswerTrainer:
    set_seed(training.seed)  # the adapter is drawn before the Trainer sets its seed
    base, adapter = load_model(model, training)
    return AnswerTrainer(
        model=base,
        args=training,
        train_dataset=examples.splits["train"],
        eval_dataset=thin_out(examples.splits["validation"], data.max_eval_records),
        processing_class=examples.tokenizer,
        peft_config=adapter,
        sampler=examples.sampler,
        answers=examples.answers,
        explanation_weight=data.explanation_weight,
    )


def finish(trainer: AnswerTrainer, examples: Examples, manifest: dict) -> None:
    """Judges what was tuned, saves it, and says what it is."""
    judged = {name: examples.splits[name] for name in ("validation", "test") if name in examples.splits}
    scored = {name: trainer.score(split) for name, split in judged.items()}
    results = report(trainer, judged, scored, examples.commonest)
    calibration = calibrate_on(judged["validation"], scored["validation"])
    save(trainer, manifest, results, calibration, SFT_PANELS, model_card)
    if trainer.args.is_first:
        print(table(results, COLUMNS))
        print(what_next(trainer))


COLUMNS = {
    "split": "split",
    "records": "records",
    "answers_by": "answers by",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
}
IMITATES = "It imitates a covered-call backtest (the teacher)"
COPIES = "it copies a rule, on the markets of those dates; agreeing with the teacher is no evidence of profit."


def report(trainer: AnswerTrainer, splits: dict, scored: dict[str, list[Scored]], commonest: str) -> list[dict]:
    """Accuracy and balanced accuracy of the tuned model, of its base, of a random one if it is tiny, and of always the
    commonest answer."""
    results, untrained = [], random_base(trainer)
    for name, split in splits.items():
        answers = {"tuned model": predictions(split, scored[name])}
        if isinstance(trainer.model, PeftModel):
            with trainer.model.disable_adapter():
                answers[name_of_base(trainer)] = predictions(split, trainer.score(split))
        if untrained:
            answers[RANDOM] = predictions(split, trainer.score(split, untrained))
        answers[f"always {commonest}"] = [commonest] * len(split)
        for who, given in answers.items():
            results.append(
                {
                    "split": name,
                    "records": len(split),
                    "answers_by": who,
                    "accuracy": float(accuracy_score(split["label"], given)),
                    "balanced_accuracy": balanced_accuracy(split["label"], given),
                }
            )
    return results


def model_card(manifest: dict, folder: str) -> ModelCard:
    return fill_card(manifest, folder, "sft", IMITATES, markdown(cells(manifest["results"], COLUMNS)), COPIES)
