"""A template, and the names that it defines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mechdsl.syntax import ast
from mechdsl.syntax.template import Placeholder


@dataclass(frozen=True)
class Definition:
    """`a, b = EXPR`: the names that are defined together, and by what."""

    names: tuple[str, ...]
    value: ast.Expr

    @property
    def path(self) -> str:
        """What its draws are called."""
        return ",".join(self.names)


@dataclass
class CompiledTemplate:
    """A template's pieces, and the names that its placeholders define (`{s2 = s}`)."""

    text: ast.String
    """The first one of a chat."""
    pieces: Sequence[str | Placeholder]
    turns: tuple[ast.ChatTurn, ...] = ()
    """Of a chat: who says what; the pieces are those of all turns."""
    definitions: dict[str, Definition] = field(default_factory=dict[str, Definition])

    @property
    def texts(self) -> tuple[ast.String, ...]:
        """The text, or those of the turns."""
        return tuple(turn.text for turn in self.turns) or (self.text,)

    def __post_init__(self) -> None:
        for piece in self.pieces:
            if isinstance(piece, Placeholder) and piece.name is not None:
                itself = isinstance(piece.expr, ast.Name) and piece.expr.id == piece.name
                if not itself:
                    self.definitions[piece.name] = Definition((piece.name,), piece.expr)
