"""Runs of another block of prompts, as runs of the table whose rows are sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mechdsl.base.names import quoted
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.diagnostics.e05_elsewhere import OtherEnding, PartnerMissing, RowsNotPaired
from mechdsl.program.python_files import PythonFunction
from mechdsl.prompts.prompt_table import PromptTable, Run
from mechdsl.prompts.prompts_block import PromptsBlock
from mechdsl.prompts.replaced_text import extended
from mechdsl.prompts.row_selection import collect
from mechdsl.prompts.rows import CLEAN, BlockRows
from mechdsl.prompts.seeded_draws import stable_hash
from mechdsl.prompts.tokenizer import TextTokenizer

Build = Callable[[Sequence[int]], tuple[PromptTable | None, list[Diagnostic]]]
"""Numbers of rows → the other block's table of these."""


@dataclass(frozen=True)
class Paired:
    """A run of another block, and how its rows were found."""

    run: Run
    how: str
    python: tuple[PythonFunction, ...] = ()
    """Functions of Python files that its values are from."""
    data_hash: str = ""


def paired_run(
    table: PromptTable,
    own: PromptsBlock,
    others: BlockRows,
    run: str,
    *,
    name: str,
    tokenizer: TextTokenizer,
    build: Build,
    span: Span,
    shuffled: bool = False,
) -> tuple[Paired | None, list[Diagnostic]]:
    """A run of another block with a row for each of the table's: its only row, or the one with the
    same number, or, shuffled, one that a seeded shuffle deals to it. Codes: E0207, E0527 to E0529
    and those of the other block."""
    other = others.block
    single = _single(others, own, tokenizer)
    if shuffled and single is not None:
        reason = f"has nothing to deal out: `{other.name}` has one row"
        hint = "leave it out: the one row serves all"
        return None, [BadArgument(span=span, name="shuffled", reason=reason, hint=hint)]
    if single is None and _cut(other) != _cut(own):
        reason = f"are {_cut(other) or 'whole'}, and those of `{own.name}` {_cut(own) or 'whole'}"
        hint = "write the same `tiles` in both blocks, or take a block of one image"
        bad = BadArgument(span=span, name=other.name, reason=f"has images that {reason}", hint=hint)
        return None, [bad]
    if single is None and other.combinations != own.combinations:
        return None, [
            RowsNotPaired(
                span=span,
                other=other.name,
                prompts=own.name,
                others=other.combinations,
                rows=own.combinations,
                hint=_pairing(own, other),
            )
        ]
    wanted = [single] * len(table) if single is not None else list(table.row_ids)
    if shuffled:
        places = [own.place_of(number) for number in table.row_ids]
        wanted = [*map(other.in_file, dealt(places, own.seed, own.name, other.name))]
    found, diagnostics = build(list(dict.fromkeys(wanted)))
    if has_errors(diagnostics):
        return None, diagnostics
    there = {} if found is None else {number: n for n, number in enumerate(found.row_ids)}
    lacking = [number for number in wanted if number not in there]
    if found is None or lacking:
        return None, [*diagnostics, _missing(lacking, own, other, len(table), span)]
    if _ends_otherwise(found, table):
        return None, [
            *diagnostics,
            OtherEnding(
                span=span,
                other=other.name,
                prompts=own.name,
                theirs=_ending(found),
                own=_ending(table),
            ),
        ]
    index = [there[number] for number in wanted]
    how = "its only row beside each" if single is not None else "by their number, beside those"
    how = "dealt by a seeded shuffle to those" if shuffled else how
    there_run = _aligned(found, table, run, name, index)
    if single is not None and own.spec.regions and not other.spec.regions:
        there_run = _with_regions(there_run, table)
        how = "its only row, with the regions of each, beside those"
    return Paired(there_run, how, found.python, found.data_hash), diagnostics


def dealt(rows: Sequence[int], seed: int, own: str, other: str) -> list[int]:
    """For each row of `own` the one of `other` that is dealt to it: of the same numbers, each once.
    Both sides are put in an order of their own, which hangs on the number of a row alone: its
    place among the block's rows by content, so that the order of a data file changes no pair."""
    ours = sorted(rows, key=lambda row: stable_hash(seed, own, other, "to", row))
    theirs = sorted(rows, key=lambda row: stable_hash(seed, own, other, "dealt", row))
    found = dict(zip(ours, theirs, strict=True))
    return [found[row] for row in rows]


def _single(others: BlockRows, own: PromptsBlock, tokenizer: TextTokenizer) -> int | None:
    """The number of the block's row, if it has one only."""
    other = others.block
    if other.combinations == 1 and not (other.draws and own.combinations == 1):
        return 0
    if other.combinations != own.combinations and other.spec.where and not other.draws:
        found = collect(others, tokenizer, limit=2).rows
        return found[0].id if len(found) == 1 else None
    return None


def _missing(
    lacking: Sequence[int], own: PromptsBlock, other: PromptsBlock, total: int, span: Span
) -> PartnerMissing:
    where = other.spec.where
    by_where = f"by `where {where[0].span.written}`" if where else "its tokens are left unchanged"
    hint = "make their values the same, so that all rows are kept"
    if where:
        hint = f"write the same `where` in `{own.name}`"
    return PartnerMissing(
        span=span,
        other=other.name,
        prompts=own.name,
        lacking=len(lacking),
        total=total,
        row=lacking[0],
        reason=by_where,
        hint=hint,
    )


def _cut(block: PromptsBlock) -> str:
    """Into which tiles its images are cut; nothing of those that aren't."""
    return "" if block.spec.tiles is None else block.spec.tiles.words


def _pairing(own: PromptsBlock, other: PromptsBlock) -> str:
    """How rows of two blocks can belong together."""
    if own.combinations == 1:
        served = f"then the one row of `{own.name}` serves all of them"
        return f"write `{other.spec.kind} {other.name}` in the experiment: {served}"
    values = f"the values of `{own.name}`, so that rows go by their number"
    return f"give `{other.name}` a single row, which serves all of them, or {values}"


def _has_texts(table: PromptTable) -> bool:
    return any(row.texts for row in table.runs[CLEAN].rows[:1])


def _ends_otherwise(found: PromptTable, table: PromptTable) -> bool:
    """Whether what the answers begin with stands at the end of one table's prompts only."""
    return found.moved != table.moved and _has_texts(found) and _has_texts(table)


def _ending(table: PromptTable) -> str:
    return quoted(table.moved_text) if table.moved else "nothing that answers begin with"


def _aligned(
    found: PromptTable, table: PromptTable, run: str, name: str, index: Sequence[int]
) -> Run:
    """The run with the other table's rows in this one's order."""
    there = found.runs[run]
    rows = there.rows
    if not _has_texts(found):  # answers are read behind it as behind the table's own prompts
        rows = tuple(extended(row, table.moved, table.moved_text) for row in rows)
    noise = there.noise
    if noise is not None:
        noise = replace(
            noise,
            positions=tuple(noise.positions[i] for i in index),
            row_keys=tuple(found.row_keys[i] for i in index),
        )
    return Run(name, tuple(rows[i] for i in index), noise, prompts=found.name, chat=there.chat)


def _with_regions(run: Run, table: PromptTable) -> Run:
    """One image for all rows has no regions of its own: in each row `object tokens` are where they
    are in the image that goes in."""
    pairs = zip(run.rows, table.runs[CLEAN].rows, strict=True)
    rows = (replace(row, places={**beside.places, **row.places}) for row, beside in pairs)
    return replace(run, rows=tuple(rows))
