"""What experiments make of their results: measures, reports, expectations, statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mechdsl.base.names import name_list
from mechdsl.base.registry import nearest
from mechdsl.diagnostics.core import Diagnostic, Unknown, certain
from mechdsl.diagnostics.e02_names import BadArgument, UnknownName, did_you_mean
from mechdsl.diagnostics.e06_experiment import UnreadableMeasure
from mechdsl.diagnostics.w07_data import PairedAlike
from mechdsl.program import spec
from mechdsl.program.lower_other_runs import BLOCKS
from mechdsl.program.run_order import compared_with
from mechdsl.prompts.prompt_table import PromptTable, Run
from mechdsl.resolve.cell_key import averaged_cells, joined_axes, joined_cells, told_apart
from mechdsl.resolve.measured_parts import in_parts
from mechdsl.resolve.name_cells import cell_keys
from mechdsl.resolve.open_axes import open_axes
from mechdsl.resolve.resolved import Outline, ResolvedMeasure
from mechdsl.syntax import ast
from mechdsl.validate.expectations import check_expectation
from mechdsl.validate.known import Known
from mechdsl.validate.known_measures import KnownMeasure
from mechdsl.validate.reachable_p import check_rows
from mechdsl.vocab.effects import EFFECTS
from mechdsl.vocab.metrics import METRICS
from mechdsl.vocab.reports import check_report

Every = Mapping[str, Sequence[Outline]]
"""The experiments of a file by name, each with its variants."""


def about_results(
    variants: Sequence[Outline], program: spec.Program, every: Every
) -> list[Diagnostic]:
    """What is wrong with what an experiment makes of its results."""
    undecided = _undecided(variants, program)
    found = _against_axes(variants, program, every)
    resolved = [each.resolved for each in variants if each.resolved is not None]
    unknown: list[Unknown] = [what for each in variants for what in each.unknown]
    if len(resolved) == len(variants):
        counted = not undecided and "count" not in unknown
        few = check_rows(resolved)
        found += [replace(each, by_text=counted) for each in few]
    return certain(found, unknown)


def _undecided(variants: Sequence[Outline], program: spec.Program) -> set[str]:
    """Coordinates of cells whose values aren't known."""
    return {axis for e in variants for axis in open_axes(e.spec, program.groups, e.unknown)}


def _against_axes(
    variants: Sequence[Outline], program: spec.Program, every: Every
) -> list[Diagnostic]:
    """Reports and expectations name axes, measures, runs and values that exist."""
    experiment = variants[0]
    said = experiment.spec
    own, aliases, perhaps = _axes(variants)
    axes = list(dict.fromkeys([*own, *aliases, *sorted(perhaps)]))
    tables = list({id(each.table): each.table for each in variants}.values())
    rows = [row for table in tables for row in table.runs["clean"].rows]
    values = [n for n in rows[0].values if all(n in row.values for row in rows)] if rows else []
    columns_unknown = any(table.columns_unknown for table in tables)
    measures = _measures(experiment)
    found: list[Diagnostic] = []
    for measure, each in zip(measures, said.measures, strict=True):
        if measure.kind == "category" and each.effect != "raw":
            found.append(
                UnreadableMeasure(
                    span=each.span,
                    text=each.metric.span.written,
                    reason="it is a category, which has no differences",
                    hint="measure it `as raw`, or use `expected(…)`, which is a number",
                )
            )
    all_known = None not in experiment.measures
    for report in said.reports:
        writes = said.generation is not None
        of = measures if all_known else None
        found.extend(check_report(report, axes, values, of, writes=writes))
    by = said.statistics.by
    if by is not None and by not in values and not columns_unknown:
        found.append(
            UnknownName(
                span=said.statistics.span,
                kind="value of the prompts",
                name=by,
                hint=did_you_mean(
                    by,
                    values,
                    f"values of {_called(tables)} are {name_list(values)}",
                ),
            )
        )
    found.extend(_of_several_images(by, tables, said))
    found.extend(_averaged(variants))
    found.extend(_paired_alike(variants, axes))
    if said.expects and measures:
        known = _known(variants, program)
        names = compared_with(said).intersection(every) - {experiment.name}
        others = {name: _known(every[name], program) for name in sorted(names)}
        truths = {
            "groups": {name: group.sites for name, group in program.groups.items()},
            "columns": None
            if columns_unknown or any(table.stands_in for table in tables)
            else {name: [row.values.get(name) for row in rows] for name in values},
            "all_rows": "count" not in experiment.unknown,
        }
        known = replace(known, others=others, **truths)
        for expectation in said.expects:
            found.extend(check_expectation(expectation, known))
    return found


