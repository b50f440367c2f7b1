"""Noise that a corruption adds to an activation: where, and how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypedDict

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.prompts.positions import resolve_positions
from mechdsl.prompts.prompt_table import Noise, PromptTable, RunRow
from mechdsl.prompts.prompts_block import PromptsBlock
from mechdsl.prompts.seeded_draws import stable_hash
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.vocab.corruptions import ActivationChange, of_kind


def add_noise(
    table: PromptTable,
    block: PromptsBlock,
    tokenizer: TextTokenizer,
    before_limit: Callable[[str], PromptTable],
) -> tuple[PromptTable, list[Diagnostic]]:
    """The table with the noise of its corruptions.

    before_limit: gives the table of all rows of a run, over whose tokens one `sd` is taken.
    """
    diagnostics: list[Diagnostic] = []
    runs = dict(table.runs)
    for corruption in block.spec.corruptions:
        changes = of_kind(ActivationChange, corruption.changes)
        for _, second in changes[1:]:
            what = "more than one noise in a corruption"
            diagnostics.append(NotSupported(span=second.span, what=what))
        for kind, change in changes[:1]:
            added = kind.noise(change, block.parameters)
            at, run = change.at, corruption.name
            assert at is not None
            noise = Noise(
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
    """Per row, all positions that are meant."""
    cells, found = resolve_positions(at, table, run, tokenizer=tokenizer)
    diagnostics += found
    return tuple(
        tuple(sorted({p for cell in cells for tokens in cell.hits[n] for p in tokens}))
        for n in range(len(table))
    )


def _tokens_of(quantity: ast.Quantity) -> ast.Positions:
    """The tokens that `3 sd of subject` means."""
    span = quantity.span
    tokens = ast.SpanTokens(ast.SpanRef(name=quantity.of, span=span), plural=True, span=span)
    return ast.Positions((ast.Position(ast.Point(tokens, span=span), span=span),), span=span)


class _SdTokens(TypedDict, total=False):
    """What one standard deviation is taken over."""

    sd_tokens: tuple[int, ...]
    sd_images: tuple[tuple[RunRow, tuple[int, ...]], ...]


def _tokens_there(rows: Sequence[RunRow], positions: Sequence[tuple[int, ...]]) -> _SdTokens:
    """The tokens there in all rows, with repetition."""
    places = [*zip(rows, positions, strict=True)]
    if all(row.image is None for row in rows):
        return {"sd_tokens": tuple(row.ids[p] for row, hits in places for p in hits)}
    tokens = (stable_hash("sd", row.ids[p], p) >> 66 for row, hits in places for p in hits)
    return {
        "sd_tokens": tuple(tokens),
        "sd_images": tuple((row, hits) for row, hits in places if hits),
    }
