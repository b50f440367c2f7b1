"""The vectors of a training, chunk by chunk: those of the named tokens of its rows.

The rows are those of a table, or the records of a file that is read in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.base.hashing import stable_hash
from mechdsl.execute.vectors import build_reader, read_vectors, split_prompts
from mechdsl.fits.training import TrainingState, VectorSource
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.shape import PaddingSide
from mechdsl.prompts.rows import PromptTable
from mechdsl.resolve.types import FitSample, SitePoint, count_numbers
from mechdsl.resolve.types import Training as DeclaredTraining

CHUNK_BYTES = 1 << 28
"""Bytes of the vectors that are in memory at once."""

HELD_OUT_VECTORS = 1 << 16
"""Largest number of held-out vectors, of all layers of a lens together."""

PART_ROWS = 256
"""Number of records of a file that are read together."""

NEIGHBOURS = 16
"""Number of successive records of a file that stay together when its records are shuffled, so that
a file whose rows are compressed in groups is read in few pieces."""


class TrainingVectors(VectorSource, Protocol):
    """The vectors of a training, and those that are held out."""

    @property
    def held_out_count(self) -> int:
        """Number of rows that the training doesn't use."""
        ...

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return vectors of these rows, as `chunk` does."""
        ...

    def amounts(self, state: TrainingState) -> tuple[int, int]:
        """Return the numbers of rows and of vectors that a training has learned from."""
        ...


class _LastChunk:
    """The chunk that was read last, which stays in memory."""

    def __init__(self, read: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self._read = read
        self._kept: tuple[int, tuple[Tensor, Tensor]] | None = None

    def get(self, number: int) -> tuple[Tensor, Tensor]:
        """Return a chunk."""
        if self._kept is None or self._kept[0] != number:
            self._kept = None  # two chunks may not fit into memory
            self._kept = number, self._read(number)
        return self._kept[1]


@dataclass(frozen=True, eq=False)
class RowVectors:
    """The vectors of a training on the rows of a table."""

    declared: DeclaredTraining
    model: LoadedModel
    """The model that runs the rows."""
    seed: int
    """Seed of noise."""
    side: PaddingSide | None
    chunk_bytes: int = CHUNK_BYTES

    @cached_property
    def counts(self) -> Ints:
        """[row] vectors of each row."""
        sample = self.declared.sample
        tokens = [sum(map(len, runs)) for runs in sample.cell.hits]
        hits = np.array(tokens, dtype=np.int64)
        return hits * sample.run.draws

    @cached_property
    def rows(self) -> Ints:
        """[row] the numbers of all rows with the position, in a random order that depends on the
        seed and on their contents."""
        return order_rows(self.declared, self.declared.sample.table, np.flatnonzero(self.counts))

    @property
    def held_out_count(self) -> int:
        """Number of rows at the start of `rows` that the training doesn't use."""
        return count_held_out(self.declared, len(self.rows))

    @cached_property
    def _groups(self) -> list[Ints]:
        """The rows of each chunk."""
        rows = self.rows[self.held_out_count :]
        most = most_vectors(self.declared, self.model, self.chunk_bytes)
        ends = np.cumsum(self.counts[rows])
        number = (ends - 1) // most  # by the last vector of each row
        return [rows[number == each] for each in np.unique(number)]

    @property
    def chunks(self) -> int:
        """Number of chunks that together have every vector once."""
        return len(self._groups)

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the vectors of a chunk that are encoded, and those that are reconstructed.

        [vector, width] float32 each, on the model's device; one tensor if both are the same. The
        last chunk that was read stays in memory.
        """
        return self._last.get(number)

    @cached_property
    def _last(self) -> _LastChunk:
        return _LastChunk(lambda number: self._read(self._groups[number]))

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return vectors of the rows that the training doesn't use, as `chunk` does."""
        rows = self.rows[: self.held_out_count]
        most = most_held_out(self.declared, self.model, self.chunk_bytes)
        few = rows[: int(np.searchsorted(np.cumsum(self.counts[rows]), most)) + 1]
        return self._read(few)

    def amounts(self, state: TrainingState) -> tuple[int, int]:
        """Return the numbers of rows and of vectors that a training learns from."""
        rows = self.rows[self.held_out_count :]
        return len(rows), int(self.counts[rows].sum())

    def _read(self, rows: Ints) -> tuple[Tensor, Tensor]:
        sample = self.declared.sample
        found = read_rows(self.declared, self.model, sample, rows, seed=self.seed, side=self.side)
        paired = self.declared.paired
        if paired is None or paired.point is not None:
            return found
        ordered = np.sort(rows)
        values = np.array(paired.values)[ordered].repeat(self.counts[ordered], axis=0)
        return found[0], torch.from_numpy(values).to(found[0])


