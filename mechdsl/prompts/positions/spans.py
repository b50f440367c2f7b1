"""Positions of named spans and counted tokens in the prompts of a run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from mechdsl.base.limits import is_integer
from mechdsl.base.records import Record, closest_name
from mechdsl.base.text import Span, count_noun, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.prompts import TokenCoversMore
from mechdsl.diagnostics.rules import (
    AbsentOccurrence,
    AmbiguousSpan,
    AnswersDiffer,
    BadLoopValue,
    EmptyRange,
    NoAnswerTokens,
    NoSuchSpecial,
    NotInAnswer,
    OutsidePrompt,
    RaggedPositions,
    SpanWithoutToken,
    UnknownSpan,
)
from mechdsl.diagnostics.syntax import MisspeltWord
from mechdsl.images.layouts import THUMBNAIL, ImageExpansion, PromptPicture
from mechdsl.program.images import FRAME_SPAN, IMAGE_SPAN, IMAGE_SPANS
from mechdsl.program.spec import CLEAN
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import (
    ANSWER_SPAN,
    Hits,
    PlacedPicture,
    PositionCell,
    RunRow,
    SpanOccurrence,
    find_text,
    list_places,
)
from mechdsl.prompts.tokens.tokenizer import SPECIAL_ROLES, ImageTokenizer, TextTokenizer
from mechdsl.prompts.values import TextSpan
from mechdsl.syntax import ast
from mechdsl.syntax.printer import format_position, format_span
from mechdsl.syntax.traversal import rewrite, walk


def unknown_span_hint(name: str, spans: Iterable[str], table: PromptTable) -> str:
    """Return the hint for a span that doesn't exist."""
    spans = sorted(set(spans))
    if table.sources and name in table.sources[0].block.names():
        return (
            f"`{name}` is a value, but its text isn't marked: write it as `{{{name}}}` in the "
            f"template, or add `span {name} in COLUMN`"
        )
    defined = table.sources[0].block.spec.spans if table.sources else ()
    if any(span.name.id == name and span.literal is not None for span in defined):
        return f"`span {name} = …` searches the prompts for its text, and no prompt contains it"
    listed = name_list(spans)
    otherwise = f"the spans are {listed}" if spans else "write a placeholder: `{name}`"
    return did_you_mean(name, [*spans, "first", "last"], otherwise)


def occurrence_hint(ref: ast.SpanRef, least: int, table: PromptTable, run: str) -> str:
    """Return the hint for a `where` that leaves only rows with the occurrence."""
    if table.runs[run].prompts is not None:
        return "name a position that both blocks have, or read one `onto` another"
    if any(row.image is not None for row in table.runs[run].rows[:1]) and ref.name == IMAGE_SPAN:
        return "each row has one: write `image row 1 col 1 token`, or `each token of image`"
    if ref.name == FRAME_SPAN:
        frames = [len(row.pictures_of(FRAME_SPAN, ref.of)) for row in table.runs[run].rows]
        low, high = min(frames), max(frames)
        between = f"{low} to " if low < high else ""
        return f"each prompt has {between}{count_noun(high, 'frame')}"
    count = _count_of(ref, table)
    item = _item_of(ref, table)
    if item not in (None, ref.name):
        written = format_span(replace(ref, name=item))
        return f"the items of `{ref.of}` are called `{item}`: write `{written} token`"
    if count is None:
        return "keep rows that have it with `where`, or name another position"
    gap = max(
        (
            clean - number
            for clean, number in zip(
                _counts(table, CLEAN, count), _counts(table, run, count), strict=True
            )
        ),
        default=0,
    )
    each = f"`each {ref.name} token`"
    return f"write `where {count} >= {least + gap}`, or {each}, which excludes short rows"


def _item_of(ref: ast.SpanRef, table: PromptTable) -> str | None:
    """Return the name of the items of the list whose occurrence a position names."""
    block = table.sources[0].block if table.sources else None
    definition = None if block is None or ref.of is None else block.definitions.get(ref.of)
    value = None if definition is None else definition.value
    if not isinstance(value, ast.Call) or value.name != "list" or not value.arguments:
        return None
    item = value.arguments[0].value
    return item.id if isinstance(item, ast.Name) else None


def _count_of(ref: ast.SpanRef, table: PromptTable) -> str | None:
    """Return the name of the value that holds the list's length."""
    block = table.sources[0].block
    for name, definition in block.definitions.items():
        value = definition.value
        if not isinstance(value, ast.Call) or value.name != "list":
            continue
        positional = [a.value for a in value.arguments if a.name is None]
        items = positional[:1] == [ast.Name(ref.name or "", span=ref.span)]
        if items and ref.of in (None, name) and len(positional) > 1:
            count = positional[1]
            return count.id if isinstance(count, ast.Name) else None
    return None


def _counts(table: PromptTable, run: str, name: str) -> list[int]:
    values = (row.values.get(name) for row in table.runs[run].rows)
    return [v if isinstance(v, int) else 0 for v in values]


SPAN_PREFIXES = ("each", "between", "first", "last")
"""Words of the language that may precede a span."""


