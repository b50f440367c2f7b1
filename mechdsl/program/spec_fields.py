"""How the typed experiment keeps what isn't data: trees as the text that was written, places in the
file not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from mechdsl.base.source import Source, Span
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
    Losses = tuple[ast.Lost, ...]
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
