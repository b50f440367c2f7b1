"""What a rotation, vector or mask is trained on: rows, a rule and a measure, as an experiment that
no user sees.

`basis d = fit(das(dims: 2), prompts: p.train, from: fewer, maximise: M) at SITE at POSITIONS` is
trained on the rows of `prompts p.train` with `from fewer into clean`, `patch SITE at POSITIONS` and
`measure M as raw`. So are `direction v = fit(vector(…), …)` and `group g = fit(mask(…), …)`;
without `from`, the rule is `ablate SITE at POSITIONS with zero`, which names the vectors that are
edited, or has the fill of a mask.
"""

from __future__ import annotations

from mechdsl.diagnostics.core import did_you_mean, has_errors
from mechdsl.diagnostics.names import BadArgument, UnknownName
from mechdsl.program import spec
from mechdsl.program.basis_methods import BASIS_METHODS, OBJECTIVES
from mechdsl.program.directions import (
    FitRows,
    declared_training,
    fit_rows_of_basis,
    last_token,
)
from mechdsl.program.measures import lower_measure, lower_statistics
from mechdsl.program.names import Namespace
from mechdsl.program.own_trainers import find_trainer
from mechdsl.program.prompts import named_corruptions
from mechdsl.program.statements import Statements, mark_names_used, resolve_run_name
from mechdsl.program.trainers import EffectTrainer, RotationTrainer, trainer_call
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk


def lower_objectives(parts: spec.Definitions, scope: Namespace) -> None:
    """Lower what bases, directions and groups are trained on, after what they name.

    Codes: E0201 for runs, E0207 for runs of other rows, and those of measures.
    """
    _lower_partners(parts, scope)
    for name, basis in list(parts.bases.items()):
        if not trains_rotation(basis):
            continue
        used = _add_objective(basis, parts, scope)
        if used is None:
            del parts.bases[name]  # its error is reported
        else:
            parts.bases[name] = basis.model_copy(update={"changed_by": used})
    for name, direction in list(parts.directions.items()):
        training = declared_training(direction)
        if training is None:
            continue
        used = _add_objective(training, parts, scope)
        if used is None:
            del parts.directions[name]
        else:
            parts.directions[name] = direction.model_copy(update={"changed_by": used})
    for mask in parts.masks.values():
        _add_objective(mask, parts, scope)


def _lower_partners(parts: spec.Definitions, scope: Namespace) -> None:
    """Lower the runs whose vectors others are correlated with: `with: SITE of RUN`."""
    for name, basis in list(parts.bases.items()):
        given = {each.name: each.value for each in basis.method.arguments}
        view, rows = given.get("with"), fit_rows_of_basis(basis, parts)
        if not isinstance(view, ast.SiteView) or rows is None or rows.block is None:
            continue
        work = Statements(
            ast.ExperimentDef(ast.Name(name, span=view.span), (), span=view.span), parts, scope
        )
        mark_names_used(view.site, work)
        if view.at is not None:
            mark_names_used(view.at, work)
        known = view.at is None or _are_known(view.at, scope)
        if view.run is None:
            continue
        block = parts.prompts[rows.block]
        run = resolve_run_name(view.run, block, work)
        there = None if run is None else work.elsewhere.get(run)
        if run is None or not known or _reads_other_rows(rows, there, view.run, scope):
            del parts.bases[name]  # its error is reported
            continue
        there = there or spec.ExternalRunSpec(span=view.run.span, name=run, run=run)
        corruptions = {each.name for each in block.corruptions}
        used = {run} & corruptions if there.prompts is None else set[str]()
        parts.bases[name] = basis.model_copy(
            update={"partner": there, "changed_by": frozenset(used)}
        )


def _reads_other_rows(
    rows: FitRows, partner: spec.ExternalRunSpec | None, ref: ast.Ref, scope: Namespace
) -> bool:
    """Report E0207 for a corruption that is correlated with another model, which reads the clean
    run."""
    if partner is None or partner.model is None or rows.run == spec.CLEAN:
        return False
    reason = f"reads the clean run, and `prompts` names `{rows.run}`"
    hint = f"write `prompts: {rows.block}`, or leave `of {ref.whole}` out"
    scope.diagnostics.append(BadArgument(span=ref.span, name=ref.whole, reason=reason, hint=hint))
    return True


def _add_objective(
    basis: spec.Basis, parts: spec.Definitions, scope: Namespace
) -> frozenset[str] | None:
    """Add what a basis or a direction is trained on, and return the corruptions that it names; None
    after an error."""
    rows = fit_rows_of_basis(basis, parts)
    found = None if rows is None else _lower_objective(basis, rows, parts, scope)
    if found is None:
        return None
    parts.objectives[basis.name] = found
    return named_corruptions(found, parts.prompts[found.prompts])


