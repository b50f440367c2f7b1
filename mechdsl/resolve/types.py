"""A resolved experiment: every name, coordinate, position and text is concrete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mechdsl import spec
from mechdsl.data.tokenizer import TextTokenizer
from mechdsl.data.types import PositionCell, PromptTable, Run
from mechdsl.models.shape import ModelShape
from mechdsl.record import Record, record
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import Form

Label = int | float | str


@record
class ModelContext(Record):
    """What is known of a model without its weights."""

    spec: spec.Model
    shape: ModelShape
    tokenizer: TextTokenizer

    @property
    def name(self) -> str:
        return self.spec.name


@record
class Axis(Record):
    """One axis of the result table."""

    name: str
    labels: tuple[Label, ...]
    span: ast.Span = field(compare=False, repr=False)
    alias: str | None = None
    """A second name that reports may use: `item` for the positions of `each item token`."""
    items: tuple[int | None, ...] = ()
    """1-based occurrence per value, where the axis runs over occurrences."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class SitePoint:
    """Where one write lands: `unit` None is every head or neuron, or the whole vector."""

    site: str
    layer: int | None
    unit: int | None


Key = tuple[int, ...]
"""Indices along the axes that something depends on."""


@record
class SiteTargets(Record):
    """The points of a rule for every combination of the axes it depends on."""

    axes: tuple[str, ...]
    points: Mapping[Key, tuple[SitePoint, ...]]
    labels: Mapping[Key, str]
    """As tables show the site: `L2H0.z`."""


@record
class PositionTargets(Record):
    """Where a rule writes in the base run and reads in the source run."""

    axes: tuple[str, ...]
    written: Mapping[Key, PositionCell]
    read: Mapping[Key, PositionCell]
    """Equal to `written` for rules that read no other run."""
    left_out: tuple[str, ...] = ()
    """Labels of positions that no row has in both runs."""


Fill = Literal["source", "zero", "mean", "resample", "text"]


@record
class ResolvedRule(Record):
    """One rule, ready to be laid out over cells."""

    spec: spec.Rule
    fill: Fill
    run: str
    """The run that is read: the source of a patch, the run of `mean of …`."""
    sites: SiteTargets | None
    """None for `replace`, which changes the input."""
    positions: PositionTargets
    inputs: Mapping[Key, Run] = field(default_factory=dict[Key, Run])
    """`replace`: the base run with the text put in, for every value of its positions."""
    groups: tuple[str, ...] | None = None
    """Per row, the group whose mean fills it (`mean by template`)."""


Env = int | None
"""What a text may depend on beside the row: the occurrence of the cell (`{item.index}`)."""


@record
class Atom(Record):
    """One metric of an expression, with its arguments worked out for every row."""

    node: ast.Expr
    name: str
    form: Form
    texts: Mapping[Env, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Per environment and row, the token ids of T."""
    numerals: tuple[tuple[int, int], ...] = ()
    """(token id, number) of `expected(1..9)`."""
    run: str | None = None
    """The reference run of `kl`, `js`, `cosine`."""
    point: SitePoint | None = None
    """The site of `cosine`."""

    @property
    def by_item(self) -> bool:
        """Whether its text differs between the cells of one row."""
        return set(self.texts) != {None} and bool(self.texts)


@record
class ResolvedMeasure(Record):
    """One expression over atoms, read at one position of each run."""

    label: str
    text: str
    expression: ast.Expr
    atoms: tuple[Atom, ...]
    kind: Literal["number", "category"]
    unit: str
    at: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Per run and row, the token position that is read; runs that are missing read their last."""
    truth: tuple[float, ...] | None = None
    """Per row, the number that the answer spells, for categories."""


@record
class ResolvedExperiment(Record):
    """Everything that a plan needs; still without weights."""

    spec: spec.Experiment
    model: ModelContext
    table: PromptTable
    axes: tuple[Axis, ...]
    rules: tuple[ResolvedRule, ...]
    measures: tuple[ResolvedMeasure, ...]
    keep: tuple[ResolvedMeasure, ...]
    accuracies: Mapping[str, ResolvedMeasure]
    """`correct` on the runs that an `accuracy(RUN)` asks for."""
    seed: int

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    @property
    def n_cells(self) -> int:
        cells = 1
        for size in self.shape:
            cells *= size
        return cells
