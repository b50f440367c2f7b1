"""From a place where the parser stopped to a message that says what to write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mechdsl.base.registry import nearest
from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import MisspeltWord, ReservedName, UnexpectedToken, WrongVersion
from mechdsl.syntax import ast
from mechdsl.syntax.changes import SIGNATURES
from mechdsl.syntax.grammar import keywords
from mechdsl.syntax.mistakes.hints import hint
from mechdsl.syntax.mistakes.pieces import WORDS, Piece, first_words
from mechdsl.syntax.reserved import (
    CHANGE_WORDS,
    DATA_WORDS,
    EXPERIMENT_WORDS,
    POSITION_WORDS,
    RESERVED,
    TOP_WORDS,
)

_BLOCKS = {
    "top_lines": "a statement of the file, such as `prompts` or `experiment`",
    "data_lines": "a line of a `prompts` block, such as `template` or `answer`",
    "change_lines": "a change, such as `count = count - 1`",
    "experiment_lines": "a statement of an `experiment`, such as `patch` or `measure`",
}
_HOMES = (
    (TOP_WORDS, "at the outermost level of the file, outside every brace"),
    (EXPERIMENT_WORDS, "in an `experiment` block"),
    (DATA_WORDS, "in a `prompts` or `images` block"),
    (CHANGE_WORDS, "in a `corrupt` block"),
)
_CHANGED = {("change_lines", "image"): "change the image that is there: `mask image` is gray"}
"""What a word of another block is meant for."""
_SHOWN = 4
_VALUES = frozenset({"NAME", "STRING", "INT", "FLOAT", "PERCENT"})
"""What the values of a change begin with."""
_AXES = frozenset(
    name + plural
    for name in ("LAYER", "HEAD", "NEURON", "EXPERT", "FEATURE")
    for plural in ("", "S")
)


@dataclass(frozen=True)
class Mistake:
    """Where the parser stopped, and in what."""

    source: Source
    kind: str
    """Which lines it was reading."""
    begin: int
    end: int
    """The statement at fault."""
    offset: int
    """Where the parser stopped; the end of the block if a statement is cut short by it."""
    token: Piece | None
    before: Piece | None
    statement: list[Piece]
    accepts: frozenset[str]
    lexed: str
    """What the lexer took the token for."""

    @property
    def cut_short(self) -> bool:
        """The statement ends where something is still missing."""
        return self.offset >= self.end or self.token is None

    @property
    def span(self) -> Span:
        """The token, or behind the one before where the next statement is innocent."""
        innocent = self.cut_short or (self.token is not None and self.token.first)
        if innocent and self.before is not None and self.before.start >= self.begin:
            return Span(self.source, self.before.end, self.before.end)
        if self.token is None:
            return Span(self.source, self.offset, self.offset)
        return Span(self.source, self.token.start, self.token.end)


def explain(mistake: Mistake) -> Diagnostic:
    """The message for a mistake: the most telling that applies."""
    return (
        _first_word(mistake)
        or _taken_for_position(mistake)
        or _misspelt(mistake)
        or hinted(mistake)
        or _reserved(mistake)
        or misplaced(mistake)
    )


def _first_word(mistake: Mistake) -> Diagnostic | None:
    """A statement that begins with something no statement of its block begins with."""
    if not mistake.statement:
        return None
    word = mistake.statement[0]
    span = Span(mistake.source, word.start, word.end)
    if word.text == "mech" and mistake.kind == "top_lines":
        return WrongVersion(
            problem="`mech` stands a second time", place="the version is known", span=span
        )
    if word.kind != "word":
        if mistake.offset > word.start:
            return None
        expected = _BLOCKS[mistake.kind]
        return UnexpectedToken(found=f"`{_short(word.text)}`", expected=expected, span=span)
    if word.text in first_words(mistake.kind) or _is_definition(mistake):
        return None
    for words, home in _HOMES:
        if word.text in words:
            return UnexpectedToken(
                found=f"`{word.text}`",
                expected=_BLOCKS[mistake.kind],
                hint=_CHANGED.get((mistake.kind, word.text), f"`{word.text}` belongs {home}"),
                span=span,
            )
    meant = nearest(word.text, first_words(mistake.kind))
    if meant is not None:
        return MisspeltWord(word=word.text, meant=meant, span=span)
    said = hint("", mistake.source.text[word.start : mistake.end], mistake.accepts)
    return UnexpectedToken(
        found=f"`{_short(word.text)}`", expected=_BLOCKS[mistake.kind], hint=said or "", span=span
    )


def _is_definition(mistake: Mistake) -> bool:
    if mistake.kind not in ("data_lines", "change_lines") or len(mistake.statement) < 2:
        return False
    return mistake.statement[1].text in ("=", "in", ",")


def _taken_for_position(mistake: Mistake) -> Diagnostic | None:
    """`reverse first` in a `corrupt` block: where a change takes a value, the grammar of all
    changes reads the word as the beginning of a position."""
    words = [piece.text for piece in mistake.statement]
    signature = SIGNATURES.get(words[0]) if words and mistake.kind == "change_lines" else None
    if signature is None or signature.tokens:
        return None
    for n, piece in enumerate(mistake.statement[1:], 1):
        if piece.start >= mistake.offset or words[n] not in POSITION_WORDS:
            continue
        if n > 1 and words[n - 1] != ",":
            continue
        span = Span(mistake.source, piece.start, piece.end)
        wanted = signature.accepts(words[:n], _VALUES)
        if "NAME" in wanted and ast.Call not in signature.values:
            return ReservedName(name=piece.text, span=span)
        expected = _expected(replace(mistake, accepts=wanted))
        quotes = f'write it in quotes: `{words[0]} "…"`' if "STRING" in wanted else ""
        return UnexpectedToken(found=f"`{piece.text}`", expected=expected, hint=quotes, span=span)
    return None


def hinted(mistake: Mistake) -> Diagnostic | None:
    """What people write by habit there."""
    found = hint(
        mistake.source.text[mistake.begin : mistake.offset],
        mistake.source.text[mistake.offset : mistake.end],
        mistake.accepts,
    )
    if found is None:
        return None
    return misplaced(mistake, found)


def _misspelt(mistake: Mistake) -> Diagnostic | None:
    token = mistake.token
    if mistake.cut_short or token is None or token.kind != "word":
        return None
    meant = nearest(token.text, _words(mistake.accepts))
    if meant is None or meant == token.text:
        return None
    if token.text in keywords().values():  # `layers` for `layer`, but not `and` for `add`
        if token.text.removesuffix("s") != meant.removesuffix("s"):
            return None
        return misplaced(mistake, f"write `{meant}`", word=token)
    span = Span(mistake.source, token.start, token.end)
    return MisspeltWord(word=token.text, meant=meant, span=span)


def _reserved(mistake: Mistake) -> Diagnostic | None:
    """A word of the language where a name is wanted."""
    token = mistake.token
    if mistake.cut_short or token is None:
        return None
    before = mistake.before
    if before is not None and before.text in RESERVED and token.kind == "sign":
        # `prob(head)`: read as an axis, whose number is missing.
        if before.depth > mistake.statement[0].depth:
            return ReservedName(
                name=before.text, span=Span(mistake.source, before.start, before.end)
            )
        return None
    if token.text not in RESERVED:
        return None
    if mistake.lexed == "NAME" or "NAME" not in mistake.accepts:
        return None
    return ReservedName(name=token.text, span=Span(mistake.source, token.start, token.end))


def misplaced(mistake: Mistake, hint: str = "", *, word: Piece | None = None) -> Diagnostic:
    """E0101: what stands where the parser stopped, or this word there, has no place."""
    span = Span(mistake.source, word.start, word.end) if word else mistake.span
    found, expected = _found(mistake), _expected(mistake)
    return UnexpectedToken(found=found, expected=expected, hint=hint, span=span)


def _found(mistake: Mistake) -> str:
    token = mistake.token
    if not mistake.cut_short and token is not None:
        return f"`{_short(token.text)}`"
    if mistake.statement and mistake.statement[0].kind == "word":
        return f"end of the `{mistake.statement[0].text}` statement"
    return "end of the statement"


def _short(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:29]}…"


def _words(accepts: Iterable[str]) -> set[str]:
    known = keywords()
    return {known[name] for name in accepts if known.get(name, "").isalpha()}


_GROUPS: tuple[tuple[str, frozenset[str]], ...] = (
    (
        "a position, such as `last token`",
        frozenset({"TOKEN", "TOKENS", "EACH", "FIRST", "LAST", "TOP", "BEST", "EDGE_SPAN"})
        | {"STRING", "NAME", "LBRACE"},
    ),
    (
        "a site, such as `resid_post layer 3`",
        frozenset({"SHORT", "TOP", "BEST", "NAME"}) | _AXES,
    ),
    (
        "an expression",
        frozenset({"NAME", "INT", "FLOAT", "PERCENT", "STRING", "SHORT", "MINUS", "LPAR", "LSQB"})
        | {"NOT", "IF"},
    ),
    ("a layer, head or range", frozenset({"STAR", "INT", "PERCENT", "NAME", "MINUS"})),
    ("an operator", frozenset({"PLUS", "MINUS", "STAR", "SLASH"})),
    ("a comparison", frozenset({"COMPARISON", "EQUAL", "IN", "NEAR"})),
    ("an axis such as `layer 3`", _AXES),
)
"""What several terminals together mean; a group is named when all of it is accepted (of the first
three: all but what the place excludes)."""

_SINGLES = {
    "NAME": "a name",
    "DEF": "a name",
    "ARGUMENT": "an argument",
    "INT": "a whole number",
    "FLOAT": "a number",
    "PERCENT": "a percentage",
    "STRING": "a text in quotes",
    "SHORT": "a site such as `L9H9`",
    "EDGE_SPAN": "`last-…`",
    "BEST": "`best of`",
    "FROZEN": "`frozen norms`",
    "AFTER": "`after prefill`",
    "COMPARISON": "a comparison",
    "$END": "the end",
}


def _expected(mistake: Mistake) -> str:
    """What could stand there, in a few words."""
    left = set(mistake.accepts)
    known = keywords()
    complete = "$END" in left
    if complete:
        left -= {name for name in left if known.get(name, "") in WORDS[mistake.kind]}
        left -= {"$END", "DEF"}
    texts: list[str] = []
    for text, group in _GROUPS:
        core = group - {"NOT", "IF", "TOP", "BEST"}
        if core <= left:
            texts.append(text)
            left -= group
    clauses = sorted(f"`{known[name]}`" for name in left if known.get(name, "").isalpha())
    signs = sorted(f"`{known[name]}`" for name in left if not known.get(name, "a").isalpha())
    others = sorted({_SINGLES[name] for name in left if name in _SINGLES})
    texts = clauses + others + texts if len(clauses) <= _SHOWN else texts + others + clauses
    texts = [*texts, *signs][:_SHOWN]
    if complete:
        texts = [*texts[: _SHOWN - 1], "the next statement"]
    if len(texts) > 1:
        return f"{', '.join(texts[:-1])} or {texts[-1]}"
    return texts[0] if texts else "something else"
