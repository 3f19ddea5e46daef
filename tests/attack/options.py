"""Values of every kind for every option, of load_candidates and of the commands: what is meant, or one clear error.

Each option has a law that says what a value means: a plain value, which must give the same rows, or nothing, and then
it must be refused. Words of a command line go through the command's own parser and checks, in this process; what
costs more than a second is left out (no training starts, nothing is pushed).
"""

import argparse
import collections
import contextlib
import datetime
import decimal
import fractions
import hashlib
import io
import itertools
import json
import logging
import math
import numbers
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import datasets
import numpy as np
import pandas as pd
from conftest import decision, no_candidates, write_csv

from covered_call import tuning
from covered_call.candidates.builder import load_candidates
from covered_call.candidates.data_options import backtest_of
from covered_call.candidates.export import main, parse_arguments
from covered_call.candidates.options import CoveredCallCandidatesConfig, PreferenceConfig, QValuesConfig
from covered_call.candidates.records import RECORDS
from covered_call.candidates.schema import CandidatesError
from covered_call.evaluation import evaluate
from covered_call.language_model.manifest import PolicyError
from covered_call.publishing import publish
from covered_call.publishing.hub import PublishError
from covered_call.training.recipe import DPO, SFT, parse_command
from covered_call.training.runs import RecipeError
from covered_call.value_model import q_scorer
from covered_call.value_model.learning import Gates, check_weight

NOTHING = object()  # what a value means that no option takes
HANDLED, UNCLEAR, WRONG = "handled", "unclear", "wrong"
LONGEST_MESSAGE = 1_500


class Shouts:
    """An object whose text is hostile."""

    def __repr__(self):
        return "\x1b[31m" + "x" * 200_000 + "\n<|end|>"

    __str__ = __repr__


def generator(*items):
    return (item for item in items)


# Made anew for each use: a generator can be read once.
VALUES: dict[str, Callable] = {
    repr(value)[:60]: (lambda value=value: value)
    for value in [
        None, True, False, 0, 1, -1, 2, 7, 10**30, -(10**400), 0.0, 0.1, 0.5, -0.5, 1.0, 1.5, 100.0, 1e308,
        math.nan, math.inf, -math.inf, 1e-320, 1 + 2j, "", " ", "0", "0.1", "1", "nan", "true", "False", "train",
        "test", "csv", "CSV", "shuffle", "instrument", "error", "skip", "latest", "worst", "teacher", "BTC", "btc",
        "ETH", "tp_and_roll", "hold_to_expiry", "per_candidate", "preference", "2024-09-20",
        "2024-09-20T00:00:00+00:00", "20 Sept", "2024-13-01", "9999-12-31", "0001-01-01T00:00:00+14:00",
        "x" * 100_000, "\x00", "\x1b[31mred", "a\nb", "\ud800", "<|end|>", "../..", "~", "*", "**", "[", "[a",
        "/dev/null", "/dev/zero", "/nonexistent/x.csv", ".", b"", b"BTC", b"a.csv", bytearray(b"x"), [], [1],
        ["BTC"], [None], [[]], ["error"], (), (0.8, 0.1, 0.1), [0.8, 0.1, 0.1], (1, 0, 0), (0.5, 0.5),
        (0.8, 0.1, 0.2), (0.8, -0.1, 0.3), (math.nan, 0.5, 0.5), (True, False, False), ("0.8", "0.1", "0.1"),
        (0.8, 0.1, 0.1, 0.0), {}, {"train": "a.csv"}, {1: 2}, set(), {"BTC"}, frozenset({1}), range(3), slice(1),
        ..., NotImplemented, int, len, np.nan, np.float64(0.1), np.float32(0.5), np.int64(1), np.int8(-1),
        np.bool_(True), np.str_("BTC"), np.str_("skip"), np.array([]), np.array(0.1), np.array([0.8, 0.1, 0.1]),
        np.array(["BTC"]), np.zeros((2, 2)), np.datetime64("2024-09-20"), datetime.date(2024, 9, 20),
        datetime.datetime(2024, 9, 20, 12), datetime.time(1), datetime.datetime(2024, 9, 20, tzinfo=datetime.UTC),
        datetime.timedelta(days=1), pd.Timestamp("2024-09-20"), pd.Timestamp("2024-09-20", tz="Asia/Tokyo"),
        pd.NaT, pd.NA, pd.Series([0.8, 0.1, 0.1]), pd.DataFrame(), decimal.Decimal("0.1"), decimal.Decimal("NaN"),
        fractions.Fraction(1, 10), Path("."), Path("a.csv"), Path("/nonexistent"),
    ]
}  # fmt: skip
VALUES |= {
    "a generator of nothing": lambda: generator(),
    "a generator of numbers": lambda: generator(0.8, 0.1, 0.1),
    "a generator of paths": lambda: generator("a.csv"),
    "a generator that fails": lambda: (1 // 0 for _ in [0]),
    "a file": lambda: io.StringIO("BTC"),
    "an iterator": lambda: iter(["a.csv"]),
    "a map": lambda: map(str, ["a.csv"]),
    "an object": object,
    "an object that shouts": Shouts,
}

# ---------------------------------------------------------------------------------------------------------------------
# What a value means to an option


def of_flag(value):
    return bool(value) if isinstance(value, (bool, np.bool_)) else NOTHING


def of_choice(*allowed):
    return lambda value: str(value) if isinstance(value, str) and value in allowed else NOTHING


def of_number(low: float, high: float):
    def law(value):
        real = isinstance(value, (numbers.Real, decimal.Decimal)) and not isinstance(value, (bool, np.bool_))
        inside = real and not (isinstance(value, decimal.Decimal) and value.is_nan()) and low <= value <= high
        return float(value) if inside else NOTHING

    return law


def of_whole(value):
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_)) else NOTHING


