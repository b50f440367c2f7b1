"""What corruptions do to patches of an image, as the model gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.images.picture import PictureChange
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.prompts.positions import resolve_positions
from mechdsl.prompts.prompt_table import PromptTable, Run, RunRow
from mechdsl.prompts.row_regions import image_change
from mechdsl.prompts.row_scope import Refusal
from mechdsl.prompts.rows import Row
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast


def change_patches(
    table: PromptTable,
    run: str,
    change: ast.Change,
    number: int,
    rows: Sequence[Row],
    tokenizer: TextTokenizer,
) -> tuple[Run, list[Diagnostic]]:
    """The run with patches of its images blurred, gray or with noise; cells are joined.

    number: its own, which noise hangs on. rows: those of the run. Codes: E0207 and those of
    positions.
    """
    at, before = change.tokens, table.runs[run]
    assert at is not None
    cells, found = resolve_positions(at, table, run, tokenizer=tokenizer)
    if has_errors(found) or not isinstance(tokenizer, ImageReader):
        return before, found
    changed: list[RunRow] = []
    for place, (old, row) in enumerate(zip(before.rows, rows, strict=True)):
        tokens = sorted({t for cell in cells for hit in cell.hits[place] for t in hit})
        if any(tokenizer.layout.place(token) is None for token in tokens):
            reason, hint = "is of patches alone", "write `image tokens` for all of them"
            return before, [BadArgument(span=at.span, name=change.word, reason=reason, hint=hint)]
        try:
            made = image_change(row, change, number)
        except Refusal as refusal:
            return before, [refusal.diagnostic(row.describe())]
        changed.append(with_patches(old, made, tokens, tokenizer))
    return replace(before, rows=tuple(changed)), found


def with_patches(
    row: RunRow, change: PictureChange, tokens: Sequence[int], reader: ImageReader
) -> RunRow:
    """The row with its image changed at these patches, as the model gets it; as it was where there
    are none."""
    if not tokens or row.image is None:
        return row
    change = replace(change, patches=tuple(reader.layout.box(token) for token in tokens))
    image = replace(row.image, changes=(*row.image.changes, change))
    [encoded] = reader.encode_all([image.text])
    return replace(row, image=image, text=image.text, ids=encoded.ids, offsets=encoded.offsets)
