"""Sites that an experiment tests on rows that they were picked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechdsl.resolve.findings import Finding
from mechdsl.resolve.over_rows import of_weights
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


def selections(
    variants: Sequence[ResolvedExperiment], found: Mapping[str, Finding]
) -> tuple[Selection, ...]:
    """Of all variants of an experiment together; by the files alone, whatever a store has. Tokens
    are picked row by row, which has no other rows to be tested on.

    found: by experiment, or what stands in for it before it has run.
    """
    rows = {(each.table.name, row) for each in variants for row in each.table.row_ids}
    named = dict.fromkeys(name for each in variants for name in each.sites_of)
    chosen: list[Selection] = []
    for name in named:
        parts = [part for part in found[name].parts if not of_weights(part.experiment)]
        picked = {
            (part.experiment.table.name, row)
            for part in parts
            for row in part.experiment.table.row_ids
        }
        shared = len(picked & rows)
        if shared:
            chosen.append(Selection(name, found[name].cells, shared, len(rows)))
    return tuple(chosen)
