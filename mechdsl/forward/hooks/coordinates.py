"""Changes of coordinates in a basis, within a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mechdsl.dictionaries.features import Dictionary, LaterDecoder, combine_some, project_some
from mechdsl.dictionaries.folder import MAX_GATHERED
from mechdsl.vocab.sites import CoordinateOperation

MAX_NUMBERS = 1 << 24
"""Numbers of coordinates, or of gathered directions, that are computed together."""


class CoordinateSystem(Protocol):
    """Coordinates of vectors, and the vectors of changed coordinates. All tensors are in float32 or
    float64, on the device of the vectors."""

    @property
    def size(self) -> int:
        """Number of coordinates."""
        ...

    @property
    def is_affine(self) -> bool:
        """Whether the coordinates of a mean are the mean of the coordinates."""
        ...

    def encode(self, vectors: Tensor, which: Tensor | None) -> Tensor:
        """Compute coordinates.

        Args:
            vectors: [K, width].
            which: [K, m] long, the coordinates of each vector; None for all.

        Returns:
            [K, m], or [K, size].
        """
        ...

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Return [K, width]: what the basis represents of vectors [K, width]."""
        ...

    def shift(self, vectors: Tensor, change: Tensor, which: Tensor | None) -> Tensor:
        """Return [K, width]: the vectors after their coordinates have changed.

        Args:
            vectors: [K, width] vectors of the written site.
            change: [K, m], or [K, size]: new coordinates minus the current ones.
            which: As in `encode`.
        """
        ...


