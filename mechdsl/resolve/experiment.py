"""Resolve one experiment: prompts, axes, rules, measures and its control."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mechdsl.base import limits
from mechdsl.base.records import Record, Registry
from mechdsl.diagnostics.core import Diagnostic, UnknownFact, has_errors
from mechdsl.diagnostics.rules import UNUSED_LOOP, AxesCollide, BadLoopValue, TooManyCells
from mechdsl.diagnostics.syntax import BadArgument, NotSupported
from mechdsl.program import spec
from mechdsl.program.references import may_sweep, measure_number_names, position_axes, possible_axes
from mechdsl.program.spec import PROMPTS_AXIS, SEED_AXIS
from mechdsl.prompts.positions.spans import NO_ANSWERS, AnswerTokens, refers_to_answer
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import ANSWER_SPAN, PositionCell, RunRow
from mechdsl.resolve.bases import resolve_rule
from mechdsl.resolve.cells import find_open_axes, has_open_positions
from mechdsl.resolve.conflicts import (
    check_circuits,
    check_cross_layer_rules,
    check_estimator,
    check_other_stacks,
    check_read_features,
    check_removed_blocks,
    check_runs_without_blocks,
    check_saved_gradients,
    check_weight_rules,
)
from mechdsl.resolve.controls import (
    ExcludedSite,
    resolve_control,
    resolve_exclusions,
    resolve_training_control,
)
from mechdsl.resolve.directions import expand_own_layers
from mechdsl.resolve.findings import Finding, FindingPicker
from mechdsl.resolve.loops import LoopLabels, label_by_depth, resolve_loops
from mechdsl.resolve.measures import (
    MEASURED_AXIS,
    resolve_measure,
    resolve_measure_positions,
    resolve_run,
)
from mechdsl.resolve.node_circuits import resolve_everything
from mechdsl.resolve.observations import Observation
from mechdsl.resolve.probes import resolve_direction_probes
from mechdsl.resolve.runs import (
    RULE_REPLIES,
    RuleKind,
    build_baseline,
    build_circuit_baselines,
    check_accuracies,
    check_derived_base,
    check_generation,
    check_reply_readers,
    define_runs,
    get_reply_tokens,
    resolve_direction_files,
    resolve_saves,
    resolve_steps,
)
from mechdsl.resolve.sites import ExperimentContext, MeasureContext, SiteContext, report_unreadable
from mechdsl.resolve.trainings import describe_saved_groups
from mechdsl.resolve.types import (
    Axis,
    AxisLabels,
    ExperimentOutline,
    MeasureGroup,
    MetricTerm,
    ModelContext,
    ResolvedDirectionFile,
    ResolvedExperiment,
    ResolvedMeasure,
    ResolvedRule,
    ResolvedSave,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import number_names, walk
from mechdsl.vocab.sites import SITES


def resolve_measure_groups(
    work: ExperimentContext, context: MeasureContext
) -> tuple[tuple[ResolvedMeasure | None, ...], tuple[MeasureGroup, ...]]:
    """Resolve the measures at each position and loop value at which they are read.

    Returns:
        The measures of the first group, and all groups; no groups if there is only one. Measures
        with errors, which are in the diagnostics, are None.
    """
    experiment = work.experiment
    runs = tuple(dict.fromkeys(r for r in (experiment.base, experiment.source, "clean") if r))
    loops = [name for name in work.loops if name in find_measured_loops(work)]
    first: tuple[ResolvedMeasure | None, ...] | None = None
    parts: list[MeasureGroup] = []
    there = None if work.sites.nested is None else work.sites.nested.along(loops)
    for key, values in work.sites.combinations(loops):
        fixed = dict(zip(loops, key, strict=True))
        if there is not None and not there.has(fixed):
            continue
        measure_context = _with_loop_values(context, values)
        groups = [
            resolve_measure_positions(
                m.metric, measure_context, label=m.label, at=m.at, runs=runs, observed=m.observed
            )
            for m in experiment.measures
        ]
        here = tuple(None if group is None else group[0][1] for group in groups)
        first = first or here
        whole = [group for group in groups if group is not None]
        if len(whole) < len(groups) or not _have_same_positions(whole, experiment, context):
            return tuple(None for _ in here) if len(whole) == len(groups) else here, ()
        _check_axes(whole, work)
        for place in zip(*whole, strict=True):
            labels = (*values.items(), *place[0][0])
            parts.append(MeasureGroup(labels, tuple(measure for _, measure in place), fixed))
    several = len(parts) > 1 or bool(loops)
    return first or (), tuple(parts) if several else ()


def _with_loop_values(
    context: MeasureContext, values: dict[str, int | float | str]
) -> MeasureContext:
    """Return the context for measures in cells with these loop values."""
    if not values:
        return context
    loops = {**context.sites.loops, **{name: (value,) for name, value in values.items()}}
    return replace(
        context, sites=replace(context.sites, loops=loops, nested=None), loop_values=values
    )


def _have_same_positions(
    groups: list[list[tuple[AxisLabels, ResolvedMeasure]]],
    experiment: spec.Experiment,
    context: MeasureContext,
) -> bool:
    """Check that all measures are read at the same positions; otherwise report E0612."""
    places = [[labels for labels, _ in group] for group in groups]
    for said, own in zip(experiment.measures, places, strict=True):
        if own != places[0]:
            reason = f"it isn't read at the same positions as `{experiment.measures[0].label}`"
            hint = "write a separate experiment for it, or read both at the same positions"
            report_unreadable(context, said.span, reason, hint)
            return False
    return True


def _check_axes(
    groups: list[list[tuple[AxisLabels, ResolvedMeasure]]], work: ExperimentContext
) -> None:
    """Report E0320 for axes that both measures and rules sweep."""
    names = {name for group in groups for labels, _ in group for name, _ in labels}
    for name in sorted(names.intersection(work.axes)):
        first, letter = work.axes[name], name[0]
        said = work.experiment.measures[0]
        problem = AxesCollide(
            span=said.span,
            axis=name,
            shared=f"for {letter} in … {{ … {name} {letter} … }}",
            plural=f"{name}s",
            first=first.span.line,
        )
        if problem not in work.diagnostics:
            work.diagnostics.append(problem)


def find_measured_loops(work: ExperimentContext) -> set[str]:
    """Return the loops whose variables the measures name."""
    loops = {name for measure in work.experiment.measures for name in measure_number_names(measure)}
    return loops.intersection(work.loops)


def find_possible_measure_axes(
    work: ExperimentContext, measures: tuple[ResolvedMeasure | None, ...]
) -> frozenset[str]:
    """Return the axes of measured positions if the number of positions isn't known."""
    unknown = work.model.tokenizer.stands_in or work.table.stands_in or None in measures
    positions = [m.at for m in work.experiment.measures if m.at is not None]
    some = any(may_sweep(ast.Positions((at,), span=at.span)) for at in positions)
    return frozenset({MEASURED_AXIS, "item"}) if unknown and some else frozenset()


