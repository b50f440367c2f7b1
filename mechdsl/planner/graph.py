"""The intervention graph: small frozen nodes, joined by data dependencies.

A sweep is one node with axes, so a file's graph has tens of nodes whatever its number of cells.
Nodes are compared by value: a node that two experiments share exists once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, TypeVar

import networkx as nx

from mechdsl.base.text import count_noun
from mechdsl.program import spec
from mechdsl.prompts.runs import PositionCell, RunNoise
from mechdsl.resolve.types import (
    DRAW_AXIS,
    WEIGHTS_BASIS,
    Axis,
    AxisIndices,
    DirectionMember,
    DirectionTargets,
    FittedBasis,
    FittedVector,
    JacobianBasis,
    ResolvedExperiment,
    ResolvedMeasure,
    ResolvedRule,
    SiteLayer,
    SitePoint,
    iter_fitted_vectors,
)
from mechdsl.vocab.metrics import EFFECTS
from mechdsl.vocab.sites import SITES, stop_layer


@dataclass(frozen=True)
class EncodeNode:
    """Converts text to tokens, masks and spans: one run of one prompt block."""

    prompts: str
    part: str | None
    limit: int | None
    keep: tuple[str, ...]
    run: str
    replies: str = ""
    """Source of the replies that follow the prompts."""
    changed_by: tuple[str, ...] = ()
    """Used corruptions, each of which must change a row for the row to be included."""
    replaced: str | None = None
    """`slot token with "thing"`: a rule's change of the input."""
    kept_by: tuple[ResolvedMeasure, ...] = field(default=(), compare=False, repr=False)
    """Conditions of `keep`."""
    replaced_by: ResolvedRule | None = field(default=None, hash=False, repr=False)
    """The rule that changes the input."""


def component_layers(points: Mapping[AxisIndices, tuple[SitePoint, ...]]) -> tuple[SiteLayer, ...]:
    """Return every component with its layer, in the order of a forward pass."""
    layers = {(point.site, point.layer) for here in points.values() for point in here}
    return tuple(sorted(layers, key=lambda place: (SITES[place[0]].order, place[1] or 0)))


@dataclass(frozen=True)
class ReadNode:
    """Activations of a forward pass."""

    forward: ForwardNode
    at: str
    """Positions as written in the source."""
    points: Mapping[AxisIndices, tuple[SitePoint, ...]] = field(compare=False, repr=False)
    """Points to read, for every combination of the axes of the rule's sites."""
    positions: Mapping[AxisIndices, PositionCell] = field(compare=False, repr=False)
    """Positions, for every combination of their axes."""
    places: tuple[SiteLayer, ...] = field(init=False)
    """Every component to read, with its layer, in the order of a forward pass."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", component_layers(self.points))


@dataclass(frozen=True)
class DirectionNode:
    """A direction or a basis, or a family of them, computed before the cells that use it."""

    name: str
    made: str
    inputs: tuple[ReadNode, ...] = ()
    what: Literal["direction", "basis"] = "direction"


@dataclass(frozen=True)
class TransformNode:
    """An operation on an activation before it is written (`mean`, `resample`, `noise`, `zero`) or
    at its site (`add`, `scale`, `project out`)."""

    kind: str
    inputs: tuple[ReadNode | DirectionNode, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class WriteNode:
    """A value that is written in a forward pass."""

    by: ResolvedRule | RunNoise = field(hash=False, repr=False)
    """The rule that defines the targets in every cell, or the corruption that adds noise."""
    at: str
    value: ReadNode | TransformNode
    places: tuple[SiteLayer, ...] = field(init=False)
    """Every written component, with its layer."""

    def __post_init__(self) -> None:
        written: tuple[SiteLayer, ...]
        if isinstance(self.by, RunNoise):
            written = ((self.by.site, None),)
        else:
            assert self.by.sites is not None
            written = component_layers(self.by.sites.points)
        object.__setattr__(self, "places", written)

    @property
    def read(self) -> ReadNode | None:
        """The read node of the value, if any."""
        if isinstance(self.value, ReadNode):
            return self.value
        return next((node for node in self.value.inputs if isinstance(node, ReadNode)), None)


@dataclass(frozen=True)
class ForwardNode:
    """One pass over the prompts for every combination of its axes."""

    model: str
    n_layers: int
    """Number of blocks of the model."""
    encode: EncodeNode
    run: str = field(compare=False)
    """The unpatched run that it is or starts from, under its experiment's name."""
    writes: tuple[WriteNode, ...] = ()
    axes: tuple[Axis, ...] = field(default=(), hash=False)
    cells: int = 1
    """Number of combinations of their values that exist."""
    stop: int | None = None
    """Number of blocks to run; None is the whole model."""
    after: tuple[EffectNode, ...] = ()
    """Effects of other experiments that determine the targets (`top 3 of cie`)."""
    estimator: str = ""
    """The estimator (`using`) that replaces running the cells."""
    on: ForwardNode | None = None
    """The run with its own rules, or the run that an experiment's derived run starts from."""


