"""Overlaps of circuits, against sets of edges and counts of all draws."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain, combinations, product
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechdsl.results.experiment_result import ExperimentResult

from ..quick import in_turn
from .support import codes, double, experiment, rows, run_file, tokens, try_file
from .test_ablated_circuits import edges, shape_of
from .test_feature_circuits import definitions, dictionaries

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


def expect_overlap(
    found: ExperimentResult,
    first: frozenset[Any],
    second: frozenset[Any],
    total: int,
    of: str = "model",
) -> None:
    """Compare the numbers of an overlap with those of two sets.

    of: The stack or model whose edges are counted.
    """
    values = {data.label: float(data.patched[0, 0]) for data in found.measures}
    shared, sizes = len(first & second), (len(first), len(second))
    counts = range(shared, min(sizes) + 1)
    likely = sum(comb(sizes[1], n) * comb(total - sizes[1], sizes[0] - n) for n in counts)
    assert values == pytest.approx(
        {
            "both": shared,
            "both jaccard": shared / len(first | second),
            "both precision": shared / sizes[0],
            "both recall": shared / sizes[1],
            "both expected": sizes[0] * sizes[1] / total,
            "both p": likely / comb(total, sizes[0]),
        }
    )
    said = f"{sizes[0]:,} and {sizes[1]:,} edges, of {total:,} of the {of}"
    assert said in found.conventions["observed"]


PLACED = {
    "both": (
        [("embed -> L0H1.q", "last token"), ("L0H2 -> L1.mlp", "{cue token, last token}")],
        [("embed -> L0H1.q", "{token 1, last token}"), ("L0H2 -> L1.mlp", "subject tokens")],
    ),
    "one": (
        [("embed -> L0H1.q", "last token"), ("L0H2 -> L1.mlp", "tokens except last token")],
        [("embed -> L0H1.q", ""), ("L0H2 -> L1.mlp", ""), ("L1H1 -> logits", "")],
    ),
    "every token": (
        [("embed -> L0H1.q", "tokens *"), ("embed -> L0H1.k", "cue token")],
        [("embed -> L0H1.k", "cue token"), ("embed -> L0H1.q", "last token")],
    ),
}


@pytest.mark.parametrize(("name", "key"), in_turn(("gpt2", "llama", "gpt_neox"), list(PLACED)))
def test_overlap_at_positions_counts_edges_at_each_group_of_tokens(
    data: Path, name: str, key: str
) -> None:
    """Groups are the distinct sets of positions of the tokens of any row."""
    every = edges(name)[2]
    written = PLACED[key]
    places = sorted({at for own in written for _, at in own if at})
    groups = {
        frozenset(at for at in places if token in tokens(text, at))
        for text in rows()
        for token in range(text.last + 1)
    }

    def place(own: list[tuple[str, str]]) -> frozenset[Any]:
        return frozenset(
            (edge, group) for edge, at in own for group in groups if not at or at in group
        )

    text = "".join(
        f"circuit {own} = {', '.join(f'{e} at {at}' if at else e for e, at in listed)}\n"
        for own, listed in zip("cd", written, strict=True)
    )
    text += "experiment e {\n model m\n prompts p\n observe overlap c with d as both\n}\n"
    found = run_file(text, data, name, "planned")["e"]
    first, second = map(place, written)
    expect_overlap(found, first, second, len(every) * len(groups))
    said = found.conventions["compared at"]
    assert ("`other tokens`" in said) == (frozenset() in groups)
    assert said.partition(";")[0].count("`") == 2 * len(groups)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_overlap_divides_an_mlp_into_the_neurons_of_the_other_circuit(
    data: Path, name: str
) -> None:
    every = edges(name)[2]
    parts = {"L0.mlp": ("L0N3", "L0N5", "L0.mlp")}

    def divide(own: Iterable[tuple[str, str]]) -> frozenset[Any]:
        each = (product(parts.get(of, (of,)), parts.get(to, (to,))) for of, to in own)
        return frozenset(chain.from_iterable(each))

    written = {
        "c": [("embed", "L0N3"), ("L0N3", "L1H0.q"), ("L0N5", "logits"), ("L1H1", "logits")],
        "d": [("embed", "L0.mlp"), ("L0.mlp", "logits"), ("L1H1", "logits")],
        "f": [("embed", "L0N3"), ("L0N3", "logits")],
    }
    texts = {
        own: f"circuit {own} = {', '.join(f'{of} -> {to}' for of, to in listed)}\n"
        for own, listed in written.items()
    }
    total = len(divide(every))
    for one, other in ("cd", "dc", "cf"):
        text = texts[one] + texts[other] + alone(f"observe overlap {one} with {other} as both")
        found = run_file(text, data, name, "planned")["e"]
        first, second = divide(written[one]), divide(written[other])
        expect_overlap(found, first, second, total)
        named = found.conventions.get("compared nodes", "")
        assert named.startswith("an edge of `L0.mlp` counts once") == ("d" in one + other)
    ranks = texts["c"] + texts["f"] + alone("observe edge_auroc c with f as ranks")
    assert codes(ranks, data, name) == ["E0207"]
    file = {"edges": {f"{of} -> {to}": {"score": 1.0, "in_graph": True} for of, to in every}}
    (data / "every.json").write_text(json.dumps(file), "utf-8")
    ranks = 'circuit c = saved("every.json")\n' + texts["f"]
    assert codes(ranks + alone("observe edge_auroc c with f as ranks"), data, name) == ["E0108"]


def test_overlap_divides_the_rest_of_an_output_into_the_features_of_the_other_circuit(
    data: Path,
) -> None:
    dictionaries(data, "gpt2", "standard")
    text = definitions("gpt2", "standard")
    text += "circuit c = embed -> feature 3 of f, L0.mlp -> logits\n"
    text += "circuit d = embed -> feature 5 of f, feature 5 of f -> logits, L0.mlp -> L1H0.q\n"
    found = run_file(text + alone("observe overlap c with d as both"), data, "gpt2", "planned")["e"]
    first = {("embed", "3"), ("5", "logits"), ("rest", "logits")}
    second = {("embed", "5"), ("5", "logits"), ("rest", "L1H0.q"), ("3", "L1H0.q")}
    every = edges("gpt2")[2]
    total = sum(3 if "L0.mlp" in edge else 1 for edge in every)
    expect_overlap(found, frozenset(first), frozenset(second), total)


ALONE = {
    "edges": "embed -> L0H1.q, L0H1 -> L1H0.v, L0.mlp -> logits",
    "positions": "embed -> L0H1.q at cue token, L0H1 -> L1H0.v at last token, L1.mlp -> logits",
    "neurons": "embed -> L0N3, L0N3 -> L1H0.q, L1.mlp -> logits",
    "features": "embed -> feature 3 of f, feature 5 of f -> logits, L0.mlp -> L1H0.q",
    "features at positions": "feature 3 of f -> L1H0.q at cue token, L0.mlp -> logits",
}


@pytest.mark.parametrize("key", ALONE)
def test_overlap_of_a_circuit_with_itself_is_complete(data: Path, key: str) -> None:
    """Also with the same edges under another name."""
    dictionaries(data, "gpt2", "standard")
    text = definitions("gpt2", "standard")
    text += f"circuit c = {ALONE[key]}\ncircuit d = {ALONE[key]}\n"
    for own in "cd":
        text += f"experiment {own}_{own} {{\n  model m\n  prompts p\n"
        text += f"  observe overlap c with {own} as of_{own}\n}}\n"
    found = run_file(text, data, "gpt2", "planned")
    for own in "cd":
        each = found[f"{own}_{own}"]
        values = {one.label: float(one.patched[0, 0]) for one in each.measures}
        shared = values.pop(f"of_{own}")
        said = f"{shared:,.0f} and {shared:,.0f} edges, of "
        assert said in each.conventions["observed"]
        shares = [values[f"of_{own} {word}"] for word in ("jaccard", "precision", "recall")]
        assert shares == [1.0] * 3
        assert shared >= ALONE[key].count("->")
        assert 0 < values[f"of_{own} p"] < 0.01


def test_overlap_of_circuits_with_different_types_of_nodes_is_an_error(data: Path) -> None:
    dictionaries(data, "gpt2", "standard")
    text = (
        definitions("gpt2", "standard") + 'basis g = sae("gpt2_standard/sae") at mlp_out layer 0\n'
    )
    text += "circuit c = embed -> feature 3 of f, L0.mlp -> logits\n"
    for other, reason in (
        ("embed -> L0N3", "one with neurons of `L0.mlp`, and the other one with features of it"),
        ("embed -> feature 3 of g", "with features of two dictionaries at `L0.mlp`"),
    ):
        for own in ("c with d", "d with c"):
            circuits = f"{text}circuit d = {other}\n" + alone(f"observe overlap {own}")
            (problem,) = (x for x in try_file(circuits, data, "gpt2")[1] if x.code == "E0108")
            assert reason in problem.message


WRONG = {
    "observe overlap c as both": "E0207",
    "observe overlap c with L0H1 as both": "E0207",
    "observe overlap c with e as both": "E0207",
    "observe overlap c with d at last token as both": "E0207",
    "observe overlap(c) c with d as both": "E0207",
    "observe edge_auroc c with d as both": "E0207",
    "observe overlap c with placed as both": "E0207",
    "observe overlap c with in_file as both": "E0207",
}


@pytest.mark.parametrize("line", WRONG)
def test_invalid_circuit_comparisons_are_errors(data: Path, line: str) -> None:
    (data / "placed.json").write_text('{"edges": ["embed -> logits at last token"]}', "utf-8")
    text = "circuit c = embed -> L0H1.q\ncircuit d = embed -> L0H2.q\n" + alone(line)
    text += (
        'circuit placed = embed -> L0H1.q at last token\ncircuit in_file = saved("placed.json")\n'
    )
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
