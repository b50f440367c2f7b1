"""Every rule at positions of images, in a file, against plain hooks on the bare model: one image at
a time, in 64 bits, made ready by transformers' own processor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ..quick import some
from ..reference.hooks import Change
from ..rules.support import agree
from . import support
from .support import CLASSIFIERS, FRONT, GRID, Seen, copied, difference, forward, patches, plain

QUICK = ("plain", "planned")
PATCHES = [(row, col) for row in range(1, GRID + 1) for col in range(1, GRID + 1)]
EVERY = [f"image row {row} col {col}" for row, col in PATCHES]
Writes = Mapping[tuple[str, int], Sequence[Change]]


def run(
    folder: Path,
    name: str,
    mode: str,
    lines: Sequence[str],
    axes: tuple[str, ...],
    cells: Sequence[tuple[object, ...]],
    writes: Callable[..., Writes],
    *,
    base: Callable[[int], int | None] = lambda number: None,
    large: float = 0.1,
    most: bool = True,
) -> None:
    """writes: of a row's number and the cell's coordinates; base: the image of a row that is
    written into, None for gray."""
    found = support.run_file(support.experiment("e", *lines), folder, name, mode)["e"]
    expected: dict[tuple[object, ...], list[float]] = {}
    for cell in cells:
        expected[tuple(cell)] = [
            difference(
                forward(name, support.pixels(name, base(number)), writes(number, *cell)), number
            )
            for number in range(3)
        ]
    start = np.array([difference(plain(name, base(number)), number) for number in range(3)])
    agree(found, axes, expected, start, large=large, most=most)  # type: ignore[arg-type]


INTO_GRAY = "from scenes into neutral"


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_patches_of_an_image_go_into_a_gray_one(name: str, mode: str, tmp_path: Path) -> None:
    def writes(number: int, label: str) -> Writes:
        token = patches(name)[EVERY.index(label)]
        return {
            ("resid_post", layer): copied(plain(name, number), "resid_post", layer, [token])
            for layer in (0, 1)
        }

    lines = [INTO_GRAY, "patch resid_post layers 0..1 at each token of image"]
    cells = [(label,) for label in EVERY]
    # The last block's patches aren't read by a head that takes the class token alone.
    run(tmp_path, name, mode, lines, ("position",), cells, writes, large=0.05, most=False)


@pytest.mark.parametrize("mode", some(QUICK, ["planned"]))
@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("site", ["mlp_out", "attn_out", "resid_mid", "resid_pre"])
def test_sites_of_joined_patches(site: str, name: str, mode: str, tmp_path: Path) -> None:
    tokens = [support.token(name, row, col) for row in (2, 3) for col in (1, 2, 3)]

    def writes(number: int, layer: int) -> Writes:
        return {(site, layer): copied(plain(name, number), site, layer, tokens)}

    lines = [INTO_GRAY, f"patch {site} layer * at image row 2..3 col 1..3 tokens"]
    cells = [(0,), (1,)]
    run(tmp_path, name, mode, lines, ("layer",), cells, writes, large=0.03, most=False)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if FRONT[name]])
def test_heads_at_the_class_token(name: str, mode: str, tmp_path: Path) -> None:
    def writes(number: int, layer: int, head: int) -> Writes:
        return {("z", layer): copied(plain(name, number), "z", layer, [0], [head])}

    cells = [(layer, head) for layer in (0, 1) for head in range(4)]
    lines = [INTO_GRAY, "patch layer * head * at cls token"]
    run(tmp_path, name, mode, lines, ("layer", "head"), cells, writes, large=0.05, most=False)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "siglip"])
@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_queries_keys_and_values(site: str, name: str, mode: str, tmp_path: Path) -> None:
    def writes(number: int, head: int) -> Writes:
        tokens = patches(name)
        return {(site, 0): copied(plain(name, number), site, 0, tokens, [head])}

    lines = [INTO_GRAY, f"patch {site} layer 0 head * at image tokens"]
    cells = [(head,) for head in range(4)]
    run(tmp_path, name, mode, lines, ("head",), cells, writes, large=0.01, most=False)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_row_of_patches_is_embedded_as_zero(name: str, mode: str, tmp_path: Path) -> None:
    def writes(number: int, label: str) -> Writes:
        token = patches(name)[EVERY.index(label)]
        width = plain(name, number).sites["embed", 0].shape[-1]
        return {("embed", 0): [Change(token, 0, torch.zeros(width, dtype=torch.float64))]}

    lines = ["ablate embed at image row 2 col * token with zero"]
    cells = [(label,) for label in EVERY[GRID : 2 * GRID]]
    run(
        tmp_path, name, mode, lines, ("position",), cells, writes, base=lambda number: number,
        large=0.05, most=False,
    )  # fmt: skip


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "clip"])
def test_the_mean_over_images(name: str, mode: str, tmp_path: Path) -> None:
    token = support.token(name, 3, 2)

    def writes(number: int, layer: int) -> Writes:
        every = [plain(name, n).sites["resid_post", layer][token, 0] for n in range(3)]
        return {("resid_post", layer): [Change(token, 0, torch.stack(every).mean(0))]}

    lines = ["ablate resid_post layer 0..1 at image row 3 col 2 token with mean"]
    run(
        tmp_path, name, mode, lines, ("layer",), [(0,), (1,)], writes, base=lambda number: number,
        large=0.005, most=False,
    )  # fmt: skip


@pytest.mark.parametrize("mode", QUICK)
def test_registers_and_what_is_set(mode: str, tmp_path: Path) -> None:
    name = "dinov2_with_registers"

    def writes(number: int, item: int, neuron: int) -> Writes:
        value = torch.full((1,), 2.0, dtype=torch.float64)
        return {("mlp_hidden", 0): [Change(item, neuron, value)]}

    lines = ["set mlp_hidden layer 0 neuron 1, 3 at each register token to 2"]
    found = support.run_file(support.experiment("e", *lines), tmp_path, name, mode)["e"]
    assert [cell.coords["position"] for cell in found.cells] == [
        f"register {n}" for n in range(1, 5)
    ] * 2
    expected = [
        [
            difference(forward(name, support.pixels(name, n), writes(n, item, neuron)), n)
            for n in range(3)
        ]
        for neuron in (1, 3)
        for item in range(1, 5)
    ]
    np.testing.assert_allclose(found.measures[0].patched, expected, atol=1e-4)
    effect = np.abs(found.measures[0].patched - found.measures[0].base)
    assert effect.max() > 0.02


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["vit", "deit", "siglip"])
def test_a_direction_is_added(name: str, mode: str, tmp_path: Path) -> None:
    blocks = (
        support.BLOCKS
        + "direction d = mean_difference(scenes, neutral) at resid_post layer 0 at image tokens\n"
    )
    text = support.experiment("e", "add 2 * d to resid_post layer 0 at image row 1 col 4 token")
    found = support.run_file(text, tmp_path, name, mode, blocks)["e"]
    own = [plain(name, n).sites["resid_post", 0][patches(name), 0].mean(0) for n in range(3)]
    gray = plain(name, None).sites["resid_post", 0][patches(name), 0].mean(0)
    direction = torch.stack(own).mean(0) - gray
    at = support.token(name, 1, 4)
    expected: list[float] = []
    for number in range(3):
        before = plain(name, number).sites["resid_post", 0][at, 0]
        change = Change(at, 0, before + 2 * direction)
        seen = forward(name, support.pixels(name, number), {("resid_post", 0): [change]})
        expected.append(difference(seen, number))
    agree(found, (), {(): expected}, _unpatched(name), large=0.02, most=False)


def _unpatched(name: str) -> np.ndarray:
    return np.array([difference(plain(name, number), number) for number in range(3)])


def attended(
    name: str, seen: Seen, layer: int, queries: Sequence[int], without: Sequence[int]
) -> list[Change]:
    """`z` where some queries don't attend to some keys, from queries, keys and values."""
    q, k, v = (seen.sites[site, layer].transpose(0, 1) for site in ("q", "k", "v"))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    for query in queries:
        scores[:, query, list(without)] = -torch.inf
    made = (scores.softmax(-1) @ v).transpose(0, 1)
    return [Change(at, head, made[at, head]) for at in queries for head in range(made.shape[1])]


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "clip", "siglip"])
def test_attention_is_blocked(name: str, mode: str, tmp_path: Path) -> None:
    keys = [support.token(name, 2, col) for col in range(1, GRID + 1)]
    front = [0] if FRONT[name] else patches(name)
    query = "cls token" if FRONT[name] else "image tokens"

    def writes(number: int, layer: int) -> Writes:
        return {("z", layer): attended(name, plain(name, number), layer, front, keys)}

    lines = [f"block attention layer * from {query} to image row 2 col * tokens"]
    run(
        tmp_path, name, mode, lines, ("layer",), [(0,), (1,)], writes, base=lambda number: number,
        large=0.02, most=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", support.ENCODERS)
@pytest.mark.parametrize("mode", QUICK)
def test_encoders_are_measured_on_activations(name: str, mode: str, tmp_path: Path) -> None:
    lines = [INTO_GRAY, "patch resid_post layer 0 at each token of image"]
    measure = "measure cosine(resid_post layer 1, neutral) at cls token as raw"
    text = support.experiment("e", *lines, measure=measure)
    found = support.run_file(text, tmp_path, name, mode)["e"]
    own = plain(name, None).sites["resid_post", 1][0, 0]
    expected: list[list[float]] = []
    for token in patches(name):
        values: list[float] = []
        for number in range(3):
            changes = copied(plain(name, number), "resid_post", 0, [token])
            seen = forward(name, support.pixels(name, None), {("resid_post", 0): changes})
            there = seen.sites["resid_post", 1][0, 0]
            values.append(float(torch.cosine_similarity(there, own, dim=0)))
        expected.append(values)
    np.testing.assert_allclose(found.measures[0].patched, expected, atol=1e-4)
    assert found.measures[0].patched.min() < 0.99


@pytest.mark.parametrize("name", ["vit", "dinov2/bare"])
def test_what_is_seen_at_tokens(name: str, tmp_path: Path) -> None:
    lines = [
        "observe norm resid_post layer 1 at each token of image as lengths",
        "observe attention layer 0 head 2 from cls token to image row 3 col 1..2 tokens as paid",
    ]
    text = support.experiment("e", *lines, measure="")
    found = support.run_file(text, tmp_path, name)
    streams = [plain(name, n).sites["resid_post", 1][patches(name), 0].norm(dim=-1)
               for n in range(3)]  # fmt: skip
    lengths = found["e.lengths"].measures[0].patched
    np.testing.assert_allclose(lengths, torch.stack(streams, 1), rtol=1e-4)
    keys = [support.token(name, 3, col) for col in (1, 2)]
    paid: list[float] = []
    for number in range(3):
        seen = plain(name, number)
        q, k = (seen.sites[site, 0][:, 2] for site in ("q", "k"))
        weights = (q[0] @ k.T / math.sqrt(q.shape[-1])).softmax(-1)
        paid.append(float(weights[keys].sum()))
    np.testing.assert_allclose(found["e.paid"].measures[0].patched[0], paid, rtol=1e-3)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["vit", "beit", "clip"])
