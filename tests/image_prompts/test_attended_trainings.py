"""Trainings, objectives, lenses, controls and saved vectors in Llama 3.2 Vision, against autograd
and plain hooks on the bare model: one unpadded prompt at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute.objective_rows import ObjectiveRows
from mechdsl.pipeline.trained_files import fits_of_file

from ..execute.support import as_in_the_data, context
from ..quick import some
from .support import BLOCK, MEASURE, RECORDS, experiment
from .test_attended_blocks import tower
from .test_attended_estimates import ALL, Cell, at_last, head, in_tower, one_patch, put, read, slope
from .test_attended_images import (
    IMAGE,
    LAYERS,
    Hook,
    bare,
    block_at,
    folder,
    hooked,
    loaded,
    processor,
    run_text,
    token,
    try_text,
)
from .test_attended_paths import HEADS_OF_TOWER, MARKED, attention, given, run, z
from .test_encoder_observations import cka

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

ONE = "photo row 1 col 2 token"
RAW = "measure logit(answer) - logit(wrong) as raw"
OPTIONS = (
    "prompts: ask, steps: 3, batch: 2, rate: 0.3, validation: 0%, measure_on_training_rows: true, "
    "maximise: logit(answer) - logit(wrong)"
)
SITES = {
    "resid_post layer 1": ("last token", Cell((block_at(1), False), at_last)),
    "z cross layer 3 head 1": ("last token", Cell(z(3), at_last, head(1))),
    "v cross layer 1 head 0": (ONE, Cell((f"{attention(1)}.v_proj", False), one_patch, head(0))),
    "resid_post vision layer 1": (ONE, Cell((tower(1), False), in_tower)),
}


def write_file(tmp_path: Path, text: str) -> Path:
    for file in folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{MARKED}\n{text}', "utf-8")
    return path


def models() -> dict[str, Any]:
    return {"m": (bare(), processor())}


def measured(n: int, hooks: list[Hook], *, changed: bool = False) -> Tensor:
    """The measure of one prompt, as a tensor of autograd."""
    with torch.enable_grad(), hooked(hooks):
        logits = bare()(**given(n, changed), use_cache=False).logits[0, -1]
    answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
    return logits[answer] - logits[wrong]


def moved(cell: Cell, by: Tensor, image: int) -> Hook:
    """Add a vector to those of a cell."""

    def change(value: Tensor) -> Tensor:
        added = torch.zeros_like(value)
        put(added, cell, by.expand(len(cell.tokens(image)), -1), image)
        return value + added

    return (*cell.place, change)


@pytest.mark.parametrize("site", some(SITES, [*SITES][2:3]))
def test_loss_and_gradient_of_a_vector_equal_autograd(site: str, tmp_path: Path) -> None:
    at, cell = SITES[site]
    lines = f"direction d = fit(vector, {OPTIONS}) at {site} at {at}\n"
    path = write_file(tmp_path, lines + experiment("e", f"add d to {site} at {at}"))
    source = Source(path.read_text("utf-8"), path)
    checked = check_source(source, models={"m": context(source, "m", loaded())})
    assert not has_errors(checked.diagnostics), checked.diagnostics
    (fit,) = fits_of_file(checked).values()
    assert fit.objective is not None
    rows = ObjectiveRows(fit.training, fit.objective, loaded(), None)
    ids = fit.objective.table.row_ids
    random = torch.Generator().manual_seed(5)
    start = 0.3 * torch.randn(rows.first_vectors.shape[1], generator=random)
    mine, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    with torch.enable_grad():
        values = rows.values(np.arange(len(ids)), lambda own, other: own + mine)
        wanted = torch.stack([measured(n, [moved(cell, theirs, n)]) for n in ids])
        (found,) = torch.autograd.grad(values.mean(), mine)
        (expected,) = torch.autograd.grad(wanted.mean(), theirs)
    np.testing.assert_allclose(values.detach(), wanted.detach(), atol=1e-4)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-3)
    assert expected.abs().max() > 1e-3


def test_trained_rotation_acts_as_hooks(tmp_path: Path) -> None:
    """At tokens of the image, with the images of both runs."""
    site = "v cross layer 1 head 0"
    lines = f"basis d = fit(das(dims: 2), {OPTIONS}, from: changed) at {site} at {ONE}\n"
    rule = f"patch {site} in basis d at {ONE}"
    path = write_file(tmp_path, lines + experiment("e", "from changed into clean", rule))
    [trained] = mechdsl.fit(path, models(), store=tmp_path / "store")
    [found] = map(as_in_the_data, mechdsl.run(path, models(), store=tmp_path / "store"))
    rotation = load_file(next(trained.folder.glob("*.safetensors")))["rotation"]
    cell = SITES[site][1]
    values = []
    for n in ALL:
        way = ((read(n, True, cell) - read(n, False, cell)) @ rotation.T @ rotation)[0]
        values.append(run(n, False, [moved(cell, way, n)]))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=3e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.01


@pytest.mark.parametrize("kind", some(["atp", "mask"], ["atp"]))
def test_trained_groups_equal_estimates_and_are_written_like_heads(
    kind: str, tmp_path: Path
) -> None:
    more = ", steps: 20, rate: 0.02" if kind == "mask" else ""
    lines = (
        f"group g = fit({kind}(size: 2), prompts: ask, with: zero{more}, validation: 0%, "
        "minimise: logit(answer) - logit(wrong), measure_on_training_rows: true) at "
        "z cross layers * heads * at last token\n"
    )
    rule = "ablate g at last token with zero"
    path = write_file(tmp_path, lines + experiment("e", rule))
    [trained] = mechdsl.fit(path, models(), store=tmp_path / "store")
    [found] = map(as_in_the_data, mechdsl.run(path, models(), store=tmp_path / "store"))
    saved = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    cells = [Cell(z(layer), at_last, head(number)) for _, layer, number in saved["sites"]]
    for cell, score in zip(cells, saved["scores"] if kind == "atp" else (), strict=False):
        changes = [-(read(n, False, cell) * slope(n, cell, changed=False)).sum() for n in ALL]
        np.testing.assert_allclose(score, np.mean(changes), atol=2e-4)
    values = []
    for n in ALL:
        chosen = [cells[number] for number in saved["chosen"]]
        hooks = [silenced(cell) for cell in chosen]
        values.append(run(n, False, hooks))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=2e-4)


def silenced(cell: Cell) -> Hook:
    """Set columns of the last token to 0."""

    def change(value: Tensor) -> Tensor:
        value = value.clone()
        value[0, -1, cell.columns or slice(None)] = 0
        return value

    return (*cell.place, change)


@pytest.mark.parametrize("kind", ["cross", "text"])
def test_random_controls_are_other_heads_of_the_same_kind(kind: str) -> None:
    layer, site = (3, "z cross layer 3") if kind == "cross" else (2, "z layer 2")
    rule = f"ablate {site} head 2 at last token with zero"
    [found] = run_text(experiment("e", rule, "against random(3)"), block=MARKED)
    base = np.mean([run(n, False) for n in ALL])
    effects = []
    for number in (0, 1, 3):
        cell = Cell(z(layer), at_last, head(number))
        own = [run(n, False, [moved(cell, -read(n, False, cell)[0], n)]) for n in ALL]
        effects.append(np.mean(own) - base)
    band = found.control(0)
    assert band is not None
    np.testing.assert_allclose([band.low[0], band.high[0]], [min(effects), max(effects)], atol=1e-3)


def unembedded(n: int, vector: Tensor) -> float:
    with torch.no_grad():
        logits = bare().lm_head(bare().model.language_model.norm(vector))
    answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
    return float(logits[answer] - logits[wrong])


def last_of(layer: int, n: int) -> Tensor:
    return read(n, False, Cell((block_at(layer), False), at_last))[0]


def test_logit_lens_equals_the_unembedding_of_each_block() -> None:
    lens = "observe logit_lens resid_post layer * at last token"
    [found] = run_text(experiment("e", lens, measure=RAW), block=MARKED)
    expected = [[unembedded(n, last_of(layer, n)) for n in ALL] for layer in range(LAYERS)]
    np.testing.assert_allclose(found.measures[0].patched, expected, atol=2e-4)
    assert np.ptp(expected) > 0.1


def test_trained_lens_equals_its_maps_and_the_unembedding(tmp_path: Path) -> None:
    """The training lowers the divergence from the model's own predictions."""
    lines = (
        "lens l = fit(tuned_lens, prompts: ask, steps: 10, measure_on_training_rows: true) "
        "at resid_post layer * at tokens *\n"
    )
    lens = "observe tuned_lens(l) resid_post layer * at last token"
    path = write_file(tmp_path, lines + experiment("e", lens, measure=RAW))
    [trained] = mechdsl.fit(path, models(), store=tmp_path / "store")
    [found] = map(as_in_the_data, mechdsl.run(path, models(), store=tmp_path / "store"))
    weights = load_file(trained.folder / "lens.safetensors")
    for layer in range(LAYERS - 1):
        own, bias = weights[f"layer.{layer}.weight"], weights[f"layer.{layer}.bias"]
        vectors = [last_of(layer, n) for n in ALL]
        expected = [unembedded(n, v + own @ v + bias) for n, v in enumerate(vectors)]
        np.testing.assert_allclose(found.measures[0].patched[layer], expected, atol=3e-4)
        assert own.abs().max() > 1e-3


