"""The verb agent: policies that decide over time with positions, on a backtest, in shadow, on paper, on a testnet."""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import itertools
import signal
from collections.abc import Callable, Collection, Generator, Sequence
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
from covered_call.market.files import chain_files, in_time
from covered_call.market.harvest_log import HarvestError
from covered_call.market.snapshot import BadRows
from covered_call.market.teacher import PRESETS
from covered_call.runtime import live, testnet
from covered_call.runtime.agent_config import AgentConfig, ConfigError, read_config
from covered_call.runtime.alerts import Alerts
from covered_call.runtime.broker import BrokerRules, DeribitTestnet
from covered_call.runtime.configured import (
    NO_PAYOFF,
    Policies,
    closes_of,
    fusion_of,
    pair_of,
    payoff_for,
    policies_of,
    vols_of,
)
from covered_call.runtime.drift import drift_of
from covered_call.runtime.engine import Agent, Steps, Venue, fall_back
from covered_call.runtime.exits import exits_of
from covered_call.runtime.experience import Experience, Settled
from covered_call.runtime.fusion import Fused, fuse
from covered_call.runtime.journal import Journal, JournalError, opened
from covered_call.runtime.kill import killed
from covered_call.runtime.paper import Begun, Paper
from covered_call.runtime.replay import Recorded, logged_in, states_from
from covered_call.runtime.risk import Note, RiskRules, notes_of, vetoes_of
from covered_call.runtime.screen import Told, page, result_lines, seen_lines
from covered_call.runtime.sizing import Sizing, SizingRules, size
from covered_call.runtime.state import Intention, MarketState, Portfolio, Proposal, Veto
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
  context_vols: null                   # CSV of the market's vols, the same, for policies that were fitted with them
  iv_lag: 24                           # hours after its time at which one of them is known
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
    if policies.with_market:
        options.context, options.context_vols, options.iv_lag = "spot", config.context_vols, config.iv_lag
        options.context_columns = policies.of_chain
    decisions = Backtest(find_csvs(args.data_files, args.data_dir, str(HOME)), options).decisions
    for line in decisions.checks():
        print(line)
    stamp = f"replay-{datetime.datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder = args.log or Path(config.state_dir) / stamp
    venue = Recorded(options)
    with opened(folder, durable=False) as journal:
        begins = datetime.datetime.fromtimestamp(int(decisions.time[0]) / 1e6, UTC)
        experience = Experience(pair_of(config))
        agent = agent_of(args, config, policies, venue, journal, begins, experience=lambda: experience)
        told = Told()
        for cycle in agent.run(venue.states(logged_in(decisions))):
            told.add(cycle)
            if learns(config):
                experience.add(cycle.state, cycle.portfolio, cycle.plan.proposals, venue.brought())
            if stop:
                break
    ends = venue.rest(agent.portfolio)
    results = [one.pnl_usd for one in agent.portfolio.trades] + [one.pnl_usd for one in ends]
    seen = seen_lines(told.times, policies.tuned_to)
    print("\n".join([*told.lines(), *result_lines(results, venue.unknown), *seen, f"Log: {folder}"]))


def watch(args: argparse.Namespace, config: AgentConfig, policies: Policies, stop: list) -> None:
    """Shadow and paper, over snapshots."""
    bad, closes = BadRows(args.on_bad_rows), closes_of(config)
    snapshots = in_time(chain_files(args.snapshot, "snapshot"), bad, config.holdings)
    folder = args.log or Path(config.state_dir) / args.mode
    venue = Paper(closes) if args.mode == "paper" else None
    if policies.with_market and not closes:
        raise ConfigError("A policy was fitted with the market's context, which is made of spots: give spots.")
    states = states_from(snapshots, PRESETS[config.preset], closes, config.exit_style, bad,
        policies.with_market, vols_of(config))  # fmt: skip
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
        vols_of(config),
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
    experience: Callable[[], Experience] | None = None,
) -> Agent:  # fmt: skip
    """Args:
    begins: of a new log.
    clock: None: each state is decided at its time.
    experience: what became of earlier decisions; None: what is settled beside the log.
    """
    its = {"config_hash": config.sha, "config": dataclasses.asdict(config)}
    about = {"mode": args.mode, **its, "versions": policies.versions}
    begun = Begun(begins, dict(config.holdings), float(config.cash_usd))
    if experience is None:
        experience = Settled(journal.folder, pair_of(config)).now if learns(config) else Experience
    if config.sizing.get("method") == "half_kelly":
        for name in config.holdings:
            if payoff_for(config, policies.payoffs, experience(), name, (clock or live.now)())[0] is None:
                print(f"{name}: {NO_PAYOFF}.")
    steps = steps_of(config, args.mode, journal.folder, policies, experience, journal.decided)
    return Agent(policies.sources, steps, venue, begun, journal, about, clock, policies.ranges)


def learns(config: AgentConfig) -> bool:
    """Whether anything looks at what became of earlier decisions."""
    return pair_of(config) is not None or config.sizing.get("method") == "half_kelly"


def steps_of(
    config: AgentConfig, mode: str, folder: str | Path, policies: Policies, experience: Callable[[], Experience],
    decided: Collection[str] = (),
) -> Steps:  # fmt: skip
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
        drift = [text for its in policies.ranges.values() for text in drift_of(state.decision, its)]
        return {"killed": killed(*switches), "ordered": decided, "drift": drift}

    def vetoed(intention: Intention, state: MarketState, portfolio: Portfolio, now: datetime.datetime) -> list[Veto]:
        return vetoes_of(intention, state, portfolio, risk, now, **seen(state))

    def noted(intention: Intention, state: MarketState, portfolio: Portfolio, now: datetime.datetime) -> list[Note]:
        return notes_of(intention, state, portfolio, risk, now, **seen(state))

    def left(state: MarketState, portfolio: Portfolio, now: datetime.datetime) -> list[Intention]:
        return [order for one in exits_of(state, portfolio, config.exit, now) for order in one.intentions]

    def fused(members: Sequence[Proposal], state: MarketState, portfolio: Portfolio) -> Fused:
        if fusion is None:
            return fall_back(members, state, portfolio)
        return fuse(members, state, portfolio, fusion, experience().settled() if fusion.mode == "learned" else None)

    def sized(proposal: Proposal, state: MarketState, portfolio: Portfolio) -> Sizing:
        if sizing.method != "half_kelly":
            return size(proposal, state, portfolio, sizing)
        put = state.decision
        payoff, whose = payoff_for(config, policies.payoffs, experience(), put.underlying, put.decision_time)
        return size(proposal, state, portfolio, sizing, payoff)._replace(payoff=payoff, payoff_of=whose)

    return Steps(
        fuse=fused,
        size=sized,
        vetoes_of=vetoed,
        exits=left,
        notes_of=noted,
    )


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
# The command line


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
