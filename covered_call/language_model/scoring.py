"""How likely a language model finds each admissible answer to each prompt: scored, never sampled.

The prompts of one decision are read as one row, what they share once, with all their answers in branches behind them:
one forward pass, and no cache of keys and values is kept.
"""

import contextlib
import itertools
import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear8bitLt
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from covered_call.language_model.manifest import PolicyError

logger = logging.getLogger(__name__)

# What a masked attention score is lowered by: its weight is 0 in every precision, and float16 can still hold it.
MASKED = -3e4
ROW_TOKENS = 2_048  # prompts of one decision share a row up to here: attention grows with the square of a row
CPU_TOKENS = 4_096  # scored together on a CPU, whose memory is not asked for
MOST_TOKENS = 65_536  # scored together on a GPU however large; where more stops to pay is not measured
SHARE_OF_FREE = 0.8  # of the free memory, for the allocator loses some to fragments


class MemoryFull(PolicyError):
    """The memory does not hold the model, or one decision beside it."""


class Scored(NamedTuple):
    """One prompt's answers: their log-probabilities through the end token, in the order they were given, and whether
    the model, left to itself, would greedily write one of them."""

    log_probabilities: list[float]
    in_set: bool


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class Row(NamedTuple):
    """Prompts that begin alike, and their answers, as one sequence of tokens: what the prompts share, then the rest of
    each with its answers, side by side.

    Args:
        tokens: their ids.
        positions: of each token in its own prompt and answer.
        ends: for each token the place in the row where what follows on it ends: tokens from there on do not see it.
        asked: for each token of each answer (prompt, answer, the place in the row that predicts it, its id).
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    asked: list[tuple[int, int, int, int]]


def lay_out(prompts: list[list[int]], answers: list[list[tuple[int, ...]]]) -> Row:
    """The row of these prompts, each with its own answers. The last token of an answer predicts nothing: left out."""
    shared = len(os.path.commonprefix(prompts))
    tokens, positions, ends, asked = prompts[0][:shared], list(range(shared)), [], []
    for index, (prompt, given) in enumerate(zip(prompts, answers, strict=True)):
        own = prompt[shared:]
        tokens = tokens + own
        positions += range(shared, len(prompt))
        last, answer_ends = (len(tokens) if own else shared) - 1, []
        for choice, answer in enumerate(given):
            columns = [last, *range(len(tokens), len(tokens) + len(answer) - 1)]
            asked += [(index, choice, column, token) for column, token in zip(columns, answer, strict=True)]
            tokens += answer[:-1]
            positions += range(len(prompt), len(prompt) + len(answer) - 1)
            answer_ends += [len(tokens)] * (len(answer) - 1)
        ends += [len(tokens)] * len(own) + answer_ends
    return Row(tokens, positions, [len(tokens)] * shared + ends, asked)


class Batch(NamedTuple):
    """Rows as tensors, padded on the right.

    Args:
        input_ids, position_ids, ends: shape (rows, tokens); see Row.
        places: row and column of each place where something is asked, shape (2, places).
        asked: for each token that is asked its place in ``places`` and its id, shape (2, tokens asked).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor
    asked: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part.to(device) for part in self))


def collate(rows: list[Row]) -> Batch:
    places: dict[tuple[int, int], int] = {}
    asked = []
    for number, row in enumerate(rows):
        for _, _, column, token in row.asked:
            asked.append((places.setdefault((number, column), len(places)), token))
    return Batch(
        pad([row.tokens for row in rows]),
        pad([row.positions for row in rows]),
        pad([row.ends for row in rows]),
        torch.tensor(list(places)).T,
        torch.tensor(asked).T,
    )


def pad(rows: list[list[int]]) -> torch.Tensor:
    """The rows as one tensor, with zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)


def branch_mask(ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores, shape (rows, 1, tokens, tokens): 0 where a token sees another, of those
    before it in its own prompt and answer."""
    place = torch.arange(ends.shape[1], device=ends.device)
    seen = (place <= place[:, None]) & (place[:, None] < ends[:, None, :])
    return torch.zeros(seen.shape, dtype=dtype, device=ends.device).masked_fill_(~seen, MASKED)[:, None]


