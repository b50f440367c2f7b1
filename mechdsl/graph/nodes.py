"""The intervention graph: small frozen nodes, edges are data dependencies.

A sweep is one node with axes, so a file's graph has tens of nodes whatever its number of cells.
Nodes are compared by value: what two experiments have in common is one node. Beside what it is
compared by, a node holds what a run needs of it; the plan is made of the nodes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias, TypeVar

import networkx as nx

from mechdsl.program import spec
from mechdsl.prompts.prompt_table import Noise, PositionCell
from mechdsl.resolve.resolved import (
    Axis,
    LoopCells,
    ResolvedExperiment,
    ResolvedMeasure,
    cells_of,
)
from mechdsl.resolve.resolved_rule import Key, Place, ResolvedRule, SitePoint
from mechdsl.vocab.sites import SITES, stop_layer


@dataclass(frozen=True)
class EncodeNode:
    """Text to tokens, masks and spans: one run of one block of prompts."""

    prompts: str
    part: str | None
    limit: int | None
    keep: tuple[str, ...]
    run: str
    behind: str = ""
    """Whose replies stand behind the prompts."""
    changed_by: tuple[str, ...] = ()
    """Corruptions that are used and leave a row as it is, which isn't among these."""
    replaced: str | None = None
    """`slot token with "thing"`: a change of the input that a rule makes."""
    kept_by: tuple[ResolvedMeasure, ...] = field(default=(), compare=False, repr=False)
    """What `keep` says."""
    replaced_by: ResolvedRule | None = field(default=None, hash=False, repr=False)
    """The rule that changes the input."""


def places_of(points: Mapping[Key, tuple[SitePoint, ...]]) -> tuple[Place, ...]:
    """Every component with its layer, in the order of a forward pass."""
    found = {(point.site, point.layer) for here in points.values() for point in here}
    return tuple(sorted(found, key=lambda place: (SITES[place[0]].order, place[1] or 0)))


@dataclass(frozen=True)
class ReadNode:
    """Activations of a forward pass."""

    forward: ForwardNode
    at: str
    """Where, as the file says it."""
    points: Mapping[Key, tuple[SitePoint, ...]] = field(compare=False, repr=False)
    """What is read for every combination of the axes of the rule's sites."""
    positions: Mapping[Key, PositionCell] = field(compare=False, repr=False)
    """Where, for every combination of the axes of its positions."""
    places: tuple[Place, ...] = field(init=False)
    """Every component that is read, with its layer, in the order of a forward pass."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", places_of(self.points))


@dataclass(frozen=True)
class DirectionNode:
    """A direction, or a family of them, fitted before the cells that use it."""

    name: str
    made: str
    inputs: tuple[ReadNode, ...] = ()


@dataclass(frozen=True)
class TransformNode:
    """What is done to an activation before it is written: `mean`, `resample`, `noise`, `zero`; or
    in its place: `add`, `scale`, `project out`."""

    kind: str
    inputs: tuple[ReadNode | DirectionNode, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class WriteNode:
    """A value that goes into a forward pass."""

    by: ResolvedRule | Noise = field(hash=False, repr=False)
    """The rule that says where it goes in every cell; or the corruption that adds it."""
    at: str
    value: ReadNode | TransformNode
    places: tuple[Place, ...] = field(init=False)
    """Every component that is written, with its layer."""

    def __post_init__(self) -> None:
        written: tuple[Place, ...]
        if isinstance(self.by, Noise):
            written = ((self.by.site, None),)
        else:
            assert self.by.sites is not None
            written = places_of(self.by.sites.points)
        object.__setattr__(self, "places", written)

    @property
    def read(self) -> ReadNode | None:
        """What is read for it."""
        if isinstance(self.value, ReadNode):
            return self.value
        return next((each for each in self.value.inputs if isinstance(each, ReadNode)), None)


@dataclass(frozen=True)
class ForwardNode:
    """One pass over the prompts for every combination of its axes."""

    model: str
    n_layers: int
    """Blocks of the model."""
    encode: EncodeNode
    run: str = field(compare=False)
    """The unpatched run that it is, or starts from, as its experiment calls it."""
    writes: tuple[WriteNode, ...] = ()
    axes: tuple[Axis, ...] = field(default=(), hash=False)
    nested: LoopCells | None = field(default=None, hash=False)
    """Which values of loops go together, where not all do."""
    stop: int | None = None
    """How many blocks have to run; None is the whole model."""
    after: tuple[EffectNode, ...] = ()
    """Of other experiments, which say where this one acts (`top 3 of cie`)."""
    estimator: str = ""
    """What stands in for its cells, which aren't run then (`using`)."""
    on: ForwardNode | None = None
    """The run that has rules itself, or that an experiment's own run with rules acts on."""

    @property
    def cells(self) -> int:
        return cells_of(self.axes, self.nested)


