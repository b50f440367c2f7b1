"""Circuits of features, against passes in which every named feature reads separately."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base import limits
from mechdsl.diagnostics.rendering import render_full
from mechdsl.resolve.circuits import CircuitDraws, EdgeGraph
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.types import BasisMember, FeatureNodes, SiteLayer, SpannedBasis
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.circuit_layout import list_edges as draw_edges

from ..execute import support as of_files
from ..execute.support import MODES
from ..quick import in_turn
from ..reference.forward import stack
from . import test_classifier_circuits as classifiers
from . import test_dictionaries, test_transcoders
from .circuits import EMBED, LOGITS, Features, circuit_pass, mlp, neuron, reads
from .models import double
from .support import (
    agree,
    codes,
    difference,
    experiment,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
)
from .test_ablated_circuits import (
    CASES,
    PAIR,
    Case,
    ablated_values,
    check_stored_values,
    count_operations,
    fills,
    find_donors,
    key_heads,
    shape_of,
)

Edge = tuple[str, str]
FAMILIES = ("llama", "gpt2", "gpt_neox", "gpt_neox_sequential", "qwen3")
KINDS = ("standard", "topk", "layer_norm", "jumprelu")
"""Architectures of the dictionary of layer 0; that of layer 1 is a transcoder."""
NODES = {0: ("f", (3, 5, 7)), 1: ("t", (0, 2))}
"""Layer → the basis and the features that are nodes."""


def label(layer: int, number: int) -> str:
    return f"feature {number} of {NODES[layer][0]}"


def definitions(name: str, kind: str) -> str:
    return (
        f'basis f = sae("{name}_{kind}/sae") at mlp_out layer 0\n'
        f'basis t = transcoder("{name}_{kind}/of_mlp") at mlp_out layer 1\n'
    )


@cache
def write_dictionaries(data: Path, name: str, kind: str) -> tuple[Any, Any]:
    """Write an autoencoder of a kind and a skip transcoder for a model, and return them."""
    folder = data / f"{name}_{kind}"
    folder.mkdir(exist_ok=True)
    width = double(name).config.hidden_size
    first = test_dictionaries.make(folder, kind, width)
    return first, test_transcoders.make(folder, "skip_transcoder", width)


@cache
def dictionaries(data: Path, name: str, kind: str) -> dict[int, Features]:
    """Write the dictionaries of a model."""
    first, second = write_dictionaries(data, name, kind)
    ends = [{label(layer, n): n for n in own} for layer, (_, own) in NODES.items()]
    return {0: Features(first, ends[0]), 1: Features(second, ends[1], "mlp_norm")}


@cache
def every_edge(data: Path, name: str, kind: str) -> frozenset[Edge]:
    parts = stack(name, double(name))
    own = dictionaries(data, name, kind)
    before = reads(parts, key_heads(name), parallel=parts.parallel, features=own)
    return frozenset((of, to) for to, given in before.items() for of in given)


SOME: dict[str, list[Edge]] = {
    "embed -> features 3, 5 of f": [(EMBED, label(0, 3)), (EMBED, label(0, 5))],
    "L0H1 -> feature 5 of f": [("L0H1", label(0, 5))],  # not in parallel blocks
    "layer 0 heads 0..1 -> feature 0 of t": [("L0H0", label(1, 0)), ("L0H1", label(1, 0))],
    "features 3, 5 of f -> features 0, 2 of t": [
        (label(0, of), label(1, to)) for of in (3, 5) for to in (0, 2)
    ],
    "feature 7 of f -> L1H0.q": [(label(0, 7), "L1H0.q")],
    "embed -> L0.mlp": [(EMBED, mlp(0))],
    "L1.mlp -> logits": [(mlp(1), LOGITS)],
    "L0.mlp -> L1.mlp": [(mlp(0), mlp(1))],
    "feature 2 of t -> L2.mlp": [(label(1, 2), mlp(2))],
    "several -> logits": [(label(0, 3), LOGITS), (label(1, 2), LOGITS)],
    "embed -> L2H1.v": [(EMBED, "L2H1.v")],
}
GROUP = "group several = feature 3 of f, feature 2 of t\n"


@cache
def edges(data: Path, name: str, kind: str) -> tuple[str, frozenset[Edge]]:
    """The lines of the file, and the circuit's edges."""
    parallel = stack(name, double(name)).parallel
    written = [
        each
        for each in SOME
        if (each != "L0H1 -> feature 5 of f" or not parallel)
        and (each != "embed -> L2H1.v" or key_heads(name) > 1)
    ]
    found = {edge for each in written for edge in SOME[each]}
    assert found <= every_edge(data, name, kind)
    text = f"{definitions(name, kind)}{GROUP}circuit c = {', '.join(written)}\n"
    return text, frozenset(found)


