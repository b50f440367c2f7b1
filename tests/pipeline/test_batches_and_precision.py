"""`accumulate` and `precision` of `fit`: batches whose gradients are averaged, and steps in bf16.

Trainings against larger batches and against trainings in float32; the passes that run in bf16;
interruptions, keys, tables, and errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.execute.patching import differentiated_run
from mechdsl.fits.training import Training
from mechdsl.forward.packed import unembedding
from mechdsl.pipeline.trained_files import list_training_costs
from mechdsl.planner.training_cost import TrainingCost
from mechdsl.show.trainings import print_trained_fits

from ..quick import in_turn, some
from . import test_own_trainers as own
from . import test_trained_dictionaries as dictionaries
from . import test_trained_lenses as lenses
from . import test_trained_rotations as rotations
from . import test_trainings_on_a_measure as on_a_measure
from .test_own_trainers import train, write_own
from .test_trained_dictionaries import models
from .test_trained_rotations import HERE, interrupt_training

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

Declare = Callable[[str], str]


def on_measure(kind: str) -> tuple[Declare, str, str]:
    _, use, file, _ = on_a_measure.DECLARED[kind]
    return lambda options: on_a_measure.declare(kind, options=options), use, file


TRANSCODER = 'transcoder(features: 24, penalty: 0.2, kind: "relu")'
WEIGHTS = "sae_weights.safetensors"
DECLARED: dict[str, tuple[Declare, str, str]] = {
    **{kind: on_measure(kind) for kind in on_a_measure.DECLARED},
    "sae": (partial(dictionaries.fit, dictionaries.SAE), dictionaries.ABLATES, WEIGHTS),
    "transcoder": (
        lambda options: dictionaries.fit(TRANSCODER, options, "mlp_out layer 1 at tokens *"),
        dictionaries.ABLATES,
        WEIGHTS,
    ),
    "lens": (lenses.fit, lenses.SEES, "lens.safetensors"),
    **{
        f"own {kind}": (lambda options, line=line: line(options=options), use, file)
        for kind, (line, use, file) in own.DECLARED.items()
    },
}
"""The declaration with options, an experiment that uses it, and the file of its weights."""
USUAL = "rate: 0.02, validation: 25%"
MANY = ("sae", "transcoder", "lens", "own dictionary")
"""Kinds that train on more vectors than there are rows."""


def declare(kind: str, folder: Path, options: str) -> Path:
    line, use, _ = DECLARED[kind]
    return write_own(folder, line(f"{USUAL}, {options}"), use)


def trained(
    kind: str, folder: Path, options: str, family: str = "llama", steps: int = 6
) -> mechdsl.TrainedFit:
    (found,) = train(declare(kind, folder, f"steps: {steps}, {options}"), family)
    return found


def numbers(found: mechdsl.TrainedFit, kind: str) -> Tensor:
    """All trained numbers in one flat tensor."""
    path = found.folder / DECLARED[kind][2]
    if path.suffix == ".json":
        return torch.tensor(json.loads(path.read_text("utf-8"))["probabilities"])
    tensors = load_file(path)
    assert {each.dtype for each in tensors.values()} == {torch.float32}
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


# --- trainings ------------------------------------------------------------------------------------

EACH = list(DECLARED)
"""In `make test`, each test that trains all kinds takes every fifth, with another offset."""


@pytest.mark.parametrize(("kind", "family"), in_turn(EACH, HERE, EACH[::5]))
def test_three_accumulated_batches_equal_one_batch_of_triple_size(
    kind: str, family: str, tmp_path: Path
) -> None:
    size = 6 if kind in MANY else 1
    parts = trained(kind, tmp_path, f"batch: {size}, accumulate: 3", family)
    whole = trained(kind, tmp_path, f"batch: {3 * size}", family)
    single = trained(kind, tmp_path, f"batch: {size}", family)
    assert parts.folder not in (whole.folder, single.folder)
    expected, other = numbers(whole, kind), numbers(single, kind)
    assert torch.allclose(numbers(parts, kind), expected, atol=1e-4, rtol=1e-3)
    shared = min(len(expected), len(other))  # a boundary may be elsewhere
    assert (other[:shared] - expected[:shared]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), in_turn(EACH, HERE, EACH[1::5]))
def test_weights_trained_in_bf16_are_close_to_fp32(kind: str, family: str, tmp_path: Path) -> None:
    start = trained(kind, tmp_path, "batch: 64", family, steps=0)
    plain = trained(kind, tmp_path, "batch: 64", family)
    mixed = trained(kind, tmp_path, 'batch: 64, precision: "bf16"', family)
    same = trained(kind, tmp_path, 'batch: 64, precision: "fp32"', family)
    assert same.folder == plain.folder != mixed.folder
    every = [numbers(each, kind) for each in (start, plain, mixed)]
    shared = min(map(len, every))  # a boundary may be elsewhere
    first, expected, rounded = (each[:shared] for each in every)
    # Adam's steps ignore the size of gradients, and bf16 may flip the sign of one near 0.
    assert 0 < (rounded - expected).norm() < 0.6 * (expected - first).norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", some(EACH, EACH[2::5]))
def test_interrupted_training_ends_with_the_same_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors in memory stay in float32, also after a checkpoint."""
    options = 'steps: 6, batch: 2, accumulate: 2, precision: "bf16"'
    path = declare(kind, tmp_path, options)
    (whole,) = train(path)
    expected = (whole.folder / DECLARED[kind][2]).read_bytes()
    monkeypatch.setattr(rotations, "train", train)
    interrupt_training(path, whole.folder, monkeypatch)
    (found,) = train(path, fresh=True)
    assert (found.folder / DECLARED[kind][2]).read_bytes() == expected


