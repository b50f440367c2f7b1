"""Everything that can be refused without running: from the text of a file to resolved experiments.

No torch up to here. A model that isn't on this machine is a warning, and what needs it stays
unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e01_syntax import (
    BadPlaceholder,
    MisspeltWord,
    TooLarge,
    UnterminatedString,
)
from mechdsl.diagnostics.e02_names import (
    BadCommandLine,
    MissingLine,
    UnknownName,
    UnknownWord,
    did_you_mean,
)
from mechdsl.diagnostics.e03_coordinates import UNUSED_LOOP, BadLoopValue
from mechdsl.diagnostics.e03_positions import UnknownSpan
from mechdsl.diagnostics.e05_data import CorruptionWithoutEffect, UnknownText, UnknownValue
from mechdsl.diagnostics.e06_experiment import (
    EffectNeedsSource,
    EffectWithoutRule,
    NoMeasure,
    PatchWithoutSource,
    UnreadableMeasure,
)
from mechdsl.diagnostics.e06_onward import TestedWherePicked
from mechdsl.diagnostics.e06_statistics import BadReport, UnreadableExpectation
from mechdsl.diagnostics.w07_names import HidesMetric, PatchesItself, UnusedName, WritesFirstToken
from mechdsl.program import spec
from mechdsl.program.lower_file import lower_program
from mechdsl.program.python_files import Mode, check_functions
from mechdsl.program.run_order import in_order, with_needed
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.resolve.cell_key import joined_axes, joined_cells
from mechdsl.resolve.findings import Finding, VariantFinding
from mechdsl.resolve.name_cells import cell_keys
from mechdsl.resolve.resolve_experiment import resolve_experiment
from mechdsl.resolve.resolved import ModelContext, ResolvedExperiment
from mechdsl.rules import RULES
from mechdsl.syntax import ast
from mechdsl.syntax.parse import parse
from mechdsl.syntax.walk import walk
from mechdsl.validate.contexts import Contexts
from mechdsl.validate.expectations import Known, KnownMeasure, check_expectation
from mechdsl.validate.reachable_p import check_prompts
from mechdsl.vocab.corruptions import problems
from mechdsl.vocab.effects import EFFECTS
from mechdsl.vocab.metrics import METRICS
from mechdsl.vocab.reports import check_report

WORD = re.compile(r"[^\W\d]\w*")
ABSENT = (
    BadReport,
    CorruptionWithoutEffect,
    EffectNeedsSource,
    EffectWithoutRule,
    MissingLine,
    NoMeasure,
    PatchWithoutSource,
    UnreadableExpectation,
    UnusedName,
)
"""What a line with an error of syntax may be the cause of: an axis that is missing, for example."""
UNKNOWN = (UnknownName, UnknownSpan, UnknownText, UnknownValue)
"""What it may have defined."""


@dataclass
class Checked:
    """What is known of a file before it runs."""

    source: Source
    program: spec.Program
    experiments: list[ResolvedExperiment] = field(default_factory=list[ResolvedExperiment])
    unchecked: list[str] = field(default_factory=list[str])
    """Experiments whose model isn't on this machine."""
    unrun: list[str] = field(default_factory=list[str])
    """Experiments whose rows only Python can make, which wasn't run."""
    unreported: set[str] = field(default_factory=set[str])
    """Experiments that run only because another one uses what they find."""
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])


@dataclass(frozen=True)
class Settings:
    """What the command line may change."""

    parameters: Mapping[str, str] = field(default_factory=dict[str, str])
    limit: int | None = None
    """Rows per experiment at most, whatever the file says."""
    only: str | None = None
    """Run this experiment alone, with those whose results it uses."""
    python: Mode = "refuse"
    """What becomes of functions of Python files."""
    prompts_enough: int | None = None
    """How many prompts of each table are looked at, for a check without a run."""


def check_source(
    source: Source,
    settings: Settings | None = None,
    models: Mapping[str, ModelContext] | None = None,
) -> Checked:
    """Parse, lower, resolve and check; all errors at once.

    `models` are handed over from Python and stand for the file's models of the same name.
    """
    try:
        return _check_source(source, settings or Settings(), models or {})
    except RecursionError:  # each kind of nesting has its limit; what they add up to has not
        nowhere = Span(source, 0, 0)
        program, _ = lower_program(ast.File((), span=nowhere), source)
        problem = TooLarge(
            what="what this file says is nested too deeply",
            place="somewhere in this file",
            hint="nest expressions and definitions less, for example by half",
            span=nowhere,
        )
        return Checked(source, program, diagnostics=[problem])


