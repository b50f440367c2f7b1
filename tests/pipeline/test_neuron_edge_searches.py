"""Circuits of neurons that searches and masks choose: `fit(acdc(…), nodes: g, …)`.

Decisions, changes of the measure, losses and gradients are compared with a float64 pass in which
every neuron of a layer reads and sends separately, one unpadded prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.fits.reports import CircuitReport, MaskReport
from mechdsl.planner.training_cost import training_cost
from mechdsl.resolve.circuits import EdgeGraph, list_edges
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.types import CircuitEdge, SiteLayer

from ..quick import in_turn, some
from ..rules.circuits import circuit_pass
from ..rules.models import double
from ..rules.support import rows, tokens
from ..rules.test_ablated_circuits import D_MLP, Case, fills, list_edges_of, shape_of
from .test_edge_searches import ACDC, COARSE, fit, search
from .test_trained_circuits import PAIR, PATCHES, differentiable
from .test_trained_circuits import fit as masked
from .test_trained_dictionaries import train, write
from .test_trained_masks import QUICK, training_rows
from .test_trained_rotations import loss_by_hand

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("llama", "gpt2", "gpt_neox")
GROUP = "group g = mlp_hidden layer 1 neurons 2..3"
NODES: dict[SiteLayer, tuple[int, ...]] = {("mlp_hidden", 1): (2, 3)}
SPLIT = {1: D_MLP}
HALF = "validation: 50%, batch: 8, nodes: g"
SOURCES = ("from: other", "with: zero")


def reference_measure(
    family: str, ids: Sequence[int], source: str
) -> Callable[[Collection[CircuitEdge]], float]:
    """A function from ablated edges to the mean of the measure."""
    given = fills(family, Case("c", source.split()[1], PAIR), {}, SPLIT)
    every = list_edges(shape_of(family), NODES)

    def mean(ablated: Collection[CircuitEdge]) -> float:
        edges = [each for edge in ablated for each in list_edges_of(edge, every)]
        found = list[float]()
        for row in ids:
            text = rows("clean")[row]
            at = tokens(text, PAIR)
            logits = circuit_pass(
                family, double(family), text.ids, given[row], edges, at, split=SPLIT
            )
            found.append(loss_by_hand(logits[-1], row).item())
        return float(np.mean(found))

    return mean


def groups_of(graph: EdgeGraph, *, coarse: bool) -> list[list[CircuitEdge]]:
    """The edges that a search tries together, by their labels: those of a layer's heads or MLP, of
    one of these heads or nodes, into a query, key or value, and alone."""
    found: list[list[CircuitEdge]] = []
    ends = {edge: label_candidates((edge,)).split(" -> ") for edge in graph.every}
    senders = [*dict.fromkeys(of for of, _ in ends.values())]
    receivers = [*dict.fromkeys(to for of, to in ends.values() if of == "embed")]
    if coarse:
        for layer in range(2, -1, -1):
            mlp = {f"L{layer}.mlp"} | {own for own in senders if own.startswith(f"L{layer}N")}
            found.append([edge for edge in graph.every if ends[edge][0] in mlp])
            found.append([edge for edge in graph.every if ends[edge][0].startswith(f"L{layer}H")])
        several = [own for own in senders if "H" in own or "N" in own or own == "L1.mlp"]
        modules = sorted(several, key=lambda own: (own[1], "H" not in own), reverse=True)
        for module in dict.fromkeys((own[1], "H" in own) for own in modules):
            own = [each for each in senders if each in several]
            own = [each for each in own if (each[1], "H" in each) == module]
            for sender in reversed(own):
                found.append([edge for edge in graph.every if ends[edge][0] == sender])
        for receiver in reversed(receivers):
            if receiver[-2:] in (".q", ".k", ".v"):
                found.append([edge for edge in graph.every if ends[edge][1] == receiver])
    for receiver in reversed(receivers):
        found += [[edge] for edge in reversed(graph.every) if ends[edge][1] == receiver]
    return found


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES, ("llama",)))
@pytest.mark.parametrize("call", some([ACDC, COARSE], [COARSE]))
def test_decisions_on_edges_of_neurons_equal_a_reference(
    call: str, family: str, source: str, tmp_path: Path
) -> None:
    path = write(tmp_path, GROUP, fit(HALF, call=call, source=source, at=PAIR), PATCHES)
    searched, ids = search(path, family, "left" if source == "with: zero" else "right")
    graph, mean = EdgeGraph(shape_of(family), NODES), reference_measure(family, ids, source)
    ablated: set[CircuitEdge] = set()
    changes, value = dict[CircuitEdge, float](), mean(())
    for group in groups_of(graph, coarse=call == COARSE):
        left = {*group} - ablated
        if not left:
            continue
        change = mean(ablated | left) - value
        changes |= dict.fromkeys(left, change)
        if -change < 0.03:  # maximised
            ablated |= left
            value += change
    every = graph.every
    kept = [edge for edge in every if edge not in ablated]
    assert kept == [edge for edge, own in zip(every, searched.kept, strict=True) if own]
    assert len(kept) > 2 or family == "gpt2"
    found = [searched.scores[every.index(edge)] for edge in kept]
    np.testing.assert_allclose(found, [changes[edge] for edge in kept], atol=1e-5)


def test_greedy_search_ablates_the_least_important_edge_of_neurons(tmp_path: Path) -> None:
    options = "validation: 50%, limit: 2, nodes: g"
    every = list_edges(shape_of("llama"), NODES)
    call = f"greedy(size: {len(every) - 1})"
    path = write(tmp_path, GROUP, fit(options, call=call, at=PAIR), PATCHES)
    searched, ids = search(path, "llama")
    mean = reference_measure("llama", ids, "from: other")
    means = [mean([edge]) for edge in every]
    assert np.flatnonzero(~searched.kept).tolist() == [int(np.argmax(means))]
    assert any("L1N2" in label_candidates((edge,)) for edge in every)


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES))
def test_mask_loss_and_gradient_of_neurons_equal_autograd(
    family: str, source: str, tmp_path: Path
) -> None:
    """In a ragged batch of two rows with different gates."""
    options = QUICK.replace("25%", "0%") + ", nodes: g"
    path = write(tmp_path, GROUP, masked(options, source=source, at=PAIR), PATCHES)
    mask, found = training_rows(path, double(family), "left")
    every = list_edges(shape_of(family), NODES)
    assert len(mask.candidates) == len(every)
    random, batch = torch.Generator().manual_seed(5), [0, 2]
    mine = torch.rand(2, len(every), generator=random).double().requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    ids = found.objective.table.row_ids

    def by_hand(row: int, gates: Tensor) -> Tensor:
        given = fills(family, Case("c", source.split()[1], PAIR), {}, SPLIT)[row]
        shares: Mapping[Any, Tensor] = {
            own: gates[n] for n, edge in enumerate(every) for own in list_edges_of(edge, every)
        }
        text = rows("clean")[row]
        at = tokens(text, PAIR)
        model = double(family)
        logits = differentiable(family, model, text.ids, given, shares, at, split=SPLIT)
        return loss_by_hand(logits[-1], row)

    values = found.values(np.array(batch), mine)
    expected = torch.stack([by_hand(ids[row], theirs[n]) for n, row in enumerate(batch)])
    assert torch.allclose(values, expected, atol=1e-5)  # gates are float32
    (own,) = torch.autograd.grad(values.sum(), mine)
    (other,) = torch.autograd.grad(expected.sum(), theirs)
    assert torch.allclose(own, other, atol=1e-5)
    there = [n for n, edge in enumerate(every) if "N" in label_candidates((edge,))]
    assert other[:, there].abs().max() > 1e-4


def test_plan_counts_the_circuits_of_a_search_over_neurons(tmp_path: Path) -> None:
    path = write(tmp_path, GROUP, fit(HALF, call=COARSE, at=PAIR), PATCHES)
    mask, found = training_rows(path, double("llama"))
    cost = training_cost("c", mask, found.objective, found.model.shape)
    assert cost.steps == len(groups_of(EdgeGraph(shape_of("llama"), NODES), coarse=True))


@pytest.mark.parametrize("call", some(["mask(size: 9, keep: true)", ACDC], [ACDC]))
def test_chosen_edges_of_neurons_are_stored(call: str, tmp_path: Path) -> None:
    options = HALF.replace("batch: 8", "batch: 8, steps: 5") if "mask" in call else HALF
    (trained,) = train(write(tmp_path, GROUP, fit(options, call=call, at=PAIR), PATCHES))
    report = trained.report
    assert isinstance(report, CircuitReport | MaskReport)
    labels = {label_candidates((edge,)) for edge in list_edges(shape_of("llama"), NODES)}
    assert {*report.chosen} <= labels
