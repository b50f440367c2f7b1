"""Cells of position expressions: their token positions in every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from typing import Any, TypeAlias

from mechdsl.base.records import Record
from mechdsl.base.text import Span, count_noun, name_list, plural_noun
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.rules import (
    EmptyRange,
    NoPositionLeft,
    NotInAnswer,
    NotInDecoder,
    NotInReply,
    NotOnePosition,
    OutsidePrompt,
    ReversedBetween,
    UnequalUnion,
)
from mechdsl.diagnostics.syntax import NotSupported, UnknownWord
from mechdsl.images.processing import UnsupportedProcessor
from mechdsl.program.spec import CLEAN
from mechdsl.prompts.positions.spans import (
    NO_ANSWERS,
    AnswerTokens,
    CountedTokens,
    NamedNumbers,
    SpanFinder,
    fold_offset,
    grid_cells,
    has_named_numbers,
    image_token_cells,
    occurrence_bounds,
    position_label,
    row_example,
)
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import ANSWER_SPAN, Hits, PositionCell, PromptRun, ReplyPosition, RunRow
from mechdsl.prompts.tokens.image_prompts import IMAGE_TOKEN, ImagePromptTokenizer
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer, TextTokenizer
from mechdsl.prompts.values import render_value
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk
from mechdsl.vocab.sites import TokenSide

RankedTokenLookup = Callable[
    [ast.RankedTokens, str, Mapping[str, Any], list[Diagnostic]], list[tuple[str, list[Hits]]]
]
"""(expression, run, values of loops, diagnostics) → (label, hits of every row) per cell."""


@cache
def single_token_hit(position: int) -> Hits:
    """Return the hits of a row with one token; equal hits share one object to save memory."""
    return ((position,),)


_FEW = 3
"""Up to this number of tokens, the labels first, middle and last distinguish all of them."""


def span_cells(
    name: str, tokens: Sequence[tuple[int, ...]], lengths: set[int]
) -> list[PositionCell]:
    """Return one cell per token, or first, middle and last; a single token is the last."""
    if len(lengths) == 1 and max(lengths) > _FEW:
        return [
            PositionCell(
                f"{name} {k + 1}", tuple(single_token_hit(row[k]) if row else () for row in tokens)
            )
            for k in range(max(lengths))
        ]
    parts: dict[str, tuple[Hits, ...]] = {
        "first": tuple(single_token_hit(row[0]) if len(row) > 1 else () for row in tokens),
        "middle": tuple(tuple((p,) for p in row[1:-1]) for row in tokens),
        "last": tuple(single_token_hit(row[-1]) if row else () for row in tokens),
    }
    return [PositionCell(f"{name} {part}", hits) for part, hits in parts.items() if any(hits)]


def check_token_counts(
    base_cells: Sequence[PositionCell],
    source_cells: Sequence[PositionCell],
    *,
    span: Span | None = None,
    table: PromptTable | None = None,
    runs: tuple[str, str] | None = None,
) -> list[Diagnostic]:
    """Return E0307 if a row has different numbers of tokens in the two runs.

    Cells correspond by order; rows that lack the position in either run have dropped out.
    """
    unequal: dict[int, tuple[int, int]] = {}
    total = 0
    for base, source in zip(base_cells, source_cells, strict=True):
        total = max(total, len(base.hits))
        for n, (written, read) in enumerate(zip(base.hits, source.hits, strict=True)):
            if written == read or not (written and read):
                continue
            if [*map(len, written)] != [*map(len, read)]:
                unequal.setdefault(n, (sum(map(len, written)), sum(map(len, read))))
    if not unequal:
        return []
    written, read = next(iter(unequal.values()))
    are_patches, row = base_cells[0].vectors > 1, next(iter(unequal))
    unit = "patch" if are_patches else "token"
    problem = UnequalUnion(
        span=span,
        source=count_noun(read, unit),
        base=count_noun(written, unit),
        rows=len(unequal),
        total=total,
        units=plural_noun(unit),
    )
    base_run = None if table is None or runs is None else table.runs[runs[0]]
    if are_patches or (base_run is not None and _are_of_images(base_cells, row, base_run)):
        hint = f"use images of one width and height, or name {problem.units} that all images have, "
        problem = replace(problem, hint=hint + "such as `photo row 1 col 1 token`")
    return [problem]


def _are_of_images(cells: Sequence[PositionCell], row: int, run: PromptRun) -> bool:
    """Return whether all tokens that cells hit in a row are those of images in the prompt."""
    hit = {token for cell in cells for run in cell.hits[row] for token in run}
    return hit <= run.rows[row].patch_tokens.keys()


def is_after_prompts(cell: PositionCell, rows: Sequence[RunRow]) -> bool:
    """Return whether a cell hits tokens after these prompts: tokens of the answer."""
    for number, row in enumerate(rows):
        end = len(row.ids)
        for run in cell.tokens(number):
            for token in run:
                if token >= end:
                    return True
    return False


def hit_texts(
    table: PromptTable, run: str, cell: PositionCell, tokenizer: TextTokenizer | None = None
) -> tuple[str, ...]:
    """Return the distinct token texts that a cell hits in the prompts, most frequent first.

    tokenizer: names tokens that cover no text; without it, they are omitted.
    """
    counts: Counter[str] = Counter()
    if cell.reply is not None or cell.vectors > 1:  # nothing is generated yet, or patches
        return ()
    for m, hits in zip(table.runs[run].token_maps, cell.hits, strict=True):
        row = m.row
        for p in (p for tokens in hits for p in tokens if p < len(row.ids)):
            if row.image is not None:
                if isinstance(tokenizer, ImageTokenizer):
                    counts[tokenizer.label(p)] += 1
                continue
            label = row.image_label(p) if row.ids[p] >= IMAGE_TOKEN else None
            text = label or ("" if row.special[p] else m.token_text(p))
            if not text and tokenizer is not None:
                text = tokenizer.token_text(row.ids[p])
            if text:
                counts[text] += 1
    return tuple(text for text, _ in counts.most_common())


def join_hits(cells: Sequence[PositionCell], n: int) -> Hits:
    """Join all positions of a row in written order, so that they pair in two runs and on both sides
    of `onto`; no run if there are none."""
    joined = dict.fromkeys(p for cell in cells for run in cell.hits[n] for p in run)
    # `top 0%` is a run without tokens, but still a run.
    return (tuple(joined),) if any(cell.hits[n] for cell in cells) else ()


def _following(joined: PositionCell, cells: Sequence[PositionCell]) -> PositionCell:
    """Return joined cells that follow the tokens of a reply as one of them does."""
    either = {cell.follows for cell in cells} - {""}
    return replace(joined, follows=min(either)) if either else joined


def lacks_hits(cells: Sequence[PositionCell], n: int) -> bool:
    """Return whether a row has none of the cells: the experiment that ranks its tokens lacks it, or
    a `for` variable exceeds its length."""
    return not any(cell.hits[n] for cell in cells)


def has_ranked_tokens(node: ast.Node) -> bool:
    """Return whether a node refers to tokens that another experiment ranked."""
    return any(isinstance(part, ast.RankedTokens) for part in walk(node))


REPLY = "reply"
"""The span that refers to the reply's tokens, unless a prompt has a span of that name."""

