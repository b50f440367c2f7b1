"""Check a file: from its text to resolved experiments, with every check that needs no run.

None of this imports torch. A model that isn't on this machine is a warning; a placeholder replaces
it, and checks that depend on the model are skipped.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path, PurePath
from typing import TypeVar

from mechdsl.base import limits
from mechdsl.base.records import Record, closest_name
from mechdsl.base.text import Source, Span, name_list
from mechdsl.checks.expectations import check_results
from mechdsl.checks.models import (
    BuiltModel,
    ModelBuilder,
    check_edits,
    check_image_support,
    check_measure_tokens,
)
from mechdsl.checks.prompt_tables import FileContexts, StreamedPart
from mechdsl.checks.trained_groups import (
    check_held_out_images,
    check_masks,
    check_nodes,
    check_seeds_of_nodes,
    fill_groups,
    find_trained_nodes,
    reject_masks,
)
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, filter_certain, has_errors
from mechdsl.diagnostics.experiments import (
    NO_GENERATION_REASON,
    BadPick,
    BadReport,
    EffectNeedsSource,
    EffectWithoutRule,
    NoEstimate,
    NoMeasure,
    PatchWithoutSource,
    SelectionRowsReused,
    UnreadableExpectation,
    UnreadableMeasure,
)
from mechdsl.diagnostics.habits import suggest_rewrite
from mechdsl.diagnostics.models import ModelNotLocal
from mechdsl.diagnostics.prompts import CorruptionWithoutEffect, NoRows, NoTemplate, UnknownValue
from mechdsl.diagnostics.rules import (
    NO_REPLY_REASON,
    UNUSED_LOOP,
    AnswerNotCovered,
    BadLoopValue,
    NotInReply,
    OutsidePrompt,
    UnreadBlocks,
)
from mechdsl.diagnostics.syntax import (
    BadArgument,
    BadPlaceholder,
    FirstTokenWrite,
    MissingLine,
    NotSupported,
    ReservedName,
    SelfWrite,
    ShadowedMetric,
    TooLarge,
    UnknownName,
    UnknownWord,
    UnterminatedString,
    UnusedName,
)
from mechdsl.models.folder import locate_model
from mechdsl.program import spec
from mechdsl.program.directions import (
    fit_rows_of_basis,
    fit_rows_of_experiment,
    name_nodes,
    used_bases,
    used_directions,
)
from mechdsl.program.lowering import add_dependencies, lower_program, sort_by_dependency
from mechdsl.program.measures import metric_operands
from mechdsl.program.paths import (
    ROWS_PATH,
    WILDCARD,
    path_arguments,
    path_to_read,
    path_to_write,
    paths_to_read,
    source_reach,
)
from mechdsl.program.prompts import NO_IMAGE_REASON
from mechdsl.program.python_functions import (
    CallableFunction,
    PythonMode,
    check_functions,
    program_functions,
)
from mechdsl.program.trainings import select_seed, used_masks
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.table import add_stand_in_runs
from mechdsl.resolve.cells import find_open_axes
from mechdsl.resolve.circuits import is_unread
from mechdsl.resolve.expansion import find_selections, split_by_group
from mechdsl.resolve.experiment import find_omitted_answers, outline_experiment
from mechdsl.resolve.findings import Finding, VariantFinding
from mechdsl.resolve.measures import unknown_metric_hint
from mechdsl.resolve.model_pairs import attach_texts, check_fit_model
from mechdsl.resolve.node_circuits import (
    NODE_FORMS,
    find_node_problem,
    names_circuit,
    suggest_node_rule,
    with_everything,
)
from mechdsl.resolve.trainings import check_objective
from mechdsl.resolve.types import ExperimentOutline, ModelContext, ResolvedExperiment, ResolvedRule
from mechdsl.rules.kinds import RULES, registered_words
from mechdsl.syntax import ast
from mechdsl.syntax.frontend import parse
from mechdsl.syntax.traversal import walk
from mechdsl.syntax.words import AXIS_WORDS, RESERVED
from mechdsl.vocab.aggregates import AREA_HINTS
from mechdsl.vocab.corruptions import change_problems
from mechdsl.vocab.metrics import EFFECTS, FAITHFULNESS, METRICS, EffectKind
from mechdsl.vocab.reports import result_file
from mechdsl.vocab.sites import SHORT_WORDS, SITES, unknown_component

_MISSING = (
    CorruptionWithoutEffect,
    EffectNeedsSource,
    EffectWithoutRule,
    MissingLine,
    NoMeasure,
    NoRows,
    NoTemplate,
    PatchWithoutSource,
)
"""Missing parts of a block. A block with an error may only be unfinished."""

_POSITION_AXES = ("position", "item", "from_position")
"""Axes that a line may create without naming them."""

_QUOTED = re.compile(r"`([^`]*)`")

_WORD = re.compile(r"[^\W\d]\w*")


class BrokenLines:
    """The lines of a file with syntax errors, and the statements lost because of them."""

    def __init__(
        self, syntax: Sequence[Diagnostic], tree: ast.File, lost: Sequence[ast.LostStatement]
    ) -> None:
        """Collect the lines and their blocks.

        Args:
            syntax: Diagnostics that include the syntax errors of the texts.
            lost: Lost statements of the file and its imports.
        """
        kinds = ast.ExperimentDef | ast.PromptsDef
        self.source = tree.span.source
        self.starts = [
            statement.span.start for statement in tree.statements if isinstance(statement, kinds)
        ]
        self.names = {name for statement in lost for name in statement.names}
        self.lost_words = {
            words[0] for statement in lost if (words := statement.span.text.split(None, 1))
        }
        """First words of the lost statements."""
        self.refused = [problem.name for problem in syntax if isinstance(problem, ReservedName)]
        """Words of the language that the file uses as names."""
        self.torn: dict[int, set[str]] = defaultdict(set)
        """Words of the lost statements, by their block."""
        for statement in lost:
            self.torn[self.block(statement.span)].update(_WORD.findall(statement.span.text))
        errors = [
            (problem, problem.span) for problem in syntax if problem.span and _of_text(problem)
        ]
        self.wrong = {self.block(span) for _, span in errors}
        self.unfinished = {
            statement.name.id
            for statement in tree.statements
            if isinstance(statement, ast.ExperimentDef | ast.PromptsDef)
            and self.block(statement.span) in self.wrong
        }
        """Blocks that contain an error."""
        self.unclosed = {
            (span.source, span.line)
            for problem, span in errors
            if isinstance(problem, UnterminatedString)
        }

    def block(self, span: Span) -> int:
        """Return the number of the block that contains or precedes a span; the block's closing
        brace may be the error. 0 before the first block and in other files."""
        return bisect_right(self.starts, span.start) if span.source is self.source else 0

    def axes(self, span: Span) -> frozenset[str]:
        """Return axes that the lost lines of a block may have defined."""
        words = self.torn.get(self.block(span))
        if words is None:
            return frozenset()
        words = words - (RESERVED - AXIS_WORDS)  # `measure` isn't a misspelt `feature`
        axis_names = {axis for axis in AXIS_WORDS if closest_name(axis, words)}  # even if misspelt
        return frozenset({*axis_names, *(f"to_{axis}" for axis in axis_names), *_POSITION_AXES})

    def names_lost_before(self, span: Span | None) -> bool:
        """Whether the text before a span, in the same line, names a lost definition."""
        if span is None:
            return False
        line = span.source.text[: span.start].rpartition("\n")[2]
        return not self.names.isdisjoint(_WORD.findall(line))

    def cause(self, diagnostic: Diagnostic) -> bool:
        """Whether one of the lost lines may be the cause of a diagnostic of another line."""
        if diagnostic.span is None:
            return False
        block = self.block(diagnostic.span)
        match diagnostic:
            case BadPlaceholder(span=span):  # in an unterminated text
                return (span.source, span.line) in self.unclosed if span else False
            case BadLoopValue(reason=reason) if reason == UNUSED_LOOP:
                return block in self.torn
            case NoEstimate(reason=reason) if reason == NO_GENERATION_REASON:
                return block in self.torn
            case BadReport(reason=reason) | UnreadableExpectation(reason=reason):
                lacking = _quoted(reason)
                made = {*self.names, *self.torn.get(block, ())}
                return (block in self.torn and not lacking) or not made.isdisjoint(lacking)
            case UnknownName(kind="run") if "answer" in self.names:
                return True  # `accuracy` needs runs with an answer
            case UnknownName(name=name) | UnknownValue(name=name) if closest_name(
                name, self.refused
            ):
                return True  # `model to = …`, meant as `toy`
            case BadArgument(reason=reason) if reason == NO_IMAGE_REASON:
                return block in self.wrong
            case BadPick(reason=reason) | BadArgument(reason=reason):
                return not self.unfinished.isdisjoint(_quoted(reason))
            case NotInReply(reason=reason) if reason == NO_REPLY_REASON:
                return block in self.wrong
            case MissingLine(what=what) if what in self.lost_words:
                return True  # `model gpt = "gpt2"`
            case UnknownWord(kind="fill of an ablation", span=span) if self.names_lost_before(span):
                return True  # the edges of a circuit carry a run
            case _ if isinstance(diagnostic, _MISSING):
                return block in self.wrong
            case _:
                return not _of_text(diagnostic) and not self.names.isdisjoint(
                    _quoted(diagnostic.message)
                )


def _of_text(diagnostic: Diagnostic) -> bool:
    return diagnostic.code.startswith("E01") and not isinstance(diagnostic, NotSupported)


def _quoted(message: str) -> list[str]:
    return [word for text in _QUOTED.findall(message) for word in _WORD.findall(text)]


SKIPPED_CHECK_KINDS = (
    "layers, heads and sites",
    "positions of tokens",
    "tokens of answers",
    "cells",
)


def list_skipped_checks(
    problems: Sequence[Diagnostic], program: spec.Program, source: Source
) -> list[Diagnostic]:
    """Add the lines of the file that are only partly checked to each W0710."""
    return [
        replace(problem, waiting=_skipped_checks(problem.model, program, source))
        if isinstance(problem, ModelNotLocal)
        else problem
        for problem in problems
    ]


def _skipped_checks(model: str, program: spec.Program, source: Source) -> str:
    lines: dict[str, set[int]] = {}
    for experiment in program.experiments:
        used = (experiment.model, *(run.model for run in experiment.elsewhere))
        if all(model not in _depends_on(each, program) for each in used):
            continue
        waits = find_open_axes(experiment, program.groups, ("shape", "tokens"))
        prompts = program.prompts[experiment.prompts]
        for kind, span in _parts(experiment, prompts, cells=bool(waits)):
            if span.source is source:
                lines.setdefault(kind, set()).add(span.line)
    listed = [
        f"{kind} ({_listed(sorted(lines[kind]))})" for kind in SKIPPED_CHECK_KINDS if kind in lines
    ]
    return f"; `validate` then also checks {', '.join(listed)}" if listed else ""


def _depends_on(name: str | None, program: spec.Program) -> set[str]:
    """Return a model and the models that it is made from."""
    names: set[str] = set()
    waiting = [] if name is None else [name]
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            waiting += program.models[name].bases if name in program.models else ()
    return names


def _parts(
    experiment: spec.Experiment, prompts: spec.Prompts, *, cells: bool
) -> Iterator[tuple[str, Span]]:
    """Yield parts of an experiment that depend on the model; `cells`: whether its cells do."""
    sites, positions, answers, named = SKIPPED_CHECK_KINDS
    for rule in experiment.every_rule:
        for site in (rule.site, rule.edge, rule.receiver):
            if site is not None:
                yield sites, site.span
        for at in (rule.at, rule.onto):
            if at is not None:
                yield positions, at.span
    for measure in experiment.measures:
        if measure.at is not None:
            yield positions, measure.at.span
    for text in prompts.texts:
        yield answers, text.value.span
    for expect in experiment.expects if cells else ():
        if expect.contains or any(map(_names_a_cell, walk(expect.condition))):
            yield named, expect.span


def _names_a_cell(node: ast.Node) -> bool:
    return isinstance(node, ast.ShortSite | ast.Site) or (
        isinstance(node, ast.Argument) and node.name is not None
    )


def _listed(lines: Sequence[int]) -> str:
    """Format line numbers: `line 3`, `lines 3, 5 to 7`."""
    runs = [
        [line for _, line in run]
        for _, run in groupby(enumerate(lines), key=lambda pair: pair[1] - pair[0])
    ]
    words = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(words)}"


MODEL_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "*.safetensors",
    "*.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "*processor_config.json", "chat_template*",
)  # fmt: skip
"""Files that loading reads in a model's folder, which may also contain others."""

