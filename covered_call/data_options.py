"""What is read, how it is split and what outcomes cost: the options that the commands share, and their reading.

Names and defaults are those of CoveredCallCandidatesConfig. An option that is not given is not set, so that a command
may take what a model was tuned with instead.
"""

import argparse
import copy
import dataclasses

from covered_call.candidates.builder import find_csvs
from covered_call.candidates.options import (
    DATA,
    OUTCOMES,
    SPLITS,
    CoveredCallCandidatesConfig,
    PreferenceConfig,
    names_of,
    options_of,
)
from covered_call.candidates.prompts import present_in_order
from covered_call.candidates.reading import read_candidates
from covered_call.candidates.schema import LoggedDecision
from covered_call.candidates.source import HOME
from covered_call.candidates.splits import split_decisions

FILES = {  # beside the options: what they are read from
    "data_files": ("CSV", "files of the backtest, or quoted globs such as 'runs/*.csv'; default: the CSVs in data/, "
        "else the simulated sample"),
    "data_dir": ("DIR", "the folder of the CSVs, or of the files that --data_files names; default: the current one"),
}  # fmt: skip
SHARED = (DATA, SPLITS, OUTCOMES)  # the groups of options that all commands take
OUTCOME_OPTIONS = tuple(names_of(CoveredCallCandidatesConfig, OUTCOMES))
DATA_OPTIONS = tuple(names_of(CoveredCallCandidatesConfig, *SHARED))


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
    files = find_csvs(merged.get("data_files"), merged.get("data_dir"), str(HOME))
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


def add_data_options(
    parser: argparse.ArgumentParser, otherwise: str | None = None, kind: type = CoveredCallCandidatesConfig
) -> None:
    """Options for data_options, in groups; typed turns what was given into what it takes.

    Args:
        otherwise: what an option that is not given is taken from, before its default.
        kind: the dataclass of the options.
    """
    for title in SHARED:
        group = parser.add_argument_group(title, otherwise and f"default: {otherwise}, else as said here")
        for name, (placeholder, text) in FILES.items() if title == DATA else ():
            group.add_argument(
                *flags(name), metavar=placeholder, help=text, nargs="+" if name == "data_files" else None
            )
        for option in options_of(kind, title):
            more = {"type": float} if option.metadata["most"] is not None else {}
            more |= {"nargs": "+"} if isinstance(option.default, tuple) else {}
            placeholder, text = option.metadata["placeholder"], option_text(option).replace("%", "%%")
            group.add_argument(*flags(option.name), metavar=placeholder, help=text, **more)


def recipe_keys(*groups: str, kind: type = CoveredCallCandidatesConfig) -> type:
    """A dataclass of these groups' options as keys of a recipe, each None where it does not say; with DATA, of the
    files too."""
    files = {"data_files": list[str] | None, "data_dir": str | None} if DATA in groups else {}
    keys = [(name, of, *key_field(*FILES[name])) for name, of in files.items()]
    keys += [
        (option.name, key_type(option), *key_field(option.metadata["placeholder"], option_text(option)))
        for option in options_of(kind, *groups)
    ]
    return dataclasses.make_dataclass("DataKeys", keys)


def key_field(placeholder: str, text: str) -> tuple[dataclasses.Field]:
    text = text.replace("%", "percent")
    return (dataclasses.field(default=None, metadata={"help": text, "metavar": placeholder}),)


def key_type(option: dataclasses.Field):
    if isinstance(option.default, tuple):
        return list[float] | None
    if option.metadata["most"] is not None:
        return float | None
    return (bool if isinstance(option.default, bool) else str) | None


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


def option_text(option: dataclasses.Field) -> str:
    """What an option does, and its default."""
    default = option.default
    if isinstance(default, tuple):
        shown = " ".join(f"{one:g}" for one in default)
    else:
        shown = f"{default:g}" if isinstance(default, float) else str(default).lower()
    return f"{option.metadata['text']}; default: {option.metadata['otherwise'] or shown}"


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
