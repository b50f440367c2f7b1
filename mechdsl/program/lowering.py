"""Convert a file with its imports to one `Program`, with its experiments in the order of a run."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

from mechdsl.base import limits
from mechdsl.base.records import closest_name
from mechdsl.base.text import Source, Span, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.experiments import NoMeasure
from mechdsl.diagnostics.files import NotMechFile, ReadOutsideFolder, SpecialFile
from mechdsl.diagnostics.rules import BadWeights
from mechdsl.diagnostics.syntax import (
    BadArgument,
    BadSetting,
    CircularExperiments,
    DuplicateName,
    ImportFailed,
    MissingLine,
    NotSupported,
    NotText,
    RepeatedStatement,
    UnknownName,
    Unreadable,
    UnusedName,
)
from mechdsl.program import spec
from mechdsl.program.bases import (
    check_trained_direction,
    keep_decoders,
    lower_basis,
    lower_circuit_mask,
    lower_mask,
    lower_saved_circuit,
    lower_saved_group,
)
from mechdsl.program.directions import (
    direction_dependencies,
    drop_circular_directions,
    fit_rows_of_direction,
    list_direction_expressions,
    lower_direction,
)
from mechdsl.program.discovery import expand_discoveries, expand_searches
from mechdsl.program.images import IMAGE_SPAN, MEAN_IMAGE, averaged_block, averaged_blocks
from mechdsl.program.measures import (
    label_by_position,
    lower_control,
    lower_estimator,
    lower_expectation,
    lower_measure,
    lower_no_control,
    lower_report,
    lower_statistics,
    reject_repeated_measures,
)
from mechdsl.program.models import check_bases, define_model, lower_edits, lower_model
from mechdsl.program.names import Namespace, line_reference, suggest_split
from mechdsl.program.observations import (
    ObserveStatement,
    ResultSpec,
    assign_reports,
    lower_observation,
    split_results,
)
from mechdsl.program.paths import USE_PATH, path_to_read, warn_named_paths
from mechdsl.program.prompts import (
    derived_runs,
    lower_prompts,
    no_prompts,
    pool_names,
    warn_unused_block_names,
)
from mechdsl.program.python_functions import CallableSource
from mechdsl.program.references import (
    measure_number_names,
    resolve_group_results,
    resolve_result_names,
    resolve_result_references,
    results_by_observation,
)
from mechdsl.program.rules import lower_derived_runs, lower_rules
from mechdsl.program.runs import (
    REPLY_REPORTS,
    RunLabel,
    RunSide,
    Variant,
    combine_variants,
    experiment_models,
    lower_generation,
    lower_replies,
    lower_sides,
    note_compared_models,
    prompts_labels,
    reject_repeated_names,
    reply_length_measure,
    runs_of_own_model,
    variant_fields,
)
from mechdsl.program.saves import lower_saved_directions, lower_saves, reject_compared_saves
from mechdsl.program.spec import (
    CLEAN,
    PROMPTS_AXIS,
    Definitions,
    RepliesOf,
    constant_value,
    whole_number_value,
)
from mechdsl.program.statements import Statements, expand_metrics, mark_names_used
from mechdsl.program.trainings import lower_objectives, split_by_seed, split_rows_of_circuits
from mechdsl.syntax import ast
from mechdsl.syntax.frontend import parse, parse_setting, read_source
from mechdsl.syntax.printer import format_call
from mechdsl.syntax.traversal import number_names, walk
from mechdsl.syntax.tree_builder import RegisteredWords

ResultReference: TypeAlias = ast.RankedSelection | ast.MapOf | RepliesOf
"""A reference to an experiment (`of`) whose results are needed."""


def add_run_order(tree: ast.File, parts: Definitions, scope: Namespace) -> list[spec.Experiment]:
    """Return the experiments, each with the names of those whose results it uses.

    Codes: E0201 for unknown experiments, E0210 for cycles.
    """
    results = results_by_observation(parts.experiments)
    if results:
        groups = {
            name: resolve_group_results(group, results) for name, group in parts.groups.items()
        }
        parts.groups.update(groups)
        made = {
            name: _at_results(direction, results) for name, direction in parts.directions.items()
        }
        parts.directions.update(made)
        parts.experiments = [
            resolve_result_names(experiment, results) for experiment in parts.experiments
        ]
    known = _experiments(parts, scope)
    called = {e.name: _called(e, known, results) for e in parts.experiments}
    ranked = {
        e.name: [
            own
            for node in _ranked(e, parts)
            if node.of not in parts.circuits and node not in _mask_picks(e, parts, known)
            for own in _each_of(node, called[e.name])
        ]
        for e in parts.experiments
    }
    own: list[object] = [g.sites for g in parts.groups.values() if _is_own(g, tree)]
    own += [(d.value, d.site) for d in parts.directions.values() if _is_own(d, tree)]
    every = [node for nodes in ranked.values() for node in nodes]
    every.extend(node for each in own for node in _in_tree(each))
    for node in {(node.span, node.of): node for node in every}.values():
        if node.of not in known and not _is_broken(node.of, parts):
            hint = _suggest_ranked(node.of, known, results, parts)
            problem = UnknownName(span=node.span, kind="experiment", name=node.of, hint=hint)
            scope.diagnostics.append(problem)
    _circles(ranked, scope)
    for edits in parts.edits.values():
        node = next(_ranked(edits, parts), None)
        if node is not None:
            reason = f"its edits depend on results of `{node.of}`, but a model is built before "
            reason += "experiments run"
            hint = "name the sites or the direction, or write the rules in an experiment"
            scope.diagnostics.append(BadWeights(span=edits.span, reason=reason, hint=hint))
    return [
        e.model_copy(
            update={
                "after": tuple(dict.fromkeys(node.of for node in ranked[e.name])),
                "called": called[e.name],
            }
        )
        for e in parts.experiments
    ]


def _suggest_ranked(
    name: str, known: Collection[str], results: Mapping[str, str], parts: Definitions
) -> str:
    """Return the fix for `top n of NAME` with a name that isn't an experiment."""
    mask = parts.masks.get(name)
    if name in parts.positions or (mask is not None and mask.chooses_positions):
        hint = f"`{name}` chooses positions, from which `top` doesn't select: "
        return hint + f"write `at {name} tokens`"
    if mask is not None:
        hint = f"`{name}` is a group: `top` selects from groups that `fit` chooses, as "
        return hint + "the site of a rule or after its `except`"
    if name in parts.groups or name in parts.circuits:
        kind = "circuit" if name in parts.circuits else "group"
        hint = f"`{name}` is a {kind} that lists its members; `top` selects from results "
        return hint + "of an experiment, and from groups and circuits that `fit` chooses"
    listed = name_list(known) or "none"
    return did_you_mean(name, [*known, *results], f"the file has {listed}")


