"""Representations of results: short texts, HTML for notebooks, charts."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest

import mechdsl
from mechdsl.resolve.cells import CellKey
from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.show.output import capture_text
from mechdsl.show.reports import table
from mechdsl.show.reports.canvas import page_width, svg_size

from ..results.synthetic import finished, heads, positions, report
from .conftest import FILE

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

SHOUT = "<script>alert('&')</script>"


class Read(HTMLParser):
    """Parser that collects the texts of a page and checks that every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "br":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def shown(result: ExperimentResult, tmp_path: Path) -> Read:
    """The parsed HTML of a result, as in a notebook."""
    path = tmp_path / "page.html"
    path.write_text(result._repr_html_(), encoding="utf-8")
    return Read(path.read_text(encoding="utf-8"))


# --- representations ---


@pytest.mark.slow
def test_repr_of_results_is_short(results: mechdsl.Results) -> None:
    first = results["heads"]
    assert repr(first) == (
        "<ExperimentResult heads on toy: clean → fewer, 8 cells (layer 2 × head 4), 16 prompts\n"
        "  recovery of logit(answer) - logit(answer of fewer)\n"
        "  1 of 1 expectations hold>"
    )
    many = replace(results.files[0], experiments=(replace(first, name="n" * 500),) * 50)
    large = replace(results, files=(many,))
    for each in (results, large, *large.files, large.experiments[0]):
        lines = repr(each).splitlines()
        assert len(lines) <= 8
        assert max(map(len, lines)) <= 120
    assert "and 45 more" in repr(large)
    assert repr(FileResult("a.mech", ())) == "<FileResult a.mech: no experiments>"


# --- as text ---


def test_to_text_equals_the_command_line_output(results: mechdsl.Results) -> None:
    text = results.to_text()
    assert "heads: recovery of logit(answer)" in text
    assert "holds  expect accuracy(clean) > 0.5" in text
    assert "95 % interval" in text
    assert results["heads"].to_text() + results["positions"].to_text() == text
    assert max(map(len, results.to_text(60).splitlines())) <= 60


# --- notebooks ---


def test_html_has_the_table_of_the_command_line(results: mechdsl.Results, tmp_path: Path) -> None:
    result = results["heads"]
    page = shown(result, tmp_path)
    text = capture_text(partial(table.render, result, result.reports[0]), 400).strip("\n")
    _, facts, head, _, *lines = text.splitlines()
    said = [facts, *(line for line in lines if re.match(r"the 5 largest|\d of 8", line))]
    assert len(said) == 3
    assert {*said} <= {*page.texts}
    cells = [line for line in lines if re.search(r"L\dH\d\.z", line)]
    assert [re.split(r"\s{2,}", line.strip()) for line in (head, *cells)] == page.rows[:6]
    assert {*result.conventions, *result.conventions.values()} <= set(page.texts)
    assert any(text.startswith("holds expect accuracy(clean) > 0.5") for text in page.texts)


def test_html_escapes_texts_from_prompts(tmp_path: Path) -> None:
    cells = tuple(
        CellKey({"layer": SHOUT, "head": SHOUT}, f"{SHOUT}{n}", SHOUT, (SHOUT,)) for n in range(12)
    )
    made = replace(heads(), name=SHOUT, model=SHOUT, source=SHOUT, cells=cells)
    made = replace(made, conventions={SHOUT: SHOUT}, row_values={SHOUT: [SHOUT] * 64})
    made = replace(made, reports=(report("table"), report("table", by=SHOUT)))
    result = finished(made)
    assert "<script" not in result._repr_html_()
    page = shown(result, tmp_path)
    assert "script" not in page.tags
    assert page.texts.count(SHOUT) > 24
    assert "<script" not in mechdsl.explain(FILE.replace("apple", "<script>"))._repr_html_()


def test_long_html_table_is_truncated_with_a_note(tmp_path: Path) -> None:
    result = finished(heads(layers=12, count=10))
    page = shown(result, tmp_path)  # without `report table`: the largest cells
    assert len([text for text in page.texts if re.fullmatch(r"L\d+H\d\.z", text)]) == 20
    assert "the 20 largest of 120 cells by absolute value" in page.texts
    page = shown(replace(result, reports=(report("table"),)), tmp_path)
    assert len([text for text in page.texts if re.fullmatch(r"L\d+H\d\.z", text)]) == 100
    assert "and 20 more rows: `to_pandas()` has them all" in page.texts


def test_graph_has_svg_or_text_representations() -> None:
    drawing = mechdsl.graph(FILE, format="svg")
    assert drawing._repr_html_() == drawing
    text = mechdsl.graph(FILE, format="text")
    assert repr(text) == str(text)
    assert text._repr_html_().startswith("<pre")


# --- charts ---


