"""Combinations that are errors: estimates without a gradient, sites inside removed blocks, and
rules on weights with other rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

from mechdsl.base.text import Span, count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.experiments import NO_GENERATION_REASON, NoEstimate
from mechdsl.diagnostics.models import SiteNotInBlock
from mechdsl.diagnostics.rules import BadWeights, OutsidePrompt
from mechdsl.diagnostics.syntax import NotSupported
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.program.estimators import BackwardRules, Place, first_of_place
from mechdsl.program.runs import COMPARING_METRICS
from mechdsl.prompts.positions.cells import is_after_prompts, refers_to_reply
from mechdsl.prompts.positions.spans import row_example
from mechdsl.prompts.rows import row_in_patches
from mechdsl.prompts.runs import PositionCell, PromptRun, RunRow
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.resolve.types import (
    WEIGHTS_BASIS,
    BasisTargets,
    ModelContext,
    OutputWeights,
    PathTargets,
    PositionTargets,
    PythonBasis,
    ResolvedExperiment,
    ResolvedMeasure,
    ResolvedRule,
    ResolvedSave,
    SitePoint,
    SiteTargets,
    find_inner_sender,
    list_end_pairs,
    name_neurons,
    select_reached,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk
from mechdsl.vocab.metrics import EFFECTS
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES, SITES, is_query_or_key

ESTIMABLE_VERBS = ("patch", "ablate")
"""Rules whose vectors are known from unpatched runs, at one site."""

SITES_WITHOUT_GRADIENT = (*ATTENTION_INTERNAL_SITES, "router", "expert_out", "logits")
"""Sites without gradients, in every stack."""

ADD_TO_WEIGHTS, PROJECT_OUT_OF_WEIGHTS = "add to weights", "project out of weights"
"""Verbs of rules on weights."""

SITE_RULE_HINT = "write `patch SITE at POSITIONS` or `ablate SITE at POSITIONS with zero`"

EDGE_RULE_HINT = "write `block attention layer * heads * from QUERIES to KEYS`"

PATH_RULE_HINT = "write `path SENDER -> RECEIVER at POSITIONS`"

RULE_HINTS = {"sites": SITE_RULE_HINT, "attention": EDGE_RULE_HINT, "paths": PATH_RULE_HINT}
"""Rules of estimators, by `GradientEstimator.place`."""

NO_ESTIMATE_HINT = "remove `using`, so that each cell is run"

OTHER_ESTIMATOR_HINT = "write `using gradient_input`"

_NO_BLOCK_ESTIMATE = (
    "no estimator estimates the effect of a replaced block",
    "remove `using`, or move the rule to another experiment",
)
"""The reason and the hint for a rule that replaces a block."""

FLAT_UNITS = ("rank", "share")
"""Units of metrics that are piecewise constant."""


def list_sites_without_gradient(points: Iterable[SitePoint]) -> list[str]:
    """Return the sites of points at which gradients aren't computed, sorted."""
    sites = {point.site for point in points}
    return sorted(name for name in sites if SITES[name].component in SITES_WITHOUT_GRADIENT)


