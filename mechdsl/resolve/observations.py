"""Interfaces of observations, which compute numbers from vectors of one row or of all rows.

The registered observations are in `mechdsl.rules.observations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from mechdsl.models.shape import ModelShape
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.resolve.types import Intervention, ResolvedRule, SiteLayer
from mechdsl.vocab.metrics import MetricForm

if TYPE_CHECKING:
    from torch import Tensor

    from mechdsl.base.arrays import Bools, Floats, Ints


class Unembedding(Protocol):
    """What a model does behind its last block."""

    def logits(self, vectors: Tensor, tokens: Tensor | None = None) -> Tensor:
        """[K, vocab], or those of `tokens`, of vectors [K, d_model] of the residual stream: through
        the final norm and the unembedding, with all that the model does to its logits."""
        ...

    def share(self, vectors: Tensor, stream: Tensor, tokens: Tensor | None = None) -> Tensor:
        """[K, vocab], or those of `tokens`: what vectors [K, d_model] that were added to the stream
        add to the logits, with the final norm's scale held at that of the stream [K, d_model]."""
        ...

    def neurons_out(self, layer: int, units: Tensor, values: Tensor) -> Tensor:
        """[K, d_model]: what neurons `units` [K] with activations `values` [K, 1] add to the
        stream."""
        ...


class ObservedVectors(Protocol):
    """K vectors of one site of one layer, of some rows, and what is known of their places."""

    @property
    def vectors(self) -> Tensor:
        """[K, width], in float32 at least: one head or neuron, or all of them side by side. Of
        patterns and scores the width is that of the longest prompt, 0 where there is no key."""
        ...

    @property
    def units(self) -> Tensor | None:
        """[K] the head or neuron of each; None where all are one vector."""
        ...

    @property
    def positions(self) -> Tensor:
        """[K] the token of the prompt that each is at."""
        ...

    @property
    def keys(self) -> tuple[Tensor, Tensor] | None:
        """(index into the K vectors, token of the prompt) of the keys that are asked for; None
        where none are named."""
        ...

    @property
    def place(self) -> SiteLayer:
        """The site and its layer."""
        ...

    @property
    def beside(self) -> Mapping[SiteLayer, Tensor]:
        """[K, width] what `Observation.beside` names, at the same tokens."""
        ...

    @property
    def unembedding(self) -> Unembedding:
        """Of the model that is run."""
        ...

    @property
    def tokens(self) -> Tensor | None:
        """Of observations that give logits, the tokens that are asked for; None for all."""
        ...


class Observation(Intervention):
    """An intervention that changes nothing: what is seen of a row is what is measured of it.

    A rule sees vectors at sites and positions. `each` makes one number of each, and a row's value
    is their mean over joined sites and positions; or `logits` makes logits, which metrics read.
    """

    changes = "nothing"
    drawn_positions = False
    word: ClassVar[str]
    """Behind `observe`."""
    form: MetricForm
    """Its measure, of the docstring's first line."""
    unit: ClassVar[str] = ""
    gives: ClassVar[Literal["number", "logits"]] = "number"
    unplaced: ClassVar[Literal["refused", "last token"]] = "refused"
    """What a line without positions is: refused, or at the last token, which is said."""
    by_unit: ClassVar[bool] = False
    """Where no head is named, each is looked at by itself; else all are one vector."""
    adds_up: ClassVar[bool] = False
    """Joined sites are added up, and not averaged."""
    read_by_measures: ClassVar[bool] = False
    """The measures of the experiment read it in place of the model's own output."""
    controls: ClassVar[tuple[str, ...]] = ()
    """What is measured beside it, as what it is set against, each a measure behind its own
    label."""
    of_weights: ClassVar[bool] = False
    """It looks at weights alone, for which no prompt matters."""
    of_maps: ClassVar[bool] = False
    """It is of maps that other experiments made, and of no site."""
    leads: ClassVar[bool] = False
    """It is of what leads from one position to another: `observe WORD from Q to K`."""
    counts: ClassVar[str] = ""
    """The axis of its values, from 1, where there are several to a cell."""
    takes: ClassVar[tuple[Literal["toward", "with", "with site", "top", "arguments"], ...]] = ()
    """The clauses that it has a meaning for."""

    @property
    def made_of(self) -> Mapping[str, str]:
        """Files whose numbers it takes, by name: SHA-256."""
        return {}

    def lists(self, rule: ResolvedRule) -> int:
        """How many tokens are listed of each cell, by their mean probability over its rows."""
        return 0

    def form_of(self, name: str) -> MetricForm:
        """Of itself, or of what is measured beside it under this name."""
        return self.form

    def beside(self, rule: ResolvedRule, shape: ModelShape) -> tuple[SiteLayer, ...]:
        """Whole vectors that it needs at the same tokens."""
        return ()

    def each(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        """[K] the number of each vector."""
        raise NotImplementedError

    def logits(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        """[K, tokens] of each vector."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TrainingVectors:
    """Other rows, at the same sites and position, which something is fitted on."""

    vectors: Floats
    """[row, width]"""
    prompts: Ints
    """[row] number in their own table, ascending."""
    keys: Sequence[bytes]
    """[row] as `RowVectors.keys`."""


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Where these rows are."""

    table: PromptTable
    run: PromptRun
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
    training: TrainingVectors | None
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
class ObservedTokens:
    """What an observation of tokens is made of."""

    own: TokenVectors
    other: TokenVectors | None
    """Of another run, at the same places, where it is set against that."""
    training: TokenVectors | None
    """Where it is fitted on other rows, these."""


class RowSetObservation(Observation):
    """An observation whose value in a row hangs on all rows of its cell."""

    spread: Literal["rows", "unknown", "none"] = "rows"
    """Whether rows have values of their own, whose mean is the cell's, and whose spread its
    interval; else every row has the cell's, which others would change or not."""

    reads_vectors: ClassVar[bool] = True
    """Whether it is made of vectors at all."""
    of_directions: ClassVar[bool] = False
    """Whether it sees sums of unit vectors over the tokens of a position, and not means of
    vectors."""

    trained_on: TrainingRows | None = None
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


class TokenSetObservation(RowSetObservation):
    """One that is made of every token that the line names, and has a number of each.

    A row's value in a cell is the mean over its tokens there.
    """

    def per_token(self, seen: ObservedTokens, seed: int) -> Sequence[Floats]:
        """Of itself and of each control, [value, token]: one value, or as many as it counts. As
        `per_row`."""
        raise NotImplementedError


def join_positions(cells: Iterable[PositionCell]) -> PositionCell:
    """All tokens of some positions of the same rows, joined."""
    rows: list[set[int]] = []
    for cell in cells:
        rows = rows or [set() for _ in cell.hits]
        for own, hits in zip(rows, cell.hits, strict=True):
            own.update(token for tokens in hits for token in tokens)
    return PositionCell("every token", tuple((tuple(sorted(own)),) if own else () for own in rows))
