"""Places of the components and edges of a circuit: layers from bottom to top, few crossings.

A row contains the heads or the MLP of a layer. The edges of a sender with one sign share their
points in the rows that they pass. Graphviz sorts the rows and places what is in them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from mechdsl.base.text import count_noun
from mechdsl.results.experiment_result import TARGET_LABEL, ResultCircuit, ResultGraph
from mechdsl.show.graph import lay_out_graph

ComponentKind = Literal[
    "embed",
    "key-value",
    "head",
    "attention",
    "mlp",
    "neuron",
    "logits",
    "token",
    "feature",
    "supernode",
    "error",
    "logit",
]

_LABEL = re.compile(r"L(\d+)(?:H(\d+)(?:\.([qkv]))?|\.(?:mlp|(attn))|N(\d+))")

_STACK_LABEL = re.compile(
    r"(embed|z|q|k|v|mlp_\w+) (encoder|cross|vision)"
    r"(?: layer (\d+)(?: (?:head|neuron) (\d+))?)?"
)
"""An end of an edge in another stack: `z cross layer 0 head 1`."""

_MLP_ROW = 4
"""Row of the MLP in a layer, after keys and heads, and those of attention to an encoder."""

NODE_HEIGHT: Mapping[ComponentKind, float] = {
    "embed": 24,
    "key-value": 20,
    "head": 36,
    "attention": 24,
    "mlp": 24,
    "neuron": 24,
    "logits": 24,
    "token": 24,
    "feature": 24,
    "supernode": 24,
    "error": 24,
    "logit": 24,
}

NODE_GAP, BEND_WIDTH, ROW_GAP, MAX_ROW_GAP = 16, 5, 40, 110

EDGES_PER_GAP = 12
"""Number of edges between two rows that widens their gap by `ROW_GAP`."""


@dataclass(frozen=True)
class Component:
    """A box of the picture."""

    label: str
    """As in a file: `embed`, `L0H1`, `L1H0.k` for keys of several heads, `L1.mlp`, `logits`."""
    kind: ComponentKind
    level: tuple[int, int]
    """Its layer, and its row in the layer."""
    unit: int = 0
    said: str = ""
    """The text of the box; empty: made from the label."""
    group: int = 1
    """Number of heads that read a key or a value."""

    @property
    def title(self) -> str:
        return self.said or self.label.replace(".mlp", " MLP")

    @property
    def width(self) -> float:
        return max(52.0, 6.8 * len(self.title) + 12)


@dataclass(frozen=True)
class _Bend:
    """The point where the edges of a component with one sign pass a row."""

    of: Component
    is_negative: bool
    level: tuple[int, int]


_Place: TypeAlias = Component | _Bend

Pair: TypeAlias = tuple[Component, Component, bool]
"""Sender, receiver, and whether the score is negative."""


@dataclass(frozen=True)
class DrawnEdge:
    """An edge of a circuit with the components that it joins."""

    sender: Component
    receiver: Component
    reads: Literal["q", "k", "v"] | None
    """Which input of a head it enters."""
    text: str
    """As in a file: `embed -> L0H1.q`."""
    score: float | None

    @property
    def pair(self) -> Pair:
        """The components that it joins, and whether its score is below 0."""
        return self.sender, self.receiver, (self.score or 0.0) < 0


@dataclass
class CircuitLayout:
    """The components and edges of a picture, in pixels from the top left."""

    components: Mapping[Component, tuple[float, float]]
    """(x of the middle, y of the top) of each."""
    routes: Mapping[Pair, list[tuple[float, float, float]]]
    """(x, y where it enters, y where it leaves) of each place of an edge, from bottom to top."""
    shared: Sequence[tuple[Component, Component]]
    """Keys and values, with the heads that read them."""
    layers: Sequence[tuple[int, float, float]]
    """(layer, top, bottom)."""
    size: tuple[float, float]


@dataclass
class _Rows:
    """The places of each row, from bottom to top."""

    rows: list[list[_Place]] = field(default_factory=list[list[_Place]])
    routes: dict[Pair, list[_Place]] = field(default_factory=dict[Pair, list["_Place"]])


def join_supernodes(circuit: ResultCircuit) -> ResultCircuit:
    """Return a circuit with one node for the features of each supernode in each layer, and the sum
    of their edges.

    A node of several layers could have an edge from and to the same other node.
    """
    graph = circuit.graph
    if graph is None or not graph.supernodes:
        return circuit
    node_of = {node.label: node for node in graph.nodes}
    names: dict[str, str] = {}
    nodes = {node.label: node for node in graph.nodes}
    for name, labels in graph.supernodes:
        for label in labels:
            result = node_of[label]
            names[label] = joined = f"L{result.layer}.{name}"
            del nodes[label]
            count = sum(node_of[other].layer == result.layer for other in labels)
            text = f"{name} ({count_noun(count, 'node')})"
            nodes.setdefault(joined, replace(result, label=joined, kind="supernode", text=text))
    sums: dict[tuple[str, str], float] = {}
    for (of, to), score in zip(circuit.edges, circuit.scores, strict=True):
        pair = names.get(of, of), names.get(to, to)
        sums[pair] = sums.get(pair, 0.0) + score
    joined_graph = replace(graph, nodes=tuple(nodes.values()))
    return replace(circuit, edges=tuple(sums), scores=tuple(sums.values()), graph=joined_graph)


def join_positions(circuit: ResultCircuit) -> ResultCircuit:
    """Return a circuit with one edge for all positions of an edge, and its largest score."""
    if not circuit.places or len({*circuit.edges}) == len(circuit.edges):
        return circuit
    scores = circuit.scores or (0.0,) * len(circuit.edges)
    largest: dict[tuple[str, str], float] = {}
    places: dict[tuple[str, str], list[str]] = {}
    for edge, score, at in zip(circuit.edges, scores, circuit.places, strict=True):
        largest[edge] = max(score, largest.get(edge, 0.0), key=abs)
        places.setdefault(edge, []).append(at)
    joined = tuple(" and ".join(names) for names in places.values())
    own = tuple(largest.values()) if circuit.scores else ()
    return replace(circuit, edges=tuple(largest), scores=own, places=joined)


def list_edges(circuit: ResultCircuit, top: int | None) -> list[DrawnEdge]:
    """Return the edges, or the `top` ones with the largest absolute scores, these first."""
    scores = circuit.scores or (None,) * len(circuit.edges)
    places = circuit.places or ("",) * len(circuit.edges)
    listed = list(zip(circuit.edges, scores, places, strict=True))
    listed.sort(key=lambda each: -abs(each[1] or 0.0))
    edges: list[DrawnEdge] = []
    for (of, to), score, at in listed[:top]:
        receiver, reads = _component(to, circuit)
        if to == "embed":  # the projector reads the end of a vision encoder
            receiver = Component(to, "logits", (circuit.layers, 0))
        text = f"{of} -> {to} at {at}" if at else f"{of} -> {to}"
        edges.append(DrawnEdge(_component(of, circuit)[0], receiver, reads, text, score))
    return edges


def _component(
    label: str, circuit: ResultCircuit
) -> tuple[Component, Literal["q", "k", "v"] | None]:
    """Return the box of one end of an edge, and the input of a head."""
    if circuit.graph is not None:
        return _graph_component(label, circuit.graph, circuit.layers), None
    if label == "embed":
        return Component(label, "embed", (-1, 0)), None
    layers = dict(circuit.features)
    if label in layers:
        row = 1 if circuit.parallel else 3
        level = layers[label], 2 if label in circuit.of_attention else row
        *_, number, _, _ = label.split(" ")
        return Component(label, "feature", level, int(number)), None
    stacked = _STACK_LABEL.fullmatch(label)
    if stacked is not None:
        return _stack_component(stacked, circuit)
    match = _LABEL.fullmatch(label)
    if match is None:
        return Component("logits", "logits", (circuit.layers, 0)), None
    layer = int(match[1])
    if match[2] is None:
        level = layer, 1 if circuit.parallel else _MLP_ROW
        if match[4] is not None:  # the rest of the output of attention
            return Component(label, "attention", (layer, 2), said=f"L{layer} attention"), None
        if match[5] is not None:
            return Component(label, "neuron", level, int(match[5])), None
        return Component(label, "mlp", level), None
    unit, reads = int(match[2]), match[3]
    if reads in ("k", "v") and (group := circuit.groups[""][layer]) > 1:
        return Component(label, "key-value", (layer, 0), unit, group=group), None
    of: Literal["q", "k", "v"] | None = None
    if reads is not None:
        of = "q" if reads == "q" else "k" if reads == "k" else "v"
    return Component(f"L{layer}H{unit}", "head", (layer, 1), unit), of


def _stack_component(
    match: re.Match[str], circuit: ResultCircuit
) -> tuple[Component, Literal["q", "k", "v"] | None]:
    """Return the box of one end of an edge in another stack, and the input of a head. An encoder is
    below the decoder, and its attention in a layer is above that of the decoder."""
    site, stack, layer, unit = match.groups()
    component = int(layer or -1)
    if stack == "encoder":  # its embedding and layers, then the embedding of the decoder at -1
        ends = (each for edge in circuit.edges for each in edge)
        matches = (_STACK_LABEL.fullmatch(end) for end in ends)
        layers = [int(each[3]) for each in matches if each and each[2] == stack and each[3]]
        component -= max(layers, default=-1) + 2
    first = 2 if stack == "cross" else 0
    if site == "embed":
        return Component(match[0], "embed", (component, 0)), None
    if unit is None:
        label = f"mlp_out {stack} layer {layer}"
        return Component(label, "mlp", (component, _MLP_ROW), said=f"{stack} L{layer} MLP"), None
    if site == "mlp_hidden":
        said = f"{stack} L{layer}N{unit}"
        return Component(match[0], "neuron", (component, _MLP_ROW), int(unit), said), None
    if site in ("k", "v") and (group := circuit.groups[stack][int(layer)]) > 1:
        said, level = f"{stack} L{layer}H{unit}.{site}", (component, first)
        return Component(match[0], "key-value", level, int(unit), said, group), None
    of: Literal["q", "k", "v"] | None = None
    if site != "z":
        of = "q" if site == "q" else "k" if site == "k" else "v"
    label, said = f"z {stack} layer {layer} head {unit}", f"{stack} L{layer}H{unit}"
    return Component(label, "head", (component, first + 1), int(unit), said), of


def _graph_component(label: str, graph: ResultGraph, layers: int) -> Component:
    """Return the box of a node of an attribution graph."""
    node = next(result for result in graph.nodes if result.label == label)
    level = {"token": (-1, 0), "logit": (layers, 0)}.get(node.kind, (node.layer, 0))
    text = node.text.strip() or repr(node.text)
    said = {
        "token": f"{text} ({node.token})",
        "logit": text if label == TARGET_LABEL else f"{text} {node.amount:.0%}",
        "feature": f"f{node.number} at {text} ({node.token})",
        "supernode": node.text,
        "error": f"error at {text} ({node.token})",
    }[node.kind]
    return Component(label, node.kind, level, node.token, said)


def lay_out(circuit: ResultCircuit, edges: Sequence[DrawnEdge]) -> CircuitLayout:
    """Place the components of some edges."""
    ends = [end for edge in edges for end in (edge.sender, edge.receiver)]
    components = sorted(
        dict.fromkeys(ends),
        key=lambda component: (component.level, component.unit, component.label),
    )
    shared = [
        (component, head)
        for component in components
        if component.kind == "key-value"
        for head in components
        if head.kind == "head"
        and head.level == (component.level[0], component.level[1] + 1)
        and head.unit // component.group == component.unit
    ]
    pairs = dict.fromkeys(edge.pair for edge in edges)
    made = _list_rows(components, pairs)
    across = _spread(made, shared)
    left = min(x - _width(place) / 2 for place, x in across.items())
    right = max(x + _width(place) / 2 for place, x in across.items())
    tops, bottoms, height = _heights(made)
    levels = sorted({component.level for component in components})
    number = {level: n for n, level in enumerate(levels)}

    def stop(place: _Place) -> tuple[float, float, float]:
        row = number[place.level]
        return across[place] - left, bottoms[row], tops[row]

    def top_of(component: Component) -> float:
        row = number[component.level]
        return (tops[row] + bottoms[row] - NODE_HEIGHT[component.kind]) / 2

    routes: dict[Pair, list[tuple[float, float, float]]] = {}
    for (of, to, is_negative), route in made.routes.items():
        end = top_of(to) + NODE_HEIGHT[to.kind]
        middle = [stop(place) for place in route[1:-1]]
        start = (across[of] - left, top_of(of), top_of(of))
        routes[of, to, is_negative] = [start, *middle, (across[to] - left, end, end)]
    layers = sorted({level[0] for level in levels if 0 <= level[0] < circuit.layers})
    bands = [
        (
            layer,
            min(tops[number[level]] for level in levels if level[0] == layer),
            max(bottoms[number[level]] for level in levels if level[0] == layer),
        )
        for layer in layers
    ]
    placed = {component: (across[component] - left, top_of(component)) for component in components}
    return CircuitLayout(placed, routes, shared, bands, (right - left, height))


def _list_rows(components: Sequence[Component], pairs: Mapping[Pair, None]) -> _Rows:
    """Return the places of each row, and those of each edge."""
    levels = sorted({component.level for component in components})
    made = _Rows(
        [[component for component in components if component.level == level] for level in levels]
    )
    number = {level: n for n, level in enumerate(levels)}
    for of, to, is_negative in pairs:
        passed = levels[number[of.level] + 1 : number[to.level]]
        bends = [_Bend(of, is_negative, level) for level in passed]
        for bend in bends:
            if bend not in made.rows[number[bend.level]]:
                made.rows[number[bend.level]].append(bend)
        made.routes[of, to, is_negative] = [of, *bends, to]
    return made


def _spread(made: _Rows, shared: Sequence[tuple[Component, Component]]) -> dict[_Place, float]:
    """Return x of the middle of each place."""
    layout = lay_out_graph(
        {place: (_width(place), 0.0) for row in made.rows for place in row},
        [
            *(pair for route in made.routes.values() for pair in itertools.pairwise(route)),
            *shared,
        ],
        rows=made.rows,
        curved=False,
    )
    return {place: x for place, (x, _) in layout.centres.items()}


def _width(place: _Place) -> float:
    return BEND_WIDTH if isinstance(place, _Bend) else place.width + NODE_GAP


def _heights(made: _Rows) -> tuple[list[float], list[float], float]:
    """Return the top and the bottom of each row, and the height of all; row 0 is at the bottom."""
    heights = [
        max(NODE_HEIGHT[place.kind] for place in row if isinstance(place, Component))
        for row in made.rows
    ]
    number = {place: n for n, row in enumerate(made.rows) for place in row}
    passing = [0] * len(made.rows)
    for route in made.routes.values():
        for place in route[1:]:
            passing[number[place]] += 1
    tops, bottoms, y = [0.0] * len(heights), [0.0] * len(heights), 0.0
    for row in reversed(range(len(heights))):
        tops[row], bottoms[row] = y, y + heights[row]
        y += heights[row] + min(MAX_ROW_GAP, ROW_GAP * (1 + passing[row] / EDGES_PER_GAP / 4))
    return tops, bottoms, bottoms[0]
