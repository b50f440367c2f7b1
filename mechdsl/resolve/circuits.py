"""Edges of circuits: the nodes of a model, the edges between them, and those that a rule ablates.

References: Conmy et al. 2023 (arXiv 2304.14997), section 3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from heapq import heappop, heappush
from itertools import chain, groupby, product
from random import Random
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from mechdsl.base import limits
from mechdsl.base.files import UnreadableFile
from mechdsl.base.hashing import stable_hash
from mechdsl.base.records import Record
from mechdsl.base.text import Span, count_noun
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.experiments import BadPick
from mechdsl.diagnostics.rules import AxisDoesNotFit, BadBasis, NoPath, NotOnAPath
from mechdsl.diagnostics.syntax import BadArgument, NotSupported
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.models.shape import ModelShape, unit_count
from mechdsl.program import spec
from mechdsl.program.paths import SAVED_PATH, path_to_read
from mechdsl.program.spec import constant_value
from mechdsl.program.statements import join_features
from mechdsl.program.trainers import SearchLevel
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.cells import counts_from_end, list_token_places
from mechdsl.resolve.circuit_files import (
    EMBEDDING,
    EMBEDDINGS,
    ENCODER_EMBEDDING,
    END,
    ENDS,
    NEURONS,
    VISION_EMBEDDING,
    VISION_END,
    NamedNodes,
    SavedCircuit,
    list_neurons,
    read_circuit,
    split_mlps,
)
from mechdsl.resolve.findings import PickError, count_picked
from mechdsl.resolve.sites import (
    ExperimentContext,
    describe_position,
    find_missing_point,
    label_candidates,
    label_node,
    resolve_site,
)
from mechdsl.resolve.targets import resolve_edge_place
from mechdsl.resolve.trainings import compare_prompts, order_tokens
from mechdsl.resolve.types import (
    Axis,
    AxisIndices,
    BasisMember,
    BasisTargets,
    CircuitEdge,
    CircuitTargets,
    Convention,
    EdgeAtPlace,
    FeatureNode,
    FeatureNodes,
    MaskCandidate,
    NamedEdge,
    PlacedEdge,
    PlacedEdges,
    PlaceOrder,
    PositionTargets,
    ResolvedExperiment,
    ResolvedRule,
    SiteLayer,
    SitePoint,
    SiteTargets,
    find_split_output,
    find_stream,
    is_neuron,
    name_neurons,
    precedes,
)
from mechdsl.syntax import ast
from mechdsl.syntax.printer import format_position
from mechdsl.syntax.traversal import number_names, walk
from mechdsl.vocab.metrics import CircuitBaseline
from mechdsl.vocab.sites import SITES, TokenSide, in_stack, write_order

SENDER_WORDS = "`embed`, `L0H1`, `L0.mlp`, `L0N3` or `feature 3 of f`"

RECEIVER_WORDS = "`L1H0.q`, `L1H0.k`, `L1H0.v`, `L1.mlp`, `L1N3`, `feature 3 of f` or `logits`"

STACK_SENDERS = "`L0H1`, `L0.mlp`, `z cross layer 0 head 1` or `mlp_out encoder layer 0`"

STACK_RECEIVERS = "`L1H0.q`, `logits`, `q cross layer 1 head 0` or `v cross layer 1 head 0`"

VISION_SENDERS = "`embed vision`, `z vision layer 0 head 1` or `mlp_out vision layer 0`"

VISION_RECEIVERS = "`q vision layer 1 head 0`, `mlp_norm vision layer 1` or `embed`"

_SENDERS = {
    "embed": "resid_pre",
    "z": "z",
    "head_out": "z",
    "mlp_out": "mlp_out",
    "attn_out": "attn_out",
    NEURONS: NEURONS,
}
"""Component of a sender → the site of its output."""

_RECEIVERS = {
    "q": "q",
    "k": "k",
    "v": "v",
    "mlp_norm": "mlp_norm",
    "mlp_out": "mlp_norm",
    "attn_out": "attn_out",
    NEURONS: NEURONS,
    "logits": "logits",
    "final_norm": "logits",
}
"""Component of a receiver → the site that it reads the stream at; `L1.mlp` names `mlp_out`."""

_MLP_NODES = "mlp_out", "mlp_norm", NEURONS
"""Components of the nodes of an MLP: itself, features and neurons."""

_FEATURE_ENDS = {"start": "mlp_out", "end": "mlp_norm"}
"""Sites of features of the output of an MLP as senders and as receivers."""

_READING_NOTE = (
    "each query, key and value of a head, each MLP and the {} read the stream of this pass "
    "with the fill instead of the output of the senders of ablated edges, through norms that are "
    "recomputed; {}biases that are added after heads belong to no sender"
)

CIRCUIT_NOTE = _READING_NOTE.format(
    "output", "`embed` is the stream that enters block 0, with positions; "
)

VISION_CIRCUIT_NOTE = _READING_NOTE.format("projector", "")

NEURON_NOTE = (
    "a neuron sends its activation times its output weights and reads the stream separately; the "
    "other neurons of its layer are one node, and the bias of the MLP belongs to no node"
)

ATTENTION_NOTE = (
    "a feature of the output of attention sends its activation times its decoder row, and reads "
    "the outputs of the heads of its layer separately, through their sum, the norm after it if "
    "there is one, and its encoder; the other features, the error of the dictionary and the biases "
    "of attention are one node, `{}`; the heads send only to these nodes"
)

FEATURE_NOTE = (
    "a feature sends its activation times its decoder row and reads the stream separately, through "
    "the norm before the MLP{} and its encoder; the other features of its layer, the error of the "
    "dictionary and the biases of the MLP are one node, such as `{}`"
)


FeatureResolver: TypeAlias = Callable[
    [ast.Site, ExperimentContext], Mapping[SiteLayer, FeatureNodes]
]
"""Resolves the features at an end of an edge, by output; empty after an error."""


VISION_NOTE = (
    "edges of the vision encoder are ablated at the patches of tokens of images; `embed vision` is "
    "the stream that enters block 0 of the encoder, and `embed` the projector, which reads the end "
    "of the stream, and in some models also the stream after earlier blocks; class tokens and "
    "patches without a token have all edges"
)

STREAM_NOTE = (
    "edges of the encoder are ablated at tokens that it reads, edges of the decoder at its own; "
    "keys and values of `cross` are receivers of the encoder, which they read after its last block "
    "and final norm; `embed encoder` is the stream that enters block 0 of the encoder"
)


def resolve_circuit(
    circuit: spec.Circuit,
    rule: spec.Rule,
    work: ExperimentContext,
    resolve_features: FeatureResolver,
) -> tuple[SiteTargets, CircuitTargets] | None:
    """Resolve the edges that `ablate CIRCUIT` or `ablate all but CIRCUIT` ablates, for each edge
    of the circuit with `without each edge`.

    Returns:
        The senders of these edges, and the edges; None after an error.

    Codes: E0108, E0207, E0304, E0320, E0334, E0335, and those of sites.
    """
    assert rule.site is not None
    edges = find_circuit_edges(circuit, rule.site.span, work, resolve_features)
    if edges is None:
        return None
    every, tokens = edges.every, _TokenClasses.of(edges.places, work)
    picked = _pick_edges(circuit, edges, rule.site, work)
    if picked is None:
        return None
    axes, named = picked
    if rule.without_edge and axes:
        what = f"`without each edge` of a circuit whose edges depend on `{axes[0]}`"
        later = f"write a number instead of `{axes[0]}`, and an experiment for each number"
        work.diagnostics.append(NotSupported(span=rule.site.span, what=what, later=later))
        return None
    name = rule.site.span.written if rule.site.ranked is not None else circuit.name
    left, labels = named, _label_picks(name, rule, named)
    if rule.without_edge:
        left, labels = _leave_out_each_edge(edges, named, labels[()], rule, work)
        axes = (EDGE_AXIS,)
    ablated = {key: _list_ablated(every, own, tokens, rule) for key, own in left.items()}
    if not any(chain.from_iterable(ablated.values())):
        _report_nothing_ablated(name, rule, len(every), work)
        return None
    sites = _target_senders(axes, ablated, labels, edges.features)
    known = _find_scores(edges, named.values())
    return sites, CircuitTargets(
        circuit.name,
        ablated,
        every,
        named,
        tokens.places,
        tokens.classes,
        tokens.encoder,
        edges.neurons,
        edges.features,
        known,
        edges.digest,
        edges.made,
        waits=circuit.is_open and circuit.source is None and not known,
        others=dict(_list_other_scores(edges, known)),
        place_texts=edges.place_texts,
        prompts=edges.prompts,
    )


def find_dead_edges(
    circuit: CircuitTargets, positions: PositionTargets, rule: spec.Rule, work: ExperimentContext
) -> tuple[CircuitEdge, ...]:
    """Return the edges of a circuit that aren't on a path of its edges to the end of the model, if
    a rule ablates all others at every token. Tokens without ablation have paths of all edges."""
    rows = work.table.runs[work.experiment.base].rows
    if (
        not rule.all_but
        or circuit.waits
        or circuit.edge_places
        or len(circuit.named) != 1
        or work.sites.shape.stands_in
        or circuit.stack == "vision"  # class tokens aren't written
        or any(
            {*chain.from_iterable(hits)} < {*range(len(row.ids))}
            for cell in positions.written.values()
            for row, hits in zip(rows, cell.hits, strict=True)
        )
    ):
        return ()
    (named,) = circuit.named.values()
    every = [edge for edge in circuit.every if edge in named]
    graph = EdgeGraph(work.sites.shape, circuit.neurons, circuit.features, every)
    leading = graph.keep_leading(frozenset(named))
    return tuple(edge for edge in named if edge not in leading)


def _leave_out_each_edge(
    edges: CircuitEdges,
    named: Mapping[AxisIndices, PlacedEdges],
    label: str,
    rule: spec.Rule,
    work: ExperimentContext,
) -> tuple[dict[AxisIndices, PlacedEdges], dict[AxisIndices, str]]:
    """Add an axis with each edge of a circuit, and return the circuit without this edge, with
    labels."""
    assert rule.site is not None
    of_all = named.get((), {})
    own = tuple(edge for edge in edges.every if edge in of_all)
    texts = tuple(_label_edge(edge, of_all[edge], edges.places) for edge in own)
    work.add_axis(Axis(EDGE_AXIS, texts, rule.site.span))
    left: dict[AxisIndices, PlacedEdges] = {
        (n,): {edge: at for edge, at in of_all.items() if edge != points}
        for n, points in enumerate(own)
    }
    return left, dict.fromkeys(left, f"{label} without one edge")


def _find_scores(edges: CircuitEdges, named: Iterable[PlacedEdges]) -> dict[EdgeAtPlace, float]:
    """Return the scores of named edges at each of their positions, in descending order of sizes."""
    there = {(edge, n) for own in named for edge, at in own.items() for n in _list_places(at)}
    scores = edges.by_place
    return {each: scores[each] for each in edges.listed if each in there and each in scores}


def _list_other_scores(
    edges: CircuitEdges, named: Collection[EdgeAtPlace]
) -> Iterator[tuple[NamedEdge, float]]:
    """Yield the edges that aren't in a circuit with their scores, if they have any.

    Args:
        named: The edges of the circuit that have scores, at each of their positions.
    """
    if not named:
        return
    for edge, score in edges.scores.items():
        if (edge, None) not in named and math.isfinite(score):
            yield (edge, None), score
    for (edge, place), score in edges.by_place.items():
        text = "" if place is None else edges.place_texts[place]
        if text and (edge, place) not in named:
            yield (edge, text), score
    yield from edges.others.items()


class CircuitEdges(Record):
    """The edges of a circuit in a model."""

    every: tuple[CircuitEdge, ...]
    """The edges of the model."""
    edges: tuple[CircuitEdge, ...]
    """In descending order of the sizes of their scores, or forward order without scores."""
    scores: Mapping[CircuitEdge, float]
    """The scores of these edges, perhaps of more; empty without scores, or if edges have them at
    positions."""
    places: tuple[PositionCell, ...] = ()
    """Positions of edges in the base run, once each."""
    digest: str = ""
    """SHA-256 of the file that it was read from; empty without one."""
    made: str = ""
    """How its edges were read from a file, for conventions."""
    neurons: Mapping[SiteLayer, tuple[int, ...]] = field(
        default_factory=dict[SiteLayer, tuple[int, ...]]
    )
    """As in `CircuitTargets`."""
    features: Mapping[SiteLayer, FeatureNodes] = field(
        default_factory=dict[SiteLayer, FeatureNodes]
    )
    """As in `CircuitTargets`."""
    listed: tuple[EdgeAtPlace, ...] = ()
    """These edges at each of their positions, in descending order of the sizes of their scores."""
    by_place: Mapping[EdgeAtPlace, float] = field(default_factory=dict[EdgeAtPlace, float])
    """The scores of edges at their positions; empty without scores."""
    place_texts: tuple[str, ...] = ()
    """As in `CircuitTargets`."""
    prompts: tuple[str, ...] = ()
    """As in `CircuitTargets`."""
    others: Mapping[NamedEdge, float] = field(default_factory=dict[NamedEdge, float])
    """The scores of other edges at positions of a file."""


def find_circuit_edges(
    circuit: spec.Circuit,
    span: Span,
    work: ExperimentContext,
    resolve_features: FeatureResolver,
) -> CircuitEdges | None:
    """Return the edges of a circuit; None after E0108 for a model without such edges, E0334 for
    an MLP and its neurons, E0342 for a file, and errors of sites and positions."""
    shape = work.sites.shape
    every = list_edges(shape)
    if _report_missing_edges(every, span, work):
        return None
    before = len(work.diagnostics)
    parts = _CircuitParts(work, resolve_features)
    named = _resolve_named_nodes(circuit, parts, work)
    saved = None if circuit.source is None else _read_saved(circuit.source, named, work)
    nodes = named.neurons if saved is None else saved.neurons
    if circuit.name == spec.EVERY_EDGE:
        of_all = list_edges(shape, nodes, named.features) if named.are_some else every
        parts.found = dict.fromkeys(of_all)
    parts.found.update(_list_vision_edges(circuit, span, work))
    resolved: list[tuple[ast.SiteMap, list[CircuitEdge]]] = []
    given_scores = circuit.placed_scores or (None,) * len(circuit.edges)
    for edge, score in zip(circuit.edges, given_scores, strict=True):
        own = [split_mlps(points, nodes) for points in _resolve_edge(edge, parts, work)]
        resolved.append((edge, own))
        parts.add(resolved[-1][1], edge.at, score)
    if saved is not None and circuit.source is not None:
        for edge, at in saved.edges:
            place = None if at is None else saved.places[at]
            parts.add([edge], place, saved.scores.get((edge, at)), circuit.source)
    stack = _find_stack(circuit, parts, work)
    neurons = nodes or list_neurons(parts.found)
    features = named.features or _list_features(chain.from_iterable(parts.found), parts)
    if neurons or features:
        given = nodes or named.features
        _check_nodes(circuit, [] if given else resolved, neurons, features, work)
    _check_attention_nodes(resolved, features, work)
    if has_errors(work.diagnostics[before:]):
        return None
    if neurons or features or stack:
        every = list_edges(shape, neurons, features, stack)
    if shape.stands_in:  # edges of other stacks may not be among those of a placeholder
        every = list(dict.fromkeys((*every, *parts.found)))
    by_place = dict[EdgeAtPlace, float](parts.by_place)
    by_place |= {(edge, None): own for edge, own in zip(every, circuit.scores, strict=False)}
    others = {} if saved is None else saved.others
    by_place |= {(edge, None): own for (edge, at), own in others.items() if at is None}
    scores = {edge: own for (edge, at), own in by_place.items() if at is None}
    edges = [edge for edge in every if edge in parts.found]
    edges.sort(key=lambda edge: -abs(scores.get(edge, 0)))  # stable
    listed = [(edge, place) for edge in edges for place in _list_places(parts.found[edge])]
    listed.sort(key=lambda each: -abs(by_place.get(each, 0)))
    digest, made = ("", "") if saved is None else (saved.digest, saved.made)
    if saved is not None:
        made += f"; {_describe_prompts(circuit.name, saved, work)}"
    given = tuple(every), tuple(edges), scores, tuple(parts.places), digest, made, neurons, features
    last = tuple(listed), by_place, tuple(parts.place_texts), saved.prompts if saved else ()
    placed = {each: own for each, own in others.items() if each[1] is not None}
    return CircuitEdges(*given, *last, placed)


def _list_vision_edges(
    circuit: spec.Circuit, span: Span, work: ExperimentContext
) -> dict[CircuitEdge, None]:
    """List the edges of the vision encoder of prompts if a circuit is that of all of them; none
    after E0108 or E0413 for a model without such edges."""
    shape = work.sites.shape
    if circuit.name != spec.EVERY_VISION_EDGE:
        return {}
    if shape.attends_to_image:
        work.diagnostics.append(_reject_attended_encoder(span))
        return {}
    missing = find_missing_point([VISION_EMBEDDING], shape, work.sites.model, span)
    if missing is not None:
        work.diagnostics.append(missing)
        return {}
    every = list_edges(shape, stack="vision")
    return {} if _report_missing_edges(every, span, work) else dict.fromkeys(every)


def _reject_attended_encoder(span: Span) -> NotSupported:
    """Return E0108 for edges of the encoder of an image that blocks attend to."""
    what = "an edge of the vision encoder in a model whose blocks attend to an image"
    later = "write `path z vision layer 0 head 1 -> q vision layer 1 head 0`"
    return NotSupported(span=span, what=what, later=later)


class ComparedCircuits(Record):
    """Two circuits as sets of edges between the same nodes, at each group of tokens."""

    first: frozenset[tuple[CircuitEdge, frozenset[int]]]
    """Edges with the numbers of the positions that a group of tokens is at."""
    second: frozenset[tuple[CircuitEdge, frozenset[int]]]
    total: int
    """Number of edges of the model, once for each group of tokens."""
    every: tuple[CircuitEdge, ...] = ()
    """The edges of the model."""
    groups: tuple[str, ...] = ()
    """Names of the groups of tokens; empty without positions."""
    divided: tuple[str, ...] = ()
    """Names of the nodes that only one of the circuits divides."""


def compare_circuits(
    first: CircuitEdges, second: CircuitEdges, rule: spec.Rule, work: ExperimentContext
) -> ComparedCircuits | tuple[str, str]:
    """Return two circuits as comparable sets of edges, or why they have none and what to write.

    An MLP that one circuit divides into neurons or features is divided in the other one, too: an
    edge of the MLP is one edge of each of its nodes. An edge without a position is at all tokens.
    """
    problem, stack = _explain_different_nodes(first, second), find_stream(first.every)
    if stack != find_stream(second.every):
        hint = "compare two circuits of the vision encoder, or two of the language model"
        return "in the vision encoder and in the language model", hint
    if problem is not None:
        return problem, "compare circuits with the same nodes in these layers"
    shape, both = work.sites.shape, (first, second)
    neurons = {
        where: tuple(
            sorted({n for circuit_edges in both for n in circuit_edges.neurons.get(where, ())})
        )
        for where in sorted({*first.neurons, *second.neurons})
    }
    features = dict[SiteLayer, FeatureNodes]()
    for output, feature_nodes in chain.from_iterable(
        circuit_edges.features.items() for circuit_edges in both
    ):
        known = features.get(output, feature_nodes)
        which = tuple(sorted({*known.which, *feature_nodes.which}))
        features[output] = replace(feature_nodes, which=which)
    every = list_edges(shape, neurons, features, stack)
    if shape.stands_in:
        every = list(dict.fromkeys((*every, *first.every, *second.every)))
    numbers = {place: n for n, place in enumerate(dict.fromkeys((*first.places, *second.places)))}
    tokens = _TokenClasses()
    if numbers:
        tokens = _without_empty_classes(_TokenClasses.of(tuple(numbers), work), work)
    divided = dict[SitePoint, None]()

    def place(named: PlacedEdges) -> frozenset[tuple[CircuitEdge, frozenset[int]]]:
        here = zip(tokens.classes, _list_ablated(every, named, tokens, rule), strict=True)
        return frozenset((edge, at) for at, own in here for edge in own)

    sets = [place(_divide_edges(circuit_edges, every, numbers, divided)) for circuit_edges in both]
    total = len(place(dict.fromkeys(every)))
    groups = [label_places(at, tokens.places) or "other tokens" for at in tokens.classes]
    names = tuple(dict.fromkeys(map(label_node, divided)))
    groups = tuple(groups) if numbers else ()
    return ComparedCircuits(sets[0], sets[1], total, tuple(every), groups, names)


def _explain_different_nodes(first: CircuitEdges, second: CircuitEdges) -> str | None:
    """Return why the nodes of two circuits aren't those of one circuit, if they aren't."""
    for one, other in ((first, second), (second, first)):
        for output, feature in one.features.items():
            name = label_node(SitePoint(*output, None))
            known = other.features.get(output)
            if output[0] == "attn_out" and feature != known:
                return f"with different features of `{name}`, which change the edges of its heads"
            if known is not None and known.member != feature.member:
                return f"with features of two dictionaries at `{name}`"
            mlp = output[0] == "mlp_out"
            if mlp and name_neurons(SitePoint(*output, None)) in other.neurons:
                return f"one with neurons of `{name}`, and the other one with features of it"
    return None


def _without_empty_classes(tokens: _TokenClasses, work: ExperimentContext) -> _TokenClasses:
    """Return the classes of tokens that some row has."""
    rows = work.table.runs[work.experiment.base].rows
    places = list_token_places(tokens.places)
    there = {at for own in places for at in own.values()}
    if any(len(own) < len(row.ids) for own, row in zip(places, rows, strict=True)):
        there.add(frozenset())
    return replace(tokens, classes=tuple(at for at in tokens.classes if at in there))


def _divide_edges(
    circuit: CircuitEdges,
    every: Sequence[CircuitEdge],
    numbers: Mapping[PositionCell, int],
    divided: dict[SitePoint, None],
) -> PlacedEdges:
    """Return the edges of a circuit between the nodes of `every`, and add the nodes that it doesn't
    divide to `divided`.

    Args:
        numbers: Number of each position.
    """
    parts = dict[tuple[int, SiteLayer], dict[SitePoint, None]]()
    own = [{edge[end] for edge in circuit.every} for end in (0, 1)]
    for end, point in chain.from_iterable(map(enumerate, every)):
        if SITES[point.site].component in _MLP_NODES and point not in own[end]:
            parts.setdefault((end, name_neurons(point)), {})[point] = None
    nodes = {*chain.from_iterable(every)}

    def divide(end: int, point: SitePoint) -> list[SitePoint]:
        whole = SITES[point.site].component in _MLP_NODES and point.unit is None
        more = parts.get((end, name_neurons(point)), {}) if whole else {}
        divided.update(dict.fromkeys([point] if more else []))
        return [*([point] if point in nodes or not more else []), *more]

    divide_edges = dict[CircuitEdge, frozenset[int] | None]()
    for (of, to), at in _join_places(circuit.listed).items():
        here = None if at is None else frozenset(numbers[circuit.places[n]] for n in at)
        divide_edges |= dict.fromkeys(product(divide(0, of), divide(1, to)), here)
    return divide_edges


def _describe_prompts(name: str, saved: SavedCircuit, work: ExperimentContext) -> str:
    """Describe the prompts that a circuit in a file was chosen on; reports W0738."""
    given = name, saved.prompts, "edge", work.measuring, work.table
    said, problem = compare_prompts(*given)
    if problem is not None and problem not in work.diagnostics:
        work.diagnostics.append(problem)
    return said


def _report_missing_edges(
    every: Sequence[CircuitEdge], span: Span, work: ExperimentContext
) -> bool:
    """Report E0108 for a model without edges or logits, and return whether it has none.

    Args:
        every: The edges that the model should have.
    """
    shape = work.sites.shape
    points = [point for edge in every for point in edge if point not in ENDS]
    missing = find_missing_point(points, shape, work.sites.model, span)
    if missing is None and shape.task != "tokens" and "logits" not in shape.sites:
        what = f"a circuit in `{work.sites.model}`, which has no logits,"
        missing = NotSupported(span=span, what=what)
    work.diagnostics.extend([missing] if missing is not None else [])
    return missing is not None


class _CircuitParts:
    """The edges of a circuit, while they are resolved one after another."""

    def __init__(self, work: ExperimentContext, resolve_features: FeatureResolver) -> None:
        self.resolve_features = resolve_features
        self.found = dict[CircuitEdge, frozenset[int] | None]()
        self.places = dict[PositionCell, int]()
        self.place_texts = list[str]()
        """Each position as a file names it; empty if it depends on other definitions."""
        self.by_place = dict[EdgeAtPlace, float]()
        self.members = dict[SiteLayer, dict[str, BasisMember]]()
        """Dictionaries whose features are nodes, by output and name."""
        self._work = work
        self._cells = dict[tuple[ast.Position, TokenSide], PositionCell | None]()

    def add(
        self,
        edges: Sequence[CircuitEdge],
        at: ast.Position | None,
        score: float | None,
        source: ast.Call | None = None,
    ) -> None:
        """Add edges at a position, with their score; None for all tokens. Reports errors of the
        position.

        Args:
            source: The call of a file that has the position.
        """
        place = None if at is None or not edges else self._find_place(edges[0], at, source)
        number = None if place is None else self.places.setdefault(place, len(self.places))
        if at is not None and len(self.place_texts) < len(self.places):
            depends = any(isinstance(node, ast.ChosenTokens) for node in walk(at))
            depends |= any(True for _ in number_names(at))
            self.place_texts.append("" if depends else format_position(at))
        for edge in edges:
            others = self.found.get(edge, frozenset[int]())
            self.found[edge] = None if number is None or others is None else others | {number}
            self.by_place |= {} if score is None else {(edge, number): score}

    def _find_place(
        self, edge: CircuitEdge, at: ast.Position, source: ast.Call | None
    ) -> PositionCell | None:
        """Return a position of an edge, which is resolved once."""
        side: TokenSide = ""
        if has_two_streams(self._work.sites.shape):
            side = "source" if _is_in_encoder(edge) else "target"
        elif self._work.sites.shape.attends_to_image:
            side = "target"
        if (at, side) not in self._cells:
            self._cells[at, side] = self._resolve(at, side, source)
        return self._cells[at, side]

    def _resolve(
        self, at: ast.Position, side: TokenSide, source: ast.Call | None
    ) -> PositionCell | None:
        """Resolve a position; E0342 at the call for one of a file that doesn't fit the rows."""
        before = len(self._work.diagnostics)
        cell = resolve_edge_place(at, replace(self._work, side=side))
        if source is None:
            return cell
        new = self._work.diagnostics[before:]
        del self._work.diagnostics[before:]
        for problem in new:
            reason = f"its file has edges at `{at.span.written}`: {problem.message}"
            hint = problem.help_text or "use a file that was written for these prompts"
            bad = BadBasis(span=source.span, reason=reason, hint=hint, what="circuit")
            if bad not in self._work.diagnostics:
                self._work.diagnostics.append(bad)
        return cell