@dataclass(frozen=True)
class ReplyNode:
    """Text generated after the prompts, one pass per token."""

    forward: ForwardNode
    """The first of these passes, over the prompt."""
    how: str


@dataclass(frozen=True)
class MeasureNode:
    """One number per prompt."""

    forward: ForwardNode
    metric: str
    at: str
    references: tuple[ForwardNode, ...] = ()
    """Runs that the metric compares with: `kl(clean)`."""
    reply: ReplyNode | None = None
    """The reply that it reads, if any."""
    measure: ResolvedMeasure = field(kw_only=True, compare=False, repr=False)
    """Its computation and the measured token of every row."""
    observed: ResolvedRule | None = field(default=None, hash=False, repr=False)
    """The rule that defines the observed targets in every cell."""


@dataclass(frozen=True)
class EffectNode:
    """A comparison of the patched run's metric with the base and the source run."""

    kind: str
    patched: MeasureNode
    base: MeasureNode
    source: MeasureNode | None
    said: spec.Measure = field(compare=False, repr=False)


@dataclass(frozen=True)
class ReportNode:
    """A report of an experiment's effects."""

    experiment: str
    effects: tuple[EffectNode, ...]
    what: str
    of: ResolvedExperiment = field(compare=False, repr=False)
    """Metadata of the results besides their values: names, seed, statistics."""


@dataclass(frozen=True)
class ExpectNode:
    """An expectation of an experiment's effects."""

    experiment: str
    effects: tuple[EffectNode, ...]
    accuracies: tuple[MeasureNode, ...]
    condition: str
    of: ResolvedExperiment = field(compare=False, repr=False)


@dataclass(frozen=True)
class SaveNode:
    """Activations, gradients or a direction that are written to a file."""

    experiment: str
    read: ReadNode | MeasureNode | DirectionNode
    """A metric node: the file has its gradients."""
    file: str


Node: TypeAlias = (
    EncodeNode
    | ForwardNode
    | ReadNode
    | DirectionNode
    | TransformNode
    | WriteNode
    | ReplyNode
    | MeasureNode
    | EffectNode
    | ReportNode
    | ExpectNode
    | SaveNode
)

Graph: TypeAlias = "nx.DiGraph[Node]"

NodeT = TypeVar("NodeT", bound=Any)


def node_inputs(node: Node) -> list[Node]:
    """Return the nodes in a node's fields, which must be computed before it."""
    nodes: list[Node] = []
    for f in fields(node):
        value: Any = getattr(node, f.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Node):
                nodes.append(item)
    return nodes


def graph_from_leaves(leaves: Sequence[Node]) -> Graph:
    """Build the graph of everything that the leaves need."""
    graph: Graph = nx.DiGraph()

    def add(node: Node) -> None:
        if node in graph:
            return
        graph.add_node(node)
        for before in node_inputs(node):
            add(before)
            graph.add_edge(before, node)

    for leaf in leaves:
        add(leaf)
    return graph


def check_graph(graph: Graph) -> None:
    """Check the invariants of every graph; an AssertionError is an internal error."""
    assert nx.is_directed_acyclic_graph(graph), "the graph has a cycle"
    for node in graph:
        assert set(graph.predecessors(node)) == set(node_inputs(node)), (
            f"edges of {node!r} are stale"
        )
    acting: dict[str, set[ForwardNode]] = {}
    for leaf in graph_leaves(graph):
        assert leaf.effects, f"{leaf.experiment} has no output"
        nodes = acting.setdefault(leaf.experiment, set())
        nodes.update(effect.patched.forward for effect in leaf.effects)
    for experiment, passes in acting.items():
        assert len(passes) == 1, f"{experiment} is measured in several passes"


def highest_read(read: ReadNode) -> int | None:
    """Return the number of blocks to run before the read; None is the whole model."""
    needed = [stop_layer(*place, read.forward.n_layers) for place in read.places]
    return None if None in needed else max(n for n in needed if n is not None)


