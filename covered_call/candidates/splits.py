"""Splits: chronological, a decision time never divided, and purged where options outlive the boundary."""

import collections
import itertools
import logging

import numpy as np

from covered_call.candidates.columns import microseconds, time_of
from covered_call.candidates.options import CoveredCallCandidatesConfig, parse_option_time
from covered_call.candidates.schema import LoggedDecision

logger = logging.getLogger(__name__)


def split_decisions(
    logged: list[LoggedDecision], options: CoveredCallCandidatesConfig
) -> dict[str, list[LoggedDecision]]:
    """Decisions by split name. ``logged`` must be sorted by decision time."""
    time = np.array([microseconds(entry.decision.decision_time) for entry in logged], np.int64)
    label_end = np.array([microseconds(entry.label_end) for entry in logged], np.int64)
    return {name: [logged[i] for i in places] for name, places in split_places(time, label_end, options).items()}


def split_places(
    time: np.ndarray, label_end: np.ndarray, options: CoveredCallCandidatesConfig
) -> dict[str, np.ndarray]:
    """Places of decisions by split name.

    Args:
        time: (D,) microseconds since 1970, sorted.
        label_end: (D,) the same, of when the last of a decision's outcomes is known.
    """
    if options.splits == "train":
        return {"train": np.arange(len(time))}
    splits, purged = {}, collections.Counter()
    for name, (begin, end) in split_bounds(time, options).items():
        splits[name] = np.arange(begin, end)
        if options.purge and end < len(time):
            # An outcome that is not known before the next split begins would tell of it: keep it out of this one.
            splits[name] = splits[name][label_end[begin:end] < time[end]]
            purged[name] = end - begin - len(splits[name])
        first_last = [time_of(int(time[splits[name][i]])).date() for i in (0, -1)] if len(splits[name]) else []
        logger.info("%s: %d decisions %s", name, len(splits[name]), " to ".join(map(str, first_last)))
    say_purged(purged)
    return splits


def say_purged(purged: collections.Counter) -> None:
    if purged.total():
        counts = ", ".join(f"{count} from {name}" for name, count in purged.items() if count)
        logger.warning("Purged %d decision(s) whose options live into the next split: %s.", purged.total(), counts)


def split_bounds(time: np.ndarray, options: CoveredCallCandidatesConfig) -> dict[str, tuple[int, int]]:
    """Where the decisions of each split begin and end, before the purge."""
    if options.splits == "train":
        return {"train": (0, len(time))}
    ends = [0, *np.searchsorted(time, split_starts(time, options)).tolist(), len(time)]
    return dict(zip(("train", "validation", "test"), itertools.pairwise(ends), strict=True))


def split_starts(time: np.ndarray, options: CoveredCallCandidatesConfig) -> list[int]:
    """The times from which validation and test begin."""
    if options.validation_from is not None:
        return [microseconds(parse_option_time(options, name)) for name in ("validation_from", "test_from")]
    new = np.ones(len(time), bool)
    new[1:] = time[1:] != time[:-1]
    firsts = np.flatnonzero(new)  # a distinct time each
    train, validation, _ = map(float, options.splits)
    places = [round(len(firsts) * train), round(len(firsts) * (train + validation))]
    never = np.iinfo(np.int64).max
    return [int(time[firsts[place]]) if place < len(firsts) else never for place in places]
