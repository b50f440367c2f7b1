"""Trainers of a Python file: `fit(python("own.py:TopK", features: 24, k: 4), …)`.

Trainings against loops that share no code with the package, on the bare model, one unpadded prompt
at a time; keys; and errors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.execute.training import RowVectors
from mechdsl.fits.reports import MaskReport, RotationReport, VectorReport
from mechdsl.pipeline.trained_files import fits_of_file
from mechdsl.program import code_hashes

from ..quick import in_turn, some
from ..rules.models import double
from ..rules.support import plain, rows
from . import test_trained_dictionaries as dictionaries
from . import test_trained_masks as masks
from . import test_trained_rotations as rotations
from . import test_trained_vectors as vectors
from .own_trainers import FEATURES, START, K
from .test_trained_dictionaries import models, write
from .test_trained_dictionaries import train as train_without_code
from .test_trained_rotations import HERE, LOSS, OTHER, SITE, interrupt_training

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
CODE = Path(__file__).with_name("own_trainers.py").read_text("utf-8")
TOP_K = f'python("own.py:TopK", features: {FEATURES}, k: {K})'
SHIFT = 'python("own.py:Shift", weight: 0.3)'
TURN = 'python("own.py:Turn", dims: 2)'
SOFT = 'python("own.py:Soft", size: 3)'


def dictionary(inner: str = TOP_K, options: str = dictionaries.QUICK) -> str:
    return dictionaries.fit(inner, options)


def vector(inner: str = SHIFT, options: str = rotations.QUICK, word: str = "maximise") -> str:
    return vectors.fit(options, inner=inner, objective=f"{word}: {LOSS}")


def rotation(inner: str = TURN, options: str = rotations.QUICK) -> str:
    return rotations.fit(options).replace("das(dims: 2)", inner)


def mask(inner: str = SOFT, options: str = rotations.QUICK) -> str:
    return masks.fit(options).replace("mask(size: 3)", inner)


DECLARED = {
    "dictionary": (dictionary, dictionaries.ABLATES, "sae_weights.safetensors"),
    "vector": (vector, vectors.ADD, "vector.safetensors"),
    "rotation": (rotation, rotations.PATCHES, "rotation.safetensors"),
    "mask": (mask, masks.PATCHES, "mask.json"),
}


def write_own(folder: Path, *parts: str, code: str = CODE) -> Path:
    (folder / "own.py").write_text(code, "utf-8")
    return write(folder, *parts)


def train(path: Path, family: str = "llama", **options: Any) -> list[mechdsl.TrainedFit]:
    return train_without_code(path, family, **{"allow_python": True, **options})


def run(path: Path, **options: Any) -> Any:
    return rotations.run(path, **{"allow_python": True, **options})


# --- trainings ------------------------------------------------------------------------------------


def test_custom_dictionary_trainer_equals_a_reference_loop(tmp_path: Path) -> None:
    options = f"{dictionaries.QUICK}, seed: 3, validation: 25%"
    path = write_own(tmp_path, dictionary(options=options), dictionaries.ABLATES)
    (found,) = train(path)
    training = next(iter(fits_of_file(dictionaries.checked(path, "llama")).values())).training
    own = RowVectors(training, dictionaries.adopted_for("llama"), 0, None)
    random = torch.Generator().manual_seed(START)
    start = torch.randn(FEATURES, own.chunk(0)[0].shape[1], generator=random)
    expected = dictionaries.trained_by_hand(own.chunk(0)[0], seed=3, rows_=start)
    weights = load_file(found.folder / "sae_weights.safetensors")
    assert weights.keys() == expected.keys()
    for name, each in expected.items():
        assert torch.allclose(weights[name], each, atol=1e-4, rtol=1e-3), name
    held_out = own.held_out()[0]
    active = dictionaries.encoded(held_out, weights) > 0
    assert found.report.active == pytest.approx(float(active.sum(1).float().mean()))
    assert found.what == f"topk SAE with k {K} by TopK"


def training_row_ids(path: Path) -> list[int]:
    """Row ids in the order of the training; the first one is held out."""
    (declared,) = fits_of_file(rotations.checked(path, double("llama"))).values()
    assert declared.objective is not None
    table = declared.objective.table
    order = sorted(range(4), key=lambda n: stable_hash(3, "training row", table.row_keys[n]))
    return [table.row_ids[row] for row in order]


@pytest.mark.parametrize(("family", "word"), in_turn(HERE, ["maximise", "minimise"]))
def test_custom_vector_trainer_equals_a_reference_loop(
    family: str, word: str, tmp_path: Path
) -> None:
    line = vector(options=f"{rotations.QUICK}, seed: 3", word=word)
    path = write_own(tmp_path, line, vectors.ADD)
    (found,) = train(path, family)
    ids, sign = training_row_ids(path), -1 if word == "maximise" else 1
    sites = [plain(family, rows("clean")[row])["resid_post", 1][-1].flatten() for row in ids]
    start = 0.1 * torch.stack(sites).mean(0).double()

    def value(row: int, added: Tensor) -> Tensor:
        return vectors.value_by_hand(family, row, SITE, "last token", added)

    def loss(own: Tensor, row: int) -> Tensor:
        return sign * value(row, own) + 0.3 * own.abs().sum()

    own = vectors.vector(found).double()
    expected = vectors.trained_by_hand(start, ids[1:], loss)
    assert torch.allclose(own, expected, atol=2e-3 * float(expected.norm()))
    assert (expected - start).norm() > 0.1 * expected.norm()
    report = found.report
    assert isinstance(report, VectorReport)
    assert report.trained == pytest.approx(value(ids[0], own).item(), abs=1e-3)
    assert report.unsteered == pytest.approx(value(ids[0], 0 * own).item(), abs=1e-3)


def test_custom_rotation_trainer_equals_a_reference_loop(tmp_path: Path) -> None:
    line = rotation(options=f"{rotations.QUICK}, seed: 3")
    path = write_own(tmp_path, line, rotations.PATCHES)
    (found,) = train(path)
    ids, own = training_row_ids(path), rotations.rotation(found).double()
    random = torch.Generator().manual_seed(START)
    start = torch.randn(2, own.shape[1], generator=random).double()

    def value(row: int, matrix: Tensor) -> Tensor:
        directions = rotations.orthonormal_by_hand(matrix)
        return rotations.value_by_hand("llama", row, SITE, "last token", directions)

    made = vectors.trained_by_hand(start, ids[1:], lambda own, row: -value(row, own))
    expected = rotations.orthonormal_by_hand(made)
    assert torch.allclose(own, expected, atol=2e-3)
    assert (expected - rotations.orthonormal_by_hand(start)).abs().max() > 0.02
    report = found.report
    assert isinstance(report, RotationReport)
    assert report.untrained == pytest.approx(value(ids[0], start).item(), abs=1e-3)
    assert report.trained == pytest.approx(value(ids[0], made).item(), abs=2e-2)


def test_custom_mask_trainer_equals_a_reference_loop(tmp_path: Path) -> None:
    path = write_own(tmp_path, mask(options=f"{rotations.QUICK}, seed: 3"), masks.PATCHES)
    (found,) = train(path)
    declared, _ = masks.training_rows(path, double("llama"))
    ids, points = training_row_ids(path), declared.candidates

    def value(row: int, gates: Tensor) -> Tensor:
        return masks.value_by_hand("llama", row, points, gates, "from: other", "last token")

    start = torch.linspace(-0.1, 0.1, len(points)).double()
    scores = vectors.trained_by_hand(start, ids[1:], lambda own, row: -value(row, own.sigmoid()))
    stored = json.loads((found.folder / "mask.json").read_text("utf-8"))
    assert np.allclose(stored["probabilities"], scores.sigmoid(), atol=2e-3)
    chosen = sorted(scores.argsort(descending=True)[:3].tolist())
    assert stored["chosen"] == chosen
    hard = torch.zeros(len(points), dtype=torch.float64)
    hard[chosen] = 1
    assert isinstance(found.report, MaskReport)
    assert found.report.trained == pytest.approx(value(ids[0], hard).item(), abs=2e-3)


NOISY = {
    "dictionary": TOP_K.replace(")", ", noise: 0.3)"),
    "vector": SHIFT.replace(")", ", growth: -0.01, noise: 0.01)"),
    "rotation": TURN.replace(")", ", growth: -0.001)"),
    "mask": SOFT.replace(")", ", noise: 0.5)"),
}
"""Trainers with random numbers and buffers."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", some(DECLARED, [*DECLARED][1:2]))
def test_interrupted_custom_training_ends_with_the_same_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare, use, file = DECLARED[kind]
    options = dictionaries.QUICK if kind == "dictionary" else rotations.QUICK
    path = write_own(tmp_path, declare(NOISY[kind], f"{options}, patience: 9"), use)
    (whole,) = train(path)
    expected = (whole.folder / file).read_bytes()
    monkeypatch.setattr(rotations, "train", train)
    interrupt_training(path, whole.folder, monkeypatch)
    (found,) = train(path, fresh=True)
    assert (found.folder / file).read_bytes() == expected
    (other,) = train(write_own(tmp_path, declare(NOISY[kind], f"{options}, seed: 1"), use))
    assert (other.folder / file).read_bytes() != expected


