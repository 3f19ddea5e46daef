"""The picture of an agent's report: what became of decisions, what stopped them, and what each was worth."""

from typing import Any

from matplotlib.figure import Figure as Plot

from covered_call.runtime.logged import FATES
from covered_call.value_model.walk_forward import png


def picture_of(found: dict[str, Any]) -> bytes:
    """A PNG."""
    plot = Plot(figsize=(11, 8), layout="constrained")
    axes = plot.subplots(2, 2)
    title = f"{found['mode']}, {', '.join(found['underlyings'])}, {found['from']:%Y-%m-%d} to {found['to']:%Y-%m-%d}"
    plot.suptitle(f"{title}: {found['decisions']:,} decisions, {100 * found['trade_rate']:.1f} % taken", fontsize=11)
    bars(
        axes[0, 0], {fate: found["decisions_by_fate"][fate] for fate in FATES}, "decisions", "What became of decisions"
    )
    bars(axes[0, 1], found["vetoes"], "decisions that it stopped", "Vetoes")
    worth(axes[1, 0], found["audit"])
    sureness(axes[1, 1], found)
    return png(plot)


def bars(axis, values: dict[str, float], label: str, title: str) -> None:
    axis.set_title(title, fontsize=10)
    if not values:
        return nothing(axis, "none")
    names = list(values)[::-1]
    drawn = axis.barh(names, [values[name] for name in names])
    axis.bar_label(drawn, labels=[f"{values[name]:,}" for name in names], padding=3)
    axis.set_xlabel(label)
    axis.margins(x=0.15)


def worth(axis, audit: dict[str, Any] | None) -> None:
    """Mean outcomes by fate, with their intervals where there are some, and how many are settled."""
    axis.set_title("What each candidate brought (mean; line: 95 %, where there is one)", fontsize=10)
    rows = [
        (f"{name} {fate}" if len(audit or {}) > 1 else fate, its)
        for name, figures in (audit or {}).items()
        for fate, its in figures["fates"].items()
        if its["known"]
    ][::-1]
    if not rows:
        return nothing(axis, "nothing is settled yet")
    drawn = axis.barh([label for label, _ in rows], [its["mean_percent"] for _, its in rows], color="tab:green")
    axis.bar_label(drawn, labels=[f"n {its['known']:,}" for _, its in rows], padding=3)
    for place, (_, its) in enumerate(rows):
        if its["interval_percent"]:
            axis.plot(its["interval_percent"], [place, place], color="black", linewidth=2)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_xlabel("P&L vs HODL, % of spot")
    axis.margins(x=0.2)


def sureness(axis, found: dict[str, Any]) -> None:
    """How often a policy was right against how sure it was; before anything is settled, how sure it was."""
    pairs = [
        (f"{source}, {name}" if len(found["audit"]) > 1 else source, its["bins"])
        for name, figures in (found["audit"] or {}).items()
        for source, its in figures["confidence"].items()
    ]
    if not pairs:
        sure = {name: its["mean_confidence"] for name, its in found["policies"].items()}
        return bars(
            axis, {name: round(value, 3) for name, value in sure.items()}, "mean confidence", "How sure they were"
        )
    axis.set_title("Right against confidence (dots by how many)", fontsize=10)
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":", label="as sure as right")
    for label, bins in pairs:
        total = sum(one["n"] for one in bins)
        sizes = [300 * one["n"] / total + 8 for one in bins]
        axis.scatter(
            [one["confidence"] for one in bins], [one["right"] for one in bins], s=sizes, alpha=0.6, label=label
        )
    axis.set(xlabel="confidence", ylabel="share that was right", xlim=(-0.03, 1.03), ylim=(-0.05, 1.05))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return None


def nothing(axis, said: str) -> None:
    axis.text(0.5, 0.5, said, ha="center", va="center", transform=axis.transAxes)
    axis.set_axis_off()
