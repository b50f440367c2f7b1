"""The intervention graph as DOT, Mermaid, SVG or text, and the layout of graphs by Graphviz."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

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


# --- layout ---------------------------------------------------------------------------------------

NodeT = TypeVar("NodeT", bound=Hashable)

Point: TypeAlias = tuple[float, float]

_POINTS_PER_INCH = 72
"""Graphviz has sizes in inches and places in points; a point is a pixel here."""


@dataclass(frozen=True)
class Layout(Generic[NodeT]):
    """Places in pixels from the top left."""

    centres: Mapping[NodeT, Point]
    """The middle of each node."""
    curves: Mapping[tuple[NodeT, NodeT], Sequence[Point]]
    """The control points of each edge: its start, then three for each cubic Bézier curve."""
    size: Point


def lay_out_graph(
    sizes: Mapping[NodeT, Point],
    edges: Iterable[tuple[NodeT, NodeT]],
    *,
    rows: Iterable[Sequence[NodeT]] = (),
    gaps: Point = (0.0, 0.0),
    curved: bool = True,
) -> Layout[NodeT]:
    """Place nodes in rows from top to bottom, so that edges cross and bend as little as possible.

    Args:
        sizes: Width and height of each node, in pixels.
        edges: Pairs of nodes; an edge leads downwards.
        rows: Nodes that are in one row; those that are in none are placed by their edges.
        gaps: Pixels between two nodes of a row, and between two rows.
        curved: Whether to compute the curves of edges.

    References:
        Gansner et al. 1993, "A technique for drawing directed graphs".
    """
    import pygraphviz

    names = {node: f"n{number}" for number, node in enumerate(sizes)}
    across, down = (gap / _POINTS_PER_INCH for gap in gaps)
    graph: Any = pygraphviz.AGraph(
        directed=True, nodesep=across, ranksep=down, splines=str(curved).lower()
    )
    for node, (width, height) in sizes.items():
        graph.add_node(
            names[node],
            shape="box",
            fixedsize="true",
            label="",
            width=width / _POINTS_PER_INCH,
            height=height / _POINTS_PER_INCH,
        )
    for row in rows:
        graph.add_subgraph([names[node] for node in row], rank="same")
    pairs = list(dict.fromkeys(edges))
    for start, end in pairs:
        graph.add_edge(names[start], names[end])
    graph.layout("dot")
    _, _, right, top = (float(each) for each in graph.graph_attr["bb"].split(","))

    def point(written: str) -> Point:
        x, y = written.split(",")
        return float(x), top - float(y)

    centres = {node: point(graph.get_node(name).attr["pos"]) for node, name in names.items()}
    curves: dict[tuple[NodeT, NodeT], Sequence[Point]] = {}
    for start, end in pairs if curved else ():
        tip, *points = graph.get_edge(names[start], names[end]).attr["pos"].split()
        curves[start, end] = [*map(point, points), point(tip.removeprefix("e,"))]
    return Layout(centres, curves, (right, top))


# --- SVG ------------------------------------------------------------------------------------------

LINE_HEIGHT, CHARACTER_WIDTH, PADDING, GAP_X, GAP_Y, MARGIN = 16, 6.7, 9, 22, 46, 20

WRAP_CHARACTERS = 32


def to_svg(graph: Graph) -> str:
    """Draw the graph as SVG: edges lead downwards."""
    names = _node_names(graph)
    texts = {node: _lines(node) for node in names}
    sizes = {node: _size(lines) for node, lines in texts.items()}
    layout = lay_out_graph(sizes, _edges(graph, names), gaps=(GAP_X, GAP_Y))
    width, height = (side + 2 * MARGIN for side in layout.size)
    shapes = [_curve(points) for points in layout.curves.values()]
    shapes += [_rectangle(node, texts[node], layout.centres[node], sizes[node]) for node in names]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="Liberation Sans, Arial, Helvetica, sans-serif" font-size="12">\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#888"/></marker></defs>\n'
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>\n'
        f'<g transform="translate({MARGIN},{MARGIN})">\n' + "\n".join(shapes) + "\n</g>\n</svg>\n"
    )


def _lines(node: Node) -> list[str]:
    first, *others = describe_node(node)
    wrap = textwrap.TextWrapper(WRAP_CHARACTERS, break_on_hyphens=False).wrap
    return [first, *(line for other in others for line in wrap(other))]


def _size(lines: Sequence[str]) -> tuple[float, float]:
    """Return the width and the height of a box with this text."""
    width = max(len(line) for line in lines) * CHARACTER_WIDTH + 2 * PADDING
    return width, len(lines) * LINE_HEIGHT + 2 * PADDING


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """Draw an edge; see `mechdsl.show.graphviz.Layout.curves`."""
    start, *others = (f"{x:.1f},{y:.1f}" for x, y in points)
    path = f"M{start} C{' '.join(others[:-1])} L{others[-1]}"
    return f'<path d="{path}" fill="none" stroke="#888" marker-end="url(#arrow)"/>'


def _rectangle(
    node: Node, lines: Sequence[str], centre: tuple[float, float], size: tuple[float, float]
) -> str:
    (x, y), (width, height) = centre, size
    left, top = x - width / 2, y - height / 2
    texts = "".join(
        f'<text x="{left + PADDING:.1f}" y="{top + PADDING + LINE_HEIGHT * (i + 0.78):.1f}" '
        f'font-weight="{"bold" if i == 0 else "normal"}">{escape_xml(line)}</text>'
        for i, line in enumerate(lines)
    )
    return (
        f'<g><rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" rx="6" fill="{COLOURS[type(node)]}" stroke="#999"/>{texts}</g>'
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
