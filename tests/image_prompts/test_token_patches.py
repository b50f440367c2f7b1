"""Rules in vision encoders that read tiles, or several patches for each image token, against plain
hooks on the bare model's encoder: one unpadded prompt at a time. `Tower` lists the patches of each
token for each family."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mechdsl
from mechdsl.base.text import Source
from mechdsl.execute.run.panel import execute
from mechdsl.images.layouts import IMAGE_LAYOUTS
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.results.assembly.collection import check_denominators

from ..execute.support import check_file, run_on
from ..images import prompts_of_images as vlm
from ..quick import some
from . import test_video_processors as videos
from .reference import Edit, at, edited_module, one_head, record_value
from .support import check_cells, experiment
from .test_families import (
    ALL,
    BLOCK,
    TWO,
    WORDS,
    bare,
    both,
    difference,
    folder,
    inputs,
    loaded,
    run_text,
    under_edits,
)

Key = tuple[str | int, ...]
LAYERS, HEADS, WIDTH = 2, 2, 16


@dataclass(frozen=True)
class Tower:
    """An encoder: its modules, and the patches of the tokens of images 0 to 3."""

    blocks: str = "model.vision_tower.encoder.layers"
    z: str = "self_attn.out_proj"
    """The module of a block whose input is `z` of all heads."""
    attention: str = "self_attn"
    mlp: str = "mlp"
    side: int = 2
    """Rows of tokens of a tile."""
    merged: int = 1
    """Rows of patches of a token."""
    front: int = 0
    """Class tokens of a tile."""
    across: Sequence[int] = (1, 1, 1, 1)
    """Tiles next to each other, by image."""
    down: Sequence[int] = (1, 1, 1, 1)
    thumbnail: str = ""
    """Whether the thumbnail is the `first` or `last` tile; empty without one."""
    cut: Sequence[tuple[int, int]] = ((0, 0),) * 4
    """Rows and columns of padding at the top and left, which the model removes on both sides."""
    grids: Sequence[tuple[int, int]] = ()
    """Rows and columns of tokens of each image, in an encoder without tiles."""
    window: int = 0
    """Rows of tokens of a window, whose patches come one after the other."""

    def group(self, tile: int, row: int, col: int) -> list[int]:
        wide = self.side * self.merged
        first = tile * (self.front + wide**2) + self.front
        return [
            first + (row * self.merged + down) * wide + col * self.merged + along
            for down in range(self.merged)
            for along in range(self.merged)
        ]

    def cell(self, image: int, row: int, col: int) -> list[int]:
        """The patches of `photo row … col … token`, which counts from 1."""
        if self.grids:
            return self._packed(image, row - 1, col - 1)
        above, before = self.cut[image]
        (down, row), (along, col) = (
            divmod(row - 1 + above, self.side),
            divmod(col - 1 + before, self.side),
        )
        number = down * self.across[image] + along
        return self.group(number + (self.thumbnail == "first"), row, col)

    def _packed(self, image: int, row: int, col: int) -> list[int]:
        rows, cols = self.grids[image]
        order = [(y, x) for y in range(rows) for x in range(cols)]
        if step := self.window:
            order = [
                (y, x)
                for top in range(0, rows, step)
                for left in range(0, cols, step)
                for y in range(top, min(top + step, rows))
                for x in range(left, min(left + step, cols))
            ]
        first = 4 * order.index((row, col))
        return [*range(first, first + 4)]

    def small(self, image: int, row: int, col: int) -> list[int]:
        """The patches of `photo thumbnail row … col … token`."""
        count = self.across[image] * self.down[image]
        return self.group(0 if self.thumbnail == "first" else count, row - 1, col - 1)

    def every(self, image: int) -> list[int]:
        """The patches of `photo tokens`."""
        if self.grids:
            rows, cols = self.grids[image]
            return [*range(4 * rows * cols)]
        above, before = self.cut[image]
        found = [
            patch
            for row in range(1, self.down[image] * self.side - 2 * above + 1)
            for col in range(1, self.across[image] * self.side - 2 * before + 1)
            for patch in self.cell(image, row, col)
        ]
        if self.thumbnail:
            both_sides = range(1, self.side + 1)
            found += [p for r in both_sides for c in both_sides for p in self.small(image, r, c)]
        return found


class ResampledTower(Tower):
    """The encoder of Idefics2, whose tiles have `grids` rows and columns of patches, by image."""

    def cell(self, image: int, row: int, col: int) -> list[int]:
        rows, cols = self.grids[image]
        (down, row), (along, col) = divmod(row - 1, rows), divmod(col - 1, cols)
        return [((2 * down + along) * rows + row) * cols + col]

    def small(self, image: int, row: int, col: int) -> list[int]:
        rows, cols = self.grids[image]
        return [(4 * rows + row - 1) * cols + col - 1]

    def every(self, image: int) -> list[int]:
        rows, cols = self.grids[image]
        return [*range(5 * rows * cols)]


RESAMPLED = ResampledTower(
    "model.vision_model.encoder.layers", grids=((2, 2), (2, 1), (1, 2), (2, 1))
)
INTERN = Tower(
    "model.vision_tower.encoder.layer",
    "attention.projection_layer",
    "attention",
    merged=2,
    front=1,
    across=(2, 2, 2, 1),
    down=(2, 2, 1, 2),
    thumbnail="last",
)
IDEFICS = Tower(
    "model.vision_model.encoder.layers",
    merged=2,
    across=(2, 2, 2, 2),
    down=(2, 2, 1, 2),
    thumbnail="last",
)
QWEN = Tower(
    "model.visual.blocks",
    "attn.proj",
    "attn",
    merged=2,
    grids=((4, 4), (4, 3), (2, 6), (5, 2)),
)
TOWERS = {
    "llava_next": Tower(
        front=1,
        across=(2, 2, 2, 2),
        down=(2, 2, 1, 2),
        thumbnail="first",
        cut=((0, 0), (0, 0), (0, 0), (0, 1)),
    ),
    "llava_next_square": Tower(
        front=1,
        across=(3, 3, 3, 3),
        down=(3, 3, 3, 3),
        thumbnail="first",
        cut=((0, 0), (0, 0), (2, 0), (0, 1)),
    ),
    "llava_onevision_frames": Tower(
        side=4, thumbnail="first", cut=((0, 0), (0, 0), (1, 0), (0, 1))
    ),
    "video_llava": Tower("model.image_tower.encoder.layers", front=1),
    "gemma3": Tower(merged=4),
    "internvl": INTERN,
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "qwen2_vl": QWEN,
    "qwen2_5_vl": Tower(QWEN.blocks, QWEN.z, "attn", merged=2, grids=QWEN.grids, window=2),
    "qwen3_vl": QWEN,
    "idefics2_wide": RESAMPLED,
}
NAMES = tuple(name for name in TOWERS if name != "idefics2_wide")
"""Families with patches of tokens: `test_resampled_patches.py` has those of the other one."""
QUICK = ("llava_next", "qwen2_5_vl")
TILED = tuple(name for name, own in TOWERS.items() if own.thumbnail)


@contextmanager
def edited(name: str, site: str, layer: int, edit: Edit) -> Generator[None]:
    """Change a site, [token of the encoder, width], over all tiles; `z` has all heads in a row."""
    own = TOWERS[name]
    part, is_input = {
        "resid_pre": ("", True),
        "resid_post": ("", False),
        "z": (own.z, True),
        "attn_out": (own.attention, False),
        "mlp_out": (own.mlp, False),
    }[site]
    module = bare(name).model.get_submodule(f"{own.blocks}.{layer}.{part}".rstrip("."))
    with edited_module(module, lambda value: edit(value.flatten(0, -2)), is_input=is_input):
        yield


def read(name: str, site: str, layer: int, run: Callable[[], object]) -> Tensor:
    """The values of a site in the encoder during a run."""
    return record_value(partial(edited, name, site, layer), run)


@cache
def state(name: str, site: str, layer: int, number: int, image: int) -> Tensor:
    """The values of a site in the encoder, in the clean run of a prompt."""
    return read(name, site, layer, partial(bare(name).run, inputs(name, number, image)))


def other(n: int) -> int:
    return (n + 1) % 4


def under(name: str, site: str, layer: int, edit: Callable[[int], Edit]) -> list[float]:
    """The difference of each prompt with its other image, under an edit of its number."""
    return under_edits(name, partial(edited, name, site, layer), edit)


def one_token(name: str) -> dict[Key, list[float]]:
    def edit(n: int, layer: int) -> Edit:
        clean = state(name, "resid_post", layer, n, n)[TOWERS[name].cell(n, 1, 2)]
        return at(TOWERS[name].cell(other(n), 1, 2), clean)

    return {
        (layer,): under(name, "resid_post", layer, lambda n, layer=layer: edit(n, layer))
        for layer in range(LAYERS)
    }


def all_tokens(name: str) -> dict[Key, list[float]]:
    def edit(n: int) -> Edit:
        return at(TOWERS[name].every(other(n)), torch.zeros(()))

    return {
        (h,): under(name, "z", 0, lambda n, h=h: one_head(edit(n), h, WIDTH // HEADS))
        for h in range(HEADS)
    }


def rows_of(name: str) -> dict[Key, list[float]]:
    """Each of the first two tokens of the first row."""
    return {
        (f"photo row 1 col {col} token",): under(
            name,
            "mlp_out",
            0,
            lambda n, col=col: at(
                TOWERS[name].cell(other(n), 1, col),
                state(name, "mlp_out", 0, n, n)[TOWERS[name].cell(n, 1, col)],
            ),
        )
        for col in (1, 2)
    }


def scaled(name: str) -> dict[Key, list[float]]:
    def edit(n: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            value[TOWERS[name].cell(other(n), 2, 1)] *= -2
            return value

        return change

    return {(): under(name, "resid_pre", 1, edit)}


def swapped(name: str) -> dict[Key, list[float]]:
    def edit(n: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            first = TOWERS[name].cell(other(n), 1, 1)
            second = TOWERS[name].cell(other(n), 2, 2)
            value[first + second] = value[second + first]
            return value

        return change

    return {(layer,): under(name, "resid_pre", layer, edit) for layer in range(LAYERS)}


def means(name: str) -> dict[Key, list[float]]:
    """The mean of each of a token's patches over the prompts."""
    own = [state(name, "resid_post", 0, n, n)[TOWERS[name].cell(n, 1, 2)] for n in ALL]
    mean = torch.stack(own).mean(0)
    return {(): under(name, "resid_post", 0, lambda n: at(TOWERS[name].cell(other(n), 1, 2), mean))}


