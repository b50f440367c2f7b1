"""Interfaces of observations, which compute numbers from vectors of one row or of all rows.

`mechdsl.rules.observations` contains the registered observations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.models.shape import ModelShape
from mechdsl.prompts.expressions import evaluate
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.prompts.values import DrawKey, Refusal, to_plain
from mechdsl.resolve.types import (
    Convention,
    Intervention,
    ResolvedMeasure,
    ResolvedRule,
    SiteLayer,
    SitePoint,
)
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import MetricForm

if TYPE_CHECKING:
    from torch import Tensor

    from mechdsl.base.arrays import Bools, Floats, Ints


class Unembedding(Protocol):
    """Final norm and unembedding of a model."""

    def logits(self, vectors: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Compute the logits that the model would give for residual-stream vectors.

        Args:
            vectors: Vectors of the residual stream, [K, d_model].
            tokens: Token ids to compute; None for the whole vocabulary.

        Returns:
            Logits, [K, vocab] or [K, tokens], with all processing that the model applies to its
            own.
        """
        ...

    def share(self, vectors: Tensor, stream: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Compute the contribution of components of the stream to the logits.

        Args:
            vectors: Vectors that were added to the stream, [K, d_model].
            stream: The stream, [K, d_model], whose scale the final norm uses.
            tokens: Token ids to compute; None for the whole vocabulary.

        Returns:
            Contributions, [K, vocab] or [K, tokens].
        """
        ...

    def neurons_out(self, layer: int, units: Tensor, values: Tensor) -> Tensor:
        """Compute the contributions of neurons to the stream: [K, d_model].

        Args:
            units: Neuron indices, [K].
            values: Activations of the neurons, [K, 1].
        """
        ...


class ObservedVectors(Protocol):
    """K vectors of one site in one layer, from some rows, with their positions."""

    @property
    def vectors(self) -> Tensor:
        """[K, width], at least float32: one head or neuron, or all of them concatenated. For
        patterns and scores the width is that of the longest prompt, with 0 where there is no
        key."""
        ...

    @property
    def units(self) -> Tensor | None:
        """[K] head or neuron of each vector; None if each vector contains all of them."""
        ...

    @property
    def positions(self) -> Tensor:
        """[K] prompt token of each vector."""
        ...

    @property
    def prompts(self) -> Ints:
        """[K] number of the row of each vector, on the host."""
        ...

    @property
    def keys(self) -> tuple[Tensor, Tensor] | None:
        """Index into the K vectors and prompt token of each requested key; None without keys."""
        ...

    @property
    def place(self) -> SiteLayer:
        """The site and its layer."""
        ...

    @property
    def further_vectors(self) -> Mapping[SiteLayer, Tensor]:
        """[K, width] for each site of `Observation.further_sites`, at the same tokens."""
        ...

    @property
    def unembedding(self) -> Unembedding:
        """Unembedding of the model that runs."""
        ...

    @property
    def tokens(self) -> Tensor | None:
        """Requested token ids of an observation that computes logits; None for all."""
        ...


class Observation(Intervention):
    """An intervention that changes nothing and computes measured values from activations.

    A rule reads vectors at sites and positions. `each` computes one number for each vector, and a
    row's value is their mean over joined sites and positions. Alternatively, `logits` computes
    logits, which metrics read.
    """

    changes = "nothing"
    drawn_positions = False
    word: ClassVar[str]
    """Keyword after `observe`."""
    form: MetricForm
    """Metric form of its measure. The meaning is the first line of the class docstring."""
    unit: ClassVar[str] = ""
    gives: ClassVar[Literal["number", "logits"]] = "number"
    unplaced: ClassVar[Literal["refused", "last token"]] = "refused"
    """Treatment of a line without positions: an error, or the last token and a note."""
    by_unit: ClassVar[bool] = False
    """Whether a site without a head axis is observed head by head, instead of as one vector."""
    reads_entropy: ClassVar[bool] = False
    """Whether it reads only the entropy of patterns: vectors in a vision encoder are then [K, 1],
    so that no pass keeps the weights between all patches."""
    reads_tokens: ClassVar[bool] = False
    """Whether it reads patterns by the places of keys in images, without padding."""
    adds_up: ClassVar[bool] = False
    """Whether joined sites are summed instead of averaged."""
    read_by_measures: ClassVar[bool] = False
    """Whether the measures of the experiment read it instead of the model's output."""
    controls: ClassVar[tuple[str, ...]] = ()
    """Names of control measures that are computed with it, each after its label."""
    of_weights: ClassVar[bool] = False
    """Whether it reads weights alone, so that its values don't depend on prompts."""
    of_bases: ClassVar[bool] = False
    """Whether its arguments are bases."""
    of_probes: ClassVar[bool] = False
    """Whether its argument may be a probe that the file trains."""
    of_coordinates: ClassVar[bool] = False
    """Whether its site may be coordinates of a basis: `observe value feature 3 of b`. The vectors
    that it reads are then the mean of the named coordinates, [K, 1]."""
    of_maps: ClassVar[bool] = False
    """Whether it reads maps that other experiments computed, instead of a site."""
    has_graph: ClassVar[bool] = False
    """Whether it has a graph for `report graph`."""
    leads: ClassVar[bool] = False
    """Whether it observes edges between positions: `observe WORD from Q to K`."""
    weights_attention: ClassVar[bool] = False
    """Whether it multiplies attention by a factor: `observe attention … by WORD`."""
    counts: ClassVar[str] = ""
    """Axis of its values, numbered from 1, if a cell has several."""
    value_axes: ClassVar[tuple[str, ...]] = ()
    """Axes of its values, if there are several that aren't numbered from 1."""
    takes: ClassVar[tuple[Literal["toward", "with", "with site", "top", "arguments"], ...]] = ()
    """Clauses that it accepts."""

    @property
    def made_of(self) -> Mapping[str, str]:
        """Files that its values are read from: name → SHA-256."""
        return {}

    def lists(self, rule: ResolvedRule) -> int:
        """Return the number of tokens to list for each cell, by their mean probability over
        rows."""
        return 0

    def form_of(self, name: str) -> MetricForm:
        """Return the metric form of the observation, or of the control measure with this name."""
        return self.form

    def further_sites(self, rule: ResolvedRule, shape: ModelShape) -> tuple[SiteLayer, ...]:
        """Return the sites of further whole vectors that it needs at the same tokens."""
        return ()

    def each(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        """Compute the number of each vector, [K]."""
        raise NotImplementedError

    def logits(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        """Compute logits of each vector, [K, tokens]."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TrainingVectors:
    """Vectors of the rows that an observation is fitted on, at the same sites and position."""

    vectors: Floats
    """[row, width]"""
    prompts: Ints
    """[row] number in their own table, ascending."""
    keys: Sequence[bytes]
    """[row] keys as in `RowVectors.keys`."""


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Table, run and positions of the rows that an observation is fitted on."""

    table: PromptTable
    run: PromptRun
    cells: tuple[PositionCell, ...]
    """Positions, in the same number and order as those of the rule."""


@dataclass(frozen=True, eq=False)
class RowVectors:
    """Vectors of one cell, one for each row."""

    vectors: Floats
    """[row, width] mean over the tokens of the row's position; joined sites are concatenated."""
    prompts: Ints
    """[row] number in the table, ascending. Rows that lack the position are omitted."""
    keys: Sequence[bytes]
    """[row] key of the row's input at the position: rows with equal keys have equal vectors."""
    precision: float
    """Relative spacing of floating-point numbers of the dtype of the computation."""
    other: Floats | None
    """[row, other width] vectors at the site or position that the observation compares with."""
    training: TrainingVectors | None
    """Vectors to fit on, if they are of other rows."""
    number: int
    """1-based number of the value, for a cell with several values; otherwise 0."""
    points: tuple[SitePoint, ...]
    """Sites of the vectors, more than one if they are joined."""
    pairs: Floats
    """[row, 2] number of pairs of different tokens, one from each position, and number of pairs of
    a token with itself."""


@dataclass(frozen=True, eq=False)
class TokenVectors:
    """Vectors of some rows at all tokens that a rule names, in any of its cells."""

    vectors: Floats
    """[token, width]; joined sites are concatenated."""
    row: Ints
    """[token] index of the token's row, ascending. Every row has at least one token."""
    tokens: Ints
    """[token] position in the prompt, ascending within a row."""
    prompts: Ints
    """[row] number in the table, ascending."""
    keys: Sequence[bytes]
    """[row] keys as in `RowVectors.keys`."""
    predicted: Floats | None = None
    """[token, width] the part that preceding tokens predict; `vectors` excludes it. None: no
    prediction."""

    @property
    def complete_vectors(self) -> Floats:
        """[token, width] vectors with the part that preceding tokens predict."""
        return self.vectors if self.predicted is None else self.vectors + self.predicted

    def at(self, cell: PositionCell) -> tuple[Ints, Ints]:
        """Return the row [K] and the index [K] of each token at a position, row by row."""
        import numpy as np

        hits = [[token for own in cell.hits[row] for token in own] for row in self.prompts.tolist()]
        row = np.repeat(np.arange(len(hits)), [len(own) for own in hits])
        token = np.array([token for own in hits for token in own], dtype=np.int64)
        stride = 1 + self.tokens.max(initial=0)
        return row, np.searchsorted(self.row * stride + self.tokens, row * stride + token)

    def of_rows(self, there: Bools) -> tuple[Floats, Ints]:
        """Select some rows.

        Args:
            there: Whether to select each row, [row].

        Returns:
            Their vectors, [K, width], and the row of each vector, renumbered from 0 without gaps,
            [K].
        """
        import numpy as np

        mask = there[self.row]
        return self.vectors[mask], (np.cumsum(there) - 1)[self.row[mask]]


@dataclass(frozen=True, eq=False)
class ObservedTokens:
    """Input of an observation of tokens."""

    own: TokenVectors
    other: TokenVectors | None
    """Vectors of the run to compare with, at the same sites and tokens."""
    training: TokenVectors | None
    """Vectors to fit on, if they are of other rows."""


class RowSetObservation(Observation):
    """An observation whose value for a row depends on all rows of its cell."""

    spread: Literal["rows", "unknown", "none"] = "rows"
    """Source of a cell's interval. With "rows", rows have separate values: the cell's value is
    their mean and its interval reflects their spread. Otherwise every row has the cell's value,
    which other rows might change ("unknown") or not ("none")."""

    reads_vectors: ClassVar[bool] = True
    """Whether it reads vectors."""
    of_directions: ClassVar[bool] = False
    """Whether it reads sums of unit vectors over a position's tokens instead of mean vectors."""
    of_whole_text: ClassVar[bool] = False
    """Whether keys of rows cover the whole text, also tokens that a vector can't depend on."""

    keeps_images_together: ClassVar[bool] = False
    """Whether rows that share an image have one key in a vision encoder, so that no fit to some of
    them is evaluated on others."""

    keeps_cells: ClassVar[bool] = True
    """Whether the values of its cells may be stored."""

    findings: ClassVar[tuple[str, ...]] = ()
    """Words of further numbers of a cell, which conventions state. `per_token` returns them after
    the values and controls."""

    trained_on: TrainingRows | None = None
    """Rows to fit on, if they differ from the rows to evaluate."""

    target: ResolvedMeasure | None = None
    """A measure of the model's logits whose gradient it uses."""

    outcome: ResolvedMeasure | None = None
    """A measure of the model's logits that it predicts."""

    @property
    def dependencies(self) -> object:
        """What its values depend on, besides the vectors, their rows and the rows to fit on."""
        return {
            name: own for name, own in vars(self).items() if name not in ("trained_on", "target")
        }

    @property
    def reads_weights_only(self) -> bool:
        return not self.reads_vectors and self.spread == "none"

    def describe_findings(self, found: Mapping[str, tuple[float, float]]) -> Iterator[Convention]:
        """Describe the least and the largest of each finding over cells."""
        yield from ()

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        """Compute the values of the observation and of each control, [row].

        Raises:
            ValueError, ArithmeticError: If the vectors permit no value; the message states the
                reason.
        """
        raise NotImplementedError


class TokenSetObservation(RowSetObservation):
    """An observation that has a number for every token that the rule names.

    A row's value in a cell is the mean over its tokens in the cell.
    """

    def per_token(self, seen: ObservedTokens, seed: int) -> Sequence[Floats]:
        """Compute the values of the observation, each control and each finding, [value, token].

        There is one value, or one for each index of the `counts` axis. See `per_row` for the
        arguments and errors.
        """
        raise NotImplementedError


def join_positions(cells: Iterable[PositionCell]) -> PositionCell:
    """Join all tokens of some positions of the same rows."""
    rows: list[set[int]] = []
    vectors = 1
    for cell in cells:
        rows, vectors = rows or [set() for _ in cell.hits], cell.vectors
        for row, hits in zip(rows, cell.hits, strict=True):
            row.update(token for tokens in hits for token in tokens)
    hits = tuple((tuple(sorted(row)),) if row else () for row in rows)
    return PositionCell("every token", hits, vectors=vectors)


def evaluate_rows(
    expr: ast.Expr, table: PromptTable, diagnostics: list[Diagnostic]
) -> list[object] | None:
    """Evaluate an expression in every clean row, or `count of fewer` in the rows of a corruption.

    None after an error.
    """
    if isinstance(expr, ast.QualifiedRef):
        run = expr.of.name if expr.of.part is None else f"{expr.of.name}.{expr.of.part}"
        rows = table.runs[run].rows if run in table.runs else ()
        known = list(rows[0].values) if rows else list(table.runs)
        if not rows or expr.name not in rows[0].values:
            hint = did_you_mean(expr.name if rows else run, known, f"there are {', '.join(known)}")
            what = "value" if rows else "run"
            diagnostics.append(
                BadArgument(
                    span=expr.span, name=expr.span.written, reason=f"isn't a {what}", hint=hint
                )
            )
            return None
        return [row.values[expr.name] for row in rows]
    values: list[object] = []
    for row in table.sources:
        try:
            values.append(to_plain(evaluate(expr, row, DrawKey(f"measure:{expr.span.text}"))))
        except Refusal as refusal:
            diagnostics.append(refusal.diagnostic(row.describe()))
            return None
    return values
