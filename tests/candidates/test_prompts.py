"""What a model reads: exact text, number formats, and no way for an outcome to get into it."""

import csv
import decimal
import random
import re

import pytest
from conftest import (
    REAL_DATA,
    decision,
    messages,
    needs_real_data,
    no_candidates,
    on_the_default_stack,
    records,
    row,
    time,
    write_csv,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from covered_call.candidates.export import main
from covered_call.candidates.prompts import candidate_messages, ranking_messages
from covered_call.candidates.schema import Candidate, Decision, iso_time

CONFIGS = ("per_candidate", "per_decision_ranking")
ORDERS = ("instrument", "csv", "shuffle")
STYLES = ("hold_to_expiry", "tp_and_roll")

# Two candidates in the order of a teacher's file, the better score first; the second, with its blank cells, is sold.
ETH = [
    row(underlying="ETH", spot=2511.456, instrument="ETH-B", strike=63000, dte=7.0, delta=-0.25, score=3.20295,
        iv=0.7, ivrv_ratio=0.93062, trade_executed=1),
    row(underlying="ETH", spot=2511.456, instrument="ETH-A", strike=0.55, dte=7.33, delta=0.2351, score=-1,
        iv="", ivrv_ratio="NaN", trade_executed=1, chosen=1, action="SELL_CALL", reward=-3214.594, pnl_vs_hodl="",
        max_drawdown_pct=6.328736),
]  # fmt: skip

CANDIDATE_SYSTEM = (
    "You are an automated ETH covered-call policy. For each candidate option, decide whether to SELL_CALL or SKIP "
    "based on the state. Do not use hindsight PnL to answer; treat it as teacher labels only."
)
CANDIDATE_USER = """\
Decision time: 2024-09-01T00:00:00+00:00
Underlying: ETH
Spot price: 2511.46
Teacher policy (exit_style): tp_and_roll
Candidate option: ETH-A
  - Strike: 0.55
  - DTE (days): 7.33
  - Delta: 0.2351
  - Score: -1.0000
  - IV: n/a
  - IV/RV ratio: n/a

%sQuestion: Based only on the information available at decision time (ignore the realized outcome), what ACTION \
should the policy take on this candidate? Reply with exactly one token: SELL_CALL or SKIP."""
CANDIDATE_HINDSIGHT = """\
Risk snapshot (teacher hindsight):
  - Max drawdown on this chain: 6.33%

PnL outcome for this candidate if chosen (teacher hindsight):
  - Reward (USD): -3214.59
  - PnL vs HODL (USD): n/a

"""

RANKING_SYSTEM = (
    "You are an automated ETH covered-call strategy. At each decision, you see multiple candidate options and may "
    "either pick exactly one to SELL_CALL or decide NO_TRADE. Choose the single best candidate index, imitating the "
    "teacher policy."
)
RANKING_USER = """\
Decision time: 2024-09-01T00:00:00+00:00
Underlying: ETH
Spot: 2511.46
Teacher policy (exit_style): tp_and_roll
Candidates:
%s
%sQuestion: Before seeing the outcome, which candidate index should the policy choose to SELL_CALL? Reply with \
exactly one token: 1, 2, ..., %d, or NO_TRADE."""
RANKING_HINDSIGHT = """\
Outcome (teacher hindsight for the chosen candidate only):
  - Chosen candidate index: 2
  - Reward (USD): -3214.59
  - PnL vs HODL (USD): n/a

"""
LINE_A = "ETH-A — Strike: 0.55, DTE: 7.33, Delta: 0.2351, Score: -1.0000\n"
LINE_B = "ETH-B — Strike: 63000, DTE: 7, Delta: -0.2500, Score: 3.2029\n"


def chat(system: str, user: str, answer: str) -> list[dict]:
    roles = ("system", "user", "assistant")
    return [{"role": role, "content": text} for role, text in zip(roles, (system, user, answer), strict=True)]


# --- Exact text


def test_per_candidate_chat_is_exact(load, tmp_path):
    first, second = load(data_files=write_csv(tmp_path / "eth.csv", ETH), splits="train")["train"]["messages"]
    assert first == chat(CANDIDATE_SYSTEM, CANDIDATE_USER % "", "SELL_CALL")
    assert second[2]["content"] == "SKIP"
    assert "  - DTE (days): 7\n  - Delta: -0.2500\n  - Score: 3.2029\n  - IV: 0.7000\n" in second[1]["content"]


def test_per_candidate_chat_with_hindsight_is_exact(load, tmp_path):
    path = write_csv(tmp_path / "eth.csv", ETH)
    first, second = load(data_files=path, splits="train", hindsight=True)["train"]["messages"]
    assert first == chat(CANDIDATE_SYSTEM, CANDIDATE_USER % CANDIDATE_HINDSIGHT, "SELL_CALL")
    assert "chain: 0.00%\n" in second[1]["content"]  # the file's own number, though the outcome is unknown


def test_ranking_chat_is_exact(load, tmp_path):
    path = write_csv(tmp_path / "eth.csv", ETH)
    (found,) = load("per_decision_ranking", data_files=path, splits="train")["train"]["messages"]
    assert found == chat(RANKING_SYSTEM, RANKING_USER % (f"  [1] {LINE_A}  [2] {LINE_B}", "", 2), "1")


def test_ranking_chat_with_hindsight_in_the_files_order_is_exact(load, tmp_path):
    path = write_csv(tmp_path / "eth.csv", ETH)
    options = {"splits": "train", "hindsight": True, "candidate_order": "csv"}
    (found,) = load("per_decision_ranking", data_files=path, **options)["train"]["messages"]
    lines = f"  [1] {LINE_B}  [2] {LINE_A}"
    assert found == chat(RANKING_SYSTEM, RANKING_USER % (lines, RANKING_HINDSIGHT, 2), "2")


def test_a_single_candidate_is_still_offered_as_1_2_to_n(load, tmp_path):
    alone = [ETH[1] | {"trade_executed": "0", "chosen": "0", "action": "SKIP"}]
    path = write_csv(tmp_path / "eth.csv", alone)
    for hindsight in (False, True):  # nothing was sold, so hindsight has nothing to add
        (found,) = load("per_decision_ranking", data_files=path, splits="train", hindsight=hindsight)["train"]
        assert found["messages"] == chat(RANKING_SYSTEM, RANKING_USER % (f"  [1] {LINE_A}", "", 1), "NO_TRADE")


def test_a_step_without_candidates_is_one_ranking_chat_and_no_candidate_chat(load, tmp_path):
    path = write_csv(tmp_path / "eth.csv", [no_candidates(underlying="ETH", spot=2511.456), *decision(1)])
    ranking = load("per_decision_ranking", data_files=path, splits="train")["train"]["messages"]
    assert ranking[0] == chat(RANKING_SYSTEM, RANKING_USER % ("  (none)\n", "", 0), "NO_TRADE")
    assert len(ranking) == 2
    candidates = load(data_files=path, splits="train")["train"]
    assert candidates.num_rows == 3 and "NO_CANDIDATES" not in candidates["instrument"]


def test_times_are_printed_in_utc(tmp_path):
    path = write_csv(tmp_path / "a.csv", [row(decision_time="2024-09-01T02:00:00+02:00")])
    assert "Decision time: 2024-09-01T00:00:00+00:00\n" in records(path)[0]["messages"][1]["content"]


# --- The teacher's own corpora


@needs_real_data
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("config", CONFIGS)
def test_real_corpora_are_reproduced_byte_for_byte(load, tmp_path, config, style):
    (source,) = REAL_DATA.glob(f"*_{style}_*.csv")
    expected = (REAL_DATA / "expected" / f"{source.stem}_{config}.jsonl").read_bytes()

    loaded = load(config, data_files=str(source), splits="train", hindsight=True, candidate_order="csv")
    assert "".join(line + "\n" for line in messages(loaded["train"])).encode() == expected

    main(["--input", str(source), "--output_dir", str(tmp_path), "--hindsight", "--candidate_order", "csv"])
    assert (tmp_path / f"{source.stem}_{config}.jsonl").read_bytes() == expected


@pytest.mark.parametrize("config", CONFIGS)
def test_export_and_load_give_the_same_chats(load, tmp_path, config):
    path = write_csv(tmp_path / "a.csv", [*ETH, *decision(1, 2), no_candidates(2), *decision(3)])
    for options in ([], ["--hindsight", "--candidate_order", "csv"], ["--candidate_order", "shuffle", "--seed", "3"]):
        main(["--input", path, *options])
        same = {"hindsight": "--hindsight" in options, "seed": 3 if "--seed" in options else 0}
        same["candidate_order"] = options[options.index("--candidate_order") + 1] if options else "instrument"
        loaded = load(config, data_files=path, splits="train", **same)["train"]
        exported = (tmp_path / f"a_{config}.jsonl").read_text(encoding="utf-8")
        assert exported.splitlines() == messages(loaded)


# --- No leak: prompts are a function of the state alone

number = st.floats(-1e6, 1e6)
maybe = st.one_of(st.just(""), st.just("nan"), number)
candidate = st.fixed_dictionaries(
    {
        "strike": st.floats(1e-3, 1e6),
        "dte": st.floats(0, 400),
        "delta": st.floats(-1, 1),
        "score": number,
        "iv": st.one_of(st.just(""), st.floats(0, 5)),
        "ivrv_ratio": maybe,
    }
)
states = st.lists(st.lists(candidate, max_size=5), min_size=1, max_size=4)


def rows_of(state: list[list[dict]]) -> list[dict]:
    """The rows of a generated file: a decision a day, its instruments not in the order of their names."""
    rows = []
    for day, candidates in enumerate(state):
        rows += [
            row(decision_time=time(day), instrument=f"BTC-{index * 3 % 5}-C", **cells)
            for index, cells in enumerate(candidates)
        ] or [no_candidates(day)]
    return rows


def relabel(rows: list[dict], rng: random.Random) -> list[dict]:
    """The same states with every outcome and label drawn anew, each decision still valid."""
    decisions = {}
    for cells in rows:
        decisions.setdefault((cells["decision_time"], cells["exit_style"]), []).append(cells)
    relabelled = []
    for group in decisions.values():
        empty = group[0]["instrument"] == "NO_CANDIDATES"
        sold = None if empty else rng.choice([None, *range(len(group))])
        for index, cells in enumerate(group):
            outcomes = {
                name: rng.choice(["", "nan", "0.0", str(rng.uniform(-1e4, 1e4))])
                for name in ("reward", "pnl_vs_hodl", "max_drawdown_pct")
            }
            labels = {
                "trade_executed": str(int(sold is not None)),
                "chosen": str(int(index == sold)),
                "action": "SELL_CALL" if index == sold else "SKIP",
            }
            relabelled.append(cells | outcomes | labels)
    return relabelled


def prompts(path: str) -> list:
    """Every system and user message of the file, in every config and order."""
    return [
        [record["messages"][:2] for record in records(path, config, candidate_order=order)]
        for config in CONFIGS
        for order in ORDERS
    ]


@pytest.mark.no_cover
@on_the_default_stack
@given(states, st.randoms(use_true_random=False))
def test_no_outcome_or_label_can_change_a_prompt(tmp_path, state, rng):
    rows = rows_of(state)
    before = write_csv(tmp_path / "before.csv", relabel(rows, rng))
    after = write_csv(tmp_path / "after.csv", relabel(rows, rng))
    assert prompts(before) == prompts(after)


@needs_real_data
@pytest.mark.parametrize("style", STYLES)
def test_no_outcome_or_label_can_change_a_real_prompt(tmp_path, style):
    (source,) = REAL_DATA.glob(f"*_{style}_*.csv")
    with open(source, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    relabelled = write_csv(tmp_path / source.name, relabel(rows, random.Random(0)))
    assert prompts(relabelled) == prompts(str(source))
    labels = [[record["label"] for record in records(path)] for path in (relabelled, str(source))]
    assert labels[0] != labels[1]  # the labels did change


# --- Number formats


def state_of(**cells) -> tuple[Decision, Candidate]:
    one = Candidate("BTC-X", **{"strike": 1.0, "dte": 7.0, "delta": 0.2, "score": 3.0, "iv": 0.7, "ivrv_ratio": 1.0}
                    | {name: value for name, value in cells.items() if name != "spot"})  # fmt: skip
    return Decision(iso_time("2024-09-01T00:00:00+00:00"), "BTC", "tp_and_roll", cells.get("spot", 1.0), (one,)), one


def shown(label: str, **cells) -> set[str]:
    """How both prompts print the number behind ``label``."""
    market, one = state_of(**cells)
    texts = [candidate_messages(market, one)[1]["content"], ranking_messages(market)[1]["content"]]
    return {match for text in texts for match in re.findall(rf"(?m){re.escape(label)}: (.*?)(?:,|$)", text)}


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_a_strike_is_its_shortest_exact_decimal(strike):
    (text,) = shown("Strike", strike=strike)
    assert float(text) == strike
    assert text == f"{decimal.Decimal(repr(strike)).normalize():f}"  # the digits of repr, without an exponent


@pytest.mark.parametrize(
    "strike, text", [(63000.0, "63000"), (0.55, "0.55"), (1e-7, "0.0000001"), (1e22, "1" + "0" * 22), (2.5, "2.5")]
)
def test_a_strike_reads_as_a_person_would_write_it(strike, text):
    assert shown("Strike", strike=strike) == {text}


@given(st.floats(0, 36_500))
def test_days_are_whole_or_have_two_decimals(dte):
    assert shown("DTE", dte=dte) | shown("DTE (days)", dte=dte) == {f"{dte:.0f}" if dte.is_integer() else f"{dte:.2f}"}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_have_fixed_decimals_and_no_exponent(value):
    for label, name in (("Score", "score"), ("IV", "iv"), ("IV/RV ratio", "ivrv_ratio")):
        assert shown(f"- {label}", **{name: value}) == {f"{decimal.Decimal(value):.4f}"}
    for label in ("Spot price", "Spot"):
        assert shown(label, spot=value) == {f"{decimal.Decimal(value):.2f}"}


def test_a_negative_zero_is_printed_as_zero(tmp_path):
    (record,) = records(write_csv(tmp_path / "a.csv", [row(dte="-0.0")]))
    assert "  - DTE (days): 0\n" in record["messages"][1]["content"]


# --- The order of the candidates


def test_shuffle_is_the_same_on_every_load_and_another_for_another_seed(tmp_path):
    path = write_csv(tmp_path / "a.csv", [cells for day in range(20) for cells in decision(day, day % 3)])
    shuffled = [
        [[c["instrument"] for c in record["candidates"]] for record in records(path, CONFIGS[1], **options)]
        for options in (
            {"candidate_order": "shuffle"},
            {"candidate_order": "shuffle"},
            {"candidate_order": "shuffle", "seed": 1},
        )
    ]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert len({tuple(names) for names in shuffled[0]}) > 1  # each decision has an order of its own


@on_the_default_stack
@given(state=states, rng=st.randoms(use_true_random=False), order=st.sampled_from(["instrument", "shuffle"]))
@settings(max_examples=50)
def test_the_order_of_the_rows_in_the_file_does_not_show(tmp_path, state, rng, order):
    rows = relabel(rows_of(state), rng)
    straight = write_csv(tmp_path / "straight.csv", rows)
    mixed = write_csv(tmp_path / "mixed.csv", rng.sample(rows, len(rows)))
    for config in CONFIGS:
        assert records(straight, config, candidate_order=order) == records(mixed, config, candidate_order=order)


@given(state=states, rng=st.randoms(use_true_random=False), order=st.sampled_from(ORDERS))
@settings(max_examples=50)
def test_the_answer_follows_the_sold_candidate(tmp_path, state, rng, order):
    rows = relabel(rows_of(state), rng)
    path = write_csv(tmp_path / "a.csv", rows)
    sold = {cells["decision_time"]: cells["instrument"] for cells in rows if cells["chosen"] == "1"}
    for record in records(path, "per_decision_ranking", candidate_order=order):
        _, user, answer = (message["content"] for message in record["messages"])
        offered = dict(re.findall(r"(?m)^  \[(\d+)\] (\S+) —", user))
        assert offered.get(answer) == sold.get(record["decision_time"].isoformat())
        assert (answer == "NO_TRADE") == (record["decision_time"].isoformat() not in sold)
    for record in records(path, candidate_order=order):
        was_sold = record["instrument"] == sold.get(record["decision_time"].isoformat())
        assert record["messages"][2]["content"] == ("SELL_CALL" if was_sold else "SKIP")


def test_candidates_stand_by_name_unless_the_files_order_is_asked_for(tmp_path):
    path = write_csv(tmp_path / "eth.csv", ETH)
    assert [record["instrument"] for record in records(path)] == ["ETH-A", "ETH-B"]
    assert [record["instrument"] for record in records(path, candidate_order="csv")] == ["ETH-B", "ETH-A"]
