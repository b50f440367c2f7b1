"""Circuits of features of the output of attention, against passes in which every named feature
reads its own sum of the heads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.diagnostics.rendering import render_full
from mechdsl.resolve.circuits import CircuitDraws, EdgeGraph
from mechdsl.resolve.sites import label_candidates
from mechdsl.resolve.types import BasisMember, FeatureNodes, SpannedBasis
from mechdsl.show.reports import graph
from mechdsl.show.reports.circuit_layout import list_edges as draw_edges

from ..execute import support as of_files
from ..execute.support import MODES
from ..quick import in_turn
from ..reference.forward import stack
from . import test_classifier_circuits as classifiers
from . import test_dictionaries, test_transcoders
from .circuits import EMBED, LOGITS, Features, circuit_pass, mlp, reads
from .models import double
from .support import (
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
    INEXACT,
    Case,
    check_stored_values,
    fills,
    find_donors,
    key_heads,
    shape_of,
)

Edge = tuple[str, str]
FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox", "qwen3")
KINDS = ("standard", "topk", "layer_norm", "jumprelu")
"""Architectures of the dictionary of layer 0; that of layer 1 is a standard one."""
NODES = {0: ("a", (3, 5, 7)), 1: ("b", (0, 2))}
"""Layer → the basis at `attn_out` and the features that are nodes."""
OF_MLPS = ("llama", "gpt2", "gpt_neox", "qwen3")
"""Families whose features of MLPs are nodes, too: no norm follows their MLPs."""


def label(layer: int, number: int) -> str:
    return f"feature {number} of {NODES[layer][0]}"


def rest(layer: int) -> str:
    """The node of the other features of the output of an attention."""
    return f"L{layer}.attn"


def definitions(name: str, kind: str) -> str:
    text = f'basis a = sae("{name}_attn_{kind}/sae") at attn_out layer 0\n'
    text += f'basis b = sae("{name}_attn_b/sae") at attn_out layer 1\n'
    if name in OF_MLPS:
        text += f'basis t = transcoder("{name}_attn_{kind}/of_mlp") at mlp_out layer 1\n'
    return text


@cache
def write_dictionaries(data: Path, name: str, kind: str) -> tuple[Any, Any, Any]:
    """Write two autoencoders and a transcoder for a model, and return them."""
    folder, other = data / f"{name}_attn_{kind}", data / f"{name}_attn_b"
    width = double(name).config.hidden_size
    for each in (folder, other):
        each.mkdir(exist_ok=True)
    first, second = (
        test_dictionaries.make(*given, width) for given in ((folder, kind), (other, "standard"))
    )
    return first, second, test_transcoders.make(folder, "skip_transcoder", width)


def nodes_of(data: Path, name: str, kind: str, there: set[str] | None = None) -> dict[str, Any]:
    """The layers whose features are nodes, as the reference takes them; only features that a
    circuit names."""
    *saes, transcoder = write_dictionaries(data, name, kind)
    attention: dict[int, Features] = {}
    for (layer, (_, numbers)), own in zip(NODES.items(), saes, strict=True):
        names = {label(layer, n): n for n in numbers}
        names = {end: n for end, n in names.items() if there is None or end in there}
        if names:
            attention[layer] = Features(own, names, "attn_out")
    of_mlp = {f"feature {n} of t": n for n in (1, 4)}
    of_mlp = {end: n for end, n in of_mlp.items() if there is None or end in there}
    has_mlp = of_mlp and name in OF_MLPS
    features = {1: Features(transcoder, of_mlp, "mlp_norm")} if has_mlp else {}
    return {"attention": attention, "features": features}


def edges_of(name: str, nodes: Mapping[str, Any]) -> list[Edge]:
    """Every edge of the model with some features as nodes, in the order of receivers."""
    parts = stack(name, double(name))
    before = reads(parts, key_heads(name), parallel=parts.parallel, **nodes)
    return [(of, to) for to, given in before.items() for of in given]


def values(
    name: str,
    case: Case,
    ablated: Sequence[Edge] | Mapping[Edge, Any],
    nodes: Mapping[str, Any],
    donors: Mapping[int, int] | None = None,
) -> list[float]:
    """[prompt] with the fill of a case in the ablated edges."""
    given = fills(name, case, donors or {}, (), **nodes)
    found: list[float] = []
    for n, (text, record) in enumerate(zip(rows(case.base), records(), strict=True)):
        at = tokens(text, case.at)
        logits = circuit_pass(name, double(name), text.ids, given[n], ablated, at, **nodes)
        found.append(difference(logits, record))
    return found


def kind_of(name: str, mode: str) -> str:
    """The architectures in turn."""
    return KINDS[(FAMILIES.index(name) + list(MODES).index(mode)) % len(KINDS)]


def is_precise(name: str) -> bool:
    return name not in INEXACT


def tolerance(name: str) -> float:
    return 1e-5 if is_precise(name) else 2e-4


SHARES = (0.05, 0.5, 0.9)
"""Of the edges that a circuit keeps."""
FILLS = {
    "other": "tokens *",
    "zero": "tokens *",
    "mean": "{cue token, last token}",
    "resample": "{cue token, last token}",
}


def write_circuits(every: Sequence[Edge], name: str) -> tuple[str, list[list[Edge]]]:
    """The lines of circuits of random edges, and these edges."""
    random = np.random.default_rng(len(name))
    always = {("L0H1", label(0, 3)), (label(1, 0), LOGITS), (rest(0), LOGITS)}
    kept = [[e for e in every if e in always or random.random() < share] for share in SHARES]
    lines = (
        f"circuit c{n} = {', '.join(f'{of} -> {to}' for of, to in own)}\n"
        for n, own in enumerate(kept)
    )
    return "".join(lines), kept


@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, list(MODES)))
def test_random_edges_of_attention_features_carry_the_fill(
    data: Path, name: str, mode: str
) -> None:
    """Together with features of an MLP of the same layer, in files whose rows share passes."""
    kind = kind_of(name, mode)
    circuits, kept = write_circuits(edges_of(name, nodes_of(data, name, kind)), name)
    text = definitions(name, kind) + circuits
    for n in range(len(kept)):
        for word, at in FILLS.items():
            text += experiment(f"a{n}{word}", f"ablate all but c{n} at {at} with {word}")
            text += experiment(f"b{n}{word}", f"ablate c{n} at {at} with {word}")
    found = run_file(text, data, name, mode, precise=is_precise(name))
    for n, own in enumerate(kept):
        there = {end for edge in own for end in edge}
        nodes = nodes_of(data, name, kind, there)
        others = [edge for edge in edges_of(name, nodes) if edge not in own]
        for word, at in FILLS.items():
            for key, ablated in (("a", others), ("b", own)):
                measured = found[f"{key}{n}{word}"].measures[0].patched[0]

                def compute(
                    name: str,
                    case: Case,
                    donors: Mapping[int, int],
                    *,
                    given: tuple[Any, Any] = (ablated, nodes),
                ) -> list[float]:
                    return values(name, case, *given, donors)

                case = Case("", word, at)
                donors = find_donors(name, case, measured, compute)
                expected = compute(name, case, donors)
                np.testing.assert_allclose(measured, expected, atol=tolerance(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_single_edges_of_attention_features_carry_another_run(data: Path, name: str) -> None:
    """Each with the same edges of all features, so that no other edge hides a wrong one."""
    write_dictionaries(data, name, "standard")
    single = [("L0H1", label(0, 3)), ("L0H1", rest(0)), (label(0, 3), LOGITS), (rest(1), LOGITS)]
    single += [(label(0, 5), "L1H0.k"), ("L1H2", label(1, 2)), (label(1, 2), mlp(2))]
    named = {label(0, 3), label(0, 5), label(1, 2)}
    always = [(end, "L2H0.q") for end in sorted(named)]
    text = definitions(name, "standard")
    for n, edge in enumerate(single):
        written = ", ".join(f"{of} -> {to}" for of, to in (edge, *always))
        text += f"circuit c{n} = {written}\n"
        text += experiment(f"x{n}", f"ablate c{n} at tokens * with other")
    found = run_file(text, data, name, "planned", precise=is_precise(name))
    nodes = nodes_of(data, name, "standard", named)
    without = np.array(values(name, Case("", "other"), always, nodes))
    sizes: list[float] = []
    for n, edge in enumerate(single):
        measured = found[f"x{n}"].measures[0].patched[0]
        expected = values(name, Case("", "other"), [edge, *always], nodes)
        np.testing.assert_allclose(measured, expected, atol=tolerance(name))
        sizes.append(np.abs(np.array(expected) - without).max())
    assert sum(size > 10 * tolerance(name) for size in sizes) > 3


WHOLE = (
    "circuit w = layer 0 heads * -> L0.mlp, layer 0 heads * -> L1H0.q, layer 0 heads * -> logits\n"
)
PARTS = ", ".join(
    f"{end} -> {to}"
    for end in ("features * of a", "L0.attn")
    for to in ("L0.mlp", "L1H0.q", "logits")
)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "qwen3", "gpt_oss", "cohere", "olmo2", "phi3"]
)
@pytest.mark.parametrize("fill", ["other", "zero"])
def test_all_nodes_of_attention_equal_its_heads(data: Path, name: str, fill: str) -> None:
    """As senders of the same receivers; both circuits share passes."""
    write_dictionaries(data, name, "layer_norm")
    parallel = shape_of(name).parallel_block
    text = definitions(name, "layer_norm") + WHOLE + f"circuit c = {PARTS}\n"
    if parallel:
        for of in ("layer 0 heads *", "features * of a", "L0.attn"):
            text = text.replace(f"{of} -> L0.mlp, ", "")
    for own in "cw":
        text += experiment(f"x{own}", f"ablate {own} at tokens * with {fill}")
    found = run_file(text, data, name, "planned", precise=is_precise(name))
    parts, whole = (found[f"x{own}"].measures[0].patched for own in "cw")
    if fill == "zero":  # the biases of attention belong to `L0.attn`, and to no head
        assert np.abs(parts - found["xc"].measures[0].base).max() > 1e-3
    else:
        np.testing.assert_allclose(parts, whole, atol=1e-9 if is_precise(name) else 1e-4)
        assert np.abs(parts - found["xc"].measures[0].base).max() > 1e-3


CIRCUIT = "circuit c = L0H1 -> feature 3 of a, feature 3 of a -> L1H0.q, L0.attn -> logits\n"
UNSUPPORTED = {
    "path": "path L0H1 -> logits at last token",
    "attention": "patch attn_out layer 0 at last token",
    "feature": "ablate feature 3 of a at last token with zero",
    "output of a head": "ablate head_out layer 0 head 1 at last token with zero",
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_rules_that_do_not_fit_circuits_of_attention_features_are_an_error(
    data: Path, key: str
) -> None:
    write_dictionaries(data, "gpt2", "standard")
    text = definitions("gpt2", "standard") + CIRCUIT
    lines = ("from other into clean", "ablate c at tokens * with zero", UNSUPPORTED[key])
    assert "E0108" in codes(text + experiment("e", *lines), data, "gpt2")


@pytest.mark.parametrize(("name", "mode"), in_turn(("llama", "gpt2", "gpt_neox"), list(MODES)))
def test_attention_features_read_heads_that_other_rules_write(
    data: Path, name: str, mode: str
) -> None:
    """Also if the rule is that of a run that the rows start from, and with positions of edges."""
    write_dictionaries(data, name, "jumprelu")
    text = definitions(name, "jumprelu") + CIRCUIT
    rule = "ablate L0H2 at tokens * with zero"
    for which in ("all but c", "c"):
        line = f"ablate {which} at tokens * with other"
        text += experiment(f"x{len(which)}", line, rule)
        text += experiment(f"y{len(which)}", f"run r {{ {rule} }}", "from other into r", line)
    found = run_file(text, data, name, mode, precise=True)
    circuit = {("L0H1", label(0, 3)), (label(0, 3), "L1H0.q"), (rest(0), LOGITS)}
    nodes = nodes_of(data, name, "jumprelu", {end for edge in circuit for end in edge})
    given, model = fills(name, Case("", "other"), {}, (), **nodes), double(name)
    for which in ("all but c", "c"):
        ablated = {*edges_of(name, nodes)} - circuit if which == "all but c" else circuit
        for row, (read, record) in enumerate(zip(rows(), records(), strict=True)):
            held = {"L0H2": torch.zeros_like(given[row][EMBED])}
            at = range(len(read.ids))
            logits = circuit_pass(
                name, model, read.ids, given[row], ablated, at, held=held, **nodes
            )
            for key in "xy":
                own = found[f"{key}{len(which)}"].measures[0].patched[0, row]
                assert own == pytest.approx(difference(logits, record), abs=1e-5)


CHANGES = {
    "feature": ("L0H1 -> feature 3 of a", "L0H1 -> feature 5 of a"),
    "another node": ("L0.attn -> logits", "L0.attn -> logits, feature 7 of a -> L2H0.q"),
    "dictionary": ("llama_attn_standard/sae", "llama_attn_topk/sae"),
    "fill": ("with zero", "with other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stored_values_depend_on_attention_features(
    data: Path, tmp_path: Path, change: str
) -> None:
    for kind in ("standard", "topk"):
        write_dictionaries(data, "llama", kind)
        (tmp_path / f"llama_attn_{kind}").symlink_to(data / f"llama_attn_{kind}")
    text = definitions("llama", "standard").splitlines()[0] + "\n" + CIRCUIT
    check_stored_values(text, CHANGES[change], tmp_path, 1e-5)


def test_stored_values_of_features_depend_on_the_output_of_their_layer(
    data: Path, tmp_path: Path
) -> None:
    """One dictionary of the output of attention, and of an MLP."""
    write_dictionaries(data, "llama", "standard")
    (tmp_path / "llama_attn_standard").symlink_to(data / "llama_attn_standard")
    text = definitions("llama", "standard").splitlines()[0] + "\n"
    text += "circuit c = feature 3 of a -> L1H0.q\n"
    check_stored_values(text, ("attn_out", "mlp_out"), tmp_path, 1e-5)


def test_picture_and_conventions_of_a_circuit_name_its_attention_features(data: Path) -> None:
    write_dictionaries(data, "gpt2", "standard")
    text = definitions("gpt2", "standard")
    text += (
        "circuit c = L0H1 -> feature 3 of a, feature 3 of a -> L0.mlp, L0.attn -> feature 1 of t\n"
    )
    text += experiment("e", "ablate c at tokens * with zero")
    found = run_file(text, data, "gpt2", "plain")["e"]
    assert found.circuit is not None
    drawn = draw_edges(found.circuit, None)
    ends = {end for each in drawn for end in (each.sender, each.receiver)}
    levels = {end.title: end.level for end in ends}
    assert levels["feature 3 of a"] == levels["L0 attention"] == (0, 2)
    kinds = {end.title: end.kind for end in ends}
    assert (kinds["L0 attention"], kinds["L0 MLP"]) == ("attention", "mlp")
    assert graph.FILLS["attention"] not in {
        graph.FILLS[kind] for kind in ("embed", "head", "mlp", "feature")
    }
    shapes, _ = graph.draw_circuit(graph.CircuitPicture(found.circuit, drawn))
    assert shapes.count(f'fill="{graph.FILLS["attention"]}"') == 2  # the box, and the legend
    assert ">rest of attention<" in shapes
    assert levels["L0H1"] < levels["feature 3 of a"] < levels["L0 MLP"]
    said = found.conventions["features of circuits"]
    assert said.startswith("1 feature of a, 1 feature of t; a feature of the output of attention")
    assert "the other features, the error of the dictionary and the biases of attention" in said
    note = "belong to no sender, except in layers with features of attention"
    assert note in found.conventions["circuit"]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_file_with_attention_features_equals_the_listed_edges(data: Path, name: str) -> None:
    write_dictionaries(data, name, "standard")
    written = ["L0H1 -> feature 3 of a", "feature 3 of a -> L1H0.q at last token"]
    written += ["L0H2 -> L0.attn", "L0.attn -> logits", "feature 5 of a -> L1.mlp"]
    (data / "attention.json").write_text(json.dumps({"edges": written}), encoding="utf-8")
    text = definitions(name, "standard") + "group g = features 3, 5 of a\n"
    text += f"circuit c = {', '.join(written)}\n"
    text += 'circuit d = saved("attention.json", nodes: g)\n'
    for own in "cd":
        text += experiment(f"x{own}", f"ablate all but {own} at tokens * with other")
    found = run_file(text, data, name, "planned", precise=is_precise(name))
    first, second = (found[f"x{own}"] for own in "cd")
    np.testing.assert_allclose(second.measures[0].patched, first.measures[0].patched, atol=1e-9)
    assert np.abs(first.measures[0].patched - first.measures[0].base).max() > 1e-3
    (data / "attention.json").write_text(json.dumps({"edges": ["L0H1 -> logits"]}), "utf-8")
    problems = [each for each in try_file(text, data, name)[1] if each.severity == "error"]
    assert "the receiver doesn't read the sender" in render_full(problems, color=False, width=200)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("rule", ["c", "all but c"])
def test_random_circuits_carry_the_fill_of_attention_feature_circuits(
    data: Path, name: str, rule: str
) -> None:
    """Each draw is one of `CircuitDraws`, whose edges the reference ablates."""
    written = [(EMBED, "L0H1.q"), ("L0H1", label(0, 3)), (label(0, 3), "L1H0.q")]
    written += [("L1H0", LOGITS), ("L0H1", rest(0)), (rest(0), LOGITS)]
    write_dictionaries(data, name, "topk")
    text = f"circuit c = {', '.join(f'{of} -> {to}' for of, to in written)}\n"
    text += experiment(
        "e", "from other into clean", f"ablate {rule} at tokens * with other", "against random(3)"
    )
    precise = is_precise(name)
    text = definitions(name, "topk") + text
    found = run_file(text, data, name, "planned", precise=precise)["e"]
    nodes = nodes_of(data, name, "topk", {end for edge in written for end in edge})
    member = BasisMember("a", "sae", {}, SpannedBasis(()), 1, 12, "")
    graph = EdgeGraph(shape_of(name), None, {("attn_out", 0): FeatureNodes(member, (3,))})
    assert {label_candidates((edge,)) for edge in graph.every} == {
        f"{of} -> {to}" for of, to in edges_of(name, nodes)
    }
    named = {label_candidates((edge,)): edge for edge in graph.every}
    circuit = [named[f"{of} -> {to}"] for of, to in written]
    effects: list[float] = []
    for drawn in CircuitDraws(graph, circuit, 0).draws(3):
        assert graph.covers(drawn)
        ends = (label_candidates((edge,)).split(" -> ") for edge in drawn)
        own = {(of, to) for of, to in ends}
        ablated = own if rule == "c" else {*edges_of(name, nodes)} - own
        found_ = np.array(values(name, Case("", "other"), [*ablated], nodes))
        effects.append(float(np.mean(found_ - unpatched(name))))
    band = found.control(0)
    assert band is not None
    near = 1e-6 if precise else 1e-4
    assert (band.low[0], band.high[0]) == pytest.approx((min(effects), max(effects)), abs=near)


def test_inputs_of_attention_features_without_most_heads_have_no_rounding(data: Path) -> None:
    """Where most edges carry 0, an input is the sum of the others: in 32 bits as in 64 bits."""
    for name in ("llama", "gpt2"):
        write_dictionaries(data, name, "standard")
        text = definitions(name, "standard") + CIRCUIT
        text += experiment("e", "ablate all but c at tokens * with zero")
        precise = run_file(text, data, name, "planned", precise=True)["e"].measures[0].patched
        found = run_file(text, data, name, "planned")["e"].measures[0].patched
        np.testing.assert_allclose(found, precise, atol=1e-5)


@pytest.mark.parametrize("rule", ["c", "all but c"])
def test_all_nodes_of_attention_equal_its_heads_where_norms_follow_sums(
    tmp_path: Path, rule: str
) -> None:
    model = classifiers.bare_family("distilbert")
    test_dictionaries.make(tmp_path, "topk", model.config.hidden_size)
    text = 'basis a = sae("sae") at attn_out layer 0\n'
    ends = ("L0.mlp", "L1H0.q", "logits")
    into = "embed -> v layer 0 heads *, embed -> L0.mlp"
    text += "circuit d = " + ", ".join([into, *(f"layer 0 heads * -> {to}" for to in ends)]) + "\n"
    nodes = ("features * of a", "L0.attn")
    edges = [into, *(f"{of} -> {to}" for of in nodes for to in ends)]
    edges += [f"layer 0 heads * -> {to}" for to in nodes]
    text += f"circuit c = {', '.join(edges)}\n"
    measure = "measure logit(class answer) - logit(class wrong) as raw"
    if rule == "c":  # edges from heads to nodes have no counterpart in the other circuit
        text = text.replace(f", {edges[-2]}, {edges[-1]}", "")
    for name, line in (("xc", rule), ("xd", rule.replace("c", "d"))):
        lines = ("prompts p", f"ablate {line} at tokens * with other", measure)
        text += of_files.experiment(name, *lines)
    found = of_files.run_file(text, tmp_path, model, prompts=classifiers.PROMPTS)
    features, whole = (found[key].measures[0].patched for key in ("xc", "xd"))
    np.testing.assert_allclose(features, whole, atol=1e-5)
    assert np.abs(features - found["xc"].measures[0].base).max() > 1e-2
