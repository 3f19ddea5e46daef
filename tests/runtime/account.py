"""Deribit's testnet on 127.0.0.1, with an account: it takes orders, fills them as a test says, and keeps what is held.

with AccountExchange() as exchange:
    Account(KEY, SECRET, standin=exchange.url)
"""

import datetime
import hashlib
import hmac
import math
import threading
import time
from collections.abc import Callable

from market.quotes import quote
from market.standin import INVALID_PARAMS, Exchange, summary

from covered_call.candidates.schema import expiry_of, named_call

KEY, SECRET = "AbCdEfGh", "a secret that no message may have"
UNAUTHORISED, TOO_LITTLE, NOT_OPEN, POST_ONLY, WRONG_TICK, WRONG_AMOUNT = 13009, 10009, 11044, 11054, 10043, 10021
TIMED_OUT, NOT_FOUND, REDUCE_ONLY = 13888, 10004, 11030
INDEX = 92_500.0


def expiry_in(days: int) -> str:
    """Of a name, such as 26DEC25, from today on."""
    day = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    return f"{day:%-d%b%y}".upper()


def calls(currency: str = "BTC", days: int = 9, strikes=(96_000, 97_000, 98_000, 110_000)) -> list[dict]:
    """Rows of a book summary whose quotes are those of tests of chains, of which the backtest's rules take three.

    Expiries are at 08:00, and less time is left in the evening: the vol is higher then, so that deltas are the same.
    """
    rows, now = [], datetime.datetime.now(datetime.UTC)
    expiry = expiry_of(expiry_in(days))
    assert expiry is not None
    iv = 45.0 * math.sqrt(days / ((expiry - now) / datetime.timedelta(days=1)))
    for strike in strikes:
        name = f"{currency}-{expiry_in(days)}-{strike}-C"
        cells = quote(name, iv, time=now)
        rows.append(summary(name, underlying_price=93_000.0, mark_price=cells["mark_price"], mark_iv=iv,
            bid_price=cells["best_bid_price"], ask_price=cells["best_ask_price"], open_interest=100.0,
            estimated_delivery_price=INDEX))  # fmt: skip
    return rows


