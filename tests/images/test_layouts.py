"""Layouts of image tokens, against manually computed arrays and against models.

The arrays follow the descriptions of the processors. The models have random weights and no
attention in their vision encoder, so a changed pixel changes only the vectors that read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.images.layouts import (
    IMAGE_LAYOUTS,
    THUMBNAIL,
    ImageCell,
    ImageLayout,
    ImageTokens,
    PatchRows,
    PixelBox,
    image_layout,
    layout,
)
from mechdsl.images.processing import UnsupportedProcessor

from . import prompts_of_images as vlm

Size = tuple[int, int]


def found(name: str, *sizes: Size) -> tuple[ImageTokens, ...]:
    """Return the layout of a prompt with images of these sizes."""
    made = vlm.processor(name)
    images = [vlm.picture(*size) for size in sizes]
    inputs = vlm.prompt(made, vlm.FAMILIES[name].marker, images)
    return image_layout(made, vlm.model(name).config, inputs, sizes)


def matrix(cells: Sequence[ImageCell], what: str = "position") -> list[list[int]]:
    """Return one field of cells as rows and columns; 0 where there is none."""
    rows, cols = max(cell.row for cell in cells), max(cell.col for cell in cells)
    values = np.zeros((rows, cols), int)
    for cell in cells:
        values[cell.row - 1, cell.col - 1] = getattr(cell, what)
    return values.tolist()


# --- arrays ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """The layout of the last image of a prompt."""

    family: str
    sizes: tuple[Size, ...]
    positions: list[list[int]]
    """Positions of the tiles' cells."""
    boxes: Mapping[tuple[int, int], PixelBox | None]
    """Of some cells of the tiles, by row and column."""
    tiles: list[list[int]] | None = None
    """Numbers of the tiles of the cells; None if all are 1."""
    thumbnail: list[list[int]] | None = None
    thumbnail_box: PixelBox | None = None
    """Of the thumbnail's first cell."""
    others: tuple[int, ...] = ()
    """Tokens of the image without a cell."""

    def __str__(self) -> str:
        said = " and ".join(f"{height} x {width}" for height, width in self.sizes)
        return f"{self.family}: {said}"