def _of_several_images(
    by: str | None, tables: Sequence[PromptTable], said: spec.Experiment
) -> Iterator[Diagnostic]:
    """E0207 for `stats by` a value that tells tiles of one image apart."""
    for table in tables:
        rows = table.runs["clean"].rows
        pairs = {
            (image, str(row.values.get(by or "")))
            for image, row in zip(table.cut_from, rows, strict=False)
        }
        if by is not None and len(pairs) > len({image for image, _ in pairs}):
            reason = "differs between tiles of one image, which are no independent observations"
            hint = "leave it out: then tiles of one image count together"
            yield BadArgument(span=said.statistics.span, name=by, reason=reason, hint=hint)
            return


def _called(tables: Sequence[PromptTable]) -> str:
    """The blocks, and that it is what all of them have."""
    names = list(dict.fromkeys(table.name for table in tables))
    return f"`{names[0]}`" if len(names) == 1 else f"all of {name_list(names)}"


def _over(variants: Sequence[Outline]) -> str | None:
    """The axis that measures are averaged over, by its own name."""
    over = variants[0].spec.over
    aliases = {a.alias: a.name for e in variants for a in e.axes if a.alias is not None}
    return None if over is None else aliases.get(over, over)


def _axes(variants: Sequence[Outline]) -> tuple[list[str], dict[str, str], set[str]]:
    """(axes of the results, their second names, those that there may be)."""
    own = joined_axes([(e.spec.variant, [axis.name for axis in e.axes]) for e in variants])
    aliases = {a.alias: a.name for e in variants for a in e.axes if a.alias is not None}
    perhaps = {name for e in variants for name in e.perhaps}
    over = _over(variants)
    own = [name for name in own if name != over]
    aliases = {name: of for name, of in aliases.items() if of != over}
    return own, aliases, perhaps - {over}


def _averaged(variants: Sequence[Outline]) -> Iterator[Diagnostic]:
    """E0612 for measures of one experiment that aren't averaged alike, or over no axis of it."""
    said, every = (
        variants[0].spec,
        joined_axes([(e.spec.variant, [axis.name for axis in e.axes]) for e in variants]),
    )
    aliases = [a.alias for e in variants for a in e.axes if a.alias is not None]
    perhaps = {name for e in variants for name in e.perhaps}
    kinds = [each.kind for each in _measures(variants[0])]
    for measure, kind in zip(said.measures, kinds, strict=True):
        reason = hint = ""
        if (measure.over, measure.area) != (said.over, said.area):
            reason = f"`{said.measures[0].label}` is averaged otherwise, and both share one table"
            hint = "average all measures of an experiment over one axis, or none of them"
        elif measure.over == BLOCKS and BLOCKS in every:
            reason = "rows of several blocks have no mean row by row"
            hint = 'set cells of two blocks against each other: `expect prob(prompts: "a") - …`'
        elif measure.over is not None and kind == "category":
            what = "area" if measure.area else "mean"
            reason, hint = f"categories have no {what}", "use `expected(…)`, which is a number"
        elif measure.over is not None and measure.over not in (*every, *aliases, *perhaps):
            reason = f"the experiment has no axis `{measure.over}`"
            known = [*every, *aliases]
            hint = did_you_mean(measure.over, known, f"its axes are: {name_list(known) or 'none'}")
        elif measure.over is not None and measure.area:
            reason, hint = _no_curve(variants, measure.over)
        if reason:
            yield UnreadableMeasure(
                span=measure.span, text=measure.span.written, reason=reason, hint=hint
            )


