"""Circuits of encoder-decoders with neurons as nodes, against plain hooks for one unpadded prompt
in which every neuron of an MLP reads and sends separately."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.diagnostics.rendering import render_full
from mechdsl.fits.reports import CircuitReport, MaskReport
from mechdsl.loading.loader import adopt_model
from mechdsl.resolve.circuit_files import edge_of_name
from mechdsl.resolve.circuits import AskedCircuits, EdgeGraph, draw_circuits
from mechdsl.resolve.circuits import list_edges as list_model_edges
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.types import SiteLayer
from mechdsl.show.reports.circuit_layout import list_edges as list_drawn_edges

from .encoder_decoder_circuits import (
    EMBED,
    ENCODED,
    LOGITS,
    Edge,
    Node,
    Pass,
    at_tokens,
    list_edges,
    run,
)
from .encoder_decoders import HEADS, LAYERS, model, starts, text, tokenizer
from .support import (
    DIFFERENCE,
    PROMPTS,
    ROWS,
    as_in_the_data,
    by_name,
    experiment,
    token,
    try_file,
    write_rows,
)
from .test_encoder_decoder_circuits import (
    CASES,
    NEURONS,
    SCORES,
    SPLIT,
    expected,
    fills,
    fitted,
    inputs,
    node_of,
    opened,
    path_scores,
    placed_values,
    ran,
    saved,
)

slow = pytest.mark.slow
OTHERS = ("mt5", "umt5", "mbart", "m2m_100", "marian", "pegasus", "t5gemma sliding")
FAMILIES = [
    "t5 split",
    "bart split",
    "t5gemma split",
    *(pytest.param(f"{family} split", marks=slow) for family in OTHERS),
]
SOME_FAMILIES = [
    "t5 split",
    *(pytest.param(f"{each} split", marks=slow) for each in ("bart", "t5gemma")),
]


def neuron(layer: int, number: int, stack: str = "") -> tuple[str, int, int]:
    return f"mlp_hidden {stack}".strip(), layer, number


SOME: dict[str, list[Edge]] = {
    "embed -> L0N3": [(EMBED, neuron(0, 3))],
    "z cross layer 0 heads * -> L0N5": [
        (("z cross", 0, head), neuron(0, 5)) for head in range(HEADS)
    ],
    "z layer 1 head 0 -> mlp_hidden layer 1 neurons 2..3": [
        (("z", 1, 0), neuron(1, n)) for n in (2, 3)
    ],
    "L0N3 -> L1N2": [(neuron(0, 3), neuron(1, 2))],
    "L0N5 -> q cross layer 1 head 1": [(neuron(0, 5), ("q cross", 1, 1))],
    "L0N5 -> L1H0.v": [(neuron(0, 5), ("v", 1, 0))],
    "L1N2 -> L2.mlp": [(neuron(1, 2), ("mlp_norm", 2, 0))],
    "neurons 3 layers 0..1 -> logits": [(neuron(layer, 3), LOGITS) for layer in (0, 1)],
    "L2.mlp -> logits": [(("mlp_out", 2, 0), LOGITS)],
    "embed encoder -> mlp_norm encoder layer 1": [(ENCODED, ("mlp_norm encoder", 1, 0))],
    "mlp_out encoder layer 1 -> v cross layer 1 head 0": [
        (("mlp_out encoder", 1, 0), ("v cross", 1, 0))
    ],
    "embed encoder -> mlp_hidden encoder layer 0 neuron 4": [(ENCODED, neuron(0, 4, "encoder"))],
    "z encoder layer 0 head 1 -> mlp_hidden encoder layer 0 neurons 6..7": [
        (("z encoder", 0, 1), neuron(0, n, "encoder")) for n in (6, 7)
    ],
    "mlp_hidden encoder layer 0 neuron 4 -> q encoder layer 1 heads *": [
        (neuron(0, 4, "encoder"), ("q encoder", 1, head)) for head in range(HEADS)
    ],
    "mlp_hidden encoder layer 0 neuron 6 -> k cross layer 2 head 1": [
        (neuron(0, 6, "encoder"), ("k cross", 2, 1))
    ],
    "mlp_hidden encoder layer 0 neuron 7 -> v cross layers * heads *": [
        (neuron(0, 7, "encoder"), ("v cross", layer, head))
        for layer in range(LAYERS)
        for head in range(HEADS)
    ],
}
CIRCUIT = f"circuit c = {', '.join(SOME)}\n"


def named(names: Collection[str] = SOME) -> set[Edge]:
    return {edge for name in names for edge in SOME[name]}


@pytest.mark.parametrize("mode", ["planned", "padded on the right", "small passes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_circuit_of_neurons_equals_hooks(family: str, mode: str, tmp_path: Path) -> None:
    """Edges that the circuit doesn't name are also those of every other neuron."""
    lines = CIRCUIT + "".join(
        experiment(f"e{n}", "prompts p", f"ablate {rule} at {at} with {fill}", DIFFERENCE)
        for n, (rule, fill, at) in enumerate(CASES)
    )
    found = ran(family, lines, tmp_path, mode)
    every = set(list_edges(opened(family)))
    assert named() < every
    base = expected(family, (), "zero", "tokens *")
    for n, (rule, fill, at) in enumerate(CASES):
        ablated = named() if rule == "c" else every - named()
        values = found[f"e{n}"].measures[0].patched[0]
        own = expected(family, ablated, fill, at)
        np.testing.assert_allclose(values, own, atol=1e-4, err_msg=str(CASES[n]))
        assert np.abs(own - base).max() > 1e-3, CASES[n]


