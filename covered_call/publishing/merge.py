"""An adapter merged into its base: one model in bfloat16, which a server of language models takes as it is.

    covered-call merge out/ranking                            # into out/ranking_merged
    covered-call merge out/ranking --to served/ranking --data_files 'runs/*.csv'

The adapter goes into the base in full precision, whatever it was tuned on, and both are asked the same 256 prompts: if
too few of the answers are the same, nothing is written. Chat template, tokenizer, recipe, calibration and manifest go
along, so that covered-call evaluate and publish take the new folder as they take the old one.
"""

import argparse
import gc
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from covered_call import atomic
from covered_call.candidates.builder import Backtest
from covered_call.candidates.columns import logged_of
from covered_call.candidates.data_options import Help, add_data_options, backtest_of, flags, typed
from covered_call.candidates.schema import CandidatesError, Decision
from covered_call.command_line import plain_errors, start_logging
from covered_call.language_model.loading import ADAPTER, encode, load_adapter, load_base, pinned_revision
from covered_call.language_model.manifest import MANIFEST, PolicyError, hash_of, read_manifest
from covered_call.language_model.policy import Policy
from covered_call.publishing.dataset import CARD, fill, load_card, workplace
from covered_call.publishing.hub import PublishError
from covered_call.publishing.model import SAID, check_free

PROMPTS = 256  # that both models are asked
MIN_SAME = 0.98  # rounding to 16 bits turns near ties over, and the base without its 4 bits is another one by a little


def main(arguments: list[str]) -> None:
    """Merges, compares, and only then puts the folder in its place; an error is one line and a bad exit."""
    start_logging()
    args = parse_arguments(arguments)
    with plain_errors(args, PublishError, PolicyError, CandidatesError):
        merge(args)


