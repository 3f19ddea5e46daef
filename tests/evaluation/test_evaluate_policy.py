"""Metrics against hand-computed cases, money where outcomes are unknown, the report, and the audit."""

import datetime
import errno
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import REAL_DATA, decision, needs_real_data, no_candidates, time, write_csv
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    matthews_corrcoef,
    precision_score,
    recall_score,
)

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.reading import read_candidates
from covered_call.candidates.records import RECORDS
from covered_call.candidates.schema import CandidatesError
from covered_call.data_options import data_options
from covered_call.evaluation import evaluate as evaluate_policy
from covered_call.evaluation import metrics
from covered_call.evaluation import report as evaluation_report
from covered_call.evaluation.baselines import fit_baselines, fit_threshold, highest, scores
from covered_call.evaluation.metrics import METRICS, Played
from covered_call.evaluation.money import (
    Case,
    comparable,
    difference,
    make_cases,
    outcome,
    regret,
    trusted,
    validate,
    validate_styles,
)
from covered_call.language_model.scoring import MemoryFull

NAN = math.nan
OPTIONS = CoveredCallCandidatesConfig()


def day(number: float) -> datetime.datetime:
    return datetime.datetime.fromisoformat(time(number))


def played(teacher: list[int], pick: list[int], **given) -> Played:
    """One decision a day, known and with P&L 0 unless given."""
    size = len(teacher)
    pnl = np.array(given.pop("pnl", [0.0] * size), float)
    pair = pnl if pnl.ndim == 2 else np.stack([pnl, pnl], axis=1)
    base = Played(
        time=np.arange(size),
        teacher=np.array(teacher),
        pick=np.array(pick),
        weight=np.ones(size),
        consistent=np.full(size, NAN),
        probability=np.full(size, NAN),
        known=pair[:, 0] == pair[:, 1],
        pnl=pair,
        regret=np.full(size, NAN),
        minus_teacher=pair,
        minus_best_rule=pair,
    )
    return base._replace(**{name: np.array(value) for name, value in given.items()})


def measured(entries: Played, days: int | None = None) -> dict[str, tuple[float, float]]:
    times = [day(number) for number in range(days or len(entries.time))]
    found = metrics.measure(entries, np.arange(len(times))[None], metrics.month_starts(times))
    return {name: tuple(values[:, 0]) for name, values in found.items()}


# Imitation


def test_every_metric_states_its_direction_and_is_measured():
    assert {metric.better for metric in METRICS.values()} == {"higher", "lower", ""}
    assert set(measured(played([1], [1]))) == set(METRICS)


def test_imitation_by_hand():
    # The teacher sells 1, 1, 2, nothing, nothing; the policy sells 1, 2, nothing, nothing, 1.
    found = measured(played([1, 1, 2, 0, 0], [1, 2, 0, 0, 1]))
    assert found["accuracy"][0] == pytest.approx(2 / 5)
    assert found["balanced_accuracy"][0] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert found["macro_f1"][0] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    # (2 * 5 - (2*2 + 2*2 + 1*1)) / sqrt((25 - 9) * (25 - 9))
    assert found["mcc"][0] == pytest.approx(1 / 16)
    assert found["sell_precision"][0] == pytest.approx(1 / 3)
    assert found["sell_recall"][0] == pytest.approx(1 / 3)
    assert found["top_1"][0] == pytest.approx(1 / 2)
    assert found["trade_rate"][0] == pytest.approx(3 / 5)


@pytest.mark.filterwarnings("ignore:A single label")
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_imitation_is_what_scikit_learn_says(pairs):
    teacher, pick = map(list, zip(*pairs, strict=True))
    found = {name: values[0] for name, values in measured(played(teacher, pick)).items()}
    assert found["accuracy"] == pytest.approx(accuracy_score(teacher, pick))
    assert found["macro_f1"] == pytest.approx(f1_score(teacher, pick, average="macro", zero_division=0))
    assert found["mcc"] == pytest.approx(matthews_corrcoef(teacher, pick))
    # Not balanced_accuracy_score itself, which warns of answers that only the policy gave.
    given_by_teacher = sorted(set(teacher))
    assert found["balanced_accuracy"] == pytest.approx(
        recall_score(teacher, pick, labels=given_by_teacher, average="macro", zero_division=0)
    )
    if set(pick) <= set(teacher):
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(teacher, pick))
    sells = {"labels": [1, 2, 3], "average": "micro", "zero_division": np.nan}
    assert found["sell_precision"] == pytest.approx(precision_score(teacher, pick, **sells), nan_ok=True)
    assert found["sell_recall"] == pytest.approx(recall_score(teacher, pick, **sells), nan_ok=True)


