"""Conventions of a run in words, by short key.

They describe defaults, dropped data and choices, text generation, and the scoring of images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.text import count_noun, measure_names, name_list, quote
from mechdsl.execute.measurement.values import MeasuredValues
from mechdsl.execute.run_record import ExecutionProfile, PassSizes
from mechdsl.execute.unpatched_batch import compute_noise_scale
from mechdsl.execute.unpatched_runs import SUPPRESSING, find_end_tokens, find_suppressed
from mechdsl.forward.generation.cached_pass import choose_method
from mechdsl.forward.hooks.model import LoadedModel, shares_position_biases
from mechdsl.forward.hooks.settled import has_separate_heads
from mechdsl.models.shape import ModelShape
from mechdsl.planner.plan import PROMPT_TOKENS, ExperimentPlan
from mechdsl.program.spec import CLEAN, Estimator, Generation
from mechdsl.prompts.table import has_inserted_tokens
from mechdsl.prompts.tokens.image_prompts import IMAGE_TOKEN, ImagePromptTokenizer
from mechdsl.resolve.bases import CoordinateChange
from mechdsl.resolve.class_outputs import describe_pooling
from mechdsl.resolve.controls import accepts_control
from mechdsl.resolve.experiment import find_omitted_answers
from mechdsl.resolve.findings import MAX_LISTED_SITES
from mechdsl.resolve.observations import RowSetObservation
from mechdsl.resolve.runs import reads_any_reply
from mechdsl.resolve.types import (
    WEIGHTS_BASIS,
    MetricTerm,
    ResolvedExperiment,
    ResolvedMeasure,
    ResolvedRule,
    find_vector_role,
)
from mechdsl.results.experiment_result import ANSWER_TOKENS_KEY
from mechdsl.statistics.null_bands import min_draws
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import EFFECTS, Reply
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES, SITES


def reply_conventions(
    plan: ExperimentPlan, measured: MeasuredValues, model: LoadedModel
) -> Iterator[tuple[str, str]]:
    """Yield conventions on generation; empty without `generate`."""
    said, experiment = plan.experiment.generation, plan.experiment
    if said is None:
        return
    chosen = "the most likely token at each step"
    if said.sampled:
        chosen = (
            f"{', '.join(said.drawn)}, seed {experiment.seed}: separate draws for each prompt, "
            "cell, run, sample and step, independent of the batch"
        )
    if followed := [name for name in SUPPRESSING if find_suppressed(model, name)]:
        chosen += f", without the tokens of {name_list(followed)} in its generation config"
    if ignored := _ignored_settings(model):
        verb = "isn't" if len(ignored) == 1 else "aren't"
        chosen += f"; {name_list(ignored)} of the model's generation config {verb} used"
    yield "generate", f"up to {count_noun(said.tokens, 'token')} after each prompt, {chosen}"
    yield "replies end", _reply_ends(said, experiment, model)
    yield "lengths", "; ".join(_reply_lengths(plan, measured))
    way = choose_method(model)
    if model.shape.encodes_apart and not model.shape.attends_to_image:
        yield (
            "kept keys",
            "none: each token needs a full pass of the decoder; the encoder runs once",
        )
    elif way.kind == "whole":
        yield "kept keys", f"none: each token needs a full forward pass, because {way.reason}"
    if said.samples > 1:
        yield "samples", f"{said.samples:,} per row; a row's value is their mean"
    each = ["draws of noise"] if plan.draws > 1 else []
    each += ["samples"] if said.samples > 1 else []
    if each and reads_any_reply(experiment):
        several = f"the mean over its {' and '.join(each)} whose reply has the position"
        yield "places", f"a row's value is {several}; a cell excludes rows without one"
    rules = [r.rule for r in plan.rules if r.rule.does.changes not in ("nothing", "input")]
    if rules:
        yield "steps", "; ".join(_rule_steps(rules))
    if any(measure.reply is None for measure in experiment.measures):
        yield (
            "prompt end",
            "metrics that don't read the reply are measured in step 0, before it begins",
        )


def _reply_ends(said: Generation, experiment: ResolvedExperiment, model: LoadedModel) -> str:
    text = experiment.model.tokenizer.token_text
    own = " or ".join(f"`{text(token)}`" for token in sorted(find_end_tokens(model)))
    stops = " or ".join(map(json.dumps, said.stops))
    ends = [f"before {stops}"] if stops else []
    ends += [f"before the model's {own}"] if own else []
    return ", or ".join([*ends, f"after {count_noun(said.tokens, 'token')}"])


def _reply_lengths(plan: ExperimentPlan, measured: MeasuredValues) -> Iterator[str]:
    """Yield the lengths of replies, for each run and for all cells."""
    of: dict[str, list[Reply]] = {}
    for (run, _), replies in measured.unpatched_replies.items():
        of.setdefault(run, []).extend(replies)
    if plan.rules:
        every = (reply for own in measured.replies.values() for reply in own)
        of["patched"] = list(every)
    for name, replies in of.items():
        counts = [len(reply.ids) for reply in replies]
        if not counts:
            continue
        cut = sum(reply.ended == "length" for reply in replies)
        said = f"{name} {sum(counts) / len(counts):.3g} tokens ({min(counts)} to {max(counts)})"
        yield said + (f", {cut:,} of {len(counts):,} cut off" if cut else "")


def _rule_steps(rules: Sequence[ResolvedRule]) -> Iterator[str]:
    """Yield the passes in which rules act."""
    yield "step 0 is the pass over the prompt; each later step adds one token of the reply"
    later = [rule for rule in rules if rule.acts_later]
    if any(_names_positions(rule) for rule in later):
        yield "`last token` and `tokens *` extend to the newest token"
    effects: dict[str, dict[str, None]] = {}
    for rule in later:
        text = f"`{' '.join(rule.spec.span.written.split())}`"
        effects.setdefault(rule.does.at_newest, {})[text] = None
    for effect, texts in effects.items():
        yield effect + (f" ({', '.join(texts)})" if len(rules) > 1 else "")
    if any(rule.in_prefill and not _is_newest_only(rule) for rule in rules):
        yield "positions of the prompt are changed in step 0, and later tokens attend to the result"
    for rule in rules:
        if rule.after_prefill:
            text = " ".join(rule.spec.span.written.split())
            yield f"`{text}` edits the prompt's cache after step 0, which doesn't see the edit"


def _names_positions(rule: ResolvedRule) -> bool:
    """Whether the file names the rule's positions: `replace block` and edits of weights may not."""
    return rule.spec.at.span.start > rule.spec.span.start


