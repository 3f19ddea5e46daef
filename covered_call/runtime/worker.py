"""A policy in a process of its own, which is killed when it takes too long and started again."""

import contextlib
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from covered_call.candidates.schema import NO_TRADE, Decision
from covered_call.runtime.answers import Said

logger = logging.getLogger(__name__)

READY = "ready"


class WorkerError(RuntimeError):
    """The policy raised, or its process ended; the message is what it said."""


class Worker:
    """Asks a policy in another process, and waits no longer than ``timeout_s`` for an answer.

    Args:
        load: makes the policy, there; it must be picklable, such as functools.partial(load_policy, folder).
        timeout_s: seconds a question may take. The process of one that takes longer is killed, and the next one loads
            while the agent goes on: what is asked before it is ready waits for it within its own limit.
    """

    def __init__(self, load: Callable[[], Any], timeout_s: float):
        self.load, self.timeout_s = load, timeout_s
        self.context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang by itself
        self.process: Any = None
        self.restarts = -1
        self.start()

    def start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=serve, args=(theirs, self.load), daemon=True)
        self.process.start()
        theirs.close()
        self.ready, self.restarts = False, self.restarts + 1

    def wait_until_ready(self, seconds: float | None = None) -> None:
        """Raises WorkerError if the policy cannot be loaded, TimeoutError if that takes longer."""
        if self.ready:
            return
        if not self.pipe.poll(seconds):
            raise TimeoutError(f"the policy is not loaded after {seconds:g} s")
        self.receive()
        self.ready = True

    def ask(self, decision: Decision) -> Said:
        """Raises TimeoutError without an answer in time, WorkerError where the policy fails."""
        end = time.monotonic() + self.timeout_s
        if not self.process.is_alive():
            self.restart()
        self.wait_until_ready(self.timeout_s)
        try:
            self.pipe.send(decision)
        except OSError as error:
            raise self.gone() from error
        if not self.pipe.poll(max(0.0, end - time.monotonic())):
            logger.warning("No answer after %g s: the policy's process is killed and started again.", self.timeout_s)
            self.restart()
            raise TimeoutError(f"no answer after {self.timeout_s:g} s")
        return Said(*self.receive())

    def receive(self) -> Any:
        try:
            kind, what = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self.gone() from error
        if kind == "error":
            raise WorkerError(what)
        return what

    def gone(self) -> WorkerError:
        self.process.join(1)
        status = self.process.exitcode
        self.restart()
        return WorkerError(f"the policy's process ended by itself (exit status {status})")

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        self.process.kill()
        self.process.join(1)
        self.pipe.close()


def serve(pipe: multiprocessing.connection.Connection, load: Callable[[], Any]) -> None:
    """Answers decision after decision, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which ends after its cycle
    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        try:
            policy = load()
        except Exception as error:  # told to who asks
            pipe.send(("error", f"{type(error).__name__}: {error}"))
            return
        pipe.send((READY, None))
        while True:
            pipe.send(answer_of(policy, pipe.recv()))


def answer_of(policy: Any, decision: Decision) -> tuple[str, Any]:
    try:
        (answer,) = policy.decide([decision])
        return "answer", tuple(said_of(answer, decision))
    except Exception as error:  # told to who asks
        return "error", f"{type(error).__name__}: {error}"


def said_of(answer: Any, decision: Decision) -> Said:
    """Of a language model's Answer; a per-candidate model has no probabilities that add up."""
    scores = getattr(answer, "scores", {})
    names = {str(place): one.instrument for place, one in enumerate(decision.candidates, start=1)}
    names |= {NO_TRADE: NO_TRADE}
    found = {names[key]: math.exp(score) for key, score in scores.items()} if NO_TRADE in scores else None
    return Said(answer.instrument, answer.probability, answer.margin, answer.abstained, found)


def end_with_parent() -> None:
    """One whose agent was killed would stay for ever, and hold its memory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def load_policy(folder: str, threshold: float = 0.0) -> Any:
    """A tuned language model; torch is imported here, in the worker's process."""
    from covered_call.language_model.policy import Policy

    return Policy.load(folder, threshold=threshold)
