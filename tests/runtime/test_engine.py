"""The cycle of an agent: what is decided, vetoed, sent and not sent, and replays against what a backtest recorded."""

import json
from collections import Counter

import pytest
from conftest import REAL_DATA, decision, needs_real_data, on_the_default_stack, read_candidates, write_csv
from market.quotes import chain, quote, write_harvest
from markets import walk

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import CandidatesError
from covered_call.market.snapshot import read_snapshots
from covered_call.market.teacher import PRESETS
from covered_call.runtime.engine import (
    NOT_SENT,
    ROLLED,
    Agent,
    Steps,
    entry_of,
    fall_back,
    plan_of,
)
from covered_call.runtime.fusion import Fused
from covered_call.runtime.journal import opened, read
from covered_call.runtime.paper import FILLED, UNFILLED, Begun, Execution, Paper, begin
from covered_call.runtime.policies import Rule
from covered_call.runtime.replay import Recorded, states_from
from covered_call.runtime.sizing import Sizing
from covered_call.runtime.state import CLOSE, HOLD, NO_TRADE, ROLL, SELL_CALL, Intention, Proposal, Quote, Veto
from runtime.markets import BEGUN, DAY, FREELY, ONE, START, at_most, fixed, hold, quoted_state, quoted_states

pytestmark = on_the_default_stack

NOTHING = begin(BEGUN)
HOLD_FILES = sorted(REAL_DATA.glob("*hold_to_expiry*.csv"))
REPLAY = FREELY._replace(size=fixed(1.0))


# ---------------------------------------------------------------------------------------------------------------------
# The pure core


def test_the_same_state_makes_the_same_plan_and_whoever_proposes_it_is_sized_and_vetoed():
    state = quoted_state()
    proposals = [Rule().propose(state, NOTHING)]
    plan = plan_of(state, NOTHING, proposals, FREELY, START)
    assert plan == plan_of(state, NOTHING, proposals, FREELY, START)
    name = state.decision.candidates[0].instrument
    assert plan.entry.intention == Intention(SELL_CALL, state.decision.decision_id, name, 0.1, None, ("rule",))
    assert plan.orders == (plan.entry,)


def test_vetoes_are_all_there_and_what_is_vetoed_is_not_sent():
    found = [Veto("spread", 7.0, 5.0, "too wide"), Veto("no_bid", None, None, "no bid")]
    steps = FREELY._replace(vetoes_of=lambda intention, state, portfolio, now: found)
    (cycle,) = Agent([Rule()], steps, Paper(), BEGUN).run([quoted_state()])
    assert list(cycle.plan.entry.vetoes) == found and cycle.plan.orders == () == cycle.executions
    assert not cycle.portfolio.positions


@pytest.mark.parametrize(
    ("proposal", "sized", "codes"),
    [(Proposal("rule", None, 1.0), Sizing(1.0), ("rule",)),
     (Proposal("llm", "X", 1.0, error="broken"), Sizing(1.0), ("rule",)),
     (Proposal("rule", "X", 1.0), Sizing(0.0, "kelly"), ("kelly",)),
     (Proposal("rule", "X", 1.0), Sizing(0.0), ("too_small",))],
)  # fmt: skip
def test_no_trade_says_why(proposal, sized, codes):
    steps = FREELY._replace(size=lambda proposal, state, portfolio: sized)
    intention, _ = entry_of(quoted_state(), NOTHING, Fused(proposal, "rule"), steps)
    assert (intention.action, intention.instrument, intention.reason_codes) == (NO_TRADE, None, codes)


def test_fusion_and_limit_are_the_steps():
    other = Proposal("q", "BTC-10JAN25-105000-C", 0.9)
    steps = FREELY._replace(fuse=lambda proposals, state, portfolio: Fused(other, "second_confident", {"q": 0.7}),
        limit=lambda name, state: state.quotes[name].mid)  # fmt: skip
    (cycle,) = Agent([Rule()], steps, Paper(), BEGUN).run([quoted_state()])
    intention = cycle.plan.entry.intention
    assert intention.instrument == other.instrument and intention.reason_codes == ("second_confident",)
    assert cycle.executions[0].status == UNFILLED and "below the limit" in cycle.executions[0].reason