def test_what_two_rows_of_patches_add_is_swapped(name: str, mode: str, tmp_path: Path) -> None:
    above, below = ([support.token(name, row, col) for col in range(1, GRID + 1)] for row in (1, 2))

    def writes(number: int, site: str) -> Writes:
        own = plain(name, number).sites[site, 0]
        pairs = [*zip(above, below, strict=True), *zip(below, above, strict=True)]
        return {(site, 0): [Change(to, 0, own[of, 0]) for to, of in pairs]}

    for site in ("mlp_out", "attn_out"):
        lines = [
            f"swap {site} layer 0 at image row 1 col * tokens with image row 2 col * tokens",
        ]
        run(
            tmp_path, name, mode, lines, (), [()], lambda number, site=site: writes(number, site),
            base=lambda number: number, large=0.003, most=False,
        )  # fmt: skip


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["vit", "deit"])
def test_a_class_token_is_frozen(name: str, mode: str, tmp_path: Path) -> None:
    def writes(number: int) -> Writes:
        tokens = patches(name)
        return {
            ("embed", 1): copied(plain(name, number), "embed", 0, tokens),
            ("attn_out", 0): copied(plain(name, None), "attn_out", 0, [0]),
        }

    lines = [INTO_GRAY, "patch embed at image tokens", "freeze attn_out layer 0 at cls token"]
    run(tmp_path, name, mode, lines, (), [()], writes, large=0.02, most=False)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers"])
