"""Low-rank edits that a file declares with `direction r = fit(reft(…), …)`.

Loss, gradient and trainings are compared with autograd on the bare model in float64, one unpadded
prompt at a time. Further tests: a planted edit that no constant vector can replace, use in rules,
keys, and errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.fits.reports import EditReport
from mechdsl.fits.vectors import low_rank_change, turn_edit

from ..execute.support import word_tokenizer
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
    CLASSES,
    CUES,
    HERE,
    LOSS,
    MEASURE,
    NOISY,
    OTHER,
    PLANTED,
    QUICK,
    SITE,
    orthonormal_by_hand,
    planted,
    training_errors,
    training_rows,
)
from .test_trained_vectors import edited_value, site_vectors, trained_by_hand

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
ADD = experiment(f"add 2 * r to {SITE} at last token")
HEAD = "z layer 1 head 2"


def fit(
    options: str = QUICK,
    *,
    inner: str = "reft(rank: 2)",
    objective: str = f"maximise: {LOSS}",
    at: str = f"{SITE} at last token",
) -> str:
    return f"direction r = fit({inner}, prompts: p, {objective}, {options}) at {at}\n"


def weights(found: mechdsl.TrainedFit) -> tuple[Tensor, Tensor, Tensor]:
    """B [rank, width], A [rank, width] and c [width]."""
    return read_weights(found.folder / "vector.safetensors", "edit")


def read_weights(path: Path, name: str) -> tuple[Tensor, Tensor, Tensor]:
    own = load_file(path)
    assert len(own) % 3 == 0
    reads, writes, offset = (own[f"{name}.{part}"] for part in ("reads", "writes", "offset"))
    return reads.double(), writes.double(), offset.double()


def report(found: mechdsl.TrainedFit) -> EditReport:
    assert isinstance(found.report, EditReport)
    return found.report


def added(own: Tensor, edit: Sequence[Tensor]) -> Tensor:
    """The vectors that an edit adds to the given vectors, computed one by one."""
    reads, writes, offset = edit
    every = [
        sum((row @ one) * to for row, to in zip(reads, writes, strict=True)) + offset for one in own
    ]
    return torch.stack(every)


def drawn_edit(rank: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    numbers = torch.randn(2 * rank + 1, width, generator=random, dtype=torch.float64)
    return numbers[:rank] / width, numbers[rank:-1], numbers[-1]


# --- the loss -------------------------------------------------------------------------------------

POSITIONS = ("last token", "subject tokens", "tokens *")
SITES = (SITE, HEAD, "mlp_out layer 1")


@pytest.mark.parametrize(("family", "at"), in_turn(HERE, POSITIONS))
@pytest.mark.parametrize(("site", "side"), in_turn(SITES, ("left", "right")))
def test_edit_loss_and_gradient_equal_autograd(
    site: str, side: Any, family: str, at: str, tmp_path: Path
) -> None:
    """For every row, in ragged batches of two rows."""
    used = experiment(f"add 2 * r to {site} at last token")
    found = training_rows(write(tmp_path, fit(at=f"{site} at {at}"), used), double(family), side)
    mine = [each.requires_grad_() for each in drawn_edit(2, found.first_vectors.shape[1])]
    theirs = [each.detach().clone().requires_grad_() for each in mine]
    reads, writes, offset = mine
    ids = found.objective.table.row_ids
    for batch in ([0, 2], [1, 3]):
        values = found.values(
            np.array(batch), lambda own, other: own + own @ reads.T @ writes + offset
        )
        every = [edited_value(family, ids[row], site, at, lambda own: own + added(own, theirs))
                 for row in batch]  # fmt: skip
        expected = torch.stack(every)
        assert torch.allclose(values, expected, atol=1e-9)
        slopes = torch.autograd.grad(values.mean(), mine)
        others = torch.autograd.grad(expected.mean(), theirs)
        for one, two in zip(slopes, others, strict=True):
            assert torch.allclose(one, two, atol=1e-6)  # rotary angles and norms are float32
            assert two.abs().max() > 1e-5


# --- trainings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "word"), [("loreft", "maximise"), ("direft", "minimise")])
def test_edit_training_equals_a_reference_loop(kind: str, word: str, tmp_path: Path) -> None:
    """The reference loop shares only its seeds with the package; trained at all tokens."""
    inner = f'reft(rank: 2, kind: "{kind}")'
    line = fit(f"{QUICK}, seed: 3", inner=inner, objective=f"{word}: {LOSS}",
               at=f"{SITE} at tokens *")  # fmt: skip
    path = write(tmp_path, line, ADD)
    (found,) = train(path)
    table = training_rows(path, double("llama")).objective.table
    order = sorted(range(4), key=lambda n: stable_hash(3, "training row", table.row_keys[n]))
    ids = [table.row_ids[row] for row in order]
    every = torch.cat([site_vectors("clean", row) for row in ids])
    width, size = every.shape[1], float(every.norm(dim=1).mean())
    root, sign = width**0.5, -1 if word == "maximise" else 1
    random = torch.Generator().manual_seed(stable_hash(3, "weights") % 2**63)
    first = orthonormal_by_hand(torch.randn(2, width, generator=random, dtype=torch.float64))
    start = torch.cat([torch.zeros(2 * width).double(), first.flatten() * root, torch.zeros(2)])

    def parts(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reads, writes, offset = numbers.split([2 * width, 2 * width, 2])
        rows = writes.view(2, -1) / root
        rows = orthonormal_by_hand(rows) if kind == "loreft" else rows
        return reads.view(2, -1) / root, rows, (offset * size / 2**0.5) @ rows

    def after_step(numbers: Tensor) -> Tensor:
        rows = orthonormal_by_hand(numbers[2 * width : -2].view(2, -1)).flatten() * root
        return torch.cat([numbers[: 2 * width], rows, numbers[-2:]])

    def value(edit: Sequence[Tensor], row: int) -> Tensor:
        return edited_value("llama", row, SITE, "tokens *", lambda own: edited(own, edit))

    def loss(numbers: Tensor, row: int) -> Tensor:
        return sign * value(parts(numbers), row)

    normed = after_step if kind == "loreft" else None
    expected = parts(trained_by_hand(start, ids[1:], loss, normed))
    own = weights(found)
    for one, two in zip(own, expected, strict=True):
        assert torch.allclose(one, two, atol=5e-3 * float(two.norm()))
    assert expected[0].norm() > 0.1
    assert (expected[1] - first).norm() > 0.1
    if kind == "loreft":
        assert torch.allclose(own[1] @ own[1].T, torch.eye(2).double(), atol=1e-5)
    said = report(found)
    assert (said.rows, said.held_out_rows, said.steps, said.rank) == (3, 1, 6, 2)
    assert said.site_length == pytest.approx(size, rel=1e-4)
    assert said.length == pytest.approx(float(added(every, own).norm(dim=1).mean()), rel=1e-4)
    check_controls(said, lambda edit: value(edit, ids[0]).item(), every, own)


def edited(own: Tensor, edit: Sequence[Tensor]) -> Tensor:
    """[units, width] vectors plus the vectors that an edit adds, in the same shape."""
    return (own.flatten()[None] + added(own.flatten()[None], edit)).view_as(own)


def check_controls(
    said: EditReport,
    value: Callable[[Sequence[Tensor]], float],
    every: Tensor,
    own: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Check the controls on the held-out row; `every` has the vectors of all rows."""
    reads, writes, offset = own
    zero = torch.zeros_like(reads), torch.zeros_like(writes)
    constant = added(every, own).mean(0)
    assert said.trained == pytest.approx(value(own), abs=1e-3)
    assert said.constant == pytest.approx(value((*zero, constant)), abs=1e-3)
    assert said.unedited == pytest.approx(value((*zero, torch.zeros_like(offset))), abs=1e-3)
    random = torch.Generator().manual_seed(stable_hash(3, "random vectors") % 2**63)
    turned = [
        turn(own, torch.randn(5, len(offset), generator=random, dtype=torch.float64))
        for _ in range(8)
    ]
    for each in turned:
        lengths = [added(every, edit).norm(dim=1) for edit in (own, each)]
        assert torch.allclose(*lengths, rtol=1e-6)
    assert said.turned == pytest.approx(np.mean([value(each) for each in turned]), abs=1e-3)
    random = torch.Generator().manual_seed(stable_hash(3, "random edits") % 2**63)
    others: list[float] = []
    for _ in range(8):
        numbers = torch.randn(5, len(offset), generator=random, dtype=torch.float64)
        drawn = numbers[:2], numbers[2:4], numbers[4] * every.norm(dim=1).mean()
        length = added(every, drawn).norm(dim=1).mean()
        ratio = added(every, own).norm(dim=1).mean() / length
        others.append(value((drawn[0], drawn[1] * ratio, drawn[2] * ratio)))
    assert said.random == pytest.approx(np.mean(others), abs=1e-3)