def _is_broken(name: str, parts: Definitions) -> bool:
    """Whether a name is that of a group or circuit whose call has an error."""
    if name in parts.masks:
        return False
    circuit = parts.circuits.get(name)
    group = parts.groups.get(name)
    return (group is not None and not group.sites) or (circuit is not None and circuit.is_open)


def _experiments(parts: Definitions, scope: Namespace) -> list[str]:
    """Return all names of results."""
    several = {e.within for e in parts.experiments}
    known = [name for name in scope.names("experiment") if name not in several]
    return list(dict.fromkeys([*(e.name for e in parts.experiments), *known]))


def _called(
    experiment: spec.Experiment, known: Collection[str], results: Mapping[str, str]
) -> dict[str, dict[str, ast.MapOf]]:
    """Return the `for` variables over words, except those named like an experiment: variable → word
    → the experiment, or the cells of one, that the word refers to."""
    ofses: dict[str, dict[str, ast.MapOf]] = {}
    for loop in experiment.loops:
        listed = loop.domain.values
        items = listed.items if isinstance(listed, ast.ListLiteral) else (listed,)
        named = [item for item in items if isinstance(item, ast.Name | ast.Call)]
        words = {format_call(item): _map_of(item, results) for item in named}
        if words and loop.name not in known and not words.keys() & set(loop.within):
            ofses[loop.name] = words
    return ofses


def _map_of(node: ast.Name | ast.Call, results: Mapping[str, str]) -> ast.MapOf:
    name, cell = (node.id, ()) if isinstance(node, ast.Name) else (node.name, node.arguments)
    return ast.MapOf(results.get(name, name), cell, span=node.span)


def _each_of(
    node: ResultReference, called: Mapping[str, Mapping[str, ast.MapOf]]
) -> list[ResultReference]:
    """Expand `top k of m` to one reference per experiment in the domain of `m`."""
    if isinstance(node, RepliesOf) or node.of not in called:
        return [node]
    return [replace(node, of=each.of, span=each.span) for each in called[node.of].values()]


def _is_own(part: spec.Group | spec.Direction, tree: ast.File) -> bool:
    return part.span.source is tree.span.source


def _at_results(direction: spec.Direction, results: dict[str, str]) -> spec.Direction:
    """Replace names of observations in a direction's sites by the names of their results."""
    if direction.site is None:
        return direction
    return direction.model_copy(update={"site": resolve_result_references(direction.site, results)})


def _ranked(experiment: spec.Experiment, parts: Definitions) -> Iterator[ResultReference]:
    """Yield every `top n of …` of an experiment, including those in its groups and directions, and
    the source of the replies after its prompts."""
    if experiment.replies is not None:
        yield experiment.replies
    for part in (*experiment.every_rule, *experiment.measures, *experiment.loops):
        for name in spec.spec_fields(type(part)):
            yield from _in_tree(getattr(part, name), parts.groups)
    for save in experiment.saves:
        metric = () if save.gradient is None else (save.gradient.metric, save.gradient.at)
        yield from _in_tree((save.site, save.at, *metric), parts.groups)
    for save in experiment.saved_directions:
        yield from _in_tree(save.direction, parts.groups)
    for rule in experiment.every_rule:
        if rule.observed is not None:
            yield from (*rule.observed.maps, *rule.observed.others)
            yield from _in_tree(rule.observed.call, parts.groups)
    used = list_direction_expressions(experiment)
    for direction in direction_dependencies(used, parts.directions):
        yield from _in_tree((direction.value, direction.site), parts.groups)
    yield from _in_tree(experiment.keep, parts.groups)
    if experiment.against is not None:
        yield from _in_tree(experiment.against.apart, parts.groups)
        if experiment.against.frequency is not None:
            yield experiment.against.frequency


def _mask_picks(
    experiment: spec.Experiment, parts: Definitions, known: Collection[str]
) -> list[ast.RankedSelection]:
    """Return every `top n of g` that is a site of an experiment's rules, where a training chooses
    the group `g`, or a file has the group that one chose."""
    sites = (
        node
        for rule in experiment.every_rule
        for name in spec.spec_fields(type(rule))
        for node in walk(getattr(rule, name))
        if isinstance(node, ast.Site) and node.ranked is not None
    )
    picks = (site.ranked for site in sites if site.ranked is not None)
    groups = {name for name, mask in parts.masks.items() if not mask.chooses_positions}
    groups |= {name for name, group in parts.groups.items() if group.candidates}
    return [node for node in picks if node.of in groups and node.of not in known]


def _in_tree(
    tree: object, groups: Mapping[str, spec.Group] | None = None
) -> Iterator[ast.RankedSelection]:
    for node in walk(tree):
        if isinstance(node, ast.RankedSelection):
            yield node
        elif groups and isinstance(node, ast.Name) and node.id in groups:
            yield from _in_tree(groups[node.id].sites)


def _circles(ranked: Mapping[str, Sequence[ResultReference]], scope: Namespace) -> None:
    """Report E0210 once per cycle, at the line of its first experiment that needs the next one."""
    done: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if name in done:
            return
        for node in ranked[name]:
            if node.of in chain:
                circle = (*chain[chain.index(node.of) :], node.of)
                first = next(n for n in ranked[circle[0]] if n.of == circle[1])
                problem = CircularExperiments(
                    span=first.span,
                    experiment=circle[0],
                    of=circle[1],
                    chain=" → ".join(circle),
                )
                if problem not in scope.diagnostics:
                    scope.diagnostics.append(problem)
            elif node.of in ranked:
                visit(node.of, (*chain, node.of))
        done.add(name)

    for name in ranked:
        visit(name, (name,))


def sort_by_dependency(experiments: Sequence[spec.Experiment]) -> list[spec.Experiment]:
    """Order experiments after those whose results they use, otherwise in source order.

    Experiments in cycles, and those that use missing experiments, are dropped.
    """
    names = {e.name for e in experiments}
    left, order, done = list(experiments), list[spec.Experiment](), set[str]()
    while ready := [e for e in left if done.issuperset(e.after)]:
        order.extend(ready)
        left = [e for e in left if not done.issuperset(e.after)]
        waiting = {e.name for e in left}
        done = {name for name in names if name not in waiting}
    return order


