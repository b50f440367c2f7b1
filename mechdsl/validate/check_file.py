"""Everything that can be refused without running: from the text of a file to resolved experiments.

No torch up to here. A model that isn't on this machine is a warning; something stands in for it,
and what hangs on the model itself isn't said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mechdsl.base import limits
from mechdsl.base.names import name_list
from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic, certain, has_errors
from mechdsl.diagnostics.e01_syntax import NotSupported, TooLarge
from mechdsl.diagnostics.e02_names import BadCommandLine, UnknownName, UnknownWord, did_you_mean
from mechdsl.diagnostics.e05_answers import AnswerLeftOut
from mechdsl.diagnostics.e06_experiment import (
    EffectNeedsSource,
    EffectWithoutRule,
    UnreadableMeasure,
)
from mechdsl.diagnostics.e06_onward import TestedWherePicked
from mechdsl.diagnostics.w07_names import HidesMetric, PatchesItself, UnusedName, WritesFirstToken
from mechdsl.program import spec
from mechdsl.program.lower_directions import rows_read
from mechdsl.program.lower_file import lower_program
from mechdsl.program.named_paths import reach_of
from mechdsl.program.python_files import Mode, check_functions
from mechdsl.program.run_order import in_order, with_needed
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.stand_ins import with_stand_ins
from mechdsl.resolve.answers_behind import answers_left_out
from mechdsl.resolve.findings import Finding, VariantFinding
from mechdsl.resolve.measured_parts import in_parts
from mechdsl.resolve.opposite import with_opposite
from mechdsl.resolve.resolve_experiment import outline
from mechdsl.resolve.resolved import ModelContext, Outline, ResolvedExperiment
from mechdsl.resolve.selections import selections
from mechdsl.rules import RULES
from mechdsl.syntax import ast
from mechdsl.syntax.parse import parse
from mechdsl.syntax.walk import walk
from mechdsl.validate.about_results import about_results
from mechdsl.validate.contexts import Contexts
from mechdsl.validate.follow_ups import BrokenLines
from mechdsl.validate.images_read import not_of_images
from mechdsl.validate.model_contexts import Build, BuiltModel
from mechdsl.validate.vocabulary import measures_fit
from mechdsl.validate.waiting import with_waiting
from mechdsl.validate.written_files import check_written
from mechdsl.vocab.corruptions import problems
from mechdsl.vocab.effects import EFFECTS
from mechdsl.vocab.metrics import METRICS

Named = TypeVar("Named", ResolvedExperiment, Outline)


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
    require_models: bool = False
    """Whether a model that isn't on this machine is an error."""
    allow_outside: bool = False
    """Whether reports may go anywhere, and not only to the folder of the file or below."""
    untrusted: bool = False
    """Whether the file may read only there too, may run no Python, and its paths are listed."""
    prompts_enough: int | None = None
    """How many prompts of each table are looked at, for a check without a run."""
    build: Build | None = None
    """What makes models by functions of Python files, where those may run."""


@dataclass
class Checked:
    """What is known of a file before it runs."""

    source: Source
    program: spec.Program
    settings: Settings = field(default_factory=Settings)
    """How it was checked."""
    experiments: list[ResolvedExperiment] = field(default_factory=list[ResolvedExperiment])
    saving: list[ResolvedExperiment] = field(default_factory=list[ResolvedExperiment])
    """Those that write activations to files; some measure nothing beside."""
    unchecked: list[str] = field(default_factory=list[str])
    """Experiments whose model isn't on this machine."""
    unrun: list[str] = field(default_factory=list[str])
    """Experiments whose rows only Python can make, which wasn't run."""
    built: dict[str, BuiltModel] = field(default_factory=dict[str, BuiltModel])
    """Models that functions of Python files have made, by name."""
    unreported: set[str] = field(default_factory=set[str])
    """Experiments that run only because another one uses what they find."""
    reported: list[spec.Experiment] = field(default_factory=list[spec.Experiment])
    """The others, as far as they were asked for: theirs are the reports that are made."""
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])


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
        return Checked(source, program, settings or Settings(), diagnostics=[problem])


