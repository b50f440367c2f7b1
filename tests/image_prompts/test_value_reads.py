"""`value(SITE)` across a vision encoder and its language model, against plain hooks on the bare
model: one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.loading.loader import adopt_model

from ..execute.support import as_in_the_data, run_on
from ..families import build
from ..images import prompts_of_images as vlm
from ..quick import some
from .reference import Bare, Edit, at, edited_module, record_value
from .support import experiment
from .test_families import ALL, BLOCK, cells, difference, folder, inputs
from .test_vision_encoder import column


@cache
def bare(name: str) -> Bare:
    """A model whose vision encoder has the width of the language model."""
    config, own = vlm.architecture(name), vlm.FAMILIES[name]
    text = {**config.config["text_config"], **own.overrides.get("text_config", {})}
    width = text["hidden_size"]
    tower = {**config.config["vision_config"], **own.overrides.get("vision_config", {})}
    tower |= {"hidden_size": width, "num_attention_heads": 4}
    overrides: dict[str, Any] = {**own.overrides, "vision_config": tower}
    made: Any = build.model(config, **overrides)
    torch.manual_seed(0)
    with torch.no_grad():
        for path, weight in made.named_parameters():
            if weight.dim() > 1:
                weight.mul_(3 if "embed" in path else 2)
    return Bare(made, vlm.processor(name))


def run(name: str, lines: str) -> tuple[Any, Any]:
    block = BLOCK.replace(' w3"\n', ' w3 \\n"\n') if vlm.FAMILIES[name].before_end else BLOCK
    source = Source(f'mech 1\nmodel m = local("given")\n{block}\n{lines}', folder() / "f.mech")
    model, found = adopt_model("m", bare(name).model, bare(name).processor)
    assert model is not None, found
    return run_on(source, {"m": model})


def in_tower(name: str, edit: Edit) -> Any:
    module = bare(name).model.get_submodule("model.vision_tower.encoder.layers.0")
    return edited_module(module, lambda value: edit(value.squeeze(0)), is_input=False)


def tower_state(name: str, n: int, image: int) -> Tensor:
    return record_value(partial(in_tower, name), partial(bare(name).run, inputs(name, n, image)))


def block_state(name: str, n: int, image: int) -> Tensor:
    return bare(name).states(inputs(name, n, image))["blocks"][0]


def token(name: str, n: int, row: int, col: int) -> int:
    return cells(name, n, n)[row, col]


def same_position(name: str, n: int) -> Tensor:
    vector = tower_state(name, n, n)[column(name, 1, 2)]
    edit = at([token(name, n, 1, 2)], vector)
    return bare(name).run(inputs(name, n, n), blocks={0: edit})


def text_token(name: str, n: int) -> Tensor:
    vector = 3 * tower_state(name, n, (n + 1) % 4)[column(name, 2, 1)]
    return bare(name).run(
        inputs(name, n, n), blocks={1: lambda old: torch.cat([old[:-1], old[-1:] + vector])}
    )


def into_tower(name: str, n: int) -> Tensor:
    vector = block_state(name, n, n)[-1]
    with in_tower(name, at([column(name, 1, 2)], vector)):
        return bare(name).run(inputs(name, n, n))


CASES: dict[str, Callable[[str, int], Tensor]] = {
    "set resid_post layer 0 at photo row 1 col 2 token to value(resid_post vision layer 0)": (
        same_position
    ),
    "add 3 * value(resid_post vision layer 0 at photo row 2 col 1 token) of changed to "
    "resid_post layer 1 at last token": text_token,
    "set resid_post vision layer 0 at photo row 1 col 2 token to value(resid_post layer 0 at last "
    "token)": into_tower,
}


@pytest.mark.parametrize("name", some(["llava", "paligemma"], ["llava"]))
def test_values_across_the_vision_encoder_equal_hooks(name: str) -> None:
    lines = "".join(experiment(f"e{n}", rule) for n, rule in enumerate(CASES))
    result, problems = run(name, lines)
    assert result is not None, problems
    for found, (rule, reference) in zip(result.experiments, CASES.items(), strict=True):
        measure = found.measures[0]
        writes = "set resid_post vision" in rule
        assert found.conventions["planner"].endswith(
            "rules change images in the vision encoder"
            if writes
            else "vectors are read in the vision encoder"
        )
        assert ("changed image" in found.conventions["vision encoder"]) == writes
        expected = [difference(reference(name, n)) for n in ALL]
        patched = as_in_the_data(found).measures[0].patched[0]
        np.testing.assert_allclose(patched, expected, atol=1e-4, err_msg=rule)
        assert np.abs(measure.patched - measure.base).max() > 0.05, rule


OUTSIDE = (
    "add value(resid_post vision layer 1) to resid_post layer 1 at last token",
    "set resid_post layer 1 at last token to value(resid_post vision layer 1 at last token)",
    "add value(resid_post vision layer 0) to resid_post layer 1 at tokens *",
    "set resid_post vision layer 0 at last token to value(resid_post layer 0)",
    "add value(resid_post vision layer 0) to resid_post vision layer 1 at last token",
    "set resid_post vision layer 1 at photo row 1 col 2 token to "
    "value(resid_post vision layer 0 at last token)",
)


@pytest.mark.parametrize("rule", OUTSIDE)
def test_values_of_tokens_outside_the_images_report_e0310(rule: str) -> None:
    result, problems = run("llava", experiment("e", rule))
    assert result is None
    assert [each.code for each in problems if each.severity == "error"] == ["E0310"]


@pytest.mark.parametrize("rule", list(CASES))
def test_values_across_an_encoder_that_merges_patches_report_e0108(rule: str) -> None:
    result, problems = run("internvl", experiment("e", rule))
    assert result is None
    assert [each.code for each in problems if each.severity == "error"] == ["E0108"]


def test_step_of_patches_reports_e0341() -> None:
    rule = "add 2 * step(mlp_out) to mlp_out vision layer 0 at photo tokens"
    result, problems = run("llava", experiment("e", rule))
    assert result is None
    assert [each.code for each in problems if each.severity == "error"] == ["E0341"]
