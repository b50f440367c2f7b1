"""What is common to rotations, vectors, edits, scales and masks: a training on a measure."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mechdsl
from mechdsl.diagnostics.core import has_errors
from mechdsl.fits.training import Training

from ..execute.support import word_tokenizer
from ..rules.models import bare
from . import test_boundless_rotations as boundless
from . import test_soft_prompts as prompts
from . import test_trained_edits as edits
from . import test_trained_masks as masks
from . import test_trained_rotations as rotations
from . import test_trained_scales as scales
from . import test_trained_vectors as vectors
from .test_trained_rotations import OTHER, interrupt_training, models, run, train, write

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
}
"""Module with the declaration, an experiment that uses it, the file of its weights, and what
`explain` says before the training."""


@pytest.fixture(params=DECLARED)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def declare(kind: str, **options: Any) -> str:
    module = DECLARED[kind][0]
    return (module.boundless if kind == "boundless" else module.fit)(**options)


def test_only_what_needs_a_training_is_lost(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, declare(kind), DECLARED[kind][1], OTHER)
    with pytest.warns(mechdsl.MechdslWarning, match="isn't trained"):
        found = run(path).files[0]
    assert [each.name for each in found.experiments] == ["control"]
    found = run(path, fit=True).files[0]
    assert {each.name for each in found.experiments} == {"e", "control"}


def test_a_file_without_a_training_can_be_looked_at(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, declare(kind), DECLARED[kind][1])
    assert not has_errors(mechdsl.validate(path, models()))
    assert mechdsl.plan(path, models=models()) is not None
    assert DECLARED[kind][3] in str(mechdsl.explain(path, models=models()))


@pytest.mark.parametrize(("patch", "name"), [("rotation", "basis d"), ("mask", "group g")])
def test_training_rows_are_not_measured(patch: str, name: str, tmp_path: Path) -> None:
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


def test_a_damaged_training_is_trained_again(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, declare(kind), DECLARED[kind][1])
    (found,) = train(path)
    weights = found.folder / DECLARED[kind][2]
    before = weights.read_bytes()
    weights.write_bytes(before[:-8])
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path)
    train(path)
    assert weights.read_bytes() == before


def test_interrupted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C, the next training continues from the checkpoint, and ends with the weights of
    an uninterrupted one."""
    quick = f"{DECLARED[kind][0].QUICK}, patience: 9"
    path = write(tmp_path, declare(kind, options=quick), DECLARED[kind][1])
    (whole,) = train(path)
    expected = (whole.folder / DECLARED[kind][2]).read_bytes()
    part, steps = interrupt_training(path, whole.folder, monkeypatch)
    real = Training._step

    def counted(self: Any) -> None:
        steps.append(self.state.step)
        real(self)

    monkeypatch.setattr(Training, "_step", counted)
    (found,) = train(path, fresh=True)
    assert steps == [*range(6)]
    assert (found.folder / DECLARED[kind][2]).read_bytes() == expected
    assert not part.exists()


def test_a_model_of_the_caller_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    model = copy.deepcopy(bare("gpt2")).requires_grad_()
    path = write(tmp_path, declare(kind), DECLARED[kind][1])
    mechdsl.fit(path, {"m": (model, word_tokenizer())}, store=tmp_path / "store")
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