def _is_newest_only(rule: ResolvedRule) -> bool:
    """Whether all positions of a rule are the newest token."""
    positions = rule.positions
    return len(positions.newest) == len(positions.written) and not positions.every


_MAX_SHOWN_TEXTS = 4


def tower_conventions(experiment: ResolvedExperiment) -> dict[str, str]:
    """Describe what an image is scored with and the texts that it chooses from."""
    shape = experiment.model.shape
    scale = "cosine times the model's scale"
    if shape.task == "many labels":
        scale += ", plus its bias"
    what, other = ("texts", "text") if shape.side == "vision" else ("images", "image")
    conventions = {
        "score": f"the model's own logit of an image and a text: {scale}",
        what: f"{len(shape.labels)}, each encoded once by the {other} tower, where no rule acts",
    }
    opposite = experiment.model.opposite
    if opposite is not None and opposite.block:
        conventions[what] = f"`{opposite.block}`: {conventions[what]}"
    if shape.classes:
        first = ", ".join(
            quote(text) for text in shape.labels[: min(_MAX_SHOWN_TEXTS, shape.classes)]
        )
        more = shape.classes - _MAX_SHOWN_TEXTS
        said = f"{count_noun(shape.classes, other)}: {first}" + (f" and {more} more" * (more > 0))
        said += "; `correct`: this one scores highest; `rank`: its position among them"
        if shape.task == "one label":
            said += "; `prob`: their softmax"
        conventions["classes"] = said
    if shape.task == "many labels":
        conventions["prob"] = "a sigmoid, as in training: each text is scored independently"
    return conventions


def model_text(model: LoadedModel) -> str:
    return f"{model.shape.architecture}, {model.provenance.get('source', '')}"


def run_conventions(
    plan: ExperimentPlan, measured: MeasuredValues, model: LoadedModel
) -> dict[str, str]:
    """Describe defaults, dropped data and choices."""
    experiment = plan.experiment
    return {
        "model": model_text(model),
        "dtype": f"{str(model.dtype).removeprefix('torch.')} on {model.device}",
        **experiment.table.conventions,
        **dict(_of_rows(experiment, measured)),
        **dict(_of_runs(experiment, model)),
        **experiment.picks,
        **_of_directions(plan, measured),
        **_of_bases(plan),
        **_of_rules(plan, model),
        **dict(_of_estimates(experiment)),
        **_of_measures(experiment),
        **dict(reply_conventions(plan, measured, model)),
        **dict(_of_cells(plan, measured)),
        **dict(_of_controls(plan)),
        **dict(_of_errors(plan, measured)),
        **dict(_of_features(plan, measured)),
        **dict(_of_findings(plan, measured)),
        **dict(_of_inert(plan, measured)),
        **dict(_of_text_before_image(experiment, model)),
        **dict(_of_joint_norms(experiment, model)),
    }


