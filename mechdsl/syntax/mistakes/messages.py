"""Explain syntax errors: from the position where the parser stopped to a message with a fix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace

from mechdsl.base.records import closest_name
from mechdsl.base.text import STRING_PATTERN, Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.habits import Rewrite
from mechdsl.diagnostics.syntax import (
    MisspeltWord,
    ReservedName,
    Unclosed,
    UnexpectedToken,
    WrongVersion,
)
from mechdsl.syntax import ast
from mechdsl.syntax.mistakes.hints import find_hint
from mechdsl.syntax.parser import keywords
from mechdsl.syntax.tree_builder import RegisteredWords
from mechdsl.syntax.words import (
    BLOCK_WORDS,
    CHANGE_WORDS,
    CLAUSE_WORDS,
    DATA_WORDS,
    EDIT_WORDS,
    EXPERIMENT_WORDS,
    POSITION_WORDS,
    RESERVED,
    SOFT_WORDS,
    TOP_WORDS,
)

_PIECE = re.compile(
    rf"(?P<string>{STRING_PATTERN})|#[^\n]*|(?P<word>[A-Za-z_]\w*)|(?P<number>[0-9]+)"
    r"|(?P<sign>\.\.|->|[<>!]=|[^\s])"
)

_CLOSERS = {"{": "}", "(": ")", "[": "]"}

_HEADER = re.compile(
    r"(experiment|prompts|images)\s+\w+\s*\{"
    r"|(param|model|metric|direction|basis|lens|probe|group|circuit)\s+\w+\s*=(?!=)"
    r'|use\s+"|seed\s+[0-9]+|mech\s+[0-9]+'
)
"""The beginning of a statement that is only valid at the top level."""


def _any_of(words: Iterable[str]) -> str:
    return "|".join(sorted(words))


_BLOCK = re.compile(
    r"(?P<head>(?:experiment|prompts|images)[ \t]+\w+)[ \t]*\n\s*(?!\{|\s)"
    rf"|(?P<statements>experiment[ \t]+\w+)[ \t]+(?:{_any_of(EXPERIMENT_WORDS)})\b"
    rf"|(?P<data>(?:prompts|images)[ \t]+\w+)[ \t]+"
    rf"(?:(?:{_any_of(DATA_WORDS)})\b|\w+[ \t]*=(?!=)|\w+[ \t]+in\b)"
)

_INNER_BLOCK = re.compile(
    r"(?P<head>corrupt[ \t]+\w+)\s+(?:\w+\s*[=,]|(?:swap|template|add|replace|blur)\b)"
    r"|(?P<run>run[ \t]+\w+)[ \t]*\n\s*(?=[A-Za-z_])"
    rf"|(?P<short>run[ \t]+\w+)[ \t]+(?:{_any_of(EXPERIMENT_WORDS)})\b"
    r"|(?P<loop>for[ \t]+\w+[ \t]+in[ \t]+[^\n{}]*?[^\s{}])"
    rf"\s+(?:{_any_of(EXPERIMENT_WORDS)})\b"
)
"""The text before the brace of a block, followed by the block's lines without a brace."""

_COLON = re.compile(
    r"(?P<head>(?:(?:experiment|prompts|images|corrupt|run)[ \t]+\w+)"
    r"|for[ \t]+\w+[ \t]+in[ \t]+[^\n{}:]*?)[ \t]*(?P<colon>:)[ \t]*(?:\n|\Z)"
)
"""A block that begins with a colon, as in Python."""

_LINE = re.compile(r"^(?P<indent>[ \t]*)(?P<first>[^\s#])[^\n]*", re.MULTILINE)
"""A line that is neither blank nor a comment."""

_PATH_START = re.compile(r"model\.[A-Za-z_]")

_DEFINITION = re.compile(r"[A-Za-z_]\w*(?=(?:\s*,\s*[A-Za-z_]\w*)*\s*=(?!=)|\s+in(?!\w))")

_DEFINERS = ("text", "span", "region", "where", "corrupt")
"""Words at the start of data lines after which a name and `=` don't begin a new line."""

