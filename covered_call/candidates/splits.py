"""Splits: chronological, a decision time never divided, and purged where options outlive the boundary."""

import bisect
import collections
import datetime
import logging

from covered_call.candidates.options import CoveredCallCandidatesConfig, parse_option_time
from covered_call.candidates.schema import UTC, LoggedDecision

logger = logging.getLogger(__name__)


def split_decisions(
    logged: list[LoggedDecision], options: CoveredCallCandidatesConfig
) -> dict[str, list[LoggedDecision]]:
    """Decisions by split name. ``logged`` must be sorted by decision time."""
    if options.splits == "train":
        return {"train": logged}
    times = sorted({entry.decision.decision_time for entry in logged})
    starts = split_starts(times, options)
    splits = {"train": [], "validation": [], "test": []}
    names = list(splits)
    purged = collections.Counter()
    for entry in logged:
        place = bisect.bisect_right(starts, entry.decision.decision_time)
        following = bisect.bisect_left(times, starts[place]) if place < len(starts) else len(times)
        # An outcome that is not known before the next split begins would tell of it: keep it out of this one.
        if options.purge and following < len(times) and entry.label_end >= times[following]:
            purged[names[place]] += 1
        else:
            splits[names[place]].append(entry)
    for name, entries in splits.items():
        first_last = [entries[i].decision.decision_time.date() for i in (0, -1)] if entries else []
        logger.info("%s: %d decisions %s", name, len(entries), " to ".join(map(str, first_last)))
    if purged:
        counts = ", ".join(f"{count} from {name}" for name, count in purged.items())
        logger.warning("Purged %d decision(s) whose options live into the next split: %s.", purged.total(), counts)
    return splits


def split_starts(times: list[datetime.datetime], options: CoveredCallCandidatesConfig) -> list[datetime.datetime]:
    """The times from which validation and test begin."""
    if options.validation_from is not None:
        return [parse_option_time(options, name) for name in ("validation_from", "test_from")]
    train, validation, _ = map(float, options.splits)
    places = [round(len(times) * train), round(len(times) * (train + validation))]
    never = datetime.datetime.max.replace(tzinfo=UTC)
    return [times[place] if place < len(times) else never for place in places]
