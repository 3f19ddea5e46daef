"""Deribit's public data, without a key or an account: option chains, daily prices, and its index of implied vol.

ccxt knows addresses, errors and the rate limit of the exchange. It is an extra, and imported when a client is made.
"""

import datetime
import itertools
import logging
import math
import re
import time
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from covered_call.candidates.schema import expiry_of, printable, shown

logger = logging.getLogger(__name__)

TESTNET = "https://test.deribit.com"
DAY = 86_400_000  # milliseconds, as all times of the API
LAST_MILLISECOND = 253_402_300_800_000  # of the year 9999
# Between the tries of a request, in seconds. ccxt's own maxRetriesOnFailure waits equally long each time, which an
# exchange that is overloaded, or that has answered 429, is not helped by.
WAITS = (1, 2, 4, 8, 16)
PATIENCE = 60.0  # seconds in which a request is tried again
TIMEOUT = 10.0  # seconds without an answer
CURRENCY = re.compile(r"[A-Z0-9]+(_[A-Z]+)?")
# BTC-26DEC25-90000-C, and of those settled in USDC BTC_USDC-26DEC25-90000-P, XRP_USDC-26DEC25-2d15-C.
NAME = re.compile(r"([A-Z0-9]+(?:_[A-Z]+)?)-(\d{1,2}[A-Z]{3}\d{2})-(\d+(?:d\d+)?)-([CP])")
NUMBERS = {  # of a book summary, and the columns that they become
    "underlying_price": "underlying_price",
    "mark_price": "mark_price",
    "bid_price": "best_bid_price",
    "ask_price": "best_ask_price",
    "mark_iv": "mark_iv",
    "open_interest": "open_interest",
    "volume": "volume",
    "estimated_delivery_price": "index_price",
    "interest_rate": "interest_rate",
}
MAY_BE_NULL = ("bid_price", "ask_price", "interest_rate")
SNAPSHOT = pa.schema(
    [
        ("harvest_time", pa.timestamp("us", "UTC")),
        ("instrument_name", pa.string()),
        ("underlying", pa.string()),
        ("expiry", pa.string()),  # 2025-12-26
        ("expiry_timestamp", pa.float64()),  # seconds since 1970
        ("option_type", pa.string()),  # C, P
        ("strike", pa.float64()),
        ("underlying_price", pa.float64()),  # the forward of the expiry
        ("mark_price", pa.float64()),  # prices in coin, or in USDC where settled so
        ("best_bid_price", pa.float64()),
        ("best_ask_price", pa.float64()),
        ("bid_iv", pa.float64()),  # vols in percent a year
        ("ask_iv", pa.float64()),
        ("mark_iv", pa.float64()),
        ("open_interest", pa.float64()),
        ("volume", pa.float64()),  # of 24 hours
        ("greek_delta", pa.float64()),
        ("greek_gamma", pa.float64()),
        ("greek_theta", pa.float64()),
        ("greek_vega", pa.float64()),
        ("index_price", pa.float64()),
        ("interest_rate", pa.float64()),
    ]
)