_FROM_INTO = re.compile(
    r"from\s+(?!(?:last|first|each|tokens?|top)\b)[\w.]+(?:\s*,\s*[\w.]+)*"
    r"\s+(?!(?:tokens?|row|of|at|(?:layer|head|neuron|expert|feature)s?)\b)[a-z]"
)
"""`from RUN into RUN`, also with a misspelt `into`, but not `from POSITION` or `from SITE`."""

FIRST_WORDS: Mapping[str, Set[str]] = {
    "top_lines": TOP_WORDS,
    "data_lines": DATA_WORDS,
    "change_lines": CHANGE_WORDS,
    "experiment_lines": EXPERIMENT_WORDS,
    "edit_lines": EDIT_WORDS,
}
"""First words of the statements in each type of block, except for soft and registered words."""


def certain_first_words(kind: str, words: RegisteredWords) -> Set[str]:
    """Return the words that always begin a statement in a type of block."""
    return words.change_words if kind == "change_lines" else FIRST_WORDS[kind]


def first_words(kind: str, words: RegisteredWords) -> Set[str]:
    """Return the first words of a block's statements, with soft words and registered verbs."""
    certain = certain_first_words(kind, words)
    return certain | SOFT_WORDS | frozenset(words.verbs) if kind == "experiment_lines" else certain


BLOCK_CONTENTS = {
    "experiment": "experiment_lines",
    "for": "experiment_lines",
    "run": "experiment_lines",
    "prompts": "data_lines",
    "images": "data_lines",
    "corrupt": "change_lines",
    "model": "edit_lines",
}
"""First word of a block → the start rule of its lines."""


@dataclass
class Lexeme:
    """A word, number, text or sign."""

    kind: str
    text: str
    start: int
    end: int
    first: bool
    """Whether it is the first on its line."""
    depth: int = 0
    """Number of open brackets before it."""
    partner: int | None = None
    """For an opening bracket, the offset of its closing bracket."""


def split_lexemes(text: str) -> list[Lexeme]:
    """Split a text into lexemes, without matching brackets."""
    lexemes: list[Lexeme] = []
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
        lexemes.append(Lexeme(kind, match[0], match.start(), match.end(), first))
    return lexemes


def balance_brackets(source: Source, text: str) -> tuple[str, list[Diagnostic]]:
    """Repair unmatched brackets and report them (E0103, E0101).

    A missing closing bracket replaces white space before the word that reveals its absence; a
    superfluous one becomes a blank.

    Returns:
        The repaired text, of the same length, and the diagnostics.
    """
    repair = _BracketRepair(source, text)
    for piece in split_lexemes(text):
        repair.read(piece)
    while repair.opened:
        repair.close(len(repair.chars), "")
    return "".join(repair.chars), repair.diagnostics


