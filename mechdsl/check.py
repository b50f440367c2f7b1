"""Everything that can be refused without running: from the text of a file to resolved experiments.

No torch up to here. A model that isn't on this machine is a warning, and what needs it stays
unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mechdsl import spec
from mechdsl.data.block import Block
from mechdsl.data.prompts import build_table
from mechdsl.data.tokenizer import TextTokenizer
from mechdsl.data.types import PromptTable
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e01_syntax import BadPlaceholder, MisspeltWord, UnterminatedString
from mechdsl.diagnostics.e02_names import (
    BadCommandLine,
    DuplicateName,
    MissingLine,
    UnknownName,
    UnknownWord,
    did_you_mean,
)
from mechdsl.diagnostics.e03_positions import UnknownSpan
from mechdsl.diagnostics.e05_data import CorruptionWithoutEffect, UnknownText, UnknownValue
from mechdsl.diagnostics.e06_experiment import (
    EffectNeedsSource,
    EffectWithoutRule,
    NoMeasure,
    PatchWithoutSource,
    UnreadableMeasure,
)
from mechdsl.diagnostics.e06_statistics import BadReport, UnreadableExpectation
from mechdsl.diagnostics.w07_names import PatchesItself, UnusedName, WritesFirstToken
from mechdsl.expectations.check import Known, KnownMeasure, check_expectation
from mechdsl.lower import lower_program
from mechdsl.models.locate import locate
from mechdsl.models.shape import read_shape
from mechdsl.registry import nearest
from mechdsl.resolve import ModelContext, ResolvedExperiment, resolve_experiment
from mechdsl.resolve.cells import cell_keys
from mechdsl.results.significance import check_prompts
from mechdsl.source import Source
from mechdsl.syntax.parse import parse
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
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])

    @property
    def ok(self) -> bool:
        return not has_errors(self.diagnostics)


@dataclass(frozen=True)
class Settings:
    """What the command line may change."""

    parameters: Mapping[str, str] = field(default_factory=dict[str, str])
    limit: int | None = None
    """Rows per experiment at most, whatever the file says."""
    only: str | None = None
    """Run this experiment alone."""


def check_source(
    source: Source,
    settings: Settings | None = None,
    models: Mapping[str, ModelContext] | None = None,
) -> Checked:
    """Parse, lower, resolve and check; all errors at once.

    `models` are handed over from Python and stand for the file's models of the same name.
    """
    settings = settings or Settings()
    tree, syntax = parse(source)
    program, found = lower_program(tree, source, settings.parameters)
    checked = Checked(source, program, diagnostics=found)
    experiments = list(program.experiments)
    if settings.only is not None:
        experiments = _only(settings.only, checked)
    contexts = _Contexts(checked, models or {}, settings.limit)
    for experiment in experiments:
        checked.diagnostics.extend(_statements(experiment, program))
        _resolve(experiment, checked, contexts)
    for name, prompts in program.prompts.items():
        contexts.table_alone(name, prompts)
    checked.diagnostics.extend(_files_written(experiments))
    checked.diagnostics.extend(
        DuplicateName(span=value.span, name=name, first="the metric of the language")
        for name, value in program.metrics.items()
        if name in METRICS
    )
    found = [d for d in checked.diagnostics if not _follows(d, syntax)]
    if has_errors([*syntax, *found]):  # an error may be why a name isn't used
        found = [d for d in found if not isinstance(d, UnusedName)]
    checked.diagnostics = _unique([*syntax, *found])
    return checked


def _unique(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Each once: experiments that share prompts share their errors, if not their counts."""
    return list({(d.code, d.span, d.message): d for d in reversed(diagnostics)}.values())[::-1]


def _follows(diagnostic: Diagnostic, syntax: list[Diagnostic]) -> bool:
    """Whether something is only missing because its line has an error of syntax."""
    if not has_errors(syntax):
        return False
    if isinstance(diagnostic, ABSENT):
        return True
    if isinstance(diagnostic, BadPlaceholder):  # in a text that was never closed
        return any(isinstance(error, UnterminatedString) for error in syntax)
    if not isinstance(diagnostic, UNKNOWN):
        return False
    broken: set[str] = set()
    for error in syntax:
        if error.span is not None:
            broken.update(WORD.findall(error.span.source.line_text(error.span.line)))
        if isinstance(error, MisspeltWord):
            broken.add(error.meant)
    return not broken.isdisjoint(WORD.findall(diagnostic.name))


def _only(name: str, checked: Checked) -> list[spec.Experiment]:
    found = [e for e in checked.program.experiments if e.name == name]
    if not found:
        names = [e.name for e in checked.program.experiments]
        known = ", ".join(f"`{n}`" for n in names)
        checked.diagnostics.append(
            BadCommandLine(
                reason=f"`--only {name}`: the file has no experiment of that name",
                hint=did_you_mean(nearest(name, names), f"it has {known or 'none'}"),
            )
        )
    return found


