"""Path patching: `path SENDER -> RECEIVER at POSITIONS through mlps`.

References: Wang et al. 2022 (arXiv 2211.00593), Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

from mechdsl.base.text import Span
from mechdsl.diagnostics.rules import NoPath, NotOnAPath
from mechdsl.diagnostics.syntax import NotSupported
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.resolve.bases import describe_read_groups, resolve_receiving_features
from mechdsl.resolve.cells import counts_from_end
from mechdsl.resolve.runs import RuleKind
from mechdsl.resolve.sites import ExperimentContext, resolve_site
from mechdsl.resolve.targets import resolve_receivers, resolve_rule_positions
from mechdsl.resolve.types import (
    Axis,
    BasisTargets,
    Convention,
    Intervention,
    PathTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
    find_inner_sender,
    list_end_pairs,
    precedes,
    select_reached,
)
from mechdsl.rules.kinds import check_one_side, rule_kind
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk
from mechdsl.vocab.sites import SITES, STACK_SITES


def find_end_conflict(
    senders: tuple[SitePoint, ...], receivers: tuple[SitePoint, ...], *, parallel: bool
) -> tuple[str, str] | None:
    """Explain why the end of the model can't be combined with other receivers of a path.

    A change at a receiver must not reach other receivers, which read the held values. It must not
    reach senders either, which would pass it on to the end.

    Returns:
        The reason and a hint; None if the combination is possible, or there is none.
    """
    inner = select_reached(
        senders,
        tuple(p for p in receivers if SITES[p.site].when != "output"),
        parallel=parallel,
    )
    if not any(SITES[p.site].when == "output" for p in receivers) or not inner:
        return None
    whole = next((p for p in inner if p.site == "resid_pre"), None)
    if whole is not None:
        return (
            f"{_describe_point(whole)} already carries the senders to the end",
            "remove the end, or name a site that reads in that block: `attn_norm`, `mlp_norm`",
        )
    inner = sorted(inner, key=lambda p: _sublayer(p, parallel=parallel))
    first, last = inner[0], inner[-1]
    if _sublayer(first, parallel=parallel) != _sublayer(last, parallel=parallel):
        return (
            f"{_describe_point(last)} reads after {_describe_point(first)}: unlike the end, "
            "it would not see that receiver's change",
            "with the end, name receivers in the attention of one layer or in one MLP",
        )
    pairs = ((of, to) for of in senders for to in inner)
    late = next((pair for pair in pairs if not precedes(*pair, parallel=parallel)), None)
    if late is not None:
        return (
            f"{_describe_point(late[0])} isn't before {_describe_point(late[1])}, which may "
            "change its output",
            "with the end, use senders that precede all other receivers",
        )
    return None


def _describe_point(point: SitePoint) -> str:
    words = [point.site]
    words += [] if point.layer is None else [f"layer {point.layer}"]
    words += [] if point.unit is None else [f"{SITES[point.site].axes[-1]} {point.unit}"]
    return f"`{' '.join(words)}`"


def _sublayer(receiver: SitePoint, *, parallel: bool) -> tuple[int, int]:
    """Return the sublayer of a receiver; changes in one sublayer don't reach its other
    receivers."""
    assert receiver.layer is not None
    in_mlp = receiver.site in ("mlp_norm", "mlp_hidden") and not parallel
    return receiver.layer, 2 if in_mlp else int(SITES[receiver.site].stack == "cross")


SENDERS = (
    "embed",
    "resid_pre",
    "z",
    "head_out",
    "attn_out",
    "resid_mid",
    "mlp_hidden",
    "mlp_out",
    "resid_post",
)

RECEIVERS = (
    "resid_pre",
    "attn_norm",
    "q",
    "k",
    "v",
    "mlp_norm",
    "mlp_hidden",
    "final_norm",
    "logits",
)

OUTPUT_SITES = ("final_norm", "logits")

_HELD = {"z": "the heads", "mixer_out": "the mixers", "attn_out": "attention"}
"""Sites at which a block's attention, or what it has instead, is held: the first that it has."""

