"""The market's context of a decision: what its numbers are called, and the lines in which prompts say them."""

import math
import string
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covered_call.candidates.columns import CONTEXT_WORDS, OPINION, number_of_word, time_of, word_of
from covered_call.candidates.number_texts import UNKNOWN, each_distinct, exact, ratio
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import ATM_IV, Context

# Of prices alone. Returns and distances are fractions of the price then, or of spot; vols are fractions a year.
OF_PRICES = (
    "ret_1d", "ret_7d", "ret_30d", "rv_7d", "rv_30d", "dist_ma50", "regime", "trend_5d", "drawdown_90d",
    "range_pos_30d", "rsi_14", "support", "resistance",
)  # fmt: skip
OF_CHAIN = ("iv_rank_180", "iv_skew", "iv_term")  # of the candidates' own vols
SPOT = (*OF_PRICES, *OF_CHAIN)  # what the level spot has
ATM_RANK = "atm_iv_rank_180"  # where the files' own vol at the money is told
MARKET = ("dvol", "dvol_rank_180", "dvol_rv")  # beside it, of a file of the market's vols
CANDLES = 10
CANDLE_RETURNS = tuple(f"candle_ret_{place}" for place in range(1, CANDLES + 1))  # the last bar first
CANDLE_VOLUMES = tuple(f"candle_volume_{place}" for place in range(1, CANDLES + 1))
PATTERNS = ("accumulation", "distribution", "testing", "buying_climax", "selling_climax")
OF_BARS = (  # what the level ohlcv has beside it
    "volume_ratio", "volume_class", "spread_ratio", "spread_class", "wick", "effort", *PATTERNS, "vwap_distance",
    "adx_14", "longer_ret", "longer_volume", "longer_trend", *CANDLE_RETURNS, *CANDLE_VOLUMES,
)  # fmt: skip
NEIGHBOURS = 20  # decisions whose outcomes the option analogues tells of
ANALOGUES = ("analogues_positive", "analogues_mean")  # how many of them were positive, and their mean over spot
PERCENT = (
    "ret_1d", "ret_7d", "ret_30d", "dist_ma50", "drawdown_90d", "support", "resistance", "vwap_distance", "longer_ret",
    *CANDLE_RETURNS, "analogues_mean",
)  # fmt: skip
OPINION_TOLD = "opinion"  # among the names of what a policy is told, that it is told the opinion, too
Texts = pa.StringArray | str  # many, or one for all
HEADING = "Market context (known at decision time):\n"
LINES = (
    "  - Returns: 1d {ret_1d}, 7d {ret_7d}, 30d {ret_30d}\n",
    "  - Realised vol: 7d {rv_7d}, 30d {rv_30d}\n",
    "  - Trend: {regime}, 5d {trend_5d}, from 50-day mean {dist_ma50}\n",
    "  - Range: 90d drawdown {drawdown_90d}, 30d position {range_pos_30d}, RSI 14 {rsi_14}\n",
    "  - Levels from spot: support {support}, resistance {resistance}\n",
    "  - Market's IV: {dvol}, rank of 180 {dvol_rank_180}, over realised {dvol_rv}\n",
    "  - ATM IV rank of 180: {atm_iv_rank_180}\n",
    "  - Volume: {volume_ratio} of 50-bar mean, {volume_class}; bar's range {spread_ratio} of 20-bar mean, "
    "{spread_class}; wick {wick}; move and volume: {effort}\n",
    "  - Patterns (strength): accumulation {accumulation}, distribution {distribution}, testing {testing}, buying "
    "climax {buying_climax}, selling climax {selling_climax}\n",
    "  - From 20-bar VWAP {vwap_distance}, ADX 14 {adx_14}\n",
    "  - Longer frame: {longer_ret}, {longer_trend}, volume {longer_volume} of 50-bar mean\n",
    "  - Last bars, the newest first (move, volume): "
    + ", ".join(f"{{{move}}} {{{volume}}}" for move, volume in zip(CANDLE_RETURNS, CANDLE_VOLUMES, strict=True))
    + "\n",
    "  - Similar settled decisions: {analogues_positive}, mean {analogues_mean} of spot\n",
)
# Of files whose vols are all alike these say nothing, so that they are left out where they are unknown.
WHERE_KNOWN = (
    "  - IV rank of 180: {iv_rank_180}\n",
    "  - IV skew: {iv_skew}\n",
    "  - IV term slope: {iv_term}\n",
)
OWN = "  - {name}: {value}\n"  # of the user's own columns


def context_names(options: CoveredCallCandidatesConfig) -> list[str]:
    """Of what a decision's context is made, in this order: the user's own columns last."""
    if options.context == "none":
        return []
    bars, alike = OF_BARS if options.context == "ohlcv" else (), ANALOGUES if options.analogues else ()
    chain = [ATM_RANK] if ATM_IV in options.context_columns else []
    return [*SPOT, *(MARKET if options.context_vols else ()), *chain, *bars, *alike, *options.context_columns]


def told_names(options: CoveredCallCandidatesConfig) -> list[str]:
    """Of all that prompts tell beside the state: the context's names, and OPINION_TOLD."""
    return [*context_names(options), *([OPINION_TOLD] if options.opinions else [])]


def names_in(line: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(line) if name]