Decoder: TypeAlias = Callable[[Sequence[int]], str]


class ReplyTokens(Record):
    """The maximum length of replies, or the reason that positions can't refer to them."""

    most: int = 0
    reason: str = "only measures, observations and `save` read tokens of a reply"
    hint: str = "name a position of the prompt"


NO_REPLIES = ReplyTokens()

_ALL_EMPTY = "all replies are empty", "name a position of the prompt"


def refers_to_reply(node: ast.Node, table: PromptTable) -> bool:
    """Return whether a position refers to tokens of a reply."""
    if any(isinstance(part, ast.EachStep) for part in walk(node)):
        return True
    named = (part for part in walk(node) if isinstance(part, ast.SpanRef))
    return any(REPLY in (part.name, part.of) for part in named) and not any(
        span.name == REPLY for run in table.runs.values() for row in run.rows for span in row.spans
    )


def reply_cells(
    position: ast.Position,
    table: PromptTable,
    run: str,
    replies: ReplyTokens,
    tokenizer: TextTokenizer,
    diagnostics: list[Diagnostic],
) -> list[PositionCell]:
    """Return the cells of a position in the reply; none after E0545.

    Before the reply is generated, the cells hit the final prompt token.
    """
    rows = table.runs[run].rows
    there = table.replies_of != ""
    if there:
        replies = ReplyTokens(max((_length(row) for row in rows), default=0), *_ALL_EMPTY)
    places = _Places(position, replies, table)
    cell_numbers, problem = places.found()
    cells: list[PositionCell] = []
    for label, place in cell_numbers:
        if there:
            hits = tuple(_reply_hits(row, place.of_row(n), tokenizer) for n, row in enumerate(rows))
            cells += [PositionCell(label, hits)] if any(hits) else []
        else:
            last = tuple(single_token_hit(len(row.ids) - 1) for row in rows)
            cells.append(PositionCell(label, last, reply=place))
    if cell_numbers and not cells:
        problem = places.bad("no reply contains it", "name another one; `report texts` shows them")
    diagnostics += [] if problem is None else [problem]
    return cells


def _length(row: RunRow) -> int:
    """Return the number of tokens of the reply after a row's prompt."""
    return 0 if row.reply is None else len(row.reply.of(row.ids))


def _reply_hits(row: RunRow, place: ReplyPosition, tokenizer: TextTokenizer) -> Hits:
    """Return the hits of a position in the reply after a row's prompt.

    While the reply is a placeholder, a text in it is represented by its last token.
    """
    reply = row.reply
    if reply is None:
        return ()
    ids = reply.of(row.ids)
    if reply.stands_in and place.kind == "text":
        place = ReplyPosition("last")
    reply_tokens = find_reply_tokens(place, ids, reply.text, tokenizer.decode)
    return (tuple(reply.first - 1 + token for token in reply_tokens),) if reply_tokens else ()


