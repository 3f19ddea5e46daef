"""Draws docs/pipeline.png, the picture in README: from a backtest's files to a verdict.

python docs/draw_pipeline.py                        # writes docs/pipeline.png
python docs/draw_pipeline.py --output other.png
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PICTURE = Path(__file__).parent / "pipeline.png"
WIDTH, HEIGHT = 134, 69  # of the canvas, in tenths of an inch, as all places and lengths here
BOX = 21  # a box is so wide
COLUMNS = (3, 30, 57, 84, 111)  # where each column of boxes begins
HEADINGS = (
    ("Your backtest", "data/"),
    ("Decisions", "candidates/"),
    ("Data sets", "candidates/"),
    ("Learning", "training/  value_model/"),
    ("Verdict", "evaluation/"),
)
INK, GREY, PANEL = "#1f2933", "#616e7c", "#f5f7fa"
LATER = "#c2410c"  # what came after the decision: a label, which no prompt shows
YELLOW, BLUE, GREEN, ORANGE, VIOLET = "#fff3c4", "#d9e8fb", "#dff3dc", "#fde0cf", "#e9def7"


def box(axes: Axes, column: int, y: float, height: float, colour: str, title: str, text: str, verb=False) -> None:
    """A box with a bold title and one or more lines below it; y is its lower edge. Verbs and names are monospaced."""
    x = COLUMNS[column]
    shape = "round,pad=0,rounding_size=1.2"
    axes.add_patch(FancyBboxPatch((x, y), BOX, height, boxstyle=shape, fc=colour, ec=INK, lw=1.1, zorder=2))
    lines = text.count("\n") + 1
    top = y + height / 2 + 0.9 * lines + 0.4  # the middle of the title's line
    words = {"color": INK, "ha": "center", "zorder": 3}
    font = {"family": "monospace"} if verb else {}
    axes.text(x + BOX / 2, top, title, size=10.5, weight="bold", va="center", **words, **font)
    axes.text(x + BOX / 2, top - 1.5, text, size=8.6, va="top", linespacing=1.3, **words)


def line(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """An arrow from the right of one box to the left of another, which turns twice about halfway between them."""
    (x, y), (x2, y2) = start, end
    turn = (x + x2) / 2 - (0.9 if colour == LATER else 0)  # so that no line lies on one of the other colour
    axes.plot([x, turn, turn], [y, y, y2], color=colour, lw=1.4, solid_joinstyle="round", zorder=1)
    arrow(axes, (turn, y2), end, colour)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0, "joinstyle": "miter"}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, lw=1.4, zorder=4, **style))


def draw_boxes(axes: Axes) -> None:
    for x, (title, room) in zip(COLUMNS, HEADINGS, strict=True):
        axes.text(x + BOX / 2, 65.4, title, size=12.5, weight="bold", color=INK, ha="center", va="center")
        axes.text(x + BOX / 2, 62.4, room, size=9, color=GREY, ha="center", va="center", family="monospace")
    for column in (2, 3):  # of all that is in them, something may be shared
        x, shape = COLUMNS[column] - 1.8, "round,pad=0,rounding_size=1.5"
        axes.add_patch(FancyBboxPatch((x, 17), BOX + 3.6, 43, boxstyle=shape, fc=PANEL, ec="none", zorder=0))

    logged = "every call that the teacher\nlooked at, which one it sold,\nand its outcome"
    later = "the outcome of every call,\nsold or not, computed\nfrom later prices"
    box(axes, 0, 32.5, 13, YELLOW, "CSV files", logged)
    box(axes, 1, 43.5, 12, BLUE, "what was known", "at decision time:\nspot and candidates,\nchecked row by row")
    box(axes, 1, 22.5, 12, BLUE, "what came after", later)
    box(axes, 2, 50, 8, GREEN, "per_candidate", "chat: SELL_CALL or SKIP", verb=True)
    box(axes, 2, 40, 8, GREEN, "per_decision_ranking", "chat: 1..N or NO_TRADE", verb=True)
    box(axes, 2, 30, 8, GREEN, "preference", "pairs: what paid more", verb=True)
    box(axes, 2, 20.5, 8, GREEN, "q_values", "numbers, and what they paid", verb=True)
    box(axes, 3, 47, 10, ORANGE, "train", "a small language model\nanswers as the teacher", verb=True)
    box(axes, 3, 33.5, 10, ORANGE, "prefer", "then moves towards\nwhat paid more (DPO)", verb=True)
    box(axes, 3, 20, 10, ORANGE, "q-scorer", "boosted trees: what\nwould selling bring?", verb=True)
    judged = "as a copy, and in money:\nbeside simple rules, the\nteacher and never selling"
    box(axes, 4, 31, 15, VIOLET, "evaluate", judged, verb=True)
    box(axes, 1, 4, 8, "white", "audit", "is an answer in its prompt?", verb=True)
    box(axes, 2, 4, 8, "white", "export", "chats as JSON lines", verb=True)
    box(axes, 3, 4, 8, "white", "publish", "data sets and tuned models", verb=True)
    axes.text(COLUMNS[2] + BOX / 2, 18.6, "split by time, and purged", size=8.6, color=GREY, ha="center", va="center")


def draw_arrows(axes: Axes) -> None:
    files, decisions, sets, learning, verdict = COLUMNS
    line(axes, (files + BOX, 41), (decisions, 49.5))
    line(axes, (files + BOX, 37), (decisions, 28.5), LATER)
    for y in (54, 44, 35.2, 25.2):
        line(axes, (decisions + BOX, 49.5), (sets, y))
    line(axes, (decisions + BOX, 28.5), (sets, 32.8), LATER)
    line(axes, (decisions + BOX, 28.5), (sets, 22.8), LATER)
    line(axes, (sets + BOX, 54), (learning, 53.2))
    line(axes, (sets + BOX, 44), (learning, 50.8))
    line(axes, (sets + BOX, 34), (learning, 37), LATER)
    line(axes, (sets + BOX, 24.5), (learning, 25), LATER)
    arrow(axes, (learning + BOX / 2, 47), (learning + BOX / 2, 43.5))
    line(axes, (learning + BOX, 52), (verdict, 42.5))
    arrow(axes, (learning + BOX, 38.5), (verdict, 38.5))
    line(axes, (learning + BOX, 25), (verdict, 34.5))
    for x in (sets + BOX / 2, learning + BOX / 2):
        arrow(axes, (x, 17), (x, 12))
    axes.plot([sets + 3, sets + 3, decisions + BOX / 2], [17, 14.5, 14.5], color=INK, lw=1.4)
    arrow(axes, (decisions + BOX / 2, 14.5), (decisions + BOX / 2, 12))
    axes.plot([sets + BOX - 3, sets + BOX - 3, learning + 3], [17, 14.5, 14.5], color=INK, lw=1.4)
    arrow(axes, (learning + 3, 14.5), (learning + 3, 12))


def draw_key(axes: Axes) -> None:
    x = COLUMNS[4] - 1
    for y, colour, text in ((9.8, INK, "known at decision time"), (6.2, LATER, "known later: labels,\nin no prompt")):
        arrow(axes, (x, y), (x + 4, y), colour)
        axes.text(x + 5, y, text, size=8.6, color=colour, ha="left", va="center", linespacing=1.3)


def draw() -> Figure:
    figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), dpi=130, facecolor="white")  # opaque, for dark pages
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    draw_boxes(axes)
    draw_arrows(axes)
    draw_key(axes)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PICTURE, metavar="PNG", help="default: docs/pipeline.png")
    draw().savefig(parser.parse_args().output, metadata={"Software": None})


if __name__ == "__main__":
    main()
