"""Prompts per second of label scoring, beside generating the answer and a forward pass for every answer.

    python benchmarks/label_scoring.py
    python benchmarks/label_scoring.py --prompts 64 --rounds 1 --batch_sizes 16   # a quick look
    OMP_NUM_THREADS=1 python benchmarks/label_scoring.py

All contenders get the same ranking prompts of the simulated sample, already tokenised, and the same tiny Phi-3 with
random weights, whose speed is that of a tuned one. Rounds take turns, and the best round of each counts, so that
whatever else the machine does weighs on all alike. That label scoring finds what the separate passes find is checked.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call.candidates.builder import load_candidates  # noqa: E402
from covered_call.candidates.prompts import admissible_answers  # noqa: E402
from covered_call.language_model.loading import answer_tokens, chat_ids  # noqa: E402
from covered_call.language_model.scoring import score_answers  # noqa: E402
from covered_call.language_model.tiny_phi3 import random_phi3, train_tokenizer  # noqa: E402

SAMPLE = str(Path(__file__).parents[1] / "data" / "sample" / "*.csv")
LABEL_SCORING, SEPARATE = "label scoring", "a forward pass for each answer"
MILLION = 1_000_000


def score_labels(model: PreTrainedModel, prompts: list, answers: list, batch_size: int) -> list[list[float]]:
    """In batches of about so many prompts."""
    tokens = batch_size * max(map(len, prompts))
    return [one.log_probabilities for one in score_answers(model, prompts, answers, batch_tokens=tokens)]


@torch.inference_mode()
def generate(model: PreTrainedModel, prompts: list, answers: list, batch_size: int) -> None:
    """Greedy, up to the longest answer; in batches of like length, padded on the left."""
    ends = {answer[-1] for given in answers for answer in given}
    ordered = sorted(prompts, key=len, reverse=True)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        width = len(batch[0])
        model.generate(
            torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch]),
            attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]),
            max_new_tokens=max(len(answer) for given in answers for answer in given),
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=0,
        )


@torch.inference_mode()
def separate_passes(model: PreTrainedModel, prompts: list, answers: list, batch_size: int) -> list[list[float]]:
    """One (prompt, answer) after another, as one would write it first."""
    return [
        [score_alone(model, prompt, answer) for answer in given]
        for prompt, given in zip(prompts, answers, strict=True)
    ]


def score_alone(model: PreTrainedModel, prompt: list[int], answer: tuple[int, ...]) -> float:
    logits = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()


def contenders(batch_sizes: list[int]) -> dict[str, tuple]:
    return {
        **{f"{LABEL_SCORING}, batches of {size}": (score_labels, size) for size in batch_sizes},
        "`generate`, one by one": (generate, 1),
        **{f"`generate`, batches of {size}": (generate, size) for size in batch_sizes},
        f"{SEPARATE}, one by one": (separate_passes, 1),
    }


def prepare(count: int) -> tuple[PreTrainedModel, list[list[int]], list[list[tuple]], float]:
    """Model, prompts (evenly spaced in the sample), their answers, and the seconds that tokenising a prompt takes."""
    records = load_candidates("per_decision_ranking", data_files=SAMPLE, splits="train")["train"]
    records = list(records.select(np.linspace(0, len(records) - 1, count).astype(int)))
    chats = [record["messages"][:-1] for record in records]
    tokenizer = train_tokenizer(message["content"] for record in records for message in record["messages"])
    began = time.perf_counter()
    prompts = chat_ids(tokenizer, chats, add_generation_prompt=True)
    seconds = (time.perf_counter() - began) / count
    given = [admissible_answers("per_decision_ranking", len(record["candidates"])) for record in records]
    tokens = answer_tokens(tokenizer, chats[0], sorted({answer for answers in given for answer in answers}))
    model = random_phi3(tokenizer, seed=0).eval()
    return model, prompts, [[tokens[answer] for answer in answers] for answers in given], seconds


def measure(model: PreTrainedModel, prompts: list, answers: list, batch_sizes: list[int], rounds: int) -> dict:
    """The seconds of each contender's best round."""
    best, found = {}, {}
    for _ in range(rounds):
        for name, (contend, size) in contenders(batch_sizes).items():
            contend(model, prompts[:size], answers[:size], size)  # warms up
            began = time.perf_counter()
            found[name] = contend(model, prompts, answers, size)
            best[name] = min(best.get(name, np.inf), time.perf_counter() - began)
    alone = found[f"{SEPARATE}, one by one"]
    for size in batch_sizes:
        for one, other in zip(found[f"{LABEL_SCORING}, batches of {size}"], alone, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 16], help="default: 4 16")
    args = parser.parse_args()
    logging.getLogger("covered_call").setLevel(logging.ERROR)
    model, prompts, answers, tokenising = prepare(args.prompts)
    seconds = measure(model, prompts, answers, args.batch_sizes, args.rounds)
    fastest = min(taken for name, taken in seconds.items() if name.startswith(LABEL_SCORING))
    print(
        f"{len(prompts)} ranking prompts of {np.mean([*map(len, prompts)]):.0f} tokens, "
        f"{np.mean([*map(len, answers)]):.1f} answers each, on average; CPU, {torch.get_num_threads()} thread(s), "
        f"best of {args.rounds} round(s)\n"
    )
    print("| | prompts/s | label scoring is faster by | a million decisions, predicted |\n|---|---|---|---|")
    for name, taken in seconds.items():
        hours = (taken / len(prompts) + tokenising) * MILLION / 3600
        print(f"| {name} | {len(prompts) / taken:.0f} | {taken / fastest:.1f}x | {hours:.1f} h |")
    print(f"\nThe prediction adds {tokenising * 1e3:.2f} ms a prompt, as measured, for writing it in tokens.")


if __name__ == "__main__":
    main()
