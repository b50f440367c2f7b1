"""Runs from another prompts block, and prompts that continue with replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, compress, pairwise

from mechdsl.base.hashing import stable_hash
from mechdsl.base.records import Record
from mechdsl.base.text import Span, count_noun, quote
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.prompts import EndingMismatch, PartnerMissing, RowsNotPaired
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.images.layouts import PromptPicture
from mechdsl.program.python_functions import PythonFunction
from mechdsl.program.spec import CLEAN
from mechdsl.prompts.answers import (
    answer_context,
    drop_shared_token,
    moved_characters,
    shared_first_token,
    tokenise_texts,
)
from mechdsl.prompts.block import PromptsBlock
from mechdsl.prompts.conventions import token_conventions
from mechdsl.prompts.rows import BlockRows, PromptTable
from mechdsl.prompts.runs import PromptRun, ReplySpan, RunRow, TextTokens, extend_row
from mechdsl.prompts.selection import select_rows
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.vocab.metrics import Reply

TableBuilder = Callable[[Sequence[int]], tuple[PromptTable | None, list[Diagnostic]]]
"""Row numbers → the other block's table of these rows."""


class PairedRun(Record):
    """A run of another prompts block, and the rule that paired its rows."""

    run: PromptRun
    how: str
    python: tuple[PythonFunction, ...] = ()
    """Functions of Python files that computed its values."""
    data_hash: str = ""


def pair_run(
    table: PromptTable,
    block: PromptsBlock,
    others: BlockRows,
    run: str,
    *,
    name: str,
    tokenizer: TextTokenizer,
    build: TableBuilder,
    span: Span,
    shuffled: bool = False,
) -> tuple[PairedRun | None, list[Diagnostic]]:
    """Build a run of another block with one row for each row of the table.

    The partner is the other block's only row, the row with the same number or, if `shuffled`, a row
    assigned by a seeded shuffle.

    Returns:
        The run, None on an error; diagnostics E0207, E0527 to E0529 and those of the other block.
    """
    other = others.block
    single = _single(others, block, tokenizer)
    unfit = _check_pairing(block, other, span, single=single is not None, shuffled=shuffled)
    if unfit is not None:
        return None, [unfit]
    wanted = [single] * len(table) if single is not None else list(table.row_ids)
    if shuffled:
        places = [block.place_of(number) for number in table.row_ids]
        wanted = [*map(other.in_file, deal_rows(places, block.seed, block.name, other.name))]
    prompt_table, diagnostics = build(list(dict.fromkeys(wanted)))
    if has_errors(diagnostics):
        return None, diagnostics
    there = (
        {} if prompt_table is None else {number: n for n, number in enumerate(prompt_table.row_ids)}
    )
    lacking = [number for number in wanted if number not in there]
    if prompt_table is None or lacking:
        return None, [*diagnostics, _missing(lacking, block, other, len(table), span)]
    if _ends_otherwise(prompt_table, table):
        return None, [
            *diagnostics,
            EndingMismatch(
                span=span,
                other=other.name,
                prompts=block.name,
                theirs=_ending(prompt_table),
                own=_ending(table),
            ),
        ]
    index = [there[number] for number in wanted]
    how = "paired by row number with those"
    how = how if single is None else "its only row, paired with each row"
    how = "paired by a seeded shuffle with those" if shuffled else how
    there_run = _aligned(prompt_table, table, run, name, index)
    if single is not None and block.spec.regions and not other.spec.regions:
        there_run, has_regions = _with_regions(there_run, table)
        if has_regions:
            how = "its only row, with the regions of each paired row, paired with those"
    return PairedRun(there_run, how, prompt_table.python, prompt_table.data_hash), diagnostics