def _of_joint_norms(experiment: ResolvedExperiment, model: LoadedModel) -> ConventionItems:
    """Describe edges of a circuit in a model whose heads share a norm (OLMo 2)."""
    has_circuit = any(rule.circuit is not None for rule in experiment.every_rule)
    if has_circuit and model.shape.takes == "text" and not has_separate_heads(model):
        yield (
            "heads",
            "a norm joins the queries, keys or outputs of all heads in a layer: an edge into one "
            "head also changes the others",
        )


ConventionItems = Iterator[tuple[str, str]]
"""Keys and texts of conventions."""


def _of_rows(experiment: ResolvedExperiment, measured: MeasuredValues) -> ConventionItems:
    """Describe Python functions and missing rows."""
    if experiment.python:
        names: dict[tuple[str, str], dict[str, None]] = {}
        for python_function in experiment.python:
            names.setdefault((python_function.file, python_function.identity), {})[
                f"`{python_function.name}`"
            ] = None
        yield (
            "python",
            "; ".join(
                f"{', '.join(own)} of {file}, {identity}" for (file, identity), own in names.items()
            ),
        )
    if experiment.keep:
        conditions = " and ".join(measure.text for measure in experiment.keep)
        dropped = len(experiment.table) - len(measured.kept) - len(measured.unusable)
        yield (
            "keep",
            f"{count_noun(len(measured.kept), 'row')} kept, {dropped} dropped ({conditions})",
        )
    if measured.unusable:
        yield (
            "left out",
            f"{len(measured.unusable)} of {len(experiment.table)} rows, from every result: "
            "NaN or infinity (`--allow-nan`)",
        )


def _of_runs(experiment: ResolvedExperiment, model: LoadedModel) -> ConventionItems:
    """Describe attention in prompts without images, noise and the rules of derived runs."""
    pictured = any(row.pictures for row in experiment.table.runs[CLEAN].rows)
    if model.calling.token_type and not pictured:
        said = "each token attends to itself and earlier ones, as no prompt has an image"
        yield "prompt attention", f"{said} (`token_type_ids` of {model.calling.token_type})"
    for name, run in experiment.table.runs.items():
        noise = run.noise if run.derived is None else None
        if noise is not None and noise.sds is not None:
            key = f"noise of {name}"
            value = f"{noise.sds:g} sd = {compute_noise_scale(model, noise):.4g}"
            yield key, f"{experiment.table.conventions[key]}, {value}"
    for name, resolved in experiment.derived.items():
        said = (" ".join(rule.spec.span.written.split()) for rule in resolved.rules)
        rules = "; ".join(dict.fromkeys(said))
        read = "" if resolved.spec.source is None else f", from {resolved.spec.source}"
        stays = "; its writes stay in place under the experiment's rules"
        place = stays if name in _list_bases(experiment) else ""
        yield f"run {name}", f"{resolved.spec.base} with {rules}{read}{place}"


def _list_bases(experiment: ResolvedExperiment) -> list[str]:
    """List the base run of an experiment, the run that its rules start from, and so on."""
    bases = [experiment.spec.base]
    while (run := experiment.derived.get(bases[-1])) is not None:
        bases.append(run.spec.base)
    return bases


def _of_estimates(experiment: ResolvedExperiment) -> ConventionItems:
    """Describe the estimator that replaces running cells."""
    said, base = experiment.spec.estimator, experiment.spec.base
    if said is None:
        return
    where = f"gradients of the {base} run"
    if said.joins_cells:
        where = f"gradients between the {base} run and the written values"
    elif said.kind.moves == "senders":
        where = (
            "gradients as all heads or neurons of the senders' site and layer move at all tokens "
            f"from the {experiment.spec.source} run to the {base} run, which is the last point"
        )
    elif said.steps is not None:
        stacks = " of both stacks" if experiment.model.shape.encodes_apart else ""
        where = (
            f"gradients as the stream that enters block 0{stacks} moves from the "
            f"{experiment.spec.source} run to the {base} run, which is the last point"
        )
    change, by = "what is written less what is there", ""
    of_circuit = experiment.has_circuit
    if experiment.has_path or of_circuit:
        change = "the change of the senders"
    if of_circuit:
        where = "gradients of the run of the circuit as a whole, whose value they are added to"
        by = " by the receivers' inputs"
    along = experiment.has_path and said.kind.place == "sites"
    if along and said.between_runs:
        change += ", times the derivative of the receivers' inputs while all else is held"
        by = " by these inputs"
    text = said.kind.convention
    terms = {"steps": said.steps, "change": change, "by": by, **dict(said.options)}
    for name, value in terms.items():
        text = text.replace(f"{{{name}}}", str(value))
    if said.verify is not None:
        text = text.replace("estimates, no cell was run: ", "")
    edges = said.kind.place == "attention"
    filled = any(rule.spec.fill is not None for rule in experiment.rules)
    if filled and not edges and not said.kind.reads_written:
        yield (
            "fill",
            "not used: a gradient is taken at the base activations, not at a written value",
        )
    if edges:
        yield "edges", "none is blocked: the rule only selects attention weights"
    alias = "" if said.name == said.kind.name else f"`{said.name}` is "
    decomposed = said.kind.decomposes
    where = "" if decomposed else f"; {where}, by autograd"
    if along and not said.between_runs:
        where = (
            "; the same along the edges, while all else is held, and from the inputs of the "
            f"receivers to the metric{where}"
        )
    yield "estimates", f"{alias}`{said.text}`: {text}{where}"


