"""Bases in the vision encoder, in replies and derived runs, and errors of rules that it can't have,
against plain hooks on the bare model's encoder: one unpadded prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from .reference import Edit, at
from .support import experiment
from .test_families import ALL, bare, difference, inputs, run_text
from .test_token_patches import BASES, TOWERS, components_of, edited
from .test_vision_encoder import LLAVA, errors, try_file

NAMES = ("llava_next", "qwen2_5_vl", "gemma3", "idefics2_wide")
RULE = "scale feature 0 of c at photo tokens by -4"


def scaled(name: str, n: int) -> Edit:
    axes, mean = components_of(name, each_token=True)

    def edit(value: Tensor) -> Tensor:
        here = TOWERS[name].every(n)
        value[here] -= 5 * torch.outer((value[here] - mean) @ axes[0], axes[0])
        return value

    return edit


@pytest.mark.parametrize("name", some(NAMES, ["qwen2_5_vl"]))
def test_replies_and_runs_with_coordinates_of_the_encoder_equal_hooks(name: str) -> None:
    model = bare(name)
    text = BASES + experiment("r", "generate 4", RULE, measure='measure matches("w1|w2") as raw')
    text += experiment(
        "s",
        f"run turned {{ {RULE} }}",
        "from turned into clean",
        "patch resid_post layer 1 at last token",
    )
    replies, second = run_text(name, text)
    assert replies.replies is not None
    differ = 0
    for n in ALL:
        given = inputs(name, n, n)
        with edited(name, "resid_post", 0, scaled(name, n)):
            reply = model.reply(given, 4)
            vector = model.states(given)["blocks"][1][-1]
        assert list(replies.replies.cells[0][n][0].ids) == reply
        differ += reply != model.reply(given, 4)
        expected = difference(model.run(given, blocks={1: at([-1], vector)}))
        np.testing.assert_allclose(second.measures[0].patched[0, n], expected, atol=1e-4)
    assert differ
    assert np.abs(second.measures[0].patched - second.measures[0].base).max() > 0.1


REJECTED = {
    "path z layer 0 head 0 -> logits at last token\n"
    "  ablate resid_post vision layer 0 at photo tokens with zero": (
        "a `path` of the language model together with sites in the vision encoder"
    ),
}


@pytest.mark.parametrize(("line", "what"), REJECTED.items())
def test_rule_that_the_encoder_lacks_is_named(line: str, what: str) -> None:
    (problem,) = try_file(experiment("e", "from clean into changed", line), LLAVA)[1]
    assert errors([problem]) == ["E0108"]
    assert what in problem.message
