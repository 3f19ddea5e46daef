"""Deribit's testnet with an account: the one host that an order can be sent to.

No key leaves this process before the host has been checked, and has said of itself that it is the testnet. The session
has an adapter for that host alone, so that no redirect and no proxy leads anywhere else: what it has none for is an
error before a socket is opened.
"""

import logging
import os
import re
import time
from collections.abc import Mapping
from typing import Any, cast

from covered_call.candidates.schema import shown
from covered_call.market.deribit import PATIENCE, WAITS, Deribit, DeribitError, Outage, Refused

logger = logging.getLogger(__name__)

HOST = "test.deribit.com"
KEY, SECRET = "DERIBIT_TESTNET_KEY", "DERIBIT_TESTNET_SECRET"
VALID = 5.0  # seconds after which the exchange does not begin with an order any more: one that was lost stays so
ON_THE_WAY = 1.0  # and for what it began with to be seen
POST_ONLY_REJECT = 11054
GONE = (10004, 10010, 11008, 11044)  # not found, closed, filled, not open: of an order that has come to its end


class Halt(DeribitError):
    """Nothing is ordered until somebody has looked; the message says at what."""


def check_host(url: Any, standin: str | None = None) -> None:
    """That an address is the testnet's; of tests, that it is their stand-in's on this machine.

    Raises:
        Halt: if it is not.
    """
    if standin is not None and url == standin and re.fullmatch(r"http://127\.0\.0\.1:\d+", standin):
        return
    if url != f"https://{HOST}":
        raise Halt(f"{shown(url)} is not https://{HOST}, and orders are sent there alone. Nothing was sent.")


def keys_of(environment: Mapping[str, str]) -> tuple[str, str]:
    """Raises Halt if they are not there."""
    missing = [name for name in (KEY, SECRET) if not environment.get(name)]
    if missing:
        raise Halt(
            f"The environment has no {' and no '.join(missing)}. Make a key at https://{HOST} with the scopes "
            "account:read and trade:read_write, and set both; they are read from nowhere else."
        )
    return environment[KEY], environment[SECRET]


def connected() -> "Account":
    """With the keys of the environment."""
    return Account(*keys_of(os.environ))


