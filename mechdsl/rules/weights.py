"""Rules on weights, which act at all tokens: `scale`, `set` and `add to` the output weights of
heads and neurons, and `project out … from weights`.

They change a run as a model with these weights would. The same rules, in the block of an edited
model, change the weights of a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from itertools import product
from typing import TYPE_CHECKING

from mechdsl.base.records import Record
from mechdsl.base.text import HintedError
from mechdsl.diagnostics.rules import BadDirection, BadWeights
from mechdsl.models.shape import vector_width
from mechdsl.program import spec
from mechdsl.resolve.bases import (
    CHANGED_WEIGHTS,
    MAPPED_SITES,
    NEXT_MAPS,
    VECTOR_AMOUNT,
    WeightChange,
)
from mechdsl.resolve.conflicts import ADD_TO_WEIGHTS, PROJECT_OUT_OF_WEIGHTS
from mechdsl.resolve.directions import resolve_direction
from mechdsl.resolve.runs import RuleKind
from mechdsl.resolve.sites import ExperimentContext, find_missing_point, label_points, resolve_site
from mechdsl.resolve.targets import resolve_amounts, resolve_rule_positions
from mechdsl.resolve.types import (
    WEIGHTS_BASIS,
    Amounts,
    AxisIndices,
    BasisMember,
    BasisTargets,
    Convention,
    Coordinates,
    DirectionMember,
    DirectionTargets,
    OutputWeights,
    PointBases,
    PositionTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
    VectorBatch,
    WeightedSum,
    count_numbers,
)
from mechdsl.rules.kinds import rule_kind
from mechdsl.rules.steering import DirectionRule, normalize_directions
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from torch import Tensor

UNITS_OF_OUTPUTS: Mapping[str, str] = {"mlp_out": "neuron", "attn_out": "head"}

_EXAMPLES = "`weights of mlp_out layer 3 neuron 5`, `weights of attn_out layer 2 head 1`"


class WeightRule(RuleKind):
    """A rule on the output weights of heads, neurons or whole sublayers."""

    whole_text = True
    does: WeightChange
    """Its effect on a run."""

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        try:
            return self._resolve(at_every_token(rule, work), work)
        except _NotEditable as problem:
            assert rule.site is not None
            work.diagnostics.append(
                BadWeights(span=rule.site.span, reason=problem.reason, hint=problem.hint)
            )
            return None

    def _resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        """Resolve the rule; None after an error. Raises _NotEditable."""
        units = _resolve_units(rule, work)
        positions = resolve_rule_positions(rule, work.experiment.base, work)
        if units is None or positions is None:
            return None
        sites = _written_sites(units)
        changes = self.changes(rule, sites, positions, work)
        if changes is None:
            return None
        return ResolvedRule(
            spec=rule,
            does=self.does,
            run=work.experiment.base,
            sites=sites,
            positions=positions,
            amounts=changes.amounts,
            basis=_targets(units, changes, work),
        )

    def changes(
        self,
        rule: spec.Rule,
        sites: SiteTargets,
        positions: PositionTargets,
        work: ExperimentContext,
    ) -> _Changes | None:
        """Return what happens to the weights; None after an error. Raises _NotEditable.

        Args:
            sites: The outputs that the weights write to.
        """
        raise NotImplementedError


class _Changes(Record):
    """What a rule does to weights: a factor in each cell, or vectors."""

    amounts: Amounts
    axes: tuple[str, ...] = ()
    vectors: Mapping[AxisIndices, DirectionMember] = field(
        default_factory=dict[AxisIndices, DirectionMember]
    )
    """By the indices along `axes`; empty for a factor."""
    replaces: bool = False


class _NotEditable(HintedError):
    """Raised with the reason why weights can't be edited, and a fix."""


def at_every_token(rule: spec.Rule, work: ExperimentContext) -> spec.Rule:
    """Return the rule at all tokens of the prompt, and of the answers that are fed after it."""
    if all(length < 2 for _, lengths in work.answers.texts for length in lengths):
        return rule
    (item,) = rule.at.items
    at = replace(rule.at, items=(replace(item, and_answer=True),))
    return rule.model_copy(update={"at": at})


# --- heads and neurons ----------------------------------------------------------------------------


def _resolve_units(rule: spec.Rule, work: ExperimentContext) -> SiteTargets | None:
    """Resolve the heads and neurons whose output weights change, and add their axes.

    All heads or neurons of a layer are one point without a unit. None after an error of sites.
    Raises _NotEditable.
    """
    assert rule.site is not None
    if rule.site.basis_name is not None:
        raise _NotEditable(
            "weights aren't coordinates of a basis", f"name heads or neurons: {_EXAMPLES}"
        )
    targets, axes = resolve_site(_named_by_unit(rule.site), work.sites)
    for axis in axes:
        work.add_axis(axis)
    if targets is None:
        return None
    points = {
        key: tuple(dict.fromkeys(map(_read_point, here))) for key, here in targets.points.items()
    }
    named = [point for here in points.values() for point in here]
    missing = find_missing_point(named, work.model.shape, work.model.name, rule.site.span)
    if missing is not None:
        work.diagnostics.append(missing)
        return None
    return SiteTargets(targets.axes, points, targets.labels, missing=targets.missing)


