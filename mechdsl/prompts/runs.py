"""Tokenised rows of one run, and the positions and spans in them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from hashlib import sha256
from math import ceil
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mechdsl.base.records import Record, compact_record
from mechdsl.images.layouts import ImageCell, PromptPicture
from mechdsl.images.picture import Picture, Region, Video
from mechdsl.program.images import FRAME_SPAN
from mechdsl.prompts.values import TextSpan

if TYPE_CHECKING:
    from mechdsl.base.arrays import Ints


ANSWER_SPAN = "answer"
"""The span that refers to the answer tokens, whichever text of a measure they are."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class TextTokens(Record):
    """A text that a metric refers to, tokenised as the continuation of its prompt."""

    text: str
    ids: tuple[int, ...]
    of_output: bool = False
    """The text is the number of a classifier output, not the name of a label."""


class RunNoise(Record):
    """`add gaussian(std: …) to SITE at POS`: the noise that a corrupted run adds at a site."""

    site: str
    """Name of the component as written, `embed`."""
    positions: tuple[tuple[int, ...], ...]
    """Per row, the token positions it is added to."""
    std: float | None
    """In activation units; None if `sds` gives it, in standard deviations computed from weights."""
    sds: float | None
    sd_tokens: tuple[int, ...] = ()
    """Token ids (all rows before `limit`, with repetition) whose embeddings define one standard
    deviation; for images, one number per image and token."""
    sd_images: tuple[tuple[RunRow, tuple[int, ...]], ...] = field(
        default=(), compare=False, repr=False
    )
    """The images of `sd_tokens`, with their tokens."""
    samples: int = 1
    kind: str = "gaussian"
    """Name in the registry of noises."""
    row_keys: tuple[int, ...] | None = None
    """Per row, its key in its own block, if that isn't the table's block."""
    drawn: tuple[int, ...] | None = None
    """Per row, its single draw, if rows represent draws of other rows."""


