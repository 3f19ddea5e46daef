import json
import re

import pytest
import torch
from conftest import REAL_PHI3, decision, needs_real_phi3, read_candidates, write_csv

from covered_call import tuning
from covered_call.candidates.builder import load_candidates
from covered_call.candidates.explanations import explain
from covered_call.candidates.options import CHATS, CoveredCallCandidatesConfig
from covered_call.candidates.schema import NO_TRADE, SKIP
from covered_call.evaluation.explanations import judge_explanations, some_of
from covered_call.language_model.loading import answer_tokens, load_tokenizer
from covered_call.language_model.manifest import PolicyError, grounds_in, read_manifest
from covered_call.language_model.policy import Policy
from covered_call.language_model.writing import write_on
from covered_call.training.runs import RecipeError


@pytest.fixture(scope="module")
def folders(corpus, corpus_base, tmp_path_factory) -> dict:
    """A quick run of each task that explains its answers."""
    home = tmp_path_factory.mktemp("explaining")
    for task in CHATS:
        words = ["--dataset_config", task, "--explain", "true", "--data_files", corpus, "--balance", "none"]
        words += ["--model_name_or_path", str(corpus_base), "--output_dir", str(home / task), "--max_steps", "2"]
        words += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
        words += ["--candidate_order", "shuffle"] if task == "per_decision_ranking" else []
        tuning.run("sft", ["--config", "tiny", *words, "--report_to", "none"])
    return {task: home / task for task in CHATS}


@pytest.fixture(scope="module")
def decisions(corpus) -> list:
    entries = read_candidates([corpus], CoveredCallCandidatesConfig())
    return [entry.decision for entry in (*entries[:3], entries[-1])]


@pytest.mark.parametrize("task", CHATS)
def test_an_explanation_begins_with_the_scored_answer(folders, decisions, task):
    policy = Policy.load(folders[task])
    answers, explained = policy.decide(decisions), policy.explain(decisions)
    for answer, one in zip(answers, explained, strict=True):
        pick = answer.pick
        if task == "per_candidate" and one.messages:
            assert one.label == (SKIP if pick is None else "SELL_CALL")
        else:
            assert one.label == (NO_TRADE if pick is None else str(pick + 1))
        assert one.text.partition("\n")[0] == one.label
    assert explained[-1].text == "NO_TRADE\nStrength: STRONG\nReason: No call is offered."
    assert policy.decide(decisions) == answers


@pytest.mark.parametrize("task", CHATS)
def test_what_the_template_would_have_written_passes_all_checks(folders, decisions, task):
    policy = Policy.load(folders[task])
    grounds = grounds_in(folders[task], policy.manifest)
    written = policy.explain(decisions)
    told = [
        one._replace(text=explain(one.decision, one.label, grounds, task, one.place or 0)) if one.messages else one
        for one in written
    ]
    judged = judge_explanations(told, grounds, task)
    assert {name: share for name, (share, *_) in judged.shares.items()} == dict.fromkeys(judged.shares, 1.0)
    babble = judge_explanations([one._replace(text="?") for one in written], grounds, task)
    assert {share for share, *_ in babble.shares.values()} == {0.0}
    assert "Explanations of 4 decisions: valid 0.000 [0.000, 0.490]" in babble.sentence()
    assert len(judged.lines().splitlines()) == 4
    assert json.loads(judged.lines().splitlines()[0])["true"] is True


def test_an_order_of_the_callers_own_changes_no_decision(folders, decisions):
    policy = Policy.load(folders["per_decision_ranking"])
    turned = decisions[0]._replace(candidates=decisions[0].candidates[::-1])
    (one,), (other,) = policy.explain([decisions[0]]), policy.explain([turned])
    assert one == other


def test_a_model_of_answers_alone_is_not_asked_why(corpus_base, corpus, tmp_path, decisions):
    words = ["--config", "tiny", "--data_files", corpus, "--model_name_or_path", str(corpus_base), "--balance", "none"]
    words += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--eval_strategy", "no"]
    words += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--report_to", "none"]
    tuning.run("sft", words)
    with pytest.raises(PolicyError, match="gives answers alone: tune a model with explain: true"):
        Policy.load(tmp_path / "out").explain(decisions)


