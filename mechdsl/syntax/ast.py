"""The abstract syntax tree: frozen records, one per construct, each with its span.

Comparison ignores spans, so two texts with the same meaning give equal trees. Names are strings
here; `resolve` binds them.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Literal

from mechdsl.base.records import Record
from mechdsl.base.text import Span
from mechdsl.syntax.forms import statement


class Node(Record, kw_only=True):
    span: Span = field(compare=False, repr=False)


class Name(Node):
    id: str


class Ref(Node):
    """`fruit` or `fruit.train`."""

    name: str
    part: str | None = None

    @property
    def whole(self) -> str:
        """The name with its part."""
        return self.name if self.part is None else f"{self.name}.{self.part}"


# --- expressions -------------------------------------------------------------------------


class Number(Node):
    value: int | float


class Percent(Node):
    """`50%` has value 50."""

    value: float


class String(Node):
    value: str


class ShortSite(Node):
    """`L9H9`, `L9H9.q`, `L3.mlp`, `L3N512`: layer, unit letter and number, component."""

    layer: int
    unit: Literal["H", "N"] | None = None
    index: int | None = None
    component: str | None = None


class QualifiedRef(Node):
    """`answer of fewer`."""

    name: str
    of: Ref


class ExperimentMeasure(Node):
    """`delta of ld of other`: a measure of another experiment. A name that only refers to an
    observation is resolved to one when its experiment is known."""

    measure: Expr
    experiment: Name


class Attribute(Node):
    """`item.index`."""

    name: str
    attribute: str


class Index(Node):
    """`xs[2]`, `refusal[best of select]`, `refusal[layer 3, token -1]`."""

    name: str
    index: Expr | RankedSelection | Coordinates


class Coordinate(Node):
    """`layer 3`, `token -1`, `layer l`: a value of an axis, or a name for a value."""

    word: str
    value: int | str


class Coordinates(Node):
    """`layer 3, token -1`: a member of a family of directions."""

    items: tuple[Coordinate, ...]


class Argument(Node):
    """`sep: ", "`, `std: 3 sd of subject`, or a positional one (`name` None)."""

    name: str | None
    value: ArgumentValue


class Quantity(Node):
    """`3 sd`, `3 sd of subject`."""

    value: float
    unit: str
    of: str | None = None


class Call(Node):
    """`list(item, count, sep: " ")`. A call without arguments and brackets is a `Name`."""

    name: str
    arguments: tuple[Argument, ...]


class ListLiteral(Node):
    """`["a", "b"]`, `[1..3, 7]`."""

    items: tuple[Expr | Range, ...]


class EdgeTokenOf(Node):
    """`first token of answer`."""

    which: Literal["first", "last"]
    of: Expr


class ClassOutput(Node):
    """`class answer`, `class "positive"`, `class 5`: an output of a classifier."""

    of: Expr


class Negative(Node):
    operand: Expr


class Binary(Node):
    operator: Literal["+", "-", "*", "/"]
    left: Expr
    right: Expr


class Conditional(Node):
    condition: Expr
    then: Expr
    otherwise: Expr


class Range(Node):
    """`2..9`, both ends included."""

    low: Expr
    high: Expr


class Compare(Node):
    """`=` is equality."""

    operator: Literal["<", "<=", ">", ">=", "=", "!="]
    left: Expr
    right: Expr


class InRange(Node):
    value: Expr
    within: Range | Expr


class Near(Node):
    """`relative near -0.67 within 0.05`."""

    value: Expr
    target: Expr
    tolerance: Expr


class Logical(Node):
    operator: Literal["and", "or"]
    left: Expr
    right: Expr


class Not(Node):
    operand: Expr


Expr = (
    Number
    | Percent
    | String
    | Name
    | ShortSite
    | QualifiedRef
    | ExperimentMeasure
    | Attribute
    | Index
    | Call
    | ListLiteral
    | EdgeTokenOf
    | ClassOutput
    | Negative
    | Binary
    | Conditional
    | Compare
    | InRange
    | Near
    | Logical
    | Not
)


class Domain(Node):
    """The domain of `x in …` and `for x in …`: `3..9`, `["a"]`, `0%..100% step 5%`."""

    values: Expr | Range
    step: Expr | None = None


# --- sites --------------------------------------------------------------------------------


class Star(Node):
    """`*`: every existing value."""


class Bound(Node):
    """One end of an axis range: `3`, `-1`, `50%`, `l`, `l + 1` (`name` with `offset`)."""

    value: int | None = None
    percent: float | None = None
    name: str | None = None
    offset: int = 0


class AxisRange(Node):
    """`10..20`, `0..30 step 2`, or one value (`high` None)."""

    low: Bound
    high: Bound | None = None
    step: int = 1

    def numbers(self, low: int, high: int) -> range:
        """Return the numbers from one end to the other, `high` included."""
        return range(low, high + 1, max(1, self.step))


AxisWord = Literal["layer", "head", "neuron", "expert", "feature", "dim"]

STANDARD_BASIS = "the standard basis"
"""Name of the basis of `dims 0..7` without another one: the numbers of the vector."""


class Axis(Node):
    """`layer 10..20`, `heads 0, 3`, `layer * window 9`, `feature 12, 55 of res8`, `dims 0..7`."""

    word: AxisWord
    plural: bool
    values: tuple[AxisValue, ...]
    window: int | str | None = None
    of: str | None = None


class Site(Node):
    """Component and axes. `names` are the words before the first axis that isn't `layer`-like:
    one name is a component (`resid_post`) or a stack (`vision`), two are component and stack; the
    registries decide which. A `group` name (`name_movers`) is a lone name in `names`, after a
    component at the end of a path (`q name_movers`, `q of top 2 of cie`).
    """

    names: tuple[Name, ...] = ()
    axes: tuple[Axis, ...] = ()
    short: ShortSite | None = None
    ranked: RankedSelection | None = None
    basis: str | None = None
    excluded: tuple[Site | AxisRange, ...] = ()
    """Sites that are left out; numbers are values of the last axis."""

    @property
    def circuit_name(self) -> str | None:
        """The name that may be that of a circuit: `c`, or `top 5 of c`."""
        if self.ranked is not None:
            return self.ranked.of
        return None if self.bare is None else self.bare.id

    @property
    def bare(self) -> Name | None:
        """The name, if the site consists of one alone."""
        one = len(self.names) == 1 and not self.axes and self.short is None and self.ranked is None
        return self.names[0] if one else None

    @property
    def basis_name(self) -> str | None:
        """The basis whose coordinates it names: `resid_post in basis b`, `feature 3 of b`."""
        named = next((axis.of for axis in self.axes if axis.of is not None), self.basis)
        return STANDARD_BASIS if named is None and self.coordinates is not None else named

    @property
    def coordinates(self) -> Axis | None:
        """The axis that names coordinates: `feature 3 of b`, `dims 0..7`."""
        return next((axis for axis in self.axes if axis.word in ("feature", "dim")), None)


class SiteMap(Node):
    """`resid_post layer 0 -> resid_post layer 2`: the map from one site to a later one; or an edge
    of a circuit."""

    source: Site
    target: Site
    at: Position | None = None
    """`embed -> L0H1.q at last token`: the tokens of the receiver that an edge of a circuit leads
    to; None for all tokens."""


class SiteView(Node):
    """`resid_post layer 2 of fewer at last token`: a site in another run, or at other tokens."""

    site: Site
    run: Ref | None = None
    at: Positions | None = None


SiteValue = Site | SiteMap | SiteView
"""Sites as the value of an argument."""

ArgumentValue = Expr | Range | Quantity | SiteValue


class RankedSelection(Node):
    """`top 10 of cie`, `top 25% of caap(a: 1, b: b)`, `best of select`."""

    which: Literal["top", "best"]
    amount: int | str | Percent | None
    of: str
    cell: tuple[Argument, ...] = ()
    """The selected cell, if not all cells are meant."""


AxisValue = Star | AxisRange | RankedSelection
"""All coordinates, some of them, or the best features of another experiment."""


# --- positions ------------------------------------------------------------------------------


class Variable(Node):
    """A named number (of a `for` or a `param`) in a position: `i`, `-i`, `i + 1`."""

    name: str
    negative: bool = False
    offset: int = 0


class Occurrence(Node):
    """`item 3`, `item 2..4`, `item *`, `item i`, `row r..r + 1`: 1-based; `low` None is `*`."""

    low: int | Variable | None
    high: int | Variable | None = None


class ImageView(Node):
    """A part of an image that its processor prepares separately: `tile 2`, `thumbnail`; or of a
    sound: `frame 3`."""

    number: Occurrence | None = None
    """The number of a tile or frame; None is the thumbnail."""
    is_frame: bool = False


class SpanRef(Node):
    """A named span: `subject`, `item 3`, `last-item of part1`, `"Answer"`, `image row 3 col 4`."""

    name: str | None = None
    literal: str | None = None
    occurrence: Occurrence | None = None
    edge: Literal["first", "last"] | None = None
    view: ImageView | None = None
    row: Occurrence | None = None
    col: Occurrence | None = None
    of: str | None = None


class TokenIndex(Node):
    """`token 5`, `token -2`, `tokens *`, `token 2..6`, `token i`, `token -i`."""

    plural: bool
    low: int | Variable | None
    """None is `*`."""
    high: int | None = None


class SpanTokens(Node):
    """`subject token`, `subject tokens`, `each item token`, `reply token 3`."""

    of: SpanRef
    plural: bool
    each: bool = False
    low: int | None = None
    """`reply token 3`, `reply tokens 2..4`: the 1-based numbers of the span's tokens."""
    high: int | None = None


