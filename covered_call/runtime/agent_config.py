"""agent.yaml: what an agent is made of, each key checked before anything is loaded."""

import dataclasses
import difflib
import hashlib
import json
import math
import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

from covered_call.candidates.data_options import OUTCOME_OPTIONS
from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.outcomes import HOLD_TO_EXPIRY, STYLES
from covered_call.candidates.schema import CandidatesError, is_number, shown
from covered_call.candidates.settlement import ROLL_MIN_SCORE
from covered_call.market.teacher import PRESETS
from covered_call.runtime import exits
from covered_call.runtime.broker import BrokerRules
from covered_call.runtime.contradictions import contradictions
from covered_call.runtime.fusion import Fusion
from covered_call.runtime.policies import Querying
from covered_call.runtime.remote import Remote
from covered_call.runtime.risk import RiskRules
from covered_call.runtime.sizing import SizingRules

POLICIES = {"llm": "a folder that covered-call train saved", "q": "a file, or its folder, that covered-call q-scorer "
    "saved", "rule": "{threshold: SCORE}", "openai": "{base_url: URL, model: NAME}"}  # fmt: skip
SECTIONS: dict[str, Any] = {"fusion": Fusion, "sizing": SizingRules, "risk": RiskRules, "broker": BrokerRules}
PRESETS_OF_CHAINS = tuple(name for name in PRESETS if name != "synthetic")


class ConfigError(ValueError):
    """An agent.yaml cannot be used; the message names file, key and value, and says what to do."""