class ReplySpan(Record):
    """The reply after a prompt."""

    first: int
    """Index of its first token in the model's input."""
    text: str
    """The text, without the stop string."""
    stands_in: bool = False
    """The reply is a placeholder: it isn't generated yet."""
    suffix: int = 0
    """Number of tokens after the reply that all texts of the block begin with."""

    def of(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the reply's tokens, given all tokens of a row."""
        return ids[self.first : len(ids) - self.suffix]


class RunRow(Record):
    """One row of one run."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    """Characters of `text` per token, including white space at its ends as the tokenizer reports;
    (0, 0) for special tokens."""
    special: tuple[bool, ...]
    """True for tokens that the tokenizer adds around the text."""
    spans: tuple[TextSpan, ...]
    values: Mapping[str, Any]
    """Plain values: numbers, texts and lists of them."""
    texts: Mapping[str, TextTokens]
    """`answer`, `wrong` and the block's other texts in this run, tokenised as the continuation of
    the clean row's prompt."""
    source: int = 0
    """Number of tokens that an encoder-decoder's encoder reads; its decoder reads the others."""
    reply: ReplySpan | None = None
    """The reply of another experiment at the end of the row, if there is one."""
    image: Picture | None = None
    """For rows of images; `text` and `ids` distinguish it from other images."""
    places: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=lambda: _NOTHING)
    """Spans without text, such as those of images: by name, the tokens of each occurrence."""
    regions: Mapping[str, tuple[Region, ...]] = field(default_factory=lambda: _NOTHING)
    """Regions of the image by name, in pixels; `places` has their tokens."""
    pictures: Mapping[str, PromptPicture] = field(default_factory=lambda: _NOTHING)
    """The images within a prompt, by their markers in the text."""

    @property
    def text_before_reply(self) -> str:
        """The text without the reply of another experiment."""
        after = () if self.reply is None else self.offsets[self.reply.first :]
        return self.text[: after[0][0]] if after else self.text

    @property
    def decodes_text(self) -> bool:
        """Whether the decoder reads text of the prompt, after an encoder reads the image in it."""
        end = None if self.reply is None else self.reply.first
        read = self.offsets[self.source : end]
        return bool(self.source and self.pictures) and any(first < last for first, last in read)

    @cached_property
    def whole_pictures(self) -> tuple[PlacedPicture, ...]:
        """The images in the prompt with their tokens, in text order, and the videos that a video
        processor reads as a whole."""
        pictures: dict[int, PlacedPicture] = {}
        for span in self.spans if self.pictures else ():
            picture = self.pictures.get(self.text[span.start : span.end])
            if picture is not None and span.start not in pictures:
                at = self.offsets.index((span.start, span.end))
                first = at - picture.expansion.is_image.index(True)
                picture = picture.equal.get(span.name, picture)
                pictures[span.start] = PlacedPicture(span.name, picture, first, span.within)
        return tuple(pictures[start] for start in sorted(pictures))

    @property
    def digest(self) -> str:
        """The first 16 digits of the SHA-256 of its prompt: the text, and for each image a line
        with the digest of the image."""
        pictures = (picture.picture.picture.content() for picture in self.whole_pictures)
        content = "\n".join((self.text_before_reply, *pictures))
        return sha256(content.encode()).hexdigest()[:16]

    def images_at(self, hits: Iterable[Iterable[int]]) -> set[str]:
        """Return digests of the images in the prompt that have some of these tokens, without their
        changes."""
        return {picture.unchanged_content for picture in self.pictures_at(hits)}

    def pictures_at(self, hits: Iterable[Iterable[int]]) -> list[PlacedPicture]:
        """Return the images in the prompt that have some of these tokens."""
        tokens = {token for run in hits for token in run}
        return [
            picture
            for picture in self.whole_pictures
            if any(token - picture.first in picture.picture.expansion.cell_of for token in tokens)
        ]

    @cached_property
    def patch_tokens(self) -> Mapping[int, tuple[int, int]]:
        """The tokens of images in the prompt that read a part of their image, each with the number
        of the image and of the tile."""
        return {
            picture.first + cell.position: (number, cell.tile)
            for number, picture in enumerate(self.whole_pictures)
            for cell in picture.picture.expansion.layout.cells
        }

    @cached_property
    def placed_pictures(self) -> tuple[PlacedPicture, ...]:
        """The images in the prompt, and the frames of videos, with their tokens, in text order."""
        placed = [frame for picture in self.whole_pictures for frame in picture.frames()]
        count = Counter(picture.name for picture in placed)
        seen = Counter[str]()
        for n, picture in enumerate(placed):
            seen[picture.name] += 1
            if count[picture.name] > 1:
                placed[n] = replace(picture, number=seen[picture.name])
        return tuple(placed)

    def pictures_of(self, name: str, of: str | None = None) -> list[PlacedPicture]:
        """Return the images at placeholders with this name, those with a region of it, or the
        frames of a video. of: the name of a span around them."""
        placed = [picture for picture in self.placed_pictures if of is None or of in picture.within]
        pictures = [picture for picture in placed if picture.name == name]
        pictures = pictures or [picture for picture in placed if name in picture.picture.regions]
        return pictures or [picture for picture in placed if name == picture.video]

    def image_label(self, token: int) -> str | None:
        """Return the name of a token of an image, as the language writes it; None for others."""
        return next(
            (picture.label(token) for picture in self.placed_pictures if picture.cell(token)), None
        )

    def image_places(self, name: str) -> list[tuple[int, ...]]:
        """Return the tokens of an image at each of its occurrences, of each occurrence of a region,
        or of all frames of a video."""
        return list_places(name, ((picture, None) for picture in self.pictures_of(name)))


class PlacedPicture(Record):
    """An image at a placeholder of a tokenised prompt."""

    name: str
    """The name of the placeholder."""
    picture: PromptPicture
    first: int
    """The first of its tokens."""
    within: tuple[str, ...] = ()
    """Names of the spans around it, outermost first."""
    number: int | None = None
    """Its number among the images of the name in the prompt, from 1; None for the only one."""

    @property
    def unchanged_content(self) -> str:
        """The digest of the image without its changes."""
        return replace(self.picture.picture, changes=()).content()

    @property
    def video(self) -> str | None:
        """The name of the video that it is a frame of."""
        return self.within[-1] if self.name == FRAME_SPAN and self.within else None

    def frames(self) -> Iterator[PlacedPicture]:
        """Yield the frames of a video that is read as a whole, or the groups of frames that the
        model merges, each with the picture of its first frame; otherwise the image."""
        video, expansion = self.picture.picture, self.picture.expansion
        if not isinstance(video, Video):
            yield self
            return
        for tile in expansion.layout.tiles:
            first, image_expansion = expansion.frame(tile.number)
            picture = PromptPicture(
                video.of[(tile.number - 1) * self.merged_frames], image_expansion, {}
            )
            within = (*self.within, self.name)
            yield PlacedPicture(FRAME_SPAN, picture, self.first + first, within)

    @property
    def merged_frames(self) -> int:
        """The number of frames that `frame 1` of a video refers to."""
        return ceil(self.picture.picture.count / len(self.picture.expansion.layout.tiles))

    @property
    def title(self) -> str:
        """Its name in the prompt: `photo`, `frame 2`."""
        return self.name if self.number is None else f"{self.name} {self.number}"

    def cell(self, token: int) -> ImageCell | None:
        """Return the part of the image that a token of the prompt reads; None for other tokens."""
        return self.picture.expansion.cell_of.get(token - self.first)

    def label(self, token: int) -> str:
        """Return the name of a token that reads a part, as the language writes it."""
        return f"{self.title} {self.picture.expansion.labels[token - self.first]}"

    def places(self, name: str, tiles: Collection[int] | None = None) -> list[tuple[int, ...]]:
        """Return the tokens of its cells, or of each occurrence of a region.

        tiles: the tiles to which they belong (`ImageCell.tile`); None for all.
        """
        picture, cells = self.picture, self.picture.expansion.cell_of
        chosen = (tuple(cells),) if name in (self.name, self.video) else picture.regions[name]
        if tiles is not None:
            chosen = [[each for each in numbers if cells[each].tile in tiles] for numbers in chosen]
        first = self.first
        return [tuple([first + token for token in tokens]) for tokens in chosen if tokens]


