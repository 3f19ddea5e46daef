"""The verb chain: a real option chain as the candidates of a decision, and what each policy would do now."""

import argparse
import collections
import datetime
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets.utils import tqdm

from covered_call import atomic
from covered_call.candidates.context_lines import OPINION_TOLD
from covered_call.candidates.data_options import Help, flags
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import HOLD_TO_EXPIRY, STYLES
from covered_call.candidates.schema import MAX_IV, CandidatesError
from covered_call.candidates.series import Series
from covered_call.candidates.vols import Vols, read_vols, series_of
from covered_call.command_line import plain_errors, start_logging
from covered_call.language_model.manifest import PolicyError, read_manifest
from covered_call.market import candidate_csv, synthetic
from covered_call.market.deribit import TESTNET, Deribit, DeribitError
from covered_call.market.files import chain_files
from covered_call.market.snapshot import BadRows, Snapshot, read_snapshots, snapshots_in
from covered_call.market.teacher import (
    PRESETS,
    UNKNOWN,
    Offer,
    Rules,
    offer_of,
    past_of,
    read_spots,
    rules_of,
    with_context,
)
from covered_call.runtime.drift import drift_of
from covered_call.tables import align
from covered_call.value_model.opinions import with_opinion
from covered_call.value_model.scorer import FILE_NAME, QScorer, QScorerError

DESCRIPTION = """\
A real option chain as the candidates of a decision, and what each policy would do now: the teacher's rule, a tuned
language model, a Q-scorer. It orders nothing.

Chains are Parquet files, as covered-call harvest collects them, or Deribit's of this moment (--live). Prices are the
exchange's: marks where nothing else is said. Deltas are Black-76, on the forward of each expiry."""
EXAMPLES = """\
examples:
  covered-call chain --snapshot chains/BTC_2025-12-10_0105.parquet
  covered-call chain --snapshot FILE --spots history/spot_BTC_0800utc.csv --model out/ranking --q_scorer out/q_scorer
  covered-call chain --snapshot 'chains/BTC_*.parquet' --out runs/        # the CSV that the other commands read
  covered-call chain --live BTC --model out/ranking
  covered-call chain --preset synthetic --spots history/spot_BTC_0800utc.csv --out runs/   # the teacher on any period
"""
QUOTED = ("mark", "bid", "ask")
RIGHT = range(2, 12)


class Put(NamedTuple):
    """A decision that a snapshot puts under an exit style."""

    snapshot: Snapshot
    offer: Offer


class Said(NamedTuple):
    """What a policy answers to a decision."""

    policy: str
    pick: int | None
    why: str
    drift: list[str]  # where its training did not reach; None without


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    start_logging()
    with plain_errors(args, CandidatesError, PolicyError, QScorerError, DeribitError):
        run(args)


def run(args: argparse.Namespace) -> None:
    bad, rules = BadRows(args.on_bad_rows), rules_from(args)
    styles = args.exit_style or default_styles(args)
    closes: dict[str, Series] = {}
    vols: dict[str, Series | None] = {}
    puts = []
    for snapshot in snapshots_from(args, bad):
        if args.spots and snapshot.underlying not in closes:
            closes[snapshot.underlying] = read_spots(args.spots, snapshot.underlying, *closes)
            vols[snapshot.underlying] = market_vols(args, list(closes))
        known = closes.get(snapshot.underlying)
        past = UNKNOWN if known is None else past_of(known, snapshot.time, snapshot.spot)
        its = [offer_of(snapshot, rules, past, style, bad) for style in styles]
        if known is not None and (args.model or args.q_scorer):
            market = vols[snapshot.underlying]
            its = [one._replace(decision=with_context(one.decision, known, snapshot, market)) for one in its]
        puts += [Put(snapshot, offer) for offer in its]
    answers = [teacher_answers(puts, rules), *policy_answers(args, puts)]
    if args.preset != "synthetic":  # whose thousands of decisions are for a file
        for put, said in zip(puts, zip(*answers, strict=True), strict=True):
            print(page(put, said, rules))
    if bad.count:
        print(f"{bad.count} bad row(s) were left out.")
    if args.out:
        for path, rows in write(args, puts):
            print(f"{path}: {rows} rows")
    refuse_drift(args, answers)


def market_vols(args: argparse.Namespace, names: list[str]) -> Series | None:
    """Those of the last of these underlyings; None where none are given."""
    found = series_of("context_vols", args.context_vols, args.iv_lag, names, set(range(len(names))))
    return None if found is None else found[len(names) - 1]


# ---------------------------------------------------------------------------------------------------------------------
# Where chains come from