_CROSS_SENDERS, _CROSS_RECEIVERS = ("z", "head_out", "attn_out"), ("attn_norm", "q", "k", "v")
"""Sites of a decoder's attention to an encoder."""


@rule_kind("path")
class PathPatching(RuleKind, Intervention):
    """What receivers read of a patched sender, while all else is held at the base run."""

    once = True
    once_because = (
        "it is undefined whether the senders of one see the writes of the other: join "
        "senders or receivers in a `group`, or write two experiments"
    )
    reads = "run"
    copies = True

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        """Resolve the rule; its axes are the sender's, followed by `to_layer` and `to_head`."""
        assert rule.site is not None
        assert rule.receiver is not None
        run = rule.source or work.experiment.base
        senders, axes = resolve_site(rule.site, work.sites)
        receivers, more, basis = _resolve_receivers(rule.receiver, work)
        for axis in (*axes, *(replace(axis, name=f"to_{axis.name}") for axis in more)):
            work.add_axis(axis)
        fine = senders is None or receivers is None or _check_ends(rule, senders, receivers, work)
        if not fine:
            return None  # before positions, whose error would hide that no path leads there
        positions = resolve_rule_positions(rule, run, work.reading(senders))
        if senders is None or receivers is None or positions is None:
            return None
        if basis is not None and not _check_held_neurons(rule, senders, receivers, basis, work):
            return None
        whole = rule.frozen_norms or _has_later_neurons(rule, senders, work)
        held = _list_held_sites(work.model.shape)
        path = PathTargets(receivers, rule.through_mlps, rule.frozen_norms, basis, held)
        whole = whole or path.also_at_the_end or _has_computed_site(path)
        if path.also_at_the_end:
            if not _check_sums_at_end(rule, senders, path, work):
                return None
        elif _has_site(receivers, OUTPUT_SITES) and not _check_no_observation(rule, work):
            return None
        does: Intervention = FULL_PASS_PATH if whole else self
        if work.model.shape.encodes_apart:
            attends = work.model.shape.attends_to_image
            does = ATTENDED_IMAGE_PATH if attends else ENCODER_DECODER_PATH
        if _has_vision(senders):
            does = VISION_PATH
        return ResolvedRule(
            spec=rule, does=does, run=run, sites=senders, positions=positions, path=path
        )

    def key(self, rule: ResolvedRule) -> Hashable:
        return rule.run, _path_targets(rule).through_mlps, _path_targets(rule).frozen_norms

    def detail(self, rule: ResolvedRule) -> str | None:
        through = ", through MLPs" if _path_targets(rule).through_mlps else ""
        through += ", norms frozen" if _path_targets(rule).frozen_norms else ""
        receiver = "" if rule.spec.receiver is None else rule.spec.receiver.span.written
        return f"to {receiver}{through}"

    def _held(self, path: PathTargets, last: int) -> tuple[str, ...]:
        """Describe the heads and the MLPs that are held; last: the last layer."""
        layers = f"of layers 0 to {last}"
        mixers = " and ".join(f"{_HELD[site]} ({site})" for site in path.held if site in _HELD)
        mlps = (f"the MLPs (mlp_out) {layers}",) if "mlp_out" in path.held else ()
        return f"{mixers} {layers}", *mlps

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        path = _path_targets(rule)
        held = [*self._held(path, n_layers - 1)]
        held = held[:1] if path.through_mlps else held
        free = ["MLPs"] if path.through_mlps else []
        free += [] if path.frozen_norms else ["norms"]
        how = f", {' and '.join(free)} recomputed" if free else ""
        how += ", norms divide by their values in the base run" if path.frozen_norms else ""
        ends = {SITES[p.site].when for here in path.receivers.points.values() for p in here}
        yield Convention(
            "path", f"except for the senders, {' and '.join(held)} are held at the base run{how}"
        )
        after = "receivers are then written into the base run"
        if path.also_at_the_end:
            after += (
                ", and the change that only the senders cause in the stream after the last "
                "block is added there"
            )
        yield from describe_read_groups(rule)
        if path.basis is not None:
            after = _describe_receiving_features(path, path.basis)
        if ends != {"output"}:
            yield Convention("path", after, of_runs=True)
        to = rule.spec.receiver
        named = to is not None and to.names and (to.ranked is not None or len(to.names) > 1)
        if named and any(
            p.site in ("k", "v") for here in path.receivers.points.values() for p in here
        ):
            yield Convention("path", "keys and values of a head are those of its key-value head")


