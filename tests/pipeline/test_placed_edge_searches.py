"""Circuits whose edges a search or a mask chooses at each of several positions.

Decisions, values and gradients are compared with a float64 pass that recomputes all inputs, one
unpadded prompt at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.execute.mask_training import EdgeSearch
from mechdsl.fits.reports import CircuitReport, MaskReport
from mechdsl.planner.training_cost import training_cost
from mechdsl.program.trainers import EdgeSearchTrainer
from mechdsl.resolve.circuits import EdgeGraph
from mechdsl.resolve.types import PlacedEdge, TrainedMask

from ..quick import in_turn
from ..rules.circuits import circuit_pass
from ..rules.models import double
from ..rules.support import rows, tokens
from ..rules.test_ablated_circuits import edges, named, shape_of
from .test_edge_scores import fit, open_rows
from .test_placed_edge_scores import COVERED, PLACES, USE, circuit_value, fills_of, leading
from .test_trained_dictionaries import train, write
from .test_trained_masks import QUICK, training_rows
from .test_trained_rotations import loss_by_hand

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
FAMILIES = ("llama", "gpt2", "gpt_neox")
WHERE = ((PLACES, "left"), (COVERED, "right"))
SOURCES = ("from: other", "with: zero", "from: turned")
ONE_ROW = "validation: 50%, limit: 2, batch: 8"


def search(
    path: Path, family: str, side: Any = None
) -> tuple[EdgeSearch, list[PlacedEdge], TrainedMask, list[int]]:
    """A finished search, its candidates, and the table indices of its training rows."""
    mask, found = open_rows(path, double(family), side)
    every = [each for each in mask.candidates if isinstance(each, PlacedEdge)]
    assert len(every) == len(mask.candidates)
    searched = EdgeSearch(found, mask.training.trainer_of(EdgeSearchTrainer))
    for _ in searched.run():
        pass
    return searched, every, mask, [found.objective.table.row_ids[row] for row in found.trained]


def reference_groups(
    every: Sequence[PlacedEdge], places: int, *, coarse: bool
) -> list[list[PlacedEdge]]:
    """The edges that a search ablates together: those of a node, of an input or single ones, at one
    position. All groups of a module, or of a receiver, are at one position before the next."""
    names = {edge: named(edge.edge) for edge in every}
    senders = [*dict.fromkeys(of for of, _ in names.values())]
    receivers = [to for of, to in names.values() if of == senders[0]]
    receivers = [*dict.fromkeys(receivers)]
    found: list[list[PlacedEdge]] = []

    def add(units: Sequence[Collection[str]], end: int) -> None:
        for place in reversed(range(places)):
            found.extend(
                [e for e in every if e.place == place and names[e][end] in u] for u in units
            )

    modules = [of for of in reversed(senders) if of.startswith("L")]
    by_module = [[*own] for _, own in groupby(modules, lambda of: of.split("H")[0])]
    if coarse:
        for own in by_module:
            add([own], 0)
        for own in by_module:
            if len(own) > 1:
                add([{of} for of in own], 0)
        inputs = [to for to in reversed(receivers) if to[-2:] in (".q", ".k", ".v")]
        for _, own in groupby(inputs, lambda to: (to.split("H")[0], to[-1])):
            add([{to} for to in own], 1)
    for to in reversed(receivers):
        for place in reversed(range(places)):
            single = [e for e in reversed(every) if e.place == place and names[e][1] == to]
            found += [[edge] for edge in single]
    return found


def decide(
    family: str,
    groups: Sequence[Sequence[PlacedEdge]],
    ids: Sequence[int],
    places: Sequence[str],
    source: str,
    threshold: float,
) -> tuple[set[PlacedEdge], dict[PlacedEdge, float]]:
    """The edges that are left after a search, and the last change of each one."""
    every = dict.fromkeys(edge for group in groups for edge in group)

    def mean(ablated: Collection[PlacedEdge]) -> float:
        kept = [edge for edge in every if edge not in ablated]
        return float(np.mean([circuit_value(family, row, kept, places, source) for row in ids]))

    ablated, changes, value = set[PlacedEdge](), dict[PlacedEdge, float](), mean(())
    for group in groups:
        left = {*group} - ablated
        if left:
            change = mean(ablated | left) - value
            changes |= dict.fromkeys(left, change)
            if -change < threshold:  # maximised
                ablated |= left
                value += change
    return {*every} - ablated, changes


@pytest.mark.parametrize("coarse", [True, False])
def test_steps_at_positions_go_from_the_last_position_to_the_first(coarse: bool) -> None:
    places = [0, 1, 2]
    levels = ("blocks", "heads", "inputs", "edges") if coarse else ("edges",)
    for family in FAMILIES:
        graph = EdgeGraph(shape_of(family))
        every = [PlacedEdge(edge, place, "") for edge in graph.every for place in places]
        own = [{*step.edges} for step in graph.list_search_steps(levels, every)]
        groups = reference_groups(every, len(places), coarse=coarse)
        assert own == [{*group} for group in groups]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "source"), in_turn(FAMILIES, SOURCES))
@pytest.mark.parametrize(("call", "where"), in_turn(("coarse_to_fine", "acdc"), WHERE))
def test_decisions_at_positions_equal_a_group_by_group_reference(
    call: str, where: tuple[tuple[str, ...], Any], family: str, source: str, tmp_path: Path
) -> None:
    """Groups are tried even if they lead only to ablated edges. The last change of such an edge is
    set to 0."""
    (places, side), threshold = where, 0.02
    line = fit(ONE_ROW, call=f"{call}(threshold: {threshold})", source=source, at=", ".join(places))
    searched, every, _, ids = search(write(tmp_path, line, USE), family, side)
    groups = reference_groups(every, len(places), coarse=call != "acdc")
    left, changes = decide(family, groups, ids, places, source, threshold)
    kept = {edge for edge, own in zip(every, searched.kept.tolist(), strict=True) if own}
    assert kept == left
    own = dict(zip(every, searched.scores.tolist(), strict=True))
    measured = kept | {edge for edge, change in own.items() if change}
    for edge in measured:
        assert own[edge] == pytest.approx(changes[edge], abs=1e-5)
    assert len({edge.place for edge in measured}) > 1


@pytest.mark.slow
def test_greedy_search_at_positions_ablates_the_least_important_edge(tmp_path: Path) -> None:
    """Checks the first step against other edges, in one row; edges to ablated ones are dropped."""
    options, at = ONE_ROW, ", ".join(PLACES)
    mask, _ = open_rows(
        write(tmp_path, fit(options, call="greedy(size: 9)", at=at), USE), double("llama")
    )
    count = len(mask.candidates)
    line = fit(options, call=f"greedy(size: {count - 1})", at=at)
    searched, every, _, ids = search(write(tmp_path, line, USE), "llama")

    def mean(ablated: PlacedEdge) -> float:
        kept = [edge for edge in every if edge != ablated]
        return float(np.mean([circuit_value("llama", r, kept, PLACES, "from: other") for r in ids]))

    kept = {edge for edge, own in zip(every, searched.kept, strict=True) if own}
    dropped = [edge for edge in every if edge not in kept]
    means = {edge: mean(edge) for edge in (*dropped[:20], *every[::9])}
    best = max(means.values())
    assert any(means[edge] == pytest.approx(best, abs=1e-6) for edge in dropped if edge in means)
    assert leading("llama", [*kept], PLACES) == kept
    assert searched.measured == count


def test_report_on_a_search_at_positions(tmp_path: Path) -> None:
    """The measured means are those of passes with the chosen edges."""
    at = ", ".join(PLACES)
    path = write(tmp_path, fit(ONE_ROW, call="coarse_to_fine(threshold: 0.02)", at=at), USE)
    (found,) = train(path)
    report = found.report
    assert isinstance(report, CircuitReport)
    assert all(any(label.endswith(f" at {place}") for place in PLACES) for label in report.chosen)
    assert "are at no position: edges there aren't candidates" in report.made


@pytest.mark.parametrize("call", ["acdc(threshold: 1)", "coarse_to_fine(threshold: 1)"])
def test_plan_counts_a_step_at_each_position(call: str, tmp_path: Path) -> None:
    path = write(tmp_path, fit(ONE_ROW, call=call, at=", ".join(PLACES)), USE)
    mask, found = open_rows(path, double("llama"))
    every = [each for each in mask.candidates if isinstance(each, PlacedEdge)]
    groups = reference_groups(every, len(PLACES), coarse=not call.startswith("acdc"))
    cost = training_cost("c", mask, found.objective, found.model.shape)
    assert cost.steps == len(groups)


# --- masks ----------------------------------------------------------------------------------------


def value_with_shares(
    family: str,
    row: int,
    shares: Mapping[PlacedEdge, Tensor],
    places: Sequence[str],
    source: str,
) -> Tensor:
    """The measure while each edge carries a share of the other value at its position."""
    text = rows("clean")[row]
    given = fills_of(family, source)[row]
    at = [tokens(text, place) for place in places]
    weights: dict[tuple[str, str], Tensor] = {
        edge: torch.zeros(len(text.ids), 1, dtype=torch.double) for edge in edges(family)[2]
    }
    for edge, share in shares.items():
        here = torch.zeros(len(text.ids), 1, dtype=torch.double)
        here[at[edge.place]] = 1
        weights[named(edge.edge)] = weights[named(edge.edge)] + here * share
    every = sorted({token for own in at for token in own})
    run = inspect.unwrap(circuit_pass)
    return loss_by_hand(run(family, double(family), text.ids, given, weights, every)[-1], row)


mask_of = partial(fit, QUICK.replace("25%", "0%"), call="mask(size: 3)")


@pytest.mark.parametrize(("family", "source"), in_turn(FAMILIES, ("from: other", "with: zero")))
@pytest.mark.parametrize("where", WHERE)
def test_mask_at_positions_has_the_loss_and_gradient_of_autograd(
    where: tuple[tuple[str, ...], Any], family: str, source: str, tmp_path: Path
) -> None:
    """For ragged rows in one batch, each with other gates."""
    places, side = where
    path = write(tmp_path, mask_of(source=source, at=", ".join(places)), USE)
    mask, found = training_rows(path, double(family), side)
    every = [each for each in mask.candidates if isinstance(each, PlacedEdge)]
    ids, batch = found.objective.table.row_ids, [0, 2]
    random = torch.Generator().manual_seed(5)
    mine = torch.rand(2, len(every), generator=random).double().requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    values = found.values(np.array(batch), mine)
    expected = torch.stack(
        [
            value_with_shares(
                family, ids[row], dict(zip(every, theirs[n], strict=True)), places, source
            )
            for n, row in enumerate(batch)
        ]
    )
    assert torch.allclose(values.double(), expected, atol=1e-5)
    (own,) = torch.autograd.grad(values.sum(), mine)
    (other,) = torch.autograd.grad(expected.sum(), theirs)
    assert torch.allclose(own, other, atol=1e-5, rtol=1e-5)
    at_each = other.abs().sum(0).reshape(-1, len(places)).amax(0)
    assert (at_each > 1e-4).all()


def test_trained_mask_at_positions_measures_its_edges(tmp_path: Path) -> None:
    """The mask writes the chosen edges at their positions, and the report has the measure."""
    options = "steps: 6, batch: 4, rate: 0.3, validation: 0%, measure_on_training_rows: true"
    line = fit(options, call="mask(size: 4, keep: true)", at=", ".join(PLACES))
    path = write(tmp_path, line, USE)
    (found,) = train(path)
    report = found.report
    assert isinstance(report, MaskReport)
    mask, _ = training_rows(path, double("llama"))
    every = [each for each in mask.candidates if isinstance(each, PlacedEdge)]
    labels = {" -> ".join(named(e.edge)) + f" at {PLACES[e.place]}": e for e in every}
    chosen = [labels[label] for label in report.chosen]
    by_hand = [circuit_value("llama", row, chosen, PLACES, "from: other") for row in range(4)]
    assert report.trained == pytest.approx(np.mean(by_hand), abs=1e-4)
    assert report.candidates == len(every)