def _no_curve(variants: Sequence[Outline], named: str) -> tuple[str, str]:
    """Why measures aren't curves over an axis, and what to write; nothing where they are."""
    axes = [axis for e in variants for axis in e.axes if named in (axis.name, axis.alias)]
    over = next((axis for axis in axes), None)
    word = next((v for axis in axes for v in axis.labels if isinstance(v, str)), None)
    if over is None or word is not None:
        said = f", such as `{word}`" if word is not None else ""
        reason = f"`{named}` runs over words{said}, and a curve over numbers"
        return reason, "name an axis of numbers, or write `mean over`"
    if len(over) < 2:
        return f"`{named}` has one value, and a curve two at least", "sweep over more values"
    return "", ""


def _measures(experiment: Outline) -> list[KnownMeasure]:
    pairs = zip(experiment.measures, experiment.spec.measures, strict=True)
    return [_known_measure(*pair) for pair in pairs]


def _known(variants: Sequence[Outline], program: spec.Program) -> Known:
    """What expectations may name of an experiment."""
    experiment = variants[0]
    undecided = _undecided(variants, program)
    own, aliases, perhaps = _axes(variants)
    over = _over(variants)
    resolved = [e.resolved for e in variants if e.resolved is not None]
    cells = None
    if len(resolved) == len(variants):
        every = [part for e in resolved for part in in_parts(e)]
        parts = [(e.spec.variant, cell_keys(e, undecided, texts=False)) for e in every]
        cells = joined_cells(own if over is None else [*own, over], parts)
        cells = cells if over is None else averaged_cells(cells, over)[0]
    return Known(
        _measures(experiment),
        list(dict.fromkeys([*own, *aliases, *sorted(perhaps)])) if perhaps else own,
        _runs(variants),
        [e.name for e in program.experiments if e.name != experiment.name],
        aliases,
        cells,
        perhaps,
        undecided,
        experiment.name,
    )


def _runs(variants: Sequence[Outline]) -> list[str]:
    """As results call them: on several blocks or models each has runs of its own."""
    told = told_apart([(each.spec.variant, each.model.name) for each in variants])
    return list(
        dict.fromkeys(
            f"{run} ({whose})" if whose else run
            for each, whose in zip(variants, told, strict=True)
            for run in each.table.runs
        )
    )


def _known_measure(resolved: ResolvedMeasure | None, said: spec.Measure) -> KnownMeasure:
    """A measure as reports and expectations name it; what was refused of it, as its line says."""
    effect = said.effect if said.effect in EFFECTS else nearest(said.effect, EFFECTS) or said.effect
    if resolved is not None:
        return KnownMeasure(resolved.label, effect, resolved.kind, resolved.word)
    match said.metric:
        case ast.Call(name=word) | ast.Name(id=word):
            metric = METRICS.get(word)
        case _:
            word, metric = "", None
    kinds = {form.kind for form in metric.forms.values()} if metric is not None else set[str]()
    return KnownMeasure(said.label, effect, "category" if kinds == {"category"} else "number", word)


def _paired_alike(variants: Sequence[Outline], axes: Sequence[str]) -> Iterator[Diagnostic]:
    """W0704 for confusions of a value that source and base have in common in every row, though they
    are of two blocks: the category is that value with an effect and without one."""
    for report in variants[0].spec.reports:
        name = report.variable
        if report.kind != "confusion" or name is None or name in axes:
            continue
        for each in variants:
            source, base = each.spec.source, each.spec.base
            runs = each.table.runs
            if source is None or each.table.stands_in or not {source, base} <= runs.keys():
                continue
            values = [row.values.get(name) for row in runs["clean"].rows]
            between = runs[source].prompts != runs[base].prompts
            varied = any(value != values[0] for value in values[1:])
            if between and varied and all(_has(runs[run], values, name) for run in (source, base)):
                yield PairedAlike(span=report.span, source=source, base=base, name=name)
                break


def _has(run: Run, values: Sequence[Any], name: str) -> bool:
    """Whether every row of the run has this value; another block may call it otherwise."""
    names = [name] if run.prompts is None else list(run.rows[0].values)
    return any(
        all(row.values.get(own) == value for row, value in zip(run.rows, values, strict=True))
        for own in names
    )
