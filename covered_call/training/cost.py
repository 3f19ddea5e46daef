"""What a training costs: the tokens that each of its phases reads, in hours and money where a speed was measured."""

import math

import numpy as np

from covered_call.training.recipe import RunArguments

MARGIN = 1.5  # of the hours: loading, saving, and what a speed measured elsewhere does not know
READERS = 2  # the tuned model and what it is compared with both answer the final table's records


def describe_cost(training: RunArguments, steps: int, records: int, lengths: dict[str, np.ndarray]) -> str:
    """One line of the preflight.

    Args:
        records: of a step, on all processes.
        lengths: tokens of each record; under "train" of those of an epoch, under "evaluated" of those that are scored
            each time while it trains, under "validation" and "test" of all, and under "reference" of those that are
            scored before the first step, if there are any.
    """
    tokens = phases(training, steps, records, lengths)
    read = ", ".join(f"{phase} {millions(number)}" for phase, number in tokens.items())
    speed, price = training.tokens_per_second, training.price_per_hour
    if speed is None:
        return (
            "unknown, for tokens/s were not measured (python benchmarks/gpu_memory.py does; then give "
            f"tokens_per_second); million tokens: {read}"
        )
    # An answer is scored faster than it is learnt: at the speed of training this is what the others take at most.
    hours = {phase: number / speed / training.world_size / 3600 for phase, number in tokens.items()}
    each = ", ".join(f"{phase} {number:.2f}" for phase, number in hours.items())
    total = MARGIN * sum(hours.values())
    money = f", {total * price:,.2f} at {price:g} an hour" if price is not None else ", money unknown: price_per_hour"
    return f"{total:.2f} hours with {MARGIN - 1:.0%} to spare{money}; at {speed:,.0f} tokens/s a GPU, in hours: {each}"


def phases(training: RunArguments, steps: int, records: int, lengths: dict[str, np.ndarray]) -> dict[str, float]:
    """Tokens that are read in each phase."""
    judged = sum(float(lengths[name].sum()) for name in ("validation", "test") if name in lengths)
    reference = {"reference": float(lengths["reference"].sum())} if "reference" in lengths else {}
    return {
        **reference,
        "training": steps * records * float(lengths["train"].mean()),
        "evaluations": count_evaluations(training, steps) * float(lengths["evaluated"].sum()),
        "final table": READERS * judged,
    }


def count_evaluations(training: RunArguments, steps: int) -> int:
    """How often a run of so many steps stops to evaluate."""
    kind = str(getattr(training.eval_strategy, "value", training.eval_strategy))
    if kind == "steps":
        every = float(training.eval_steps or training.logging_steps)
        return int(steps // (every if every >= 1 else max(1, math.ceil(every * steps))))
    return math.ceil(training.num_train_epochs) if kind == "epoch" else 0


def millions(tokens: float) -> str:
    return f"{tokens / 1e6:.2f}"
