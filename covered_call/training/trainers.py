"""The trainers: TRL's, evaluated by scoring answers, in an order of records that can be resumed; and their model."""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from sklearn.metrics import accuracy_score, recall_score
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import is_fsdp_enabled
from trl import SFTTrainer

from covered_call.language_model.loading import load_base
from covered_call.language_model.manifest import CHECKPOINT
from covered_call.language_model.scoring import Scored, head_at, score_answers
from covered_call.language_model.training_log import talk_plainly
from covered_call.training.examples import IGNORE, EpochOrder, is_trade, prompt_length, tasks_in
from covered_call.training.keys import SHORT_NAMES, ModelArguments
from covered_call.training.recipe import RunArguments
from covered_call.training.runs import TrainingStopped

if TYPE_CHECKING:
    import transformers

    class Mixed(transformers.Trainer):
        """What ScoringTrainer is mixed into, and what it is given."""

        args: RunArguments
        processing_class: Any  # a tokenizer
        model: Any  # a PreTrainedModel, or a PeftModel where an adapter is trained
        model_wrapped: torch.nn.Module
        eval_dataset: Dataset
else:
    Mixed = object

ZERO_GRADIENT_STEPS = 20


def load_model(
    model: ModelArguments, training: RunArguments, revision: str | None = None
) -> tuple[PreTrainedModel, LoraConfig | None]:
    """The base, quantised as asked, and the adapter to attach."""
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    name, sharded = model.model_name_or_path, is_fsdp_enabled()
    base = load_base(name, model.quantization, dtype, training.device, revision, sharded, training.liger)
    return base, lora_config(model)


def lora_config(model: ModelArguments) -> LoraConfig | None:
    """LoRA (https://arxiv.org/abs/2106.09685) on every linear layer but the head; None to train all weights."""
    if not model.lora_r:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules="all-linear",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Trainers


class ScoringTrainer(Mixed):
    """Mixed into a trainer of TRL's: evaluated by scoring answers, in an order of records that can be resumed.

    Args:
        sampler: of the training records.
        answers: the tokens of each answer.
    """

    def __init__(self, *args, sampler: EpochOrder, answers: dict[str, tuple[int, ...]], **kwargs):
        self.sampler, self.answers = sampler, answers
        super().__init__(*args, callbacks=[StopOnTrouble(), FindBest()], **kwargs)
        talk_plainly(self)
        if not self.is_fsdp_enabled:
            # TRL keeps a quantised model's adapter in bfloat16, whose 8 bits swallow small steps, which float16
            # training cannot scale, and which a resumed run would load as float32.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's
        if checkpoint is None or self.is_fsdp_enabled or not getattr(optimizer, "is_paged", False):
            return
        # What was loaded lies in plain memory. On one GPU it would stay there; on several it is still marked as paged,
        # and bitsandbytes ends the process when it prefetches it.
        for parameter, state in optimizer.state.items():
            for name in state.keys() & {"state1", "state2"}:
                paged = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = paged.copy_(state[name])

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        # The run was killed after its last step. The Trainer asks whether that was the last only once it took another.
        self.control.should_training_stop = True

    def _get_train_sampler(self, train_dataset=None) -> EpochOrder:
        return self.sampler

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingStopped(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}. Lower learning_rate, or train in "
                "bfloat16. The last checkpoint is kept."
            )
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Metrics of the scores of the admissible answers; see ``measure``."""
        split = self.eval_dataset if eval_dataset is None else eval_dataset
        found = self.measure(split, self.score(split))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, split: Dataset, scored: list[Scored]) -> dict[str, float]:
        """Of each task apart, with its name before each metric's if there are several."""
        parts = tasks_in(split)
        if len(parts) == 1:
            return answer_metrics(split, scored)
        found = {}
        for task, places in parts.items():
            metrics = answer_metrics(split.select(places), [scored[place] for place in places])
            found |= {f"{SHORT_NAMES[task]}_{name}": value for name, value in metrics.items()}
        return found

    def score(self, split: Dataset, model: torch.nn.Module | None = None) -> list[Scored]:
        """The scores of each record's admissible answers, every process taking its share of the decisions.

        Args:
            model: another than the one that is trained.
        """
        processes = self.accelerator.num_processes
        owners = list(split["decision_id"])
        groups = [list(rows) for _, rows in itertools.groupby(range(len(split)), key=owners.__getitem__)]
        share = math.ceil(len(groups) / processes)
        # A sharded model needs all processes in each pass: one without a share takes the last decision once more.
        start = min(share * self.accelerator.process_index, len(groups) - 1)
        mine = [place for group in groups[start : start + share] for place in group]
        prompts, answers = [], []
        for row in split.select(mine):
            prompts.append(row["input_ids"][: prompt_length(row["labels"])])
            answers.append([self.answers[answer] for answer in row["answers"]])
        decisions = [owners[place] for place in mine]
        model = self.model_wrapped if model is None else model
        found = score_answers(model, prompts, answers, decisions, self.args.batch_tokens)
        scored = dict(zip(mine, found, strict=True))
        if processes > 1:
            scored = dict(gather_object(list(scored.items())))
        return [scored[place] for place in range(len(split))]


