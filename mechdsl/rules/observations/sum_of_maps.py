"""`observe sum of fine, 0.5 * coarse at each token of image`: one map, of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mechdsl.base.names import name_list
from mechdsl.program import spec
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.resolve.amounts import resolve_amounts
from mechdsl.resolve.findings import Refused, VariantFinding
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import Amounts, Key, PositionTargets, ResolvedRule, SiteTargets
from mechdsl.resolve.targets import plain_targets
from mechdsl.rules.observations.maps import (
    NOWHERE,
    SHARED,
    OfMaps,
    Scores,
    a_map,
    grids_of,
    stands_alone,
)
from mechdsl.rules.observations.over_rows import refuse
from mechdsl.rules.observations.registry import observation
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats

HERE = "write `at each token of image`"


@dataclass(frozen=True)
class Weights:
    """The numbers in front of maps."""

    axes: tuple[str, ...]
    """Loops whose variables they name."""
    values: Mapping[Key, tuple[float, ...]]
    """Of each map, for every value of these loops."""


@observation("sum")
class SumOfMaps(OfMaps):
    """Maps that other experiments made, patch by patch added up, all that each of them has.

    A window of several patches shares its number evenly among them, and a patch that several
    windows have gets the mean of its shares.
    """

    example = "fine, coarse at each token of image"

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        said = rule.observed
        assert said is not None
        if not said.maps:
            refuse(rule, work, "is of maps", f"write `observe {self.word} of {self.example}`")
            return None
        ready = [stands_alone(rule, work, by_position=True), self.fits(rule, work)]
        try:
            found = [a_map(each, work) for each in said.maps]
        except Refused as refusal:
            refuse(rule, work, refusal.reason, refusal.hint)
            return None
        maps = [part for part in found if part is not None]
        if not all(ready) or len(maps) < len(found):
            return None
        positions, weights = plain_targets(rule.at, work), _weights(said.maps, work)
        if positions is None or weights is None:
            return None
        try:
            _of_patches(positions, work)
            does = self._added(said, maps, weights, positions, work)
        except Refused as refusal:
            refuse(rule, work, refusal.reason, refusal.hint)
            return None
        keys = weights.values
        sites = SiteTargets(
            weights.axes, dict.fromkeys(keys, (NOWHERE,)), dict.fromkeys(keys, self.word)
        )
        return ResolvedRule(
            spec=rule, does=does, run=work.experiment.base, sites=sites, positions=positions
        )

    def fits(self, rule: spec.Rule, work: Work) -> bool:
        assert rule.observed is not None
        if not rule.observed.placed:
            refuse(rule, work, "is a map itself, of no region and against no other", HERE)
        return rule.observed.placed

    def _added(
        self,
        said: spec.Observed,
        maps: Sequence[VariantFinding],
        weights: Weights,
        positions: PositionTargets,
        work: Work,
    ) -> SumOfMaps:
        """With its numbers, where the maps have been made."""
        waits = [part.experiment.name for part in maps if part.values is None]
        if waits or work.table.stands_in:
            names = name_list(dict.fromkeys(waits))
            return SumOfMaps(f"known when {names} has run" if waits else "")
        import numpy as np

        rows = {row: number for number, row in enumerate(work.table.row_ids)}
        every = np.array(list(weights.values.values()))
        grids = [grids_of(part, work) for part in maps]
        total: dict[int, Floats] = {}
        for row in set(rows).intersection(*grids):
            own = np.stack([_whole(each[row]) for each in grids])
            total[row] = (every[..., None, None] * own).sum(axis=1)
        if not total:
            raise Refused(
                f"{name_list([part.experiment.name for part in maps])} have no row in common that "
                "this experiment runs on",
                "let all run on the same part and limit of their images",
            )
        reader = work.model.tokenizer
        assert isinstance(reader, ImageReader)
        values = np.full((len(every), len(positions.written), len(work.table)), np.nan)
        for number, cell in enumerate(positions.written.values()):
            for row, own in total.items():
                for hit in cell.hits[rows[row]]:
                    place = reader.layout.place(hit[0])
                    assert place is not None
                    values[:, number, rows[row]] = own[:, place[0] - 1, place[1] - 1]
        parts = [f"by each row's own {' or '.join(dict.fromkeys(part.measure for part in maps))}"]
        parts += [f"{self.word} of {', '.join(each.span.written for each in said.maps)}"]
        lacking = len(work.table) - len(total)
        parts += [SHARED] * any(part.of_windows for part in maps)
        parts += [f"{lacking} of {len(work.table)} rows dropped, a map lacks them"] * bool(lacking)
        return SumOfMaps("; ".join(parts), Scores({self.word: values}))


def _weights(maps: Sequence[ast.MapOf], work: Work) -> Weights | None:
    """What stands in front of them; None after E0337."""
    one = Amounts((), {(): 1.0})
    each = [one if own.weight is None else resolve_amounts(own.weight, work) for own in maps]
    found = [own for own in each if own is not None]
    if len(found) < len(each):
        return None
    named = {name for own in found for name in own.axes}
    loops = tuple(name for name in work.loops if name in named)
    values: dict[Key, tuple[float, ...]] = {}
    for key, _ in work.sites.combinations(loops):
        at = dict(zip(loops, key, strict=True))
        values[key] = tuple(own.values[tuple(at[name] for name in own.axes)] for own in found)
    return Weights(loops, values)


def _whole(cells: Floats) -> Floats:
    """[row, column]: all maps of an experiment, [cell, row, column], of which loops may leave some
    out; NaN where one that is there has no number."""
    import numpy as np

    there = np.isfinite(cells).any(axis=(1, 2))
    return cells[there].sum(axis=0) if there.any() else cells[0]


def _of_patches(positions: PositionTargets, work: Work) -> None:
    """Raises Refused where a cell isn't of one patch."""
    reader = work.model.tokenizer
    if reader.stands_in or not isinstance(reader, ImageReader):
        return
    for cell in positions.written.values():
        for row in cell.hits:
            tokens = [token for hit in row for token in hit]
            if len(tokens) > 1:
                raise Refused(f"`{cell.label}` covers several tokens", HERE)
            if tokens and reader.layout.place(tokens[0]) is None:
                raise Refused(f"`{cell.label}` is no patch", HERE)