def compared_experiments(experiment: spec.Experiment) -> set[str]:
    """Return words of an experiment's expectations that may be names of other experiments."""
    labels = {measure.label for measure in experiment.measures}
    return {
        name for expect in experiment.expects for name in expectation_experiments(expect, labels)
    }


def expectation_experiments(expectation: spec.Expectation, labels: Collection[str]) -> set[str]:
    """Return words of an expectation that may be names of other experiments.

    Args:
        labels: Labels of the measures of the experiment that contains it.
    """
    names: set[str] = set()
    inner: set[int] = set()
    for node in walk(expectation.condition):
        match node:
            case ast.ExperimentMeasure(measure=measure, experiment=name):
                inner.add(id(measure))
                names.add(name.id)
            case ast.QualifiedRef(of=of) if of.name not in labels and id(node) not in inner:
                names.add(of.whole)
            case ast.Call(name="spearman" | "pearson", arguments=arguments):
                names.update(n.id for n in walk(arguments[1:2]) if isinstance(n, ast.Name))
            case _:
                pass
    return names


def add_dependencies(
    names: Collection[str], experiments: Sequence[spec.Experiment]
) -> list[spec.Experiment]:
    """Return experiments with everything that must run before them and their comparisons."""
    wanted = set(names)
    for experiment in experiments:
        if experiment.name in names:
            wanted |= compared_experiments(experiment).intersection(e.name for e in experiments)
    while True:
        more = {of for e in experiments if e.name in wanted for of in e.after}
        if more <= wanted:
            return [e for e in experiments if e.name in wanted]
        wanted |= more


def lower_experiment(
    definition: ast.ExperimentDef, parts: Definitions, scope: Namespace
) -> tuple[spec.Experiment, ...]:
    """Lower an experiment: one typed experiment for each combination that it compares.

    After an error the experiment is `broken`: it is checked for further errors and not run. The
    result is empty if the experiment has no prompts or a feature that can't be executed yet. The
    reasons are in the scope.
    """
    experiments: dict[str, list[spec.Experiment]] = {}
    number, blocks = 0, 1
    while number < blocks:
        said = list(scope.diagnostics)
        work = Statements(definition, parts, scope)
        work.collect(definition.statements)
        blocks = len(work.prompts[0].prompts) if work.prompts else 1
        for experiment in _on_block(work, number):
            experiments.setdefault(experiment.name, []).append(experiment)
        # A problem that every block shares is reported once.
        scope.diagnostics[:] = said + [
            d for d in scope.diagnostics[len(said) :] if not number or d not in said
        ]
        number += 1
    return tuple(variant for variants in experiments.values() for variant in variants)


def _lower_measures(work: Statements, observed: Sequence[spec.Rule]) -> tuple[spec.Measure, ...]:
    """Lower the measures; the length of replies if an experiment measures nothing else."""
    parts, scope = work.parts, work.scope
    if work.measures or observed:
        return tuple(lower_measure(measure, parts, scope) for measure in work.measures)
    if _shows_replies(work):
        return (lower_measure(reply_length_measure(work.generate[0]), parts, scope),)
    if not work.saves and not work.saved_directions and not work.unsupported:
        scope.diagnostics.append(_measures_nothing(work))
    return ()


def _list_results(
    observed: Sequence[spec.Rule],
    measures: tuple[spec.Measure, ...],
    rules: Sequence[spec.Rule],
    work: Statements,
) -> list[ResultSpec]:
    """Return the results of an experiment, at least one, and check the measures of each."""
    measures = label_by_position(measures)
    results = split_results(observed, measures, rules, work, work.parts) or [ResultSpec()]
    for result in results:
        reject_repeated_measures(result.measures, work)
    return results


def _rejected_variant(
    sources: Sequence[RunSide],
    bases: Sequence[RunSide],
    labels: tuple[tuple[str, RunLabel], ...],
) -> Variant:
    """Return a variant of an experiment whose combinations were rejected."""
    source, base = (ends[0].run if ends else None for ends in (sources, bases))
    return Variant("", source, base or CLEAN, labels, source)


def _on_block(work: Statements, number: int) -> tuple[spec.Experiment, ...]:
    """Lower the experiment for one block of its `prompts` line."""
    definition, parts, scope = work.definition, work.parts, work.scope
    before = len([d for d in scope.diagnostics if d.severity == "error"])
    use = work.prompts[0].prompts[number] if work.prompts else None
    prompts = _prompts(work, use)
    derived = () if prompts is None else lower_derived_runs(work, prompts)
    sources, bases = ([], []) if prompts is None else lower_sides(work, prompts)
    models = experiment_models(work, bases)
    rules = _rules_of(work, prompts, sources)
    observed = [_observation(line, loops, prompts, work) for line, loops in work.observed]
    measures = _lower_measures(work, observed)
    saves = () if prompts is None else lower_saves(work, prompts)
    note_compared_models(measures, saves, prompts, work)
    saved_directions, statistics = lower_saved_directions(work), lower_statistics(work)
    against, estimator = lower_control(work), lower_estimator(work)
    generation, replies = lower_generation(work), lower_replies(work)
    expects = tuple(lower_expectation(e, work) for e in work.expects)
    acting = next(iter(rules.values()))
    results = _list_results(observed, measures, acting, work)
    combined = (
        [] if prompts is None else combine_variants(models, sources, bases, prompts, work, use)
    )
    if work.unsupported or prompts is None:
        return ()
    reject_compared_saves(work, [variant.labels for variant in combined])
    assign_reports(results, [lower_report(r, work) for r in work.reports], expects, acting, work)
    part, limit = _rows(work, prompts, use)
    broken = before != len([d for d in scope.diagnostics if d.severity == "error"])
    combined = combined or [_rejected_variant(sources, bases, prompts_labels(use, work))]
    whole = spec.Experiment(
        span=definition.name.span,
        name=definition.name.id,
        model="",
        prompts=prompts.name,
        part=part,
        limit=limit,
        replies=replies,
        broken=broken,
        loops=tuple(work.loops),
        keep=tuple(expand_metrics(k, parts, scope) for k in work.keep),
        measures=(),
        saves=saves,
        saved_directions=saved_directions,
        statistics=statistics,
        against=against,
        without_control=lower_no_control(work),
        estimator=estimator,
        generation=generation,
    )
    return _list_parts(whole, results, combined, rules, derived, work)


