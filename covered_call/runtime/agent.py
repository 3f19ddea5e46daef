"""The verb agent: policies that decide over time with positions, on a backtest, in shadow, on paper, on a testnet."""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import heapq
import importlib
import itertools
import signal
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import Any

from covered_call import atomic
from covered_call.candidates.builder import Backtest, find_csvs
from covered_call.candidates.data_options import Help, flags
from covered_call.candidates.schema import UTC, CandidatesError
from covered_call.candidates.source import HOME
from covered_call.command_line import plain_errors, start_logging
from covered_call.language_model.manifest import PolicyError
from covered_call.market.deribit import Deribit, DeribitError
from covered_call.market.harvest_log import HarvestError
from covered_call.market.snapshot import BadRows, Snapshot, read_snapshots
from covered_call.market.teacher import PRESETS
from covered_call.runtime import live, testnet
from covered_call.runtime.agent_config import AgentConfig, ConfigError, read_config
from covered_call.runtime.alerts import Alerts
from covered_call.runtime.broker import BrokerRules, DeribitTestnet
from covered_call.runtime.chain import paths_of
from covered_call.runtime.configured import Policies, closes_of, fusion_of, policies_of
from covered_call.runtime.drift import drift_of
from covered_call.runtime.engine import Agent, Cycle, Steps, Venue, fall_back
from covered_call.runtime.exits import exits_of
from covered_call.runtime.fusion import fuse
from covered_call.runtime.journal import Journal, JournalError, opened
from covered_call.runtime.kill import killed
from covered_call.runtime.paper import FILLED, Begun, Paper
from covered_call.runtime.replay import Recorded, logged_in, states_from
from covered_call.runtime.risk import Note, RiskRules, notes_of, vetoes_of
from covered_call.runtime.sizing import SizingRules, size
from covered_call.runtime.state import SELL_CALL, Intention, MarketState, Portfolio, Veto
from covered_call.runtime.worker import WorkerError
from covered_call.value_model.learning import QScorerError

DESCRIPTION = """\
Policies that decide over time, with a portfolio: the rule, a Q-scorer, a tuned language model, in the order in which
one stands in for another that fails. No mode sends an order to the exchange itself.

  replay   over the decisions of a backtest, whose calls bring what its files say
  shadow   over chains: decides and logs, and sells nothing
  paper    over chains: sells at the bid, pays Deribit's fees, settles at expiry, on paper
  testnet  over the chains of test.deribit.com: sends orders there, with the keys of the environment

Chains are snapshots in files (--snapshot), or Deribit's of now, one of each underlying every interval (--live).

  doctor   looks at all that a configuration names, and says what to do
  kill     stops every order of its agents, and --lift lets them go on

and of a log that one of them wrote, each with a --help of its own:

  explain  one decision on a screen
  report   what it did, and what that was worth once it is settled: Markdown, JSON, a picture
  settle   what each candidate would have brought, as far as that is known by now
  export   the log and its outcomes as the CSV that q-scorer, train and prefer learn from
  diff     two configurations on one window

Each decision is a line of decisions_YYYYMMDD.jsonl, on the disk before anything is done."""
EXAMPLES = """\
examples:
  covered-call agent replay --config agent.yaml --data_files 'runs/*.csv'
  covered-call agent shadow --config agent.yaml --snapshot 'chains/*.parquet'
  covered-call agent doctor --config agent.yaml
  covered-call agent paper  --config agent.yaml --live
  covered-call agent paper  --config agent.yaml --live --cycles 1     from cron; it goes on where it ended
  covered-call agent testnet --config agent.yaml --live
  covered-call agent settle out/agent/shadow --snapshot 'chains/*.parquet'
  covered-call agent report out/agent/shadow
  covered-call agent export out/agent/shadow --to_csv runs/
  covered-call agent diff   out/agent/one out/agent/other

agent.yaml, with its defaults:
  policy: {rule: {threshold: 3.0}}     # and llm: FOLDER, q: ZIP, openai: {base_url: URL, model: NAME}
  holdings: {BTC: 1.0}                 # coins
  fusion: {mode: rules}                # of a language model with what stands beside it
  sizing: {method: fixed, units: 0.1}  # coins that a sale is of
  risk: {max_positions: 1}             # open calls of an underlying; and 20 rules more, and without: [CODE, ...]
  exit: hold                           # of paper: or tp_and_roll, others_live
  exit_style: hold_to_expiry
  preset: backtest                     # which calls of a chain are candidates
  spots: null                          # CSV of daily closes, {underlying} in its name
  state_dir: out/agent                 # where the logs are
  on_trade: null                       # a command that gets each trade as JSON on its standard input
  interval: 86400                      # seconds, of --live
  broker: {price: mid, fill_timeout: 60, reprices: 3, on_difference: halt}   # of the testnet
"""
MODES = ("replay", "shadow", "paper", "testnet")
# Modules of their own, each with a main and a parse_arguments.
ASIDE = ("doctor", "kill", "explain", "report", "settle", "export", "diff")
# Rules of risk that would stop everything, for what they look at is not known there.
UNKNOWN_IN = {
    "replay": ("spread", "open_interest", "no_bid", "max_iv", "min_iv"), "shadow": ("no_equity",), "paper": (),
    "testnet": (),
}  # fmt: skip
WITH_EQUITY = ("paper", "testnet")


