"""Overlaps of circuits, against sets of edges and counts of all draws."""

from __future__ import annotations

import json
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest

from .support import codes, double, experiment, run_file, try_file
from .test_ablated_circuits import edges, shape_of

OTHERS = {
    "one shared edge": ("embed -> L0H1.q, L1H3 -> logits", 1),
    "none": ("L1H0 -> L2H0.v, L1H3 -> logits", 0),
    "all": ("embed -> L0H1.q, L2.mlp -> logits", 2),
}


def alone(*lines: str) -> str:
    """An experiment without prompts."""
    return "experiment e {\n  model m\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_overlap_measures_equal_set_counts(data: Path, name: str, key: str) -> None:
    written, shared = OTHERS[key]
    line, circuit, every = edges(name)
    text = f"{line}circuit d = {written}\n" + alone("observe overlap c with d as both")
    found = run_file(text, data, name, "planned")["e"]
    values = {data.label: float(data.patched[0, 0]) for data in found.measures}
    own, total = len(circuit), len(every)
    likely = sum(comb(2, n) * comb(total - 2, own - n) for n in range(shared, 3))
    assert values == pytest.approx(
        {
            "both": shared,
            "both jaccard": shared / (own + 2 - shared),
            "both precision": shared / own,
            "both recall": shared / 2,
            "both expected": own * 2 / total,
            "both p": likely / comb(total, own),
        }
    )
    assert f"{own} and 2 edges, of {total} of the model" in found.conventions["observed"]


def test_overlap_p_equals_the_share_of_random_circuits_with_that_overlap(data: Path) -> None:
    """Enumerate all pairs of edges, for a circuit of two edges."""
    _, _, every = edges("gpt2")
    text = (
        "circuit c = embed -> L0H1.q, L2H1 -> logits\ncircuit d = layers 1..2 heads * -> logits\n"
    )
    found = run_file(text + alone("observe overlap c with d as both"), data, "gpt2", "planned")["e"]
    true = {edge for edge in every if edge[1] == "logits" and edge[0][:2] in ("L1", "L2")}
    true = {edge for edge in true if "H" in edge[0]}
    counts = [sum(edge in true for edge in pair) for pair in combinations(sorted(every), 2)]
    p = next(each for each in found.measures if each.label == "both p")
    assert p.patched[0, 0] == pytest.approx(np.mean(np.array(counts) >= 1))
    assert shape_of("gpt2").n_layers == double("gpt2").config.n_layer


def test_edge_auroc_of_a_file_orders_every_edge_by_its_absolute_score(data: Path) -> None:
    """Also of edges that the file doesn't choose."""
    _, _, every = edges("gpt2")
    names = [" -> ".join(edge) for edge in every]
    sizes = np.random.default_rng(0).permutation(len(names)) - len(names) / 2 - 0.25
    true = [3, 8, len(names) - 2]
    content = {
        name: {"score": float(size), "in_graph": n < 5}
        for n, (name, size) in enumerate(zip(names, sizes, strict=True))
    }
    (data / "graph.json").write_text(json.dumps({"edges": content}), "utf-8")
    text = f'circuit c = saved("graph.json")\ncircuit d = {", ".join(names[n] for n in true)}\n'
    found = run_file(text + alone("observe edge_auroc c with d as ranks"), data, "gpt2", "planned")
    other = [n for n in range(len(names)) if n not in true]
    wins = [abs(sizes[n]) > abs(sizes[m]) for n in true for m in other]
    assert found["e"].measures[0].patched[0, 0] == pytest.approx(np.mean(wins))


WRONG = {
    "observe overlap c as both": "E0207",
    "observe overlap c with L0H1 as both": "E0207",
    "observe overlap c with e as both": "E0207",
    "observe overlap c with d at last token as both": "E0207",
    "observe overlap(c) c with d as both": "E0207",
    "observe edge_auroc c with d as both": "E0207",
}


@pytest.mark.parametrize("line", WRONG)
def test_invalid_circuit_comparisons_are_errors(data: Path, line: str) -> None:
    text = "circuit c = embed -> L0H1.q\ncircuit d = embed -> L0H2.q\n" + alone(line)
    assert WRONG[line] in codes(text, data)


def test_top_of_a_circuit_without_scores_is_an_error(data: Path) -> None:
    rule = "ablate all but top 1 of c at tokens * with zero"
    text = "circuit c = embed -> L0H1.q, L0H1 -> logits\n" + experiment("e", rule)
    result, problems = try_file(text, data, "llama")
    assert result is None
    assert [each.code for each in problems] == ["E0207"]
    assert "lists its edges without scores" in problems[0].message


def test_top_selects_the_largest_scores_of_a_file(data: Path) -> None:
    names = {"input->a0.h1<q>": 0.5, "a1.h1->logits": -3.0, "input->m1": 1.0, "m2->logits": 9.0}
    edges_of = {
        name: {"score": score, "in_graph": name != "m2->logits"} for name, score in names.items()
    }
    (data / "graph.json").write_text(json.dumps({"edges": edges_of}), "utf-8")
    listed = ("L1H1 -> logits", "embed -> L1.mlp", "embed -> L0H1.q")
    loop = "for n in [1, 3] { ablate all but top n of c at tokens * with zero }"
    text = 'circuit c = saved("graph.json")\n' + experiment("tops", loop)
    for n in (1, 3):
        text += f"circuit c{n} = {', '.join(listed[:n])}\n"
        text += experiment(f"of{n}", f"ablate all but c{n} at tokens * with zero")
    found = run_file(text, data, "llama", "planned", precise=True)
    for row, n in enumerate((1, 3)):
        own = found[f"of{n}"].measures[0].patched[0]
        np.testing.assert_allclose(found["tops"].measures[0].patched[row], own, atol=1e-9)
    text = 'circuit c = saved("graph.json")\ncircuit d = embed -> L0H1.q\n'
    assert "E0207" in codes(text + alone("observe edge_auroc c with d as ranks"), data)
