"""Circuits in JSON files: edges of a model, with their scores.

EAP-IG and the circuit track of MIB write graphs: `cfg` has the sizes of the model, `edges` maps
`a0.h1->m2` or `input->a1.h0<q>` to `score` and `in_graph`. In a manually written file, `edges` is a
list of names. A trained mask of edges has `labels`, `probabilities` and `chosen`. In these two
forms, names may have positions: `L0H1 -> L1H0.q at last token`.

References:
    Hanna et al. 2024 (arXiv 2403.17806); Mueller et al. 2025 (arXiv 2504.13151).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, TypeAlias

from mechdsl.base import limits
from mechdsl.base.files import UnreadableFile
from mechdsl.base.records import Record
from mechdsl.base.text import Source, count_noun
from mechdsl.dictionaries.folder import read_limited_file
from mechdsl.models.shape import ModelShape, unit_count
from mechdsl.resolve.types import (
    CircuitEdge,
    FeatureNode,
    NamedEdge,
    SiteLayer,
    SitePoint,
    find_stream,
    is_neuron,
    name_neurons,
)
from mechdsl.syntax import ast
from mechdsl.syntax.frontend import parse
from mechdsl.syntax.traversal import number_names
from mechdsl.syntax.tree_builder import RegisteredWords
from mechdsl.vocab.sites import SITES

if TYPE_CHECKING:
    from mechdsl.program.saved_forms import GraphForm, MaskForm

EMBEDDING = SitePoint("resid_pre", 0, None)
"""The sender `embed`: the stream that enters the first block."""

ENCODER_EMBEDDING = SitePoint("resid_pre encoder", 0, None)
"""The sender `embed encoder`: the stream that enters the first block of an encoder-decoder's
encoder."""

END = SitePoint("logits", None, None)

VISION_EMBEDDING = SitePoint("resid_pre vision", 0, None)
"""The sender `embed vision`: the stream that enters the first block of a vision encoder."""

VISION_END = SitePoint("logits vision", None, None)
"""The receiver `embed` at tokens of images: the projector, which reads the end of the stream of a
vision encoder."""

EMBEDDINGS = EMBEDDING, ENCODER_EMBEDDING, VISION_EMBEDDING

ENDS = END, VISION_END

NEURONS = "mlp_hidden"
"""Site of neurons, which are senders and receivers."""

_EDGES = (
    "edges are `a0.h1->m2`, `input->a1.h0<q>`, `m1->logits`, or `L0H1 -> L1H0.q` and "
    "`L0N3 -> logits` as in a file"
)

_NODES = '`saved("mask.json", nodes: g)`'
"""A circuit in a file whose features a group names."""

_AT = " at "
"""Between an edge and its position."""

_CONVERSION = (
    'convert the file with EAP-IG where you trust it: `python -c "from eap.graph import Graph; '
    "Graph.from_pt('FILE').to_json('FILE.json')\"`"
)

_EDGE = re.compile(r"\s*([^<>-]*[^\s<>-])\s*->\s*([^\s<>-](?:[^<>-]*[^\s<>-])?)(?:<([qkv])>)?\s*")

_FEATURE = re.compile(r"\bfeature \d")

_SPLIT_NODE = re.compile(r"\bfeature \d|^L\d+N\d+$")
"""A feature or a neuron, whose MLP has another node for the rest."""

_ANY = "embed", "logits"
"""A sender and a receiver of every model."""

FeatureEnds: TypeAlias = tuple[FeatureNode, FeatureNode]
"""A feature as a sender and as a receiver."""

_NODE = re.compile(
    r"(?P<embed>input|embed)|(?P<end>logits)"
    r"|a(?P<attention>\d{1,4})\.h(?P<head>\d{1,5})|m(?P<mlp>\d{1,4})"
    r"|L(?P<layer>\d{1,4})(?:H(?P<unit>\d{1,5})(?:\.(?P<reads>[qkv]))?|N(?P<neuron>\d{1,6})|\.(?P<whole>mlp|attn))"
)

_IN_STACK = re.compile(
    r"(?P<part>\w+) (?P<stack>encoder|cross|vision)"
    r"(?: layer (?P<layer>\d{1,4}))?(?: (?P<word>head|neuron) (?P<unit>\d{1,6}))?"
)
"""A node of a vision encoder, or of an encoder-decoder and not of the decoder's stream to
itself."""

_NODES_IN_STACK = {
    "sender": (
        *("z encoder", "z cross", "mlp_out encoder", f"{NEURONS} encoder"),
        *("z vision", "mlp_out vision"),
    ),
    "receiver": (
        *("q encoder", "k encoder", "v encoder", "mlp_norm encoder", f"{NEURONS} encoder"),
        *("q cross", "k cross", "v cross"),
        *("q vision", "k vision", "v vision", "mlp_norm vision"),
    ),
}

_SIZES = {
    "n_layers": ("layers", lambda shape: shape.n_layers),
    "n_heads": ("heads", lambda shape: shape.largest(lambda block: block.heads)),
    "d_model": ("numbers in the stream", lambda shape: shape.d_model),
}
"""Key of `cfg` → what it counts, and the number in a model; heads are those of the layer with the
most."""


class NotAnEdge(Exception):
    """A name that isn't an edge of a model, and a fix."""

    def __init__(self, reason: str, hint: str = _EDGES) -> None:
        super().__init__(reason)
        self.hint = hint


