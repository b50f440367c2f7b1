"""Positions of the language as token positions of every row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import UnknownWord
from mechdsl.diagnostics.e03_coordinates import EmptyRange
from mechdsl.diagnostics.e03_positions import (
    NothingLeft,
    NotOnePosition,
    OutsidePrompt,
    ReversedBetween,
)
from mechdsl.diagnostics.e05_answers import NotInTheAnswer
from mechdsl.prompts.answer_tokens import ANSWER, NO_ANSWERS, AnswerTokens
from mechdsl.prompts.counted_tokens import CountedTokens
from mechdsl.prompts.image_positions import each_token, in_grid
from mechdsl.prompts.named_numbers import (
    NamedNumbers,
    bounds,
    counted_once,
    has_numbers,
    numbered,
)
from mechdsl.prompts.order_in_text import behind, by_text
from mechdsl.prompts.position_hits import Ranked, is_ranked, lacks, one_token, ragged, union
from mechdsl.prompts.prompt_table import Hits, PositionCell, PromptTable
from mechdsl.prompts.reply_positions import NO_REPLIES, ReplyTokens, names_reply, reply_cells
from mechdsl.prompts.span_occurrences import Occurrences
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


def resolve_positions(
    positions: ast.Positions,
    table: PromptTable,
    run: str,
    *,
    tokenizer: TextTokenizer,
    loop_values: Mapping[str, Any] | None = None,
    loops: Collection[str] = (),
    with_runs: Sequence[str] = (),
    ranked: Ranked | None = None,
    answers: AnswerTokens = NO_ANSWERS,
    replies: ReplyTokens = NO_REPLIES,
) -> tuple[tuple[PositionCell, ...], list[Diagnostic]]:
    """The cells of a position expression in one run: one per value of its axis.

    loop_values: numbers of the `for` variables around it, and of parameters.
    loops: names of the first; where they count, rows that lack the position drop out.
    with_runs: other runs whose prompts must be as long where positions are counted from an end.
    ranked: picks the tokens that another experiment ranked; E0108 for them without it.
    answers, replies: the texts behind the prompts, whose tokens are positions too.
    Codes: E0305, E0306, E0308 to E0315, E0321, E0322, E0540 to E0542, E0545, W0701.
    """
    values = loop_values or {}
    numbers = NamedNumbers(values, loops)
    written = numbers.written_out(positions)
    if written is None:
        return (), numbers.diagnostics
    resolver = _Resolver(
        table, run, tokenizer, values, tuple(with_runs), ranked, answers, numbers.swept
    )
    cells: list[PositionCell] = []
    for item, counted in zip(positions.items, written.items, strict=True):
        if names_reply(counted, table):
            cells += reply_cells(counted, table, run, replies, tokenizer, resolver.diagnostics)
            continue
        own = resolver.position(counted)
        if has_numbers(item):
            own = resolver.somewhere(item, own)
            own = [replace(own[0], label=numbered(counted))] if len(own) == 1 else own
        cells += own
    return tuple(cells), list(dict.fromkeys(resolver.diagnostics))


@dataclass
class _Resolver:
    table: PromptTable
    run: str
    tokenizer: TextTokenizer
    loops: Mapping[str, Any]
    with_runs: tuple[str, ...]
    ranked: Ranked | None = None
    answers: AnswerTokens = NO_ANSWERS
    swept: Collection[Span] = ()
    """Positions, and parts of some, whose numbers are those of a `for`."""
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])

    def __post_init__(self) -> None:
        self.spans = Occurrences(
            self.table, self.run, self.tokenizer, self.diagnostics, self.answers, self.swept
        )
        self.maps = self.spans.maps
        self.total = self.spans.total
        self.counted = CountedTokens(self.spans, self.with_runs)

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
        point = counted_once(point) if self.spans.drops_out(point) else point
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
            # Special tokens are hit only where they are named or counted.
            counted = isinstance(point.base, ast.TokenIndex)
            hint = "the offset leads out of the text; choose a smaller one"
            behind = self._answer_in(point.base)
            return self.counted.inside(cells, point, hint, special=counted, behind=behind)
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
            case ast.Joined(items=items):
                return self._joined(base, items)
            case ast.RankedTokens():
                if self.ranked is None:
                    return self._later(base, "a position that another experiment ranked")
                found = self.ranked(base, self.run, self.loops, self.diagnostics)
                return [PositionCell(label, tuple(hits)) for label, hits in found]
            case ast.EachStep():  # one of a reply, whose cells are found by themselves
                return []

    def _later(self, node: ast.Node, what: str) -> list[PositionCell]:
        self.diagnostics.append(NotSupported(span=node.span, what=what))
        return []

    def somewhere(self, item: ast.Position, cells: list[PositionCell]) -> list[PositionCell]:
        """The cells, none and E0310 where a `for` counts beyond the end of every row."""
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
            return in_grid(base, self.spans)
        occurrence = ref.occurrence
        ranged = occurrence is not None and (occurrence.low is None or occurrence.high is not None)
        counted = bounds(occurrence)
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
        found = self.spans.one_place(base, ref)
        if found is None:
            return []
        hits = [p.tokens if base.plural else p.tokens[-1:] for p in found]
        self.spans.warn(ref, zip(range(self.total), found, hits, strict=True))
        return [PositionCell(base.span.written, tuple((h,) if h else () for h in hits))]

    def _occurrences(self, base: ast.SpanTokens) -> list[PositionCell]:
        """One cell per occurrence. Those of `each` and `*` drop out where a row has fewer."""
        ref = base.of
        found = self.spans.all_places(replace(ref, occurrence=None))
        if found is None:
            return []
        most = max(map(len, found))
        counted = bounds(ref.occurrence)
        if counted is None:
            wanted = range(1, most + 1)
            if not most:
                self.spans.absent(base, ref, list(range(self.total)), 1)
                return []
        else:
            wanted = range(counted[0], counted[1] + 1)
            lacking = [n for n, places in enumerate(found) if len(places) < wanted[-1]]
            if lacking:
                self.spans.absent(base, ref, lacking, wanted[-1])
                return []
        cells: list[PositionCell] = []
        for k in wanted:
            hits: list[Hits] = []
            for places in found:
                tokens = places[k - 1].tokens if len(places) >= k else ()
                hits.append((tokens if base.plural else tokens[-1:],) if tokens else ())
            name = ref.name if ref.name is not None else f'"{ref.literal}"'
            behind = f" of {ref.of}" if ref.of is not None else ""
            cells.append(PositionCell(f"{name} {k}{behind}", tuple(hits), k))
        self.spans.warn(
            ref,
            (
                (n, place, place.tokens if base.plural else place.tokens[-1:])
                for n, places in enumerate(found)
                for place in places
            ),
        )
        return cells

    def _all_tokens(self, base: ast.SpanTokens) -> list[PositionCell]:
        """`subject tokens`: all tokens of all occurrences, or of `item 2..4`, joined."""
        ref = base.of
        found = self.spans.all_places(replace(ref, occurrence=None))
        if found is None:
            return []
        low, high = bounds(ref.occurrence) or (1, None)
        lacking = [n for n, places in enumerate(found) if len(places) < (high or low)]
        if lacking and not (self.spans.drops_out(ref) and len(lacking) < self.total):
            self.spans.absent(base, ref, lacking, high or low)
            return []
        found = [() if n in lacking else places[low - 1 : high] for n, places in enumerate(found)]
        self.spans.warn(
            ref, ((n, place, place.tokens) for n, places in enumerate(found) for place in places)
        )
        joined = [tuple(sorted({t for place in places for t in place.tokens})) for places in found]
        hits = tuple(() if n in lacking else (tokens,) for n, tokens in enumerate(joined))
        return [PositionCell(base.span.written, hits)]

    def _each_token_of(self, base: ast.EachTokenOf, ref: ast.SpanRef) -> list[PositionCell]:
        if not self.spans.span_fits(base, ref, from_end=True):
            return []
        found = self.spans.one_place(base, ref)
        if found is None:
            return []
        if self.spans.of_images:
            return each_token([place.tokens for place in found], self.tokenizer)
        self.spans.warn(ref, ((n, place, place.tokens) for n, place in enumerate(found)))

        def elsewhere(other: _Resolver) -> list[tuple[int, ...]]:
            places = other.spans.one_place(base, ref)
            return [p.tokens for p in places or ()]

        lengths = self._lengths([p.tokens for p in found], elsewhere)
        return ragged(ref.span.written, [p.tokens for p in found], lengths)

    def _lengths(
        self,
        own: Sequence[tuple[int, ...]],
        elsewhere: Callable[[_Resolver], Sequence[tuple[int, ...]]],
    ) -> set[int]:
        """How many tokens it is, in all runs: their cells have to bear the same labels."""
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
            # A prompt without text is refused when the table is built.
            hits = tuple(one_token(m.text_tokens[at]) for m in self.maps)
            follows = "newest" if base.which == "last" else ""
            return [PositionCell(base.span.written, hits, follows=follows)]
        if not self.spans.span_fits(base, base.of, from_end=base.which == "last"):
            return []
        found = self.spans.one_place(base, base.of)
        if found is None:
            return []
        there = [(p.tokens[at],) if p.tokens else () for p in found]
        self.spans.warn(base.of, zip(range(self.total), found, there, strict=True))
        return [PositionCell(base.span.written, tuple((own,) if own else () for own in there))]

    # --- behind the prompt ------------------------------------------------------------------------

    def _and_answer(self, position: ast.Position, cells: list[PositionCell]) -> list[PositionCell]:
        """`tokens * and answer`: one cell more tokens; `token * and answer`: more cells."""
        body = position.body
        base = body.base if isinstance(body, ast.Point) and not body.offset else None
        if not isinstance(base, ast.TokenIndex) or base.low is not None:
            self.diagnostics.append(
                NotInTheAnswer(
                    span=position.span,
                    position=position.span.written,
                    reason="`and answer` can only stand behind `tokens *` and `token *`",
                    hint=f"join them: `{{{body.span.written}, answer tokens}}`",
                )
            )
            return []
        if not self.spans.answer_fits(position, from_end=not base.plural) or not cells:
            return []
        tokens = [self.spans.behind(n) for n in range(self.total)]
        if not base.plural:
            return [*cells, *ragged(ANSWER, tokens, {len(own) for own in tokens})]
        hits = ((own[0] + tokens[n],) for n, own in enumerate(cells[0].hits))
        return [PositionCell(position.span.written, tuple(hits))]

    def _answer_in(self, node: ast.Node) -> bool:
        """Whether tokens behind the prompt are named in it."""
        return any(
            (isinstance(part, ast.SpanRef) and self.spans.is_answer(part))
            or (isinstance(part, ast.Position) and part.and_answer)
            for part in walk(node)
        )

    # --- joined, between, except ------------------------------------------------------------------

    def _joined(self, base: ast.Joined, items: ast.Positions) -> list[PositionCell]:
        before = len(self.diagnostics)
        found = [(item, self.position(item)) for item in items.items]
        if has_errors(self.diagnostics[before:]):
            return []
        cells = [cell for _, own in found for cell in own]
        parts = [own for item, own in found if self._may_lack(item)]
        hits = tuple(
            () if any(lacks(own, n) for own in parts) else union(cells, n)
            for n in range(self.total)
        )
        found, either = PositionCell(base.span.written, hits), {c.follows for c in cells} - {""}
        return [replace(found, follows=min(either)) if either else found]

    def _may_lack(self, node: ast.Node) -> bool:
        """Whether rows without the position drop out: another experiment hasn't ranked theirs, or a
        `for` counts beyond their end."""
        return is_ranked(node) or any(map(self.spans.drops_out, walk(node)))

    def _single(self, point: ast.Point) -> list[int | None] | None:
        """One token position per row, None where a `for` counts beyond its end; else E0314."""
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
            told = by_text(body.low, body.high) and not self.table.stands_in
            told = told and all(behind(a, b, n, *prompts) for n, (a, b) in reversed_rows.items())
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
        return ragged("between", tokens, lengths)

    def _except(self, body: ast.Except, align: str | None) -> list[PositionCell]:
        if self._answer_in(body.excluded):
            self.diagnostics.append(
                NotInTheAnswer(
                    span=body.span,
                    position=body.span.written,
                    reason="`except` leaves tokens of the prompt out, and has none of the answer's",
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
            if ranked and lacks(cells, n):
                kept.append(())
                continue
            without = {p for run in union(cells, n) for p in run}
            tokens = tuple(p for p in m.text_tokens if p not in without)
            kept.append((tokens,) if tokens or ranked else ())
        lacking = [] if ranked else [n for n, row in enumerate(kept) if not row]
        if lacking:
            every = (each for each in walk(body.excluded) if isinstance(each, ast.TokenIndex))
            self.diagnostics.append(
                NothingLeft(
                    by_text=any(each.low is None for each in every),
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