class _Places:
    """The cells of one position in the reply."""

    def __init__(self, position: ast.Position, replies: ReplyTokens, table: PromptTable) -> None:
        self.position, self.most = position, replies.most
        self.replies, self.table = replies, table

    def found(self) -> tuple[list[tuple[str, ReplyPosition]], Diagnostic | None]:
        """Return (label, position) of each cell, or E0545."""
        if not self.most:
            return [], self.bad(self.replies.reason, self.replies.hint)
        body, said = self.position.body, self.position
        if not isinstance(body, ast.Point) or said.align or said.and_answer:
            return [], self.bad(
                "each of its tokens must be named individually",
                "write `last token of reply`, `reply token 3` or `each reply token`",
            )
        assert not isinstance(body.offset, ast.Variable)
        cells = list(self._cells(body.base))
        name, names = _value_in(body.base), self._names()
        if not cells and name is not None and name not in names:
            known = f"their texts and values are {name_list(names)}"
            reason = f"the prompts have no text or value `{name}`"
            return [], self.bad(reason, did_you_mean(name, names, known))
        if not cells:
            return [], self.bad(
                "a prompt has one reply, which is unknown before generation",
                "write `last token of reply`, `reply token 3`, `each reply token`, "
                '`"Answer:" of reply token` or, for the answer of a row, `answer of reply token`',
            )
        cells = [(label, replace(place, offset=body.offset)) for label, place in cells]
        if len(cells) == 1:
            cells = [(said.span.written, cells[0][1])]
        elif body.offset:
            sign = "+" if body.offset > 0 else "-"
            cells = [(f"{label} {sign} {abs(body.offset)}", place) for label, place in cells]
        if not any(self._may_be(place) for _, place in cells):
            tokens = f"a reply has at most {self.most} tokens, counted from 1"
            return [], self.bad(tokens, "raise the limit of `generate`, or name an earlier token")
        return cells, None

    def _cells(self, base: ast.PointBase) -> Iterator[tuple[str, ReplyPosition]]:
        match base:
            case ast.EachStep():
                for step in range(self.most):
                    yield f"step {step}", ReplyPosition("step", step)
            case ast.EachTokenOf(of=of) if _whole(of):
                yield from self._each()
            case ast.EdgeToken(which=which, of=ast.SpanRef() as of) if _whole(of):
                yield "", ReplyPosition("token", 1) if which == "first" else ReplyPosition("last")
            case ast.EdgeToken(which=which, of=ast.SpanRef() as of) if self._text_in(of):
                yield "", replace(self._text(of), which=which)
            case ast.SpanTokens(of=of, each=False, low=None) if self._text_in(of):
                yield "", replace(self._text(of), which="all" if base.plural else "last")
            case ast.SpanTokens(of=of) if _whole(of):
                yield from self._tokens(base)
            case _:
                return

    def _names(self) -> list[str]:
        """Return the names of the rows' texts and values."""
        rows = self.table.runs[CLEAN].rows
        if not rows:
            return []
        written = [name for name, value in rows[0].values.items() if render_value(value)]
        return list(dict.fromkeys((*rows[0].texts, *written)))

    def _text_in(self, of: ast.SpanRef) -> bool:
        """Return whether a span is a text in the reply: a literal, or a value of each row."""
        return of.of == REPLY and (of.literal is not None or of.name in self._names())

    def _text(self, of: ast.SpanRef) -> ReplyPosition:
        """Return the position of a literal, or of each row's own text without outer white space."""
        if of.literal is not None:
            return ReplyPosition("text", text=of.literal)
        name, rows = of.name or "", self.table.runs[CLEAN].rows
        texts = (row.texts.get(name) or render_value(row.values[name]) for row in rows)
        found = tuple("" if text is None else text.text.strip() for text in texts)
        return ReplyPosition("text", texts=found)

    def _tokens(self, base: ast.SpanTokens) -> Iterator[tuple[str, ReplyPosition]]:
        if base.each and base.low is None and not base.plural:
            yield from self._each()
        elif base.each:
            return
        elif base.low is None:
            yield "", ReplyPosition("all" if base.plural else "last")
        elif base.high is None:
            yield "", ReplyPosition("token", base.low)
        elif base.plural:
            yield "", ReplyPosition("tokens", base.low, last=base.high)
        else:
            for number in range(base.low, base.high + 1):
                yield f"reply {number}", ReplyPosition("token", number)

    def _each(self) -> Iterator[tuple[str, ReplyPosition]]:
        for number in range(1, self.most + 1):
            yield f"reply {number}", ReplyPosition("token", number)

    def _may_be(self, place: ReplyPosition) -> bool:
        """Return whether a reply can be long enough for a position."""
        if place.kind in ("token", "tokens"):
            ends = (place.number, place.last or place.number)
            low, high = (end + place.offset for end in ends)
            return 1 <= low <= high <= self.most
        return place.kind == "step" or abs(place.offset) < self.most

    def bad(self, reason: str, hint: str) -> Diagnostic:
        """Return E0545."""
        said = self.position.span
        return NotInReply(span=said, position=said.written, reason=reason, hint=hint)


def _whole(of: ast.SpanRef) -> bool:
    """Return whether a span is the whole reply."""
    return of.name == REPLY and of.of is None and of.occurrence is None and of.edge is None


def _value_in(base: ast.PointBase) -> str | None:
    """Return the name of a value of each row whose text is looked up in the reply."""
    match base:
        case ast.EdgeToken(of=ast.SpanRef(name=name, of=of)) if of == REPLY:
            return name
        case ast.SpanTokens(of=ast.SpanRef(name=name, of=of)) if of == REPLY:
            return name
        case _:
            return None


def find_reply_tokens(
    place: ReplyPosition, reply: Sequence[int], text: str, decode: Decoder
) -> tuple[int, ...]:
    """Return the reply's tokens at a position, counted from 1; 0 is the final prompt token.

    text: the reply's text, without the stop string.

    Returns:
        The tokens; none if the reply lacks any of them.
    """
    first = 0 if place.kind == "step" else 1
    tokens = tuple(token + place.offset for token in _tokens(place, reply, text, decode))
    return tokens if all(first <= token <= len(reply) for token in tokens) else ()


def _tokens(
    place: ReplyPosition, reply: Sequence[int], text: str, decode: Decoder
) -> Sequence[int]:
    match place.kind:
        case "step" | "token":
            return (place.number,)
        case "tokens":
            return range(place.number, (place.last or place.number) + 1)
        case "last":
            return (len(reply),)
        case "all":
            return range(1, len(reply) + 1)
        case "text":
            tokens = _of_text(place.text, reply, text, decode)
            if place.which == "all" or not tokens:
                return tokens
            return tokens[:1] if place.which == "first" else tokens[-1:]


def _of_text(part: str, reply: Sequence[int], text: str, decode: Decoder) -> Sequence[int]:
    """Return the tokens of the last occurrence of a part of a text, counted from 1."""
    begin = text.rfind(part)
    if begin < 0 or not part:
        return ()
    lengths = (len(decode(reply[:count])) for count in range(1, len(reply) + 1))
    ends = list(accumulate(lengths, max))
    starts = [0, *ends[:-1]]
    pairs = enumerate(zip(starts, ends, strict=True), start=1)
    return [n for n, (low, high) in pairs if low < begin + len(part) and begin < high]


def is_found_by_text(*positions: ast.Node) -> bool:
    """Return whether positions depend on the text alone, not on counts of tokens."""
    return not any(map(_counted, walk(positions)))


def _counted(node: ast.Node) -> bool:
    match node:
        case ast.Point():
            return bool(node.offset)
        case ast.TokenIndex():
            return node.high is not None or node.low not in (None, 0, -1)
        case _:
            return isinstance(node, ast.RankedTokens)


def is_after(
    low: int, high: int, row: int, table: PromptTable, run: str, tokenizer: TextTokenizer
) -> bool:
    """Return whether token `low` of a row comes after its token `high`.

    Words as stand-ins for tokens need white space between them: a tokenizer may join adjacent ones.
    """
    if low <= high or not tokenizer.stands_in:
        return low > high
    ids = table.runs[run].rows[row].ids[high + 1 : low + 1]
    return any(tokenizer.token_text(token)[:1].isspace() for token in ids)


