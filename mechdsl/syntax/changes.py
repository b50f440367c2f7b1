"""How the lines of `corrupt` blocks are written that begin with a word.

The grammar has one shape for all of them; which of its parts a word takes, its signature says. The
entries of `vocab.corruptions` register theirs here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import UnexpectedToken
from mechdsl.syntax import ast
from mechdsl.syntax.reserved import CHANGE_WORDS

CLAUSES = {"to": "to", "at": "at", "given": "with", "by": "by", "radius": "radius"}
"""Field of `ast.Change` -> the word in front of it, in the order of the text."""
_SUCH_AS = {"radius": "such as `radius 8`, in pixels", "by": "such as `by 40`, of 255"}
_SHOWN: Mapping[type[ast.Node], str] = {
    ast.Name: "a name",
    ast.Call: "a name",
    ast.String: "a text in quotes",
    ast.Number: "a number",
    ast.Percent: "a percentage",
}
_BEGINS: Mapping[type[ast.Node], frozenset[str]] = {
    ast.Name: frozenset({"NAME"}),
    ast.Call: frozenset({"NAME"}),
    ast.String: frozenset({"STRING"}),
    ast.Number: frozenset({"INT", "FLOAT"}),
    ast.Percent: frozenset({"PERCENT"}),
}
"""The terminals that each kind of value begins with."""
_NEXT = frozenset({"$END", "DEF", "CHANGE", "SWAP", "TEMPLATE", "ADD", "REPLACE", "BLUR"})
"""Behind a complete change."""


@dataclass(frozen=True)
class ChangeSignature:
    """What stands behind the word of a change.

    values: the kinds of node that it takes, in order; `repeated` lets the last one come again.
    tokens: a position stands there instead; `either`: or may stand there.
    needs, may: the clauses behind, by their field of `ast.Change` (`given` is `with`).
    """

    values: tuple[type[ast.ChangeValue], ...] = ()
    repeated: bool = False
    tokens: bool = False
    either: bool = False
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()

    def problem(self, change: ast.Change) -> Diagnostic | None:
        """E0101 for the first part that is missing, of another kind or too many."""
        if self.tokens != (change.tokens is not None) and not (self.either and change.tokens):
            wrong = change.tokens or change.values[0]
            expected = "a position, such as `last token`" if self.tokens else _SHOWN[self.values[0]]
            return _unexpected(wrong.span, expected)
        kinds = () if change.tokens is not None else self.values
        if self.repeated:
            kinds += kinds[-1:] * (len(change.values) - len(kinds))
        for value, kind in zip(change.values, kinds, strict=False):
            bare_call = kind is ast.Call and isinstance(value, ast.Name)
            if not (isinstance(value, kind) or bare_call):
                return _unexpected(value.span, _SHOWN[kind])
        if len(change.values) < len(kinds):
            return _cut_short(change, "`,`")
        if len(change.values) > len(kinds):
            hint = f"write another `{change.word}` for it" if len(kinds) == 1 else "leave it out"
            return _unexpected(change.values[len(kinds)].span, "the next statement", hint)
        for clause, word in CLAUSES.items():
            given = getattr(change, clause)
            if given is None and clause in self.needs:
                return _cut_short(change, f"`{word}`", _SUCH_AS.get(clause, ""))
            if given is not None and clause not in (*self.needs, *self.may):
                span = given.span if isinstance(given, ast.Node) else change.span
                return _unexpected(span, "the next statement")
        return None

    def accepts(self, before: Sequence[str], grammar: frozenset[str]) -> frozenset[str]:
        """Of the terminals that the grammar accepts behind these words of a change (its own is the
        first), those that this change accepts."""
        commas = before.count(",")
        if not (self.tokens or self.either) and (len(before) == 1 or before[-1] == ","):
            return grammar & _BEGINS[self.values[min(commas, len(self.values) - 1)]]
        if len(before) == 1:
            return grammar - _BEGINS[ast.Number] - _BEGINS[ast.Percent]
        missing = [clause for clause in self.needs if CLAUSES[clause] not in before]
        complete = not missing
        wanted = {CLAUSES[clause].upper() for clause in (*missing[:1], *self.may)}
        left = grammar - ({word.upper() for word in CLAUSES.values()} - wanted)
        if (
            not (self.tokens or self.either)
            and before.count("(") == before.count(")")
            and not (set(before) & set(CLAUSES.values()))
        ):
            # Behind a value, where the grammar might still read a position.
            more = commas + 1 < len(self.values)
            complete = complete and not more
            left &= {"COMMA"} if more else wanted | _NEXT | ({"COMMA"} if self.repeated else set())
            left |= grammar & {"LPAR"} if self.values[-1] is ast.Call else set()
        return left if complete else left - _NEXT


SIGNATURES: dict[str, ChangeSignature] = {}
"""By the word that begins the change."""


def register(word: str, signature: ChangeSignature) -> None:
    """From now on this word begins a change; it stays free as a name everywhere else."""
    SIGNATURES[word] = signature
    CHANGE_WORDS.add(word)


def problem(change: ast.Change) -> Diagnostic | None:
    """What is wrong with the parts of a change."""
    signature = SIGNATURES.get(change.word)
    return None if signature is None else signature.problem(change)


def _unexpected(span: Span, expected: str, hint: str = "") -> Diagnostic:
    return UnexpectedToken(span=span, found=f"`{span.written}`", expected=expected, hint=hint)


def _cut_short(change: ast.Change, expected: str, hint: str = "") -> Diagnostic:
    end = Span(change.span.source, change.span.end, change.span.end)
    found = f"end of the `{change.word}` statement"
    return UnexpectedToken(span=end, found=found, expected=expected, hint=hint)
