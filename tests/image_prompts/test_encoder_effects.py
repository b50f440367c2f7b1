"""Trainings by an effect in vision encoders of prompts: rotations, vectors, edits, scales and
groups, against autograd and plain hooks on the encoder of the bare model, with one unpadded prompt
at a time."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mechdsl.base.source import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute.mask_training import SiteMaskRows
from mechdsl.execute.objective_rows import ObjectiveRows
from mechdsl.loading.devices import restore_models
from mechdsl.pipeline.trained_files import fits_of_file
from mechdsl.planner.training_cost import training_cost
from mechdsl.resolve.types import SitePoint, TrainedMask

from ..execute.support import context
from ..images import prompts_of_images as vlm
from ..quick import some
from .reference import Edit
from .support import experiment
from .test_encoder_paths import SIZE, Place, edited, seen, tower
from .test_families import ALL, BLOCK, bare, folder, inputs, loaded
from .test_token_patches import HEADS, LAYERS
from .test_vision_dictionaries import TWICE, fit_and_run, other

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

NAMES = ("llava_class", "paligemma", "llava_next", "gemma3", "qwen2_5_vl", "qwen3_vl", "internvl")
QUICK = ("llava_next", "gemma3")
"""One with tiles of two sizes, and one whose tokens are made from several patches."""
FILLS = ["from: changed", "with: mean", "with: zero"]

MEASURE = "maximise: logit(answer) - logit(wrong)"
ROWS = "prompts: ask, measure_on_training_rows: true, "
OPTIONS = f"{ROWS}steps: 3, batch: 4, rate: 0.03, validation: 0%, {MEASURE}"
SITE = "resid_pre vision layer 1"
PLACE = Place("resid_pre", 1)
CELL = "photo row 1 col 2 token"
WHERE = "z vision layers * heads *"


@pytest.fixture(autouse=True)
def _restored(request: pytest.FixtureRequest) -> Generator[None]:
    """Remove the hooks of images that an objective without a run leaves in its model."""
    spec = getattr(request.node, "callspec", None)
    name = None if spec is None else spec.params.get("name")
    with restore_models([bare(name).model] if name else []):
        yield


def check(name: str, lines: str, block: str = BLOCK) -> Any:
    """The checked file."""
    if vlm.FAMILIES[name].before_end:
        block = block.replace(' w3"\n', ' w3 \\n"\n')
    source = Source(f'mech 1\nmodel m = local("x")\n{block}\n{lines}', folder() / "effects.mech")
    return check_source(source, models={"m": context(source, "m", loaded(name))})


def declared(name: str, lines: str) -> Any:
    """The training of a file."""
    checked = check(name, lines)
    assert not has_errors(checked.diagnostics), checked.diagnostics
    (fit,) = fits_of_file(checked).values()
    return fit


def logits_under(name: str, n: int, image: int, places: dict[Place, Edit]) -> Tensor:
    """The measure of a prompt with edits of its encoder, as a tensor of autograd."""
    with torch.enable_grad(), ExitStack() as stack:
        for place, edit in places.items():
            stack.enter_context(edited(name, place, edit))
        logits = bare(name).model(**inputs(name, n, image)).logits[0, -1]
    return logits[vlm.WORDS["w1"]] - logits[vlm.WORDS["w2"]]


def compare_gradients(values: Tensor, mine: Tensor, wanted: Tensor, theirs: Tensor) -> None:
    """Compare the values of rows, and the gradients of their means by a trained tensor."""
    (slope,) = torch.autograd.grad(values.mean(), mine)
    (expected,) = torch.autograd.grad(wanted.mean(), theirs)
    np.testing.assert_allclose(values.detach(), wanted.detach(), atol=1e-4)
    np.testing.assert_allclose(slope, expected, atol=1e-4, rtol=1e-3)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("at", [CELL, "photo tokens"])
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_loss_and_gradient_of_a_vector_equal_autograd(name: str, at: str) -> None:
    lines = f"direction d = fit(vector, {OPTIONS}) at {SITE} at {at}\n"
    fit = declared(name, lines + experiment("e", f"add d to {SITE} at {at}"))
    rows, own = ObjectiveRows(fit.training, fit.objective, loaded(name), None), tower(name)
    ids = fit.objective.table.row_ids
    random = torch.Generator().manual_seed(5)
    start = 0.3 * torch.randn(rows.first_vectors.shape[1], generator=random)
    mine, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()

    def add(n: int) -> Edit:
        def change(value: Tensor) -> Tensor:
            here = torch.zeros(len(value), 1)
            here[own.every(n) if at == "photo tokens" else own.cell(n, 1, 2)] = 1
            return value + here * theirs

        return change

    with torch.enable_grad():
        values = rows.values(np.arange(len(ids)), lambda own, other: own + mine)
        wanted = torch.stack([logits_under(name, n, n, {PLACE: add(n)}) for n in ids])
    compare_gradients(values, mine, wanted, theirs)


@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_trained_rotation_acts_on_each_patch(name: str, tmp_path: Path) -> None:
    lines = f"basis d = fit(das(dims: 2), {OPTIONS}, from: changed) at {SITE} at {CELL}\n"
    lines += experiment("e", "from changed into clean", f"patch {SITE} in basis d at {CELL}")
    folder, [found] = fit_and_run(name, lines, tmp_path)
    rotation = load_file(next(folder.glob("*.safetensors")))["rotation"]
    assert rotation.shape[0] == 2

    def turn(n: int) -> Edit:
        new = seen(name, PLACE, n, other(n))[tower(name).cell(other(n), 1, 2)]
        here = tower(name).cell(n, 1, 2)

        def change(value: Tensor) -> Tensor:
            value[here] += (new - value[here]) @ rotation.T @ rotation
            return value

        return change

    with torch.no_grad():
        values = [float(logits_under(name, n, n, {PLACE: turn(n)})) for n in ALL]
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=3e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.01


def gated(name: str, ids: Any, shares: Tensor, fill: str) -> Tensor:
    """The measure of prompts whose heads are mixed with other values, as a tensor of autograd.

    shares: [layer, head] of the other value.
    """
    own = tower(name)

    def incoming(n: int, layer: int) -> Tensor:
        place = Place("z", layer)
        if fill == "with: zero":
            return torch.zeros(())
        if fill == "with: mean":
            return torch.stack([seen(name, place, i, i)[own.cell(i, 1, 2)] for i in ALL]).mean(0)
        return seen(name, place, n, other(n))[own.cell(other(n), 1, 2)]

    def mix(n: int, layer: int) -> Edit:
        new = incoming(n, layer)

        def change(value: Tensor) -> Tensor:
            here, others = torch.zeros(len(value), 1), torch.zeros_like(value)
            here[own.cell(n, 1, 2)] = 1
            others[own.cell(n, 1, 2)] = new
            return value + here * shares[layer].repeat_interleave(SIZE) * (others - value)

        return change

    edits = [{Place("z", layer): mix(n, layer) for layer in (0, 1)} for n in ids]
    with torch.enable_grad():
        return torch.stack(
            [logits_under(name, n, n, each) for n, each in zip(ids, edits, strict=True)]
        )


@pytest.mark.parametrize("fill", some(FILLS, ["from: changed", "with: mean"]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_loss_and_gradient_of_gates_equal_autograd(name: str, fill: str) -> None:
    """Gates of heads in both layers: a gate of layer 1 mixes vectors of the changed pass."""
    lines = f"group g = fit(mask(size: 2), {OPTIONS}, {fill}) at {WHERE} at {CELL}\n"
    fit = declared(name, lines + experiment("e", f"ablate g at {CELL} with zero"))
    assert isinstance(fit.file, TrainedMask)
    candidates = [each for each in fit.file.candidates if isinstance(each, SitePoint)]
    assert len(candidates) == len(fit.file.candidates)
    ids = fit.objective.table.row_ids
    rows = SiteMaskRows(fit.training, fit.objective, loaded(name), None, candidates=candidates)
    shares = torch.rand(LAYERS * HEADS, generator=torch.Generator().manual_seed(3))
    mine, theirs = shares.clone().requires_grad_(), shares.clone().requires_grad_()
    with torch.enable_grad():
        values = rows.values(np.arange(len(ids)), mine)
        wanted = gated(name, ids, theirs.view(LAYERS, HEADS), fill)
    compare_gradients(values, mine, wanted, theirs)


@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_scores_of_heads_equal_the_gradient_by_their_gates(name: str, tmp_path: Path) -> None:
    """And the chosen heads act at each patch."""
    options = f"{ROWS}validation: 0%, {MEASURE}, from: changed"
    lines = f"group g = fit(atp(size: 2), {options}) at {WHERE} at {CELL}\n"
    lines += experiment("e", "from changed into clean", f"patch g at {CELL}")
    folder, [found] = fit_and_run(name, lines, tmp_path)
    given = json.loads((folder / "mask.json").read_text("utf-8"))
    shares = torch.zeros(LAYERS, HEADS, requires_grad=True)
    values = gated(name, ALL, shares, "from: changed")
    (expected,) = torch.autograd.grad(values.mean(), shares)
    np.testing.assert_allclose(given["scores"], expected.flatten(), atol=1e-4, rtol=1e-3)
    chosen = expected.flatten().abs().topk(2).indices
    whole = torch.zeros(LAYERS * HEADS).index_fill(0, chosen, 1.0)
    patched = gated(name, ALL, whole.view(LAYERS, HEADS), "from: changed")
    np.testing.assert_allclose(found.measures[0].patched[0], patched.detach(), atol=1e-4)


CHOICES = {
    "neurons": (f"mlp_hidden vision layer 0 neurons 0..3 at {CELL}", f"patch g at {CELL}"),
    "dims": (f"resid_post vision layer 0 dims 0..3 at {CELL}", f"patch g at {CELL}"),
    "positions": (
        "resid_pre vision layer 1 at photo row 1 col 1 token, photo row 2 col 1 token, "
        f"photo row 2 col 2 token, {CELL}",
        "patch resid_pre vision layer 1 at g tokens",
    ),
}


@pytest.mark.parametrize("what", some([*CHOICES], ["positions"]))
@pytest.mark.parametrize("name", some(NAMES, ["gemma3"]))
def test_search_chooses_the_candidate_with_the_largest_effect(
    name: str, what: str, tmp_path: Path
) -> None:
    """Against rules that write each candidate alone."""
    where, rule = CHOICES[what]
    options = f"{ROWS}validation: 0%, {MEASURE}, from: changed"
    lines = f"group g = fit(forward_selection(size: 1), {options}) at {where}\n"
    site, _, at = where.partition(" at ")
    site = site.replace("neurons", "neuron").replace("dims", "dim")  # one cell for each
    lines += experiment("e", "from changed into clean", rule)
    lines += experiment("f", "from changed into clean", f"patch {site} at {at}")
    _, [found, every] = fit_and_run(name, lines, tmp_path)
    alone = every.measures[0].patched
    best = alone.mean(axis=1).argmax()
    np.testing.assert_allclose(found.measures[0].patched[0], alone[best], atol=1e-5)
    assert len(alone) > 1
    assert np.ptp(alone.mean(axis=1)) > 1e-3


# --- cost -----------------------------------------------------------------------------------------


def price(name: str, options: str) -> float:
    lines = f"direction d = fit(vector, {options}) at {SITE} at {CELL}\n"
    fit = declared(name, lines + experiment("e", f"add d to {SITE} at {CELL}"))
    shape, reader = loaded(name).shape, loaded(name).tokenizer
    return training_cost("d", fit.file, fit.objective, shape, reader).cost.multiply_adds


@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_planned_cost_of_a_step_is_near_the_counted_products(name: str) -> None:
    lines = f"direction d = fit(vector, {OPTIONS}) at {SITE} at {CELL}\n"
    fit = declared(name, lines + experiment("e", f"add d to {SITE} at {CELL}"))
    rows = ObjectiveRows(fit.training, fit.objective, loaded(name), None)
    vector = torch.zeros(rows.first_vectors.shape[1], requires_grad=True)
    every = np.arange(len(ALL))
    rows.values(every, None)
    counter, counted = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
    with counted, counter, torch.enable_grad():
        values = rows.values(every, lambda own, other: own + vector)
        torch.autograd.grad(values.mean(), vector)
    longer = OPTIONS.replace("steps: 3", "steps: 4")
    step = price(name, longer) - price(name, OPTIONS)
    assert 0.6 < step / (counter.get_total_flops() / 2) < 1.25  # passes are padded


def test_cost_of_vectors_of_patches_has_no_block_of_the_language_model() -> None:
    lines = f"basis b = fit(sae(features: 6, k: 2), {ROWS}steps: 3, batch: 4) at {SITE} at photo "
    lines += "tokens\n" + experiment("e", f"observe value feature 1 of b at {CELL}", measure="")
    fit, shape = declared("llava_next", lines), loaded("llava_next").shape
    deeper = replace(shape, n_layers=40)
    costs = [training_cost("b", fit.file, None, each).cost for each in (shape, deeper)]
    assert costs[0] == costs[1]
    encoded = sum(len(seen("llava_next", PLACE, n, n)) for n in ALL)  # also class tokens
    assert costs[0].tokens == encoded * shape.others["vision"].n_layers


# --- errors ---------------------------------------------------------------------------------------


def errors_of(lines: str, block: str = BLOCK) -> list[Any]:
    return [e for e in check("llava_next", lines, block).diagnostics if e.severity == "error"]


HELD_OUT = {
    "E0341": (f"direction d = fit(vector, {ROWS}{MEASURE}) at {SITE}", f"add d to {SITE}", ""),
    "E0342": (
        f"group g = fit(mask(size: 2), {ROWS}{MEASURE}, with: zero) at {WHERE}",
        "ablate g",
        " with zero",
    ),
}


@pytest.mark.parametrize("code", HELD_OUT)
def test_held_out_rows_with_images_of_other_rows_report_an_error(code: str) -> None:
    line, rule, end = HELD_OUT[code]
    used = experiment("e", f"{rule} at {CELL}{end}")
    [found] = errors_of(f"{line} at {CELL}\n{used}", TWICE)
    assert found.code == code
    assert "have the same image, so it can't be held out" in found.message
    allowed = line.replace("prompts: ask", "prompts: ask, validation: 0%")
    assert not errors_of(f"{allowed} at {CELL}\n{used}", TWICE)


REJECTED = {
    "basis d = fit(cross_layer_transcoder(features: 6, k: 2)": (
        "steps: 3",
        f"observe value feature 1 of d at {CELL}",
        "features that write to several layers of the vision encoder aren't computed yet",
    ),
    "direction d = fit(soft_prompt(tokens: 1)": (
        MEASURE,
        f"add d to {SITE} at {CELL}",
        "`soft_prompt(…)` replaces tokens of the prompt",
    ),
    "basis d = fit(cca(components: 2)": (
        "with: resid_post vision layer 1",
        f"observe value feature 1 of d at {CELL}",
        "correlations of patches in the vision encoder aren't computed yet",
    ),
}


@pytest.mark.parametrize("start", REJECTED)
def test_training_that_the_encoder_lacks_reports_its_reason(start: str) -> None:
    options, rule, reason = REJECTED[start]
    measure = "" if rule.startswith("observe") else "measure logit(answer) as raw"
    site = "mlp_out vision layer *" if "layer" in start else SITE
    line = f"{start}, {ROWS}{options}) at {site} at {CELL}\n"
    [found] = errors_of(line + experiment("e", rule, measure=measure))
    assert found.code in ("E0341", "E0342")
    assert reason in found.message
