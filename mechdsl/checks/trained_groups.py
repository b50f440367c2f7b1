"""Groups and circuits that a training chooses, `group g = fit(mask(size: 4), …)`: their sites or
edges, experiment by experiment.

The sites of a group depend on the model. An experiment is therefore checked with a program whose
groups have the sites for its model: the chosen ones, or the first candidates if the group isn't
trained yet. The name of a group of features or dimensions is replaced by these coordinates, so that
an experiment has `features 3, 12 of f` instead; that of a group of positions by the chosen ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, cast

from mechdsl.base import limits
from mechdsl.base.records import Record
from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rules import BadBasis
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.program import spec
from mechdsl.program.directions import fit_rows_of_basis, name_nodes
from mechdsl.program.spec import SEED_AXIS
from mechdsl.program.trainers import ChoosingTrainer, NodeSearchTrainer
from mechdsl.program.trainings import list_seeds, used_masks, used_saved_positions
from mechdsl.prompts.rows import PromptTable
from mechdsl.resolve.circuit_files import EMBEDDING, ENCODER_EMBEDDING, VISION_EMBEDDING, VISION_END
from mechdsl.resolve.directions import describe_rows
from mechdsl.resolve.sites import label_candidates, without_coordinates
from mechdsl.resolve.trainings import (
    check_mask_rows,
    check_mask_size,
    check_node_rows,
    check_training_rows,
    describe_training,
    explain_shared_images,
    outline_mask,
)
from mechdsl.resolve.types import (
    FeatureNode,
    MaskCandidate,
    PlacedEdge,
    PositionChoice,
    ResolvedExperiment,
    SiteCoordinate,
    SitePoint,
    TrainedMask,
    is_neuron,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import rewrite

Objectives = Mapping[tuple[str, str], ResolvedExperiment]
"""What trainings learn from, by definition and model."""


def reject_masks(
    experiment: spec.Experiment, program: spec.Program, what: str, allowed: Collection[str] = ()
) -> list[Diagnostic]:
    """Return E0207 for each trained group on which a definition other than an experiment depends.

    Args:
        what: The definition, such as `the edits of `tuned``.
        allowed: Groups on which the definition may depend.
    """
    reason = f"is chosen by a training, and {what} can't depend on it"
    hint = "list the sites: `group movers = L0H1, L1H2`"
    return [
        BadArgument(span=experiment.span, name=mask.name, reason=reason, hint=hint)
        for mask in used_masks(experiment, program)
        if mask.name not in allowed
    ]


def find_trained_nodes(name: str, program: spec.Program) -> spec.Basis | None:
    """Return the trained group whose sites are the nodes of a trained circuit; None for other nodes
    and other definitions.

    Args:
        name: Name of the circuit.
    """
    nodes = name_nodes(program.masks[name]) if name in program.masks else None
    basis = None if nodes is None else program.masks.get(nodes.id)
    return None if basis is None or basis.chooses_positions else basis


def check_seeds_of_nodes(
    nodes: spec.Basis, circuit: str, program: spec.Program
) -> list[Diagnostic]:
    """Return E0207 for the nodes of a circuit that a training chooses for each of several seeds."""
    seeds, named = list_seeds(nodes, program), name_nodes(program.masks[circuit])
    if not seeds or named is None:
        return []
    reason = f"is chosen for each of {len(seeds)} seeds, and a circuit has the nodes of one group"
    hint = f"declare a group for the circuit, with `seed: {seeds[0]}` instead of `seeds`"
    return [BadArgument(span=named.span, name=nodes.name, reason=reason, hint=hint)]


def check_nodes(
    circuit: spec.Basis,
    objective: ResolvedExperiment,
    of_nodes: ResolvedExperiment,
    program: spec.Program,
) -> list[Diagnostic]:
    """Return the problems of a circuit whose nodes are a trained group.

    Codes: E0207 for too many nodes, E0345 for held-out rows of the circuit that the training of the
    group uses.

    Args:
        objective: The objective of the circuit.
        of_nodes: The objective of the group.
    """
    (nodes,) = objective.masks
    named = name_nodes(circuit)
    size = nodes.training.trainer_of(ChoosingTrainer).size(nodes.training.of_trainer)
    if named is not None and size is not None and size > limits.CIRCUIT_NEURONS:
        reason = f"chooses {size:,} {nodes.noun}s, and at most {limits.CIRCUIT_NEURONS:,} can be "
        reason, hint = f"{reason}nodes", "write a smaller `size` in the `fit` of the group"
        return [BadArgument(span=named.span, name=named.id, reason=reason, hint=hint)]
    training = outline_mask(circuit, objective, program).training
    problem = check_node_rows(training, objective, nodes.training, of_nodes)
    return [] if problem is None else [problem]


def check_held_out_images(
    definition: spec.Basis, objective: ResolvedExperiment, program: spec.Program
) -> list[Diagnostic]:
    """Return E0342 if held-out rows of a group of sites or a circuit in a vision encoder may have
    images of training rows.

    Args:
        definition: The group or circuit.
        objective: Its objective.
    """
    training = outline_mask(definition, objective, program).training
    problem = explain_shared_images(training)
    if problem is None:
        return []
    reason, hint = problem
    what = "circuit" if definition.chooses_edges else "group"
    return [BadBasis(span=definition.method.span, reason=reason, hint=hint, what=what)]


class FilledGroups(Record):
    """An experiment with the sites of its groups."""

    experiment: spec.Experiment
    program: spec.Program
    masks: tuple[TrainedMask, ...]
    """Those whose candidates are known."""
    waits: bool
    """Whether the candidates of some group aren't known: its model or its rows aren't available."""


def fill_groups(
    experiment: spec.Experiment, program: spec.Program, objectives: Objectives
) -> FilledGroups:
    """Insert the sites of the groups that an experiment uses and that a training chooses."""
    used = used_masks(experiment, program)
    positions = list(_list_saved_positions(experiment, program))
    if not used and not positions:
        return FilledGroups(experiment, program, (), waits=False)
    groups, circuits = dict(program.groups), dict(program.circuits)
    masks = list[TrainedMask]()
    coordinates: list[_ChosenCoordinates] = []
    for definition in used:
        objective = objectives.get((definition.name, experiment.model))
        sites, mask = (definition.site,), None
        if objective is not None:
            mask = outline_mask(definition, objective, program)
            masks.append(mask)
        if definition.chooses_edges:
            if mask is not None:
                old = circuits[definition.name]
                circuits[definition.name] = _fill_circuit(old, mask, definition)
            continue
        if mask is not None:
            most = None if mask.is_trained else limits.CIRCUIT_NEURONS  # may be nodes of a circuit
            sites = tuple(_sites_of(mask.members[:most], definition.site, definition.span))
        if definition.chooses_positions:
            assert definition.at is not None
            labels = None if mask is None else tuple(_list_labels(mask))
            positions.append(_ChosenPositions(definition.name, definition.at, labels))
            continue
        if definition.site.coordinates is not None:
            waits = mask is None or not mask.is_trained
            coordinates.append(_ChosenCoordinates(definition, sites[0], waits))
        old = groups[definition.name]
        fields = {
            "sites": sites,
            "choices": () if mask is None else tuple(_list_choices(mask)),
            "waits": mask is None or not mask.is_trained,
            "ranked": () if mask is None else tuple(_rank_sites(mask, definition)),
        }
        groups[definition.name] = old.model_copy(update=fields)
    expects = tuple(
        expect.model_copy(update={"groups": tuple(groups[group.name] for group in expect.groups)})
        for expect in experiment.expects
    )
    experiment = experiment.model_copy(update={"expects": expects})
    if coordinates or positions:
        experiment = _insert(experiment, [*coordinates, *positions])
    return FilledGroups(
        experiment,
        program.model_copy(update={"groups": groups, "circuits": circuits}),
        tuple(masks),
        waits=len(masks) < len(used),
    )


def _list_saved_positions(
    experiment: spec.Experiment, program: spec.Program
) -> Iterator[_ChosenPositions]:
    """Yield the groups of positions that an experiment reads from files."""
    for group in used_saved_positions(experiment, program):
        if group.at is not None:
            yield _ChosenPositions(group.name, group.at, group.labels)


def _list_labels(mask: TrainedMask) -> Iterator[str]:
    """Yield the labels of the chosen positions."""
    for member in mask.members:
        if isinstance(member, PositionChoice):
            yield member.label


def _fill_circuit(old: spec.Circuit, mask: TrainedMask, definition: spec.Basis) -> spec.Circuit:
    """Return a circuit with the edges that a training chose."""
    fields: dict[str, object] = {"scores": mask.scores}
    if isinstance(mask.candidates[0], PlacedEdge):
        scores = dict(zip(mask.candidates, mask.scores, strict=False))
        fields = {"placed_scores": tuple(scores[own] for own in mask.chosen if own in scores)}
    edges = tuple(_edges_of(mask.chosen, definition))
    fields |= {"edges": edges, "nodes": tuple(_name_nodes(definition))}
    return old.model_copy(update=fields)


def _list_choices(mask: TrainedMask) -> Iterator[int]:
    """Yield the coordinates that a training could choose: all until it is trained, and then those
    that change a training row."""
    scores = mask.scores or (1.0,) * len(mask.candidates)
    for candidate, score in zip(mask.candidates, scores, strict=True):
        if mask.can_choose(score) and isinstance(candidate, SiteCoordinate):
            yield candidate.number


def _rank_sites(mask: TrainedMask, definition: spec.Basis) -> Iterator[ast.Site]:
    """Yield the chosen sites one by one: in the order in which a search added them; otherwise,
    those whose scores have the largest sizes first, and equal sizes in the order of the
    candidates."""
    scores, ranked = dict(zip(mask.candidates, mask.scores, strict=False)), mask.chosen
    if not isinstance(mask.training.trainer, NodeSearchTrainer):
        ranked = sorted(ranked, key=lambda each: -abs(scores.get(each, 0.0)))
    for candidate in ranked:
        yield from _sites_of((candidate,), definition.site, definition.span)


def _sites_of(chosen: tuple[MaskCandidate, ...], site: ast.Site, span: Span) -> Iterator[ast.Site]:
    """Yield the candidates' site with the layer and the units of some candidates, layer by layer;
    or with the chosen coordinates of its vector."""
    numbers = tuple(
        coordinate.number for coordinate in chosen if isinstance(coordinate, SiteCoordinate)
    )
    if numbers:
        axes = tuple(
            replace(axis, values=_values(numbers, span)) if axis is site.coordinates else axis
            for axis in site.axes
        )
        yield replace(site, axes=axes, excluded=())
        return
    points = [point for point in chosen if isinstance(point, SitePoint)]
    for layer in dict.fromkeys(point.layer for point in points):
        units = tuple(p.unit for p in points if p.layer == layer and p.unit is not None)
        own = {"layer": () if layer is None else (layer,)}
        axes = tuple(
            replace(axis, plural=True, span=span, values=_values(own.get(axis.word, units), span))
            for axis in site.axes
        )
        yield replace(site, axes=axes, excluded=(), span=span)


def _edges_of(chosen: tuple[MaskCandidate, ...], definition: spec.Basis) -> Iterator[ast.SiteMap]:
    """Yield chosen edges as a file names them."""
    span = definition.span
    for points in chosen:
        edge, at = points if isinstance(points, tuple) else None, None
        if isinstance(points, PlacedEdge):
            assert definition.at is not None
            edge, at = points.edge, definition.at.items[points.place]
        if edge is not None:
            of, to = (_end(point, span) for point in edge)
            yield ast.SiteMap(of, to, at, span=span)


def _name_nodes(definition: spec.Basis) -> Iterator[ast.Site]:
    """Yield the group of neurons or features that are nodes of the edges to choose from."""
    name = name_nodes(definition)
    if name is not None:
        yield ast.Site((name,), span=name.span)


_ENDS_OF_STREAMS = {
    EMBEDDING: "embed",
    ENCODER_EMBEDDING: "embed encoder",
    VISION_EMBEDDING: "embed vision",
    VISION_END: "embed",
}
"""Nodes at the start or the end of a stream that aren't sites → their names in edges."""


