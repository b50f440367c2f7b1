"""The words and signs of a text with an error in it, and where its statements begin."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass

from mechdsl.base.registry import nearest
from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import Unclosed, UnexpectedToken
from mechdsl.syntax.reserved import (
    BLOCK_WORDS,
    CHANGE_WORDS,
    CLAUSE_WORDS,
    DATA_WORDS,
    EXPERIMENT_WORDS,
    SOFT_WORDS,
    TOP_WORDS,
)
from mechdsl.syntax.scan import STRING
from mechdsl.syntax.verbs import VERBS

_PIECE = re.compile(
    rf"(?P<string>{STRING})|#[^\n]*|(?P<word>[A-Za-z_]\w*)|(?P<number>[0-9]+)"
    r"|(?P<sign>\.\.|->|[<>!]=|[^\s])"
)
_CLOSERS = {"{": "}", "(": ")", "[": "]"}
_HEADER = re.compile(
    r"(experiment|prompts|images)\s+\w+\s*\{"
    r"|(param|model|metric|direction|basis|group)\s+\w+\s*=(?!=)"
    r'|use\s+"|seed\s+[0-9]+|mech\s+[0-9]+'
)
"""What begins a statement of the outermost level and nothing else."""
_BLOCK = re.compile(r"(?P<head>(?:experiment|prompts|images)[ \t]+\w+)[ \t]*\n\s*(?!\{|\s)")
_INNER_BLOCK = re.compile(
    r"(?P<head>corrupt[ \t]+\w+)\s+(?:\w+\s*[=,]|(?:swap|template|add|replace|blur)\b)"
    r"|(?P<loop>for[ \t]+\w+[ \t]+in[ \t]+[^\n{}]*?[^\s{}])"
    rf"\s+(?:{'|'.join(sorted(EXPERIMENT_WORDS))})\b"
)
"""What stands before the brace of a block, where what the block holds follows without one."""
_DEFINITION = re.compile(r"[A-Za-z_]\w*(?=(?:\s*,\s*[A-Za-z_]\w*)*\s*=(?!=)|\s+in(?!\w))")
_DEFINERS = ("text", "span", "region", "where", "corrupt")
"""Words of data lines behind which a name and a `=` begin no line of their own."""
_FROM_INTO = re.compile(
    r"from\s+(?!(?:last|first|each|tokens?|top)\b)[\w.]+(?:\s*,\s*[\w.]+)*"
    r"\s+(?!(?:tokens?|row|of|at|(?:layer|head|neuron|expert|feature)s?)\b)[a-z]"
)
"""`from RUN into RUN`, also with `into` misspelt, but no `from POSITION` or `from SITE`."""

WORDS: Mapping[str, Set[str]] = {
    "top_lines": TOP_WORDS,
    "data_lines": DATA_WORDS,
    "change_lines": CHANGE_WORDS,
    "experiment_lines": EXPERIMENT_WORDS,
}
"""First words of the statements that each kind of block holds."""


def first_words(kind: str) -> Set[str]:
    """The same, with soft words and the verbs of rules that were registered from outside."""
    own = WORDS[kind]
    return own | SOFT_WORDS | frozenset(VERBS) if kind == "experiment_lines" else own


INSIDE = {
    "experiment": "experiment_lines",
    "for": "experiment_lines",
    "run": "experiment_lines",
    "prompts": "data_lines",
    "images": "data_lines",
    "corrupt": "change_lines",
}
"""What the braces behind each word hold."""


@dataclass
class Piece:
    """A word, number, text or sign."""

    kind: str
    text: str
    start: int
    end: int
    first: bool
    """It is the first on its line."""
    depth: int = 0
    """How many brackets are open before it."""
    partner: int | None = None
    """For an opening bracket, the offset of its closing one."""


def pieces(text: str) -> list[Piece]:
    """All pieces of a text, without brackets matched."""
    found: list[Piece] = []
    line_end = -1
    for match in _PIECE.finditer(text):
        if match.lastgroup is None:
            continue
        if match.start() > line_end:
            line_end = text.find("\n", match.start())
            if line_end < 0:
                line_end = len(text)
            first = True
        else:
            first = False
        kind = match.lastgroup
        found.append(Piece(kind, match[0], match.start(), match.end(), first))
    return found


def balance(source: Source, text: str) -> tuple[str, list[Diagnostic]]:
    """The text with brackets that match, and which ones didn't (E0103, E0101).

    A closing bracket that is missing takes the place of white space before the word at which its
    absence shows, one too many becomes a blank.
    """
    chars = list(text)
    diagnostics: list[Diagnostic] = []
    opened: list[Piece] = []
    early: list[Piece] = []
    """Closing braces that aren't the first on their line, with an opening one on another line."""

    def indent(offset: int) -> int:
        line = text[text.rfind("\n", 0, offset) + 1 : offset + 1]
        return len(line) - len(line.lstrip())

    def close(piece: Piece, before: int, place: str) -> None:
        closer = _CLOSERS[piece.text]
        span = Span(source, piece.start, piece.end)
        diagnostics.append(Unclosed(opener=piece.text, closer=closer, place=place, span=span))
        slot = before - 1
        while slot > piece.end and chars[slot].isspace() and chars[slot - 1].isspace():
            slot -= 1
        if slot >= piece.end and slot < len(chars) and chars[slot].isspace():
            chars[slot] = closer
        else:
            chars.insert(before, closer) if before >= len(chars) else chars.__setitem__(
                piece.start, " "
            )

    for piece in pieces(text):
        if piece.kind == "word" and piece.first and opened:
            line = source.line_column(piece.start)[0]
            if _HEADER.match(text, piece.start) and not (
                piece.text in ("prompts", "images", "model") and opened[-1].text != "{"
            ):
                while opened:
                    close(opened.pop(), piece.start, f", before line {line}")
            while opened and opened[-1].text != "{" and _begins(text, piece):
                close(opened.pop(), piece.start, f", before line {line}")
        if piece.kind == "word" and piece.first and (end := _headless(text, piece, len(opened))):
            chars[end] = "{"
            opened.append(Piece("sign", "{", end, end + 1, first=False))
            diagnostics.append(_no_brace(source, piece, end))
        if piece.kind != "sign":
            continue
        if piece.text in _CLOSERS:
            opened.append(piece)
        elif piece.text in "})]":
            matching = [i for i, o in enumerate(opened) if _CLOSERS[o.text] == piece.text]
            if not matching:
                # It may be the right one, and one before it have taken its place.
                stray = early.pop() if early and piece.text == "}" else piece
                chars[stray.start] = " "
                diagnostics.append(_stray(source, stray))
                continue
            index = matching[-1]
            if piece.first and piece.text == "}":
                # Indentation says which of several open braces was meant.
                here = indent(piece.start)
                aligned = [i for i in matching if indent(opened[i].start) == here]
                if aligned and indent(opened[index].start) > here:
                    index = aligned[-1]
            while len(opened) > index + 1:
                line = source.line_column(piece.start)[0]
                close(opened.pop(), piece.start, f", before the `{piece.text}` of line {line}")
            opener = opened.pop()
            if not piece.first and "\n" in text[opener.start : piece.start]:
                early.append(piece)
    while opened:
        close(opened.pop(), len(chars), "")
    return "".join(chars), diagnostics