TWO_BY_TWO = [[2, 3], [4, 5]]
EXPECTED = (
    # The shorter side is 8 pixels, and the middle 8 x 8 pixels are cut out. Patches have 4 x 4.
    Expected("llava", ((8, 16),), TWO_BY_TWO, {(1, 1): (4, 0, 8, 4), (2, 2): (8, 4, 12, 8)}),
    Expected("llava", ((16, 4),), TWO_BY_TWO, {(1, 1): (0, 6, 2, 8), (2, 2): (2, 8, 4, 10)}),
    Expected("llava", ((4, 4),), TWO_BY_TWO, {(1, 1): (0, 0, 2, 2), (2, 2): (2, 2, 4, 4)}),
    Expected("llava", ((8, 8), (8, 8)), [[8, 9], [10, 11]], {(1, 1): (0, 0, 4, 4)}),
    Expected("vipllava", ((8, 16),), TWO_BY_TWO, {(1, 2): (8, 0, 12, 4)}),
    Expected("video_llava", ((8, 16),), TWO_BY_TWO, {(1, 2): (8, 0, 12, 4)}),
    Expected("llava_class", ((8, 8),), [[3, 4], [5, 6]], {(1, 1): (0, 0, 4, 4)}, others=(2,)),
    # Padded to a square: the image has rows 3 to 6 of 8.
    Expected("llava_pad", ((4, 8),), TWO_BY_TWO, {(1, 1): (0, 0, 4, 2), (2, 2): (4, 2, 8, 4)}),
    # The only row is the fourth of 8.
    Expected("llava_pad", ((1, 8),), TWO_BY_TWO, {(1, 1): (0, 0, 4, 1), (2, 1): None}),
    Expected(
        "llava_next",
        ((8, 16),),
        [[6, 7, 8, 9], [11, 12, 13, 14]],
        {(1, 1): (0, 0, 4, 4), (1, 3): (8, 0, 12, 4), (2, 4): (12, 4, 16, 8)},
        tiles=[[1, 1, 2, 2], [1, 1, 2, 2]],
        thumbnail=TWO_BY_TWO,
        thumbnail_box=(0, 0, 8, 4),
        others=(10, 15),
    ),
    # 12 columns in the middle of 16, and no column of cells without the image.
    Expected(
        "llava_next",
        ((8, 12),),
        [[6, 7, 8, 9], [11, 12, 13, 14]],
        {(1, 1): (0, 0, 2, 4), (1, 2): (2, 0, 6, 4), (1, 4): (10, 0, 12, 4)},
        tiles=[[1, 1, 2, 2], [1, 1, 2, 2]],
        thumbnail=TWO_BY_TWO,
        thumbnail_box=(0, 0, 6, 4),
        others=(10, 15),
    ),
    Expected(
        "llava_next",
        ((16, 8), (16, 16)),
        [[24, 25, 26, 27], [29, 30, 31, 32], [34, 35, 36, 37], [39, 40, 41, 42]],
        {(3, 2): (4, 8, 8, 12)},
        tiles=[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]],
        thumbnail=[[20, 21], [22, 23]],
        thumbnail_box=(0, 0, 8, 8),
        others=(28, 33, 38, 43),
    ),
    # Of 6 x 6 cells, the model keeps the middle rows: the others read padding only.
    Expected(
        "llava_next_square",
        ((8, 24),),
        [[6, 7, 8, 9, 10, 11], [13, 14, 15, 16, 17, 18]],
        {(1, 1): (0, 0, 4, 4), (2, 6): (20, 4, 24, 8)},
        tiles=[[4, 4, 5, 5, 6, 6], [4, 4, 5, 5, 6, 6]],
        thumbnail=TWO_BY_TWO,
        thumbnail_box=(0, 0, 12, 4),
        others=(12, 19),
    ),
    # 36 cells are more than 4 tiles of 4: they become 4 x 4 cells of 6 x 6 pixels.
    Expected(
        "llava_onevision",
        ((24, 24),),
        [[6, 7, 8, 9], [11, 12, 13, 14], [16, 17, 18, 19], [21, 22, 23, 24]],
        {(1, 1): (0, 0, 6, 6), (2, 4): (18, 6, 24, 12)},
        tiles=[[1, 2, 2, 3], [4, 5, 5, 6], [4, 5, 5, 6], [7, 8, 8, 9]],
        thumbnail=TWO_BY_TWO,
        thumbnail_box=(0, 0, 12, 12),
        others=(10, 15, 20, 25),
    ),
    Expected(
        "llava_onevision",
        ((16, 8),),
        [[6, 7], [9, 10], [12, 13], [15, 16]],
        {(3, 2): (4, 8, 8, 12)},
        tiles=[[1, 1], [1, 1], [2, 2], [2, 2]],
        thumbnail=TWO_BY_TWO,
        thumbnail_box=(0, 0, 4, 8),
        others=(8, 11, 14, 17),
    ),
    # Several images have no tiles; each is padded to a square.
    Expected(
        "llava_onevision",
        ((16, 8), (4, 8)),
        [[9, 10], [11, 12]],
        {(1, 1): (0, 0, 4, 2), (2, 2): (4, 2, 8, 4)},
        others=(13,),
    ),
    *(
        each
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
        for each in (
            # Patches of 2 x 2 pixels, merged two by two.
            Expected(
                name,
                ((8, 16),),
                [[3, 4, 5, 6], [7, 8, 9, 10]],
                {(1, 1): (0, 0, 4, 4), (2, 3): (8, 4, 12, 8)},
                others=(2, 11),
            ),
            # 36 pixels are fewer than 64: resized to 8 x 8.
            Expected(
                name,
                ((6, 6),),
                [[3, 4], [5, 6]],
                {(2, 1): (0, 3, 3, 6)},
                others=(2, 7),
            ),
            # 512 pixels are more than 256: resized to 20 x 8.
            Expected(
                name,
                ((8, 8), (32, 16)),
                [[11, 12], [13, 14], [15, 16], [17, 18], [19, 20]],
                {(1, 1): (0, 0, 8, 6.4), (5, 2): (8, 25.6, 16, 32)},
                others=(10, 21),
            ),
        )
    ),
    *(
        each
        for name in ("idefics3", "smolvlm")
        for each in (
            # The longer side is 32 pixels: tiles of 16, with 2 x 2 merged patches of 4.
            Expected(
                name,
                ((16, 32),),
                [[4, 5, 10, 11], [6, 7, 12, 13]],
                {(1, 1): (0, 0, 8, 8), (1, 3): (16, 0, 24, 8), (2, 4): (24, 8, 32, 16)},
                tiles=[[1, 1, 2, 2], [1, 1, 2, 2]],
                thumbnail=[[17, 18], [19, 20]],
                thumbnail_box=(0, 0, 16, 8),
                others=(2, 3, 8, 9, 14, 15, 16, 21),
            ),
            # Smaller images are enlarged: each cell reads one pixel.
            Expected(
                name,
                ((4, 4),),
                [[4, 5, 10, 11], [6, 7, 12, 13], [17, 18, 23, 24], [19, 20, 25, 26]],
                {(1, 1): (0, 0, 1, 1), (4, 3): (2, 3, 3, 4)},
                tiles=[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]],
                thumbnail=[[30, 31], [32, 33]],
                thumbnail_box=(0, 0, 2, 2),
                others=(2, 3, 8, 9, 14, 15, 16, 21, 22, 27, 28, 29, 34),
            ),
        )
    ),
    Expected(
        "idefics3_whole",
        ((16, 32),),
        [[4, 5], [6, 7]],
        {(1, 2): (16, 0, 32, 8)},
        others=(2, 3, 8),
    ),
    # No token before the text: the processor inserts `<s>` after the image.
    Expected("paligemma", ((6, 10),), [[1, 2], [3, 4]], {(1, 1): (0, 0, 5, 3)}),
    # Tiles of 16 pixels, with 2 x 2 merged patches of 4.
    Expected(
        "internvl",
        ((16, 32),),
        [[3, 4, 7, 8], [5, 6, 9, 10]],
        {(1, 1): (0, 0, 8, 8), (2, 4): (24, 8, 32, 16)},
        tiles=[[1, 1, 2, 2], [1, 1, 2, 2]],
        thumbnail=[[11, 12], [13, 14]],
        thumbnail_box=(0, 0, 16, 8),
        others=(2, 15),
    ),
    Expected(
        "internvl",
        ((16, 16),),
        [[3, 4], [5, 6]],
        {(1, 2): (8, 0, 16, 8)},
        others=(2, 7),
    ),
    Expected(
        "internvl",
        ((16, 16), (48, 16)),
        [[11, 12], [13, 14], [15, 16], [17, 18], [19, 20], [21, 22]],
        {(3, 1): (0, 16, 8, 24)},
        tiles=[[1, 1], [1, 1], [2, 2], [2, 2], [3, 3], [3, 3]],
        thumbnail=[[23, 24], [25, 26]],
        thumbnail_box=(0, 0, 8, 24),
        others=(10, 27),
    ),
    # 16 pixels, and the mean of 4 x 4 patches of 2; a blank line before and after.
    Expected(
        "gemma3",
        ((8, 16),),
        [[4, 5], [6, 7]],
        {(1, 1): (0, 0, 8, 4)},
        others=(3, 8),
    ),
    Expected(
        "gemma3_pan",
        ((8, 24),),
        [[27, 28, 35, 36, 43, 44], [29, 30, 37, 38, 45, 46]],
        {(1, 1): (0, 0, 4, 4), (1, 3): (8, 0, 12, 4), (2, 6): (20, 4, 24, 8)},
        tiles=[[1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3, 3]],
        thumbnail=[[9, 10], [11, 12]],
        thumbnail_box=(0, 0, 12, 4),
        others=(
            8,
            13,
            14,
            15,
            16,
            17,
            18,
            19,
            20,
            21,
            22,
            23,
            24,
            25,
            26,
            31,
            32,
            33,
            34,
            39,
            40,
            41,
            42,
            47,
        ),
    ),
)