class NoVectors(Exception):
    """No row of a file has the position."""


@dataclass(frozen=True, eq=False)
class StreamedVectors:
    """The vectors of a training on the records of a file, which are never all in memory.

    The records are in a random order of groups of neighbours. The first groups are held out; the
    others are divided into chunks of as many groups as have about `chunk_bytes` of vectors, by the
    tokens of the first records.
    """

    declared: DeclaredTraining
    model: LoadedModel
    part: Callable[[Sequence[int]], FitSample | None]
    """Returns the rows of records, in their order; None if none is left."""
    side: PaddingSide | None
    chunk_bytes: int = CHUNK_BYTES

    @cached_property
    def _groups(self) -> list[Ints]:
        """The numbers of the records of each group of neighbours, in a random order."""
        stream = self.declared.stream
        assert stream is not None
        size = max(1, min(NEIGHBOURS, stream.count // 32))
        seed = stable_hash(self.declared.seed, "training records", stream.digest) % 2**63
        starts = np.arange(0, stream.count, size)
        np.random.default_rng(seed).shuffle(starts)
        return [np.arange(first, min(first + size, stream.count)) for first in starts.tolist()]

    @cached_property
    def _held_out_groups(self) -> int:
        return count_held_out(self.declared, len(self._groups))

    @property
    def held_out_count(self) -> int:
        """Number of records that the training doesn't use."""
        return sum(map(len, self._groups[: self._held_out_groups]))

    @cached_property
    def _chunks(self) -> list[Ints]:
        """The records of each chunk, in the order of the file."""
        groups = self._groups[self._held_out_groups :]
        first = self.declared.sample.cell.hits
        tokens = max(1.0, sum(len(run) for row in first for run in row) / max(1, len(first)))
        most = most_vectors(self.declared, self.model, self.chunk_bytes)
        many = max(1, int(most / (tokens * len(groups[0]))))
        parts = [groups[i : i + many] for i in range(0, len(groups), many)]
        return [np.sort(np.concatenate(part)) for part in parts]

    @property
    def chunks(self) -> int:
        """Number of chunks that together have every record once."""
        return len(self._chunks)

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the vectors of a chunk, as `RowVectors.chunk` does.

        For a chunk without vectors, those of the next one that has some. Raises NoVectors.
        """
        return self._last.get(number)

    @cached_property
    def _last(self) -> _LastChunk:
        return _LastChunk(self._read_chunk)

    def _read_chunk(self, number: int) -> tuple[Tensor, Tensor]:
        for later in range(self.chunks):
            found = self._read(self._chunks[(number + later) % self.chunks])
            if len(found[0]):
                return found
        raise NoVectors(self.declared.sample.cell.label)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return vectors of records that the training doesn't use, as `chunk` does."""
        groups = self._groups[: self._held_out_groups]
        records = np.concatenate(groups) if groups else np.empty(0, dtype=np.int64)
        return self._read(records, most_held_out(self.declared, self.model, self.chunk_bytes))

    def amounts(self, state: TrainingState) -> tuple[int, int]:
        """Return the number of different records of the chunks that were begun, and the number of
        vectors in all steps."""
        begun = self._chunks[: state.passes + 1] if state.step else []
        return sum(map(len, begun)), state.step * int(self.declared.options["batch"])

    def _read(self, records: Ints, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Read records, until there are `most` vectors."""
        found: list[tuple[Tensor, Tensor]] = []
        for begin in range(0, len(records), PART_ROWS):
            sample = self.part(np.sort(records[begin : begin + PART_ROWS]).tolist())
            if sample is not None:
                rows = np.flatnonzero([bool(sum(map(len, row))) for row in sample.cell.hits])
                found.append(
                    read_rows(self.declared, self.model, sample, rows, seed=0, side=self.side)
                )
            if most is not None and sum(len(own) for own, _ in found) >= most:
                break
        if not found:
            return read_rows(
                self.declared, self.model, self.declared.sample, np.empty(0, dtype=np.int64),
                seed=0, side=self.side,
            )  # fmt: skip
        own = torch.cat([each for each, _ in found])
        same = found[0][0] is found[0][1]
        return own, own if same else torch.cat([each for _, each in found])


def most_vectors(declared: DeclaredTraining, model: LoadedModel, size: int) -> int:
    """Return how many vectors of a training, with their targets, take so many bytes."""
    numbers = sum(count_numbers(each, model.shape) for each in declared.points)
    return max(1, size // (4 * numbers))


def most_held_out(declared: DeclaredTraining, model: LoadedModel, size: int) -> int:
    """Return the largest number of held-out vectors; those of a lens take at most so many bytes."""
    if not declared.layers:
        return HELD_OUT_VECTORS
    return min(HELD_OUT_VECTORS // len(declared.layers), most_vectors(declared, model, size))


def read_rows(
    declared: DeclaredTraining,
    model: LoadedModel,
    sample: FitSample,
    rows: Ints,
    *,
    seed: int,
    side: PaddingSide | None,
) -> tuple[Tensor, Tensor]:
    """Return the vectors of some rows that are encoded, and those that are reconstructed.

    Args:
        sample: The rows and their tokens.
        seed: Seed of noise.

    Returns:
        [vector, width] float32 each, in ascending order of the rows, on the model's device; one
        tensor if both are the same. The encoded vectors of several layers are one after another,
        [vector, layers * width].
    """
    points = list(dict.fromkeys(declared.points))
    parts: list[list[Tensor]] = [[] for _ in points]
    for found in _read_batches(model, sample, np.sort(rows), points, seed, side):
        for own, vectors in zip(parts, found, strict=True):
            own.append(vectors)
    joined = [
        torch.cat(own)
        if own
        else torch.zeros(0, count_numbers(point, model.shape), device=model.device)
        for point, own in zip(points, parts, strict=True)
    ]
    encoded = joined[:-1] if len(joined) > 2 else joined[:1]
    return torch.cat(encoded, dim=1) if len(encoded) > 1 else encoded[0], joined[-1]


def _read_batches(
    model: LoadedModel,
    sample: FitSample,
    rows: Ints,
    points: Sequence[SitePoint],
    seed: int,
    side: PaddingSide | None,
) -> Iterator[list[Tensor]]:
    """Yield the vectors of each site, batch by batch."""
    reader = build_reader(model, sample.table, sample.run, points, seed=seed, side=side)
    batches = split_prompts(model, sample.run, points, rows) if len(rows) else []
    with torch.no_grad():
        own: list[Tensor] = []
        for found in read_vectors(reader, points, [sample.cell], batches):
            own.append(found.vectors.float().clone())
            if len(own) == len(points):
                yield own
                own = []


def order_rows(declared: DeclaredTraining, table: PromptTable, rows: Ints) -> Ints:
    """Return rows in a random order that depends on the seed and on their contents; the first ones
    are held out."""
    keys, seed = table.row_keys, declared.seed
    order = sorted(rows.tolist(), key=lambda row: stable_hash(seed, "training row", keys[row]))
    return np.array(order, dtype=np.int64)


def count_held_out(declared: DeclaredTraining, rows: int) -> int:
    """Return how many of the rows are held out."""
    share = float(declared.options["validation"]) / 100
    return min(max(1, round(share * rows)), rows - 1) if share else 0