def expected(
    data: Path,
    name: str,
    kind: str,
    case: Case,
    donors: Mapping[int, int],
    ablated: frozenset[Edge] | None = None,
) -> list[float]:
    """The values of each prompt if the edges of the case carry the fill, or other edges."""
    circuit = edges(data, name, kind)[1]
    if ablated is None:
        every = every_edge(data, name, kind)
        ablated = every - circuit if case.rule.startswith("all but") else circuit
    own = dictionaries(data, name, kind)
    return ablated_values(name, case, donors, ablated, features=own)


EACH = in_turn(FAMILIES, list(MODES))


def kind_of(name: str, mode: str) -> str:
    """The architectures in turn."""
    return KINDS[(FAMILIES.index(name) + list(MODES).index(mode)) % len(KINDS)]


@cache
def results(data: Path, name: str, mode: str, kind: str) -> dict[str, ExperimentResult]:
    """All cases in one file, whose rows share passes."""
    text = edges(data, name, kind)[0]
    text += "".join(case.experiment(key) for key, case in CASES.items())
    return run_file(text, data, name, mode, precise=True)


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize(("name", "mode"), EACH)
def test_ablated_edges_of_features_carry_the_fill(
    data: Path, name: str, mode: str, key: str
) -> None:
    case, kind = CASES[key], kind_of(name, mode)
    found = results(data, name, mode, kind)[key]

    def compute(name: str, case: Case, donors: Mapping[int, int]) -> list[float]:
        return expected(data, name, kind, case, donors)

    donors = find_donors(name, case, found.measures[0].patched[0], compute)
    values = compute(name, case, donors)
    agree(found, (), {(): values}, unpatched(name, case.base), most=False, precise=True, large=1e-3)


SHARES = (0.05, 0.5, 0.9)
"""Of the edges that a circuit keeps."""


@pytest.mark.parametrize(
    ("name", "mode"), in_turn(("llama", "gpt2", "gpt_neox", "qwen3"), list(MODES))
)
def test_random_edges_of_features_and_neurons_carry_another_run(
    data: Path, name: str, mode: str
) -> None:
    """Each feature reads a different sum; also with neurons of another layer as nodes."""
    kind = kind_of(name, mode)
    own, parts = dictionaries(data, name, kind), stack(name, double(name))
    split = {2: shape_of(name).blocks[0].neurons}
    before = reads(parts, key_heads(name), parallel=parts.parallel, split=split, features=own)
    every = {(of, to) for to, given in before.items() for of in given}
    named = {neuron(2, n) for n in range(3)}
    nodes = [
        (of, to)
        for of, to in sorted(every)
        if all("N" not in end or end in named for end in (of, to))
    ]
    random = np.random.default_rng(0)
    kept = [[edge for edge in nodes if random.random() < share] for share in SHARES]
    text = definitions(name, kind) + "".join(
        f"circuit c{n} = {', '.join(f'{of} -> {to}' for of, to in edges_of)}\n"
        + experiment(f"a{n}", f"ablate all but c{n} at tokens * with other")
        + experiment(f"b{n}", f"ablate c{n} at tokens * with other")
        for n, edges_of in enumerate(kept)
    )
    found = run_file(text, data, name, mode, precise=True)
    for n, edges_of in enumerate(kept):
        there = {end for edge in edges_of for end in edge}
        assert {label(0, 3), label(1, 0)} <= there
        some = {layer: _some(features, there) for layer, features in own.items()}
        neurons = split if there & named else {}
        for key, ablated in ((f"a{n}", None), (f"b{n}", frozenset(edges_of))):
            values = _values(data, name, frozenset(edges_of), ablated, neurons, some)
            np.testing.assert_allclose(found[key].measures[0].patched[0], values, atol=1e-5)


def _some(features: Features, there: set[str]) -> Features:
    """Only the features that a circuit names are nodes."""
    names = {name: number for name, number in features.names.items() if name in there}
    return Features(features.of, names, features.reads)


