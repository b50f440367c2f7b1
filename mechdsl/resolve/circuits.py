"""Edges of circuits: the nodes of a model, the edges between them, and those that a rule ablates.

References: Conmy et al. 2023 (arXiv 2304.14997), section 3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import product
from random import Random

from mechdsl.base.hashing import stable_hash
from mechdsl.base.safetensors_files import UnreadableFile
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.names import BadArgument
from mechdsl.diagnostics.rules import AxisDoesNotFit, BadBasis, NoPath, NotOnAPath
from mechdsl.diagnostics.syntax import NotSupported
from mechdsl.models.shape import ModelShape, unit_count
from mechdsl.program import spec
from mechdsl.program.paths import SAVED_PATH, path_to_read
from mechdsl.program.spec import constant_value
from mechdsl.resolve.cells import counts_from_end
from mechdsl.resolve.circuit_files import EMBEDDING, END, SavedCircuit, read_circuit
from mechdsl.resolve.sites import (
    ExperimentContext,
    find_missing_point,
    label_node,
    resolve_site,
)
from mechdsl.resolve.types import (
    CircuitEdge,
    CircuitTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
    precedes,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

SENDER_WORDS = "`embed`, `L0H1` or `L0.mlp`"

RECEIVER_WORDS = "`L1H0.q`, `L1H0.k`, `L1H0.v`, `L1.mlp` or `logits`"

_SENDERS = {"embed": "resid_pre", "z": "z", "head_out": "z", "mlp_out": "mlp_out"}
"""Component of a sender → the site of its output."""

_RECEIVERS = {
    "q": "q",
    "k": "k",
    "v": "v",
    "mlp_norm": "mlp_norm",
    "mlp_out": "mlp_norm",
    "logits": "logits",
    "final_norm": "logits",
}
"""Component of a receiver → the site that it reads the stream at; `L1.mlp` names `mlp_out`."""

CIRCUIT_NOTE = (
    "each query, key and value of a head, each MLP and the output read the stream of this pass "
    "with the fill instead of the output of the senders of ablated edges, through norms that are "
    "recomputed; `embed` is the stream that enters block 0, with positions; biases that are added "
    "after heads belong to no sender"
)


def resolve_circuit(
    circuit: spec.Circuit, rule: spec.Rule, work: ExperimentContext
) -> tuple[SiteTargets, CircuitTargets] | None:
    """Resolve the edges that `ablate CIRCUIT` or `ablate all but CIRCUIT` ablates.

    Returns:
        The senders of these edges, and the edges; None after an error.

    Codes: E0108, E0207, E0304, E0334, E0335, and those of sites.
    """
    assert rule.site is not None
    shape = work.sites.shape
    every = list_edges(shape)
    points = [point for edge in every for point in edge if point != END]
    missing = find_missing_point(points, shape, work.sites.model, rule.site.span)
    if missing is None and shape.task != "tokens" and "logits" not in shape.sites:
        missing = NotSupported(
            span=rule.site.span, what=f"a circuit in `{work.sites.model}`, which has no logits,"
        )
    if missing is not None:
        work.diagnostics.append(missing)
        return None
    found = dict.fromkeys(every) if circuit.name == spec.EVERY_EDGE else {}
    before = len(work.diagnostics)
    saved = None if circuit.source is None else _read_saved(circuit.source, every, work)
    if saved is not None:
        found = dict.fromkeys(saved.edges)
    for edge in circuit.edges:
        found.update(dict.fromkeys(_resolve_edge(edge, work)))
    if len(work.diagnostics) > before:
        return None
    ablated = tuple(edge for edge in every if (edge in found) != rule.all_but)
    if not ablated:
        written = f"all but {circuit.name}"
        reason = f"leaves no edge: the circuit has all {len(every):,} edges of `{work.sites.model}`"
        hint = f"write `ablate {circuit.name}`, or name fewer edges"
        bad = BadArgument(span=rule.site.span, name=written, reason=reason, hint=hint)
        work.diagnostics.append(bad)
        return None
    senders = tuple(dict.fromkeys(sender for sender, _ in ablated))
    label = f"all but {circuit.name}" if rule.all_but else circuit.name
    sites = SiteTargets((), {(): senders}, {(): label})
    targets = CircuitTargets(circuit.name, {(): ablated}, tuple(every), tuple(found))
    if saved is not None:
        read = {"scores": saved.scores, "digest": saved.digest, "made": saved.made}
        targets = replace(targets, **read)
    return sites, targets


def _read_saved(
    call: ast.Call, every: Sequence[CircuitEdge], work: ExperimentContext
) -> SavedCircuit | None:
    """Read the edges of `saved("circuit.json", size: 100)`; None after an error."""
    path_node, *_ = (each.value for each in call.arguments if each.name is None)
    sizes = (each.value for each in call.arguments if each.name == "size")
    size = next((constant_value(each, work.program.parameters) for each in sizes), None)
    written = str(constant_value(path_node, work.program.parameters))
    path, problems = path_to_read(SAVED_PATH, written, call.span)
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    if path is None:
        return None
    try:
        assert size is None or isinstance(size, int)
        return read_circuit(path, written, size, work.sites.shape, tuple(every))
    except UnreadableFile as problem:
        reason, hint = problem.reason, problem.hint
        bad = BadBasis(span=call.span, reason=reason, hint=hint, what="circuit")
        if bad not in work.diagnostics:
            work.diagnostics.append(bad)
        return None


def list_edges(shape: ModelShape) -> list[CircuitEdge]:
    """List the edges of a model, from each sender to all receivers after it."""
    senders, receivers = [EMBEDDING], list[SitePoint]()
    for layer in range(shape.n_layers):
        for site in ("q", "k", "v"):
            receivers += (SitePoint(site, layer, n) for n in range(unit_count(shape, site, layer)))
        senders += (SitePoint("z", layer, n) for n in range(unit_count(shape, "z", layer)))
        if shape.has("mlp_out", layer):
            receivers.append(SitePoint("mlp_norm", layer, None))
            senders.append(SitePoint("mlp_out", layer, None))
    receivers.append(END)
    return [
        (of, to)
        for of, to in product(senders, receivers)
        if precedes(of, to, parallel=shape.parallel_block)
    ]


def _resolve_edge(edge: ast.SiteMap, work: ExperimentContext) -> list[CircuitEdge]:
    """Resolve `A -> B` to the edges between these components; E0335 if the model has none."""
    senders = _resolve_nodes(edge.source, "start", work)
    receivers = _resolve_nodes(edge.target, "end", work)
    shape = work.sites.shape
    found = [
        (of, to)
        for of, to in product(senders, receivers)
        if precedes(of, to, parallel=shape.parallel_block)
    ]
    open_ends = shape.stands_in and any(
        counts_from_end(node) for node in walk(edge) if isinstance(node, ast.Bound)
    )
    if not found and senders and receivers and not open_ends:
        later = [to for of, to in list_edges(shape) if of == senders[0]]
        examples = dict.fromkeys(map(label_node, (*later[:2], END)))
        problem = NoPath(
            span=edge.span,
            sender=edge.source.span.written,
            receiver=edge.target.span.written,
            reason="the receiver reads before or at the sender",
            example="`, `".join(examples),
        )
        if problem not in work.diagnostics:
            work.diagnostics.append(problem)
    return found


def _resolve_nodes(site: ast.Site, verb: str, work: ExperimentContext) -> list[SitePoint]:
    """Resolve one end of an edge; reports E0304, E0334 and errors of sites."""
    words = _SENDERS if verb == "start" else _RECEIVERS
    bare = site.bare
    if bare is not None and bare.id == "embed" and verb == "start":
        return [EMBEDDING]
    if bare is not None and words.get(bare.id) == "logits":
        return [END]
    if any(isinstance(node, ast.RankedSelection) for node in walk(site)):
        what = "a pick from another experiment in a `circuit`"
        work.diagnostics.append(NotSupported(span=site.span, what=what, later="name the sites"))
        return []
    targets, axes = resolve_site(site, work.sites)
    if targets is None:
        return []
    if axes or targets.axes:
        problem = AxisDoesNotFit(
            span=site.span,
            site=site.span.written,
            reason="sweeps inside a circuit, whose edges are joined",
            hint="write the plural: `layers`, `heads`",
        )
        work.diagnostics.append(problem)
        return []
    points = targets.points[()]
    wrong = next((p.site for p in points if p.site not in words), None)
    if wrong is None:
        return [
            SitePoint(words[point.site], point.layer, unit)
            for point in points
            for unit in _units(point, work.sites.shape)
        ]
    is_head = verb == "end" and wrong in ("z", "head_out")
    reason = "its output isn't added to the stream as one of the components"
    if verb == "end":
        reason = "it isn't an input that reads the stream separately"
    written = site.span.written if is_head and site.short is not None else "L1H0"
    hint = f"write one of its inputs: `{written}.q`, `{written}.k` or `{written}.v`"
    if not is_head:
        hint = f"write one of {SENDER_WORDS if verb == 'start' else RECEIVER_WORDS}"
    work.diagnostics.append(
        NotOnAPath(span=site.span, verb=verb, site=wrong, reason=reason, hint=hint)
    )
    return []


def _units(point: SitePoint, shape: ModelShape) -> Iterator[int | None]:
    """Yield the unit of a point, or each head if it names all of them."""
    if point.unit is None and point.site in ("q", "k", "v", "z", "head_out"):
        yield from range(unit_count(shape, point.site, point.layer))
    else:
        yield point.unit


def describe_circuit(rule: ResolvedRule) -> str:
    """Describe what a rule ablates: `all but c: 118 of 121 edges`."""
    assert rule.circuit is not None
    assert rule.sites is not None
    ablated = next(iter(rule.circuit.edges.values()))
    label = next(iter(rule.sites.labels.values()))
    total = count_noun(len(rule.circuit.every), "edge")
    return f"`{label}`: {len(ablated):,} of {total} ablated"


# --- random circuits ------------------------------------------------------------------------------

MAX_TRIES = 200
"""Most attempts to draw one random circuit that isn't drawn yet."""


