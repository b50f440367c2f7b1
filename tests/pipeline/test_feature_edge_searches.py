"""Circuits of features that searches and masks choose: `fit(acdc(…), nodes: g, …)`.

Decisions, changes of the measure, losses and gradients are compared with a float64 pass in which
every feature reads and sends separately, one unpadded prompt at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.fits.reports import MaskReport
from mechdsl.pipeline.trained_files import fits_of_file
from mechdsl.resolve.circuits import EdgeGraph
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.types import CircuitEdge

from ..quick import in_turn, some
from ..rules.circuits import Features, circuit_pass
from ..rules.models import double
from ..rules.support import rows, tokens
from ..rules.test_ablated_circuits import Case, fills, shape_of
from ..rules.test_feature_circuits import definitions, dictionaries, label
from .test_edge_searches import ACDC, COARSE, fit, search
from .test_feature_edge_scores import name_end
from .test_trained_circuits import PAIR, PATCHES, differentiable
from .test_trained_circuits import fit as masked
from .test_trained_dictionaries import train, write
from .test_trained_masks import QUICK, training_rows
from .test_trained_rotations import checked, loss_by_hand

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("llama", "gpt2", "gpt_neox")
HALF = "validation: 50%, batch: 8, nodes: g"
SOURCES = ("from: other", "with: zero")
KIND = "topk"


def group_of(family: str) -> str:
    """The lines of a file with features of an SAE and of a transcoder."""
    return f"{definitions(family, KIND)}group g = feature 3 of f, feature 0 of t\n"


def features_of(tmp_path: Path, family: str) -> dict[int, Features]:
    own, numbers = dictionaries(tmp_path, family, KIND), {0: 3, 1: 0}
    return {
        layer: Features(of.of, {label(layer, numbers[layer]): numbers[layer]}, of.reads)
        for layer, of in own.items()
    }


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, SOURCES, ("gpt2",)))
@pytest.mark.parametrize("call", some([ACDC, COARSE], [COARSE]))
def test_decisions_on_edges_of_features_equal_a_reference(
    call: str, family: str, source: str, tmp_path: Path
) -> None:
    """Every step of the search ablates the edges that a pass of the reference decides on."""
    features = features_of(tmp_path, family)
    path = write(tmp_path, group_of(family), fit(HALF, call=call, source=source, at=PAIR), PATCHES)
    searched, ids = search(path, family, "left" if source == "with: zero" else "right")
    given = fills(family, Case("c", source.split()[1], PAIR), {}, (), features)

    def mean(ablated: Collection[CircuitEdge]) -> float:
        edges = [(name_end(of), name_end(to)) for of, to in ablated]
        found = list[float]()
        for row in ids:
            text, model = rows("clean")[row], double(family)
            at = tokens(text, PAIR)
            logits = circuit_pass(family, model, text.ids, given[row], edges, at, features=features)
            found.append(loss_by_hand(logits[-1], row).item())
        return float(np.mean(found))

    (declared,) = fits_of_file(checked(path, double(family))).values()
    assert declared.objective is not None
    circuit = declared.objective.rules[0].circuit
    assert circuit is not None
    graph = EdgeGraph(shape_of(family), {}, circuit.features)
    every = graph.every
    numbers = {edge: n for n, edge in enumerate(every)}
    ablated: set[CircuitEdge] = set()
    changes, value = dict[CircuitEdge, float](), mean(())
    steps = graph.list_search_steps(("edges",) if call == ACDC else COARSE_LEVELS)
    assert {edge for step in steps for edge in step.edges} == {*every}
    for step in steps:
        left = {*step.edges} - ablated
        if not left:
            continue
        change = mean(ablated | left) - value
        changes |= dict.fromkeys(left, change)
        if -change < 0.03:  # maximised
            ablated |= left
            value += change
    kept = [edge for edge in every if edge not in ablated]
    assert kept == [edge for edge, own in zip(every, searched.kept, strict=True) if own]
    found = [searched.scores[numbers[edge]] for edge in kept]
    np.testing.assert_allclose(found, [changes[edge] for edge in kept], atol=1e-5)
    if call == COARSE:
        names = [{label_candidates((edge,)).split(" -> ")[0] for edge in s.edges} for s in steps]
        assert {label(0, 3), "L0.mlp"} in names  # all nodes of an MLP together
        assert names.count({label(0, 3)}) > 1  # and alone


COARSE_LEVELS = ("blocks", "heads", "inputs", "edges")


@pytest.mark.parametrize(("family", "source"), in_turn(HERE, (*SOURCES, "with: mean")))
def test_mask_loss_and_gradient_of_features_equal_autograd(
    family: str, source: str, tmp_path: Path
) -> None:
    """In a ragged batch of two rows with different gates."""
    features = features_of(tmp_path, family)
    options = QUICK.replace("25%", "0%") + ", nodes: g"
    path = write(tmp_path, group_of(family), masked(options, source=source, at=PAIR), PATCHES)
    mask, found = training_rows(path, double(family), "left")
    circuit = found.objective.rules[0].circuit
    assert circuit is not None
    every = EdgeGraph(found.model.shape, {}, circuit.features).every
    assert [*mask.candidates] == every
    random, batch = torch.Generator().manual_seed(5), [0, 2]
    mine = torch.rand(2, len(every), generator=random).double().requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    ids = found.objective.table.row_ids

    def by_hand(row: int, gates: Tensor) -> Tensor:
        given = fills(family, Case("c", source.split()[1], PAIR), {}, (), features)[row]
        shares: Mapping[Any, Tensor] = {
            (name_end(of), name_end(to)): gates[n] for n, (of, to) in enumerate(every)
        }
        text, model = rows("clean")[row], double(family)
        at = tokens(text, PAIR)
        logits = differentiable(family, model, text.ids, given, shares, at, features=features)
        return loss_by_hand(logits[-1], row)

    values = found.values(np.array(batch), mine)
    expected = torch.stack([by_hand(ids[row], theirs[n]) for n, row in enumerate(batch)])
    assert torch.allclose(values, expected, atol=1e-5)  # gates are float32
    (own,) = torch.autograd.grad(values.sum(), mine)
    (other,) = torch.autograd.grad(expected.sum(), theirs)
    assert torch.allclose(own, other, atol=1e-5)
    there = [n for n, edge in enumerate(every) if "feature" in label_candidates((edge,))]
    assert other[:, there].abs().max() > 1e-4


def test_chosen_edges_of_features_of_a_mask_are_stored(tmp_path: Path) -> None:
    features_of(tmp_path, "llama")
    options = HALF.replace("batch: 8", "batch: 8, steps: 5")
    line = fit(options, call="mask(size: 9, keep: true)", at=PAIR)
    (trained,) = train(write(tmp_path, group_of("llama"), line, PATCHES))
    assert isinstance(trained.report, MaskReport)
    assert len(trained.report.chosen) == 9