def check_estimator(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """Return all conflicts with `using`."""
    said = experiment.spec.estimator
    if said is None:
        return []
    problems = [*_of_experiment(experiment, said)]
    if any(
        problem.span == said.span for problem in problems
    ):  # it doesn't estimate any rule of the model
        return problems
    problems += _of_rules(experiment, said)
    return [*problems, *_of_measures(experiment, said), *_of_verification(experiment, said)]


def _no_estimate(said: spec.Estimator, span: Span, what: str, reason: str, hint: str) -> Diagnostic:
    statement = f"using {said.name}"
    return NoEstimate(span=span, statement=statement, what=what, reason=reason, hint=hint)


def check_saved_gradients(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0608 for `save gradient` lines whose gradient isn't defined, or isn't computed."""
    for save in experiment.saves:
        problem = None if save.gradient is None else _gradient_problem(save, experiment)
        if problem is not None:
            span, what, reason, hint = problem
            yield NoEstimate(
                span=span,
                statement="save gradient",
                verb="differentiate",
                what=what,
                reason=reason,
                hint=hint,
            )


def _gradient_problem(
    save: ResolvedSave, experiment: ResolvedExperiment
) -> tuple[Span, str, str, str] | None:
    """Return the span, the object, the reason and the hint of a gradient that isn't computed."""
    measure, said = save.gradient, save.spec.gradient
    assert measure is not None
    assert said is not None
    flat = list_sites_without_gradient(save.points)
    if flat:
        what = f"with respect to `{flat[0]}`"
        reason = "mechdsl doesn't compute gradients at this site"
        hint = "name a site such as `resid_post`, `z` or `mlp_out`"
        return save.spec.site.span, what, reason, hint
    if experiment.table.runs[save.run].derived is not None:
        what, hint = f"the run `{save.run}`", "name a run without rules"
        return save.spec.span, what, "it has rules", hint
    if save.in_reply or measure.in_reply is not None:
        span = save.spec.at.span if save.in_reply else said.span
        reason, hint = "a selected token has no gradient", "name positions in the prompt"
        return span, "tokens of a reply", reason, hint
    none = find_flat_part(measure, save.run, at_base=True)
    return None if none is None else (said.metric.span, f"`{none[0]}`", *none[1:])


def _of_verification(experiment: ResolvedExperiment, said: spec.Estimator) -> Iterator[Diagnostic]:
    """Yield the first conflict with `verify`."""
    verify, own = said.verify, experiment.spec
    if verify is None:
        return

    def problem(what: str, reason: str, hint: str) -> Diagnostic:
        return NoEstimate(
            span=verify.span,
            statement="verify",
            verb="check",
            what=what,
            reason=reason,
            hint=hint,
        )

    cells, asked = experiment.n_there, verify.top + verify.random
    is_counted = experiment.rules and not experiment.stand_ins
    compared = [m for m in own.measures if EFFECTS[m.effect].is_tested_intervention]
    if not said.kind.is_effect:
        reason = f"it returns {said.kind.value_said}, which isn't an effect that a run has"
        hint = f"remove `verify`, or {_name_other(experiment)}"
        yield problem(f"`using {said.name}`", reason, hint)
    elif own.variant or experiment.seeds or own.over is not None or experiment.places:
        reason = "its cells belong to several models, prompts, runs, seeds or measured positions"
        hint = "write an experiment for each of them"
        yield problem("an experiment with several variants", reason, hint)
    elif not compared:
        minimal = any(r.circuit is not None and r.spec.all_but for r in experiment.rules)
        hint = "measure an effect of the rule, such as `as delta`" + " or `as minimality`" * minimal
        reason = "no measure is an effect that it compares with the runs of cells"
        yield problem("this experiment", reason, hint)
    elif asked > cells and verify.until != "stable" and is_counted:
        most = count_noun(cells, "cell")
        reason = f"the experiment has {most}"
        hint = f"choose up to {most}, or remove `using` to run all of them"
        yield problem(count_noun(asked, "cell"), reason, hint)


def _of_experiment(experiment: ResolvedExperiment, said: spec.Estimator) -> Iterator[Diagnostic]:
    own = experiment.spec
    if own.against is not None:
        reason = "random targets would have to be estimated too"
        yield _no_estimate(said, own.against.span, "`against`", reason, "remove `against`")
    if own.generation is not None:
        span, reason = own.generation.span, "a sampled or selected token has no gradient"
        yield _no_estimate(said, span, "generated text", reason, NO_ESTIMATE_HINT)
    rules, shape = said.kind.backward, experiment.model.shape
    stacks = [shape, *(shape.others[stack] for stack in experiment.acted_stacks)]
    if reason := next(filter(None, (explain_missing_rule(rules, stack) for stack in stacks)), ""):
        what = f"`{experiment.model.name}`"
        yield _no_estimate(said, said.span, what, reason, _name_other(experiment))
    elif said.kind.decomposes and shape.takes not in _DECOMPOSED:
        what = f"`{experiment.model.name}`"
        kind = "whose blocks attend to an image" if shape.attends_to_image else "without text"
        reason = f"`{said.name}` isn't computed for models {kind}"
        yield _no_estimate(said, said.span, what, reason, OTHER_ESTIMATOR_HINT)
    elif said.kind.drops_layers and (lacking := explain_no_dropped_layers(stacks)):
        what = f"`{experiment.model.name}`"
        yield _no_estimate(said, said.span, what, lacking, "write `using atp_qk`")
    if experiment.derived:
        what = f"an experiment with the run `{next(iter(experiment.derived))}`"
        span = own.derived[0].span
        yield _no_estimate(said, span, what, "the run has rules", NO_ESTIMATE_HINT)


_DECOMPOSED = frozenset({"text", "two texts", "image to text", "sound to text", "image and text"})
"""What models read that `cdt` is computed for."""


def explain_no_dropped_layers(stacks: Sequence[ModelShape]) -> str:
    """Return why gradients of the layers of all stacks can't be left out one by one, or an empty
    text."""
    if sum(shape.n_layers for shape in stacks) < 2:
        return "the model has one layer, and no other gradient is left without it"
    for shape in stacks:
        sites = _attention_sites(shape)
        for layer in range(shape.n_layers):
            has_attention = any(shape.has(site, layer) for site in sites)
            if not has_attention or not shape.has("mlp_out", layer):
                return f"layer {layer} has no `attn_out` or no `mlp_out`"
    return ""


def _attention_sites(shape: ModelShape) -> Sequence[str]:
    """Return the sites of outputs of attention, or of mixers, one of which a block has."""
    return "attn_out", "mixer_out", *(["attn_out cross"] if shape.attending else [])


def explain_missing_rule(rules: BackwardRules | None, shape: ModelShape) -> str:
    """Return why changed derivatives don't cover a model, or an empty text."""
    if rules is not None and shape.n_experts:
        if not rules.decomposed:
            return "its rules don't know routers and experts"
        if reason := _explain_undecomposed_experts(shape):
            return reason
    if rules is not None and rules.in_attention and not computes_attention(shape):
        return "its attention can't be computed separately"
    return ""


_BIASED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter"})
"""Families whose experts have biases."""


def _explain_undecomposed_experts(shape: ModelShape) -> str:
    """Return why the experts of a model can't be decomposed, or an empty text."""
    if shape.family in _BIASED_EXPERTS:
        return "no rule shares the biases of its experts between parts"
    layers = range(shape.n_layers)
    if not all(shape.has("router", layer) or shape.has("mlp_hidden", layer) for layer in layers):
        return "the weights of its router can't be fixed, because no module of experts reads them"
    return ""


def computes_attention(shape: ModelShape) -> bool:
    """Return whether attention of each block can be computed here."""
    return all(
        shape.has("pattern", layer) or (shape.attending and shape.has("pattern cross", layer))
        for layer in range(shape.n_layers)
    )


def _of_rules(experiment: ResolvedExperiment, said: spec.Estimator) -> Iterator[Diagnostic]:
    rules = experiment.rules
    if not rules:
        what = "an experiment without a rule"
        hint = RULE_HINTS[said.kind.place]
        yield _no_estimate(said, said.span, what, NO_GENERATION_REASON, hint)
    for rule in rules:
        problem = next(_of_rule(rule, experiment, said), None)
        if problem is not None:
            yield problem
            return
    second = next((rule for rule in rules[1:] if rule.only is None), None)
    if second is not None and (experiment.has_path or not said.kind.decomposes):
        what, hint = "several rules together", "write an experiment for each rule"
        reason = (
            "a path is estimated alone" if said.kind.decomposes else "an estimate is of one rule"
        )
        yield _no_estimate(said, second.spec.span, what, reason, hint)


def _of_rule(
    rule: ResolvedRule, experiment: ResolvedExperiment, said: spec.Estimator
) -> Iterator[Diagnostic]:
    """Yield the conflicts of a rule; callers report the first."""
    own = rule.spec
    verb = own.verb if own.observed is None else f"observe {own.observed.word}"
    if rule.does.changes == "blocks":
        yield _no_estimate(said, own.span, f"`{verb}`", *_NO_BLOCK_ESTIMATE)
        return
    problem = _explain_no_vision_estimate(rule, said, experiment) if rule.in_vision else None
    if problem is not None:
        yield _no_estimate(said, own.span, f"`{verb}` in the vision encoder", *problem)
        return
    if said.kind.place == "attention":
        yield from _of_edges(rule, verb, experiment, said)
        return
    if rule.circuit is not None:
        yield from _of_circuit(rule, experiment, said)
        return
    if said.kind.place == "paths" or (said.kind.takes_paths and rule.path is not None):
        yield from _of_path(rule, verb, experiment, said)
        return
    if own.verb not in ESTIMABLE_VERBS or rule.path is not None or rule.does.changes != "sites":
        reason = "the written value must be a vector of an unpatched run, or zero"
        others: dict[str, Place] = {"block": "attention", "path": "paths"}
        hint = SITE_RULE_HINT
        if verb in others:
            hint = f"write `using {first_of_place(others[verb]).name}`"
        if rule.path is not None:
            reason = "it estimates writes at sites, not edges between components"
        yield _no_estimate(said, own.span, f"`{verb}`", reason, hint)
        return
    assert rule.sites is not None
    assert own.site is not None
    site = own.site
    if rule.basis is not None:
        yield from _of_basis(rule, rule.basis, site.span, said)
    points = [here for here in rule.sites.points.values() if here]
    flat = list_sites_without_gradient(p for here in points for p in here)
    if flat:
        reason = "gradients aren't computed there"
        yield _no_estimate(said, site.span, f"`{flat[0]}`", reason, NO_ESTIMATE_HINT)
    within = sorted({p.site for here in points for p in here if is_query_or_key(p.site)})
    joined = any(map(_reach_each_other, points))
    if said.kind.decomposes and within:
        hint = NO_ESTIMATE_HINT if joined or len(experiment.rules) > 1 else _EXACT_HINT
        yield _no_estimate(said, site.span, f"`{within[0]}`", _BASE_WEIGHTS, hint)
    if joined and not said.kind.decomposes:
        hint = NO_ESTIMATE_HINT if within else f"write `using cdt`, or {NO_ESTIMATE_HINT}"
        yield _no_estimate(said, site.span, "these sites together", _REPLACED_CHANGE, hint)
    if said.joins_cells:
        yield from _check_joint_moves(rule, said)
    if said.between_runs:
        yield from _of_moved_inputs(rule, experiment, said)
    inside = {p.site: site.span for here in points for p in here if is_query_or_key(p.site)}
    if said.kind.fixes_attention and inside:
        yield from _of_changed_attention(rule, inside, experiment, said)
    yield from _of_answers(rule.positions, own.at.span, experiment, said)


def _explain_no_vision_estimate(
    rule: ResolvedRule, said: spec.Estimator, experiment: ResolvedExperiment
) -> tuple[str, str] | None:
    """Return why a rule in a vision encoder isn't estimated, and a hint."""
    kind, shape = said.kind, experiment.model.shape
    if rule.circuit is not None:
        return "edges between patches aren't estimated yet", NO_ESTIMATE_HINT
    if kind.decomposes:
        return "it decomposes the language model, which reads the vectors of images", (
            OTHER_ESTIMATOR_HINT if rule.path is None else "write `using eap`"
        )
    if rule.edge is not None:
        reason = "gradients of attention weights between patches aren't computed yet"
        return reason, NO_ESTIMATE_HINT
    points = () if rule.sites is None else rule.sites.points.values()
    inside = {p.site for site_points in points for p in site_points if is_query_or_key(p.site)}
    if kind.fixes_attention and rule.path is not None:
        reason = "it recomputes attention of tokens, not of the patches of images"
        return reason, "write `using eap`"
    if kind.fixes_attention and inside and shape.attends_to_image:
        reason = "attention in an encoder whose images blocks attend to isn't recomputed yet"
        return reason, OTHER_ESTIMATOR_HINT
    if kind.fixes_attention and "k vision" in inside and _has_other_queries(experiment):
        reason = "class tokens, margins or others that no image token is made from may attend to "
        reason += "keys, too, and their attention isn't recomputed yet"
        return reason, f"{OTHER_ESTIMATOR_HINT}, or name `q vision`"
    return None


def _has_other_queries(experiment: ResolvedExperiment) -> bool:
    """Return whether the vision encoder may have tokens that no image token is made from, such as
    class tokens and margins, in the base run."""
    shape = experiment.model.shape
    vision = shape.others.get("vision")
    if vision is None or shape.resamples:
        return vision is not None
    layout = vision.patches
    if layout is None or layout.any_size:  # without a size, it reads the patches alone
        return layout is None and "image_size" in vision.config
    rows = experiment.table.runs[experiment.spec.base].rows
    layouts = (picture.expansion.layout for row in rows for picture in row.pictures.values())
    return any(
        len(image_tokens.cells) * shape.merged_side**2
        < max(1, len(image_tokens.tiles)) * layout.tokens
        for image_tokens in layouts
    )


def _of_changed_attention(
    rule: ResolvedRule,
    sites: Mapping[str, Span],
    experiment: ResolvedExperiment,
    said: spec.Estimator,
) -> Iterator[Diagnostic]:
    """Yield the conflict of queries or keys whose attention weights are computed exactly."""
    span = next(iter(sites.values()))
    hint = f"{_name_other(experiment)}, without the query and key fix"
    shape = experiment.model.shape
    stacks = [shape, *(shape.others[stack] for stack in experiment.acted_stacks)]
    if not all(map(computes_attention, stacks)):
        reason = "its attention can't be computed separately"
        yield _no_estimate(said, span, f"`{experiment.model.name}`", reason, hint)
    elif rule.path is not None and rule.path.basis is not None:
        reason = "attention is computed with whole queries or keys"
        yield _no_estimate(said, span, "a basis", reason, hint)
    elif not sites.keys().isdisjoint(("k", "k cross")):
        for measure, own in zip(experiment.measures, experiment.spec.measures, strict=True):
            if any(any(atom.appended) for atom in measure.atoms):
                reason = "tokens of a text after the prompt attend to the keys, too"
                yield _no_estimate(said, own.metric.span, f"`{measure.label}`", reason, hint)


def _of_basis(
    rule: ResolvedRule, basis: BasisTargets, span: Span, said: spec.Estimator
) -> Iterator[Diagnostic]:
    """Yield the conflict of a rule on coordinates."""
    hint = f"{OTHER_ESTIMATOR_HINT}, which estimates each cell separately"
    apart = _explain_separate_moves(rule, basis) if said.joins_cells else ""
    if apart:
        reason = f"all cells of a site move together, {apart}"
        hint += "; or name the coordinates of one cell: `patch … in basis b`"
    elif not said.kind.reads_written:
        reason = "its gradient is of whole vectors, not of coordinates"
    elif basis.crosses_layers and said.kind.drops_layers:
        reason = _DROPS_A_PART
    else:
        return
    yield _no_estimate(said, span, "a basis", reason, hint)


_REPLACED_CHANGE = (
    "the value of one may replace what another one changes, so each cell would need a backward "
    "pass, and running it is cheaper"
)
"""Why gradients don't estimate writes of which one may reach another."""

_BASE_WEIGHTS = "attention has the weights of the base run, so the estimate would be 0"
_EXACT_HINT = "write `using atp_qk`"
"""Why contextual decomposition has no estimate of queries and keys, and the hint."""

_DROPS_A_PART = (
    "a feature writes to several layers, and a pass without the gradient of one layer drops a part "
    "of it"
)
"""Why features of a cross-layer transcoder aren't estimated with layers left out."""


def _name_other(experiment: ResolvedExperiment) -> str:
    """Return the hint that names another estimator for the rules of an experiment."""
    edges = experiment.has_path or experiment.has_circuit
    return "write `using eap`" if edges else OTHER_ESTIMATOR_HINT


def _explain_separate_moves(rule: ResolvedRule, basis: BasisTargets) -> str:
    """Return why the changes of a rule's cells don't add up to one of all their coordinates, or an
    empty text."""
    cells = basis.coordinates.values()
    if len(cells) < 2:
        return ""
    if len({cell.basis for cell in cells}) > 1:
        return "and these cells have different bases"
    if any(isinstance(member.operand, PythonBasis) for member in basis.members):
        return "and changes by a Python object may not add up"
    if rule.spec.drops_error:
        return "and each cell drops the whole reconstruction error"
    named = [number for cell in cells for number in cell.which]
    every = any(not cell.which for cell in cells)
    if every or len({*named}) < len(named) or any(cell.inserted for cell in cells):
        return "and several cells change the same coordinate"
    return ""


def _of_edges(
    rule: ResolvedRule, verb: str, experiment: ResolvedExperiment, said: spec.Estimator
) -> Iterator[Diagnostic]:
    """Yield the conflicts of a rule on attention weights."""
    own = rule.spec
    if own.verb != "block":
        reason = "its gradients are with respect to attention weights"
        yield _no_estimate(said, own.span, f"`{verb}`", reason, EDGE_RULE_HINT)
        return
    assert rule.edge is not None
    assert own.onto is not None
    yield from _of_answers(rule.positions, own.at.span, experiment, said)
    yield from _of_answers(rule.edge.keys, own.onto.span, experiment, said)


_READ_FROM_ENCODER = frozenset({"k cross", "v cross"})
"""Receivers of several layers that no change of another one reaches."""


_ATTENTION_OUTPUTS, _MLP_OUTPUTS = ("z", "head_out", "attn_out"), ("mlp_hidden", "mlp_out")
"""Senders whose values are added to the stream, for each sublayer."""


def _adds_up(senders: Sequence[SitePoint], path: PathTargets) -> bool:
    """Return whether the changes that senders of a cell cause add up to first order."""
    places = {(SITES[point.site], point.layer) for point in senders}
    sites = {site.component for site, _ in places}
    sublayers = {(site.stack, site.component in _MLP_OUTPUTS, layer) for site, layer in places}
    if len(places) < 2:
        return True
    if len(sublayers) < len(places) or not sites <= {"embed", *_ATTENTION_OUTPUTS, *_MLP_OUTPUTS}:
        return False
    return not (path.through_mlps and sites & {*_MLP_OUTPUTS})


def _find_computed_output(
    senders: SiteTargets, path: PathTargets, *, parallel: bool
) -> SitePoint | None:
    """Return a receiver whose features are computed from the output of an MLP or attention whose
    neurons or heads send in some cell: one pass, with the senders of all cells, serves all. Cells
    without a path aren't in it."""
    if path.basis is None:
        return None
    points, ends = list[SitePoint](), list[SitePoint]()
    for of, to in list_end_pairs(senders, path.receivers):
        if reached := select_reached(of, to, parallel=parallel):
            points += of
            ends += map(path.reads, reached)
    return next((end for end in ends if find_inner_sender(points, end)), None)


def _reach_each_other(points: Iterable[SitePoint]) -> bool:
    """Return whether the change of a site of a cell may reach another one."""
    places = {(p.layer, p.site) for p in points}
    layers, sites = {layer for layer, _ in places}, {site for _, site in places}
    if sites <= _READ_FROM_ENCODER:
        return False
    heads = {SITES[site].component for site in sites} <= {"q", "k", "v"}
    together = heads and len({SITES[site].stack for site in sites}) == 1
    return len(layers) > 1 or (len(sites) > 1 and not together)


def _of_circuit(
    rule: ResolvedRule, experiment: ResolvedExperiment, said: spec.Estimator
) -> Iterator[Diagnostic]:
    """Yield the first conflict of a rule on the edges of a circuit."""
    own, kind = rule.spec, said.kind
    assert own.site is not None
    if not own.without_edge:
        reason = "its edges are ablated together, in one run"
        form = f"ablate {'all but ' * own.all_but}{own.site.span.written} without each edge"
        hint = f"write `{form}` to estimate each edge, or remove `using`"
        yield _no_estimate(said, own.span, "a circuit", reason, hint)
        return
    moves = said.steps is not None or kind.adds_noise
    reason = ""
    if not kind.takes_paths:
        reason = "it estimates writes at sites, not edges between components"
    elif moves:
        reason = "it moves activations of an unpatched run, and cells change a run of the circuit"
    elif kind.fixes_attention or kind.decomposes:
        reason = "it starts from attention weights of an unpatched run, not of a run of the circuit"
    elif not kind.is_effect:
        reason = f"it returns {kind.value_said}, which isn't an effect that a run has"
    if reason:
        yield _no_estimate(said, own.span, "edges of a circuit", reason, "write `using eap`")
        return
    yield from _of_answers(rule.positions, own.at.span, experiment, said)


def _of_path(
    rule: ResolvedRule, verb: str, experiment: ResolvedExperiment, said: spec.Estimator
) -> Iterator[Diagnostic]:
    """Yield the conflicts of a rule on edges between components."""
    own, path = rule.spec, rule.path
    if path is None:
        reason = "it estimates edges between components"
        if experiment.has_path or experiment.has_circuit:
            other = "a circuit" if experiment.has_circuit else "a path"
            what, reason = f"`{verb}` together with {other}", "an estimate is of one rule"
            hint = f"remove `using {said.name}` to compute the rules together"
            yield _no_estimate(said, own.span, what, reason, hint)
            return
        other = ", or `using atp`" if verb in ESTIMABLE_VERBS else ""
        yield _no_estimate(said, own.span, f"`{verb}`", reason, f"{PATH_RULE_HINT}{other}")
        return
    assert rule.sites is not None
    assert own.site is not None
    assert own.receiver is not None
    parallel = experiment.model.shape.parallel_block
    computed = _find_computed_output(rule.sites, path, parallel=parallel)
    if computed is not None:
        assert path.basis is not None
        what, module = ("neurons", "MLP") if computed.site == "mlp_out" else ("heads", "attention")
        reason = f"{what} of layer {computed.layer} are senders, too, and held in the pass with "
        reason += f"gradients, so the {module} doesn't compute the output that "
        reason += f"`{path.basis.definition}` encodes"
        hint = f"name senders without {what} of layer {computed.layer}"
        yield _no_estimate(said, own.receiver.span, "these receivers", reason, hint)
    if not all(_adds_up(here, path) for here in rule.sites.points.values()):
        what, reason = "these senders together", "the value of one replaces the change of another"
        hint = "sweep them: `layer *`, or `for s in [attn_out, mlp_out]`"
        yield _no_estimate(said, own.site.span, what, reason, hint)
    inner = (
        [p for p in here if SITES[p.site].when != "output"]
        for here in path.receivers.points.values()
    )
    if any(map(_reach_each_other, inner)):
        what, reason = "these receivers together", "the change of one reaches another"
        hint = "sweep them, or name heads' inputs of one layer"
        yield _no_estimate(said, own.receiver.span, what, reason, hint)
    ends = (p for here in path.receivers.points.values() for p in here)
    if any(SITES[p.site].when == "output" for p in ends):
        for measure, line in zip(experiment.measures, experiment.spec.measures, strict=True):
            if any(atom.point is not None for atom in measure.atoms):
                reason = "at the end of the model, it would read activations that are held"
                hint = "measure logits, probabilities or the loss"
                yield _no_estimate(said, line.metric.span, f"`{measure.label}`", reason, hint)
        frozen = BackwardRules(fixed_norms=True) if path.frozen_norms else None
        if reason := explain_missing_rule(frozen, experiment.model.shape):
            hint = f"remove `with frozen norms`, or {NO_ESTIMATE_HINT}"
            yield _no_estimate(said, own.span, f"`{verb} … with frozen norms`", reason, hint)
    if said.between_runs:
        yield from _of_moved_inputs(rule, experiment, said)
    yield from _of_changed_receivers(rule, path, own.receiver.span, experiment, said)
    yield from _of_answers(rule.positions, own.at.span, experiment, said)


def _of_changed_receivers(
    rule: ResolvedRule,
    path: PathTargets,
    span: Span,
    experiment: ResolvedExperiment,
    said: spec.Estimator,
) -> Iterator[Diagnostic]:
    """Yield the conflicts of receivers whose attention weights are computed exactly, or whose
    layers are left out."""
    receivers = (p.site for here in path.receivers.points.values() for p in here)
    inside = {site: span for site in receivers if is_query_or_key(site)}
    decomposed = said.kind.decomposes
    if decomposed and inside:
        yield _no_estimate(said, span, f"`{next(iter(inside))}`", _BASE_WEIGHTS, _EXACT_HINT)
    if said.kind.fixes_attention and inside:
        yield from _of_changed_attention(rule, inside, experiment, said)
    if said.kind.drops_layers and path.basis is not None and path.basis.crosses_layers:
        yield _no_estimate(said, span, "a basis", _DROPS_A_PART, "write `using eap`")


def _of_moved_inputs(
    rule: ResolvedRule, experiment: ResolvedExperiment, said: spec.Estimator
) -> Iterator[Diagnostic]:
    """Yield conflicts of a rule whose gradients are taken between two runs."""
    own, path = rule.spec, rule.path
    hint = OTHER_ESTIMATOR_HINT if path is None else "write `using eap`"
    if path is None and own.verb != "patch":
        reason = "its gradients are taken on the line between the two prompts of a row, and an "
        reason += "ablation has no second prompt"
        other = "write `patch` with `from RUN into RUN`, or write `using integrated_gradients`"
        yield _no_estimate(said, own.span, f"`{own.verb}`", reason, other)
        return
    if len({each.run for each in experiment.rules}) > 1:
        what, reason = "rules with several source runs", "the base run moves from one run"
        yield _no_estimate(said, own.span, what, reason, hint)
        return
    if experiment.model.shape.attends_to_image and not rule.in_vision:
        reason = "it moves the stream of the text, but not the image that blocks attend to"
        yield _no_estimate(said, own.span, f"`{own.verb}`", reason, hint)
        return
    ends = [] if path is None else [p for r in path.receivers.points.values() for p in r]
    if path is not None and path.frozen_norms and all(SITES[p.site].when == "output" for p in ends):
        what, reason = "a path to the end with frozen norms", "norms of other runs aren't frozen"
        yield _no_estimate(said, own.span, what, reason, hint)
    if rule.external is not None:
        what, reason = f"the run `{rule.run}`", "it has another model or other prompts"
        yield _no_estimate(said, own.span, what, reason, hint)
        return
    if (unequal_rows := _find_unequal_rows(rule, experiment, hint)) is not None:
        what, reason, fix = unequal_rows
        yield _no_estimate(said, own.span, what, reason, fix)


def _find_unequal_rows(
    rule: ResolvedRule, experiment: ResolvedExperiment, hint: str
) -> tuple[str, str, str] | None:
    """Return what differs between the prompts of the first row that doesn't move token by token,
    the reason and a fix; None if all rows do."""
    runs, base, source = experiment.table.runs, experiment.spec.base, rule.run
    pairs = zip(runs[base].rows, runs[source].rows, strict=True)
    for number, (first, second) in enumerate(pairs):
        row = experiment.table.row_ids[number]
        if len(first.ids) != len(second.ids):
            counts = f"row {row} has {len(first.ids)} tokens in `{base}`"
            reason = f"{counts} and {len(second.ids)} in `{source}`, and each token moves"
            has_images = bool(first.pictures or second.pictures)
            what = "images of one width and height, and texts" if has_images else "texts"
            fix = f"choose {what} with as many tokens, or {hint}"
            return "prompts of different lengths", reason, fix
        grids = [
            _list_grids(run_row, experiment.model) for run_row in (first, second) if rule.in_vision
        ]
        if grids and grids[0] != grids[1]:
            reason = f"images of row {row} have other rows and columns of patches in `{source}` "
            reason += f"than in `{base}`, and each patch moves"
            fix = f"use images of one width and height, or {hint}"
            return "images of different sizes", reason, fix
    return None


def _list_grids(row: RunRow, model: ModelContext) -> list[list[tuple[int, int, int, int]]]:
    """Return position, tile, row and column of the tokens of each image of a prompt; of patches, if
    they are resampled to tokens."""
    if model.shape.resamples and isinstance(model.tokenizer, ImagePromptTokenizer):
        row = row_in_patches(model.tokenizer, row)
    return [
        [
            (picture.first + c.position, c.tile, c.row, c.col)
            for c in picture.picture.expansion.layout.cells
        ]
        for picture in row.whole_pictures
    ]


def _of_answers(
    positions: PositionTargets, span: Span, experiment: ResolvedExperiment, said: spec.Estimator
) -> Iterator[Diagnostic]:
    rows = experiment.table.runs[experiment.spec.base].rows
    if any(is_after_prompts(cell, rows) for cell in positions.written.values()):
        what, reason = "tokens of the answer", "they follow the prompt"
        hint = "name tokens of the prompt, or remove `using`"
        yield _no_estimate(said, span, what, reason, hint)


def _check_joint_moves(rule: ResolvedRule, said: spec.Estimator) -> Iterator[Diagnostic]:
    """Yield conflicts of cells that write different values into one vector.

    All cells of a site move together along the path of integration, so each vector needs one value.
    """
    reason = "all cells of a site move together, so each vector must have one value"
    hint = f"{OTHER_ESTIMATOR_HINT}, which estimates each cell separately"
    own = rule.spec
    for part, word in ((own.into_layer, "into layer"), (own.onto, "onto")):
        if part is not None:
            yield _no_estimate(said, part.span, f"`{word}`", reason, hint)
    # Cells with excluded sites share one position object, which doesn't overlap itself.
    if _overlap(list({id(cell): cell for cell in rule.positions.written.values()}.values())):
        yield _no_estimate(said, own.at.span, "positions that overlap", reason, hint)


def _overlap(cells: list[PositionCell]) -> bool:
    """Return whether two cells share a token of a row."""
    for row in zip(*(cell.hits for cell in cells), strict=True):
        tokens = [{token for run in hits for token in run} for hits in row]
        if sum(map(len, tokens)) > len(set[int]().union(*tokens)):
            return True
    return False


def _of_measures(experiment: ResolvedExperiment, said: spec.Estimator) -> Iterator[Diagnostic]:
    # An estimator that doesn't fit the path is an error already, and the next one has effects.
    fits = said.kind.place == "paths" or said.kind.takes_paths or not experiment.has_path
    in_circuit = experiment.has_circuit
    for measure, own in zip(experiment.measures, experiment.spec.measures, strict=True):
        raw = own.effect == "raw"
        if raw == said.kind.is_effect and fits:
            what = f"`{measure.label} as {own.effect}`"
            reason = f"it returns {said.kind.value_said}, which isn't an effect of a write"
            effects = "eap" if experiment.has_path else "gradient_input"
            hint = f"measure `as raw`, or write `using {effects}`"
            if said.kind.place == "attention":
                reason = f"it returns {said.kind.value_said}, which isn't an effect of a block"
                hint = "measure `as raw`, or remove `using`, so that each cell is run"
            if raw:
                reason = f"`{own.effect}` isn't an effect of the rule"
                hint = "measure `as delta`, `as recovery` or `as relative`"
                hint = "measure `as minimality` or `as delta`" if in_circuit else hint
            yield _no_estimate(said, own.effect_span, what, reason, hint)
        flat = find_flat_part(
            measure,
            experiment.spec.base,
            at_base=not in_circuit
            and (said.steps is None or (said.between_runs and said.steps == 1)),
            along_path=_along_path(experiment, said),
        )
        if flat is not None:
            text, reason, hint = flat
            yield _no_estimate(said, own.metric.span, f"`{text}`", reason, hint)


def _along_path(experiment: ResolvedExperiment, said: spec.Estimator) -> str:
    """Return the end of a hint that names an estimator with gradients outside the base run; an
    empty text if the experiment takes none."""
    if said.between_runs:
        return ", or write several `steps`"
    if said.kind.place == "attention":
        return ""
    if not experiment.has_path:
        return ", or write `using integrated_gradients`"
    frozen = any(rule.path is not None and rule.path.frozen_norms for rule in experiment.rules)
    none = frozen or experiment.in_vision or experiment.model.shape.attends_to_image
    return "" if none else ", or write `using eap_ig`"


def find_flat_part(
    measure: ResolvedMeasure, run: str, *, at_base: bool, along_path: str = ""
) -> tuple[str, str, str] | None:
    """Return the part of a measure without a gradient in a run, the reason and a hint; None if
    there is none.

    Args:
        at_base: Whether the gradient is taken in the run itself, not on a path that begins there.
        along_path: The end of the hint if there is a way to take it on such a path.
    """
    hint = "measure a logit, a probability or a difference of logits"
    for node in walk(measure.expression):
        if isinstance(node, ast.Compare | ast.Logical | ast.Not):
            return node.span.written, "a condition has no gradient", hint
    for atom in measure.atoms:
        text = atom.node.span.written
        if atom.python is not None or atom.form.takes == "rows":
            return text, "a Python function receives numbers without gradients", hint
        if atom.form.takes == "reply":
            return text, "a text has no gradient", hint
        flat = atom.form.compared or atom.form.unit in FLAT_UNITS
        if atom.form.kind == "category" or flat:
            return text, "it is a step function, whose gradient is 0", hint
        if atom.point is not None and list_sites_without_gradient([atom.point]):
            return text, f"gradients of `{atom.point.site}` aren't computed", hint
        if at_base and atom.run == run and atom.name in COMPARING_METRICS:
            reason = f"it is compared with `{atom.run}`, where its gradient is 0"
            return text, reason, f"compare with another run{along_path}"
    return None


def check_other_stacks(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0108 for everything that isn't computed for an encoder-decoder, or with rules in the
    vision encoder of prompts with images, yet."""
    shape, attends = experiment.model.shape, experiment.model.shape.attends_to_image
    if attends or experiment.in_vision:
        yield from _check_vision(experiment, attends=attends)
    elif shape.encodes_apart:
        yield from _check_encoder_decoder(experiment)
    if shape.encodes_apart:
        yield from _check_decoder_measures(experiment)


def _check_encoder_decoder(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0108 for rules that aren't computed for an encoder-decoder."""
    for rule in experiment.every_rule:
        verb = _name_rule(rule)
        if rule.circuit is not None or verb in _IN_ENCODER_DECODERS:
            continue
        what, hint = f"`{verb}` in an encoder-decoder", _ENCODER_DECODER_HINT
        hint = _OTHER_STACK_HINTS.get(verb, hint)
        yield NotSupported(span=rule.spec.span, what=what, later=hint)


def _check_decoder_measures(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0108 for measures of the prompt, which an encoder doesn't predict, and for noise."""
    own, of = experiment.spec, "of an encoder-decoder"
    unread = {"prompt", "own", "activations"}
    if experiment.model.shape.attends_to_image:  # its prompts are read by the decoder
        of, unread = _WITH_ATTENDING_BLOCKS, {"activations"}
    for measure, said in zip(experiment.measures, own.measures, strict=True):
        takes = {atom.form.takes for atom in measure.atoms}
        if said.at is not None and refers_to_reply(said.at, experiment.table):
            takes.discard("own")  # all tokens of a reply are predicted in the decoder
        if takes & unread:
            what = f"`{measure.text}` {of}"
            hint = "measure the answer: `logit(answer)` or `logprob(answer)`, or tokens of a reply"
            yield NotSupported(span=measure.expression.span, what=what, later=hint)
    runs = (experiment.table.runs[name] for name in (own.base, own.source) if name is not None)
    if any(run.noise is not None for run in runs):
        hint = "change the text, as in `item = other(item)`"
        yield NotSupported(span=own.span, what=f"noise in the prompts {of}", later=hint)


def _check_vision(experiment: ResolvedExperiment, *, attends: bool) -> Iterator[Diagnostic]:
    """Yield E0108 for everything that isn't computed with rules in a vision encoder.

    attends: Whether blocks of the language model attend to the image, so that some of its rules
        aren't computed in other combinations either.
    """
    of = _WITH_ATTENDING_BLOCKS if attends else _WITH_VISION
    for rule in experiment.every_rule:
        problem = _check_vision_rule(rule, of, attends=attends)
        if problem is not None:
            yield problem
    if experiment.model.shape.resamples:
        yield from _check_resampled_rules(experiment)


_WITH_VISION = "together with sites in the vision encoder"
_WITH_ATTENDING_BLOCKS = "in a model whose blocks attend to an image"


def _check_vision_rule(rule: ResolvedRule, of: str, *, attends: bool) -> Diagnostic | None:
    """Return E0108 for a rule that isn't computed together with rules in a vision encoder."""
    verb = _name_rule(rule)
    if rule.in_vision and not attends:
        of = "in the vision encoder"
    accepted = _IN_VISION_OF_PROMPTS if rule.in_vision else _WITH_ATTENDED_IMAGES
    hint = _ATTENDED_IMAGE_HINTS.get(verb, _ATTENDED_IMAGE_HINT) if attends else VISION_HINT
    if not (attends or rule.in_vision):
        names = {"a `path`": rule.path, "a circuit": rule.circuit}
        edges = next((name for name, own in names.items() if own is not None), "")
        what = f"{edges} of the language model {of}" if edges else ""
        hint = "write an experiment for each"
    elif verb not in accepted:
        what = f"`{verb}` {of}"
    elif rule.after_prefill and not attends:
        what = f"a change after the prompt {of}"
    else:
        what = ""
    return NotSupported(span=rule.spec.span, what=what, later=hint) if what else None


def _check_resampled_rules(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0108 for rules that aren't computed from patches that are resampled to tokens."""
    runs = experiment.table.runs
    acting = [(runs[experiment.spec.base], experiment.rules)]
    acting += [(runs[name], run.rules) for name, run in experiment.derived.items()]
    reader = experiment.model.tokenizer
    for prompt_run, rules in acting:
        for rule in (each for each in rules if each.in_vision):
            read = runs.get(rule.run, prompt_run)
            if rule.external is not None:
                read = rule.external.table.runs[rule.external.run]
            problem = _describe_resampled_rule(rule, prompt_run, read, reader)
            if problem is not None:
                what = f"`{_name_rule(rule)}` {problem[0]} in a vision encoder whose patches are "
                what += "resampled to the tokens of an image"
                yield NotSupported(span=rule.spec.span, what=what, later=problem[1])


def _describe_resampled_rule(
    rule: ResolvedRule, prompt_run: PromptRun, read: PromptRun, reader: TextTokenizer
) -> tuple[str, str] | None:
    """Return why a rule isn't computed, and a hint.

    Args:
        rule: The rule.
        prompt_run: The run in which it acts.
        read: The run that it reads.
        reader: The model's tokenizer.
    """
    if rule.does.reads is None:
        return None
    for key, cell in rule.positions.read.items():
        to = _list_whole_grids(prompt_run, rule.positions.written[key], reader)
        for of, grid in zip(_list_whole_grids(read, cell, reader), to, strict=False):
            if of is not None and grid is not None and of != grid:
                hint = "use images of one width and height, or name patches that both images have"
                return "between images with different rows and columns of patches", hint
    return None


def _list_whole_grids(
    run: PromptRun, cell: PositionCell, reader: TextTokenizer
) -> Iterator[list[tuple[int, int, int]] | None]:
    """Yield the tile, row and column of each patch of a position in each row; None if the position
    has only some patches of an image."""
    if cell.vectors == 1:  # a run reports unknown patches (E0413)
        return
    assert isinstance(reader, ImagePromptTokenizer)
    for row, hits in zip(run.rows, cell.hits, strict=True):
        wanted, grids = (
            {patch for numbers in hits for patch in numbers},
            dict[int, tuple[int, int, int]](),
        )
        for picture in row.whole_pictures:
            expansion = reader.encoder_expansion(picture.picture.picture.extent)
            first = picture.first * expansion.vectors
            own = {first + c.position: (c.tile, c.row, c.col) for c in expansion.layout.cells}
            grids |= {} if wanted.isdisjoint(own) else own
        yield (
            [grids[patch] for numbers in hits for patch in numbers]
            if wanted == grids.keys()
            else None
        )


def _name_rule(rule: ResolvedRule) -> str:
    observed = rule.spec.observed
    return rule.spec.verb if observed is None else f"observe {observed.word}"


_IN_VISION = frozenset((
    "patch", "swap", "freeze", "ablate", "add", "set", "scale", "clamp", "project out",
    "project onto", "block", "reweight", "set edge", "observe norm", "observe attention",
))  # fmt: skip
"""Rules and observations that act in every vision encoder."""

_IN_VISION_OF_PROMPTS = _IN_VISION | frozenset((
    "observe probe", "observe prediction", "observe similarity", "observe cka", "observe rank",
    "observe effective_rank", "observe clusters", "observe value", "observe features",
    "observe random", "observe entropy", "observe distance", "observe received", "replace block",
    "path", "observe overlap", "observe edge_auroc", "allow",
))  # fmt: skip
"""Rules and observations in vision encoders whose output is inserted into prompts as tokens."""

_IN_ENCODER_DECODERS = _IN_VISION | frozenset((
    "replace", "observe entropy", "observe distance", "observe received", "observe value",
    "observe features", "observe rank", "observe effective_rank", "observe similarity",
    "observe cka", "observe clusters", "observe probe", "observe prediction",
    "observe logit_lens", "observe tuned_lens", "path", "allow", "replace block",
    "observe overlap", "observe edge_auroc", "renumber",
))  # fmt: skip
"""Rules and observations that act on the stacks of an encoder-decoder."""

_WITH_ATTENDED_IMAGES = _IN_VISION | frozenset((
    "replace block", "allow", "observe entropy", "observe distance", "observe received",
    "observe value", "observe rank", "observe effective_rank", "observe similarity",
    "observe probe", "observe prediction", "path", "observe cka", "observe clusters",
    "observe features", "observe logit_lens", "observe tuned_lens", "observe direct_logit",
    "observe rank_correlation", "renumber",
))  # fmt: skip
"""Rules and observations in language models whose blocks attend to an image."""

_ENCODER_DECODER_HINT = (
    "docs/load-models.md lists what is computed for encoder-decoders: `patch`, `ablate`, `add`, …"
)

_ATTENDED_IMAGE_HINT = (
    "docs/load-models.md lists what is computed in models whose blocks attend to an image"
)

_WEIGHT_RULES = ("scale weights", "set weights", "add to weights", "project out of weights")

_UNREAD_GATES = (
    "gates multiply the outputs of blocks that attend to an image, and edits of weights don't read "
    "them yet: "
)

_ATTENDED_IMAGE_HINTS = {
    "scale weights": f"{_UNREAD_GATES}write `scale z layer 0 head 1 at tokens * by 2`",
} | dict.fromkeys(
    _WEIGHT_RULES[1:], f"{_UNREAD_GATES}write `add 2 * d to mlp_out layer 0 at tokens *`"
)
"""Rules that aren't computed in a model whose blocks attend to an image → the reason and what to
write."""

_OTHER_STACK_HINTS = {
    "observe rollout": "it multiplies the patterns of one text, but the decoder also attends to "
    "the encoder: write `observe attention cross …` or `observe attention encoder …`",
} | dict.fromkeys(
    _WEIGHT_RULES,
    "edits of weights aren't computed in a stack that another one attends to: change what they "
    "write, as in `scale z layer 0 head 1 at last token by 2`",
)
"""Rules that aren't computed in an encoder-decoder → the reason and what to write."""

VISION_HINT = (
    "rules in the vision encoder are `patch`, `ablate`, `add`, `set`, `scale`, `clamp`, `swap`, "
    "`freeze`, `project out`, `project … onto`, `replace block`, `path`, those on attention "
    "between patches, and observations of `norm`, `value`, `similarity`, `cka`, `rank`, "
    "`effective_rank`, `clusters`, `probe`, `prediction`, `features`, `random`, `entropy`, "
    "`distance`, `received`, `overlap` and `edge_auroc`; others act in the language model, such as "
    "on `embed` at the tokens of an image"
)


def check_weight_rules(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0344 for rules on weights that wouldn't act like a model with these weights, together
    with other rules of the run, or with a measure."""
    if experiment.spec.prompts == spec.NO_PROMPTS:
        return  # edits of a model, each on the weights after the preceding ones
    for run in (*experiment.derived.values(), experiment):
        yield from _check_weight_order(run.rules)
    in_runs = [
        rule for run in experiment.derived.values() for rule in run.rules if _edits_weights(rule)
    ]
    atoms = [atom for measure in experiment.measures for atom in measure.atoms]
    long = next((a for a in atoms if any(a.appended) and max(a.lengths) > 1), None)
    if in_runs and long is not None:
        yield BadWeights(
            span=in_runs[0].spec.span,
            reason=f"`{long.node.span.written}` reads several tokens, and rules of a `run` act on "
            "the prompt alone",
            hint="name an edited model: `model edited = m with { … }`",
        )


def _edits_weights(rule: ResolvedRule) -> bool:
    return _changes_outputs(rule) or rule.spec.verb == PROJECT_OUT_OF_WEIGHTS


def _changes_outputs(rule: ResolvedRule) -> bool:
    return rule.basis is not None and rule.basis.definition == WEIGHTS_BASIS


def _check_weight_order(rules: Sequence[ResolvedRule]) -> Iterator[Diagnostic]:
    """Yield E0344 for the first rule on weights in a run that conflicts with an earlier one."""
    copy = "name an edited model: `model edited = m with { … }`"
    for number, rule in enumerate(rules):
        if not _edits_weights(rule):
            continue
        for other in rules[:number]:
            reason, hint = "", copy
            said = other.spec.span.written
            if not _edits_weights(other):
                if _written_layers(other) & _written_layers(rule):
                    reason = f"it would change the preceding rule `{said}`"
                    hint = "write rules on weights before those on activations"
            elif other.spec.verb == PROJECT_OUT_OF_WEIGHTS:
                if rule.spec.verb != ADD_TO_WEIGHTS:
                    reason = f"`{said}` has changed these weights already"
                    hint = f"write it before `{said}`"
            elif _named_numbers(other) & _named_numbers(rule):
                reason = f"`{said}` has changed these weights already"
            if reason:
                yield BadWeights(span=rule.spec.span, reason=reason, hint=hint)
                return
        heads = next((each for each in rules if _writes_heads(each, rule)), None)
        if heads is not None:
            reason = f"`{heads.spec.span.written}` writes what a head adds with its own weights"
            yield BadWeights(span=rule.spec.span, reason=reason, hint="write `z` there, or " + copy)
            return


def _written_layers(rule: ResolvedRule) -> set[tuple[str, int | None]]:
    points = () if rule.sites is None else rule.sites.points.values()
    return {(point.site, point.layer) for here in points for point in here}


def _writes_heads(rule: ResolvedRule, weights: ResolvedRule) -> bool:
    layers = {layer for site, layer in _written_layers(weights) if site == "attn_out"}
    writes = rule.does.changes == "sites" and _changes_outputs(weights)
    return writes and any((("head_out", layer) in _written_layers(rule)) for layer in layers)


def _named_numbers(rule: ResolvedRule) -> set[tuple[str, int, int]]:
    """Return (site, layer, number) of all output weights that a rule changes, in any cell."""
    found: set[tuple[str, int, int]] = set()
    if rule.basis is None:
        return found
    which = {
        number for coordinate in rule.basis.coordinates.values() for number in coordinate.which
    }
    every = any(not coordinate.which for coordinate in rule.basis.coordinates.values())
    for member in rule.basis.members:
        if isinstance(member.operand, OutputWeights):
            numbers = range(member.size) if every else which
            site, layer = member.operand.site, member.operand.layer
            found.update((site, layer, number) for number in numbers)
    return found


_BLOCK_ENDS = ("resid_pre", "resid_post")
"""Sites of a block that exist even if the block computes nothing."""


_IN_MLP = ("mlp", "in_mlp")
"""Stages of the sites of an MLP."""

READ_BY_RECEIVERS = ("attn_norm", "mlp_norm", "final_norm", "head_out")
"""Sites whose values edges of a circuit compute themselves."""


def _receiver_sites(path: PathTargets) -> set[str]:
    return {point.site for here in path.receivers.points.values() for point in here}


_JOINED = ("head_out", "attn_out", "mixer_out")
"""Sites of the sum of the heads of a layer."""


def _have_same_fill(one: ResolvedRule, other: ResolvedRule) -> bool:
    """Return whether two rules ablate the edges of their circuits with the same values."""
    written = [rule.spec.fill and rule.spec.fill.span.written for rule in (one, other)]
    alike = one.does == other.does and one.run == other.run and written[0] == written[1]
    return alike and not (one.spec.all_but or other.spec.all_but)


def _are_rejected_edges(rule: ResolvedRule, experiment: ResolvedExperiment) -> bool:
    """Return whether `check_other_stacks` rejects edges of the language model, next to rules in the
    vision encoder."""
    if rule.in_vision or experiment.model.shape.attends_to_image:
        return False
    return experiment.in_vision and (rule.path is not None or rule.circuit is not None)


def check_circuits(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0108 for rules that can't act together with an ablated circuit."""
    checked = [rule for rule in experiment.rules if not _are_rejected_edges(rule, experiment)]
    rules = [rule for rule in checked if rule.circuit is not None]
    if not rules:
        return
    started = experiment.derived.get(experiment.spec.base)
    others = [] if started is None else list(started.rules)
    circuits = [rule.circuit for rule in rules if rule.circuit is not None]
    neurons = {where for circuit in circuits for where in circuit.neurons}
    features = {output for circuit in circuits for output in circuit.features}
    of_mlps = {layer for site, layer in features if site == "mlp_out"}
    for rule in (*others, *checked):
        points = () if rule.sites is None else rule.sites.points.values()
        sites = {point.site for here in points for point in here}
        read = {site for site in sites if SITES[site].component in READ_BY_RECEIVERS}
        layers = {p.layer for here in points for p in here if p.site == "mlp_out"}
        mlps = [p for here in points for p in here if SITES[p.site].component == "mlp_out"]
        split = [where for where in map(name_neurons, mlps) if where in neurons]
        inside = layers | {
            p.layer for here in points for p in here if SITES[p.site].stage in _IN_MLP
        }
        outputs = {("attn_out", p.layer) for here in points for p in here if p.site in _JOINED}
        what, later = "", "write an experiment for each"
        if rule.path is not None and rule.path.frozen_norms:
            what = "`with frozen norms` together with a circuit"
        elif rule.path is not None and "attn_norm" in _receiver_sites(rule.path):
            what = "a path to `attn_norm` together with a circuit"
            later = "name what reads this norm: `q`, `k` and `v` of its heads"
        elif rule.path is not None and (neurons or features):
            noun = "neurons" if neurons else "features"
            what = f"a `path` together with a circuit with {noun}"
        elif rule.path is not None and any(circuit.stack for circuit in circuits):
            what = "a `path` together with a circuit of the vision encoder"
        elif rule.receiving_basis is not None:
            what = "a `path` to features together with a circuit"
        elif rule.circuit is None and rule.does.changes == "sites" and split:
            what = "a rule on the MLP of a layer in which neurons are nodes of a circuit"
            later = f"name its neurons: `{split[0][0]} layer {split[0][1]}`"
        elif rule.circuit is None and rule.does.changes == "sites" and of_mlps & inside:
            what = "a rule on the MLP of a layer in which features are nodes of a circuit"
            later = "write an experiment for each, or change other layers"
        elif rule.circuit is None and rule.does.changes == "sites" and features & outputs:
            what = "a rule on the output of the attention of a layer in which features of this "
            what += "output are nodes of a circuit"
            later = "write an experiment for each, or change single heads: `z layer 0 head 1`"
        elif rule.circuit is not None and rule is not rules[0] and rule.only is None:
            what = "a second rule that ablates edges"
            if _have_same_fill(rule, rules[0]):
                later = "join the edges of both in one `circuit`"
        elif rule.circuit is None and rule.does.changes == "sites" and read:
            what = f"a rule on `{min(read)}` together with a circuit"
        elif rule.does.changes == "blocks":
            what = "`replace block` together with a circuit"
        if what:
            yield NotSupported(span=rule.spec.span, what=what, later=later)


def check_cross_layer_rules(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0108 for rules on features of a cross-layer transcoder, which write to several layers,
    together with a circuit or with replaced blocks."""
    runs = [experiment, *experiment.derived.values()]
    rules = [rule for run in runs for rule in run.rules]
    writing = (rule for rule in rules if rule.does.changes == "sites")
    written = next((r for r in writing if any(basis.crosses_layers for basis in r.bases)), None)
    if written is None:
        return
    other = ""
    if any(rule.circuit is not None for rule in rules):
        other = "a circuit"
    elif any(rule.does.changes == "blocks" for rule in rules):
        other = "`replace block`"
    if other:
        what = f"a rule on features of a cross-layer transcoder together with {other}"
        later = "write an experiment for each"
        yield NotSupported(span=written.spec.span, what=what, later=later)


def check_read_features(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0108 for features of a transcoder that are read from a run whose rules change features
    of this transcoder: they are encoded from the input of the MLP, which doesn't have the
    change."""
    changed: dict[str, set[tuple[str, int | None]]] = {}
    for name, run in experiment.derived.items():
        writing = (rule for rule in run.rules if rule.does.changes == "sites")
        own = {each for rule in writing for each in _list_encoded(rule)}
        changed[name] = own | changed.get(run.spec.base, set())
    for rule in experiment.every_rule:
        reads = rule.does.reads == "run" or rule.does.changes == "nothing"
        if reads and changed.get(rule.run, set()) & _list_encoded(rule):
            what = f"reading features of a transcoder in `{rule.run}`, whose rules change some"
            later = "write the value, as in `set feature 3 of t at last token to 4`"
            yield NotSupported(span=rule.spec.span, what=what, later=later)


def _list_encoded(rule: ResolvedRule) -> set[tuple[str, int | None]]:
    """Return the transcoders whose features a rule names, each with its layers."""
    if rule.basis is None or rule.sites is None:
        return set()
    names = {member.name for member in rule.basis.members if member.reads}
    layers = {point.layer for here in rule.sites.points.values() for point in here}
    return {(name, layer) for name in names for layer in layers}


def check_removed_blocks(
    rules: Sequence[ResolvedRule], measures: Sequence[ResolvedMeasure], model: str
) -> Iterator[Diagnostic]:
    """Yield E0414 for sites that are written or read in a removed block, in some cell."""
    for rule in rules:
        if rule.does.changes != "blocks" or rule.sites is None or rule.spec.fill is None:
            continue
        for other in rules:
            if other.does.changes == "blocks" or other.sites is None:
                continue
            ends = () if other.path is None else (other.path.receivers,)
            for sites in (other.sites, *ends):
                point = _find_overlap(rule.sites, sites)
                if point is not None:
                    yield _site_in_removed_block(point, model, other.spec.span)
                    break
        layers = {_block_of(point) for here in rule.sites.points.values() for point in here}
        for measure in measures:
            points = [atom.point for atom in measure.atoms if atom.point is not None]
            point = next((point for point in points if _is_inside(point, layers)), None)
            if point is not None:
                yield _site_in_removed_block(point, model, measure.expression.span)


def check_runs_without_blocks(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0414 for sites that are written or read in a block that a run with rules removes."""
    model = experiment.model.name
    removed: dict[str | None, set[BlockPlace]] = {}
    for name, run in experiment.derived.items():
        yield from check_removed_blocks(run.rules, (), model)
        removed[name] = _removed_layers(run, removed.get(run.spec.base, set()))
    for one in (*experiment.derived.values(), experiment):
        base = one.spec.base
        yield from _check_bases(one, experiment, model)
        for rule in one.rules:
            if rule.sites is None or rule.does.changes == "blocks":
                continue
            places = [(base, rule.sites.points)]
            if rule.path is not None:
                places.append((base, rule.path.receivers.points))
            if rule.external is None and rule.does.reads is not None:
                places.append((rule.run, rule.sites.sources or rule.sites.points))
            for run, points in places:
                named = [point for here in points.values() for point in here]
                yield from _first_inside(named, removed.get(run, set()), model, rule.spec.span)
        for measure in one.measures:
            for atom in measure.atoms:
                points = (*atom.points.values(), *([] if atom.point is None else [atom.point]))
                layers = removed.get(base, set()) | removed.get(atom.run, set())
                yield from _first_inside(points, layers, model, measure.expression.span)
    for save in experiment.saves:
        yield from _first_inside(save.points, removed.get(save.run, set()), model, save.spec.span)


def _check_bases(
    one: ResolvedExperiment, experiment: ResolvedExperiment, model: str
) -> Iterator[Diagnostic]:
    """Yield E0414 for sites that base runs write in blocks that this experiment or run removes."""
    removing = [rule for rule in one.rules if rule.does.changes == "blocks"]
    passed: set[str | None] = set()  # stops if a run has the name of its base
    name = one.spec.base
    while name in experiment.derived and name not in passed:
        passed.add(name)
        base = experiment.derived[name]
        written = [rule for rule in base.rules if rule.does.changes != "blocks"]
        yield from check_removed_blocks([*removing, *written], (), model)
        name = base.spec.base


def _removed_layers(run: ResolvedExperiment, before: set[BlockPlace]) -> set[BlockPlace]:
    """Return the blocks that a run with rules replaces with identity.

    Args:
        before: The removed blocks of its base.
    """
    removed = set(before)
    for rule in run.rules:
        if rule.does.changes == "blocks" and rule.sites is not None:
            layers = {_block_of(point) for here in rule.sites.points.values() for point in here}
            removed = removed - layers if rule.spec.fill is None else removed | layers
    return removed


def _first_inside(
    points: Iterable[SitePoint], layers: set[BlockPlace], model: str, span: Span
) -> Iterator[Diagnostic]:
    inside = next((point for point in points if _is_inside(point, layers)), None)
    if inside is not None:
        yield _site_in_removed_block(inside, model, span)


def _site_in_removed_block(point: SitePoint, model: str, span: Span) -> Diagnostic:
    return SiteNotInBlock(
        span=span,
        model=model,
        site=point.site,
        layer=point.layer or 0,
        reason="that block is replaced with identity",
        layers="blocks that aren't replaced",
    )


BlockPlace = tuple[str, int | None]
"""Stack of a block, empty for the main one, and its layer."""


def _block_of(point: SitePoint) -> BlockPlace:
    stack = SITES[point.site].stack
    return "" if stack == "cross" else stack, point.layer


def _is_inside(point: SitePoint, layers: set[BlockPlace]) -> bool:
    inside = SITES[point.site].component not in _BLOCK_ENDS
    return inside and point.layer is not None and _block_of(point) in layers


def _find_overlap(removed: SiteTargets, other: SiteTargets) -> SitePoint | None:
    """Return a site in a removed block, in a cell that both rules share; None if there is none."""
    shared = [axis for axis in removed.axes if axis in other.axes]
    first = [removed.axes.index(axis) for axis in shared]
    second = [other.axes.index(axis) for axis in shared]
    for (key, blocks), (at, points) in product(removed.points.items(), other.points.items()):
        if [key[i] for i in first] != [at[i] for i in second]:
            continue
        layers = {_block_of(block) for block in blocks}
        inside = next((point for point in points if _is_inside(point, layers)), None)
        if inside is not None:
            return inside
    return None


def find_lacking_row(
    cell: PositionCell, span: Span, run: PromptRun, source: str | None = None
) -> Diagnostic | None:
    """Return E0310 for the position of an edge of a circuit that some row of a run lacks.

    Args:
        cell: Its tokens in this run; rows that lack it in the source run have none either.
        source: Name of the source run.
    """
    lacking = [row for row, hits in enumerate(cell.hits) if not any(hits)]
    if not lacking:
        return None
    return OutsidePrompt(
        span=span,
        position=span.written,
        run=run.name if source is None else f"{run.name}` or `{source}",
        lacking=len(lacking),
        total=len(run.rows),
        example=row_example(run.rows[lacking[0]]),
        hint="an edge of a circuit needs a position that every row has",
        unit="prompt" if run.rows[0].image is None else "image",
    )
