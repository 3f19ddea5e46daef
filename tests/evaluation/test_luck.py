"""Against luck: what is shown of the best of many, and that nothing is shown of outcomes at random."""

import numpy as np
import pytest
from arch.bootstrap import SPA

from covered_call.candidates.decisions import read_decisions
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.evaluation.cases import make_cases
from covered_call.evaluation.luck import LEVEL, against_luck, placebo, reality_check
from covered_call.evaluation.rows import HODL, TEACHER, Row, Trial
from covered_call.resampling import draw


@pytest.mark.parametrize("edge", [0.0, 0.15, 0.5])
def test_the_p_value_of_the_best_is_about_that_of_arch(edge):
    gains = np.random.default_rng(3).normal(size=(300, 6))
    gains[:, 2] += edge
    ours = reality_check(gains, draw(300, 4)).min()
    test = SPA(np.zeros(300), -gains, block_size=4, reps=1000, bootstrap="moving block", seed=0)
    test.compute()
    assert ours == pytest.approx(test.pvalues["consistent"], abs=0.05)
    assert (ours < LEVEL) == (edge > 0)


def test_the_more_are_tried_the_less_one_shows():
    rng = np.random.default_rng(0)
    gains = rng.normal(size=(400, 1)) + 0.15
    alone = reality_check(gains, draw(400, 4))[0]
    among = reality_check(np.concatenate([gains, rng.normal(size=(400, 60))], axis=1), draw(400, 4))[0]
    assert alone < LEVEL < among


def test_what_never_differs_shows_nothing():
    gains = np.zeros((100, 2))
    gains[:, 1] = 1e-3
    assert reality_check(gains, draw(100, 4)).tolist() == [1.0, 1.0]


def many_picks(columns, count: int) -> list[np.ndarray]:
    """A call at random at each decision, or none."""
    rng, sizes = np.random.default_rng(1), np.diff(columns.offsets)
    return [rng.integers(-1, sizes) for _ in range(count)]


def test_on_outcomes_of_other_times_no_policy_is_shown_to_beat_anything(market_of_days):
    decisions = read_decisions([market_of_days], CoveredCallCandidatesConfig())
    columns = decisions.columns()
    cases, places = make_cases(decisions, columns, CoveredCallCandidatesConfig()), np.arange(len(columns))
    times, draws = columns.time, draw(len(columns), 8)
    # The best answer in hindsight is shown to be better, of course; on outcomes that are dealt out anew it is not.
    computed = np.where(np.isnan(cases.computed), -np.inf, cases.computed)
    best = np.array([computed[a:b].argmax() if computed[a:b].max() > 0 else -1
                     for a, b in zip(columns.offsets, columns.offsets[1:], strict=False)])  # fmt: skip
    none = np.full(len(columns), np.nan)
    rows = [Row(TEACHER, columns.chosen, none), Row(HODL, np.full(len(columns), -1), none), Row("best", best, none)]
    trials = [Trial(str(number), picks) for number, picks in enumerate(many_picks(columns, 20))]
    luck = against_luck(rows, trials, rows[2], cases, places, times, draws)
    assert luck.tried == 21 and luck.of("best", HODL) < LEVEL and luck.of("best", TEACHER) < LEVEL
    shown = 0
    for seed in range(20):
        found = against_luck(rows, trials, rows[2], placebo(cases, 8, seed), places, times, draws)
        shown += min(found.of("best", HODL), found.of("best", TEACHER)) < LEVEL
    assert shown <= 3
