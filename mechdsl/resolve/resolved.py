"""A resolved experiment: every name, coordinate, position and text is concrete."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from mechdsl.base.record import Record, record
from mechdsl.diagnostics.core import UNKNOWN, Unknown
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.program.python_files import PythonFunction
from mechdsl.prompts.answer_sets import TokenSets
from mechdsl.prompts.prompt_table import PositionCell, PromptTable, Run
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import Form
from mechdsl.vocab.sites import EdgeChange

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mechdsl.resolve.direction_types import DirectionTargets

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

    @property
    def stands_in(self) -> bool:
        """Whether something of it isn't at hand, and something else stands in for it."""
        return self.shape.stands_in or self.tokenizer.stands_in


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
    of_windows: bool = field(default=False, compare=False)
    """Whether its values are the centres of windows."""

    def __len__(self) -> int:
        return len(self.labels)


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


@record
class Amounts(Record):
    """A number that a rule writes, for every value of the loops that it names."""

    axes: tuple[str, ...]
    values: Mapping[Key, float]


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
        parts = [self.sites, self.positions, self.amounts, self.direction]
        parts += [] if self.edge is None else [self.edge.keys]
        parts += [] if self.path is None else [self.path.receivers]
        parts += [] if self.beside is None else [self.beside]
        own = frozenset(name for part in parts if part is not None for name in part.axes)
        return own if self.only is None else own | {self.only.axis}


Env = int | None
"""What a text may depend on beside the row: the occurrence of the cell (`{item.index}`)."""