def _check_source(
    source: Source, settings: Settings, models: Mapping[str, ModelContext]
) -> Checked:
    settings, found = _without_contradiction(settings)
    source = replace(
        source,
        reach=reach_of(source, outside=settings.allow_outside, untrusted=settings.untrusted),
    )
    tree, syntax = parse(source)
    program, lowered = lower_program(tree, source, settings.parameters)
    broken = BrokenLines([*syntax, *lowered], tree, program.lost)
    checked = Checked(source, program, settings, diagnostics=[*found, *lowered])
    experiments = list(program.experiments)
    if settings.only is not None:
        experiments = _only(settings.only, checked)
    checked.diagnostics.extend(check_functions(program, settings.python, models))
    contexts = Contexts(
        program,
        checked.diagnostics,
        models,
        settings.limit,
        python=settings.python,
        build=None if syntax else settings.build,
        require=settings.require_models,
        prompts_enough=settings.prompts_enough,
    )
    for prompts in program.prompts.values():
        for corruption in prompts.corruptions:
            checked.diagnostics.extend(problems(corruption.changes, program.parameters))
    for experiment in experiments:
        checked.diagnostics.extend(_statements(experiment, program))
    ready = in_order(experiments)
    outlines: dict[str, Outline] = {}
    for experiment in (*ready, *(e for e in experiments if e not in ready)):
        known = _outline(experiment, checked, contexts, outlines)
        perhaps = known.perhaps | broken.axes(experiment.span)
        outlines[experiment.key] = replace(known, perhaps=perhaps)
    every = {v[0].name: v for v in by_name([outlines[e.key] for e in experiments])}
    for variants in every.values():
        checked.diagnostics.extend(about_results(variants, program, every))
    whole = [
        resolved
        for each in experiments
        if each.name not in (*checked.unchecked, *checked.unrun)
        and (resolved := outlines[each.key].resolved) is not None
    ]
    measured = (each for each in whole if each.measures)
    checked.experiments.extend(part for each in measured for part in in_parts(each))
    checked.saving.extend(each for each in whole if each.saves)
    for name, prompts in program.prompts.items():
        if prompts.span.source is source:
            contexts.table_alone(name)
    checked.built = contexts.models.built
    checked.reported = [e for e in experiments if e.name not in checked.unreported]
    checked.diagnostics.extend(check_written([(program, checked.reported)]))
    checked.diagnostics.extend(
        HidesMetric(span=value.span, name=name)
        for name, value in program.metrics.items()
        if name in METRICS
    )
    found = [each for each in checked.diagnostics if not broken.cause(each)]
    if has_errors([*syntax, *found]):  # an error may be why a name isn't used
        found = [d for d in found if not isinstance(d, UnusedName)]
    checked.diagnostics = _unique(with_waiting([*syntax, *found], program, source))
    return checked


def _without_contradiction(settings: Settings) -> tuple[Settings, list[Diagnostic]]:
    """E0208 for an untrusted file that is allowed what others aren't. It gets nothing of that."""
    if not settings.untrusted:
        return settings, []
    allowed = {
        "--allow-python": settings.python == "run",
        "--allow-outside": settings.allow_outside,
    }
    found: list[Diagnostic] = [
        BadCommandLine(
            reason=f"`--untrusted` and `{option}` contradict each other",
            hint=f"leave `{option}` out; or read the file, and leave `--untrusted` out",
        )
        for option, given in allowed.items()
        if given
    ]
    return replace(settings, python="refuse", allow_outside=False), found


def by_name(experiments: Iterable[Named]) -> list[list[Named]]:
    """The experiments of the file, each with all its variants."""
    found: dict[str, list[Named]] = {}
    for experiment in experiments:
        found.setdefault(experiment.name, []).append(experiment)
    return list(found.values())


def models_needed(checked: Checked) -> list[str]:
    """Names of the models that experiments run on; with `--only` there may be others."""
    running = (*checked.experiments, *checked.saving)
    wanted = {*(e.name for e in running), *checked.unchecked}
    found = [
        name
        for e in checked.program.experiments
        if e.name in wanted
        for name in (
            e.model,
            *(run.model for run in e.elsewhere),
            *(rows.model for rows in rows_read(e, checked.program)),
        )
        if name is not None
    ]
    return list(dict.fromkeys(found))