def _list_places(at: frozenset[int] | None) -> Sequence[int | None]:
    """Return the numbers of an edge's places; None for all tokens."""
    return (None,) if at is None else sorted(at)


def count_placed(edges: PlacedEdges) -> int:
    """Count edges, once for each of their positions."""
    return sum(len(_list_places(at)) for at in edges.values())


def _join_places(listed: Iterable[EdgeAtPlace]) -> PlacedEdges:
    """Return edges with the places at which they are listed."""
    places = dict[CircuitEdge, frozenset[int] | None]()
    for edge, place in listed:
        others = places.get(edge, frozenset[int]())
        places[edge] = None if place is None or others is None else others | {place}
    return places


class _NamedNodes(Record):
    """The neurons that `nodes` names, by site and layer, or the features, by output."""

    neurons: Mapping[SiteLayer, tuple[int, ...]] = field(
        default_factory=dict[SiteLayer, tuple[int, ...]]
    )
    features: Mapping[SiteLayer, FeatureNodes] = field(
        default_factory=dict[SiteLayer, FeatureNodes]
    )

    @property
    def are_some(self) -> bool:
        return bool(self.neurons or self.features)

    @property
    def labelled(self) -> NamedNodes:
        """The same as files name them."""
        members = (feature.member for feature in self.features.values())
        digests = {
            member.name: member.operand.digest
            for member in members
            if isinstance(member.operand, DictionaryFile)
        }
        ends = (
            pair
            for output, feature in self.features.items()
            for pair in zip(
                list_feature_ends("start", output, feature),
                list_feature_ends("end", output, feature),
                strict=True,
            )
        )
        return NamedNodes(self.neurons, {label_node(of): (of, to) for of, to in ends}, digests)


