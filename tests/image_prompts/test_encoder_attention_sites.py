"""Queries, keys, scores and patterns of vision encoders of prompts with images, and observations of
patterns, against a reference that replaces the library's own attention in the bare model, one
unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mechdsl
from mechdsl.forward.hooks import full_pass
from mechdsl.forward.hooks.attention_hooks import AttentionHooks, build_attention_hooks

from ..images import prompts_of_images as vlm
from ..quick import some
from . import test_video_processors as videos
from .reference import at
from .support import check_cells, experiment
from .test_encoder_attention import NAMES, QUICK, TOWERS, attended, module_of, patterns, run_in_both
from .test_families import (
    ALL,
    BLOCK,
    TWO,
    WORDS,
    bare,
    difference,
    folder,
    inputs,
    loaded,
    run_text,
)
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
    lines += ["patch q_rot vision layer 0 head * at photo tokens"]
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
        lambda n, h: ("q_rot", copied(name, "q_rot", n, own.every(n), h)),
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


@pytest.mark.parametrize("name", some(["gemma3", "qwen2_5_vl"], ["gemma3"]))
def test_observed_entropy_keeps_one_number_of_each_query_and_head(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a pass grow with the square of the number of patches. With a rule that reads
    the same pattern, both are kept."""
    built: list[AttentionHooks] = []

    def build(*given: Any, **named: Any) -> AttentionHooks:
        built.append(build_attention_hooks(*given, **named))
        return built[-1]

    line = "observe entropy pattern vision layer 1 head * at photo tokens"
    rule = "patch pattern vision layer 1 head 1 at photo row 1 col 2 token"
    loaded(name)  # its checks read patterns
    monkeypatch.setattr(full_pass, "build_attention_hooks", build)
    [alone] = run_text(name, experiment("e", line, measure=""))
    assert {site: found.shape[-1] for each in built for site, found in each.found.items()} == {
        "entropy": 1
    }
    ruled = experiment("ruled", "from hidden into clean", rule, line, measure="")
    unchanged, changed = run_text(name, experiment("e", line, measure="") + ruled, block=HIDDEN)
    np.testing.assert_allclose(unchanged.measures[0].patched, alone.measures[0].patched, atol=1e-5)
    expected, own = np.zeros((HEADS, len(ALL))), TOWERS[name]
    for n in ALL:
        clean, grayed = (
            record(name, "pattern", 1, given) for given in (inputs(name, n, n), gray(name, n))
        )
        for head in range(HEADS):
            rows: list[Tensor] = []
            for query in own.every(n):
                tile = max(each for each in clean if each <= query)
                source = grayed if head == 1 and query in own.cell(n, 1, 2) else clean
                rows.append(source[tile][head, query - tile])
            expected[head, n] = entropy(torch.stack(rows)).mean()
    np.testing.assert_allclose(changed.measures[0].patched, expected, atol=1e-4)
    assert np.abs(expected - alone.measures[0].patched).max() > 0.001


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


# --- in combination -------------------------------------------------------------------------------

NEGATED = "scale scores vision layer 0 head 1 at photo tokens by -1"
CUT = "ablate pattern vision layer 1 head 0 at photo row 1 col 2 token with zero"


def negated(name: str, n: int) -> Inside:
    return at_patches(TOWERS[name].every(n), 1, lambda _, value: -value)


def cut(name: str, n: int) -> Inside:
    return at_patches(TOWERS[name].cell(n, 1, 2), 0, lambda _, value: 0 * value)


@contextmanager
def negated_and_cut(name: str, n: int, edit: Inside | None = None) -> Generator[None]:
    """Change scores of block 0, and the pattern of block 1, after a further edit."""

    def both(first: int, value: Tensor) -> Tensor:
        return cut(name, n)(first, value if edit is None else edit(first, value))

    before = {"scores": negated(name, n)}
    with (
        attended(module_of(name, 0), before=before, again=True),
        attended(module_of(name, 1), both, again=True),
    ):
        yield


def weights_under_rules(name: str, n: int) -> dict[int, Tensor]:
    """Number of a tile's first token → the pattern of block 1 with negated scores in block 0."""
    found: dict[int, Tensor] = {}

    def keep(first: int, value: Tensor) -> Tensor:
        found[first] = value.clone()
        return value

    with negated_and_cut(name, n, keep):
        bare(name).run(inputs(name, n, n))
    return found


