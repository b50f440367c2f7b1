"""Table of caught slips by kind, and of the quality of their diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .checked import Outcome
from .mutants import KINDS


class Shares(NamedTuple):
    """Share of caught mutants; share of these whose first error is on the line with the slip; share
    of misspelt words for which the right one is suggested."""

    caught: float
    on_line: float
    answered: float


BOUNDS = Shares(0.98, 0.95, 0.85)


def table(outcomes: Sequence[Outcome], *, with_models: bool) -> str:
    """One line for each kind, and one for all."""
    rows = [["", "mutants", "left out", "caught", "on the line", "right word"]]
    for kind in KINDS:
        own = [each for each in outcomes if each.mutant.kind == kind]
        rows.append(_row(kind, own, with_models=with_models))
    rows.append(_row("all", outcomes, with_models=with_models))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def shares_of(outcomes: Sequence[Outcome], *, with_models: bool) -> Shares:
    return Shares(*(_share(*each) for each in counts_of(outcomes, with_models=with_models)))


Count = tuple[int, int]
"""Number of hits, and total number."""


def counts_of(outcomes: Sequence[Outcome], *, with_models: bool) -> tuple[Count, Count, Count]:
    """Hits and totals of the three shares."""
    counted = [each for each in outcomes if each.counts(with_models=with_models)]
    caught = [each for each in counted if each.caught]
    placed = [each.on_line for each in caught if each.on_line is not None]
    words = [each.answered for each in caught if each.mutant.right]
    return (len(caught), len(counted)), (sum(placed), len(placed)), (sum(words), len(words))


def _row(kind: str, outcomes: Sequence[Outcome], *, with_models: bool) -> list[str]:
    left_out = sum(not each.counts(with_models=with_models) for each in outcomes)
    counts = counts_of(outcomes, with_models=with_models)
    return [kind, str(len(outcomes)), str(left_out), *(_shown(*each) for each in counts)]


def _share(some: int, of: int) -> float:
    return some / of if of else 1.0


def _shown(some: int, of: int) -> str:
    return f"{some}/{of} {_share(some, of):.1%}" if of else ""