def build_measure_axes(
    places: tuple[MeasureGroup, ...], experiment: spec.Experiment, axes: tuple[Axis, ...]
) -> Iterator[Axis]:
    """Yield the axes that measures add to those of the rules."""
    known = {axis.name for axis in axes}
    for name in dict.fromkeys(name for place in places for name, _ in place.labels):
        if name in known:
            continue
        values = dict.fromkeys(dict(place.labels)[name] for place in places)
        span = next((m.at.span for m in experiment.measures if m.at is not None), experiment.span)
        items = {place.measures[0].item for place in places} - {None}
        alias = "item" if name == MEASURED_AXIS and items else None
        yield Axis(name, tuple(values), span, alias=alias)


def find_answer_tokens(work: ExperimentContext, kinds: Registry[RuleKind]) -> AnswerTokens:
    """Find the texts after the prompts of an experiment, if its rules refer to any.

    Errors in the measures are reported by `resolve_measure_groups`.
    """
    rules = work.experiment.rules
    positions = (each for rule in rules for each in (rule.at, rule.onto))
    if not any(map(refers_to_answer, positions)) and not any(
        kinds[rule.verb].whole_text for rule in rules
    ):
        return NO_ANSWERS
    shape, name = work.model.shape, work.model.name
    if shape.task != "tokens":
        outputs = "numbers" if shape.task == "number" else "labels"
        return AnswerTokens(
            reason=f"`{name}` outputs {outputs}, and no text is read after a prompt"
        )
    if not shape.causal:
        return AnswerTokens(reason=f"`{name}` predicts no text after its prompts")
    before = len(work.diagnostics)
    context = MeasureContext(
        work.table,
        work.model.tokenizer,
        work.sites,
        (1,),
        work.diagnostics,
        metrics=work.program.metrics,
        reply=work.reply,
    )
    measures = [
        (m.at is not None, resolve_measure(m.metric, context, label=m.label, at=m.at))
        for m in work.experiment.measures
        if not m.observed  # an observation sees the prompt alone
    ]
    del work.diagnostics[before:]
    of_texts = [
        (elsewhere, atom)
        for elsewhere, measure in measures
        for atom in (() if measure is None else measure.atoms)
        if atom.texts and not atom.of_class
    ]
    terms = [atom for elsewhere, atom in of_texts if not elsewhere]
    read = (
        [atom for atom in terms if any(atom.appended)]
        or [atom for atom in terms if atom.form.takes == "continuation"]
        or terms
    )
    if not read and any(measure is None for _, measure in measures):  # the text is unknown
        return AnswerTokens(((ANSWER_SPAN, (1,) * len(work.table)),))
    if not read and of_texts:
        return AnswerTokens(
            reason="measures with `at` read tokens of the prompt",
            hint="measure a text without `at`, or name a position of the prompt",
        )
    return AnswerTokens(
        tuple((_text_of_metric(atom), atom.lengths) for atom in read),
        reason="no measure of this experiment reads a text after the prompt",
        hint="measure one, such as `logprob(answer)`, or name a position of the prompt",
    )


