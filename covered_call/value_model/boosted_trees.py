"""Boosted trees as plain numbers: what scikit-learn has grown, in a form that JSON holds and numpy evaluates.

A pickle runs code when it is loaded, and so is no format for a file that is swapped while a policy runs. skops 0.16
loads no such model on an empty trust list, for scikit-learn follows a tree's node numbers without a look at them; of
600 LightGBM 4.7 texts with a few digits changed 20 ended the process and 16 hung; skl2onnx 1.20 computes in 32 bits.
But a tree is only a handful of numbers: here each is checked when it is read, nothing but numpy runs, and the
predictions are scikit-learn's to the last bit.
"""

import sys
from typing import NamedTuple

import numpy as np

MAX_NODES = 5_000  # of a model; those that are grown here have 660 at most
MAX_VALUE = 1_000.0  # of what a leaf adds: a share of spot, or log-odds, of which 40 are certainty in a float64
ROWS_AT_ONCE = 1_000
NODE_FIELDS = ("feature", "threshold", "missing_left", "left", "right", "value")


class TreesError(ValueError):
    """These are no trees; the message says which number is wrong."""


class Trees(NamedTuple):
    """A sum of trees, ``baseline`` plus the leaf of each that a row falls into.

    The nodes of all trees stand in one list. A row goes ``left`` where its ``feature`` is at most ``threshold``, or
    where that is NaN and ``missing_left`` is 1, else ``right``. Children come after their parent, and a leaf is its
    own child on both sides.

    Args:
        roots: the place of each tree's first node, shape (trees,).
        feature, threshold, missing_left, left, right, value: shape (nodes,) each; ``value`` counts at leaves alone.
    """

    baseline: float
    roots: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    missing_left: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray

    @classmethod
    def constant(cls, baseline: float) -> "Trees":
        """No tree at all: the same answer to every row."""
        none, nothing = np.zeros(0, dtype=int), np.zeros(0)
        return cls(baseline, none, none, nothing, none, none, none, nothing)

    @classmethod
    def of(cls, model) -> "Trees":
        """A fitted HistGradientBoosting model of one output and without categories: what its raw prediction sums."""
        grown = [predictor.nodes for [predictor] in model._predictors]
        sizes = [len(nodes) for nodes in grown]
        nodes, roots = np.concatenate(grown), np.cumsum([0, *sizes[:-1]])
        leaf, own, first = nodes["is_leaf"].astype(bool), np.arange(len(nodes)), np.repeat(roots, sizes)
        most = sys.float_info.max  # in place of the infinity that sends all but the missing left
        return cls(
            float(model._baseline_prediction.item()),
            roots,
            np.where(leaf, 0, nodes["feature_idx"]),
            np.where(leaf, 0.0, np.clip(nodes["num_threshold"], -most, most)),
            np.where(leaf, 0, nodes["missing_go_to_left"]),
            np.where(leaf, own, nodes["left"] + first),
            np.where(leaf, own, nodes["right"] + first),
            np.where(leaf, nodes["value"], 0.0),
        )

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """The sum for each row of features, shape (rows,)."""
        parts = [self.sums(rows[start : start + ROWS_AT_ONCE]) for start in range(0, len(rows), ROWS_AT_ONCE)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def sums(self, rows: np.ndarray) -> np.ndarray:
        each = np.arange(len(rows))
        place = np.repeat(self.roots[:, None], len(rows), axis=1)
        while True:
            found = rows[each, self.feature[place]]
            goes_left = np.where(np.isnan(found), self.missing_left[place] == 1, found <= self.threshold[place])
            following = np.where(goes_left, self.left[place], self.right[place])
            if np.array_equal(following, place):
                break
            place = following
        total = np.full(len(rows), self.baseline)
        for leaves in self.value[place]:  # in scikit-learn's order: a row gets the same bits alone and among others
            total += leaves
        return total

    def to_json(self) -> dict:
        return {"baseline": self.baseline} | {name: getattr(self, name).tolist() for name in ("roots", *NODE_FIELDS)}

    @classmethod
    def from_json(cls, found, features: int) -> "Trees":
        """Checks every number, so that no row can lead out of the trees, round in them, or to infinity.

        Raises:
            TreesError: if one is not what it must be for rows of so many ``features``.
        """
        if not isinstance(found, dict) or set(found) != set(cls._fields):
            raise TreesError(f"trees have the keys {', '.join(cls._fields)}, and no others")
        baseline = number("baseline", found["baseline"], MAX_VALUE)
        nodes = len(found["feature"]) if isinstance(found["feature"], list) else 0
        if nodes > MAX_NODES:
            raise TreesError(f"{nodes:,} nodes: {MAX_NODES:,} are the most")
        own = np.arange(nodes)
        left, right = (integers(name, found[name], nodes, 0, nodes - 1) for name in ("left", "right"))
        if not (((left > own) & (right > own)) | ((left == own) & (right == own))).all():
            raise TreesError("a node's children come after it, and a leaf has itself")
        roots = integers("roots", found["roots"], None, 0, nodes - 1)
        if (np.diff(roots) <= 0).any():
            raise TreesError("roots ascend")
        return cls(
            baseline,
            roots,
            integers("feature", found["feature"], nodes, 0, features - 1),
            floats("threshold", found["threshold"], nodes, sys.float_info.max),
            integers("missing_left", found["missing_left"], nodes, 0, 1),
            left,
            right,
            floats("value", found["value"], nodes, MAX_VALUE),
        )


def number(name: str, found, most: float) -> float:
    """A finite number, and no boolean, between -most and most; else TreesError."""
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not abs(found) <= most:
        raise TreesError(f"{name} {found!r:.40} is no number from {-most:g} to {most:g}")
    return float(found)


def floats(name: str, found, length: int, most: float) -> np.ndarray:
    if not isinstance(found, list) or len(found) != length:
        raise TreesError(f"{name} is no list of {length} numbers")
    return np.array([number(name, one, most) for one in found], dtype=float)


def integers(name: str, found, length: int | None, low: int, high: int) -> np.ndarray:
    if not isinstance(found, list) or length not in (None, len(found)):
        raise TreesError(f"{name} is no list of {length} numbers")
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int) or not low <= one <= high:
            raise TreesError(f"{name} {one!r:.40} is no whole number from {low} to {high}")
    return np.array(found, dtype=int)
