"""Which tokens a span of text hits. White space at either end of both doesn't count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mechdsl.prompts.prompt_table import RunRow


@dataclass(frozen=True)
class Place:
    """One occurrence of a span: its characters, and the tokens that overlap it."""

    start: int
    end: int
    tokens: tuple[int, ...]


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The characters without white space at either end; `start` twice where nothing is left."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


class TokenMap:
    """Characters to tokens, for one row."""

    def __init__(self, row: RunRow) -> None:
        self.row = row

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """The characters of each token, trimmed; empty for special tokens and white space."""
        return tuple(self._trimmed(token) for token in range(len(self.row.offsets)))

    def _trimmed(self, token: int) -> tuple[int, int]:
        return (
            (0, 0) if self.row.special[token] else trimmed(self.row.text, *self.row.offsets[token])
        )

    @cached_property
    def text_tokens(self) -> tuple[int, ...]:
        """The tokens of the prompt's own text, without a space that the tokenizer put in front."""
        own = [i for i, special in enumerate(self.row.special) if not special]
        at = self.row.offsets
        return tuple(own[next((n for n, i in enumerate(own) if at[i][0] < at[i][1]), 0) :])

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """The tokens that overlap some characters.

        A span of nothing but white space (a line break between items) hits the tokens that are
        nothing but white space.
        """
        low, high = trimmed(self.row.text, start, end)
        if low < high:
            return tuple(
                i for i, (a, b) in enumerate(self.places) if a < high and b > low and a < b
            )
        return tuple(
            i
            for i, (a, b) in enumerate(self.row.offsets)
            if not self.row.special[i] and a < end and b > start and self._is_blank(i)
        )

    def _is_blank(self, token: int) -> bool:
        a, b = self.places[token]
        return a == b

    def place(self, start: int, end: int) -> Place:
        return Place(start, end, self.tokens(start, end))

    def covers_more(self, place: Place, token: int) -> str | None:
        """The token's text, where it also covers text beside the span."""
        low, high = trimmed(self.row.text, place.start, place.end)
        a, b = self.places[token]
        return self.row.text[a:b] if a < b and (a < low or b > high) else None

    def token_text(self, token: int) -> str:
        """What a token covers, trimmed; white space itself where it is nothing else."""
        a, b = self._trimmed(token)
        if a == b:
            a, b = self.row.offsets[token]
        return self.row.text[a:b]