class AnswerTrainer(ScoringTrainer, SFTTrainer):
    """SFTTrainer with logits only where there are labels, or what explains them.

    Args:
        explanation_weight: of the mean loss of an explanation's tokens, beside that of its answer's.
        by_record: whether each record of a step counts the same, and not each token of their answers.
    """

    def __init__(
        self,
        *args,
        sampler: EpochOrder,
        answers: dict[str, tuple[int, ...]],
        explanation_weight: float = 0.0,
        by_record: bool = False,
        **kwargs,
    ):
        self.explanation_weight, self.by_record = explanation_weight, by_record
        self.weights = {tokens: sampler.weight_of(answer) for answer, tokens in answers.items()}
        super().__init__(*args, sampler=sampler, answers=answers, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and what the sum of their losses is divided by: the tokens of the answers, or
        the records, of all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.by_record and items is not None:
            records = torch.tensor(sum(len(batch["labels"]) for batch in batches), device=device)
            items = self.accelerator.gather(records).sum()
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy of the answers' tokens, and of what explains them; the logits of all other positions are never
        computed."""
        labels = inputs.pop("labels")
        asked = labels != IGNORE
        behind = asked.cumsum(1).bool() & ~asked & inputs["attention_mask"].bool()
        behind &= self.explanation_weight > 0
        rows, columns = places = (asked | behind)[:, 1:].nonzero().T  # whose next token is an answer's, or explains it
        with head_at(model, places):
            outputs = model(**inputs, use_cache=False)
        targets = inputs["input_ids"][rows, columns + 1]
        by_token = torch.nn.functional.cross_entropy(outputs.logits[0].float(), targets, reduction="none")
        # An answer counts what it does without an explanation, whose tokens together count a share of that.
        share = self.explanation_weight * asked.sum(1) / behind.sum(1).clamp(min=1)
        weights = torch.where(behind[rows, columns + 1], share[rows], 1.0) * self.weights_of(labels)[rows]
        weighted = (by_token * weights).sum()
        if num_items_in_batch is None:
            loss = weighted / (len(labels) if self.by_record else asked.sum())
        else:  # those of all processes and accumulated batches; DDP then takes the mean over processes
            loss = weighted / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def weights_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Of each token of a row: its answer's; a record that is none of the teacher's counts 1."""
        answers = [tuple(token for token in row if token != IGNORE) for row in labels.tolist()]
        weights = [self.weights.get(answer, 1.0) for answer in answers]
        if self.by_record:
            weights = [weight / len(answer) for weight, answer in zip(weights, answers, strict=True)]
        return torch.tensor(weights, device=labels.device)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def answer_metrics(split: Dataset, scored: list[Scored]) -> dict[str, float]:
    """How the likeliest answers compare with the teacher's.

    loss is the mean negative log-likelihood of the teacher's answer among the admissible ones; trade_rate the share
    of answers that sell; outside the share of records to which the model, left to itself, would write something else
    than an admissible answer; answers_used how many different answers it gave.
    """
    labels = split["label"]
    predicted = predictions(split, scored)
    likelihoods = [torch.tensor(one.log_probabilities).log_softmax(0) for one in scored]
    given = zip(likelihoods, split["answers"], labels, strict=True)
    return {
        "loss": -float(np.mean([row[answers.index(label)] for row, answers, label in given])),
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": balanced_accuracy(labels, predicted),
        "trade_rate": float(np.mean([is_trade(answer) for answer in predicted])),
        "outside": float(np.mean([not one.in_set for one in scored])),
        "answers_used": len(set(predicted)),
    }


def predictions(split: Dataset, scored: list[Scored]) -> list[str]:
    """The likeliest admissible answer of each record."""
    return [
        answers[int(np.argmax(one.log_probabilities))] for answers, one in zip(split["answers"], scored, strict=True)
    ]


def balanced_accuracy(labels: list[str], predicted: list[str]) -> float:
    """Mean over the answers that the teacher gave of the share of each that is met."""
    return float(recall_score(labels, predicted, labels=sorted(set(labels)), average="macro", zero_division=0))


# ---------------------------------------------------------------------------------------------------------------------
# Callbacks


class StopOnTrouble(TrainerCallback):
    """Ends a run that learns nothing: no gradient, or one answer to everything."""

    still = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        self.still = 0 if gradients and torch.nn.utils.get_total_norm(gradients) != 0 else self.still + 1
        if self.still >= ZERO_GRADIENT_STEPS:
            raise TrainingStopped(
                f"The gradient was zero for {self.still} steps, up to step {state.global_step + 1}, so nothing is "
                "learnt. Is learning_rate far too high, or is everything frozen?"
            )

    def on_evaluate(self, args, state, control, **kwargs):
        for key in sorted({key for entry in state.log_history for key in entry if key.endswith("answers_used")}):
            used = [entry[key] for entry in state.log_history if key in entry]
            if args.collapse_patience and used[-args.collapse_patience :] == [1] * args.collapse_patience:
                task = key.removeprefix("eval_").removesuffix("answers_used")  # "" where there is one alone
                self.collapsed(args, state, f"every {task.replace('_', ' ')}answer")

    def collapsed(self, args, state, which: str) -> NoReturn:
        raise TrainingStopped(
            f"In the last {args.collapse_patience} evaluations, up to step {state.global_step}, {which} was "
            "the same: the model has collapsed onto one class. Try balance: downsample or weight, another "
            "learning_rate, or more steps between evaluations; collapse_patience 0 lets it go on."
        )


class FindBest(TrainerCallback):
    """Finds the best checkpoint of a resumed run in its folder, which may have been moved, or named from elsewhere.

    The Trainer goes by the path it once had, and where that leads nowhere keeps the last weights.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        best = Path(args.output_dir) / f"{CHECKPOINT}{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)
