"""Writes that copy sites of one run to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .forward import Place, Write


@dataclass(frozen=True)
class Point:
    """One vector of one site; `unit` None stands for all heads or neurons."""

    site: str
    layer: int | None = None
    unit: int | None = None


def copied(
    points: Sequence[Point],
    seen: Mapping[Place, Tensor],
    read: Sequence[int],
    written: Sequence[int],
) -> list[Write]:
    """These points of a run, [T, units, width] each, from the positions read to those written."""
    writes: list[Write] = []
    for point in points:
        value = seen[point.site, point.layer]
        units = range(value.shape[1]) if point.unit is None else [point.unit]
        for origin, target in zip(read, written, strict=True):
            writes += [
                Write(point.site, point.layer, value[origin, unit], target, unit) for unit in units
            ]
    return writes


def zeroed(
    points: Sequence[Point], seen: Mapping[Place, Tensor], written: Sequence[int]
) -> list[Write]:
    """Zeros at these points."""
    nothing = {place: torch.zeros_like(value) for place, value in seen.items()}
    return copied(points, nothing, written, written)