class EachTokenOf(Node):
    """`each token of subject`."""

    of: SpanRef


class EdgeToken(Node):
    """`last token`, `first token of subject`."""

    which: Literal["first", "last"]
    of: SpanRef | None = None


class RankedTokens(Node):
    """`top 25% of caap tokens`."""

    ranked: RankedSelection
    plural: bool


class PositionUnion(Node):
    """`{A, B}`."""

    items: Positions


class ChosenTokens(Node):
    """`movers tokens`, `each movers token`: what a training chooses from some positions.

    A file has the name of a group instead, until the choice for an experiment's model is known.
    """

    name: str
    items: Positions
    """What the training chooses from."""
    labels: tuple[str, ...] | None
    """Labels of the chosen positions; None until the candidates are known, for all."""
    plural: bool


class EachStep(Node):
    """`each step`: every position at which a token of a reply is predicted."""


PointBase = (
    TokenIndex
    | SpanTokens
    | EachTokenOf
    | EdgeToken
    | RankedTokens
    | PositionUnion
    | ChosenTokens
    | EachStep
)


class Point(Node):
    """A base with an offset in tokens: `subject token + 1`, `last token - i`."""

    base: PointBase
    offset: int | Variable = 0


class Between(Node):
    """`tokens between A and B`, `each token between A and B`; both ends included."""

    each: bool
    low: Point
    high: Point