def _list_parts(
    whole: spec.Experiment,
    results: Sequence[ResultSpec],
    combined: Sequence[Variant],
    rules: Mapping[str | None, tuple[spec.Rule, ...]],
    derived: tuple[spec.DerivedRun, ...],
    work: Statements,
) -> tuple[spec.Experiment, ...]:
    """Return the experiment of each result and variant."""
    saving = next((result for result in results if not result.own and not result.apart), results[0])
    return tuple(
        _part(
            whole.model_copy(
                update={
                    "variant": variant.labels,
                    "model": variant.model,
                    "source": variant.source,
                    "base": variant.base,
                    **variant_fields(variant, rules[variant.reads], derived, whole.saves, work),
                }
            ),
            part,
            several=len(results) > 1,
            saves=part is saving,
            own=runs_of_own_model(variant.model, work),
        )
        for part in results
        for variant in (_without_sides(combined) if part.apart else combined)
    )


def _part(
    experiment: spec.Experiment,
    part: ResultSpec,
    *,
    several: bool,
    saves: bool,
    own: Collection[str],
) -> spec.Experiment:
    """Reduce the experiment to one of its results; only one of them `saves` files.

    Args:
        own: Names of runs of the experiment's model; each means its clean run.
    """
    rules, seen = experiment.rules, part.observed
    changed: dict[str, object] = {}
    if seen is not None and seen.source is not None:
        rules = ()
        changed.update(source=None, base=CLEAN if seen.source in own else seen.source)
        seen = seen.model_copy(update={"source": None})
    if seen is not None:
        rules = tuple(sorted((*rules, seen), key=lambda rule: rule.span.start))
    if several:
        changed["within"] = experiment.name
        changed["name"] = f"{experiment.name}.{part.name}" if part.own else experiment.name
        named = {name for rule in rules for name in rule.loops}
        named = named.union(*map(measure_number_names, part.measures))
        changed["loops"] = tuple(loop for loop in experiment.loops if loop.name in named)
    if not saves:
        changed["saves"] = changed["saved_directions"] = ()
    elif part.apart:  # `save` without a run means the file's base run
        named_runs = (
            save.model_copy(update={"run": save.run or experiment.base})
            for save in experiment.saves
        )
        changed["saves"] = tuple(named_runs)
    return experiment.model_copy(
        update={
            **changed,
            "rules": rules,
            "measures": tuple(part.measures),
            "reports": tuple(part.reports),
            "expects": tuple(part.expects),
        }
    )


def _shows_replies(work: Statements) -> bool:
    """Whether the generated text is the only requested result."""
    kinds = {report.kind.id for report in work.reports}
    return bool(work.generate) and bool(kinds) and kinds <= REPLY_REPORTS


def _measures_nothing(work: Statements) -> NoMeasure:
    name = work.definition.name
    if not work.generate:
        return NoMeasure(span=name.span, experiment=name.id)
    hint = "add `report texts` alone to see the replies, or a measure, for example "
    return NoMeasure(span=name.span, experiment=name.id, hint=f"{hint}`measure length as raw`")


def _without_sides(combined: Sequence[Variant]) -> list[Variant]:
    """Reduce to one variant per model, because the observed run isn't a side of `from … into …`."""
    variants: dict[str, Variant] = {}
    for variant in combined:
        labels = tuple(label for label in variant.labels if label[0] in (PROMPTS_AXIS, "model"))
        variants.setdefault(variant.model, replace(variant, labels=labels))
    return list(variants.values())


def _observation(
    line: ObserveStatement,
    loops: tuple[str, ...],
    prompts: spec.Prompts | None,
    work: Statements,
) -> spec.Rule:
    mark_names_used(line, work)
    return lower_observation(line, loops, prompts, work)


def _prompts(work: Statements, ref: ast.Ref | None) -> spec.Prompts | None:
    """Return the experiment's block; after an error, the one that was most likely meant."""
    known = work.scope.names("prompts")
    if ref is None and (_of_weights(work) or _only_saves_directions(work)):
        return work.parts.prompts.setdefault(spec.NO_PROMPTS, no_prompts())
    if ref is None:
        first = work.parts.prompts.get(known[0]) if known else None
        kind, name = ("prompts", "fruit") if first is None else (first.kind, first.name)
        work.diagnostics.append(
            MissingLine(
                span=work.definition.name.span,
                experiment=work.definition.name.id,
                what=kind,
                hint=f"add a line such as `{kind} {name} limit 64`",
            )
        )
        return first if len(known) == 1 else None
    use = work.prompts[0]
    reject_repeated_names([(prompt.span.written, prompt.span) for prompt in use.prompts], work)
    name = ref.name
    if not work.scope.use("prompts", name, ref.span):
        name = closest_name(name, known) or ""
    prompts = work.parts.prompts.get(name)
    if prompts is not None and prompts.kind != use.kind:
        reason, hint = f"is a block of {prompts.kind}", f"write `{prompts.kind} {name}`"
        work.diagnostics.append(BadArgument(span=ref.span, name=name, reason=reason, hint=hint))
    first = work.parts.prompts.get(use.prompts[0].name)
    if (
        prompts is not None
        and first is not None
        and (prompts.tiles is None) != (first.tiles is None)
    ):
        kinds = ("whole images", "tiles")
        own, others = kinds if first.tiles is not None else kinds[::-1]
        reason = f"has {own}, but `{first.name}` has {others}"
        hint = "write the same `tiles` in both blocks"
        work.diagnostics.append(BadArgument(span=ref.span, name=name, reason=reason, hint=hint))
    return prompts


def _of_weights(work: Statements) -> bool:
    """Whether the experiment only observes weights and thus needs no prompts."""
    other = (*_prompt_lines(work), work.saved_directions)
    lines = [line for line, _ in work.observed if isinstance(line, ast.Observe)]
    words = {line.what.id if isinstance(line.what, ast.Name) else line.what.name for line in lines}
    free = all(line.toward is None and line.run is None for line in lines)
    return (
        len(lines) == len(work.observed) > 0
        and all(work.scope.words.observation(word).of_weights for word in words)
        and free
        and not any(other)
    )


def _prompt_lines(work: Statements) -> tuple[Sequence[object], ...]:
    """Return the lines, apart from observations, that need prompts."""
    return (work.measures, work.rules, work.from_into, work.keep, work.saves, work.derived,
            work.generate)  # fmt: skip


def _only_saves_directions(work: Statements) -> bool:
    """Whether the experiment only saves directions that name their rows and thus needs no
    prompts."""
    if not work.saved_directions or work.observed or any(_prompt_lines(work)):
        return False
    named = (direction.direction for direction in work.saved_directions)
    used = direction_dependencies(named, work.parts.directions)
    rows = [rows for direction in used for rows in fit_rows_of_direction(direction, work.parts)]
    return all(row.block is not None for row in rows)


