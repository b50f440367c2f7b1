"""Which targets of a rule can be others: heads of one layer, layers; and its points moved there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mechdsl.models.shape import ModelShape, units
from mechdsl.program import spec
from mechdsl.resolve.apart_from import LeftOut, layers_of, units_of
from mechdsl.resolve.matched_draws import UNIT_WORDS, Picked, Slot
from mechdsl.resolve.resolved_rule import SitePoint
from mechdsl.vocab.sites import SITES


class OtherSites:
    """The sites of a model, without those that are left out."""

    def __init__(self, shape: ModelShape, apart: Sequence[LeftOut]) -> None:
        self.shape = shape
        self.without_units = units_of(apart, shape)
        self.without_layers = layers_of(apart)

    def own(
        self, kind: spec.Drawn | None, points: Sequence[SitePoint]
    ) -> dict[Slot, tuple[int, ...]]:
        """What of these points can be another."""
        found: dict[Slot, set[int]] = {}
        for point in points:
            slot = self.slot(point, kind)
            if slot is not None:
                target = point.layer if kind == "layers" else point.unit
                assert target is not None
                found.setdefault(slot, set()).add(target)
        return {slot: tuple(sorted(targets)) for slot, targets in found.items()}

    def slot(self, point: SitePoint, kind: spec.Drawn | None) -> Slot | None:
        if kind == "layers":
            return Slot("layers", self.shape.n_layers, None)
        unit = SITES[point.site].unit
        if kind is None or point.unit is None or unit is None or UNIT_WORDS[unit] != kind:
            return None
        return Slot(kind, units(self.shape, point.site, point.layer), point.layer)

    def fitting(
        self, written: Mapping[int, Sequence[SitePoint]], kinds: Sequence[spec.Drawn | None]
    ) -> tuple[int, ...]:
        """The layers that have everything that is written in a cell, and are not left out."""
        points = {point for each in written.values() for point in each}
        moved = {p for n, each in written.items() if kinds[n] == "layers" for p in each}

        def fits(layer: int) -> bool:
            return all(
                self.shape.has(p.site, layer)
                and units(self.shape, p.site, layer) == units(self.shape, p.site, p.layer)
                for p in points
                if p.layer is not None
            )

        def apart(layer: int) -> bool:
            return any(self._is_apart(p, layer) for p in moved)

        layers = range(self.shape.n_layers)
        return tuple(layer for layer in layers if fits(layer) and not apart(layer))

    def _is_apart(self, point: SitePoint, layer: int) -> bool:
        """Whether a point is left out in this layer."""
        unit = SITES[point.site].unit
        if point.unit is None or unit is None:
            return layer in self.without_layers
        slot = Slot(UNIT_WORDS[unit], units(self.shape, point.site, layer), layer)
        return point.unit in self.without_units.get(slot, ())

    def moved(
        self,
        points: Sequence[SitePoint],
        written: Sequence[SitePoint],
        kind: spec.Drawn | None,
        picked: Picked | None,
    ) -> tuple[SitePoint, ...]:
        """Points with what was drawn for those that are written (which they may be themselves);
        as they are without it."""
        if picked is None:
            return tuple(points)
        found: list[SitePoint] = []
        for point, target in zip(points, written, strict=True):
            slot = self.slot(target, kind)
            if slot is None:
                found.append(point)
            elif kind == "layers":
                # `into layer`: what is read stays where it is.
                same = point == target and target.layer is not None
                found.append(
                    replace(point, layer=picked[slot, target.layer or 0]) if same else point
                )
            else:
                assert target.unit is not None
                found.append(replace(point, unit=picked[slot, target.unit]))
        return tuple(found)