def test_a_policy_that_draws_is_an_expectation():
    # Two decisions of one candidate: NO_TRADE or 1, at even odds; the teacher sold once.
    entries = played([1, 1, 0, 0], [0, 1, 0, 1], time=[0, 0, 1, 1], weight=[0.5] * 4, pnl=[0.0, 10.0, 0.0, -4.0])
    found = measured(entries, days=2)
    assert found["accuracy"][0] == 0.5
    assert found["trade_rate"][0] == 0.5
    assert found["total_pnl"] == (3.0, 3.0)
    assert found["hit_rate"][0] == 0.5


def test_calibration_error_by_hand():
    # 0.95 and 0.95: one right of two, gap 0.45; 0.3: right, gap 0.7.
    found = measured(played([1, 1, 1], [1, 2, 1], probability=[0.95, 0.95, 0.3]))
    assert found["calibration_error"][0] == pytest.approx((2 * 0.45 + 0.7) / 3)


def test_a_probability_of_one_is_in_the_last_bin():
    assert measured(played([1], [1], probability=[1.0]))["calibration_error"][0] == 0.0


def test_permutation_consistency_leaves_out_what_was_not_tried():
    assert measured(played([1, 1, 1], [1, 1, 1], consistent=[1.0, 0.0, NAN]))["permutation_consistency"][0] == 0.5


# Money


def test_money_by_hand():
    # 2024-09-01 to -30 and then October: a gain, two losses, nothing sold, and a gain in October.
    pnl = [100.0, -300.0, -50.0, 0.0] + [0.0] * 26 + [70.0]
    pick = [1, 1, 1, 0] + [0] * 26 + [1]
    found = measured(played(pick, pick, pnl=pnl, regret=[NAN, 30.0, 10.0] + [NAN] * 28))
    assert found["total_pnl"] == (-180.0, -180.0)
    assert found["mean_pnl"][0] == pytest.approx(-180 / 31)
    assert found["worst_month"] == (-250.0, -250.0)
    assert found["max_drawdown"] == (350.0, 350.0)
    assert found["hit_rate"][0] == 0.5
    assert found["mean_regret"][0] == 20.0
    assert found["coverage"][0] == 1.0


def test_a_drawdown_may_begin_at_zero():
    assert measured(played([1], [1], pnl=[-5.0]))["max_drawdown"] == (5.0, 5.0)


def test_unknown_outcomes_are_bounds_and_never_zero():
    found = measured(played([1, 1], [1, 2], pnl=[[10.0, 10.0], [-100.0, 40.0]]))
    assert found["coverage"][0] == 0.5
    assert found["total_pnl"] == (-90.0, 50.0)
    assert found["mean_pnl"] == (-45.0, 25.0)
    assert found["mean_pnl_known"][0] == 10.0
    assert found["hit_rate"][0] == 1.0
    assert found["worst_month"] == (-90.0, 50.0)
    assert found["max_drawdown"] == (0.0, 100.0)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0, 1)), min_size=1, max_size=20))
def test_bounds_hold_whatever_the_unknown_outcome_was(triples):
    pnl = [sorted(pair[:2]) for pair in triples]
    truth = [low + share * (high - low) for (low, high), (*_, share) in zip(pnl, triples, strict=True)]
    sold = [1] * len(pnl)
    bounds, true = measured(played(sold, sold, pnl=pnl)), measured(played(sold, sold, pnl=truth))
    for name in ("total_pnl", "mean_pnl", "worst_month", "max_drawdown"):
        assert bounds[name][0] - 1e-6 <= true[name][0] <= bounds[name][1] + 1e-6


def logged(rows: list[dict], tmp_path):
    return read_candidates([write_csv(tmp_path / "a.csv", rows)], OPTIONS)