def _of_cells(plan: ExperimentPlan, measured: MeasuredValues) -> ConventionItems:
    """Describe missing cells and rows of cells, and the combination of rules in one cell."""
    if plan.path is not None and plan.additional_rules:
        yield (
            "outside the path",
            "the other rules act in each of its passes, also where other activations are "
            f"held; senders take their values from the {plan.path.rule.run} run, without "
            "these rules; each row is a full forward pass",
        )
    leading = [rule.paths.exists for rule in plan.rules if rule.paths is not None]
    there = np.ones(plan.n_cells, dtype=np.bool_) if plan.drawn is None else plan.drawn
    missing = int((there & ~np.logical_and.reduce(leading)).sum()) if leading else 0
    if missing:
        yield (
            "pairs",
            f"{there.sum() - missing} of {there.sum()}; in the others no receiver follows a sender",
        )
    if measured.dropped:
        of_donors = any(rule.rule.does.reads == "donor" for rule in plan.rules)
        why = "they read an answer token that isn't an input of the model"
        yield (
            "resample" if of_donors else "left out",
            f"{count_noun(measured.dropped, 'row')} of cells left out: "
            f"{'the other row lacks the position' if of_donors else why}",
        )
    acting = {r.rule.spec.span for r in plan.rules if r.rule.does.changes != "nothing"}
    if len(acting) > 1:
        yield (
            "rules",
            "together in one run, in the order of the file; if two set the same vector, the "
            "later one applies",
        )
    if any(_window_text(rule.rule.spec) for rule in plan.rules):
        yield (
            "window",
            "of w, named by its centre: from centre − ⌊w/2⌋ to centre + ⌈w/2⌉ − 1, clipped "
            "at the ends, counting only layers that have the site",
        )
    partial = plan.experiment.partial_layers.items()
    if partial:
        yield "layers", "; ".join(_list_layers(*each) for each in partial)
    if any(_several_answers(rule.positions) for rule in plan.rules):
        yield "tokens", "several tokens with one label are run separately and averaged per row"
    answers = "; ".join(_on_answers(plan))
    if answers:
        yield ANSWER_TOKENS_KEY, answers
    left_out = dict.fromkeys(x for rule in plan.rules for x in rule.rule.positions.left_out)
    if left_out:
        yield "positions", f"left out, as no row has them in both runs: {', '.join(left_out)}"


def _of_controls(plan: ExperimentPlan) -> ConventionItems:
    """Describe the controls that effects are compared with."""
    experiment = plan.experiment
    if experiment.control is not None:
        yield "controls", experiment.control.said
        if experiment.control.title == "null":
            yield "null band", _null_band(experiment)
    elif experiment.spec.estimator is not None:
        yield "controls", "none: random targets aren't estimated"
    elif experiment.without_control:
        yield "controls", f"none: {experiment.without_control}"
    elif any(rule.rule.does.changes != "nothing" for rule in plan.rules):
        hint = " (`against random(39)` adds matched random targets)"
        yield "controls", "none" + (hint if accepts_control(experiment) else "")


def _of_errors(plan: ExperimentPlan, measured: MeasuredValues) -> ConventionItems:
    """Describe what dictionaries leave out of the vectors that rules change."""
    for name, (error, count) in measured.errors.items():
        rules = [rule.rule for rule in plan.rules if rule.rule.basis is not None]
        interventions = [rule.does for rule in rules if rule.basis and name in rule.basis.names]
        drops = [
            isinstance(does, CoordinateChange) and does.leaves_no_error for does in interventions
        ]
        kept = "some rules keep it" if not all(drops) and any(drops) else "rules keep it"
        kept = "it is dropped" if all(drops) else kept
        estimator = plan.experiment.spec.estimator
        if estimator is not None and estimator.verify is None and not all(drops):
            kept = "it is held fixed"
        prompts = "" if plan.experiment.generation is None else "the prompts of "
        vectors = f"{count_noun(count, 'vector')} of {prompts}{plan.experiment.spec.base}"
        vectors += " at the rules' sites" if estimator is not None else " that rules change"
        yield (
            f"error of {name}",
            f"{error:.3g} of a vector's length, the mean over {vectors}; {kept}",
        )


