"""Circuits of neurons, against passes in which every neuron of a layer reads separately."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mechdsl.base import limits
from mechdsl.diagnostics.rendering import render_full
from mechdsl.forward.hooks.batch import CircuitWrite
from mechdsl.forward.hooks.settled import CircuitSettler
from mechdsl.resolve.circuits import CircuitDraws, EdgeGraph
from mechdsl.resolve.sites import label_candidates
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.circuit_layout import list_edges as draw_edges
from mechdsl.vocab.metrics import EFFECTS

from ..execute import support as of_files
from ..execute.support import DIFFERENCE, MODES
from ..models import families
from ..quick import in_turn
from ..reference.forward import stack
from . import test_classifier_circuits as classifiers
from .circuits import EMBED, LOGITS, circuit_pass, mlp, neuron, outputs, reads
from .models import EXACT, WITHOUT_NORMS, double
from .support import (
    Array,
    agree,
    codes,
    difference,
    experiment,
    plain,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
)
from .test_ablated_circuits import (
    CASES,
    Case,
    ablated_values,
    check_stored_values,
    count_operations,
    fills,
    find_donors,
    key_heads,
    list_edges_of,
    shape_of,
)

Edge = tuple[str, str]
FAMILIES = (
    "llama",
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
    "qwen3",
    "mistral",
    "gemma2" + EXACT,
    "llama" + WITHOUT_NORMS,
    "gpt_neox" + WITHOUT_NORMS,
)
HERE = ("llama", "gpt2", "gpt_neox", "gemma2" + EXACT)
SOME: dict[str, list[Edge]] = {
    "embed -> L0N3, embed -> L0N5": [(EMBED, "L0N3"), (EMBED, "L0N5")],
    "L0H1 -> L0N5": [("L0H1", "L0N5")],  # not in parallel blocks
    "layer 0 heads 0..1 -> L1N2": [("L0H0", "L1N2"), ("L0H1", "L1N2")],
    "L0N3 -> L1H0.q": [("L0N3", "L1H0.q")],
    "layer 0 neurons 3..5 -> mlp_hidden layer 1 neurons 2..3": [
        (neuron(0, of), neuron(1, to)) for of in (3, 4, 5) for to in (2, 3)
    ],
    "embed -> L1N3": [(EMBED, "L1N3")],
    "L1N2 -> L2.mlp": [("L1N2", mlp(2))],
    "neurons 3 layers 0..1 -> logits": [("L0N3", LOGITS), ("L1N3", LOGITS)],
    "L2.mlp -> logits": [(mlp(2), LOGITS)],
    "embed -> L2H1.v": [(EMBED, "L2H1.v")],
}


@cache
def split(name: str, layers: Collection[int] = (0, 1)) -> dict[int, int]:
    """The layers whose neurons are nodes, with their numbers of neurons."""
    return dict.fromkeys(layers, shape_of(name).blocks[0].neurons)


@cache
def every_edge(name: str, layers: Collection[int] = (0, 1)) -> frozenset[Edge]:
    """The edges of the model, of every neuron in some layers."""
    parts = stack(name, double(name))
    before = reads(parts, key_heads(name), parallel=parts.parallel, split=split(name, layers))
    return frozenset((of, to) for to, own in before.items() for of in own)


@cache
def edges(name: str) -> tuple[str, frozenset[Edge]]:
    """The circuit's line in the file, and its edges."""
    written = [
        each
        for each in SOME
        if (each != "L0H1 -> L0N5" or not stack(name, double(name)).parallel)
        and (each != "embed -> L2H1.v" or key_heads(name) > 1)
    ]
    found = {edge for each in written for edge in SOME[each]}
    assert found <= every_edge(name)
    return f"circuit c = {', '.join(written)}\n", frozenset(found)


def expected(
    name: str,
    case: Case,
    donors: Mapping[int, int],
    ablated: frozenset[Edge] | None = None,
) -> list[float]:
    """The values of each prompt if the edges of the case carry the fill, or other edges."""
    circuit = edges(name)[1]
    if ablated is None:
        ablated = every_edge(name) - circuit if case.rule.startswith("all but") else circuit
    return ablated_values(name, case, donors, ablated, split=split(name))


