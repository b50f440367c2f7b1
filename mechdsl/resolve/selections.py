"""Sites that an experiment tests on rows that they were picked on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mechdsl.resolve.resolved import ResolvedExperiment


@dataclass(frozen=True, slots=True)
class Selection:
    """What one experiment picked, and another one tests on rows that both have: the largest of many
    effects are large by chance too, so that there they look larger than they are."""

    of: str
    """The experiment that picked."""
    cells: int
    """How many it picked of."""
    shared: int
    """Rows that it picked on, of those that are tested."""
    rows: int
    """All that are tested."""


def selections(variants: Sequence[ResolvedExperiment]) -> tuple[Selection, ...]:
    """Of all variants of an experiment together; by the files alone, whatever a store has. Tokens
    are picked row by row, which has no other rows to be tested on."""
    tables = [each.table for each in variants]
    rows = {
        (t.name, row): key for t in tables for row, key in zip(t.row_ids, t.row_keys, strict=True)
    }
    picked = {name: each for own in variants for name, each in own.sites_of.items()}
    return tuple(
        Selection(name, each.cells, shared, len(rows))
        for name, each in picked.items()
        if (shared := sum(key in each.row_keys for key in rows.values()))
    )
