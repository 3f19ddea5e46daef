"""The card's figures are those of the sample as it is built, and its head is what the Hub asks for."""

import re

from conftest import SCRIPT
from huggingface_hub import DatasetCard

from covered_call_candidates import RECORDS

SAMPLE = str(SCRIPT.parent / "data" / "sample" / "*.csv")
CARD = (SCRIPT.parent / "dataset_card.md").read_text(encoding="utf-8")


def test_the_split_table_is_that_of_the_sample(load, caplog):
    candidates, decisions = load("per_candidate", data_files=SAMPLE), load("per_decision_ranking", data_files=SAMPLE)
    for name, rows in candidates.items():
        times, number = decisions[name]["decision_time"], len(decisions[name])
        sold = rows["label"][:].count("SELL_CALL") / len(rows)
        line = f"| {name} | {min(times):%Y-%m-%d} to {max(times):%Y-%m-%d} | {number:,} | {len(rows):,} | "
        assert line + f"{sold:.1%}".replace("%", " %") + f" | {number:,} |\n" in CARD
    purged = re.search(r"Purged (\d+) decision\(s\).*: (\d+) from train, (\d+) from validation", caplog.text)
    assert "{} decisions are purged, {} from train and {} from validation".format(*purged.groups()) in CARD


def test_every_field_is_described(load):
    for name in RECORDS:
        for field in load(name, data_files=SAMPLE)["test"].features:
            assert f"`{field}`" in CARD


def test_the_card_says_simulated_in_its_first_sentence_and_has_a_licence():
    card = DatasetCard(CARD)
    assert "simulated" in card.text.strip().split("\n\n")[1].split(".")[0]
    assert card.data.license == "apache-2.0" and card.data.pretty_name
