"""Steering vectors that a file declares with `direction v = fit(vector(…), …)`.

Loss, gradient and trainings are compared with autograd on the bare model in float64, one unpadded
prompt at a time. Further tests: use in rules, keys, and errors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.fits.reports import VectorReport

from ..quick import in_turn, some
from ..reference.forward import Write
from ..rules.models import double
from ..rules.support import plain, rows, tokens
from .test_trained_dictionaries import (
    assert_same_results,
    check_keys,
    experiment,
    run,
    train,
    write,
)
from .test_trained_rotations import (
    HERE,
    LOSS,
    MEASURE,
    NOISY,
    OTHER,
    QUICK,
    SITE,
    differentiable,
    loss_by_hand,
    training_errors,
    training_rows,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
LENGTH = 3.0
ADD = experiment(f"add 2 * v to {SITE} at last token")


def fit(
    options: str = QUICK,
    *,
    inner: str = f"vector(length: {LENGTH:g})",
    source: str = "",
    objective: str = f"maximise: {LOSS}",
    at: str = f"{SITE} at last token",
) -> str:
    source = f"from: {source}, " if source else ""
    arguments = f"{inner}, prompts: p, {source}{objective}, {options}"
    return f"direction v = fit({arguments}) at {at}\n"


def vector(found: mechdsl.TrainedFit) -> Tensor:
    return load_file(found.folder / "vector.safetensors")["vector"]


def report(found: mechdsl.TrainedFit) -> VectorReport:
    assert isinstance(found.report, VectorReport)
    return found.report


# --- the loss -------------------------------------------------------------------------------------

POSITIONS = ("last token", "subject tokens", "tokens *")
SITES = (SITE, "z layer 1 head 2", "mlp_out layer 1")


def value_by_hand(family: str, row: int, site: str, at: str, added: Tensor) -> Tensor:
    """The measure of one unpadded prompt with a vector added."""
    return edited_value(family, row, site, at, lambda own: own + added.view_as(own))


def edited_value(
    family: str, row: int, site: str, at: str, edit: Callable[[Tensor], Tensor]
) -> Tensor:
    """The measure of one unpadded prompt with edited vectors, [units, width] each."""
    words = site.split()
    name, layer, unit = words[0], int(words[2]), int(words[4]) if len(words) > 3 else None
    here = rows("clean")[row]
    units = slice(None) if unit is None else slice(unit, unit + 1)
    writes: list[Write] = []
    for at_token in tokens(here, at):
        own = plain(family, here)[name, layer][at_token, units]
        writes.append(Write(name, layer, edit(own), at_token, unit))
    (done,) = differentiable(family, double(family), here.ids, [(writes, ())])
    return loss_by_hand(done.logits[-1], row)


@pytest.mark.parametrize(("family", "at"), in_turn(HERE, POSITIONS))
@pytest.mark.parametrize(("site", "side"), in_turn(SITES, ("left", "right")))
def test_vector_loss_and_gradient_equal_autograd(
    site: str, side: Any, family: str, at: str, tmp_path: Path
) -> None:
    """For every row, in ragged batches of two rows."""
    used = experiment(f"add 2 * v to {site} at last token")
    found = training_rows(write(tmp_path, fit(at=f"{site} at {at}"), used), double(family), side)
    width = found.first_vectors.shape[1]
    random = torch.Generator().manual_seed(5)
    mine = torch.randn(width, generator=random, dtype=torch.float64).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    ids = found.objective.table.row_ids
    assert sorted(found.rows.tolist()) == [0, 1, 2, 3]
    for batch in ([0, 2], [1, 3]):
        values = found.values(np.array(batch), lambda own, other: own + mine)
        expected = torch.stack([value_by_hand(family, ids[row], site, at, theirs) for row in batch])
        assert torch.allclose(values, expected, atol=1e-9)
        (own,) = torch.autograd.grad(values.mean(), mine)
        (other,) = torch.autograd.grad(expected.mean(), theirs)
        assert torch.allclose(own, other, atol=1e-6)  # rotary angles and norms are float32
        assert other.abs().max() > 1e-5


# --- trainings ------------------------------------------------------------------------------------

TRAININGS = {
    "length": (f"vector(length: {LENGTH:g})", "maximise", LENGTH, 0.0),
    "penalty": ("vector(penalty: 0.3)", "maximise", None, 0.3),
    "free": ("vector", "minimise", None, 0.0),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_vector_training_equals_a_reference_loop(name: str, tmp_path: Path) -> None:
    """The reference loop shares only its seeds with the package; trained at all tokens."""
    inner, word, length, penalty = TRAININGS[name]
    line = fit(f"{QUICK}, seed: 3", inner=inner, source="turned", objective=f"{word}: {LOSS}",
               at=f"{SITE} at tokens *")  # fmt: skip
    path = write(tmp_path, line, ADD)
    (found,) = train(path)
    table = training_rows(path, double("llama")).objective.table
    order = sorted(range(4), key=lambda n: stable_hash(3, "training row", table.row_keys[n]))
    ids = [table.row_ids[row] for row in order]
    every = torch.cat([site_vectors("clean", row) for row in ids])
    mean = every.norm(dim=1).mean()
    unit = float(mean if length is None else length) / every.shape[1] ** 0.5
    start = torch.zeros(every.shape[1]).double()
    if length is not None:
        random = torch.Generator().manual_seed(stable_hash(3, "weights") % 2**63)
        start = unit_rms(torch.randn(len(start), generator=random, dtype=torch.float64))
    weight = penalty / mean**2
    sign = -1 if word == "maximise" else 1

    def loss(numbers: Tensor, row: int) -> Tensor:
        added = unit * numbers
        value = value_by_hand("llama", row, SITE, "tokens *", added)
        return sign * value + weight * added.square().sum()

    normed = unit_rms if length is not None else None
    expected = unit * trained_by_hand(start, ids[1:], loss, normed)
    own = vector(found).double()
    assert torch.allclose(own, expected, atol=2e-3 * float(expected.norm()))
    assert (expected - unit * start).norm() > 0.1 * expected.norm()
    said = report(found)
    assert said.length == pytest.approx(float(own.norm()), rel=1e-5)
    assert length is None or said.length == pytest.approx(length, rel=1e-5)
    assert said.site_length == pytest.approx(float(mean), rel=1e-4)
    assert (said.rows, said.held_out_rows, said.steps) == (3, 1, 6)
    check_controls(said, ids, own)


def check_controls(said: VectorReport, ids: list[int], own: Tensor) -> None:
    """Check controls on the held-out first row; the mean difference is over the other rows."""
    random = torch.Generator().manual_seed(stable_hash(3, "random vectors") % 2**63)
    drawn = [torch.randn(len(own), generator=random, dtype=torch.float64) for _ in range(8)]
    pairs = [(site_vectors("turned", row), site_vectors("clean", row)) for row in ids[1:]]
    difference = torch.cat([there - here for there, here in pairs]).mean(0)

    def value(added: Tensor) -> float:
        return value_by_hand("llama", ids[0], SITE, "tokens *", added).item()

    def scaled(other: Tensor) -> Tensor:
        return other * own.norm() / other.norm()

    assert said.trained == pytest.approx(value(own), abs=1e-3)
    assert said.random == pytest.approx(np.mean([value(scaled(d)) for d in drawn]), abs=1e-3)
    assert said.unsteered == pytest.approx(value(torch.zeros_like(own)), abs=1e-3)
    assert said.difference == pytest.approx(value(scaled(difference)), abs=1e-3)


def site_vectors(name: str, row: int) -> Tensor:
    return plain("llama", rows(name)[row])["resid_post", 1].flatten(1).double()


def unit_rms(numbers: Tensor) -> Tensor:
    return numbers / numbers.norm() * len(numbers) ** 0.5


def trained_by_hand(
    start: Tensor,
    ids: list[int],
    loss: Callable[[Tensor, int], Tensor],
    after_step: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Six steps of Adam on batches of two of three rows; `loss` takes one row."""
    numbers, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
    for step in range(6):
        random = torch.Generator().manual_seed(stable_hash(3, "order", step) % 2**63)
        batch = [ids[n] for n in torch.randperm(3, generator=random)[:2].tolist()]
        leaf = numbers.clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.stack([loss(leaf, row) for row in batch]).mean(), leaf)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        size = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        rate = 0.05 * min(1.0, (1 - step / 6) / 0.2)
        numbers = numbers - rate * first / (1 - 0.9 ** (step + 1)) / size
        numbers = numbers if after_step is None else after_step(numbers)
    return numbers