def direction_of(name: str) -> Tensor:
    """The mean over the patches of a token and the prompts."""
    own = [state(name, "resid_post", 0, n, n)[TOWERS[name].cell(n, 1, 1)] for n in ALL]
    return torch.cat(own).mean(0)


def projected(name: str) -> dict[Key, list[float]]:
    along = direction_of(name) / direction_of(name).norm()

    def edit(n: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            patches = TOWERS[name].cell(other(n), 1, 2)
            value[patches] -= torch.outer(value[patches] @ along, along)
            return value

        return change

    return {(): under(name, "resid_post", 0, edit)}


def clamped(name: str) -> dict[Key, list[float]]:
    along = direction_of(name) / direction_of(name).norm()

    def edit(n: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            patches = TOWERS[name].cell(other(n), 1, 2)
            value[patches] += torch.outer(4 - value[patches] @ along, along)
            return value

        return change

    return {(): under(name, "resid_post", 0, edit)}


def of_dims(name: str) -> dict[Key, list[float]]:
    """Four components of each patch, together."""

    def edit(n: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            here, source = TOWERS[name].cell(other(n), 1, 2), TOWERS[name].cell(n, 1, 2)
            value[here, 1:5] = state(name, "resid_post", 0, n, n)[source, 1:5]
            return value

        return change

    return {(): under(name, "resid_post", 0, edit)}


def of_each_dim(name: str) -> dict[Key, list[float]]:
    def edit(n: int, dim: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            value[TOWERS[name].every(other(n)), dim] *= -6
            return value

        return change

    return {(dim,): under(name, "mlp_out", 0, lambda n, dim=dim: edit(n, dim)) for dim in (2, 3)}


@cache
def components_of(name: str, *, each_token: bool) -> tuple[Tensor, Tensor]:
    """[2, width] principal components of the mean over the patches of a token, or of each token of
    an image, and [width] their mean."""
    own = TOWERS[name]
    rows: list[Tensor] = []
    for n in ALL:
        patches = own.every(n) if each_token else own.cell(n, 1, 1)
        vectors = state(name, "resid_post", 0, n, n)[patches].double()
        rows.append(vectors.unflatten(0, (-1, own.merged**2)).mean(1))
    vectors = torch.cat(rows)
    mean = vectors.mean(0)
    return torch.linalg.svd(vectors - mean).Vh[:2].float(), mean.float()


def in_a_basis(name: str) -> dict[Key, list[float]]:
    axes, _ = components_of(name, each_token=False)

    def edit(n: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            here, source = TOWERS[name].cell(other(n), 1, 2), TOWERS[name].cell(n, 1, 2)
            clean = state(name, "resid_post", 0, n, n)[source]
            value[here] += (clean - value[here]) @ axes.T @ axes
            return value

        return change

    return {(): under(name, "resid_post", 0, edit)}


def with_mean_coordinates(name: str) -> dict[Key, list[float]]:
    """Each patch gets the mean coordinates of its number among a token's patches."""
    axes, _ = components_of(name, each_token=False)
    own = [state(name, "resid_post", 0, n, n)[TOWERS[name].cell(n, 2, 1)] for n in ALL]
    mean = torch.stack(own).mean(0)

    def edit(n: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            here = TOWERS[name].cell(other(n), 2, 1)
            value[here] += (mean - value[here]) @ axes.T @ axes
            return value

        return change

    return {(): under(name, "resid_post", 0, edit)}


def of_dims_of_a_head(name: str) -> dict[Key, list[float]]:
    """Components of the second head only."""

    def edit(n: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            here, begin = TOWERS[name].every(other(n)), WIDTH // HEADS
            value[here, begin + 1 : begin + 4] *= -20
            return value

        return change

    return {(): under(name, "z", 0, edit)}


def without_a_feature(name: str) -> dict[Key, list[float]]:
    axes, mean = components_of(name, each_token=True)

    def edit(n: int, feature: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            here, axis = TOWERS[name].every(other(n)), axes[feature]
            value[here] -= torch.outer((value[here] - mean) @ axis, axis)
            return value

        return change

    return {(n,): under(name, "resid_post", 0, partial(edit, feature=n)) for n in (0, 1)}


def put(name: str) -> dict[Key, list[float]]:
    vector = 2 * direction_of(name)
    return {
        (): under(name, "resid_post", 0, lambda n: at(TOWERS[name].cell(other(n), 2, 2), vector))
    }


def held(name: str) -> dict[Key, list[float]]:
    """A patch in layer 0, with the MLP's output of layer 1 as it was."""
    found: list[float] = []
    for n in ALL:
        own = TOWERS[name].every(other(n))
        fixed = at(own, state(name, "mlp_out", 1, n, other(n))[own])
        clean = state(name, "resid_post", 0, n, n)[TOWERS[name].cell(n, 1, 2)]
        patch = at(TOWERS[name].cell(other(n), 1, 2), clean)
        with edited(name, "resid_post", 0, patch), edited(name, "mlp_out", 1, fixed):
            found.append(difference(bare(name).run(inputs(name, n, other(n)))))
    return {(): found}


def added(name: str) -> dict[Key, list[float]]:
    direction = direction_of(name)

    def edit(n: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            value[TOWERS[name].cell(other(n), 1, 1)] += 3 * direction
            return value

        return change

    return {(): under(name, "resid_post", 0, edit)}


def thumbnails(name: str) -> dict[Key, list[float]]:
    def edit(n: int) -> Edit:
        clean = state(name, "resid_post", 0, n, n)[TOWERS[name].small(n, 2, 1)]
        return at(TOWERS[name].small(other(n), 2, 1), clean)

    return {(): under(name, "resid_post", 0, edit)}


DIRECTION = "direction d = mean(ask) at resid_post vision layer 0 at photo row 1 col 1 token\n"
BASES = """
basis b = pca(ask, dims: 2) at resid_post vision layer 0 at photo row 1 col 1 token
basis c = pca(ask, dims: 2, each_token: true) at resid_post vision layer 0 at photo tokens
"""
THUMBNAIL = "patch resid_post vision layer 0 at photo thumbnail row 2 col 1 token"
CASES: dict[str, tuple[list[str], Callable[[str], dict[Key, list[float]]]]] = {
    "patch resid_post vision layer * at photo row 1 col 2 token": (["layer"], one_token),
    "ablate z vision layer 0 head * at photo tokens with zero": (["head"], all_tokens),
    "patch mlp_out vision layer 0 at photo row 1 col 1 token, photo row 1 col 2 token": (
        ["position"],
        rows_of,
    ),
    "scale resid_pre vision layer 1 at photo row 2 col 1 token by -2": ([], scaled),
    "swap resid_pre vision layer * at photo row 1 col 1 token with photo row 2 col 2 token": (
        ["layer"],
        swapped,
    ),
    "ablate resid_post vision layer 0 at photo row 1 col 2 token with mean of clean": ([], means),
    "add 3 * d to resid_post vision layer 0 at photo row 1 col 1 token": ([], added),
    "project out d from resid_post vision layer 0 at photo row 1 col 2 token": ([], projected),
    "set resid_post vision layer 0 at photo row 2 col 2 token to 2 * d": ([], put),
    "clamp d of resid_post vision layer 0 at photo row 1 col 2 token to 4": ([], clamped),
    "patch resid_post vision layer 0 dims 1..4 at photo row 1 col 2 token": ([], of_dims),
    "scale mlp_out vision layer 0 dim 2..3 at photo tokens by -6": (["dim"], of_each_dim),
    "patch resid_post vision layer 0 in basis b at photo row 1 col 2 token": ([], in_a_basis),
    "ablate resid_post vision layer 0 in basis b at photo row 2 col 1 token with mean of clean": (
        [],
        with_mean_coordinates,
    ),
    "scale z vision layer 0 head 1 dims 1..3 at photo tokens by -20": ([], of_dims_of_a_head),
    "ablate feature * of c at photo tokens with zero": (["feature"], without_a_feature),
    "patch resid_post vision layer 0 at photo row 1 col 2 token\n"
    "  freeze mlp_out vision layer 1 at photo tokens": ([], held),
    THUMBNAIL: ([], thumbnails),
}


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_rules_equal_hooks_on_the_patches_of_tokens(name: str, mode: str) -> None:
    """All rules in one file, the largest effects over 0.1."""
    cases = {rule: case for rule, case in CASES.items() if rule != THUMBNAIL or name in TILED}
    text = f"{DIRECTION}{BASES}" + "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(cases)
    )
    base = [difference(bare(name).run(inputs(name, n, other(n)))) for n in ALL]
    largest: list[float] = []
    for found, (rule, (axes, expected)) in zip(
        run_text(name, text, mode), cases.items(), strict=True
    ):
        largest.append(check_cells(found, axes, expected(name), base, rule))
    assert max(largest) > 0.1
    assert min(largest) > 0.03


@contextmanager
def edited_embedding(name: str, edit: Edit) -> Generator[None]:
    """Change the output of the patch projection, before position embeddings; [token of the encoder,
    width] with zeros for class tokens."""
    own = TOWERS[name]
    tower = own.blocks.rpartition(".")[0].removesuffix(".encoder")
    [projection] = (
        module
        for path, module in bare(name).model.get_submodule(tower).named_modules()
        if path.startswith(("embeddings.patch_embedding", "patch_embed."))
        and isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d)
    )

    def change(module: torch.nn.Module, args: object, value: Tensor) -> Tensor:
        patches = value.flatten(2).transpose(1, 2) if value.dim() == 4 else value.flatten(1)[None]
        full = torch.nn.functional.pad(patches, (0, 0, own.front, 0))
        new = edit(full.flatten(0, 1).clone()).view(full.shape)[:, own.front :]
        return (new.transpose(1, 2) if value.dim() == 4 else new).reshape(value.shape)

    handle = projection.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_rules_at_the_embedding_of_patches_equal_hooks(name: str, mode: str) -> None:
    """`embed vision` is the output of the patch projection, without position embeddings."""
    own, found = TOWERS[name], list[Tensor]()
    rules = (
        "ablate embed vision at photo row 1 col 2 token with zero",
        "patch embed vision at photo row 2 col 1 token",
    )
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(rules)
    )

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    def patch(n: int) -> Edit:
        with edited_embedding(name, keep):
            bare(name).run(inputs(name, n, n))
        return at(own.cell(other(n), 2, 1), found[-1][own.cell(n, 2, 1)])

    edits = (lambda n: at(own.cell(other(n), 1, 2), torch.zeros(())), patch)
    for result, edit in zip(run_text(name, text, mode), edits, strict=True):
        measure = result.measures[0]
        values = under_edits(name, partial(edited_embedding, name), edit)
        np.testing.assert_allclose(measure.patched[0], values, atol=1e-4)
        assert np.abs(np.array(values) - measure.base[0]).max() > 0.05


# --- in combination -------------------------------------------------------------------------------


def shifted(name: str, number: int, image: int) -> int:
    """The number of an encoder's tokens before the second image of a prompt."""
    own = TOWERS[name]
    if own.grids:
        rows, cols = own.grids[image]
        return 4 * rows * cols
    tiles = own.across[image] * own.down[image] + bool(own.thumbnail)
    return tiles * (own.front + (own.side * own.merged) ** 2)


def turned(patches: Sequence[int]) -> Edit:
    def edit(value: Tensor) -> Tensor:
        value[list(patches)] *= -2
        return value

    return edit


@pytest.mark.slow
@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize(
    "name", some(["llava_next", "gemma3", "internvl", "qwen2_5_vl", "qwen3_vl"], ["qwen3_vl"])
)
def test_replies_with_a_rule_in_one_of_two_images_equal_hooks(name: str, mode: str) -> None:
    """Also a second experiment of the file, with a run whose rules are in the first image."""
    own = TOWERS[name]
    rules = [f"scale resid_post vision layer 0 at {p} tokens by -2" for p in ("one", "two")]
    text = (
        f"experiment r {{\nmodel m\nprompts both\ngenerate 4\n{rules[1]}\n"
        'measure matches("w") as raw\nstats bootstrap(100) confidence 95% correct none\n}\n'
        f"experiment s {{\nmodel m\nprompts both\nrun turned {{ {rules[0]} }}\n"
        "from turned into clean\npatch resid_post layer 1 at last token\n"
        "measure logit(answer) - logit(wrong) as delta\n"
        "stats bootstrap(100) confidence 95% correct none\n}\n"
    )
    block = TWO.replace("corrupt changed { swap one, two }\n", "")
    block = block.replace('" w1 w2"', '" w1"').replace('" w2 w2"', '" w2"')
    replies, second = run_text(name, text, mode, block)
    assert replies.replies is not None
    differ, effects = 0, []
    for n in ALL:
        given, model = both(name, n), bare(name)
        first = turned(own.every(n))
        later = turned([shifted(name, n, n) + patch for patch in own.every(other(n))])
        plain = model.reply(given, 4)
        with edited(name, "resid_post", 0, later):
            expected = model.reply(given, 4)
        assert list(replies.replies.runs["clean"][n][0].ids) == plain
        assert list(replies.replies.cells[0][n][0].ids) == expected
        differ += plain != expected
        with edited(name, "resid_post", 0, first):
            vector = model.states(given)["blocks"][1][-1]
        value = difference(model.run(given, blocks={1: at([-1], vector)}))
        np.testing.assert_allclose(second.measures[0].patched[0, n], value, atol=1e-4)
        effects.append(value - second.measures[0].base[0, n])
    assert differ
    assert np.abs(effects).max() > 0.1


@pytest.mark.parametrize("name", some(["gemma3", "qwen2_5_vl", "internvl"], ["qwen2_5_vl"]))
def test_observed_norm_is_the_mean_over_the_patches_of_a_token(name: str) -> None:
    line = "observe norm resid_post vision layer * at photo row 1 col 2 token"
    [found] = run_text(name, experiment("e", line, measure=""))
    for layer in range(LAYERS):
        own = [state(name, "resid_post", layer, n, n)[TOWERS[name].cell(n, 1, 2)] for n in ALL]
        expected = [float(each.norm(dim=-1).mean()) for each in own]
        np.testing.assert_allclose(found.measures[0].patched[layer], expected, rtol=1e-4)


@pytest.mark.parametrize("name", some(["gemma3", "qwen2_vl", "llava_next"], ["qwen2_vl"]))
def test_patch_from_a_masked_image_equals_hooks(name: str) -> None:
    block = BLOCK.replace("corrupt changed { file = other }", "corrupt hidden { mask photo }")
    rule = "patch resid_post vision layer 0 at photo row 1 col 2 token"
    [found] = run_text(name, experiment("e", "from hidden into clean", rule), block=block)
    own, model, marker = TOWERS[name], bare(name), vlm.FAMILIES[name].marker
    values: list[float] = []
    for n in ALL:
        gray = Image.new("RGB", Image.open(folder() / f"{n}.png").size, (128, 128, 128))
        given = model.with_pictures(f"w3 w2 {marker} w1 {WORDS[n]} w3", [gray])
        seen = read(name, "resid_post", 0, partial(model.run, given))
        patches = own.cell(n, 1, 2)
        with edited(name, "resid_post", 0, at(patches, seen[patches])):
            values.append(difference(model.run(inputs(name, n, n))))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)
    assert np.abs(np.array(values) - found.measures[0].base[0]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_rules_at_merged_frames_of_a_video_equal_hooks(name: str) -> None:
    """Each token is made from 2 x 2 patches, each of two frames."""
    rule = "patch resid_post vision layer 0 at frame 2 row 2 col 1 token"
    found = videos.run(experiment("e", "from clean into changed", rule), name)["e"]
    grids = ((2, 4), (4, 2))
    own = replace(TOWERS[name], grids=grids)
    values: list[float] = []
    for n in ALL:
        rows, cols = grids[n % 2]
        patches = [4 * rows * cols + patch for patch in own.cell(n % 2, 2, 1)]
        given = videos.inputs(name, n, videos.record(n)["a"])
        seen = read(name, "resid_post", 0, partial(videos.bare(name).run, given))
        with edited(name, "resid_post", 0, at(patches, seen[patches])):
            values.append(videos.changed(name, n))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)
    assert np.abs(np.array(values) - found.measures[0].base[0]).max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "gemma3", "qwen2_5_vl"])
def test_planned_cost_is_near_the_counted_products(name: str) -> None:
    """Each prompt runs the encoder once to read a site, and once under the rule."""
    rule = "patch resid_post vision layer * at photo row 1 col 2 token"
    text = experiment("e", "from clean into changed", rule)
    plan = make_plan(check_file(text, folder(), loaded(name), BLOCK).experiments)
    execute(plan, {"m": loaded(name)}, None, check=check_denominators)  # also tests the patches
    with FlopCounterMode(display=False) as counter:
        execute(plan, {"m": loaded(name)}, None, check=check_denominators)
    planned = plan_cost(plan).planned.multiply_adds
    assert 0.5 < planned / (counter.get_total_flops() / 2) < 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "gemma3", "qwen2_5_vl"])
def test_encoder_patches_are_verified_in_bfloat16(name: str) -> None:
    own = deepcopy(bare(name).model).to(torch.bfloat16)
    model, found = adopt_model("m", own, bare(name).processor)
    assert model is not None, found
    text = f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{experiment("e", VISION)}'
    result, found = run_on(Source(text, folder() / "f.mech"), {"m": model})
    assert result is not None, found


# --- errors ---------------------------------------------------------------------------------------


def errors(name: str, text: str) -> tuple[list[str], list[str]]:
    """The codes of errors, and the experiments with results."""
    source = Source(f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{text}', folder() / "f.mech")
    result, found = run_on(source, {"m": loaded(name)})
    done = [] if result is None else [each.name for each in result.experiments]
    return [each.code for each in found if each.severity == "error"], done


VISION = "ablate resid_post vision layer 0 at photo tokens with zero"
ERRORS = {
    ("gemma3", "save resid_post vision layer 0 of clean at last token to "
               '"x.safetensors"\n  patch resid_post layer 0 at last token'): "E0310",
    ("gemma3", "ablate resid_post vision layer 0 at tokens 2..6 with zero"): "E0310",
    ("llava_next", "ablate resid_post vision layer 0 at tokens 3..25 with zero"): "E0310",
}  # fmt: skip


@pytest.mark.parametrize(("name", "line", "code"), [(*case, code) for case, code in ERRORS.items()])
def test_invalid_line_reports_the_code_before_anything_runs(
    name: str, line: str, code: str
) -> None:
    assert errors(name, experiment("e", "from clean into changed", line)) == ([code], [])


def test_rule_inside_and_outside_of_the_encoder_reports_e0108() -> None:
    text = "group g = resid_post vision layer 0, resid_post layer 1\n"
    text += experiment("e", "from clean into changed", "patch g at photo row 1 col 2 token")
    assert errors("llava_next", text) == (["E0108"], [])


@pytest.mark.parametrize("name", some(["llava_next", "qwen2_vl", "gemma3"], ["qwen2_vl"]))
def test_wrong_patches_report_e0413(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens exchange one of their patches."""
    own = bare(name)
    model, found = adopt_model("m", deepcopy(own.model), own.processor)
    assert model is not None, found
    entry = type(IMAGE_LAYOUTS[own.model.config.model_type])
    right = entry.patches

    def wrong(self: Any, *given: Any) -> list[tuple[int, ...]]:
        first, second, *rest = right(self, *given)
        return [(second[0], *first[1:]), (first[0], *second[1:]), *rest]

    monkeypatch.setattr(entry, "patches", wrong)
    text = f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{experiment("e", VISION)}'
    result = run_on(Source(text, folder() / "f.mech"), {"m": model})
    assert [each.code for each in result[1] if each.severity == "error"] == ["E0413"]


@pytest.mark.slow
def test_store_key_depends_on_position_and_window_of_the_encoder(tmp_path: Path) -> None:
    """Store keys depend on the token and on its patches."""
    name = "qwen2_5_vl"
    rule = "ablate resid_post vision layer 0 at photo row 1 col {} token with zero"
    seen: list[float] = []
    for window, col in ((8, 1), (8, 2), (16, 2), (8, 2)):
        own = deepcopy(bare(name).model)
        own.config.vision_config.window_size = window
        own.model.visual.window_size = window
        pair = own, bare(name).processor
        text = f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n'
        path = folder() / "stored.mech"
        path.write_text(text + experiment("e", rule.format(col)), encoding="utf-8")
        [measure] = mechdsl.run(path, {"m": pair}, store=tmp_path)["e"].measures
        seen.append(float(measure.patched[0, 0]))
    assert seen[1] == seen[3]
    assert len({round(value, 4) for value in seen}) == 3