def _of_features(plan: ExperimentPlan, measured: MeasuredValues) -> ConventionItems:
    """Describe how well a basis describes the observed vectors."""
    features, rule = measured.features, plan.observes
    if features is None or rule is None or rule.rule.basis is None:
        return
    at = f"at {count_noun(features.tokens, 'token')}"
    if rule.rule.in_vision:
        at = f"at {count_noun(features.tokens, 'patch')}"
    said = f"{features.active:,} of {features.size:,} features are active {at}"
    if features.explained is not None:
        said += f"; the reconstruction explains {features.explained:.4g} of their variance"
    yield f"features of {rule.rule.basis.definition}", said


def _of_findings(plan: ExperimentPlan, measured: MeasuredValues) -> ConventionItems:
    """Describe further numbers of an observation over all rows."""
    for rule in plan.rules:
        if isinstance(rule.rule.does, RowSetObservation):
            for finding in rule.rule.does.describe_findings(measured.findings):
                yield finding.key, finding.text


def _describe_patches(shape: ModelShape) -> str:
    """Describe the patches of the vision encoder that rules at tokens of images act on."""
    side = shape.merged_side
    if shape.resamples:
        read = "a resampler reads all patches of a tile for each token"
        if not shape.resampler_attends:
            read = "tokens of frames and of large images are interpolated from several patches"
        return f"each position is a patch of an image; {read}"
    if side == 1:
        return "each token of an image is one of its patches"
    return (
        f"at a token of an image, rules act on the {side} x {side} patches that its vector is made "
        "from, row by row; observations, and rows of directions, probes and computed bases, are "
        "means over them; dictionaries and factors are trained on single patches"
    )


_FULL_ROWS = "every row is a full forward pass over its prompt"


def _of_inert(plan: ExperimentPlan, measured: MeasuredValues) -> ConventionItems:
    """Describe rows that needn't be run."""
    if measured.inert:
        there, inert = int(plan.exists.sum()), int((plan.inert & plan.exists).sum())
        yield (
            "inert",
            f"{inert} of {there} cells, and {measured.inert:,} of "
            f"{measured.rows:,} rows in all, can't differ from the base run",
        )
    if plan.experiment.in_vision:
        shape = plan.experiment.model.shape
        replaced = (
            "blocks of `cross` read the vectors of the changed image"
            if shape.attends_to_image
            else "a changed image's vectors replace `embed` of all its tokens, before other rules "
            "act there"
        )
        writes = any(rule.writes_vision for rule in plan.experiment.every_rule)
        patches = _describe_patches(shape)
        if any(rule.in_vision and rule.edge is not None for rule in plan.experiment.every_rule):
            patches += (
                "; a patch attends to patches of all tiles, to class tokens and to padding"
                if shape.attends_to_image
                else "; a patch attends to patches of its tile or window, and to nothing if all of "
                "them are blocked; weights are sums over the patches of keys"
            )
        if writes:
            patches += f"; {replaced}"
        yield "vision encoder", patches
        why = "rules change images" if writes else "vectors are read"
        yield "planner", f"{_FULL_ROWS}: {why} in the vision encoder"
    elif plan.experiment.needs_full_passes:
        why = "the model adds vectors of images after its first blocks, outside their outputs"
        yield "planner", f"{_FULL_ROWS}: {why}"
    if measured.with_inactive is not None:
        there = int(plan.exists.sum())
        still = int((measured.find_inactive_cells() & ~plan.inert & plan.exists).sum())
        yield (
            "inactive",
            f"{still:,} of {there:,} cells, and {measured.inactive:,} of {measured.rows:,} rows in "
            "all, change only features that are 0 before and after, so they equal the base run; "
            "these cells are left out of the correction",
        )


def _of_text_before_image(experiment: ResolvedExperiment, model: LoadedModel) -> ConventionItems:
    """Describe rules on MLPs that text before the image skips, in blocks that attend to it."""
    shape, module = model.shape, cast(Any, model.module)
    if not shape.attends_to_image:
        return
    blocks = {layer for layer in range(shape.n_layers) if not shape.has("attn_out", layer)}
    rows = experiment.table.runs[experiment.spec.base].rows
    token = int(module.config.image_token_index)
    ends = [row.source + row.ids[row.source :].index(token) for row in rows]
    for rule in experiment.every_rule:
        points = () if rule.sites is None else rule.sites.points.values()
        inside = {p.layer for here in points for p in here if p.site in _MLP_SITES}
        cells = rule.positions.written.values()
        before = any(
            source <= at < end
            for cell in cells
            for hits, end, source in zip(cell.hits, ends, (row.source for row in rows), strict=True)
            for tokens in hits
            for at in tokens
        )
        if inside & blocks and before:
            named = ", ".join(map(str, sorted(blocks)))
            said = f"it skips the MLPs of blocks {named}: rules on them change nothing there, and "
            yield "text before the image", f"{said}vectors that are read aren't added to the stream"
            return


_MLP_SITES = ("mlp_norm", "mlp_hidden", "mlp_out")


