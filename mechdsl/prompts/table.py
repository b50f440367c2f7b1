"""Build a table of tokenised rows from a prompts block, with the tokens that a run inserts.

Inserted tokens (`insert 4 tokens before …`) are placeholders: rules write vectors at their
positions, `inserted tokens`. All other tokens stay as they are. In images they are vectors of 0
after the patches, as in visual prompt tuning (Jia et al. 2022, arXiv 2203.12119): their order has
no effect, because they have no positions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from string import ascii_lowercase
from types import MappingProxyType
from typing import TypedDict

from mechdsl.base import limits
from mechdsl.base.hashing import stable_hash
from mechdsl.base.text import Span, name_list, quote
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.models import NoTokenFor
from mechdsl.diagnostics.prompts import (
    BadChatTemplate,
    ImageNameAsText,
    MarkerInText,
    NoChatTemplate,
    RepeatedBos,
    RowsNotChecked,
    UnknownValue,
    UnknownWords,
)
from mechdsl.diagnostics.syntax import BadArgument, NotSupported
from mechdsl.images.layouts import PromptPicture
from mechdsl.images.picture import MARKER, Picture, PictureChange
from mechdsl.program import spec
from mechdsl.program.images import IMAGE_SPAN, INSERTED_SPAN
from mechdsl.program.spec import CLEAN
from mechdsl.prompts.answers import (
    LabelNaming,
    drop_shared_token,
    moved_characters,
    output_text,
    shared_first_token,
    tokenise_texts,
)
from mechdsl.prompts.block import TEMPLATE, PromptsBlock, PromptsSpecs
from mechdsl.prompts.conventions import (
    check_empty_prompts,
    check_image_names,
    check_prompt_lengths,
    check_repeated_bos,
    check_unknown_words,
    image_conventions,
    noise_conventions,
    token_conventions,
)
from mechdsl.prompts.expressions import Constants, WordLookup
from mechdsl.prompts.positions.cells import resolve_positions
from mechdsl.prompts.positions.spans import SpanFinder
from mechdsl.prompts.rows import (
    BlockRows,
    BuiltRow,
    PromptTable,
    Row,
    RowContent,
    resolve_image_change,
)
from mechdsl.prompts.runs import (
    PositionCell,
    PromptRun,
    RunNoise,
    RunRow,
    SpanOccurrence,
    TextTokens,
    TokenMap,
    extend_row,
    trim_span,
)
from mechdsl.prompts.selection import (
    RowCollection,
    SplitPart,
    balanced_variables,
    count_rows_before_limit,
    equal_records_warning,
    exhausted_variables,
    expand_class_texts,
    no_effect_error,
    rows_convention,
    select_rows,
    select_rows_by_id,
    set_mean_images,
    unchanged_template_warnings,
)
from mechdsl.prompts.tokens.chat import ChatTemplate
from mechdsl.prompts.tokens.image_prompts import (
    ImagePromptTokenizer,
    prompt_pictures,
    stand_in_expansion,
)
from mechdsl.prompts.tokens.tokenizer import (
    EncodedText,
    ImageTokenizer,
    StandInImageTokenizer,
    TextTokenizer,
    image_row_fields,
)
from mechdsl.prompts.values import DrawKey, Refusal, TextSpan, TokenId
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk
from mechdsl.syntax.words import RESERVED
from mechdsl.vocab.corruptions import ActivationChange, TokenChange, changes_of_kind, patch_changes


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
    cells, problems = resolve_positions(at, table, run, tokenizer=tokenizer, side="source")
    if has_errors(problems):
        return old, problems
    rows: list[RunRow] = []
    lacking = 0
    for number, (row, text) in enumerate(zip(old.rows, texts, strict=True)):
        hits = [token for cell in cells for tokens in cell.hits[number] for token in tokens]
        token, problem = _find_token(change, row, text, tokenizer)
        if problem is not None:
            return old, [*problems, problem]
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
            return old, [*problems, _bad(at, at.span.written, reason, hint)]
        rows.append(made)
    if lacking:
        reason = f"is missing in {lacking} of {len(old.rows)} prompts"
        hint = "keep the prompts that have it with `where`, or name another position"
        return old, [*problems, _bad(at, at.span.written, reason, hint)]
    return replace(old, rows=tuple(rows)), problems


def _list_images(row: RunRow, tokenizer: TextTokenizer) -> list[tuple[int, int, list[int]]]:
    """Return the first token and the end of each image in a prompt, with the marks that its
    processor writes around it, and the tokens that read the image."""
    before, after = ((), ())
    if row.pictures and isinstance(tokenizer, ImagePromptTokenizer):
        before, after = tokenizer.image_marks
        if tokenizer.bos_after_images is not None:
            after = (*after, tokenizer.bos_after_images)
    images: list[tuple[int, int, list[int]]] = []
    for placed in row.whole_pictures:
        expansion = placed.picture.expansion
        first, end = placed.first, placed.first + len(expansion.ids)
        # A mark joined with the text next to it is a token of the text.
        for mark in reversed(before):
            first -= first > 0 and row.special[first - 1] and row.ids[first - 1] == mark
        for mark in after:
            end += end < len(row.ids) and row.special[end] and row.ids[end] == mark
        images.append((first, end, [placed.first + token for token in expansion.cell_of]))
    return images


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
    cells, problems = resolve_positions(at, table, run, tokenizer=tokenizer)
    if has_errors(problems):
        return old, problems
    last = all(
        len(row.ids) - 1 in {token for cell in cells for hit in cell.hits[n] for token in hit}
        for n, row in enumerate(old.rows)
    )
    if change.after is None or not last:
        reason = "isn't the end of the image, where its inserted tokens are"
        hint = f"write `insert {count.span.written} tokens after last token`: their order has no "
        return old, [_bad(at, at.span.written, reason, f"{hint}effect on the model")]
    return replace(old, rows=tuple(_lengthen(row, int(count.value)) for row in old.rows)), problems


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


def replace_tokens(
    table: PromptTable,
    run: str,
    at: ast.Positions,
    cell: PositionCell,
    text: str,
    tokenizer: TextTokenizer,
) -> PromptRun:
    """Replace the text of the hit tokens in a run and tokenise it again; answers stay the same.

    A span that `at` names is replaced once, the outermost span first: for a list, `fruits tokens`
    becomes one `thing`, with `item tokens` each item does. In the remaining hits, every span whose
    tokens are all hit is replaced, the innermost span first, then every other word.

    cell: one of the cells of `at`.
    """
    hits = [tuple(p for tokens in row for p in tokens) for row in cell.hits]
    return _replace_tokens(table, run, at, hits, [text] * len(hits), tokenizer)


def _change_tokens(
    kind: TokenChange,
    change: ast.ChangeLine,
    table: PromptTable,
    run: str,
    texts: Sequence[str],
    tokenizer: TextTokenizer,
) -> tuple[PromptRun, list[Diagnostic]]:
    """Replace or insert tokens of a run, with one text per row."""
    if isinstance(tokenizer, ImageTokenizer):
        return insert_image_tokens(table, run, change, tokenizer)
    if kind.inserts:
        return insert_tokens(table, run, change, texts, tokenizer)
    assert change.tokens is not None
    if has_inserted_tokens(table.runs[run]):
        reason = "tokenises the prompts again, which removes the inserted tokens"
        hint = "write it before `insert`"
        return table.runs[run], [
            BadArgument(span=change.span, name=kind.name, reason=reason, hint=hint)
        ]
    return replace_at_positions(table, run, change.tokens, texts, tokenizer)


def check_chat_markers(text: str, span: Span, tokenizer: TextTokenizer) -> MarkerInText | None:
    """Return E0553 for a text that would be a special token in a chat."""
    marker = None if tokenizer.chat is None else tokenizer.chat.marker_in(text)
    if marker is None:
        return None
    return MarkerInText(span=span, text=quote(text), marker=marker)


def replace_at_positions(
    table: PromptTable,
    run: str,
    at: ast.Positions,
    texts: Sequence[str],
    tokenizer: TextTokenizer,
) -> tuple[PromptRun, list[Diagnostic]]:
    """Replace the tokens at a position of the language, with one text per row; cells are joined."""
    cells, diagnostics = resolve_positions(at, table, run, tokenizer=tokenizer, side="source")
    if has_errors(diagnostics):
        return table.runs[run], diagnostics
    hits = [
        tuple(sorted({p for cell in cells for tokens in cell.hits[n] for p in tokens}))
        for n in range(len(table))
    ]
    return _replace_tokens(table, run, at, hits, texts, tokenizer), diagnostics


def _replace_tokens(
    table: PromptTable,
    run: str,
    at: ast.Positions,
    hits: Sequence[tuple[int, ...]],
    texts: Sequence[str],
    tokenizer: TextTokenizer,
) -> PromptRun:
    old = table.runs[run]
    named = [node.of for node in walk(at) if isinstance(node, ast.SpanTokens) and node.plural]
    spans = SpanFinder(table, run, tokenizer, [])  # errors have already been reported
    written = [
        _rewrite(row, _units(row, tokens, [p for ref in named for p in spans.places(n, ref)]), text)
        for n, (row, tokens, text) in enumerate(zip(old.rows, hits, texts, strict=True))
    ]
    # The moved token is appended again: as part of the text it might be tokenised differently.
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
            source=tokens.source,
            spans=spans,
        )
        rows.append(extend_row(new, table.moved, table.moved_text))
    return replace(old, rows=tuple(rows))


def _units(
    row: RunRow, hits: tuple[int, ...], named: Sequence[SpanOccurrence]
) -> list[tuple[int, int]]:
    """Return the character ranges to replace, from left to right, without overlaps.

    named: the spans that the position names.
    """
    tokens = TokenMap(row)
    left = {p for p in hits if not row.special[p]}
    units: list[tuple[int, int]] = []
    # Named spans first, then spans in the rest: an item before the list that contains it.
    others = [tokens.place(span.start, span.end) for span in row.spans]
    outermost = sorted(named, key=lambda place: place.start - place.end)
    for place in (*outermost, *sorted(others, key=lambda place: place.end - place.start)):
        if place.tokens and left.issuperset(place.tokens):
            units.append(trim_span(row.text, place.start, place.end))
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
) -> tuple[str, tuple[TextSpan, ...]]:
    """Return the text with every range replaced, and the spans at their new positions; spans inside
    a range are dropped."""
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
                # Inside a replaced range: the span covers the whole replacement.
                return start + shift + (len(new) if is_end else 0)
        return offset + shift

    spans = tuple(
        s._replace(start=moved(s.start, is_end=False), end=moved(s.end, is_end=True))
        for s in row.spans
        if not any(a <= s.start < s.end <= b and s.end - s.start < b - a for a, b in units)
    )
    return text, spans


def change_patches(
    table: PromptTable,
    run: str,
    change: ast.ChangeLine,
    number: int,
    rows: Sequence[Row],
    tokenizer: TextTokenizer,
) -> tuple[PromptRun, list[Diagnostic]]:
    """Blur, mask or add noise to patches of a run's images; cells are joined.

    Args:
        table: The table.
        run: The name of the run.
        change: The change.
        number: The number of the change, which seeds its noise.
        rows: The rows of the run.
        tokenizer: The tokenizer of images.

    Returns:
        The run; diagnostics E0207 and those of positions.
    """
    at, before = change.tokens, table.runs[run]
    assert at is not None
    cells, problems = resolve_positions(at, table, run, tokenizer=tokenizer)
    if has_errors(problems) or not isinstance(tokenizer, ImageTokenizer):
        return before, problems
    changed: list[RunRow] = []
    for place, (old, row) in enumerate(zip(before.rows, rows, strict=True)):
        tokens = sorted({t for cell in cells for hit in cell.hits[place] for t in hit})
        if any(tokenizer.layout.place(token) is None for token in tokens):
            reason, hint = "applies only to patches", "write `image tokens` for all of them"
            return before, [BadArgument(span=at.span, name=change.word, reason=reason, hint=hint)]
        try:
            made = resolve_image_change(row, change, number)
        except Refusal as refusal:
            return before, [refusal.diagnostic(row.describe())]
        changed.append(change_row_patches(old, made, tokens, tokenizer))
    return replace(before, rows=tuple(changed)), problems


def change_row_patches(
    row: RunRow, change: PictureChange, tokens: Sequence[int], reader: ImageTokenizer
) -> RunRow:
    """Return the row with its prepared image changed at some patches; the same row without any."""
    if not tokens or row.image is None:
        return row
    change = replace(change, patches=tuple(reader.layout.box(token) for token in tokens))
    image = replace(row.image, changes=(*row.image.changes, change))
    encoded = reader.encode_picture(image, inserted=len(row.ids) - reader.layout.tokens)
    return replace(row, image=image, text=image.text, ids=encoded.ids, offsets=encoded.offsets)


_FEWEST_ROWS = 5
"""Minimum number of rows that a check reads, whatever the number of runs."""


class BlockCompiler:
    """Compiles the prompts blocks of a file, each once for all tokenizers that give equal rows."""

    def __init__(
        self,
        blocks: PromptsSpecs | None = None,
        *,
        seed: int = 0,
        words: WordLookup | None = None,
        parameters: Constants | None = None,
        python: bool = False,
    ) -> None:
        """Start without compiled blocks.

        Args:
            blocks: All prompts of the file, for `from: pairs`.
            seed: The seed of draws and of the rows' order.
            words: The plain words of a model's tokenizer, by model name, for `words(MODEL)`.
            parameters: The file's parameters, as set.
            python: Whether functions of Python files may run.
        """
        self._blocks = blocks or {}
        self._seed = seed
        self._words = words
        self._parameters = parameters or {}
        self._python = python
        self._rows: dict[str, BlockRows] = {}
        """By `block_rows_key`."""

    def rows(self, prompts: spec.Prompts, tokenizer: TextTokenizer | None = None) -> BlockRows:
        """Return the rows of a block; those of chats and videos depend on the tokenizer."""
        key = block_rows_key(prompts, tokenizer)
        if key not in self._rows:
            block = PromptsBlock(
                prompts,
                seed=self._seed,
                words=self._words,
                parameters=self._parameters,
                blocks=self._blocks,
                python=self._python,
                chat=None if tokenizer is None else tokenizer.chat_for(prompts),
                joins_frames=joins_frames(prompts, tokenizer),
            )
            self._rows[key] = BlockRows(block)
        return self._rows[key]


@dataclass(frozen=True)
class RowSelection:
    """The rows of a block that a table contains."""

    limit: int | None = None
    """The maximum number of rows."""
    part: SplitPart | None = None
    """The part of a split."""
    ids: Sequence[int] | None = None
    """Numbers of the only rows to build; rows that `where` drops are missing."""
    prompts_enough: int | None = None
    """Number of prompts over all runs after which a check stops (W0790)."""
    used: Container[str] | None = None
    """The used corruptions: rows that one of them leaves unchanged are dropped. None: all."""

    def most(self, corruptions: int) -> int | None:
        """Return the number of rows after which a check stops; None for no limit."""
        if self.prompts_enough is None:
            return None
        return max(_FEWEST_ROWS, self.prompts_enough // (1 + corruptions))

    def select(self, rows: BlockRows, tokenizer: TextTokenizer) -> RowCollection:
        """Select the rows, with the diagnostics on them."""
        block = rows.block
        if self.ids is None:
            found = select_rows(
                rows,
                tokenizer,
                limit=self.limit,
                part=self.part,
                most=self.most(len(block.spec.corruptions)),
                used=self.used,
            )
        else:
            found = select_rows_by_id(rows, tokenizer, self.ids)
        if found.cut:
            unchecked = RowsNotChecked(
                span=block.spec.span,
                prompts=block.name,
                rows=len(found.rows),
                unit=block.spec.unit,
            )
            found.diagnostics.append(unchecked)
        if found.repeated:
            found.diagnostics.append(equal_records_warning(block, found))
        for corruption in block.spec.corruptions:
            if self.used is None or corruption.name in self.used:
                same = found.unchanged.get(corruption.name, Counter[int]())
                found.diagnostics += unchanged_template_warnings(
                    block, corruption, same, found.compared
                )
        return found


def build_table(
    prompts: spec.Prompts,
    tokenizer: TextTokenizer,
    blocks: BlockCompiler,
    selection: RowSelection,
    *,
    max_length: int | None = None,
    labels: LabelNaming = "none",
    writes: bool = False,
) -> tuple[PromptTable | None, list[Diagnostic]]:
    """Build the tokenised rows of a block with all its runs.

    Args:
        prompts: The block.
        tokenizer: The tokenizer of the model.
        blocks: The compiler of the file's blocks.
        selection: The rows to build.
        max_length: The maximum number of tokens that the model reads.
        labels: Whether answers and other texts name a classifier's outputs rather than tokens.
        writes: Whether models generate text after the prompts, which then contain no word of an
            answer.

    Returns:
        The table, None on an error; diagnostics E0202, E0305 to E0315 (positions of a corruption),
        E0501 to E0526, E0550 to E0553, W0701 to W0703, W0781, W0790, W0791.
    """
    tokenizer = tokenizer.reading(written=bool(prompts.chat))
    rows = blocks.rows(prompts, tokenizer)
    block = rows.block
    diagnostics = [*block.diagnostics, *_no_chat(prompts, tokenizer)]
    diagnostics += set_mean_images(block, tokenizer, selection.prompts_enough)
    if has_errors(diagnostics) or block.columns_unknown:
        return None, diagnostics
    found = selection.select(rows, tokenizer)
    diagnostics = list(dict.fromkeys([*block.diagnostics, *found.diagnostics]))
    if has_errors(diagnostics) or not found.rows:
        return None, diagnostics
    builder = _Builder(
        rows,
        tokenizer,
        max_length,
        labels=labels,
        whole=selection.prompts_enough is None,
        writes=writes,
        used=selection.used,
    )
    table = builder.table(found, selection.limit, selection.part)
    return (None if has_errors(builder.diagnostics) else table), [
        *diagnostics,
        *dict.fromkeys(builder.diagnostics),
    ]


def block_rows_key(prompts: spec.Prompts, tokenizer: TextTokenizer | None) -> str:
    """Return the cache key of a block's rows: its name, for a chat the template's digest, and for
    videos whether they have one marker.

    Other blocks have the same rows for every tokenizer.
    """
    parts = [prompts.name]
    if tokenizer is None:
        return prompts.name
    if prompts.chat and (chat := tokenizer.chat_for(prompts)) is not None:
        parts.append(chat.digest)
    if joins_frames(prompts, tokenizer):
        parts.append("video")
    return " ".join(parts)


def joins_frames(prompts: spec.Prompts, tokenizer: TextTokenizer | None) -> bool:
    """Return whether a video processor reads the videos of a block, each with one marker."""
    has_videos = any(picture.is_video for picture in prompts.pictures)
    return has_videos and tokenizer is not None and tokenizer.reads_videos


def _no_chat(prompts: spec.Prompts, tokenizer: TextTokenizer) -> list[Diagnostic]:
    """Return E0550 or E0551 if no valid template formats the turns of a chat."""
    if not prompts.chat or tokenizer.stands_in:
        return []
    span = prompts.chat[0].span
    if tokenizer.chat is None:
        return [NoChatTemplate(span=span)]
    problem = tokenizer.chat.problem
    if problem is None:
        return list(_unread_arguments(prompts, tokenizer.chat))
    return [BadChatTemplate(span=span, reason=problem.reason, hint=problem.hint)]


def _unread_arguments(prompts: spec.Prompts, chat: ChatTemplate) -> Iterator[Diagnostic]:
    """Yield E0207 for arguments of a chat that the template doesn't read."""
    for argument in prompts.chat_arguments:
        if argument.name in chat.variables:
            continue
        known = sorted(chat.variables)
        listed = f"it reads {name_list(known)}" if known else "it reads none; remove the line"
        yield BadArgument(
            span=argument.span,
            name=argument.name,
            reason="isn't a variable that the model's chat template reads",
            hint=did_you_mean(argument.name, known, listed),
        )