SAID = frozenset(name for line in (*LINES, *WHERE_KNOWN) for name in names_in(line))


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:+.2f}%"


def own(value: float | None) -> str:
    return UNKNOWN if value is None else exact(value)


def text_of(name: str, value: float | None) -> str:
    """A number of a context as prompts say it."""
    if name in CONTEXT_WORDS:
        return word_of(name, value) or UNKNOWN
    if name in PERCENT:
        return percent(value)
    if name == "analogues_positive":
        return positives(value)
    return ratio(value) if name in SAID and name not in PATTERNS else own(value)


def positives(count: float | None) -> str:
    """How many of NEIGHBOURS were positive, the share, and its interval."""
    if count is None:
        return UNKNOWN
    low, high = wilson(count, NEIGHBOURS)
    return f"{NEIGHBOURS}, {count:.0f} positive ({count / NEIGHBOURS:.2f} [{low:.2f}, {high:.2f}])"


def wilson(count: float, of: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n)."""
    share, more = count / of, z * z / of
    reach = z * math.sqrt(share * (1 - share) / of + more / (4 * of))
    low, high = ((share + more / 2 + side * reach) / (1 + more) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def context_block(context: Context | None) -> str:
    """What a prompt says of one decision's context; nothing where it has none."""
    if context is None:
        return ""
    numbers = {name: number_of_word(name, value) for name, value in context.items()}
    texts = {name: text_of(name, value) for name, value in numbers.items()}
    lines = [line.format(**texts) for line in LINES if set(names_in(line)) <= texts.keys()]
    for line in WHERE_KNOWN:
        (name,) = names_in(line)
        lines += [line.format(**texts)] if numbers.get(name) is not None else []
    lines += [OWN.format(name=name, value=text) for name, text in texts.items() if name not in SAID]
    return HEADING + "".join(lines)


def context_blocks(context: Mapping[str, np.ndarray]) -> pa.StringArray | str:
    """(D,) the same of many, whose contexts have the same names."""
    if not context:
        return ""
    texts = {
        name: each_distinct(values, lambda value, name=name: text_of(name, value)) for name, values in context.items()
    }
    lines = [filled(line, texts) for line in LINES if set(names_in(line)) <= texts.keys()]
    for line in WHERE_KNOWN:
        (name,) = names_in(line)
        if name in texts:
            lines.append(pc.if_else(pa.array(np.isnan(context[name])), "", filled(line, texts)))
    lines += [
        pc.binary_join_element_wise(f"  - {name}: ", text, "\n", "")
        for name, text in texts.items()
        if name not in SAID
    ]
    return pc.binary_join_element_wise(HEADING, *lines, "")


OPINION_MODEL = "expected net outcome in % of spot, and P(positive)"
OPINION_LINE = "  - Outcome model: {opinion}\n"  # of one candidate
OPINION_HEAD = "Outcome model: {opinion}\n"  # of all that a ranking shows
OPINION_SHORT = ", Outcome model: {opinion}"  # in the line of one of them


def opinion_text(expected: float | None, positive: float | None, day: str | None = None) -> str:
    """What is said of a candidate; with the day before which decisions were learnt from, where that is not said of
    all."""
    if expected is None or positive is None:
        return UNKNOWN
    if day is None:
        return f"{expected:+.2f}%, P(positive) {positive:.2f}"
    return f"{expected:+.2f}% of spot expected, P(positive) {positive:.2f} ({fitted_text(day)})"


def opinion_head(day: str | None) -> str:
    return UNKNOWN if day is None else f"{OPINION_MODEL} ({fitted_text(day)})"


def fitted_text(day: str) -> str:
    return f"fitted on decisions before {day}"


def opinion_texts(numbers: Mapping[str, np.ndarray], days: bool) -> pa.StringArray:
    """(R,) what opinion_text says of each, with the day or without."""
    expected, positive, before = (numbers[name] for name in OPINION)
    unknown = pa.array(np.isnan(expected) | np.isnan(positive) | np.isnan(before))
    pieces: list[Texts] = [each_distinct(np.nan_to_num(expected), "{:+.2f}%".format)]
    pieces += [" of spot expected"] * days + [", P(positive) "]
    pieces += [each_distinct(np.nan_to_num(positive), "{:.2f}".format)]
    pieces += [" (", each_distinct(np.nan_to_num(before), lambda time: fitted_text(day_of(time))), ")"] if days else []
    return pc.if_else(unknown, UNKNOWN, pc.binary_join_element_wise(*pieces, ""))


def opinion_heads(before: np.ndarray) -> pa.StringArray:
    """(D,) what opinion_head says of each, of microseconds since 1970; NaN where there is none."""
    return each_distinct(before, lambda time: opinion_head(None if time is None else day_of(time)))


def day_of(time: float) -> str:
    return time_of(int(time)).date().isoformat()


def filled(template: str, fields: Mapping[str, Texts]) -> pa.StringArray:
    """(K,) the template's texts.

    Args:
        fields: K texts each, or one for all.
    """
    pieces = [
        piece
        for literal, name, _, _ in string.Formatter().parse(template)
        for piece in ([literal] if name is None else [literal, fields[name]])
    ]
    return pc.binary_join_element_wise(*pieces, "")
