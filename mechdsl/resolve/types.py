"""Records of a resolved experiment: its axes, rules, directions, measures and controls.

Every name, coordinate, position and text in them is concrete. `Intervention` is the interface of a
rule kind that all later stages call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from mechdsl.base.hashing import digest
from mechdsl.base.records import Record, record
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import UNKNOWN_FACTS, UnknownFact
from mechdsl.images.picture import Picture
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.program.python_functions import PythonFunction
from mechdsl.program.spec import Generation
from mechdsl.prompts.answers import TokenSets
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, PromptRun, ReplyPosition
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import MetricForm
from mechdsl.vocab.sites import SITES, EdgeChange

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mechdsl.program.spec import Constant


@record
class FitSample(Record):
    """The rows that a fit reads: one vector of each that has the position."""

    table: PromptTable
    run: PromptRun
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
class FittedVector(Record):
    """A method fitted to activations at one site: `mean_difference(A, B)`, `pca(A)`."""

    method: str
    """Its name in `DIRECTION_METHODS`."""
    samples: tuple[FitSample, ...]
    points: tuple[SitePoint, ...]
    """One; heads of a `mean` go each through its slice of the output projection and are summed."""
    options: Mapping[str, Constant]


@record
class UnembeddingVector(Record):
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
    parts: tuple[tuple[float, DirectionVector], ...]


@record
class UnitVector(Record):
    of: DirectionVector


@record
class RandomVector(Record):
    """A random direction with the length of another."""

    of: DirectionVector
    draw: str
    """What tells it from others: whose it is, and the number of the draw."""
    seed: int


DirectionVector: TypeAlias = (
    FittedVector | UnembeddingVector | SavedVector | WeightedSum | UnitVector | RandomVector
)


@record
class DirectionMember(Record):
    """One direction."""

    name: str
    """`refusal[layer 3, token -1]`. In one panel, two of a name are the same."""
    vector: DirectionVector
    made: str
    """How, in words."""


@record
class DirectionTargets(Record):
    """The direction of a rule, for every combination of the axes that it depends on."""

    axes: tuple[str, ...]
    members: Mapping[AxisIndices, DirectionMember]
    families: tuple[str, ...] = ()
    """Names of the definitions that it is made of."""

    @property
    def saved(self) -> Iterator[SavedVector]:
        """Vectors of files that it is made of."""
        for member in self.members.values():
            yield from (
                leaf for leaf in iter_leaf_vectors(member.vector) if isinstance(leaf, SavedVector)
            )

    @property
    def models(self) -> Iterator[str]:
        """Other models than the experiment's that are read for it."""
        for member in self.members.values():
            for fit in iter_fitted_vectors(member.vector):
                yield from (s.run.model for s in fit.samples if s.run.model is not None)


def iter_leaf_vectors(
    vector: DirectionVector,
) -> Iterator[FittedVector | UnembeddingVector | SavedVector]:
    """What a vector is made of in the end."""
    match vector:
        case WeightedSum(parts=parts):
            for _, part in parts:
                yield from iter_leaf_vectors(part)
        case UnitVector(of=of) | RandomVector(of=of):
            yield from iter_leaf_vectors(of)
        case _:
            yield vector


def iter_fitted_vectors(vector: DirectionVector) -> Iterator[FittedVector]:
    """The fits among them."""
    return (leaf for leaf in iter_leaf_vectors(vector) if isinstance(leaf, FittedVector))


@dataclass(frozen=True)
class SitePoint:
    """Where one write lands: `unit` None is every head or neuron, or the whole vector."""

    site: str
    layer: int | None
    unit: int | None


SiteLayer = tuple[str, int | None]
"""A component and its layer."""

AxisIndices = tuple[int, ...]
"""Indices along the axes that something depends on."""


@record
class SiteTargets(Record):
    """The points of a rule for every combination of the axes it depends on."""

    axes: tuple[str, ...]
    points: Mapping[AxisIndices, tuple[SitePoint, ...]]
    labels: Mapping[AxisIndices, str]
    """As tables show the site: `L2H0.z`."""
    sources: Mapping[AxisIndices, tuple[SitePoint, ...]] | None = None
    """What is read for each of the points, where that is another one (`into layer`)."""


@record
class PositionTargets(Record):
    """Where a rule writes in the base run and reads in the source run."""

    axes: tuple[str, ...]
    written: Mapping[AxisIndices, PositionCell]
    read: Mapping[AxisIndices, PositionCell]
    """Equal to `written` for rules that read no other run."""
    left_out: tuple[str, ...] = ()
    """Labels of positions that no row has in both runs."""
    newest: frozenset[AxisIndices] = frozenset()
    """Where a reply is written: the keys whose written cell is, or holds, the newest token at each
    step (`last token`, `tokens *`)."""
    every: frozenset[AxisIndices] = frozenset()
    """Of these, the keys of `tokens *`, all tokens so far."""