def _check_pairing(
    own: PromptsBlock, other: PromptsBlock, span: Span, *, single: bool, shuffled: bool
) -> Diagnostic | None:
    """Check that rows of two blocks can be paired; single: whether the other block has one row."""
    if shuffled and single:
        reason = f"has nothing to shuffle: `{other.name}` has one row"
        hint = "remove it: the single row is used for all rows"
        return BadArgument(span=span, name="shuffled", reason=reason, hint=hint)
    if single:
        return None
    if _cut(other) != _cut(own):
        reason = f"are {_cut(other) or 'whole'}, and those of `{own.name}` {_cut(own) or 'whole'}"
        hint = "write the same `tiles` in both blocks, or take a block of one image"
        return BadArgument(
            span=span, name=other.name, reason=f"has images that {reason}", hint=hint
        )
    if other.combinations == own.combinations:
        return None
    return RowsNotPaired(
        span=span,
        other=other.name,
        prompts=own.name,
        others=other.combinations,
        rows=own.combinations,
        hint=_pairing(own, other),
    )


def deal_rows(rows: Sequence[int], seed: int, name: str, other: str) -> list[int]:
    """Assign to each row of `name` a row of `other` with the same set of numbers, each used once.

    Both sides are sorted by a hash of the row number alone. A number is the row's rank by content
    within its block, so the order of a data file changes no pair.
    """
    ours = sorted(rows, key=lambda row: stable_hash(seed, name, other, "to", row))
    theirs = sorted(rows, key=lambda row: stable_hash(seed, name, other, "dealt", row))
    pairs = dict(zip(ours, theirs, strict=True))
    return [pairs[row] for row in rows]


def _single(others: BlockRows, block: PromptsBlock, tokenizer: TextTokenizer) -> int | None:
    """Return the number of the block's row if it has exactly one."""
    other = others.block
    if other.combinations == 1 and not (other.draws and block.combinations == 1):
        return 0
    if other.combinations != block.combinations and other.spec.where and not other.draws:
        rows = select_rows(others, tokenizer, limit=2).rows
        return rows[0].id if len(rows) == 1 else None
    return None


def _missing(
    lacking: Sequence[int], block: PromptsBlock, other: PromptsBlock, total: int, span: Span
) -> PartnerMissing:
    where = other.spec.where
    by_where = f"by `where {where[0].span.written}`" if where else "its tokens are left unchanged"
    hint = "make their values the same, so that all rows have a partner"
    if where:
        hint = f"write the same `where` in `{block.name}`"
    return PartnerMissing(
        span=span,
        other=other.name,
        prompts=block.name,
        lacking=len(lacking),
        total=total,
        row=lacking[0],
        reason=by_where,
        hint=hint,
    )


def _cut(block: PromptsBlock) -> str:
    """Return the tiles that the block cuts its images into; empty if it doesn't."""
    return "" if block.spec.tiles is None else block.spec.tiles.words


def _pairing(block: PromptsBlock, other: PromptsBlock) -> str:
    """Return a hint on how to pair the rows of two blocks."""
    if block.combinations == 1:
        served = f"then the single row of `{block.name}` is paired with all of them"
        return f"write `{other.spec.kind} {other.name}` in the experiment: {served}"
    values = f"the values of `{block.name}`, so that rows are paired by number"
    return f"give `{other.name}` a single row, which is paired with all of them, or {values}"


def _has_texts(table: PromptTable) -> bool:
    return any(row.texts for row in table.runs[CLEAN].rows[:1])


def _ends_otherwise(prompt_table: PromptTable, table: PromptTable) -> bool:
    """Return whether only one table's prompts end with the token that all answers share."""
    return prompt_table.moved != table.moved and _has_texts(prompt_table) and _has_texts(table)


def _ending(table: PromptTable) -> str:
    return quote(table.moved_text) if table.moved else "no token that all answers begin with"


def _aligned(
    prompt_table: PromptTable, table: PromptTable, run: str, name: str, index: Sequence[int]
) -> PromptRun:
    """Return the run with the other table's rows in this table's order."""
    there = prompt_table.runs[run]
    rows = there.rows
    if not _has_texts(
        prompt_table
    ):  # answers then continue these rows as they do the table's prompts
        rows = tuple(extend_row(row, table.moved, table.moved_text) for row in rows)
    noise = there.noise
    if noise is not None:
        noise = replace(
            noise,
            positions=tuple(noise.positions[i] for i in index),
            row_keys=tuple(prompt_table.row_keys[i] for i in index),
        )
    return PromptRun(
        name, tuple(rows[i] for i in index), noise, prompts=prompt_table.name, chat=there.chat
    )