@pytest.mark.parametrize("kind", [*on_a_measure.DECLARED, "lens"])
def test_only_steps_run_the_model_in_bf16(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of start and end and the report run in float32."""
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    in_step, real = False, Training._step  # pyright: ignore[reportPrivateUsage]

    def step(self: Training) -> None:
        nonlocal in_step
        in_step = True
        real(self)
        in_step = False

    module = unembedding if kind == "lens" else differentiated_run
    run_full = module.run_full

    def noted(*given: Any, **options: Any) -> Any:
        done = run_full(*given, **options)
        assert done.logits is not None
        seen[in_step].add(done.logits.dtype)
        return done

    monkeypatch.setattr(Training, "_step", step)
    monkeypatch.setattr(module, "run_full", noted)
    trained(kind, tmp_path, 'batch: 2, precision: "bf16"')
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}


@pytest.mark.parametrize("family", HERE)
def test_training_on_kl_runs_in_bf16(family: str, tmp_path: Path) -> None:
    found: list[Tensor] = []
    for precision in ("fp32", "bf16"):
        options = f'steps: 6, batch: 2, {USUAL}, precision: "{precision}"'
        line = rotations.fit(options, objective="minimise: kl(other)")
        (one,) = train(rotations.write(tmp_path, line, rotations.PATCHES), family)
        found.append(rotations.rotation(one))
    assert 0 < (found[0] - found[1]).norm() < 0.1


# --- reports --------------------------------------------------------------------------------------

BOTH = 'batch: 2, accumulate: 3, precision: "bf16"'
MANNER = ", in bf16 with weights in fp32, each step on 3 batches of 2"


@pytest.mark.parametrize("kind", some(EACH, EACH[3::5]))
def test_tables_conventions_and_cards_name_both_options(kind: str, tmp_path: Path) -> None:
    path = declare(kind, tmp_path, f"steps: 2, {BOTH}")
    text = str(mechdsl.explain(path, models=models(), allow_python=True))
    assert MANNER in " ".join(text.split())
    (found,) = train(path, out=tmp_path / "out")
    assert found.what.endswith(MANNER)
    console = Console(file=StringIO(), width=400)
    print_trained_fits([found], console)
    assert MANNER in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    (card,) = (tmp_path / "out").glob("*/README.md")
    assert "accumulate: 3, precision: bf16" in card.read_text("utf-8")
    (done,) = own.run(path).files[0].experiments
    assert any(MANNER in each for each in done.conventions.values())


@pytest.mark.parametrize("kind", ["vector", "sae"])
def test_default_accumulate_and_precision_are_not_described(kind: str, tmp_path: Path) -> None:
    usual = trained(kind, tmp_path, "batch: 2")
    written = trained(kind, tmp_path, 'batch: 2, accumulate: 1, precision: "fp32"')
    assert written.folder == usual.folder
    assert "batches" not in usual.what
    assert "fp32" not in usual.what


@pytest.mark.parametrize("kind", ["vector", "sae", "mask"])
def test_accumulation_costs_the_larger_batch_and_the_memory_of_one(
    kind: str, tmp_path: Path
) -> None:
    def price(options: str) -> TrainingCost:
        path = declare(kind, tmp_path, f"steps: 100, {options}")
        (found,) = list_training_costs(dictionaries.checked(path, "llama"))
        return found

    parts, whole, single = map(price, ("batch: 1, accumulate: 3", "batch: 3", "batch: 1"))
    assert parts.cost.multiply_adds == pytest.approx(whole.cost.multiply_adds, rel=0.05)
    assert parts.cost.multiply_adds > 1.5 * single.cost.multiply_adds
    assert parts.memory == single.memory <= whole.memory
    assert parts.cost.backwards == (0 if kind == "sae" else 300)


# --- mistakes -------------------------------------------------------------------------------------

BATCH_TOPK = dictionaries.SAE.replace(")", ', kind: "batch_topk")')
MATRYOSHKA = dictionaries.SAE.replace(")", ', kind: "matryoshka")')
MISTAKES: dict[str, tuple[str, str, str]] = {
    "no number": (dictionaries.SAE, "accumulate: 0", "write `accumulate: 4`"),
    "half": (dictionaries.SAE, "accumulate: 1.5", "is a whole number from 1 on"),
    "fp16": (dictionaries.SAE, 'precision: "fp16"', 'is "fp32" or "bf16", in quotes'),
    "no quotes": (dictionaries.SAE, "precision: bf16", 'write `precision: "bf16"`'),
    "batch_topk": (BATCH_TOPK, "accumulate: 2", "compares the features of a whole batch"),
    "matryoshka": (MATRYOSHKA, "accumulate: 2", "`matryoshka` compares the features of a whole"),
    "torch": (dictionaries.SAE, 'dtype: "bf16"', "write `precision: …`"),
    "lightning": (dictionaries.SAE, "accumulate_grad_batches: 4", "write `accumulate: …`"),
    "ica parts": ("ica(components: 4)", "accumulate: 2", "uses all vectors in every step"),
    **{
        name: (inner, 'precision: "bf16"', f"with `{name}`, which computes in 64 bits")
        for name, inner in {
            "semi_nmf": "semi_nmf(factors: 4)",
            "ica": "ica(components: 4)",
            "cca": "cca(components: 2)",
            "mixture": "mixture(components: 4)",
        }.items()
    },
}


@pytest.mark.parametrize("case", MISTAKES)
def test_invalid_accumulate_or_precision_is_rejected_by_validate(case: str, tmp_path: Path) -> None:
    inner, options, said = MISTAKES[case]
    more = "" if "components" in inner or "factors" in inner else ", steps: 2"
    path = write_own(tmp_path, dictionaries.fit(inner, options + more), dictionaries.ABLATES)
    found = [each for each in mechdsl.validate(path, models()) if each.severity == "error"]
    assert any(said in f"{each.message} {each.help_text}" for each in found), found
    assert {each.code for each in found} <= {"E0207", "E0342"}


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_closed_form_probes_reject_accumulate_and_precision(kind: str, tmp_path: Path) -> None:
    target = "target: w" if kind == "ridge" else "target: cue"
    for option, why in (("accumulate: 2", "trained in steps"), ('precision: "bf16"', "64 bits")):
        line = f"probe l = fit({kind}, prompts: p, {target}, {option}) at resid_post layer 1\n"
        path = write_own(tmp_path, line, dictionaries.ABLATES.replace("f at", "l at"))
        found = [each for each in mechdsl.validate(path, models()) if each.severity == "error"]
        assert any(each.code == "E0207" and why in each.message for each in found), found


def test_batch_topk_accepts_accumulate_1(tmp_path: Path) -> None:
    path = write_own(tmp_path, dictionaries.fit(BATCH_TOPK, "accumulate: 1"), dictionaries.ABLATES)
    assert not [each for each in mechdsl.validate(path, models()) if each.severity == "error"]