class CircuitFile(Record):
    """The content of a file, before it is compared with a model."""

    digest: str
    """SHA-256 of the file."""
    config: Mapping[str, object]
    """Sizes of the model that it was written for; empty if it has none."""
    scores: Mapping[str, float | None]
    """Name of an edge → its score, if it has one."""
    chosen: frozenset[str]
    """The edges of the circuit."""
    dictionaries: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name of each dictionary whose features are nodes → its SHA-256, if the file has them."""
    nodes: tuple[str, ...] = ()
    """Names of neurons and features that are nodes, perhaps without edges in the file."""
    prompts: tuple[str, ...] = ()
    """Digests of the prompts that the edges were chosen on, if the file has them."""

    @property
    def stack(self) -> Literal["", "vision"]:
        """The stack of its edges, as in `find_stream`."""
        return "vision" if any(" vision" in name for name in self.scores) else ""


class NamedNodes(Record):
    """The neurons and features that `nodes` names for the edges of a file."""

    neurons: Mapping[SiteLayer, tuple[int, ...]]
    """By site and layer."""
    features: Mapping[str, FeatureEnds]
    """By their labels."""
    dictionaries: Mapping[str, str]
    """Name of each dictionary of these features → its SHA-256; empty until it is trained."""


class SavedCircuit(Record):
    """The edges of a file, as edges of a model."""

    edges: tuple[NamedEdge, ...]
    scores: Mapping[NamedEdge, float]
    """The scores of these edges; empty if the file doesn't have all of them."""
    places: Mapping[str, ast.Position]
    """Positions of edges, by their text in the file."""
    digest: str
    made: str
    """How they were chosen, for conventions."""
    neurons: Mapping[SiteLayer, tuple[int, ...]] = field(
        default_factory=dict[SiteLayer, tuple[int, ...]]
    )
    """Neurons of the file, by site and layer; there, its MLPs are the other neurons."""
    prompts: tuple[str, ...] = ()
    """As in `CircuitFile`."""
    others: Mapping[NamedEdge, float] = field(default_factory=dict[NamedEdge, float])
    """The scores of the other edges of the file, in the order of the model; empty without
    `scores`."""


EdgeLister: TypeAlias = Callable[
    [Mapping[SiteLayer, tuple[int, ...]], Literal["", "vision"]], Sequence[CircuitEdge]
]


