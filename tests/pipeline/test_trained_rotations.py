"""Rotations that a file declares with `fit(das(…))`.

Loss and gradient are compared with autograd on the bare model in float64, one unpadded prompt at a
time. Further tests: a planted subspace, use in rules, keys, and errors.
"""

from __future__ import annotations

import copy
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.execute.objective_rows import Edit, ObjectiveRows, take_source
from mechdsl.fits.reports import RotationReport
from mechdsl.fits.training import Training
from mechdsl.fits.vectors import exchange, orthonormal_rows
from mechdsl.pipeline.trained_files import fits_of_file

from ..execute.support import ROWS, context, shared, token, unchanged, word_tokenizer
from ..models import families
from ..quick import in_turn, some
from ..reference.forward import Write, side_by_side
from ..rules.models import bare, double
from ..rules.support import BLOCKS, plain, rows, tokens
from .test_trained_dictionaries import (
    assert_same_results,
    check_keys,
    experiment,
    run,
    train,
    write,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("gpt2", "llama", "gpt_neox")
LAYER, DIMS = 1, 2
SITE = f"resid_post layer {LAYER}"
LOSS = "logprob(wrong) - 0.5 * logit(answer)"
QUICK = "steps: 6, batch: 2, rate: 0.05, validation: 25%"
MEASURE = "measure logit(answer) - logit(wrong) as delta"


def fit(
    options: str = QUICK,
    *,
    dims: int = DIMS,
    source: str = "other",
    objective: str = f"maximise: {LOSS}",
    at: str = f"{SITE} at last token",
    prompts: str = "p",
) -> str:
    inner = f"das(dims: {dims})"
    call = f"fit({inner}, prompts: {prompts}, from: {source}, {objective}, {options})"
    return f"basis d = {call} at {at}\n"


PATCH = ("from turned into clean", f"patch {SITE} in basis d at last token")
PATCHES = experiment(*PATCH)
OTHER = experiment("ablate mlp_out layer 0 at last token with zero", name="control")


def training_errors(path: Path, family: str = "llama") -> list[Diagnostic]:
    """The errors that prevent all trainings; at least one."""
    with pytest.raises(mechdsl.MechdslError) as found:
        train(path, family)
    errors = [each for each in found.value.diagnostics if each.severity == "error"]
    assert errors
    return errors


def interrupt_training(
    path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[int]]:
    """Stop a new training with Ctrl-C after four steps.

    Args:
        folder: The folder of the result.

    Returns:
        The folder of the checkpoint, and the step numbers.
    """
    steps: list[int] = []
    real = Training._step  # pyright: ignore[reportPrivateUsage]

    def step(self: Any) -> None:
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(self.state.step)
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(path, fresh=True)
    part = folder.with_name(f"{folder.name}.part")
    assert json.loads((part / "state.json").read_text("utf-8"))["step"] == 4
    return part, steps


def rotation(found: mechdsl.TrainedFit) -> Tensor:
    return load_file(found.folder / "rotation.safetensors")["rotation"]


def checked(path: Path, model: Any) -> CheckedFile:
    source = Source(path.read_text("utf-8"), path)
    found = check_source(
        source, CheckSettings(python="run"), models={"m": context(source, "m", shared(model))}
    )
    assert not has_errors(found.diagnostics), found.diagnostics
    return found


def in_span(directions: Tensor) -> Edit:
    """Return a function that swaps the components in the span of orthonormal [dims, width] rows."""
    return lambda own, other: exchange(own, other, directions)


def training_rows(path: Path, model: Any, side: Any = None) -> ObjectiveRows:
    (declared,) = fits_of_file(checked(path, model)).values()
    assert declared.objective is not None
    return ObjectiveRows(declared.training, declared.objective, shared(model), side)


# --- the loss -------------------------------------------------------------------------------------

POSITIONS = ("last token", "subject tokens", "cue token")
SITES = (SITE, "z layer 1", "z layer 1 head 2", "mlp_out layer 1", "mlp_hidden layer 1")


differentiable = inspect.unwrap(side_by_side)
"""The reference pass, differentiable in the written vectors."""


def value_by_hand(family: str, row: int, site: str, at: str, directions: Tensor) -> Tensor:
    """The measure of one unpadded prompt with the subspace patched from the other run."""
    words = site.split()
    name, layer, unit = words[0], int(words[2]), int(words[4]) if len(words) > 3 else None
    here, there = rows("clean")[row], rows("other")[row]
    units = slice(None) if unit is None else slice(unit, unit + 1)
    writes: list[Write] = []
    for to, of in zip(tokens(here, at), tokens(there, at), strict=True):
        own = plain(family, here)[name, layer][to, units]
        other = plain(family, there)[name, layer][of, units]
        change = (other - own).flatten() @ directions.T @ directions
        writes.append(Write(name, layer, own + change.view_as(own), to, unit))
    (done,) = differentiable(family, double(family), here.ids, [(writes, ())])
    return loss_by_hand(done.logits[-1], row)


def loss_by_hand(logits: Tensor, row: int) -> Tensor:
    wrong, answer = token(ROWS[row]["b"]), token(ROWS[row]["a"])
    return logits.log_softmax(-1)[wrong] - 0.5 * logits[answer]


def drawn(dims: int, width: int) -> Tensor:
    random = torch.Generator().manual_seed(5)
    matrix = torch.randn(dims, width, generator=random, dtype=torch.float64)
    return torch.linalg.qr(matrix.T)[0].T.contiguous()


@pytest.mark.parametrize(("family", "at"), in_turn(HERE, POSITIONS))
@pytest.mark.parametrize(("site", "side"), in_turn(SITES, ("left", "right")))
def test_rotation_loss_and_gradient_equal_autograd(
    site: str, side: Any, family: str, at: str, tmp_path: Path
) -> None:
    """For every row, in ragged batches of two rows."""
    path = write(tmp_path, fit(at=f"{site} at {at}"), PATCHES)
    text = path.read_text("utf-8").replace(f"patch {SITE} in", f"patch {site} in")
    path.write_text(text, "utf-8")
    found = training_rows(path, double(family), side)
    width = found.first_vectors.shape[1]
    mine = drawn(DIMS, width).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    ids = found.objective.table.row_ids
    assert sorted(found.rows.tolist()) == [0, 1, 2, 3]
    for batch in ([0, 2], [1, 3]):
        values = found.values(np.array(batch), in_span(mine))
        expected = torch.stack([value_by_hand(family, ids[row], site, at, theirs) for row in batch])
        assert torch.allclose(values, expected, atol=1e-9)
        before = torch.stack(
            [loss_by_hand(plain(family, rows("clean")[ids[row]]).logits[-1], ids[row])
             for row in batch]
        )  # fmt: skip
        assert torch.allclose(found.values(np.array(batch), None), before, atol=1e-9)
        assert (expected - before).abs().max() > 1e-5
        (own,) = torch.autograd.grad(values.mean(), mine)
        (other,) = torch.autograd.grad(expected.mean(), theirs)
        assert torch.allclose(own, other, atol=1e-6)  # rotary angles and norms are float32
        assert other.abs().max() > 1e-5


def test_rotation_of_full_rank_equals_a_full_patch(tmp_path: Path) -> None:
    found = training_rows(write(tmp_path, fit(), PATCHES), double("llama"))
    everything = torch.eye(found.first_vectors.shape[1], dtype=torch.float64)
    every = np.arange(4)
    assert torch.allclose(
        found.values(every, take_source), found.values(every, in_span(everything))
    )


@pytest.mark.parametrize("sign", ["maximise", "minimise"])
def test_rotation_training_equals_a_reference_loop(sign: str, tmp_path: Path) -> None:
    """The reference loop shares only its seeds with the package."""
    objective = f"{sign}: {LOSS}"
    path = write(tmp_path, fit(f"{QUICK}, seed: 3", objective=objective), PATCHES)
    (found,) = train(path)
    table = training_rows(path, double("llama")).objective.table
    order = sorted(range(4), key=lambda n: stable_hash(3, "training row", table.row_keys[n]))
    random = torch.Generator().manual_seed(stable_hash(3, "weights") % 2**63)
    width = bare("llama").config.hidden_size
    start = orthonormal_by_hand(torch.randn(DIMS, width, generator=random, dtype=torch.float64))
    ids = [table.row_ids[row] for row in order]
    expected = trained_by_hand(start, ids[1:], -1 if sign == "maximise" else 1)
    own = rotation(found).double()
    assert torch.allclose(own @ own.T, torch.eye(DIMS, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(own, expected, atol=2e-3)
    assert (expected - start).abs().max() > 0.05
    report = found.report
    assert isinstance(report, RotationReport)
    by_hand = [
        value_by_hand("llama", ids[0], SITE, "last token", each).item()
        for each in (expected, start, torch.zeros(1, width).double(), torch.eye(width).double())
    ]
    numbers = [report.trained, report.untrained, report.unpatched, report.whole]
    assert numbers == pytest.approx(by_hand, abs=2e-2)
    assert numbers[1:] == pytest.approx(by_hand[1:], abs=1e-3)
    assert (report.rows, report.held_out_rows, report.steps) == (3, 1, 6)


def orthonormal_by_hand(matrix: Tensor) -> Tensor:
    """Orthonormalize rows by the Gram-Schmidt process."""
    found: list[Tensor] = []
    for row in matrix:
        left = row - sum((row @ each) * each for each in found)
        found.append(left / left.norm())
    return torch.stack(found)


def trained_by_hand(start: Tensor, ids: list[int], sign: int) -> Tensor:
    """Six steps of Adam on batches of two of three rows."""
    matrix, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
    for step in range(6):
        random = torch.Generator().manual_seed(stable_hash(3, "order", step) % 2**63)
        batch = [ids[n] for n in torch.randperm(3, generator=random)[:2].tolist()]
        leaf = matrix.clone().requires_grad_()
        directions = orthonormal_by_hand(leaf)
        loss = (
            sign
            * torch.stack(
                [value_by_hand("llama", row, SITE, "last token", directions) for row in batch]
            ).mean()
        )
        (slope,) = torch.autograd.grad(loss, leaf)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        size = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        rate = 0.05 * min(1.0, (1 - step / 6) / 0.2)
        matrix = matrix - rate * first / (1 - 0.9 ** (step + 1)) / size
        matrix = orthonormal_by_hand(matrix)
    return matrix


def test_orthonormal_rows_and_gradient_equal_gram_schmidt() -> None:
    matrix = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    found, expected = orthonormal_rows(matrix), orthonormal_by_hand(matrix)
    assert torch.allclose(found, expected)
    weights = torch.randn_like(found)
    (own,) = torch.autograd.grad((found * weights).sum(), matrix)
    (other,) = torch.autograd.grad((expected * weights).sum(), matrix)
    assert torch.allclose(own, other)


# --- a planted subspace ---------------------------------------------------------------------------

CLASSES = 4
CUES = 36
PLANTED = """
prompts planted {
  rows "planted.jsonl"
  template "w44 {cue}"
  answer " {a}"
  corrupt swapped { cue = cue2  a = a2 }
  split 60%
}
"""


@cache
def planted() -> tuple[Any, Tensor]:
    """A model with the class of the last word in a plane of the residual stream; and the plane.

    Words of one class differ in all other directions.
    """
    model = copy.deepcopy(families.module("gpt_neox"))
    width = model.config.hidden_size
    random = torch.Generator().manual_seed(1)
    basis = torch.cat([torch.ones(1, width), torch.randn(width - 1, width, generator=random)])
    basis = torch.linalg.qr(basis.T)[0].T
    plane, rest = basis[1:3], basis[3:]
    corners = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]) @ plane
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.dense" in name or "dense_4h_to_h" in name:
                parameter.zero_()
        model.gpt_neox.final_layer_norm.weight.fill_(1)
        model.gpt_neox.final_layer_norm.bias.zero_()
        model.lm_head.weight.zero_()
        for number in range(CUES):
            noise = torch.randn(len(rest), generator=random) @ rest
            model.gpt_neox.embed_in.weight[token(f"w{number}")] = (
                4 * corners[number % CLASSES] + noise
            )
        for number in range(CLASSES):
            model.lm_head.weight[token(f"w{CUES + number}")] = 3 * corners[number]
    return unchanged(model.eval()), plane


def write_planted(folder: Path, seed: int, dims: int, steps: int = 90) -> Path:
    random = np.random.default_rng(7)
    lines: list[str] = []
    while len(lines) < 80:
        one, two = random.integers(CUES, size=2).tolist()
        if one % CLASSES != two % CLASSES:
            record = {"cue": f"w{one}", "cue2": f"w{two}"}
            record |= {"a": f"w{CUES + one % CLASSES}", "a2": f"w{CUES + two % CLASSES}"}
            lines.append(json.dumps(record))
    (folder / "planted.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    site = "resid_post layer 0"
    declared = (
        f"basis d = fit(das(dims: {dims}), prompts: planted.train, from: swapped, "
        f"steps: {steps}, batch: 16, rate: 0.05, seed: {seed}, "
        f"maximise: logprob(answer of swapped)) at {site}\n"
        f"basis r = random(dims: {dims}) at {site}\n"
    )
    rank = "measure rank(answer of swapped) as raw"
    lines = ["from swapped into clean", f"patch {site} in basis d at last token"]
    two = [lines[0], lines[1].replace("basis d", "basis r")]
    parts = (
        experiment(*lines, block="planted.test", measure=rank),
        experiment(*two, block="planted.test", measure=rank, name="control"),
    )
    return write(folder, declared, *parts, blocks=PLANTED)


@pytest.mark.parametrize("seed", some(range(3), [0]))
def test_rotation_training_finds_a_planted_subspace(seed: int, tmp_path: Path) -> None:
    """On held-out rows, the trained patch gives the other run's answer; a random one doesn't."""
    model, plane = planted()
    path = write_planted(tmp_path, seed, 2)
    given = {"m": (model, word_tokenizer())}
    (found,) = mechdsl.fit(path, given, store=tmp_path / "store")
    result = mechdsl.run(path, given, store=tmp_path / "store").files[0]
    accuracy = {
        each.name: float((each.measures[0].patched == 1).mean()) for each in result.experiments
    }
    assert accuracy["e"] >= 0.95
    assert accuracy["control"] <= 0.25
    cosines = torch.linalg.svdvals(rotation(found) @ plane.T)
    assert cosines.min() > 0.95
    assert found.report.trained > found.report.untrained + 1
    assert found.report.trained > found.report.whole - 0.2


# --- use in rules ---------------------------------------------------------------------------------

RULES = {
    "patch": list(PATCH),
    "other positions": ["from turned into clean", f"patch {SITE} in basis d at right token"],
    "dim": ["from turned into clean", "patch feature 1 of d at last token"],
    "mean": [f"ablate {SITE} in basis d at last token with mean"],
    "add": ["add 3 to feature 0 of d at tokens *"],
    "random": [*PATCH, "against random(3, subspaces)"],
    "derived": [
        "run changed { add 3 to feature 0 of d at tokens * }",
        "from changed into clean",
        "patch layer 2 head * at last token",
    ],
    "replies": ["generate 3", "add 3 to feature 0 of d at tokens *"],
    "loop": ["for i in 0..1 { ablate feature i of d at last token with zero }"],
}


@pytest.mark.parametrize("name", some(RULES, [*RULES][0::4]))
def test_trained_rotation_in_rules_equals_its_saved_matrix(name: str, tmp_path: Path) -> None:
    """Up to rounding, with a second experiment on the same block."""
    measure = "measure logit(answer) as raw" if name == "replies" else MEASURE
    text = experiment(*RULES[name], measure=measure) + OTHER
    path = write(tmp_path, fit(), text)
    (trained,) = train(path, out=tmp_path)
    card = (tmp_path / "d" / "README.md").read_text("utf-8")
    assert card.startswith("# d: das rotation with 2 directions")
    assert f"The subspace of `other` comes in, to maximise {LOSS}" in card
    own = run(path, fresh=True).files[0].experiments
    saved = 'saved("d/rotation.safetensors", "rotation")'
    path = write(tmp_path, f"basis d = {saved} at {SITE}\n", text)
    loaded = run(path, store=False).files[0].experiments
    assert len(own) == 2
    assert_same_results(own, loaded)
    said = own[0].conventions["basis d"]
    assert f"trained on 4 rows of p at last token, 1 of them held out, to maximise {LOSS}" in said
    assert f"trained {trained.report.trained:.4g}, random subspace" in said


def test_rotation_of_every_layer_has_a_training_per_layer(tmp_path: Path) -> None:
    """Patches use the training of their layer."""
    at = "resid_post layer * at last token"
    lines = ("from turned into clean", "patch resid_post layer * in basis d at last token")
    path = write(tmp_path, fit(at=at), experiment(*lines))
    found = train(path)
    assert [each.basis for each in found] == [f"d[layer {layer}]" for layer in range(3)]
    third = ("from turned into clean", "patch resid_post layer 2 in basis d at last token")
    (alone,) = train(
        write(tmp_path, fit(at="resid_post layer 2 at last token"), experiment(*third))
    )
    assert alone.folder == found[2].folder
    assert run(write(tmp_path, fit(at=at), experiment(*lines))).complete


@pytest.mark.slow
def test_rotation_training_minimises_the_divergence_from_a_run(tmp_path: Path) -> None:
    """Patching the full vector gives the divergence of an ordinary patch."""
    path = write(tmp_path, fit("steps: 40, batch: 4, rate: 0.1, validation: 0%", dims=8,
                               objective="minimise: kl(other)"), PATCHES)  # fmt: skip
    (found,) = train(path)
    report = found.report
    assert (report.held_out_rows, report.rows) == (0, 4)
    assert report.trained < report.untrained < 1.5 * report.unpatched
    same = "patch resid_post layer 1 at last token", "measure kl(other) as raw"
    lines = ("from other into clean", same[0])
    allowed = experiment(*lines, block="p", measure=same[1])
    result = run(write(tmp_path, allowed)).files[0].experiments[0].measures[0]
    assert report.whole == pytest.approx(float(result.patched.mean()), abs=1e-4)
    assert report.unpatched == pytest.approx(float(result.base.mean()), abs=1e-4)


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "dims": {"dims": 3},
    "steps": {"options": QUICK.replace("6", "7")},
    "batch": {"options": QUICK.replace("batch: 2", "batch: 3")},
    "rate": {"options": QUICK.replace("0.05", "0.06")},
    "validation": {"options": QUICK.replace("25%", "0%")},
    "seed": {"options": f"{QUICK}, seed: 1"},
    "limit": {"options": f"{QUICK}, limit: 3"},
    "layer": {"at": "resid_post layer 0 at last token"},
    "site": {"at": f"mlp_out layer {LAYER} at last token"},
    "position": {"at": f"{SITE} at cue token"},
    "source": {"source": "turned"},
    "sign": {"objective": f"minimise: {LOSS}"},
    "measure": {"objective": "maximise: logprob(wrong) - 0.4 * logit(answer)"},
    "compared run": {"objective": "minimise: kl(other)"},
}


def test_rotation_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    """A different argument needs another training and gives other directions."""
    _, folders = check_keys(
        tmp_path, trains_all, fit, CHANGES, PATCHES, lambda own: rotation(own).tolist()
    )
    (other,) = train(write(tmp_path, fit(), PATCHES), "gpt2")
    assert other.folder.name not in {each.name for each in folders}


@pytest.mark.parametrize("change", ["cue", "alt", "b"])
def test_rotation_key_depends_on_tokens_and_measured_texts(change: str, tmp_path: Path) -> None:
    """The key has the tokens of both runs, and the texts that the measure names."""
    (before,) = train(write(tmp_path, fit(), PATCHES))
    path = write(tmp_path, fit(), PATCHES)
    data = tmp_path / "data.jsonl"
    lines = data.read_text("utf-8").splitlines()
    record = json.loads(lines[1])
    record[change] = "w41"
    data.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n", "utf-8")
    (found,) = train(path)
    assert found.folder != before.folder
    assert not torch.equal(rotation(found), rotation(before))


@pytest.mark.slow
def test_rotation_key_ignores_names_comments_and_other_experiments(tmp_path: Path) -> None:
    """The key is also the same for a metric with the same definition."""
    (before,) = train(write(tmp_path, fit(), PATCHES))
    renamed = fit().replace("basis d", "basis g")
    for parts in (
        (renamed, PATCHES.replace("basis d", "basis g")),
        ("# A comment.\n", fit(), OTHER, PATCHES),
        (fit(f"{QUICK}, measure_on_training_rows: true"), PATCHES),
        (f"metric gain = {LOSS}\n", fit(objective="maximise: gain"), PATCHES),
    ):
        path = write(tmp_path, *parts)
        (found,) = train(path)
        assert (found.folder, found.seconds) == (before.folder, 0.0)
        assert run(path).complete


def test_measuring_rotation_training_rows_in_a_derived_run_is_rejected(tmp_path: Path) -> None:
    """The rules that use the basis are in a derived run of the experiment."""
    line = "run changed { add 3 to feature 0 of d at tokens * }"
    text = experiment(line, "from changed into clean", "patch layer 2 at last token", block="p")
    with pytest.raises(mechdsl.MechdslError, match="`e` measures rows that `d` is trained on"):
        train(write(tmp_path, fit(), text))


# --- mistakes -------------------------------------------------------------------------------------

NOISE = "  corrupt noised { add gaussian(std: 1, samples: 2) to embed at subject tokens }\n"
NOISY = BLOCKS.replace("  corrupt longer", f"{NOISE}  corrupt longer", 1)
CALL = f"fit(das(dims: 2), prompts: p, from: other, maximise: {LOSS})"
MISTAKES: dict[str, tuple[str, str, str]] = {
    "no source": ("from: other, ", "", "E0207"),
    "no measure": (f", maximise: {LOSS}", "", "E0207"),
    "both": (f"maximise: {LOSS}", f"maximise: {LOSS}, minimise: kl(other)", "E0207"),
    "unknown run": ("from: other", "from: othr", "E0201"),
    "clean": ("from: other", "from: clean", "E0201"),
    "run of the rows": ("prompts: p", "prompts: other of p", "E0207"),
    "range": (f"maximise: {LOSS}", "maximise: 1..3", "E0207"),
    "no dims": ("das(dims: 2)", "das", "E0207"),
    "zero": ("dims: 2", "dims: 0", "E0342"),
    "too many": ("dims: 2", "dims: 21", "E0342"),
    "step function": (f"maximise: {LOSS}", "maximise: rank(answer)", "E0608"),
    "condition": (f"maximise: {LOSS}", "maximise: correct", "E0608"),
    "token counts": ("from: other", "from: longer", "E0307"),
    "noise": ("from: other", "from: noised", "E0342"),
    "several vectors": (SITE, "z layer 1 heads 1..2", "E0342"),
    "pattern": (SITE, "pattern layer 1 head 1", "E0608"),
    "american": ("maximise:", "maximize:", "E0207"),
    "dictionary": ("das(dims: 2)", "sae(features: 24, k: 4)", "E0207"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_rotation_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code = MISTAKES[name]
    at = "tokens *" if name == "token counts" else "last token"
    line = f"basis d = {CALL} at {SITE} at {at}\n"
    path = write(tmp_path, line.replace(old, new), PATCHES, blocks=NOISY)
    errors = training_errors(path)
    assert errors[0].code == code, errors