def hold(number: float, spot: float, sold=None, **cells) -> list[dict]:
    cells = {"exit_style": "hold_to_expiry", "spot": spot, "strikes": (100, 110), "dte": 7.0, "iv": 0.5} | cells
    return decision(number, sold, **cells)


def test_without_iv_an_untaken_call_is_unknown(tmp_path):
    rows = hold(0, 100.0, 0, pnl_vs_hodl=0.0, iv="") + hold(7, 108.0, iv="")
    rows[0]["pnl_vs_hodl"] = "3.5"
    case = make_cases(logged(rows, tmp_path))[0]
    assert (outcome(case, 0), outcome(case, 1), outcome(case, None)) == (3.5, None, 0.0)


@pytest.mark.parametrize("style", ["tp_and_roll", "hold_to_expiry"])
@pytest.mark.parametrize("off", [1.0, -1.0])
def test_a_replay_counts_only_if_it_follows_the_recorded_trades(style, off):
    """Settling at expiry is no guess at a rule: there, a bad correlation is flagged, and the outcomes stay."""
    cases = [case(0, value, (off * value, 2.0), style=style) for value in (1.0, 5.0, -9.0)]
    found = validate_styles(cases)
    kept = trusted(cases, found)[0].computed
    assert kept == ((None, None) if off < 0 and style == "tp_and_roll" else (off, 2.0))
    assert ("count as unknown" in found[style].sentence(style)) == (kept == (None, None))
    assert ("WARNING" in found[style].sentence(style)) == (off < 0 and style == "hold_to_expiry")


def test_with_costs_all_outcomes_are_computed_ones(tmp_path):
    """A recorded outcome knows of no cost: beside net ones, the teacher would look better than it is."""
    entries = logged(hold(0, 100.0, 0) + hold(7, 108.0, 0), tmp_path)
    gross, net = comparable(make_cases(entries), OPTIONS), comparable(make_cases(entries), replace(OPTIONS, fee=0.001))
    assert (outcome(gross[0], 0), outcome(net[0], 0)) == (744.26, entries[0].counterfactuals[0].pnl_vs_hodl)


def test_bounds_are_the_extremes_recorded_that_year_or_else_in_all_years(tmp_path):
    rows = []
    for number, pnl in ((0, -7.0), (1, 5.0), (130, 9.0)):  # two in 2024, one in 2025
        rows += decision(number, 0, pnl_vs_hodl=pnl)
    rows += decision(500)
    cases = make_cases(logged(rows, tmp_path))
    assert [(case.worst, case.best) for case in cases] == [(-7.0, 5.0), (-7.0, 5.0), (9.0, 9.0), (-7.0, 9.0)]


def case(chosen, recorded, computed, worst=-100.0, best=50.0, style="hold_to_expiry") -> Case:
    class Stub(NamedTuple):
        exit_style: str = style

    return Case(Stub(), chosen, recorded, computed, worst, best)


def test_the_recorded_outcome_stands_where_policy_and_teacher_agree():
    assert outcome(case(0, 10.0, (12.0, 30.0)), 0) == 10.0
    assert outcome(case(0, 10.0, (12.0, 30.0)), 1) == 30.0
    assert outcome(case(0, None, (12.0, 30.0)), 0) == 12.0


def test_differences_compare_like_with_like():
    both = case(0, 10.0, (12.0, 30.0))
    assert difference(both, 0, 0) == (0.0, 0.0)
    assert difference(both, 1, 0) == (18.0, 18.0)  # 30 - 12, both computed
    assert difference(both, None, 0) == (-10.0, -10.0)  # recorded
    assert difference(both, 1, None) == (30.0, 30.0)


def test_a_difference_with_an_unknown_outcome_is_bounds():
    unknown = case(0, 10.0, (None, None))
    assert difference(unknown, 0, 0) == (0.0, 0.0)
    assert difference(unknown, 1, 0) == (-110.0, 40.0)
    assert difference(unknown, 1, None) == (-100.0, 50.0)