ReportedFile = tuple[spec.Program, Sequence[spec.Experiment]]
"""A file and those of its experiments that are reported."""


def check_output_files(files: Sequence[ReportedFile]) -> list[Diagnostic]:
    """Report files of one command that would overwrite a file it reads or another of them, whatever
    the spelling of the paths and through links.

    Codes: E0607 for reports, E0207 for saved files.
    """
    reports: dict[Span, tuple[spec.Report, spec.Program, list[str]]] = {}
    for program, experiments in files:
        for experiment in experiments:
            for report in experiment.reports:
                if report.file is not None:
                    _, _, results = reports.setdefault(report.span, (report, program, []))
                    results.append(experiment.name)
    saves = [
        (save, program)
        for program, experiments in files
        for save in {
            save.span: save
            for experiment in experiments
            for save in (*experiment.saves, *experiment.saved_directions)
        }.values()
    ]
    if not reports and not saves:
        return []
    read: dict[Hashable, tuple[str, spec.Program]] = {}
    for program, _ in files:
        for path, what in _read_by(program):
            read.setdefault(_identity(path), (what, program))
    diagnostics: list[Diagnostic] = []
    first: dict[Hashable, tuple[spec.Report, spec.Program]] = {}
    written = (
        (report, program, file)
        for report, program, results in reports.values()
        for file in _report_files(report, results)
    )
    for report, program, file in written:
        target, problems = path_to_write(f"report {report.kind}", file, report.span)
        if target is None:
            diagnostics.extend(problems)
            continue
        path = _identity(target)
        other, of = first.setdefault(path, (report, program))
        if path in read:
            what, reader = read[path]
            where = "" if reader is program else f" in `{reader.span.source.name}`"
            reason = f"would overwrite {what}{where}"
        elif other is not report:
            where = "" if of is program else f" of `{of.span.source.name}`"
            reason = f"has the same path, `{file}`, as the report on line {other.span.line}{where}"
        else:
            continue
        hint = "use a separate file for each report"
        diagnostics.append(BadReport(span=report.span, kind=report.kind, reason=reason, hint=hint))
    taken = {path: f"the report on line {each.span.line}" for path, (each, _) in first.items()}
    taken |= {path: what for path, (what, _) in read.items()}
    return [*diagnostics, *_saved(saves, taken)]