class Except(Node):
    """`tokens except P`, `each token except P`."""

    each: bool
    excluded: Point | Between | Except | None
    """None for all tokens that P is chosen from, which no file writes."""


class Position(Node):
    """One item of a position list. A bare number after a `token` item is a `TokenIndex` too."""

    body: Point | Between | Except
    align: str | None = None
    and_answer: bool = False
    """`tokens * and answer`."""


class Positions(Node):
    """`A, B`: a sweep over its items."""

    items: tuple[Position, ...]


# --- prompts and images -----------------------------------------------------------------------


@statement("{names:new_names} in {domain}", "domained")
class DomainDef(Node):
    """`x in DOMAIN`."""

    names: tuple[Name, ...]
    domain: Domain


@statement("{names:new_names} = {value:expr}", "derived")
class ValueDef(Node):
    """`a, b = EXPR`."""

    names: tuple[Name, ...]
    value: Expr


@statement("template {text:string}", "template")
class Template(Node):
    """`template "…"`. `template in […]` is a `DomainDef` of the name `template`."""

    text: String


@statement("{role:word} {text:string}", "turn")
class ChatTurn(Node):
    role: str
    text: String


@statement("chat {turns:block}", "chat")
class Chat(Node):
    turns: tuple[ChatTurn | Argument, ...]
    """Turns, and arguments of the template: `enable_thinking: false`."""


@statement("rows {source:sum} [{distinct:flag} | {streamed:flag}]", "rows")
class RowsLine(Node):
    source: Expr
    distinct: bool = False
    """Keep only the first of equal records."""
    streamed: bool = False
    """Read the file in parts."""


class RenameLine(Node):
    """`rename { subj = subject, obj = "the object" }`: (new name, column)."""

    pairs: tuple[tuple[Name, Name | String], ...]


@statement("where {condition}", "where")
class WhereLine(Node):
    condition: Expr


@statement("split {percent}", "split")
class SplitLine(Node):
    percent: Percent


class Text(Node):
    """`answer EXPR`, `wrong EXPR` and `text NAME = EXPR` (`name` is then NAME)."""

    name: Name
    value: Expr