def _rows(
    work: Statements, prompts: spec.Prompts, ref: ast.Ref | None
) -> tuple[Literal["train", "test"] | None, int | None]:
    """Return the part of the block and the row limit given by the `prompts` line."""
    if ref is None:
        return None, None
    use = work.prompts[0]
    limit = whole_number_value(use.limit, work.parts.parameters)
    if isinstance(use.limit, str) and not work.scope.use("param", use.limit, use.span):
        limit = 1
    if use.limit is not None and (limit is None or limit < 1):
        work.diagnostics.append(
            BadArgument(
                span=use.span,
                name="limit",
                reason="must be a whole number above 0",
                hint="write a number, or the name of a `param`",
            )
        )
        limit = 1
    part = ref.part
    if part is None or (part in ("train", "test") and prompts.split is not None):
        assert part is None or part == "train" or part == "test"
        return part, limit
    work.diagnostics.append(
        UnknownName(
            span=ref.span,
            kind="part",
            name=f"{prompts.name}.{part}",
            hint=suggest_split(prompts.name, prompts.span, ref.span)
            if prompts.split is None
            else f"the parts are `{prompts.name}.train` and `{prompts.name}.test`",
        )
    )
    return None, limit


def _rules_of(
    work: Statements, prompts: spec.Prompts | None, sources: Sequence[RunSide]
) -> dict[str | None, tuple[spec.Rule, ...]]:
    """Lower the rules once per source, which is the default run that patches read."""
    runs = [source.run for source in sources]
    rules = {run: _rules(work, prompts, run) for run in (runs[:1] or [None])}
    for run in runs[1:]:
        said = len(work.diagnostics)
        rules[run] = _rules(work, prompts, run)
        del work.diagnostics[said:]  # already reported for the first source
    return rules


def _rules(
    work: Statements, prompts: spec.Prompts | None, source: str | None
) -> tuple[spec.Rule, ...]:
    rules: list[spec.Rule] = []
    for rule, loops in work.rules:
        mark_names_used(rule, work)
        for lowered in lower_rules(rule, source, prompts, work):
            rules.append(lowered.model_copy(update={"loops": loops}))
    return tuple(rules)


def check_averaged_images(parts: Definitions, scope: Namespace) -> None:
    """Report blocks without a mean image for `image mean of BLOCK` (E0201, E0207)."""
    for block in parts.prompts.values():
        for name, node in block.named_images:
            for ref in averaged_blocks([node]):
                if scope.use("prompts", ref.name, ref.span):
                    _check_averaged(block, name, ref, parts, scope)


def _check_averaged(
    block: spec.Prompts, name: str, ref: ast.Ref, parts: Definitions, scope: Namespace
) -> None:
    """Check a mean image. name: the name of the image in prompts; empty for the row's."""
    other = parts.prompts[ref.name]
    reason, hint = "", "write a block of images: `image mean of scenes`"
    if other.kind != "images":
        reason = f"needs images, but `{other.name}` is a prompts block"
    elif averaged_block(other.image) is not None:
        reason = f"needs rows, but `{other.name}` is already a mean"
    elif ref.part is not None and not other.has_part(ref.part):
        halves = f"`{other.name}.train` and `{other.name}.test`"
        known = (
            f"there are {halves}" if other.split is not None else f"`{other.name}` has no `split`"
        )
        problem = UnknownName(span=ref.span, kind="part", name=ref.whole, hint=known)
        scope.diagnostics.append(problem)
        return
    elif any(region.image in ("", name) for region in block.regions):
        reason = "has no regions: their locations differ between its images"
        hint = "name patches instead of the region: `image row 1..2 col * tokens`"
    if reason:
        bad = BadArgument(span=ref.span, name=MEAN_IMAGE, reason=reason, hint=hint)
        scope.diagnostics.append(bad)


_LISTED = 1000
"""Maximum number of entries of a folder in which an import's file is searched for."""

_MANY = f"more than {limits.FILES} files are imported"


def _note_splits(automatic: Mapping[str, tuple[str, ...]], parts: Definitions) -> None:
    """Note the circuits that blocks are split for."""
    for block, circuits in automatic.items():
        if (prompts := parts.prompts.get(block)) is not None:
            parts.prompts[block] = prompts.model_copy(update={"split_for": circuits})


def _expand_circuits(
    tree: ast.File, scope: Namespace
) -> tuple[ast.File, frozenset[str], dict[str, tuple[str, ...]]]:
    """Return a file without `discover` and `search` whose trained circuits have rows for a test,
    the circuits and groups that are found, and those that blocks are split for."""
    tree, discovered, problems, scope.joined = expand_discoveries(tree)
    tree, groups, others = expand_searches(tree)
    scope.diagnostics.extend([*problems, *others])
    discovered |= groups
    tree, automatic = split_rows_of_circuits(tree, discovered)
    return tree, discovered, automatic


def lower_program(
    tree: ast.File,
    source: Source,
    words: RegisteredWords,
    settings: Mapping[str, str] | None = None,
    callables: Sequence[ast.Call] = (),
) -> tuple[spec.Program, list[Diagnostic]]:
    """Return the typed program of a file that was parsed with the same `words`; `settings` are the
    `--set k=v` of the command line, `callables` the definitions of functions passed from Python.

    Codes: E0108 for unsupported features, E02xx for names, imports and parameters, E0532 and E0535
    for imports that may not be read, E06xx for incomplete experiments, W0730 for unused names,
    W0780 for paths of an untrusted file.
    """
    scope, parts = Namespace(words), Definitions()
    tree, discovered, automatic = _expand_circuits(tree, scope)
    files = _with_imports(tree, source, scope)
    scope.derived = frozenset(run.name.id for run in derived_runs(tree))
    _parameters(files, parts, scope, settings or {})
    trees = [file for file, _ in files]
    if source.reach.reads is not None:
        scope.diagnostics.extend(warn_named_paths(trees, parts.parameters))
    _define_all(files, callables, parts, scope)
    _note_splits(automatic, parts)
    check_bases(trees, parts, scope)
    _mark_pools(files, scope)
    _refer_to_images(parts, scope)
    _directions_and_bases(files, parts, scope)
    lower_edits(trees, parts, scope)
    _lower_experiments(files, parts, scope, discovered)
    parts.experiments = add_run_order(tree, parts, scope)
    _warn_unused_names(tree, scope)
    whole = spec.Program(
        span=tree.span,
        files=tuple(path for file, _ in files if (path := file.span.source.path) is not None),
        sources=tuple(file.span.source for file, _ in files),
        models=parts.models,
        checkpoints=parts.checkpoints,
        edits=parts.edits,
        objectives=parts.objectives,
        masks=parts.masks,
        positions=parts.positions,
        prompts=parts.prompts,
        groups=parts.groups,
        circuits=parts.circuits,
        discovered=discovered,
        directions=parts.directions,
        bases=parts.bases,
        metrics=parts.metrics,
        parameters=parts.parameters,
        experiments=tuple(parts.experiments),
        rule_functions=tuple(parts.rule_functions),
        seed=parts.seed,
        lost=tuple(lost for file, _ in files for lost in file.lost),
        failed=_list_failed(parts, scope),
    )
    return split_by_seed(whole, scope), _without_missing_names(scope.diagnostics)


