"""Records: what stands in one row of a data set, and of which type it is."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covered_call.candidates.columns import (
    CONTEXT_WORDS,
    COUNTERFACTUAL,
    OPINION,
    RECORDED,
    STATE,
    Columns,
    in_batches,
    words_of,
)
from covered_call.candidates.context_lines import OPINION_TOLD, SAID, context_names
from covered_call.candidates.explanations import explanations
from covered_call.candidates.options import CoveredCallCandidatesConfig, PreferenceConfig, horizon_columns
from covered_call.candidates.preferences import preferred_pairs, recorded_outcomes
from covered_call.candidates.prompts import (
    ROLES,
    answers_of,
    candidate_chats,
    chats_of,
    decision_ids,
    ranking_chats,
    texts_of_market,
)
from covered_call.candidates.schema import SELL_CALL, SKIP, CandidatesError, shown


def candidate_records(columns: Columns, options: CoveredCallCandidatesConfig) -> pa.Table:
    sold, market = is_sold(columns), texts_of_market(columns)
    labels = pc.if_else(pa.array(sold), SELL_CALL, SKIP)
    traded = pa.array(columns.chosen >= 0)
    rows = pa.array(columns.decision_of)
    return table_of(
        "per_candidate",
        options,
        {
            "messages": candidate_chats(columns, market, said(labels, columns, sold, options), options.hindsight),
            **{name: values.take(rows) for name, values in decision_columns(columns, market).items()},
            "label": labels,
            "trade_executed": traded.take(rows),
            **candidate_columns(columns),
            **{name: values.take(rows) for name, values in context_columns_of(columns).items()},
        },
    )


def ranking_records(columns: Columns, options: CoveredCallCandidatesConfig) -> pa.Table:
    labels, untraded = answers_of(columns.chosen), columns.chosen < 0
    market, candidates = texts_of_market(columns), candidate_columns(columns)
    return table_of(
        "per_decision_ranking",
        options,
        {
            "messages": ranking_chats(
                columns, market, said(labels, columns, columns.chosen, options), options.hindsight
            ),
            **decision_columns(columns, market),
            "label": labels,
            "trade_executed": pa.array(~untraded),
            "candidates": pa.ListArray.from_arrays(
                pa.array(columns.offsets, pa.int32()),
                pa.StructArray.from_arrays(list(candidates.values()), list(candidates)),
            ),
            "chosen_index": pa.array(columns.chosen + 1, pa.int32(), mask=untraded),
            **context_columns_of(columns),
        },
    )


def said(
    labels: pa.StringArray, columns: Columns, picks: np.ndarray, options: CoveredCallCandidatesConfig
) -> pa.StringArray:
    """(K,) what the assistant says: the label, and what explains it, if that is asked for."""
    if not options.explain:
        return labels
    reasons = explanations(columns, options.name, picks, columns.grounds[options.name])
    return pc.binary_join_element_wise(labels, reasons, "")


def preference_records(columns: Columns, options: PreferenceConfig) -> pa.Table:
    pairs = preferred_pairs(columns, options)
    columns = columns.take(np.flatnonzero(pairs.has))
    pairs = pairs._replace(**{name: values[pairs.has] for name, values in pairs._asdict().items()})
    market = texts_of_market(columns)
    sides = {"chosen": answers_of(pairs.chosen), "rejected": answers_of(pairs.rejected)}
    return table_of(
        "preference",
        options,
        {
            "prompt": ranking_chats(columns, market, None),
            **{name: chats_of(answers, ROLES[2:]) for name, answers in sides.items()},
            **decision_columns(columns, market),
            "spot": pa.array(columns.spot),
            **{f"{name}_label": answers for name, answers in sides.items()},
            "teacher_label": answers_of(columns.chosen),
            "chosen_outcome": pa.array(pairs.chosen_outcome),
            "rejected_outcome": pa.array(pairs.rejected_outcome),
            "source": pc.if_else(pa.array(pairs.recorded), "recorded", "counterfactual"),
        },
    )


def q_records(columns: Columns, options: CoveredCallCandidatesConfig) -> pa.Table:
    """Of each candidate its counterfactual, or else what was recorded; its counterfactual alone at each of the
    horizons, of which nothing is recorded."""
    rows, sold = pa.array(columns.decision_of), is_sold(columns)
    market, computed = texts_of_market(columns), columns.numbers[COUNTERFACTUAL]
    recorded = np.where(sold, recorded_outcomes(columns, options)[columns.decision_of], np.nan)
    is_computed, is_recorded = pa.array(~np.isnan(computed)), pa.array(~np.isnan(recorded))
    of_recorded = pc.if_else(is_recorded, "recorded", pa.scalar(None, pa.string()))
    return table_of(
        "q_values",
        options,
        {
            **{name: values.take(rows) for name, values in decision_columns(columns, market).items()},
            **candidate_columns(columns),
            "sold": pa.array(sold),
            "q_hold": pa.array(np.zeros(len(sold))),
            "q_sell": nullable(np.where(np.isnan(computed), recorded, computed)),
            "source": pc.if_else(is_computed, "counterfactual", of_recorded),
            **{name: values.take(rows) for name, values in context_columns_of(columns).items()},
            **{name: nullable(columns.numbers[name]) for name in horizon_columns(options)},
        },
    )


def is_sold(columns: Columns) -> np.ndarray:
    """(R,) bool: whether the teacher sold this candidate."""
    return columns.place == columns.chosen[columns.decision_of]


def decision_columns(columns: Columns, market: dict[str, Any]) -> dict[str, pa.Array]:
    """(D,) each."""
    return {
        "decision_id": decision_ids(market),
        "decision_time": pa.array(columns.time).view(pa.timestamp("us", tz="UTC")),
        "underlying": market["underlying"],
        "exit_style": market["exit_style"],
    }


def candidate_columns(columns: Columns) -> dict[str, pa.Array]:
    """(R,) each: the candidates' numbers; a recorded outcome is unknown, so null, unless the teacher sold the call."""
    sold = is_sold(columns)
    return {
        "instrument": columns.instrument,
        **{name: nullable(columns.numbers[name]) for name in STATE},
        "spot": pa.array(columns.spot[columns.decision_of]),
        **{name: nullable(np.where(sold, columns.numbers[name], np.nan)) for name in RECORDED},
        COUNTERFACTUAL: nullable(columns.numbers[COUNTERFACTUAL]),
        **opinion_columns(columns),
    }