@pytest.mark.parametrize("kind", some(DECLARED, [*DECLARED][::2]))
def test_rules_use_the_result_of_a_custom_trainer(kind: str, tmp_path: Path) -> None:
    declare, use, _ = DECLARED[kind]
    path = write_own(tmp_path, declare(), use, OTHER)
    with pytest.warns(mechdsl.MechdslWarning, match="isn't trained"):
        assert len(run(path).files[0].experiments) == 1
    found = run(path, fit=True).files[0].experiments
    assert len(found) == 2
    assert "own.py, SHA-256 " in str(found[0].conventions)
    assert run(path).complete


@pytest.mark.parametrize("kind", some(DECLARED, [*DECLARED][::2]))
def test_validate_plan_and_explain_work_before_a_custom_training(kind: str, tmp_path: Path) -> None:
    """`validate` never runs code of Python files."""
    declare, use, _ = DECLARED[kind]
    path = write_own(tmp_path, declare(), use, code=f"{CODE}\nraise RuntimeError")
    assert not [each for each in mechdsl.validate(path, models()) if each.severity == "error"]
    path = write_own(tmp_path, declare(), use)
    assert mechdsl.plan(path, models=models(), allow_python=True) is not None
    assert "own.py, SHA-256 " in str(mechdsl.explain(path, models=models(), allow_python=True))