def _resolve_named_nodes(
    circuit: spec.Circuit, parts: _CircuitParts, work: ExperimentContext
) -> _NamedNodes:
    """Resolve the group that `nodes` names; reports E0207 for other sites."""
    site_points = list[SitePoint]()
    groups = work.program.groups
    for site in circuit.nodes:
        name, before = site.span.written, len(work.diagnostics)
        reason = "" if site.bare is None else _explain_no_nodes(site.bare.id, groups)
        points = [] if reason else _resolve_nodes(site, "start", parts, work)
        for point in points:
            is_node = is_neuron(point) and point.unit is not None
            if not is_node and not isinstance(point, FeatureNode):
                reason = f"has `{label_node(point)}`, and `nodes` are neurons or features"
                break
        group = None if site.bare is None else groups.get(site.bare.id)
        if not reason and group is not None and not group.sites:
            return _NamedNodes()  # the error of its definition is reported
        if not points and not work.sites.shape.stands_in:
            features = site.coordinates is not None or (group is not None and group.names_features)
            reason = reason or f"has no {'features' if features else 'neurons'}"
        if reason and not has_errors(work.diagnostics[before:]):
            hint = "name neurons or features only: `group g = L0N3, L0N97`, "
            hint += "`group g = features 3, 12 of f`"
            bad = BadArgument(span=site.span, name=name, reason=reason, hint=hint)
            work.diagnostics.append(bad)
            return _NamedNodes()
        site_points += points
    nodes = list_neurons([(site_point, site_point) for site_point in site_points])
    both = _find_divided_twice(site_points, nodes)
    if both is not None:
        neuron, feature = map(label_node, both)
        reason = f"divides the same MLP as `{feature}`"
        hint = f"name either neurons or features of layer {both[0].layer}"
        [site] = circuit.nodes
        bad = BadArgument(span=site.span, name=neuron, reason=reason, hint=hint)
        work.diagnostics.append(bad)
        return _NamedNodes()
    return _NamedNodes(nodes, _list_features(site_points, parts))


def _find_divided_twice(
    points: Iterable[SitePoint], neurons: Mapping[SiteLayer, tuple[int, ...]]
) -> tuple[SitePoint, SitePoint] | None:
    """Return a neuron and a feature that are nodes of one MLP; None without such nodes.

    Args:
        neurons: The neurons that are nodes.
    """
    for point in points:
        if isinstance(point, FeatureNode) and find_split_output(point)[0] == "mlp_out":
            where = name_neurons(point)
            if where in neurons:
                return SitePoint(*where, neurons[where][0]), point
    return None


def _explain_no_nodes(name: str, groups: Mapping[str, spec.Group]) -> str:
    """Return why a group can't be the nodes of a training, whatever the model; empty if it may."""
    if name not in groups:
        return "is a group of positions"
    sites = groups[name].sites
    for site in sites:
        if any(isinstance(node, ast.RankedSelection) for node in walk(site)):
            return "depends on the results of an experiment, and a training can't"
        for own in site.names:
            if (
                own.id in groups
                and own.id != name
                and (reason := _explain_no_nodes(own.id, groups))
            ):
                return reason
    return ""


def _list_features(
    points: Iterable[SitePoint], parts: _CircuitParts
) -> dict[SiteLayer, FeatureNodes]:
    """Return the features among nodes, by output in forward order."""
    features: dict[SiteLayer, set[int]] = defaultdict(set)
    for end in points:
        if isinstance(end, FeatureNode) and end.unit is not None:
            features[find_split_output(end)].add(end.unit)
    return {
        output: FeatureNodes(
            next(iter(parts.members[output].values())), tuple(sorted(features[output]))
        )
        for output in sorted(features, key=lambda output: write_order(*output))
    }


def list_circuit_bases(circuit: CircuitTargets) -> BasisTargets | None:
    """Return the dictionaries whose features are nodes of a circuit, without coordinates; None if
    there are none."""
    members = {output: feature.member for output, feature in circuit.features.items()}
    if not members:
        return None
    names = tuple(dict.fromkeys(member.name for member in members.values()))
    return BasisTargets(
        ", ".join(names),
        names,
        tuple({(n, None): member} for (_, n), member in members.items()),
        (),
        {},
    )


def _check_nodes(
    circuit: spec.Circuit,
    edges: Sequence[tuple[ast.SiteMap, Sequence[CircuitEdge]]],
    neurons: Mapping[SiteLayer, tuple[int, ...]],
    features: Mapping[SiteLayer, FeatureNodes],
    work: ExperimentContext,
) -> None:
    """Report E0207 for a circuit with too many neurons or features, and E0334 for one that also
    names the MLP of a neuron, or features of a layer whose neurons it names.

    Args:
        edges: Those of each `A -> B` in the file.
    """
    count = sum(map(len, neurons.values()))
    if count > limits.CIRCUIT_NEURONS:
        work.diagnostics.append(_too_many(circuit.name, count, circuit.span))
    count = sum(len(feature.which) for feature in features.values())
    if count > limits.CIRCUIT_NEURONS:
        work.diagnostics.append(_too_many(circuit.name, count, circuit.span, "feature"))
    for node, own in edges:
        _check_one_split(node, own, neurons, work)
        for verb, site, points in (
            ("start", node.source, [of for of, _ in own if SITES[of.site].component == "mlp_out"]),
            ("end", node.target, [to for _, to in own if SITES[to.site].component == "mlp_norm"]),
        ):
            whole = (site_point for site_point in points if not isinstance(site_point, FeatureNode))
            point = next(
                (site_point for site_point in whole if name_neurons(site_point) in neurons), None
            )
            if point is None:
                continue
            where = name_neurons(point)
            named = label_node(SitePoint(*where, neurons[where][0]))
            reason = f"the circuit names `{named}`, a neuron of this MLP"
            mlp = label_node(SitePoint(*where, None))
            hint = f"name neurons of layer {point.layer} only, or `{mlp}` only"
            bad = NotOnAPath(
                what="an edge", span=site.span, verb=verb, site=point.site, reason=reason, hint=hint
            )
            if bad not in work.diagnostics:
                work.diagnostics.append(bad)


def _check_attention_nodes(
    edges: Sequence[tuple[ast.SiteMap, Sequence[CircuitEdge]]],
    features: Mapping[SiteLayer, FeatureNodes],
    work: ExperimentContext,
) -> None:
    """Report E0334 for edges that don't fit the nodes of an output of attention.

    The output is a node only if features of it are nodes. Heads of its layer then send only to
    these nodes.

    Args:
        edges: The edges of each `A -> B` in the file.
    """
    problems = list[NotOnAPath]()
    for node, own in edges:
        for of, to in own:
            for verb, site, end in (("start", node.source, of), ("end", node.target, to)):
                if end.site == "attn_out" and ("attn_out", end.layer) not in features:
                    where = f"attn_out layer {end.layer}"
                    reason = f"`{label_node(end)}` is a node only in a circuit with features of a "
                    reason += f"dictionary at `{where}`: it is the rest of this output"
                    heads = ("q", "k", "v") if verb == "end" else ("z",)
                    every = " and ".join(f"`{head} layer {end.layer} heads *`" for head in heads)
                    words = SENDER_WORDS if verb == "start" else RECEIVER_WORDS
                    hint = f"name the heads, {every}, or one of {words}"
                    given = site.span.written, reason, hint
                    problems.append(_not_on_a_path(site, verb, *given))
            split = features.get(("attn_out", of.layer))
            if of.site == "z" and to.site != "attn_out" and split is not None:
                rest = label_node(SitePoint("attn_out", of.layer, None))
                name = split.member.name.partition("[")[0]
                reason = f"features of `{name}` are nodes, so `{label_node(of)}` sends only to "
                reason += f"nodes of layer {of.layer}: features of `{name}`, and `{rest}` for the "
                reason += "rest of the output of attention"
                hint = f"write `{label_node(of)} -> {rest}`, `{rest} -> {label_node(to)}`"
                given = node.target.span.written, reason, hint
                problems.append(_not_on_a_path(node.target, "end", *given))
    new = [problem for problem in dict.fromkeys(problems) if problem not in work.diagnostics]
    work.diagnostics.extend(new[:1])


def _not_on_a_path(site: ast.Site, verb: str, name: str, reason: str, hint: str) -> NotOnAPath:
    return NotOnAPath(
        what="an edge", span=site.span, verb=verb, site=name, reason=reason, hint=hint
    )


def _check_one_split(
    node: ast.SiteMap,
    edges: Sequence[CircuitEdge],
    neurons: Mapping[SiteLayer, tuple[int, ...]],
    work: ExperimentContext,
) -> None:
    """Report E0334 for features of a layer whose neurons are nodes, too."""
    for verb, site, points in (
        ("start", node.source, [of for of, _ in edges]),
        ("end", node.target, [to for _, to in edges]),
    ):
        both = _find_divided_twice(points, neurons)
        if both is None:
            continue
        named = label_node(both[0])
        reason = f"the circuit names `{named}`, a neuron of the same MLP"
        hint = f"name either neurons or features of layer {both[0].layer}"
        bad = NotOnAPath(
            what="an edge", span=site.span, verb=verb, site="feature", reason=reason, hint=hint
        )
        if bad not in work.diagnostics:
            work.diagnostics.append(bad)


