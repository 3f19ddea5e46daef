"""Counterfactual outcomes: of every candidate, sold or not, from the prices of the files' own later decisions.

They are labels and stand in columns; no prompt is rendered from them. NO_TRADE brings 0: the coin is held either way.
"""

import copy
from typing import NamedTuple

import numpy as np

from covered_call.candidates.chains import NEVER, NO_NODES, Nodes, Outcomes, Rolls, Segment, follow, nodes_of, parts_of
from covered_call.candidates.columns import OUTCOME_DAYS, Columns, timedelta_of
from covered_call.candidates.options import CoveredCallCandidatesConfig, constant_vol
from covered_call.candidates.pricing import Calls, Sales, pick
from covered_call.candidates.schema import LoggedDecision
from covered_call.candidates.settlement import Rule
from covered_call.candidates.spots import Spots
from covered_call.candidates.vols import Vols

HOLD_TO_EXPIRY, TP_AND_ROLL = "hold_to_expiry", "tp_and_roll"
STYLES = (HOLD_TO_EXPIRY, TP_AND_ROLL)  # of which outcomes can be computed
RECORDS = "recorded"  # of the option settlement: outcomes are what the files say of each candidate


class Terms(NamedTuple):
    """By which rule, one of PRESETS but for what the options change, and at which vol outcomes are computed.

    ``recorded`` says that the files have them, of each candidate: the rule then tells how long calls are held.
    """

    preset: str
    rule: Rule
    vols: Vols
    recorded: bool = False

    def text(self) -> str:
        if self.recorded:
            return f"settlement={RECORDS!r}, which takes them from the files"
        return f"settlement={self.preset!r}" + (f" at {self.vols.text()}" if self.vols != Vols() else "")

    def sentence(self, style: str, options: CoveredCallCandidatesConfig) -> str:
        """How an outcome comes about."""
        if self.recorded:
            return f"{style}, settlement={RECORDS!r}: outcomes are those that the files have, of each candidate."
        rule, early = self.rule, self.rule.settle_hours
        when = f"{early:g} hours before its expiry" if early else "at its expiry"
        said = f"{style}, settlement={self.preset!r}: a call is sold at its Black-Scholes value at {self.vols.text()}"
        if style == HOLD_TO_EXPIRY:
            return f"{said}, and settled at its value {when}."
        defended = f" or spot / strike is {rule.defend:g}" if rule.defend < np.inf else ""
        rolls = "" if rule.max_rolls == np.inf else f", {rule.max_rolls:g} times at most"
        into = f"the call nearest to delta {options.roll_delta:g}"
        if rule.roll_min_score is not None:
            into = f"the best score from {rule.roll_min_score:g}, of another instrument,"
        end = "" if rule.own_expiry else " What is open when the first call would have expired is bought back then."
        return (
            f"{said}; bought back once {rule.take_profit:.0%} of its premium is earned{defended}, with more than "
            f"{rule.min_dte_to_roll:g} days left; {into} is sold next{rolls}; the last is settled at its value {when}."
            f"{end}"
        )


class Basis(NamedTuple):
    """D decisions of all files by time, ties in the order of the files: what outcomes rest on."""

    names: tuple[str, ...]  # of underlyings and exit styles: the next two are places in it
    underlying: np.ndarray  # (D,) int
    exit_style: np.ndarray  # (D,) int
    time: np.ndarray  # (D,) int64, microseconds since 1970
    spot: np.ndarray  # (D,) USD
    rolls: Rolls  # (D,) each


