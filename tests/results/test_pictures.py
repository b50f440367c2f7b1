"""Rendered pictures: labels don't overlap and aren't cut off, and each cell has its n."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.program import spec
from mechdsl.resolve.cells import CellKey
from mechdsl.resolve.expansion import name_cells
from mechdsl.resolve.types import ResolvedExperiment
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.output import save_report, show_report
from mechdsl.show.reports.canvas import text_width
from mechdsl.show.reports.charts import column_labels, row_labels
from mechdsl.show.reports.grid import axis_title
from mechdsl.show.reports.text import map_format
from mechdsl.vocab.reports import REPORTS

from ..markdown import fences
from ..quick import in_turn, some
from .svg_text import SVG, outside, overlaps, texts_of
from .synthetic import finished, measure, read_tokens, report, swept, with_controls

ROOT = Path(__file__).parents[2]


def drawn(result: ExperimentResult, line: spec.Report, folder: Path) -> str:
    path = folder / "picture.svg"
    save_report(result, line, path)
    return path.read_text(encoding="utf-8")


def checked(svg: str) -> list[str]:
    """Return the texts of a picture after checking that none overlaps or is cut off."""
    texts = texts_of(svg)
    assert overlaps(texts) == []
    assert outside(svg) == []
    return [each.text for each in texts]


def titles(svg: str) -> list[str]:
    """Return the tooltips of a picture."""
    return [title.text or "" for title in ElementTree.fromstring(svg).iter(f"{SVG}title")]


def few(result: ExperimentResult) -> ExperimentResult:
    return finished(result, resamples=20)


def guessed(rows: int, columns: int, **look: Any) -> ExperimentResult:
    """A category over the columns, most often that of the row."""
    result = swept(rows, 1, prompts=60, **look)
    random = np.random.default_rng(1)
    guess = random.integers(1, columns + 1, (rows, 60)).astype(float)
    guess[:, :20] = 1 + np.arange(rows)[:, None] % columns
    guess[:, 20 : 20 + columns] = np.arange(1, min(columns, 40) + 1)
    guess[-1, 5:] = np.nan
    data = measure(guess, guess[:1], effect="raw", kind="category", label="guess", unit="")
    named = "item {} token" + (" of the other sentence" if look.get("words") else "")
    cells = [
        replace(cell, coords={"position": named.format(row + 1)})
        for row, cell in enumerate(result.cells)
    ]
    return replace(
        result,
        axes=("position",),
        aliases={"item": "position"},
        cells=tuple(cells),
        measures=(data,),
    )


def several(result: ExperimentResult) -> ExperimentResult:
    """Repeat the cells three times along an axis that isn't drawn, with long names."""
    names = ("first-item of part1 token", "last token of the other sentence", "x")
    (data,) = result.measures
    thrice = {"patched": np.tile(data.patched, (3, 1)), "inert": np.tile(data.inert, 3)}
    cells = [
        replace(cell, coords={**cell.coords, "c": name})
        for name, cell in product(names, result.cells)
    ]
    return replace(
        result,
        axes=(*result.axes, "c"),
        cells=tuple(cells),
        measures=(replace(data, **thrice),),
    )


