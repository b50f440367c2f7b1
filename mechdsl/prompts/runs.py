"""Tokenised rows of one run, and the positions and spans in them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mechdsl.base.records import Record, record
from mechdsl.images.picture import Picture, Region
from mechdsl.prompts.values import TextSpan

if TYPE_CHECKING:
    from mechdsl.base.arrays import Ints


_NOTHING: Mapping[str, Any] = MappingProxyType({})


@record
class TextTokens(Record):
    """A text that a metric refers to, tokenised as the continuation of its prompt."""

    text: str
    ids: tuple[int, ...]
    of_output: bool = False
    """It is the number of an output of a classifier, and no name of a label."""


@record
class RunNoise(Record):
    """`add gaussian(std: …) to SITE at POS`: what a corrupted run adds at a site."""

    site: str
    """Name of the component as written, `embed`."""
    positions: tuple[tuple[int, ...], ...]
    """Per row, the token positions it is added to."""
    std: float | None
    """In activation units; None where it is `sds` standard deviations, worked out from weights."""
    sds: float | None
    sd_tokens: tuple[int, ...] = ()
    """Token ids (all rows before `limit`, with repetition) whose embeddings define one sd; of
    images a number for each image and token."""
    sd_images: tuple[tuple[RunRow, tuple[int, ...]], ...] = field(
        default=(), compare=False, repr=False
    )
    """These images, with their tokens."""
    samples: int = 1
    kind: str = "gaussian"
    """Name in the registry of noises."""
    row_keys: tuple[int, ...] | None = None
    """Per row, its key in the block that it is of, where that isn't the table's."""
    drawn: tuple[int, ...] | None = None
    """Per row, the one draw that it has, where rows stand for the draws of others."""


@record
class ReplySpan(Record):
    """The reply that stands behind a prompt."""

    first: int
    """Its first token, in the model's input."""
    text: str
    """What it says, without what it was stopped by."""
    stands_in: bool = False
    """It isn't written yet."""
    behind: int = 0
    """Tokens behind it, which the texts of the block share."""

    def of(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Its tokens, of all of a row."""
        return ids[self.first : len(ids) - self.behind]


@record
class RunRow(Record):
    """One row of one run."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    """Characters of `text` per token, white space at its ends included as the tokenizer has it;
    (0, 0) for special tokens."""
    special: tuple[bool, ...]
    """True for tokens that the tokenizer adds around the text."""
    spans: tuple[TextSpan, ...]
    values: Mapping[str, Any]
    """Plain values: numbers, texts, lists of these."""
    texts: Mapping[str, TextTokens]
    """`answer`, `wrong` and the other texts of the block, as this run has them, tokenised as the
    continuation of the clean row's prompt."""
    reply: ReplySpan | None = None
    """Where the reply of another experiment stands at its end."""
    image: Picture | None = None
    """Of rows that are images: `text` and `ids` tell it from others."""
    places: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=lambda: _NOTHING)
    """Spans that have no text, as those of images: by name, the tokens of each occurrence."""
    regions: Mapping[str, tuple[Region, ...]] = field(default_factory=lambda: _NOTHING)
    """Parts of its image, by name: those of `places` in pixels."""


@record
class DerivedRun(Record):
    """What an experiment's own run (`run healed { … }`) is made of, as far as rows can tell."""

    base: str
    """The run that its rules act on."""
    reads: tuple[str, ...]
    """Runs that its rules read."""
    draws: int
    """Draws of noise, of all of these."""


@record
class PromptRun(Record):
    """`clean`, a corruption, a run from elsewhere, or one with rules: as many rows as the table, in
    its order."""

    name: str
    rows: tuple[RunRow, ...]
    noise: RunNoise | None = None
    prompts: str | None = None
    """The block that it is of, where that is another one."""
    model: str | None = None
    """The model that it runs on, where that isn't the experiment's."""
    derived: DerivedRun | None = None
    """Of a run with rules; its rows and noise are those of its base."""
    chat: bool = False
    """Whether its texts are written by a chat template, with their special tokens in them."""

    @cached_property
    def lengths(self) -> Ints:
        """[row] tokens of each prompt; read only."""
        import numpy as np  # checking a file does without

        found = np.array([len(row.ids) for row in self.rows], dtype=np.int64)
        found.setflags(write=False)
        return found

    @property
    def draws(self) -> int:
        """Draws of noise that every row is run with."""
        if self.derived is not None:
            return self.derived.draws
        return 1 if self.noise is None else self.noise.samples