def main(arguments: list[str]) -> None:
    if arguments[:1] and arguments[0] in ASIDE:
        return aside(arguments[0]).main(arguments[1:])
    args = parse_arguments(arguments)
    start_logging()
    errors = CandidatesError, ConfigError, PolicyError, QScorerError, WorkerError, JournalError, atomic.FolderBusy
    with plain_errors(args, *errors, DeribitError, HarvestError):
        run(args)


def aside(name: str) -> Any:
    return importlib.import_module(f"covered_call.runtime.{name}")


def run(args: argparse.Namespace) -> None:
    config = read_config(args.config)
    with policies_of(config) as policies, ended_by_ctrl_c() as stop:
        if args.mode == "replay":
            replay(args, config, policies, stop)
        elif args.live:
            watch_live(args, config, policies, stop)
        else:
            watch(args, config, policies, stop)


# ---------------------------------------------------------------------------------------------------------------------
# Modes


def replay(args: argparse.Namespace, config: AgentConfig, policies: Policies, stop: list) -> None:
    options = config.options
    options.exit_style, options.on_bad_rows = config.exit_style, args.on_bad_rows
    options.context = "spot" if policies.with_market else "none"
    decisions = Backtest(find_csvs(args.data_files, args.data_dir, str(HOME)), options).decisions
    for line in decisions.checks():
        print(line)
    stamp = f"replay-{datetime.datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder = args.log or Path(config.state_dir) / stamp
    venue = Recorded(options)
    with opened(folder, durable=False) as journal:
        begins = datetime.datetime.fromtimestamp(int(decisions.time[0]) / 1e6, UTC)
        agent = agent_of(args, config, policies, venue, journal, begins)
        told = Told()
        for cycle in agent.run(venue.states(logged_in(decisions))):
            told.add(cycle)
            if stop:
                break
    ends = venue.rest(agent.portfolio)
    results = [one.pnl_usd for one in agent.portfolio.trades] + [one.pnl_usd for one in ends]
    seen = seen_lines(told.times, policies.tuned_to)
    print("\n".join([*told.lines(), *result_lines(results, venue.unknown), *seen, f"Log: {folder}"]))