def test_card_names_the_code_of_a_custom_trainer(tmp_path: Path) -> None:
    path = write_own(tmp_path, dictionary(), dictionaries.ABLATES)
    (found,) = train(path, out=tmp_path / "out")
    card = json.loads((found.folder / "fit.json").read_text("utf-8"))
    assert card["code"]["name"] == card["trainer"] == "TopK"
    text = (tmp_path / "out" / "f" / "README.md").read_text("utf-8")
    assert f"- Code: `TopK` of own.py, SHA-256 {card['code']['sha256']}" in text
    assert "- Loss: " not in text


# --- keys -----------------------------------------------------------------------------------------


def test_custom_training_key_depends_on_code_options_and_class(tmp_path: Path) -> None:
    (base,) = train(write_own(tmp_path, dictionary(), dictionaries.ABLATES))
    folders = {base.folder}
    weights = load_file(base.folder / "sae_weights.safetensors")["W_dec"]
    other = CODE.replace("START = 24, 4, 7", "START = 24, 4, 8")
    changes: dict[str, tuple[str, str]] = {
        "code": (dictionary(), other),
        "option": (dictionary(TOP_K.replace(")", ", noise: 0.5)")), CODE),
        "class": (
            dictionary(TOP_K.replace("TopK", "Other")),
            f"{CODE}\nclass Other(TopK):\n    def after_step(self):\n        pass\n",
        ),
    }
    for name, (line, code) in changes.items():
        path = write_own(tmp_path, line, dictionaries.ABLATES, code=code)
        with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
            run(path)
        (found,) = train(path)
        assert found.folder not in folders, name
        folders.add(found.folder)
        changed = load_file(found.folder / "sae_weights.safetensors")["W_dec"]
        assert not torch.equal(weights, changed), name


def test_custom_training_key_ignores_the_file_name(tmp_path: Path) -> None:
    (base,) = train(write_own(tmp_path, dictionary(), dictionaries.ABLATES))
    (tmp_path / "renamed.py").write_text(CODE, "utf-8")
    line = dictionary(TOP_K.replace("own.py", "renamed.py"))
    (found,) = train(write(tmp_path, line, dictionaries.ABLATES))
    assert (found.folder, found.seconds) == (base.folder, 0.0)


def test_modified_import_of_a_custom_trainer_needs_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import's text is in the key, but the process still has the old text in memory."""
    lib = tmp_path / "lib"
    lib.mkdir()
    monkeypatch.syspath_prepend(lib)
    monkeypatch.setattr(code_hashes, "_IMPORTED", {})
    helper = lib / "helper_of_own_trainers.py"
    helper.write_text("factor = 1\n", "utf-8")
    code = f"from helper_of_own_trainers import factor\n{CODE}"
    path = write_own(tmp_path, dictionary(), dictionaries.ABLATES, code=code)
    (first,) = train(path)
    helper.write_text("factor = 22\n", "utf-8")
    with pytest.raises(mechdsl.MechdslError, match="may have changed since") as found:
        train(path)
    assert found.value.diagnostics[0].code == "E0643"
    assert "new process" in str(found.value)
    monkeypatch.delitem(sys.modules, "helper_of_own_trainers")
    monkeypatch.setattr(code_hashes, "_IMPORTED", {})
    (second,) = train(path)
    assert second.folder != first.folder
    monkeypatch.delitem(sys.modules, "helper_of_own_trainers")


