"""An `experiment` block as typed data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mechdsl.base.registry import nearest
from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.e02_names import BadArgument, MissingLine, UnknownName
from mechdsl.diagnostics.e06_experiment import NoMeasure
from mechdsl.program import spec
from mechdsl.program.constants import whole_number
from mechdsl.program.lower_controls import lower_control
from mechdsl.program.lower_derived_runs import derived_runs
from mechdsl.program.lower_estimator import lower_estimator
from mechdsl.program.lower_generation import (
    SHOW_REPLIES,
    length_of_replies,
    lower_generation,
    lower_replies,
)
from mechdsl.program.lower_measures import (
    each_once,
    expand_metrics,
    lower_expectation,
    lower_measure,
    lower_report,
    lower_statistics,
    told_apart,
)
from mechdsl.program.lower_other_runs import (
    BLOCKS,
    RunSide,
    Variant,
    in_model,
    labels_of_block,
    models_of,
    named_once,
    sides,
    variants,
)
from mechdsl.program.lower_prompts import CLEAN
from mechdsl.program.lower_rules import lower_rules
from mechdsl.program.lower_saves import lower_saves, one_file
from mechdsl.program.namespace import Namespace
from mechdsl.program.numbers_in_measures import names_counted
from mechdsl.program.observations import (
    Part,
    Statement,
    deal_out,
    lower_observation,
    parts_of,
)
from mechdsl.program.sort_statements import Statements, use_names
from mechdsl.syntax import ast
from mechdsl.syntax.verbs import WEIGHTS

if TYPE_CHECKING:
    from mechdsl.program.definitions import Definitions


def lower_experiment(
    definition: ast.ExperimentDef, parts: Definitions, scope: Namespace
) -> tuple[spec.Experiment, ...]:
    """The typed experiment, or one for each combination of what it compares. After an error it is
    `broken`: checked for what else is wrong with it, and not run. None where it has no prompts, or
    something that can't be executed yet. The reasons are in the scope."""
    found: dict[str, list[spec.Experiment]] = {}
    number, blocks = 0, 1
    while number < blocks:
        said = list(scope.diagnostics)
        work = Statements(definition, parts, scope)
        work.collect(definition.statements)
        blocks = len(work.prompts[0].prompts) if work.prompts else 1
        for each in _on_block(work, number):
            found.setdefault(each.name, []).append(each)
        # What is wrong on every block is said once.
        scope.diagnostics[:] = said + [
            d for d in scope.diagnostics[len(said) :] if not number or d not in said
        ]
        number += 1
    return tuple(each for variants in found.values() for each in variants)


def _on_block(work: Statements, number: int) -> tuple[spec.Experiment, ...]:
    """The experiment on one of the blocks that its `prompts` line names."""
    definition, parts, scope = work.definition, work.parts, work.scope
    before = len([d for d in scope.diagnostics if d.severity == "error"])
    use = work.prompts[0].prompts[number] if work.prompts else None
    prompts = _prompts(work, use)
    derived = () if prompts is None else derived_runs(work, prompts)
    sources, bases = ([], []) if prompts is None else sides(work, prompts)
    models = models_of(work, bases)
    rules = _rules_of(work, prompts, sources)
    observed = [_observation(line, loops, prompts, work) for line, loops in work.observed]
    measures = tuple(lower_measure(m, parts, scope) for m in work.measures)
    saves = () if prompts is None else lower_saves(work, prompts)
    if not measures and not observed and _shows_replies(work):
        measures = (lower_measure(length_of_replies(work.generate[0]), parts, scope),)
    if not measures and not observed and not work.saves and not work.unsupported:
        scope.diagnostics.append(_measures_nothing(work))
    statistics = lower_statistics(work)
    against = lower_control(work)
    generation, replies = lower_generation(work), lower_replies(work)
    estimator = lower_estimator(work)
    expects = tuple(lower_expectation(e, work) for e in work.expects)
    acting = next(iter(rules.values()))
    results = parts_of(observed, told_apart(measures), acting, work, parts) or [Part()]
    for part in results:
        each_once(part.measures, work)
    combined = [] if prompts is None else variants(models, sources, bases, prompts, work, use)
    if work.unsupported or prompts is None:
        return ()
    one_file(work, [variant.labels for variant in combined])
    deal_out(results, [lower_report(r, work) for r in work.reports], expects, acting, work)
    part, limit = _rows(work, prompts, use)
    broken = before != len([d for d in scope.diagnostics if d.severity == "error"])
    if not combined:  # which has been refused
        source, base = (ends[0].run if ends else None for ends in (sources, bases))
        combined = [Variant("", source, base or CLEAN, labels_of_block(use, work), source)]
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
        statistics=statistics,
        against=against,
        estimator=estimator,
        generation=generation,
    )
    saving = next((each for each in results if not each.own and not each.apart), results[0])
    return tuple(
        _part(
            _variant(whole, each, rules[each.reads], derived, work),
            part,
            several=len(results) > 1,
            saves=part is saving,
        )
        for part in results
        for each in (_without_sides(combined) if part.apart else combined)
    )


def _part(
    experiment: spec.Experiment, part: Part, *, several: bool, saves: bool
) -> spec.Experiment:
    """One result of the experiment; one of them `saves` what it keeps."""
    rules, seen = experiment.rules, part.observed
    changed: dict[str, object] = {}
    if seen is not None and seen.source is not None:
        rules = ()
        changed.update(source=None, base=seen.source)
        seen = seen.model_copy(update={"source": None})
    if seen is not None:
        rules = tuple(sorted((*rules, seen), key=lambda rule: rule.span.start))
    if several:
        changed["within"] = experiment.name
        changed["name"] = f"{experiment.name}.{part.name}" if part.own else experiment.name
        named = {name for rule in rules for name in rule.loops}
        named = named.union(*map(names_counted, part.measures))
        changed["loops"] = tuple(loop for loop in experiment.loops if loop.name in named)
    if not saves:
        changed["saves"] = ()
    elif part.apart:  # `save` without a run is of the base run that the file says
        own = (
            each.model_copy(update={"run": each.run or experiment.base})
            for each in experiment.saves
        )
        changed["saves"] = tuple(own)
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
    """Whether what is written is all that is asked for."""
    kinds = {report.kind.id for report in work.reports}
    return bool(work.generate) and bool(kinds) and kinds <= SHOW_REPLIES


