"""Build the syntax tree from the parser's reductions, with one method per grammar rule.

The grammar knows only shapes. A file is parsed with the `RegisteredWords` of rule kinds,
observations and changes. All lines of `corrupt` blocks that begin with a word have the same shape
in the grammar; the signature of the word defines which parts are required or allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from lark import Token, Transformer, Tree

from mechdsl.base import limits
from mechdsl.base.records import Record, close_names
from mechdsl.base.text import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.syntax import (
    MisspeltWord,
    NumberTooLarge,
    ReservedName,
    TooLarge,
    UnexpectedToken,
    WrongVersion,
)
from mechdsl.syntax import ast
from mechdsl.syntax.ast import unescape
from mechdsl.syntax.forms import FORMS, Form, FormField, FormGroup, FormPart
from mechdsl.syntax.words import CHANGE_WORDS, RESERVED, ObservationWord

CHANGE_CLAUSES = {
    "to": "to",
    "at": "at",
    "before": "before",
    "after": "after",
    "given": "with",
    "by": "by",
    "radius": "radius",
}
"""Field of `ast.ChangeLine` → the word before it, in source order."""

_CLAUSE_EXAMPLES = {"radius": "such as `radius 8`, in pixels", "by": "such as `by 40`, of 255"}

_VALUE_WORDS: Mapping[type[ast.Node], str] = {
    ast.Name: "a name",
    ast.Call: "a name",
    ast.String: "a text in quotes",
    ast.Number: "a number",
    ast.Percent: "a percentage",
}

_FIRST_TERMINALS: Mapping[type[ast.Node], frozenset[str]] = {
    ast.Name: frozenset({"NAME"}),
    ast.Call: frozenset({"NAME"}),
    ast.String: frozenset({"STRING"}),
    ast.Number: frozenset({"INT", "FLOAT"}),
    ast.Percent: frozenset({"PERCENT"}),
}
"""First terminals of each type of value."""

_FOLLOWING_TERMINALS = frozenset(
    {"$END", "DEF", "CHANGE", "SWAP", "TEMPLATE", "ADD", "REPLACE", "BLUR"}
)
"""Terminals that may follow a complete change."""


class ChangeSignature(Record):
    """The parts that follow the word of a change.

    values: the node types of its values, in order; `repeated`: the last one may be repeated.
    tokens: positions follow instead of values; `either`: positions or values follow.
    counted: a number of tokens and a place follow, `4 tokens before last token`.
    needs, may: required and optional clauses, as fields of `ast.ChangeLine` (`given` is `with`).
    """

    values: tuple[type[ast.ChangeValue], ...] = ()
    repeated: bool = False
    tokens: bool = False
    either: bool = False
    counted: bool = False
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()

    def problem(self, change: ast.ChangeLine) -> Diagnostic | None:
        """Return E0101 for the first part that is missing, of the wrong type or superfluous."""
        if self.tokens != (change.tokens is not None) and not (self.either and change.tokens):
            wrong = change.tokens or change.values[0]
            expected = (
                "a position, such as `last token`" if self.tokens else _VALUE_WORDS[self.values[0]]
            )
            return _unexpected(wrong.span, expected)
        kinds = () if change.tokens is not None else self.values
        if self.repeated:
            kinds += kinds[-1:] * (len(change.values) - len(kinds))
        for value, kind in zip(change.values, kinds, strict=False):
            bare_call = kind is ast.Call and isinstance(value, ast.Name)
            if not (isinstance(value, kind) or bare_call):
                return _unexpected(value.span, _VALUE_WORDS[kind])
        if len(change.values) < len(kinds):
            return _incomplete(change, "`,`")
        if len(change.values) > len(kinds):
            hint = f"write another `{change.word}` for it" if len(kinds) == 1 else "leave it out"
            return _unexpected(change.values[len(kinds)].span, "the next statement", hint)
        places = [place for place in (change.before, change.after) if place is not None]
        if self.counted and not places:
            return _incomplete(
                change, "`tokens`", "write `tokens before last token` after the number"
            )
        if places and not self.counted:
            return _unexpected(change.span, "another statement")
        for clause, word in CHANGE_CLAUSES.items():
            if clause in ("before", "after"):
                continue
            given = getattr(change, clause)
            if given is None and clause in self.needs:
                return _incomplete(change, f"`{word}`", _CLAUSE_EXAMPLES.get(clause, ""))
            if given is not None and clause not in (*self.needs, *self.may):
                span = given.span if isinstance(given, ast.Node) else change.span
                return _unexpected(span, "the next statement")
        return None

    def accepts(self, before: Sequence[str], grammar: frozenset[str]) -> frozenset[str]:
        """Filter the terminals that the grammar accepts after these words of a change.

        Args:
            before: The words so far; the first is the change's own.
            grammar: The terminals that the grammar accepts next.

        Returns:
            The terminals that this change accepts.
        """
        commas = before.count(",")
        if self.counted:
            only = {1: frozenset({"INT"}), 2: frozenset({"TOKEN", "TOKENS"})}.get(len(before))
            return grammar & only if only is not None else grammar
        if not (self.tokens or self.either) and (len(before) == 1 or before[-1] == ","):
            return grammar & _FIRST_TERMINALS[self.values[min(commas, len(self.values) - 1)]]
        if len(before) == 1:
            return grammar - _FIRST_TERMINALS[ast.Number] - _FIRST_TERMINALS[ast.Percent]
        missing = [clause for clause in self.needs if CHANGE_CLAUSES[clause] not in before]
        complete = not missing
        wanted = {CHANGE_CLAUSES[clause].upper() for clause in (*missing[:1], *self.may)}
        left = grammar - ({word.upper() for word in CHANGE_CLAUSES.values()} - wanted)
        if (
            not (self.tokens or self.either)
            and before.count("(") == before.count(")")
            and not (set(before) & set(CHANGE_CLAUSES.values()))
        ):
            # After a value the grammar might still read a position.
            more = commas + 1 < len(self.values)
            complete = complete and not more
            left &= (
                {"COMMA"}
                if more
                else wanted | _FOLLOWING_TERMINALS | ({"COMMA"} if self.repeated else set())
            )
            left |= grammar & {"LPAR"} if self.values[-1] is ast.Call else set()
        return left if complete else left - _FOLLOWING_TERMINALS


class RegisteredWords(Record):
    """The words that registered entries add to those of the grammar."""

    verbs: Mapping[str, str] = field(default_factory=dict[str, str])
    """Verb of a registered rule → the word before its number, or an empty string."""
    changes: Mapping[str, ChangeSignature] = field(default_factory=dict[str, ChangeSignature])
    """First word of a change → its signature. The word stays a valid name everywhere else."""
    observations: Mapping[str, ObservationWord] = field(default_factory=dict[str, ObservationWord])
    """Word after `observe` → its facts."""

    @cached_property
    def change_words(self) -> frozenset[str]:
        """First words of lines in a `corrupt` block."""
        return CHANGE_WORDS.union(self.changes)

    def observation(self, word: str) -> ObservationWord:
        """Return the facts of a word after `observe`; those of an unknown word are all false."""
        return self.observations.get(word) or ObservationWord()


def _checked_change(change: ast.ChangeLine) -> ast.ChangeLine:
    """Report the first problem with the parts of a change."""
    signature = PARSE_CONTEXT.get().words.changes.get(change.word)
    wrong = None if signature is None else signature.problem(change)
    if wrong is not None:
        _report(wrong)
    return change


def _unexpected(span: Span, expected: str, hint: str = "") -> Diagnostic:
    return UnexpectedToken(span=span, found=f"`{span.written}`", expected=expected, hint=hint)


def _incomplete(change: ast.ChangeLine, expected: str, hint: str = "") -> Diagnostic:
    end = Span(change.span.source, change.span.end, change.span.end)
    expectation = f"end of the `{change.word}` statement"
    return UnexpectedToken(span=end, found=expectation, expected=expected, hint=hint)


LANGUAGE_VERSION = 1


class WordSubstitution(Record):
    """A word of a text that is parsed as a different word."""

    start: int
    end: int
    meant: str

    def put_into(self, text: str) -> str:
        """Return the text to parse."""
        return text[: self.start] + self.meant + text[self.end :]

    def written(self, offset: int) -> int:
        """Map an offset of the parsed text to the original text."""
        longer = len(self.meant) - (self.end - self.start)
        return offset if offset <= self.start else max(self.start, offset - longer)


@dataclass
class ParseContext:
    """The origin of the text being parsed, and the problems found in it."""

    source: Source
    words: RegisteredWords
    base: int = 0
    """Offset of the parsed text in the source."""
    reading: WordSubstitution | None = None
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])
    depths: dict[int, int] = field(default_factory=dict[int, int])
    """Depths of the expressions parsed so far, by identity."""
    brackets: dict[int, tuple[ast.Node, Span]] = field(
        default_factory=dict[int, tuple[ast.Node, Span]]
    )
    """Bracketed expressions by identity, each with the span from bracket to bracket. The
    expression's own span excludes the brackets, but the span of its parent includes them."""

    def offset(self, parsed: int) -> int:
        """Map an offset of the parsed text to the source."""
        return self.base + (parsed if self.reading is None else self.reading.written(parsed))


