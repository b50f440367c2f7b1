"""`report graph to "c.json"` of trained circuits: every score, neurons and features as nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl

from ..quick import some
from ..rules.test_dictionaries import make

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
WIDTH = 128
HEAD = """mech 1
model lm = zoo("names")
prompts ioi {
  io in ["Mary", "John", "Tom", "Anna", "Luke"]
  s = other(io)
  place in ["shop", "park"]
  template "When {io} and {s1 = s} went to the {place}, {s2 = s} gave a bag to"
  answer " {io}"
  corrupt abc { io, s1, s2 = others(io, s) }
}
basis f = sae("sae") at mlp_out layer 0
"""
NODES = {
    "heads": "",
    "features": "group own = features 1, 4, 6, 7 of f",
    "neurons": "group own = mlp_hidden layer 1 neurons 0..5",
}


def write(folder: Path, nodes: str, circuit: str, *reports: str) -> Path:
    given = f"{circuit.removesuffix(')')}{', nodes: own)' if nodes else ')'}"
    lines = [HEAD, nodes, f"circuit c = {given}", "experiment e {", "prompts ioi.test"]
    lines += ["from abc into clean", "ablate all but c at tokens * with abc"]
    lines += ["measure logit(answer) as faithfulness", *reports, "}"]
    lines.insert(-1, "against none" if circuit == TRAINED else "")
    path = folder / "file.mech"
    text = "\n".join(lines).replace("  corrupt", "  split 50%\n  corrupt")
    path.write_text(text, encoding="utf-8")
    return path


def run(path: Path) -> Any:
    return mechdsl.run(path, store=path.parent / "store", fit=True)["e"]


TRAINED = "fit(eap(size: 12), prompts: ioi.train, from: abc, maximise: logit(answer))"


@pytest.mark.parametrize("nodes", some(NODES, ["features"]))
def test_graph_file_has_every_score_and_the_same_circuit(nodes: str, tmp_path: Path) -> None:
    make(tmp_path, "topk", WIDTH)
    group = NODES[nodes]
    reports = 'report graph to "c.json"', 'report graph top 3 to "top.json"'
    path = write(tmp_path, group, TRAINED, *reports)
    first = run(path)
    mechdsl.fit(path, store=tmp_path / "store", out=tmp_path / "out")
    mask = json.loads((tmp_path / "out" / "c" / "mask.json").read_text("utf-8"))
    content = json.loads((tmp_path / "c.json").read_text("utf-8"))
    assert len(content["edges"]) == len(mask["labels"])
    if group:
        scores = dict(zip(mask["labels"], mask["scores"], strict=True))
        assert {name: own["score"] for name, own in content["edges"].items()} == scores
        chosen = {mask["labels"][number] for number in mask["chosen"]}
        assert {name for name, own in content["edges"].items() if own["in_graph"]} == chosen
    assert content.get("dictionaries", {}) == mask.get("dictionaries", {})
    sizes = sorted(abs(own["score"]) for own in content["edges"].values())
    assert sizes == pytest.approx(sorted(map(abs, mask["scores"])))
    second = run(write(tmp_path, group, 'saved("c.json")', 'report graph to "again.json"'))
    again = json.loads((tmp_path / "again.json").read_text("utf-8"))
    assert again["edges"] == content["edges"]
    assert again["nodes"] == content["nodes"]
    assert {*first.circuit.edges} == {*second.circuit.edges}
    np.testing.assert_array_equal(second.measures[0].patched, first.measures[0].patched)
    np.testing.assert_array_equal(second.measures[0].base, first.measures[0].base)
    report = 'report graph to "more.json"'
    largest = run(write(tmp_path, group, 'saved("again.json", size: 20)', report)).circuit
    assert min(map(abs, largest.scores)) == pytest.approx(sizes[-20])
    more = json.loads((tmp_path / "more.json").read_text("utf-8"))["edges"]
    assert {n: own["score"] for n, own in more.items()} == {
        n: own["score"] for n, own in content["edges"].items()
    }
    assert sum(own["in_graph"] for own in more.values()) == 20
    top = json.loads((tmp_path / "top.json").read_text("utf-8"))
    assert [own["in_graph"] for own in top["edges"].values()] == [True] * 3
    read = run(write(tmp_path, group, 'saved("top.json")'))
    assert {*read.circuit.edges} == {*first.circuit.edges[:3]}
    assert read.circuit.neurons == first.circuit.neurons
    assert read.circuit.features == first.circuit.features


def test_graph_file_of_features_is_rejected_with_another_dictionary(tmp_path: Path) -> None:
    make(tmp_path, "topk", WIDTH)
    run(write(tmp_path, NODES["features"], TRAINED, 'report graph top 3 to "c.json"'))
    found = mechdsl.validate(write(tmp_path, "", 'saved("c.json")')).errors
    assert [each.code for each in found] == ["E0342"]
    assert "`nodes` doesn't name its features" in found.render()
    fewer = NODES["features"].replace(", 7", "")
    found = mechdsl.validate(write(tmp_path, fewer, 'saved("c.json")')).errors
    assert "`feature 7 of f` isn't in the group of `nodes`" in found.render()
    make(tmp_path, "jumprelu", WIDTH)
    found = mechdsl.validate(write(tmp_path, NODES["features"], 'saved("c.json")')).errors
    assert [each.code for each in found] == ["E0342"]
    assert "use the dictionary that the circuit was trained with" in found.render()
