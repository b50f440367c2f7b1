"""Tokens of a prompt replaced by other text, before the model reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechdsl.base.names import quoted
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e05_chat import MarkerInText
from mechdsl.prompts.positions import resolve_positions
from mechdsl.prompts.prompt_table import PositionCell, PromptTable, Run, RunRow
from mechdsl.prompts.span_occurrences import Occurrences
from mechdsl.prompts.span_tokens import Place, TokenMap, trimmed
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.prompts.values import SpanAt
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


def replace_tokens(
    table: PromptTable,
    run: str,
    at: ast.Positions,
    cell: PositionCell,
    text: str,
    tokenizer: TextTokenizer,
) -> Run:
    """The run with the text of the hit tokens replaced and tokenised again; answers stay.

    cell: one of those of `at`. A span that `at` names becomes the text once, the outermost one
    counting: of a list, `fruits tokens` becomes one `thing`, and of `item tokens` each does. In the
    rest of what is hit, so does every span whose tokens are all hit, the innermost one counting,
    and every other word.
    """
    hits = [tuple(p for tokens in row for p in tokens) for row in cell.hits]
    return _replaced(table, run, at, hits, [text] * len(hits), tokenizer)


def marks_turns(text: str, span: Span, tokenizer: TextTokenizer) -> MarkerInText | None:
    """E0553 for a text that would be a special token in a chat."""
    marker = None if tokenizer.chat is None else tokenizer.chat.marker_in(text)
    if marker is None:
        return None
    return MarkerInText(span=span, text=quoted(text), marker=marker)


def replace_in_rows(
    table: PromptTable,
    run: str,
    at: ast.Positions,
    texts: Sequence[str],
    tokenizer: TextTokenizer,
) -> tuple[Run, list[Diagnostic]]:
    """The same at a position of the language, with a text for each row; cells are joined."""
    cells, diagnostics = resolve_positions(at, table, run, tokenizer=tokenizer)
    if has_errors(diagnostics):
        return table.runs[run], diagnostics
    hits = [
        tuple(sorted({p for cell in cells for tokens in cell.hits[n] for p in tokens}))
        for n in range(len(table))
    ]
    return _replaced(table, run, at, hits, texts, tokenizer), diagnostics


def _replaced(
    table: PromptTable,
    run: str,
    at: ast.Positions,
    hits: Sequence[tuple[int, ...]],
    texts: Sequence[str],
    tokenizer: TextTokenizer,
) -> Run:
    old = table.runs[run]
    named = [node.of for node in walk(at) if isinstance(node, ast.SpanTokens) and node.plural]
    spans = Occurrences(table, run, tokenizer, [])  # what is wrong has been said
    written = [
        _rewrite(row, _units(row, tokens, [p for ref in named for p in spans.places(n, ref)]), text)
        for n, (row, tokens, text) in enumerate(zip(old.rows, hits, texts, strict=True))
    ]
    # The moved token is put back by hand: alone behind the prompt it may be tokenised otherwise.
    tail = len(table.moved_text)
    reader = tokenizer.reading(written=old.chat)
    encoded = reader.encode_all([text[: len(text) - tail] for text, _ in written])
    rows: list[RunRow] = []
    for row, (text, spans), tokens in zip(old.rows, written, encoded, strict=True):
        new = replace(
            row,
            text=text[: len(text) - tail],
            ids=tokens.ids,
            offsets=tokens.offsets,
            special=tokens.special,
            spans=spans,
        )
        rows.append(extended(new, table.moved, table.moved_text))
    return replace(old, rows=tuple(rows))


def extended(row: RunRow, moved: tuple[int, ...], text: str) -> RunRow:
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


def _units(row: RunRow, hits: tuple[int, ...], named: Sequence[Place]) -> list[tuple[int, int]]:
    """The characters that are replaced together, from left to right, without overlaps.

    named: the spans that the position names.
    """
    tokens = TokenMap(row)
    left = {p for p in hits if not row.special[p]}
    units: list[tuple[int, int]] = []
    # What is named, then what lies in the rest: an item before the list that it stands in.
    others = [tokens.place(span.start, span.end) for span in row.spans]
    outermost = sorted(named, key=lambda place: place.start - place.end)
    for place in (*outermost, *sorted(others, key=lambda place: place.end - place.start)):
        if place.tokens and left.issuperset(place.tokens):
            units.append(trimmed(row.text, place.start, place.end))
            left.difference_update(place.tokens)
    last: tuple[int, int] | None = None
    words: list[tuple[int, int]] = []
    for p in sorted(left):
        start, end = tokens.places[p]
        if start == end:
            continue
        if last is not None and start <= last[1]:
            last = words[-1] = (last[0], max(last[1], end))
        else:
            last = (start, end)
            words.append(last)
    return sorted(u for u in (*units, *words) if u[0] < u[1])


def _rewrite(
    row: RunRow, units: Sequence[tuple[int, int]], new: str
) -> tuple[str, tuple[SpanAt, ...]]:
    """The text with every unit replaced, and the spans where they are now; those that were a part
    of a unit are gone."""
    parts: list[str] = []
    at = 0
    for start, end in units:
        parts += [row.text[at:start], new]
        at = end
    text = "".join([*parts, row.text[at:]])

    def moved(offset: int, *, is_end: bool) -> int:
        shift = 0
        for start, end in units:
            if offset >= end:
                shift += len(new) - (end - start)
            elif offset > start:
                # Within what was replaced: the whole of it counts.
                return start + shift + (len(new) if is_end else 0)
        return offset + shift

    spans = tuple(
        s._replace(start=moved(s.start, is_end=False), end=moved(s.end, is_end=True))
        for s in row.spans
        if not any(a <= s.start < s.end <= b and s.end - s.start < b - a for a, b in units)
    )
    return text, spans
