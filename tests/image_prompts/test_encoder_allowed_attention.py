"""`allow attention vision`, against hooks on the bare model's encoder that compute attention from
its projections, with an explicit mask over all tiles, windows or frames of an image: one unpadded
prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from . import test_video_processors as videos
from .reference import at
from .support import check_cells, experiment
from .test_encoder_attention import module_of, run_in_both, try_line, with_one_answer
from .test_families import ALL, BLOCK, TWO, bare, both, difference, inputs, run_text
from .test_token_patches import HEADS, LAYERS, TOWERS, edited, other, shifted, state

NAMES = (
    *("llava_next", "llava_next_square", "internvl", "idefics3", "smolvlm", "idefics2_wide"),
    "qwen2_5_vl",
)
QUICK = ("llava_next", "qwen2_5_vl")
See = Callable[[Tensor], None]
"""Changes a mask [head, query, key] of all of an image's tokens in the encoder, in place."""
Look = Callable[[Tensor], None]
"""Reads weights [head, query, key]."""


def turn(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [token, head, width]."""
    first, second = vectors.chunk(2, -1)
    return vectors * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def keep(site: str, vectors: Tensor) -> Tensor:
    return vectors


def project(
    module: Any, hidden: Tensor, given: dict[str, Any], edit: Callable[[str, Tensor], Tensor] = keep
) -> list[Tensor]:
    """Queries, keys and values [head, token, width], over all tiles.

    edit: changes `q` and `k` [token, head, width] before they are rotated.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if hasattr(module, "qkv"):
        q, k, v = module.qkv(flat).reshape(len(flat), 3, module.num_heads, -1).unbind(1)
        q, k = edit("q", q), edit("k", k)
        q, k = (turn(each, *given["position_embeddings"]) for each in (q, k))
    else:
        parts = [getattr(module, f"{name}_proj")(flat) for name in "qkv"]
        for n, name in enumerate(("q_norm", "k_norm")):
            parts[n] = getattr(module, name, torch.nn.Identity())(parts[n])
        q, k, v = (each.reshape(len(flat), module.num_heads, -1) for each in parts)
        q, k = edit("q", q), edit("k", k)
    return [each.transpose(0, 1) for each in (q, k, v)]


def bounds(hidden: Tensor, given: dict[str, Any]) -> list[int]:
    """The first token of each tile or window, and the number of tokens."""
    if "cu_seqlens" in given:
        return given["cu_seqlens"].tolist()
    tiles, size = hidden.shape[:2]
    return [*range(0, tiles * size + 1, size)]


@contextmanager
def opened(module: Any, see: See, look: Look = lambda weights: None) -> Generator[None]:
    """Let a module attend with a changed mask, and check that it attends the same without."""

    def attend(_: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else given["hidden_states"]
        q, k, v = project(module, hidden, given)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        seen = torch.zeros(scores.shape, dtype=torch.bool)
        for first, last in pairwise(bounds(hidden, given)):
            seen[:, first:last, first:last] = True
        results: list[Tensor] = []
        for change in (lambda seen: None, see):
            change(seen)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            results.append((weights @ v).transpose(0, 1).flatten(1))
        names = ("proj", "out_proj", "projection_layer")
        last = next(getattr(module, name) for name in names if hasattr(module, name))
        plain, changed = (last(each).view(hidden.shape) for each in results)
        whole = isinstance(output, tuple)
        torch.testing.assert_close(plain, output[0] if whole else output, atol=1e-4, rtol=1e-4)
        look(weights)
        return (changed, *output[1:]) if whole else changed

    handle = module.register_forward_hook(attend, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def edges(
    queries: Sequence[int],
    keys: Sequence[int],
    heads: Sequence[int] = range(HEADS),
    blocked: Sequence[int] = (),
) -> See:
    def see(seen: Tensor) -> None:
        for head in heads:
            for query in queries:
                seen[head, query, list(keys)] = True
                seen[head, query, list(blocked)] = False

    return see


def under(name: str, layer: int, see: Callable[[int], See]) -> list[float]:
    """The difference of each prompt with its other image."""
    found: list[float] = []
    for n in ALL:
        with opened(module_of(name, layer), see(n)):
            found.append(difference(bare(name).run(inputs(name, n, other(n)))))
    return found


Values = dict[tuple[int | str, ...], list[float]]


def by_head(name: str) -> Values:
    own = TOWERS[name]

    def see(n: int, h: int) -> See:
        return edges(own.every(other(n)), own.cell(other(n), 1, 1), [h])

    return {(h,): under(name, 0, lambda n, h=h: see(n, h)) for h in range(HEADS)}


def everything(name: str) -> Values:
    own = TOWERS[name]
    return {(): under(name, 0, lambda n: edges(own.every(other(n)), own.every(other(n))))}


def of_one_query(name: str) -> Values:
    """Keys in other tiles are patched before, and one of them is blocked."""
    own, found = TOWERS[name], list[float]()
    for n in ALL:
        blocked = own.cell(other(n), 1, 1)
        see = edges(own.cell(other(n), 1, 2), own.every(other(n)), blocked=blocked)
        clean = state(name, "resid_pre", 0, n, n)[own.cell(n, 1, 1)]
        patch = edited(name, "resid_pre", 0, at(own.cell(other(n), 1, 1), -2 * clean))
        with patch, opened(module_of(name, 0), see):
            found.append(difference(bare(name).run(inputs(name, n, other(n)))))
    return {(): found}


CASES: dict[str, tuple[list[str], Callable[[str], Values]]] = {
    "allow attention vision layer 0 head * from photo tokens to photo row 1 col 1 token": (
        ["head"],
        by_head,
    ),
    "allow attention vision layer 0 from photo tokens to photo tokens": ([], everything),
    "set resid_pre vision layer 0 at photo row 1 col 1 token to "
    "-2 * value(resid_pre vision layer 0 at photo row 1 col 1 token) of clean\n"
    "  allow attention vision layer 0 from photo row 1 col 2 token to photo tokens\n"
    "  block attention vision layer 0 from photo row 1 col 2 token to photo row 1 col 1 token": (
        [],
        of_one_query,
    ),
}


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_allowed_patches_of_other_tiles_equal_a_mask_on_the_bare_encoder(
    name: str, mode: str
) -> None:
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(CASES)
    )
    base = [difference(bare(name).run(inputs(name, n, other(n)))) for n in ALL]
    largest = [
        check_cells(found, axes, expected(name), base, rule)
        for found, (rule, (axes, expected)) in zip(
            run_text(name, text, mode), CASES.items(), strict=True
        )
    ]
    assert max(largest) > 0.1
    assert min(largest) > 0.01, largest


@pytest.mark.parametrize(
    "line",
    ["block attention vision layer 0 from {0}", "set attention vision layer 0 from {0} to 0"],
)
def test_other_rules_act_on_allowed_patches(line: str) -> None:
    """Patches that are allowed, and then have no weight, change nothing."""
    edges = "photo tile 1 tokens to photo tile 2 tokens"
    allow = f"allow attention vision layer 0 from {edges}"
    text = "".join(
        experiment(f"e{n}", "from clean into changed", *rules)
        for n, rules in enumerate(([allow], [allow, line.format(edges)]))
    )
    block = BLOCK.replace('rows "data.jsonl"', 'rows "data.jsonl"\n  where n = 3')
    alone, both = (each.measures[0] for each in run_text("llava_next", text, block=block))
    np.testing.assert_allclose(both.patched, both.base, atol=1e-4)
    assert np.abs(alone.patched - alone.base).max() > 0.01


# --- in combination -------------------------------------------------------------------------------

SEEN = "photo tokens to photo row 1 col 1 token"
ALLOW = f"allow attention vision layer 0 from {SEEN}"


def weights_of(name: str, n: int, see: See) -> Tensor:
    """[head, query, key] of block 0 in the clean run."""
    found: list[Tensor] = []
    with opened(module_of(name, 0), see, found.append):
        bare(name).run(inputs(name, n, n))
    return found[0]


@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_observations_of_allowed_keys_equal_weights_of_the_bare_encoder(name: str) -> None:
    """In two experiments, one of which has the rule."""
    lines = (
        f"observe attention vision layer 0 head * from {SEEN}",
        "observe entropy pattern vision layer 0 head * at photo tokens",
    )
    text = "".join(
        experiment(f"e{n}", *rules, line, measure="")
        for n, (line, rules) in enumerate((line, own) for line in lines for own in ((ALLOW,), ()))
    )
    total, plain_total, spread, plain_spread = (each.measures[0] for each in run_text(name, text))
    own = TOWERS[name]
    for n in ALL:
        every, keys = own.every(n), own.cell(n, 1, 1)
        for see, sums, entropies in (
            (edges(every, keys), total, spread),
            (edges([], []), plain_total, plain_spread),
        ):
            weights = weights_of(name, n, see)
            np.testing.assert_allclose(
                sums.patched[:, n], weights[:, every][:, :, keys].sum(2).mean(1), atol=1e-5
            )
            rows = weights[:, every]
            entropy = -torch.where(rows > 0, rows * rows.log(), 0.0).sum(-1).mean(-1)
            np.testing.assert_allclose(entropies.patched[:, n], entropy, atol=1e-4)
    assert np.abs(total.patched - plain_total.patched).max() > 0.01
    assert np.abs(spread.patched - plain_spread.patched).max() > 0.01


@contextmanager
def opened_in_all(name: str, see: See) -> Generator[None]:
    with ExitStack() as stack:
        for layer in range(LAYERS):
            stack.enter_context(opened(module_of(name, layer), see))
        yield


@pytest.mark.parametrize("name", some(["llava_next", "internvl", "qwen2_5_vl"], ["qwen2_5_vl"]))
def test_replies_and_runs_with_allowed_keys_in_one_of_two_images_equal_hooks(name: str) -> None:
    """Two experiments of one file, on the same images: completions, and a run that is read."""
    own = TOWERS[name]
    allow = "allow attention vision layers * from {0} tokens to {0} tokens"
    text = (
        f"experiment r {{\nmodel m\nprompts both\ngenerate 4\n{allow.format('two')}\n"
        'measure matches("w") as raw\nstats bootstrap(100) confidence 95% correct none\n}\n'
        f"experiment s {{\nmodel m\nprompts both\nrun open {{ {allow.format('one')} }}\n"
        "from open into clean\npatch resid_post layer 1 at last token\n"
        "measure logit(answer) - logit(wrong) as delta\n"
        "stats bootstrap(100) confidence 95% correct none\n}\n"
    )
    replies, second = run_in_both(name, TWO, text)
    assert replies.replies is not None
    differ, effects = 0, list[float]()
    for n in ALL:
        given, model, start = both(name, n), bare(name), shifted(name, n, n)
        later = [start + patch for patch in own.every(other(n))]
        plain = model.reply(given, 4)
        with opened_in_all(name, edges(later, later)):
            expected = model.reply(given, 4)
        assert list(replies.replies.runs["clean"][n][0].ids) == plain
        assert list(replies.replies.cells[0][n][0].ids) == expected
        differ += plain != expected
        with opened_in_all(name, edges(own.every(n), own.every(n))):
            vector = model.states(given)["blocks"][1][-1]
        value = difference(model.run(given, blocks={1: at([-1], vector)}))
        np.testing.assert_allclose(second.measures[0].patched[0, n], value, atol=1e-4)
        effects.append(value - second.measures[0].base[0, n])
    assert differ
    assert np.abs(effects).max() > 0.05


def check_frames(name: str, modules: Sequence[Any], see: Callable[[int], See], rule: str) -> None:
    [found] = videos.run(experiment("e", "from clean into changed", rule), name).values()
    for n in ALL:
        with opened(modules[0], see(n)):
            value = videos.changed(name, n)
        np.testing.assert_allclose(found.measures[0].patched[0, n], value, atol=1e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.01


def test_allowed_patches_of_another_frame_equal_a_mask_on_the_bare_encoder() -> None:
    """Frames of Video-LLaVA have a class token before 2 x 2 patches."""
    inside = "model.video_tower.encoder.layers.0.self_attn"
    module = videos.bare("video_llava").model.get_submodule(inside)
    see = edges(range(1, 5), [12, 13, 17])
    rule = "allow attention vision layer 0 from frame 1 tokens to {frame 3 row 1 col 2 token, "
    rule += "frame 3 row 2 col 1 token, frame 4 row 1 col 2 token}"
    check_frames("video_llava", [module], lambda n: see, rule)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_allowed_patches_of_merged_frames_equal_a_mask_on_the_bare_encoder(name: str) -> None:
    own, grids = TOWERS[name], ((2, 4), (4, 2))
    own = replace(own, grids=grids)
    module = videos.bare(name).model.get_submodule(f"{own.blocks}.0.{own.attention}")

    def see(n: int) -> See:
        rows, cols = grids[n % 2]
        count = 4 * rows * cols
        return edges(range(count), [count + patch for patch in own.cell(n % 2, 1, 2)])

    rule = "allow attention vision layer 0 from frame 1 tokens to frame 2 row 1 col 2 token"
    check_frames(name, [module], see, rule)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl", "llava_next"])
def test_allowed_keys_in_a_replaced_block_are_those_of_its_replacement(name: str) -> None:
    replace_it = "replace block vision layer 0 with block vision layer 1"
    text = experiment("e", "from clean into changed", replace_it, ALLOW)
    [found] = run_text(name, text)
    own, model = TOWERS[name], deepcopy(bare(name))
    blocks = model.model.get_submodule(own.blocks)
    blocks[0] = deepcopy(blocks[1])
    values = list[float]()
    for n in ALL:
        see = edges(own.every(other(n)), own.cell(other(n), 1, 1))
        with opened(blocks[0].get_submodule(own.attention), see):
            values.append(difference(model.run(inputs(name, n, other(n)))))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)


KEY = "photo row 1 col 1 token"
LINES = (
    ("internvl", f"allow attention vision layer 0 from photo tile 1 tokens to {KEY}"),
    ("qwen2_vl", f"allow attention vision layers * from photo tokens to {KEY}"),
    ("qwen2_5_vl", f"allow attention vision layer 1 from photo tokens to {KEY}"),
)


@pytest.mark.parametrize(("name", "line"), LINES)
def test_allowed_keys_that_are_seen_are_an_error(name: str, line: str) -> None:
    """In Qwen2.5-VL, this layer has no windows."""
    [problem] = try_line(name, line)
    assert problem.code == "E0332"
    assert problem.label_text == "a patch attends to all patches of its tile"


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_allowed_keys_in_another_image_are_an_error(name: str) -> None:
    rule = "allow attention vision layer 0 from one tokens to {one tokens, two tokens}"
    [problem] = try_line(name, rule, block=with_one_answer(TWO))
    assert problem.code == "E0108"
    assert "between patches of different images" in problem.message
