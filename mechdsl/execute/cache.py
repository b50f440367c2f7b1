"""Cached values of a run: lookup in the store before passes, storage after them.

Values from before the run (`earlier`) are left out of the plan's passes. Values from an interrupted
attempt of this run (`own`) are not: the passes are laid out as before, and complete passes are
read instead of run, so that results are equal bit for bit. Values of a pass are looked up by the
pass and not by its rows, because equal rows in several passes differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.hashing import digest
from mechdsl.execute.measurement.readout import Readout, ReadoutResult
from mechdsl.execute.pass_layout import PassSizer
from mechdsl.execute.unpatched_runs import ReplyCache
from mechdsl.planner.plan import ExperimentPlan, Panel, ReconstructedSpot, WholeCells
from mechdsl.planner.rows import PassMember, RowTable, RulePlan
from mechdsl.planner.value_keys import (
    ExperimentKeys,
    KeyNumbers,
    RunContents,
    measure_digest,
    measure_row_keys,
    mix_numbers,
)
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.observations import RowSetObservation, TokenSetObservation
from mechdsl.resolve.types import ItemNumber, ResolvedMeasure
from mechdsl.store.runs import OpenRun, ValueBlock

CachedCell = tuple[bytes, KeyNumbers, Floats]
"""(key of a cell, keys of rows, [row, column] values)."""


@dataclass(frozen=True)
class RunCache:
    """Store for a run's values, and their dependencies besides the plan."""

    run: OpenRun
    models: Mapping[str, bytes]
    """By name, a digest of each model with its device, its precision and the code that runs it.
    Experiments on a model without a digest are neither looked up nor stored."""

    @property
    def sizes(self) -> PassSizer | None:
        """Sizes that an interrupted attempt used to lay out passes."""
        return None if self.run.sizes is None else PassSizer(**self.run.sizes)

    def settle(self, sizes: PassSizer) -> None:
        """Store the sizes of passes, so that a resumed run uses the same layout."""
        fields = asdict(sizes)
        if fields != self.run.sizes:
            self.run.settle(fields)


@dataclass(frozen=True, eq=False)
class _KeyedValues:
    """Values in the order of their keys."""

    keys: KeyNumbers
    values: Floats
    """[key, column]"""

    @staticmethod
    def of(
        found: Mapping[bytes, tuple[KeyNumbers, Floats]], codes: Mapping[bytes, int]
    ) -> _KeyedValues:
        """Combine the values of cells; codes: by cell, the number mixed into its rows' keys."""
        parts = [(_mix_cell(codes[cell], rows), values) for cell, (rows, values) in found.items()]
        if not parts:
            return _KeyedValues(np.zeros(0, dtype=np.uint64), np.zeros((0, 1)))
        keys = np.concatenate([part[0] for part in parts])
        order = np.argsort(keys, kind="stable")
        return _KeyedValues(keys[order], np.concatenate([part[1] for part in parts])[order])

    def find(self, keys: KeyNumbers) -> tuple[Bools, Floats]:
        """Return [key] whether there is a value, and [key, column] values, NaN if missing."""
        values = np.full((len(keys), self.values.shape[1]), np.nan)
        if not len(self.keys):
            return np.zeros(len(keys), dtype=np.bool_), values
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        there = self.keys[place] == keys
        values[there] = self.values[place[there]]
        return there, values


def _mix_cell(code: int | Ints, rows: KeyNumbers) -> KeyNumbers:
    """Mix a cell's code into the keys of its rows, so that cells are distinguished."""
    return mix_numbers(rows, np.broadcast_to(np.asarray(code, dtype=np.int64), rows.shape))