def _with_regions(run: PromptRun, table: PromptTable) -> tuple[PromptRun, bool]:
    """Give the images of the one row the table's regions; returns whether it has any then.

    In each row, `object tokens` are then the object's positions in the row's own image.
    """
    rows: list[RunRow] = []
    for row, paired in zip(run.rows, table.runs[CLEAN].rows, strict=True):
        pictures = _with_picture_regions(row, paired)
        rows.append(replace(row, places={**paired.places, **row.places}, pictures=pictures))
    has_regions = any(row.places or _region_names(row) for row in rows)
    return replace(run, rows=tuple(rows)), has_regions


def _region_names(row: RunRow) -> set[str]:
    return {name for picture in row.pictures.values() for name in picture.regions}


def _with_picture_regions(row: RunRow, paired: RunRow) -> Mapping[str, PromptPicture]:
    """Return the images of a prompt with the regions of those of the same name in another prompt,
    if their tokens have the same rows and columns, and no other image is equal."""
    pictures = dict(row.pictures)
    for picture in row.whole_pictures:
        marker = picture.picture.picture.marker
        equal = {each.name for each in row.whole_pictures if each.picture.picture.marker == marker}
        for other in paired.whole_pictures:
            alike = picture.picture.expansion.labels == other.picture.expansion.labels
            if equal == {other.name} and other.picture.regions and alike:
                regions = {**other.picture.regions, **picture.picture.regions}
                pictures[marker] = replace(picture.picture, regions=regions)
    return pictures


REPLY_PLACEHOLDER = "…"
"""The text of a token that isn't known yet."""


def remove_replies(table: PromptTable) -> PromptTable:
    """Return the prompts without replies."""
    return table.alone or table


def add_stand_in_replies(table: PromptTable, said: str, tokens: int) -> PromptTable:
    """Append `tokens` placeholder tokens to every prompt, for the checks before replies exist.

    Args:
        table: The prompts.
        said: The source of the replies.
        tokens: The number of tokens per prompt.
    """

    def longer(row: RunRow) -> RunRow:
        return _longer(row, row.ids[-1:] * tokens, [REPLY_PLACEHOLDER] * tokens, "")

    runs = {
        name: replace(run, rows=tuple(map(longer, run.rows))) for name, run in table.runs.items()
    }
    words = (
        f"up to {count_noun(tokens, 'token')} after each prompt, {said}: known only after that run"
    )
    conventions = {**table.conventions, "replies": words}
    return replace(table, runs=runs, alone=table, replies_of=said, conventions=conventions)


def add_replies(
    table: PromptTable, replies: Mapping[int, Reply], tokenizer: TextTokenizer, said: str
) -> tuple[PromptTable, list[Diagnostic]]:
    """Select the rows that have a reply and append it to the prompts of all runs.

    Answers and the block's other texts are tokenised again as continuations of the replies.

    Args:
        table: The prompts.
        replies: Row id to reply.
        tokenizer: The tokenizer of the model.
        said: The source of the replies.

    Returns:
        The table, and the diagnostics of `tokenise_texts`.
    """
    keep = [row in replies for row in table.row_ids]
    own = [replies[row] for row in table.row_ids if row in replies]
    runs = {name: _run(run, keep, own, tokenizer) for name, run in table.runs.items()}
    lengths = [len(reply.ids) for reply in own]
    low, high = min(lengths, default=0), max(lengths, default=0)
    tokens = count_noun(high, "token") if low == high else f"{low} to {count_noun(high, 'token')}"
    words = f"after each prompt, {said}: {tokens}, the same in all runs"
    if len(own) < len(table):
        words += (
            f"; {len(table) - len(own):,} of {len(table):,} rows have no reply and are excluded"
        )
    longer = replace(
        table,
        row_ids=tuple(compress(table.row_ids, keep)),
        row_keys=tuple(compress(table.row_keys, keep)),
        runs=runs,
        alone=table,
        replies_of=said,
        moved=(),
        moved_text="",
        dealt=table.dealt if all(keep) else (),
        whole=table.whole and all(keep),
    )
    longer, diagnostics = _with_texts(longer, tokenizer)
    block = table.sources[0].block
    conventions = {k: v for k, v in table.conventions.items() if k not in block.texts}
    conventions |= token_conventions(block, longer, tokenizer)
    return replace(longer, conventions={**conventions, "replies": words}), diagnostics


