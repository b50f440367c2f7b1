"""The graph of a file: which nodes its experiments need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechdsl.base.plural import plural
from mechdsl.graph.nodes import (
    DirectionNode,
    EffectNode,
    EncodeNode,
    ExpectNode,
    ForwardNode,
    Graph,
    MeasureNode,
    Node,
    ReadNode,
    ReplyNode,
    ReportNode,
    TransformNode,
    WriteNode,
    graph_of,
)
from mechdsl.program import spec
from mechdsl.resolve.direction_types import DirectionTargets, fits_of
from mechdsl.resolve.resolved import DRAW, ResolvedExperiment, ResolvedMeasure
from mechdsl.resolve.resolved_rule import ResolvedRule
from mechdsl.vocab.effects import EFFECTS


def build(experiments: Sequence[ResolvedExperiment]) -> Graph:
    """The graph of a file's experiments."""
    known: dict[str, tuple[EffectNode, ...]] = {}

    def effects(experiment: ResolvedExperiment) -> tuple[EffectNode, ...]:
        if experiment.key not in known:
            named = [e for e in experiments if e.name in experiment.spec.after]
            after = tuple(first for e in named for first in effects(e)[:1])
            acting = patched(experiment, after)
            pairs = zip(experiment.spec.measures, experiment.measures, strict=True)
            known[experiment.key] = tuple(
                _effect(experiment, acting, measure, resolved) for measure, resolved in pairs
            )
        return known[experiment.key]

    return graph_of([leaf for each in experiments for leaf in _leaves(each, effects(each))])


def _leaves(experiment: ResolvedExperiment, effects: tuple[EffectNode, ...]) -> list[Node]:
    key = experiment.key
    reports = experiment.spec.reports or (spec.Report(span=experiment.spec.span, kind="table"),)
    accuracies = tuple(
        MeasureNode(
            unpatched(experiment, run), "correct", _unsaid(experiment, correct), measure=correct
        )
        for run, correct in experiment.accuracies.items()
    )
    leaves: list[Node] = [
        ReportNode(key, effects, report_text(each), experiment) for each in reports
    ]
    leaves.extend(
        ExpectNode(key, effects, accuracies, each.text, experiment)
        for each in experiment.spec.expects
    )
    return leaves


def report_text(report: spec.Report) -> str:
    words = [report.kind, report.variable or ""]
    words.append(f"by {report.by}" if report.by else "")
    words.append(f"top {report.top}" if report.top else "")
    return " ".join(word for word in words if word)


def unpatched(experiment: ResolvedExperiment, run: str) -> ForwardNode:
    """A run without interventions of the experiment; a noised run writes its noise, one that has
    rules what these say."""
    there = experiment.table.runs[run]
    if there.derived is not None:
        return _derived(experiment, run, unpatched(experiment, there.derived.base))
    noise = there.noise
    writes: tuple[WriteNode, ...] = ()
    if noise is not None:
        amount = f"{noise.sds:g} sd" if noise.sds is not None else f"{noise.std:g}"
        value = TransformNode("noise", detail=f"{amount}, {plural(noise.samples, 'draw')}")
        writes = (WriteNode(noise, "where the corruption says", value),)
    text = run
    if there.model is not None:
        text = "clean"
    elif noise is not None:
        text = there.prompts or "clean"
    s = experiment.spec
    keep = tuple(measure.text for measure in experiment.keep)
    behind, changed_by = experiment.table.behind, experiment.table.changed_by
    encode = EncodeNode(
        *(s.prompts, s.part, s.limit, keep, text, behind, changed_by), kept_by=experiment.keep
    )
    # Models that are patched into each other have the same number of layers.
    model, n_layers = there.model or experiment.model.key, experiment.model.shape.n_layers
    return ForwardNode(model, n_layers, encode, run, writes)


def _derived(experiment: ResolvedExperiment, run: str, base: ForwardNode) -> ForwardNode:
    """A run of the experiment's own: its rules on another run."""
    defined = experiment.derived[run]
    writes = tuple(_write(experiment, rule) for rule in defined.rules)
    return replace(base, run=run, writes=writes, on=base)


def patched(experiment: ResolvedExperiment, after: tuple[EffectNode, ...] = ()) -> ForwardNode:
    """The pass with all rules of the experiment; without rules, the base run itself.

    after: the effects that say where it acts.
    """
    base = unpatched(experiment, experiment.spec.base)
    if not experiment.rules:
        return base
    rules = experiment.rules
    replacing = next((rule for rule in rules if rule.does.changes == "input"), None)
    acting = [r for r in rules if r.sites is not None and r.does.changes != "nothing"]
    writes = tuple(_write(experiment, rule) for rule in acting)
    replaced = None if replacing is None else _at(replacing)
    has_rules = experiment.table.runs[base.run].derived is not None
    return ForwardNode(
        experiment.model.key,
        base.n_layers,
        replace(base.encode, replaced=replaced, replaced_by=replacing),
        base.run,
        writes if has_rules else base.writes + writes,
        experiment.axes,
        experiment.nested,
        after=after,
        estimator="" if experiment.spec.estimator is None else experiment.spec.estimator.text,
        on=base if has_rules else None,
    )


