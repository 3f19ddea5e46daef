"""Records: what stands in one row of a data set, and of which type it is."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets

from covered_call.candidates.options import CoveredCallCandidatesConfig, PreferenceConfig
from covered_call.candidates.outcomes import net_outcomes
from covered_call.candidates.preferences import preferred_pair
from covered_call.candidates.prompts import (
    answer_of,
    candidate_hindsight,
    candidate_messages,
    present_in_order,
    ranking_hindsight,
    ranking_messages,
)
from covered_call.candidates.schema import SELL_CALL, SKIP, Decision, LoggedDecision, Outcome


def candidate_records(logged: LoggedDecision, options: CoveredCallCandidatesConfig) -> Iterator[dict]:
    logged = present_in_order(logged, options)
    decision = logged.decision
    for index, (candidate, outcome) in enumerate(zip(decision.candidates, logged.outcomes, strict=True)):
        label = SELL_CALL if index == logged.chosen else SKIP
        hindsight = candidate_hindsight(outcome) if options.hindsight else ""
        yield {
            **shared_columns(decision, logged.chosen, candidate_messages(decision, candidate, hindsight), label),
            **candidate_columns(logged, index),
        }


def ranking_records(logged: LoggedDecision, options: CoveredCallCandidatesConfig) -> Iterator[dict]:
    logged = present_in_order(logged, options)
    decision, chosen = logged.decision, logged.chosen
    traded = chosen is not None
    hindsight = ranking_hindsight(chosen + 1, logged.outcomes[chosen]) if options.hindsight and traded else ""
    yield {
        **shared_columns(decision, chosen, ranking_messages(decision, hindsight), answer_of(chosen)),
        "candidates": [candidate_columns(logged, index) for index in range(len(decision.candidates))],
        "chosen_index": chosen + 1 if traded else None,
    }


def preference_records(logged: LoggedDecision, options: PreferenceConfig) -> Iterator[dict]:
    logged = present_in_order(logged, options)
    pair = preferred_pair(logged, options)
    if pair is None:
        return
    decision, sides = logged.decision, {"chosen": pair.chosen, "rejected": pair.rejected}
    yield {
        "prompt": ranking_messages(decision),
        **{name: [{"role": "assistant", "content": answer_of(pick)}] for name, pick in sides.items()},
        **decision_columns(decision),
        "spot": decision.spot,
        **{f"{name}_label": answer_of(pick) for name, pick in sides.items()},
        "teacher_label": answer_of(logged.chosen),
        **{name: getattr(pair, name) for name in ("chosen_outcome", "rejected_outcome", "source")},
    }


def q_records(logged: LoggedDecision, options: CoveredCallCandidatesConfig) -> Iterator[dict]:
    logged = present_in_order(logged, options)
    for index, net in enumerate(net_outcomes(logged, options)):
        columns = candidate_columns(logged, index)
        for name in ("reward", "max_drawdown_pct"):
            del columns[name]
        yield {
            **decision_columns(logged.decision),
            **columns,
            "sold": index == logged.chosen,
            "q_hold": 0.0,
            "q_sell": net.value,
            "source": net.source,
        }


def shared_columns(decision: Decision, chosen: int | None, messages: list[dict], label: str) -> dict:
    return {
        "messages": [*messages, {"role": "assistant", "content": label}],
        **decision_columns(decision),
        "label": label,
        "trade_executed": chosen is not None,
    }


def decision_columns(decision: Decision) -> dict:
    return {
        "decision_id": decision.decision_id,
        "decision_time": decision.decision_time,
        "underlying": decision.underlying,
        "exit_style": decision.exit_style,
    }


def candidate_columns(logged: LoggedDecision, index: int) -> dict:
    """The candidate's numbers; its recorded outcome is unknown, so null, unless the teacher sold it."""
    known = logged.outcomes[index] if index == logged.chosen else Outcome(None, None, None)
    return {
        **logged.decision.candidates[index]._asdict(),
        "spot": logged.decision.spot,
        **known._asdict(),
        "counterfactual_pnl_vs_hodl": logged.counterfactuals[index].pnl_vs_hodl,
    }


RECORDS: dict[str, Callable[[LoggedDecision, Any], Iterator[dict]]] = {
    "per_candidate": candidate_records,
    "per_decision_ranking": ranking_records,
    "preference": preference_records,
    "q_values": q_records,
}


def makes_record(logged: LoggedDecision, options: CoveredCallCandidatesConfig) -> bool:
    if isinstance(options, PreferenceConfig):
        return preferred_pair(present_in_order(logged, options), options) is not None
    return options.name == "per_decision_ranking" or bool(logged.decision.candidates)


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
