"""One experiment made concrete: prompts, axes, rules, measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mechdsl.base import limits
from mechdsl.base.registry import Registry
from mechdsl.diagnostics.core import Diagnostic, Unknown, has_errors
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.diagnostics.e03_coordinates import UNUSED_LOOP, BadLoopValue, TooManyCells
from mechdsl.program import spec
from mechdsl.program.lower_other_runs import BLOCKS
from mechdsl.program.possible_axes import position_axes, possible_axes
from mechdsl.prompts.answer_tokens import AnswerTokens
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.resolve.answers_behind import measured_answers
from mechdsl.resolve.apart_from import LeftOut, left_out
from mechdsl.resolve.coordinates import SiteContext
from mechdsl.resolve.derived_runs import accuracies_known, define_runs, on_derived
from mechdsl.resolve.estimators import not_estimated
from mechdsl.resolve.findings import Finding
from mechdsl.resolve.generation import in_steps, of_generation
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.kinds import RuleKind
from mechdsl.resolve.loops import loop_axes
from mechdsl.resolve.measure_context import MeasureContext
from mechdsl.resolve.measured_parts import axes_of, loops_measured, measured_parts, perhaps_measured
from mechdsl.resolve.measures import resolve_measure
from mechdsl.resolve.metric_atoms import known_run
from mechdsl.resolve.observation import Observation
from mechdsl.resolve.open_axes import open_axes, open_positions
from mechdsl.resolve.picks import Onward
from mechdsl.resolve.relative_depth import relative
from mechdsl.resolve.removed_blocks import inside_removed, of_runs_without_blocks
from mechdsl.resolve.replies import FOR_RULES, replies_of
from mechdsl.resolve.replies import refused as in_replies
from mechdsl.resolve.resolved import (
    Axis,
    ModelContext,
    Outline,
    ResolvedControl,
    ResolvedExperiment,
    ResolvedMeasure,
)
from mechdsl.resolve.resolved_rule import ResolvedRule
from mechdsl.resolve.saves import resolve_saves
from mechdsl.resolve.without_rules import without_rules
from mechdsl.syntax import ast
from mechdsl.syntax.walk import numbers_named, walk


def resolve_experiment(
    experiment: spec.Experiment,
    program: spec.Program,
    model: ModelContext,
    table: PromptTable,
    kinds: Registry[RuleKind],
    found: Mapping[str, Finding] | None = None,
) -> tuple[ResolvedExperiment | None, list[Diagnostic]]:
    """The experiment with concrete axes, rules and measures; None after an error. As `outline`."""
    known, diagnostics = outline(experiment, program, model, table, kinds, found)
    return known.resolved, diagnostics


def outline(
    experiment: spec.Experiment,
    program: spec.Program,
    model: ModelContext,
    table: PromptTable,
    kinds: Registry[RuleKind],
    found: Mapping[str, Finding] | None = None,
    draws_enough: int | None = None,
) -> tuple[Outline, list[Diagnostic]]:
    """What can be known of an experiment, and all that is wrong with it.

    kinds: of rules, by their verbs. found: what the experiments found whose results it uses, of
    each of `experiment.after`; what needs one that is missing is refused without a
    word. draws_enough: how many random draws are made at most.
    Codes: E0301 to E0323, E0402, E0413, E0507, E0612 and those of positions and texts.
    """
    diagnostics: list[Diagnostic] = []
    onward = Onward(
        {name: each.on(model.name, table.name) for name, each in (found or {}).items()},
        experiment.called,
        program.groups,
    )
    work = _work(experiment, program, model, table, onward, diagnostics)
    derived = define_runs(work, kinds)
    table = work.table
    rules = _rules(work, kinds)
    _loops_used(work)
    _beside_others(work, kinds)
    diagnostics.extend(on_derived(rules, work))
    work.draws_agree()
    axes = tuple(work.axes.values())
    if any(axis == "model" for axis, _ in experiment.variant):
        written = tuple(rule.site for rule in experiment.rules)
        axes = tuple(relative(axis, written, model.shape.n_layers) for axis in axes)
    apart = left_out(experiment.against, work.sites)
    looking = (
        kinds[rule.verb].observes(rule) if found is None else _observation(found)
        for rule, found in zip(experiment.rules, rules, strict=True)
    )
    observed = next((each for each in looking if each is not None), None)
    context = _measure_context(work, axes, observed)
    measures, places = measured_parts(work, context)
    keep, accuracies = _other_measures(work, context)
    saves = resolve_saves(work)
    diagnostics.extend(accuracies_known(accuracies, derived, experiment))
    known = Outline(
        spec=experiment,
        model=model,
        table=table,
        axes=(*axes, *axes_of(places, experiment, axes)),
        perhaps=_perhaps(work, rules) | perhaps_measured(work, measures),
        measures=measures,
        resolved=None,
    )
    diagnostics.extend(
        inside_removed([r for r in rules if r], [m for m in measures if m], model.name)
    )
    diagnostics.extend(of_generation(rules, measures, keep, work))
    whole = all(len(run.rules) == len(run.spec.rules) for run in derived.values())
    if has_errors(diagnostics) or not whole or None in (*rules, *measures, *keep):
        return known, diagnostics
    resolved = ResolvedExperiment(
        spec=experiment,
        model=model,
        table=table,
        axes=axes,
        rules=tuple(rule for rule in rules if rule is not None),
        measures=tuple(measure for measure in measures if measure is not None),
        keep=tuple(measure for measure in keep if measure is not None),
        accuracies=accuracies,
        seed=program.seed,
        nested=work.sites.nested,
        picks=onward.picks,
        stand_ins=onward.stand_ins,
        sites_of=onward.sites_of,
        saves=saves,
        derived=derived,
        places=places,
    )
    problem = _too_many(resolved, program) or _too_many_listed(resolved)
    refused = [*of_runs_without_blocks(resolved), *([] if problem is None else [problem])]
    refused += [*in_replies(resolved), *not_estimated(resolved)]
    if refused:
        return known, [*diagnostics, *refused]
    control, problems = _control(resolved, apart, draws_enough)
    diagnostics.extend(problems)
    if problems:
        return known, diagnostics
    bare = without_rules(resolved)
    return replace(known, resolved=replace(resolved, control=control, bare=bare)), diagnostics


def _control(
    resolved: ResolvedExperiment, apart: Sequence[LeftOut], draws_enough: int | None
) -> tuple[ResolvedControl | None, list[Diagnostic]]:
    """What it is set against."""
    if resolved.spec.against is None:
        return None, []
    from mechdsl.resolve.random_targets import resolve_control

    return resolve_control(resolved, apart, limits.CELLS, draws_enough)


def _rules(work: Work, kinds: Registry[RuleKind]) -> list[ResolvedRule | None]:
    """Each of its rules; None for those that were refused."""
    behind, replies = measured_answers(work), replies_of(work.experiment)
    rules: list[ResolvedRule | None] = []
    for rule in work.experiment.rules:
        kind = kinds[rule.verb]
        work.replies = replies if kind.reads_replies else FOR_RULES
        work.answers = behind if not kind.within_prompt else AnswerTokens(reason=kind.within_prompt)
        found = kind.resolve(rule, work)
        rules.append(None if found is None else in_steps(found, work))
    return rules


def _observation(rule: ResolvedRule) -> Observation | None:
    """What a rule looks at; None where it acts."""
    return rule.does if isinstance(rule.does, Observation) else None


def _work(
    experiment: spec.Experiment,
    program: spec.Program,
    model: ModelContext,
    table: PromptTable,
    onward: Onward,
    diagnostics: list[Diagnostic],
) -> Work:
    """What rules are resolved with: the loops' axes, and sites of this model."""
    found = loop_axes(experiment.loops, program.parameters, diagnostics)
    loops = found.labels
    sites = SiteContext(
        model.name,
        model.shape,
        program.groups,
        program.parameters,
        loops,
        found.nested,
        diagnostics,
        onward,
        words={
            (loop.name, node.id): node.span
            for loop in experiment.loops
            for node in walk(loop.domain)
            if isinstance(node, ast.Name)
        },
    )
    work = Work(experiment, program, model, table, sites)
    centres = _centres(experiment)
    for loop in experiment.loops:
        work.axes[loop.name] = Axis(
            loop.name, loops[loop.name], loop.span, of_windows=loop.name in centres
        )
    return work