def _check_source(
    source: Source, settings: Settings, models: Mapping[str, ModelContext]
) -> Checked:
    tree, syntax = parse(source)
    program, found = lower_program(tree, source, settings.parameters)
    checked = Checked(source, program, diagnostics=found)
    experiments = list(program.experiments)
    if settings.only is not None:
        experiments = _only(settings.only, checked)
    checked.diagnostics.extend(check_functions(program, settings.python))
    contexts = Contexts(
        program,
        checked.diagnostics,
        models,
        settings.limit,
        python=settings.python == "run",
        prompts_enough=settings.prompts_enough,
    )
    for prompts in program.prompts.values():
        for corruption in prompts.corruptions:
            checked.diagnostics.extend(problems(corruption.changes, program.parameters))
    for experiment in experiments:
        checked.diagnostics.extend(_statements(experiment, program))
    for experiment in in_order(experiments):
        _resolve(experiment, checked, contexts)
    place = {experiment.key: number for number, experiment in enumerate(experiments)}
    checked.experiments.sort(key=lambda each: place[each.spec.key])
    for variants in by_name(checked.experiments):
        checked.diagnostics.extend(_against_axes(variants, program))
        checked.diagnostics.extend(_enough_prompts(variants))
    for name, prompts in program.prompts.items():
        if prompts.span.source is source:
            contexts.table_alone(name)
    reported = [e for e in experiments if e.name not in checked.unreported]
    checked.diagnostics.extend(_files_written(reported))
    checked.diagnostics.extend(
        HidesMetric(span=value.span, name=name)
        for name, value in program.metrics.items()
        if name in METRICS
    )
    found = [d for d in checked.diagnostics if not _follows(d, syntax)]
    if has_errors([*syntax, *found]):  # an error may be why a name isn't used
        found = [d for d in found if not isinstance(d, UnusedName)]
    checked.diagnostics = _unique([*syntax, *found])
    return checked


def by_name(experiments: Iterable[ResolvedExperiment]) -> list[list[ResolvedExperiment]]:
    """The experiments of the file, each with all its variants."""
    found: dict[str, list[ResolvedExperiment]] = {}
    for experiment in experiments:
        found.setdefault(experiment.name, []).append(experiment)
    return list(found.values())