def snapshots_from(args: argparse.Namespace, bad: BadRows) -> Iterator[Snapshot]:
    if args.preset == "synthetic":
        if not args.spots or args.snapshot or args.live:
            raise CandidatesError("preset='synthetic' makes its chains of spots alone: give spots, and no snapshot.")
        closes = read_spots(args.spots, args.underlying)
        yield from synthetic.snapshots(closes, args.underlying, vol_by_time(args.iv), args.spots)
    elif args.live:
        exchange = Deribit(args.url or (TESTNET if args.testnet else None))
        for currency in args.live:
            table = exchange.book_summary(currency, args.on_bad_rows)
            yield from fresh(args, snapshots_in(f"Deribit's {currency}", table.schema.names, table.to_batches(), bad))
    else:
        bar = tqdm(chain_files(args.snapshot, "snapshot"), unit=" files", disable=None, leave=False)
        yield from fresh(args, itertools.chain.from_iterable(read_snapshots(path, bad) for path in bar))


def fresh(args: argparse.Namespace, snapshots: Iterable[Snapshot]) -> Iterator[Snapshot]:
    """Those of the underlying that is asked for; one that is too old is an error."""
    now = datetime.datetime.now(datetime.UTC).timestamp()
    limit = 900.0 if args.max_age is None and args.live else args.max_age
    for snapshot in snapshots:
        age = now - snapshot.time / 1e6
        if limit is not None and age > limit:
            raise CandidatesError(
                f"{snapshot.source}: the snapshot is {age:,.0f} s old, and max_age={limit:g}. Collect a newer one, or "
                "raise max_age."
            )
        yield snapshot


def vol_by_time(text: str) -> Callable[[int], float]:
    """The vol of a time, from a number or a CSV of vols by day, of which a day's close is known a day later."""
    try:
        constant = float(text)
    except ValueError:
        vols = Vols(series={0: read_vols(text, lag=24.0)})
        return lambda time: float(vols.by_time(np.array([0]), np.array([time]))[0])
    if not 0 < constant <= MAX_IV:
        raise CandidatesError(f"iv={text}: give a vol above 0 and up to {MAX_IV:g} (0.7 is 70 % a year), or a CSV.")
    return lambda time: constant


# ---------------------------------------------------------------------------------------------------------------------
# What policies answer


def teacher_answers(puts: list[Put], rules: Rules) -> list[Said]:
    found = []
    for _, offer in puts:
        best = max((one.score for one in offer.decision.candidates), default=math.nan)
        side = "below" if offer.chosen is None else "at least"
        limit = "" if math.isinf(rules.threshold) else f", {side} {rules.threshold:g}"
        why = "no candidate" if math.isnan(best) else f"best score {best:.4f}{limit}"
        found.append(Said("teacher's rule", offer.chosen, why, []))
    return found


def policy_answers(args: argparse.Namespace, puts: list[Put]) -> Iterator[list[Said]]:
    """Each of those that are asked for; torch is imported for a language model alone."""
    decisions = [offer.decision for _, offer in puts]
    if args.model:
        from covered_call.language_model.policy import Policy

        policy = Policy.load(args.model, threshold=args.threshold)
        numbers = policy.manifest["tuned_on"]["numbers"]
        asked = decisions
        if OPINION_TOLD in policy.manifest.get("context", ()) and args.q_scorer:
            fitted = QScorer.load(q_path(args)).fitted
            asked = [with_opinion(decision, fitted) for decision in decisions]
        yield [
            Said(f"model {args.model}", one.pick, f"probability {one.probability:.3f}, margin {one.margin:.3f}"
                + (", abstained" if one.abstained else ""), drift_of(decision, numbers))
            for decision, one in zip(decisions, policy.decide(asked), strict=True)
        ]  # fmt: skip
    if args.q_scorer:
        scorer = QScorer.load(q_path(args))
        numbers = scorer.fitted.metadata["train"].get("numbers", {})
        yield [
            Said("Q-scorer", one.pick, "no candidate" if one.best is None else
                f"best [{one.best + 1}]: {one.q_sell:+,.2f} USD expected, P(positive) {one.confidence:.3f}"
                + (f", stopped by {one.stopped_by}" if one.stopped_by else ""), drift_of(decision, numbers))
            for decision, one in zip(decisions, scorer.decide(decisions), strict=True)
        ]  # fmt: skip


def q_path(args: argparse.Namespace) -> str:
    return os.path.join(args.q_scorer, FILE_NAME) if os.path.isdir(args.q_scorer) else args.q_scorer