def _named_by_unit(site: ast.Site) -> ast.Site:
    """Return `mlp_hidden layer 3 neuron 5` for `mlp_out layer 3 neuron 5`, likewise for heads."""
    if len(site.names) != 1:
        return site
    name = site.names[0]
    unit = UNITS_OF_OUTPUTS.get(name.id)
    if unit is None or all(axis.word != unit for axis in site.axes):
        return site
    return replace(site, names=(replace(name, id=MAPPED_SITES[name.id]),))


def _read_point(point: SitePoint) -> SitePoint:
    """Return the heads or neurons of a point; all of them for the output of a sublayer."""
    if point.site in NEXT_MAPS:
        return point
    if point.site in MAPPED_SITES:
        return replace(point, site=MAPPED_SITES[point.site], unit=None)
    raise _NotEditable(
        f"no weights of heads or neurons write to `{point.site}` alone",
        f"name a sublayer, or its heads or neurons: {_EXAMPLES}",
    )


def _written_sites(units: SiteTargets) -> SiteTargets:
    """Return the outputs that heads and neurons write to, one point per layer, with what they
    read."""
    points: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    sources: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    labels: dict[AxisIndices, str] = {}
    for key, here in units.points.items():
        sources[key] = tuple(dict.fromkeys(replace(point, unit=None) for point in here))
        points[key] = tuple(replace(p, site=NEXT_MAPS[p.site]) for p in sources[key])
        if not here:
            labels[key] = "nothing"
            continue
        whole = any(point.unit is None for point in here)
        label = label_points(points[key] if whole else here)
        labels[key] = f"weights of {label if whole else label.rpartition('.')[0]}"
    return SiteTargets(units.axes, points, labels, sources, missing=units.missing)


# --- changes --------------------------------------------------------------------------------------


def _targets(units: SiteTargets, changes: _Changes, work: ExperimentContext) -> BasisTargets:
    """Return the rule's change as coordinates: those of all heads or neurons of a layer.

    Raises _NotEditable.
    """
    layers = dict.fromkeys(replace(p, unit=None) for here in units.points.values() for p in here)
    by_layer: dict[int | None, str] = {}
    for point in layers:
        if by_layer.setdefault(point.layer, point.site) != point.site:
            raise _NotEditable(
                f"heads and neurons of layer {point.layer} are edited together",
                "write a rule for each of them",
            )
    vectors = changes.vectors or {(): None}
    bases: list[PointBases] = [
        {(point.layer, None): _member(point, member, changes, work) for point in layers}
        for member in vectors.values()
    ]
    axes = (*units.axes, *(axis for axis in changes.axes if axis not in units.axes))
    targets: dict[AxisIndices, Coordinates] = {}
    for (key, here), (number, other) in product(units.points.items(), enumerate(vectors)):
        place = dict(zip(units.axes, key, strict=True))
        pairs = zip(changes.axes, other, strict=True)
        if all(place.setdefault(axis, index) == index for axis, index in pairs):
            which = _numbers(here, work)
            targets[tuple(place[axis] for axis in axes)] = Coordinates(which, number)
    return BasisTargets(WEIGHTS_BASIS, (), tuple(bases), axes, targets)


def _numbers(points: Sequence[SitePoint], work: ExperimentContext) -> tuple[int, ...]:
    """Return the numbers that some heads or neurons have in the vector of all; empty for all.

    Raises _NotEditable.
    """
    by_layer: dict[int | None, set[int]] = {}
    for point in points:
        numbers = by_layer.setdefault(point.layer, set())
        if point.unit is not None:
            width = vector_width(work.model.shape, point.site, point.layer)
            numbers.update(range(point.unit * width, (point.unit + 1) * width))
    for point in points:
        if point.unit is None:
            by_layer[point.layer] = set()
    first = next(iter(by_layer.values()), set[int]())
    if any(own != first for own in by_layer.values()):
        raise _NotEditable(
            "several layers with different heads or neurons are edited together",
            "write a rule for each layer",
        )
    return tuple(sorted(first))


def _member(
    point: SitePoint, direction: DirectionMember | None, changes: _Changes, work: ExperimentContext
) -> BasisMember:
    assert point.layer is not None
    output = NEXT_MAPS[point.site]
    vector = None if direction is None else direction.vector
    name = f"weights of {output} layer {point.layer}"
    if direction is not None:
        name = f"{direction.name} {'for' if changes.replaces else 'on'} {name}"
    return BasisMember(
        name,
        method="",
        options={},
        operand=OutputWeights(output, point.layer, vector, changes.replaces),
        width=work.model.shape.d_model,
        size=count_numbers(point, work.model.shape),
        made="" if direction is None else direction.made,
        reads=point.site,
    )


