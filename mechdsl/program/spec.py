"""The experiment as typed data: a file's content after its names are bound.

Expressions, sites and positions stay syntax trees, because only data and models give them a
meaning; in JSON they are the source text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, SkipValidation, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from mechdsl.base.source import Source, Span
from mechdsl.base.text import Percent, count_noun
from mechdsl.syntax import ast


def _as_written(node: Any) -> str | None:
    return None if node is None else node.span.written


if TYPE_CHECKING:
    ExprText = ast.Expr
    CallText = ast.Call
    SiteText = ast.Site
    NameText = ast.Name
    PositionsText = ast.Positions
    PositionText = ast.Position
    DomainText = ast.Domain
    StringText = ast.String
    ChatTurnText = ast.ChatTurn
    ChangeText = ast.CorruptLine
    ArgumentText = ast.Argument
    SpanDefText = ast.SpanDef
    BoundText = ast.Star | ast.AxisRange
    EndText = ast.Bound
    EdgeText = ast.Edge
    MapText = ast.MapOf
    RefText = ast.Ref
    Losses = tuple[ast.LostStatement, ...]
    Where = Span
    Paths = tuple[Path, ...]
    Sources = tuple[Source, ...]
else:
    # Pydantic never looks into a tree: it would spend a quarter of a second on its schema.
    _AS_WRITTEN = Annotated[
        Any,
        PlainSerializer(_as_written, return_type=str | None),
        WithJsonSchema({"type": "string"}),
    ]
    ExprText = CallText = SiteText = NameText = PositionsText = PositionText = _AS_WRITTEN
    DomainText = StringText = ChatTurnText = ChangeText = SpanDefText = BoundText = EdgeText = (
        _AS_WRITTEN
    )
    EndText = ArgumentText = MapText = RefText = _AS_WRITTEN
    Where = Paths = Sources = Annotated[Any, Field(exclude=True, repr=False), SkipJsonSchema()]
    Losses = Where


class Spec(BaseModel):
    """Every part knows the span that it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    span: Where


class RepliesOf(Spec):
    """`with replies of writes(c: 1)`: what another experiment wrote stands behind the prompts."""

    of: str
    cell: tuple[ArgumentText, ...] = ()
    """Which of its cells wrote them."""

    @property
    def text(self) -> str:
        return f"replies of {' '.join(self.span.written.split())}"


class Generation(Spec):
    """`generate 40 with temperature 0.7, samples 3 until "\\n"`."""

    tokens: int
    """What a reply has at most."""
    temperature: float | None = None
    """None: the most likely token is taken, and nothing is drawn."""
    top_k: int | None = None
    top_p: float | None = None
    samples: int = 1
    stops: tuple[str, ...] = ()
    """Texts in front of which a reply ends."""

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature is not None

    @property
    def drawn(self) -> tuple[str, ...]:
        """How tokens are drawn, in words; nothing where they aren't."""
        if self.temperature is None:
            return ()
        said = [f"drawn at temperature {self.temperature:g}"]
        said += [f"of the {self.top_k:,} likeliest"] if self.top_k is not None else []
        said += [f"of those with {100 * self.top_p:.4g} % in all"] if self.top_p is not None else []
        return tuple(said)

    @property
    def how(self) -> str:
        """All of it in a few words."""
        said = [f"up to {count_noun(self.tokens, 'token')}", *self.drawn]
        said += [f"{self.samples:,} samples"] if self.samples > 1 else []
        if self.stops:
            said.append("until " + " or ".join(map(json.dumps, self.stops)))
        return ", ".join(said)

    def key(self, seed: int) -> tuple[object, ...]:
        """What replies hang on, beside the model, the prompts and the rules. seed: the file's."""
        drawn = None if self.temperature is None else (self.temperature, seed, self.samples)
        return (self.tokens, drawn, self.top_k, self.top_p, self.stops)


class During(Spec):
    """`during step 2..5`: the steps of a reply in which a rule acts. Step 0 is the prefill."""

    first: int | EndText
    """A number, or one that hangs on a `for`."""
    last: int | EndText
    """Inclusive."""
    after_prefill: bool = False
    """It edits what is kept of the prompt, between step 0 and step 1."""


TILE = "tile"
"""The value that says which tile a row is."""

