"""Images cut into tiles: each tile is a row, and tiles of one image are one sampling unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.diagnostics.rendering import render_full
from mechdsl.images.picture import covered_tokens
from mechdsl.images.pixels import region_coverage
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, run_on
from ..quick import in_turn, some
from ..reference.hooks import Change
from ..rules.test_bases import Basis, components
from ..rules.test_gradient_attention import eager
from . import support, tiles
from .support import (
    ANSWERS,
    CLASSIFIERS,
    DUALS,
    LABELS,
    WRONG,
    copied,
    difference,
    forward,
    patches,
)
from .test_regions import UNRESIZED, changed_by_painting
from .tiles import NAMES, Tile

FAMILIES = some((*CLASSIFIERS, *DUALS), ("vit", "clip", "siglip/dual"))
BLOCK = """
images scenes {{
  rows "data.jsonl"
  image "{{file}}"
  tiles 2 by 3 and whole
  answer "{{label}}"
  wrong "{{other}}"
  region object = {region}
  {more}
}}
images neutral {{ image gray }}
"""
CUT = """
images scenes {
  rows "cut.jsonl"
  image "{file}"
  answer "{label}"
  wrong "{other}"
  region object = box
}
"""
"""Reads each tile from a separate file."""


def blocks(name: str, *more: str, region: str = "box") -> str:
    """Blocks of a model; models with two towers have texts as labels."""
    found = BLOCK.format(region=region, more="\n  ".join(more))
    if name in DUALS:
        found = found.replace(
            '"{label}"', '"a photo of a {label}"\n  classes "a photo of a {label}"'
        )
        found = found.replace('"{other}"', '"a photo of a {other}"')
    return found


def run(
    text: str, name: str = "vit", *, block: str = "", mode: str = "planned"
) -> dict[str, ExperimentResult]:
    """Experiment → result, rows in the seeded order."""
    with TemporaryDirectory() as folder:
        tiles.write(Path(folder))
        whole = f'mech 1\nmodel m = local("handed over")\n{block or blocks(name)}\n{text}'
        source = Source(whole, Path(folder) / "file.mech")
        result, found = run_on(source, {"m": support.shared(name)}, MODES[mode])
    errors = [each for each in found if each.severity == "error"]
    assert result is not None, render_full(errors, color=False, width=100)
    return {each.name: each for each in result.experiments}


def hold(
    found: ExperimentResult,
    cell: int,
    expected: Callable[[Tile], float | None],
    *,
    large: float = 0.01,
) -> None:
    """Compare each row's patched value with hooks on its tile; None for dropped tiles."""
    own = found.measures[0].patched[cell]
    assert len(own) == 21
    told = [expected(tile) for tile in tiles.rows(found.row_values)]
    wanted = np.array([np.nan if each is None else each for each in told])
    np.testing.assert_allclose(own, wanted, rtol=0, atol=1e-4)
    base = np.broadcast_to(found.measures[0].base, found.measures[0].patched.shape)[cell]
    assert np.nanmax(np.abs(base - wanted)) > large


# --- against plain hooks --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ["planned", "plain"])
def test_base_values_of_tiles_equal_reference(name: str, mode: str) -> None:
    lines = "ablate embed at image row 1 col 1 token with zero"
    found = run(support.experiment("e", lines), name, mode=mode)["e"]
    assert set(tiles.rows(found.row_values)) == {
        Tile(number, each) for number in range(3) for each in (*NAMES, "whole")
    }
    for row, tile in enumerate(tiles.rows(found.row_values)):
        seen = tiles.unpatched(name, tile)
        wanted = difference(seen, tile.number)
        assert found.measures[0].base[0, row] == pytest.approx(wanted, abs=1e-4), tile


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("region", ["box", "mask"])
def test_patched_regions_of_tiles_equal_hooks(name: str, region: str) -> None:
    """Tiles without any part of the region are dropped."""
    lines = ("from scenes into neutral", "patch resid_post layer 0..1 at object tokens")
    text = support.experiment("e", *lines)
    found = run(text, name, block=blocks(name, region=region))["e"]
    gray = support.pixels(name, None)
    for layer in (0, 1):

        def patched(tile: Tile, layer: int = layer) -> float | None:
            tokens = tile.region(name)
            if not tokens:
                return None
            changes = copied(tiles.unpatched(name, tile), "resid_post", layer, tokens)
            return difference(forward(name, gray, {("resid_post", layer): changes}), tile.number)

        hold(found, layer, patched)
    dropped = {t for t in tiles.rows(found.row_values) if not t.region(name)}
    assert 6 <= len(dropped) <= 12