@pytest.mark.slow
def test_vector_report_without_source_run_has_no_mean_difference(tmp_path: Path) -> None:
    (found,) = train(write(tmp_path, fit("steps: 60, batch: 4, rate: 0.1, validation: 0%"), ADD))
    said = report(found)
    assert said.difference is None
    assert (said.rows, said.held_out_rows) == (4, 0)
    assert said.trained > max(said.random, said.unsteered) + 0.1


# --- use in rules ---------------------------------------------------------------------------------

RULES = {
    "sweep": [f"for c in [0, 1, 4] {{ add c * v to {SITE} at last token }}"],
    "other positions": ["add v to resid_post layer * at tokens *"],
    "project out": [f"project out v from {SITE} at tokens *"],
    "along": [f"clamp v of {SITE} at last token to 2"],
    "sum": [f"add unit(v) - 0.5 * (2 * v) to {SITE} at last token"],
    "named sum": [f"add w to {SITE} at last token"],
    "basis": ["from turned into clean", f"patch {SITE} in basis b at last token"],
    "random": [f"add v to {SITE} at last token", "against random(3, directions)"],
    "derived": [
        f"run changed {{ add 3 * v to {SITE} at tokens * }}",
        "from changed into clean",
        "patch layer 2 head * at last token",
    ],
    "replies": ["generate 3", f"add 3 * v to {SITE} at tokens *"],
}
MORE = f"direction w = 2 * v - unit(v)\nbasis b = directions(v) at {SITE}\n"


