"""The options of a load: one dataclass, from which command lines, recipes, manifests and cache keys are derived.

To add one, add a field: nothing else lists them.
"""

import dataclasses
import datetime
import math
from dataclasses import dataclass

import datasets
import numpy as np

from covered_call.candidates.schema import (
    COLUMNS,
    MAX_DTE,
    MAX_IV,
    QUOTED_COLUMNS,
    CandidatesError,
    is_number,
    iso_time,
    shown,
    utc,
    wrong_name,
)

FIT = "fit"  # of pricing_iv: what the recorded trades were paid at
CHATS = ("per_candidate", "per_decision_ranking")  # the configs whose records are chats with the teacher's answer
# Options whose value says where something lies on this machine: no word of that is shared.
PATHS = ("iv_file", "context_vols", "ohlcv_files", "opinions")
AS_SETTLED = "as settlement has it"
MOST_HORIZONS = 20  # of the option horizons: each takes about as long as q_sell
# Of what an option is: the headings under which --help shows them.
DATA, CONTEXT, ANSWERS, PROMPTS, SPLITS = "data", "market context", "answers", "prompts", "splits"
OUTCOMES, PAIRS = "outcomes and costs", "pairs"


def option(default, group: str, placeholder: str, text: str, *, otherwise="", choices=(), most=None, least=0.0):
    """A field for an option.

    Args:
        placeholder: what stands for its value in --help, with its unit.
        text: what it does.
        otherwise: what happens without it, where the default alone would not say.
        choices: what may be chosen from.
        most, least: the largest and the least value of one that is a number.
    """
    said = {"group": group, "placeholder": placeholder, "text": text, "otherwise": otherwise}
    return dataclasses.field(default=default, metadata=said | {"choices": choices, "most": most, "least": least})


