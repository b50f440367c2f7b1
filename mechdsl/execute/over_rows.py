"""Observations over all rows: the vectors of each cell are gathered, and made one number of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.attention_rollout import between, rollouts
from mechdsl.execute.gathering import Gatherer, Joined, points_of
from mechdsl.execute.kept_together import kept_together
from mechdsl.execute.kept_values import KeptValues
from mechdsl.execute.measured_values import CellGap, MeasuredValues, base_per_cell
from mechdsl.execute.not_finite import cell_words
from mechdsl.execute.observed_weights import WeightCells
from mechdsl.execute.read_vectors import LanesOf, prompt_batches, read_vectors, reader
from mechdsl.execute.readout import Readout
from mechdsl.execute.token_cells import token_cells
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.unusable import Unusable
from mechdsl.hooks.weight_maps import WeightMaps
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.prompts.prompt_table import Hits, PositionCell, Run
from mechdsl.resolve.measures import evaluate
from mechdsl.resolve.over_rows import (
    OverRows,
    OverTokens,
    RowVectors,
    Training,
)
from mechdsl.resolve.resolved import ResolvedMeasure
from mechdsl.resolve.resolved_rule import SitePoint
from mechdsl.rules.observations.maps import OfMaps
from mechdsl.rules.observations.rollout import Rollout
from mechdsl.rules.observations.weights import OfWeights

Singles: TypeAlias = NDArray[np.float32]
Make: TypeAlias = Callable[[], Sequence[Floats]]


@dataclass(frozen=True, eq=False)
class Together:
    """What was observed of all rows of an experiment."""

    kept: Ints
    """[column] the rows of the table."""
    values: list[Floats]
    """Per measure, [cell, column]; NaN where a row isn't part of the cell."""
    stored: set[int]
    """Cells that were there before the run."""

    def of(self, rows: Rows) -> list[Floats]:
        """Per measure, [row]."""
        columns = np.searchsorted(self.kept, rows.prompt)
        return [values[rows.cell, columns] for values in self.values]


def over_rows(plan: ExperimentPlan) -> tuple[RulePlan, OverRows] | None:
    """The rule that observes all rows at once, if there is one."""
    for rule in plan.rules:
        if isinstance(rule.rule.does, OverRows):
            return rule, rule.rule.does
    return None


def observe_together(
    plan: ExperimentPlan,
    runs: UnpatchedRuns,
    measured: MeasuredValues,
    store: KeptValues | None = None,
) -> Together | None:
    """What is observed of all kept rows at once; None where nothing is. Cells that it can't be made
    of are gaps of `measured`. store: where cells are looked up and kept."""
    observed = over_rows(plan)
    if observed is None:
        return None
    experiment = plan.experiment
    shape, run = (plan.n_cells, len(measured.kept)), experiment.spec.base
    base = [
        np.broadcast_to(base_per_cell(plan, measured, run, number), shape)
        for number in range(len(experiment.measures))
    ]
    found = [
        np.full(each.shape, np.nan) if measure.observed else each.copy()
        for measure, each in zip(experiment.measures, base, strict=True)
    ]
    looked = [values for m, values in zip(experiment.measures, found, strict=True) if m.observed]
    kept = kept_together(store, plan, observed[0], measured.kept, runs.table)
    known = {} if kept is None else kept.known()
    for cell, (there, own) in known.items():
        for values, each in zip(looked, own, strict=True):
            values[cell, there] = each
    exists = plan.exists
    gatherer = _Gatherer(plan, *observed, runs, measured.kept, known.keys())
    for cell, there, make in _made(gatherer, measured):
        if not exists[cell]:
            continue
        try:
            made = make()
        except (ValueError, ArithmeticError) as problem:
            _lack(plan, measured, cell, there, str(problem))
            continue
        for values, each in zip(looked, made, strict=True):
            values[cell, there] = each
        if kept is not None:
            kept.made(cell, there, made)
    if kept is not None:
        kept.flush()
    return Together(measured.kept, found, set(known))


def _made(gatherer: _Gatherer, measured: MeasuredValues) -> Iterator[tuple[int, Ints, Make]]:
    """(cell, its columns, what gives the values of each measure of what is observed)."""
    does, seed = gatherer.does, gatherer.plan.experiment.seed
    measures = [each for each in gatherer.plan.experiment.measures if each.observed]
    if isinstance(does, OfWeights):
        yield from _of_weights(gatherer, does, measures, measured)
        return
    if isinstance(does, OfMaps):
        yield from _of_maps(gatherer, does, measures)
        return
    if isinstance(does, Rollout):
        for cell, there, values in gatherer.rollouts():
            yield cell, there, partial(_evaluated, measures, {does.word: values})
        return
    if isinstance(does, OverTokens):

        def read(numbers: Callable[[], Mapping[str, Floats]]) -> list[Floats]:
            return _evaluated(measures, numbers())

        for cell, there, numbers in token_cells(gatherer, does):
            yield cell, there, partial(read, numbers)
        return
    words = (does.word, *does.controls)

    def made(seen: RowVectors) -> list[Floats]:
        return _evaluated(measures, dict(zip(words, does.per_row(seen, seed), strict=True)))

    for cell, there, seen in gatherer.cells():
        yield cell, there, partial(made, seen)