def watch(args: argparse.Namespace, config: AgentConfig, policies: Policies, stop: list) -> None:
    """Shadow and paper, over snapshots."""
    bad, closes = BadRows(args.on_bad_rows), closes_of(config)
    snapshots = in_time(paths_of(args.snapshot), bad, config)
    folder = args.log or Path(config.state_dir) / args.mode
    venue = Paper(closes) if args.mode == "paper" else None
    if policies.with_market and not closes:
        raise ConfigError("A policy was fitted with the market's context, which is made of spots: give spots.")
    states = states_from(snapshots, PRESETS[config.preset], closes, config.exit_style, bad,
        policies.with_market)  # fmt: skip
    first = next(states, None)
    if first is None:
        raise CandidatesError(f"snapshot={args.snapshot}: none is of {', '.join(config.holdings)}, which is held.")
    told = Told()
    with Alerts(config.on_trade, args.mode) as alerts, opened(folder) as journal:
        agent = agent_of(args, config, policies, venue, journal, first.decision.decision_time)
        for cycle in agent.run(itertools.chain([first], states)):
            told.add(cycle)
            alerts.tell(cycle)
            print(page(cycle, agent.drift(cycle.state)))
            if stop:
                break
    again = "" if told.cycles else "All of these were decided before. "
    print("\n".join([*told.lines(), *alerts.lines(), f"{again}Log: {folder}"]))


def watch_live(args: argparse.Namespace, config: AgentConfig, policies: Policies, stop: list) -> None:
    """Shadow, paper and the testnet, over the chains of now."""
    folder, closes = Path(args.log or Path(config.state_dir) / args.mode), closes_of(config)
    account = testnet.connected() if args.mode == "testnet" else None
    exchange = account or Deribit(args.url, live.patience_of(config.interval))
    wanted = live.Wanted(
        list(config.holdings), PRESETS[config.preset], config.exit_style, args.on_bad_rows, closes,
        config.spots is not None, config.interval, RiskRules(**config.risk).max_age_s, policies.with_market,
    )  # fmt: skip
    told = Told()
    with (
        Alerts(config.on_trade, args.mode) as alerts,
        opened(folder) as journal,
        live.opened(exchange, folder / "chains", wanted) as feed,
    ):
        rules, paper = BrokerRules(**config.broker), Paper(closes) if args.mode == "paper" else None
        switch = functools.partial(killed, folder, config.state_dir)
        broker = DeribitTestnet(account, rules, wanted.underlyings, switch, closes) if account else None
        # A chain that was fetched before a kill may be the first that is decided on.
        begins = live.now().replace(microsecond=0) - datetime.timedelta(seconds=wanted.max_age)
        agent = agent_of(args, config, policies, broker or paper, journal, begins, live.now)
        if broker:
            broker.check(agent.portfolio, live.now())
        for cycle in live.cycles(feed, agent, stop, args.cycles, broker.heed if broker else lambda: None):
            told.add(cycle)
            alerts.tell(cycle)
            print(page(cycle, agent.drift(cycle.state)), flush=True)
    print("\n".join([*told.lines(), *alerts.lines(), f"Log: {folder}"]))


def agent_of(
    args: argparse.Namespace, config: AgentConfig, policies: Policies, venue: Venue | None, journal: Journal,
    begins: datetime.datetime, clock: Callable[[], datetime.datetime] | None = None,
) -> Agent:  # fmt: skip
    """Args: begins: of a new log. clock: None: each state is decided at its time."""
    its = {"config_hash": config.sha, "config": dataclasses.asdict(config)}
    about = {"mode": args.mode, **its, "versions": policies.versions}
    begun = Begun(begins, dict(config.holdings), float(config.cash_usd))
    steps = steps_of(config, args.mode, journal.folder, policies.ranges, journal.decided)
    return Agent(policies.sources, steps, venue, begun, journal, about, clock, policies.ranges)


