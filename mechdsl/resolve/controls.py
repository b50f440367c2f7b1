"""Random controls: an experiment's rules on randomly drawn, matched targets or directions.

A draw depends on the seed and on the targets that it replaces, so the same targets have the same
controls in every experiment.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, product
from typing import Any, Literal

from mechdsl.base import limits
from mechdsl.base.hashing import stable_hash
from mechdsl.base.records import Record
from mechdsl.base.text import HintedError, Span, count_noun, name_list
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.experiments import BadControl
from mechdsl.diagnostics.rules import TooManyCells
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.dictionaries.folder import (
    DictionaryFile,
    read_cross_decoder,
    read_dictionary,
    site_of_hook,
)
from mechdsl.models.shape import ModelShape, unit_count, vector_width
from mechdsl.program import spec
from mechdsl.prompts.positions.cells import is_after_prompts
from mechdsl.prompts.rows import row_in_patches
from mechdsl.prompts.runs import Hits, PositionCell, RunRow
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.resolve.bases import CoordinateChange, WeightChange
from mechdsl.resolve.circuits import (
    ask_circuits,
    count_placed,
    draw_circuits,
    list_drawn_edges,
    replace_circuit,
)
from mechdsl.resolve.conflicts import check_other_stacks, check_removed_blocks
from mechdsl.resolve.findings import FindingPicker, PickError, check_rankable_features
from mechdsl.resolve.matched_draws import (
    UNIT_WORDS,
    CellTargets,
    DrawOptions,
    ExchangeGroup,
    RowOptions,
    TargetSwaps,
    TokenOptions,
    combine_draws,
    draw_coordinates,
    draw_distinct,
    draw_features,
    find_site_options,
    merge_targets,
)
from mechdsl.resolve.node_circuits import draw_groups
from mechdsl.resolve.observations import Observation
from mechdsl.resolve.sites import SiteContext, find_side, label_all_points, resolve_site
from mechdsl.resolve.trainings import UNTRAINED_FOLDER
from mechdsl.resolve.types import (
    DRAW_AXIS,
    Axis,
    AxisIndices,
    BasisMember,
    BasisTargets,
    CircuitTargets,
    Coordinates,
    DirectionMember,
    DirectionTargets,
    DrawCounts,
    DrawnBasis,
    DrawnVector,
    Intervention,
    PlacedEdges,
    PointBases,
    PositionTargets,
    PythonBasis,
    RandomVector,
    ResolvedControl,
    ResolvedExperiment,
    ResolvedRule,
    SitePoint,
    SiteTargets,
    TrainedDictionary,
    TrainedRotation,
    TrainedVector,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk
from mechdsl.vocab.metrics import ControlTitle
from mechdsl.vocab.sites import SITES, Stack


class ExcludedSite(Record):
    """One site of `except`, with all points that it names."""

    site: ast.Site
    points: tuple[SitePoint, ...]


def resolve_exclusions(
    control: spec.Control | None, context: SiteContext
) -> tuple[ExcludedSite, ...]:
    """Resolve the sites of `except`, which are never drawn.

    Picks here don't count as picks that the experiment tests. Errors are added to the diagnostics
    of the context. Codes: E0203, E0301 to E0313, E0402, E0620.
    """
    if control is None:
        return ()
    whole = context.onward
    apart = FindingPicker(whole.found, whole.called, whole.groups, whole.picks)
    # `except` is outside every `for`, so loop variables are undefined here.
    here = replace(context, loops={}, onward=apart)
    sites: list[ExcludedSite] = []
    for site in control.apart:
        targets, _ = resolve_site(site, here)
        if targets is not None:
            points = dict.fromkeys(
                point for site_points in targets.points.values() for point in site_points
            )
            sites.append(ExcludedSite(site, tuple(points)))
    return () if has_errors(context.diagnostics) else tuple(sites)


def group_excluded_units(
    parts: Sequence[ExcludedSite], shape: ModelShape
) -> dict[ExchangeGroup, tuple[int, ...]]:
    """Return the excluded heads, neurons and experts of each group from which units are drawn.

    Excluding a head also excludes its query, key and value. Excluding a key-value head excludes all
    heads that share it.
    """
    units: dict[ExchangeGroup, set[int]] = {}
    for point in (point for part in parts for point in part.points):
        kind = SITES[point.site].unit
        if kind is None or point.unit is None:
            continue
        size = unit_count(shape, point.site, point.layer)
        sizes = {size}
        if UNIT_WORDS[kind] == "heads":
            assert point.layer is not None
            block = shape.in_stack(point.site)[0].blocks[point.layer]
            sizes = {size, block.heads, block.kv_heads}
        for other in sizes:
            slot = ExchangeGroup(UNIT_WORDS[kind], other, point.layer, SITES[point.site].stack)
            same = range(point.unit * other // size, -(-(point.unit + 1) * other // size))
            units.setdefault(slot, set()).update(same)
    return {slot: tuple(sorted(here)) for slot, here in units.items()}


def find_excluded_layers(parts: Sequence[ExcludedSite]) -> frozenset[tuple[Stack, int]]:
    """Return the layers of each stack that are excluded without a unit, at any site."""
    return frozenset(
        (SITES[point.site].stack, point.layer)
        for part in parts
        for point in part.points
        if point.layer is not None and point.unit is None
    )


def find_excluded_kinds(part: ExcludedSite) -> set[spec.ControlTarget]:
    """Return the kinds of targets that an excluded site contains."""
    kinds = {(SITES[p.site].unit if p.unit is not None else None) for p in part.points}
    return {"layers" if kind is None else UNIT_WORDS[kind] for kind in kinds}


class AlternativeSites:
    """The sites of a model from which targets are drawn, without the excluded ones."""

    def __init__(self, shape: ModelShape, apart: Sequence[ExcludedSite]) -> None:
        self.shape = shape
        self.without_units = group_excluded_units(apart, shape)
        self.without_layers = find_excluded_layers(apart)

    def own(
        self, kind: spec.ControlTarget | None, points: Sequence[SitePoint]
    ) -> dict[ExchangeGroup, tuple[int, ...]]:
        """Return the units or layers of these points that a draw can replace."""
        units: dict[ExchangeGroup, set[int]] = {}
        for point in points:
            slot = self.slot(point, kind)
            if slot is not None:
                target = point.layer if kind == "layers" else point.unit
                assert target is not None
                units.setdefault(slot, set()).add(target)
        return {slot: tuple(sorted(targets)) for slot, targets in units.items()}

    def slot(self, point: SitePoint, kind: spec.ControlTarget | None) -> ExchangeGroup | None:
        stack = SITES[point.site].stack
        if kind == "layers":
            return ExchangeGroup("layers", self._layer_count(point), None, stack)
        unit = SITES[point.site].unit
        if kind is None or point.unit is None or unit is None or UNIT_WORDS[unit] != kind:
            return None
        size = unit_count(self.shape, point.site, point.layer)
        return ExchangeGroup(kind, size, point.layer, stack)

    def _layer_count(self, point: SitePoint) -> int:
        """Return the number of layers of the stack of a point."""
        return self.shape.in_stack(point.site)[0].n_layers

    def fitting(
        self, written: Mapping[int, Sequence[SitePoint]], kinds: Sequence[spec.ControlTarget | None]
    ) -> tuple[int, ...]:
        """Return the layers that have every written site of a cell and aren't excluded."""
        points = {point for site_points in written.values() for point in site_points}
        moved = {
            p for n, site_points in written.items() if kinds[n] == "layers" for p in site_points
        }

        def fits(layer: int) -> bool:
            return all(
                layer < self._layer_count(p)
                and self.shape.has(p.site, layer)
                and unit_count(self.shape, p.site, layer) == unit_count(self.shape, p.site, p.layer)
                for p in points
                if p.layer is not None
            )

        def apart(layer: int) -> bool:
            return any(self._is_apart(p, layer) for p in moved)

        layers = range(max(self.shape.n_layers, *map(self._layer_count, points), 0))
        return tuple(layer for layer in layers if fits(layer) and not apart(layer))

    def _is_apart(self, point: SitePoint, layer: int) -> bool:
        """Return whether a point is excluded in this layer."""
        unit = SITES[point.site].unit
        if point.unit is None or unit is None:
            return (SITES[point.site].stack, layer) in self.without_layers
        size, stack = unit_count(self.shape, point.site, layer), SITES[point.site].stack
        slot = ExchangeGroup(UNIT_WORDS[unit], size, layer, stack)
        return point.unit in self.without_units.get(slot, ())

    def moved(
        self,
        points: Sequence[SitePoint],
        written: Sequence[SitePoint],
        kind: spec.ControlTarget | None,
        picked: TargetSwaps | None,
    ) -> tuple[SitePoint, ...]:
        """Replace points by what was drawn for the written points.

        Args:
            points: The points to replace, which may be the written points.
            written: The written points.
            kind: The kind of targets that are drawn.
            picked: The drawn targets; None leaves the points unchanged.
        """
        if picked is None:
            return tuple(points)
        site_points: list[SitePoint] = []
        for point, target in zip(points, written, strict=True):
            slot = self.slot(target, kind)
            if slot is None:
                site_points.append(point)
            elif kind == "layers":
                # With `into layer`, the point that is read isn't replaced.
                same = point == target and target.layer is not None
                site_points.append(
                    replace(point, layer=picked[slot, target.layer or 0]) if same else point
                )
            else:
                assert target.unit is not None
                site_points.append(replace(point, unit=picked[slot, target.unit]))
        return tuple(site_points)