def test_a_block_is_left_out(name: str, mode: str, tmp_path: Path) -> None:
    def writes(number: int) -> Writes:
        every = range(FRONT[name] + GRID * GRID)
        own = plain(name, number).sites["resid_pre", 0]
        return {("resid_post", 0): [Change(at, 0, own[at, 0]) for at in every]}

    lines = ["replace block layer 0 with identity"]
    run(
        tmp_path, name, mode, lines, (), [()], writes, base=lambda number: number, large=0.05,
        most=False,
    )  # fmt: skip


@pytest.mark.parametrize("mode", QUICK)
def test_directions_of_images_are_clamped_and_projected_out(mode: str, tmp_path: Path) -> None:
    name, at = "vit", 0
    blocks = support.BLOCKS + "direction d = mean(scenes) at resid_post layer 0 at cls token\n"
    own = [plain(name, n).sites["resid_post", 0][at, 0] for n in range(3)]
    unit = torch.stack(own).mean(0)
    unit = unit / unit.norm()
    for rule, left in (("clamp d of", 3.0), ("project out d from", 0.0)):
        end = " to 3" if left else ""
        text = support.experiment("e", f"{rule} resid_post layer 0 at cls token{end}")
        found = support.run_file(text, tmp_path, name, mode, blocks)["e"]
        expected: list[float] = []
        for number in range(3):
            value = own[number] + (left - own[number] @ unit) * unit
            changes = [Change(at, 0, value)]
            seen = forward(name, support.pixels(name, number), {("resid_post", 0): changes})
            expected.append(difference(seen, number))
        agree(found, (), {(): expected}, _unpatched(name), large=0.02, most=False)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_tokens_that_were_ranked(name: str, mode: str, tmp_path: Path) -> None:
    """The patches of each image that another experiment found to matter most."""
    first = support.experiment("caap", INTO_GRAY, "patch resid_post layer 0 at each token of image")
    text = support.experiment("e", "ablate embed at top 25% of caap tokens with zero")
    found = support.run_file(first + text, tmp_path, name, mode)
    deltas = found["caap"].measures[0].patched - found["caap"].measures[0].base
    expected: list[float] = []
    for number in range(3):
        best = np.argsort(-deltas[:, number], kind="stable")[: GRID * GRID // 4]
        width = plain(name, number).sites["embed", 0].shape[-1]
        zero = torch.zeros(width, dtype=torch.float64)
        changes = [Change(patches(name)[n], 0, zero) for n in best]
        seen = forward(name, support.pixels(name, number), {("embed", 0): changes})
        expected.append(difference(seen, number))
    agree(found["e"], (), {(): expected}, _unpatched(name), large=0.02, most=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["vit", "dinov3_vit"])
def test_vectors_of_images_are_saved(name: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    lines = ['save resid_post layer 1 at image row 2 col 3 token to "own.safetensors"']
    measure = "measure cosine(resid_post layer 0, clean) at cls token as raw"
    text = support.experiment("e", *lines, measure=measure)
    support.run_file(text, tmp_path, name)
    saved = load_file(tmp_path / "own.safetensors")
    [values] = [value for value in saved.values() if value.ndim >= 2 and value.shape[-1] > 3]
    token = support.token(name, 2, 3)
    wanted = [plain(name, n).sites["resid_post", 1][token, 0].numpy() for n in range(3)]
    found = values.reshape(3, -1)
    for row in wanted:
        assert np.abs(found - row).max(1).min() < 1e-3
