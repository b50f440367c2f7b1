"""Pictures for a paper: titles, colours, tokens, legends, order of layers, fonts and widths."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mechdsl.base.arrays import Floats
from mechdsl.program import spec
from mechdsl.resolve.cells import CellKey
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.output import save_report
from mechdsl.show.reports.canvas import COLUMN_WIDTHS, PNG_DPI, svg_size
from mechdsl.show.reports.charts import PALETTE
from mechdsl.show.reports.colours import (
    NEGATIVE_COLOUR,
    NEUTRAL_COLOUR,
    POSITIVE_COLOUR,
    effect_scale,
    measure_scale,
)
from mechdsl.show.reports.grid import (
    MAX_TOKEN_LENGTH,
    chart_axis_title,
    position_names,
    token_label,
    value_title,
)
from mechdsl.show.reports.map_charts import confusion_chart, heatmap_chart
from mechdsl.show.reports.series_charts import bars_chart, lines_chart

from ..quick import in_turn, some
from .svg_text import outside, overlaps, texts_of
from .synthetic import finished, heads, measure, read_tokens, report, swept


def few(result: ExperimentResult) -> ExperimentResult:
    return finished(result, resamples=20)


def with_measure(result: ExperimentResult, **look: Any) -> ExperimentResult:
    """Replace the measure by one with the same numbers and without an effect."""
    (data,) = result.measures
    values = np.clip(np.abs(data.patched) / 10, 0, 1)
    made = measure(values, np.abs(data.base), **{"effect": "raw", **look})
    return few(replace(result, measures=(made,)))


def attention() -> ExperimentResult:
    look = {"label": "attention", "metric": "attention", "unit": "share of attention"}
    return with_measure(heads(), **look)


def layers_of(chart: Any) -> list[dict[str, Any]]:
    """The layers of the first measure's chart; those of a panel, if there are several."""
    (first, *_) = chart.to_dict()["vconcat"]
    return first.get("spec", first)["layer"]


def encoding(chart: Any, channel: str) -> dict[str, Any]:
    """The first encoding of a channel that isn't a constant."""
    every = (layer.get("encoding", {}).get(channel, {}) for layer in layers_of(chart))
    return next(each for each in every if "scale" in each)


# --- titles of axes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("look", "title"),
    [
        ({"effect": "delta"}, "Change in logit difference (logits)"),
        ({"effect": "recovery"}, "Share of the effect recovered (1 = all)"),
        ({"effect": "relative"}, "Change in logit difference (fraction of the base run)"),
        ({"effect": "total"}, "Difference in logit difference between the runs (logits)"),
        ({"effect": "raw"}, "Logit difference (logits)"),
        ({"effect": "raw", "metric": "prob(answer)", "unit": "probability"}, "Probability"),
        (
            {"effect": "delta", "metric": "logprob(answer)", "unit": "nat"},
            "Change in log-probability (nats)",
        ),
        (
            {"effect": "raw", "metric": "attention", "unit": "share of attention"},
            "Attention weight",
        ),
        ({"effect": "raw", "metric": "mine(x)", "label": "mine", "unit": "nat"}, "mine (nats)"),
        (
            {"effect": "delta", "estimator": "gradient_input"},
            "Estimated change in logit difference (logits)",
        ),
    ],
)
def test_value_title_of_each_effect_has_words_and_unit(look: dict[str, Any], title: str) -> None:
    source = np.ones(4) if look["effect"] in ("recovery", "total") else None
    assert value_title(measure(np.zeros((2, 4)), np.zeros(4), source, **look)) == title


def test_axis_title_of_the_languages_axes_is_a_word() -> None:
    result = swept(3, 4)
    assert chart_axis_title(result, "layer") == "Layer"
    assert chart_axis_title(result, "head") == "Head"
    assert chart_axis_title(swept(3, 4, words=True), "position") == "Token position"
    windows = replace(result, centres=("layer",))
    assert chart_axis_title(windows, "layer") == "Layer (centre of the window)"


def test_axis_title_of_a_loop_variable_is_its_name() -> None:
    cells = [
        replace(cell, coords={"layer": cell.coords["layer"], "dose": cell.coords["head"]})
        for cell in heads().cells
    ]
    result = replace(heads(), axes=("layer", "dose"), cells=tuple(cells))
    assert chart_axis_title(result, "dose") == "dose"