_DRAWN = {
    "add": ("directions", "of the same norm, drawn uniformly over all directions"),
    "scale": ("scales", "with the same numbers in a random order of the channels"),
    "edit": (
        "edits",
        "of the same rank that add vectors of the same norms to the same activations, in a random "
        "subspace",
    ),
}
"""What is drawn for a rule, and what it shares with the rule's own, by the mode of the rule."""


def build_direction_control(
    experiment: ResolvedExperiment,
    asked: spec.Control,
    draws: int,
    only: Container[int] | None = None,
) -> ResolvedControl:
    """Create a control with random directions, at the same sites and tokens.

    The random directions are distributed uniformly over all directions and have the norm of the
    original one. A rule that scales by a direction has its numbers in a random order instead. An
    edit adds vectors in a random subspace instead. Rules and cells that share a direction also
    share it in each draw. A rule that adds activations adds, in each draw, one random direction to
    all rows, with the norms of their activations.

    Args:
        only: Numbers of the rules whose directions are replaced; None for all.
    """
    rules: list[ResolvedRule] = []
    for number, rule in enumerate(experiment.rules):
        if only is not None and number not in only:
            rules.append(rule)
        elif rule.direction is not None:
            rules.append(_with_random_directions(rule, rule.direction, draws, experiment))
        else:
            rules.append(_redirect(rule, draws, experiment))
    pairs = zip(experiment.rules, rules, strict=True)
    steered = [resolved for resolved, drawn in pairs if resolved is not drawn]
    drawn = dict.fromkeys(_DRAWN.get(rule.does.mode, _DRAWN["add"]) for rule in steered)
    drawn = drawn or {_DRAWN["add"]: None}
    (noun, like), *others = sorted(drawn, key=lambda names: names != _DRAWN["add"])
    what = f"random {noun}"
    like += "".join(f"; {noun} {text}" for noun, text in others)
    like += ", at the same sites and tokens"
    return _drawn_control(experiment, asked, rules, draws, (what, like))


def build_subspace_control(
    experiment: ResolvedExperiment,
    asked: spec.Control,
    draws: int,
    only: Container[int] | None = None,
) -> ResolvedControl:
    """Create a control with random subspaces, at the same sites and tokens.

    Each named set of coordinates is replaced by a subspace of as many dimensions, distributed
    uniformly. Cells that share a subspace also share it in each draw.

    Args:
        only: Numbers of the rules whose coordinates are replaced; None for all.

    Raises:
        _NoDraws: A rule changes something else in another basis.
    """
    rules = [
        rule
        if rule.basis is None or (only is not None and number not in only)
        else _with_random_subspaces(rule, rule.basis, draws, experiment)
        for number, rule in enumerate(experiment.rules)
    ]
    like = "of as many dimensions, drawn uniformly, at the same sites and tokens"
    return _drawn_control(experiment, asked, rules, draws, ("random subspaces", like))


def build_feature_control(
    experiment: ResolvedExperiment, asked: spec.Control, draws: int, onward: FindingPicker
) -> ResolvedControl:
    """Create a control with other features of the same dictionary, at the same sites and tokens.

    Each feature is replaced by one that is active in half to twice as many rows.

    Raises:
        _NoDraws: There are no frequencies, or several rules name features.
        _NoAlternatives: No cell has alternatives.
    """
    in_bases = [rule for rule in experiment.rules if rule.basis is not None]
    if len(in_bases) != 1:
        raise _NoDraws(
            "features are drawn for one rule, and this experiment has "
            f"{count_noun(len(in_bases), 'rule')} in a basis",
            "write an experiment for each rule",
        )
    (rule,) = in_bases
    basis = rule.basis
    assert basis is not None
    frequencies = _find_frequencies(asked, basis.definition, experiment, onward)
    drawn: dict[AxisIndices, list[tuple[int, ...]]] = {}
    for key, named in basis.coordinates.items():
        label = stable_hash(experiment.seed, "features", basis.definition, *named.which)
        drawn[key] = draw_features(named.which, frequencies, draws, label) if named.which else []
    most = max(map(len, drawn.values()), default=0)
    if not most:
        reason = "no other feature is active in half to twice as many rows"
        raise _NoAlternatives(reason, f"write `against random({draws}, positions)`")
    coordinates = {
        (draw, *key): replace(basis.coordinates[key], which=which)
        for key, every in drawn.items()
        for draw in range(most)
        for which in [every[draw] if draw < len(every) else basis.coordinates[key].which]
    }
    rules = [
        replace(each, basis=replace(basis, axes=(DRAW_AXIS, *basis.axes), coordinates=coordinates))
        if each is rule
        else each
        for each in experiment.rules
    ]
    assert asked.frequency is not None
    like = f"of `{basis.definition}`, each active in half to twice as many rows of "
    like += f"`{asked.frequency.span.written}`, at the same sites and tokens"
    counts = {key: len(every) for key, every in drawn.items()}
    without = sum(not count for count in counts.values())
    like += f"; {without:,} of {len(counts):,} sets have no alternatives" if without else ""
    control = _drawn_control(experiment, asked, rules, most, ("random features", like))
    shadow = replace(control.experiment, drawn=DrawCounts(basis.axes, counts))
    return replace(control, experiment=shadow)


def _find_frequencies(
    asked: spec.Control, basis: str, experiment: ResolvedExperiment, onward: FindingPicker
) -> Mapping[int, float]:
    """Return the share of rows in which each feature is active, in the experiment's model.

    Raises:
        _NoDraws: There are no such shares.
    """
    assert asked.frequency is not None
    name = asked.frequency.of
    try:
        finding, _ = onward.finding(asked.frequency, {})
        if finding is None or finding.stands_in:
            raise _NoDraws(f"`{name}` has not run", f"run `{name}` too")
        for part in finding.parts:
            check_rankable_features(part.experiment, basis)
            observed = [rule.spec.observed for rule in part.experiment.rules]
            if not any(
                quantity and quantity.basis and quantity.ranked_by == "mean"
                for quantity in observed
            ):
                raise PickError(
                    f"`{name}` doesn't have the activations of features",
                    f"name an observation: `observe features of {basis} …`",
                )
    except PickError as refusal:
        raise _NoDraws(refusal.reason, refusal.hint, asked.frequency.span) from None
    part, *others = finding.parts  # on the experiment's model and prompts, if there are any
    model = experiment.model.name
    if part.experiment.model.name != model:
        reason = f"`{name}` doesn't observe features of `{model}`"
        raise _NoDraws(reason, f"let `{name}` run on `{model}`, too", asked.frequency.span)
    if others:
        reason = f"`{name}` observes features on several prompts, none of them those of this rule"
        raise _NoDraws(reason, "name an experiment with one `prompts`", asked.frequency.span)
    return part.frequencies()


def _drawn_control(
    experiment: ResolvedExperiment,
    asked: spec.Control,
    rules: Sequence[ResolvedRule],
    draws: int,
    said: tuple[str, str],
    title: ControlTitle = "null",
) -> ResolvedControl:
    """Create a control whose rules have a further axis of draws, the same for all cells.

    Args:
        said: What is drawn, and what the draws share with it.
    """
    own = experiment.spec
    shadow = replace(
        experiment,
        spec=own.model_copy(
            update={
                "name": f"{own.name} {'untrained' if title == 'untrained' else 'against random'}",
                "against": None,
                "reports": (spec.Report(span=asked.span, kind="null band"),),
                "expects": (),
            }
        ),
        axes=(Axis(DRAW_AXIS, tuple(range(draws)), asked.span), *experiment.axes),
        rules=tuple(rules),
        accuracies={},
        control_of=experiment.key,
        drawn=DrawCounts((), {(): draws}),
    )
    what, like = said
    parts = [
        f"{what}, {count_noun(draws, 'draw')}, seed {experiment.seed}",
        like,
        *(
            f"`{rule.spec.span.written}` unchanged"
            for rule, drawn in zip(experiment.rules, rules, strict=True)
            if rule is drawn and rule.does.changes != "nothing"
        ),
    ]
    return ResolvedControl(shadow, draws, asked.draws, what, "; ".join(parts), title)


def _with_random_directions(
    rule: ResolvedRule,
    direction_targets: DirectionTargets,
    draws: int,
    experiment: ResolvedExperiment,
) -> ResolvedRule:
    shuffles = rule.does.mode == "scale"
    kind, same = ("shuffled", "numbers") if shuffles else ("random", "norm")
    members = {
        (draw, *key): DirectionMember(
            f"{kind} {draw} like {member.name}",
            RandomVector(member.vector, f"{member.name} {draw}", experiment.seed, shuffles),
            f"random, with the {same} of {member.name}",
        )
        for draw, (key, member) in product(range(draws), direction_targets.members.items())
    }
    return replace(
        rule,
        direction=DirectionTargets(
            (DRAW_AXIS, *direction_targets.axes), members, direction_targets.families
        ),
    )