class Replay:
    """What selling any of the candidates would have brought, on the terms of its exit style."""

    def __init__(
        self,
        basis: Basis,
        terms: dict[str, Terms],
        options: CoveredCallCandidatesConfig,
        spots: Spots | None = None,
    ):
        """Args: spots: that of the basis, where it is there already."""
        self.basis, self.terms, self.options = basis, terms, options
        names, underlying, _, time, spot, _ = basis
        self.spots = spots or Spots(len(names), underlying, time, spot, options)
        self.nodes = {style: self.nodes_of(style) for style in terms}

    def changed(self, options: CoveredCallCandidatesConfig | None = None, vol: float = 1.0) -> "Replay":
        """The same trades with the costs and the horizon of other options, and with all vols times ``vol``."""
        if vol == 1.0:
            other = copy.copy(self)  # what chains may roll into is the same, and may be millions
            other.options = options or self.options
            return other
        terms = {s: its._replace(vols=its.vols.scaled(vol), recorded=False) for s, its in self.terms.items()}
        return Replay(self.basis, terms, options or self.options, self.spots)

    def vols_of(self, columns: Columns) -> np.ndarray:
        """(R,) the vol that each candidate is priced at, NaN where it is unknown."""
        of, found = columns.decision_of, columns.numbers["iv"].copy()
        calls = Calls(*(columns.numbers[name] for name in Calls._fields))
        for style, terms in self.terms.items():
            its = np.flatnonzero(columns.exit_style[of] == code_of(columns.names, style))
            its_time, its_underlying = columns.time[of[its]], columns.underlying[of[its]]
            found[its] = terms.vols.priced(pick(calls, its), its_underlying, its_time).iv
        return found

    def nodes_of(self, style: str) -> Nodes:
        """What chains of a style may roll into."""
        basis = self.basis
        its = np.flatnonzero(basis.exit_style == code_of(basis.names, style))
        if style != TP_AND_ROLL or not len(its):
            return NO_NODES
        underlying, time = basis.underlying[its], basis.time[its]
        places = self.spots.nearest(underlying, time, 0)
        rolls = Rolls(*(self.terms[style].vols.priced(pick(calls, its), underlying, time) for calls in basis.rolls))
        return nodes_of(self.spots, underlying, places, rolls, self.terms[style].rule)

    def of_candidates(self, columns: Columns) -> Outcomes:
        """Of any decisions, with the names of the basis, each of the R candidates."""
        parts = [self.of_rows(columns, rows) for rows in parts_of(columns.offsets[-1])]
        return Outcomes(*map(np.concatenate, zip(*parts, strict=True)))

    def of_rows(self, columns: Columns, rows: slice | np.ndarray) -> Outcomes:
        """Of these rows of the columns alone, (C,) each.

        Unknown where iv is blank, where the files hold no spot near enough to the end, for other exit styles than the
        two, and where a number beyond all measure makes an outcome that is not finite.
        """
        of = columns.decision_of[rows]
        sales = Sales(columns.underlying[of], columns.time[of], columns.spot[of],
            *(columns.numbers[name][rows] for name in Calls._fields))  # fmt: skip
        found = Outcomes(np.full(len(of), np.nan), np.full(len(of), np.nan), np.zeros(len(of), np.int64),
            np.zeros(len(of), bool))  # fmt: skip
        for code in np.unique(columns.exit_style[of]):
            its = np.flatnonzero(columns.exit_style[of] == code)
            for values, of_style in zip(found, self.of_sales(pick(sales, its), columns.names[code]), strict=True):
                values[its] = of_style
            if columns.names[code] in self.terms and self.terms[columns.names[code]].recorded:
                self.as_files_have_it(columns, rows, its, found)
        return found

    def as_files_have_it(self, columns: Columns, rows: slice | np.ndarray, its: np.ndarray, found: Outcomes) -> None:
        """Writes what is recorded of these candidates over what is computed; the costs are those of the rule."""
        if not as_recorded(self.options):
            return
        recorded, days = (columns.numbers[name][rows][its] for name in ("pnl_vs_hodl", OUTCOME_DAYS))
        of, place = columns.decision_of[rows][its], columns.place[rows][its]
        known = ~np.isnan(days) | (columns.chosen[of] == place)  # without its days, that of another says nothing
        found.gross[its] = np.where(known, recorded, np.nan)
        found.costs[its] = found.costs[its] if has_costs(self.options) else 0.0
        found.cut[its] = False
        dated = its[~np.isnan(days)]
        found.label_end[dated] = columns.time[of[~np.isnan(days)]] + timedelta_of(days[~np.isnan(days)])

    @np.errstate(all="ignore")
    def of_sales(self, sales: Sales, style: str, trail: list[Segment] | None = None) -> Outcomes:
        """Of calls (C,) that are sold under an exit style.

        Args:
            trail: takes in what was open when, call after call.
        """
        stop, end = self.stops(sales, style)
        gross, costs = np.full(len(end), np.nan), np.full(len(end), np.nan)
        found = Outcomes(gross, costs, end.copy(), np.zeros(len(end), bool))
        if style not in self.terms:
            return found
        _, rule, vols, _ = self.terms[style]
        sales = sales._replace(iv=vols.priced(Calls(*sales[3:]), sales.underlying, sales.time).iv)
        # Where the files end before, they cut the chain off.
        beyond = (stop < 0) & (end > self.spots.time[self.spots.bounds[sales.underlying + 1] - 1])
        stop[beyond] = NEVER
        its = np.flatnonzero((stop >= 0) & ~np.isnan(sales.iv))
        part = []
        known = follow(pick(sales, its), stop[its], end[its], rule, self.spots, self.nodes[style], self.options, part)
        if trail is not None:
            trail += [segment._replace(chain=its[segment.chain]) for segment in part]
        for values, of_chain in zip(found, known, strict=True):
            values[its] = of_chain
        found.label_end[beyond], found.cut[beyond] = end[beyond], True
        gross[~np.isfinite(gross - costs)] = np.nan
        return found

    def stops(self, sales: Sales, style: str) -> tuple[np.ndarray, np.ndarray]:
        """The place at which each chain is bought back whatever it is worth, NEVER for none and -1 if there is no spot
        near enough; and the time of that or, without one, of the expiry."""
        horizon = np.inf if self.options.horizon is None else float(self.options.horizon)
        whole = style == TP_AND_ROLL and style in self.terms and self.terms[style].rule.own_expiry
        days = np.full(len(sales.dte), horizon) if whole else np.minimum(sales.dte, horizon)
        end = sales.time + timedelta_of(np.where(np.isfinite(days), days, sales.dte))
        stops = np.isfinite(days) & ((style == TP_AND_ROLL) | (days < sales.dte))
        return np.where(stops, self.spots.nearest(sales.underlying, end, self.spots.tolerance), NEVER), end