def _report_files(report: spec.Report, results: Sequence[str]) -> Iterable[str]:
    """Return the files that a report may write: with several results, one for each of them."""
    assert report.file is not None
    names = set(results)
    files = [result_file(report.file, name) for name in names] if len(names) > 1 else []
    return dict.fromkeys([report.file, *sorted(files)])


def _saved(
    saves: Sequence[tuple[spec.Save | spec.SavedDirection, spec.Program]],
    taken: dict[Hashable, str],
) -> Iterator[Diagnostic]:
    """Report E0207 for a `save`, or its file of rows, that would overwrite a file, and invalid
    paths.

    Args:
        taken: File identity → description.
    """
    for save, _ in saves:
        with_rows = isinstance(save, spec.Save) and not (save.mean or save.rows)
        rows_file = str(PurePath(save.file).with_suffix(".jsonl"))
        for written in dict.fromkeys((save.file, rows_file) if with_rows else (save.file,)):
            target, problems = path_to_write("save", written, save.span)
            if target is None:
                yield from problems
                break
            path = _identity(target)
            if path in taken:
                yield BadArgument(
                    span=save.span,
                    name=written,
                    reason=f"would overwrite {taken[path]}",
                    hint="use a separate file for each `save`"
                    + ("; its rows are saved next to it in a `.jsonl` file" if with_rows else ""),
                )
                break
            taken[path] = f"the file of the `save` on line {save.span.line}"


def find_overwritten(path: Path, files: Sequence[ReportedFile]) -> str | None:
    """Return the description of the file that an option's output would overwrite, if any."""
    own = _identity(path)
    for program, experiments in files:
        for read, what in _read_by(program):
            if _identity(read) == own:
                return what
        for report in (each for experiment in experiments for each in experiment.reports):
            if report.file is None:
                continue
            target, _ = path_to_write(f"report {report.kind}", report.file, report.span)
            if target is not None and _identity(target) == own:
                return f"`{report.file}`, the report on line {report.span.line}"
    return None


def _read_by(program: spec.Program) -> Iterator[tuple[Path, str]]:
    """Yield every path that running a file reads, with its description."""
    for path in program.files:
        yield path, f"`{path.name}`, a `.mech` file that the run reads"
    for prompts in program.prompts.values():
        if isinstance(prompts.rows, ast.String):
            written = prompts.rows.value
            for path in paths_to_read(ROWS_PATH, written, prompts.rows.span)[0]:
                shown = path.name if WILDCARD in written else written
                yield path, f"`{shown}`, the rows of prompts `{prompts.name}`"
    made = [(direction.name, direction.value) for direction in program.directions.values()]
    made += [(basis.name, basis.method) for basis in program.bases.values()]
    for name, tree in made:
        for node in walk(tree):
            for construct, written in path_arguments(node, program.parameters):
                path = path_to_read(construct, written, node.span)[0]
                if path is not None:
                    for file in path.glob("*") if path.is_dir() else (path,):
                        yield file, f"`{file.name}`, which `{name}` reads"
    for function in program_functions(program):
        if isinstance(function, CallableFunction):
            continue
        yield function.path, f"`{function.file}`, which defines `{function.name}`"
    for model in program.models.values():
        if model.function is not None or not model.is_loaded:  # its file is listed elsewhere
            continue
        folder, _ = locate_model(model, model.span.source.folder)
        if folder is not None:
            for path in (path for pattern in MODEL_FILES for path in folder.glob(pattern)):
                yield path, f"`{path.name}` of the model `{model.name}`"


def _identity(path: Path) -> Hashable:
    """Return a key that is equal for all paths to one file."""
    try:
        there = path.stat()
    except (OSError, ValueError):  # a missing file or an invalid path
        return os.path.realpath(str(path).replace("\0", ""))
    return there.st_dev, there.st_ino


ExperimentT = TypeVar("ExperimentT", ResolvedExperiment, ExperimentOutline)