@dataclass
class CoveredCallCandidatesConfig(datasets.BuilderConfig):
    """Options of all configs; the text of each field says what it does."""

    underlying: str | None = option(None, DATA, "NAME", "keep these decisions only, such as BTC", otherwise="all")
    exit_style: str | None = option(
        None, DATA, "STYLE", "keep these decisions only, such as hold_to_expiry", otherwise="all"
    )
    candidate_order: str = option(
        "instrument",
        DATA,
        "ORDER",
        "of a decision's candidates: instrument (by name and strike), csv (which gives the answer away where files "
        "are sorted by score), or shuffle (fixed by seed and decision)",
        choices=("instrument", "csv", "shuffle"),
    )
    duplicates: str = option(
        "error",
        DATA,
        "RULE",
        "the same decision in two files: error, or latest, which keeps the file of the later stamp in its name",
        choices=("error", "latest"),
    )
    on_bad_rows: str = option(
        "error",
        DATA,
        "RULE",
        "error, or skip, which leaves out the whole decision and counts it",
        choices=("error", "skip"),
    )
    max_iv: float = option(
        MAX_IV,
        DATA,
        "VOL",
        "an implied vol above this (1 is 100 % a year) is taken for a percentage, and is an error",
        most=math.inf,
    )
    context: str = option(
        "none",
        CONTEXT,
        "LEVEL",
        "what prompts and features tell of the market beside the candidates: none, or spot, which is returns, "
        "realised vols, trend, range and levels of the files' own spots up to the decision, and the shape of its "
        "vols; or ohlcv, which is that and volume, patterns, VWAP, ADX and the last bars of ohlcv_files",
        choices=("none", "spot", "ohlcv"),
    )
    context_columns: list[str] | tuple[str, ...] = option(
        (),
        CONTEXT,
        "COLUMN",
        "numeric columns of the files to be told as they are; that they were known at the decision is for you to "
        "vouch for",
        otherwise="none",
    )
    context_vols: str | None = option(
        None,
        CONTEXT,
        "CSV",
        "tell the market's vol, too, such as DVOL: a CSV of times and vols as for iv_file, known iv_lag after each",
        otherwise="none",
    )
    ohlcv_files: str | None = option(
        None,
        CONTEXT,
        "FILE",
        "bars for context ohlcv: a CSV or Parquet file with time (at which a bar begins), open, high, low, close and "
        "volume, and underlying, or {underlying} in its name for one each",
        otherwise="none",
    )
    bar: str = option("1d", CONTEXT, "LENGTH", "of the bars in ohlcv_files: 1d or 1h", choices=("1d", "1h"))
    label_offset_hours: float = option(
        0.0,
        CONTEXT,
        "HOURS",
        "from a decision's time, as the files label it, to that of its price: bars that had ended by then are seen; 8 "
        "for the teacher's files",
        most=24,
        least=-24,
    )
    analogues: bool = option(
        False,
        CONTEXT,
        "BOOL",
        "tell what the best candidates of the 20 most similar decisions brought whose outcomes were settled by then; "
        "with context, and with a settlement that no later trade chooses",
    )
    opinions: str | None = option(
        None,
        CONTEXT,
        "FILE",
        "tell of each candidate what a model of outcomes that was fitted before expected: a file that covered-call "
        "q-scorer --write_opinions wrote",
        otherwise="none",
    )
    explain: bool = option(
        False,
        ANSWERS,
        "BOOL",
        "answers of chats give a strength and a reason behind the answer, of what the prompt shows",
    )
    hindsight: bool = option(
        False,
        PROMPTS,
        "BOOL",
        "print the teacher's outcomes in the prompts, as its own exporter does: they name the answer",
    )
    seed: int = option(0, PROMPTS, "N", "of the shuffle")
    splits: tuple[float, float, float] | str = option(
        (0.8, 0.1, 0.1),
        SPLITS,
        "SHARE",
        "three shares of the distinct decision times, train validation test, or the word train for one split",
    )
    validation_from: str | None = option(
        None,
        SPLITS,
        "DATE",
        "the validation split begins here (UTC); together with test_from, not with splits",
        otherwise="by the shares",
    )
    test_from: str | None = option(None, SPLITS, "DATE", "the test split begins here (UTC)", otherwise="by the shares")
    purge: bool = option(
        True, SPLITS, "BOOL", "true leaves out decisions whose outcomes end after the next split has begun"
    )
    fee: float = option(
        0.0, OUTCOMES, "SHARE", "of each trade, as a share of the underlying's price; Deribit: 0.0003", most=1
    )
    fee_cap: float = option(
        0.125, OUTCOMES, "SHARE", "the most that a fee is, as a share of the option's price", most=1
    )
    half_spread: float = option(
        0.0, OUTCOMES, "SHARE", "lost to the spread at each trade, as a share of the option's price", most=1
    )
    slippage: float = option(
        0.0, OUTCOMES, "SHARE", "lost beside it at each trade, as a share of the underlying's price", most=1
    )
    delivery_fee: float = option(
        0.0,
        OUTCOMES,
        "SHARE",
        "of a call that is settled in the money, as a share of the underlying's price, capped as fee is; Deribit: "
        "0.00015",
        most=1,
    )
    # Half a day: in a daily file without gaps no expiry is farther from a decision, and more would add noise of its
    # own to a week's outcome.
    expiry_tolerance: float = option(
        12.0, OUTCOMES, "HOURS", "the most that the spot taken for an expiry may be away from it", most=24 * MAX_DTE
    )
    horizon: float | None = option(
        None,
        OUTCOMES,
        "DAYS",
        "buy each call back after so many days",
        otherwise="hold it to its expiry",
        most=MAX_DTE,
    )
    settlement: str = option(
        "auto",
        OUTCOMES,
        "RULE",
        "when a call is taken for settled, bought back and rolled: teacher (16 hours before expiry; 80 % of the "
        "premium taken as profit, defended at 98 % of the strike, at most 3 rolls by score), intrinsic (the same, "
        "settled at expiry, as a holder of the real contracts is), simulated (as data/simulate_backtest.py has it), "
        "recorded (what the files say of each candidate, sold or not, as covered-call backtest does), or auto "
        "(recorded where the files say it, else the one that gives back the recorded trades of an exit style best)",
        choices=("auto", "teacher", "intrinsic", "simulated", "recorded"),
    )
    settle_hours: float | None = option(
        None, OUTCOMES, "HOURS", "of time value left in an outcome", otherwise=AS_SETTLED, most=24 * MAX_DTE
    )
    take_profit: float | None = option(
        None,
        OUTCOMES,
        "SHARE",
        "of tp_and_roll: buy back once this share of the premium is earned",
        otherwise=AS_SETTLED,
        most=1,
    )
    defend: float | None = option(
        None, OUTCOMES, "SHARE", "of tp_and_roll: buy back once spot / strike is so high", otherwise=AS_SETTLED,
        most=math.inf,
    )  # fmt: skip
    min_dte_to_roll: float | None = option(
        None, OUTCOMES, "DAYS", "of tp_and_roll: buy back only while more are left", otherwise=AS_SETTLED, most=MAX_DTE
    )
    max_rolls: float | None = option(
        None, OUTCOMES, "N", "of tp_and_roll: calls that are sold after the first", otherwise=AS_SETTLED, most=math.inf
    )
    roll_min_score: float | None = option(
        None,
        OUTCOMES,
        "SCORE",
        "of tp_and_roll: sell next the best score of another instrument, if it is as high as this",
        otherwise=AS_SETTLED,
        most=math.inf,
        least=-math.inf,
    )
    roll_delta: float = option(
        0.25, OUTCOMES, "DELTA", "of tp_and_roll as simulated: the delta of the call that is sold next", most=1
    )
    keep_cut: bool = option(
        False,
        OUTCOMES,
        "BOOL",
        "of tp_and_roll: keep the mark of a trade that the end of the files cuts off, in place of an unknown outcome",
    )
    pricing_iv: float | str | None = option(
        None,
        OUTCOMES,
        "VOL",
        "price premiums and buy-backs at this vol (0.7 is 70 % a year), or fit: at what the recorded trades were paid",
        otherwise="the files' iv",
    )
    iv_file: str | None = option(
        None,
        OUTCOMES,
        "CSV",
        "price them at the market's vol as it was known at each sale: a CSV of times and vols, {underlying} in its "
        "name for one each; an index has no skew, see iv_shift",
        otherwise="the files' iv",
    )
    iv_lag: float = option(
        24.0,
        OUTCOMES,
        "HOURS",
        "after its time at which a vol of iv_file or context_vols is known; a day's close: 24",
        most=24 * 365,
    )
    iv_shift: float = option(0.0, OUTCOMES, "VOL", "added to the vol of premiums and buy-backs", most=5, least=-5)

    def check(self) -> None:
        """Raises CandidatesError for a value that no option takes."""
        for one in options_of(type(self)):
            check_value(one, getattr(self, one.name))
        for name in ("underlying", "exit_style"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise CandidatesError(f"{name}={shown(value)}: give a name as the files have it, or leave it out.")
        if not is_number(self.seed) or isinstance(self.seed, (float, np.floating)):
            raise CandidatesError(f"seed={shown(self.seed)}: give a whole number.")
        fits = isinstance(self.pricing_iv, str) and self.pricing_iv == FIT
        if self.pricing_iv is not None and not fits and not 0 < (constant_vol(self.pricing_iv) or 0) <= MAX_IV:
            raise CandidatesError(
                f"pricing_iv={shown(self.pricing_iv)}: give a vol above 0 and up to {MAX_IV:g} (0.7 is 70 % a year), "
                f"or {FIT}."
            )
        for name in PATHS:
            path = getattr(self, name)
            if path is not None and (not isinstance(path, str) or not path.strip()):
                raise CandidatesError(f"{name}={shown(path)}: give the path of a file, or leave it out.")
        if self.iv_file is not None and self.pricing_iv is not None:
            raise CandidatesError("Give either pricing_iv or iv_file.")
        if self.hindsight and self.name in ("preference", "q_values"):
            raise CandidatesError(
                f"hindsight is for {' and '.join(CHATS)}, not for {self.name}, where outcomes are to be learnt."
            )
        if self.explain and self.name in ("preference", "q_values"):
            raise CandidatesError(f"explain is for {' and '.join(CHATS)}, not for {self.name}, which has no answer.")
        self.check_context()
        self.check_splits()

    def check_context(self) -> None:
        named = self.context_columns
        texts = isinstance(named, (list, tuple)) and all(isinstance(one, str) for one in named)
        if not texts or len(set(named)) < len(named) or any(wrong_name(one) for one in named):
            raise CandidatesError(f"context_columns={shown(named)}: give a list of different names of columns.")
        told = [one for one in named if one in (*COLUMNS, *QUOTED_COLUMNS)]
        if told:
            raise CandidatesError(
                f"context_columns={shown(told[0])}: this column is told already, or is of the outcome, which a prompt "
                "must not tell. Give columns of your own."
            )
        for name in ("context_columns", "context_vols", "analogues"):
            if getattr(self, name) and self.context == "none":
                raise CandidatesError(f"{name} goes with context='spot' or 'ohlcv': context is 'none'.")
        if (self.context == "ohlcv") != (self.ohlcv_files is not None):
            raise CandidatesError("context='ohlcv' and ohlcv_files go together: give both.")

    def check_splits(self) -> None:
        default = CoveredCallCandidatesConfig.splits
        fractions = tuple(self.splits) if isinstance(self.splits, (tuple, list)) else ()
        real = [is_number(fraction) and fraction >= 0 for fraction in fractions]
        whole = isinstance(self.splits, str) and self.splits == "train"
        if not whole and (real != [True] * 3 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6)):
            raise CandidatesError(
                f"splits={shown(self.splits)}: give three fractions that add up to 1 (train, validation, test), or "
                '"train".'
            )
        dated = (self.validation_from is not None) + (self.test_from is not None)
        if dated == 1:
            raise CandidatesError("validation_from and test_from go together: give both.")
        if dated and fractions != default:
            raise CandidatesError("Give either splits, or validation_from and test_from.")
        if dated and parse_option_time(self, "validation_from") > parse_option_time(self, "test_from"):
            raise CandidatesError(f"validation_from={self.validation_from} is after test_from={self.test_from}.")