def _define_all(
    files: Sequence[tuple[ast.File, bool]],
    callables: Sequence[ast.Call],
    parts: Definitions,
    scope: Namespace,
) -> None:
    """Define all names before experiments: a file may use a name before its definition."""
    for call in callables:
        _define_callable(call, parts, scope)
    for file, imported in files:
        for statement in file.statements:
            _define(statement, imported, parts, scope)


def _list_failed(parts: Definitions, scope: Namespace) -> tuple[str, ...]:
    """List the directions and bases whose definitions have errors."""
    defined = parts.directions.keys() | parts.bases.keys()
    names = (*scope.names("direction"), *scope.names("basis"))
    return tuple(name for name in names if name not in defined)


def _mark_pools(files: Sequence[tuple[ast.File, bool]], scope: Namespace) -> None:
    """Mark the blocks that other blocks draw words from as used."""
    for file, _ in files:
        for name in pool_names(file):
            scope.has("prompts", name)


def _warn_unused_names(tree: ast.File, scope: Namespace) -> None:
    """Report W0730, unless an unsupported statement may be the only user of a name."""
    supported = not any(isinstance(d, NotSupported) for d in scope.diagnostics)
    if supported and any(isinstance(s, ast.ExperimentDef) for s in tree.statements):
        for name in scope.joined:
            scope.has("group", name)
        scope.warn_unused()
        scope.diagnostics.extend(warn_unused_block_names(tree))


def _lower_experiments(
    files: Sequence[tuple[ast.File, bool]],
    parts: Definitions,
    scope: Namespace,
    discovered: Collection[str],
) -> None:
    """Lower the experiments of files that aren't imported, and keep the first one of each name.

    discovered: circuits that experiments discover. Such an experiment may have the name of its
    circuit, which then means the circuit.
    """
    first: set[str] = set()
    for statement in (each for file, imported in files if not imported for each in file.statements):
        if isinstance(statement, ast.ExperimentDef):
            name = statement.name.id
            shared = name in discovered and name not in first
            is_new = shared or scope.define("experiment", statement.name, imported=False)
            first.add(name)
            experiments = lower_experiment(statement, parts, scope)
            if is_new:
                parts.experiments.extend(experiments)