def _too_many(name: str, count: int, span: Span, noun: str = "neuron") -> BadArgument:
    reason = f"names {count:,} {noun}s, and at most {limits.CIRCUIT_NEURONS:,} can be nodes"
    hint = f"name fewer {noun}s, or whole MLPs such as `L0.mlp`"
    return BadArgument(span=span, name=name, reason=reason, hint=hint)


def _read_saved(call: ast.Call, named: _NamedNodes, work: ExperimentContext) -> SavedCircuit | None:
    """Read the edges of `saved("circuit.json", size: 100, nodes: g)`; None after an error.

    Args:
        named: The nodes that `nodes` names.
    """
    path_node, *_ = (argument.value for argument in call.arguments if argument.name is None)
    sizes = (argument.value for argument in call.arguments if argument.name == "size")
    size = next((constant_value(each, work.program.parameters) for each in sizes), None)
    written = str(constant_value(path_node, work.program.parameters))
    path, problems = path_to_read(SAVED_PATH, written, call.span)
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    if path is None:
        return None
    try:
        assert size is None or isinstance(size, int)
        shape = work.sites.shape

        def list_with(
            neurons: Mapping[SiteLayer, tuple[int, ...]], stack: Literal["", "vision"]
        ) -> Sequence[CircuitEdge]:
            return list_edges(shape, neurons, named.features, stack)

        return read_circuit(path, written, size, shape, list_with, named.labelled)
    except UnreadableFile as problem:
        reason, hint = problem.reason, problem.hint
        bad = BadBasis(span=call.span, reason=reason, hint=hint, what="circuit")
        if bad not in work.diagnostics:
            work.diagnostics.append(bad)
        return None


class _TokenClasses(Record):
    """The tokens at which different edges of a circuit are ablated, as in `CircuitTargets`."""

    places: tuple[PositionCell, ...] = ()
    classes: tuple[frozenset[int], ...] = (frozenset(),)
    encoder: int | None = None

    @staticmethod
    def of(places: tuple[PositionCell, ...], work: ExperimentContext) -> _TokenClasses:
        """Return the classes of tokens for edges at some positions."""
        encoder, classes = None, set[frozenset[int]]()
        if has_two_streams(work.sites.shape):
            rows = work.table.runs[work.experiment.base].rows
            hits = tuple((tuple(range(row.source)),) for row in rows)
            encoder, places = len(places), (*places, PositionCell("tokens of the encoder", hits))
            classes.add(frozenset({encoder}))
        classes.update(numbers for row in list_token_places(places) for numbers in row.values())
        return _TokenClasses(places, (frozenset(), *sorted(classes, key=sorted)), encoder)


def _label_edge(
    edge: CircuitEdge, at: frozenset[int] | None, places: Sequence[PositionCell]
) -> str:
    """Format an edge with its positions: `embed -> L0H1.q at last token`."""
    text = label_candidates((edge,))
    return text if at is None else f"{text} at {label_places(at, places)}"


def label_places(at: Collection[int], places: Sequence[PositionCell]) -> str:
    """Format the positions of an edge: `s1 token and last token`.

    Args:
        at: Their numbers.
        places: Those of the circuit.
    """
    return " and ".join(describe_position(places[number].label) for number in sorted(at))


EDGE_AXIS = "edge"
"""Name of the axis of `without each edge`."""


def _pick_edges(
    circuit: spec.Circuit,
    circuit_edges: CircuitEdges,
    site: ast.Site,
    work: ExperimentContext,
) -> tuple[tuple[str, ...], dict[AxisIndices, PlacedEdges]] | None:
    """Return the edges of `c`, or those of `top n of c` for every value of the `for` variables in
    it, with the names of these; None after E0207 for a circuit without scores, and E0620 for
    picks of too many edges."""
    node, listed = site.ranked, circuit_edges.listed
    if circuit.edges and not listed:
        return None  # its edges have errors
    if node is None:
        return (), {(): _join_places(listed)}
    trained = circuit.name in work.program.masks
    if circuit.is_open and not trained:
        return None  # its call has an error
    if not circuit_edges.by_place and not trained:
        reason = "lists its edges without scores, and `top` selects those with the largest"
        hint = f"write `{circuit.name}`, or let `fit` choose its edges: `fit(mask(size: 20), …)`"
        bad = BadArgument(span=site.span, name=circuit.name, reason=reason, hint=hint)
        work.diagnostics.append(bad)
        return None
    variables = set(number_names(node))
    loops = tuple(name for name in work.loops if name in variables)
    picked: dict[AxisIndices, PlacedEdges] = {}
    known = (
        circuit_edges.by_place and not work.sites.shape.stands_in
    )  # otherwise, edges are placeholders
    noun = "edges at positions" if circuit_edges.places else "edges"
    there = f"`{circuit.name}` has {{}} {noun}" if known else None
    for key, values in work.sites.combinations(loops):
        try:
            here = {**work.sites.parameters, **values}
            picked[key] = _join_places(listed[: count_picked(node, here, len(listed), there)])
        except PickError as problem:
            bad = BadPick(
                span=site.span, text=node.span.written, reason=problem.reason, hint=problem.hint
            )
            work.diagnostics.append(bad)
            return None
    return loops, picked


def _label_picks(
    name: str, rule: spec.Rule, named: Mapping[AxisIndices, PlacedEdges]
) -> dict[AxisIndices, str]:
    """Return the names of what a rule ablates: `all but top 5 of c`."""
    node = None if rule.site is None else rule.site.ranked
    before = "all but " if rule.all_but else ""
    if node is None or len(named) == 1:
        return dict.fromkeys(named, before + name)
    counts = {key: count_placed(own) for key, own in named.items()}
    return {key: f"{before}top {count} of {node.of}" for key, count in counts.items()}


def _report_nothing_ablated(
    name: str, rule: spec.Rule, count: int, work: ExperimentContext
) -> None:
    """Report E0207 for a rule that ablates no edge.

    Args:
        count: Number of edges of the model.
    """
    assert rule.site is not None
    reason = f"the circuit has all {count:,} edges of `{work.sites.model}`"
    hint = f"write `ablate {name}`, or name fewer edges"
    if not rule.all_but:
        reason = f"`{name}` has {'one edge' if rule.without_edge else 'no edge'}"
        hint = f"write `ablate {name}`, or name more edges" if rule.without_edge else "name some"
    name = f"all but {name}" if rule.all_but else name
    reason = f"leaves no edge to ablate: {reason}"
    bad = BadArgument(span=rule.site.span, name=name, reason=reason, hint=hint)
    work.diagnostics.append(bad)


def _list_ablated(
    every: Collection[CircuitEdge],
    named: PlacedEdges,
    tokens: _TokenClasses,
    rule: spec.Rule,
) -> tuple[tuple[CircuitEdge, ...], ...]:
    """Return the edges that a rule ablates if it names some edges, for each class of tokens in
    forward order."""
    ablated: list[tuple[CircuitEdge, ...]] = []
    for places in tokens.classes:
        own = {edge for edge, at in named.items() if at is None or at & places}
        here = [edge for edge in every if (edge in own) != rule.all_but]
        if tokens.encoder is not None:
            encodes = tokens.encoder in places
            here = [edge for edge in here if _is_in_encoder(edge) == encodes]
        ablated.append(tuple(here))
    return tuple(ablated)


def _is_in_encoder(edge: CircuitEdge) -> bool:
    """Whether an edge is in the stream of an encoder-decoder's encoder."""
    return SITES[edge[0].site].stack == "encoder"


def list_sender_sites(edges: Iterable[CircuitEdge]) -> tuple[SitePoint, ...]:
    """Return the distinct sites of the senders of edges. The site of a feature has no unit."""
    senders = dict.fromkeys(of for of, _ in edges)
    sites = (
        SitePoint(of.site, of.layer, None) if isinstance(of, FeatureNode) else of for of in senders
    )
    return tuple(dict.fromkeys(sites))


def _target_senders(
    axes: tuple[str, ...],
    edges: Mapping[AxisIndices, tuple[tuple[CircuitEdge, ...], ...]],
    labels: Mapping[AxisIndices, str],
    features: Mapping[SiteLayer, FeatureNodes],
) -> SiteTargets:
    """Return the sites of the senders of edges, and those that are read for them: for features of a
    transcoder also what it encodes."""
    points = dict[AxisIndices, tuple[SitePoint, ...]]()
    sources = dict[AxisIndices, tuple[SitePoint, ...]]()
    for key, own in edges.items():
        points[key] = sources[key] = list_sender_sites(chain.from_iterable(own))
        for point in points[key]:
            split = features.get((point.site, point.layer))
            if split is not None and split.member.reads:
                points[key] += (point,)
                sources[key] += (replace(point, site=split.member.reads),)
    return SiteTargets(axes, points, labels, None if points == sources else sources)


def replace_circuit(
    rule: ResolvedRule,
    axes: tuple[str, ...],
    named: Mapping[AxisIndices, PlacedEdges],
    label: str,
) -> ResolvedRule:
    """Return a rule on a circuit as it is with other circuits.

    Args:
        axes: Axes of the circuits.
        named: The edges that the rule names, for every key of these axes; at the same places.
        label: Name of each of them in tables.
    """
    assert rule.circuit is not None
    every, circuit = rule.circuit.every, rule.circuit
    tokens = _TokenClasses(circuit.places, circuit.classes, circuit.encoder)
    edges = {key: _list_ablated(every, each, tokens, rule.spec) for key, each in named.items()}
    return replace(
        rule,
        sites=_target_senders(axes, edges, dict.fromkeys(edges, label), rule.circuit.features),
        circuit=replace(rule.circuit, edges=edges),
    )


def keep_baseline(rule: ResolvedRule, which: CircuitBaseline) -> ResolvedRule:
    """Return a rule on a circuit as it acts in a baseline: on every edge of the model, or on the
    circuit as a whole."""
    assert rule.circuit is not None
    if which == "circuit":
        return replace_circuit(rule, (), rule.circuit.named, which)
    named = dict.fromkeys(() if rule.spec.all_but else rule.circuit.every)
    unplaced = replace(rule.circuit, places=(), classes=(frozenset(),))
    if rule.circuit.encoder is not None:
        both, places = (frozenset[int](), frozenset({0})), rule.circuit.places[-1:]
        unplaced = replace(rule.circuit, places=places, classes=both, encoder=0)
    return replace_circuit(replace(rule, circuit=unplaced), (), {(): named}, which)


def join_cells(rule: ResolvedRule) -> ResolvedRule:
    """Return a rule with `without each edge` as it is with one cell, which ablates every edge that
    some cell or the circuit as a whole ablates."""
    assert rule.circuit is not None
    named: Mapping[AxisIndices, PlacedEdges] = {(): {}} if rule.spec.all_but else rule.circuit.named
    return replace_circuit(rule, (), named, rule.circuit.name)


def _find_stack(
    circuit: spec.Circuit, parts: _CircuitParts, work: ExperimentContext
) -> Literal["", "vision"]:
    """Return the stack that the edges of a circuit are in, as in `find_stream`. Reports E0108 for
    edges of the vision encoder together with others, at positions, or with split nodes."""
    stack = find_stream(parts.found)
    if not stack:
        return stack
    what, later = "", ""
    nodes = [node for edge in parts.found for node in edge]
    if any(SITES[of.site].stack != stack for of, _ in parts.found):
        what = "a circuit with edges of the vision encoder and of the language model"
        later = "write a circuit for each: that of the encoder ends at `embed`"
    elif parts.places:
        what = "an edge of the vision encoder at a position"
        later = "name the tokens in the rule: `ablate c at photo row 1 col 2 token`"
    elif any(is_neuron(node) or isinstance(node, FeatureNode) for node in nodes):
        what = "a neuron or feature of the vision encoder as a node of a circuit"
        later = "name its MLP: `mlp_out vision layer 0`"
    elif not work.sites.shape.stands_in and work.sites.shape.others[stack].read_after[0] == 0:
        what = "an edge of a vision encoder that the language model also reads before block 0"
        later = "write `path z vision layer 0 head 1 -> q vision layer 1 head 0`"
    if what:
        work.diagnostics.append(NotSupported(span=circuit.span, what=what, later=later))
    return stack


def has_two_streams(shape: ModelShape) -> bool:
    """Whether circuits have edges in an encoder, and in the decoder that attends to it."""
    return {"encoder", "cross"} <= shape.others.keys()