class PatchedCache:
    """Cached patched values of one experiment."""

    def __init__(self, run: OpenRun, keys: ExperimentKeys) -> None:
        self._run = run
        self._keys = keys
        self._earlier = [
            _KeyedValues.of(run.earlier(cells), {cell: code for code, cell in enumerate(cells)})
            for cells in keys.cells
        ]

    @property
    def any_earlier(self) -> bool:
        """Whether any value was cached before the run."""
        return any(len(known.keys) for known in self._earlier)

    @property
    def any_own(self) -> bool:
        """Whether an interrupted attempt of this run may have computed values."""
        return self._run.resumed

    def earlier(self, rows: RowTable) -> tuple[Bools, list[Floats]]:
        """Look up earlier values: [row] whether all measures are cached, and per measure [row]."""
        return self._find(self._earlier, rows)

    def own(self, rows: RowTable) -> list[Floats] | None:
        """Return, per measure, [row] if this run has already computed all these rows of a pass."""
        every = range(len(self._keys.cells))
        parts = [self._part(number, rows, *self._of(number, rows)) for number in every]
        entries = self._run.own(parts)
        whole = [entries[part][1] for part in parts if part in entries]
        if len(whole) < len(parts) or any(len(each) < len(rows) for each in whole):
            return None
        return [values[:, 0] for values in whole]

    def _find(self, known: Sequence[_KeyedValues], rows: RowTable) -> tuple[Bools, list[Floats]]:
        every, found = np.ones(len(rows), dtype=np.bool_), list[Floats]()
        for number, keyed_values in enumerate(known):
            there, values = keyed_values.find(self._row_keys(number, rows))
            every &= there
            found.append(values[:, 0])
        return every, found

    def _row_keys(self, number: int, rows: RowTable) -> KeyNumbers:
        return _mix_cell(*self._of(number, rows))

    def _of(self, number: int, rows: RowTable) -> tuple[Ints, KeyNumbers]:
        """Return ([row] code of its cell, [row] its key) for a measure."""
        return self._keys.code_of_cell[rows.cell], self._keys.rows(number, rows)

    def _part(self, number: int, rows: RowTable, codes: Ints, keys: KeyNumbers) -> bytes:
        """Return the key of a measure's values in a pass.

        It depends on the rows, their order and their content.
        """
        cells = [self._keys.cells[number][code] for code in np.unique(codes).tolist()]
        key = self._keys.plan.experiment.key
        places = (rows.cell, rows.prompt, rows.alternative)
        return digest("pass", key, number, places, b"".join(cells), keys)

    def parts(self, member: PassMember, found: ReadoutResult) -> Iterable[CachedCell]:
        """Yield the usable values of a pass, once under the pass and once by cell.

        Under the pass, keys are row numbers; by cell, they are keys of rows.
        """
        for number, values in enumerate(found.values):
            good = _is_usable(found, number)
            if not good.any():
                continue
            codes, keys = self._of(number, member.rows)
            own, values = self._part(number, member.rows, codes, keys), values[good, None]
            yield own, np.flatnonzero(good).astype(np.uint64), values
            codes, keys = codes[good], keys[good]
            order = np.argsort(codes, kind="stable")
            cuts = np.flatnonzero(np.diff(codes[order])) + 1
            for each in np.split(order, cuts):
                yield self._keys.cells[number][int(codes[each[0]])], keys[each], values[each]


def _is_usable(result: ReadoutResult, number: int) -> Bools:
    """Return [row]: whether a measure has a value. Others are recomputed for their reason."""
    good = ~result.broken
    if number in result.failed:
        return np.zeros_like(good)
    gap = result.gaps.get(number)
    if gap is not None:
        good[gap.rows] = False
    return good


