"""Behaviour common to all trainings on a measure: rotations, vectors, edits, scales, masks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute import objective_rows
from mechdsl.execute.mask_training import MaskRows
from mechdsl.execute.objective_rows import ObjectiveRows
from mechdsl.fits.training import Training
from mechdsl.pipeline.trained_files import list_training_costs
from mechdsl.planner import training_cost

from ..execute.support import word_tokenizer
from ..quick import some
from ..rules.models import bare
from . import test_boundless_rotations as boundless
from . import test_soft_prompts as prompts
from . import test_trained_circuits as circuits
from . import test_trained_coordinate_masks as coordinates
from . import test_trained_edits as edits
from . import test_trained_masks as masks
from . import test_trained_position_masks as positions
from . import test_trained_rotations as rotations
from . import test_trained_scales as scales
from . import test_trained_vectors as vectors
from .test_trained_dictionaries import checked, experiment, models, run, train, write
from .test_trained_rotations import OTHER, interrupt_training

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

DECLARED: dict[str, tuple[ModuleType, str, str, str]] = {
    "rotation": (rotations, rotations.PATCHES, "rotation.safetensors", "das rotation with 2"),
    "boundless": (boundless, rotations.PATCHES, "rotation.safetensors", "rotation with at most 20"),
    "vector": (vectors, vectors.ADD, "vector.safetensors", "vector, length 3 trained on"),
    "soft prompt": (prompts, prompts.SET, "vector.safetensors", "soft_prompt, tokens 2 trained on"),
    "edit": (edits, edits.ADD, "vector.safetensors", "reft, rank 2 trained on"),
    "scales": (scales, scales.SCALED, "vector.safetensors", "scales, penalty 0.1 trained on"),
    "mask": (masks, masks.PATCHES, "mask.json", "mask of 3 of 12 sites"),
    "circuit": (circuits, circuits.PATCHES, "mask.json", "mask of 3 of 190 edges"),
}
"""Module with the declaration, an experiment that uses it, the file of its weights, and text of
`explain` before the training."""


@pytest.fixture(params=some(DECLARED, [*DECLARED][1::2]))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=some(DECLARED, ("boundless", "edit", "circuit")))
def some_kind(request: pytest.FixtureRequest) -> str:
    """Few kinds, for tests of the store that don't depend on the kind."""
    return request.param


def declare(kind: str, **options: Any) -> str:
    module = DECLARED[kind][0]
    return (module.boundless if kind == "boundless" else module.fit)(**options)


def test_missing_training_affects_only_dependent_experiments(
    some_kind: str, tmp_path: Path
) -> None:
    path = write(tmp_path, declare(some_kind), DECLARED[some_kind][1], OTHER)
    with pytest.warns(mechdsl.MechdslWarning, match="isn't trained"):
        found = run(path).files[0]
    assert [each.name for each in found.experiments] == ["control"]
    found = run(path, fit=True).files[0]
    assert {each.name for each in found.experiments} == {"e", "control"}


def test_validate_plan_and_explain_work_before_a_training(some_kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, declare(some_kind), DECLARED[some_kind][1])
    assert not has_errors(mechdsl.validate(path, models()))
    assert mechdsl.plan(path, models=models()) is not None
    assert DECLARED[some_kind][3] in str(mechdsl.explain(path, models=models()))


@pytest.mark.parametrize(("patch", "name"), [("rotation", "basis d"), ("mask", "group g")])
def test_measuring_training_rows_of_a_rotation_or_mask_is_rejected(
    patch: str, name: str, tmp_path: Path
) -> None:
    patches = DECLARED[patch][1].replace("prompts second", "prompts p").replace("turned", "other")
    said = f"measures rows that `{name[-1]}` is trained on"
    with pytest.raises(mechdsl.MechdslError, match=said) as found:
        train(write(tmp_path, declare(patch), patches))
    assert found.value.diagnostics[0].code == "E0345"
    options = f"{DECLARED[patch][0].QUICK}, measure_on_training_rows: true"
    allowed = write(tmp_path, declare(patch, options=options), patches)
    train(allowed)
    (done,) = run(allowed).files[0].experiments
    assert "4 of the 4 rows measured here are training rows" in done.conventions[name]


def test_damaged_training_is_trained_again(some_kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, declare(some_kind), DECLARED[some_kind][1])
    (found,) = train(path)
    weights = found.folder / DECLARED[some_kind][2]
    before = weights.read_bytes()
    weights.write_bytes(before[:-8])
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path)
    train(path)
    assert weights.read_bytes() == before


