"""report.html: a page of sections and of decisions to be read. One file that opens anywhere, and asks nothing of a
network."""

import base64
import hashlib
import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from covered_call.page.cards import HINDSIGHT, Card, left_out_text

FOLDER = Path(__file__).parent
TEMPLATE, STYLE, SCRIPT = "page.html.j2", "page.css", "page.js"
# A number is followed by nothing, a blank, "%" or an interval: else it is a date or a name, such as 2025-03-29.
NUMBER = re.compile(r"\s*([-+\u2212]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?)(?=$|\s|%|\[)")
INTERVAL = re.compile(r"(.*\S)\s*(\[[^\[\]]*\])")
MISSING = {"", "-", "\u2013", "\u2014", "n/a", "none", "null", "nan", "unknown"}


class Table(NamedTuple):
    """Texts as they are shown, such as ``"0.931 [0.901, 0.955]"``; the first cell of a row names it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


class Plot(NamedTuple):
    """``svg`` is what ``svg_of`` makes, and nothing else: it is the one text here that is not escaped.

    ``alt`` says what the plot shows to whom cannot see it; ``caption`` stands below it.
    """

    svg: str
    alt: str
    caption: str


class Section(NamedTuple):
    """Paragraphs, then tables, then plots, then decisions."""

    title: str
    text: list[str]
    tables: list[Table]
    plots: list[Plot]
    cards: Sequence[Card] = ()


class Page(NamedTuple):
    """``verdict``: up to five plain sentences, the verdict first. ``made``: command, files, versions; a line each."""

    title: str
    verdict: list[str]
    warnings: list[str]
    sections: list[Section]
    made: list[str]


class Cell(NamedTuple):
    """A cell as the template needs it: see ``cell_of``."""

    text: str
    interval: str
    key: str | None


def html_of(page: Page) -> str:
    """One file with style, script and plots within; the same page gives the same bytes.

    Its Content-Security-Policy allows no loading of anything, and no script but its own, which it knows by its hash.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in (STYLE, SCRIPT))
    return environment.get_template(TEMPLATE).render(
        page=page, style=style, script=script, script_hash=hash_of(script), cells_of=cells_of, inline=inline,
        calls_of=lambda card: Table("", card.calls[0], card.calls[1:]), left_out=left_out_text, hindsight=HINDSIGHT,
    )  # fmt: skip


def hash_of(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def cells_of(table: Table) -> tuple[list[list[Cell]], list[str]]:
    """The cells of a table, and for each column whether it holds a "number" or a "text"; names of rows are texts.

    Raises:
        ValueError: a row has not one cell for each head.
    """
    rows = [[cell_of(text) for text in row] for row in table.rows]
    for number, row in enumerate(rows, 1):
        if len(row) != len(table.head):
            raise ValueError(f"table {table.title!r}: row {number} has {len(row)} cells for {len(table.head)} heads")
    columns = zip(*rows, strict=True) if rows else ((),) * len(table.head)
    texts = [place == 0 or any(cell.key is None for cell in column) for place, column in enumerate(columns)]
    return rows, ["text" if text else "number" for text in texts]


def cell_of(text: str) -> Cell:
    """The text without its interval, the interval, and the key by which page.js sorts.

    A number's key is its value, of bounds the first one. The key of what is missing is "": it comes last either way.
    Other texts have none, and are sorted as texts behind the numbers.
    """
    if text.strip().lower() in MISSING:
        return Cell(text, "", "")
    number = NUMBER.match(text)
    if number is None:
        return Cell(text, "", None)
    sign = "-" if number[1] in ("-", "\u2212") else ""
    split = INTERVAL.fullmatch(text)
    return Cell(split[1] if split else text, split[2] if split else "", sign + number[2].replace(",", ""))


# ---------------------------------------------------------------------------------------------------------------------
# Plots


def svg_of(figure: Figure) -> str:
    """A figure as SVG to be set inline: text stays text in the page's font, and colours follow the page's.

    Each colour becomes a CSS variable named after it, which page.css may set anew for a dark page; where it does not,
    the colour stays. What a text says is never touched.
    """
    file = io.StringIO()
    nameless = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "covered-call"}):  # unsalted ids are random
        figure.savefig(file, format="svg", transparent=True, metadata=nameless)
    svg = file.getvalue()
    svg = svg[svg.index("<svg ") :].rstrip()
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = in_tags(svg, lambda tag: re.sub(r' (id|xmlns(:xlink)?|version)="[^"]*"', "", tag), of=("<svg ", "<g "))
    svg = in_tags(svg, lambda tag: re.sub(r' (width|height)="[^"]*"', "", tag), of=("<svg ",))
    svg = in_tags(svg, lambda tag: re.sub(r"#([0-9a-f]{6})(?=[;\"])", r"var(--plot-\1, #\1)", tag))
    svg = in_tags(svg, lambda tag: re.sub(r"font-family: [^;\"]*(; )?", "", tag).replace("xlink:href", "href"))
    return re.sub(r"\n\s*", "\n", svg)


def inline(plot: Plot, name: str) -> str:
    """The SVG with its label, and with ids that begin with ``name``, so that those of two plots do not clash."""
    svg = in_tags(plot.svg, lambda tag: re.sub(r'( id="| href="#|url\(#)', rf"\g<1>{name}-", tag))
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(plot.alt)}" ', 1)


def in_tags(svg: str, change: Callable[[str], str], of: tuple[str, ...] = ("<",)) -> str:
    """Changes the tags that begin so, never the text between them; matplotlib escapes > within a tag."""
    return re.sub(r"<[^>]*>", lambda found: change(found[0]) if found[0].startswith(of) else found[0], svg)
