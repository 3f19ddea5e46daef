"""What would selling this call bring? Gradient boosting on counterfactual outcomes: learning, deciding, and the file.

A regressor predicts each candidate's net outcome (``q_sell``; holding is worth 0), a classifier the probability that
it is positive. The best candidate is sold if both like it enough, else nothing is. Outcomes are learnt as a share of
spot, and thresholds are in % of spot: the same number then means the same at 4,000 and at 100,000 USD, and for any
underlying. What is told of outcomes is in USD a unit of underlying, as everywhere else.
"""

import hashlib
import io
import json
import logging
import math
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from covered_call import atomic
from covered_call.candidates.columns import Columns, columns_of
from covered_call.candidates.data_options import OUTCOME_OPTIONS
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import HOLD_TO_EXPIRY, code_of
from covered_call.candidates.pricing import DAYS_PER_YEAR, black_scholes_call
from covered_call.candidates.prompts import answer_of
from covered_call.candidates.schema import (
    NO_TRADE,
    Decision,
    LoggedDecision,
    checked_decision,
    iso_time,
)
from covered_call.value_model.boosted_trees import Trees, number
from covered_call.value_model.learning import FEATURES, VERSION, Fitted, Gates, Predicted, QScorerError

logger = logging.getLogger(__name__)

FILE_NAME = "q_scorer.zip"
NO_CANDIDATE, OTHER_STYLE, ABOVE_PREMIUM = "no candidate", "unknown exit_style", "above the premium"


class Answer(NamedTuple):
    """What the scorer answers to one decision, after the fashion of a language model's Answer.

    Args:
        pick: the candidate to sell, an index from 0 into the candidates in the order the caller gave them; None for no
            trade.
        instrument: the candidate's, None for NO_TRADE.
        best: the candidate with the highest q_sell, sold or not, an index as ``pick`` is; None where there is none.
        q_sell: its predicted net outcome against holding, in USD a unit of underlying; NaN where there is none.
        confidence: the predicted probability that its net outcome is positive; NaN where there is none.
        scores: q_sell of each candidate, "1" to "N", and NO_TRADE, which is worth 0; USD.
        stopped_by: None if it sold, else what kept it from that: "threshold", "min_confidence", "min_abs_return",
            "no candidate", "above the premium", for a prediction that no outcome can reach (hold_to_expiry), or
            "unknown exit_style", for one that it was not fitted on.
    """

    pick: int | None
    instrument: str | None
    best: int | None
    q_sell: float
    confidence: float
    scores: dict[str, float]
    stopped_by: str | None

    @property
    def answer(self) -> str:
        """The pick as the answer to a ranking: "1" to "N", or "NO_TRADE"."""
        return answer_of(self.pick)


# ---------------------------------------------------------------------------------------------------------------------
# Deciding


def decide(fitted: Fitted, decisions: Sequence[Decision]) -> list[Answer]:
    """As QScorer.decide, of decisions that are taken for valid, as those that were read from files are."""
    columns = columns_of([LoggedDecision(decision, None, ()) for decision in decisions])
    predicted = fitted.predict(columns)
    best, stopped_by = choose(fitted, columns, predicted)
    parts = zip(decisions, columns.offsets.tolist(), best.tolist(), stopped_by.tolist(), strict=False)
    return [answer_to(decision, predicted, *where) for decision, *where in parts]


def answer_to(decision: Decision, predicted: Predicted, begin: int, best: int, stopped_by: str) -> Answer:
    """From what is predicted of its candidates, which stand from ``begin`` on."""
    if best < 0:
        return Answer(None, None, None, math.nan, math.nan, {NO_TRADE: 0.0}, NO_CANDIDATE)
    q_sell = [float(value * decision.spot) for value in predicted.values[begin : begin + len(decision.candidates)]]
    sold = not stopped_by
    return Answer(
        best if sold else None,
        decision.candidates[best].instrument if sold else None,
        best,
        q_sell[best],
        float(predicted.confidences[begin + best]),
        {answer_of(i): value for i, value in enumerate(q_sell)} | {NO_TRADE: 0.0},
        stopped_by or None,
    )


def choose(fitted: Fitted, columns: Columns, predicted: Predicted) -> tuple[np.ndarray, np.ndarray]:
    """(D,) the best candidate's place, -1 where there is none, and (D,) what stops its sale, "" if nothing."""
    best = best_of(columns, predicted)
    rows = (columns.offsets[:-1] + best)[best >= 0]
    stopped_by = np.full(len(columns), NO_CANDIDATE, object)
    stopped_by[best >= 0] = fitted.gates.stop(100 * predicted.values[rows], predicted.confidences[rows])
    learnt = fitted.metadata["outcome_options"]
    if (
        learnt["pricing_iv"] is learnt["iv_file"] is None and learnt["iv_shift"] == 0
    ):  # else premiums are not known here
        impossible = above_premium(columns, predicted, rows, best >= 0)
        stopped_by[np.flatnonzero(best >= 0)[impossible & (stopped_by[best >= 0] == "")]] = ABOVE_PREMIUM
    known = [code_of(columns.names, style) for style in fitted.metadata["exit_styles"]]
    strange = ~np.isin(columns.exit_style, known)  # its outcomes mean something else
    stopped_by[strange & (best >= 0)] = OTHER_STYLE
    return best, stopped_by


