"""Observations that are made of the vectors of all rows at once: probes, similarities, ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mechdsl.prompts.prompt_table import PositionCell, PromptTable, Run
from mechdsl.resolve.observation import Observation
from mechdsl.resolve.resolved import ResolvedExperiment

if TYPE_CHECKING:
    from mechdsl.base.arrays import Bools, Floats, Ints


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


@dataclass(frozen=True, eq=False)
class TokenVectors:
    """The vectors of some rows at all tokens that a line names, whichever cells these are in."""

    vectors: Floats
    """[token, width]; sites that are joined side by side."""
    row: Ints
    """[token] which of the rows it is of, ascending: there is none without a token."""
    tokens: Ints
    """[token] its place in the prompt, ascending within a row."""
    prompts: Ints
    """[row] number in the table, ascending."""
    keys: Sequence[bytes]
    """[row] as `RowVectors.keys`."""

    def at(self, cell: PositionCell) -> tuple[Ints, Ints]:
        """([K] row, [K] index) of its tokens at a position, row by row."""
        import numpy as np

        hits = [[token for own in cell.hits[row] for token in own] for row in self.prompts.tolist()]
        row = np.repeat(np.arange(len(hits)), [len(own) for own in hits])
        token = np.array([token for own in hits for token in own], dtype=np.int64)
        stride = 1 + self.tokens.max(initial=0)
        return row, np.searchsorted(self.row * stride + self.tokens, row * stride + token)

    def of_rows(self, there: Bools) -> tuple[Floats, Ints]:
        """(vectors [K, width], [K] their row, from 0 without gaps) of some of the rows.

        there: [row]
        """
        import numpy as np

        own = there[self.row]
        return self.vectors[own], (np.cumsum(there) - 1)[self.row[own]]


@dataclass(frozen=True, eq=False)
class SeenTokens:
    """What an observation of tokens is made of."""

    own: TokenVectors
    other: TokenVectors | None
    """Of another run, at the same places, where it is set against that."""
    training: TokenVectors | None
    """Where it is fitted on other rows, these."""


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

    @property
    def reads_weights_only(self) -> bool:
        return not self.reads_vectors and self.spread == "none"

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        """Of itself and of each control, [row]. ValueError or ArithmeticError, in words, for what
        it can't be made of.

        seed: of the file.
        """
        raise NotImplementedError


class OverTokens(OverRows):
    """One that is made of every token that the line names, and has a number of each.

    A row's value in a cell is the mean over its tokens there.
    """

    def per_token(self, seen: SeenTokens, seed: int) -> Sequence[Floats]:
        """Of itself and of each control, [value, token]: one value, or as many as it counts. As
        `per_row`."""
        raise NotImplementedError


def every_token(cells: Iterable[PositionCell]) -> PositionCell:
    """All tokens of some positions of the same rows, joined."""
    rows: list[set[int]] = []
    for cell in cells:
        rows = rows or [set() for _ in cell.hits]
        for own, hits in zip(rows, cell.hits, strict=True):
            own.update(token for tokens in hits for token in tokens)
    return PositionCell("every token", tuple((tuple(sorted(own)),) if own else () for own in rows))


def of_weights(experiment: ResolvedExperiment) -> bool:
    """Whether it observes weights, for which no row matters."""
    return any(rule.does.reads_weights_only for rule in experiment.rules)
