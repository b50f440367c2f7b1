"""Regions of images in prompts that are written into a single prompt whose image has none, and of
one of two equal images, against plain hooks on the bare model, one unpadded prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rules import UnknownSpan

from ..execute.support import run_on
from ..quick import some
from .reference import at
from .support import STATS
from .test_families import (
    ALL,
    BLOCK,
    bare,
    blocks,
    difference,
    folder,
    image_layout,
    layout_of,
    loaded,
    run_text,
    vlm,
)

HALVES = (
    "  part = if n = 1 then [0, 0, 8, 24] else if n = 3 then [20, 0, 40, 17] else [0, 0, 60, 18]"
)
REGION = BLOCK.replace("  words", f"{HALVES}\n  region object of photo = part\n  words", 1)
BOXES = ((0, 0, 8, 24), (0, 0, 60, 18), (20, 0, 40, 17), (0, 0, 60, 18))
"""(left, top, right, bottom) of the region in each image."""
BLANK = """
prompts blank {
  image photo = "0.png"
  template "w1 {photo} w2 w3 w1"
  answer " w1"
  wrong " w2"
}
"""
NAMES = ("llava_class", "vipllava", "video_llava", "gemma3")
"""Families that prepare these images with the same rows and columns of tokens."""


def experiment(sides: str, rule: str) -> str:
    lines = (
        "model m",
        "prompts ask",
        *[sides] * bool(sides),
        rule,
        "measure logit(answer) - logit(wrong) as raw",
    )
    return "experiment e {\n" + "\n".join(f"  {line}" for line in (*lines, STATS)) + "\n}\n"


def covered(name: str, n: int) -> list[int]:
    """Indices of the cells of an image of which an eighth or more lies in its region."""
    left, top, right, bottom = BOXES[n]
    found: list[int] = []
    for index, cell in enumerate(layout_of(name, n, n).cells):
        assert cell.box is not None
        width = min(cell.box[2], right) - max(cell.box[0], left)
        height = min(cell.box[3], bottom) - max(cell.box[1], top)
        share = width / (cell.box[2] - cell.box[0]), height / (cell.box[3] - cell.box[1])
        assert not any(1 / 16 < each < 1 / 8 for each in share), "depends on rounding"
        if min(share) >= 1 / 8:
            found.append(index)
    return found


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, ("llava_class", "gemma3")))
def test_region_written_into_a_blank_prompt_is_at_the_positions_of_each_image(
    name: str, mode: str
) -> None:
    rule = "patch resid_post layer 0 at object tokens"
    text = BLANK + experiment("from ask into blank", rule)
    [found] = run_text(name, text, mode, REGION)
    own, picture = bare(name), Image.open(folder() / "0.png").convert("RGB")
    prompt = f"w1 {vlm.FAMILIES[name].marker} w2 w3 w1"
    given = own.with_pictures(prompt, [picture])
    [layout] = image_layout(own.processor, own.model.config, given, [(24, 24)])
    expected, different = list[float](), set[tuple[int, ...]]()
    for n in ALL:
        inside = covered(name, n)
        different.add(tuple(inside))
        read = [layout_of(name, n, n).cells[each].position for each in inside]
        written = [layout.cells[each].position for each in inside]
        edit = at(written, blocks(name, n, n)[0][read])
        expected.append(difference(own.run(given, blocks={0: edit})))
    measure = found.measures[0]
    np.testing.assert_allclose(measure.base[0], difference(own.run(given)), atol=1e-4)
    np.testing.assert_allclose(measure.patched[0], expected, atol=1e-4)
    assert np.abs(np.array(expected) - measure.base[0]).max() > 0.1
    assert len(different) > 2
    said = "its only row, with the regions of each paired row, paired with those of `ask`"
    assert found.conventions["rows of blank"] == said


def rejected(name: str, other: str, sides: str = "from ask into blank") -> Diagnostic:
    rule = "patch resid_post layer 0 at object tokens"
    source = f'mech 1\nmodel m = local("handed over")\n{REGION}\n{other}{experiment(sides, rule)}'
    result, found = run_on(Source(source, folder() / "f.mech"), {"m": loaded(name)})
    assert result is None
    [error] = [each for each in found if each.severity == "error"]
    return error


@pytest.mark.parametrize("sides", ["from ask into blank", "from blank into ask"])
def test_region_that_only_one_prompt_set_has_names_the_other(sides: str) -> None:
    """An image of another name, several rows, and two equal images."""
    named = BLANK.replace("photo", "picture")
    several = BLANK.replace("  image", "  k in [1, 2, 3, 4]\n  image", 1)
    twice = BLANK.replace("  template", '  image again = "0.png"\n  template').replace(
        "{photo}", "{photo} {again}"
    )
    for other in (named, several, twice):
        error = rejected("llava_class", other, sides)
        assert error.code == "E0308"
        assert "the prompts of `blank` have no span called `object`" in str(error.message)
        assert isinstance(error, UnknownSpan)
        assert "region object = box" in error.hint


@pytest.mark.parametrize("other", ["0.png", "1.png"])
def test_region_of_images_with_other_rows_and_columns_is_rejected(other: str) -> None:
    """The single image has those of one row, or of none."""
    error = rejected("qwen2_5_vl", BLANK.replace("0.png", other))
    assert error.code in ("E0308", "E0309", "E0310")
    assert "blank" in str(error.message)


TWINS = """
prompts ask {
  rows "data.jsonl"
  PART
  image photo = "{file}"
  image twin = "{file}"
  region object of photo = part
  template "w1 {photo} w2 {twin} w3 w1"
  answer " w1"
  wrong " w2"
}
""".replace("  PART", HALVES)


def twins(name: str, n: int, which: int) -> float:
    """The measure of a prompt with two equal images whose tokens of a region are 0 after block 0.

    which: The image with the region.
    """
    own, picture = bare(name), Image.open(folder() / f"{n}.png").convert("RGB")
    given = own.with_pictures(
        "w1 {0} w2 {0} w3 w1".format(vlm.FAMILIES[name].marker), [picture, picture]
    )
    size = picture.height, picture.width
    cells = image_layout(own.processor, own.model.config, given, [size, size])[which].cells
    edit = at([cells[each].position for each in covered(name, n)], torch.zeros(()))
    return difference(own.run(given, blocks={0: edit}))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, ("llava_class", "gemma3")))
def test_region_of_one_of_two_equal_images_is_in_this_image(
    name: str, mode: str, which: int
) -> None:
    block = TWINS if which == 0 else TWINS.replace("object of photo", "object of twin")
    rule = "ablate resid_post layer 0 at object tokens with zero"
    [found] = run_text(name, experiment("", rule), mode, block)
    expected = [twins(name, n, which) for n in ALL]
    np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=1e-4)
    others = [twins(name, n, 1 - which) for n in ALL]
    assert np.abs(np.array(expected) - others).max() > 0.1


def test_region_of_equal_images_at_a_renamed_placeholder_is_ambiguous() -> None:
    """`second` may be the image with the region or the other one."""
    block = TWINS.replace("{twin}", "{second = twin}")
    lines = experiment("", "ablate resid_post layer 0 at object tokens with zero")
    text = f'mech 1\nmodel m = local("handed over")\n{block}\n{lines}'
    result, found = run_on(Source(text, folder() / "f.mech"), {"m": loaded("llava_class")})
    assert result is None
    [error] = [each for each in found if each.severity == "error"]
    assert error.code == "E0306"
    assert error.message == (
        "`object` is ambiguous: it is a region of `photo`, and the placeholder `second` may also "
        "stand for `twin`, which is equal"
    )
