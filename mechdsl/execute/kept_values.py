"""The executor's side of the store: which values are known, and what passes give.

Two kinds of knowing. What was there before the run began (`earlier`) is left out of the plan's
passes. What this run has computed itself, in an attempt that was cut short (`own`), is not: its
passes are laid out again as they were, and those that are whole are read instead of run. So what
comes out is equal bit for bit. What a pass gave is found by the pass, not by its rows: rows of one
content in several passes differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.digest import digest
from mechdsl.execute.found import Found
from mechdsl.execute.kept_replies import KeptReplies
from mechdsl.execute.pass_size import Sizes
from mechdsl.execute.readout import Readout
from mechdsl.execute.wanted_places import Member
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.key_numbers import Numbers, mixed
from mechdsl.plan.plan import Panel
from mechdsl.plan.rule_rows import Rows
from mechdsl.plan.value_keys import Contents, ExperimentKeys, measure_digest, measure_rows
from mechdsl.plan.whole_cells import WholeCells
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.resolve.resolved import Env, ResolvedMeasure
from mechdsl.store.runs import OpenRun
from mechdsl.store.values import Block

Part = tuple[bytes, Numbers, Floats]
"""(key of a cell, keys of rows, [row, column] their values)."""


@dataclass(frozen=True)
class KeptRun:
    """Where a run's values are kept, and what they hang on beside the plan."""

    run: OpenRun
    models: Mapping[str, bytes]
    """By name, a digest of each model with its device and precision, and of the code that runs it.
    Experiments on a model that isn't here are neither looked up nor kept."""

    @property
    def sizes(self) -> Sizes | None:
        """What an attempt that was cut short was laid out by."""
        return None if self.run.sizes is None else Sizes(**self.run.sizes)

    def settle(self, sizes: Sizes) -> None:
        """Keep what passes are laid out by: when the run goes on, they are laid out the same."""
        found = asdict(sizes)
        if found != self.run.sizes:
            self.run.settle(found)


@dataclass(frozen=True, eq=False)
class _Known:
    """Values by key, in the order of the keys."""

    keys: Numbers
    values: Floats
    """[key, column]"""

    @staticmethod
    def of(found: Mapping[bytes, tuple[Numbers, Floats]], codes: Mapping[bytes, int]) -> _Known:
        """codes: by cell, the number that its rows' keys are mixed with."""
        parts = [(_within(codes[cell], rows), values) for cell, (rows, values) in found.items()]
        if not parts:
            return _Known(np.zeros(0, dtype=np.uint64), np.zeros((0, 1)))
        keys = np.concatenate([part[0] for part in parts])
        order = np.argsort(keys, kind="stable")
        return _Known(keys[order], np.concatenate([part[1] for part in parts])[order])

    def find(self, keys: Numbers) -> tuple[Bools, Floats]:
        """([key] whether there is a value, [key, column] the values, NaN where there is none)."""
        found = np.full((len(keys), self.values.shape[1]), np.nan)
        if not len(self.keys):
            return np.zeros(len(keys), dtype=np.bool_), found
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        there = self.keys[place] == keys
        found[there] = self.values[place[there]]
        return there, found


def _within(code: int | Ints, rows: Numbers) -> Numbers:
    """The keys of rows, told apart by their cells."""
    return mixed(rows, np.broadcast_to(np.asarray(code, dtype=np.int64), rows.shape))