def test_regret_is_against_the_best_answer_and_unknown_where_one_is():
    assert regret(case(0, 10.0, (12.0, 30.0)), 0) == 18.0
    assert regret(case(0, 10.0, (12.0, 30.0)), None) == 30.0
    assert regret(case(0, 10.0, (-12.0, -30.0)), 1) == 30.0
    assert math.isnan(regret(case(0, 10.0, (12.0, None)), 0))
    assert regret(case(None, None, ()), None) == 0.0


def test_the_formula_is_validated_and_a_bad_one_flagged():
    good = [case(0, value, (value + 1.0,)) for value in (1.0, 5.0, -9.0)]
    found = validate(good)
    assert (found.trades, found.median_error, found.median_outcome) == (3, 1.0, 5.0)
    assert found.mean_error == pytest.approx(1.0) and found.correlation == pytest.approx(1.0)
    assert "WARNING" not in found.sentence("hold_to_expiry")
    bad = [case(0, value, (other,)) for value, other in ((1.0, 5.0), (5.0, 1.0), (2.0, 2.0))]
    assert "WARNING: the correlation is below 0.95" in validate(bad).sentence("hold_to_expiry")
    assert "WARNING" in validate(good[:1]).sentence("hold_to_expiry")  # one trade shows nothing
    assert "unchecked" in validate([case(None, None, ())]).sentence("hold_to_expiry")


# Intervals


def test_a_block_spans_the_longest_life():
    times = [day(number) for number in range(30)]
    assert metrics.block_length(times, datetime.timedelta(days=7)) == 8
    hours = [day(number / 24) for number in range(300)]
    assert metrics.block_length(hours, datetime.timedelta(days=7)) == 169
    assert metrics.block_length([day(0), day(30)], datetime.timedelta(days=7)) == 1


def test_too_few_blocks_give_no_interval():
    assert metrics.resample(39, 8) is None
    assert metrics.resample(40, 8, replicates=3).shape == (3, 40)


def test_resamples_are_runs_of_consecutive_times_and_repeat():
    drawn = metrics.resample(40, 8, replicates=20)
    assert (np.diff(drawn.reshape(20, 5, 8), axis=2) == 1).all()
    assert np.array_equal(drawn, metrics.resample(40, 8, replicates=20))


def test_blocks_widen_the_interval_of_outcomes_that_overlap():
    sold, pnl = [1] * 240, np.repeat(np.random.default_rng(0).normal(size=30), 8) * 100
    times = [day(number) for number in range(240)]
    widths = []
    for block in (1, 8):
        low, high = metrics.figures(played(sold, sold, pnl=pnl), times, block)["mean_pnl"].interval
        assert low < pnl.mean() < high
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_a_metric_that_is_not_defined_has_no_interval():
    found = metrics.figures(played([0] * 60, [0] * 60), [day(number) for number in range(60)], 8)
    assert math.isnan(found["hit_rate"].low) and found["hit_rate"].interval is None


# Baselines


def test_the_threshold_is_fitted_halfway_between_scores(tmp_path):
    rows = []
    for number, (top, sold) in enumerate([(2.0, None), (2.9, None), (3.1, 0), (5.0, 0)]):
        rows += decision(number, sold, strikes=(1,), score=top)
    train = logged(rows, tmp_path)
    assert fit_threshold(scores, train) == pytest.approx(3.0)
    assert fit_threshold(scores, train[2:]) == -math.inf
    assert fit_threshold(scores, train[:2]) == math.inf


def test_a_decision_without_candidates_is_never_sold(tmp_path):
    rows = decision(0, 0) + decision(1, 0) + [no_candidates(2)]
    entries = logged(rows, tmp_path)
    for name, policy in fit_baselines(entries).items():
        assert policy([entry.decision for entry in entries])[2] is None, name


def test_baselines_pick_as_their_names_say(tmp_path):
    entries = logged(decision(0, 2) + decision(1, 2) + decision(2, 0, strikes=(1, 2)), tmp_path)
    baselines = fit_baselines(entries)
    decisions = [entry.decision for entry in entries]
    assert baselines["majority answer"](decisions) == [2, 2, 0]  # the third decision has no third candidate
    assert baselines["first candidate"](decisions) == [0, 0, 0]
    assert highest(scores)(decisions) == [0, 0, 0]


def test_without_a_trade_to_learn_from_baselines_say_so(tmp_path):
    with pytest.raises(CandidatesError, match="no baseline can be fitted"):
        fit_baselines(logged(decision(0), tmp_path))


