"""Circuits in files: each form against the same edges in the file, sizes, names, and errors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechdsl
from mechdsl.base import limits
from mechdsl.resolve.circuits import list_edges
from mechdsl.resolve.types import SitePoint
from mechdsl.results.experiment_result import ExperimentResult

from .support import experiment, run_file, try_file
from .test_ablated_circuits import shape_of

FAMILIES = ("llama", "gpt2", "gpt_neox")
RULE = "ablate all but c at tokens * with zero"
LISTED = (
    "embed -> L0H1.q",
    "L0H2 -> L1H1.q",
    "L0.mlp -> L2H3.q",
    "L1H1 -> logits",
    "embed -> L1.mlp",
)
NAMES = ("input->a0.h1<q>", "a0.h2->a1.h1<q>", "m0->a2.h3<q>", "a1.h1->logits", "input->m1")

NEURONS = ("embed -> L0N3", "L0N3 -> L1H0.q", "L0N5 -> logits", "embed -> L1.mlp")


def graph_name(point: SitePoint, head: int | None = None) -> str:
    """The name of a component in EAP-IG."""
    named = {"resid_pre": "input", "logits": "logits"}
    if point.site in named:
        return named[point.site]
    if point.site in ("mlp_out", "mlp_norm"):
        return f"m{point.layer}"
    return f"a{point.layer}.h{point.unit if head is None else head}"


def graph(family: str, marked: Iterable[str], scores: Mapping[str, float] = {}) -> dict[str, Any]:
    """A graph as EAP-IG writes it: every query head has its own keys and values."""
    shape = shape_of(family)
    shared = shape.blocks[0].heads // shape.blocks[0].kv_heads
    marked, edges = set(marked), {}
    for of, to in list_edges(shape):
        heads = [to.unit]
        if to.site in ("k", "v"):
            heads = [shared * (to.unit or 0) + n for n in range(shared)]
        for head in heads:
            reads = f"<{to.site}>" if to.site in ("q", "k", "v") else ""
            name = f"{graph_name(of)}->{graph_name(to, head)}{reads}"
            edges[name] = {"score": scores.get(name, 0.0), "in_graph": name in marked}
    parallel = shape.parallel_block
    config = {
        "n_layers": shape.n_layers,
        "n_heads": shape.blocks[0].heads,
        "d_model": shape.d_model,
    }
    nodes = {name.split("->")[0]: {"in_graph": True} for name in edges}
    return {"cfg": {**config, "parallel_attn_mlp": parallel}, "nodes": nodes, "edges": edges}


def values(data: Path, family: str, circuit: str) -> ExperimentResult:
    text = f"circuit c = {circuit}\n" + experiment("e", RULE)
    return run_file(text, data, family, "planned")["e"]


@pytest.mark.parametrize("family", FAMILIES)
def test_circuit_file_formats_equal_the_listed_edges(data: Path, family: str) -> None:
    expected = values(data, family, ", ".join(LISTED)).measures[0].patched
    forms = {
        "list": {"edges": list(LISTED)},
        "names": {"edges": list(NAMES)},
        "graph": graph(family, NAMES),
        "mask": {
            "labels": [*LISTED, "L2.mlp -> logits"],
            "probabilities": [0.9] * 5 + [0.1],
            "chosen": [*range(5)],
        },
    }
    for name, content in forms.items():
        (data / f"{name}.json").write_text(json.dumps(content), "utf-8")
        found = values(data, family, f'saved("{name}.json")')
        np.testing.assert_array_equal(found.measures[0].patched, expected)
        made = found.conventions["circuit c"]
        assert made.startswith(f"5 of {len(list_edges(shape_of(family)))} edges, those in the ")
        assert f"of {name}.json, SHA-256 " in made


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_file_with_neurons_equals_the_listed_edges(data: Path, family: str) -> None:
    (data / "neurons.json").write_text(json.dumps({"edges": NEURONS}), "utf-8")
    found = values(data, family, 'saved("neurons.json")')
    expected = values(data, family, ", ".join(NEURONS))
    np.testing.assert_allclose(found.measures[0].patched, expected.measures[0].patched, atol=1e-6)
    key = "neurons of circuits"
    assert found.conventions[key] == expected.conventions[key]


SCORED = {
    "labels": [*LISTED, "L2.mlp -> logits"],
    "scores": [5, 4, 3, 2, 1.5, 1],
    "chosen": [*range(6)],
}
FILES: dict[str, tuple[object, str, str, Sequence[str]]] = {
    "list": ({"edges": list(LISTED)}, "", "all but c", LISTED),
    "size": (SCORED, ", size: 5", "all but c", LISTED),
    "top": (SCORED, "", "all but top 5 of c", LISTED),
    "neurons": ({"edges": NEURONS}, "", "c", NEURONS),
}


@pytest.mark.parametrize("name", FILES)
def test_random_circuits_like_one_from_a_file_equal_those_like_its_edges(
    data: Path, name: str
) -> None:
    content, options, ablated, edges = FILES[name]
    (data / "control.json").write_text(json.dumps(content), "utf-8")
    text = f'circuit c = saved("control.json"{options})\ncircuit d = {", ".join(edges)}\n'
    listed = ablated.replace("top 5 of ", "").replace("c", "d")
    for key, rule in (("saved", ablated), ("listed", listed)):
        text += experiment(key, f"ablate {rule} at tokens * with zero", "against random(5)")
    text += experiment("alone", f"ablate {ablated} at tokens * with zero")
    found = run_file(text, data, "llama", "planned", precise=True)
    assert found["alone"].control(0) is None
    own, other = (found[key].control(0) for key in ("saved", "listed"))
    assert own is not None
    assert other is not None
    assert own.low[0] < own.high[0]
    assert (own.low[0], own.high[0]) == pytest.approx((other.low[0], other.high[0]), abs=1e-12)
    said = found["saved"].conventions["controls"]
    assert said == found["listed"].conventions["controls"]
    assert f"random circuits, 5 draws, seed 0; of {len(edges)} edges" in said


def test_edges_of_a_graph_count_without_their_nodes(data: Path) -> None:
    """As in EAP-IG, whose evaluation recomputes the nodes from the edges."""
    content = graph("llama", NAMES)
    content["nodes"] = {name: {"in_graph": False} for name in content["nodes"]}
    (data / "unmarked.json").write_text(json.dumps(content), "utf-8")
    found = values(data, "llama", 'saved("unmarked.json")').measures[0].patched
    expected = values(data, "llama", ", ".join(LISTED)).measures[0].patched
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_size_chooses_the_edges_with_the_largest_absolute_scores(data: Path, family: str) -> None:
    scores = dict(zip(NAMES, (0.5, -0.7, 0.3, 0.2, -0.1), strict=True))
    content = graph(family, (), scores)
    (data / "scores.json").write_text(json.dumps(content), "utf-8")
    found = values(data, family, 'saved("scores.json", size: 3)')
    expected = values(data, family, ", ".join(LISTED[:3]))
    np.testing.assert_array_equal(found.measures[0].patched, expected.measures[0].patched)
    assert ", those with the largest absolute scores, of " in found.conventions["circuit c"]


def test_curve_ends_with_the_circuit_of_all_edges(data: Path) -> None:
    """Nothing is ablated there, so the run is the clean one."""
    edges = list_edges(shape_of("gpt2"))
    names = [f"{graph_name(of)}->{graph_name(to)}" + (
        f"<{to.site}>" if to.site in ("q", "k", "v") else "") for of, to in edges]  # fmt: skip
    content = graph("gpt2", names, dict(zip(names, range(1, 1 + len(names)), strict=True)))
    (data / "all.json").write_text(json.dumps(content), "utf-8")
    count = len(edges)
    rule = f"for n in [3, {count}] {{ ablate all but top n of c at tokens * with zero }}"
    text = 'circuit c = saved("all.json")\n' + experiment("e", rule)
    own = run_file(text, data, "gpt2", "planned")["e"].measures[0]
    np.testing.assert_allclose(own.patched[1], own.base[0], atol=1e-5)
    assert np.abs(own.patched[0] - own.base[0]).max() > 0.1


def test_heads_that_share_a_key_are_one_receiver(data: Path) -> None:
    """Their scores are added; either all of them are in the circuit, or none."""
    shape = shape_of("llama")
    assert (shape.blocks[0].heads, shape.blocks[0].kv_heads) == (4, 2)
    both = ("a0.h1->a1.h2<k>", "a0.h1->a1.h3<k>")
    (data / "both.json").write_text(json.dumps(graph("llama", both)), "utf-8")
    expected = values(data, "llama", "L0H1 -> L1H1.k").measures[0].patched
    found = values(data, "llama", 'saved("both.json")')
    np.testing.assert_array_equal(found.measures[0].patched, expected)
    (data / "one.json").write_text(json.dumps(graph("llama", both[:1])), "utf-8")
    assert problem(data, 'saved("one.json")').startswith(
        "`one.json` has `a0.h1->a1.h2<k>` in the circuit but not `a0.h1->a1.h3<k>`"
    )
    # 0.2 + 0.2 is larger than 0.3, and 0.5 - 0.4 is smaller
    scores = {both[0]: 0.2, both[1]: 0.2, "input->m1": 0.3}
    scores |= {"input->a1.h0<v>": 0.5, "input->a1.h1<v>": -0.4}
    (data / "sums.json").write_text(json.dumps(graph("llama", (), scores)), "utf-8")
    found = values(data, "llama", 'saved("sums.json", size: 1)')
    np.testing.assert_array_equal(found.measures[0].patched, expected)
    assert "; scores of heads that share a key or value are added" in found.conventions["circuit c"]


SMALL = """mech 1