class _BracketRepair:
    """The repair of unmatched brackets, lexeme by lexeme."""

    def __init__(self, source: Source, text: str) -> None:
        self.source, self.text = source, text
        self.chars = list(text)
        self.diagnostics: list[Diagnostic] = []
        self.opened: list[Lexeme] = []
        """Brackets that aren't closed yet."""
        self.early: list[Lexeme] = []
        """Closing braces that aren't the first on their line and close a brace of another line."""

    def read(self, piece: Lexeme) -> None:
        """Open and close the brackets that a lexeme shows."""
        if piece.kind == "word" and piece.first and self.opened:
            self._close_before_statement(piece)
        if piece.kind == "word":
            self._open_missing_brace(piece)
        elif piece.kind == "sign" and piece.text in _CLOSERS:
            self.opened.append(piece)
        elif piece.kind == "sign" and piece.text in "})]":
            self._match_closer(piece)

    def close(self, before: int, place: str) -> None:
        """Report the last open bracket, and write its closing bracket before an offset."""
        piece = self.opened.pop()
        closer = _CLOSERS[piece.text]
        span = Span(self.source, piece.start, piece.end)
        # Of a block that begins with a colon, the missing braces are one mistake.
        is_reported = self.text[piece.start] == ":"
        if piece.text == "{" and (end := _block_end(self.text, piece, before)):
            before = end
            place = f", before line {self.source.line_column(end)[0]}"
        if not is_reported:
            problem = Unclosed(opener=piece.text, closer=closer, place=place, span=span)
            self.diagnostics.append(problem)
        chars, slot = self.chars, before - 1
        while slot > piece.end and chars[slot].isspace() and chars[slot - 1].isspace():
            slot -= 1
        if slot >= piece.end and slot < len(chars) and chars[slot].isspace():
            chars[slot] = closer
        elif before >= len(chars):
            chars.insert(before, closer)
        else:
            chars[piece.start] = " "

    def _close_before_statement(self, piece: Lexeme) -> None:
        """Close the brackets that are open before a word that begins a statement."""
        place = f", before line {self.source.line_column(piece.start)[0]}"
        if _HEADER.match(self.text, piece.start) and not (
            piece.text in ("prompts", "images", "model") and self.opened[-1].text != "{"
        ):
            # A single line that is indented deeper is misplaced, but its block isn't unclosed.
            ends = piece.text in ("experiment", "prompts", "images")
            indent = self._indent(piece.start)
            while self.opened and (ends or self._indent(self.opened[-1].start) >= indent):
                self.close(piece.start, place)
        while self.opened and self.opened[-1].text != "{" and _begins(self.text, piece):
            self.close(piece.start, place)

    def _open_missing_brace(self, piece: Lexeme) -> None:
        """Open the block of a statement that has a colon, or nothing, instead of a brace."""
        inside = piece.first or (
            bool(self.opened) and not self.text[self.opened[-1].end : piece.start].strip()
        )
        if piece.first and (colon := _COLON.match(self.text, piece.start)):
            at = colon.start("colon")
            problem = _colon(self.source, colon["head"], at)
        elif inside and (at := _headless(self.text, piece, len(self.opened))):
            problem = _no_brace(self.source, piece, at)
        else:
            return
        self.chars[at] = "{"
        self.opened.append(Lexeme("sign", "{", at, at + 1, first=False))
        self.diagnostics.append(problem)

    def _match_closer(self, piece: Lexeme) -> None:
        """Close the bracket that a closing bracket belongs to, and those opened after it."""
        opened = self.opened
        matching = [i for i, opener in enumerate(opened) if _CLOSERS[opener.text] == piece.text]
        if not matching:
            # An earlier brace may be the stray one and have closed this one's block.
            stray = self.early.pop() if self.early and piece.text == "}" else piece
            self.chars[stray.start] = " "
            self.diagnostics.append(_stray(self.source, stray))
            return
        index = matching[-1]
        if piece.first and piece.text == "}":
            # Indentation shows which of several open braces this one closes.
            here = self._indent(piece.start)
            aligned = [i for i in matching if self._indent(opened[i].start) == here]
            if aligned and self._indent(opened[index].start) > here:
                index = aligned[-1]
        line = self.source.line_column(piece.start)[0]
        while len(opened) > index + 1:
            self.close(piece.start, f", before the `{piece.text}` of line {line}")
        opener = opened.pop()
        if not piece.first and "\n" in self.text[opener.start : piece.start]:
            self.early.append(piece)

    def _indent(self, offset: int) -> int:
        """Return the indentation of an offset's line."""
        line = self.text[self.text.rfind("\n", 0, offset) + 1 : offset + 1]
        return len(line) - len(line.lstrip())


def _block_end(text: str, opener: Lexeme, before: int) -> int:
    """Return where the indentation shows that a block ends; 0 if it doesn't show it.

    Args:
        before: The offset before which the block must end.
    """
    begin = text.rfind("\n", 0, opener.start) + 1
    lines = list(_LINE.finditer(text, begin, before))
    if not lines or lines[0].start() != begin:
        return 0
    edge, *rest = lines
    is_indented = edge.end() > opener.end and text[opener.end : edge.end()].strip()
    if not is_indented and not (rest and len(rest[0]["indent"]) > len(edge["indent"])):
        return 0
    ends = (line.start("first") for line in rest if len(line["indent"]) <= len(edge["indent"]))
    return next(ends, 0)


def _headless(text: str, piece: Lexeme, depth: int) -> int:
    """Return where a block lacks its opening brace; 0 if none is missing."""
    head = (_BLOCK if depth == 0 else _INNER_BLOCK).match(text, piece.start)
    return head.end(head.lastgroup or 0) if head else 0