CACHED_HITS = 2**16
"""Maximum number of cells times rows of positions that a table caches, at about 100 bytes each."""


def resolve_positions(
    positions: ast.Positions,
    table: PromptTable,
    run: str,
    *,
    tokenizer: TextTokenizer,
    loop_values: Mapping[str, Any] | None = None,
    loops: Collection[str] = (),
    with_runs: Sequence[str] = (),
    ranked: RankedTokenLookup | None = None,
    answers: AnswerTokens = NO_ANSWERS,
    replies: ReplyTokens = NO_REPLIES,
    side: TokenSide = "",
) -> tuple[tuple[PositionCell, ...], list[Diagnostic]]:
    """Return the cells of a position expression in one run: one per value of its axis.

    Args:
        positions: The expression.
        table: The table of the run.
        run: The name of the run.
        tokenizer: The tokenizer of the model.
        loop_values: Values of the surrounding `for` variables and of parameters.
        loops: Names of the `for` variables; rows without a position they count drop out.
        with_runs: Other runs, whose prompts must be of equal length if positions count from an end.
        ranked: Looks up the tokens that another experiment ranked; without it they are E0108.
        answers: The answers after the prompts, whose tokens are positions too.
        replies: The replies after the prompts, whose tokens are positions too.
        side: The tokens of an encoder-decoder, or of images, that are named; all of them if it is
            empty.

    Returns:
        The cells and the diagnostics E0305, E0306, E0308 to E0315, E0321, E0322, E0540 to E0542,
        E0316, E0545, W0701.
    """
    given: dict[str, Any] = {
        "tokenizer": tokenizer,
        "loop_values": loop_values,
        "loops": loops,
        "with_runs": with_runs,
        "ranked": ranked,
    }
    if side == "image":
        return _in_images(positions, table, run, answers=answers, replies=replies, **given)
    if side and any(row.source for row in table.runs[run].rows[:1]):
        return _OneSide(positions, table, run, side).resolve(answers, replies, **given)
    return _resolve(positions, table, run, answers, replies, **given)


def _resolve(
    positions: ast.Positions,
    table: PromptTable,
    run: str,
    answers: AnswerTokens,
    replies: ReplyTokens,
    *,
    tokenizer: TextTokenizer,
    loop_values: Mapping[str, Any] | None,
    loops: Collection[str],
    with_runs: Sequence[str],
    ranked: RankedTokenLookup | None,
) -> tuple[tuple[PositionCell, ...], list[Diagnostic]]:
    """Resolve positions in all tokens of the rows, as `resolve_positions` does."""
    key = _cache_key(positions, run, tokenizer, with_runs)
    if key in table.cells:
        return table.cells[key], []
    values = loop_values or {}
    numbers = NamedNumbers(values, loops)
    written = numbers.written_out(positions)
    if written is None:
        return (), numbers.diagnostics
    resolver = _Resolver(
        table, run, tokenizer, values, tuple(with_runs), ranked, answers, numbers.swept
    )
    pairs = zip(positions.items, written.items, strict=True)
    cells = tuple(cell for pair in pairs for cell in resolver.item(*pair, replies))
    hits = len(cells) * resolver.total
    if key is not None and not resolver.diagnostics and hits <= CACHED_HITS:
        table.cells[key] = cells
    return cells, list(dict.fromkeys(resolver.diagnostics))


def _cache_key(
    positions: ast.Positions, run: str, tokenizer: TextTokenizer, with_runs: Sequence[str]
) -> object:
    """Return what the cells of positions depend on, except for the table; None if they depend on
    loops, answers, replies or results."""
    parts = list(walk(positions))
    for part in parts:
        if isinstance(part, ast.Variable | ast.RankedTokens | ast.EachStep):
            return None
        if isinstance(part, ast.SpanRef) and {REPLY, ANSWER_SPAN} & {part.name, part.of}:
            return None
        if isinstance(part, ast.Position) and part.and_answer:
            return None
    texts = tuple([part.span.text for part in parts])  # labels are texts of the file
    return positions, texts, run, tokenizer, tuple(with_runs)


def _in_images(
    positions: ast.Positions, table: PromptTable, run: str, **given: Any
) -> tuple[tuple[PositionCell, ...], list[Diagnostic]]:
    """Resolve positions as `resolve_positions` does; also E0310 for tokens without patches.

    If patches are resampled to tokens, positions are patches, and others are E0108.
    """
    reader, vectors = given["tokenizer"], 1
    stands_in = reader.stands_in or table.stands_in
    if not stands_in and isinstance(reader, ImagePromptTokenizer) and reader.layout.resamples:
        problem = _find_uncountable(positions)
        if problem is not None:
            return (), [problem]
        with suppress(UnsupportedProcessor):  # a run reports unknown patches (E0413)
            table = table.in_patches(reader)
        every = (picture for row in table.runs[run].rows for picture in row.pictures.values())
        vectors = max((picture.expansion.vectors for picture in every), default=1)
    cells, problems = resolve_positions(positions, table, run, **given)
    cells = tuple(replace(cell, vectors=vectors) for cell in cells) if vectors > 1 else cells
    rows = table.runs[run].rows
    if stands_in:
        return cells, problems
    tokens = [
        {token for cell in cells for numbers in cell.hits[n] for token in numbers}
        for n in range(len(rows))
    ]
    outside = [
        n
        for n, (row, numbers) in enumerate(zip(rows, tokens, strict=True))
        if not numbers <= row.patch_tokens.keys()
    ]
    if not outside:
        return cells, problems
    problem = OutsidePrompt(
        span=positions.span,
        position=positions.span.written,
        run=run,
        lacking=len(outside),
        total=len(rows),
        example=row_example(rows[outside[0]]),
        hint="the vision encoder has vectors at the tokens of an image that are made from its "
        "patches: write `photo tokens` or `photo row 1 col 2 token` for an image `photo`",
        unit="images",
    )
    return (), [*problems, problem]