def _values(
    data: Path,
    name: str,
    circuit: frozenset[Edge],
    ablated: frozenset[Edge] | None,
    split: Mapping[int, int],
    features: Mapping[int, Features],
) -> list[float]:
    """[prompt] with the values of the run `other` in the ablated edges; None: in all but those of
    the circuit."""
    parts = stack(name, double(name))
    if ablated is None:
        before = reads(
            parts, key_heads(name), parallel=parts.parallel, split=split, features=features
        )
        ablated = frozenset((of, to) for to, given in before.items() for of in given) - circuit
    given = fills(name, Case("", "other"), {}, split, features)
    return [
        difference(
            circuit_pass(
                name,
                double(name),
                text.ids,
                given[n],
                ablated,
                tokens(text, "tokens *"),
                split=split,
                features=features,
            ),
            record,
        )
        for n, (text, record) in enumerate(zip(rows(), records(), strict=True))
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_transcoder_that_encodes_the_stream_reads_it_before_the_norm(data: Path, name: str) -> None:
    folder = data / f"{name}_stream"
    folder.mkdir(exist_ok=True)
    hook = {"hook_name": "blocks.1.hook_resid_mid"}
    width = double(name).config.hidden_size
    of = test_transcoders.make(folder, "transcoder", width, **hook)
    own = {1: Features(of, {label(1, 0): 0, label(1, 2): 2}, "resid_mid")}
    circuit = frozenset({(EMBED, label(1, 0)), ("L0.mlp", label(1, 2)), (label(1, 2), LOGITS)})
    text = f'basis t = transcoder("{name}_stream/of_mlp") at mlp_out layer 1\n'
    text += f"circuit c = {', '.join(f'{of} -> {to}' for of, to in sorted(circuit))}\n"
    text += experiment("x", "ablate c at tokens * with other")
    if name == "gpt_neox":  # parallel blocks have no stream between attention and MLP
        assert codes(text, data, name)
        return
    found = run_file(text, data, name, "planned", precise=True)["x"].measures[0].patched[0]
    np.testing.assert_allclose(found, _values(data, name, circuit, circuit, {}, own), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "mode"), in_turn(("llama", "gpt2", "gpt_neox"), ("plain", "planned"))
)
@pytest.mark.parametrize("fill", ["other", "zero"])
def test_edges_of_features_may_have_positions(data: Path, name: str, mode: str, fill: str) -> None:
    """With another circuit of the file in the same passes."""
    kind = "topk"
    written = {
        "embed -> feature 3 of f": ("last token", (EMBED, label(0, 3))),
        "feature 3 of f -> feature 0 of t": ("{cue token, last token}", (label(0, 3), label(1, 0))),
        "feature 0 of t -> logits": ("", (label(1, 0), LOGITS)),
        "feature 5 of f -> L1H0.v": ("cue token", (label(0, 5), "L1H0.v")),
    }
    each = (f"{edge} at {at}" if at else edge for edge, (at, _) in written.items())
    own = dictionaries(data, name, kind)
    text = definitions(name, kind) + f"circuit c = {', '.join(each)}\n"
    for key, rule in (("a", "all but c"), ("b", "c")):
        text += experiment(f"x{key}", f"ablate {rule} at tokens * with {fill}")
    found = run_file(text, data, name, mode, precise=True)
    there = {end for _, edge in written.values() for end in edge}
    some = {layer: _some(features, there) for layer, features in own.items()}
    parts = stack(name, double(name))
    before = reads(parts, key_heads(name), parallel=parts.parallel, features=some)
    every = {(of, to) for to, given in before.items() for of in given}
    given = fills(name, Case("", fill), {}, (), some)
    for n, (row, record) in enumerate(zip(rows(), records(), strict=True)):
        placed: dict[Edge, Tensor] = {}
        for at, edge in written.values():
            mask = torch.zeros(len(row.ids), 1, dtype=torch.double)
            mask[list(tokens(row, at or "tokens *"))] = 1
            placed[edge] = mask
        rest = {edge: 1 - placed.get(edge, torch.zeros(1)) for edge in every}
        for key, ablated in (("a", rest), ("b", placed)):
            at = range(len(row.ids))
            logits = circuit_pass(name, double(name), row.ids, given[n], ablated, at, features=some)
            value = difference(logits, record)
            assert found[f"x{key}"].measures[0].patched[0, n] == pytest.approx(value, abs=1e-5)