def refuse_drift(args: argparse.Namespace, answers: list[list[Said]]) -> None:
    drifted = [said for its in answers for said in its if said.drift]
    if args.strict_drift and drifted:
        raise PolicyError(
            f"strict_drift: of {len(drifted)} answer(s) the candidates are beyond what the policy was tuned on, first "
            f"{drifted[0].policy}: {'; '.join(drifted[0].drift)}. Such an answer is a guess: do not act on it."
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is shown and written


def page(put: Put, answers: Sequence[Said], rules: Rules) -> str:
    snapshot, offer = put
    decision = offer.decision
    left = ", ".join(f"{count} by {name}" for name, count in offer.left_out.items())
    lines = [
        f"{decision.underlying} {decision.decision_time:%Y-%m-%d %H:%M:%S} UTC, {decision.exit_style}: spot "
        f"{decision.spot:,.2f} ({snapshot.spot_is}), {len(snapshot.calls.strike)} calls, "
        f"{len(decision.candidates)} candidates" + (f" (left out: {left})" if left else ""),
        align(candidate_cells(put), right=RIGHT) if decision.candidates else "  (none)",
    ]
    for said in answers:
        answer = "NO_TRADE" if said.pick is None else f"[{said.pick + 1}] {decision.candidates[said.pick].instrument}"
        lines.append(f"{said.policy}: {answer} ({said.why})")
        lines += [f"  drift: {'; '.join(said.drift)}: the answer is a guess"] if said.drift else []
    return "\n".join([*lines, ""])


def candidate_cells(put: Put) -> list[list[str]]:
    calls, spot = put.snapshot.calls, put.snapshot.spot
    cells = [["", "instrument", "strike", "DTE", "delta", "IV", "IV/RV", "score", "mark USD", "bid", "ask", "OI"]]
    for place, (one, row) in enumerate(zip(put.offer.decision.candidates, put.offer.rows.tolist(), strict=True), 1):
        prices = [number(float(getattr(calls, name)[row]) * spot, ",.2f") for name in QUOTED]
        cells.append([
            f"[{place}]", one.instrument, f"{one.strike:g}", f"{one.dte:.2f}", f"{one.delta:.4f}",
            number(one.iv, ".4f"), number(one.ivrv_ratio, ".4f"), f"{one.score:.4f}", *prices,
            number(float(calls.open_interest[row]), ",.0f"),
        ])  # fmt: skip
    return cells


def number(value: float | None, form: str) -> str:
    return "n/a" if value is None or math.isnan(value) else format(value, form)


def write(args: argparse.Namespace, puts: list[Put]) -> Iterator[tuple[str, int]]:
    """A CSV for each underlying and exit style; of synthetic chains with the outcomes that the teacher counts."""
    os.makedirs(args.out, exist_ok=True)
    stamp = f"{datetime.datetime.now(datetime.UTC):%Y%m%d_%H%M%S}"
    by_market: dict[tuple[str, str], list[Put]] = collections.defaultdict(list)
    for put in puts:
        by_market[put.offer.decision.underlying, put.offer.decision.exit_style].append(put)
    for (underlying, style), its in by_market.items():
        its.sort(key=lambda put: put.offer.decision.decision_time)
        outcomes: list[Any] = [None] * len(its)
        if args.preset == "synthetic":
            found = synthetic.outcomes_of([put.offer for put in its])
            outcomes = [sold_alone(put.offer, values) for put, values in zip(its, found, strict=True)]
        times = [put.offer.decision.decision_time for put in its]
        path = os.path.join(args.out, candidate_csv.file_name(underlying, style, times[0], times[-1], stamp))
        text = io.StringIO(newline="")
        candidate_csv.write_rows(text, [candidate_csv.HEADER])
        for put, known in zip(its, outcomes, strict=True):
            candidate_csv.write_rows(text, rows_of(put, known, args))
        atomic.write(path, text.getvalue())
        yield path, sum(max(1, len(put.offer.rows)) for put in its)


def rows_of(put: Put, outcomes: Any, args: argparse.Namespace) -> Iterator[list]:
    strategy = "synthetic" if args.preset == "synthetic" else "snapshot"
    quotes, chosen = candidate_csv.quotes_of(put.snapshot, put.offer.rows), put.offer.chosen
    return candidate_csv.rows_of(put.offer.decision, quotes, strategy, chosen if args.teacher else None, outcomes,
        put.snapshot.shape)  # fmt: skip


def sold_alone(offer: Offer, pnl: tuple[float | None, ...]) -> list[tuple[float | None, None, None]]:
    """As the teacher's files have it: the outcome of the call that was sold, and of no other."""
    return [(value if place == offer.chosen else None, None, None) for place, value in enumerate(pnl)]


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def default_styles(args: argparse.Namespace) -> list[str]:
    """Those of a model's training, for it knows no others; else hold_to_expiry, of synthetic chains both."""
    if args.preset == "synthetic":
        return list(STYLES)
    return read_manifest(args.model)["tuned_on"]["exit_styles"] if args.model else [HOLD_TO_EXPIRY]


def rules_from(args: argparse.Namespace) -> Rules:
    given = {name: getattr(args, name) for name in ("max_candidates", "min_open_interest", "max_spread_pct")}
    changed = {name: value for name, value in given.items() if value is not None}
    if args.premium_in_score is not None:
        changed["premium_in_score"] = args.premium_in_score
    return rules_of(args.preset, **changed)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call chain", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=Help, allow_abbrev=False
    )
    chain = parser.add_argument_group("chain")
    source = chain.add_mutually_exclusive_group()
    source.add_argument("--snapshot", nargs="+", metavar="PARQUET", help="files of option quotes, or quoted globs")
    source.add_argument("--live", nargs="+", metavar="CURRENCY", help="BTC, ETH: Deribit's chain of this moment")
    chain.add_argument("--testnet", action="store_true", help="of --live: test.deribit.com")
    chain.add_argument("--url", metavar="URL", help="of --live: another address of the API")
    chain.add_argument(*flags("max_age"), type=float, metavar="SECONDS",
        help="an older snapshot is an error; default: 900 with --live, else any age will do")  # fmt: skip
    chain.add_argument("--spots", metavar="CSV", help="daily closes, {underlying} in its name for one each (a date is "
        "08:00 UTC); without them IV/RV is unknown, and the score has no penalty")  # fmt: skip
    chain.add_argument(*flags("context_vols"), metavar="CSV", help="the market's vols, {underlying} in its name for "
        "one each, for policies that were fitted with them")  # fmt: skip
    chain.add_argument(*flags("iv_lag"), type=float, default=CoveredCallCandidatesConfig.iv_lag, metavar="HOURS",
        help="after its time a vol is known; default: %(default)g")  # fmt: skip
    chain.add_argument(*flags("on_bad_rows"), choices=("error", "skip"), default="error",
        help="quotes that cannot be: an error, or left out and counted; default: error")  # fmt: skip
    made = parser.add_argument_group("candidates")
    made.add_argument("--preset", choices=PRESETS, default="backtest",
        help="which calls are candidates, and their score; default: backtest, as the teacher has it")  # fmt: skip
    made.add_argument(*flags("exit_style"), nargs="+", choices=STYLES,
        help=f"of the decision; default: the model's, else {HOLD_TO_EXPIRY}")  # fmt: skip
    made.add_argument(*flags("premium_in_score"), action=argparse.BooleanOptionalAction,
        help="whether the premium counts in the score; default: yes, and no with synthetic")  # fmt: skip
    made.add_argument(*flags("max_candidates"), type=int, metavar="N", help="default: 10, those of the best score")
    made.add_argument(*flags("min_open_interest"), type=float, metavar="CONTRACTS", help="default: any")
    made.add_argument(*flags("max_spread_pct"), type=float, metavar="PERCENT", help="ask - bid of mid; default: any")
    made.add_argument("--iv", default="0.70", metavar="VOL", help="of synthetic: a constant, or a CSV; default: 0.70")
    made.add_argument("--underlying", default="BTC", help="of synthetic: whose spots these are; default: BTC")
    policies = parser.add_argument_group("policies")
    policies.add_argument("--model", metavar="DIR", help="a language model that covered-call train saved")
    policies.add_argument("--threshold", type=float, default=0.0, metavar="P",
        help="a trade of the model with less probability becomes NO_TRADE; default: 0")  # fmt: skip
    policies.add_argument(
        *flags("q_scorer"), metavar="ZIP", help="a file, or its folder, that covered-call q-scorer saved"
    )
    policies.add_argument(*flags("strict_drift"), action="store_true",
        help="end with an error where candidates are beyond what a policy was tuned on")  # fmt: skip
    out = parser.add_argument_group("output")
    out.add_argument("--out", metavar="DIR", help="write the candidates there as CSV, one file a market")
    out.add_argument("--teacher", action=argparse.BooleanOptionalAction, default=True,
        help="label the CSV with what the teacher's rule sells; default: yes")  # fmt: skip
    args = parser.parse_args(arguments)
    if not (args.snapshot or args.live or args.preset == "synthetic"):
        parser.error("give --snapshot, --live, or --preset synthetic with --spots.")
    return args