def _redirect(rule: ResolvedRule, draws: int, experiment: ResolvedExperiment) -> ResolvedRule:
    """Let a rule that adds activations add random directions of the same norms; leave others."""
    does, sites = rule.does.redirected, rule.sites
    if does is None or sites is None:
        return rule
    members: dict[AxisIndices, DirectionMember] = {}
    for draw, (key, points) in product(range(draws), sites.points.items()):
        width = vector_width(experiment.model.shape, points[0].site, points[0].layer)
        name = f"random {draw} of {width} numbers"
        vector = DrawnVector(width, name, experiment.seed)
        members[draw, *key] = DirectionMember(name, vector, "random, with the norm of each row's")
    direction = DirectionTargets((DRAW_AXIS, *sites.axes), members)
    return replace(rule, does=does, direction=direction)


def _with_random_subspaces(
    rule: ResolvedRule, own: BasisTargets, draws: int, experiment: ResolvedExperiment
) -> ResolvedRule:
    _check_drawn_subspaces(rule, own, experiment)
    sets = list(dict.fromkeys(own.coordinates.values()))
    bases: list[PointBases] = []
    for draw, named in product(range(draws), sets):
        which = " ".join(map(str, named.which))
        points: dict[tuple[int | None, int | None] | None, BasisMember] = {}
        for key, member in own.bases[named.basis].items():
            size = len(named.which) or member.size
            name = f"random {draw} like {member.name} {which}"
            operand = DrawnBasis(f"{named.basis} {key} {which} {draw}", experiment.seed)
            made = f"random, with {count_noun(size, 'dimension')}"
            options = {"dims": size}
            points[key] = BasisMember(name, "random", options, operand, member.width, size, made)
        bases.append(points)
    numbers = {named: number for number, named in enumerate(sets)}
    coordinates = {
        (draw, *key): Coordinates(basis=draw * len(sets) + numbers[named])
        for draw, (key, named) in product(range(draws), own.coordinates.items())
    }
    names = tuple(own.names[named.basis] for _, named in product(range(draws), sets))
    axes = (DRAW_AXIS, *own.axes)
    return replace(rule, basis=BasisTargets(own.definition, names, tuple(bases), axes, coordinates))


_ORTHONORMAL = ("random", "svd", "jacobian", "neurons")
"""Methods whose directions are orthonormal and not centred."""


def _check_drawn_subspaces(
    rule: ResolvedRule, own: BasisTargets, experiment: ResolvedExperiment
) -> None:
    """Check that a random subspace is comparable. Raises _NoDraws."""
    does, members = rule.does, own.members
    asked = experiment.spec.against
    draws = 39 if asked is None else asked.draws
    hint = f"write `against random({draws}, positions)`"
    if any(isinstance(member.operand, DictionaryFile | PythonBasis) for member in members):
        reason = "features of dictionaries are drawn by their frequencies: most are inactive"
        hint = f"write `against random({draws}, features, frequency: seen)`, where `seen` is "
        hint += f"`observe features of {own.definition} …`"
        raise _NoDraws(reason, hint, rule.spec.span)
    plain = isinstance(does, CoordinateChange) and not does.leaves_no_error
    plain &= rule.spec.exchanged is None
    copies = does.reads in ("run", "donor", "mean")
    if not plain or not (copies or all(member.method in _ORTHONORMAL for member in members)):
        raise _NoDraws(
            f"`{rule.spec.verb}` in `{own.definition}` depends on its directions' lengths and "
            "centre, which a random subspace doesn't share",
            f"{hint}, or patch the coordinates",
            rule.spec.span,
        )
    whole = [member for member in members if member.size == member.width]
    if whole and any(not named.which for named in own.coordinates.values()):
        reason = f"`{own.definition}` spans all {whole[0].width} numbers of a vector"
        raise _NoAlternatives(reason, hint, rule.spec.span)


DRAWN_KINDS: tuple[spec.ControlTarget, ...] = (
    "directions",
    "subspaces",
    "heads",
    "neurons",
    "experts",
    "layers",
    "positions",
)


def resolve_control(
    experiment: ResolvedExperiment,
    apart: Sequence[ExcludedSite],
    program: spec.Program,
    most_cells: int,
    onward: FindingPicker,
    draws_enough: int | None = None,
) -> tuple[ResolvedControl | None, list[Diagnostic]]:
    """Create the random control of an experiment.

    Args:
        apart: Sites that are never drawn.
        program: The file, with what its trainings chose for this experiment.
        most_cells: Maximum number of cells.
        onward: Results of other experiments.
        draws_enough: Number of draws to make if the only question is whether there are any.

    Returns:
        The control, None if the experiment has none or after an error; and the diagnostics.

    Codes: E0323, E0630.
    """
    asked = experiment.spec.against
    if asked is None:
        return None, []
    if experiment.n_cells * asked.draws > most_cells:
        return None, [
            TooManyCells(
                span=asked.span,
                of=f"experiment `{experiment.name}`",
                cells=experiment.n_cells * asked.draws,
                most=most_cells,
                axes=(
                    f"{count_noun(experiment.n_cells, 'cell')} × {count_noun(asked.draws, 'draw')}"
                ),
            )
        ]
    try:
        draws = asked.draws if draws_enough is None else min(asked.draws, draws_enough)
        masks = find_trained_rules(experiment.rules, program)
        masks = [mask for mask in masks if mask.kind in ("coordinates", "positions")]
        return _build_control(experiment, asked, apart, masks, draws, onward), []
    except _NoDraws as nothing:
        reason, hint, span = nothing.reason, nothing.hint, nothing.span or asked.span
        others = isinstance(nothing, _NoAlternatives)
    if experiment.stand_ins or (others and experiment.model.shape.stands_in):
        return None, []  # the final picks or the real model may have alternatives
    text = asked.span.written
    return None, [BadControl(span=span, text=text, reason=reason, hint=hint)]


def accepts_control(experiment: ResolvedExperiment) -> bool:
    """Whether `against random(…)` is valid in an experiment without it."""
    asked = spec.Control(span=experiment.spec.span, draws=1)
    resolved = replace(experiment, spec=experiment.spec.model_copy(update={"against": asked}))
    if any(check_other_stacks(resolved)):
        return False
    try:
        _build_control(resolved, asked, (), (), asked.draws, FindingPicker())
    except _NoDraws:
        return False
    return True


def _build_control(
    experiment: ResolvedExperiment,
    asked: spec.Control,
    apart: Sequence[ExcludedSite],
    masks: Sequence[_TrainedRule],
    draws: int,
    onward: FindingPicker,
) -> ResolvedControl:
    """Create the control with the asked kind of targets. Raises _NoDraws.

    Args:
        masks: Rules with features or dimensions that trainings choose.
    """
    if any(isinstance(rule.does, WeightChange) for rule in experiment.rules):
        raise _NoDraws(
            "random weights aren't supported",
            "`scale mlp_hidden layer 1 neuron 5 at tokens * by 0` has the same effect as "
            "`scale weights of layer 1 neuron 5 by 0`, and random neurons are drawn for it",
        )
    if experiment.has_circuit:
        return _build_circuit_control(experiment, asked, apart, draws)
    if experiment.everything:
        return _build_group_control(experiment, asked, apart, masks, draws)
    masks = [mask for mask in masks if mask.kind == "coordinates"]
    with_directions = any(rule.direction is not None for rule in experiment.rules)
    with_bases = any(rule.basis is not None for rule in experiment.rules)
    adds = any(rule.does.redirected is not None for rule in experiment.rules)
    with_directions |= adds and asked.what == "directions"
    if asked.what in (None, "directions") and with_directions:
        _check_no_exceptions(apart, "directions")
        return build_direction_control(experiment, asked, draws)
    if asked.what is None and masks:
        _check_no_exceptions(apart, "features and dimensions")
        return _build_coordinate_control(experiment, asked, draws, masks)
    if asked.what == "features" and with_bases:
        _check_no_exceptions(apart, "features")
        return build_feature_control(experiment, asked, draws, onward)
    if asked.what in (None, "subspaces") and with_bases:
        _check_no_exceptions(apart, "subspaces")
        return build_subspace_control(experiment, asked, draws)
    if asked.what != "positions" and with_bases:
        raise _NoDraws(
            "sites of rules in a basis aren't drawn",
            f"write `against random({asked.draws}, subspaces)`, or `positions`",
        )
    control = _Draws(experiment, asked, apart, draws).control()
    _check_draws_outside_removed(control.experiment.rules, experiment.model.name)
    return control


def _build_circuit_control(
    experiment: ResolvedExperiment,
    asked: spec.Control,
    apart: Sequence[ExcludedSite],
    draws: int,
) -> ResolvedControl:
    """Create a control with random circuits of the same number of edges, at the same tokens.

    Raises:
        _NoDraws: There are too few such circuits, or something else is drawn.
    """
    if asked.what not in (None, "edges"):
        hint = f"write `against random({asked.draws})`"
        raise _NoDraws("edges are drawn, and an experiment has one type of random target", hint)
    _check_no_exceptions(apart, "edges")
    if experiment.model.shape.stands_in:
        raise _NoAlternatives("the edges of a missing model are unknown", "install the model")
    rules: list[ResolvedRule] = []
    like, numbers = "", DrawCounts((), {(): draws})
    for rule in experiment.rules:
        circuit, sites = rule.circuit, rule.sites
        if circuit is None or sites is None:
            rules.append(rule)
            continue
        if rule.spec.without_edge:
            reason = "random circuits without each of their edges aren't drawn"
            raise _NoDraws(reason, "remove `without each edge`")
        if circuit.edge_places and circuit.encoder is not None:
            reason = "random circuits with positions aren't drawn in an encoder-decoder, where an "
            reason += "edge of one text has no tokens of the other"
            raise _NoDraws(reason, "remove this line, or the positions of edges")
        drawn, counts, like = _draw_circuits(experiment, rule, circuit, draws)
        label = f"random circuit like {next(iter(sites.labels.values()))}"
        rules.append(replace_circuit(rule, (DRAW_AXIS, *sites.axes), drawn, label))
        numbers = DrawCounts(sites.axes, counts)
    control = _drawn_control(experiment, asked, rules, draws, ("random circuits", like))
    return replace(control, experiment=replace(control.experiment, drawn=numbers))