def read_circuit(
    path: Path,
    written: str,
    size: int | None,
    shape: ModelShape,
    list_edges: EdgeLister,
    nodes: NamedNodes,
) -> SavedCircuit:
    """Read the edges of a circuit for a model.

    Heads that share a key or a value have one receiver here and one each in EAP-IG. The score of
    such an edge is the sum of theirs.

    Args:
        written: The path as the user wrote it.
        size: Number of edges with the largest absolute scores; None for those that are chosen in
            the file.
        list_edges: Returns the edges of a stack with some neurons as nodes, by site and layer, and
            with the features that the user names.
        nodes: The neurons and features that the user names.

    Raises:
        UnreadableFile: The file is missing, too large, of another form or of another model; it
            chooses no edges; or edges that are one edge here differ.
    """
    file = _read_file(path, written)
    if shape.stands_in:  # the names are those of a model that isn't available
        return SavedCircuit((((EMBEDDING, END), None),), {}, {}, file.digest, "")
    _check_sizes(file, written, shape.others.get(file.stack, shape))
    _check_dictionaries(file, written, nodes.dictionaries)
    places = dict[str, ast.Position]()
    named = dict(_name_edges(file, written, shape, places, nodes.features))
    points = [SitePoint(*of, unit) for of, own in nodes.neurons.items() for unit in own]
    points += _find_nodes(file, written, shape, nodes.features)
    neurons = _find_neurons([*named.values(), *((point, point) for point in points)], written)
    every = list_edges(neurons, file.stack)
    names = _join_names({name: split_mlps(own, neurons) for name, own in named.items()})
    order = {edge: number for number, edge in enumerate(every)}
    for (edge, _), (name, *_) in names.items():
        if edge not in order:
            joined = any(of.site == "attn_out" for of, _ in nodes.features.values())
            mixed = find_stream([edge]) != file.stack
            _reject_edge(name, written, shape, joined=joined, mixed=mixed)
    given = {edge: [file.scores[name] for name in own] for edge, own in names.items()}
    scores = {edge: [n for n in own if n is not None] for edge, own in given.items()}
    scores = {edge: own for edge, own in scores.items() if own}
    total = {edge: sum(own) for edge, own in scores.items()}
    if size is not None:
        edges = _choose_largest(total, size, written, every)
    else:
        edges = _choose_marked(file, names, written, every, shape)
    kept = {edge: total[edge] for edge in edges} if total.keys() >= set(edges) else {}
    rest = sorted(total.keys() - set(edges), key=lambda each: (order[each[0]], each[1] or ""))
    others = {edge: total[edge] for edge in rest} if kept else {}
    made = _describe_choice(edges, len(every), size)
    added = any(len(scores[edge]) > 1 for edge in kept)
    shared = "; scores of heads that share a key or value are added" if added else ""
    said = f"{made}, of {written}, SHA-256 {file.digest[:12]}…{shared}"
    used = {at: places[at] for _, at in edges if at is not None}
    return SavedCircuit(edges, kept, used, file.digest, said, neurons, file.prompts, others)


def _reject_edge(
    name: str, written: str, shape: ModelShape, *, joined: bool = False, mixed: bool = False
) -> NoReturn:
    """Raise UnreadableFile for an edge between components of which one doesn't read the other.

    Args:
        joined: Whether features of the output of attention are nodes, which heads send to.
        mixed: Whether the edge is in another stack than edges of the vision encoder.
    """
    if mixed:
        reason = f"`{written}` has edges of the vision encoder and of the language model"
        raise UnreadableFile(reason, "write a file for each")
    why = "reads before or at the sender"
    if "encoder" in shape.others or joined:
        why = "doesn't read the sender"
    raise UnreadableFile(
        f"`{written}` has `{name}`, but the receiver {why}",
        "check that the file was written for this model",
    )


def _name_edges(
    file: CircuitFile,
    written: str,
    shape: ModelShape,
    places: dict[str, ast.Position],
    features: Mapping[str, FeatureEnds],
) -> Iterator[tuple[str, CircuitEdge]]:
    """Yield the names in a file with their edges, and add their positions to `places`. Raises
    UnreadableFile.

    Args:
        features: Label of each feature that is a node → its ends.
    """
    for name in file.scores:
        of_edge, _, at = name.partition(_AT)
        try:
            yield name, edge_of_name(of_edge, shape, features)
            if at and at not in places:
                places[at] = _parse_position(at)
        except NotAnEdge as problem:
            raise UnreadableFile(f"`{written}` has `{name}`, {problem}", problem.hint) from None


