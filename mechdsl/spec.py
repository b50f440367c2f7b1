"""The experiment as typed data: what a file says, after names of the file are bound.

Expressions, sites and positions stay syntax trees, because only data and models give them a
meaning; in JSON they are the text that was written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from mechdsl.source import Span
from mechdsl.syntax import ast


def _as_written(node: Any) -> str | None:
    return None if node is None else node.span.written


if TYPE_CHECKING:
    ExprText = ast.Expr
    SiteText = ast.Site
    PositionsText = ast.Positions
    PositionText = ast.Position
    DomainText = ast.Domain
    StringText = ast.String
    ChangeText = ast.Change
    SpanDefText = ast.SpanDef
    Where = Span
else:
    # Pydantic never looks into a tree: it would spend a quarter of a second on its schema.
    _AS_WRITTEN = Annotated[
        Any,
        PlainSerializer(_as_written, return_type=str | None),
        WithJsonSchema({"type": "string"}),
    ]
    ExprText = SiteText = PositionsText = PositionText = _AS_WRITTEN
    DomainText = StringText = ChangeText = SpanDefText = _AS_WRITTEN
    Where = Annotated[Any, Field(exclude=True, repr=False), SkipJsonSchema()]


class Spec(BaseModel):
    """Every part knows the span that it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    span: Where


class Model(Spec):
    """`model toy = zoo("counting")`."""

    name: str
    kind: Literal["zoo", "hf", "local"]
    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    bos: bool | None = None
    """None: as the tokenizer does by itself."""


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


class Prompts(Spec):
    """One `prompts` block."""

    name: str
    values: tuple[Value, ...] = ()
    templates: tuple[StringText, ...] = ()
    rows: ExprText | None = None
    """The file's path as a string expression."""
    rename: tuple[tuple[str, str], ...] = ()
    """(new name, column)."""
    where: tuple[ExprText, ...] = ()
    split: float | None = None
    """Percent of the rows in `NAME.train`."""
    texts: tuple[TextDef, ...] = ()
    spans: tuple[SpanDefText, ...] = ()
    corruptions: tuple[Corruption, ...] = ()


class Rule(Spec):
    """One intervention. `loops` are the `for` variables around it, outermost first."""

    verb: Literal["patch", "ablate", "replace"]
    site: SiteText | None = None
    at: PositionsText
    source: str | None = None
    """patch: the run that is read (`with RUN`, else the experiment's source)."""
    fill: ExprText | None = None
    """ablate: zero, mean, resample, `mean of …`; replace: the text."""
    by: str | None = None
    loops: tuple[str, ...] = ()


class Loop(Spec):
    """`for NAME in DOMAIN`: an axis that several rules share."""

    name: str
    domain: DomainText


class Measure(Spec):
    """`label` is the name of the metric, or the expression as written."""

    label: str
    metric: ExprText
    effect: str
    effect_span: Where
    at: PositionText | None = None
    per_prompt: bool = False


class Statistics(Spec):
    resamples: int = 10_000
    confidence: float = 95.0
    correction: str = "holm"
    by: str | None = None


class Report(Spec):
    kind: str
    variable: str | None = None
    by: str | None = None
    top: int | None = None
    file: str | None = None


class Expectation(Spec):
    text: str
    condition: ExprText | None = None
    top: int | None = None
    contains: tuple[SiteText, ...] = ()
    on_mean: bool = False
    citing: str | None = None


class Group(Spec):
    """`group name_movers = L9H9, L9H6`: sites that are intervened on together."""

    name: str
    sites: tuple[SiteText, ...]


class Experiment(Spec):
    """One experiment: everything that its block says, with the file's names bound."""

    name: str
    model: str
    prompts: str
    part: Literal["train", "test"] | None = None
    limit: int | None = None
    source: str | None = None
    base: str = "clean"
    loops: tuple[Loop, ...] = ()
    rules: tuple[Rule, ...] = ()
    keep: tuple[ExprText, ...] = ()
    measures: tuple[Measure, ...]
    statistics: Statistics
    reports: tuple[Report, ...] = ()
    expects: tuple[Expectation, ...] = ()


class Program(Spec):
    """A file with everything it imports."""

    models: dict[str, Model] = {}
    prompts: dict[str, Prompts] = {}
    groups: dict[str, Group] = {}
    metrics: dict[str, ExprText] = {}
    """Those that the file names; measures have them put in already."""
    parameters: dict[str, int | float | str | bool] = {}
    experiments: tuple[Experiment, ...] = ()
    seed: int = 0