def rebuild_node(node: NodeT, change: Callable[[Node], Node]) -> NodeT:
    """Apply a change to a node and all its inputs; an unchanged node is returned as is."""

    def swap(value: Any) -> Any:
        if isinstance(value, Node):
            return rebuild_node(value, change)
        if isinstance(value, tuple):
            parts: tuple[Any, ...] = value
            new = tuple(swap(item) for item in parts)
            return new if any(a is not b for a, b in zip(new, parts, strict=True)) else parts
        return value

    changed: Any = change(node)
    old = {f.name: getattr(changed, f.name) for f in fields(changed) if f.init}
    new = {name: swap(value) for name, value in old.items()}
    differs = any(new[name] is not old[name] for name in old)
    return replace(changed, **new) if differs else changed


def graph_leaves(graph: Graph) -> list[ReportNode | ExpectNode]:
    """Return the requested reports and expectations in source order."""
    return [node for node in graph if isinstance(node, (ReportNode, ExpectNode))]


def map_nodes(graph: Graph, change: Callable[[Node], Node]) -> Graph:
    """Apply a change to all nodes and drop those that are no longer needed."""
    saves = (node for node in graph if isinstance(node, SaveNode))
    return graph_from_leaves(
        [rebuild_node(leaf, change) for leaf in (*graph_leaves(graph), *saves)]
    )


def build_graph(experiments: Sequence[ResolvedExperiment]) -> Graph:
    """Build the graph of a file's experiments."""
    known: dict[str, tuple[EffectNode, ...]] = {}

    def effects(experiment: ResolvedExperiment) -> tuple[EffectNode, ...]:
        if experiment.key not in known:
            named = [e for e in experiments if e.name in experiment.spec.after]
            after = tuple(first for e in named for first in effects(e)[:1])
            acting = patched_forward(experiment, after)
            pairs = zip(experiment.spec.measures, experiment.measures, strict=True)
            known[experiment.key] = tuple(
                _effect(experiment, acting, measure, resolved) for measure, resolved in pairs
            )
        return known[experiment.key]

    return graph_from_leaves(
        [leaf for experiment in experiments for leaf in _leaves(experiment, effects(experiment))]
    )


def _leaves(experiment: ResolvedExperiment, effects: tuple[EffectNode, ...]) -> list[Node]:
    key = experiment.key
    reports = experiment.spec.reports or (spec.Report(span=experiment.spec.span, kind="table"),)
    accuracies = tuple(
        MeasureNode(
            unpatched_forward(experiment, run),
            "correct",
            describe_default_position(experiment, correct),
            measure=correct,
        )
        for run, correct in experiment.accuracies.items()
    )
    leaves: list[Node] = [
        ReportNode(key, effects, report_text(report), experiment) for report in reports
    ]
    leaves.extend(
        ExpectNode(key, effects, accuracies, expect.text, experiment)
        for expect in experiment.spec.expects
    )
    return leaves


def report_text(report: spec.Report) -> str:
    words = [report.kind, report.variable or ""]
    words.append(f"by {report.by}" if report.by else "")
    words.append(f"top {report.top}" if report.top else "")
    return " ".join(word for word in words if word)


def unpatched_forward(experiment: ResolvedExperiment, run: str) -> ForwardNode:
    """Return an unpatched run of the experiment. A run with noise writes its noise; a derived run
    applies its rules."""
    there = experiment.table.runs[run]
    if there.derived is not None:
        return _derived(experiment, run, unpatched_forward(experiment, there.derived.base))
    noise = there.noise
    writes: tuple[WriteNode, ...] = ()
    if noise is not None:
        amount = f"{noise.sds:g} sd" if noise.sds is not None else f"{noise.std:g}"
        value = TransformNode("noise", detail=f"{amount}, {count_noun(noise.samples, 'draw')}")
        writes = (WriteNode(noise, "where the corruption says", value),)
    text = run
    if there.model is not None:
        text = "clean"
    elif noise is not None:
        text = there.prompts or "clean"
    s = experiment.spec
    keep = tuple(measure.text for measure in experiment.keep)
    replies_of, changed_by = experiment.table.replies_of, experiment.table.changed_by
    encode = EncodeNode(
        *(s.prompts, s.part, s.limit, keep, text, replies_of, changed_by), kept_by=experiment.keep
    )
    # Models that are patched into each other have the same number of layers.
    model, n_layers = there.model or experiment.model.key, experiment.model.shape.n_layers
    return ForwardNode(model, n_layers, encode, run, writes)