def above_premium(columns: Columns, predicted: Predicted, rows: np.ndarray, offered: np.ndarray) -> np.ndarray:
    """(K,) bool: whether what is predicted of these (K,) rows, one for each of the ``offered`` decisions, is more than
    the premium: a call that is held to its expiry cannot bring more, whatever comes."""
    spot = columns.spot[offered]
    strike, dte, iv = (columns.numbers[name][rows] for name in ("strike", "dte", "iv"))
    premium = black_scholes_call(spot, strike, dte / DAYS_PER_YEAR, iv)
    held = columns.exit_style[offered] == code_of(columns.names, HOLD_TO_EXPIRY)
    return held & (predicted.values[rows] * spot > premium)


def picks_of(fitted: Fitted, columns: Columns, predicted: Predicted) -> np.ndarray:
    """(D,) int64 the place of the call that is sold, -1 for no trade."""
    best, stopped_by = choose(fitted, columns, predicted)
    return np.where(stopped_by == "", best, -1)


def best_of(columns: Columns, predicted: Predicted) -> np.ndarray:
    """(D,) int64 the place of the highest value; of equals the more confident, then the higher strike; -1 for none."""
    best, offered = np.full(len(columns), -1), np.diff(columns.offsets) > 0
    if not offered.any():
        return best
    top = np.full(len(columns), np.nan)
    top[offered] = np.maximum.reduceat(predicted.values, columns.offsets[:-1][offered])
    rows = np.flatnonzero(predicted.values == top[columns.decision_of])
    of = columns.decision_of[rows]
    if len(np.unique(of)) < len(of):
        names = np.array(columns.instrument.take(pa.array(rows)).to_pylist(), object)
        rank = np.unique(names, return_inverse=True)[1]
        order = np.lexsort((rank, columns.numbers["strike"][rows], predicted.confidences[rows], of))
        rows, of = rows[order], of[order]
    best[of] = columns.place[rows]  # of several the last is written last
    return best


class QScorer:
    """A policy from a saved file, which it reads again when the file is replaced; ``QScorer(fitted)`` needs no file.

    Args:
        path: the file to watch, if any.
        check_every: seconds between looks at the file's time stamp, at the next ``decide`` after them; 0 looks at
            every one.
        taken: told of each model that is read, with "sha256:" and the hash of its file, before it decides; a
            QScorerError of its refuses the model.
    """

    def __init__(
        self,
        fitted: Fitted,
        path: str | os.PathLike | None = None,
        check_every: float = 60.0,
        taken: Callable[[Fitted, str], None] = lambda fitted, sha256: None,
    ):
        self.fitted, self.path, self.check_every, self.taken = fitted, path, check_every, taken
        self.stamp = stamp(path) if path else None
        self.next_check = monotonic() + check_every

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        check_every: float = 60.0,
        taken: Callable[[Fitted, str], None] = lambda fitted, sha256: None,
    ) -> "QScorer":
        """Raises QScorerError if the file cannot be used: see read, and taken."""
        seen = stamp(path)  # before it is read: if it is replaced meanwhile, the next look sees another stamp
        fitted, sha256 = read_hashed(path)
        taken(fitted, sha256)
        scorer = cls(fitted, path, check_every, taken)
        scorer.stamp = seen
        return scorer

    def decide(self, decisions: Sequence[Decision | dict]) -> list[Answer]:
        """An answer to each decision: the candidate with the highest q_sell, if no gate stops it.

        The candidates may come in any order; of equal ones the more confident is best, then the higher strike. All
        answers of one call are one model's, also when its file is replaced meanwhile. A dict is taken for what
        Decision.from_dict takes.

        Raises:
            CandidatesError: for a decision that could not stand in a CSV.
        """
        fitted = self.current()
        return decide(fitted, [checked_decision(decision, fitted.metadata["max_iv"]) for decision in decisions])

    def current(self) -> Fitted:
        """The models, from the file again if it has been replaced since the last look."""
        if self.path and monotonic() >= self.next_check:
            self.next_check = monotonic() + self.check_every
            seen = stamp(self.path)
            if seen != self.stamp:
                self.stamp = seen  # remembered also where it is broken: one warning, not one at every look
                self.reload(self.path)
        return self.fitted

    def reload(self, path: str | os.PathLike) -> None:
        try:
            fitted, sha256 = read_hashed(path)
            self.taken(fitted, sha256)
            self.fitted = fitted
            logger.info("%s has been replaced, and read again.", path)
        except Exception as error:  # whatever it is: a policy that decides must not stop for a file
            logger.warning("The Q-scorer goes on with the model it has, for its new file is refused. %s", error)