# ---------------------------------------------------------------------------------------------------------------------
# Exits


def exits_by(*intentions):
    return FREELY._replace(exits=lambda state, portfolio, now: intentions if portfolio.positions else (), fuse=once)


def once(proposals, state, portfolio):
    """Sells on the first day alone."""
    first = state.decision.decision_time == START
    return fall_back(proposals, state, portfolio) if first else Fused(Proposal("nobody", None, 1.0), "nobody")


def held_then(steps: Steps, quotes=None):
    first, second = quoted_states(3)[1:]
    first = first._replace(decision=first.decision._replace(decision_time=START))
    name = first.decision.candidates[0].instrument
    second = second._replace(quotes={**second.quotes, name: Quote(name, 90.0, 100.0, 95.0, 1.0), **(quotes or {})})
    agent = Agent([Rule()], steps, Paper(), BEGUN)
    (sold, closed) = agent.run([first, second])
    assert sold.portfolio.positions
    return name, closed


def name_of_the_sold() -> str:
    return quoted_states(3)[1].decision.candidates[0].instrument


def test_what_exits_close_is_bought_back_at_the_ask():
    name, cycle = held_then(exits_by(Intention(CLOSE, "an id", name_of_the_sold(), 0.1), Intention(HOLD, "an id")))
    assert [one.price for one in cycle.executions] == [100.0] and not cycle.portfolio.positions
    assert len(cycle.portfolio.trades) == 1 and len(cycle.plan.exits) == 1


def rolling() -> Steps:
    into = quoted_states(3)[2].decision.candidates[1].instrument
    return exits_by(Intention(ROLL, "an id", name_of_the_sold(), 0.1),
        Intention(SELL_CALL, "an id", into, 0.1, None, (ROLLED,), name_of_the_sold()))  # fmt: skip


def test_a_roll_is_a_close_and_then_a_sale_of_one_roll_more():
    _, cycle = held_then(rolling())
    assert [one.status for one in cycle.executions] == [FILLED, FILLED]
    assert [one.rolls for one in cycle.portfolio.positions] == [1]


def test_the_sale_of_a_roll_is_judged_without_the_call_that_it_takes_the_place_of():
    _, cycle = held_then(rolling()._replace(vetoes_of=at_most(1)))
    assert [one.status for one in cycle.executions] == [FILLED, FILLED] and len(cycle.portfolio.positions) == 1


def test_where_a_roll_is_vetoed_so_is_its_sale():
    stopped = Veto("kill_switch", None, None, "off")
    steps = rolling()._replace(vetoes_of=lambda intention, *rest: [stopped] if intention.action == ROLL else [])
    _, cycle = held_then(steps)
    assert [one.vetoes for one in cycle.plan.exits] == [(stopped,), (stopped,)] and cycle.executions == ()


def test_without_the_close_there_is_no_sale():
    name = name_of_the_sold()
    _, cycle = held_then(rolling(), {name: Quote(name, 90.0, None, 95.0, 1.0)})
    assert [one.status for one in cycle.executions] == [UNFILLED, NOT_SENT]
    assert [one.instrument for one in cycle.portfolio.positions] == [name]


def test_what_is_not_held_is_not_bought_back():
    _, cycle = held_then(exits_by(Intention(CLOSE, "an id", "BTC-1JAN30-1-C", 0.1)))
    assert cycle.executions == (Execution(NOT_SENT, "BTC-1JAN30-1-C is not held"),)


# ---------------------------------------------------------------------------------------------------------------------
# The log