def list_places(
    name: str, pictures: Iterable[tuple[PlacedPicture, Collection[int] | None]]
) -> list[tuple[int, ...]]:
    """Return the tokens of each image, of each occurrence of a region, or of all frames of a video.

    Args:
        name: The name of the images, of the region or of the video.
        pictures: The images with the name, and their tiles as in `PlacedPicture.places`.
    """
    given = list(pictures)
    places = [tokens for picture, tiles in given for tokens in picture.places(name, tiles)]
    if places and name == given[0][0].video:
        return [tuple(token for tokens in places for token in tokens)]
    return places


class DerivedRun(Record):
    """The properties of an experiment's run with rules (`run healed { … }`) that rows depend on."""

    base: str
    """The run that its rules modify."""
    reads: tuple[str, ...]
    """Runs that its rules read."""
    draws: int
    """Noise draws per row, over the base and the runs read."""


CACHED_TOKENS = 200_000
"""Maximum number of tokens of a run whose token maps are cached, at about 100 bytes each."""


class PromptRun(Record):
    """A run with the table's rows in the table's order.

    The run is `clean`, a corruption, a run of another block, or a run with rules.
    """

    name: str
    rows: tuple[RunRow, ...]
    noise: RunNoise | None = None
    prompts: str | None = None
    """The name of its block, if that isn't the table's."""
    model: str | None = None
    """The name of its model, if that isn't the experiment's."""
    derived: DerivedRun | None = None
    """For a run with rules, whose rows and noise are those of its base."""
    chat: bool = False
    """Whether a chat template formats its texts, so that they contain its special tokens."""

    @cached_property
    def lengths(self) -> Ints:
        """[row] tokens of each prompt; read only."""
        import numpy as np  # lazy: checking a file doesn't need NumPy

        lengths = np.array([len(row.ids) for row in self.rows], dtype=np.int64)
        lengths.setflags(write=False)
        return lengths

    @cached_property
    def sources(self) -> Ints:
        """[row] tokens of each prompt that an encoder-decoder's encoder reads; read only."""
        import numpy as np  # lazy: checking a file doesn't need NumPy

        sources = np.array([row.source for row in self.rows], dtype=np.int64)
        sources.setflags(write=False)
        return sources

    @property
    def draws(self) -> int:
        """Noise draws per row."""
        if self.derived is not None:
            return self.derived.draws
        return 1 if self.noise is None else self.noise.samples

    @property
    def token_maps(self) -> Sequence[TokenMap]:
        """The mapping from characters to tokens of each row, cached for runs of few tokens."""
        is_cached = self._token_count <= CACHED_TOKENS
        return self._token_maps if is_cached else tuple(map(TokenMap, self.rows))

    @cached_property
    def _token_count(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @cached_property
    def _token_maps(self) -> Sequence[TokenMap]:
        return tuple(map(TokenMap, self.rows))


Hits: TypeAlias = tuple[tuple[int, ...], ...]
"""The token runs of one row: each run is a tuple of joined token positions."""


class ReplyPosition(Record):
    """A position in the reply that is generated after a prompt."""

    kind: Literal["token", "tokens", "last", "all", "text", "step"]
    """`token`: the token with a number. `step`: the position that predicts the reply's token after
    `number` generated tokens."""
    number: int = 0
    """Counts tokens from 1 and steps from 0."""
    last: int | None = None
    """The last number of a range of tokens."""
    text: str = ""
    """For `text`: the text whose last occurrence is used."""
    texts: tuple[str, ...] = ()
    """For `text`: [row] the text of each row of the table, instead of one for all."""
    which: Literal["first", "last", "all"] = "last"
    """For `text`: which of its tokens are used."""
    offset: int = 0
    """Number of tokens after that position."""

    def of_row(self, row: int) -> ReplyPosition:
        """Return the position in the reply of one row of the table."""
        return replace(self, text=self.texts[row], texts=()) if self.texts else self

    def most(self, tokens: int) -> int:
        """Return the maximum number of tokens of the position in a reply of `tokens` tokens."""
        if self.single:
            return 1
        if self.kind == "tokens":
            return (self.last or self.number) - self.number + 1
        return tokens

    @property
    def single(self) -> bool:
        """Whether the position is one token."""
        return self.kind in ("token", "last", "step") or (
            self.kind == "text" and self.which != "all"
        )


class PositionCell(Record):
    """One value of the position axis."""

    label: str
    """The label in tables: `last-item token`, `subject middle`, `item 3`, `-2`."""
    hits: tuple[Hits, ...]
    """Per row, the separate token runs (one, or several that are averaged: the middle tokens of a
    ragged span); per run, the joined token positions, ascending, 0-based in the model's unpadded
    input. A row without the position has no runs and drops out of the cell."""
    item: int | None = None
    """1-based occurrence, for `each item token`."""
    reply: ReplyPosition | None = None
    """A position in a reply that isn't generated yet; `hits` are then the final prompt tokens."""
    vectors: int = 1
    """Number of patches that `hits` count for each token: patch i of token t has the number t *
    vectors + i. 1: `hits` are tokens."""
    follows: Literal["", "newest", "every"] = field(default="", compare=False)
    """During generation: `newest` if the cell is the newest token at each step (`last token`),
    `every` if it is all tokens so far (`tokens *`)."""

    def tokens(self, row: int) -> Hits:
        """Return the hits of a row as tokens, also if they are patches of tokens."""
        if self.vectors == 1:
            return self.hits[row]
        return tuple(
            tuple(dict.fromkeys(each // self.vectors for each in numbers))
            for numbers in self.hits[row]
        )

    def in_patches(self, count: int) -> PositionCell:
        """Return the position with hits that count patches, all `count` of each token."""
        each = count // self.vectors
        if each == 1:
            return self
        hits = tuple(
            tuple(tuple(hit * each + n for hit in numbers for n in range(each)) for numbers in row)
            for row in self.hits
        )
        return replace(self, hits=hits, vectors=count)

    def parts(self, row: int, ids: Sequence[int]) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Return the hits of a row as token ids, each with the number of its patch. In images,
        these ids differ between parts and images.

        Args:
            ids: The tokens of the row.
        """
        return tuple(
            tuple((ids[hit // self.vectors], hit % self.vectors) for hit in numbers)
            for numbers in self.hits[row]
        )


def describe_output(text: TextTokens) -> str:
    """Describe a text without tokens."""
    return "the number of an output" if text.of_output else "the name of a label"


@compact_record
class SpanOccurrence:
    """One occurrence of a span: its characters and the tokens that overlap them."""

    start: int
    end: int
    tokens: tuple[int, ...]


def trim_span(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the range without white space at either end; (start, start) if nothing is left."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


class TokenMap:
    """The mapping from characters to tokens of one row."""

    def __init__(self, row: RunRow) -> None:
        self.row = row

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """The characters of each token, trimmed; empty for special tokens and white space."""
        text, places = self.row.text, list[tuple[int, int]]()
        for place, special in zip(self.row.offsets, self.row.special, strict=True):
            start, end = place
            if special:
                place = 0, 0
            elif start < end and (text[start].isspace() or text[end - 1].isspace()):
                place = trim_span(text, start, end)
            places.append(place)
        return tuple(places)

    @cached_property
    def text_tokens(self) -> tuple[int, ...]:
        """The tokens of the prompt's text, without a leading space that the tokenizer added."""
        numbers = [i for i, special in enumerate(self.row.special) if not special]
        at = self.row.offsets
        return tuple(numbers[next((n for n, i in enumerate(numbers) if at[i][0] < at[i][1]), 0) :])

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Return the tokens that overlap a range of characters.

        A range of white space only, such as a line break between items, hits the tokens that are
        white space only.
        """
        low, high = trim_span(self.row.text, start, end)
        if low < high:
            places = enumerate(self.places)
            return tuple([i for i, (a, b) in places if a < high and b > low and a < b])
        return tuple(
            i
            for i, (a, b) in enumerate(self.row.offsets)
            if not self.row.special[i] and a < end and b > start and self._is_blank(i)
        )

    def _is_blank(self, token: int) -> bool:
        a, b = self.places[token]
        return a == b

    def place(self, start: int, end: int) -> SpanOccurrence:
        occurrence = self._occurrences.get((start, end))
        if occurrence is None:
            occurrence = SpanOccurrence(start, end, self.tokens(start, end))
            self._occurrences[start, end] = occurrence
        return occurrence

    @cached_property
    def _occurrences(self) -> dict[tuple[int, int], SpanOccurrence]:
        return {}

    def covers_more(self, place: SpanOccurrence, token: int) -> str | None:
        """Return the token's text if it also covers text outside the span, else None."""
        low, high = trim_span(self.row.text, place.start, place.end)
        a, b = self.places[token]
        return self.row.text[a:b] if a < b and (a < low or b > high) else None

    def token_text(self, token: int) -> str:
        """Return the text that a token covers, trimmed unless it is only white space."""
        a, b = self.places[token]
        if a == b:
            a, b = self.row.offsets[token]
        return self.row.text[a:b]


_JOINERS = "\u200c\u200d"

_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"


def find_text(text: str, part: str) -> list[tuple[int, int]]:
    """Return the non-overlapping occurrences of a part in a text; whole words if there are any."""
    if not part.strip():
        return []
    starts = [m.start() for m in re.finditer(f"(?={re.escape(part)})", text)]
    every = [(start, start + len(part)) for start in starts]
    whole = [at for at in every if not any(_goes_on(text, edge) for edge in at)]
    texts: list[tuple[int, int]] = []
    for at in whole or every:
        if not texts or at[0] >= texts[-1][1]:
            texts.append(at)
    return texts


def _goes_on(text: str, at: int) -> bool:
    """Return whether a word or a multi-code-point character continues across a position."""
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    if before in _JOINERS or after in _JOINERS or after in _SKIN_TONES or _is_mark(after):
        return True
    return _in_word(before) and _in_word(after)


def _in_word(char: str) -> bool:
    return char == "_" or char.isalnum() or _is_mark(char)


def _is_mark(char: str) -> bool:
    """Return whether a character is a combining mark (accent, vowel sign)."""
    return unicodedata.category(char).startswith("M")


def extend_row(row: RunRow, moved: tuple[int, ...], text: str) -> RunRow:
    """Insert the token that all answers share at the end of a row's text."""
    if not moved:
        return row
    end = len(row.ids)
    while not row.source and end and row.special[end - 1]:
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


MIN_SHARED_TOKENS = 512
"""Fewest copies of tokens in a pass that are worth sharing."""


def count_worthwhile_copies(tokens: int) -> int:
    """Return the fewest copies that are worth sharing in a pass with a number of tokens."""
    return max(MIN_SHARED_TOKENS, tokens // 4)


def share_beginnings(prompts: Sequence[tuple[int, ...]], groups: Ints) -> Ints | None:
    """Find the tokens of unpatched prompts that equal those of an earlier one in a causal model.

    Args:
        prompts: [prompt] token ids; tokens of an image have separate ids for each image.
        groups: [prompt] a number; activations of prompts with different numbers differ, also at
            equal tokens.

    Returns:
        [prompt, position]: the first prompt with the same tokens up to there, and -1 after the last
        token; None if too few tokens are copies.
    """
    import numpy as np  # lazy: checking a file doesn't need NumPy

    lengths = np.array([len(ids) for ids in prompts], dtype=np.int64)
    numbers = np.arange(len(prompts))
    starts = np.where(np.arange(lengths.max())[None, :] < lengths[:, None], numbers[:, None], -1)
    state = np.unique(groups, return_inverse=True)[1]
    for position in range(starts.shape[1]):
        rows = np.flatnonzero(lengths > position)
        tokens = np.array([prompts[row][position] for row in rows.tolist()], dtype=np.int64)
        order = np.lexsort((rows, tokens, state[rows]))
        begins = np.diff(state[rows][order], prepend=-1) != 0
        begins |= np.diff(tokens[order], prepend=-1) != 0
        if begins.all():
            break
        group = begins.cumsum() - 1
        state[rows[order]] = group
        starts[rows[order], position] = rows[order][begins][group]
    copies = int((starts != numbers[:, None]).sum() - (starts < 0).sum())
    return starts if copies >= count_worthwhile_copies(int(lengths.sum())) else None
