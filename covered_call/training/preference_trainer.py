"""The trainer of preferences: DPO with one model in memory, and each prompt read once.

The loss of DPO (https://arxiv.org/abs/2305.18290) compares the model with what it was at the start. What that start
gives to the two answers of each pair is scored once, before the first step, so that no second model is needed. A step
reads the prompt of a pair once, with the two answers in branches behind it.
"""

from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from covered_call.language_model.loading import check_adapter
from covered_call.language_model.scoring import Batch, Scored, asked_logits, collate, lay_out
from covered_call.training.money import mean_money
from covered_call.training.trainers import ScoringTrainer, answer_metrics, predictions


class PreferenceTrainer(ScoringTrainer, DPOTrainer):
    """DPOTrainer on tokenised pairs, whose reference is the model as it stands at the start.

    Args:
        adapter: a folder with the adapter's weights at the start; None for a new one, which changes nothing yet.
        train_dataset: as encode_pairs makes it of the chosen answers.
        judged: the splits to evaluate on in the end, with their pairs.

    Attributes:
        at_start: for each decision of ``judged``, the scores of its answers before the first step.
    """

    train_dataset: Dataset
    processing_class: PreTrainedTokenizerBase

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

    def _prepare_dataset(self, dataset, *args, **kwargs):
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
        money = mean_money(split, predictions(split, scored))
        return answer_metrics(split, scored) | money | pair_metrics(split, scored, start, self.beta)


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