def _no_brace(source: Source, piece: Lexeme, end: int) -> Diagnostic:
    expected = f"end of the `{piece.text}` statement"
    span = Span(source, end, end)
    hint = f"put the lines of `{piece.text}` between `{{` and `}}`"
    return UnexpectedToken(found=expected, expected="`{`", hint=hint, span=span)


def _colon(source: Source, head: str, at: int) -> Diagnostic:
    hint = f"write `{head} {{` and close the block with `}}`"
    span = Span(source, at, at + 1)
    return UnexpectedToken(found="`:`", expected="`{`", hint=hint, span=span)


def _begins(text: str, piece: Lexeme) -> bool:
    """Whether a word inside round or square brackets can only begin a statement."""
    rest = text[piece.end :].lstrip()[:1]
    words = EXPERIMENT_WORDS | DATA_WORDS | TOP_WORDS
    if piece.text in words and rest not in (":", ",", ")", "]", ".", ""):
        return True
    return _DEFINITION.match(text, piece.start) is not None and rest == "="


def _stray(source: Source, piece: Lexeme) -> Diagnostic:
    opener = next(o for o, c in _CLOSERS.items() if c == piece.text)
    return UnexpectedToken(
        found=f"`{piece.text}`",
        expected="no closing bracket",
        hint=f"no `{opener}` is open here",
        span=Span(source, piece.start, piece.end),
    )


def match_brackets(text: str) -> list[Lexeme]:
    """Split a text with matching brackets into lexemes with depths and partners."""
    lexemes = split_lexemes(text)
    opened: list[Lexeme] = []
    for piece in lexemes:
        if piece.kind == "sign" and piece.text in ("}", ")", "]") and opened:
            opened.pop().partner = piece.start
        piece.depth = len(opened)
        if piece.kind == "sign" and piece.text in _CLOSERS:
            opened.append(piece)
    return lexemes


def statement_starts(
    text: str, inside: list[Lexeme], kind: str, depth: int, words: RegisteredWords
) -> list[int]:
    """Return the indices of the lexemes that begin a statement of a block."""
    starts: list[int] = []
    certain = certain_first_words(kind, words)
    for i, piece in enumerate(inside):
        if piece.kind != "word" or piece.depth != depth:
            continue
        if _PATH_START.match(text, piece.start):  # `model.layers.3.mlp`
            continue
        before = inside[i - 1] if i else None
        goes_on = before is not None and before.text in ("+", "-", "/", ",", "=", "->", "..")
        if piece.text in certain:
            inner = piece.text == "from" and not _FROM_INTO.match(text, piece.start)
            if piece.text == "from" and starts and not piece.first:  # `from end to start`
                inner |= any(each.text == "attention" for each in inside[starts[-1] : i])
            if piece.text == "using" and starts and inside[starts[-1]].text == "discover":
                inner = True
            if piece.text == "block" and before is not None and not piece.first:
                inner = before.text in ("replace", "with")
            if not inner and not (goes_on and not piece.first):
                starts.append(i)
        elif (
            i == 0
            or (kind in ("data_lines", "change_lines") and _defines(text, piece, before, goes_on))
            or (piece.first and not goes_on and piece.text not in CLAUSE_WORDS)
        ):
            starts.append(i)
    return starts


def _defines(text: str, piece: Lexeme, before: Lexeme | None, goes_on: bool) -> bool:
    if goes_on:
        return False
    if before is not None and (before.text in (*_DEFINERS, "of") or _is_near_definer(before)):
        return False
    return _DEFINITION.match(text, piece.start) is not None


def _is_near_definer(piece: Lexeme) -> bool:
    """Whether the first word of a line is a misspelt definer: `sapn bar = "|"`."""
    return piece.first and piece.kind == "word" and closest_name(piece.text, _DEFINERS) is not None


def block_start(statement: list[Lexeme], first: str) -> Lexeme | None:
    """Return the brace that opens the lines of a statement, if it has one.

    Args:
        first: The word that the statement's first word is read as.
    """
    if first not in BLOCK_WORDS:
        return None
    depth = statement[0].depth
    for piece in statement:
        if piece.text == "{" and piece.kind == "sign" and piece.depth == depth:
            return piece
    return None