def _text_of_metric(atom: MetricTerm) -> str:
    """Return the text as the metric names it."""
    given = atom.node.arguments if isinstance(atom.node, ast.Call) else ()
    return given[0].span.written if given else atom.form.default or ANSWER_SPAN


class OmittedAnswer(Record):
    """A rule on the whole prompt that omits the answer tokens after it."""

    rule: ResolvedRule
    measure: str
    tokens: int
    """Number of tokens of the longest text."""

    @property
    def at(self) -> ast.Positions:
        """Positions where the rule acts."""
        return _acting_positions(self.rule)

    @property
    def instead(self) -> str:
        """The rule's positions, also those that it reads, with the answer tokens added."""
        here = _with_answer(self.at)
        return (
            here
            if self.at is self.rule.spec.at
            else f"{_with_answer(self.rule.spec.at)} onto {here}"
        )


def _acting_positions(rule: ResolvedRule) -> ast.Positions:
    """Return the queries of an attention rule, or the written positions of other rules."""
    onto = rule.spec.onto if rule.edge is None else None
    return rule.spec.at if onto is None else onto


def _with_answer(at: ast.Positions) -> str:
    """Format a position with the answer tokens added."""
    text = at.span.written
    (item,) = at.items
    base = item.body.base if isinstance(item.body, ast.Point) else None
    if isinstance(base, ast.TokenIndex) and base.low is None:
        return f"{text} and answer"
    return f"{{{text.removeprefix('{').removesuffix('}')}, answer tokens}}"


def find_omitted_answers(experiment: ResolvedExperiment) -> Iterator[OmittedAnswer]:
    """Yield the rules on the whole prompt if a measure reads several tokens after the prompt."""
    reading = [
        (max(atom.lengths), measure.text)
        for measure in experiment.measures
        for atom in measure.atoms
        if any(atom.appended)
    ]
    tokens, text = max(reading, key=lambda each: each[0], default=(0, ""))
    if not tokens:
        return
    rows = experiment.table.runs[experiment.spec.base].rows
    for rule in experiment.rules:
        at, here = rule.spec.at, _acting_positions(rule)
        # a swap has two positions
        changes = rule.does.changes in ("sites", "edges", "circuit") and rule.spec.verb != "swap"
        if not changes or refers_to_answer(at) or len(at.items) != 1 or len(here.items) != 1:
            continue
        if any(_spans_all(cell, rows) for cell in rule.positions.written.values()):
            yield OmittedAnswer(rule, text, tokens)