@pytest.mark.parametrize("expected", EXPECTED, ids=str)
def test_layout_of_processor_equals_manual_arrays(expected: Expected) -> None:
    got = found(expected.family, *expected.sizes)[-1]
    cells = [cell for cell in got.cells if cell.tile != THUMBNAIL]
    thumbnail = [cell for cell in got.cells if cell.tile == THUMBNAIL]
    ones = [[1] * len(row) for row in expected.positions]
    assert matrix(cells) == expected.positions
    assert (got.rows, got.cols) == (len(ones), len(ones[0]))
    assert matrix(cells, "tile") == (expected.tiles or ones)
    boxes = {(cell.row, cell.col): cell.box for cell in cells}
    for place, box in expected.boxes.items():
        assert boxes[place] == (None if box is None else pytest.approx(box)), place
    assert (matrix(thumbnail) if thumbnail else None) == expected.thumbnail
    if thumbnail:
        assert thumbnail[0].box == pytest.approx(expected.thumbnail_box)
    assert vlm.others(got) == expected.others


def test_layout_of_resampled_tiles_has_no_rows_and_columns() -> None:
    [got] = found("idefics2", (8, 12))
    wanted = {
        1: ((3, 4, 5), (0, 0, 6, 4)),
        2: ((7, 8, 9), (6, 0, 12, 4)),
        3: ((11, 12, 13), (0, 4, 6, 8)),
        4: ((15, 16, 17), (6, 4, 12, 8)),
        THUMBNAIL: ((19, 20, 21), (0, 0, 12, 8)),
    }
    cells = [ImageCell(at, tile, 0, 0, box) for tile, (own, box) in wanted.items() for at in own]
    assert got.cells == tuple(cells)
    assert (got.rows, got.cols) == (0, 0)
    assert vlm.others(got) == (2, 6, 10, 14, 18, 22)


