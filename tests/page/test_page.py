"""report.html: what stands where, that nothing in it is taken for HTML, and how it looks and sorts in a browser."""

import datetime
import itertools
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from conftest import on_the_default_stack
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from covered_call.evaluation.overlay_plots import STYLES, Cost, draw_costs, draw_overlay, drawdown
from covered_call.page.cards import HEAD, Card
from covered_call.page.html import (
    FOLDER,
    SCRIPT,
    STYLE,
    Page,
    Plot,
    Section,
    Table,
    cell_of,
    hash_of,
    html_of,
    svg_of,
)
from page.chromium import needs_chromium

pytestmark = on_the_default_stack

HOSTILE = (
    "<script>window.hacked = 1</script>\"><img src=x onerror='window.hacked=2'>"
    '<svg onload="x()">-->]]>{{ 7*7 }} $\\frac{$ #000000; id="x"'
)
COLUMN = ["10", "n/a", "-1,200.5 to 3 [-2,000, 4]", "9.5 [1, 12]", "0.0"]
TIMES = [datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(days=day) for day in range(5)]
CURVES = {"teacher": np.array([0, 1, 3, 2, 1.0]), "model": np.array([0, 1, np.nan, 2, np.nan])}
COSTS = [Cost(name, multiple, -0.1, 0.2, (-1.0, 1.0)) for name in CURVES for multiple in (0.0, 1.0, 2.0)]


def a_page(text: str = "plain", columns: int = 1, in_plots: str = "") -> Page:
    """Every field holds ``text``, and the plots ``in_plots``, or it; the columns of numbers are all COLUMN."""
    in_plots = in_plots or text
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure()
        figure.subplots().plot([1, 2], label=in_plots)
        figure.legend(title=in_plots)
        figure.suptitle(in_plots)
    plots = [draw_overlay(TIMES, {in_plots: CURVES["teacher"], **CURVES}, "USD"), draw_costs(COSTS), figure]
    drawn = [Plot(svg_of(plot), text, text) for plot in plots]
    rows = [[f"{text} {number}", *[cell] * columns, text] for number, cell in enumerate(COLUMN)]
    table = Table(text, ["policy", *[f"figure {number}" for number in range(columns)], text], rows, text)
    cards = [Card(text, [text] * 2, [text], [text], [[text] * len(HEAD)] * 2, 1, text, [text] * 2)]
    return Page(text, [text] * 2, [text], [Section(text, [text], [table, table], drawn, cards)] * 2, [text])


