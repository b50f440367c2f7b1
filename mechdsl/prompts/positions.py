"""Positions of the language as token positions of every row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import UnknownWord
from mechdsl.diagnostics.e03_coordinates import EmptyRange
from mechdsl.diagnostics.e03_positions import (
    NothingLeft,
    NotOnePosition,
    ReversedBetween,
)
from mechdsl.diagnostics.e05_answers import NotInTheAnswer
from mechdsl.prompts.answer_tokens import ANSWER, NO_ANSWERS, AnswerTokens
from mechdsl.prompts.counted_tokens import CountedTokens
from mechdsl.prompts.order_in_text import behind, by_text
from mechdsl.prompts.prompt_table import Hits, PositionCell, PromptTable
from mechdsl.prompts.span_occurrences import Occurrences
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

Ranked = Callable[
    [ast.RankedTokens, str, Mapping[str, Any], list[Diagnostic]], list[tuple[str, list[Hits]]]
]
"""(expression, run, values of loops, diagnostics) → (label, hits of every row) of its cells."""

_FEW = 3
"""Up to so many tokens, first / middle / last tells all of them apart."""


def resolve_positions(
    positions: ast.Positions,
    table: PromptTable,
    run: str,
    *,
    tokenizer: TextTokenizer,
    loop_values: Mapping[str, Any] | None = None,
    with_runs: Sequence[str] = (),
    ranked: Ranked | None = None,
    answers: AnswerTokens = NO_ANSWERS,
) -> tuple[tuple[PositionCell, ...], list[Diagnostic]]:
    """The cells of a position expression in one run: one per value of its axis.

    loop_values: numbers of the `for` variables around it.
    with_runs: other runs whose prompts must be as long where positions are counted from an end.
    ranked: picks the tokens that another experiment ranked; E0108 for them without it.
    answers: the texts behind the prompts, whose tokens are positions too.
    Codes: E0305, E0306, E0308 to E0315, E0321, E0322, E0540 to E0542, W0701.
    """
    resolver = _Resolver(
        table, run, tokenizer, loop_values or {}, tuple(with_runs), ranked=ranked, answers=answers
    )
    cells = [cell for item in positions.items for cell in resolver.position(item)]
    return tuple(cells), list(dict.fromkeys(resolver.diagnostics))


@dataclass
class _Resolver:
    table: PromptTable
    run: str
    tokenizer: TextTokenizer
    loops: Mapping[str, Any]
    with_runs: tuple[str, ...]
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])
    ranked: Ranked | None = None
    answers: AnswerTokens = NO_ANSWERS

    def __post_init__(self) -> None:
        self.spans = Occurrences(
            self.table, self.run, self.tokenizer, self.diagnostics, self.answers
        )
        self.maps = self.spans.maps
        self.total = self.spans.total
        self.counted = CountedTokens(self.spans, self.loops, self.with_runs)

    # --- shapes ---------------------------------------------------------------------------------

    def position(self, position: ast.Position) -> list[PositionCell]:
        if position.align not in (None, "left", "right"):
            hint = "write `align left` or `align right`"
            self.diagnostics.append(
                UnknownWord(span=position.span, kind="alignment", word=position.align, hint=hint)
            )
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
        cells = self._base(point.base, align)
        if point.offset:
            sign = "+" if point.offset > 0 else "-"
            swept = len(cells) > 1 or any(cell.item is not None for cell in cells)
            offset = f"{sign} {abs(point.offset)}"
            cells = [
                replace(
                    cell,
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
            if not self.counted.inside(cells, point, hint, special=counted, behind=behind):
                return []
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
                    what = "a position that another experiment ranked"
                    self.diagnostics.append(NotSupported(span=base.span, what=what))
                    return []
                found = self.ranked(base, self.run, self.loops, self.diagnostics)
                return [PositionCell(label, tuple(hits)) for label, hits in found]

    # --- named spans ----------------------------------------------------------------------------

    def _span_tokens(self, base: ast.SpanTokens) -> list[PositionCell]:
        ref = base.of
        if not self.spans.span_fits(base, ref, from_end=not base.plural):
            return []
        occurrence = ref.occurrence
        ranged = occurrence is not None and (occurrence.low is None or occurrence.high is not None)
        if occurrence is not None and _is_backwards(occurrence):
            low, high = str(occurrence.high), str(occurrence.low)
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
        return [PositionCell(base.span.written, tuple((h,) for h in hits))]

    def _occurrences(self, base: ast.SpanTokens) -> list[PositionCell]:
        """One cell per occurrence. Those of `each` and `*` drop out where a row has fewer."""
        ref = base.of
        found = self.spans.all_places(replace(ref, occurrence=None))
        if found is None:
            return []
        most = max(map(len, found))
        occurrence = ref.occurrence
        if occurrence is None or occurrence.low is None:
            wanted = range(1, most + 1)
            if not most:
                self.spans.absent(base, ref, list(range(self.total)), 1)
                return []
        else:
            wanted = range(occurrence.low, (occurrence.high or occurrence.low) + 1)
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
        low, high = 1, None
        if ref.occurrence is not None and ref.occurrence.low is not None:
            low, high = ref.occurrence.low, ref.occurrence.high or ref.occurrence.low
        lacking = [n for n, places in enumerate(found) if len(places) < (high or low)]
        if lacking:
            self.spans.absent(base, ref, lacking, high or low)
            return []
        found = [places[low - 1 : high] for places in found]
        self.spans.warn(
            ref, ((n, place, place.tokens) for n, places in enumerate(found) for place in places)
        )
        hits = tuple(
            (tuple(sorted({t for place in places for t in place.tokens})),) for places in found
        )
        return [PositionCell(base.span.written, hits)]

    def _each_token_of(self, base: ast.EachTokenOf, ref: ast.SpanRef) -> list[PositionCell]:
        if not self.spans.span_fits(base, ref, from_end=True):
            return []
        found = self.spans.one_place(base, ref)
        if found is None:
            return []
        self.spans.warn(ref, ((n, place, place.tokens) for n, place in enumerate(found)))

        def elsewhere(other: _Resolver) -> list[tuple[int, ...]]:
            places = other.spans.one_place(base, ref)
            return [p.tokens for p in places or ()]

        lengths = self._lengths([p.tokens for p in found], elsewhere)
        return self._ragged(ref.span.written, [p.tokens for p in found], lengths)

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
                    self.table, run, self.tokenizer, self.loops, (), answers=self.answers
                )
                lengths |= {len(tokens) for tokens in elsewhere(other)}
        return lengths

    def _ragged(
        self, name: str, tokens: Sequence[tuple[int, ...]], lengths: set[int]
    ) -> list[PositionCell]:
        """One cell per token, or first / middle / last; a single token is the last."""
        if len(lengths) == 1 and max(lengths) > _FEW:
            return [
                PositionCell(f"{name} {k + 1}", tuple(((row[k],),) for row in tokens))
                for k in range(max(lengths))
            ]
        parts: dict[str, tuple[Hits, ...]] = {
            "first": tuple(((row[0],),) if len(row) > 1 else () for row in tokens),
            "middle": tuple(tuple((p,) for p in row[1:-1]) for row in tokens),
            "last": tuple(((row[-1],),) for row in tokens),
        }
        return [PositionCell(f"{name} {part}", hits) for part, hits in parts.items() if any(hits)]

    def _edge(self, base: ast.EdgeToken) -> list[PositionCell]:
        at = 0 if base.which == "first" else -1
        if base.of is None:
            # A prompt without text is refused when the table is built.
            hits = tuple(((m.text_tokens[at],),) for m in self.maps)
            return [PositionCell(base.span.written, hits)]
        if not self.spans.span_fits(base, base.of, from_end=base.which == "last"):
            return []
        found = self.spans.one_place(base, base.of)
        if found is None:
            return []
        self.spans.warn(base.of, ((n, p, (p.tokens[at],)) for n, p in enumerate(found)))
        return [PositionCell(base.span.written, tuple(((p.tokens[at],),) for p in found))]

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
            return [*cells, *self._ragged(ANSWER, tokens, {len(own) for own in tokens})]
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
        ranked = [own for item, own in found if _is_ranked(item)]
        hits = tuple(
            () if any(_unranked(own, n) for own in ranked) else _union(cells, n)
            for n in range(self.total)
        )
        return [PositionCell(base.span.written, hits)]

    def _single(self, point: ast.Point) -> list[int] | None:
        """One token position per row, else E0314."""
        before = len(self.diagnostics)
        cells = self._point(point, None)
        if has_errors(self.diagnostics[before:]):
            return None
        reason = ""
        if len(cells) != 1:
            reason = "a sweep over several positions"
        elif self.tokenizer.stands_in:
            return [max((max(run, default=0) for run in row), default=0) for row in cells[0].hits]
        elif any(len(row) != 1 or len(row[0]) != 1 for row in cells[0].hits):
            reason = "several tokens"
        if reason:
            position = point.span.written
            self.diagnostics.append(
                NotOnePosition(span=point.span, position=position, reason=reason)
            )
            return None
        return [row[0][0] for row in cells[0].hits]

    def _between_tokens(self, body: ast.Between) -> list[tuple[int, ...]] | None:
        low, high = self._single(body.low), self._single(body.high)
        if low is None or high is None:
            return None
        reversed_rows = [n for n in range(self.total) if low[n] > high[n]]
        if reversed_rows:
            prompts = (self.table, self.run, self.tokenizer)
            told = by_text(body.low, body.high) and not self.table.stands_in
            told = told and all(behind(low[n], high[n], n, *prompts) for n in reversed_rows)
            self.diagnostics.append(
                ReversedBetween(
                    by_text=told,
                    span=body.span,
                    run=self.run,
                    lacking=len(reversed_rows),
                    total=self.total,
                    example=self.spans.example(reversed_rows[0]),
                )
            )
            return None
        return [tuple(range(a, b + 1)) for a, b in zip(low, high, strict=True)]

    def _between(self, body: ast.Between) -> list[PositionCell]:
        tokens = self._between_tokens(body)
        if tokens is None:
            return []
        if not body.each:
            return [PositionCell(body.span.written, tuple((row,) for row in tokens))]
        lengths = self._lengths(tokens, lambda other: other._between_tokens(body) or ())
        return self._ragged("between", tokens, lengths)

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
        ranked = _is_ranked(body.excluded)
        for n, m in enumerate(self.maps):
            if ranked and _unranked(cells, n):
                kept.append(())
                continue
            without = {p for run in _union(cells, n) for p in run}
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


def _is_backwards(occurrence: ast.Occurrence) -> bool:
    low, high = occurrence.low, occurrence.high
    return low is not None and high is not None and low > high


def _union(cells: Sequence[PositionCell], n: int) -> Hits:
    """All positions of a row, joined as they are written: in two runs, and on both sides of `onto`,
    they pair in this order. No run where there are none."""
    joined = dict.fromkeys(p for cell in cells for run in cell.hits[n] for p in run)
    # A run of no tokens, that of `top 0%`, is a run all the same.
    return (tuple(joined),) if any(cell.hits[n] for cell in cells) else ()


def _is_ranked(node: ast.Node) -> bool:
    return any(isinstance(part, ast.RankedTokens) for part in walk(node))


def _unranked(cells: Sequence[PositionCell], n: int) -> bool:
    """Whether the other experiment lacks this row, so that nothing is known of its tokens."""
    return not any(cell.hits[n] for cell in cells)
