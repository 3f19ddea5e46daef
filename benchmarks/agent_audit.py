"""Does an agent's choice pay? The audit of one over collected chains, in shadow and on paper.

    python benchmarks/agent_audit.py --chains 'chains/*.parquet' --spots 'vols/spot_{underlying}_0800utc.csv'

At each snapshot the score rule decides, with the rules of risk at their defaults: first without a portfolio (shadow),
then with one on paper. All that was offered is settled by covered-call agent settle, and the tables are those of
covered-call agent report. Logs and reports stay in --to.
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from covered_call.runtime.agent import main as agent  # noqa: E402
from covered_call.runtime.logged import read_log  # noqa: E402
from covered_call.runtime.report_page import MONEY_HEAD, difference, money  # noqa: E402
from covered_call.tables import markdown  # noqa: E402

CONFIG = """\
policy: {{rule: {{threshold: 3.0}}}}
holdings: {{BTC: 1.0, ETH: 10.0}}
sizing: {{method: holdings_share, share: 0.1}}
spots: {spots}
"""


def main() -> None:
    args = parse_arguments()
    to = Path(args.to)
    to.mkdir(parents=True, exist_ok=True)
    (to / "agent.yaml").write_text(CONFIG.format(spots=args.spots), encoding="utf-8")
    fates, vetoes, said = [["mode", "underlying", *MONEY_HEAD]], [["mode", "underlying", "veto", *VETO_HEAD]], []
    for mode in ("shadow", "paper"):
        for name, its in audit(mode, to / mode, to / "agent.yaml", args.chains).items():
            fates += [[mode, name, fate, f"{one['offered']:,}", *money(one)] for fate, one in its["fates"].items()
                if one["offered"]]  # fmt: skip
            vetoes += [[mode, name, *veto_cells(code, one)] for code, one in its["vetoes"].items()]
            said.append(f"{mode}, {name}: {difference(its['taken_less_rejected'])}")
    print("\n\n".join([*spots_of(to / "shadow"), markdown(fates), *said, markdown(vetoes)]))


VETO_HEAD = ["stopped", "hit rate", "mean %", "alone", "mean % alone"]


def veto_cells(code: str, one: dict[str, Any]) -> list[str]:
    cells, alone = money(one), money(one["alone"])
    return [code, f"{one['stopped']:,}", cells[1], cells[4], alone[0], alone[4]]


def audit(mode: str, log: Path, config: Path, chains: list[str]) -> dict[str, Any]:
    """By underlying, as report.json has it; NaN where that has null."""
    with contextlib.redirect_stdout(io.StringIO()):
        agent([mode, "--config", str(config), "--snapshot", *chains, "--log", str(log)])
        agent(["settle", str(log), "--snapshot", *chains])
        agent(["report", str(log)])
    return with_nan(json.loads((log / "report.json").read_text(encoding="utf-8"))["audit"])


def with_nan(value: Any, of: str = "") -> Any:
    if isinstance(value, dict):
        return {name: with_nan(one, name) for name, one in value.items()}
    return float("nan") if value is None and not of.startswith(("interval", "why")) else value


def spots_of(log: Path) -> list[str]:
    """How the market went meanwhile."""
    decisions = [one.decision for one in read_log(log).entries]
    lines = []
    for name in sorted({one.underlying for one in decisions}):
        its = [one for one in decisions if one.underlying == name]
        lines.append(f"{name}: {len(its):,} decisions, {its[0].decision_time:%Y-%m-%d} to "
            f"{its[-1].decision_time:%Y-%m-%d}, spot {its[0].spot:,.0f} to {its[-1].spot:,.0f} USD.")  # fmt: skip
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", nargs="+", metavar="PARQUET", required=True, help="files of option quotes, or "
        "quoted globs")  # fmt: skip
    parser.add_argument("--spots", metavar="CSV", required=True, help="daily prices of BTC and ETH to settle at and "
        "for realised vols; {underlying} stands for each name")  # fmt: skip
    parser.add_argument(
        "--to", metavar="DIR", default="out/agent_audit", help="default: %(default)s, which must be new"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