@pytest.mark.parametrize(
    ("size", "row_ends"), [((2, 16), ()), ((16, 2), (6, 7, 8, 9))], ids=["wide", "tall"]
)
def test_layout_of_narrow_image_has_thumbnail_only(size: Size, row_ends: tuple[int, ...]) -> None:
    [got] = found("llava_next", size)
    assert [cell.tile for cell in got.cells] == [THUMBNAIL] * 4
    assert (got.rows, got.cols) == (0, 0)
    assert vlm.others(got) == row_ends


def test_tiles_have_first_cell_and_size() -> None:
    [got] = found("llava_next_square", (8, 24))
    told = [(each.number, each.top, each.left, each.rows, each.cols) for each in got.tiles]
    assert told == [(0, 1, 1, 2, 2), (4, 1, 1, 2, 2), (5, 1, 3, 2, 2), (6, 1, 5, 2, 2)]
    assert got.thumbnail is not None
    assert got.thumbnail.number == THUMBNAIL


# --- models ---------------------------------------------------------------------------------------

SHAPES: Mapping[str, tuple[Size, ...]] = {
    "square": ((16, 16),),
    "wide": ((16, 32),),
    "tall": ((24, 8),),
    "uneven": ((23, 37),),
    "small": ((6, 5),),
    "two images": ((8, 16), (24, 24)),
}
UNRESIZED: Mapping[str, tuple[str, ...]] = {
    "llava": ("two images",),
    "llava_next": ("square",),
    "llava_onevision": ("square",),
    "qwen2_vl": ("square",),
    "qwen2_5_vl": ("square",),
    "qwen3_vl": ("square",),
    "idefics3": ("wide",),
    "smolvlm": ("wide",),
    "internvl": ("square", "wide"),
    "gemma3": ("square",),
}
"""Shapes whose first image the processor doesn't resize, except for thumbnails."""