@dataclass
class PreferenceConfig(CoveredCallCandidatesConfig):
    """Options of ``preference`` beside those of all configs."""

    rejected: str = option(
        "teacher",
        PAIRS,
        "RULE",
        "against what the best answer is set: teacher (the worst, where the teacher's is the best), or worst",
        choices=("teacher", "worst"),
    )
    min_edge: float = option(0.0, PAIRS, "USD", "by how much the better answer must be better", most=math.inf)
    min_edge_pct: float = option(0.1, PAIRS, "PERCENT", "the same in percent of spot", most=100)


@dataclass
class QValuesConfig(CoveredCallCandidatesConfig):
    """Options of ``q_values`` beside those of all configs."""

    horizons: list[float] | tuple[float, ...] | None = option(
        None,
        OUTCOMES,
        "DAYS",
        "beside q_sell, a column q_sell_3d for each of some numbers of days: what q_sell is with that horizon",
        otherwise="none",
    )

    def check(self) -> None:
        super().check()
        given = self.horizons
        days = given if isinstance(given, (list, tuple)) else []
        real = all(is_number(one) and 0 < one <= MAX_DTE for one in days)
        if given is not None and not (real and 0 < len(set(map(float, days))) == len(days) <= MOST_HORIZONS):
            raise CandidatesError(
                f"horizons={shown(given)}: give a list of 1 to {MOST_HORIZONS} different numbers of days, each above "
                f"0 and up to {MAX_DTE:g}, such as [1, 3, 5]."
            )