PLACED = {
    "L0N3 -> L1N2": "last token",
    "embed encoder -> mlp_hidden encoder layer 0 neuron 4": "subject tokens",
    "mlp_hidden encoder layer 0 neuron 7 -> v cross layers * heads *": "token 2",
}


@torch.no_grad()
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_edges_of_neurons_at_positions_equal_hooks(family: str, tmp_path: Path) -> None:
    edges = ", ".join(f"{edge} at {PLACED[edge]}" if edge in PLACED else edge for edge in SOME)
    rules = ("ablate c at tokens * with zero", "ablate all but c at tokens * with turned")
    lines = f"circuit c = {edges}\n" + "".join(
        experiment(f"e{n}", "prompts p", rule, DIFFERENCE) for n, rule in enumerate(rules)
    )
    found = ran(family, lines, tmp_path)
    for n, fill in enumerate(("zero", "turned")):
        own = placed_values(family, SOME, PLACED, fill, all_but=fill == "turned")
        np.testing.assert_allclose(found[f"e{n}"].measures[0].patched[0], own, atol=1e-4)


@dataclass
class Held(Pass):
    """A pass in which neurons send 0 at some tokens."""

    held: dict[Node, list[int]] = field(default_factory=dict[Node, list[int]])

    def keep(self, sender: Node, value: Tensor) -> Tensor:
        kept = value.clone()
        kept[self.held.get(sender, [])] = 0
        return super().keep(sender, kept)


@torch.no_grad()
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_edges_of_neurons_carry_what_other_rules_write(family: str, tmp_path: Path) -> None:
    """In the same run, of both streams, and in the run that gives the fill."""
    first = "ablate mlp_hidden encoder layer 0 neuron 4 at subject tokens with zero"
    second = "ablate mlp_hidden layer 1 neuron 2 at last token with zero"
    given = (("c", first), ("all but c", second))
    lines = CIRCUIT + "".join(
        experiment(f"e{n}", "prompts p", f"ablate {rule} at tokens * with turned", more, DIFFERENCE)
        for n, (rule, more) in enumerate(given)
    )
    derived = f"run cut {{ {first} }}"
    rule = "ablate all but c at tokens * with cut"
    lines += experiment("d", "prompts p", derived, rule, DIFFERENCE)
    found, every = ran(family, lines, tmp_path), list_edges(opened(family))
    values: dict[str, list[float]] = {"e0": [], "e1": [], "d": []}
    for number, record in enumerate(ROWS):
        of, last = text(record), len(starts(family))
        sizes, given = (len(of.ids), last), inputs(family, record)
        whole = at_tokens(every, range(sizes[0]), range(last), sizes)
        own = {edge: whole[edge] for edge in named()}
        filled = fills(family, number, "turned")
        held = {neuron(0, 4, "encoder"): [*of.subject]}
        runs = {"e0": run(Held(opened(family), filled, own, held=held), given)}
        rest = {edge: share for edge, share in whole.items() if edge not in own}
        held = {neuron(1, 2): [last - 1]}
        runs["e1"] = run(Held(opened(family), filled, rest, held=held), given)
        cut = Held(opened(family), held={neuron(0, 4, "encoder"): [*of.subject]})
        run(cut, given)
        runs["d"] = run(Pass(opened(family), cut.given, rest), given)
        for name, logits in runs.items():
            value = float(logits[-1, token(record["a"])] - logits[-1, token(record["b"])])
            values[name].append(value)
    base = expected(family, (), "zero", "tokens *")
    for name, each in values.items():
        np.testing.assert_allclose(found[name].measures[0].patched[0], each, atol=1e-4)
        assert np.abs(np.array(each) - base).max() > 1e-3, name


