"""Is the teacher beaten? A walk-forward over all periods of the files: plain policies, and what learns from outcomes.

    python benchmarks/beat_the_teacher.py                 # the sample, by year; about half an hour on 2 cores
    python benchmarks/beat_the_teacher.py --no_models     # without the language models: seconds
    python benchmarks/beat_the_teacher.py --no_models --data_files 'runs/*.csv' --period month --fee 0.0003
    python benchmarks/beat_the_teacher.py --no_models --iv_file 'vols/dvol_{underlying}_daily.csv'   # the market's vol

For each period with enough before it, everything that is fitted is fitted on what was settled before it (the latest
15 % of those decision times are the validation split) and decides on it:

    teacher                          its own log
    never sell                       what all are measured against
    score rule                       the highest score, from a threshold with which it agrees best with the teacher
    delta nearest 0.25               that call, from a threshold of its score, fitted likewise
    lowest delta, highest premium    always that call; the premium is Black-Scholes at the vol that is paid
    teacher if iv/rv > 1             its call, where the vol that is paid is above the file's realised vol
    teacher unless trend up          its call, unless spot is higher than 30 days before
    ridge                            linear, on the Q-scorer's features: the call of the highest outcome above 0
    Q-scorer                         boosted trees, likewise
    SFT tiny, SFT + DPO tiny         a tiny Phi-3 that imitates the teacher, and the same after preference training
    oracle                           sells whatever turns out best, if anything does: hindsight, and no policy

All are paid alike, in counterfactual outcomes: P&L vs HODL in % of spot, and in USD a unit of underlying, net of the
costs that are set. Decisions at which the outcome of some candidate is unknown are left out for all, and counted; so
are those of an underlying whose computed outcomes do not follow the recorded ones.

A period that is finished is kept in --output_dir, and not computed again for the same code, data and options.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call import atomic, resampling, tuning  # noqa: E402
from covered_call.candidates.builder import Backtest, find_csvs, hash_of_vols  # noqa: E402
from covered_call.candidates.columns import COUNTERFACTUAL, Columns, logged_of  # noqa: E402
from covered_call.candidates.data_options import OUTCOME_OPTIONS, add_data_options  # noqa: E402
from covered_call.candidates.options import OUTCOMES, CoveredCallCandidatesConfig  # noqa: E402
from covered_call.candidates.preferences import at, best_places  # noqa: E402
from covered_call.candidates.schema import CandidatesError, LoggedDecision  # noqa: E402
from covered_call.candidates.splits import split_places  # noqa: E402
from covered_call.evaluation import luck  # noqa: E402
from covered_call.evaluation.baselines import Rule, fit_threshold, highest, score_rule, scores  # noqa: E402
from covered_call.evaluation.cases import Cases, make_cases, outcome  # noqa: E402
from covered_call.evaluation.slices import TREND, regimes  # noqa: E402
from covered_call.tables import markdown  # noqa: E402
from covered_call.training.runs import RecipeError, TrainingStopped  # noqa: E402
from covered_call.value_model import learning  # noqa: E402
from covered_call.value_model.scorer import picks_of  # noqa: E402

ROOT = Path(__file__).parents[1]
SAMPLE = str(ROOT / "data" / "sample" / "*.csv")
TEACHER, NEVER, RULE, NEAREST = "teacher", "never sell", "score rule", "delta nearest 0.25"
LOWEST, PREMIUM = "lowest delta", "highest premium"
IF_RICH, UNLESS_UP = "teacher if iv/rv > 1", "teacher unless trend up"
RIDGE, Q, SFT, DPO, ORACLE = "ridge", "Q-scorer", "SFT tiny", "SFT + DPO tiny", "oracle"
TARGET_DELTA = 0.25
# Of the decision times before a period, the latest 15 % are validation, and at least three weeks, for the purge takes
# one. A period with fewer than two months before it is not tested on.
VALIDATION, MIN_VALIDATION, MIN_TIMES = 0.15, 21, 60
PERIODS = {"year": "%Y", "quarter": None, "month": "%Y-%m"}


class Fold(NamedTuple):
    """A period with the decisions in it, and where the validation split before it begins."""

    name: str
    entries: list[LoggedDecision]
    places: np.ndarray  # of the entries among all decisions
    validation_from: str
    test_from: str


class Market(NamedTuple):
    """All D decisions of the files, with the outcomes that are trusted, and what was known of the trend."""

    cases: Cases
    logged: list[LoggedDecision]
    trend_up: np.ndarray  # (D,) bool

    @property
    def columns(self) -> Columns:
        return self.cases.columns

    @property
    def known(self) -> np.ndarray:
        """(D,) bool: of which decisions the outcomes of all candidates are known."""
        unknown = self.columns.decision_of[np.isnan(self.cases.computed)]
        return np.bincount(unknown, minlength=len(self.columns)) == 0


class Played(NamedTuple):
    """What each policy sold in a period, (E,) places of candidates, -1 for nothing, on its E decisions of which all
    outcomes are known."""

    picks: dict[str, np.ndarray]
    of: np.ndarray  # (E,) the decisions
    unknown: int  # decisions that are left out


def period_of(entry: LoggedDecision, period: str) -> str:
    time = entry.decision.decision_time
    return f"{time.year}-Q{(time.month + 2) // 3}" if period == "quarter" else time.strftime(PERIODS[period])


def make_folds(logged: list[LoggedDecision], period: str) -> Iterator[Fold]:
    """Each period with at least MIN_TIMES decision times before it."""
    for name in sorted({period_of(entry, period) for entry in logged}):
        places = [place for place, entry in enumerate(logged) if period_of(entry, period) == name]
        entries = [logged[place] for place in places]
        begins = entries[0].decision.decision_time
        before = sorted({e.decision.decision_time for e in logged if e.decision.decision_time < begins})
        if len(before) >= MIN_TIMES:
            validation = max(MIN_VALIDATION, len(before) - round(len(before) * (1 - VALIDATION)))
            yield Fold(name, entries, np.array(places), before[-validation].isoformat(), begins.isoformat())


def make_market(backtest: Backtest) -> Market:
    decisions = backtest.decisions
    cases = make_cases(decisions, decisions.columns(), backtest.options)
    numbers = cases.columns.numbers | {COUNTERFACTUAL: cases.computed}
    columns = dataclasses.replace(cases.columns, numbers=numbers)
    return Market(cases._replace(columns=columns), logged_of(columns), regimes(decisions, columns)[TREND[0]])


def splits_of(fold: Fold, market: Market, args: argparse.Namespace) -> dict[str, np.ndarray]:
    config = make_config(args, validation_from=fold.validation_from, test_from=fold.test_from)
    return split_places(market.columns.time, market.cases.label_end, config)


def decide(fold: Fold, market: Market, files: list[str], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The picks of each policy on the fold's decisions, fitted on what lies before them."""
    columns, splits = market.columns, splits_of(fold, market, args)
    config = make_config(args)
    train, validation, test = (columns.take(places) for places in (splits["train"], splits["validation"], fold.places))
    scorer = learning.learn(train, config)
    if np.isfinite(learning.outcomes(validation, config)).any():
        scorer = learning.fit_offset(scorer, validation, config)
    else:  # in files of a few months, whose outcomes last for weeks
        print(f"{fold.name}: no outcome of the validation split was settled before it: the Q-scorer has no offset.")
    picks = {name: made[fold.places] for name, made in plain_policies(market).items()}
    picks |= {
        RULE: score_rule(train).picks(test),
        NEAREST: nearest_rule(train).picks(test),
        RIDGE: ridge(columns.take(np.concatenate([splits["train"], splits["validation"]])), config).picks(test),
        Q: picks_of(scorer, test, scorer.predict(test)),
    }
    return picks | (tuned_models(fold, args, files) if args.models else {})


