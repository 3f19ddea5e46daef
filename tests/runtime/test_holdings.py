"""Whatever the market, the policies and the venue do: no more coins are ever sold against than are held."""

import datetime

import pytest
from conftest import on_the_default_stack
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from covered_call.candidates.schema import Candidate, Decision
from covered_call.runtime.agent import steps_of
from covered_call.runtime.agent_config import AgentConfig
from covered_call.runtime.configured import Policies
from covered_call.runtime.engine import Agent
from covered_call.runtime.experience import Experience
from covered_call.runtime.fusion import Fused
from covered_call.runtime.paper import FILLED, UNFILLED, Begun, Execution, Paper
from covered_call.runtime.sizing import Sizing
from covered_call.runtime.state import SELL_CALL, MarketState, Proposal, Quote
from runtime.markets import START, call, expiry_after

pytestmark = [on_the_default_stack, pytest.mark.no_cover]

STRIKES = (90_000.0, 100_000.0, 110_000.0)
# All that limits a sale but the coins is left out.
FREE = ["no_equity", "max_positions", "expiry_exposure", "margin", "net_delta", "dd_buffer", "consecutive_losses",
    "win_rate", "spread", "open_interest", "no_bid", "min_ivrv", "stale"]  # fmt: skip


class Unsure(Paper):
    """Fills as it is told to."""

    fills = buys = True

    def sell(self, intention, state, rolls):
        return super().sell(intention, state, rolls) if self.fills else (Execution(UNFILLED, "not now"), [])

    def buy_back(self, intention, position, state):
        return super().buy_back(intention, position, state) if self.buys else (Execution(UNFILLED, "not now"), [])


class Coins(RuleBasedStateMachine):
    """An agent over two coins, whose policies and sizes are drawn: sizes that ask for more than there is, too."""

    @initialize(btc=st.sampled_from([0.0, 0.1, 0.3, 1.0]), eth=st.sampled_from([0.0, 1.0, 7.0]),
        style=st.sampled_from(["hold", "tp_and_roll", "others_live"]))  # fmt: skip
    def begin(self, btc, eth, style):
        self.time, self.held, self.venue = START, {"BTC": btc, "ETH": eth}, Unsure()
        config = AgentConfig(holdings=self.held, exit=style, risk={"without": FREE}, sizing={"max_risk_pct": None})
        self.wanted, self.units = None, 0.0
        steps = steps_of(config, "paper", "nowhere", Policies([], {}, {}, {}, {}, {}), Experience)
        self.agent = Agent(
            [], steps._replace(fuse=self.fuse, size=self.size), self.venue, Begun(START, self.held, 0.0)
        )

    def fuse(self, proposals, state, portfolio):
        return Fused(Proposal("drawn", self.wanted, 1.0), "drawn")

    def size(self, proposal, state, portfolio):
        return Sizing(self.units)

    @rule(coin=st.sampled_from(["BTC", "ETH"]), hours=st.sampled_from([1, 12, 24, 80]), pick=st.integers(-1, 2),
        units=st.sampled_from([0.1, 0.3, 1.0, 1.0 + 1e-8, 5.0]), spot=st.sampled_from([85e3, 95e3, 105e3]),
        price=st.sampled_from([20.0, 900.0, 3_000.0]), fills=st.booleans(), buys=st.booleans())  # fmt: skip
    def decide(self, coin, hours, pick, units, spot, price, fills, buys):
        self.time += datetime.timedelta(hours=hours)
        state = self.state(coin, spot, price)
        self.wanted = state.decision.candidates[pick].instrument if pick >= 0 else None
        self.units, self.venue.fills, self.venue.buys = units, fills, buys
        cycle = self.agent.cycle(state)
        entry = cycle.plan.entry
        if entry.intention.action == SELL_CALL and not entry.vetoes and fills:
            assert cycle.executions[-1].status == FILLED

    def state(self, coin, spot, price):
        names = [call(expiry_after(self.time, 7), strike).replace("BTC", coin) for strike in STRIKES]
        candidates = [Candidate(*one, 7.0, 0.25, 3.5, 0.6, 1.2) for one in zip(names, STRIKES, strict=True)]
        held = [one.instrument for one in self.agent.portfolio.positions]
        quotes = {name: Quote(name, price, price * 1.02, price * 1.01, 100.0) for name in [*names, *held]}
        decision = Decision(self.time, coin, "hold_to_expiry", spot, tuple(candidates))
        return MarketState(decision, quotes, {}, self.time)

    @invariant()
    def covered(self):
        for coin, units in getattr(self, "held", {}).items():
            short = self.agent.portfolio.short_units(coin)
            assert -1e-9 <= short <= units + 1e-7, (coin, short, units)


Coins.TestCase.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
test_no_order_exceeds_what_is_held = pytest.mark.no_cover(Coins.TestCase)