NODES: dict[SiteLayer, tuple[int, ...]] = {
    ("mlp_hidden", 0): (3, 5),
    ("mlp_hidden", 1): (2,),
    ("mlp_hidden encoder", 0): (4, 6),
}
GROUP = (
    "group g = L0N3, L0N5, L1N2, mlp_hidden encoder layer 0 neuron 4, "
    "mlp_hidden encoder layer 0 neuron 6"
)


def separate(node: Node) -> list[Node]:
    """The nodes of the reference that a node stands for: the other neurons of its layer."""
    component, _, stack = node[0].partition(" ")
    if component not in ("mlp_out", "mlp_norm") or (stack, node[1]) not in SPLIT:
        return [node]
    own = NODES[f"mlp_hidden {stack}".strip(), node[1]]
    return [neuron(node[1], n, stack) for n in range(NEURONS) if n not in own]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("t5 split", "eap"),
        ("bart split", "gim at a token of the decoder"),
        *(
            pytest.param(family, name, marks=slow)
            for family in ("t5 split", "bart split", "mt5 split", "t5gemma split")
            for name in SCORES
            if "mean" not in name
        ),
    ],
)
def test_scores_of_edges_of_neurons_equal_derivatives(
    family: str, name: str, tmp_path: Path
) -> None:
    """Those of the other neurons of a layer are the sums of theirs."""
    maker, source, fill, at, path, steps = SCORES[name]
    found = fitted(family, f"{maker}, nodes: g", source, f"at {at}", tmp_path, GROUP)
    every = [path_scores(family, n, fill, at, path, steps) for n in range(len(ROWS))]
    total = {edge: sum(each[edge] for each in every) / len(every) for edge in every[0]}
    parts = {
        (of, to): [(a, b) for a in separate(of) for b in separate(to) if (a, b) in total]
        for of, to in found
    }
    assert sorted(edge for own in parts.values() for edge in own) == sorted(total)
    values = np.array([*found.values()])
    others = np.array([sum(total[each] for each in own) for own in parts.values()])
    np.testing.assert_allclose(values, others, atol=1e-4, rtol=5e-5, err_msg=name)
    assert np.ptp(others) > 1e-3


@pytest.mark.parametrize(
    ("maker", "rule"),
    [
        ("eap(size: 60)", "all but c"),
        ("mask(size: 60), steps: 8", "c"),
        pytest.param("acdc(threshold: 0.0003)", "all but c", marks=slow),
    ],
)
def test_report_of_a_circuit_of_neurons_equals_the_ablation(
    maker: str, rule: str, tmp_path: Path
) -> None:
    """Of the training, of the rule, and of hooks."""
    options = "nodes: g, validation: 0%, measure_on_training_rows: true"
    call = f"{maker}, prompts: p, from: turned, {options}, maximise: logit(answer) - logit(wrong)"
    lines = experiment("e", "prompts p", f"ablate {rule} at tokens * with turned", DIFFERENCE)
    path = tmp_path / "file.mech"
    head = f'mech 1\nmodel m = local("handed over")\n{PROMPTS}\n{GROUP}\ncircuit c = fit({call})'
    path.write_text(f"{head} at tokens *\n{lines}")
    write_rows(tmp_path)
    given = {"m": (model("t5 split"), tokenizer())}
    (found,) = mechdsl.fit(path, given, store=tmp_path / "store")
    assert isinstance(found.report, CircuitReport | MaskReport)
    result = as_in_the_data(mechdsl.run(path, given, store=tmp_path / "store")["e"])
    measure = result.measures[0]
    assert found.report.trained == pytest.approx(measure.patched.mean(), abs=1e-5)
    assert result.circuit is not None
    every = set(list_edges(opened("t5 split")))
    kept = {
        (a, b)
        for of, to in result.circuit.edges
        for a in separate(node_of(of, "out"))
        for b in separate(node_of(to, "norm"))
    }
    assert kept < every
    ablated = every - kept if rule == "all but c" else kept
    own = expected("t5 split", ablated, "turned", "tokens *")
    np.testing.assert_allclose(measure.patched[0], own, atol=1e-4)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_circuit_of_neurons_of_a_file_equals_hooks(family: str, tmp_path: Path) -> None:
    edges = [edge for edge in SOME if "s " not in edge]
    rule = "ablate all but c at tokens * with turned"
    result, problems = saved(tmp_path, edges, family, rule)
    (found,) = by_name(result, problems).values()
    ablated = set(list_edges(opened(family))) - named(edges)
    own = expected(family, ablated, "turned", "tokens *")
    np.testing.assert_allclose(found.measures[0].patched[0], own, atol=1e-4)