def _spans_all(cell: PositionCell, rows: tuple[RunRow, ...]) -> bool:
    """Return whether the cell is exactly the prompt's own text in each row, without the answer."""
    for row, hits in zip(rows, cell.hits, strict=True):
        hit = {token for tokens in hits for token in tokens}
        numbers = {token for token, special in enumerate(row.special) if not special}
        if len(numbers) < 2 or len(hits) != 1 or not numbers <= hit <= set(range(len(row.ids))):
            return False
    return bool(rows)


def resolve_experiment(
    experiment: spec.Experiment,
    program: spec.Program,
    model: ModelContext,
    table: PromptTable,
    kinds: Registry[RuleKind],
    findings: Mapping[str, Finding] | None = None,
) -> tuple[ResolvedExperiment | None, list[Diagnostic]]:
    """Resolve the axes, rules and measures of an experiment; None after an error.

    See `outline_experiment` for the arguments.
    """
    known, diagnostics = outline_experiment(experiment, program, model, table, kinds, findings)
    return known.resolved, diagnostics


def outline_experiment(
    experiment: spec.Experiment,
    program: spec.Program,
    model: ModelContext,
    table: PromptTable,
    kinds: Registry[RuleKind],
    findings: Mapping[str, Finding] | None = None,
    draws_enough: int | None = None,
) -> tuple[ExperimentOutline, list[Diagnostic]]:
    """Resolve as much of an experiment as possible, and report all its errors.

    Args:
        kinds: Rule kinds by verb.
        findings: Results of the experiments in `experiment.after`. A pick from a missing one is
            rejected without a diagnostic.
        draws_enough: Maximum number of random draws to make.

    Codes: E0301 to E0323, E0402, E0413, E0507, E0612 and those of positions and texts.
    """
    diagnostics: list[Diagnostic] = []
    seed = dict(experiment.variant).get(SEED_AXIS)
    onward = FindingPicker(
        {
            name: finding.on(model.name, table.name, seed)
            for name, finding in (findings or {}).items()
        },
        experiment.called,
        program.groups,
    )
    work = _build_context(experiment, program, model, table, onward, diagnostics)
    parts = _resolve_parts(work, kinds)
    experiment, axes = work.experiment, parts.axes
    known = ExperimentOutline(
        spec=experiment,
        model=model,
        table=work.table,
        axes=(*axes, *build_measure_axes(parts.places, experiment, axes)),
        perhaps=_find_possible_axes(work, parts.rules)
        | find_possible_measure_axes(work, parts.measures),
        measures=parts.measures,
        resolved=None,
    )
    if has_errors(diagnostics) or not parts.are_whole(experiment):
        return known, diagnostics
    resolved = _assemble(work, parts, onward)
    refused = _check_resolved(resolved, program)
    if refused:
        return known, [*diagnostics, *refused]
    resolved, problems = _add_controls(resolved, parts.excluded, program, draws_enough, onward)
    diagnostics.extend(problems)
    return (known if problems else replace(known, resolved=resolved)), diagnostics


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The parts of an experiment as they are resolved; None for rejected rules and measures."""

    rules: Sequence[ResolvedRule | None]
    everything: tuple[ResolvedRule, ...]
    derived: Mapping[str, ResolvedExperiment]
    axes: tuple[Axis, ...]
    excluded: Sequence[ExcludedSite]
    measures: tuple[ResolvedMeasure | None, ...]
    places: tuple[MeasureGroup, ...]
    keep: tuple[ResolvedMeasure | None, ...]
    accuracies: Mapping[str, ResolvedMeasure]
    saves: tuple[ResolvedSave, ...]
    direction_files: tuple[ResolvedDirectionFile, ...]
    read_groups: Mapping[str, str]

    def are_whole(self, experiment: spec.Experiment) -> bool:
        """Return whether no part was rejected."""
        return (
            all(len(run.rules) == len(run.spec.rules) for run in self.derived.values())
            and len(self.saves) == len(experiment.saves)
            and len(self.direction_files) == len(experiment.saved_directions)
            and None not in (*self.rules, *self.measures, *self.keep)
        )


def _resolve_parts(work: ExperimentContext, kinds: Registry[RuleKind]) -> _Parts:
    """Resolve rules, measures and files, and report the errors of each."""
    work.probes = resolve_direction_probes(work)
    derived = define_runs(work, kinds)
    experiment, diagnostics = work.experiment, work.diagnostics
    rules = _rules(work, kinds)
    everything = resolve_everything(work, rules, lambda again: _rules(again, kinds))
    _check_loops_used(work)
    _check_single_rules(work, kinds)
    diagnostics.extend(check_derived_base(rules, work))
    work.draws_agree()
    axes = _label_axes(work)
    excluded = resolve_exclusions(experiment.against, work.sites)
    looking = (
        kinds[rule.verb].observes(rule) if resolved is None else _observation(resolved)
        for rule, resolved in zip(experiment.rules, rules, strict=True)
    )
    observed = next((observation for observation in looking if observation is not None), None)
    context = _measure_context(work, axes, observed)
    measures, places = resolve_measure_groups(work, context)
    keep, accuracies = _other_measures(work, context)
    saves, direction_files = resolve_saves(work, context), resolve_direction_files(work)
    diagnostics.extend(check_accuracies(accuracies, derived, experiment))
    diagnostics.extend(
        check_removed_blocks([r for r in rules if r], [m for m in measures if m], work.model.name)
    )
    diagnostics.extend(check_generation(rules, measures, keep, work))
    read_groups, shared = describe_saved_groups(experiment, work.program, work.table)
    diagnostics.extend(shared)
    return _Parts(
        rules=rules,
        everything=everything,
        derived=derived,
        axes=axes,
        excluded=excluded,
        measures=measures,
        places=places,
        keep=keep,
        accuracies=accuracies,
        saves=saves,
        direction_files=direction_files,
        read_groups=read_groups,
    )


def _label_axes(work: ExperimentContext) -> tuple[Axis, ...]:
    """Return the axes; with several models, their layers are labelled by relative depth."""
    axes = tuple(work.axes.values())
    if all(axis != "model" for axis, _ in work.experiment.variant):
        return axes
    written = tuple(rule.site for rule in work.experiment.rules)
    return tuple(label_by_depth(axis, written, work.model.shape.n_layers) for axis in axes)


def _assemble(work: ExperimentContext, parts: _Parts, onward: FindingPicker) -> ResolvedExperiment:
    """Build the experiment from whole parts, without its control."""
    experiment = work.experiment
    return ResolvedExperiment(
        spec=experiment,
        model=work.model,
        table=work.table,
        axes=parts.axes,
        rules=tuple(rule for rule in parts.rules if rule is not None),
        measures=tuple(measure for measure in parts.measures if measure is not None),
        keep=tuple(measure for measure in parts.keep if measure is not None),
        accuracies=parts.accuracies,
        read_groups=parts.read_groups,
        seeds=experiment.seeds or tuple(map(int, work.family_axes.get(SEED_AXIS, ()))),
        seed=work.program.seed,
        nested=work.sites.nested,
        everything=parts.everything,
        picks=onward.picks,
        stand_ins=onward.stand_ins,
        sites_of=onward.sites_of,
        partial_layers=work.sites.partial_layers,
        saves=parts.saves,
        direction_files=parts.direction_files,
        derived=parts.derived,
        places=parts.places,
    )


def _check_resolved(resolved: ResolvedExperiment, program: spec.Program) -> list[Diagnostic]:
    """Check what depends on several parts at once."""
    problem = _too_many(resolved, program) or _too_many_listed(resolved)
    return [
        *check_runs_without_blocks(resolved),
        *([] if problem is None else [problem]),
        *check_reply_readers(resolved),
        *check_estimator(resolved),
        *check_saved_gradients(resolved),
        *check_weight_rules(resolved),
        *check_other_stacks(resolved),
        *check_circuits(resolved),
        *check_cross_layer_rules(resolved),
        *check_read_features(resolved),
    ]


def _add_controls(
    resolved: ResolvedExperiment,
    excluded: Sequence[ExcludedSite],
    program: spec.Program,
    draws_enough: int | None,
    onward: FindingPicker,
) -> tuple[ResolvedExperiment, list[Diagnostic]]:
    """Add the control and the baselines of an experiment."""
    control, reason, problems = None, "", list[Diagnostic]()
    if resolved.spec.against is not None:
        control, problems = resolve_control(
            resolved, excluded, program, limits.CELLS, onward, draws_enough
        )
    else:
        control, reason, problem = resolve_training_control(resolved, program, draws_enough)
        problems = [] if problem is None else [problem]
    if problems:
        return resolved, problems
    completed = replace(
        resolved,
        control=control,
        without_control=reason,
        bare=build_baseline(resolved),
        circuit_baselines=build_circuit_baselines(resolved),
    )
    return completed, []


def _rules(work: ExperimentContext, kinds: Registry[RuleKind]) -> list[ResolvedRule | None]:
    """Resolve each rule; None for rejected ones."""
    answers, replies = find_answer_tokens(work, kinds), get_reply_tokens(work.experiment)
    rules: list[ResolvedRule | None] = []
    for rule in work.experiment.rules:
        kind = kinds[rule.verb]
        work.replies = replies if kind.reads_replies else RULE_REPLIES
        work.answers = (
            answers if not kind.within_prompt else AnswerTokens(reason=kind.within_prompt)
        )
        resolved = resolve_rule(kind.resolve, rule, work)
        rules.append(None if resolved is None else resolve_steps(resolved, work))
    return rules


def _observation(rule: ResolvedRule) -> Observation | None:
    """Return the observation of a rule; None for a rule that acts."""
    return rule.does if isinstance(rule.does, Observation) else None


def _build_context(
    experiment: spec.Experiment,
    program: spec.Program,
    model: ModelContext,
    table: PromptTable,
    onward: FindingPicker,
    diagnostics: list[Diagnostic],
) -> ExperimentContext:
    """Create the context for the rules, with the axes of the loops and the sites of this model."""
    axes = resolve_loops(experiment.loops, program.parameters, diagnostics)
    loops = axes.labels
    sites = SiteContext(
        model.name,
        model.shape,
        program.groups,
        program.parameters,
        loops,
        axes.nested,
        diagnostics,
        onward,
        words={
            (loop.name, node.id): node.span
            for loop in experiment.loops
            for node in walk(loop.domain)
            if isinstance(node, ast.Name)
        },
        circuits=program.circuits,
        bases=program.bases,
        positions=program.position_groups,
    )
    named = {*SITES, *program.groups, *program.circuits}
    diagnostics.extend(_find_component_loops(experiment, loops, named))
    experiment, problems = expand_own_layers(experiment, sites)
    diagnostics.extend(problems)
    work = ExperimentContext(experiment, program, model, table, sites)
    centres = _centres(experiment)
    for loop in experiment.loops:
        work.axes[loop.name] = Axis(
            loop.name, loops[loop.name], loop.span, of_windows=loop.name in centres
        )
    return work


def _find_component_loops(
    experiment: spec.Experiment, loops: Mapping[str, LoopLabels], sites: Collection[str]
) -> Iterator[Diagnostic]:
    """Yield E0322 for loops over words that sites begin with, whose variable has the name of a
    component: a site that begins with it could mean either."""
    for loop in experiment.loops:
        if loop.name in SITES and any(label in sites for label in loops[loop.name]):
            reason = "it is the name of a component"
            hint = "rename the variable: `for s in …`"
            yield BadLoopValue(span=loop.span, name=loop.name, reason=reason, hint=hint)


def _too_many(resolved: ResolvedExperiment, program: spec.Program) -> Diagnostic | None:
    """Return E0323 if the experiment has more cells than a run permits."""
    cells = resolved.n_there
    if cells <= limits.CELLS:
        return None
    left_out = resolved.n_cells - cells
    undecided = find_open_axes(resolved.spec, program.groups, ("shape", "tokens"))
    axes = resolved.axes
    return TooManyCells(
        span=resolved.spec.span,
        of=f"experiment `{resolved.name}`",
        cells=cells,
        most=limits.CELLS,
        axes=" × ".join(f"{axis.name} ({len(axis)})" for axis in axes)
        + (f", without {left_out:,} that loops exclude" if left_out else ""),
        by_text=not resolved.table.stands_in and undecided.isdisjoint(axis.name for axis in axes),
    )


def _too_many_listed(resolved: ResolvedExperiment) -> Diagnostic | None:
    """Return E0207 if the listed tokens of all cells exceed the limit."""
    numbers = resolved.n_cells * resolved.model.shape.vocab_size
    for rule in resolved.rules:
        does = _observation(rule)
        if does is not None and does.lists(rule) and numbers > limits.TOKEN_LISTS:
            assert rule.spec.observed is not None
            return BadArgument(
                span=rule.spec.observed.span,
                name="top",
                reason=f"would hold {numbers:,} numbers, more than {limits.TOKEN_LISTS:,}: "
                "one for each cell and token of the vocabulary",
                hint="sweep fewer layers or positions, or remove `top`",
            )
    return None


def _centres(experiment: spec.Experiment) -> set[str]:
    """Return the loop variables that are the centre of a window."""
    parts = (part for rule in experiment.rules for part in walk(_rule_nodes(rule)))
    windows = (part for part in parts if isinstance(part, ast.Axis) and part.window is not None)
    bounds = (part for axis in windows for part in walk(axis.values))
    return {
        bound.name
        for bound in bounds
        if isinstance(bound, ast.Bound) and bound.name and not bound.offset
    }


def _find_possible_axes(
    work: ExperimentContext, rules: Sequence[ResolvedRule | None]
) -> frozenset[str]:
    """Return names of axes that the experiment may have in addition to the resolved ones."""
    axes: set[str] = set()
    for rule, resolved in zip(work.experiment.rules, rules, strict=True):
        if resolved is None:
            axes.update(possible_axes(rule))
        elif _sweep_unknown(rule, work):
            axes.update(position_axes(rule))
    return frozenset(axes)


def _sweep_unknown(rule: spec.Rule, work: ExperimentContext) -> bool:
    """Return whether the number of positions depends on tokens or rows that aren't available."""
    missing: dict[UnknownFact, bool] = {
        "tokens": work.model.tokenizer.stands_in,
        "rows": work.table.stands_in,
    }
    unknown: list[UnknownFact] = [what for what, stands_in in missing.items() if stands_in]
    named = (positions for positions in (rule.at, rule.onto) if positions is not None)
    return bool(unknown) and any(has_open_positions(positions, unknown) for positions in named)