def net_of(found: Outcomes, options: CoveredCallCandidatesConfig) -> np.ndarray:
    """P&L vs HODL in USD a unit of underlying net of costs, NaN where unknown: also where the files cut a chain off,
    unless ``keep_cut`` has its mark there for an outcome."""
    net = found.gross - found.costs
    return net if options.keep_cut else np.where(found.cut, np.nan, net)


def code_of(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else -1


class Net(NamedTuple):
    """Net outcome in USD a unit of underlying and where it is from, "counterfactual" or "recorded"; both None where
    unknown."""

    value: float | None
    source: str | None


def net_outcomes(logged: LoggedDecision, options: CoveredCallCandidatesConfig) -> list[Net]:
    """For each candidate its counterfactual, or else what was recorded."""
    found = [Net(counterfactual.pnl_vs_hodl, "counterfactual") for counterfactual in logged.counterfactuals]
    recorded, sold = recorded_outcome(logged, options), logged.chosen
    if recorded is not None and sold is not None and found[sold].value is None:
        found[sold] = Net(recorded, "recorded")
    return [Net(None, None) if net.value is None else net for net in found]


def recorded_outcome(logged: LoggedDecision, options: CoveredCallCandidatesConfig) -> float | None:
    """The recorded P&L vs HODL of the call that was sold, less what its trades cost; None where that, or what was
    recorded, is unknown, and with options under which outcomes mean something else."""
    if logged.chosen is None or not as_recorded(options):
        return None
    recorded = logged.outcomes[logged.chosen].pnl_vs_hodl
    costs = logged.counterfactuals[logged.chosen].costs if has_costs(options) else 0.0
    return None if recorded is None or costs is None else recorded - costs


def as_recorded(options: CoveredCallCandidatesConfig) -> bool:
    """Whether counterfactuals mean what the recorded outcomes do: until the exit, at the vol that was paid."""
    at_paid = options.iv_file is None and options.iv_shift == 0 and constant_vol(options.pricing_iv) is None
    return at_paid and options.horizon is None


def has_costs(options: CoveredCallCandidatesConfig) -> bool:
    return any((options.fee, options.half_spread, options.slippage, options.delivery_fee))