def asked_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits where something is asked, shape (places, vocabulary), in one pass and in the model's own precision."""
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    batch = batch.to(like.device)
    half = like.dtype in (torch.bfloat16, torch.float16)  # its adapter is in float32, and would double all it touches
    with torch.autocast(like.device.type, like.dtype if half else None, enabled=half), head_at(model, batch.places):
        return model(
            input_ids=batch.input_ids,
            attention_mask=branch_mask(batch.ends, like.dtype),
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits[0]


@contextlib.contextmanager
def head_at(model: torch.nn.Module, places: torch.Tensor) -> Generator[None]:
    """Within, a causal language model computes logits at these places alone, shape (1, places, vocabulary).

    Args:
        places: row and column of each, shape (2, places).
    """
    head = language_model(model).get_output_embeddings()
    rows, columns = places
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][rows, columns][None], *given[1:]))
    try:
        yield
    finally:
        hook.remove()


def language_model(model: torch.nn.Module) -> PreTrainedModel:
    """The model itself, inside an adapter or what spreads it over processes."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def score_answers(
    model: torch.nn.Module,
    prompts: list[list[int]],
    answers: list[list[tuple[int, ...]]],
    decisions: Sequence | None = None,
    batch_tokens: int | None = None,
) -> list[Scored]:
    """Scores every answer of every prompt, what a decision's prompts share read once, in batches of like length.

    The batches change no score but in int8, whose multiplication treats columns with an outlier anywhere in the batch
    apart, padding included: there each row is a batch of its own, so that answers that are compared are always
    scored together, and alone.

    Args:
        prompts: token ids, the generation prompt included.
        answers: for each prompt, the token ids of its admissible answers, end token included.
        decisions: for each prompt the decision that it belongs to; those that follow one another share a row. None:
            each is a decision of its own.
        batch_tokens: read together, padding included; default what fits in the GPU's free memory. If that turns out
            too much, it is halved.

    Raises:
        MemoryFull: if the memory does not even hold one row.
    """
    model.eval()
    rows = lay_out_decisions(prompts, answers, decisions)
    scored: list[Any] = [None] * len(prompts)
    with tqdm(total=len(prompts), desc="Scoring answers", unit=" prompts", disable=None, leave=False) as bar:
        for places, results in score_in_batches(model, rows, batch_tokens):
            for place, result in zip(places, results, strict=True):
                scored[place] = result
            bar.update(len(places))
    return scored


Placed = tuple[list[int], Row]  # a row, and the places of its prompts in the caller's list


def lay_out_decisions(prompts: list, answers: list, decisions: Sequence | None) -> list[Placed]:
    """The rows of all decisions, longest first: too much memory shows at once."""
    owners = range(len(prompts)) if decisions is None else decisions
    lengths = [len(prompt) for prompt in prompts]
    rows = []
    for _, group in itertools.groupby(range(len(prompts)), key=owners.__getitem__):
        for places in packed(list(group), lengths):
            rows.append((places, lay_out([prompts[i] for i in places], [answers[i] for i in places])))
    return sorted(rows, key=lambda row: len(row[1].tokens), reverse=True)


def packed(group: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """The prompts of a decision in runs of at most ROW_TOKENS tokens, or of one prompt."""
    run, tokens = [], 0
    for place in group:
        if run and tokens + lengths[place] > ROW_TOKENS:
            yield run
            run, tokens = [], 0
        run.append(place)
        tokens += lengths[place]
    yield run


def score_in_batches(
    model: torch.nn.Module, rows: list[Placed], batch_tokens: int | None
) -> Iterator[tuple[list[int], list[Scored]]]:
    """The scores of each batch with the places of its prompts; half as many tokens from where the memory is full."""
    budget, told = batch_tokens or free_tokens(model, rows), False
    apart = any(isinstance(module, Linear8bitLt) for module in model.modules())
    batches = cut(rows, 1 if apart else budget)
    spread = is_sharded(model)
    if spread:
        batches = in_step(batches)
    while batches:
        batch = batches.popleft()
        scored = None
        with contextlib.nullcontext() if spread else contextlib.suppress(torch.OutOfMemoryError):
            scored = score_rows(model, [row for _, row in batch])
        if scored is None:  # only here, where nothing holds the tensors of the failed batch any more
            budget, told = halve(batch, told), True
            batches = cut([*batch, *itertools.chain.from_iterable(batches)], budget)
            continue
        yield [place for places, _ in batch for place in places], scored


def cut(rows: list[Placed], budget: int) -> deque[list[Placed]]:
    """The rows, which get shorter, in batches of at most ``budget`` tokens with their padding, or of one row."""
    batches, start = deque(), 0
    while start < len(rows):
        count = max(1, budget // len(rows[start][1].tokens))
        batches.append(rows[start : start + count])
        start += count
    return batches


def halve(batch: list[Placed], told: bool) -> int:
    """Half of the tokens that did not fit; said the first time."""
    tokens = len(batch) * len(batch[0][1].tokens)
    if len(batch) == 1:
        raise MemoryFull(
            f"The memory is full with the {tokens} tokens of one decision alone: close what else uses the GPU, load "
            "the model in int4, or give decisions of fewer candidates."
        )
    torch.cuda.empty_cache()
    if not told:
        logger.warning("The memory does not hold %d tokens at once: going on with %d.", tokens, tokens // 2)
    return tokens // 2


def is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(module, (FullyShardedDataParallel, FSDPModule)) for module in model.modules())


def in_step(batches: deque) -> deque:
    """As many batches on each process, for a sharded model needs all in each pass: the last batch is repeated."""
    counts: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, len(batches))
    return deque([*batches, *[batches[-1]] * (max(counts) - len(batches))])


@torch.inference_mode()
def score_rows(model: torch.nn.Module, rows: list[Row]) -> list[Scored]:
    """The scores of the rows' prompts, one after another."""
    batch = collate(rows)
    by_token = asked_logits(model, batch).float().log_softmax(-1)
    place, token = batch.asked.to(by_token.device)
    best = by_token.argmax(-1)[place] == token
    found = zip(by_token[place, token].tolist(), best.tolist(), strict=True)
    return [one for row in rows for one in add_up(row.asked, found)]


