"""What a model writes behind an answer that was scored: greedily, and never in its place."""

from typing import Any, NamedTuple

import torch

from covered_call.candidates.schema import Decision

# The template's longest takes 184 tokens of Phi-3, whose tokens are single digits: docs/explanations.md.
MOST_WRITTEN = 256
AT_ONCE = 16  # texts that are written together


class Explanation(NamedTuple):
    """An answer with what the model writes behind it.

    Args:
        decision: its candidates in the order of the prompt, of which the text speaks.
        place: of per_candidate which of them was asked about: that which is sold, or would be first; else None.
        messages: the prompt; empty where there is nothing to ask.
        label: the answer to it, as it was scored.
        text: label and explanation; a model may write anything there.
    """

    decision: Decision
    place: int | None
    messages: list[dict]
    label: str
    text: str


def write_on(
    model: Any, tokenizer: Any, begun: list[list[int]], end: int, most: int = MOST_WRITTEN
) -> list[list[int]]:
    """The likeliest next token, again and again, behind each of these; without the token that ends them.

    Args:
        begun: token ids, those of an answer last.
        end: the token that ends a text, which is cut off after ``most``.
    """
    written = []
    for start in range(0, len(begun), AT_ONCE):
        written += written_together(model, tokenizer, begun[start : start + AT_ONCE], end, most)
    return written


@torch.inference_mode()
def written_together(model: Any, tokenizer: Any, begun: list[list[int]], end: int, most: int) -> list[list[int]]:
    longest = max(map(len, begun))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    padded = torch.tensor([[pad] * (longest - len(row)) + row for row in begun], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in begun], device=model.device)
    found = model.eval().generate(
        input_ids=padded, attention_mask=mask, max_new_tokens=most, do_sample=False, eos_token_id=end, pad_token_id=pad
    )
    rows = found[:, longest:].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
