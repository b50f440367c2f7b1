"""`observe` lines, and the results of an experiment that has them.

An experiment has one unnamed result: its measures and its unnamed `observe` line. A named
`observe` line has a result with separate axes; reports, expectations and other experiments refer
to it by that name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias, cast

from mechdsl.base.text import Source, Span, name_list
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.syntax import BadArgument, RepeatedStatement, UnknownName, UnknownWord
from mechdsl.program import spec
from mechdsl.program.references import (
    observation_axes,
    position_axes,
    resolve_expectation_results,
    site_axes,
)
from mechdsl.program.spec import whole_number_value
from mechdsl.program.statements import Statements, expand_metrics, resolve_run_name
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import rewrite, walk

if TYPE_CHECKING:
    from mechdsl.program.spec import Definitions


ObserveStatement: TypeAlias = ast.AnyObserve

FITTED_PROBE = "probe"
"""The observation that takes a value of the rows, or a probe of the file."""


@dataclass
class ResultSpec:
    """One result of an experiment."""

    observed: spec.Rule | None = None
    """The `observe` line of the result; None if it has only measures."""
    measures: list[spec.Measure] = field(default_factory=list[spec.Measure])
    own: bool = False
    """Whether the result is named after its observation, next to other results."""
    reports: list[spec.Report] = field(default_factory=list[spec.Report])
    expects: list[spec.Expectation] = field(default_factory=list[spec.Expectation])

    @property
    def name(self) -> str | None:
        """The name of the observation."""
        return None if self.observed is None else _lower_observed(self.observed).name

    @property
    def apart(self) -> bool:
        """Whether the observed run differs from the one that rules act on."""
        return self.observed is not None and self.observed.source is not None

    @property
    def effects(self) -> set[str]:
        """Effects of the measures."""
        return {measure.effect for measure in self.measures}

    @property
    def labels(self) -> set[str]:
        """Words that refer to this result."""
        return {measure.label for measure in self.measures} | {self.name or ""} - {""}


def _lower_observed(rule: spec.Rule) -> spec.ObservedQuantity:
    assert rule.observed is not None
    return rule.observed


# --- lines ----------------------------------------------------------------------------------------


def lower_observation(
    statement: ObserveStatement,
    loops: tuple[str, ...],
    prompts: spec.Prompts | None,
    work: Statements,
) -> spec.Rule:
    """Lower an `observe` line and define its name."""
    name = None if statement.name is None else statement.name.id
    if statement.name is not None:
        work.scope.define("observation", statement.name, imported=False)
    if isinstance(statement, ast.ObserveMaps):
        return _of_maps(statement, name, loops, work)
    source = None
    if statement.run is not None and prompts is not None:
        source = resolve_run_name(statement.run, prompts, work)
    if isinstance(statement, ast.ObserveAttention):
        return _of_attention(statement, source, name, loops, work)
    if isinstance(statement, ast.ObserveFeatures):
        return _of_features(statement, source, name, loops, prompts, work)
    called = statement.what
    top = _listed_count(statement, work)
    call = called if isinstance(called, ast.Call) else None
    word = called.id if isinstance(called, ast.Name) else called.name
    toward = statement.toward
    if toward is not None:
        toward = _toward(expand_metrics(toward, work.parts, work.scope))
    return spec.Rule(
        span=statement.span,
        verb="observe",
        site=statement.site,
        at=statement.at or _last_token(),
        onto=statement.other,
        receiver=_compared_with(statement.compared, prompts, work),
        source=source,
        observed=spec.ObservedQuantity(
            span=called.span,
            word=word,
            facts=work.scope.words.observation(word),
            name=name,
            call=call,
            basis=statement.site.basis_name,
            bases=_named_bases(call, work),
            toward=toward,
            top=top,
            placed=statement.at is not None,
        ),
        loops=loops,
    )


def _named_bases(call: ast.Call | None, work: Statements) -> tuple[str, ...]:
    """Return the bases, the lens or the probe that an observation names; E0201 for names of
    something else."""
    facts = None if call is None else work.scope.words.observation(call.name)
    if call is None or facts is None or not (facts.of_bases or facts.is_lens or facts.of_probes):
        return ()
    kind = "probe" if facts.of_probes else "lens" if facts.is_lens else "basis"
    values = [argument.value for argument in call.arguments if argument.name is None]
    named = [value for value in values if isinstance(value, ast.Name)]
    if kind == "lens":  # a parameter may be the path of a file
        named = [name for name in named if not work.scope.has("param", name.id)]
    if call.name == FITTED_PROBE:  # or a value of the rows
        named = [name for name in named if work.scope.has("probe", name.id)]
    return tuple(name.id for name in named if work.scope.use(kind, name.id, name.span))


def _listed_count(statement: ast.Observe | ast.ObserveFeatures, work: Statements) -> int | None:
    """Read the number after `top`; E0207 if it isn't a whole number above 0.

    A name after a word that the parser read as a misspelt `top` is reported there.
    """
    top = whole_number_value(statement.top, work.parts.parameters)
    misspelt = "top" not in statement.span.written.split()
    if isinstance(statement.top, str) and top is None and misspelt:
        return None
    if statement.top is not None and (top is None or top < 1):
        reason, hint = "must be a whole number above 0", "write `top 5`"
        problem = BadArgument(span=statement.span, name="top", reason=reason, hint=hint)
        work.diagnostics.append(problem)
    return top


def _of_attention(
    statement: ast.ObserveAttention,
    source: str | None,
    name: str | None,
    loops: tuple[str, ...],
    work: Statements,
) -> spec.Rule:
    edge, what = statement.edge, statement.by or statement.what
    word = "attention" if what is None else what.id
    return spec.Rule(
        span=statement.span,
        verb="observe",
        edge=edge,
        at=edge.queries,
        onto=edge.keys,
        source=source,
        observed=spec.ObservedQuantity(
            span=statement.span if what is None else what.span,
            word=word,
            facts=work.scope.words.observation(word),
            name=name,
            weights_attention=statement.by is not None,
        ),
        loops=loops,
    )


def _of_features(
    statement: ast.ObserveFeatures,
    source: str | None,
    name: str | None,
    loops: tuple[str, ...],
    prompts: spec.Prompts | None,
    work: Statements,
) -> spec.Rule:
    """Lower an `observe` line over the coordinates of a basis, at the site of the basis."""
    basis = work.parts.bases.get(statement.basis.id)
    ranked_by, argument = _ranking(statement.by, work)
    compared = None
    if ranked_by == "difference" and argument is not None and prompts is not None:
        compared = _compared_run(argument, prompts, work)
    return spec.Rule(
        span=statement.span,
        verb="observe",
        site=None if basis is None else basis.site,
        at=statement.at,
        receiver=compared,
        source=source,
        observed=spec.ObservedQuantity(
            span=statement.basis.span,
            word="features",
            facts=work.scope.words.observation("features"),
            name=name,
            top=_listed_count(statement, work),
            basis=statement.basis.id,
            ranked_by=ranked_by,
            column=argument if ranked_by == "correlation" else None,
        ),
        loops=loops,
    )


_RANKINGS: Mapping[str, str] = {
    "mean": "by mean",
    "difference": "by difference(fewer)",
    "correlation": "by correlation(count)",
}
"""What features are ranked by → an example."""


def _ranking(
    by: ast.Name | ast.Call | None, work: Statements
) -> tuple[spec.RankingQuantity, ast.Expr | None]:
    """Read what follows `by`, and its argument; E0203 or E0207 if it isn't valid."""
    if by is None:
        return "mean", None
    word = by.id if isinstance(by, ast.Name) else by.name
    if word not in _RANKINGS:
        hint = did_you_mean(word, _RANKINGS, f"write {name_list(_RANKINGS.values())}")
        problem = UnknownWord(span=by.span, kind="ranking of features", word=word, hint=hint)
        work.diagnostics.append(problem)
        return "mean", None
    ranked_by = cast("spec.RankingQuantity", word)
    given = by.arguments if isinstance(by, ast.Call) else ()
    argument = given[0].value if len(given) == 1 and given[0].name is None else None
    takes = 0 if ranked_by == "mean" else 1
    fits = len(given) == takes and (not takes or argument is not None)
    if ranked_by == "difference" and fits:
        fits = isinstance(argument, ast.Name)
    if not fits:
        reason = {
            "mean": "takes no arguments",
            "difference": "takes one run to compare with",
            "correlation": "takes one value of the rows",
        }[ranked_by]
        hint = f"write `{_RANKINGS[ranked_by]}`"
        problem = BadArgument(span=by.span, name=f"by {word}", reason=reason, hint=hint)
        work.diagnostics.append(problem)
        return "mean", None
    return ranked_by, cast("ast.Expr | None", argument)


