"""Circuits whose edges `fit(eap(…)) at A, B` scores at each position separately.

Scores are compared with gradients by each receiver's input in a float64 pass that recomputes all
inputs, one unpadded prompt at a time, summed over the tokens of each position.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.execute.mask_training import EdgeRows, find_circuit
from mechdsl.execute.training import TrainingJob
from mechdsl.pipeline.trained_files import fits_of_file
from mechdsl.planner.training_cost import training_cost
from mechdsl.resolve.types import PlacedEdge, TrainedMask

from ..quick import in_turn
from ..rules.circuits import EMBED, circuit_pass
from ..rules.models import double
from ..rules.support import rows, tokens
from ..rules.test_ablated_circuits import Case, edges, fills, named
from ..rules.token_paths import Step, find_leading, find_reached, list_steps
from .test_edge_scores import CALLS, HERE, RULED, fit, open_rows, reference_products, score
from .test_trained_circuits import PAIR
from .test_trained_dictionaries import experiment, run, train, write
from .test_trained_rotations import checked, loss_by_hand, training_errors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
Placed = tuple[tuple[str, str], int]
"""The names of an edge, and the number of its position."""
USE = experiment("from other into clean", "ablate c at tokens * with other", block="p")
ALL_ROWS = "validation: 0%, batch: 2, measure_on_training_rows: true"
REST = f"tokens except {PAIR}"
PLACES = ("last token", "subject tokens", "cue token")
COVERED = ("cue token", "last token", REST)


def scored(path: Path, model: Any, side: Any = None) -> dict[Placed, float]:
    """The score of each edge at each position."""
    mask, found = open_rows(path, model, side)
    edges = [each for each in mask.candidates if isinstance(each, PlacedEdge)]
    assert len(edges) == len(mask.candidates)
    each = zip(edges, score(mask, found).tolist(), strict=True)
    return {(named(edge.edge), edge.place): own for edge, own in each}


WHERE = ((PLACES, "left"), (COVERED, "right"))
# In float64, padding gives NaN in the library's eager attention of gemma2: its softmax has 32 bits.
PADDED = tuple(family for family in HERE if family != "gemma2")


@pytest.mark.parametrize(("family", "source"), in_turn(PADDED, ("from: other", "with: zero")))
@pytest.mark.parametrize(("call", "where"), in_turn((*CALLS, *RULED), WHERE))
def test_placed_scores_equal_sums_of_products_at_each_position(
    call: str, where: tuple[tuple[str, ...], Any], family: str, source: str, tmp_path: Path
) -> None:
    """In ragged batches of two rows."""
    compare_scores(call, *where, family, source, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_placed_scores_with_means_equal_sums_of_products_at_each_position(
    family: str, tmp_path: Path
) -> None:
    compare_scores(CALLS[0], ("cue token", "last token"), "left", family, "with: mean", tmp_path)


def compare_scores(
    call: str, places: tuple[str, ...], side: Any, family: str, source: str, tmp_path: Path
) -> None:
    line = fit(ALL_ROWS, call=call, source=source, at=", ".join(places))
    path = write(tmp_path, line, USE)
    mask, found = open_rows(path, double(family), side)
    every = list(
        dict.fromkeys(each.edge for each in mask.candidates if isinstance(each, PlacedEdge))
    )
    joined = f"{{{', '.join(places)}}}"
    at = "tokens between first token and last token" if REST in places else joined
    expected = torch.zeros(len(every), len(places), dtype=torch.float64)
    ids = found.objective.table.row_ids
    for row in ids:
        text = rows("clean")[row]
        products = reference_products(family, row, every, source, at, call)
        for number, place in enumerate(places):
            expected[:, number] += products[:, tokens(text, place)].sum(-1) / len(ids)
    own = scored(path, double(family), side)
    values = torch.tensor([[own[named(e), n] for n in range(len(places))] for e in every])
    assert (expected.abs().amax(0) > 1e-3).all()
    np.testing.assert_allclose(values, expected, atol=1e-6, rtol=1e-4)


# --- circuits -------------------------------------------------------------------------------------


@cache
def fills_of(family: str, source: str) -> list[dict[str, Tensor]]:
    """By prompt and sender, the vectors that ablated edges carry."""
    return fills(family, Case("c", source.split()[1], "tokens *"), {})


def circuit_value(
    family: str, row: int, chosen: Sequence[PlacedEdge], places: Sequence[str], source: str
) -> float:
    """The measure while all edges but some carry other values at all tokens of the positions."""
    text = rows("clean")[row]
    given = fills_of(family, source)[row]
    every = {at for place in places for at in tokens(text, place)}
    ones = torch.ones(len(text.ids), 1, dtype=torch.double)
    ablated = {edge: ones.clone() for edge in edges(family)[2]}
    for each in chosen:
        ablated[named(each.edge)][tokens(text, places[each.place])] = 0
    logits = circuit_pass(family, double(family), text.ids, given, ablated, sorted(every))
    return float(loss_by_hand(logits[-1], row))


def choose(mask: TrainedMask, found: EdgeRows, folder: Path) -> tuple[list[PlacedEdge], Any]:
    """The chosen edges, and the report."""
    job = TrainingJob(folder, {}, folder, lambda: False, lambda *_: None)
    report = find_circuit(mask, found, job)
    stored = json.loads((folder / "mask.json").read_text("utf-8"))
    chosen = [mask.candidates[n] for n in stored["chosen"]]
    assert list(report.chosen) == [stored["labels"][n] for n in stored["chosen"]]
    return [each for each in chosen if isinstance(each, PlacedEdge)], report


@pytest.mark.parametrize(
    ("family", "places"), in_turn(("llama", "gpt2", "gpt_neox"), (PLACES, COVERED))
)
def test_report_on_placed_circuit_equals_passes_with_its_edges(
    family: str, places: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means over held-out rows, of the circuit and without edges."""
    monkeypatch.setattr(TrainingJob, "write_card", lambda *_: None)
    options = "validation: 50%, batch: 2, measure_on_training_rows: true"
    path = write(tmp_path, fit(options, at=", ".join(places)), USE)
    mask, found = open_rows(path, double(family))
    chosen, report = choose(mask, found, tmp_path)
    ids = [found.objective.table.row_ids[n] for n in found.measured]
    for value, own in ((report.trained, chosen), (report.whole, [])):
        by_hand = [circuit_value(family, row, own, places, "from: other") for row in ids]
        assert value == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert len({each.place for each in chosen}) > 1
    assert abs(report.trained - report.whole) > 1e-4