class FullPassPath(PathPatching, Intervention):
    """Path patching that requires full forward passes.

    It is needed for neurons that send together with a site that their MLP reads, because the other
    neurons of the MLP are held individually. It is also needed for neurons that receive, because
    their MLP is both computed and held; for frozen norms; and for the end of the model combined
    with other receivers.
    """

    whole = True

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from super().conventions(rule, n_layers)
        yield Convention("passes", "rows of this `path` are full forward passes")


class EncoderDecoderPath(PathPatching, Intervention):
    """Path patching in an encoder-decoder, whose rows are full forward passes.

    The decoder's attention to the encoder has heads that are held, too. Its keys and values read
    the output of the encoder, so that a path from the encoder to the decoder ends there.
    """

    def _held(self, path: PathTargets, last: int) -> tuple[str, ...]:
        del path, last
        heads = "the heads of the encoder (z encoder) and of the decoder (z, z cross)"
        return heads, "the MLPs of both (mlp_out encoder, mlp_out)"


class AttendedImagePath(EncoderDecoderPath):
    """Path patching in a language model whose blocks attend to an image; it has no encoder of
    text."""

    def _held(self, path: PathTargets, last: int) -> tuple[str, ...]:
        del path
        return "the heads (z, z cross)", f"the MLPs (mlp_out) of layers 0 to {last}"


class VisionPath(PathPatching, Intervention):
    """Path patching in the vision encoder of prompts, whose rows are full forward passes."""

    whole = True

    def _held(self, path: PathTargets, last: int) -> tuple[str, ...]:
        del path, last
        return "the heads of the vision encoder (z vision)", "its MLPs (mlp_out vision)"


def _list_held_sites(shape: ModelShape) -> tuple[str, ...]:
    """Return the sites at which attention, other mixers and MLPs of some block are held."""
    layers = range(shape.n_layers)
    firsts = (next((site for site in _HELD if shape.has(site, layer)), None) for layer in layers)
    sites = {*firsts, "mlp_out" if any(map(partial(shape.has, "mlp_out"), layers)) else None}
    return tuple(site for site in (*_HELD, "mlp_out") if site in sites)


def _path_targets(rule: ResolvedRule) -> PathTargets:
    assert rule.path is not None
    return rule.path


def _resolve_receivers(
    site: ast.Site, work: ExperimentContext
) -> tuple[SiteTargets | None, tuple[Axis, ...], BasisTargets | None]:
    """Resolve the receivers of a path, with their axes and the basis of features that receive."""
    basis = None
    if site.basis_name is None:
        receivers, axes = resolve_receivers(site, work.sites)
    else:
        receivers, axes, basis = resolve_receiving_features(site, work) or (None, (), None)
    if receivers is not None:
        names = tuple(_receiver_axis(name, axes) for name in receivers.axes)
        receivers = replace(receivers, axes=names)
    if basis is not None:
        basis = replace(basis, axes=tuple(_receiver_axis(name, axes) for name in basis.axes))
    return receivers, axes, basis


