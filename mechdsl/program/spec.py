"""The experiment as typed data: a file's content after its names are bound.

Expressions, sites and positions remain syntax trees, because only data and models give them a
meaning; in JSON they are the source text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Self,
    TypeAlias,
    cast,
    dataclass_transform,
)

from mechdsl.base.limits import is_integer, is_number
from mechdsl.base.records import Record
from mechdsl.base.text import Percent, Source, Span, count_noun
from mechdsl.program.estimators import (
    ESTIMATOR_ALIASES,
    ESTIMATORS,
    BackwardRules,
    GradientEstimator,
    call_text,
)
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from mechdsl.syntax.words import ObservationWord

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
    AxisText = ast.Axis
    EndText = ast.Bound
    EdgeText = ast.Edge
    MapText = ast.MapOf
    SiteMapText = ast.SiteMap
    RefText = ast.Ref
    Losses = tuple[ast.LostStatement, ...]
    WordFacts = ObservationWord
    TrainedFiles = dict[str, tuple[object, str]]
    Where = Span
    Paths = tuple[Path, ...]
    Names = tuple[str, ...]
    Sources = tuple[Source, ...]


_WRITTEN_AS_TEXT = (
    *("ExprText", "CallText", "SiteText", "NameText", "PositionsText", "PositionText"),
    *("DomainText", "StringText", "ChatTurnText", "ChangeText", "ArgumentText", "SpanDefText"),
    *("BoundText", "AxisText", "EndText", "EdgeText", "MapText", "SiteMapText", "RefText"),
)
"""Types of syntax trees whose JSON is the source text."""

_WITHOUT_JSON = ("Where", "Paths", "Names", "Sources", "Losses", "TrainedFiles", "WordFacts")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
class Spec(Record, kw_only=True):
    """Every part knows the span that it came from."""

    span: Where

    def __init_subclass__(cls) -> None:
        super().__init_subclass__(kw_only=True)

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """Return a copy with other values of some fields."""
        kind = type(self)
        return kind(**{name: getattr(self, name) for name in spec_fields(kind)} | dict(update))


@cache
def spec_fields(kind: type[Spec]) -> tuple[str, ...]:
    """Return the names of the fields of a part of a program."""
    return tuple(each.name for each in fields(cast("Any", kind)))


class RepliesOf(Spec):
    """`with replies of writes(c: 1)`: another experiment's replies follow the prompts."""

    of: str
    cell: tuple[ArgumentText, ...] = ()
    """The selected cell, if not all cells are meant."""

    @property
    def text(self) -> str:
        return f"replies of {' '.join(self.span.written.split())}"


