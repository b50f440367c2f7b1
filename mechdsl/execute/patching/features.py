"""Dictionaries at the vectors that rules change: reconstruction errors, and inactive features.

A feature is inactive in a row if it is 0 in all runs involved, so that nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.execute.cache import ActivityCache, CachedCell, ErrorCache
from mechdsl.execute.patching.writes import RuleInputs, RuleReader, RuleWrite, list_rule_writes
from mechdsl.execute.unpatched_batch import UnpatchedBatch
from mechdsl.execute.vectors import FittedDirections, read_vectors
from mechdsl.forward.hooks.batch import SiteRead, gather_vectors, to_device
from mechdsl.forward.hooks.coordinates import MAX_NUMBERS, CoordinateSystem, CoordinateWrite
from mechdsl.models.shape import ModelShape
from mechdsl.planner.plan import ExperimentPlan, ReconstructedSpot
from mechdsl.planner.rows import RowTable
from mechdsl.resolve.types import SiteLayer

BasisErrors: TypeAlias = dict[str, tuple[float, int]]
"""Basis → mean of ‖x − x̂‖ / ‖x‖ over vectors x of the base run, and number of vectors."""


@dataclass(eq=False)
class ReconstructionErrors:
    """Errors of the bases of one experiment, summed for each prompt."""

    plan: ExperimentPlan
    cache: ErrorCache | None
    found: dict[ReconstructedSpot, Floats]
    """[prompt of the table, 2]: sum of relative errors, and number of vectors; NaN if unknown."""

    @staticmethod
    def of(plan: ExperimentPlan, rows: int, cache: ErrorCache | None) -> ReconstructionErrors:
        """Look up the errors that were measured before the run.

        Args:
            rows: Rows of the prompt table.
        """
        found = {spot: np.full((rows, 2), np.nan) for spot in plan.reconstructed}
        for spot, values in found.items() if cache is not None else ():
            assert cache is not None
            values[:] = cache.earlier(spot)
        return ReconstructionErrors(plan, cache, found)

    def is_unknown(self, prompts: Ints) -> Bools:
        """Return [prompt] whether an error isn't known yet."""
        missing = np.zeros(len(prompts), dtype=np.bool_)
        for values in self.found.values():
            missing |= np.isnan(values[prompts, 0])
        return missing

    def measure(
        self, prompts: Ints, base: UnpatchedBatch, directions: FittedDirections
    ) -> Iterator[CachedCell]:
        """Measure errors on prompts of the base run, and yield what is to be stored."""
        for spot, values in self.found.items():
            values[prompts] = self._measured(spot, prompts, base, directions)
            if self.cache is not None:
                yield self.cache.part(spot, prompts, values[prompts])

    def _measured(
        self,
        spot: ReconstructedSpot,
        prompts: Ints,
        base: UnpatchedBatch,
        directions: FittedDirections,
    ) -> Floats:
        rule = self.plan.rules[spot.rule]
        basis = rule.rule.basis
        assert basis is not None
        pairs = [(rule.point_table[n], rule.source_table[n]) for n in spot.points]
        points = [point for pair in pairs for point in pair]
        position = rule.positions[spot.position]
        sums = np.zeros((len(base.prompts), 2))
        vectors: dict[int, Tensor] = {}
        for each in read_vectors(lambda _: base, points, [position], [base.prompts]):
            vectors[each.point] = each.vectors
            if each.point % 2 == 0:
                continue
            system = directions.systems[basis.at(points[each.point - 1], spot.basis).name]
            errors = relative_errors(system, vectors.pop(each.point - 1), vectors.pop(each.point))
            at = np.searchsorted(base.prompts, each.prompts)
            np.add.at(sums[:, 0], at, errors)
            np.add.at(sums[:, 1], at, 1)
        return sums[np.searchsorted(base.prompts, prompts)]

    def mean(self, prompts: Ints) -> BasisErrors:
        """Return the mean error of each basis over the vectors of these prompts."""
        sums: dict[str, Floats] = {}
        for spot, values in self.found.items():
            basis = self.plan.rules[spot.rule].rule.basis
            assert basis is not None
            own = np.nansum(values[prompts], axis=0)
            name = basis.names[spot.basis]
            sums[name] = sums.get(name, 0) + own
        return {name: (own[0] / own[1], int(own[1])) for name, own in sums.items() if own[1]}


def relative_errors(system: CoordinateSystem, vectors: Tensor, inputs: Tensor) -> Floats:
    """Return [K]: ‖x − x̂‖ / ‖x‖, 0 for x = 0.

    Args:
        vectors: [K, width] what is reconstructed.
        inputs: [K, …] what is encoded: the same vectors, or the inputs of a transcoder.
    """
    found = [np.zeros(0)]
    count = max(1, MAX_NUMBERS // max(system.size, vectors.shape[1]))
    for begin in range(0, len(vectors), count):
        own, given = vectors[begin : begin + count], inputs[begin : begin + count]
        dtype = torch.promote_types(own.dtype, torch.float32)
        own, given = own.to(dtype), given.to(dtype)
        error, length = (own - system.reconstruct(given)).norm(dim=-1), own.norm(dim=-1)
        ratio = torch.where(length > 0, error / length, 0.0)
        found.append(ratio.double().cpu().numpy())
    return np.concatenate(found)


# --- inactive features ----------------------------------------------------------------------------


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
    where = SiteRead(mode.reads or site, mode.find_layer(layer))
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
