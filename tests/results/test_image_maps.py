"""Maps over images: colours and positions, measured on rendered pictures."""

from __future__ import annotations

import re
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mechdsl.base.arrays import Floats
from mechdsl.show.reports.canvas import (
    CANVAS_MARGIN,
    CANVAS_WIDTH,
    PIXELS_PER_INCH,
    PNG_DPI,
    Canvas,
)
from mechdsl.show.reports.colours import NEGATIVE_COLOUR, POSITIVE_COLOUR
from mechdsl.show.reports.overlay_pages import (
    DRAWN_SIDE,
    LEGEND_WIDTH,
    MAX_COVER,
    PALE_RANGE,
    ImageMaps,
    draw_maps,
    drawn_size,
    image_figure,
    maps_html,
    pale_image,
    scale_legend,
)

SIZE = (120.0, 80.0)
"""(width, height)"""
GRAY = np.full((8, 12, 3), 90, np.uint8)


def write(value: float) -> str:
    return f"{value:.2f}"


def seen(shapes: str, width: float = SIZE[0], height: float = SIZE[1]) -> NDArray[np.uint8]:
    """Render shapes to pixels, shape [height, width, 3]."""
    import vl_convert

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f'<rect width="100%" height="100%" fill="white"/>{shapes}</svg>'
    )
    return np.asarray(Image.open(BytesIO(vl_convert.svg_to_png(svg))).convert("RGB"))


def over(colour: tuple[int, int, int], share: float, under: float = PALE_RANGE[1]) -> Floats:
    """Blend a shade with a pixel of the image."""
    return under * (1 - MAX_COVER * share) + MAX_COVER * share * np.array(colour)


def test_image_patch_has_the_colour_of_its_value() -> None:
    """By row and column, from the top left; blue above 0, red below, nothing at 0."""
    values = np.array([[1.0, -0.5, 0.0], [0.25, -1.0, 0.5]])
    found = seen(image_figure(GRAY, values, 1.0, write, SIZE))
    for row, col in np.ndindex(2, 3):
        middle = found[20 + 40 * row, 20 + 40 * col]
        value = float(values[row, col])
        expected = over(POSITIVE_COLOUR if value > 0 else NEGATIVE_COLOUR, abs(value))
        np.testing.assert_allclose(middle, expected, atol=2)


def test_values_beyond_the_limit_have_the_colour_of_the_limit() -> None:
    found = seen(image_figure(GRAY, np.array([[7.0]]), 1.0, write, SIZE))
    np.testing.assert_allclose(found[40, 60], over(POSITIVE_COLOUR, 1.0), atol=2)


def test_map_of_zeros_has_no_shading() -> None:
    found = seen(image_figure(GRAY, np.zeros((2, 3)), 0.0, write, SIZE))
    assert np.unique(found[5:-5, 5:-5]).tolist() == [PALE_RANGE[1]]


def test_image_patch_without_a_value_is_hatched() -> None:
    values = np.array([[np.nan, 0.0]])
    hatch = maps_html([ImageMaps("x", GRAY, (("m", values),))], 1.0, write)
    pattern = re.search("<pattern.*?</pattern>", hatch)
    assert pattern is not None
    found = seen(pattern[0] + image_figure(GRAY, values, 1.0, write, SIZE)).astype(int)
    inside = found[10:-10]
    assert np.ptp(inside[:, 10:50]) > 30
    assert np.ptp(inside[:, 70:110]) == 0


def test_image_is_scaled_without_interpolation() -> None:
    """Pixels of a small image are squares without blended colours."""
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0], pixels[1, 2] = (255, 0, 0), (0, 0, 255)
    found = seen(image_figure(pixels, None, 1.0, write, SIZE))
    for row, col in np.ndindex(2, 3):
        block = found[40 * row + 4 : 40 * row + 36, 40 * col + 4 : 40 * col + 36]
        assert (block == pixels[row, col]).all()


