"""Tokens that a corruption inserts into the prompts of its run: `insert 4 tokens before …`.

They are placeholders: rules write vectors at their positions, `inserted tokens`. All other tokens
stay as they are. In images they are vectors of 0 after the patches, as in visual prompt tuning
(Jia et al. 2022, arXiv 2203.12119): their order has no effect, because they have no positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.names import BadArgument
from mechdsl.program.images import INSERTED_SPAN
from mechdsl.prompts.block import PromptsBlock
from mechdsl.prompts.positions.cells import resolve_positions
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun, RunRow
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.prompts.tokens.images import ImageTokenizer
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.prompts.values import TextSpan
from mechdsl.syntax import ast
from mechdsl.vocab.corruptions import TokenChange, changes_of_kind


def has_inserted_tokens(run: PromptRun) -> bool:
    """Return whether a corruption inserted tokens into the prompts of a run."""
    return any(
        INSERTED_SPAN in row.places or any(span.name == INSERTED_SPAN for span in row.spans)
        for row in run.rows[:1]
    )


def insert_tokens(
    table: PromptTable,
    run: str,
    change: ast.ChangeLine,
    texts: Sequence[str],
    tokenizer: TextTokenizer,
) -> tuple[PromptRun, list[Diagnostic]]:
    """Insert copies of one token before the first or after the last token of a position.

    Args:
        table: The table.
        run: Name of the run.
        change: The line of the corruption.
        texts: [row] text of the token.
        tokenizer: Tokenizer of the model.

    Returns:
        The run; diagnostics E0207 and those of positions.
    """
    old, at = table.runs[run], change.before or change.after
    (count,) = change.values
    assert at is not None
    assert isinstance(count, ast.Number)
    if INSERTED_SPAN in table.sources[0].block.names():
        reason = "is the name of the inserted tokens, and a value of the prompts has it"
        return old, [_bad(change, INSERTED_SPAN, reason, "give the value another name")]
    cells, found = resolve_positions(at, table, run, tokenizer=tokenizer, side="source")
    if has_errors(found):
        return old, found
    rows: list[RunRow] = []
    lacking = 0
    for number, (row, text) in enumerate(zip(old.rows, texts, strict=True)):
        hits = [token for cell in cells for tokens in cell.hits[number] for token in tokens]
        token, problem = _find_token(change, row, text, tokenizer)
        if problem is not None:
            return old, [*found, problem]
        if not hits:
            lacking += 1
            continue
        index = min(hits) if change.before is not None else max(hits) + 1
        images = _list_images(row, tokenizer)
        index = _leave_marks(index, images)
        made = _insert(row, index, int(count.value), token, text)
        if made is None:
            reason = "is inside of a character of several tokens"
            hint = "name a position between two characters"
            if any(first < index < end for first, end, _ in images):
                reason = "is between the tokens of an image, which the model reads as a whole"
                hint = "insert before or after the image, such as `before photo tokens`"
            return old, [*found, _bad(at, at.span.written, reason, hint)]
        rows.append(made)
    if lacking:
        reason = f"is missing in {lacking} of {len(old.rows)} prompts"
        hint = "keep the prompts that have it with `where`, or name another position"
        return old, [*found, _bad(at, at.span.written, reason, hint)]
    return replace(old, rows=tuple(rows)), found


def _list_images(row: RunRow, tokenizer: TextTokenizer) -> list[tuple[int, int, list[int]]]:
    """Return the first token and the end of each image in a prompt, with the marks that its
    processor writes around it, and the tokens that read the image."""
    before, after = ((), ())
    if row.pictures and isinstance(tokenizer, ImagePromptTokenizer):
        before, after = tokenizer.image_marks
        if tokenizer.bos_after_images is not None:
            after = (*after, tokenizer.bos_after_images)
    found: list[tuple[int, int, list[int]]] = []
    for placed in row.whole_pictures:
        expansion = placed.picture.expansion
        first, end = placed.first, placed.first + len(expansion.ids)
        # A mark joined with the text next to it is a token of the text.
        for mark in reversed(before):
            first -= first > 0 and row.special[first - 1] and row.ids[first - 1] == mark
        for mark in after:
            end += end < len(row.ids) and row.special[end] and row.ids[end] == mark
        found.append((first, end, [placed.first + token for token in expansion.cell_of]))
    return found


def _leave_marks(index: int, images: Sequence[tuple[int, int, Sequence[int]]]) -> int:
    """Move an index between an image and the tokens that its processor writes around it."""
    for first, end, cells in images:
        if first < index < end and cells:
            index = first if index <= min(cells) else end if index > max(cells) else index
    return index


def insert_image_tokens(
    table: PromptTable, run: str, change: ast.ChangeLine, tokenizer: ImageTokenizer
) -> tuple[PromptRun, list[Diagnostic]]:
    """Insert tokens after the last token of each image.

    Returns:
        The run; diagnostics E0207 and those of positions.
    """
    old, at = table.runs[run], change.before or change.after
    (count,) = change.values
    assert at is not None
    assert isinstance(count, ast.Number)
    if tokenizer.layout.fixed:
        reason = f"adds tokens that this model can't read: {tokenizer.layout.fixed}"
        hint = "use another model, such as a ViT, or write vectors at tokens of the image"
        return old, [_bad(change, change.word, reason, hint)]
    if any(region.name == INSERTED_SPAN for region in table.sources[0].block.spec.regions):
        reason = "is the name of the inserted tokens, and a region of the images has it"
        return old, [_bad(change, INSERTED_SPAN, reason, "give the region another name")]
    cells, found = resolve_positions(at, table, run, tokenizer=tokenizer)
    if has_errors(found):
        return old, found
    last = all(
        len(row.ids) - 1 in {token for cell in cells for hit in cell.hits[n] for token in hit}
        for n, row in enumerate(old.rows)
    )
    if change.after is None or not last:
        reason = "isn't the end of the image, where its inserted tokens are"
        hint = f"write `insert {count.span.written} tokens after last token`: their order has no "
        return old, [_bad(at, at.span.written, reason, f"{hint}effect on the model")]
    return replace(old, rows=tuple(_lengthen(row, int(count.value)) for row in old.rows)), found


def _lengthen(row: RunRow, count: int) -> RunRow:
    """Return the row of an image with tokens after its others."""
    tokens = tuple(range(len(row.ids), len(row.ids) + count))
    return replace(
        row,
        ids=row.ids + row.ids[-1:] * count,
        offsets=row.offsets + ((0, 0),) * count,
        special=row.special + (False,) * count,
        places={**row.places, INSERTED_SPAN: (*row.places.get(INSERTED_SPAN, ()), tokens)},
    )


def insertion_conventions(block: PromptsBlock) -> dict[str, str]:
    """Describe the tokens that corruptions insert."""
    out: dict[str, list[str]] = {}
    for corruption in block.spec.corruptions:
        for kind, change in changes_of_kind(TokenChange, corruption.changes):
            if kind.inserts:
                said = " ".join(change.span.written.split()).removeprefix(f"{change.word} ")
                out.setdefault(corruption.name, []).append(said)
    note = "placeholders, unless a rule writes vectors at `inserted tokens`"
    if block.spec.kind == "images":
        note = "vectors of 0 at `embed`, unless a rule writes others at `inserted tokens`"
    return {f"inserted in {name}": f"{', '.join(said)}: {note}" for name, said in out.items()}


def _bad(node: ast.Node, name: str, reason: str, hint: str) -> Diagnostic:
    return BadArgument(span=node.span, name=name, reason=reason, hint=hint)


def _find_token(
    change: ast.ChangeLine, row: RunRow, text: str, tokenizer: TextTokenizer
) -> tuple[int, Diagnostic | None]:
    """Return the token of a text, as it follows the prompt; E0207 unless it is one known token."""
    ids, _ = tokenizer.continuation(row.text, text)
    node = change.given
    assert node is not None
    if tokenizer.stands_in:
        return (*ids, 0)[0], None
    reason = hint = ""
    if len(ids) != 1 or not text.strip():
        pieces = " ".join(f"`{tokenizer.token_text(each)}`" for each in ids)
        reason = f"has {len(ids)} tokens: {pieces}" if ids else "has no token"
        reason = reason if text.strip() else "is white space"
        hint = 'write a word of one token, most of which begin with a space: `with " the"`'
    elif ids[0] == tokenizer.unknown_id:
        reason, hint = "isn't in the model's vocabulary", "write a word of its vocabulary"
    problem = _bad(node, node.span.written, reason, hint) if reason else None
    return (*ids, 0)[0], problem


def _insert(row: RunRow, index: int, count: int, token: int, text: str) -> RunRow | None:
    """Insert tokens before the token `index`; None if that is inside of a character."""
    before = [i for i in range(index) if not row.special[i]]
    after = [i for i in range(index, len(row.ids)) if not row.special[i]]
    at = row.offsets[before[-1]][1] if before else row.offsets[after[0]][0] if after else 0
    if after and row.offsets[after[0]] != (0, 0) and row.offsets[after[0]][0] < at:
        return None
    longer = count * len(text)
    places = tuple((at + k * len(text), at + (k + 1) * len(text)) for k in range(count))
    moved = tuple(
        (start, end) if special else (start + longer, end + longer)
        for (start, end), special in zip(row.offsets[index:], row.special[index:], strict=True)
    )
    spans = tuple(
        span._replace(
            start=span.start + longer * (span.start >= at),
            end=span.end + longer * (span.end > at or span.start >= at),
        )
        for span in row.spans
    )
    return replace(
        row,
        text=row.text[:at] + text * count + row.text[at:],
        ids=(*row.ids[:index], *(token,) * count, *row.ids[index:]),
        offsets=(*row.offsets[:index], *places, *moved),
        special=(*row.special[:index], *(False,) * count, *row.special[index:]),
        source=row.source + count if row.source else 0,
        spans=(*spans, TextSpan(INSERTED_SPAN, at, at + longer)),
    )