@pytest.mark.parametrize("name", FAMILIES)
def test_patched_image_token_of_each_tile_equals_hooks(name: str) -> None:
    lines = ("from scenes into neutral", "patch resid_post layer 1 at image row 2 col 3 token")
    found = run(support.experiment("e", *lines), name)["e"]
    at = [support.token(name, 2, 3)]

    def patched(tile: Tile) -> float:
        changes = copied(tiles.unpatched(name, tile), "resid_post", 1, at)
        given = support.pixels(name, None)
        return difference(forward(name, given, {("resid_post", 1): changes}), tile.number)

    hold(found, 0, patched)


def test_ablation_except_a_region_skips_fully_covered_tiles() -> None:
    """A tile that the region covers completely stays unpatched."""
    lines = ("ablate resid_post layer 1 at tokens except object tokens with zero",)
    found = run(support.experiment("e", *lines))["e"]
    covered: list[Tile] = []

    def ablated(tile: Tile) -> float | None:
        tokens = tile.region("vit")
        others = [token for token in patches("vit") if token not in tokens]
        covered.extend([] if others else [tile])
        stream = tiles.unpatched("vit", tile).sites["resid_post", 1]
        zero = [Change(at, 0, 0 * stream[at, 0]) for at in others]
        given = tile.pixels("vit")
        seen = forward("vit", given, {("resid_post", 1): zero})
        return difference(seen, tile.number) if tokens else None

    hold(found, 0, ablated)
    assert covered


@pytest.mark.parametrize("name", some((*CLASSIFIERS, *DUALS), ("vit", "clip")))
def test_image_is_blurred_before_tiling(name: str) -> None:
    block = blocks(name, "corrupt blurred { blur image radius 2 }")
    lines = ("from clean into blurred", "patch resid_post layer 0 at image tokens")
    found = run(support.experiment("e", *lines), name, block=block)["e"]

    def patched(tile: Tile) -> float:
        image = Image.fromarray(support.image(tile.number)).filter(ImageFilter.GaussianBlur(2))
        changes = copied(tiles.unpatched(name, tile), "resid_post", 0, patches(name))
        given = tile.pixels(name, np.asarray(image))
        return difference(forward(name, given, {("resid_post", 0): changes}), tile.number)

    hold(found, 0, patched)


def test_mask_outside_a_tile_is_blurred_into_it() -> None:
    block = blocks("vit", "corrupt both { mask object  blur image radius 3 }")
    lines = ("from clean into both", "ablate embed at image row 1 col 1 token with zero")
    found = run(support.experiment("e", *lines), block=block)["e"]
    for row, tile in enumerate(tiles.rows(found.row_values)):
        image = support.image(tile.number).copy()
        left, top, right, bottom = tiles.BOXES[tile.number]
        image[top:bottom, left:right] = 128
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(3))
        wanted = difference(forward("vit", tile.pixels("vit", np.asarray(blurred))), tile.number)
        assert found.measures[0].base[0, row] == pytest.approx(wanted, abs=1e-4), tile


