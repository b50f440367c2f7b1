"""Activations patched between models with different processors, in prompts with images.

The reference is plain hooks on both bare models: one unpadded prompt at a time, and each model
reads the pixels from its processor.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..execute.support import MODES, run_on
from ..images import prompts_of_images as vlm
from ..quick import some
from ..shared_models import unchanged
from . import test_families as base
from .reference import Bare, at, followed
from .support import STATS, succeeded
from .test_families import ALL, cells, difference

NAMES = ("llava_class", "llava_next", "idefics3", "qwen2_5_vl", "gemma3")
QUICK = ("llava_class", "qwen2_5_vl")


@cache
def tuned(name: str) -> Bare:
    """A model with other weights, whose processor subtracts another mean from pixels."""
    model, processor = deepcopy(base.bare(name).model), deepcopy(base.bare(name).processor)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=random)
                weight.add_(0.4 * weight.std() * noise * (weight != 0))
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    return Bare(model, processor)


@cache
def loaded(name: str) -> LoadedModel:
    model, found = adopt_model("tuned", tuned(name).model, tuned(name).processor)
    assert model is not None, found
    return unchanged(model)


@cache
def inputs(name: str, n: int) -> dict[str, Tensor]:
    """A prompt as the processor of the tuned model prepares it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base, "bare", tuned)
        return base.inputs_of(name, base.WORDS[n], n)


def experiment(name: str, *lines: str) -> str:
    every = (*lines, STATS)
    return f"experiment {name} {{\n" + "\n".join(f"  {line}" for line in every) + "\n}\n"


def try_file(
    name: str, text: str, other: LoadedModel, mode: str = "planned"
) -> tuple[FileResult | None, list[Diagnostic]]:
    known = 'model m = local("handed over")\nmodel tuned = local("handed over")\n'
    source = Source(f"mech 1\n{known}{base.BLOCK}\n{text}", base.folder() / "two.mech")
    return run_on(source, {"m": base.loaded(name), "tuned": other}, MODES[mode])


def run(name: str, text: str, mode: str = "planned") -> dict[str, ExperimentResult]:
    return succeeded(*try_file(name, text, loaded(name), mode))


def divergence(of: Tensor, other: Tensor) -> float:
    """KL(of ‖ other) of one position's logits."""
    p, q = (each.double().log_softmax(-1) for each in (of, other))
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_patch_from_another_model_at_image_tokens_equals_hooks(name: str, mode: str) -> None:
    """The same file uses a mean difference between both models."""
    text = experiment(
        "e", "model m", "prompts ask", "from tuned into m",
        "patch resid_post layer 0 at photo row 1 col 2 token, last token",
        "measure logit(answer) - logit(wrong) as delta", "measure kl(tuned) as raw",
    )  # fmt: skip
    text += "direction d = mean_difference(tuned, m, prompts: ask) at resid_post layer 1\n"
    text += experiment(
        "f", "model m", "prompts ask", "add d to resid_post layer 1 at last token",
        "measure logit(answer) - logit(wrong) as delta",
    )  # fmt: skip
    found = run(name, text, mode)
    states = [tuned(name).states(inputs(name, n))["blocks"] for n in ALL]
    own = [base.inputs(name, n, n) for n in ALL]
    logits: list[list[Tensor]] = []
    for n in ALL:
        places = ([cells(name, n, n)[1, 2]], [-1])
        edits = [at(place, states[n][0][place]) for place in places]
        logits.append([base.bare(name).run(own[n], blocks={0: edit}) for edit in edits])
    first, second = found["e"].measures
    plain = [base.bare(name).run(own[n])[-1] for n in ALL]
    theirs = [tuned(name).run(inputs(name, n))[-1] for n in ALL]
    for cell in range(2):
        written = [difference(logits[n][cell]) for n in ALL]
        kl = [divergence(theirs[n], logits[n][cell][-1]) for n in ALL]
        np.testing.assert_allclose(first.patched[cell], written, atol=1e-4)
        np.testing.assert_allclose(second.patched[cell], kl, atol=1e-4, rtol=1e-4)
    base_values = [difference(each) for each in plain]
    assert first.source is not None
    np.testing.assert_allclose(first.base[0], base_values, atol=1e-4)
    np.testing.assert_allclose(first.source[0], [difference(each) for each in theirs], atol=1e-4)
    assert np.abs(first.patched - base_values).max() > 0.1
    mine = [base.bare(name).states(each)["blocks"] for each in own]
    shift = torch.stack([states[n][1][-1] - mine[n][1][-1] for n in ALL]).mean(0)
    added = [base.bare(name).run(own[n], blocks={1: at([-1], mine[n][1][-1] + shift)}) for n in ALL]
    expected = [difference(each) for each in added]
    np.testing.assert_allclose(found["f"].measures[0].patched[0], expected, atol=1e-4)
    assert np.abs(np.array(expected) - base_values).max() > 0.1