Hits: TypeAlias = tuple[tuple[int, ...], ...]
"""The runs of one row: token positions that are joined, each run by itself."""


@record
class ReplyPosition(Record):
    """Tokens of the reply that is written behind a prompt."""

    kind: Literal["token", "tokens", "last", "all", "text", "step"]
    """`token`: the one of a number. `step`: where the pass of a number predicts, behind so many
    tokens of the reply."""
    number: int = 0
    """Of tokens, from 1; of steps, from 0."""
    last: int | None = None
    """Of several tokens, the last one's number."""
    text: str = ""
    """The last occurrence of a text …"""
    which: Literal["first", "last", "all"] = "last"
    """… which of its tokens."""
    offset: int = 0
    """Tokens behind that."""

    def most(self, tokens: int) -> int:
        """How many tokens it is at most, of a reply of so many."""
        if self.single:
            return 1
        if self.kind == "tokens":
            return (self.last or self.number) - self.number + 1
        return tokens

    @property
    def single(self) -> bool:
        """Whether it is one token."""
        return self.kind in ("token", "last", "step") or (
            self.kind == "text" and self.which != "all"
        )


@record
class PositionCell(Record):
    """One value of the position axis."""

    label: str
    """As the table shows it: `last-item token`, `subject middle`, `item 3`, `-2`."""
    hits: tuple[Hits, ...]
    """Per row, the separate runs (one, or several that are averaged: the middle tokens of a ragged
    span); per run, the joined token positions, 0-based in the model's unpadded input, ascending.
    A row without the position has no runs and drops out of the cell."""
    item: int | None = None
    """1-based occurrence, for `each item token`."""
    reply: ReplyPosition | None = None
    """In the reply, which isn't there yet: `hits` are the prompts' last tokens then."""
    follows: Literal["", "newest", "every"] = field(default="", compare=False)
    """While a reply is written: whether it is, at each step, the newest token (`last token`), or
    all tokens so far (`tokens *`)."""


def describe_output(text: TextTokens) -> str:
    """What a text without tokens is."""
    return "the number of an output" if text.of_output else "the name of a label"


@dataclass(frozen=True)
class SpanOccurrence:
    """One occurrence of a span: its characters, and the tokens that overlap it."""

    start: int
    end: int
    tokens: tuple[int, ...]


def trim_span(text: str, start: int, end: int) -> tuple[int, int]:
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
            (0, 0)
            if self.row.special[token]
            else trim_span(self.row.text, *self.row.offsets[token])
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
        low, high = trim_span(self.row.text, start, end)
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

    def place(self, start: int, end: int) -> SpanOccurrence:
        return SpanOccurrence(start, end, self.tokens(start, end))

    def covers_more(self, place: SpanOccurrence, token: int) -> str | None:
        """The token's text, where it also covers text beside the span."""
        low, high = trim_span(self.row.text, place.start, place.end)
        a, b = self.places[token]
        return self.row.text[a:b] if a < b and (a < low or b > high) else None

    def token_text(self, token: int) -> str:
        """What a token covers, trimmed; white space itself where it is nothing else."""
        a, b = self._trimmed(token)
        if a == b:
            a, b = self.row.offsets[token]
        return self.row.text[a:b]


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


def extend_row(row: RunRow, moved: tuple[int, ...], text: str) -> RunRow:
    """A row with the token that all answers share at the end of its text."""
    if not moved:
        return row
    end = len(row.ids)
    while end and row.special[end - 1]:
        end -= 1
    end = end or len(row.ids)
    at = (len(row.text), len(row.text) + len(text))
    return replace(
        row,
        text=row.text + text,
        ids=(*row.ids[:end], *moved, *row.ids[end:]),
        offsets=(*row.offsets[:end], at, *row.offsets[end:]),
        special=(*row.special[:end], False, *row.special[end:]),
    )