# --- mistakes -------------------------------------------------------------------------------------


def test_custom_trainer_runs_only_if_python_is_allowed(tmp_path: Path) -> None:
    path = write_own(tmp_path, vector(), vectors.ADD, code=f"{CODE}\nraise RuntimeError")
    for action in (train, run):
        with pytest.raises(mechdsl.MechdslError) as found:
            action(path, allow_python=False)
        errors = [each for each in found.value.diagnostics if each.severity == "error"]
        assert [each.code for each in errors] == ["E0221"]
        assert "`Shift` is Python code" in str(found.value)


CALLS: dict[str, tuple[str, str, str]] = {
    "no file": ('"oven.py:TopK"', "E0222", "there is no file `oven.py`"),
    "no class": ('"own.py:TopL"', "E0222", "`own.py` defines no class `TopL`"),
    "function": ('"own.py:make"', "E0222", "`own.py` defines no class `make`"),
    "no text": ("TopK", "E0222", "takes one text in quotes"),
    "no base": ('"own.py:Bare"', "E0222", "write `class Bare(torch.nn.Module):`"),
    "no methods": ('"own.py:Empty"', "E0222", "`Empty` has no method of a trainer"),
    "no weights": ('"own.py:Half"', "E0222", "define it: `def weights(self):`"),
    "two kinds": ('"own.py:Both"', "E0222", "makes several things: it defines `loss`"),
    "no width": ('"own.py:Wide"', "E0222", "write `def __init__(self, width, features):`"),
    "arguments": ('"own.py:Many"', "E0222", "write `def loss(self, vectors):`"),
    "architecture": ('"own.py:Odd"', "E0222", "there is no architecture `sparse`"),
    "direction": ('"own.py:Shift"', "E0342", "`Shift` trains a direction"),
    "no features": ('"own.py:TopK", k: 4', "E0207", "needs `features: …`"),
    "no k": ('"own.py:TopK", features: 24', "E0207", "needs `k: …`"),
    "unknown option": (f'"own.py:TopK", features: {FEATURES}, k: 4, kay: 3', "E0207", "`kay`"),
    "text": ('"own.py:TopK", features: "many", k: 4', "E0342", "`features` is a whole number"),
    "many active": ('"own.py:TopK", features: 3, k: 4', "E0342", "is more than `features: 3`"),
    "no constant": ('"own.py:TopK", features: 24, k: 4, noise: p', "E0342", "isn't a constant"),
}
MORE = """

def make():
    return TopK(1, 1, 1)

class Bare:
    def loss(self, vectors): ...
    def weights(self): ...

class Empty(nn.Module):
    def forward(self, vectors): ...

class Half(nn.Module):
    def loss(self, vectors): ...

class Both(TopK):
    def vector(self): ...

class Wide(TopK):
    architecture = "standard"
    def __init__(self, size, features): ...

class Many(TopK):
    def loss(self, vectors, targets): ...

class Odd(TopK):
    architecture = "sparse"
"""


@pytest.mark.parametrize("name", CALLS)
def test_invalid_custom_trainer_call_is_rejected_without_running_it(
    name: str, tmp_path: Path
) -> None:
    arguments, code, message = CALLS[name]
    line = dictionary(f"python({arguments})")
    path = write_own(tmp_path, line, dictionaries.ABLATES, code=f"{CODE}{MORE}\nraise OSError")
    found = [each for each in mechdsl.validate(path, models()) if each.severity == "error"]
    assert [each.code for each in found] == [code], found
    said = f"{found[0].message} {found[0].label_text} {found[0].help_text}"
    assert message in said
    assert found[0].span is not None


def test_custom_trainer_on_a_decoder_is_rejected(tmp_path: Path) -> None:
    line = dictionary().replace("prompts: p", "prompts: decoder of big")
    big = dictionaries.fit().replace("basis f", "basis big")
    path = write_own(tmp_path, big, line, dictionaries.ABLATES)
    found = [each for each in mechdsl.validate(path, models()) if each.severity == "error"]
    assert found[0].code == "E0342"
    assert "`python` isn't trained on the decoder" in found[0].message + found[0].label_text


