"""`observe rollout from Q to K`: against `output_attentions` of one prompt or image at a time."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mechdsl.execute.run_record import ExecutionOptions

from ..execute import support
from ..images import support as images
from . import models

Array = NDArray[np.float64]


@cache
def eager(name: str, kind: str) -> Any:
    """The bare model in 64 bits with eager attention, which returns patterns."""
    module = copy.deepcopy(images.bare(name) if kind == "images" else models.bare(name)).double()
    module.config._experts_implementation = "eager"
    module.set_attn_implementation("eager")
    return module.eval()


@torch.no_grad()
def rolled(name: str, kind: str, **given: Any) -> Array:
    """[token, token], of one input."""
    found: Array | None = None
    for pattern in eager(name, kind)(**given, output_attentions=True).attentions:
        heads = pattern[0].double().numpy()
        mixed = sum(list(heads)) / len(heads) + np.eye(heads.shape[-1])
        mixed = mixed / mixed.sum(1)[:, None]
        found = mixed if found is None else np.einsum("ij,jk->ik", mixed, found)
    assert found is not None
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name",
    ["gpt2", "gpt_oss", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gemma2"))],
)
def test_rollout_of_texts_equals_the_reference(name: str, side: Any, tmp_path: Path) -> None:
    lines = (
        "observe rollout from last token to token * align left as last",
        "observe rollout of turned from {subject token, cue token} to item tokens as both",
        "observe rollout from subject token, last token to token 1, token 3 as swept",
    )
    text = support.experiment("e", "prompts p", *lines)
    options = replace(support.MODES["planned"], execution=ExecutionOptions(side=side))
    found = support.run_file(text, tmp_path, models.bare(name), options)
    seen = {run: support.prompts(run) for run in ("clean", "turned")}
    mixed = {
        run: [rolled(name, "texts", input_ids=torch.tensor([each.ids])) for each in every]
        for run, every in seen.items()
    }
    last = found["e.last"].measures[0].patched
    for row, each in enumerate(mixed["clean"]):
        size = len(each)
        np.testing.assert_allclose(last[:size, row], each[-1], atol=1e-5)
        assert np.isnan(last[size:, row]).all()
        assert np.ptp(each[-1]) > 0.1
    both = found["e.both"].measures[0].patched
    for row, (each, own) in enumerate(zip(mixed["turned"], seen["turned"], strict=True)):
        queries = [own.subject[-1], own.cue]
        expected = np.mean([sum(each[q, k] for k in own.items) for q in queries])
        assert both[0, row] == pytest.approx(expected, abs=1e-5)
    swept = found["e.swept"].measures[0].patched.reshape(2, 2, -1)
    for row, (each, own) in enumerate(zip(mixed["clean"], seen["clean"], strict=True)):
        expected = [[each[q, k] for k in (1, 3)] for q in (own.subject[-1], len(each) - 1)]
        np.testing.assert_allclose(swept[..., row], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "siglip"])
def test_rollout_of_images_equals_the_reference(name: str, tmp_path: Path) -> None:
    """In a model without a class token, the rollout is averaged over queries at all patches."""
    start = "image tokens" if name == "siglip" else "cls token"
    text = f"""experiment e {{
  model m
  images scenes
  observe rollout from {start} to each token of image as roll
}}
"""
    (found,) = images.run_file(text, tmp_path, name).values()
    told = found.measures[0].patched
    for row in range(3):
        given = images.pixels(name, row)
        mixed = rolled(name, "images", pixel_values=given)
        patches = images.patches(name)
        queries = patches if name == "siglip" else [0]
        expected = mixed[queries][:, patches].mean(0)
        np.testing.assert_allclose(told[:, row], expected, atol=1e-5)
        assert np.ptp(expected) > 0.01


def test_rollout_in_an_experiment_with_rules_is_an_error(tmp_path: Path) -> None:
    rule = "ablate z layer 0 head 0 at last token with zero"
    lines = (rule, "observe rollout from last token to subject token as roll")
    text = support.experiment("e", "prompts p", *lines)
    result, problems = support.try_file(text, tmp_path, models.bare("gpt2"))
    assert result is None
    assert [(d.code, "in which rules act" in d.label_text) for d in problems] == [("E0207", True)]


def test_rollout_of_a_derived_run_equals_the_reference(tmp_path: Path) -> None:
    """With uniform attention in all layers, the rollout is a power of one matrix."""
    run = "run flat { set attention layers * heads * from tokens * to tokens * to uniform }"
    lines = (run, "observe rollout of flat from last token to token 0 as roll")
    text = support.experiment("e", "prompts p", *lines)
    found = support.run_file(text, tmp_path, models.bare("gpt2"))
    for row, each in enumerate(support.prompts()):
        size = len(each.ids)
        step = np.array([[(j <= i) / (i + 1) for j in range(size)] for i in range(size)])
        mixed = np.linalg.matrix_power((step + np.eye(size)) / 2, 3)
        (result,) = found.values()
        assert result.measures[0].patched[0, row] == pytest.approx(mixed[-1, 0], abs=1e-5)


def test_from_and_to_in_another_observation_are_an_error(tmp_path: Path) -> None:
    text = support.experiment("e", "prompts p", "observe norm from last token to subject token")
    result, problems = support.try_file(text, tmp_path, models.bare("gpt2"))
    assert result is None
    assert [d.code for d in problems] == ["E0207"]