@dataclass
class NamedNumbers:
    """Replacement of named numbers in positions by their values."""

    values: Mapping[str, Any]
    """Values of the `for` variables around a position and of parameters, by name."""
    loops: Collection[str]
    """Names of the `for` variables."""
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])
    swept: set[Span] = field(default_factory=set[Span])
    """Source spans of the nodes whose number is a `for` variable's."""

    def written_out(self, positions: ast.Positions) -> ast.Positions | None:
        """Return the positions with numbers only; None after E0322."""
        before = len(self.diagnostics)
        for node in walk(positions):
            if isinstance(node, ast.SpanRef) and (slip := self._slip(node)) is not None:
                self.diagnostics.append(slip)
                return None
            parts = walk(node) if isinstance(node, ast.Point | ast.SpanRef | ast.TokenIndex) else ()
            if any(isinstance(part, ast.Variable) and part.name in self.loops for part in parts):
                self.swept.add(node.span)
        rewritten = rewrite(positions, self._changed)
        return rewritten if not has_errors(self.diagnostics[before:]) else None

    def _changed(self, node: ast.Node) -> Any:
        return self._number(node) if isinstance(node, ast.Variable) else node

    def _slip(self, node: ast.SpanRef) -> Diagnostic | None:
        """Diagnose `eahc item token`, which parses as occurrence `item` of a span."""
        number = None if node.occurrence is None else node.occurrence.low
        if node.name is None or not isinstance(number, ast.Variable) or number.name in self.values:
            return None
        if node.name == "except":
            reason, hint = "it covers several tokens", "write `tokens except …`"
            return BadLoopValue(span=node.span, name=node.name, reason=reason, hint=hint)
        meant = closest_name(node.name, SPAN_PREFIXES)
        if meant is None:
            return None
        start = node.span.start
        span = Span(node.span.source, start, start + len(node.name))
        return MisspeltWord(span=span, word=node.name, meant=meant)

    def _number(self, node: ast.Variable) -> int:
        """Return the value of a variable; 0 after E0322."""
        value = self.values.get(node.name)
        if is_integer(value):
            return (-value if node.negative else value) + node.offset
        example = f"`for {node.name} in 1..5`"
        reason, hint = "positions are whole numbers", f"loop over whole numbers: {example}"
        if value is None:
            reason = "is neither a `for` variable around this position nor a `param`"
            known = name_list(self.values)
            otherwise = f"names known here: {known}" if known else f"write {example} around it"
            hint = did_you_mean(node.name, list(self.values), otherwise)
        self.diagnostics.append(
            BadLoopValue(span=node.span, name=node.name, reason=reason, hint=hint)
        )
        return 0


def has_named_numbers(node: ast.Node) -> bool:
    """Return whether a node contains a named number."""
    return any(isinstance(part, ast.Variable) for part in walk(node))


def fold_offset(point: ast.Point) -> ast.Point:
    """Simplify `token 15 - 11` to `token 4`, even if no prompt has a token 15.

    `token 3 - 11` stays as it is: it is before the prompt, not counted from its end.
    """
    base, offset = point.base, point.offset
    if isinstance(base, ast.TokenIndex) and base.high is None and isinstance(base.low, int):
        low = base.low + offset if isinstance(offset, int) else base.low
        if (low < 0) == (base.low < 0):
            return ast.Point(replace(base, low=low, span=point.span), span=point.span)
    return point


def position_label(item: ast.Position) -> str:
    """Return the label of a position with named numbers: `3` for `token i - 11`, `item 2 token` for
    `item i token`."""
    point = fold_offset(item.body) if isinstance(item.body, ast.Point) else item.body
    match point:
        case ast.Point(base=ast.TokenIndex(plural=False, low=int(low)), offset=0) if (
            item.align is None
        ):
            return str(low)
        case _:
            return format_position(item)


def literal_number(written: int | ast.Variable | None) -> int | None:
    """Return a number after variables have been replaced; None represents `*`."""
    assert not isinstance(written, ast.Variable)
    return written


def occurrence_bounds(occurrence: ast.Occurrence | None) -> tuple[int, int] | None:
    """Return the first and the last counted occurrence; None for all occurrences."""
    low = None if occurrence is None else literal_number(occurrence.low)
    if occurrence is None or low is None:
        return None
    high = literal_number(occurrence.high)
    return low, low if high is None else high


class AnswerTokens(Record):
    """The texts after the prompts, each in separate passes, or the reason that there are none.

    A text has the same tokens after the prompts of every run.
    """

    texts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(the text as a measure names it, its number of tokens in each row)."""
    reason: str = "only rules of an experiment act on them"
    hint: str = "name a position of the prompt"

    def longest(self, row: int) -> int:
        """Return the number of tokens of a row's longest text."""
        return max((lengths[row] for _, lengths in self.texts), default=0)

    def uneven(self) -> list[int]:
        """Return the rows whose texts differ in length."""
        every = zip(*(lengths for _, lengths in self.texts), strict=True)
        return [n for n, row in enumerate(every) if len(set(row)) > 1]


NO_ANSWERS = AnswerTokens()


def refers_to_answer(node: ast.Node | None) -> bool:
    """Return whether a position may refer to tokens of the answer."""
    return any(
        (isinstance(part, ast.SpanRef) and part.name == ANSWER_SPAN and part.of is None)
        or (isinstance(part, ast.Position) and part.and_answer)
        for part in walk(node)
    )


ABSENT_SPAN = SpanOccurrence(0, 0, ())
"""An occurrence that a row lacks."""