def _compared_run(run: ast.Expr, prompts: spec.Prompts, work: Statements) -> ast.Site | None:
    """Return the name of a run as a site, like the runs after `with`; None after an error."""
    assert isinstance(run, ast.Name)
    name = resolve_run_name(ast.Ref(run.id, span=run.span), prompts, work)
    return None if name is None else ast.Site((replace(run, id=name),), span=run.span)


def _compared_with(
    site: ast.Site | None, prompts: spec.Prompts | None, work: Statements
) -> ast.Site | None:
    """Lower the part after `with`: a site or a run; a block of prompts means its run."""
    name = None if site is None else site.bare
    if site is None or prompts is None or name is None or name.id not in work.parts.prompts:
        return site
    run = resolve_run_name(ast.Ref(name.id, span=name.span), prompts, work)
    return site if run is None else replace(site, names=(replace(name, id=run),))


def _of_maps(
    statement: ast.ObserveMaps, name: str | None, loops: tuple[str, ...], work: Statements
) -> spec.Rule:
    """Lower an `observe` line over maps of other experiments."""
    share, region = statement.share, statement.region
    at = statement.at or _last_token()
    if isinstance(region, ast.Position):
        at = ast.Positions((region,), span=region.span)
    return spec.Rule(
        span=statement.span,
        verb="observe",
        at=at,
        observed=spec.ObservedQuantity(
            span=statement.what.span,
            word=statement.what.id,
            facts=work.scope.words.observation(statement.what.id),
            name=name,
            maps=statement.maps,
            region=None if region is None else region.span.written,
            in_tokens=isinstance(region, ast.Position),
            others=statement.others,
            share=None if share is None else share.value / 100,
            placed=statement.at is not None,
        ),
        loops=loops,
    )


