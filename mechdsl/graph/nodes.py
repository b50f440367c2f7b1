"""The intervention graph: small frozen nodes, edges are data dependencies.

A sweep is one node with axes, so a file's graph has tens of nodes whatever its number of cells.
Nodes are compared by value: what two experiments have in common is one node.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any, TypeAlias, TypeVar

import networkx as nx

from mechdsl.program import spec
from mechdsl.resolve.resolved import DRAW, ResolvedExperiment, ResolvedMeasure, ResolvedRule
from mechdsl.vocab.effects import EFFECTS
from mechdsl.vocab.sites import SITES, stop_layer


@dataclass(frozen=True)
class Encode:
    """Text to tokens, masks and spans: one run of one block of prompts."""

    prompts: str
    part: str | None
    limit: int | None
    keep: tuple[str, ...]
    run: str
    replaced: str | None = None
    """`slot token with "thing"`: a change of the input that a rule makes."""


@dataclass(frozen=True)
class Read:
    """An activation of a forward pass."""

    forward: Forward
    site: str
    layers: tuple[int, ...]
    positions: str


@dataclass(frozen=True)
class Transform:
    """What is done to an activation before it is written: `mean`, `resample`, `noise`, `zero`."""

    kind: str
    inputs: tuple[Read, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class Write:
    """A value that goes into a forward pass."""

    site: str
    layers: tuple[int, ...]
    positions: str
    value: Read | Transform
    targets: str = ""
    """The first and the last of what its cells write: `L0H0.z … L3H3.z`."""
    digest: str = ""
    """Of all of them, so that rules with different heads stay different nodes."""


@dataclass(frozen=True)
class Forward:
    """One pass over the prompts for every combination of its axes."""

    model: str
    encode: Encode
    writes: tuple[Write, ...] = ()
    axes: tuple[tuple[str, int], ...] = ()
    """(name, number of values)."""
    stop: int | None = None
    """How many blocks have to run; None is the whole model."""
    after: tuple[Effect, ...] = ()
    """Of other experiments, which say where this one acts (`top 3 of cie`)."""

    @property
    def cells(self) -> int:
        count = 1
        for _, size in self.axes:
            count *= size
        return count


@dataclass(frozen=True)
class Measure:
    """One number per prompt."""

    forward: Forward
    metric: str
    at: str
    references: tuple[Forward, ...] = ()
    """Runs that the metric compares with: `kl(clean)`."""


@dataclass(frozen=True)
class Effect:
    """How the metric of the patched run is set against the base and the source run."""

    kind: str
    patched: Measure
    base: Measure | None
    source: Measure | None


@dataclass(frozen=True)
class Report:
    experiment: str
    effects: tuple[Effect, ...]
    what: str


@dataclass(frozen=True)
class Expect:
    experiment: str
    effects: tuple[Effect, ...]
    measures: tuple[Measure, ...]
    condition: str


Node: TypeAlias = Encode | Forward | Read | Transform | Write | Measure | Effect | Report | Expect
Graph: TypeAlias = "nx.DiGraph[Node]"
NodeT = TypeVar("NodeT", bound=Any)


def inputs(node: Node) -> list[Node]:
    """The nodes that a node's fields hold: what must be there before it."""
    found: list[Node] = []
    for f in fields(node):
        value: Any = getattr(node, f.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Node):
                found.append(item)
    return found


def graph_of(leaves: list[Node]) -> Graph:
    """The graph of everything that the leaves need."""
    graph: Graph = nx.DiGraph()

    def add(node: Node) -> None:
        if node in graph:
            return
        graph.add_node(node)
        for before in inputs(node):
            add(before)
            graph.add_edge(before, node)

    for leaf in leaves:
        add(leaf)
    return graph


def lint(graph: Graph) -> None:
    """Check what every graph must satisfy; raises AssertionError, as only we can break it."""
    assert nx.is_directed_acyclic_graph(graph), "the graph has a cycle"
    for node in graph:
        assert set(graph.predecessors(node)) == set(inputs(node)), f"edges of {node!r} are stale"


