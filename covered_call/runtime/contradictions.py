"""What in an agent.yaml speaks against something else in it: each key is fine by itself, and together they do nothing
of what their reader expects."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from covered_call.runtime.fusion import Fusion
from covered_call.runtime.risk import WEEKDAYS, RiskRules
from covered_call.runtime.sizing import STEPS, SizingRules

LANGUAGE_MODELS = ("llm", "openai")
# Which rule a limit is of.
LIMITS = {
    "max_positions": "max_positions", "expiry_share": "expiry_exposure", "max_margin_pct": "margin",
    "max_net_delta": "net_delta", "daily_drawdown_pct": "daily_drawdown", "max_drawdown_pct": "dd_buffer",
    "dd_buffer": "dd_buffer", "consecutive_losses": "consecutive_losses", "min_win_rate": "win_rate",
    "win_rate_trades": "win_rate", "min_trades": "win_rate", "max_spread_pct": "spread",
    "min_open_interest": "open_interest", "min_premium_usd": "no_bid", "max_iv": "max_iv", "min_iv": "min_iv",
    "min_ivrv": "min_ivrv", "near_level": "near_level", "near_level_pct": "near_level",
    "blocked_hours": "blocked_hours", "blocked_weekdays": "blocked_hours", "max_age_s": "stale",
    "max_clock_skew_s": "stale", "drift_stops": "drift",
}  # fmt: skip
LLM_WEIGHT_MODES = ("rules", "learned")  # learned is rules until it has learned


def contradictions(
    policies: Collection[str],
    holdings: Mapping[str, float],
    fusion: Mapping[str, Any],
    sizing: Mapping[str, Any],
    risk: Mapping[str, Any],
    querying: Mapping[str, Any],
) -> list[str]:
    """One sentence each, which says what to do; the sections are as they were given, without defaults."""
    found = [*of_policies(policies, querying), *of_fusion(policies, fusion), *of_sizing(holdings, sizing)]
    return [*found, *of_risk(risk)]


def of_policies(policies: Collection[str], querying: Mapping[str, Any]) -> Iterator[str]:
    if querying and not set(policies) & set(LANGUAGE_MODELS):
        yield "querying says when a language model is asked, and policy has none: leave it out, or add llm or openai."


def of_fusion(policies: Collection[str], given: Mapping[str, Any]) -> Iterator[str]:
    rules = Fusion(**given)
    models = [name for name in LANGUAGE_MODELS if name in policies]
    named = {"llm": given.get("llm"), "second": rules.second, **{f"weights.{name}": name for name in rules.weights}}
    for key, name in named.items():
        if name is not None and name not in policies:
            yield f"fusion.{key} is {name}, and policy has no such one: name one of {', '.join(policies)}."
    if rules.mode != Fusion.mode and len(policies) < 2:
        yield f"fusion.mode is {rules.mode}, and policy has one entry: add another, or leave fusion out."
    elif rules.mode not in (Fusion.mode, "ensemble") and not models:
        yield f"fusion.mode is {rules.mode}, and policy has no language model: add llm or openai, or take ensemble."
    elif models and rules.mode != "ensemble" and len(policies) > 2 and rules.second is None:
        others = ", ".join(name for name in policies if name != given.get("llm", models[0]))
        yield f"fusion.second is open, and policy has {others} beside the language model: name one, or take ensemble."
    if rules.second is not None and rules.second == given.get("llm", (models or [""])[0]):
        yield f"fusion.second is {rules.second}, which is the language model itself: name another."
    for key in ("weights", "average"):
        if key in given and rules.mode != "ensemble":
            yield f"fusion.{key} is for the mode ensemble, and mode is {rules.mode}: leave it out, or change the mode."
    if "llm_weight" in given and rules.mode not in LLM_WEIGHT_MODES:
        modes = " and ".join(LLM_WEIGHT_MODES)
        yield f"fusion.llm_weight is for the modes {modes}, and mode is {rules.mode}: leave it out."
    if rules.mode == "ensemble" and not any(rules.weights.get(name, 1.0) for name in policies):
        yield "fusion.weights are all 0: nobody would have a vote. Give one of them more."


def of_sizing(holdings: Mapping[str, float], given: Mapping[str, Any]) -> Iterator[str]:
    rules = SizingRules(**given)
    for key, method in (("units", "fixed"), ("share", "holdings_share"), ("payoff", "half_kelly")):
        if key in given and rules.method != method:
            yield f"sizing.{key} is for the method {method}, and method is {rules.method}: leave it out."
    if not any(holdings.values()):
        yield "holdings are all 0: there is nothing to sell calls against. Give coins."
    for name in holdings:
        step = STEPS.get(name) if rules.step is None else rules.step
        if step is None:
            yield f"sizing.step: the least contract of {name} is not known here: give it in coins."
        elif rules.method == "fixed" and "units" in given and rules.units < step:
            yield f"sizing.units is {rules.units:g}, and the least contract of {name} is {step:g}: give at least that."


def of_risk(given: Mapping[str, Any]) -> Iterator[str]:
    rules = RiskRules(**given)
    for key in given:
        if LIMITS.get(key) in rules.without:
            yield f"risk.{key} is given, and risk.without leaves out its rule {LIMITS[key]}: take one of them away."
    if rules.min_iv is not None and rules.max_iv is not None and rules.min_iv > rules.max_iv:
        yield f"risk.min_iv is {rules.min_iv:g}, and risk.max_iv is {rules.max_iv:g}: no vol keeps both. Swap them."
    if rules.min_trades > rules.win_rate_trades:
        yield (
            f"risk.min_trades is {rules.min_trades:g}, and risk.win_rate_trades looks at {rules.win_rate_trades:g}: "
            "the rule would never apply. Give fewer min_trades."
        )
    if len(set(rules.blocked_hours)) == 24 or len(set(rules.blocked_weekdays)) == len(WEEKDAYS):
        yield "risk.blocked_hours or blocked_weekdays block all there are: for that there is kill_switch: true."
    if "near_level_pct" in given and not rules.near_level:
        yield "risk.near_level_pct is given, and near_level is off: add near_level: true, or leave it out."