def _without_missing_names(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Drop diagnostics of missing definitions if these may be in a file that can't be read."""
    if not any(isinstance(d, ImportFailed | ReadOutsideFolder | SpecialFile) for d in diagnostics):
        return diagnostics
    missing = (MissingLine, UnknownName, UnusedName)
    return [d for d in diagnostics if not isinstance(d, missing)]


def _import_failed(use: ast.Use, reason: str, hint: str) -> ImportFailed:
    """Report that the file of a `use` line can't be imported."""
    return ImportFailed(span=use.path.span, path=use.path.value, reason=reason, hint=hint)


def _with_imports(tree: ast.File, source: Source, scope: Namespace) -> list[tuple[ast.File, bool]]:
    """Return the file and everything it imports, imported files first, each once."""
    files: list[tuple[ast.File, bool]] = []
    done: set[Path] = set()
    diagnostics = scope.diagnostics

    def visit(file: ast.File, origin: Source, chain: tuple[Path, ...]) -> None:
        for statement in file.statements:
            if isinstance(statement, ast.Use):
                follow(statement, origin, chain)
        files.append((file, origin is not source))

    def follow(use: ast.Use, origin: Source, chain: tuple[Path, ...]) -> None:
        path, problems = path_to_read(USE_PATH, use.path.value, use.path.span)
        if path is None:
            diagnostics.extend(problems)
            return
        real = path.resolve()
        if real in chain:
            hint = "move the shared definitions into a third file"
            diagnostics.append(_import_failed(use, "it imports this file", hint))
            return
        if real in done:
            return
        if len(done) == limits.FILES:
            if not any(isinstance(d, ImportFailed) and d.reason == _MANY for d in diagnostics):
                hint = "merge some of the imported files"
                diagnostics.append(_import_failed(use, _MANY, hint))
            return
        done.add(real)
        imported, problems = read_source(path)
        if imported is None:
            diagnostics.append(_unreadable_import(use, path, problems[0]))
            return
        imported = replace(imported, reach=origin.reach)
        file, problems = parse(imported, scope.words)
        diagnostics.extend(problems)
        visit(file, imported, (*chain, real))

    start = (Path(os.path.realpath(source.path)),) if source.path is not None else ()
    visit(tree, source, start)
    return files


def _unreadable_import(use: ast.Use, path: Path, problem: Diagnostic) -> ImportFailed:
    written = use.path.value
    reason, hint = _why(problem), "paths are relative to the file that has the `use` line"
    if not path.exists() and not path.is_symlink():
        reason = "there is no such file"
        hint = _near_file(written, path) or hint
    return _import_failed(use, reason, hint)


def _near_file(written: str, path: Path) -> str:
    """Return a hint with the `.mech` file whose path or name is most similar, or an empty text."""
    if os.path.isabs(written):
        return ""
    origin = Path(os.path.normpath(str(path)[: -len(written)] or "."))
    folders = dict.fromkeys((path.parent, origin, origin / "common"))
    folders.update(dict.fromkeys(sorted(p for p in _entries(origin) if p.is_dir())))
    files = [p for folder in folders for p in _entries(folder) if p.suffix == ".mech"]
    names = {Path(os.path.relpath(p, origin)).as_posix(): p.name for p in files}
    same = [name for name, file in names.items() if file == path.name]
    near = closest_name(written, names) or next(iter(same), None)
    if near is None and (alike := closest_name(path.name, names.values())) is not None:
        near = next(name for name, file in names.items() if file == alike)
    return f"did you mean `{near}`?" if near else ""


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(islice(folder.iterdir(), _LISTED))
    except OSError:
        return []


def _why(problem: Diagnostic) -> str:
    """Return why a file can't be read, without its path, which the `use` line contains."""
    if isinstance(problem, NotMechFile):
        return "it is not a `.mech` file"
    return problem.reason if isinstance(problem, Unreadable | NotText) else problem.message


def _parameters(
    files: list[tuple[ast.File, bool]],
    parts: Definitions,
    scope: Namespace,
    settings: Mapping[str, str],
) -> None:
    """Define parameters before everything else, which may use them."""
    for file, imported in files:
        for statement in file.statements:
            if not isinstance(statement, ast.Param):
                continue
            value = constant_value(statement.value, parts.parameters)
            if value is None:
                scope.diagnostics.append(
                    BadArgument(
                        span=statement.value.span,
                        name=statement.name.id,
                        reason="must be a number, a text, or true or false",
                        hint="write a literal value: `param depth = 12`",
                    )
                )
                value = 0
            if scope.define("param", statement.name, imported=imported):
                parts.parameters[statement.name.id] = value
    for name, text in settings.items():
        _override(name, text, parts, scope.diagnostics)


def _override(name: str, text: str, parts: Definitions, diagnostics: list[Diagnostic]) -> None:
    """Apply `--set name=text`: only parameters can be set, to a value of the same type."""
    setting = f"{name}={text}"
    if name not in parts.parameters:
        known = name_list(parts.parameters)
        hint = did_you_mean(
            name,
            parts.parameters,
            f"parameters are {known}" if known else f"add `param {name} = …` to the file",
        )
        diagnostics.append(
            BadSetting(setting=setting, reason=f"the file has no parameter `{name}`", hint=hint)
        )
        return
    old = parts.parameters[name]
    if isinstance(old, str):
        parts.parameters[name] = text
        return
    expression = parse_setting(text)
    value = None if expression is None else constant_value(expression, {})
    if value is None or isinstance(value, str) or isinstance(value, bool) != isinstance(old, bool):
        wanted = "true or false" if isinstance(old, bool) else "a number"
        diagnostics.append(
            BadSetting(
                setting=setting,
                reason=f"`{name}` is {wanted}",
                hint=f"for example `--set {name}={str(old).lower()}`",
            )
        )
        return
    parts.parameters[name] = value


def _define_callable(call: ast.Call, parts: Definitions, scope: Namespace) -> None:
    source = call.span.source
    assert isinstance(source, CallableSource)
    name, is_metric = ast.Name(source.key, span=call.span), source.kind == "metrics"
    if not scope.define("metric" if is_metric else "rule", name, imported=False):
        return
    if is_metric:
        parts.metrics[name.id] = call
    else:
        parts.rule_functions[name.id] = call


def _define(statement: ast.TopLevel, imported: bool, parts: Definitions, scope: Namespace) -> None:
    match statement:
        case ast.ModelDef(name=name):
            model = lower_model(statement, parts, scope)
            if scope.define("model", name, imported=imported) and model is not None:
                define_model(model, parts, scope)
                if not model.is_loaded:
                    scope.has("model", name.id)  # `mechdsl export` writes it
        case ast.PromptsDef(name=name):
            if scope.define("prompts", name, imported=imported):
                parts.prompts[name.id] = lower_prompts(statement, scope, parts.parameters)
        case ast.MetricDef(name=name, value=value):
            given = parts.metrics.get(name.id)
            if given is not None and isinstance(given.span.source, CallableSource):
                return  # replaced by a metric from Python
            if scope.define("metric", name, imported=imported):
                parts.metrics[name.id] = value
        case ast.GroupDef(name=name, sites=sites):
            if scope.define("group", name, imported=imported):
                for used in number_names(sites):
                    scope.has("param", used)
                parts.groups[name.id] = spec.Group(span=statement.span, name=name.id, sites=sites)
        case ast.CircuitDef(name=name, edges=edges):
            if scope.define("circuit", name, imported=imported):
                if statement.source is not None:  # until its edges are known
                    of, to = (
                        ast.Site((ast.Name(each, span=name.span),), span=name.span)
                        for each in ("embed", "logits")
                    )
                    edges = (ast.SiteMap(of, to, span=name.span),)
                is_open = statement.source is not None
                circuit = spec.Circuit(
                    span=statement.span, name=name.id, edges=edges, is_open=is_open
                )
                parts.circuits[name.id] = circuit
        case ast.Seed(value=value):
            first = parts.seeded
            if first is not None and first.source is statement.span.source:
                scope.diagnostics.append(
                    RepeatedStatement(
                        span=statement.span,
                        what="seed",
                        block=first.source.name,
                        first=first.line,
                    )
                )
            parts.seed, parts.seeded = value, statement.span
        case _:
            pass


def _refer_to_images(parts: Definitions, scope: Namespace) -> None:
    """Check or join the blocks of images that prompts average, are scored with or contain."""
    check_averaged_images(parts, scope)
    for name, block in parts.prompts.items():
        _scored_with(block, parts, scope)
        if block.contains is not None:
            parts.prompts[name] = _join_images(block, block.contains, parts, scope)


def _scored_with(block: spec.Prompts, parts: Definitions, scope: Namespace) -> None:
    """Report invalid names of image blocks that texts are scored with (E0201, E0207)."""
    ref = block.scored_with
    if ref is None or not scope.use("prompts", ref.name, ref.span):
        return
    images = parts.prompts[ref.name]
    if ref.part is not None or images.kind != "images" or images.tiles is not None:
        reason = "is only part of a block" if ref.part is not None else "is not an images block"
        hint = "name a complete images block: `image from scenes`"
        if ref.part is None and images.tiles is not None:
            reason = "has several tiles per image, but a text is scored with one image"
            hint = "name a block without `tiles`, or score the tiles: `measure score(answer)`"
        name = ref.span.written
        scope.diagnostics.append(BadArgument(span=ref.span, name=name, reason=reason, hint=hint))


def _join_images(
    block: spec.Prompts, ref: ast.Ref, parts: Definitions, scope: Namespace
) -> spec.Prompts:
    """Add the rows of a block of images to the prompts that contain them (E0201, E0202, E0207)."""
    if not scope.use("prompts", ref.name, ref.span):
        return block.model_copy(update={"from_images": True})
    images = parts.prompts[ref.name]
    reason, hint = "", "name a complete images block: `image from scenes`"
    if ref.part is not None or images.kind != "images":
        reason = "is only part of a block" if ref.part is not None else "is not an images block"
    elif images.tiles is not None:
        reason, hint = "is cut into tiles", "name a block of whole images"
    elif averaged_block(images.image) is not None:
        reason, hint = "is a mean image", "write it in the prompts: `image photo = mean of scenes`"
    elif images.split is not None or images.classes is not None:
        line = "split" if images.split is not None else "classes"
        reason, hint = f"has a line `{line}`", f"move `{line}` to the prompts, or remove it"
    elif images.rows is not None and block.rows is not None:
        reason, hint = "has `rows`, and the prompts have others", "remove one of the two lines"
    if reason:
        name = ref.span.written
        scope.diagnostics.append(BadArgument(span=ref.span, name=name, reason=reason, hint=hint))
        return block.model_copy(update={"from_images": True})
    assert images.image is not None
    picture = spec.PictureDef(span=images.span, name=IMAGE_SPAN, value=images.image)
    names = {name for value in block.values for name in value.names}
    names |= {text.name for text in (*block.texts, *block.corruptions, *block.regions)}
    for name, first in _names_of(images):
        if name in names:
            line = line_reference(block.span, first)
            scope.diagnostics.append(DuplicateName(span=first, name=name, first=line))
    return block.model_copy(
        update={
            "pictures": (picture, *block.pictures),
            "rows": block.rows or images.rows,
            "distinct": block.distinct or images.distinct,
            "rename": (*images.rename, *block.rename),
            "where": (*images.where, *block.where),
            "values": (*images.values, *block.values),
            "regions": (*images.regions, *block.regions),
            "corruptions": (*images.corruptions, *block.corruptions),
        }
    )


def _names_of(images: spec.Prompts) -> Iterator[tuple[str, Span]]:
    """Yield the names that prompts get from a block of images."""
    for value in images.values:
        for name in value.names:
            yield name, value.span
    for region in (*images.regions, *images.corruptions):
        yield region.name, region.span


def _directions(files: list[tuple[ast.File, bool]], parts: Definitions, scope: Namespace) -> None:
    """Define directions last: they refer to blocks, models and one another in any order."""
    directions: list[ast.DirectionDef] = []
    for file, imported in files:
        for statement in file.statements:
            if isinstance(statement, ast.DirectionDef) and scope.define(
                "direction", statement.name, imported=imported
            ):
                directions.append(statement)
    for statement in directions:
        for part in walk(statement.site):
            if isinstance(part, ast.Name):
                _ = scope.has("group", part.id) or scope.has("param", part.id)
        for name in number_names((statement.site, statement.at)):
            scope.has("param", name)
        if not check_trained_direction(statement, parts, scope):
            continue
        direction = lower_direction(statement, parts, scope)
        if direction is not None:
            parts.directions[direction.name] = direction
    parts.directions = drop_circular_directions(parts.directions, scope)


def _directions_and_bases(
    files: list[tuple[ast.File, bool]], parts: Definitions, scope: Namespace
) -> None:
    """Define directions and bases after the blocks, metrics and models that they refer to."""
    bases = [
        statement
        for file, imported in files
        for statement in file.statements
        if isinstance(statement, ast.BasisDef)
        and scope.define(statement.word, statement.name, imported=imported)
    ]
    _directions(files, parts, scope)
    _bases(files, bases, parts, scope)
    lower_objectives(parts, scope)


def _saved_groups(files: list[tuple[ast.File, bool]], parts: Definitions, scope: Namespace) -> None:
    """Read the features of groups from files."""
    for file, _ in files:
        for statement in file.statements:
            if not isinstance(statement, ast.GroupDef) or statement.source is None:
                continue
            if statement.source.name != "saved":
                continue
            read = lower_saved_group(statement, parts, scope)
            if read is None or parts.groups[read.name].span is not statement.span:
                continue
            if read.at is None:
                parts.groups[read.name] = read
            else:
                parts.positions[read.name] = read
                del parts.groups[read.name]  # it names no sites


def _reject_listed_positions(parts: Definitions, scope: Namespace) -> None:
    """Report E0207 for groups of sites that list a group of positions; they then have no sites."""
    chosen = {mask.name for mask in parts.masks.values() if mask.chooses_positions}
    chosen |= parts.positions.keys()
    for group in list(parts.groups.values()):
        for site in group.sites:
            if site.bare is not None and site.bare.id in chosen:
                name, span = site.bare.id, site.bare.span
                reason = "chooses positions, not sites"
                hint = f"list sites only, and write `at {name} tokens` in the rule"
                problem = BadArgument(span=span, name=name, reason=reason, hint=hint)
                scope.diagnostics.append(problem)
                scope.has("group", name)
                parts.groups[group.name] = group.model_copy(update={"sites": ()})


def _is_defined(
    statement: ast.GroupDef | ast.CircuitDef, known: Mapping[str, spec.Group | spec.Circuit]
) -> bool:
    """Whether a name means what this statement defines; another definition may have the name."""
    own = known.get(statement.name.id)
    return own is not None and own.span is statement.span


def _bases(
    files: list[tuple[ast.File, bool]],
    bases: Sequence[ast.BasisDef],
    parts: Definitions,
    scope: Namespace,
) -> None:
    """Define bases, lenses, probes and trained groups, which may refer to any block.

    Args:
        bases: Bases, lenses and probes, whose names are defined.
    """
    for file, _ in files:
        for statement in file.statements:
            if isinstance(statement, ast.GroupDef) and statement.source is not None:
                if statement.source.name == "saved":
                    continue  # its layers are those of bases
                mask = lower_mask(statement, parts, scope)
                if mask is not None and _is_defined(statement, parts.groups):
                    parts.masks[mask.name] = mask
                    if mask.chooses_positions:
                        del parts.groups[mask.name]  # it names no sites
            if isinstance(statement, ast.CircuitDef) and statement.source is not None:
                if statement.source.name == "saved":
                    read = lower_saved_circuit(statement, parts, scope)
                    if read is not None and _is_defined(statement, parts.circuits):
                        parts.circuits[read.name] = read
                    continue
                mask = lower_circuit_mask(statement, parts, scope)
                if mask is not None and _is_defined(statement, parts.circuits):
                    parts.masks[mask.name] = mask
    for circuit in parts.circuits.values():
        for node in walk(circuit.edges):
            _ = isinstance(node, ast.Name) and scope.has("group", node.id)
            name = node.basis_name if isinstance(node, ast.Site) else None
            if name not in (None, ast.STANDARD_BASIS):
                scope.use("basis", name, node.span)
        for name in number_names(circuit.edges):
            scope.has("param", name)
    for statement in bases:
        for name in number_names((statement.site, statement.at)):
            scope.has("param", name)
        basis = lower_basis(statement, parts, scope)
        if basis is not None:
            parts.bases[basis.name] = basis
    _saved_groups(files, parts, scope)
    _reject_listed_positions(parts, scope)
    keep_decoders(parts, scope)