def _check_held_neurons(
    rule: spec.Rule,
    senders: SiteTargets,
    receivers: SiteTargets,
    basis: BasisTargets,
    work: ExperimentContext,
) -> bool:
    """Report E0334 for senders among the neurons or heads whose output features are computed from:
    those that don't send are held there, so the output isn't computed."""
    assert rule.receiver is not None
    computed = {point for here in receivers.points.values() for point in here}
    computed = {p for p in computed if not basis.at(p).reads}
    for of, to in list_end_pairs(senders, receivers):
        late = next((p for p in to if p in computed and find_inner_sender(of, p)), None)
        if late is None or not select_reached(of, to, parallel=work.sites.shape.parallel_block):
            continue
        layer, site = late.layer, " ".join(rule.receiver.span.written.split())
        what, module = ("neurons", "MLP") if late.site == "mlp_out" else ("heads", "attention")
        reason = f"{what} of layer {layer} are senders, so the others are held, and the {module} "
        reason += f"can't compute the output that `{basis.definition}` encodes"
        hint = f"leave out the {what} of layer {layer}, which have no path to these features"
        work.diagnostics.append(
            NotOnAPath(span=rule.receiver.span, verb="end", site=site, reason=reason, hint=hint)
        )
        return False
    return True


def _describe_receiving_features(path: PathTargets, basis: BasisTargets) -> str:
    """Describe what features that receive are computed from, and what they change."""
    points = [point for here in path.receivers.points.values() for point in here]
    written = sorted({point.site for point in points})
    read = sorted({path.reads(point).site for point in points})
    where = f"`{', '.join(written)}`"
    of = f"`{', '.join(read)}`"
    if read == ["mlp_out"]:
        of += ", which the MLP computes from its changed input"
    elif read == ["attn_out"]:
        of += ", which attention computes from its changed input, as its output is held there "
        of += "instead of its heads"
    return (
        f"features of `{basis.definition}` are then computed from {of}, and set in the base run: "
        f"each changes {where} by the change of the feature times its decoder vector"
        f"{', in its layer and in all later ones' if basis.crosses_layers else ''}"
    )


def _has_computed_site(path: PathTargets) -> bool:
    """Return whether receivers read vectors that packed passes don't compute in held sublayers."""
    points = (path.reads(p) for here in path.receivers.points.values() for p in here)
    sites = ("mlp_hidden",) if path.basis is None else ("mlp_hidden", "resid_mid", "mlp_out")
    sites += () if path.basis is None else ("resid_post", "attn_out")
    return any(point.site in sites for point in points)


def _receiver_axis(name: str, axes: tuple[Axis, ...]) -> str:
    """Rename an axis of the receiver if the sender has one of that name."""
    return f"to_{name}" if name in {axis.name for axis in axes} else name


def _check_ends(
    rule: spec.Rule, senders: SiteTargets, receivers: SiteTargets, work: ExperimentContext
) -> bool:
    """Report the ends that a path can't have: E0334, E0317 and E0335."""
    assert rule.site is not None
    assert rule.receiver is not None
    start = rule.basis_span or rule.site.span
    fine = _check_components(start, senders, SENDERS, "start", work)
    if rule.receiver.basis_name is None:
        fine = _check_components(rule.receiver.span, receivers, RECEIVERS, "end", work) and fine
    fine = fine and all(check_one_side(rule, ends, work) for ends in (senders, receivers))
    if fine and rule.frozen_norms and _has_vision(senders):
        what = "a path with frozen norms in the vision encoder"
        later = "remove `with frozen norms`, so that norms are recomputed"
        work.diagnostics.append(NotSupported(span=rule.span, what=what, later=later))
        return False
    return fine and _check_path_exists(rule, senders, receivers, work)


def _names_of_stack(allowed: tuple[str, ...], stack: str) -> tuple[str, ...]:
    """Return the names of a stack's sites, `z cross`, at which a path can start or end."""
    if stack == "vision":
        allowed = tuple(name for name in allowed if name != "final_norm")
    if stack == "cross":
        allowed = _CROSS_SENDERS if allowed is SENDERS else _CROSS_RECEIVERS
    return tuple(f"{name} {stack}".strip() for name in allowed if stack == "" or name != "logits")