Picture = tuple[Callable[[int, int], ExperimentResult], spec.Report]
PICTURES: dict[str, Picture] = {
    "heatmap": (swept, report("heatmap", variable="layer", by="head")),
    "heatmap of words": (
        lambda r, c: swept(r, c, words=True, gaps=True, scale=0.03),
        report("heatmap", variable="layer", by="position"),
    ),
    "heatmap, words beside": (
        lambda r, c: swept(c, r, words=True),
        report("heatmap", variable="position", by="layer"),
    ),
    "heatmap of large numbers": (
        lambda r, c: swept(r, c, scale=1234.5, gaps=True),
        report("heatmap", variable="layer", by="head"),
    ),
    "lines": (
        lambda r, c: swept(r, c, words=True),
        report("lines", variable="layer", by="position"),
    ),
    "lines along words": (
        lambda r, c: with_controls(swept(r, c, words=True, gaps=True)),
        report("lines", variable="position"),
    ),
    "bars": (
        lambda r, c: with_controls(swept(r, c, gaps=True)),
        report("bars", variable="layer", by="head"),
    ),
    "bars of words": (lambda r, c: swept(r, c, words=True), report("bars", variable="position")),
    "confusion": (guessed, report("confusion", variable="item", by="guess")),
    "confusion of words": (
        lambda r, c: guessed(r, c, words=True),
        report("confusion", variable="item", by="guess"),
    ),
    "overlay": (lambda r, c: read_tokens(r, c), report("overlay", top=2)),
}
SMALL = [(3, 4), (12, 12)]
LARGE = {"heatmap", "confusion of words", "overlay"}
"""Pictures that render quickly at 48 × 30."""


def picture_at(name: str, rows: int, columns: int, folder: Path) -> tuple[ExperimentResult, str]:
    build, line = PICTURES[name]
    result = few(build(rows, columns))
    return result, drawn(result, line, folder)