def _null_band(experiment: ResolvedExperiment) -> str:
    """Describe the meaning of a null band and its p-value."""
    confidence = experiment.spec.statistics.confidence
    effects = dict.fromkeys(measure.effect for measure in experiment.spec.measures)
    by_zero = [name for name in effects if EFFECTS[name].is_shown_by_zero]
    size = "large"
    if by_zero:
        size = "small" if len(by_zero) == len(effects) else f"large (`{by_zero[0]}`: small)"
    return (
        "from the r-th lowest to the r-th highest of k different draws; a further draw falls "
        "in this range with probability (k + 1 − 2r)/(k + 1); r is the largest for which that "
        f"is at least {confidence:g} %, else 1 (the whole range); `p null` is (1 + b)/(1 + k), "
        f"where b draws are at least as {size} in size as the cell; each cell is compared "
        "separately, and its `p null` is at least 1/(1 + k); with k below "
        f"{min_draws(confidence)}, no effect is reported as inside its band"
    )


_UNUSED_SETTINGS: Mapping[str, float] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": -1,
    "suppress_tokens": -1,
    "begin_suppress_tokens": -1,
}
"""Settings of a generation config that change which tokens `generate` of transformers chooses, with
the values that change nothing."""


def _ignored_settings(model: LoadedModel) -> list[str]:
    """Return the settings of the model's generation config that replies don't depend on here."""
    given = getattr(model.module, "generation_config", None)
    values = {name: getattr(given, name, None) for name in _UNUSED_SETTINGS}
    return [
        name
        for name, value in values.items()
        if value not in (None, [], _UNUSED_SETTINGS[name])
        and not (name in SUPPRESSING and find_suppressed(model, name))
    ]


def fallback_conventions(
    model: LoadedModel, measured: MeasuredValues, profile: ExecutionProfile
) -> dict[str, str]:
    """Describe deviations of the run from its plan."""
    conventions: dict[str, str] = {}
    if not model.restartable:
        conventions["planner"] = f"{_FULL_ROWS}: the model can't be restarted"
    elif model.shape.encodes_apart:
        conventions["planner"] = "every row is a full forward pass through encoder and decoder"
    if profile.halved:
        times = "once" if profile.halved == 1 else f"{profile.halved} times"
        conventions["memory"] = (
            f"ran out {times}, here or in experiments that share passes; passes were halved and "
            "run again"
        )
    if measured.recomputed:
        prompts = count_noun(len(measured.recomputed), "prompt")
        conventions["gradients"] = (
            f"backward passes of {prompts} computed activations again where possible, to save "
            "memory"
        )
    return conventions


def pass_size_convention(sizes: PassSizes) -> dict[str, str]:
    """Return the options `--pass-tokens` and `--prompt-tokens` that reproduce the run, if they
    aren't the defaults."""
    if sizes.chosen == "default" and sizes.prompt_tokens == PROMPT_TOKENS:
        return {}
    passes, prompts = f"{sizes.pass_tokens:,}", f"{sizes.prompt_tokens:,}"
    return {"pass sizes": f"up to {passes} tokens each, prompts in batches of up to {prompts}"}


_PROBABILITY = {
    "one label": "of which one is right; `prob`: their softmax; `correct`: this label scores "
    "highest",
    "many labels": "each independently true or false; `prob`: a sigmoid; `correct`: it is over 0.5",
}
"""Meaning of metrics on the labels of a classifier."""


def _counted_tokens(experiment: ResolvedExperiment) -> str:
    """Describe the tokens of prompts over which `loss` is a mean."""
    row = experiment.table.runs[experiment.spec.base].rows[0]
    reader, own = experiment.model.tokenizer, enumerate(zip(row.ids, row.special, strict=True))
    image = reader.image_id if row.pictures and isinstance(reader, ImagePromptTokenizer) else None
    text = [
        n
        for n, (token, special) in own
        if n >= row.source and not special and token < IMAGE_TOKEN and token != image
    ]
    counted = "except the first, which nothing predicts: no special token precedes it"
    if text and text[0] > row.source:
        before = reader.token_text(row.ids[text[0] - 1])
        counted = f"including the first, which `{before}` predicts"
    if not row.pictures:
        return f"mean over the prompt's own tokens {counted}"
    return f"mean over the prompt's own tokens of text {counted}; tokens of images don't count"