def _last_token() -> ast.Positions:
    """Return the placeholder for a missing position; each observation decides if it needs one."""
    span = Span(Source("last token"), 0, len("last token"))
    point = ast.Point(ast.EdgeToken("last", span=span), span=span)
    return ast.Positions((ast.Position(point, span=span),), span=span)


# --- results --------------------------------------------------------------------------------------


def split_results(
    observed: Sequence[spec.Rule],
    measures: Sequence[spec.Measure],
    rules: Sequence[spec.Rule],
    work: Statements,
    parts: Definitions,
) -> list[ResultSpec]:
    """Return the results of an experiment, that of its measures first."""
    unnamed = [rule for rule in observed if _lower_observed(rule).name is None]
    _named_where_several(unnamed, work)
    names = {name for rule in observed if (name := _lower_observed(rule).name) is not None}
    by_name: dict[str, list[spec.Measure]] = {name: [] for name in names}
    plain: list[spec.Measure] = []
    for measure in measures:
        named = _names_in(measure.metric, names)
        if len(named) > 1:
            work.diagnostics.append(_of_two(measure, named))
        elif named:
            by_name[named[0]].append(measure.model_copy(update={"observed": True}))
        else:
            plain.append(measure)
    lenses = [rule for rule in observed if _lower_observed(rule).facts.is_lens]
    read = [measure.model_copy(update={"observed": True}) for measure in plain]
    plain = [] if lenses else plain
    results: list[ResultSpec] = []
    for rule in observed:
        name = _lower_observed(rule).name
        through = read if rule in lenses else []
        own = [*through, *(by_name[name] if name else ())]
        if not through:
            said = own if name else plain
            itself = any(isinstance(m.metric, ast.Name) and m.metric.id == name for m in own)
            automatic = _own_measures(rule, [*said, *own], parts)
            own = [*automatic[1 if itself else 0 :], *(_written_out(m, rule) for m in own)]
        results.append(ResultSpec(rule, own))
    _acts_elsewhere(observed, rules, plain, work)
    if len(results) == 1 and (not plain or results[0].name is None):
        results[0].measures += plain
        return results
    for part in results:
        part.own = part.name is not None
    first = [part for part in results if not part.own]
    if not first and plain:
        first = [ResultSpec()]
    for part in first[:1]:
        part.measures += plain
    return [*first, *(part for part in results if part.own)]


