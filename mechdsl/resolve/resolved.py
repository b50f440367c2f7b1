"""A resolved experiment: every name, coordinate, position and text is concrete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from itertools import product
from math import prod
from typing import Any, Literal

from mechdsl.base.digest import digest
from mechdsl.base.record import Record, record
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import UNKNOWN, Unknown
from mechdsl.images.picture import Picture
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.program.python_files import PythonFunction
from mechdsl.program.spec_replies import Generation
from mechdsl.prompts.answer_sets import TokenSets
from mechdsl.prompts.prompt_table import PositionCell, PromptTable, ReplyPosition
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.resolve.resolved_rule import Key, ResolvedRule, SitePoint
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import Form

Label = int | float | str


@record
class Opposite(Record):
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
class PickedFrom(Record):
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
    opposite: Opposite | None = None

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


@record
class LoopCells(Record):
    """Loops whose values hang on those of others (`for a in 0..5 { for b in a..5 { … } }`), and
    these others; the combinations of their values that there are."""

    axes: tuple[str, ...]
    keys: frozenset[Key]

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


def cells_of(axes: Sequence[Axis], nested: LoopCells | None) -> int:
    """How many cells there are along some axes."""
    there = LoopCells((), frozenset({()}))
    there = there if nested is None else nested.along([axis.name for axis in axes])
    return len(there.keys) * prod(len(axis) for axis in axes if axis.name not in there.axes)


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
    classes: int = 0
    """Of a model that scores texts, how many it chooses from: the first of its outputs. 0: all."""
    run: str | None = None
    """The reference run of `kl`, `js`, `cosine`."""
    point: SitePoint | None = None
    """The site of `cosine`."""
    points: Mapping[Key, SitePoint] = field(default_factory=dict[Key, SitePoint])
    """Where it sweeps: the site for each of the values of `axes`."""
    axes: tuple[Axis, ...] = ()
    wanted: Mapping[Env, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
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
    sites_of: Mapping[str, PickedFrom] = field(default_factory=dict, compare=False, repr=False)
    """By name, experiments whose sites it uses, and those that these picked from."""
    control: ResolvedControl | None = None
    bare: WithoutRules | None = None
    """What the effects of its observations are set against."""
    as_base: bool = False
    """It is read without its rules, behind the prompts and the replies that were written with
    them."""
    control_of: str | None = None
    """The experiment that this one is the control of, or its base run, by its key."""
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
    def generation(self) -> Generation | None:
        """What its rows write behind their prompts, if anything."""
        return self.spec.generation

    @property
    def key(self) -> str:
        """Its name among all variants."""
        return self.spec.key

    def has(self, index: Key) -> bool:
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

    def cells_along(self, names: Sequence[str]) -> Counter[Key]:
        """Indices along some axes → how many of its cells have these."""
        nest = self.nested or LoopCells((), frozenset({()}))
        free = [axis for axis in self.axes if axis.name not in nest.axes]
        times = prod(len(axis) for axis in free if axis.name not in names)
        free = [axis for axis in free if axis.name in names]
        found: Counter[Key] = Counter()
        for key, own in product(nest.keys, product(*(range(len(axis)) for axis in free))):
            at = dict(zip((*nest.axes, *(axis.name for axis in free)), (*key, *own), strict=True))
            found[tuple(at[name] for name in names)] += times
        return found

    @property
    def n_there(self) -> int:
        """Its cells, without those whose loops have no such values together."""
        return cells_of(self.axes, self.own_loops)


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
class WithoutRules(Record):
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


DRAW = "random draw"
"""An axis that no file can name."""