_BLOCKS = {
    "top_lines": "a statement of the file, such as `prompts` or `experiment`",
    "data_lines": "a line of a `prompts` block, such as `template` or `answer`",
    "change_lines": "a change, such as `count = count - 1`",
    "experiment_lines": "a statement of an `experiment`, such as `patch` or `measure`",
    "edit_lines": "an edit of weights, such as `scale weights of layer 3 neuron 5 by 0`",
}

_HOMES = {
    "top_lines": "at the top level of the file, outside all braces",
    "experiment_lines": "in an `experiment` block",
    "data_lines": "in a `prompts` or `images` block",
    "change_lines": "in a `corrupt` block",
}
"""Where the first words of each type of block belong."""

_CHANGED = {("change_lines", "image"): "change the existing image: `mask image` makes it gray"}
"""A word of another block → the hint for the intended change."""

_SHOWN = 4

_VALUES = frozenset({"NAME", "STRING", "INT", "FLOAT", "PERCENT"})
"""First terminals of a change's values."""

_AXES = frozenset(
    name + plural
    for name in ("LAYER", "HEAD", "NEURON", "EXPERT", "FEATURE")
    for plural in ("", "S")
)


@dataclass(frozen=True)
class Mistake:
    """The position where the parser stopped, and its statement."""

    source: Source
    words: RegisteredWords
    """Words in addition to those of the grammar."""
    kind: str
    """Start rule of the parsed lines."""
    begin: int
    end: int
    """Begin and end of the invalid statement."""
    offset: int
    """Offset where the parser stopped, or the end of the block if the statement is incomplete."""
    token: Lexeme | None
    before: Lexeme | None
    statement: list[Lexeme]
    accepts: frozenset[str]
    lexed: str
    """The lexer's terminal for the token."""

    @property
    def cut_short(self) -> bool:
        """Whether the statement ends too early."""
        return self.offset >= self.end or self.token is None

    @property
    def span(self) -> Span:
        """The token, or the end of the previous lexeme if the token begins the next statement."""
        innocent = self.cut_short or (self.token is not None and self.token.first)
        if innocent and self.before is not None and self.before.start >= self.begin:
            return Span(self.source, self.before.end, self.before.end)
        if self.token is None:
            return Span(self.source, self.offset, self.offset)
        return Span(self.source, self.token.start, self.token.end)


def explain_mistake(mistake: Mistake) -> Diagnostic:
    """Return the most specific message that applies to a mistake."""
    return (
        _first_word(mistake)
        or _taken_for_position(mistake)
        or _misspelt(mistake)
        or explain_habit(mistake)
        or _reserved(mistake)
        or explain_misplaced(mistake)
    )


def _first_word(mistake: Mistake) -> Diagnostic | None:
    """Report a word that begins no statement of the block."""
    if not mistake.statement:
        return None
    word = mistake.statement[0]
    span = Span(mistake.source, word.start, word.end)
    if word.text == "mech" and mistake.kind == "top_lines":
        return WrongVersion(
            problem="`mech` appears twice", place="the version is already set", span=span
        )
    if word.kind != "word":
        if mistake.offset > word.start:
            return None
        expected = _BLOCKS[mistake.kind]
        return UnexpectedToken(found=f"`{_short(word.text)}`", expected=expected, span=span)
    expected_words = first_words(mistake.kind, mistake.words)
    if word.text in expected_words or _is_definition(mistake):
        return None
    for kind, home in _HOMES.items():
        if word.text in certain_first_words(kind, mistake.words):
            return UnexpectedToken(
                found=f"`{word.text}`",
                expected=_BLOCKS[mistake.kind],
                hint=_CHANGED.get((mistake.kind, word.text), f"`{word.text}` belongs {home}"),
                span=span,
            )
    meant = closest_name(word.text, expected_words)
    if meant is not None:
        return MisspeltWord(word=word.text, meant=meant, span=span)
    said = find_hint("", mistake.source.text[word.start : mistake.end], mistake.accepts)
    return UnexpectedToken(
        found=f"`{_short(word.text)}`", expected=_BLOCKS[mistake.kind], hint=said or "", span=span
    )