model tiny = zoo("induction")

prompts repeats {
  word in words(tiny)
  half = list(word, 4, sep: " ", distinct: true)
  template "{half} {cue = half[1]}"
  answer " {half[2]}"
}

circuit c = saved("c.json", size: 2)

experiment e {
  prompts repeats limit 6
  ablate all but c at tokens * with zero
  measure logprob(answer) as raw
}
"""


def test_stored_circuit_run_depends_on_the_content_of_the_file(tmp_path: Path) -> None:
    """The key depends on scores too, even if the chosen edges are the same."""
    path, file = tmp_path / "e.mech", tmp_path / "c.json"
    path.write_text(SMALL, "utf-8")
    runs: list[tuple[bool, str, float]] = []
    names = ("embed -> logits", "L1H1 -> logits", "embed -> L0.mlp")
    for scores in ((3, 2, 1), (3, 2, 1), (4, 2, 1), (1, 2, 3)):
        edges = {n: {"score": own, "in_graph": False} for n, own in zip(names, scores, strict=True)}
        file.write_text(json.dumps({"edges": edges}), "utf-8")
        found = mechdsl.run(path, store=tmp_path / "store")
        (result,) = found.files[0].experiments
        value = float(result.measures[0].patched.mean())
        runs.append(("unchanged" in str(found.notes), result.conventions["circuit c"], value))
    assert [each[0] for each in runs] == [False, True, False, False]
    assert runs[0] == (False, *runs[1][1:])
    assert runs[2][1] != runs[1][1]
    assert runs[2][2] == runs[1][2]
    assert runs[3][2] != runs[2][2]


# --- errors ---------------------------------------------------------------------------------------


def problem(data: Path, circuit: str, code: str = "E0342") -> str:
    """The reason of the only error."""
    text = f"circuit c = {circuit}\n" + experiment("e", "ablate c at tokens * with zero")
    result, found = try_file(text, data, "llama")
    assert result is None
    found = [each for each in found if each.severity == "error"]
    assert [each.code for each in found] == [code]
    assert found[0].help_text
    return getattr(found[0], "reason", "")


WRONG_FILES: dict[str, tuple[object, str]] = {
    "layer": ({"edges": ["a3.h0->logits"]}, "and the model has 3 layers"),
    "head": ({"edges": ["a0.h4->logits"]}, "and layer 0 has 4 heads"),
    "key head": ({"edges": ["embed -> L1H2.k"]}, "and layer 1 has 2 key heads"),
    "neuron": ({"edges": ["L0N900 -> logits"]}, "and layer 0 has 28 neurons"),
    "neurons of a layer": (
        {"edges": ["L0N3 -> L0.mlp"]}, "but the receiver reads before or at the sender",
    ),
    "many neurons": (
        {"edges": [f"L{layer}N{n} -> logits" for layer in range(2) for n in range(14)]},
        "names 28 neurons, and at most 20 can be nodes",
    ),
    "component": ({"edges": ["b0->logits"]}, "and `b0` isn't a component"),
    "no edge": ({"edges": ["a0.h1"]}, "which isn't an edge"),
    "no input": ({"edges": ["input->a1.h1"]}, "and `a1.h1` has three inputs: q, k and v"),
    "input of an MLP": ({"edges": ["input->m1<q>"]}, "and `m1` has one input"),
    "sends an input": ({"edges": ["L0H1.q -> logits"]}, "and `L0H1.q` is an input"),
    "logits send": ({"edges": ["logits->m1"]}, "and `logits` isn't a valid sender"),
    "backwards": ({"edges": ["m1->a0.h1<q>"]}, "but the receiver reads before or at the sender"),
    "empty": (graph("llama", ()), "has no edge in the circuit"),
    "no edges": ({"cfg": {}}, "has no circuit: `edges` maps names to `score` and `in_graph`"),
    "numbers": ({"edges": {"input->m1": 0.5}}, "`edges.input->m1` of"),
    "not finite": ({"edges": {"input->m1": {"score": float("nan")}}}, "`NaN` isn't"),
    "array": ([1], "it isn't a JSON object"),
    "attribution graph": ({"nodes": [], "links": []}, "is an attribution graph"),
    "layers": ({**graph("llama", NAMES), "cfg": {"n_layers": 12}}, "12 layers, and this one has 3"),
    "heads": ({**graph("llama", NAMES), "cfg": {"n_heads": 8}}, "8 heads, and this one has 4"),
    "parallel": ({**graph("llama", NAMES), "cfg": {"parallel_attn_mlp": True}}, "parallel blocks"),
    "neurons": (
        {**graph("llama", NAMES), "nodes": {"m0": {"in_graph": True, "neurons": [True, False]}}},
        "chooses `neurons` of `m0`: these are coordinates of its output",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FILES)
def test_circuit_file_that_does_not_match_the_model_is_an_error(
    data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CIRCUIT_NEURONS", 20)
    content, reason = WRONG_FILES[name]
    (data / "wrong.json").write_text(json.dumps(content), "utf-8")
    said = problem(data, 'saved("wrong.json")')
    assert "`wrong.json` " in said
    assert reason in said


def test_circuit_size_without_scores_is_an_error(data: Path) -> None:
    (data / "plain.json").write_text(json.dumps({"edges": list(NAMES)}), "utf-8")
    said = problem(data, 'saved("plain.json", size: 2)')
    assert said == "`plain.json` has 0 scored edges, and `size: 2` chooses by scores"


@pytest.mark.parametrize(
    ("circuit", "code", "reason"),
    [
        ('saved("none.json")', "E0342", "`none.json` can't be read: no such file or directory"),
        ('saved("c.pt")', "E0342", "`c.pt` is a pickle, which may run code when it is loaded"),
        ('saved("c.json", size: 0)', "E0342", "`size` is a number of edges"),
        ('saved("c.json", size: 50%)', "E0342", "`size` is a number of edges"),
        (
            'saved("c.json") at last token',
            "E0342",
            "positions of a circuit in a file are those of its edges",
        ),
        ('saved("c.json", top: 3)', "E0207", "is not an argument of `saved`"),
        ('saved("c.json", "c")', "E0207", "takes the path of a file, in quotes"),
        ("saved(c)", "E0207", "takes the path of a file, in quotes"),
    ],
)
def test_invalid_saved_circuit_call_is_an_error(
    data: Path, circuit: str, code: str, reason: str
) -> None:
    assert problem(data, circuit, code) == reason


def test_circuit_with_another_method_suggests_saved(data: Path) -> None:
    text = "circuit c = pca(p, dims: 2)\n" + experiment("e", "ablate c at tokens * with zero")
    _, found = try_file(text, data, "llama")
    assert found[0].code == "E0342"
    assert 'or read a file: `saved("circuit.json")`' in (found[0].help_text or "")
