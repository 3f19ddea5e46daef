"""The market's context of a decision: what its numbers are called, and the lines in which prompts say them."""

import string
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covered_call.candidates.columns import CONTEXT_WORDS, number_of_word, word_of
from covered_call.candidates.number_texts import UNKNOWN, each_distinct, exact, ratio
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.schema import Context

# Of prices alone. Returns and distances are fractions of the price then, or of spot; vols are fractions a year.
OF_PRICES = (
    "ret_1d", "ret_7d", "ret_30d", "rv_7d", "rv_30d", "dist_ma50", "regime", "trend_5d", "drawdown_90d",
    "range_pos_30d", "rsi_14", "support", "resistance",
)  # fmt: skip
OF_CHAIN = ("iv_rank_180", "iv_skew", "iv_term")  # of the candidates' own vols
SPOT = (*OF_PRICES, *OF_CHAIN)  # what the level spot has
MARKET = ("dvol", "dvol_rank_180", "dvol_rv")  # beside it, of a file of the market's vols
CANDLES = 10
CANDLE_RETURNS = tuple(f"candle_ret_{place}" for place in range(1, CANDLES + 1))  # the last bar first
CANDLE_VOLUMES = tuple(f"candle_volume_{place}" for place in range(1, CANDLES + 1))
PATTERNS = ("accumulation", "distribution", "testing", "buying_climax", "selling_climax")
OF_BARS = (  # what the level ohlcv has beside it
    "volume_ratio", "volume_class", "spread_ratio", "spread_class", "wick", "effort", *PATTERNS, "vwap_distance",
    "adx_14", "longer_ret", "longer_volume", "longer_trend", *CANDLE_RETURNS, *CANDLE_VOLUMES,
)  # fmt: skip
PERCENT = (
    "ret_1d", "ret_7d", "ret_30d", "dist_ma50", "drawdown_90d", "support", "resistance", "vwap_distance", "longer_ret",
    *CANDLE_RETURNS,
)  # fmt: skip
Texts = pa.StringArray | str  # many, or one for all
HEADING = "Market context (known at decision time):\n"
LINES = (
    "  - Returns: 1d {ret_1d}, 7d {ret_7d}, 30d {ret_30d}\n",
    "  - Realised vol: 7d {rv_7d}, 30d {rv_30d}\n",
    "  - Trend: {regime}, 5d {trend_5d}, from 50-day mean {dist_ma50}\n",
    "  - Range: 90d drawdown {drawdown_90d}, 30d position {range_pos_30d}, RSI 14 {rsi_14}\n",
    "  - Levels from spot: support {support}, resistance {resistance}\n",
    "  - Market's IV: {dvol}, rank of 180 {dvol_rank_180}, over realised {dvol_rv}\n",
    "  - Volume: {volume_ratio} of 50-bar mean, {volume_class}; bar's range {spread_ratio} of 20-bar mean, "
    "{spread_class}; wick {wick}; move and volume: {effort}\n",
    "  - Patterns (strength): accumulation {accumulation}, distribution {distribution}, testing {testing}, buying "
    "climax {buying_climax}, selling climax {selling_climax}\n",
    "  - From 20-bar VWAP {vwap_distance}, ADX 14 {adx_14}\n",
    "  - Longer frame: {longer_ret}, {longer_trend}, volume {longer_volume} of 50-bar mean\n",
    "  - Last bars, the newest first (move, volume): "
    + ", ".join(f"{{{move}}} {{{volume}}}" for move, volume in zip(CANDLE_RETURNS, CANDLE_VOLUMES, strict=True))
    + "\n",
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
    bars = OF_BARS if options.context == "ohlcv" else ()
    return [*SPOT, *(MARKET if options.context_vols else ()), *bars, *options.context_columns]


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
    return ratio(value) if name in SAID and name not in PATTERNS else own(value)


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
