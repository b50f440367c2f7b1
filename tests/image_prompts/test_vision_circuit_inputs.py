"""Circuits of vision encoders with two images or a video, with vectors of other rows, and in
comparisons, against the hooks of `test_vision_circuits.py`: one unpadded prompt at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from ..rules.test_compared_circuits import expect_overlap
from . import test_interpolated_patches as large
from . import test_video_processors as videos
from .support import experiment
from .test_encoder_paths import tower
from .test_families import ALL, BLOCK, TWO, both, run_text
from .test_token_patches import TOWERS, other, shifted
from .test_video_encoder import MERGED, merged, merged_frame
from .test_video_encoder import frame_patches as separate_frame
from .test_video_encoder import patch as video_patch
from .test_vision_circuits import (
    CIRCUIT,
    END,
    Edge,
    Encoder,
    Node,
    Pass,
    errors,
    list_edges,
    placed,
    run,
    run_inputs,
    sent,
    written,
)

Sent = Mapping[Node, Tensor]


def list_ablated(rule: str, edges: Sequence[Edge]) -> Collection[Edge]:
    return {*list_edges()} - {*edges} if "all but" in rule else edges


def zeros_of(values: Sent) -> Sent:
    return {node: torch.zeros_like(own) for node, own in values.items()}


def sent_by(work: Pass, given: Mapping[str, Tensor]) -> Sent:
    """The outputs of all senders in a pass."""
    run_inputs(work, given)
    return work.given


def placed_at(values: Sent, tokens: list[int], vectors: Callable[[Node], Tensor]) -> Sent:
    """[token, width] of each sender: vectors at some tokens, and 0 at others."""
    return {node: placed(own, tokens, vectors(node)) for node, own in values.items()}


# --- two images -----------------------------------------------------------------------------------

PAIR = TWO.replace('" w1 w2"', '" w1"').replace('" w2 w2"', '" w2"')
PAIRED = ("llava_onevision", "llava_next", "gemma3", "internvl", "qwen2_5_vl")
EQUAL = PAIR.replace("{other}", "{file}")
"""Prompts with the same image twice."""


def cell(name: str, images: tuple[int, int], which: int, row: int, col: int) -> list[int]:
    """The encoder's tokens of a token of the first or second image."""
    if name == "llava_onevision":  # no tiles: 2 x 2 patches of each image
        return [4 * which + 2 * (row - 1) + col - 1]
    before = shifted(name, 0, images[0]) if which else 0
    return [before + patch for patch in TOWERS[name].cell(images[which], row, col)]


def every(name: str, images: tuple[int, int], which: int) -> list[int]:
    if name == "llava_onevision":
        return [*range(4 * which, 4 * which + 4)]
    before = shifted(name, 0, images[0]) if which else 0
    return [before + patch for patch in TOWERS[name].every(images[which])]


def spots(name: str, images: tuple[int, int]) -> list[int]:
    return cell(name, images, 0, 1, 2) + cell(name, images, 1, 2, 1)


PAIR_RULES = (
    "ablate c at two tokens with zero",
    "ablate all but c at {one row 1 col 2 token, two row 2 col 1 token} with clean",
    "ablate all but c at two row 1 col 2 token with mean of clean",
)


@pytest.mark.parametrize("mode", some(["planned", "small passes"], ["planned"]))
@pytest.mark.parametrize("name", some(PAIRED, ("llava_onevision", "qwen2_5_vl")))
def test_circuits_in_prompts_with_two_images_equal_hooks(name: str, mode: str) -> None:
    """At all patches of the second image, at tokens of both, and with means."""
    text = f"{written(CIRCUIT)}\n" + "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(PAIR_RULES)
    )
    found = run_text(name, text.replace("prompts ask", "prompts both"), mode, PAIR)
    clean = [sent_by(Pass(name), both(name, n)) for n in ALL]
    seconds = [cell(name, (m, other(m)), 1, 1, 2) for m in ALL]
    expected = [list[float]() for _ in PAIR_RULES]
    for n in ALL:
        images, base = (other(n), n), sent_by(Pass(name), both(name, n, swapped=True))
        own, theirs = spots(name, images), spots(name, (n, other(n)))
        one = cell(name, images, 1, 1, 2)

        def mean(node: Node) -> Tensor:
            return torch.stack([clean[m][node][seconds[m]] for m in ALL]).mean(0)

        def copied(node: Node, n: int = n, theirs: list[int] = theirs) -> Tensor:
            return clean[n][node][theirs]

        fills = (
            (zeros_of(base), every(name, images, 1)),
            (placed_at(base, own, copied), own),
            (placed_at(base, one, mean), one),
        )
        for rule, (fill, tokens), values in zip(PAIR_RULES, fills, expected, strict=True):
            work = Pass(name, fill, list_ablated(rule, CIRCUIT), tokens)
            values.append(run_inputs(work, both(name, n, swapped=True)))
    for result, values, rule in zip(found, expected, PAIR_RULES, strict=True):
        measure = result.measures[0]
        np.testing.assert_allclose(measure.patched[0], values, atol=1e-4, err_msg=rule)
        assert np.abs(measure.patched - measure.base).max() > 0.01, rule


