"""A resolved rule: what it does, and where, with every coordinate and position concrete."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from mechdsl.base.record import Record, record
from mechdsl.program import spec
from mechdsl.program.python_files import PythonFunction
from mechdsl.prompts.prompt_table import PositionCell, PromptTable, Run
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES, EdgeChange

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mechdsl.resolve.direction_types import DirectionTargets


@dataclass(frozen=True)
class SitePoint:
    """Where one write lands: `unit` None is every head or neuron, or the whole vector."""

    site: str
    layer: int | None
    unit: int | None


Place = tuple[str, int | None]
"""A component and its layer."""
Key = tuple[int, ...]
"""Indices along the axes that something depends on."""


@record
class SiteTargets(Record):
    """The points of a rule for every combination of the axes it depends on."""

    axes: tuple[str, ...]
    points: Mapping[Key, tuple[SitePoint, ...]]
    labels: Mapping[Key, str]
    """As tables show the site: `L2H0.z`."""
    sources: Mapping[Key, tuple[SitePoint, ...]] | None = None
    """What is read for each of the points, where that is another one (`into layer`)."""


@record
class PositionTargets(Record):
    """Where a rule writes in the base run and reads in the source run."""

    axes: tuple[str, ...]
    written: Mapping[Key, PositionCell]
    read: Mapping[Key, PositionCell]
    """Equal to `written` for rules that read no other run."""
    left_out: tuple[str, ...] = ()
    """Labels of positions that no row has in both runs."""
    newest: frozenset[Key] = frozenset()
    """Where a reply is written: the keys whose written cell is, or holds, the newest token at each
    step (`last token`, `tokens *`)."""
    every: frozenset[Key] = frozenset()
    """Of these, the keys of `tokens *`, all tokens so far."""


@record
class Amounts(Record):
    """A number that a rule writes, for every value of the loops that it names."""

    axes: tuple[str, ...]
    values: Mapping[Key, float]


@record
class Steps(Record):
    """The first and the last step of a reply in which a rule acts, for every value of the loops
    that they name."""

    axes: tuple[str, ...]
    values: Mapping[Key, tuple[int, int]]


@record
class Only(Record):
    """The cells that a rule acts in, where it is one of several of which each cell has one."""

    axis: str
    index: int


@record
class EdgeTargets(Record):
    """Edges of attention: from the rule's positions, the queries, to these keys."""

    change: EdgeChange | None
    """None where they are only looked at."""
    keys: PositionTargets


@record
class PathTargets(Record):
    """Where paths end."""

    receivers: SiteTargets
    through_mlps: bool
    frozen_norms: bool = False

    @property
    def also_at_the_end(self) -> bool:
        """Whether the end of the model stands beside other receivers."""
        points = (p for here in self.receivers.points.values() for p in here)
        return len({SITES[p.site].when == "output" for p in points}) == 2


@record
class Apart(Record):
    """A run of another block, on rows of its own, that fills are taken of."""

    table: PromptTable
    run: str
    part: str | None = None
    """Of the block's split."""

    @property
    def name(self) -> str:
        """As a rule writes it."""
        own = self.part or (None if self.run == "clean" else self.run)
        return self.table.name if own is None else f"{self.table.name}.{own}"


class Vectors(Protocol):
    """K vectors of one site of one layer that a rule is about to write."""

    @property
    def amounts(self) -> Tensor:
        """[K] float64: the rule's number in the cell that each is written for; 0 without one."""
        ...

    @property
    def width(self) -> int:
        """Of a vector at this site; 1 for vectors over keys, which are widened."""
        ...

    def direction(self) -> Tensor:
        """[K, width] float64: the rule's direction in the cell that each is written for."""
        ...

    def read(self) -> Tensor:
        """[K, width]: what the intervention's `reads` names, at the places that the rule reads."""
        ...


@dataclass(frozen=True)
class Convention:
    """What an intervention says of itself below a table."""

    key: str
    text: str
    closing: str = ""
    """Said once, behind the texts of all rules with this key."""


Changes = Literal["sites", "edges", "input", "positions", "blocks", "nothing"]