@record
class Amounts(Record):
    """A number that a rule writes, for every value of the loops that it names."""

    axes: tuple[str, ...]
    values: Mapping[AxisIndices, float]


@record
class StepRanges(Record):
    """The first and the last step of a reply in which a rule acts, for every value of the loops
    that they name."""

    axes: tuple[str, ...]
    values: Mapping[AxisIndices, tuple[int, int]]


@record
class Alternative(Record):
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
class ExternalRun(Record):
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


class VectorBatch(Protocol):
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


ChangeTarget = Literal["sites", "edges", "input", "positions", "blocks", "nothing"]


class Intervention:
    """What a rule does to a run. Stages behind `resolve` ask this class and know no kinds.

    The defaults are those of a rule that writes vectors at its sites, made of its number alone.
    """

    name: ClassVar[str]
    """As graphs call it; the verb of a rule kind that says no other. Interventions of one name with
    equal keys write the same."""
    changes: ClassVar[ChangeTarget] = "sites"
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
        return _source_text(rule.spec.fill) if rule.amounts is not None else ""

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

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        """[K, width] or [K, 1]: what is written; asked of interventions that change sites."""
        return vectors.read()


def _source_text(node: ast.Node | None) -> str:
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
    inputs: Mapping[AxisIndices, PromptRun] = field(default_factory=dict[AxisIndices, PromptRun])
    """`replace`: the base run with the text put in, for every value of its positions."""
    groups: tuple[str, ...] | None = None
    """Per row, the group whose mean fills it (`mean by template`)."""
    amounts: Amounts | None = None
    """The number that it writes, or works with."""
    direction: DirectionTargets | None = None
    """What it steers along."""
    apart: ExternalRun | None = None
    """`mean of BLOCK`, `resample of BLOCK`: what is read; `positions.read` are in its rows then."""
    python: PythonFunction | None = None
    """`set … to python(…)`: what makes new vectors of the base run's."""
    edge: EdgeTargets | None = None
    path: PathTargets | None = None
    beside: SiteTargets | None = None
    """The sites that an observation sets its own against."""
    only: Alternative | None = None
    """None where it acts in all cells."""
    steps: StepRanges | None = None
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


def select_reached(
    senders: tuple[SitePoint, ...], receivers: tuple[SitePoint, ...], *, parallel: bool
) -> tuple[SitePoint, ...]:
    """The receivers that some sender comes before."""
    return tuple(
        to for to in receivers if any(precedes(of, to, parallel=parallel) for of in senders)
    )


def precedes(sender: SitePoint, receiver: SitePoint, *, parallel: bool) -> bool:
    """Whether what the sender adds is in the stream that the receiver reads."""
    if SITES[receiver.site].when == "output" or SITES[sender.site].when == "embedding":
        return True
    assert sender.layer is not None
    assert receiver.layer is not None
    if sender.layer != receiver.layer:
        return sender.layer < receiver.layer
    if receiver.site == "resid_pre":  # it is the sender, or comes before it
        return False
    if sender.site == "resid_pre":
        return True
    of_attention = sender.site in ("z", "head_out", "attn_out", "resid_mid")
    in_mlp = receiver.site in ("mlp_norm", "mlp_hidden")
    return in_mlp and of_attention and not parallel


AxisLabel = int | float | str


@record
class OppositeTower(Record):
    """What stands on the other side of a model with two towers: what an experiment's images are
    scored with, or its texts. Each is encoded once, and no rule acts on it."""

    texts: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    """The tokens of each, as the tower reads them."""
    pictures: tuple[Picture, ...] = ()
    """Or images."""
    block: str = ""
    """Of images: the block that they are of."""

    @cached_property
    def digest(self) -> str:
        """All that it is."""
        pictures = [(each.text, each.size) for each in self.pictures]
        return digest(self.texts, self.ids, pictures).hex()


@record
class RankingSource(Record):
    """An experiment that sites were picked from."""

    span: Span
    """Where an experiment picks from it, or from others that did."""
    cells: int
    """How many it has to pick from."""
    row_keys: frozenset[int]
    """Of the rows that its ranking is made of, whatever block they are in."""


@record
class ModelContext(Record):
    """What is known of a model without its weights."""

    spec: spec.Model
    shape: ModelShape
    tokenizer: TextTokenizer
    opposite: OppositeTower | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def key(self) -> str:
        """By which the loaded model is found: another name where it is one with two towers, of
        which each experiment has other scores."""
        if self.opposite is None:
            return self.name
        return f"{self.name} ({self.shape.side} tower, {self.opposite.digest[:12]})"

    @property
    def stands_in(self) -> bool:
        """Whether something of it isn't at hand, and something else stands in for it."""
        return self.shape.stands_in or self.tokenizer.stands_in