def build(experiments: list[ResolvedExperiment]) -> Graph:
    """The graph of a file's experiments."""
    known: dict[str, tuple[Effect, ...]] = {}

    def effects(experiment: ResolvedExperiment) -> tuple[Effect, ...]:
        if experiment.key not in known:
            named = [e for e in experiments if e.name in experiment.spec.after]
            after = tuple(first for e in named for first in effects(e)[:1])
            pairs = zip(experiment.spec.measures, experiment.measures, strict=True)
            known[experiment.key] = tuple(
                _effect(experiment, measure, resolved, after) for measure, resolved in pairs
            )
        return known[experiment.key]

    return graph_of([leaf for each in experiments for leaf in _leaves(each, effects(each))])


def _leaves(experiment: ResolvedExperiment, effects: tuple[Effect, ...]) -> list[Node]:
    reports = experiment.spec.reports or (spec.Report(span=experiment.spec.span, kind="table"),)
    accuracy = tuple(
        Measure(unpatched(experiment, run), "correct", "last token")
        for run in experiment.accuracies
    )
    leaves: list[Node] = [
        Report(experiment.key, effects, report_text(report)) for report in reports
    ]
    leaves.extend(
        Expect(experiment.key, effects, accuracy, expect.text) for expect in experiment.spec.expects
    )
    return leaves


def report_text(report: spec.Report) -> str:
    words = [report.kind, report.variable or ""]
    words.append(f"by {report.by}" if report.by else "")
    words.append(f"top {report.top}" if report.top else "")
    return " ".join(word for word in words if word)


def encode(experiment: ResolvedExperiment, run: str, replaced: str | None = None) -> Encode:
    """The node that turns one run's prompts into tokens."""
    s = experiment.spec
    keep = tuple(measure.text for measure in experiment.keep)
    return Encode(s.prompts, s.part, s.limit, keep, run, replaced)


def unpatched(experiment: ResolvedExperiment, run: str) -> Forward:
    """A run without interventions; a noised run writes its noise."""
    there = experiment.table.runs[run]
    noise = there.noise
    writes: tuple[Write, ...] = ()
    if noise is not None:
        amount = f"{noise.sds:g} sd" if noise.sds is not None else f"{noise.std:g}"
        value = Transform("noise", detail=f"{amount}, {noise.samples} draws")
        writes = (Write(noise.site, (), "where the corruption says", value),)
    text = run
    if there.model is not None:
        text = "clean"
    elif noise is not None:
        text = there.prompts or "clean"
    return Forward(there.model or experiment.model.name, encode(experiment, text), writes)


def patched(experiment: ResolvedExperiment, after: tuple[Effect, ...] = ()) -> Forward:
    """The pass with all rules of the experiment; without rules, the base run itself.

    after: the effects that say where it acts.
    """
    base = unpatched(experiment, experiment.spec.base)
    if not experiment.rules:
        return base
    replaced = next((_at(rule) for rule in experiment.rules if rule.fill == "text"), None)
    acting = [r for r in experiment.rules if r.sites is not None and r.fill != "observe"]
    writes = tuple(_write(experiment, rule) for rule in acting)
    return Forward(
        experiment.model.name,
        replace(base.encode, replaced=replaced),
        base.writes + writes,
        tuple((axis.name, len(axis)) for axis in experiment.axes),
        after=after,
    )


def _at(rule: ResolvedRule) -> str:
    """The positions as written; of a `replace` the text too."""
    at = rule.spec.at.span.written
    if DRAW in rule.positions.axes:
        at = f"random tokens, as many as of {at}"
    if rule.spec.onto is not None and rule.edge is None:
        at += f" onto {rule.spec.onto.span.written}"
    if rule.fill == "text" and rule.spec.fill is not None:
        at += f" with {rule.spec.fill.span.text}"
    return at


def rule_layers(rule: ResolvedRule) -> tuple[int, ...]:
    """Every layer that the rule writes to in some cell."""
    assert rule.sites is not None
    return tuple(
        sorted({p.layer for pts in rule.sites.points.values() for p in pts if p.layer is not None})
    )