@dataclass(frozen=True)
class AgentConfig:
    """The keys of agent.yaml.

    Args:
        policy: llm, q, rule and openai, in the order in which one stands in for another that fails. openai is a model
            behind a server: see Remote.
        holdings: coins by underlying.
        fusion: how the proposals of a language model and of what stands beside it become one: see Fusion.
        sizing: how many coins a sale is of: see SizingRules.
        risk: what stops an order: see RiskRules.
        exit: when a call is bought back on paper: see exits.
        preset: which calls of a chain are candidates: see covered-call chain.
        spots: a CSV of daily closes, {underlying} in its name for one each; without it IV/RV is unknown.
        context_vols: a CSV of the market's vols, for policies that were fitted with them: the option of a load.
        iv_lag: hours after its time at which one of them is known, as in that load.
        state_dir: where the logs are, a folder for each mode.
        on_trade: a command that is told of each trade: see Alerts.
        interval: seconds from one live cycle to the next, 1 or more.
        broker: how orders are sent to the testnet: see BrokerRules.
        querying: when the language model is asked: see Querying.
        outcomes: of a replay, the options of outcomes and costs as the other commands have them, such as fee.
    """

    policy: dict[str, Any] = field(default_factory=lambda: {"rule": {"threshold": ROLL_MIN_SCORE}})
    holdings: dict[str, float] = field(default_factory=lambda: {"BTC": 1.0})
    cash_usd: float = 0.0
    fusion: dict[str, Any] = field(default_factory=dict)
    sizing: dict[str, Any] = field(default_factory=dict)
    risk: dict[str, Any] = field(default_factory=dict)
    exit: str = "hold"
    exit_style: str = HOLD_TO_EXPIRY
    preset: str = "backtest"
    spots: str | None = None
    context_vols: str | None = None
    iv_lag: float = CoveredCallCandidatesConfig.iv_lag
    state_dir: str = "out/agent"
    on_trade: str | None = None
    interval: float = 86_400.0
    broker: dict[str, Any] = field(default_factory=dict)
    querying: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[str, Any] = field(default_factory=dict)

    @property
    def rules_of_querying(self) -> Querying:
        return Querying(**self.querying)

    @property
    def options(self) -> CoveredCallCandidatesConfig:
        return CoveredCallCandidatesConfig(**self.outcomes)

    @property
    def sha(self) -> str:
        """Tells two configurations apart in a log."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]


KEYS = tuple(one.name for one in dataclasses.fields(AgentConfig))


def read_config(path: str) -> AgentConfig:
    """Raises ConfigError for a file that is no YAML of these keys, or a value that no key takes."""
    try:
        with open(path, encoding="utf-8") as file:
            given = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={path} cannot be read: {error}. Give a YAML file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config={path} is no YAML: {' '.join(str(error).split())}. Mend it there.") from error
    check_keys(path, "", given, KEYS)
    return checked(path, given)


def check_keys(path: str, of: str, given: Any, known: tuple[str, ...]) -> None:
    if not isinstance(given, dict):
        where = f"{path}, {of}" if of else path
        raise ConfigError(f"{where}: {shown(given)} has no keys. Give some of {', '.join(known)}.")
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            where = f" of {of}" if of else ""
            raise ConfigError(f"{path}: {shown(key)} is no key{where}. Did you mean {nearest}?")


def checked(path: str, given: dict) -> AgentConfig:
    """The configuration, once each value is what its key takes."""
    config = AgentConfig(**given)
    check_policy(path, config.policy)
    check_keys(path, "querying", config.querying, Querying._fields)
    check_keys(path, "outcomes", config.outcomes, OUTCOME_OPTIONS)
    for key, kind in SECTIONS.items():
        check_section(path, key, getattr(config, key), kind)
    if not isinstance(config.holdings, dict) or not config.holdings:
        raise wrong(path, "holdings", config.holdings, "coins by underlying, such as {BTC: 1.0}")
    numbers = {f"holdings.{name}": (value, "a number of coins") for name, value in config.holdings.items()}
    numbers |= {f"querying.{name}": (value, "a number from 0") for name, value in config.querying.items()}
    for key, (value, what) in numbers.items():
        if not is_finite(value) or value < 0:
            raise wrong(path, key, value, what)
    check_top(path, config)
    try:
        config.options.check()
    except CandidatesError as error:
        raise ConfigError(f"{path}, outcomes: {error}") from error
    for text in contradictions(
        tuple(config.policy), config.holdings, config.fusion, config.sizing, config.risk, config.querying
    ):
        raise ConfigError(f"{path}: {text}")
    return dataclasses.replace(config, holdings={name: float(value) for name, value in config.holdings.items()})


def check_section(path: str, key: str, given: Any, kind: Any) -> None:
    """That a section makes one of its dataclass, whose defaults say what each value is."""
    fields = {one.name: one for one in dataclasses.fields(kind)}
    check_keys(path, key, given, tuple(fields))
    for name, value in given.items():
        default = fields[name].default
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        if value is None and "None" in str(fields[name].type):
            continue
        if (number and not is_finite(value)) or (isinstance(default, bool) and not isinstance(value, bool)):
            raise wrong(path, f"{key}.{name}", value, "a number" if number else "true or false")
    try:
        kind(**given)
    except (CandidatesError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}, {key}: {error}") from error


def is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def wrong(path: str, key: str, value: Any, what: str) -> ConfigError:
    return ConfigError(f"{path}, {key}: {shown(value)} is not {what}.")


def check_policy(path: str, policy: Any) -> None:
    check_keys(path, "policy", policy, tuple(POLICIES))
    if not policy:
        raise wrong(path, "policy", policy, f"one of {', '.join(POLICIES)}")
    for name, value in policy.items():
        if name == "rule":
            check_keys(path, "policy.rule", value, ("threshold",))
            if not is_finite(value.get("threshold", ROLL_MIN_SCORE)):
                raise wrong(path, "policy.rule.threshold", value["threshold"], "a score")
        elif name == "openai":
            check_remote(path, value)
        elif not isinstance(value, str):
            raise wrong(path, f"policy.{name}", value, POLICIES[name])


def check_remote(path: str, given: Any) -> None:
    """What is wrong is said without the value of a base_url or key_variable: a key may stand there by mistake."""
    check_keys(path, "policy.openai", given, tuple(one.name for one in dataclasses.fields(Remote)))
    try:
        Remote(**given)
    except ValueError as error:
        raise ConfigError(f"{path}, policy.openai: {error}.") from None


def check_top(path: str, config: AgentConfig) -> None:
    """The keys without keys of their own."""
    if not is_finite(config.cash_usd):
        raise wrong(path, "cash_usd", config.cash_usd, "a number of USD")
    if not is_finite(config.interval) or config.interval < 1:
        raise wrong(path, "interval", config.interval, "1 second or more")
    for key, choices in (("exit_style", STYLES), ("preset", PRESETS_OF_CHAINS), ("exit", exits.STYLES)):
        if getattr(config, key) not in choices:
            raise wrong(path, key, getattr(config, key), f"one of {', '.join(choices)}")
    if not is_finite(config.iv_lag) or config.iv_lag < 0:
        raise wrong(path, "iv_lag", config.iv_lag, "0 hours or more")
    for key in ("state_dir", "spots", "context_vols"):
        value = getattr(config, key)
        if not (isinstance(value, str) and value) and (key == "state_dir" or value is not None):
            raise wrong(path, key, value, "a path")
    if config.on_trade is not None and not is_command(config.on_trade):
        raise wrong(path, "on_trade", config.on_trade, "a command")


def is_command(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(shlex.split(value))
    except ValueError:  # a quote without its other one
        return False
