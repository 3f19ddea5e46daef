"""One list of options: a field of the dataclass is an option of commands and recipes, of manifests and cache keys."""

import argparse
import dataclasses
from dataclasses import dataclass

import pytest
from conftest import decision, write_csv

from covered_call.candidates.builder import CoveredCallCandidates
from covered_call.candidates.data_options import Help, add_data_options, backtest_of, recipe_keys, typed
from covered_call.candidates.options import (
    DATA,
    OUTCOMES,
    SPLITS,
    CoveredCallCandidatesConfig,
    check_value,
    names_of,
    option,
    options_of,
)
from covered_call.candidates.schema import CandidatesError


@dataclass
class Widened(CoveredCallCandidatesConfig):
    margin_rate: float = option(0.1, OUTCOMES, "SHARE", "what the broker asks for", most=1)
    calendar: str = option("all", DATA, "NAME", "which days count", choices=("all", "weekdays"))


class WideBuilder(CoveredCallCandidates):
    BUILDER_CONFIG_CLASS = Widened
    BUILDER_CONFIGS = [Widened(name="per_candidate")]


@pytest.fixture
def path(tmp_path) -> str:
    return write_csv(tmp_path / "a.csv", [*decision(0), *decision(20)])


def parser(kind: type = CoveredCallCandidatesConfig) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(formatter_class=Help)
    add_data_options(made, kind=kind)
    return made


def test_a_new_field_is_an_option_of_a_command_line_in_its_group():
    shown = parser(Widened).format_help()
    assert "--margin_rate SHARE" in shown and "what the broker asks for; default: 0.1" in shown
    assert shown.index("outcomes and costs:") < shown.index("what the broker asks for")
    args = parser(Widened).parse_args(["--margin-rate", "0.2", "--calendar", "weekdays"])
    assert (args.margin_rate, args.calendar) == (0.2, "weekdays")
    assert "margin_rate" not in parser().format_help()


def test_a_new_field_is_a_key_of_a_recipe_and_of_its_manifest():
    keys = recipe_keys(DATA, SPLITS, OUTCOMES, kind=Widened)
    kinds = {field.name: field.type for field in dataclasses.fields(keys)}
    assert kinds["margin_rate"] == float | None and kinds["calendar"] == str | None
    assert dataclasses.asdict(keys(margin_rate=0.3))["margin_rate"] == 0.3 and keys().margin_rate is None


def test_a_new_field_is_checked_by_its_limits_and_choices():
    with pytest.raises(CandidatesError, match="margin_rate=2: give a number from 0 to 1"):
        Widened(margin_rate=2).check()
    with pytest.raises(CandidatesError, match="calendar='moon': choose one of all, weekdays"):
        Widened(calendar="moon").check()


def test_a_new_field_of_outcomes_is_one_that_a_q_scorer_notes():
    assert {*names_of(Widened, OUTCOMES)} - {*names_of(CoveredCallCandidatesConfig, OUTCOMES)} == {"margin_rate"}


def test_a_new_field_is_part_of_the_cache_key(path, tmp_path):
    options = {"data_files": path, "cache_dir": str(tmp_path / "arrow"), "config_name": "per_candidate"}
    folders = {WideBuilder(**options, **more).cache_dir for more in ({}, {"margin_rate": 0.2}, {"margin_rate": 0.3})}
    assert len(folders) == 3


@pytest.mark.parametrize("one", options_of(CoveredCallCandidatesConfig), ids=lambda one: one.name)
def test_each_option_says_what_it_does_and_takes_its_own_default(one):
    assert one.metadata["text"] and one.metadata["placeholder"].isupper()
    check_value(one, one.default)


def test_what_is_typed_goes_before_what_a_model_was_tuned_with(path):
    words = ["--data_files", path, "--splits", "0.5", "0.25", "0.25", "--purge", "false"]
    args = typed(parser(), parser().parse_args(words))
    args.hindsight = False
    recipe = {"data_files": ["gone.csv"], "validation_from": "2024-01-01", "test_from": "2024-02-01", "fee": 0.001}
    backtest = backtest_of(args, recipe | {"candidate_order": "shuffle"})  # of the training split alone
    options = backtest.options
    assert backtest.files == [path] and options.splits == (0.5, 0.25, 0.25) and options.validation_from is None
    assert (options.fee, options.purge, options.candidate_order) == (0.001, False, "instrument")