def changed(image: vlm.Pixels, box: PixelBox) -> tuple[vlm.Pixels, PixelBox]:
    """Return an image that differs in the middle of a box, and the part that differs."""
    left, top, right, bottom = box
    across, down = (left + right) / 2, (top + bottom) / 2
    reach = max(0.0, (right - left) / 5), max(0.0, (bottom - top) / 5)
    x, y = int(across - reach[0]), int(down - reach[1])
    x_end = max(x + 1, int(np.ceil(across + reach[0])))
    y_end = max(y + 1, int(np.ceil(down + reach[1])))
    other = image.copy()
    other[y:y_end, x:x_end] += 60
    return other, (x, y, x_end, y_end)


def well_inside(part: PixelBox, box: PixelBox | None) -> bool:
    """Return whether a box contains a part, at a distance from its borders."""
    if box is None:
        return False
    margin = 0.1 * min(box[2] - box[0], box[3] - box[1])
    low = part[0] >= box[0] + margin and part[1] >= box[1] + margin
    return low and part[2] <= box[2] - margin and part[3] <= box[3] - margin


def cases() -> Iterator[tuple[str, str]]:
    for name in vlm.FAMILIES:
        for shape in SHAPES:
            if vlm.FAMILIES[name].processor != "Idefics2Processor":
                yield name, shape


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(*case, marks=pytest.mark.slow if (number + number // len(SHAPES)) % 3 else ())
        for number, case in enumerate(cases())
    ],
)
def test_changed_pixels_change_vector_at_position_of_their_cell(name: str, shape: str) -> None:
    sizes = SHAPES[shape]
    made, marker = vlm.processor(name), vlm.FAMILIES[name].marker
    images = [vlm.picture(*size, seed=n) for n, size in enumerate(sizes)]
    inputs = vlm.prompt(made, marker, images)
    layouts = image_layout(made, vlm.model(name).config, inputs, sizes)
    before, tested = vlm.stream(name, inputs), 0
    for number, own in enumerate(layouts):
        random = np.random.default_rng(number)
        for cell in random.permutation(np.array(own.cells, object))[:6]:
            if cell.box is None or min(np.subtract(cell.box[2:], cell.box[:2])) < 1:
                continue
            other, part = changed(images[number], cell.box)
            given = [*images[:number], other, *images[number + 1 :]]
            after = vlm.stream(name, vlm.prompt(made, marker, given))
            tested += check_change(own, (after - before).norm(dim=-1), part)
            if number == 0 and shape in UNRESIZED.get(name, ()) and cell.tile != THUMBNAIL:
                tile = [each for each in own.cells if each.tile != THUMBNAIL]
                moved = {each.position for each in tile if (after - before)[each.position].any()}
                hit = {each.position for each in overlapping(own, part)} & {
                    each.position for each in tile
                }
                assert moved == hit
    assert tested or shape in ("small", "uneven")


def overlapping(own: ImageTokens, part: PixelBox) -> list[ImageCell]:
    """The cells that cover a part of a box, in pixels of the original image."""
    left, top, right, bottom = part
    return [
        cell
        for cell in own.cells
        if cell.box is not None
        and max(cell.box[0], left) < min(cell.box[2], right)
        and max(cell.box[1], top) < min(cell.box[3], bottom)
    ]