PARSE_CONTEXT: ContextVar[ParseContext] = ContextVar("mech_parse")
"""State of the current parse; the parser itself is shared by all callers."""


class Clause(NamedTuple):
    """A part of a statement without a node."""

    kind: str
    value: Any
    span: Span
    parts: Sequence[Any] = ()
    """Its tokens and nodes, if a form names them instead of the clause."""


def _ends(item: Any) -> tuple[int, int]:
    if isinstance(item, Token):
        context = PARSE_CONTEXT.get()
        return context.offset(item.start_pos or 0), context.offset(item.end_pos or 0)
    _, span = PARSE_CONTEXT.get().brackets.get(id(item), (item, item.span))
    return span.start, span.end


def _span(children: Sequence[Any]) -> Span:
    start, _ = _ends(children[0])
    _, end = _ends(children[-1])
    return Span(PARSE_CONTEXT.get().source, start, end)


def _report(diagnostic: Diagnostic) -> None:
    PARSE_CONTEXT.get().diagnostics.append(diagnostic)


def _clauses(children: Sequence[Any]) -> dict[str, Any]:
    return {child.kind: child.value for child in children if isinstance(child, Clause)}


def _nodes(children: Sequence[Any]) -> list[Any]:
    return [child for child in children if isinstance(child, ast.Node)]


def _name(token: Token) -> ast.Name:
    return ast.Name(str(token), span=_span([token]))


def _is_name(child: object) -> bool:
    return isinstance(child, ast.Name) or (
        isinstance(child, Token) and child.type in ("NAME", "WITHOUT_LAYERS")
    )


def _named(child: ast.Name | Token) -> ast.Name:
    return _name(child) if isinstance(child, Token) else child


def _defined(name: ast.Name, rename: str = "") -> ast.Name:
    """Read a name that the file defines; words of the language are rejected."""
    if name.id in RESERVED:
        _report(ReservedName(name=name.id, rename=rename, span=name.span))
    return name


def _integer(token: Token, digits: str | None = None) -> int:
    """Read a token, or digits of it, as an integer."""
    text = token if digits is None else digits
    if len(text) > 308:
        _report(NumberTooLarge(span=_span([token])))
        return 0
    return int(text)


def _decimal(token: Token, text: str) -> float:
    value = float(text)
    if math.isinf(value):
        _report(NumberTooLarge(span=_span([token])))
        return 0.0
    return value


def _amount(node: ast.Number | ast.Name) -> Any:
    return node.id if isinstance(node, ast.Name) else node.value


def _count(token: Token) -> int | str:
    return _integer(token) if token.type == "INT" else str(token)