def _build_group_control(
    experiment: ResolvedExperiment,
    asked: spec.Control,
    apart: Sequence[ExcludedSite],
    masks: Sequence[_TrainedRule],
    draws: int,
) -> ResolvedControl:
    """Create a control with random groups of the same size, at the same tokens; or at random tokens
    if the rules have groups of tokens only.

    Raises:
        _NoDraws: There is no other group, or sites are excluded.
    """
    if apart:
        reason = "groups are drawn from all sites that the rules ablate without `except`"
        raise _NoDraws(reason, "remove `except` after `against`", apart[0].site.span)
    choices = {mask.number: mask.choices for mask in masks if mask.kind == "coordinates"}
    groups = draw_groups(experiment, draws, choices)
    if asked.what is not None and (groups is not None or asked.what != "positions"):
        drawn = "positions" if groups is None else "groups"
        reason = f"{drawn} are drawn, and an experiment has one type of random target"
        raise _NoDraws(reason, f"write `against random({asked.draws})`")
    if groups is None and any(mask.waits for mask in masks):
        like = "of the size of the trained group"
        rules = [_repeat(rule, draws) for rule in experiment.rules]
        return _drawn_control(experiment, asked, rules, draws, ("random groups", like))
    if groups is None:
        asked = asked.model_copy(update={"what": "positions"})
        return _Draws(experiment, asked, (), draws).control()
    if not groups.draws:
        reason = f"there is no other group of the same size: {groups.sizes}"
        raise _NoAlternatives(reason, "remove this line, or test a group of a different size")
    few = _describe_few("groups", groups.different, groups.counts.counts.values(), draws)
    chosen = " and the training could choose" if groups.of_choices else ""
    like = f"of {groups.sizes}, drawn from those that ∅ ablates{chosen}, at the same tokens{few}"
    like += (
        "; where there is no other group, each draw is the group itself"
        if groups.some_alone
        else ""
    )
    control = _drawn_control(experiment, asked, groups.rules, groups.draws, ("random groups", like))
    return replace(control, experiment=replace(control.experiment, drawn=groups.counts))


def _repeat(rule: ResolvedRule, draws: int) -> ResolvedRule:
    """Return a rule with its own targets in each draw."""
    if rule.sites is None or rule.does.changes == "nothing":
        return rule
    sites = rule.sites
    keys = [(draw, *key) for draw, key in product(range(draws), sites.points)]
    points = {key: sites.points[key[1:]] for key in keys}
    labels = {key: sites.labels[key[1:]] for key in keys}
    return replace(rule, sites=SiteTargets((DRAW_AXIS, *sites.axes), points, labels))


def _draw_circuits(
    experiment: ResolvedExperiment, rule: ResolvedRule, circuit: CircuitTargets, draws: int
) -> tuple[dict[AxisIndices, PlacedEdges], dict[AxisIndices, int], str]:
    """Draw random circuits for each size of a circuit, with the same number of edges at each
    position.

    Returns:
        The circuits by draw and key, where a draw that doesn't exist repeats the circuit; the
        number of draws by key; and a description.

    Raises:
        _NoAlternatives: There are too few circuits of one size, or none of any size.
    """
    drawn: dict[AxisIndices, list[PlacedEdges]] = {}
    every_path, only, others, axes = True, set[int](), 0, rule.sites.axes if rule.sites else ()
    through = " through tokens at its positions" if circuit.edge_places else ""
    ends = "`embed vision` to `embed`" if circuit.stack == "vision" else "`embed` to `logits`"
    for key, own in circuit.named.items():
        asked = ask_circuits(experiment, rule, own, draws)
        found = draw_circuits(asked)
        every_path &= found.is_connected
        if asked.order is not None and not asked.places:
            through = " through keys or values that later tokens read"
        if found.is_only:
            only.add(count_placed(own))
        else:
            others = max(others, len(found.circuits))
        alone = found.is_only and experiment.combined_axis in axes
        circuits = found.circuits[:1] if alone else found.circuits
        drawn[key] = [list_drawn_edges(asked, each) for each in circuits]
    different = {key: len(own) for key, own in drawn.items()}
    over = experiment.combined_axis
    picks = combine_draws(different, axes, over, draws, experiment.seed)
    counts = {key: len(numbers) for key, numbers in picks.items()}
    noun = "edge at positions" if circuit.edge_places else "edge"
    sizes = sorted({count_placed(own) for own in circuit.named.values()})
    size = _list_sizes(sizes, noun)
    if not circuit.waits and others == 0:
        path = f" on a path from {ends}" if sizes == [1] else ""
        hint = "remove this line, or ablate a circuit of a different size"
        raise _NoAlternatives(f"there is no other circuit with {size}{path}", hint)
    if not circuit.waits and len(counts) == 1 and others < draws:
        reason = f"there are only {others} other circuits with {size}"
        reason = f"there is only one other circuit with {size}" if others == 1 else reason
        raise _NoAlternatives(reason, f"write `against random({others})`")
    path = f", each on a path from {ends}{through}" if every_path else ""
    size += ", the same number at each position" if circuit.edge_places else ""
    few = _describe_few("circuits", different.values(), counts.values(), draws)
    if only:
        few += (
            f"; each draw with {_list_sizes(sorted(only), noun, ' or ')} is the only such circuit"
        )
    circuits = {
        (n, *key): drawn[key][picks[key][n]] if n < counts[key] else own
        for key, own in circuit.named.items()
        for n in range(draws)
    }
    return circuits, counts, f"of {size}{path}, at the same tokens{few}"


def _describe_few(noun: str, different: Iterable[int], counts: Iterable[int], draws: int) -> str:
    """Describe cells with fewer different draws than the control was asked for.

    Args:
        noun: `groups` or `circuits`.
        different: Number of different draws in each cell.
        counts: Number of draws in each cell; larger if curves repeat them.
    """
    fewer = [number < draws for number in different]
    if not any(fewer):
        return ""
    repeated = any(number < count for number, count in zip(different, counts, strict=True))
    if repeated:
        return f"; a random curve has one of each size, and sizes with fewer {noun} repeat theirs"
    return f"; fewer draws where there are fewer {noun}"


def _list_sizes(sizes: Sequence[int], noun: str, between: str = " to ") -> str:
    """Return a range of sizes as `3 to 5 edges`, or a list of them as `0 or 110 edges`.

    Args:
        noun: `edge` or `edge at positions`.
    """
    named = (sizes[0], sizes[-1]) if between == " to " else sizes
    words = between.join(f"{each:,}" for each in dict.fromkeys(named))
    return f"{words} {noun if sizes[-1] == 1 else noun.replace('edge', 'edges')}"


def _check_no_exceptions(apart: Sequence[ExcludedSite], drawn: str) -> None:
    """Check that no sites are excluded where none are drawn. Raises _NoDraws."""
    if apart:
        reason = f"{drawn} are drawn, and sites don't change"
        raise _NoDraws(reason, "remove `except`", apart[0].site.span)


# --- controls of what is trained ------------------------------------------------------------------

TRAINING_DRAWS = 8
"""Largest number of random draws that an experiment with something trained has without
`against`."""

TRAINING_CELLS = 128
"""Number of cells, over all draws, that such a control may have; or one draw of every cell."""


class _TrainedRule(Record):
    """A rule that uses something that the file trains."""

    number: int
    kind: Literal[
        "directions",
        "subspaces",
        "features",
        "coordinates",
        "sites",
        "positions",
        "edges",
        "observation",
    ]
    names: tuple[str, ...]
    """What it uses: definitions of the file."""
    choices: tuple[int, ...] = ()
    """Coordinates that a mask could choose."""
    waits: bool = False
    """Whether it is a group that isn't trained yet."""


def find_trained_rules(rules: Sequence[ResolvedRule], program: spec.Program) -> list[_TrainedRule]:
    """Return the rules that use something that the file trains, or chooses by a training."""
    trained_rules: list[_TrainedRule] = []
    for number, rule in enumerate(rules):
        if rule.does.trained is not None:
            names = (rule.does.trained.training.definition,)
            trained_rules.append(_TrainedRule(number, "observation", names))
            continue
        vectors = () if rule.direction is None else rule.direction.saved
        names = {v.training.definition: None for v in vectors if isinstance(v, TrainedVector)}
        if names:
            trained_rules.append(_TrainedRule(number, "directions", tuple(names)))
            continue
        mask = _find_mask(number, rule, program)
        own = None if rule.basis is None else _find_trained_basis(number, rule.basis)
        if own is not None and rule.circuit is not None:
            own = replace(own, kind="edges")
        if mask is not None and own is not None:
            mask = replace(mask, names=(*mask.names, *own.names))
        own = mask or own
        trained_rules += [] if own is None else [own]
    return trained_rules


