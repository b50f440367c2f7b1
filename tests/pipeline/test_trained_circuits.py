"""Circuits that a file declares with `fit(mask(…))`.

Loss and gradient are compared with a float64 pass that recomputes the input of every receiver, one
unpadded prompt at a time, and a training with a loop that shares no code. Further tests: planted
edges, use in rules, keys, and errors.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.fits.reports import MaskReport
from mechdsl.resolve.circuits import CircuitDraws, EdgeGraph, list_edges
from mechdsl.resolve.types import CircuitEdge, TrainedMask

from ..execute.support import unchanged, word_tokenizer
from ..quick import in_turn, some
from ..rules.circuits import circuit_pass
from ..rules.models import WITHOUT_NORMS, bare, double
from ..rules.support import rows, tokens
from ..rules.test_ablated_circuits import INEXACT, Case, fills, named, shape_of
from . import test_trained_masks as masks
from .test_trained_dictionaries import check_keys, experiment, run, train, write
from .test_trained_masks import (
    QUICK,
    chosen_sites,
    probabilities,
    shift_by_hand,
    trained_by_hand,
    training_rows,
    write_planted,
)
from .test_trained_rotations import LOSS, MEASURE, NOISY, OTHER, loss_by_hand, training_errors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("llama", "gpt2", "gpt_neox", "gemma2", "llama" + WITHOUT_NORMS)
PAIR = "{cue token, last token}"
KL = "measure kl(clean) as raw"


fit = partial(masks.fit, word="circuit", at=PAIR, name="c")

PATCH = ("from turned into clean", "ablate c at last token with turned")
PATCHES = experiment(*PATCH)

differentiable = inspect.unwrap(circuit_pass)
"""The reference pass, differentiable in the edge weights."""


# --- the loss -------------------------------------------------------------------------------------


def value_by_hand(
    family: str, row: int, every: Sequence[CircuitEdge], gates: Tensor, source: str, at: str
) -> Tensor:
    """The measure of one unpadded prompt with a weight for each edge."""
    word = source.split()[1]
    (given,) = fills(family, Case("c", word, at), {})[row : row + 1]
    shares = {named(edge): gates[number] for number, edge in enumerate(every)}
    here = rows("clean")[row]
    logits = differentiable(family, double(family), here.ids, given, shares, tokens(here, at))
    return loss_by_hand(logits[-1], row)


SOURCES = ("from: other", "with: zero", "with: mean")


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES))
@pytest.mark.parametrize(("at", "side"), [("last token", "left"), (PAIR, "right")])
def test_circuit_mask_loss_and_gradient_equal_autograd(
    at: str, side: Any, family: str, source: str, tmp_path: Path
) -> None:
    """For every row, in ragged batches of two rows with different gates."""
    options = QUICK.replace("25%", "0%")
    path = write(tmp_path, fit(options, source=source, at=at), PATCHES)
    model, least = (bare(family), 1e-4) if family in INEXACT else (double(family), 1e-5)
    mask, found = training_rows(path, model, side)
    every = edges_of(mask)
    random = torch.Generator().manual_seed(5)
    ids = found.objective.table.row_ids
    for batch in ([0, 2], [1, 3]):
        mine = torch.rand(2, len(every), generator=random).double()
        mine.requires_grad_()
        theirs = mine.detach().clone().requires_grad_()
        values = found.values(np.array(batch), mine)
        expected = torch.stack(
            [value_by_hand(family, ids[row], every, theirs[n], source, at)
             for n, row in enumerate(batch)]
        )  # fmt: skip
        assert torch.allclose(values.double(), expected, atol=least)  # gates are float32
        assert (expected - found.values(np.array(batch), None)).abs().max() > 1e-4
        (own,) = torch.autograd.grad(values.sum(), mine)
        (other,) = torch.autograd.grad(expected.sum(), theirs)
        assert torch.allclose(own, other, atol=least, rtol=least)
        assert other.abs().max() > 1e-4


def edges_of(mask: TrainedMask) -> list[CircuitEdge]:
    edges = [each for each in mask.candidates if isinstance(each, tuple)]
    assert len(edges) == len(mask.candidates) > 100
    return edges


def test_circuit_mask_without_positions_writes_all_tokens(tmp_path: Path) -> None:
    """A mask without `at` writes all tokens of the prompt."""
    source = "with: zero"
    options = QUICK.replace("25%", "0%")
    path = write(tmp_path, fit(options, source=source, at=""), PATCHES)
    mask, found = training_rows(path, double("gpt2"))
    every, ids = edges_of(mask), found.objective.table.row_ids
    gates = torch.rand(4, len(every), generator=torch.Generator().manual_seed(2))
    values = found.values(np.arange(4), gates)
    expected = [
        value_by_hand("gpt2", ids[row], every, gates[row].double(), source, "tokens *")
        for row in range(4)
    ]
    assert torch.allclose(values, torch.stack(expected), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "keep"), in_turn(["hard_concrete", "straight_through"], [False, True])
)
def test_circuit_mask_training_equals_a_reference_loop(
    kind: str, keep: bool, tmp_path: Path
) -> None:
    """The reference loop shares only its seeds with the package; the number of open gates falls
    from 90 % of the edges to the size over the first 70 % of the steps."""
    mask = f'size: 3, kind: "{kind}"' + (", keep: true" if keep else "")
    path = write(tmp_path, fit(f"{QUICK}, seed: 3", mask=mask), PATCHES)
    (found,) = train(path)
    declared, known = training_rows(path, double("llama"))
    table, every = known.objective.table, edges_of(declared)
    order = sorted(range(4), key=lambda n: stable_hash(3, "training row", table.row_keys[n]))
    ids = [table.row_ids[row] for row in order]
    place = {table.row_ids[row]: row for row in order}

    def value(row: int, gates: Tensor) -> Tensor:
        written = 1 - gates if keep else gates
        return value_by_hand("llama", row, every, written, "from: other", PAIR)

    def size_at(step: int) -> float:
        return 3 * (0.9 * len(every) / 3) ** max(0.0, 1 - step / 6 / 0.7)

    scores = trained_by_hand(kind, len(every), ids[1:], place, value, size_at)
    likely = expit(scores + shift_by_hand(scores, 3))
    stored = json.loads((found.folder / "mask.json").read_text("utf-8"))
    assert np.allclose(stored["probabilities"], likely, atol=2e-3)
    assert np.ptp(likely) > 0.01
    chosen = sorted(np.argsort(-likely, kind="stable")[:3].tolist())
    assert stored["chosen"] == chosen
    report = found.report
    assert isinstance(report, MaskReport)
    hard = torch.zeros(len(every), dtype=torch.float64)
    hard[chosen] = 1
    drawn = CircuitDraws(EdgeGraph(shape_of("llama")), [every[n] for n in chosen], 3).draws(8)
    randoms = [
        value(ids[0], torch.tensor([float(edge in own) for edge in every])).item() for own in drawn
    ]
    assert report.trained == pytest.approx(value(ids[0], hard).item(), abs=2e-3)
    assert report.random == pytest.approx(np.mean(randoms), abs=2e-3)
    none = torch.zeros(len(every), dtype=torch.float64)
    plain, whole = (none, 1 - none) if not keep else (1 - none, none)
    assert report.unpatched == pytest.approx(value(ids[0], plain).item(), abs=2e-3)
    assert report.whole == pytest.approx(value(ids[0], whole).item(), abs=2e-3)
    assert (report.rows, report.held_out_rows, report.steps) == (3, 1, 6)
    assert (report.noun, report.keeps, report.candidates) == ("edge", keep, len(every))


# --- planted edges --------------------------------------------------------------------------------

EDGES_THERE = {
    "embed -> L0H0.v",
    "L0H1 -> L1H1.v",
    "L0H1 -> L2H0.v",
    "L1H2 -> logits",
    "L2H0 -> logits",
}


@cache
def planted() -> Any:
    """A model without norms that answers with two paths: head 0.1 reads the embedding, heads 1.2
    and 2.0 read head 0.1, and the output reads these two. Attention is uniform, and two heads
    share a value."""
    model: Any = copy.deepcopy(bare("llama" + WITHOUT_NORMS))
    random = torch.Generator().manual_seed(3)
    width = model.config.hidden_size
    heads = model.config.num_attention_heads
    size = model.config.head_dim
    keys = model.config.num_key_value_heads
    parts = {"in": slice(0, width // 2), "middle": slice(width // 2, 3 * width // 4)}
    parts["out"] = slice(3 * width // 4, width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) / shape[-1] ** 0.5

    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table.zero_()
        table[:, parts["in"]] = torch.randn(len(table), width // 2, generator=random)
        for layer in model.model.layers:
            for weights in (layer.self_attn, layer.mlp):
                for own in weights.parameters():
                    own.zero_()
        for layer, head, of, to in (
            (0, 1, "in", "middle"),
            (1, 2, "middle", "out"),
            (2, 0, "middle", "out"),
        ):
            own = model.model.layers[layer].self_attn
            first = head * keys // heads * size
            reads = own.v_proj.weight[first : first + size]
            reads[:, parts[of]] = 2 * draw(size, reads[:, parts[of]].shape[1])
            writes = own.o_proj.weight[:, head * size : (head + 1) * size]
            writes[parts[to]] = 2 * draw(writes[parts[to]].shape[0], size)
        unembedding = model.lm_head.weight
        unembedding.zero_()
        unembedding[:, parts["out"]] = 2 * torch.randn(
            len(unembedding), width - 3 * width // 4, generator=random
        )
    return unchanged(model.eval())


PLANTED = {
    "hard concrete": ("size: 5, keep: true", "from: swapped"),
    "straight-through": ('size: 5, keep: true, kind: "straight_through"', "with: zero"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("seed", range(3))
def test_circuit_mask_finds_planted_edges(name: str, seed: int, tmp_path: Path) -> None:
    mask, source = PLANTED[name]
    call = (
        f"circuit c = fit(mask({mask}), prompts: planted.train, {source}, minimise: kl(clean), "
        f"steps: 150, batch: 8, seed: {seed})\n"
    )
    rule = experiment(
        "ablate all but c at tokens * with zero",
        block="planted.test",
        measure="measure kl(clean) as raw",
    )
    path = write_planted(tmp_path, call, rule)
    given = {"m": (planted(), word_tokenizer())}
    (found,) = mechdsl.fit(path, given, store=tmp_path / "store")
    assert {*chosen_sites(found)} == EDGES_THERE
    report = found.report
    assert isinstance(report, MaskReport)
    assert report.trained == pytest.approx(0, abs=1e-4)  # nothing else reaches the output
    assert report.random > 0.1
    (done,) = mechdsl.run(path, given, store=tmp_path / "store").files[0].experiments
    assert np.allclose(done.measures[0].patched, 0, atol=1e-4)
    assert (
        "random circuits, 8 draws, seed 0; of 5 edges, each on a path"
        in (done.conventions["controls"])
    )


# --- use in rules ---------------------------------------------------------------------------------

RULES = {
    "run": list(PATCH),
    "all but": ["from turned into clean", "ablate all but c at last token with turned"],
    "zero": ["ablate c at tokens * with zero"],
    "fills": ["ablate c at last token with zero, mean, resample"],
    "random": [*PATCH, "against random(3)"],
    "none": [*PATCH, "against none"],
    "with a rule": [*PATCH, "patch mlp_out layer 0 at first token"],
}


@pytest.mark.parametrize("name", some(RULES, ("all but", "fills", "none")))
def test_trained_circuit_equals_its_listed_edges_in_rules(name: str, tmp_path: Path) -> None:
    """Bit for bit, with a second experiment on the same block."""
    text = experiment(*RULES[name], measure=MEASURE) + OTHER
    path = write(tmp_path, fit(), text)
    (trained,) = train(path, out=tmp_path)
    card = (tmp_path / "c" / "README.md").read_text("utf-8")
    assert card.startswith("# c: mask of 3 of ")
    assert f"The chosen edges are set to those of the run `other`, to maximise {LOSS}" in card
    assert "`edges at " in card
    own = run(path, fresh=True).files[0].experiments
    written = ", ".join(chosen_sites(trained))
    path = write(tmp_path, f"circuit c = {written}\n", text)
    if name not in ("random", "none"):  # the automatic control of a trained circuit
        text = text.replace(MEASURE, f"{MEASURE}\n  against random(8)", 1)
    path = write(tmp_path, f"circuit c = {written}\n", text.replace("  against none\n", ""))
    listed = run(path, store=False).files[0].experiments
    assert len(own) == len(listed) == 2
    for one, two in zip(own, listed, strict=True):
        assert [cell.coords for cell in one.cells] == [cell.coords for cell in two.cells]
        for mine, theirs in zip(one.measures, two.measures, strict=True):
            np.testing.assert_array_equal(mine.patched, theirs.patched)
    mine, theirs = own[0].control(0), listed[0].control(0)
    if mine is None or theirs is None:
        assert (mine, theirs) == (None, None)
        assert name == "none"
    else:
        np.testing.assert_array_equal(mine.low, theirs.low)
        np.testing.assert_array_equal(mine.high, theirs.high)
    said = own[0].conventions["circuit c"]
    assert said.startswith(f"{written}; mask of 3 of ")
    assert f"trained on 4 rows of p at {PAIR}, 1 of them held out, to maximise" in said
    assert "circuit c" not in own[1].conventions


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "size": {"mask": "size: 2"},
    "kind": {"mask": 'size: 3, kind: "straight_through"'},
    "keep": {"mask": "size: 3, keep: true"},
    "steps": {"options": QUICK.replace("6", "7")},
    "seed": {"options": f"{QUICK}, seed: 1"},
    "position": {"at": "cue token"},
    "source": {"source": "from: turned"},
    "zero": {"source": "with: zero"},
    "mean": {"source": "with: mean"},
    "sign": {"objective": f"minimise: {LOSS}"},
}


def test_circuit_mask_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    """A different argument needs another training and gives other probabilities."""
    base, _ = check_keys(tmp_path, trains_all, fit, CHANGES, PATCHES, probabilities)
    renamed = PATCHES.replace("ablate c", "ablate h")
    (found,) = train(write(tmp_path, fit(name="h"), renamed))
    assert (found.folder, found.seconds) == (base.folder, 0.0)


# --- mistakes -------------------------------------------------------------------------------------

CALL = f"fit(mask(size: 3), prompts: p, from: other, maximise: {LOSS})"
MISTAKES: dict[str, tuple[str, str, str]] = {
    "no source": ("from: other, ", "", "E0207"),
    "unknown fill": ("from: other", "with: resample", "E0207"),
    "unknown run": ("from: other", "from: othr", "E0201"),
    "no size": ("mask(size: 3)", "mask", "E0207"),
    "all": ("size: 3", f"size: {len(list_edges(shape_of('llama')))}", "E0342"),
    "more than all": ("mask(size: 3)", "eap(size: 2000)", "E0342"),
    "step function": (f"maximise: {LOSS}", "maximise: rank(answer)", "E0608"),
    "noise": ("from: other", "from: noised", "E0342"),
    "early stopping": (f"maximise: {LOSS}", f"maximise: {LOSS}, patience: 3", "E0342"),
    "common token": (f"at {PAIR}", "at last token, tokens *", "E0342"),
    "each token": (f"at {PAIR}", "at token 1..2", "E0304"),
    "all of uneven prompts": (f"at {PAIR}", "", "E0307"),
    "rotation": ("mask(size: 3)", "das(dims: 2)", "E0342"),
    "no training": (CALL, "pca(p, dims: 2)", "E0342"),
    "sites": (f"circuit c = {CALL} at {PAIR}", f"group c = {CALL}", "E0342"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_circuit_mask_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code = MISTAKES[name]
    line = f"circuit c = {CALL} at {PAIR}\n"
    assert old in line
    line = line.replace(old, new)
    if name == "all of uneven prompts":
        line = line.replace("from: other", "from: longer")
    path = write(tmp_path, line, PATCHES, OTHER, blocks=NOISY)
    errors = training_errors(path)
    assert errors[0].code == code, errors
    assert len(errors) == 1 or name == "sites"  # groups can't be ablated with a run
    span = errors[0].span
    assert span is not None
    assert span.source.path == path


def test_circuit_of_a_model_whose_components_do_not_sum_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, fit(), PATCHES)
    with pytest.raises(mechdsl.MechdslError, match="a circuit in `m`"):
        train(path, "gpt_neox_japanese")


# --- the edges with the largest scores ------------------------------------------------------------

SIZES = (0, 1, 2, 3)
CURVE = f"""
experiment curve {{
  model m
  prompts second
  for n in [{", ".join(map(str, SIZES))}] {{
    ablate all but top n of c at tokens * with zero
  }}
  measure kl(clean) as faithfulness
  against random(3)
  stats bootstrap(100) confidence 50% correct none
  expect auc(faithfulness, n) < 5
  expect cmd(faithfulness, n) < 5
}}
experiment ranks {{
  model m
  observe edge_auroc c with d as ranked
}}
"""


def test_top_selects_the_highest_scored_edges_of_a_circuit(tmp_path: Path) -> None:
    known = "circuit d = embed -> L0H1.q, L1H1 -> logits, L2.mlp -> logits\n"
    path = write(tmp_path, known + fit(), PATCHES + CURVE)
    (trained,) = train(path)
    stored = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    scores = dict(zip(stored["labels"], stored["probabilities"], strict=True))
    order = sorted(chosen_sites(trained), key=lambda edge: -scores[edge])
    listed = "".join(f"circuit c{n} = {', '.join(order[:n])}\n" for n in SIZES[1:])
    each = [
        experiment(f"ablate all but c{n} at tokens * with zero", name=f"of{n}", measure=KL)
        for n in SIZES[1:]
    ]
    found = {own.name: own for own in run(path).files[0].experiments}
    alone = run(write(tmp_path, listed, "".join(each)), store=False).files[0].experiments
    curve = found["curve"]
    own = curve.measures[0]
    assert own.source is not None
    assert [cell.coords["n"] for cell in curve.cells] == list(SIZES)
    np.testing.assert_allclose(own.patched[0], own.source[0])  # of no edge
    for n, other in zip(SIZES[1:], alone, strict=True):
        np.testing.assert_allclose(own.patched[n], other.measures[0].patched[0], atol=1e-5)
    shares = (own.patched.mean(1) - own.source.mean()) / (own.base.mean() - own.source.mean())
    area, distance = (each.value for each in curve.outcomes)
    assert area == pytest.approx(np.trapezoid(shares, SIZES) / 3, abs=1e-6)
    assert distance == pytest.approx(np.trapezoid(np.abs(1 - shares), SIZES) / 3, abs=1e-6)
    assert "random circuits, 3 draws, seed 0; of 0 to 3 edges" in curve.conventions["controls"]
    assert "each draw with 0 edges is the only such circuit" in curve.conventions["controls"]
    band = curve.control(0)
    assert band is not None
    assert band.draws.tolist() == [3] * len(SIZES)
    assert (band.low[0], band.high[0]) == (0, 0)
    true = known.removeprefix("circuit d = ").strip().split(", ")
    pairs = [
        (scores[edge] > scores[other]) + (scores[edge] == scores[other]) / 2
        for edge in true
        for other in scores.keys() - set(true)
    ]
    assert found["ranks"].measures[0].patched[0, 0] == pytest.approx(np.mean(pairs))


def test_top_of_more_edges_than_chosen_is_rejected(tmp_path: Path) -> None:
    rule = "ablate all but top 4 of c at tokens * with zero"
    path = write(tmp_path, fit(), PATCHES + experiment(rule, name="more"))
    train(path)
    with pytest.raises(mechdsl.MechdslError, match=r"`c` has 3 edges, fewer than 4"):
        run(path)