def _unique(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Each once: experiments that share prompts share their errors, if not their counts."""
    return list({(d.code, d.span, d.message): d for d in reversed(diagnostics)}.values())[::-1]


def _only(name: str, checked: Checked) -> list[spec.Experiment]:
    every = checked.program.experiments
    found = {e.name for e in every if name in (e.name, e.within)}
    if not found:
        names = list(dict.fromkeys(e.name for e in every))
        known = name_list(names)
        checked.diagnostics.append(
            BadCommandLine(
                reason=f"`--only {name}`: the file has no experiment of that name",
                hint=did_you_mean(name, names, f"it has {known or 'none'}"),
            )
        )
        return []
    needed = with_needed(found, every)
    checked.unreported.update(e.name for e in needed if e.name not in found)
    return needed


def _outline(
    experiment: spec.Experiment,
    checked: Checked,
    contexts: Contexts,
    outlines: Mapping[str, Outline],
) -> Outline:
    """What is known of an experiment; what is wrong with it is said."""
    fitted = rows_read(experiment, checked.program)
    others = [run.model for run in (*experiment.elsewhere, *fitted) if run.model is not None]
    model, *read = (contexts.models.context(name) for name in (experiment.model, *others))
    model = contexts.towers.reading(experiment.prompts, model)
    if read and any(each.shape.side for each in (model, *read)):
        what = "another model beside one with two towers"
        checked.diagnostics.append(NotSupported(span=experiment.span, what=what))
    if any(each.stands_in for each in (model, *read)):
        _skip(checked.unchecked, experiment)
    blocks = [experiment.prompts, *(run.prompts for run in experiment.elsewhere)]
    blocks += [rows.block for rows in fitted]
    if any(name is not None and contexts.needs_python(name) for name in blocks):
        _skip(checked.unrun, experiment)
    table = contexts.of_experiment(experiment, model)
    table = contexts.with_elsewhere(experiment, model, table)
    table = _with_means(experiment, checked, contexts, model, table)
    missing = _unknown_runs(checked.diagnostics) if experiment.broken else set[str]()
    if missing.difference(table.runs):
        table = with_stand_ins(table, missing)
    findings = _stand_ins(experiment, checked, outlines)
    if experiment.replies is not None:
        finding = findings.get(experiment.replies.of)
        table = contexts.with_replies(experiment, model, table, finding)
    model = contexts.models.fitting(model, table)
    model, table = contexts.towers.facing_images(experiment, model, table)
    model, problems = with_opposite(model, table, experiment)
    checked.diagnostics.extend(problems)
    draws = None if contexts.prompts_enough is None else limits.CHECKED_DRAWS
    known, found = outline(experiment, checked.program, model, table, RULES, findings, draws)
    if experiment.broken or findings.keys() != set(experiment.after):
        known = replace(known, resolved=None)
    if known.resolved is not None:
        found += measures_fit(known.resolved)
        found += not_of_images(known.resolved)
        for each in (*known.resolved.derived.values(), known.resolved):
            found += _first_tokens(each)
        found += _answers(known.resolved)
        found += _tested_where_picked(known.resolved)
    checked.diagnostics.extend(certain(found, known.unknown))
    return known


def _unknown_runs(found: Iterable[Diagnostic]) -> set[str]:
    """Runs that `from … into …` and `with` name and that there aren't, which is said already."""
    return {d.name for d in found if isinstance(d, UnknownName) and d.kind == "run"}


def _skip(names: list[str], experiment: spec.Experiment) -> None:
    if experiment.name not in names:
        names.append(experiment.name)


def _with_means(
    experiment: spec.Experiment,
    checked: Checked,
    contexts: Contexts,
    model: ModelContext,
    table: PromptTable,
) -> PromptTable:
    """The table with the other blocks, and parts of blocks, that fills are taken of and directions
    fitted on."""
    beside: dict[str, PromptTable] = {}
    for rule in experiment.every_rule:
        fill = rule.fill
        if not isinstance(fill, ast.OfRef):
            continue
        name, part = fill.of.name, fill.of.part
        block = checked.program.prompts.get(name)
        if block is None or (part is None and name in table.runs):
            continue
        if not block.has_part(part):
            beside[name] = contexts.table(name, model, None, None, used=frozenset())
        else:
            read = contexts.table(name, model, None, part, used=frozenset())
            beside[fill.of.span.written] = read
    for rows in rows_read(experiment, checked.program):
        beside[rows.key] = contexts.read_by(rows, experiment, model)
    stands_in = any(each.stands_in for each in (table, *beside.values()))
    return replace(table, beside=beside, stands_in=stands_in) if beside else table


def _stand_ins(
    experiment: spec.Experiment, checked: Checked, outlines: Mapping[str, Outline]
) -> dict[str, Finding]:
    """What stands in for the results that an experiment uses, of those that weren't refused."""
    found: dict[str, Finding] = {}
    for name in experiment.after:
        variants = [each for each in checked.program.experiments if each.name == name]
        known = [outlines[each.key] for each in variants if each.key in outlines]
        parts = [VariantFinding(each.resolved) for each in known if each.resolved is not None]
        for skipped in (checked.unchecked, checked.unrun):
            if name in skipped:
                _skip(skipped, experiment)
        if parts and len(parts) == len(variants):
            found[name] = Finding(tuple(parts))
    return found


def _tested_where_picked(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """W0721 for sites that are tested on the rows that they were picked on."""
    return [
        TestedWherePicked(
            span=experiment.sites_of[each.of].span,
            experiment=experiment.name,
            of=each.of,
            block=experiment.table.name,
            shared=each.shared,
            rows=each.rows,
        )
        for each in selections([experiment])
    ]


def _statements(experiment: spec.Experiment, program: spec.Program) -> list[Diagnostic]:
    """What the statements of an experiment must agree on, whatever the model."""
    found: list[Diagnostic] = []
    for run in (experiment, *experiment.derived):
        rules = [rule for rule in run.rules if rule.observed is None]
        if experiment.broken or not all(_patches_itself(rule, run) for rule in rules):
            continue  # what another rule writes, such a patch undoes
        for rule in rules:
            found.append(PatchesItself(span=rule.span, run=rule.source or ""))
    for measure in experiment.measures:
        effect = EFFECTS.get(measure.effect)
        if effect is None:
            hint = did_you_mean(measure.effect, EFFECTS, f"effects are {', '.join(EFFECTS)}")
            found.append(
                UnknownWord(span=measure.effect_span, kind="effect", word=measure.effect, hint=hint)
            )
        elif measure.observed and effect.name not in ("raw", "delta"):
            reason = f"`{effect.name}` isn't known of what is observed"
            hint = "write `as raw`, or `as delta` for what the rules change of it"
            text = measure.span.written
            found.append(UnreadableMeasure(span=measure.span, text=text, reason=reason, hint=hint))
        elif experiment.broken:
            continue  # which may be why there is no source, or no rule
        elif effect.needs_source and experiment.source is None:
            corruptions = program.prompts[experiment.prompts].corruptions
            base = corruptions[0].name if corruptions else "CORRUPTION"
            found.append(EffectNeedsSource(span=measure.span, effect=effect.name, base=base))
        elif effect.zero is not None and effect.name != "total" and not _acts(experiment, measure):
            found.append(
                EffectWithoutRule(
                    span=measure.span,
                    effect=effect.name,
                    instead="raw" if experiment.source is None else "total",
                )
            )
    return found


def _acts(experiment: spec.Experiment, measure: spec.Measure) -> bool:
    """Whether there is a rule that could change a measure."""
    looked = {rule.observed.word for rule in experiment.rules if rule.observed is not None}
    named = {node.id for node in walk(measure.metric) if isinstance(node, ast.Name)}
    if not measure.observed and looked.isdisjoint(named):
        return bool(experiment.rules)
    return any(rule.observed is None for rule in experiment.rules)


def _patches_itself(rule: spec.Rule, run: spec.Experiment | spec.DerivedRun) -> bool:
    itself = rule.source is not None and rule.source == run.base
    return itself and not rule.reading and not _elsewhere(rule)


def _elsewhere(rule: spec.Rule) -> bool:
    """Whether a patch writes at another place than it reads."""
    moved = rule.onto is not None and rule.onto.span.written != rule.at.span.written
    return moved or rule.into_layer is not None


def _answers(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """A rule on the whole prompt is warned of where a measure reads tokens behind it."""
    return [
        AnswerLeftOut(
            span=each.at.span,
            measure=each.measure,
            tokens=each.tokens,
            instead=each.instead,
        )
        for each in answers_left_out(experiment)
    ]


def _first_tokens(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """A write at token 0 is warned of: it may be the attention sink."""
    base = experiment.table.runs[experiment.spec.base]
    found: list[Diagnostic] = []
    for rule in experiment.rules:
        # Which tokens another experiment ranks is not known yet.
        ranked = any(isinstance(node, ast.RankedTokens) for node in walk(rule.spec.at))
        if rule.sites is None or ranked or rule.spec.verb == "observe":
            continue
        if base.rows and base.rows[0].image is not None:
            continue  # the class token, which is what heads read
        for cell in rule.positions.written.values():
            row = next((n for n, hit in enumerate(cell.hits) for run in hit if 0 in run), None)
            # A sweep over every token has it among others, where it is plainly labelled.
            if row is not None and len(rule.positions.written) == 1 and len(cell.hits[row][0]) == 1:
                token = experiment.model.tokenizer.token_text(base.rows[row].ids[0])
                found.append(WritesFirstToken(span=rule.spec.at.span, token=token))
                break
    return found
