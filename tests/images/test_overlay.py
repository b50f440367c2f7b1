"""`report overlay` on images: values, patches and images of the overlay."""

from __future__ import annotations

import re
from io import BytesIO, StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.results import Results, pack_results, unpack_results
from mechdsl.show.reports.overlay import render
from mechdsl.show.reports.overlay_pages import (
    ImageMaps,
    Overlay,
    ShadedPrompt,
    build_overlays,
    image_maps,
    write_overlay,
)

from ..results.synthetic import report
from . import support
from .support import GRID, difference, forward, pixels, plain, token

NAMES = ("vit", "deit", "siglip", "dinov2_with_registers")
LINES = (
    "from scenes into neutral",
    "for b in 0..1 { patch resid_post layers 0..b at each token of image }",
    "report overlay",
)


def write(value: float) -> str:
    return f"{value:.12g}"


def run(folder: Path, name: str, *lines: str) -> ExperimentResult:
    """Run an experiment; rows stay in sampled order."""
    found, said = support.try_file(support.experiment("e", *lines), folder, name)
    assert found is not None, said
    (result,) = found.experiments
    return result


def shown(result: ExperimentResult, **how: object) -> Overlay:
    return build_overlays(result, report("overlay", **how))[0]


def maps_of(each: ShadedPrompt) -> ImageMaps:
    """Maps of a prompt that is an image."""
    (image,) = each.images
    return image_maps(each, image, write)


def number_of(title: str) -> int:
    """Number of the image's file, from its title."""
    found = re.search(r"(\d)\.png", title)
    assert found is not None
    return int(found[1])