WHOLE = "whole"


class Tiles(Spec):
    """Into how many rows and columns each image is cut."""

    rows: int
    cols: int
    whole: bool = False
    """Whether the uncut image is one more row."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the rows of one image are called, in the order of reading."""
        cut = [f"row {r + 1} col {c + 1}" for r in range(self.rows) for c in range(self.cols)]
        return (*cut, *([WHOLE] if self.whole else []))

    def box(self, name: str, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
        """Where a tile lies in an image of this size, (height, width): (left, top, right, bottom),
        the ends exclusive; None of the whole image. Edges between two pixels go to the left and to
        the top, so that each pixel is in one tile."""
        if name == WHOLE:
            return None
        height, width = size
        row, col = divmod(self.names.index(name), self.cols)
        return (
            width * col // self.cols,
            height * row // self.rows,
            width * (col + 1) // self.cols,
            height * (row + 1) // self.rows,
        )

    @property
    def words(self) -> str:
        """What becomes of an image."""
        cut = f"cut into {self.rows} x {self.cols} tiles"
        return f"{cut}, and whole" if self.whole else cut


class Model(Spec):
    """`model toy = zoo("counting")`."""

    name: str
    kind: Literal["zoo", "hf", "local", "python"]
    path: str
    """As written; of `python("FILE:FUNCTION")` both."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    bos: bool | None = None
    """None: as the tokenizer does by itself."""
    matched: str | None = None
    """What the `*` of its path stands for: one of several checkpoints."""
    base: str | None = None
    """Of an adapter: the model whose weights it changes."""
    function: CallText | None = None
    """`python(…)`, where the model is what that gives."""

    @property
    def source(self) -> str:
        """Where it comes from, as it is typed: `local("tuned", base: m)`."""
        base = "" if self.base is None else f", base: {self.base}"
        return f'{self.kind}("{self.path}"{base})'


class Value(Spec):
    """A value of a prompts block, in order of the file: `x in …` (domain) or `x = …` (value)."""

    names: tuple[str, ...]
    domain: DomainText | None = None
    value: ExprText | None = None


class TextDef(Spec):
    """`answer`, `wrong`, or `text NAME = …`: a text that metrics refer to."""

    name: str
    value: ExprText


class Corruption(Spec):
    name: str
    changes: tuple[ChangeText, ...]


NO_PROMPTS, NO_TEXT = "no prompts", "."
"""The block of experiments that look at weights alone, and the text of its one row."""

CHAT_ROLES = ("system", "user", "assistant")
"""Whose turns a chat has."""


class RegionDef(Spec):
    """`region object = box`: a part of each image."""

    name: str
    column: str


class Prompts(Spec):
    """One `prompts` block, or one of `images`."""

    name: str
    image: ExprText | None = None
    """Of images: what each is made of."""
    tiles: Tiles | None = None
    """Of images: into what each is cut, where each part is a row."""
    regions: tuple[RegionDef, ...] = ()
    values: tuple[Value, ...] = ()
    templates: tuple[StringText, ...] = ()
    chat: tuple[ChatTurnText, ...] = ()
    """Turns that the tokenizer's chat template writes, in place of templates."""
    rows: ExprText | None = None
    """The file's path as a string expression."""
    from_images: bool = False
    """Whether it takes columns from images that aren't known."""
    distinct: bool = False
    """Of equal records only the first."""
    rename: tuple[tuple[str, str], ...] = ()
    """(new name, column)."""
    where: tuple[ExprText, ...] = ()
    split: float | None = None
    """Percent of the rows in `NAME.train`."""
    texts: tuple[TextDef, ...] = ()
    scored_with: RefText | None = None
    """Of texts: the block of images that a model with two towers scores them with."""
    classes: StringText | None = None
    """Of images: what each of the texts says that a model with two towers chooses from."""
    spans: tuple[SpanDefText, ...] = ()
    corruptions: tuple[Corruption, ...] = ()

    @property
    def kind(self) -> Literal["prompts", "images"]:
        """What its rows are."""
        return "prompts" if self.image is None else "images"

    @property
    def unit(self) -> str:
        """What a row is."""
        return "prompt" if self.image is None else "image"

    def has_part(self, name: str | None) -> bool:
        """Whether `BLOCK.NAME` are rows of its split, and no corruption."""
        runs = {corruption.name for corruption in self.corruptions}
        return self.split is not None and name in ("train", "test") and name not in runs


class ObservedQuantity(Spec):
    """What an `observe` line looks at, beside the sites and positions of its rule."""

    word: str
    """`norm`, `logit_lens`: what kind of observation it is."""
    name: str | None = None
    """What it is called: `as attn`."""
    call: CallText | None = None
    """The word with its arguments: `probe(count)`."""
    toward: ExprText | None = None
    top: int | None = None
    placed: bool = True
    """Whether positions are written; else `at` says what stands in for them."""
    maps: tuple[MapText, ...] = ()
    """The experiments whose maps it is of, of a sum with their weights."""
    region: str | None = None
    """The region of images that maps are set against."""
    others: tuple[MapText, ...] = ()
    """The experiments that maps are set against."""
    share: float | None = None
    """Of all patches, how many of the highest are taken."""


class Direction(Spec):
    """`direction NAME = EXPR at SITE at POSITIONS`."""

    name: str
    value: ExprText
    site: SiteText | None = None
    """Where activations are read, where it is made of some."""
    at: PositionsText | None = None
    """None: at the last token."""


class Rule(Spec):
    """One intervention. `loops` are the `for` variables around it, outermost first."""

    verb: str
    """What kind of rule it is: its first words, but `set edge` where attention is set."""
    site: SiteText | None = None
    """What is written; of a path the sender. None for rules on the input, on attention and on
    weights."""
    at: PositionsText
    """Of attention rules the queries."""
    source: str | None = None
    """patch: the run that is read (`with RUN`, else the experiment's source)."""
    fill: ExprText | None = None
    """ablate: zero, mean, resample, `mean of …`; replace: the text; others: the number."""
    direction: ExprText | None = None
    """add, set, project out, clamp: the direction; what it is multiplied with is `fill`."""
    by: str | None = None
    fills: tuple[str, ...] = ()
    """ablate: the labels of an axis of fills, of which this rule is one."""
    fill_index: int = 0
    reading: SiteText | None = None
    """set … to value(…): the site that is read, in `source`, at `at`; written at `onto`."""
    stepped: NameText | None = None
    """add step(…): the component that is added, as far as it is from the position before."""
    onto: PositionsText | None = None
    """patch: where it is written; swap: the other positions; attention rules: the keys."""
    into_layer: BoundText | None = None
    """patch: the layers that are written, where they aren't those that are read."""
    source_block: BoundText | None = None
    """replace block: the block that computes there; None: none does."""
    edge: EdgeText | None = None
    """Attention rules: layers and heads."""
    receiver: SiteText | None = None
    through_mlps: bool = False
    """path: whether MLPs recompute, or are held too."""
    frozen_norms: bool = False
    """path: whether norms divide by what they divide by on the base run."""
    observed: ObservedQuantity | None = None
    """observe: what is looked at; `source` is the run, where it isn't the one that rules act on."""
    during: During | None = None
    """None: at each step of a reply."""
    loops: tuple[str, ...] = ()


class Loop(Spec):
    """`for NAME in DOMAIN`: an axis that several rules share."""

    name: str
    domain: DomainText
    within: tuple[str, ...] = ()
    """The variables of the loops around it, outermost first, which its domain may name."""


class Measure(Spec):
    """`label` is the name of the metric, or the expression as written; with the position behind it
    where another measure of the experiment goes by the same name and is read elsewhere."""

    label: str
    metric: ExprText
    effect: str
    effect_span: Where
    at: PositionText | None = None
    per_prompt: bool = False
    observed: bool = False
    """Whether it is of what the experiment's `observe` line gives, not of the model's output."""
    over: str | None = None
    """The axis that it is averaged over, row by row, or that it is a curve over."""
    area: bool = False
    """The area under that curve, and not the mean."""

    @property
    def place(self) -> str | None:
        """The position as written, on one line."""
        return None if self.at is None else " ".join(self.at.span.written.split())


class Statistics(Spec):
    resamples: int = 10_000
    confidence: float = 95.0
    correction: str = "holm"
    verdicts: Literal["none", "holm"] = "none"
    """Whether `expect` lines share their level, and how."""
    test: Literal["t", "flips", "bootstrap"] = "t"
    by: str | None = None


class Report(Spec):
    kind: str
    variable: str | None = None
    by: str | None = None
    top: int | None = None
    file: str | None = None
    of: str | None = None
    """The observation that is shown, where the experiment has several."""


class Group(Spec):
    """`group name_movers = L9H9, L9H6`: sites that are intervened on together."""

    name: str
    sites: tuple[SiteText, ...]


class Expectation(Spec):
    text: str
    condition: ExprText | None = None
    groups: tuple[Group, ...] = ()
    """Of the file, those that it names (`auroc(recovery, name_movers)`)."""
    top: int | None = None
    contains: tuple[SiteText, ...] = ()
    on_mean: bool = False
    citing: str | None = None


ControlTarget = Literal["heads", "neurons", "experts", "layers", "positions", "directions"]


class Control(Spec):
    """`against random(20, heads)`: the same rules on targets that are drawn at random."""

    draws: int
    what: ControlTarget | None = None
    """None: the finest that the rules' sites have."""
    apart: tuple[SiteText, ...] = ()
    """What is never drawn: sites, groups, `top 5 of X`."""


GRADIENT, ATTENTION, INTEGRATED = "gradient", "gradient_attention", "integrated_gradients"

ESTIMATORS = (GRADIENT, "gradient_input", ATTENTION, INTEGRATED)

NON_EFFECT_ESTIMATORS = {GRADIENT: "gradient", ATTENTION: "gradient × attention"}
"""Those whose numbers are no effects of what a rule does → as people read them."""


class Estimator(Spec):
    """`using integrated_gradients(steps: 32)`: effects are estimated from gradients, not run."""

    name: str
    """One of `ESTIMATORS`."""
    steps: int | None = None
    """Of integrated gradients: at how many points of the line gradients are taken."""

    @property
    def text(self) -> str:
        """As it is written in full."""
        return self.name if self.steps is None else f"{self.name}(steps: {self.steps})"


class ExternalRunSpec(Spec):
    """A run that isn't one of the sampled block in the experiment's model."""

    name: str
    """As tables call it: `fruit`, `listed.fewer`, `fruit shuffled`, `tuned`."""
    prompts: str | None = None
    """The block that it is of, where that is another one."""
    run: str = "clean"
    """Of that block."""
    model: str | None = None
    """The model that it runs on, where that is another one."""
    shuffled: bool = False
    """Its rows are dealt to those of the sampled block, not paired by number."""


class DerivedRun(Spec):
    """`run healed { from clean into noised  patch … }`: a run with rules, all at once."""

    name: str
    source: str | None = None
    base: str = "clean"
    rules: tuple[Rule, ...] = ()


class Save(Spec):
    """`save SITE of RUN at POSITIONS to "FILE" as TYPE`: activations that are written to a file."""

    site: SiteText
    at: PositionsText
    run: str | None = None
    """None: the experiment's base run."""
    file: str
    dtype: str | None = None
    """None: as computed."""


class Experiment(Spec):
    """One experiment: everything that its block says, with the file's names bound.

    One that compares several models, sources or bases is several of these, each a `variant`.
    """

    name: str
    """Of one of several results of a block, `BLOCK.OBSERVATION`."""
    within: str | None = None
    """That block."""
    variant: tuple[tuple[str, int | str], ...] = ()
    """Which one of several: (`model`, `source` or `base`; its label), axes of the results."""
    model: str
    prompts: str
    part: Literal["train", "test"] | None = None
    limit: int | None = None
    replies: RepliesOf | None = None
    """What stands behind its prompts."""
    source: str | None = None
    base: str = "clean"
    elsewhere: tuple[ExternalRunSpec, ...] = ()
    """Every other run that is read, written into or measured."""
    derived: tuple[DerivedRun, ...] = ()
    """Runs that it defines, each after those that it uses."""
    loops: tuple[Loop, ...] = ()
    rules: tuple[Rule, ...] = ()
    keep: tuple[ExprText, ...] = ()
    measures: tuple[Measure, ...]
    saves: tuple[Save, ...] = ()
    statistics: Statistics
    against: Control | None = None
    estimator: Estimator | None = None
    """What effects are estimated by; None: each cell is run."""
    generation: Generation | None = None
    """What each row writes behind its prompt, if anything."""
    reports: tuple[Report, ...] = ()
    expects: tuple[Expectation, ...] = ()
    broken: Annotated[bool, Field(exclude=True)] = False
    """A statement of it was refused: it is checked for what else is wrong, and never run."""

    @property
    def key(self) -> str:
        """Its name, with what makes it this variant: `e (source: other, base: fewer)`."""
        said = ", ".join(f"{axis}: {label}" for axis, label in self.variant)
        return f"{self.name} ({said})" if said else self.name

    @property
    def every_rule(self) -> tuple[Rule, ...]:
        """Its own, and those of the runs that it defines."""
        return (*(rule for run in self.derived for rule in run.rules), *self.rules)

    after: tuple[str, ...] = ()
    """Experiments whose results it uses: `top 10 of cie`, `with replies of writes`."""
    called: Mapping[str, Mapping[str, MapText]] = Field(default_factory=dict)
    """`for` variable that runs over experiments → word → the experiment, or some cells of it."""

    @property
    def over(self) -> str | None:
        """The axis that all its measures are averaged over, or are curves over."""
        return self.measures[0].over if self.measures else None

    @property
    def area(self) -> bool:
        """Whether they are the areas under these curves."""
        return bool(self.measures) and self.measures[0].area


class Program(Spec):
    """A file with everything it imports."""

    files: Paths = ()
    """The file itself, where it has a path, and those that it imports."""
    sources: Sources = ()
    """The same as they were read, with a text that has no path: those that it imports first."""
    models: dict[str, Model] = Field(default_factory=dict)
    checkpoints: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """What a model with a `*` in its path stands for: names of models."""
    prompts: dict[str, Prompts] = Field(default_factory=dict)
    groups: dict[str, Group] = Field(default_factory=dict)
    directions: dict[str, Direction] = Field(default_factory=dict)
    metrics: dict[str, ExprText] = Field(default_factory=dict)
    """Those that the file names; measures have them put in already."""
    parameters: dict[str, SkipValidation[int | float | str | bool]] = Field(default_factory=dict)
    """As they are: a percentage stays one."""
    experiments: tuple[Experiment, ...] = ()
    seed: int = 0
    lost: Losses = ()
    """Statements of the file and of what it imports that can't be read."""


Constant: TypeAlias = int | float | str | bool

BOOLEAN_WORDS: Mapping[str, bool] = {"true": True, "false": False}


def constant_value(node: object, parameters: Mapping[str, Constant]) -> Constant | None:
    """The value of a literal, a parameter or a negative number; None where it is none of these."""
    match node:
        case ast.Number(value=value) | ast.String(value=value):
            return value
        case ast.Percent(value=value):
            return Percent(value)
        case ast.Name(id=name):
            return parameters.get(name, BOOLEAN_WORDS.get(name, None))
        case ast.Negative(operand=operand):
            inner = constant_value(operand, parameters)
            return (
                -inner if isinstance(inner, int | float) and not isinstance(inner, bool) else None
            )
        case _:
            return None


def whole_number_value(node: int | str | None, parameters: Mapping[str, Constant]) -> int | None:
    """A count that is written as a number or as the name of a parameter."""
    if isinstance(node, str):
        value = parameters.get(node)
        return value if isinstance(value, int) and not isinstance(value, bool) else None
    return node


CLEAN = "clean"

PROMPTS_AXIS = "prompts"
"""The axis of several blocks of prompts."""

ONE_CELL_HINT = (
    "a `run` has one cell: let it name one layer, head and position, or join them (`layers`)"
)
"""What is to be done about a sweep in a run."""


@dataclass
class Definitions:
    """What the top-level statements of all files have defined so far."""

    parameters: dict[str, Constant] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    checkpoints: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the models that one with a `*` in its path stands for."""
    prompts: dict[str, Prompts] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    directions: dict[str, Direction] = field(default_factory=dict)
    metrics: dict[str, ast.Expr] = field(default_factory=dict)
    experiments: list[Experiment] = field(default_factory=list)
    seed: int = 0
    seeded: Span | None = None
    """Where; a file's own seed comes after those of its imports and replaces them."""