def _check_loops_used(work: ExperimentContext) -> None:
    """Report loops whose variable is unused, which would run the same cell repeatedly, and rules
    that use the variable of a loop that they aren't in."""
    variables = [_find_variables(rule, work) for rule in work.experiment.rules]
    used = find_measured_loops(work).union(*variables)
    if has_errors(work.diagnostics):
        return  # an earlier error may be why a variable looks unused
    for loop in work.experiment.loops:
        if loop.name not in used:
            work.diagnostics.append(
                BadLoopValue(
                    span=loop.span,
                    name=loop.name,
                    reason=UNUSED_LOOP,
                    hint=f"use it in a rule, for example `layer {loop.name}`",
                )
            )
        for rule, names in zip(work.experiment.rules, variables, strict=True):
            if loop.name in names and loop.name not in rule.loops:
                hint = f"move this line into the block of `for {loop.name} in …`"
                if loop.name in work.program.parameters:
                    hint += f", or rename the variable if it means the `param {loop.name}`"
                reason = "this line is outside of its `for`"
                work.diagnostics.append(
                    BadLoopValue(span=rule.span, name=loop.name, reason=reason, hint=hint)
                )


def _find_variables(rule: spec.Rule, work: ExperimentContext) -> set[str]:
    """Return the names in a rule that may be variables of loops: neither components nor groups and
    circuits of these names."""
    nodes = _rule_nodes(rule)
    parts = [*walk(nodes)]
    sites = [part for part in parts if isinstance(part, ast.Site)]
    excluded = (each for site in sites for each in site.excluded if isinstance(each, ast.Site))
    values = {name.span for site in excluded if not site.axes for name in site.names}
    defined = {*SITES, *work.program.groups, *work.program.circuits}
    components = {name.span for site in sites for name in site.names if name.id in defined}
    components -= values  # `dims * except k`
    variables = {
        part.name if isinstance(part, ast.Index) else part.id
        for part in parts
        if isinstance(part, ast.Name | ast.Index) and part.span not in components
    }
    basis = rule.site.basis_name if rule.site is not None else None
    return {*variables, *number_names(nodes), *([] if basis is None else [basis])}