def _nested(node: Any, *parts: Any, instead: Any = None) -> Any:
    """Return the node, or a replacement if it is nested too deeply (reported once per file)."""
    context = PARSE_CONTEXT.get()
    depth = 1 + max((context.depths.get(id(part), 0) for part in parts), default=0)
    if depth <= limits.DEPTH:
        context.depths[id(node)] = depth
        return node
    if not any(isinstance(d, TooLarge) for d in context.diagnostics):
        _report(
            TooLarge(
                what=f"this expression is nested more than {limits.DEPTH} deep",
                place="the limit is exceeded here",
                hint="define names for its parts and split it into several lines",
                span=node.span,
            )
        )
    return ast.Number(0, span=node.span) if instead is None else instead


def _clause(
    kind: str, value: Callable[[list[Any]], Any], *, whole: bool = False
) -> Callable[[Any, list[Any]], Clause]:
    """Return a method that reads a clause.

    Args:
        whole: Whether it is one field of a form, which then doesn't name its parts.
    """

    def method(_self: Any, c: list[Any]) -> Clause:
        return Clause(kind, value(c), _span(c), () if whole else c)

    return method


def _node(
    kind: Callable[..., ast.Node], *parts: int, nested: bool = False
) -> Callable[[Any, list[Any]], Any]:
    """Return a method that builds a node from the children at some indices, tokens as their text.

    Args:
        parts: The indices; a child that a rule leaves out has the default of its field.
        nested: Whether it is an expression of which the depth is limited.
    """

    def method(_self: Any, c: list[Any]) -> Any:
        children = [c[at] for at in parts if at < len(c)]
        fields = [str(child) if isinstance(child, Token) else child for child in children]
        node = kind(*fields, span=_span(c))
        return _nested(node, *_nodes(fields)) if nested else node

    return method


def _second(c: list[Any]) -> Any:
    return c[1]


def _second_amount(c: list[Any]) -> Any:
    return _amount(c[1])


def _as_call(node: ast.Call | ast.Name) -> ast.Call:
    """Convert a bare name to a call without arguments, where only a call is meaningful."""
    return node if isinstance(node, ast.Call) else ast.Call(node.id, (), span=node.span)


def _index(c: Sequence[Any]) -> tuple[int | None, int | None]:
    """Read both ends of `*`, `3`, `2..6`."""
    first = c[0]
    if isinstance(first, Token):
        return None, None
    return first.value, c[2].value if len(c) == 3 else None


def _number_after_sign(c: Sequence[Any]) -> int:
    """Read a number after its sign."""
    return _integer(c[1]) * (-1 if c[0].type == "MINUS" else 1)


def _counted(c: Sequence[Any]) -> int | ast.Variable:
    """Read a number, or a name used as one followed by a number."""
    if c[0].type == "INT":
        return _integer(c[0])
    return ast.Variable(str(c[0]), offset=_number_after_sign(c[1:]) if c[1:] else 0, span=_span(c))


def _signed(c: Sequence[Any]) -> int | ast.Variable:
    """Read a number, or a name used as one, after its sign."""
    if c[1].type == "NAME":
        return ast.Variable(str(c[1]), c[0].type == "MINUS", span=_span(c))
    return _number_after_sign(c)


