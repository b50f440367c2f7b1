"""`mechdsl.objective`: values and gradients against autograd on the bare model in float64, one
unpadded prompt at a time; rules; errors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mechdsl

from ..execute.support import ROWS, token, word_tokenizer
from ..models import families
from ..quick import in_turn
from ..reference.forward import Write, side_by_side
from ..rules.models import double
from ..rules.support import BLOCKS, plain, rows, tokens, write_data

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("gpt2", "llama", "gpt_neox")
POSITIONS = ("last token", "subject tokens", "cue token")
SITES = (
    "embed", "resid_post layer 1", "z layer 1", "z layer 1 head 2", "mlp_out layer 0",
    "mlp_hidden layer 1",
)  # fmt: skip
MEASURE = "measure logprob(wrong) - 0.5 * logit(answer) as raw"
differentiable = inspect.unwrap(side_by_side)
"""The reference with gradients of written vectors."""


def file(*lines: str, measure: str = MEASURE, block: str = "p", more: str = "") -> str:
    body = "".join(f"  {line}\n" for line in ("model m", f"prompts {block}", *lines, measure))
    return f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{more}\nexperiment e {{\n{body}}}\n'


def write(folder: Path, text: str) -> Path:
    write_data(folder)
    path = folder / "file.mech"
    path.write_text(text, "utf-8")
    return path


def opened(path: Path, family: str = "llama", **named: Any) -> mechdsl.Objective:
    given: dict[str, Any] = {"site": SITES[1], "at": "last token", **named}
    return mechdsl.objective(path, models={"m": (double(family), word_tokenizer())}, **given)


def place(site: str) -> tuple[str, int | None, int | None]:
    words = site.split()
    layer = int(words[2]) if len(words) > 1 else None
    return words[0], layer, int(words[4]) if len(words) > 3 else None


def own_vectors(family: str, row: int, site: str, at: str) -> Tensor:
    """[token, width]: activations of the bare model at a site."""
    name, layer, unit = place(site)
    units = slice(None) if unit is None else slice(unit, unit + 1)
    found = plain(family, rows("clean")[row])[name, layer]
    return torch.stack([found[t, units].flatten() for t in tokens(rows("clean")[row], at)])


def reference_value(
    family: str, row: int, site: str, at: str, vectors: Tensor, rules: Sequence[Write] = ()
) -> Tensor:
    """The measure of one unpadded prompt, with [token, width] vectors and further writes."""
    name, layer, unit = place(site)
    here = rows("clean")[row]
    like = plain(family, here)[name, layer][0, slice(None) if unit is None else [unit]]
    written = [
        Write(name, layer, vector.view_as(like), to, unit)
        for vector, to in zip(vectors, tokens(here, at), strict=False)
    ]
    (done,) = differentiable(family, double(family), here.ids, [([*written, *rules], ())])
    wrong, answer = token(ROWS[row]["b"]), token(ROWS[row]["a"])
    return done.logits[-1].log_softmax(-1)[wrong] - 0.5 * done.logits[-1][answer]


def moved(start: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(3)
    noise = torch.randn(start.shape, generator=random, dtype=start.dtype)
    return (start + 0.3 * noise).requires_grad_()


@pytest.mark.parametrize(("family", "at"), in_turn(HERE, POSITIONS))
@pytest.mark.parametrize(("site", "mode"), in_turn(SITES, ("set", "add")))
def test_objective_values_and_gradients_equal_autograd_for_every_row(
    site: str, mode: str, family: str, at: str, tmp_path: Path
) -> None:
    """All rows in one pass with padding; positions of different lengths."""
    objective = opened(write(tmp_path, file()), family, site=site, at=at, mode=mode)
    assert sorted(objective.rows) == list(range(len(ROWS)))
    mine = moved(objective.start)
    theirs = mine.detach().clone().requires_grad_()
    values = objective(mine)
    assert values.dtype == torch.float64
    assert values.shape == (objective.shape[0],)
    expected: list[Tensor] = []
    for index, row in enumerate(objective.rows):
        own, there = own_vectors(family, row, site, at), tokens(rows("clean")[row], at)
        base = own if mode == "add" else torch.zeros_like(own)
        expected.append(reference_value(family, row, site, at, base + theirs[index, : len(there)]))
        assert objective.positions[index].tolist() == there + [-1] * (
            objective.shape[1] - len(there)
        )
        if mode == "set":
            assert torch.allclose(objective.start[index, : len(there)], own, atol=1e-6)
            assert not objective.start[index, len(there) :].any()
    assert torch.allclose(values, torch.stack(expected), atol=1e-9)
    (one,) = torch.autograd.grad((values**2).sum(), mine)
    (other,) = torch.autograd.grad((torch.stack(expected) ** 2).sum(), theirs)
    assert torch.allclose(one, other, atol=1e-6)  # rotary angles and norms are float32
    assert other.abs().max() > 1e-5


RULES: tuple[tuple[str, ...], ...] = (
    ("from other into clean", "patch mlp_out layer 0 at cue token"),
    ("scale resid_post layer 1 at last token by 0.5",),
    ("ablate z layer 0 head 1 at cue token with mean",),
    ("add 2 * unit(v) to resid_mid layer 1 at last token",),
    ("ablate mlp_out layer 1 at cue token with resample",),
    ("project out v from resid_post layer 0 at tokens *",),
)
DIRECTION = "direction v = mean_difference(p, second) at resid_post layer 1 at last token"


@pytest.mark.parametrize("lines", RULES)
@pytest.mark.parametrize("measure", ["raw", "delta"])
def test_objective_with_a_zero_tensor_equals_the_run(
    lines: tuple[str, ...], measure: str, tmp_path: Path
) -> None:
    text = file(*lines, measure=MEASURE.replace("raw", measure), more=DIRECTION)
    path = write(tmp_path, text)
    objective = opened(path, site="embed", at="subject tokens", mode="add")
    values = objective(torch.zeros(objective.shape[2]))
    given = {"m": (double("llama"), word_tokenizer())}
    result = mechdsl.run(path, given, store=False)["e"]
    (data,) = result.measures
    assert data.base is not None
    expected = data.patched[0] - (data.base[0] if measure == "delta" else 0)
    order = dict(zip(result.row_ids or (), expected.tolist(), strict=True))
    assert values.tolist() == pytest.approx([order[row] for row in objective.rows], abs=1e-8)


def test_objective_rules_act_after_the_written_tensor(tmp_path: Path) -> None:
    """A patch in a later layer, and a rule that scales the written vector."""
    lines = (
        "from other into clean",
        "patch mlp_out layer 1 at cue token",
        "scale resid_post layer 0 at last token by 0.5",
    )
    objective = opened(write(tmp_path, file(*lines)), site="resid_post layer 0", at="last token")
    mine = moved(objective.start)
    theirs = mine.detach().clone().requires_grad_()
    expected: list[Tensor] = []
    for index, row in enumerate(objective.rows):
        there, source = rows("clean")[row], rows("other")[row]
        (to,), (of,) = tokens(there, "cue token"), tokens(source, "cue token")
        vector = plain("llama", source)["mlp_out", 1][of, 0]
        patch = Write("mlp_out", 1, vector[None], to, None)
        own = (SITES[1].replace("1", "0"), "last token", 0.5 * theirs[index])
        expected.append(reference_value("llama", row, *own, [patch]))
    values = objective(mine)
    assert torch.allclose(values, torch.stack(expected), atol=1e-9)
    (one,) = torch.autograd.grad(values.sum(), mine)
    (other,) = torch.autograd.grad(torch.stack(expected).sum(), theirs)
    assert torch.allclose(one, other, atol=1e-6)


def test_objective_of_kl_compares_with_the_base_run(tmp_path: Path) -> None:
    """At the start, `kl` is 0; away from it, it has a gradient."""
    objective = opened(write(tmp_path, file(measure="measure kl(clean) as raw")), site="embed")
    assert torch.allclose(objective(objective.start), torch.zeros(4).double(), atol=1e-9)
    tensor = moved(objective.start)
    values = objective(tensor)
    for index, row in enumerate(objective.rows):
        base = plain("llama", rows("clean")[row]).logits[-1].log_softmax(-1)
        writes = [Write("embed", None, tensor.detach()[index], rows("clean")[row].last, None)]
        here = rows("clean")[row].ids
        (done,) = differentiable("llama", double("llama"), here, [(writes, ())])
        own = done.logits[-1].log_softmax(-1)
        expected = (base.exp() * (base - own)).sum()
        assert values[index].item() == pytest.approx(float(expected.detach()), abs=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), tensor)
    assert gradient.abs().max() > 1e-5


def test_objective_selects_rows_and_rejects_wrong_shapes(tmp_path: Path) -> None:
    objective = opened(write(tmp_path, file()), at="subject tokens")
    every = moved(objective.start)
    values = objective(every)
    assert torch.allclose(objective(every[[2, 0]], rows=[2, 0]), values[[2, 0]], atol=1e-9)
    one = every[0, 0].detach()
    assert torch.equal(objective(one), objective(one.expand(objective.shape)))
    for wrong in (every[:, :, :3], every[:2]):
        with pytest.raises(ValueError, match="doesn't broadcast"):
            objective(wrong)
    for chosen in ([0, 0], [4], [-1], []):
        with pytest.raises(ValueError, match="indices from 0 to 3"):
            objective(one, rows=chosen)
    with pytest.raises(ValueError, match="int64"):
        objective(torch.zeros(objective.shape[2], dtype=torch.int64))
    assert "[4 rows, 4 positions," in repr(objective)


def test_objective_restores_the_model(tmp_path: Path) -> None:
    model = families.module("gpt2").train()
    before = {name: each.requires_grad for name, each in model.named_parameters()}
    path = write(tmp_path, file())
    objective = mechdsl.objective(
        path, models={"m": (model, word_tokenizer())}, site="embed", at="last token"
    )
    objective(objective.start.clone().requires_grad_()).sum().backward()
    assert model.training
    assert {name: each.requires_grad for name, each in model.named_parameters()} == before
    assert all(each.grad is None for each in model.parameters())
    assert not any(vars(module)["_forward_hooks"] for module in model.modules())


ERRORS: tuple[tuple[str, dict[str, str], str, str], ...] = (
    (file(), {"site": "resid_pst layer 0"}, "E0203", "did you mean `resid_post`"),
    (file(), {"site": "resid_post layer 7"}, "E0302", "does not exist"),
    (file(), {"site": "resid_post layer *"}, "E0207", "names 3 vectors"),
    (file(), {"site": "resid_post layer l"}, "E0201", "no param called `l`"),
    (file(), {"site": "pattern layer 0"}, "E0608", "with respect to `pattern`"),
    (file(), {"site": "resid_post layer 0 in basis b"}, "E0207", "names coordinates"),
    (file(), {"at": "last token with zero"}, "E0207", "is more than"),
    (file(), {"at": "last token\n patch embed at last token"}, "E0207", "is more than a site"),
    (file(), {"at": "last token onto cue token"}, "E0207", "is more than a site"),
    (file(), {"at": "item * token"}, "E0207", "positions"),
    (file(), {"at": "item 4 token"}, "E0309", "2 of 4 rows"),
    (file(), {"at": "nothing token"}, "E0308", "no span called `nothing`"),
    (file(), {"at": "answer tokens"}, "E0540", "an objective writes only tokens of the prompt"),
    (file(), {"measure": "logit"}, "E0208", "no measure `logit`"),
    (file(), {"experiment": "f"}, "E0208", "no experiment `f`"),
    (file(), {"mode": "write"}, "E0208", "there is no such mode"),
    (file(measure=MEASURE + "\n  measure prob(answer) as raw"), {}, "E0208", "has 2 measures"),
    (file(measure="measure correct as raw"), {}, "E0608", "step function"),
    (file("generate 2", measure="measure exact_match as raw"), {}, "E0608", "generated text"),
    (file("from other into clean", measure=MEASURE.replace("raw", "total")), {}, "E0608", "total"),
    (file("ablate mlp_out layer * at last token with zero"), {}, "E0608", "3 cells"),
    (file("ablate resid_post layer 1 at last token with zero"), {}, "E0608", "replaces"),
    (file("block attention layer 0 heads * from last token to cue token"), {}, "E0608", "`block`"),
)


@pytest.mark.parametrize(("text", "named", "code", "words"), ERRORS)
def test_invalid_objective_is_rejected_before_it_runs(
    text: str, named: dict[str, str], code: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(mechdsl.MechdslError) as error:
        opened(write(tmp_path, text), **named)
    assert [each.code for each in error.value.diagnostics] == [code]
    assert words in str(error.value)


def test_models_in_place_of_the_measure_are_reported(tmp_path: Path) -> None:
    models: Any = {"m": "model"}
    with pytest.raises(mechdsl.MechdslError) as error:
        mechdsl.objective(write(tmp_path, file()), models, site="embed", at="last token")
    assert "`measure` is of the type dict, not a text" in str(error.value)
    assert "name the models: `models={…}`" in str(error.value)