@pytest.mark.parametrize(
    ("name", "size"), in_turn(list(PICTURES), SMALL[::-1], list(PICTURES)[::2])
)
def test_picture_texts_do_not_overlap(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    result, svg = picture_at(name, *size, tmp_path)
    assert any(f"n = {result.statistics[0].n.min()}" in text for text in checked(svg))


@pytest.mark.slow
@pytest.mark.parametrize("name", some(PICTURES, LARGE))
def test_large_picture_texts_do_not_overlap(name: str, tmp_path: Path) -> None:
    rows, columns = (30, 48) if name != "overlay" else (30, 12)
    result, svg = picture_at(name, rows, columns, tmp_path)
    assert any(f"n = {result.statistics[0].n.min()}" in text for text in checked(svg))


@pytest.mark.parametrize("name", ["heatmap", "lines", "bars"])
def test_panels_have_room_for_their_titles(name: str, tmp_path: Path) -> None:
    svg = drawn(few(several(swept(3, 3))), report(name, variable="layer", by="head"), tmp_path)
    assert "sentence" in " ".join(checked(svg))


@pytest.mark.parametrize("name", ["heatmap", "lines", "bars", "confusion"])
def test_legend_is_next_to_its_panel(name: str, tmp_path: Path) -> None:
    """The legend neither covers the panel nor moves right of a longer title."""
    build, line = PICTURES[name]
    result = few(build(3, 4))
    if name == "confusion":  # the base run alone gives a single panel
        (data,) = result.measures
        result = replace(result, measures=(replace(data, inert=data.inert | True),))
        result = few(replace(result, measures=(replace(result.measures[0], base=data.patched),)))
    long = replace(result, name=" ".join(["a title that is long"] * 4))
    for each in (result, long):
        root = ElementTree.fromstring(drawn(each, line, tmp_path))
        panel = next(
            node
            for node in root.iter()
            if node.get("class") == "background" and not node.attrib["d"].startswith("M0,0h0")
        )
        width = float(re.findall(r"h([\d.]+)", panel.attrib["d"])[0])
        (legend,) = (node for node in root.iter() if "role-legend" in node.get("class", "").split())
        place = re.search(r"translate\(([\d.]+),", legend[0].attrib["transform"])
        assert place is not None
        assert 12 < float(place[1]) - width < 26


def test_overlaps_detects_overlapping_texts() -> None:
    def lines(*places: str) -> str:
        texts = "".join(f"<text {place}>0.00</text>" for place in places)
        return f'<svg xmlns="{SVG[1:-1]}" width="90" height="60" font-size="11px">{texts}</svg>'

    def found(*places: str) -> bool:
        return bool(overlaps(texts_of(lines(*places))))

    middle = 'text-anchor="middle" transform="translate({})"'
    assert found(middle.format("20,20"), middle.format("40,20"))
    assert not found(middle.format("20,20"), middle.format("45,20"))
    assert found('x="10" y="20"', 'x="10" y="25"')
    assert not found('x="10" y="20"', 'x="10" y="32"')
    turned = 'transform="translate({},50) rotate(-45)"'
    assert not found(turned.format(10), turned.format(26))
    assert found(turned.format(10), turned.format(18))
    assert outside(lines('x="80" y="20"'))
    assert not outside(lines('x="60" y="20"'))


# --- heat maps ------------------------------------------------------------------------------------


def test_heatmap_numbers_fit_in_their_cells(tmp_path: Path) -> None:
    for scale in (0.03, 0.0003, 1234.0):
        svg = drawn(few(swept(12, 12, scale=scale)), PICTURES["heatmap"][1], tmp_path)
        cells: dict[str, list[float]] = {}
        for node in ElementTree.fromstring(svg).iter(f"{SVG}path"):
            said = node.find(f"{SVG}title")
            if said is not None and said.text:
                found = re.match(r"M([\d.]+),([\d.]+)h([\d.]+)v([\d.]+)", node.attrib["d"])
                assert found is not None
                cells[said.text] = [float(number) for number in found.groups()]
        numbers = [text for text in texts_of(svg) if text.title in cells]
        assert len(numbers) == len(cells) == 144
        for text in numbers:
            xs, ys = zip(*text.corners, strict=True)
            width, height = cells[text.title][2:]
            assert max(xs) - min(xs) < width - 2
            assert max(ys) - min(ys) < height - 2
            assert text.size >= 8


def test_heatmap_number_format_depends_on_the_scale() -> None:
    for greatest, value, shown in (
        (0.6, 0.004, "0.00"),
        (0.03, 0.004, "0.004"),
        (0.0312, -0.0312, "-0.031"),
        (3.0, 0.25, "0.25"),
        (25.0, 3.14, "3.1"),
        (0.0004, 0.00035, "3.5e-04"),
    ):
        assert map_format([greatest, -greatest / 3])(value) == shown


def test_dense_heatmap_shows_dots_instead_of_numbers(tmp_path: Path) -> None:
    large = few(swept(14, 12))
    svg = drawn(large, PICTURES["heatmap"][1], tmp_path)
    said = checked(svg)
    assert not any(
        re.fullmatch(r"-?0\.\d\d", text) and float(text) not in (0, 0.5, -0.5) for text in said
    )
    survived = int(large.statistics[0].p_corrected.__lt__(0.05).sum())
    assert f"dot: {survived} of 168 cells survive Holm's correction at p < 0.05" in said
    dots = re.findall('class="[^"]*mark-symbol[^"]*marks".*?</g>', svg, re.S)
    assert sum(dot.count("<path") for dot in dots) >= survived


def test_heatmap_explains_bold_and_empty_cells(tmp_path: Path) -> None:
    plain = checked(drawn(few(swept(3, 4)), PICTURES["heatmap"][1], tmp_path))
    assert any(
        text.startswith("bold: 3 of 12 cells survive") or "survive" in text
        for text in plain
        if text.startswith("bold: ")
    )
    assert "grey: no value" not in plain
    gaps = with_controls(swept(12, 12, gaps=True))
    said = checked(drawn(few(gaps), PICTURES["heatmap"][1], tmp_path))
    assert "grey: no value" in said
    assert any("random heads" in text for text in said), "what it takes to be marked `°`"
    assert any(text.startswith("~ ") and "fewer than 50 %" in text for text in said)


def test_axis_labels_are_rotated_broken_or_thinned() -> None:
    long = [f"subject token of the other sentence {n}" for n in range(30)]
    broken = column_labels(long[:4], 40, 1000)
    assert "\n" in broken.texts[0]
    assert broken.step > 40
    assert column_labels(long, 40, 1000).options["labelAngle"] == -45
    assert column_labels(long, 10, 1000).options["labelAngle"] == -90
    assert column_labels(["a", "b"], 40, 1000).options["labelAngle"] == 0
    assert column_labels(range(48), 13, 1000).options["values"] == [str(n) for n in range(0, 48, 2)]
    assert row_labels(range(100), 5).options["values"][1] == "5"
    assert row_labels(long, 5).step > 10


def test_text_width_is_never_underestimated() -> None:
    svg = '<svg xmlns="{}" width="9" height="9"><text font-size="10">{}</text></svg>'
    for text in ("subject token 3", "-0.03", "1.2e-04", "WHERE Mm", "~0.00", "layer (centre)"):
        (found,) = texts_of(svg.format(SVG[1:-1], text))
        width = found.corners[1][0] - found.corners[0][0]
        assert width <= text_width(text, 10) < 1.5 * width


# --- tooltips -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heatmap", "lines along words", "bars", "confusion"])
def test_tooltip_of_every_cell_has_n(name: str, tmp_path: Path) -> None:
    build, line = PICTURES[name]
    result = few(build(4, 4))
    said = set(titles(drawn(result, line, tmp_path)))
    for cell, n in zip(result.cells, result.statistics[0].n, strict=True):
        if not n:
            continue
        place = str(cell.coords["position"]) if name == "confusion" else cell.name
        assert any(text.startswith(f"{place}, ") and f"n = {n}" in text for text in said)


def test_html_charts_have_tooltips_with_n() -> None:
    chart = few(swept(3, 4)).plot("heatmap").to_dict()
    (layer, *_) = chart["vconcat"][0]["layer"]
    assert layer["encoding"]["tooltip"]["field"] == "hover"
    values = chart["data"]["values"]
    assert all(re.search(r"^L\dH\d\.z, .* n = 24$", each["hover"]) for each in values)


def test_overlay_tokens_have_tooltips_with_values(tmp_path: Path) -> None:
    said = titles(drawn(few(read_tokens()), report("overlay", top=1), tmp_path))
    assert any(re.fullmatch(r"' pear' -?\d\.\d\d", text) for text in said)


# --- lines ----------------------------------------------------------------------------------------


def test_equal_lines_have_distinct_dashes_and_points(tmp_path: Path) -> None:
    """Each line has a different dash and point, and only the lowest line is solid."""
    result = swept(6, 4)
    (data,) = result.measures
    same = np.tile(data.patched[::4].repeat(4, axis=0), 1)
    equal = few(replace(result, measures=(replace(data, patched=same),)))
    svg = drawn(equal, report("lines", variable="layer", by="head"), tmp_path)
    root = ElementTree.fromstring(svg)
    marks = [node for node in root.iter() if node.get("aria-roledescription") == "line mark"]
    assert len({mark.attrib["d"] for mark in marks}) == 1
    assert marks[0].get("stroke-dasharray", "1,0") == "1,0"
    assert len({mark.get("stroke-dasharray", "1,0") for mark in marks}) == 4
    assert len({mark.attrib["stroke"] for mark in marks}) == 4
    points = [node for node in root.iter() if node.get("aria-roledescription") == "point"]
    assert len({point.attrib["d"] for point in points}) == 4
    assert {point.get("fill") for point in points} <= {"transparent", None}
    texts = [text.text for text in texts_of(svg)]
    assert {"0", "1", "2", "3"} <= {*texts}


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_windows_are_named_by_their_centre(tmp_path: Path) -> None:
    result = few(replace(swept(3, 4), centres=("layer",)))
    for kind in ("heatmap", "lines", "bars"):
        line = report(kind, variable="layer", by="head")
        texts = checked(drawn(result, line, tmp_path))
        assert "Layer (centre of the window)" in texts
        assert "layer (centre): each value is the centre of a window" in texts
        out = io.StringIO()
        show_report(result, line, Console(file=out, width=60, color_system=None))
        assert "layer (centre)" in out.getvalue()
    assert axis_title(swept(3, 4), "layer") == "layer"


# --- the terminal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heatmap", "confusion"])
def test_terminal_columns_are_aligned(name: str) -> None:
    build, line = PICTURES[name]
    out = io.StringIO()
    show_report(few(build(12, 12)), line, Console(file=out, width=100, color_system=None))
    text = out.getvalue()
    assert re.search(r"· n = \d+", text)
    title, start = ("layer ", r"\d+ ") if name == "heatmap" else ("item ", r"item \d+ token ")
    lines = text.splitlines()
    head = next(row for row in lines if row.startswith(title) and row.split()[-1].isalnum())
    rows = [row for row in lines if re.match(start, row) and row != head]
    assert len(rows) == (24 if name == "confusion" else 12)  # the base run has rows, too
    width = {len(row.rstrip(" *")) for row in rows}
    assert len(width) == 1
    ends = [found.end() for found in re.finditer(r"\S+", head)][1:]
    for row in rows:
        cells = [f.end() for f in re.finditer(r"(?<![\d.])(-?\d\.\d\d|–|\d+)(?=[* ]|$)", row)]
        assert set(ends) <= set(cells), row


# --- the documentation ----------------------------------------------------------------------------


def programs() -> list[tuple[str, str, Path]]:
    """Return every complete file of the documentation and the examples."""
    found = [(path.name, path.read_text(), path) for path in ROOT.glob("examples/*.mech")]
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        whole = [fence.content for fence in fences(path.read_text(encoding="utf-8"))]
        for number, text in enumerate(whole):
            for program in re.findall(r'(?:^|""")(mech 1\n.*?)(?:"""|\Z)', text, re.S):
                found.append((f"{path.name} {number}", program, ROOT / "examples" / "doc.mech"))
    return found


def made_up(experiment: ResolvedExperiment) -> ExperimentResult:
    """Build a result with the experiment's axes and cells, and random numbers."""
    random = np.random.default_rng(2)
    cells: list[CellKey] = list(name_cells(experiment))
    base = random.normal(0, 1, (1, 12))
    patched = base + random.normal(0, 0.1, (len(cells), 12))
    kinds = [(m.label, m.kind, m.word) for m in experiment.measures]
    measures = [
        replace(
            measure(np.round(patched) % 9 if kind == "category" else patched, base, kind=kind),
            label=label,
            word=word,
        )
        for label, kind, word in kinds
    ]
    return few(
        replace(
            swept(1, 1, prompts=12),
            name=experiment.name,
            axes=tuple(axis.name for axis in experiment.axes),
            aliases={axis.alias: axis.name for axis in experiment.axes if axis.alias is not None},
            centres=tuple(axis.name for axis in experiment.axes if axis.of_windows),
            cells=tuple(cells),
            measures=tuple(measures),
            row_values={"count": [1] * 12},
        )
    )


@pytest.mark.parametrize(
    ("text", "path"),
    [
        pytest.param(text, path, id=name, marks=pytest.mark.slow if number % 8 else ())
        for number, (name, text, path) in enumerate(programs())
    ],
)
def test_pictures_of_documented_programs_have_no_overlaps(
    text: str, path: Path, tmp_path: Path
) -> None:
    found = check_source(Source(text, path), CheckSettings(limit=8))
    for experiment in found.experiments:
        if experiment.place is not None:  # combining parts after the run adds an axis
            continue
        for line in experiment.spec.reports:
            entry = REPORTS[line.kind]
            if entry.picture and line.kind != "overlay":  # overlays need the prompts of a run
                said = checked(drawn(made_up(experiment), line, tmp_path))
                assert any("n = 12" in each for each in said)


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_drawings_of_the_documentation_have_no_overlaps(path: Path) -> None:
    checked(path.read_text(encoding="utf-8"))