class ActivityCache:
    """Cached numbers of rows of one experiment: 1 if all features that the rules change are
    inactive, else 0."""

    def __init__(self, run: OpenRun, keys: ExperimentKeys) -> None:
        self._run = run
        self._keys = keys
        self._cells = keys.cells_of_rules

    def earlier(self, rows: RowTable) -> tuple[Bools, Bools]:
        """Return [row] whether a row was decided before the run, and whether it is inactive."""
        return self._find(self._run.earlier(self._cells), rows)

    def own(self, rows: RowTable) -> tuple[Bools, Bools]:
        """Return the same of an interrupted attempt of this run."""
        return self._find(self._run.own(self._cells) if self._run.resumed else {}, rows)

    def _find(
        self, found: Mapping[bytes, tuple[KeyNumbers, Floats]], rows: RowTable
    ) -> tuple[Bools, Bools]:
        known = _KeyedValues.of(found, {cell: code for code, cell in enumerate(self._cells)})
        codes = self._keys.code_of_cell[rows.cell]
        there, values = known.find(_mix_cell(codes, self._keys.of_writes(rows)))
        return there, values[:, 0] == 1

    def parts(self, rows: RowTable, inactive: Bools) -> Iterator[CachedCell]:
        """Yield what is stored of decided rows."""
        codes, keys = self._keys.code_of_cell[rows.cell], self._keys.of_writes(rows)
        order = np.argsort(codes, kind="stable")
        for each in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
            if len(each):
                values = inactive[each, None].astype(np.float64)
                yield self._cells[int(codes[each[0]])], keys[each], values


class ErrorCache:
    """Cached errors of the bases of one experiment: per prompt, their sum and number of vectors."""

    def __init__(self, run: OpenRun, keys: ExperimentKeys) -> None:
        self._run = run
        self._keys = keys

    def earlier(self, spot: ReconstructedSpot) -> Floats:
        """Return [prompt of the table, 2] errors from before the run or an interrupted attempt of
        it, NaN if missing."""
        cell, rows = self._keys.of_spot(spot)
        entries = dict(self._run.own([cell]) if self._run.resumed else {})
        known = _KeyedValues.of(entries or self._run.earlier([cell]), {cell: 0})
        there, values = known.find(_mix_cell(0, rows))
        return np.where(there[:, None], values, np.nan)

    def part(self, spot: ReconstructedSpot, prompts: Ints, values: Floats) -> CachedCell:
        """Return what is stored of measured errors; values: [prompt, 2]."""
        cell, rows = self._keys.of_spot(spot)
        return cell, rows[prompts], values