def test_axis_title_of_relative_layers_names_the_depth() -> None:
    cells = [
        replace(cell, coords={**cell.coords, "layer": f"{25 * int(cell.coords['layer'])}%"})
        for cell in heads().cells
    ]
    result = replace(heads(), cells=tuple(cells))
    assert chart_axis_title(result, "layer") == "Layer (relative depth)"


@pytest.mark.parametrize("kind", ["heatmap", "lines", "bars"])
def test_charts_have_titles_on_both_axes(kind: str) -> None:
    build = {"heatmap": heatmap_chart, "lines": lines_chart, "bars": bars_chart}[kind]
    chart = build(few(heads()), report(kind, variable="layer", by="head"))
    found = {
        layer["encoding"][side]["axis"]["title"]
        for layer in layers_of(chart)
        for side in ("x", "y")
        if "title" in layer.get("encoding", {}).get(side, {}).get("axis", {})
    }
    measured = "Share of the effect recovered (1 = all)"
    assert found == ({"Layer", "Head"} if kind == "heatmap" else {"Layer", measured})
    if kind == "heatmap":
        title = encoding(chart, "color")["legend"]["title"]
        assert " ".join(title) == measured
    else:
        assert encoding(chart, "color")["legend"]["title"] == "Head"


# --- colour scales --------------------------------------------------------------------------------


def test_colour_scale_of_attention_is_from_0_to_1() -> None:
    scale = encoding(
        heatmap_chart(attention(), report("heatmap", variable="layer", by="head")), "color"
    )
    assert scale["scale"]["domain"] == [0, 1]
    assert scale["legend"]["values"] == [0, 1]
    assert scale["scale"]["range"][0] == "#f7f7f7"


def test_colour_scale_of_an_effect_is_white_at_0_and_ends_with_the_data() -> None:
    result = few(heads())
    found = encoding(heatmap_chart(result, report("heatmap", variable="layer", by="head")), "color")
    mean = result.statistics[0].mean
    low, zero, high = found["scale"]["domain"]
    assert (low, zero, high) == (mean.min(), 0, mean.max())
    assert found["scale"]["range"][1] == "#f7f7f7"
    assert found["scale"]["range"][2] == "#2166ac", "the largest number has the full colour"


def test_colour_scale_of_an_effect_has_equal_strength_at_equal_distance() -> None:
    scale = effect_scale(-0.2, 0.6)
    assert scale.colour(0.6) == POSITIVE_COLOUR
    assert scale.colour(0.0) == NEUTRAL_COLOUR
    third = [n + (e - n) / 3 for n, e in zip(NEUTRAL_COLOUR, NEGATIVE_COLOUR, strict=True)]
    np.testing.assert_allclose(np.array(scale.colour(-0.2)), third, atol=1)


@pytest.mark.parametrize(
    ("values", "look", "domain"),
    [
        ([0.1, 0.4], {"effect": "raw", "unit": "probability"}, [0, 1]),
        ([0.1, 0.4], {"effect": "delta", "unit": "probability"}, [0, 0.4]),
        ([-0.3, -0.1], {"effect": "delta"}, [-0.3, 0]),
        ([-0.3, 0.1], {"effect": "raw"}, [-0.3, 0, 0.1]),
        ([2.0, 7.0], {"effect": "raw", "unit": "rank"}, [2, 7]),
        ([2.0, 9.0], {"effect": "raw", "kind": "category"}, [2, 9]),
        ([0.0, 0.0], {"effect": "delta"}, [0, 1]),
        ([np.nan, np.nan], {"effect": "delta"}, [0, 1]),
    ],
)
def test_colour_scale_follows_effect_unit_and_range(
    values: list[float], look: dict[str, Any], domain: list[float]
) -> None:
    data = measure(np.zeros((2, 3)), np.zeros(3), **look)
    assert measure_scale(data, np.array(values)).domain == domain


DEUTERANOPIA = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
PROTANOPIA = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
"""Colours as colour-blind readers see them, in linear RGB (Machado et al. 2009, severity 1)."""


def lab(colour: Sequence[int], seen: list[list[float]]) -> Floats:
    """CIELAB coordinates of an sRGB colour after a simulation."""
    share = np.array(colour) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(seen) @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / np.array([0.9505, 1.0, 1.089]), 0.0089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", [np.eye(3).tolist(), DEUTERANOPIA, PROTANOPIA])
