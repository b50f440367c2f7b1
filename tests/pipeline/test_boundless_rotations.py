"""Rotations with a learned size, `fit(boundless_das(…))`: differences from `das`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.fits.reports import RotationReport

from ..execute.support import word_tokenizer
from ..rules.models import bare, double
from .test_trained_dictionaries import experiment, run, train, write
from .test_trained_rotations import (
    OTHER,
    PATCH,
    PATCHES,
    QUICK,
    SITE,
    fit,
    orthonormal_by_hand,
    planted,
    rotation,
    training_errors,
    training_rows,
    value_by_hand,
    write_planted,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


def boundless(inner: str = "penalty: 1", **options: Any) -> str:
    return fit(**options).replace("das(dims: 2)", f"boundless_das({inner})")


def test_boundless_training_equals_reference_loop(tmp_path: Path) -> None:
    """The reference loop shares only its seeds with the package."""
    path = write(tmp_path, boundless("penalty: 0.5, dims: 5", options=f"{QUICK}, seed: 3"), PATCHES)
    (found,) = train(path)
    table = training_rows(path, double("llama")).objective.table
    order = sorted(range(4), key=lambda n: stable_hash(3, "training row", table.row_keys[n]))
    random = torch.Generator().manual_seed(stable_hash(3, "weights") % 2**63)
    width = bare("llama").config.hidden_size
    start = orthonormal_by_hand(torch.randn(5, width, generator=random, dtype=torch.float64))
    ids = [table.row_ids[row] for row in order]
    expected, boundary = trained_by_hand(start, ids[1:])
    own = rotation(found).double()
    assert abs(boundary - 0.5) > 0.05
    assert len(own) == round(boundary * 5)
    assert torch.allclose(own, expected[: len(own)], atol=2e-3)
    report = found.report
    assert isinstance(report, RotationReport)
    assert report.directions == len(own)
    cases = (expected[: len(own)], start[: len(own)])
    by_hand = [value_by_hand("llama", ids[0], SITE, "last token", each).item() for each in cases]
    assert report.trained == pytest.approx(by_hand[0], abs=2e-2)
    assert report.untrained == pytest.approx(by_hand[1], abs=1e-3)


def trained_by_hand(start: Tensor, ids: list[int]) -> tuple[Tensor, float]:
    """Six steps of Adam on batches of two of three rows, to maximise the measure."""
    values = [start, torch.tensor(0.5, dtype=torch.float64)]
    first, second = ([torch.zeros_like(each) for each in values] for _ in range(2))
    for step in range(6):
        random = torch.Generator().manual_seed(stable_hash(3, "order", step) % 2**63)
        batch = [ids[n] for n in torch.randperm(3, generator=random)[:2].tolist()]
        leaves = [each.clone().requires_grad_() for each in values]
        place = torch.arange(5).double() + 0.5
        weight = torch.sigmoid((leaves[1] * 5 - place) / (0.5 * 0.2 ** (step / 6)))
        rows = orthonormal_by_hand(leaves[0]) * weight.sqrt()[:, None]
        measured = [value_by_hand("llama", row, SITE, "last token", rows) for row in batch]
        loss = 0.5 * leaves[1] - torch.stack(measured).mean()
        slopes = torch.autograd.grad(loss, leaves)
        for n, slope in enumerate(slopes):
            first[n] = 0.9 * first[n] + 0.1 * slope
            second[n] = 0.999 * second[n] + 0.001 * slope**2
            size = (second[n] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            rate = 0.05 * min(1.0, (1 - step / 6) / 0.2)
            values[n] = values[n] - rate * first[n] / (1 - 0.9 ** (step + 1)) / size
        values = [orthonormal_by_hand(values[0]), values[1].clamp(0, 1)]
    return values[0], float(values[1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_boundless_training_finds_the_size_of_a_planted_subspace(seed: int, tmp_path: Path) -> None:
    model, plane = planted()
    path = write_planted(tmp_path, seed, 2, steps=1500)
    text = path.read_text("utf-8").replace("das(dims: 2)", "boundless_das(penalty: 10)")
    path.write_text(text, "utf-8")
    given = {"m": (model, word_tokenizer())}
    (found,) = mechdsl.fit(path, given, store=tmp_path / "store")
    result = mechdsl.run(path, given, store=tmp_path / "store").files[0]
    accuracy = {
        each.name: float((each.measures[0].patched == 1).mean()) for each in result.experiments
    }
    own = rotation(found)
    assert len(own) == 2
    assert accuracy["e"] >= 0.95
    assert accuracy["control"] <= 0.25
    assert torch.linalg.svdvals(own @ plane.T).min() > 0.95


def test_boundless_rotation_equals_its_saved_matrix_in_rules(tmp_path: Path) -> None:
    text = experiment(*PATCH) + OTHER
    path = write(tmp_path, boundless(), text)
    (trained,) = train(path, out=tmp_path)
    count = len(rotation(trained))
    assert 1 < count < bare("llama").config.hidden_size
    card = (tmp_path / "d" / "README.md").read_text("utf-8")
    assert card.startswith(f"# d: boundless_das rotation with {count} directions")
    own = run(path, fresh=True).files[0].experiments
    said = own[0].conventions["basis d"]
    assert f"boundless_das rotation with {count} directions" in said
    saved = 'saved("d/rotation.safetensors", "rotation")'
    loaded = run(write(tmp_path, f"basis d = {saved} at {SITE}\n", text), store=False)
    for one, two in zip(own, loaded.files[0].experiments, strict=True):
        assert np.allclose(one.measures[0].patched, two.measures[0].patched, 0, 2e-6)


def test_boundless_key_depends_on_dims_penalty_and_trainer(tmp_path: Path) -> None:
    """The key has the size of the space, the penalty and the rotation method."""
    folders: set[Path] = set()
    alone = boundless().replace("(penalty: 1)", "")
    others = [boundless(each) for each in ("penalty: 0.5", "dims: 5", "dims: 6")]
    for line in (alone, *others, fit()):
        (found,) = train(write(tmp_path, line, PATCHES))
        assert found.seconds > 0
        folders.add(found.folder)
    assert len(folders) == 5


MISTAKES: dict[str, tuple[str, str]] = {
    "below 0": ("penalty: -1", "E0342"),
    "text": ('penalty: "1"', "E0342"),
    "too many": ("dims: 21", "E0342"),
    "zero": ("dims: 0", "E0342"),
    "unknown": ("size: 3", "E0207"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_boundless_argument_is_rejected(name: str, tmp_path: Path) -> None:
    inner, code = MISTAKES[name]
    path = write(tmp_path, boundless(inner), PATCHES)
    errors = training_errors(path)
    assert errors[0].code == code, errors
