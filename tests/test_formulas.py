"""The formula questions: every answer is computed again, from the numbers in its question and by other code."""

import json
import math
import re
import statistics

import pytest
from conftest import ROOT, on_the_default_stack, python

from covered_call.candidates.schema import CandidatesError
from covered_call.evaluation.questions import Matched, Question, match, read_questions

pytestmark = on_the_default_stack
NORMAL = statistics.NormalDist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for name in ("one", "two"):
        done = python(ROOT / "data" / "make_formulas.py", "--out", folder / name / "formulas.jsonl", cwd=folder)
        assert done.returncode == 0, done.stderr
    other = folder / "other" / "formulas.jsonl"
    assert python(ROOT / "data" / "make_formulas.py", "--out", other, "--seed", "1", cwd=folder).returncode == 0
    return folder


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- Each answer again. Of a template the numbers of its question, in their order, constants included


def d1(spot, strike, days, vol):
    return (math.log(spot / strike) + vol * vol * days / 365 / 2) / (vol * math.sqrt(days / 365))


def delta(spot, strike, days, vol):
    return NORMAL.cdf(d1(spot, strike, days, vol))


def value(spot, strike, days, vol):
    return spot * delta(spot, strike, days, vol) - strike * NORMAL.cdf(
        d1(spot, strike, days, vol) - vol * math.sqrt(days / 365)
    )


def short(strike, premium, end):
    return premium - (end - strike if end > strike else 0)


def vol_of(closes):
    returns = [math.log(b / a) for a, b in zip(closes, closes[1:], strict=False)]
    return statistics.stdev(returns) * math.sqrt(365)


def deepest(values):
    return max(100 * (1 - low / high) for i, high in enumerate(values) for low in values[i:])


def kelly(win, p, loss):
    return (p * win - (1 - p) * loss) / win


def clipped(x, low, high):
    return sorted((low, x, high))[1]


def vol_term(ivrv):
    return (clipped(ivrv, 1, 1.5) - 1) * 6


def delta_term(x):
    return max(0, 2 - 20 * abs(x - 0.25))


def day_term(x):
    return max(0, 1.5 - 0.75 * abs(x - 7))


def bull(above, month):
    return (above < 5) + (month > 25) / 2


AGAIN = {
    "bs_value": lambda s, k, d, v, r, y, _: value(s, k, d, v),
    "bs_delta": lambda s, k, d, v, r, y, _: delta(s, k, d, v),
    "standard_move": lambda s, v, y, d, _: s * v * math.sqrt(d / y),
    "daily_vol": lambda v, y, _: 100 * v / math.sqrt(y),
    "covered_breakeven": lambda s, p, _: s - p,
    "hodl_breakeven": lambda k, p, _: k + p,
    "otm_pct": lambda s, k, _: (k - s) / s * 100,
    "premium_pct": lambda s, p, _: p / s * 100,
    "annualised_premium": lambda s, d, p, y, _: p / s * 100 * y / d,
    "ivrv": lambda iv, rv, _: iv / rv,
    "realised_vol": lambda *n: vol_of(n[:-2]),
    "intrinsic": lambda end, k, _: max(end - k, 0),
    "pnl_vs_hodl": lambda k, p, end, _: short(k, p, end),
    "pnl_vs_hodl_pct": lambda s, k, p, end, _: short(k, p, end) / s * 100,
    "covered_pnl": lambda s, k, p, end, _: min(end, k) - s + p,
    "fee": lambda s, p, rate, cap, _: min(s * rate / 100, p * cap / 100),
    "take_profit": lambda p, share, _: p * (1 - share / 100),
    "defence": lambda k, at, _: k * at,
    "kelly": lambda w, p, x, *_: kelly(w, p, x),
    "half_kelly": lambda w, p, x, *_: kelly(w, p, x) / 2,
    "expectancy": lambda w, p, x, _: w * p - x + x * p,
    "drawdown": lambda *n: deepest(n[:-1]),
    "score_ivrv": lambda a, b, c, low, high, x, _: vol_term(x),
    "score_delta": lambda a, b, c, d, low, x, _: delta_term(x),
    "score_dte": lambda a, b, c, d, low, x, _: day_term(x),
    "score_premium": lambda a, b, low, high, x, _: clipped(x, low, high) * a / b,
    "bull_penalty": lambda one, five, half, days, limit, above, month, _: bull(above, month),
    "covered_breakeven_again": lambda s, p, _: s - p,
    "bs_premium_pct": lambda r, y, s, k, d, v, _: value(s, k, d, v) / s * 100,
    "net_premium": lambda s, p, rate, cap, _: p - min(s * rate / 100, p * cap / 100),
    "score_three_terms": lambda *n: vol_term(n[-4]) + delta_term(n[-3]) + day_term(n[-2]),
    "penalised_score": lambda score, one, five, half, days, limit, above, month, _: score - bull(above, month),
    "given_away": lambda k, p, end, zero, _: max(-short(k, p, end), 0),
}