class CheckSettings(Record):
    """Settings of the command line."""

    parameters: Mapping[str, str] = field(default_factory=dict[str, str])
    limit: int | None = None
    """Maximum number of rows per experiment, overriding the file."""
    only: tuple[str, ...] = ()
    """Run only these experiments and those whose results they use; empty: all."""
    python: PythonMode = "refuse"
    """Treatment of functions of Python files."""
    require_models: bool = False
    """Whether a model that isn't on this machine is an error."""
    allow_outside: bool = False
    """Whether reports may be written anywhere instead of only below the file's folder."""
    untrusted: bool = False
    """Whether reading is restricted too, Python is forbidden, and paths are listed."""
    prompts_enough: int | None = None
    """Number of prompts to check per table, for a check without a run."""
    build: ModelBuilder | None = None
    """Builds models with functions of Python files, if these may run."""
    trained: Mapping[str, tuple[object, str]] = field(default_factory=dict[str, tuple[object, str]])
    """As in `Program.trained`."""
    callables: tuple[ast.Call, ...] = ()
    """Definitions of functions passed from Python. A metric replaces the file's metric of the same
    name."""


@dataclass
class CheckedFile:
    """Everything known about a file before it runs."""

    source: Source
    program: spec.Program
    settings: CheckSettings = field(default_factory=CheckSettings)
    """The settings of the check."""
    experiments: list[ResolvedExperiment] = field(default_factory=list[ResolvedExperiment])
    saving: list[ResolvedExperiment] = field(default_factory=list[ResolvedExperiment])
    """Experiments that save activations; some of them have no measures."""
    unchecked: list[str] = field(default_factory=list[str])
    """Experiments whose model isn't on this machine."""
    unrun: list[str] = field(default_factory=list[str])
    """Experiments whose rows require Python that was not run."""
    edits: dict[str, ResolvedExperiment] = field(default_factory=dict[str, ResolvedExperiment])
    """The edits of each edited model, as rules on its base."""
    objectives: dict[tuple[str, str], ResolvedExperiment] = field(
        default_factory=dict[tuple[str, str], ResolvedExperiment]
    )
    """What rotations, vectors and masks are trained on, by definition and model: see
    `mechdsl.program.trainings`."""
    built: dict[str, BuiltModel] = field(default_factory=dict[str, BuiltModel])
    """Models built by functions of Python files, by name."""
    unreported: set[str] = field(default_factory=set[str])
    """Experiments that run only because another one uses their results."""
    reported: list[spec.Experiment] = field(default_factory=list[spec.Experiment])
    """The selected other experiments, whose reports are created."""
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])
    part: PartBuilder | None = field(default=None, repr=False)
    """Builds rows of a block whose rows are read in parts."""


PartBuilder = Callable[[str, ModelContext, Sequence[int]], StreamedPart]
"""Returns the rows of a block with these numbers, for a model."""


def check_source(
    source: Source,
    settings: CheckSettings | None = None,
    models: Mapping[str, ModelContext] | None = None,
) -> CheckedFile:
    """Parse, lower, resolve and check a source; report all errors together.

    Args:
        models: Models passed from Python, which replace the file's models of the same name.
    """
    try:
        return _check_source(source, settings or CheckSettings(), models or {})
    except RecursionError:  # each type of nesting is limited, but not their sum
        nowhere = Span(source, 0, 0)
        program, _ = lower_program(ast.File((), span=nowhere), source, registered_words())
        problem = TooLarge(
            what="this file is nested too deeply",
            place="somewhere in this file",
            hint="reduce the nesting of expressions and definitions, for example by half",
            span=nowhere,
        )
        return CheckedFile(source, program, settings or CheckSettings(), diagnostics=[problem])


def _collect_resolved(outlines: Iterable[ExperimentOutline], checked: CheckedFile) -> None:
    """Add the experiments that can run to the checked file."""
    skipped = {*checked.unchecked, *checked.unrun}
    resolved = [
        outline.resolved
        for outline in outlines
        if outline.resolved is not None and outline.spec.name not in skipped
    ]
    measured = (experiment for experiment in resolved if experiment.measures)
    checked.experiments.extend(
        part for experiment in measured for part in split_by_group(experiment)
    )
    checked.saving.extend(
        experiment for experiment in resolved if experiment.saves or experiment.direction_files
    )


def _check_source(
    source: Source, settings: CheckSettings, models: Mapping[str, ModelContext]
) -> CheckedFile:
    settings, problems = _without_contradiction(settings)
    source = replace(
        source,
        reach=source_reach(source, outside=settings.allow_outside, untrusted=settings.untrusted),
    )
    words = registered_words()
    tree, syntax = parse(source, words)
    program, lowered = lower_program(tree, source, words, settings.parameters, settings.callables)
    program = program.model_copy(update={"trained": dict(settings.trained)})
    broken = BrokenLines([*syntax, *lowered], tree, program.lost)
    checked = CheckedFile(source, program, settings, diagnostics=[*problems, *lowered])
    experiments = list(program.experiments)
    if settings.only:
        experiments = _only(settings.only, checked)
    checked.diagnostics.extend(check_functions(program, settings.python, models))
    contexts = FileContexts(
        program,
        checked.diagnostics,
        models,
        settings.limit,
        python=settings.python,
        build=None if syntax else settings.build,
        require=settings.require_models,
        prompts_enough=settings.prompts_enough,
    )
    checked.diagnostics.extend(_corruption_problems(program))
    checked.diagnostics.extend(_unused_definitions(program, lowered))
    for experiment in experiments:
        checked.diagnostics.extend(_statements(experiment, program))
    _resolve_edits(checked, contexts)
    _resolve_objectives(experiments, checked, contexts)
    ready = sort_by_dependency(experiments)
    outlines: dict[str, ExperimentOutline] = {}
    for experiment in (*ready, *(e for e in experiments if e not in ready)):
        known = _outline(experiment, checked, contexts, outlines)
        perhaps = known.perhaps | broken.axes(experiment.span)
        outlines[experiment.key] = replace(known, perhaps=perhaps)
    every = {v[0].name: v for v in group_variants([outlines[e.key] for e in experiments])}
    for variants in every.values():
        checked.diagnostics.extend(check_results(variants, program, every))
    _collect_resolved([outlines[each.key] for each in experiments], checked)
    for name, prompts in program.prompts.items():
        if prompts.span.source is source:
            contexts.table_alone(name)
    checked.built, checked.part = contexts.models.built, contexts.part
    checked.reported = [e for e in experiments if e.name not in checked.unreported]
    checked.diagnostics.extend(check_output_files([(program, checked.reported)]))
    checked.diagnostics.extend(
        ShadowedMetric(span=value.span, name=name)
        for name, value in program.metrics.items()
        if name in METRICS
    )
    problems = [problem for problem in checked.diagnostics if not broken.cause(problem)]
    if has_errors([*syntax, *problems]):  # an error may be the reason for an unused name
        problems = [d for d in problems if not isinstance(d, UnusedName)]
    problems = list_skipped_checks([*syntax, *map(suggest_rewrite, problems)], program, source)
    checked.diagnostics = _unique(problems)
    return checked