def _too_many(resolved: ResolvedExperiment, program: spec.Program) -> Diagnostic | None:
    """E0323 where it has more cells than can be run."""
    cells = resolved.n_there
    if cells <= limits.CELLS:
        return None
    left_out = resolved.n_cells - cells
    undecided = open_axes(resolved.spec, program.groups, ("shape", "tokens"))
    axes = resolved.axes
    return TooManyCells(
        span=resolved.spec.span,
        of=f"experiment `{resolved.name}`",
        cells=cells,
        most=limits.CELLS,
        axes=" × ".join(f"{axis.name} ({len(axis)})" for axis in axes)
        + (f", without {left_out:,} that loops leave out" if left_out else ""),
        by_text=not resolved.table.stands_in and undecided.isdisjoint(axis.name for axis in axes),
    )


def _too_many_listed(resolved: ResolvedExperiment) -> Diagnostic | None:
    """E0207 where tokens are listed of more cells than there is room for."""
    numbers = resolved.n_cells * resolved.model.shape.vocab_size
    for rule in resolved.rules:
        does = _observation(rule)
        if does is not None and does.lists(rule) and numbers > limits.LISTED:
            assert rule.spec.observed is not None
            return BadArgument(
                span=rule.spec.observed.span,
                name="top",
                reason=f"would hold {numbers:,} numbers, more than {limits.LISTED:,}: one for each "
                "cell and token of the vocabulary",
                hint="sweep fewer layers or positions, or leave `top` out",
            )
    return None