class DeribitError(ValueError):
    """The exchange cannot be asked, refuses, or answers what cannot be used; the message says what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class Outage(DeribitError):
    """No answer, or the exchange was too busy for one, as often as it was asked: it may have one later."""


class Refused(DeribitError):
    """The exchange does not know, or does not give, what was asked for."""


class Deribit:
    """The public API.

    Args:
        url: of the API, such as TESTNET or a proxy of one's own; None for the exchange itself.
        patience: seconds after which a request that fails is not tried again.

    Raises:
        DeribitError: without ccxt, or for a url that is none.
    """

    def __init__(self, url: str | None = None, patience: float = PATIENCE):
        try:
            import ccxt
        except ModuleNotFoundError as error:
            raise DeribitError(
                f"Deribit is asked through ccxt, and there is no package {error.name}: "
                "pip install 'covered-call-candidates[live]'"
            ) from error
        self.errors, self.patience = ccxt, patience
        timeout = round(1000 * min(TIMEOUT, max(patience, 1.0)))
        self.api = ccxt.deribit({"enableRateLimit": True, "timeout": timeout})
        # internal_server_error, which ccxt takes for a refusal
        self.api.exceptions = {**(self.api.exceptions or {}), "11094": ccxt.ExchangeNotAvailable}
        if url is not None:
            if not re.match(r"https?://[^/]", url):
                raise DeribitError(f"url={shown(url)} is no address such as {TESTNET}.")
            self.api.urls = {**(self.api.urls or {}), "api": {"rest": url.rstrip("/")}}

    def ask(self, method: str, **params) -> Any:
        """What the API has as ``result``.

        Raises:
            Outage: if it failed, or had no answer, for ``patience`` seconds or len(WAITS) + 1 times.
            Refused: if it does not answer this.
        """
        began = time.monotonic()
        for wait in (*WAITS, math.inf):
            try:
                return self.ask_once(method, **params)
            except Outage as error:
                if time.monotonic() + wait > began + self.patience:
                    raise
                logger.info("%s. Trying again in %d s.", error, wait)
                time.sleep(wait)

    def ask_once(self, method: str, **params) -> Any:
        """As ``ask``, without a second try: of what must not be done twice."""
        try:
            answer = getattr(self.api, method)(params)
        except self.errors.BaseError as error:
            failure = printable(f"{error}{root_of(error)}", 400)
            # What has a cause failed on the way, though ccxt takes some, such as TLS, for a refusal.
            if error.__cause__ is None and not isinstance(error, self.errors.OperationFailed):
                asked = ", ".join(f"{name}={value}" for name, value in params.items())
                raise Refused(f"Deribit refuses what was asked ({asked}): {failure}") from error
            raise Outage(f"Deribit gave no answer: {failure}") from error
        if not isinstance(answer, dict):  # a maintenance page, or a hotel's
            raise Outage(f"Deribit gave no answer: no JSON but {shown(answer)}")
        return self.result_of(answer)

    def result_of(self, answer: dict) -> Any:
        return answer.get("result")

    def time(self) -> datetime.datetime:
        """The exchange's own clock, UTC.

        Raises:
            DeribitError, Outage: see ask; for an answer that is no time.
        """
        found = self.ask("publicGetGetTime")
        if not is_number(found) or not 0 < found < LAST_MILLISECOND:
            raise DeribitError(f"Deribit's time is {shown(found)}, and no number of milliseconds.")
        return datetime.datetime.fromtimestamp(found / 1000, datetime.UTC)

    def book_summary(self, currency: str, on_bad_rows: str = "error") -> pa.Table:
        """The option chain now, a row an instrument, with the columns of SNAPSHOT; null is unknown.

        Args:
            currency: BTC, ETH: those settled in the coin. BTC_USDC: those settled in USDC, USDC: all of these, each
                row with its own underlying.
            on_bad_rows: error or skip, as for chain_of; the table's metadata has their number as ``skipped_rows``, and
                as ``created`` when the exchange made the newest row, in milliseconds since 1970, or nothing.

        Raises:
            DeribitError, Outage: see ask and chain_of.
        """
        rows = self.ask("publicGetGetBookSummaryByCurrency", currency=currency.split("_")[-1], kind="option")
        return chain_of(rows, currency, datetime.datetime.fromtimestamp(time.time(), datetime.UTC), on_bad_rows)

    def daily_closes(self, currency: str, days: int, today: bool = False) -> pa.Table:
        """``date`` and ``price_0800utc``: the index at 08:00 UTC of each day, as of which each of the exchange's daily
        candles begins. The last is unfinished, and not among them, but where it is wanted: ``today``.

        The API's pages promise candles of instruments alone: of a currency without those of its index the
        perpetual's are taken, and it is said.

        Raises:
            DeribitError, Outage: see ask; for candles that are none, or begin at another hour.
        """
        source = (currency if "_" in currency else f"{currency}_usd").lower()
        try:
            ticks, opens = self.candles(source, days)
        except Refused:
            ticks, opens = [], []
        if not ticks:
            index, source = source, f"{currency}-PERPETUAL"
            ticks, opens = self.candles(source, days)
            logger.warning("%s: the prices are those of %s, for Deribit has none of %s.", currency, source, index)
        return by_day("price_0800utc", source, ticks, opens, hour=8, unfinished=today)

    def candles(self, instrument: str, days: int) -> tuple[list, list]:
        """When the daily candles begin, and at what price."""
        now = int(1000 * time.time())
        span = {"start_timestamp": now - days * DAY, "end_timestamp": now}
        found = self.ask("publicGetGetTradingviewChartData", instrument_name=instrument, resolution="1D", **span)
        if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in ("ticks", "open")):
            raise DeribitError(f"Deribit's candles of {instrument} have no lists of ticks and open: {shown(found)}.")
        ticks, opens = found["ticks"], found["open"]
        if len(ticks) != len(opens):
            raise DeribitError(f"Deribit's candles of {instrument}: {len(ticks)} ticks, but {len(opens)} of open.")
        return ticks, opens

    def vol_index(self, currency: str, days: int) -> pa.Table:
        """``date`` and ``dvol``: what the index of implied vol, in percent a year, was at the end of each day (UTC).
        Empty for a currency without one.

        Raises:
            DeribitError, Outage: see ask; for values that are none, or days that begin at another hour.
        """
        now = int(1000 * time.time())
        start, end, pages = now - days * DAY, now, []
        while True:  # from the newest page to the oldest
            span = {"start_timestamp": start, "end_timestamp": end, "resolution": "1D"}
            page = self.ask("publicGetGetVolatilityIndexData", currency=currency.split("_")[0], **span)
            if not isinstance(page, dict) or not isinstance(page.get("data"), list):
                raise DeribitError(f"Deribit's vol index of {currency} has no list of data: {shown(page)}.")
            pages.append(page["data"])
            further = page.get("continuation")
            if further is None:
                break
            if not is_number(further) or further >= end:
                raise DeribitError(f"Deribit's vol index of {currency}: continuation {shown(further)} leads nowhere.")
            end = further
        candles = list(itertools.chain.from_iterable(reversed(pages)))
        short = next((one for one in candles if not isinstance(one, list) or len(one) != 5), None)
        if short is not None:
            raise DeribitError(f"Deribit's vol index of {currency}: {shown(short)} is no candle of five numbers.")
        what = f"the vol index of {currency}"
        return by_day("dvol", what, [one[0] for one in candles], [one[4] for one in candles], hour=0)


def root_of(error: BaseException) -> str:
    """What began it, such as " ([Errno 111] Connection refused)": libraries wrap it several times."""
    root, inner = error, error.__cause__
    while inner is not None:
        root, inner = inner, inner.__cause__ or inner.__context__
    return "" if root is error else f" ({root})"


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def by_day(name: str, what: str, ticks: list, values: list, hour: int, unfinished: bool = False) -> pa.Table:
    """``date`` and a column of that name: each day once, in order, without one that has not ended, unless that is
    wanted.

    Raises:
        DeribitError: for a value that is no number above 0, a day that stands there twice or begins at another hour.
    """
    days = {}
    for tick, value in zip(ticks, values, strict=True):
        if not is_number(tick) or not is_number(value) or value <= 0:
            raise DeribitError(f"Deribit, {what}: {shown(value)} at {shown(tick)} is no number above 0 at a time.")
        if tick % DAY != hour * DAY // 24:
            begin = datetime.datetime.fromtimestamp(tick / 1000, datetime.UTC)
            raise DeribitError(
                f"Deribit, {what}: a day begins at {begin:%Y-%m-%d %H:%M} UTC, and not at {hour:02}:00."
            )
        date = datetime.datetime.fromtimestamp(tick / 1000, datetime.UTC).date()
        if days.setdefault(date, value) != value:
            raise DeribitError(f"Deribit, {what}: {date} stands there twice, with {days[date]} and {value}.")
        if tick + DAY > 1000 * time.time() and not unfinished:
            del days[date]
    dates = sorted(days)
    missing = (dates[-1] - dates[0]).days + 1 - len(dates) if dates else 0
    if missing:
        logger.warning("Deribit, %s: %d days are missing between %s and %s.", what, missing, dates[0], dates[-1])
    floats = [float(days[date]) for date in dates]
    return pa.table({"date": pa.array(dates, pa.date32()), name: pa.array(floats, pa.float64())})


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a book summary


def chain_of(rows: Any, currency: str, harvest_time: datetime.datetime, on_bad_rows: str = "error") -> pa.Table:
    """The rows of a book summary as a table; see Deribit.book_summary.

    Args:
        on_bad_rows: error, or skip those with a name or a number that is none; their number is said.

    Raises:
        DeribitError: for a bad row, which it names with its field and value; if there is no other.
    """
    source = f"Deribit's book summary of {currency}"
    if not isinstance(rows, list):
        raise DeribitError(f"{source} is no list of rows: {shown(rows)}.")
    if "_" in currency:  # which come with all that are settled so
        rows = [row for row in rows if not names_another(row, currency)]
    troubles = list(troubles_of(rows, currency))
    first = next((trouble for trouble in troubles if trouble), None)
    if first and on_bad_rows != "skip":
        raise DeribitError(f'{source}: {first}. on_bad_rows="skip" leaves such rows out, and counts them.')
    good = [row for row, trouble in zip(rows, troubles, strict=True) if not trouble]
    skipped = len(rows) - len(good)
    if skipped:
        logger.warning("%s: %d of %d rows are left out; the first: %s.", source, skipped, len(rows), first)
    if not good:
        raise DeribitError(f"{source} has no option that can be used, of {len(rows)}.")
    created = [row["creation_timestamp"] for row in good if is_number(row.get("creation_timestamp"))]
    metadata = {"skipped_rows": str(skipped), "created": str(max(created, default=""))}
    return table_of(good, harvest_time).replace_schema_metadata(metadata)


def names_another(row: Any, currency: str) -> bool:
    """Whether a row's name says that it is of another underlying."""
    named = NAME.fullmatch(str(row.get("instrument_name"))) if isinstance(row, dict) else None
    return named is not None and named[1] != currency