class TreeBuilder(Transformer[Token, Any]):
    """Builds nodes; the parser calls a method at each reduction with all tokens of the rule."""

    # --- whole texts ---------------------------------------------------------------------------

    def start(self, c: list[Any]) -> ast.File:
        return ast.File(tuple(c), span=_span(c))

    def top_lines(self, c: list[Any]) -> tuple[Any, ...]:
        return tuple(c)

    data_lines = change_lines = experiment_lines = edit_lines = top_lines
    placeholder = _clause("placeholder", lambda c: (None, c[0]), whole=True)
    named_placeholder = _clause("placeholder", lambda c: (_defined(_name(c[0])), c[2]), whole=True)

    # --- top level -----------------------------------------------------------------------------

    def version(self, c: list[Any]) -> ast.Version:
        number = _integer(c[1])
        if number != LANGUAGE_VERSION:
            _report(
                WrongVersion(
                    problem=f"version {c[1]} of the language is not supported",
                    place=f"this mechdsl reads version {LANGUAGE_VERSION}",
                    span=_span([c[1]]),
                )
            )
        return ast.Version(number, span=_span(c))

    def model_def(self, c: list[Any]) -> ast.ModelDef:
        edits = _clauses(c).get("edits")
        source = ast.Name(c[3].id, span=c[3].span) if isinstance(c[3], ast.Name) else c[3]
        return ast.ModelDef(_defined(c[1]), source, edits or (), edits is not None, span=_span(c))

    edits = _clause("edits", lambda c: tuple(c[2:-1]))

    def name(self, c: list[Any]) -> ast.Name:
        return _name(c[0])

    new_name = image_name = variable_name = end = name

    ref = _node(ast.Ref, 0, 2)
    refs = _clause("refs", lambda c: tuple(_nodes(c)), whole=True)
    names = refs

    def integer(self, c: list[Any]) -> ast.Number:
        return ast.Number(_integer(c[0]), span=_span(c))

    # --- prompts and images --------------------------------------------------------------------

    def rename(self, c: list[Any]) -> ast.RenameLine:
        pairs = tuple(child.value for child in c if isinstance(child, Clause))
        return ast.RenameLine(pairs, span=_span(c))

    renamed = _clause("pair", lambda c: (_defined(c[0]), c[2]), whole=True)

    def answer(self, c: list[Any]) -> ast.Text:
        return ast.Text(_name(c[0]), c[1], span=_span(c))

    wrong = answer

    def text(self, c: list[Any]) -> ast.Text:
        return ast.Text(_defined(c[1]), c[3], span=_span(c))

    def worded_change(self, c: list[Any]) -> ast.ChangeLine:
        nodes, clauses = _nodes(c), _clauses(c)
        tokens = nodes[0] if isinstance(nodes[0], ast.Positions) else None
        values = () if tokens is not None else tuple(nodes)
        place = clauses.pop("place", (None, None))
        return _checked_change(
            ast.ChangeLine(str(c[0]), values, tokens, *place, **clauses, span=_span(c))
        )

    def inserting(self, c: list[Any]) -> ast.ChangeLine:
        return _checked_change(
            ast.ChangeLine(str(c[0]), tuple(_nodes(c)), **_clauses(c), span=_span(c))
        )

    before_place = _clause("before", _second)
    after_place = _clause("after", _second)
    change_place = _clause("place", lambda c: (c[1] if len(c) == 4 else None, c[-1]))
    change_with = _clause("given", _second)
    change_by = _clause("by", _second)
    radius = _clause("radius", _second_amount)

    # --- experiments ---------------------------------------------------------------------------

    def generate(self, c: list[Any]) -> ast.Generate:
        return ast.Generate(_amount(c[1]), **_clauses(c), span=_span(c))

    sampled = _clause("settings", lambda c: tuple(_nodes(c)))
    stopped = _clause("stops", lambda c: tuple(_nodes(c)))

    def observe_attention(self, c: list[Any]) -> ast.ObserveAttention:
        children = [each for each in c[1:] if not isinstance(each, Clause)]
        # Without the run in its middle, the line is an ordinary edge.
        return ast.ObserveAttention(self.edge(children), **_clauses(c), span=_span(c))

    def observe_flow(self, c: list[Any]) -> ast.ObserveAttention:
        queries, keys = (child for child in c if isinstance(child, ast.Positions))
        edge = ast.Edge(None, (), queries, keys, span=_span(c))
        return ast.ObserveAttention(edge, what=_name(c[1]), **_clauses(c), span=_span(c))

    weighted_by = _clause("by", _second)
    of_run = _clause("run", _second)
    as_name = _clause("name", _second)

    def features_of(self, c: list[Any]) -> ast.FeaturesOf:
        return ast.FeaturesOf(_name(c[2]), span=_span(c))

    def map_of(self, c: list[Any]) -> ast.MapOf:
        weight = c[0] if len(c) > 1 else None
        named = _name(c[-1]) if isinstance(c[-1], Token) else c[-1]
        return ast.MapOf(*_cells_of(named), weight, span=_span(c))

    def measure(self, c: list[Any]) -> ast.Measure:
        effect = next(child for child in c[2:] if isinstance(child, ast.Name))
        clauses = _clauses(c)
        over, area = clauses.pop("over", (None, False))
        return ast.Measure(c[1], effect, over=over, area=area, **clauses, span=_span(c))

    measured_at = _clause("at", _second)
    per = _clause("per", _second)
    mean_over = _clause("over", lambda c: (c[2], c[0].type == "AUC"))

    def stats(self, c: list[Any]) -> ast.Stats:
        c = [c[0], *_without_misspelt(c[1:])]
        clauses = _clauses(c)
        if len(clauses) < len(c) - 1:
            again = _repeated(c[1:])
            _report(
                UnexpectedToken(
                    found=f"second `{again.span.text}`",
                    expected="it once",
                    hint="a `stats` line sets each option once",
                    span=again.span,
                )
            )
        return ast.Stats(**clauses, span=_span(c))

    resampling = _clause("resampling", lambda c: _as_call(c[0]))
    test = _clause("test", lambda c: _as_call(c[1]))
    confidence = _clause("confidence", _second)
    correction = _clause("correction", _second)
    verdicts = _clause("verdicts", _second)
    by = _clause("by", _second)

    def save(self, c: list[Any]) -> ast.Save:
        at = next(child for child in c if isinstance(child, ast.Positions))
        file = next(child for child in c if isinstance(child, ast.String))
        site = next(child for child in c if isinstance(child, ast.Site))
        return ast.Save(site, at, file, **_clauses(c), span=_span(c))

    mean_of = _clause("mean", lambda _: True)
    top_rows = _clause("rows", _second_amount)

    def gradient_of(self, c: list[Any]) -> Clause:
        """A metric, as a `raw` measure."""
        raw = ast.Name("raw", span=_span(c[:1]))
        metric = ast.Measure(c[2], raw, _clauses(c).get("at"), span=_span(c))
        return Clause("gradient", metric, _span(c))

    saved_as = _clause("dtype", _second)

    # --- rules ---------------------------------------------------------------------------------

    page_width = _clause("width", lambda c: int(c[1]), whole=True)
    with_features = _clause("features", lambda c: _features(c[1:]), whole=True)

    def rule(self, c: list[Any]) -> ast.Rule:
        during = next((child for child in c if isinstance(child, ast.During)), None)
        return ast.Rule(c[0], during, "error" in _clauses(c), span=_span(c))

    without_error = _clause("error", lambda _: True)

    def during(self, c: list[Any]) -> ast.During:
        if isinstance(c[-1], ast.Star | ast.AxisRange):
            return ast.During("step", steps=c[-1], span=_span(c))
        if c[1].type == "EACH":
            return ast.During("each step", span=_span(c))
        return ast.During("named", str(c[1]), span=_span(c))

    def after(self, c: list[Any]) -> ast.During:
        return ast.During("after prefill", span=_span(c))

    def reading(self, c: list[Any]) -> ast.ActivationRead:
        factor, nodes = None, _nodes(c)
        if not isinstance(nodes[0], ast.Site):
            factor, *nodes = nodes
        parts = {type(node): node for node in nodes}
        return ast.ActivationRead(
            nodes[0], parts.get(ast.Positions), parts.get(ast.Ref), factor, span=_span(c)
        )

    def stepped(self, c: list[Any]) -> ast.StepFraction:
        *factor, component = _nodes(c)
        return ast.StepFraction(component, factor[0] if factor else None, span=_span(c))

    scale_weights = _node(ast.EditWeights, 0, 3, 5)
    set_weights = scale_weights
    add_to_weights = _node(ast.EditWeights, 0, 5, 1)

    def project_out(self, c: list[Any]) -> ast.ProjectOut:
        if isinstance(c[2], ast.Site):
            return ast.ProjectOut(None, c[2], c[4], span=_span(c))
        site, at = (c[4], c[6]) if len(c) > 5 else (None, None)
        return ast.ProjectOut(c[2], site, at, span=_span(c))

    def member(self, c: list[Any]) -> ast.Index:
        return ast.Index(c[0].id, c[2], span=_span(c))

    def coordinate(self, c: list[Any]) -> ast.Coordinate:
        value = str(c[1]) if isinstance(c[1], Token) else c[1].value
        return ast.Coordinate(str(c[0]), value, span=_span(c))

    def coordinates(self, c: list[Any]) -> ast.Coordinates:
        return ast.Coordinates(tuple(_nodes(c)), span=_span(c))

    def edge(self, c: list[Any]) -> ast.Edge:
        stack = c[1] if isinstance(c[1], ast.Name) else None
        axes = tuple(child for child in c if isinstance(child, ast.Axis))
        heads = next((child for child in c if isinstance(child, ast.Site)), None)
        return ast.Edge(stack, axes, c[-3], c[-1], heads, span=_span(c))

    # --- sites ---------------------------------------------------------------------------------

    def site(self, c: list[Any]) -> ast.Site:
        return ast.Site(
            tuple(map(_named, filter(_is_name, c))),
            tuple(child for child in c if isinstance(child, ast.Axis)),
            next((child for child in c if isinstance(child, ast.ShortSite)), None),
            next((child for child in c if isinstance(child, ast.RankedSelection)), None),
            **_clauses(c),
            span=_span(c),
        )

    except_sites = _clause("excluded", lambda c: tuple(_nodes(c)))

    def numbers(self, c: list[Any]) -> ast.AxisRange:
        tokens = [each for each in c if each is not None and each.type == "INT"]
        low, *high = (ast.Bound(_integer(token), span=_span([token])) for token in tokens)
        return ast.AxisRange(low, high[0] if high else None, span=_span(c))

    flat_site = flat_axes = edge_heads = heads_of = site
    basis = _clause("basis", lambda c: c[2].id)

    def axis(self, c: list[Any]) -> ast.Axis:
        values = tuple(child for child in c if isinstance(child, (ast.Star, ast.AxisRange)))
        return _axis(c[0], values, _span(c), **_clauses(c))

    window = _clause("window", _second_amount)
    flat_axis = dims = axis

    def features(self, c: list[Any]) -> ast.Axis:
        return _features(c)

    flat_features = features

    def axis_word(self, c: list[Any]) -> Token:
        return c[0]

    change_word = feature_word = dim_word = axis_word

    axis_step = _clause("step", lambda c: c[1].value)

    def axis_range(self, c: list[Any]) -> ast.AxisRange:
        low, *high = (child for child in c if isinstance(child, ast.Bound))
        high_end = high[0] if high else None
        return ast.AxisRange(low, high_end, _clauses(c).get("step", 1), span=_span(c))

    def bound(self, c: list[Any]) -> ast.Bound:
        last = c[-1]
        if last.type == "PERCENT":
            return ast.Bound(percent=_decimal(last, last[:-1]), span=_span(c))
        if last.type == "NAME":
            return ast.Bound(name=str(last), span=_span(c))
        number = _integer(last) * (-1 if len(c) > 1 and c[-2].type == "MINUS" else 1)
        if c[0].type == "NAME":
            return ast.Bound(name=str(c[0]), offset=number, span=_span(c))
        return ast.Bound(number, span=_span(c))

    star = _node(ast.Star)

    def short(self, c: list[Any]) -> ast.ShortSite:
        site, _, component = str(c[0]).partition(".")
        unit = "H" if "H" in site else "N" if "N" in site else None
        layer, _, index = site[1:].partition(unit or "H")
        return ast.ShortSite(
            _integer(c[0], layer),
            unit,
            _integer(c[0], index) if unit else None,
            component or None,
            span=_span(c),
        )

    def top_ranked(self, c: list[Any]) -> ast.RankedSelection:
        amount = c[1] if isinstance(c[1], ast.Percent) else _amount(c[1])
        return ast.RankedSelection("top", amount, *_cells_of(c[3]), span=_span(c))

    def best(self, c: list[Any]) -> ast.RankedSelection:
        return ast.RankedSelection("best", None, *_cells_of(c[2]), span=_span(c))

    # --- positions -----------------------------------------------------------------------------

    def positions(self, c: list[Any]) -> ast.Positions:
        items: list[ast.Position] = []
        for child in c:
            if isinstance(child, ast.Position):
                items.append(child)
            elif isinstance(child, Clause):
                items.append(_further_token(items[-1], child))
        return ast.Positions(tuple(items), span=_span(c))

    def position(self, c: list[Any]) -> ast.Position:
        return ast.Position(c[0], **_clauses(c), span=_span(c))

    align = _clause("align", lambda c: c[1].id)
    and_answer = _clause("and_answer", lambda c: True)
    bare_index = _clause("index", lambda c: _index(c))

    def between(self, c: list[Any]) -> ast.Between:
        return ast.Between(c[0].type == "EACH", c[-3], c[-1], span=_span(c))

    def except_(self, c: list[Any]) -> ast.Except:
        node = ast.Except(c[0].type == "EACH", c[-1], span=_span(c))
        return _nested(node, c[-1], instead=c[-1])

    def point(self, c: list[Any]) -> ast.Point:
        return ast.Point(c[0], **_clauses(c), span=_span(c))

    offset = _clause("offset", lambda c: _signed(c))

    def token_index(self, c: list[Any]) -> ast.TokenIndex:
        low, high = (c[1], None) if isinstance(c[1], ast.Variable) else _index(c[1:])
        return ast.TokenIndex(c[0].type == "TOKENS", low, high, span=_span(c))

    def counter(self, c: list[Any]) -> ast.Variable:
        return ast.Variable(str(c[-1]), len(c) == 2, span=_span(c))

    signed = _clause("signed", lambda c: _integer(c[-1]) * (-1 if len(c) == 2 else 1))

    def span_tokens(self, c: list[Any]) -> ast.SpanTokens:
        word = next(x for x in reversed(c) if isinstance(x, Token))
        of = next(x for x in c if isinstance(x, ast.SpanRef))
        if of.name == "at":
            of = _without_at(of, _span(c))
        numbers = _clauses(c).get("numbers", (None, None))
        span_tokens = isinstance(c[0], Token) and c[0].type == "EACH"
        return ast.SpanTokens(of, word.type == "TOKENS", span_tokens, *numbers, span=_span(c))

    numbered = _clause(
        "numbers", lambda c: (_integer(c[0]), _integer(c[2]) if len(c) == 3 else None)
    )

    each_step = _node(ast.EachStep)
    each_token_of = _node(ast.EachTokenOf, 3)
    edge_token = _node(ast.EdgeToken, 0, 3)

    def ranked_tokens(self, c: list[Any]) -> ast.RankedTokens:
        return ast.RankedTokens(c[0], c[1].type == "TOKENS", span=_span(c))

    joined = _node(ast.PositionUnion, 1)

    def span(self, c: list[Any]) -> ast.SpanRef:
        return ast.SpanRef(**c[0].value, **_clauses(c[1:]), span=_span(c))

    span_name = _clause(
        "span", lambda c: {"name": str(c[0]), "occurrence": c[1] if len(c) == 2 else None}
    )

    def further_span(self, c: list[Any]) -> ast.SpanRef:
        return ast.SpanRef(str(c[0]), occurrence=c[1], **_clauses(c), span=_span(c))

    def further(self, c: list[Any]) -> ast.Occurrence:
        variable = ast.Variable(str(c[0]), offset=_number_after_sign(c[1:]), span=_span(c))
        return ast.Occurrence(variable, span=variable.span)

    def edge_span(self, c: list[Any]) -> Clause:
        edge, _, name = str(c[0]).partition("-")
        return Clause("span", {"edge": edge, "name": name}, _span(c))

    span_text = _clause("span", lambda c: {"literal": c[0].value})
    span_of = _clause("of", lambda c: str(c[1]))

    def occurrence(self, c: list[Any]) -> ast.Occurrence:
        if c[0].type == "STAR":
            return ast.Occurrence(None, span=_span(c))
        if c[0].type == "NAME":
            return ast.Occurrence(ast.Variable(str(c[0]), span=_span(c)), span=_span(c))
        high = _integer(c[2]) if len(c) == 3 else None
        return ast.Occurrence(_integer(c[0]), high, span=_span(c))

    view_span = _clause("span", lambda c: {"name": str(c[0]), "view": c[1]})

    def view(self, c: list[Any]) -> ast.ImageView:
        number = c[1] if len(c) == 2 else None
        return ast.ImageView(number, is_frame=str(c[0]) == "frame", span=_span(c))

    def patches_span(self, c: list[Any]) -> ast.SpanRef:
        view = c[1] if isinstance(c[1], ast.ImageView) else None
        *occurrence, row, col = (each for each in c if isinstance(each, ast.Occurrence))
        return ast.SpanRef(
            str(c[0]),
            occurrence=occurrence[0] if occurrence else None,
            view=view,
            row=row,
            col=col,
            **_clauses(c),
            span=_span(c),
        )

    def patches(self, c: list[Any]) -> ast.Occurrence:
        numbers = [clause.value for clause in c if isinstance(clause, Clause)]
        low, high = (*numbers, None, None)[:2]
        return ast.Occurrence(low, high, span=_span(c))

    patch_number = _clause("number", lambda c: _counted(c))

    # --- expressions ---------------------------------------------------------------------------

    def domain(self, c: list[Any]) -> ast.Domain:
        step = _clauses(c).get("step")
        values = c[0] if step is not None else _range_of_decimal(c[0])
        return ast.Domain(values, step, span=_span(c))

    step = _clause("step", _second)

    def call(self, c: list[Any]) -> Any:
        arguments = tuple(_nodes(c))
        return _nested(ast.Call(str(c[0]), arguments, span=_span(c)), *arguments)

    def argument(self, c: list[Any]) -> ast.Argument:
        name = str(c[0]) if len(c) == 3 else None
        value = c[-1]
        if isinstance(value, ast.RankedSelection):
            value = ast.Site(ranked=value, span=value.span)
        node = ast.Argument(name, value, span=_span(c))
        depths = PARSE_CONTEXT.get().depths
        depths[id(node)] = depths.get(id(value), 0)
        return node

    chat_argument = argument

    control = call

    def word(self, c: list[Any]) -> ast.Argument:
        return ast.Argument(None, ast.Name(str(c[0]), span=_span(c)), span=_span(c))

    def quantity(self, c: list[Any]) -> ast.Quantity:
        return ast.Quantity(c[0].value, str(c[1]), **_clauses(c), span=_span(c))

    quantity_of = _clause("of", lambda c: str(c[1]))
    edge_token_of = _node(ast.EdgeTokenOf, 0, 3, nested=True)
    site_map = _node(ast.SiteMap, 0, 2)

    def placed_edge(self, c: list[Any]) -> ast.SiteMap:
        of, at = c[0], next((part for part in c if isinstance(part, ast.Position)), None)
        return of if at is None else ast.SiteMap(of.source, of.target, at, span=_span(c))

    view_run = _clause("run", _second)
    view_at = _clause("at", lambda c: ast.Positions((c[1],), span=c[1].span))

    def site_view(self, c: list[Any]) -> ast.SiteView:
        return ast.SiteView(c[0], **_clauses(c), span=_span(c))

    class_output = _node(ast.ClassOutput, 1, nested=True)
    range = _node(ast.Range, 0, 2, nested=True)
    conditional = _node(ast.Conditional, 1, 3, 5, nested=True)
    disjunction = _node(ast.Logical, 1, 0, 2, nested=True)
    conjunction = disjunction
    negation = _node(ast.Not, 1, nested=True)
    compare = _node(ast.Compare, 1, 0, 2, nested=True)
    in_range = _node(ast.InRange, 0, 2, nested=True)
    near = _node(ast.Near, 0, 2, 4, nested=True)
    addition = _node(ast.Binary, 1, 0, 2, nested=True)
    multiplication = addition
    negative = _node(ast.Negative, 1, nested=True)

    def variable(self, c: list[Any]) -> ast.Name:
        return _defined(_name(c[0]), "; `rename { … }` gives a column of data another name")

    of_ref = _node(ast.QualifiedRef, 0, 2)

    def of_experiment(self, c: list[Any]) -> ast.ExperimentMeasure:
        measure = ast.QualifiedRef(str(c[0]), c[2], span=_span(c[:3]))
        return ast.ExperimentMeasure(measure, c[4], span=_span(c))

    attribute = _node(ast.Attribute, 0, 2)
    index = _node(ast.Index, 0, 2, nested=True)

    def list_of(self, c: list[Any]) -> Any:
        items = tuple(_nodes(c))
        return _nested(ast.ListLiteral(items, span=_span(c)), *items)

    def parenthesised(self, c: list[Any]) -> Any:
        PARSE_CONTEXT.get().brackets[id(c[1])] = c[1], _span(c)
        return c[1]

    def float(self, c: list[Any]) -> ast.Number:
        return ast.Number(_decimal(c[0], c[0]), span=_span(c))

    def percent(self, c: list[Any]) -> ast.Percent:
        return ast.Percent(_decimal(c[0], c[0][:-1]), span=_span(c))

    def string(self, c: list[Any]) -> ast.String:
        return ast.String(unescape(c[0][1:-1]), span=_span(c))