_STAND_IN_FRAMES = 16
"""Frames of a video whose folder isn't read."""

_NO_PICTURES: Mapping[str, PromptPicture] = MappingProxyType({})
"""Shared by all rows without images."""


@dataclass
class _Builder:
    """The tokenisation of one block's rows."""

    rows: BlockRows
    tokenizer: TextTokenizer
    max_length: int | None
    texts: bool = True
    """Whether answers and other texts are tokenised."""
    labels: LabelNaming = "none"
    """Whether the texts name a classifier's outputs, which aren't tokenised."""
    writes: bool = False
    used: Container[str] | None = None
    """The corruptions whose unchanged rows are dropped; None: all."""
    whole: bool = True
    """Whether standard deviations use all rows before `limit`, as in a run, or the table's rows."""

    def __post_init__(self) -> None:
        self.block = self.rows.block
        self.diagnostics: list[Diagnostic] = []

    def table(self, found: RowCollection, limit: int | None, part: SplitPart | None) -> PromptTable:
        table, unchanged = self.runs(found.rows)
        unchanged = {name: rows.total() for name, rows in found.unchanged.items()} | unchanged
        left_out = {name: count for name, count in unchanged.items() if self._uses(name)}
        conventions = rows_convention(self.block, found, len(table), limit, part, left_out)
        conventions |= token_conventions(self.block, table, self.tokenizer)
        if not has_errors(self.diagnostics):
            if self.max_length is not None:
                self.diagnostics += check_prompt_lengths(self.block, table, self.max_length)
            table = self._with_noise(table, found)
        conventions |= insertion_conventions(self.block)
        conventions |= noise_conventions(table) | image_conventions(table)
        classes, problems = expand_class_texts(self.block, self.rows[found.rows[0].id])
        self.diagnostics += problems
        python = self.block.calls.functions
        rounds = found.tried >= self.block.combinations and part is None
        return replace(
            table,
            conventions=conventions,
            python=python,
            cut=found.cut,
            dealt=balanced_variables(self.block, table.sources) if rounds else (),
            exhausted=exhausted_variables(self.block, table.sources),
            whole=rounds and not self.block.draws,
            unchanged=frozenset(unchanged),
            changed_by=tuple(sorted(left_out)),
            classes=classes,
        )

    def _uses(self, corruption: str) -> bool:
        return self.used is None or corruption in self.used

    # --- tokenisation -----------------------------------------------------------------------------

    def runs(self, made: Sequence[BuiltRow]) -> tuple[PromptTable, dict[str, int]]:
        """Return the table without noise, and per corruption the number of rows left unchanged."""
        prompts = self.tokenizer.encode_unique(m.clean.prompt.text for m in made)
        texts = {CLEAN: self._texts(CLEAN, [m.clean for m in made], made, prompts)}
        for place, corruption in enumerate(self.block.spec.corruptions):
            rows = [m.corrupted[place] for m in made]
            texts[corruption.name] = self._texts(corruption.name, rows, made, prompts)
        every = [
            tokens
            for run in texts.values()
            for row in run
            for name, tokens in row.items()
            if not self.block.is_token_id(name)
        ]
        words = not self.writes
        moved = shared_first_token(every, self.tokenizer, words=words) if every else ()
        runs = {CLEAN: self._run(CLEAN, [m.clean for m in made], texts[CLEAN], moved, prompts)}
        for place, corruption in enumerate(self.block.spec.corruptions):
            rows = [m.corrupted[place] for m in made]
            changed = self.tokenizer.encode_unique(row.prompt.text for row in rows)
            run = self._run(corruption.name, rows, texts[corruption.name], moved, changed)
            runs[corruption.name] = run
        table = PromptTable(
            name=self.block.name,
            row_ids=tuple(m.id for m in made),
            row_keys=tuple(m.key for m in made),
            runs=runs,
            data_hash=self.block.data.digest if self.block.data else "",
            moved=moved,
            moved_text=self._moved_text(made, moved),
            block_rows=self.rows,
        )
        table = replace(
            table,
            runs={
                name: replace(
                    run, rows=tuple(extend_row(r, table.moved, table.moved_text) for r in run.rows)
                )
                for name, run in runs.items()
            },
        )
        return self._apply_token_changes(table, made)

    def _texts(
        self,
        run: str,
        rows: Sequence[RowContent],
        made: Sequence[BuiltRow],
        encoded: Mapping[str, EncodedText],
    ) -> list[dict[str, TextTokens]]:
        """Return the named texts of a run's rows, tokenised after the clean prompts."""
        prompts = [m.clean.prompt.text for m in made]
        out: list[dict[str, TextTokens]] = [{} for _ in rows]
        for definition in self.block.spec.texts if self.texts else ():
            name = definition.name
            place = list(self.block.texts).index(name)
            texts: list[str | TokenId] = [row.texts[place] for row in rows]
            if self.labels != "none":
                for row, text in zip(out, texts, strict=True):
                    row[name] = output_text(text, self.labels)
                continue
            tokens, diagnostics = tokenise_texts(
                prompts,
                texts,
                self.tokenizer,
                name=name,
                span=definition.value.span,
                encoded=encoded,
            )
            # Problems of the clean text aren't reported again for the corrupted text.
            reported = {(d.code, d.span) for d in self.diagnostics}
            self.diagnostics += [d for d in diagnostics if (d.code, d.span) not in reported]
            for row, token in zip(out, tokens, strict=True):
                row[name] = token
        return out

    def _moved_text(self, made: Sequence[BuiltRow], moved: tuple[int, ...]) -> str:
        """Return the characters of the moved token, including white space before it."""
        if not moved:
            return ""
        ids = map(self.block.is_token_id, self.block.texts)
        prompt = made[0].clean.prompt.text
        text = next(str(text) for text, id in zip(made[0].clean.texts, ids, strict=True) if not id)
        return moved_characters(prompt, text, moved, self.tokenizer)

    def _run(
        self,
        name: str,
        rows: Sequence[RowContent],
        texts: Sequence[Mapping[str, TextTokens]],
        moved: tuple[int, ...],
        prompts: Mapping[str, EncodedText],
    ) -> PromptRun:
        riches = [row.prompt for row in rows]
        encoded = [prompts[rich.text] for rich in riches]
        self.diagnostics += check_empty_prompts(self.block, name, riches)
        if not any(isinstance(d, ImageNameAsText) for d in self.diagnostics):
            self.diagnostics += check_image_names(self.block, self.tokenizer, name, riches)
        if self.block.name != spec.NO_PROMPTS and not any(
            isinstance(d, UnknownWords | NoTokenFor) for d in self.diagnostics
        ):
            # Reported once, for the first run that has them.
            self.diagnostics += check_unknown_words(
                self.block, self.tokenizer, name, riches, encoded
            )
        if not any(isinstance(each, RepeatedBos) for each in self.diagnostics):
            self.diagnostics += check_repeated_bos(self.block, self.tokenizer, name, encoded)
        out: list[RunRow] = []
        for row, rich, tokens, own in zip(rows, riches, encoded, texts, strict=True):
            kept = own
            if moved:
                kept = {
                    key: text
                    if self.block.is_token_id(key)
                    else drop_shared_token(text, moved) or text
                    for key, text in own.items()
                }
            out.append(
                RunRow(
                    text=rich.text,
                    ids=tokens.ids,
                    offsets=tokens.offsets,
                    special=tokens.special,
                    source=tokens.source,
                    spans=rich.spans,
                    values=row.values,
                    texts=kept,
                    **image_row_fields(row.image, row.regions, self.tokenizer),
                    pictures=prompt_pictures(
                        row.pictures, row.parts, self.tokenizer, tokens.ids, rich.text
                    )
                    if row.pictures
                    else _NO_PICTURES,
                )
            )
        return PromptRun(name, tuple(out), chat=bool(self.block.spec.chat))

    # --- token changes of corruptions ----------------------------------------------------------

    def _apply_token_changes(
        self, table: PromptTable, made: Sequence[BuiltRow]
    ) -> tuple[PromptTable, dict[str, int]]:
        """Apply `replace item tokens with "thing"` and patch changes of corruptions.

        Rows that a used corruption leaves unchanged are dropped.
        """
        unchanged_rows: dict[str, int] = {}
        keep = [True] * len(table)
        runs = dict(table.runs)
        for corruption in self.block.spec.corruptions:
            changes = changes_of_kind(TokenChange, corruption.changes)
            for kind, change in changes:
                texts = self._new_texts(corruption, change, kind.text(change), made)
                current = replace(table, runs=runs)
                run, diagnostics = _change_tokens(
                    kind, change, current, corruption.name, texts, self.tokenizer
                )
                self.diagnostics += diagnostics
                runs[corruption.name] = run
            patches = patch_changes(corruption.changes)
            for number, (_, change) in enumerate(patches, len(corruption.changes)):
                current = replace(table, runs=runs)
                rows = [self.rows.corrupted(self.rows[m.id], corruption) for m in made]
                runs[corruption.name], diagnostics = change_patches(
                    current, corruption.name, change, number, rows, self.tokenizer
                )
                self.diagnostics += diagnostics
            if (changes or patches) and not changes_of_kind(ActivationChange, corruption.changes):
                pairs = zip(runs[corruption.name].rows, runs[CLEAN].rows, strict=True)
                same = [
                    corrupted.text == clean.text and len(corrupted.ids) == len(clean.ids)
                    for corrupted, clean in pairs
                ]
                if all(same) and not has_errors(self.diagnostics):
                    self.diagnostics.append(no_effect_error(corruption, self.block))
                elif any(same):
                    unchanged_rows[corruption.name] = sum(same)
                    if not self._uses(corruption.name):
                        continue
                    keep = [k and not s for k, s in zip(keep, same, strict=True)]
                    templates = [m.template for m in made]
                    unchanged = Counter(compress(templates, same))
                    self.diagnostics += unchanged_template_warnings(
                        self.block, corruption, unchanged, Counter(templates)
                    )
        runs = {
            name: replace(run, rows=tuple(compress(run.rows, keep))) for name, run in runs.items()
        }
        table = replace(
            table,
            row_ids=tuple(compress(table.row_ids, keep)),
            row_keys=tuple(compress(table.row_keys, keep)),
            runs=runs,
        )
        return table, unchanged_rows

    def _new_texts(
        self,
        corruption: spec.Corruption,
        change: ast.ChangeLine,
        text: ast.Expr | None,
        made: Sequence[BuiltRow],
    ) -> list[str]:
        """Return the replacement text of each row's tokens; empty ones for tokens of images."""
        if text is None:
            return [""] * len(made)
        texts: list[str] = []
        for m in made:
            row = self.rows.corrupted(self.rows[m.id], corruption)
            try:
                new = row.as_text(text, DrawKey(f"{corruption.name}:{change.word}"))
            except Refusal as refusal:
                self.diagnostics.append(refusal.diagnostic(row.describe()))
                return [""] * len(made)
            texts.append(new if isinstance(new, str) else self.tokenizer.token_text(new.id))
        if self.block.spec.chat:
            markers = (
                check_chat_markers(new, text.span, self.tokenizer) for new in dict.fromkeys(texts)
            )
            self.diagnostics += [problem for problem in markers if problem is not None][:1]
        return texts

    def _with_noise(self, table: PromptTable, row_collection: RowCollection) -> PromptTable:
        corruptions = self.block.spec.corruptions
        if not any(changes_of_kind(ActivationChange, c.changes) for c in corruptions):
            return table

        table, diagnostics = add_noise(
            table,
            self.block,
            self.tokenizer,
            lambda run: self._before_limit(row_collection, table, run),
        )
        self.diagnostics += diagnostics
        return table

    def _before_limit(
        self, row_collection: RowCollection, table: PromptTable, run: str
    ) -> PromptTable:
        """Return the rows of a run before `limit` and `split`, without their texts."""
        if not self.whole or (row_collection.complete and self.block.spec.split is None):
            return table
        corruption = next(c for c in self.block.spec.corruptions if c.name == run)
        rows = self.rows.only(corruption)
        block = rows.block
        more = select_rows(rows, self.tokenizer, limit=count_rows_before_limit(block))
        if not more.rows:
            return table
        return _Builder(rows, self.tokenizer, None, texts=False).runs(more.rows)[0]


