"""Queries, keys, scores and patterns of vision encoders of prompts with images, and observations of
patterns, against a reference that replaces the library's own attention in the bare model, one
unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ..images import prompts_of_images as vlm
from ..quick import some
from .support import check_cells, experiment
from .test_encoder_attention import (
    NAMES,
    QUICK,
    TOWERS,
    attended,
    module_of,
    patterns,
    run_in_both,
)
from .test_families import ALL, BLOCK, TWO, WORDS, bare, difference, folder, inputs, run_text
from .test_token_patches import HEADS, LAYERS, ResampledTower, other

ENTROPY = "observe entropy pattern vision layer * head * at photo row 1 col 2 token"
DISTANCE = (
    "observe distance{} pattern vision layer 1 head * at photo row 1 col 2 token, photo tokens"
)
OBSERVATIONS = ("entropy", "distance", "received")
RECEIVED = "observe received pattern vision layer 0 head * at photo row 1 col 2 token"


def grid(name: str, image: int) -> tuple[int, int]:
    """Rows and columns of the tokens of an image."""
    own = TOWERS[name]
    if own.grids:
        rows, cols = own.grids[image]
        tiles = 2 if isinstance(own, ResampledTower) else 1
        return tiles * rows, tiles * cols
    above, before = own.cut[image]
    rows, cols = own.down[image] * own.side, own.across[image] * own.side
    return rows - 2 * above, cols - 2 * before


def places(name: str, image: int) -> dict[int, tuple[int, int, int]]:
    """Patch of the encoder → its tile, and its row and column over all tiles of its kind."""
    own = TOWERS[name]
    rows, cols = grid(name, image)
    found: dict[int, tuple[int, int, int]] = {}

    resampled = isinstance(own, ResampledTower)
    size = own.front + (own.side * own.merged) ** 2
    size = rows * cols if own.grids else size
    size = size // 4 if resampled else size

    def add(patches: Sequence[int], row: int, col: int) -> None:
        for n, patch in enumerate(patches):
            down, right = divmod(n, own.merged)
            place = (row - 1) * own.merged + down, (col - 1) * own.merged + right
            found[patch] = (patch // len(patches) // size if own.grids else patch // size, *place)

    for row in range(1, rows + 1):
        for col in range(1, cols + 1):
            add(own.cell(image, row, col), row, col)
    small = own.grids[image] if resampled else (own.side * bool(own.thumbnail),) * 2
    for row in range(1, small[0] + 1):
        for col in range(1, small[1] + 1):
            add(own.small(image, row, col), row, col)
    return found


def entropy(weights: Tensor) -> Tensor:
    return -(weights * weights.clamp(min=1e-38).log()).sum(-1)


def distances(name: str, image: int, weights: Tensor, window: int) -> list[float]:
    """The mean distance of each patch of `photo tokens`, weights [query, key]."""
    every = places(name, image)
    found: list[float] = []
    for query in TOWERS[name].every(image):
        tile, row, col = every[query]
        own = {key: at for key, at in every.items() if at[0] == tile}
        seen = weights[query, list(own)]
        away = [min(window, float(np.hypot(at[1] - row, at[2] - col))) for at in own.values()]
        found.append(float((seen * torch.tensor(away)).sum() / seen.sum()))
    return found


def received(name: str, image: int, weights: Tensor, keys: Sequence[int]) -> float:
    """The mean weight of the other patches of the same tile on some patches."""
    every = places(name, image)
    tile = every[keys[0]][0]
    others = [patch for patch, at in every.items() if at[0] == tile and patch not in keys]
    return float(weights[others][:, list(keys)].sum(1).mean())


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_observations_of_patterns_equal_weights_of_the_bare_encoder(name: str, mode: str) -> None:
    """Each is computed for each patch, also with weights on class tokens, and then averaged."""
    lines = (ENTROPY, DISTANCE.format(""), DISTANCE.format("(1)"), RECEIVED)
    text = "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(lines))
    spread, far, near, paid = run_text(name, text, mode)
    own = TOWERS[name]
    weights = {(layer, n): patterns(name, layer, n, n) for layer in range(LAYERS) for n in ALL}
    for number, cell in enumerate(spread.cells):
        layer, head = int(cell.coords["layer"]), int(cell.coords["head"])
        expected = [float(entropy(weights[layer, n][head][own.cell(n, 1, 2)]).mean()) for n in ALL]
        np.testing.assert_allclose(spread.measures[0].patched[number], expected, atol=1e-4)
    for found, window in ((far, 1000), (near, 1)):
        for number, cell in enumerate(found.cells):
            expected = []
            for n in ALL:
                each = distances(name, n, weights[1, n][int(cell.coords["head"])], window)
                every = own.every(n)
                if cell.coords["position"] != "photo tokens":
                    each = [each[every.index(patch)] for patch in own.cell(n, 1, 2)]
                expected.append(float(np.mean(each)))
            np.testing.assert_allclose(found.measures[0].patched[number], expected, atol=1e-4)
    assert np.abs(far.measures[0].patched - near.measures[0].patched).max() > 0.01
    for number, cell in enumerate(paid.cells):
        expected = [
            received(name, n, weights[0, n][int(cell.coords["head"])], own.cell(n, 1, 2))
            for n in ALL
        ]
        np.testing.assert_allclose(paid.measures[0].patched[number], expected, atol=1e-5)


HIDDEN = BLOCK.replace("corrupt changed { file = other }", "corrupt hidden { mask photo }")
Inside = Callable[[int, Tensor], Tensor]


def gray(name: str, number: int) -> dict[str, Tensor]:
    """The inputs of a prompt whose image is gray."""
    size = Image.open(folder() / f"{number}.png").size
    picture = Image.new("RGB", size, (128, 128, 128))
    marker, end = vlm.FAMILIES[name].marker, vlm.FAMILIES[name].before_end
    return bare(name).with_pictures(f"w3 w2 {marker} w1 {WORDS[number]} w3{end}", [picture])


def attended_at(module: Any, site: str, edit: Inside) -> AbstractContextManager[None]:
    if site == "pattern":
        return attended(module, edit)
    return attended(module, before={site: edit})


def record(name: str, site: str, layer: int, given: dict[str, Tensor]) -> dict[int, Tensor]:
    """Number of a tile's first token → values of a site [head, token, …] in a clean run."""
    found: dict[int, Tensor] = {}

    def keep(first: int, value: Tensor) -> Tensor:
        found[first] = value.clone()
        return value

    with attended_at(module_of(name, layer), site, keep):
        bare(name).run(given)
    return found