class AccountExchange(Exchange):
    """The server, its orders, trades and positions.

    Args:
        matching: from an order to the coins of it that are filled now; asked when it arrives, and at each look at it.
        punctual: an order that arrives after its valid_until is refused.
    """

    testnet = True
    methods = {
        "public": (*Exchange.methods["public"], "get_time", "get_instrument", "ticker", "get_delivery_prices"),
        "private": ("sell", "buy", "edit", "cancel", "cancel_all", "get_order_state", "get_order_state_by_label",
            "get_user_trades_by_order", "get_user_trades_by_instrument", "get_positions", "get_account_summary"),
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.lock, self.punctual = threading.RLock(), False
        self.orders: dict[str, dict] = {}
        self.trades: list[dict] = []
        self.looks: dict[str, int] = {}  # at an order
        self.matching: Callable[[dict], float] = lambda order: order["amount"] if self.looks[order["order_id"]] else 0
        self.prices: dict[str, float] = {}  # of delivery, by date
        self.held: dict[str, float] = {}  # beside what was traded
        self.summary = {"equity": 2.0, "initial_margin": 0.2}

    # What it is asked

    def refusal(self, area: str, path: str, headers) -> int | None:
        if area == "public":
            return None
        scheme, _, words = (headers["Authorization"] or " ").partition(" ")
        said = dict(word.partition("=")[::2] for word in words.split(","))
        text = f"{said.get('ts')}\n{said.get('nonce')}\nGET\n{path}\n\n"
        signature = hmac.new(SECRET.encode(), text.encode(), hashlib.sha256).hexdigest()
        good = scheme == "deri-hmac-sha256" and (said.get("id"), said.get("sig")) == (KEY, signature)
        return None if good else UNAUTHORISED

    def get_book_summary_by_currency(self, currency: str, kind: str):
        rows = super().get_book_summary_by_currency(currency, kind)
        now = int(1000 * time.time())
        return rows if isinstance(rows, int) else [row | {"creation_timestamp": now} for row in rows]

    def get_time(self):
        return 1000 * time.time()

    def get_instrument(self, instrument_name: str):
        return {"instrument_name": instrument_name, "tick_size": 0.0001, "contract_size": 1.0,
            "min_trade_amount": 0.1 if instrument_name.startswith("BTC") else 1.0,
            "tick_size_steps": [{"above_price": 0.005, "tick_size": 0.0005}]}  # fmt: skip

    def ticker(self, instrument_name: str):
        row = self.row(instrument_name)
        return {"best_bid_price": row["bid_price"], "best_ask_price": row["ask_price"],
            "mark_price": row["mark_price"], "index_price": row["estimated_delivery_price"]}  # fmt: skip

    def row(self, name: str) -> dict:
        return next(row for rows in self.summaries.values() for row in rows if row["instrument_name"] == name)

    def get_delivery_prices(self, index_name: str, count):
        return {"data": [{"date": date, "delivery_price": price} for date, price in self.prices.items()]}

    def sell(self, **params):
        return self.ordered("sell", **params)

    def buy(self, **params):
        return self.ordered("buy", **params)

    def ordered(self, side: str, instrument_name: str, amount, price, label, valid_until, **more):
        with self.lock:
            if self.punctual and int(valid_until) < 1000 * time.time():
                return TIMED_OUT
            wrong = self.wrong(side, instrument_name, float(price), float(amount), **more)
            if wrong:
                return wrong
            number = f"{instrument_name[:3]}-{len(self.orders) + 1}"
            self.looks[number] = 0
            order = {"order_id": number, "label": label, "instrument_name": instrument_name, "direction": side,
                "amount": float(amount), "price": float(price), "filled_amount": 0.0, "order_state": "open",
                "creation_timestamp": self.get_time(), "reduce_only": more.get("reduce_only") == "true",
                "post_only": more.get("post_only") == "true"}  # fmt: skip
            self.orders[number] = order
            return {"order": dict(self.matched(order)), "trades": []}

    def wrong(self, side: str, name: str, price: float, amount: float, **more) -> int | None:
        tick = 0.0005 if price > 0.005 else 0.0001
        if abs(price / tick - round(price / tick)) > 1e-6:
            return WRONG_TICK
        if abs(amount / 0.1 - round(amount / 0.1)) > 1e-6:
            return WRONG_AMOUNT
        if more.get("post_only") == "true" and side == "sell" and price <= self.row(name)["bid_price"]:
            return POST_ONLY
        if more.get("reduce_only") == "true" and -self.sizes().get(name, 0.0) < amount - 1e-9:
            return REDUCE_ONLY
        return None

    def matched(self, order: dict) -> dict:
        filled = min(order["amount"], self.matching(order)) - order["filled_amount"]
        if order["order_state"] == "open" and filled > 1e-9:
            order["filled_amount"] += filled
            self.trades.append({"order_id": order["order_id"], "label": order["label"], "amount": filled,
                "price": order["price"], "fee": 0.0003 * filled, "index_price": INDEX,
                "instrument_name": order["instrument_name"], "direction": order["direction"]})  # fmt: skip
        if order["filled_amount"] >= order["amount"] - 1e-9:
            order["order_state"] = "filled"
        return order

    def get_order_state(self, order_id: str):
        with self.lock:
            self.looks[order_id] += 1
            return dict(self.matched(self.orders[order_id]))

    def edit(self, order_id: str, price, amount, **more):
        with self.lock:
            order = self.orders[order_id]
            if order["order_state"] != "open":
                return NOT_OPEN
            wrong = self.wrong(order["direction"], order["instrument_name"], float(price), float(amount), **more)
            if wrong:
                return wrong
            order["price"] = float(price)
            return {"order": dict(self.matched(order)), "trades": []}

    def cancel(self, order_id: str):
        with self.lock:
            order = self.orders[order_id]
            if order["order_state"] != "open":
                return NOT_OPEN
            order["order_state"] = "cancelled"
            return dict(order)

    def cancel_all(self):
        with self.lock:
            still = [order for order in self.orders.values() if order["order_state"] == "open"]
            for order in still:
                order["order_state"] = "cancelled"
            return float(len(still))

    def get_order_state_by_label(self, currency: str, label: str):
        with self.lock:
            return [dict(order) for order in self.orders.values() if order["label"] == label]

    def get_user_trades_by_instrument(self, instrument_name: str, count):
        with self.lock:
            return {"trades": [one for one in self.trades if one["instrument_name"] == instrument_name]}

    def get_user_trades_by_order(self, order_id: str):
        with self.lock:
            return [one for one in self.trades if one["order_id"] == order_id]

    def sizes(self) -> dict[str, float]:
        sizes = dict(self.held)
        for one in self.trades:
            signed = one["amount"] if one["direction"] == "buy" else -one["amount"]
            sizes[one["instrument_name"]] = round(sizes.get(one["instrument_name"], 0.0) + signed, 9)
        return sizes

    def get_positions(self, currency: str):
        with self.lock:
            now = datetime.datetime.now(datetime.UTC)
            its = {name: size for name, size in self.sizes().items() if name.startswith(f"{currency}-")}
            alive = {name: size for name, size in its.items() if not (call := named_call(name)) or call[2] > now}
            return [{"instrument_name": name, "size": size, "average_price": 0.01, "average_price_usd": 925.0,
                "index_price": INDEX} for name, size in alive.items()]  # fmt: skip

    def get_account_summary(self, currency: str):
        return self.summary if currency in ("BTC", "ETH") else INVALID_PARAMS
