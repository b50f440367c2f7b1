"""The intervention graph as DOT, Mermaid or SVG, with a plain layered layout."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias, TypeVar

import networkx as nx

from mechdsl.base.text import count_noun, escape_hidden, escape_xml
from mechdsl.planner.graph import (
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
    SaveNode,
    TransformNode,
    WriteNode,
)
from mechdsl.planner.passes import add_save_nodes, build_file_graph, rewrite_graph
from mechdsl.resolve.types import ResolvedExperiment, ResolvedRule, SiteLayer

COLOURS: Mapping[type, str] = {
    EncodeNode: "#e8eef7",
    ForwardNode: "#fde9d0",
    ReadNode: "#e3f3e6",
    DirectionNode: "#e6eaf5",
    TransformNode: "#f3e6f5",
    WriteNode: "#fbdcdc",
    ReplyNode: "#e8e4f4",
    MeasureNode: "#e0f2f4",
    EffectNode: "#fff6cc",
    ReportNode: "#eeeeee",
    ExpectNode: "#eeeeee",
    SaveNode: "#eeeeee",
}


def describe_node(node: Node) -> list[str]:
    """Describe a node: its type first, then a few short lines."""
    return [escape_hidden(line) for line in _describe(node)]


def _describe(node: Node) -> list[str]:
    match node:
        case EncodeNode():
            name = node.prompts if node.part is None else f"{node.prompts}.{node.part}"
            limit = "" if node.limit is None else f" limit {node.limit}"
            lines = [f"{name}{limit}", f"run {node.run}"]
            lines += [f"with {node.replies}"] if node.replies else []
            lines += [f"keep {condition}" for condition in node.keep]
            lines += [f"replace {node.replaced}"] if node.replaced else []
            return ["Encode", *lines]
        case ForwardNode():
            sweep = " × ".join(f"{axis.name} {len(axis)}" for axis in node.axes)
            lines = [f"{node.model} on {node.encode.run}"]
            if node.on is not None:
                own = node.run != node.on.run
                lines += [f"run {node.run}, rules on {node.on.run}" if own else f"from {node.run}"]
            lines += [f"{sweep} = {count_noun(node.cells, 'cell')}"] if node.axes else []
            lines += [f"first {count_noun(node.stop, 'block')}"] if node.stop is not None else []
            if node.estimator:
                return ["Estimate", node.estimator, *lines]
            return ["Forward", *lines]
        case ReadNode():
            return ["Read", _position_text(node.places), f"at {node.at}"]
        case DirectionNode():
            return [node.what.capitalize(), node.name, node.made]
        case TransformNode():
            return ["Transform", f"{node.kind} {node.detail}".strip()]
        case WriteNode():
            return ["Write", _target_text(node), f"at {node.at}", *_step_text(node)]
        case ReplyNode():
            return ["Generate", node.how]
        case MeasureNode():
            return [
                "Measure",
                node.metric,
                f"at {node.at}" if node.reply is None else "of the reply",
            ]
        case EffectNode():
            return ["Effect", node.kind]
        case ReportNode():
            return ["Report", node.experiment, node.what]
        case ExpectNode():
            return ["Expect", node.experiment, node.condition]
        case SaveNode():
            return ["Save", node.experiment, f"to {node.file}"]


def _step_text(node: WriteNode) -> list[str]:
    """Describe the steps in which a rule acts, unless it acts in every step."""
    during = node.by.spec.during if isinstance(node.by, ResolvedRule) else None
    return [] if during is None else [" ".join(during.span.written.split())]


def _target_text(node: WriteNode) -> str:
    """Return the first and the last target of the cells: `L0H0.z … L3H3.z`."""
    if not isinstance(node.by, ResolvedRule):
        return _position_text(node.places)
    assert node.by.sites is not None
    labels = list(node.by.sites.labels.values())
    if node.by.path is not None:
        labels += node.by.path.receivers.labels.values()
    return labels[0] if len(labels) == 1 else f"{labels[0]} … {labels[-1]}"


def _position_text(places: Sequence[SiteLayer]) -> str:
    site = ", ".join(dict.fromkeys(site for site, _ in places))
    layers = tuple(sorted({layer for _, layer in places if layer is not None}))
    if not layers:
        return site
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{site} layers {layers[0]}..{layers[-1]}"
    return f"{site} layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _node_names(graph: Graph) -> dict[Node, str]:
    """Return a short name per node, in topological order."""
    order = nx.lexicographical_topological_sort(
        graph, key=lambda node: "\n".join(describe_node(node))
    )
    return {node: f"n{number}" for number, node in enumerate(order)}


def to_text(graph: Graph) -> str:
    """Format the graph as text: each node indented, with its inputs."""
    names = _node_names(graph)
    lines: list[str] = []
    for node, name in names.items():
        waits = sorted((names[n] for n in graph.predecessors(node)), key=lambda n: int(n[1:]))
        after = f"  ← {', '.join(waits)}" if waits else ""
        lines.append(f"{name:>4}  {' · '.join(describe_node(node))}{after}")
    return "\n".join(lines) + "\n"


def to_dot(graph: Graph) -> str:
    """Format the graph as Graphviz DOT."""
    names = _node_names(graph)
    lines = ["digraph mechdsl {", "  rankdir=TB;", '  node [shape=box, style="rounded,filled"];']
    for node, name in names.items():
        label = "\\n".join(
            part.replace("\\", "\\\\").replace('"', '\\"') for part in describe_node(node)
        )
        lines.append(f'  {name} [label="{label}", fillcolor="{COLOURS[type(node)]}"];')
    lines.extend(f"  {names[a]} -> {names[b]};" for a, b in _edges(graph, names))
    return "\n".join([*lines, "}"]) + "\n"


def to_mermaid(graph: Graph) -> str:
    """Format the graph as a Mermaid flow chart."""
    names = _node_names(graph)
    lines = ["flowchart TD"]
    for node, name in names.items():
        label = "<br/>".join(
            escape_xml(part).replace("&quot;", "#quot;") for part in describe_node(node)
        )
        lines.append(f'  {name}["{label}"]')
    lines.extend(f"  {names[a]} --> {names[b]}" for a, b in _edges(graph, names))
    for kind, colour in COLOURS.items():
        members = ",".join(name for node, name in names.items() if isinstance(node, kind))
        if members:
            style = kind.__name__.removesuffix("Node")
            lines.append(f"  classDef {style} fill:{colour},stroke:#888,color:#222")
            lines.append(f"  class {members} {style}")
    return "\n".join(lines) + "\n"


def _edges(graph: Graph, names: Mapping[Node, str]) -> list[tuple[Node, Node]]:
    return sorted(graph.edges, key=lambda edge: (int(names[edge[0]][1:]), int(names[edge[1]][1:])))


# --- SVG ------------------------------------------------------------------------------------------

LINE_HEIGHT, CHARACTER_WIDTH, PADDING, GAP_X, GAP_Y, MARGIN = 16, 6.7, 9, 22, 46, 20

WRAP_CHARACTERS = 32


@dataclass(frozen=True)
class _Bend:
    """The point where an edge passes a layer between two boxes instead of crossing them."""

    start: Node
    end: Node
    level: int


_Position: TypeAlias = Node | _Bend

_PlaceT = TypeVar("_PlaceT")


@dataclass
class _Box:
    lines: list[str]
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    floor: float = 0.0
    """Bottom of its layer; edges bend below it."""


def to_svg(graph: Graph) -> str:
    """Draw the graph as SVG: layers from top to bottom, each sorted by the position of inputs."""
    names = _node_names(graph)
    layers: list[list[_Position]] = [[*layer] for layer in _layers(graph, names)]
    routes = _routes(layers, _edges(graph, names))
    before: dict[_Position, list[_Position]] = {place: [] for layer in layers for place in layer}
    after: dict[_Position, list[_Position]] = {place: [] for layer in layers for place in layer}
    for route in routes:
        for upper, lower in pairwise(route):
            before[lower].append(upper)
            after[upper].append(lower)
    for _ in range(4):
        reorder_layers(layers, before)
        reorder_layers(layers[::-1], after)
    boxes = {place: _box(place) for layer in layers for place in layer}
    widths = [sum(boxes[n].width + GAP_X for n in layer) - GAP_X for layer in layers]
    width = max(widths, default=0) + 2 * MARGIN
    y: float = MARGIN
    for layer, own in zip(layers, widths, strict=True):
        x = (width - own) / 2
        height = max(boxes[n].height for n in layer)
        for place in layer:
            boxes[place].x, boxes[place].y, boxes[place].floor = x, y, y + height
            x += boxes[place].width + GAP_X
        y += height + GAP_Y
    height = y - GAP_Y + MARGIN
    shapes = [_line([boxes[place] for place in route]) for route in routes]
    shapes += [_rectangle(node, boxes[node]) for node in names]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="Liberation Sans, Arial, Helvetica, sans-serif" font-size="12">\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#888"/></marker></defs>\n'
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def _box(place: _Position) -> _Box:
    """Return the size of a node with its text; a passing edge needs little space."""
    if isinstance(place, _Bend):
        return _Box([], 0, 0)
    parts = describe_node(place)
    lines = [parts[0], *(line for part in parts[1:] for line in _wrap_text(part))]
    width = max(len(line) for line in lines) * CHARACTER_WIDTH + 2 * PADDING
    return _Box(lines, width, len(lines) * LINE_HEIGHT + 2 * PADDING)


def _wrap_text(text: str) -> list[str]:
    return textwrap.wrap(text, WRAP_CHARACTERS, break_on_hyphens=False)


def _layers(graph: Graph, names: Mapping[Node, str]) -> list[list[Node]]:
    """Sort nodes by depth, but as low as their dependents allow, so that edges are short."""
    layers: list[list[Node]] = list(nx.topological_generations(graph))
    level = {node: number for number, layer in enumerate(layers) for node in layer}
    for layer in reversed(layers):
        for node in layer:
            below = [level[after] for after in graph.successors(node)]
            if below:
                level[node] = min(below) - 1
    found: list[list[Node]] = [[] for _ in layers]
    for layer in layers:
        for node in layer:
            found[level[node]].append(node)
    return [sorted(layer, key=lambda node: int(names[node][1:])) for layer in found if layer]


def _routes(layers: list[list[_Position]], edges: list[tuple[Node, Node]]) -> list[list[_Position]]:
    """Return the points that each edge passes, and add its bends to the layers in between."""
    level = {place: number for number, layer in enumerate(layers) for place in layer}
    routes: list[list[_Position]] = []
    for start, end in edges:
        bends = [_Bend(start, end, number) for number in range(level[start] + 1, level[end])]
        for bend in bends:
            layers[bend.level].append(bend)
        routes.append([start, *bends, end])
    return routes


def reorder_layers(
    layers: Sequence[list[_PlaceT]], neighbours: Mapping[_PlaceT, list[_PlaceT]]
) -> None:
    """Sort each layer by the mean position of its neighbours in the preceding layers."""
    where: dict[_PlaceT, float] = {}
    for layer in layers:
        wanted: dict[_PlaceT, float] = {}
        for number, place in enumerate(layer):
            known = [where[n] for n in neighbours.get(place, ()) if n in where]
            wanted[place] = sum(known) / len(known) if known else number / len(layer)
        layer.sort(key=wanted.__getitem__)  # stable for equal positions
        for number, place in enumerate(layer):
            where[place] = (number + 0.5) / len(layer)


def route_path(stops: Sequence[tuple[float, float, float]]) -> str:
    """Return the path of an edge as SVG: curves between stops, and a line through each.

    Args:
        stops: (x, y where the edge enters, y where it leaves) of each place.
    """
    x, enters, y = stops[0]
    path = f"M{x:.1f},{enters:.1f} L{x:.1f},{y:.1f}"
    for to, enters, leaves in stops[1:]:
        half = (enters - y) / 2
        path += f" C{x:.1f},{y + half:.1f} {to:.1f},{enters - half:.1f} {to:.1f},{enters:.1f}"
        path += "" if enters == leaves else f" L{to:.1f},{leaves:.1f}"
        x, y = to, leaves
    return path


def _line(boxes: list[_Box]) -> str:
    """Draw an edge from the first box to the last, straight through the layers in between."""
    first, *others = boxes
    stops = [(first.x + first.width / 2, first.y + first.height, first.floor)]
    stops += [(box.x + box.width / 2, box.y, box.floor) for box in others[:-1]]
    stops += [(box.x + box.width / 2, box.y - 2, box.y - 2) for box in others[-1:]]
    path = route_path(stops)
    return f'<path d="{path}" fill="none" stroke="#888" marker-end="url(#arrow)"/>'


def _rectangle(node: Node, box: _Box) -> str:
    texts = "".join(
        f'<text x="{box.x + PADDING:.1f}" y="{box.y + PADDING + LINE_HEIGHT * (i + 0.78):.1f}" '
        f'font-weight="{"bold" if i == 0 else "normal"}">{escape_xml(line)}</text>'
        for i, line in enumerate(box.lines)
    )
    return (
        f'<g><rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="6" fill="{COLOURS[type(node)]}" stroke="#999"/>{texts}</g>'
    )


GRAPH_FORMATS: Mapping[str, Callable[[Graph], str]] = {
    "dot": to_dot,
    "mermaid": to_mermaid,
    "svg": to_svg,
    "text": to_text,
}
"""Drawing functions by format."""


def draw_graph(
    experiments: Sequence[ResolvedExperiment],
    saving: Sequence[ResolvedExperiment],
    form: str,
    *,
    before: bool,
) -> str:
    """Draw the graph of a file in one of `GRAPH_FORMATS`.

    Args:
        saving: Experiments with `save` lines.
        before: Draw the graph before the planner's passes.
    """
    made = add_save_nodes(build_file_graph(experiments), saving)
    if not before:
        made, _ = rewrite_graph(made)
    return GRAPH_FORMATS[form](made)
