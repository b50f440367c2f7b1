"""Two custom changes, `shout` and `erase`, registered by one file outside the package."""

from __future__ import annotations

from typing import cast

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.prompts import BadCall
from mechdsl.syntax import ast
from mechdsl.syntax.tree_builder import ChangeSignature
from mechdsl.vocab.corruptions import CorruptibleRow, Parameters, TokenChange, ValueChange, change


@change("shout")
class Shout(ValueChange[ast.ChangeLine]):
    usage = "shout count, item by 2"
    meaning = "the words of these values in a seeded order, in capitals, so often"
    signature = ChangeSignature((ast.Name,), repeated=True, may=("by",))

    def refusals(self, change: ast.ChangeLine, parameters: Parameters) -> list[Diagnostic]:
        times = change.by
        if times is None or isinstance(times, ast.Number):
            return []
        reason = "takes a plain number"
        return [BadCall(span=times.span, name=self.name, reason=reason, usage=self.usage)]

    def apply(self, row: CorruptibleRow, change: ast.ChangeLine) -> None:
        times = change.by.value if isinstance(change.by, ast.Number) else 1
        for name in cast("tuple[ast.Name, ...]", change.values):
            value = row.plain_value(name)
            if not isinstance(value, str):
                row.refuse(name, "only a text can be shouted", "name a text")
            words = value.upper().split()
            order = row.permutation(name, len(words))
            row.put(name, " ".join([words[place] for place in order] * int(times)))


@change("erase")
class Erase(TokenChange):
    usage = "erase last-item token"
    meaning = "these tokens are left out"
    signature = ChangeSignature(tokens=True)

    def text(self, change: ast.ChangeLine) -> ast.Expr:
        return ast.String("", span=change.span)
