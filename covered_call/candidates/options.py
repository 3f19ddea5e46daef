"""The options of a load: one dataclass, from which command lines, recipes, manifests and cache keys are derived.

To add one, add a field: nothing else lists them.
"""

import dataclasses
import datetime
import math
from dataclasses import dataclass

import datasets
import numpy as np

from covered_call.candidates.schema import MAX_DTE, MAX_IV, CandidatesError, is_number, iso_time, shown, utc

CHATS = ("per_candidate", "per_decision_ranking")  # the configs whose records are chats with the teacher's answer
# Of what an option is: the headings under which --help shows them.
DATA, PROMPTS, SPLITS, OUTCOMES, PAIRS = "data", "prompts", "splits", "outcomes and costs", "pairs"


def option(default, group: str, placeholder: str, text: str, *, otherwise: str = "", choices=(), most=None):
    """A field for an option.

    Args:
        placeholder: what stands for its value in --help, with its unit.
        text: what it does.
        otherwise: what happens without it, where the default alone would not say.
        choices: what may be chosen from.
        most: the largest value of one that is a number from 0.
    """
    said = {"group": group, "placeholder": placeholder, "text": text, "otherwise": otherwise}
    return dataclasses.field(default=default, metadata=said | {"choices": choices, "most": most})


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
    take_profit: float = option(
        0.70, OUTCOMES, "SHARE", "of tp_and_roll: buy back once this share of the premium is earned", most=1
    )
    roll_delta: float = option(
        0.25, OUTCOMES, "DELTA", "of tp_and_roll: the delta of the call that is sold next", most=1
    )

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
        if self.hindsight and self.name in ("preference", "q_values"):
            raise CandidatesError(
                f"hindsight is for {' and '.join(CHATS)}, not for {self.name}, where outcomes are to be learnt."
            )
        self.check_splits()

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


def options_of(kind: type[datasets.BuilderConfig], *groups: str) -> list[dataclasses.Field]:
    """The options of a kind of config, those of some groups alone if there are any."""
    found = [field for field in dataclasses.fields(kind) if "group" in field.metadata]
    return [field for field in found if not groups or field.metadata["group"] in groups]


def names_of(kind: type[datasets.BuilderConfig], *groups: str) -> list[str]:
    return [field.name for field in options_of(kind, *groups)]


def kind_of(name: str) -> type[CoveredCallCandidatesConfig]:
    """The dataclass of a config's options."""
    return PreferenceConfig if name == "preference" else CoveredCallCandidatesConfig


def check_value(field: dataclasses.Field, value) -> None:
    """Raises CandidatesError unless the value is of the choices, the type and the limits of its option."""
    name, choices, most = field.name, field.metadata["choices"], field.metadata["most"]
    if choices and (not isinstance(value, str) or value not in choices):
        raise CandidatesError(f"{name}={shown(value)}: choose one of {', '.join(choices)}.")
    if isinstance(field.default, bool) and not isinstance(value, bool):
        raise CandidatesError(f"{name}={shown(value)}: give True or False.")
    if most is None or (value is None and field.default is None):
        return
    if not is_number(value) or not 0 <= value <= most:
        raise CandidatesError(f"{name}={shown(value)}: give a number from 0 to {most:g}.")


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