def _of_measures(experiment: ResolvedExperiment) -> dict[str, str]:
    """Describe the targets and positions of metrics, unless their labels include them."""
    notes: dict[str, str] = {}
    every = [*experiment.measures, *experiment.keep]
    if any(atom.form.takes == "prompt" for measure in every for atom in measure.atoms):
        notes["loss"] = _counted_tokens(experiment)
    said = [
        said for measure in every for atom in measure.atoms for said in _of_sets(atom, experiment)
    ]
    texts = [said for measure in every for said in _of_texts(measure)]
    if said or texts:
        once = ["equal tokens count once"] if said else []
        once += ["a text that begins with another one isn't added to it"] if texts else []
        notes["answer sets"] = "; ".join(dict.fromkeys([*said, *texts, *once]))
    shape = experiment.model.shape
    logits = any(atom.form.of_outputs for measure in every for atom in measure.atoms)
    if logits and shape.output_at != "every token":
        notes["output"] = f"one per prompt, computed from {describe_pooling(shape)}"
        if shape.output_at == "image":
            notes["output"] = "one per image"
            if has_inserted_tokens(experiment.table.runs[experiment.spec.base]):
                notes["output"] += "; a head that averages over tokens includes inserted ones"
    if logits and shape.side:
        notes |= tower_conventions(experiment)
    elif logits and shape.task in _PROBABILITY:
        notes["classes"] = f"{shape.outputs} labels, {_PROBABILITY[shape.task]}"
    places: dict[str, dict[str, None]] = {}
    for said in experiment.spec.measures:
        if said.place is not None:
            name = measure_names(said.label)[-1]
            places.setdefault(name, {})[f"`{said.place}`"] = None
    if places:
        notes["measured"] = "; ".join(
            f"`{name}` at {' and '.join(own)}" for name, own in places.items()
        )
    compared = [
        "last token" if said.at is None else said.at.span.written
        for measure, said in zip(experiment.measures, experiment.spec.measures, strict=True)
        if any(atom.form.takes == "activations" for atom in measure.atoms)
    ]
    if compared:
        where = " and ".join(f"`{at}`" for at in dict.fromkeys(compared))
        notes["cosine"] = f"compared at {where}, where the metric reads, not where rules write"
    return notes


def _of_sets(atom: MetricTerm, experiment: ResolvedExperiment) -> Iterator[str]:
    """Describe the tokens that a metric accepts, unless all rows have one range of numerals."""
    node, sets = atom.node, list(atom.sets.values())
    if not sets or not isinstance(node, ast.Call) or atom.part_of is not None:
        return
    plain = len(node.arguments) == 1 and len(sets) == len(sets[0].tokens) == 1
    if plain and isinstance(node.arguments[0].value, ast.Range):
        return
    counts = sorted({len(tokens) for token_sets in sets for tokens in token_sets.tokens})
    many = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    token_of = {
        number: token
        for token_sets in sets
        for numbers, tokens in zip(token_sets.numbers, token_sets.tokens, strict=False)
        for number, token in zip(numbers, tokens, strict=True)
    }
    if not token_of:
        yield f"`{node.span.written}` over {many} tokens per row"
        return
    text = experiment.model.tokenizer.token_text
    spelt = " to ".join(f"`{text(token_of[end])}`" for end in (min(token_of), max(token_of)))
    yield f"`{node.span.written}` over {many} numerals per row ({spelt})"


def _of_texts(measure: ResolvedMeasure) -> Iterator[str]:
    """Describe the metrics that accept several texts, of which some have several tokens."""
    parts: dict[ast.Expr, list[MetricTerm]] = {}
    for atom in measure.atoms:
        if atom.part_of is not None:
            parts.setdefault(atom.part_of, []).append(atom)
    for node, part in parts.items():
        counts = sum(map(_texts_per_row, part))
        least, most = int(np.min(counts)), int(np.max(counts))
        many = f"{least} to {most}" if least < most else f"{most}"
        yield f"`{node.span.written}` over {many} texts of one or more tokens per row"


def _texts_per_row(term: MetricTerm) -> NDArray[np.int64]:
    """Return how many of the accepted texts a term reads in each row."""
    if term.sets:
        return np.array([len(term.sets[None].of(n)) for n in range(len(term.sets[None].of_row))])
    present = np.ones(len(term.texts[None]), int)
    present[list(term.lacking)] = 0
    return present


def _on_answers(plan: ExperimentPlan) -> Iterator[str]:
    """Describe rules on answers of several tokens, where they could be misunderstood."""
    left = [answer.at.span.written for answer in find_omitted_answers(plan.experiment)]
    if left:
        where = " and ".join(f"`{at}`" for at in dict.fromkeys(left))
        yield f"{where} covers only the prompt; the answer after it isn't edited"
    if plan.in_answers:
        yield (
            "rules act on the text that each measure reads, which follows the prompt of "
            "every run; its last token is predicted and isn't an input"
        )


def _window_text(rule: Any) -> bool:
    places = [place for place in (rule.site, rule.edge, rule.receiver) if place is not None]
    return any(axis.window is not None for place in places for axis in place.axes)


def _list_layers(written: str, layers: Sequence[int]) -> str:
    """Describe the layers that `*` selects where other blocks lack the site."""
    noun = "layer" if len(layers) == 1 else "layers"
    return f"{written} selects {noun} {', '.join(map(str, layers))}: other blocks lack this site"


