"""Rendered reports: golden texts at several widths, and files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import mechdsl
from mechdsl.base.text import shown_token
from mechdsl.program import spec
from mechdsl.resolve.cells import CellKey
from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult, FileResult
from mechdsl.results.results import Results
from mechdsl.show.output import save_report, show_report
from mechdsl.show.reports.grid import count_confusions
from mechdsl.show.reports.overlay_pages import build_overlays, prompt_effects
from mechdsl.show.reports.series_charts import bars_chart, lines_chart
from mechdsl.show.reports.text import (
    equal_rows_note,
    interval_texts,
    null_texts,
    number_format,
    p_text,
    print_verdicts,
    verdict_text,
)
from mechdsl.vocab.reports import REPORTS, ReportKind, ReportSignature, check_report

from ..quick import some
from .synthetic import (
    counted,
    finished,
    heads,
    measure,
    positions,
    read_tokens,
    report,
    with_controls,
    wrote,
)

GOLDENS = Path(__file__).parent / "goldens"


def printed(
    result: ExperimentResult, line: spec.Report | None, width: int, *, colour: bool = False
) -> str:
    text = io.StringIO()
    console = Console(
        file=text, width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    if line is None:
        print_verdicts(result, console)
    else:
        show_report(result, line, console)
    return text.getvalue()


def saved(result: ExperimentResult, line: spec.Report, folder: Path) -> Path:
    """Save a report and return its path."""
    assert line.file is not None
    save_report(result, line, folder / line.file)
    return folder / line.file


def behaviour() -> ExperimentResult:
    """Without a rule: one cell, a number and a category."""
    random = np.random.default_rng(0)
    right = np.array([2.0 + i % 3 for i in range(64)])[None]
    guess = right + (random.random((1, 64)) < 0.2)
    correct = (guess == right).astype(float)
    given = {"effect": "raw", "unit": ""}
    result = replace(
        heads(),
        name="behaviour",
        axes=(),
        cells=(CellKey({}, ""),),
        measures=(
            measure(correct, correct, label="correct", metric="correct", **given),
            measure(
                guess,
                guess,
                label="argmax(1..9)",
                metric="argmax(1..9)",
                kind="category",
                truth=right,
                **given,
            ),
        ),
        runs={},
        base="clean",
        source=None,
    )
    return finished(result)


CASES = {
    "table": (lambda: finished(heads()), report("table")),
    "table_top": (lambda: finished(positions()), report("table", top=4)),
    "table_by_value": (lambda: finished(heads()), report("table", by="count", top=4)),
    "behaviour": (behaviour, report("table", by="count")),
    "heatmap": (lambda: finished(heads(3, 12)), report("heatmap", variable="layer", by="head")),
    "heatmap_positions": (
        lambda: finished(positions()),
        report("heatmap", variable="layer", by="item"),
    ),
    "lines": (lambda: finished(positions()), report("lines", variable="layer")),
    "lines_controls": (
        lambda: finished(with_controls(positions(2))),
        report("lines", variable="layer"),
    ),
    "table_controls": (lambda: finished(with_controls(heads())), report("table", top=3)),
    "bars": (lambda: finished(counted()), report("bars", variable="item")),
    "bars_controls": (
        lambda: finished(with_controls(heads())),
        report("bars", variable="head", by="layer"),
    ),
    "confusion": (
        lambda: finished(counted(2)),
        report("confusion", variable="item", by="argmax"),
    ),
    "confusion_values": (behaviour, report("confusion", variable="count", by="argmax")),
    "overlay": (lambda: finished(read_tokens()), report("overlay")),
    "overlay_layers": (lambda: finished(read_tokens(3)), report("overlay", top=1)),
    "texts": (lambda: finished(wrote()), report("texts", top=2)),
    "verdicts": (
        lambda: finished(
            heads(), "max(recovery) > 0.3", "accuracy(clean) > 0.93", "top 1 contains L1H3"
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_printed_report_equals_its_golden(name: str, update: bool) -> None:
    build, line = CASES[name]
    result = build()
    parts = [f"--- {width}\n{printed(result, line, width)}" for width in (60, 80, 120)]
    text = re.sub(r" +$", "", "".join(parts), flags=re.MULTILINE)
    path = GOLDENS / f"{name}.txt"
    if update:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    build, line = CASES[name]
    for text in printed(build(), line, width).splitlines():
        assert len(text) <= width


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120])
def test_table_numbers_are_never_truncated(width: int) -> None:
    result = finished(heads())
    text = printed(result, report("table"), width)
    assert "…" not in text
    for number in re.findall(r"-?\d\.\d+", printed(result, report("table"), 120)):
        assert number in text or width < 80  # narrow tables drop p first
    intervals = re.findall(r"\[-?\d\.\d{3}, -?\d\.\d{3}\]|\[0, 0\]", text)
    assert len(intervals) == len(result.cells) or width < 30


def test_coloured_heatmap_has_the_text_of_the_plain_one() -> None:
    result = finished(heads())
    line = report("heatmap", variable="layer", by="head")
    plain, coloured = printed(result, line, 80), printed(result, line, 80, colour=True)
    assert "\x1b[" not in plain
    assert "48;2;" in coloured
    stripped = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert [row.rstrip() for row in stripped.splitlines()] == [
        row.rstrip() for row in plain.splitlines()
    ]


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True)
    show_report(finished(heads()), report("heatmap", variable="layer", by="head"), console)
    assert "48;" not in text.getvalue()


def test_conventions_follow_tables_and_the_last_figure() -> None:
    lines = (
        report("heatmap", variable="layer", by="head"),
        report("table", top=3),
        report("lines", variable="layer"),
    )
    result = replace(finished(heads()), reports=lines)
    shown = ["conventions" in printed(result, line, 80) for line in lines]
    assert shown == [False, True, True]


@pytest.mark.parametrize(
    ("site", "shown"),
    [
        ("L{layer}H{head}.z", []),
        ("L0-2H0-3.z", ["layer", "head"]),
        ("L{layer}H0-3.z", ["head"]),
        ("L0-2H{head}.z", ["layer"]),
        ("L0,2,1H*.z", ["layer", "head"]),
        ("", ["layer", "head"]),
    ],
)
def test_table_and_name_show_coordinates_that_the_site_lacks(site: str, shown: list[str]) -> None:
    """A direction of each layer that is added to all layers at once gives such cells."""
    result = heads()
    cells = tuple(replace(c, site=site.format(**c.coords)) for c in result.cells)
    result = replace(result, cells=cells)
    for table in (report("table"), report("table", top=1)):
        text = printed(finished(result), table, 90)
        header = next(line for line in text.splitlines() if "interval" in line).split()
        assert [each for each in header if each in ("layer", "head")] == shown
    names = [f"{axis} {cells[6].coords[axis]}" for axis in shown]
    assert cells[6].name == " at ".join(filter(None, [cells[6].site, *names]))


def test_top_ranks_by_absolute_value() -> None:
    rows = printed(finished(heads()), report("table", top=2), 120).splitlines()
    assert "L2H1.z" in rows[5]
    assert "L1H3.z" in rows[6]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("heatmap", {"variable": "layer", "by": "head"}),
        ("lines", {"variable": "layer", "by": "head"}),
        ("lines", {"variable": "layer"}),
        ("bars", {"variable": "layer"}),
        ("bars", {"variable": "layer", "by": "head"}),
    ],
)
@pytest.mark.parametrize("suffix", some([".svg", ".png", ".html"], [".svg"]))
def test_chart_is_saved_in_every_format(
    name: str, values: dict[str, str], suffix: str, tmp_path: Path
) -> None:
    line = report(name, file=f"charts/it{suffix}", **values)
    path = saved(finished(heads()), line, tmp_path)
    content = path.read_bytes()
    start = {".svg": b"<svg", ".png": b"\x89PNG", ".html": b"<!DOCTYPE html>"}[suffix]
    assert content.startswith(start)
    if suffix == ".svg":
        assert b"recovery of ld" in content
        assert "clean → fewer".encode() in content
    if suffix == ".html":
        assert b"https://cdn" not in content  # opens without a network


@pytest.mark.slow
def test_charts_show_positions_and_facets(tmp_path: Path) -> None:
    swept = finished(positions())
    for number, line in enumerate(
        (
            report("heatmap", variable="layer", by="item", file="a.svg"),
            report("lines", variable="position", by="layer", file="b.svg"),
        )
    ):
        path = saved(swept, line, tmp_path)
        assert path is not None, number
        assert "part1 token" in path.read_text(encoding="utf-8")
    cells = tuple(
        replace(cell, coords={**cell.coords, "c": i % 2, "head": int(cell.coords["head"]) // 2})
        for i, cell in enumerate(heads().cells)
    )
    three = finished(replace(heads(), axes=("layer", "head", "c"), cells=cells))
    for kind in ("heatmap", "lines"):
        line = report(kind, variable="layer", by="head", file=f"{kind}.svg")
        path = saved(three, line, tmp_path)
        assert "c 1" in path.read_text(encoding="utf-8")
    assert "c 1" in printed(three, report("heatmap", variable="layer", by="head"), 80)


def test_heatmap_of_a_category_shows_the_most_common_value(tmp_path: Path) -> None:
    result = heads()
    values = np.tile(np.arange(12.0)[:, None] % 5 + 1, (1, 64))
    data = measure(values, values[:1], effect="raw", kind="category", label="argmax(1..9)")
    result = finished(replace(result, measures=(data,), runs={}))
    text = printed(result, report("heatmap", variable="layer", by="head"), 80)
    assert "the most common value of every cell" in text
    line = report("heatmap", variable="layer", by="head", file="x.svg")
    path = saved(result, line, tmp_path)
    assert "Most frequent" in path.read_text(encoding="utf-8")
    assert "write `report bars layer`" in printed(result, report("lines", variable="layer"), 80)


def test_csv_of_a_run_has_rows_of_every_experiment() -> None:
    first, second = finished(heads()), finished(positions())
    text = Results((FileResult("a.mech", (first, second)),)).to_csv()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 24
    assert [rows[0]["head"], rows[-1]["head"]] == ["0", ""]
    assert rows[-1]["position"] == "last token"
    assert {row["file"] for row in rows} == {"a.mech"}


def test_report_is_saved_as_data_or_picture_by_suffix(tmp_path: Path) -> None:
    result = finished(heads())
    text = printed(result, report("csv"), 40)
    assert text.count("\n") == 13
    assert text.startswith("experiment,model,layer,head,site,position,tokens,")
    path = saved(result, report("csv", file="c.csv"), tmp_path)
    assert path.read_text(encoding="utf-8") == text
    document = json.loads(printed(result, report("json"), 40))
    assert document["name"] == "where"
    for name, start in (("t.svg", b"<svg"), ("t.png", b"\x89PNG")):
        picture = saved(
            result,
            report("table", file=name),
            tmp_path,
        )
        assert picture.read_bytes().startswith(start)
    table = saved(
        result,
        report("table", file="t.txt"),
        tmp_path,
    )
    assert "conventions" in table.read_text(encoding="utf-8")
    rows = saved(
        result,
        report("table", by="count", file="t.csv"),
        tmp_path,
    )
    assert rows.read_text(encoding="utf-8").count("\n") == 37


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (report("tabel"), "E0203", "did you mean `table`?"),
        (report("html"), "E0108", "table, heatmap, lines"),
        (report("bars"), "E0607", "report bars position"),
        (report("bars", variable="layer", by="cuont"), "E0607", "`layer`, `head`"),
        (report("confusion", variable="layer"), "E0607", "item by argmax"),
        (report("confusion", variable="lyaer", by="argmax"), "E0607", "did you mean `layer`?"),
        (report("confusion", variable="xyz", by="argmax"), "E0607", "prompts are `count`"),
        (report("overlay"), "E0607", "at token *"),
        (report("overlay", variable="layer"), "E0607", "report overlay"),
        (report("texts", variable="layer"), "E0607", "report texts top 5"),
        (report("texts", by="layer"), "E0607", "report texts top 5"),
        (report("heatmap", variable="layer"), "E0607", "layer by head"),
        (report("heatmap", variable="layer", by="layer"), "E0607", "layer by head"),
        (report("lines"), "E0607", "report lines"),
        (report("table", variable="layer"), "E0607", "report table top 10"),
        (report("table", by="cuont"), "E0607", "did you mean `count`?"),
        (report("lines", variable="layer", by="count"), "E0607", "`layer`, `head`"),
        (report("heatmap", variable="layer", by="head", file="a.jpg"), "E0607", "`.svg` or"),
    ],
)
def test_invalid_report_is_rejected(line: spec.Report, code: str, words: str) -> None:
    (found,) = check_report(line, ["layer", "head"], ["count"])
    assert found.code == code
    assert words in found.help_text


def test_report_without_its_optional_package_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechdsl.vocab.reports.find_spec", lambda name: None)
    (found,) = check_report(report("parquet", file="a.parquet"))
    assert "needs pandas and pyarrow" in found.message
    assert "mechdsl[frames]" in found.help_text


def test_parquet_report_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    line = report("parquet", file="a.parquet")
    assert check_report(line) == []
    path = saved(finished(heads()), line, tmp_path)
    assert path.stat().st_size > 0


def test_report_kind_without_files_rejects_to(monkeypatch: pytest.MonkeyPatch) -> None:
    printed_only = ReportKind(
        name="printed", meaning="", example="report printed", signature=ReportSignature(to=None)
    )
    monkeypatch.setitem(REPORTS._entries, "printed", printed_only)  # type: ignore[attr-defined]
    assert check_report(report("printed")) == []
    (found,) = check_report(report("printed", file="a.txt"))
    assert found.code == "E0607"
    assert 'can only be printed, but `to "a.txt"`' in found.message


def test_parquet_without_a_file_is_rejected() -> None:
    (found,) = check_report(report("parquet"))
    assert found.code == "E0607"


def test_table_abbreviates_many_tokens() -> None:
    swept = positions()
    cells = tuple(replace(cell, tokens=tuple("abcdefghij")) for cell in swept.cells)
    text = printed(finished(replace(swept, cells=cells)), report("table", top=1), 200)
    assert "a, b, c, d, e, f and 4 more" in text


def test_valid_report_is_accepted() -> None:
    for line in (
        report("table", by="count"),
        report("table", by="layer", top=3),
        report("heatmap", variable="layer", by="head", file="a.PNG"),
        report("lines", variable="layer"),
        report("bars", variable="layer", by="head"),
        report("confusion", variable="layer", by="argmax"),
        report("confusion", variable="count", by="argmax", file="a.svg"),
    ):
        assert check_report(line, ["layer", "head"], ["count"]) == []
    assert check_report(report("lines", variable="x")) == []


@pytest.mark.parametrize("name", list(REPORTS))
def test_every_report_is_described(name: str) -> None:
    entry = REPORTS[name]
    assert entry.meaning
    assert entry.example.startswith(f"report {name}")
    assert entry.supported == (entry.module is not None)


def test_number_format_has_equal_digits_per_column() -> None:
    write = number_format([0.5, -0.123456, 0.00001])
    assert [write(v) for v in (0.5, -0.123456, -0.00001, np.nan)] == [
        "0.500",
        "-0.123",
        "0.000",
        "–",
    ]
    assert number_format([1234.5])(1234.5) == "1234"
    assert number_format([12.345, 1.0])(12.345) == "12.35"
    assert number_format([1e-7])(1e-7) == "1.00e-07"
    assert number_format([1e9])(1e9) == "1.00e+09"
    assert p_text(0.0001) == "0.0001"
    assert p_text(2e-6) == "< 0.0001"


@pytest.mark.parametrize(
    ("numbers", "rounding", "expected"),
    [
        ((0.5, 0.4, 0.6), 0.0, ("0.500", "[0.400, 0.600]")),
        ((0.0, -0.1, 0.1), 0.0, ("0.000", "[-0.100, 0.100]")),
        ((0.0, 0.0, 0.074), 0.0, ("0.000", "[0.000, 0.074]")),
        ((0.00042, 0.00031, 0.00052), 0.0, ("4.2e-04", "[3.1e-04, 5.2e-04]")),
        ((0.00042, -0.00031, 0.00052), 0.0, ("4.2e-04", "[-3.1e-04, 5.2e-04]")),
        ((0.05, -0.0003, 0.1), 0.0, ("5.0e-02", "[-3.0e-04, 1.0e-01]")),
        ((0.0001, -0.1, 0.1), 0.0, ("0.000", "[-0.100, 0.100]")),
        ((0.0001, -0.0002, 0.0003), 0.0, ("1.0e-04", "[-2.0e-04, 3.0e-04]")),
        ((3e-7, -1e-7, 9e-7), 1e-6, ("≈0", "[≈0, ≈0]")),
        ((3e-7, 1e-7, 9e-7), 1e-7, ("3.0e-07", "[1.0e-07, 9.0e-07]")),
        ((0.0, 0.0, 0.0), 0.0, ("0", "[0, 0]")),
        ((0.0, 0.0, 0.0), 1e-6, ("≈0", "[≈0, ≈0]")),
        ((1e-7, -1e-2, 1e-4), 1e-6, ("0.000", "[-0.010, 0.000]")),
        ((0.0001, np.nan, np.nan), 0.0, ("1.0e-04", "–")),
        ((np.nan, np.nan, np.nan), 0.0, ("–", "–")),
    ],
)
def test_number_and_interval_have_digits_that_distinguish_them_from_zero(
    numbers: tuple[float, float, float], rounding: float, expected: tuple[str, str]
) -> None:
    assert interval_texts(number_format([0.6]), *numbers, rounding) == expected


def test_small_significant_heatmap_cell_is_a_power_of_ten() -> None:
    result = heads()
    (data,) = result.measures
    noise = np.random.default_rng(0).normal(0, 1e-4, data.base.shape[1])
    patched = data.patched.copy()
    patched[5] = data.base + 1e-3 + noise  # the runs differ by about 5
    made = finished(replace(result, measures=(replace(data, patched=patched),)))
    printed = replace(made, reports=(report("heatmap", variable="layer", by="head"),)).to_text(80)
    assert "2e-4*" in printed
    assert "0.00*" not in printed


def test_null_band_of_small_effects_has_digits() -> None:
    made = finished(with_controls(heads()))
    band, found = made.control(0), made.statistics[0]
    assert band is not None
    for scale, expected in ((1e-4, "e-0"), (0.0, "[0, 0]")):
        small = replace(band, low=scale * band.low, high=scale * band.high)
        assert expected in null_texts(small, found, [9], number_format([0.6]))[0]


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (counted, report("confusion", variable="item", by="argmax")),
        (counted, report("confusion", variable="count", by="argmax")),
        (counted, report("bars", variable="item")),
        (read_tokens, report("overlay")),
        (lambda: read_tokens(2), report("overlay", top=1)),
        (lambda: with_controls(heads()), report("lines", variable="layer", by="head")),
        (lambda: with_controls(heads()), report("bars", variable="layer")),
        (lambda: with_controls(positions()), report("lines", variable="item", by="layer")),
    ],
)
@pytest.mark.parametrize("suffix", some([".svg", ".png", ".html"], [".png"]))
def test_picture_of_categories_overlays_and_controls_is_saved(
    build: Callable[[], ExperimentResult], line: spec.Report, suffix: str, tmp_path: Path
) -> None:
    given = line.model_copy(update={"file": f"it{suffix}"})
    path = saved(finished(build()), given, tmp_path)
    start = {".svg": b"<svg", ".png": b"\x89PNG", ".html": b"<!DOCTYPE html>"}[suffix]
    assert path.read_bytes().startswith(start)


@pytest.mark.slow
def test_panels_share_data_and_show_only_their_cells() -> None:
    """A layer with separate data would show all of it in each panel."""
    bars = bars_chart(finished(with_controls(heads())), report("bars", variable="layer"))
    swept = replace(heads(), axes=("layer", "head", "k"))
    cells = tuple(replace(cell, coords={**cell.coords, "k": 0}) for cell in swept.cells[:6])
    cells += tuple(replace(cell, coords={**cell.coords, "k": 1}) for cell in swept.cells[:6])
    swept = finished(with_controls(replace(swept, cells=cells)))
    lines = lines_chart(swept, report("lines", variable="layer", by="head"))
    for chart in (bars, lines):
        drawn = chart.to_dict()["vconcat"][0]
        assert drawn["facet"]["field"] == "panel"
        assert not any("data" in layer for layer in drawn["spec"]["layer"])


def test_confusion_counts_prompts() -> None:
    result = finished(counted())
    line = report("confusion", variable="item", by="argmax")
    (found,) = count_confusions(result, line).values()
    assert [each.title for each in found] == ["base run: fewer", "layer 0", "layer 1", "layer 2"]
    guess = result.measures[1].patched
    for layer, each in enumerate(found[1:]):
        for row in range(6):
            values = guess[layer * 6 + row]
            assert each.total(row) == np.isfinite(values).sum()
            assert sum(each.share(row, column) for column in range(len(each.columns))) == (
                pytest.approx(1.0)
            )
            own = each.own[row]
            assert own is not None
            assert each.columns[own] == row + 1
            assert each.counts[row][own] == np.count_nonzero(values == row + 1)


def test_confusion_by_a_prompt_value_has_panels_per_cell() -> None:
    result = finished(counted())
    (found,) = count_confusions(result, report("confusion", variable="count", by="argmax")).values()
    bases, own = found[::2], found[1::2]  # rows drop out of cells, and so of their base run
    assert len(own) == len(result.cells)
    assert bases[0].title == "layer 0, item 1 token, base run: fewer"
    counts = np.array(result.row_values["count"])
    guess = result.measures[1].patched[0]
    assert own[0].rows == tuple(sorted(set(counts.tolist())))
    place = own[0].columns.index(1.0)
    assert own[0].counts[0][place] == np.count_nonzero(guess[counts == 2] == 1)


@pytest.mark.parametrize("word", ["item", "count", "layer"])
def test_confusion_shows_the_base_run_of_the_same_prompts(word: str) -> None:
    """The base run has the prompts, rows and columns of its cell."""
    result = finished(counted())
    data = result.measures[1]
    (found,) = count_confusions(result, report("confusion", variable=word, by="argmax")).values()
    values = np.array(result.row_values["count"])
    bases = [each for each in found if "base run: fewer" in each.title]
    assert len(bases) == {"item": 1, "count": 18, "layer": 6}[word]
    for number, each in enumerate(bases):
        for row, name in enumerate(each.rows):
            cell = {"item": row, "count": number, "layer": 6 * row + number}[word]
            kept = np.isfinite(data.patched[cell])
            if word == "count":
                kept &= values == name
            expected = [np.count_nonzero(data.base[0][kept] == c) for c in each.columns]
            assert each.counts[row] == tuple(expected)
            assert each.total(row) == np.count_nonzero(kept)


def test_confusion_without_rules_has_a_single_panel() -> None:
    result = behaviour()
    (found,) = count_confusions(result, report("confusion", variable="count", by="argmax")).values()
    assert [each.title for each in found] == [""]


def test_confusion_over_layers_has_no_own_category() -> None:
    result = finished(counted())
    (found,) = count_confusions(result, report("confusion", variable="layer", by="argmax")).values()
    assert {own for each in found for own in each.own} == {None}
    assert 0.0 not in found[0].columns


def test_confusion_finds_a_measure_by_label_or_metric() -> None:
    result = finished(counted())
    named = replace(result.measures[1], label="guess")
    result = replace(result, measures=(result.measures[0], named))
    for word in ("guess", "argmax"):
        assert count_confusions(result, report("confusion", variable="item", by=word))
    assert not count_confusions(result, report("confusion", variable="item", by="prob"))


def test_overlay_prompts_average_to_the_effect() -> None:
    result = finished(read_tokens(2))
    values = prompt_effects(result, 0)
    found = np.nanmean(values, axis=1)
    np.testing.assert_allclose(found, result.statistics[0].mean, atol=1e-9)
    (shown,) = build_overlays(result, report("overlay", top=5)).values()
    assert len(shown.prompts) == 5
    first = shown.prompts[0]
    assert first.tokens == result.texts[0]
    assert [title for title, _ in first.rows] == ["layer 1", "layer 0"]
    # the cell of token -1 is the last of its layer
    assert first.rows[1][1][-1] == pytest.approx(values[len(values) // 2 - 1, 0])


def test_overlay_tokens_without_a_cell_have_no_number() -> None:
    result = read_tokens()
    hits = tuple(tuple(() for _ in row) if i < 6 else row for i, row in enumerate(result.hits))
    text = printed(finished(replace(result, hits=hits)), report("overlay", top=1), 80)
    _, tokens, numbers, *_ = text.split("prompt 1")[1].splitlines()
    assert len(tokens.split()) == 8
    assert len(numbers.split()) == 4


def test_overlay_without_tokens_prints_a_note(tmp_path: Path) -> None:
    result = finished(replace(read_tokens(), hits=(), texts=()))
    assert "these results don't contain them" in printed(result, report("overlay"), 80)
    line = report("overlay", file="a.html")
    path = saved(result, line, tmp_path)
    assert "these results don&#x27;t contain them" in path.read_text(encoding="utf-8")


def test_shown_token_makes_white_space_visible() -> None:
    assert [shown_token(text) for text in (" fig", "\n", "  ", "")] == ["fig", "\\n", "␣␣", "∅"]


def test_table_by_value_has_no_null_band() -> None:
    result = finished(with_controls(heads()))
    assert "null" not in printed(result, report("table", by="count", top=2), 120)


@dataclass(frozen=True)
class Named:
    label: str
    word: str
    kind: str = "number"


@pytest.mark.parametrize(
    ("line", "measures", "message", "words"),
    [
        (
            report("confusion", variable="layer", by="argmx"),
            [Named("ld", "logit"), Named("argmax(1..9)", "argmax", "category")],
            "`argmx`, which isn't one of its measures",
            "write `by argmax`",
        ),
        (
            report("confusion", variable="layer", by="prob"),
            [Named("prob(answer)", "prob")],
            "`prob`, which is a number, not a category",
            "add `measure argmax(1..9) as raw`",
        ),
        (
            report("lines", variable="layer"),
            [Named("argmax(1..9)", "argmax", "category")],
            "no number to draw: `argmax(1..9)` is a category",
            "write `report bars layer`",
        ),
    ],
)
def test_report_that_does_not_fit_the_measures_is_rejected(
    line: spec.Report, measures: list[Named], message: str, words: str
) -> None:
    (found,) = check_report(line, ["layer", "position"], [], measures)
    assert found.code == "E0607"
    assert message in found.message
    assert words in found.help_text


def test_report_that_fits_the_measures_is_accepted() -> None:
    measures = [Named("guess", "argmax", "category"), Named("ld", "logit")]
    for line in (
        report("confusion", variable="position", by="argmax"),
        report("confusion", variable="position", by="guess"),
        report("lines", variable="position"),
        report("overlay"),
    ):
        assert check_report(line, ["layer", "position"], [], measures) == []


def test_equal_rows_note_counts_cells_with_equal_rows() -> None:
    result = heads()
    (data,) = result.measures
    patched = data.patched.copy()
    patched[5], patched[7] = data.base[0] + 0.5, data.base[0]
    alike = finished(replace(result, measures=(replace(data, patched=patched, effect="delta"),)))
    text = "2 cells have the same delta in all rows: no interval and no p"
    assert equal_rows_note(alike, 0) == text
    level = data.patched.copy()
    level[5] = 0.5
    raw = finished(replace(result, measures=(replace(data, patched=level, effect="raw"),)))
    assert "1 cell has the same value in all rows" in str(equal_rows_note(raw, 0))
    assert equal_rows_note(finished(result), 0) is None, "inert cells aren't tested"
    strata = np.arange(level.shape[1]) % 2
    level[5] = strata
    dealt = replace(result, measures=(replace(data, patched=level, effect="raw"),), strata=strata)
    assert equal_rows_note(finished(dealt), 0) == (
        "1 cell doesn't vary within a stratum: no interval"
    )
    level[5] = 0.5
    alike = replace(result, measures=(replace(data, patched=level, effect="raw"),), strata=strata)
    assert "the same value in all rows: " in str(equal_rows_note(finished(alike), 0))


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (-0.1911, -1035.36, 0.0, "-0.191 [-1.04e+03, 0]"),
        (0.0, -1035.36, 1.0, "0 [-1035, 1]"),
        (-1.91, -3.5, 0.25, "-1.910 [-3.500, 0.250]"),
    ],
)
def test_verdict_text_prints_zero_only_for_zero(
    value: float, low: float, high: float, said: str
) -> None:
    assert verdict_text(ExpectOutcome("min(delta) > -0.5", True, value, low, high)) == said


def test_table_of_several_sources_names_the_source_of_each_cell(tmp_path: Path) -> None:
    path = tmp_path / "file.mech"
    path.write_text(
        'mech 1\nmodel toy = zoo("counting")\nprompts p {\n  count in 3..6\n'
        '  xs = list("fig", count, sep: " ")\n  template "Part 1: {xs} Count 1:"\n'
        '  answer " {count}"\n  corrupt less { count = count - 1 }\n'
        "  corrupt more { count = count + 1 }\n}\nexperiment e {\n  prompts p\n"
        "  from less, more into clean\n  measure logit(answer) as total\n}\n",
        "utf-8",
    )
    console = Console(file=io.StringIO(), width=120)
    show_report(mechdsl.run(path, store=False)["e"], report("table"), console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "less → clean" in shown
    assert "more → clean" in shown
    assert "less, more have " in shown
