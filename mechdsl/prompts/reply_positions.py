"""Positions in the reply that a model writes behind a prompt: found when the reply is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeAlias

from mechdsl.base.record import Record, record
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e05_answers import NotInTheReply
from mechdsl.prompts.position_hits import one_token
from mechdsl.prompts.prompt_table import Hits, PositionCell, PromptTable, ReplyPosition, RunRow
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

REPLY = "reply"
"""Names its tokens, unless a prompt has a span of that name."""
Decode: TypeAlias = Callable[[Sequence[int]], str]


@record
class ReplyTokens(Record):
    """How long replies are at most; or why there are none to be named."""

    most: int = 0
    reason: str = "only measures, observations and `save` read tokens of a reply"
    hint: str = "name a position of the prompt"


NO_REPLIES = ReplyTokens()
_ALL_EMPTY = "all of them are empty", "name a position of the prompt"


def names_reply(node: ast.Node, table: PromptTable) -> bool:
    """Whether a position names tokens of a reply."""
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
    """The cells of a position that names tokens of a reply; none after E0545.

    Of a reply that is still to be written nothing is known: what they hit then is the prompt's last
    token.
    """
    rows = table.runs[run].rows
    there = table.behind != ""
    if there:
        replies = ReplyTokens(max((_length(row) for row in rows), default=0), *_ALL_EMPTY)
    places = _Places(position, replies)
    found, problem = places.found()
    cells: list[PositionCell] = []
    for label, place in found:
        if there:
            hits = tuple(_behind(row, place, tokenizer) for row in rows)
            cells += [PositionCell(label, hits)] if any(hits) else []
        else:
            last = tuple(one_token(len(row.ids) - 1) for row in rows)
            cells.append(PositionCell(label, last, reply=place))
    if found and not cells:
        problem = places.bad("no reply has it", "name another one; `report texts` shows them")
    diagnostics += [] if problem is None else [problem]
    return cells


def _length(row: RunRow) -> int:
    """Tokens of the reply behind its prompt."""
    return 0 if row.reply is None else len(row.reply.of(row.ids))


def _behind(row: RunRow, place: ReplyPosition, tokenizer: TextTokenizer) -> Hits:
    """What a place is in the reply that stands behind a prompt; while that isn't written, a text in
    it is its last token."""
    reply = row.reply
    if reply is None:
        return ()
    ids = reply.of(row.ids)
    if reply.stands_in and place.kind == "text":
        place = ReplyPosition("last")
    found = tokens_in_reply(place, ids, reply.text, tokenizer.decode)
    return (tuple(reply.first - 1 + token for token in found),) if found else ()


class _Places:
    """What a position names of a reply."""

    def __init__(self, position: ast.Position, replies: ReplyTokens) -> None:
        self.position, self.most = position, replies.most
        self.replies = replies

    def found(self) -> tuple[list[tuple[str, ReplyPosition]], Diagnostic | None]:
        """(label, place) of its cells, or E0545."""
        if not self.most:
            return [], self.bad(self.replies.reason, self.replies.hint)
        body, said = self.position.body, self.position
        if not isinstance(body, ast.Point) or said.align or said.and_answer:
            return [], self.bad(
                "its tokens are named by themselves",
                "write `last token of reply`, `reply token 3` or `each reply token`",
            )
        assert not isinstance(body.offset, ast.Variable)
        cells = list(self._cells(body.base))
        if not cells:
            return [], self.bad(
                "there is one reply behind a prompt, and nothing of it is known before",
                "write `last token of reply`, `reply token 3`, `each reply token` or "
                '`"Answer:" of reply token`',
            )
        cells = [(label, replace(place, offset=body.offset)) for label, place in cells]
        if len(cells) == 1:
            cells = [(said.span.written, cells[0][1])]
        elif body.offset:
            sign = "+" if body.offset > 0 else "-"
            cells = [(f"{label} {sign} {abs(body.offset)}", place) for label, place in cells]
        if not any(self._may_be(place) for _, place in cells):
            tokens = f"a reply has {self.most} tokens at most, counted from 1"
            return [], self.bad(tokens, "let it write more (`generate`), or name an earlier one")
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
            case ast.EdgeToken(which=which, of=ast.SpanRef() as of) if _text_in(of):
                yield "", ReplyPosition("text", text=of.literal or "", which=which)
            case ast.SpanTokens(of=of, each=False, low=None) if _text_in(of):
                which = "all" if base.plural else "last"
                yield "", ReplyPosition("text", text=of.literal or "", which=which)
            case ast.SpanTokens(of=of) if _whole(of):
                yield from self._tokens(base)
            case _:
                return

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
        """Whether a reply may have it."""
        if place.kind in ("token", "tokens"):
            ends = (place.number, place.last or place.number)
            low, high = (each + place.offset for each in ends)
            return 1 <= low <= high <= self.most
        return place.kind == "step" or abs(place.offset) < self.most

    def bad(self, reason: str, hint: str) -> Diagnostic:
        """E0545."""
        said = self.position.span
        return NotInTheReply(span=said, position=said.written, reason=reason, hint=hint)


def _whole(of: ast.SpanRef) -> bool:
    """Whether it is the reply itself."""
    return of.name == REPLY and of.of is None and of.occurrence is None and of.edge is None


def _text_in(of: ast.SpanRef) -> bool:
    """Whether it is a text in the reply."""
    return of.literal is not None and of.of == REPLY


def tokens_in_reply(
    place: ReplyPosition, reply: Sequence[int], text: str, decode: Decode
) -> tuple[int, ...]:
    """The tokens of a reply that a place is, counted from 1, the prompt's last one being 0; none
    where the reply doesn't have all of them.

    text: what it says, without what it was stopped by.
    """
    first = 0 if place.kind == "step" else 1
    found = tuple(token + place.offset for token in _tokens(place, reply, text, decode))
    return found if all(first <= token <= len(reply) for token in found) else ()


def _tokens(place: ReplyPosition, reply: Sequence[int], text: str, decode: Decode) -> Sequence[int]:
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
            own = _of_text(place.text, reply, text, decode)
            if place.which == "all" or not own:
                return own
            return own[:1] if place.which == "first" else own[-1:]


def _of_text(part: str, reply: Sequence[int], text: str, decode: Decode) -> Sequence[int]:
    """The tokens that write the last occurrence of a part of a text, counted from 1."""
    begin = text.rfind(part)
    if begin < 0:
        return ()
    lengths = (len(decode(reply[:count])) for count in range(1, len(reply) + 1))
    ends = list(accumulate(lengths, max))
    starts = [0, *ends[:-1]]
    pairs = enumerate(zip(starts, ends, strict=True), start=1)
    return [n for n, (low, high) in pairs if low < begin + len(part) and begin < high]
