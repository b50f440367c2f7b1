"""`report graph`: the circuit of an experiment, drawn as a graph or written as JSON.

Layers are drawn from bottom to top, and edges lead upwards. The width of an edge is its score: blue
above 0 and red below, as in maps; edges without scores are grey and of equal width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.text import Text

from mechdsl.base.text import count_noun, dump_json, escape_xml
from mechdsl.program import spec
from mechdsl.results.experiment_result import (
    ExperimentResult,
    ResultCircuit,
    ResultGraph,
    ResultNode,
)
from mechdsl.show.reports.canvas import FONT, INK, QUIET_INK, Canvas, text_width
from mechdsl.show.reports.circuit_layout import (
    NODE_HEIGHT,
    CircuitLayout,
    Component,
    ComponentKind,
    DrawnEdge,
    join_positions,
    join_supernodes,
    lay_out,
    list_edges,
)
from mechdsl.show.reports.colours import NEGATIVE_COLOUR, POSITIVE_COLOUR
from mechdsl.show.reports.overlay_pages import css_colour
from mechdsl.show.reports.text import map_format, print_conventions, print_notes

MAX_EDGES = 200
"""Edges in a report without `top n`: those with the largest absolute scores."""

LISTED_EDGES = 20
"""Edges that are printed without `top n`."""

MAX_LISTED = 6
"""Edges of a position that a picture lists above the graph."""

FILLS: dict[ComponentKind, str] = {
    "embed": "#eeeeee",
    "key-value": "#f4f4f4",
    "head": "#fde9d0",
    "attention": "#ece6f5",
    "mlp": "#e3f3e6",
    "neuron": "#e3f3e6",
    "logits": "#eeeeee",
    "token": "#eeeeee",
    "feature": "#fde9d0",
    "supernode": "#f9cfa3",
    "error": "#ffffff",
    "logit": "#eeeeee",
}

TRACER_KINDS = {
    "token": "embedding",
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "logit": "logit",
}
"""Names of nodes in circuit-tracer, which has one for features of all transcoders."""

LINE, UNSCORED = "#8c8c8c", "#707070"

MIN_WIDTH, MAX_WIDTH, UNSCORED_WIDTH = 0.8, 7.0, 1.5
"""Widths of edges in pixels: with a score of 0, with the largest score, and without scores."""

LAYER_MARGIN, LEGEND_HEIGHT = 62, 30

PORTS = {"q": -0.3, "k": 0.0, "v": 0.3}
"""Input of a head → its place, as a share of the width of the box."""


@dataclass(frozen=True)
class CircuitPicture:
    """The edges that a report shows."""

    circuit: ResultCircuit
    edges: Sequence[DrawnEdge]
    joins: bool = False
    """Whether an edge at several positions is one line with its largest score."""

    @property
    def limit(self) -> float:
        """The largest absolute score."""
        return max((abs(edge.score or 0.0) for edge in self.edges), default=0.0)

    def width(self, score: float | None) -> float:
        """Return the width of an edge in pixels."""
        if score is None:
            return UNSCORED_WIDTH
        share = abs(score) / self.limit if self.limit > 0 else 0.0
        return MIN_WIDTH + (MAX_WIDTH - MIN_WIDTH) * share

    @property
    def notes(self) -> list[str]:
        """What the picture shows, and which edges are missing."""
        circuit = self.circuit
        shown, every = len(self.edges), len(circuit.edges)
        of = "the model" if circuit.graph is None else f"the graph of row {circuit.graph.row}"
        said = [f"{len({*circuit.edges}):,} of {count_noun(circuit.total, 'edge')} of {of}"]
        if circuit.circuits > 1:
            said.append(f"those of {circuit.circuits:,} circuits of a sweep together")
        if shown < every:
            said.append(f"{shown:,} shown, those with the largest absolute scores")
        if circuit.graph is not None:
            said.append("without nodes and edges of little influence")
            if circuit.graph.supernodes:
                said.append("edges of a supernode's features in one layer are summed")
        if not circuit.scores:
            said.append("its edges have no scores")
        if circuit.places:
            own = zip(circuit.edges, circuit.places, strict=True)
            placed = {edge for edge, at in own if at}
            said.append(f"{len(placed):,} of its edges at positions")
        if self.joins:
            said.append("an edge at several positions has its largest score")
        counts = {edge.receiver.group for edge in self.edges if edge.receiver.group > 1}
        if counts:
            heads = " or ".join(map(str, sorted(counts)))
            said.append(f"a key or a value is read by {heads} heads: dotted lines")
        return said


def picture_of(
    result: ExperimentResult, top: int | None, *, joined: bool = False
) -> CircuitPicture | None:
    """Return the edges to draw; None if the result has no circuit.

    Args:
        joined: Whether an edge at several positions is one line.
    """
    circuit = result.circuit
    if circuit is None:
        return None
    circuit = join_supernodes(circuit)
    shown = join_positions(circuit) if joined else circuit
    most = MAX_EDGES if shown.scores else len(shown.edges)
    joins = len(shown.edges) < len(circuit.edges)
    return CircuitPicture(shown, list_edges(shown, top or most), joins)


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print the edges with their scores, the largest first."""
    picture = picture_of(result, report.top or LISTED_EDGES)
    console.print()
    if picture is None:
        console.print(Text(f"{result.name}: no circuit", style="bold"), highlight=False)
        return
    console.print(Text(_title(result, picture), style="bold"), highlight=False)
    write = map_format([picture.limit])
    width = max(len(edge.text) for edge in picture.edges)
    for edge in picture.edges:
        score = "" if edge.score is None else f"  {write(edge.score):>8}"
        console.print(Text(f"{edge.text:<{width if score else 0}}{score}"), highlight=False)
    notes = [note.replace(": dotted lines", "") for note in picture.notes]
    print_notes(["; ".join(notes)], console)
    print_conventions(result, report, console)