class _Contexts:
    """Models and prompt tables of a file, each read once."""

    def __init__(
        self, checked: Checked, given: Mapping[str, ModelContext], limit: int | None
    ) -> None:
        self.checked = checked
        self.given = given
        self.limit = limit
        self._models: dict[str, ModelContext | None] = {}
        self._blocks: dict[str, Block] = {}
        self._tables: dict[tuple[object, ...], PromptTable | None] = {}

    def model(self, name: str) -> ModelContext | None:
        """What is known of a model; None where it isn't here or is refused."""
        if name in self.given:
            return self.given[name]
        if name not in self._models:
            self._models[name] = self._read(self.checked.program.models[name])
        return self._models[name]

    def _read(self, model: spec.Model) -> ModelContext | None:
        folder, found = locate(model, model.span.source.folder)
        self.checked.diagnostics.extend(found)
        if folder is None:
            return None
        shape, found = read_shape(folder, model=model.name, span=model.span)
        self.checked.diagnostics.extend(found)
        tokenizer, found = TextTokenizer.from_folder(folder, model.bos, span=model.span)
        self.checked.diagnostics.extend(found)
        if shape is None or tokenizer is None:
            return None
        return ModelContext(model, shape, tokenizer)

    def _words(self, name: str) -> list[str]:
        found = self.model(name)
        return [] if found is None else found.tokenizer.plain_words()

    def table(
        self, name: str, model: ModelContext, limit: int | None, part: str | None
    ) -> PromptTable | None:
        """The rows of a prompts block for one model."""
        if self.limit is not None:
            limit = self.limit if limit is None else min(limit, self.limit)
        key = (name, model.name, limit, part)
        if key not in self._tables:
            program = self.checked.program
            assert part is None or part == "train" or part == "test"
            table, found = build_table(
                program.prompts[name],
                tokenizer=model.tokenizer,
                seed=program.seed,
                limit=limit,
                part=part,
                words=self._words,
                max_length=model.shape.max_positions,
                parameters=program.parameters,
                blocks=program.prompts,
                compiled=self._blocks,
            )
            self.checked.diagnostics.extend(found)
            self._tables[key] = table
        return self._tables[key]

    def table_alone(self, name: str, prompts: spec.Prompts) -> None:
        """Check a block that no experiment has used, with the file's only model."""
        program = self.checked.program
        if any(key[0] == name for key in self._tables) or len(program.models) != 1:
            return
        if prompts.span.source is not self.checked.source:
            return
        model = self.model(next(iter(program.models)))
        if model is not None:
            self.table(name, model, 1, None)


def _resolve(experiment: spec.Experiment, checked: Checked, contexts: _Contexts) -> None:
    model = contexts.model(experiment.model)
    if model is None:
        checked.unchecked.append(experiment.name)
        return
    table = contexts.table(experiment.prompts, model, experiment.limit, experiment.part)
    if table is None:
        return
    resolved, found = resolve_experiment(experiment, checked.program, model, table)
    checked.diagnostics.extend(found)
    if resolved is None:
        return
    checked.diagnostics.extend(_against_axes(resolved, checked.program))
    checked.diagnostics.extend(_first_tokens(resolved))
    checked.diagnostics.extend(_enough_prompts(resolved))
    checked.experiments.append(resolved)


def _statements(experiment: spec.Experiment, program: spec.Program) -> list[Diagnostic]:
    """What the statements of an experiment must agree on, whatever the model."""
    found: list[Diagnostic] = []
    for rule in experiment.rules:
        if rule.source is not None and rule.source == experiment.base:
            found.append(PatchesItself(span=rule.span, run=rule.source))
    for measure in experiment.measures:
        effect = EFFECTS.get(measure.effect)
        if effect is None:
            hint = did_you_mean(
                EFFECTS.suggest(measure.effect), f"effects are {', '.join(EFFECTS)}"
            )
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


def _against_axes(experiment: ResolvedExperiment, program: spec.Program) -> list[Diagnostic]:
    """Reports and expectations name axes, measures, runs and values that exist."""
    own = [axis.name for axis in experiment.axes]
    axes = own + [axis.alias for axis in experiment.axes if axis.alias is not None]
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
        found.extend(check_report(report, axes, values))
    by = experiment.spec.statistics.by
    if by is not None and by not in values:
        found.append(
            UnknownName(
                span=experiment.spec.statistics.span,
                kind="value of the prompts",
                name=by,
                hint=did_you_mean(
                    nearest(by, values),
                    f"values of `{experiment.table.name}` are {', '.join(values)}",
                ),
            )
        )
    known = Known(
        [
            KnownMeasure(m.label, s.effect, m.kind)
            for m, s in zip(experiment.measures, experiment.spec.measures, strict=True)
        ],
        own,
        [name for name, run in experiment.table.runs.items() if run.rows and run.rows[0].texts],
        [e.name for e in program.experiments if e.name != experiment.name],
        {axis.alias: axis.name for axis in experiment.axes if axis.alias is not None},
        tuple(cell_keys(experiment)) if experiment.spec.expects else None,
    )
    for expectation in experiment.spec.expects:
        found.extend(check_expectation(expectation, known))
    return found


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


def _enough_prompts(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """W0720 where no p can be small enough, however large the effect."""
    known = [m for m in experiment.spec.measures if m.effect in EFFECTS]
    tested = [m for m in known if EFFECTS[m.effect].tested]
    if not tested or not experiment.rules:
        return []
    settings = experiment.spec.statistics
    rows = experiment.table.runs["clean"].rows
    units = len(rows)
    if settings.by is not None and rows and settings.by in rows[0].values:
        units = len({str(row.values.get(settings.by)) for row in rows})
    tests = len(tested) * experiment.n_cells
    return check_prompts(units, tests, settings, tested[0].span)


def _first_tokens(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """A write at token 0 is warned of: it may be the attention sink."""
    base = experiment.table.runs[experiment.spec.base]
    found: list[Diagnostic] = []
    for rule in experiment.rules:
        if rule.sites is None:
            continue
        for cell in rule.positions.written.values():
            row = next((n for n, hit in enumerate(cell.hits) for run in hit if 0 in run), None)
            # A sweep over every token has it among others, where it is plainly labelled.
            if row is not None and len(rule.positions.written) == 1 and len(cell.hits[row][0]) == 1:
                token = experiment.model.tokenizer.token_text(base.rows[row].ids[0])
                found.append(WritesFirstToken(span=rule.spec.at.span, token=token))
                break
    return found