@dataclass
class SpanFinder:
    """The span lookup in one run of a table; errors are added to `diagnostics`."""

    table: PromptTable
    run: str
    tokenizer: TextTokenizer
    diagnostics: list[Diagnostic]
    answers: AnswerTokens = NO_ANSWERS
    swept: Collection[Span] = ()
    """Source spans of positions, or parts of them, whose number is a `for` variable's."""

    def __post_init__(self) -> None:
        self.maps = self.table.runs[self.run].token_maps
        self.total = len(self.maps)
        self.of_tiles = bool(self.table.cut_from)

    def drops_out(self, node: ast.Node) -> bool:
        """Return whether rows without a position drop out instead of causing an error.

        That holds if the number is a `for` variable's, or if a region may lie in other tiles of the
        image.
        """
        if self.of_tiles and isinstance(node, ast.SpanRef) and node.name not in IMAGE_SPANS:
            return True
        return node.span in self.swept

    def places(self, n: int, ref: ast.SpanRef) -> list[SpanOccurrence]:
        """Return all occurrences of a span in a row, in text order."""
        m = self.maps[n]
        name = ref.name or ""
        if name in m.row.places and ref.view is None:
            return [SpanOccurrence(0, 0, tokens) for tokens in m.row.places[name]]
        pictures = self.pictures_of(n, ref)
        if pictures or ref.view is not None:
            tiles = (self.tiles_of(ref, picture.picture.expansion) for picture in pictures)
            of_image = list_places(name, zip(pictures, tiles, strict=True))
            if of_image or ref.view is not None:
                return [SpanOccurrence(0, 0, tokens) for tokens in of_image]
        if ref.literal is not None:
            ranges = find_text(m.row.text, ref.literal)
            if ref.of is not None:
                around = [s for s in m.row.spans if s.name == ref.of]
                ranges = [
                    at for at in ranges if any(s.start <= at[0] and at[1] <= s.end for s in around)
                ]
            return [m.place(*at) for at in ranges]
        if self.is_answer(ref):
            return [SpanOccurrence(0, 0, self.answer_tokens(n))]
        special = self.special_id(ref)
        if special is not None:
            return [
                SpanOccurrence(0, 0, (i,)) for i, token in enumerate(m.row.ids) if token == special
            ]
        spans = [s for s in m.row.spans if s.name == name]
        if ref.of is not None:
            around = [s for s in m.row.spans if s.name == ref.of]
            spans = [s for s in spans if ref.of in s.within or _lies_in(s, around)]
        return [m.place(s.start, s.end) for s in spans]

    def special_id(self, ref: ast.SpanRef) -> int | None:
        """Return the id of `bos`, `cls`, `sep` or `eos`, unless the prompt has a span of that name.

        Such a span is a placeholder or, for `sep`, the separator of a list unless `of` names the
        list.
        """
        if ref.name not in SPECIAL_ROLES or ref.of is not None:
            return None
        named = any(
            s.name == ref.name and not (ref.name == "sep" and s.within)
            for m in self.maps[:1]
            for s in m.row.spans
        )
        return None if named else self.tokenizer.role_ids.get(ref.name)

    # --- after the prompt -------------------------------------------------------------------------

    def is_answer(self, ref: ast.SpanRef) -> bool:
        """Return whether a span is the text after the prompt: no prompt has a span of that name."""
        named = ref.name == ANSWER_SPAN and ref.of is None
        return named and not self.of_images and self._answer_is_after

    @cached_property
    def _answer_is_after(self) -> bool:
        return all(span.name != ANSWER_SPAN for span in self._all_spans())

    def answer_tokens(self, n: int) -> tuple[int, ...]:
        """Return the positions of a row's longest text after its prompt."""
        size = len(self.maps[n].row.ids)
        return tuple(range(size, size + self.answers.longest(n)))

    def answer_fits(self, node: ast.Node, *, from_end: bool) -> bool:
        """Return whether there is a text after the prompts, else add E0540 or E0541.

        from_end: tokens are counted from the text's end, so all texts of a row need equal lengths.
        """
        position, answers = node.span.written, self.answers
        if not answers.texts:
            self.diagnostics.append(
                NoAnswerTokens(
                    span=node.span, position=position, reason=answers.reason, hint=answers.hint
                )
            )
            return False
        rows = answers.uneven() if from_end else []
        if rows:
            each = dict.fromkeys(f"`{text}` has {at[rows[0]]}" for text, at in answers.texts)
            self.diagnostics.append(
                AnswersDiffer(
                    span=node.span,
                    position=position,
                    rows=len(rows),
                    total=self.total,
                    row=rows[0],
                    lengths=", ".join(each),
                )
            )
        return not rows

    def span_fits(self, node: ast.Node, ref: ast.SpanRef, *, from_end: bool) -> bool:
        """Check an answer span with `answer_fits`; its occurrences can't be counted (E0542).

        Returns:
            True for all other spans of texts.
        """
        if isinstance(node, ast.SpanTokens) and (self.of_images or self.is_picture(ref)):
            return self._one_patch(node, ref)
        if not self.is_answer(ref):
            return True
        each = isinstance(node, ast.SpanTokens) and node.each
        if each or ref.occurrence is not None or ref.edge is not None:
            self.diagnostics.append(
                NotInAnswer(
                    span=node.span,
                    position=node.span.written,
                    reason="a prompt has one answer, so it has no occurrences to count",
                    hint="write `each token of answer` for one run per token, `first token of "
                    "answer + 1` for the second one",
                )
            )
            return False
        return self.answer_fits(node, from_end=from_end)

    def _one_patch(self, node: ast.SpanTokens, ref: ast.SpanRef) -> bool:
        """Return False after an error if one token of a span of several patches is requested."""
        if ref.row is not None or (node.plural and not (node.each and self.of_images)):
            return True
        occurrences = self.all_places(replace(ref, occurrence=None))
        if occurrences is None:
            return False
        sizes = [max([0, *(len(place.tokens) for place in places)]) for places in occurrences]
        several = [n for n, size in enumerate(sizes) if size > 1]
        if not several:
            return True
        name = format_span(replace(ref, occurrence=None, of=None))
        ways = [f"`each token of {name}` for one run each", f"`{name} tokens` for all of them"]
        self._ambiguous(node, name, several, f"is {sizes[several[0]]} patches", ways)
        return False

    def _known(self, ref: ast.SpanRef) -> bool:
        """Return whether any row of any run has such a span, else add E0308 or E0313."""
        if self.of_images:
            return self._known_of_images(ref)
        if ref.literal is not None and ref.of is None:
            return True
        if self.is_answer(ref):
            return True
        if self.is_picture(ref):
            return not self._of_equal_images(ref)
        special = self.special_id(ref)
        if special is not None:
            if any(special in m.row.ids for m in self.maps):
                return True
            self._no_special(ref, "the tokenizer has one, but doesn't insert it into these prompts")
            return False
        wanted = [ref.of] if ref.literal is not None else [ref.name, ref.of]
        for name in wanted:
            if name is None or any(name == span.name for span in self._all_spans()):
                continue
            if name in SPECIAL_ROLES and ref.of is None:
                self._no_special(ref, "the tokenizer has none")
            elif self._defined_elsewhere(ref, name):
                pass
            else:
                names = {span.name for span in self._all_spans()}
                hint = unknown_span_hint(name, names, self.table)
                others = (run.prompts for run in self.table.runs.values() if run.prompts)
                blocks = "`, `".join(dict.fromkeys((self.table.name, *others)))
                self.diagnostics.append(
                    UnknownSpan(span=ref.span, name=name, prompts=blocks, hint=hint)
                )
            return False
        return True

    def _of_equal_images(self, ref: ast.SpanRef) -> bool:
        """Add E0306 for a region of one of several equal images, if a placeholder with another name
        stands for one of them; return whether it is one."""
        region, several = ref.name or "", list[int]()
        renamed: list[PlacedPicture] = []
        for n in range(self.total):
            pictures = self.pictures_of(n, ref)
            own = [p for p in pictures if p.picture.equal and region in p.picture.regions]
            several += [n] * bool(own)
            renamed += own
        if several:
            equal = renamed[0].picture.equal
            owner = next(name for name, picture in equal.items() if region in picture.regions)
            others = " or ".join(f"`{name}`" for name in equal if name != owner)
            what = f"is a region of `{owner}`, and the placeholder `{renamed[0].name}` may also "
            what += f"stand for {others}, which is equal"
            ways = [f"`{{{name}}}`" for name in equal]
            ways[-1] += " in the template, without another name"
            self._ambiguous(ref, region, several, what, ways)
        return bool(several)

    def _defined_elsewhere(self, ref: ast.SpanRef, name: str) -> bool:
        """Add E0308 for a region that only images of another prompt set have; return whether it is
        one."""
        table = self.table
        others = [
            run.prompts or table.name
            for run in table.runs.values()
            if any(row.pictures and row.pictures_of(name) for row in run.rows)
        ]
        if not others:
            return False
        mine = table.runs[self.run].prompts or table.name
        hint = f"define it in `{mine}`, too: `box = [0, 0, 8, 8]` and `region {name} = box`, or "
        hint += "take a prompt set of one row whose image has the same name and rows and columns"
        what = f"a region of images in `{others[0]}` only"
        problem = UnknownSpan(span=ref.span, name=name, prompts=mine, hint=hint, what=what)
        self.diagnostics.append(problem)
        return True

    def pictures_of(self, n: int, ref: ast.SpanRef) -> list[PlacedPicture]:
        """Return the images of a row with a name, or those with a region of it."""
        row, name = self.maps[n].row, ref.name or ""
        if row.image is None:
            return row.pictures_of(name, ref.of) if row.pictures else []
        if ref.of is not None:
            return []
        assert isinstance(self.tokenizer, ImageTokenizer)
        parts = {region: row.places[region] for region in row.regions}
        if name != IMAGE_SPAN and name not in parts:
            return []
        picture = PromptPicture(row.image, self.tokenizer.expansion, parts)
        return [PlacedPicture(IMAGE_SPAN, picture, 0)]

    def first_picture(self, n: int, ref: ast.SpanRef) -> PlacedPicture | None:
        """Return the first image of a row with a name."""
        return next(iter(self.pictures_of(n, ref)), None)

    def images_of(self, base: ast.SpanTokens) -> list[list[tuple[int, PlacedPicture]]] | None:
        """Return the images that `photo row 1 col 2 token` refers to in each row, with their
        numbers; None after E0306, E0309 or E0321."""
        ref = base.of
        images = [list(enumerate(self.pictures_of(n, ref), 1)) for n in range(self.total)]
        if self.is_empty(ref.occurrence):
            return None
        counted = occurrence_bounds(ref.occurrence)
        if counted is None:
            several = [n for n, own in enumerate(images) if len(own) > 1]
            if several and ref.occurrence is None and not (base.each or base.plural):
                name, last = ref.name or "", len(images[several[0]])
                ways = [
                    f"`{name} {last} row … col … token` for one of them",
                    f"`each {name} row … col … token` for one run each",
                    f"`{name} row … col … tokens` for all of them",
                ]
                what = f"occurs {last} times in the prompt"
                self._ambiguous(base, ref.span.written, several, what, ways)
                return None
            return images
        low, high = counted
        lacking = [n for n, own in enumerate(images) if len(own) < high]
        drops_out = self.drops_out(ref) and len(lacking) < self.total
        if low < 1 or (lacking and not drops_out):
            self.absent(base, ref, lacking or list(range(self.total)), min(low, high))
            return None
        return [own[low - 1 : high] for own in images]

    def extra_label(self, token: int) -> str:
        """Return the label of a token of an image that reads no patch."""
        assert isinstance(self.tokenizer, ImageTokenizer)
        return self.tokenizer.label(token)

    def tiles_of(self, ref: ast.SpanRef, expansion: ImageExpansion) -> tuple[int, ...] | None:
        """Return the tiles that a view names; none if the image lacks one, None without a view."""
        stands_in = self.table.stands_in or self.tokenizer.stands_in
        if ref.view is None or (stands_in and not (expansion.is_sound and ref.view.is_frame)):
            return None
        known = {tile.number for tile in expansion.layout.tiles}
        if ref.view.is_frame != expansion.is_sound:
            return ()
        if ref.view.number is None:
            return (THUMBNAIL,) if THUMBNAIL in known else ()
        tiles = tuple(sorted(known - {THUMBNAIL}))
        bounds = occurrence_bounds(ref.view.number)
        if bounds is None or not tiles:
            return tiles
        wanted = range(bounds[0], bounds[1] + 1)
        if stands_in:  # the model may have any number of frames
            return tiles[: len(wanted)]
        is_known = wanted[-1] <= tiles[-1] and all(number in known for number in wanted)
        return tuple(wanted) if is_known and wanted[0] > THUMBNAIL else ()

    def is_empty(self, number: ast.Occurrence | None) -> bool:
        """Return whether a range of numbers is empty, after E0321."""
        bounds = occurrence_bounds(number)
        if number is None or bounds is None or bounds[0] <= bounds[1]:
            return False
        low, high = map(str, bounds)
        text = number.span.written
        self.diagnostics.append(EmptyRange(span=number.span, text=text, low=high, high=low))
        return True

    def lack_cells(self, ref: ast.SpanRef, lacking: Sequence[int]) -> bool:
        """Return whether rows without a part of their image are an error, after E0310."""
        if not lacking or (self.drops_out(ref) and len(lacking) < self.total):
            return False
        image = self.first_picture(lacking[0], ref)
        noun = "image" if image is None else image.picture.picture.noun
        self.diagnostics.append(
            OutsidePrompt(
                span=ref.span,
                position=ref.span.written,
                run=self.run,
                lacking=len(lacking),
                total=self.total,
                example=self.example(lacking[0]),
                hint="choose another image" if image is None else _parts_of(image, ref),
                unit=noun,
            )
        )
        return True

    def _views_fit(self, ref: ast.SpanRef) -> bool:
        """Return whether the images have the tiles that a view names, else add E0310 or E0321."""
        if ref.view is None:
            return True
        if self.is_empty(ref.view.number):
            return False
        lacking = [
            n
            for n in range(self.total)
            if all(
                self.tiles_of(ref, picture.picture.expansion) == ()
                for picture in self.pictures_of(n, ref)
            )
        ]
        return not self.lack_cells(ref, lacking)

    def is_picture(self, ref: ast.SpanRef) -> bool:
        """Return whether a span is an image within the prompts, or a region of one."""
        name = ref.name
        return name is not None and any(
            m.row.pictures_of(name, ref.of) for m in self.maps[:1] if m.row.pictures
        )

    @property
    def of_images(self) -> bool:
        """Whether the rows are images."""
        return any(m.row.image is not None for m in self.maps)

    def _known_of_images(self, ref: ast.SpanRef) -> bool:
        names = [name for m in self.maps[:1] for name in m.row.places]
        if ref.row is not None:
            names = [IMAGE_SPAN]
        elif ref.view is not None:
            names = [IMAGE_SPAN, *(name for m in self.maps[:1] for name in m.row.regions)]
        if ref.name in names and ref.of is None:
            return True
        shown = name_list(names)
        hint = did_you_mean(ref.name or "", names, f"tokens of these images are {shown}")
        name = ref.of or ref.name or ref.literal or ""
        self.diagnostics.append(
            UnknownSpan(
                span=ref.span,
                name=name,
                prompts=self.table.runs[self.run].prompts or self.table.name,
                hint=hint,
                what="not a position of an image",
                unit="image",
            )
        )
        return False

    @property
    def picture_names(self) -> list[str]:
        """Names of the images within the prompts."""
        named = (picture.name for m in self.maps[:1] for picture in m.row.placed_pictures)
        return list(dict.fromkeys(named))

    def _is_video(self, ref: ast.SpanRef) -> bool:
        """Whether a span is a video, whose frames are images."""
        return any(
            picture.video == ref.name for m in self.maps[:1] for picture in m.row.placed_pictures
        )

    def _has_no_frames(self, ref: ast.SpanRef) -> bool:
        """Whether a span with a frame after its name is a video or an image and not a sound."""
        if ref.view is None or not ref.view.is_frame:
            return False
        picture = self.first_picture(0, ref) if self.is_picture(ref) else None
        return self._is_video(ref) or (
            picture is not None and not picture.picture.expansion.is_sound
        )

    def _not_an_image(self, ref: ast.SpanRef) -> Diagnostic:
        """Return E0308 for patches of something that isn't an image."""
        names = self.picture_names
        hint = 'add one to the prompts: `image photo = "{file}"`, with `{photo}` in the template'
        if names:
            hint = did_you_mean(ref.name or "", names, f"images are {name_list(names)}")
        name, what = ref.name or "", "not an image in a prompt"
        framed = ref.view is not None and ref.view.is_frame
        if self._is_video(ref):
            name = ref.span.written
            hint = f"name a frame of the video: `{FRAME_SPAN} 1 row 1 col 1 token`"
            what = f"`{ref.name}` is a video: only its frames have rows and columns"
            match = re.fullmatch(rf"{ref.name}\s+({FRAME_SPAN}\s.*)", name)
            if match is not None:
                hint = f"name the frame first: `{match[1]} of {ref.name}`"
                what = what if ref.row is not None else f"`{ref.name}` is a video"
        elif framed and name in names:
            hint = f"name all tokens of the image: `{name} tokens`"
            name, what = ref.span.written, f"`{name}` is an image, which has no frames"
        return UnknownSpan(
            span=ref.span,
            name=name,
            prompts=self.table.runs[self.run].prompts or self.table.name,
            hint=hint,
            what=what,
        )

    def _all_spans(self) -> Iterator[TextSpan]:
        return (s for run in self.table.runs.values() for row in run.rows for s in row.spans)

    def _no_special(self, ref: ast.SpanRef, reason: str) -> None:
        hint = "set `bos: true` in the model line" if ref.name == "bos" else "name another token"
        if reason == "the tokenizer has none":
            hint = "write `first token` for the first one of the text"
        self.diagnostics.append(
            NoSuchSpecial(
                span=ref.span,
                name=ref.name or "",
                prompts=self.table.name,
                reason=reason,
                hint=hint,
            )
        )

    def all_places(self, ref: ast.SpanRef) -> list[list[SpanOccurrence]] | None:
        """Return all occurrences per row; None with a diagnostic if the span is unknown or has no
        token."""
        patches = ref.row is not None or (ref.view is not None and not self.is_picture(ref))
        unnamed = patches and not self.of_images and ref.name not in self.picture_names
        if unnamed or self._has_no_frames(ref):
            self.diagnostics.append(self._not_an_image(ref))
            return None
        if not self._known(ref) or not self._views_fit(ref):
            return None
        occurrences = [self.places(n, ref) for n in range(self.total)]
        empty = (n for n, places in enumerate(occurrences) for p in places if not p.tokens)
        bare = list(dict.fromkeys(empty))
        if bare:
            place = next(p for p in occurrences[bare[0]] if not p.tokens)
            text = self.maps[bare[0]].row.text[place.start : place.end]
            hint = 'name the token next to it, or choose a separator such as ", "'
            self.diagnostics.append(
                SpanWithoutToken(
                    span=ref.span,
                    name=ref.span.written,
                    run=self.run,
                    lacking=len(bare),
                    total=self.total,
                    text=repr(text),
                    by_text=not text and not self.table.stands_in,
                    hint=hint if text else "exclude rows in which it is empty with `where`",
                )
            )
            return None
        return occurrences

    def absent(self, node: ast.Node, ref: ast.SpanRef, lacking: list[int], least: int) -> None:
        self.diagnostics.append(
            AbsentOccurrence(
                span=node.span,
                position=format_span(ref),
                run=self.run,
                lacking=len(lacking),
                total=self.total,
                example=self.example(lacking[0]),
                hint=occurrence_hint(ref, least, self.table, self.run)
                if least > 0
                else f"occurrences count from 1: write `{ref.name} 1 token`",
            )
        )

    def one_place(self, node: ast.Node, ref: ast.SpanRef) -> list[SpanOccurrence] | None:
        """Return the occurrence that a span refers to in each row, else None after E0306 or E0309.

        If `drops_out` holds, rows without the occurrence have one without tokens.
        """
        occurrences = self.all_places(ref)
        if occurrences is None:
            return None
        pick, least = _picker(ref)
        if least < 1:  # `item 0`: occurrences count from 1
            self.absent(node, ref, list(range(self.total)), least)
            return None
        lacking = [n for n, places in enumerate(occurrences) if len(places) < least]
        if lacking and not (self.drops_out(ref) and len(lacking) < self.total):
            self.absent(node, ref, lacking, least)
            return None
        if pick is None:
            several = [n for n, places in enumerate(occurrences) if len(places) > 1]
            if several:
                times = f"occurs {len(occurrences[several[0]])} times in the prompt"
                self._ambiguous(node, ref.span.written, several, times, _occurrences(ref))
                return None
            pick = 0
        return [places[pick] if len(places) >= least else ABSENT_SPAN for places in occurrences]

    def _ambiguous(
        self, node: ast.Node, name: str, several: list[int], what: str, ways: list[str]
    ) -> None:
        self.diagnostics.append(
            AmbiguousSpan(
                span=node.span,
                name=name,
                several=what,
                rows=len(several),
                total=self.total,
                run=self.run,
                example=self.example(several[0]),
                ways=", ".join(ways[:-1]) + " or " + ways[-1],
            )
        )

    def warn(
        self, ref: ast.SpanRef, hits: Iterable[tuple[int, SpanOccurrence, tuple[int, ...]]]
    ) -> None:
        """Add W0701 if a hit token also covers text outside the span."""
        apart = self.of_images or self.is_picture(ref) or self.is_answer(ref)
        if apart or self.special_id(ref) is not None:
            return
        texts: Counter[str] = Counter()
        rows: set[int] = set()
        for n, place, tokens in hits:
            for token in tokens:
                more = self.maps[n].covers_more(place, token)
                if more is not None:
                    texts[more] += 1
                    rows.add(n)
        if texts:
            shown = ", ".join(f"`{t}`" for t, _ in texts.most_common(3))
            self.diagnostics.append(
                TokenCoversMore(
                    span=ref.span,
                    name=ref.span.written,
                    tokens=shown,
                    rows=len(rows),
                    total=self.total,
                )
            )

    def example(self, n: int) -> str:
        return row_example(self.maps[n].row)


