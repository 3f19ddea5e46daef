"""Tokens a second of fine-tuning and scoring: each thing that makes them faster beside the same work without it.

    python benchmarks/training_speed.py                                   # a Phi-3 of four small layers, on the CPU
    python benchmarks/training_speed.py --tokenizer ../phi-3-mini         # the tokens of the real one
    python benchmarks/training_speed.py --hidden 1024 --layers 2 --rounds 5

The model has random weights and Phi-3-mini's proportions, with LoRA on every linear layer; on a GPU it computes in 16
bits. Contenders get the same records of the simulated sample and take turns; the best round of each counts, so that
whatever else the machine does weighs on all alike. Tokens are those of the records, without padding and counted once,
so that the ratio of speeds is that of times.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerBase, set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call.candidates.builder import load_candidates  # noqa: E402
from covered_call.candidates.prompts import admissible_answers  # noqa: E402
from covered_call.language_model.loading import answer_tokens, encode, half_precision  # noqa: E402
from covered_call.language_model.scoring import (  # noqa: E402
    asked_logits,
    collate,
    head_at,
    lay_out,
    pad,
    score_answers,
)
from covered_call.language_model.tiny_phi3 import train_tokenizer  # noqa: E402
from covered_call.training.examples import EpochSampler  # noqa: E402

SAMPLE = str(Path(__file__).parents[1] / "data" / "sample" / "*.csv")
TASKS = ("per_decision_ranking", "per_candidate")
STEP = 16  # records of an optimiser step


class Record(NamedTuple):
    """Token ids of a prompt, of the teacher's answer, and of all admissible ones; and whose decision it is."""

    prompt: list[int]
    answer: list[int]
    answers: list[tuple[int, ...]]
    decision: str


class Contest(NamedTuple):
    """The same work done in two ways, and the tokens of its records."""

    what: str
    before: Callable[[], None]
    after: Callable[[], None]
    tokens: int


# ---------------------------------------------------------------------------------------------------------------------
# Records and model


def load_chats(count: int) -> dict[str, list[dict]]:
    """Ranking records from all over the sample, and per_candidate records of decisions that follow one another."""
    ranking, candidates = (load_candidates(task, data_files=SAMPLE, splits="train")["train"] for task in TASKS)
    spread = np.linspace(0, len(ranking) - 1, count).astype(int)
    return dict(zip(TASKS, (list(ranking.select(spread)), list(candidates.select(range(count)))), strict=True))


def encode_records(task: str, chats: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[Record]:
    offered = [admissible_answers(task, len(chat.get("candidates", ()))) for chat in chats]
    tokens = answer_tokens(tokenizer, chats[0]["messages"][:-1], sorted({a for answers in offered for a in answers}))
    return [
        Record(prompt, answer, [tokens[a] for a in answers], chat["decision_id"])
        for (prompt, answer), answers, chat in zip(
            encode(tokenizer, [chat["messages"] for chat in chats]), offered, chats, strict=True
        )
    ]


def make_model(vocabulary: int, hidden: int, layers: int, dropout: float = 0.0) -> torch.nn.Module:
    set_seed(0)
    config = Phi3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, pad_token_id=0, bos_token_id=None,
        eos_token_id=0,
    )  # fmt: skip
    gpu = torch.cuda.is_available()
    model = Phi3ForCausalLM(config).to("cuda" if gpu else "cpu", half_precision() if gpu else torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_dropout=dropout, target_modules="all-linear")
    return get_peft_model(model, lora)


# ---------------------------------------------------------------------------------------------------------------------
# The work


def train(model: torch.nn.Module, records: list[Record], micro_batch: int) -> None:
    """Forward and backward over all records, in this order, with the loss of `covered-call train`."""
    model.train()
    for start in range(0, len(records), micro_batch):
        batch = records[start : start + micro_batch]
        ids = pad([record.prompt + record.answer for record in batch]).to(model.device)
        answers = pad([[0] * len(record.prompt) + [1] * len(record.answer) for record in batch]).to(model.device)
        rows, columns = places = answers[:, 1:].nonzero().T
        with torch.autocast(model.device.type, enabled=model.device.type == "cuda"), head_at(model, places):
            logits = model(input_ids=ids, use_cache=False).logits[0]
        cross_entropy(logits.float(), ids[rows, columns + 1]).backward()
        model.zero_grad()