def of_vol(value):
    """A number, a text of one, or fit."""
    if isinstance(value, str):
        try:
            value = value if value == "fit" else float(value)
        except ValueError:
            return NOTHING
    return value if isinstance(value, str) and value == "fit" else of_number(math.ulp(0), 5)(value)


def of_vols(value):
    """Of a file of vols, of which none of these is one."""
    return NOTHING


def of_own_columns(value):
    """A list of names that are not those of other columns; one that the file does not have is refused."""
    texts = isinstance(value, (list, tuple)) and all(isinstance(item, str) and item.isprintable() for item in value)
    return list(map(str, value)) if texts and len(set(value)) == len(value) and all(value) else NOTHING


def of_name(value):
    return str(value) if isinstance(value, str) and value.strip() else NOTHING


def of_splits(value):
    if isinstance(value, str):
        return "train" if value == "train" else NOTHING
    items = list(value) if isinstance(value, (tuple, list, np.ndarray, pd.Series)) and np.ndim(value) == 1 else []
    shares = [of_number(0, 1)(item) for item in items]
    return tuple(shares) if len(shares) == 3 and NOTHING not in shares and math.isclose(sum(shares), 1) else NOTHING


def of_horizons(value):
    days = [of_number(math.ulp(0), 36_500)(item) for item in value] if isinstance(value, (list, tuple)) else []
    return days if days and NOTHING not in days and len(set(days)) == len(days) <= 20 else NOTHING


def of_date(value):
    if isinstance(value, (datetime.date, pd.Timestamp, np.datetime64)) and not pd.isna(value):
        return pd.Timestamp(value).isoformat()
    try:
        return datetime.datetime.fromisoformat(value).isoformat() if isinstance(value, str) else NOTHING
    except ValueError:
        return NOTHING


def of_files(value):
    if isinstance(value, (str, os.PathLike)):
        return [os.fspath(value)]
    try:
        items = (
            []
            if isinstance(value, (bytes, dict)) or np.ndim(value) == 0 and isinstance(value, np.ndarray)
            else list(value)
        )
    except Exception:
        items = []
    return (
        [*map(os.fspath, items)] if items and all(isinstance(item, (str, os.PathLike)) for item in items) else NOTHING
    )