def troubles_of(rows: list, currency: str) -> Iterable[str | None]:
    """Of each row what is wrong with it: instrument, field, value; None if nothing is."""
    seen = set()
    for place, row in enumerate(rows, start=1):
        trouble = trouble_of(row, currency, f"row {place}")
        if trouble is None and row["instrument_name"] in seen:
            trouble = f"{row['instrument_name']}, instrument_name: stands there twice"
        yield trouble
        seen.add(row["instrument_name"] if trouble is None else None)


def trouble_of(row: Any, currency: str, where: str) -> str | None:
    if not isinstance(row, dict):
        return f"{where}: {shown(row)} is no row of named fields"
    name = row.get("instrument_name")
    named = NAME.fullmatch(name) if isinstance(name, str) else None
    if not named or not expiry_of(named[2]):
        return f"{where}, instrument_name: {shown(name)} is no name such as BTC-26DEC25-90000-C"
    if named[1] != currency and not (currency == "USDC" and named[1].endswith("_USDC")):
        return f"{name}, instrument_name: is no option of {currency}"
    for field in NUMBERS:
        if field not in row:
            return f"{name}, {field}: is missing"
        value = row[field]
        if value is None and field in MAY_BE_NULL:
            continue
        if not is_number(value) or (value < 0 and field != "interest_rate"):
            return f"{name}, {field}: {shown(value)} is no number of 0 or more"
    return None


def table_of(rows: list[dict], harvest_time: datetime.datetime) -> pa.Table:
    names = [row["instrument_name"] for row in rows]
    underlyings, days, strikes, types = zip(*(name.split("-") for name in names), strict=True)
    expiries = [expiry_of(day) for day in days]
    columns = {
        "harvest_time": [harvest_time] * len(rows),
        "instrument_name": names,
        "underlying": underlyings,
        "expiry": [expiry.date().isoformat() for expiry in expiries if expiry],
        "expiry_timestamp": [expiry.timestamp() for expiry in expiries if expiry],
        "option_type": types,
        "strike": [float(strike.replace("d", ".")) for strike in strikes],
    }
    for field, column in NUMBERS.items():
        columns[column] = [None if row[field] is None else float(row[field]) for row in rows]
    unknown = [None] * len(rows)
    return pa.table([pa.array(columns.get(field.name, unknown), field.type) for field in SNAPSHOT], SNAPSHOT)