def test_direct_logits_of_all_components_add_up_to_the_logit() -> None:
    sites = ("resid_pre layer 0", "attn_out layer *", "attn_out cross layer *", "mlp_out layer *")
    text = "".join(
        experiment(
            f"e{n}",
            f"observe direct_logit {site} toward answer - wrong at last token",
            measure="",
        )
        for n, site in enumerate(sites)
    )
    found = run_text(text, block=MARKED)
    total = sum(each.measures[0].patched.sum(0) for each in found)
    np.testing.assert_allclose(total, [run(n, False) for n in ALL], atol=5e-4)
    language = bare().model.language_model
    for n in ALL:  # one block that attends to the image, with its gate
        stream = read(n, False, Cell((block_at(LAYERS - 1), False), at_last))[0]
        gate = bare().get_submodule(block_at(3)).cross_attn_attn_gate.detach().tanh()
        own = gate * read(n, False, Cell((attention(3), False), at_last))[0]
        scale = (stream.square().mean() + language.norm.variance_epsilon).rsqrt()
        answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
        weight = bare().lm_head.weight.detach()
        value = (own * scale * language.norm.weight.detach()) @ (weight[answer] - weight[wrong])
        np.testing.assert_allclose(found[2].measures[0].patched[1, n], float(value), atol=2e-4)