# --- statements with a form -----------------------------------------------------------------------


class _Kind(Record):
    """How fields of one kind are read."""

    accepts: Callable[[Any], bool]
    """Whether a token or node is one."""
    read: Callable[[Any], Any] = lambda child: child
    many: bool = False
    """Whether it is a list, separated by commas."""


def _is_token(child: object) -> bool:
    return isinstance(child, Token)


def _is_node(child: object) -> bool:
    return isinstance(child, ast.Node)


def _of(*kinds: type[ast.Node], many: bool = False) -> _Kind:
    return _Kind(lambda child: isinstance(child, kinds), many=many)


def _clause_of(kind: str) -> _Kind:
    return _Kind(lambda child: isinstance(child, Clause) and child.kind == kind, lambda c: c.value)


_KINDS: Mapping[str, _Kind] = {
    "axis": _of(ast.Axis),
    "axis_value": _of(ast.Star, ast.AxisRange),
    "call": _Kind(_is_node, lambda child: _as_call(child)),
    "call_or_name": _of(ast.Call, ast.Name),
    "columns": _clause_of("width"),
    "condition": _Kind(_is_node),
    "count": _Kind(
        lambda child: _is_token(child) or isinstance(child, ast.Number | ast.Name),
        lambda child: _count(child) if _is_token(child) else _amount(child),
    ),
    "direction": _of(ast.Name, ast.Index),
    "domain": _of(ast.Domain),
    "edge": _of(ast.Edge),
    "edges": _of(ast.SiteMap, many=True),
    "expr": _Kind(_is_node),
    "flag": _Kind(_is_token, lambda _: True),
    "further": _of(ast.Fill, many=True),
    "integer": _Kind(_is_token, lambda child: _integer(child)),
    "maps": _of(ast.MapOf, many=True),
    "name": _Kind(_is_name, lambda child: _named(child)),
    "names": _clause_of("refs"),
    "new": _Kind(_is_name, lambda child: _defined(_named(child))),
    "new_names": _Kind(_is_token, lambda child: _defined(_name(child)), many=True),
    "nodes": _Kind(
        lambda child: _is_name(child) or isinstance(child, ast.FeaturesOf),
        lambda child: child if isinstance(child, ast.FeaturesOf) else _named(child),
        many=True,
    ),
    "number_or_name": _Kind(
        lambda child: _is_token(child) or isinstance(child, ast.Number),
        lambda child: _named(child) if _is_token(child) else child,
    ),
    "observed": _Kind(
        lambda child: _is_token(child) or isinstance(child, ast.Call | ast.Name),
        lambda child: _name(child) if _is_token(child) else child,
    ),
    "other_features": _clause_of("features"),
    "percent": _of(ast.Percent),
    "picks": _of(ast.Pick, many=True),
    "position": _of(ast.Position),
    "positions": _of(ast.Positions),
    "ref": _of(ast.Ref),
    "refs": _clause_of("refs"),
    "region": _of(ast.Name, ast.Position),
    "site": _of(ast.Site),
    "sites": _of(ast.Site, many=True),
    "string": _of(ast.String),
    "sum": _Kind(_is_node),
    "training": _of(ast.Call),
    "word": _Kind(_is_token, str),
    "word_itself": _Kind(_is_token, lambda child: _name(child)),
    "written": _Kind(_is_node),
}
"""Kinds of fields by name, other than `block`."""