def test_a_line_tells_all_that_was_known_and_meant(tmp_path):
    states = quoted_states(3)
    with opened(tmp_path / "log") as journal:
        list(Agent([Rule()], ONE, Paper(), BEGUN, journal, {"mode": "paper", "config_hash": "abc"}).run(states))
    passed, sold, completion, vetoed = read(tmp_path / "log")
    assert passed["intention"]["action"] == NO_TRADE and passed["orders"] == 0 and passed["mode"] == "paper"
    assert sold["intention"]["action"] == SELL_CALL and sold["fusion"]["method"] == "rule"
    assert sold["state"]["decision"] == json.loads(json.dumps(states[1].decision.to_dict()))
    offered = {one.instrument for one in states[1].decision.candidates}
    assert {one["instrument"] for one in sold["state"]["quotes"]} == offered
    assert sold["sizing"]["units"] == 0.1 and sold["proposals"][0]["confidence"] > 0.5
    assert completion["completes"] == sold["decision_id"] and completion["execution"]["status"] == FILLED
    assert [one["code"] for one in vetoed["vetoes"]] == ["max_positions"] and vetoed["orders"] == 0
    assert vetoed["portfolio"]["positions"] and {"state", "plan", "rule"} <= vetoed["latencies"].keys()


def test_the_order_is_in_the_log_before_it_is_sent(tmp_path):
    class Looks(Paper):
        def sell(self, intention, state, rolls):
            *_, last = read(tmp_path / "log")
            assert last["intention"]["instrument"] == intention.instrument
            self.looked = True
            return super().sell(intention, state, rolls)

    venue = Looks()
    with opened(tmp_path / "log") as journal:
        list(Agent([Rule()], FREELY, venue, BEGUN, journal).run(quoted_states(2)))
    assert venue.looked


def test_shadow_decides_and_logs_and_orders_nothing(tmp_path):
    with opened(tmp_path / "log") as journal:
        cycles = list(Agent([Rule()], FREELY, None, BEGUN, journal).run(quoted_states(6)))
        assert not journal.pending
    lines = list(read(tmp_path / "log"))
    assert len(lines) == 6 and all(line["orders"] == 0 for line in lines)
    assert Counter(line["intention"]["action"] for line in lines) == {SELL_CALL: 4, NO_TRADE: 2}
    assert all(not cycle.portfolio.positions and not cycle.executions for cycle in cycles)


def test_of_a_log_of_another_portfolio_or_mode_nothing_is_touched_not_even_its_orders_under_way(tmp_path):
    class Killed(Paper):
        def sell(self, intention, state, rolls):
            raise KeyboardInterrupt

    def agent(journal, begins=BEGUN, mode="paper", venue=None):
        return Agent([Rule()], FREELY, venue or Paper(), begins, journal, {"mode": mode})

    with opened(tmp_path / "log") as journal, pytest.raises(KeyboardInterrupt):
        list(agent(journal, venue=Killed()).run(quoted_states(2)))
    (path,) = (tmp_path / "log").glob("*.jsonl")
    before = path.read_bytes()
    with opened(tmp_path / "log") as journal, pytest.raises(CandidatesError, match="its log began with"):
        agent(journal, Begun(START, {"BTC": 2.0}, 0.0))
    with (
        opened(tmp_path / "log") as journal,
        pytest.raises(CandidatesError, match="log of paper, and this is testnet"),
    ):
        agent(journal, mode="testnet")
    assert path.read_bytes() == before
    with opened(tmp_path / "log") as journal:
        agent(journal)
        assert not journal.pending and path.read_bytes() != before


# ---------------------------------------------------------------------------------------------------------------------
# Replays


def replayed(logged, steps: Steps, options, sources=None):
    venue = Recorded(options)
    agent = Agent(sources or [Rule()], steps, venue, Begun(logged[0].decision.decision_time, {"BTC": 1.0}, 0.0))
    cycles = list(agent.run(venue.states(logged)))
    return cycles, agent.portfolio, venue


def total_of(cycles, portfolio, venue) -> float:
    """USD: of what was settled, and of what the end of the files left open."""
    ended = venue.rest(portfolio)
    assert len(ended) == len(portfolio.positions)
    return sum(trade.pnl_usd for trade in portfolio.trades) + sum(one.pnl_usd for one in ended)


def sales_of(cycles) -> dict:
    return {
        cycle.state.decision.decision_id: cycle.plan.entry.intention.instrument
        for cycle in cycles
        if any(one.status == FILLED for one in cycle.executions)
    }