def at_patches(
    patches: Sequence[int], head: int, change: Callable[[int, Tensor], Tensor]
) -> Inside:
    """Change the vectors of some patches, [patch, width], given the patches in their tile."""

    def edit(first: int, value: Tensor) -> Tensor:
        size = value.shape[1]
        for patch in patches:
            if first <= patch < first + size:
                value[head, patch - first] = change(patch, value[head, patch - first])
        return value

    return edit


def copied(name: str, site: str, n: int, patches: Sequence[int], head: int) -> Inside:
    """Write the vectors of the gray image."""
    source = record(name, site, 0, gray(name, n))

    def change(patch: int, value: Tensor) -> Tensor:
        first = max(each for each in source if each <= patch)
        return source[first][head, patch - first]

    return at_patches(patches, head, change)


SITES = ("q_rot", "k_rot", "scores", "pattern")


def test_tower_without_rotation_has_equal_rotated_and_plain_queries() -> None:
    text = "".join(
        experiment(site, f"observe norm {site} vision layer 0 head * at photo tokens", measure="")
        for site in ("q", "q_rot", "k", "k_rot")
    )
    q, q_rot, k, k_rot = (each.measures[0].patched for each in run_text("llava_class", text))
    np.testing.assert_array_equal(q, q_rot)
    np.testing.assert_array_equal(k, k_rot)
    assert np.abs(q - k).max() > 0.1


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_rules_within_attention_equal_changed_attention_of_the_bare_encoder(
    name: str, mode: str
) -> None:
    """Vectors of a gray image of the same size, and scores multiplied by a number."""
    own = TOWERS[name]
    where = "at photo row 1 col 2 token"
    lines = [f"patch {site} vision layer 0 head * {where}" for site in SITES]
    lines += [f"scale scores vision layer 0 head * {where} by -1"]
    lines += ["ablate pattern vision layer 0 head * at photo tokens with zero"]
    text = "".join(
        experiment(f"e{n}", "from hidden into clean", line) for n, line in enumerate(lines)
    )
    base = [difference(bare(name).run(inputs(name, n, n))) for n in ALL]
    module = module_of(name, 0)

    def under(site: str, edit: Callable[[int], Inside]) -> list[float]:
        found: list[float] = []
        for n in ALL:
            change = edit(n)
            with attended_at(module, site, change):
                found.append(difference(bare(name).run(inputs(name, n, n))))
        return found

    edits: list[Callable[[int, int], tuple[str, Inside]]] = [
        lambda n, h, site=site: (site, copied(name, site, n, own.cell(n, 1, 2), h))
        for site in SITES
    ]
    edits += [
        lambda n, h: ("scores", at_patches(own.cell(n, 1, 2), h, lambda _, value: -value)),
        lambda n, h: ("pattern", at_patches(own.every(n), h, lambda _, value: 0 * value)),
    ]
    largest: list[float] = []
    for found, line, edit in zip(run_text(name, text, mode, HIDDEN), lines, edits, strict=True):
        site = edit(0, 0)[0]
        expected = {
            (h,): under(site, lambda n, h=h, edit=edit: edit(n, h)[1]) for h in range(HEADS)
        }
        largest.append(check_cells(found, ["head"], expected, base, line))
    assert max(largest) > 0.1
    assert min(largest) > 0.005, largest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_patterns_of_several_images_in_a_prompt_equal_those_of_each(name: str) -> None:
    """Images of several sizes have vectors of several widths."""
    where = "at two row 1 col 2 token"
    lines = [f"observe {word} pattern vision layer 0 head 1 {where}" for word in OBSERVATIONS]
    text = "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(lines))
    found = run_in_both(name, TWO, text.replace("prompts ask", "prompts both"))
    own, expected = TOWERS[name], np.zeros((len(OBSERVATIONS), len(ALL)))
    for n in ALL:
        image = other(n)
        weights = patterns(name, 0, n, image)[1]
        cell = own.cell(image, 1, 2)
        away = distances(name, image, weights, 1000)
        of_cell = [away[own.every(image).index(patch)] for patch in cell]
        expected[:, n] = (
            float(entropy(weights[cell]).mean()),
            np.mean(of_cell),
            received(name, image, weights, cell),
        )
    for each, values in zip(found, expected, strict=True):
        np.testing.assert_allclose(each.measures[0].patched[0], values, atol=1e-4)