class Account(Deribit):
    """What Deribit's testnet has for the owner of a key, and the public data of the testnet.

    Args:
        standin: of tests alone: http://127.0.0.1:PORT.

    Raises:
        Halt: for another host, and one that does not say that it is the testnet.
        Outage: if it does not answer.
    """

    def __init__(self, key: str, secret: str, standin: str | None = None, patience: float = PATIENCE):
        super().__init__(None, patience)
        self.api.set_sandbox_mode(True)
        if standin is not None:
            self.api.urls = {**(self.api.urls or {}), "api": {"rest": standin}}
        self.standin, self.secrets = standin, (key, secret)
        check_host(self.url, standin)
        session, log = cast(Any, self.api.session), cast(Any, self.api.logger)
        adapter = session.get_adapter(self.url)
        session.adapters.clear()
        session.mount(f"{self.url}/", adapter)
        session.trust_env = False  # nor a proxy of the environment
        log.setLevel(logging.WARNING)  # below which it logs what it signs
        self.ask("publicGetGetTime")  # which halts if this is no testnet, before anything is signed
        self.api.apiKey, self.api.secret = key, secret

    @property
    def url(self) -> Any:
        return (self.api.urls or {}).get("api", {}).get("rest")

    def result_of(self, answer: dict) -> Any:
        if answer.get("testnet") is not True:
            raise Halt(f"{shown(self.url)} does not say of itself that it is the testnet. Nothing is ordered there.")
        return super().result_of(answer)

    def ask_once(self, method: str, **params) -> Any:
        """Raises, besides what Deribit.ask_once has, Halt for credentials and funds that do not do."""
        check_host(self.url, self.standin)
        try:
            return super().ask_once(method, **params)
        except (Outage, Refused) as error:
            raise self.told(error) from None  # what it came from could quote the request

    def told(self, error: DeribitError) -> DeribitError:
        """The same without keys, as a Halt where trying again, or another order, would not help."""
        text = str(error)
        for secret in self.secrets:
            text = text.replace(secret, "...")
        cause = error.__cause__
        if isinstance(cause, (self.errors.AuthenticationError, self.errors.PermissionDenied)):
            return Halt(f"The testnet does not take the key of {KEY}, or the key may not do this: {text}")
        if isinstance(cause, self.errors.InsufficientFunds):
            return Halt(f"The account on the testnet has too little for the order: {text}")
        if "No connection adapters" in text:
            return Halt(f"A request was led away from https://{HOST}, and was not sent: {text}")
        return type(error)(text)

    # -----------------------------------------------------------------------------------------------------------------
    # Orders

    def place(self, side: str, label: str, instrument: str, **terms) -> dict:
        """The order with this label, which is sent if there is none yet: never twice, whatever gets lost.

        Raises:
            Refused: if the exchange does not take it; then there is none.
            Outage: if it does not answer before anything was sent.
            Halt: if nothing is known of it, or it cannot be sent; it is looked up when the agent is started again.
        """
        failure: Outage | None = None
        for wait in (*WAITS, None):
            try:
                order = self.find(label, instrument)
                if order or wait is None:
                    break
                until = round(self.ask("publicGetGetTime") + 1000 * VALID)
            except Outage as error:
                if failure is None:
                    raise
                raise Halt(f"Whether the order {label} was sent is not known: {error} Start again.") from None
            try:
                return self.ask_once(
                    f"privateGet{side.title()}", instrument_name=instrument, label=label, type="limit",
                    valid_until=until, **terms,
                )["order"]  # fmt: skip
            except Outage as error:  # after which it may be there all the same
                failure = error
                logger.info("%s. Looking for the order %s.", error, label)
            time.sleep(max(wait, VALID + ON_THE_WAY))
        if order:
            return order
        raise Halt(f"The order {label} could not be sent: {failure}")

    def find(self, label: str, instrument: str) -> dict | None:
        """The order with a label, by its state or by its trades; the exchange forgets a state after a while."""
        currency = instrument.partition("-")[0]
        try:
            states = self.ask("privateGetGetOrderStateByLabel", currency=currency, label=label)
        except Refused as error:
            if code_of(error) not in GONE:
                raise
            states = []
        found = [one for one in states if one["order_state"] != "rejected"]
        if found:
            return max(found, key=lambda one: one["creation_timestamp"])
        trades = self.ask("privateGetGetUserTradesByInstrument", instrument_name=instrument, count=1000)["trades"]
        its = [one for one in trades if one.get("label") == label]
        return self.state(its[0]["order_id"]) if its else None

    def state(self, order_id: str) -> dict:
        return self.ask("privateGetGetOrderState", order_id=order_id)

    def edit(self, order: dict, **terms) -> dict:
        """The order at another price; as it is, if it has come to its end meanwhile.

        Raises:
            Refused: if it stays as it was.
        """
        return self.changed(order, "privateGetEdit", order_id=order["order_id"], amount=order["amount"], **terms)

    def cancel(self, order: dict) -> dict:
        return self.changed(order, "privateGetCancel", order_id=order["order_id"])

    def changed(self, order: dict, method: str, **params) -> dict:
        try:
            answer = self.ask(method, **params)
        except Refused as error:
            if code_of(error) not in GONE:
                raise
            return self.state(order["order_id"])
        return answer.get("order", answer)

    def cancel_all(self) -> int:
        """How many orders that were: all of the account."""
        return int(self.ask("privateGetCancelAll"))

    def trades(self, order: dict) -> list[dict]:
        """Those of an order, once all of them are seen.

        Raises:
            Halt: if they do not become as many as were filled.
        """
        for wait in (*WAITS[:3], None):
            found = self.ask("privateGetGetUserTradesByOrder", order_id=order["order_id"])
            found = found["trades"] if isinstance(found, dict) else found
            if abs(sum(one["amount"] for one in found) - order["filled_amount"]) < 1e-9:
                return found
            time.sleep(wait or 0)
        raise Halt(
            f"Of the order {order['label']} {order['filled_amount']:g} coins are filled, and its trades are others."
        )


def code_of(error: DeribitError) -> int | None:
    """Deribit's own number of what is wrong."""
    found = re.search(r'"code":\s*(-?\d+)', str(error))
    return int(found[1]) if found else None
