"""What an agent.yaml names, loaded: its policies, what tells them apart and what they were tuned on, and its spots."""

import contextlib
import dataclasses
import datetime
import functools
import os
from collections.abc import Generator, Mapping
from typing import NamedTuple

from covered_call import __version__
from covered_call.candidates.context_lines import ATM_RANK, MARKET, OPINION_TOLD, SPOT
from covered_call.candidates.prompts import PROMPT_VERSION
from covered_call.candidates.schema import CHAIN_COLUMNS, Decision
from covered_call.candidates.series import Series, read_series
from covered_call.candidates.vols import series_of
from covered_call.language_model.manifest import read_manifest
from covered_call.market.teacher import DAY_BEGINS
from covered_call.runtime.agent_config import AgentConfig, ConfigError
from covered_call.runtime.contradictions import LANGUAGE_MODELS
from covered_call.runtime.experience import Experience
from covered_call.runtime.fusion import Fusion
from covered_call.runtime.policies import LanguageModel, Model, Q, Rule, Source
from covered_call.runtime.remote import TASK, Client, KeyMissing, Remote
from covered_call.runtime.worker import Worker, load_policy
from covered_call.value_model.learning import Fitted, QScorerError, payoff_of
from covered_call.value_model.opinions import with_opinion
from covered_call.value_model.scorer import FILE_NAME, QScorer

NO_PAYOFF = (
    "no payoff is known yet, so nothing is sold: fit a Q-scorer (again), settle 30 candidates of its log, or give "
    "sizing: {payoff: NUMBER}"
)


class Policies(NamedTuple):
    """Those of a configuration, in its order; what tells them apart, what they were tuned on, and until when.

    All but the first change where a file is replaced while the agent runs: a log line is written from what they are.
    """

    sources: list[Source]
    versions: dict[str, str]
    ranges: dict[str, dict[str, list[float]]]
    tuned_to: dict[str, datetime.datetime]
    contexts: dict[str, list[str]]  # of those that were fitted with the market's context what it was
    payoffs: dict[str, float | None]  # of a Q-scorer's training outcomes: see learning.payoff_of

    @property
    def with_market(self) -> bool:
        """Whether any of them is to be told the market's context."""
        return any(self.contexts.values())

    @property
    def of_chain(self) -> list[str]:
        """Which of CHAIN_COLUMNS any of them is told."""
        return [name for name in CHAIN_COLUMNS if any(name in told for told in self.contexts.values())]


@contextlib.contextmanager
def policies_of(config: AgentConfig) -> Generator[Policies]:
    found = Policies([], {"code": __version__, "prompts": PROMPT_VERSION}, {}, {}, {}, {})
    with contextlib.ExitStack() as ends:
        for name, value in config.policy.items():
            if name == "rule":
                found.sources.append(Rule(**value))
            elif name == "q":
                found.sources.append(q_scorer(value, config, found))
            elif name == "openai":
                found.sources.append(remote_model(value, config, found))
            else:
                found.sources.append(language_model(value, config, found, ends))
        yield found


def q_scorer(path: str, config: AgentConfig, found: Policies) -> Source:
    """One that is read again, at the cycle after its file was replaced."""
    path = q_file(path)

    def taken(fitted: Fitted, sha256: str) -> None:
        styles = fitted.metadata["exit_styles"]
        if config.exit_style not in styles:
            raise QScorerError(other_style(path, config, styles))
        context = fitted.metadata.get("context", [])
        if unknown := untold(path, context, config):
            raise QScorerError(unknown)
        if found.contexts.setdefault("q", context) != context:
            raise QScorerError(
                f"{path} was fitted with another context of the market than the one before. Start again."
            )
        found.versions["q"], found.payoffs["q"] = sha256, payoff_of(fitted.metadata)
        found.ranges["q"] = fitted.metadata["train"].get("numbers", {})
        found.tuned_to["q"] = datetime.datetime.fromisoformat(fitted.metadata["validation"]["to"])

    return Q(QScorer.load(path, check_every=0, taken=taken))


def q_file(path: str) -> str:
    return os.path.join(path, FILE_NAME) if os.path.isdir(path) else path


