"""Activations of features in all rows: which are the strongest, where they are active, and in which
rows most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.execute.measurement.values import ActiveRow, FeatureFindings
from mechdsl.forward.hooks.batch import arrays_to_device
from mechdsl.forward.hooks.coordinates import MAX_NUMBERS, CoordinateSystem
from mechdsl.forward.hooks.weight_maps import NoLinearMap, WeightMaps
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.observations import TokenVectors
from mechdsl.rules.observations.features import LISTED_TOKENS, FeatureActivations

SHOWN_ROWS = 5
"""Number of rows that are kept for each feature: those with its highest activations."""


@dataclass(frozen=True, eq=False)
class ObservedFeatures:
    """The observed features of all rows."""

    own: TokenVectors
    activations: Floats
    """[token, rank] of the tokens in `own`."""
    other: tuple[TokenVectors, Floats] | None
    """Vectors and activations of the run to compare with, if any."""
    findings: FeatureFindings

    def at(self, cell: PositionCell, source: PositionCell | None) -> tuple[Ints, Floats, Floats]:
        """Return the rows that have a position, and their activations and densities there.

        Args:
            source: The position in the run to compare with, whose activations are subtracted.

        Returns:
            [row] the index in `own.prompts`, and [row, rank] each.
        """
        there, values, density = _row_means(self.own, self.activations, cell)
        if self.other is not None:
            assert source is not None
            values = values - _row_means(*self.other, source)[1]
        return there, values, density


@torch.no_grad()
def observe_features(
    does: FeatureActivations,
    system: CoordinateSystem,
    token_vectors: TokenVectors,
    other: TokenVectors | None,
    inputs: Tensor,
) -> ObservedFeatures:
    """Find the features with the largest values, and their activation at each token.

    Args:
        system: The basis.
        token_vectors: Vectors at all tokens of all positions.
        other: Vectors of the run to compare with.
        inputs: An empty tensor of the precision and device of the vectors that are encoded.
    """
    transcodes = does.member is not None and bool(does.member.reads)
    sums, active, error = _Sums(does, token_vectors), np.zeros(system.size, dtype=np.bool_), 0.0
    for rows, vectors, row in iter_row_batches(token_vectors, system.size, inputs):
        found = system.encode(vectors, None)
        if not transcodes:
            error += float((vectors - system.reconstruct(vectors)).double().square().sum())
        active |= (found != 0).any(0).cpu().numpy()
        sums.add(rows, _row_average(found, row, len(rows)))
    if other is not None:
        for rows, vectors, row in iter_row_batches(other, system.size, inputs):
            found = system.encode(vectors, None)
            active |= (found != 0).any(0).cpu().numpy()
            sums.add(rows, -_row_average(found, row, len(rows)))
    features = _largest(sums.scores(), active, does) if does.selects else np.arange(does.count)
    activations = _encode_some(system, token_vectors, features, inputs)
    spread = float(
        ((token_vectors.complete_vectors - token_vectors.complete_vectors.mean(0)) ** 2).sum()
    )
    findings = FeatureFindings(
        features=tuple(features.tolist()),
        active=int(active.sum()),
        size=system.size,
        explained=None if transcodes or spread == 0 else 1 - error / spread,
        tokens=len(token_vectors.vectors),
        top_rows=tuple(
            _top_rows(token_vectors, activations[:, rank]) for rank in range(len(features))
        ),
    )
    theirs = None if other is None else (other, _encode_some(system, other, features, inputs))
    return ObservedFeatures(token_vectors, activations, theirs, findings)


@torch.no_grad()
def list_raised_tokens(
    maps: WeightMaps,
    system: CoordinateSystem,
    token_vectors: TokenVectors,
    features: tuple[int, ...],
    inputs: Tensor,
) -> list[list[int]]:
    """List, for each feature, the tokens whose logits its direction raises most.

    The direction is the change of the mean vector if the feature grows by 1. None are listed for
    models whose unembedding isn't linear.
    """
    vectors = torch.from_numpy(token_vectors.vectors.mean(0)).to(inputs).expand(len(features), -1)
    which = torch.tensor(features, device=inputs.device)[:, None]
    directions = system.shift(vectors, vectors.new_ones(len(features), 1), which) - vectors
    try:
        logits = maps.to_logits(directions)
    except NoLinearMap:
        return []
    return logits.topk(min(LISTED_TOKENS, logits.shape[1])).indices.tolist()


class _Sums:
    """Sums over rows that determine the rank of each feature."""

    def __init__(self, does: FeatureActivations, own: TokenVectors) -> None:
        self._rows = len(own.prompts)
        self._sum: Floats | float = 0.0
        self._squares: Floats | float = 0.0
        self._products: Floats | float = 0.0
        self._targets = None
        if does.targets is not None:
            targets = np.array(does.targets)[own.prompts]
            self._targets = targets - targets.mean()

    def add(self, rows: Ints, means: Floats) -> None:
        """Add the mean activation of some rows: [row, feature]."""
        self._sum = self._sum + means.sum(0)
        if self._targets is not None:
            self._squares = self._squares + (means**2).sum(0)
            self._products = self._products + self._targets[rows] @ means

    def scores(self) -> Floats:
        """Return [feature]: the size of the mean or of the correlation."""
        mean = np.asarray(self._sum) / self._rows
        if self._targets is None:
            return np.abs(mean)
        variance = np.maximum(np.asarray(self._squares) / self._rows - mean**2, 0)
        spread = np.sqrt(variance) * self._targets.std()
        flat = variance <= 1e-12 * np.maximum(mean**2, 1e-30)
        products = np.abs(np.asarray(self._products)) / self._rows
        return np.where(flat, 0, products / np.where(flat, 1, spread))


def iter_row_batches(
    token_vectors: TokenVectors, size: int, inputs: Tensor
) -> Iterator[tuple[Ints, Tensor, Tensor]]:
    """Yield some rows, their vectors [K, width], and the index of each vector's row among them."""
    ends = np.searchsorted(token_vectors.row, np.arange(len(token_vectors.prompts)), side="right")
    most = max(1, MAX_NUMBERS // max(size, token_vectors.vectors.shape[1]))
    first = 0
    while first < len(ends):
        begin = 0 if first == 0 else int(ends[first - 1])
        last = max(first + 1, int(np.searchsorted(ends, begin + most, side="right")))
        end = int(ends[last - 1])
        rows = np.arange(first, last)
        vectors = torch.from_numpy(token_vectors.vectors[begin:end]).to(inputs)
        yield (
            rows,
            vectors,
            torch.from_numpy(token_vectors.row[begin:end] - first).to(inputs.device),
        )
        first = last


def _row_average(activations: Tensor, row: Tensor, count: int) -> Floats:
    """Return [row, feature]: the mean over the tokens of each row."""
    sums = activations.new_zeros(count, activations.shape[1], dtype=torch.float64)
    sums.index_add_(0, row, activations.double())
    return (sums / torch.bincount(row, minlength=count)[:, None]).cpu().numpy()


def _largest(scores: Floats, active: Bools, does: FeatureActivations) -> Ints:
    """Return the features with the largest scores above 0; the lower number first in a tie."""
    order = np.argsort(-scores, kind="stable")[: does.count]
    return order[(scores[order] > 0) & active[order]]


def _encode_some(
    system: CoordinateSystem, token_vectors: TokenVectors, features: Ints, inputs: Tensor
) -> Floats:
    """Return [token, rank]: the activations of some features."""
    which = torch.from_numpy(features).to(inputs.device)[None]
    parts = [np.zeros((0, len(features)))]
    for _, vectors, _ in iter_row_batches(token_vectors, system.size, inputs):
        activations = system.encode(vectors, which.expand(len(vectors), -1))
        parts.append(activations.double().cpu().numpy())
    return np.concatenate(parts)


def _row_means(
    token_vectors: TokenVectors, activations: Floats, cell: PositionCell
) -> tuple[Ints, Floats, Floats]:
    """Return the rows that have a position, [row], and over their tokens the mean activation and
    the share that isn't 0, [row, rank]."""
    row, index = token_vectors.at(cell)
    there, starts, counts = np.unique(row, return_index=True, return_counts=True)
    if not len(there):
        empty = np.zeros((0, activations.shape[1]))
        return there, empty, empty
    activation = activations[index]
    sums = (
        np.add.reduceat(each, starts) for each in (activation, (activation != 0).astype(np.float64))
    )
    means, density = (each / counts[:, None] for each in sums)
    return there, means, density


def _top_rows(token_vectors: TokenVectors, activations: Floats) -> tuple[ActiveRow, ...]:
    """Return the rows with the highest activation at a token, if it isn't 0."""
    starts = np.searchsorted(token_vectors.row, np.arange(len(token_vectors.prompts)))
    highest = np.maximum.reduceat(activations, starts)
    top_rows: list[ActiveRow] = []
    for row in np.argsort(-highest, kind="stable")[:SHOWN_ROWS].tolist():
        if highest[row] <= 0:
            break
        own_tokens = np.flatnonzero(token_vectors.row == row)
        top_rows.append(
            ActiveRow(
                int(token_vectors.prompts[row]),
                tuple(token_vectors.tokens[own_tokens].tolist()),
                tuple(activations[own_tokens].tolist()),
            )
        )
    return tuple(top_rows)


NO_ROW = -1
"""Row of a place that no row takes."""


@dataclass(frozen=True)
class FeatureSummary:
    """What is known about a feature after all rows."""

    density: float
    """Share of tokens at which it isn't 0."""
    mean: float
    """Mean activation over all tokens."""
    rows: tuple[ActiveRow, ...]
    """Rows with the highest activation above 0 at a token, highest first; of equal ones those with
    the lower number."""


class ActiveRows:
    """The most active rows of features; memory grows with features, not with rows."""

    def __init__(self, features: Sequence[int], most: int, *, explains: bool) -> None:
        """Start without rows.

        Args:
            features: Numbers of the features.
            most: Number of rows to keep for each.
            explains: Whether the error of reconstructions is measured.
        """
        self.features = np.array(features, dtype=np.int64)
        self.most = most
        self.explains = explains
        self.rows = self.tokens = 0
        self._values: Floats = np.zeros((most, len(features)))
        self._rows: Ints = np.full((most, len(features)), NO_ROW, dtype=np.int64)
        self._entries: Ints = np.full((most, len(features)), NO_ROW, dtype=np.int64)
        """[place, feature] index in `_ends` of the tokens of the row at this place."""
        self._count = 0
        """Number of entries."""
        self._ends: Ints = np.zeros(1, dtype=np.int64)
        """[entry + 1] where an entry ends in the following arrays; it begins where the last
        ends."""
        self._own_tokens: Ints = np.zeros(0, dtype=np.int64)
        self._own_values: Floats = np.zeros(0)
        self._new: list[tuple[Ints, Ints, Floats]] = []
        """Lengths, tokens and values of later entries, which `_join` adds to these arrays."""
        self._active: Floats = np.zeros(len(features))
        self._sums: Floats = np.zeros(len(features))
        self._error = self._squares = 0.0
        self._total: Floats = np.zeros(1)
        """Sum of the vectors, [width]."""

    # --- reading ----------------------------------------------------------------------------------

    @torch.no_grad()
    def add(
        self, own: TokenVectors, numbers: Ints, system: CoordinateSystem, inputs: Tensor
    ) -> None:
        """Add rows.

        Args:
            own: Their vectors.
            numbers: [row] the number of each row in the data.
            system: The basis.
            inputs: An empty tensor of the precision and device of the vectors that are encoded.
        """
        whole = len(self.features) == system.size
        which = None if whole else torch.from_numpy(self.features).to(inputs.device)[None]
        for rows, vectors, row in iter_row_batches(own, system.size, inputs):
            chosen = None if which is None else which.expand(len(vectors), -1)
            activations = system.encode(vectors, chosen)
            if self.explains:
                error = vectors - system.reconstruct(vectors)
                self._error += float(error.double().square().sum())
            begin = int(np.searchsorted(own.row, rows[0]))
            tokens = own.tokens[begin : begin + len(vectors)]
            self._add_batch(activations, row.cpu().numpy(), numbers[rows], tokens)
        self.rows += len(numbers)
        self.tokens += len(own.vectors)
        self._total = self._total + own.complete_vectors.sum(0)
        self._squares += float((own.complete_vectors**2).sum())

    def _add_batch(self, activations: Tensor, row: Ints, numbers: Ints, tokens: Ints) -> None:
        """Add activations [token, feature] of some rows.

        Args:
            row: [token] index of the row, ascending.
            numbers: [row] its number in the data.
            tokens: [token] its position in the prompt.
        """
        starts = np.searchsorted(row, np.arange(len(numbers)))
        lengths = np.diff(np.append(starts, len(activations)))
        parts = activations.split(lengths.tolist())
        # Sums of whole batches in other types of numbers take ten times as long.
        self._active += _sum_rows(part.ne(0).to(part.dtype).sum(0) for part in parts)
        self._sums += _sum_rows(part.sum(0) for part in parts)
        highest = torch.stack([part.amax(0) for part in parts]).double().cpu().numpy()
        # Only these can enter; of equal values, the row with the lower number.
        columns = np.flatnonzero((highest >= self._values[-1]).any(0) & (highest > 0).any(0))
        if not len(columns):
            return
        values = np.concatenate([self._values[:, columns], highest[:, columns]])
        owners = np.repeat(numbers[:, None], len(columns), axis=1)
        owners = np.concatenate([self._rows[:, columns], owners])
        owners[values <= 0] = NO_ROW
        order = np.lexsort((owners, -values), axis=0)[: self.most]
        self._values[:, columns] = np.maximum(np.take_along_axis(values, order, 0), 0)
        self._rows[:, columns] = np.take_along_axis(owners, order, 0)
        none = np.full((len(numbers), len(columns)), NO_ROW)
        kept = np.concatenate([self._entries[:, columns], none])
        entries = np.take_along_axis(kept, order, 0)
        place, column = np.nonzero((order >= self.most) & (self._rows[:, columns] != NO_ROW))
        entered = order[place, column] - self.most
        entries[place, column] = self._count + np.arange(len(place))
        self._entries[:, columns] = entries
        pairs = entered, columns[column]
        self._keep_tokens(activations, tokens, pairs, starts[entered], lengths[entered])

    def _keep_tokens(
        self,
        activations: Tensor,
        tokens: Ints,
        pairs: tuple[Ints, Ints],
        starts: Ints,
        lengths: Ints,
    ) -> None:
        """Keep the activations that aren't 0 of a feature in a row, for each pair of both."""
        rows, columns = pairs
        pair = np.repeat(np.arange(len(rows)), lengths)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        token = starts[pair] + within
        index = arrays_to_device((token, columns[pair]), activations.device)
        values = activations[index].double().cpu().numpy()
        there = values != 0
        counts = np.bincount(pair[there], minlength=len(rows))
        self._new.append((counts, tokens[token[there]], values[there]))
        self._count += len(rows)
        if self._count > 2 * self._entries.size:
            self._drop_replaced()

    def _join(self) -> None:
        """Add new entries to the arrays: seldom, because that copies all of them."""
        if self._new:
            counts, tokens, values = (np.concatenate(each) for each in zip(*self._new, strict=True))
            self._ends = np.concatenate([self._ends, self._ends[-1] + np.cumsum(counts)])
            self._own_tokens = np.concatenate([self._own_tokens, tokens])
            self._own_values = np.concatenate([self._own_values, values])
            self._new = []

    def _drop_replaced(self) -> None:
        """Drop the tokens of rows that others have replaced."""
        self._join()
        used = np.unique(self._entries[self._entries != NO_ROW])
        begins, ends = self._ends[:-1][used], self._ends[1:][used]
        lengths = ends - begins
        offsets = np.repeat(np.cumsum(lengths) - lengths, lengths)
        index = np.repeat(begins, lengths) + np.arange(int(lengths.sum())) - offsets
        self._own_tokens, self._own_values = self._own_tokens[index], self._own_values[index]
        self._ends, self._count = np.concatenate([[0], np.cumsum(lengths)]), len(used)
        there = self._entries != NO_ROW
        self._entries[there] = np.searchsorted(used, self._entries[there])

    # --- results ----------------------------------------------------------------------------------

    @property
    def active(self) -> Bools:
        """[feature] whether it isn't 0 at some token."""
        return self._active > 0

    @property
    def explained(self) -> float | None:
        """1 − Σ ‖x − x̂‖² / Σ ‖x − x̄‖² over the tokens; None if it isn't measured."""
        spread = self._squares - float((self._total**2).sum()) / max(self.tokens, 1)
        return 1 - self._error / spread if self.explains and spread > 0 else None

    @property
    def kept_rows(self) -> Ints:
        """Numbers of all rows that are kept, ascending."""
        return np.unique(self._rows[self._rows != NO_ROW])

    def summaries(self) -> Iterator[tuple[int, FeatureSummary]]:
        """Yield the number of each feature and what is known about it."""
        self._join()
        for column, feature in enumerate(self.features.tolist()):
            rows: list[ActiveRow] = []
            for place in range(self.most):
                entry = int(self._entries[place, column])
                if entry == NO_ROW:
                    break
                own = slice(int(self._ends[entry]), int(self._ends[entry + 1]))
                tokens = tuple(self._own_tokens[own].tolist())
                values = tuple(self._own_values[own].tolist())
                rows.append(ActiveRow(int(self._rows[place, column]), tokens, values))
            count = max(self.tokens, 1)
            density, mean = self._active[column] / count, self._sums[column] / count
            yield feature, FeatureSummary(float(density), float(mean), tuple(rows))

    # --- state ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return arrays from which `restore` continues."""
        self._join()
        return {name: np.asarray(getattr(self, name)) for name in _STATE}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the arrays of `state`."""
        for name in _STATE:
            value = state[name]
            kind = type(getattr(self, name))
            setattr(self, name, kind(value) if kind in (int, float) else value)


def _sum_rows(rows: Iterable[Tensor]) -> Floats:
    """Return [feature]: the sum of sums over the tokens of each row."""
    return torch.stack([*rows]).double().sum(0).cpu().numpy()


_STATE = (
    "rows", "tokens", "_count", "_values", "_rows", "_entries", "_ends", "_own_tokens",
    "_own_values", "_active", "_sums", "_error", "_squares", "_total",
)  # fmt: skip
