"""What the preflight says a training costs."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import on_the_default_stack

from covered_call import tuning
from covered_call.training.cost import count_evaluations, describe_cost
from covered_call.training.runs import of_the_run

pytestmark = on_the_default_stack


def run(**changes) -> SimpleNamespace:
    keys = {"tokens_per_second": None, "price_per_hour": None, "world_size": 1, "eval_strategy": "steps"}
    return SimpleNamespace(**{**keys, "eval_steps": 50, "logging_steps": 10, "num_train_epochs": 1.0, **changes})


# 100 steps of 36 records of 100 tokens; two evaluations of 9 of 18 records of 50; 18 * 50 + 36 * 25 judged twice.
LENGTHS = {"train": np.full(400, 100), "validation": np.full(18, 50), "test": np.full(36, 25)}
LENGTHS["evaluated"] = np.full(9, 50)
ASKED = (100, 36, LENGTHS)


def test_tokens_are_counted_by_phase_and_without_a_measured_speed_hours_are_unknown():
    said = describe_cost(run(), *ASKED)
    assert said.startswith("unknown, for tokens/s were not measured (python benchmarks/gpu_memory.py")
    assert said.endswith("million tokens: training 0.36, evaluations 0.00, final table 0.00")


def test_hours_and_money_have_half_as_much_to_spare():
    said = describe_cost(run(tokens_per_second=1.0, price_per_hour=2.0), *ASKED)
    hours = (360_000 + 900 + 3_600) / 3600
    assert said.startswith(f"{1.5 * hours:.2f} hours with 50% to spare, {3 * hours:.2f} at 2 an hour; at 1 tokens/s")
    assert said.endswith("in hours: training 100.00, evaluations 0.25, final table 1.00")
    on_two = describe_cost(run(tokens_per_second=1.0, world_size=2), *ASKED)
    assert on_two.startswith(f"{0.75 * hours:.2f} hours") and "money unknown: price_per_hour" in on_two
    pairs = describe_cost(run(tokens_per_second=1.0), 100, 36, LENGTHS | {"reference": np.full(10, 360)})
    assert "in hours: reference 1.00, training 100.00" in pairs


@pytest.mark.parametrize(
    "changes, number",
    [({}, 2), ({"eval_steps": 0.25}, 4), ({"eval_steps": None}, 10), ({"eval_strategy": "no"}, 0),
     ({"eval_strategy": "epoch", "num_train_epochs": 2.5}, 3)],
)  # fmt: skip
def test_a_run_evaluates_as_often_as_its_recipe_says(changes, number):
    assert count_evaluations(run(**changes), 100) == number


def test_the_preflight_of_either_stage_says_it_and_it_is_no_part_of_the_run(words, pair_words, capsys):
    for stage, its in (("sft", words), ("dpo", pair_words)):
        tuning.run(stage, [*its, "--dry_run", "--tokens_per_second", "1000", "--price_per_hour", "3"])
        found = re.search(
            r"^cost +([\d.]+) hours with 50% to spare, [\d.]+ at 3 an hour; .*$", capsys.readouterr().out, re.M
        )
        assert found and ("reference" in found[0]) == (stage == "dpo")
    assert of_the_run({"tokens_per_second": 1.0, "price_per_hour": 2.0, "seed": 0}) == {"seed": 0}


@pytest.mark.parametrize("key", ["tokens_per_second", "price_per_hour"])
def test_nothing_and_less_are_refused(words, key):
    with pytest.raises(SystemExit, match=f"{key}: 0 is not above 0: leave it out where it is not known"):
        tuning.train([*words, "--dry_run", f"--{key}", "0"])