@statement("span {name:new} (in {within:name} | = {literal:string})", "span_def")
class SpanDef(Node):
    """`span subject in prompt` (`within`) or `span slot = "thing"` (`literal`)."""

    name: Name
    within: Name | None = None
    literal: String | None = None


class ChangeLine(Node):
    """A line of `corrupt` that begins with a word: `swap a, b`, `replace item tokens with "thing"`,
    `add gaussian(std: 3 sd) to embed at subject tokens`, `insert 4 tokens before last token with
    " x"`.

    The word's entry in `vocab.corruptions` defines which parts it takes and their effect.
    """

    word: str
    values: tuple[ChangeValue, ...] = ()
    tokens: Positions | None = None
    """Set if positions follow the word instead of values."""
    to: Site | None = None
    at: Positions | None = None
    before: Positions | None = None
    """Set if `tokens before` follows a number."""
    after: Positions | None = None
    given: Expr | None = None
    """The value after `with`."""
    by: Expr | None = None
    radius: int | float | str | None = None


ChangeValue = Name | Call | String | Number | Percent

CorruptLine = ValueDef | ChangeLine


@statement("corrupt {name:new} {changes:block}", "corrupt")
class Corrupt(Node):
    name: Name
    changes: tuple[CorruptLine, ...]


@statement("image (from {source:ref} | [{name:new} =] {value:sum})", "image")
class ImageLine(Node):
    """`image from IMAGES`, `image gray`, `image "{file}"`, `image photo = shapes(…)`."""

    value: Expr | None = None
    source: Ref | None = None
    name: Name | None = None
    """Name of an image within prompts."""


@statement("video {name:new} = {value:sum}", "video")
class VideoLine(Node):
    """`video clip = ["{kind}-1.png", "{kind}-2.png"]`, `video clip = "{folder}"`."""

    name: Name
    value: Expr


@statement("audio {name:new} = {value:sum}", "audio")
class AudioLine(Node):
    """`audio a = "{file}"`, `audio a = tone(440)`."""

    name: Name
    value: Expr


@statement("tiles {rows:count} by {cols:count} [whole=and whole]", "tiles")
class TilesLine(Node):
    """`tiles 2 by 3 and whole`."""

    rows: int | str
    cols: int | str
    whole: bool = False


@statement("region {name:new} [of {image:name}] = {column:name}", "region")
class RegionLine(Node):
    name: Name
    column: Name
    image: Name | None = None
    """The image that it is a part of, among several in a prompt."""


@statement("classes {text:string}", "classes")
class ClassesLine(Node):
    """`classes "a photo of a {kind}"`."""

    text: String


DataLine = (
    DomainDef
    | ValueDef
    | Template
    | Chat
    | RowsLine
    | RenameLine
    | WhereLine
    | SplitLine
    | Text
    | SpanDef
    | Corrupt
    | ImageLine
    | VideoLine
    | AudioLine
    | TilesLine
    | RegionLine
    | ClassesLine
)


# --- rules and other statements of an experiment ------------------------------------------------


class Edge(Node):
    """`attention layer * head * from Q to K`, `attention movers from Q to K`."""

    stack: Name | None
    axes: tuple[Axis, ...]
    queries: Positions
    keys: Positions
    heads: Site | None = None
    """A group, a short name or another experiment's result, instead of axes."""


@statement(
    "patch {site} at {at:positions} [onto {onto:positions}] [into layer "
    "{into_layer:axis_value}] [with {source:ref} | {features:other_features}]",
    "patch",
)
class Patch(Node):
    site: Site
    at: Positions
    onto: Positions | None = None
    into_layer: Star | AxisRange | None = None
    source: Ref | None = None
    features: Axis | None = None
    """Features of another basis that come in, instead of those of a run."""


@statement("{fill:sum} [by {by:name}]", "fill")
class Fill(Node):
    """One of several fills of an ablation."""

    fill: Expr
    by: Name | None = None


@statement(
    "ablate [all_but='all but'] {site} [without_edge=without each edge] at {at:positions} "
    "with {fill:sum} [by {by:name}] {more:further}",
    "ablate",
)
class Ablate(Node):
    """`fill` is `zero`, `mean`, `resample` (a `Name`) or `mean of x` (a `QualifiedRef`); `by` is a
    name. With `more` fills, they form an axis."""

    site: Site
    at: Positions
    fill: Expr
    by: Name | None = None
    more: tuple[Fill, ...] = ()
    all_but: bool = False
    """Whether all edges of the model but those of a circuit are ablated."""
    without_edge: bool = False
    """Whether each edge of the circuit is left out of it, one after the other."""