def test_every_edge_of_neurons_is_read_by_the_name_that_a_training_writes() -> None:
    loaded, _ = adopt_model("m", model("t5"), tokenizer())
    assert loaded is not None
    others = 0
    for edge in list_model_edges(loaded.shape, NODES):
        if all("mlp_hidden" not in end.site or end.unit is not None for end in edge):
            assert edge_of_name(label_candidates((edge,)), loaded.shape, {}) == edge
        else:
            others += 1
    assert others


@pytest.mark.parametrize("stack", ["", "encoder"])
def test_random_circuits_of_neurons_are_between_the_same_nodes(stack: str) -> None:
    loaded, _ = adopt_model("m", model("t5"), tokenizer())
    assert loaded is not None
    every = list_model_edges(loaded.shape, NODES)
    site = f"mlp_hidden {stack}".strip()
    circuit = frozenset(edge for edge in every if any(e.site == site and e.unit for e in edge))
    drawn = draw_circuits(AskedCircuits(loaded.shape, circuit, 0, 5, (), None, NODES))
    graph = EdgeGraph(loaded.shape, NODES)
    assert len(drawn.circuits) == 5
    for each in drawn.circuits:
        assert len(each) == len(circuit)
        assert set(each) <= set(every)
        assert graph.covers([edge for edge in each if isinstance(edge, tuple)]) or not (
            drawn.is_connected
        )


ERRORS = {
    "mlp_out encoder layer 0 -> k cross layer 0 head 0": (
        "E0334",
        "the circuit names `mlp_hidden encoder layer 0 neuron 4`, a neuron of this MLP",
    ),
    "L0N3 -> logits, L0.mlp -> logits": ("E0334", "the circuit names `L0N3`, a neuron of"),
    "mlp_hidden encoder layer 0 neuron 4 -> logits": ("E0335", "only through `k cross`"),
    "mlp_hidden encoder layer 0 neuron 24 -> k cross layer 0 head 0": ("E0301", "neurons 0..23"),
    "mlp_hidden cross layer 0 neuron 0 -> logits": ("E0413", "cross"),
}


@pytest.mark.parametrize("edges", ERRORS)
def test_neuron_that_cant_be_a_node_is_an_error(edges: str, tmp_path: Path) -> None:
    first = "embed encoder -> mlp_hidden encoder layer 0 neuron 4"
    rule = experiment("e", "prompts p", "ablate c at tokens * with zero", DIFFERENCE)
    lines = f"circuit c = {first}, {edges}\n{rule}"
    result, problems = try_file(lines, tmp_path, model("t5"), tokenizer=tokenizer())
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    code, words = ERRORS[edges]
    assert words in render_full([problem], color=False, width=200)
    assert problem.code == code


def test_rule_on_the_mlp_of_named_neurons_is_an_error(tmp_path: Path) -> None:
    rule = "patch mlp_out encoder layer 0 at subject token"
    edge = "embed encoder -> mlp_hidden encoder layer 0 neuron 4"
    lines = f"circuit c = {edge}\n" + experiment(
        "e",
        "prompts p",
        "from other into clean",
        "ablate c at tokens * with zero",
        rule,
        DIFFERENCE,
    )
    result, problems = try_file(lines, tmp_path, model("t5"), tokenizer=tokenizer())
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    assert problem.code == "E0108"
    assert "`mlp_hidden encoder layer 0`" in render_full([problem], color=False, width=200)


def test_picture_has_neurons_of_the_encoder_in_their_layer(tmp_path: Path) -> None:
    rule = "ablate all but c at tokens * with turned"
    lines = CIRCUIT + experiment("e", "prompts p", rule, DIFFERENCE, 'report graph to "c.svg"')
    found = ran("t5", lines, tmp_path)["e"]
    assert found.circuit is not None
    assert found.circuit.neurons
    said = found.conventions["neurons of circuits"]
    assert said.startswith(
        "2 neurons of layer 0, 2 neurons of layer 1, 3 neurons of encoder layer 0; a neuron"
    )
    edges = list_drawn_edges(found.circuit, None)
    ends = {end.title: end for edge in edges for end in (edge.sender, edge.receiver)}
    assert ends["encoder L0N4"].kind == ends["L1N2"].kind == "neuron"
    order = ["embed encoder", "encoder L0H1", "encoder L0N4", "encoder L1H0", "embed", "L0N3"]
    levels = [ends[title].level for title in order]
    assert levels == sorted(levels)