def merge(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    manifest = read_manifest(folder)
    if not manifest["adapter"]:
        raise PublishError(f"{folder} is no adapter but a whole model: there is nothing to merge, serve it as it is.")
    target = Path(args.to or f"{folder.resolve()}_merged")
    check_free(target)
    backtest, tasks = backtest_of(args, manifest["recipe"]), manifest.get("tasks") or [manifest["task"]]
    asked = {task: asked_of(backtest, task, PROMPTS // len(tasks)) for task in tasks}
    with workplace(target) as scratch:
        made = scratch / "new"
        print(f"Merging {folder} into {manifest['base_model']} in full precision ...", flush=True)
        write_model(folder, manifest, made)
        agreement = compare(folder, made, asked)
        said = f"{agreement.sentence()} {quantized(manifest)}".strip()
        print(said)
        if agreement.same < args.min_same * agreement.prompts:
            raise PublishError(
                f"That is less than {args.min_same:.0%}, and nothing was written. To take it all the same, "
                "min_same=SHARE says from which share on; then judge it anew with covered-call evaluate."
            )
        describe(folder, made, target, manifest, agreement, said)
        check_free(target)  # once more, for the merging took its time
        atomic.replace_folder(made, target)
    print(f"Saved in {target}. Is it as good?  covered-call evaluate --model {target}")


# ---------------------------------------------------------------------------------------------------------------------
# Merge


def write_model(folder: Path, manifest: dict, made: Path) -> None:
    """Weights, configuration and tokenizer of the merged model, and a manifest by which Policy loads it."""
    revision = pinned_revision(folder, manifest)
    base = load_base(manifest["base_model"], "none", torch.bfloat16, "cpu", revision, liger=False)
    merged: Any = load_adapter(base, folder).merge_and_unload(safe_merge=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    merged.generation_config = greedy(merged, tokenizer)
    merged.save_pretrained(made)
    copied = [name for name in manifest["files"] if not name.startswith("adapter_")]
    for name in (*copied, *(name for name in SAID if name != MANIFEST and (folder / name).is_file())):
        shutil.copyfile(folder / name, made / name)
    write_manifest(made, manifest)


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """What a server generates by: the likeliest token, until the one that ends an answer in the chat template."""
    [(_, answer)] = encode(tokenizer, [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]])
    before: Any = model.generation_config
    ends = before.eos_token_id if isinstance(before.eos_token_id, list) else [before.eos_token_id]
    return GenerationConfig(
        do_sample=False,
        bos_token_id=before.bos_token_id,
        eos_token_id=sorted({answer[-1], *(token for token in ends if token is not None)}),
        pad_token_id=tokenizer.pad_token_id,
    )


def write_manifest(made: Path, manifest: dict, **more) -> None:
    files = {path.name: hash_of(path) for path in sorted(made.iterdir()) if path.name not in SAID}
    whole = {**manifest, "adapter": False, "quantization": "none", "files": files, **more}
    atomic.write(made / MANIFEST, json.dumps(whole, indent=2))


def describe(folder: Path, made: Path, target: Path, manifest: dict, agreement: "Agreement", said: str) -> None:
    """The card and the manifest of what was merged: of what, and how far it answers as that does."""
    card = load_card(ModelCard, made / CARD)
    card.data.library_name = "transformers"
    use = f'```python\nfrom covered_call import Policy\n\npolicy = Policy.load("{target}")\n```'
    text = fill(card.text, "loading", "Use it", use)
    card.text = fill(text, "merged", "Merged", f"The adapter is merged into its base, in bfloat16. {said}")
    (made / CARD).write_text(str(card), encoding="utf-8")
    before = {"adapter": manifest["files"].get(ADAPTER), "quantization": manifest["quantization"]}
    write_manifest(made, manifest, merged={"from": folder.resolve().name, **before, **agreement._asdict()})


def quantized(manifest: dict) -> str:
    if manifest["quantization"] == "none":
        return ""
    return (
        f"The adapter was tuned on a base in {manifest['quantization']} and merged into the one in full precision, "
        "which is another by what those bits lost: figures of the one are not those of the other."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Compare


class Agreement(NamedTuple):
    """How a merged model answers beside the adapter: ``same`` of so many prompts, and the most by which the
    probability of an answer differs."""

    prompts: int
    same: int
    probability_moved: float

    def sentence(self) -> str:
        return (
            f"It answers {self.same} of {self.prompts} prompts as the adapter does; no answer's probability differs "
            f"by more than {self.probability_moved:.3f}."
        )


def asked_of(backtest: Backtest, task: str, most: int) -> list[Decision]:
    """Decisions that take about so many prompts, evenly spaced over all splits; CandidatesError if there is none."""
    numbers = evenly(np.concatenate([*backtest.numbers.values()]), 4 * most)
    entries = logged_of(backtest.decisions.columns(numbers))
    decisions = [entry.decision for entry in entries if entry.decision.candidates]
    if not decisions:
        raise CandidatesError("No decision of these files has a candidate to ask both models about: give others.")
    prompts = sum(len(one.candidates) if task == "per_candidate" else 1 for one in decisions)
    return evenly(decisions, 1 + 1.1 * len(decisions) * most // prompts)  # some have fewer candidates than others


def evenly(found: Sequence | np.ndarray, most: float):
    """At most so many, evenly spaced."""
    if len(found) <= most:
        return found
    places = np.linspace(0, len(found) - 1, int(most)).round().astype(int)
    return found[places] if isinstance(found, np.ndarray) else [found[place] for place in places]


def compare(folder: Path, made: Path, asked: dict[str, list[Decision]]) -> Agreement:
    """Both models as Policy loads them, one after the other.

    Args:
        asked: by task.
    """
    ours, its = ([one for task in asked for one in probabilities(path, task, asked)] for path in (folder, made))
    same = sum(int(one.argmax() == other.argmax()) for one, other in zip(ours, its, strict=True))
    moved = max((one - other).abs().max().item() for one, other in zip(ours, its, strict=True))
    return Agreement(len(ours), same, moved)


def probabilities(folder: Path, task: str, asked: dict[str, list[Decision]]) -> list[torch.Tensor]:
    """For each of a task's share of PROMPTS prompts those of its admissible answers."""
    policy = Policy.load(folder, task=task)
    scored = [row.softmax(-1) for rows in policy.score(asked[task]) for row in rows][: PROMPTS // len(asked)]
    del policy
    gc.collect()  # before the next one is loaded: two would not fit where one does
    return scored


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call merge", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    what = parser.add_argument_group("what, and where to")
    what.add_argument("folder", metavar="DIR", help="an adapter that covered-call train or prefer saved; it stays")
    what.add_argument("--to", metavar="DIR", help="the new folder, which must not be there; default: DIR_merged")
    what.add_argument(
        *flags("min_same"), type=float, default=MIN_SAME, metavar="SHARE",
        help=f"of {PROMPTS} prompts, how many must be answered as the adapter does; default: %(default)s",
    )  # fmt: skip
    add_data_options(parser, "what the adapter was tuned with")
    args = typed(parser, parser.parse_args(arguments))
    if not 0 <= args.min_same <= 1:
        parser.error(f"--min_same {args.min_same:g}: give a share, from 0 to 1.")
    return args