def assert_no_overlap(cycles) -> None:
    for cycle in cycles:
        assert len(cycle.portfolio.positions) <= 1


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A teacher that sells the first call on every other day, of which the last week has no outcome."""
    path = write_csv(tmp_path_factory.mktemp("walk") / "walk.csv", walk(60, "hold_to_expiry"))
    return read_candidates([path], CoveredCallCandidatesConfig())


def test_a_replay_sells_what_the_teacher_sold_and_earns_what_was_recorded(logged):
    cycles, portfolio, venue = replayed(logged, REPLAY, CoveredCallCandidatesConfig())
    chosen = {
        one.decision.decision_id: one.decision.candidates[one.chosen].instrument
        for one in logged
        if one.chosen is not None and one.outcomes[one.chosen].pnl_vs_hodl is not None
    }
    recorded = sum(one.outcomes[one.chosen].pnl_vs_hodl or 0.0 for one in logged if one.chosen is not None)
    assert sales_of(cycles) == chosen and len(chosen) == 27
    assert venue.unknown == 3  # sales of the last week: not made, and counted
    assert total_of(cycles, portfolio, venue) == pytest.approx(recorded, abs=0.01)


def test_one_position_at_most_never_overlaps(logged):
    cycles, *_ = replayed(logged, REPLAY._replace(vetoes_of=at_most(1)), CoveredCallCandidatesConfig())
    assert_no_overlap(cycles)
    sales = sales_of(cycles)
    times = [one.decision.decision_time for one in logged if one.decision.decision_id in sales]
    assert len(times) > 5 and min(later - time for time, later in zip(times, times[1:], strict=False)) >= 7 * DAY


def test_equity_moves_by_what_the_sales_brought(logged):
    cycles, portfolio, _ = replayed(logged, REPLAY, CoveredCallCandidatesConfig())
    assert all(cycle.portfolio.equity_usd is not None for cycle in cycles)
    flat = [cycle for cycle in cycles if not cycle.portfolio.positions]
    assert flat
    for cycle in flat:
        earned = sum(trade.pnl_usd for trade in cycle.portfolio.trades)
        assert cycle.portfolio.equity_usd == pytest.approx(cycle.state.decision.spot + earned, abs=1e-6)


def test_units_scale_what_a_sale_brings(logged):
    whole = total_of(*replayed(logged, REPLAY, CoveredCallCandidatesConfig()))
    tenth = total_of(*replayed(logged, FREELY, CoveredCallCandidatesConfig()))
    assert tenth == pytest.approx(whole / 10)


def test_costs_of_the_options_are_paid(tmp_path):
    path = write_csv(tmp_path / "walk.csv", walk(60, "hold_to_expiry"))
    free, costly = CoveredCallCandidatesConfig(), CoveredCallCandidatesConfig(fee=0.0003, half_spread=0.035)
    total = total_of(*replayed(read_candidates([path], free), REPLAY, free))
    entries = read_candidates([path], costly)
    sold = [one.counterfactuals[one.chosen] for one in entries if one.chosen is not None]
    paid = sum(one.costs or 0.0 for one in sold if one.pnl_vs_hodl is not None)
    assert paid > 0 and total_of(*replayed(entries, REPLAY, costly)) == pytest.approx(total - paid)


def test_a_chain_is_one_position_until_it_ends(tmp_path):
    rows = [row for day in range(12) for row in decision(day, 0, spot=58_000 + 10 * day, score=3.5)]
    for row in rows:
        row["instrument"] = f"{row['instrument']}-{row['decision_time'][8:10]}"
    options = CoveredCallCandidatesConfig(settlement="teacher")
    entries = read_candidates([write_csv(tmp_path / "rolls.csv", rows)], options)
    cycles, *_ = replayed(entries, REPLAY._replace(vetoes_of=at_most(1)), options)
    assert_no_overlap(cycles)
    ends = {one.decision.decision_id: one for one in entries}
    for cycle in cycles:
        for position in cycle.portfolio.positions:
            entry = next(one for one in ends.values() if one.decision.decision_time == position.entry_time)
            place = [one.instrument for one in entry.decision.candidates].index(position.instrument)
            assert entry.counterfactuals[place].label_end > cycle.state.decision.decision_time


def test_a_replay_is_made_anew(logged, tmp_path):
    options = CoveredCallCandidatesConfig()
    for again in (False, True):
        with opened(tmp_path / "log", durable=False) as journal:
            venue = Recorded(options)
            begins = Begun(logged[0].decision.decision_time, {"BTC": 1.0}, 0.0)
            if again:
                with pytest.raises(CandidatesError, match="made anew"):
                    Agent([Rule()], REPLAY, venue, begins, journal)
            else:
                list(Agent([Rule()], REPLAY, venue, begins, journal).run(venue.states(logged[:5])))


@needs_real_data
def test_the_replay_of_a_real_backtest_is_the_backtest():
    options = CoveredCallCandidatesConfig()
    entries = read_candidates([str(path) for path in HOLD_FILES], options)
    cycles, portfolio, venue = replayed(entries, REPLAY, options)
    chosen = {one.decision.decision_id: one.decision.candidates[one.chosen].instrument for one in entries}
    assert len(chosen) == 123 and sales_of(cycles) == chosen and venue.unknown == 0
    recorded = sum(one.outcomes[one.chosen].pnl_vs_hodl for one in entries)
    assert total_of(cycles, portfolio, venue) == pytest.approx(recorded, abs=0.01)
    cycles, *_ = replayed(entries, REPLAY._replace(vetoes_of=at_most(1)), options)
    assert_no_overlap(cycles)
    assert len(sales_of(cycles)) == 18  # one a week


# ---------------------------------------------------------------------------------------------------------------------
# Snapshots


def test_a_snapshot_is_a_state_with_the_quotes_of_all_its_calls(tmp_path):
    path = write_harvest(tmp_path / "BTC_2025-12-10_0105.parquet", chain())
    (state,) = states_from(read_snapshots(path), PRESETS["backtest"])
    assert len(state.decision.candidates) == 3 and len(state.quotes) == 6
    quote = state.quotes[state.decision.candidates[0].instrument]
    assert 0 < quote.bid < quote.mark < quote.ask < state.decision.spot and quote.open_interest == 100.0
    assert state.snapshot_time == state.decision.decision_time
    assert {name for name, value in state.context.items() if value is not None} == {"atm_iv"}


def test_the_vol_at_the_money_is_of_the_call_nearest_to_its_forward_at_the_expiry_nearest_to_a_week(tmp_path):
    rows = [quote(f"BTC-19DEC25-{strike}-C", iv=iv) for strike, iv in ((88_000, 50.0), (93_000, 45.0), (98_000, 40.0))]
    path = write_harvest(tmp_path / "a.parquet", [*rows, quote("BTC-27MAR26-93000-C", iv=90.0)])
    (state,) = states_from(read_snapshots(path), PRESETS["backtest"])
    assert state.context["atm_iv"] == 0.45


def test_paper_sells_a_snapshots_call_at_its_bid(tmp_path):
    path = write_harvest(tmp_path / "BTC_2025-12-10_0105.parquet", chain())
    (state,) = states_from(read_snapshots(path), PRESETS["backtest"])
    (cycle,) = Agent([Rule(-100.0)], ONE._replace(size=fixed(1.0)), Paper(), BEGUN).run([state])
    (position,) = cycle.portfolio.positions
    assert position.entry_price == state.quotes[position.instrument].bid and position.units == -1.0
    assert hold(state, cycle.portfolio, START) == ()


@needs_real_data
def test_fourteen_real_snapshots_in_shadow_are_fourteen_lines(tmp_path):
    paths = sorted((REAL_DATA / "deribit_chains").glob("*.parquet"))
    snapshots = [one for path in paths for one in read_snapshots(str(path)) if "_" not in one.underlying]
    snapshots.sort(key=lambda one: one.time)
    with opened(tmp_path / "log") as journal:
        list(Agent([Rule()], FREELY, None, BEGUN, journal).run(states_from(snapshots, PRESETS["backtest"])))
    assert len(list(read(tmp_path / "log"))) == 14