def list_edges(
    shape: ModelShape,
    neurons: Mapping[SiteLayer, tuple[int, ...]] | None = None,
    features: Mapping[SiteLayer, FeatureNodes] | None = None,
    stack: Literal["", "vision"] = "",
) -> list[CircuitEdge]:
    """List the edges of a model, from each sender to all receivers after it.

    Args:
        neurons: Neurons that are nodes, by site and layer; in these layers, all others are one
            node.
        features: Features that are nodes, by output; the rest of each output is one node.
        stack: `vision` for the vision encoder of prompts instead of the language model.
    """
    two, given = has_two_streams(shape), features or {}
    return [
        (of, to)
        for own in (("encoder", "") if two else (stack,))
        for of, to in product(*_list_nodes(shape, own, neurons or {}, given))
        if _is_edge(of, to, shape, given)
    ]


def _is_edge(
    of: SitePoint, to: SitePoint, shape: ModelShape, features: Mapping[SiteLayer, FeatureNodes]
) -> bool:
    """Return whether a node reads the output of another; features: as in `list_edges`."""
    if to.site == "attn_out":
        return of.site == "z" and of.layer == to.layer
    if of.site == "z" and ("attn_out", of.layer) in features:
        return False
    return precedes(of, to, parallel=shape.parallel_block)


def _list_nodes(
    shape: ModelShape,
    stack: Literal["", "encoder", "vision"],
    neurons: Mapping[SiteLayer, tuple[int, ...]],
    features: Mapping[SiteLayer, FeatureNodes],
) -> tuple[list[SitePoint], list[SitePoint]]:
    """Return the senders and the receivers of a stream, in forward order; those of an encoder's
    output are the keys and values of the attention to it.

    Args:
        neurons: As in `list_edges`.
        features: Those of the main stack.
    """
    senders, receivers = [SitePoint(in_stack("resid_pre", stack), 0, None)], list[SitePoint]()
    model_shape = shape.others.get(stack, shape)
    layers = model_shape.read_layers
    two = not stack and (has_two_streams(shape) or shape.attends_to_image)
    for layer in range(layers):
        for part in (stack, "cross") if two else (stack,):
            for site in ("q",) if part == "cross" else ("q", "k", "v"):
                receivers += _list_units(in_stack(site, part), layer, shape)
            senders += _list_units(in_stack("z", part), layer, shape)
        if not stack and ("attn_out", layer) in features:
            nodes = list_feature_ends("end", ("attn_out", layer), features["attn_out", layer])
            receivers += [*nodes, SitePoint("attn_out", layer, None)]
            senders += [*nodes, SitePoint("attn_out", layer, None)]
        if (where := (in_stack(NEURONS, stack), layer)) in neurons:
            nodes = [SitePoint(*where, n) for n in neurons[where]]
            if len(nodes) < unit_count(shape, *where):
                nodes.append(SitePoint(*where, None))
            receivers += nodes
            senders += nodes
        elif model_shape.has("mlp_out", layer):
            if not stack and ("mlp_out", layer) in features:
                receivers += list_feature_ends(
                    "end", ("mlp_out", layer), features["mlp_out", layer]
                )
                senders += list_feature_ends(
                    "start", ("mlp_out", layer), features["mlp_out", layer]
                )
            receivers.append(SitePoint(in_stack("mlp_norm", stack), layer, None))
            senders.append(SitePoint(in_stack("mlp_out", stack), layer, None))
    if stack != "encoder":
        return senders, [*receivers, VISION_END if stack else END]
    for layer in range(shape.n_layers):
        for site in ("k cross", "v cross"):
            receivers += _list_units(site, layer, shape)
    return senders, receivers


def _list_units(site: str, layer: int, shape: ModelShape) -> Iterator[SitePoint]:
    model_shape, name = shape.in_stack(site)
    if shape.attends_to_image and not model_shape.has(name, layer):  # other blocks have these heads
        return
    yield from (SitePoint(site, layer, n) for n in range(unit_count(shape, site, layer)))


def list_feature_ends(verb: str, output: SiteLayer, features: FeatureNodes) -> list[FeatureNode]:
    """Return the nodes of features of an output as senders ("start") or receivers ("end")."""
    name, _, of_layer = features.member.name.partition("[")
    (site, layer), several = output, bool(of_layer)
    site = _FEATURE_ENDS[verb] if site == "mlp_out" else site
    return [FeatureNode(site, layer, number, name, several) for number in features.which]


def _resolve_edge(
    edge: ast.SiteMap, parts: _CircuitParts, work: ExperimentContext
) -> list[CircuitEdge]:
    """Resolve `A -> B` to the edges between these components; E0335 if the model has none."""
    senders = _resolve_nodes(edge.source, "start", parts, work)
    receivers = _resolve_nodes(edge.target, "end", parts, work)
    shape = work.sites.shape
    in_vision = any(SITES[node.site].stack == "vision" for node in (*senders, *receivers))
    if in_vision and shape.attends_to_image:
        work.diagnostics.append(_reject_attended_encoder(edge.span))
        return []
    edges = [
        (of, to)
        for of, to in product(senders, receivers)
        if _is_edge(of, to, shape, {}) and not is_unread(to, shape)
    ]
    open_ends = shape.stands_in and any(
        counts_from_end(node) for node in walk(edge) if isinstance(node, ast.Bound)
    )
    if not edges and senders and receivers and not open_ends:
        problem = NoPath(
            span=edge.span,
            sender=edge.source.span.written,
            receiver=edge.target.span.written,
            reason=_explain_no_edge(senders[0], receivers[0], shape),
            example="`, `".join(_list_example_receivers(senders[0], shape)),
            other=_suggest_other_sender(senders[0], receivers[0], edge, shape),
        )
        if problem not in work.diagnostics:
            work.diagnostics.append(problem)
    return edges


def _suggest_other_sender(
    sender: SitePoint, receiver: SitePoint, edge: ast.SiteMap, shape: ModelShape
) -> str:
    """Return an edge from the patches, for `embed` with a receiver in the vision encoder."""
    in_vision = SITES[receiver.site].stack == "vision" and not is_unread(receiver, shape)
    if sender != EMBEDDING or not in_vision:
        return ""
    return f"; or start at the patches: `embed vision -> {edge.target.span.written}`"


def _list_example_receivers(sender: SitePoint, shape: ModelShape) -> list[str]:
    """List names of some receivers after a sender: the first two, and the last one."""
    first = sender
    if is_neuron(sender):
        site = in_stack("mlp_out", SITES[sender.site].stack)
        first = SitePoint(site, sender.layer, None)  # the same receivers
    elif sender.site == "attn_out":
        first = SitePoint("z", sender.layer, 0)  # the same receivers
    elif isinstance(sender, FeatureNode):
        first = SitePoint(sender.site, sender.layer, None)
    later = [
        to for of, to in list_edges(shape, stack=find_stream([(sender, sender)])) if of == first
    ]
    return list(dict.fromkeys(map(label_node, (*later[:2], *later[-1:]))))


def is_unread(point: SitePoint, shape: ModelShape) -> bool:
    """Return whether a site is in a block of the vision encoder whose output the language model
    doesn't read."""
    if SITES[point.site].stack != "vision" or "vision" not in shape.others:
        return False
    return (point.layer or 0) >= shape.others["vision"].read_layers


def _explain_no_edge(sender: SitePoint, receiver: SitePoint, shape: ModelShape) -> str:
    """Return why a model has no edge between these ends."""
    if shape.attends_to_image and SITES[receiver.site].side == "source":
        return "the receiver reads the image, which doesn't depend on the text"
    if receiver.site == "attn_out":
        return f"the receiver reads only the heads of layer {receiver.layer}"
    if is_unread(receiver, shape):
        last = shape.others["vision"].read_layers - 1
        return f"the language model reads the vision encoder after block {last}"
    of, to = (SITES[point.site].stack == "vision" for point in (sender, receiver))
    if of != to:
        reads = "the language model reads the vision encoder only at `embed`"
        return reads if of else "the receiver reads images, which don't depend on the text"
    sends = SITES[sender.site].side == "source"
    if sends == (SITES[receiver.site].side == "source"):
        return "the receiver reads before or at the sender"
    if sends:
        return "the decoder reads the encoder only through `k cross` and `v cross`"
    return "the receiver reads the encoder, which doesn't read the decoder"


def _resolve_features(
    site: ast.Site, verb: str, parts: _CircuitParts, work: ExperimentContext
) -> list[SitePoint]:
    """Resolve features at one end of an edge; E0342 for two dictionaries of one output."""
    features: list[SitePoint] = []
    for output, feature in parts.resolve_features(site, work).items():
        others = parts.members.setdefault(output, {})
        others.setdefault(feature.member.name, feature.member)
        if len(others) > 1:
            first, second = others
            of = "" if output[0] == "mlp_out" else f"`{output[0]}` of "
            reason = f"`{first}` and `{second}` both have features of {of}layer {output[1]}"
            hint = "use features of one dictionary in this layer"
            bad = BadBasis(span=site.span, reason=reason, hint=hint, what="circuit")
            if bad not in work.diagnostics:
                work.diagnostics.append(bad)
        if len(feature.which) > limits.CIRCUIT_NEURONS:
            bad = _too_many(site.span.written, len(feature.which), site.span, "feature")
            work.diagnostics.append(bad)
            return []
        features += list_feature_ends(verb, output, feature)
    return features


def _resolve_nodes(
    site: ast.Site, verb: str, parts: _CircuitParts, work: ExperimentContext
) -> list[SitePoint]:
    """Resolve one end of an edge; reports E0304, E0334 and errors of sites and dictionaries."""
    words = _SENDERS if verb == "start" else _RECEIVERS
    named = "" if site.axes else " ".join(name.id for name in site.names)
    node = _find_end_of_stream(named, verb, work.sites.shape)
    if node is not None:
        return [node]
    if any(isinstance(node, ast.RankedSelection) for node in walk(site)):
        what = "a pick from another experiment in a `circuit`"
        work.diagnostics.append(NotSupported(span=site.span, what=what, later="name the sites"))
        return []
    group = None if site.bare is None else work.program.groups.get(site.bare.id)
    context, nodes = work.sites.of_definitions(), list[SitePoint]()
    if group is not None:
        named = [each for each in group.sites if each.coordinates is not None]
        every = join_features(named, site)
        nodes += [p for own in every for p in _resolve_features(own, verb, parts, work)]
        if group.names_features:
            return nodes
        others = tuple(each for each in group.sites if each.coordinates is None)
        context.groups = {**context.groups, group.name: group.model_copy(update={"sites": others})}
    if site.basis_name is not None:
        return _resolve_features(site, verb, parts, work)
    targets, axes = resolve_site(site, context)
    if targets is None:
        return []
    if axes or targets.axes:
        problem = AxisDoesNotFit(
            span=site.span,
            site=site.span.written,
            reason="sweeps inside a circuit, whose edges are joined",
            hint="write the plural: `layers`, `heads`, `neurons`",
        )
        work.diagnostics.append(problem)
        return []
    points = targets.points[()]
    count = sum(
        unit_count(work.sites.shape, point.site, point.layer) if point.unit is None else 1
        for point in points
        if is_neuron(point)
    )
    if count > limits.CIRCUIT_NEURONS:
        work.diagnostics.append(_too_many(site.span.written, count, site.span))
        return []
    ends = {point.site: _find_end(point.site, words) for point in points}
    wrong = next((site for site, end in ends.items() if not end), None)
    if wrong is None:
        return nodes + [
            END if ends[point.site] == END.site else SitePoint(ends[point.site], layer, unit)
            for point in points
            for layer in (point.layer or 0,)  # `embed encoder` has none
            for unit in _units(point, work.sites.shape)
        ]
    work.diagnostics.append(_report_wrong_end(site, verb, wrong, work.sites.shape))
    return []


def _find_end_of_stream(named: str, verb: str, shape: ModelShape) -> SitePoint | None:
    """Return the start or the end of a stream, if a name is that of one.

    Args:
        named: A site without axes.
        verb: `start` or `end`.
    """
    if verb == "start":
        starts = {"embed": EMBEDDING}
        if has_two_streams(shape):  # its token embedding isn't a site of every encoder
            starts["embed encoder"] = ENCODER_EMBEDDING
        if "vision" in shape.others:
            starts["embed vision"] = VISION_EMBEDDING
        return starts.get(named)
    if named == "embed" and "vision" in shape.others:
        return VISION_END
    is_end = _RECEIVERS.get(named) == "logits" or (named == "embed" and shape.stands_in)
    return END if is_end else None


