"""Resolve bases, and rules on their coordinates: `SITE in basis b`, `feature 3 of b`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain, product
from typing import TYPE_CHECKING, Literal, TypeAlias

from mechdsl.base import limits
from mechdsl.base.files import SafetensorsFile, UnreadableFile, inspect_safetensors
from mechdsl.base.records import Record
from mechdsl.base.text import count_noun, name_list
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.rules import BadBasis, DictionaryElsewhere, DictionaryOfAnotherModel
from mechdsl.diagnostics.syntax import BadArgument, NotSupported
from mechdsl.dictionaries.folder import (
    CONFIG_FILE,
    CROSS_LAYER_CONFIG,
    ENCODED_SITES,
    WEIGHT_FILES,
    DictionaryFile,
    FeatureLabels,
    read_cross_decoder,
    read_dictionary,
    read_labels,
    site_of_hook,
)
from mechdsl.models.shape import unit_count, vector_width
from mechdsl.program import spec
from mechdsl.program.activation_trainers import CrossLayerTrainer
from mechdsl.program.direction_methods import (
    BASIS_METHODS,
    EFFECT_OPTIONS,
    BasisMethod,
    MethodError,
    basis_size,
)
from mechdsl.program.directions import decoded_basis, fit_rows_of_basis, last_token
from mechdsl.program.group_files import LayerFeature
from mechdsl.program.paths import (
    DICTIONARY_PATH,
    LABELS_PATH,
    SAVED_PATH,
    TRANSCODER_PATH,
    path_to_read,
)
from mechdsl.program.python_functions import find_function
from mechdsl.program.spec import SEED_AXIS, Constant, constant_value
from mechdsl.program.statements import join_features
from mechdsl.program.trainers import (
    DictionaryTrainer,
    PairedTrainer,
    SolvedTrainer,
    find_trainer,
    trainer_call,
)
from mechdsl.program.trainings import SEEDS_DIFFER, SEEDS_HINT, list_seeds
from mechdsl.prompts.positions.cells import resolve_positions
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.directions import (
    DirectionError,
    check_training,
    count_used_rows,
    describe_rows,
    find_tokens,
    find_use,
    resolve_named_family,
    resolve_samples,
)
from mechdsl.resolve.model_pairs import find_tower
from mechdsl.resolve.sites import (
    AxisValues,
    ExperimentContext,
    exclude_values,
    find_missing_point,
    find_side,
    label_points,
    number_exceptions,
    picks_numbers,
    read_exceptions,
    resolve_axis,
    resolve_site,
)
from mechdsl.resolve.targets import cut_to_shared_rows, remove_tokens
from mechdsl.resolve.trainings import (
    FEWEST_ROWS,
    explain_few_rows,
    explain_seeds,
    explain_shared_images,
    outline_training,
    split_by_seed,
)
from mechdsl.resolve.types import (
    WEIGHTS_BASIS,
    Axis,
    BasisMember,
    BasisOperand,
    BasisTargets,
    Convention,
    Coordinates,
    DirectionVector,
    DrawnBasis,
    FeatureNodes,
    FitSample,
    FittedBasis,
    Intervention,
    JacobianBasis,
    PairedVectors,
    PointBases,
    PythonBasis,
    ResolvedRule,
    SavedVector,
    SiteLayer,
    SitePoint,
    SiteTargets,
    SpannedBasis,
    TokenBasis,
    TrainedDictionary,
    TrainedRotation,
    TrainedVector,
    Training,
    VectorBatch,
    WeightBasis,
    count_numbers,
    find_training_seed,
    iter_leaf_vectors,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import rewrite
from mechdsl.vocab.sites import SITES, CoordinateOperation, in_stack, write_order

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

JOINED_SITES = ("z", "mlp_hidden")
"""Sites whose heads or neurons may be one vector: `z layer 5`."""

_UNKNOWN_WIDTH = 1 << 16
"""Width of a vector whose model isn't available; a basis may have up to as many coordinates."""

NEXT_MAPS: Mapping[str, str] = {"mlp_hidden": "mlp_out", "z": "attn_out"}
"""Sites that one linear map reads → the site that it writes to."""

MAPPED_SITES: Mapping[str, str] = {output: site for site, output in NEXT_MAPS.items()}
"""The reverse: outputs of sublayers → the site of the heads or neurons that their weights read."""

WEIGHT_SITES = ("mlp_out", "attn_out")
"""Sites whose weights `svd(weights: …)` can decompose."""


class BasisError(DirectionError):
    """Error for an invalid basis, with a hint on what to write instead."""

    @property
    def diagnostic(self) -> BadBasis:
        return BadBasis(span=self.node.span, reason=self.reason, hint=self.hint)


# --- rules ----------------------------------------------------------------------------------------


class Reconstruction(Intervention):
    """`set SITE at POSITIONS to reconstruction of BASIS`: what the basis represents of the current
    vector."""

    name = "reconstruction"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention(
            "reconstruction",
            "the current vector is replaced by what the basis represents of it, without the error"
            if rule.basis is None or not any(member.reads for member in rule.basis.members)
            else "the output of the MLP is replaced by that of the transcoder",
        )


RECONSTRUCTION = Reconstruction()


class FeatureExchange(Intervention):
    """`patch features A of BASIS at POSITIONS with features B of OTHER`.

    The contributions of the features A to the current vector leave it, and those of the features B
    of the same vector come in (stitching of Leask et al. 2025, arXiv 2502.04878).
    """

    name = "exchange"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention(
            "exchange",
            "the contributions of the named features leave the current vector, and those of the "
            "other dictionary's features to the same vector come in",
        )


EXCHANGE = FeatureExchange()


class CoordinateRemoval(Intervention):
    """`project out feature 3 of BASIS at POSITIONS`: the current vector without its projection onto
    the span of the coordinates' directions, whatever the coordinates are."""

    name = "project out"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention(
            "projected out",
            "the current vector loses its projection onto the span of the named coordinates' "
            "directions, also where these coordinates are 0",
        )


REMOVAL = CoordinateRemoval()


def is_reconstruction(fill: ast.Node | None) -> bool:
    """Return whether a rule sets vectors to `reconstruction of BASIS`."""
    return isinstance(fill, ast.QualifiedRef) and fill.name == "reconstruction"


CROSS_LAYER_CONVENTION = (
    "a changed feature changes the MLP outputs of its layer and of all later layers, each by the "
    "change of the feature times its decoder for this layer (Ameisen et al. 2025, Circuit "
    "Tracing); features of later layers are computed from their current inputs"
)


def describe_read_groups(rule: ResolvedRule) -> Iterator[Convention]:
    """Yield how the groups of features that a rule names were read."""
    yield from (Convention(f"group {name}", made) for name, made in rule.spec.read_groups if made)


