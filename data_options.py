"""What is read, how it is split and what outcomes cost: the options that the commands share, and their reading.

Names and defaults are those of CoveredCallCandidatesConfig. An option that is not given is not set, so that a command
may take what a model was tuned with instead.
"""

import argparse
import copy
import dataclasses
from pathlib import Path

from covered_call_candidates import (
    CoveredCallCandidatesConfig,
    LoggedDecision,
    PreferenceConfig,
    find_csvs,
    present_in_order,
    read_candidates,
    split_decisions,
)

# Option: its placeholder and what it does, by the groups in which --help shows them.
READ = {
    "data_files": ("CSV", "files of the backtest, or quoted globs such as 'runs/*.csv'"),
    "data_dir": ("DIR", "the folder of the CSVs, or of the files that --data_files names"),
    "underlying": ("NAME", "keep these decisions only, such as BTC"),
    "exit_style": ("STYLE", "keep these decisions only, such as hold_to_expiry"),
    "candidate_order": ("ORDER", "of a decision's candidates: instrument (by name and strike), csv, or shuffle"),
    "duplicates": ("RULE", "the same decision in two files: error, or latest, which keeps the later file's"),
    "on_bad_rows": ("RULE", "error, or skip, which leaves out the whole decision and counts it"),
    "max_iv": ("VOL", "an implied vol above this (1 is 100 % a year) is taken for a percentage, and is an error"),
}
SPLIT = {
    "splits": ("SHARE", "three shares of the decision times, train validation test, or the word train"),
    "validation_from": (
        "DATE",
        "the validation split begins here (UTC); together with --test_from, not with --splits",
    ),
    "test_from": ("DATE", "the test split begins here (UTC)"),
    "purge": ("BOOL", "true leaves out decisions whose outcomes end after the next split has begun"),
}
OUTCOME = {
    "fee": ("SHARE", "of each trade, as a share of the underlying's price; Deribit: 0.0003"),
    "fee_cap": ("SHARE", "the most that a fee is, as a share of the option's price"),
    "half_spread": ("SHARE", "lost to the spread at each trade, as a share of the option's price"),
    "slippage": ("SHARE", "lost beside it at each trade, as a share of the underlying's price"),
    "expiry_tolerance": ("HOURS", "the most that the spot taken for an expiry may be away from it"),
    "horizon": ("DAYS", "buy each call back after so many days"),
    "take_profit": ("SHARE", "of tp_and_roll: buy back once this share of the premium is earned"),
    "roll_delta": ("DELTA", "of tp_and_roll: the delta of the call that is sold next"),
}
GROUPS = {"data": READ, "splits": SPLIT, "outcomes and costs": OUTCOME}
SPECIAL_DEFAULTS = {
    "data_files": "the CSVs in data/, else the simulated sample",
    "data_dir": "the current folder",
    "underlying": "all",
    "exit_style": "all",
    "validation_from": "by --splits",
    "test_from": "by --splits",
    "horizon": "hold it to its expiry",
}
OUTCOME_OPTIONS = tuple(OUTCOME)
DATA_OPTIONS = tuple(name for options in GROUPS.values() for name in options if name not in ("data_files", "data_dir"))


def data_options(asked: argparse.Namespace, recipe: dict) -> tuple[list[str], CoveredCallCandidatesConfig]:
    """Files and options: those of the model's recipe, but what the command line gives goes before."""
    given = {name: value for name, value in vars(asked).items() if value is not None}
    for together in (("data_files", "data_dir"), ("splits", "validation_from", "test_from")):
        if any(name in given for name in together):
            recipe = {name: value for name, value in recipe.items() if name not in together}
    merged = {name: value for name, value in (recipe | given).items() if value is not None}
    if recipe.get("candidate_order") == merged.get("candidate_order") == "shuffle":
        del merged["candidate_order"]  # train_sft.py shuffles the training split alone
    options = {name: merged[name] for name in DATA_OPTIONS if name in merged}
    config = CoveredCallCandidatesConfig(hindsight=asked.hindsight, **options)
    config.check()
    files = find_csvs(merged.get("data_files"), merged.get("data_dir"), str(Path(__file__).parent))
    return files, config


def config_of(task: str, config: CoveredCallCandidatesConfig) -> CoveredCallCandidatesConfig:
    """The same options for another config; of preferences all pairs, however little their outcomes differ."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(CoveredCallCandidatesConfig)}
    if task == "preference":
        return PreferenceConfig(**shared | {"name": task, "min_edge_pct": 0.0})
    return CoveredCallCandidatesConfig(**shared | {"name": task})


def read_splits(files: list[str], config: CoveredCallCandidatesConfig) -> tuple[list[LoggedDecision], dict]:
    """All decisions of the files, and those of each split, with their candidates in the order that prompts show."""
    logged = [present_in_order(entry, config) for entry in read_candidates(files, config)]
    return logged, split_decisions(logged, config)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def add_data_options(parser: argparse.ArgumentParser, otherwise: str | None = None) -> None:
    """Options for data_options, in groups; typed turns what was given into what it takes.

    Args:
        otherwise: what an option that is not given is taken from, before its default.
    """
    more = {name: {"type": float} for name in ("max_iv", *OUTCOME_OPTIONS)} | {
        name: {"nargs": "+"} for name in ("data_files", "splits")
    }
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title, otherwise and f"default: {otherwise}, else as said here")
        for name, (placeholder, what) in options.items():
            text = f"{what}; default: {default_text(name)}".replace("%", "%%")
            group.add_argument(*flags(name), metavar=placeholder, help=text, **more.get(name, {}))


class Help(argparse.RawDescriptionHelpFormatter):
    """--help that does not say of each option that --an-option is --an_option."""

    def add_argument(self, action: argparse.Action) -> None:
        names = {name.replace("-", "_"): name for name in reversed(action.option_strings)}
        shown = copy.copy(action)
        shown.option_strings = list(reversed(names.values()))
        super().add_argument(shown)


def flags(name: str) -> list[str]:
    """--an_option, and --an-option too."""
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def default_text(name: str) -> str:
    if name in SPECIAL_DEFAULTS:
        return SPECIAL_DEFAULTS[name]
    value = getattr(CoveredCallCandidatesConfig, name)
    if isinstance(value, tuple):
        return " ".join(f"{one:g}" for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def typed(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> argparse.Namespace:
    """purge as a bool, and splits as fractions or the word train."""
    if asked.purge is not None:
        asked.purge = {"true": True, "false": False}.get(asked.purge.lower())
        if asked.purge is None:
            parser.error("--purge: give true or false.")
    if asked.splits == ["train"]:
        asked.splits = "train"
    elif asked.splits:
        try:
            asked.splits = tuple(map(float, asked.splits))
        except ValueError:
            parser.error(f'--splits {" ".join(asked.splits)}: give three fractions that add up to 1, or "train".')
    return asked


def align(cells: list[list[str]]) -> str:
    """A table in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
