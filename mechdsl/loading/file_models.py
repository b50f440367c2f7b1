"""The models of a file: handed over from Python or loaded, and whether they have what it asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.diagnostics.e04_model import IdentityBroken, OneOutput
from mechdsl.hooks.block_exchange import unlike
from mechdsl.hooks.frozen_norms import not_linear
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.loading import devices
from mechdsl.loading.load import adopt, load
from mechdsl.loading.merge import load_adapter
from mechdsl.loading.proof_store import Notes
from mechdsl.loading.towers import facing
from mechdsl.models.identity import Hashed, file_hash
from mechdsl.packed.model_end import ModelEnd
from mechdsl.program import spec
from mechdsl.resolve.measures import unreadable
from mechdsl.resolve.model_runs import outputs_read
from mechdsl.resolve.observation import Observation
from mechdsl.resolve.over_rows import OverRows
from mechdsl.resolve.random_targets import with_controls
from mechdsl.resolve.resolved import ModelContext, ResolvedExperiment
from mechdsl.resolve.resolved_rule import ResolvedRule
from mechdsl.resolve.site_targets import missing_points
from mechdsl.validate.check_file import Checked, models_needed

Models = Mapping[str, tuple[Any, Any]]
"""Name → (transformers model, fast tokenizer), handed over from Python."""


def adopt_models(models: Models) -> tuple[dict[str, LoadedModel], list[Diagnostic]]:
    """Models handed over from Python, taken apart and verified."""
    loaded: dict[str, LoadedModel] = {}
    diagnostics: list[Diagnostic] = []
    for name, (module, tokenizer) in models.items():
        model, found = adopt(name, module, tokenizer)
        diagnostics.extend(found)
        if model is not None:
            loaded[name] = model
    return loaded, diagnostics


def contexts(source: Source, loaded: Mapping[str, LoadedModel]) -> dict[str, ModelContext]:
    """What checking needs of models that Python holds; the file may still declare them."""
    found: dict[str, ModelContext] = {}
    for name, model in loaded.items():
        if model.tokenizer is None:
            continue
        statement = spec.Model(span=Span(source, 0, 0), name=name, kind="local", path="")
        found[name] = ModelContext(statement, model.shape, model.tokenizer)
    return found


def load_models(
    checked: Checked,
    loaded: dict[str, LoadedModel],
    *,
    device: str,
    dtype: str | None,
    offload: Path | None,
    hashed: Hashed | None = file_hash,
    notes: Notes | None = None,
) -> list[Diagnostic]:
    """Load every model that an experiment runs on, as far as it isn't in `loaded`, into it.

    device, dtype, offload: as `RunOptions` has them. hashed: SHA-256 of a file, None to hash no
    weights. notes: as `load` has them. Gives the codes of `load` and `load_adapter`.
    """
    diagnostics: list[Diagnostic] = []
    for name in models_needed(checked):
        for statement in _bases_first(name, checked.program, loaded):
            if statement.base is not None and statement.base not in loaded:
                continue  # which has been refused
            if statement.base is not None:
                model, found = load_adapter(statement, loaded[statement.base], hashed)
            else:
                model, found = load(
                    statement,
                    device=devices.device(device),
                    dtype=dtype,
                    spread=devices.spread_of(device, offload),
                    hashed=hashed,
                    notes=notes,
                )
            diagnostics.extend(found)
            if model is not None:
                loaded[statement.name] = model
    return diagnostics


def with_views(experiments: Sequence[ResolvedExperiment], models: dict[str, LoadedModel]) -> None:
    """Add the towers that experiments run, each scored with what stands on its other side."""
    for experiment in with_controls(experiments):
        model = experiment.model
        if model.opposite is not None and model.key not in models:
            models[model.key] = facing(models[model.name], model)


def _bases_first(
    name: str, program: spec.Program, loaded: Mapping[str, LoadedModel]
) -> list[spec.Model]:
    """The statements of a model and of all that it hangs on, as far as they aren't loaded."""
    chain: list[spec.Model] = []
    while name not in loaded:
        chain.insert(0, program.models[name])
        base = chain[0].base
        if base is None:
            break
        name = base
    return chain


def not_there(
    experiments: Sequence[ResolvedExperiment], models: Mapping[str, LoadedModel]
) -> list[Diagnostic]:
    """What only a look at the modules shows to be missing: sites (E0402, E0413, E0414) and logits
    (E0437, E0438)."""
    found: list[Diagnostic | None] = []
    for experiment in with_controls(experiments):
        model = models[experiment.model.key]
        found.append(_made_elsewhere(experiment, model))
        read = [models[name] for name in experiment.models[1:]]
        runs = [run for run in experiment.spec.elsewhere if outputs_read(experiment.spec, run.name)]
        measured = [models[run.model] for run in runs if run.model is not None]
        for rule in experiment.every_rule:
            if rule.does.changes == "positions":
                found.append(_counts_itself(rule, model))
            seen = rule.does
            if isinstance(seen, Observation) and not isinstance(seen, OverRows):
                found += [_without_end(rule, seen, model)] if seen.gives == "logits" else []
            if rule.path is not None and rule.path.frozen_norms:
                found.append(_not_frozen(rule, model))
            if rule.path is not None and rule.path.also_at_the_end:
                found.append(_no_sum(rule, model))
            if rule.does.changes == "blocks":
                found.append(_not_alike(rule, model))
            if rule.sites is not None:
                points = [p for here in rule.sites.points.values() for p in here]
                span = rule.spec.span
                found += [missing_points(points, m.shape, m.name, span) for m in (model, *read)]
        for save in experiment.saves:
            span = save.spec.span
            found += [missing_points(save.points, m.shape, m.name, span) for m in (model, *read)]
        for measure in (*experiment.measures, *experiment.keep):
            points = [atom.point for atom in measure.atoms if atom.point is not None]
            span = measure.expression.span
            found.append(missing_points(points, model.shape, model.name, span))
            found += [
                unreadable(measure.expression, measure.atoms, m.shape, m.name)
                for m in (model, *measured)
            ]
    return [each for each in found if each is not None]