def _derived(experiment: ResolvedExperiment, run: str, base: ForwardNode) -> ForwardNode:
    """Return a derived run of the experiment: its rules on another run."""
    defined = experiment.derived[run]
    writes = tuple(_write(experiment, rule) for rule in defined.rules)
    return replace(base, run=run, writes=writes, on=base)


def patched_forward(
    experiment: ResolvedExperiment, after: tuple[EffectNode, ...] = ()
) -> ForwardNode:
    """Return the pass with all rules of the experiment; without rules, the base run itself.

    Args:
        after: Effects that determine the targets.
    """
    base = unpatched_forward(experiment, experiment.spec.base)
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
        experiment.n_there,
        after=after,
        estimator="" if experiment.spec.estimator is None else experiment.spec.estimator.text,
        on=base if has_rules else None,
    )


def _at(rule: ResolvedRule) -> str:
    """Return the positions as written; for `replace`, with the text."""
    at = rule.spec.at.span.written
    if DRAW_AXIS in rule.positions.axes:
        at = f"random tokens, the same number as of {at}"
    if rule.spec.onto is not None and rule.edge is None:
        at += f" onto {rule.spec.onto.span.written}"
    if rule.does.changes == "input" and rule.spec.fill is not None:
        at += f" with {rule.spec.fill.span.text}"
    return at


def _write(experiment: ResolvedExperiment, rule: ResolvedRule) -> WriteNode:
    at = _at(rule)
    return WriteNode(rule, at, _value(experiment, rule, at))


def _value(experiment: ResolvedExperiment, rule: ResolvedRule, at: str) -> ReadNode | TransformNode:
    """Return the value that a rule writes, with its reads."""
    assert rule.sites is not None
    does = rule.does
    detail = does.detail(rule)
    bases = _bases(experiment, rule)
    if does.reads is None:
        steered = () if rule.direction is None else (_direction(experiment, rule.direction),)
        return TransformNode(does.name, (*steered, *bases), detail or "")
    points = rule.sites.points if rule.sites.sources is None else rule.sites.sources
    forward = unpatched_forward(experiment, rule.run)
    if rule.external is not None:
        external = rule.external
        other = EncodeNode(
            *(external.table.name, external.part, None, (), external.run),
            changed_by=external.table.changed_by,
        )
        forward = ForwardNode(experiment.model.key, forward.n_layers, other, external.run)
    read = ReadNode(forward, at, points, rule.positions.read)
    return read if detail is None else TransformNode(does.name, (read, *bases), detail)


def _direction(experiment: ResolvedExperiment, steered: DirectionTargets) -> DirectionNode:
    """Return the direction with its reads."""
    members = list(steered.members.values())
    name = " and ".join(steered.families) or members[0].name
    return build_direction_node(experiment, name, members)


def build_direction_node(
    experiment: ResolvedExperiment, name: str, members: Sequence[DirectionMember]
) -> DirectionNode:
    """Return a direction, or a family of them, with its reads."""
    fits = [fit for member in members for fit in iter_fitted_vectors(member.vector)]
    made = members[0].made if len(members) == 1 else f"{len(members)} directions"
    return DirectionNode(name, made, _fit_reads(experiment, fits))


def _bases(experiment: ResolvedExperiment, rule: ResolvedRule) -> tuple[DirectionNode, ...]:
    """Return the bases of a rule with their reads; for a rule on weights its direction, if any."""
    basis = rule.basis
    if basis is not None and basis.definition == WEIGHTS_BASIS:
        if rule.spec.direction is None:
            return ()
        reads = _fit_reads(experiment, list(basis.fits))
        return (DirectionNode(rule.spec.direction.span.written, basis.members[0].made, reads),)
    bases: list[DirectionNode] = []
    for basis_targets in rule.bases:
        members, reads = basis_targets.members, _fit_reads(experiment, list(basis_targets.fits))
        made = members[0].made if len(members) == 1 else f"{len(members)} bases"
        bases.append(DirectionNode(basis_targets.definition, made, reads, "basis"))
    return tuple(bases)