@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_kl_to_another_model_uses_its_own_image_pixels(name: str) -> None:
    text = experiment(
        "e", "model m", "prompts ask", "from tuned into m",
        "patch resid_post layer 1 at photo row 1 col 2 token", "generate 2",
        "measure kl(tuned) at each step as raw",
    )  # fmt: skip
    found = run(name, text)["e"]
    [measure] = found.measures
    for n in ALL:
        own, theirs = base.inputs(name, n, n), inputs(name, n)
        cell = [cells(name, n, n)[1, 2]]
        edit = at(cell, tuned(name).states(theirs)["blocks"][1][cell])
        assert found.replies is not None
        (reply,) = found.replies.cells[0][n]
        for step, _ in enumerate(reply.ids):
            given = reply.ids[:step]
            edited = base.bare(name).run(followed(own, given), blocks={1: edit})[-1]
            other = tuned(name).run(followed(theirs, given))[-1]
            expected = divergence(other, edited)
            assert abs(measure.patched[step, n] - expected) < 1e-4 * max(1, expected)


@pytest.mark.slow
def test_models_with_different_image_layouts_are_rejected() -> None:
    """A different layout of the image is E0416, before anything runs."""
    name = "qwen2_5_vl"
    processor = deepcopy(vlm.processor(name))
    processor.image_processor.size = {"shortest_edge": 128, "longest_edge": 128}
    model, problems = adopt_model("tuned", tuned(name).model, processor)
    assert model is not None, problems
    text = experiment(
        "e", "model m", "prompts ask", "from tuned into m",
        "patch resid_post layer 0 at last token", "measure logit(answer) as raw",
    )  # fmt: skip
    result, found = try_file(name, text, model)
    assert result is None
    [error] = [each for each in found if each.severity == "error"]
    assert error.code == "E0416"
    assert "processors that give images the same rows" in str(error.help_text)


def test_store_key_depends_on_the_processor_of_the_source_model(tmp_path: Path) -> None:
    """The inputs of the base model, the texts and all weights stay the same."""
    name = "llava_class"
    known = 'model m = local("handed over")\nmodel tuned = local("handed over")\n'
    text = f"mech 1\n{known}{base.BLOCK}\n" + experiment(
        "e", "model m", "prompts ask", "from tuned into m",
        "patch resid_post layer 0 at last token", "measure kl(tuned) as raw",
    )  # fmt: skip
    path = base.folder() / "stored.mech"
    path.write_text(text)
    seen: list[tuple[float, ...]] = []
    for mean in (0.1, 0.1, 0.4):
        processor = deepcopy(tuned(name).processor)
        processor.image_processor.image_mean = [mean, 0.2, 0.3]
        models = {
            "m": (base.bare(name).model, base.bare(name).processor),
            "tuned": (tuned(name).model, processor),
        }
        [measure] = mechdsl.run(path, models, store=tmp_path / "store")["e"].measures
        seen.append((*measure.base[0], *measure.patched[0]))
    assert seen[0] == seen[1]
    assert min(abs(np.subtract(seen[0], seen[2]))) > 1e-3
