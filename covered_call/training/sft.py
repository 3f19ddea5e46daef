"""Fine-tunes a language model to answer as the teacher did: LoRA on an int4 or int8 base, loss on the answer only.

    python train_sft.py --config tiny              # CPU, minutes: a tiny Phi-3 it builds itself
    python train_sft.py --config ranking           # Phi-3-mini on a CUDA GPU
    python train_sft.py --config ranking --dry_run # only check that it would work
    covered-call train --config tiny --data_files 'runs/*.csv' --max_steps 50
    accelerate launch train_sft.py --config ranking

A recipe is a YAML file in configs/; every key of it can be given on the command line too, which wins. A run that was
killed goes on from its last checkpoint when the same command is given again.
"""

import math
from collections import Counter
from pathlib import Path

from datasets import DatasetDict
from transformers import set_seed

from covered_call.candidates.builder import find_csvs, fingerprint
from covered_call.candidates.reading import hashes_of
from covered_call.candidates.source import HOME
from covered_call.language_model.loading import answer_tokens, load_tokenizer
from covered_call.training.card import SFT_PANELS
from covered_call.training.examples import (
    EpochSampler,
    build_base_if_tiny,
    check_model,
    encode_split,
    is_trade,
    load_epochs,
    load_splits,
    thin_out,
    tuned_on,
)
from covered_call.training.preflight import count_steps, preflight
from covered_call.training.recipe import SFT, DataArguments, ModelArguments, TrainingArguments
from covered_call.training.results import calibrate_on, describe_run, model_card, report, save, table, what_next
from covered_call.training.runs import open_run
from covered_call.training.trainers import AnswerTrainer, load_model

STAGE = SFT


def tune(model: ModelArguments, data: DataArguments, training: TrainingArguments, given: dict) -> None:
    first = training.process_index == 0
    check_model(model)
    with training.main_process_first():
        files = find_csvs(data.data_files, data.data_dir, str(HOME))
        hashes = hashes_of(fingerprint(files))
        splits = load_splits(data, files, training.seed)
        seen = tuned_on(splits["train"])
        build_base_if_tiny(model, splits["train"], training)
        tokenizer = load_tokenizer(model.model_name_or_path)
        labels, prompt = list(splits["train"]["label"]), splits["train"][0]["messages"][:-1]
        commonest = Counter(labels).most_common(1)[0][0]  # as shown, before any shuffle
        sampler = EpochSampler([is_trade(label) for label in labels], data.balance, training.seed)
        if data.candidate_order == "shuffle" and data.dataset_config == "per_decision_ranking":
            sampler.copies = math.ceil(count_steps(training, len(sampler))[1])
            splits["train"] = load_epochs(data, files, training.seed, sampler.copies)
        splits = DatasetDict({name: encode_split(split, tokenizer) for name, split in splits.items()})
        offered = {answer for split in splits.values() for choices in split["answers"] for answer in choices}
        answers = answer_tokens(tokenizer, prompt, sorted(offered))
    ready = preflight(model, data, training, splits, tokenizer, answers, sampler)
    if first:
        print(ready)
    if training.dry_run:
        return
    manifest = describe_run(model, data, training, given, hashes, splits, answers, sampler, seen)
    with training.main_process_first():
        checkpoint = open_run(Path(training.output_dir), manifest, training.overwrite_output_dir and first)
    set_seed(training.seed)  # the adapter is drawn before the Trainer sets its seed
    base, adapter = load_model(model, training)
    trainer = AnswerTrainer(
        model=base,
        args=training,
        train_dataset=splits["train"],
        eval_dataset=thin_out(splits["validation"], data.max_eval_records),
        processing_class=tokenizer,
        peft_config=adapter,
        sampler=sampler,
        answers=answers,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    scored = {name: trainer.score(splits[name]) for name in ("validation", "test") if name in splits}
    results = report(trainer, splits, scored, commonest)
    calibration = calibrate_on(splits["validation"], scored["validation"])
    save(trainer, manifest, results, calibration, SFT_PANELS, model_card)
    if first:
        print(table(results))
        print(what_next(training.output_dir))