def _end(point: SitePoint, span: Span) -> ast.Site:
    """Return one end of an edge as a file names it."""
    if point in _ENDS_OF_STREAMS:
        words = _ENDS_OF_STREAMS[point].split(" ")
        return ast.Site(tuple(ast.Name(word, span=span) for word in words), span=span)
    if isinstance(point, FeatureNode):
        return _feature_end(point, span)
    if is_neuron(point) and point.unit is None:  # the other neurons of the layer
        point = replace(point, site=point.site.replace("mlp_hidden", "mlp_out"))
    unit: ast.AxisWord = "neuron" if is_neuron(point) else "head"
    numbers: dict[ast.AxisWord, int | None] = {"layer": point.layer, unit: point.unit}
    axes = tuple(
        ast.Axis(word, False, _values((number,), span), span=span)
        for word, number in numbers.items()
        if number is not None
    )
    words = point.site.split(" ")
    return ast.Site(tuple(ast.Name(word, span=span) for word in words), axes, span=span)


def _feature_end(point: FeatureNode, span: Span) -> ast.Site:
    """Return a feature at one end of an edge as a file names it."""
    assert point.layer is not None
    assert point.unit is not None
    feature = ast.Axis("feature", False, _values((point.unit,), span), of=point.basis, span=span)
    if not point.is_of_layers:
        return ast.Site((), (feature,), span=span)
    layer = ast.Axis("layer", False, _values((point.layer,), span), span=span)
    return ast.Site((ast.Name("mlp_out", span=span),), (layer, feature), span=span)