class _FormReader:
    """Reads the fields of one statement."""

    def __init__(self, children: Sequence[Any]) -> None:
        self.children = [*_flat(children)]
        self.at = 0
        self.values: dict[str, Any] = {}

    def read(self, parts: Sequence[FormPart]) -> None:
        for part in parts:
            if isinstance(part, str):
                self.at += 1
            elif isinstance(part, FormField):
                self.values[part.name] = self._field(part)
            else:
                self._group(part)

    def _field(self, part: FormField) -> Any:
        if part.kind == "block":
            start, self.at = self.at + 1, len(self.children)
            return tuple(self.children[start:-1])
        kind = _KINDS[part.kind]
        if not kind.many:
            self.at += 1
            return kind.read(self.children[self.at - 1])
        fields: list[Any] = []
        while not fields or self._is_word(self.at, ","):
            at = self.at + self._is_word(self.at, ",")
            if at == len(self.children) or not kind.accepts(self.children[at]):
                break
            fields.append(kind.read(self.children[at]))
            self.at = at + 1
        return tuple(fields)

    def _group(self, group: FormGroup) -> None:
        for each in group.alternatives:
            if self._follows(each):
                self.read(each)
                if group.flag:
                    self.values[group.flag] = True
                return

    def _follows(self, parts: Sequence[FormPart]) -> bool:
        """Whether the parts follow: their words up to the first field, this field, and the words
        after it."""
        fields = 0
        for at, part in enumerate(parts, self.at):
            if isinstance(part, str):
                if not self._is_word(at, part):
                    return False
            elif isinstance(part, FormField) and not fields:
                if at >= len(self.children) or not _KINDS[part.kind].accepts(self.children[at]):
                    return False
                if part.kind in ("flag", "word_itself") and not self._is_word(at, part.name):
                    return False
                if part.kind == "block" or _KINDS[part.kind].many:
                    return True
                fields += 1
            else:
                return True
        return True

    def _is_word(self, at: int, word: str) -> bool:
        child = self.children[at] if at < len(self.children) else None
        return isinstance(child, Token) and " ".join(child.split()) == word