def _centres(experiment: spec.Experiment) -> set[str]:
    """The loop variables that are the centre of a window somewhere."""
    parts = (part for rule in experiment.rules for part in walk(_nodes(rule)))
    windows = (part for part in parts if isinstance(part, ast.Axis) and part.window is not None)
    bounds = (part for axis in windows for part in walk(axis.values))
    return {
        bound.name
        for bound in bounds
        if isinstance(bound, ast.Bound) and bound.name and not bound.offset
    }


def _perhaps(work: Work, rules: Sequence[ResolvedRule | None]) -> frozenset[str]:
    """Names of axes that the experiment may have, beside those that were found."""
    found: set[str] = set()
    for rule, resolved in zip(work.experiment.rules, rules, strict=True):
        if resolved is None:
            found.update(possible_axes(rule))
        elif _sweep_unknown(rule, work):
            found.update(position_axes(rule))
    return frozenset(found)


def _sweep_unknown(rule: spec.Rule, work: Work) -> bool:
    """Whether how many positions there are hangs on what isn't at hand."""
    missing: dict[Unknown, bool] = {
        "tokens": work.model.tokenizer.stands_in,
        "rows": work.table.stands_in,
    }
    unknown: list[Unknown] = [what for what, stands_in in missing.items() if stands_in]
    named = (each for each in (rule.at, rule.onto) if each is not None)
    return bool(unknown) and any(open_positions(each, unknown) for each in named)


def _loops_used(work: Work) -> None:
    """A `for` whose variable nothing uses would run the same cell again and again."""
    used = {
        part.id
        for rule in work.experiment.rules
        for part in walk(_nodes(rule))
        if isinstance(part, ast.Name)
    }
    for rule in work.experiment.rules:
        used.update(numbers_named(_nodes(rule)))
    used.update(loops_measured(work))
    if has_errors(work.diagnostics):
        return  # which may be why
    for loop in work.experiment.loops:
        if loop.name not in used:
            work.diagnostics.append(
                BadLoopValue(
                    span=loop.span,
                    name=loop.name,
                    reason=UNUSED_LOOP,
                    hint=f"write it where it should stand, for example `layer {loop.name}`",
                )
            )


def _beside_others(work: Work, kinds: Registry[RuleKind]) -> None:
    """E0108 for rules that don't go with others of their kind."""
    rules = work.experiment.rules
    for verb, kind in kinds.items():
        own = [rule for rule in rules if rule.verb == verb]
        if kind.once:
            what = f"a second `{verb}` in one experiment"
            later = kind.once_because or NotSupported.later
            work.diagnostics.extend(
                NotSupported(span=rule.span, what=what, later=later) for rule in own[1:]
            )


def _nodes(rule: spec.Rule) -> Any:
    parts = (
        *(rule.site, rule.reading, rule.at, rule.fill, rule.onto, rule.into_layer),
        *(rule.source_block, rule.edge, rule.receiver, rule.direction),
        *(() if rule.during is None else (rule.during.first, rule.during.last)),
        *(() if rule.observed is None else (each.weight for each in rule.observed.maps)),
    )
    return tuple(part for part in parts if part is not None)


def _measure_context(
    work: Work, axes: tuple[Axis, ...], observed: Observation | None
) -> MeasureContext:
    """What measures are resolved against."""
    items = sorted({i for axis in axes for i in axis.items if i is not None})
    if has_errors(work.diagnostics) or work.model.tokenizer.stands_in:
        items = items or [1]  # there may be a sweep over occurrences
    return MeasureContext(
        work.table,
        work.model.tokenizer,
        work.sites,
        tuple(items),
        work.diagnostics,
        observed=observed,
        names=tuple(
            rule.observed.name or rule.observed.word
            for rule in work.experiment.rules
            if rule.observed is not None
        ),
        metrics=work.program.metrics,
        replies=replies_of(work.experiment),
        reply=work.reply,
    )


def _other_measures(
    work: Work, context: MeasureContext
) -> tuple[tuple[ResolvedMeasure | None, ...], dict[str, ResolvedMeasure]]:
    """What rows are kept by, and `correct` on runs whose accuracy is asked for."""
    experiment = work.experiment
    keep = [resolve_measure(k, context, label="keep", runs=("clean",)) for k in experiment.keep]
    accuracies: dict[str, ResolvedMeasure] = {}
    for call in _accuracy_calls(experiment):
        run = known_run(call.arguments[0].value, context)
        if run is None:
            continue
        correct = ast.Name("correct", span=call.span)
        found = resolve_measure(correct, context, label="accuracy")
        if found is not None:
            accuracies[run] = found
    return tuple(keep), accuracies


def _accuracy_calls(experiment: spec.Experiment) -> list[ast.Call]:
    """Those of one run; what else is asked, the expectation refuses."""
    return [
        node
        for expect in experiment.expects
        if expect.condition is not None
        for node in walk(expect.condition)
        if isinstance(node, ast.Call)
        and node.name == "accuracy"
        and [each.name for each in node.arguments[:1]] == [None]
        and {each.name for each in node.arguments[1:]} <= {BLOCKS, "model"}
    ]
