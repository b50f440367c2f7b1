"""Noise that a corruption adds to an activation: where, and how much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.prompts.positions import resolve_positions
from mechdsl.prompts.prompt_table import Noise, PromptTable
from mechdsl.prompts.prompts_block import PromptsBlock
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
                tokens = _token_ids(over, before_limit(run), run, tokenizer, diagnostics)
                noise = replace(noise, sd_tokens=tokens)
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


def _token_ids(
    at: ast.Positions,
    everything: PromptTable,
    run: str,
    tokenizer: TextTokenizer,
    diagnostics: list[Diagnostic],
) -> tuple[int, ...]:
    """The ids of the tokens there in all rows, with repetition."""
    positions = _joined(at, everything, run, tokenizer, diagnostics)
    rows = everything.runs[run].rows
    return tuple(row.ids[p] for row, hits in zip(rows, positions, strict=True) for p in hits)
