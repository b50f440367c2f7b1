"""Position ids of tokens of images and texts, changed by rules in all vision-language families,
against the bare model with these position ids: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from .reference import Edit, at, edited_module, followed
from .support import experiment
from .test_encoder_attention import TOWERS
from .test_families import ALL, NAMES, bare, cells, difference, every_cell, inputs, run_text

ROTATED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families that number the tokens of an image by row and column."""
FIRST = {"paligemma": 1, "paligemma2": 1}
"""Position id of a prompt's first token; otherwise 0."""
QUICK = ("llava_class", "qwen2_5_vl", "paligemma")


def plain_ids(name: str, n: int) -> Tensor:
    """Position ids of a prompt: [1, token], or [3, 1, token] in families with rows and columns."""
    given = inputs(name, n, n)
    if name not in ROTATED:
        return torch.arange(given["input_ids"].shape[1])[None] + FIRST.get(name, 0)
    found: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append(kwargs["position_ids"][-3:].clone())

    handle = bare(name).language.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        bare(name).run(given)
    finally:
        handle.remove()
    return found[0]


def renumbered(name: str, n: int, tokens: Sequence[int], first: int) -> Tensor:
    ids = plain_ids(name, n).clone()
    start = first + FIRST.get(name, 0)
    ids[..., list(tokens)] = torch.arange(start, start + len(tokens))
    return ids


def run(name: str, n: int, ids: Tensor, **edits: Any) -> float:
    return difference(bare(name).run({**inputs(name, n, n), "position_ids": ids}, **edits))


def one_token(name: str, n: int) -> list[int]:
    return [cells(name, n, n)[1, 2]]


def last_token(name: str, n: int) -> list[int]:
    return [inputs(name, n, n)["input_ids"].shape[1] - 1]


def every_token(name: str, n: int) -> list[int]:
    return every_cell(name, n, n)


SAME_REPLIES = ("gemma3", "paligemma2")
"""Families whose replies don't depend on the position ids of images."""

RULES = {
    "renumber photo tokens from 30": (every_token, 30),
    "renumber photo row 1 col 2 token from 20": (one_token, 20),
    "renumber last token from 2": (last_token, 2),
}


MODE = pytest.mark.parametrize(
    "mode", ["planned", pytest.param("padded on the right", marks=pytest.mark.slow)]
)


@MODE
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_renumbered_tokens_of_images_equal_position_ids_of_the_bare_model(
    name: str, mode: str
) -> None:
    """Tokens of the image, of one cell, and of the text; with a zeroed vector."""
    zeroed = "ablate resid_post layer 1 at photo tokens with zero"
    rules = [rule for rule in RULES if name != "idefics2" or "row" not in rule]
    every = [*((rule, False) for rule in rules), (rules[0], True)]
    text = "".join(
        experiment(f"e{number}", rule, *[zeroed] * is_zeroed)
        for number, (rule, is_zeroed) in enumerate(every)
    )
    for found, (rule, is_zeroed) in zip(run_text(name, text, mode), every, strict=True):
        expected = list[float]()
        for n in ALL:
            edits = dict[str, dict[int, Edit]]()
            if is_zeroed:
                edits["blocks"] = {1: at(every_token(name, n), torch.zeros(()))}
            ids = renumbered(name, n, RULES[rule][0](name, n), RULES[rule][1])
            expected.append(run(name, n, ids, **edits))
        measure = found.measures[0]
        plain = [run(name, n, plain_ids(name, n)) for n in ALL]
        np.testing.assert_allclose(measure.base[0], plain, atol=1e-4)
        np.testing.assert_allclose(measure.patched[0], expected, atol=1e-4, err_msg=rule)
        assert np.abs(np.array(expected) - measure.base[0]).max() > 0.05, rule


@pytest.mark.parametrize("name", some(NAMES, ("qwen2_5_vl",)))
def test_run_with_renumbered_tokens_is_a_source_and_swept_numbers_are_cells(name: str) -> None:
    source = "run moved { renumber photo tokens from 30 }"
    rule = "patch resid_post layer 1 at last token"
    text = experiment("e", "from moved into clean", source, rule)
    text += experiment("f", "for k in [12, 30] { renumber photo tokens from k }")
    patched, swept = (found.measures[0] for found in run_text(name, text))
    for n in ALL:
        ids = renumbered(name, n, every_token(name, n), 30)
        kept: list[Tensor] = []

        def keep(value: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(value[-1].clone())
            return value

        moved = run(name, n, ids, blocks={1: keep})
        np.testing.assert_allclose(swept.patched[1, n], moved, atol=1e-4)
        expected = run(name, n, plain_ids(name, n), blocks={1: at([-1], kept[0])})
        np.testing.assert_allclose(patched.patched[0, n], expected, atol=1e-4)
    assert np.abs(patched.patched - patched.base).max() > 0.02
    assert np.abs(swept.patched[0] - swept.patched[1]).max() > 0.02


@pytest.mark.parametrize("name", some(NAMES, ("qwen2_5_vl",)))
def test_replies_after_renumbered_tokens_of_images_equal_the_bare_model(name: str) -> None:
    """Tokens of the reply keep their position ids."""
    text = experiment(
        "e", "generate 3", "renumber photo tokens from 30", measure='measure matches("w1") as raw'
    )
    [found] = run_text(name, text)
    assert found.replies is not None
    differ = False
    for n in ALL:
        given, ids = inputs(name, n, n), renumbered(name, n, every_token(name, n), 30)
        end = plain_ids(name, n)[..., -1:]
        replies = list[list[int]]()
        for of in (plain_ids(name, n), ids):
            reply = list[int]()
            for step in range(3):
                numbers = torch.cat([of, *(end + k + 1 for k in range(step))], -1)
                more = {**followed(given, reply), "position_ids": numbers}
                reply.append(int(bare(name).run(more)[-1].argmax()))
            replies.append(reply)
        assert [*found.replies.runs["clean"][n][0].ids] == replies[0]
        assert [*found.replies.cells[0][n][0].ids] == replies[1]
        differ |= replies[0] != replies[1]
    assert differ or name in SAME_REPLIES


@pytest.mark.parametrize("name", some(("llava_class", "qwen2_5_vl", "paligemma"), ("qwen2_5_vl",)))
def test_renumbered_tokens_and_a_rule_in_the_encoder_act_together(name: str) -> None:
    zeroed = "ablate resid_post vision layer 0 at photo tokens with zero"
    number = "renumber photo tokens from 30"
    lines = ([zeroed], [number, zeroed])
    text = "".join(experiment(f"e{k}", *each) for k, each in enumerate(lines))
    alone, both = (found.measures[0] for found in run_text(name, text))
    block = bare(name).model.get_submodule(f"{TOWERS[name].blocks}.0")
    for n in ALL:
        zeros = at(TOWERS[name].every(n), torch.zeros(()))
        plain, ids = plain_ids(name, n), renumbered(name, n, every_token(name, n), 30)

        def edit(value: Tensor, zeros: Edit = zeros) -> Tensor:
            return zeros(value.flatten(0, -2))

        with edited_module(block, edit, is_input=False):
            expected = [run(name, n, plain), run(name, n, ids)]
        np.testing.assert_allclose(alone.patched[0, n], expected[0], atol=1e-4)
        np.testing.assert_allclose(both.patched[0, n], expected[1], atol=1e-4)
    assert np.abs(both.patched - alone.patched).max() > 0.05