def _flat(children: Sequence[Any]) -> Iterator[Any]:
    """Iterate over tokens and nodes, with those of clauses that a form names."""
    for child in children:
        if isinstance(child, Tree):
            yield from _flat(child.children)
        elif isinstance(child, Clause) and child.parts:
            yield from _flat(child.parts)
        else:
            yield child


def _build(form: Form, children: Sequence[Any]) -> ast.Node:
    """Build a statement; the grammar has checked that the children have its form."""
    reader = _FormReader(children)
    reader.read(form.parts)
    assert reader.at == len(reader.children), f"{form.text} doesn't describe all of its rule"
    return form.node(**reader.values, span=_span(reader.children))


def _builder(form: Form) -> Callable[[TreeBuilder, list[Any]], ast.Node]:
    return lambda _, children: _build(form, children)


for _form in FORMS.values():
    for _rule in _form.rules:
        setattr(TreeBuilder, _rule, _builder(_form))


def _range_of_decimal(values: ast.Expr | ast.Range) -> ast.Expr | ast.Range:
    """Report `x in 2.9`, and return `2..9` so that dependent checks continue."""
    if not isinstance(values, ast.Number):
        return values
    span = values.span
    low, dot, high = span.text.partition(".")
    if not (dot and low.isdecimal() and high.isdecimal()):
        return values
    is_range = high == str(int(high))
    hint = f"for one value write `[{span.text}]`"
    if is_range:
        hint = f"a range has two dots: `{low}..{high}`; {hint}"
    _report(
        UnexpectedToken(found=f"`{span.text}`", expected="a list or a range", hint=hint, span=span)
    )
    if not is_range:
        return values
    return ast.Range(ast.Number(int(low), span=span), ast.Number(int(high), span=span), span=span)


