"""The card is the one that is published for the sample, and its head is what the Hub asks for."""

import contextlib
import io
import re

import pytest
from conftest import SCRIPT
from huggingface_hub import DatasetCard

from covered_call.candidates.records import FEATURES, RECORDS
from covered_call.publishing import publish

SAMPLE = str(SCRIPT.parent / "data" / "sample" / "*.csv")
CARD = (SCRIPT.parent / "dataset_card.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def published() -> str:
    """The card as a dry run prints it for the sample."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        publish.main(["user/data", "--dry-run", "--data_files", SAMPLE])
    return "---\n" + printed.getvalue().split("\n---\n", 1)[1]


@pytest.mark.slow
def test_its_figures_and_configs_are_those_that_publish_fills_in_for_the_sample(published):
    figures = re.search("<!-- statistics -->.*<!-- /statistics -->", published, re.DOTALL)
    assert figures[0] in CARD, f"dataset_card.md must hold this:\n{figures[0]}"
    filled, card = DatasetCard(published).data, DatasetCard(CARD).data
    assert card["configs"] == filled["configs"] and card["size_categories"] == filled["size_categories"]


@pytest.mark.slow
def test_the_published_card_is_this_one_but_for_what_is_filled_in(published):
    published = DatasetCard(published)
    loading = "<!-- loading -->.*<!-- /loading -->"
    kept = [re.sub(loading, "", card.text, flags=re.DOTALL).strip() for card in (published, DatasetCard(CARD))]
    assert kept[0] == kept[1]
    assert 'load_dataset("user/data", "per_candidate")' in published.text and "trust_remote_code" not in published.text
    published.data.pop("dataset_info")
    assert published.data.to_dict() == DatasetCard(CARD).data.to_dict()


@pytest.mark.slow
def test_the_published_card_lists_the_fields_of_each_config(published):
    configs = DatasetCard(published).data["dataset_info"]
    named = {config["config_name"]: [field["name"] for field in config["features"]] for config in configs}
    assert named == {name: list(FEATURES[name]) for name in RECORDS}


def test_every_field_is_described():
    for name in RECORDS:
        for field in FEATURES[name]:
            assert f"`{field}`" in CARD


def test_the_card_says_simulated_in_its_first_sentence_and_has_a_licence():
    card = DatasetCard(CARD)
    assert "simulated" in card.text.strip().split("\n\n")[1].split(".")[0]
    assert card.data.license == "apache-2.0" and card.data.pretty_name
