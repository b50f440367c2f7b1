"""`using` on images against plain autograd on the bare model in fp64, one image at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..quick import in_turn
from ..reference.gradients import Where, estimated, taken
from . import support
from .reference import output_of
from .support import ANSWERS, FRONT, GRID, LABELS, WRONG, double, inputs, pixels, token

NAMES = ("vit", "dinov2_with_registers", "beit", "siglip", "clip/dual", "siglip/dual")
PLACES = [(row, col) for row in range(1, GRID + 1) for col in range(1, GRID + 1)]
STEPS = 3
Cells = Mapping[Any, Sequence[tuple[int, int]]]


def where(name: str, site: str, layer: int) -> Where:
    main = support.stack(name)
    block = main.at(layer)
    root = f"{main.blocks}.{layer}"
    if site == "embed":
        assert main.embed is not None
        path, side = main.embed
        return Where(path, "out" if side == "out" else "in")
    assert block.output is not None
    return Where(f"{root}.{block.output}", "in", block.heads) if site == "z" else Where(root, "out")


def difference(name: str, number: int, given: int | None) -> Any:
    answer, wrong = LABELS.index(ANSWERS[number]), LABELS.index(WRONG[number])

    def forward(module: Any) -> Tensor:
        outputs = output_of(module(**inputs(name, pixels(name, given))))
        return outputs[answer] - outputs[wrong]

    return forward


def by_hand(
    name: str, site: str, layer: int, cells: Cells, kind: str, *, into_gray: bool = True
) -> dict[Any, list[float]]:
    at = where(name, site, layer)
    found: dict[Any, list[float]] = {}
    for number in range(3):
        base, source = (None, number) if into_gray else (number, None)
        theirs = taken(double(name), at, difference(name, number, source)).value

        def written(position: int, unit: int, theirs: Tensor = theirs) -> Tensor:
            return theirs[position, unit]

        forward = difference(name, number, base)
        values = estimated(double(name), at, forward, cells, written, kind, STEPS)
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    return found


def agrees(result: Any, expected: Mapping[Any, Sequence[float]]) -> float:
    data = result.measures[0]
    values = data.patched if data.effect == "raw" else data.patched - data.base
    assert len(values) == len(expected)
    for cell, own in zip(result.cells, values, strict=True):
        wanted = np.array(expected[tuple(cell.coords[axis] for axis in result.axes)])
        allowed = np.minimum(1e-4, np.maximum(1e-3 * np.abs(wanted), 2e-6))
        assert (np.abs(own - wanted) <= allowed).all(), (cell.coords, own, wanted)
    return max(float(np.abs(each).max()) for each in expected.values())


KINDS = ("gradient", "gradient_input", "integrated_gradients")


def line(kind: str) -> str:
    return f"using {kind}" + (f"(steps: {STEPS})" if kind == KINDS[-1] else "")


@pytest.mark.parametrize(("name", "kind"), in_turn(NAMES, KINDS, NAMES))
def test_estimates_of_image_patches_equal_autograd(name: str, kind: str, tmp_path: Path) -> None:
    measure = f"measure logit(answer) - logit(wrong) as {'raw' if kind == 'gradient' else 'delta'}"
    each = "patch embed at each token of image"
    ways = {"gray": "from scenes into neutral", "shown": "from neutral into scenes"}
    text = "".join(
        support.experiment(key, way, each, line(kind), measure=measure) for key, way in ways.items()
    )
    heads = f"patch layer 0 head * at {'cls token' if FRONT[name] else 'image row 2 col 1 token'}"
    text += support.experiment("heads", ways["gray"], heads, line(kind), measure=measure)
    found = support.run_file(text, tmp_path, name)
    cells: Cells = {
        (f"image row {row} col {col}",): [(token(name, row, col), 0)] for row, col in PLACES
    }
    for key in ways:
        expected = by_hand(name, "embed", 0, cells, kind, into_gray=key == "gray")
        assert agrees(found[key], expected) > 0.01
    at = 0 if FRONT[name] else token(name, 2, 1)
    own = {(head,): [(at, head)] for head in range(4)}
    assert agrees(found["heads"], by_hand(name, "z", 0, own, kind)) > 1e-3


@pytest.mark.parametrize("name", ["vit", pytest.param("beit", marks=pytest.mark.slow)])
def test_integrated_gradients_of_patches_sum_to_the_effect_of_the_image(
    name: str, tmp_path: Path
) -> None:
    """Completeness along the line from gray to the image."""
    each, way = "patch embed at each token of image", "from scenes into neutral"
    text = support.experiment("ig", way, each, "using integrated_gradients(steps: 100)")
    text += support.experiment("whole", way, "patch embed at image tokens")
    found = support.run_file(text, tmp_path, name)
    parts, whole = (found[key].measures[0] for key in ("ig", "whole"))
    effect = whole.patched - whole.base
    assert np.abs(effect).max() > 0.1
    np.testing.assert_allclose((parts.patched - parts.base).sum(0), effect[0], atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_saved_gradients_of_image_patches_equal_autograd(name: str, tmp_path: Path) -> None:
    """Covers `save gradient of` at every patch."""
    text = support.experiment(
        "saved",
        "save gradient of logit(answer) - logit(wrong) by embed at each token of image "
        'to "g.safetensors"',
        measure="",
    )
    result, problems = support.try_file(text.replace(support.STATS, ""), tmp_path, name)
    assert result is not None, problems
    tensors = load_file(result.saved[0].path)
    largest = 0.0
    for number in range(3):
        own = taken(double(name), where(name, "embed", 0), difference(name, number, number))
        expected = torch.stack([own.gradient[token(name, *place)].flatten() for place in PLACES])
        found = tensors["embed"][tensors["row"] == number].double()
        size = float(expected.abs().max())
        assert float((found - expected).abs().max()) <= min(1e-4, max(1e-3 * size, 2e-6))
        largest = max(largest, size)
    assert largest > 1e-3