def _report_wrong_end(site: ast.Site, verb: str, wrong: str, shape: ModelShape) -> NotOnAPath:
    """Report E0334 for a site that can't be an end of an edge.

    Args:
        verb: `start` or `end`.
        wrong: The name of the site.
    """
    is_head = verb == "end" and wrong in ("z", "head_out")
    reason = "its output isn't added to the stream as one of the components"
    if verb == "end":
        reason = "it isn't an input that reads the stream separately"
    written = site.span.written if is_head and site.short is not None else "L1H0"
    written = written.removesuffix(".z").removesuffix(".head_out")
    hint = f"write one of its inputs: `{written}.q`, `{written}.k` or `{written}.v`"
    if not is_head:
        hint = f"write one of {SENDER_WORDS if verb == 'start' else RECEIVER_WORDS}"
        if has_two_streams(shape):
            examples = STACK_SENDERS if verb == "start" else STACK_RECEIVERS
            hint = f"write one such as {examples}"
        elif SITES[wrong].stack == "vision":
            examples = VISION_SENDERS if verb == "start" else VISION_RECEIVERS
            hint = f"write one such as {examples}"
    elif has_two_streams(shape):
        hint = f"write one of its inputs, such as {STACK_RECEIVERS}"
    elif SITES[wrong].stack == "vision":
        hint = f"write one of its inputs, such as {VISION_RECEIVERS}"
    return NotOnAPath(
        what="an edge", span=site.span, verb=verb, site=wrong, reason=reason, hint=hint
    )


def _find_end(site: str, ends: Mapping[str, str]) -> str:
    """Return the site of the end of an edge that a site names; empty if there is none.

    Args:
        ends: `_SENDERS` or `_RECEIVERS`.
    """
    kind = SITES[site]
    end = ends.get(kind.component, "")
    if kind.stack and end in ("", "logits", "attn_out"):
        return ""
    return in_stack(end, kind.stack)


def _units(point: SitePoint, shape: ModelShape) -> Iterator[int | None]:
    """Yield the unit of a point, or each head or neuron if it names all of them."""
    component = SITES[point.site].component
    if point.unit is None and component in ("q", "k", "v", "z", "head_out", NEURONS):
        yield from range(unit_count(shape, point.site, point.layer))
    else:
        yield point.unit


def describe_circuit(rule: ResolvedRule) -> str:
    """Describe what a rule ablates: `all but c: 118 of 121 edges`."""
    assert rule.circuit is not None
    assert rule.sites is not None
    ablated = _list_counts(_count_ablated(rule).values())
    label = next(iter(rule.sites.labels.values()))
    if len(set(rule.sites.labels.values())) > 1:
        assert rule.spec.site is not None
        before = "all but " if rule.spec.all_but else ""
        label = before + rule.spec.site.span.written
    total = count_noun(len(rule.circuit.every), "edge")
    return f"`{label}`: {ablated} of {total} ablated"


def describe_dead_edges(rule: ResolvedRule) -> Iterator[Convention]:
    """Yield which edges of a circuit have no effect, because nothing in it reads them on a path to
    the end of the model."""
    assert rule.circuit is not None
    dead = rule.circuit.dead
    if not dead:
        return
    (named,) = rule.circuit.named.values()
    count = len(named)
    shown, more = dead[:LISTED_DEAD], len(dead) - LISTED_DEAD
    listed = ", ".join(label_candidates((edge,)) for edge in shown)
    listed += f" and {more:,} more" if more > 0 else ""
    is_on, each = ("isn't", "it") if len(dead) == 1 else ("aren't", "one")
    text = f"{len(dead):,} of {count_noun(count, 'edge')} {is_on} on a path to `logits`"
    if rule.spec.without_edge:
        yield Convention("without", f"{text}: removing {each} has no effect ({listed})")
    elif len(dead) == count:
        which = "its only edge isn't" if count == 1 else f"none of its {count:,} edges is"
        text = f"nothing: {which} on a path to `logits` at the ablated tokens ({listed})"
        yield Convention("circuit keeps", text)
    else:
        text += f" at the ablated tokens: keeping {each} doesn't change the logits ({listed})"
        yield Convention("circuit keeps", text)


LISTED_DEAD = 5
"""Largest number of edges without an effect that a convention lists."""


def _count_ablated(rule: ResolvedRule) -> dict[bool, set[int]]:
    """Return the numbers of edges that are ablated at some token of the decoder (False) and of an
    encoder (True)."""
    assert rule.circuit is not None
    every, encoder = rule.circuit.edges.values(), rule.circuit.encoder
    sizes: dict[bool, set[int]] = defaultdict(set)
    for number in find_classes(rule.circuit, rule.positions):
        sizes[encoder in rule.circuit.classes[number]].update(len(own[number]) for own in every)
    return sizes


def _list_counts(counts: Collection[set[int]]) -> str:
    """Format the sum of a number of each set: `3`, `3 to 5`."""
    ends = sum(map(min, counts)), sum(map(max, counts))
    return " to ".join(f"{count:,}" for count in dict.fromkeys(ends))


def describe_reading(rule: ResolvedRule) -> str:
    """Return how receivers read the stream, and which biases no sender has."""
    if rule.circuit is not None and rule.circuit.stack == "vision":
        return VISION_CIRCUIT_NOTE
    features = () if rule.circuit is None else rule.circuit.features
    if any(site == "attn_out" for site, _ in features):
        return f"{CIRCUIT_NOTE}, except in layers with features of attention"
    return CIRCUIT_NOTE


def describe_streams(rule: ResolvedRule) -> Iterator[Convention]:
    """Yield how many edges of the encoder and of the decoder of an encoder-decoder are ablated."""
    if rule.circuit is not None and rule.circuit.stack == "vision":
        text = "all edges are in the vision encoder"
        yield Convention("streams of circuits", text, VISION_NOTE)
    if rule.circuit is None or rule.circuit.encoder is None:
        return
    counts = _count_ablated(rule)
    encoder, decoder = (_list_counts([counts[n]] if n in counts else []) for n in (True, False))
    text = f"{encoder} ablated edges in the encoder, {decoder} in the decoder"
    yield Convention("streams of circuits", text, STREAM_NOTE)


def describe_places(rule: ResolvedRule) -> Iterator[Convention]:
    """Yield the positions of a circuit's edges."""
    circuit = rule.circuit
    if circuit is None or not circuit.places:
        return
    of_all = {edge: at for own in circuit.named.values() for edge, at in own.items()}
    placed = [at for at in of_all.values() if at is not None]
    if not placed:
        return
    used = [circuit.places[n] for n in sorted(frozenset[int]().union(*placed))]
    at = ", ".join(f"`{describe_position(place.label)}`" for place in used)
    text = f"{len(placed)} of {count_noun(len(of_all), 'edge')} at positions: {at}"
    note = (
        "an edge with a position is in the circuit at these tokens of its receiver, of each row's "
        "base run; those of a key or a value are its own"
    )
    yield Convention("positions of edges", text, note)


def describe_neurons(rule: ResolvedRule) -> Iterator[Convention]:
    """Yield the layers in which neurons are nodes of a circuit."""
    neurons = {} if rule.circuit is None else rule.circuit.neurons
    if neurons:
        of = [
            f"{count_noun(len(neuron), 'neuron')} of {f'{SITES[site].stack} layer {n}'.strip()}"
            for (site, n), neuron in neurons.items()
        ]
        yield Convention("neurons of circuits", ", ".join(of), NEURON_NOTE)


def describe_features(rule: ResolvedRule) -> Iterator[Convention]:
    """Yield the features that are nodes of a circuit."""
    every = {} if rule.circuit is None else rule.circuit.features
    of = [f"{count_noun(len(own.which), 'feature')} of {own.member.name}" for own in every.values()]
    notes = list[str]()
    joined = [layer for site, layer in every if site == "attn_out"]
    if joined:
        rest = label_node(SitePoint("attn_out", joined[0], None))
        notes.append(ATTENTION_NOTE.format(rest))
    features = {layer: own for (site, layer), own in every.items() if site == "mlp_out"}
    if features:
        mlp = label_node(SitePoint("mlp_out", min(n for n in features if n is not None), None))
        encodes = {bool(feature.member.reads) for feature in features.values()}
        through = ", the MLP" if encodes == {False} else ""
        through = ", of an SAE the MLP" if len(encodes) == 2 else through
        notes.append(FEATURE_NOTE.format(through, mlp))
    if every:
        yield Convention("features of circuits", ", ".join(of), "; ".join(notes))


def check_ablated_tokens(
    circuit: CircuitTargets, positions: PositionTargets, rule: spec.Rule, work: ExperimentContext
) -> None:
    """Report E0207 if no edge is ablated at any token of a rule, because of their positions."""
    if work.table.stands_in or work.model.tokenizer.stands_in:
        return  # its tokens are placeholders
    there = find_classes(circuit, positions)
    if any(own[number] for own in circuit.edges.values() for number in there):
        return
    assert rule.site is not None
    at = ", ".join(f"`{describe_position(place.label)}`" for place in circuit.edge_places)
    reason = f"ablates no edge at `{rule.at.span.written}`: its edges are at {at}"
    hint = "write `at tokens *`"
    if rule.all_but:
        reason = f"has every edge of `{work.sites.model}` at `{rule.at.span.written}`"
        hint = "write other tokens, or name fewer edges"
    bad = BadArgument(span=rule.site.span, name=circuit.name, reason=reason, hint=hint)
    work.diagnostics.append(bad)


def find_circuit_side(
    circuit: CircuitTargets, positions: ast.Positions, work: ExperimentContext
) -> TokenSide:
    """Return which tokens the positions of a rule on a circuit name, in an encoder-decoder.

    They are those of the stream with all ablated edges, or, if both streams have some, those of
    `find_named_side`.
    """
    if circuit.stack == "vision":
        return "image"
    if circuit.encoder is None:
        return "target" if work.sites.shape.attends_to_image else work.side
    sides = {
        circuit.encoder in places
        for own in circuit.edges.values()
        for places, edges in zip(circuit.classes, own, strict=True)
        if edges
    }
    if len(sides) == 1:
        return "source" if True in sides else "target"
    of = "a circuit whose ablated edges are in the encoder and in the decoder"
    return find_named_side(positions, of, work)


def find_named_side(positions: ast.Positions, of: str, work: ExperimentContext) -> TokenSide:
    """Return which tokens positions name for a rule that acts in an encoder and its decoder.

    Spans are those of the prompt, `tokens *` are the tokens of both, and other positions are the
    decoder's; E0108 for spans together with these.

    Args:
        positions: The positions.
        of: The rule, for the message.
        work: The experiment.
    """
    nodes = list(walk(positions))
    plain = {
        node.span.written
        for node in nodes
        if (isinstance(node, ast.TokenIndex) and node.low is not None)
        or (isinstance(node, ast.EdgeToken) and node.of is None)
    }
    spans = any(isinstance(node, ast.SpanRef | ast.RankedTokens) for node in nodes)
    if spans and plain:
        what = f"`{min(plain)}` together with a part of the prompt, for {of},"
        later = "write `tokens *`, or an experiment for each"
        work.diagnostics.append(NotSupported(span=positions.span, what=what, later=later))
    if spans:
        return "source"
    return "target" if plain else ""


def find_classes(circuit: CircuitTargets, positions: PositionTargets) -> set[int]:
    """Return the classes of the tokens that a rule on a circuit writes, by number."""
    if not circuit.places:
        return {0}
    rows, classes = list_token_places(circuit.places), set[int]()
    for cell in positions.written.values():
        for places, hits in zip(rows, cell.hits, strict=True):
            own = {places.get(token, frozenset()) for token in chain.from_iterable(hits)}
            classes.update(map(circuit.classes.index, own))
    return classes


# --- paths through the model ----------------------------------------------------------------------


class SearchStep(Record):
    """Edges that a search for a circuit tries to ablate together."""

    unit: SitePoint
    """What the search is at. The ablation of the edges of a step can't cut those of other steps
    with the same unit off from the end of the model."""
    edges: tuple[CircuitEdge | PlacedEdge, ...]


def _place_steps(steps: Iterable[SearchStep], places: Sequence[PlacedEdge]) -> Iterator[SearchStep]:
    """Yield the steps of a level at each position: those of a unit at the last position first."""
    for unit, search_steps in groupby(steps, lambda step: step.unit):
        listed = list(search_steps)
        for place in reversed(places):
            for step in listed:
                edges = (edge for edge in step.edges if not isinstance(edge, PlacedEdge))
                yield SearchStep(unit, tuple(replace(place, edge=edge) for edge in edges))


EdgeT = TypeVar("EdgeT", bound=Hashable)
NodeT = TypeVar("NodeT", bound=Hashable)

PlacedNode: TypeAlias = tuple[SitePoint, int | None]
"""A node at the tokens of a position; the end of the model is one node, at None."""


