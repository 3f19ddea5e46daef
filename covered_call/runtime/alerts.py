"""A command of the user's own that is told of each trade. Whatever it does, no decision and no order waits for it."""

import json
import logging
import os
import shlex
import signal
import subprocess
import threading

from covered_call.runtime.engine import NOT_SENT, Cycle
from covered_call.runtime.journal import ABANDONED, plain
from covered_call.runtime.paper import UNFILLED

logger = logging.getLogger(__name__)

TIMEOUT = 10.0  # seconds that the command may take
NO_TRADE_CAME = (UNFILLED, NOT_SENT, ABANDONED)  # of an order


class Alerts:
    """Runs a command for each trade of a cycle, in a thread of its own, once the trade stands in the log.

    Its standard input is one line of JSON: the intention's fields, ``mode``, ``time`` and ``execution``. No shell
    reads the command. Failures are warnings, and counted.

    Args:
        command: None runs nothing.
        timeout: seconds after which it, and all that it started, is killed.
    """

    def __init__(self, command: str | None, mode: str, timeout: float = TIMEOUT):
        self.words, self.mode, self.timeout = shlex.split(command or ""), mode, timeout
        self.threads: list[threading.Thread] = []
        self.failures: list[str] = []

    def __enter__(self) -> "Alerts":
        return self

    def __exit__(self, *_) -> None:
        for thread in self.threads:
            thread.join(self.timeout + 1)

    def tell(self, cycle: Cycle) -> None:
        if not self.words:
            return
        for order, execution in zip(cycle.plan.orders, cycle.executions, strict=False):
            if execution.status not in NO_TRADE_CAME:
                time = cycle.state.decision.decision_time
                more = {"mode": self.mode, "time": time, "execution": execution}
                text = json.dumps(plain(order.intention._asdict() | more))
                thread = threading.Thread(target=self.run, args=(text,), daemon=True)
                self.threads.append(thread)
                thread.start()

    def run(self, text: str) -> None:
        try:
            trouble = self.trouble_of(text)
        except Exception as error:  # of a user's command anything may be expected
            trouble = f"{type(error).__name__}: {error}"
        if trouble:
            self.failures.append(trouble)
            logger.warning("on_trade: %s failed: %s. The trade stands.", shlex.join(self.words), trouble)

    def trouble_of(self, text: str) -> str | None:
        """What went wrong; None where the command ended well."""
        process = subprocess.Popen(
            self.words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(f"{text}\n".encode(), self.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return f"it was killed after {self.timeout:g} s"
        said = " ".join(errors.decode("utf-8", "replace").split())[:200]
        return f"exit status {process.returncode}" + (f", {said}" if said else "") if process.returncode else None

    def lines(self) -> list[str]:
        """What is said of it at the end, so far."""
        if not self.words:
            return []
        return [f"  on_trade: told {len(self.threads)}, failed {len(self.failures)}"]