def _find_nodes(
    file: CircuitFile, written: str, shape: ModelShape, features: Mapping[str, FeatureEnds]
) -> Iterator[SitePoint]:
    """Yield the neurons and features that a file lists as nodes. Raises UnreadableFile."""
    for name in file.nodes:
        try:
            sender, _ = edge_of_name(f"{name} -> logits", shape, features)
        except NotAnEdge as problem:
            raise UnreadableFile(f"`{written}` has `{name}`, {problem}", problem.hint) from None
        yield sender


def _describe_choice(edges: Sequence[NamedEdge], total: int, size: int | None) -> str:
    """Describe the number of edges, of those of the model, and how they were chosen."""
    how = "those with the largest absolute scores" if size is not None else "those in the circuit"
    if any(at is not None for _, at in edges):
        return f"{len(edges):,} edges at positions, {how}"
    return f"{len(edges):,} of {count_noun(total, 'edge')}, {how}"


def _join_names(named: Mapping[str, CircuitEdge]) -> dict[NamedEdge, list[str]]:
    """Return the names in a file of each edge at its position."""
    names: dict[NamedEdge, list[str]] = {}
    for name, edge in named.items():
        at = name.partition(_AT)[2]
        names.setdefault((edge, at or None), []).append(name)
    return names


def _find_neurons(edges: Iterable[CircuitEdge], written: str) -> dict[SiteLayer, tuple[int, ...]]:
    """Return the neurons of a file, by site and layer. Raises UnreadableFile for too many."""
    neurons = list_neurons(edges)
    if (count := sum(map(len, neurons.values()))) > limits.CIRCUIT_NEURONS:
        most = f"at most {limits.CIRCUIT_NEURONS:,} can be nodes"
        reason = f"`{written}` names {count:,} neurons, and {most}"
        raise UnreadableFile(reason, "use a file with fewer neurons")
    return neurons


def list_neurons(edges: Iterable[CircuitEdge]) -> dict[SiteLayer, tuple[int, ...]]:
    """Return the neurons at the ends of edges, by site and layer."""
    neurons: dict[tuple[str, int], set[int]] = {}
    for end in chain.from_iterable(edges):
        if is_neuron(end) and end.layer is not None and end.unit is not None:
            neurons.setdefault((end.site, end.layer), set()).add(end.unit)
    return {where: tuple(sorted(numbers)) for where, numbers in sorted(neurons.items())}


def split_mlps(edge: CircuitEdge, neurons: Mapping[SiteLayer, tuple[int, ...]]) -> CircuitEdge:
    """Return an edge with the node of the other neurons in the place of an MLP, in the layers of
    these neurons."""

    def split(end: SitePoint) -> SitePoint:
        whole = SITES[end.site].component in ("mlp_out", "mlp_norm")
        where = name_neurons(end)
        return SitePoint(*where, None) if whole and where in neurons else end

    of, to = edge
    return split(of), split(to)


def _choose_largest(
    scores: Mapping[NamedEdge, float], size: int, written: str, every: Sequence[CircuitEdge]
) -> tuple[NamedEdge, ...]:
    """Return the edges with the largest absolute scores, in the order of the model."""
    if len(scores) < size:
        have = count_noun(len(scores), "scored edge")
        raise UnreadableFile(
            f"`{written}` has {have}, and `size: {size}` chooses by scores",
            "remove `size`, or write a smaller one" if scores else "remove `size`",
        )
    place = {edge: number for number, edge in enumerate(every)}
    ranked = sorted(scores, key=lambda each: (-abs(scores[each]), place[each[0]]))[:size]
    return tuple(sorted(ranked, key=lambda each: place[each[0]]))


def _choose_marked(
    file: CircuitFile,
    names: Mapping[NamedEdge, list[str]],
    written: str,
    every: Sequence[CircuitEdge],
    shape: ModelShape,
) -> tuple[NamedEdge, ...]:
    """Return the edges that the file chooses, in the order of the model."""
    ranked, place = list[NamedEdge](), {edge: number for number, edge in enumerate(every)}
    for each in sorted(names, key=lambda each: place[each[0]]):
        own = names[each]
        marked = [name for name in own if name in file.chosen]
        if not marked:
            continue
        shared = _shared_heads(each[0][1], shape) if _is_graph_name(marked[0]) else 1
        if len(marked) < shared:
            other = next((name for name in own if name not in file.chosen), "the others")
            raise UnreadableFile(
                f"`{written}` has `{marked[0]}` in the circuit but not `{other}`, and these heads "
                "share it",
                "write `size: 100` to choose edges by the sums of their scores",
            )
        ranked.append(each)
    if not ranked:
        raise UnreadableFile(
            f"`{written}` has no edge in the circuit",
            f'write `saved("{written}", size: 100)` to choose those with the largest scores',
        )
    return tuple(ranked)