class PanelCache:
    """Cached values of the experiments of one panel."""

    def __init__(
        self, run: OpenRun, contents: RunContents, table: PromptTable, panel: bytes
    ) -> None:
        """Prepare the cache; panel: digest of the panel's experiments."""
        self._run = run
        self._panel = panel
        self._table = table
        self._contents = contents
        self._keys: dict[tuple[object, ...], tuple[bytes, KeyNumbers | None]] = {}
        self._waiting: list[CachedCell] = []
        self._looked_up: dict[tuple[bytes, bool], _KeyedValues] = {}

    @classmethod
    def of(cls, kept: RunCache, panel: Panel, seed: int) -> PanelCache | None:
        """Open the cache; None if one of the models has no digest; seed: of noise."""
        if not kept.models.keys() >= set(panel.models):
            return None
        of = digest(*(plan.experiment.key for plan in panel.experiments))
        return cls(kept.run, RunContents(kept.models, panel.model, seed), panel.table, of)

    def define(
        self,
        plans: Mapping[str, ExperimentPlan],
        rows: Ints,
        donors: Mapping[str, Mapping[int, Ints]],
        cells: Mapping[str, Mapping[int, WholeCells]],
    ) -> None:
        """Define the content of derived runs.

        Runs whose content has no digest are not cached, and neither are experiments that read them.

        Args:
            plans: By name, each after the runs that it uses.
            rows: Rows used for means, donors and functions.
            donors: By name and number of the rule, the donors.
            cells: By name and number of the rule, the whole cells.
        """
        for name, plan in plans.items():
            run, numbers = self._table.runs[name], donors[name]
            self._contents.define(self._table, run, plan, rows, numbers, cells[name])

    def keys(
        self,
        plan: ExperimentPlan,
        rows: Ints,
        donors: Mapping[int, Ints],
        cells: Mapping[int, WholeCells],
    ) -> ExperimentKeys:
        """Return the keys of one experiment.

        Args:
            rows: Its rows.
            donors: By number of the rule, for rules that resample.
            cells: By number of the rule, for rules that read whole cells.
        """
        return ExperimentKeys(plan, self._table, self._contents, rows, donors, cells)

    def patched(self, keys: ExperimentKeys) -> PatchedCache:
        """Open the cached values of an experiment."""
        return PatchedCache(self._run, keys)

    def activity(self, keys: ExperimentKeys) -> ActivityCache:
        """Open what is known of the activity of an experiment's features."""
        return ActivityCache(self._run, keys)

    def errors(self, keys: ExperimentKeys) -> ErrorCache:
        """Open the cached errors of an experiment's bases."""
        return ErrorCache(self._run, keys)

    def replies(self, settings: tuple[object, ...], ends: frozenset[int]) -> ReplyCache:
        """Open cached replies with these settings; ends: tokens that end a reply."""
        return ReplyCache(self._run, self._contents, self._table, settings, ends)

    def keep(self, parts: Iterable[CachedCell]) -> None:
        """Store the values of a pass on disk."""
        cells: dict[bytes, list[tuple[KeyNumbers, Floats]]] = {}
        for cell, rows, values in parts:
            cells.setdefault(cell, []).append((rows, values))
        if not cells:
            return
        joined = [_drop_duplicates(numbers) for numbers in cells.values()]
        starts = np.cumsum([0, *(len(rows) for rows, _ in joined)])
        rows = np.concatenate([rows for rows, _ in joined])
        values = np.concatenate([values for _, values in joined])
        self._run.keep(ValueBlock(list(cells), starts.astype(np.int64), rows, values))

    @property
    def contents(self) -> RunContents:
        """The content of the rows of runs."""
        return self._contents

    def earlier(self, cells: Sequence[bytes]) -> Mapping[bytes, tuple[KeyNumbers, Floats]]:
        """Return the (rows, [row, column] values) of cells that were cached before the run."""
        return self._run.earlier(cells)

    # --- unpatched runs ---

    def unpatched(
        self, readout: Readout, run: str, prompts: Ints, item: ItemNumber, relative: float
    ) -> Bools:
        """Return [prompt]: whether all measures of an unpatched run were cached before this run."""
        return self._unpatched(readout, run, prompts, item, relative, own=False)[0]

    def own_unpatched(
        self, readout: Readout, run: str, prompts: Ints, item: ItemNumber, relative: float
    ) -> ReadoutResult | None:
        """Return complete values of this run, else complete values from before it, else None."""
        for own in (True, False):
            every, result = self._unpatched(readout, run, prompts, item, relative, own=own)
            if every.all():
                return result
        return None

    def _unpatched(
        self,
        readout: Readout,
        run: str,
        prompts: Ints,
        item: ItemNumber,
        relative: float,
        *,
        own: bool,
    ) -> tuple[Bools, ReadoutResult]:
        every = np.ones(len(prompts), dtype=np.bool_)
        values: list[Floats] = []
        rounding: list[Floats] = []
        for measure in readout.measures:
            cell, keys = self._unpatched_keys(measure, run, item, relative)
            if keys is None:
                there, found = np.zeros_like(every), np.full((len(prompts), 2), np.nan)
            elif own:
                rows = np.arange(len(prompts), dtype=np.uint64)
                batch = self._batch(cell, prompts, keys)
                there, found = self._known(batch, own=True).find(_mix_cell(0, rows))
            else:
                there, found = self._known(cell, own=False).find(_mix_cell(0, keys[prompts]))
            every &= there
            values.append(found[:, 0])
            rounding.append(found[:, -1])
        broken = np.zeros(len(prompts), dtype=np.bool_)
        return every, ReadoutResult(values, broken, rounding, {}, {})

    def _known(self, cell: bytes, *, own: bool) -> _KeyedValues:
        """Look up a cell of an unpatched run; the first result of this process is reused."""
        if (cell, own) not in self._looked_up:
            entries = self._run.own([cell]) if own else self._run.earlier([cell])
            self._looked_up[cell, own] = _KeyedValues.of(entries, {cell: 0})
        return self._looked_up[cell, own]

    def measured(
        self,
        readout: Readout,
        run: str,
        prompts: Ints,
        item: ItemNumber,
        relative: float,
        found: ReadoutResult,
    ) -> None:
        """Queue values of an unpatched run, with their rounding bounds, until `flush`."""
        for number, measure in enumerate(readout.measures):
            good = np.flatnonzero(_is_usable(found, number))
            cell, keys = self._unpatched_keys(measure, run, item, relative)
            if len(good) and keys is not None:
                both = np.stack([found.values[number], found.rounding[number]], axis=1)
                self._waiting.append((cell, keys[prompts[good]], both[good]))
                batch = self._batch(cell, prompts, keys)
                self._waiting.append((batch, good.astype(np.uint64), both[good]))

    def _batch(self, cell: bytes, prompts: Ints, keys: KeyNumbers) -> bytes:
        """Return the key of an unpatched run's values on a batch.

        It includes the panel, because other runs of the panel share passes and affect the last
        bits.
        """
        return digest("batch", self._panel, cell, prompts, keys[prompts])

    def flush(self) -> None:
        """Store the queued values of unpatched runs on disk."""
        waiting, self._waiting = self._waiting, []
        self.keep(waiting)

    def _unpatched_keys(
        self, measure: ResolvedMeasure, run: str, item: ItemNumber, relative: float
    ) -> tuple[bytes, KeyNumbers | None]:
        """Return the cell's key and [prompt] keys of rows.

        The latter are None for an external metric whose arguments have no digest.
        """
        key = (id(measure), run, item, relative)
        if key not in self._keys:
            prompt_run, contents = self._table.runs[run], self._contents
            model = contents.models[prompt_run.model or contents.model]
            cell = digest("unpatched", model, measure_digest(measure), relative)
            try:
                rows = measure_row_keys(measure, prompt_run, item, self._table, contents)
                self._keys[key] = cell, mix_numbers(contents.of(prompt_run, self._table), rows)
            except TypeError:
                self._keys[key] = cell, None
        return self._keys[key]