def _find_trained_basis(number: int, basis: BasisTargets) -> _TrainedRule | None:
    names: dict[str, None] = {}
    is_dictionary = False
    for saved in basis.saved:
        if isinstance(saved, TrainedDictionary | TrainedRotation | TrainedVector):
            assert saved.training is not None
            names[saved.training.definition] = None
            is_dictionary |= isinstance(saved, TrainedDictionary)
    kind = "features" if is_dictionary else "subspaces"
    return _TrainedRule(number, kind, tuple(names)) if names else None


def _find_mask(number: int, rule: ResolvedRule, program: spec.Program) -> _TrainedRule | None:
    """Return what a rule uses of the groups that a training chooses."""
    parts = [each for each in (rule.spec.site, rule.spec.at, rule.spec.onto) if each is not None]
    nodes = [node for part in parts for node in walk(part)]
    named = {node.id for node in nodes if isinstance(node, ast.Name)}
    named |= {node.of for node in nodes if isinstance(node, ast.RankedSelection)}
    positions = {node.name for node in nodes if isinstance(node, ast.ChosenTokens)}
    of_coordinates = named | {name for name, _ in rule.spec.read_groups}
    for name, mask in program.masks.items():
        if mask.chooses_positions and name in positions:
            return _TrainedRule(number, "positions", (name,))
        if rule.basis is not None and mask.site.coordinates is not None and name in of_coordinates:
            group = program.groups[name]
            return _TrainedRule(number, "coordinates", (name,), group.choices, group.waits)
        if name in named:
            return _TrainedRule(number, "edges" if mask.chooses_edges else "sites", (name,))
    return None


def resolve_training_control(
    experiment: ResolvedExperiment,
    program: spec.Program,
    draws_enough: int | None = None,
) -> tuple[ResolvedControl | None, str, Diagnostic | None]:
    """Create the control that an experiment without `against` has if it uses something trained.

    Returns:
        The control; None if there is none. Why there is none although it uses something trained.
        And E0207 for `against none` in an experiment that uses nothing trained.

    Args:
        program: The file, with what its trainings chose for this experiment.
        draws_enough: Number of draws to make if the only question is whether there are any.
    """
    own, runs = experiment.spec, experiment.derived.values()
    used = find_trained_rules(experiment.rules, program)
    if own.trains or not experiment.measures or own.estimator is not None:
        return None, "", None
    inside = [own for run in runs for own in find_trained_rules(run.rules, program)]
    if own.without_control is not None:
        problem = None if used or inside else _report_nothing_trained(own.without_control)
        return None, "the file says `against none`", problem
    try:
        return *_build_training_control(experiment, used, inside, draws_enough), None
    except _NoDraws as nothing:
        if experiment.stand_ins or experiment.model.shape.stands_in:
            return None, "", None
        return None, f"{nothing.reason} ({nothing.hint})", None


def _report_nothing_trained(line: spec.NoControl) -> Diagnostic:
    reason = "leaves out a control that this experiment doesn't have: it uses nothing trained"
    hint = "remove this line"
    return BadArgument(span=line.span, name="against none", reason=reason, hint=hint)