@statement("replace {at:positions} with {value:sum}", "replace_tokens")
class ReplaceTokens(Node):
    at: Positions
    value: Expr


@statement(
    "replace block [{stack:name}] {axis} with "
    "({word:name} | block [{source_stack:name}] layer {source:axis_value})",
    "replace_block",
)
class ReplaceBlock(Node):
    """`replace block layer 2 with block layer 1`, or with a word, `identity`; a block of another
    stack as `block vision layer 2`."""

    axis: Axis
    word: Name | None = None
    source: Star | AxisRange | None = None
    stack: Name | None = None
    source_stack: Name | None = None


@statement("block {edge}", "block")
class BlockEdge(Node):
    edge: Edge


@statement("reweight {edge} by {factor:sum}", "reweight")
class Reweight(Node):
    edge: Edge
    factor: Expr


@statement("set {edge} to {value:sum}", "set_edge")
class SetEdge(Node):
    edge: Edge
    value: Expr


@statement("allow {edge}", "allow")
class Allow(Node):
    edge: Edge


@statement("renumber {at:positions} from {start:sum}", "renumber")
class Renumber(Node):
    """`renumber subject tokens from 5`."""

    at: Positions
    start: Expr


class ObserveAttention(Node):
    """`observe attention layer * head * of fewer from last token to a token as attn`."""

    edge: Edge
    run: Ref | None = None
    name: Name | None = None
    what: Name | None = None
    """A flow between positions other than attention: `rollout`."""
    by: Name | None = None
    """The factor that attention weights are multiplied by: `value_norm`."""


class ActivationRead(Node):
    """`0.5 * value(mlp_out layer 2 at POSITIONS) of RUN`."""

    site: Site
    at: Positions | None = None
    of: Ref | None = None
    factor: Expr | None = None


class StepFraction(Node):
    """`0.5 * step(q)`."""

    component: Name
    factor: Expr | None = None


@statement("set {site} at {at:positions} to {value:written}", "set_site")
class SetSite(Node):
    site: Site
    at: Positions
    value: Expr | ActivationRead


@statement(
    "path {sender:site} -> {receiver:site} at {at:positions} [through {through:names}] "
    "[frozen=with 'frozen norms']",
    "path",
)
class PathRule(Node):
    sender: Site
    receiver: Site
    at: Positions
    through: tuple[Name, ...] = ()
    frozen: bool = False
    """`with frozen norms`"""


@statement("add {value:written} to {site} at {at:positions}", "add")
class Add(Node):
    value: Expr | ActivationRead | StepFraction
    site: Site
    at: Positions


@statement("scale {site} at {at:positions} by {factor:sum}", "scale")
class Scale(Node):
    site: Site
    at: Positions
    factor: Expr


class ProjectOut(Node):
    """`project out DIRECTION from SITE at POSITIONS`, `project out DIRECTION from weights`, or
    `project out feature 3 of b at POSITIONS`."""

    direction: Name | Index | None
    """None for the directions of coordinates, which the site names."""
    site: Site | None
    """None for `from weights`."""
    at: Positions | None


class EditWeights(Node):
    """`scale weights of SITE by …`, `set weights of SITE to …`, `add … to weights of SITE`."""

    verb: Literal["scale", "set", "add"]
    site: Site
    value: Expr


@statement("project {site} at {at:positions} onto {direction}", "project_onto")
class ProjectOnto(Node):
    site: Site
    at: Positions
    direction: Name | Index


@statement("clamp [{direction} of] {site} at {at:positions} to {value:sum}", "clamp")
class Clamp(Node):
    """`clamp SITE …`, or `clamp DIRECTION of SITE …`."""

    site: Site
    at: Positions
    value: Expr
    direction: Name | Index | None = None


@statement("swap {site} at {at:positions} with {other:positions}", "swap_sites")
class SwapSites(Node):
    site: Site
    at: Positions
    other: Positions


@statement("freeze {site} at {at:positions}", "freeze")
class Freeze(Node):
    site: Site
    at: Positions