def _drop_duplicates(parts: Sequence[tuple[KeyNumbers, Floats]]) -> tuple[KeyNumbers, Floats]:
    """Remove duplicate rows, as experiments of one pass may share some."""
    rows = np.concatenate([rows for rows, _ in parts])
    values = np.concatenate([values for _, values in parts])
    rows, first = np.unique(rows, return_index=True)
    return rows, values[first]


@dataclass(frozen=True, eq=False)
class JointCache:
    """Cached cells of one experiment over joint rows."""

    values: PanelCache
    keys: Sequence[bytes]
    """[cell] its key."""
    _made: list[CachedCell] = field(default_factory=list[CachedCell])

    def known(self) -> dict[int, tuple[Ints, Floats]]:
        """Return the cached cells: cell → (columns among the kept rows, [measure, column])."""
        there = self.values.earlier(self.keys)
        return {
            cell: (there[key][0].astype(np.int64), there[key][1].T)
            for cell, key in enumerate(self.keys)
            if key in there
        }

    def made(self, cell: int, columns: Ints, values: Sequence[Floats]) -> None:
        """Queue a cell until `flush`; values: per measure, [column], or one number for all."""
        every = np.stack([np.broadcast_to(value, columns.shape) for value in values], axis=1)
        self._made.append((self.keys[cell], columns.astype(np.uint64), every))

    def flush(self) -> None:
        """Store the queued cells on disk."""
        self.values.keep(self._made)
        self._made.clear()


