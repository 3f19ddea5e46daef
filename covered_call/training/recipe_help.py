"""--help of the trainings: their own options in groups, with units and defaults; TRL's hundreds with --help_all."""

import argparse
from dataclasses import fields
from enum import Enum
from typing import Any, NoReturn

from transformers.hf_argparser import DataClassType, string_to_bool
from trl import TrlParser

from covered_call.candidates.options import OUTCOMES, PAIRS, SPLITS, PreferenceConfig, names_of
from covered_call.training.first_checks import RECIPES, read_recipe
from covered_call.training.runs import RecipeError

PLACEHOLDERS = {int: "N", float: "NUMBER", str: "TEXT", string_to_bool: "BOOL"}
MOST_CHOICES = 4  # that are shown in the place of a placeholder
# What TRL and transformers say of these is not what they do here, or says it at length.
SAID_HERE = {
    "help": "show this, and stop",
    "output_dir": "the folder of the run, of which it is made or gone on with",
    "push_to_hub": "share the finished run, privately unless --hub_private_repo false",
    "hub_model_id": "USER/NAME to share it as; default: your name, and that of the folder",
    "hub_private_repo": "whether the repo is private; default: true",
    "hub_token": "a token of the Hub, which is written nowhere; default: that of your login",
    "splits": "three shares of the decision times: train, validation, test; default: 0.8 0.1 0.1",
    "num_train_epochs": "times that the training split is gone through",
    "max_steps": "optimiser steps, in the place of num_train_epochs; -1: those of the epochs",
    "gradient_accumulation_steps": "micro-batches of an optimiser step",
    "learning_rate": "of the optimiser, at its highest",
    "lr_scheduler_type": "how the learning rate falls: cosine, linear, constant, ...",
    "warmup_steps": "steps in which the learning rate rises; below 1: a share of all",
    "max_grad_norm": "a longer gradient is scaled down to this norm; 0: never",
    "optim": "the optimiser: adamw_torch_fused, or paged_adamw_8bit, which takes a quarter of the memory",
    "bf16": "compute in bfloat16, or float16 where the GPU has none; false: in float32; default: true",
    "use_cpu": "train on the CPU, though there be a GPU",
    "seed": "of the adapter, of dropout and of the order of the records",
    "max_length": "tokens of a record with its answer; a longer one is an error",
    "eval_strategy": "when to score validation records",
    "eval_steps": "steps between two evaluations; default: logging_steps",
    "save_strategy": "when to write a checkpoint",
    "save_steps": "steps between two checkpoints",
    "save_total_limit": "checkpoints to keep, beside the best; default: all",
    "load_best_model_at_end": "save the best checkpoint in the end, not the last weights",
    "metric_for_best_model": "by which a checkpoint is the best, e.g. balanced_accuracy; default: loss",
    "greater_is_better": "whether a higher value of it is better; default: as for the metric",
    "logging_steps": "steps between two lines of the log; below 1: a share of all",
    "report_to": "loggers such as tensorboard or wandb; all: those installed; none",
    "beta": "how much moving away from the start costs: more keeps closer to it",
    "loss_type": "of DPO, e.g. sigmoid, ipo, hinge; several with loss_weights",
    "disable_dropout": "train without dropout",
}


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description; one name an option, what it takes, and its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = max(action.option_strings, key=len) if action.dest == "help" else action.option_strings[0]
        if action.nargs in (0, "?"):
            return name
        if action.choices and len(list(action.choices)) <= MOST_CHOICES:
            return f"{name} {{{','.join(map(str, action.choices))}}}"
        kind = action.type if action.type in PLACEHOLDERS else type(action.default)
        placeholder = action.metavar or PLACEHOLDERS.get(kind, "TEXT")
        return f"{name} {placeholder}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = SAID_HERE.get(action.dest) or " ".join((action.help or "").split())
        default = plain(action.default)
        if not text.endswith("..."):
            text = text.removesuffix(".")
        if default not in (None, "", argparse.SUPPRESS) and "default" not in text.lower():
            text += f"; default: {in_words(default)}"
        return text.replace("%", "%%")


class RecipeParser(TrlParser):
    """The keys of a training's dataclasses as options.

    Args:
        parts: the dataclasses of model, data and run.
        run_keys: of the last one, those that are not TRL's.
        recipes: the names of its recipes; what they set beside is shown, too.
        everything: whether --help is to show all keys.
    """

    def __init__(
        self, parts: tuple[type[Any], ...], run_keys: list[str], recipes: tuple[str, ...], everything: bool, **more
    ):
        super().__init__([DataClassType(part) for part in parts], formatter_class=Help, allow_abbrev=False, **more)
        self.add_argument(  # for --help alone: read_command has taken it
            "--config",
            metavar="NAME",
            default=argparse.SUPPRESS,
            help=f"a recipe: {', '.join(recipes)}, or the path of one",
        )
        self.add_argument(
            "--help_all", "--help-all", action="help", help="show all keys, those of TRL and transformers too"
        )
        self.parts, self.run_keys, self.recipes, self.everything = parts, run_keys, recipes, everything

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}.")

    def groups(self) -> dict[str, list[argparse.Action]]:
        """The options under each heading."""
        model, data = ([key.name for key in fields(part)] for part in self.parts[:2])
        split, outcomes = names_of(PreferenceConfig, SPLITS), names_of(PreferenceConfig, OUTCOMES, PAIRS)
        in_recipes = {key for name in self.recipes for key in read_recipe(RECIPES / f"{name}.yaml")}
        sharing = ["push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"]
        keys = {
            "run": ["config", "help", "help_all", "output_dir", *self.run_keys, *sharing],
            "model": model,
            "data": [key for key in data if key not in (*split, *outcomes)],
            "splits": split,
            "outcomes and costs": outcomes,
            "training; --help_all shows what else TRL and transformers take": [
                n for n in SAID_HERE if n in in_recipes
            ],
        }
        left, found = list(self._actions), {}
        # The first of its name, for transformers adds --no_KEY to what is on by default.
        first = {action.dest: action for action in reversed(left)}
        for title, names in keys.items():
            found[title] = [first[name] for name in names if first.get(name) in left]
            left = [action for action in left if action not in found[title]]
        if self.everything:
            found["all others"] = left
        return {title: actions for title, actions in found.items() if actions}

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, actions in self.groups().items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


def plain(value):
    return value.value if isinstance(value, Enum) else value


def in_words(default) -> str:
    """A default as it is typed."""
    if isinstance(default, list):
        return " ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)