def plain_policies(market: Market) -> dict[str, np.ndarray]:
    """The picks of what needs no fitting, (D,) each."""
    columns, cases = market.columns, market.cases
    # The file's ratio is of its own iv; a seller looks at the vol that he is paid.
    ratio = columns.numbers["ivrv_ratio"] * cases.vol / columns.numbers["iv"]
    return {
        TEACHER: columns.chosen,
        NEVER: np.full(len(columns), -1),
        LOWEST: highest(-abs(columns.numbers["delta"]), columns),
        PREMIUM: highest(cases.premium, columns),
        IF_RICH: np.where(at(columns.chosen, ratio, columns, np.nan) > 1, columns.chosen, -1),
        UNLESS_UP: np.where(market.trend_up, -1, columns.chosen),
    }


def nearest_rule(train: Columns) -> Rule:
    """Sells the delta nearest to TARGET_DELTA, if its score is at least the threshold that agrees best with train."""

    def values(columns: Columns) -> np.ndarray:
        nearest = highest(-abs(abs(columns.numbers["delta"]) - TARGET_DELTA), columns)
        return np.where(columns.place == nearest[columns.decision_of], scores(columns), -np.inf)

    return Rule(values, fit_threshold(values(train), train))


def ridge(before: Columns, config: CoveredCallCandidatesConfig) -> Rule:
    """Sells the highest outcome that a linear model predicts, if it is above 0."""
    styles = sorted(before.names[code] for code in np.unique(before.exit_style))
    target = learning.outcomes(before, config)
    known = ~np.isnan(target)
    model = make_pipeline(SimpleImputer(keep_empty_features=True), StandardScaler(), Ridge())
    model.fit(learning.features(before, styles)[known], target[known])
    return Rule(lambda columns: model.predict(learning.features(columns, styles)), np.nextafter(0, 1))