def _several_answers(positions: Any) -> bool:
    return any(len(row) > 1 for cell in positions for row in cell.hits)


def _of_directions(plan: ExperimentPlan, measured: MeasuredValues) -> dict[str, str]:
    """Describe the computation and the norm of each direction."""
    notes: dict[str, str] = {}
    used = [rule.direction for rule in plan.experiment.every_rule if rule.direction is not None]
    for every in (list(direction.members.values()) for direction in used):
        members = every[:MAX_LISTED_SITES]
        for member in members:
            length = measured.lengths.get(member.name)
            norm = f"; norm {length:.4g}" if length else "; norm 0, so nothing changes"
            norm = "" if find_vector_role(member.vector) == "edit" else norm
            notes[f"direction {member.name}"] = f"{member.made}{norm}"
        more = len(every) - len(members)
        if more:
            notes["directions"] = f"and {more} more, made in the same way"
    return notes


def _of_bases(plan: ExperimentPlan) -> dict[str, str]:
    """Describe the computation of each basis, and of each trained group and lens."""
    parts = plan.experiment.trained_parts
    used = [basis for rule in plan.experiment.every_rule for basis in rule.bases]
    for basis in used:
        if basis.definition == WEIGHTS_BASIS:
            made = dict.fromkeys(member.made for member in basis.members if member.made)
            parts |= {f"direction of {WEIGHTS_BASIS}": "; ".join(made)} if made else {}
    named = [basis for basis in used if basis.definition not in (ast.STANDARD_BASIS, WEIGHTS_BASIS)]
    members = {member.name: member for basis in named for member in basis.members}
    for member in list(members.values())[:MAX_LISTED_SITES]:
        parts[f"basis {member.name}"] = member.made
    more = len(members) - MAX_LISTED_SITES
    if more > 0:
        parts["bases"] = f"and {more} more, computed in the same way"
    return parts


def _of_rules(plan: ExperimentPlan, model: LoadedModel) -> dict[str, str]:
    """Collect the notes of rules, each once, those on edges first; and where attention is computed
    explicitly for them."""
    every = plan.experiment.every_rule
    edges = [rule for rule in every if rule.edge is not None]
    others = [rule for rule in every if rule.edge is None]
    estimator = plan.experiment.spec.estimator
    rule_notes = _rule_notes(edges, model, estimator)
    left = list(_exceptions(others))
    if left:
        rule_notes["except"] = "; ".join(left)
    points = {p for rule in plan.rules for p in (*rule.point_table, *rule.source_table)}
    layers = sorted(
        {p.layer for p in points if p.site in ATTENTION_INTERNAL_SITES and p.layer is not None}
    )
    own = model.provenance.get("attention", "")
    if layers:
        where = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        by_itself = f" (the model uses `{own}`)" if own not in ("", "eager") else ""
        rule_notes["attention"] = f"computed explicitly (eager) in {where}{by_itself}"
    rule_notes |= _rule_notes(others, model, estimator)
    replaced = {
        SITES[point.site].stack
        for rule in every
        if rule.does.changes == "blocks" and rule.sites is not None
        for here in rule.sites.points.values()
        for point in here
    }
    if any(shares_position_biases(model, stack) for stack in replaced):
        rule_notes["position biases"] = (
            "block 0 computes them for all blocks of its stack, also if it is replaced"
        )
    if estimator is not None and estimator.verify is None:
        rule_notes.pop("passes", None)  # no row runs
    return rule_notes


def _exceptions(rules: Sequence[ResolvedRule]) -> Iterator[str]:
    """Describe how many sites `except` leaves out of each rule."""
    for rule in rules:
        receivers = None if rule.path is None else rule.path.receivers
        for written, targets in ((rule.spec.site, rule.sites), (rule.spec.receiver, receivers)):
            if written is not None and targets is not None and targets.left_out:
                yield f"`{' '.join(written.span.written.split())}`: {targets.left_out}"


def _rule_notes(
    rules: Sequence[ResolvedRule], model: LoadedModel, estimator: Estimator | None
) -> dict[str, str]:
    """Return the notes of rules by key.

    Args:
        estimator: The estimator in place of runs, if any.
    """
    notes: dict[str, dict[str, None]] = {}
    closing: dict[str, str] = {}
    for rule in rules:
        for convention in rule.does.conventions(rule, model.shape.n_layers):
            text = convention.text
            if convention.of_runs and estimator is not None:
                if estimator.verify is None:
                    continue
                text = f"in cells that `verify` runs, {text}"
            notes.setdefault(convention.key, {})[text] = None
            if convention.closing:
                closing[convention.key] = convention.closing
    return {
        key: "; ".join([*texts, *([closing[key]] if key in closing else [])])
        for key, texts in notes.items()
    }
