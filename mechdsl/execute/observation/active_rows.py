"""The rows in which features are most active, of rows that arrive in parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.execute.measurement.values import ActiveRow
from mechdsl.execute.observation.features import iter_row_batches
from mechdsl.forward.hooks.batch import arrays_to_device
from mechdsl.forward.hooks.coordinates import CoordinateSystem
from mechdsl.resolve.observations import TokenVectors

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
            found = system.encode(vectors, chosen)
            if self.explains:
                error = vectors - system.reconstruct(vectors)
                self._error += float(error.double().square().sum())
            begin = int(np.searchsorted(own.row, rows[0]))
            tokens = own.tokens[begin : begin + len(vectors)]
            self._add_batch(found, row.cpu().numpy(), numbers[rows], tokens)
        self.rows += len(numbers)
        self.tokens += len(own.vectors)
        self._total = self._total + own.complete_vectors.sum(0)
        self._squares += float((own.complete_vectors**2).sum())

    def _add_batch(self, found: Tensor, row: Ints, numbers: Ints, tokens: Ints) -> None:
        """Add activations [token, feature] of some rows.

        Args:
            row: [token] index of the row, ascending.
            numbers: [row] its number in the data.
            tokens: [token] its position in the prompt.
        """
        starts = np.searchsorted(row, np.arange(len(numbers)))
        lengths = np.diff(np.append(starts, len(found)))
        parts = found.split(lengths.tolist())
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
        self._keep_tokens(found, tokens, pairs, starts[entered], lengths[entered])

    def _keep_tokens(
        self, found: Tensor, tokens: Ints, pairs: tuple[Ints, Ints], starts: Ints, lengths: Ints
    ) -> None:
        """Keep the activations that aren't 0 of a feature in a row, for each pair of both."""
        rows, columns = pairs
        pair = np.repeat(np.arange(len(rows)), lengths)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        token = starts[pair] + within
        index = arrays_to_device((token, columns[pair]), found.device)
        values = found[index].double().cpu().numpy()
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
