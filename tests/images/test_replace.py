"""`replace POSITIONS with gray`: against painted pixels in the bare model's input."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ..quick import in_turn
from . import support
from .support import GRID, PATCH, forward
from .test_blocks import check, folder_of

NAMES = ("vit", "clip", "siglip", "dinov2_with_registers")


@cache
def blurred(name: str, number: int, radius: float) -> torch.Tensor:
    """The image blurred at the model's size, before normalisation."""
    own = support.processor(name)
    given = Image.fromarray(support.image(number))
    raw = own(given, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    whole = Image.fromarray(np.moveaxis(raw, 0, -1).round().clip(0, 255).astype(np.uint8))
    whole = whole.filter(ImageFilter.GaussianBlur(radius))
    done = own(whole, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    return done.double()


def painted(
    name: str, number: int, patches: list[tuple[int, int]], paint: torch.Tensor
) -> torch.Tensor:
    """Paint patches, given as (row, column) from 1."""
    found = support.pixels(name, number).clone()
    for row, col in patches:
        down = slice((row - 1) * PATCH, row * PATCH)
        across = slice((col - 1) * PATCH, col * PATCH)
        found[:, :, down, across] = paint[:, :, down, across]
    return found


EVERY = [(row, col) for row in range(1, GRID + 1) for col in range(1, GRID + 1)]
CASES = (
    ("each token of image", "gray", [[place] for place in EVERY]),
    ("each token of image", "blur(1.5)", [[place] for place in EVERY]),
    ("image row 2..3 col 1..2 tokens", "gray", [[(2, 1), (2, 2), (3, 1), (3, 2)]]),
    ("image row 2 col 1..2 token", "blur(4)", [[(2, 1)], [(2, 2)]]),
)


@pytest.mark.parametrize(("name", "mode"), in_turn(NAMES, ["planned", "plain"]))
def test_replace_with_gray_or_blur_equals_painted_pixels(
    name: str, mode: str, tmp_path: Path
) -> None:
    lines = [f"replace {at} with {fill}" for at, fill, _ in CASES]
    text = "".join(support.experiment(f"e{n}", line) for n, line in enumerate(lines))
    found = support.run_file(text, tmp_path, name, mode)
    for experiment, (_, fill, cells) in enumerate(CASES):
        data = found[f"e{experiment}"].measures[0]
        for number in range(3):
            paint = support.pixels(name, None)
            if fill != "gray":
                paint = blurred(name, number, float(fill[5:-1]))
            expected = [
                support.difference(forward(name, painted(name, number, cell, paint)), number)
                for cell in cells
            ]
            np.testing.assert_allclose(data.patched[:, number], expected, atol=1e-4)
            assert np.abs(data.patched[:, number] - data.base[..., number]).max() > 0.01
    assert "in the model's input image" in found["e0"].conventions["patches"]


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_patch_at_embed_equals_pasting_the_pixels(name: str, tmp_path: Path) -> None:
    """`patch embed` at an image patch has the effect of pasting its pixels."""
    text = support.experiment("e", "from scenes into neutral", "patch embed at each token of image")
    data = support.run_file(text, tmp_path, name)["e"].measures[0]
    for number in range(3):
        for cell, place in enumerate(EVERY):
            pasted = support.pixels(name, None).clone()
            row, col = (slice((n - 1) * PATCH, n * PATCH) for n in place)
            pasted[:, :, row, col] = support.pixels(name, number)[:, :, row, col]
            expected = support.difference(forward(name, pasted), number)
            assert data.patched[cell, number] == pytest.approx(expected, abs=1e-4)


def test_replacement_noise_depends_on_the_seed(tmp_path: Path) -> None:
    lines = "replace image row 2 col 3 token with noise(40)"
    runs = [
        support.run_file(support.experiment("e", lines), tmp_path, "vit", blocks=blocks)["e"]
        for blocks in (support.BLOCKS, support.BLOCKS, f"seed 1\n{support.BLOCKS}")
    ]
    first, again, other = (each.measures[0].patched for each in runs)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).min() > 1e-4
    assert np.abs(first - runs[0].measures[0].base).min() > 1e-4


def test_replacement_noise_differs_between_rows(tmp_path: Path) -> None:
    line = "replace each token of image with noise(40)"
    folder_of(tmp_path)
    (experiment,), problems = check(tmp_path, line)
    assert not [d for d in problems if d.severity == "error"]
    for run in experiment.rules[0].inputs.values():
        pictures = [row.image for row in run.rows if row.image is not None]
        seeds = [picture.changes[-1].seed for picture in pictures]
        assert len(set(seeds)) == len(seeds) > 1


@pytest.mark.parametrize(
    ("fill", "code", "said"),
    [
        ("blur", "E0207", "a radius in pixels"),
        ("blur(0)", "E0207", "above 0"),
        ("noise(300)", "E0207", "up to 255"),
        ("gray(3)", "E0207", "takes no number"),
        ("mean", "E0207", "applies to several images"),
        ("grey", "E0203", "grey"),
        ('"thing"', "E0108", "a text in an image"),
    ],
)
def test_invalid_replacement_fill_is_rejected(
    fill: str, code: str, said: str, tmp_path: Path
) -> None:
    text = support.experiment("e", f"replace each token of image with {fill}")
    result, problems = support.try_file(text, tmp_path, "vit")
    assert result is None
    (problem,) = (d for d in problems if d.severity == "error")
    assert problem.code == code
    assert said in f"{problem.message} {problem.label_text}"


def test_replace_at_the_class_token_is_rejected(tmp_path: Path) -> None:
    text = support.experiment("e", "replace cls token with gray")
    result, problems = support.try_file(text, tmp_path, "vit")
    assert result is None
    assert [d.code for d in problems if d.severity == "error"] == ["E0207"]