def tuned_models(fold: Fold, args: argparse.Namespace, files: list[str]) -> dict[str, np.ndarray]:
    from covered_call.language_model.policy import Policy  # only here: the others need no torch

    sft, dpo = (Path(args.output_dir) / "models" / fold.name / name for name in ("sft", "dpo"))
    train(fold, args, files, sft, dpo)
    decisions = [entry.decision for entry in fold.entries]
    answers = {name: Policy.load(folder).decide(decisions) for name, folder in ((SFT, sft), (DPO, dpo))}
    return {name: np.array([-1 if one.pick is None else one.pick for one in its]) for name, its in answers.items()}


def train(fold: Fold, args: argparse.Namespace, files: list[str], sft: Path, dpo: Path) -> None:
    """A tiny Phi-3 tuned to rank as the teacher did, and then on preferences; each in a minute or two."""
    data = ["--data_files", *files, "--exit_style", args.exit_style]
    data += ["--validation_from", fold.validation_from, "--test_from", fold.test_from]
    common = ["--overwrite_output_dir", "--seed", str(args.seed), "--report_to", "none", "--disable_tqdm", "true"]
    base = ["--config", "tiny", "--dataset_config", "per_decision_ranking", "--balance", "none"]
    tuning.run("sft", [*base, *data, *common, "--max_steps", str(args.sft_steps), "--output_dir", str(sft)])
    outcomes = [word for name, value in given_outcomes(args).items() for word in (f"--{name}", str(value))]
    preferences = ["--config", "tiny_dpo", "--adapter", str(sft), "--max_steps", str(args.dpo_steps)]
    tuning.run("dpo", [*preferences, *data, *outcomes, *common, "--output_dir", str(dpo)])


def given_outcomes(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in OUTCOME_OPTIONS if getattr(args, name) is not None}


def make_config(args: argparse.Namespace, **options) -> CoveredCallCandidatesConfig:
    return CoveredCallCandidatesConfig(exit_style=args.exit_style, **given_outcomes(args), **options)


def code_hash(root: Path) -> str:
    """SHA-256 of all that a fold's picks are made by: this file, the package and its recipes, with their names."""
    parts = (("benchmarks", "beat_the_teacher.py"), ("covered_call", "**/*.py"), ("configs", "**/*.yaml"))
    paths = [path for folder, pattern in parts for path in sorted((root / folder).glob(pattern))]
    found = hashlib.sha256()
    for path in paths:
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def play(fold: Fold, market: Market, backtest: Backtest, args: argparse.Namespace) -> Played:
    """The fold's picks, from a file if they were computed before."""
    path = Path(args.output_dir) / f"{fold.name}.json"
    settings = {
        **{name: getattr(args, name) for name in ("exit_style", "models", "sft_steps", "dpo_steps", "seed")},
        **{name: getattr(backtest.options, name) for name in OUTCOME_OPTIONS},
        "files": list(backtest.hashes.values()),
        "vols": hash_of_vols(backtest.options.iv_file),
        "code": code_hash(ROOT),
        "fold": [fold.validation_from, fold.test_from],
    }
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("settings") != settings:
        made = decide(fold, market, backtest.files, args)
        picks = {name: [None if pick < 0 else pick for pick in its.tolist()] for name, its in made.items()}
        kept = {"settings": settings, "picks": picks}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, json.dumps(kept))
    known = market.known[fold.places]
    of = fold.places[known]
    picks = {
        name: np.array([-1 if pick is None else pick for pick in its])[known] for name, its in kept["picks"].items()
    }
    picks[ORACLE] = best_places(market.cases.computed, market.columns)[of]
    return Played(picks, of, int((~known).sum()))


# ---------------------------------------------------------------------------------------------------------------------
# Money


class Paid(NamedTuple):
    """P&L vs HODL of K policies on E decisions, by what they are called."""

    of: np.ndarray  # (E,) the decisions
    picks: dict[str, np.ndarray]  # (E,) each
    usd: dict[str, np.ndarray]  # (E,) each
    percent: dict[str, np.ndarray]  # (E,) each, of spot