def _check_components(
    span: Span,
    targets: SiteTargets,
    allowed: tuple[str, ...],
    verb: str,
    work: ExperimentContext,
) -> bool:
    """Report E0334 for a component at which a path can't start or end."""
    named = {p.site for points in targets.points.values() for p in points}
    there = {stack: _names_of_stack(allowed, stack) for stack in ("", *STACK_SITES)}
    wrong = sorted(named - {name for names in there.values() for name in names})
    if not wrong:
        return True
    names = there.get(SITES[wrong[0]].stack, allowed)
    listed = ", ".join(f"`{name}`" for name in names if work.sites.shape.has(name, None))
    hint = f"write one of {listed}"
    if verb == "start":
        reason = "it doesn't add to the residual stream directly"
    else:
        reason = "a receiver is an input of a block, a head or an MLP"
        if SITES[wrong[0]].component == "mlp_out":
            layer = next(point.layer for points in targets.points.values() for point in points)
            norm = wrong[0].replace("mlp_out", "mlp_norm")
            hint = f"write `{norm} layer {layer}`, the input of this MLP; or {hint[6:]}"
    work.diagnostics.append(
        NotOnAPath(span=span, verb=verb, site=wrong[0], reason=reason, hint=hint)
    )
    return False


def _has_vision(targets: SiteTargets) -> bool:
    points = (point for site_points in targets.points.values() for point in site_points)
    return any(SITES[point.site].stack == "vision" for point in points)


def _has_site(targets: SiteTargets, sites: tuple[str, ...]) -> bool:
    return any(p.site in sites for points in targets.points.values() for p in points)


def _check_sums_at_end(
    rule: spec.Rule, senders: SiteTargets, path: PathTargets, work: ExperimentContext
) -> bool:
    """Report E0334 if the effects of senders and of other receivers don't add up at the end."""
    why = None
    if path.through_mlps:
        why = (
            "an MLP would see the senders in one pass and the changes of other receivers in "
            "another",
            "remove `through mlps`, or write a separate experiment for each",
        )
    elif path.frozen_norms:
        why = (
            "its norm would be frozen for the senders but recomputed for the changes of "
            "other receivers",
            "remove `with frozen norms`, or write a separate experiment for each",
        )
    elif not work.sites.shape.stands_in and not _awaits_finding(rule, work):
        parallel = work.sites.shape.parallel_block
        conflicts = (
            find_end_conflict(of, to, parallel=parallel)
            for of, to in list_end_pairs(senders, path.receivers)
        )
        why = next((each for each in conflicts if each is not None), None)
    if why is not None:
        assert rule.receiver is not None
        named = {p.site for here in path.receivers.points.values() for p in here}
        site, (reason, hint) = min(named & {*OUTPUT_SITES}), why
        work.diagnostics.append(
            NotOnAPath(span=rule.receiver.span, verb="end", site=site, reason=reason, hint=hint)
        )
    return why is None


def _check_no_observation(rule: spec.Rule, work: ExperimentContext) -> bool:
    """Report E0334 for a path to the end of the model combined with an observation."""
    looks = [other for other in work.experiment.rules if other.observed is not None]
    if looks:
        assert rule.receiver is not None
        work.diagnostics.append(
            NotOnAPath(
                span=rule.receiver.span,
                verb="end",
                site=rule.receiver.span.written,
                reason=f"`{looks[0].verb}` would read a pass in which all other activations are "
                "held",
                hint="remove the observation, or name a site that reads there: `q`, `mlp_norm`",
            )
        )
    return not looks


def _has_later_neurons(rule: spec.Rule, senders: SiteTargets, work: ExperimentContext) -> bool:
    """Return whether neurons of a held MLP send together with a site that their MLP reads."""
    if rule.through_mlps:
        return False
    parallel = work.sites.shape.parallel_block
    for points in senders.points.values():
        neurons = [SitePoint("mlp_norm", p.layer, None) for p in points if p.site == "mlp_hidden"]
        if neurons and select_reached(points, tuple(neurons), parallel=parallel):
            return True
    return False


