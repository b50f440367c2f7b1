"""Words of a statement that doesn't parse, read as the words of the language that they are near.

A guess is a guess until the parser takes it: `a im 3..9` was meant as `a in 3..9` where that
parses.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from mechdsl.base.registry import near
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import MisspeltWord, UnexpectedToken
from mechdsl.syntax.grammar import keywords
from mechdsl.syntax.mistakes.messages import Mistake, hinted, misplaced
from mechdsl.syntax.mistakes.pieces import Piece, first_words

_GUESSES = 8
"""Words of the language that one word may have been; those of two letters are all alike."""
_EDGES = ("first", "last")


def guesses(mistake: Mistake) -> Iterator[tuple[Piece, str]]:
    """A word of the statement and what it may have been, the likeliest first."""
    statement = mistake.statement
    stopped = next(
        (i for i, piece in enumerate(statement) if piece.start >= mistake.offset), len(statement)
    )
    # The parser may have taken the word for a name, or have looked ahead.
    order = [stopped, stopped - 1, stopped + 1, *range(stopped - 2, -1, -1)]
    known = frozenset(word for word in keywords().values() if word.isalpha())
    for at in order:
        if not 0 <= at < len(statement) or statement[at].kind != "word":
            continue
        word = statement[at]
        if word.text in known and at not in (stopped, stopped + 1):
            continue
        words = frozenset(first_words(mistake.kind)) if at == 0 else known
        wanted = {keywords().get(name) for name in mistake.accepts if at == stopped}
        alike = sorted(_near(word.text, words - {word.text}), key=lambda each: each not in wanted)
        for meant in alike[:_GUESSES]:
            yield word, meant


@lru_cache(1000)
def _near(word: str, known: frozenset[str]) -> list[str]:
    return near(word, known)


def misread(mistake: Mistake, word: Piece, meant: str) -> Diagnostic:
    """What is said where the statement parses with another word in this one's place."""
    if word.text in keywords().values():
        found, said = f"`{word.text}`", f"did you mean `{meant}`?"
        span = Span(mistake.source, word.start, word.end)
        if word is mistake.token:
            return hinted(mistake) or misplaced(mistake, said, word=word)
        return UnexpectedToken(found=found, expected=f"`{meant}`", hint=said, span=span)
    end = word.end
    following = mistake.source.text[end:]
    if meant in _EDGES and following[:1] == "-":  # `lat-item`
        tail = next((p for p in mistake.statement if p.start == end + 1), None)
        if tail is not None:
            end, meant = tail.end, f"{meant}-{tail.text}"
    span = Span(mistake.source, word.start, end)
    return MisspeltWord(word=span.text, meant=meant, span=span)