def add_noise(
    table: PromptTable,
    block: PromptsBlock,
    tokenizer: TextTokenizer,
    before_limit: Callable[[str], PromptTable],
) -> tuple[PromptTable, list[Diagnostic]]:
    """Add the noise of a block's corruptions to the table.

    before_limit: returns the table of all rows of a run, over whose tokens one `sd` is computed.
    """
    diagnostics: list[Diagnostic] = []
    runs = dict(table.runs)
    for corruption in block.spec.corruptions:
        changes = changes_of_kind(ActivationChange, corruption.changes)
        for _, second in changes[1:]:
            what = "more than one noise in a corruption"
            diagnostics.append(NotSupported(span=second.span, what=what))
        for kind, change in changes[:1]:
            added = kind.noise(change, block.parameters)
            at, run = change.at, corruption.name
            assert at is not None
            noise = RunNoise(
                added.site,
                _joined(at, table, run, tokenizer, diagnostics),
                added.std,
                added.sds,
                samples=added.samples,
                kind=added.kind,
            )
            if noise.sds is not None and not has_errors(diagnostics):
                over = at if added.sd_of is None else _tokens_of(added.sd_of)
                every = before_limit(run)
                positions = _joined(over, every, run, tokenizer, diagnostics)
                noise = replace(noise, **_tokens_there(every.runs[run].rows, positions))
            runs[run] = replace(runs[run], noise=noise)
    return replace(table, runs=runs), diagnostics