def _unused_definitions(
    program: spec.Program, problems: Iterable[Diagnostic]
) -> Iterator[Diagnostic]:
    """Yield E0203 for unknown words of unused groups and metrics, which nothing else checks."""
    observes = any(
        rule.verb == "observe" for experiment in program.experiments for rule in experiment.rules
    )
    defined = {*program.groups, *program.circuits, *program.metrics, *program.parameters}
    for unused in (each for each in problems if isinstance(each, UnusedName)):
        if unused.kind == "group" and unused.name in program.groups:
            for word in (site.bare for site in program.groups[unused.name].sites):
                if word is not None and word.id not in (*SITES, *defined):
                    yield unknown_component(word.id, word.span, (*program.groups, *SHORT_WORDS))
        elif unused.kind == "metric" and unused.name in program.metrics and not observes:
            for word in metric_operands(program.metrics[unused.name]):
                if word.id not in (*METRICS, *defined):
                    hint = unknown_metric_hint(word.id)
                    yield UnknownWord(span=word.span, kind="metric", word=word.id, hint=hint)


def _corruption_problems(program: spec.Program) -> Iterator[Diagnostic]:
    """Yield the errors in corruptions that are found without rows."""
    for prompts in program.prompts.values():
        for corruption in prompts.corruptions:
            yield from change_problems(corruption.changes, program.parameters)


def _resolve_edits(checked: CheckedFile, contexts: FileContexts) -> None:
    """Resolve the edits of models, and report their errors."""
    for name, edit in checked.program.edits.items():
        if name not in checked.program.models or name in contexts.models.given:
            continue
        rejected = reject_masks(edit, checked.program, f"the edits of `{name}`")
        checked.diagnostics.extend(rejected)
        if rejected:
            continue
        known = _outline_apart(edit, checked, contexts)
        if known.resolved is None:
            continue
        problems = check_edits(known.resolved)
        checked.diagnostics.extend(problems)
        if not problems:
            checked.edits[name] = known.resolved


def _outline_apart(
    experiment: spec.Experiment, checked: CheckedFile, contexts: FileContexts
) -> ExperimentOutline:
    """Return the outline of an internal experiment, such as the objective of a training.

    Unlike experiments of the file, it isn't listed if it can't be checked or run here.
    """
    unchecked, unrun = list(checked.unchecked), list(checked.unrun)
    known = _outline(experiment, checked, contexts, {})
    checked.unchecked[:], checked.unrun[:] = unchecked, unrun
    return known


def _resolve_objectives(
    experiments: Iterable[spec.Experiment], checked: CheckedFile, contexts: FileContexts
) -> None:
    """Resolve the objectives of the rotations, vectors and masks that experiments use, and report
    errors."""
    program = checked.program
    wanted = {
        (own.name, experiment.model): None
        for experiment in experiments
        for own in (
            *used_bases(experiment, program),
            *used_directions(experiment, program),
            *sorted(
                used_masks(experiment, program), key=lambda basis: name_nodes(basis) is not None
            ),
        )
    }
    for name, model in wanted:
        if name not in program.objectives:
            continue
        objective = program.objectives[name].model_copy(update={"model": model})
        nodes = find_trained_nodes(name, program)
        own = () if nodes is None else (nodes.name,)
        rejected = reject_masks(objective, program, "another training", own)
        rejected += [] if nodes is None else check_seeds_of_nodes(nodes, name, program)
        checked.diagnostics.extend(rejected)
        if rejected or (nodes is not None and (nodes.name, model) not in checked.objectives):
            continue
        before = len(checked.diagnostics)
        known = _outline_apart(objective, checked, contexts)
        default = objective.rules[0].at.span.source
        if default is not objective.span.source:  # positions that the file doesn't have
            checked.diagnostics[before:] = [
                problem
                if problem.span is None or problem.span.source is not default
                else _report_default_positions(problem, objective.rules[0].span)
                for problem in checked.diagnostics[before:]
            ]
        if known.resolved is None:
            continue
        problems = list(check_objective(known.resolved))
        if nodes is not None:
            of_nodes = checked.objectives[nodes.name, model]
            problems += check_nodes(program.masks[name], known.resolved, of_nodes, program)
        stands_in = known.model.stands_in or known.table.stands_in
        if name in program.masks and not problems and not stands_in:
            problems += check_held_out_images(program.masks[name], known.resolved, program)
        checked.diagnostics.extend(problems)
        if not problems and not stands_in:
            checked.objectives[name, model] = known.resolved


def _report_default_positions(problem: Diagnostic, span: Span) -> Diagnostic:
    """Return a problem with positions that the file doesn't have, at the line that has none."""
    if isinstance(problem, OutsidePrompt):
        hint = (
            f"without `at`, edges are changed at `{problem.position}`, and the vision encoder has "
        )
        hint += "vectors at tokens of images: add `at photo tokens` for an image `photo`"
        return replace(problem, span=span, hint=hint)
    return replace(problem, span=span)


def _without_contradiction(settings: CheckSettings) -> tuple[CheckSettings, list[Diagnostic]]:
    """Reject permissions for an untrusted file with E0208, and remove them."""
    if not settings.untrusted:
        return settings, []
    allowed = {
        "--allow-python": settings.python == "run",
        "--allow-outside": settings.allow_outside,
    }
    problems: list[Diagnostic] = [
        BadCommandLine(
            reason=f"`--untrusted` and `{option}` contradict each other",
            hint=f"remove `{option}`; or review the file and remove `--untrusted`",
        )
        for option, given in allowed.items()
        if given
    ]
    return replace(settings, python="refuse", allow_outside=False), problems


def group_variants(experiments: Iterable[ExperimentT]) -> list[list[ExperimentT]]:
    """Group the experiments of the file, each with all its variants."""
    variants: dict[str, list[ExperimentT]] = {}
    for experiment in experiments:
        variants.setdefault(experiment.name, []).append(experiment)
    return list(variants.values())


