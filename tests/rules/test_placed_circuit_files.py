"""Circuits in files whose edges have positions, against the same edges in the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from .support import experiment, run_file, try_file

RULE = "ablate all but c at tokens * with zero"
LABELS = (
    "embed -> L0H1.v at {cue token, last token}",
    "embed -> L0H1.v at subject tokens",
    "L0H1 -> L1.mlp at last token",
    "L1.mlp -> logits",
    "embed -> logits at tokens except cue token",
    "L0H1 -> L1.mlp at token 2",
)
SCORES = (0.1, -0.2, 0.5, 0.4, -0.3, 0.6)


def write_circuit(folder: Path, name: str, content: object) -> str:
    (folder / name).write_text(json.dumps(content), "utf-8")
    return f'circuit c = saved("{name}")\n'


def mask(chosen: list[int]) -> dict[str, object]:
    """A file as a training writes it."""
    return {"sites": [], "labels": LABELS, "scores": SCORES, "chosen": chosen}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_edges_at_positions_in_a_file_equal_listed_edges(data: Path, name: str) -> None:
    listed = run_file(
        f"circuit c = {', '.join(LABELS)}\n" + experiment("e", RULE), data, name, "planned"
    )["e"]
    for content in ({"edges": LABELS}, mask([*range(len(LABELS))])):
        text = write_circuit(data, "placed.json", content) + experiment("e", RULE)
        found = run_file(text, data, name, "planned")["e"]
        own, other = found.measures[0].patched, listed.measures[0].patched
        np.testing.assert_array_equal(own, other)
        positions = found.conventions["positions of edges"].partition(":")[0]
        assert positions == "3 of 4 edges at positions"
        said = "6 edges at positions, those in the circuit, of placed.json, SHA-256"
        assert found.conventions["circuit c"].startswith(said)


@pytest.mark.parametrize("size", [2, 4])
def test_size_and_top_choose_edges_at_positions_by_their_scores(data: Path, size: int) -> None:
    order = sorted(range(len(LABELS)), key=lambda n: -abs(SCORES[n]))[:size]
    listed = f"circuit c = {', '.join(LABELS[n] for n in sorted(order))}\n" + experiment("e", RULE)
    expected = run_file(listed, data, "llama", "planned")["e"].measures[0].patched
    whole = write_circuit(data, "placed.json", mask([*range(len(LABELS))]))
    sized = whole.replace('json")', f'json", size: {size})') + experiment("e", RULE)
    picked = whole + experiment("e", RULE.replace("but c", f"but top {size} of c"))
    for text in (sized, picked):
        found = run_file(text, data, "llama", "planned")["e"]
        np.testing.assert_array_equal(found.measures[0].patched, expected)
        assert found.circuit is not None
        assert [abs(score) for score in found.circuit.scores] == [abs(SCORES[n]) for n in order]


WRONG: dict[str, tuple[object, str]] = {
    "no position": ({"edges": ["embed -> logits at nowhere near"]}, "isn't a position"),
    "two positions": ({"edges": ["embed -> logits at token 1, token 2"]}, "isn't a position"),
    "more lines": ({"edges": ['embed -> logits at last token\nuse "x.mech"']}, "isn't a position"),
    "a second edge": (
        {"edges": ["embed -> logits at token 1, L0H1 -> logits"]},
        "isn't a position",
    ),
    "a name": ({"edges": ["embed -> logits at token n"]}, "the file has no number for `n`"),
    "unknown part": (
        {"edges": ["embed -> logits at verb token"]},
        "has edges at `verb token`: the prompts",
    ),
    "lacking": ({"edges": ["embed -> logits at token 9"]}, "`token 9` lies outside the prompt"),
    "a sweep": ({"edges": ["embed -> logits at each item token"]}, "sweeps inside a circuit"),
    "a graph": (
        {"edges": {"input->logits at last token": {"in_graph": True}}},
        "graphs of EAP-IG have no positions",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_positions_of_a_file_that_do_not_fit_are_errors_at_its_call(data: Path, name: str) -> None:
    content, said = WRONG[name]
    text = write_circuit(data, "placed.json", content) + experiment("e", RULE)
    (problem,) = try_file(text, data, "llama")[1]
    assert problem.code == "E0342"
    assert said in f"{problem.message}"
    assert problem.span is not None
    assert problem.span.written == 'saved("placed.json")'


def test_overlap_of_a_file_with_positions_equals_that_of_its_edges(data: Path) -> None:
    end = "circuit d = embed -> logits, L0H1 -> L1.mlp at token 2\n"
    end += "experiment e {\n model m\n prompts p\n observe overlap c with d as shared\n}\n"
    text = write_circuit(data, "placed.json", {"edges": LABELS})
    found = run_file(text + end, data, "llama", "planned")["e"]
    listed = run_file(f"circuit c = {', '.join(LABELS)}\n" + end, data, "llama", "planned")["e"]
    for own, other in zip(found.measures, listed.measures, strict=True):
        np.testing.assert_array_equal(own.patched, other.patched)
    assert found.measures[0].patched[0, 0] > 2


def test_graph_of_a_file_with_positions_can_be_written_as_json(data: Path) -> None:
    text = write_circuit(data, "placed.json", {"edges": LABELS})
    text += experiment("e", RULE, 'report graph to "out.json"')
    problems = [each for each in try_file(text, data, "llama")[1] if each.severity == "error"]
    assert not problems