def test_patch_from_the_same_tile_of_another_image_equals_hooks() -> None:
    """Each image has different tile edges."""
    block = blocks("vit", "corrupt elsewhere { file = second }")
    lines = ("from clean into elsewhere", "patch resid_post layer 0 at image tokens")
    found = run(support.experiment("e", *lines), block=block)["e"]

    def patched(tile: Tile) -> float:
        other = Tile((tile.number + 1) % 3, tile.name)
        changes = copied(tiles.unpatched("vit", tile), "resid_post", 0, patches("vit"))
        given = other.pixels("vit")
        return difference(forward("vit", given, {("resid_post", 0): changes}), tile.number)

    hold(found, 0, patched)


def test_patch_from_a_tile_into_the_whole_image_equals_hooks() -> None:
    """Patch from each tile into the whole image."""
    block = blocks("vit", 'where tile != "whole"', 'corrupt seen { tile = "whole" }')
    lines = ("from clean into seen", "patch resid_post layer 0 at image tokens")
    found = run(support.experiment("e", *lines), block=block)["e"]
    assert len(found.row_values["tile"]) == 18
    for row, tile in enumerate(tiles.rows(found.row_values)):
        changes = copied(tiles.unpatched("vit", tile), "resid_post", 0, patches("vit"))
        given = Tile(tile.number, "whole").pixels("vit")
        wanted = difference(forward("vit", given, {("resid_post", 0): changes}), tile.number)
        assert found.measures[0].patched[0, row] == pytest.approx(wanted, abs=1e-4)


def test_regions_are_swapped_across_tiles() -> None:
    """Boxes of equal size in tiles at opposite corners; tiles with neither are dropped."""
    more = (
        "first_box = [1, 1, 4, 4]", "last_box = [12, 11, 15, 14]",
        "region first_part = first_box", "region last_part = last_box",
        "corrupt swapped { swap first_part, last_part }",
    )  # fmt: skip
    lines = ("from clean into swapped", "ablate embed at image row 1 col 1 token with zero")
    found = run(support.experiment("e", *lines), block=blocks("vit", *more))["e"]
    names: dict[int, set[str]] = {number: set() for number in range(3)}
    for row, tile in enumerate(tiles.rows(found.row_values)):
        names[tile.number].add(tile.name)
        image = support.image(tile.number).copy()
        image[1:4, 1:4], image[11:14, 12:15] = image[11:14, 12:15].copy(), image[1:4, 1:4].copy()
        wanted = difference(forward("vit", tile.pixels("vit", image)), tile.number)
        assert found.measures[0].base[0, row] == pytest.approx(wanted, abs=1e-4)
    assert names[1] == {"row 1 col 1", "row 2 col 3", "whole"}