def _find_uncountable(positions: ast.Positions) -> Diagnostic | None:
    """Return E0108 for positions that count or rank tokens of the prompt, if positions are
    patches."""
    for node in walk(positions):
        match node:
            case ast.TokenIndex():
                what = f"`{node.span.written}`, which counts tokens,"
            case ast.RankedTokens() | ast.ChosenTokens():
                what = f"`{node.span.written}`, which selects tokens,"
            case ast.Point() if node.offset:
                what = f"`{node.span.written}`, which counts tokens,"
            case _:
                continue
        what += " in a vision encoder whose patches are resampled to the tokens of an image"
        later = "name patches: `photo row 1 col 2 token`, `photo tokens`"
        return NotSupported(span=node.span, what=what, later=later)
    return None


_NO_DECODER_ANSWERS = AnswerTokens(reason="the decoder reads the answer, not the encoder")

_NO_DECODER_REPLIES = ReplyTokens(
    reason="the decoder writes the reply", hint="name a token of the text that the encoder reads"
)


class _OneSide(Record):
    """Positions of an encoder-decoder in the tokens of its encoder, or of its decoder."""

    positions: ast.Positions
    whole: PromptTable
    run: str
    side: TokenSide

    @property
    def table(self) -> PromptTable:
        """The rows with these tokens only."""
        return self.whole.decoded if self.side == "target" else self.whole.encoded

    def resolve(
        self, answers: AnswerTokens, replies: ReplyTokens, **given: Any
    ) -> tuple[tuple[PositionCell, ...], list[Diagnostic]]:
        """Return the cells in these tokens, and diagnostics; arguments as in
        `resolve_positions`."""
        if (problem := self.problem()) is not None:
            return (), [self.explained(problem, **given)]
        if self.side == "source":
            answers, replies = _NO_DECODER_ANSWERS, _NO_DECODER_REPLIES
        given = {**given, "answers": answers, "replies": replies}
        cells, problems = resolve_positions(self.positions, self.table, self.run, **given)
        return tuple(map(self.moved, cells)), [*map(self._explain_decoder, problems)]

    def problem(self) -> Diagnostic | None:
        """Return E0316 for text of the encoder among positions of the decoder."""
        rows = self.whole.runs[self.run].rows
        if any(row.decodes_text for row in rows[:1]):
            return self._image_problem(rows)
        if self.side == "source":
            return None
        for node in walk(self.positions):
            match node:
                case ast.SpanRef() if not {REPLY, ANSWER_SPAN} & {node.name, node.of}:
                    return NotInDecoder(span=self.positions.span, position=node.span.written)
                case ast.RankedTokens() | ast.ChosenTokens():
                    return NotInDecoder(span=self.positions.span, position=node.span.written)
                case _:
                    pass
        return None

    def explained(self, problem: Diagnostic, **given: Any) -> Diagnostic:
        """Name `answer tokens` in E0316 for a text that the encoder doesn't read either; return
        another error for a part of an image that doesn't exist."""
        if not isinstance(problem, NotInDecoder):
            return problem
        problems = resolve_positions(self.positions, self.whole.encoded, self.run, **given)[1]
        wrong = [diagnostic for diagnostic in problems if diagnostic.severity == "error"]
        if not wrong:
            return problem
        if wrong[0].code == "E0306":  # the encoder reads the text several times
            return problem
        if problem.part != "the decoder":
            return wrong[0]
        hint = "name `answer tokens`, the text that the measure appends, or `last token`"
        return replace(problem, reader="the prompt doesn't contain", hint=hint)

    def _explain_decoder(self, problem: Diagnostic) -> Diagnostic:
        """Describe the tokens that the decoder reads in E0310 for a number beyond them."""
        row = self.whole.runs[self.run].rows[0]
        if not isinstance(problem, OutsidePrompt) or self.side == "source" or row.decodes_text:
            return problem
        first = count_noun(len(row.ids) - row.source, "token")
        hint = f"the decoder begins with {first}, up to `last token`; sites at tokens of the "
        hint += "prompt are those of the encoder, such as `resid_post encoder layer 2`"
        example = row_example(row)
        return replace(problem, unit="decoder's input", example=example, hint=hint)

    def _image_problem(self, rows: Sequence[RunRow]) -> Diagnostic | None:
        """Return E0316 for a part of the image among positions of the text, and E0310 for a text
        among those of the image."""
        images = {
            name
            for row in rows[:1]
            for placed in row.placed_pictures
            for name in (placed.name, *placed.picture.regions)
        }
        image = next(iter(sorted(images)), "photo")
        for item in self.positions.items:
            spans = [node for node in walk(item) if isinstance(node, ast.SpanRef)]
            refs = [node for node in spans if images & {node.name, node.of}]
            if refs and self.side == "target":
                return NotInDecoder(
                    span=self.positions.span,
                    position=refs[0].span.written,
                    part="the text",
                    reason="this position must be a token of the text",
                    reader="the vision encoder reads",
                    hint="name a token of the text, such as `last token`; `k cross`, `v cross` and "
                    "sites of `vision` are at tokens of the image",
                )
            if not refs and self.side == "source":
                return OutsidePrompt(
                    span=item.span,
                    position=item.span.written,
                    run=self.run,
                    lacking=len(rows),
                    total=len(rows),
                    example=row_example(rows[0]),
                    hint=f"this site has vectors at the tokens of the image: write `{image} "
                    f"tokens` or `{image} row 1 col 2 token`",
                    unit="image",
                )
        return None

    def moved(self, cell: PositionCell) -> PositionCell:
        """Return a cell with its tokens counted from the encoder's first one."""
        if self.side == "source":
            return replace(cell, follows="")  # the decoder writes the reply
        starts = (row.source for row in self.whole.runs[self.run].rows)
        hits = tuple(
            tuple(tuple(start + token for token in tokens) for tokens in row)
            for start, row in zip(starts, cell.hits, strict=True)
        )
        return replace(cell, hits=hits)


