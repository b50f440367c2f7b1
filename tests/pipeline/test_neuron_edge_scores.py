"""Circuits of neurons that a file declares with `fit(eap(…), nodes: g, …)` and other trainers.

Scores are compared with gradients in a float64 pass in which every neuron of a layer reads and
sends separately, one unpadded prompt at a time. Further tests: exact ablations of a linear model,
use of the circuit in rules, files, costs, keys, and errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.base import limits
from mechdsl.fits.reports import CircuitReport
from mechdsl.resolve.circuits import EMBEDDING, CircuitDraws, EdgeGraph, list_edges
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.types import CircuitEdge, PlacedEdge, SiteLayer

from ..execute.support import word_tokenizer
from ..quick import in_turn, some
from ..rules.circuits import circuit_pass
from ..rules.models import EXACT, double
from ..rules.support import rows, tokens
from ..rules.test_ablated_circuits import D_MLP, Case, fills, list_edges_of, shape_of
from ..rules.test_neuron_circuits import every_edge
from .test_edge_scores import (
    CALLS,
    HERE,
    LINEAR,
    RULED,
    SOURCES,
    WHERE,
    check_planned_cost,
    compare_exact_effects,
    compare_scores,
    fit,
    open_rows,
    reference_products,
    score,
)
from .test_placed_edge_scores import USE
from .test_trained_circuits import PATCHES
from .test_trained_dictionaries import check_keys, experiment, write
from .test_trained_rotations import LOSS, loss_by_hand, training_errors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
FAMILIES = (*(family for family in HERE if family != "gemma2"), "gemma2" + EXACT)
SOME = "group g = L0N3, L0N5, L1N2"
MOST = f"group g = L0N7, mlp_hidden layer 1 neurons 0..{D_MLP - 1}"
"""Every neuron of a layer: it has no node of other neurons."""
MANY = "group g = mlp_hidden layer 0 neurons 0..20, L1N2"
SPLIT = {0: D_MLP, 1: D_MLP}
NODES: dict[SiteLayer, tuple[int, ...]] = {("mlp_hidden", 0): (3, 5), ("mlp_hidden", 1): (2,)}
HALF = "validation: 25%, batch: 2, nodes: g"


@pytest.mark.parametrize(("family", "group"), in_turn(FAMILIES, (SOME, MOST)))
@pytest.mark.parametrize(("call", "source"), in_turn((*CALLS, *RULED), SOURCES))
def test_scores_of_neurons_equal_those_of_separate_neurons(
    call: str, source: str, family: str, group: str, tmp_path: Path
) -> None:
    """In ragged batches of two rows, padded on either side."""
    where = WHERE[len(call) % 2]
    compare_scores(call, where, family, source, tmp_path, group=group, split=SPLIT)


@pytest.mark.parametrize(("family", "source"), in_turn(LINEAR, SOURCES[:2]))
@pytest.mark.parametrize("call", some([*CALLS, RULED[0]], CALLS[:1]))
def test_scores_of_neurons_of_linear_families_equal_exact_ablations_within_1e_5(
    call: str, family: str, source: str, tmp_path: Path
) -> None:
    compare_exact_effects(call, family, source, tmp_path, group=SOME, split=SPLIT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_scores_of_neurons_at_positions_equal_those_of_separate_neurons(
    family: str, tmp_path: Path
) -> None:
    places = ("cue token", "last token")
    line = fit("validation: 0%, batch: 2, nodes: g", at=", ".join(places))
    mask, found = open_rows(write(tmp_path, SOME, line, USE), double(family), "left")
    every, ids = list_edges(shape_of(family), NODES), found.objective.table.row_ids
    expected = torch.zeros(len(every), len(places), dtype=torch.float64)
    for row in ids:
        at = "{cue token, last token}"
        given = family, row, every, "from: other", at, CALLS[0]
        products = reference_products(*given, split=SPLIT)
        for number, place in enumerate(places):
            there = tokens(rows("clean")[row], place)
            expected[:, number] += products[:, there].sum(-1) / len(ids)
    scores = np.zeros(expected.shape)
    for own, value in zip(mask.candidates, score(mask, found), strict=True):
        assert isinstance(own, PlacedEdge)
        scores[every.index(own.edge), own.place] = value
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=1e-4)


def test_neurons_are_differentiated_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, MOST, fit(HALF), PATCHES)
    expected = score(*open_rows(path, double("llama")))
    monkeypatch.setattr("mechdsl.forward.hooks.circuits._NEURON_NUMBERS", 1)
    np.testing.assert_allclose(score(*open_rows(path, double("llama"))), expected, atol=1e-9)


# --- circuits in rules ----------------------------------------------------------------------------


def value(
    family: str, row: int, kept: Sequence[CircuitEdge], every: Sequence[CircuitEdge]
) -> float:
    """The measure while all edges but some carry the values of the run `other`."""
    text = rows("clean")[row]
    given = fills(family, Case("c", "other", "tokens *"), {}, SPLIT)[row]
    ablated = every_edge(family) - {each for edge in kept for each in list_edges_of(edge, every)}
    at = tokens(text, "tokens *")
    logits = circuit_pass(family, double(family), text.ids, given, ablated, at, split=SPLIT)
    return float(loss_by_hand(logits[-1], row))


@pytest.mark.parametrize(("family", "call"), in_turn(("llama", "gpt2", "gpt_neox"), CALLS))
def test_circuit_of_neurons_equals_passes_with_its_edges(
    family: str, call: str, tmp_path: Path
) -> None:
    """As it is trained, in rules, from its file, and its random circuits."""
    many = call.replace("size: 12", "size: 100")
    rule = "ablate all but c at tokens * with other"
    measure = f"measure {LOSS} as raw\n  against random(3)"
    used = experiment(rule, block="p", measure=measure)
    path = write(tmp_path, MANY, fit(HALF, call=many), used)
    given = {"m": (double(family), word_tokenizer())}
    store = tmp_path / "store"
    (trained,) = mechdsl.fit(path, given, store=store, out=tmp_path / "out")
    report = trained.report
    assert isinstance(report, CircuitReport)
    stored = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    nodes: dict[SiteLayer, tuple[int, ...]]
    nodes = {("mlp_hidden", 0): tuple(range(21)), ("mlp_hidden", 1): (2,)}
    every = list_edges(shape_of(family), nodes)
    kept = [every[n] for n in stored["chosen"]]
    assert len(stored["sites"]) == report.candidates == len(every)
    assert any("L0.mlp" in text for text in report.chosen)
    assert any("N" in text for text in report.chosen)
    (own,) = mechdsl.run(path, given, store=store).files[0].experiments
    assert own.row_ids is not None
    expected = [value(family, row, kept, every) for row in own.row_ids]
    np.testing.assert_allclose(own.measures[0].patched[0], expected, atol=1e-5)
    said = own.conventions["controls"]
    assert said.startswith("random circuits, 3 draws, seed 0; of 100 edges, at the same")
    copied = write(tmp_path, 'circuit c = saved("out/c/mask.json")', used)
    (found,) = mechdsl.run(copied, given, store=False).files[0].experiments
    assert found.row_ids is not None
    expected = [value(family, row, kept, every) for row in found.row_ids]
    np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=1e-5)
    assert found.conventions["neurons of circuits"] == own.conventions["neurons of circuits"]


def step(node: str) -> str:
    """The node that a receiver belongs to, in a model without shared keys."""
    return node.split(".")[0] if "H" in node else node


def test_random_circuits_of_neurons_lie_on_paths_of_the_model() -> None:
    """The reference follows the labels of the edges from one node to the next."""
    graph = EdgeGraph(shape_of("gpt2"), NODES)
    sizes = dict.fromkeys(graph.every, 1.0)
    sizes |= {edge: 2.0 for edge in graph.every if edge[1].site == "mlp_hidden"}
    sizes |= {edge: 3.0 for edge in graph.every if edge[0] == EMBEDDING}
    circuit = graph.select_backwards(sizes, 60)
    while not graph.covers(circuit):
        sent = {EMBEDDING, *(node for edge in circuit for node in graph.nodes(edge[1]))}
        circuit = [*graph.keep_leading([edge for edge in circuit if edge[0] in sent])]
    drawing = CircuitDraws(graph, circuit, 1)
    found = drawing.draws(20)
    assert drawing.is_connected
    assert len({*found}) == 20
    for own in found:
        edges = {tuple(label_candidates((edge,)).split(" -> ")) for edge in own}
        assert len(edges) == len(circuit) > 5
        reached, leading = {"embed"}, {"logits"}
        for _ in edges:
            reached |= {step(to) for of, to in edges if of in reached}
            leading |= {of for of, to in edges if step(to) in leading}
        assert {of for of, _ in edges} <= reached
        assert {step(to) for _, to in edges} <= leading
    assert any("L0N3" in label_candidates((edge,)) for own in found for edge in own)


@pytest.mark.parametrize("call", some(CALLS, CALLS[:1]))
def test_planned_cost_of_scores_of_neurons_is_within_a_factor_of_two(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_planned_cost(write(tmp_path, MOST, fit(HALF, call=call), PATCHES), "llama", monkeypatch)


# --- keys and mistakes ----------------------------------------------------------------------------


def declare(*, group: str = SOME, call: str = "eap(size: 12)") -> str:
    return f"{group}\n{fit(HALF, call=call)}"


CHANGES: dict[str, dict[str, Any]] = {
    "another neuron": {"group": SOME.replace("L1N2", "L1N4")},
    "one more neuron": {"group": f"{SOME}, L2N1"},
    "method": {"call": CALLS[1]},
}


def test_key_of_a_circuit_of_neurons_depends_on_them(tmp_path: Path, trains_all: bool) -> None:
    def content(trained: mechdsl.TrainedFit) -> str:
        return (trained.folder / "mask.json").read_text("utf-8")

    check_keys(tmp_path, trains_all, declare, CHANGES, PATCHES, content)


DELTA = f"measure {LOSS} as delta"
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "unknown": ("nodes: g", "nodes: h", "E0201", "`h`"),
    "no name": ("nodes: g", "nodes: 3", "E0207", "isn't the name of a group"),
    "heads": (SOME, "group g = L0N3, L0H1", "E0207", "has `L0H1`, and `nodes` are neurons or"),
    "an MLP": (SOME, "group g = L0.mlp", "E0207", "has `L0.mlp`, and `nodes` are neurons or"),
    "features of no dictionary": (
        SOME,
        "basis f = pca(p, dims: 3) at mlp_out layer 0\ngroup g = features 0, 2 of f",
        "E0342",
        "`f` isn't a dictionary, and nodes of circuits are features of dictionaries",
    ),
    "features and neurons of one MLP": (
        SOME,
        "basis f = fit(sae(features: 8, k: 2), prompts: p, steps: 1) at mlp_out layer 1\n"
        "group g = L1N3, features 0, 2 of f",
        "E0207",
        "`L1N3` divides the same MLP as `feature 0 of f`",
    ),
    "another site": (SOME, "group g = resid_post layer 0", "E0334", "resid_post"),
    "picks": (
        SOME,
        "experiment x {\n  prompts p\n  from other into clean\n  patch mlp_hidden layer 0 neuron * "
        f"at last token\n  {DELTA}\n  against none\n}}\ngroup g = top 3 of x",
        "E0207",
        "depends on the results of an experiment",
    ),
    "positions": (
        SOME,
        f"group g = fit(atp(size: 1), prompts: p, from: other, maximise: {LOSS}) at "
        "resid_post layer 0 at cue token, last token",
        "E0207",
        "is a group of positions",
    ),
    "no such neuron": (SOME, "group g = L0N900", "E0301", "neuron 900"),
}


@pytest.mark.parametrize("key", MISTAKES)
def test_mistake_in_nodes_is_an_error(key: str, tmp_path: Path) -> None:
    old, new, code, said = MISTAKES[key]
    text = declare()
    assert old in text
    errors = training_errors(write(tmp_path, text.replace(old, new), PATCHES))
    assert {each.code for each in errors} == {code}, errors
    assert said in " ".join(f"{each.message} {each.help_text}" for each in errors)


def test_nodes_outside_of_circuits_are_an_error(tmp_path: Path) -> None:
    text = f"{SOME}\n{fit(HALF, call='atp(size: 2)').replace('circuit c', 'group c')}".rstrip()
    errors = training_errors(write(tmp_path, f"{text} at layers * heads * at last token", PATCHES))
    assert errors[0].code == "E0207"
    assert "of a group has no `nodes`" in errors[0].message


def test_more_nodes_than_the_limit_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CIRCUIT_NEURONS", 2)
    (error,) = training_errors(write(tmp_path, declare(), PATCHES))
    assert error.code == "E0207"
    assert "names 3 neurons, and at most 2 can be nodes" in error.message
