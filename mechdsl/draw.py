"""The intervention graph as DOT, Mermaid or SVG, with a plain layered layout."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape

import networkx as nx

from mechdsl.graph import (
    Effect,
    Encode,
    Expect,
    Forward,
    Graph,
    Measure,
    Node,
    Read,
    Report,
    Transform,
    Write,
)

COLOURS: Mapping[type, str] = {
    Encode: "#e8eef7",
    Forward: "#fde9d0",
    Read: "#e3f3e6",
    Transform: "#f3e6f5",
    Write: "#fbdcdc",
    Measure: "#e0f2f4",
    Effect: "#fff6cc",
    Report: "#eeeeee",
    Expect: "#eeeeee",
}


def describe(node: Node) -> list[str]:
    """What a node says: its kind first, then a few short lines."""
    match node:
        case Encode():
            name = node.prompts if node.part is None else f"{node.prompts}.{node.part}"
            limit = "" if node.limit is None else f" limit {node.limit}"
            lines = [f"{name}{limit}", f"run {node.run}"]
            lines += [f"keep {condition}" for condition in node.keep]
            lines += [f"replace {node.replaced}"] if node.replaced else []
            return ["Encode", *lines]
        case Forward():
            sweep = " × ".join(f"{name} {size}" for name, size in node.axes)
            lines = [f"{node.model} on {node.encode.run}"]
            lines += [f"{sweep} = {node.cells} cells"] if node.axes else []
            lines += [f"first {node.stop} blocks"] if node.stop is not None else []
            return ["Forward", *lines]
        case Read():
            return ["Read", _site(node.site, node.layers), f"at {node.positions}"]
        case Transform():
            return ["Transform", f"{node.kind} {node.detail}".strip()]
        case Write():
            where = node.targets or _site(node.site, node.layers)
            return ["Write", where, f"at {node.positions}"]
        case Measure():
            return ["Measure", node.metric, f"at {node.at}"]
        case Effect():
            return ["Effect", node.kind]
        case Report():
            return ["Report", node.experiment, node.what]
        case Expect():
            return ["Expect", node.experiment, node.condition]


def _site(site: str, layers: tuple[int, ...]) -> str:
    if not layers:
        return site
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{site} layers {layers[0]}..{layers[-1]}"
    return f"{site} layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _numbered(graph: Graph) -> dict[Node, str]:
    """A short name per node, in the order of the data."""
    order = nx.lexicographical_topological_sort(graph, key=lambda node: "\n".join(describe(node)))
    return {node: f"n{number}" for number, node in enumerate(order)}


def to_text(graph: Graph) -> str:
    """Each node, indented, with what it waits for."""
    names = _numbered(graph)
    lines: list[str] = []
    for node, name in names.items():
        waits = sorted((names[n] for n in graph.predecessors(node)), key=lambda n: int(n[1:]))
        after = f"  ← {', '.join(waits)}" if waits else ""
        lines.append(f"{name:>4}  {' · '.join(describe(node))}{after}")
    return "\n".join(lines) + "\n"


def to_dot(graph: Graph) -> str:
    """Graphviz DOT."""
    names = _numbered(graph)
    lines = ["digraph mechdsl {", "  rankdir=TB;", '  node [shape=box, style="rounded,filled"];']
    for node, name in names.items():
        label = "\\n".join(
            part.replace("\\", "\\\\").replace('"', '\\"') for part in describe(node)
        )
        lines.append(f'  {name} [label="{label}", fillcolor="{COLOURS[type(node)]}"];')
    lines.extend(f"  {names[a]} -> {names[b]};" for a, b in _edges(graph, names))
    return "\n".join([*lines, "}"]) + "\n"


def to_mermaid(graph: Graph) -> str:
    """A Mermaid flow chart."""
    names = _numbered(graph)
    lines = ["flowchart TD"]
    for node, name in names.items():
        label = "<br/>".join(escape(part).replace("&quot;", "#quot;") for part in describe(node))
        lines.append(f'  {name}["{label}"]')
    lines.extend(f"  {names[a]} --> {names[b]}" for a, b in _edges(graph, names))
    for kind, colour in COLOURS.items():
        members = ",".join(name for node, name in names.items() if isinstance(node, kind))
        if members:
            lines.append(f"  classDef {kind.__name__} fill:{colour},stroke:#888,color:#222")
            lines.append(f"  class {members} {kind.__name__}")
    return "\n".join(lines) + "\n"


def _edges(graph: Graph, names: Mapping[Node, str]) -> list[tuple[Node, Node]]:
    return sorted(graph.edges, key=lambda edge: (int(names[edge[0]][1:]), int(names[edge[1]][1:])))


# --- SVG ------------------------------------------------------------------------------------------

LINE, CHARACTER, PADDING, GAP_X, GAP_Y, MARGIN = 16, 6.7, 9, 22, 46, 20
WRAP = 30


@dataclass
class _Box:
    lines: list[str]
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0


def to_svg(graph: Graph) -> str:
    """Layers from top to bottom, each ordered by where its inputs stand."""
    names = _numbered(graph)
    boxes: dict[Node, _Box] = {}
    for node in names:
        parts = describe(node)
        lines = [parts[0], *(line for part in parts[1:] for line in textwrap.wrap(part, WRAP))]
        width = max(len(line) for line in lines) * CHARACTER + 2 * PADDING
        boxes[node] = _Box(lines, width, len(lines) * LINE + 2 * PADDING)
    layers = [
        sorted(layer, key=lambda node: int(names[node][1:]))
        for layer in nx.topological_generations(graph)
    ]
    layers = _pulled_down(graph, layers)
    for _ in range(4):
        _reorder(layers, graph.predecessors)
        _reorder(layers[::-1], graph.successors)
    widths = [sum(boxes[n].width + GAP_X for n in layer) - GAP_X for layer in layers]
    width = max(widths, default=0) + 2 * MARGIN
    y: float = MARGIN
    for layer, own in zip(layers, widths, strict=True):
        x = (width - own) / 2
        for node in layer:
            boxes[node].x, boxes[node].y = x, y
            x += boxes[node].width + GAP_X
        y += max(boxes[n].height for n in layer) + GAP_Y
    height = y - GAP_Y + MARGIN
    shapes = [_line(boxes[a], boxes[b]) for a, b in _edges(graph, names)]
    shapes += [_rectangle(node, box) for node, box in boxes.items()]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif" '
        'font-size="12">\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#888"/></marker></defs>\n'
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def _pulled_down(graph: Graph, layers: list[list[Node]]) -> list[list[Node]]:
    """Nodes moved as low as what waits for them allows, so that edges are short."""
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
    return [layer for layer in found if layer]


def _reorder(layers: list[list[Node]], neighbours: Callable[[Node], object]) -> None:
    """Sort each layer by the mean place of its neighbours in the layers before it."""
    place: dict[Node, float] = {}
    for layer in layers:

        def mean(node: Node, fallback: dict[Node, int]) -> float:
            known = [place[n] for n in neighbours(node) if n in place]  # type: ignore[union-attr]
            return sum(known) / len(known) if known else fallback[node] / max(len(fallback), 1)

        order = {node: number for number, node in enumerate(layer)}
        layer.sort(key=lambda node: (mean(node, order), order[node]))
        for number, node in enumerate(layer):
            place[node] = (number + 0.5) / len(layer)


def _line(a: _Box, b: _Box) -> str:
    x1, y1, x2, y2 = a.x + a.width / 2, a.y + a.height, b.x + b.width / 2, b.y
    bend = (y2 - y1) / 2
    return (
        f'<path d="M{x1:.1f},{y1:.1f} C{x1:.1f},{y1 + bend:.1f} {x2:.1f},{y2 - bend:.1f} '
        f'{x2:.1f},{y2 - 2:.1f}" fill="none" stroke="#888" marker-end="url(#arrow)"/>'
    )


def _rectangle(node: Node, box: _Box) -> str:
    texts = "".join(
        f'<text x="{box.x + PADDING:.1f}" y="{box.y + PADDING + LINE * (i + 0.78):.1f}" '
        f'font-weight="{"bold" if i == 0 else "normal"}">{escape(line)}</text>'
        for i, line in enumerate(box.lines)
    )
    return (
        f'<g><rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="6" fill="{COLOURS[type(node)]}" stroke="#999"/>{texts}</g>'
    )