def test_background_image_has_little_contrast() -> None:
    """The contrast of the background is less than a quarter of the range of a shade."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pale = pale_image(noise)
    assert (pale.min(), pale.max()) == PALE_RANGE
    assert (pale[..., 0] == pale[..., 1]).all()
    assert (pale[..., 0] == pale[..., 2]).all()
    assert PALE_RANGE[1] - PALE_RANGE[0] < 0.25 * MAX_COVER * (255 - min(POSITIVE_COLOUR))
    brighter = noise[..., 1] > noise[..., 1].mean()
    assert pale[brighter].mean() > pale[~brighter].mean()
    assert np.unique(pale_image(GRAY)).tolist() == [PALE_RANGE[1]]


@pytest.mark.parametrize(
    ("shape", "patches", "size"),
    [
        ((64, 64), (8, 8), (DRAWN_SIDE, DRAWN_SIDE)),
        ((100, 50), (2, 2), (DRAWN_SIDE / 2, DRAWN_SIDE)),
        ((50, 100), (2, 2), (DRAWN_SIDE, DRAWN_SIDE / 2)),
        ((448, 448), (32, 32), (224, 224)),
        ((448, 448), (100, 100), (480, 480)),
    ],
)
def test_drawn_size_keeps_the_aspect_ratio(
    shape: tuple[int, int], patches: tuple[int, int], size: tuple[float, float]
) -> None:
    maps = (("a map", np.zeros(patches)),)
    assert drawn_size(ImageMaps("x", np.zeros((*shape, 3), np.uint8), maps)) == size


def test_scale_legend_spans_minimum_to_maximum() -> None:
    shapes, width = scale_legend(2.0, write, hatched=False)
    found = seen(shapes, width, 26)
    np.testing.assert_allclose(found[5, 2], over(NEGATIVE_COLOUR, 0.975, 255), atol=2)
    np.testing.assert_allclose(
        found[5, LEGEND_WIDTH - 2], over(POSITIVE_COLOUR, 0.975, 255), atol=2
    )
    assert found[5, LEGEND_WIDTH // 2].min() > 245
    assert re.findall(">([^<]+)</text>", shapes) == ["-2.00", "0", "2.00"]
    _, texts = scale_legend(2.0, write, hatched=False, ends=(-0.5, 2.0))[0].split("<text", 1)
    assert re.findall(">([^<]+)</text>", texts) == ["-0.50", "0", "2.00"]
    assert "no number here" in scale_legend(2.0, write, hatched=True)[0]


def maps(count: int) -> list[ImageMaps]:
    values = np.linspace(-1, 1, 6).reshape(2, 3)
    named = tuple((f"layer {n}", values * (n + 1) / count) for n in range(count))
    return [ImageMaps("image 1 <b>", GRAY, named)]


def test_maps_page_has_every_value() -> None:
    page = maps_html(maps(2), 1.0, write)
    ElementTree.fromstring(f"<body>{page}</body>")
    assert "image 1 &lt;b&gt;" in page
    said = re.findall(r"<title>(row \d col \d: [^<]+)</title>", page)
    assert said[:3] == ["row 1 col 1: -0.50", "row 1 col 2: -0.30", "row 1 col 3: -0.10"]
    assert len(said) == 12
    assert said[-1] == "row 2 col 3: 1.00"
    assert page.count("<figure>") == 3, "the image itself, and each map"
    assert re.findall(">(image|layer .)</figcaption>", page) == ["image", "layer 0", "layer 1"]


def test_maps_are_arranged_in_lines_within_the_canvas(tmp_path: Path) -> None:
    canvas = Canvas()
    draw_maps(canvas, maps(9), 1.0, write)
    ElementTree.fromstring(canvas.svg())
    assert canvas.right <= CANVAS_WIDTH
    moved = re.findall(r"translate\(([\d.]+),([\d.]+)\)", canvas.svg())
    places = [(float(x), float(y)) for x, y in moved]
    assert len(places) == 10 + 1, "the image, nine maps, the scale"
    tops = sorted({y for _, y in places[:-1]})
    assert [sum(y == top for _, y in places[:-1]) for top in tops] == [5, 5]
    assert min(high - low for low, high in pairwise(tops)) > 100
    canvas.save(tmp_path / "maps.png")
    height, width = np.asarray(Image.open(tmp_path / "maps.png")).shape[:2]
    scale = PNG_DPI / PIXELS_PER_INCH
    assert width == pytest.approx(round(canvas.right + CANVAS_MARGIN) * scale, abs=1)
    assert height == pytest.approx(canvas.y * scale, abs=2)
