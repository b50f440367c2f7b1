"""Where a text occurs in another."""

from __future__ import annotations

import re
import unicodedata

_JOINERS = "\u200c\u200d"
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"


def find_text(text: str, part: str) -> list[tuple[int, int]]:
    """Where a text occurs in another, without overlaps; whole words where there are any."""
    if not part.strip():
        return []
    starts = [m.start() for m in re.finditer(f"(?={re.escape(part)})", text)]
    every = [(start, start + len(part)) for start in starts]
    whole = [at for at in every if not any(_goes_on(text, edge) for edge in at)]
    found: list[tuple[int, int]] = []
    for at in whole or every:
        if not found or at[0] >= found[-1][1]:
            found.append(at)
    return found


def _goes_on(text: str, at: int) -> bool:
    """Whether a word, or a character of several code points, goes on across a place."""
    if not 0 < at < len(text):
        return False
    before, behind = text[at - 1], text[at]
    if before in _JOINERS or behind in _JOINERS or behind in _SKIN_TONES or _is_mark(behind):
        return True
    return _in_word(before) and _in_word(behind)


def _in_word(char: str) -> bool:
    return char == "_" or char.isalnum() or _is_mark(char)


def _is_mark(char: str) -> bool:
    """An accent, a vowel sign: part of the letter before it."""
    return unicodedata.category(char).startswith("M")
