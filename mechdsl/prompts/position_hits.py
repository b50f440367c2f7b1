"""What positions hit: their texts, and whether they fit together in two runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from mechdsl.base.plural import plural
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e03_positions import JoinedUnequal
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.prompts.prompt_table import Hits, PositionCell, PromptTable, RunRow
from mechdsl.prompts.span_tokens import TokenMap
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

Ranked = Callable[
    [ast.RankedTokens, str, Mapping[str, Any], list[Diagnostic]], list[tuple[str, list[Hits]]]
]
"""(expression, run, values of loops, diagnostics) → (label, hits of every row) of its cells."""


@cache
def one_token(position: int) -> Hits:
    """The hits of a row with one token; one object for equal ones, because rows are many."""
    return ((position,),)


_FEW = 3
"""Up to so many tokens, first / middle / last tells all of them apart."""


def ragged(name: str, tokens: Sequence[tuple[int, ...]], lengths: set[int]) -> list[PositionCell]:
    """One cell per token, or first / middle / last; a single token is the last."""
    if len(lengths) == 1 and max(lengths) > _FEW:
        return [
            PositionCell(
                f"{name} {k + 1}", tuple(one_token(row[k]) if row else () for row in tokens)
            )
            for k in range(max(lengths))
        ]
    parts: dict[str, tuple[Hits, ...]] = {
        "first": tuple(one_token(row[0]) if len(row) > 1 else () for row in tokens),
        "middle": tuple(tuple((p,) for p in row[1:-1]) for row in tokens),
        "last": tuple(one_token(row[-1]) if row else () for row in tokens),
    }
    return [PositionCell(f"{name} {part}", hits) for part, hits in parts.items() if any(hits)]


def check_joined(
    base_cells: Sequence[PositionCell],
    source_cells: Sequence[PositionCell],
    *,
    span: Span | None = None,
    table: PromptTable | None = None,
    runs: tuple[str, str] | None = None,
) -> list[Diagnostic]:
    """E0307 where a row has other numbers of tokens in the two runs. Cells correspond by order;
    rows that lack the position in one of them have dropped out."""
    unequal: dict[int, tuple[int, int]] = {}
    total = 0
    for base, source in zip(base_cells, source_cells, strict=True):
        total = max(total, len(base.hits))
        for n, (written, read) in enumerate(zip(base.hits, source.hits, strict=True)):
            if written and read and [*map(len, written)] != [*map(len, read)]:
                unequal.setdefault(n, (sum(map(len, written)), sum(map(len, read))))
    if not unequal:
        return []
    written, read = next(iter(unequal.values()))
    return [
        JoinedUnequal(
            span=span,
            source=plural(read, "token"),
            base=plural(written, "token"),
            rows=len(unequal),
            total=total,
        )
    ]


def lies_behind(cell: PositionCell, rows: Sequence[RunRow]) -> bool:
    """Whether it hits tokens behind these prompts: the answer's."""
    for row, hits in zip(rows, cell.hits, strict=True):
        end = len(row.ids)
        for run in hits:
            for token in run:
                if token >= end:
                    return True
    return False


def hit_texts(
    table: PromptTable, run: str, cell: PositionCell, tokenizer: TextTokenizer | None = None
) -> tuple[str, ...]:
    """The different token texts that a cell hits in the prompts, the commonest first.

    tokenizer: knows the names of tokens that cover no text (else they are left out).
    """
    found: Counter[str] = Counter()
    if cell.reply is not None:  # nothing is written yet
        return ()
    for row, hits in zip(table.runs[run].rows, cell.hits, strict=True):
        m = TokenMap(row)
        for p in (p for tokens in hits for p in tokens if p < len(row.ids)):
            if row.image is not None:
                if isinstance(tokenizer, ImageReader):
                    found[tokenizer.label(p)] += 1
                continue
            text = "" if row.special[p] else m.token_text(p)
            if not text and tokenizer is not None:
                text = tokenizer.token_text(row.ids[p])
            if text:
                found[text] += 1
    return tuple(text for text, _ in found.most_common())


def union(cells: Sequence[PositionCell], n: int) -> Hits:
    """All positions of a row, joined as they are written: in two runs, and on both sides of `onto`,
    they pair in this order. No run where there are none."""
    joined = dict.fromkeys(p for cell in cells for run in cell.hits[n] for p in run)
    # A run of no tokens, that of `top 0%`, is a run all the same.
    return (tuple(joined),) if any(cell.hits[n] for cell in cells) else ()


def lacks(cells: Sequence[PositionCell], n: int) -> bool:
    """Whether a row has none of the cells: another experiment lacks it, so that nothing is known of
    its tokens, or a `for` counts beyond its end."""
    return not any(cell.hits[n] for cell in cells)


def is_ranked(node: ast.Node) -> bool:
    """Whether it names tokens that another experiment ranked."""
    return any(isinstance(part, ast.RankedTokens) for part in walk(node))