def horizon_columns(options: CoveredCallCandidatesConfig) -> dict[str, float]:
    """The columns that the option horizons adds to q_values, ascending, each with its days."""
    days = sorted(map(float, options.horizons or ())) if isinstance(options, QValuesConfig) else []
    return {f"q_sell_{str(one).removesuffix('.0')}d": one for one in days}


def options_of(kind: type[datasets.BuilderConfig], *groups: str) -> list[dataclasses.Field]:
    """The options of a kind of config, those of some groups alone if there are any."""
    found = [field for field in dataclasses.fields(kind) if "group" in field.metadata]
    return [field for field in found if not groups or field.metadata["group"] in groups]


def names_of(kind: type[datasets.BuilderConfig], *groups: str) -> list[str]:
    return [field.name for field in options_of(kind, *groups)]


def kind_of(name: str) -> type[CoveredCallCandidatesConfig]:
    """The dataclass of a config's options."""
    if name == "preference":
        return PreferenceConfig
    return QValuesConfig if name == "q_values" else CoveredCallCandidatesConfig


def check_value(field: dataclasses.Field, value) -> None:
    """Raises CandidatesError unless the value is of the choices, the type and the limits of its option."""
    name, choices, most, least = field.name, *(field.metadata[key] for key in ("choices", "most", "least"))
    if choices and (not isinstance(value, str) or value not in choices):
        raise CandidatesError(f"{name}={shown(value)}: choose one of {', '.join(choices)}.")
    if isinstance(field.default, bool) and not isinstance(value, bool):
        raise CandidatesError(f"{name}={shown(value)}: give True or False.")
    if most is None or (value is None and field.default is None):
        return
    if not is_number(value) or not least <= value <= most:
        raise CandidatesError(f"{name}={shown(value)}: give a number from {least:g} to {most:g}.")


def constant_vol(given) -> float | None:
    """The option pricing_iv as a number, also of a text; None where it is none."""
    try:
        return float(given) if isinstance(given, str) or is_number(given) else None
    except ValueError:
        return None


def check_options(name: str, options: dict) -> None:
    """Raises CandidatesError for a value that no option of that config takes, before the library sees it."""
    kind = kind_of(name)
    kind(name=name, **{option: value for option, value in options.items() if option in names_of(kind)}).check()


def parse_option_time(options: "CoveredCallCandidatesConfig", name: str) -> datetime.datetime:
    value = getattr(options, name)
    time = iso_time(value.isoformat() if isinstance(value, datetime.date) else str(value))
    if time is None:
        raise CandidatesError(f"{name}={shown(value)} is not a date such as 2024-01-01.")
    return utc(time)