def _without_end(rule: ResolvedRule, does: Observation, model: LoadedModel) -> Diagnostic | None:
    """E0108 for what a component adds to logits, where that isn't a linear map of its output."""
    reason = ""
    assert rule.sites is not None
    places = {(p.site, p.layer) for here in rule.sites.points.values() for p in here}
    blocks = [model.anatomy.blocks[layer] for _, layer in places if layer is not None]
    sites = {site for site, _ in places}
    if model.anatomy.unembedding is None or "resid_post" not in model.shape.sites:
        reason = "of a model whose unembedding isn't found"
    elif does.read_by_measures:
        return None
    elif model.anatomy.final_norm is None:
        reason = "of a model whose final norm isn't found"
    elif "head_out" in sites and any(block.attn_behind for block in blocks):
        reason = "of heads with a norm behind them"
    elif "mlp_hidden" in sites and any(
        block.mlp_behind or block.down is None or block.taps["mlp_out"].scaled_by
        for block in blocks
    ):
        reason = "of neurons with a norm behind them"
    elif not ModelEnd(model).folds:
        reason = "through a final norm that isn't a scale times a linear map"
    if not reason:
        return None
    what = f"`observe {does.word}` {reason}, as in `{model.name}`,"
    return NotSupported(span=rule.spec.span, what=what)


def _counts_itself(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """E0108 for position ids of a model that isn't told them, E0207 for those that it hasn't."""
    first, last = model.calling.first_position, model.shape.max_positions
    if first is None:
        what = f"`renumber` in a model that counts positions by itself, as `{model.name}` does,"
        return NotSupported(span=rule.spec.span, what=what)
    assert rule.amounts is not None
    hits = [row for cell in rule.positions.written.values() for rows in cell.hits for row in rows]
    end = int(max(rule.amounts.values.values())) + max(map(len, hits), default=1)
    if last is None or end + first <= last:
        return None
    reason = f"counts to {end - 1}, and the last position is {last - first - 1}"
    hint = "count from a smaller number"
    return BadArgument(span=rule.spec.span, name="from", reason=reason, hint=hint)


def _no_sum(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """E0108 for the end beside other receivers where what senders add doesn't reach it as it is:
    norms of the sums, streams that are mixed."""
    blocks = model.anatomy.blocks
    if all(
        block.adds_up and block.behind is not None and not (block.middle or block.end)
        for block in blocks
    ):
        return None
    what = (
        f"a path to the end beside other receivers in `{model.name}`, whose residual stream isn't "
        "the sum of what blocks add,"
    )
    return NotSupported(span=rule.spec.span, what=what)


def _not_frozen(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """E0108 for norms that aren't a linear map divided by a scale."""
    path = not_linear(model.module, model.shape.d_model)
    if path is None:
        return None
    what = (
        f"a path with frozen norms in `{model.name}`, whose `{path}` isn't linear but for a scale"
    )
    return NotSupported(span=rule.spec.span, what=what)


def _not_alike(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """E0108 for blocks that can't compute in the place of others."""
    assert rule.sites is not None
    assert rule.sites.sources is not None
    pairs = {
        (to.layer, None if of.site == to.site else of.layer)
        for key, here in rule.sites.points.items()
        for to, of in zip(here, rule.sites.sources[key], strict=True)
    }
    for to, of in sorted(pairs, key=str):
        assert to is not None
        reason = unlike(model, to, of)
        if reason:
            what = f"block {of} in place of block {to}: {reason};"
            if of is None:
                what = f"identity in place of block {to}: {reason};"
            return NotSupported(span=rule.spec.span, what=what)
    return None


def _made_elsewhere(experiment: ResolvedExperiment, model: LoadedModel) -> Diagnostic | None:
    """E0439 for one output that is made of another token than its class makes it of, E0410 for a
    classifier that sees later tokens, which its kind doesn't tell."""
    span, named = experiment.model.spec.span, model.shape.architecture
    expected, found = experiment.model.shape, model.shape
    if found.output_at != expected.output_at:
        reason = (
            f"it is made of its {found.output_at}, and by its class of its {expected.output_at}"
        )
        return OneOutput(span=span, model=model.name, architecture=named, reason=reason)
    ends_in_pad = any(measure.at for measure in experiment.measures)
    if model.calling.reads == "last token" and model.calling.skips is None and ends_in_pad:
        reason = "prompts end in the pad token, and it is made of that, not of the one before"
        return OneOutput(span=span, model=model.name, architecture=named, reason=reason)
    if expected.causal and not found.causal:
        return IdentityBroken(
            span=span,
            model=model.name,
            architecture=named,
            identity="another last token leaves earlier outputs alone",
            reason=f"it sees later tokens, which its kind `{expected.family}` doesn't tell",
            hint="register the family with `@family` and `encodes = True`",
        )
    return None
