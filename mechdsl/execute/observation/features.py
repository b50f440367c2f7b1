"""Activations of features in all rows: which are the strongest, and where they are active."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.execute.measurement.values import ActiveRow, FeatureFindings
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
        there, found, density = _row_means(self.own, self.activations, cell)
        if self.other is not None:
            assert source is not None
            found = found - _row_means(*self.other, source)[1]
        return there, found, density


@torch.no_grad()
def observe_features(
    does: FeatureActivations,
    system: CoordinateSystem,
    own: TokenVectors,
    other: TokenVectors | None,
    inputs: Tensor,
) -> ObservedFeatures:
    """Find the features with the largest values, and their activation at each token.

    Args:
        system: The basis.
        own: Vectors at all tokens of all positions.
        other: Vectors of the run to compare with.
        inputs: An empty tensor of the precision and device of the vectors that are encoded.
    """
    transcodes = does.member is not None and bool(does.member.reads)
    sums, active, error = _Sums(does, own), np.zeros(system.size, dtype=np.bool_), 0.0
    for rows, vectors, row in iter_row_batches(own, system.size, inputs):
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
    activations = _encode_some(system, own, features, inputs)
    spread = float(((own.complete_vectors - own.complete_vectors.mean(0)) ** 2).sum())
    findings = FeatureFindings(
        features=tuple(features.tolist()),
        active=int(active.sum()),
        size=system.size,
        explained=None if transcodes or spread == 0 else 1 - error / spread,
        tokens=len(own.vectors),
        top_rows=tuple(_top_rows(own, activations[:, rank]) for rank in range(len(features))),
    )
    theirs = None if other is None else (other, _encode_some(system, other, features, inputs))
    return ObservedFeatures(own, activations, theirs, findings)


@torch.no_grad()
def list_raised_tokens(
    maps: WeightMaps,
    system: CoordinateSystem,
    own: TokenVectors,
    features: tuple[int, ...],
    inputs: Tensor,
) -> list[list[int]]:
    """List, for each feature, the tokens whose logits its direction raises most.

    The direction is the change of the mean vector if the feature grows by 1. None are listed for
    models whose unembedding isn't linear.
    """
    vectors = torch.from_numpy(own.vectors.mean(0)).to(inputs).expand(len(features), -1)
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
    own: TokenVectors, size: int, inputs: Tensor
) -> Iterator[tuple[Ints, Tensor, Tensor]]:
    """Yield some rows, their vectors [K, width], and the index of each vector's row among them."""
    ends = np.searchsorted(own.row, np.arange(len(own.prompts)), side="right")
    most = max(1, MAX_NUMBERS // max(size, own.vectors.shape[1]))
    first = 0
    while first < len(ends):
        begin = 0 if first == 0 else int(ends[first - 1])
        last = max(first + 1, int(np.searchsorted(ends, begin + most, side="right")))
        end = int(ends[last - 1])
        rows = np.arange(first, last)
        vectors = torch.from_numpy(own.vectors[begin:end]).to(inputs)
        yield rows, vectors, torch.from_numpy(own.row[begin:end] - first).to(inputs.device)
        first = last


def _row_average(found: Tensor, row: Tensor, count: int) -> Floats:
    """Return [row, feature]: the mean over the tokens of each row."""
    sums = found.new_zeros(count, found.shape[1], dtype=torch.float64)
    sums.index_add_(0, row, found.double())
    return (sums / torch.bincount(row, minlength=count)[:, None]).cpu().numpy()


def _largest(scores: Floats, active: Bools, does: FeatureActivations) -> Ints:
    """Return the features with the largest scores above 0; the lower number first in a tie."""
    order = np.argsort(-scores, kind="stable")[: does.count]
    return order[(scores[order] > 0) & active[order]]


def _encode_some(
    system: CoordinateSystem, own: TokenVectors, features: Ints, inputs: Tensor
) -> Floats:
    """Return [token, rank]: the activations of some features."""
    which = torch.from_numpy(features).to(inputs.device)[None]
    parts = [np.zeros((0, len(features)))]
    for _, vectors, _ in iter_row_batches(own, system.size, inputs):
        found = system.encode(vectors, which.expand(len(vectors), -1))
        parts.append(found.double().cpu().numpy())
    return np.concatenate(parts)


def _row_means(
    own: TokenVectors, activations: Floats, cell: PositionCell
) -> tuple[Ints, Floats, Floats]:
    """Return the rows that have a position, [row], and over their tokens the mean activation and
    the share that isn't 0, [row, rank]."""
    row, index = own.at(cell)
    there, starts, counts = np.unique(row, return_index=True, return_counts=True)
    if not len(there):
        empty = np.zeros((0, activations.shape[1]))
        return there, empty, empty
    found = activations[index]
    sums = (np.add.reduceat(each, starts) for each in (found, (found != 0).astype(np.float64)))
    means, density = (each / counts[:, None] for each in sums)
    return there, means, density


def _top_rows(own: TokenVectors, activations: Floats) -> tuple[ActiveRow, ...]:
    """Return the rows with the highest activation at a token, if it isn't 0."""
    starts = np.searchsorted(own.row, np.arange(len(own.prompts)))
    highest = np.maximum.reduceat(activations, starts)
    found: list[ActiveRow] = []
    for row in np.argsort(-highest, kind="stable")[:SHOWN_ROWS].tolist():
        if highest[row] <= 0:
            break
        own_tokens = np.flatnonzero(own.row == row)
        found.append(
            ActiveRow(
                int(own.prompts[row]),
                tuple(own.tokens[own_tokens].tolist()),
                tuple(activations[own_tokens].tolist()),
            )
        )
    return tuple(found)