def test_a_column_that_is_blank_throughout_is_no_obstacle(tmp_path):
    entries = logged([row for number in range(9) for row in decision(number, 0, iv="", ivrv_ratio="")], tmp_path)
    assert fit_baselines(entries)["gradient boosting"]([entry.decision for entry in entries]) == [0] * 9


# The command


class Answer(NamedTuple):
    answer: str
    probability: float = 0.9


class Stub:
    """A model that sells the candidate with the highest score, if there is one, at 0.9."""

    def __init__(self, recipe=None, until="2024-09-10T00:00:00+00:00"):
        self.manifest = {"recipe": recipe or {}, "splits": {"train": {"to": until}}}
        self.task, self.candidate_order = "per_decision_ranking", "instrument"

    def decide(self, decisions):
        picks = highest(scores)(decisions)
        return [Answer("NO_TRADE" if pick is None else str(pick + 1)) for pick in picks]


class FirstShown(Stub):
    """Sells what its prompt shows first; like the real policy, it shows its own order unless told not to."""

    def decide(self, decisions):
        own = [
            0 if self.candidate_order == "csv" else min(range(len(d.candidates)), key=lambda i, d=d: d.candidates[i])
            for d in decisions
        ]
        return [Answer(str(pick + 1)) for pick in own]


def test_a_ranking_model_is_shuffled_in_its_prompts_and_not_only_by_the_caller(tmp_path):
    entries = logged([row for number in range(30) for row in decision(number, 0)], tmp_path)
    model = FirstShown()
    row = evaluate_policy.model_row(model, entries)
    assert row.picks == [0] * 30 and model.candidate_order == "instrument"
    assert np.mean(row.consistent) < 0.2  # (1 / 3) ** 4 is expected
    model.task = "per_candidate"
    assert evaluate_policy.model_row(model, entries).consistent == [1.0] * 30


@pytest.fixture
def backtest(tmp_path) -> str:
    """120 days of both exit styles; the teacher sells the best score from 3.0, and every seventh score is lower."""
    rows = []
    for number in range(120):
        for style in ("hold_to_expiry", "tp_and_roll"):
            low = number % 7 == 0
            cells = {"exit_style": style, "spot": 60000 + 10 * number, "pnl_vs_hodl": 100 - number}
            made = decision(number, None if low else number % 2, **cells)
            for index, row in enumerate(made):
                row["score"] = (2.0 if low else 4.0) - abs(index - number % 2)
            rows += made
    return write_csv(tmp_path / "backtest.csv", rows)


def use(monkeypatch, load_model) -> None:
    """``load_model`` in the place of a tuned model's folder."""
    monkeypatch.setattr(evaluate_policy, "read_manifest", lambda _: {"recipe": {}})
    monkeypatch.setattr(evaluate_policy, "load_model", load_model)