def _shared_heads(receiver: SitePoint, shape: ModelShape) -> int:
    """Return the number of query heads that read with a receiver."""
    if receiver.site not in ("k", "v"):
        return 1
    return unit_count(shape, "q", receiver.layer) // unit_count(
        shape, receiver.site, receiver.layer
    )


def _check_dictionaries(file: CircuitFile, written: str, dictionaries: Mapping[str, str]) -> None:
    """Compare the dictionaries of a file with those of the same names. Raises UnreadableFile."""
    for name, digest in file.dictionaries.items():
        dictionary = dictionaries.get(name, "")
        if dictionary and dictionary != digest:
            reason = f"`{written}` has features of a `{name}` with SHA-256 {digest[:12]}…, and "
            reason += f"this `{name}` has {dictionary[:12]}…"
            raise UnreadableFile(reason, "use the dictionary that the circuit was trained with")


def _check_sizes(file: CircuitFile, written: str, shape: ModelShape) -> None:
    """Compare the sizes in a file with those of the model. Raises UnreadableFile."""
    hint = "name a circuit of this model"
    for key, (what, size) in _SIZES.items():
        given = file.config.get(key)
        if given is not None and given != size(shape):
            reason = f"`{written}` is of a model with {given} {what}, and this one has "
            raise UnreadableFile(f"{reason}{size(shape):,}", hint)
    given = file.config.get("parallel_attn_mlp")
    if given is not None and given != shape.parallel_block:
        reads = "reads" if shape.parallel_block else "doesn't read"
        raise UnreadableFile(
            f"`{written}` is of a model with {'' if given else 'no '}parallel blocks; in this one, "
            f"the MLP {reads} the same stream as the attention",
            hint,
        )


# --- names ----------------------------------------------------------------------------------------


def edge_of_name(name: str, shape: ModelShape, features: Mapping[str, FeatureEnds]) -> CircuitEdge:
    """Return an edge by its name in EAP-IG, `a0.h1->a1.h0<q>`, or in a `.mech` file.

    Args:
        features: Label of each feature that is a node → its ends.

    Raises:
        NotAnEdge: The name has another form, or the model has no such component.
    """
    of, _, to = (" ".join(each.split()) for each in name.partition("->"))
    ends = [_find_feature(each, features) for each in (of, to)]
    if ends != [None, None]:
        plain = [
            each if end is None else own
            for each, end, own in zip((of, to), ends, _ANY, strict=True)
        ]
        sender, receiver = edge_of_name("->".join(plain), shape, {})
        first, second = ends
        return (sender if first is None else first[0]), (receiver if second is None else second[1])
    match = _EDGE.fullmatch(name)
    if match is None:
        raise NotAnEdge("which isn't an edge")
    sender, receiver, reads = match.groups()
    return _point(sender, None, shape, "sender"), _point(receiver, reads, shape, "receiver")


def _find_feature(name: str, features: Mapping[str, FeatureEnds]) -> FeatureEnds | None:
    """Return a feature by its label; None for any other end. Raises NotAnEdge for a feature that
    isn't a node."""
    if not _FEATURE.search(name):
        return None
    if name in features:
        return features[name]
    if not features:
        hint = f"write a group with the features of the file, and its name: {_NODES}"
        raise NotAnEdge("and `nodes` doesn't name its features", hint)
    raise NotAnEdge(f"and `{name}` isn't in the group of `nodes`", "add it to the group")