class PatchedValues:
    """The patched values of one experiment."""

    def __init__(self, run: OpenRun, keys: ExperimentKeys) -> None:
        self._run = run
        self._keys = keys
        self._earlier = [
            _Known.of(run.earlier(cells), {cell: code for code, cell in enumerate(cells)})
            for cells in keys.cells
        ]

    @property
    def any_earlier(self) -> bool:
        """Whether anything was there before the run."""
        return any(len(known.keys) for known in self._earlier)

    @property
    def any_own(self) -> bool:
        """Whether this run may have computed anything in an attempt that was cut short."""
        return self._run.resumed

    def earlier(self, rows: Rows) -> tuple[Bools, list[Floats]]:
        """([row] whether all measures were known before the run, per measure [row])."""
        return self._find(self._earlier, rows)

    def own(self, rows: Rows) -> list[Floats] | None:
        """Per measure [row], where this run has computed all these rows of a pass already."""
        every = range(len(self._keys.cells))
        parts = [self._part(number, rows, *self._of(number, rows)) for number in every]
        found = self._run.own(parts)
        whole = [found[each][1] for each in parts if each in found]
        if len(whole) < len(parts) or any(len(each) < len(rows) for each in whole):
            return None
        return [values[:, 0] for values in whole]

    def _find(self, known: Sequence[_Known], rows: Rows) -> tuple[Bools, list[Floats]]:
        every, found = np.ones(len(rows), dtype=np.bool_), list[Floats]()
        for number, own in enumerate(known):
            there, values = own.find(self._row_keys(number, rows))
            every &= there
            found.append(values[:, 0])
        return every, found

    def _row_keys(self, number: int, rows: Rows) -> Numbers:
        return _within(*self._of(number, rows))

    def _of(self, number: int, rows: Rows) -> tuple[Ints, Numbers]:
        """([row] the code of its cell, [row] its key) of a measure."""
        return self._keys.code_of_cell[rows.cell], self._keys.rows(number, rows)

    def _part(self, number: int, rows: Rows, codes: Ints, keys: Numbers) -> bytes:
        """The key of what a pass gives of a measure, row by row: which rows these are, in which
        order, and what they contain."""
        cells = [self._keys.cells[number][code] for code in np.unique(codes).tolist()]
        key = self._keys.plan.experiment.key
        places = (rows.cell, rows.prompt, rows.alternative)
        return digest("pass", key, number, places, b"".join(cells), keys)

    def parts(self, member: Member, found: Found) -> Iterable[Part]:
        """(cell, rows, values) of a pass, as far as there are values that can be used; and the same
        by the pass, whose rows are counted."""
        for number, values in enumerate(found.values):
            good = _usable(found, number)
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


def _usable(found: Found, number: int) -> Bools:
    """[row] of one measure: those that are no numbers are worked out again, with their reasons."""
    good = ~found.broken
    if number in found.failed:
        return np.zeros_like(good)
    gap = found.gaps.get(number)
    if gap is not None:
        good[gap.rows] = False
    return good