def _fit_reads(
    experiment: ResolvedExperiment, fits: Sequence[FittedVector | FittedBasis | JacobianBasis]
) -> tuple[ReadNode, ...]:
    """Return the reads of fits; each run of rows is read once."""
    reads: dict[tuple[int, int], ReadNode] = {}
    for number, fit in enumerate(fits):
        for sample in fit.samples:
            key = id(sample.table), id(sample.run.rows)
            model = sample.run.model or experiment.model.key
            replies_of, changed_by = sample.table.replies_of, sample.table.changed_by
            encode = EncodeNode(
                sample.table.name, None, None, (), sample.run.name, replies_of, changed_by
            )
            forward = ForwardNode(model, experiment.model.shape.n_layers, encode, sample.run.name)
            before = reads.get(key)
            points = {} if before is None else dict(before.points)
            points[number,] = fit.points
            reads[key] = ReadNode(forward, sample.cell.label, points, {(): sample.cell})
    return tuple(reads.values())


def describe_default_position(experiment: ResolvedExperiment, measure: ResolvedMeasure) -> str:
    """Describe the default position of a measure."""
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
    at = (
        describe_default_position(experiment, resolved)
        if measure.at is None
        else measure.at.span.written
    )
    runs = dict.fromkeys(resolved.compared_runs)
    observed = next((rule for rule in experiment.rules if rule.does.changes == "nothing"), None)
    if observed is not None and observed.does.reads == "run" and resolved.observed:
        runs[observed.run] = None
    references = tuple(unpatched_forward(experiment, run) for run in runs)

    def measured(forward: ForwardNode, observed: ResolvedRule | None = None) -> MeasureNode:
        words = resolved.text, at, references
        reply = None
        if resolved.reply is not None and experiment.generation is not None:
            reply = ReplyNode(forward, experiment.generation.how)
        return MeasureNode(forward, *words, reply, measure=resolved, observed=observed)

    # Base and source are always measured, because both are always printed.
    source = experiment.spec.source
    return EffectNode(
        entry.name,
        measured(acting, observed),
        measured(unpatched_forward(experiment, experiment.spec.base)),
        None if source is None else measured(unpatched_forward(experiment, source)),
        measure,
    )


@dataclass(frozen=True, eq=False)
class GraphExperiment:
    """One experiment of a graph."""

    experiment: ResolvedExperiment
    """The experiment with the rules, axes, measures and runs of its nodes."""
    clean: EncodeNode
    """The clean run of its prompts; experiments with an equal one share their runs."""
    runs: tuple[ForwardNode, ...]
    """Every unpatched run that it reads, measures or starts from."""


@dataclass(frozen=True)
class RunNeeds:
    """Required outputs of an unpatched run."""

    forward: ForwardNode
    reads: frozenset[SiteLayer] = frozenset()
    measured: bool = False
    stop: int | None = None


def graph_experiments(graph: Graph) -> list[GraphExperiment]:
    """Return the experiments of a graph in source order."""
    by_key: dict[str, list[ReportNode | ExpectNode]] = {}
    for leaf in graph_leaves(graph):
        by_key.setdefault(leaf.experiment, []).append(leaf)
    return [_graph_experiment(nodes) for nodes in by_key.values()]


def run_needs(graph: Graph) -> dict[ForwardNode, RunNeeds]:
    """Map unpatched runs, without `stop`, to what dependent nodes need of them."""
    needs: dict[ForwardNode, RunNeeds] = {}
    for node in graph:
        if not isinstance(node, ForwardNode) or node.axes:
            continue
        users = list(graph.successors(node))
        reads = frozenset(
            place for user in users if isinstance(user, ReadNode) for place in user.places
        )
        whole = replace(node, stop=None)
        old = needs.get(whole, RunNeeds(whole, stop=node.stop))
        needs[whole] = RunNeeds(
            whole,
            old.reads | reads,
            old.measured or any(isinstance(user, MeasureNode) for user in users),
            node.stop if old.stop is not None else None,
        )
    return needs


