"""What a covered-call backtest knows, as chat data sets, a small language model, and a verdict on it in money."""

import importlib

__version__ = "0.2.0"

# Imported when they are asked for: a policy needs torch, which takes seconds, and a load of data does not.
PLACES = {
    "load_candidates": "candidates.builder",
    "CandidatesError": "candidates.schema",
    "Decision": "candidates.schema",
    "Policy": "language_model.policy",
    "PolicyError": "language_model.manifest",
    "QScorer": "value_model.scorer",
    "QScorerError": "value_model.scorer",
}
__all__ = ["__version__", *PLACES]


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"covered_call.{PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
