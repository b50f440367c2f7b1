"""What is wrong with finished prompts: empty ones, unknown words, more tokens than are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mechdsl.base.names import quoted
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import NoTokenFor
from mechdsl.diagnostics.e05_data import EmptyPrompt, PromptTooLong
from mechdsl.diagnostics.w07_data import UnknownWords
from mechdsl.prompts.chat_template import turns_in
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.prompts_block import PromptsBlock
from mechdsl.prompts.tokenizer import Encoded, TextTokenizer
from mechdsl.prompts.values import Rich


def empty_prompts(block: PromptsBlock, run: str, riches: Sequence[Rich]) -> Iterator[Diagnostic]:
    """E0526."""
    empty = sum(not rich.text.strip() for rich in riches)
    if empty:
        yield EmptyPrompt(span=block.templates[0].text.span, run=run, rows=empty)


def unknown_words(
    block: PromptsBlock,
    tokenizer: TextTokenizer,
    run: str,
    riches: Sequence[Rich],
    encoded: Sequence[Encoded],
) -> Iterator[Diagnostic]:
    """W0702, or E0436 where the tokenizer has nothing that stands for them."""
    template = block.templates[0]
    for number, (words, rows) in sorted(_by_turn(block, tokenizer, riches, encoded).items()):
        shown = ", ".join(words[:3]) + (f" and {len(words) - 3} more" * (len(words) > 3))
        turns = template.turns
        span = turns[number].text.span if turns else template.text.span
        unknown = tokenizer.unknown_id
        if unknown is None or tokenizer.made_unknown:
            yield NoTokenFor(span=span, words=shown, rows=rows, total=len(riches), run=run)
            continue
        yield UnknownWords(
            span=span,
            words=shown,
            rows=rows,
            total=len(riches),
            run=run,
            unknown=tokenizer.token_text(unknown),
        )


def _by_turn(
    block: PromptsBlock,
    tokenizer: TextTokenizer,
    riches: Sequence[Rich],
    encoded: Sequence[Encoded],
) -> dict[int, tuple[list[str], int]]:
    """Number of a turn (0 where there are none, and for what stands in none) → the words in it
    that the tokenizer doesn't know, and in how many rows."""
    unknown = tokenizer.unknown_id
    roles = [turn.role for turn in block.templates[0].turns]
    words: dict[int, dict[str, None]] = {}
    rows: dict[int, int] = {}
    for rich, tokens in zip(riches, encoded, strict=True):
        places = [i for i, token in enumerate(tokens.ids) if token == unknown]
        if unknown is None or not places:
            continue
        turns = list(turns_in(rich, roles))
        seen: set[int] = set()
        for i in places:
            start, end = tokens.offsets[i]
            holds = (n for n, first, last in turns if first <= start < last)
            turn = next(holds, 0)
            words.setdefault(turn, {})[quoted(rich.text[start:end].strip())] = None
            seen.add(turn)
        for turn in seen:
            rows[turn] = rows.get(turn, 0) + 1
    return {turn: (list(found), rows[turn]) for turn, found in words.items()}


def too_long(block: PromptsBlock, table: PromptTable, most: int) -> Iterator[Diagnostic]:
    """E0511 for the first run that has prompts of more than `most` tokens."""
    for name, run in table.runs.items():
        lengths = [len(row.ids) for row in run.rows]
        longer = sum(n > most for n in lengths)
        if longer:
            yield PromptTooLong(
                span=block.templates[0].text.span,
                run=name,
                rows=longer,
                total=len(lengths),
                longest=max(lengths),
                most=most,
            )
            return
