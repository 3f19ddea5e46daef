"""What each answer to a decision would have brought: the money by which a preference run chooses its checkpoint."""

from collections.abc import Mapping

import numpy as np
from datasets import Dataset

from covered_call.candidates.columns import COUNTERFACTUAL
from covered_call.candidates.terms import Fit
from covered_call.training.recipe import RunArguments

MONEY, LOSS = "mean_percent", "dpo_loss"


def add_outcomes(asked: Dataset, records: Dataset, fits: Mapping[tuple[str, str], Fit]) -> Dataset:
    """The encoded rankings with ``outcomes``, what each of their answers brings in USD a unit of underlying net of
    costs, and ``spot``.

    Null where that of one candidate is unknown, or the computed outcomes of the market do not follow the recorded
    ones: models are compared on decisions at which every answer has its price, and so on the same ones.

    Args:
        records: of asked, in the same order, as load_candidates makes them.
        fits: see Decisions.fits.
    """
    trusted = {market: fit.trusted for market, fit in fits.items()}
    outcomes, spots = [], []
    for row in records.select_columns(["underlying", "exit_style", "candidates"]):
        found = [candidate[COUNTERFACTUAL] for candidate in row["candidates"]] + [0.0]  # NO_TRADE is the last answer
        known = None not in found and trusted.get((row["underlying"], row["exit_style"]), True)
        outcomes.append(found if known else None)
        spots.append(row["candidates"][0]["spot"] if row["candidates"] else None)
    return asked.add_column("outcomes", outcomes).add_column("spot", spots)


def mean_money(split: Dataset, given: list[str]) -> dict[str, float]:
    """Mean P&L vs HODL a decision of the given answers, in USD and in % of spot, over the decisions with known
    outcomes; nothing if there is none."""
    rows = zip(given, split["answers"], split["outcomes"], split["spot"], strict=True)
    paid = [
        (outcomes[answers.index(answer)], spot or np.inf)  # without candidates there is no spot, and no trade
        for answer, answers, outcomes, spot in rows
        if outcomes is not None
    ]
    if not paid:
        return {}
    usd, spot = np.array(paid).T
    return {"mean_pnl": float(usd.mean()), MONEY: float(100 * (usd / spot).mean())}


def doubt_about(validation: Dataset, fits: Mapping[tuple[str, str], Fit]) -> str | None:
    """Why money on these records is not to be chosen by; None where outcomes are exact."""
    doubted = [" ".join(market) for market, fit in fits.items() if not fit.trusted]
    if doubted:
        return f"the computed outcomes of {', '.join(doubted)} do not follow the recorded ones"
    if not any(outcomes is not None for outcomes in validation["outcomes"]):
        return "at no decision of validation are the outcomes of all candidates known"
    return None


def settle_metric(training: RunArguments, doubt: str | None) -> str:
    """Leaves the choice of a checkpoint to the loss where money is in doubt; says by what it is chosen."""
    metric = str(training.metric_for_best_model).removeprefix("eval_")
    said = f"the best on validation by {metric}"
    if metric == MONEY and doubt:
        training.metric_for_best_model, training.greater_is_better = LOSS, False
        said = f"by {LOSS}, not by money: {doubt}"
    return said if training.load_best_model_at_end else "the last one, for load_best_model_at_end is off"