def _headless(text: str, piece: Piece, depth: int) -> int:
    """Where the brace is missing behind the words that open a block; 0 where none is."""
    head = (_BLOCK if depth == 0 else _INNER_BLOCK).match(text, piece.start)
    return head.end(head.lastgroup or 0) if head else 0


def _no_brace(source: Source, piece: Piece, end: int) -> Diagnostic:
    found = f"end of the `{piece.text}` statement"
    span = Span(source, end, end)
    hint = f"the lines of `{piece.text}` stand between `{{` and `}}`"
    return UnexpectedToken(found=found, expected="`{`", hint=hint, span=span)


def _begins(text: str, piece: Piece) -> bool:
    """Whether a word inside round or square brackets can only begin a statement."""
    rest = text[piece.end :].lstrip()[:1]
    words = EXPERIMENT_WORDS | DATA_WORDS | TOP_WORDS
    if piece.text in words and rest not in (":", ",", ")", "]", ".", ""):
        return True
    return _DEFINITION.match(text, piece.start) is not None and rest == "="


def _stray(source: Source, piece: Piece) -> Diagnostic:
    opener = next(o for o, c in _CLOSERS.items() if c == piece.text)
    return UnexpectedToken(
        found=f"`{piece.text}`",
        expected="no closing bracket",
        hint=f"no `{opener}` is open here",
        span=Span(source, piece.start, piece.end),
    )


def matched(text: str) -> list[Piece]:
    """All pieces of a text whose brackets match, with their depths and partners."""
    found = pieces(text)
    opened: list[Piece] = []
    for piece in found:
        if piece.kind == "sign" and piece.text in ("}", ")", "]") and opened:
            opened.pop().partner = piece.start
        piece.depth = len(opened)
        if piece.kind == "sign" and piece.text in _CLOSERS:
            opened.append(piece)
    return found


def starts(text: str, inside: list[Piece], kind: str, depth: int) -> list[int]:
    """Indices of the pieces that begin a statement of a block."""
    found: list[int] = []
    words = WORDS[kind]
    for i, piece in enumerate(inside):
        if piece.kind != "word" or piece.depth != depth:
            continue
        before = inside[i - 1] if i else None
        goes_on = before is not None and before.text in ("+", "-", "/", ",", "=", "->", "..")
        if piece.text in words:
            inner = piece.text == "from" and not _FROM_INTO.match(text, piece.start)
            if piece.text == "using" and found and inside[found[-1]].text == "discover":
                inner = True
            if not inner and not (goes_on and not piece.first):
                found.append(i)
        elif (
            i == 0
            or (kind in ("data_lines", "change_lines") and _defines(text, piece, before, goes_on))
            or (piece.first and not goes_on and piece.text not in CLAUSE_WORDS)
        ):
            found.append(i)
    return found


def _defines(text: str, piece: Piece, before: Piece | None, goes_on: bool) -> bool:
    if goes_on:
        return False
    if before is not None and (before.text in _DEFINERS or _is_near_definer(before)):
        return False
    return _DEFINITION.match(text, piece.start) is not None


def _is_near_definer(piece: Piece) -> bool:
    """`sapn bar = "|"`: the word that begins a line is a misspelt one."""
    return piece.first and piece.kind == "word" and nearest(piece.text, _DEFINERS) is not None


def block_of(statement: list[Piece], first: str) -> Piece | None:
    """The brace that opens the lines of a statement, if it has some; `first` is what its first word
    is read as."""
    if first not in BLOCK_WORDS:
        return None
    depth = statement[0].depth
    for piece in statement:
        if piece.text == "{" and piece.kind == "sign" and piece.depth == depth:
            return piece
    return None