def numbers_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text)]


def test_every_answer_is_what_its_question_gives(made):
    found = [line for path in sorted((made / "one").iterdir()) for line in lines(path)]
    assert {line["template"] for line in found} == AGAIN.keys() and len(found) > 2_600
    for line in found:
        _, asked, answer = (message["content"] for message in line["messages"])
        numbers = numbers_in(asked)
        decimals = int(numbers[-1])
        assert f"{decimals} decimal" in asked and re.fullmatch(rf"-?\d+\.\d{{{decimals}}}", answer), asked
        exact = AGAIN[line["template"]](*numbers)
        assert answer == f"{exact + 0.0:.{decimals}f}".replace("-0." + "0" * decimals, "0." + "0" * decimals), asked


def test_there_are_enough_questions_none_twice_and_held_out_templates_are_apart(made):
    train, held_out = lines(made / "one" / "formulas.jsonl"), lines(made / "one" / "formulas_held_out.jsonl")
    templates = [{line["template"] for line in part} for part in (train, held_out)]
    assert len(train) >= 2_000 and len(templates[0]) >= 20 and len(templates[1]) >= 5
    assert not templates[0] & templates[1]
    asked = [line["messages"][1]["content"] for line in train + held_out]
    assert len(set(asked)) == len(asked)
    assert all([m["role"] for m in line["messages"]] == ["system", "user", "assistant"] for line in train)


def test_the_same_seed_gives_the_same_bytes_and_another_other_questions(made):
    for name in ("formulas.jsonl", "formulas_held_out.jsonl"):
        one = (made / "one" / name).read_bytes()
        assert one == (made / "two" / name).read_bytes() != (made / "other" / name).read_bytes()


# --- Exact match


def asked(answer: str, template: str) -> Question:
    return Question([{"role": "user", "content": "?"}], answer, template)


def test_an_answer_is_met_as_a_whole_or_not_at_all():
    questions = [asked("1.50", "a"), asked("1.50", "a"), asked("2.00", "b"), asked("3.00", "b")]
    found = match(questions, ["1.50", "1.5", "2.00 USD", "3.00"])
    assert [(one.template, one.questions, one.met, one.commonest) for one in found] == [
        ("a", 2, 1, 2),
        ("b", 2, 1, 1),
        ("all", 4, 2, 2),
    ]


def test_the_interval_is_wilsons():
    low, high = Matched("a", 10, 0, 0).interval
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)
    assert Matched("a", 100, 50, 0).interval == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.mark.parametrize(
    "line", ['{"messages": []}', "[1]", '{"messages": [{"role": "assistant", "content": "1"}]}', "{"]
)
def test_a_line_that_is_no_question_is_named(line, tmp_path):
    good = '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "1"}]}\n\n'
    (tmp_path / "q.jsonl").write_text(good + line)
    with pytest.raises(CandidatesError, match=r"q\.jsonl, line 3: .*Correct it"):
        read_questions(str(tmp_path / "q.jsonl"))


def test_a_file_without_questions_is_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(CandidatesError, match="holds no questions"):
        read_questions(str(tmp_path / "q.jsonl"))
    with pytest.raises(CandidatesError, match="cannot be read"):
        read_questions(str(tmp_path / "none.jsonl"))