def _graph_experiment(nodes: Sequence[ReportNode | ExpectNode]) -> GraphExperiment:
    """Build one experiment from its leaves."""
    said, effects = nodes[0].of, _effects(nodes)
    acting, base, source = effects[0].patched.forward, effects[0].base, effects[0].source
    rules = _rules(effects[0].patched)
    measures = tuple(effect.patched.measure for effect in effects)
    accuracies = {
        measure.forward.run: measure.measure
        for leaf in nodes
        if isinstance(leaf, ExpectNode)
        for measure in leaf.accuracies
    }
    # Only axes of remaining rules exist.
    used = frozenset(name for rule in rules for name in rule.axes)
    experiment = replace(
        said,
        spec=said.spec.model_copy(
            update={
                "base": base.forward.run,
                "source": None if source is None else source.forward.run,
                "rules": tuple(rule.spec for rule in rules),
                "measures": tuple(effect.said for effect in effects),
            }
        ),
        axes=tuple(axis for axis in acting.axes if axis.name in used),
        rules=rules,
        measures=measures,
        keep=acting.encode.kept_by,
        accuracies=accuracies,
    )
    runs = {
        node.run: node
        for forward in _runs(nodes, effects)
        for node in run_with_dependencies(forward)
    }
    for name in _filtering(experiment):  # `keep` is evaluated before the graph runs
        runs.setdefault(name, unpatched_forward(experiment, name))
    clean = replace(acting.encode, run="clean", replaced=None, replaced_by=None)
    return GraphExperiment(experiment, clean, tuple(runs.values()))


def _effects(nodes: Sequence[ReportNode | ExpectNode]) -> tuple[EffectNode, ...]:
    """Return the effects that the leaves report or expect, without duplicates."""
    by_line = {id(effect.said): effect for leaf in nodes for effect in leaf.effects}
    return tuple(by_line.values())


def _rules(measure: MeasureNode) -> tuple[ResolvedRule, ...]:
    """Return the rules of a measured run: those of its writes in order, and the others at their
    source positions."""
    forward = measure.forward
    rules = [
        _rule(write, write.by) for write in forward.writes if not isinstance(write.by, RunNoise)
    ]
    for rule in (forward.encode.replaced_by, measure.observed):
        if rule is not None:
            before = [each.spec.span.start < rule.spec.span.start for each in rules]
            rules.insert(sum(before), rule)
    return tuple(rules)


def _rule(write: WriteNode, rule: ResolvedRule) -> ResolvedRule:
    """Return the rule of a write with the reads of its node."""
    read = write.read
    if read is None or rule.sites is None:
        return rule
    sources = None if read.points is rule.sites.points else read.points
    return replace(
        rule,
        run=rule.run if rule.external is not None else read.forward.run,
        sites=replace(rule.sites, sources=sources),
        positions=replace(rule.positions, read=read.positions),
    )


def _runs(
    nodes: Sequence[ReportNode | ExpectNode], effects: Sequence[EffectNode]
) -> Iterator[ForwardNode]:
    """Yield the unpatched runs that nodes measure, read or compare with, in source order."""
    yield effects[0].base.forward
    if effects[0].source is not None:
        yield effects[0].source.forward
    yield from _read(effects[0].patched.forward)
    for leaf in nodes:
        if isinstance(leaf, ExpectNode):
            yield from (measure.forward for measure in leaf.accuracies)
    for effect in effects:
        yield from effect.patched.references


def run_with_dependencies(forward: ForwardNode) -> Iterator[ForwardNode]:
    """Yield a run after those that its own rules read."""
    ruled = forward
    while ruled.on is not None:
        for read in _read(ruled):
            yield from run_with_dependencies(read)
        ruled = ruled.on
    yield forward


def _read(forward: ForwardNode) -> Iterator[ForwardNode]:
    """Yield the runs of the sampled rows that values are read in. A mean of another block reads
    separate rows in separate runs."""
    for write in forward.writes:
        external = isinstance(write.by, ResolvedRule) and write.by.external is not None
        if write.read is not None and not external:
            yield write.read.forward


def _filtering(experiment: ResolvedExperiment) -> Iterator[str]:
    """Yield the runs that `keep` reads."""
    for measure in experiment.keep:
        yield from measure.compared_runs
    if experiment.keep:
        yield "clean"


def stop_early(graph: Graph) -> Graph:
    """Stop a pass that is only read, never measured, above its highest read."""
    stops: dict[Node, int] = {}
    for node in graph:
        if not isinstance(node, ForwardNode) or node.stop is not None:
            continue
        users = list(graph.successors(node))
        if not users or any(isinstance(user, MeasureNode) for user in users):
            continue
        needed = [highest_read(user) for user in users if isinstance(user, ReadNode)]
        if needed and None not in needed:
            highest = max(n for n in needed if n is not None)
            if highest <= node.n_layers:
                stops[node] = highest
    if not stops:
        return graph

    def stopped(node: Node) -> Node:
        stop = stops.get(node) if isinstance(node, ForwardNode) else None
        return node if stop is None else replace(node, stop=stop)

    return map_nodes(graph, stopped)