def test_pairs_do_not_start_from_a_model_that_explains(folders, corpus, tmp_path):
    words = ["--config", "tiny_dpo", "--adapter", str(folders["per_decision_ranking"]), "--data_files", corpus]
    with pytest.raises(RecipeError, match="explains its answers, and pairs are of answers alone"):
        tuning.run("dpo", [*words, "--output_dir", str(tmp_path / "out")])


def test_a_manifest_whose_grounds_are_spoilt_is_refused(folders, tmp_path):
    manifest = read_manifest(folders["per_candidate"])
    assert grounds_in(tmp_path, manifest).formula is None
    for spoilt in ({}, [], {"formula": "mine", "cuts": {"trade": [1, 2], "other": [1, 2]}}, {"formula": None}):
        with pytest.raises(PolicyError, match="explains is"):
            grounds_in(tmp_path, {"explains": spoilt})


def test_an_explained_answer_ends_with_its_line(corpus_base):
    tokenizer = load_tokenizer(str(corpus_base))
    tokens = answer_tokens(tokenizer, [{"role": "user", "content": "?"}], ["1", "10", "NO_TRADE"], explained=True)
    assert [tokenizer.decode(ids) for ids in tokens.values()] == ["1\n", "10\n", "NO_TRADE\n"]


@needs_real_phi3
def test_an_explained_answer_of_phi_3_ends_with_its_line():
    tokenizer = load_tokenizer(str(REAL_PHI3))
    answers = [*map(str, range(1, 13)), NO_TRADE]
    tokens = answer_tokens(tokenizer, [{"role": "user", "content": "?"}], answers, explained=True)
    assert [tokenizer.decode(ids) for ids in tokens.values()] == [f"{answer}\n" for answer in answers]
    assert {ids[-1] for ids in tokens.values()} == {tokenizer.convert_tokens_to_ids("<0x0A>")}


class Counts(torch.nn.Module):
    """Writes the number of each place that it has seen, and so shows whether padding is seen."""

    device = torch.device("cpu")

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        new = attention_mask.sum(1, keepdim=True) + torch.arange(max_new_tokens)
        return torch.cat([input_ids, new], 1)


def test_texts_are_written_together_as_they_would_be_alone(corpus_base):
    tokenizer = load_tokenizer(str(corpus_base))
    assert write_on(Counts(), tokenizer, [[7], [7, 7, 7]], end=5, most=6) == [[1, 2, 3, 4], [3, 4]]


@pytest.mark.parametrize("task", CHATS)
def test_the_loss_of_an_answer_is_what_it_is_without_an_explanation(corpus, corpus_base, tmp_path, task):
    from covered_call.training.examples import IGNORE, encode_split

    tokenizer = load_tokenizer(str(corpus_base))
    for explained in (True, False):
        rows = load_candidates(task, data_files=corpus, cache_dir=str(tmp_path), explain=explained)["train"]
        encoded = encode_split(rows.select(range(4)), tokenizer, task)
        for row, label in zip(encoded, rows["label"], strict=False):
            learnt = tokenizer.decode([token for token in row["labels"] if token != IGNORE])
            assert learnt == (label + "\n" if explained else label + "<|end|>")
            behind = tokenizer.decode(row["input_ids"]).rpartition("<|assistant|>")[2]
            assert bool(re.search(r"Reason: .*\.<\|end\|>$", behind)) == explained


def test_at_most_so_many_are_written(tmp_path):
    path = write_csv(tmp_path / "a.csv", [row for day in range(9) for row in decision(day)])
    decisions = [entry.decision for entry in read_candidates([path], CoveredCallCandidatesConfig())]
    assert some_of(decisions, 100) == decisions
    assert some_of(decisions, 3) == [decisions[0], decisions[4], decisions[8]]