# --- regions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("box", [(10, 12, 25, 21), (0, 0, 40, 9), (15, 15, 17, 17), (3, 14, 9, 19)])
def test_region_tokens_of_tiles_are_those_affected_by_painting(name: str, box: tiles.Box) -> None:
    """The processor doesn't resize these tiles."""
    from mechdsl.images.picture import Picture, Region

    height, width = UNRESIZED[name]
    whole = np.random.default_rng(2).integers(0, 100, (2 * height, 3 * width, 3), dtype=np.uint8)
    inside = np.zeros(whole.shape[:2], bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    reader = support.shared(name).tokenizer
    assert isinstance(reader, ImageTokenizer)
    picture = Picture("gray", size=whole.shape[:2])
    hit = 0
    for top in (0, height):
        for left in (0, width, 2 * width):
            part = np.s_[top : top + height, left : left + width]
            changed = changed_by_painting(name, whole[part], inside[part]) > 1e-6
            own = replace(picture, cut=(left, top, left + width, top + height), tile="row")
            shown = region_coverage(Region(box=box), own)
            found = covered_tokens(shown, reader.processing, reader.layout)
            assert list(found) == changed.nonzero()[0].tolist()
            hit += bool(found)
    assert hit


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_chance_of_map_mass_uses_the_part_of_the_region_in_the_tile(name: str) -> None:
    text = support.experiment("gone", "ablate embed at each token of image with zero")
    text += support.experiment("e", "observe mass of gone in object", measure="")
    found = run(text, name, block=blocks(name, 'where tile != "whole"'))["e"]
    share = found.measures[1].patched[0]
    assert "chance" in found.measures[1].label
    wanted = np.array([tile.inside(name).mean() for tile in tiles.rows(found.row_values)])
    known = np.isfinite(share)  # maps with a positive value
    assert known.sum() >= 5
    assert (wanted[known] > 0).all()
    np.testing.assert_allclose(share[known], wanted[known])


# --- compared with tiles in separate files --------------------------------------------------------


LINES = {
    "ablate": ("ablate resid_post layer 0..1 at object tokens with zero",),
    "each": ("ablate resid_post layer 1 at each token of object with zero",),
    "edge": ("ablate embed at first token of object with zero",),
    "joined": ("ablate mlp_out layer 1 at {object tokens, image row 1 col 1 token} with zero",),
    "blocked": ("block attention layer 0 head * from image row 1 col 1 token to object tokens",),
    "painted": ("replace object tokens with gray",),
    "blurred": ("replace each token of object with blur(2)",),
    "masked": ("from clean into masked", "patch embed at object tokens"),
}
"""Rules without effect in tiles that contain no part of the region."""


@cache
def both() -> list[dict[str, ExperimentResult]]:
    """Results on tiles, and on the same tiles as files that `stats by` groups."""
    change = "corrupt masked { mask object }"
    text = "".join(support.experiment(name, *lines) for name, lines in LINES.items())
    own = blocks("vit", 'where tile != "whole"', change)
    cut = CUT.replace("region object = box", f"region object = box\n  {change}")
    return [
        run(text, block=own),
        run(text.replace("correct none", "correct none by scene"), block=cut),
    ]


@pytest.mark.parametrize("name", LINES)
def test_tiles_equal_precut_files(name: str) -> None:
    own, cut = (each[name] for each in both())
    mine = {(t.number, t.name): row for row, t in enumerate(tiles.rows(own.row_values))}
    theirs = list(zip(cut.row_values["scene"], cut.row_values["at"], strict=True))
    places = [mine[int(str(scene)), str(at)] for scene, at in theirs]
    assert 6 <= len(places) <= 12
    ours, other = own.measures[0].patched, cut.measures[0].patched
    np.testing.assert_allclose(ours[:, places], other, rtol=1e-6, atol=1e-6)
    assert [cell.coords for cell in own.cells] == [cell.coords for cell in cut.cells]
    assert np.isnan(np.delete(ours, places, axis=1)).all()


def test_tiles_of_one_image_are_one_sampling_unit() -> None:
    """Equals rows grouped with `stats by`."""
    own, cut = (each["ablate"] for each in both())
    assert own.settings is not None
    assert own.settings.by == "image"
    one, two = own.statistics[0], cut.statistics[0]
    assert one.units.tolist() == two.units.tolist() == [3, 3]
    np.testing.assert_allclose(one.mean, two.mean, atol=1e-6)
    np.testing.assert_allclose(one.p, two.p)
    assert own.conventions["population"] == "new values of image"
    assert "of one image count as one unit" in own.conventions["tiles"]


# --- exact attention weights ----------------------------------------------------------------------


Edit = Callable[[Tensor], Tensor]
"""The vector of a head → the written one."""


@cache
def attending(name: str) -> Any:
    return eager(support.double(name))


def heads_of(name: str, site: str) -> Any:
    """The projection to queries or keys of layer 1, in the model of `attending`."""
    block = support.stack(name).at(1)
    heads = {"q": block.q, "k": block.k}[site]
    assert heads is not None
    return attending(name).get_submodule(f"{support.stack(name).blocks}.1.{heads.path}")


@cache
def vectors(name: str, site: str, tile: Tile | None) -> Tensor:
    """[token, head, width] queries or keys of a tile, or of a gray image (None)."""
    given = support.pixels(name, None) if tile is None else tile.pixels(name)
    found: list[Tensor] = []
    handle = heads_of(name, site).register_forward_hook(lambda *of: found.append(of[-1][0]))
    with torch.no_grad():
        attending(name)(pixel_values=given)
    handle.remove()
    return found[0].unflatten(-1, (support.stack(name).at(1).heads, -1))


@cache
def weights(name: str, tile: Tile) -> tuple[Tensor, Tensor]:
    """[head, query, key] attention weights of layer 1, and the metric's gradient by them."""
    seen = attending(name)(pixel_values=tile.pixels(name), output_attentions=True)
    answer, wrong = (LABELS.index(each[tile.number]) for each in (ANSWERS, WRONG))
    number = seen.logits[0, answer] - seen.logits[0, wrong]
    (gradient,) = torch.autograd.grad(number, seen.attentions[1])
    return seen.attentions[1][0].detach(), gradient[0]


def exact_estimate(name: str, site: str, head: int, tile: Tile, edit: Edit) -> float:
    """The change of attention weights times the gradient, where `edit` acts on a head's vector at
    row 2, col 1."""
    at, unit = support.token(name, 2, 1), slice(head * 6, head * 6 + 6)

    def write(part: Any, args: Any, out: Tensor) -> Tensor:
        new = out.clone()
        new[0, at, unit] = edit(new[0, at, unit])
        return new

    handle = heads_of(name, site).register_forward_hook(write)
    with torch.no_grad():
        seen = attending(name)(pixel_values=tile.pixels(name), output_attentions=True)
    handle.remove()
    plain, gradient = weights(name, tile)
    return float(((seen.attentions[1][0] - plain) * gradient).sum())


def copy_coordinate(basis: Basis, source: Tensor, number: int) -> Edit:
    """Copy a coordinate of another vector."""

    def change(x: Tensor) -> Tensor:
        return x + (basis.encode(source) - basis.encode(x))[number] * basis.directions[number]

    return change


@pytest.mark.parametrize("mode", ["planned", "plain"])
@pytest.mark.parametrize(("name", "site"), in_turn(("vit", "siglip", "beit"), ("q", "k")))
def test_atp_qk_of_coordinates_in_tiles_equals_exact_weights(
    name: str, site: str, mode: str
) -> None:
    """Of bases of the heads, which are fitted on all tiles; two experiments share them."""
    place = "image row 1 col 2 token"
    text = f"basis h = pca(scenes, dims: 2) at {site} layer 1 head * at {place}\n"
    rules = ("patch feature * of h", f"patch {site} layer 1 head * dims 1..3")
    for number, rule in enumerate(rules):
        lines = ("from neutral into scenes", f"{rule} at image row 2 col 1 token", "using atp_qk")
        text += support.experiment(f"e{number}", *lines)
    found = run(text, name, mode=mode)
    every = [*tiles.rows(found["e0"].row_values)]
    at, source = support.token(name, 2, 1), vectors(name, site, None)
    fitted = torch.stack([vectors(name, site, t)[support.token(name, 1, 2)] for t in every])
    edits: list[dict[tuple[int, ...], Edit]] = [{}, {}]
    for head in range(fitted.shape[1]):
        basis, own = components(fitted[:, head], 2), source[at, head]
        for number in (0, 1):
            edits[0][head, number] = copy_coordinate(basis, own, number)
        edits[1][head,] = lambda x, own=own: torch.cat([x[:1], own[1:4], x[4:]])
    for number, cells in enumerate(edits):
        data = found[f"e{number}"].measures[0]
        effects = dict(zip(cells, data.patched - data.base, strict=True))
        for key, edit in cells.items():
            wanted = [exact_estimate(name, site, key[0], tile, edit) for tile in every]
            np.testing.assert_allclose(effects[key], wanted, rtol=1e-3, atol=1e-5)
        assert np.abs(data.patched - data.base).max() > 1e-3