def steps_of(
    config: AgentConfig, mode: str, folder: str | Path, ranges: dict[str, dict], decided: Collection[str] = ()
) -> Steps:
    """How proposals are fused, sized, and stopped, also by the kill switch.

    Args:
        decided: ids of the decisions of before, none of which is ordered again.
    """
    risk = RiskRules(**config.risk)
    risk = dataclasses.replace(risk, without={*risk.without, *UNKNOWN_IN[mode]})
    sizing = SizingRules(**config.sizing)
    if mode not in WITH_EQUITY and "max_risk_pct" not in config.sizing:  # a share of an equity that is not known there
        sizing = dataclasses.replace(sizing, max_risk_pct=None)
    fusion = fusion_of(config)
    switches = [folder] if mode == "replay" else [folder, config.state_dir]

    def seen(state: MarketState) -> dict[str, Any]:
        drift = [text for its in ranges.values() for text in drift_of(state.decision, its)]
        return {"killed": killed(*switches), "ordered": decided, "drift": drift}

    def vetoed(intention: Intention, state: MarketState, portfolio: Portfolio, now: datetime.datetime) -> list[Veto]:
        return vetoes_of(intention, state, portfolio, risk, now, **seen(state))

    def noted(intention: Intention, state: MarketState, portfolio: Portfolio, now: datetime.datetime) -> list[Note]:
        return notes_of(intention, state, portfolio, risk, now, **seen(state))

    def left(state: MarketState, portfolio: Portfolio, now: datetime.datetime) -> list[Intention]:
        return [order for one in exits_of(state, portfolio, config.exit, now) for order in one.intentions]

    return Steps(
        fuse=(lambda members, state, portfolio: fuse(members, state, portfolio, fusion)) if fusion else fall_back,
        size=lambda proposal, state, portfolio: size(proposal, state, portfolio, sizing),
        vetoes_of=vetoed,
        exits=left,
        notes_of=noted,
    )


def in_time(paths: list[str], bad: BadRows, config: AgentConfig) -> Iterator[Snapshot]:
    """The snapshots of what is held, of all files by time; a file is opened when its time has come.

    Raises:
        CandidatesError: for an underlying that stands in two files at one time.
    """
    firsts = [next(read_snapshots(path, BadRows("skip")), None) for path in paths]
    begins = sorted((first.time, path) for first, path in zip(firsts, paths, strict=True) if first)
    waiting = collections.deque((time, place, path) for place, (time, path) in enumerate(begins))
    merged: list[tuple[int, int, Snapshot, Iterator[Snapshot]]] = []
    last: dict[str, Snapshot] = {}
    while waiting or merged:
        while waiting and (not merged or waiting[0][0] <= merged[0][0]):
            _, place, path = waiting.popleft()
            push(merged, place, read_snapshots(path, bad))
        _, place, snapshot, rest = heapq.heappop(merged)
        push(merged, place, rest)
        before = last.get(snapshot.underlying)
        if before and snapshot.time <= before.time:
            raise CandidatesError(
                f"{snapshot.source} has {snapshot.underlying} at a time that {before.source} has, too. Give one."
            )
        last[snapshot.underlying] = snapshot
        if snapshot.underlying in config.holdings:
            yield snapshot


def push(merged: list, place: int, snapshots: Iterator[Snapshot]) -> None:
    """The next snapshot of a file among those of others; of equal times the file of the lower place is first."""
    snapshot = next(snapshots, None)
    if snapshot:
        heapq.heappush(merged, (snapshot.time, place, snapshot, snapshots))