@statement(
    "{verb:name} {site} at {at:positions} [{before:word} {value:sum}]",
    "registered",
)
class RegisteredRule(Node):
    """`nudge SITE at POSITIONS by SUM`: a rule whose verb is registered."""

    verb: Name
    site: Site
    at: Positions
    before: Literal["", "to", "by"] = ""
    """The word before the value; empty without one."""
    value: Expr | None = None


AnySiteRule = (
    Ablate | SetSite | Add | Scale | ProjectOnto | Clamp | SwapSites | Freeze | RegisteredRule
)
"""Rules with a site, positions and their own fields."""

RuleBody = (
    Patch
    | Ablate
    | ReplaceTokens
    | ReplaceBlock
    | BlockEdge
    | Reweight
    | SetEdge
    | Allow
    | Renumber
    | SetSite
    | PathRule
    | Add
    | Scale
    | EditWeights
    | ProjectOut
    | ProjectOnto
    | Clamp
    | SwapSites
    | Freeze
    | RegisteredRule
)


class During(Node):
    """`during prefill`, `during each step`, `during step 2..s + 1`, `after prefill`."""

    phase: Literal["named", "each step", "step", "after prefill"]
    name: str | None = None
    steps: Star | AxisRange | None = None


class Rule(Node):
    body: RuleBody
    during: During | None = None
    drops_error: bool = False
    """`without error`: what the basis doesn't represent is dropped."""


@statement("model {models:refs}", "use_model")
class UseModel(Node):
    """`model toy` inside an experiment."""

    models: tuple[Ref, ...]


@statement(
    "{kind:word} {prompts:refs} [limit {limit:count}] [with replies of {replies:call_or_name}]",
    "use_prompts",
)
class UsePrompts(Node):
    kind: Literal["prompts", "images"]
    prompts: tuple[Ref, ...]
    limit: int | str | None = None
    replies: Call | Name | None = None
    """The experiment whose replies are appended to the prompts: `with replies of writes(c: 1)`."""


@statement("from {sources:refs} [{shuffled:word_itself}] into {bases:refs}", "from_into")
class FromInto(Node):
    sources: tuple[Ref, ...]
    bases: tuple[Ref, ...]
    shuffled: Name | None = None
    """The word, if it follows the sources."""


@statement("keep {condition}", "keep")
class Keep(Node):
    condition: Expr


@statement("for {name:new} in {domain} {body:block}", "for_loop")
class For(Node):
    name: Name
    domain: Domain
    body: tuple[Statement, ...]


@statement("against {control:call} [except {apart:sites}]", "against")
class ControlLine(Node):
    """`against random(39) except top 5 of X, movers`; sites in `apart` are never drawn."""

    control: Call
    apart: tuple[Site, ...] = ()


@statement("{name} {value:number_or_name}", "setting")
class GenerationSetting(Node):
    """`temperature 0.7`"""

    name: Name
    value: Number | Name


class Generate(Node):
    """`generate 40 with temperature 0.7, samples 3 until "\\n"`"""

    tokens: int | str
    settings: tuple[GenerationSetting, ...] = ()
    stops: tuple[String, ...] = ()


@statement("{how:word} {amount:count}", "pick")
class Pick(Node):
    """`top 20`, `random 20` after `verify`."""

    how: str
    amount: int | str


@statement(
    "using {estimator:call_or_name} [verify until top {top:count} {confidence:percent} | verify "
    "until {stable:flag} | verify {verify:picks}]",
    "using",
)
class Using(Node):
    estimator: Call | Name
    verify: tuple[Pick, ...] = ()
    top: int | str | None = None
    confidence: Percent | None = None
    stable: bool = False


class FeaturesOf(Node):
    """`features of f`: all features of a dictionary."""

    basis: Name


@statement(
    "discover {what:name} over {over:nodes} [at {at:positions}] using {using:call_or_name} [until "
    "{until:condition} | top {top:count} {unit:name}]",
    "discover",
)
class Discover(Node):
    what: Name
    over: tuple[Name | FeaturesOf, ...]
    using: Call | Name
    at: Positions | None = None
    until: Expr | None = None
    top: int | str | None = None
    unit: Name | None = None


@statement("search {how:name} {what:name} up to {up_to:count}", "search")
class Search(Node):
    how: Name
    what: Name
    up_to: int | str


