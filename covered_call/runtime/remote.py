"""A language model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, transformers serve, or OpenAI's own.

It is shown the prompts that training renders. What it answers is either one of the answers that the prompt allows or
an error, and an error never trades. Nothing is asked twice: after an error the next policy is there.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2

from covered_call.candidates.options import CoveredCallCandidatesConfig
from covered_call.candidates.prompts import admissible_answers, order_candidates, pick_of, ranking_messages, shown_to
from covered_call.candidates.schema import NO_TRADE, Decision, shown
from covered_call.runtime.answers import Said, ServerError, Token, parsed, scored

UNSAID = 0.5  # the confidence of an answer of which the server says none: it overrides nobody
MOST = 1 << 20  # bytes of an answer
HIDDEN = "***"
TASK = "per_decision_ranking"


class KeyMissing(ValueError):
    """The environment has no key under the name that the configuration gives."""


@dataclass(frozen=True)
class Remote:
    """The keys of policy.openai.

    Args:
        base_url: of the server, such as http://127.0.0.1:8000/v1.
        model: as the server calls it.
        key_variable: of the environment, which holds the key; None sends none. The key itself stands nowhere else.
        logprobs: whether answers are scored from the probabilities of the first token, where the server gives them;
            else the answer is read from the text.
        top_logprobs: how many tokens are asked for; 20 is the most that OpenAI's own gives.
        max_tokens: of an answer.
        candidate_order: "instrument", or "csv" for the order of the file or chain; how prompts show candidates.

    Raises:
        ValueError: for a value that cannot be.
    """

    base_url: str = ""
    model: str = ""
    key_variable: str | None = None
    logprobs: bool = True
    top_logprobs: int = 20
    max_tokens: int = 64
    candidate_order: str = "instrument"

    def __post_init__(self):
        for name in ("base_url", "model"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} is missing: give base_url and model")
        check_url(self.base_url)
        named = self.key_variable
        if named is not None and not (isinstance(named, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", named)):
            # A key that was written here by mistake is not shown.
            raise ValueError("key_variable is no name of a variable: give one such as OPENAI_API_KEY, never the key")
        if not isinstance(self.logprobs, bool):
            raise ValueError(f"logprobs: {shown(self.logprobs)} is not true or false")
        for name, most in (("top_logprobs", 100), ("max_tokens", 4096)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name}: {shown(value)} is not a whole number from 1 to {most}")
        if self.candidate_order not in ("instrument", "csv"):
            raise ValueError(f"candidate_order: {shown(self.candidate_order)} is not one of instrument, csv")

    @property
    def sha(self) -> str:
        """Tells two servers, models and ways to ask apart."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def key(self) -> str | None:
        """Raises KeyMissing where the environment has none."""
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise KeyMissing(f"key_variable: the environment has no {self.key_variable}: export it, or leave it out.")
        if not re.fullmatch(r"[!-~]+", key):
            raise KeyMissing(f"key_variable: {self.key_variable} holds what no key can: blanks or signs beyond ASCII.")
        return key