def test_colours_are_distinct_for_colour_blind_readers(seen: list[list[float]]) -> None:
    named = [tuple(bytes.fromhex(colour[1:])) for colour in PALETTE]
    ends = [NEGATIVE_COLOUR, NEUTRAL_COLOUR, POSITIVE_COLOUR]
    for colours, least in ((named, 17), (named[:4], 24), (ends, 40)):
        for one, other in itertools.combinations(colours, 2):
            distance = np.linalg.norm(lab(one, seen) - lab(other, seen))
            assert distance > least, (one, other)


# --- tokens ---------------------------------------------------------------------------------------


def with_tokens(tokens: list[tuple[str, ...]], layers: int = 2) -> ExperimentResult:
    """A sweep over the tokens of prompts: at each one, the texts that it has."""
    result = swept(layers, len(tokens))
    cells = [
        CellKey({"layer": layer, "position": str(n)}, f"L{layer}.resid_post", str(n), own)
        for layer, (n, own) in itertools.product(range(layers), enumerate(tokens))
    ]
    return few(replace(result, axes=("layer", "position"), cells=tuple(cells)))


def test_token_label_shows_spaces_and_shortens_long_tokens() -> None:
    assert token_label(" pear") == "·pear"
    assert token_label("\n") == "\\n"
    assert token_label("") == "∅"
    shown = token_label("antidisestablishmentarianism")
    assert shown.endswith("…")
    assert len(shown) == MAX_TOKEN_LENGTH


def test_position_axis_shows_tokens_and_distinguishes_equal_ones() -> None:
    result = with_tokens([("The",), (" cat",), (" saw",), (" cat",), ("a", "b"), ()])
    names = ["0: The", "1: ·cat", "2: ·saw", "3: ·cat", "4: a, …", "5"]
    assert list(position_names(result).values()) == names
    for variable, by, side in (("layer", "position", "x"), ("position", "layer", "y")):
        chart = heatmap_chart(result, report("heatmap", variable=variable, by=by))
        assert encoding(chart, side)["scale"]["domain"] == names
    chart = bars_chart(result, report("bars", variable="position", by="layer"))
    assert encoding(chart, "x")["scale"]["domain"] == names
    chart = lines_chart(result, report("lines", variable="layer", by="position"))
    assert encoding(chart, "color")["scale"]["domain"] == names


def test_position_axis_shows_other_tokens_of_the_source_run() -> None:
    result = with_tokens([("fig",), ("plum",)])
    cells = [replace(cell, read=("kiwi", "pear")) for cell in result.cells]
    names = position_names(replace(result, cells=tuple(cells)))
    assert names["0"] == "0: fig ← kiwi, …"


def test_position_axis_keeps_names_from_the_file() -> None:
    names = list(position_names(swept(2, 3, words=True)).values())
    assert names[0] == "first-item of part1 token 0"


# --- legends and order ----------------------------------------------------------------------------


def without_numbers(series: int) -> ExperimentResult:
    """A sweep in which one head has no value in any layer."""
    result = swept(4, 4)
    (data,) = result.measures
    patched = data.patched.copy()
    patched[series::4] = np.nan
    return few(replace(result, measures=(replace(data, patched=patched),)))


@pytest.mark.parametrize("build", [lines_chart, bars_chart])
def test_legend_lists_only_series_with_numbers(build: Any) -> None:
    chart = build(without_numbers(2), report("lines", variable="layer", by="head"))
    found = encoding(chart, "color")
    assert [name.split()[0] for name in found["scale"]["domain"]] == ["0", "1", "3"]
    values = chart.to_dict()["data"]["values"]
    key = "line" if build is lines_chart else "series"
    assert {each[key].split()[0] for each in values if key in each} == {"0", "1", "3"}


def test_rows_of_layers_begin_at_the_bottom() -> None:
    chart = heatmap_chart(few(heads()), report("heatmap", variable="layer", by="head"))
    assert encoding(chart, "y")["scale"]["domain"] == ["2", "1", "0"]


@pytest.mark.parametrize("build", [lines_chart, bars_chart])
def test_legend_of_layers_begins_at_the_bottom(build: Any) -> None:
    chart = build(few(heads()), report("lines", variable="head", by="layer"))
    found = encoding(chart, "color")
    assert found["legend"]["values"] == ["2", "1", "0"]
    assert found["scale"]["domain"] == ["0", "1", "2"]


@pytest.mark.slow
def test_panels_of_layers_above_one_another_begin_at_the_bottom() -> None:
    chart = bars_chart(few(swept(11, 12, words=True)), report("bars", variable="position"))
    (drawn,) = chart.to_dict()["vconcat"]
    assert drawn["columns"] == 1
    assert drawn["facet"]["sort"][0].startswith("layer 10")
    assert drawn["facet"]["sort"][-1].startswith("layer 0")