def _axis(
    word: Token,
    values: tuple[ast.AxisValue, ...],
    span: Span,
    *,
    window: int | str | None = None,
    of: str | None = None,
) -> ast.Axis:
    plural = word.endswith("s")
    singular: Any = word[:-1] if plural else str(word)
    return ast.Axis(singular, plural, values, window, of, span=span)


def _features(c: list[Any]) -> ast.Axis:
    """Build `features 3, 12 of b`."""
    kinds = (ast.Star, ast.AxisRange, ast.RankedSelection)
    values = tuple(child for child in c if isinstance(child, kinds))
    return _axis(c[0], values, _span(c), of=c[-1].id)


def _cells_of(node: ast.Call | ast.Name) -> tuple[str, tuple[ast.Argument, ...]]:
    """Return an experiment and the selected cells."""
    return (node.id, ()) if isinstance(node, ast.Name) else (node.name, node.arguments)


def _without_at(of: ast.SpanRef, whole: Span) -> ast.SpanRef:
    """Undo a misread `image` in `replace at image tokens`: no span is called `at`; the word was
    written as before the positions of a site."""
    place = Span(whole.source, of.span.start, of.span.start + len("at"))
    hint = f"leave it out: `{Span(whole.source, place.end, whole.end).written}`"
    _report(UnexpectedToken(found="`at`", expected="a position", hint=hint, span=place))
    named = None if of.occurrence is None else of.occurrence.low
    return replace(of, name=named.name, occurrence=None) if isinstance(named, ast.Variable) else of


def _further_token(before: ast.Position, index: Clause) -> ast.Position:
    """Read `3` in `token 0, 3`; its type follows from the previous item."""
    body = before.body
    base = body.base if isinstance(body, ast.Point) else None
    if not isinstance(base, ast.TokenIndex):
        _report(
            UnexpectedToken(
                found=f"`{index.span.text}`",
                expected="a position",
                hint=f"write `token {index.span.text}`",
                span=index.span,
            )
        )
    plural = isinstance(base, ast.TokenIndex) and base.plural
    token = ast.TokenIndex(plural, *index.value, span=index.span)
    return ast.Position(ast.Point(token, span=index.span), span=index.span)


def _without_misspelt(clauses: Sequence[Clause]) -> list[Clause]:
    """Drop `corect holm` from the clauses of a `stats` line, which reads as two resampling methods,
    and report E0102 for its first word."""
    kept: list[Clause] = []
    following = iter(clauses)
    for clause in following:
        word = clause.value.name if clause.kind == "resampling" else ""
        meant = close_names(word, ("test", "confidence", "correct", "verdicts", "by"))
        if clause.span.text != word or not meant:
            kept.append(clause)
            continue
        _report(MisspeltWord(word=word, meant=meant[0], span=clause.span))
        kept += (each for each in (next(following, None),) if each and each.kind != clause.kind)
    return kept


def _repeated(clauses: Sequence[Clause]) -> Clause:
    """Return the first clause that repeats an earlier one."""
    seen: set[str] = set()
    for clause in clauses:
        if clause.kind in seen:
            return clause
        seen.add(clause.kind)
    raise AssertionError("each clause can appear only once")