class CoordinateChange(Intervention):
    """An intervention on coordinates in a basis; the rest of the vector doesn't change.

    x becomes x + decode(f′) − decode(f), where f are the current coordinates of x, and f′ those
    after the inner intervention. What the basis doesn't represent stays, such as the
    reconstruction error of a dictionary.
    """

    def __init__(self, inner: Intervention, *, drops_error: bool = False) -> None:
        self._inner = inner
        self.drops_error = drops_error
        """Whether what the basis doesn't represent is dropped."""

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{self._inner.name} in a basis"

    @property
    def reads(self) -> Literal["run", "donor", "mean", "cell"] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._inner.reads

    @property
    def copies(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._inner.copies

    @property
    def whole(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._inner.whole

    @property
    def operation(self) -> CoordinateOperation:
        """How the inner intervention's result is combined with the current coordinates."""
        if isinstance(self._inner, Reconstruction):
            return "reconstruct"
        if isinstance(self._inner, FeatureExchange):
            return "exchange"
        if isinstance(self._inner, CoordinateRemoval):
            return "project out"
        assert self._inner.mode in ("set", "add", "scale")
        return self._inner.mode

    mode = "coordinates"

    @property
    def at_newest(self) -> str:
        if self.operation == "set":
            return "the newest token receives the coordinates written at the final prompt token"
        if self.operation == "add":
            return "the newest token's own coordinates receive the rule's addition"
        return super().at_newest

    @property
    def leaves_no_error(self) -> bool:
        """Whether what the basis doesn't represent is dropped."""
        return self.drops_error or self.operation == "reconstruct"

    @property
    def keeps_zeros(self) -> bool:
        """Whether it changes nothing where a coordinate is 0 and its new value is 0."""
        changes = self.drops_error or self.reads == "cell"
        return self.operation in ("set", "scale") and not changes

    @property
    def identity(self) -> tuple[object, ...]:
        return type(self), self.drops_error, *self._inner.identity

    def key(self, rule: ResolvedRule) -> Hashable:
        return self._inner.mode, self.drops_error, self._inner.key(rule)

    def unchanged(self, amounts: NDArray[np.float64]) -> NDArray[np.bool_]:
        mask = self._inner.unchanged(amounts)
        return mask & False if self.drops_error else mask

    def detail(self, rule: ResolvedRule) -> str | None:
        assert rule.basis is not None
        said = self._inner.detail(rule)
        return f"{said} in {rule.basis.definition}" if said else f"in {rule.basis.definition}"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from self._inner.conventions(rule, n_layers)
        reads = {member.reads for member in rule.basis.members} if rule.basis else {""}
        if reads != {""}:
            said = (
                f"features are those of the current `{', '.join(sorted(reads))}` of the same "
                "block, after changes by earlier rules at the same token"
            )
            yield Convention("transcoder", said)
        if rule.basis is not None and rule.basis.crosses_layers:
            yield Convention("cross-layer transcoder", CROSS_LAYER_CONVENTION)
        yield from describe_read_groups(rule)
        if isinstance(self._inner, Reconstruction | CoordinateRemoval):
            return
        yield Convention(
            "basis",
            "rules in a basis change the named coordinates of the current vector; the rest of the "
            "vector stays"
            + (", except the reconstruction error, which is dropped" if self.drops_error else ""),
        )

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        return self._inner.values(rule, vectors)


VECTOR_AMOUNT = 2.0
"""Factor of coordinates for which their contribution is added once."""


CHANGED_WEIGHTS = "the newest token uses the changed weights"


class WeightScaling(Intervention):
    """A factor of output weights, or vectors that are added to them."""

    mode = "scale"

    def __init__(self, name: str) -> None:
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]

    def key(self, rule: ResolvedRule) -> Hashable:
        return WEIGHTS_BASIS

    def unchanged(self, amounts: NDArray[np.float64]) -> NDArray[np.bool_]:
        return amounts == 1

    def detail(self, rule: ResolvedRule) -> str | None:
        said = [part.span.written for part in (rule.spec.fill, rule.spec.direction) if part]
        return " * ".join(said)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention(
            "output weights",
            "the weights from the named heads or neurons to the output of their sublayer change at "
            "all tokens; biases stay",
        )


class WeightChange(CoordinateChange):
    """A change of the output weights of heads and neurons, at all tokens of a run.

    With the vector a of all heads or neurons of a layer and their weights W, the output becomes
    out + (s − 1) a W, or out + a D for vectors D that are added to the weights.
    """

    def __init__(self, verb: str) -> None:
        super().__init__(WeightScaling(verb))

    @property
    def at_newest(self) -> str:
        return CHANGED_WEIGHTS

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._inner.name

    def detail(self, rule: ResolvedRule) -> str | None:
        return self._inner.detail(rule)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from self._inner.conventions(rule, n_layers)


@cache
def change_coordinates(inner: Intervention, *, drops_error: bool = False) -> CoordinateChange:
    """Return the intervention on coordinates that corresponds to one on vectors."""
    return CoordinateChange(inner, drops_error=drops_error)


def resolve_rule(
    resolve: Callable[[spec.Rule, ExperimentContext], ResolvedRule | None],
    rule: spec.Rule,
    work: ExperimentContext,
) -> ResolvedRule | None:
    """Resolve a rule, in a basis if its site names one; None after an error.

    Args:
        resolve: Resolves a rule that changes whole vectors.
    """
    name = None if rule.site is None else rule.site.basis_name
    if name is None:
        return resolve(rule, work)
    assert rule.site is not None
    named = _bases_of_rule(name, rule.site, work)
    if named is None:  # rejected
        return None
    names, definitions, outer = named
    before = len(work.diagnostics)
    features = rule.site.coordinates
    found = resolve(_at_site_of_basis(rule, definitions[0], work), work)
    if found is None or found.sites is None or has_errors(work.diagnostics[before:]):
        return None
    looks = found.does.changes == "nothing"
    try:
        bases: list[PointBases] = []
        for definition in definitions:
            members = _members(definition, found.sites, rule.site, work)
            if members is None:
                return None
            bases.append(members)
        if not looks:
            _check_rule(rule, found, bases)
            bases = [_with_decoders(rule.site, rule, found.sites, each, work) for each in bases]
        _check_separable(rule.site, bases, "read" if looks else "change")
        _check_all_features(rule, features, bases)
        _check_bases(rule, found, bases)
        axes, coordinates, empty = _rule_coordinates(rule, rule.site, bases[0], work)
        exchange = _exchanged(rule, found.sites, bases, work)
    except BasisError as problem:
        work.diagnostics.append(problem.diagnostic)
        return None
    if coordinates is None or (exchange is None and rule.exchanged is not None):
        return None
    within = _label_suffix(rule.site, name, axes, work, group=_searched_group(rule, work))
    within += "" if rule.exchanged is None else f" with {_written_words(rule.exchanged)}"
    labels = {key: f"{label}{within}" for key, label in found.sites.labels.items()}
    every = {key: Coordinates(which) for key, which in coordinates.items()}
    targets = BasisTargets(name, names, tuple(bases), axes, every)
    positions = found.positions
    positions = remove_tokens(positions, axes, coordinates, empty) if empty else positions
    return replace(
        found,
        positions=positions,
        spec=rule,
        does=found.does if looks else change_coordinates(found.does, drops_error=rule.drops_error),
        sites=_encoded_sites(replace(found.sites, labels=labels), bases[0], looks=looks),
        basis=_number_bases(targets, outer) if exchange is None else _insert(targets, exchange),
    )


def resolve_observed_basis(
    rule: spec.Rule, sites: SiteTargets, work: ExperimentContext
) -> BasisTargets | None:
    """Resolve the basis of an observation at these sites; None after an error.

    It has all coordinates, and one point. E0342 for a basis that can't be used there.
    """
    said = rule.observed
    assert said is not None
    assert said.basis is not None
    assert rule.site is not None
    definition = work.program.bases.get(said.basis)
    name = ast.Name(said.basis, span=said.span)
    try:
        _check_one_layer(definition, name, sites)
        _check_one_site(said.basis, name, sites, f"observe value feature * of {said.basis}")
        members = None if definition is None else _members(definition, sites, rule.site, work)
    except BasisError as problem:
        work.diagnostics.append(problem.diagnostic)
        return None
    if members is None:  # rejected
        return None
    return BasisTargets(said.basis, (said.basis,), (members,), (), {(): Coordinates()})


def _check_one_site(name: str, node: ast.Node, sites: SiteTargets, instead: str) -> None:
    """Check that a basis is used at one site. Raises BasisError, which says to write `instead`."""
    if len(sites.points) > 1:
        count = len(set(chain.from_iterable(sites.points.values())))
        reason = f"`{name}` is a basis for each of {count} sites"
        raise BasisError(node, reason, f"write `{instead}`, or define the basis at one site")


def _check_one_layer(definition: spec.Basis | None, node: ast.Node, sites: SiteTargets) -> None:
    """Check that features of several layers of a cross-layer transcoder that is trained aren't
    observed together. Raises BasisError."""
    call = None if definition is None else definition.method
    if definition is None or call is None or call.name != "fit" or len(sites.points) < 2:
        return
    if isinstance(find_trainer(trainer_call(call)), CrossLayerTrainer):
        reason = f"`{definition.name}` has features of {len(sites.points)} layers"
        hint = f"write `observe value mlp_out layer * feature * of {definition.name} at last token`"
        raise BasisError(node, reason, hint)


def resolve_saved_features(
    site: ast.Site, work: ExperimentContext
) -> tuple[SitePoint, BasisTargets] | None:
    """Resolve the coordinates of a `save top … rows of` line and where they are read; None after an
    error. E0342 for a basis that can't be used there, and codes of sites."""
    name, features = site.basis_name, site.coordinates
    assert name is not None
    assert features is not None
    _, definitions = _named_bases(name, site, work)
    if definitions is None:  # rejected
        return None
    targets, _ = resolve_site(_written_site(site, definitions[0], work), work.sites)
    if targets is None:
        return None
    try:
        point = next(chain.from_iterable(targets.points.values()))
        head = "" if point.unit is None else f" head {point.unit}"
        one = f"{point.site} layer {point.layer}{head} {features.span.written}"
        _check_one_site(name, site, targets, one)
        members = _members(definitions[0], targets, site, work)
    except BasisError as problem:
        work.diagnostics.append(problem.diagnostic)
        return None
    if members is None:  # rejected
        return None
    ((point,),) = targets.points.values()
    member = BasisTargets(name, (name,), (members,), (), {}).at(point)
    axis_values = _named_coordinates(site, features, member.size, work)
    if axis_values is None:
        return None
    which = tuple(dict.fromkeys(each for choice in axis_values.choices.values() for each in choice))
    if not which:
        problem = BasisError(site, "no feature is named", "name one: `features top 1 of …`")
        work.diagnostics.append(problem.diagnostic)
        return None
    whole = len(which) == member.size
    point = replace(point, site=member.reads) if member.reads else point
    named = {(): Coordinates(() if whole else which)}
    return point, BasisTargets(name, (name,), ({None: member},), (), named)


LINEAR_BEFORE_ACTIVATION = frozenset({"standard", "jumprelu", "topk"})
"""Encoders whose active features are a linear map of the vector plus a constant."""


def resolve_argument_bases(
    names: Sequence[ast.Name], work: ExperimentContext
) -> BasisTargets | None:
    """Resolve bases that are arguments of an observation of weights; None after an error.

    Each has one member, for vectors of the residual stream. E0342 for other bases.
    """
    basis_members: list[BasisMember] = []

    def add(name: ast.Name, family: Mapping[SitePoint, BasisMember]) -> None:
        basis_members.append(_argument_basis(name, list(family.values()), work))

    return _argument_targets(names, basis_members) if _use_families(names, add, work) else None


def _use_families(
    names: Sequence[ast.Name],
    use: Callable[[ast.Name, Mapping[SitePoint, BasisMember]], None],
    work: ExperimentContext,
) -> bool:
    """Call a function with each named basis and its members; return False after an error, also
    after a BasisError of the function, which is reported."""
    for name in names:
        definition = work.program.bases.get(name.id)
        try:
            family = None if definition is None else _family(definition, work)
            if family is None:  # rejected
                return False
            use(name, family)
        except BasisError as problem:
            work.diagnostics.append(problem.diagnostic)
            return False
    return True


def _argument_targets(names: Sequence[ast.Name], members: Iterable[BasisMember]) -> BasisTargets:
    """Return bases that are arguments of an observation, each for all of its points."""
    every = tuple(name.id for name in names)
    bases: list[PointBases] = [{None: member} for member in members]
    return BasisTargets(", ".join(every), every, tuple(bases), (), {(): Coordinates()})


def resolve_transcoders(
    names: Sequence[ast.Name], work: ExperimentContext
) -> tuple[BasisTargets, dict[int, BasisMember]] | None:
    """Resolve transcoders of MLPs that an observation names, also by layer; None after an error.

    E0342 for another basis, for a transcoder whose features aren't a linear map of the MLP's input
    before their activation function, and for two of one layer.
    """
    basis_members: dict[int, BasisMember] = {}

    def add(name: ast.Name, family: Mapping[SitePoint, BasisMember]) -> None:
        for point, member in family.items():
            _check_graph_basis(name, point, member)
            assert point.layer is not None
            file = member.operand
            if isinstance(file, DictionaryFile):
                folders.add(_name_cross_layer(file))
            if len(folders) > 1:
                reason = f"`{name.id}` and others aren't of one cross-layer transcoder"
                hint = "name either one cross-layer transcoder, or transcoders of single layers"
                raise BasisError(name, reason, hint)
            if point.layer in basis_members:
                own = basis_members[point.layer].name
                reason = f"`{own}` is a transcoder of layer {point.layer}, too"
                raise BasisError(name, reason, "name one of them")
            basis_members[point.layer] = member

    folders: set[str] = set()
    return (
        (_argument_targets(names, basis_members.values()), basis_members)
        if _use_families(names, add, work)
        else None
    )


def _name_cross_layer(file: DictionaryFile) -> str:
    """Return the name of the cross-layer transcoder that features belong to; empty for features of
    one layer."""
    if not file.crosses_layers:
        return ""
    trained = file.training if isinstance(file, TrainedDictionary) else None
    return str(file.path.parent) if trained is None else f"fit {trained.name}"


def resolve_feature_nodes(site: ast.Site, work: ExperimentContext) -> dict[SiteLayer, FeatureNodes]:
    """Resolve features that a circuit names as nodes, by output; empty after an error.

    E0342 for anything but named features of a dictionary of the output of MLPs or of attention.
    """
    axis, name = site.coordinates, site.basis_name
    definition = work.program.bases.get(name or "")
    before = len(work.diagnostics)
    work = replace(work, sites=work.sites.of_definitions())
    try:
        if definition is None or axis is None:  # reported where the file is lowered
            return {}
        written, axes = resolve_site(_written_site(site, definition, work), work.sites)
        if written is None or has_errors(work.diagnostics[before:]):
            return {}
        members = _members(definition, written, site, work)
        if members is None:
            return {}
        feature_nodes: dict[SiteLayer, FeatureNodes] = {}
        for point in dict.fromkeys(chain.from_iterable(written.points.values())):
            member = members.get(None) or members[point.layer, point.unit]
            _check_feature_nodes(site, point, member)
            named = _named_coordinates(site, axis, member.size, work)
            if named is None:
                return {}
            if axes or named.loops or named.sweep is not None:
                reason = f"`{site.span.written}` sweeps inside a circuit, whose edges are joined"
                hint = f"write the plural: `features 3, 12 of {name}`"
                if axes:
                    reason = f"`{name}` is a basis for each of {len(written.points)} layers"
                    hint = f"name one: `{point.site} layer {point.layer} {axis.span.written}`"
                raise BasisError(site, reason, hint)
            which = tuple(sorted(set(chain.from_iterable(named.choices.values()))))
            where = point.site, point.layer
            feature_nodes[where] = FeatureNodes(member, which or tuple(range(member.size)))
    except BasisError as problem:
        work.diagnostics.append(problem.diagnostic)
        return {}
    return feature_nodes


_STREAM_REASON = ": the residual stream is the sum of all senders, and not one of them"
_NO_NODES: Mapping[str, str] = {
    **dict.fromkeys(("embed", "resid_pre", "resid_mid", "resid_post"), _STREAM_REASON),
}
"""Site → why its features aren't nodes of a circuit with edges."""

_NODE_SITES = ("attn_out", "mlp_out")
"""Sites whose features are nodes of a circuit with edges."""


def _check_feature_nodes(site: ast.Site, point: SitePoint, member: BasisMember) -> None:
    """Raise BasisError unless features of a basis add up to the output of an MLP or of
    attention."""
    operand, name = member.operand, site.basis_name
    if not isinstance(operand, DictionaryFile):
        reason = f"`{name}` isn't a dictionary, and nodes of circuits are features of dictionaries"
        raise BasisError(site, reason, 'use `sae("folder")` or `transcoder("folder")`')
    if operand.crosses_layers:
        reason = (
            f"`{name}` is a cross-layer transcoder: the rest of a later MLP's output depends on "
        )
        reason += "its features and on the input of this MLP, so it isn't a node of a circuit"
        hint = "use a transcoder for each layer; or change the features without edges, "
        hint += f"`ablate mlp_out layer {point.layer} features 3, 12 of {name} at tokens * with "
        hint += f"zero`, or observe their graph: `observe attribution_graph({name}) …`"
        raise BasisError(site, reason, hint)
    if operand.write_obstacle:
        reason = f"the features of a {operand.write_obstacle}, so they aren't nodes of a circuit"
        hint = "use a dictionary whose features depend on one vector of one layer"
        raise BasisError(site, reason, hint)
    if point.site not in _NODE_SITES:
        reason = f"`{name}` describes `{point.site}`, and nodes of circuits are features of the "
        reason += f"output of MLPs or of attention{_NO_NODES.get(point.site, '')}"
        hint = f"use a dictionary `at mlp_out layer {point.layer or 0}`, or keep features without "
        hint += f"edges: `ablate features * of {name} except 3, 5 at tokens * with zero` with "
        hint += "`measure … as faithfulness`"
        raise BasisError(site, reason, hint)


def list_group_features(
    group: spec.Group, members: Mapping[int, BasisMember], named: ast.Node, work: ExperimentContext
) -> frozenset[LayerFeature] | None:
    """Resolve the features of a group, by layer and number; None after an error.

    E0207 for features of other bases, or that depend on a `for`; E0301 for numbers beyond a basis.

    Args:
        members: The bases of a graph by layer.
        named: The name of the group where it is used.
    """
    group_features: set[LayerFeature] = set()
    reason = hint = ""
    for site in join_features(group.sites, ast.Site(span=named.span)):
        axis, of = site.coordinates, site.basis_name
        assert axis is not None
        layers = next((own for own in site.axes if own.word == "layer"), None)
        there = resolve_axis(layers, [SITES["mlp_out"]], work.sites)
        if there is None:
            return None
        basis_members = {
            layer: member
            for layer, member in members.items()
            if member.name.partition("[")[0] == of and layer in there.choices.get((), (layer,))
        }
        if not basis_members:
            reason, hint = f"has features of `{of}`, which isn't in the graph", f"name `{of}`, too"
        for layer, member in basis_members.items():
            numbers = _named_coordinates(site, axis, member.size, work)
            if numbers is None:
                return None
            if numbers.loops:
                reason, hint = "depends on a `for`", "write numbers in the group"
            group_features |= {
                (layer, number) for choice in numbers.choices.values() for number in choice
            }
    if reason:
        bad = BadArgument(span=named.span, name=group.name, reason=reason, hint=hint)
        work.diagnostics.append(bad)
        return None
    return frozenset(group_features)


def read_decoders(
    names: Sequence[ast.Name], members: Mapping[int, BasisMember], work: ExperimentContext
) -> Mapping[int, SafetensorsFile] | None:
    """Read the facts of the decoders of a cross-layer transcoder, by the layer of their features;
    empty for transcoders of one layer and before a training; None after E0342."""
    decoders: dict[int, SafetensorsFile] = {}
    for layer, member in members.items():
        operand = member.operand
        if not isinstance(operand, DictionaryFile) or not operand.crosses_layers:
            continue
        if isinstance(operand, TrainedDictionary) and not operand.is_trained:
            continue
        try:
            decoders[layer] = read_cross_decoder(operand, layer, work.model.shape.n_layers)
        except UnreadableFile as problem:
            error = BasisError(names[0], problem.reason, problem.hint)
            work.diagnostics.append(error.diagnostic)
            return None
    return decoders


def _check_graph_basis(name: ast.Name, point: SitePoint, member: BasisMember) -> None:
    """Raises BasisError unless a basis replaces MLPs by features that are added up."""
    operand = member.operand
    if not isinstance(operand, DictionaryFile) or not operand.transcodes or point.site != "mlp_out":
        reason = f"`{name.id}` isn't a transcoder of an MLP"
        hint = f'write `basis {name.id} = transcoder("folder") at mlp_out layer 2`'
        raise BasisError(name, reason, hint)
    other = ""
    if operand.normalization != "none":
        other = f"a transcoder that normalises its input ({operand.normalization})"
    if not other and operand.architecture not in LINEAR_BEFORE_ACTIVATION:
        other = f"a {operand.kind}"
    if other:
        listed = name_list(sorted(LINEAR_BEFORE_ACTIVATION))
        raise BasisError(
            name,
            f"`{name.id}` is {other}, whose features aren't in a graph yet",
            f"name a transcoder with one of these encoders: {listed}",
        )


def _argument_basis(
    name: ast.Name, members: Sequence[BasisMember], work: ExperimentContext
) -> BasisMember:
    """Return the only member of a basis whose coordinates have directions in the residual stream.

    Raises BasisError.
    """
    if len(members) > 1:
        raise BasisError(
            name,
            f"`{name.id}` is a basis for each of {len(members)} sites",
            "compute it at one site: `at resid_pre layer 2`",
        )
    (member,) = members
    operand, width = member.operand, work.model.shape.d_model
    if member.width != width and not work.model.shape.stands_in:
        raise BasisError(
            name,
            f"its vectors have {member.width} numbers, and the residual stream has {width}",
            "compute it at a site of the residual stream: `at resid_pre layer 2`",
        )
    if isinstance(operand, PythonBasis):
        raise BasisError(
            name,
            "an object of a Python file shows no directions",
            "name a basis with directions, or a dictionary of a folder",
        )
    if isinstance(operand, DictionaryFile) and operand.write_obstacle:
        raise BasisError(
            name,
            f"the features of a {operand.write_obstacle}",
            "name a dictionary whose features depend on one vector of one layer",
        )
    if isinstance(operand, DictionaryFile) and operand.architecture == "mixture":
        raise BasisError(
            name,
            "the features of a mixture are probabilities, not products with a direction",
            "name a basis with directions; `observe features of` reads a mixture",
        )
    if isinstance(operand, DictionaryFile) and operand.normalization != "none":
        raise BasisError(
            name,
            "its features have no fixed directions in the residual stream",
            "name a dictionary of one layer that doesn't normalise its input",
        )
    return member


def _label_suffix(
    site: ast.Site, name: str, axes: Sequence[str], work: ExperimentContext, group: str = ""
) -> str:
    """Return what labels of sites say about coordinates: ` in axes`, ` feature i of axes`.

    Args:
        group: The group of the coordinates, if a `search` has chosen it.
    """
    features = site.coordinates
    within = "" if name == ast.STANDARD_BASIS else f" in {name}"
    if features is not None and all(axis in work.loops for axis in axes):
        own = f" {group or _coordinate_names(site, features, work)}"
        within = own if features.of is not None else within + own
    return within


def _searched_group(rule: spec.Rule, work: ExperimentContext) -> str:
    """Return the group of coordinates that a `search` chooses and a rule ablates whole, or an empty
    text. In the file, the rule of the search names all candidates instead."""
    assert rule.site is not None
    groups = (name for name, _ in rule.read_groups if name in work.program.discovered)
    return "" if rule.site.excluded else next(groups, "")


def _number_bases(targets: BasisTargets, outer: Mapping[str, int]) -> BasisTargets:
    """Add the axes of a `for` over several bases and of several seeds.

    Args:
        outer: These axes with their lengths.
    """
    if not outer:
        return targets
    keys = enumerate(product(*map(range, outer.values())))
    numbered = product(keys, targets.coordinates.items())
    every = {
        (*at, *key): Coordinates(coordinates.which, n) for (n, at), (key, coordinates) in numbered
    }
    return replace(targets, axes=(*outer, *targets.axes), coordinates=every)


def _bases_of_rule(
    name: str, site: ast.Site, work: ExperimentContext
) -> tuple[tuple[str, ...], tuple[spec.Basis | None, ...], dict[str, int]] | None:
    """Return the bases that a rule stands for, one for each seed: their names and definitions, and
    the axes of a `for` and of seeds with their lengths. None after an error.

    What is trained itself needs one basis.
    """
    names, definitions = _named_bases(name, site, work)
    if definitions is None:
        return None
    outer = {name: len(names)} if len(names) > 1 else {}
    parts = [
        ((each,), ()) if each is None else split_by_seed(each, work.program) for each in definitions
    ]
    seeds, *others = dict.fromkeys(seeds for _, seeds in parts)
    if work.experiment.trains or not (seeds or others):
        return names, definitions, outer
    if others or not work.add_seed_axis(seeds, site.span):
        reason = "the bases have different seeds" if others else SEEDS_DIFFER
        work.diagnostics.append(BadBasis(span=site.span, reason=reason, hint=SEEDS_HINT))
        return None
    names = tuple(f"{each}[{SEED_AXIS} {seed}]" for each, seed in product(names, seeds))
    every = tuple(basis for part, _ in parts for basis in part)
    return names, every, {**outer, SEED_AXIS: len(seeds)}


class _Exchange(Record):
    """Features that come in from another basis."""

    basis: str
    points: PointBases
    axes: tuple[str, ...]
    which: Mapping[tuple[int, ...], tuple[int, ...]]
    """By the indices along `axes`."""


def _insert(targets: BasisTargets, exchange: _Exchange) -> BasisTargets:
    """Add the features that come in, along the axes of both."""
    axes = (*targets.axes, *(axis for axis in exchange.axes if axis not in targets.axes))
    every = tuple(range(min(member.size for member in targets.members)))
    coordinates: dict[tuple[int, ...], Coordinates] = {}
    for (key, coordinate), (other, which) in product(
        targets.coordinates.items(), exchange.which.items()
    ):
        place = dict(zip(targets.axes, key, strict=True))
        pairs = zip(exchange.axes, other, strict=True)
        if all(place.setdefault(axis, index) == index for axis, index in pairs):
            key = tuple(place[axis] for axis in axes)
            coordinates[key] = Coordinates(coordinate.which or every, inserted=which)
    return replace(
        targets,
        names=(*targets.names, exchange.basis),
        bases=(*targets.bases, exchange.points),
        axes=axes,
        coordinates=coordinates,
    )


def _exchanged(
    rule: spec.Rule, written: SiteTargets, bases: Sequence[PointBases], work: ExperimentContext
) -> _Exchange | None:
    """Resolve the features that come in; None if there are none, or after other errors.

    Raises BasisError.
    """
    features = rule.exchanged
    assert rule.site is not None
    if features is None or features.of is None:
        return None
    definition = work.program.bases.get(features.of)
    members = None if definition is None else _members(definition, written, rule.site, work)
    if members is None:  # rejected
        return None
    if len(bases) > 1:
        raise BasisError(rule.site, "only one basis can be exchanged", "name it instead of a loop")
    if len({member.reads for points in (*bases, members) for member in points.values()}) > 1:
        raise BasisError(
            features,
            "the two dictionaries encode vectors of different sites",
            "name two autoencoders, or two transcoders that read the same site",
        )
    axis_values = resolve_axis(
        features, [], work.sites, size=min(member.size for member in members.values())
    )
    if axis_values is None:
        return None
    if axis_values.sweep is not None:
        raise BasisError(
            features,
            "the features that come in aren't swept",
            "write `features` for all of them together, or a `for` around the rule",
        )
    return _Exchange(features.of, members, axis_values.loops, axis_values.choices)


def _named_bases(
    name: str, node: ast.Site, work: ExperimentContext
) -> tuple[tuple[str, ...], tuple[spec.Basis | None, ...] | None]:
    """Return the bases that a name stands for, several for a `for` variable; None for one that was
    rejected. The definition of the standard basis is None."""
    names = tuple(map(str, work.sites.loops.get(name, (name,))))
    if names == (ast.STANDARD_BASIS,):
        return names, (None,)
    bases: list[spec.Basis] = []
    for each in names:
        definition = work.program.bases.get(each)
        if definition is not None:
            bases.append(definition)
            continue
        if name in work.sites.loops and each not in work.program.failed:
            span = work.sites.words.get((name, each), node.span)
            reason, hint = f"`{each}` isn't a basis", "let the `for` loop over bases only"
            if (name, each) not in work.sites.words:  # a number
                reason = f"`{name}` is the variable of a `for` over numbers"
                if name in work.program.bases:
                    reason += f", which hides the basis `{name}`"
                    hint = "rename the variable"
            work.diagnostics.append(BadBasis(span=span, reason=reason, hint=hint))
        return names, None
    return names, tuple(bases)


def _check_bases(rule: spec.Rule, resolved: ResolvedRule, bases: Sequence[PointBases]) -> None:
    """Check that one rule can use several bases."""
    if len(bases) == 1:
        return
    assert rule.site is not None
    members = [member for points in bases for member in points.values()]
    if rule.site.coordinates is not None and len({member.size for member in members}) > 1:
        raise BasisError(
            rule.site,
            "the bases have different numbers of coordinates",
            "leave out the coordinates: `SITE in basis b` changes all of them",
        )
    if len({member.reads for member in members}) > 1:
        raise BasisError(
            rule.site,
            "the bases read vectors of different sites",
            "write a rule for transcoders, and one for the others",
        )
    nonlinear = any(isinstance(member.operand, DictionaryFile | PythonBasis) for member in members)
    if resolved.does.reads == "mean" and nonlinear:
        raise BasisError(
            rule.site,
            "means of features of several dictionaries aren't computed in one rule",
            "write an experiment for each",
        )


def _encoded_sites(written: SiteTargets, members: PointBases, *, looks: bool) -> SiteTargets:
    """Return sites whose coordinates are those of the points that a transcoder encodes.

    Args:
        looks: Whether the coordinates are only read, and nothing is written.
    """
    reads = {member.reads for member in members.values()}
    if reads == {""}:
        return written
    assert len(reads) == 1
    (site,) = reads
    encoded = {
        key: tuple(replace(point, site=site) for point in here)
        for key, here in written.points.items()
    }
    return replace(written, points=encoded) if looks else replace(written, sources=encoded)


def _written_words(node: ast.Node) -> str:
    return " ".join(node.span.written.split())


def _coordinate_names(site: ast.Site, features: ast.Axis, work: ExperimentContext) -> str:
    """Return the joined coordinates as written: `dims 0..7 except 3`."""
    own = _written_words(features)
    written = [exception.span.written for exception in number_exceptions(site, work.sites)]
    numbers = ", ".join(dict.fromkeys(written))  # a group stands for several numbers
    return f"{own} except {numbers}" if numbers else own


def _at_site_of_basis(
    rule: spec.Rule, definition: spec.Basis | None, work: ExperimentContext
) -> spec.Rule:
    """Return a rule at the whole vectors that its site names in a basis."""
    assert rule.site is not None
    site = _written_site(rule.site, definition, work)
    return rule.model_copy(update={"site": site, "basis_span": rule.site.span})


def _written_site(
    site: ast.Site, definition: spec.Basis | None, work: ExperimentContext
) -> ast.Site:
    """Return the site without coordinates; that of the basis if only these are named."""
    axes = tuple(axis for axis in site.axes if axis is not site.coordinates)
    read = read_exceptions(site, work.sites)
    sites = (each for each in read if isinstance(each, ast.Site))
    excluded = tuple(each for each in sites if not picks_numbers(each, site, work.sites))
    if definition and not (site.names or axes or site.short or site.ranked):
        own = rewrite(definition.site, partial(_with_parameters, work=work))
        return replace(own, excluded=(*own.excluded, *excluded))
    own = excluded if site.coordinates is not None else site.excluded
    return replace(site, basis=None, axes=axes, excluded=own)


def _with_parameters(node: ast.Node, work: ExperimentContext) -> ast.Node:
    """Return a bound of a definition's site with the value of its `param`, if a variable of a `for`
    has the same name."""
    if not isinstance(node, ast.Bound) or node.name is None or node.name not in work.loops:
        return node
    value = work.program.parameters.get(node.name)
    if not isinstance(value, int):  # reported where the definition is resolved
        return node
    return replace(node, name=None, value=value + node.offset, offset=0)


def _check_rule(rule: spec.Rule, resolved: ResolvedRule, bases: Sequence[PointBases]) -> None:
    """Check that coordinates can be changed in this way."""
    does = resolved.does
    assert rule.site is not None
    assert resolved.sites is not None
    if resolved.path is not None:
        _check_sending_features(rule.site, resolved.sites, bases)
    if does.mode not in ("set", "add", "scale") or does.reads == "cell" or resolved.direction:
        raise BasisError(
            rule.site,
            f"`{rule.verb}` with a vector or a function doesn't act on coordinates",
            "write a number, or name the site without a basis",
        )
    if resolved.sites.sources is not None:
        raise BasisError(
            rule.site,
            "a rule in a basis reads and writes the same layer",
            "remove `into layer`",
        )


def _check_sending_features(
    site: ast.Site, sites: SiteTargets, bases: Sequence[PointBases]
) -> None:
    """Check that the sender of a path is features in the output of an MLP or of attention."""
    name = site.basis_name
    points = [point for here in sites.points.values() for point in here]
    other = next((point.site for point in points if point.site not in _SENDING_SITES), None)
    operands = [member.operand for here in bases for member in here.values()]
    if not all(isinstance(operand, DictionaryFile) for operand in operands):
        reason = f"`{name}` isn't a dictionary, and a path starts at features of dictionaries"
        raise BasisError(site, reason, 'use `sae("folder")` or `transcoder("folder")`')
    if other is not None:
        reason = f"`{name}` describes `{other}`, and a path starts at features of the output of an "
        reason += "MLP or of attention"
        if " " in other:
            reason = f"`{name}` describes `{other}`, and no path starts at features of this stack"
        hint = "use a dictionary `at mlp_out layer 0` or `at attn_out layer 0`, or name the sender "
        raise BasisError(site, reason, f"{hint}without features: `path {other} … -> …`")
    if any(len({point.layer for point in here}) > 1 for here in sites.points.values()):
        reason = "features of several layers start one path"
        raise BasisError(site, reason, "sweep the layers: `mlp_out layer * feature 3 of …`")


_SENDING_SITES = ("mlp_out", "attn_out")
"""Sites of dictionaries whose features can send along a path."""

_RECEIVING_SITES = (
    *("resid_pre", "attn_norm", "attn_out", "resid_mid", "mlp_norm", "mlp_out", "resid_post"),
)
"""Sites of dictionaries whose features can receive the change of a path."""


def resolve_receiving_features(
    site: ast.Site, work: ExperimentContext
) -> tuple[SiteTargets, tuple[Axis, ...], BasisTargets] | None:
    """Resolve features at the end of a path: the sites of their dictionary, the axes of both, and
    the features; None after an error."""
    name = site.basis_name
    assert name is not None
    if work.model.shape.encodes_apart:
        what = "a path to features in an encoder-decoder"
        later = "name the receiver without features: `path … -> q layer 2 head 0`"
        work.diagnostics.append(NotSupported(span=site.span, what=what, later=later))
        return None
    named = _bases_of_rule(name, site, work)
    if named is None or named[1][0] is None:  # rejected
        return None
    names, (definition, *others), _ = named
    before = len(work.diagnostics)
    written, axes = resolve_site(_written_site(site, definition, work), work.sites)
    if written is None or has_errors(work.diagnostics[before:]):
        return None
    try:
        if others:
            reason = f"`{name}` names {len(names)} bases, and a path ends at features of one basis"
            raise BasisError(site, reason, "name one basis, with one seed")
        members = _members(definition, written, site, work)
        if members is None:
            return None
        _check_receiving_features(site, written, members)
        members = _with_decoders(site, None, written, members, work)
        own, sweep, coordinates, empty = _coordinates(site, members, work)
        if empty:
            raise BasisError(site, *_NO_FEATURE)
    except BasisError as problem:
        work.diagnostics.append(problem.diagnostic)
        return None
    if coordinates is None:
        return None
    within = _label_suffix(site, name, own, work)
    labels = {key: f"{label}{within}" for key, label in written.labels.items()}
    every = {key: Coordinates(which) for key, which in coordinates.items()}
    targets = BasisTargets(name, names, (members,), own, every)
    axes = axes if sweep is None else (*axes, sweep)
    return replace(written, labels=labels), axes, targets


def _check_receiving_features(site: ast.Site, written: SiteTargets, members: PointBases) -> None:
    """Check that the receiver of a path is features that are computed from one vector."""
    name = site.basis_name
    points = [point for here in written.points.values() for point in here]
    other = next((point.site for point in points if point.site not in _RECEIVING_SITES), None)
    operands = [member.operand for member in members.values()]
    if not all(isinstance(operand, DictionaryFile) for operand in operands):
        reason = f"`{name}` isn't a dictionary, and a path ends at features of a dictionary"
        raise BasisError(site, reason, 'use `sae("folder")` or `transcoder("folder")`')
    if other is not None:
        reason = f"`{name}` describes `{other}`, and a path ends at features of an output of "
        reason += "attention or an MLP, of what they read, or of the residual stream"
        hint = "name the receiver without features: `path … -> q layer 2 head 0`"
        raise BasisError(site, reason, hint)
    _check_separable(site, [members], "change")


def _check_separable(site: ast.Site, bases: Sequence[PointBases], verb: str) -> None:
    """Check that rules can `change` or `read` the features of single vectors."""
    for member in (member for points in bases for member in points.values()):
        operand = member.operand
        if not isinstance(operand, DictionaryFile) or operand.crosses_layers:
            continue
        if operand.write_obstacle:
            hint = "use a dictionary whose features depend on one vector of one layer, or observe "
            hint += "the features: `observe features of …`"
            raise BasisError(
                site,
                f"the features of a {operand.write_obstacle}, so rules can't {verb} them",
                hint,
            )


_OF_ONE_LAYER: Mapping[str, str] = {
    "set": "`reconstruction of` needs the features of all layers",
    "project out": "a feature has a direction in each layer, so `project out` isn't defined",
    "exchange": "features of several layers can't be exchanged",
}
"""Verbs of rules that need a dictionary of one layer → reason."""


def _with_decoders(
    site: ast.Site,
    rule: spec.Rule | None,
    sites: SiteTargets,
    bases: PointBases,
    work: ExperimentContext,
) -> PointBases:
    """Add the decoders of cross-layer transcoders, whose features write to all later layers.

    Args:
        site: The site with the features.
        rule: The rule that changes them; None for the receivers of a path.

    Raises BasisError.
    """
    layers = {point.layer or 0 for here in sites.points.values() for point in here}
    basis_members = dict(bases)
    for key, member in bases.items():
        operand = member.operand
        if not isinstance(operand, DictionaryFile) or not operand.crosses_layers:
            continue
        for layer in layers if key is None else {key[0] or 0}:
            basis_members[key] = _with_decoder(site, rule, member, operand, layer, work)
    return basis_members


def _with_decoder(
    site: ast.Site,
    rule: spec.Rule | None,
    member: BasisMember,
    dictionary_file: DictionaryFile,
    layer: int,
    work: ExperimentContext,
) -> BasisMember:
    shape = work.model.shape
    name = member.name.partition("[")[0]
    reason = ""
    if rule is not None:
        word = "exchange" if rule.exchanged is not None else rule.verb
        is_number = word == "set" and not is_reconstruction(rule.fill)
        reason = "" if is_number else _OF_ONE_LAYER.get(word, "")
        if rule.drops_error:
            reason = "the error of an MLP's output depends on the features of all layers"
    if reason:
        hint = f"change named features: `clamp mlp_out layer 0 feature 3 of {name} at … to 2`"
        raise BasisError(site, f"`{name}` is a cross-layer transcoder, and {reason}", hint)
    where = site_of_hook(dictionary_file.hook or "")
    if where is not None and where[1] != layer:
        reason = f"its features are those of layer {where[1]}, and the rule writes layer {layer}"
        raise BasisError(site, reason, f"write `mlp_out layer {where[1]}`")
    lacking = next((n for n in range(layer, shape.n_layers) if not shape.has("mlp_out", n)), None)
    if lacking is not None:
        reason = f"`{name}` writes to the MLPs of all later layers, and layer {lacking} has none"
        raise BasisError(site, reason, "use a transcoder of one layer")
    if isinstance(dictionary_file, TrainedDictionary) and not dictionary_file.is_trained:
        return member
    try:
        decoders = read_cross_decoder(dictionary_file, layer, shape.n_layers)
    except UnreadableFile as problem:
        raise BasisError(site, problem.reason, problem.hint) from problem
    return replace(member, operand=dictionary_file.with_decoders(decoders))


def _check_all_features(
    rule: spec.Rule,
    features: ast.Axis | None,
    bases: Sequence[PointBases],
) -> None:
    """Check that a number isn't written into all features of a dictionary."""
    if rule.verb == "project out":
        _check_removal(rule, features, bases)
    if features is None or not features.plural or rule.verb not in ("add", "set"):
        return
    if _names_all_features(features, bases):
        raise BasisError(
            features,
            "one number in all features isn't a vector that the dictionary describes",
            f"name the features: `{rule.verb} … features 3, 12 of {features.of}`; "
            "`ablate … with zero` sets all to 0",
        )


def _names_all_features(features: ast.Axis | None, bases: Sequence[PointBases]) -> bool:
    """Return whether coordinates are all features of a dictionary together."""
    every = features is None or any(isinstance(value, ast.Star) for value in features.values)
    overcomplete = DictionaryFile | PythonBasis
    members = (member for points in bases for member in points.values())
    return every and any(isinstance(member.operand, overcomplete) for member in members)


def _check_removal(rule: spec.Rule, features: ast.Axis | None, bases: Sequence[PointBases]) -> None:
    """Check that the directions of coordinates can be projected out."""
    assert rule.site is not None
    if rule.drops_error:
        reason, hint = "`project out` doesn't reconstruct vectors", "remove `without error`"
        raise BasisError(rule.site, reason, hint)
    members = [member for points in bases for member in points.values()]
    if any(isinstance(member.operand, PythonBasis) for member in members):
        raise BasisError(
            rule.site,
            "an object of a Python file shows no directions",
            "set features to 0: `ablate … with zero`",
        )
    if (features is None or features.plural) and _names_all_features(features, bases):
        raise BasisError(
            features or rule.site,
            "the directions of all features together span most vectors",
            f"name the features: `project out features 3, 12 of {rule.site.basis_name}`",
        )


_Choices: TypeAlias = dict[tuple[int, ...], tuple[int, ...]]
"""Named coordinates by their indices along axes, () for all."""


def _rule_coordinates(
    rule: spec.Rule, site: ast.Site, members: PointBases, work: ExperimentContext
) -> tuple[tuple[str, ...], _Choices | None, frozenset[tuple[int, ...]]]:
    """Resolve the coordinates that a rule changes, and add the axis of their sweep.

    Returns:
        The axes of the coordinates; the coordinates, None after an error; the keys of empty picks.
    """
    axes, sweep, coordinates, empty = _coordinates(site, members, work)
    if empty and (rule.exchanged is not None or rule.drops_error):
        raise BasisError(site, *_NO_FEATURE)
    if sweep is not None and not rule.fill_index:  # the fills of an ablation share their axes
        work.add_axis(sweep)
    return axes, coordinates, empty


_NO_FEATURE = "one of its cells names no feature", "name at least one: `features top 1 of …`"
"""Reason and hint for an empty pick."""


def _coordinates(
    site: ast.Site, members: PointBases, work: ExperimentContext
) -> tuple[
    tuple[str, ...],
    Axis | None,
    _Choices | None,
    frozenset[tuple[int, ...]],
]:
    """Resolve the coordinates that a site names.

    Returns:
        The axes of the coordinates, and the axis of a sweep; the coordinates by axis, () for all,
        or None after an error; the keys of empty picks.
    """
    none: frozenset[tuple[int, ...]] = frozenset()
    features = site.coordinates
    if features is None:
        return (), None, {(): ()}, none
    sizes = sorted({member.size for member in members.values()})
    axis_values = _named_coordinates(site, features, sizes[0], work)
    if axis_values is None:
        return (), None, None, none
    whole = tuple(range(sizes[0])) if len(sizes) == 1 else None
    empty = frozenset(key for key, choice in axis_values.choices.items() if not choice)
    choices = {
        key: () if choice == whole else choice for key, choice in axis_values.choices.items()
    }
    swept = () if axis_values.sweep is None else (axis_values.sweep.name,)
    return (*axis_values.loops, *swept), axis_values.sweep, choices, empty


def _named_coordinates(
    site: ast.Site, features: ast.Axis, size: int, work: ExperimentContext
) -> AxisValues | None:
    """Resolve the coordinates that a site names, without its exceptions; None after an error."""
    axis_values = resolve_axis(features, [], work.sites, size=size)
    numbers = number_exceptions(site, work.sites)
    if axis_values is None or not numbers:
        return axis_values
    return exclude_values(axis_values, numbers, work.sites)


# --- definitions ----------------------------------------------------------------------------------


def _standard_members(written: SiteTargets, site: ast.Site, work: ExperimentContext) -> PointBases:
    """Return the standard basis of each written point. Raises BasisError."""
    points = {point for here in written.points.values() for point in here}
    widths: set[int] = set()
    for point in points:
        _check_site(point, site, work)
        widths.add(count_numbers(point, work.model.shape))
    if len(widths) != 1:
        raise BasisError(
            site, "the sites have vectors of different widths", "write a rule for each width"
        )
    (width,) = widths
    method = BASIS_METHODS["neurons"]
    made = method.describe("", {})
    operand = DrawnBasis("", 0)
    return {None: BasisMember(f"dims of {width}", "neurons", {}, operand, width, width, made)}


def _members(
    definition: spec.Basis | None, written: SiteTargets, site: ast.Site, work: ExperimentContext
) -> PointBases | None:
    """Resolve the basis of each written point; None if a required fact isn't available.

    Args:
        definition: None for the standard basis.

    Raises:
        BasisError: A point has no basis, or one of another width.
    """
    if definition is None:
        return _standard_members(written, site, work)
    try:
        return _defined_members(definition, written, site, work)
    except MethodError as mistake:
        raise BasisError(definition.method, str(mistake), mistake.hint) from mistake


def _defined_members(
    definition: spec.Basis, written: SiteTargets, site: ast.Site, work: ExperimentContext
) -> PointBases | None:
    points = {point for here in written.points.values() for point in here}
    for point in points:
        _check_site(point, site, work)
    family = _family(definition, work)
    if family is None:
        return None
    if len(family) == 1:
        ((_, member),) = family.items()
        members: PointBases = {None: member}
    else:
        members = {(point.layer, point.unit): member for point, member in family.items()}
    for point in points:
        key = None if None in members else (point.layer, point.unit)
        if key not in members:
            layers = ", ".join(map(str, sorted({site_point.layer or 0 for site_point in family})))
            raise BasisError(
                site,
                f"`{definition.name}` has no basis for layer {point.layer}",
                f"it has layers {layers}",
            )
        reads = members[key].reads
        output = in_stack("mlp_out", SITES[reads].stack) if reads else point.site
        if point.site != output:
            raise BasisError(
                site,
                f"`{definition.name}` is a transcoder, which reconstructs `{output}`, not "
                f"`{point.site}`",
                f"write `{output} layer {point.layer or 0}`",
            )
        width = count_numbers(point, work.model.shape)
        if members[key].width != width and not work.model.shape.stands_in:
            raise BasisError(
                site,
                f"`{definition.name}` is for vectors of {members[key].width} numbers, those of "
                f"`{point.site}` have {width}",
                "use it at a site as wide as the one that it was made at",
            )
    return members


def _check_site(point: SitePoint, node: ast.Node, work: ExperimentContext) -> None:
    """Check that a point is one vector."""
    kind = SITES[point.site]
    if kind.width == "key" or (kind.width == "one" and point.unit is not None):
        what = "vectors over keys" if kind.width == "key" else "single numbers"
        stream = in_stack("resid_post", "" if kind.stack == "cross" else kind.stack)
        hint = f"name `{stream} layer {point.layer or 0}`"
        if kind.width == "one":
            hint = "leave the neuron out"
        raise BasisError(node, f"`{point.site}` has {what}, which no basis describes", hint)
    several = point.unit is None and unit_count(work.model.shape, point.site, point.layer) > 1
    if several and kind.component not in JOINED_SITES:
        unit = "expert" if kind.unit == "expert" else "head"
        raise BasisError(
            node,
            f"`{point.site}` has a vector for each {unit}, and no {unit} is named",
            f"name one, or sweep them: `{unit} *`",
        )


def _family(definition: spec.Basis, work: ExperimentContext) -> dict[SitePoint, BasisMember] | None:
    """Resolve a definition: a basis for each point of its site; None after other errors.

    Raises BasisError.
    """
    before = len(work.diagnostics)
    seeds = list_seeds(definition, work.program)
    if seeds:
        raise BasisError(definition.method, *explain_seeds(definition.name, "a basis", seeds))
    sites, axes = resolve_site(definition.site, work.sites.of_definitions())
    if sites is None or has_errors(work.diagnostics[before:]):
        return None
    call = definition.method
    method = BASIS_METHODS[call.name]
    options = _options(call, method, work)
    labels = _labels(call, work)
    basis_members: dict[SitePoint, BasisMember] = {}
    for key, here in sites.points.items():
        if key in sites.missing:
            continue
        if len(here) != 1:
            raise BasisError(
                definition.site,
                "a basis has one site, or one per layer or head",
                "write the singular: `layer *` makes a basis of each layer",
            )
        (point,) = here
        _check_site(point, definition.site, work)
        operand = _operand(definition, method, point, options, work)
        if operand is None:
            return None
        what, rows, text = operand
        said = [f"{axis.name} {axis.labels[i]}" for axis, i in zip(axes, key, strict=True)]
        seed = definition.seed
        if seed is None and isinstance(what, SpannedBasis):
            seed = find_training_seed(what)
        said += [] if seed is None else [f"{SEED_AXIS} {seed}"]
        name = f"{definition.name}[{', '.join(said)}]" if said else definition.name
        width = count_numbers(point, work.model.shape)
        independent = not isinstance(what, DictionaryFile | PythonBasis)
        stands_in = work.model.shape.stands_in
        most = _UNKNOWN_WIDTH if stands_in else width
        size = basis_size(method, most, rows, options) if independent else rows
        if not isinstance(size, int):
            raise BasisError(call, *size)
        size = width if stands_in and size == most else size
        made = f"{method.describe(text, options)}, at {sites.labels[key]}"
        made += f"; {count_noun(size, 'coordinate')}"
        reads = find_encoded_site(what, point) if isinstance(what, DictionaryFile) else ""
        made += "" if labels is None else f"; {count_noun(len(labels.texts), 'label')}"
        basis_members[point] = BasisMember(
            name, call.name, options, what, width, size, made, reads, labels
        )
    _check_layers(definition, basis_members, work)
    return basis_members if _fits_saved_groups(definition, basis_members, work) else None


def _fits_saved_groups(
    definition: spec.Basis, family: Mapping[SitePoint, BasisMember], work: ExperimentContext
) -> bool:
    """Whether a basis is the dictionary that the groups in files were trained with, or isn't
    trained yet; reports E0342 otherwise."""
    fits = True
    for group in work.program.groups.values():
        if group.dictionary is None or group.dictionary[0] != definition.name:
            continue
        ((_, layer, unit),) = group.candidates
        there = [
            member.operand
            for point, member in family.items()
            if len(family) == 1 or (point.layer, point.unit) == (layer, unit)
        ]
        for operand in there:
            digest = operand.digest if isinstance(operand, DictionaryFile) else None
            if digest in ("", group.dictionary[1]):
                continue
            reason = f"the file of `{group.name}` has features of a dictionary with SHA-256 "
            reason += f"{group.dictionary[1][:12]}…, and `{definition.name}` "
            reason += "isn't a dictionary" if digest is None else f"has {digest[:12]}…"
            hint = "name the dictionary that the group was trained with"
            bad = BadBasis(span=group.span, reason=reason, hint=hint, what="group")
            if bad not in work.diagnostics:
                work.diagnostics.append(bad)
            fits = False
    return fits


def _check_layers(
    definition: spec.Basis, family: Mapping[SitePoint, BasisMember], work: ExperimentContext
) -> None:
    """Check that a cross-layer transcoder that is trained has all layers. Raises BasisError."""
    for member in family.values():
        operand, count = member.operand, work.model.shape.n_layers
        if not isinstance(operand, TrainedDictionary) or not operand.crosses_layers:
            return
        if len(family) < count and not work.model.shape.stands_in:
            reason = "a cross-layer transcoder is trained on the MLPs of all layers together"
            reason += f", and `{definition.name}` has {count_noun(len(family), 'layer')} of {count}"
            raise BasisError(definition.site, reason, "write `at mlp_out layer *`")


def _labels(call: ast.Call, work: ExperimentContext) -> FeatureLabels | None:
    """Read the descriptions of features that a call names; None if it names none, or after another
    error. Raises BasisError."""
    argument = next((each for each in call.arguments if each.name == "labels"), None)
    if argument is None:
        return None
    written = str(constant_value(argument.value, work.program.parameters))
    path, problems = path_to_read(LABELS_PATH, written, argument.span)
    work.diagnostics.extend(
        diagnostic for diagnostic in problems if diagnostic not in work.diagnostics
    )
    if path is None or problems:
        return None
    try:
        return read_labels(path, written)
    except UnreadableFile as problem:
        raise BasisError(argument, problem.reason, problem.hint) from None


def _options(call: ast.Call, method: BasisMethod, work: ExperimentContext) -> dict[str, Constant]:
    """Return the constants of a call, other than `limit`."""
    options: dict[str, Constant] = {}
    for argument in call.arguments:
        if argument.name in (None, "limit", "labels", "prompts", "seeds", *EFFECT_OPTIONS):
            continue
        if argument.name == "weights":
            options["weights"] = argument.value.span.written
            continue
        value = constant_value(argument.value, work.program.parameters)
        assert value is not None
        options[argument.name] = value
    return options


def _operand(
    definition: spec.Basis,
    method: BasisMethod,
    point: SitePoint,
    options: Mapping[str, Constant],
    work: ExperimentContext,
) -> tuple[BasisOperand, int, str] | None:
    """Return what a basis is computed from, the rows of it, and its description.

    None if a required fact isn't available. Raises BasisError.
    """
    call = definition.method
    _check_stack(method, point, call, work)
    try:
        match method.takes:
            case "block" | "value and block":
                return _fitted(definition, point, options, work)
            case "jacobian":
                return _jacobian(definition, point, work)
            case "directions":
                return _spanned(call, method, point, work)
            case "tokens":
                return _unembedding(call, work)
            case "file":
                return _saved(call, point, work)
            case "weights":
                return _weights(call, point, options, work)
            case "dictionary":
                return _dictionary(call, point, work)
            case "python":
                return _python(call, options, work)
            case "training":
                decoder = decoded_basis(call, work.program.prompts)
                if decoder is not None:
                    return _trained_on_decoder(definition, decoder, point, options, work)
                return _trained(definition, point, options, work)
            case "nothing":
                # By the order of definitions: a new name doesn't change the draw.
                number = list(work.program.bases).index(definition.name)
                draw = f"{number} {point.site} {point.layer} {point.unit}"
                return DrawnBasis(draw, work.program.seed), 0, ""
    except DirectionError as problem:
        raise BasisError(problem.node, problem.reason, problem.hint) from problem


_OF_THE_MAIN_STACK: Mapping[str, str] = {
    "weights": "the weights are those of the decoder's layers",
    "tokens": "the unembedding reads the decoder's residual stream",
}
"""What a method takes → why it isn't for another stack."""


def _check_stack(
    method: BasisMethod, point: SitePoint, call: ast.Call, work: ExperimentContext
) -> None:
    """Check that a method computes bases for the stack of a point. Raises BasisError."""
    stack, reason = SITES[point.site].stack, _OF_THE_MAIN_STACK.get(method.takes)
    if work.model.shape.encodes_apart and method.takes == "jacobian":
        reason = "Jacobians of an encoder-decoder aren't computed"
    elif reason is None or not stack:
        return
    raise BasisError(call, reason, "compute it from activations: `pca(PROMPTS, dims: 8)`")


def _fitted(
    definition: spec.Basis,
    point: SitePoint,
    options: Mapping[str, Constant],
    work: ExperimentContext,
) -> tuple[BasisOperand, int, str] | None:
    fit_sample = _sample(definition, point, work)
    if fit_sample is None:
        return None
    sample, text = fit_sample
    rows = count_used_rows(sample.cell)
    if sample.targets:
        value = definition.method.arguments[0].value.span.written
        rows, text = len(sample.classes), f"`{value}` in {text}"
    elif options.get("each_token"):
        sample = replace(sample, each_token=True)
        rows = sum(len(run) for row in sample.cell.hits for run in row)
    return FittedBasis((sample,), (point,)), rows, text


def _sample(
    definition: spec.Basis, point: SitePoint, work: ExperimentContext
) -> tuple[FitSample, str] | None:
    """Return the rows that a basis at a site is computed on, with their description."""
    rows = fit_rows_of_basis(definition, work.program)
    if rows is None:
        return None
    reading = replace(work, side=find_side([point], work.model.shape))
    samples = resolve_samples(definition.method, rows, definition.at, reading)
    if samples is None:
        return None
    if len(samples) != 1:
        assert definition.at is not None
        raise BasisError(
            definition.at, "a basis is computed at one position", "join them: `{A, B}`"
        )
    ((label, sample),) = samples.items()
    return sample, f"{describe_rows(sample, rows)} at {label}"


def _require_rows(definition: spec.Basis, sample: FitSample, work: ExperimentContext) -> None:
    """Raise BasisError if too few rows have the position."""
    rows = count_used_rows(sample.cell)
    if len(sample.table) < FEWEST_ROWS and not sample.table.stands_in:
        read = fit_rows_of_basis(definition, work.program)
        limit = None if read is None else read.limit
        raise BasisError(definition.method, *explain_few_rows(sample.table, limit))
    if rows < FEWEST_ROWS:
        many = "no row" if not rows else "one row only"
        raise BasisError(
            definition.method,
            f"{many} of `{sample.table.name}` has `{sample.cell.label}`",
            "name a position that more rows have",
        )


def _trained(
    definition: spec.Basis,
    point: SitePoint,
    options: Mapping[str, Constant],
    work: ExperimentContext,
) -> tuple[BasisOperand, int, str] | None:
    """Resolve a dictionary or a rotation that `fit` trains. Raises BasisError."""
    fit_sample = _sample(definition, point, work)
    if fit_sample is None:
        return None
    sample, text = fit_sample
    _require_rows(definition, sample, work)
    made = outline_training(definition, options, sample, point, work.program, work.model)
    assert made.training is not None
    if problem := explain_shared_images(made.training):
        raise BasisError(definition.method, *problem)
    if isinstance(made.training.trainer, PairedTrainer):
        assert isinstance(made, TrainedDictionary)
        fit_sample = _paired(definition, made.features, sample, point, work)
        if fit_sample is None:
            return None
        sample, paired = fit_sample
        made = replace(made, training=replace(made.training, source=sample, paired=paired))
        assert made.training is not None
        text += f", with {paired.label}"
    stream = made.training.stream
    if stream is not None and work.model.shape.encodes_apart:
        reason = "streamed rows of an encoder-decoder aren't read"
        raise BasisError(definition.method, reason, "train on a `prompts` block")
    if stream is not None:
        text = f"{stream.count:,} streamed rows of {sample.table.name} at {sample.cell.label}"
    trainer = made.training.trainer
    _check_stream(definition, made.training)
    size = made.size if isinstance(made, TrainedRotation) else made.features
    width = count_numbers(point, work.model.shape)
    if isinstance(made, TrainedRotation) and size > width and not work.model.shape.stands_in:
        raise BasisError(
            definition.method,
            f"{size:,} directions of vectors of `{point.site}`, which have {width:,} numbers",
            f"write at most `dims: {width}`",
        )
    if isinstance(made, TrainedDictionary) and made.transcodes:
        _check_transcoder(definition.method, made, point, work)
    known = width if not work.model.shape.stands_in else _UNKNOWN_WIDTH
    wrong = None
    if isinstance(trainer, DictionaryTrainer):
        wrong = trainer.check_site(point.site, known, made.training.of_trainer)
    if wrong is not None:
        raise BasisError(definition.method, *wrong)
    return made, size, check_training(definition, made, text, work)


def _trained_on_decoder(
    definition: spec.Basis,
    decoder: ast.QualifiedRef,
    point: SitePoint,
    options: Mapping[str, Constant],
    work: ExperimentContext,
) -> tuple[BasisOperand, int, str] | None:
    """Resolve a dictionary that `fit` trains on the decoder of another one. Raises BasisError."""
    of = work.program.bases[decoder.of.whole]
    family = _family(of, work)
    if family is None:
        return None
    if point not in family:
        reason = f"`{of.name}` has no decoder at `{label_points((point,))}`"
        hint = f"write the site of `{of.name}`: `at {of.site.span.written}`"
        raise BasisError(decoder, reason, hint)
    member = family[point]
    file = member.operand
    assert isinstance(file, DictionaryFile)
    if file.crosses_layers:
        reason = f"`{of.name}` has a decoder for each of several layers"
        raise BasisError(decoder, reason, "name a dictionary of one site")
    if file.features <= FEWEST_ROWS:
        reason = f"`{of.name}` has {count_noun(file.features, 'feature')} only"
        raise BasisError(decoder, reason, "name a larger dictionary")
    made = outline_training(definition, options, member, point, work.program, work.model)
    assert isinstance(made, TrainedDictionary)
    text = f"{file.features:,} decoder directions of {member.name} ({member.made})"
    return made, made.features, check_training(definition, made, text, work)


def _check_stream(definition: spec.Basis, training: Training) -> None:
    """Check that a training can read its rows in parts, if it does. Raises BasisError."""
    sample, trainer = training.sample, training.trainer
    if training.stream is None:
        return
    if sample.run.model is not None:
        raise BasisError(
            definition.method,
            f"the rows of `{sample.table.name}` are read in parts, for one model",
            "name the block alone: `prompts: texts`",
        )
    if isinstance(trainer, SolvedTrainer | PairedTrainer):
        raise BasisError(
            definition.method,
            f"`{trainer.name}` uses all vectors together, and `{sample.table.name}` is read in "
            "parts",
            "remove `streamed`, and write `limit: 1000` in `fit(…)`",
        )


def _paired(
    definition: spec.Basis,
    count: int,
    sample: FitSample,
    point: SitePoint,
    work: ExperimentContext,
) -> tuple[FitSample, PairedVectors] | None:
    """Resolve what vectors are correlated with; None after other errors. Raises BasisError.

    Args:
        count: Number of components.
        point: The site of the basis.

    Returns:
        The rows and tokens that both have, and what they are correlated with.
    """
    node = next(
        argument.value for argument in definition.method.arguments if argument.name == "with"
    )
    known = sample.run.rows[0].values
    if isinstance(node, ast.Name) and node.id in SITES and node.id not in known:
        node = ast.Site(names=(node,), span=node.span)
    if isinstance(node, ast.SiteView):
        viewed = _viewed(definition, node, sample, work)
        if viewed is None:
            return None
        sample, vectors = viewed
    elif isinstance(node, ast.Site):
        other = _one_point(node, work)
        if other is None:
            return None
        _check_site(other, node, work)
        _check_tokens(node, other, point, work)
        vectors = PairedVectors(label_points((other,)), other)
    else:
        items = node.items if isinstance(node, ast.ListLiteral) else (node,)
        columns = [column for item in items for column in _value_columns(item, sample)]
        label = ", ".join(item.span.written for item in items)
        vectors = PairedVectors(label, None, tuple(zip(*columns, strict=True)))
    if vectors.point == point and _are_same_tokens(sample, vectors.sample):
        raise BasisError(
            node,
            "the vectors of a site correlate with themselves in all components",
            "name another site",
        )
    shape = vectors.shape or work.model.shape
    size = len(vectors.values[0]) if vectors.point is None else count_numbers(vectors.point, shape)
    if count > size and not work.model.shape.stands_in:
        raise BasisError(
            node,
            f"{count:,} components with `{vectors.label}`, which has {count_noun(size, 'number')}",
            f"write at most `components: {size}`",
        )
    return sample, vectors


def _check_tokens(
    node: ast.Site, other: SitePoint, point: SitePoint, work: ExperimentContext
) -> None:
    """Check that two sites have vectors at the same tokens. Raises BasisError."""
    shape, names = work.model.shape, {"source": "the prompt", "target": "the decoder"}
    own, theirs = (names.get(find_side([site_point], shape), "") for site_point in (point, other))
    if own != theirs:
        reason = f"`{other.site}` is at tokens of {theirs}, and `{point.site}` at tokens "
        hint = f"name their position: `with: {node.span.written} at last token`"
        raise BasisError(node, f"{reason}of {own}", hint)


def _are_same_tokens(sample: FitSample, other: FitSample | None) -> bool:
    return other is None or (other.run.name, other.cell.hits) == (sample.run.name, sample.cell.hits)


def _viewed(
    definition: spec.Basis, node: ast.SiteView, sample: FitSample, work: ExperimentContext
) -> tuple[FitSample, PairedVectors] | None:
    """Resolve `SITE of RUN at POSITION`, with the rows that have both positions; None after other
    errors. Raises BasisError."""
    partner = definition.partner
    run = sample.run if partner is None else sample.table.runs[partner.name]
    reader = work.model
    if partner is not None and partner.prompts is not None:
        reader = find_tower(reader, work.program.prompts[partner.prompts].kind)
    if sample.run.noise is not None or run.noise is not None:
        reason = "a run with noise has several vectors for each token"
        raise BasisError(node, reason, "name runs without noise")
    there = replace(work, model=reader, sites=replace(work.sites, shape=reader.shape))
    point = _one_point(node.site, there)
    if point is None:
        return None
    _check_site(point, node.site, there)
    at = node.at or definition.at or last_token(definition.method)
    table = replace(sample.table, name=run.prompts or sample.table.name)
    cells, problems = resolve_positions(
        at,
        table,
        run.name,
        tokenizer=reader.tokenizer,
        loop_values=work.program.numbers,
        side=find_side([point], reader.shape),
    )
    work.diagnostics.extend(problem for problem in problems if problem not in work.diagnostics)
    if has_errors(problems):
        return None
    if len(cells) != 1:
        raise BasisError(at, "vectors are correlated at one position", "join them: `{A, B}`")
    position_cell, other = cut_to_shared_rows(sample.cell, cells[0])
    _check_counts(node, at, sample, (position_cell, other))
    label = label_points((point,))
    label += "" if partner is None else f" of {partner.name}"
    label += "" if node.at is None else f" at {at.span.written}"
    viewed = FitSample(sample.table, run, other)
    return replace(sample, cell=position_cell), PairedVectors(
        label, point, sample=viewed, shape=reader.shape
    )


def _check_counts(
    node: ast.SiteView,
    at: ast.Positions,
    sample: FitSample,
    pair: tuple[PositionCell, PositionCell],
) -> None:
    """Check that each row has as many tokens at the other position as at its own. Raises
    BasisError.

    Args:
        at: The other position.
        pair: The tokens of both positions.
    """
    counts = zip(*([sum(map(len, row)) for row in cell.hits] for cell in pair), strict=True)
    every = list(enumerate(counts))
    unlike = next((number for number, (first, second) in every if first != second), None)
    if unlike is not None:
        mine, theirs = (count_noun(count, "token") for count in every[unlike][1])
        raise BasisError(
            node,
            f"row {sample.table.row_ids[unlike]} has {mine} at the position of the basis and "
            f"{theirs} at `{at.span.written}`",
            "name one token of each, such as `last token`",
        )
    if sum(first > 0 for _, (first, _) in every) < FEWEST_ROWS:
        reason = f"fewer than two rows have `{at.span.written}` and the position of the basis"
        raise BasisError(node, reason, "name positions that more rows have")


def _value_columns(node: ast.Node, sample: FitSample) -> list[list[float]]:
    """Return a value of the rows as columns of numbers: one for a number, one for each item of a
    list, and for words one of 0 and 1 for each word, in alphabetical order. Raises BasisError."""
    rows = [row.values for row in sample.run.rows]
    name = node.id if isinstance(node, ast.Name) else ""
    if name not in rows[0]:
        known = ", ".join(f"`{each}`" for each in rows[0])
        reason = f"`{node.span.written}` is neither a site nor a value of the rows"
        raise BasisError(node, reason, f"values are {known}; a site is `resid_post layer 3`")
    every = [row[name] for row in rows]
    if all(isinstance(each, str) for each in every):
        return [[float(each == word) for each in every] for word in sorted(set(every))]
    lists = [each if isinstance(each, list | tuple) else [each] for each in every]
    numbers = all(isinstance(item, int | float) for own in lists for item in own)
    if not numbers or len({len(own) for own in lists}) > 1:
        raise BasisError(
            node,
            f"`{name}` has neither words nor the same number of numbers in every row",
            "name another value",
        )
    return [list(map(float, column)) for column in zip(*lists, strict=True)]


def _jacobian(
    definition: spec.Basis, point: SitePoint, work: ExperimentContext
) -> tuple[BasisOperand, int, str] | None:
    """Resolve Jacobians of one site by another, one of which is the basis's own."""
    call = definition.method
    (map_,) = (a.value for a in call.arguments if isinstance(a.value, ast.SiteMap))
    ends: list[SitePoint] = []
    for site in (map_.source, map_.target):
        end = _one_point(site, work)
        if end is None:
            return None
        _check_site(end, site, work)
        ends.append(end)
    source, target = ends
    before, after = (write_order(site_point.site, site_point.layer) for site_point in ends)
    if before >= after:
        raise BasisError(
            map_,
            f"`{map_.target.span.written}` doesn't come after `{map_.source.span.written}`",
            f"write `{map_.target.span.written} -> {map_.source.span.written}`",
        )
    if point not in ends:
        raise BasisError(
            definition.site,
            f"`{definition.site.span.written}` is neither end of `{map_.span.written}`",
            f"write `at {map_.source.span.written}` for right singular vectors, or "
            f"`at {map_.target.span.written}` for left ones",
        )
    fit_sample = _sample(definition, point, work)
    if fit_sample is None:
        return None
    sample, text = fit_sample
    side = "left" if point == target else "right"
    text = f"{side} singular vectors of the Jacobians {map_.span.written}, {text}"
    operand = JacobianBasis(sample, source, target, point == target)
    return operand, count_used_rows(sample.cell), text


def _one_point(site: ast.Site, work: ExperimentContext) -> SitePoint | None:
    """Return the point of a site that names one; None after other errors. Raises BasisError."""
    before = len(work.diagnostics)
    site_targets, axes = resolve_site(site, work.sites.of_definitions())
    if site_targets is None or has_errors(work.diagnostics[before:]):
        return None
    points = [
        point
        for key, here in site_targets.points.items()
        if key not in site_targets.missing
        for point in here
    ]
    if axes or len(points) != 1:
        raise BasisError(site, "it names several sites", "name one layer, and at most one head")
    return points[0]


def _spanned(
    call: ast.Call, method: BasisMethod, point: SitePoint, work: ExperimentContext
) -> tuple[BasisOperand, int, str] | None:
    """Resolve directions of the file; of a family, the member of the point's layer and head."""
    vectors: list[DirectionVector] = []
    names: list[str] = []
    for argument in call.arguments:
        node = argument.value
        assert isinstance(node, ast.Name)
        family = resolve_named_family(node.id, node, work)
        if family is None:
            return None
        use = find_use(family)
        if use is not None:
            reason = f"`{node.id}` {use.what} and isn't a direction"
            raise BasisError(node, reason, use.hint(node.id))
        at = {"layer": point.layer, "head": point.unit}
        key: list[int] = []
        seeds = family.axis(SEED_AXIS)
        if seeds is not None:
            labels = tuple(map(int, seeds.labels))
            raise BasisError(node, *explain_seeds(node.id, "a direction", labels))
        for axis in family.axes:
            if at.get(axis.name) not in axis.labels:
                has = ", ".join(map(str, axis.labels))
                raise BasisError(
                    node,
                    f"`{node.id}` has no direction for {axis.name} {at.get(axis.name, 'alone')}",
                    f"it has {axis.name} {has}; define it with one position, and for the layers "
                    "of the basis",
                )
            key.append(axis.labels.index(at[axis.name]))
        known = family.width is not None and not work.model.shape.stands_in
        if known and family.width != count_numbers(point, work.model.shape):
            raise BasisError(
                node,
                f"`{node.id}` has {family.width} numbers, vectors of `{point.site}` have "
                f"{count_numbers(point, work.model.shape)}",
                "use directions that were made at a site of the same width",
            )
        member = family.members[tuple(key)]
        leaves = iter_leaf_vectors(member.vector)
        trained = any(isinstance(leaf, TrainedVector) for leaf in leaves)
        vectors.append(member.vector)
        names.append(f"{node.id} ({member.made})" if trained else node.id)
    next_map = None
    if method.reads_next_map:
        if point.site not in NEXT_MAPS:
            raise BasisError(
                call,
                f"`{point.site}` isn't read by one linear map",
                f"name one of {name_list(NEXT_MAPS)}",
            )
        next_map = point
    return SpannedBasis(tuple(vectors), next_map), len(vectors), ", ".join(names)


def _unembedding(call: ast.Call, work: ExperimentContext) -> tuple[BasisOperand, int, str] | None:
    values = [a.value for a in call.arguments if a.name is None][1:]
    texts = [str(constant_value(value, work.program.parameters)) for value in values]
    if work.model.tokenizer.stands_in:
        return None
    tokens = find_tokens(call, texts, work)
    return TokenBasis(tokens), len(tokens), ", ".join(f'"{text}"' for text in texts)


def _weights(
    call: ast.Call, point: SitePoint, options: Mapping[str, Constant], work: ExperimentContext
) -> tuple[BasisOperand, int, str] | None:
    site = str(options["weights"])
    if site not in WEIGHT_SITES:
        raise BasisError(
            call,
            f"`{site}` has no weights that can be decomposed",
            f"name one of {name_list(WEIGHT_SITES)}",
        )
    if point.layer is None:
        raise BasisError(
            call, f"`{point.site}` has no layer whose weights could be read",
            "name a site of a layer, such as `mlp_out layer 2`",
        )  # fmt: skip
    shape = work.model.shape
    block = shape.blocks[point.layer]
    rows = block.neurons if site == "mlp_out" else block.heads * block.d_value
    rows = _UNKNOWN_WIDTH if shape.stands_in else rows
    return WeightBasis(site, point.layer), rows, f"the weights of {site} layer {point.layer}"


def _python(
    call: ast.Call, options: Mapping[str, Constant], work: ExperimentContext
) -> tuple[BasisOperand, int, str] | None:
    """Resolve an object of a Python file, whose code isn't run here."""
    function, problems = find_function(call, "basis")
    work.diagnostics.extend(problem for problem in problems if problem not in work.diagnostics)
    if function is None:
        return None
    text = f"{function.name} of {function.file}, {function.identity}"
    return PythonBasis(function), int(options["features"]), text


def _dictionary(
    call: ast.Call, point: SitePoint, work: ExperimentContext
) -> tuple[BasisOperand, int, str] | None:
    """Resolve a sparse autoencoder or a transcoder; warns if it was trained at another site."""
    values = [a.value for a in call.arguments if a.name is None]
    written = str(constant_value(values[0], work.program.parameters))
    wanted = call.name == "transcoder"
    construct = TRANSCODER_PATH if wanted else DICTIONARY_PATH
    path, problems = path_to_read(construct, written, call.span)
    if path is not None and path.is_dir():  # its files may be links to other folders
        encoder = f"W_enc_{point.layer}.safetensors"
        parts = (encoder, encoder.replace("enc", "dec"))
        for name in (CONFIG_FILE, CROSS_LAYER_CONFIG, *WEIGHT_FILES.values(), *parts):
            problems += path_to_read(construct, f"{written}/{name}", call.span)[1]
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    if path is None or problems:
        return None
    try:
        file = read_dictionary(path, written, transcodes=wanted, layer=point.layer)
    except UnreadableFile as problem:
        raise BasisError(call, problem.reason, problem.hint) from None
    if file.transcodes != wanted:
        reason = f"`{written}` is a {file.kind}"
        hint = f'write `sae("{written}")`'
        if file.transcodes:
            reason += ", whose features aren't those of the vectors it writes"
            hint = f'write `transcoder("{written}") at mlp_out layer {point.layer or 0}`'
        raise BasisError(call, reason, hint)
    shape, reads = work.model.shape, find_encoded_site(file, point)
    _check_transcoder(call, file, point, work)
    size = vector_width(shape, reads, point.layer) if reads else count_numbers(point, shape)
    widths = [(file.width_in, size)]
    widths += [(file.width_out, count_numbers(point, shape))] if reads else []
    for (number, width), site in zip(widths, (reads or point.site, point.site), strict=False):
        if number != width and not shape.stands_in:
            reason = f"`{written}` has vectors of {number} numbers, `{site}` has {width}"
            hint = "use the site and the model that it was trained on"
            hint += f": `{file.hook}`" if file.hook else ""
            raise BasisError(call, reason, hint)
    for warning in (*_trained_elsewhere(call, file, point), *_trained_on_other(call, file, work)):
        if warning not in work.diagnostics:
            work.diagnostics.append(warning)
    text = f"{file.kind} {written} ({file.layout}, {file.precision}), SHA-256 {file.digest[:12]}…"
    text += f", of {reads}" if reads else ""
    return file, file.features, text


def find_encoded_site(file: DictionaryFile, point: SitePoint) -> str:
    """Return the site that a transcoder encodes, by default the MLP's input; "" for others.

    Args:
        point: The site that it writes to.
    """
    if not file.transcodes:
        return ""
    named = None if file.hook is None else site_of_hook(file.hook)
    site = named[0] if named is not None and named[0] in ENCODED_SITES else ENCODED_SITES[0]
    return in_stack(site, SITES[point.site].stack)


def _check_transcoder(
    call: ast.Call, file: DictionaryFile, point: SitePoint, work: ExperimentContext
) -> None:
    """Check that a transcoder has the sites that it reads and writes. Raises BasisError."""
    if not file.transcodes:
        return
    if point.site not in ("mlp_out", "mlp_out vision"):
        of = "an MLP of the decoder" if work.model.shape.encodes_apart else "an MLP"
        raise BasisError(
            call,
            f"a transcoder reconstructs the output of {of}, not `{point.site}`",
            f"write `at mlp_out layer {point.layer or 0}`",
        )
    reads = SitePoint(find_encoded_site(file, point), point.layer, None)
    missing = find_missing_point([reads], work.model.shape, work.model.name, call.span)
    if missing is not None:
        reason = (
            f"the model has no `{reads.site}` in layer {point.layer}, which the transcoder reads"
        )
        raise BasisError(call, reason, "use a model whose MLP has an input of its own")


def _trained_elsewhere(
    call: ast.Call, file: DictionaryFile, point: SitePoint
) -> Iterator[Diagnostic]:
    """Yield W0733 for each recorded hook point that is another site of the stream."""
    site_point = SitePoint(find_encoded_site(file, point) or point.site, point.layer, None)
    for hook, read in ((file.hook, site_point), (file.hook_out, point)):
        named = None if hook is None else site_of_hook(hook)
        same = {(read.site, read.layer)}
        if read.layer is not None and read.site in ("resid_pre", "resid_post"):
            # The stream between two blocks has two names.
            after = read.site == "resid_post"
            same.add(("resid_pre", read.layer + 1) if after else ("resid_post", read.layer - 1))
        if hook is None or named is None or named in same:
            continue
        yield DictionaryElsewhere(
            span=call.span,
            hook=hook,
            site=read.site if read.layer is None else f"{read.site} layer {read.layer}",
            own=f"{named[0]} layer {named[1]}",
        )


OTHER_MODEL_NAMES = {
    "gpt2-small": "gpt2",
    "mistral-7b": "mistral-7b-v0.1",
    "mixtral": "mixtral-8x7b-v0.1",
}
"""Names of models in TransformerLens that differ from those on the Hugging Face hub."""


def _trained_on_other(
    call: ast.Call, file: DictionaryFile, work: ExperimentContext
) -> Iterator[Diagnostic]:
    """Yield W0735 if the recorded model isn't the model of the file, as far as both have names."""
    model = work.model.spec
    if file.model is None or model.kind not in ("hf", "zoo") or model.base is not None:
        return
    path = model.path.replace("*", model.matched or "*")
    own, here = (name.lower().rstrip("/").rpartition("/")[2] for name in (file.model, path))
    if OTHER_MODEL_NAMES.get(own, own) != here:
        yield DictionaryOfAnotherModel(span=call.span, own=file.model, model=path)


def _saved(
    call: ast.Call, point: SitePoint, work: ExperimentContext
) -> tuple[BasisOperand, int, str] | None:
    """Resolve a matrix from a file, whose header specifies its shape."""
    values = [a.value for a in call.arguments if a.name is None]
    written, key = (str(constant_value(value, work.program.parameters)) for value in values)
    path, problems = path_to_read(SAVED_PATH, written, call.span)
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    if path is None:
        return None
    try:
        saved = inspect_safetensors(path, written, limits.DIRECTION_FILE, "save it by itself")
    except UnreadableFile as problem:
        raise BasisError(call, problem.reason, problem.hint) from None
    if key not in saved.shapes:
        known = name_list(list(saved.shapes)) or "none"
        raise BasisError(call, f"`{written}` has no tensor `{key}`", f"it has {known}")
    shape = saved.shapes[key]
    width = count_numbers(point, work.model.shape)
    if len(shape) != 2 or (shape[1] != width and not work.model.shape.stands_in):
        reason = f"`{key}` has the shape {list(shape)}, and directions at `{point.site}` need "
        hint = "save one direction per row; transpose a matrix of columns"
        raise BasisError(call, f"{reason}[directions, {width}]", hint)
    text = f"`{key}` of {written}, SHA-256 {saved.digest[:12]}…"
    return SavedVector(path, key, saved.digest), shape[0], text
