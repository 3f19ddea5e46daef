"""Where a decision lies beyond what a policy was tuned on: there its answer is a guess."""

import math

from covered_call.candidates.schema import Decision


def drift_of(decision: Decision, numbers: dict[str, list[float]]) -> list[str]:
    """Each number of the candidates that is at some of them outside its range, with both ranges.

    Args:
        numbers: of the policy's training, the least and the most of each.
    """
    found = []
    for name, (low, high) in numbers.items():
        values = [value for one in decision.candidates if (value := getattr(one, name)) is not None]
        values = [value for value in values if not math.isnan(value)]
        if values and not low <= min(values) <= max(values) <= high:
            found.append(f"{name} {span(min(values), max(values))} (tuned on {span(low, high)})")
    return found


def span(low: float, high: float) -> str:
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