class Generation(Spec):
    """`generate 40 with temperature 0.7, samples 3 until "\\n"`."""

    tokens: int
    """Maximum length of a reply."""
    temperature: float | None = None
    """None: greedy decoding."""
    top_k: int | None = None
    top_p: float | None = None
    samples: int = 1
    stops: tuple[str, ...] = ()
    """Texts that end a reply; excluded from it."""

    @property
    def sampled(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature is not None

    @property
    def drawn(self) -> tuple[str, ...]:
        """Sampling settings in words; empty for greedy decoding."""
        if self.temperature is None:
            return ()
        said = [f"sampled at temperature {self.temperature:g}"]
        said += [f"from the {self.top_k:,} most likely tokens"] if self.top_k is not None else []
        said += (
            [f"from the tokens that make up {100 * self.top_p:.4g} % of the probability"]
            if self.top_p is not None
            else []
        )
        return tuple(said)

    @property
    def how(self) -> str:
        """All settings in a few words."""
        said = [f"up to {count_noun(self.tokens, 'token')}", *self.drawn]
        said += [f"{self.samples:,} samples"] if self.samples > 1 else []
        if self.stops:
            said.append("until " + " or ".join(map(json.dumps, self.stops)))
        return ", ".join(said)

    def key(self, seed: int) -> tuple[object, ...]:
        """Return what replies depend on besides model, prompts and rules; `seed`: the file's."""
        drawn = None if self.temperature is None else (self.temperature, seed, self.samples)
        return (self.tokens, drawn, self.top_k, self.top_p, self.stops)


class During(Spec):
    """`during step 2..5`: the steps of a reply in which a rule acts. Step 0 is the prefill."""

    first: int | EndText
    """A number, or syntax that depends on a `for`."""
    last: int | EndText
    """Inclusive."""
    after_prefill: bool = False
    """Whether it edits the cached prompt, between step 0 and step 1."""


TILE = "tile"
"""The value that names the tile of a row."""

WHOLE = "whole"


class Tiles(Spec):
    """Into how many rows and columns each image is cut."""

    rows: int
    cols: int
    whole: bool = False
    """Whether the uncut image is an additional row."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rows of one image, in reading order."""
        cut = [f"row {r + 1} col {c + 1}" for r in range(self.rows) for c in range(self.cols)]
        return (*cut, *([WHOLE] if self.whole else []))

    def box(self, name: str, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
        """Return the bounds of a tile in an image of `size` (height, width).

        Returns:
            (left, top, right, bottom) with exclusive ends; None for the whole image. An edge
            between two pixels is rounded to the left and to the top, so that each pixel is in one
            tile.
        """
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
        """Description of the rows that an image becomes."""
        cut = f"cut into {self.rows} x {self.cols} tiles"
        return f"{cut}, and whole" if self.whole else cut


class Model(Spec):
    """`model toy = zoo("counting")`."""

    name: str
    kind: Literal["zoo", "hf", "local", "python", "edited", "rounded", "sum"]
    path: str
    """The path as written; for `python("FILE:FUNCTION")`, file and function. Empty for models that
    are made from others."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    bos: bool | None = None
    """None: the tokenizer's default."""
    matched: str | None = None
    """Text that the `*` of the path matches, for one of several checkpoints."""
    base: str | None = None
    """The model whose weights an adapter or edits change, or are rounded; the first of a sum."""
    terms: tuple[tuple[str, float], ...] = ()
    """For a sum: its models with their factors."""
    bits: int | None = None
    """For a rounded model: bits of a weight."""
    written: str = ""
    """The expression of a sum, or the edits, as written."""
    function: CallText | None = None
    """The call `python(…)` that returns the model, if it has one."""

    @property
    def source(self) -> str:
        """The model's source as typed: `local("tuned", base: m)`."""
        if self.kind == "edited":
            return f"{self.base} with {{ {self.written} }}"
        if self.kind == "rounded":
            return f"rounded({self.base}, bits: {self.bits})"
        if self.kind == "sum":
            return self.written
        base = "" if self.base is None else f", base: {self.base}"
        return f'{self.kind}("{self.path}"{base})'

    @property
    def bases(self) -> tuple[str, ...]:
        """The models that it is made from."""
        if self.terms:
            return tuple(name for name, _ in self.terms)
        return () if self.base is None else (self.base,)

    @property
    def is_loaded(self) -> bool:
        """Whether it is loaded from a source, instead of being made from other models."""
        return self.kind not in ("edited", "rounded", "sum")


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
"""The block of experiments that observe only weights, and the text of its one row."""

CHAT_ROLES = ("system", "user", "assistant", "tool")
"""Roles of the turns of a chat."""


class RegionDef(Spec):
    """`region object = box`: a part of each image."""

    name: str
    column: str
    image: str = ""
    """For images in prompts: the one that it is a part of."""


class PictureDef(Spec):
    """`image photo = "{file}"`, `video clip = "{folder}"`, `audio a = "{file}"`: an image, a video
    or a sound within each prompt."""

    name: str
    value: ExprText
    is_video: bool = False
    is_sound: bool = False
    is_invalid: bool = False
    """Whether the expression in the file has an error, so that `value` is a constant instead."""


class RenamedColumn(Spec):
    """`rename { name = column }`; its span is the column's."""

    name: str
    column: str


class ChatArgument(Spec):
    """An argument of a chat template."""

    name: str
    value: Constant


class Prompts(Spec):
    """One `prompts` block, or one of `images`."""

    name: str
    image: ExprText | None = None
    """For images: the expression that creates each image."""
    tiles: Tiles | None = None
    """For images: the tiles that each image is cut into; every tile is a row."""
    pictures: tuple[PictureDef, ...] = ()
    """For prompts: the images in them."""
    regions: tuple[RegionDef, ...] = ()
    values: tuple[Value, ...] = ()
    templates: tuple[StringText, ...] = ()
    chat: tuple[ChatTurnText, ...] = ()
    """Turns for the tokenizer's chat template, instead of templates."""
    chat_arguments: tuple[ChatArgument, ...] = ()
    """What the template gets besides the turns: `enable_thinking: false`."""
    rows: ExprText | None = None
    """The file's path as a string expression."""
    from_images: bool = False
    """Whether its columns come from unknown images."""
    distinct: bool = False
    """Keep only the first of equal records."""
    streamed: bool = False
    """Whether the rows are read in parts, and only by `save top … rows of …`."""
    rename: tuple[RenamedColumn, ...] = ()
    where: tuple[ExprText, ...] = ()
    split: float | None = None
    """Percentage of the rows in `NAME.train`."""
    split_for: tuple[str, ...] = ()
    """The circuits that are trained on `NAME.train`, if the file doesn't split the rows."""
    texts: tuple[TextDef, ...] = ()
    scored_with: RefText | None = None
    """For texts: the block of images that a two-tower model compares them with."""
    contains: RefText | None = None
    """For prompts: the block whose images they contain as `{image}`."""
    classes: StringText | None = None
    """For images: the template of the texts that a two-tower model chooses from."""
    spans: tuple[SpanDefText, ...] = ()
    corruptions: tuple[Corruption, ...] = ()

    @property
    def kind(self) -> Literal["prompts", "images"]:
        """Type of the rows."""
        return "prompts" if self.image is None else "images"

    @property
    def unit(self) -> str:
        """Name of one row."""
        return "prompt" if self.image is None else "image"

    @property
    def named_images(self) -> tuple[tuple[str, ExprText | None], ...]:
        """The images of a row: its own without a name, and those in its prompt with theirs."""
        return ("", self.image), *((picture.name, picture.value) for picture in self.pictures)

    @property
    def has_images(self) -> bool:
        """Whether its rows are or contain images, videos or sounds."""
        return self.image is not None or bool(self.pictures)

    def has_part(self, name: str | None) -> bool:
        """Whether `BLOCK.NAME` is a part of its split and not a corruption."""
        runs = {corruption.name for corruption in self.corruptions}
        return self.split is not None and name in ("train", "test") and name not in runs


RankingQuantity = Literal["mean", "difference", "correlation"]
"""What features are ranked by: their mean, its difference from another run, or their correlation
with a value of the rows."""


class ObservedQuantity(Spec):
    """What an `observe` line looks at, besides the sites and positions of its rule."""

    word: str
    """Type of the observation: `norm`, `logit_lens`."""
    facts: WordFacts
    """Facts of the word."""
    name: str | None = None
    """Its name in the file: `as attn`."""
    call: CallText | None = None
    """The word with its arguments: `probe(count)`."""
    toward: ExprText | None = None
    top: int | None = None
    placed: bool = True
    """Whether the file gives positions; otherwise `at` is the placeholder."""
    maps: tuple[MapText, ...] = ()
    """Experiments whose maps are observed; with weights in a sum."""
    weights_attention: bool = False
    """Whether the word is a factor of attention: `observe attention … by value_norm`."""
    region: str | None = None
    """The region of images, or the position of texts, that maps are compared with."""
    in_tokens: bool = False
    """Whether `region` is a position, which the rule has, too."""
    others: tuple[MapText, ...] = ()
    """Experiments whose maps are compared with `maps`."""
    share: float | None = None
    """Fraction of the patches, those with the highest values, that is selected."""
    basis: str | None = None
    """The basis whose coordinates are observed."""
    bases: Names = ()
    """The bases or the lens that are its arguments: `ov(b, c)`, `tuned_lens(l)`."""
    ranked_by: RankingQuantity = "mean"
    """What the coordinates are ranked by."""
    column: ExprText | None = None
    """The value of each row that they are correlated with."""


class Direction(Spec):
    """`direction NAME = EXPR at SITE at POSITIONS`."""

    name: str
    value: ExprText
    site: SiteText | None = None
    """The site of the activations, if the direction is computed from activations."""
    at: PositionsText | None = None
    """None: the last token."""
    changed_by: frozenset[str] = frozenset()
    """As in `Basis`, for a direction that is trained."""
    seed: int | None = None
    """As in `Basis`, for a direction that is trained."""


class Basis(Spec):
    """`basis NAME = METHOD(…) at SITE at POSITIONS`, or `lens NAME = fit(…) at …`."""

    name: str
    method: CallText
    site: SiteText
    at: PositionsText | None = None
    """Position of the activations that it is computed from; None: the last token."""
    changed_by: frozenset[str] = frozenset()
    """Corruptions that must change the rows that it is computed on: those that a training uses."""
    chooses_positions: bool = False
    """Of a group that a training chooses: whether it chooses positions, not sites."""
    chooses_edges: bool = False
    """Whether a training chooses the edges of a circuit."""
    seed: int | None = None
    """Seed of one training of `fit(…, seeds: 3)`; None for the whole definition."""
    partner: ExternalRunSpec | None = None
    """The run of the vectors that its own are correlated with, if another one is named: a run of
    its block, of another block or of another model."""


class Rule(Spec):
    """One intervention. `loops` are the `for` variables around it, outermost first."""

    verb: str
    """Type of the rule: its first words, or `set edge` if it sets attention."""
    site: SiteText | None = None
    """The written site; for a path, the sender. None for rules on input, attention, weights."""
    basis_span: Span | None = None
    """Where the rule names a basis whose definition contains its site."""
    at: PositionsText
    """Positions; for attention rules, the queries."""
    source: str | None = None
    """patch: the run to read (`with RUN`, or else the experiment's source)."""
    fill: ExprText | None = None
    """ablate: zero, mean, resample, `mean of …`; replace: the text; other rules: the number."""
    direction: ExprText | None = None
    """add, set, project out, clamp: the direction; its factor is `fill`."""
    token: tuple[int, int] | None = None
    """add, set with one direction per token: the index of this rule's token, and their number."""
    by: str | None = None
    fills: tuple[str, ...] = ()
    """ablate: labels of an axis of fills; this rule has one of them."""
    fill_index: int = 0
    all_but: bool = False
    """ablate: whether all edges but those of the circuit are ablated."""
    nodes: NameText | None = None
    """ablate, of a training of edges: the group of neurons or features that are nodes."""
    without_edge: bool = False
    """ablate: whether the rule acts on the circuit without each of its edges."""
    reading: SiteText | None = None
    """set … to value(…): the site to read, in `source`, at `at`; written at `onto`."""
    stepped: NameText | None = None
    """add step(…): the component whose difference from the previous position is added."""
    onto: PositionsText | None = None
    """patch: the written positions; swap: the other positions; attention rules: the keys."""
    into_layer: BoundText | None = None
    """patch: the written layers, if they differ from the read layers."""
    exchanged: AxisText | None = None
    """patch … with features of another basis: these features."""
    source_block: BoundText | None = None
    """replace block: the block that replaces it; None: identity."""
    source_stack: NameText | None = None
    """The stack of this block, if the file names one."""
    edge: EdgeText | None = None
    """Attention rules: layers and heads."""
    receiver: SiteText | None = None
    through_mlps: bool = False
    """path: whether MLPs are recomputed or frozen too."""
    frozen_norms: bool = False
    """path: whether norms use the divisors of the base run."""
    observed: ObservedQuantity | None = None
    """observe: the quantity; `source` is the run, if it isn't the one that rules act on."""
    during: During | None = None
    """None: every step of a reply."""
    drops_error: bool = False
    """In a basis: whether the error, which it doesn't represent, is dropped."""
    read_groups: tuple[tuple[str, str], ...] = ()
    """In a basis: (name, description of the file) of each group that it names. The description is
    empty for groups that aren't read from a file."""
    loops: tuple[str, ...] = ()

    @property
    def circuit_name(self) -> str | None:
        """The name in its site that may be that of a circuit."""
        return None if self.site is None else self.site.circuit_name


class Loop(Spec):
    """`for NAME in DOMAIN`: an axis that several rules share."""

    name: str
    domain: DomainText
    within: tuple[str, ...] = ()
    """Variables of the enclosing loops, outermost first; the domain may use them."""


class Measure(Spec):
    """`label` is the name of the metric, or the expression as written; with the position after it
    if another measure of the experiment has the same name and is read elsewhere."""

    label: str
    metric: ExprText
    effect: str
    effect_span: Where
    at: PositionText | None = None
    per_prompt: bool = False
    observed: bool = False
    """Whether it measures the experiment's observation instead of the model's output."""
    over: str | None = None
    """The axis of the row-wise average or of the curve."""
    area: bool = False
    """Report the area under the curve instead of the mean."""

    @property
    def place(self) -> str | None:
        """The position as written in the source, on one line."""
        return None if self.at is None else " ".join(self.at.span.written.split())


class Statistics(Spec):
    resamples: int = 10_000
    confidence: float = 95.0
    correction: str = "holm"
    verdicts: Literal["none", "holm"] = "none"
    """Method by which `expect` lines share their level."""
    test: Literal["t", "flips", "bootstrap"] = "t"
    by: str | None = None


class Report(Spec):
    kind: str
    variable: str | None = None
    by: str | None = None
    top: int | None = None
    file: str | None = None
    of: str | None = None
    """The reported observation, if the experiment has several."""
    width: int | None = None
    """Columns of a paper that a picture spans; None: the default size."""


class Group(Spec):
    """`group name_movers = L9H9, L9H6`: sites that are intervened on together.

    The sites of a group that a training chooses are filled in for each experiment.
    """

    name: str
    sites: tuple[SiteText, ...]
    choices: tuple[int, ...] = ()
    """Numbers of the coordinates that the training could choose, once they are known: those of
    which some training row has an effect."""
    digest: str = ""
    """SHA-256 of the file that it is read from, if any."""
    made: str = ""
    """What was read from this file, for conventions."""
    prompts: tuple[str, ...] = ()
    """Digests of the prompts that the sites in this file were chosen on, if the file has them."""
    waits: bool = False
    """Whether a training chooses its sites and hasn't run, so that they are placeholders."""
    ranked: tuple[SiteText, ...] = ()
    """Each site that the training chose, in descending order of the scores."""
    candidates: tuple[tuple[str, int | None, int | None], ...] = ()
    """Site, layer and largest unit of the candidates, of a group in a file."""
    dictionary: tuple[str, str] | None = None
    """The basis of the features of a trained group in a file, and the SHA-256 in this file."""
    at: PositionsText | None = None
    """Candidates of a group of positions that is read from a file; such a group has no sites."""
    labels: tuple[str, ...] = ()
    """Labels of the chosen positions."""

    @property
    def names_features(self) -> bool:
        """Whether its sites are all features or dimensions, of one basis or several."""
        return bool(self.sites) and all(site.coordinates is not None for site in self.sites)


EVERY_EDGE = "every edge"
"""Name of the circuit of all edges of a model, which a mask chooses from."""

EVERY_VISION_EDGE = "every edge of the vision encoder"
"""The same in the vision encoder of prompts."""


class Circuit(Spec):
    """`circuit c = embed -> L0H1.q, L0H1 -> logits`: edges from senders to receivers.

    The edges of a circuit that a training chooses are filled in for each experiment; until they are
    known, it has one that every model has.
    """

    name: str
    edges: tuple[SiteMapText, ...]
    source: CallText | None = None
    """The call `saved(…)` of a circuit in a file."""
    scores: tuple[float, ...] = ()
    """Of every edge of the model, in the order of `mechdsl.resolve.circuits.list_edges`; empty if
    the edges have no scores, or have them at positions."""
    placed_scores: tuple[float, ...] = ()
    """Of each of `edges` at its position; empty without such scores."""
    nodes: tuple[SiteText, ...] = ()
    """Groups of neurons or features that are nodes, also without edges. The MLP of the neurons'
    layers in `edges` is the node of its other neurons."""
    is_open: bool = False
    """Whether a call gives its edges, which aren't known yet; or never, after an error."""

    @property
    def has_places(self) -> bool:
        """Whether some of its edges have positions."""
        return any(edge.at is not None for edge in self.edges)


class Expectation(Spec):
    text: str
    condition: ExprText | None = None
    groups: tuple[Group, ...] = ()
    """Groups of the file that it refers to (`auroc(recovery, name_movers)`)."""
    top: int | None = None
    contains: tuple[SiteText, ...] = ()
    on_mean: bool = False
    citing: str | None = None


ControlTarget = Literal[
    "heads",
    "neurons",
    "experts",
    "layers",
    "positions",
    "directions",
    "subspaces",
    "features",
    "edges",
]


class Control(Spec):
    """`against random(20, heads)`: the same rules on targets that are drawn at random."""

    draws: int
    what: ControlTarget | None = None
    """None: the finest unit of the rules' sites."""
    frequency: MapText | None = None
    """The experiment whose values give the frequencies of features."""
    apart: tuple[SiteText, ...] = ()
    """Targets that are never drawn: sites, groups, `top 5 of X`."""


class NoControl(Spec):
    """`against none`: no control for what is trained."""


class Verification(Spec):
    """`verify top 20, random 20`, `verify until top 20 95%`: cells that are also run."""

    top: int = 0
    """Number of cells with the largest absolute estimates; with `until`, of the largest exact
    effects that are searched."""
    random: int = 0
    """Number of cells drawn at random from all others."""
    until: Literal["", "bound", "stable"] = ""
    """bound: until the largest exact effects are known with `confidence`. stable: until they
    haven't changed for as many runs."""
    confidence: float = 95.0
    """In percent."""

    def most(self, cells: int) -> int:
        """Return how many of some cells are run at most."""
        return cells if self.until else min(cells, self.top + self.random)


class Estimator(Spec):
    """`using integrated_gradients(steps: 32)`: effects are estimated from gradients, not run."""

    name: str
    """Its word after `using`, a name or an alias of an estimator."""
    steps: int | None = None
    """Number of points at which gradients are taken; None: only in the base run."""
    options: tuple[tuple[str, int | float], ...] = ()
    """Values of all other arguments."""
    verify: Verification | None = None
    """The cells that are also run; None: no cell is."""

    @property
    def kind(self) -> GradientEstimator:
        """The registered estimator."""
        return ESTIMATORS[ESTIMATOR_ALIASES.get(self.name, self.name)]

    @property
    def joins_cells(self) -> bool:
        """Whether all cells of a site move together on the line to what they write."""
        return self.steps is not None and self.kind.place == "sites" and not self.kind.moves

    @property
    def between_runs(self) -> bool:
        """Whether gradients are taken at points between the source run and the base run."""
        return self.steps is not None and not self.joins_cells

    @property
    def text(self) -> str:
        """The full source text, under the estimator's own name."""
        return call_text(self.kind.name, self.steps, dict(self.options))


class ExternalRunSpec(Spec):
    """A run that isn't one of the sampled block in the experiment's model."""

    name: str
    """Name in tables: `fruit`, `listed.fewer`, `fruit shuffled`, `tuned`."""
    prompts: str | None = None
    """Its block, if it isn't the experiment's."""
    run: str = "clean"
    """The run of that block."""
    model: str | None = None
    """Its model, if it isn't the experiment's."""
    shuffled: bool = False
    """Whether its rows are randomly assigned to those of the sampled block instead of by number."""


class DerivedRun(Spec):
    """`run healed { from clean into noised  patch … }`: a run with rules, all at once."""

    name: str
    source: str | None = None
    base: str = "clean"
    rules: tuple[Rule, ...] = ()


class Save(Spec):
    """`save SITE of RUN at POSITIONS to "FILE" as TYPE`: activations or gradients that are written
    to a file, or the rows in which features are most active."""

    site: SiteText
    at: PositionsText
    run: str | None = None
    """None: the experiment's base run."""
    file: str
    dtype: str | None = None
    """None: the dtype of the computation, or float32 for a mean."""
    mean: bool = False
    """Whether the mean over rows is saved."""
    rows: int | None = None
    """Number of rows that are saved for each feature, instead of vectors."""
    gradient: Measure | None = None
    """The metric whose gradients with respect to the site are saved, instead of its vectors."""

    @property
    def what(self) -> str:
        """The saved vectors in words: `resid_post layer 3`."""
        site = self.site.span.written
        return site if self.metric is None else f"gradient of {self.metric} by {site}"

    @property
    def metric(self) -> str | None:
        """The metric whose gradients are saved, and its position if it is named."""
        if self.gradient is None:
            return None
        place = self.gradient.place
        return self.gradient.label if place is None else f"{self.gradient.label} at {place}"

    def stored_dtype(self, computed: str) -> str:
        """Return the dtype of the file's vectors.

        Args:
            computed: The dtype of the computation. A mean has more precision than its vectors.
        """
        return self.dtype or ("float32" if self.mean else computed)


class SavedDirection(Spec):
    """`save direction NAME to "FILE" as TYPE`: a direction that is written to a file."""

    direction: ExprText
    """Its name, or a member of a family: `refusal[layer 3]`."""
    name: str
    """Name of its definition."""
    file: str
    dtype: str | None = None
    """None: float32."""

    @property
    def stored_dtype(self) -> str:
        """The dtype of the file's vectors."""
        return self.dtype or "float32"


class Experiment(Spec):
    """One experiment: everything that its block says, with the file's names bound.

    One that compares several models, sources, bases or seeds is several of these, each a
    `variant`.
    """

    name: str
    """Name of the block; for one of its several results, `BLOCK.OBSERVATION`."""
    within: str | None = None
    """Name of the block, for one of its results."""
    variant: tuple[tuple[str, int | str], ...] = ()
    """The variant: (`model`, `source`, `base` or `seed`; its label), which are axes of the
    results."""
    seeds: tuple[int, ...] = ()
    """Seeds of the groups, circuits, lenses and probes that it uses, if they have several."""
    model: str
    prompts: str
    part: Literal["train", "test"] | None = None
    limit: int | None = None
    replies: RepliesOf | None = None
    """The replies that are appended to its prompts."""
    source: str | None = None
    base: str = "clean"
    elsewhere: tuple[ExternalRunSpec, ...] = ()
    """All external runs that it reads, writes or measures."""
    derived: tuple[DerivedRun, ...] = ()
    """Runs that it defines; each follows those it uses."""
    loops: tuple[Loop, ...] = ()
    rules: tuple[Rule, ...] = ()
    everything: tuple[Rule, ...] = ()
    """The rules as they ablate everything that a circuit of nodes is chosen from, if an effect is
    measured relative to that run; filled in when the experiment is checked."""
    keep: tuple[ExprText, ...] = ()
    measures: tuple[Measure, ...]
    saves: tuple[Save, ...] = ()
    saved_directions: tuple[SavedDirection, ...] = ()
    statistics: Statistics
    against: Control | None = None
    without_control: NoControl | None = None
    estimator: Estimator | None = None
    """The estimator of effects; None: every cell is run."""
    generation: Generation | None = None
    """The text generation after each prompt, if any."""
    reports: tuple[Report, ...] = ()
    expects: tuple[Expectation, ...] = ()
    broken: bool = False
    """Whether a statement was rejected: the experiment is only checked for further errors."""
    differentiated: Literal["edited runs", "clean run", "nowhere"] = "edited runs"
    """Where a training takes gradients of the measure."""
    backward: BackwardRules | None = None
    """Changes of the derivatives of these gradients."""
    gradient_path: Literal["inputs", "activations"] | None = None
    """What moves between two runs while a training scores edges; None if nothing moves."""
    fixes_attention: bool = False
    """Whether a training scores edges by exact attention weights."""
    drops_layers: bool = False
    """Whether a training scores edges with the gradient of one layer after another left out."""
    trains: str = ""
    """`fit(das(…))` for the rows, the patch and the measure of a training, which no user sees."""

    @property
    def key(self) -> str:
        """Its name with its variant: `e (source: other, base: fewer)`."""
        said = ", ".join(f"{axis}: {label}" for axis, label in self.variant)
        return f"{self.name} ({said})" if said else self.name

    @property
    def every_rule(self) -> tuple[Rule, ...]:
        """Its own rules and those of the runs that it defines."""
        return (*(rule for run in self.derived for rule in run.rules), *self.rules)

    after: tuple[str, ...] = ()
    """Experiments whose results it uses: `top 10 of cie`, `with replies of writes`."""
    called: Mapping[str, Mapping[str, MapText]] = field(default_factory=dict)
    """`for` variable over experiments → word → the experiment, or some of its cells."""

    @property
    def over(self) -> str | None:
        """The common axis of its measures' averages or curves."""
        return self.measures[0].over if self.measures else None

    @property
    def area(self) -> bool:
        """Whether its measures are the areas under the curves."""
        return bool(self.measures) and self.measures[0].area


class Program(Spec):
    """A file with everything it imports."""

    files: Paths = ()
    """The file itself, if it has a path, and its imports."""
    sources: Sources = ()
    """Contents of the files, imports first; also of a text without a path."""
    models: dict[str, Model] = field(default_factory=dict)
    checkpoints: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Model with a `*` in its path → names of the matching models."""
    edits: dict[str, Experiment] = field(default_factory=dict)
    """Edited model → its edits, as rules of an experiment on its base."""
    objectives: dict[str, Experiment] = field(default_factory=dict)
    """Basis or group that is trained on a measure → its rows, its rule and the measure, as an
    experiment without a model."""
    masks: dict[str, Basis] = field(default_factory=dict)
    """Group that a training chooses → its `fit(…)`, with the sites that it chooses from."""
    positions: dict[str, Group] = field(default_factory=dict)
    """Groups of positions in files, by name."""
    prompts: dict[str, Prompts] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    circuits: dict[str, Circuit] = field(default_factory=dict)
    discovered: frozenset[str] = frozenset()
    """Circuits that experiments discover, and groups that they search for: a run trains them
    first."""
    directions: dict[str, Direction] = field(default_factory=dict)
    bases: dict[str, Basis] = field(default_factory=dict)
    metrics: dict[str, ExprText] = field(default_factory=dict)
    """Metrics that the file defines; measures contain their expansion."""
    parameters: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Values of parameters; a percentage remains a percentage."""
    experiments: tuple[Experiment, ...] = ()
    rule_functions: Names = ()
    """Names of functions that the caller passes for rules."""
    seed: int = 0
    lost: Losses = ()
    """Statements of the file and its imports that can't be parsed."""
    failed: Names = ()
    """Directions and bases whose definitions have errors."""
    trained: TrainedFiles = field(default_factory=dict)
    """Trainings of `fit(…)` that were found in the store, by name: the file of a dictionary, of a
    rotation or of a mask, and how well it was trained."""

    @property
    def position_groups(self) -> frozenset[str]:
        """Names of the groups of positions, which a training chooses or a file lists."""
        chosen = (name for name, mask in self.masks.items() if mask.chooses_positions)
        return frozenset((*chosen, *self.positions))

    @property
    def numbers(self) -> dict[str, int | float]:
        """The parameters that are numbers."""
        return {k: v for k, v in self.parameters.items() if isinstance(v, int | float)}


def program_schema() -> dict[str, Any]:
    """Return the JSON schema of a program, in which expressions are texts."""
    from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, create_model
    from pydantic.json_schema import SkipJsonSchema

    class Part(BaseModel):
        model_config = ConfigDict(extra="forbid")

    written: Any = Annotated[Any, WithJsonSchema({"type": "string"})]
    hidden: Any = SkipJsonSchema[Any]
    names: dict[str, Any] = {**globals()}
    names |= dict.fromkeys(_WRITTEN_AS_TEXT, written) | dict.fromkeys(_WITHOUT_JSON, hidden)
    kinds = Spec.__subclasses__()
    for kind in kinds:
        parts: dict[str, Any] = {}
        for each in fields(cast("Any", kind)):
            made = each.default_factory
            default = each.default if each.default is not MISSING else ...
            own = Field(default_factory=made) if made is not MISSING else Field(default)
            parts[each.name] = (each.type, own)
        names[kind.__name__] = create_model(
            kind.__name__, __base__=Part, __doc__=kind.__doc__, **parts
        )
    for kind in kinds:
        names[kind.__name__].model_rebuild(_types_namespace=names)
    return names[Program.__name__].model_json_schema()


Constant: TypeAlias = int | float | str | bool

BOOLEAN_WORDS: Mapping[str, bool] = {"true": True, "false": False}


def constant_value(node: object, parameters: Mapping[str, Constant]) -> Constant | None:
    """Return the value of a literal, a parameter or a negative number; None for other nodes."""
    match node:
        case ast.Number(value=value) | ast.String(value=value):
            return value
        case ast.Percent(value=value):
            return Percent(value)
        case ast.Name(id=name):
            return parameters.get(name, BOOLEAN_WORDS.get(name, None))
        case ast.Negative(operand=operand):
            inner = constant_value(operand, parameters)
            return -inner if is_number(inner) else None
        case _:
            return None


def call_constants(call: ast.Call, parameters: Mapping[str, Constant]) -> dict[str, Constant]:
    """Return the constants of a call's named arguments."""
    return {
        argument.name: value
        for argument in call.arguments
        if argument.name is not None
        and (value := constant_value(argument.value, parameters)) is not None
    }


def whole_number_value(node: int | str | None, parameters: Mapping[str, Constant]) -> int | None:
    """Return a count given as a number or as the name of a parameter."""
    if isinstance(node, str):
        value = parameters.get(node)
        return value if is_integer(value) else None
    return node


CLEAN = "clean"

PROMPTS_AXIS = "prompts"
"""The axis over several prompt blocks."""

SEED_AXIS = "seed"
"""The axis of the trainings of `fit(…, seeds: 3)`."""

ONE_CELL_HINT = "a `run` has one cell: name one layer, head and position, or join them (`layers`)"
"""Hint for a sweep in a run."""


@dataclass
class Definitions:
    """Definitions by the top-level statements of all files so far."""

    parameters: dict[str, Constant] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    checkpoints: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Model with a `*` in its path → names of the matching models."""
    edits: dict[str, Experiment] = field(default_factory=dict)
    """Edited model → its edits."""
    objectives: dict[str, Experiment] = field(default_factory=dict[str, Experiment])
    """Basis or group that is trained on a measure → its rows, its rule and the measure."""
    masks: dict[str, Basis] = field(default_factory=dict[str, Basis])
    """Group that a training chooses → its `fit(…)`."""
    positions: dict[str, Group] = field(default_factory=dict[str, Group])
    """Groups of positions in files, by name."""
    prompts: dict[str, Prompts] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    circuits: dict[str, Circuit] = field(default_factory=dict[str, Circuit])
    directions: dict[str, Direction] = field(default_factory=dict)
    bases: dict[str, Basis] = field(default_factory=dict)
    metrics: dict[str, ast.Expr] = field(default_factory=dict)
    rule_functions: dict[str, ast.Call] = field(default_factory=dict)
    """Functions that the caller passes for rules."""
    experiments: list[Experiment] = field(default_factory=list)
    seed: int = 0
    seeded: Span | None = None
    """Location of the seed; a file's own seed follows and replaces those of its imports."""