class PathGraph(ABC, Generic[EdgeT, NodeT]):
    """Edges between nodes, from the start to the end of a model."""

    every: Sequence[EdgeT]
    """Senders are in forward order."""
    starts: frozenset[NodeT]
    """Nodes that need no edge."""
    end: NodeT

    @abstractmethod
    def links(self, edge: EdgeT) -> Sequence[tuple[NodeT, Sequence[NodeT]]]:
        """Return the sender of an edge and the nodes that depend on its receiver (for the end of
        the model, itself), for each group of tokens that the edge is at."""

    def place(self, edge: EdgeT) -> int | None:
        """Return the number of an edge's position; None for edges without positions."""
        return None

    def rivals(self, edge: EdgeT) -> Sequence[EdgeT]:
        """Return the same edge at positions that contain its position or are contained in it, so
        that a circuit of both has fewer edges than it lists."""
        return ()

    @cached_property
    def after(self) -> dict[NodeT, list[EdgeT]]:
        """Edges from each sender."""
        edges: dict[NodeT, list[EdgeT]] = defaultdict(list)
        for edge in self.every:
            for sender, _ in self.links(edge):
                edges[sender].append(edge)
        return edges

    @cached_property
    def before(self) -> dict[NodeT, list[tuple[EdgeT, NodeT]]]:
        """Edges to the receivers of each sender, and to the end of the model; with their sender."""
        edges: dict[NodeT, list[tuple[EdgeT, NodeT]]] = defaultdict(list)
        for edge in self.every:
            for sender, nodes in self.links(edge):
                for node in nodes:
                    edges[node].append((edge, sender))
        return edges

    @cached_property
    def numbers(self) -> GraphNumbers[EdgeT, NodeT]:
        """Its nodes and edges by number."""
        return GraphNumbers(self)

    def _find_reached(self, edges: Collection[EdgeT]) -> set[NodeT]:
        """Return the nodes that some edges lead to from the start of the model."""
        reached = {*self.starts}
        for edge in self.every:  # senders in forward order
            if edge in edges:
                for sender, nodes in self.links(edge):
                    reached.update(nodes if sender in reached else ())
        return reached

    def find_leading(self, edges: Collection[EdgeT]) -> set[NodeT]:
        """Return the nodes that some edges lead on from, to the end of the model."""
        leading = {self.end}
        for edge in reversed(self.every):
            if edge in edges:
                for sender, nodes in self.links(edge):
                    leading.update((sender,) if leading.intersection(nodes) else ())
        return leading

    def keep_leading(self, edges: Collection[EdgeT]) -> frozenset[EdgeT]:
        """Return those of some edges that lead to the end of the model, by others of them."""
        leading = self.find_leading(edges)
        return frozenset(
            edge
            for edge in edges
            if any(leading.intersection(nodes) for _, nodes in self.links(edge))
        )

    def covers(self, edges: Collection[EdgeT]) -> bool:
        """Return whether each edge is on a path of these edges from the start to the end of the
        model."""
        reached, leading = self._find_reached(edges), self.find_leading(edges)
        return all(
            any(
                sender in reached and leading.intersection(nodes)
                for sender, nodes in self.links(edge)
            )
            for edge in edges
        )

    def select_backwards(self, sizes: Mapping[EdgeT, float], count: int) -> list[EdgeT]:
        """Select the edges with the largest sizes, one after another, from the end of the model
        backwards: each leads to a node that the selected edges lead on from.

        Args:
            sizes: Of every edge.
            count: Number of edges; there may be fewer that lead to the end.
        """
        order = {edge: number for number, edge in enumerate(self.every)}
        edges: list[EdgeT] = []
        due: list[tuple[float, int, EdgeT, NodeT]] = []
        seen: set[EdgeT] = set()
        node: NodeT = self.end
        while len(edges) < count:
            for edge, sender in self.before[node]:
                if edge not in seen:
                    seen.add(edge)
                    heappush(due, (-sizes[edge], order[edge], edge, sender))
            if not due:
                break
            *_, edge, node = heappop(due)
            edges.append(edge)
        return edges


@dataclass(frozen=True)
class Link:
    """An edge at the tokens of one group, by numbers."""

    edge: int
    sender: int
    nodes: Sequence[int]
    """Those that depend on its receiver."""


class GraphNumbers(Generic[EdgeT, NodeT]):
    """The nodes and edges of a graph by number, as random circuits have thousands of paths."""

    def __init__(self, graph: PathGraph[EdgeT, NodeT]) -> None:
        node = {
            node_t_graph_numbers: n
            for n, node_t_graph_numbers in enumerate((*graph.starts, graph.end))
        }
        self.edges = {each: edge for edge, each in enumerate(graph.every)}
        self.places = [graph.place(each) for each in graph.every]
        """Of each edge, as in the graph."""
        self.links: list[Link] = []
        self.links_of: list[list[int]] = [[] for _ in graph.every]
        """Of each edge, the numbers of its links."""
        self.before: dict[int, list[int]] = defaultdict(list)
        """Links to the receivers of each sender, and to the end of the model."""
        for edge, each in enumerate(graph.every):
            for sender, nodes in graph.links(each):
                of, *numbers = [node.setdefault(to, len(node)) for to in (sender, *nodes)]
                self.links_of[edge].append(len(self.links))
                for to in numbers:
                    self.before[to].append(len(self.links))
                self.links.append(Link(edge, of, numbers))
        self.starts = frozenset(map(node.__getitem__, graph.starts))
        self.end = node[graph.end]

    def find_leading(self, edges: Sequence[int]) -> set[int]:
        """Return the nodes that some edges lead on from, to the end of the model.

        Args:
            edges: In ascending order.
        """
        leading = {self.end}
        for edge in reversed(edges):
            for number in self.links_of[edge]:
                link = self.links[number]
                leading.update(() if leading.isdisjoint(link.nodes) else (link.sender,))
        return leading


def _name_output(receiver: SitePoint) -> str:
    """Return the site of the output of heads or an MLP by that of their input."""
    if receiver.site == "attn_out":
        return receiver.site
    stack = SITES[receiver.site].stack
    return in_stack("mlp_out" if receiver.unit is None else "z", stack)


class EdgeGraph(PathGraph[CircuitEdge, SitePoint]):
    """The nodes and edges of a stack of a model, or of an encoder-decoder."""

    def __init__(
        self,
        shape: ModelShape,
        neurons: Mapping[SiteLayer, tuple[int, ...]] | None = None,
        features: Mapping[SiteLayer, FeatureNodes] | None = None,
        every: Sequence[CircuitEdge] | None = None,
        stack: Literal["", "vision"] = "",
    ) -> None:
        """Prepare the graph.

        Args:
            neurons: As in `list_edges`.
            features: As in `list_edges`.
            every: The edges, in the order of `list_edges`; None for all of the stack.
            stack: As in `list_edges`.
        """
        self.every = list_edges(shape, neurons, features, stack) if every is None else every
        self.end = VISION_END if stack else END
        self._nodes: dict[SitePoint, list[SitePoint]] = {self.end: [self.end]}
        self._entrances = dict.fromkeys(of for of, _ in self.every if of in EMBEDDINGS)
        heads = {of for of, _ in self.every if of.site == "z cross"}
        of_image = heads if shape.attends_to_image else ()
        self.starts = frozenset((*self._entrances, *of_image))
        """Nodes that depend on the prompt without edges into them."""
        self._shared: dict[tuple[str, int | None], int] = {
            (to.site, to.layer): unit_count(shape, _name_output(to), to.layer)
            // unit_count(shape, to.site, to.layer)
            for to in dict.fromkeys(to for _, to in self.every)
            if to.unit is not None and not isinstance(to, FeatureNode)
        }

    def links(self, edge: CircuitEdge) -> list[tuple[SitePoint, list[SitePoint]]]:
        return [(edge[0], self.nodes(edge[1]))]

    def nodes(self, receiver: SitePoint) -> list[SitePoint]:
        """Return the senders that depend on a receiver; for the end of the model, itself."""
        if receiver not in self._nodes:
            self._nodes[receiver] = list(self._list_nodes_of(receiver))
        return self._nodes[receiver]

    def _list_nodes_of(self, receiver: SitePoint) -> Iterator[SitePoint]:
        if is_neuron(receiver):
            yield receiver
            return
        if isinstance(receiver, FeatureNode):
            yield replace(receiver, site=find_split_output(receiver)[0])
            return
        output = _name_output(receiver)
        if receiver.unit is None:
            yield SitePoint(output, receiver.layer, None)
            return
        shared = self._shared[receiver.site, receiver.layer]
        first = receiver.unit * shared
        yield from (SitePoint(output, receiver.layer, n) for n in range(first, first + shared))

    def list_search_steps(
        self, levels: Sequence[SearchLevel], candidates: Sequence[MaskCandidate] = ()
    ) -> list[SearchStep]:
        """List the steps of a search, level after level, each from the end of the model
        backwards.

        Args:
            candidates: Edges that it decides on. If they have positions, each step is tried at each
                position, that of a unit at the last position first.
        """
        places = {
            candidate.place: candidate
            for candidate in candidates
            if isinstance(candidate, PlacedEdge)
        }
        by_level = {"blocks": self._list_nodes, "heads": self._list_nodes}
        search_steps: list[SearchStep] = []
        for level in levels:
            steps = by_level.get(level, self._list_inputs)(level)
            search_steps += _place_steps(steps, [*places.values()]) if places else steps
        return search_steps

    def _list_nodes(self, level: SearchLevel) -> Iterator[SearchStep]:
        """Yield steps that ablate the outputs of all nodes of a module, or of one of several."""
        modules: dict[SitePoint, list[list[CircuitEdge]]] = defaultdict(list)
        for of, edges in reversed(self.after.items()):
            if of not in self._entrances:
                modules[SitePoint(of.site, of.layer, None)].append(edges)
        for module, nodes in modules.items():
            if level == "blocks":
                yield SearchStep(module, tuple(chain.from_iterable(nodes)))
            elif len(nodes) > 1:
                yield from (SearchStep(module, tuple(edges)) for edges in nodes)

    def _list_inputs(self, level: SearchLevel) -> Iterator[SearchStep]:
        """Yield steps that ablate the whole input of a query, key or value, or one edge."""
        receivers = [to for entrance in self._entrances for _, to in self.after[entrance]]
        joined = dict.fromkeys(to for _, to in self.every if to.site == "attn_out")
        if joined:  # they read heads only
            receivers = sorted((*receivers, *joined), key=lambda to: write_order(to.site, to.layer))
        inputs: dict[SitePoint, list[CircuitEdge]] = {to: [] for to in receivers}
        for edge in reversed(self.every):
            inputs[edge[1]].append(edge)
        for to, edges in reversed(inputs.items()):
            if level == "edges":
                yield from (SearchStep(to, (edge,)) for edge in edges)
            elif to.site.partition(" ")[0] in ("q", "k", "v"):  # all other nodes have one input
                yield SearchStep(replace(to, unit=None), tuple(edges))