@statement(
    "observe features of {basis:name} [of {run:ref}] at {at:positions} [top {top:count}] [by "
    "{by:call_or_name}] [as {name}]",
    "observe_features",
)
class ObserveFeatures(Node):
    """`observe features of f of fewer at last token top 10 by correlation(count) as strongest`."""

    basis: Name
    at: Positions
    run: Ref | None = None
    top: int | str | None = None
    by: Name | Call | None = None
    """What the features are ranked by."""
    name: Name | None = None


class MapOf(Node):
    """An experiment's value of each patch, one map per row; `0.5 * caap` in a sum."""

    of: str
    cell: tuple[Argument, ...] = ()
    """The selected cell, if not all cells are meant."""
    weight: Expr | None = None


@statement(
    "observe {what:name} of {maps} (in {region} [top {share:percent}] | to {others:maps} | at "
    "{at:positions}) [as {name}]",
    "observe_maps",
)
class ObserveMaps(Node):
    """`observe iou of caap, occlusion in object top 25% as overlap`, or `… of caap to taken`, or
    `observe sum of caap, 0.5 * occlusion at each token of image as both`."""

    what: Name
    maps: tuple[MapOf, ...]
    region: Name | Position | None = None
    """The comparison: a region of images, tokens of texts, or other experiments."""
    others: tuple[MapOf, ...] = ()
    share: Percent | None = None
    at: Positions | None = None
    name: Name | None = None


@statement(
    "observe {what:observed} [at] {site} [of {run:ref}] [with {compared:site}] [toward "
    "{toward:sum}] [at {at:positions}] [with {other:positions}] [top {top:count}] [as {name}]",
    "observe",
)
class Observe(Node):
    """`observe logit_lens resid_post layer * at last token top 3`."""

    what: Call | Name
    site: Site
    toward: Expr | None = None
    at: Positions | None = None
    other: Positions | None = None
    top: int | str | None = None
    run: Ref | None = None
    """The observed run, if it isn't the run that the rules modify."""
    name: Name | None = None
    compared: Site | None = None
    """The site to compare with: `with attn_out layer *`."""


AnyObserve = ObserveAttention | ObserveFeatures | ObserveMaps | Observe


class Measure(Node):
    metric: Expr
    effect: Name
    at: Position | None = None
    per: Name | None = None
    over: Name | None = None
    """The axis of the average or of the curve."""
    area: bool = False
    """Report the area under the curve instead of the mean."""


class Stats(Node):
    """`stats bootstrap(10000) test flips confidence 95% correct holm verdicts holm by template`;
    every part is optional."""

    resampling: Call | None = None
    test: Call | None = None
    confidence: Percent | None = None
    correction: Name | None = None
    verdicts: Name | None = None
    by: Name | None = None


@statement(
    "report {kind:name} [{variable:name}] [by {by:name}] [of {of:name}] [top {top:count}] [to "
    "{file:string}] [{width:columns}]",
    "report",
)
class Report(Node):
    """`report heatmap layer by head of attn top 5 to "file" width 1 column`."""

    kind: Name
    variable: Name | None = None
    by: Name | None = None
    top: int | str | None = None
    file: String | None = None
    of: Name | None = None
    """The reported observation, if the experiment has several."""
    width: int | None = None
    """Columns of a paper that the picture spans."""


@statement(
    "expect (top {top:count} contains {contains:sites} | {condition}) [on {relaxed:name}] "
    "[citing {citing:string}]",
    "expect",
)
class Expect(Node):
    """`expect COND` or `expect top 3 contains L9H9, L9H6`; `relaxed` is the word after `on`."""

    condition: Expr | None = None
    top: int | str | None = None
    contains: tuple[Site, ...] = ()
    relaxed: Name | None = None
    citing: String | None = None


@statement("run {name:new} {statements:block}", "run_def")
class RunDef(Node):
    """`run healed { from clean into noised  patch … }`: a named run with rules."""

    name: Name
    statements: tuple[Statement, ...]


class Save(Node):
    """`save [mean of] resid_post layer * of healed at last token to "acts.safetensors" as
    float16`, `save gradient of logit(answer) by resid_post layer * at last token to
    "gradients.safetensors"`, `save top 20 rows of features * of f at tokens * to "rows.jsonl"`."""

    site: Site
    at: Positions
    file: String
    run: Ref | None = None
    dtype: Name | None = None
    mean: bool = False
    """Whether it saves the mean over rows instead of every vector."""
    rows: int | str | None = None
    """Number of rows to save for each feature, instead of vectors."""
    gradient: Measure | None = None
    """The metric whose gradients with respect to the site are saved instead of its vectors."""


