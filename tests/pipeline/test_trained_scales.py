"""Scales of channels that a file declares with `direction s = fit(scales(…), …)`.

Loss, gradient and trainings are compared with autograd on the bare model in float64, one unpadded
prompt at a time. Further tests: use in rules, keys, and errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.fits.reports import ScaleReport

from ..quick import in_turn, some
from ..rules.models import double
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
    training_errors,
    training_rows,
)
from .test_trained_vectors import edited_value, trained_by_hand, vector

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HEAD = "z layer 1 head 2"
SCALED = experiment(f"scale {HEAD} at last token by s")


def fit(
    options: str = QUICK,
    *,
    inner: str = "scales(penalty: 0.1)",
    objective: str = f"maximise: {LOSS}",
    at: str = f"{HEAD} at last token",
) -> str:
    return f"direction s = fit({inner}, prompts: p, {objective}, {options}) at {at}\n"


def report(found: mechdsl.TrainedFit) -> ScaleReport:
    assert isinstance(found.report, ScaleReport)
    return found.report


# --- the loss -------------------------------------------------------------------------------------

POSITIONS = ("last token", "subject tokens", "tokens *")
SITES = (HEAD, "resid_post layer 1", "mlp_out layer 1")


@pytest.mark.parametrize(("family", "at"), in_turn(HERE, POSITIONS))
@pytest.mark.parametrize(("site", "side"), in_turn(SITES, ("left", "right")))
def test_scales_loss_and_gradient_equal_autograd(
    site: str, side: Any, family: str, at: str, tmp_path: Path
) -> None:
    """For every row, in ragged batches of two rows."""
    used = experiment(f"scale {site} at last token by 2 * s")
    found = training_rows(write(tmp_path, fit(at=f"{site} at {at}"), used), double(family), side)
    random = torch.Generator().manual_seed(5)
    width = found.first_vectors.shape[1]
    mine = torch.randn(width, generator=random, dtype=torch.float64).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    ids = found.objective.table.row_ids
    for batch in ([0, 2], [1, 3]):
        values = found.values(np.array(batch), lambda own, other: own * mine)
        every = [edited_value(family, ids[row], site, at, lambda own: own * theirs)
                 for row in batch]  # fmt: skip
        expected = torch.stack(every)
        assert torch.allclose(values, expected, atol=1e-9)
        (own,) = torch.autograd.grad(values.mean(), mine)
        (other,) = torch.autograd.grad(expected.mean(), theirs)
        assert torch.allclose(own, other, atol=1e-6)  # rotary angles and norms are float32
        assert other.abs().max() > 1e-5


# --- trainings ------------------------------------------------------------------------------------


PENALTIES = [("scales", "minimise", 0.0), ("scales(penalty: 2)", "maximise", 2.0)]


@pytest.mark.parametrize(("inner", "word", "penalty"), PENALTIES)
def test_scales_training_equals_a_reference_loop(
    inner: str, word: str, penalty: float, tmp_path: Path
) -> None:
    """The reference loop shares only its seeds with the package; trained at all tokens."""
    site = f"{HEAD} at tokens *"
    line = fit(f"{QUICK}, seed: 3", inner=inner, objective=f"{word}: {LOSS}", at=site)
    path = write(tmp_path, line, SCALED)
    (found,) = train(path)
    table = training_rows(path, double("llama")).objective.table
    order = sorted(range(4), key=lambda n: stable_hash(3, "training row", table.row_keys[n]))
    ids = [table.row_ids[row] for row in order]
    sign = -1 if word == "maximise" else 1

    def value(scale: Tensor, row: int) -> Tensor:
        return edited_value("llama", row, HEAD, "tokens *", lambda own: own * scale)

    def held_out(scale: Tensor) -> float:
        return value(scale, ids[0]).item()

    def loss(changes: Tensor, row: int) -> Tensor:
        return sign * value(1 + changes, row) + penalty * changes.square().mean()

    own = vector(found).double()
    expected = 1 + trained_by_hand(torch.zeros_like(own), ids[1:], loss)
    assert torch.allclose(own, expected, atol=2e-3 * float((expected - 1).norm()))
    assert (expected - 1).abs().max() > 0.1
    said = report(found)
    assert (said.rows, said.held_out_rows, said.steps) == (3, 1, 6)
    assert (said.smallest, said.largest) == (float(own.min()), float(own.max()))
    random = torch.Generator().manual_seed(stable_hash(3, "orders") % 2**63)
    shuffled = [own[torch.randperm(len(own), generator=random)] for _ in range(8)]
    ones = torch.ones_like(own)
    assert said.trained == pytest.approx(held_out(own), abs=1e-3)
    assert said.shuffled == pytest.approx(np.mean([held_out(s) for s in shuffled]), abs=1e-3)
    assert said.uniform == pytest.approx(held_out(own.mean() * ones), abs=1e-3)
    assert said.zero == pytest.approx(held_out(0 * ones), abs=1e-3)
    assert said.unscaled == pytest.approx(held_out(ones), abs=1e-3)


@pytest.mark.slow
def test_scales_penalty_keeps_scales_near_one(tmp_path: Path) -> None:
    options = "steps: 30, batch: 4, rate: 0.1, validation: 0%"
    inners = ("scales", "scales(penalty: 3)")
    found = [train(write(tmp_path, fit(options, inner=inner), SCALED)) for inner in inners]
    (free,), (held,) = found
    changes = [(vector(each) - 1).norm() for each in (free, held)]
    assert changes[1] < 0.5 * changes[0]
    said = report(free)
    assert (said.rows, said.held_out_rows) == (4, 0)
    assert said.trained > max(said.shuffled, said.uniform, said.zero, said.unscaled)


# --- use in rules ---------------------------------------------------------------------------------

RULES = {
    "sweep": [f"for c in [0, 0.5, 1, 4] {{ scale {HEAD} at last token by c * s }}"],
    "other sites": ["scale z layer * head * at tokens * by s"],
    "joined sites": ["scale z layers 0..1 heads 1, 2 at tokens * by s"],
    "a group": ["scale movers at tokens * by s"],
    "random": [f"scale {HEAD} at last token by s", "against random(3, directions)"],
    "after other rules": [
        f"set {HEAD} at last token to 2",
        f"scale {HEAD} at last token by s",
        f"scale {HEAD} at last token by 0.5 * s",
    ],
    "derived": [
        f"run changed {{ scale {HEAD} at tokens * by 3 * s }}",
        "from changed into clean",
        "patch layer 2 head * at last token",
    ],
    "replies": ["generate 3", f"scale {HEAD} at tokens * by 3 * s"],
}
MORE = "group movers = L0H1, L1H2, L2H3\ndirection named = s\n"


@pytest.mark.parametrize("name", some(RULES, [*RULES][1::4]))
def test_trained_scales_in_rules_equal_the_saved_vector(name: str, tmp_path: Path) -> None:
    """Up to rounding, with further experiments on the same block."""
    measure = "measure logit(answer) as raw" if name == "replies" else MEASURE
    named = experiment(f"scale {HEAD} at last token by named", name="n")
    text = MORE + experiment(*RULES[name], measure=measure) + named + OTHER
    path = write(tmp_path, fit(), text)
    (trained,) = train(path, out=tmp_path)
    card = (tmp_path / "s" / "README.md").read_text("utf-8")
    assert card.startswith("# s: scales, penalty 0.1")
    assert f"multiplied by the scales at these tokens, to maximise {LOSS}" in card
    own = run(path, fresh=True).files[0].experiments
    path = write(tmp_path, 'direction s = saved("s/vector.safetensors", "vector")\n', text)
    loaded = run(path, store=False).files[0].experiments
    assert len(own) == 3
    assert_same_results(own, loaded)
    if name == "sweep":
        said = own[0].conventions["direction s"]
        assert f"4 rows of p at last token, 1 of them held out, to maximise {LOSS}" in said
        assert f"trained {report(trained).trained:.4g}, in a random order" in said
    if name == "random":
        assert "the same numbers in a random order" in own[0].conventions["controls"]


def test_random_control_of_scales_permutes_the_scales(tmp_path: Path) -> None:
    """If all scales are equal, every draw of the control has the same effect."""
    save_file({"equal": torch.full((6,), 1.5)}, tmp_path / "equal.safetensors")
    line = 'direction s = saved("equal.safetensors", "equal")\n'
    rule = f"scale {HEAD} at last token by s"
    text = experiment(rule, "against random(3, directions)")
    (found,) = run(write(tmp_path, line, text), store=False).files[0].experiments
    (measure,) = found.measures
    effect = (measure.patched - measure.base).mean()
    band = found.control(0)
    assert band is not None
    assert np.allclose([band.low[0], band.high[0]], effect, atol=1e-5)
    assert abs(effect) > 1e-4


@pytest.mark.slow
def test_scales_of_every_head_have_a_training_per_head(tmp_path: Path) -> None:
    """Rules use the scales of their head."""
    every = "z layer 1 head * at last token"
    path = write(tmp_path, fit(at=every), experiment(f"scale {every} by s"))
    found = train(path)
    assert [each.basis for each in found] == [f"s[head {head}]" for head in range(4)]
    assert [each.site for each in found] == [f"L1H{head}.z" for head in range(4)]
    result = run(path).files[0].experiments[0].measures[0]
    path = write(tmp_path, fit(), SCALED)
    (alone,) = train(path)
    assert alone.folder == found[2].folder
    last = run(path).files[0].experiments[0].measures[0]
    assert np.allclose(result.patched[2], last.patched[0], atol=1e-5)


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "penalty": {"inner": "scales(penalty: 0.2)"},
    "no penalty": {"inner": "scales"},
    "steps": {"options": QUICK.replace("6", "7")},
    "rate": {"options": QUICK.replace("0.05", "0.06")},
    "seed": {"options": f"{QUICK}, seed: 1"},
    "limit": {"options": f"{QUICK}, limit: 3"},
    "head": {"at": "z layer 1 head 1 at last token"},
    "layer": {"at": "z layer 0 head 2 at last token"},
    "position": {"at": f"{HEAD} at tokens *"},
    "sign": {"objective": f"minimise: {LOSS}"},
    "measure": {"objective": "maximise: logprob(wrong) - 0.4 * logit(answer)"},
    "compared run": {"objective": "minimise: kl(other)"},
}


def test_scales_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    """A different argument needs another training and gives other scales."""
    _, folders = check_keys(
        tmp_path, trains_all, fit, CHANGES, SCALED, lambda own: vector(own).tolist()
    )
    added = experiment("add s to z layer 1 head 2 at last token")
    line = fit(inner="vector(penalty: 0.1)")
    (other,) = train(write(tmp_path, line, added))
    assert other.folder not in folders


# --- mistakes -------------------------------------------------------------------------------------

USES: dict[str, tuple[str, str]] = {
    "add": (f"add s to {HEAD} at last token", "`add` takes a direction"),
    "set": (f"set {HEAD} at last token to 2 * s", "`set` takes a direction"),
    "project out": (f"project out s from {HEAD} at last token", "`project out` takes a direction"),
    "project onto": (f"project {HEAD} at last token onto s", "`project onto` takes a direction"),
    "clamp": (f"clamp s of {HEAD} at last token to 2", "`clamp` takes a direction"),
    "unit": (f"scale {HEAD} at last token by unit(s)", "a direction of a sum"),
    "sum": (f"scale {HEAD} at last token by s - s", "a direction of a sum"),
    "basis": (f"ablate {HEAD} in basis b at last token with mean", "isn't a direction"),
    "width": ("scale resid_post layer 1 at last token by s", "its width is 6"),
    "pattern": ("scale pattern layer 1 head 2 at last token by s", "has no vectors"),
    "neurons": ("scale mlp_hidden layer 1 neuron 3 at last token by s", "has no vectors"),
    "coordinates": (f"scale {HEAD} in basis c at last token by s", "act on coordinates"),
}


@pytest.mark.parametrize("name", USES)
def test_scales_in_unsupported_rules_are_rejected(name: str, tmp_path: Path) -> None:
    rule, said = USES[name]
    more = f"basis b = directions(s) at {HEAD}\n" if name == "basis" else ""
    more += f"basis c = random(dims: 5) at {HEAD}\n" if name == "coordinates" else ""
    path = write(tmp_path, fit(), more, experiment(rule))
    with pytest.raises(mechdsl.MechdslError, match=said) as found:
        train(path)
    errors = [each for each in found.value.diagnostics if each.severity == "error"]
    assert {each.code for each in errors} <= {"E0341", "E0342"}


def test_saving_scales_as_a_control_vector_is_rejected(tmp_path: Path) -> None:
    save = 'experiment e {\n  model m\n  save direction s to "s.gguf"\n}\n'
    line = fit(at="resid_post layer 1 at last token")
    with pytest.raises(mechdsl.MechdslError, match=r"llama\.cpp adds control vectors"):
        train(write(tmp_path, line, save))
    path = write(tmp_path, line, save.replace("gguf", "safetensors"))
    (found,) = train(path)
    run(path)
    assert torch.equal(load_file(tmp_path / "s.safetensors")["s"], vector(found).float())


CALL = f"fit(scales(penalty: 0.1), prompts: p, maximise: {LOSS})"
MISTAKES: dict[str, tuple[str, str, str]] = {
    "no measure": (f", maximise: {LOSS}", "", "E0207"),
    "source": ("prompts: p", "prompts: p, from: other", "E0207"),
    "fill": ("prompts: p", "prompts: p, with: zero", "E0207"),
    "no rows": ("prompts: p, ", "", "E0207"),
    "negative": ("penalty: 0.1", "penalty: -1", "E0342"),
    "text": ("penalty: 0.1", 'penalty: "much"', "E0342"),
    "other name": ("penalty: 0.1", "length: 3", "E0207"),
    "other trainer": ("scales(penalty: 0.1)", "asguard(penalty: 0.1)", "E0203"),
    "singular": ("scales(penalty: 0.1)", "scale(penalty: 0.1)", "E0203"),
    "in a basis": ("direction s", "basis s", "E0342"),
    "factor": (CALL, f"2 * {CALL}", "E0341"),
    "no site": (f" at {HEAD} at last token", "", "E0341"),
    "several positions": ("last token", "token -2..-1", "E0341"),
    "several heads": (HEAD, "z layer 1", "E0341"),
    "step function": (f"maximise: {LOSS}", "maximise: rank(answer)", "E0608"),
    "pattern": (HEAD, "pattern layer 1 head 1", "E0608"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_scales_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code = MISTAKES[name]
    line = f"direction s = {CALL} at {HEAD} at last token\n".replace(old, new)
    path = write(tmp_path, line, SCALED, blocks=NOISY)
    errors = training_errors(path)
    assert errors[0].code == code, errors


def test_measuring_training_rows_of_scales_is_rejected(tmp_path: Path) -> None:
    used = experiment(f"scale {HEAD} at last token by 2 * s", block="p")
    with pytest.raises(mechdsl.MechdslError, match="measures rows that `s` is trained on") as found:
        train(write(tmp_path, fit(), used))
    assert found.value.diagnostics[0].code == "E0345"
    allowed = write(tmp_path, fit(f"{QUICK}, measure_on_training_rows: true"), used)
    train(allowed)
    (done,) = run(allowed).files[0].experiments
    assert "4 of the 4 rows measured here are training rows" in done.conventions["direction s"]