def run(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        evaluate_policy.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out


@pytest.mark.parametrize("given, expected", [([], None), (["--batch_tokens", "900"], 900)])
def test_the_model_reads_as_many_tokens_at_once_as_it_is_told(
    backtest, tmp_path, capsys, monkeypatch, given, expected
):
    loaded = []
    use(monkeypatch, lambda *options: loaded.append(options) or Stub())
    options = ["--model", "out/x", "--data_files", backtest, "--output_dir", tmp_path / "report", *given]
    assert run(capsys, *options)[0] == 0
    assert loaded == [("out/x", expected)]
    assert run(capsys, *options, "--batch_tokens", "0")[0] == 2


def test_a_gpu_that_is_full_is_a_plain_error(backtest, tmp_path, capsys, monkeypatch):
    def load_model(*_):
        raise MemoryFull("The memory is full")

    use(monkeypatch, load_model)
    assert run(capsys, "--model", "out/x", "--data_files", backtest)[0] == "error: The memory is full"


def test_the_table_has_a_row_for_each_policy_best_first(backtest, tmp_path, capsys, monkeypatch):
    use(monkeypatch, lambda *_: Stub())
    out = tmp_path / "report"
    status, printed = run(capsys, "--model", "out/x", "--data_files", backtest, "--output_dir", out)
    assert status == 0
    found = json.loads((out / "metrics.json").read_text())
    assert found["metrics_version"] == metrics.VERSION and set(found["definitions"]) == set(METRICS)
    overall = [group for group in found["groups"] if group["group"] == "all"]
    assert [group["exit_style"] for group in overall] == ["hold_to_expiry", "tp_and_roll"]
    for group in overall:
        names = list(group["rows"])
        assert set(names) == {
            "model", "teacher", "never sell (HODL)", "random (expected)", "majority answer", "first candidate",
            "highest score", "score rule", "logistic regression", "gradient boosting", "Q-scorer",
        }  # fmt: skip
        accuracies = [group["rows"][name]["accuracy"]["value"] for name in names[:-2]]
        assert accuracies == sorted(accuracies, reverse=True)
        assert group["rows"]["score rule"]["accuracy"]["value"] == 1.0
        assert group["rows"]["model"]["permutation_consistency"]["value"] == 1.0
        assert group["rows"]["first candidate"]["permutation_consistency"]["value"] < 1.0
        assert all(name in printed for name in names)
    steps = ["Reading 1 file(s)", "Fitting the base", *(f"pass {one} of 5" for one in range(1, 6)), "Judging 11 polic"]
    places = [printed.index(step) for step in [*steps, "best rule is", f"Saved in {out}", "Next: "]]
    assert places == sorted(places)  # a long run says what it does, and a finished one where things are
    assert f"publish.py --adapter out/x USER/NAME --report {out / 'metrics.json'}" in printed
    report = (out / "report.md").read_text()
    assert str(tmp_path) not in report + (out / "metrics.json").read_text()
    for plot in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (out / plot).stat().st_size > 10_000
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.png", "equity_hold_to_expiry.png", "equity_tp_and_roll.png", "metrics.json", "q_scorer.png",
        "report.md",
    ]  # fmt: skip


def test_tp_and_roll_without_counterfactuals_has_bounds(backtest, tmp_path, capsys):
    out = tmp_path / "report"
    run(capsys, "--baselines-only", "--split", "train", "--data_files", backtest, "--output_dir", out)
    [group] = [g for g in json.loads((out / "metrics.json").read_text())["groups"] if g["exit_style"] == "tp_and_roll"
               and g["group"] == "all"]  # fmt: skip
    first = group["rows"]["first candidate"]
    assert first["coverage"]["value"] < 1 and first["mean_pnl"]["value"] is None
    assert first["mean_pnl"]["low"] < first["mean_pnl"]["high"]
    assert first["mean_regret"]["value"] is None
    interval = first["mean_pnl"]["interval"]
    assert interval[0] <= first["mean_pnl"]["low"] and first["mean_pnl"]["high"] <= interval[1]
    never = group["rows"]["never sell (HODL)"]
    assert (never["total_pnl"]["value"], never["coverage"]["value"]) == (0.0, 1.0)


def test_years_and_the_time_after_the_cutoff_are_judged_apart(backtest, tmp_path, capsys):
    out = tmp_path / "report"
    options = ("--baselines-only", "--split", "train", "--splits", "train", "--data_files", backtest)
    run(capsys, *options, "--output_dir", out, "--cutoff", "2024-12-01")
    groups = json.loads((out / "metrics.json").read_text())["groups"]
    counts = {group["group"]: group["decisions"] for group in groups if group["exit_style"] == "tp_and_roll"}
    assert counts == {"all": 120, "2024": 120, "after 2024-12-01": 28}


def test_a_cutoff_that_is_no_date_is_refused(backtest, capsys):
    status, _ = run(capsys, "--baselines-only", "--data_files", backtest, "--cutoff", "soon")
    assert status == "error: --cutoff soon: give a date such as 2024-01-01."


def test_decisions_that_the_model_may_have_learnt_are_told(backtest, tmp_path, capsys, monkeypatch):
    use(monkeypatch, lambda *_: Stub(until="2024-12-25T00:00:00+00:00"))
    _, printed = run(capsys, "--model", "x", "--data_files", backtest, "--output_dir", tmp_path / "report")
    assert "not later than the model's training decisions, which end on 2024-12-25" in printed