def _check_single_rules(work: ExperimentContext, kinds: Registry[RuleKind]) -> None:
    """Report E0108 for repeated rules of a kind that an experiment may have only once."""
    rules = work.experiment.rules
    for verb, kind in kinds.items():
        own = [rule for rule in rules if rule.verb == verb]
        if kind.once:
            what = f"a second `{verb}` in one experiment"
            later = kind.once_because or NotSupported.later
            work.diagnostics.extend(
                NotSupported(span=rule.span, what=what, later=later) for rule in own[1:]
            )


def _rule_nodes(rule: spec.Rule) -> Any:
    parts = (
        *(rule.site, rule.reading, rule.at, rule.fill, rule.onto, rule.into_layer),
        *(rule.source_block, rule.edge, rule.receiver, rule.direction, rule.exchanged),
        *(() if rule.during is None else (rule.during.first, rule.during.last)),
        *(() if rule.observed is None else (each.weight for each in rule.observed.maps)),
    )
    return tuple(part for part in parts if part is not None)


def _measure_context(
    work: ExperimentContext, axes: tuple[Axis, ...], observed: Observation | None
) -> MeasureContext:
    """Create the context for the measures."""
    items = sorted({i for axis in axes for i in axis.items if i is not None})
    if has_errors(work.diagnostics) or work.model.tokenizer.stands_in:
        items = items or [1]  # a rejected rule may sweep occurrences
    return MeasureContext(
        work.table,
        work.model.tokenizer,
        work.sites,
        tuple(items),
        work.diagnostics,
        observed=observed,
        names={
            name
            for rule in work.experiment.rules
            if rule.observed is not None
            for name in (rule.observed.name, rule.observed.word)
            if name is not None
        },
        metrics=work.program.metrics,
        replies=get_reply_tokens(work.experiment),
        reply=work.reply,
    )