def _unique(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Each once: experiments that share prompts share their errors, if not their counts."""
    return list({(d.code, d.span, d.message): d for d in reversed(diagnostics)}.values())[::-1]


def _follows(diagnostic: Diagnostic, syntax: list[Diagnostic]) -> bool:
    """Whether something is only missing because its line has an error of syntax."""
    if not has_errors(syntax):
        return False
    if isinstance(diagnostic, ABSENT):
        return True
    if isinstance(diagnostic, BadLoopValue) and diagnostic.reason == UNUSED_LOOP:
        return True
    if isinstance(diagnostic, BadPlaceholder):  # in a text that was never closed
        return any(isinstance(error, UnterminatedString) for error in syntax)
    if isinstance(diagnostic, UnknownWord) and diagnostic.kind == "metric":
        name = diagnostic.word
    elif isinstance(diagnostic, UNKNOWN):
        name = diagnostic.name
    else:
        return False
    broken: set[str] = set()
    for error in syntax:
        if error.span is not None:
            broken.update(WORD.findall(error.span.source.line_text(error.span.line)))
        if isinstance(error, MisspeltWord):
            broken.add(error.meant)
    if isinstance(diagnostic, UnknownName) and diagnostic.kind == "part":
        return "split" in broken
    return not broken.isdisjoint(WORD.findall(name))


def _only(name: str, checked: Checked) -> list[spec.Experiment]:
    found = [e for e in checked.program.experiments if e.name == name]
    if not found:
        names = [e.name for e in checked.program.experiments]
        known = ", ".join(f"`{n}`" for n in names)
        checked.diagnostics.append(
            BadCommandLine(
                reason=f"`--only {name}`: the file has no experiment of that name",
                hint=did_you_mean(name, names, f"it has {known or 'none'}"),
            )
        )
        return []
    needed = with_needed(name, checked.program.experiments)
    checked.unreported.update(e.name for e in needed if e.name != name)
    return needed


def _resolve(experiment: spec.Experiment, checked: Checked, contexts: Contexts) -> None:
    others = [run.model for run in experiment.elsewhere if run.model is not None]
    found = [contexts.model(name) for name in (experiment.model, *others)]
    model = found[0]
    if model is None or None in found:
        if experiment.name not in checked.unchecked:
            checked.unchecked.append(experiment.name)
        return
    table = contexts.table(experiment.prompts, model, experiment.limit, experiment.part)
    if table is not None:
        table = contexts.with_elsewhere(experiment, model, table)
    if table is None:
        blocks = [experiment.prompts, *(run.prompts for run in experiment.elsewhere)]
        python = any(name is not None and contexts.needs_python(name) for name in blocks)
        if python and experiment.name not in checked.unrun:
            checked.unrun.append(experiment.name)
        return
    table = _with_means(experiment, checked, contexts, model, table)
    stand_ins = _stand_ins(experiment, checked)
    if stand_ins is None or table is None:
        return
    resolved, found = resolve_experiment(
        experiment, checked.program, model, table, RULES, stand_ins
    )
    checked.diagnostics.extend(found)
    if resolved is None:
        return
    checked.diagnostics.extend(_first_tokens(resolved))
    checked.diagnostics.extend(_tested_where_picked(resolved, stand_ins))
    checked.experiments.append(resolved)


def _with_means(
    experiment: spec.Experiment,
    checked: Checked,
    contexts: Contexts,
    model: ModelContext,
    table: PromptTable,
) -> PromptTable | None:
    """The table with the other blocks that means are taken of; None where one can't be built."""
    beside: dict[str, PromptTable] = {}
    for rule in experiment.rules:
        fill = rule.fill
        if not isinstance(fill, ast.OfRef) or fill.of.name in table.runs:
            continue
        if fill.of.name not in checked.program.prompts:
            continue
        other = contexts.table(fill.of.name, model, None, None)
        if other is None:
            return None
        beside[fill.of.name] = other
    return replace(table, beside=beside) if beside else table


def _stand_ins(experiment: spec.Experiment, checked: Checked) -> dict[str, Finding] | None:
    """What stands in for the results that an experiment uses; None where one can't be had, which
    is said of that one."""
    found: dict[str, Finding] = {}
    for name in experiment.after:
        parts = [VariantFinding(each) for each in checked.experiments if each.name == name]
        variants = [each for each in checked.program.experiments if each.name == name]
        if len(parts) != len(variants):
            for skipped in (checked.unchecked, checked.unrun):
                if name in skipped and experiment.name not in skipped:
                    skipped.append(experiment.name)
            return None
        found[name] = Finding(tuple(parts))
    return found


def _tested_where_picked(
    experiment: ResolvedExperiment, found: Mapping[str, Finding]
) -> list[Diagnostic]:
    """W0721 for sites that are tested on the rows that they were picked on. Tokens are picked row
    by row, which has no other rows to be tested on."""
    table = experiment.table
    said: list[Diagnostic] = []
    for name, span in experiment.sites_of.items():
        picked = {
            row
            for part in found[name].parts
            if part.experiment.table.name == table.name
            for row in part.experiment.table.row_ids
        }
        shared = len(picked.intersection(table.row_ids))
        if shared:
            said.append(
                TestedWherePicked(
                    span=span,
                    experiment=experiment.name,
                    of=name,
                    block=table.name,
                    shared=shared,
                    rows=len(table),
                )
            )
    return said


def _statements(experiment: spec.Experiment, program: spec.Program) -> list[Diagnostic]:
    """What the statements of an experiment must agree on, whatever the model."""
    found: list[Diagnostic] = []
    for rule in experiment.rules:
        if rule.source is not None and rule.source == experiment.base:
            found.append(PatchesItself(span=rule.span, run=rule.source))
    for measure in experiment.measures:
        effect = EFFECTS.get(measure.effect)
        if effect is None:
            hint = did_you_mean(measure.effect, EFFECTS, f"effects are {', '.join(EFFECTS)}")
            found.append(
                UnknownWord(span=measure.effect_span, kind="effect", word=measure.effect, hint=hint)
            )
        elif effect.needs_source and experiment.source is None:
            corruptions = program.prompts[experiment.prompts].corruptions
            base = corruptions[0].name if corruptions else "CORRUPTION"
            found.append(EffectNeedsSource(span=measure.span, effect=effect.name, base=base))
        elif effect.zero is not None and effect.name != "total" and not experiment.rules:
            found.append(
                EffectWithoutRule(
                    span=measure.span,
                    effect=effect.name,
                    instead="raw" if experiment.source is None else "total",
                )
            )
    return found


def _against_axes(
    variants: Sequence[ResolvedExperiment], program: spec.Program
) -> list[Diagnostic]:
    """Reports and expectations name axes, measures, runs and values that exist."""
    experiment = variants[0]
    own = joined_axes([(e.spec.variant, [axis.name for axis in e.axes]) for e in variants])
    aliases = {a.alias: a.name for e in variants for a in e.axes if a.alias is not None}
    axes = [*own, *aliases]
    rows = experiment.table.runs["clean"].rows
    values = list(rows[0].values) if rows else []
    found: list[Diagnostic] = []
    for resolved, said in zip(experiment.measures, experiment.spec.measures, strict=True):
        if resolved.kind == "category" and said.effect != "raw":
            found.append(
                UnreadableMeasure(
                    span=said.span,
                    text=resolved.text,
                    reason="it is a category, which has no differences",
                    hint="measure it `as raw`, or use `expected(…)`, which is a number",
                )
            )
    for report in experiment.spec.reports:
        found.extend(check_report(report, axes, values, experiment.measures))
    by = experiment.spec.statistics.by
    if by is not None and by not in values:
        found.append(
            UnknownName(
                span=experiment.spec.statistics.span,
                kind="value of the prompts",
                name=by,
                hint=did_you_mean(
                    by,
                    values,
                    f"values of `{experiment.table.name}` are {', '.join(values)}",
                ),
            )
        )
    found.extend(_accuracies(variants))
    known = Known(
        [
            KnownMeasure(m.label, s.effect, m.kind, m.word)
            for m, s in zip(experiment.measures, experiment.spec.measures, strict=True)
        ],
        own,
        list(experiment.table.runs) if rows and rows[0].texts else [],
        [e.name for e in program.experiments if e.name != experiment.name],
        aliases,
        joined_cells(own, [(e.spec.variant, cell_keys(e)) for e in variants])
        if experiment.spec.expects
        else None,
    )
    for expectation in experiment.spec.expects:
        found.extend(check_expectation(expectation, known))
    return found


def _accuracies(variants: Sequence[ResolvedExperiment]) -> list[Diagnostic]:
    """E0606 for `accuracy(clean)` of several models, each of which has its own."""
    names = list(dict.fromkeys(each.model.name for each in variants))
    if len(names) == 1:
        return []
    return [
        UnreadableExpectation(
            span=expect.span,
            reason="each model has an accuracy of its own",
            hint=f"ask it of one: an experiment on `model {names[0]}` alone",
        )
        for expect in variants[0].spec.expects
        if any(
            isinstance(node, ast.Call) and node.name == "accuracy"
            for node in walk(expect.condition)
        )
    ]


def _files_written(experiments: list[spec.Experiment]) -> list[Diagnostic]:
    """Two reports in one file: the second would silently take the place of the first."""
    found: list[Diagnostic] = []
    first: dict[str, spec.Report] = {}
    for report in (report for experiment in experiments for report in experiment.reports):
        if report.file is None:
            continue
        other = first.setdefault(report.file, report)
        if other is not report:
            found.append(
                BadReport(
                    span=report.span,
                    kind=report.kind,
                    reason=f"goes to `{report.file}`, as the report on line {other.span.line} does",
                    hint="give each report a file of its own",
                )
            )
    return found


def _enough_prompts(variants: Sequence[ResolvedExperiment]) -> list[Diagnostic]:
    """W0720 where no p can be small enough, however large the effect."""
    experiment = variants[0]
    known = [m for m in experiment.spec.measures if m.effect in EFFECTS]
    tested = [m for m in known if EFFECTS[m.effect].tested]
    if not tested or not experiment.rules:
        return []
    settings = experiment.spec.statistics
    rows = experiment.table.runs["clean"].rows
    units = len(rows)
    if settings.by is not None and rows and settings.by in rows[0].values:
        units = len({str(row.values.get(settings.by)) for row in rows})
    tests = len(tested) * sum(each.n_cells for each in variants)
    return check_prompts(units, tests, settings, tested[0].span)


def _first_tokens(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """A write at token 0 is warned of: it may be the attention sink."""
    base = experiment.table.runs[experiment.spec.base]
    found: list[Diagnostic] = []
    for rule in experiment.rules:
        # Which tokens another experiment ranks is not known yet.
        ranked = any(isinstance(node, ast.RankedTokens) for node in walk(rule.spec.at))
        if rule.sites is None or ranked:
            continue
        for cell in rule.positions.written.values():
            row = next((n for n, hit in enumerate(cell.hits) for run in hit if 0 in run), None)
            # A sweep over every token has it among others, where it is plainly labelled.
            if row is not None and len(rule.positions.written) == 1 and len(cell.hits[row][0]) == 1:
                token = experiment.model.tokenizer.token_text(base.rows[row].ids[0])
                found.append(WritesFirstToken(span=rule.spec.at.span, token=token))
                break
    return found