class PlacedGraph(PathGraph[PlacedEdge, PlacedNode]):
    """The edges of a model at positions, each of which has the tokens of some groups. Attention
    moves from the tokens of a group to those of its queries, and nothing else moves between groups.
    """

    end = END, None

    def __init__(
        self,
        model: EdgeGraph,
        edges: Sequence[PlacedEdge],
        order: PlaceOrder,
        places: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Link edges.

        Args:
            model: The nodes and edges of the model.
            edges: Senders are in forward order.
            order: That of the groups.
            places: Numbers of the groups at each position; None if each group is a position.
        """
        self.every = edges
        self._model, self._order = model, order
        *self._groups, self._rest = range(len(order.reads_end))
        self._places = [(group,) for group in self._groups] if places is None else places
        self._heads = [of for of in self._model.after if of.site == "z"]
        sets = list(map(frozenset, self._places))
        self._nested = [
            [n for n, others in enumerate(sets) if n != number and (one <= others or others <= one)]
            for number, one in enumerate(sets)
        ]
        self._leads: dict[tuple[SitePoint, int], list[PlacedNode]] = {}
        starts = {(EMBEDDING, group) for group in self._groups}
        self.starts = frozenset((*starts, *self._after_rest(-1)))

    def _after_rest(self, layer: int) -> Iterator[PlacedNode]:
        """Yield the heads of later layers that read tokens of no group, whose edges are never
        ablated."""
        for group in self._groups:
            if self._order.reaches[self._rest][group]:
                yield from ((of, group) for of in self._heads if (of.layer or 0) > layer)

    def place(self, edge: PlacedEdge) -> int:
        return edge.place

    def rivals(self, edge: PlacedEdge) -> list[PlacedEdge]:
        return [replace(edge, place=place) for place in self._nested[edge.place]]

    def links(self, edge: PlacedEdge) -> list[tuple[PlacedNode, list[PlacedNode]]]:
        sender, receiver = edge.edge
        return [
            ((sender, group), self._leads_at(receiver, group)) for group in self._places[edge.place]
        ]

    def _leads_at(self, receiver: SitePoint, group: int) -> list[PlacedNode]:
        key = receiver, group
        if key not in self._leads:
            self._leads[key] = list(dict.fromkeys(self._list_leads(*key)))
        return self._leads[key]

    def _list_leads(self, receiver: SitePoint, group: int) -> Iterator[PlacedNode]:
        order, nodes = self._order, self._model.nodes(receiver)
        if receiver == END:
            yield from (self.end,) if order.reads_end[group] else ()
        elif receiver.site not in ("k", "v"):
            yield from ((node, group) for node in nodes)
        else:
            reached = order.reaches[group]
            yield from (
                (node, number) for number in self._groups if reached[number] for node in nodes
            )
            if reached[self._rest]:
                yield from (self.end,) if order.reads_end[self._rest] else ()
                yield from self._after_rest(receiver.layer or 0)


class OnePlaceGraph(PathGraph[CircuitEdge, PlacedNode]):
    """The edges of a model at the tokens of one position, at which nothing reads the end of the
    model: they lead to it by keys and values, which other tokens read."""

    end = END, None

    def __init__(self, model: EdgeGraph, order: PlaceOrder) -> None:
        """Link edges; order: that of the position and all other tokens."""
        self.every = model.every
        self._placed = PlacedGraph(model, [PlacedEdge(edge, 0, "") for edge in model.every], order)
        self.starts = self._placed.starts

    def links(self, edge: CircuitEdge) -> list[tuple[PlacedNode, list[PlacedNode]]]:
        return self._placed.links(PlacedEdge(edge, 0, ""))


# --- random circuits ------------------------------------------------------------------------------

MAX_TRIES = 200
"""Most attempts to draw one random circuit that isn't drawn yet."""


class CircuitDraws(Generic[EdgeT]):
    """Random circuits with the same number of edges at each position as a circuit. The only circuit
    of its size represents each of them.

    If each edge of the circuit is on a path of the circuit from `embed` to `logits`, so is each
    edge of a random circuit, which is then grown path by path: an edge is drawn uniformly, and
    completed by random edges to the nodes that the circuit already has.
    """

    def __init__(self, graph: PathGraph[EdgeT, Any], circuit: Collection[EdgeT], seed: int) -> None:
        self.circuit = frozenset(circuit)
        self.is_connected = graph.covers(self.circuit)
        key = sorted(map(str, self.circuit))
        self._random = Random(stable_hash(seed, "control", "circuit", *key))
        self._graph, self._numbers = graph, graph.numbers
        self._own = frozenset(map(self._numbers.edges.__getitem__, self.circuit))
        places = self._numbers.places
        self._sizes = Counter(places[edge] for edge in self._own)
        self._edges = [edge for edge, place in enumerate(places) if place in self._sizes]
        """Those at positions of the circuit."""
        leading = self._numbers.find_leading(self._edges)
        links = self._numbers.links
        self._leading = [[node for node in link.nodes if node in leading] for link in links]
        """Of each link, the nodes that lead to the end of the model."""
        self._links_of = {
            edge: [link for link in self._numbers.links_of[edge] if self._leading[link]]
            for edge in self._edges
        }
        self._live = [edge for edge, numbers in self._links_of.items() if numbers]
        self._after: dict[int, list[int]] = defaultdict(list)
        for link in chain.from_iterable(self._links_of.values()):
            self._after[links[link].sender].append(link)

    def draws(self, count: int) -> list[tuple[EdgeT, ...]]:
        """Return up to `count` different circuits, each with its edges in forward order; of the
        only circuit of its size, this number of copies."""
        if self.is_only:
            return [self._list_edges(self._own)] * count
        draws: dict[frozenset[int], None] = {}
        for _ in range(MAX_TRIES * count):
            drawn = self._grown() if self.is_connected else self._drawn()
            if drawn is not None and drawn != self._own:
                draws[drawn] = None
            if len(draws) == count:
                break
        return list(map(self._list_edges, draws))

    def _list_edges(self, numbers: Collection[int]) -> tuple[EdgeT, ...]:
        return tuple(self._graph.every[edge] for edge in sorted(numbers))

    @property
    def is_only(self) -> bool:
        """Whether there is no other circuit of this size: without edges, with every edge, or with
        the one edge from `embed` to `logits`."""
        if len(self.circuit) == 1 and self.is_connected:
            return sum(map(self._is_path, self._live)) == 1
        pool = self._live if self.is_connected else self._edges
        every = Counter(self._numbers.places[edge] for edge in pool)
        return self._sizes == every or len(self.circuit) in (0, len(self._edges))

    def _is_path(self, edge: int) -> bool:
        """Whether one edge is a path from the start to the end of the model."""
        links = (self._numbers.links[link] for link in self._links_of[edge])
        starts, end = self._numbers.starts, self._numbers.end
        return any(link.sender in starts and end in link.nodes for link in links)

    def _drawn(self) -> frozenset[int] | None:
        """Draw edges uniformly; None if too few are left at a position."""
        by_place: dict[int | None, list[int]] = defaultdict(list)
        for edge in self._edges:
            by_place[self._numbers.places[edge]].append(edge)
        numbers = set[int]()
        for place, edges in by_place.items():
            left = edges
            if len(by_place) > 1:
                left = [edge for edge in edges if numbers.isdisjoint(self._rivals(edge))]
            if len(left) < self._sizes[place]:
                return None
            numbers.update(self._random.sample(left, self._sizes[place]))
        return frozenset(numbers)

    def _grown(self) -> frozenset[int] | None:
        """Grow a circuit path by path; None if the last path doesn't fit its size."""
        numbers: set[int] = set()
        reached, leading = {*self._numbers.starts}, {self._numbers.end}
        tries = 0
        while tries < MAX_TRIES:
            path = self._draw_path(numbers, reached, leading)
            more = numbers.union(self._numbers.links[link].edge for link in path)
            if not path or len(more) > len(self.circuit) or len(more) == len(numbers):
                tries += 1
                continue
            numbers, tries = more, 0
            reached.update(*(self._leading[link] for link in path))
            reached.discard(self._numbers.end)
            leading.update(self._numbers.links[link].sender for link in path)
            if len(numbers) == len(self.circuit):
                return frozenset(numbers)
        return None

    def _rivals(self, edge: int) -> list[int]:
        """Return the edges that a circuit with an edge can't have."""
        others = self._graph.rivals(self._graph.every[edge])
        return [self._numbers.edges[other] for other in others]

    def _draw_path(
        self, numbers: Collection[int], reached: Collection[int], leading: Collection[int]
    ) -> list[int]:
        """Draw an edge, with edges to it from a node that is reached and from it to one that leads
        on; none if no edges fit that are drawn.

        Args:
            numbers: The edges that the circuit has.

        Returns:
            Numbers of links.
        """
        choice, path, edges = self._random.choice, list[int](), {*numbers}
        links, places = self._numbers.links, self._numbers.places
        left = self._sizes.copy()  # a path of a circuit without positions may be too long
        left.subtract(places[edge] for edge in numbers)

        def add(draw: Callable[[], int]) -> int | None:
            for _ in range(MAX_TRIES):
                link = draw()
                edge = links[link].edge
                if edge not in edges and len(left) > 1:
                    if left[places[edge]] <= 0 or not edges.isdisjoint(self._rivals(edge)):
                        continue
                    left[places[edge]] -= 1
                edges.add(edge)
                path.append(link)
                return link
            return None

        def begin() -> int:
            of_edge = self._links_of[choice(self._live)]
            return of_edge[0] if len(of_edge) == 1 else choice(of_edge)

        link = first = add(begin)
        while link is not None and links[link].sender not in reached:
            link = add(partial(choice, self._numbers.before[links[link].sender]))
        node = None if first is None or link is None else choice(self._leading[first])
        while node is not None and node not in leading:
            link = add(partial(choice, self._after[node]))
            node = None if link is None else choice(self._leading[link])
        return [] if node is None else path


@dataclass(frozen=True)
class AskedCircuits:
    """What random circuits depend on."""

    shape: ModelShape = field(hash=False)  # holds tables; compared, though
    circuit: frozenset[CircuitEdge] | frozenset[PlacedEdge]
    seed: int
    count: int
    places: tuple[tuple[int, ...], ...] = ()
    """Numbers of the groups at each position of edges; empty for edges at all tokens."""
    order: PlaceOrder | None = None
    """The order of the groups; without groups, the order of the written tokens, and None if a
    measure reads logits at one of them."""
    neurons: Mapping[SiteLayer, tuple[int, ...]] = field(
        default_factory=dict[SiteLayer, tuple[int, ...]], hash=False
    )
    """Neurons that are nodes, by site and layer."""
    features: Mapping[SiteLayer, FeatureNodes] = field(
        default_factory=dict[SiteLayer, FeatureNodes], hash=False
    )
    """Features that are nodes, by layer."""
    stack: Literal["", "vision"] = ""
    """As in `list_edges`."""


@lru_cache(maxsize=4)
def _open_graph(asked: AskedCircuits) -> PathGraph[Any, Any]:
    """Return the edges to draw from, which don't depend on the circuit."""
    model = EdgeGraph(asked.shape, asked.neurons, asked.features, stack=asked.stack)
    if asked.order is None:
        return model
    if not asked.places:
        return OnePlaceGraph(model, asked.order)
    edges = [PlacedEdge(edge, at, "") for edge in model.every for at in range(len(asked.places))]
    return PlacedGraph(model, edges, asked.order, asked.places)


def ask_circuits(
    experiment: ResolvedExperiment, rule: ResolvedRule, own: PlacedEdges, count: int
) -> AskedCircuits:
    """Return what random circuits like one of a rule depend on. Its positions are those of the
    circuit, and all tokens after them."""
    circuit, shape, seed = rule.circuit, experiment.model.shape, experiment.seed
    assert circuit is not None
    nodes = circuit.neurons, circuit.features
    if not circuit.edge_places:
        is_apart = has_two_streams(shape) or circuit.stack == "vision"
        early = None if is_apart else _order_written(experiment, rule)
        given = shape, frozenset(own), seed, count, (), early, *nodes
        return AskedCircuits(*given, stack=circuit.stack)
    order, groups = _group_tokens(experiment, rule, circuit), range(len(circuit.classes))
    places = [
        tuple(group for group in groups if place in circuit.classes[group])
        for place in range(len(circuit.places))
    ]
    edges = frozenset(
        PlacedEdge(edge, len(places) if place is None else place, "")
        for edge, at in own.items()
        for place in _list_places(at)
    )
    return AskedCircuits(shape, edges, seed, count, (*places, tuple(groups)), order, *nodes)


def _order_written(experiment: ResolvedExperiment, rule: ResolvedRule) -> PlaceOrder | None:
    """Return where information moves to from the tokens that a rule writes; None if a measure reads
    logits at one of them, as edges into `logits` then have an effect."""
    groups = [[set[int]()] for _ in experiment.table.runs[experiment.spec.base].rows]
    for cell in rule.positions.written.values():
        for (tokens,), hits in zip(groups, cell.hits, strict=True):
            tokens.update(chain.from_iterable(hits))
    order = order_tokens(experiment, 1, groups)
    return None if order.reads_end[0] else order


def _group_tokens(
    experiment: ResolvedExperiment, rule: ResolvedRule, circuit: CircuitTargets
) -> PlaceOrder:
    """Return where information moves to between the tokens of each class that a rule writes, and
    all other tokens."""
    number = {numbers: group for group, numbers in enumerate(circuit.classes)}
    groups: list[list[set[int]]] = []
    for row, places in enumerate(list_token_places(circuit.places)):
        groups.append([set() for _ in number])
        for cell in rule.positions.written.values():
            for token in chain.from_iterable(cell.hits[row]):
                groups[row][number[places.get(token, frozenset())]].add(token)
    return order_tokens(experiment, len(number), groups)


def list_drawn_edges(asked: AskedCircuits, drawn: Sequence[Any]) -> PlacedEdges:
    """Return the edges of a random circuit as a rule names them."""
    if not asked.places:
        return dict.fromkeys(drawn)
    every = len(asked.places) - 1
    return _join_places((each.edge, None if each.place == every else each.place) for each in drawn)


class DrawnCircuits(Record):
    """Random circuits of one size."""

    circuits: tuple[tuple[CircuitEdge, ...] | tuple[PlacedEdge, ...], ...]
    is_connected: bool
    """Whether each of their edges is on a path from `embed` to `logits`."""
    is_only: bool
    """Whether there is one circuit of this size, repeated."""


@lru_cache(maxsize=64)
def draw_circuits(asked: AskedCircuits) -> DrawnCircuits:
    """Draw random circuits; a file that is checked again has the same."""
    graph = _open_graph(replace(asked, circuit=frozenset[CircuitEdge](), seed=0, count=0))
    drawing = CircuitDraws(graph, asked.circuit, asked.seed)
    circuits = tuple(drawing.draws(asked.count))
    return DrawnCircuits(circuits, drawing.is_connected, drawing.is_only)