def opinion_columns(columns: Columns) -> dict[str, pa.Array]:
    """(R,) each, where opinions are told."""
    if OPINION[0] not in columns.numbers:
        return {}
    found = {name: nullable(columns.numbers[name]) for name in OPINION}
    return found | {OPINION[2]: found[OPINION[2]].cast(pa.int64()).view(pa.timestamp("us", tz="UTC"))}


def nullable(values: np.ndarray) -> pa.Array:
    """Floats, NaN as null."""
    return pa.array(values, from_pandas=True)


def context_columns_of(columns: Columns) -> dict[str, pa.Array]:
    """(D,) each: what is known of the market."""
    return {
        name: pa.array(words_of(name, values), pa.string()) if name in CONTEXT_WORDS else nullable(values)
        for name, values in columns.context.items()
    }


def table_of(name: str, options: CoveredCallCandidatesConfig, arrays: dict[str, pa.Array]) -> pa.Table:
    """The columns that a config's records have, of these."""
    schema = schema_of(name, more_columns(name, options))
    return pa.Table.from_arrays([arrays[column] for column in schema.names], schema=schema)


def more_columns(name: str, options: CoveredCallCandidatesConfig) -> tuple[str, ...]:
    """Those that options add to a config's records: the context and opinions, but to preferences, and the horizons.

    Raises:
        CandidatesError: for a column of the user's whose name is taken.
    """
    told = () if name == "preference" else (*context_names(options), *(OPINION if options.opinions else ()))
    more = (*SAID, *OPINION, OPINION_TOLD, *horizon_columns(options))
    taken = [one for one in options.context_columns if one in FEATURES[name] or one in more]
    if taken:
        raise CandidatesError(
            f"context_columns={shown(taken[0])}: records have a column of that name. Give it another."
        )
    return (*told, *horizon_columns(options))


@functools.cache
def schema_of(name: str, more: tuple[str, ...]) -> pa.Schema:
    return features_of(name, more).arrow_schema.remove_metadata()


def features_of(name: str, more: Iterable[str]) -> datasets.Features:
    """Of a config's records, with the columns that options add; of a ranking its candidates have opinions."""
    kinds: dict[str, Any] = {one: datasets.Value("string" if one in CONTEXT_WORDS else "float64") for one in more}
    if OPINION[2] in kinds:
        kinds[OPINION[2]] = datasets.Value("timestamp[us, tz=UTC]")
    if name == "per_decision_ranking" and OPINION[0] in kinds:
        own = {one: kinds.pop(one) for one in OPINION}
        kinds["candidates"] = [CANDIDATE_FEATURES | own]
    return datasets.Features(FEATURES[name] | kinds)


RECORDS: dict[str, Callable[[Columns, Any], pa.Table]] = {
    "per_candidate": candidate_records,
    "per_decision_ranking": ranking_records,
    "preference": preference_records,
    "q_values": q_records,
}


def batches(columns: Columns) -> Iterator[Columns]:
    """The decisions in parts, in their order."""
    for start, end in in_batches(np.diff(columns.offsets)):
        yield columns.take(np.arange(start, end))


MESSAGES = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
DECISION_FEATURES = {
    "decision_id": datasets.Value("string"),
    "decision_time": datasets.Value("timestamp[us, tz=UTC]"),
    "underlying": datasets.Value("string"),
    "exit_style": datasets.Value("string"),
}
CANDIDATE_FEATURES = {
    "instrument": datasets.Value("string"),
    **{
        name: datasets.Value("float64")
        for name in (
            "strike", "dte", "delta", "score", "iv", "ivrv_ratio", "spot", "reward", "pnl_vs_hodl", "max_drawdown_pct",
            "counterfactual_pnl_vs_hodl",
        )
    },
}  # fmt: skip
CHAT_FEATURES = {
    "messages": MESSAGES,
    **DECISION_FEATURES,
    "label": datasets.Value("string"),
    "trade_executed": datasets.Value("bool"),
}
FEATURES = {
    "per_candidate": {**CHAT_FEATURES, **CANDIDATE_FEATURES},
    "per_decision_ranking": {
        **CHAT_FEATURES,
        "candidates": [CANDIDATE_FEATURES],
        "chosen_index": datasets.Value("int32"),
    },
    "preference": {
        **dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES),
        **DECISION_FEATURES,
        "spot": datasets.Value("float64"),
        **dict.fromkeys(("chosen_label", "rejected_label", "teacher_label"), datasets.Value("string")),
        **dict.fromkeys(("chosen_outcome", "rejected_outcome"), datasets.Value("float64")),
        "source": datasets.Value("string"),
    },
    "q_values": {
        **DECISION_FEATURES,
        **{name: kind for name, kind in CANDIDATE_FEATURES.items() if name not in ("reward", "max_drawdown_pct")},
        "sold": datasets.Value("bool"),
        **dict.fromkeys(("q_hold", "q_sell"), datasets.Value("float64")),
        "source": datasets.Value("string"),
    },
}