def _joined(
    at: ast.Positions,
    table: PromptTable,
    run: str,
    tokenizer: TextTokenizer,
    diagnostics: list[Diagnostic],
) -> tuple[tuple[int, ...], ...]:
    """Return the union of all positions per row."""
    cells, hits = resolve_positions(at, table, run, tokenizer=tokenizer, side="source")
    diagnostics += hits
    return tuple(
        tuple(sorted({p for cell in cells for tokens in cell.hits[n] for p in tokens}))
        for n in range(len(table))
    )


def _tokens_of(quantity: ast.Quantity) -> ast.Positions:
    """Return the position of the tokens in `3 sd of subject`."""
    span = quantity.span
    tokens = ast.SpanTokens(ast.SpanRef(name=quantity.of, span=span), plural=True, span=span)
    return ast.Positions((ast.Position(ast.Point(tokens, span=span), span=span),), span=span)


class _SdTokens(TypedDict, total=False):
    """The tokens that one standard deviation is computed over."""

    sd_tokens: tuple[int, ...]
    sd_images: tuple[tuple[RunRow, tuple[int, ...]], ...]


def _tokens_there(rows: Sequence[RunRow], positions: Sequence[tuple[int, ...]]) -> _SdTokens:
    """Return the tokens at positions of all rows, with repetition."""
    places = [*zip(rows, positions, strict=True)]
    if all(row.image is None for row in rows):
        return {"sd_tokens": tuple(row.ids[p] for row, hits in places for p in hits)}
    tokens = (stable_hash("sd", row.ids[p], p) >> 66 for row, hits in places for p in hits)
    return {
        "sd_tokens": tuple(tokens),
        "sd_images": tuple((row, hits) for row, hits in places if hits),
    }