def language_model(folder: str, config: AgentConfig, found: Policies, ends: contextlib.ExitStack) -> Source:
    manifest = read_manifest(folder)
    if config.exit_style not in manifest["tuned_on"]["exit_styles"]:
        raise ConfigError(other_style(folder, config, manifest["tuned_on"]["exit_styles"]))
    told = manifest.get("context", [])
    found.contexts["llm"] = [name for name in told if name != OPINION_TOLD]
    if unknown := untold(folder, found.contexts["llm"], config):
        raise ConfigError(unknown)
    if OPINION_TOLD in told and "q" not in config.policy:
        raise ConfigError(f"{folder} was tuned with a Q-scorer's opinion: name one under policy.q, which gives it.")
    tell = functools.partial(opinion_of_q, found.sources) if OPINION_TOLD in told else None
    model, rules = Model.of(manifest), config.rules_of_querying
    found.versions["llm"], found.ranges["llm"] = model.sha, manifest["tuned_on"]["numbers"]
    found.tuned_to["llm"] = datetime.datetime.fromisoformat(manifest["splits"]["train"]["to"])
    worker = Worker(functools.partial(load_policy, folder), rules.timeout_s)
    ends.callback(worker.stop)
    worker.wait_until_ready()
    return LanguageModel(worker.ask, rules, model, tell=tell)


def opinion_of_q(sources: list[Source], decision: Decision) -> Decision:
    """The decision with what the Q-scorer among the sources, as it stands now, expects of it."""
    scorer = next(source.scorer for source in sources if isinstance(source, Q))
    return with_opinion(decision, scorer.current())


def remote_model(keys: dict, config: AgentConfig, found: Policies) -> Source:
    """Nothing is known of what it was tuned on, and on what until when."""
    remote, rules = Remote(**keys), config.rules_of_querying
    try:
        client = Client(remote, rules.timeout_s)
    except KeyMissing as error:
        raise ConfigError(f"policy.openai, {error}") from None
    found.versions["openai"] = f"{remote.model} at {remote.base_url}"
    return LanguageModel(client.ask, rules, Model(remote.sha, TASK, remote.candidate_order), "openai")


def untold(path: str, context: list[str], config: AgentConfig) -> str | None:
    """What is said of a policy that was fitted with a context that an agent cannot tell."""
    told = (*SPOT, *(MARKET if config.context_vols else ()), ATM_RANK, *CHAIN_COLUMNS)
    strange = next((name for name in context if name not in told), None)
    if strange is None:
        return None
    help_it = "; give context_vols" if strange in MARKET else ""
    return f"{path} was fitted with {strange} in the market's context, which this agent is not told{help_it}."


def other_style(path: str, config: AgentConfig, styles: list[str]) -> str:
    known = ", ".join(styles)
    return f"{path} was tuned on {known}, and exit_style is {config.exit_style}: change one of them."


def closes_of(config: AgentConfig) -> dict[str, Series]:
    """The daily closes of each underlying that is held; none without spots."""
    if config.spots is None:
        return {}
    paths = {name: config.spots.replace("{underlying}", name) for name in config.holdings}
    if len(paths) > 1 and len(set(paths.values())) == 1:
        raise ConfigError(f"spots: {config.spots} is one file for {', '.join(paths)}: put {{underlying}} in its name.")
    return {name: read_series(path, "spots", "spot", day_begins=DAY_BEGINS) for name, path in paths.items()}


def vols_of(config: AgentConfig) -> dict[str, Series]:
    """The market's vols of each underlying that is held; none without context_vols."""
    names = list(config.holdings)
    found = series_of("context_vols", config.context_vols, config.iv_lag, names, set(range(len(names))))
    return {names[code]: series for code, series in (found or {}).items()}


def fusion_of(config: AgentConfig) -> Fusion | None:
    """How proposals become one; None where there is nothing to fuse, and the first that answers decides."""
    fusion, models = Fusion(**config.fusion), [name for name in config.policy if name in LANGUAGE_MODELS]
    if len(config.policy) < 2 or not (models or fusion.mode == "ensemble"):
        return None
    if "llm" not in config.fusion and fusion.llm not in models:
        fusion = dataclasses.replace(fusion, llm=models[0] if models else fusion.llm)
    return fusion


def pair_of(config: AgentConfig) -> tuple[str, str] | None:
    """The sources whose disagreements the fusion learns from; None where it does not."""
    fusion = fusion_of(config)
    if fusion is None or fusion.mode != "learned":
        return None
    return fusion.llm, fusion.second or next(name for name in config.policy if name != fusion.llm)


def payoff_for(
    config: AgentConfig, payoffs: Mapping[str, float | None], experience: Experience, underlying: str,
    time: datetime.datetime,
) -> tuple[float | None, str]:  # fmt: skip
    """The payoff that Kelly's rule takes at a time, and who says so: the configuration, else the Q-scorer's training,
    else what is settled by then."""
    stated = {"sizing.payoff": config.sizing.get("payoff"), "q": payoffs.get("q")}
    known = [(value, name) for name, value in stated.items() if value is not None]
    return known[0] if known else (experience.payoff(underlying, time), "settled")