def pay(market: Market, of: np.ndarray, picks: dict[str, np.ndarray]) -> Paid:
    usd = {name: outcome(market.cases, of, its) for name, its in picks.items()}
    spot = market.columns.spot[of]
    return Paid(of, picks, usd, {name: 100 * its / spot for name, its in usd.items()})


class Blocks:
    """Resamples of the decision times in blocks that reach from a decision to the last of its outcomes."""

    def __init__(self, cases: Cases, of: np.ndarray):
        self.times, self.place = np.unique(cases.columns.time[of], return_inverse=True)
        ends = np.zeros(len(self.times), np.int64)
        np.maximum.at(ends, self.place, cases.label_end[of])
        self.length = resampling.block_length(self.times, ends)
        self.draws = resampling.draw(len(self.times), self.length)

    def by_time(self, values: np.ndarray) -> np.ndarray:
        """(T,) the sums of (E,) values at each time."""
        return np.bincount(self.place, values, len(self.times))

    def interval(self, values: np.ndarray) -> tuple[float, float] | None:
        """The 95 % interval of the mean of (E,) values; None where there are too few blocks for one."""
        if self.draws is None:
            return None
        sums, counts = self.draws.sums(np.stack([self.by_time(values), np.bincount(self.place)], axis=1)).T
        return resampling.interval(sums / counts, sums / counts)

    def text(self, values: np.ndarray, digits: int) -> str:
        """The mean of (E,) values with its interval; - 0 is 0."""
        mean, *sides = (f"{one + 0:,.{digits}f}" for one in (values.mean(), *(self.interval(values) or ())))
        return f"{mean} [{', '.join(sides)}]" if sides else mean


def table(played: dict[str, Played], paid: Paid, blocks: Blocks) -> str:
    head = ["", "trade rate", "% of spot", "minus teacher", "USD", "minus teacher"]
    cells = [[*head, *(f"{name}, % of spot" if name == next(iter(played)) else name for name in played)]]
    edges = np.cumsum([len(one.of) for one in played.values()])[:-1]
    for name in sorted(paid.usd, key=lambda name: -paid.percent[name].mean()):
        row = [name, f"{(paid.picks[name] >= 0).mean():.3f}"]
        for money, digits in ((paid.percent, 3), (paid.usd, 1)):
            differs = money[name] - money[TEACHER]
            row += [blocks.text(money[name], digits)]
            row += ["" if name == TEACHER else blocks.text(differs, digits)]
        cells.append(row + [f"{its.mean() + 0:.3f}" for its in np.split(paid.percent[name], edges)])
    return markdown(cells)


def caption(played: dict[str, Played], paid: Paid, blocks: Blocks, market: Market) -> str:
    counts = ", ".join(f"{name} {len(one.of)}" for name, one in played.items())
    unknown = sum(one.unknown for one in played.values())
    interval = f"95 % intervals by blocks of {blocks.length} decision times, as long as the longest outcome."
    if blocks.draws is None:
        interval = (
            f"No intervals: the longest outcome spans {blocks.length} of the {len(blocks.times)} decision times, and "
            f"fewer than {resampling.MIN_BLOCKS} such blocks tell nothing."
        )
    columns = market.columns
    its = np.isin(columns.decision_of, paid.of)
    percent = 100 * market.cases.computed[its] / columns.spot[columns.decision_of[its]]
    return (
        f"Mean P&L vs HODL a decision of {len(rivals(paid))} policies and the teacher, on {len(paid.of):,} decisions "
        f"({counts}); {unknown} more with an unknown outcome are left out. {interval}\n"
        f"All {its.sum():,} candidates: {percent.mean():+.2f} % of spot on average, standard deviation "
        f"{percent.std():.2f}."
    )


def rivals(paid: Paid) -> list[str]:
    """What is compared with the teacher; the oracle is no policy."""
    return [name for name in paid.picks if name not in (TEACHER, ORACLE)]


def verdict(paid: Paid, blocks: Blocks) -> str:
    """Whether the best of what was tried is shown to be better than the teacher, and than never selling: its interval
    must lie above 0, and its p-value with all that were tried counted (luck.reality_check) below luck.LEVEL. Neither
    is enough: the p-value alone is small, too, for what differs in a single week at the edge of the data."""
    if blocks.draws is None:
        return "Nothing is shown to earn more than the teacher, or than never selling: these are too few decisions."
    said = []
    for benchmark, what in ((TEACHER, "the teacher"), (NEVER, "never selling")):
        others = [name for name in (TEACHER, *rivals(paid)) if name != benchmark]
        gains = {name: paid.percent[name] - paid.percent[benchmark] for name in others}
        p = luck.reality_check(np.stack([blocks.by_time(gains[name]) for name in others], axis=1), blocks.draws)
        tried = dict(zip(others, p.tolist(), strict=True))
        shown = [name for name in others if tried[name] < luck.LEVEL and (blocks.interval(gains[name]) or (0,))[0] > 0]
        best = max(others, key=lambda name: gains[name].mean())
        differ = int((paid.picks[best] != paid.picks[benchmark]).sum())
        said.append(
            f"{', '.join(shown) or 'Nothing'} is shown to earn more than {what}. Of {len(others)} that were tried the "
            f"best is {best}: {blocks.text(gains[best], 3)} % of spot a decision beside {what}, from {differ:,} "
            f"decisions where they differ; p {tried[best]:.3f} with all that were tried counted."
        )
    return "\n".join(said)