def test_custom_trainer_for_a_lens_is_rejected(tmp_path: Path) -> None:
    line = f"lens l = fit({TOP_K}, prompts: p) at resid_post layer * at tokens *\n"
    path = write_own(tmp_path, line, OTHER)
    found = [each for each in mechdsl.validate(path, models()) if each.severity == "error"]
    assert [each.code for each in found] == ["E0342"]


FAILURES: dict[str, tuple[str, str, str]] = {
    "start": ("super().__init__()", "1 / 0", "`TopK.__init__` raised ZeroDivisionError"),
    "no parameters": (
        "nn.Parameter(",
        "torch.clone(",
        "made a module without parameters",
    ),
    "import": ("import torch\n", "import torch\nimport no_such_module\n", "no_such_module"),
    "loss": (".square().sum(1).mean()", ".square().sum(1)", "`TopK.loss` returned [16]"),
    "number": (
        "return (vectors - features @ self.decoder - self.center).square().sum(1).mean()",
        "return 3.0",
        "`TopK.loss` returned float",
    ),
    "gradient": (
        "return (vectors - features @ self.decoder - self.center).square().sum(1).mean()",
        "return vectors.mean()",
        "doesn't depend on the parameters",
    ),
    "raises": ("top = before", "raise ValueError('no top')\n        top = before", "no top"),
    "names": ('"b_dec": self.center', '"b": self.center', "`W_enc`, `b_enc`, `W_dec`, `b`"),
    "shape": ('"W_enc": self.encoder', '"W_enc": self.encoder.T', "returned [24, "),
    "state": (
        "self.decoder /= self",
        "self.k = self.k + 0.0\n        self.decoder /= self",
        "changes `self.k` during the training",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failing_custom_trainer_names_the_code_line(name: str, tmp_path: Path) -> None:
    old, new, message = FAILURES[name]
    assert old in CODE
    code = CODE.replace(old, new)
    path = write_own(tmp_path, dictionary(), dictionaries.ABLATES, code=code)
    with pytest.raises(mechdsl.MechdslError) as found:
        train(path)
    (problem,) = found.value.diagnostics
    assert problem.code == "E0223"
    assert message in problem.message
    assert "own.py:" in problem.label_text
    assert not list((tmp_path / "store" / "fits").glob("*.part"))


EFFECTS: dict[str, tuple[str, str, str, str]] = {
    "vector": ("vector", "return self.v +", "return self.v[:3] +", "`Shift.vector` "),
    "penalty": ("vector", "self.v.abs().sum()", "self.v.abs()", "`Shift.penalty` returned ["),
    "directions": ("rotation", "return self.rows\n", "return self.rows[:1]\n", "`Turn.directions`"),
    "dependent": ("rotation", "return self.rows\n", "return 0 * self.rows\n", "dependent rows"),
    "probabilities": (
        "mask",
        "return self.scores.sigmoid()",
        "return 3 + self.scores",
        "other numbers",
    ),
    "sample": ("mask", "torch.randn(rows, ", "torch.randn(", "`Soft.sample` returned [12]"),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_custom_trainer_with_invalid_results_is_rejected(name: str, tmp_path: Path) -> None:
    kind, old, new, message = EFFECTS[name]
    declare, use, _ = DECLARED[kind]
    assert old in CODE
    path = write_own(tmp_path, declare(), use, code=CODE.replace(old, new))
    with pytest.raises(mechdsl.MechdslError) as found:
        train(path)
    (problem,) = found.value.diagnostics
    assert problem.code == "E0223"
    assert message in problem.message


def test_nan_loss_of_a_custom_trainer_fails_the_training(tmp_path: Path) -> None:
    code = CODE.replace("square().sum(1).mean()", "square().sum(1).mean() * float('nan')")
    path = write_own(tmp_path, dictionary(), dictionaries.ABLATES, code=code)
    with pytest.raises(mechdsl.MechdslError, match="the loss isn't finite") as found:
        train(path)
    assert [each.code for each in found.value.diagnostics] == ["E0643"]


def test_untrusted_file_rejects_a_custom_trainer(tmp_path: Path) -> None:
    path = write_own(tmp_path, dictionary(), dictionaries.ABLATES)
    with pytest.raises(mechdsl.MechdslError) as found:
        train(path, allow_python=False, untrusted=True)
    assert "E0221" in {each.code for each in found.value.diagnostics}
    assert "remove `--untrusted`" in str(found.value)