@pytest.mark.parametrize("name", some(NAMES, ["llava_next"]))
def test_rules_and_observations_of_several_experiments_equal_the_bare_encoder(name: str) -> None:
    """Completions, a chain of runs, and observations with and without rules, all in one file."""
    observed = "observe entropy pattern vision layer * head 0{} at photo row 1 col 2 token"
    chain = (
        f"run turned {{ {NEGATED} }}",
        f"run both {{ from clean into turned  {CUT} }}",
    )
    text = experiment("plain", observed.format(""), measure="")
    text += experiment("ruled", NEGATED, observed.format(""), measure="")
    text += experiment("seen", *chain, observed.format(" of turned"), measure="")
    last = "patch resid_post layer 1 at last token"
    text += experiment("chained", *chain, "from both into clean", last)
    text += experiment("r", "generate 4", NEGATED, CUT, measure='measure matches("w") as raw')
    plain, ruled, seen, chained, replies = run_text(name, text)
    assert replies.replies is not None
    own, model, expected = TOWERS[name], bare(name), np.zeros((2, 2, len(ALL)))
    for n in ALL:
        given, query = inputs(name, n, n), own.cell(n, 1, 2)
        for layer in range(LAYERS):
            clean = patterns(name, layer, n, n)[0]
            expected[0, layer, n] = entropy(clean[query]).mean()
        later = weights_under_rules(name, n)
        starts = [max(each for each in later if each <= patch) for patch in query]
        rows = [later[first][0, q - first] for first, q in zip(starts, query, strict=True)]
        expected[1, 1, n] = np.mean([float(entropy(row)) for row in rows])
        with negated_and_cut(name, n):
            vector = model.states(given)["blocks"][1][-1]
            reply = model.reply(given, 4)
        value = difference(model.run(given, blocks={1: at([-1], vector)}))
        np.testing.assert_allclose(chained.measures[0].patched[0, n], value, atol=1e-4)
        assert list(replies.replies.cells[0][n][0].ids) == reply
    expected[1, 0] = expected[0, 0]  # head 0 has the scores of the clean run
    for found, values in ((plain, expected[0]), (ruled, expected[1]), (seen, expected[1])):
        np.testing.assert_allclose(found.measures[0].patched, values, atol=1e-4)
    assert np.abs(expected[1] - expected[0]).max() > 0.01
    assert np.abs(chained.measures[0].patched - chained.measures[0].base).max() > 0.05


