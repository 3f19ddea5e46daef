"""Supervised fine-tuning: a language model learns to answer as the teacher did, its loss on the answers alone."""

import math
from collections import Counter

from huggingface_hub import ModelCard
from peft import PeftModel
from sklearn.metrics import accuracy_score
from transformers import set_seed

from covered_call.candidates.columns import Grounds
from covered_call.language_model.loading import answer_tokens, load_tokenizer
from covered_call.language_model.scoring import Scored
from covered_call.tables import markdown
from covered_call.training.card import fill_card, panels_of
from covered_call.training.examples import (
    Examples,
    build_base_if_tiny,
    check_model,
    offered,
    shuffle_epochs,
    tasks_in,
    tuned_on,
)
from covered_call.training.keys import RANKING, DataArguments, ModelArguments
from covered_call.training.mixture import (
    Read,
    chats_of,
    describe_sources,
    encode_sources,
    read_sources,
    thin_out_each,
)
from covered_call.training.preflight import count_steps, preflight
from covered_call.training.recipe import SFT, TrainingArguments
from covered_call.training.results import (
    RANDOM,
    begin_run,
    calibrate_each,
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
    read = read_sources(data, backtest, training.seed)
    grounds = backtest.grounds(data.dataset_config) if data.explain else None
    build_base_if_tiny(model, chats_of(read), training)
    tokenizer = load_tokenizer(model.model_name_or_path)
    train = {task: splits["train"] for task, splits in read.asked.items()}
    if data.candidate_order == "shuffle" and RANKING in train:
        shuffle_rankings(read, training, grounds)
    splits, sampler = encode_sources(read, tokenizer), read.sampler
    answers = answer_tokens(
        tokenizer, train[data.dataset_config][0]["messages"][:-1], offered(splits), bool(data.explain)
    )
    seen = {task: tuned_on(split) for task, split in train.items()}
    return Examples(
        splits=splits,
        tokenizer=tokenizer,
        answers=answers,
        labels=list(answers),
        sampler=sampler,
        commonest={task: Counter(split["label"]).most_common(1)[0][0] for task, split in train.items()},
        seen=seen,
        hashes=backtest.hashes,
        grounds=grounds,
        mix=describe_sources(data.sources, read.mixture, read.files, seen, backtest.hashes) if read.mixture else None,
    )


def shuffle_rankings(read: Read, training: TrainingArguments, grounds: Grounds | None) -> None:
    """The candidates of each training ranking in another order, each time that the rankings are gone through."""
    epochs = count_steps(training, len(read.sampler))[1]
    own = read.samplers[RANKING]
    own.copies = math.ceil(read.mixture.passes(epochs)[RANKING] if read.mixture else epochs)
    read.asked[RANKING]["train"] = shuffle_epochs(read.asked[RANKING]["train"], training.seed, own.copies, grounds)


def make_trainer(
    model: ModelArguments, data: DataArguments, training: TrainingArguments, examples: Examples
) -> AnswerTrainer:
    set_seed(training.seed)  # the adapter is drawn before the Trainer sets its seed
    base, adapter = load_model(model, training)
    return AnswerTrainer(
        model=base,
        args=training,
        train_dataset=examples.splits["train"],
        eval_dataset=thin_out_each(examples.splits["validation"], data.max_eval_records),
        processing_class=examples.tokenizer,
        peft_config=adapter,
        sampler=examples.sampler,
        answers=examples.answers,
        explanation_weight=data.explanation_weight if data.explain else 0.0,
        by_record=data.weight_by == "record",
    )


def finish(trainer: AnswerTrainer, examples: Examples, manifest: dict) -> None:
    """Judges what was tuned, saves it, and says what it is."""
    judged = {name: examples.splits[name] for name in ("validation", "test") if name in examples.splits}
    scored = {name: trainer.score(split) for name, split in judged.items()}
    results = report(trainer, judged, scored, examples.commonest)
    calibration = calibrate_each(judged["validation"], scored["validation"], manifest["tasks"])
    save(trainer, manifest, results, calibration, panels_of(manifest["tasks"]), model_card)
    if trainer.args.is_first:
        print(table(results, columns_of(results)))
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


def columns_of(results: list[dict]) -> dict[str, str]:
    """The task is a column where there are several."""
    several = len({result["task"] for result in results}) > 1
    return {"task": "task", **COLUMNS} if several else COLUMNS


def report(trainer: AnswerTrainer, splits: dict, scored: dict[str, list[Scored]], commonest: dict) -> list[dict]:
    """Accuracy and balanced accuracy of the tuned model, of its base, of a random one if it is tiny, and of always the
    commonest answer; of each task apart."""
    results, untrained = [], random_base(trainer)
    for name, split in splits.items():
        answers = {"tuned model": predictions(split, scored[name])}
        if isinstance(trainer.model, PeftModel):
            with trainer.model.disable_adapter():
                answers[name_of_base(trainer)] = predictions(split, trainer.score(split))
        if untrained:
            answers[RANDOM] = predictions(split, trainer.score(split, untrained))
        labels = split["label"]
        for task, places in tasks_in(split).items():
            its = {who: [given[place] for place in places] for who, given in answers.items()}
            its[f"always {commonest[task]}"] = [commonest[task]] * len(places)
            results += [judge(name, task, who, [labels[p] for p in places], given) for who, given in its.items()]
    return results


def judge(name: str, task: str, who: str, labels: list[str], given: list[str]) -> dict:
    return {
        "split": name,
        "task": task,
        "records": len(labels),
        "answers_by": who,
        "accuracy": float(accuracy_score(labels, given)),
        "balanced_accuracy": balanced_accuracy(labels, given),
    }


def model_card(manifest: dict, folder: str) -> ModelCard:
    results = manifest["results"]
    return fill_card(manifest, folder, "sft", IMITATES, markdown(cells(results, columns_of(results))), COPIES)