def _named_where_several(unnamed: Sequence[spec.Rule], work: Statements) -> None:
    """Report E0209 for a second line without a name to distinguish it from the first."""
    for rule in unnamed[1:]:
        work.diagnostics.append(
            RepeatedStatement(
                span=rule.span,
                what="observe",
                block=work.definition.name.id,
                first=unnamed[0].span.line,
                hint=(
                    "name each observation to get separate results: `observe … as "
                    f"{_lower_observed(rule).word}_2`"
                ),
            )
        )


def _names_in(metric: ast.Expr, names: Collection[str]) -> list[str]:
    every = (node.id for node in walk(metric) if isinstance(node, ast.Name))
    return list(dict.fromkeys(name for name in every if name in names))


def _of_two(measure: spec.Measure, named: Sequence[str]) -> BadArgument:
    return BadArgument(
        span=measure.span,
        name=measure.span.written,
        reason="combines two observations with different cells",
        hint=f"measure each separately: `measure {named[0]} as {measure.effect}`",
    )


def _own_measures(
    rule: spec.Rule, others: Sequence[spec.Measure], parts: Definitions
) -> list[spec.Measure]:
    """Return the measures of an observation: itself, labelled by its name or word (`observed WORD`
    if the file uses the word otherwise), followed by its controls."""
    said = _lower_observed(rule)
    taken = {*parts.metrics, *(measure.label for measure in others)}
    label = said.name or (f"observed {said.word}" if said.word in taken else said.word)
    metric: ast.Expr = ast.Name(said.word, span=rule.span)
    if said.toward is not None and not said.facts.has_graph:
        metric = said.toward
    own = spec.Measure(
        span=rule.span,
        label=label,
        metric=metric,
        effect="raw",
        effect_span=rule.span,
        observed=True,
    )
    return [
        own,
        *(
            own.model_copy(
                update={"label": f"{label} {word}", "metric": ast.Name(word, span=rule.span)}
            )
            for word in said.facts.controls
        ),
    ]


def _written_out(measure: spec.Measure, rule: spec.Rule) -> spec.Measure:
    """Replace the measure's logits by those of the observation's `toward` clause."""
    said = _lower_observed(rule)
    toward = None if said.facts.has_graph else said.toward

    def change(node: ast.Node) -> ast.Node:
        own = isinstance(node, ast.Name) and node.id == said.name
        return toward if own and toward is not None else node

    return measure.model_copy(update={"metric": rewrite(measure.metric, change)})


def _toward(expression: ast.Expr) -> ast.Expr:
    """Convert `answer - wrong` to logits: `logit(answer) - logit(wrong)`."""
    match expression:
        case ast.Negative():
            return replace(expression, operand=_toward(expression.operand))
        case ast.Binary():
            left, right = _toward(expression.left), _toward(expression.right)
            return replace(expression, left=left, right=right)
        case ast.Name() | ast.String() | ast.QualifiedRef():
            argument = ast.Argument(None, expression, span=expression.span)
            return ast.Call("logit", (argument,), span=expression.span)
        case _:
            return expression