@statement("save direction {direction} to {file:string} [as {dtype:name}]", "save_direction")
class SaveDirection(Node):
    """`save direction refusal to "refusal.safetensors"`."""

    direction: Name | Index
    file: String
    dtype: Name | None = None


Statement = (
    Rule
    | UseModel
    | UsePrompts
    | FromInto
    | Keep
    | For
    | ControlLine
    | Generate
    | Using
    | Discover
    | Search
    | ObserveAttention
    | ObserveFeatures
    | ObserveMaps
    | Observe
    | Measure
    | Stats
    | Report
    | Expect
    | RunDef
    | Save
    | SaveDirection
)


# --- the file -------------------------------------------------------------------------------------


class Version(Node):
    number: int


@statement("use {path:string}", "use")
class Use(Node):
    path: String


@statement("param {name:new} = {value:expr}", "param")
class Param(Node):
    name: Name
    value: Expr


class ModelDef(Node):
    """`model toy = zoo("counting")`, `model cured = toy with { … }`, `model sum = a + 0.5 * b`."""

    name: Name
    source: Expr
    edits: tuple[EditWeights | ProjectOut, ...] = ()
    is_edited: bool = False
    """Whether it has a block of edits, which may be empty."""


@statement("{kind:word} {name:new} {lines:block}", "data_def")
class PromptsDef(Node):
    kind: Literal["prompts", "images"]
    name: Name
    lines: tuple[DataLine, ...]


@statement("metric {name:new} = {value:sum}", "metric_def")
class MetricDef(Node):
    name: Name
    value: Expr


@statement("direction {name:new} = {value:sum} [at {site} [at {at:positions}]]", "direction_def")
class DirectionDef(Node):
    name: Name
    value: Expr
    site: Site | None = None
    at: Positions | None = None


@statement(
    "{word} {name:new} = {source:call} [at {site} [at {at:positions}]]",
    "basis_def",
    "trained_def",
)
class BasisDef(Node):
    name: Name
    source: Call
    site: Site | None = None
    at: Positions | None = None
    word: Literal["basis", "lens", "probe"] = "basis"
    """First word of the statement."""


@statement(
    "group {name:new} = ({source:training} [at {site} [at {at:positions}]] | {sites})",
    "group_def",
)
class GroupDef(Node):
    """A union of sites, or another experiment's highest ranked ones (one `Site` with `ranked`); or
    those that a training chooses from the sites `at`."""

    name: Name
    sites: tuple[Site, ...] = ()
    source: Call | None = None
    site: Site | None = None
    at: Positions | None = None


@statement("circuit {name:new} = ({source:training} [at {at:positions}] | {edges})", "circuit_def")
class CircuitDef(Node):
    """`circuit c = embed -> L0H1.q, L0H1 -> logits at last token`: edges between components of a
    model; or those that a training chooses, whose tokens `at` are written."""

    name: Name
    edges: tuple[SiteMap, ...] = ()
    source: Call | None = None
    at: Positions | None = None


@statement("seed {value:integer}", "seed")
class Seed(Node):
    value: int


@statement("experiment {name} {statements:block}", "experiment_def")
class ExperimentDef(Node):
    name: Name
    statements: tuple[Statement, ...]


TopLevel = (
    Version
    | Use
    | Param
    | ModelDef
    | PromptsDef
    | MetricDef
    | DirectionDef
    | BasisDef
    | GroupDef
    | CircuitDef
    | Seed
    | ExperimentDef
)


class File(Node):
    """A whole file. `comments` are (span, text) in source order, for the formatter."""

    statements: tuple[TopLevel, ...]
    comments: tuple[Comment, ...] = field(default=(), compare=False)
    lost: tuple[LostStatement, ...] = field(default=(), compare=False)


class LostStatement(Node):
    """A statement that can't be parsed, with the names that it may define."""

    names: frozenset[str] = frozenset()


class Comment(Node):
    """A comment with its `#`; `own_line` if nothing precedes it on its line."""

    text: str
    own_line: bool


_ESCAPE = re.compile(r"\\(.)")

_ESCAPED = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}


def unescape(raw: str) -> str:
    """Return the value of a text between its quotes; an unknown escape is left unchanged."""
    return _ESCAPE.sub(lambda m: _ESCAPED.get(m[1], m[0]), raw) if "\\" in raw else raw
