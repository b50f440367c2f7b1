"""Positions that are counted, in two runs whose prompts differ in length."""

from __future__ import annotations

from collections.abc import Sequence

from mechdsl.diagnostics.w07_names import OtherTokens
from mechdsl.prompts.prompt_table import PositionCell, Run
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


def counts(positions: ast.Positions) -> bool:
    """Whether it counts tokens, instead of naming them."""
    return any(
        isinstance(node, ast.TokenIndex)
        or (isinstance(node, ast.Position) and node.align is not None)
        for node in walk(positions)
    )


def unlike(
    base: Run, source: Run, written: PositionCell, read: PositionCell
) -> list[tuple[int, int, int]]:
    """(row, token of the base run, token of the source run) where the two don't correspond: they
    have one number in prompts of different lengths, lie behind the first difference of the two
    (counted from the end: before the last), and are different tokens."""
    found: list[tuple[int, int, int]] = []
    for n, (own, theirs) in enumerate(zip(base.rows, source.rows, strict=True)):
        if len(own.ids) == len(theirs.ids):
            continue
        prefix = _shared(own.ids, theirs.ids)
        suffix = _shared(own.ids[::-1], theirs.ids[::-1])
        hits = zip(written.hits[n], read.hits[n], strict=False)
        for to, of in (pair for run in hits for pair in zip(*run, strict=False)):
            if to >= len(own.ids) or of >= len(theirs.ids):
                continue  # the answer's, which are the same
            behind = len(own.ids) - to
            from_start = to == of and to > prefix
            from_end = behind == len(theirs.ids) - of and behind > suffix + 1
            if (from_start or from_end) and own.ids[to] != theirs.ids[of]:
                found.append((n, to, of))
    return found


def other_tokens(
    positions: ast.Positions,
    runs: tuple[Run, Run],
    pairs: Sequence[tuple[PositionCell, PositionCell]],
    tokenizer: TextTokenizer,
) -> OtherTokens | None:
    """W0760 for counted positions that mean other tokens in the source run; runs: base, source."""
    base, source = runs
    first: tuple[str, int, int, int] | None = None
    rows: set[int] = set()
    for written, read in pairs if counts(positions) else ():
        apart = unlike(base, source, written, read)
        rows.update(n for n, _, _ in apart)
        if apart and first is None:
            first = (written.label, *apart[0])
    if first is None:
        return None
    number, n, to, of = first
    return OtherTokens(
        span=positions.span,
        position=positions.span.written,
        source=source.name,
        base=base.name,
        number=number if number.lstrip("-").isdigit() else str(to),
        theirs=tokenizer.token_text(source.rows[n].ids[of]).strip(),
        own=tokenizer.token_text(base.rows[n].ids[to]).strip(),
        rows=f"{len(rows):,} of {len(base.rows):,}",
    )


def _shared(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