def row_example(row: RunRow) -> str:
    """Return the beginning of a row's text for a message."""
    text = " ".join(row.text.split())
    return f'"{text}"' if len(text) <= 48 else f'"{text[:47]}…"'


def _parts_of(image: PlacedPicture, ref: ast.SpanRef) -> str:
    """Describe the tiles of an image and the grid of its tokens."""
    expansion = image.picture.expansion
    rows, cols = expansion.size
    if expansion.is_sound:
        return (
            f"`{image.name}` has {cols} frames, counted from 1: write `{image.name} frame 1 token`"
        )
    name = image.video if image.video and image.video == ref.name else image.name
    unit = "tokens" if expansion.vectors == 1 else "patches"
    said = f"{rows} rows and {cols} columns of {unit}"
    note = "; rows and columns count from 1 at the top left"
    if expansion.layout.cells and not rows:
        said = "tokens without rows and columns, each computed from all patches of a tile"
        note = f": write `{name} tokens`, or a site in the vision encoder, whose patches have "
        note += "rows and columns"
    elif len(expansion.grid) < rows * cols:
        said += ", and its tiles differ in their rows and columns"
        note = f": name a tile, as in `{name} tile 1 row 1 col 1 token`"
    if ref.view is not None:
        tiles = len([tile for tile in expansion.layout.tiles if tile.number != THUMBNAIL])
        thumbnail = "no thumbnail" if expansion.layout.thumbnail is None else "a thumbnail"
        said += f" in {count_noun(tiles, 'tile')}, and {thumbnail}"
    return f"there, `{name}` has {said}{note}"