@dataclass
class _Resolver:
    table: PromptTable
    run: str
    tokenizer: TextTokenizer
    loops: Mapping[str, Any]
    with_runs: tuple[str, ...]
    ranked: RankedTokenLookup | None = None
    answers: AnswerTokens = NO_ANSWERS
    swept: Collection[Span] = ()
    """Source spans of positions, or parts of them, whose number is a `for` variable's."""
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])

    def __post_init__(self) -> None:
        self.spans = SpanFinder(
            self.table, self.run, self.tokenizer, self.diagnostics, self.answers, self.swept
        )
        self.maps = self.spans.maps
        self.total = self.spans.total
        self.counted = CountedTokens(self.spans, self.with_runs)

    def item(
        self, item: ast.Position, counted: ast.Position, replies: ReplyTokens
    ) -> list[PositionCell]:
        """Return the cells of one of several positions.

        Args:
            item: The position as written.
            counted: The position with the values of the variables that it names.
            replies: The replies after the prompts.
        """
        if refers_to_reply(counted, self.table):
            given = counted, self.table, self.run, replies, self.tokenizer
            return reply_cells(*given, self.diagnostics)
        items = self.position(counted)
        if has_named_numbers(item):
            items = self.somewhere(item, items)
            items = [replace(items[0], label=position_label(counted))] if len(items) == 1 else items
        return items

    # --- shapes ---------------------------------------------------------------------------------

    def position(self, position: ast.Position) -> list[PositionCell]:
        if position.align not in (None, "left", "right"):
            hint, word = "write `align left` or `align right`", position.align
            problem = UnknownWord(span=position.span, kind="alignment", word=word, hint=hint)
            self.diagnostics.append(problem)
            return []
        cells = self.body(position.body, position.align)
        return self._and_answer(position, cells) if position.and_answer else cells

    def body(
        self, body: ast.Point | ast.Between | ast.Except, align: str | None = None
    ) -> list[PositionCell]:
        match body:
            case ast.Point():
                return self._point(body, align)
            case ast.Between():
                return self._between(body)
            case ast.Except():
                return self._except(body, align)

    def _point(self, point: ast.Point, align: str | None) -> list[PositionCell]:
        point = fold_offset(point) if self.spans.drops_out(point) else point
        cells = self._base(point.base, align)
        assert not isinstance(point.offset, ast.Variable)
        if point.offset:
            sign = "+" if point.offset > 0 else "-"
            swept = len(cells) > 1 or any(cell.item is not None for cell in cells)
            offset = f"{sign} {abs(point.offset)}"
            cells = [
                replace(
                    cell,
                    follows="",
                    label=f"{cell.label} {offset}" if swept else point.span.written,
                    hits=tuple(
                        tuple(tuple(p + point.offset for p in run) for run in row)
                        for row in cell.hits
                    ),
                )
                for cell in cells
            ]
            # Special tokens are hit only if they are named or counted.
            counted = isinstance(point.base, ast.TokenIndex)
            hint = "the offset points outside the text; choose a smaller one"
            in_answer = self._answer_in(point.base)
            return self.counted.inside(cells, point, hint, special=counted, in_answer=in_answer)
        return cells

    def _base(self, base: ast.PointBase, align: str | None) -> list[PositionCell]:
        match base:
            case ast.TokenIndex():
                return self.counted.index(base, align)
            case ast.SpanTokens():
                return self._span_tokens(base)
            case ast.EachTokenOf(of=of):
                return self._each_token_of(base, of)
            case ast.EdgeToken():
                return self._edge(base)
            case ast.PositionUnion(items=items):
                return self._joined(base, items)
            case ast.RankedTokens():
                if self.ranked is None:
                    return self._later(base, "a position that another experiment ranked")
                cells = self.ranked(base, self.run, self.loops, self.diagnostics)
                return [PositionCell(label, tuple(hits)) for label, hits in cells]
            case ast.ChosenTokens():
                return self._chosen(base)
            case ast.EachStep():  # a position in a reply: `reply_cells` resolves it
                return []

    def _later(self, node: ast.Node, what: str) -> list[PositionCell]:
        self.diagnostics.append(NotSupported(span=node.span, what=what))
        return []

    def somewhere(self, item: ast.Position, cells: list[PositionCell]) -> list[PositionCell]:
        """Return the cells, or none and E0310 if a `for` variable exceeds every row's length."""
        if has_errors(self.diagnostics) or any(any(cell.hits) for cell in cells):
            return cells
        self.diagnostics.append(
            OutsidePrompt(
                span=item.span,
                position=item.span.written,
                run=self.run,
                lacking=self.total,
                total=self.total,
                example=self.spans.example(0),
                hint="let the `for` run over numbers that some row has",
            )
        )
        return []

    # --- named spans ----------------------------------------------------------------------------

    def _span_tokens(self, base: ast.SpanTokens) -> list[PositionCell]:
        ref = base.of
        if base.low is not None:
            return self._later(base, "a token of a span by its number")
        if not self.spans.span_fits(base, ref, from_end=not base.plural):
            return []
        if ref.row is not None:
            return grid_cells(base, self.spans)
        occurrence = ref.occurrence
        ranged = occurrence is not None and (occurrence.low is None or occurrence.high is not None)
        counted = occurrence_bounds(occurrence)
        if occurrence is not None and counted is not None and counted[0] > counted[1]:
            high, low = map(str, counted)
            self.diagnostics.append(
                EmptyRange(span=occurrence.span, text=occurrence.span.written, low=low, high=high)
            )
            return []
        if base.each or (ranged and not base.plural):
            return self._occurrences(base)
        if base.plural and ref.edge is None and ref.literal is None:
            return self._all_tokens(base)
        occurrences = self.spans.one_place(base, ref)
        if occurrences is None:
            return []
        hits = [p.tokens if base.plural else p.tokens[-1:] for p in occurrences]
        self.spans.warn(ref, zip(range(self.total), occurrences, hits, strict=True))
        return [PositionCell(base.span.written, tuple((h,) if h else () for h in hits))]

    def _occurrences(self, base: ast.SpanTokens) -> list[PositionCell]:
        """Return one cell per occurrence; rows with fewer drop out of `each` and `*`."""
        ref = base.of
        occurrences = self.spans.all_places(replace(ref, occurrence=None))
        if occurrences is None:
            return []
        most = max(map(len, occurrences))
        counted = occurrence_bounds(ref.occurrence)
        if counted is None:
            wanted = range(1, most + 1)
            if not most:
                self.spans.absent(base, ref, list(range(self.total)), 1)
                return []
        else:
            wanted = range(counted[0], counted[1] + 1)
            lacking = [n for n, places in enumerate(occurrences) if len(places) < wanted[-1]]
            if lacking:
                self.spans.absent(base, ref, lacking, wanted[-1])
                return []
        cells: list[PositionCell] = []
        for k in wanted:
            hits: list[Hits] = []
            for places in occurrences:
                tokens = places[k - 1].tokens if len(places) >= k else ()
                hits.append((tokens if base.plural else tokens[-1:],) if tokens else ())
            name = ref.name if ref.name is not None else f'"{ref.literal}"'
            within = f" of {ref.of}" if ref.of is not None else ""
            cells.append(PositionCell(f"{name} {k}{within}", tuple(hits), k))
        self.spans.warn(
            ref,
            (
                (n, place, place.tokens if base.plural else place.tokens[-1:])
                for n, places in enumerate(occurrences)
                for place in places
            ),
        )
        return cells

    def _all_tokens(self, base: ast.SpanTokens) -> list[PositionCell]:
        """Return the joined tokens of all occurrences (`subject tokens`) or of `item 2..4`."""
        ref = base.of
        occurrences = self.spans.all_places(replace(ref, occurrence=None))
        if occurrences is None:
            return []
        low, high = occurrence_bounds(ref.occurrence) or (1, None)
        lacking = [n for n, places in enumerate(occurrences) if len(places) < (high or low)]
        if lacking and not (self.spans.drops_out(ref) and len(lacking) < self.total):
            self.spans.absent(base, ref, lacking, high or low)
            return []
        occurrences = [
            () if n in lacking else places[low - 1 : high] for n, places in enumerate(occurrences)
        ]
        self.spans.warn(
            ref,
            ((n, place, place.tokens) for n, places in enumerate(occurrences) for place in places),
        )
        joined = [
            tuple(sorted({t for place in places for t in place.tokens})) for places in occurrences
        ]
        hits = tuple(() if n in lacking else (tokens,) for n, tokens in enumerate(joined))
        return [PositionCell(base.span.written, hits)]

    def _each_token_of(self, base: ast.EachTokenOf, ref: ast.SpanRef) -> list[PositionCell]:
        if not self.spans.span_fits(base, ref, from_end=True):
            return []
        occurrences = self.spans.one_place(base, ref)
        if occurrences is None:
            return []
        if self.spans.of_images or self.spans.is_picture(ref):
            return image_token_cells(ref, occurrences, self.spans)
        self.spans.warn(ref, ((n, place, place.tokens) for n, place in enumerate(occurrences)))

        def elsewhere(other: _Resolver) -> list[tuple[int, ...]]:
            places = other.spans.one_place(base, ref)
            return [p.tokens for p in places or ()]

        lengths = self._lengths([p.tokens for p in occurrences], elsewhere)
        return span_cells(ref.span.written, [p.tokens for p in occurrences], lengths)

    def _lengths(
        self,
        own: Sequence[tuple[int, ...]],
        elsewhere: Callable[[_Resolver], Sequence[tuple[int, ...]]],
    ) -> set[int]:
        """Return the numbers of tokens in all runs, because their cells need equal labels."""
        lengths = {len(tokens) for tokens in own}
        for run in self.table.runs:
            if run != self.run:
                other = _Resolver(
                    self.table, run, self.tokenizer, self.loops, (), None, self.answers, self.swept
                )
                lengths |= {len(tokens) for tokens in elsewhere(other)}
        return lengths - {0}

    def _edge(self, base: ast.EdgeToken) -> list[PositionCell]:
        at = 0 if base.which == "first" else -1
        if base.of is None:
            # Building the table rejects a prompt without text.
            hits = tuple(single_token_hit(m.text_tokens[at]) for m in self.maps)
            follows = "newest" if base.which == "last" else ""
            return [PositionCell(base.span.written, hits, follows=follows)]
        if not self.spans.span_fits(base, base.of, from_end=base.which == "last"):
            return []
        occurrences = self.spans.one_place(base, base.of)
        if occurrences is None:
            return []
        there = [(p.tokens[at],) if p.tokens else () for p in occurrences]
        self.spans.warn(base.of, zip(range(self.total), occurrences, there, strict=True))
        return [PositionCell(base.span.written, tuple((own,) if own else () for own in there))]

    # --- after the prompt -------------------------------------------------------------------------

    def _and_answer(self, position: ast.Position, cells: list[PositionCell]) -> list[PositionCell]:
        """Add the answer: more tokens in one cell (`tokens *`), more cells (`token *`)."""
        body = position.body
        base = body.base if isinstance(body, ast.Point) and not body.offset else None
        if not isinstance(base, ast.TokenIndex) or base.low is not None:
            self.diagnostics.append(
                NotInAnswer(
                    span=position.span,
                    position=position.span.written,
                    reason="`and answer` can only follow `tokens *` and `token *`",
                    hint=f"join them: `{{{body.span.written}, answer tokens}}`",
                )
            )
            return []
        if not self.spans.answer_fits(position, from_end=not base.plural) or not cells:
            return []
        tokens = [self.spans.answer_tokens(n) for n in range(self.total)]
        if not base.plural:
            return [*cells, *span_cells(ANSWER_SPAN, tokens, {len(numbers) for numbers in tokens})]
        hits = ((own[0] + tokens[n],) for n, own in enumerate(cells[0].hits))
        return [PositionCell(position.span.written, tuple(hits))]

    def _answer_in(self, node: ast.Node) -> bool:
        """Return whether a node refers to tokens after the prompt."""
        return any(
            (isinstance(part, ast.SpanRef) and self.spans.is_answer(part))
            or (isinstance(part, ast.Position) and part.and_answer)
            for part in walk(node)
        )

    # --- joined, between, except ------------------------------------------------------------------

    def _joined(self, base: ast.PositionUnion, items: ast.Positions) -> list[PositionCell]:
        before = len(self.diagnostics)
        pairs = [(item, self.position(item)) for item in items.items]
        if has_errors(self.diagnostics[before:]):
            return []
        cells = [cell for _, position_cells in pairs for cell in position_cells]
        parts = [position_cells for item, position_cells in pairs if self._may_lack(item)]
        hits = tuple(
            () if any(lacks_hits(part, n) for part in parts) else join_hits(cells, n)
            for n in range(self.total)
        )
        return [_following(PositionCell(base.span.written, hits), cells)]

    def _chosen(self, base: ast.ChosenTokens) -> list[PositionCell]:
        """Return the positions that a training chose, or their tokens joined; E0310 if no row has
        one of them."""
        before = len(self.diagnostics)
        cells = [cell for item in base.items.items for cell in self.position(item)]
        if base.items.span.source.path is None:  # positions of a file have no place in the program
            problems = self.diagnostics[before:]
            self.diagnostics[before:] = [replace(problem, span=base.span) for problem in problems]
        if has_errors(self.diagnostics[before:]):
            return []
        if base.labels is not None:
            known = {cell.label: cell for cell in cells}
            absent = next((label for label in base.labels if label not in known), None)
            if absent is not None:
                self.diagnostics.append(
                    OutsidePrompt(
                        span=base.span,
                        position=f"{absent}` of `{base.name}",
                        run=self.run,
                        lacking=self.total,
                        total=self.total,
                        example=self.spans.example(0),
                        hint="measure rows with the same template as the training rows",
                    )
                )
                return []
            cells = [known[label] for label in base.labels]
        if not base.plural:
            return cells
        hits = tuple(join_hits(cells, n) for n in range(self.total))
        return [_following(PositionCell(base.span.written, hits), cells)]

    def _may_lack(self, node: ast.Node) -> bool:
        """Return whether rows without the position drop out: another experiment didn't rank their
        tokens, or a `for` variable exceeds their length."""
        return has_ranked_tokens(node) or any(map(self.spans.drops_out, walk(node)))

    def _single(self, point: ast.Point) -> list[int | None] | None:
        """Return one token position per row, None if a `for` variable exceeds it; else E0314."""
        before = len(self.diagnostics)
        cells = self._point(point, None)
        if has_errors(self.diagnostics[before:]):
            return None
        reason = ""
        absent = (0, None)[self.spans.drops_out(point)]
        if len(cells) != 1:
            reason = "a sweep over several positions"
        elif self.tokenizer.stands_in:
            every = ([p for run in row for p in run] for row in cells[0].hits)
            return [max(row) if row else absent for row in every]
        elif any(len(row) != 1 or len(row[0]) != 1 for row in cells[0].hits if row or absent == 0):
            reason = "several tokens"
        if reason:
            position = point.span.written
            self.diagnostics.append(
                NotOnePosition(span=point.span, position=position, reason=reason)
            )
            return None
        return [row[0][0] if row else None for row in cells[0].hits]

    def _between_tokens(self, body: ast.Between) -> list[tuple[int, ...]] | None:
        low, high = self._single(body.low), self._single(body.high)
        if low is None or high is None:
            return None
        ends = list(zip(low, high, strict=True))
        reversed_rows = {n: (a, b) for n, (a, b) in enumerate(ends)
                         if a is not None and b is not None and a > b}  # fmt: skip
        if reversed_rows:
            prompts = (self.table, self.run, self.tokenizer)
            told = is_found_by_text(body.low, body.high) and not self.table.stands_in
            told = told and all(is_after(a, b, n, *prompts) for n, (a, b) in reversed_rows.items())
            self.diagnostics.append(
                ReversedBetween(
                    by_text=told,
                    span=body.span,
                    run=self.run,
                    lacking=len(reversed_rows),
                    total=self.total,
                    example=self.spans.example(min(reversed_rows)),
                )
            )
            return None
        return [() if a is None or b is None else tuple(range(a, b + 1)) for a, b in ends]

    def _between(self, body: ast.Between) -> list[PositionCell]:
        tokens = self._between_tokens(body)
        if tokens is None:
            return []
        if not body.each:
            return [PositionCell(body.span.written, tuple((row,) if row else () for row in tokens))]
        lengths = self._lengths(tokens, lambda other: other._between_tokens(body) or ())
        return span_cells("between", tokens, lengths)

    def _except(self, body: ast.Except, align: str | None) -> list[PositionCell]:
        if body.excluded is None:
            every: list[Hits] = [(tuple(m.text_tokens),) for m in self.maps]
            if body.each:
                return self.counted.by_index(body, every, align)
            return [PositionCell(body.span.written, tuple(every))]
        if self._answer_in(body.excluded):
            self.diagnostics.append(
                NotInAnswer(
                    span=body.span,
                    position=body.span.written,
                    reason="`except` excludes tokens of the prompt and contains no answer tokens",
                    hint="join them: `{tokens except …, answer tokens}`",
                )
            )
            return []
        before = len(self.diagnostics)
        cells = self.body(body.excluded)
        if has_errors(self.diagnostics[before:]):
            return []
        kept: list[Hits] = []
        ranked = self._may_lack(body.excluded)
        for n, m in enumerate(self.maps):
            if ranked and lacks_hits(cells, n):
                kept.append(())
                continue
            without = {p for run in join_hits(cells, n) for p in run}
            tokens = tuple(p for p in m.text_tokens if p not in without)
            kept.append((tokens,) if tokens or ranked else ())
        lacking = [] if ranked else [n for n, row in enumerate(kept) if not row]
        if lacking:
            named = (
                token_index
                for token_index in walk(body.excluded)
                if isinstance(token_index, ast.TokenIndex)
            )
            self.diagnostics.append(
                NoPositionLeft(
                    by_text=any(token_index.low is None for token_index in named),
                    span=body.span,
                    position=body.span.written,
                    run=self.run,
                    lacking=len(lacking),
                    total=self.total,
                    example=self.spans.example(lacking[0]),
                )
            )
            return []
        if body.each:
            return self.counted.by_index(body, kept, align)
        return [PositionCell(body.span.written, tuple(kept))]