@contextlib.contextmanager
def ended_by_ctrl_c() -> Generator[list]:
    """A list that is not empty once Ctrl-C was typed, or SIGTERM came: the cycle comes to its end first."""
    asked: list[int] = []

    def note(number: int, frame) -> None:
        if asked:  # typed again: at once
            raise KeyboardInterrupt
        asked.append(number)
        print("Ends after this decision.", flush=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def page(cycle: Cycle, drift: dict[str, list[str]]) -> str:
    """A cycle on one screen."""
    state, plan, executions, portfolio = cycle
    decision, intention = state.decision, plan.entry.intention
    lines = [
        f"{decision.underlying} {decision.decision_time:%Y-%m-%d %H:%M:%S} UTC, {decision.exit_style}: spot "
        f"{decision.spot:,.2f}, {len(decision.candidates)} candidates",
        *(f"  {one.source}: {one.error or one.instrument or 'NO_TRADE'}" + ("" if one.error else
            f" (confidence {one.confidence:.3f}; {one.reason})") for one in plan.proposals),
        *(f"  drift, {name}: {'; '.join(found)}: its answer is a guess" for name, found in drift.items()),
        f"  {intention.action} {intention.instrument or ''} by {plan.fused.method}"
        + (f", {intention.units:g} coin(s)" if intention.action == SELL_CALL else "")
        + "".join(f" ({code})" for code in intention.reason_codes if code != plan.fused.method),
        *(f"  vetoed, {one.code}: {one.text}" for one in plan.entry.vetoes),
        *(f"  {one.status}" + (f" at {one.price:,.2f} USD, fee {one.fee_usd:,.2f}" if one.status == FILLED
            else f": {one.reason}") for one in executions),
        *standing_lines(portfolio),
    ]  # fmt: skip
    return "\n".join([*lines, ""])


def standing_lines(portfolio: Portfolio) -> list[str]:
    if portfolio.equity_usd is None and not portfolio.positions:
        return []
    equity = "unknown" if portfolio.equity_usd is None else f"{portfolio.equity_usd:,.2f} USD"
    held = ", ".join(f"{-one.units:g} {one.instrument} sold at {one.entry_price:,.2f}" for one in portfolio.positions)
    return [f"  equity before orders {equity}; open: {held or 'nothing'}; {len(portfolio.trades)} trade(s) closed"]


class Told:
    """Counts of cycles."""

    def __init__(self):
        self.cycles, self.times = 0, []
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def add(self, cycle: Cycle) -> None:
        self.cycles += 1
        self.times.append(cycle.state.decision.decision_time)
        plan = cycle.plan
        self.counts["meant"][plan.entry.intention.action] += 1
        self.counts["by"][plan.fused.method] += 1
        self.counts["vetoed"].update(one.code for one in plan.entry.vetoes)
        self.counts["orders"].update(one.status for one in cycle.executions)
        self.counts["errors"].update(one.source for one in plan.proposals if one.error)

    def lines(self) -> list[str]:
        found = [f"{self.cycles:,} decisions"]
        for name, its in self.counts.items():
            if its:
                found.append(f"  {name}: " + ", ".join(f"{key} {count:,}" for key, count in its.most_common()))
        return found


def result_lines(results: list[float], unknown: int) -> list[str]:
    lines = [
        f"{len(results):,} sales brought {sum(results):+,.2f} USD against holding the coin, at the files' own vols: "
        "no verdict, for which see covered-call evaluate."
    ]
    return [*lines, f"{unknown:,} more were not made: what they bring is unknown."] if unknown else lines


def seen_lines(times: list[datetime.datetime], tuned_to: dict[str, datetime.datetime]) -> list[str]:
    """Which of the decisions a policy was tuned on, or on what came after them."""
    counts = {name: sum(time <= end for time in times) for name, end in tuned_to.items()}
    return [
        f"{count:,} of the decisions are of the time until {tuned_to[name]:%Y-%m-%d}, on which {name} was tuned: what "
        "it does there says little."
        for name, count in counts.items()
        if count
    ]


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    if arguments[:1] and arguments[0] in ASIDE:
        return aside(arguments[0]).parse_arguments(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="covered-call agent", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("mode", choices=MODES, help=f"what to do; {', '.join(ASIDE)} have a --help of their own")
    parser.add_argument("--config", metavar="YAML", required=True, help="what the agent is made of: see below")
    parser.add_argument("--log", metavar="DIR", help="the folder of the log; default: one for the mode in state_dir, "
        "of a replay a new one each time")  # fmt: skip
    parser.add_argument(*flags("data_files"), nargs="+", metavar="CSV", help="of replay: files of the backtest, or "
        "quoted globs; default: the CSVs in data/, else the simulated sample")  # fmt: skip
    parser.add_argument(*flags("data_dir"), metavar="DIR", help="of replay: the folder of the CSVs")
    parser.add_argument("--snapshot", nargs="+", metavar="PARQUET", help="of shadow and paper: files of option "
        "quotes, or quoted globs")  # fmt: skip
    live.add_options(parser)
    parser.add_argument(*flags("on_bad_rows"), choices=("error", "skip"), default="error",
        help="rows that cannot be: an error, or left out and counted; default: error")  # fmt: skip
    args = parser.parse_args(arguments)
    live.check_options(parser, args)
    if args.mode != "replay" and (args.data_files or args.data_dir):
        parser.error(f"{args.mode}: --data_files and --data_dir are for replay.")
    return args