def _of_weights(
    gatherer: _Gatherer,
    does: OfWeights,
    measures: Sequence[ResolvedMeasure],
    measured: MeasuredValues,
) -> Iterator[tuple[int, Ints, Make]]:
    """The same of an observation of weights."""
    plan, every = gatherer.plan, np.arange(len(gatherer.kept))
    run = gatherer.runs.named(gatherer.rule.rule.run)
    names = [axis.name for axis in plan.experiment.axes]
    cells = WeightCells(
        does,
        WeightMaps(gatherer.runs.model_of(run)),
        Readout.of(measures),
        gatherer.kept,
        run.name,
        [(*sites, *beside) for sites, beside in zip(gatherer.sites, gatherer.beside, strict=True)],
        plan.coordinates[names.index("value")] if "value" in names else np.zeros(plan.n_cells, int),
        plan.items,
    )

    def made(cell: int) -> list[Floats]:
        measured.listed[cell] = cells.listed(cell)
        if does.gives == "logits":
            return cells.read(cell)
        numbers = {word: np.array(number) for word, number in cells.numbers(cell).items()}
        return _evaluated(measures, numbers)

    for cell in range(plan.n_cells):
        if cell not in gatherer.known:
            yield cell, every, partial(made, cell)


def _of_maps(
    gatherer: _Gatherer, does: OfMaps, measures: Sequence[ResolvedMeasure]
) -> Iterator[tuple[int, Ints, Make]]:
    """The same of maps that other experiments made; rows without a map or a region aren't in it."""
    assert does.scores is not None
    own = {word: values[..., gatherer.kept] for word, values in does.scores.by_word.items()}
    rule = gatherer.rule
    for cell, place in enumerate(zip(rule.site_of_cell, rule.position_of_cell, strict=True)):
        numbers = {word: values[place] for word, values in own.items()}
        there = np.flatnonzero(np.isfinite(np.stack(list(numbers.values()))).all(axis=0))
        if len(there):
            found = {word: values[there] for word, values in numbers.items()}
            yield cell, there, partial(_evaluated, measures, found)


def _evaluated(measures: Sequence[ResolvedMeasure], by_name: Mapping[str, Floats]) -> list[Floats]:
    """Per measure, [row] or one number of all, of what is observed by its words."""
    return [
        np.asarray(evaluate(m.expression, {a.node: by_name[a.name] for a in m.atoms}.__getitem__))
        for m in measures
    ]


def _lack(
    plan: ExperimentPlan, measured: MeasuredValues, cell: int, there: Ints, reason: str
) -> None:
    """A cell has no value of what is observed."""
    base = plan.experiment.spec.base
    first = Unusable(int(measured.kept[there[0]]), base, cell_words(plan, cell))
    for number, measure in enumerate(plan.experiment.measures):
        if measure.observed:
            measured.gaps[number, cell] = CellGap(reason, first, len(there))