@pytest.mark.slow
def test_confusion_rows_of_layers_begin_at_the_bottom() -> None:
    guess = np.arange(1.0, 4.0)[:, None] * np.ones((3, 60))
    data = measure(guess, guess[:1], effect="raw", kind="category", label="guess", unit="")
    cells = [CellKey({"layer": n}, f"L{n}.resid_post", "last token") for n in range(3)]
    result = replace(swept(3, 1, prompts=60), axes=("layer",), cells=tuple(cells), measures=(data,))
    chart = confusion_chart(few(result), report("confusion", variable="layer", by="guess"))
    assert encoding(chart, "y")["scale"]["domain"] == ["2", "1", "0"]


# --- files ----------------------------------------------------------------------------------------


def saved(result: ExperimentResult, line: spec.Report, folder: Path, suffix: str) -> Path:
    path = folder / f"picture{suffix}"
    save_report(result, line, path)
    return path


def pdf_size(data: bytes) -> tuple[float, float]:
    """Width and height of a PDF's page, in points."""
    found = re.search(rb"/MediaBox ?\[ ?0 0 ([\d.]+) ([\d.]+) ?\]", data)
    assert found is not None
    return float(found[1]), float(found[2])


PICTURES = {
    "heatmap": (heads, report("heatmap", variable="layer", by="head")),
    "overlay": (read_tokens, report("overlay", top=1)),
    "table": (heads, report("table")),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pdf_embeds_its_fonts(name: str, tmp_path: Path) -> None:
    build, line = PICTURES[name]
    data = saved(few(build()), line, tmp_path, ".pdf").read_bytes()
    assert data.startswith(b"%PDF")
    named = set(re.findall(rb"/FontName ?/([A-Z]{6}\+\w+)", data))
    assert named
    assert len(re.findall(rb"/FontFile[23]? ", data)) == len(named)
    if name == "heatmap":
        assert all(font[7:].startswith(b"LiberationSans") for font in named)


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_png_has_300_dots_per_inch(name: str, tmp_path: Path) -> None:
    build, line = PICTURES[name]
    result = few(build())
    with Image.open(saved(result, line, tmp_path, ".png")) as picture:
        assert picture.info["dpi"] == pytest.approx((PNG_DPI, PNG_DPI), abs=0.1)
        inches = picture.width / PNG_DPI
    svg = saved(result, line, tmp_path, ".svg").read_text(encoding="utf-8")
    assert inches == pytest.approx(svg_size(svg)[0] / 96, abs=0.01)
    pdf = saved(result, line, tmp_path, ".pdf").read_bytes()
    assert pdf_size(pdf)[0] / 72 == pytest.approx(inches, abs=0.02)


@pytest.mark.parametrize(("name", "columns"), in_turn(list(PICTURES), list(COLUMN_WIDTHS)))
def test_width_of_columns_is_exact_in_every_format(name: str, columns: int, tmp_path: Path) -> None:
    build, line = PICTURES[name]
    result, line = few(build()), line.model_copy(update={"width": columns})
    inches = COLUMN_WIDTHS[columns]
    with Image.open(saved(result, line, tmp_path, ".png")) as picture:
        assert picture.width == inches * PNG_DPI
    pdf = saved(result, line, tmp_path, ".pdf").read_bytes()
    assert pdf_size(pdf)[0] == pytest.approx(72 * inches, abs=0.5)
    svg = saved(result, line, tmp_path, ".svg").read_text(encoding="utf-8")
    assert f'width="{inches}in"' in svg[: svg.index(">")]


@pytest.mark.parametrize("columns", some(COLUMN_WIDTHS, [1]))
@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda: swept(12, 12), report("heatmap", variable="layer", by="head")),
        (lambda: swept(6, 4), report("lines", variable="layer", by="head")),
        (lambda: swept(4, 3, words=True), report("bars", variable="layer", by="position")),
    ],
)
def test_labels_on_a_page_have_7_points_and_do_not_overlap(
    build: Any, line: spec.Report, columns: int, tmp_path: Path
) -> None:
    line = line.model_copy(update={"width": columns})
    svg = saved(few(build()), line, tmp_path, ".svg").read_text(encoding="utf-8")
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found is not None
    points = 11 * 72 * COLUMN_WIDTHS[columns] / float(found[1])
    assert points == pytest.approx(7.0, abs=0.1)
    assert overlaps(texts_of(svg)) == []
    assert outside(svg) == []
