"""Soft prompts that a file declares with `direction v = fit(soft_prompt(tokens: 2), …)`.

Loss, gradient and trainings are compared with autograd on the bare model in float64, which receives
the embeddings of one unpadded prompt with inserted vectors (`inputs_embeds`). Further tests: use in
rules, equal to vectors loaded from a file; keys; errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.fits.reports import SoftPromptReport

from ..execute.support import ROWS, prompt, token
from ..quick import in_turn, some
from ..rules.models import double
from ..rules.support import BLOCKS
from .test_trained_dictionaries import assert_same_results, experiment, run, train, untrained
from .test_trained_dictionaries import write as write_blocks
from .test_trained_rotations import (
    HERE,
    LOSS,
    MEASURE,
    OTHER,
    QUICK,
    SITE,
    loss_by_hand,
    training_errors,
    training_rows,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
COUNT = 2
INSERTED = f'corrupt soft {{ insert {COUNT} tokens before last token with " w7" }}'
SOFT = BLOCKS.replace('answer " {a}"', f'{INSERTED}\n  answer " {{a}}"')
AT = "embed at inserted tokens"
INTO = ("from clean into soft", f"set {AT} to v")
USED = experiment(*INTO)
SET = experiment(f"set {SITE} at tokens -2..-1 to v")
"""Writes at tokens of the original prompts."""


def write(folder: Path, *parts: str, blocks: str = SOFT) -> Path:
    return write_blocks(folder, *parts, blocks=blocks)


def fit(
    options: str = QUICK,
    *,
    tokens: int = COUNT,
    prompts: str = "p",
    objective: str = f"maximise: {LOSS}",
    at: str = f"{SITE} at tokens -2..-1",
) -> str:
    inner = f"soft_prompt(tokens: {tokens})"
    return f"direction v = fit({inner}, prompts: {prompts}, {objective}, {options}) at {at}\n"


def inserted(options: str = QUICK, **others: Any) -> str:
    return fit(options, **{"prompts": "soft of p", "at": AT, **others})


def vectors(found: mechdsl.TrainedFit) -> Tensor:
    saved = load_file(found.folder / "vector.safetensors")
    return torch.stack([saved[f"vector.position{n}"] for n in range(len(saved))])


def report(found: mechdsl.TrainedFit) -> SoftPromptReport:
    assert isinstance(found.report, SoftPromptReport)
    return found.report


# --- the loss -------------------------------------------------------------------------------------


def embeddings(family: str, row: int) -> Tensor:
    """[token, width] of a prompt with placeholders before its last token."""
    ids = list(prompt(ROWS[row]).ids)
    ids[-1:-1] = [token("w7")] * COUNT
    with torch.no_grad():
        return double(family).get_input_embeddings()(torch.tensor(ids))


def value_by_hand(family: str, row: int, written: Tensor | None) -> Tensor:
    """The measure of one unpadded prompt with inserted vectors; None: with placeholders."""
    given = embeddings(family, row)
    if written is not None:
        given = torch.cat([given[: -1 - COUNT], written, given[-1:]])
    return loss_by_hand(double(family)(inputs_embeds=given[None]).logits[0, -1], row)


def clean_by_hand(family: str, row: int) -> float:
    ids = torch.tensor(prompt(ROWS[row]).ids)
    with torch.no_grad():
        return loss_by_hand(double(family)(ids[None]).logits[0, -1], row).item()


@pytest.mark.parametrize(("family", "side"), in_turn(HERE, ("left", "right")))
def test_soft_prompt_loss_and_gradient_equal_autograd(
    family: str, side: Any, tmp_path: Path
) -> None:
    """For every row, in ragged batches of two rows."""
    found = training_rows(write(tmp_path, inserted(), USED), double(family), side)
    width = found.first_vectors.shape[1]
    random = torch.Generator().manual_seed(5)
    mine = torch.randn(COUNT, width, generator=random, dtype=torch.float64).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    ids = found.objective.table.row_ids
    assert sorted(found.rows.tolist()) == [0, 1, 2, 3]
    for batch in ([0, 2], [1, 3]):
        values = found.values(np.array(batch), lambda own, other: mine.repeat(2, 1))
        expected = torch.stack([value_by_hand(family, ids[row], theirs) for row in batch])
        assert torch.allclose(values, expected, atol=1e-9)
        (own,) = torch.autograd.grad(values.mean(), mine)
        (other,) = torch.autograd.grad(expected.mean(), theirs)
        assert torch.allclose(own, other, atol=1e-6)  # rotary angles and norms are float32
        assert other.abs().max() > 1e-5


# --- trainings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HERE)
@pytest.mark.parametrize("word", ["maximise", "minimise"])
def test_soft_prompt_training_equals_a_reference_loop(
    word: str, family: str, tmp_path: Path
) -> None:
    """The reference loop shares only its seeds with the package."""
    path = write(tmp_path, inserted(f"{QUICK}, seed: 3", objective=f"{word}: {LOSS}"), USED)
    (found,) = train(path, family)
    table = training_rows(path, double(family)).objective.table
    order = sorted(range(4), key=lambda n: stable_hash(3, "training row", table.row_keys[n]))
    ids = [table.row_ids[row] for row in order]
    placeholder = embeddings(family, 0)[-2]
    unit = float(placeholder.norm()) / len(placeholder) ** 0.5
    start = placeholder.repeat(COUNT, 1)
    expected = trained_by_hand(family, start, unit, ids[1:], -1 if word == "maximise" else 1)
    own = vectors(found).double()
    assert torch.allclose(own, expected, atol=2e-3 * float(expected.norm()))
    assert (expected - start).norm() > 0.1 * expected.norm()
    said = report(found)
    assert (said.rows, said.held_out_rows, said.steps, said.tokens) == (3, 1, 6, COUNT)
    assert said.length == pytest.approx(float(own.norm(dim=1).mean()), rel=1e-5)
    assert said.site_length == pytest.approx(float(placeholder.norm()), rel=1e-5)
    random = torch.Generator().manual_seed(stable_hash(3, "random vectors") % 2**63)
    drawn = [torch.randn(own.shape, generator=random, dtype=torch.float64) for _ in range(8)]
    scaled = [each / each.norm(dim=1)[:, None] * own.norm(dim=1)[:, None] for each in drawn]
    randoms = [value_by_hand(family, ids[0], each).item() for each in scaled]
    assert said.trained == pytest.approx(value_by_hand(family, ids[0], own).item(), abs=1e-3)
    assert said.random == pytest.approx(np.mean(randoms), abs=1e-3)
    placeholders = value_by_hand(family, ids[0], None).item()
    assert said.placeholders == pytest.approx(placeholders, abs=1e-3)
    assert said.clean == pytest.approx(clean_by_hand(family, ids[0]), abs=1e-3)
    assert abs(said.placeholders - said.clean) > 1e-3


def trained_by_hand(family: str, start: Tensor, unit: float, ids: list[int], sign: int) -> Tensor:
    """Six steps of Adam on batches of two of three rows."""
    numbers = torch.zeros_like(start)
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(6):
        random = torch.Generator().manual_seed(stable_hash(3, "order", step) % 2**63)
        batch = [ids[n] for n in torch.randperm(3, generator=random)[:2].tolist()]
        leaf = numbers.clone().requires_grad_()
        values = [value_by_hand(family, row, start + unit * leaf) for row in batch]
        (slope,) = torch.autograd.grad(sign * torch.stack(values).mean(), leaf)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        size = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        rate = 0.05 * min(1.0, (1 - step / 6) / 0.2)
        numbers = numbers - rate * first / (1 - 0.9 ** (step + 1)) / size
    return start + unit * numbers


def test_soft_prompt_on_clean_tokens_reports_no_separate_clean_run(tmp_path: Path) -> None:
    (found,) = train(write(tmp_path, fit("steps: 40, batch: 4, rate: 0.1, validation: 0%"), SET))
    said = report(found)
    assert said.clean is None
    assert (said.rows, said.held_out_rows) == (4, 0)
    assert said.trained > max(said.random, said.placeholders) + 0.1


# --- use in rules ---------------------------------------------------------------------------------

RULES = {
    "rule": INTO,
    "factor": (INTO[0], f"set {AT} to 2 * v"),
    "sweep": (INTO[0], f"for c in [0, 1, 4] {{ set {AT} to c * v }}"),
    "sum": (INTO[0], f"set {AT} to unit(v) - 0.5 * v"),
    "named sum": (INTO[0], f"set {AT} to w"),
    "added": (INTO[0], f"add v to {AT}"),
    "one token": (INTO[0], f"set {AT} to v[token 2]"),
    "swapped": (INTO[0], f"set {AT} to [v[token 2], v[token 1]]"),
    "random": (*INTO, "against random(3, directions)"),
    "derived": (
        f"run changed {{ {INTO[0]} {INTO[1]} }}",
        "from changed into clean",
        "patch layer 2 head * at last token",
    ),
    "replies": ("generate 3", *INTO),
}
DIRECTIONS = """\
direction a = saved("v/vector.safetensors", "vector.position0")
direction b = saved("v/vector.safetensors", "vector.position1")
"""
LISTS = {"to 2 * v": "to 2 * [a, b]", "c * v": "c * [a, b]", "to v[token 2]": "to b",
         "to [v[token 2], v[token 1]]": "to [b, a]", "add v": "add [a, b]", "to v": "to [a, b]",
         "to unit(v) - 0.5 * v": "to [unit(a) - 0.5 * a, unit(b) - 0.5 * b]",
         "to w": "to [2 * a - unit(a), 2 * b - unit(b)]"}  # fmt: skip


@pytest.mark.parametrize("name", some(RULES, [*RULES][0::4]))
def test_soft_prompt_in_rules_equals_saved_vectors(name: str, tmp_path: Path) -> None:
    """With a second experiment on the same block."""
    measure = "measure logit(answer) as raw" if name == "replies" else MEASURE
    text = experiment(*RULES[name], measure=measure) + OTHER
    path = write(tmp_path, inserted(), "direction w = 2 * v - unit(v)\n", text)
    (trained,) = train(path, out=tmp_path)
    card = (tmp_path / "v" / "README.md").read_text("utf-8")
    assert f"{COUNT} vectors replace those at these tokens, to maximise {LOSS}" in card
    own = run(path, fresh=True).files[0].experiments
    listed = text
    for old, new in LISTS.items():
        listed = listed.replace(old, new)
    assert listed != text
    loaded = run(write(tmp_path, DIRECTIONS, listed), store=False).files[0].experiments
    assert len(own) == 2
    assert_same_results(own, loaded)
    if name == "rule":
        said = own[0].conventions["direction v[token 1]"]
        assert "4 rows of p (soft) at inserted tokens, 1 of them held out" in said
        assert f"to maximise {LOSS}" in said
        assert f"trained {report(trained).trained:.4g}, random vectors of these lengths" in said
        assert "trained together with v" in own[0].conventions["direction v[token 2]"]


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "steps": {"options": QUICK.replace("6", "7")},
    "rate": {"options": QUICK.replace("0.05", "0.06")},
    "seed": {"options": f"{QUICK}, seed: 1"},
    "limit": {"options": f"{QUICK}, limit: 3"},
    "sign": {"objective": f"minimise: {LOSS}"},
    "measure": {"objective": "maximise: logprob(wrong) - 0.4 * logit(answer)"},
    "compared run": {"objective": "minimise: kl(other)"},
}
BLOCK_CHANGES = {
    "placeholder": ('" w7"', '" w8"'),
    "place": ("before last token", "before first token"),
    "side": ("before last token", "after last token"),
}


def test_soft_prompt_key_depends_on_every_argument_and_placeholder(
    tmp_path: Path, trains_all: bool
) -> None:
    """A different argument needs another training and gives other vectors."""
    (base,) = train(write(tmp_path, inserted(), USED))
    folders, first = {base.folder}, vectors(base)
    cases = [(name, inserted(**change), SOFT) for name, change in CHANGES.items()]
    for name, (old, new) in BLOCK_CHANGES.items():
        assert old in SOFT
        cases.append((name, inserted(), SOFT.replace(old, new)))
    for number, (name, line, blocks) in enumerate(cases):
        path = write(tmp_path, line, USED, blocks=blocks)
        expected = untrained(path)
        assert expected not in folders, name
        folders.add(expected)
        if trains_all or number % 8 == 0:
            (found,) = train(path)
            assert found.folder == expected, name
            assert not torch.equal(vectors(found), first), name
    one = SOFT.replace(f"insert {COUNT} tokens", "insert 1 token")
    (fewer,) = train(write(tmp_path, inserted(tokens=1), USED, blocks=one))
    assert fewer.folder not in folders
    (family,) = train(write(tmp_path, inserted(), USED), "gpt2")
    assert family.folder.name not in {each.name for each in folders}


def test_soft_prompt_key_ignores_names_and_factors(tmp_path: Path) -> None:
    (before,) = train(write(tmp_path, inserted(), USED))
    for parts in (
        (inserted().replace("direction v", "direction u"), USED.replace("to v", "to u")),
        (inserted(), OTHER, USED.replace("to v", "to 5 * v")),
    ):
        (found,) = train(write(tmp_path, *parts))
        assert (found.folder, found.seconds) == (before.folder, 0.0)


# --- mistakes -------------------------------------------------------------------------------------

CALL = f"fit(soft_prompt(tokens: {COUNT}), prompts: soft of p, maximise: {LOSS})"
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "no measure": (f", maximise: {LOSS}", "", "E0207", "needs `maximise"),
    "source run": ("prompts: soft of p", "prompts: soft of p, from: other", "E0207", "no `from`"),
    "unknown run": ("soft of p", "sfot of p", "E0201", "soft"),
    "no tokens": (f"soft_prompt(tokens: {COUNT})", "soft_prompt", "E0207", "needs `tokens"),
    "zero": (f"tokens: {COUNT}", "tokens: 0", "E0342", "whole number from 1"),
    "other name": (f"tokens: {COUNT}", f"count: {COUNT}", "E0207", "tokens"),
    "more vectors": (f"tokens: {COUNT}", "tokens: 3", "E0341", "has 3 directions"),
    "position of the clean run": ("soft of p", "p", "E0309", "inserted"),
    "steering vector": ("soft_prompt(tokens: 2)", "vector(length: 3)", "E0207", "clean run"),
    "step function": (f"maximise: {LOSS}", "maximise: rank(answer)", "E0608", "rank"),
    "basis": ("direction v", "basis v", "E0342", "direction"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_soft_prompt_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code, said = MISTAKES[name]
    line = f"direction v = {CALL} at {AT}\n"
    assert old in line
    errors = training_errors(write(tmp_path, line.replace(old, new), USED))
    assert errors[0].code == code, errors
    assert said in f"{errors[0].message} {errors[0].label_text} {errors[0].help_text}"


@pytest.mark.parametrize("written", ["[v, v]", "[v[token 1], v]", "[[v[token 1]], v[token 2]]"])
def test_list_item_with_several_vectors_is_rejected(written: str, tmp_path: Path) -> None:
    used = USED.replace("to v", f"to {written}")
    with pytest.raises(mechdsl.MechdslError, match="this item has several") as found:
        train(write(tmp_path, inserted(), used))
    assert found.value.diagnostics[0].code == "E0341"


def test_measuring_training_rows_of_a_soft_prompt_is_rejected(tmp_path: Path) -> None:
    used = experiment(*INTO, block="p")
    with pytest.raises(mechdsl.MechdslError, match="measures rows that `v` is trained on") as found:
        train(write(tmp_path, inserted(), used))
    assert found.value.diagnostics[0].code == "E0345"
