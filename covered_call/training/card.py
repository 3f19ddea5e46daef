"""What a run shows of itself: training.png, its course, and README.md, its model card."""

import io
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from covered_call import atomic


class Panel(NamedTuple):
    """One question to the log of a run, in one unit: the log's keys, and what they are called."""

    question: str
    unit: str
    curves: dict[str, str]


SHARES = {
    "eval_balanced_accuracy": "balanced accuracy",
    "eval_accuracy": "accuracy (as the teacher)",
    "eval_trade_rate": "trade rate (answers that sell)",
    "eval_outside": "outside (would write no answer)",
}
SFT_PANELS = (
    Panel("Does it learn the training answers?", "training loss\n(nats a token)", {"loss": "training"}),
    Panel("Does it learn more than those by heart?", "validation loss\n(nats an answer)", {"eval_loss": "validation"}),
    Panel("How does it answer the validation records?", "share of the records", SHARES),
)
TASKS = {"candidate": "of candidates", "ranking": "of rankings"}  # by the name before a metric of several tasks


def panels_of(tasks: list[str]) -> tuple[Panel, ...]:
    """Those of a fine-tune; of several tasks the curves of each."""
    if len(tasks) == 1:
        return SFT_PANELS
    first, *others = SFT_PANELS
    return first, *(panel._replace(curves=by_task(panel.curves)) for panel in others)


def by_task(curves: dict[str, str]) -> dict[str, str]:
    return {
        f"eval_{name}_{key.removeprefix('eval_')}": f"{label} {of}"
        for name, of in TASKS.items()
        for key, label in curves.items()
    }


STYLES = ("o-", "s--", "^-.", "x:")  # two curves may lie on one another


def plot_course(
    history: list[dict], best: int | None, path: Path, panels: tuple[Panel, ...] = SFT_PANELS, why: str = ""
) -> None:
    """A panel for each question that the log answers, over the optimiser steps; above them, why a step was kept."""
    shown = [panel for panel in panels if any(key in entry for entry in history for key in panel.curves)] or panels[:1]
    figure = Figure(figsize=(10, 1 + 2.4 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, shown, strict=True):
        draw(axis, panel, history)
        if best:
            axis.axvline(best, color="grey", linestyle=":", label=f"saved: step {best}")
        if axis.lines:
            axis.legend(
                fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5)
            )  # beside, lest it hide a curve
    figure.suptitle(why, fontsize="medium", x=0.01, ha="left")
    axes[-1].set_xlabel("optimiser step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic.write(path, picture.getvalue())


def draw(axis, panel: Panel, history: list[dict]) -> None:
    for (key, label), style in zip(panel.curves.items(), itertools.cycle(STYLES)):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label)
    axis.set_title(panel.question, loc="left")
    axis.set_ylabel(panel.unit)
    axis.grid(alpha=0.3)
    if panel.unit.startswith("share"):
        axis.set_ylim(-0.02, 1.02)


CARD_TEXT = """\
# {name}

{what} {aim}: given one decision's options it answers {answers}. Only what was known at decision time is in its \
prompts.

{table}

{why_saved} The test split was looked at once. Data: \
{files}; training decisions from {since} to {until}. Prompts of version {prompt_version}.

Use it with the code that tuned it, which renders the same prompts and scores the admissible answers:

<!-- loading -->
```python
from covered_call import Policy

policy = Policy.load({folder})
```
<!-- /loading -->

`recipe.yaml` is the recipe as run, `manifest.json` what went into it, `training.png` its course.

Limits: {limits} Not investment advice.
"""


ANSWERS = {"per_candidate": "SELL_CALL or SKIP for one option", "per_decision_ranking": "1..N or NO_TRADE"}


def foreign_files(manifest: dict) -> list[str]:
    """The files of a mix, which are of no backtest."""
    return [os.path.basename(source["source"]) for source in manifest.get("mix") or [] if not is_of_backtest(source)]


def is_of_backtest(source: dict) -> bool:
    return source["tuned_on"] is not None


def fill_card(manifest: dict, folder: str, method: str, aim: str, table: str, limits: str) -> ModelCard:
    """A short card: what the model is, what it was measured at, and its limits.

    Args:
        folder: where it is saved, as it was given: from where the training was run, the card's code loads it.
    """
    head = ModelCardData(
        base_model=manifest["base_model"] if not os.path.exists(manifest["base_model"]) else None,
        library_name="peft" if manifest["adapter"] else "transformers",
        pipeline_tag="text-generation",
        tags=["covered-call", "trl", method],
    )
    train = manifest["splits"]["train"]
    body = CARD_TEXT.format(
        name=Path(folder).resolve().name,
        folder=json.dumps(str(folder)),
        what=f"A LoRA adapter for `{manifest['base_model']}` in {manifest['quantization']}."
        if manifest["adapter"]
        else f"A tuned `{manifest['base_model']}`.",
        answers=" and, asked for one of them, ".join(
            ANSWERS[task] for task in manifest.get("tasks") or [manifest["task"]]
        ),
        aim=aim,
        table=table,
        limits=limits,
        files=", ".join(f"`{file}`" for file in [*manifest["data_files"], *foreign_files(manifest)]),
        since=train["from"][:10],
        until=train["to"][:10],
        **{key: manifest[key] for key in ("why_saved", "prompt_version")},
    )
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}")
