"""`report graph`: widths and colours of edges, layout, page, JSON of circuits, and errors."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import mechdsl
from mechdsl.resolve.circuits import list_edges as edges_of_model
from mechdsl.resolve.sites import label_node
from mechdsl.results.experiment_result import ResultCircuit
from mechdsl.show.reports.circuit_layout import NODE_HEIGHT, join_positions, lay_out, list_edges
from mechdsl.show.reports.graph import (
    MAX_EDGES,
    MAX_WIDTH,
    MIN_WIDTH,
    CircuitPicture,
    draw_circuit,
    list_positions,
)

from ..execute.support import word_tokenizer
from ..rules.models import bare
from ..rules.support import BLOCKS, experiment, write_data
from ..rules.test_ablated_circuits import shape_of

FAMILIES = ("llama", "gpt2", "gpt_neox")
SVG = "{http://www.w3.org/2000/svg}"


def circuit(family: str, count: int, seed: int = 0, *, scored: bool = True) -> ResultCircuit:
    """Some edges of a model with normally distributed scores."""
    shape, random = shape_of(family), Random(seed)
    every = edges_of_model(shape)
    named = tuple((label_node(of), label_node(to)) for of, to in random.sample(every, count))
    scores = tuple(random.gauss(0, 1) for _ in named) if scored else ()
    heads = tuple(block.heads for block in shape.blocks)
    groups = {"": tuple(block.heads // block.kv_heads for block in shape.blocks)}
    sizes = (shape.n_layers, heads, groups, shape.d_model)
    return ResultCircuit("c", *sizes, shape.parallel_block, named, scores, len(every))


def drawn(found: ResultCircuit, top: int | None = None) -> ElementTree.Element:
    shapes, _ = draw_circuit(CircuitPicture(found, list_edges(found, top)))
    return ElementTree.fromstring(f'<svg xmlns="http://www.w3.org/2000/svg">{shapes}</svg>')


def edge_paths(svg: ElementTree.Element) -> dict[str, tuple[str, float]]:
    """Title of an edge → its colour and width."""
    found: dict[str, tuple[str, float]] = {}
    for group in svg.iter(f"{SVG}g"):
        title, path = group.find(f"{SVG}title"), group.find(f"{SVG}path")
        if group.get("class") == "edge" and title is not None and path is not None:
            name = (title.text or "").split(":")[0].replace("→", "->")
            found[name] = (path.get("stroke", ""), float(path.get("stroke-width", "nan")))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_edge_width_is_the_score_and_colour_the_sign(family: str) -> None:
    found = circuit(family, 30)
    paths = edge_paths(drawn(found))
    most = max(map(abs, found.scores))
    assert len(paths) == 30
    for (of, to), score in zip(found.edges, found.scores, strict=True):
        colour, width = paths[f"{of} -> {to}"]
        assert colour == ("rgb(33,102,172)" if score > 0 else "rgb(178,24,43)")
        expected = MIN_WIDTH + (MAX_WIDTH - MIN_WIDTH) * abs(score) / most
        assert width == pytest.approx(expected, abs=0.01)


def test_edges_without_scores_have_one_width() -> None:
    paths = edge_paths(drawn(circuit("gpt2", 20, scored=False)))
    assert len(paths) == 20
    assert len({*paths.values()}) == 1


def test_top_shows_the_largest_absolute_scores() -> None:
    found = circuit("gpt2", 30)
    paths = edge_paths(drawn(found, 7))
    order = np.argsort(-np.abs(found.scores))[:7]
    assert {*paths} == {" -> ".join(found.edges[n]) for n in order}
    notes = CircuitPicture(found, list_edges(found, 7)).notes
    assert notes[1] == "7 shown, those with the largest absolute scores"


def test_picture_lists_positions_and_joins_edges_at_several() -> None:
    pairs = (("embed", "L0H1.q"), ("L0H1", "logits"), ("embed", "L0H1.q"), ("embed", "L0.mlp"))
    places = ("last token", "last token", "tokens between token 1 and cue token", "")
    sizes = (3, 4, 4, 24)
    given = ResultCircuit("c", *sizes, False, pairs, (0.5, 0.4, -0.7, 0.1), 90, places=places)
    found = join_positions(given)
    assert found.edges == (pairs[0], pairs[1], pairs[3])
    assert found.scores == (-0.7, 0.4, 0.1)
    picture = CircuitPicture(found, list_edges(found, 2), joins=True)
    assert [edge.text for edge in picture.edges] == [
        "embed -> L0H1.q at last token and tokens between token 1 and cue token",
        "L0H1 -> logits at last token",
    ]
    assert picture.notes == [
        "3 of 90 edges of the model",
        "2 shown, those with the largest absolute scores",
        "2 of its edges at positions",
        "an edge at several positions has its largest score",
    ]
    assert [*list_positions(given, picture)] == [
        "last token: embed -> L0H1.q, L0H1 -> logits",
        "tokens between token 1 and cue token: embed -> L0H1.q",
    ]
    alone = replace(given, places=())
    assert join_positions(alone) is alone


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 5, 50, 100])
def test_graph_nodes_do_not_overlap_and_edges_lead_upwards(family: str, count: int) -> None:
    """Edges pass through no box between their ends."""
    found = circuit(family, count, seed=count)
    edges = list_edges(found, None)
    layout = lay_out(found, edges)
    boxes = [
        (x - own.width / 2, y, x + own.width / 2, y + NODE_HEIGHT[own.kind])
        for own, (x, y) in layout.components.items()
    ]
    for one, two in combinations(boxes, 2):
        apart = one[2] < two[0] or two[2] < one[0] or one[3] < two[1] or two[3] < one[1]
        assert apart, (one, two)
    width, height = layout.size
    assert min(box[0] for box in boxes) >= -1e-6
    assert max(box[2] for box in boxes) <= width + 1e-6
    assert max(box[3] for box in boxes) <= height + 1e-6
    for edge in edges:
        stops = layout.routes[edge.pair]
        assert all(0 <= x <= width for x, _, _ in stops)
        for (_, _, leaves), (_, enters, _) in pairwise(stops):
            assert enters < leaves  # y is 0 at the top
        for x, bottom, top in stops[1:-1]:
            for left, high, right, low in boxes:
                assert not (left < x < right and high < bottom and top < low)
    levels = sorted(layout.components.items(), key=lambda item: item[0].level)
    for (one, (_, lower)), (two, (_, upper)) in pairwise(levels):
        assert one.level == two.level or upper < lower


@pytest.mark.parametrize("family", ["llama"])
def test_shared_keys_and_values_lead_to_their_heads(family: str) -> None:
    found = circuit(family, 60, seed=3)
    layout = lay_out(found, list_edges(found, None))
    assert layout.shared
    for own, head in layout.shared:
        layer, unit = map(int, re.findall(r"\d+", own.label))
        assert head.label in (f"L{layer}H{2 * unit}", f"L{layer}H{2 * unit + 1}")
    assert not lay_out(circuit("gpt2", 60), list_edges(circuit("gpt2", 60), None)).shared


# --- files ----------------------------------------------------------------------------------------


def write(folder: Path, circuit_line: str, *lines: str) -> Path:
    text = f"circuit c = {circuit_line}\n"
    text += experiment("e", "ablate all but c at tokens * with zero", *lines)
    path = folder / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{text}', "utf-8")
    write_data(folder)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_json_is_read_as_the_same_circuit(family: str, tmp_path: Path) -> None:
    """Scores are kept, also if heads share keys and values, and a stored run draws the graph."""
    given = {"m": (bare(family), word_tokenizer())}
    found = circuit(family, 40, seed=1)
    edges = {
        " -> ".join(edge): {"score": score, "in_graph": True}
        for edge, score in zip(found.edges, found.scores, strict=True)
    }
    (tmp_path / "first.json").write_text(json.dumps({"edges": edges}), "utf-8")
    reports = ('report graph to "out.json"', 'report graph top 3 to "top.json"')
    path = write(tmp_path, 'saved("first.json")', *reports)
    (first,) = mechdsl.run(path, given, store=tmp_path / "store").files[0].experiments
    content = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert content["cfg"]["n_layers"] == found.layers
    shared = found.groups[""][0]
    several = sum(to[-2:] in (".k", ".v") for _, to in found.edges)
    assert len(content["edges"]) == 40 + several * (shared - 1)
    top = json.loads((tmp_path / "top.json").read_text("utf-8"))["edges"]
    assert 3 <= len(top) <= 3 * shared
    (tmp_path / "out.json").unlink()
    again = mechdsl.run(path, given, store=tmp_path / "store")
    assert "unchanged" in str(again.notes)
    assert again.files[0].experiments[0].circuit == first.circuit
    path = write(tmp_path, 'saved("out.json")')
    (second,) = mechdsl.run(path, given, store=False).files[0].experiments
    assert first.circuit is not None
    assert second.circuit is not None
    assert second.circuit.edges == first.circuit.edges
    assert {*first.circuit.edges} == {*found.edges}
    np.testing.assert_allclose(second.circuit.scores, first.circuit.scores, rtol=1e-6)
    own = dict(zip(found.edges, found.scores, strict=True))
    read = dict(zip(first.circuit.edges, first.circuit.scores, strict=True))
    assert read == pytest.approx(own)
    np.testing.assert_array_equal(second.measures[0].patched, first.measures[0].patched)


PLACED = {
    "edges": "embed -> L0H1.v at {cue token, last token}, L0H1 -> L1.mlp at token 1, "
    "embed -> L0H1.v at subject tokens, L1.mlp -> logits",
    "neurons": "embed -> L0N3 at cue token, L0N3 -> L1H0.k at item 1 token, embed -> logits",
}


@pytest.mark.parametrize("kind", PLACED)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_graph_json_with_positions_is_read_as_the_same_circuit(
    family: str, kind: str, tmp_path: Path
) -> None:
    given = {"m": (bare(family), word_tokenizer())}
    path = write(tmp_path, PLACED[kind], 'report graph to "out.json"')
    (own,) = mechdsl.run(path, given, store=False).files[0].experiments
    content = json.loads((tmp_path / "out.json").read_text("utf-8"))
    expected = [" ".join(each.split()) for each in re.split(r",\s+(?![^{]*\})", PLACED[kind])]
    assert sorted(content["edges"]) == sorted(expected)
    path = write(tmp_path, 'saved("out.json")')
    (found,) = mechdsl.run(path, given, store=False).files[0].experiments
    assert found.circuit is not None
    assert own.circuit is not None
    assert found.circuit.edges == own.circuit.edges
    named = found.circuit.named_places, own.circuit.named_places
    places = [[sorted(each) for each in of_edges] for of_edges in named]
    assert places[0] == places[1]
    np.testing.assert_array_equal(found.measures[0].patched, own.measures[0].patched)
    assert np.abs(own.measures[0].patched - own.measures[0].base).max() > 1e-4


def test_graph_json_of_positions_with_a_parameter_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "embed -> logits at token k\nparam k = 1", 'report graph to "c.json"')
    with pytest.raises(mechdsl.MechdslError) as found:
        mechdsl.run(path, {"m": (bare("gpt2"), word_tokenizer())}, store=False)
    (problem,) = (each for each in found.value.diagnostics if each.severity == "error")
    assert problem.code == "E0108"
    assert "depend on parameters or groups" in problem.message


def test_pages_pictures_and_text_show_every_edge(tmp_path: Path) -> None:
    given = {"m": (bare("gpt2"), word_tokenizer())}
    files = [f'report graph to "c.{each}"' for each in ("html", "svg", "png", "pdf", "json")]
    wide = 'report graph to "wide.svg" width 1 column'
    path = write(tmp_path, "embed -> L0H1.q, L0H1 -> logits", "report graph", *files, wide)
    done = mechdsl.run(path, given, store=False)
    assert not [each for each in done.diagnostics if each.severity == "error"]
    assert len(done.written) == 6
    printed = done.files[0].experiments[0].to_text()
    assert "e: circuit c\nembed -> L0H1.q\nL0H1 -> logits\n" in printed
    assert "2 of 262 edges of the model; its edges have no scores" in printed
    page = (tmp_path / "c.html").read_text("utf-8")
    assert page.count('class="edge"') == 2
    assert 'data-node="L0H1"' in page
    assert not re.findall(r"(?:src|href)=|@import|https?://(?!www\.w3\.org)", page)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")
    assert 'width="3.25in"' in (tmp_path / "wide.svg").read_text("utf-8")
    (document,) = json.loads(done.to_json())["files"][0]["experiments"]
    assert document["circuit"]["edges"][0] == {"sender": "embed", "receiver": "L0H1.q"}
    path = write(tmp_path, 'saved("c.json")')
    (read,) = mechdsl.run(path, given, store=False).files[0].experiments
    assert read.circuit is not None
    assert (len(read.circuit.edges), read.circuit.scores) == (2, ())


def test_large_circuit_shows_at_most_200_edges() -> None:
    found = circuit("gpt2", 155)
    same: dict[str, Any] = {name: getattr(found, name) for name in found.__dataclass_fields__}
    same |= {"edges": found.edges * 2, "scores": found.scores * 2}
    many = ResultCircuit(**same)
    assert len(list_edges(many, MAX_EDGES)) == 200


WRONG = {
    "report graph": ("patch L0H1 at last token", "shows a circuit, but no rule"),
    "report graph layer": ("ablate c at tokens * with zero", "takes no axis"),
    "report graph by layer": ("ablate c at tokens * with zero", "takes no `by`"),
    'report graph to "c.txt"': ("ablate c at tokens * with zero", "cannot be written to `c.txt`"),
}


@pytest.mark.parametrize("line", WRONG)
def test_invalid_graph_report_is_an_error(line: str, tmp_path: Path) -> None:
    rule, reason = WRONG[line]
    text = "circuit c = embed -> logits\n" + experiment("e", "from other into clean", rule, line)
    path = tmp_path / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{text}', "utf-8")
    write_data(tmp_path)
    with pytest.raises(mechdsl.MechdslError, match=re.escape(reason)) as caught:
        mechdsl.run(path, {"m": (bare("gpt2"), word_tokenizer())}, store=False)
    assert "E0607" in [each.code for each in caught.value.diagnostics]