def rule_sites(rule: ResolvedRule) -> tuple[str, ...]:
    """Every component that the rule writes to, in the order of a forward pass."""
    assert rule.sites is not None
    names = {p.site for points in rule.sites.points.values() for p in points}
    return tuple(sorted(names, key=lambda name: SITES[name].order))


def _write(experiment: ResolvedExperiment, rule: ResolvedRule) -> Write:
    assert rule.sites is not None
    site, layers, at = ", ".join(rule_sites(rule)), rule_layers(rule), _at(rule)
    labels = list(rule.sites.labels.values())
    if rule.path is not None:
        labels += rule.path.receivers.labels.values()
    targets = labels[0] if len(labels) == 1 else f"{labels[0]} … {labels[-1]}"
    digest = sha256("\n".join(labels).encode()).hexdigest()
    return Write(site, layers, at, _value(experiment, rule, site, at), targets, digest)


def _value(
    experiment: ResolvedExperiment, rule: ResolvedRule, site: str, at: str
) -> Read | Transform:
    """What a rule writes, and what it reads for it."""
    assert rule.sites is not None
    detail = f"by {rule.spec.by}" if rule.spec.by else ""
    if rule.spec.fill is not None and rule.amounts is not None:
        detail = rule.spec.fill.span.written
    if rule.fill in ("zero", "number"):
        return Transform(rule.fill, detail=detail)
    if rule.python is not None:
        detail = f"{rule.python.name} of {rule.python.file}"
    if rule.edge is not None:
        keys = "" if rule.spec.onto is None else rule.spec.onto.span.written
        return Transform(rule.edge.kind, detail=f"to {keys} {detail}".strip())
    points = rule.sites.points if rule.sites.sources is None else rule.sites.sources
    layers = {p.layer for here in points.values() for p in here if p.layer is not None}
    forward = unpatched(experiment, rule.run)
    if rule.apart is not None:
        other = Encode(rule.apart.table.name, None, None, (), rule.apart.run)
        forward = Forward(experiment.model.name, other)
    read = Read(forward, site, tuple(sorted(layers)), at)
    if rule.fill == "source":
        return read
    if rule.path is not None:
        through = ", through MLPs" if rule.path.through_mlps else ""
        receiver = "" if rule.spec.receiver is None else rule.spec.receiver.span.written
        detail = f"to {receiver}{through}"
    return Transform(rule.fill, (read,), detail)


def _effect(
    experiment: ResolvedExperiment,
    measure: spec.Measure,
    resolved: ResolvedMeasure,
    after: tuple[Effect, ...],
) -> Effect:
    entry = EFFECTS[measure.effect]
    at = "last token" if measure.at is None else measure.at.span.written
    runs = dict.fromkeys(atom.run for atom in resolved.atoms if atom.run is not None)
    references = tuple(unpatched(experiment, run) for run in runs)

    def measured(forward: Forward) -> Measure:
        return Measure(forward, resolved.text, at, references)

    # Base and source are measured whatever the effect needs: both ends are always printed.
    source = experiment.spec.source
    return Effect(
        entry.name,
        measured(patched(experiment, after)),
        measured(unpatched(experiment, experiment.spec.base)),
        None if source is None else measured(unpatched(experiment, source)),
    )


def highest_read(read: Read, n_layers: int) -> int | None:
    """How many blocks have to run before the read; None is the whole model."""
    needed = [
        stop_layer(site, layer, n_layers)
        for site in read.site.split(", ")
        for layer in (read.layers or (None,))
    ]
    return None if None in needed else max(n for n in needed if n is not None)


def rebuild(node: NodeT, change: dict[Node, Node]) -> NodeT:
    """The node with its inputs replaced, all the way down."""

    def swap(value: Any) -> Any:
        if isinstance(value, Node):
            return change.get(value) or rebuild(value, change)
        if isinstance(value, tuple):
            return tuple(swap(item) for item in value)
        return value

    return replace(node, **{f.name: swap(getattr(node, f.name)) for f in fields(node)})