def _values(numbers: tuple[int, ...], span: Span) -> tuple[ast.AxisRange, ...]:
    return tuple(ast.AxisRange(ast.Bound(number, span=span), span=span) for number in numbers)


PartT = TypeVar("PartT")


class _ChosenCoordinates(Record):
    """A group of features or dimensions, with the chosen ones."""

    definition: spec.Basis
    site: ast.Site
    waits: bool
    """Whether the group isn't trained yet, so that `site` has placeholders."""

    def is_named(self, site: ast.Site) -> bool:
        """Whether a site is this group: alone, or with everything that it chooses from."""
        if len(site.names) != 1 or site.names[0].id != self.definition.name or site.basis:
            return False
        return site.axes in ((), self.definition.site.axes)

    def insert(self, node: ast.Node) -> ast.Node:
        """Return the site that the name of the group stands for; of another site, without the
        coordinates of the group that it excludes. Until the group is trained, a site excludes
        nothing for it."""
        if not isinstance(node, ast.Site):
            return node
        if self.is_named(node):
            axes = tuple(
                replace(axis, span=node.span) if axis is self.site.coordinates else axis
                for axis in self.site.axes
            )
            return replace(self.site, axes=axes, excluded=node.excluded, span=node.span)
        excluded: list[ast.Site | ast.AxisRange] = []
        for item in node.excluded:
            numbers = _numbers_of(item, node) if isinstance(item, ast.Site) else [item]
            is_own = item.span.written.split()[0] == self.definition.name
            excluded += () if self.waits and is_own and numbers else numbers or [item]
        return replace(node, excluded=tuple(excluded)) if node.excluded else node