def _measures_nothing(work: Statements) -> NoMeasure:
    name = work.definition.name
    if not work.generate:
        return NoMeasure(span=name.span, experiment=name.id)
    hint = "add `report texts` alone to see what is written, or what to read of it, for example "
    return NoMeasure(span=name.span, experiment=name.id, hint=f"{hint}`measure length as raw`")


def _without_sides(combined: Sequence[Variant]) -> list[Variant]:
    """One variant per model: what is read is another run than those of `from … into …`."""
    found: dict[str, Variant] = {}
    for each in combined:
        labels = tuple(label for label in each.labels if label[0] in (BLOCKS, "model"))
        found.setdefault(each.model, replace(each, labels=labels))
    return list(found.values())


def _observation(
    line: Statement,
    loops: tuple[str, ...],
    prompts: spec.Prompts | None,
    work: Statements,
) -> spec.Rule:
    use_names(line, work)
    return lower_observation(line, loops, prompts, work)


def _variant(
    whole: spec.Experiment,
    variant: Variant,
    rules: tuple[spec.Rule, ...],
    derived: tuple[spec.DerivedRun, ...],
    work: Statements,
) -> spec.Experiment:
    return whole.model_copy(
        update={
            "variant": variant.labels,
            "model": variant.model,
            "source": variant.source,
            "base": variant.base,
            **in_model(variant, rules, derived, work),
        }
    )


def _prompts(work: Statements, ref: ast.Ref | None) -> spec.Prompts | None:
    """The block that the experiment runs on; after an error that which is most likely meant."""
    known = work.scope.names("prompts")
    if ref is None and _of_weights(work):
        return work.parts.prompts.setdefault(spec.NO_PROMPTS, _no_prompts())
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
    named_once([(each.span.written, each.span) for each in use.prompts], work)
    name = ref.name
    if not work.scope.use("prompts", name, ref.span):
        name = nearest(name, known) or ""
    found = work.parts.prompts.get(name)
    if found is not None and found.kind != use.kind:
        reason, hint = f"is a block of {found.kind}", f"write `{found.kind} {name}`"
        work.diagnostics.append(BadArgument(span=ref.span, name=name, reason=reason, hint=hint))
    first = work.parts.prompts.get(use.prompts[0].name)
    if found is not None and first is not None and (found.tiles is None) != (first.tiles is None):
        kinds = ("whole images", "tiles")
        own, others = kinds if first.tiles is not None else kinds[::-1]
        reason = f"is of {own}, and `{first.name}` of {others}"
        hint = "write the same `tiles` in both blocks"
        work.diagnostics.append(BadArgument(span=ref.span, name=name, reason=reason, hint=hint))
    return found


def _of_weights(work: Statements) -> bool:
    """Whether it looks at weights and does nothing else, so that it needs no prompts."""
    other = (work.measures, work.rules, work.from_into, work.keep, work.saves, work.derived,
             work.generate)  # fmt: skip
    lines = [line for line, _ in work.observed if isinstance(line, ast.Observe)]
    words = {each.what.id if isinstance(each.what, ast.Name) else each.what.name for each in lines}
    free = all(line.toward is None and line.run is None for line in lines)
    return len(lines) == len(work.observed) > 0 and words <= WEIGHTS and free and not any(other)


def _no_prompts() -> spec.Prompts:
    """What stands in for a block: one short text, which nothing hangs on."""
    text = spec.NO_TEXT
    span = Span(Source(text), 0, len(text))
    return spec.Prompts(span=span, name=spec.NO_PROMPTS, templates=(ast.String(text, span=span),))


def _rows(
    work: Statements, prompts: spec.Prompts, ref: ast.Ref | None
) -> tuple[Literal["train", "test"] | None, int | None]:
    """The part of the block and how many of its rows, as the `prompts` line says."""
    if ref is None:
        return None, None
    use = work.prompts[0]
    limit = whole_number(use.limit, work.parts.parameters)
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
            hint=f"add `split 50%` to `prompts {prompts.name}`: it makes "
            f"`{prompts.name}.train` and `{prompts.name}.test`"
            if prompts.split is None
            else f"the parts are `{prompts.name}.train` and `{prompts.name}.test`",
        )
    )
    return None, limit


def _rules_of(
    work: Statements, prompts: spec.Prompts | None, sources: Sequence[RunSide]
) -> dict[str | None, tuple[spec.Rule, ...]]:
    """The rules for every source, which patches read unless they say another."""
    runs = [source.run for source in sources]
    found = {run: _rules(work, prompts, run) for run in (runs[:1] or [None])}
    for run in runs[1:]:
        said = len(work.diagnostics)
        found[run] = _rules(work, prompts, run)
        del work.diagnostics[said:]  # it was said of the first one
    return found


def _rules(
    work: Statements, prompts: spec.Prompts | None, source: str | None
) -> tuple[spec.Rule, ...]:
    found: list[spec.Rule] = []
    for rule, loops in work.rules:
        use_names(rule, work)
        for lowered in lower_rules(rule, source, prompts, work):
            found.append(lowered.model_copy(update={"loops": loops}))
    return tuple(found)
