"""Sampling units of an experiment: rows that a measure can't distinguish count once.

A hundred prompts with the same prefix are one observation of an activation in that prefix. Values
aren't compared. Rows are equal if the visible tokens of every relevant run are equal, and so are
the positions that are read and written and the metric's own texts. Random draws for a row (noise, a
donor) aren't further observations of it. The units of each cell are known before a run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Ints
from mechdsl.planner.plan import ExperimentPlan
from mechdsl.planner.rows import RulePlan, is_below_attention
from mechdsl.prompts.runs import Hits, PositionCell, PromptRun, RunRow
from mechdsl.resolve.observations import RowSetObservation
from mechdsl.resolve.types import (
    ItemNumber,
    MetricTerm,
    ResolvedExperiment,
    ResolvedMeasure,
    ResolvedRule,
)
from mechdsl.statistics.measurements import SamplingDesign, group_cells_by_view
from mechdsl.vocab.metrics import EFFECTS

CellView = tuple[int, ...]
"""The properties of a cell that affect the comparison of rows: per rule, the indices of its
positions and keys and whether it reads below the first attention; then the occurrence number."""


class RowViews:
    """The rows of one experiment as its measures see them."""

    def __init__(
        self, plan: ExperimentPlan, kept: Ints, causal: Callable[[str | None], bool]
    ) -> None:
        """Prepare the comparison of rows.

        Args:
            kept: Rows in the experiment.
            causal: Whether tokens of a model (None: the experiment's) don't see later tokens.
        """
        self.plan = plan
        self.experiment = plan.experiment
        self.kept: list[int] = kept.tolist()
        self.causal = causal
        self.ahead = plan.experiment.looks_ahead
        self._prefixes: dict[int, Ints] = {}
        self._keys = [
            None if rule.rule.edge is None else list(rule.rule.edge.keys.written.values())
            for rule in plan.rules
        ]

    def of(self, number: int, there: NDArray[np.bool_]) -> Ints | None:
        """Return codes of shape [1 or cell, prompt] for the existing cells: equal for rows that a
        measure can't distinguish; None if all rows differ."""
        measure = self.experiment.measures[number]
        effect = EFFECTS[self.experiment.spec.measures[number].effect]
        runs = effect.reads if effect.circuit is None else ("patched", "base")
        cells = np.flatnonzero(there).tolist()
        keys = [self._cell(cell, measure) for cell in cells]
        found = {key: self._codes(key, measure, runs) for key in dict.fromkeys(keys)}
        codes = list(found.values())
        if not codes or all(len(set(each)) == len(each) for each in codes):
            return None
        if all(each == codes[0] for each in codes):
            return np.array([codes[0]], dtype=np.int64)
        return np.array([found[key] for key in keys], dtype=np.int64)

    def _cell(self, cell: int, measure: ResolvedMeasure) -> CellView:
        indices: list[int] = []
        for rule in self.plan.rules:
            acts = rule.active is None or bool(rule.active[cell])
            indices.append(int(rule.position_of_cell[cell]) if acts else -1)
            indices.append(-1 if rule.key_of_cell is None else int(rule.key_of_cell[cell]))
            indices.append(int(_cell_is_below_attention(rule, cell)))
        by_item = any(atom.by_item for atom in measure.atoms)
        item = self.plan.items[cell] if by_item else None
        return (*indices, -1 if item is None else item)

    def _codes(self, cell: CellView, measure: ResolvedMeasure, runs: Sequence[str]) -> list[int]:
        """Return the code of each kept row; rows that aren't part of the cell get unique codes."""
        numbers: dict[Hashable, int] = {}
        codes: list[int] = []
        for row in self.kept:
            view = self._view(cell, measure, runs, row)
            seen = ("left out", row) if view is None else view
            codes.append(numbers.setdefault(seen, len(numbers)))
        return codes

    # --- one row ----------------------------------------------------------------------------------

    def _view(
        self, cell: CellView, measure: ResolvedMeasure, runs: Sequence[str], row: int
    ) -> Hashable | None:
        """Return everything that the measure's value of a row depends on; None if the row isn't
        part of the cell."""
        spec, item = self.experiment.spec, None if cell[-1] < 0 else cell[-1]
        parts: list[Hashable] = [
            part for atom in measure.atoms for part in self._of_atom(atom, measure, item, row)
        ]
        for name in runs:
            if name == "source" and spec.source is not None:
                parts.append(self._measured(self._run(spec.source), measure, row))
            elif name == "base" and not self._observes_images(measure):
                run = self._run(spec.base)
                looked = self._looked_at(cell, measure, row)
                parts.append(self._prefix(run, row, self._last(run, measure, row, looked)))
        if "patched" not in runs:
            return tuple(parts)
        base = self._run(spec.base)
        start = base
        for n, rule in enumerate(self.plan.rules):
            if rule.rule.does.changes == "input":
                start = list(rule.rule.inputs.values())[cell[3 * n]]
        looked = self._looked_at(cell, measure, row)
        last = self._last(start, measure, row, looked)
        ahead = any(rule.rule.does.looks_ahead for rule in self.plan.rules) or self.ahead
        if not self._observes_images(measure):
            parts.append(self._prefix(start, row, last, ahead=ahead))
        visible = last if self.causal(base.model) and not ahead else None
        for n, rule in enumerate(self.plan.rules):
            if cell[3 * n] < 0:  # the rule isn't active in the cell
                continue
            written, keys = rule.positions[cell[3 * n]], self._keys[n]
            to = None if keys is None else keys[cell[3 * n + 1]].hits[row]
            if not written.hits[row] or (to is not None and not to):
                return None
            changes = rule.rule.does.changes
            if changes == "input" or (changes == "nothing" and not _reads_observation(measure)):
                continue
            shown = _list_shown(rule.rule, written, row, start.rows[row], visible)
            if not shown:
                continue
            source = rule.sources[cell[3 * n]]
            if changes == "nothing" and self._observes_images(measure):
                parts += [n, written.parts(row, start.rows[row].ids), to]
            else:
                parts += [n, shown, to]
            parts += self._read(rule.rule, source, row, below=bool(cell[3 * n + 2]))
        return tuple(parts)

    def _observes_images(self, measure: ResolvedMeasure) -> bool:
        """Whether a measure depends on the images of a row, and not on its text."""
        base = self._run(self.experiment.spec.base)
        rules = [rule.rule for rule in self.plan.rules]
        observes = measure.observed or all(
            atom.form.takes == "observation" and not atom.texts and not atom.sets
            for atom in measure.atoms
        )
        return (
            observes
            and base.derived is None
            and base.noise is None
            and all(
                rule.in_vision
                and rule.edge is None
                and not isinstance(rule.does, RowSetObservation)
                for rule in rules
            )
        )

    def _of_atom(
        self, atom: MetricTerm, measure: ResolvedMeasure, item: ItemNumber, row: int
    ) -> Iterator[Hashable]:
        """Yield the inputs of a metric besides the run that it reads."""
        if atom.texts:
            yield atom.texts[item if atom.by_item else None][row]
        if atom.sets:
            yield atom.sets[item if atom.by_item else None].of(row)
        if atom.python is not None:
            yield self.experiment.table.row_keys[row]
        if atom.run is not None:
            yield self._measured(self._run(atom.run), measure, row)

    def _read(
        self, rule: ResolvedRule, source: PositionCell, row: int, *, below: bool
    ) -> Iterator[Hashable]:
        """Yield what a rule reads for a row, besides what all rows share."""
        reads = rule.does.reads
        if reads == "mean" and rule.groups is not None:
            yield rule.groups[row]
        if reads not in ("run", "cell") or rule.external is not None:
            return
        hits, run = source.tokens(row), self._run(rule.run)
        yield source.hits[row]
        if rule.in_vision and run.derived is None and run.noise is None:
            yield source.parts(row, run.rows[row].ids)
        elif below and run.derived is None:
            ids, noised = run.rows[row].ids, () if run.noise is None else run.noise.positions[row]
            every = [token for tokens in hits for token in tokens]
            yield tuple((ids[n], n in noised) for n in every if n < len(ids))
        else:
            last = max((token for tokens in hits for token in tokens), default=-1)
            yield self._prefix(run, row, last)

    # --- runs -------------------------------------------------------------------------------------

    def _run(self, name: str) -> PromptRun:
        return self.experiment.table.runs[name]

    def _measured(self, run: PromptRun, measure: ResolvedMeasure, row: int) -> Hashable:
        """Return what an unpatched run shows at the measured position."""
        return self._prefix(run, row, self._last(run, measure, row, None))

    def _last(self, run: PromptRun, measure: ResolvedMeasure, row: int, looked: int | None) -> int:
        """Return the last token that the measure reads."""
        end = len(run.rows[row].ids) - 1
        index = -1 if looked is None else looked
        for atom in measure.atoms:
            if measure.observed or atom.form.takes == "observation":
                continue
            at = measure.at.get(run.name)
            if at is None or atom.form.takes == "prompt":
                appended = atom.appended[row] if atom.texts else 0
                index = max(index, end + appended)
            else:
                index = max(index, at[row])
        return index

    def _looked_at(self, cell: CellView, measure: ResolvedMeasure, row: int) -> int | None:
        """Return the last token that the measure observes."""
        if not _reads_observation(measure):
            return None
        looked: list[int] = []
        for n, rule in enumerate(self.plan.rules):
            does, keys = rule.rule.does, self._keys[n]
            if does.changes != "nothing":
                continue
            spots = [rule.positions[cell[3 * n]]]
            if isinstance(does, RowSetObservation):
                if does.of_maps or does.of_whole_text:
                    looked.append(len(self._run(self.experiment.spec.base).rows[row].ids) - 1)
                spots += [] if keys is None else [keys[cell[3 * n + 1]]]
            looked += [t for spot in spots for tokens in spot.tokens(row) for t in tokens]
        return max(looked, default=None)

    def _prefix(self, run: PromptRun, row: int, last: int, *, ahead: bool = False) -> Hashable:
        """Return the tokens of a run that are visible from token `last`, with the positions of
        noise.

        All tokens are visible in a model that isn't causal, or with `ahead`, where rules let tokens
        see later ones. The metric's text follows the prompt.
        """
        key = id(run)
        if key not in self._prefixes:
            self._prefixes[key] = _prefix_numbers([run_row.ids for run_row in run.rows])
        numbers = self._prefixes[key][row]
        causal = self.causal(run.model) and not (ahead or (self.ahead and run.derived))
        final = len(run.rows[row].ids) - 1
        end = min(last, final) if causal else final
        noised = () if run.noise is None else run.noise.positions[row]
        noise = tuple(token for token in noised if token <= end)
        made = tuple(self._made(run, row, end if causal else None))
        return (run.name, last, int(numbers[end]) if end >= 0 else -1, noise, made)

    def _looks_ahead(self, run: PromptRun) -> bool:
        """Whether a rule of a run lets tokens see later ones."""
        if run.derived is None:
            return False
        own = any(rule.does.looks_ahead for rule in self.experiment.derived[run.name].rules)
        return own or self._looks_ahead(self._run(run.derived.base))

    def _made(self, run: PromptRun, row: int, visible: int | None) -> Iterator[Hashable]:
        """Yield the visible writes of a run's rules into a row; empty for a run without rules.

        Args:
            visible: The last visible token; None for all.
        """
        if run.derived is None:
            return
        yield from self._made(self._run(run.derived.base), row, visible)
        for number, rule in enumerate(self.experiment.derived[run.name].rules):
            (written,), (source,) = rule.positions.written.values(), rule.positions.read.values()
            shown = _list_shown(rule, written, row, run.rows[row], visible)
            if not shown:
                continue
            keys = () if rule.edge is None else rule.edge.keys.written.values()
            yield (number, shown, *(cell.hits[row] for cell in keys))
            yield from self._read(rule, source, row, below=_rule_is_below_attention(rule))


def keep_shared_views(seen: Ints | None) -> Ints | None:
    """Return the codes, or None if all rows of every cell differ."""
    if seen is None or all(len(np.unique(cell)) == len(cell) for cell in seen):
        return None
    return seen


def _prefix_numbers(rows: Sequence[Sequence[int]]) -> Ints:
    """Return a number for each prefix, equal for equal prefixes. Shape [row, token]."""
    lengths = np.array([len(ids) for ids in rows])
    own = np.arange(lengths.max(initial=0)) < lengths[:, None]
    tokens = np.full(own.shape, -1)
    tokens[own] = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
    numbers = np.empty(own.shape, dtype=np.int64)
    before, first = np.zeros(len(rows), dtype=np.int64), 0
    for column, ids in enumerate(tokens.T):
        pairs = before * (tokens.max() + 2) + ids + 1
        different, before = np.unique(pairs, return_inverse=True)
        numbers[:, column] = first + before
        first += len(different)
    return numbers


def _list_shown(
    rule: ResolvedRule, written: PositionCell, row: int, prompt: RunRow, last: int | None
) -> Hits:
    """List the written hits of a row that token `last` sees; None: all. A token of an image reads
    the whole image, so it sees each patch that a rule writes in the vision encoder."""
    cell_hits: list[tuple[int, ...]] = []
    for hits, tokens in zip(written.hits[row], written.tokens(row), strict=True):
        if not hits:
            continue
        first = _find_first_token(prompt, tokens) if rule.in_vision else min(tokens)
        if last is None or first <= last:
            cell_hits.append(hits)
    return tuple(cell_hits)


def _find_first_token(prompt: RunRow, tokens: Sequence[int]) -> int:
    """Return the first of these tokens and of those of their images."""
    images = (
        {picture.first + position for position in picture.picture.expansion.cell_of}
        for picture in prompt.whole_pictures
    )
    return min(min(numbers) for numbers in (*images, {*tokens}) if not numbers.isdisjoint(tokens))


def _reads_observation(measure: ResolvedMeasure) -> bool:
    """Whether a measure reads an observation."""
    return measure.observed or any(a.form.takes == "observation" for a in measure.atoms)


def _rule_is_below_attention(rule: ResolvedRule) -> bool:
    """Whether a one-cell rule reads only values that depend on the position's own token."""
    if rule.sites is None:
        return False
    (points,) = (rule.sites.sources or rule.sites.points).values()
    return bool(points) and all(map(is_below_attention, points))


def _cell_is_below_attention(rule: RulePlan, cell: int) -> bool:
    """Whether everything that a rule reads in a cell depends only on the position's own token."""
    first, end = rule.points.offsets[rule.site_of_cell[cell] :][:2]
    points = [rule.source_table[point] for point in rule.points.values[first:end].tolist()]
    return bool(points) and all(map(is_below_attention, points))


def number_equal_cells(plan: ExperimentPlan) -> Ints:
    """Return codes that are equal for cells that differ only in what is observed. Shape [cell]."""
    names = [axis.name for axis in plan.experiment.axes]
    within = zip(names, plan.coordinates, strict=True)
    kept = [each for name, each in within if name not in plan.experiment.observed_axes]
    if len(kept) == len(names):
        return np.arange(plan.n_cells)
    columns = np.stack([np.zeros(plan.n_cells, dtype=np.int64), *kept])
    return np.unique(columns, axis=1, return_inverse=True)[1].reshape(-1)


@dataclass(frozen=True, eq=False)
class PlannedUnits:
    """Units of one measure."""

    counts: Ints
    """Number of units of each number that is tested: of cells whose effect the structure doesn't
    fix, and that can differ from each other. Shape [number]."""
    codes: Ints
    """Unit of each row, in a cell with the most units. Shape [row]."""


def plan_units(
    plan: ExperimentPlan, number: int, kept: Ints, causal: Callable[[str | None], bool]
) -> PlannedUnits:
    """Compute the units of a measure before the run.

    Args:
        number: Index of the measure.
        kept: Rows in the experiment.
        causal: Whether tokens of a model (None: the experiment's) don't see later tokens.
    """
    there = plan.exists
    sampling = plan_sampling(plan.experiment, kept)
    seen = RowViews(plan, kept, causal).of(number, there)
    present = plan.present(kept)[there]
    counts = np.zeros(len(present), dtype=np.int64)
    every = {
        tuple(cells.tolist()): sampling.units(numbers)
        for cells, numbers in group_cells_by_view(len(present), seen)
    }
    for cells, units in every.items():
        counts[list(cells)] = units.held(present[list(cells)])
    most = max(every.values(), key=lambda units: units.count, default=sampling.units())
    codes = number_equal_cells(plan)[there]
    effect = EFFECTS[plan.experiment.spec.measures[number].effect]
    if plan.experiment.measures[number].observed:
        codes = np.arange(len(codes))
    elif not effect.of_intervention:
        codes = np.zeros_like(codes)
    changing = np.flatnonzero(~plan.inert_of[number][there])
    tests = changing[np.unique(codes[changing], return_index=True)[1]]
    return PlannedUnits(counts[np.sort(tests)], most.codes[0])


def plan_sampling(experiment: ResolvedExperiment, kept: Ints) -> SamplingDesign:
    """Return the sampling design of these rows, which their intervals depend on."""
    keys = experiment.table.row_keys
    return SamplingDesign(
        len(kept),
        experiment.spec.statistics,
        experiment.seed,
        [keys[i] for i in kept.tolist()],
        _resampled_groups(experiment, kept),
    )


def _resampled_groups(experiment: ResolvedExperiment, kept: Ints) -> np.ndarray | None:
    """Return the groups that `stats by` resamples."""
    by, rows = experiment.spec.statistics.by, experiment.table.runs["clean"].rows
    if by is None or not all(by in rows[i].values for i in kept):
        return None
    return np.array([str(rows[i].values[by]) for i in kept])
