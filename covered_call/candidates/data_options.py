"""What is read, how it is split and what outcomes cost: the options that the commands share, and their reading.

Names and defaults are those of CoveredCallCandidatesConfig. An option that is not given is not set, so that a command
may take what a model was tuned with instead.
"""

import argparse
import copy
import dataclasses
from typing import Any

from covered_call.candidates.builder import Backtest, find_csvs
from covered_call.candidates.options import (
    CONTEXT,
    DATA,
    OUTCOMES,
    SPLITS,
    CoveredCallCandidatesConfig,
    PreferenceConfig,
    names_of,
    options_of,
)
from covered_call.candidates.source import HOME

FILES = {  # beside the options: what they are read from
    "data_files": ("CSV", "files of the backtest, or quoted globs such as 'runs/*.csv'; default: the CSVs in data/, "
        "else the simulated sample"),
    "data_dir": ("DIR", "the folder of the CSVs, or of the files that --data_files names; default: the current one"),
}  # fmt: skip
SHARED = (DATA, CONTEXT, SPLITS, OUTCOMES)  # the groups of options that all commands take
OUTCOME_OPTIONS = tuple(names_of(CoveredCallCandidatesConfig, OUTCOMES))
DATA_OPTIONS = tuple(names_of(CoveredCallCandidatesConfig, *SHARED))


def backtest_of(args: argparse.Namespace, recipe: dict) -> Backtest:
    """The backtest that a command line names: files and options of the model's recipe, but what was typed goes before.

    Raises:
        CandidatesError: for options that cannot be used, or files that are not there.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    for together in (("data_files", "data_dir"), ("splits", "validation_from", "test_from")):
        if any(name in given for name in together):
            recipe = {name: value for name, value in recipe.items() if name not in together}
    merged = {name: value for name, value in (recipe | given).items() if value is not None}
    if recipe.get("candidate_order") == merged.get("candidate_order") == "shuffle":
        del merged["candidate_order"]  # of a training's splits, the training split alone is shuffled
    options: dict[str, Any] = {name: merged[name] for name in DATA_OPTIONS if name in merged}
    config = CoveredCallCandidatesConfig(hindsight=given.get("hindsight", False), **options)
    config.check()
    return Backtest(find_csvs(merged.get("data_files"), merged.get("data_dir"), str(HOME)), config)


def config_of(task: str, config: CoveredCallCandidatesConfig) -> CoveredCallCandidatesConfig:
    """The same options for another config; of preferences all pairs, however little their outcomes differ."""
    fields = dataclasses.fields(CoveredCallCandidatesConfig)
    shared: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields} | {"name": task}
    if task == "preference":
        return PreferenceConfig(**shared, min_edge_pct=0.0)
    return CoveredCallCandidatesConfig(**shared)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def add_data_options(
    parser: argparse.ArgumentParser,
    otherwise: str | None = None,
    kind: type[CoveredCallCandidatesConfig] = CoveredCallCandidatesConfig,
    groups: tuple[str, ...] = SHARED,
) -> None:
    """Files and options for backtest_of, in groups; typed turns what was given into what it takes.

    Args:
        otherwise: what an option that is not given is taken from, before its default.
        kind: the dataclass of the options.
    """
    for title in groups:
        group = parser.add_argument_group(title, otherwise and f"default: {otherwise}, else as said here")
        for name, (placeholder, text) in FILES.items() if title == DATA else ():
            many = "+" if name == "data_files" else None
            group.add_argument(*flags(name), metavar=placeholder, help=text, nargs=many)
        for option in options_of(kind, title):
            add_option(group, option)


def add_option(group, option: dataclasses.Field) -> None:
    """One option to a group of a parser, None where it is not given; one that is off by default is a flag."""
    text = option_text(option).replace("%", "%%")
    if option.default is False:
        group.add_argument(*flags(option.name), action="store_true", default=None, help=text)
        return
    more: dict[str, Any] = {"type": float} if option.metadata["most"] is not None else {}
    more |= {"type": int} if type(option.default) is int else {}
    more |= {"nargs": "+"} if isinstance(option.default, tuple) else {}
    group.add_argument(*flags(option.name), metavar=option.metadata["placeholder"], help=text, **more)


def recipe_keys(*groups: str, kind: type[CoveredCallCandidatesConfig] = CoveredCallCandidatesConfig) -> Any:
    """A dataclass of these groups' options as keys of a recipe, each None where it does not say; with DATA, of the
    files too."""
    files = {"data_files": list[str] | None, "data_dir": str | None} if DATA in groups else {}
    keys: list[tuple] = [(name, of, key_field(*FILES[name])) for name, of in files.items()]
    keys += [
        (option.name, key_type(option), key_field(option.metadata["placeholder"], option_text(option)))
        for option in options_of(kind, *groups)
    ]
    return dataclasses.make_dataclass("DataKeys", keys)


def key_field(placeholder: str, text: str) -> Any:
    help = text.replace("%", "percent")
    return dataclasses.field(default=None, metadata={"help": help, "metavar": placeholder})


def key_type(option: dataclasses.Field):
    if isinstance(option.default, tuple):
        return (list[float] if option.default else list[str]) | None
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


def typed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """purge as a bool, and splits as fractions or the word train."""
    if args.purge is not None:
        args.purge = {"true": True, "false": False}.get(args.purge.lower())
        if args.purge is None:
            parser.error("--purge: give true or false.")
    if args.splits == ["train"]:
        args.splits = "train"
    elif args.splits:
        try:
            args.splits = tuple(map(float, args.splits))
        except ValueError:
            parser.error(f'--splits {" ".join(args.splits)}: give three fractions that add up to 1, or "train".')
    return args