FRAME = "frame 2 row 1 col 2 token"
FRAME_RULES: dict[str, tuple[str, Inside]] = {
    f"scale scores vision layer 0 head 1 at {FRAME} by -1": (
        "scores",
        at_patches([7], 1, lambda _, value: -value),
    ),
    "ablate pattern vision layer 0 head 0 at frame 3 tokens with zero": (
        "pattern",
        at_patches(range(11, 15), 0, lambda _, value: 0 * value),
    ),
    f"scale q_rot vision layer 0 head 1 at {FRAME} by -3": (
        "q_rot",
        at_patches([7], 1, lambda _, value: -3 * value),
    ),
    "scale k_rot vision layer 0 head 0 at clip tokens by -1": (
        "k_rot",
        at_patches([n for n in range(20) if n % 5], 0, lambda _, value: -value),
    ),
}
"""Rule → site and edit in four frames, each with a class token before 2 x 2 patches."""


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_sites_within_attention_of_frames_equal_the_bare_encoder(mode: str) -> None:
    """A frame is a tile: patches of other frames are no keys, and the class token is one."""
    text = "".join(
        experiment(word, f"observe {word} pattern vision layer 1 head * at {FRAME}", measure="")
        for word in OBSERVATIONS
    )
    text += "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(FRAME_RULES)
    )
    every = list(videos.run(text, "video_llava", mode).values())
    observed, found = every[: len(OBSERVATIONS)], every[len(OBSERVATIONS) :]
    inside = "model.video_tower.encoder.layers.{}.self_attn"
    blocks = [videos.bare("video_llava").model.get_submodule(inside.format(n)) for n in range(2)]
    away = torch.tensor([1, 0, 2**0.5, 1])
    for n in ALL:
        kept = dict[int, Tensor]()

        def keep(start: int, own: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[start] = own.clone()
            return own

        with attended(blocks[1], keep):
            given = videos.inputs("video_llava", n, videos.record(n)["a"])
            videos.bare("video_llava").run(given)
        row, column = kept[5][:, 2], kept[5][:, [1, 3, 4], 2]
        expected = (
            entropy(row),
            (row[:, 1:] * away).sum(-1) / row[:, 1:].sum(-1),
            column.mean(-1),
        )
        for seen, values in zip(observed, expected, strict=True):
            np.testing.assert_allclose(seen.measures[0].patched[:, n], values, atol=1e-4)
        for each, (site, edit) in zip(found, FRAME_RULES.values(), strict=True):
            with attended_at(blocks[0], site, edit):
                value = videos.changed("video_llava", n)
            np.testing.assert_allclose(each.measures[0].patched[0, n], value, atol=1e-4)
    for each, rule in zip(found, FRAME_RULES, strict=True):
        assert np.abs(each.measures[0].patched - each.measures[0].base).max() > 0.01, rule


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_scores_in_merged_frames_of_a_video_equal_the_bare_encoder(name: str) -> None:
    rule = "scale scores vision layer 0 head 1 at frame 2 row 1 col 2 token by -1"
    entropies = "observe entropy pattern vision layer 0 head 1 at frame 2 row 1 col 2 token"
    text = experiment("e", "from clean into changed", rule)
    text += experiment("seen", entropies, measure="")
    found, seen = videos.run(text, name).values()
    grids = ((2, 4), (4, 2))
    own = replace(TOWERS[name], grids=grids)
    module = videos.bare(name).model.get_submodule(f"{own.blocks}.0.{own.attention}")
    for n in ALL:
        rows, cols = grids[n % 2]
        queries = [4 * rows * cols + patch for patch in own.cell(n % 2, 1, 2)]
        with attended_at(module, "scores", at_patches(queries, 1, lambda _, value: -value)):
            expected = videos.changed(name, n)
        np.testing.assert_allclose(found.measures[0].patched[0, n], expected, atol=1e-4)
        spread: list[float] = []

        def keep(_: int, row: Tensor, spread: list[float] = spread) -> Tensor:
            spread.append(float(entropy(row)))
            return row

        with attended(module, at_patches(queries, 1, keep)):
            videos.bare(name).run(videos.inputs(name, n, videos.record(n)["a"]))
        np.testing.assert_allclose(seen.measures[0].patched[0, n], np.mean(spread), atol=1e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.01


@pytest.mark.slow
def test_store_key_depends_on_site_head_layer_and_observation(tmp_path: Path) -> None:
    name = "llava_next"
    pair = bare(name).model, bare(name).processor
    where = "at photo row 1 col 2 token"
    one, others = "layer 0 head 0", ("layer 0", "layer 0 head 1", "layer 1 head 0")
    rules = [f"patch {site} vision {one} {where}" for site in ("q_rot", "k_rot")]
    rules += [f"patch pattern vision {place} {where}" for place in (one, *others)]
    rules += [f"scale scores vision {place} {where} by -1" for place in (one, *others[1:])]
    seen = [
        f"observe {word} pattern vision {place} {where}"
        for word in OBSERVATIONS
        for place in (one, *others[1:])
    ]
    lines = [*rules, *seen, f"observe distance(1) pattern vision {one} {where}"]
    path, found = folder() / "sites.mech", list[dict[str, tuple[float, ...]]]()
    for order in (range(len(lines)), reversed(range(len(lines)))):
        text = "".join(
            experiment(f"e{n}", "from hidden into clean", lines[n])
            if n < len(rules)
            else experiment(f"e{n}", lines[n], measure="")
            for n in order
        )
        path.write_text(f'mech 1\nmodel m = local("handed over")\n{HIDDEN}\n{text}', "utf-8")
        result = mechdsl.run(path, {"m": pair}, store=tmp_path)
        values = {each.name: each.measures[0].patched[0] for each in result.experiments}
        found.append({name: tuple(np.round(own, 6)) for name, own in values.items()})
    assert found[0] == found[1]
    assert len(set(found[0].values())) == len(lines)