def of_folder(value):
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else NOTHING


def of_place(value):
    """Of a folder that changes no row."""
    return NOTHING if of_folder(value) is NOTHING else None


def of_processes(value):
    count = of_whole(value)
    return None if count is not NOTHING and count > 0 else NOTHING


def anything(value):
    """Of an option that changes no row."""
    return None


class Law(NamedTuple):
    """What a value means, and the options that go with it."""

    means: Callable
    beside: dict = {}
    configs: tuple[str, ...] = tuple(RECORDS)


SHARES = ("fee", "fee_cap", "half_spread", "slippage", "delivery_fee", "take_profit", "roll_delta")
LAWS = {
    "name": Law(of_choice(*RECORDS)),
    "data_files": Law(of_files),
    "data_dir": Law(of_folder, {"data_files": None}),
    "cache_dir": Law(of_place, {"streaming": False}, ("q_values",)),
    "hash": Law(anything),
    "streaming": Law(of_flag, {}, ("q_values",)),
    "num_proc": Law(of_processes, {"streaming": False}, ("q_values",)),
    "underlying": Law(of_name),
    "exit_style": Law(of_name),
    "context": Law(of_choice("none", "spot", "ohlcv")),
    "context_columns": Law(of_own_columns, {"context": "spot"}),
    "context_vols": Law(of_vols, {"context": "spot"}),
    "ohlcv_files": Law(of_vols, {"context": "ohlcv"}),
    "bar": Law(of_choice("1d", "1h")),
    "label_offset_hours": Law(of_number(-24, 24)),
    "analogues": Law(of_flag, {"context": "spot", "settlement": "simulated"}),
    "opinions": Law(of_vols),
    "hindsight": Law(of_flag),
    "explain": Law(of_flag),
    "candidate_order": Law(of_choice("instrument", "csv", "shuffle")),
    "seed": Law(of_whole, {"candidate_order": "shuffle"}),
    "splits": Law(of_splits),
    "validation_from": Law(of_date, {"test_from": "2024-10-05"}),
    "test_from": Law(of_date, {"validation_from": "2024-09-10"}),
    "purge": Law(of_flag),
    "duplicates": Law(of_choice("error", "latest")),
    "on_bad_rows": Law(of_choice("error", "skip")),
    "max_iv": Law(of_number(0, math.inf)),
    "expiry_tolerance": Law(of_number(0, 24 * 36_500)),
    "horizon": Law(of_number(0, 36_500)),
    "settlement": Law(of_choice("auto", "teacher", "intrinsic", "simulated")),
    "settle_hours": Law(of_number(0, 24 * 36_500)),
    "defend": Law(of_number(0, math.inf)),
    "min_dte_to_roll": Law(of_number(0, 36_500)),
    "max_rolls": Law(of_number(0, math.inf)),
    "roll_min_score": Law(of_number(-math.inf, math.inf)),
    "keep_cut": Law(of_flag),
    "pricing_iv": Law(of_vol),
    "iv_file": Law(of_vols),
    "iv_lag": Law(of_number(0, 24 * 365)),
    "iv_shift": Law(of_number(-5, 5)),
    "min_edge": Law(of_number(0, math.inf), {}, ("preference",)),
    "min_edge_pct": Law(of_number(0, 100), {}, ("preference",)),
    "rejected": Law(of_choice("teacher", "worst"), {}, ("preference",)),
    "horizons": Law(of_horizons, {}, ("q_values",)),
} | {name: Law(of_number(0, 1)) for name in SHARES}  # fmt: skip
NO_OPTIONS = (
    "fees", "Underlying", "split", "trust_remote_code", "config_name", "features", "version", "description",
    "revision", "token", "base_path", "writer_batch_size", "data_file", "cache", "\x1b[31m", "x" * 3_000,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# The judgement


def unclear_because(text: str, named: str | None) -> str | None:
    """What a message lacks."""
    if not text.isprintable():
        return "is not one line of printable text"
    if len(text) > LONGEST_MESSAGE:
        return f"is {len(text)} characters long"
    return f"does not name {named}" if named and named not in text else None


def rows(**options) -> str:
    """What load_candidates makes of the options: a hash of its splits and rows."""
    splits = load_candidates(**options)
    text = json.dumps({name: list(split) for name, split in splits.items()}, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Judge:
    """Gives values to load_candidates, and remembers what plain values gave."""

    def __init__(self, csv_file: str):
        self.csv_file, self.known = csv_file, {}

    def plain(self, config: str, law: Law, option: str, meaning) -> str | None:
        """What the plain value gives; None if it is refused."""
        key = (config, option, repr(meaning))
        if key not in self.known:
            try:
                self.known[key] = rows(**self.options(config, law, option, meaning))
            except CandidatesError:
                self.known[key] = None
        return self.known[key]

    def options(self, config: str, law: Law, option: str, value) -> dict:
        options = {"name": config, "data_files": self.csv_file, "streaming": True} | law.beside | {option: value}
        return {name: value for name, value in options.items() if value is not None or name == option != "name"}

    def judge(self, config: str, option: str, said: str) -> tuple[str, str]:
        """A verdict and why."""
        law = LAWS[option]
        meaning = None if said == "None" and option != "name" else law.means(VALUES[said]())
        try:
            given = rows(**self.options(config, law, option, VALUES[said]()))
        except CandidatesError as error:
            lacks = unclear_because(str(error), option if meaning is NOTHING and option != "name" else None)
            return (UNCLEAR, f"the message {lacks}: {str(error)[:200]!r}") if lacks else (HANDLED, "")
        except Exception as error:
            return UNCLEAR, f"{type(error).__name__}: {str(error)[:200]!r}"
        if meaning is NOTHING:
            return WRONG, "is taken, and means nothing"
        if given != self.plain(config, law, option, meaning):
            return WRONG, f"gives other rows than {meaning!r}"
        return HANDLED, ""

    def judge_stranger(self, option: str, said: str) -> tuple[str, str]:
        """An option that there is not."""
        try:
            rows(**{"data_files": self.csv_file, "streaming": True, option: VALUES[said]()})
        except CandidatesError as error:
            lacks = unclear_because(str(error), option if option.isprintable() and len(option) < 100 else None)
            return (UNCLEAR, f"the message {lacks}: {str(error)[:200]!r}") if lacks else (HANDLED, "")
        except Exception as error:
            return UNCLEAR, f"{type(error).__name__}: {str(error)[:200]!r}"
        return (HANDLED, "") if VALUES[said]() is None else (WRONG, "is taken, and there is no such option")


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

WORDS = [
    "", " ", "nan", "inf", "-inf", "-1", "-0.5", "0", "1", "2", "1.5", "0.1", "1e400", "1e-400", "9" * 400, "abc",
    "None", "null", "[1]", "{}", "[", "true", "True", "no", "off", "-", "--fee", "=", "é", "🙂", "٣", "1_000",
    "0x10", "1,5", "a" * 10_000, "a,b", "../..", "/dev/null", "~", "$HOME", "%s", "%(default)s", "%", "2024-01-01",
    "2024-13-01", "\x1b[31m", "\ud800", "a\nb", "*", "**", "int4", "csv", "auto", "user/name",
    "https://huggingface.co/a/b", "<|end|>", "b'x'", "'", '"', "a b", "NaT",
]  # fmt: skip
NUMERIC = {
    "fee", "fee_cap", "half_spread", "slippage", "delivery_fee", "expiry_tolerance", "horizon", "settle_hours",
    "take_profit", "defend", "min_dte_to_roll", "max_rolls", "roll_min_score", "roll_delta", "iv_lag", "iv_shift",
    "max_iv", "seed", "lora_r", "lora_alpha", "lora_dropout", "tiny_base_steps", "max_eval_records", "threshold",
    "min_confidence", "min_abs_return", "positive_weight", "folds", "batch_tokens", "beta", "max_records_per_market",
    "label_offset_hours",
}  # fmt: skip


NO_NUMBERS = ("auto", "None", "null")  # what some take in place of one


class Found(Exception):
    """Carries a parser out of the function that made it."""


def options_of(parse: Callable) -> list[str]:
    """The long options of the parser that a function makes."""

    def found(parser, *_, **__):
        raise Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", found):
        try:
            parse([])
        except Found as carried:
            parser = carried.args[0]
    names = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    return [name for dest, name in names.items() if dest != "help"]


def export(words: list[str], csv_file: str) -> None:
    main(["--input", csv_file, "--output_dir", "out", *words])


def learn(words: list[str], csv_file: str) -> None:
    args = q_scorer.parse_arguments(["--data_files", csv_file, *words])
    check_weight(args.positive_weight)
    backtest_of(args, {})
    Gates(*(getattr(args, name) or 0.0 for name in ("threshold", "min_confidence", "min_abs_return"))).check()


def judge_policy(words: list[str], csv_file: str) -> None:
    backtest_of(evaluate.parse_arguments(["--baselines-only", "--data_files", csv_file, *words]), {})


def share(words: list[str], csv_file: str) -> None:
    args = publish.parse_arguments(["user/data", "--private", "--data_files", csv_file, *words])
    publish.shard_size(args)
    backtest_of(args, {})


def tune(verb: Callable, words: list[str], csv_file: str) -> None:
    """A training up to where it would load its data."""
    only_parse = lambda stage, command: parse_command(command, {"sft": SFT, "dpo": DPO}[stage])  # noqa: E731
    words = ["--tiny_base_steps", "4", "--data_files", csv_file, "--output_dir", "run", *words]
    with mock.patch.object(tuning, "tune_and_share", only_parse):
        verb(words)


def train(words: list[str], csv_file: str) -> None:
    tune(tuning.train, ["--config", "tiny", *words], csv_file)


def prefer(words: list[str], csv_file: str) -> None:
    tune(tuning.prefer, ["--config", "tiny_dpo", *words], csv_file)


def own_keys(script) -> list[str]:
    """The keys of a recipe that are not the library's."""
    libraries = [one for one in script.parts[-1].__mro__ if one.__module__.startswith(("trl", "transformers"))]
    theirs = {key.name for library in libraries for key in fields(library)}
    return [f"--{key.name}" for part in script.parts for key in fields(part) if key.name not in theirs]


COMMANDS: dict[str, tuple[Callable, Callable[[], list[str]]]] = {
    "export": (export, lambda: options_of(parse_arguments)),
    "q-scorer": (learn, lambda: options_of(q_scorer.parse_arguments)),
    "evaluate": (judge_policy, lambda: options_of(evaluate.parse_arguments)),
    "publish": (share, lambda: options_of(publish.parse_arguments)),
    "train": (train, lambda: own_keys(SFT)),
    "prefer": (prefer, lambda: own_keys(DPO)),
}


def judge_word(command: str, option: str, word: str, csv_file: str) -> tuple[str, str]:
    """A verdict and why: an error is an exit with one line, or with argparse's usage and a line."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(io.StringIO()):
            COMMANDS[command][0]([option, word], csv_file)
    except SystemExit as stop:
        if stop.code == 2:  # argparse repeats what was typed, whatever it was
            return (HANDLED, "") if ": error: " in heard.getvalue() else (UNCLEAR, "exit 2 without a word")
        lacks = unclear_because(less(str(stop.code), word), None) if stop.code else None
        text = str(stop.code)
        return (UNCLEAR, f"the message {lacks}: {text[:200]!r}") if lacks else (HANDLED, "")
    except (CandidatesError, PublishError, RecipeError, PolicyError) as error:
        lacks = unclear_because(less(str(error), word), None)  # which each main ends with
        return (UNCLEAR, f"the message {lacks}: {str(error)[:200]!r}") if lacks else (HANDLED, "")
    except Exception as error:
        return UNCLEAR, f"{type(error).__name__}: {str(error)[:200]!r}"
    name = option.lstrip("-").replace("-", "_")
    if name in NUMERIC and not is_number(word, endless=name == "max_iv") and word not in NO_NUMBERS:
        return WRONG, "is taken for a number"
    return HANDLED, ""


def less(text: str, word: str) -> str:
    """A message as it reaches a terminal, without what was typed, which it may repeat."""
    return (text.replace(word, "") if len(word) > 1 else text).encode(errors="backslashreplace").decode()


def is_number(word: str, endless: bool) -> bool:
    with contextlib.suppress(ValueError):
        return word.isdigit() or math.isfinite(float(word)) or (endless and float(word) == math.inf)
    return False


# ---------------------------------------------------------------------------------------------------------------------


def write_input(folder: Path) -> str:
    moods = ({"exit_style": "tp_and_roll"}, {"exit_style": "hold_to_expiry"})
    days = [
        decision(day, sold=day % 3 if day % 4 else None, dte=1.0, spot=60_000 + 900 * (day % 5), **mood)
        for mood in moods
        for day in range(45)
    ]
    more = [
        decision(day, sold=None, underlying="ETH", spot=3_000 + day, dte=1.0, strikes=(3_100, 3_200))
        for day in range(45)
    ]
    return write_csv(folder / "a.csv", [*itertools.chain.from_iterable([*days, *more]), no_candidates(45)])


@contextlib.contextmanager
def workplace() -> Iterator[str]:
    """A folder deep enough for ../.. to stay in it, as the current one, with a file of candidates and a home."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="attack_options_") as folder:
        place = Path(folder, "home", "a", "b", "c")
        place.mkdir(parents=True)
        os.chdir(place)
        silenced = [logging.getLogger(name) for name in ("covered_call", "transformers")]
        levels = [one.level for one in silenced]
        try:
            for one in silenced:
                one.setLevel(logging.CRITICAL)
            with (
                mock.patch.dict(os.environ, HOME=str(Path(folder, "home"))),
                mock.patch.object(datasets.config, "HF_DATASETS_CACHE", Path(folder, "cache")),
            ):
                yield write_input(place)
        finally:
            os.chdir(here)
            for one, level in zip(silenced, levels, strict=True):
                one.setLevel(level)


def trials() -> Iterator[tuple]:
    """Everything that can be tried: an option of each config with each value, a stranger, a word."""
    configs = {name: CoveredCallCandidatesConfig for name in RECORDS}
    configs |= {"preference": PreferenceConfig, "q_values": QValuesConfig}
    known = {"name", "data_files", "data_dir", "cache_dir", "hash", "streaming", "num_proc"}
    unlawful = {key.name for one in configs.values() for key in fields(one)} - LAWS.keys() - {"version", "description"}
    if unlawful - known:
        raise RuntimeError(f"options without a law: {sorted(unlawful)}")
    for option, law in LAWS.items():
        few = (
            law.configs[:1]
            if option in ("cache_dir", "num_proc", "streaming", "name", "data_files", "data_dir")
            else law.configs
        )
        yield from (("option", config, option, said) for config in few for said in VALUES)
    yield from (("stranger", option, said) for option in NO_OPTIONS for said in ("None", "1", "'BTC'"))
    for command, (_, names) in COMMANDS.items():
        yield from (("word", command, option, word) for option in names() for word in WORDS)


def run(count: int, seed: int, report: Callable[[str], None]) -> dict[str, int]:
    """Tries ``count`` of all trials, or all if they are fewer, drawn by the seed."""
    totals = collections.Counter()
    everything = list(trials())
    random.Random(seed).shuffle(everything)
    with workplace() as csv_file:
        judge = Judge(csv_file)
        for kind, *what in everything[:count]:
            given = {"option": judge.judge, "stranger": judge.judge_stranger}.get(kind)
            verdict, why = given(*what) if given else judge_word(*what, csv_file)
            totals["tried"] += 1
            totals[verdict] += 1
            if verdict != HANDLED:
                report(f"options: {verdict}: {kind} {', '.join(repr(one)[:80] for one in what)}: {why}")
    return {name: totals[name] for name in ("tried", HANDLED, UNCLEAR, WRONG)}
