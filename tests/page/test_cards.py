"""Decisions to be read: what a card shows of one, how long it takes to read, and that hindsight stands apart."""

import datetime

from conftest import on_the_default_stack

from covered_call.candidates.schema import UTC, Candidate, Decision, Opinion
from covered_call.page.cards import HINDSIGHT, MOST_CALLS, card_markdown, make_card, pnl_text, title_of

pytestmark = on_the_default_stack

SCORES = (1.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0)
CALLS = tuple(Candidate(f"BTC-{place}-C", 100.0 + place, 7.0, 0.25, score, 0.7, None)
    for place, score in enumerate(SCORES))  # fmt: skip
MARKET = {"ret_1d": 0.01, "ret_7d": -0.02, "ret_30d": None, "rv_7d": 0.5, "rv_30d": 0.6, "dist_ma50": 0.1,
    "regime": "bull", "trend_5d": "up", "drawdown_90d": 0.1, "range_pos_30d": 0.5, "rsi_14": 55.0}  # fmt: skip
DECISION = Decision(datetime.datetime(2025, 1, 2, 8, tzinfo=UTC), "BTC", "hold_to_expiry", 95_000.5, CALLS, MARKET)


def a_card(decision: Decision = DECISION, **more):
    sold = {"model": 0, "teacher": None} if decision.candidates else {"model": None}
    return make_card(title_of(1, decision), decision, sold, ["Model sells BTC-0-C."], ["It brought -1 USD."], **more)


def test_a_card_has_what_the_prompt_says_of_the_market_and_of_the_calls_that_matter():
    card = a_card()
    assert card.title == "1. 2025-01-02 08:00 UTC, BTC at 95,000.50 USD"
    assert card.context == [
        "Returns: 1d +1.00%, 7d -2.00%, 30d n/a", "Realised vol: 7d 0.5000, 30d 0.6000",
        "Trend: bull, 5d up, from 50-day mean +10.00%",
    ]  # fmt: skip
    assert card.more == ["Range: 90d drawdown +10.00%, 30d position 0.5000, RSI 14 55.0000"]
    # The call that is sold has the lowest score of all, and is shown; numbers are those of the prompt.
    assert [row[0] for row in card.calls[1:]] == ["1", "2", "3", "4", "5", "6"] and MOST_CALLS == 6
    assert card.calls[1] == ["1", "BTC-0-C", "model", "100", "7", "0.2500", "1.0000", "0.7000", "n/a"]
    assert card.left_out == 2 and "And 2 more calls, of lower score." in card_markdown(card)


def test_an_opinion_that_the_prompt_has_stands_beside_each_call():
    opinion = Opinion(DECISION.decision_time, {"BTC-0-C": (0.125, 0.5)})
    card = a_card(DECISION._replace(opinion=opinion))
    assert [row[-1] for row in card.calls] == ["outcome model, of spot", "+0.12%, P(positive) 0.50", *["n/a"] * 5]
    assert card.more[-1].endswith("(fitted on decisions before 2025-01-02)")


def test_what_is_not_there_is_not_told_of():
    card = a_card(DECISION._replace(candidates=(), context=None))
    assert card.context == [] and "No call was offered." in card_markdown(card)
    assert "explanation" not in card_markdown(card)
    assert a_card(DECISION._replace(context=None), context=["realised_vol 0.5"]).context == ["realised_vol 0.5"]


def test_hindsight_comes_last_and_under_its_name():
    text = card_markdown(a_card(explanation="STRONG. Score is 1.00."))
    known, came = text.split(f"> **{HINDSIGHT}.** ")
    assert came == "It brought -1 USD." and "brought" not in known
    assert known.index("BTC-7-C" if "BTC-7-C" in known else "BTC-5-C") < known.index("Its explanation: STRONG.")


def test_money_has_units_and_what_is_unknown_is_no_number():
    assert pnl_text(-950.0, 95_000.0) == "-950.00 USD, -1.00% of spot"
    assert pnl_text(float("nan"), 95_000.0) == "unknown"