def _lies_in(span: TextSpan, around: Sequence[TextSpan]) -> bool:
    """Return whether a marked or literal span is inside one of the other spans in `around`."""
    return any(s is not span and s.start <= span.start and span.end <= s.end for s in around)


def _picker(ref: ast.SpanRef) -> tuple[int | None, int]:
    """Return the index of the occurrence (None: the only one) and the least number of them."""
    if ref.edge is not None:
        return (0 if ref.edge == "first" else -1), 1
    counted = occurrence_bounds(ref.occurrence)
    if counted is not None:
        return counted[0] - 1, counted[0]
    return (-1 if ref.literal is not None else None), 1


def _occurrences(ref: ast.SpanRef) -> list[str]:
    """Return the expressions that select one of several occurrences."""
    name, within = ref.span.written, f" of {ref.of}" if ref.of is not None else ""
    ways = [f"`first-{name} token`", f"`last-{name} token`", f"`{ref.name} 2{within} token`"]
    return [*ways, f"`each {name} token` for one run each", f"`{name} tokens` for all of them"]


@dataclass
class CountedTokens:
    """The counted positions in the run of `spans`; errors are added to its `diagnostics`."""

    spans: SpanFinder
    with_runs: tuple[str, ...]
    """Other runs whose prompts must have the same length."""

    def __post_init__(self) -> None:
        self.maps = self.spans.maps
        self.diagnostics = self.spans.diagnostics

    def index(self, base: ast.TokenIndex, align: str | None) -> list[PositionCell]:
        """Return the cells of a number, a range or `*`. Codes: E0305, E0310, E0321."""
        low = literal_number(base.low)
        high = base.high
        if low is None:
            everything = tuple((tuple(range(len(m.row.ids))),) for m in self.maps)
            if base.plural:
                return [PositionCell(base.span.written, everything, follows="every")]
            return self.by_index(base, everything, align)
        if high is None:
            label = base.span.written if base.plural else str(low)
            return self._counted([(label, low, low)], base)
        if (low < 0) != (high < 0):
            return self._mixed(base, low, high, align)
        if low > high:
            text, first, last = f"{low}..{high}", str(high), str(low)
            self.diagnostics.append(EmptyRange(span=base.span, text=text, low=first, high=last))
            return []
        # An index one past the end causes the same error as a billion, at lower cost.
        longest = max(len(m.row.ids) for m in self.maps)
        low, high = max(low, -longest - 1), min(high, longest)
        if base.plural:
            return self._counted([(base.span.written, low, high)], base)
        return self._counted([(str(i), i, i) for i in range(low, high + 1)], base)

    def _counted(
        self, wanted: list[tuple[str, int, int]], base: ast.TokenIndex
    ) -> list[PositionCell]:
        cells: list[PositionCell] = []
        for label, low, high in wanted:
            hits: list[Hits] = []
            for m in self.maps:
                size = len(m.row.ids) if low < 0 else 0
                hits.append((tuple(range(low + size, high + size + 1)),))
            cells.append(PositionCell(label, tuple(hits)))
        hint = "count within the shortest prompt, or from the end: `token -1`"
        return self.inside(cells, base, hint, special=True)

    def _mixed(
        self, base: ast.TokenIndex, low: int, high: int, align: str | None
    ) -> list[PositionCell]:
        """Return the cells of `2..-1`: from the second to the last token in each row."""
        whole: list[Hits] = []
        for m in self.maps:
            size = len(m.row.ids)
            first, last = (i + size if i < 0 else i for i in (low, high))
            whole.append((tuple(range(first, last + 1)),) if first <= last else ())
        cell = PositionCell(base.span.written, tuple(whole))
        hint = "count within the shortest prompt"
        if not self.inside([cell], base, hint, special=True):
            return []
        if base.plural:
            return [cell]
        return self.by_index(base, whole, align)

    def by_index(
        self, node: ast.Node, whole: Sequence[Hits], align: str | None
    ) -> list[PositionCell]:
        """Return one cell per index from an end; rows without it drop out. Code: E0305."""
        lengths = [len(m.row.ids) for m in self.maps]
        runs = self.spans.table.runs
        others = [len(r.ids) for name in self.with_runs for r in runs[name].rows]
        everything = lengths + others
        if len(set(everything)) > 1 and align is None:
            self.diagnostics.append(
                RaggedPositions(
                    span=node.span,
                    position=node.span.written,
                    run=self.spans.run,
                    shortest=min(everything),
                    longest=max(everything),
                )
            )
            return []
        cell_hits: dict[int, list[Hits]] = {}
        for n, (hits, length) in enumerate(zip(whole, lengths, strict=True)):
            for run in hits:
                for p in run:
                    index = p - length if align == "right" else p
                    cell_hits.setdefault(index, [()] * self.spans.total)[n] = ((p,),)
        return [PositionCell(str(index), tuple(cell_hits[index])) for index in sorted(cell_hits)]

    def inside(
        self,
        cells: Sequence[PositionCell],
        node: ast.Point | ast.TokenIndex,
        hint: str,
        *,
        special: bool,
        in_answer: bool = False,
    ) -> list[PositionCell]:
        """Return the cells if all hits are inside the prompts, else none after E0310.

        If `drops_out` holds, only the rows outside drop out, unless no row is left.

        Args:
            cells: The cells to check.
            node: The position.
            hint: The hint of E0310.
            special: Special tokens count as inside.
            in_answer: Tokens of the answer after the prompt count as inside.
        """
        beyond = [self._beyond(cell, special=special, in_answer=in_answer) for cell in cells]
        lacking = set[int]().union(*beyond)
        if lacking and self.spans.drops_out(node):
            left = [_without(*each) for each in zip(cells, beyond, strict=True)]
            if any(any(cell.hits) for cell in left):
                return left
        if lacking:
            self.diagnostics.append(
                OutsidePrompt(
                    span=node.span,
                    position=self._written(node),
                    run=self.spans.run,
                    lacking=len(lacking),
                    total=self.spans.total,
                    example=self.spans.example(min(lacking)),
                    hint=hint,
                    unit="image" if self.spans.of_images else "prompt",
                )
            )
        return [] if lacking else list(cells)

    def _written(self, node: ast.Point | ast.TokenIndex) -> str:
        """Return the text of a position, with the number that a `for` variable has."""
        if not self.spans.drops_out(node):
            return node.span.written
        point = node if isinstance(node, ast.Point) else ast.Point(node, span=node.span)
        return format_position(ast.Position(point, span=node.span))

    def _beyond(self, cell: PositionCell, *, special: bool, in_answer: bool) -> set[int]:
        """Return the rows in which a cell leaves the prompt."""
        lacking: set[int] = set()
        for n, row in enumerate(cell.hits):
            run_row = self.maps[n].row
            size = len(run_row.ids)
            allowed = range(size + (self.spans.answers.longest(n) if in_answer else 0))
            for run in row:
                inside = all(
                    p in allowed and (special or p >= size or not run_row.special[p]) for p in run
                )
                if not inside:
                    lacking.add(n)
        return lacking


