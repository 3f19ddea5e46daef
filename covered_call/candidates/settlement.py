"""By which rule an outcome is settled: the rules of teachers that are known, and what an option changes of them."""

import math
from typing import NamedTuple

from covered_call.candidates.options import CoveredCallCandidatesConfig


class Rule(NamedTuple):
    """When a call is bought back, what is sold next, and what a call is worth when it is taken for settled."""

    settle_hours: float  # of time value left in an outcome: its clock is so much behind; 0: settled at expiry
    take_profit: float  # buy back once this share of the premium is earned ...
    defend: float  # ... or once spot / strike is as high as this,
    min_dte_to_roll: float  # ... while more days than these are left
    max_rolls: float  # calls that are sold next, in one chain
    roll_min_score: float | None  # sold next is the best score from here, of another instrument; None: by roll_delta
    own_expiry: bool  # whether a call that is sold next lives to its own expiry, or to the first one's


ROLL_MIN_SCORE = 3.0
TEACHER = Rule(
    settle_hours=16.0,
    take_profit=0.80,
    defend=0.98,
    min_dte_to_roll=2.0,
    max_rolls=3,
    roll_min_score=ROLL_MIN_SCORE,
    own_expiry=True,
)
PRESETS = {  # of the option settlement, the simpler first
    # That of data/simulate_backtest.py.
    "simulated": Rule(0.0, 0.70, math.inf, 0.0, math.inf, None, own_expiry=False),
    # What a holder of the real contracts gets.
    "intrinsic": TEACHER._replace(settle_hours=0.0),
    # Its daily candles begin at 08:00 UTC: the last one within an option's life begins 16 hours before its end.
    "teacher": TEACHER,
}
CONSTANTS = Rule._fields[:-1]


def rule_of(preset: str, options: CoveredCallCandidatesConfig) -> Rule:
    """The preset, with the constants that the options name in place of its own."""
    given = {name: getattr(options, name) for name in CONSTANTS}
    return PRESETS[preset]._replace(**{name: value for name, value in given.items() if value is not None})
