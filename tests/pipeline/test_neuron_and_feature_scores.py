"""Circuits with neurons and features as nodes: `group g = L0N3, features 0, 2 of t`, `nodes: g`.

Scores are compared with gradients in a float64 pass in which every neuron of a layer and every
feature reads and sends separately, one unpadded prompt at a time. Trained circuits are compared
with passes of the same reference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.types import CircuitEdge, FeatureNode, PlacedEdge, is_neuron
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import word_tokenizer
from ..quick import in_turn, some
from ..rules import test_attention_feature_circuits as of_attention
from ..rules import test_feature_circuits as of_mlps
from ..rules.circuits import circuit_pass
from ..rules.models import double
from ..rules.support import rows, tokens
from ..rules.test_ablated_circuits import D_MLP, Case, fills, list_edges_of
from .test_edge_scores import (
    CALLS,
    RULED,
    SOURCES,
    WHERE,
    check_planned_cost,
    compare_scores,
    fit,
    open_rows,
)
from .test_edge_searches import search
from .test_trained_circuits import PAIR, PATCHES
from .test_trained_dictionaries import check_keys, experiment, write
from .test_trained_rotations import LOSS, loss_by_hand

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("llama", "gpt2", "qwen3")
OF = ("mlp", "attention")
HALF = "validation: 25%, batch: 2, nodes: g"


def group_of(family: str, of: str) -> str:
    """The lines of a file with neurons of layer 0 and features of an MLP or two attentions."""
    if of == "mlp":
        lines = of_mlps.definitions(family, "topk").splitlines()[1]
        return f"{lines}\ngroup g = L0N3, L0N5, features 0, 2 of t\n"
    lines = "\n".join(of_attention.definitions(family, "topk").splitlines()[:2])
    return f"{lines}\ngroup g = features 3, 5, 7 of a, L0N3, features 0, 2 of b, L0N5\n"


def nodes_of(tmp_path: Path, family: str, of: str) -> dict[str, Any]:
    """Write the dictionaries, and return the layers whose nodes the reference divides."""
    if of == "mlp":
        own = of_mlps.dictionaries(tmp_path, family, "topk")
        return {"split": {0: D_MLP}, "features": {1: own[1]}}
    found = of_attention.nodes_of(tmp_path, family, "topk")
    return {"split": {0: D_MLP}, "attention": found["attention"]}


def compare(call: str, source: str, family: str, of: str, tmp_path: Path) -> None:
    """Compare scores with those of the reference; nodes of either type send and receive."""
    nodes, where = nodes_of(tmp_path, family, of), WHERE[len(call) % 2]
    found = compare_scores(
        call, where, family, source, tmp_path, group=group_of(family, of), **nodes
    )
    for end in (0, 1):
        neurons = [abs(own) for edge, own in found.items() if is_neuron(edge[end])]
        features = [abs(own) for edge, own in found.items() if isinstance(edge[end], FeatureNode)]
        assert min(max(neurons), max(features)) > 1e-4
    direct = any(is_neuron(edge[0]) and isinstance(edge[1], FeatureNode) for edge in found)
    assert direct == (of == "mlp")  # features of attention read heads


@pytest.mark.parametrize(("family", "of"), in_turn(HERE, OF, HERE[:2]))
@pytest.mark.parametrize(("call", "source"), in_turn(CALLS, SOURCES, CALLS[:2]))
def test_scores_of_neurons_and_features_equal_those_of_separate_nodes(
    call: str, source: str, family: str, of: str, tmp_path: Path
) -> None:
    """In ragged batches of two rows, padded on either side."""
    compare(call, source, family, of, tmp_path)


@pytest.mark.parametrize(("family", "of"), in_turn(HERE[:2], OF))
@pytest.mark.parametrize("call", some(RULED, RULED[:1]))
def test_scores_with_changed_derivatives_equal_those_of_changed_modules(
    call: str, family: str, of: str, tmp_path: Path
) -> None:
    compare(call, "from: other", family, of, tmp_path)


@pytest.mark.slow  # a pass of the reference for each edge
@pytest.mark.parametrize(
    ("family", "of", "steps"),
    [("llama", "mlp", 1), ("gpt2", "mlp", 2), ("gpt2", "attention", 2), ("qwen3", "attention", 2)],
)
def test_greedy_search_over_all_types_of_nodes_equals_a_greedy_loop(
    family: str, of: str, steps: int, tmp_path: Path
) -> None:
    """Each step tries all edges between heads, MLPs, neurons and features in one row."""
    nodes, group = nodes_of(tmp_path, family, of), group_of(family, of)
    options, call = "validation: 50%, limit: 2, nodes: g", "greedy(size: {})"
    path = write(tmp_path, group, fit(options, call=call.format(10), at=PAIR), PATCHES)
    candidates = open_rows(path, double(family))[1].candidates
    every = [edge for edge in candidates if not isinstance(edge, PlacedEdge)]
    line = fit(options, call=call.format(len(every) - steps), at=PAIR)
    path = write(tmp_path, group, line, PATCHES)
    searched, (row,) = search(path, family)
    text, given = rows("clean")[row], fills(family, Case("c", "other", PAIR), {}, **nodes)[row]
    at = tokens(text, PAIR)

    def measure(ablated: list[CircuitEdge]) -> float:
        pairs = [pair for edge in ablated for pair in list_edges_of(edge, every)]
        logits = circuit_pass(family, double(family), text.ids, given, pairs, at, **nodes)
        return loss_by_hand(logits[-1], row).item()

    ablated: list[CircuitEdge] = []
    for _ in range(steps):
        due = [edge for edge in every if edge not in ablated]
        ablated.append(due[int(np.argmax([measure([*ablated, edge]) for edge in due]))])
    assert {edge for edge, kept in zip(every, searched.kept, strict=True) if not kept} == {*ablated}


# --- circuits in rules ----------------------------------------------------------------------------


def check_circuit(
    own: ExperimentResult, family: str, kept: list[CircuitEdge], every: list[CircuitEdge], **of: Any
) -> None:
    """Compare each row with a pass in which all edges but some carry the values of `other`."""
    reference = {pair for edge in every for pair in list_edges_of(edge, every)}
    ablated = reference - {pair for edge in kept for pair in list_edges_of(edge, every)}
    given = fills(family, Case("c", "other", "tokens *"), {}, **of)
    expected: list[float] = []
    assert own.row_ids is not None
    for row in own.row_ids:
        text = rows("clean")[row]
        at = tokens(text, "tokens *")
        logits = circuit_pass(family, double(family), text.ids, given[row], ablated, at, **of)
        expected.append(float(loss_by_hand(logits[-1], row)))
    np.testing.assert_allclose(own.measures[0].patched[0], expected, atol=1e-5)


TRAININGS = {
    "eap(size: 100)": ("llama", "mlp"),
    "eap_ig(size: 200, steps: 2)": ("gpt2", "attention"),
    "acdc(threshold: 0.03)": ("gpt2", "mlp"),
    "coarse_to_fine(threshold: 0.03)": ("llama", "attention"),
    "mask(size: 60, keep: true)": ("gpt2", "attention"),
}


@pytest.mark.parametrize("call", some(TRAININGS, [*TRAININGS][:1]))
def test_circuit_of_neurons_and_features_equals_passes_with_its_edges(
    call: str, tmp_path: Path
) -> None:
    """As it is trained, with random circuits, and as it is read from its file."""
    family, of = TRAININGS[call]
    nodes, group = nodes_of(tmp_path, family, of), group_of(family, of)
    measure = f"measure {LOSS} as raw\n  against random(3)"
    used = experiment("ablate all but c at tokens * with other", block="p", measure=measure)
    line = fit(f"{HALF}, steps: 4" if call.startswith("mask") else HALF, call=call)
    path = write(tmp_path, group, line, used)
    given, store = {"m": (double(family), word_tokenizer())}, tmp_path / "store"
    (trained,) = mechdsl.fit(path, given, store=store, out=tmp_path / "out")
    stored = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    mask, found = open_rows(path, double(family))
    assert stored["labels"] == [label_candidates((each,)) for each in mask.candidates]
    kept = [found.edges[n] for n in stored["chosen"]]
    for circuit in (line, 'circuit c = saved("out/c/mask.json", nodes: g)'):
        path = write(tmp_path, group, circuit, used)
        (own,) = mechdsl.run(path, given, store=store).files[0].experiments
        check_circuit(own, family, kept, list(found.edges), **nodes)
        assert own.conventions["neurons of circuits"]
        assert own.conventions["features of circuits"]
        if call.startswith("eap"):
            assert any(is_neuron(end) and end.unit is not None for edge in kept for end in edge)
            assert any(isinstance(end, FeatureNode) for edge in kept for end in edge)


@pytest.mark.parametrize("of", OF)
def test_listed_edges_of_a_group_equal_those_of_its_sites(of: str, tmp_path: Path) -> None:
    nodes_of(tmp_path, "llama", of)
    group = group_of("llama", of)
    sites = group.split("group g = ")[1].strip()
    used = experiment(
        "ablate c at tokens * with other", block="p", measure=f"measure {LOSS} as raw"
    )
    given, found = {"m": (double("llama"), word_tokenizer())}, list[Any]()
    for edges in ("g -> logits", ", ".join(f"{each} -> logits" for each in _sites(sites))):
        path = write(tmp_path, group, f"circuit c = {edges}", used)
        (own,) = mechdsl.run(path, given, store=False).files[0].experiments
        found.append(own.measures[0].patched)
        assert np.abs(own.measures[0].patched - own.measures[0].base).max() > 1e-3
    np.testing.assert_array_equal(*found)


def _sites(text: str) -> list[str]:
    """Split a list of sites at commas that no number of a feature follows."""
    found: list[str] = []
    for part in text.split(", "):
        if found and found[-1].startswith("features") and " of " not in found[-1]:
            found[-1] += f", {part}"
        else:
            found.append(part)
    return found


# --- costs and keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("call", some(CALLS, CALLS[:1]))
def test_planned_cost_of_scores_of_neurons_and_features_is_within_a_factor_of_two(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes_of(tmp_path, "llama", "attention")
    path = write(tmp_path, group_of("llama", "attention"), fit(HALF, call=call), PATCHES)
    check_planned_cost(path, "llama", monkeypatch)


def test_key_of_a_circuit_of_neurons_and_features_depends_on_either(
    tmp_path: Path, trains_all: bool
) -> None:
    nodes_of(tmp_path, "llama", "mlp")
    basis = of_mlps.definitions("llama", "topk").splitlines()[1]

    def declare(*, neurons: str = "L0N3", features: str = "0, 2") -> str:
        return f"{basis}\ngroup g = {neurons}, features {features} of t\n{fit(HALF)}"

    def content(trained: mechdsl.TrainedFit) -> str:
        return (trained.folder / "mask.json").read_text("utf-8")

    changes: dict[str, dict[str, Any]] = {
        "another neuron": {"neurons": "L0N4"},
        "another feature": {"features": "0, 3"},
    }
    check_keys(tmp_path, trains_all, declare, changes, PATCHES, content)