def _is_definition(mistake: Mistake) -> bool:
    if mistake.kind not in ("data_lines", "change_lines") or len(mistake.statement) < 2:
        return False
    return mistake.statement[1].text in ("=", "in", ",")


def _taken_for_position(mistake: Mistake) -> Diagnostic | None:
    """Report `reverse first` in a `corrupt` block: the shared grammar of all changes reads the
    value of a change as the beginning of a position."""
    words = [piece.text for piece in mistake.statement]
    changes = mistake.words.changes
    signature = changes.get(words[0]) if words and mistake.kind == "change_lines" else None
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


def explain_habit(mistake: Mistake) -> Diagnostic | None:
    """Report syntax of other languages at the position."""
    text, end = mistake.source.text, mistake.end
    if mistake.cut_short and text[end : end + 1] != "}":
        # The rest of the line may belong to this statement, not to the next one.
        end = max(end, text.find("\n", mistake.span.start))
    hint = find_hint(
        text[mistake.begin : mistake.offset], text[mistake.offset : end], mistake.accepts
    )
    if hint is None:
        return None
    return explain_misplaced(mistake, hint)


def _misspelt(mistake: Mistake) -> Diagnostic | None:
    token = mistake.token
    if mistake.cut_short or token is None or token.kind != "word":
        return None
    meant = closest_name(token.text, _words(mistake.accepts))
    if meant is None or meant == token.text:
        return None
    if token.text in keywords().values():  # `layers` for `layer`, but not `and` for `add`
        if token.text.removesuffix("s") != meant.removesuffix("s"):
            return None
        return explain_misplaced(mistake, f"write `{meant}`", word=token)
    span = Span(mistake.source, token.start, token.end)
    return MisspeltWord(word=token.text, meant=meant, span=span)


def _reserved(mistake: Mistake) -> Diagnostic | None:
    """Report a word of the language used as a name."""
    token = mistake.token
    if mistake.cut_short or token is None:
        return None
    before = mistake.before
    if before is not None and before.text in RESERVED and token.kind == "sign":
        # `prob(head)` is read as an axis without its number; `cls token` is a position.
        words = [piece for piece in mistake.statement if piece.end <= before.start]
        of_span = before.text in ("token", "tokens") and words and words[-1].kind == "word"
        if before.depth > mistake.statement[0].depth and not of_span:
            return ReservedName(
                name=before.text, span=Span(mistake.source, before.start, before.end)
            )
        return None
    if token.text not in RESERVED:
        return None
    if mistake.lexed == "NAME" or "NAME" not in mistake.accepts:
        return None
    return ReservedName(name=token.text, span=Span(mistake.source, token.start, token.end))


def explain_misplaced(
    mistake: Mistake, hint: str = "", *, word: Lexeme | None = None
) -> Diagnostic:
    """Report E0101: the token where the parser stopped, or `word`, is misplaced."""
    span = Span(mistake.source, word.start, word.end) if word else mistake.span
    found, expected = _found(mistake), _expected(mistake)
    return UnexpectedToken(found=found, expected=expected, hint=hint, span=span)


def explain_rewrite(mistake: Mistake, rewrite: Rewrite) -> Diagnostic:
    """Report E0101 for a habit: the marked text, and the text that replaces it."""
    begin = mistake.begin
    span = Span(mistake.source, begin + rewrite.start, begin + rewrite.end)
    return UnexpectedToken(
        found=f"`{_short(span.text)}`",
        expected="a different spelling",
        rewrite=rewrite.text,
        rewrite_help=rewrite.advice,
        span=span,
    )


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
"""Descriptions of groups of terminals; a group is named if all its terminals are accepted (for
the first three: all that the context allows)."""

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
    """Describe the accepted terminals in a few words."""
    left = set(mistake.accepts) - {"THUMBNAIL"}  # may follow every name of a span, as tiles may
    known = keywords()
    if {"AT", "DIM", "ARROW"} & left:  # `dims` and `except` may follow every site, and circuits
        left -= {"DIM", "DIMS", "EXCEPT", "WITHOUT"}  # aren't sites
    complete = "$END" in left
    if complete:
        following = certain_first_words(mistake.kind, mistake.words)
        left -= {name for name in left if known.get(name, "") in following}
        left -= {"$END", "DEF", "WITHOUT"}
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