def _acts_elsewhere(
    observed: Sequence[spec.Rule],
    rules: Sequence[spec.Rule],
    plain: Sequence[spec.Measure],
    work: Statements,
) -> None:
    """Report E0207 for an unnamed observation of a run that the rules don't act on, if nothing
    measures the rules' run, or if measures would read the observed run."""
    alone = len(observed) == 1 and observed[0].source is not None
    unnamed = [
        rule for rule in observed if rule.source is not None and _lower_observed(rule).name is None
    ]
    if alone and rules and not plain:
        reason = "is not the run that the rules act on, and nothing measures that run"
        hint = "remove it, or define a separate run with the rules"
    elif unnamed and (plain or rules):
        reason = "is not the measured run"
        hint = "name the observation to get a separate result: `… as seen`"
    else:
        return
    rule = observed[0] if alone else unnamed[0]
    named = f"of {rule.source}"
    work.diagnostics.append(BadArgument(span=rule.span, name=named, reason=reason, hint=hint))


# --- assignment of reports and expectations -------------------------------------------------------


def assign_reports(
    parts: Sequence[ResultSpec],
    reports: Sequence[spec.Report],
    expects: Sequence[spec.Expectation],
    rules: Sequence[spec.Rule],
    work: Statements,
) -> None:
    """Assign reports and expectations to results; a report without an observation goes to all
    results that have its axes."""
    names = {part.name: part for part in parts if part.name is not None}
    for report in reports:
        if report.of is None:
            asked = {word for word in (report.variable, report.by) if word is not None}
            fit = [part for part in parts if asked <= _axes(part, rules)]
            for part in fit or parts[:1]:
                part.reports.append(report)
        elif report.of in names:
            names[report.of].reports.append(report)
        elif f"of {report.of}" in report.span.written:  # otherwise `of` replaces an invalid word
            listed = name_list(names)
            hint = f"the experiment has {listed}" if listed else "remove `of …`"
            hint = did_you_mean(report.of, names, hint)
            problem = UnknownName(span=report.span, kind="observation", name=report.of, hint=hint)
            work.diagnostics.append(problem)
    called = {id(part): work.definition.name.id for part in parts}
    called.update({id(part): f"{called[id(part)]}.{part.name}" for part in parts if part.own})
    for expect in expects:
        result = _result_of(expect, parts)
        words = [(word, part) for part in parts for word in part.labels | part.effects]
        count = Counter(word for word, _ in words)
        elsewhere = {word: called[id(part)] for word, part in words if count[word] == 1}
        result.expects.append(
            resolve_expectation_results(expect, elsewhere, result.labels | result.effects)
        )


def _axes(part: ResultSpec, rules: Sequence[spec.Rule]) -> set[str]:
    """Return the words by which reports may refer to a result's axes."""
    acting = [] if part.apart else rules
    every = [*acting, *([] if part.observed is None else [part.observed])]
    axes: set[str] = {"prompts", "model", "source", "base"}
    for rule in every:
        axes.update(site_axes(rule.site), site_axes(rule.edge), position_axes(rule), rule.loops)
        axes.update(f"to_{name}" for name in site_axes(rule.receiver))
        if rule.into_layer is not None:
            axes.add("to_layer")
        if rule.observed is not None:
            axes.update(observation_axes(rule.observed))
    return axes


def _result_of(expect: spec.Expectation, parts: Sequence[ResultSpec]) -> ResultSpec:
    """Return the first result whose measures, or else effects, match; or the first of all."""
    words = list(_words(expect))
    for of_part in (lambda part: part.labels, lambda part: part.effects):
        for word in words:
            fit = [part for part in parts if word in of_part(part)]
            if fit:
                return fit[0]
    return parts[0]


def _words(expect: spec.Expectation) -> Iterator[str]:
    for node in walk(expect.condition):
        yield node.span.written
        match node:
            case ast.Name(id=name) | ast.Call(name=name):
                yield name
            case ast.QualifiedRef():
                yield node.of.name
            case _:
                pass