def open_joint_cache(
    values: PanelCache | None, plan: ExperimentPlan, rule: RulePlan, rows: Ints, table: PromptTable
) -> JointCache | None:
    """Open the cache for the cells of an observation over these rows.

    None if they aren't cached: if tokens are listed, because only computed cells have them; for
    observations that keep no cells; and for inputs without a digest.
    """
    said, does = rule.rule.spec.observed, rule.rule.does
    assert isinstance(does, RowSetObservation)
    if (
        values is None
        or not does.keeps_cells
        or (said is not None and said.top and not does.counts)
    ):
        return None
    try:
        shared = _digest_shared(values, plan, rule, does, rows, table)
        cells = range(plan.n_cells)
        keys = [digest(shared, *_describe_cell(plan, rule, cell, rows)) for cell in cells]
        return JointCache(values, keys)
    except TypeError:
        return None


def _digest_shared(
    values: PanelCache,
    plan: ExperimentPlan,
    rule: RulePlan,
    does: RowSetObservation,
    rows: Ints,
    table: PromptTable,
) -> bytes:
    """Digest the dependencies that all cells share: the observation, its rows and runs."""
    experiment, contents = plan.experiment, values.contents
    runs = [table.runs[name] for name in dict.fromkeys((experiment.spec.base, rule.rule.run))]
    trained: list[object] = []
    if does.trained_on is not None:
        there = does.trained_on
        hits = [cell.hits for cell in there.cells]
        trained = [contents.of(there.run, there.table), hits, list(there.table.row_keys)]
    places = [*rule.positions, *rule.sources] if isinstance(does, TokenSetObservation) else []
    read = [measure for measure in experiment.measures if measure.observed]
    read += [measure for measure in (does.target, does.outcome) if measure is not None]
    measures = [
        [
            measure_digest(measure),
            [measure_row_keys(measure, runs[0], item, table, contents)[rows] for item in items],
        ]
        for items in [list(dict.fromkeys(plan.items))]
        for measure in read
    ]
    return digest(
        *(
            "together",
            contents.models[experiment.model.key],
            type(does),
            does.dependencies,
            experiment.seed,
        ),
        [[run.draws, contents.of(run, table)[rows]] for run in runs],
        [table.row_keys[row] for row in rows.tolist()],
        *(rows, trained, measures, [_list_hits(spot, rows) for spot in places]),
    )


def _describe_cell(plan: ExperimentPlan, rule: RulePlan, cell: int, rows: Ints) -> Sequence[object]:
    """Describe the sites, positions and further coordinates of a cell."""
    index = [int(coordinate[cell]) for coordinate in plan.coordinates]
    along = dict(zip((axis.name for axis in plan.experiment.axes), index, strict=True))
    resolved = rule.rule
    sites, other, edge, does = resolved.sites, resolved.compared_sites, resolved.edge, resolved.does
    assert sites is not None
    assert isinstance(does, RowSetObservation)
    targets = [sites] if other is None else [sites, other]
    points = [target.points[tuple(along[axis] for axis in target.axes)] for target in targets]
    place = int(rule.position_of_cell[cell])
    spots = [rule.positions[place], rule.sources[place]]
    if edge is not None and rule.key_of_cell is not None:
        spots.append(list(edge.keys.written.values())[int(rule.key_of_cell[cell])])
    return [
        [[(p.site, p.layer, p.unit) for p in site_points] for site_points in points],
        [_list_hits(spot, rows) for spot in spots],
        *(along.get(does.counts), plan.items[cell], place if _has_training(rule) else None),
    ]


def _list_hits(spot: PositionCell, rows: Ints) -> Sequence[object]:
    return [spot.hits[row] for row in rows.tolist()]


def _has_training(rule: RulePlan) -> bool:
    return isinstance(rule.rule.does, RowSetObservation) and rule.rule.does.trained_on is not None
