"""`mechdsl.objective` and trainings on prompts with images, against autograd on the bare model."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.images.layouts import IMAGE_LAYOUTS
from mechdsl.pipeline.objectives import Objective

from ..images import prompts_of_images as vlm
from ..quick import some
from . import test_attended_images as attended
from .support import experiment
from .test_families import ALL, BLOCK, bare, cells, difference, folder, inputs

PLAIN = experiment("e", "ablate mlp_out layer 1 at last token with zero")
AT = "photo row 1 col 2 token"
OPTIONS = "features: 4, k: 2"
FIT = (
    f"basis s = fit(sae({OPTIONS}), prompts: ask, steps: 2, measure_on_training_rows: true) "
    "at resid_post layer 0 at photo tokens\n"
)
USED = experiment("e", f"ablate resid_post layer 0 in basis s at {AT} with zero")


def written(text: str) -> Path:
    path = folder() / "objective.mech"
    path.write_text(f'mech 1\nmodel m = local("x")\n{BLOCK}\n{text}', encoding="utf-8")
    return path


def opened(name: str, site: str, at: str) -> Objective:
    pair = bare(name).model, bare(name).processor
    return mechdsl.objective(written(PLAIN), models={"m": pair}, site=site, at=at)


def expected(name: str, n: int, vector: Tensor) -> Tensor:
    """The measure of a prompt with a vector at a token after block 0, and with a silent MLP."""
    own = bare(name)
    token = cells(name, n, n)[1, 2]

    def write(module: object, args: object, output: object) -> object:
        value = output[0] if isinstance(output, tuple) else output
        assert isinstance(value, Tensor)
        index = torch.arange(value.shape[1])[:, None] == token
        changed = torch.where(index, vector.to(value), value)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def silence(module: object, args: object, output: Tensor) -> Tensor:
        last = torch.arange(output.shape[1])[:, None] == output.shape[1] - 1
        return torch.where(last, 0, output)

    handles = [
        own.block(0).register_forward_hook(write),
        own.block(1).mlp.register_forward_hook(silence),
    ]
    try:
        logits = own.model(**inputs(name, n, n)).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits


@pytest.mark.parametrize("name", some(["llava_class", "video_llava", "qwen3_vl"], ["llava_class"]))
def test_objective_at_an_image_token_equals_autograd_on_the_bare_model(name: str) -> None:
    """Also in a second call, whose images are encoded again."""
    objective = opened(name, "resid_post layer 0", AT)
    start = objective.start.clone().requires_grad_()
    for factor in (1.0, -2.0):
        values = objective(factor * start)
        (gradient,) = torch.autograd.grad(values.sum(), start)
        for row, n in enumerate(objective.rows):
            vector = start.detach()[row, 0].clone().requires_grad_()
            value = difference_of(expected(name, n, factor * vector))
            (due,) = torch.autograd.grad(value, vector)
            base = difference(bare(name).run(inputs(name, n, n)))
            np.testing.assert_allclose(
                float(values[row].detach()), float(value.detach()) - base, atol=1e-4
            )
            np.testing.assert_allclose(gradient[row, 0], due, atol=1e-4)
    assert gradient.abs().max() > 0.01
    assert len(objective.rows) == len(ALL)


def difference_of(logits: Tensor) -> Tensor:
    return logits[vlm.WORDS["w1"]] - logits[vlm.WORDS["w2"]]


VISION = "scale resid_post vision layer 0 at photo row 1 col 2 token by -3"
REFUSED = {
    "site": (PLAIN, "resid_post vision layer 0", "write `embed` at tokens of the image"),
    "rule": (experiment("e", VISION), "resid_post layer 0", "acts in the vision encoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_objective_in_the_vision_encoder_reports_e0608(case: str) -> None:
    text, site, told = REFUSED[case]
    pair = bare("llava_class").model, bare("llava_class").processor
    with pytest.raises(mechdsl.MechdslError) as raised:
        mechdsl.objective(written(text), models={"m": pair}, site=site, at=AT)
    assert [each.code for each in raised.value.diagnostics] == ["E0608"]
    assert told in str(raised.value)


def test_objective_of_a_model_that_attends_to_images_equals_autograd() -> None:
    """At a token of the image that a block attends to."""
    pair = attended.bare(), attended.processor()
    path = attended.folder() / "objective.mech"
    text = PLAIN.replace("layer 1", "layer 0")
    path.write_text(f'mech 1\nmodel m = local("x")\n{attended.BLOCK}\n{text}', encoding="utf-8")
    site = "v cross layer 3 head 1"
    objective = mechdsl.objective(path, models={"m": pair}, site=site, at=AT)
    silent = ("model.language_model.layers.0.mlp", False, silence)
    vectors = (0.5 - objective.start).clone().requires_grad_()
    values = objective(vectors)
    (gradient,) = torch.autograd.grad(values.sum(), vectors)
    for row, n in enumerate(objective.rows):
        own = vectors.detach()[row, 0].clone().requires_grad_()
        token = attended.patch(n, 1, 2)

        def write(value: Tensor, own: Tensor = own, token: int = token) -> Tensor:
            flat = value.flatten(0, -2)
            there = torch.zeros_like(flat, dtype=torch.bool)
            there[token, attended.WIDTH : 2 * attended.WIDTH] = True
            return flat.masked_scatter(there, own).reshape(value.shape)

        module = "model.language_model.layers.3.cross_attn.v_proj"
        with torch.enable_grad(), attended.hooked([silent, (module, False, write)]):
            logits = attended.bare()(**attended.inputs(n, n), use_cache=False).logits[0, -1]
        answer, wrong = (attended.token(str(attended.RECORDS[n][key])) for key in ("n", "m"))
        due = logits[answer] - logits[wrong]
        (expected,) = torch.autograd.grad(due, own)
        effect = float(due.detach()) - attended.difference(n, n)
        np.testing.assert_allclose(float(values[row].detach()), effect, atol=1e-4)
        np.testing.assert_allclose(gradient[row, 0], expected, atol=1e-4)
    assert gradient.abs().max() > 0.01


def silence(output: Tensor) -> Tensor:
    last = torch.arange(output.shape[1])[:, None] == output.shape[1] - 1
    return torch.where(last, 0, output)


@pytest.mark.parametrize("kind", ["objective", "fit"])
def test_images_that_are_more_than_vectors_report_e0458(kind: str, tmp_path: Path) -> None:
    """A layout that numbers tokens of images one by one, which the model doesn't."""
    name = "qwen2_vl"
    pair = deepcopy(bare(name).model), bare(name).processor

    def start() -> object:
        if kind == "fit":
            return mechdsl.fit(written(FIT + USED), {"m": pair}, store=tmp_path)
        return mechdsl.objective(
            written(PLAIN), models={"m": pair}, site="resid_post layer 0", at="last token"
        )

    wrong = patch.object(type(IMAGE_LAYOUTS[name]), "numbering", "one by one")
    with wrong, pytest.raises(mechdsl.MechdslError) as raised:
        start()
    assert [each.code for each in raised.value.diagnostics] == ["E0458"]
    assert not [*tmp_path.glob("fits/*")]


@pytest.mark.slow
def test_training_on_images_that_are_vectors_succeeds(tmp_path: Path) -> None:
    pair = bare("qwen2_vl").model, bare("qwen2_vl").processor
    [trained] = mechdsl.fit(written(FIT + USED), {"m": pair}, store=tmp_path)
    assert trained.basis == "s"