class _Gatherer(Gatherer):
    """Gathers the vectors of an experiment's cells, as many at a time as there is room for."""

    def cells(self) -> Iterator[tuple[int, Ints, RowVectors]]:
        """(cell, its columns among the kept rows, their vectors), of cells that have any."""
        rule = self.rule
        key_of_cell = np.zeros_like(rule.position_of_cell)
        key_of_cell = key_of_cell if rule.key_of_cell is None else rule.key_of_cell
        places = np.stack([rule.position_of_cell, key_of_cell])
        for place, key in np.unique(places, axis=1).T.tolist():
            spots = [rule.positions[place], *self.others[key : key + 1]]
            runs = [self.runs.named(self.plan.experiment.spec.base)] * len(spots)
            if rule.rule.does.reads == "run":
                spots.append(rule.sources[place])
                runs.append(self.runs.named(rule.rule.run))
            own = np.flatnonzero((places[0] == place) & (places[1] == key)).tolist()
            own = [cell for cell in own if cell not in self.known]
            there = [all(spot.hits[row] for spot in spots) for row in self.kept.tolist()]
            columns = np.flatnonzero(there)
            if not len(columns) or not own:
                continue
            keys = self.keys(spots, self.kept[columns], runs, self.runs.table)
            for some in self.fitting(own, len(columns) * len(spots)):
                wanted = list(dict.fromkeys(each for cell in some for each in self.needs(cell)))
                found = [
                    self._gathered(wanted, spot, run, columns)
                    for spot, run in zip(spots, runs, strict=True)
                ]
                training = self._training(wanted, place)
                for cell in some:
                    seen = self._seen(cell, found, columns, keys, spots)
                    yield cell, columns, replace(seen, training=training.get(self.sites[cell]))

    def rollouts(self) -> Iterator[tuple[int, Ints, Floats]]:
        """(cell, its columns among the kept rows, [column] what its queries have of its keys)."""
        rule, run = self.rule, self.runs.named(self.plan.experiment.spec.base)
        assert rule.key_of_cell is not None
        cells = [cell for cell in range(self.plan.n_cells) if cell not in self.known]
        spots = [
            (rule.positions[rule.position_of_cell[cell]], self.others[rule.key_of_cell[cell]])
            for cell in cells
        ]
        if not cells:
            return
        values = np.full((len(cells), len(self.kept)), np.nan)
        (points,) = set(self.sites)
        lanes_of = partial(self.runs.reader, run)
        for row, mixed in rollouts(self.runs.model_of(run), run, points, self.kept, lanes_of):
            column = int(np.searchsorted(self.kept, row))
            for number, (queries, keys) in enumerate(spots):
                if queries.hits[row] and keys.hits[row]:
                    own = [[t for each in spot.hits[row] for t in each] for spot in (queries, keys)]
                    values[number, column] = between(mixed, *own)
        for cell, found in zip(cells, values, strict=True):
            there = np.flatnonzero(np.isfinite(found))
            if len(there):
                yield cell, there, found[there]

    def _training(self, wanted: Sequence[Joined], place: int) -> dict[Joined, Training]:
        """Of the rows that it is fitted on at a position, where these are others."""
        own = self.does.trained_on
        if own is None:
            return {}
        spot, table, run = own.cells[place], own.table, own.run
        rows = np.flatnonzero([bool(hits) for hits in spot.hits])
        model = self.runs.model_of(run)

        def lanes_of(points: Sequence[SitePoint]) -> LanesOf:
            return reader(model, table, run, points, seed=self.runs.seed, side=self.runs.side)

        found = self._read(wanted, spot, run, rows, lanes_of)
        keys = self.keys([spot], rows, [run], table)
        return {each: Training(of.astype(np.float64), rows, keys) for each, of in found.items()}

    def _seen(
        self,
        cell: int,
        found: Sequence[Mapping[Joined, Singles]],
        columns: Ints,
        keys: Sequence[bytes],
        spots: Sequence[PositionCell],
    ) -> RowVectors:
        """found: per position, the vectors of joined sites."""
        own, beside = self.sites[cell], self.beside[cell]
        other = found[0][beside] if beside else found[1][own] if len(found) > 1 else None
        rows = self.kept[columns]
        if beside or self.rule.rule.does.reads == "run":  # of a token with what it is elsewhere
            pairs = [(1, 0)] * len(rows)
        else:
            pairs = [_pairs(*(spot.hits[row] for spot in spots)) for row in rows.tolist()]
        return RowVectors(
            found[0][own].astype(np.float64),
            rows,
            keys,
            float(torch.finfo(self.runs.model.dtype).eps),
            None if other is None else other.astype(np.float64),
            None,
            self._number(cell),
            np.array(pairs, dtype=np.float64),
        )

    def _number(self, cell: int) -> int:
        """Which of several values of what it observes is asked for, from 1; 0 where it has one."""
        names = [axis.name for axis in self.plan.experiment.axes]
        axis = self.does.counts
        return int(self.plan.coordinates[names.index(axis)][cell]) + 1 if axis in names else 0

    def _gathered(
        self, combinations: Sequence[Joined], position: PositionCell, run: Run, columns: Ints
    ) -> dict[Joined, Singles]:
        """[column, width] of each."""
        lanes_of = partial(self.runs.reader, run)
        return self._read(combinations, position, run, self.kept[columns], lanes_of)

    def _read(
        self,
        combinations: Sequence[Joined],
        position: PositionCell,
        run: Run,
        prompts: Ints,
        lanes_of: Callable[[Sequence[SitePoint]], LanesOf],
    ) -> dict[Joined, Singles]:
        """[prompt, width] of each: the mean over the tokens of the position and draws of noise, or,
        where the observation is of directions, the sum of the unit vectors."""
        points = points_of(combinations)
        model = self.runs.model_of(run)
        sums = [np.zeros((len(prompts), self.width(point))) for point in points]
        counts, lanes = np.zeros(len(prompts)), lanes_of(points)
        batches = prompt_batches(model, run, points, prompts)
        for read in read_vectors(lanes, points, [position], batches):
            row = np.searchsorted(prompts, read.prompts)
            vectors = read.vectors.double().cpu().numpy()
            if self.does.of_directions:
                vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            np.add.at(sums[read.point], row, vectors)
            if read.point == 0:
                np.add.at(counts, row, 1)
                if run.derived is not None and len(batches) > 1:  # what it is made of
                    self.runs.forget()
        over = np.ones_like(counts) if self.does.of_directions else counts
        means = {
            point: (total / over[:, None]).astype(np.float32)
            for point, total in zip(points, sums, strict=True)
        }
        return {
            each: np.concatenate([means[point] for point in each], axis=1) for each in combinations
        }


def _pairs(one: Hits, other: Hits | None = None) -> tuple[int, int]:
    """(pairs of different tokens, pairs of a token with itself) of two positions of a row, or
    within one."""
    own = [token for tokens in one for token in tokens]
    others = own if other is None else [token for tokens in other for token in tokens]
    same = sum(own.count(token) for token in others)
    return len(own) * len(others) - same, same