def _other_measures(
    work: ExperimentContext, context: MeasureContext
) -> tuple[tuple[ResolvedMeasure | None, ...], dict[str, ResolvedMeasure]]:
    """Resolve the `keep` conditions, and `correct` on the runs that an `accuracy` names."""
    experiment = work.experiment
    keep = [resolve_measure(k, context, label="keep", runs=("clean",)) for k in experiment.keep]
    accuracies: dict[str, ResolvedMeasure] = {}
    for call in _accuracy_calls(experiment):
        run = resolve_run(call.arguments[0].value, context)
        if run is None:
            continue
        correct = ast.Name("correct", span=call.span)
        measure = resolve_measure(correct, context, label="accuracy")
        if measure is not None:
            accuracies[run] = measure
    return tuple(keep), accuracies


def _accuracy_calls(experiment: spec.Experiment) -> list[ast.Call]:
    """Return the `accuracy` calls with one run; the expectation reports all others."""
    return [
        node
        for expect in experiment.expects
        if expect.condition is not None
        for node in walk(expect.condition)
        if isinstance(node, ast.Call)
        and node.name == "accuracy"
        and [argument.name for argument in node.arguments[:1]] == [None]
        and {argument.name for argument in node.arguments[1:]} <= {PROMPTS_AXIS, "model"}
    ]