_NAME = re.compile(r"(?!L\d+([HN]\d+)?$)[A-Za-z_]\w*")
"""Names that placeholders accept; columns may have any name."""

_SHOWN = limits.TEXT // (2 * limits.NAME)
"""Maximum number of names in the prompt, whose text has a limit too."""

_PIECE = re.compile(rf"{MARKER.pattern}|\s?\w+|\s?[^\w\s\u27e6\u27e7]+|\s+|[\u27e6\u27e7]")
"""A word or sign with the space before it: most words are one token in most tokenizers. The marker
of an image stands for all of its tokens."""

_BOS = 0


class StandInTokenizer(TextTokenizer):
    """A stand-in tokenizer: tokens are words and signs after a first token; it knows every word."""

    stands_in = True

    def __init__(self) -> None:  # pyright: ignore[reportMissingSuperCall]
        self.roles = {"bos": "<s>"}
        self.bos = None
        self.hash = ""
        self.name = ""
        self._ids: dict[str, int] = {self.roles["bos"]: _BOS}
        self._texts: list[str] = [self.roles["bos"]]

    @property
    def vocab_size(self) -> int:
        return 1 << 62

    @cached_property
    def role_ids(self) -> dict[str, int]:
        return {"bos": _BOS}

    @cached_property
    def unknown_id(self) -> int | None:
        return None

    @cached_property
    def _splits_at_spaces(self) -> bool:
        return False

    def token_text(self, token: int) -> str:
        return self._texts[token] if token < len(self._texts) else f"<{token}>"

    def plain_words(self) -> list[str]:
        return [f"word{a}{b}" for a in ascii_lowercase for b in ascii_lowercase]

    def _raw(self, texts: Sequence[str], add_special: bool = False) -> list[EncodedText]:
        return [self._encoded(text, add_special) for text in texts]

    def _encoded(self, text: str, add_special: bool) -> EncodedText:
        matches = list(_PIECE.finditer(text))
        count = len(stand_in_expansion().ids)
        matches = [
            piece
            for piece in matches
            for _ in range(count if MARKER.fullmatch(piece.group()) else 1)
        ]
        ids = [self._id(piece.group()) for piece in matches]
        offsets = [piece.span() for piece in matches]
        if add_special:
            ids, offsets = [_BOS, *ids], [(0, 0), *offsets]
        special = (add_special, *(False for _ in matches))[0 if add_special else 1 :]
        return EncodedText(tuple(ids), tuple(offsets), tuple(special))

    def _id(self, text: str) -> int:
        number = self._ids.setdefault(text, len(self._texts))
        if number == len(self._texts):
            self._texts.append(text)
        return number


