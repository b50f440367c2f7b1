"""Circuits that a file declares with `fit(eap(…))`, `fit(eap_ig(…))` and
`fit(eap_ig_activations(…))`.

Scores are compared with gradients by each receiver's input in a float64 pass that recomputes all
inputs, one unpadded prompt at a time, and with exact ablations of a linear model. Further tests:
planted edges, the selection of edges, use of the circuit in rules, keys, and errors.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mechdsl
from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute import mask_training, objective_rows
from mechdsl.execute.mask_training import (
    CircuitMeter,
    EdgeRows,
    EffectScoring,
    NodeRows,
    SizeSearch,
    find_circuit,
    open_edges,
)
from mechdsl.execute.training import TrainingJob, VectorCache
from mechdsl.fits.reports import CircuitReport
from mechdsl.forward.hooks import backward_rules, circuits
from mechdsl.pipeline.trained_files import fits_of_file
from mechdsl.planner.training_cost import training_cost
from mechdsl.program.trainers import EdgeScoreTrainer
from mechdsl.resolve.circuits import EMBEDDING, END, CircuitDraws, EdgeGraph, list_edges
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.types import CircuitEdge, TrainedMask

from ..execute.support import ROWS, shared, token, word_tokenizer
from ..quick import in_turn, some
from ..reference.forward import Stack, forward, stack
from ..reference.ruled import ruled
from ..rules.circuits import EMBED, Features, circuit_pass, mlp, neuron_weights, outputs
from ..rules.models import WITHOUT_NORMS, bare, double
from ..rules.support import plain, rows, tokens
from ..rules.test_ablated_circuits import (
    INEXACT,
    Case,
    fills,
    list_edges_of,
    list_members,
    named,
    shape_of,
)
from .test_trained_circuits import EDGES_THERE, PAIR, PATCH, PATCHES, differentiable, planted
from .test_trained_dictionaries import BLOCKS, check_keys, experiment, models, run, train, write
from .test_trained_masks import write_planted
from .test_trained_rotations import (
    LOSS,
    MEASURE,
    NOISY,
    OTHER,
    checked,
    loss_by_hand,
    training_errors,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = (
    "gpt2",
    "llama",
    "gpt_neox",
    "qwen3",
    "gpt_neox_sequential",
    "gemma2",
    "llama" + WITHOUT_NORMS,
)
LINEAR = ("gpt2", "llama", "gpt_neox")
HALF = "validation: 25%, batch: 2"


def fit(
    options: str = HALF,
    *,
    call: str = "eap(size: 12)",
    source: str = "from: other",
    objective: str = f"maximise: {LOSS}",
    at: str = "",
    name: str = "c",
) -> str:
    given = f"fit({call}, prompts: p, {source}, {objective}, {options})"
    return f"circuit {name} = {given}" + (f" at {at}\n" if at else "\n")


def open_rows(path: Path, model: Any, side: Any = None) -> tuple[TrainedMask, EdgeRows]:
    (declared,) = fits_of_file(checked(path, model)).values()
    assert declared.objective is not None
    assert isinstance(declared.file, TrainedMask)
    return declared.file, open_edges(
        declared.file, declared.objective, shared(model), side, VectorCache()
    )


def score(mask: TrainedMask, found: EdgeRows, passes: list[int] | None = None) -> Floats:
    """Return [edge] scores; append the number of finished rows after each pass to `passes`."""
    trainer = mask.training.trainer_of(EdgeScoreTrainer)
    steps = trainer.steps(mask.training.of_trainer)
    return finish(EffectScoring(found, lambda part: found.score(part, trainer, steps)), passes)


def finish(scoring: EffectScoring, passes: list[int] | None) -> Floats:
    """Return [candidate] scores; append the number of finished rows after each pass to `passes`."""
    for _ in scoring.run():
        if passes is not None:
            passes.append(scoring.progress[0])
    return scoring.scores


# --- scores ---------------------------------------------------------------------------------------


def module_of(
    sender: str,
    features: Mapping[int, Features] | None = None,
    attention: Mapping[int, Features] | None = None,
) -> str:
    """The module of a sender: all heads, neurons or features of its layer, or the sender itself."""
    for layer, own in (attention or {}).items():
        if sender in own.names:
            return f"L{layer}.attn"
    for layer, own in (features or {}).items():
        if sender in own.names:
            return mlp(layer)
    if "N" in sender:
        return f"{sender.split('N')[0]}.mlp"
    return sender.split("H")[0] if "H" in sender else sender


def before_norm(
    parts: Stack,
    record: Mapping[str, Tensor],
    sender: str,
    gradient: Tensor,
    attention: Mapping[int, Features],
) -> Tensor:
    """The gradient by a sender's output, of that by what it adds to the input of a receiver: they
    differ if a norm follows the sum of the heads, unless the receiver is a node of this sum, or
    that of the neurons.

    Args:
        record: The outputs of senders.
        attention: As in `circuit_pass`.
    """
    if "N" in sender and type(parts).behind_mlp is not Stack.behind_mlp:
        layer = int(sender.split("N")[0].removeprefix("L"))
        own = [value for name, value in record.items() if name.startswith(f"L{layer}N")]
        _, bias = neuron_weights(parts, layer, len(own))
        joined = (torch.stack(own).sum(0).detach() + bias).requires_grad_()
        normed = parts.behind_mlp(parts.block(layer), joined)
        (found,) = torch.autograd.grad(normed, joined, gradient)
        return found
    if "H" not in sender or type(parts).behind_attention is Stack.behind_attention:
        return gradient
    layer = int(sender.split("H")[0].removeprefix("L"))
    if layer in attention:
        return gradient
    block = parts.block(layer)
    _, bias = parts.output(block)
    joined = torch.stack([record[f"L{layer}H{n}"] for n in range(parts.heads)]).sum(0).detach()
    joined = (joined + (0 if bias is None else bias)).requires_grad_()
    (found,) = torch.autograd.grad(parts.behind_attention(block, joined), joined, gradient)
    return found


def reference_products(
    family: str,
    row: int,
    every: Sequence[CircuitEdge],
    source: str,
    at: str,
    call: str,
    **nodes: Any,
) -> Tensor:
    """[edge, T] scores of one unpadded prompt, at each token.

    Along the path, modules move at all tokens with another value.

    Args:
        nodes: `split` and `features` of `circuit_pass`. The score of an edge of several neurons is
            the sum of theirs.
    """
    word, kind = source.split()[1], call.split("(")[0]
    rules = kind if kind in ("relp", "gim") else ""
    model = ruled(double(family), rules) if rules else double(family)
    given = fills(family, Case("c", word, at), {}, **nodes)[row]
    here = rows("clean")[row]
    there = tokens(here, at)
    ids = list(here.ids)
    clean = outputs(plain(family, here), stack(family, model), **nodes)
    everywhere, whole = there, given
    if word in ("zero", "other"):  # runs with other values at all tokens
        everywhere = [*range(len(ids))]
        whole = fills(family, Case("c", word, "tokens *"), {}, **nodes)[row]
    changes: dict[str, Tensor] = {}
    moved_changes: dict[str, Tensor] = {}
    for sender, own in clean.items():
        changes[sender] = torch.zeros_like(own)
        changes[sender][there] = given[sender][there] - own[there]
        moved_changes[sender] = torch.zeros_like(own)
        moved_changes[sender][everywhere] = whole[sender][everywhere] - own[everywhere]
    names = [[list_members(end, every) for end in edge] for edge in every]
    split = nodes.get("features"), nodes.get("attention") or {}
    module = {sender: module_of(sender, *split) for sender in clean}

    parts = stack(family, model)

    def gradients(moved: Mapping[str, Tensor]) -> Callable[[str, Sequence[str]], Tensor]:
        """Of a sender and receivers: the gradient by what the sender adds to their input."""
        record: dict[str, Tensor] = {}
        leaves = {
            to: torch.zeros_like(clean[EMBED]).requires_grad_()
            for to in dict.fromkeys(to for _, own in names for to in own)
        }
        logits = differentiable(
            family,
            model,
            ids,
            given,
            {},
            there,
            moved=moved,
            added=leaves,
            record=record,
            rules=rules,
            **nodes,
        )
        found = torch.autograd.grad(loss_by_hand(logits[-1], row), list(leaves.values()))
        by_receiver = dict(zip(leaves, found, strict=True))

        def by_sender(sender: str, receivers: Sequence[str]) -> Tensor:
            gradient = torch.stack([by_receiver[each] for each in receivers]).sum(0)
            return before_norm(parts, record, sender, gradient, split[1])

        return by_sender

    def moves(step: int, steps: int, modules: set[str]) -> dict[str, Tensor]:
        return {
            sender: (1 - step / steps) * own
            for sender, own in moved_changes.items()
            if module[sender] in modules
        }

    steps = int(call.split("steps: ")[1].rstrip(")")) if "steps" in call else 1
    found = torch.zeros(len(every), len(ids), dtype=torch.float64)
    modules = list(dict.fromkeys(module.values()))
    for step in range(1, steps + 1):
        of = {module: gradients(moves(step, steps, {module})) for module in modules}
        if not call.startswith("eap_ig_activations"):
            of = dict.fromkeys(modules, of[EMBED])
        for number, (senders, receivers) in enumerate(names):
            gradient = of[module[senders[0]]](senders[0], receivers)
            products = gradient * torch.stack([changes[each] for each in senders]).sum(0)
            found[number] += products.sum(-1).double() / steps
    return found


RULED = ("relp(size: 12)", "gim(size: 12)")
CALLS = ("eap(size: 12)", "eap_ig(size: 12, steps: 3)", "eap_ig_activations(size: 12, steps: 2)")
WHERE = (("", "left"), (PAIR, "right"))
SOURCES = ("from: other", "with: zero", "with: mean")


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES))
@pytest.mark.parametrize(("call", "where"), in_turn(CALLS, WHERE))
def test_edge_scores_equal_input_differences_times_gradients(
    call: str, where: tuple[str, Any], family: str, source: str, tmp_path: Path
) -> None:
    """In ragged batches of two rows."""
    compare_scores(call, where, family, source, tmp_path)


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES))
@pytest.mark.parametrize(("call", "where"), in_turn(RULED, WHERE))
def test_edge_scores_with_changed_derivatives_equal_those_of_changed_modules(
    call: str, where: tuple[str, Any], family: str, source: str, tmp_path: Path
) -> None:
    compare_scores(call, where, family, source, tmp_path)


def compare_scores(
    call: str,
    where: tuple[str, Any],
    family: str,
    source: str,
    tmp_path: Path,
    *,
    group: str = "",
    **nodes: Any,
) -> dict[CircuitEdge, float]:
    """Compare the scores of all edges with those of the reference, and return these.

    Args:
        group: Lines of the file with a group `g` of neurons or features that are nodes.
        nodes: `split`, `features` and `attention` of the reference, their layers.
    """
    at, side = where
    at = PAIR if source == "with: mean" else at  # rows have different numbers of tokens
    options = "validation: 0%, batch: 2" + (", nodes: g" if group else "")
    path = write(tmp_path, group, fit(options, call=call, source=source, at=at), PATCHES)
    inexact = family.split(" ")[0] in INEXACT
    model = bare(family) if inexact else double(family)
    mask, found = open_rows(path, model, side)
    every, ids = found.edges, found.objective.table.row_ids
    expected = torch.stack(
        [
            reference_products(family, row, every, source, at or "tokens *", call, **nodes).sum(-1)
            for row in ids
        ]
    ).mean(0)
    assert len(every) > 100
    assert expected.abs().max() > 1e-2
    least = 1e-4 if inexact else 1e-6
    np.testing.assert_allclose(score(mask, found), expected, atol=least, rtol=1e-4)
    return dict(zip(every, expected.tolist(), strict=True))


@pytest.mark.parametrize(("family", "call"), in_turn(LINEAR, CALLS[1:]))
def test_scores_at_one_token_use_gradients_of_a_path_at_all_tokens(
    family: str, call: str, tmp_path: Path
) -> None:
    """The embedding of the last token is the same in both runs."""
    compare_scores(call, ("last token", "left"), family, "from: other", tmp_path)
    if call == CALLS[1]:
        plain_, along = (
            score(
                *open_rows(
                    write(tmp_path, fit(call=own, at="last token"), PATCHES), double("llama")
                )
            )
            for own in CALLS[:2]
        )
        assert np.abs(plain_ - along).max() > 1e-3


@pytest.mark.parametrize("call", CALLS[1:])
def test_path_from_a_run_of_other_lengths_moves_the_scored_tokens(
    call: str, tmp_path: Path
) -> None:
    compare_scores(call, (PAIR, "left"), "llama", "from: longer", tmp_path)


@pytest.mark.parametrize(
    ("call", "source", "at", "text"),
    [
        (CALLS[0], "from: other", PAIR, ""),
        (CALLS[1], "from: other", "", ""),
        (CALLS[1], "from: other", PAIR, "along the path, the embedding moved at all tokens"),
        (CALLS[2], "with: zero", PAIR, "along the path, each sender moved at all tokens"),
        (CALLS[1], "with: mean", PAIR, "the embedding moved at the tokens of `at` only"),
        (CALLS[1], "from: longer", PAIR, "the embedding moved at the tokens of `at` only"),
    ],
)
def test_report_of_edge_scores_names_the_tokens_of_the_path(
    call: str, source: str, at: str, text: str, tmp_path: Path
) -> None:
    line = fit("validation: 0%, batch: 2", call=call, source=source, at=at)
    mask, found = open_rows(write(tmp_path, line, PATCHES), double("llama"))
    described = found.describe_path(mask.training.trainer_of(EdgeScoreTrainer))
    assert described.endswith(text)
    assert bool(described) == bool(text)


@pytest.mark.parametrize("source", ["with: zero", "with: mean", "from: other"])
def test_edge_scores_in_small_chunks_are_the_same(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows pass one by one, and inputs are read again; all tokens are written."""
    at = PAIR if source == "with: mean" else ""
    line = fit("validation: 25%", call=CALLS[1], source=source, at=at)
    path = write(tmp_path, line, PATCHES)
    expected = score(*open_rows(path, double("llama")))
    passes: list[int] = []
    monkeypatch.setattr(objective_rows, "CHUNK_BYTES", 1)
    monkeypatch.setattr(mask_training, "count_scored_rows", lambda *_, **__: 1)
    scores = score(*open_rows(path, double("llama")), passes)
    assert passes == [1, 2, 3]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-2