@record
class Axis(Record):
    """One axis of the result table."""

    name: str
    labels: tuple[AxisLabel, ...]
    span: ast.Span = field(compare=False, repr=False)
    alias: str | None = None
    """A second name that reports may use: `item` for the positions of `each item token`."""
    items: tuple[int | None, ...] = ()
    """1-based occurrence per value, where the axis runs over occurrences."""
    of_windows: bool = field(default=False, compare=False)
    """Whether its values are the centres of windows."""

    def __len__(self) -> int:
        return len(self.labels)


@record
class LoopCells(Record):
    """Loops whose values hang on those of others (`for a in 0..5 { for b in a..5 { … } }`), and
    these others; the combinations of their values that there are."""

    axes: tuple[str, ...]
    keys: frozenset[AxisIndices]

    def has(self, at: Mapping[str, int]) -> bool:
        """Whether there is such a combination. at: indices along all of its loops, or more."""
        return tuple(at[axis] for axis in self.axes) in self.keys

    def along(self, names: Collection[str], fixed: Mapping[str, int] | None = None) -> LoopCells:
        """Those of the loops that are named, and the combinations of their values that there
        are with any of the others, of which some may be fixed."""
        said = [
            (self.axes.index(name), i) for name, i in (fixed or {}).items() if name in self.axes
        ]
        own = (key for key in self.keys if all(key[place] == i for place, i in said))
        places = [place for place, axis in enumerate(self.axes) if axis in names]
        keys = frozenset(tuple(key[place] for place in places) for key in own)
        return LoopCells(tuple(self.axes[place] for place in places), keys)


def count_cells(axes: Sequence[Axis], nested: LoopCells | None) -> int:
    """How many cells there are along some axes."""
    there = LoopCells((), frozenset({()}))
    there = there if nested is None else nested.along([axis.name for axis in axes])
    return len(there.keys) * prod(len(axis) for axis in axes if axis.name not in there.axes)


ItemNumber = int | None
"""What a text may depend on beside the row: the occurrence of the cell (`{item.index}`)."""