@pytest.mark.parametrize("name", some(("llava_next", "qwen2_5_vl"), ("qwen2_5_vl",)))
def test_circuit_in_one_of_two_equal_images_leaves_the_other(name: str) -> None:
    """Equal images without changes share a run of the encoder."""
    rule = "ablate c at two row 1 col 2 token with zero"
    text = f"{written(CIRCUIT)}\n{experiment('e', rule)}".replace("prompts ask", "prompts both")
    [found] = run_text(name, text, block=EQUAL.replace("  corrupt changed { swap one, two }\n", ""))
    values = list[float]()
    for n in ALL:
        given, tokens = both(name, n, is_equal=True), cell(name, (n, n), 1, 1, 2)
        fill = zeros_of(sent_by(Pass(name), given))
        values.append(run_inputs(Pass(name, fill, CIRCUIT, tokens), given))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.01


# --- tiles of LLaVA-OneVision ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["photo tokens", "photo row 2 col 3 token"])
def test_circuits_at_interpolated_patches_of_tiles_equal_hooks(where: str) -> None:
    """Images of 3 x 3 tiles and a thumbnail, whose patches are interpolated to tokens."""
    rule = f"ablate all but c at {where} with clean"
    text = f"{written(CIRCUIT)}\n{experiment('e', 'from clean into changed', rule)}"
    [found] = large.run_text(text, equal=True)
    values = list[float]()
    for n, grid in enumerate(large.EQUAL):
        tokens = grid.every if where == "photo tokens" else [grid.at(2, 3)]
        given, clean = large.inputs(n, other(n), equal=True), large.inputs(n, n, equal=True)
        own = sent_by(Pass(large.LARGE), clean)
        fill = placed_at(own, tokens, lambda node, own=own, at=tokens: own[node][at])
        work = Pass(large.LARGE, fill, list_ablated(rule, CIRCUIT), tokens)
        values.append(run_inputs(work, given))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.01


# --- videos ---------------------------------------------------------------------------------------


class FramePass(Pass):
    """A pass with the blocks that read the frames of videos."""

    @property
    def encoder(self) -> Encoder:
        own = super().encoder
        return replace(own, blocks=own.blocks.replace("image_tower", "video_tower"))


def frame_tokens(name: str, n: int, frame: int) -> list[int]:
    """The encoder's tokens of a frame; families that merge frames count pairs of them."""
    if name == "video_llava":
        return separate_frame(frame)
    if name == large.FRAMES:
        return large.frame_patches(frame)
    if name in MERGED:
        return merged_frame(name, frame)
    rows, cols = GRIDS[n % 2]
    return [*range(4 * rows * cols * (frame - 1), 4 * rows * cols * frame)]


def frame_cell(name: str, n: int, frame: int) -> list[int]:
    """The encoder's tokens of row 2, column 1 of a frame."""
    if name == "video_llava":
        return [video_patch(frame, 2, 1)]
    if name == large.FRAMES:
        return [large.patch(frame, 2, 1)]
    if name in MERGED:
        return merged(name, frame, 2, 1)
    rows, cols = GRIDS[n % 2]
    grid = replace(TOWERS[name], grids=GRIDS)
    return [4 * rows * cols * (frame - 1) + patch for patch in grid.cell(n % 2, 2, 1)]


GRIDS = ((2, 4), (4, 2))
"""Rows and columns of tokens of a frame of `qwen…`, of even and odd prompts."""
WITH_VIDEOS = ("video_llava", "llava_onevision_frames", "smolvlm", "internvl", "qwen2_5_vl")
VIDEO_RULES = (
    "ablate c at frame 2 tokens with zero",
    "ablate all but c at frame 2 row 2 col 1 token with clean",
    "ablate all but c at clip tokens with zero",
)


@pytest.mark.parametrize("name", some(WITH_VIDEOS, ("video_llava", "qwen2_5_vl")))
def test_circuits_in_prompts_with_videos_equal_hooks(name: str) -> None:
    text = f"{written(CIRCUIT)}\n" + "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(VIDEO_RULES)
    )
    found, expected = videos.run(text, name).values(), [list[float]() for _ in VIDEO_RULES]
    frames = 2 if name.startswith("qwen") else 4
    for n in videos.ALL:
        first, second = (videos.inputs(name, n, videos.record(n)[key]) for key in ("a", "b"))
        clean, base = sent_by(FramePass(name), first), sent_by(FramePass(name), second)
        one = frame_cell(name, n, 2)
        zero = zeros_of(base)
        whole = [token for k in range(1, frames + 1) for token in frame_tokens(name, n, k)]
        fills = (
            (zero, frame_tokens(name, n, 2)),
            (placed_at(base, one, lambda node, clean=clean, one=one: clean[node][one]), one),
            (zero, whole),
        )
        for rule, (fill, tokens), values in zip(VIDEO_RULES, fills, expected, strict=True):
            work = FramePass(name, fill, list_ablated(rule, CIRCUIT), tokens)
            values.append(run_inputs(work, second))
    for result, values, rule in zip(found, expected, VIDEO_RULES, strict=True):
        measure = result.measures[0]
        np.testing.assert_allclose(measure.patched[0], values, atol=1e-4, err_msg=rule)
        assert np.abs(measure.patched - measure.base).max() > 0.01, rule