@pytest.mark.slow  # the preceding test reads fewer rows, too
def test_edge_scoring_halves_its_rows_when_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, fit("validation: 0%", call=CALLS[1]), PATCHES)
    check_halved_rows(EdgeRows, lambda: score(*open_rows(path, double("llama"))), monkeypatch)


def check_halved_rows(
    kind: type[EdgeRows | NodeRows], compute: Callable[[], Floats], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that scores of four rows are equal if memory suffices for one row at a time."""
    expected = compute()
    real, tried = kind.score, list[int]()

    def score_few(self: Any, rows: Ints, *given: Any) -> Floats:
        tried.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError
        return real(self, rows, *given)

    monkeypatch.setattr(kind, "score", score_few)
    scores = compute()
    assert tried == [4, 2, 1, 1, 1, 1]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_edge_scoring_resumes_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, fit("validation: 0%, batch: 1"), PATCHES)
    check_resumed_scoring(EdgeRows, path, monkeypatch)


def check_resumed_scoring(
    kind: type[EdgeRows | NodeRows], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the choice from the scores of four rows, one per pass, is equal after an
    interruption, and that no row is scored twice."""
    (whole,) = train(path)
    content = (whole.folder / "mask.json").read_bytes()
    score_rows, steps = kind.score, EffectScoring.progress.fget
    scored: list[int] = []

    def recorded(self: Any, rows: Ints, *given: Any) -> Floats:
        scored.extend(rows.tolist())
        return score_rows(self, rows, *given)

    def interrupted(self: EffectScoring) -> tuple[int, int]:
        if len(scored) == 2:
            raise KeyboardInterrupt
        assert steps is not None
        return steps(self)

    monkeypatch.setattr(kind, "score", recorded)
    monkeypatch.setattr(EffectScoring, "progress", property(interrupted))
    with pytest.raises(KeyboardInterrupt):
        train(path, fresh=True)
    (again,) = train(path, fresh=True)
    assert scored == [0, 1, 2, 3]
    assert (again.folder / "mask.json").read_bytes() == content
    assert again.report == whole.report


def check_planned_cost(path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Check that a training takes between half and twice the planned multiply-adds; return the
    number of planned backward passes."""
    mask, found = open_rows(path, double(family))
    price = training_cost("c", mask, found.objective, found.model.shape)
    monkeypatch.setattr(TrainingJob, "write_card", lambda *_: None)
    job = TrainingJob(path.parent, {}, path.parent, lambda: False, lambda *_: None)
    with FlopCounterMode(display=False) as flops:
        find_circuit(mask, found, job)
    assert 1 / 2 < 2 * price.cost.multiply_adds / flops.get_total_flops() < 2
    return price.cost.backwards


@pytest.mark.parametrize("call", some(CALLS, CALLS[1:2]))
def test_planned_cost_of_edge_scores_is_within_a_factor_of_two(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, fit(call=call), PATCHES)
    backwards: list[int] = []
    real = circuits.compute_gradients

    def counted(total: torch.Tensor, *given: Any, **options: Any) -> Any:
        backwards.append(1)
        return real(total, *given, **options)

    monkeypatch.setattr(circuits, "compute_gradients", counted)
    assert check_planned_cost(path, "gpt2", monkeypatch) == len(backwards)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("source", ["from: swapped", "with: zero"])
def test_edge_scores_of_a_linear_model_equal_ablation_effects(
    call: str, source: str, tmp_path: Path
) -> None:
    line = (
        f"circuit c = fit({call}, prompts: planted.train, {source}, maximise: logit(answer), "
        f"limit: 6)\n"
    )
    rule = experiment(
        "ablate all but c at tokens * with zero",
        block="planted.test",
        measure="measure logit(answer) as raw",
    )
    path = write_planted(tmp_path, line, rule)
    mask, found = open_rows(path, planted())
    scores, rows_ = score(mask, found), found.trained
    base = found.mean(rows_, None, 8)
    alone = torch.eye(len(mask.candidates))
    chosen = np.argsort(-np.abs(scores))[:12]
    effects = [found.mean(rows_, alone[edge], 8) - base for edge in chosen]
    assert np.abs(effects).max() > 0.1
    np.testing.assert_allclose(scores[chosen], effects, atol=1e-4)


class Ones(nn.Module):
    """An activation function that makes the other factor of a gated MLP its output."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


@cache
def linear_model(family: str) -> Any:
    """A model without norms, with attention to all tokens equally and linear MLPs."""
    model = copy.deepcopy(double(family + WITHOUT_NORMS))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "q_proj" in key or "k_proj" in key:
                weight.zero_()
            elif "c_attn.weight" in key:
                weight[:, : 2 * len(weight)] = 0
            elif "c_attn.bias" in key:
                weight[: 2 * len(weight) // 3] = 0
            elif "query_key_value" in key:
                weight.unflatten(0, (model.config.num_attention_heads, 3, -1))[:, :2] = 0
    for part in model.modules():
        for name in ("act", "act_fn"):
            if hasattr(part, name):
                setattr(part, name, Ones() if hasattr(part, "gate_proj") else nn.Identity())
    return model


@pytest.mark.parametrize(("family", "source"), in_turn(LINEAR, SOURCES[:2]))
@pytest.mark.parametrize("call", [*CALLS, RULED[0]])
def test_edge_scores_of_linear_families_equal_exact_ablations_within_1e_5(
    call: str, family: str, source: str, tmp_path: Path
) -> None:
    compare_exact_effects(call, family, source, tmp_path)


def compare_exact_effects(
    call: str,
    family: str,
    source: str,
    tmp_path: Path,
    *,
    group: str = "",
    split: Mapping[int, int] | None = None,
) -> None:
    """Ablate each of some edges with large scores in passes of the reference.

    Args:
        group: As in `compare_scores`; so is `split`.
    """
    objective = "maximise: logit(answer)"
    options = "validation: 0%, batch: 2" + (", nodes: g" if group else "")
    line = fit(options, call=call, source=source, objective=objective)
    model = linear_model(family)
    mask, found = open_rows(write(tmp_path, group, line, PATCHES), model)
    scores, parts = score(mask, found), stack(family, model)
    every = np.argsort(-np.abs(scores)).tolist()
    chosen = every[:40:4]
    if group:
        ends = [label_candidates((found.candidates[n],)) for n in every]
        chosen += [n for n, text in zip(every, ends, strict=True) if "N" in text][:12:2]
        chosen += [n for n, text in zip(every, ends, strict=True) if "L0.mlp" in text][:4:2]
    effects = np.zeros(len(chosen))
    for row in found.objective.table.row_ids:
        own, ids = rows("other")[row].ids, rows("clean")[row].ids
        given = outputs(forward(family, model, own), parts, split or ())
        if source == "with: zero":
            given = {sender: torch.zeros_like(value) for sender, value in given.items()}

        def logit(*ablated: tuple[str, str], given: Any = given, ids: Any = ids, row: int = row):
            logits = circuit_pass(family, model, ids, given, ablated, range(len(ids)), split=split)
            return float(logits[-1, token(ROWS[row]["a"])])

        base = logit()
        effects += [logit(*list_edges_of(found.edges[n], found.edges)) - base for n in chosen]
    effects /= len(found.objective.table.row_ids)
    assert np.abs(effects).max() > 0.1
    np.testing.assert_allclose(scores[chosen], effects, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_edges_at_a_token_before_the_last_lead_on_by_keys_and_values(
    family: str, tmp_path: Path
) -> None:
    """Nothing reads the logits there, so that edges into them aren't in the circuit."""
    path = write(tmp_path, fit(HALF, call="eap(size: 20)", at="cue token"), PATCHES)
    mask, found = open_rows(path, double(family))
    sizes = dict(zip(map(named, found.edges), np.abs(score(mask, found)).tolist(), strict=True))
    selected: list[tuple[str, str]] = []
    while len(selected) < 20:
        senders = {of for of, _ in selected}
        due = {
            (of, to): size
            for (of, to), size in sizes.items()
            if (of, to) not in selected
            and (to.endswith((".k", ".v")) or to.removesuffix(".q") in senders)
        }
        selected.append(max(due, key=lambda edge: due[edge]))
    sized = dict(
        zip(found.candidates, map(sizes.__getitem__, map(named, found.edges)), strict=True)
    )
    chosen = found.graph.select_backwards(sized, 20)
    assert [named(edge) for edge in chosen] == selected
    assert all(sizes[edge] for edge in selected)
    assert found.graph.keep_leading(frozenset(chosen)) == frozenset(chosen)


# --- planted edges, and the selection -------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "select"), in_turn(["eap_ig", "eap_ig_activations"], ["greedy", "top"], ["eap_ig"])
)
@pytest.mark.parametrize("source", some(["from: swapped", "with: zero"], ["from: swapped"]))
def test_edge_scores_find_planted_edges(
    source: str, call: str, select: str, tmp_path: Path
) -> None:
    line = (
        f'circuit c = fit({call}(size: 5, steps: 5, select: "{select}"), prompts: planted.train, '
        f"{source}, minimise: kl(clean))\n"
    )
    rule = experiment(
        "ablate all but c at tokens * with zero",
        block="planted.test",
        measure="measure kl(clean) as raw",
    )
    path = write_planted(tmp_path, line, rule)
    given = {"m": (planted(), word_tokenizer())}
    (found,) = mechdsl.fit(path, given, store=tmp_path / "store")
    report = found.report
    assert isinstance(report, CircuitReport)
    assert {*report.chosen} == EDGES_THERE
    assert report.trained == pytest.approx(0, abs=1e-4)  # nothing else reaches the output
    assert report.random > 0.1
    assert report.selected == 5
    (done,) = mechdsl.run(path, given, store=tmp_path / "store").files[0].experiments
    assert np.allclose(done.measures[0].patched, 0, atol=1e-4)


def drawn_sizes(family: str, seed: int) -> tuple[EdgeGraph, dict[CircuitEdge, float]]:
    graph = EdgeGraph(shape_of(family))
    sizes = np.random.default_rng(seed).random(len(graph.every))
    return graph, dict(zip(graph.every, sizes.tolist(), strict=True))


def receivers_of(graph: EdgeGraph, node: object) -> set[CircuitEdge]:
    return {edge for edge in graph.every if node in graph.nodes(edge[1])}


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_backward_selection_takes_the_largest_connected_edge(family: str) -> None:
    """The reference loops over all edges in every step."""
    graph, sizes = drawn_sizes(family, 3)
    expected: set[CircuitEdge] = set()
    for _ in range(30):
        ends = {END, *(of for of, _ in expected)}
        due = {edge for end in ends for edge in receivers_of(graph, end)} - expected
        expected.add(max(due, key=lambda edge: sizes[edge]))
    assert {*graph.select_backwards(sizes, 30)} == expected
    assert {*graph.select_backwards(sizes, 10**6)} == {*graph.every}


@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize("select", ["greedy", pytest.param("top", marks=pytest.mark.slow)])
def test_faithfulness_selects_the_smallest_circuit_above_it_in_the_order_of_scores(
    select: str, family: str, tmp_path: Path
) -> None:
    """The reference ablates the other edges of each smaller circuit."""
    options = "validation: 0%, batch: 8"
    call = f'eap(faithfulness: 0.4, select: "{select}")'
    path = write(tmp_path, fit(options, call=call), PATCHES)
    mask, found = open_rows(path, double(family))
    trainer = mask.training.trainer_of(EdgeScoreTrainer)
    job = TrainingJob(tmp_path, {}, tmp_path, lambda: False, lambda *_: None)
    report = find_circuit(mask, found, job)
    scores = np.abs(score(mask, found))
    sizes = dict(zip(found.candidates, scores.tolist(), strict=True))
    graph, every = EdgeGraph(shape_of(family)), {named(edge) for edge in found.candidates}
    order = sorted(sizes, key=lambda edge: -sizes[edge])
    if select == "greedy":
        order = graph.select_backwards(sizes, len(order))

    def mean(kept: set[tuple[str, str]]) -> float:
        values: list[float] = []
        for row in found.objective.table.row_ids:
            ids = rows("clean")[row].ids
            own = outputs(plain(family, rows("other")[row]), stack(family, double(family)))
            logits = circuit_pass(family, double(family), ids, own, every - kept, range(len(ids)))
            values.append(float(loss_by_hand(logits[-1], row)))
        return float(np.mean(values))

    clean, whole = mean(every), mean(set())
    curve = [
        (mean({named(edge) for edge in graph.keep_leading(order[:n])}) - whole) / (clean - whole)
        for n in range(1, report.selected + 1)
    ]
    assert trainer.size(mask.training.of_trainer) is None
    assert 2 < report.selected < len(order)
    assert curve[-1] > 0.4 >= max(curve[:-1])
    assert f"above 0.4 ({curve[-1]:.3f}, on training rows)" in report.made
    assert {*report.chosen} == {
        label_candidates((edge,)) for edge in graph.keep_leading(order[: report.selected])
    }


def test_plan_counts_half_of_the_edges_of_a_circuit_whose_size_isnt_known(tmp_path: Path) -> None:
    """Cells of different sizes aren't counted as equal."""
    sizes = "for n in [1, 2, 5] { ablate all but top n of c at tokens * with zero }\n  against none"
    tested = experiment(sizes, name="curve", block="p")
    call = "eap(faithfulness: 0.4)"
    paths = {}
    for name, own in {"size": "eap(size: 20)", "faithfulness": call}.items():
        (tmp_path / name).mkdir()
        paths[name] = write(tmp_path / name, fit(call=own), tested)
    plans = {name: str(mechdsl.plan(path, models("gpt2"))) for name, path in paths.items()}
    rows = {name: re.findall(r"\n share +(\d+)", text) for name, text in plans.items()}
    assert rows["size"] == rows["faithfulness"] == ["3"]
    note = "c: counted with 131 of 262 edges until its training decides the number"
    assert note in " ".join(plans["faithfulness"].split())
    assert "until its training" not in plans["size"]


def resume_search(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[mechdsl.TrainedFit, list[int], list[int]]:
    """Interrupt a search for a size after size 2, and resume it.

    Returns:
        What the search chose, as without an interruption; the sizes that were measured before it,
        and those after it.
    """
    (whole,) = train(path)
    measure, sizes = CircuitMeter.means, list[int]()

    def recorded(self: CircuitMeter, given: Any) -> Floats:
        sizes.extend(given.sum(1).tolist())
        return measure(self, given)

    def interrupted(self: SizeSearch) -> tuple[int, int]:
        if self.size == 2:
            raise KeyboardInterrupt
        return self.size, 0

    monkeypatch.setattr(CircuitMeter, "means", recorded)
    with monkeypatch.context() as patch:
        patch.setattr(SizeSearch, "progress", property(interrupted))
        with pytest.raises(KeyboardInterrupt):
            train(path, fresh=True)
    first = len(sizes)
    (again,) = train(path, fresh=True)
    assert again.report == whole.report
    return again, sizes[:first], sizes[first:]


@pytest.mark.slow  # the search for scores resumes in the quick tests
def test_search_for_a_size_resumes_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = "eap(faithfulness: 0.4)"
    path = write(tmp_path, fit("validation: 0%, batch: 4", call=call), PATCHES)
    again, first, rest = resume_search(path, monkeypatch)
    assert isinstance(again.report, CircuitReport)
    ends = [0, len(list_edges(shape_of("llama")))]
    assert first == [*ends, 1, 2]
    assert rest == [*ends, *range(3, again.report.selected + 1)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_edges_without_a_path_to_the_logits_are_removed(family: str) -> None:
    """The reference follows all paths edge by edge."""
    graph, sizes = drawn_sizes(family, 4)
    edges = {*sorted(graph.every, key=lambda edge: sizes[edge])[:40]}

    def reaches(edge: CircuitEdge, end: object) -> bool:
        nodes = graph.nodes(edge[1])
        return end in nodes or any(reaches(each, end) for each in edges if each[0] in nodes)

    kept = graph.keep_leading(edges)
    assert kept == {edge for edge in edges if reaches(edge, END)}
    assert 0 < len(kept) < len(edges)
    begun = {edge for edge in kept if edge[0] == EMBEDDING}
    whole = {e for e in kept if e in begun or any(reaches(b, e[0]) for b in begun)}
    assert not CircuitDraws(EdgeGraph(shape_of(family)), kept, 0).is_connected
    assert CircuitDraws(EdgeGraph(shape_of(family)), graph.keep_leading(whole), 0).is_connected


def test_selection_without_an_edge_to_the_logits_is_an_error(tmp_path: Path) -> None:
    line = fit(call='eap(size: 1, select: "top")', source="from: other", at="tokens 1..-2")
    errors = training_errors(write(tmp_path, line, PATCHES))
    assert [each.code for each in errors] == ["E0643"]
    assert "none of the 1 edges with the largest scores leads to `logits`" in errors[0].message


# --- circuits in rules ----------------------------------------------------------------------------


@pytest.mark.parametrize("call", some(CALLS, CALLS[1:2]))
def test_trained_circuit_equals_its_listed_edges_in_rules(call: str, tmp_path: Path) -> None:
    """Up to rounding, with a second experiment on the same block and a second circuit."""
    text = experiment(*PATCH, measure=MEASURE) + OTHER
    other = fit(call="eap(size: 30)", name="d", source="with: mean", at=PAIR)
    path = write(
        tmp_path,
        fit(call=call),
        other,
        text,
        experiment("ablate d at last token with mean", name="f"),
    )
    trained = {each.basis: each for each in train(path, out=tmp_path / "out")}
    card = (tmp_path / "out" / "c" / "README.md").read_text("utf-8")
    assert "Every edge but those of the circuit is set to the values of the run `other`" in card
    report = trained["c"].report
    assert isinstance(report, CircuitReport)
    assert (report.rows, report.held_out_rows) == (3, 1)
    own = run(path, fresh=True).files[0].experiments
    saved = write(tmp_path, 'circuit c = saved("out/c/mask.json")\n', text)
    copied = run(saved, store=False).files[0].experiments
    assert np.allclose(copied[0].measures[0].patched, own[0].measures[0].patched, atol=1e-5)
    written = ", ".join(report.chosen)
    path = write(
        tmp_path,
        f"circuit c = {written}\n",
        text.replace(MEASURE, f"{MEASURE}\n  against random(8)", 1),
    )
    listed = run(path, store=False).files[0].experiments
    for one, two in zip(own[:2], listed, strict=True):
        for mine, theirs in zip(one.measures, two.measures, strict=True):
            np.testing.assert_allclose(mine.patched, theirs.patched, atol=1e-5)
    assert "selected from `logits` backwards" in own[0].conventions["circuit c"]


def test_chosen_edges_are_in_the_order_of_their_scores(tmp_path: Path) -> None:
    path = write(tmp_path, fit(), PATCHES)
    (trained,) = train(path)
    stored = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    sizes = np.abs(stored["scores"])
    assert len(sizes) == len(stored["sites"]) > 100
    assert (np.diff(sizes[stored["chosen"]]) <= 0).all()
    report = trained.report
    assert isinstance(report, CircuitReport)
    assert list(report.chosen) == [stored["labels"][n] for n in stored["chosen"]]
    assert list(report.chosen.values()) == [stored["scores"][n] for n in stored["chosen"]]


# --- keys -----------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "size": {"call": "eap(size: 11)"},
    "method": {"call": CALLS[1]},
    "steps": {"call": "eap_ig(size: 12, steps: 2)"},
    "path": {"call": "eap_ig_activations(size: 12, steps: 3)"},
    "selection": {"call": 'eap(size: 12, select: "top")'},
    "held-out rows": {"options": "validation: 50%, batch: 2"},
    "seed": {"options": f"{HALF}, seed: 2"},
    "position": {"at": "cue token"},
    "source": {"source": "from: turned"},
    "zero": {"source": "with: zero"},
    "mean": {"source": "with: mean", "at": PAIR},
    "measure": {"objective": "maximise: logit(answer)"},
}


def test_edge_score_key_depends_on_every_argument(tmp_path: Path, trains_all: bool) -> None:
    """A different argument gives another circuit with another file."""

    def content(trained: mechdsl.TrainedFit) -> str:
        return (trained.folder / "mask.json").read_text("utf-8")

    # Both selections may have the same edges.
    check_keys(tmp_path, trains_all, fit, CHANGES, PATCHES, content, same=["selection"])


# --- held-out rows --------------------------------------------------------------------------------

TESTED = "ablate all but c at tokens * with zero"
OF_OTHERS = experiment("ablate mlp_out layer 0 at last token with zero", name="plain", block="p")


def row_ids(path: Path) -> dict[str, list[int]]:
    """The rows of each experiment, and those of the training."""
    found = checked(path, double("llama"))
    ids = {each.name: [*each.table.row_ids] for each in found.experiments}
    (declared,) = fits_of_file(found).values()
    assert declared.objective is not None
    return {**ids, "fit": [*declared.objective.table.row_ids]}


@pytest.mark.parametrize("rule", [TESTED, TESTED.replace("c at", "top 2 of c at")])
def test_circuit_is_tested_on_rows_that_it_is_not_trained_on(rule: str, tmp_path: Path) -> None:
    found = row_ids(write(tmp_path, fit(), experiment(rule, name="tested", block="p") + OF_OTHERS))
    assert len(found["plain"]) == 4
    assert found["tested"]
    assert sorted([*found["tested"], *found["fit"]]) == sorted(found["plain"])
    explicit = fit().replace("prompts: p,", "prompts: p.train,")
    blocks = BLOCKS.replace("prompts p {", "prompts p {\n  split 80%", 1)
    tested = experiment(rule, name="tested", block="p.test")
    again = row_ids(write(tmp_path, explicit, tested + OF_OTHERS, blocks=blocks))
    assert again == found


def test_loop_variable_named_like_a_circuit_does_not_use_it(tmp_path: Path) -> None:
    loop = "for c in [0, 1] { ablate mlp_out layer c at last token with zero }"
    tested = experiment(TESTED, name="tested", block="p")
    found = row_ids(write(tmp_path, fit(), tested + experiment(loop, name="plain", block="p")))
    assert len(found["plain"]) == 4
    assert len(found["tested"]) == 1


def test_conventions_name_the_circuit_that_rows_are_split_for(tmp_path: Path) -> None:
    path = write(tmp_path, fit(), experiment(TESTED, name="tested", block="p") + OF_OTHERS)
    train(path)
    tested, plain = run(path).files[0].experiments
    said = "part `test` of a 80% split (automatic: `c` is trained on part `train`)"
    assert said in tested.conventions["rows"]
    assert "trained on 3 rows of p.train" in tested.conventions["circuit c"]
    assert "split" not in plain.conventions["rows"]


def test_conventions_name_every_circuit_that_rows_are_split_for(tmp_path: Path) -> None:
    both = fit() + fit(name="d", call="eap(size: 5)")
    other = experiment(TESTED.replace("c at", "d at"), name="also", block="p")
    path = write(tmp_path, both, experiment(TESTED, name="tested", block="p") + other + OF_OTHERS)
    train(path)
    for found in run(path).files[0].experiments[:2]:
        said = "(automatic: `c`, `d` are trained on part `train`)"
        assert said in found.conventions["rows"]


UNSPLIT = {
    "a circuit of training rows": fit(f"{HALF}, measure_on_training_rows: true"),
    "a circuit of another block": fit(source="with: zero").replace(
        "prompts: p,", "prompts: second,"
    ),
}


@pytest.mark.parametrize("name", UNSPLIT)
def test_rows_are_not_split_for(name: str, tmp_path: Path) -> None:
    found = row_ids(write(tmp_path, UNSPLIT[name], experiment(TESTED, name="tested", block="p")))
    assert len(found["tested"]) == 4


# --- mistakes -------------------------------------------------------------------------------------


def test_changed_derivatives_of_a_model_with_experts_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, fit(call=RULED[0]), PATCHES)
    (error,) = training_errors(path, "gpt_oss")
    assert error.code == "E0608"
    assert "its rules don't know routers and experts" in error.message


def test_function_without_a_changed_derivative_is_an_error_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward_rules, "is_activation", lambda _: False)
    (error,) = training_errors(write(tmp_path, fit(call=RULED[0]), PATCHES), "gpt2")
    assert "its rules of gradients don't cover the model (no rule applies" in error.message


CALL = f"fit(eap(size: 3), prompts: p, from: other, maximise: {LOSS})"
LINE = f"circuit c = {CALL} at {PAIR}"


ONE_STEP = CALL.replace("eap(size: 3", "eap_ig(size: 3, steps: 1").replace(LOSS, "kl(clean)")
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "no source": ("from: other, ", "", "E0207", "needs `from: …`"),
    "no size": ("eap(size: 3)", "eap", "E0342", "needs `size: …` or `faithfulness: …`"),
    "no steps": ("eap(size: 3)", "eap_ig(size: 3)", "E0207", "needs `steps: …`"),
    "all": ("size: 3", "size: 2000", "E0342", "`size` is 2,000, but"),
    "two sizes": ("size: 3", "size: 3, faithfulness: 0.9", "E0342", "both select"),
    "faithfulness": ("size: 3", "faithfulness: 90", "E0342", "between 0 and 1"),
    "selection": ("size: 3", 'size: 3, select: "best"', "E0342", "no such value"),
    "of other tools": ("size: 3", 'size: 3, method: "top"', "E0207", "is not an argument"),
    "zero": ("size: 3", "size: 0", "E0342", "whole number"),
    "training steps": ("from: other", "from: other, steps: 300", "E0207", "isn't trained in steps"),
    "rate": ("from: other", "from: other, rate: 0.1", "E0207", "isn't trained in steps"),
    "precision": ("from: other", 'from: other, precision: "bf16"', "E0207", "isn't trained"),
    "patience": ("from: other", "from: other, patience: 3", "E0207", "isn't trained in steps"),
    "seeds": ("from: other", "from: other, seeds: 3", "E0207", "has no random start"),
    "step function": (LOSS, "rank(answer)", "E0608", "step function"),
    "no gradient in the clean run": (LOSS, "kl(clean)", "E0608", "eap_ig(size: 20, steps: 5)"),
    "one step": (CALL, ONE_STEP, "E0608", "its gradient is 0"),
    "noise": ("from: other", "from: noised", "E0342", "noise"),
    "name": ("eap(size: 3)", "eapig(size: 3)", "E0203", "eap_ig"),
    "discover": ("eap(size: 3)", "discover(size: 3)", "E0203", "eap_ig"),
    "group": (LINE, f"group c = {CALL} at layers * heads * at last token", "E0342", "a circuit"),
    "alone": (CALL, "eap(size: 3)", "E0342", "fit("),
    "one row": ("prompts: p,", "prompts: p, limit: 1,", "E0342", "has 1 row, fewer than 2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_invalid_edge_score_argument_is_rejected(name: str, tmp_path: Path) -> None:
    old, new, code, said = MISTAKES[name]
    line = f"{LINE}\n"
    assert old in line
    path = write(tmp_path, line.replace(old, new), PATCHES, OTHER, blocks=NOISY)
    errors = training_errors(path)
    assert errors[0].code == code, errors
    assert said in f"{errors[0].message} {errors[0].help_text}", errors
    assert len(errors) == 1 or name == "group", errors  # groups can't be ablated with a run