def save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """Write a picture, an interactive page, or the circuit as JSON."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        path.write_text(_json_text(result, report.top), encoding="utf-8")
        return
    picture = picture_of(result, report.top, joined=True)
    if suffix == ".html":
        path.write_text(_page(result, picture), encoding="utf-8")
        return
    canvas = Canvas()
    canvas.heads(*_heading(result, picture))
    if picture is not None:
        drawing, (width, height) = draw_circuit(picture)
        canvas.y += 12
        canvas.shapes.append(f'<g transform="translate(20,{canvas.y:.1f})">{drawing}</g>')
        canvas.right = max(canvas.right, 20 + width)
        canvas.y += height + 14
    canvas.save(path, report.width)


def _heading(result: ExperimentResult, picture: CircuitPicture | None) -> list[str]:
    if picture is None:
        return [f"{result.name}: no circuit"]
    facts = [f"{result.model} · {'; '.join(picture.notes)}"]
    positions = () if result.circuit is None else list_positions(result.circuit, picture)
    return [_title(result, picture), *facts, *positions]


def list_positions(circuit: ResultCircuit, picture: CircuitPicture) -> Iterator[str]:
    """Yield a line for each position of the shown edges: `last token: embed -> L1H1.q`."""
    shown = {edge.text.partition(" at ")[0] for edge in picture.edges}
    edges: dict[str, list[str]] = {}
    for (of, to), at in zip(circuit.edges, circuit.places, strict=False):
        if at and f"{of} -> {to}" in shown:
            edges.setdefault(at, []).append(f"{of} -> {to}")
    for at, names in edges.items():
        more = len(names) - MAX_LISTED
        yield f"{at}: {', '.join(names[:MAX_LISTED])}{f' and {more:,} more' if more > 0 else ''}"


def _title(result: ExperimentResult, picture: CircuitPicture) -> str:
    kind = "circuit" if picture.circuit.graph is None else "attribution graph"
    return f"{result.name}: {kind} {picture.circuit.name}"


# --- JSON -----------------------------------------------------------------------------------------


def _json_text(result: ExperimentResult, top: int | None) -> str:
    """Return an attribution graph in the form of circuit-tracer, and a circuit as a graph of
    EAP-IG, which `saved("c.json")` reads too.

    Query heads that share a key or a value have an edge each, with an equal share of the score. An
    edge without a score has the score 0. Without `top`, the file also has the edges outside of the
    circuit that have scores. EAP-IG has no names for neurons, features, positions and the
    encoder of an encoder-decoder: a circuit with some has the names of this language, and its
    dictionaries.
    """
    circuit = result.circuit
    if circuit is None:
        return "{}\n"
    if circuit.graph is not None:
        content = _tracer_content(result.model, circuit, circuit.graph, list_edges(circuit, top))
        return dump_json(content, indent=1) + "\n"
    sizes = {"n_layers": circuit.layers, "n_heads": max(circuit.heads), "d_model": circuit.width}
    config = {**sizes, "parallel_attn_mlp": circuit.parallel}
    listed = list(_list_written(circuit, top))
    if top is None:
        others = zip(circuit.others, circuit.other_scores, strict=True)
        listed += [(text, score, False) for text, score in others]
    texts = [*(" -> ".join(ends) for ends in circuit.edges), *circuit.others]
    has_names = circuit.neurons or circuit.features or circuit.named_places
    has_names = has_names or any(text.count(" ") > 2 for text in texts)
    make = _content_with_nodes if has_names else _eap_content
    content = make(circuit, config, listed)
    content |= {"prompts": list(circuit.prompts)} if circuit.prompts else {}
    return dump_json(content, indent=1) + "\n"


WrittenEdge: TypeAlias = tuple[str, float, bool]
"""An edge as in a file, its score, and whether it is in the circuit."""


def _list_written(circuit: ResultCircuit, top: int | None) -> Iterator[WrittenEdge]:
    """Yield the edges at each of their positions, or the `top` ones with the largest absolute
    scores, these first."""
    scores = circuit.scores or (0.0,) * len(circuit.edges)
    named = circuit.named_places or ((),) * len(circuit.edges)
    listed = [
        (f"{of} -> {to} at {at}" if at else f"{of} -> {to}", score, True)
        for (of, to), score, places in zip(circuit.edges, scores, named, strict=True)
        for at in places or ("",)
    ]
    yield from sorted(listed, key=lambda each: -abs(each[1]))[:top]


def _content_with_nodes(
    circuit: ResultCircuit, config: Mapping[str, Any], listed: Sequence[WrittenEdge]
) -> dict[str, Any]:
    """Return a circuit in the names of this language."""
    edges = {text: {"score": score, "in_graph": inside} for text, score, inside in listed}
    inside = (text.partition(" at ")[0] for text, _, own in listed if own)
    ends = {end for text in inside for end in text.split(" -> ")}
    names = [*circuit.neurons, *(name for name, _ in circuit.features)]
    return {
        "cfg": config,
        "nodes": {name: {"in_graph": name in ends} for name in names},
        "edges": edges,
        **({"dictionaries": dict(circuit.dictionaries)} if circuit.dictionaries else {}),
    }


def _eap_content(
    circuit: ResultCircuit, config: Mapping[str, Any], listed: Sequence[WrittenEdge]
) -> dict[str, Any]:
    """Return a circuit as a graph of EAP-IG."""
    edges: dict[str, dict[str, float | bool]] = {}
    inside = {"logits"}
    for text, score, in_graph in listed:
        of, _, to = text.split(" ")
        receiver, _, reads = to.partition(".") if "H" in to else (to, "", "")
        sender, heads = _graph_name(of), [_graph_name(receiver)]
        group = 1
        if reads in ("k", "v"):
            layer, head = map(int, receiver[1:].split("H"))
            group = circuit.groups[""][layer]
            heads = [f"a{layer}.h{head * group + n}" for n in range(group)]
        for head in heads:
            name = f"{sender}->{head}<{reads}>" if reads else f"{sender}->{head}"
            edges[name] = {"score": score / group, "in_graph": in_graph}
        inside |= {sender, *heads} if in_graph else set()
    nodes = ["input"]
    for layer in range(circuit.layers):
        nodes += [*(f"a{layer}.h{head}" for head in range(circuit.heads[layer])), f"m{layer}"]
    return {
        "cfg": config,
        "nodes": {name: {"in_graph": name in inside} for name in [*nodes, "logits"]},
        "edges": edges,
    }


def _tracer_content(
    model: str, circuit: ResultCircuit, graph: ResultGraph, edges: Sequence[DrawnEdge]
) -> dict[str, Any]:
    """Return an attribution graph in the form that circuit-tracer and Neuronpedia show."""
    names = {node.label: _tracer_name(node, circuit.layers) for node in graph.nodes}
    likeliest = max((n.amount for n in graph.nodes if n.kind == "logit"), default=0.0)
    supernodes = [
        [name, *(names[label] for label in labels)] for name, labels in graph.supernodes if labels
    ]
    nodes = [
        {
            "node_id": names[node.label],
            "feature": _tracer_feature(node),
            "layer": names[node.label].split("_")[0],
            "ctx_idx": node.token,
            "feature_type": TRACER_KINDS[node.kind],
            "token_prob": node.amount if node.kind == "logit" else 0.0,
            "is_target_logit": node.kind == "logit" and node.amount == likeliest,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": names[node.label],
            "clerp": _tracer_label(node),
            "influence": node.influence,
            "activation": node.amount if node.kind == "feature" else None,
        }
        for node in graph.nodes
    ]
    return {
        "metadata": {
            "slug": circuit.name,
            "scan": model,
            "transcoder_list": [],
            "prompt_tokens": list(graph.tokens),
            "prompt": "".join(graph.tokens),
            "node_threshold": None,
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": [name for each in supernodes for name in each[1:]],
            "supernodes": supernodes,
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {
                "source": names[edge.sender.label],
                "target": names[edge.receiver.label],
                "weight": edge.score,
            }
            for edge in edges
        ],
    }  # fmt: skip


def _tracer_name(node: ResultNode, layers: int) -> str:
    """Return the name of a node in circuit-tracer: layer, number and token."""
    layer = {"token": "E", "logit": str(layers + 1)}.get(node.kind, str(node.layer))
    return f"{layer}_{-1 if node.kind == 'error' else node.number}_{node.token}"


def _tracer_label(node: ResultNode) -> str:
    """Return what a node is called in circuit-tracer; empty if it shows the node's number.

    Its viewer reads the probability of each logit from this text.
    """
    return f'Output "{node.text}" (p={node.amount:.3f})' if node.kind == "logit" else ""


def _tracer_feature(node: ResultNode) -> int:
    """Return the number that circuit-tracer gives a node: of features, of layer and feature."""
    if node.kind == "feature":
        both = node.layer + node.number
        return both * (both + 1) // 2 + node.number
    return {"token": node.token, "error": -1}.get(node.kind, node.number)


def _graph_name(label: str) -> str:
    """Return the name of a component in EAP-IG: `a0.h1` for `L0H1`."""
    if label == "embed":
        return "input"
    if label.endswith(".mlp"):
        return f"m{label[1:].removesuffix('.mlp')}"
    if label == "logits":
        return label
    layer, head = label[1:].split("H")
    return f"a{layer}.h{head}"


# --- the drawing ----------------------------------------------------------------------------------


def draw_circuit(picture: CircuitPicture) -> tuple[str, tuple[float, float]]:
    """Draw a circuit as SVG at (0, 0); return it with its width and height in pixels."""
    layout = lay_out(picture.circuit, picture.edges)
    width, height = layout.size
    write = map_format([picture.limit])
    shapes: list[str] = []
    for number, (layer, top, bottom) in enumerate(layout.layers):
        shade = "#f6f6f6" if number % 2 == 0 else "#ffffff"
        shapes.append(
            f'<rect x="0" y="{top - 12:.1f}" width="{width + LAYER_MARGIN + 8:.1f}" '
            f'height="{bottom - top + 24:.1f}" fill="{shade}"/>'
        )
        shapes.append(_text(f"layer {layer}", 6, (top + bottom) / 2 + 4, 11, "start", QUIET_INK))
    inner = [_shared_line(layout, component, head) for component, head in layout.shared]
    inner += [_edge(picture, layout, edge, write) for edge in picture.edges]
    inner += [_node(component, at, picture.edges) for component, at in layout.components.items()]
    shapes.append(f'<g transform="translate({LAYER_MARGIN},0)">{"".join(inner)}</g>')
    legend, legend_width = _legend(picture, write)
    shapes.append(f'<g transform="translate(6,{height + 26:.1f})">{legend}</g>')
    size = max(width + LAYER_MARGIN + 8, legend_width + 12), height + 26 + LEGEND_HEIGHT
    return "".join(shapes), size


def edge_colour(score: float | None) -> str:
    """Return the colour of an edge."""
    if score is None:
        return UNSCORED
    return css_colour(POSITIVE_COLOUR if score >= 0 else NEGATIVE_COLOUR)


def _edge(
    picture: CircuitPicture,
    layout: CircuitLayout,
    edge: DrawnEdge,
    write: Callable[[float], str],
) -> str:
    stops = list(layout.routes[edge.pair])
    x, y, _ = stops[-1]
    if edge.reads is not None:
        stops[-1] = (x + PORTS[edge.reads] * edge.receiver.width, y, y)
    said = edge.text.replace("->", "→")
    if edge.score is not None:
        said += f": {write(edge.score)}"
    return (
        f'<g class="edge" data-of="{edge.sender.label}" data-to="{edge.receiver.label}">'
        f'<path d="{_route_path(stops)}" fill="none" stroke="{edge_colour(edge.score)}" '
        f'stroke-width="{picture.width(edge.score):.2f}" stroke-opacity="0.75"/>'
        f"<title>{escape_xml(said)}</title></g>"
    )


def _route_path(stops: Sequence[tuple[float, float, float]]) -> str:
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


def _shared_line(layout: CircuitLayout, component: Component, head: Component) -> str:
    (x, y), (to, top) = layout.components[component], layout.components[head]
    return (
        f'<g class="edge" data-of="{component.label}" data-to="{head.label}"><path '
        f'd="M{x:.1f},{y:.1f} L{to:.1f},{top + NODE_HEIGHT["head"]:.1f}" fill="none" '
        f'stroke="{LINE}" stroke-dasharray="2 3"/></g>'
    )


def _node(component: Component, at: tuple[float, float], edges: Sequence[DrawnEdge]) -> str:
    x, y = at
    width, height = component.width, NODE_HEIGHT[component.kind]
    reads = {edge.reads for edge in edges if edge.receiver == component and edge.reads is not None}
    middle = y + (14 if reads else height / 2 + 4)
    inside = "".join(
        _text(name, x + PORTS[name] * width, y + height - 5, 10, "middle", QUIET_INK)
        for name in sorted(reads)
    )
    incoming = sum(edge.receiver == component for edge in edges)
    outgoing = sum(edge.sender == component for edge in edges)
    said = f"{component.title}: {count_noun(incoming, 'edge')} in, {outgoing:,} out"
    return (
        f'<g class="node" data-node="{component.label}"><rect x="{x - width / 2:.1f}" y="{y:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}" rx="{4 if component.kind != "head" else 10}" '
        f'fill="{FILLS[component.kind]}" stroke="{LINE}"/>'
        f"{_text(component.title, x, middle, 11, 'middle', INK)}{inside}"
        f"<title>{escape_xml(said)}</title></g>"
    )


def _text(text: str, x: float, y: float, size: int, anchor: str, ink: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{ink}">'
        f"{escape_xml(text)}</text>"
    )


def _legend(picture: CircuitPicture, write: Callable[[float], str]) -> tuple[str, float]:
    """Draw the legend at (0, 0); return it with its width."""
    scores = [edge.score for edge in picture.edges if edge.score is not None]
    ends = [max(scores, default=0.0), min(scores, default=0.0)]
    samples = [score for score in ends if score] if scores else []
    parts: list[str] = []
    x = 0.0
    for score in dict.fromkeys(samples if samples else [None]):
        said = "edge" if score is None else f"score {write(score)}"
        parts.append(
            f'<path d="M{x:.1f},8 h30" stroke="{edge_colour(score)}" '
            f'stroke-width="{picture.width(score):.2f}" stroke-opacity="0.75"/>'
        )
        parts.append(_text(said, x + 36, 12, 11, "start", QUIET_INK))
        x += 36 + text_width(said, 11) + 22
    kinds = {edge.receiver.kind for edge in picture.edges} | {
        edge.sender.kind for edge in picture.edges
    }
    names: dict[ComponentKind, str] = {
        "head": "head",
        "attention": "rest of attention",
        "mlp": "MLP",
        "neuron": "neuron",
        "key-value": "key or value",
        "feature": "feature",
        "supernode": "supernode",
        "error": "error",
    }
    for kind, name in names.items():
        if kind not in kinds:
            continue
        parts.append(
            f'<rect x="{x:.1f}" y="2" width="18" height="12" rx="{3 if kind != "head" else 6}" '
            f'fill="{FILLS[kind]}" stroke="{LINE}"/>'
        )
        parts.append(_text(name, x + 24, 12, 11, "start", QUIET_INK))
        x += 24 + text_width(name, 11) + 22
    said = "edges lead upwards"
    parts.append(_text(said, x, 12, 11, "start", QUIET_INK))
    return "".join(parts), x + text_width(said, 11)


# --- the page -------------------------------------------------------------------------------------

STYLE = f"""
body {{ font-family: {FONT}; color: {INK}; margin: 24px; }}
h1 {{ font-size: 18px; margin: 0 0 4px; }}
p {{ color: {QUIET_INK}; font-size: 12px; margin: 2px 0 10px; }}
.node {{ cursor: pointer; }}
.node:focus {{ outline: none; }}
.node:focus rect {{ stroke-width: 2; }}
.edge:hover path {{ stroke-opacity: 1; stroke: #111111; }}
.chosen .edge, .chosen .node {{ opacity: 0.08; }}
.chosen .lit {{ opacity: 1; }}
"""

HINT = "Click a component to show its edges only. Hover over an edge for its score."

SCRIPT = """
const svg = document.querySelector("svg");
const edges = [...svg.querySelectorAll(".edge")], nodes = [...svg.querySelectorAll(".node")];
let chosen = null;
function choose(name) {
  chosen = chosen === name ? null : name;
  svg.classList.toggle("chosen", chosen !== null);
  const near = new Set([chosen]);
  for (const edge of edges) {
    const lit = edge.dataset.of === chosen || edge.dataset.to === chosen;
    edge.classList.toggle("lit", lit);
    if (lit) near.add(edge.dataset.of).add(edge.dataset.to);
  }
  for (const node of nodes) node.classList.toggle("lit", near.has(node.dataset.node));
}
for (const node of nodes) {
  node.setAttribute("tabindex", "0");
  const name = node.dataset.node;
  node.addEventListener("click", event => { event.stopPropagation(); choose(name); });
  node.addEventListener("keydown", event => { if (event.key === "Enter") choose(name); });
}
svg.addEventListener("click", () => { if (chosen !== null) choose(chosen); });
"""


def _page(result: ExperimentResult, picture: CircuitPicture | None) -> str:
    """Return a page that needs no network."""
    first, *facts = _heading(result, picture)
    body = [f"<h1>{escape_xml(first)}</h1>", *(f"<p>{escape_xml(fact)}</p>" for fact in facts)]
    if picture is not None:
        drawing, (width, height) = draw_circuit(picture)
        body.append(
            "<p>Click a component to show its edges only. Hover over an edge for its score.</p>"
        )
        body.append(
            f'<svg width="{width:.0f}" height="{height:.0f}" font-family="{FONT}" role="img" '
            f'aria-label="{escape_xml(first)}"><g transform="translate(0,14)">{drawing}</g></svg>'
            f"<script>{SCRIPT}</script>"
        )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape_xml(first)}</title><style>{STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )
