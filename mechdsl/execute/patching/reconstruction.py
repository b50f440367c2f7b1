"""Size of the reconstruction errors of dictionaries, at the vectors that rules change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.execute.cache import CachedCell, ErrorCache
from mechdsl.execute.unpatched_batch import UnpatchedBatch
from mechdsl.execute.vectors import FittedDirections, read_vectors
from mechdsl.forward.hooks.coordinates import MAX_NUMBERS, CoordinateSystem
from mechdsl.planner.plan import ExperimentPlan, ReconstructedSpot

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
