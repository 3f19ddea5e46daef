"""On which terms outcomes are computed: the rule and the vol of each exit style that give back its recorded trades."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from covered_call.candidates.options import FIT, CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import RECORDS, STYLES, Basis, Replay, Terms, as_recorded, code_of
from covered_call.candidates.pricing import Sales, pick
from covered_call.candidates.settlement import PRESETS, rule_of
from covered_call.candidates.splits import split_starts
from covered_call.candidates.spots import Spots
from covered_call.candidates.vols import Vols, vols_of

logger = logging.getLogger(__name__)

SIMPLEST = "simulated"  # where there are too few recorded trades to tell the presets apart
MIN_TRADES = 10
MIN_CORRELATION = 0.95  # of computed with recorded outcomes; below it the computed ones are not to be trusted
MAX_BIAS = 0.05  # of the mean error, as a share of the typical recorded outcome; above it they are not, either
BLOCKS = 20  # of trades, one after the other: the means of their errors tell how sure the mean of all is
T_QUANTILE = 2.093  # of Student's t, 97.5 %, at BLOCKS - 1 degrees of freedom
VOL_GRID = np.geomspace(0.1, 2.5, 14)


class Trades(NamedTuple):
    """T recorded trades, by time: what was sold, and what came of it."""

    sales: Sales
    exit_style: np.ndarray  # (T,) int, a place in the names
    recorded: np.ndarray  # (T,) P&L vs HODL in USD a unit of underlying
    unsold: frozenset[int] = frozenset()  # the exit styles of which the files say outcomes of calls not sold, too


class Fit(NamedTuple):
    """Computed against recorded outcomes of trades that have both; money in USD a unit, NaN without any."""

    trades: int
    correlation: float
    median_error: float  # absolute
    median_outcome: float  # absolute, recorded: the typical outcome
    mean_error: float  # computed minus recorded
    interval: tuple[float, float]  # of the mean error, 95 %, from the means of BLOCKS blocks of trades

    @property
    def bias(self) -> float:
        """The mean error as a share of the typical outcome."""
        return abs(self.mean_error) / self.median_outcome if self.median_outcome else math.inf

    @property
    def follows(self) -> bool:
        varies = not math.isnan(self.correlation)  # of outcomes that are all alike there is none
        return self.trades > 0 and self.bias <= MAX_BIAS and not (varies and self.correlation < MIN_CORRELATION)

    @property
    def trusted(self) -> bool:
        """Whether computed outcomes are to be used: not if there are trades enough to tell that they do not follow."""
        return self.follows or self.trades < MIN_TRADES

    def sentence(self, underlying: str, style: str) -> str:
        trade = f"{underlying} {style} trade"
        if not self.trades:
            return f"No recorded {trade} has a computed outcome beside it: the computation is unchecked here."
        text = (
            f"Computed against recorded outcomes on {self.trades:,} {trade}s: computed minus recorded on "
            f"average {self.mean_error:+,.2f} USD [{self.interval[0]:+,.2f}, {self.interval[1]:+,.2f}], "
            f"{self.bias:.1%} of the typical outcome ({self.median_outcome:,.2f}); median absolute error "
            f"{self.median_error:,.2f}, correlation {self.correlation:.4f}."
        )
        if self.trusted:
            return text if self.follows else f"{text} These are too few to tell."
        why = f"the average error is above {MAX_BIAS:.0%} of the typical outcome"
        if self.correlation < MIN_CORRELATION:
            why = f"the correlation is below {MIN_CORRELATION}"
        return f"{text} WARNING: {why}, so computed outcomes count as unknown. See settlement and pricing_iv."


def fit_of(computed: np.ndarray, recorded: np.ndarray) -> Fit:
    """Of trades (T,), in their order of time; NaN where unknown."""
    both = ~np.isnan(computed) & ~np.isnan(recorded)
    computed, recorded = computed[both], recorded[both]
    if not len(computed):
        return Fit(0, *[math.nan] * 4, (math.nan, math.nan))
    with np.errstate(invalid="ignore", divide="ignore"):
        same = bool((computed == recorded).all())  # of which there may be one, or all alike
        correlation = 1.0 if same else float(np.corrcoef(computed, recorded)[0, 1]) if len(computed) > 1 else math.nan
    error = computed - recorded
    middle = [float(np.median(np.abs(values))) for values in (error, recorded)]
    return Fit(len(error), correlation, *middle, float(error.mean()), interval_of(error))


def interval_of(error: np.ndarray) -> tuple[float, float]:
    """Outcomes of neighbouring trades overlap, so that their errors are alike: blocks of them are nearly not."""
    if len(error) < 2 * BLOCKS:
        return math.nan, math.nan
    means = np.array([block.mean() for block in np.array_split(error, BLOCKS)])
    reach = T_QUANTILE * means.std(ddof=1) / math.sqrt(BLOCKS)
    return float(error.mean() - reach), float(error.mean() + reach)


def settle(
    basis: Basis, spots: Spots, trades: Trades, options: CoveredCallCandidatesConfig
) -> tuple[dict[str, Terms], dict[tuple[str, str], Fit]]:
    """The terms of each exit style of which outcomes can be computed, and how they fit what was recorded of each
    underlying under it.

    Raises:
        CandidatesError: for an iv_file that cannot be used.
    """
    priced = vols_of(options, list(basis.names), set(np.unique(basis.underlying).tolist()))
    known = set(np.unique(basis.exit_style).tolist())
    terms, fits = {}, {}
    for style in STYLES:
        if code_of(basis.names, style) in known:
            its = pick_trades(trades, trades.exit_style == code_of(basis.names, style))
            terms[style], computed = settle_style(style, basis, spots, its, priced, options)
            for code in np.unique(basis.underlying[basis.exit_style == code_of(basis.names, style)]).tolist():
                of = its.sales.underlying == code
                names = (basis.names[code], style)
                fits[names] = fit_of(computed[of], its.recorded[of])
                if not fits[names].trusted:
                    logger.warning(fits[names].sentence(*names))
    return terms, fits


def takes_recorded(style: int, trades: Trades, options: CoveredCallCandidatesConfig) -> bool:
    """Whether outcomes are those that the files have: where they have them of calls that were not sold, or by option;
    not where they are asked for at another vol, or after some days."""
    asked = options.settlement == RECORDS or (options.settlement == "auto" and style in trades.unsold)
    return asked and as_recorded(options)


def settle_style(
    style: str, basis: Basis, spots: Spots, trades: Trades, priced: Vols, options: CoveredCallCandidatesConfig
) -> tuple[Terms, np.ndarray]:
    """Chosen by the trades of the training split, if it has enough; and what they compute of all trades, (T,) gross.

    They choose, and are checked, at a vol that they may have been paid at: the market's is another, a constant may be.
    """
    paid = [Vols()] + [Vols(constant=priced.constant)] * (priced.constant is not None)
    early = trades.sales.time < split_starts(basis.time, options)[0] if options.splits != "train" else True
    chosen_by = pick_trades(trades, np.broadcast_to(early, len(trades.recorded)))
    chosen_by = chosen_by if len(chosen_by.recorded) >= MIN_TRADES else trades

    def computed(terms: Terms, trades: Trades) -> np.ndarray:
        replay = Replay(basis, {style: terms}, dataclasses.replace(options, horizon=None), spots)
        found = replay.of_sales(trades.sales, style)
        # A teacher whose calls live to their own expiries records a mark where its file ends; another what came later.
        return found.gross if terms.rule.own_expiry else np.where(found.cut, np.nan, found.gross)

    def error(terms: Terms) -> float:
        found = np.abs(computed(terms, chosen_by) - chosen_by.recorded)
        known = found[~np.isnan(found)]  # of too few the median says nothing
        return float(np.median(known)) if len(known) >= min(MIN_TRADES, max(1, len(found))) else math.inf

    presets = list(PRESETS) if options.settlement in ("auto", RECORDS) else [options.settlement]
    enough = len(trades.recorded) >= MIN_TRADES
    if not enough and options.settlement in ("auto", RECORDS):
        presets = [SIMPLEST]
    candidates = [Terms(preset, rule_of(preset, options), vols) for preset in presets for vols in paid]
    if options.pricing_iv == FIT and enough:
        candidates = [one for terms in candidates for one in fit_vols(terms, error)]
    errors = [error(terms) for terms in candidates] if len(trades.recorded) else [math.inf] * len(candidates)
    best = candidates[int(np.argmin(np.round(errors, 6)))]
    if takes_recorded(code_of(basis.names, style), trades, options):
        logger.info("%s: outcomes are those that the files have, of each candidate.", style)
        return best._replace(recorded=True), trades.recorded
    found = computed(best, trades)
    if len(candidates) > 1:
        say_terms(style, best, dict(zip(candidates, errors, strict=True)), len(chosen_by.recorded))
    vols = best.vols if priced.constant is None else priced
    return best._replace(vols=vols._replace(series=priced.series, shift=priced.shift)), found


def pick_trades(trades: Trades, rows: np.ndarray) -> Trades:
    return trades._replace(
        sales=pick(trades.sales, rows), exit_style=trades.exit_style[rows], recorded=trades.recorded[rows]
    )


def fit_vols(terms: Terms, error: Callable[[Terms], float]) -> list[Terms]:
    """The terms with a constant vol, and with a multiple of the files' iv, each as near to the trades as it comes."""
    from scipy.optimize import minimize_scalar  # only here: it takes 60 MB, and hardly a load asks for it

    found = []
    for constant in (False, True):

        def at(value: float, constant=constant) -> Terms:
            return terms._replace(vols=Vols(constant=float(value)) if constant else Vols(multiple=float(value)))

        near = int(np.argmin([error(at(value)) for value in VOL_GRID]))
        bounds = VOL_GRID[max(near - 1, 0)], VOL_GRID[min(near + 1, len(VOL_GRID) - 1)]
        best = minimize_scalar(lambda value, at=at: error(at(value)), bounds=bounds, method="bounded").x
        found.append(min((at(round(best, digits)) for digits in (2, 3, 4, 12)), key=error))  # of equals the roundest
    return found


def say_terms(style: str, best: Terms, errors: dict[Terms, float], trades: int) -> None:
    others = ", ".join(f"{found:,.2f} by {terms.text()}" for terms, found in errors.items() if terms != best)
    logger.info(
        "%s: outcomes by %s, which are %.2f USD (median) from those of %d recorded trades; %s.",
        style, best.text(), errors[best], trades, others,
    )  # fmt: skip