def _without(cell: PositionCell, rows: Collection[int]) -> PositionCell:
    """Return the cell without hits in these rows."""
    hits = tuple(() if n in rows else own for n, own in enumerate(cell.hits))
    return replace(cell, hits=hits)


def grid_cells(base: ast.SpanTokens, spans: SpanFinder) -> list[PositionCell]:
    """Return the cells of `photo row R col C token`, one per token of an image; `tokens` joins
    them.

    A row of images is an image named `image`. Codes: E0108 in texts, E0308, E0310, E0321.
    """
    ref = base.of
    places = spans.all_places(ref)
    if places is None or any(spans.is_empty(occurrence) for occurrence in (ref.row, ref.col)):
        return []
    placed = spans.images_of(base)
    if placed is None:
        return []
    cells: dict[tuple[int, int | None, int, int], list[Hits]] = {}
    joined: list[Hits] = []
    lacking: list[int] = []
    known: dict[int, Mapping[tuple[int | None, int, int], int]] = {}
    for n, images in enumerate(placed):
        tokens: list[int] = []
        for number, image in images:
            expansion = image.picture.expansion
            if id(expansion) not in known:
                known[id(expansion)] = _rectangle(ref, expansion, spans)
            if not known[id(expansion)]:
                lacking.append(n)
            for place, token in known[id(expansion)].items():
                tokens.append(image.first + token)
                own = cells.setdefault((number, *place), [()] * spans.total)
                own[n] = ((image.first + token,),)
        joined.append((tuple(tokens),) if tokens else ())
    if spans.lack_cells(ref, list(dict.fromkeys(lacking))):
        return []
    if base.plural:
        return [PositionCell(base.span.written, tuple(joined))]
    if len(cells) == 1:
        return [PositionCell(base.span.written, tuple(cell)) for cell in cells.values()]
    view = "" if ref.view is None else "thumbnail " if ref.view.number is None else "tile {0} "
    label = f"{{title}} {view}row {{1}} col {{2}}"
    ordered = sorted(cells, key=lambda place: (place[0], place[1] or 0, *place[2:]))
    titles = {number: image.title for images in placed for number, image in images}
    return [
        PositionCell(label.format(*place[1:], title=titles[place[0]]), tuple(cells[place]))
        for place in ordered
    ]