def test_the_data_are_those_of_the_recipe_unless_the_command_line_says_other(backtest):
    recipe = {"data_files": [backtest], "splits": [0.5, 0.2, 0.3], "exit_style": "tp_and_roll", "purge": None,
              "candidate_order": "shuffle", "lora_r": 4}  # fmt: skip
    asked = evaluate_policy.parse_arguments(["--model", "x"])
    files, config = data_options(asked, recipe)
    assert (files, config.splits, config.exit_style) == ([backtest], [0.5, 0.2, 0.3], "tp_and_roll")
    assert config.candidate_order == "instrument"  # only the training split is shuffled
    asked = evaluate_policy.parse_arguments(
        ["--model", "x", "--validation-from", "2024-10-01", "--test_from", "2024-11-01", "--purge", "false"]
    )
    _, config = data_options(asked, recipe)
    assert (config.validation_from, config.test_from, config.purge) == ("2024-10-01", "2024-11-01", False)


def test_an_empty_split_is_an_error_that_says_so(tmp_path, capsys):
    path = write_csv(tmp_path / "short.csv", decision(0, 0))
    status, _ = run(capsys, "--baselines-only", "--data_files", path)
    assert status.startswith("error: The test split is empty")


def test_nothing_half_written_is_left_when_the_report_fails(backtest, tmp_path, capsys, monkeypatch):
    out = tmp_path / "report"
    monkeypatch.setattr(evaluation_report, "report_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_policy.main(["--baselines-only", "--data_files", backtest, "--output_dir", str(out)])
    assert list(tmp_path.iterdir()) == [Path(backtest)]


def test_what_is_wrong_is_said_before_a_model_is_loaded_or_a_file_read(backtest, tmp_path, capsys, monkeypatch):
    use(monkeypatch, lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(evaluate_policy, "read_splits", lambda *_: pytest.fail("read"))
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.zip").write_text("no zip")
    for more, message in (
        (["--cutoff", "soon"], "--cutoff soon: give a date"),
        (["--data_files", str(tmp_path / "none.csv")], "No file matches .*none.csv"),
        (["--fee", "2"], "--fee 2.0: give a number from 0 to 1"),
        (["--q_scorer", str(tmp_path / "none.zip")], "none.zip is no file"),
        (["--q_scorer", str(tmp_path / "broken.zip")], "broken.zip is not a whole Q-scorer"),
        (["--output_dir", str(tmp_path / "file")], "file"),
        (["--output_dir", str(tmp_path / "file" / "report")], "file"),
    ):
        status, _ = run(capsys, "--model", "out/x", "--data_files", backtest, *more)
        assert re.match(f"error: .*{message}", status) and "\n" not in status


def test_a_model_folder_that_is_missing_is_called_missing(backtest, tmp_path, capsys):
    status, _ = run(capsys, "--model", tmp_path / "nowhere", "--data_files", backtest)
    assert re.match("error: There is no folder .*nowhere", status)


def test_an_equity_line_ends_where_it_is_not_known_and_says_what_it_may_come_to():
    times = [day(number) for number in range(3)]
    low, high = np.array([1.0, -50.0, -2000.0]), np.array([1.0, 30.0, 3000.0])
    assert evaluation_report.unknown_from(times, 1, low, high) == (
        " (X: not known from 2024-09-02 on; in the end -2,000 to 3,000)"
    )
    assert evaluation_report.unknown_from(times, 3, low, low) == ""
    assert "nor within what bounds" in evaluation_report.unknown_from(times, 1, low * np.nan, high)


def test_a_report_keeps_nothing_of_another_and_touches_no_other_file(tmp_path):
    names = ("metrics.json", "report.md", "equity_hold_to_expiry.png", "calibration.png", "q_scorer.png")
    (tmp_path / "notes.md").write_text("mine")
    evaluation_report.write_report(tmp_path, dict.fromkeys(names, "old"))
    new = ("metrics.json", "report.md", "equity_tp_and_roll.png")
    evaluation_report.write_report(tmp_path, dict.fromkeys(new, "new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(new, "new") | {
        "notes.md": "mine"
    }


def test_plots_of_yours_in_a_folder_without_a_report_stay(tmp_path):
    (tmp_path / "equity_mine.png").write_text("mine")
    evaluation_report.write_report(tmp_path, {"metrics.json": "{}"})
    assert (tmp_path / "equity_mine.png").read_text() == "mine"


def test_a_full_disk_is_one_line_and_leaves_the_old_report_whole(backtest, tmp_path, capsys, monkeypatch):
    evaluation_report.write_report(tmp_path, {"metrics.json": "old", "report.md": "old"})
    monkeypatch.setattr(evaluate_policy, "judge_all", lambda *_: {"metrics.json": "new", "report.md": "new"})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    status, _ = run(capsys, "--baselines-only", "--data_files", backtest, "--output_dir", tmp_path)
    assert re.match("error: .*metrics.json: No space left on device", status) and "\n" not in status
    assert [(tmp_path / name).read_text() for name in ("metrics.json", "report.md")] == ["old", "old"]
    assert not list(tmp_path.glob(".*"))


# The audit


def test_the_audit_passes_by_default_and_names_the_score_rule(backtest, capsys):
    status, printed = run(capsys, "--audit", "--data_files", backtest)
    assert status == 0
    assert "Passed: no prompt names its answer." in printed
    assert "need have learnt no more than to read that number" in printed
    assert len(re.findall(r"score rule +1\.000 +1\.000 +1\.000", printed)) == 2


def test_the_audit_fails_with_hindsight(backtest, capsys):
    status, printed = run(capsys, "--audit", "--hindsight", "--data_files", backtest)
    assert status == 1
    assert len(re.findall(r"patterns of hindsight +1\.000 +1\.000 +1\.000", printed)) == 2
    assert "FAILED" in printed and "hold the block of hindsight" in printed


def test_the_audit_finds_a_leak_in_words_it_does_not_know(backtest, capsys, monkeypatch):
    original = RECORDS["per_decision_ranking"]

    def leaky(entry, options):
        for record in original(entry, options):
            record["messages"][1]["content"] += f" Psst: {record['label']}"
            yield record

    monkeypatch.setitem(RECORDS, "per_decision_ranking", leaky)
    status, printed = run(capsys, "--audit", "--data_files", backtest)
    assert status == 1
    assert "per_decision_ranking prompts change when labels and outcomes do" in printed


def test_the_audit_finds_the_words_of_an_answer_in_names(tmp_path, capsys):
    rows = [row for number in range(60) for row in decision(number, number % 3 or None)]
    for cells, expected in (({"exit_style": "SELL_CALL BTC"}, 1), ({"instrument": "skip-3"}, 1), ({}, 0),
                            ({"exit_style": "SKIPPERS"}, 0)):  # fmt: skip
        changed = [row | (cells if "exit_style" in cells or not place % 3 else {}) for place, row in enumerate(rows)]
        path = write_csv(tmp_path / "named.csv", changed)
        status, printed = run(capsys, "--audit", "--data_files", path)
        assert status == expected
        assert ("are words of an answer" in printed) == bool(expected)


def test_hindsight_goes_with_the_audit_alone(capsys):
    status, _ = run(capsys, "--baselines-only", "--hindsight")
    assert status == 2


# The real files


def real_files() -> str:
    return str(REAL_DATA / "training_candidates_*.csv")


@needs_real_data
def test_real_trades_are_copied_by_the_score_rule_and_recomputed_by_the_formula(tmp_path):
    files = sorted(map(str, REAL_DATA.glob("training_candidates_*.csv")))
    entries = read_candidates(files, OPTIONS)
    trades = [entry for entry in entries if entry.chosen is not None]
    rule = fit_baselines(entries)["score rule"]
    assert rule([entry.decision for entry in trades]) == [entry.chosen for entry in trades]
    assert len(trades) >= 2 * 122
    found = validate_styles(make_cases(entries))
    assert found["hold_to_expiry"].correlation >= 0.98
    assert not found["tp_and_roll"].follows  # that backtest rolls by another rule than the replay


@needs_real_data
@pytest.mark.parametrize("more, expected", [([], 0), (["--hindsight"], 1)])
def test_the_audit_of_the_real_files(capsys, more, expected):
    status, printed = run(capsys, "--audit", "--data_files", real_files(), *more)
    assert status == expected
    assert re.search(r"score rule, on trades +1\.000 +1\.000 +1\.000", printed)
