"""Attention between patches in vision encoders of prompts with images, against a reference that
replaces the library's own attention in the bare model, one unpadded prompt at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.run.panel import execute
from mechdsl.forward.hooks import attention
from mechdsl.loading.loader import adopt_model
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.results.assembly.collection import check_denominators
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import as_in_the_data, check_file, run_on
from ..quick import some
from . import test_video_processors as videos
from .reference import Edit, at, edited_module, record_value
from .support import MEASURE, check_cells, experiment
from .test_families import ALL, BLOCK, TWO, bare, both, difference, folder, inputs, loaded, run_text
from .test_token_patches import HEADS, LAYERS, Tower, other, shifted, turned
from .test_token_patches import TOWERS as TILED_TOWERS

Change = Callable[[Tensor, Sequence[int]], Tensor]
"""(weights [query, key of the tile], indices of changed keys) → new weights."""
TOWERS = {"llava_class": Tower(front=1), "paligemma": Tower(), **TILED_TOWERS}
NAMES = tuple(TOWERS)
QUICK = ("llava_next", "qwen2_5_vl")


def module_of(name: str, layer: int) -> Any:
    own = TOWERS[name]
    return bare(name).model.get_submodule(f"{own.blocks}.{layer}.{own.attention}")


def unchanged(first: int, value: Tensor) -> Tensor:
    return value


NO_EDITS: Mapping[str, Callable[[int, Tensor], Tensor]] = {}


@contextmanager
def attended(
    module: Any,
    change: Callable[[int, Tensor], Tensor] = unchanged,
    *,
    again: bool = False,
    before: Mapping[str, Callable[[int, Tensor], Tensor]] = NO_EDITS,
) -> Generator[None]:
    """Let a module attend with changed weights.

    change: (number of a tile's first token, weights [heads, query, key]) → new weights.
    again: Whether several passes read the same images.
    before: The same for `q_rot` and `k_rot` [heads, token, width], and `scores` [heads, query,
        key].
    """
    code: Any = sys.modules[type(module).__module__]
    plain, kind = code.eager_attention_forward, module.config._attn_implementation_internal
    passed = 0

    def attend(
        own: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **given: Any,
    ) -> Any:
        nonlocal passed
        if own is not module:
            return plain(own, query, key, value, attention_mask, **given)
        found: list[Tensor] = []
        for n, (q, k) in enumerate(zip(query, key, strict=True)):
            q = before.get("q_rot", unchanged)(passed, q.clone())
            k = before.get("k_rot", unchanged)(passed, k.clone())
            tile = q @ k.transpose(-1, -2) * query.shape[-1] ** -0.5
            tile = (
                tile if attention_mask is None else tile + attention_mask[n % len(attention_mask)]
            )
            tile = before.get("scores", unchanged)(passed, tile)
            found.append(change(passed, tile.softmax(-1)))
            passed += tile.shape[-1]
        weights = torch.stack(found)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    def begin(*_: Any) -> None:
        nonlocal passed
        assert again or not passed
        passed = 0

    handle = module.register_forward_pre_hook(begin)
    code.eager_attention_forward = attend
    module.config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        handle.remove()
        code.eager_attention_forward = plain
        module.config._attn_implementation_internal = kind


def blocked(weights: Tensor, keys: Sequence[int]) -> Tensor:
    weights[..., list(keys)] = 0
    return (weights / weights.sum(-1, keepdim=True)).nan_to_num(0)


def multiplied(factor: float) -> Change:
    def change(weights: Tensor, keys: Sequence[int]) -> Tensor:
        weights[..., list(keys)] *= factor
        return weights / weights.sum(-1, keepdim=True)

    return change


def fixed(value: float) -> Change:
    def change(weights: Tensor, keys: Sequence[int]) -> Tensor:
        keys = list(keys)
        weights[..., keys] = 0
        others = weights.sum(-1, keepdim=True)
        weights *= (1 - value * len(keys)) / others.clamp(min=1e-30)
        weights[..., keys] = torch.where(others > 0, value, 1 / len(keys))
        return weights

    return change


def equal(weights: Tensor, keys: Sequence[int]) -> Tensor:
    keys = list(keys)
    weights[..., keys] = weights[..., keys].mean(-1, keepdim=True)
    return weights


def between(
    queries: Sequence[int],
    keys: Sequence[int],
    change: Change,
    heads: Sequence[int] = range(HEADS),
) -> Callable[[int, Tensor], Tensor]:
    """Change the weights of queries on keys of the same tile."""

    def edit(first: int, weights: Tensor) -> Tensor:
        size = weights.shape[-1]
        asking = [q - first for q in queries if first <= q < first + size]
        asked = [k - first for k in keys if first <= k < first + size]
        if asking and asked:
            for head in heads:
                weights[head, asking] = change(weights[head, asking], asked)
        return weights

    return edit


def patterns(name: str, layer: int, number: int, image: int) -> Tensor:
    """[head, token of the encoder, token of the encoder] in the clean run of a prompt."""
    found: list[tuple[int, Tensor]] = []

    def keep(first: int, weights: Tensor) -> Tensor:
        found.append((first, weights))
        return weights

    with attended(module_of(name, layer), keep):
        bare(name).run(inputs(name, number, image))
    total = sum(weights.shape[-1] for _, weights in found)
    whole = torch.zeros(HEADS, total, total)
    for first, weights in found:
        own = slice(first, first + weights.shape[-1])
        whole[:, own, own] = weights
    return whole


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_observed_attention_equals_weights_of_the_bare_encoder(name: str, mode: str) -> None:
    """Summed over the patches of the keys, averaged over those of the query."""
    text = experiment(
        "one",
        "observe attention vision layer * head * from photo row 1 col 2 token "
        "to photo row 1 col 1 token",
        measure="",
    ) + experiment(
        "all", "observe attention vision layer 1 from photo tokens to photo tokens", measure=""
    )
    one, every = run_text(name, text, mode)
    own = TOWERS[name]
    largest = 0.0
    weights = {(layer, n): patterns(name, layer, n, n) for layer in range(LAYERS) for n in ALL}
    for number, cell in enumerate(one.cells):
        layer, head = int(cell.coords["layer"]), int(cell.coords["head"])
        expected = [
            float(weights[layer, n][head][own.cell(n, 1, 2)][:, own.cell(n, 1, 1)].sum(1).mean())
            for n in ALL
        ]
        np.testing.assert_allclose(one.measures[0].patched[number], expected, atol=1e-5)
        largest = max(largest, *expected)
    assert largest > 0.05
    expected = [
        float(weights[1, n][:, own.every(n)][:, :, own.every(n)].sum(2).mean()) for n in ALL
    ]
    np.testing.assert_allclose(every.measures[0].patched[0], expected, atol=1e-5)


Edits = Callable[[int, Tensor], Tensor]
"""(number of a tile's first token, weights [head, query, key]) → new weights."""
Values = dict[tuple[int | str, ...], list[float]]


def under(name: str, layer: int, edit: Callable[[int], Edits]) -> list[float]:
    """The difference of each prompt with its other image, under an edit of its number."""
    found: list[float] = []
    for n in ALL:
        with attended(module_of(name, layer), edit(n)):
            found.append(difference(bare(name).run(inputs(name, n, other(n)))))
    return found


def one_key(name: str) -> Values:
    own = TOWERS[name]
    return {
        (layer,): under(
            name,
            layer,
            lambda n: between(own.every(other(n)), own.cell(other(n), 1, 1), blocked),
        )
        for layer in range(LAYERS)
    }


def by_head(name: str) -> Values:
    own = TOWERS[name]
    return {
        (h,): under(
            name,
            0,
            lambda n, h=h: between(
                own.every(other(n)), own.cell(other(n), 1, 2), multiplied(50), [h]
            ),
        )
        for h in range(HEADS)
    }


def given(name: str) -> Values:
    own = TOWERS[name]

    def keys(n: int) -> list[int]:
        return [*own.cell(other(n), 1, 1), *own.cell(other(n), 1, 2)]

    return {(): under(name, 1, lambda n: between(own.every(other(n)), keys(n), fixed(0.03)))}


def leveled(name: str) -> Values:
    own = TOWERS[name]
    return {(): under(name, 1, lambda n: between(own.every(other(n)), own.every(other(n)), equal))}


def of_one_query(name: str) -> Values:
    """One token's patches don't attend to two others, and another site is patched."""
    own, found = TOWERS[name], list[float]()
    block = bare(name).model.get_submodule(f"{own.blocks}.0")

    def flat(edit: Edit) -> AbstractContextManager[None]:
        return edited_module(block, lambda value: edit(value.flatten(0, -2)), is_input=False)

    for n in ALL:
        keys = [*own.cell(other(n), 1, 1), *own.cell(other(n), 2, 1)]
        cut = between(own.cell(other(n), 1, 2), keys, blocked)
        clean = record_value(flat, partial(bare(name).run, inputs(name, n, n)))
        patch = at(own.cell(other(n), 1, 1), clean[own.cell(n, 1, 1)])
        with attended(module_of(name, 1), cut), flat(patch):
            found.append(difference(bare(name).run(inputs(name, n, other(n)))))
    return {(): found}


CASES: dict[str, tuple[list[str], Callable[[str], Values]]] = {
    "block attention vision layer * from photo tokens to photo row 1 col 1 token": (
        ["layer"],
        one_key,
    ),
    "reweight attention vision layer 0 head * from photo tokens to photo row 1 col 2 token by 50": (
        ["head"],
        by_head,
    ),
    "set attention vision layer 1 from photo tokens to {photo row 1 col 1 token, photo row 1 col 2 "
    "token} to 0.03": ([], given),
    "set attention vision layer 1 from photo tokens to photo tokens to uniform": ([], leveled),
    "block attention vision layer 1 from photo row 1 col 2 token to {photo row 1 col 1 token, "
    "photo row 2 col 1 token}\n  patch resid_post vision layer 0 at photo row 1 col 1 token": (
        [],
        of_one_query,
    ),
}


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_rules_on_attention_equal_changed_weights_of_the_bare_encoder(name: str, mode: str) -> None:
    """All rules in one file, the largest effects over 0.1."""
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(CASES)
    )
    base = [difference(bare(name).run(inputs(name, n, other(n)))) for n in ALL]
    largest: list[float] = []
    for found, (rule, (axes, expected)) in zip(
        run_text(name, text, mode), CASES.items(), strict=True
    ):
        largest.append(check_cells(found, axes, expected(name), base, rule))
    assert max(largest) > 0.1
    assert min(largest) > 0.01


# --- in combination -------------------------------------------------------------------------------


def with_one_answer(block: str) -> str:
    block = block.replace("corrupt changed { swap one, two }\n", "")
    return block.replace('" w1 w2"', '" w1"').replace('" w2 w2"', '" w2"')


def run_in_both(name: str, block: str, text: str) -> list[ExperimentResult]:
    return run_text(name, text, "planned", with_one_answer(block))


@contextmanager
def attended_in_all(name: str, change: Edits) -> Generator[None]:
    """Change the weights of all layers, in several passes."""
    with ExitStack() as stack:
        for layer in range(LAYERS):
            stack.enter_context(attended(module_of(name, layer), change, again=True))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", some(["llava_next", "gemma3", "qwen2_5_vl", "qwen3_vl"], []))
def test_replies_and_runs_with_blocked_attention_in_one_of_two_images_equal_hooks(
    name: str,
) -> None:
    """Two experiments of one file, on the same images: completions, and a run that is read."""
    own = TOWERS[name]
    cut = "block attention vision layers * from {0} tokens to {0} tokens"
    text = (
        f"experiment r {{\nmodel m\nprompts both\ngenerate 4\n{cut.format('two')}\n"
        'measure matches("w") as raw\nstats bootstrap(100) confidence 95% correct none\n}\n'
        f"experiment s {{\nmodel m\nprompts both\nrun cut {{ {cut.format('one')} }}\n"
        "from cut into clean\npatch resid_post layer 1 at last token\n"
        "measure logit(answer) - logit(wrong) as delta\n"
        "stats bootstrap(100) confidence 95% correct none\n}\n"
    )
    replies, second = run_in_both(name, TWO, text)
    assert replies.replies is not None
    differ, effects = 0, []
    for n in ALL:
        given, model, start = both(name, n), bare(name), shifted(name, n, n)
        later = between(
            [start + patch for patch in own.every(other(n))],
            [start + patch for patch in own.every(other(n))],
            blocked,
        )
        plain = model.reply(given, 4)
        with attended_in_all(name, later):
            expected = model.reply(given, 4)
        assert list(replies.replies.runs["clean"][n][0].ids) == plain
        assert list(replies.replies.cells[0][n][0].ids) == expected
        differ += plain != expected
        with attended_in_all(name, between(own.every(n), own.every(n), blocked)):
            vector = model.states(given)["blocks"][1][-1]
        value = difference(model.run(given, blocks={1: at([-1], vector)}))
        np.testing.assert_allclose(second.measures[0].patched[0, n], value, atol=1e-4)
        effects.append(value - second.measures[0].base[0, n])
    assert differ
    assert np.abs(effects).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_attention_of_several_images_in_a_prompt_equals_that_of_each(name: str) -> None:
    """Keys in the other image have no weight."""
    text = experiment(
        "e",
        "observe attention vision layer * head * from two row 1 col 2 token "
        "to {one tokens, two row 1 col 1 token}",
        measure="",
    ).replace("prompts ask", "prompts both")
    [found] = run_in_both(name, TWO, text)
    own = TOWERS[name]
    for number, cell in enumerate(found.cells):
        layer, head = int(cell.coords["layer"]), int(cell.coords["head"])
        expected: list[float] = []
        for n in ALL:
            weights = patterns(name, layer, n, other(n))[head]
            here = weights[own.cell(other(n), 1, 2)][:, own.cell(other(n), 1, 1)]
            expected.append(float(here.sum(1).mean()))
        np.testing.assert_allclose(found.measures[0].patched[number], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_blocked_attention_in_merged_frames_of_a_video_equals_the_bare_encoder(name: str) -> None:
    rule = "block attention vision layer 0 from frame 2 tokens to frame 2 row 1 col 1 token"
    found = videos.run(experiment("e", "from clean into changed", rule), name)["e"]
    grids, values = ((2, 4), (4, 2)), list[float]()
    own = replace(TOWERS[name], grids=grids)
    module = videos.bare(name).model.get_submodule(f"{own.blocks}.0.{own.attention}")
    for n in ALL:
        rows, cols = grids[n % 2]
        start = 4 * rows * cols
        queries = range(start, 2 * start)
        keys = [start + patch for patch in own.cell(n % 2, 1, 1)]
        with attended(module, between(queries, keys, blocked)):
            values.append(videos.changed(name, n))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)
    assert np.abs(np.array(values) - found.measures[0].base[0]).max() > 0.01


FRAME_RULES: dict[str, tuple[Sequence[int], Sequence[int], Change]] = {
    "block attention vision layer 0 from frame 2 tokens to frame 2 row 1 col 1 token": (
        range(6, 10),
        [6],
        blocked,
    ),
    "reweight attention vision layer 0 from clip tokens to frame 3 row 1 col 2 token by 50": (
        [n for n in range(20) if n % 5],
        [12],
        multiplied(50),
    ),
    "set attention vision layer 0 from frame 1 tokens to frame 1 row 2 col * tokens to 0.03": (
        range(1, 5),
        [3, 4],
        fixed(0.03),
    ),
}
"""Rule → queries and keys among the tokens of four frames, each with a class token before 2 x 2
patches, and the new weights."""


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_attention_in_the_encoder_of_frames_equals_the_bare_encoder(mode: str) -> None:
    """Video-LLaVA, which passes other arguments to the attention of its encoders."""
    seen = (
        "observe attention vision layer 1 head * from frame 2 row 1 col 2 token to frame 2 tokens"
    )
    patched = "from clean into changed"
    text = experiment("seen", seen, measure="") + "".join(
        experiment(f"e{n}", patched, rule) for n, rule in enumerate(FRAME_RULES)
    )
    observed, *found = videos.run(text, "video_llava", mode).values()
    model = videos.bare("video_llava").model
    first, second = (
        model.get_submodule(f"model.video_tower.encoder.layers.{layer}.self_attn")
        for layer in range(2)
    )
    values, weights = list[list[float]](), list[list[float]]()
    for n in ALL:
        kept = dict[int, Tensor]()

        def keep(start: int, own: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[start] = own
            return own

        with attended(second, keep):
            own = videos.inputs("video_llava", n, videos.record(n)["a"])
            videos.bare("video_llava").run(own)
        weights.append(kept[5][:, 2, 1:].sum(-1).tolist())
        values.append([])
        for change in FRAME_RULES.values():
            with attended(first, between(*change)):
                values[-1].append(videos.changed("video_llava", n))
    np.testing.assert_allclose(observed.measures[0].patched, np.transpose(weights), atol=1e-5)
    for rule, each, expected in zip(FRAME_RULES, found, np.transpose(values), strict=True):
        np.testing.assert_allclose(each.measures[0].patched[0], expected, atol=1e-4, err_msg=rule)
        assert np.abs(expected - each.measures[0].base[0]).max() > 0.01, rule


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_blocked_keys_in_another_image_change_nothing(name: str) -> None:
    rule = "block attention vision layer 0 from two tokens to"
    text = "".join(
        experiment(f"e{n}", f"{rule} {keys}").replace("prompts ask", "prompts both")
        for n, keys in enumerate(
            ("{one row 1 col 2 token, two row 1 col 1 token}", "two row 1 col 1 token")
        )
    )
    more, own = (each.measures[0] for each in run_in_both(name, TWO, text))
    np.testing.assert_allclose(more.patched, own.patched, atol=1e-5)
    assert np.abs(own.patched[0] - own.base[0]).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl", "gemma3"])
def test_observed_attention_after_a_rule_includes_its_effect(name: str) -> None:
    own = TOWERS[name]
    text = experiment(
        "e",
        "scale resid_post vision layer 0 at photo row 1 col 1 token by -2",
        "observe attention vision layer 1 head * from photo row 1 col 2 token to photo tokens",
        measure="",
    )
    [found] = run_text(name, text)
    block = bare(name).model.get_submodule(f"{own.blocks}.0")
    values: list[list[float]] = []
    for n in ALL:

        def edit(value: Tensor, n: int = n) -> Tensor:
            return turned(own.cell(n, 1, 1))(value.flatten(0, -2))

        with edited_module(block, edit, is_input=False):
            weights = patterns(name, 1, n, n)
        here = weights[:, own.cell(n, 1, 2)][:, :, own.every(n)].sum(2).mean(1)
        values.append(here.tolist())
    np.testing.assert_allclose(found.measures[0].patched, np.array(values).T, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl", "qwen3_vl"])
def test_blocked_attention_in_a_replaced_block_is_that_of_its_replacement(name: str) -> None:
    text = experiment(
        "e",
        "from clean into changed",
        "replace block vision layer 0 with block vision layer 1",
        "block attention vision layer 0 from photo tokens to photo row 1 col 1 token",
    )
    [found] = run_text(name, text)
    own, model = TOWERS[name], deepcopy(bare(name))
    blocks = model.model.get_submodule(own.blocks)
    blocks[0] = deepcopy(blocks[1])
    module, values = blocks[0].get_submodule(own.attention), list[float]()
    for n in ALL:
        cut = between(own.every(other(n)), own.cell(other(n), 1, 1), blocked)
        with attended(module, cut):
            values.append(difference(model.run(inputs(name, n, other(n)))))
        plain = difference(model.run(inputs(name, n, other(n))))
        assert abs(values[-1] - plain) > 1e-3
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)


# --- errors ---------------------------------------------------------------------------------------

LINES = {
    "block attention vision layer 0 from last token to photo tokens": "E0310",
    "block attention vision layer 0 from photo tokens to last token": "E0310",
    "block attention vision layer 0 from photo tokens to photo row 9 col 1 token": "E0310",
    "block attention vision layer 2 from photo tokens to photo row 1 col 1 token": "E0302",
    "block attention vision layer 0 head 2 from photo tokens to photo row 1 col 1 token": "E0301",
    "block attention vision layer 0 from photo tile 1 tokens to photo tile 2 tokens": "E0332",
    "set attention vision layer 0 from photo tokens to photo row 1 col 1 token to 0.3": "E0332",
    "block attention vision from photo tokens to photo row 1 col 1 token": "E0304",
    "block attention vision layer 0 from photo tokens to photo row 1 col 1 token\n  using atp": (
        "E0608"
    ),
    "ablate scores vision layer 0 head 0 at photo row 1 col 2 token with mean": "E0108",
    "patch pattern vision layer 0 head 0 at photo row 1 col 2 token": "E0108",
    "ablate pattern vision layer 0 head 0 at photo row 1 col 2 token with resample": "E0108",
    "patch k_rot vision layer 0 head 0 at last token": "E0310",
    "ablate scores vision layer 0 head 0 at photo tokens with zero\n  using atp": "E0608",
    "observe attention vision layer 0 from photo tokens to photo tokens by value_norm": "E0108",
    "observe entropy z vision layer 0 head 0 at photo tokens": "E0207",
    "observe distance(0) pattern vision layer 0 head 0 at photo tokens": "E0207",
    "observe distance pattern vision layer 0 head 0 at last token": "E0310",
    "observe received pattern vision layer 0 head 0 at photo tokens": "E0207",
    "observe received(1..3) pattern vision layer 0 head 0 at photo row 1 col 1 token": "E0207",
    'save scores vision layer 0 head 0 at photo row 1 col 1 token to "s.safetensors"': "E0108",
}


def try_line(
    name: str, line: str, options: RunOptions | None = None, block: str = BLOCK
) -> list[Diagnostic]:
    alone = line.startswith(("observe", "save"))
    lines = [line] if alone or block != BLOCK else ["from clean into changed", line]
    text = experiment("e", *lines, measure="" if alone else MEASURE)
    if block != BLOCK:
        text = text.replace("prompts ask", "prompts both")
    source = f'mech 1\nmodel m = local("handed over")\n{block}\n{text}'
    result, found = run_on(Source(source, folder() / "f.mech"), {"m": loaded(name)}, options)
    assert result is None or not result.experiments
    return [each for each in found if each.severity == "error"]


@pytest.mark.parametrize(("line", "code"), LINES.items())
def test_invalid_line_reports_the_code_before_anything_runs(line: str, code: str) -> None:
    assert [each.code for each in try_line("internvl", line)] == [code]


@pytest.mark.parametrize("fill", ["ablate {} with mean", 'set {} to python("own.py:half")'])
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_scores_of_all_rows_are_refused(name: str, fill: str) -> None:
    """Also if all images have one layout."""
    (folder() / "own.py").write_text("def half(vectors):\n    return vectors / 2\n", "utf-8")
    line = fill.format("scores vision layer 0 head 0 at photo row 1 col 2 token")
    [problem] = try_line(name, line, RunOptions(settings=CheckSettings(python="run")))
    assert (problem.code, "with values of all rows" in problem.message) == ("E0108", True)


HELPS = {
    "observe entropy z vision layer 0 head 0 at photo tokens": "`pattern vision layer * head *`",
    "observe similarity pattern vision layer 1 head 0 at photo row 1 col 1 token "
    "with photo row 1 col 2 token": "`z vision`",
    "ablate pattern vision layer 1 head 0 dims 0..2 at photo row 1 col 1 token with zero": (
        "`resid_post vision layer 1`"
    ),
}


@pytest.mark.parametrize(("line", "site"), HELPS.items())
def test_help_suggests_a_site_of_the_encoder(line: str, site: str) -> None:
    [problem] = try_line("internvl", line)
    assert problem.help_text is not None
    assert problem.help_text.endswith(site)


# --- keys, costs and limits -----------------------------------------------------------------------


def test_attention_in_parts_of_queries_equals_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    name, rule = "qwen2_5_vl", next(iter(CASES))
    lines = experiment("a", "from clean into changed", rule) + experiment(
        "b",
        "observe attention vision layer * from photo tokens to photo row 1 col 1 token",
        measure="",
    )
    whole = run_text(name, lines)
    monkeypatch.setattr(attention, "MAX_SCORES", 40)
    for one, other_one in zip(whole, run_text(name, lines), strict=True):
        np.testing.assert_allclose(
            one.measures[0].patched, other_one.measures[0].patched, atol=1e-4
        )


@pytest.mark.slow
def test_store_key_depends_on_every_part_of_an_edge(tmp_path: Path) -> None:
    name = "qwen2_5_vl"
    pair = bare(name).model, bare(name).processor
    parts = ["vision layer 0", "photo row 1 col 1 token", "photo row 1 col 2 token"]
    others = ["vision layer 1", "photo row 2 col 1 token", "photo row 2 col 2 token"]
    also = ["vision layer 0 head 0", "photo tokens", "photo tokens"]
    every = [
        parts,
        *([*parts[:n], new[n], *parts[n + 1 :]] for new in (others, also) for n in ALL[:3]),
    ]
    lines = [
        line.format(*own)
        for line in ("block attention {} from {} to {}", "reweight attention {} from {} to {} by 3")
        for own in every
    ]
    path, found = folder() / "stored.mech", list[dict[str, tuple[float, ...]]]()
    for order in (range(len(lines)), reversed(range(len(lines)))):
        text = "".join(experiment(f"e{n}", "from clean into changed", lines[n]) for n in order)
        path.write_text(f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{text}', "utf-8")
        result = mechdsl.run(path, {"m": pair}, store=tmp_path)
        values = {each.name: each.measures[0].patched[0] for each in result.experiments}
        found.append({name: tuple(np.round(own, 5)) for name, own in values.items()})
    assert found[0] == found[1]
    assert len(set(found[0].values())) == len(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("llava_next", "block"),
        ("gemma3", "block"),
        ("qwen2_5_vl", "block"),
        ("llava_next", "allow"),
    ],
)
def test_planned_cost_is_near_the_counted_products(name: str, verb: str) -> None:
    rule = f"{verb} attention vision layer * from photo tokens to photo row 1 col 2 token"
    text = experiment("e", "from clean into changed", rule)
    plan = make_plan(check_file(text, folder(), loaded(name), BLOCK).experiments)
    execute(plan, {"m": loaded(name)}, None, check=check_denominators)  # also tests the patches
    with FlopCounterMode(display=False) as counter:
        execute(plan, {"m": loaded(name)}, None, check=check_denominators)
    planned = plan_cost(plan).planned.multiply_adds
    assert 0.5 < planned / (counter.get_total_flops() / 2) < 2


@pytest.mark.parametrize("axis", ["layer 0", "layer *", "layers *"])
def test_planned_products_with_keys_in_other_tiles_equal_the_counted_ones(axis: str) -> None:
    """Compared with a rule that allows no keys, on one prompt whose image has several tiles."""
    block = BLOCK.replace('rows "data.jsonl"', 'rows "data.jsonl"\n  where n = 3')
    planned, counted = list[float](), list[int]()
    for verb in ("allow", "block"):
        rule = f"{verb} attention vision {axis} from photo tokens to photo row 1 col 2 token"
        text = experiment("e", "from clean into changed", rule)
        plan = make_plan(check_file(text, folder(), loaded("internvl"), block).experiments)
        execute(plan, {"m": loaded("internvl")}, None, check=check_denominators)
        with FlopCounterMode(display=False) as counter:
            execute(plan, {"m": loaded("internvl")}, None, check=check_denominators)
        planned.append(plan_cost(plan).planned.multiply_adds)
        counted.append(counter.get_total_flops() // 2)
    assert counted[0] > 1.03 * counted[1]
    assert 0.99 < (planned[0] - planned[1]) / (counted[0] - counted[1]) < 1.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_attention_in_bfloat16_is_that_of_the_model(name: str) -> None:
    model, problems = adopt_model(
        "m", deepcopy(bare(name).model).to(torch.bfloat16), bare(name).processor
    )
    assert model is not None, problems
    line = "observe attention vision layer 0 head * from photo tokens to photo row 1 col 1 token"
    text = f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{experiment("e", line, measure="")}'
    result, problems = run_on(Source(text, folder() / "f.mech"), {"m": model})
    assert result is not None, problems
    [wide] = run_text(name, experiment("e", line, measure=""))
    [near] = map(as_in_the_data, result.experiments)
    np.testing.assert_allclose(near.measures[0].patched, wide.measures[0].patched, atol=0.05)