def check_change(own: ImageTokens, difference: torch.Tensor, part: PixelBox) -> int:
    """Check the positions that a changed part of an image changes.

    Returns:
        The number of views in which one cell contains the part.
    """
    positions = [cell.position for cell in own.cells]
    rest = torch.ones(len(difference), dtype=torch.bool)
    rest[positions] = False
    assert not difference[rest].any()
    found_in = 0
    for is_thumbnail in (False, True):
        cells = [cell for cell in own.cells if (cell.tile == THUMBNAIL) == is_thumbnail]
        inside = [cell for cell in cells if well_inside(part, cell.box)]
        if inside:
            most = max(cells, key=lambda cell: float(difference[cell.position]))
            assert [most] == inside
            found_in += 1
    return found_in


@pytest.mark.parametrize("shape", SHAPES)
def test_changed_pixels_change_resampled_vectors_of_their_tile(shape: str) -> None:
    sizes = SHAPES[shape]
    made, marker = vlm.processor("idefics2"), "<image>"
    images = [vlm.picture(*size, seed=n) for n, size in enumerate(sizes)]
    inputs = vlm.prompt(made, marker, images)
    own = image_layout(made, vlm.model("idefics2").config, inputs, sizes)[0]
    before = vlm.stream("idefics2", inputs)
    for tile in own.tiles:
        box = next(cell.box for cell in own.cells if cell.tile == tile.number)
        assert box is not None
        other, part = changed(images[0], box)
        after = vlm.stream("idefics2", vlm.prompt(made, marker, [other, *images[1:]]))
        moved = {int(at) for at in (after - before).norm(dim=-1).nonzero()}
        assert moved == {cell.position for cell in overlapping(own, part)}


# --- sizes ----------------------------------------------------------------------------------------


def test_settings_of_earlier_libraries_are_defaults_of_arguments() -> None:
    """transformers until 5.17 keeps a processor's settings of images in a class of arguments."""
    made, size = vlm.processor("internvl"), (16, 32)
    inputs = vlm.prompt(made, "<image>", [vlm.picture(*size)])
    config = vlm.model("internvl").config
    expected = image_layout(made, config, inputs, [size])
    older: Any = type("InternVLProcessor", (), {})()
    older.image_processor, older.tokenizer = made.image_processor, made.tokenizer
    older.image_seq_length = made.image_seq_length
    defaults = {"images_kwargs": {"crop_to_patches": True}}
    older.valid_processor_kwargs = SimpleNamespace(_defaults=defaults)
    assert image_layout(older, config, inputs, [size]) == expected
    assert len(expected[0].tiles) > 1


@pytest.mark.parametrize("name", vlm.FAMILIES)
@pytest.mark.parametrize("backend", ["Pil", "torchvision"])
def test_layout_has_number_of_tokens_of_processor_for_each_size(name: str, backend: str) -> None:
    if backend == "torchvision":
        pytest.importorskip("torchvision")
    made = vlm.processor(name, "" if backend == "torchvision" else backend)
    config = vlm.model(name).config
    random = np.random.default_rng(0)
    sides = np.exp(random.uniform(np.log(3), np.log(90), (40, 2))).astype(int)
    for height, width in sides.tolist():
        inputs = vlm.prompt(made, vlm.FAMILIES[name].marker, [vlm.picture(height, width)])
        [own] = image_layout(made, config, inputs, [(height, width)])
        boxes = [cell.box for cell in own.cells if cell.tile != THUMBNAIL and cell.box is not None]
        assert all(0 <= box[0] < box[2] <= width + 1e-9 for box in boxes)
        assert all(0 <= box[1] < box[3] <= height + 1e-9 for box in boxes)


# --- rejected processors --------------------------------------------------------------------------