def prefer(model: torch.nn.Module, records: list[Record], together: bool) -> None:
    """Forward and backward over pairs of answers, two pairs at a time: the prompt read once, or for each answer."""
    model.train()
    for start in range(0, len(records), 2):
        pairs = [(record.prompt, record.answers[:2]) for record in records[start : start + 2]]
        rows = [
            lay_out([prompt], [answers])
            for prompt, both in pairs
            for answers in ([both] if together else [[one] for one in both])
        ]
        batch = collate(rows).to(model.device)
        place, token = batch.asked
        asked_logits(model, batch).float().log_softmax(-1)[place, token].sum().backward()
        model.zero_grad()


def score(model: torch.nn.Module, records: list[Record], together: bool) -> None:
    """All answers to each prompt, what a decision's prompts share read once, or each prompt alone."""
    owners = [record.decision for record in records] if together else None
    score_answers(model, [record.prompt for record in records], [record.answers for record in records], owners)


def by_length(records: list[Record]) -> list[Record]:
    """In the order of an epoch of `covered-call train`."""
    sampler = EpochSampler([True] * len(records), "none", seed=0)
    sampler.group(np.array([len(record.prompt) + len(record.answer) for record in records]), STEP)
    return [records[place] for place in sampler]


def checkpoint(model: torch.nn.Module, every: int) -> None:
    model.enable_input_require_grads()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False}, every)


def contests(chats: dict[str, list[dict]], tokenizer, hidden: int, layers: int) -> list[Contest]:
    ranking, candidates = (encode_records(task, chats[task], tokenizer) for task in TASKS)
    order = np.random.default_rng(0).permutation(len(ranking))
    drawn = [ranking[place] for place in order]
    grouped = by_length(ranking)
    vocabulary = len(tokenizer)
    plain, dropping = (make_model(vocabulary, hidden, layers, dropout) for dropout in (0.0, 0.05))
    twice, half = (make_model(vocabulary, hidden, layers) for _ in range(2))
    checkpoint(twice, 1)
    checkpoint(half, 2)
    own = sum(len(record.prompt) + len(record.answer) for record in ranking)
    return [
        *(
            Contest(
                f"records of like length together, micro-batches of {size}",
                lambda size=size: train(plain, drawn, size),
                lambda size=size: train(plain, grouped, size),
                own,
            )
            for size in (2, 8)
        ),
        Contest(
            "a pair's prompt read once",
            lambda: prefer(plain, grouped, False),
            lambda: prefer(plain, grouped, True),
            own,
        ),
        Contest(
            "what a decision's prompts share read once",
            lambda: score(plain, candidates, False),
            lambda: score(plain, candidates, True),
            sum(len(record.prompt) for record in candidates),
        ),
        Contest(
            "every 2nd layer checkpointed, not all",
            lambda: train(twice, grouped, 2),
            lambda: train(half, grouped, 2),
            own,
        ),
        Contest(
            "no layer checkpointed, not all", lambda: train(twice, grouped, 2), lambda: train(plain, grouped, 2), own
        ),
        Contest(
            "no lora_dropout, not 0.05", lambda: train(dropping, grouped, 2), lambda: train(plain, grouped, 2), own
        ),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def race(contest: Contest, rounds: int) -> tuple[float, float]:
    """The best time of either way; a round before the first warms up."""
    times = [(seconds(contest.before), seconds(contest.after)) for _ in range(rounds + 1)]
    before, after = zip(*times[1:], strict=True)
    return min(before), min(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=64, help="of each kind; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model; default: %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--tokenizer", help="a folder or a Hub name; default: one that is made of the sample")
    options = parser.parse_args()
    logging.getLogger("covered_call").setLevel(logging.ERROR)
    chats = load_chats(options.records)
    texts = (message["content"] for kind in chats.values() for chat in kind for message in chat["messages"])
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else train_tokenizer(texts)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    size = f"hidden size {options.hidden}, {options.layers} layers"
    print(f"{device}; {size}; {options.records} records of each kind; best of {options.rounds} round(s)\n")
    print("| | tokens/s without | with | ratio |\n|---|---|---|---|")
    for contest in contests(chats, tokenizer, options.hidden, options.layers):
        before, after = race(contest, options.rounds)
        print(
            f"| {contest.what} | {contest.tokens / before:,.0f} | {contest.tokens / after:,.0f} | "
            f"{before / after:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
