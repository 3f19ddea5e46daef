"""Deribit's API on 127.0.0.1, with what a test has given it, and with its faults.

with Exchange() as exchange:
    exchange.summaries["BTC"] = [summary("BTC-26DEC25-90000-C")]
    subprocess.run([..., "--url", exchange.url])
"""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

TOO_MANY_REQUESTS, INTERNAL_SERVER_ERROR, NOT_FOUND, INVALID_PARAMS = 10028, 11094, 13020, -32602
DAY = 86_400_000


class Fault(NamedTuple):
    """What goes wrong with a request: a delay, an HTTP status, an error of Deribit's, other content, a hang-up; late
    is a delay after what was asked for is done."""

    delay: float = 0.0
    late: float = 0.0
    status: int = 200
    code: int | None = None
    content: str | None = None
    cut: bool = False


class Exchange:
    """The server and what it knows.

    Args:
        faults: from the number of a request, counted from 0, to its fault or None.
        page: candles of the vol index in an answer.
    """

    testnet = False
    methods = {"public": ("get_book_summary_by_currency", "get_tradingview_chart_data", "get_volatility_index_data")}

    def __init__(self):
        self.summaries: dict[str, list] = {}
        self.candles: dict[str, list[tuple[int, float]]] = {}  # by instrument: milliseconds, open
        self.vols: dict[str, list[tuple[int, float]]] = {}  # by currency: milliseconds, close
        self.page = 1000
        self.faults: Callable[[int], Fault | None] = lambda number: None
        self.requests: list[tuple[str, dict]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"exchange": self}))
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that was killed has hung up
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Exchange":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    # The methods: what is asked for, a number as a float, or the code of an error, an int

    def get_book_summary_by_currency(self, currency: str, kind: str):
        return self.summaries.get(currency, INVALID_PARAMS) if kind == "option" else INVALID_PARAMS

    def get_tradingview_chart_data(self, instrument_name: str, resolution: str, start_timestamp, end_timestamp):
        if instrument_name not in self.candles or resolution != "1D":
            return NOT_FOUND
        found = [c for c in self.candles[instrument_name] if int(start_timestamp) <= c[0] <= int(end_timestamp)]
        ticks, opens = [tick for tick, _ in found], [value for _, value in found]
        others = {name: opens for name in ("high", "low", "close", "volume", "cost")}
        return {"status": "ok" if found else "no_data", "ticks": ticks, "open": opens, **others}

    def get_volatility_index_data(self, currency: str, resolution: str, start_timestamp, end_timestamp):
        if resolution != "1D":
            return INVALID_PARAMS
        found = [v for v in self.vols.get(currency, []) if int(start_timestamp) <= v[0] <= int(end_timestamp)]
        data = [[tick, close + 1, close + 2, close - 2, close] for tick, close in found[-self.page :]]
        return {"data": data, "continuation": found[-self.page - 1][0] if len(found) > self.page else None}

    def refusal(self, area: str, path: str, headers) -> int | None:
        """The code of the error that a request is, whatever it asks for."""
        return None


class Handler(BaseHTTPRequestHandler):
    exchange: Exchange
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms between its head and its body

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        area, _, method = url.path.removeprefix("/api/v2/").partition("/")
        params = dict(parse_qsl(url.query))
        number = len(self.exchange.requests)
        self.exchange.requests.append((method, params))
        fault = self.exchange.faults(number) or Fault()
        time.sleep(fault.delay)
        if method not in self.exchange.methods.get(area, ()):
            return self.send("Not Found", 404)
        refusal = fault.code or self.exchange.refusal(area, self.path, self.headers)
        result = getattr(self.exchange, method)(**params) if refusal is None else refusal
        body = self.envelope(result) if fault.content is None else fault.content
        time.sleep(fault.late)
        if fault.cut:
            self.close_connection = True
            return None
        error = 400 if isinstance(result, int) else 200
        return self.send(body, fault.status if fault.status != 200 else error)

    def envelope(self, result) -> str:
        now = time.time_ns() // 1000
        rest = {"jsonrpc": "2.0", "usIn": now, "usOut": now + 1, "usDiff": 1, "testnet": self.exchange.testnet}
        if isinstance(result, int):
            return json.dumps({"error": {"code": result, "message": "As the test wants it"}} | rest)
        return json.dumps({"result": result} | rest)

    def send(self, text: str, status: int):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if text.startswith("{") else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def summary(name: str, **fields) -> dict:
    """A row of a book summary, as Deribit has them for options."""
    base = name.split("-")[0].split("_")[0]
    return {
        "instrument_name": name,
        "underlying_price": 92414.82,
        "underlying_index": name.rsplit("-", 2)[0],
        "mark_price": 0.053129,
        "mark_iv": 46.51,
        "bid_price": 0.0525,
        "ask_price": 0.054,
        "mid_price": 0.05325,
        "open_interest": 2418.6,
        "volume": 29.8,
        "volume_usd": 146000.5,
        "estimated_delivery_price": 92250.41,
        "interest_rate": 0.0,
        "creation_timestamp": 1765328713418,
        "base_currency": base,
        "quote_currency": base,
        "price_change": -1.5,
        "high": 0.055,
        "low": 0.05,
        "last": 0.0525,
        **fields,
    }


def chain(currency: str = "BTC", strikes=range(80_000, 120_000, 1_000)) -> list[dict]:
    return [summary(f"{currency}-26DEC25-{strike}-{side}") for strike in strikes for side in "CP"]
