"""What can't be estimated from gradients: E0608, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e06_experiment import NOTHING_WRITTEN, NoEstimate
from mechdsl.program import spec
from mechdsl.prompts.position_hits import lies_behind
from mechdsl.prompts.prompt_table import PositionCell
from mechdsl.resolve.resolved import ResolvedExperiment, ResolvedMeasure
from mechdsl.resolve.resolved_rule import PositionTargets, ResolvedRule
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk
from mechdsl.vocab.sites import WITHIN_ATTENTION

VERBS = ("patch", "ablate")
"""Rules whose vectors are known from unpatched runs, at one site."""
WITHOUT_GRADIENT = (*WITHIN_ATTENTION, "router", "expert_out", "logits")
PLAIN = "write `patch SITE at POSITIONS` or `ablate SITE at POSITIONS with zero`"
EDGES = "write `block attention layer * heads * from QUERIES to KEYS`"
RUN_IT = "leave `using` out, so that each cell is run"
FLAT_UNITS = ("rank", "share")
"""Of metrics that jump and are level in between."""
_LEAST = ("kl", "js", "cosine")
"""Metrics that are least or greatest where a run is compared with itself."""


def not_estimated(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """All that `using` doesn't go with."""
    said = experiment.spec.estimator
    if said is None:
        return []
    found = [*_of_experiment(experiment, said), *_of_rules(experiment, said)]
    return [*found, *_of_measures(experiment, said)]


def _refused(said: spec.Estimator, span: Span, what: str, reason: str, hint: str) -> Diagnostic:
    return NoEstimate(span=span, using=said.name, what=what, reason=reason, hint=hint)


def _of_experiment(experiment: ResolvedExperiment, said: spec.Estimator) -> Iterator[Diagnostic]:
    own = experiment.spec
    if own.against is not None:
        reason = "random targets would have to be estimated too"
        yield _refused(said, own.against.span, "`against`", reason, "leave `against` out")
    if own.generation is not None:
        span, reason = own.generation.span, "a token that is chosen has no gradient"
        yield _refused(said, span, "what rows write", reason, RUN_IT)
    if experiment.derived:
        what = f"an experiment with the run `{next(iter(experiment.derived))}`"
        span = own.derived[0].span
        yield _refused(said, span, what, "it has rules itself", RUN_IT)


def _of_rules(experiment: ResolvedExperiment, said: spec.Estimator) -> Iterator[Diagnostic]:
    rules = experiment.rules
    if not rules:
        what = "an experiment without a rule"
        hint = EDGES if said.name == spec.ATTENTION else PLAIN
        yield _refused(said, said.span, what, NOTHING_WRITTEN, hint)
    for rule in rules:
        found = next(_of_rule(rule, experiment, said), None)
        if found is not None:
            yield found
            return
    second = next((rule for rule in rules[1:] if rule.only is None), None)
    if second is not None:
        what, reason = "several rules together", "a gradient is of one site of one layer"
        yield _refused(said, second.spec.span, what, reason, "write an experiment for each rule")


def _of_rule(
    rule: ResolvedRule, experiment: ResolvedExperiment, said: spec.Estimator
) -> Iterator[Diagnostic]:
    """What is wrong with a rule, the first thing first."""
    own = rule.spec
    verb = own.verb if own.observed is None else f"observe {own.observed.word}"
    if said.name == spec.ATTENTION:
        yield from _of_edges(rule, verb, experiment, said)
        return
    if own.verb not in VERBS or rule.path is not None or rule.does.changes != "sites":
        reason = "what is written must be a vector of an unpatched run, or zero"
        hint = f"write `using {spec.ATTENTION}`" if verb == "block" else PLAIN
        yield _refused(said, own.span, f"`{verb}`", reason, hint)
        return
    assert rule.sites is not None
    assert own.site is not None
    site = own.site
    points = [here for here in rule.sites.points.values() if here]
    flat = sorted({p.site for here in points for p in here} & {*WITHOUT_GRADIENT})
    if flat:
        reason = "gradients aren't taken there"
        yield _refused(said, site.span, f"`{flat[0]}`", reason, RUN_IT)
    if any(len({(p.site, p.layer) for p in here}) > 1 for here in points):
        what, reason = "several layers together", "a gradient is of one site of one layer"
        hint = "sweep the layers: `layer *`, or `for l in 0..5`"
        yield _refused(said, site.span, what, reason, hint)
    if said.name == spec.INTEGRATED:
        yield from _together(rule, said)
    yield from _of_answers(rule.positions, own.at.span, experiment, said)


