"""What `observe attention` sees of patched rows: the weight of edges, out of the pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.hooks.reads_and_writes import SiteRead
from mechdsl.models.shape import ModelShape, units
from mechdsl.packed.behind_last_block import Places
from mechdsl.plan.columns import each_unit, units_of
from mechdsl.plan.rule_rows import Rows, RulePlan


@dataclass(frozen=True, eq=False)
class Look:
    """Edges that are looked at, for rows of one experiment."""

    rows: int
    places: Mapping[SiteRead, Places]
    """Rows of the pass and queries whose patterns are read, per layer."""
    parts: Mapping[SiteRead, tuple[Ints, Ints, Ints, Ints, Ints]]
    """Per layer: (row, place, head) of each query and head; and of each key which of these it
    belongs to, and its position."""

    def weights(self, found: Mapping[SiteRead, Tensor]) -> Tensor:
        """[row] what the keys get together, averaged over joined queries, heads and layers.

        found: [place, heads, key position] per layer.
        """
        total, count = torch.zeros(self.rows), torch.zeros(self.rows)
        for read, (row, place, head, entry, key) in self.parts.items():
            pattern = found[read].float().cpu()
            each = torch.zeros(len(row))
            index = torch.from_numpy(entry)
            weight = pattern[
                torch.from_numpy(place)[index],
                torch.from_numpy(head)[index],
                torch.from_numpy(key),
            ]
            each.index_add_(0, index, weight)
            at = torch.from_numpy(row)
            total.index_add_(0, at, each)
            count.index_add_(0, at, torch.ones(len(row)))
        return total / count


def look(plan: RulePlan, rows: Rows, at: Ints, shape: ModelShape) -> Look:
    """What an `observe` rule looks at; at: [row] the row of the pass."""
    assert plan.keys is not None
    keys = plan.key_runs(rows)
    row, query = plan.written.tokens.expand(plan.written_runs(rows))
    index, point = plan.points.expand(plan.site_of_cell[rows.cell][row])
    row, query = row[index], query[index]
    layers = np.array([p.layer for p in plan.point_table], dtype=np.int64)[point]
    unit = units_of(plan.point_table)[point]
    places: dict[SiteRead, Places] = {}
    parts: dict[SiteRead, tuple[Ints, Ints, Ints, Ints, Ints]] = {}
    for layer in np.unique(layers).tolist():
        own = np.flatnonzero(layers == layer)
        again, head = each_unit(unit[own], units(shape, "pattern", layer))
        own = own[again]
        distinct, place = np.unique(
            np.stack([at[row[own]], query[own]]), axis=1, return_inverse=True
        )
        entry, key = plan.keys.tokens.expand(keys[row[own]])
        read = SiteRead("pattern", layer)
        places[read] = distinct[0], distinct[1]
        parts[read] = row[own], place.reshape(-1), head, entry, key
    return Look(len(rows), places, parts)