class CircuitDraws:
    """Random circuits with the same number of edges as a circuit.

    If each edge of the circuit is on a path of the circuit from `embed` to `logits`, so is each
    edge of a random circuit, which is then grown path by path: an edge is drawn uniformly, and
    completed by random edges to the nodes that the circuit already has.
    """

    def __init__(self, shape: ModelShape, circuit: Collection[CircuitEdge], seed: int) -> None:
        self.every = list_edges(shape)
        self.circuit = frozenset(circuit)
        self._shared: dict[tuple[str, int | None], int] = {
            (site, layer): unit_count(shape, "z", layer) // unit_count(shape, site, layer)
            for layer in range(shape.n_layers)
            for site in ("q", "k", "v")
        }
        self._after: dict[SitePoint, list[CircuitEdge]] = defaultdict(list)
        self._before: dict[SitePoint, list[CircuitEdge]] = defaultdict(list)
        for edge in self.every:
            self._after[edge[0]].append(edge)
            for node in self._nodes(edge[1]):
                self._before[node].append(edge)
        self.is_connected = self._covers(self.circuit)
        key = sorted(map(str, self.circuit))
        self._random = Random(stable_hash(seed, "control", "circuit", *key))

    def draws(self, count: int) -> list[tuple[CircuitEdge, ...]]:
        """Return up to `count` different circuits, each with its edges in forward order."""
        found: dict[frozenset[CircuitEdge], None] = {}
        for _ in range(MAX_TRIES * count):
            drawn = self._grown() if self.is_connected else self._drawn()
            if drawn is not None and drawn != self.circuit:
                found[drawn] = None
            if len(found) == count:
                break
        return [tuple(edge for edge in self.every if edge in own) for own in found]

    def _drawn(self) -> frozenset[CircuitEdge]:
        return frozenset(self._random.sample(self.every, len(self.circuit)))

    def _grown(self) -> frozenset[CircuitEdge] | None:
        """Grow a circuit path by path; None if the last path doesn't fit its size."""
        found: set[CircuitEdge] = set()
        reached, leading = {EMBEDDING}, {END}
        for _ in range(MAX_TRIES):
            edge = self._random.choice(self.every)
            path = {edge}
            node = edge[0]
            while node not in reached:
                before = self._random.choice(self._before[node])
                path.add(before)
                node = before[0]
            node = self._random.choice(self._nodes(edge[1]))
            while node not in leading:
                after = self._random.choice(self._after[node])
                path.add(after)
                node = self._random.choice(self._nodes(after[1]))
            if len(found | path) > len(self.circuit):
                continue
            found |= path
            reached |= {node for _, to in path for node in self._nodes(to)} - {END}
            leading |= {of for of, _ in path}
            if len(found) == len(self.circuit):
                return frozenset(found)
        return None

    def _nodes(self, receiver: SitePoint) -> list[SitePoint]:
        """Return the senders that depend on a receiver; for the end of the model, itself."""
        if receiver == END:
            return [END]
        if receiver.unit is None:
            return [SitePoint("mlp_out", receiver.layer, None)]
        shared = self._shared[receiver.site, receiver.layer]
        first = receiver.unit * shared
        return [SitePoint("z", receiver.layer, n) for n in range(first, first + shared)]

    def _covers(self, edges: Collection[CircuitEdge]) -> bool:
        """Return whether each edge is on a path from `embed` to the end of the model."""
        reached, leading = {EMBEDDING}, {END}
        for edge in self.every:  # senders in forward order
            if edge in edges and edge[0] in reached:
                reached.update(self._nodes(edge[1]))
        for edge in reversed(self.every):
            if edge in edges and leading.intersection(self._nodes(edge[1])):
                leading.add(edge[0])
        return all(of in reached and leading.intersection(self._nodes(to)) for of, to in edges)