EACH = in_turn(FAMILIES, list(MODES))


@cache
def results(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    """All cases in one file, whose rows share passes."""
    text = edges(name)[0] + "".join(case.experiment(key) for key, case in CASES.items())
    return run_file(text, data, name, mode, precise=True)


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize(("name", "mode"), EACH)
def test_ablated_edges_of_neurons_carry_the_fill(
    data: Path, name: str, mode: str, key: str
) -> None:
    case = CASES[key]
    found = results(data, name, mode)[key]
    donors = find_donors(name, case, found.measures[0].patched[0], expected)
    values = expected(name, case, donors)
    agree(found, (), {(): values}, unpatched(name, case.base), most=False, precise=True, large=1e-3)


SHARES = (0.05, 0.5, 0.9)
"""Of the edges of some neurons that a circuit keeps."""


@pytest.mark.parametrize(
    ("name", "mode"), in_turn(("llama", "gpt2", "gpt_neox", "qwen3", "gemma2" + EXACT), list(MODES))
)
def test_random_edges_of_some_neurons_carry_another_run(data: Path, name: str, mode: str) -> None:
    """Also of all neurons but one of a layer, so that the other one is a node alone."""
    named = {neuron(0, n) for n in range(2)}
    named |= {neuron(1, n) for n in range(shape_of(name).blocks[0].neurons - 1)}
    nodes = [
        (of, to) for of, to in sorted(every_edge(name)) if {*filter(is_neuron, (of, to))} <= named
    ]
    random = np.random.default_rng(0)
    kept = [[edge for edge in nodes if random.random() < share] for share in SHARES]
    text = "".join(
        f"circuit c{n} = {', '.join(f'{of} -> {to}' for of, to in own)}\n"
        + experiment(f"a{n}", f"ablate all but c{n} at tokens * with other")
        + experiment(f"b{n}", f"ablate c{n} at tokens * with other")
        for n, own in enumerate(kept)
    )
    found = run_file(text, data, name, mode, precise=True)
    for n, own in enumerate(kept):
        case = Case("", "other")
        values = expected(name, case, {}, every_edge(name) - frozenset(own))
        np.testing.assert_allclose(found[f"a{n}"].measures[0].patched[0], values, atol=1e-5)
        values = expected(name, case, {}, frozenset(own))
        np.testing.assert_allclose(found[f"b{n}"].measures[0].patched[0], values, atol=1e-5)


def is_neuron(node: str) -> bool:
    return node[0] == "L" and "N" in node


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2" + EXACT])
def test_every_neuron_of_a_layer_may_be_named(data: Path, name: str) -> None:
    """All of their edges to the logits carry another run: the MLP's edge does."""
    fill = "ablate {} at tokens * with other"
    text = """
        circuit c = mlp_hidden layers 0..1 neurons * -> logits
        circuit d = mlp_hidden layer 1 -> logits
        circuit w = mlp_out layers 0..1 -> logits
        circuit v = L1.mlp -> logits
    """
    text += "".join(experiment(f"x{own}", fill.format(own)) for own in "cwdv")
    found = run_file(text, data, name, "planned", precise=True)
    neurons, whole, second, alone = (found[f"x{own}"].measures[0].patched for own in "cwdv")
    np.testing.assert_allclose(neurons, whole, atol=1e-6)
    np.testing.assert_allclose(second, alone, atol=1e-6)
    if name != "gpt_neox":  # the last token is equal, and its MLP reads the embedding alone
        assert np.abs(neurons - second).max() > 1e-3
    assert np.abs(whole - unpatched(name)).max() > 1e-2


CIRCUIT = "circuit c = embed -> L0N3, L0N3 -> L1N2, L1N2 -> logits, L0N5 -> L1H0.v\n"
OTHER_RULES = {
    "neuron": ("ablate mlp_hidden layer 0 neuron 3 at {} with zero", "L0N3"),
    "another neuron": ("ablate mlp_hidden layer 0 neuron 4 at {} with zero", "L0N4"),
    "head": ("ablate L0H1 at {} with zero", "L0H1"),
    "later MLP": ("ablate mlp_out layer 2 at {} with zero", "L2.mlp"),
}


@pytest.mark.parametrize("key", OTHER_RULES)
@pytest.mark.parametrize("fill", ["zero", "other"])
@pytest.mark.parametrize(("name", "mode"), in_turn(HERE, list(MODES)))
def test_edges_of_neurons_carry_what_other_rules_write(
    data: Path, name: str, mode: str, fill: str, key: str
) -> None:
    rule, node = OTHER_RULES[key]
    edges_of_c = {(EMBED, "L0N3"), ("L0N3", "L1N2"), ("L1N2", LOGITS)}
    edges_of_c |= {("L0N5", "L1H0.v")}
    text = CIRCUIT
    for own, circuit in (("a", "all but c"), ("b", "c")):
        lines = f"ablate {circuit} at tokens * with {fill}", rule.format("tokens *")
        text += experiment(f"x{own}", *lines)
    found = run_file(text, data, name, mode, precise=True)
    model, given = double(name), fills(name, Case("", fill), {}, split(name))
    for own, ablated in (("a", every_edge(name) - edges_of_c), ("b", edges_of_c)):
        for n, (text_, record) in enumerate(zip(rows(), records(), strict=True)):
            held = {node: torch.zeros_like(given[n][EMBED])}
            at = tokens(text_, "tokens *")
            logits = circuit_pass(
                name, model, text_.ids, given[n], ablated, at, held=held, split=split(name)
            )
            value = difference(logits, record)
            assert found[f"x{own}"].measures[0].patched[0, n] == pytest.approx(value, abs=1e-5)


EFFECTS_OF = {
    "faithfulness": "all but c",
    "completeness": "c",
    "minimality": "all but c without each edge",
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_effects_of_neuron_circuits_equal_ratios_of_reference_means(data: Path, name: str) -> None:
    line = f"{DIFFERENCE.rpartition(' as ')[0]} as {{}}"
    lines, circuit = edges(name)
    text = lines + "".join(
        experiment(effect, f"ablate {rule} at tokens * with other", measure=line.format(effect))
        for effect, rule in EFFECTS_OF.items()
    )
    found = run_file(text, data, name, "planned", precise=True)
    case = Case("", "other")

    def mean(ablated: frozenset[Edge]) -> float:
        return float(np.mean(expected(name, case, {}, ablated)))

    every, base = every_edge(name), float(np.mean(unpatched(name)))
    empty, kept, cut = mean(every), mean(every - circuit), mean(circuit)

    def means(effect: str) -> list[float]:
        own = found[effect].measures[0]
        assert own.source is not None
        runs = (run.mean(1) for run in (own.patched, own.base, own.source))
        return EFFECTS[effect].of_means(*runs).tolist()

    assert means("faithfulness") == pytest.approx([(kept - empty) / (base - empty)], abs=1e-5)
    assert means("completeness") == pytest.approx([(cut - empty) / (base - empty)], abs=1e-5)
    labels = [str(cell.coords["edge"]) for cell in found["minimality"].cells]
    assert len(labels) == len(circuit)
    for label, value in zip(labels, means("minimality"), strict=True):
        of, to = label.split(" -> ")
        without = mean(every - (circuit - {(of, to)}))
        assert value == pytest.approx((kept - without) / (base - empty), abs=1e-5)
    assert found["faithfulness"].conventions["circuit"].startswith("`all but c`")
    said = found["faithfulness"].conventions["neurons of circuits"]
    assert said.startswith("3 neurons of layer 0, 2 neurons of layer 1; a neuron sends")


@pytest.mark.parametrize(("name", "mode"), in_turn(HERE, ("plain", "planned")))
def test_edges_of_neurons_may_have_positions(data: Path, name: str, mode: str) -> None:
    """With another circuit of the file in the same passes."""
    written = {
        "embed -> L0N3": ("last token", [(EMBED, "L0N3")]),
        "L0N3 -> L1N2": ("{cue token, last token}", [("L0N3", "L1N2")]),
        "L1N2 -> logits": ("", [("L1N2", LOGITS)]),
        "L0N5 -> L1H0.v": ("cue token", [("L0N5", "L1H0.v")]),
    }
    each = (f"{edge} at {at}" if at else edge for edge, (at, _) in written.items())
    text = f"circuit c = {', '.join(each)}\n{edges(name)[0].replace('circuit c', 'circuit d')}"
    for key, rule in (("a", "all but c"), ("b", "c"), ("d", "all but d")):
        text += experiment(f"x{key}", f"ablate {rule} at tokens * with other")
    found = run_file(text, data, name, mode, precise=True)
    given = fills(name, Case("", "other"), {}, split(name))
    values = expected(name, Case("all but", "other"), {})
    np.testing.assert_allclose(found["xd"].measures[0].patched[0], values, atol=1e-5)
    for n, (row, record) in enumerate(zip(rows(), records(), strict=True)):
        placed: dict[Edge, Tensor] = {}
        for at, own in written.values():
            there = torch.zeros(len(row.ids), 1, dtype=torch.double)
            there[list(tokens(row, at or "tokens *"))] = 1
            placed |= dict.fromkeys(own, there)
        rest = {edge: 1 - placed.get(edge, torch.zeros(1)) for edge in every_edge(name)}
        for key, ablated in (("a", rest), ("b", placed)):
            logits = circuit_pass(
                name,
                double(name),
                row.ids,
                given[n],
                ablated,
                range(len(row.ids)),
                split=split(name),
            )
            value = difference(logits, record)
            assert found[f"x{key}"].measures[0].patched[0, n] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(("name", "rule"), in_turn(("llama", "gpt2", HERE[-1]), ("c", "all but c")))
def test_random_circuits_carry_the_fill_of_neuron_circuits(
    data: Path, name: str, rule: str
) -> None:
    """Each draw is one of `CircuitDraws`, whose edges the reference ablates."""
    lines = "from other into clean", f"ablate {rule} at tokens * with other", "against random(3)"
    found = run_file(CIRCUIT + experiment("e", *lines), data, name, "planned", precise=True)["e"]
    written = [("embed", "L0N3"), ("L0N3", "L1N2"), ("L1N2", LOGITS), ("L0N5", "L1H0.v")]
    graph = EdgeGraph(shape_of(name), {("mlp_hidden", 0): (3, 5), ("mlp_hidden", 1): (2,)})
    label = {label_candidates((edge,)): edge for edge in graph.every}
    circuit = [label[f"{of} -> {to}"] for of, to in written]
    given, effects = fills(name, Case("", "other"), {}, split(name)), list[float]()
    for drawn in CircuitDraws(graph, circuit, 0).draws(3):
        own = {each for edge in drawn for each in list_edges_of(edge, graph.every)}
        ablated = every_edge(name) - own if rule != "c" else own
        values = [
            circuit_pass(
                name, double(name), row.ids, fill, ablated, range(len(row.ids)), split=split(name)
            )
            for row, fill in zip(rows(), given, strict=True)
        ]
        patched = [difference(each, r) for each, r in zip(values, records(), strict=True)]
        effects.append(float(np.mean(patched - unpatched(name))))
    band = found.control(0)
    assert band is not None
    assert (band.low[0], band.high[0]) == pytest.approx((min(effects), max(effects)), abs=1e-5)
    assert found.conventions["controls"].startswith("random circuits, 3 draws, seed 0; of 4 edges")


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("rule", ["all but c", "c"])
def test_plan_counts_neurons_of_each_distinct_input(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, rule: str
) -> None:
    line = f"ablate {rule} at tokens * with other"
    done, planned = count_operations(data, monkeypatch, name, edges(name)[0], line)
    assert done / 1.6 < planned < done * 1.6


# --- errors and keys ------------------------------------------------------------------------------

WRONG_EDGES = {
    "embed -> L1N3, L1.mlp -> logits": ("E0334", "`L1N3`, a neuron of this MLP"),
    "embed -> mlp_norm layers *, L0N1 -> logits": ("E0334", "`L0N1`, a neuron of this MLP"),
    "embed -> mlp_hidden layer 1 neuron 0..3": ("E0304", "`neurons`"),
    "embed -> L1N900": ("E0301", "neuron 900"),
    "L1N3 -> L1N4": ("E0335", "`L1N4`"),
    "L1N3 -> L0.mlp": ("E0335", "`L0.mlp`"),
    "L1N3 -> q layer 1 heads *": ("E0335", "`logits`"),
}


@pytest.mark.parametrize("edge", WRONG_EDGES)
def test_edges_of_neurons_that_the_model_lacks_are_errors(data: Path, edge: str) -> None:
    text = f"circuit c = {edge}\n" + experiment("e", "ablate c at tokens * with zero")
    code, said = WRONG_EDGES[edge]
    (problem,) = (each for each in try_file(text, data, "gpt2")[1] if each.code == code)
    assert said in render_full([problem], color=False, width=200)


def test_more_neurons_than_the_limit_are_an_error(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CIRCUIT_NEURONS", 3)
    rule = experiment("e", "ablate c at tokens * with zero")
    for edge, count in (("embed -> neurons 0..3 layer 0", 4), (edges("gpt2")[0][12:-1], 5)):
        (problem,) = try_file(f"circuit c = {edge}\n{rule}", data, "gpt2")[1]
        assert problem.code == "E0207"
        assert f"names {count} neurons, and at most 3 can be nodes" in problem.message


UNSUPPORTED = {
    "path": "path L0H1 -> logits at last token",
    "path to neurons": "path L0H1 -> mlp_hidden layer 2 neurons * at last token",
    "MLP": "patch mlp_out layer 1 at last token",
    "weights of a neuron": "scale weights of mlp_out layer 1 neuron 2 by 0",
    "input of an MLP": "patch mlp_norm layer 1 at last token",
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_rules_that_do_not_act_on_nodes_are_errors(data: Path, key: str) -> None:
    lines = ("from other into clean", "ablate c at tokens * with zero", UNSUPPORTED[key])
    assert "E0108" in codes(CIRCUIT + experiment("e", *lines), data)


@pytest.mark.parametrize(("name", "code"), [("gpt_oss", "E0413")])
def test_models_whose_neurons_cannot_be_nodes_are_an_error(
    data: Path, name: str, code: str
) -> None:
    text = CIRCUIT + experiment("e", "ablate c at tokens * with zero")
    result, problems = try_file(text, data, name)
    assert result is None
    assert {each.code for each in problems if each.severity == "error"} == {code}


CHANGES = {
    "edge": ("embed -> L0N3", "embed -> L0N4"),
    "rest": ("ablate c", "ablate all but c"),
    "fill": ("with zero", "with other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stored_values_depend_on_edges_of_neurons(tmp_path: Path, change: str) -> None:
    check_stored_values(CIRCUIT, CHANGES[change], tmp_path, 1e-5)


def test_picture_of_a_circuit_has_its_neurons(data: Path) -> None:
    text = CIRCUIT + experiment("e", "ablate c at tokens * with zero")
    circuit = run_file(text, data, "gpt2", "plain")["e"].circuit
    assert circuit is not None
    assert circuit.neurons == ("L0N3", "L0N5", "L1N2")
    drawn = draw_edges(circuit, None)
    assert [each.text for each in drawn] == [
        "embed -> L0N3",
        "L0N3 -> L1N2",
        "L0N5 -> L1H0.v",
        "L1N2 -> logits",
    ]
    ends = {end for each in drawn for end in (each.sender, each.receiver)}
    assert {(end.label, end.level) for end in ends if end.kind == "neuron"} == {
        ("L0N3", (0, 4)),
        ("L0N5", (0, 4)),
        ("L1N2", (1, 4)),
    }


# --- further families -----------------------------------------------------------------------------

NEURONS = (
    "embed -> mlp_hidden layers 0..1 neurons *, mlp_hidden layer 0 neurons * -> logits, "
    "mlp_hidden layer 1 neurons * -> L2H0.q"
)
MLPS = "embed -> mlp_norm layers 0..1, L0.mlp -> logits, L1.mlp -> L2H0.q"
SAME = f"circuit c = {NEURONS}\ncircuit d = {MLPS}\n"


@pytest.mark.parametrize("name", ["phi3", "gptj", "gpt_neo", "cohere", "falcon", "apertus", "phi"])
def test_all_neurons_of_a_layer_equal_its_mlp_as_a_node(data: Path, name: str) -> None:
    """The MLP of `d` isn't computed at tokens of `d`, in passes of the same file."""
    text = SAME + "".join(
        experiment(f"x{n}{own}", f"ablate {rule} {own} at tokens * with other")
        for own in "cd"
        for n, rule in enumerate(("", "all but"))
    )
    found = run_file(text, data, name, "planned", precise=True)
    values = {key: own.measures[0].patched for key, own in found.items()}
    for n in range(2):
        np.testing.assert_allclose(values[f"x{n}c"], values[f"x{n}d"], atol=1e-9)
        assert np.abs(values[f"x{n}c"] - found["x0c"].measures[0].base).max() > 1e-2


BESIDES = {
    "alone": "",
    "neurons": experiment("x", "ablate all but c at tokens * with other"),
    "rules": experiment(
        "x",
        "from other into clean",
        "path L0H1 -> q layer 2 heads * at last token",
        "patch mlp_hidden layer 2 neuron 3 at last token",
    ),
    "read": experiment(
        "x",
        "ablate all but d at tokens * with zero",
        measure="measure cosine(L1.mlp, clean) as raw",
    ),
}
"""Other experiments of a file, whose rows are full passes with steps inside of MLPs."""


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_experiments_of_a_file_do_not_make_circuits_compute_settled_mlps(
    data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs_of: dict[str, set[int]] = {}
    values: dict[str, Array] = {}
    settle = CircuitSettler.settle
    for key, other in BESIDES.items():
        seen = outputs_of[key] = set()

        def spy(*given: Any, seen: set[int] = seen) -> CircuitWrite:
            found = settle(*given)
            seen.update(found.outputs)
            return found

        monkeypatch.setattr(CircuitSettler, "settle", spy)
        text = SAME + experiment("e", "ablate all but d at tokens * with other") + other
        found = run_file(text, data, name, "planned", precise=True)
        values[key] = found["e"].measures[0].patched
    assert all(own == {1, 2} for own in outputs_of.values())
    for own in values.values():
        np.testing.assert_allclose(own, values["alone"], atol=1e-9)


@pytest.mark.parametrize("rule", ["c", "all but c"])
@pytest.mark.parametrize(
    "name",
    [
        "distilbert",
        "bert",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("roberta", "electra", "roberta-prelayernorm", "mpnet", "camembert")
        ),
    ],
)
def test_all_neurons_equal_the_mlp_of_an_encoder(tmp_path: Path, name: str, rule: str) -> None:
    measure = "measure logit(class answer) - logit(class wrong) as raw"
    text = SAME + "".join(
        of_files.experiment(
            f"x{own}", "prompts p", f"ablate {line} at tokens * with other", measure
        )
        for own, line in (("c", rule), ("d", rule.replace("c", "d")))
    )
    model = classifiers.bare_family(name)
    found = of_files.run_file(text, tmp_path, model, prompts=classifiers.PROMPTS)
    neurons, mlps = (found[key].measures[0].patched for key in ("xc", "xd"))
    np.testing.assert_allclose(neurons, mlps, atol=1e-5)
    assert np.abs(neurons - found["xc"].measures[0].base).max() > 1e-2


@pytest.mark.parametrize("before", [True, False])
def test_all_neurons_equal_an_mlp_of_two_maps(tmp_path: Path, *, before: bool) -> None:
    """In OPT, whose norms precede or follow the sublayers."""
    config: dict[str, Any] = {
        "vocab_size": families.VOCABULARY,
        "hidden_size": 24,
        "word_embed_proj_dim": 24,
        "ffn_dim": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "do_layer_norm_before": before,
    }
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **config))
    families.draw(made, 0)
    text = SAME + "".join(
        of_files.experiment(
            f"x{own}{n}", "prompts p", f"ablate {line} at tokens * with other", DIFFERENCE
        )
        for own in "cd"
        for n, line in enumerate((own, f"all but {own}"))
    )
    found = of_files.run_file(text, tmp_path, made.eval())
    values = {key: own.measures[0].patched for key, own in found.items()}
    for n in range(2):
        np.testing.assert_allclose(values[f"xc{n}"], values[f"xd{n}"], atol=1e-4)
        assert np.abs(values[f"xc{n}"] - found["xc0"].measures[0].base).max() > 1e-2


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_neurons_of_mlps_that_read_more_than_the_stream_are_an_error(data: Path, name: str) -> None:
    result, problems = try_file(
        CIRCUIT + experiment("e", "ablate c at tokens * with zero"), data, name
    )
    assert result is None
    assert "the neurons aren't computed inside one module" in str(problems)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_inputs_without_most_senders_have_no_rounding_of_the_stream(data: Path, name: str) -> None:
    """Where most edges carry 0, the input is the sum of the others: in 32 bits as in 64 bits."""
    text = edges(name)[0] + experiment("e", "ablate all but c at tokens * with zero")
    precise = run_file(text, data, name, "planned", precise=True)["e"].measures[0].patched
    found = run_file(text, data, name, "planned")["e"].measures[0].patched
    np.testing.assert_allclose(found, precise, atol=1e-5)


def test_circuits_with_equal_ablated_edges_and_other_neurons_differ(data: Path) -> None:
    """All edges of one neuron are in each circuit: the ablated edges are those of the others."""
    kept = "embed -> L0N{0}, layer 0 heads * -> L0N{0}, L0N{0} -> logits, L0N{0} -> L1.mlp, "
    kept += "L0N{0} -> L2.mlp" + "".join(
        f", L0N{{0}} -> {letter} layers 1..2 heads *" for letter in "qkv"
    )
    text = "".join(f"circuit c{n} = {kept.format(n)}\n" for n in (3, 4))
    text += "".join(
        experiment(f"x{n}", f"ablate all but c{n} at tokens * with zero") for n in (3, 4)
    )
    found = run_file(text, data, "gpt2", "planned", precise=True)
    for n in (3, 4):
        nodes = {edge for edge in every_edge("gpt2", (0,)) if neuron(0, n) in edge}
        ablated = every_edge("gpt2", (0,)) - nodes
        for number, (row, record) in enumerate(zip(rows(), records(), strict=True)):
            model = double("gpt2")
            own = outputs(plain("gpt2", row), stack("gpt2", model), (0,))
            given = {node: torch.zeros_like(value) for node, value in own.items()}
            logits = circuit_pass(
                "gpt2",
                model,
                row.ids,
                given,
                ablated,
                range(len(row.ids)),
                split=split("gpt2", (0,)),
            )
            value = found[f"x{n}"].measures[0].patched[0, number]
            assert value == pytest.approx(difference(logits, record), abs=1e-5)
    values = [found[f"x{n}"].measures[0].patched for n in (3, 4)]
    assert np.abs(values[0] - values[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("first", "second", "advice"),
    [
        ("ablate c at tokens * with zero", "ablate d at tokens * with zero", "join the edges"),
        ("ablate c at tokens * with other", "ablate d at tokens * with zero", "an experiment for"),
        ("ablate all but c at tokens * with zero", "ablate d at tokens * with zero", "an experi"),
    ],
)
def test_second_circuit_is_joined_only_with_the_same_fill(
    data: Path, first: str, second: str, advice: str
) -> None:
    text = "circuit c = embed -> L0H1.q\ncircuit d = embed -> L1H1.q\n"
    result, problems = try_file(text + experiment("e", first, second), data, "llama")
    assert result is None
    (problem,) = (each for each in problems if each.severity == "error")
    assert problem.code == "E0108"
    assert advice in render_full([problem], color=False, width=200)