@pytest.mark.parametrize("kind", ["heatmap", "lines", "bars", "confusion", "overlay"])
def test_each_plot_is_an_altair_chart(kind: str, results: mechdsl.Results) -> None:
    chart = results["positions" if kind in ("confusion", "overlay") else "heads"].plot(kind)
    found = chart.to_dict()  # which validates it
    assert found["$schema"].startswith("https://vega.github.io/schema/vega-lite/")
    assert "mark" in str(found)


def test_overlay_plot_has_each_token_of_its_prompts(results: mechdsl.Results) -> None:
    result = results["positions"]
    chart = result.plot("overlay", top=2).to_dict()
    values = chart["vconcat"][0]["layer"][0]["data"]["values"]
    tokens = [token.strip() for prompt in result.texts[:2] for token in prompt]
    assert [each["token"] for each in values] == tokens
    assert sum(each["effect"] != "" for each in values) == sum(
        len({token for cell in result.hits for token in cell[prompt]}) for prompt in (0, 1)
    )


def test_plot_without_axes_uses_the_report_of_the_file() -> None:
    asked = report("heatmap", variable="head", by="layer")
    result = replace(finished(heads()), reports=(asked,))
    assert result.plot("heatmap").to_dict() == result.plot("heatmap", "head", "layer").to_dict()
    assert result.plot("heatmap").to_dict() != result.plot("heatmap", "layer", "head").to_dict()


def test_plot_selects_one_measure() -> None:
    one, other = finished(heads()), finished(heads())
    second = replace(other.measures[0], label="second", metric="second")
    both = replace(
        one,
        measures=(*one.measures, second),
        statistics=(*one.statistics, *other.statistics),
    )
    first = both.measures[0]
    for name in (f"{first.called} of {first.label}", first.label):
        assert both.plot("heatmap", measure=name).to_dict() == one.plot("heatmap").to_dict()
    assert both.plot("heatmap").to_dict() != one.plot("heatmap").to_dict()
    assert "second" in str(both.plot("lines", "layer", measure="second").to_dict())
    with pytest.raises(mechdsl.MechdslError, match=r"(?s)E0203.*did you mean `second`"):
        both.plot("heatmap", measure="secund")
    with pytest.raises(mechdsl.MechdslError, match=f"(?s)E0607.*`{first.called}` names 2"):
        both.plot("heatmap", measure=first.called)


@pytest.mark.slow
def test_plot_width_is_given_in_paper_columns() -> None:
    result = finished(heads())
    widths = []
    for columns in (1, 2):
        drawn = StringIO()
        result.plot("lines", "head", "layer", width=columns).save(drawn, format="svg")
        widths.append(svg_size(drawn.getvalue())[0])
        assert widths[-1] <= page_width(columns) + 1
    assert widths[0] < widths[1]
    with pytest.raises(ValueError, match="a chart can't span 3"):
        result.plot("heatmap", width=3)


def test_results_with_one_experiment_can_be_plotted(results: mechdsl.Results) -> None:
    (file,) = results.files
    one = replace(results, files=(replace(file, experiments=(results["heads"],)),))
    assert one.plot("lines", "head").to_dict() == results["heads"].plot("lines", "head").to_dict()
    with pytest.raises(ValueError, match=r'2 experiments; plot one of them: results\["heads"\]'):
        results.plot("heatmap")
    with pytest.raises(ValueError, match="no experiment"):
        replace(results, files=()).plot("heatmap")


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (("heatmp",), "E0203", "did you mean `heatmap`? pictures are heatmap, lines, bars, conf"),
        (("table",), "E0203", "pictures are heatmap, lines, bars, confusion, overlay"),
        (("lines", "hed"), "E0607", "did you mean `head`?"),
        (("heatmap", "head"), "E0607", 'write both: `plot("heatmap", "layer", by="head")`'),
        (("confusion",), "E0607", "add `measure argmax(1..9) as raw`"),
        (("overlay",), "E0607", "needs the axis `position`"),
    ],
)
def test_invalid_plot_is_rejected_with_a_fix(given: tuple[str, ...], code: str, said: str) -> None:
    with pytest.raises(mechdsl.MechdslError) as found:
        finished(heads()).plot(*given)
    assert [d.code for d in found.value.diagnostics] == [code]
    assert said in str(found.value)


def test_heatmap_with_one_axis_suggests_lines() -> None:
    result = finished(positions())
    one = replace(result, axes=("layer",))
    with pytest.raises(mechdsl.MechdslError, match=r'write `plot\("lines"\)`'):
        one.plot("heatmap")


def test_plot_without_altair_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ImportError, match="pip install altair"):
        finished(heads()).plot("heatmap")


def test_plan_has_its_cells_and_passes() -> None:
    plan = mechdsl.plan(FILE)
    assert plan.cells == {"heads": 8, "positions": 8}
    assert plan.passes
    assert "8 cells" in plan
    fewer = mechdsl.plan(FILE, no_pass=[plan.passes[0]])
    assert plan.passes[0] not in fewer.passes
