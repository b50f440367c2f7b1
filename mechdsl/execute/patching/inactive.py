"""Rows of cells whose features are inactive: 0 in all runs involved, so that nothing changes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mechdsl.base.arrays import Bools, Ints
from mechdsl.execute.cache import ActivityCache, CachedCell
from mechdsl.execute.patching.writes import RuleInputs, RuleReader, RuleWrite, list_rule_writes
from mechdsl.execute.unpatched_batch import UnpatchedBatch
from mechdsl.forward.hooks.batch import SiteRead, gather_vectors, to_device
from mechdsl.forward.hooks.coordinates import MAX_NUMBERS, CoordinateWrite
from mechdsl.models.shape import ModelShape
from mechdsl.planner.plan import ExperimentPlan
from mechdsl.planner.rows import RowTable
from mechdsl.resolve.types import SiteLayer

_UNKNOWN = -1


class FeatureActivity:
    """Rows of an experiment whose features are known to be active or inactive."""

    def __init__(self, plan: ExperimentPlan, rows: int, cache: ActivityCache | None) -> None:
        """Look up the rows that were decided before the run.

        Args:
            rows: Rows of the prompt table.
        """
        self._inactive = np.full((plan.n_cells, rows), _UNKNOWN, dtype=np.int8)
        self._cache = cache

    def look_up(self, rows: RowTable, *, own: bool = False) -> None:
        """Read stored decisions on rows: from before this run, or of an interrupted attempt."""
        if self._cache is not None and len(rows):
            there, inactive = (self._cache.own if own else self._cache.earlier)(rows)
            self._set(rows.take(np.flatnonzero(there)), inactive[there])

    def decide(self, rows: RowTable, inactive: Bools) -> Iterator[CachedCell]:
        """Record decisions, and yield what is to be stored of them."""
        self._set(rows, inactive)
        if self._cache is not None and len(rows):
            yield from self._cache.parts(rows, inactive)

    def _set(self, rows: RowTable, inactive: Bools) -> None:
        self._inactive[rows.cell, rows.prompt] = inactive

    def is_unknown(self, rows: RowTable) -> Bools:
        """Return [row] whether a row isn't decided yet."""
        return self._inactive[rows.cell, rows.prompt] == _UNKNOWN

    def is_inactive(self, rows: RowTable) -> Bools:
        """Return [row] whether a row is decided and inactive."""
        return self._inactive[rows.cell, rows.prompt] == 1


def find_inactive_rows(
    plan: ExperimentPlan,
    rows: RowTable,
    base: UnpatchedBatch,
    lanes_of: RuleReader,
    inputs: RuleInputs,
    shape: ModelShape,
) -> Bools:
    """Return [row]: whether all features that the rules change are 0 before and after.

    By induction over the writes of a row, its forward pass equals the base run.

    Args:
        plan: A plan with `watched_sites`.
        rows: Its rows on the prompts of `base`.
        base: The run that the rows start from.
        lanes_of: Returns the lanes that a rule reads.
        inputs: Inputs of the rules.
    """
    named = np.ones(len(rows), dtype=np.bool_)
    for rule in plan.rules:
        if rule.coordinates_of_cell is not None:
            counts = np.array([len(own.which) for own in rule.coordinates])
            named &= (counts[rule.coordinates_of_cell[rows.cell]] > 0) | ~rule.acts(rows)
    found = np.zeros(len(rows), dtype=np.bool_)
    for part in _parts(plan, np.flatnonzero(named)):
        own = rows.take(part)
        still = np.ones(len(own), dtype=np.bool_)
        draws = np.zeros(len(own), dtype=np.int64)
        writes = list_rule_writes(plan, own, draws, lanes_of, inputs, shape)
        for place, parts in writes.items():
            for write in parts:
                still[write.row[_changes(place, write, own, base)]] = False
        found[part] = still
    return found


def _parts(plan: ExperimentPlan, rows: Ints) -> Iterator[Ints]:
    """Divide rows so that the features of the vectors of a part fit in memory."""
    sizes = [m.size for r in plan.rules if r.rule.basis for m in r.rule.basis.members]
    count = max(1, MAX_NUMBERS // max(sizes))
    for begin in range(0, len(rows), count):
        yield rows[begin : begin + count]


def _changes(place: SiteLayer, write: RuleWrite, rows: RowTable, base: UnpatchedBatch) -> Bools:
    """Return [vector]: whether a feature is active before or after a write to the base run."""
    mode = write.mode
    assert isinstance(mode, CoordinateWrite)
    site, layer = place
    where = SiteRead(mode.reads or site, layer)
    read = base.reads[where]
    if mode.joins_units:
        read = read.flatten(2).unsqueeze(2)
    lane = base.lane(rows.prompt[write.row], np.zeros_like(write.row))
    at = (torch.from_numpy(each) for each in (lane, write.position, write.unit))
    now = gather_vectors(read, base.batch.of_read(where), *at)
    wide = now.to(torch.promote_types(now.dtype, torch.float32))
    which = None if write.to is None else to_device(write.to, wide.device)
    changed = (mode.system.encode(wide, which) != 0).any(-1)
    if mode.operation == "set":
        changed |= to_device(write.values != 0, changed.device).any(-1)
    return changed.cpu().numpy()