class Intervention:
    """What a rule does to a run. Stages behind `resolve` ask this class and know no kinds.

    The defaults are those of a rule that writes vectors at its sites, made of its number alone.
    """

    name: ClassVar[str]
    """As graphs call it; the verb of a rule kind that says no other. Interventions of one name with
    equal keys write the same."""
    changes: ClassVar[Changes] = "sites"
    """What of a run it changes: vectors at its sites, edges of attention, the text that goes in,
    position ids, what blocks compute; nothing where it only looks."""
    whole: ClassVar[bool] = False
    """Its rows are whole passes: nothing of an unpatched run stands in them."""
    looks_ahead: ClassVar[bool] = False
    """By it a token may see later ones."""
    reads: ClassVar[Literal["run", "donor", "mean", "cell"] | None] = None
    """What `Vectors.read` gives: the rule's run at the same prompt, that run at another prompt (a
    seeded permutation), its mean over all prompts, or what `of_cell` makes of all rows of a cell;
    None where nothing is read."""
    mode: ClassVar[Literal["set", "add", "scale", "along", "step"]] = "set"
    """How what `values` gives meets what is there when the pass comes by: it replaces it, is added
    to it, or, [K, 1], multiplies it; along directions of length 1, only the component along these
    is set, to the rule's number, or to 0 without one; steps are, [K, 1] times, how far what is
    there is from what is there one position before, and added."""
    copies: ClassVar[bool] = False
    """What is written is what is read in the rule's run, as it is: then rows whose source and base
    agree there are equal to the base run and aren't run."""
    leads_on: ClassVar[bool] = False
    """Only pairs with the sites `beside` in a later layer are cells."""
    drawn_positions: ClassVar[bool] = True
    """Whether `against random(…, positions)` can put it at others."""

    @property
    def reads_weights_only(self) -> bool:
        """Whether it reads weights alone, so that no row matters."""
        return False

    @property
    def of_all_rows(self) -> bool:
        """Whether what it writes into a row hangs on the other rows."""
        return self.over_rows or self.reads == "cell"

    @property
    def over_rows(self) -> bool:
        """Whether what it writes into a row hangs on the positions of all rows."""
        return self.reads in ("donor", "mean")

    def key(self, rule: ResolvedRule) -> Hashable:
        """What is written hangs on, beside the name, sites, positions and number; rows of rules
        with equal keys are run once."""
        return rule.run

    def unchanged(self, amounts: NDArray[np.float64]) -> NDArray[np.bool_]:
        """[cell] whether a rule with this number leaves everything as it was; such rows aren't run.

        amounts: [cell]
        """
        import numpy as np

        return np.zeros(len(amounts), dtype=np.bool_)

    def detail(self, rule: ResolvedRule) -> str | None:
        """What its node in the graph says behind the name; None where it has none, because what
        is read is written."""
        return _as_written(rule.spec.fill) if rule.amounts is not None else ""

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        """What a table has to say of it."""
        yield from ()

    def of_cell(self, rule: ResolvedRule, given: Tensor) -> Tensor:
        """[row, position, width]: what is written into all rows of a cell; asked once for each,
        where `reads` is "cell".

        given: [row, position, width], the rule's run at what one layer of the cell writes; heads
        and neurons stand side by side. NaN where a row has fewer positions than others.
        """
        return given

    def values(self, rule: ResolvedRule, vectors: Vectors) -> Tensor:
        """[K, width] or [K, 1]: what is written; asked of interventions that change sites."""
        return vectors.read()


def _as_written(node: ast.Node | None) -> str:
    return "" if node is None else node.span.written


@record
class ResolvedRule(Record):
    """One rule, ready to be laid out over cells; equal to another that does the same."""

    spec: spec.Rule = field(compare=False)
    does: Intervention
    run: str
    """The run that is read: the source of a patch, the run of `mean of …`."""
    sites: SiteTargets | None
    """None for `replace`, which changes the input."""
    positions: PositionTargets
    inputs: Mapping[Key, Run] = field(default_factory=dict[Key, Run])
    """`replace`: the base run with the text put in, for every value of its positions."""
    groups: tuple[str, ...] | None = None
    """Per row, the group whose mean fills it (`mean by template`)."""
    amounts: Amounts | None = None
    """The number that it writes, or works with."""
    direction: DirectionTargets | None = None
    """What it steers along."""
    apart: Apart | None = None
    """`mean of BLOCK`, `resample of BLOCK`: what is read; `positions.read` are in its rows then."""
    python: PythonFunction | None = None
    """`set … to python(…)`: what makes new vectors of the base run's."""
    edge: EdgeTargets | None = None
    path: PathTargets | None = None
    beside: SiteTargets | None = None
    """The sites that an observation sets its own against."""
    only: Only | None = None
    """None where it acts in all cells."""
    steps: Steps | None = None
    """Of a reply, those in which it acts; None at each step."""
    after_prefill: bool = False
    """It edits keys or values that are kept of the prompt, between step 0 and step 1."""

    @property
    def acts_later(self) -> bool:
        """Whether it acts in steps behind the prefill, at newest tokens."""
        return (
            bool(self.positions.newest)
            and not self.after_prefill
            and (self.steps is None or any(last > 0 for _, last in self.steps.values.values()))
        )

    @property
    def in_prefill(self) -> bool:
        """Whether it acts in step 0, in some cell."""
        if self.after_prefill:
            return False
        return self.steps is None or any(first == 0 for first, _ in self.steps.values.values())

    def leads(self, at: Mapping[str, int]) -> bool:
        """Whether there is a cell with these indices along the axes, as far as `beside` goes."""
        if not self.does.leads_on or self.beside is None or self.sites is None:
            return True
        own = self.sites.points[tuple(at[axis] for axis in self.sites.axes)]
        other = self.beside.points[tuple(at[axis] for axis in self.beside.axes)]
        return max(p.layer or 0 for p in own) < min(p.layer or 0 for p in other)

    @property
    def axes(self) -> frozenset[str]:
        """Names of the axes that something of it depends on."""
        parts = [self.sites, self.positions, self.amounts, self.direction, self.steps]
        parts += [] if self.edge is None else [self.edge.keys]
        parts += [] if self.path is None else [self.path.receivers]
        parts += [] if self.beside is None else [self.beside]
        own = frozenset(name for part in parts if part is not None for name in part.axes)
        return own if self.only is None else own | {self.only.axis}