def _awaits_finding(rule: spec.Rule, work: ExperimentContext) -> bool:
    """Return whether an end of the path is picked from an experiment that hasn't run."""
    groups = work.sites.groups
    ends = [*walk((rule.site, rule.receiver))]
    named = [node.id for node in ends if isinstance(node, ast.Name) and node.id in groups]
    nodes = [*ends, *(node for name in named for node in walk(groups[name].sites))]
    waiting = work.sites.onward.stand_ins
    return any(isinstance(node, ast.RankedSelection) and node.of in waiting for node in nodes)


def _check_path_exists(
    rule: spec.Rule, senders: SiteTargets, receivers: SiteTargets, work: ExperimentContext
) -> bool:
    """Report E0335 if no cell has a receiver after a sender."""
    parallel = work.sites.shape.parallel_block
    pairs = product(senders.points.values(), receivers.points.values())
    if any(select_reached(a, b, parallel=parallel) for a, b in pairs):
        return True
    if _awaits_finding(rule, work):
        return True
    ends = [node for node in walk((rule.site, rule.receiver)) if isinstance(node, ast.Bound)]
    if work.sites.shape.stands_in and any(map(counts_from_end, ends)):
        return True  # their order depends on the model
    assert rule.site is not None
    assert rule.receiver is not None
    picked = [[p for here in ends.points.values() for p in here] for ends in (senders, receivers)]
    of, to = (next(iter(points), SitePoint("q", None, None)) for points in picked)
    reason, example = _describe_missing_path(of, to, work.sites.shape)
    work.diagnostics.append(
        NoPath(
            span=rule.receiver.span,
            sender=rule.site.span.written,
            receiver=rule.receiver.span.written,
            reason=reason if all(picked) else "one of them is nothing",
            example=example,
        )
    )
    return False


def _describe_missing_path(
    sender: SitePoint, receiver: SitePoint, shape: ModelShape
) -> tuple[str, str]:
    """Return the reason that no path leads to a receiver, and the name of another receiver."""
    of, to = SITES[sender.site], SITES[receiver.site]
    if of.stack == "encoder" and to.side != "source":
        reason = (
            "with all else held, a change in the encoder ends at the keys and values of `cross`"
        )
        return reason, "v cross layer * head *"
    if of.stack != to.stack and "vision" in (of.stack, to.stack):
        reason = "a path stays within the vision encoder or within the language model"
        where = "q vision" if of.stack == "vision" else "q"
        return reason, f"{where} layer {(sender.layer or 0) + 1} head *"
    reason = "every receiver reads before or at the site that the sender writes"
    heads = of.component in ("z", "head_out") and of.stack == to.stack
    if heads and to.component == "attn_out" and sender.layer == receiver.layer:
        reason = (
            "along a path, these features encode the output of attention for its changed input, "
            f"and heads of layer {sender.layer} are part of that output"
        )
    if of.stack != "encoder" and to.side == "source":
        reason, to = "the encoder doesn't read the decoder", SITES["q"]
    if to.component in ("mlp_out", "resid_mid", "resid_post"):  # of features
        to = SITES["q"]
    model_shape, _ = shape.in_stack(sender.site)
    last = model_shape.n_layers - 1
    example = f"{to.name} layer {min((sender.layer or 0) + 1, last)}"
    example += " head *" if to.unit else ""
    if sender.layer == last:
        example = "v cross layer * head *" if of.stack == "encoder" else "logits"
        example = f"mlp_norm vision layer {last}" if of.stack == "vision" else example
    return reason, example


FULL_PASS_PATH = FullPassPath()

ENCODER_DECODER_PATH = EncoderDecoderPath()

ATTENDED_IMAGE_PATH = AttendedImagePath()

VISION_PATH = VisionPath()