def needed_models(checked: CheckedFile) -> list[str]:
    """Return the names of the models that experiments run on; with `--only` there may be others."""
    running = (*checked.experiments, *checked.saving)
    wanted = {*(e.name for e in running), *checked.unchecked}
    models = [
        name
        for e in checked.program.experiments
        if e.name in wanted
        for name in (
            e.model,
            *(run.model for run in e.elsewhere),
            *(name for rows in fit_rows_of_experiment(e, checked.program) for name in rows.models),
        )
        if name is not None
    ]
    return list(dict.fromkeys(models))


def _unique(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Remove duplicates; experiments on the same prompts share errors, but not their counts."""
    return list({(d.code, d.span, d.message): d for d in reversed(diagnostics)}.values())[::-1]


def _only(asked: Sequence[str], checked: CheckedFile) -> list[spec.Experiment]:
    every = checked.program.experiments
    found: set[str] = set()
    for name in asked:
        own = {e.name for e in every if name in (e.name, e.within)}
        if not own:
            names = list(dict.fromkeys(e.name for e in every))
            known = name_list(names)
            checked.diagnostics.append(
                BadCommandLine(
                    reason=f"`--only {name}`: the file has no experiment of that name",
                    hint=did_you_mean(name, names, f"it has {known or 'none'}"),
                )
            )
            return []
        found |= own
    needed = add_dependencies(found, every)
    checked.unreported.update(e.name for e in needed if e.name not in found)
    return needed


def _outline(
    experiment: spec.Experiment,
    checked: CheckedFile,
    contexts: FileContexts,
    outlines: Mapping[str, ExperimentOutline],
) -> ExperimentOutline:
    """Return the outline of an experiment, and report its errors."""
    program = select_seed(checked.program, experiment)
    filled = fill_groups(with_everything(experiment, program), program, checked.objectives)
    experiment = filled.experiment
    fitted = fit_rows_of_experiment(experiment, checked.program)
    others = [run.model for run in experiment.elsewhere if run.model is not None]
    others += [name for rows in fitted for name in rows.models]
    model, *read = (contexts.models.context(name) for name in (experiment.model, *others))
    model = contexts.towers.reading(experiment.prompts, model)
    if read and any(context.shape.side for context in (model, *read)):
        what = "another model together with one with two towers"
        checked.diagnostics.append(NotSupported(span=experiment.span, what=what))
    _check_fit_models(experiment, checked, contexts, model)
    if any(context.stands_in for context in (model, *read)):
        _skip(checked.unchecked, experiment)
    blocks = [experiment.prompts, *(run.prompts for run in experiment.elsewhere)]
    blocks += [name for rows in fitted for name in rows.blocks]
    if any(name is not None and contexts.needs_python(name) for name in blocks):
        _skip(checked.unrun, experiment)
    table = contexts.of_experiment(experiment, model)
    table = contexts.with_elsewhere(experiment, model, table)
    table = _with_means(experiment, checked, contexts, model, table)
    missing = _unknown_runs(checked.diagnostics) if experiment.broken else set[str]()
    if missing.difference(table.runs):
        table = add_stand_in_runs(table, missing)
    findings = _stand_ins(experiment, checked, outlines)
    if experiment.replies is not None:
        finding = findings.get(experiment.replies.of)
        table = contexts.with_replies(experiment, model, table, finding)
    model = contexts.models.fitting(model, table)
    model, table = contexts.towers.facing_images(experiment, model, table)
    model, problems = attach_texts(model, table, experiment)
    checked.diagnostics.extend(problems)
    draws = None if contexts.prompts_enough is None else limits.CHECKED_DRAWS
    known, diagnostics = outline_experiment(
        experiment, filled.program, model, table, RULES, findings, draws
    )
    masks, problems = check_masks(filled, table)
    diagnostics = [*_drop_missing_control(diagnostics, experiment, checked.diagnostics), *problems]
    if experiment.broken or findings.keys() != set(experiment.after):
        known = replace(known, resolved=None)
    if filled.waits:
        _skip(checked.unchecked if model.stands_in else checked.unrun, experiment)
    if known.resolved is not None:
        resolved = replace(known.resolved, masks=masks)
        known = replace(known, resolved=resolved)
        diagnostics += check_measure_tokens(resolved)
        diagnostics += check_image_support(resolved)
        for each in (*resolved.derived.values(), resolved):
            if experiment.prompts != spec.NO_PROMPTS:
                diagnostics += [*_first_tokens(each), *_single_rows(each)]
        diagnostics += [*_answers(resolved), *_unread_blocks(resolved)]
        diagnostics += _tested_where_picked(resolved, filled.program)
    checked.diagnostics.extend(filter_certain(diagnostics, known.unknown))
    return known


def _drop_missing_control(
    problems: list[Diagnostic], experiment: spec.Experiment, earlier: Sequence[Diagnostic]
) -> list[Diagnostic]:
    """Drop E0207 for `against none` after an error, which may be the reason why the experiment uses
    nothing trained."""
    line = experiment.without_control
    if line is None or not has_errors(earlier):
        return problems
    return [problem for problem in problems if problem.span != line.span]


def _check_fit_models(
    experiment: spec.Experiment, checked: CheckedFile, contexts: FileContexts, model: ModelContext
) -> None:
    """Report E0415 for trainings on a model of another shape."""
    for basis in used_bases(experiment, checked.program):
        rows = fit_rows_of_basis(basis, checked.program)
        if rows is not None and rows.model is not None:
            other = contexts.models.context(rows.model)
            problem = check_fit_model(basis.method.span, other, model)
            checked.diagnostics += [] if problem is None else [problem]


def _unknown_runs(problems: Iterable[Diagnostic]) -> set[str]:
    """Return unknown runs of `from … into …` and `with`, which are already reported."""
    return {d.name for d in problems if isinstance(d, UnknownName) and d.kind == "run"}


def _skip(names: list[str], experiment: spec.Experiment) -> None:
    if experiment.name not in names:
        names.append(experiment.name)


def _with_means(
    experiment: spec.Experiment,
    checked: CheckedFile,
    contexts: FileContexts,
    model: ModelContext,
    table: PromptTable,
) -> PromptTable:
    """Add other blocks, and parts of blocks, that the experiment's fills and directions use."""
    others: dict[str, PromptTable] = {}
    for rule in experiment.every_rule:
        fill = rule.fill
        if not isinstance(fill, ast.QualifiedRef):
            continue
        name, part = fill.of.name, fill.of.part
        block = checked.program.prompts.get(name)
        if block is None or (part is None and name in table.runs):
            continue
        if not block.has_part(part):
            others[name] = contexts.table(name, model, None, None, used=frozenset())
        else:
            read = contexts.table(name, model, None, part, used=frozenset())
            others[fill.of.span.written] = read
    for rows in fit_rows_of_experiment(experiment, checked.program):
        others[rows.key] = contexts.read_by(rows, experiment, model)
    stands_in = any(prompt_table.stands_in for prompt_table in (table, *others.values()))
    return replace(table, other_tables=others, stands_in=stands_in) if others else table


def _stand_ins(
    experiment: spec.Experiment, checked: CheckedFile, outlines: Mapping[str, ExperimentOutline]
) -> dict[str, Finding]:
    """Return placeholders for the results that an experiment uses, except rejected experiments."""
    findings: dict[str, Finding] = {}
    for name in experiment.after:
        variants = [each for each in checked.program.experiments if each.name == name]
        known = [outlines[variant.key] for variant in variants if variant.key in outlines]
        parts = [
            VariantFinding(outline.resolved) for outline in known if outline.resolved is not None
        ]
        for skipped in (checked.unchecked, checked.unrun):
            if name in skipped:
                _skip(skipped, experiment)
        if parts and len(parts) == len(variants):
            findings[name] = Finding(tuple(parts))
    return findings


def _tested_where_picked(experiment: ResolvedExperiment, program: spec.Program) -> list[Diagnostic]:
    """Report W0721 for sites that are tested on the rows they were selected on."""
    if not experiment.measures:
        return []
    name, block = experiment.name, experiment.table.name
    prompts = program.prompts.get(block)
    parts = f"run `{{of}}` on `{block}.train` and `{name}` on `{block}.test`"
    hint = f"split the rows: add `split 50%` to `prompts {block}`, then {parts}"
    if prompts is not None and prompts.split is not None:
        hint = (
            f"{parts}; if a training reads `{block}.train`, run `{{of}}` on a copy of "
            f"`prompts {block}` with other rows (`where`)"
        )
    return [
        SelectionRowsReused(
            span=experiment.sites_of[selection.of].span,
            experiment=experiment.name,
            of=selection.of,
            shared=selection.shared,
            rows=selection.rows,
            hint=hint.format(of=selection.of),
        )
        for selection in find_selections([experiment])
    ]


def _statements(experiment: spec.Experiment, program: spec.Program) -> list[Diagnostic]:
    """Check the statements of an experiment against one another, independently of the model."""
    problems: list[Diagnostic] = []
    for run in (experiment, *experiment.derived):
        rules = [rule for rule in run.rules if rule.observed is None]
        if experiment.broken or not all(_patches_itself(rule, run) for rule in rules):
            continue  # the patch undoes another rule's write
        for rule in rules:
            does = f"this rule patches `{rule.source}` into itself"
            hint = "name two runs, as in `from clean into CORRUPTION`, unless this is a control"
            problems.append(SelfWrite(span=rule.span, does=does, hint=hint, by_text=True))
    for measure in experiment.measures:
        effect = EFFECTS.get(measure.effect)
        if effect is None:
            hint = did_you_mean(measure.effect, EFFECTS, f"effects are {', '.join(EFFECTS)}")
            hint = AREA_HINTS.get(measure.effect.lower(), hint)
            problems.append(
                UnknownWord(span=measure.effect_span, kind="effect", word=measure.effect, hint=hint)
            )
        elif measure.observed and effect.name not in ("raw", "delta"):
            reason = f"`{effect.name}` isn't available for observations"
            hint = "write `as raw`, or `as delta` for the change caused by the rules"
            text = measure.span.written
            problems.append(
                UnreadableMeasure(span=measure.span, text=text, reason=reason, hint=hint)
            )
        elif experiment.broken:
            continue  # the error may be why a source or rule is missing
        elif effect.name in NODE_FORMS and not names_circuit(experiment, program):
            problem = find_node_problem(experiment, effect.name, program)
            if problem is not None:
                reason, hint = problem
                hint = hint or _suggest_effect_rule(experiment, effect, program)
                text = measure.span.written
                problems.append(
                    UnreadableMeasure(span=measure.span, text=text, reason=reason, hint=hint)
                )
        elif effect.circuit is not None and not _has_circuit_rule(experiment, effect, program):
            reason = f"`{effect.name}` is defined for `{effect.circuit} …`"
            hint = _suggest_effect_rule(experiment, effect, program)
            text = measure.span.written
            problems.append(
                UnreadableMeasure(span=measure.span, text=text, reason=reason, hint=hint)
            )
        elif effect.needs_source and experiment.source is None:
            corruptions = program.prompts[experiment.prompts].corruptions
            base = corruptions[0].name if corruptions else "CORRUPTION"
            problems.append(EffectNeedsSource(span=measure.span, effect=effect.name, base=base))
        elif effect.zero is not None and effect.name != "total" and not _acts(experiment, measure):
            problems.append(
                EffectWithoutRule(
                    span=measure.span,
                    effect=effect.name,
                    instead="raw" if experiment.source is None else "total",
                )
            )
    return problems


def _suggest_effect_rule(
    experiment: spec.Experiment, effect: EffectKind, program: spec.Program
) -> str:
    """Return the fix with a rule that an effect is defined for, on a group if the file has no
    circuit."""
    if effect.name in NODE_FORMS and not program.circuits:
        return suggest_node_rule(experiment, effect.name, program)
    rule = _suggest_circuit_rule(experiment, effect.circuit or "", program)
    return f"write the rule `{rule}`, or measure `as delta`"


def _suggest_circuit_rule(experiment: spec.Experiment, form: str, program: spec.Program) -> str:
    """Return a rule on a circuit in a form such as `ablate all but CIRCUIT`.

    The circuit, the positions and the fill are those of the experiment's rule, if it has one.
    """
    for rule in experiment.rules:
        if rule.circuit_name in program.circuits and rule.site is not None:
            text = rule.span.source.text[rule.at.span.start : rule.span.end]
            return f"{form.replace('CIRCUIT', rule.site.span.written)} at {text}"
    named = form.replace("CIRCUIT", next(iter(program.circuits), "CIRCUIT"))
    return f"{named} at tokens * with {experiment.source or 'zero'}"


def _has_circuit_rule(
    experiment: spec.Experiment, effect: EffectKind, program: spec.Program
) -> bool:
    """Whether an experiment has the rule on a circuit that an effect is defined for."""
    circuits = [rule for rule in experiment.rules if rule.circuit_name in program.circuits]
    written = {
        f"ablate {'all but ' if rule.all_but else ''}CIRCUIT"
        f"{' without each edge' if rule.without_edge else ''}"
        for rule in circuits
    }
    if effect.name == FAITHFULNESS.name:
        written = {each.removesuffix(" without each edge") for each in written}
    return written == {effect.circuit}


def _acts(experiment: spec.Experiment, measure: spec.Measure) -> bool:
    """Whether any rule could change a measure."""
    looked = {rule.observed.word for rule in experiment.rules if rule.observed is not None}
    named = {node.id for node in walk(measure.metric) if isinstance(node, ast.Name)}
    if not measure.observed and looked.isdisjoint(named):
        return bool(experiment.rules)
    return any(rule.observed is None for rule in experiment.rules)


def _patches_itself(rule: spec.Rule, run: spec.Experiment | spec.DerivedRun) -> bool:
    itself = rule.source is not None and rule.source == run.base
    return itself and not rule.reading and not _elsewhere(rule)


def _elsewhere(rule: spec.Rule) -> bool:
    """Whether a patch writes at a different position than it reads."""
    moved = rule.onto is not None and rule.onto.span.written != rule.at.span.written
    return moved or rule.into_layer is not None


def _answers(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """Warn of a rule on the whole prompt if a measure reads tokens after it."""
    return [
        AnswerNotCovered(
            span=answer.at.span,
            measure=answer.measure,
            tokens=answer.tokens,
            instead=answer.instead,
        )
        for answer in find_omitted_answers(experiment)
    ]


def _unread_blocks(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """Warn of rules in a vision encoder after the last block that the language model reads.

    There is no warning if the experiment also reads activations of the encoder.
    """
    rules, shape = experiment.every_rule, experiment.model.shape
    reads = any(rule.in_vision and not rule.writes_vision for rule in rules)
    if reads or experiment.saves or experiment.spec.broken:
        return []
    problems: list[Diagnostic] = []
    for rule in rules:
        ends = rule.sites if rule.path is None else rule.path.receivers
        points = [] if ends is None else [p for here in ends.points.values() for p in here]
        if rule.writes_vision and points and all(is_unread(point, shape) for point in points):
            last, name = shape.others["vision"].read_layers - 1, experiment.model.name
            first, span = min(point.layer or 0 for point in points), rule.spec.span
            if last >= 0:
                problems.append(UnreadBlocks(span=span, model=name, last=last, first=first))
    return problems


def _first_tokens(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """Warn of a write at token 0, which may be the attention sink."""
    base = experiment.table.runs[experiment.spec.base]
    problems: list[Diagnostic] = []
    for rule in experiment.rules:
        # The tokens that another experiment selects are unknown before the run.
        ranked = any(isinstance(node, ast.RankedTokens) for node in walk(rule.spec.at))
        if rule.sites is None or ranked or rule.spec.verb == "observe" or rule.in_vision:
            continue
        if base.rows and base.rows[0].image is not None:
            continue  # the class token, which the classification head reads
        for cell in rule.positions.written.values():
            row = next((n for n, hit in enumerate(cell.hits) for run in hit if 0 in run), None)
            # A sweep over every token includes token 0 with a clear label.
            if row is not None and len(rule.positions.written) == 1 and len(cell.hits[row][0]) == 1:
                token = experiment.model.tokenizer.token_text(base.rows[row].ids[0])
                problems.append(FirstTokenWrite(span=rule.spec.at.span, token=token))
                break
    return problems


def _single_rows(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """Warn of ablations that average or exchange the vectors of one row.

    There is no warning if another rule changes the run, since the ablation then restores values.
    """
    table = experiment.table
    if table.stands_in or table.cut or experiment.spec.trains:
        return []
    rules = [rule for rule in experiment.rules if rule.spec.verb != "observe"]
    changing = [rule for rule in rules if not _keeps_rows(rule, experiment)]
    problems: dict[Span, Diagnostic] = {}
    for rule in rules:
        if any(_act_together(rule, each) for each in changing):
            continue  # also if the rule itself changes rows
        fill = "" if rule.spec.fill is None else rule.spec.fill.span.written
        within = f" by {rule.spec.by}" if rule.spec.by else ""
        does = f"`with {fill}{within}` has no second row, so each row keeps its values"
        hint = _suggest_rows(experiment)
        problems[rule.spec.span] = SelfWrite(span=rule.spec.span, does=does, hint=hint)
    return list(problems.values())


def _act_together(first: ResolvedRule, second: ResolvedRule) -> bool:
    """Whether some cell has both rules: they aren't alternatives, such as two fills."""
    one, other = first.only, second.only
    return one is None or other is None or one.axis != other.axis or one == other


def _keeps_rows(rule: ResolvedRule, experiment: ResolvedExperiment) -> bool:
    """Whether an ablation writes the vectors of a row into the same row, at all positions."""
    same_run = rule.external is None and rule.run == experiment.spec.base
    if rule.does.reads not in ("mean", "donor") or not same_run:
        return False
    groups = rule.groups or ("",) * len(experiment.table)
    cells = [cell for cell in rule.positions.written.values() if any(cell.hits)]
    sizes = (
        Counter(group for group, hits in zip(groups, cell.hits, strict=True) if hits)
        for cell in cells
    )
    return bool(cells) and all(max(counts.values()) == 1 for counts in sizes)


def _suggest_rows(experiment: ResolvedExperiment) -> str:
    """Return the hint for an experiment with too few rows for a mean."""
    definition, table = experiment.spec, experiment.table
    if definition.limit is not None and len(table) == definition.limit:
        return f"write a larger number than `limit {definition.limit}`"
    block = None if table.block_rows is None else table.block_rows.block
    if block is not None and block.draws:
        written = definition.part is not None and not block.spec.split_for
        name = f"{table.name}.{definition.part}" if written else table.name
        return f"write how many rows to sample: `prompts {name} limit 40`"
    if definition.part == "test":
        return f"write the mean of the training rows: `with mean of {table.name}.train`"
    return f"give `{table.name}` more rows"