def test_placed_circuits_in_one_pass_equal_passes_of_each(tmp_path: Path) -> None:
    path = write(tmp_path, fit(ALL_ROWS, at=", ".join(PLACES)), USE)
    _, found = open_rows(path, double("llama"))
    random = np.random.default_rng(0)
    circuits = random.random((3, len(found.candidates))) < [[0.2], [0.5], [0.8]]
    circuits[:, 0] = True
    together = found.means_with(found.trained, circuits, 8)
    alone = [found.mean_with(found.trained, np.flatnonzero(own).tolist()) for own in circuits]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    shares = torch.from_numpy(1.0 - circuits)
    gates = [found.mean(found.trained, own, 8) for own in shares]
    np.testing.assert_allclose(gates, alone, atol=1e-5)
    assert np.ptp(alone) > 1e-3


def test_faithfulness_selects_the_smallest_placed_circuit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingJob, "write_card", lambda *_: None)
    options = "validation: 0%, batch: 8, measure_on_training_rows: true"
    line = fit(options, call="eap(faithfulness: 0.5)", at=", ".join(COVERED))
    path = write(tmp_path, line, USE)
    mask, found = open_rows(path, double("llama"))
    chosen, report = choose(mask, found, tmp_path)
    numbers = [mask.candidates.index(each) for each in chosen]
    ids = found.objective.table.row_ids
    circuit, none = (
        np.mean([circuit_value("llama", row, own, COVERED, "from: other") for row in ids])
        for own in (chosen, ())
    )
    clean = found.mean(found.trained, None, 8)
    assert (circuit - none) / (clean - none) > 0.5
    assert found.mean_with(found.trained, numbers) == pytest.approx(circuit, abs=1e-6)
    assert "the smallest circuit in this order with a faithfulness above 0.5" in report.made


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_selected_placed_edge_leads_to_the_measured_token(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference follows single tokens of each row."""
    monkeypatch.setattr(TrainingJob, "write_card", lambda *_: None)
    for select in ("", ', select: "top"'):
        path = write(
            tmp_path, fit(ALL_ROWS, call=f"eap(size: 40{select})", at=", ".join(COVERED)), USE
        )
        mask, found = open_rows(path, double(family))
        chosen, report = choose(mask, found, tmp_path)
        assert leading(family, chosen, COVERED) == {*chosen}
        if select:
            largest = np.argsort(-np.abs(score(mask, found)), kind="stable")[:40]
            top = [mask.candidates[n] for n in largest]
            assert {*chosen} == leading(family, top, COVERED)
            assert 0 < len(chosen) < 40
            assert f"{40 - len(chosen)} of them removed" in report.made
        else:
            assert len(chosen) == 40


def leading(family: str, edges_: Sequence[Any], places: Sequence[str]) -> set[Any]:
    """The edges from which the logits of the last token can be reached in some row, by others of
    them and by every edge at tokens of no position."""
    found = set[Any]()
    for length, steps, named_at in steps_of_rows(family, edges_, places):
        found |= {named_at.get((own.edge, own.token)) for own in find_leading(steps, length)}
    return found - {None}


def reached(family: str, edges_: Sequence[Any], places: Sequence[str]) -> set[Any]:
    """The edges that can be reached from the embedding of a token in some row, by others of them
    and by every edge at tokens of no position."""
    found = set[Any]()
    for _, steps, named_at in steps_of_rows(family, edges_, places):
        found |= {named_at.get((own.edge, own.token)) for own in find_reached(steps)}
    return found - {None}


def steps_of_rows(
    family: str, edges_: Sequence[Any], places: Sequence[str]
) -> Iterator[tuple[int, list[Step], dict[tuple[tuple[str, str], int], Any]]]:
    """By row: its number of tokens, the edges at single tokens, and the placed edge of each."""
    for text in rows("clean"):
        at = [tokens(text, place) for place in places]
        others = {*range(len(text.ids))}.difference(*at)
        own = {(named(each.edge), token): each for each in edges_ for token in at[each.place]}
        every = list_steps(family, len(text.ids))
        steps = [step for step in every if step.token in others or step[:2] in own]
        yield len(text.ids), steps, own


SOME = ("subject tokens", "cue token")
"""Without the token that the measure reads."""

BETWEEN = ("subject tokens", "last token")
"""With tokens of no position between them."""


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("places", [PLACES, COVERED, SOME, BETWEEN])
def test_random_placed_circuits_have_paths_between_positions(
    places: tuple[str, ...], family: str, tmp_path: Path
) -> None:
    """Those of a circuit whose edges are all on paths; others are drawn from all edges."""
    path = write(tmp_path, fit(ALL_ROWS, at=", ".join(places)), USE)
    mask, found = open_rows(path, double(family))
    every = [each for each in mask.candidates if isinstance(each, PlacedEdge)]
    sizes = {each: own for own, each in enumerate(every)}
    selected = found.graph.select_backwards(sizes, 60)
    assert leading(family, selected, places) == {*selected}
    some = every[:: len(every) // 60]
    assert found.graph.keep_leading(some) == leading(family, some, places)
    live = leading(family, every, places)
    assert found.graph.keep_leading(every) == live
    assert len(live) < len(every)
    circuit = [*(reached(family, selected, places) & {*selected})]
    assert found.graph.covers(circuit) == (leading(family, circuit, places) == {*circuit})
    begun = [each for each in every if named(each.edge)[0] == EMBED and each in live]
    direct = [each for each in begun if {each} == leading(family, [each], places)][:9]
    numbers = [every.index(each) for each in direct]
    assert found.graph.covers(direct)
    drawn = [[every[n] for n in own] for own in found.random_choices(numbers, 0)]
    assert len({*map(frozenset, drawn)}) == 8
    for own in drawn:
        assert len(own) == len(direct)
        assert leading(family, own, places) == {*own} == reached(family, own, places)


def test_placed_circuit_equals_its_listed_edges_in_rules(tmp_path: Path) -> None:
    """With picks of its largest edges, a control, and a second experiment on the same block."""
    at = ", ".join(COVERED)
    rule = "ablate all but {} at tokens * with other"
    uses = "".join(
        experiment("from other into clean", rule.format(own), name=f"e{n}", block="p")
        for n, own in enumerate(("c", "top 50 of c", "top 0 of c"))
    )
    path = write(tmp_path, fit(ALL_ROWS, call="eap(size: 60)", at=at), uses)
    (trained,) = train(path)
    content = json.loads((trained.folder / "mask.json").read_text("utf-8"))
    labels = [content["labels"][n] for n in content["chosen"]]
    assert len(labels) == 60
    found = run(path, store=path.parent / "store").files[0].experiments
    listed = experiment("from other into clean", rule.format("d"), block="p")
    (tmp_path / "mask.json").write_text(json.dumps(content), "utf-8")
    parts = (f"circuit d = {', '.join(labels)}\n", f"circuit d = {', '.join(labels[:50])}\n")
    for n, line in ((0, parts[0]), (1, parts[1]), (0, 'circuit d = saved("mask.json")\n')):
        again = write(tmp_path, line, listed)
        own = run(again, store=False).files[0].experiments[0]
        np.testing.assert_allclose(found[n].measures[0].patched, own.measures[0].patched, atol=1e-5)
    circuit = found[0].circuit
    assert circuit is not None
    pairs = [
        f"{of} -> {to} at {at}" for (of, to), at in zip(circuit.edges, circuit.places, strict=True)
    ]
    assert pairs == labels
    assert list(circuit.scores) == pytest.approx([content["scores"][n] for n in content["chosen"]])
    every = [each.measures[0].patched for each in found]
    assert np.abs(every[0] - every[1]).max() > 1e-4
    assert np.abs(every[1] - every[2]).max() > 1e-4


def test_joined_and_separate_positions_have_different_trainings(tmp_path: Path) -> None:
    keys = set[str]()
    for at in (PAIR, "cue token, last token"):
        (trained,) = train(write(tmp_path, fit(ALL_ROWS, at=at), USE))
        keys.add(trained.folder.name)
    assert len(keys) == 2


@pytest.mark.parametrize(("size", "cells"), [(1, 1), (12, 12), (300, 190)])
def test_untrained_placed_circuit_is_planned_with_different_edges(
    size: int, cells: int, tmp_path: Path
) -> None:
    """As `without each edge` has one cell for an edge at several positions."""
    line = fit(ALL_ROWS, call=f"eap(size: {size})", at=", ".join(PLACES))
    use = experiment("ablate all but c without each edge at tokens * with zero", block="p")
    found = checked(write(tmp_path, line, use), double("llama"))
    (fitted,) = fits_of_file(found).values()
    assert isinstance(fitted.file, TrainedMask)
    assert len({*fitted.file.chosen}) == size
    planned = found.experiments[0]
    (axis,) = (each for each in planned.axes if each.name == "edge")
    assert len(axis) == cells
    circuit = planned.rules[0].circuit
    assert circuit is not None
    assert len(circuit.places) == min(size, len(PLACES))
    assert fitted.objective is not None
    price = training_cost("c", fitted.file, fitted.objective, fitted.objective.model.shape)
    assert price.assumed == ("12 edges at one position each" if size == 12 else "")


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "lacking": ("token 8, last token", "eap(size: 3)", "E0310", "in 1 of 4 rows"),
    "shared": ("last token, token 1, tokens 1..2", "eap(size: 3)", "E0342", "at one position"),
    "all": ("tokens *, last token", "eap(size: 3)", "E0342", "are both token"),
    "sweep": ("each item token, last token", "eap(size: 3)", "E0304", "name each position"),
    "sweep of one": ("token 1..2", "eap(size: 3)", "E0304", "name each position"),
    "answer": ("cue token, tokens * and answer", "eap(size: 3)", "E0342", "not of the answer"),
    "size": ("cue token, last token", "eap(size: 20000)", "E0342", "`size` is 20,000"),
}


def test_mean_at_positions_of_different_lengths_is_an_error(tmp_path: Path) -> None:
    """A token that only held-out rows have would have no mean."""
    line = fit(ALL_ROWS, source="with: mean", at="cue token, tokens except cue token")
    (error,) = training_errors(write(tmp_path, line, USE))
    assert error.code == "E0324"


@pytest.mark.parametrize("name", MISTAKES)
def test_positions_at_which_edges_cannot_be_scored_are_errors(name: str, tmp_path: Path) -> None:
    at, call, code, said = MISTAKES[name]
    (error,) = training_errors(write(tmp_path, fit(ALL_ROWS, call=call, at=at), USE))
    assert error.code == code, error
    assert said in f"{error.message} {error.help_text}", error


def test_position_that_measured_rows_lack_is_an_error(tmp_path: Path) -> None:
    use = experiment("ablate c at tokens * with zero")
    (error,) = training_errors(write(tmp_path, fit(ALL_ROWS, at="cue token, last token"), use))
    assert error.code == "E0308"
    assert "`cue`" in error.message


def test_overlap_of_trained_circuits_at_positions_counts_edges_at_each_group_of_tokens(
    tmp_path: Path,
) -> None:
    line = fit(ALL_ROWS, at="cue token, {token 1, last token}")
    observed = "experiment o { model m prompts p observe overlap c with d as shared }\n"
    listed = "circuit d = embed -> logits\n"
    with pytest.raises(mechdsl.MechdslError) as problem:
        run(write(tmp_path, line, USE + listed + observed))
    assert {each.code for each in problem.value.diagnostics} == {"E0642"}
    train(write(tmp_path, line, USE))
    (own,) = run(write(tmp_path, line, USE)).files[0].experiments
    chosen = {*zip(own.circuit.edges, own.circuit.named_places, strict=True)}
    edge = next(edge for edge, at in chosen if "cue token" in at)
    listed = f"circuit d = {' -> '.join(edge)}\n"
    found = run(write(tmp_path, line, USE + listed + observed))["o"]
    values = {each.label: float(each.patched[0, 0]) for each in found.measures}
    assert values["shared"] == len({at for of, at in chosen if of == edge})
    assert values["shared recall"] == values["shared"] / 3  # cue, token 1 or last, other tokens
    assert values["shared precision"] == values["shared"] / 12


def test_graph_json_of_scores_at_positions_is_read_as_the_same_circuit(tmp_path: Path) -> None:
    line, rule = (
        fit(ALL_ROWS, at="cue token, {token 1, last token}"),
        "ablate all but c at tokens *",
    )
    lines = (f"{rule} with other", 'report graph to "c.json"', 'report graph top 3 to "top.json"')
    use = experiment("from other into clean", *lines, block="p")
    train(write(tmp_path, line, use))
    (own,) = run(write(tmp_path, line, use)).files[0].experiments
    content = json.loads((tmp_path / "c.json").read_text("utf-8"))
    train(write(tmp_path, line, use), out=tmp_path / "out")
    mask = json.loads((tmp_path / "out" / "c" / "mask.json").read_text("utf-8"))
    scores = dict(zip(mask["labels"], mask["scores"], strict=True))
    assert {name: each["score"] for name, each in content["edges"].items()} == scores
    chosen = [name for name, each in content["edges"].items() if each["in_graph"]]
    assert {*chosen} == {mask["labels"][number] for number in mask["chosen"]}
    assert len(chosen) == 12
    top = json.loads((tmp_path / "top.json").read_text("utf-8"))["edges"]
    assert top == dict(list(content["edges"].items())[:3])
    read = use.replace('"c.json"', '"d.json"')
    again = write(tmp_path, 'circuit c = saved("c.json")', read)
    (found,) = run(again, store=False).files[0].experiments
    assert found.circuit.scores == own.circuit.scores
    assert found.circuit.named_places == own.circuit.named_places
    assert found.circuit.edges == own.circuit.edges
    np.testing.assert_allclose(found.measures[0].patched, own.measures[0].patched, atol=1e-5)
    assert json.loads((tmp_path / "d.json").read_text("utf-8"))["edges"] == content["edges"]
    largest = write(tmp_path, 'circuit c = saved("d.json", size: 20)', read)
    (more,) = run(largest, store=False).files[0].experiments
    assert {*zip(own.circuit.edges, own.circuit.places, strict=True)} < {
        *zip(more.circuit.edges, more.circuit.places, strict=True)
    }
    again = json.loads((tmp_path / "d.json").read_text("utf-8"))["edges"]
    assert {name: each["score"] for name, each in again.items()} == scores
    assert sum(each["in_graph"] for each in again.values()) == 20
