"""The benchmark of the agent's audit, on chains that tests make: its tables are those of the reports it leaves."""

import datetime
import json

from conftest import SCRIPT, import_script, on_the_default_stack
from market.quotes import write_days

pytestmark = on_the_default_stack


def test_the_tables_of_both_modes_are_those_of_their_reports(tmp_path, monkeypatch, capsys):
    (tmp_path / "chains").mkdir()
    write_days(tmp_path / "chains", 22)
    days = [datetime.date(2025, 10, 1) + datetime.timedelta(days=number) for number in range(120)]
    for name in ("BTC", "ETH"):
        (tmp_path / f"spot_{name}.csv").write_text(
            "date,price\n" + "".join(f"{day},{93_000 + day.day}\n" for day in days)
        )
    words = ["--chains", f"{tmp_path}/chains/*.parquet", "--spots", f"{tmp_path}/spot_{{underlying}}.csv"]
    monkeypatch.setattr("sys.argv", ["agent_audit.py", *words, "--to", str(tmp_path / "out")])
    import_script(SCRIPT.parent / "benchmarks" / "agent_audit.py").main()
    said = capsys.readouterr().out
    assert said.startswith("BTC: 22 decisions, 2025-12-10 to 2025-12-31, spot 93,000 to ")
    for mode in ("shadow", "paper"):
        audit = json.loads((tmp_path / "out" / mode / "report.json").read_text())["audit"]["BTC"]
        offered = {fate: its["offered"] for fate, its in audit["fates"].items() if its["offered"]}
        assert sum(offered.values()) > 100 and f"{mode}, BTC: Taken less rejected" in said
        for fate, count in offered.items():
            its = audit["fates"][fate]
            assert f"| {mode} | BTC | {fate} | {count} | {its['known']} | {100 * its['hit_rate']:.1f} % |" in said
        for code, its in audit["vetoes"].items():
            assert f"| {mode} | BTC | {code} | {its['stopped']} |" in said
    import_script(SCRIPT.parent / "benchmarks" / "agent_audit.py").main()  # again: all was decided, and is settled
    assert capsys.readouterr().out == said