@dataclass(frozen=True)
class ReplyNode:
    """What rows write behind their prompts, one pass for each token."""

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
    """What it reads, where it reads a reply."""
    measure: ResolvedMeasure = field(kw_only=True, compare=False, repr=False)
    """How it is computed, and at which token of every row."""
    observed: ResolvedRule | None = field(default=None, hash=False, repr=False)
    """The rule that says what is looked at in every cell."""


@dataclass(frozen=True)
class EffectNode:
    """How the metric of the patched run is set against the base and the source run."""

    kind: str
    patched: MeasureNode
    base: MeasureNode
    source: MeasureNode | None
    said: spec.Measure = field(compare=False, repr=False)


@dataclass(frozen=True)
class ReportNode:
    """What is shown of an experiment's effects."""

    experiment: str
    effects: tuple[EffectNode, ...]
    what: str
    of: ResolvedExperiment = field(compare=False, repr=False)
    """What its results say beside their values: its names, its seed, its statistics."""


@dataclass(frozen=True)
class ExpectNode:
    """What is expected of an experiment's effects."""

    experiment: str
    effects: tuple[EffectNode, ...]
    accuracies: tuple[MeasureNode, ...]
    condition: str
    of: ResolvedExperiment = field(compare=False, repr=False)


@dataclass(frozen=True)
class SaveNode:
    """Activations that go to a file."""

    experiment: str
    read: ReadNode
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


def inputs(node: Node) -> list[Node]:
    """The nodes that a node's fields hold: what must be there before it."""
    found: list[Node] = []
    for f in fields(node):
        value: Any = getattr(node, f.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Node):
                found.append(item)
    return found


def graph_of(leaves: Sequence[Node]) -> Graph:
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
    acting: dict[str, set[ForwardNode]] = {}
    for leaf in leaves(graph):
        assert leaf.effects, f"{leaf.experiment} shows nothing"
        found = acting.setdefault(leaf.experiment, set())
        found.update(effect.patched.forward for effect in leaf.effects)
    for experiment, passes in acting.items():
        assert len(passes) == 1, f"{experiment} is measured in several passes"


def highest_read(read: ReadNode) -> int | None:
    """How many blocks have to run before the read; None is the whole model."""
    needed = [stop_layer(*place, read.forward.n_layers) for place in read.places]
    return None if None in needed else max(n for n in needed if n is not None)


def rebuild(node: NodeT, change: Callable[[Node], Node]) -> NodeT:
    """The node with itself and all its inputs changed; the same one where nothing changes."""

    def swap(value: Any) -> Any:
        if isinstance(value, Node):
            return rebuild(value, change)
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


def leaves(graph: Graph) -> list[ReportNode | ExpectNode]:
    """What is asked for, in the order of the file."""
    return [node for node in graph if isinstance(node, (ReportNode, ExpectNode))]


def saves(graph: Graph) -> list[SaveNode]:
    """What is written to files, in the order of the file."""
    return [node for node in graph if isinstance(node, SaveNode)]


def rewritten(graph: Graph, change: Callable[[Node], Node]) -> Graph:
    """The graph with its nodes changed, and without those that nothing needs then."""
    return graph_of([rebuild(leaf, change) for leaf in (*leaves(graph), *saves(graph))])
