"""Trainings by an effect in vision encoders of prompts: rotations, vectors, edits, scales and
groups, against autograd and plain hooks on the encoder of the bare model, with one unpadded prompt
at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Sequence
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

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute.mask_training import SiteMaskRows
from mechdsl.execute.objective_rows import EffectRows, ObjectiveRows
from mechdsl.fits.vectors import BoundlessRotation
from mechdsl.loading.devices import restore_models
from mechdsl.pipeline.trained_files import fits_of_file
from mechdsl.planner.training_cost import training_cost
from mechdsl.resolve.types import SitePoint, TrainedMask
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import context
from ..images import prompts_of_images as vlm
from ..pipeline.test_trained_rotations import orthonormal_by_hand
from ..quick import in_turn, some
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


def on_patches(name: str, n: int, at: str, change: Edit) -> dict[Place, Edit]:
    """An edit of the vectors at the patches of a position, without a write in place."""
    here = tower(name).every(n) if at == "photo tokens" else tower(name).cell(n, 1, 2)

    def edit(value: Tensor) -> Tensor:
        mask = torch.zeros(len(value), 1)
        mask[here] = 1
        return value + mask * (change(value) - value)

    return {PLACE: edit}


DIRECTIONS = {
    "scales(penalty: 0.1)": "scale {} at {} by d",
    "reft(rank: 2)": "add d to {} at {}",
    'reft(rank: 2, kind: "direft")': "add d to {} at {}",
}
"""What is trained → its rule, without the site and the position."""


@pytest.mark.parametrize(("name", "inner"), in_turn(NAMES, [*DIRECTIONS], QUICK))
@pytest.mark.parametrize("at", [CELL, "photo tokens"])
def test_loss_and_gradient_of_scales_and_edits_equal_autograd(
    name: str, inner: str, at: str
) -> None:
    line = f"direction d = fit({inner}, {OPTIONS}) at {SITE} at {at}\n"
    fit = declared(name, line + experiment("e", DIRECTIONS[inner].format(SITE, at)))
    rows = ObjectiveRows(fit.training, fit.objective, loaded(name), None)
    ids, width = fit.objective.table.row_ids, rows.first_vectors.shape[1]
    start = 0.3 * torch.randn(5, width, generator=torch.Generator().manual_seed(5))
    mine, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()

    def edit(own: Tensor, tensor: Tensor) -> Tensor:
        if inner[0] == "s":
            return own * (1 + tensor[0])
        return own + own @ tensor[:2].T @ tensor[2:4] + tensor[4]

    with torch.enable_grad():
        values = rows.values(np.arange(len(ids)), lambda own, other: edit(own, mine))
        edits = [on_patches(name, n, at, lambda own: edit(own, theirs)) for n in ids]
        pairs = zip(ids, edits, strict=True)
        wanted = torch.stack([logits_under(name, n, n, each) for n, each in pairs])
    compare_gradients(values, mine, wanted, theirs)


@pytest.mark.parametrize(("name", "inner"), in_turn(NAMES, [*DIRECTIONS], QUICK[:1]))
def test_trained_scales_and_edits_act_on_each_patch(name: str, inner: str, tmp_path: Path) -> None:
    """And the report has the means of the same values."""
    line = f"direction d = fit({inner}, {OPTIONS}) at {SITE} at {CELL}\n"
    rule = DIRECTIONS[inner].format(SITE, CELL)
    folder, [found] = fit_and_run(name, line + experiment("e", rule), tmp_path)
    given = load_file(next(folder.glob("*.safetensors")))

    def edit(own: Tensor) -> Tensor:
        if inner[0] == "s":
            return own * given["vector"]
        return own + own @ given["edit.reads"].T @ given["edit.writes"] + given["edit.offset"]

    with torch.no_grad():
        every = [on_patches(name, n, CELL, edit) for n in ALL]
        values = [float(logits_under(name, n, n, every[n])) for n in ALL]
    check_values(found, folder, values)


def check_values(found: ExperimentResult, folder: Path, values: Sequence[float]) -> None:
    """Check the values of a rule with a trained object, and their mean on its card."""
    [data] = found.measures
    np.testing.assert_allclose(data.patched[0], values, atol=3e-4)
    assert np.abs(data.patched - data.base).max() > 0.01
    assert read_mean(folder) == pytest.approx(np.mean(values), abs=1e-3)


def read_mean(folder: Path) -> float:
    """The mean of the measure after a training, of its card."""
    return float(json.loads((folder / "fit.json").read_text("utf-8"))["trained"])


BOUNDLESS = (
    f"basis d = fit(boundless_das(dims: 4), {OPTIONS}, from: changed) at {SITE} at {CELL}\n"
    + experiment("e", "from changed into clean", f"patch {SITE} in basis d at {CELL}")
)


def exchanged(name: str, n: int, directions: Tensor, weight: Tensor) -> dict[Place, Edit]:
    """Coordinates of the other image at the same patches, to the share of each direction."""
    new = torch.zeros_like(seen(name, PLACE, n, n))
    there = tower(name).cell(other(n), 1, 2)
    new[tower(name).cell(n, 1, 2)] = seen(name, PLACE, n, other(n))[there]

    def change(own: Tensor) -> Tensor:
        parts = [torch.outer((new - own) @ row, row) for row in directions]
        return own + sum(share * part for share, part in zip(weight, parts, strict=True))

    return on_patches(name, n, CELL, change)


@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_loss_and_gradient_of_a_boundless_rotation_equal_autograd(name: str) -> None:
    """By its directions and its boundary, in the middle of a training."""
    fit = declared(name, BOUNDLESS)
    rows = ObjectiveRows(fit.training, fit.objective, loaded(name), None)
    ids, width = rows.objective.table.row_ids, rows.first_vectors.shape[1]
    start = torch.randn(4, width, generator=torch.Generator().manual_seed(5))
    mine, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    ends = [torch.tensor(0.6, requires_grad=True) for _ in range(2)]
    trained = BoundlessRotation(mine, 0.0)
    trained.matrix, trained.boundary = mine, ends[0]
    every = np.arange(len(ids))
    with torch.enable_grad():
        directions = orthonormal_by_hand(theirs)
        weight = torch.sigmoid((ends[1] * 4 - torch.arange(4) - 0.5) / (0.4 * 0.25**0.5))
        values = rows.values(every, lambda own, new: trained.relaxed_edit(own, new, 0.5))
        edits = [exchanged(name, n, directions, weight) for n in ids]
        pairs = zip(ids, edits, strict=True)
        wanted = torch.stack([logits_under(name, n, n, each) for n, each in pairs])
        slopes = [torch.autograd.grad(own.mean(), end, retain_graph=True)[0].item()
                  for own, end in zip((values, wanted), ends, strict=True)]  # fmt: skip
    compare_gradients(values, mine, wanted, theirs)
    assert slopes[0] == pytest.approx(slopes[1], abs=1e-4, rel=1e-4)
    assert abs(slopes[1]) > 1e-3


@pytest.mark.parametrize("name", some(NAMES, ["gemma3"]))
def test_trained_boundless_rotation_acts_on_each_patch(name: str, tmp_path: Path) -> None:
    folder, [found] = fit_and_run(name, BOUNDLESS, tmp_path)
    rows = load_file(next(folder.glob("*.safetensors")))["rotation"]
    whole = torch.ones(len(rows))
    with torch.no_grad():
        every = [exchanged(name, n, rows, whole) for n in ALL]
        values = [float(logits_under(name, n, n, every[n])) for n in ALL]
    check_values(found, folder, values)


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


QUESTIONS = BLOCK.replace("  words = ", '  words in ["w1", "w2 w1", "w3"]\n  former = ')
"""Three prompts for each image."""


# --- cost -----------------------------------------------------------------------------------------


def price(name: str, options: str, block: str = BLOCK) -> float:
    lines = f"direction d = fit(vector, {options}) at {SITE} at {CELL}\n"
    checked = check(name, lines + experiment("e", f"add d to {SITE} at {CELL}"), block)
    (fit,) = fits_of_file(checked).values()
    shape, reader = loaded(name).shape, loaded(name).tokenizer
    return training_cost("d", fit.file, fit.objective, shape, reader).cost.multiply_adds


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_planned_cost_of_a_step_is_near_the_counted_products(name: str, prompts: int) -> None:
    """With one or several prompts for each image."""
    block, count = (BLOCK, 4) if prompts == 1 else (QUESTIONS, 12)
    options = OPTIONS.replace("batch: 4", f"batch: {count}")
    lines = f"direction d = fit(vector, {options}) at {SITE} at {CELL}\n"
    checked = check(name, lines + experiment("e", f"add d to {SITE} at {CELL}"), block)
    (fit,) = fits_of_file(checked).values()
    assert fit.objective is not None
    rows = ObjectiveRows(fit.training, fit.objective, loaded(name), None)
    vector = torch.zeros(rows.first_vectors.shape[1], requires_grad=True)
    every = np.arange(count)
    rows.values(every, None)
    counter, counted = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
    with counted, counter, torch.enable_grad():
        values = rows.values(every, lambda own, other: own + vector)
        torch.autograd.grad(values.mean(), vector)
    longer = options.replace("steps: 3", "steps: 4")
    step = price(name, longer, block) - price(name, options, block)
    assert 0.55 < step / (counter.get_total_flops() / 2) < 1.25  # passes are padded


SHARED = {
    "vector": (
        f"direction d = fit(vector, {OPTIONS}) at {SITE} at {CELL}\n",
        f"add d to {SITE} at {CELL}",
    ),
    "rotation": (
        f"basis d = fit(das(dims: 2), {OPTIONS}, from: changed) at {SITE} at {CELL}\n",
        f"patch {SITE} in basis d at {CELL}",
    ),
    "mask": (
        f"group d = fit(mask(size: 2), {OPTIONS}, from: changed) at {WHERE} at {CELL}\n",
        f"ablate d at {CELL} with zero",
    ),
}


CASES = ["two sources", "mask", "vector", "rotation"]


def open_rows(name: str, what: str) -> tuple[int, int, Callable[[Tensor], Tensor]]:
    """The number of rows, that of the trained numbers, and the measure of all rows by them."""
    line, rule = SHARED["rotation" if what == "two sources" else what]
    block = QUESTIONS
    if what == "two sources":
        block = block.replace("file = other", 'file = if words = "w1" then other else "3.png"')
    source = "from changed into clean" if "basis" in line else ""
    checked = check(name, line + experiment("e", source, rule), block)
    assert not has_errors(checked.diagnostics), checked.diagnostics
    (fit,) = fits_of_file(checked).values()
    assert fit.objective is not None
    given = fit.training, fit.objective, loaded(name), None
    every = np.arange(len(fit.objective.table))
    if isinstance(fit.file, TrainedMask):
        points = [each for each in fit.file.candidates if isinstance(each, SitePoint)]
        gated_rows = SiteMaskRows(*given, candidates=points)
        return len(every), len(points), lambda leaf: gated_rows.values(every, leaf.sigmoid())
    rows = ObjectiveRows(*given)

    def measure(leaf: Tensor) -> Tensor:
        if what == "vector":
            return rows.values(every, lambda own, new: own + leaf)
        return rows.values(every, lambda own, new: own + leaf * (new - own))

    return len(every), rows.first_vectors.shape[1], measure


@pytest.mark.parametrize(("name", "what"), in_turn(NAMES, CASES, QUICK))
def test_rows_that_edit_one_image_equally_share_its_pass(
    name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts for each image: a third of the activations, forward and backward."""
    count, size, measure = open_rows(name, what)
    counts = Counter[str]()

    def seen(module: Any, args: Any, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        counts["forward"] += found.numel()
        if found.requires_grad:
            found.register_hook(lambda slope: counts.update(backward=slope.numel()))

    def run() -> tuple[Tensor, Tensor, Counter[str]]:
        leaf = torch.linspace(-0.5, 0.5, size, requires_grad=True)
        with torch.enable_grad():
            values = measure(leaf)
            counts.clear()
            values = measure(leaf)
            (slope,) = torch.autograd.grad(values.mean(), leaf)
        return values.detach(), slope, Counter(counts)

    block = bare(name).model.get_submodule(tower(name).blocks)[1]
    hook = block.register_forward_hook(seen)
    shared = run()
    monkeypatch.setattr(EffectRows, "_share_images", lambda self, rows, writes: list(writes))
    apart = run()
    hook.remove()
    np.testing.assert_allclose(shared[0], apart[0], atol=1e-4)
    np.testing.assert_allclose(shared[1], apart[1], atol=1e-5, rtol=1e-3)
    assert apart[1].abs().max() > 1e-3
    assert shared[2].keys() == {"forward", "backward"}
    if what == "two sources":  # the same image, with vectors of two others
        assert count == 10
        assert apart[2]["backward"] / 3 < shared[2]["backward"] < apart[2]["backward"]
    else:
        assert count == 12
        assert {key: 3 * number for key, number in shared[2].items()} == apart[2]


def test_cost_of_vectors_of_patches_has_no_block_of_the_language_model() -> None:
    lines = f"basis b = fit(sae(features: 6, k: 2), {ROWS}steps: 3, batch: 4) at {SITE} at photo "
    lines += "tokens\n" + experiment("e", f"observe value feature 1 of b at {CELL}", measure="")
    fit, shape = declared("llava_next", lines), loaded("llava_next").shape
    deeper = replace(shape, blocks=shape.blocks[:1] * 40)
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


REPLACED = BLOCK.replace("  words", "  where n = 1 or n = 3\n  words") + BLOCK.replace(
    "prompts ask", "prompts seen"
).replace("  words", "  where n = 2 or n = 4\n  words")
"""Two prompts whose images are replaced by those of the second block."""


@pytest.mark.parametrize(("fill", "shared"), [("from: changed", True), ("with: zero", False)])
def test_images_of_the_other_run_are_images_of_training_rows(fill: str, shared: bool) -> None:
    own = f"prompts: ask, steps: 3, batch: 2, rate: 0.03, validation: 0%, {MEASURE}, {fill}"
    line = f"group g = fit(mask(size: 2), {own}) at {WHERE} at {CELL}\n"
    used = experiment("e", f"ablate g at {CELL} with zero").replace("prompts ask", "prompts seen")
    found = errors_of(line + used, REPLACED)
    assert [each.code for each in found] == ["E0345"] * shared
    if shared:
        assert (found[0].shared, found[0].relation) == (2, "have images of training rows")


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