def _rectangle(
    ref: ast.SpanRef, expansion: ImageExpansion, spans: SpanFinder
) -> dict[tuple[int | None, int, int], int]:
    """Return the tokens of a rectangle, tile by tile, counted from the image's first.

    Returns:
        (number of the tile, row, column) → token; without a view, the number is None. Empty if the
        image lacks one of them.
    """
    numbers: dict[tuple[int | None, int, int], int] = {}
    tiles = spans.tiles_of(ref, expansion)
    for tile in (None,) if tiles is None else tiles:
        grid = expansion.grid if tile is None else expansion.grid_of(tile)
        ranges: list[range] = []
        for axis, occurrence in enumerate((ref.row, ref.col)):
            most = max((place[axis] for place in grid), default=0)
            low, high = occurrence_bounds(occurrence) or (1, most)
            if low < 1 or high > most:
                return {}
            ranges.append(range(low, high + 1))
        wanted = [(row, col) for row in ranges[0] for col in ranges[1]]
        if not all(place in grid for place in wanted):  # tiles of different sizes
            return {}
        numbers |= {(tile, *place): grid[place] for place in wanted}
    return numbers


def image_token_cells(
    ref: ast.SpanRef, occurrences: Sequence[SpanOccurrence], spans: SpanFinder
) -> list[PositionCell]:
    """Return one cell per token of an image or of a region; images without the token drop out."""
    cells: dict[str, list[Hits]] = {}
    order: dict[str, tuple[int, ...]] = {}
    # Images of one size share the same expansion.
    known: dict[tuple[int, str, int], list[Hits]] = {}

    def hits_of(label: str, at: tuple[int, ...]) -> list[Hits]:
        """Return the [row] hits of the cell with a label."""
        order[label] = at
        return cells.setdefault(label, [()] * spans.total)

    for n, place in enumerate(occurrences):
        images = [
            (picture, id(picture.picture.expansion), picture.title)
            for picture in spans.pictures_of(n, ref)
        ]
        for token in place.tokens:
            for image, expansion, title in images:
                key = expansion, title, token - image.first
                hits = known.get(key)
                if hits is None and (cell := image.cell(token)) is not None:
                    at = image.number or 0, cell.tile, cell.row, cell.col
                    hits = known[key] = hits_of(image.label(token), at)
                if hits is not None:
                    break
            else:
                hits = hits_of(spans.extra_label(token), (0, token))
            hits[n] = ((token,),)
    return [
        PositionCell(label, tuple(cells[label])) for label in sorted(cells, key=order.__getitem__)
    ]