def stand_in_table(block: PromptsBlock, tokenizer: TextTokenizer) -> PromptTable:
    """Return a table with one row for a block whose rows can't be built.

    Every name of the block has its name as value and is a span in the prompt. The runs are those of
    the block.
    """
    at = block.spec.span
    constant = {*block.parameters, *block.texts, "true", "false", TEMPLATE, *RESERVED}
    lacking = (d.name for d in block.diagnostics if isinstance(d, UnknownValue))  # reported
    roles = (turn.role for turn in block.spec.chat)
    unnamed = [] if block.spec.tiles is None else [IMAGE_SPAN]
    pictures = {picture.name for picture in (*block.spec.pictures, *block.spec.regions)}
    columns = [
        *(name for name in block.names() if name not in pictures),
        *unnamed,
        *roles,
        *(span.name.id for span in block.spec.spans),
        *lacking,
        *_list_placeholders(block),
        *(region.name for region in block.spec.regions if block.spec.kind != "images"),
        INSERTED_SPAN,
    ]
    known = (n for n in dict.fromkeys(columns) if n not in constant)
    names = [n for n in known if len(n) <= limits.NAME and _NAME.fullmatch(n)]
    images = [picture.name for picture in block.spec.pictures if picture.name not in constant]
    shown = [*names[:_SHOWN], *images]

    def text(value: str) -> ast.String:
        return ast.String(value, span=at)

    made = spec.Prompts(
        span=at,
        name=block.name,
        values=tuple(
            spec.Value(span=at, names=(name,), domain=ast.Domain(text(name), span=at))
            for name in names
        ),
        pictures=tuple(
            picture.model_copy(update={"value": _gray_frames(picture)})
            for picture in block.spec.pictures
            if picture.name in images
        ),
        templates=(text(" ".join(f"{{{name}}}" for name in shown) or "word"),),
        texts=tuple(spec.TextDef(span=at, name=name, value=text(" word")) for name in block.texts),
    )
    table, _ = build_table(made, tokenizer, BlockCompiler(), RowSelection(limit=1))
    assert table is not None
    table = replace(table, columns_unknown=block.columns_unknown)
    return add_stand_in_runs(table, [corruption.name for corruption in block.spec.corruptions])