# --- vectors of other rows ------------------------------------------------------------------------

FEWER = (
    BLOCK.replace("prompts ask", "prompts fewer")
    .replace("  corrupt changed { file = other }\n", "")
    .replace('"{file}"', '"{other}"')
    .replace('rows "data.jsonl"', 'rows "data.jsonl"\n  where n < 4')
)


@pytest.mark.parametrize("name", some(("llava_class", "gemma3", "qwen2_5_vl"), ("llava_class",)))
def test_resampled_fills_are_vectors_of_another_row(name: str) -> None:
    """All senders of a row get vectors of one other row, or of one row of another block."""
    rule, own = "ablate all but c at photo row 1 col 2 token with resample", tower(name)
    text = f"{written(CIRCUIT)}\n{experiment('own', rule)}{experiment('of', f'{rule} of fewer')}"
    resampled, apart = run_text(name, text, block=BLOCK + FEWER)
    donors = (
        [(sent(name, m, m), own.cell(m, 1, 2)) for m in ALL],
        [(sent(name, m, other(m)), own.cell(other(m), 1, 2)) for m in ALL[:3]],
    )
    for result, given in zip((resampled, apart), donors, strict=True):
        each = np.empty((len(ALL), len(given)))
        for n in ALL:
            tokens, base = own.cell(n, 1, 2), sent(name, n, n)
            for m, (values, there) in enumerate(given):
                fill = placed_at(base, tokens, lambda node, v=values, at=there: v[node][at])
                work = Pass(name, fill, list_ablated(rule, CIRCUIT), tokens)
                each[n, m] = run(work, n, n)
        [patched] = result.measures[0].patched
        near = np.abs(each - patched[:, None])
        assert (near.min(1) < 1e-4).all()
        assert np.ptp(each, axis=1).min() > 1e-3
        if result is resampled:
            assert sorted(near.argmin(1)) == [*ALL]
            assert (near.argmin(1) != [*ALL]).all()


# --- comparisons ----------------------------------------------------------------------------------


def compare(line: str) -> str:
    return f"experiment e {{\n  model m\n  observe {line} c with d as both\n}}\n"


def test_overlap_counts_the_edges_of_the_encoder() -> None:
    others = [*CIRCUIT[:2], (("z", 1, 1), END)]
    text = f"{written(CIRCUIT)}\n{written(others, 'd')}\n{compare('overlap')}"
    [found] = run_text("llava_class", text)
    expect_overlap(
        found, frozenset(CIRCUIT), frozenset(others), len(list_edges()), "vision encoder"
    )


def test_edge_auroc_orders_every_edge_of_the_encoder(tmp_path: Path) -> None:
    every = list_edges()
    sizes = np.random.default_rng(0).permutation(len(every)) - len(every) / 2 - 0.25
    content = {
        written([edge]).removeprefix("circuit c = "): {"score": float(size), "in_graph": n < 5}
        for n, (edge, size) in enumerate(zip(every, sizes, strict=True))
    }
    (tmp_path / "graph.json").write_text(json.dumps({"edges": content}), "utf-8")
    text = f'circuit c = saved("{(tmp_path / "graph.json").as_posix()}")\n{written(CIRCUIT, "d")}\n'
    [found] = run_text("llava_class", text + compare("edge_auroc"))
    true = [size for edge, size in zip(every, sizes, strict=True) if edge in CIRCUIT]
    rest = [size for edge, size in zip(every, sizes, strict=True) if edge not in CIRCUIT]
    wins = [abs(one) > abs(other) for one in true for other in rest]
    assert found.measures[0].patched[0, 0] == pytest.approx(np.mean(wins))


def test_edge_auroc_of_listed_circuits_asks_for_a_file_of_scores() -> None:
    text = f"{written(CIRCUIT)}\n{written(CIRCUIT[:1], 'd')}\n{compare('edge_auroc')}"
    [found] = errors("llava_class", text)
    assert found.code == "E0207"
    assert found.hint.startswith("read it from a file that has these scores: `saved(")


@pytest.mark.parametrize("line", ["overlap", "edge_auroc"])
def test_comparison_of_circuits_of_two_stacks_is_an_error(line: str) -> None:
    [found] = errors(
        "llava_class", f"{written(CIRCUIT)}\ncircuit d = embed -> logits\n{compare(line)}"
    )
    assert found.code == "E0108"
    assert "of two circuits in the vision encoder and in the language model" in found.message
    assert found.help_text.startswith("compare two circuits of the vision encoder, or two of")