class _ChosenPositions(Record):
    """A group of positions and its candidates."""

    name: str
    at: ast.Positions
    labels: tuple[str, ...] | None
    """Labels of the chosen positions; None until the candidates are known."""

    def insert(self, node: ast.Node) -> ast.Node:
        """Return the chosen positions where a rule names them: `g tokens` or `each g token`."""
        if not isinstance(node, ast.SpanTokens):
            return node
        name = self.name
        bare = replace(node.of, name=name) == ast.SpanRef(name=name, span=node.of.span)
        if node.of.name != name or not bare or node.low is not None or node.plural == node.each:
            return node
        return ast.ChosenTokens(name, self.at, self.labels, node.plural, span=node.span)


def _insert(part: PartT, groups: Sequence[_ChosenCoordinates | _ChosenPositions]) -> PartT:
    """Return a part of a program with what was chosen in the place of the names of groups."""
    return cast("PartT", _inserted(part, groups))


def _inserted(part: object, groups: Sequence[_ChosenCoordinates | _ChosenPositions]) -> object:
    match part:
        case ast.Node():
            return rewrite(part, lambda node: _insert_in_place(node, groups))
        case spec.Spec():
            named = {name: getattr(part, name) for name in spec.spec_fields(type(part))}
            return part.model_copy(update={n: _inserted(own, groups) for n, own in named.items()})
        case tuple():
            return tuple(_inserted(each, groups) for each in cast("tuple[object, ...]", part))
        case dict():
            every = cast("dict[object, object]", part)
            return {key: _inserted(each, groups) for key, each in every.items()}
        case _:
            return part


