"""The verb agent doctor: is all there that a configuration names? One line for each thing, and what to do."""

import argparse
import contextlib
import datetime
import email.utils
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
from filelock import SoftFileLock

from covered_call import __version__
from covered_call.candidates.columns import microseconds
from covered_call.candidates.context import MARKET_STALE, MEAN_DAYS, PRICE_STALE
from covered_call.candidates.data_options import Help
from covered_call.candidates.prompts import PROMPT_VERSION
from covered_call.candidates.schema import UTC, CandidatesError
from covered_call.candidates.series import Series
from covered_call.command_line import plain_errors, start_logging
from covered_call.language_model.manifest import PolicyError, read_manifest
from covered_call.market.deribit import Deribit, DeribitError
from covered_call.runtime.agent_config import AgentConfig, ConfigError, read_config
from covered_call.runtime.answers import ServerError
from covered_call.runtime.configured import NO_PAYOFF, closes_of, other_style, payoff_for, q_file, vols_of
from covered_call.runtime.experience import Experience, read_experience
from covered_call.runtime.journal import ROOM, JournalError, files_of, read
from covered_call.runtime.kill import KILL, folders_of, killed
from covered_call.runtime.policies import Model
from covered_call.runtime.remote import Client, KeyMissing, Remote, told
from covered_call.runtime.risk import RiskRules
from covered_call.value_model.learning import QScorerError, payoff_of
from covered_call.value_model.scorer import read_hashed

OK, WARN, FAIL = "ok", "warn", "FAIL"
LITTLE = 100 << 20  # bytes that are free: enough for now, not for long
SECONDS = 5.0  # that a server may take to say that it is there
EXPECTED = CandidatesError, ConfigError, PolicyError, QScorerError, JournalError, KeyMissing, OSError


class Found(NamedTuple):
    how: str  # OK, WARN or FAIL
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.how:<5}{self.what}: {self.text}"


def main(arguments: list[str]) -> int:
    """Returns 1, the exit status, if anything would keep the agent from its work."""
    args = parse_arguments(arguments)
    start_logging()
    with plain_errors(args):
        found = list(examined(args.config, args.url if args.live else None, args.live))
        print("\n".join(map(str, found)))
        failed, warned = (sum(one.how == how for one in found) for how in (FAIL, WARN))
        print(f"{failed} to mend, {warned} to look at." if failed or warned else "All is there.")
    return int(failed > 0)


def examined(path: str, url: str | None = None, live: bool = False) -> Iterator[Found]:
    """What is found, one after another; what cannot be looked at is a FAIL, and the next is looked at.

    Args:
        url: of Deribit's API; None is its own.
        live: whether chains are to come from there, so that its clock counts.
    """
    try:
        config = read_config(path)
    except ConfigError as error:
        yield Found(FAIL, "config", str(error))
        return
    yield Found(OK, "config", f"{path}, configuration {config.sha}; policies {', '.join(config.policy)}")
    yield Found(OK, "code", f"version {__version__}, prompts of version {PROMPT_VERSION}")
    looks: dict[str, Callable[[AgentConfig], Iterator[Found]]] = {
        "llm": of_model, "q": of_q_scorer, "openai": of_server, "spots": of_spots, "vols": of_vols,
        "state": of_state_dir,
    }  # fmt: skip
    for what, look in looks.items():
        if what in config.policy or what in ("spots", "vols", "state"):
            try:
                yield from look(config)
            except EXPECTED as error:
                yield Found(FAIL, what, str(error))
    if config.sizing.get("method") == "half_kelly":
        yield from of_payoff(config)
    if live:
        yield of_exchange(url, RiskRules(**config.risk).max_clock_skew_s)


# ---------------------------------------------------------------------------------------------------------------------
# Policies


def of_model(config: AgentConfig) -> Iterator[Found]:
    """Raises PolicyError for a folder that is not whole, or of other prompts."""
    folder = config.policy["llm"]
    manifest = read_manifest(folder)
    tuned, model = manifest["tuned_on"], Model.of(manifest)
    yield Found(OK, "llm", f"{folder} is whole, tuned on today's prompts ({manifest['task']}, {model.sha[:12]})")
    if config.exit_style not in tuned["exit_styles"]:
        yield Found(FAIL, "llm", other_style(folder, config, tuned["exit_styles"]))
    strange = [name for name in config.holdings if name not in tuned["underlyings"]]
    if strange:
        names = ", ".join(strange)
        yield Found(FAIL, "llm", f"{names} is held, and it was tuned on {', '.join(tuned['underlyings'])}: of that it "
            "answers nothing. Tune it on that, too.")  # fmt: skip
    yield of_gpu(manifest["quantization"])