class Seen(HTMLParser):
    """The tags of a page with their attributes, and its texts, as a browser takes them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_verdict_comes_first_then_warnings_contents_and_sections():
    table = Table("Figures", ["", "accuracy"], [["model", "0.931 [0.901, 0.955]"]], "A note.")
    section = Section("Money", ["A paragraph."], [table], [])
    texts = Seen(html_of(Page("out/tiny", ["It is a copy.", "So."], ["Simulated."], [section], ["numpy 2"]))).texts
    told = [text.strip() for text in texts if text.strip()]
    expected = ["It is a copy.", "So.", "Warning", "Simulated.", "Money", "How this was made"]
    expected += ["Money", "A paragraph.", "Figures", "accuracy", "model", "0.931", "[0.901, 0.955]", "A note."]
    start = told.index("It is a copy.")
    assert told[start : start + len(expected) + 2] == [*expected, "How this was made", "numpy 2"]


def test_links_lead_somewhere_and_no_two_things_have_one_id():
    seen = Seen(html_of(a_page()))
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for _, attributes in seen.tags if "href" in attributes]
    within = [re.search(r"url\((#.*?)\)", value) for _, tag in seen.tags for value in tag.values() if value]
    wanted = {*links, *(found[1] for found in within if found)}
    assert wanted and {link[1:] for link in wanted} <= set(ids)
    assert [plot["role"] for plot in seen.all("svg")] == ["img"] * 6
    assert {plot["aria-label"] for plot in seen.all("svg")} == {"plain"}


def test_nothing_in_a_page_is_taken_for_html():
    harmless, hostile = (Seen(html_of(a_page(text))) for text in ("plain", HOSTILE))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    names = [{name for _, attributes in seen.tags for name in attributes} for seen in (harmless, hostile)]
    assert names[0] == names[1]
    assert len(hostile.all("script")) == 1
    assert {plot["aria-label"] for plot in hostile.all("svg")} == {HOSTILE}
    once = 1 + 2 + 1 + 2 * (2 + 2 * (1 + 1 + 5 + 1) + 3) + 2 + 1  # title, verdict, warnings, sections, contents, made
    once += 2 * (1 + 2 + 2 + 2 * len(HEAD) + 2)  # decisions
    drawn = 2 * (1 + 3)  # the name of a curve; title, label and legend of the third plot
    assert sum(text == HOSTILE for text in hostile.texts) >= once + drawn


def test_a_page_loads_nothing():
    html = html_of(a_page())
    seen = Seen(html)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face|url\((?!#)", html)
    assert not [tag for tag, attributes in seen.tags if tag in ("link", "img", "iframe") or "src" in attributes]
    policy = next(meta["content"] for meta in seen.all("meta") if "http-equiv" in meta)
    script = html.split("<script>")[1].split("</script>")[0]
    assert policy.startswith("default-src 'none'; ") and f"script-src '{hash_of(script)}'" in policy


def test_the_same_input_gives_the_same_bytes():
    assert html_of(a_page()) == html_of(a_page())


@pytest.mark.parametrize(
    ("text", "shown", "interval", "key"),
    [
        ("0.931 [0.901, 0.955]", "0.931", "[0.901, 0.955]", "0.931"),
        ("-12 to 30", "-12 to 30", "", "-12"),
        ("-1,362.2 to -290.7 [-853.3, 100.2]", "-1,362.2 to -290.7", "[-853.3, 100.2]", "-1362.2"),
        ("\u22123.5 %", "\u22123.5 %", "", "-3.5"),
        ("+5%", "+5%", "", "5"),
        ("1e-05", "1e-05", "", "1e-05"),
        ("n/a", "n/a", "", ""),
        ("", "", "", ""),
        ("2025-03-29", "2025-03-29", "", None),
        ("score rule [old]", "score rule [old]", "", None),
        ("1,23", "1,23", "", None),
    ],
)
def test_a_cell_is_sorted_by_its_first_number(text, shown, interval, key):
    assert cell_of(text) == (shown, interval, key)


def test_a_row_that_does_not_fit_its_heads_is_an_error():
    table = Table("Money", ["policy", "P&L"], [["model", "1"], ["teacher"]])
    with pytest.raises(ValueError, match="table 'Money': row 2 has 1 cells for 2 heads"):
        html_of(Page("", [], [], [Section("", [], [table], [])], []))


def test_the_texts_of_a_plot_stay_texts_in_the_font_of_the_page():
    svg = svg_of(draw_overlay(TIMES, {"BTC $1 <b>": CURVES["teacher"]}, "USD a coin"))
    assert svg.startswith("<svg ") and "BTC $1 &lt;b&gt;" in svg and "USD a coin" in svg
    assert "font-family" not in svg and "DejaVu" not in svg and "<style" not in svg


def test_a_policy_has_one_colour_in_all_plots_which_is_lighter_on_a_dark_page():
    dark = (FOLDER / STYLE).read_text().split("prefers-color-scheme: dark")[1]
    for name, style in STYLES.items():
        overlay, costs = draw_overlay(TIMES, {name: CURVES["teacher"]}, ""), draw_costs([Cost(name, 1.0, 0, 0, None)])
        for figure in (overlay, costs):
            assert style["color"] in {to_hex(line.get_color()) for axis in figure.axes for line in axis.lines}
        assert name == "never sell (HODL)" or f"--plot-{style['color'][1:]}: #" in dark


# What people see who lack one kind of cone, in linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
SIGHT = {
    "all cones": np.eye(3),
    "no long": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no medium": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no short": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color: str, sight: np.ndarray) -> np.ndarray:
    """CIELAB under D65: colours that are 20 apart are no two shades of one."""
    shares = np.array(to_rgb(color))
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(sight @ linear, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("dark", [False, True])
def test_colours_are_told_apart_whoever_looks(sight, dark):
    sheet = (FOLDER / STYLE).read_text()
    ours = [style["color"] for name, style in STYLES.items() if name != "never sell (HODL)"]
    colors = [re.search(rf"--plot-{color[1:]}: (#.*?);", sheet)[1] for color in ours] if dark else ours
    seen = [lab(color, np.array(SIGHT[sight])) for color in colors]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) >= 20


def test_what_is_unknown_is_not_drawn():
    np.testing.assert_equal(drawdown(np.array([-1.0, 2.0, 0.5, np.nan, 4.0])), [-1, 0, -1.5, np.nan, np.nan])
    figure = draw_overlay(TIMES, {**CURVES, "best rule: logistic regression": CURVES["model"]}, "")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    unknown = "(unknown at 2 of 5 times)"
    expected = ["teacher", f"model {unknown}", f"best rule: logistic regression {unknown}", "never sell (HODL)"]
    assert shown == expected
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1
    nothing = draw_costs([Cost("model", 0.0, float("nan"), float("nan"), None)])
    assert [text.get_text() for text in nothing.axes[0].texts] == [" n/a"]


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
FIRST = "table tr > :nth-child(2)"


@pytest.fixture
def page_file(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(html_of(a_page(HOSTILE + "x" * 300, columns=12, in_plots=HOSTILE[:40])), encoding="utf-8")
    return path


def column_of(browser) -> list[str]:
    return browser.evaluate("[...document.querySelector('tbody').rows].map(row => row.cells[1].textContent)")


def sort_of(browser) -> str | None:
    return browser.evaluate("document.querySelector('thead th:nth-child(2)').getAttribute('aria-sort')")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_the_page_fits_and_nobody_complains(chromium, page_file, width, height, dark):
    chromium.open(page_file, width, height, dark=dark)
    assert chromium.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    inside = "(() => { const box = document.querySelector('.scroll'); return box.scrollWidth > box.clientWidth })()"
    assert chromium.evaluate(inside)
    assert chromium.evaluate("window.hacked") is None
    assert chromium.complaints == []
    assert chromium.asked == [page_file.as_uri()]


@needs_chromium
def test_the_names_of_the_rows_stay_when_a_table_is_moved(chromium, page_file):
    chromium.open(page_file, 390, 844)
    left = "document.querySelector('tbody th').getBoundingClientRect().left"
    before = chromium.evaluate(left)
    chromium.evaluate("document.querySelector('.scroll').scrollLeft = 200")
    assert chromium.evaluate("document.querySelector('.scroll').scrollLeft") == 200
    assert chromium.evaluate(left) == pytest.approx(before)


@needs_chromium
def test_a_click_on_a_head_sorts_up_then_down_then_as_it_was(chromium, page_file):
    chromium.open(page_file, 1280, 900)
    up = ["-1,200.5 to 3 [-2,000, 4]", "0.0", "9.5 [1, 12]", "10", "n/a"]
    assert (column_of(chromium), sort_of(chromium)) == (COLUMN, None)
    chromium.click("thead th:nth-child(2) button")
    assert (column_of(chromium), sort_of(chromium)) == (up, "ascending")
    chromium.click("thead th:nth-child(2) button")
    assert (column_of(chromium), sort_of(chromium)) == ([*up[3::-1], "n/a"], "descending")
    chromium.click("thead th:nth-child(1) button")
    assert sort_of(chromium) is None
    chromium.evaluate("document.querySelector('thead th:nth-child(2) button').focus()")
    chromium.press_enter()
    assert (column_of(chromium), sort_of(chromium)) == (up, "ascending")
    for _ in range(2):
        chromium.press_enter()
    assert (column_of(chromium), sort_of(chromium)) == (COLUMN, None)
    assert chromium.complaints == []


@needs_chromium
def test_without_script_all_is_there_and_no_head_asks_for_a_click(chromium, page_file):
    chromium.open(page_file, 1280, 900, script=False)
    assert "<button" not in page_file.read_text().replace((FOLDER / SCRIPT).read_text(), "")
    shown = chromium.call("DOM.getDocument", depth=-1)
    assert "BUTTON" not in str(shown) and "-1,200.5 to 3" in str(shown)


@needs_chromium
def test_plots_are_readable_on_a_dark_page(chromium, page_file):
    look = "(at => getComputedStyle(document.querySelector(at)))"
    for dark in (False, True):
        chromium.open(page_file, 1280, 900, dark=dark)
        ink = chromium.evaluate(f"{look}('body').color")
        assert (ink == "rgb(28, 31, 35)") is not dark
        assert chromium.evaluate(f"{look}('svg text').fill") == ink
        assert chromium.evaluate(f"{look}('svg use[style*=plot-000000]').stroke") == ink