def hooked_effects(name: str, number: int) -> np.ndarray:
    """Effect of patching each patch of the scene into the gray image after the first block, [row,
    col]."""
    base, found = plain(name, None), np.zeros((GRID, GRID))
    for row, col in np.ndindex(GRID, GRID):
        at = [token(name, row + 1, col + 1)]
        writes = {("resid_post", 0): support.copied(plain(name, number), "resid_post", 0, at)}
        changed = forward(name, pixels(name, None), writes)
        found[row, col] = difference(changed, number) - difference(base, number)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_overlay_has_each_value_on_its_patch(tmp_path: Path, name: str) -> None:
    found = shown(run(tmp_path, name, *LINES))
    assert len(found.prompts) == 3
    numbers: list[int] = []
    for each in found.prompts:
        maps = maps_of(each)
        assert [title for title, _ in maps.maps] == ["b 0", "b 1"]
        numbers.append(number_of(maps.title))
        expected = hooked_effects(name, numbers[-1])
        np.testing.assert_allclose(maps.maps[0][1], expected, atol=1e-4)
        assert np.abs(expected).max() > 0.02
    assert sorted(numbers) == [0, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_overlay_image_equals_the_model_input(tmp_path: Path, name: str) -> None:
    """The reference is the library's processor, with the normalisation undone."""
    settings = support.PROCESSORS[name][1]
    mean, std = (np.array(settings[key])[:, None, None] for key in ("image_mean", "image_std"))
    for each in shown(run(tmp_path, name, *LINES)).prompts:
        given = pixels(name, number_of(each.images[0].title))[0].numpy() * std + mean
        levels = np.moveaxis(given * 255, 0, -1).round()
        np.testing.assert_array_equal(each.images[0].pixels, levels)


def test_overlay_lists_values_of_special_tokens_in_the_title(tmp_path: Path) -> None:
    lines = [LINES[0], "patch resid_post layer 0 at cls token, each token of image", LINES[2]]
    for each in shown(run(tmp_path, "deit", *lines)).prompts:
        maps = maps_of(each)
        number = number_of(maps.title)
        writes = {("resid_post", 0): support.copied(plain("deit", number), "resid_post", 0, [0])}
        changed = forward("deit", pixels("deit", None), writes)
        expected = difference(changed, number) - difference(plain("deit", None), number)
        ((title, _),) = maps.maps
        assert title.startswith("cls: ")
        assert float(title.removeprefix("cls: ")) == pytest.approx(expected, abs=1e-4)


def test_overlay_leaves_unpatched_patches_without_a_value(tmp_path: Path) -> None:
    lines = [LINES[0], "patch resid_post layer 0 at image row 2 col 1..3 token", LINES[2]]
    found = run(tmp_path, "vit", *lines)
    for each in shown(found).prompts:
        ((_, values),) = maps_of(each).maps
        there = np.isfinite(values)
        assert there.sum() == 3
        assert there[1, :3].all()
    text = StringIO()
    render(found, report("overlay"), Console(file=text, width=100))
    grid = [line.split() for line in text.getvalue().splitlines() if line[:1] in tuple("1234")]
    assert [len(line) for line in grid[:4]] == [1, 4, 1, 1]


JOINED = "patch resid_post layer 0 at image row 1..2 col 1 tokens, image row 4 col 4 token"


def test_overlay_repeats_the_value_of_joined_patches(tmp_path: Path) -> None:
    lines = [LINES[0], JOINED, LINES[2]]
    for each in shown(run(tmp_path, "vit", *lines)).prompts:
        ((_, values),) = maps_of(each).maps
        assert values[0, 0] == values[1, 0]
        assert np.isfinite(values).sum() == 3


def test_overlay_top_limits_the_stored_images(tmp_path: Path) -> None:
    two = run(tmp_path, "vit", *LINES[:2], "report overlay top 2")
    assert [bool(own) for own in two.seen] == [True, True, False]
    assert len(shown(two, top=3).prompts) == 2, "of others there is no image"
    assert run(tmp_path, "vit", *LINES[:2], "report table").seen == ()


def test_overlay_omits_images_of_dropped_rows(tmp_path: Path) -> None:
    line = "keep prob(answer) > 0.00005"
    every = run(tmp_path, "vit", *LINES)
    some = run(tmp_path, "vit", line, *LINES)
    assert 0 < some.prompts < every.prompts
    whole = {each.images[0].title: each for each in shown(every).prompts if each.images}
    for each in shown(some).prompts:
        assert each.rows == whole[each.images[0].title].rows


def test_overlay_has_a_map_for_each_base_run(tmp_path: Path) -> None:
    found = run(tmp_path, "vit", "from scenes into neutral, clean", *LINES[1:])
    for each in shown(found).prompts:
        maps = dict(maps_of(each).maps)
        assert len(maps) == 4
        own = next(v for title, v in maps.items() if "neutral" in title and "b 0" in title)
        expected = hooked_effects("vit", number_of(maps_of(each).title))
        np.testing.assert_allclose(own, expected, atol=1e-4)
        other = next(v for title, v in maps.items() if "clean" in title and "b 0" in title)
        assert np.abs(other).max() < 1e-5, "they are put where they come from"


def test_packed_results_keep_overlay_images(tmp_path: Path) -> None:
    text = support.experiment("e", *LINES)
    found, _ = support.try_file(text, tmp_path, "vit")
    assert found is not None
    whole = f'mech 1\nmodel m = local("handed over")\n{support.BLOCKS}\n{text}'
    again = unpack_results(pack_results(Results((found,), {"mechdsl": "0"}), whole))["e"]
    for (one,), (other,) in zip(found.experiments[0].seen, again.seen, strict=True):
        for name in ("title", "span", "tokens", "rows", "cols"):
            assert getattr(one, name) == getattr(other, name)
        np.testing.assert_array_equal(one.pixels, other.pixels)


@pytest.mark.slow
def test_overlay_is_written_as_svg_png_and_html(tmp_path: Path) -> None:
    result = run(tmp_path, "vit", *LINES)
    for ending in ("svg", "png", "html"):
        write_overlay(result, report("overlay"), tmp_path / f"map.{ending}")
    drawn = (tmp_path / "map.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(drawn)
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    for text in (drawn, page):
        assert text.count("<image ") == 3 * 3
        assert len(re.findall(r"<title>row \d col \d: [^<]+</title>", text)) == 3 * 2 * GRID**2
        assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), "it stands alone"
    picture = Image.open(BytesIO((tmp_path / "map.png").read_bytes()))
    assert picture.size[0] > 600
    chart = result.plot("overlay").to_dict()
    said = " ".join(chart["vconcat"][0]["title"]["subtitle"] if "vconcat" in chart else [])
    said = said or " ".join(chart["title"]["subtitle"])
    assert "of 3 of 3 prompts" in said
    assert "full colour at" in said
