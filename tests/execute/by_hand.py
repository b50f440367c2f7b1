"""Several interventions at once, by hand, on one unpadded prompt at a time.

Built on the hand-written hooks of `models.reference`, which change one site of one layer; nothing
here comes from the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models import reference
from ..models.reference import WITHOUT_LAYER, Change

Place = tuple[str, int | None]
"""A site and its layer, None for `embed`, `final_norm`, `logits`."""
Edits = Mapping[Place, Sequence[Change]]


@dataclass
class _Layer(reference.Session):
    """One layer of a forward pass; what it reads and changes lies in dictionaries of all layers."""

    layer: int | None = None
    edits: Edits = field(default_factory=dict)
    everything: dict[Place, Tensor] = field(default_factory=dict)

    def edit(self, site: str, value: Tensor, *, heads: int = 1) -> Tensor:
        place = (site, None if site in WITHOUT_LAYER else self.layer)
        self.site, self.changes = site, self.edits.get(place, ())
        value = super().edit(site, value, heads=heads)
        self.everything[place] = self.seen[site]
        return value


@torch.no_grad()
def forward(
    name: str, model: Any, ids: Sequence[int], edits: Edits | None = None
) -> tuple[Tensor, dict[Place, Tensor]]:
    """Logits [T, vocab] of one prompt with changes at any places, and all sites of all layers.

    Sites are [T, units, width], after the change.
    """
    family = reference.FAMILIES[name](model)
    changes, seen = edits or {}, {}
    top = _Layer(edits=changes, everything=seen)
    embedding, last = family.parts()
    handles = [
        reference._out(embedding, lambda x: top.edit("embed", x)),
        reference._out(last, lambda x: top.edit("final_norm", x)),
    ]
    replaced = []
    for layer in range(model.config.num_hidden_layers):
        session = _Layer(layer=layer, edits=changes, everything=seen)
        block = family.block(layer)
        projection = family.output(block)[0]
        handles.extend(family.project(block, session))
        handles.append(_neurons(family.down(block), session))
        forward = reference._projection(family, block, session)
        block.forward = reference._by_hand(family, block, session)
        projection.forward = forward
        replaced.extend([block, projection])
    try:
        logits = top.edit("logits", model(torch.tensor([list(ids)])).logits)
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.forward
    return logits[0], seen


def _neurons(module: Any, session: _Layer) -> Any:
    return reference._in(module, lambda x: session.edit("mlp_hidden", x, heads=x.shape[-1]))


def noise(row: int, draw: int, position: int, width: int) -> Tensor:
    """Of one standard deviation; of the seed 0, the row, the draw and the token, nothing else."""
    key = np.random.SeedSequence([0, row, draw, position])
    drawn = np.random.Generator(np.random.Philox(key)).standard_normal(width)
    return torch.from_numpy(drawn)


@dataclass(frozen=True)
class Point:
    """One vector of one site; `unit` None stands for all heads or neurons."""

    site: str
    layer: int | None = None
    unit: int | None = None

    def units(self, seen: Mapping[Place, Tensor]) -> list[int]:
        if self.unit is not None:
            return [self.unit]
        return list(range(seen[self.site, self.layer].shape[1]))


def copied(
    points: Sequence[Point],
    seen: Mapping[Place, Tensor],
    read: Sequence[int],
    written: Sequence[int],
) -> dict[Place, list[Change]]:
    """The changes that carry these points of one run over to another."""
    edits: dict[Place, list[Change]] = {}
    for point in points:
        place = (point.site, point.layer)
        for origin, target in zip(read, written, strict=True):
            for unit in point.units(seen):
                change = Change(target, unit, seen[place][origin, unit])
                edits.setdefault(place, []).append(change)
    return edits


def zeroed(
    points: Sequence[Point], seen: Mapping[Place, Tensor], written: Sequence[int]
) -> dict[Place, list[Change]]:
    """The changes that set these points to zero."""
    nothing = {place: torch.zeros_like(value) for place, value in seen.items()}
    return copied(points, nothing, written, written)


def together(*parts: Edits) -> dict[Place, list[Change]]:
    """Several changes in one run."""
    edits: dict[Place, list[Change]] = {}
    for part in parts:
        for place, changes in part.items():
            edits.setdefault(place, []).extend(changes)
    return edits
