"""What directions are made of, down to the rows that are read; still without numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mechdsl.base.record import Record, record

if TYPE_CHECKING:
    from mechdsl.program.constants import Constant
    from mechdsl.prompts.prompt_table import PositionCell, PromptTable, Run
    from mechdsl.resolve.resolved_rule import Key, SitePoint


@record
class Sample(Record):
    """The rows that a fit reads: one vector of each that has the position."""

    table: PromptTable
    run: Run
    """With the model that it runs on, where that isn't the experiment's."""
    cell: PositionCell
    """In this run; the vectors of several tokens of a row are averaged."""
    targets: tuple[float | str, ...] = ()
    """Per row, what a probe tells: numbers, or words."""

    @property
    def classes(self) -> list[float | str]:
        """Targets of the rows that have the position, each once; by size, or by the alphabet."""
        pairs = zip(self.targets, self.cell.hits, strict=True)
        found = {target for target, row in pairs if any(row)}
        return sorted(found)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]


@record
class Fitted(Record):
    """`mean_difference(A, B)`, `mean(A)`, `pca(A)`, `probe(VALUE, A)` at one place."""

    way: str
    samples: tuple[Sample, ...]
    points: tuple[SitePoint, ...]
    """One; heads of a `mean` go each through its slice of the output projection and are summed."""
    options: Mapping[str, Constant]


@record
class Unembedded(Record):
    """The unembedding's row of a token, less that of another."""

    token: int
    less: int | None


@record
class SavedVector(Record):
    """A vector of a safetensors file."""

    path: Path
    key: str
    digest: str
    """SHA-256 of the file."""


@record
class WeightedSum(Record):
    parts: tuple[tuple[float, Vector], ...]


@record
class UnitVector(Record):
    of: Vector


@record
class RandomLike(Record):
    """A random direction with the length of another."""

    of: Vector
    draw: str
    """What tells it from others: whose it is, and the number of the draw."""
    seed: int


Vector: TypeAlias = Fitted | Unembedded | SavedVector | WeightedSum | UnitVector | RandomLike


@record
class Member(Record):
    """One direction."""

    name: str
    """`refusal[layer 3, token -1]`. In one panel, two of a name are the same."""
    vector: Vector
    made: str
    """How, in words."""


@record
class DirectionTargets(Record):
    """The direction of a rule, for every combination of the axes that it depends on."""

    axes: tuple[str, ...]
    members: Mapping[Key, Member]
    families: tuple[str, ...] = ()
    """Names of the definitions that it is made of."""

    @property
    def saved(self) -> Iterator[SavedVector]:
        """Vectors of files that it is made of."""
        for member in self.members.values():
            yield from (leaf for leaf in leaves(member.vector) if isinstance(leaf, SavedVector))

    @property
    def models(self) -> Iterator[str]:
        """Other models than the experiment's that are read for it."""
        for member in self.members.values():
            for fit in fits_of(member.vector):
                yield from (s.run.model for s in fit.samples if s.run.model is not None)


def leaves(vector: Vector) -> Iterator[Fitted | Unembedded | SavedVector]:
    """What a vector is made of in the end."""
    match vector:
        case WeightedSum(parts=parts):
            for _, part in parts:
                yield from leaves(part)
        case UnitVector(of=of) | RandomLike(of=of):
            yield from leaves(of)
        case _:
            yield vector


def fits_of(vector: Vector) -> Iterator[Fitted]:
    """The fits among them."""
    return (leaf for leaf in leaves(vector) if isinstance(leaf, Fitted))