@record
class Atom(Record):
    """One metric of an expression, with its arguments worked out for every row."""

    node: ast.Expr
    name: str
    form: Form
    texts: Mapping[Env, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Per environment and row, the token ids of T, or the number of the output that is meant."""
    of_class: bool = False
    """It names an output of a classifier, and no token."""
    sets: Mapping[Env, TokenSets] = field(default_factory=dict)
    """Per environment, the tokens of any of several texts, and of numerals."""
    run: str | None = None
    """The reference run of `kl`, `js`, `cosine`."""
    point: SitePoint | None = None
    """The site of `cosine`."""
    points: Mapping[Key, SitePoint] = field(default_factory=dict[Key, SitePoint])
    """Where it sweeps: the site for each of the values of `axes`."""
    axes: tuple[Axis, ...] = ()
    python: PythonFunction | None = None
    rows: tuple[Mapping[str, Any], ...] = field(default=(), compare=False, repr=False)
    """What it is given of every row."""
    tokenizer: TextTokenizer | None = field(default=None, compare=False, repr=False)
    """What it is given beside that."""
    own: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Per run and row, the token that stands where it is read (`loss at …`): each run has its
    own."""

    @property
    def by_item(self) -> bool:
        """Whether its text differs between the cells of one row."""
        named = {*self.texts, *self.sets}
        return named != {None} and bool(named)

    @property
    def named(self) -> Iterator[int]:
        """All tokens of its texts, equal ones perhaps several times."""
        for texts in self.texts.values():
            for tokens in texts:
                yield from tokens
        for sets in self.sets.values():
            for tokens in sets.tokens:
                yield from tokens

    @property
    def lengths(self) -> tuple[int, ...]:
        """Per row, the tokens of its text, of the longest one where cells differ."""
        return tuple(max(map(len, texts)) for texts in zip(*self.texts.values(), strict=True))

    @property
    def behind(self) -> tuple[int, ...]:
        """Per row, how many tokens of its text go in behind the prompt: the last one is predicted
        only, and other metrics than those of a whole text read no such pass."""
        if self.form.takes != "continuation":
            return (0,) * len(self.lengths)
        return tuple(length - 1 for length in self.lengths)


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
    observed: bool = False
    """It is of what the experiment looks at: metrics of tokens read its logits, not the model's."""
    absent: tuple[int, ...] = ()
    """Rows that lack the position; they have no value."""
    item: int | None = None
    """The occurrence that it is read at, where it is read at each."""

    @property
    def word(self) -> str:
        """`prob` of `prob(answer)`: the metric that it is, empty where it is more than one."""
        match self.expression:
            case ast.Call(name=word) | ast.Name(id=word):
                return word
            case _:
                return ""


Labels = tuple[tuple[str, Label], ...]
"""Names of axes, each with a label of it."""


@record
class MeasuredPart(Record):
    """The measures of an experiment at one of the places that they are read at."""

    labels: Labels
    """Which place: `(("measured", "item 2"),)`."""
    measures: tuple[ResolvedMeasure, ...]
    fixed: Mapping[str, int] = field(default_factory=dict[str, int])
    """Loops whose variables the measures name → the index of the value that stands in them: of
    cells with others there are parts of their own."""


@record
class ResolvedSave(Record):
    """What a `save` line writes, in full."""

    spec: spec.Save = field(compare=False)
    run: str
    points: tuple[SitePoint, ...]
    """One tensor each."""
    cells: tuple[PositionCell, ...]


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
    picks: Mapping[str, str] = field(default_factory=dict[str, str])
    """`top 3 of cie` → what that is, in words."""
    stand_ins: tuple[str, ...] = ()
    """Experiments that it picks from and that haven't run: their first cells stand in."""
    sites_of: Mapping[str, ast.Span] = field(default_factory=dict, compare=False, repr=False)
    """Experiments whose sites it uses → where."""
    control: ResolvedControl | None = None
    control_of: str | None = None
    """The experiment that this one is the control of, by its key."""
    drawn: Drawn | None = None
    """Of a control: how many draws its cells have."""
    saves: tuple[ResolvedSave, ...] = ()
    derived: Mapping[str, ResolvedExperiment] = field(default_factory=dict)
    """Runs with rules that it defines, each after those that it uses: of one cell, without
    measures."""
    places: tuple[MeasuredPart, ...] = ()
    """Where its measures are read, if that is at several places; `measures` are the first's."""
    place: MeasuredPart | None = None
    """Of one that is an experiment at one of these: which."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def key(self) -> str:
        """Its name among all variants."""
        return self.spec.key

    def has(self, index: Key) -> bool:
        """Whether its measures are read in the cell of these indices along its axes."""
        fixed = {} if self.place is None else self.place.fixed
        at = (fixed.get(axis.name) for axis in self.axes)
        return all(i in (None, own) for i, own in zip(at, index, strict=True))

    @property
    def models(self) -> tuple[str, ...]:
        """The model that it runs on, and others that it reads."""
        others = [run.model for run in self.spec.elsewhere if run.model is not None]
        others += [m for rule in self.rules if rule.direction for m in rule.direction.models]
        return tuple(dict.fromkeys((self.model.name, *others)))

    @property
    def python(self) -> tuple[PythonFunction, ...]:
        """Functions of Python files that its numbers hang on."""
        measured = [atom.python for m in (*self.measures, *self.keep) for atom in m.atoms]
        written = [rule.python for rule in self.every_rule]
        own = (each for each in (*measured, *written) if each is not None)
        found = [*self.table.python, *own]
        return tuple(dict.fromkeys(found))

    @property
    def every_rule(self) -> tuple[ResolvedRule, ...]:
        """Its own, and those of the runs that it defines."""
        return (*(rule for run in self.derived.values() for rule in run.rules), *self.rules)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    @property
    def n_cells(self) -> int:
        cells = 1
        for size in self.shape:
            cells *= size
        return cells


@record
class Outline(Record):
    """An experiment as far as it is known, whether or not something of it was refused: what its
    reports and expectations may name."""

    spec: spec.Experiment
    model: ModelContext
    table: PromptTable
    axes: tuple[Axis, ...]
    perhaps: frozenset[str]
    """Names of axes that it may have: of rules that were refused, of positions whose tokens stand
    in."""
    measures: tuple[ResolvedMeasure | None, ...]
    """One for each that it names; None where that was refused."""
    resolved: ResolvedExperiment | None
    """None where something was refused."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def unknown(self) -> frozenset[Unknown]:
        """What stands in for something that isn't at hand."""
        found = {
            "shape": self.model.shape.stands_in,
            "tokens": self.model.tokenizer.stands_in,
            "rows": self.table.stands_in,
            "count": self.table.stands_in or self.table.cut,
            "columns": self.table.columns_unknown,
        }
        return frozenset(what for what in UNKNOWN if found[what])


@record
class Drawn(Record):
    """How many draws the cells of a control have: cells may have more or fewer others."""

    axes: tuple[str, ...]
    counts: Mapping[Key, int]


@record
class ResolvedControl(Record):
    """The same experiment on targets that were drawn at random."""

    experiment: ResolvedExperiment
    """With an axis `DRAW` in front of all others; not all cells have all draws."""
    draws: int
    """The most that a cell has."""
    asked: int
    what: str
    """`random heads`."""
    said: str
    """How they were drawn."""


DRAW = "random draw"
"""An axis that no file can name."""
