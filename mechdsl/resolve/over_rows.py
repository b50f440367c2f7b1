"""Observations that are made of the vectors of all rows at once: probes, similarities, ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mechdsl.prompts.prompt_table import PositionCell, PromptTable, Run
from mechdsl.resolve.observation import Observation
from mechdsl.resolve.resolved import ResolvedExperiment

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats, Ints


@dataclass(frozen=True, eq=False)
class Training:
    """Other rows, at the same sites and position, which something is fitted on."""

    vectors: Floats
    """[row, width]"""
    prompts: Ints
    """[row] number in their own table, ascending."""
    keys: Sequence[bytes]
    """[row] as `RowVectors.keys`."""


@dataclass(frozen=True, eq=False)
class TrainedOn:
    """Where these rows are."""

    table: PromptTable
    run: Run
    cells: tuple[PositionCell, ...]
    """The positions, as many as the line has and in their order."""


@dataclass(frozen=True, eq=False)
class RowVectors:
    """The vectors of one cell, one of each row."""

    vectors: Floats
    """[row, width] the mean over the tokens of its position; sites that are joined side by side."""
    prompts: Ints
    """[row] number in the table, ascending; rows that lack the position aren't here."""
    keys: Sequence[bytes]
    """[row] what is seen of it there: rows of one key have equal vectors."""
    precision: float
    """The relative spacing of numbers of the type that they were computed in."""
    other: Floats | None
    """[row, other width] the vectors of the site, or at the position, that it is set against."""
    training: Training | None
    """Where it is fitted on other rows, these."""
    number: int
    """Which it is, from 1, of the values that a cell has several of; 0 where it has one."""
    pairs: Floats
    """[row, 2] how many pairs of different tokens there are, one of either position, and how many
    of a token with itself."""


class OverRows(Observation):
    """An observation whose value in a row hangs on all rows of its cell."""

    spread: Literal["rows", "unknown", "none"] = "rows"
    """Whether rows have values of their own, whose mean is the cell's, and whose spread its
    interval; else every row has the cell's, which others would change or not."""

    reads_vectors: ClassVar[bool] = True
    """Whether it is made of vectors at all."""
    of_directions: ClassVar[bool] = False
    """Whether it sees sums of unit vectors over the tokens of a position, and not means of
    vectors."""

    trained_on: TrainedOn | None = None
    """The rows that it is fitted on, where they aren't those that it is told on."""

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        """Of itself and of each control, [row]. ValueError or ArithmeticError, in words, for what
        it can't be made of.

        seed: of the file.
        """
        raise NotImplementedError


def of_weights(experiment: ResolvedExperiment) -> bool:
    """Whether it observes weights, for which no row matters."""
    every = [rule.does for rule in experiment.rules if isinstance(rule.does, OverRows)]
    return any(not does.reads_vectors and does.spread == "none" for does in every)