def add_up(asked: list[tuple], found: Iterator[tuple[float, bool]]) -> list[Scored]:
    """Each prompt's answers from the log-probabilities of their tokens, and from whether each is the likeliest."""
    prompts: dict[int, dict[int, tuple[float, bool]]] = {}
    for prompt, answer, _, _ in asked:
        answers = prompts.setdefault(prompt, {})
        total, greedy = answers.get(answer, (0.0, True))
        log_probability, best = next(found)
        answers[answer] = total + log_probability, greedy and best
    return [
        Scored([total for total, _ in answers.values()], any(greedy for _, greedy in answers.values()))
        for answers in prompts.values()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def free_tokens(model: torch.nn.Module, rows: list[Placed]) -> int:
    """How many tokens fit in the free memory of the model's GPU, with the logits that these rows ask for."""
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if like.device.type != "cuda" or not rows:
        return CPU_TOKENS
    asked = max(len({column for _, _, column, _ in row.asked}) / len(row.tokens) for _, row in rows)
    token = scoring_bytes(language_model(model).config, like.element_size(), asked)
    return int(min(MOST_TOKENS, SHARE_OF_FREE * free_memory(like.device) / token))


def scoring_bytes(config: PretrainedConfig, width: int, asked: float) -> float:
    """Memory that reading one token takes, where most is alive: in the MLP of a layer that carries an adapter.

    Args:
        width: bytes of a number of the model's arithmetic.
        asked: places a token at which logits are computed; those stay, and are brought to float32 and normalised.
    """
    text = config.get_text_config()
    alive = 6 * (text.intermediate_size + text.hidden_size)
    return alive * width + asked * text.vocab_size * (width + 4 + 4)


def free_memory(device: torch.device | int = 0) -> int:
    """Bytes that a GPU still has for this process, what PyTorch holds in reserve and a cap set on it included."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    capped = int(torch.cuda.get_per_process_memory_fraction(device) * total) - allocated
    return min(free + torch.cuda.memory_reserved(device) - allocated, capped)