def _run(
    run: PromptRun, keep: Sequence[bool], replies: Sequence[Reply], tokenizer: TextTokenizer
) -> PromptRun:
    rows = [
        _longer(row, reply.ids, _pieces(row.ids[-1:], reply.ids, tokenizer), reply.text)
        for row, reply in zip(compress(run.rows, keep), replies, strict=True)
    ]
    noise = run.noise
    if noise is not None:
        keys = noise.row_keys
        noise = replace(
            noise,
            positions=tuple(compress(noise.positions, keep)),
            row_keys=None if keys is None else tuple(compress(keys, keep)),
        )
    return replace(run, rows=tuple(rows), noise=noise)


def _pieces(before: tuple[int, ...], ids: Sequence[int], tokenizer: TextTokenizer) -> list[str]:
    """Return the text that each token adds.

    The token before them is decoded too: some tokenizers omit the space before a text's first word.
    """
    texts = [tokenizer.decode([*before, *ids[:count]]) for count in range(len(ids) + 1)]
    # All tokens but the last of a multi-token character may decode to text that isn't part of it.
    ends = list(accumulate(map(len, texts), max))
    return [texts[-1][low:high] for low, high in pairwise(ends)]


def _longer(row: RunRow, ids: Sequence[int], pieces: Sequence[str], text: str) -> RunRow:
    """Append tokens to a row. text: the text of the reply."""
    ends = list(accumulate(map(len, pieces), initial=len(row.text)))
    return replace(
        row,
        text=row.text + "".join(pieces),
        ids=(*row.ids, *ids),
        offsets=(*row.offsets, *pairwise(ends)),
        special=(*row.special, *(False for _ in ids)),
        reply=ReplySpan(len(row.ids), text, stands_in=REPLY_PLACEHOLDER in pieces and not text),
    )


def _with_texts(
    table: PromptTable, tokenizer: TextTokenizer
) -> tuple[PromptTable, list[Diagnostic]]:
    """Tokenise the table's named texts as continuations of the replies.

    A leading space that all texts share moves to the end of the replies, as it does with prompts. A
    shared word never moves: the model didn't generate it.
    """
    if not table.row_ids:
        return table, []
    block, diagnostics = table.sources[0].block, list[Diagnostic]()
    tokenizer = tokenizer.reading(written=table.runs[CLEAN].chat)
    prompts = [answer_context(table, row) for row in range(len(table))]
    found: dict[tuple[str, str], list[TextTokens]] = {}
    for definition in block.spec.texts:
        name = definition.name
        for run in table.runs.values():
            own = [row.texts[name] for row in run.rows if name in row.texts]
            if len(own) < len(table) or block.is_token_id(name) or not all(t.ids for t in own):
                continue  # a token id, or the name of a label
            said = [text.text for text in own]
            span = definition.value.span
            found[run.name, name], problems = tokenise_texts(
                prompts, said, tokenizer, name=name, span=span
            )
            diagnostics += problems
    every = [text for own in found.values() for text in own]
    moved = shared_first_token(every, tokenizer, words=False) if every else ()
    characters = ""
    if moved:
        characters = moved_characters(prompts[0], every[0].text, moved, tokenizer)
    runs: dict[str, PromptRun] = {}
    for run in table.runs.values():
        rows: list[RunRow] = []
        for number, row in enumerate(run.rows):
            texts = dict(row.texts)
            for name in texts:
                if (run.name, name) in found:
                    text = found[run.name, name][number]
                    texts[name] = drop_shared_token(text, moved) or text
            reply = None if row.reply is None else replace(row.reply, suffix=len(moved))
            rows.append(extend_row(replace(row, texts=texts, reply=reply), moved, characters))
        runs[run.name] = replace(run, rows=tuple(rows))
    unlike = list(dict.fromkeys(diagnostics))
    return replace(table, runs=runs, moved=moved, moved_text=characters), unlike
