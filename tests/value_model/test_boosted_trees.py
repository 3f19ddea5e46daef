"""Boosted trees as plain numbers, beside scikit-learn's own."""

import json
import math

import numpy as np
import pytest
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from covered_call.value_model.boosted_trees import Trees
from covered_call.value_model.learning import BOOSTING


def test_the_trees_predict_what_scikit_learn_predicts_to_the_last_bit():
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(3_000, 4))
    rows[draw.random(rows.shape) < 0.1] = np.nan
    rows[:, 3] = np.where(np.isnan(rows[:, 3]), np.nan, 1.0)  # on which no split is possible but "missing"
    target = np.nan_to_num(rows[:, 0]) + 3 * np.isnan(rows[:, 3]) + draw.normal(size=len(rows))
    options = BOOSTING | {"min_samples_leaf": 100, "early_stopping": False}
    value = HistGradientBoostingRegressor(**options).fit(rows, target)
    positive = HistGradientBoostingClassifier(**options).fit(rows, target > 0)
    trees = [Trees.from_json(json.loads(json.dumps(Trees.of(model).to_json())), 4) for model in (value, positive)]
    np.testing.assert_array_equal(trees[0].predict(rows), value.predict(rows))
    np.testing.assert_array_equal(expit(trees[1].predict(rows)), positive.predict_proba(rows)[:, 1])
    alone = [trees[0].predict(row[None])[0] for row in rows[:50]]
    np.testing.assert_array_equal(alone, trees[0].predict(rows[:50]))
    assert np.isfinite(trees[0].predict(rows * 1e300)).all()
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="baseline"):
            Trees.from_json(trees[0].to_json() | {"baseline": wrong}, 4)