def _parse_position(text: str) -> ast.Position:
    """Parse the position of an edge. Raises NotAnEdge."""
    source = Source(f"mech 1\ncircuit c = embed -> logits at {text}\n")
    tree, problems = parse(source, RegisteredWords())
    _, *defined = tree.statements  # after the version
    edges = defined[0].edges if len(defined) == 1 and isinstance(defined[0], ast.CircuitDef) else ()
    at = edges[0].at if len(edges) == 1 else None
    if problems or tree.lost or at is None:
        raise NotAnEdge(f"and `{text}` isn't a position")
    name = next(iter(number_names(at)), None)
    if name is not None:
        raise NotAnEdge(f"and the file has no number for `{name}`")
    return at


def _is_graph_name(name: str) -> bool:
    """Whether the receiver of an edge is named as in EAP-IG."""
    return "<" in name


def _point(
    name: str, reads: str | None, shape: ModelShape, end: Literal["sender", "receiver"]
) -> SitePoint:
    in_stack = _IN_STACK.fullmatch(name)
    if in_stack is not None and reads is None:
        return _point_in_stack(in_stack, shape, end)
    match = _NODE.fullmatch(name)
    if match is None:
        raise NotAnEdge(f"and `{name}` isn't a component")
    sends = end == "sender"
    if match["embed"] or match["end"]:
        if match["embed"] and not sends and not reads and "vision" in shape.others:
            return VISION_END
        if sends != bool(match["embed"]) or reads:
            raise NotAnEdge(f"and `{name}` isn't a valid {end}")
        return EMBEDDING if sends else END
    of_graph = match["layer"] is None
    layer = int(match["attention"] or match["mlp"] or match["layer"])
    head = match["head"] or match["unit"]
    if layer >= shape.n_layers:
        raise NotAnEdge(f"and the model has {count_noun(shape.n_layers, 'layer')}")
    site = reads if of_graph else match["reads"]
    if match["neuron"] is not None:
        return _neuron(layer, int(match["neuron"]), shape)
    if head is None:
        if site is not None:
            raise NotAnEdge(f"and `{name}` has one input")
        if match["whole"] == "attn":
            return SitePoint("attn_out", layer, None)
        if not shape.has("mlp_out", layer):
            raise NotAnEdge(f"and layer {layer} has no MLP")
        return SitePoint("mlp_out" if sends else "mlp_norm", layer, None)
    if (site is None) != sends:
        reason = f"and `{name}` has three inputs: q, k and v"
        raise NotAnEdge(f"and `{name}` is an input" if sends else reason)
    site = site or "z"
    count, unit = unit_count(shape, "q" if of_graph else site, layer), int(head)
    if unit >= count:
        what = {"k": "key head", "v": "value head"}.get("" if of_graph else site, "head")
        raise NotAnEdge(f"and layer {layer} has {count_noun(count, what)}")
    shared = count // unit_count(shape, site, layer) if of_graph and not sends else 1
    return SitePoint(site, layer, unit // shared)


def _point_in_stack(
    match: re.Match[str], shape: ModelShape, end: Literal["sender", "receiver"]
) -> SitePoint:
    """Return a node of another stack: `embed encoder`, `q cross layer 1 head 0`. Raises
    NotAnEdge."""
    name, stack = match[0], match["stack"]
    if stack not in shape.others:
        raise NotAnEdge(f"and the model has no `{stack}`")
    if match["part"] == "embed" and stack != "cross" and end == "sender":
        return VISION_EMBEDDING if stack == "vision" else ENCODER_EMBEDDING
    site = f"{match['part']} {stack}"
    if site not in _NODES_IN_STACK[end]:
        raise NotAnEdge(f"and `{name}` isn't a valid {end}")
    if match["layer"] is None:
        raise NotAnEdge(f"and `{name}` has no layer")
    model_shape = shape.others[stack]
    layer, layers = int(match["layer"]), model_shape.read_layers
    if layer >= layers:
        raise NotAnEdge(f"and `{stack}` has {count_noun(layers, 'layer')}")
    if match["part"] in ("mlp_out", "mlp_norm"):
        if match["word"] is not None:
            raise NotAnEdge(f"and `{site}` has no {match['word']}s")
        return SitePoint(site, layer, None)
    count, word = unit_count(shape, site, layer), "neuron" if match["part"] == NEURONS else "head"
    if match["word"] != word or int(match["unit"]) >= count:
        raise NotAnEdge(f"and `{site} layer {layer}` has {count_noun(count, word)}")
    return SitePoint(site, layer, int(match["unit"]))


def _neuron(layer: int, number: int, shape: ModelShape) -> SitePoint:
    """Return a neuron. Raises NotAnEdge."""
    count = unit_count(shape, NEURONS, layer) if shape.has(NEURONS, layer) else 0
    if number >= count:
        raise NotAnEdge(f"and layer {layer} has {count_noun(count, 'neuron')}")
    return SitePoint(NEURONS, layer, number)


# --- content --------------------------------------------------------------------------------------


def _read_file(path: Path, written: str) -> CircuitFile:
    """Read a file. Raises UnreadableFile."""
    large = "keep the edges of the circuit only"
    content = read_limited_file(
        path, written, limits.CIRCUIT_FILE, pickled=_CONVERSION, large=large
    )
    return _read_content(content, written)


def _read_content(content: bytes, written: str) -> CircuitFile:
    from mechdsl.base.side_files import check_entries, parse_object
    from mechdsl.program.saved_forms import GraphForm, MaskForm

    digest = sha256(content).hexdigest()
    parts = parse_object(content, written)
    if {"nodes", "links"} <= parts.keys():
        raise UnreadableFile(
            f"`{written}` is an attribution graph, whose nodes are features of transcoders",
            f'read its features as a group: `group g = saved("{written}", t0, t1)`',
        )
    if "labels" in parts:
        return _read_mask(check_entries(MaskForm, parts, written), digest, written)
    if "edges" not in parts:
        reason = f"`{written}` has no circuit: `edges` maps names to `score` and `in_graph`"
        raise UnreadableFile(reason, f"or it is a list of names; {_EDGES}")
    return _read_graph(check_entries(GraphForm, parts, written), digest, written)


def _read_mask(form: MaskForm, digest: str, written: str) -> CircuitFile:
    """Read the `mask.json` of a training, with the scores of edges or their probabilities."""
    labels, scores = form.labels, form.scores or form.probabilities or []
    several = len(set(form.chosen)) < len(form.chosen) or len(set(labels)) < len(labels)
    if several or len(scores) != len(labels) or max(form.chosen, default=0) >= len(labels):
        reason = f"`{written}` has no circuit: `chosen` has the numbers of some of its `labels`"
        raise UnreadableFile(reason, "write the file with `mechdsl fit FILE --out FOLDER`")
    chosen = frozenset(labels[number] for number in form.chosen)
    named = dict(zip(labels, scores, strict=True))
    return CircuitFile(digest, {}, named, chosen, form.dictionaries, prompts=tuple(form.prompts))


def _read_graph(form: GraphForm, digest: str, written: str) -> CircuitFile:
    """Read a graph of EAP-IG or MIB, or a list of edges."""
    config = {} if form.cfg is None else form.cfg.model_dump()
    edges = form.edges
    if isinstance(edges, list):
        return CircuitFile(digest, config, dict.fromkeys(edges), frozenset(edges))
    name = next((name for name, node in form.nodes.items() if not all(node.neurons)), None)
    if name is not None:
        reason = f"`{written}` chooses `neurons` of `{name}`: these are coordinates of its output, "
        reason += "and edges carry whole outputs"
        raise UnreadableFile(reason, 'choose edges in EAP-IG: `apply_topn(…, level="edge")`')
    name = next((name for name in edges if _AT in name and " -> " not in name), None)
    if name is not None:
        reason = f"`{written}` has `{name}`, and graphs of EAP-IG have no positions"
        raise UnreadableFile(
            reason, f'write a list: `{{"edges": ["L0H1 -> logits{_AT}last token"]}}`'
        )
    scores = {name: edge.score for name, edge in edges.items()}
    if not any(scores.values()):  # as in a circuit that was written without scores
        scores = dict.fromkeys(scores)
    chosen = frozenset(name for name, edge in edges.items() if edge.in_graph)
    nodes = tuple(name for name in form.nodes if _SPLIT_NODE.search(name))
    named = form.dictionaries, nodes, tuple(form.prompts)
    return CircuitFile(digest, config, scores, chosen, *named)
