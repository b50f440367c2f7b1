"""Prompts with replies behind them, which another experiment wrote: the same tokens, whatever the
tokenizer would make of their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, compress, pairwise

from mechdsl.base.plural import plural
from mechdsl.base.reply import Reply
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.prompts.answers import clean_text, move, moved_characters, shared_beginning, tokenise
from mechdsl.prompts.prompt_conventions import token_conventions
from mechdsl.prompts.prompt_table import PromptTable, ReplyAt, Run, RunRow, TextTokens
from mechdsl.prompts.replaced_text import extended
from mechdsl.prompts.rows import CLEAN
from mechdsl.prompts.tokenizer import TextTokenizer

STANDS_IN = "…"
"""What a token shows that isn't known yet."""


def alone(table: PromptTable) -> PromptTable:
    """The prompts without replies."""
    return table.alone or table


def with_stand_ins(table: PromptTable, said: str, tokens: int) -> PromptTable:
    """Every prompt with as many tokens behind it, for all that is worked out before the replies are
    there. said: whose they are."""

    def longer(row: RunRow) -> RunRow:
        return _longer(row, row.ids[-1:] * tokens, [STANDS_IN] * tokens, "")

    runs = {
        name: replace(run, rows=tuple(map(longer, run.rows))) for name, run in table.runs.items()
    }
    words = f"up to {plural(tokens, 'token')} behind each prompt, {said}: known when that has run"
    conventions = {**table.conventions, "replies": words}
    return replace(table, runs=runs, alone=table, behind=said, conventions=conventions)


def with_replies(
    table: PromptTable, replies: Mapping[int, Reply], tokenizer: TextTokenizer, said: str
) -> tuple[PromptTable, list[Diagnostic]]:
    """The rows that have a reply, with that behind the prompts of all runs; answers and the like
    are tokenised behind it.

    replies: by the ids of rows. said: whose they are. Codes: those of `tokenise`.
    """
    keep = [row in replies for row in table.row_ids]
    own = [replies[row] for row in table.row_ids if row in replies]
    runs = {name: _run(run, keep, own, tokenizer) for name, run in table.runs.items()}
    lengths = [len(reply.ids) for reply in own]
    low, high = min(lengths, default=0), max(lengths, default=0)
    tokens = plural(high, "token") if low == high else f"{low} to {plural(high, 'token')}"
    words = f"behind each prompt, {said}: {tokens}, the same in all runs"
    if len(own) < len(table):
        words += f"; {len(table) - len(own):,} of {len(table):,} rows have none, and are left out"
    longer = replace(
        table,
        row_ids=tuple(compress(table.row_ids, keep)),
        row_keys=tuple(compress(table.row_keys, keep)),
        runs=runs,
        alone=table,
        behind=said,
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


def _run(run: Run, keep: Sequence[bool], replies: Sequence[Reply], tokenizer: TextTokenizer) -> Run:
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
    """What each token adds to the text; some tokenizers write no space in front of a text's first
    word, so they are read behind the token before them."""
    texts = [tokenizer.decode([*before, *ids[:count]]) for count in range(len(ids) + 1)]
    # Of a sign of several tokens, all but the last one may decode to what isn't part of it.
    ends = list(accumulate(map(len, texts), max))
    return [texts[-1][low:high] for low, high in pairwise(ends)]


def _longer(row: RunRow, ids: Sequence[int], pieces: Sequence[str], text: str) -> RunRow:
    """A row with tokens behind it. text: what the reply says."""
    ends = list(accumulate(map(len, pieces), initial=len(row.text)))
    return replace(
        row,
        text=row.text + "".join(pieces),
        ids=(*row.ids, *ids),
        offsets=(*row.offsets, *pairwise(ends)),
        special=(*row.special, *(False for _ in ids)),
        reply=ReplyAt(len(row.ids), text, stands_in=STANDS_IN in pieces and not text),
    )


def _with_texts(
    table: PromptTable, tokenizer: TextTokenizer
) -> tuple[PromptTable, list[Diagnostic]]:
    """The table with its named texts as they go on behind the replies. White space that all begin
    with stands behind the replies, as it does behind prompts; a word never does, as nobody wrote
    it."""
    if not table.row_ids:
        return table, []
    block, diagnostics = table.sources[0].block, list[Diagnostic]()
    tokenizer = tokenizer.reading(written=table.runs[CLEAN].chat)
    prompts = [clean_text(table, row) for row in range(len(table))]
    found: dict[tuple[str, str], list[TextTokens]] = {}
    for definition in block.spec.texts:
        name = definition.name
        for run in table.runs.values():
            own = [row.texts[name] for row in run.rows if name in row.texts]
            if len(own) < len(table) or block.is_token_id(name) or not all(t.ids for t in own):
                continue  # an id, or the name of a label
            said = [text.text for text in own]
            span = definition.value.span
            found[run.name, name], problems = tokenise(
                prompts, said, tokenizer, name=name, span=span
            )
            diagnostics += problems
    every = [text for own in found.values() for text in own]
    moved = shared_beginning(every, tokenizer, words=False) if every else ()
    characters = ""
    if moved:
        characters = moved_characters(prompts[0], every[0].text, moved, tokenizer)
    runs: dict[str, Run] = {}
    for run in table.runs.values():
        rows: list[RunRow] = []
        for number, row in enumerate(run.rows):
            texts = dict(row.texts)
            for name in texts:
                if (run.name, name) in found:
                    text = found[run.name, name][number]
                    texts[name] = move(text, moved) or text
            reply = None if row.reply is None else replace(row.reply, behind=len(moved))
            rows.append(extended(replace(row, texts=texts, reply=reply), moved, characters))
        runs[run.name] = replace(run, rows=tuple(rows))
    unlike = list(dict.fromkeys(diagnostics))
    return replace(table, runs=runs, moved=moved, moved_text=characters), unlike