@pytest.mark.parametrize("name", some(RULES, [*RULES][2::4]))
def test_trained_vector_in_rules_equals_the_saved_vector(name: str, tmp_path: Path) -> None:
    """Up to rounding, with a second experiment on the same block."""
    measure = "measure logit(answer) as raw" if name == "replies" else MEASURE
    text = MORE + experiment(*RULES[name], measure=measure) + OTHER
    path = write(tmp_path, fit(), text)
    (trained,) = train(path, out=tmp_path)
    card = (tmp_path / "v" / "README.md").read_text("utf-8")
    assert card.startswith("# v: vector, length 3")
    assert f"The vector is added at these tokens, to maximise {LOSS}" in card
    own = run(path, fresh=True).files[0].experiments
    path = write(tmp_path, 'direction v = saved("v/vector.safetensors", "vector")\n', text)
    loaded = run(path, store=False).files[0].experiments
    assert len(own) == 2
    assert_same_results(own, loaded)
    if name == "sweep":
        said = own[0].conventions["direction v"]
        assert f"4 rows of p at last token, 1 of them held out, to maximise {LOSS}" in said
        assert f"trained {report(trained).trained:.4g}, random vectors of this length" in said


def test_saved_direction_equals_the_trained_vector(tmp_path: Path) -> None:
    save = 'experiment s {\n  model m\n  save direction v to "out.safetensors"\n}\n'
    path = write(tmp_path, fit(), save)
    with pytest.raises(mechdsl.MechdslError, match="isn't trained"):
        run(path)
    (found,) = train(path)
    run(path)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["v"], vector(found).float())


