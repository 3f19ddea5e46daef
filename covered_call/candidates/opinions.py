"""What a model of outcomes expected of candidates, as a file has it: a second opinion, from before the decision."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from covered_call.candidates.columns import OPINION, Columns, time_of
from covered_call.candidates.schema import CandidatesError, printable, shown

UTC_TIME = pa.timestamp("us", tz="UTC")
# A row a candidate: what is expected of selling it, in % of spot, and how probably that is above 0, by a model that
# was fitted on outcomes none of which ended after fitted_before.
OPINIONS = pa.schema(
    [("decision_time", UTC_TIME), *((name, pa.string()) for name in ("underlying", "exit_style", "instrument"))]
    + [("expected", pa.float64()), ("positive", pa.float64()), ("fitted_before", UTC_TIME)]
)  # fmt: skip
OPINION_KEY = ("decision_time", "underlying", "exit_style", "instrument")


def read_opinions(path: str) -> pa.Table:
    """The rows of OPINIONS, by decision time.

    Raises:
        CandidatesError: for a file that cannot be read, a row that cannot be, one that stands there twice, or a model
            that was fitted on what came after the decision; it names file, row and values.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise CandidatesError(
            f"opinions={shown(path)} is no file. Make one with covered-call q-scorer --write_opinions FILE.parquet."
        )
    try:
        table = pq.read_table(path)
        missing = [name for name in OPINIONS.names if name not in table.schema.names]
        if missing:
            raise CandidatesError(f"{path} has no column {missing[0]}: give one that q-scorer --write_opinions wrote.")
        table = table.select(OPINIONS.names).cast(OPINIONS).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise CandidatesError(f"opinions={shown(path)} cannot be read: {printable(str(error), 300)}") from error
    check_opinions(path, table)
    return table.append_column("row", pa.array(np.arange(len(table)))).sort_by("decision_time")


def check_opinions(path: str, table: pa.Table) -> None:
    time, before = (table[name].cast(pa.int64()).to_numpy() for name in ("decision_time", "fitted_before"))
    expected, positive = (table[name].to_numpy() for name in ("expected", "positive"))
    blank = np.logical_or.reduce([column.is_null().to_numpy() for column in table.columns])
    wrong = blank | ~np.isfinite(expected) | ~((positive >= 0) & (positive <= 1))
    late = before > time
    again = np.ones(len(table), bool)
    distinct = table.select(OPINION_KEY).append_column("row", pa.array(np.arange(len(table))))
    again[distinct.group_by(list(OPINION_KEY)).aggregate([("row", "min")])["row_min"].to_numpy()] = False
    said = (
        (wrong, "a value is missing, no number, or no probability"),
        (late, "fitted_before is after the decision: the model has seen what came later. Such a row is a leak"),
        (again, "this candidate stands there twice"),
    )
    for rows, why in said:
        if rows.any():
            row = int(np.flatnonzero(rows)[0])
            values = ", ".join(f"{name} {text_in(table[name][row])}" for name in OPINIONS.names)
            raise CandidatesError(f"{path}, row {row + 1}: {why} ({values}). Write the file again.")


def text_in(value: pa.Scalar) -> str:
    found = value.as_py()
    return found.isoformat() if hasattr(found, "isoformat") else shown(found)


def opinions_on(columns: Columns, table: pa.Table) -> tuple[np.ndarray, ...]:
    """(R,) each, by the names of OPINION, of candidates; NaN where the table has none.

    Raises:
        CandidatesError: if the rows of one decision are of several models.
    """
    unknown = tuple(np.full(len(columns.instrument), np.nan) for _ in OPINION)
    if not len(columns.instrument) or not len(table):
        return unknown
    times = table["decision_time"].cast(pa.int64()).to_numpy()
    begin = np.searchsorted(times, columns.time.min())
    table = table.slice(begin, np.searchsorted(times, columns.time.max(), "right") - begin)
    rows, names = pa.array(columns.decision_of), pa.array(columns.names, pa.string())
    asked = pa.table({
        "decision_time": pa.array(columns.time).view(UTC_TIME).take(rows),
        **{name: names.take(pa.array(getattr(columns, name))).take(rows) for name in ("underlying", "exit_style")},
        "instrument": columns.instrument,
        "place": pa.array(np.arange(len(rows))),
    })  # fmt: skip
    found = asked.join(table.drop(["row"]), list(OPINION_KEY), join_type="inner")
    place = found["place"].to_numpy()
    values = (found["expected"], found["positive"], pc.cast(found["fitted_before"], pa.int64()))
    for into, numbers in zip(unknown, values, strict=True):
        into[place] = numbers.to_numpy()
    check_one_model(columns, unknown[2])
    return unknown


def check_one_model(columns: Columns, before: np.ndarray) -> None:
    rows = np.flatnonzero(~np.isnan(before))
    of = columns.decision_of[rows]
    other = np.flatnonzero((of[1:] == of[:-1]) & (before[rows][1:] != before[rows][:-1]))
    if len(other):
        time = time_of(int(columns.time[of[other[0]]])).isoformat()
        raise CandidatesError(f"opinions: those of the decision at {time} are of several models: give one for each.")