def check_url(url: str) -> None:
    """Raises ValueError for one that is no server's, or has a secret in it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, None
    if parts is None or parts.scheme not in ("http", "https") or not host:
        raise ValueError("base_url is no address: give one such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("base_url has more than an address: keys are for the environment, see key_variable")


class Reply(NamedTuple):
    status: int
    text: str
    date: str | None = None  # of the server's clock, as HTTP has it


class Client:
    """Asks a server, and waits no longer than ``timeout_s`` for its whole answer."""

    def __init__(self, remote: Remote, timeout_s: float):
        self.remote, self.timeout_s, self._key = remote, timeout_s, remote.key()
        self.http = httpx2.Client(timeout=timeout_s)

    def ask(self, decision: Decision) -> Said:
        """The model's answer to a decision.

        Raises:
            TimeoutError: without one in time.
            ServerError: if there is none, or none that the prompt allows.
        """
        if not decision.candidates:
            return Said(None, 1.0, 1.0, False)
        options = CoveredCallCandidatesConfig(candidate_order=self.remote.candidate_order)
        ordered, _ = order_candidates(decision, options)
        answers = admissible_answers(TASK, len(ordered.candidates))
        text, tokens = content_of(self.post(ranking_messages(shown_to(ordered, ()))))
        return said(ordered, text, tokens, answers)

    def post(self, messages: list[dict]) -> str:
        body: dict[str, Any] = {
            "model": self.remote.model, "messages": messages, "temperature": 0, "max_tokens": self.remote.max_tokens,
        }  # fmt: skip
        if self.remote.logprobs:
            body |= {"logprobs": True, "top_logprobs": self.remote.top_logprobs}
        reply = self.request("POST", "chat/completions", body)
        if reply.status != 200:
            raise ServerError(told(reply, self.remote.key_variable))
        return reply.text

    def request(self, method: str, path: str, body: dict | None = None) -> Reply:
        """One request, in a thread that is left to itself at the deadline: a name may be looked up for ever, and a
        byte now and then passes any limit on each wait."""
        outcome: list[Reply | Exception] = []

        def work() -> None:
            try:
                outcome.append(self.exchange(method, path, body))
            except Exception as error:  # told to who waits
                outcome.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if not outcome:
            raise TimeoutError(f"no answer after {self.timeout_s:g} s")
        (found,) = outcome
        if isinstance(found, httpx2.TimeoutException):
            raise TimeoutError(f"no answer after {self.timeout_s:g} s") from None
        if isinstance(found, ServerError):
            raise found
        if isinstance(found, Exception):
            # From None: the error's own request carries the key.
            raise ServerError(self.without_key(f"{type(found).__name__}: {found}"[:300])) from None
        return found

    def exchange(self, method: str, path: str, body: dict | None) -> Reply:
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        url = f"{self.remote.base_url.rstrip('/')}/{path}"
        with self.http.stream(method, url, json=body, headers=headers) as answer:
            content = bytearray()
            for part in answer.iter_bytes():
                content += part
                if len(content) > MOST:
                    raise ServerError(f"its answer has more than {MOST:,} bytes")
            text = self.without_key(content.decode("utf-8", "replace"))
            return Reply(answer.status_code, text, answer.headers.get("date"))

    def without_key(self, text: str) -> str:
        """A server may send back what it was sent."""
        return text if self._key is None else text.replace(self._key, HIDDEN)

    def __repr__(self) -> str:
        return f"Client({self.remote.base_url}, {self.remote.model})"


def told(reply: Reply, key_variable: str | None) -> str:
    """What an answer other than 200 means to its user."""
    if reply.status in (401, 403):
        key = f"look at {key_variable}" if key_variable else "it asks for a key: see key_variable"
        return f"the server answers {reply.status}: {key}"
    if reply.status == 404:
        return "the server answers 404: look at base_url, which mostly ends in /v1, and at model"
    if reply.status == 429:
        return "the server answers 429: it is asked too much, or the account is empty"
    return f"the server answers {reply.status}: {' '.join(reply.text.split())[:120] or 'nothing'}"


def content_of(text: str) -> tuple[str, list[list[Token]]]:
    """The text of an answer, and for each of its tokens those that were likely, the one that was taken first; none
    where the server gives no probabilities.

    Raises:
        ServerError: for what is no chat completion.
    """
    try:
        (choice, *_) = json.loads(text)["choices"]
        content = choice["message"]["content"]
        if not isinstance(content, str):
            raise TypeError("its content is no text")
        positions = (choice.get("logprobs") or {}).get("content") or []
        return content, [[Token.of(one), *map(Token.of, one.get("top_logprobs") or ())] for one in positions]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ServerError(f"no chat completion ({type(error).__name__}): {shown(text[:80])}") from None


def said(ordered: Decision, text: str, tokens: Sequence[Sequence[Token]], answers: list[str]) -> Said:
    """What an answer means for a decision, whose candidates stand as the prompt shows them."""
    read = parsed(text, answers)
    names = {answer: instrument_of(ordered, answer) or NO_TRADE for answer in answers}
    masses = scored(tokens, answers)
    if masses is None:
        confidence = UNSAID if read.confidence is None else read.confidence
        reason = read.reason if read.confidence is not None else f"it says no confidence: {UNSAID:g} stands for it"
        return Said(instrument_of(ordered, read.answer), confidence, None, False, None, reason)
    best, second = sorted((*masses.values(), 0.0), reverse=True)[:2]
    pick = next(answer for answer, mass in masses.items() if mass == best)
    probabilities = {names[answer]: mass for answer, mass in masses.items()}
    return Said(instrument_of(ordered, pick), best, best - second, False, probabilities)


def instrument_of(ordered: Decision, answer: str) -> str | None:
    pick = pick_of(answer)
    return None if pick is None else ordered.candidates[pick].instrument
