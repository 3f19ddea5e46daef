"""What a Q-scorer expects of candidates, as prompts tell it: in a file for a load, or of one live decision."""

import datetime
import io
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from covered_call.candidates.columns import Columns, columns_of
from covered_call.candidates.opinions import OPINIONS, UTC_TIME
from covered_call.candidates.schema import Decision, LoggedDecision, Opinion, check_opinion
from covered_call.value_model.learning import Fitted, QScorerError


def fitted_before(fitted: Fitted) -> datetime.datetime:
    """When the last of the outcomes was known that it was fitted on, its offset with it.

    Raises:
        QScorerError: if its file does not say.
    """
    ends = [fitted.metadata.get(split, {}).get("settled") for split in ("train", "validation")]
    if None in ends:
        raise QScorerError(
            "The Q-scorer's file does not say until when it was fitted, so that its opinion is not told: fit it again."
        )
    return max(map(datetime.datetime.fromisoformat, ends))


def with_opinion(decision: Decision, fitted: Fitted) -> Decision:
    """The decision with what the scorer expects of its candidates.

    Raises:
        QScorerError: as fitted_before does, and where the scorer was fitted with a context that is not told here.
        CandidatesError: if the scorer was fitted on what came later.
    """
    predicted = fitted.predict(columns_of([LoggedDecision(decision, None, ())]))
    values = zip((100 * predicted.values).tolist(), predicted.confidences.tolist(), strict=True)
    of = dict(zip((one.instrument for one in decision.candidates), values, strict=True))
    told = decision._replace(opinion=Opinion(fitted_before(fitted), of))
    check_opinion(told)
    return told


def opinions_file(parts: Iterable[tuple[Fitted, Sequence[LoggedDecision]]]) -> tuple[bytes, int]:
    """A Parquet of OPINIONS, and its rows: of each scorer what it expects at its decisions."""
    tables = [opinions_of(fitted, columns_of(entries)) for fitted, entries in parts if entries]
    table = pa.concat_tables([OPINIONS.empty_table(), *tables])
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue(), len(table)


def opinions_of(fitted: Fitted, columns: Columns) -> pa.Table:
    predicted, rows = fitted.predict(columns), pa.array(columns.decision_of)
    names = pa.array(columns.names, pa.string())
    before = pa.scalar(fitted_before(fitted), UTC_TIME)
    return pa.table(
        [
            pa.array(columns.time).view(UTC_TIME).take(rows),
            *(names.take(pa.array(getattr(columns, name))).take(rows) for name in ("underlying", "exit_style")),
            columns.instrument,
            pa.array(100 * predicted.values),
            pa.array(predicted.confidences),
            pa.repeat(before, len(rows)),
        ],
        schema=OPINIONS,
    )
