"""Prompts as the executor sees them: rows, runs, tokens, spans, positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mechdsl.base.record import Record, record
from mechdsl.images.picture import Picture
from mechdsl.images.regions import Region
from mechdsl.program.lower_images import IMAGE
from mechdsl.program.python_files import PythonFunction
from mechdsl.prompts.values import SpanAt

if TYPE_CHECKING:
    from mechdsl.base.arrays import Ints
    from mechdsl.prompts.rows import BlockRows, Row


_NOTHING: Mapping[str, Any] = MappingProxyType({})


@record
class TextTokens(Record):
    """A text that a metric refers to, tokenised as the continuation of its prompt."""

    text: str
    ids: tuple[int, ...]
    of_output: bool = False
    """It is the number of an output of a classifier, and no name of a label."""


@record
class Noise(Record):
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
class ReplyAt(Record):
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
    spans: tuple[SpanAt, ...]
    values: Mapping[str, Any]
    """Plain values: numbers, texts, lists of these."""
    texts: Mapping[str, TextTokens]
    """`answer`, `wrong` and the other texts of the block, as this run has them, tokenised as the
    continuation of the clean row's prompt."""
    reply: ReplyAt | None = None
    """Where the reply of another experiment stands at its end."""
    image: Picture | None = None
    """Of rows that are images: `text` and `ids` tell it from others."""
    places: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=lambda: _NOTHING)
    """Spans that have no text, as those of images: by name, the tokens of each occurrence."""
    regions: Mapping[str, tuple[Region, ...]] = field(default_factory=lambda: _NOTHING)
    """Parts of its image, by name: those of `places` in pixels."""


@record
class Derived(Record):
    """What an experiment's own run (`run healed { … }`) is made of, as far as rows can tell."""

    base: str
    """The run that its rules act on."""
    reads: tuple[str, ...]
    """Runs that its rules read."""
    draws: int
    """Draws of noise, of all of these."""


@record
class Run(Record):
    """`clean`, a corruption, a run from elsewhere, or one with rules: as many rows as the table, in
    its order."""

    name: str
    rows: tuple[RunRow, ...]
    noise: Noise | None = None
    prompts: str | None = None
    """The block that it is of, where that is another one."""
    model: str | None = None
    """The model that it runs on, where that isn't the experiment's."""
    derived: Derived | None = None
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


@record
class PromptTable(Record):
    """A prompts block made concrete for one tokenizer, seed, limit and part."""

    name: str
    row_ids: tuple[int, ...]
    """Index of each row before `where`, `limit` and `split`: the same row has the same id in every
    experiment."""
    row_keys: tuple[int, ...]
    """A hash of each row's content (values, clean text, answers), 0..2^63-1: noise, donors and
    random positions hang on it, so that they are the same wherever the row stands."""
    runs: Mapping[str, Run]
    conventions: Mapping[str, str] = field(default_factory=dict[str, str])
    """What was defaulted or dropped, in words, by short key (`bos`, `rows`, `answer`, …)."""
    data_hash: str = ""
    """SHA-256 of the data file, where there is one."""
    other_data: Mapping[str, str] = field(default_factory=dict[str, str])
    """The same of other blocks that it has runs of, by their names."""
    moved: tuple[int, ...] = ()
    """Leading token that all answers share: it stands at the end of every prompt instead."""
    moved_text: str = ""
    python: tuple[PythonFunction, ...] = ()
    """Functions of Python files that values are from."""
    beside: Mapping[str, PromptTable] = field(default_factory=dict[str, "PromptTable"])
    """Other blocks, with rows of their own, that means are taken of."""
    block_rows: BlockRows | None = field(default=None, repr=False, compare=False)
    """Of the block that it is of, by their ids."""
    stands_in: bool = False
    """Its rows stand in for those that can't be made here."""
    columns_unknown: bool = False
    """The same for want of its data file, which has names of its own."""
    cut: bool = False
    """There are more rows, which a check doesn't look at."""
    dealt: tuple[str, ...] = ()
    """Names of the values that rows have evenly by how they are made."""
    exhausted: tuple[str, ...] = ()
    """Names of the variables that have every value that the block declares."""
    whole: bool = False
    """They are all rows that the block can make."""
    unchanged: frozenset[str] = frozenset()
    """Corruptions that leave a row as it is: it is left out where they are used."""
    changed_by: tuple[str, ...] = ()
    """Those of these that are used, so that each of them changes all of the rows."""
    behind: str = ""
    """Whose replies stand behind the prompts, as written: `replies of writes(c: 1)`."""
    classes: tuple[str, ...] = ()
    """What its images are told apart by: the texts of a line `classes`."""
    alone: PromptTable | None = field(default=None, repr=False, compare=False)
    """The same without these."""

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def sources(self) -> Sequence[Row]:
        """The clean rows before tokenisation, in which texts of metrics are evaluated."""
        return () if self.block_rows is None else self.block_rows.with_ids(self.row_ids)

    @property
    def cut_from(self) -> tuple[str, ...]:
        """Per row that is a tile the image that it is of; nothing of other rows."""
        rows = self.runs["clean"].rows
        first = rows[0].image if rows else None
        if first is None or not first.tile:
            return ()
        return tuple(str(row.values[IMAGE]) for row in rows)


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