def of_gpu(quantization: str) -> Found:
    """Torch is imported here, for a language model alone."""
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        return Found(
            FAIL, "gpu", f"it loads in {quantization}, and there is no bitsandbytes: pip install bitsandbytes"
        )
    import torch

    if not torch.cuda.is_available():
        return Found(WARN, "gpu", f"PyTorch {torch.__version__} sees none: it answers in {quantization} on the CPU, "
            "slowly; see querying.timeout_s")  # fmt: skip
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    return Found(OK, "gpu", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; {quantization}")


def of_q_scorer(config: AgentConfig) -> Iterator[Found]:
    """Raises QScorerError for a file that cannot be used."""
    path = q_file(config.policy["q"])
    fitted, sha256 = read_hashed(path)
    styles = fitted.metadata["exit_styles"]
    if config.exit_style not in styles:
        yield Found(FAIL, "q", other_style(path, config, styles))
    else:
        yield Found(OK, "q", f"{path}, {sha256[:19]}, fitted until {fitted.metadata['validation']['to'][:10]}")


def of_server(config: AgentConfig) -> Iterator[Found]:
    """Raises KeyMissing where the environment has no key."""
    remote = Remote(**config.policy["openai"])
    client = Client(remote, SECONDS)
    try:
        reply = client.request("GET", "models")
    except (TimeoutError, ServerError) as error:
        yield Found(
            FAIL, "openai", f"{remote.base_url} cannot be reached: {error}. Start the server, or mend base_url"
        )
        yield Found(WARN, "clock", "not compared: the server cannot be reached")
        return
    if reply.status != 200:
        yield Found(FAIL, "openai", f"{remote.base_url}/models: {told(reply, remote.key_variable)}")
    else:
        yield of_models(remote, reply.text)
    yield of_clock(reply.date, RiskRules(**config.risk).max_clock_skew_s)


def of_models(remote: Remote, text: str) -> Found:
    try:
        names = [str(one["id"]) for one in json.loads(text)["data"]]
    except (ValueError, KeyError, TypeError):
        return Found(WARN, "openai", f"{remote.base_url} answers, and does not say which models it has")
    if remote.model in names:
        return Found(OK, "openai", f"{remote.base_url} has {remote.model}")
    shown = ", ".join(names[:5]) or "none"
    return Found(FAIL, "openai", f"{remote.base_url} has no {remote.model}: name one of its models, such as {shown}")


def of_clock(date: str | None, limit: float) -> Found:
    """Against the server's, which tells whole seconds: so much of a skew is no skew."""
    try:
        theirs = email.utils.parsedate_to_datetime(date or "")
    except ValueError:
        return Found(WARN, "clock", "not compared: the server does not say its time")
    return of_skew("the server's", (datetime.datetime.now(UTC) - theirs.astimezone(UTC)).total_seconds(), 1, limit)


def of_exchange(url: str | None, limit: float) -> Found:
    """Its clock, as it was at some moment between question and answer."""
    try:
        exchange = Deribit(url, patience=SECONDS)
    except DeribitError as error:
        return Found(FAIL, "exchange clock", str(error))
    asked = datetime.datetime.now(UTC)
    try:
        theirs = exchange.time()
    except DeribitError as error:
        return Found(WARN, "exchange clock", f"not compared: {error}")
    waited = (datetime.datetime.now(UTC) - asked).total_seconds()
    skew = (asked - theirs).total_seconds() + waited / 2
    return of_skew("Deribit's", skew, waited / 2, limit)._replace(what="exchange clock")


def of_skew(whose: str, skew: float, unsure: float, limit: float) -> Found:
    """Seconds that this clock is ahead, of which so many may be no skew."""
    skew = math.copysign(max(0.0, abs(skew) - unsure), skew)
    if abs(skew) > limit:
        return Found(FAIL, "clock", f"{skew:+.0f} s from {whose}, and {limit:g} s may be: set it, such as by NTP")
    return Found(OK, "clock", f"within {limit:g} s of {whose}")


def of_payoff(config: AgentConfig) -> Iterator[Found]:
    """Of Kelly's rule, which sells nothing without one."""
    payoffs, now, folders = {}, datetime.datetime.now(UTC), folders_of(config.state_dir)
    with contextlib.suppress(QScorerError):  # which of_q_scorer says
        payoffs = {"q": payoff_of(read_hashed(q_file(config.policy["q"]))[0].metadata)} if "q" in config.policy else {}
    try:
        known = {f"settled in {one}": read_experience(one) for one in folders if files_of(one)}
    except JournalError as error:
        yield Found(FAIL, "sizing", str(error))
        return
    for name in config.holdings:
        stated, whose = payoff_for(config, payoffs, Experience(), name, now)
        found = {f"of {whose}": stated} | {where: its.payoff(name, now) for where, its in known.items()}
        told = next(((where, value) for where, value in found.items() if value is not None), None)
        if told:
            yield Found(OK, "sizing", f"{name}: a payoff of {told[1]:.4g}, {told[0]}")
        else:
            yield Found(WARN, "sizing", f"{name}: {NO_PAYOFF}")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def of_spots(config: AgentConfig) -> Iterator[Found]:
    if config.spots is None:
        yield Found(WARN, "spots", "none are named: IV/RV and the past are unknown, and no rule looks at them. Give "
            "spots: a CSV of daily closes")  # fmt: skip
    for name, series in closes_of(config).items():
        first, last = (datetime.datetime.fromtimestamp(int(series.time[place]) / 1e6, UTC) for place in (0, -1))
        text = f"{name}: {len(series.time):,} closes from {first:%Y-%m-%d} to {last:%Y-%m-%d}"
        if len(series.time) < MEAN_DAYS:
            yield Found(WARN, "spots", f"{text}: the market's past takes {MEAN_DAYS}. Give earlier ones, too")
        else:
            yield of_age("spots", text, series, PRICE_STALE)


def of_vols(config: AgentConfig) -> Iterator[Found]:
    for name, series in vols_of(config).items():
        last = datetime.datetime.fromtimestamp(int(series.time[-1]) / 1e6, UTC)
        text = f"{name}: {len(series.time):,} vols, the last known from {last:%Y-%m-%d %H:%M} on"
        yield of_age("vols", text, series, MARKET_STALE)


def of_age(what: str, text: str, series: Series, stale: int) -> Found:
    if microseconds(datetime.datetime.now(UTC)) - series.time[-1] <= stale:
        return Found(OK, what, text)
    return Found(WARN, what, f"{text}: too old for decisions of today. Add what came since, or replay that time")


def of_state_dir(config: AgentConfig) -> Iterator[Found]:
    folder = Path(config.state_dir)
    near = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    free = shutil.disk_usage(near).free
    room = f"{folder}: {free / 2**30:,.1f} GiB free"
    if free < ROOM:
        yield Found(FAIL, "disk", f"{room}: no order is sent where its line has no room. Make room")
    else:
        yield Found(WARN if free < LITTLE else OK, "disk", room)
    for one in folders_of(config.state_dir):
        if killed(one):
            yield Found(
                WARN, "kill", f"{one / KILL} is there: nothing is ordered. covered-call agent kill --lift ends it"
            )
        if one != folder:
            yield of_lock(one)
        if files_of(one):
            yield Found(OK, "log", f"{one}: {sum(1 for _ in read(one)):,} lines, all whole")


def of_lock(folder: Path) -> Found:
    """Who writes a log; the lock of one that is gone is taken over."""
    holder = SoftFileLock(folder.absolute().with_name(f".{folder.name}.lock")).pid
    if holder is not None and psutil.pid_exists(holder):
        return Found(
            WARN, "lock", f"{folder}: process {holder} is at work there. A second agent needs --log of its own"
        )
    return Found(OK, "lock", f"{folder}: free")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call agent doctor", description="Looks at all that a configuration names: model, prompts, "
        "Q-scorer, server, key, clock, spots, disk, lock, log. Exit status 1 if anything has to be mended.",
        epilog="examples:\n  covered-call agent doctor --config agent.yaml\n  covered-call agent doctor --config "
        "agent.yaml --live", formatter_class=Help, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", metavar="YAML", required=True, help="the agent's")
    parser.add_argument("--live", action="store_true", help="compares this clock with Deribit's, too")
    parser.add_argument("--url", metavar="URL", help="of --live: another address of the API")
    args = parser.parse_args(arguments)
    if args.url and not args.live:
        parser.error("--url is of --live.")
    return args