@rule_kind("scale weights")
class ScaleWeightsRule(WeightRule):
    """`scale weights of SITE by NUMBER`."""

    does = WeightChange("scale weights")

    def changes(
        self,
        rule: spec.Rule,
        sites: SiteTargets,
        positions: PositionTargets,
        work: ExperimentContext,
    ) -> _Changes | None:
        amounts = resolve_amounts(rule.fill, work)
        return None if amounts is None else _Changes(amounts)


class _VectorRule(WeightRule):
    """A rule that writes a direction into the output weights of neurons."""

    replaces = False

    def changes(
        self,
        rule: spec.Rule,
        sites: SiteTargets,
        positions: PositionTargets,
        work: ExperimentContext,
    ) -> _Changes | None:
        points = [point for here in sites.points.values() for point in here]
        if rule.direction is None:
            raise _NotEditable(
                "weights are set to a direction, not to a number",
                "name a `direction`; `scale weights of … by 0` sets them to 0",
            )
        if any(point.site != "mlp_out" for point in points):
            raise _NotEditable(
                "the output weights of a head are several vectors",
                f"`{rule.verb.split()[0]}` the weights of neurons, or `scale` those of heads",
            )
        amounts = Amounts((), {(): 1.0})
        if rule.fill is not None:
            amounts = resolve_amounts(rule.fill, work)
        direction = resolve_direction(rule, sites, positions, work)
        if amounts is None or direction is None:
            return None
        axes, vectors = _scaled(direction, amounts)
        return _Changes(Amounts((), {(): VECTOR_AMOUNT}), axes, vectors, self.replaces)


def _scaled(
    direction: DirectionTargets, amounts: Amounts
) -> tuple[tuple[str, ...], dict[AxisIndices, DirectionMember]]:
    """Multiply directions by the rule's number, along the axes of both."""
    axes = (*direction.axes, *(axis for axis in amounts.axes if axis not in direction.axes))
    direction_members: dict[AxisIndices, DirectionMember] = {}
    for (key, member), (other, amount) in product(
        direction.members.items(), amounts.values.items()
    ):
        place = dict(zip(direction.axes, key, strict=True))
        pairs = zip(amounts.axes, other, strict=True)
        if all(place.setdefault(axis, index) == index for axis, index in pairs):
            vector = WeightedSum(((amount, member.vector),))
            name = f"{amount!r} * {member.name}"
            direction_members[tuple(place[axis] for axis in axes)] = DirectionMember(
                name, vector, member.made
            )
    return axes, direction_members


@rule_kind("set weights")
class SetWeightsRule(_VectorRule):
    """`set weights of NEURONS to NUMBER * DIRECTION`."""

    does = WeightChange("set weights")
    replaces = True


@rule_kind(ADD_TO_WEIGHTS)
class AddToWeightsRule(_VectorRule):
    """`add NUMBER * DIRECTION to weights of NEURONS`."""

    does = WeightChange(ADD_TO_WEIGHTS)


# --- directions taken out of all weights ----------------------------------------------------------


def resolve_weight_sites(rule: spec.Rule, work: ExperimentContext) -> SiteTargets | None:
    """Resolve all vectors that are added to the residual stream, as joined points.

    These are the input of the first block and the outputs of all sublayers. Whether this is
    equivalent to removing the direction from weights is checked in the loaded model (E0344).
    Reports E0341 for a model without a residual stream.
    """
    shape = work.model.shape
    if not shape.has("resid_pre", 0):
        reason = f"`{work.model.name}` has no residual stream"
        work.diagnostics.append(
            BadDirection(
                span=rule.span,
                text=rule.span.written,
                reason=reason,
                hint="edit a copy in Python, and pass the model: `mechdsl.run(…, models=…)`",
            )
        )
        return None
    points = [SitePoint("resid_pre", 0, None)]
    for layer in range(shape.n_layers):
        sites = [site for site in ("mixer_out", "attn_out") if shape.has(site, layer)][:1]
        sites += ["mlp_out"] if shape.has("mlp_out", layer) else []
        points += [SitePoint(site, layer, None) for site in sites]
    return SiteTargets((), {(): tuple(points)}, {(): "weights"})


@rule_kind(PROJECT_OUT_OF_WEIGHTS)
class ProjectOutOfWeightsRule(DirectionRule):
    """`project out DIRECTION from weights`: nothing that is added to the residual stream has a
    component along it, as if embeddings and output projections had none (Arditi et al. 2024, arXiv
    2406.11717, section 4.1)."""

    name = "project out"
    mode = "along"
    drawn_positions = False
    whole_text = True

    @property
    def at_newest(self) -> str:
        return CHANGED_WEIGHTS

    def where(
        self, rule: spec.Rule, work: ExperimentContext
    ) -> tuple[SiteTargets | None, PositionTargets | None]:
        return resolve_weight_sites(rule, work), resolve_rule_positions(
            rule, work.experiment.base, work
        )

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        return super().resolve(at_every_token(rule, work), work)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention(
            "weights",
            "the direction is removed from embeddings (including position embeddings) and "
            "from the outputs of every attention and MLP, at all tokens, as if their "
            "weights couldn't write it",
        )

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return normalize_directions(vectors)