def trains_rotation(basis: spec.Basis) -> bool:
    """Whether a basis is trained on the effect of a patch."""
    if BASIS_METHODS[basis.method.name].takes != "training":
        return False
    return isinstance(find_trainer(trainer_call(basis.method)), RotationTrainer)


def _lower_objective(
    basis: spec.Basis, rows: FitRows, parts: spec.Definitions, scope: Namespace
) -> spec.Experiment | None:
    """Lower what one basis, direction or group is trained on; None after an error."""
    call, before = basis.method, len(scope.diagnostics)
    given = {each.name: each.value for each in call.arguments}
    inner = trainer_call(call)
    trainer = find_trainer(inner)
    assert isinstance(trainer, EffectTrainer)
    assert rows.block is not None
    block = parts.prompts[rows.block]
    source = _source_run(given["from"], block, scope) if "from" in given else None
    if rows.run != spec.CLEAN and not trainer.any_run:
        node = given["prompts"]
        part = "" if rows.part is None else f".{rows.part}"
        reason = f"names the run `{rows.run}`, and the clean run is trained on"
        hint = f"write `prompts: {rows.block}{part}`"
        hint = f"write `prompts: {rows.block}{part}, from: {rows.run}`" if source else hint
        scope.diagnostics.append(
            BadArgument(span=node.span, name=node.span.written, reason=reason, hint=hint)
        )
    node = next(given[each] for each in OBJECTIVES if each in given)
    if isinstance(node, ast.Range | ast.Quantity | ast.SiteValue):
        hint = "write a metric: `maximise: logit(answer of fewer)`"
        scope.diagnostics.append(
            BadArgument(span=node.span, name=node.span.written, reason="is no measure", hint=hint)
        )
        return None
    effect = ast.Name("raw", span=node.span)
    measure = lower_measure(ast.Measure(node, effect, span=node.span), parts, scope)
    if has_errors(scope.diagnostics[before:]):
        return None
    of = basis.site.basis_name
    if of not in (None, ast.STANDARD_BASIS) and not scope.use("basis", of, basis.site.span):
        return None
    at = basis.at or last_token(call)
    if not _are_known(at, scope):
        return None
    name = ast.Name(basis.name, span=call.span)
    work = Statements(ast.ExperimentDef(name, (), span=call.span), parts, scope)
    mark_names_used(basis.site, work)
    mark_names_used(at, work)
    return spec.Experiment(
        span=basis.span,
        name=f"{'circuit' if basis.chooses_edges else trainer.declares} {basis.name}",
        model="",
        prompts=rows.block,
        part=rows.part,
        limit=rows.limit,
        source=source,
        base=rows.run,
        rules=(_rule(basis, at, source),),
        measures=(measure,),
        statistics=lower_statistics(work),
        trains=f"fit({inner.name}(…))",
    )


def _are_known(at: ast.Positions, scope: Namespace) -> bool:
    """Whether positions are known before an experiment runs; E0207 otherwise."""
    ranked = next((each for each in walk(at) if isinstance(each, ast.RankedTokens)), None)
    if ranked is None:
        return True
    reason = "isn't known before that experiment has run"
    hint = "name positions of the prompts, such as `last token`"
    scope.diagnostics.append(
        BadArgument(span=ranked.span, name=ranked.span.written, reason=reason, hint=hint)
    )
    return False


def _rule(basis: spec.Basis, at: ast.Positions, source: str | None) -> spec.Rule:
    """Return the rule of a training: a patch, or an ablation if no run is named; of edges, always
    an ablation, also with the values of a run."""
    span, verb = basis.method.span, "ablate" if basis.chooses_edges else "patch"
    if source is not None:
        return spec.Rule(span=span, verb=verb, site=basis.site, at=at, source=source)
    fills = (each.value for each in basis.method.arguments if each.name == "with")
    fill = next(fills, ast.Name("zero", span=span))
    assert isinstance(fill, ast.Name)
    return spec.Rule(span=span, verb="ablate", site=basis.site, at=at, fill=fill)


def _source_run(node: ast.Node, block: spec.Prompts, scope: Namespace) -> str:
    """Return the run whose subspace comes in. Reports E0201 unless the block has it."""
    known = [each.name for each in block.corruptions]
    name = node.id if isinstance(node, ast.Name) else node.span.written
    if name not in known:
        listed = ", ".join(f"`{each}`" for each in known)
        hint = f"corruptions of `{block.name}` are {listed}"
        if not known:
            hint = f"add a corruption to `{block.name}`: `corrupt fewer {{ … }}`"
        hint = did_you_mean(name, known, hint)
        scope.diagnostics.append(UnknownName(span=node.span, kind="run", name=name, hint=hint))
    return name
