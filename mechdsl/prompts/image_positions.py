"""Positions in an image: `image row 3 col 4 token`, and what tokens of images are called."""

from __future__ import annotations

from collections.abc import Sequence

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e03_coordinates import EmptyRange
from mechdsl.diagnostics.e03_positions import OutsidePrompt
from mechdsl.images.patches import PatchLayout
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.prompts.named_numbers import bounds
from mechdsl.prompts.prompt_table import PositionCell
from mechdsl.prompts.span_occurrences import Occurrences
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast


def in_grid(base: ast.SpanTokens, spans: Occurrences) -> list[PositionCell]:
    """The cells of `image row R col C token`, one for each patch, or of `tokens`, joined. All rows
    have them. Codes: E0108 in texts, E0308, E0310, E0321."""
    reader = spans.tokenizer
    if spans.all_places(base.of) is None or not isinstance(reader, ImageReader):
        return []
    tokens, problems = _patches(base.of, reader, spans.total, spans.run)
    spans.diagnostics += problems
    if problems:
        return []
    if base.plural:
        return [PositionCell(base.span.written, ((tuple(tokens),),) * spans.total)]
    one = len(tokens) == 1
    return [
        PositionCell(
            base.span.written if one else reader.label(token), (((token,),),) * spans.total
        )
        for token in tokens
    ]


def each_token(tokens: Sequence[tuple[int, ...]], tokenizer: TextTokenizer) -> list[PositionCell]:
    """One cell for each token of a span of images; images lack it that have fewer."""
    assert isinstance(tokenizer, ImageReader)
    held = [frozenset(own) for own in tokens]
    return [
        PositionCell(
            tokenizer.label(token), tuple((((token,),) if token in own else ()) for own in held)
        )
        for token in sorted(frozenset().union(*held))
    ]


def _patches(
    ref: ast.SpanRef, reader: ImageReader, total: int, run: str
) -> tuple[list[int], list[Diagnostic]]:
    """The tokens of a rectangle of patches, row by row."""
    layout = reader.layout
    ranges: list[range] = []
    for occurrence, most in ((ref.row, layout.rows), (ref.col, layout.cols)):
        counted = bounds(occurrence)
        low, high = (1, most) if counted is None else counted
        if low > high:
            assert occurrence is not None
            text = occurrence.span.written
            first, last = str(high), str(low)
            return [], [EmptyRange(span=occurrence.span, text=text, low=first, high=last)]
        if low < 1 or high > most:
            return [], [_outside(ref.span, layout, total, run)]
        ranges.append(range(low, high + 1))
    rows, cols = ranges
    return [layout.token(row, col) for row in rows for col in cols], []


def _outside(span: Span, layout: PatchLayout, total: int, run: str) -> Diagnostic:
    size = f"{layout.rows} rows and {layout.cols} columns of patches"
    return OutsidePrompt(
        span=span,
        position=span.written,
        run=run,
        lacking=total,
        total=total,
        example=f"{layout.size[1]} x {layout.size[0]} pixels",
        hint=f"the model sees {size}, counted from 1 at the top left",
        unit="image",
    )
