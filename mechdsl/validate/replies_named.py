"""`prompts p with replies of E`: what another experiment writes, behind the prompts that it was
written behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mechdsl.base.names import name_list
from mechdsl.base.plural import plural
from mechdsl.base.reply import Reply
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e05_answers import NoRepliesBehind
from mechdsl.diagnostics.e06_statistics import UnreadableExpectation
from mechdsl.program import spec
from mechdsl.program.lower_directions import rows_read
from mechdsl.program.spec_replies import RepliesOf
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.replies_behind import with_replies, with_stand_ins
from mechdsl.resolve.cell_key import CellKey, joined_axes, joined_cells
from mechdsl.resolve.findings import Finding, Refused, VariantFinding
from mechdsl.resolve.measured_parts import whole_spec
from mechdsl.resolve.name_cells import cell_keys
from mechdsl.resolve.open_axes import open_axes
from mechdsl.resolve.resolved import ModelContext
from mechdsl.validate.known import Known
from mechdsl.validate.known_cells import KnownCells
from mechdsl.validate.site_selections import RefusedCondition

_ANY = 64
"""Tokens of a reply of which nothing is known."""


def replies_behind(
    table: PromptTable,
    experiment: spec.Experiment,
    program: spec.Program,
    finding: Finding | None,
    model: ModelContext,
    others: Iterable[ModelContext] = (),
) -> tuple[PromptTable, list[Diagnostic]]:
    """The prompts with what another experiment wrote; before it has run, with as many tokens as it
    may write.

    finding: that experiment's; None where it was refused. others: models that its rows are run on
    too. Codes: E0203, E0546, and those of texts behind prompts.
    """
    named = experiment.replies
    assert named is not None
    if finding is None:
        return with_stand_ins(table, named.text, _ANY), []
    try:
        every = _parts(finding.on(model.name, table.name))
        _check(named, every[0], table, [model, *others])
        _check_fits(experiment, program)
        part, cell = _cell(named, every, program)
        if part.means is None:
            tokens = _room(named, every[0], table, model)
            return with_stand_ins(table, named.text, tokens), []
        found, problems = with_replies(table, _only(part, cell), model.tokenizer, named.text)
        _check_lengths(found, model, named)
    except Refused as refusal:
        problem = _bad(named, refusal.reason, refusal.hint)
    except RefusedCondition as refusal:
        problem = _reworded(named, refusal.diagnostic)
    else:
        return found, problems
    return with_stand_ins(table, named.text, _ANY), [problem]


def _parts(finding: Finding) -> list[VariantFinding]:
    """One of each variant: measures at several places are of the same replies."""
    found: dict[object, VariantFinding] = {}
    for part in finding.parts:
        found.setdefault(whole_spec(part.experiment).variant, part)
    return list(found.values())


def _check(
    named: RepliesOf,
    part: VariantFinding,
    table: PromptTable,
    models: Sequence[ModelContext],
) -> None:
    """Whether it writes one reply behind each of these prompts, in tokens of these models."""
    own, of = part.experiment, f"`{named.of}`"
    if own.generation is None:
        raise Refused(f"{of} writes none", f"let {of} write some: `generate 40`")
    if own.table.name != table.name:
        raise Refused(
            f"{of} writes behind prompts of `{own.table.name}`, and these are of `{table.name}`",
            "let both name one block of prompts",
        )
    if own.generation.samples > 1:
        raise Refused(
            f"{of} writes {own.generation.samples} behind each prompt", "let it write one sample"
        )
    draws = own.table.runs[own.spec.base].draws
    if draws > 1:
        raise Refused(
            f"{of} writes one for each of {draws} draws of noise", "let it run with one draw"
        )
    known = [model for model in models if not model.tokenizer.stands_in]
    other = next((m for m in known if m.tokenizer.hash != own.model.tokenizer.hash), None)
    if other is not None and not own.model.tokenizer.stands_in:
        raise Refused(
            f"{of} writes tokens of `{own.model.name}`, and `{other.name}` has another tokenizer",
            "read them with a model of the same tokenizer",
        )


def _check_fits(experiment: spec.Experiment, program: spec.Program) -> None:
    """Whether all that is read is of these prompts with these replies, or names its own."""
    if any(rows.block is None and rows.model for rows in rows_read(experiment, program)):
        raise Refused(
            "a direction is fitted on another model's runs of these rows, without the replies",
            "name the rows that it is fitted on",
        )
    if any(rule.verb == "replace" and rule.source_block is None for rule in experiment.every_rule):
        raise Refused(
            "a rule replaces text of the prompts, whose tokens are made anew then",
            "replace it in a corruption of the block, and run that: `into CORRUPTION`",
        )


def _cell(
    named: RepliesOf, parts: Sequence[VariantFinding], program: spec.Program
) -> tuple[VariantFinding, int]:
    """(variant, number of its cell) of the one that is named."""
    undecided = open_axes(parts[0].experiment.spec, program.groups, ("shape", "tokens"))
    if not any(p.experiment.model.tokenizer.stands_in for p in parts):
        undecided = frozenset()
    own = [(whole_spec(part.experiment).variant, _cells(part)) for part in parts]
    axes = joined_axes([(v, list(cells[0].coords) if cells else []) for v, cells in own])
    every = [
        (part, n) for part, (_, cells) in zip(parts, own, strict=True) for n in range(len(cells))
    ]
    cells = joined_cells(axes, own)
    known = Known((), axes, cells=cells, open_axes=undecided, name=named.of)
    finder = KnownCells(known, of_other=True)
    found = finder.find(finder.wheres(named.cell))
    if len(found) != 1 and not (undecided and found):
        raise _not_one(named, axes, cells, len(found))
    return every[found[0]]


def _not_one(
    named: RepliesOf, axes: Sequence[str], cells: Sequence[CellKey], found: int
) -> Refused:
    if found:
        said = ", ".join(
            f'{axis}: "{value}"' if isinstance(value, str) else f"{axis}: {value}"
            for axis, value in cells[0].coords.items()
        )
        return Refused(
            f"{found} cells of `{named.of}` write some"
            + (" there" if named.cell else ", each its own"),
            f"say which cell wrote them: `replies of {named.of}({said})`",
        )
    return Refused(
        f"no cell of `{named.of}` is there",
        f"its axes are {name_list(axes)}" if axes else f"it has one cell: `replies of {named.of}`",
    )


def _cells(part: VariantFinding) -> list[CellKey]:
    """Those of an experiment, without the places that it measures at."""
    swept = [axis.name for axis in part.experiment.axes]
    cells = part.cells if part.means is not None else cell_keys(part.experiment, texts=False)
    return [
        CellKey({k: v for k, v in cell.coords.items() if k in swept}, cell.site, cell.position)
        for cell in cells
    ]


def _room(named: RepliesOf, part: VariantFinding, table: PromptTable, model: ModelContext) -> int:
    """Tokens that replies may have."""
    assert part.experiment.generation is not None
    tokens, most = part.experiment.generation.tokens, model.shape.max_positions
    if most is None or model.shape.stands_in or table.stands_in:
        return tokens
    longest = max(len(row.ids) for run in table.runs.values() for row in run.rows)
    if longest >= most:
        raise Refused(
            f"the longest prompt has {plural(longest, 'token')}, and `{model.name}` reads {most:,}",
            "shorten the prompts",
        )
    return min(tokens, most - longest)


def _only(part: VariantFinding, cell: int) -> Mapping[int, Reply]:
    """The reply of each row."""
    return {row: replies[0] for row, replies in part.replies[cell].items()}


def _check_lengths(table: PromptTable, model: ModelContext, named: RepliesOf) -> None:
    """Whether there are rows, none of them too long."""
    if not len(table):
        raise Refused(
            f"`{named.of}` has none of the rows that this experiment runs on",
            "let both run on the same part and limit of their prompts",
        )
    most = model.shape.max_positions
    longest = max(len(row.ids) for run in table.runs.values() for row in run.rows)
    if most is not None and longest > most:
        raise Refused(
            f"the longest prompt with its reply has {longest:,} tokens, and `{model.name}` reads "
            f"{most:,}",
            f"let `{named.of}` write fewer tokens, or shorten the prompts",
        )


def _bad(named: RepliesOf, reason: str, hint: str) -> Diagnostic:
    return NoRepliesBehind(span=named.span, text=named.text, reason=reason, hint=hint)


def _reworded(named: RepliesOf, found: Diagnostic) -> Diagnostic:
    """What is wrong with a cell that is named, which is no expectation here."""
    if not isinstance(found, UnreadableExpectation):
        return found
    return NoRepliesBehind(
        span=found.span or named.span, text=named.text, reason=found.reason, hint=found.hint
    )