@pytest.mark.slow
def test_loop_over_vectors_of_several_seeds_equals_each_vector(tmp_path: Path) -> None:
    rule = f"{{}}add 2 * {{}} to {SITE} at last token"
    loop = experiment(rule.format("for d in [v, half] { ", "d") + " }", name="both")
    alone = [experiment(rule.format("", name), name=f"one_{name}") for name in ("v", "half")]
    half = "direction half = 0.5 * v\n"
    path = write(tmp_path, fit(f"{QUICK}, seeds: 2"), half, loop, *alone)
    both, *each = run(path, fit=True).files[0].experiments
    coords = [(cell.coords["d"], cell.coords["seed"]) for cell in both.cells]
    assert coords == [("v", 0), ("v", 1), ("half", 0), ("half", 1)]
    wanted = np.concatenate([own.measures[0].patched for own in each])
    assert np.allclose(both.measures[0].patched, wanted, atol=1e-5)
    assert not np.allclose(wanted[0], wanted[2], atol=1e-4)
    assert len(both.controls) == 1


def test_vectors_of_every_layer_have_a_training_per_layer(tmp_path: Path) -> None:
    """Rules use the vector of their layer."""
    every, one = "resid_post layer * at last token", "resid_post layer 2 at last token"
    path = write(tmp_path, fit(at=every), experiment(f"add v to {every}"))
    found = train(path)
    assert [each.basis for each in found] == [f"v[layer {layer}]" for layer in range(3)]
    result = run(path).files[0].experiments[0].measures[0]
    path = write(tmp_path, fit(at=one), experiment(f"add v to {one}"))
    (alone,) = train(path)
    assert alone.folder == found[2].folder
    last = run(path).files[0].experiments[0].measures[0]
    assert np.allclose(result.patched[-1], last.patched[-1], atol=1e-5)


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "length": {"inner": "vector(length: 4)"},
    "penalty": {"inner": "vector(penalty: 0.1)"},
    "no penalty": {"inner": "vector"},
    "steps": {"options": QUICK.replace("6", "7")},
    "rate": {"options": QUICK.replace("0.05", "0.06")},
    "seed": {"options": f"{QUICK}, seed: 1"},
    "limit": {"options": f"{QUICK}, limit: 3"},
    "layer": {"at": "resid_post layer 0 at last token"},
    "position": {"at": f"{SITE} at tokens *"},
    "sign": {"objective": f"minimise: {LOSS}"},
    "measure": {"objective": "maximise: logprob(wrong) - 0.4 * logit(answer)"},
    "compared run": {"objective": "minimise: kl(other)"},
}


def test_vector_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    """A different argument needs another training and gives another vector."""
    base, folders = check_keys(
        tmp_path, trains_all, fit, CHANGES, ADD, lambda own: vector(own).tolist()
    )
    (other,) = train(write(tmp_path, fit(source="turned"), ADD))  # only the report differs
    assert other.folder not in folders
    assert torch.equal(vector(other), vector(base))
    (family,) = train(write(tmp_path, fit(), ADD), "gpt2")
    assert family.folder.name not in {each.name for each in folders}


@pytest.mark.slow
def test_vector_key_ignores_names_and_factors(tmp_path: Path) -> None:
    (before,) = train(write(tmp_path, fit(), ADD))
    for parts in (
        (fit().replace("direction v", "direction u"), ADD.replace("* v", "* u")),
        (fit(), OTHER, ADD.replace("2 * v", "5 * v")),
        (fit(f"{QUICK}, measure_on_training_rows: true"), ADD),
    ):
        path = write(tmp_path, *parts)
        (found,) = train(path)
        assert (found.folder, found.seconds) == (before.folder, 0.0)
        assert run(path).complete


# --- measured training rows, and errors -----------------------------------------------------------