def turn(own: tuple[Tensor, Tensor, Tensor], numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An edit in the span of random vectors, whose added vectors have the same coordinates."""
    reads, writes, offset = own
    from_axes = torch.linalg.qr(torch.cat([writes, offset[None]]).T)[0]
    to_axes = torch.linalg.qr(numbers[2:].T)[0]
    return reads, writes @ from_axes @ to_axes.T, offset @ from_axes @ to_axes.T


# --- a planted edit -------------------------------------------------------------------------------


def write_turned(folder: Path, seed: int) -> Path:
    """Write rows whose second answer is the next class: a 90° rotation in the planted plane."""
    lines: list[str] = []
    for number in range(CUES):
        here, there = number % CLASSES, (number + 1) % CLASSES
        record = {"cue": f"w{number}", "cue2": f"w{(number + 1) % CUES}"}
        lines.append(json.dumps(record | {"a": f"w{CUES + here}", "a2": f"w{CUES + there}"}))
    (folder / "planted.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    site = "resid_post layer 0 at last token"
    objective = "maximise: logprob(answer of swapped), steps: 200, batch: 16, rate: 0.03"
    line = f"fit(reft(rank: 2), prompts: planted.train, {objective}, seed: {seed}) at {site}"
    used = experiment(
        f"add r to {site}",
        "against random(9, directions)",
        block="planted.test",
        measure="measure rank(answer of swapped) as raw",
    )
    blocks = PLANTED.replace("split 60%", "split 80%")  # the edit reads 24 numbers of a word
    return write(folder, f"direction r = {line}\n", used, blocks=blocks)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_edit_training_finds_a_planted_edit(seed: int, tmp_path: Path) -> None:
    """On held-out words, the answer becomes the next class, which no constant vector achieves."""
    model, plane = planted()
    given = {"m": (model, word_tokenizer())}
    path = write_turned(tmp_path, seed)
    (found,) = mechdsl.fit(path, given, store=tmp_path / "store")
    (result,) = mechdsl.run(path, given, store=tmp_path / "store").files[0].experiments
    assert (result.measures[0].patched == 1).mean() >= 0.95
    band = result.control(0)
    assert band is not None
    assert band.low[0] > 1.5, "the mean rank with the same edit in a random plane"
    said = report(found)
    assert said.trained > max(said.turned, said.random, said.constant, said.unedited) + 5
    assert torch.linalg.svdvals(weights(found)[1].float() @ plane.T).min() > 0.9


# --- use in rules ---------------------------------------------------------------------------------

RULES = {
    "sweep": [f"for c in [0, 0.5, 1, 4] {{ add c * r to {SITE} at last token }}"],
    "other sites": ["add r to resid_post layer * at tokens *"],
    "named": [f"add -named to {SITE} at last token"],
    "random": [f"add r to {SITE} at last token", "against random(3, directions)"],
    "one per token": [f"add [r, v] to {SITE} at tokens -2..-1"],
    "derived": [
        f"run changed {{ add 3 * r to {SITE} at tokens * }}",
        "from changed into clean",
        "patch layer 2 head * at last token",
    ],
    "replies": ["generate 3", f"add 3 * r to {SITE} at tokens *"],
    "steps": ["generate 3", f"add 3 * r to {SITE} at last token during each step"],
}
MORE = f"direction named = r\ndirection v = mean(second) at {SITE}\n"


@pytest.mark.parametrize("name", some(RULES, [*RULES][1::4]))
def test_trained_edit_in_rules_equals_the_saved_edit(name: str, tmp_path: Path) -> None:
    """Up to rounding, with a second experiment on the same block."""
    replies = RULES[name][0].startswith("generate")
    measure = "measure logit(answer) as raw" if replies else MEASURE
    text = MORE + experiment(*RULES[name], measure=measure) + OTHER
    path = write(tmp_path, fit(), text)
    (trained,) = train(path, out=tmp_path)
    card = (tmp_path / "r" / "README.md").read_text("utf-8")
    assert card.startswith("# r: reft, rank 2")
    assert f"adds Aᵀ B x + c to an activation x at these tokens, to maximise {LOSS}" in card
    own = run(path, fresh=True).files[0].experiments
    path = write(tmp_path, 'direction r = saved("r/vector.safetensors", "edit")\n', text)
    loaded = run(path, store=False).files[0].experiments
    assert len(own) == 2
    assert_same_results(own, loaded)
    if name == "sweep":
        said = own[0].conventions["direction r"]
        assert f"4 rows of p at last token, 1 of them held out, to maximise {LOSS}" in said
        assert f"trained {report(trained).trained:.4g}, in a random subspace" in said
        assert "norm" not in said
    if name == "random":
        assert "of the same rank" in own[0].conventions["controls"]


def test_random_edits_add_vectors_of_equal_norms(tmp_path: Path) -> None:
    """The added vectors of a random edit are rotated into a random subspace."""
    edit = drawn_edit(2, 20)
    vectors = torch.randn(7, 20, dtype=torch.float64)
    matrix = torch.cat([edit[0], edit[1], edit[2][None]])
    found = turn_edit(matrix, torch.randn(5, 20, dtype=torch.float64))
    changes = [low_rank_change(vectors, each) for each in (matrix, found)]
    assert torch.allclose(changes[0], added(vectors, edit))
    assert torch.allclose(changes[0] @ changes[0].T, changes[1] @ changes[1].T)
    assert not torch.allclose(*changes)


@pytest.mark.slow
def test_saved_direction_equals_the_trained_edit(tmp_path: Path) -> None:
    every = "resid_post layer * at last token"
    save = 'experiment s {\n  model m\n  save direction r to "out.safetensors"\n}\n'
    path = write(tmp_path, fit(at=every), save)
    found = train(path)
    run(path)
    tensors = load_file(tmp_path / "out.safetensors")
    assert len(tensors) == 9
    for layer, each in enumerate(found):
        for part, own in zip(("reads", "writes", "offset"), weights(each), strict=True):
            assert torch.equal(tensors[f"r.layer{layer}.{part}"], own.float())
    used = experiment(f"add r to {every}")
    own = run(write(tmp_path, fit(at=every), used)).files[0].experiments
    line = 'direction r = saved("out.safetensors", "r") at resid_post layer *\n'
    loaded = run(write(tmp_path, line, used), store=False).files[0].experiments
    assert np.allclose(own[0].measures[0].patched, loaded[0].measures[0].patched, atol=1e-5)
    vector_file = write(tmp_path, fit(), save.replace("safetensors", "gguf"))
    with pytest.raises(mechdsl.MechdslError, match=r"llama\.cpp adds control vectors"):
        train(vector_file)


@pytest.mark.slow
def test_edit_with_several_seeds_has_one_cell_per_training(tmp_path: Path) -> None:
    """Each cell equals a training with that seed alone."""
    quick = QUICK.replace("0.05", "0.005")
    path = write(tmp_path, fit(f"{quick}, seed: 4, seeds: 2"), ADD)
    found = run(path, fit=True)["e"].measures[0].patched
    for number, seed in enumerate((4, 5)):
        alone = run(write(tmp_path, fit(f"{quick}, seed: {seed}"), ADD), fit=True)
        assert np.allclose(found[number], alone["e"].measures[0].patched[0], atol=1e-5)
    assert not np.allclose(*found, atol=1e-4)


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "rank": {"inner": "reft(rank: 3)"},
    "kind": {"inner": 'reft(rank: 2, kind: "direft")'},
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


def test_edit_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    """A different argument needs another training and gives another edit."""
    check_keys(
        tmp_path,
        trains_all,
        fit,
        CHANGES,
        ADD,
        lambda own: [each.tolist() for each in weights(own)],
    )


# --- mistakes -------------------------------------------------------------------------------------

USES: dict[str, tuple[str, str]] = {
    "set": (f"set {SITE} at last token to 2 * r", "`set` takes a direction"),
    "scale": (f"scale {SITE} at last token by r", "`scale` takes a direction"),
    "project out": (f"project out r from {SITE} at last token", "`project out` takes a direction"),
    "project onto": (f"project {SITE} at last token onto r", "`project onto` takes a direction"),
    "clamp": (f"clamp r of {SITE} at last token to 2", "`clamp` takes a direction"),
    "weights": ("project out r from weights", "takes a direction"),
    "weights of neurons": ("add r to weights of L1N3", "takes a direction"),
    "unit": (f"add unit(r) to {SITE} at last token", "a direction of a sum"),
    "sum": (f"add r - r to {SITE} at last token", "a direction of a sum"),
    "basis": (f"ablate {SITE} in basis b at last token with mean", "isn't a direction"),
    "width": (f"add r to {HEAD} at last token", "its width is 20"),
    "pattern": ("add r to pattern layer 1 head 2 at last token", "has no vectors"),
    "neurons": ("add r to mlp_hidden layer 1 neuron 3 at last token", "has no vectors"),
    "coordinates": (f"add r to {SITE} in basis c at last token", "act on coordinates"),
}


@pytest.mark.parametrize("name", USES)
def test_edit_in_unsupported_rules_is_rejected(name: str, tmp_path: Path) -> None:
    rule, said = USES[name]
    more = f"basis b = directions(r) at {SITE}\n" if name == "basis" else ""
    more += f"basis c = random(dims: 5) at {SITE}\n" if name == "coordinates" else ""
    path = write(tmp_path, fit(), more, experiment(rule))
    with pytest.raises(mechdsl.MechdslError, match=said) as found:
        train(path)
    errors = [each for each in found.value.diagnostics if each.severity == "error"]
    assert {each.code for each in errors} <= {"E0341", "E0342", "E0344"}


CALL = f"fit(reft(rank: 2), prompts: p, maximise: {LOSS})"
MISTAKES: dict[str, tuple[str, str, str]] = {
    "no measure": (f", maximise: {LOSS}", "", "E0207"),
    "source": ("prompts: p", "prompts: p, from: other", "E0207"),
    "no rank": ("reft(rank: 2)", "reft", "E0207"),
    "zero": ("rank: 2", "rank: 0", "E0342"),
    "too large": ("rank: 2", "rank: 21", "E0341"),
    "kind": ("rank: 2", 'rank: 2, kind: "lora"', "E0342"),
    "other name": ("rank: 2", "dims: 2", "E0207"),
    "other trainer": ("reft(rank: 2)", "loreft(rank: 2)", "E0203"),
    "in a basis": ("direction r", "basis r", "E0342"),
    "factor": (CALL, f"2 * {CALL}", "E0341"),
    "several positions": ("last token", "token -2..-1", "E0341"),
    "step function": (f"maximise: {LOSS}", "maximise: rank(answer)", "E0608"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_edit_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code = MISTAKES[name]
    line = f"direction r = {CALL} at {SITE} at last token\n".replace(old, new)
    path = write(tmp_path, line, ADD, blocks=NOISY)
    errors = training_errors(path)
    assert errors[0].code == code, errors


def test_file_without_matching_edit_matrices_is_rejected(tmp_path: Path) -> None:
    parts = {
        "r.reads": torch.ones(2, 20),
        "r.writes": torch.ones(3, 20),
        "r.offset": torch.ones(24),
    }
    save_file(parts, tmp_path / "r.safetensors")
    path = write(tmp_path, 'direction r = saved("r.safetensors", "r")\n', ADD)
    with pytest.raises(mechdsl.MechdslError, match=r"`r\.writes` \[3, 20\]"):
        run(path)


def test_measuring_training_rows_of_an_edit_is_rejected(tmp_path: Path) -> None:
    used = experiment(f"add 2 * r to {SITE} at last token", block="p")
    with pytest.raises(mechdsl.MechdslError, match="measures rows that `r` is trained on") as found:
        train(write(tmp_path, fit(), used))
    assert found.value.diagnostics[0].code == "E0345"