def _build_training_control(
    experiment: ResolvedExperiment,
    used: Sequence[_TrainedRule],
    inside: Sequence[_TrainedRule],
    draws_enough: int | None,
) -> tuple[ResolvedControl | None, str]:
    """Create the control; or say why there is none. Raises _NoDraws.

    Args:
        inside: Rules of runs that the experiment defines.
    """
    own = experiment.spec
    if not used:
        reason = f"{_list_trained(inside)} in a run with rules, whose targets aren't drawn"
        return None, reason if inside else ""
    if any(_has_own_control(experiment.rules[own.number].does) for own in used):
        return None, ""
    if any(m.in_reply is not None for m in experiment.measures) and any(
        measure.effect != "raw" for measure in own.measures
    ):
        return None, "random targets generate separate replies"
    count = max(1, min(TRAINING_DRAWS, TRAINING_CELLS // max(1, experiment.n_there)))
    if experiment.n_cells * count > limits.CELLS:
        return None, f"there are {experiment.n_cells:,} cells"
    draws = count if draws_enough is None else min(count, draws_enough)
    control = _draw_trained(experiment, used, count, draws)
    said = f"{control.said}; added for {_list_trained(used)}, unless the file says `against none`"
    return replace(control, said=said), ""


def _list_trained(used: Sequence[_TrainedRule]) -> str:
    return f"trained {name_list(list(dict.fromkeys(n for own in used for n in own.names)))}"


def _has_own_control(does: Intervention) -> bool:
    """Whether an observation has a control of shuffled values or random targets in its table."""
    return isinstance(does, Observation) and not {"shuffled", "random"}.isdisjoint(does.controls)


def _draw_trained(
    experiment: ResolvedExperiment, used: Sequence[_TrainedRule], count: int, draws: int
) -> ResolvedControl:
    """Create the control of the first type that the rules need. Raises _NoDraws."""
    kinds = {own.kind: [each.number for each in used if each.kind == own.kind] for own in used}
    if all(experiment.rules[own.number].does.changes == "nothing" for own in used):
        return _build_untrained_control(experiment)
    asked = spec.Control(span=experiment.spec.span, draws=count)
    if experiment.everything:
        control = _build_group_control(experiment, asked, (), used, draws)
    elif "edges" in kinds:
        control = _build_circuit_control(experiment, asked, (), draws)
    elif "directions" in kinds:
        control = build_direction_control(experiment, asked, draws, kinds["directions"])
    elif "features" in kinds and _change_all_coordinates(experiment, kinds["features"]):
        return _build_untrained_dictionaries(experiment, kinds["features"])
    elif "subspaces" in kinds or "features" in kinds:
        numbers = [*kinds.get("subspaces", ()), *kinds.get("features", ())]
        control = build_subspace_control(experiment, asked, draws, numbers)
    elif "coordinates" in kinds:
        masks = [own for own in used if own.kind == "coordinates"]
        control = _build_coordinate_control(experiment, asked, draws, masks)
    elif "sites" in kinds:
        control = _Draws(experiment, asked, (), draws, kinds["sites"]).control()
    elif "positions" in kinds:
        asked = asked.model_copy(update={"what": "positions"})
        control = _Draws(experiment, asked, (), draws, kinds["positions"]).control()
    else:
        raise _NoDraws("what is observed isn't drawn", "observe it in another experiment")
    _check_draws_outside_removed(control.experiment.rules, experiment.model.name)
    return replace(control, title="random")


MAX_CHOICES = 1 << 24
"""Largest number of coordinates to draw from, over all sets that have draws."""


class _DrawnCoordinates(Record):
    """What is drawn for the coordinates of one rule that a mask chose."""

    own: BasisTargets
    sets: Mapping[tuple[int, ...], Sequence[tuple[int, ...]]]
    """Drawn sets for each set of coordinates that the rule names."""
    notes: tuple[str, ...]
    """Descriptions of the excluded coordinates."""

    @classmethod
    def of(cls, rule: ResolvedRule, mask: _TrainedRule, draws: int, seed: int) -> _DrawnCoordinates:
        """Draw the sets. Raises _NoDraws."""
        basis = rule.basis
        assert basis is not None
        named = list(dict.fromkeys(coordinate.which for coordinate in basis.coordinates.values()))
        if len(named) * len(mask.choices) > MAX_CHOICES:
            reason = f"there are {len(named):,} sets of coordinates, each with "
            reason += f"{len(mask.choices):,} to draw from"
            raise _NoDraws(reason, "name fewer coordinates", rule.spec.span)
        drawn = [draw_coordinates(each, mask.choices, draws=draws, seed=seed) for each in named]
        sets = {which: every for which, (every, _) in zip(named, drawn, strict=True)}
        notes = dict.fromkeys(note for every, note in drawn if every)
        return cls(basis, sets, tuple(notes))

    def replaced(self, draws: int) -> BasisTargets:
        """Return the coordinates of each draw; those without enough others repeat their own."""
        coordinates = {
            (draw, *key): replace(
                coordinate, which=drawn[draw] if draw < len(drawn) else coordinate.which
            )
            for draw, (key, coordinate) in product(range(draws), self.own.coordinates.items())
            for drawn in [self.sets[coordinate.which]]
        }
        return replace(self.own, axes=(DRAW_AXIS, *self.own.axes), coordinates=coordinates)

    def count(self, cell: Mapping[str, int]) -> int:
        """Return the number of draws in a cell."""
        key = tuple(cell[axis] for axis in self.own.axes)
        return len(self.sets[self.own.coordinates[key].which])


def _build_coordinate_control(
    experiment: ResolvedExperiment,
    asked: spec.Control,
    draws: int,
    masks: Sequence[_TrainedRule],
) -> ResolvedControl:
    """Create a control with other coordinates from which masks could choose, at the same sites and
    tokens.

    Rules and cells that share coordinates of one mask also share those drawn for them.

    Raises:
        _NoDraws: There are no others, or too many to draw from.
    """
    rules = list(experiment.rules)
    drawn = [
        _DrawnCoordinates.of(rules[mask.number], mask, draws, experiment.seed) for mask in masks
    ]
    varied = [axis for axis in experiment.axes if any(axis.name in d.own.axes for d in drawn)]
    names, groups = tuple(axis.name for axis in varied), [mask.names[0] for mask in masks]
    counts: dict[AxisIndices, int] = {}
    for cell in product(*(range(len(axis)) for axis in varied)):
        every = [coordinates.count(dict(zip(names, cell, strict=True))) for coordinates in drawn]
        counts[cell] = min((count for count in every if count), default=0)
    most, chooser = max(counts.values()), name_list(dict.fromkeys(groups))
    if not most:
        reason = f"{chooser} could choose no others for the coordinates of this experiment"
        raise _NoAlternatives(reason, f"change coordinates from which {chooser} chooses")
    for mask, coordinates in zip(masks, drawn, strict=True):
        rules[mask.number] = replace(rules[mask.number], basis=coordinates.replaced(most))
    dims = [coordinates.own.definition == ast.STANDARD_BASIS for coordinates in drawn]
    nouns = ["features"] * (not all(dims)) + ["dimensions"] * any(dims)
    notes = " or ".join(dict.fromkeys(note for coordinates in drawn for note in coordinates.notes))
    like = f"the same number of those that {chooser} could choose, {notes}, at the same sites and "
    what = f"random {' and '.join(nouns)}"
    control = _drawn_control(experiment, asked, rules, most, (what, f"{like}tokens"))
    return replace(control, experiment=replace(control.experiment, drawn=DrawCounts(names, counts)))


def _change_all_coordinates(experiment: ResolvedExperiment, numbers: Sequence[int]) -> bool:
    """Whether some rules change no single coordinates. The coordinates of a dictionary before the
    training have no relation to those with the same numbers after it."""
    bases = [experiment.rules[number].basis for number in numbers]
    return not any(
        coordinate.which for basis in bases if basis for coordinate in basis.coordinates.values()
    )


def _build_untrained_dictionaries(
    experiment: ResolvedExperiment, numbers: Sequence[int]
) -> ResolvedControl:
    """Create a control with dictionaries as they are before the training. Cells without a trained
    dictionary have none. Raises _NoDraws."""
    rules, asked = list(experiment.rules), spec.Control(span=experiment.spec.span, draws=1)
    changed: list[BasisTargets] = []
    for number in numbers:
        basis = rules[number].basis
        assert basis is not None
        bases = tuple({key: _before_training(m) for key, m in here.items()} for here in basis.bases)
        coordinates = {(0, *key): coordinate for key, coordinate in basis.coordinates.items()}
        axes = (DRAW_AXIS, *basis.axes)
        made = replace(basis, bases=bases, axes=axes, coordinates=coordinates)
        rules[number] = replace(rules[number], basis=made)
        changed.append(basis)
    varied = [a for a in experiment.axes if any(a.name in own.axes for own in changed)]
    names = tuple(axis.name for axis in varied)

    def uses_trained(own: BasisTargets, cell: AxisIndices) -> bool:
        coordinates = own.coordinates.get(tuple(cell[names.index(axis)] for axis in own.axes))
        members = () if coordinates is None else own.bases[coordinates.basis].values()
        return any(isinstance(member.operand, TrainedDictionary) for member in members)

    cells = product(*(range(len(axis)) for axis in varied))
    counts = {cell: int(any(uses_trained(own, cell) for own in changed)) for cell in cells}
    said = "random weights", "those before the training, of the same number of features"
    control = _drawn_control(experiment, asked, rules, 1, said, "untrained")
    shadow = replace(control.experiment, drawn=DrawCounts(names, counts))
    return replace(control, experiment=shadow, said=": ".join(said))


def _before_training(member: BasisMember) -> BasisMember:
    """Return a basis as it is before its training."""
    operand = member.operand
    if not isinstance(operand, TrainedDictionary) or not operand.is_trained:
        return member
    assert operand.training is not None
    folder = operand.path.parent / UNTRAINED_FOLDER
    encoded = None if operand.hook is None else site_of_hook(operand.hook)
    layer = None if encoded is None else encoded[1]
    file = read_dictionary(folder, str(folder), transcodes=operand.transcodes, layer=layer)
    if operand.decoders is not None and layer is not None:
        decoders = read_cross_decoder(file, layer, layer + operand.written_layers)
        file = file.with_decoders(decoders)
    made = f"`{member.name}` before the training"
    return replace(member, name=f"{member.name} untrained", operand=file, made=made)


def _build_untrained_control(experiment: ResolvedExperiment) -> ResolvedControl:
    """Create a control with observations as they are before the training. Raises _NoDraws."""
    before = [rule.does.untrained for rule in experiment.rules]
    rules = [
        rule if own is None else replace(rule, does=own[0], sites=_with_one_draw(_targets(rule)))
        for rule, own in zip(experiment.rules, before, strict=True)
    ]
    what = ", ".join(dict.fromkeys(own[1] for own in before if own is not None))
    if not what:
        reason = "what is observed of a trained part has no random or untrained counterpart"
        raise _NoDraws(reason, "the table of `mechdsl fit` compares the trained part with others")
    asked = spec.Control(span=experiment.spec.span, draws=1)
    control = _drawn_control(experiment, asked, rules, 1, (what, ""), "untrained")
    return replace(control, said=f"{what}, which is what the training starts from")


def _with_one_draw(site_targets: SiteTargets) -> SiteTargets:
    """Return targets along a further axis with one draw."""
    points = {(0, *key): here for key, here in site_targets.points.items()}
    labels = {(0, *key): here for key, here in site_targets.labels.items()}
    return SiteTargets((DRAW_AXIS, *site_targets.axes), points, labels)


class _NoDraws(HintedError):
    def __init__(self, reason: str, hint: str, span: Span | None = None) -> None:
        super().__init__(reason, hint)
        self.span = span


def _check_draws_outside_removed(rules: Sequence[ResolvedRule], model: str) -> None:
    """Check that no draw is in a block that computes nothing; raise _NoDraws otherwise."""
    for problem in check_removed_blocks(rules, (), model):
        written = "" if problem.span is None else problem.span.written
        raise _NoDraws(
            f"a draw for `{written}` is in a block that is replaced with identity",
            "name blocks with `except` so that neither rule is drawn in the other's block",
        )


class _NoAlternatives(_NoDraws):
    """Error for written targets without any alternatives of their kind."""


_SITES = -1
"""Key for the drawn sites of all rules of a cell; drawn tokens have their rule's number as key."""


class _CellDraws(Record):
    """Draws for one cell."""

    picks: list[dict[int, Any]]
    """For each draw: drawn options by key."""
    sites: list[int]
    """Rules whose sites are drawn."""

    def picked(self, draw: int, part: int) -> Any:
        """Return the options drawn for a key; None if nothing was drawn for it."""
        return self.picks[draw].get(part) if draw < len(self.picks) else None


class _DrawnCells:
    """Cells along the axes of the rules whose targets are drawn."""

    def __init__(
        self, experiment: ResolvedExperiment, kinds: Sequence[spec.ControlTarget | None]
    ) -> None:
        """Find the cells. `kinds`: the type of target that is drawn for each rule."""
        self.rules, self.kinds = experiment.rules, kinds
        self.chosen = [n for n, kind in enumerate(kinds) if kind is not None]
        """Numbers of the rules whose targets are drawn."""
        self.in_sites = [n for n in self.chosen if kinds[n] != "positions"]
        """Those whose sites are drawn."""
        used = {axis for n in self.in_sites for axis in _targets(self.rules[n]).axes}
        for n in self.chosen:  # cells in which a rule writes nothing need no draws
            at = self.rules[n].positions
            if n not in self.in_sites or not all(map(_writes_any, at.written.values())):
                used.update(at.axes)
        axes = [axis for axis in experiment.axes if axis.name in used]
        self.names = tuple(axis.name for axis in axes)
        self.cells = list(product(*(range(len(axis)) for axis in axes)))

    def key(self, axes: Sequence[str], cell: AxisIndices) -> AxisIndices:
        """Return the indices of a cell along some axes."""
        return tuple(cell[self.names.index(name)] for name in axes)

    def points(self, n: int, cell: AxisIndices) -> tuple[SitePoint, ...]:
        """Return the sites of a rule in a cell."""
        targets = _targets(self.rules[n])
        return targets.points[self.key(targets.axes, cell)]

    def writes(self, n: int, cell: AxisIndices) -> bool:
        """Whether a rule writes in a cell."""
        at = self.rules[n].positions
        return (
            not self.names
            or any(name not in self.names for name in at.axes)
            or _writes_any(at.written[self.key(at.axes, cell)])
        )

    def label(self, n: int, cell: AxisIndices) -> str:
        """Describe what a rule writes in a cell."""
        rule = self.rules[n]
        if self.kinds[n] == "positions":
            return rule.positions.written[self.key(rule.positions.axes, cell)].label
        return _targets(rule).labels[self.key(_targets(rule).axes, cell)]


class _Draws:
    """Draws for all cells of one experiment."""

    def __init__(
        self,
        experiment: ResolvedExperiment,
        asked: spec.Control,
        apart: Sequence[ExcludedSite],
        draws: int,
        only: Container[int] | None = None,
    ) -> None:
        """Create the draws. `only`: numbers of the rules whose targets are drawn; None for all."""
        self.experiment = experiment
        self.asked = asked
        self.only = only
        self.apart = apart
        self.draws = draws
        self.shape: ModelShape = experiment.model.shape
        self.others = AlternativeSites(self.shape, apart)
        self.matched: dict[str, None] = {}
        """Descriptions of the properties that the draws share with the original targets."""
        self.notes: dict[str, None] = {}
        self.drawn: dict[str, None] = {}
        self.like: list[str] = []
        """Labels of written targets without alternatives."""
        self.suggests = True
        """Whether an error names another type of target, for which it is tried."""

    def check(self) -> None:
        """Raise _NoDraws unless a cell has alternatives, without another type as a hint."""
        self.suggests = False
        self._drawn_rules()

    def _drawn_rules(
        self,
    ) -> tuple[list[spec.ControlTarget | None], list[ResolvedRule], DrawCounts]:
        """Return the type of target that is drawn for each rule, the rules with drawn targets, and
        the number of draws in each cell. Raises _NoDraws."""
        kinds: list[spec.ControlTarget | None] = [
            self._kind(rule) if self.only is None or number in self.only else None
            for number, rule in enumerate(self.experiment.rules)
        ]
        if not any(kinds):
            raise self._nothing()
        self._apart_is_drawn(kinds)
        rules, counts = self._rules(kinds)
        if not any(counts.counts.values()):
            over = self.experiment.combined_axis
            raise _NoAlternatives(
                f"each curve over `{over}` has a cell without other targets",
                f"leave out the values of `{over}` at which nothing is written, or everything",
            )
        return kinds, rules, counts

    def control(self) -> ResolvedControl:
        kinds, rules, counts = self._drawn_rules()
        draws = max(counts.counts.values())
        kept = [
            f"`{rule.spec.span.written}` unchanged"
            for rule, kind in zip(self.experiment.rules, kinds, strict=True)
            if kind is None and rule.does.changes != "nothing"
        ]
        own = self.experiment.spec
        shadow = replace(
            self.experiment,
            spec=own.model_copy(
                update={
                    "name": f"{own.name} against random",
                    "against": None,
                    "reports": (spec.Report(span=self.asked.span, kind="null band"),),
                    "expects": (),
                }
            ),
            axes=(Axis(DRAW_AXIS, tuple(range(draws)), self.asked.span), *self.experiment.axes),
            rules=tuple(rules),
            accuracies={},
            control_of=self.experiment.key,
            drawn=counts,
        )
        what = f"random {' and '.join(self.drawn)}"
        drawn = f"{what}, {self._how_many(counts)}, seed {self.experiment.seed}"
        apart = [f"except {', '.join(f'`{p.site.span.written}`' for p in self.apart)}"]
        parts = [drawn, *self.matched, *self.notes, *(apart if self.apart else []), *kept]
        return ResolvedControl(shadow, draws, self.asked.draws, what, "; ".join(parts))

    def _how_many(self, counts: DrawCounts) -> str:
        """Describe the number of draws: `20 draws`, or all that exist."""
        some = [count for count in counts.counts.values() if count]
        fewest, most = min(some), max(some)
        if fewest == self.draws:
            return count_noun(most, "draw")
        if fewest == most:
            return f"{count_noun(most, 'draw')}, all that exist"
        return (
            f"{fewest:,} to {count_noun(most, 'draw')}, "
            f"all that exist where fewer than {self.draws:,}"
        )

    def _apart_is_drawn(self, kinds: Sequence[spec.ControlTarget | None]) -> None:
        """Check that each excluded site could be drawn; raise _NoDraws if one couldn't."""
        drawn = {kind for kind in kinds if kind is not None}
        possible = set(drawn)
        for rule, kind in zip(self.experiment.rules, kinds, strict=True):
            if kind == "layers":  # a head that moves to another layer keeps its index
                possible |= self._has(rule) - {"positions"}
        for part in self.apart:
            if part.points and possible.isdisjoint(find_excluded_kinds(part)):
                text, words = part.site.span.written, " and ".join(sorted(drawn))
                has = {word for rule in self.experiment.rules for word in self._has(rule)}
                other = next((w for w in DRAWN_KINDS if w in find_excluded_kinds(part) & has), None)
                hint = f"leave out {words}"
                if other is not None:
                    hint += f", or draw {other}: `random({self.asked.draws}, {other})`"
                reason = f"`{text}` contains none of the drawn {words}"
                raise _NoDraws(reason, hint, part.site.span)

    def _nothing(self) -> _NoDraws:
        what = self.asked.what
        if what is None:
            reason = "no rule of this experiment has targets that can be drawn at random"
            return _NoDraws(reason, "sites, layers and positions of rules can be drawn")
        if what == "positions" and any(map(self._acts_in_answers, self.experiment.rules)):
            reason = "tokens of an answer have no alternatives"
            return _NoDraws(reason, "draw sites or layers, or name positions of the prompt")
        if what == "positions" and any(rule.acts_later for rule in self.experiment.rules):
            reason = "the newest token of a reply has no alternatives"
            return _NoDraws(reason, "draw sites or layers, or act `during prefill`")
        reason = f"no rule of this experiment has {what}"
        return _NoDraws(reason, "remove the type of target, or name one that the rules have")

    def _say_alone(self, whole: int, some: int) -> None:
        """Note how many cells have no alternatives."""
        cells = f"{self.experiment.n_there:,}"
        if whole:
            has = (
                "has no alternatives and no band"
                if whole == 1
                else ("have no alternatives and no band")
            )
            self.notes[f"{whole:,} of {cells} cells {has}"] = None
        if some:
            stays = "a rule has no alternatives and doesn't change"
            self.notes[f"in {some:,} of {cells} cells {stays}"] = None

    def _nothing_else(self, kinds: Sequence[spec.ControlTarget | None]) -> _NoAlternatives:
        if not self.like:
            reason = "no cell of this experiment writes anything"
            return _NoAlternatives(
                reason, "let it write something: for example `top 3` instead of `top 0`"
            )
        hints = ["leave out fewer targets"] if self.apart else []
        if not self.apart and self._joins_targets(kinds):
            hints.append("join fewer targets")
        word = self._find_other_kind(kinds) if self.suggests else None
        if word is not None:
            hints.append(f"draw something else: `random({self.asked.draws}, {word})`")
        but = " except those left out" if self.apart else ""
        hint = ", or ".join(hints) or "remove this line"
        return _NoAlternatives(f"there is no alternative to {self.like[0]}{but}", hint)

    def _joins_targets(self, kinds: Sequence[spec.ControlTarget | None]) -> bool:
        """Return whether a cell has several of the targets that are drawn."""
        for rule, kind in zip(self.experiment.rules, kinds, strict=True):
            hits = (hit for cell in rule.positions.written.values() for hit in cell.hits)
            if kind == "positions" and any(sum(map(len, hit)) > 1 for hit in hits):
                return True
            sites = {} if rule.sites is None else rule.sites.points
            if kind is not None and any(len(here) > 1 for here in sites.values()):
                return True
        return sum(kind is not None for kind in kinds) > 1

    def _find_other_kind(
        self, kinds: Sequence[spec.ControlTarget | None]
    ) -> spec.ControlTarget | None:
        """Return another type of target that has alternatives; None if there is none."""
        has = {word for rule in self.experiment.rules for word in self._has(rule)}
        for word in DRAWN_KINDS:
            if word not in has or word in kinds:
                continue
            asked = self.asked.model_copy(update={"what": word})
            other = _Draws(self.experiment, asked, self.apart, self.draws, self.only)
            try:
                other.check()
            except _NoDraws:
                continue
            return word
        return None

    # --- what is drawn ----------------------------------------------------------------------------

    def _kind(self, rule: ResolvedRule) -> spec.ControlTarget | None:
        """Return the kind of targets that is drawn for a rule; None if nothing is."""
        has = self._has(rule)
        if self.asked.what is not None:
            return self.asked.what if self.asked.what in has else None
        return next((word for word in DRAWN_KINDS if word in has), None)

    def _has(self, rule: ResolvedRule) -> set[spec.ControlTarget]:
        """Return the kinds of targets of a rule that have alternatives."""
        if rule.sites is None or rule.does.changes in ("nothing", "positions", "blocks", "circuit"):
            return set()
        points = {point for here in rule.sites.points.values() for point in here}
        targets: set[spec.ControlTarget] = set()
        for point in points:
            unit = SITES[point.site].unit
            if point.unit is not None and unit is not None and self._size(point) > 1:
                targets.add(UNIT_WORDS[unit])
        # A path depends on the order of its layers, so its layers aren't drawn.
        in_layers = all(point.layer is not None for point in points)
        layers = max(self.shape.in_stack(p.site)[0].n_layers for p in points) if points else 0
        if rule.path is None and layers > 1 and in_layers:
            targets.add("layers")
        if rule.does.drawn_positions and not self._acts_in_answers(rule) and not rule.acts_later:
            targets.add("positions")
        return targets

    def _acts_in_answers(self, rule: ResolvedRule) -> bool:
        """Return whether a rule acts on answer tokens, which have no alternatives."""
        rows = self.experiment.table.runs[self.experiment.spec.base].rows
        return any(is_after_prompts(cell, rows) for cell in rule.positions.written.values())

    def _size(self, point: SitePoint) -> int:
        return unit_count(self.shape, point.site, point.layer)

    # --- cells ------------------------------------------------------------------------------------

    def _rules(
        self, kinds: Sequence[spec.ControlTarget | None]
    ) -> tuple[list[ResolvedRule], DrawCounts]:
        """Replace the targets of the rules by draws.

        Rules that share targets also share their replacements.

        Returns:
            The rules with drawn targets, and the number of draws in each cell.
        """
        along = _DrawnCells(self.experiment, kinds)
        own = {
            cell: merge_targets(
                self.others.own(kinds[n], along.points(n, cell))
                for n in along.in_sites
                if along.writes(n, cell)
            )
            for cell in along.cells
        }
        everywhere = merge_targets(own.values())
        tokens = {n: self._tokens(along.rules[n]) for n in along.chosen if n not in along.in_sites}
        drawn: dict[AxisIndices, _CellDraws] = {}
        whole = some = 0
        there = self.experiment.cells_along(along.names)
        for cell in along.cells:
            parts, fixed, sites = self._options(along, cell, (own[cell], everywhere), tokens)
            whole += 0 if parts else there[cell]
            some += there[cell] if parts and fixed else 0
            if not parts and fixed:
                labels = dict.fromkeys(along.label(n, cell) for n in fixed)
                self.like.append(f"`{' + '.join(labels)}`")
            picks = draw_distinct(list(parts.values()), draws=self.draws) if parts else []
            drawn[cell] = _CellDraws([dict(zip(parts, each, strict=True)) for each in picks], sites)
        if whole == there.total():
            raise self._nothing_else(kinds)
        self._say_alone(whole, some)
        numbers = combine_draws(
            {cell: len(cell_draws.picks) for cell, cell_draws in drawn.items()},
            along.names,
            self.experiment.combined_axis,
            self.draws,
            self.experiment.seed,
        )
        drawn = {
            cell: replace(cell_draws, picks=[cell_draws.picks[n] for n in numbers[cell]])
            for cell, cell_draws in drawn.items()
        }
        rules = list(along.rules)
        for n in (*along.in_sites, *tokens):
            word = kinds[n]
            assert word is not None
            self.drawn[word] = None
            moved = self._positions if n in tokens else self._sites
            rules[n] = moved(n, word, along.names, drawn)
        counts = {cell: len(own) for cell, own in numbers.items()}
        return rules, DrawCounts(along.names, counts)

    def _options(
        self,
        along: _DrawnCells,
        cell: AxisIndices,
        targets: tuple[CellTargets, CellTargets],
        tokens: Mapping[int, Mapping[AxisIndices, TokenOptions]],
    ) -> tuple[dict[int, DrawOptions], list[int], list[int]]:
        """Return what is drawn in a cell by key, the rules without alternatives, and those whose
        sites are drawn.

        Args:
            targets: Those of the cell, and of all cells.
            tokens: Alternatives to the tokens of each cell, by rule.
        """
        written = [n for n in along.chosen if along.writes(n, cell)]
        parts: dict[int, DrawOptions] = {}
        fixed: list[int] = []
        sites = [n for n in along.in_sites if n in written]
        if sites:
            site_options = find_site_options(
                *targets,
                self.others.without_units,
                self.others.fitting({n: along.points(n, cell) for n in sites}, along.kinds),
                draws=self.draws,
                seed=self.experiment.seed,
            )
            if site_options is None:
                fixed += sites
            else:
                self.notes[site_options.without] = None
                parts[_SITES] = site_options
        for n in written:
            if n in tokens:
                options = tokens[n].get(along.key(along.rules[n].positions.axes, cell))
                if options is None:  # its positions are an error, which is reported
                    continue
                if all(row.alone for row in options.rows):
                    fixed.append(n)
                else:
                    parts[n] = options
        return parts, fixed, sites

    # --- sites ------------------------------------------------------------------------------------

    def _sites(
        self,
        n: int,
        kind: spec.ControlTarget,
        names: tuple[str, ...],
        cells: Mapping[AxisIndices, _CellDraws],
    ) -> ResolvedRule:
        """Replace the units or layers of a rule."""
        rule = self.experiment.rules[n]
        targets = _targets(rule)
        if kind == "layers":
            self.matched["the same component, in the same number of layers"] = None
        else:
            self.matched["of the same component, the same number in each layer"] = None
        points: dict[AxisIndices, tuple[SitePoint, ...]] = {}
        sources: dict[AxisIndices, tuple[SitePoint, ...]] = {}
        labels: dict[AxisIndices, str] = {}
        most = max(len(drawn.picks) for drawn in cells.values())
        for (cell, drawn), draw in product(cells.items(), range(most)):
            at = tuple(cell[names.index(name)] for name in targets.axes)
            before = targets.points[at]
            picked = drawn.picked(draw, _SITES) if n in drawn.sites else None
            after = self.others.moved(before, before, kind, picked)
            points[draw, *cell] = after
            labels[draw, *cell] = targets.labels[at] if picked is None else label_all_points(after)
            if targets.sources is not None:
                sources[draw, *cell] = self.others.moved(targets.sources[at], before, kind, picked)
        return replace(
            rule, sites=SiteTargets((DRAW_AXIS, *names), points, labels, sources or None)
        )

    # --- positions --------------------------------------------------------------------------------

    def _tokens(self, rule: ResolvedRule) -> dict[AxisIndices, TokenOptions]:
        """Return the alternatives to the tokens of each cell, in the same rows."""
        across = _reads_elsewhere(rule)
        base = self.experiment.table.runs[self.experiment.spec.base].rows
        other = self.experiment.table.runs[rule.run].rows
        if not across and any(a.ids != b.ids for a, b in zip(base, other, strict=True)):
            self.notes["read at the same token of the other run"] = None
        allowed = [
            tuple(sorted(numbers if across else numbers & there))
            for numbers, there in zip(
                self._alternatives(rule, base), self._alternatives(rule, other), strict=True
            )
        ]
        row_keys, seed = self.experiment.table.row_keys, self.experiment.seed
        choices: dict[AxisIndices, TokenOptions] = {}
        for key, cell in rule.positions.written.items():
            rows = [
                RowOptions.of(tokens, hits, row_key=row_key, seed=seed)
                for row_key, tokens, hits in zip(row_keys, allowed, cell.hits, strict=True)
            ]
            choices[key] = TokenOptions(rows)
            if any(row.among for row in rows):
                self.notes["including the cell's tokens in rows with too few others"] = None
            stay = any(any(row.hits) and row.alone for row in rows)
            if stay and not all(row.alone for row in rows):
                self.notes["rows without alternatives unchanged"] = None
        return choices

    def _alternatives(self, rule: ResolvedRule, rows: Sequence[RunRow]) -> list[set[int]]:
        """Return the tokens of each row at which a rule can act, without special tokens; in a
        vision encoder of prompts, those that read a part of an image, or their patches."""
        reader = self.experiment.model.tokenizer
        if rule.in_vision:
            if self.shape.resamples and isinstance(reader, ImagePromptTokenizer):
                rows = [row_in_patches(reader, row) for row in rows]
            return [set(row.patch_tokens) for row in rows]
        points = [] if rule.sites is None else chain(*rule.sites.points.values())
        side = find_side(list(points), self.shape)
        return [
            {
                token
                for token, special in enumerate(row.special)
                if side in ("", "target" if token >= row.source else "source") and not special
            }
            for row in rows
        ]

    def _positions(
        self,
        n: int,
        kind: spec.ControlTarget,
        names: tuple[str, ...],
        cells: Mapping[AxisIndices, _CellDraws],
    ) -> ResolvedRule:
        """Replace the tokens of a rule by others of the same rows."""
        rule = self.experiment.rules[n]
        like = "the same number of tokens of the same row, special tokens excluded"
        if rule.in_vision:
            what = "patches" if self.shape.resamples else "image tokens"
            like = f"the same number of {what} of the same row"
        self.matched[like] = None
        position_targets, across = rule.positions, _reads_elsewhere(rule)
        written: dict[AxisIndices, PositionCell] = {}
        read: dict[AxisIndices, PositionCell] = {}
        most = max(len(drawn.picks) for drawn in cells.values())
        for (cell, drawn), draw in product(cells.items(), range(most)):
            at = tuple(cell[names.index(name)] for name in position_targets.axes)
            hits: tuple[Hits, ...] | None = drawn.picked(draw, n)
            written[draw, *cell], read[draw, *cell] = (
                position_targets.written[at],
                position_targets.read[at],
            )
            if hits is not None:
                written[draw, *cell] = replace(position_targets.written[at], hits=hits)
                read[draw, *cell] = position_targets.read[at] if across else written[draw, *cell]
        positions = PositionTargets((DRAW_AXIS, *names), written, read, position_targets.left_out)
        return replace(rule, positions=positions)


def _targets(rule: ResolvedRule) -> SiteTargets:
    assert rule.sites is not None
    return rule.sites


def _writes_any(cell: PositionCell) -> bool:
    """Return whether the cell has tokens in any row."""
    return any(run for row in cell.hits for run in row)


def _reads_elsewhere(rule: ResolvedRule) -> bool:
    """Return whether a rule reads at other positions, or in other rows, than it writes."""
    return rule.spec.onto is not None or rule.external is not None