def test_interrupted_training_resumes_with_the_same_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C, the next training resumes from the checkpoint and ends with the weights of an
    uninterrupted one."""
    stops = "" if kind == "circuit" else ", patience: 9"
    quick = f"{DECLARED[kind][0].QUICK}{stops}"
    path = write(tmp_path, declare(kind, options=quick), DECLARED[kind][1])
    (whole,) = train(path)
    expected = (whole.folder / DECLARED[kind][2]).read_bytes()
    part, steps = interrupt_training(path, whole.folder, monkeypatch)
    real = Training._step  # pyright: ignore[reportPrivateUsage]

    def counted(self: Any) -> None:
        steps.append(self.state.step)
        real(self)

    monkeypatch.setattr(Training, "_step", counted)
    (found,) = train(path, fresh=True)
    assert steps == [*range(6)]
    assert (found.folder / DECLARED[kind][2]).read_bytes() == expected
    assert not part.exists()


EDITS = [kind for kind in DECLARED if kind not in ("mask", "circuit")]


@pytest.mark.parametrize("kind", some(EDITS, ("boundless", "edit")))
def test_training_that_rereads_vectors_each_step_gives_the_same_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the vectors exceed the buffer, weights and report equal those of a training with all
    vectors in memory, whose start uses the same rows."""
    path = write(tmp_path, declare(kind), DECLARED[kind][1])
    (first,) = train(path)
    width = max(own.shape[-1] for own in load_file(first.folder / DECLARED[kind][2]).values())
    read: list[int] = []
    real = ObjectiveRows._read_all  # pyright: ignore[reportPrivateUsage]
    few_rows = ObjectiveRows.first_rows.func

    def counted(self: ObjectiveRows, rows: Any) -> Any:
        read.append(len(rows))
        return real(self, rows)

    def trained() -> tuple[list[float], dict[str, Tensor], list[int]]:
        read.clear()
        (found,) = train(path, fresh=True)
        assert found.report.rows == first.report.rows
        numbers = [own for own in vars(found.report).values() if isinstance(own, float)]
        return numbers, load_file(found.folder / DECLARED[kind][2]), [*read]

    monkeypatch.setattr(ObjectiveRows, "_read_all", counted)
    monkeypatch.setattr(objective_rows, "CHUNK_BYTES", 3 * 2 * 4 * width)
    with monkeypatch.context() as patch:  # all vectors, and those of few rows at the start
        few = property(lambda self: real(self, few_rows(self))[0])
        patch.setattr(ObjectiveRows, "first_vectors", few)
        patch.setattr(ObjectiveRows, "first_rows", property(lambda self: np.sort(self.rows)))
        numbers, weights, once = trained()
    other_numbers, other_weights, often = trained()
    assert once == [4]
    assert len(often) > 10
    assert max(often) <= 3
    for name, own in weights.items():
        assert torch.allclose(other_weights[name], own, atol=1e-5), name
    assert other_numbers == pytest.approx(numbers, abs=1e-4, nan_ok=True)


DIMENSIONS = "resid_post layer 1 dims * at last token"
MASKED = {
    "sites": (masks.fit(), masks.PATCHES, 2),
    "means of sites": (
        masks.fit(source="with: mean"),
        experiment("ablate g at last token with mean"),
        2,
    ),
    "edges": (circuits.fit(), circuits.PATCHES, 2),
    "positions": (positions.fit(), positions.PATCHES, 3),
    "dimensions": (coordinates.fit(at=DIMENSIONS), masks.PATCHES, 2),
    "means of dimensions": (
        coordinates.fit(at=DIMENSIONS, source="with: mean"),
        experiment("ablate g at last token with mean"),
        2,
    ),
}
"""The declaration, an experiment, and the number of rows read at once."""


@pytest.mark.parametrize("name", some(MASKED, [*MASKED][::3]))
def test_mask_training_that_rereads_vectors_gives_the_same_mask(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, used, most = MASKED[name]
    path = write(tmp_path, line, used)
    (whole,) = train(path)
    read: list[int] = []
    real = MaskRows._read_all  # pyright: ignore[reportPrivateUsage]

    def counted(self: MaskRows, rows: Any) -> Any:
        read.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(MaskRows, "_read_all", counted)
    for module in (objective_rows, training_cost):
        monkeypatch.setattr(module, "CHUNK_BYTES", 8)
    (parts,) = train(path)
    assert parts.folder != whole.folder
    first, second = (json.loads((own.folder / "mask.json").read_text()) for own in (whole, parts))
    assert second["chosen"] == first["chosen"]
    assert second["probabilities"] == pytest.approx(first["probabilities"], abs=1e-5)
    assert max(read) <= most
    assert (len(read) > 10) == (name != "means of sites")  # means are read once


def test_training_key_and_cost_depend_on_exceeding_the_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, declare("vector"), DECLARED["vector"][1])
    (whole,) = train(path)
    (price,) = list_training_costs(checked(path, "llama"))
    for module in (objective_rows, training_cost):
        monkeypatch.setattr(module, "CHUNK_BYTES", 200)
    (parts,) = train(path)
    assert parts.folder != whole.folder
    (more,) = list_training_costs(checked(path, "llama"))
    assert more.memory < price.memory
    assert more.cost.multiply_adds > price.cost.multiply_adds


def test_training_keeps_gradient_flags_of_the_callers_model(some_kind: str, tmp_path: Path) -> None:
    model = copy.deepcopy(bare("gpt2")).requires_grad_()
    path = write(tmp_path, declare(some_kind), DECLARED[some_kind][1])
    mechdsl.fit(path, {"m": (model, word_tokenizer())}, store=tmp_path / "store")
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
