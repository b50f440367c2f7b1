"""Positions in an image: `image row 3 col 4 token`, and what tokens of images are called."""

from __future__ import annotations

from collections.abc import Sequence

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e03_coordinates import EmptyRange
from mechdsl.diagnostics.e03_positions import OutsidePrompt
from mechdsl.images.patches import PatchLayout
from mechdsl.prompts.image_reader import IMAGE, ImageReader
from mechdsl.prompts.named_numbers import bounds
from mechdsl.prompts.prompt_table import PositionCell
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast


def in_grid(
    base: ast.SpanTokens, reader: ImageReader, total: int, run: str
) -> tuple[list[PositionCell], list[Diagnostic]]:
    """The cells of `image row R col C token`, one for each patch, or of `tokens`, joined. total:
    rows of the table, all of which have them. Codes: E0310, E0321."""
    tokens, problems = _patches(base.of, reader, total, run)
    if problems:
        return [], problems
    if base.plural:
        return [PositionCell(base.span.written, ((tuple(tokens),),) * total)], []
    one = len(tokens) == 1
    return [
        PositionCell(base.span.written if one else reader.label(token), ((((token,),)),) * total)
        for token in tokens
    ], []


def each_patch(tokens: Sequence[tuple[int, ...]], reader: ImageReader) -> list[PositionCell]:
    """One cell for each token of a span that all images have."""
    return [
        PositionCell(reader.label(token), tuple((((token,),)) for _ in tokens))
        for token in tokens[0]
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
    )


def is_image_span(ref: ast.SpanRef, tokenizer: TextTokenizer) -> bool:
    """Whether it names all patches of an image."""
    return ref.name == IMAGE and isinstance(tokenizer, ImageReader)