def rejection(name: str, made: Any, config: Any, **inputs: Any) -> UnsupportedProcessor:
    given = inputs or vlm.prompt(made, vlm.FAMILIES[name].marker, [vlm.picture(8, 8)])
    with pytest.raises(UnsupportedProcessor) as caught:
        image_layout(made, config, given, [(8, 8)])
    return caught.value


def test_model_type_without_layout_is_rejected_by_name() -> None:
    unfit = rejection("llava", vlm.processor("llava"), SimpleNamespace(model_type="fuyu"))
    assert "for models of the type `fuyu`: types that are known are" in str(unfit)
    assert "Layouts of image tokens" in unfit.hint


@pytest.mark.parametrize("other", ["LlavaNextProcessor", "ViTImageProcessor"])
def test_processor_of_another_model_is_rejected_by_name(other: str) -> None:
    made, config = vlm.processor("llava"), vlm.model("llava").config
    if other == "LlavaNextProcessor":
        made = vlm.processor("llava_next")
    else:
        import transformers

        made.image_processor = transformers.ViTImageProcessorPil()
        other = "ViTImageProcessorPil".removesuffix("Pil")
    unfit = rejection("llava", made, config, input_ids=[55])
    assert f"aren't known for `{other}` in models of the type `llava`" in str(unfit)


def test_prompt_of_another_length_is_rejected_with_numbers() -> None:
    made, config = vlm.processor("llava"), vlm.model("llava").config
    unfit = rejection("llava", made, config, input_ids=[[1, 55, 55, 55]])
    assert str(unfit).endswith("the prompt has 3 image tokens, and its layout 4")


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("llava", {"num_additional_image_tokens": 3}, "2 additional tokens"),
        ("llava_next", {"vision_feature_select_strategy": "full"}, "the class token"),
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, "the first patch"),
        ("idefics3", {"image_seq_len": 5}, "5 tokens for a tile of 2 x 2 cells"),
    ],
)
def test_setting_without_layout_is_rejected_with_reason(
    name: str, settings: Mapping[str, Any], reason: str
) -> None:
    made = vlm.processor(name)
    inputs = vlm.prompt(made, "<image>", [vlm.picture(8, 8)])
    for key, value in settings.items():
        setattr(made, key, value)
    assert reason in str(rejection(name, made, vlm.model(name).config, **inputs))


def test_tiles_of_different_sides_are_rejected() -> None:
    made = vlm.processor("llava_next")
    inputs = vlm.prompt(made, "<image>", [vlm.picture(8, 8)])
    made.image_processor.size = {"shortest_edge": 10}
    unfit = rejection("llava_next", made, vlm.model("llava_next").config, **inputs)
    assert str(unfit) == "its tiles have different sides: 8, 10"


# --- custom layouts -------------------------------------------------------------------------------


def test_layout_from_the_plugins_page_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IMAGE_LAYOUTS, "_entries", dict(IMAGE_LAYOUTS.items()))
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text("utf-8")
    section = page.split("\n## Layouts of image tokens\n")[1]
    exec(section.split("```python\n")[1].split("```")[0], {"__name__": "page"})
    made = vlm.processor("llava")
    made.__class__ = type("MyProcessor", (type(made),), {})
    vision = SimpleNamespace(patch_size=4)
    config = SimpleNamespace(model_type="my_vlm", image_token_id=55, vision_config=vision)
    [own] = image_layout(made, config, {"input_ids": [1, 3, *[55] * 5]}, [(8, 16)])
    assert [cell.position for cell in own.cells] == [2, 3, 4, 5]
    assert own.cells[1].box == (8, 0, 12, 4)
    assert vlm.others(own) == (6,)


def test_second_layout_of_a_model_type_raises() -> None:
    with pytest.raises(ValueError, match="`llava` is registered twice"):
        layout("llava")(PatchRows)


def test_layout_without_processors_raises() -> None:
    class Nothing(ImageLayout):
        documentation = "none"

    with pytest.raises(TypeError, match="needs `processors`"):
        layout("nothing")(Nothing)
