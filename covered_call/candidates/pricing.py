"""What a call is worth, and what it costs to trade one."""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from covered_call.candidates.options import CoveredCallCandidatesConfig

DAYS_PER_YEAR = 365


class Calls(NamedTuple):
    """Calls (C,): strike in USD, dte in days, iv as a fraction a year, NaN where it is unknown."""

    strike: np.ndarray
    dte: np.ndarray
    iv: np.ndarray


class Sales(NamedTuple):
    """Calls (C,), and where and when each is sold."""

    underlying: np.ndarray  # int, its place in the names
    time: np.ndarray  # int64, microseconds since 1970
    spot: np.ndarray  # USD
    strike: np.ndarray
    dte: np.ndarray
    iv: np.ndarray


def pick(arrays, rows):
    """The named tuple of arrays with these of their rows alone."""
    return type(arrays)(*(values[rows] for values in arrays))


def black_scholes_call(spot, strike, years, iv):
    """Value of a European call in USD at interest rate 0 (Black and Scholes 1973); iv as a fraction a year.

    Takes numbers or arrays. Without time or vol it is the intrinsic value.
    """
    deviation = np.maximum(iv * np.sqrt(years), 1e-12)
    d1 = (np.log(spot) - np.log(strike)) / deviation + deviation / 2
    return spot * ndtr(d1) - strike * ndtr(d1 - deviation)


def premium_of(sales: Sales) -> np.ndarray:
    return black_scholes_call(sales.spot, sales.strike, sales.dte / DAYS_PER_YEAR, sales.iv)


def trading_cost(price, spot, options: CoveredCallCandidatesConfig):
    """USD that selling or buying back one call at ``price`` costs: fee, half the spread, and slippage.

    Deribit's fee is 0.0003 of the underlying, at most 12.5 % of the option's price. Takes numbers or arrays.
    """
    fee = np.minimum(options.fee * spot, options.fee_cap * price)
    return fee + options.half_spread * price + options.slippage * spot


def delivery_cost(value, spot, options: CoveredCallCandidatesConfig):
    """USD that the settlement of one call of this value costs: nothing where it is worth nothing."""
    return np.minimum(options.delivery_fee * spot, options.fee_cap * value)