WHOLE = "circuit w = embed -> mlp_norm layers 0..1, L0.mlp -> logits, L1.mlp -> L2H0.q\n"
PARTS = (
    "circuit c = embed -> features * of f, embed -> mlp_norm layers 0..1, "
    "embed -> features * of t, features * of f -> logits, L0.mlp -> logits, "
    "features * of t -> L2H0.q, L1.mlp -> L2H0.q\n"
)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "phi3", "gptj", "gpt_neo", "cohere", "falcon", "apertus"]
)
def test_all_features_and_the_rest_equal_the_mlp_as_a_node(data: Path, name: str) -> None:
    """Both circuits share passes."""
    dictionaries(data, name, "layer_norm")
    text = definitions(name, "layer_norm") + WHOLE + PARTS
    for word, at in (("other", "tokens *"), ("zero", "tokens *"), ("mean", PAIR)):
        for own in "cw":
            text += experiment(f"{own}_{word}", f"ablate {own} at {at} with {word}")
    found = run_file(text, data, name, "planned", precise=True)
    for word in ("other", "zero", "mean"):
        parts, whole = (found[f"{own}_{word}"].measures[0].patched for own in "cw")
        np.testing.assert_allclose(parts, whole, atol=1e-9)
        assert np.abs(parts - found[f"c_{word}"].measures[0].base).max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("rule", ["all but c", "c"])
def test_plan_counts_the_mlp_of_each_distinct_input_of_features(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, rule: str
) -> None:
    line = f"ablate {rule} at tokens * with other"
    text = edges(data, name, "standard")[0]
    done, planned = count_operations(data, monkeypatch, name, text, line)
    assert done / 1.6 < planned < done * 1.6


# --- errors and keys ------------------------------------------------------------------------------

WRONG_EDGES = {
    "embed -> feature 3 of r": ("E0342", "the residual stream is the sum of all senders"),
    "feature 5 of r -> logits": ("E0342", "`ablate features * of r except 3, 5 at tokens *"),
    "embed -> feature 3 of a": ("E0335", "the receiver reads only the heads of layer 0"),
    "L1H0 -> feature 3 of a": ("E0335", "the receiver reads only the heads of layer 0"),
    "feature 3 of a -> L0H1.q": ("E0335", "the receiver reads before or at the sender"),
    "L0H1 -> logits, L0H1 -> feature 3 of a": ("E0334", "`L0H1` sends only to nodes of layer 0"),
    "L0H1 -> L0.attn, L0.attn -> logits": ("E0334", "`q layer 0 heads *` and `k layer 0 heads *`"),
    "L1.attn -> logits, L0H1 -> feature 3 of a": ("E0334", "only in a circuit with features of a"),
    "feature 1 of s -> logits": ("E0342", "`mlp_out layer 0 feature 1 of s`"),
    "feature 1 of q -> logits": ("E0342", "`q` isn't a dictionary"),
    "feature 1 of f -> logits, feature 1 of g -> logits": ("E0342", "features of layer 0"),
    "L0N3 -> logits, embed -> feature 1 of f": ("E0334", "`L0N3`, a neuron of the same MLP"),
    "feature 900 of f -> logits": ("E0301", "900"),
    "feature * of f -> logits": ("E0342", "write the plural"),
    "feature 1 of nothing -> logits": ("E0201", "`nothing`"),
    "feature 3 of f -> L0H0.q": ("E0335", "`L1H0.q`"),
    "features top 4 of x of f -> logits": ("E0108", "name the sites"),
}
BASES = (
    'basis r = sae("gpt2_standard/sae") at resid_post layer 0\n'
    'basis a = sae("gpt2_standard/sae") at attn_out layer 0\n'
    'basis g = sae("gpt2_topk/sae") at mlp_out layer 0\n'
    'basis s = sae("gpt2_standard/sae") at mlp_out layer *\n'
    "basis q = pca(p, dims: 2) at mlp_out layer 0\n"
)