USES = {
    "rule": f"add 2 * v to {SITE} at last token",
    "sum": f"add w to {SITE} at last token",
    "basis": f"ablate {SITE} in basis b at last token with mean",
    "loop": f"for d in [w, v] {{ add d to {SITE} at last token }}",
    "derived": f"run changed {{ add v to {SITE} at tokens * }}\n  from changed into clean\n"
    "  patch layer 2 head * at last token",
}


@pytest.mark.parametrize("use", USES)
def test_measuring_training_rows_of_a_vector_is_rejected(use: str, tmp_path: Path) -> None:
    used, more = experiment(USES[use], block="p"), MORE
    with pytest.raises(mechdsl.MechdslError, match="measures rows that `v` is trained on") as found:
        train(write(tmp_path, fit(), more, used))
    assert found.value.diagnostics[0].code == "E0345"
    allowed = write(tmp_path, fit(f"{QUICK}, measure_on_training_rows: true"), more, used)
    train(allowed)
    (done,) = run(allowed).files[0].experiments
    if use != "derived":  # conventions have no directions of runs
        assert "4 of the 4 rows measured here are training rows" in str(done.conventions)


CALL = f"fit(vector(length: 3), prompts: p, maximise: {LOSS})"
MISTAKES: dict[str, tuple[str, str, str]] = {
    "no measure": (f", maximise: {LOSS}", "", "E0207"),
    "both": (f"maximise: {LOSS}", f"maximise: {LOSS}, minimise: kl(other)", "E0207"),
    "unknown run": ("prompts: p", "prompts: p, from: othr", "E0201"),
    "run of the rows": ("prompts: p", "prompts: other of p", "E0207"),
    "unknown rows": ("prompts: p", "prompts: q", "E0201"),
    "no rows": ("prompts: p, ", "", "E0207"),
    "zero": ("length: 3", "length: 0", "E0342"),
    "negative": ("length: 3", "penalty: -1", "E0342"),
    "length and penalty": ("length: 3", "length: 3, penalty: 1", "E0342"),
    "other name": ("length: 3", "norm: 3", "E0207"),
    "other trainer": ("vector(length: 3)", "steering(length: 3)", "E0203"),
    "rotation": ("vector(length: 3)", "das(dims: 2)", "E0342"),
    "in a basis": ("direction v", "basis v", "E0342"),
    "factor": (CALL, f"2 * {CALL}", "E0341"),
    "steps": ("maximise", "steps: -1, maximise", "E0342"),
    "patience": ("maximise", "validation: 0%, patience: 2, maximise", "E0342"),
    "no site": (f" at {SITE} at last token", "", "E0341"),
    "several positions": ("last token", "token -2..-1", "E0341"),
    "several heads": (SITE, "z layer 1", "E0341"),
    "step function": (f"maximise: {LOSS}", "maximise: rank(answer)", "E0608"),
    "token counts": ("at last token", "at tokens *", "E0307"),
    "noise": ("prompts: p", "prompts: p, from: noised", "E0342"),
    "pattern": (SITE, "pattern layer 1 head 1", "E0608"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_vector_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code = MISTAKES[name]
    line = f"direction v = {CALL} at {SITE} at last token\n".replace(old, new)
    if name == "token counts":
        line = line.replace("prompts: p", "prompts: p, from: longer")
    path = write(tmp_path, line, ADD, blocks=NOISY)
    errors = training_errors(path)
    assert errors[0].code == code, errors


def test_model_edit_with_a_trained_vector_is_rejected(tmp_path: Path) -> None:
    edited = "model edited = m with { project out v from weights }\n"
    path = write(tmp_path, fit(), edited, ADD.replace("model m", "model edited"))
    with pytest.raises(mechdsl.MechdslError, match="an edit can't use it yet") as found:
        train(path)
    assert found.value.diagnostics[0].code == "E0344"