@record
class MetricTerm(Record):
    """One metric of an expression, with its arguments worked out for every row."""

    node: ast.Expr
    name: str
    form: MetricForm
    texts: Mapping[ItemNumber, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Per environment and row, the token ids of T, or the number of the output that is meant."""
    of_class: bool = False
    """It names an output of a classifier, and no token."""
    sets: Mapping[ItemNumber, TokenSets] = field(default_factory=dict)
    """Per environment, the tokens of any of several texts, and of numerals."""
    classes: int = 0
    """Of a model that scores texts, how many it chooses from: the first of its outputs. 0: all."""
    run: str | None = None
    """The reference run of `kl`, `js`, `cosine`."""
    point: SitePoint | None = None
    """The site of `cosine`."""
    points: Mapping[AxisIndices, SitePoint] = field(default_factory=dict[AxisIndices, SitePoint])
    """Where it sweeps: the site for each of the values of `axes`."""
    axes: tuple[Axis, ...] = ()
    wanted: Mapping[ItemNumber, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """Of a metric of the reply: per environment and row, the texts in its brackets."""
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
        named = {*self.texts, *self.sets, *self.wanted}
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

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Per row, the tokens of its text, of the longest one where cells differ."""
        return tuple(max(map(len, texts)) for texts in zip(*self.texts.values(), strict=True))

    @cached_property
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
    atoms: tuple[MetricTerm, ...]
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
    reply: tuple[object, ...] | None = None
    """How the reply is written that it reads; None where it reads none."""
    in_reply: ReplyPosition | None = None
    """Where in the reply it is read; `at` is the prompt's last token then."""

    @property
    def word(self) -> str:
        """`prob` of `prob(answer)`: the metric that it is, empty where it is more than one."""
        match self.expression:
            case ast.Call(name=word) | ast.Name(id=word):
                return word
            case _:
                return ""


AxisLabels = tuple[tuple[str, AxisLabel], ...]
"""Names of axes, each with a label of it."""


@record
class MeasureGroup(Record):
    """The measures of an experiment at one of the places that they are read at."""

    labels: AxisLabels
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

    @property
    def in_reply(self) -> bool:
        """Whether it is of tokens that its run writes."""
        return any(cell.reply is not None for cell in self.cells)


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
    nested: LoopCells | None = None
    """None where there is a cell for each combination of its loops' values."""
    picks: Mapping[str, str] = field(default_factory=dict[str, str])
    """`top 3 of cie` → what that is, in words."""
    stand_ins: tuple[str, ...] = ()
    """Experiments that it picks from and that haven't run: their first cells stand in."""
    sites_of: Mapping[str, RankingSource] = field(default_factory=dict, compare=False, repr=False)
    """By name, experiments whose sites it uses, and those that these picked from."""
    control: ResolvedControl | None = None
    bare: BaselineExperiment | None = None
    """What the effects of its observations are set against."""
    as_base: bool = False
    """It is read without its rules, behind the prompts and the replies that were written with
    them."""
    control_of: str | None = None
    """The experiment that this one is the control of, or its base run, by its key."""
    drawn: DrawCounts | None = None
    """Of a control: how many draws its cells have."""
    saves: tuple[ResolvedSave, ...] = ()
    derived: Mapping[str, ResolvedExperiment] = field(default_factory=dict)
    """Runs with rules that it defines, each after those that it uses: of one cell, without
    measures."""
    places: tuple[MeasureGroup, ...] = ()
    """Where its measures are read, if that is at several places; `measures` are the first's."""
    place: MeasureGroup | None = None
    """Of one that is an experiment at one of these: which."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def generation(self) -> Generation | None:
        """What its rows write behind their prompts, if anything."""
        return self.spec.generation

    @property
    def key(self) -> str:
        """Its name among all variants."""
        return self.spec.key

    def has(self, index: AxisIndices) -> bool:
        """Whether its measures are read in the cell of these indices along its axes."""
        at = {axis.name: own for axis, own in zip(self.axes, index, strict=True)}
        fixed = {} if self.place is None else self.place.fixed
        if any(at.get(name, i) != i for name, i in fixed.items()):
            return False
        return self.own_loops is None or self.own_loops.has(at)

    @cached_property
    def own_loops(self) -> LoopCells | None:
        """`nested`, of the loops that are axes here; the others may be fixed to one value."""
        if self.nested is None:
            return None
        fixed = {} if self.place is None else self.place.fixed
        return self.nested.along([axis.name for axis in self.axes], fixed)

    @property
    def models(self) -> tuple[str, ...]:
        """The model that it runs on, and others that it reads."""
        others = [run.model for run in self.spec.elsewhere if run.model is not None]
        others += [m for rule in self.every_rule if rule.direction for m in rule.direction.models]
        return tuple(dict.fromkeys((self.model.key, *others)))

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
    def looks_ahead(self) -> bool:
        """Whether tokens may see later ones in a run with rules that it defines."""
        return any(rule.does.looks_ahead for run in self.derived.values() for rule in run.rules)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    @property
    def n_cells(self) -> int:
        """Of its grid, also those that there are not."""
        return prod(self.shape)

    def cells_along(self, names: Sequence[str]) -> Counter[AxisIndices]:
        """Indices along some axes → how many of its cells have these."""
        nest = self.nested or LoopCells((), frozenset({()}))
        free = [axis for axis in self.axes if axis.name not in nest.axes]
        times = prod(len(axis) for axis in free if axis.name not in names)
        free = [axis for axis in free if axis.name in names]
        found: Counter[AxisIndices] = Counter()
        for key, own in product(nest.keys, product(*(range(len(axis)) for axis in free))):
            at = dict(zip((*nest.axes, *(axis.name for axis in free)), (*key, *own), strict=True))
            found[tuple(at[name] for name in names)] += times
        return found

    @property
    def n_there(self) -> int:
        """Its cells, without those whose loops have no such values together."""
        return count_cells(self.axes, self.own_loops)


@record
class ExperimentOutline(Record):
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
    def unknown(self) -> frozenset[UnknownFact]:
        """What stands in for something that isn't at hand."""
        found = {
            "shape": self.model.shape.stands_in,
            "tokens": self.model.tokenizer.stands_in,
            "rows": self.table.stands_in,
            "count": self.table.stands_in or self.table.cut,
            "columns": self.table.columns_unknown,
        }
        return frozenset(what for what in UNKNOWN_FACTS if found[what])


@record
class DrawCounts(Record):
    """How many draws the cells of a control have: cells may have more or fewer others."""

    axes: tuple[str, ...]
    counts: Mapping[AxisIndices, int]


@record
class BaselineExperiment(Record):
    """The same cells of the base run, where effects of what is observed are asked for."""

    experiment: ResolvedExperiment
    numbers: tuple[int, ...]
    """Of the measures whose effects are set against it."""


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


DRAW_AXIS = "random draw"
"""An axis that no file can name."""


@dataclass(frozen=True)
class DirectionFamily:
    """Directions of one width over some axes; one direction where there are none."""

    name: str
    axes: tuple[Axis, ...]
    members: Mapping[AxisIndices, DirectionMember]
    width: int | None
    """None where only the file that it is in knows."""
    definitions: tuple[str, ...] = ()
    """Names of the `direction` lines that it is made of."""

    def axis(self, name: str) -> Axis | None:
        return next((axis for axis in self.axes if axis.name == name), None)