def _insert_in_place(
    node: ast.Node, groups: Sequence[_ChosenCoordinates | _ChosenPositions]
) -> ast.Node:
    """Return what the name of a group stands for; any other node as it is."""
    for group in groups:
        node = group.insert(node)
    return node


def _numbers_of(item: ast.Site, site: ast.Site) -> list[ast.AxisRange]:
    """Return the coordinates that an exception names if a site names some of the same vector."""
    if item.coordinates is None or without_coordinates(item) != without_coordinates(site):
        return []
    values = item.coordinates.values
    return [replace(value, span=item.span) for value in values if isinstance(value, ast.AxisRange)]


def check_masks(
    filled: FilledGroups, table: PromptTable
) -> tuple[tuple[TrainedMask, ...], list[Diagnostic]]:
    """Return the groups with their descriptions, and the problems with them.

    Codes: E0207 for a comparison of models with a group of each, E0342 for a size, E0345 for
    measured training rows.

    Args:
        table: The rows of the experiment.
    """
    experiment, program = filled.experiment, filled.program
    problems: list[Diagnostic] = []
    described: list[TrainedMask] = []
    for mask in filled.masks:
        definition = program.masks[mask.training.definition]
        for problem in (
            check_mask_size(mask),
            check_mask_rows(mask, definition),
            *check_training_rows(definition, mask.training, experiment, table),
            _named_as_span(definition, table) if definition.chooses_positions else None,
            _compared_across_models(definition, experiment),
        ):
            problems += [] if problem is None else [problem]
        read = fit_rows_of_basis(definition, program)
        assert read is not None
        rows = f"{describe_rows(mask.training.sample, read)} at {mask.training.sample.cell.label}"
        made = describe_training(mask, rows, program, experiment, table)
        if mask.is_trained:
            made = f"{label_candidates(mask.members)}; {made}"
        described.append(replace(mask, made=made))
    for group in used_saved_positions(experiment, program):
        problem = _named_as_span(group, table)
        problems += [] if problem is None else [problem]
    return tuple(described), problems


def _named_as_span(definition: spec.Basis | spec.Group, table: PromptTable) -> Diagnostic | None:
    """Return E0207 for a group of positions with the name of a span of the prompts."""
    name = definition.name
    spans = (span.name for run in table.runs.values() for row in run.rows for span in row.spans)
    if name not in spans:
        return None
    reason, hint = "is also a part of the prompts", "give the group another name"
    return BadArgument(span=definition.span, name=name, reason=reason, hint=hint)


def _compared_across_models(
    definition: spec.Basis, experiment: spec.Experiment
) -> Diagnostic | None:
    """Return E0207 for an expectation on a group that has other sites in each of several models, or
    for each of several seeds."""
    several = [axis for axis, _ in experiment.variant if axis in ("model", SEED_AXIS)]
    if not several:
        return None
    for expect in experiment.expects:
        if any(group.name == definition.name for group in expect.groups):
            reason = f"has other sites for each {several[0]}, and the experiment has several"
            hint = f"write an experiment for each {several[0]}"
            return BadArgument(span=expect.span, name=definition.name, reason=reason, hint=hint)
    return None