# ---------------------------------------------------------------------------------------------------------------------
# The file: one zip of two JSON texts. Nothing in it is run, and every number in it is checked.
METADATA, MODELS = "metadata.json", "trees.json"
MAX_PART = 16 << 20  # bytes; one that was fitted on the sample has 0.1 MB in all
MAX_OFFSET = 10.0  # shares of spot: a mean outcome of ten times spot is no market's
SHA256 = "trees_sha256"


def save(fitted: Fitted, path: str | os.PathLike) -> None:
    """Whole or not at all: a policy that reads the file meanwhile gets the old one or the new one."""
    atomic.write(path, to_bytes(fitted))


def to_bytes(fitted: Fitted) -> bytes:
    models = json.dumps({"value": fitted.value.to_json(), "positive": fitted.positive.to_json()}, allow_nan=False)
    metadata = fitted.metadata | {SHA256: hashlib.sha256(models.encode()).hexdigest()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in ((METADATA, json.dumps(metadata, indent=2, allow_nan=False)), (MODELS, models)):
            archive.writestr(zipfile.ZipInfo(name), content)  # with no date: the same model is the same file
    return file.getvalue()


def read(path: str | os.PathLike) -> Fitted:
    """A saved scorer; raises as read_hashed."""
    return read_hashed(path)[0]


def read_hashed(path: str | os.PathLike) -> tuple[Fitted, str]:
    """A saved scorer, and "sha256:" with the hash of the very bytes that it was read from.

    Raises:
        QScorerError: if it is not whole, or was made by another version of this file, or holds what cannot be.
    """
    if not os.path.isfile(path):
        raise QScorerError(f"{path} is no file: make one with covered-call q-scorer.")
    try:
        if os.path.getsize(path) > 2 * MAX_PART:
            raise ValueError(f"it has more than {2 * MAX_PART:,} bytes")
        with open(path, "rb") as file:
            content = file.read()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            metadata, models = (read_part(archive, name) for name in (METADATA, MODELS))
        metadata = parse(metadata)
        check_metadata(metadata)
        if hashlib.sha256(models).hexdigest() != metadata.pop(SHA256):
            raise ValueError(f"the sha256 of {MODELS} is not the one that {METADATA} states")
        fitted = Fitted(*read_trees(parse(models), metadata), metadata)
        return fitted, f"sha256:{hashlib.sha256(content).hexdigest()}"
    except Exception as error:  # whatever a zip and JSON of another's making bring about
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise QScorerError(f"{path} is not a whole Q-scorer: {reason[:300].rstrip('.')}. Fit it again.") from None


def read_part(archive: zipfile.ZipFile, name: str) -> bytes:
    if name not in archive.namelist():
        raise KeyError(name)
    size = archive.getinfo(name).file_size
    if size > MAX_PART:
        raise ValueError(f"{name} unpacks to {size:,} bytes: {MAX_PART:,} are the most")
    return archive.read(name)


def parse(text: bytes) -> dict:
    def refuse(constant: str):
        raise ValueError(f"{constant} is no number")

    found = json.loads(text, parse_constant=refuse)
    if not isinstance(found, dict):
        raise ValueError(f"{found!r:.40} is no JSON object")
    return found


def check_metadata(metadata: dict) -> None:
    """Raises ValueError, or KeyError, unless all that is read of it later is there and can be."""
    for name, its, ours in (
        ("version", metadata["version"], VERSION),
        ("features", metadata["features"], FEATURES),
        ("outcome options", sorted(metadata["outcome_options"]), sorted(OUTCOME_OPTIONS)),
        ("gates", sorted(metadata["gates"]), sorted(Gates._fields)),
    ):
        if its != ours:
            raise ValueError(f"it has {name} {its!r:.100}, and this is {ours!r}")
    for name in ("exit_styles", "context"):
        names = metadata.get(name, []) if name == "context" else metadata[name]
        if not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
            raise ValueError(f"{name} {names!r:.100} is no list of names")
    CoveredCallCandidatesConfig(**metadata["outcome_options"]).check()
    number("offset", metadata["offset"], MAX_OFFSET)
    number("max_iv", metadata["max_iv"], sys.float_info.max)
    Gates(**metadata["gates"]).check()
    for split in ("train", "validation"):
        for name in ("from", "to"):
            time = iso_time(metadata[split][name])
            if time is None or time.tzinfo is None:
                raise ValueError(f"{split} {name} {metadata[split][name]!r:.40} is no time with an offset")
        number(f"{split} known", metadata[split]["known"], sys.float_info.max)
        for name, value in metadata[split].get("outcomes", {}).items():  # of none in files of before
            if value is not None:
                number(f"{split} {name}", value, MAX_OFFSET)


def read_trees(models: dict, metadata: dict) -> list[Trees]:
    width = len(FEATURES) - 1 + len(metadata["exit_styles"]) + len(metadata.get("context", ()))
    return [Trees.from_json(models[name], width) for name in ("value", "positive")]


def stamp(path: str | os.PathLike) -> tuple | None:
    """What changes when a file is replaced; None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