def _of_edges(
    rule: ResolvedRule, verb: str, experiment: ResolvedExperiment, said: spec.Estimator
) -> Iterator[Diagnostic]:
    """The same of weights of attention."""
    own = rule.spec
    if own.verb != "block":
        reason = "its gradients are by weights of attention"
        yield _refused(said, own.span, f"`{verb}`", reason, EDGES)
        return
    assert rule.edge is not None
    assert own.onto is not None
    yield from _of_answers(rule.positions, own.at.span, experiment, said)
    yield from _of_answers(rule.edge.keys, own.onto.span, experiment, said)


def _of_answers(
    positions: PositionTargets, span: Span, experiment: ResolvedExperiment, said: spec.Estimator
) -> Iterator[Diagnostic]:
    rows = experiment.table.runs[experiment.spec.base].rows
    if any(lies_behind(cell, rows) for cell in positions.written.values()):
        what, reason = "tokens of the answer", "they stand behind the prompt"
        hint = "name tokens of the prompt, or leave `using` out"
        yield _refused(said, span, what, reason, hint)


def _together(rule: ResolvedRule, said: spec.Estimator) -> Iterator[Diagnostic]:
    """All cells of a site move together, so each vector has one value."""
    reason = "all cells of a site move together, so each vector must have one value"
    hint = "write `using gradient_input`, which takes each cell by itself"
    own = rule.spec
    for part, word in ((own.into_layer, "into layer"), (own.onto, "onto")):
        if part is not None:
            yield _refused(said, part.span, f"`{word}`", reason, hint)
    if _overlap(list(rule.positions.written.values())):
        yield _refused(said, own.at.span, "positions that overlap", reason, hint)


def _overlap(cells: list[PositionCell]) -> bool:
    """Whether a token of a row is in two cells."""
    for row in zip(*(cell.hits for cell in cells), strict=True):
        tokens = [{token for run in hits for token in run} for hits in row]
        if sum(map(len, tokens)) > len(set[int]().union(*tokens)):
            return True
    return False


def _of_measures(experiment: ResolvedExperiment, said: spec.Estimator) -> Iterator[Diagnostic]:
    for measure, own in zip(experiment.measures, experiment.spec.measures, strict=True):
        raw = own.effect == "raw"
        if raw != (said.name in spec.NO_EFFECTS):
            what = f"`{measure.label} as {own.effect}`"
            reason = "it gives the size of the gradient, which is no effect of a write"
            hint = "measure `as raw`, or write `using gradient_input`"
            if said.name == spec.ATTENTION:
                reason = "it gives gradient × attention, which is no effect of a block"
                hint = "measure `as raw`, or leave `using` out, so that each cell is run"
            if raw:
                reason = "no patched run is measured"
                hint = "measure `as delta`, `as recovery` or `as relative`"
            yield _refused(said, own.effect_span, what, reason, hint)
        flat = _without_gradient(measure, experiment, said)
        if flat is not None:
            text, reason, hint = flat
            yield _refused(said, own.metric.span, f"`{text}`", reason, hint)


def _without_gradient(
    measure: ResolvedMeasure, experiment: ResolvedExperiment, said: spec.Estimator
) -> tuple[str, str, str] | None:
    """The part of a measure that has no gradient, why, and what to write."""
    hint = "measure a logit, a probability or a difference of logits"
    for node in walk(measure.expression):
        if isinstance(node, ast.Compare | ast.Logical | ast.Not):
            return node.span.written, "a condition has no gradient", hint
    for atom in measure.atoms:
        text = atom.node.span.written
        if atom.python is not None or atom.form.takes == "rows":
            return text, "a function of Python is given numbers, without gradients", hint
        if atom.form.takes == "reply":
            return text, "a text has no gradient", hint
        if atom.form.kind == "category" or atom.form.unit in FLAT_UNITS:
            return text, "it jumps, and its gradient is 0 in between", hint
        if atom.point is not None and atom.point.site in WITHOUT_GRADIENT:
            return text, f"gradients of `{atom.point.site}` aren't taken", hint
        at_base = atom.run == experiment.spec.base and atom.name in _LEAST
        if at_base and said.name != spec.INTEGRATED:
            reason = f"it is compared with `{atom.run}`, where its gradient is 0"
            return text, reason, "compare with another run, or write `using integrated_gradients`"
    return None