def _at(rule: ResolvedRule) -> str:
    """The positions as written; of a `replace` the text too."""
    at = rule.spec.at.span.written
    if DRAW in rule.positions.axes:
        at = f"random tokens, as many as of {at}"
    if rule.spec.onto is not None and rule.edge is None:
        at += f" onto {rule.spec.onto.span.written}"
    if rule.does.changes == "input" and rule.spec.fill is not None:
        at += f" with {rule.spec.fill.span.text}"
    return at


def _write(experiment: ResolvedExperiment, rule: ResolvedRule) -> WriteNode:
    at = _at(rule)
    return WriteNode(rule, at, _value(experiment, rule, at))


def _value(experiment: ResolvedExperiment, rule: ResolvedRule, at: str) -> ReadNode | TransformNode:
    """What a rule writes, and what it reads for it."""
    assert rule.sites is not None
    does = rule.does
    detail = does.detail(rule)
    if does.reads is None:
        steered = () if rule.direction is None else (_direction(experiment, rule.direction),)
        return TransformNode(does.name, steered, detail or "")
    points = rule.sites.points if rule.sites.sources is None else rule.sites.sources
    forward = unpatched(experiment, rule.run)
    if rule.apart is not None:
        apart = rule.apart
        other = EncodeNode(
            *(apart.table.name, apart.part, None, (), apart.run), changed_by=apart.table.changed_by
        )
        forward = ForwardNode(experiment.model.key, forward.n_layers, other, rule.apart.run)
    read = ReadNode(forward, at, points, rule.positions.read)
    return read if detail is None else TransformNode(does.name, (read,), detail)


def _direction(experiment: ResolvedExperiment, steered: DirectionTargets) -> DirectionNode:
    """The direction with what is read for it, each run of rows once."""
    members = list(steered.members.values())
    fits = [fit for member in members for fit in fits_of(member.vector)]
    reads: dict[tuple[int, int], ReadNode] = {}
    for number, fit in enumerate(fits):
        for sample in fit.samples:
            key = id(sample.table), id(sample.run.rows)
            model = sample.run.model or experiment.model.key
            behind, changed_by = sample.table.behind, sample.table.changed_by
            encode = EncodeNode(
                sample.table.name, None, None, (), sample.run.name, behind, changed_by
            )
            forward = ForwardNode(model, experiment.model.shape.n_layers, encode, sample.run.name)
            before = reads.get(key)
            points = {} if before is None else dict(before.points)
            points[number,] = fit.points
            reads[key] = ReadNode(forward, sample.cell.label, points, {(): sample.cell})
    made = members[0].made if len(members) == 1 else f"{len(members)} directions"
    name = " and ".join(steered.families) or members[0].name
    return DirectionNode(name, made, tuple(reads.values()))


def _unsaid(experiment: ResolvedExperiment, measure: ResolvedMeasure) -> str:
    """Where a measure is read that doesn't say it."""
    if measure.reply is not None:
        return "reply"
    of_logits = any(atom.form.of_outputs for atom in measure.atoms)
    made_of = experiment.model.shape.output_at
    said = {"first token": "token 0", "image": "image"}
    return said.get(made_of, "last token") if of_logits else "last token"


def _effect(
    experiment: ResolvedExperiment,
    acting: ForwardNode,
    measure: spec.Measure,
    resolved: ResolvedMeasure,
) -> EffectNode:
    entry = EFFECTS[measure.effect]
    at = _unsaid(experiment, resolved) if measure.at is None else measure.at.span.written
    runs = dict.fromkeys(atom.run for atom in resolved.atoms if atom.run is not None)
    observed = next((rule for rule in experiment.rules if rule.does.changes == "nothing"), None)
    if observed is not None and observed.does.reads == "run" and resolved.observed:
        runs[observed.run] = None
    references = tuple(unpatched(experiment, run) for run in runs)

    def measured(forward: ForwardNode, observed: ResolvedRule | None = None) -> MeasureNode:
        words = resolved.text, at, references
        reply = None
        if resolved.reply is not None and experiment.generation is not None:
            reply = ReplyNode(forward, experiment.generation.how)
        return MeasureNode(forward, *words, reply, measure=resolved, observed=observed)

    # Base and source are measured whatever the effect needs: both ends are always printed.
    source = experiment.spec.source
    return EffectNode(
        entry.name,
        measured(acting, observed),
        measured(unpatched(experiment, experiment.spec.base)),
        None if source is None else measured(unpatched(experiment, source)),
        measure,
    )