PLACES: dict[str, tuple[str, Cell]] = {
    "resid_post layer 1": ("last token", Cell((block_at(1), False), at_last)),
    "attn_out cross layer 3": ("last token", Cell((attention(3), False), at_last)),
    "v cross layer 1": (ONE, Cell((f"{attention(1)}.v_proj", False), one_patch)),
    "z vision layer 0": (ONE, Cell(HEADS_OF_TOWER[0], in_tower)),
}


def test_saved_vectors_and_gradients_equal_autograd(tmp_path: Path) -> None:
    gate = float(bare().get_submodule(block_at(3)).cross_attn_attn_gate.detach().tanh())
    lines = [
        f'save {what} {site} of changed at {at} to "{name}{number}.safetensors"'
        for number, (site, (at, _)) in enumerate(PLACES.items())
        for name, what in (
            ("a", ""),
            ("g", "gradient of logit(answer) - logit(wrong) by"),
        )
    ]
    rule = "ablate z layer 0 head 1 at last token with zero"
    path = write_file(tmp_path, experiment("e", "from clean into changed", rule, *lines))
    mechdsl.run(path, models())
    for number, (site, (_, cell)) in enumerate(PLACES.items()):
        scale = gate if site.startswith("attn_out") else 1.0
        for name, of in (
            ("a", lambda n, cell=cell, by=scale: by * read(n, True, cell)),
            ("g", lambda n, cell=cell, by=scale: slope(n, cell) / by),
        ):
            saved = load_file(tmp_path / f"{name}{number}.safetensors")
            [vectors] = [each for each in saved.values() if each.dim() > 1]
            order = saved.get("row", torch.arange(len(ALL))).tolist()
            expected = torch.stack([of(n)[0] for n in order])
            np.testing.assert_allclose(
                vectors.reshape(len(ALL), -1), expected, atol=2e-4, rtol=1e-3, err_msg=site
            )


MARKS = ("red", "blue")
MANY = BLOCK.replace("how many", "how {mark} many").replace(
    "  corrupt", '  mark in ["red", "blue"]\n  corrupt'
)
"""Each image with two texts."""


def stacked(place: Any, columns: slice | None = None) -> Any:
    """Vectors [row, width] at the last tokens of all prompts of `MANY`."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value[0, -1, columns or slice(None)].double())
        return value

    for n in ALL:
        picture = Image.open(folder() / f"{n}.png").convert("RGB")
        for mark in MARKS:
            text = f"{IMAGE} how {mark} many {RECORDS[n]['what']} are there ? answer :"
            read_prompt: Any = processor()
            inputs = read_prompt(text=[text], images=[[picture]], return_tensors="pt")
            with torch.no_grad(), hooked([(*place, keep)]):
                bare()(**inputs, use_cache=False)
    return torch.stack(found).numpy()


def test_observed_coordinates_and_cka_equal_vectors_of_the_bare_model() -> None:
    lines = "basis b = pca(ask, dims: 2) at resid_post layer 1 at last token\n"
    lines += experiment("f", "observe features of b at last token", measure="")
    cka_line = "observe cka z cross layer 3 head 1 with resid_post layer 1 at last token"
    features, similarity = run_text(lines + experiment("c", cka_line, measure=""), block=MANY)
    stream = stacked((block_at(1), False))
    sizes = np.linalg.svd(stream - stream.mean(0), compute_uv=False)[:2]
    shown = features.measures[0].patched
    shown = shown - shown.mean(1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(shown, axis=1), sizes, rtol=1e-3)
    expected = cka(stacked(z(3), head(1)), stream)
    np.testing.assert_allclose(similarity.measures[0].patched.mean(), expected, atol=1e-4)


ERRORS = {
    "observe direct_logit mlp_hidden layer 1 neuron 3 toward answer - wrong at last token": (
        "E0108",
        "neurons followed by a gate",
    ),
    "observe logit_lens resid_post vision layer 0 at photo row 1 col 2 token": (
        "E0207",
        "is in the vision encoder",
    ),
}


@pytest.mark.parametrize("line", ERRORS)
def test_line_without_a_meaning_reports_its_reason(line: str) -> None:
    code, reason = ERRORS[line]
    measure = RAW if "lens" in line else "" if "observe" in line else MEASURE
    text = experiment(
        "e", "" if "observe" in line else "from clean into changed", line, measure=measure
    )
    _, found = try_text(text, block=MARKED)
    problem = next(each for each in found if each.severity == "error")
    assert problem.code == code
    assert reason in problem.message