@pytest.mark.parametrize("edge", WRONG_EDGES)
def test_edges_of_features_that_are_no_nodes_are_errors(data: Path, edge: str) -> None:
    text = f"{_bases(data)}circuit c = {edge}\n"
    text += experiment("x", "ablate feature * of f at last token with zero")
    text += experiment("e", "ablate c at tokens * with zero")
    code, said = WRONG_EDGES[edge]
    problems = [each for each in try_file(text, data, "gpt2")[1] if each.code == code]
    assert len(problems) == 1
    assert said in render_full(problems, color=False, width=200)


def _bases(data: Path) -> str:
    for kind in ("standard", "topk"):
        dictionaries(data, "gpt2", kind)
    return definitions("gpt2", "standard") + BASES


def test_more_features_than_the_limit_are_an_error(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CIRCUIT_NEURONS", 3)
    rule = experiment("e", "ablate c at tokens * with zero")
    for edge, count in (
        ("embed -> features 0..3 of f", 4),
        ("embed -> features 0..2 of f, feature 3 of f -> logits", 4),
    ):
        text = f"{_bases(data)}circuit c = {edge}\n{rule}"
        problems = [each for each in try_file(text, data, "gpt2")[1] if each.severity == "error"]
        (problem,) = problems
        assert problem.code == "E0207"
        assert f"names {count} features, and at most 3 can be nodes" in problem.message


CIRCUIT = "circuit c = embed -> feature 3 of f, feature 3 of f -> L1H0.q, L0.mlp -> logits\n"
UNSUPPORTED = {
    "path": "path L0H1 -> logits at last token",
    "MLP": "patch mlp_out layer 0 at last token",
    "feature": "ablate feature 3 of f at last token with zero",
    "neuron": "ablate mlp_hidden layer 0 neuron 3 at last token with zero",
    "weights of a neuron": "scale weights of mlp_out layer 0 neuron 2 by 0",
    "input of an MLP": "patch mlp_norm layer 1 at last token",
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_circuits_with_features_do_not_support_is_an_error(data: Path, key: str) -> None:
    lines = ("from other into clean", "ablate c at tokens * with zero", UNSUPPORTED[key])
    assert "E0108" in codes(_bases(data) + CIRCUIT + experiment("e", *lines), data, "gpt2")


@pytest.mark.parametrize("name", ["bloom", "mpt", "gpt_oss"])
def test_models_whose_features_cannot_be_nodes_are_an_error(data: Path, name: str) -> None:
    dictionaries(data, name, "standard")
    text = definitions(name, "standard") + CIRCUIT
    text += experiment("e", "ablate c at tokens * with zero")
    result, problems = try_file(text, data, name)
    assert result is None
    assert "the MLP isn't one module whose output is added to the stream" in str(problems)


CHANGES = {
    "feature": ("embed -> feature 3 of f", "embed -> feature 5 of f"),
    "another node": ("L0.mlp -> logits", "L0.mlp -> logits, feature 7 of f -> L2H0.q"),
    "dictionary": ("llama_standard/sae", "llama_topk/sae"),
    "fill": ("with zero", "with other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stored_values_depend_on_features(data: Path, tmp_path: Path, change: str) -> None:
    for kind in ("standard", "topk"):
        dictionaries(data, "llama", kind)
        (tmp_path / f"llama_{kind}").symlink_to(data / f"llama_{kind}")
    text = definitions("llama", "standard").splitlines()[0] + "\n" + CIRCUIT
    check_stored_values(text, CHANGES[change], tmp_path, 1e-5)


def test_picture_and_conventions_of_a_circuit_name_its_features(data: Path) -> None:
    text = _bases(data) + CIRCUIT.replace("L0.mlp -> logits", "L0.mlp -> feature 2 of t")
    text += experiment("e", "ablate c at tokens * with zero")
    found = run_file(text, data, "gpt2", "plain")["e"]
    assert found.circuit is not None
    drawn = draw_edges(found.circuit, None)
    assert [each.text for each in drawn] == [
        "embed -> feature 3 of f",
        "feature 3 of f -> L1H0.q",
        "L0.mlp -> feature 2 of t",
    ]
    ends = {end for each in drawn for end in (each.sender, each.receiver)}
    assert {(end.label, end.level) for end in ends if end.kind == "feature"} == {
        ("feature 3 of f", (0, 3)),
        ("feature 2 of t", (1, 3)),
    }
    said = found.conventions["features of circuits"]
    nodes, _, note = said.partition("; ")
    assert nodes == "1 feature of f, 1 feature of t"
    assert note.startswith("a feature sends its activation times its decoder row and reads")
    assert "through the norm before the MLP, of an SAE the MLP and its encoder" in note
    assert found.conventions["basis f"].endswith("12 coordinates")


# --- together with other rules --------------------------------------------------------------------

SMALL = (
    "circuit c = embed -> feature 3 of f, feature 3 of f -> L1H0.q, feature 5 of f -> logits, "
    "L0.mlp -> logits\n"
)
OTHER_RULES = {
    "head": ("ablate L0H1 at {} with zero", "L0H1"),
    "later MLP": ("ablate mlp_out layer 2 at {} with zero", mlp(2)),
    "neuron of another layer": ("ablate mlp_hidden layer 1 at {} with zero", mlp(1)),
}


@pytest.mark.parametrize("key", OTHER_RULES)
@pytest.mark.parametrize("fill", ["zero", "other"])
@pytest.mark.parametrize(("name", "mode"), in_turn(("llama", "gpt2", "gpt_neox"), list(MODES)))
def test_edges_of_features_carry_what_other_rules_write(
    data: Path, name: str, mode: str, fill: str, key: str
) -> None:
    """Also if the rule is that of a run that the rows start from."""
    own = dictionaries(data, name, "jumprelu")
    some = {0: Features(own[0].of, {label(0, 3): 3, label(0, 5): 5})}
    circuit = {(EMBED, label(0, 3)), (label(0, 3), "L1H0.q"), (label(0, 5), LOGITS)}
    circuit |= {(mlp(0), LOGITS)}
    rule, node = OTHER_RULES[key]
    text = definitions(name, "jumprelu") + SMALL
    for n, which in enumerate(("all but c", "c")):
        line = f"ablate {which} at tokens * with {fill}"
        text += experiment(f"x{n}", line, rule.format("tokens *"))
        run = f"run r {{ {rule.format('tokens *')} }}"
        text += experiment(f"y{n}", run, "from other into r", line)
    found = run_file(text, data, name, mode, precise=True)
    model, given = double(name), fills(name, Case("", fill), {}, (), some)
    parts = stack(name, model)
    before = reads(parts, key_heads(name), parallel=parts.parallel, features=some)
    every = {(of, to) for to, senders in before.items() for of in senders}
    for n, ablated in enumerate((every - circuit, circuit)):
        for row, (text_, record) in enumerate(zip(rows(), records(), strict=True)):
            held = {node: torch.zeros_like(given[row][EMBED])}
            if key == "neuron of another layer":
                held[node] += _bias(name, 1)
            at = tokens(text_, "tokens *")
            logits = circuit_pass(
                name, model, text_.ids, given[row], ablated, at, held=held, features=some
            )
            value = difference(logits, record)
            assert found[f"x{n}"].measures[0].patched[0, row] == pytest.approx(value, abs=1e-5)
            assert found[f"y{n}"].measures[0].patched[0, row] == pytest.approx(value, abs=1e-5)


def _bias(name: str, layer: int) -> Tensor:
    """The output of an MLP whose neurons are 0."""
    parts, count = stack(name, double(name)), shape_of(name).blocks[0].neurons
    block = parts.block(layer)
    return parts.down(block, torch.zeros(1, count, dtype=torch.double))[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_inputs_without_most_senders_have_no_rounding_of_the_stream(data: Path, name: str) -> None:
    """Where most edges carry 0, the input is the sum of the others: in 32 bits as in 64 bits."""
    text = edges(data, name, "standard")[0]
    text += experiment("e", "ablate all but c at tokens * with zero")
    precise = run_file(text, data, name, "planned", precise=True)["e"].measures[0].patched
    found = run_file(text, data, name, "planned")["e"].measures[0].patched
    np.testing.assert_allclose(found, precise, atol=1e-5)


@pytest.mark.parametrize("rule", ["c", "all but c"])
def test_all_features_equal_the_mlp_where_norms_follow_sums(tmp_path: Path, rule: str) -> None:
    model = classifiers.bare_family("distilbert")
    folder = tmp_path / "distilbert_topk"
    folder.mkdir()
    test_dictionaries.make(folder, "topk", model.config.hidden_size)
    text = 'basis f = sae("distilbert_topk/sae") at mlp_out layer 0\n'
    text += "circuit d = embed -> L0.mlp, L0.mlp -> logits, L0.mlp -> L1H0.q\n"
    text += "circuit c = embed -> features * of f, embed -> L0.mlp, features * of f -> logits, "
    text += "L0.mlp -> logits, features * of f -> L1H0.q, L0.mlp -> L1H0.q\n"
    measure = "measure logit(class answer) - logit(class wrong) as raw"
    text += "".join(
        of_files.experiment(
            f"x{own}", "prompts p", f"ablate {line} at tokens * with other", measure
        )
        for own, line in (("c", rule), ("d", rule.replace("c", "d")))
    )
    found = of_files.run_file(text, tmp_path, model, prompts=classifiers.PROMPTS)
    features, whole = (found[key].measures[0].patched for key in ("xc", "xd"))
    np.testing.assert_allclose(features, whole, atol=1e-5)
    assert np.abs(features - found["xc"].measures[0].base).max() > 1e-2


def test_circuits_with_equal_ablated_edges_and_other_features_differ(data: Path) -> None:
    """All edges of one feature are in each circuit: the ablated edges are those of the others."""
    own = dictionaries(data, "gpt2", "standard")[0]
    parts = stack("gpt2", double("gpt2"))
    text, kept = definitions("gpt2", "standard"), dict[int, set[Edge]]()
    every = dict[int, set[Edge]]()
    for n in (3, 5):
        some = {0: Features(own.of, {label(0, n): n})}
        before = reads(parts, key_heads("gpt2"), parallel=parts.parallel, features=some)
        every[n] = {(of, to) for to, senders in before.items() for of in senders}
        kept[n] = {edge for edge in every[n] if label(0, n) in edge}
        text += f"circuit c{n} = {', '.join(f'{of} -> {to}' for of, to in sorted(kept[n]))}\n"
        text += experiment(f"x{n}", f"ablate all but c{n} at tokens * with zero")
    found = run_file(text, data, "gpt2", "planned", precise=True)
    for n in (3, 5):
        some = {0: Features(own.of, {label(0, n): n})}
        given = fills("gpt2", Case("", "zero"), {}, (), some)
        for row, (text_, record) in enumerate(zip(rows(), records(), strict=True)):
            at, ablated = range(len(text_.ids)), every[n] - kept[n]
            logits = circuit_pass(
                "gpt2", double("gpt2"), text_.ids, given[row], ablated, at, features=some
            )
            value = found[f"x{n}"].measures[0].patched[0, row]
            assert value == pytest.approx(difference(logits, record), abs=1e-5)
    values = [found[f"x{n}"].measures[0].patched for n in (3, 5)]
    assert np.abs(values[0] - values[1]).max() > 1e-4


# --- random circuits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule"), in_turn(("llama", "gpt2", "gpt_neox"), ("c", "all but c"))
)
def test_random_circuits_carry_the_fill_of_feature_circuits(
    data: Path, name: str, rule: str
) -> None:
    """Each draw is one of `CircuitDraws`, whose edges the reference ablates."""
    written = [(EMBED, label(0, 3)), (label(0, 3), "L1H0.q"), ("L1H0", LOGITS)]
    written += [(EMBED, label(1, 2)), (label(1, 2), LOGITS)]
    dictionaries(data, name, "topk")
    text = f"circuit c = {', '.join(f'{of} -> {to}' for of, to in written)}\n"
    text += experiment(
        "e", "from other into clean", f"ablate {rule} at tokens * with other", "against random(3)"
    )
    found = run_file(definitions(name, "topk") + text, data, name, "planned", precise=True)["e"]
    there = {end for edge in written for end in edge}
    own = dictionaries(data, name, "topk")
    some = {n: _some(features, there) for n, features in own.items()}
    some = {n: features for n, features in some.items() if features.names}
    nodes: dict[SiteLayer, FeatureNodes] = {
        ("mlp_out", n): FeatureNodes(_member(n), tuple(each.names.values()))
        for n, each in some.items()
    }
    graph = EdgeGraph(shape_of(name), None, nodes)
    named = {label_candidates((edge,)): edge for edge in graph.every}
    circuit = [named[f"{of} -> {to}"] for of, to in written]
    effects: list[float] = []
    for drawn in CircuitDraws(graph, circuit, 0).draws(3):
        assert len(drawn) == len(circuit)
        ends = (label_candidates((edge,)).split(" -> ") for edge in drawn)
        edges_of = frozenset((of, to) for of, to in ends)
        ablated = edges_of if rule == "c" else None
        values = _values(data, name, edges_of, ablated, {}, some)
        effects.append(float(np.mean(values - unpatched(name))))
    band = found.control(0)
    assert band is not None
    assert (band.low[0], band.high[0]) == pytest.approx((min(effects), max(effects)), abs=1e-6)
    said = found.conventions["controls"]
    assert said.startswith(f"random circuits, 3 draws, seed 0; of {len(circuit)} edges, each on a")


def _member(layer: int) -> BasisMember:
    return BasisMember(NODES[layer][0], "sae", {}, SpannedBasis(()), 1, 12, "")


def test_edges_of_random_circuits_of_features_are_on_paths(data: Path) -> None:
    nodes: dict[SiteLayer, FeatureNodes] = {
        ("mlp_out", n): FeatureNodes(_member(n), own) for n, (_, own) in NODES.items()
    }
    graph = EdgeGraph(shape_of("gpt2"), {("mlp_hidden", 2): (1, 4)}, nodes)
    circuit = [
        next(edge for edge in graph.every if label_candidates((edge,)) == text)
        for text in ("embed -> feature 3 of f", "feature 3 of f -> L2N4", "L2N4 -> logits")
    ]
    drawing = CircuitDraws(graph, circuit, 0)
    assert drawing.is_connected
    draws = drawing.draws(40)
    assert len(draws) == 40
    assert all(len(own) == 3 and graph.covers(own) for own in draws)
    ends = {label_candidates((edge,)) for own in draws for edge in own}
    assert any("feature" in end for end in ends)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_file_with_features_equals_the_listed_edges(data: Path, name: str) -> None:
    """All features of the group are nodes, as if each was listed."""
    dictionaries(data, name, "standard")
    written = ["embed -> feature 3 of f", "feature 3 of f -> feature 0 of t at last token"]
    written += ["feature 5 of f -> L1H0.q", "L0.mlp -> feature 0 of t", "L0H1 -> logits"]
    (data / "features.json").write_text(json.dumps({"edges": written}), encoding="utf-8")
    text = definitions(name, "standard")
    text += "group g = features 3, 5 of f, feature 0 of t\n"
    text += f"circuit c = {', '.join(written)}\n"
    text += 'circuit d = saved("features.json", nodes: g)\n'
    for own in "cd":
        text += experiment(f"x{own}", f"ablate all but {own} at tokens * with other")
    found = run_file(text, data, name, "planned", precise=True)
    first, second = (found[f"x{own}"] for own in "cd")
    np.testing.assert_allclose(second.measures[0].patched, first.measures[0].patched, atol=1e-9)
    assert np.abs(first.measures[0].patched - first.measures[0].base).max() > 1e-3
    key = "features of circuits"
    assert first.conventions[key] == second.conventions[key]
    assert second.conventions["circuit d"].startswith("5 edges at positions, those in the circuit")


WRONG_FILES = {
    "no nodes": ("feature 3 of f -> logits", "", "E0342", "`nodes` doesn't name its features"),
    "another feature": ("feature 7 of f -> logits", ", nodes: some", "E0342", "isn't in the group"),
    "no such group": ("feature 3 of f -> logits", ", nodes: h", "E0201", "`h`"),
    "backwards": ("feature 3 of f -> L0.mlp", ", nodes: some", "E0342", "reads before or at"),
    "unknown component": ("feature 3 of f -> L9.mlp", ", nodes: some", "E0342", "has 3 layers"),
}


@pytest.mark.parametrize("key", WRONG_FILES)
def test_wrong_edges_of_features_in_a_file_are_an_error(data: Path, key: str) -> None:
    edge, nodes, code, said = WRONG_FILES[key]
    (data / "wrong_features.json").write_text(json.dumps({"edges": [edge]}), encoding="utf-8")
    text = f"{_bases(data)}group some = features 3, 5 of f\n"
    text += f'circuit c = saved("wrong_features.json"{nodes})\n'
    text += experiment("x", "ablate feature * of f at last token with zero")
    text += experiment("e", "ablate c at tokens * with zero")
    problems = [each for each in try_file(text, data, "gpt2")[1] if each.severity == "error"]
    assert [each.code for each in problems] == [code]
    assert said in render_full(problems, color=False, width=200)