def check_lines(backtest: Backtest, market: Market) -> str:
    """How outcomes come about, how they follow what was recorded, and what the teacher's own trades come to."""
    decisions = backtest.decisions
    lines = [its.sentence(style, backtest.options) for style, its in decisions.replay.terms.items()]
    lines += decisions.checks()
    earned = at(market.columns.chosen, market.cases.computed, market.columns, np.nan)
    earned = earned[~np.isnan(earned)]
    if len(earned):
        mean = f"{earned.mean():+,.2f} USD a trade on average"
        lines.append(f"The teacher's {len(earned):,} trades with a known outcome, in all periods: {mean}.")
    return "\n".join(lines)


def draw(market: Market, paid: Paid, path: Path) -> None:
    """Cumulative P&L vs HODL; the oracle, far above, on an axis of its own below."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    times = market.columns.time[paid.of].astype("datetime64[us]")
    for name, percent in paid.percent.items():
        axis = below if name == ORACLE else above
        style = {"color": "grey", "linewidth": 4, "alpha": 0.5} if name == TEACHER else {"linewidth": 1.2}
        axis.plot(times, percent.cumsum(), label=name, **style)
    for axis in (above, below):
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    above.set_ylabel("cumulative P&L vs HODL (% of spot)")
    below.set_ylabel("(% of spot)")
    above.set_title("Walk-forward, each period decided by what was fitted before it; never selling is 0")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    config = make_config(args)
    config.check()
    backtest = Backtest(find_csvs(args.data_files, None, ""), config)
    market = make_market(backtest)
    print(check_lines(backtest, market), flush=True)
    if np.isnan(market.cases.computed).all():
        sys.exit("error: no outcome is known that can be trusted: give other files, or another settlement.")
    folds = list(make_folds(market.logged, args.period))
    if not folds:
        sys.exit(
            f"error: no {args.period} has {MIN_TIMES} decision times before it: give more data or a shorter period."
        )
    played = {}
    for fold in folds:
        train, validation, _ = (len(places) for places in splits_of(fold, market, args).values())
        settled = f"{train} + {validation} (train, validation) that were settled before {fold.test_from}"
        print(f"{fold.name}: {len(fold.entries)} decisions, fitted on {settled}", flush=True)
        played[fold.name] = play(fold, market, backtest, args)
    played = {name: one for name, one in played.items() if len(one.of)}
    if not played:
        sys.exit("error: at no decision of these periods are the outcomes of all candidates known.")
    names = next(iter(played.values())).picks
    picks = {name: np.concatenate([one.picks[name] for one in played.values()]) for name in names}
    paid = pay(market, np.concatenate([one.of for one in played.values()]), picks)
    blocks = Blocks(market.cases, paid.of)
    draw(market, paid, Path(args.output_dir) / "equity.png")
    print(f"\n{table(played, paid, blocks)}\n\n{caption(played, paid, blocks, market)}\n{verdict(paid, blocks)}")
    print(f"\nPlot in {args.output_dir}/equity.png")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", nargs="+", default=[SAMPLE], help="default: the sample")
    parser.add_argument("--exit_style", default="hold_to_expiry", help="default: %(default)s")
    parser.add_argument("--period", choices=PERIODS, default="year", help="default: %(default)s")
    parser.add_argument("--no_models", dest="models", action="store_false", help="leave the language models out")
    for name, steps in (("sft_steps", 100), ("dpo_steps", 200)):
        parser.add_argument(f"--{name}", type=int, default=steps, help="for each period, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the language models, default: %(default)s")
    parser.add_argument("--output_dir", default="out/beat_the_teacher", help="default: %(default)s")
    add_data_options(parser, groups=(OUTCOMES,))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    logging.getLogger("covered_call").setLevel(logging.ERROR)
    try:
        main()
    except (CandidatesError, RecipeError, TrainingStopped) as error:
        sys.exit(f"error: {error}")