_OPENED = re.compile(r"(?<!\{)(?:\{\{)*\{\s*([^\W\d]\w*)(?![\w(])")
"""The start of a placeholder that begins with a name."""


def _list_placeholders(block: PromptsBlock) -> Iterator[str]:
    """Yield the names that begin placeholders of the templates, also of placeholders with errors,
    whose spans aren't known; those of images aren't texts."""
    pictures = {picture.name for picture in block.spec.pictures}
    for template in block.templates:
        for text in template.texts:
            yield from (each for each in _OPENED.findall(text.span.written) if each not in pictures)


def _gray_frames(picture: spec.PictureDef) -> ast.Expr:
    """Return a gray image, silence, or a list of the number of a video's frames."""
    at, value = picture.span, picture.value
    if picture.is_sound:
        return ast.Name("silence", span=at)
    gray = ast.Name("gray", span=at)
    if not picture.is_video:
        return gray
    count = len(value.items) if isinstance(value, ast.ListLiteral) else _STAND_IN_FRAMES
    return ast.ListLiteral((gray,) * count, span=at)


def stand_in_images(table: PromptTable, reader: StandInImageTokenizer) -> PromptTable:
    """Return a stand-in for a table of images: every row is a gray image with an inserted token."""
    gray = Picture("gray")
    tokens = reader.encode_picture(gray, inserted=1)
    runs = {
        name: replace(
            run,
            rows=tuple(
                replace(
                    row,
                    text=gray.text,
                    ids=tokens.ids,
                    offsets=tokens.offsets,
                    special=tokens.special,
                    spans=(),
                    image=gray,
                    places={**reader.places(), INSERTED_SPAN: ((len(tokens.ids) - 1,),)},
                )
                for row in run.rows
            ),
        )
        for name, run in table.runs.items()
    }
    return replace(table, runs=runs)


def add_stand_in_runs(table: PromptTable, names: Iterable[str]) -> PromptTable:
    """Add copies of the clean run under the names that the table lacks."""
    clean = table.runs[CLEAN]
    runs = {name: replace(clean, name=name) for name in names}
    return replace(table, runs={**runs, **table.runs}, stands_in=True)