class KeptValues:
    """The values of the experiments of one panel."""

    def __init__(self, run: OpenRun, contents: Contents, table: PromptTable, panel: bytes) -> None:
        """panel: which experiments it is of."""
        self._run = run
        self._panel = panel
        self._table = table
        self._contents = contents
        self._keys: dict[tuple[object, ...], tuple[bytes, Numbers | None]] = {}
        self._waiting: list[Part] = []
        self._looked_up: dict[tuple[bytes, bool], _Known] = {}

    @classmethod
    def of(cls, kept: KeptRun, panel: Panel, seed: int) -> KeptValues | None:
        """None where a model that takes part can't be told from others. seed: of noise."""
        if not kept.models.keys() >= set(panel.models):
            return None
        of = digest(*(plan.experiment.key for plan in panel.experiments))
        return cls(kept.run, Contents(kept.models, panel.model, seed), panel.table, of)

    def define(
        self,
        plans: Mapping[str, ExperimentPlan],
        rows: Ints,
        donors: Mapping[str, Mapping[int, Ints]],
        cells: Mapping[str, Mapping[int, WholeCells]],
    ) -> None:
        """What runs with rules hang on, by name, each after those that it uses. rows: those that
        means and donors are of, and functions are given. What can't be compared leaves all that
        reads the run unkept."""
        for name, plan in plans.items():
            run, own = self._table.runs[name], donors[name]
            self._contents.define(self._table, run, plan, rows, own, cells[name])

    def keys(
        self,
        plan: ExperimentPlan,
        rows: Ints,
        donors: Mapping[int, Ints],
        cells: Mapping[int, WholeCells],
    ) -> ExperimentKeys:
        """Of one experiment. rows: those that are in it. donors, cells: by number of the rule,
        of those that resample, or read whole cells."""
        return ExperimentKeys(plan, self._table, self._contents, rows, donors, cells)

    def patched(self, keys: ExperimentKeys) -> PatchedValues:
        """What there is under the keys of an experiment."""
        return PatchedValues(self._run, keys)

    def replies(self, settings: tuple[object, ...], ends: frozenset[int]) -> KeptReplies:
        """What rows write that are so asked; ends: the tokens that end it."""
        return KeptReplies(self._run, self._contents, self._table, settings, ends)

    def keep(self, parts: Iterable[Part]) -> None:
        """Keep what a pass gave; it is on the disk when this returns."""
        cells: dict[bytes, list[tuple[Numbers, Floats]]] = {}
        for cell, rows, values in parts:
            cells.setdefault(cell, []).append((rows, values))
        if not cells:
            return
        joined = [_distinct(own) for own in cells.values()]
        starts = np.cumsum([0, *(len(rows) for rows, _ in joined)])
        rows = np.concatenate([rows for rows, _ in joined])
        values = np.concatenate([values for _, values in joined])
        self._run.keep(Block(list(cells), starts.astype(np.int64), rows, values))

    @property
    def contents(self) -> Contents:
        """What the rows of runs are."""
        return self._contents

    def earlier(self, cells: Sequence[bytes]) -> Mapping[bytes, tuple[Numbers, Floats]]:
        """(rows, [row, column]) of those cells that were there before the run."""
        return self._run.earlier(cells)

    # --- unpatched runs ---

    def unpatched(
        self, readout: Readout, run: str, prompts: Ints, item: Env, relative: float
    ) -> Bools:
        """[prompt] whether all measures of an unpatched run were known before this one."""
        return self._unpatched(readout, run, prompts, item, relative, own=False)[0]

    def own_unpatched(
        self, readout: Readout, run: str, prompts: Ints, item: Env, relative: float
    ) -> Found | None:
        """What this run has measured already, where that is all; else what was there before it."""
        for own in (True, False):
            every, found = self._unpatched(readout, run, prompts, item, relative, own=own)
            if every.all():
                return found
        return None

    def _unpatched(
        self, readout: Readout, run: str, prompts: Ints, item: Env, relative: float, *, own: bool
    ) -> tuple[Bools, Found]:
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
                there, found = self._known(batch, own=True).find(_within(0, rows))
            else:
                there, found = self._known(cell, own=False).find(_within(0, keys[prompts]))
            every &= there
            values.append(found[:, 0])
            rounding.append(found[:, -1])
        broken = np.zeros(len(prompts), dtype=np.bool_)
        return every, Found(values, broken, rounding, {}, {})

    def _known(self, cell: bytes, *, own: bool) -> _Known:
        """What there was of an unpatched run's cell when this process looked first."""
        if (cell, own) not in self._looked_up:
            found = self._run.own([cell]) if own else self._run.earlier([cell])
            self._looked_up[cell, own] = _Known.of(found, {cell: 0})
        return self._looked_up[cell, own]

    def measured(
        self, readout: Readout, run: str, prompts: Ints, item: Env, relative: float, found: Found
    ) -> None:
        """Keep what was measured of an unpatched run, with its bounds of rounding, at `flush`."""
        for number, measure in enumerate(readout.measures):
            good = np.flatnonzero(_usable(found, number))
            cell, keys = self._unpatched_keys(measure, run, item, relative)
            if len(good) and keys is not None:
                both = np.stack([found.values[number], found.rounding[number]], axis=1)
                self._waiting.append((cell, keys[prompts[good]], both[good]))
                batch = self._batch(cell, prompts, keys)
                self._waiting.append((batch, good.astype(np.uint64), both[good]))

    def _batch(self, cell: bytes, prompts: Ints, keys: Numbers) -> bytes:
        """The key of what an unpatched run gives on a batch, prompt by prompt: what else is in its
        passes hangs on the panel, and with it the last bits."""
        return digest("batch", self._panel, cell, prompts, keys[prompts])

    def flush(self) -> None:
        """Keep what was measured of unpatched runs; it is on the disk when this returns."""
        waiting, self._waiting = self._waiting, []
        self.keep(waiting)

    def _unpatched_keys(
        self, measure: ResolvedMeasure, run: str, item: Env, relative: float
    ) -> tuple[bytes, Numbers | None]:
        """(of the cell, [prompt] of the rows); None for a metric from outside that is given what
        can't be compared."""
        key = (id(measure), run, item, relative)
        if key not in self._keys:
            own, contents = self._table.runs[run], self._contents
            model = contents.models[own.model or contents.model]
            cell = digest("unpatched", model, measure_digest(measure), relative)
            try:
                rows = measure_rows(measure, own, item, self._table, contents)
                self._keys[key] = cell, mixed(contents.of(own, self._table), rows)
            except TypeError:
                self._keys[key] = cell, None
        return self._keys[key]


def _distinct(parts: Sequence[tuple[Numbers, Floats]]) -> tuple[Numbers, Floats]:
    """Each row once: experiments of one pass may have rows in common."""
    rows = np.concatenate([rows for rows, _ in parts])
    values = np.concatenate([values for _, values in parts])
    rows, first = np.unique(rows, return_index=True)
    return rows, values[first]