@dataclass(frozen=True, eq=False)
class LinearBasis:
    """Independent directions. The coordinates of x are those of the projection of x − center onto
    their span: (x − center) D⁺, with the pseudo-inverse D⁺ of the directions D."""

    directions: Tensor
    """[size, width] float64."""
    center: Tensor
    """[width] float64."""
    inverse: Tensor
    """[width, size] float64."""
    _moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]]
    )

    @staticmethod
    def of(directions: Tensor, center: Tensor | None = None) -> LinearBasis:
        """Create a basis. Raises ValueError if the directions depend on each other.

        Args:
            directions: [size, width].
            center: [width], 0 by default.
        """
        directions = directions.double()
        rank = int(torch.linalg.matrix_rank(directions))
        if rank < len(directions):
            raise ValueError(f"its {len(directions)} directions span only {rank} dimensions")
        center = directions.new_zeros(directions.shape[1]) if center is None else center.double()
        return LinearBasis(directions, center, torch.linalg.pinv(directions))

    @property
    def size(self) -> int:
        return len(self.directions)

    @property
    def is_affine(self) -> bool:
        return True

    def _like(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = vectors.device, vectors.dtype
        if key not in self._moved:
            parts = self.directions, self.center, self.inverse
            first, second, third = (part.to(vectors) for part in parts)
            self._moved[key] = first, second, third
        return self._moved[key]

    def encode(self, vectors: Tensor, which: Tensor | None) -> Tensor:
        _, center, inverse = self._like(vectors)
        return project_some(vectors - center, inverse, which)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        directions, center, _ = self._like(vectors)
        return center + self.encode(vectors, None) @ directions

    def shift(self, vectors: Tensor, change: Tensor, which: Tensor | None) -> Tensor:
        directions, _, _ = self._like(vectors)
        return vectors + combine_some(change, directions, which)


@dataclass(frozen=True)
class StandardBasis:
    """The numbers of a vector as its coordinates."""

    size: int

    @property
    def is_affine(self) -> bool:
        return True

    def encode(self, vectors: Tensor, which: Tensor | None) -> Tensor:
        return vectors if which is None else vectors.gather(1, which)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        return vectors

    def shift(self, vectors: Tensor, change: Tensor, which: Tensor | None) -> Tensor:
        return vectors + change if which is None else vectors.scatter_add(1, which, change)


def count_encoded(system: CoordinateSystem, vectors: Tensor, which: Tensor | None) -> int:
    """Return how many vectors [K, width] can be encoded at once, for all coordinates or [K, m]."""
    size = system.size
    if which is not None and which.shape[1] <= MAX_GATHERED:
        size = which.shape[1] * vectors.shape[1]
    return max(1, MAX_NUMBERS // size)


OTHERS = -1
"""Number of the node that stands for everything in an MLP that isn't another node."""


@dataclass(frozen=True, eq=False)
class FeatureSplit:
    """The output of an MLP as the sum of some features and of the rest, the nodes of a circuit."""

    system: Dictionary
    numbers: tuple[int, ...]
    """The features."""
    reads: str
    """Site of the block that a transcoder encodes; empty for the output of the MLP."""

    @property
    def nodes(self) -> tuple[int, ...]:
        """The features, then `OTHERS`."""
        return (*self.numbers, OTHERS)

    def split(self, outputs: Tensor, inputs: Tensor, nodes: Sequence[int]) -> Tensor:
        """Return [K, node, width]: what nodes add to the residual stream.

        Args:
            outputs: [K, width] of the MLP, in float32 or float64.
            inputs: [K, width of `reads`] vectors that are encoded; those of the outputs without it.
            nodes: Features, or `OTHERS`.
        """
        encoded = self.numbers if OTHERS in nodes else tuple(nodes)
        which = torch.tensor(encoded, dtype=torch.long, device=outputs.device)
        count = count_encoded(self.system, inputs, which[None])
        if len(outputs) > count:
            parts = zip(outputs.split(count), inputs.split(count), strict=True)
            return torch.cat([self.split(*part, nodes) for part in parts])
        values = self.system.encode(inputs, which.expand(len(inputs), -1)).to(outputs)
        contributions = self.system.contributions(values, which, outputs)
        if OTHERS not in nodes:
            return contributions
        rest = (outputs - contributions.sum(1))[:, None]
        order = [len(encoded) if node == OTHERS else encoded.index(node) for node in nodes]
        return torch.cat([contributions, rest], dim=1)[:, order]


def _change_coordinates(operation: CoordinateOperation, current: Tensor, values: Tensor) -> Tensor:
    """Return the coordinates after an operation that changes named ones."""
    match operation:
        case "set":
            return values.expand_as(current)
        case "add":
            return current + values
        case "scale":
            return current * values
        case "exchange":
            return torch.zeros_like(current)
        case "reconstruct" | "project out":
            return current


@dataclass(frozen=True, eq=False)
class EarlierChange:
    """Change of a transcoder's features by an earlier write, at the vectors of a later one.

    Its input doesn't contain the change, so a later write can't encode it.
    """

    operation: CoordinateOperation
    there: Tensor
    """[K] whether the earlier write changes this vector."""
    values: Tensor
    """[K, m] or [K, 1]; [K, size] for all features."""
    which: Tensor | None
    """[K, m] the features; None for all."""

    def to(self, device: torch.device) -> EarlierChange:
        """Move the change to a device."""
        which = None if self.which is None else self.which.to(device)
        there, values = self.there.to(device), self.values.to(device)
        return EarlierChange(self.operation, there, values, which)

    def part(self, vectors: slice) -> EarlierChange:
        """Select some of the vectors."""
        which = None if self.which is None else self.which[vectors]
        there, values = self.there[vectors], self.values[vectors]
        return EarlierChange(self.operation, there, values, which)

    def apply(self, current: Tensor, which: Tensor | None) -> Tensor:
        """Return the features after this change.

        Args:
            current: [K, m'] features before it; [K, size] for all.
            which: [K, m'] their numbers; None for all.
        """
        there, values = self.there[:, None], self.values.to(current)
        if self.which is None:
            if which is not None and values.shape[1] > 1:
                values = values.gather(1, which)
            changed = _change_coordinates(self.operation, current, values)
            return torch.where(there, changed, current)
        if which is None:
            tensor = current.gather(1, self.which)
            changed = _change_coordinates(self.operation, tensor, values)
            return current.scatter(1, self.which, torch.where(there, changed, tensor))
        for number, column in enumerate(self.which.unbind(1)):
            value = values[:, [number if values.shape[1] > 1 else 0]]
            changed = _change_coordinates(self.operation, current, value)
            current = torch.where(there & (which == column[:, None]), changed, current)
        return current


@dataclass(frozen=True, eq=False)
class CoordinateWrite:
    """Mode of a write whose values are coordinates: `set` replaces them, `add` adds to them, and
    `scale` multiplies them; `reconstruct` drops what the basis doesn't represent. `exchange` takes
    their contributions out, and puts in those of another basis."""

    system: CoordinateSystem
    operation: CoordinateOperation
    joins_units: bool = False
    """Whether the vectors are those of all heads or neurons of a site, one after the other."""
    drops_error: bool = False
    """Whether what the basis doesn't represent is dropped."""
    reads: str = ""
    """Site of the same block whose vectors have these coordinates: a transcoder encodes the input
    of the MLP. Empty for the written site."""
    reads_layer: int | None = None
    """Layer of `reads`; None for the written one. Features of a cross-layer transcoder write to the
    layers after theirs, too."""
    inserted: CoordinateSystem | None = None
    """exchange: the other basis, which encodes the same vectors."""
    count_inserted: int = 0
    """exchange: the last coordinates of a write that are of the other basis."""

    def find_layer(self, written: int | None) -> int | None:
        """Return the layer whose vectors have these coordinates; written: that of the write."""
        return written if self.reads_layer is None else self.reads_layer

    @property
    def replaces_vectors(self) -> bool:
        """Whether nothing of the written vectors remains."""
        return self.operation == "reconstruct" or self.drops_error

    def changes_same(self, other: CoordinateWrite) -> bool:
        """Return whether both change features of one transcoder."""
        if not self.reads or (self.reads, self.reads_layer) != (other.reads, other.reads_layer):
            return False
        return _source_of(self.system) == _source_of(other.system)

    def apply(
        self,
        now: Tensor,
        values: Tensor,
        which: Tensor | None = None,
        inputs: Tensor | None = None,
        earlier: Sequence[EarlierChange] = (),
    ) -> Tensor:
        """Return [K, width]: the new vectors, in the precision of `now`.

        Args:
            now: [K, width] current vectors.
            values: [K, m] or [K, 1] numbers; [K, size] for all coordinates.
            which: [K, m] coordinates; None for all.
            inputs: [K, width of `reads`] current vectors of this site; None for `now`.
            earlier: Changes of the features by earlier writes, in their order.
        """
        inputs = now if inputs is None else inputs
        count = count_encoded(self.system, now, which)
        if self.operation == "project out":
            named = self.system.size if which is None else which.shape[1]
            count = max(1, MAX_NUMBERS // (now.shape[1] * named))
        if len(now) <= count:
            return self._apply(now, values, which, inputs, earlier)
        parts = (slice(begin, begin + count) for begin in range(0, len(now), count))
        found = [
            self._apply(
                now[part],
                values[part],
                None if which is None else which[part],
                inputs[part],
                [change.part(part) for change in earlier],
            )
            for part in parts
        ]
        return torch.cat(found)

    def _project_out(self, vectors: Tensor, which: Tensor | None) -> Tensor:
        """Return [K, width]: vectors without their projections onto the span of the coordinates'
        directions.

        The direction of a coordinate is the change of the vector when it grows by 1.
        """
        if which is None:
            which = torch.arange(self.system.size, device=vectors.device)
            which = which.expand(len(vectors), -1)
        size = vectors.norm(dim=-1, keepdim=True)
        each: list[Tensor] = []
        for one in which.unbind(1):
            step = torch.ones_like(size)
            length = (self.system.shift(vectors, step, one[:, None]) - vectors).norm(
                dim=-1, keepdim=True
            )
            # As long as the vectors, so that rounding of their sum doesn't matter.
            step = torch.where((length > 0) & (size > 0), size / length, step)
            each.append(self.system.shift(vectors, step, one[:, None]) - vectors)
        directions = normalize(torch.stack(each, dim=1).double(), dim=-1)
        weights = directions @ vectors.double()[:, :, None]
        if len(each) > 1:
            gram = directions @ directions.mT
            weights = torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ weights
        return vectors - (directions.mT @ weights)[:, :, 0].to(vectors)

    def _encode(
        self, inputs: Tensor, which: Tensor | None, earlier: Sequence[EarlierChange]
    ) -> Tensor:
        """Return the current coordinates, after earlier writes."""
        activations = self.system.encode(inputs, which)
        return reduce(lambda now, change: change.apply(now, which), earlier, activations)

    def _reconstruct(self, inputs: Tensor, earlier: Sequence[EarlierChange]) -> Tensor:
        """Return [K, width]: the reconstruction from the current coordinates."""
        reconstruction = self.system.reconstruct(inputs)
        if not earlier:
            return reconstruction
        change = self._encode(inputs, None, earlier) - self.system.encode(inputs, None)
        return self.system.shift(reconstruction, change, None)

    def _apply(
        self,
        now: Tensor,
        values: Tensor,
        which: Tensor | None,
        inputs: Tensor,
        earlier: Sequence[EarlierChange],
    ) -> Tensor:
        wide, inputs = (
            each.to(torch.promote_types(now.dtype, torch.float32)) for each in (now, inputs)
        )
        if self.operation == "reconstruct":
            return self._reconstruct(inputs, earlier).to(now)
        if self.operation == "project out":
            return self._project_out(wide, which).to(now)
        inserted = None
        if self.inserted is not None:
            assert which is not None
            which, inserted = which.tensor_split([-self.count_inserted], dim=1)
        current, values = self._encode(inputs, which, earlier), values.to(wide)
        match self.operation:
            case "exchange":
                change = -current
            case "set":
                change = values - current
            case "add":
                change = values.expand_as(current)
            case "scale":
                change = (values - 1) * current
        found = self.system.shift(wide, change, which)
        if self.inserted is not None:
            more = self.inserted.encode(inputs, inserted)
            found = found + self.inserted.shift(wide, more, inserted) - wide
        if self.drops_error:
            found = found - (wide - self._reconstruct(inputs, earlier))
        return found.to(now)


def _source_of(system: CoordinateSystem) -> object:
    """Return what equal features of several layers or runs have in common."""
    if isinstance(system, LaterDecoder):
        return system.dictionary.file
    return system.file if isinstance(system, Dictionary) else system
