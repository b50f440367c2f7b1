"""Rules as typed data, and the derived runs of an experiment with their rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mechdsl.base.text import Span
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.experiments import PatchWithoutSource
from mechdsl.diagnostics.rules import BadBasis, BadDirection
from mechdsl.diagnostics.syntax import (
    BadArgument,
    DuplicateName,
    NotSupported,
    UnexpectedToken,
    UnknownName,
    UnknownWord,
)
from mechdsl.program import spec
from mechdsl.program.directions import count_prompt_tokens, direction_names, split_factor
from mechdsl.program.names import line_reference
from mechdsl.program.references import all_tokens
from mechdsl.program.spec import CLEAN, ONE_CELL_HINT, During, whole_number_value
from mechdsl.program.statements import (
    Statements,
    mark_names_used,
    read_groups_of,
    reject_argument,
    resolve_run_name,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import rewrite, walk


def lower_during(rule: ast.Rule, work: Statements) -> During | None:
    """Lower the `during` clause of a rule; None if it acts at every step, and after an error.

    Codes: E0203 for an unknown phase, E0207 for steps that don't exist. Steps from the variable of
    a `for` are checked when its values are known.
    """
    node = rule.during
    if node is None or not _has_reply(node, work):
        return None
    if node.phase == "each step":
        return None
    if node.phase == "after prefill":
        return During(span=node.span, first=0, last=0, after_prefill=True)
    if node.phase == "named":
        word = node.name or ""
        if word == "prefill":
            return During(span=node.span, first=0, last=0)
        otherwise = "write `during prefill`, `during each step` or `during step 2..5`"
        hint = did_you_mean(word, ["prefill"], otherwise)
        work.diagnostics.append(
            UnknownWord(span=node.span, kind="part of a reply", word=word, hint=hint)
        )
        return None
    return _steps(node, work)


def _steps(node: ast.During, work: Statements) -> During | None:
    """Lower `during step 2..5`."""
    steps = node.steps
    assert steps is not None
    if isinstance(steps, ast.Star):
        return None  # each
    ends = [_end(end, work) for end in (steps.low, steps.high or steps.low)]
    low, high = ends
    if low is None or high is None:
        return None
    if isinstance(low, int) and isinstance(high, int):
        tokens = whole_number_value(work.generate[0].tokens, work.parts.parameters)
        problem = steps_problem(low, high, tokens)
        if problem is not None:
            reject_argument(node, steps.span.written, *problem, work)
            return None
    return During(span=node.span, first=low, last=high)


def steps_problem(low: int, high: int, tokens: int | None) -> tuple[str, str] | None:
    """Return (problem, help) for steps that a reply of this number of tokens doesn't have."""
    if low < 0:
        return "must be a step number, counted from 0", "step 0 is the prefill"
    if high < low:
        return "has no step in it", f"write the smaller number first: `step {high}..{low}`"
    if tokens is not None and 0 < tokens <= high:
        there = f"`generate {tokens}` has steps 0 to {tokens - 1}"
        hint = "step 0 is the prefill, and the last token needs no further step"
        return f"has steps beyond the reply: {there}", hint
    return None


def _end(bound: ast.Bound, work: Statements) -> int | ast.Bound | None:
    """Lower one end of a range of steps: a number, or syntax with a `for`; None after E0201."""
    if bound.percent is not None:
        return -1  # no step
    if bound.name is None:
        return bound.value
    if any(loop.name == bound.name for loop in work.loops):
        return bound
    if not work.scope.use("param", bound.name, bound.span):
        return None
    value = whole_number_value(bound.name, work.parts.parameters)
    return -1 if value is None else value + bound.offset


def _has_reply(node: ast.During, work: Statements) -> bool:
    """Whether text is generated, so that there are steps; E0207 if it isn't."""
    if work.generate:
        return True
    said = " ".join(node.span.written.split())
    reject_argument(
        node,
        said,
        "applies to a reply, but this experiment generates none",
        "add a line such as `generate 40`, or remove it",
        work,
    )
    return False


def reject_during_in_run(rule: ast.Rule, work: Statements) -> None:
    """Report E0108 for a `during` clause in a `run`, which processes only the prompts."""
    if rule.during is not None:
        later = "move the rule to the experiment; a `run` generates no reply"
        said = " ".join(rule.during.span.written.split())
        work.diagnostics.append(
            NotSupported(span=rule.during.span, what=f"`{said}` in a `run`", later=later)
        )


def _check_error_dropped(rule: ast.Rule, work: Statements) -> None:
    """Report E0342 for `without error` in a rule without a basis."""
    site = getattr(rule.body, "site", None)
    name = site.basis_name if isinstance(site, ast.Site) else None
    if name is not None and name != ast.STANDARD_BASIS:
        return
    fill = getattr(rule.body, "value", None)
    is_reconstruction = isinstance(fill, ast.QualifiedRef) and fill.name == "reconstruction"
    reason = "`without error` applies to rules in a basis"
    hint = "remove it, or name the basis: `clamp feature 3 of b at last token to 5 without error`"
    if is_reconstruction:
        reason, hint = "a reconstruction has no error", "remove `without error`"
    work.diagnostics.append(BadBasis(span=rule.span, reason=reason, hint=hint))


def lower_rules(
    rule: ast.Rule, source: str | None, prompts: spec.Prompts | None, work: Statements
) -> tuple[spec.Rule, ...]:
    """Lower a rule; an ablation with several fills becomes one rule per fill, and a rule with one
    direction per token one rule per token."""
    body = rule.body
    during = lower_during(rule, work)
    read = read_groups_of(rule, work)
    if rule.drops_error:
        _check_error_dropped(rule, work)
    several = _directions_of_tokens(body, work)
    if several and isinstance(body, ast.SetSite | ast.Add):
        nested = next((each for each in several if _is_several(each, body, work)), None)
        if nested is not None:
            _reject_nested(nested, work)
            return ()
        parts = (replace(rule, body=replace(body, value=each)) for each in several)
        return tuple(
            lowered.model_copy(update={"token": (number, len(several))})
            for number, part in enumerate(parts)
            for lowered in lower_rules(part, source, prompts, work)
        )
    if not isinstance(body, ast.Ablate) or not body.more:
        changes = {"during": during, "drops_error": rule.drops_error, "read_groups": read}
        return (lower_rule(rule, source, prompts, work).model_copy(update=changes),)
    fills = [ast.Fill(body.fill, body.by, span=body.fill.span), *body.more]
    labels = tuple(_label(fill) for fill in fills)
    return tuple(
        lower_rule(
            replace(rule, body=replace(body, fill=fill.fill, by=fill.by, more=())),
            source,
            prompts,
            work,
        ).model_copy(
            update={
                "fills": labels,
                "fill_index": number,
                "during": during,
                "drops_error": rule.drops_error,
                "read_groups": read,
            }
        )
        for number, fill in enumerate(fills)
    )


def _is_several(item: ast.Expr, body: ast.SetSite | ast.Add, work: Statements) -> bool:
    """Whether an item of a list has several directions itself."""
    return bool(_directions_of_tokens(replace(body, value=item), work))


def _reject_nested(item: ast.Expr, work: Statements) -> None:
    """Report E0341 for an item of a list that has several directions."""
    text = item.span.written
    reason = "a list has one direction for each token, and this item has several"
    hint = "name one of them, such as `soft[token 1]`, or write them as items of one list"
    work.diagnostics.append(BadDirection(span=item.span, text=text, reason=reason, hint=hint))


def _directions_of_tokens(body: ast.Node, work: Statements) -> tuple[ast.Expr, ...]:
    """Return the directions of `[2 * a, b]` or of a soft prompt, with their factors; empty for a
    rule with one direction."""
    value = body.value if isinstance(body, ast.SetSite | ast.Add) else None
    names = work.directions
    if not isinstance(value, ast.Expr) or not direction_names(value, names):
        return ()
    factor, direction = split_factor(value, names)
    if not isinstance(direction, ast.ListLiteral):
        return _vectors_of_prompts(value, work)
    items = [item for item in direction.items if not isinstance(item, ast.Range)]
    if factor is None:
        return tuple(items)
    return tuple(ast.Binary("*", factor, item, span=item.span) for item in items)


def _vectors_of_prompts(value: ast.Expr, work: Statements) -> tuple[ast.Expr, ...]:
    """Return an expression for each vector of the soft prompts that it names; empty without any."""
    directions, parameters = work.parts.directions, work.parts.parameters
    whole = (node.id for node in walk(value) if isinstance(node, ast.Name))
    counts = {
        name: count
        for name in whole
        if (count := count_prompt_tokens(name, directions, parameters)) is not None
    }

    def of_token(number: int) -> Callable[[ast.Node], ast.Node]:
        def change(node: ast.Node) -> ast.Node:
            if not isinstance(node, ast.Name) or node.id not in counts:
                return node
            token = ast.Coordinate("token", number, span=node.span)
            return ast.Index(node.id, ast.Coordinates((token,), span=node.span), span=node.span)

        return change

    return tuple(
        rewrite(value, of_token(number + 1)) for number in range(max(counts.values(), default=0))
    )


def _label(fill: ast.Fill) -> str:
    """Return the label of a fill as written in the source: `mean of fewer by item`."""
    by = "" if fill.by is None else f" by {fill.by.id}"
    return " ".join(fill.fill.span.written.split()) + by


def _set(
    rule: ast.Rule, body: ast.SetSite, prompts: spec.Prompts | None, work: Statements
) -> spec.Rule:
    """Lower a rule that sets a site to an activation, a direction, a number or a function."""
    if isinstance(body.value, ast.ActivationRead):
        return _reading(rule, "set", body, body.value, prompts, work)
    if direction_names(body.value, work.directions):
        return _of_direction(rule, "set", body, body.value, work)
    fill = body.value
    match fill:
        case ast.QualifiedRef(name="reconstruction", of=ast.Ref(name=basis, part=None)):
            return _reconstruction(rule, body, fill, basis, work)
        case _:
            pass
    if isinstance(fill, ast.Name) and work.scope.has("rule", fill.id):
        fill = work.parts.rule_functions[fill.id]
    return _at(rule, "set", body, fill=fill)


def _reconstruction(
    rule: ast.Rule, body: ast.SetSite, fill: ast.QualifiedRef, basis: str, work: Statements
) -> spec.Rule:
    """Lower `set SITE at POSITIONS to reconstruction of BASIS`; E0342 for a site with a basis."""
    if all(loop.name != basis for loop in work.loops):
        work.scope.use("basis", basis, fill.of.span)
    if body.site.basis_name is not None:
        work.diagnostics.append(
            BadBasis(
                span=body.site.span,
                reason="a reconstruction is of whole vectors, and the site names coordinates",
                hint=f"name the site alone: `set resid_post layer 2 … reconstruction of {basis}`",
            )
        )
    site = replace(body.site, basis=basis)
    return _at(rule, "set", body, fill=fill).model_copy(update={"site": site})


def _add(
    rule: ast.Rule, body: ast.Add, prompts: spec.Prompts | None, work: Statements
) -> spec.Rule:
    """Lower a rule that adds an activation, a fraction of a step or a direction."""
    if isinstance(body.value, ast.ActivationRead):
        return _reading(rule, "add", body, body.value, prompts, work)
    if isinstance(body.value, ast.StepFraction):
        lowered = _at(rule, "add", body, fill=body.value.factor)
        return lowered.model_copy(update={"stepped": body.value.component})
    names = work.directions
    if body.site.basis_name is not None and not direction_names(body.value, names):
        return _at(rule, "add", body, fill=body.value)
    return _of_direction(rule, "add", body, body.value, work)


def lower_rule(
    rule: ast.Rule, source: str | None, prompts: spec.Prompts | None, work: Statements
) -> spec.Rule:
    """Lower a rule and the runs that it names; `source` is the run that patches read."""
    body = rule.body
    match body:
        case ast.Patch():
            return _patch(rule, body, source, prompts, work)
        case ast.PathRule():
            return _path(rule, body, source, prompts, work)
        case ast.Ablate():
            return _ablate(rule, body, prompts, work)
        case ast.ReplaceTokens():
            images = prompts is not None and prompts.kind == "images"
            if not isinstance(body.value, ast.String) and not images:
                hint = "write a text, or change images of prompts in a corruption: "
                hint += "`corrupt hidden { mask photo }`"
                work.later(body.value.span, "this replacement", hint)
            return spec.Rule(span=rule.span, verb="replace", at=body.at, fill=body.value)
        case ast.ReplaceBlock():
            return _replace_block(rule, body)
        case ast.SwapSites():
            return _at(rule, "swap", body, onto=body.other)
        case ast.Freeze():
            return _at(rule, "freeze", body)
        case ast.SetSite():
            return _set(rule, body, prompts, work)
        case ast.Scale():
            if direction_names(body.factor, work.directions):
                return _of_direction(rule, "scale", body, body.factor, work)
            return _at(rule, "scale", body, fill=body.factor)
        case ast.Clamp():
            return _clamp(rule, body, work)
        case ast.Add():
            return _add(rule, body, prompts, work)
        case ast.ProjectOut():
            return _project_out(rule, body, work)
        case ast.EditWeights():
            return _edit_weights(rule, body, work)
        case ast.RegisteredRule():
            return _at(rule, body.verb.id, body, fill=body.value)
        case ast.ProjectOnto():
            _known(body.direction, work)
            lowered = _at(rule, "project onto", body)
            return lowered.model_copy(update={"direction": body.direction})
        case ast.BlockEdge():
            return _attention(rule, "block", body.edge)
        case ast.Reweight():
            return _attention(rule, "reweight", body.edge, body.factor)
        case ast.SetEdge():
            return _attention(rule, "set edge", body.edge, body.value)
        case ast.Allow():
            return _attention(rule, "allow", body.edge)
        case ast.Renumber():
            return spec.Rule(span=rule.span, verb="renumber", at=body.at, fill=body.start)


def _ablate(
    rule: ast.Rule, body: ast.Ablate, prompts: spec.Prompts | None, work: Statements
) -> spec.Rule:
    """Build the rule of `ablate SITE at POSITIONS with FILL` or `ablate all but CIRCUIT without
    each edge …`.

    The fill of a circuit may be a run, whose values its edges then carry.
    """
    if isinstance(body.fill, ast.QualifiedRef):
        work.scope.has("prompts", body.fill.of.name)
    named = body.site.circuit_name
    circuit = named is not None and named in work.scope.names("circuit")
    if (body.all_but or body.without_edge) and not circuit:
        if any(loop.name == named for loop in work.loops):
            _refuse_loop_over_circuits(body.site, work)
        else:
            work.scope.use("circuit", named or body.site.span.written, body.site.span)
        work.unsupported = True
    source = None
    if circuit and prompts is not None and isinstance(body.fill, ast.Name):
        runs = {*work.known_runs, spec.CLEAN, *(c.name for c in prompts.corruptions)}
        if body.fill.id in runs:
            source = resolve_run_name(ast.Ref(body.fill.id, span=body.fill.span), prompts, work)
    by = None if body.by is None else body.by.id
    lowered = _at(rule, "ablate", body, fill=body.fill, by=by)
    update = {"source": source, "all_but": body.all_but, "without_edge": body.without_edge}
    return lowered.model_copy(update=update)


def _refuse_loop_over_circuits(site: ast.Site, work: Statements) -> None:
    """Report E0207 for the variable of a `for` in place of a circuit."""
    assert site.circuit_name is not None
    known = work.scope.names("circuit")
    for name in known:
        work.scope.has("circuit", name)
    example = known[0] if known else "c"
    reason = "is the variable of a `for`, and a `for` can't loop over circuits"
    hint = f"write an experiment for each circuit: `ablate all but {example} at …`"
    work.scope.diagnostics.append(
        BadArgument(span=site.span, name=site.circuit_name, reason=reason, hint=hint)
    )


def _replace_block(rule: ast.Rule, body: ast.ReplaceBlock) -> spec.Rule:
    span = body.axis.span
    return spec.Rule(
        span=rule.span,
        verb="replace block",
        site=ast.Site(_names_of_block(body.stack, span), (body.axis,), span=span),
        at=all_tokens(),
        fill=body.word,
        source_block=body.source,
        source_stack=body.source_stack,
    )


def _names_of_block(stack: ast.Name | None, span: Span) -> tuple[ast.Name, ...]:
    block = ast.Name("block", span=span)
    return (block,) if stack is None else (block, stack)


def _at(
    rule: ast.Rule,
    verb: str,
    body: ast.AnySiteRule,
    *,
    fill: ast.Expr | None = None,
    by: str | None = None,
    onto: ast.Positions | None = None,
) -> spec.Rule:
    """Build the rule of `VERB SITE at POSITIONS …`."""
    return spec.Rule(
        span=rule.span, verb=verb, site=body.site, at=body.at, fill=fill, by=by, onto=onto
    )


def _of_direction(
    rule: ast.Rule, verb: str, body: ast.AnySiteRule, value: ast.Expr, work: Statements
) -> spec.Rule:
    """Build the rule of `VERB NUMBER * DIRECTION …`."""
    factor, direction = split_factor(value, work.directions)
    for name in walk(direction):
        if isinstance(name, ast.Name | ast.Index):
            _known(name, work)
    return _at(rule, verb, body, fill=factor).model_copy(update={"direction": direction})


def _known(direction: ast.Name | ast.Index, work: Statements) -> None:
    """Report E0201 for a name that isn't a direction."""
    name = direction.id if isinstance(direction, ast.Name) else direction.name
    if name not in work.directions or name in work.scope.names("direction"):
        work.scope.use("direction", name, direction.span)


def _clamp(rule: ast.Rule, body: ast.Clamp, work: Statements) -> spec.Rule:
    """Build the rule of `clamp [DIRECTION of] SITE at POSITIONS to NUMBER`."""
    # Of coordinates, a clamp sets the number.
    verb = "clamp" if body.site.basis_name is None else "set"
    lowered = _at(rule, verb, body, fill=body.value)
    if body.direction is None:
        return lowered
    _known(body.direction, work)
    return lowered.model_copy(update={"direction": body.direction})


def _project_out(rule: ast.Rule, body: ast.ProjectOut, work: Statements) -> spec.Rule:
    """Build the rule of `project out DIRECTION from SITE at POSITIONS`, `… from weights`, or
    `project out feature 3 of b at POSITIONS`."""
    if body.direction is None:
        return _project_coordinates_out(rule, body, work)
    _known(body.direction, work)
    if body.site is not None and body.at is not None:
        lowered = spec.Rule(span=rule.span, verb="project out", site=body.site, at=body.at)
    else:
        lowered = spec.Rule(span=rule.span, verb="project out of weights", at=all_tokens())
    return lowered.model_copy(update={"direction": body.direction})


def _project_coordinates_out(rule: ast.Rule, body: ast.ProjectOut, work: Statements) -> spec.Rule:
    """Build the rule of `project out feature 3 of b at POSITIONS`; E0101 without coordinates."""
    assert body.site is not None
    assert body.at is not None
    if body.site.basis_name is None:
        name, at = body.site.bare, " ".join(body.at.span.written.split())
        known = name is not None and name.id in work.directions
        direction = name.id if name is not None and known else "DIRECTION"
        site = "SITE" if known else body.site.span.written
        work.scope.has("direction", direction)
        work.unsupported = True
        problem = UnexpectedToken(
            span=body.at.span if known else body.site.span,
            found=f"`at {at}`" if known else f"`{body.site.span.written}`",
            expected="`from`" if known else "a direction, or coordinates of a basis",
            hint=f"write `project out {direction} from {site} at {at}`",
        )
        work.diagnostics.append(problem)
    return spec.Rule(span=rule.span, verb="project out", site=body.site, at=body.at)


def _edit_weights(rule: ast.Rule, body: ast.EditWeights, work: Statements) -> spec.Rule:
    """Build the rule of `scale weights of SITE by NUMBER`, `set weights of SITE to NUMBER *
    DIRECTION` or `add NUMBER * DIRECTION to weights of SITE`."""
    verb = "add to weights" if body.verb == "add" else f"{body.verb} weights"
    lowered = spec.Rule(span=rule.span, verb=verb, site=body.site, at=all_tokens())
    if body.verb == "scale":
        return lowered.model_copy(update={"fill": body.value})
    names = work.directions
    numbers = {*work.parts.parameters, *(loop.name for loop in work.loops)} - {*work.directions}
    named = [node.id for node in walk(body.value) if isinstance(node, ast.Name)]
    names += [name for name in named if name not in numbers]  # perhaps misspelt
    if body.verb == "set" and not direction_names(body.value, names):
        return lowered.model_copy(update={"fill": body.value})
    factor, direction = split_factor(body.value, names)
    for name in walk(direction):
        if isinstance(name, ast.Name | ast.Index):
            _known(name, work)
    return lowered.model_copy(update={"fill": factor, "direction": direction})


def _attention(
    rule: ast.Rule, verb: str, edge: ast.Edge, fill: ast.Expr | None = None
) -> spec.Rule:
    """Build the rule of `VERB attention … from QUERIES to KEYS …`."""
    return spec.Rule(
        span=rule.span, verb=verb, edge=edge, at=edge.queries, onto=edge.keys, fill=fill
    )


def _patch(
    rule: ast.Rule,
    body: ast.Patch,
    source: str | None,
    prompts: spec.Prompts | None,
    work: Statements,
) -> spec.Rule:
    """Build the rule of `patch SITE at POSITIONS onto POSITIONS into layer L with RUN`."""
    if body.features is not None:
        return _exchange(rule, body, body.features, work)
    if body.source is not None and prompts is not None:
        source = resolve_run_name(body.source, prompts, work)
    elif source is None and not work.from_into:
        _without_source("patch", rule, prompts, work)
    return spec.Rule(
        span=rule.span,
        verb="patch",
        site=body.site,
        at=body.at,
        source=source,
        onto=body.onto,
        into_layer=body.into_layer,
    )


def _exchange(rule: ast.Rule, body: ast.Patch, features: ast.Axis, work: Statements) -> spec.Rule:
    """Lower `patch features 1, 3 of b at POSITIONS with feature 12 of c`; E0342 for other forms."""
    assert features.of is not None
    work.scope.use("basis", features.of, features.span)
    wrong: tuple[ast.Node, str] | None = None
    if body.onto is not None or body.into_layer is not None:
        wrong = body.onto or body.site, "features of the same vector have no other place"
    elif body.site.coordinates is None:
        wrong = body.site, "the features that leave aren't named"
    elif any(isinstance(value, ast.Star) for value in features.values):
        wrong = features, "the features that come in aren't named"
    if wrong is not None:
        node, reason = wrong
        example = f"patch feature 12 of small at … with feature 3 of {features.of}"
        work.diagnostics.append(BadBasis(span=node.span, reason=reason, hint=f"write `{example}`"))
    return spec.Rule(span=rule.span, verb="patch", site=body.site, at=body.at, exchanged=features)


def _reading(
    rule: ast.Rule,
    verb: str,
    body: ast.SetSite | ast.Add,
    reading: ast.ActivationRead,
    prompts: spec.Prompts | None,
    work: Statements,
) -> spec.Rule:
    """Build the rule of `VERB … NUMBER * value(SITE at POSITIONS) of RUN`."""
    source = None
    if reading.of is not None and prompts is not None:
        source = resolve_run_name(reading.of, prompts, work)
    return spec.Rule(
        span=rule.span,
        verb=verb,
        site=body.site,
        at=body.at if reading.at is None else reading.at,
        onto=None if reading.at is None else body.at,
        source=source,
        fill=reading.factor,
        reading=reading.site,
    )


def _without_source(
    verb: str, rule: ast.Rule, prompts: spec.Prompts | None, work: Statements
) -> None:
    corruption = "RUN"
    if prompts is not None and prompts.corruptions:
        corruption = prompts.corruptions[0].name
    otherwise = ", or add a run: `with RUN`" if verb == "patch" else ""
    work.diagnostics.append(
        PatchWithoutSource(span=rule.span, verb=verb, base=corruption, otherwise=otherwise)
    )


def _path(
    rule: ast.Rule,
    body: ast.PathRule,
    source: str | None,
    prompts: spec.Prompts | None,
    work: Statements,
) -> spec.Rule:
    """Build the rule of `path SENDER -> RECEIVER at POS through mlps with frozen norms`."""
    if source is None and not work.from_into:
        _without_source("path", rule, prompts, work)
    for word in body.through:
        if word.id != "mlps":
            hint = did_you_mean(word.id, ["mlps"], "`through` accepts only `mlps`")
            work.diagnostics.append(
                UnknownWord(span=word.span, kind="part of a path", word=word.id, hint=hint)
            )
    return spec.Rule(
        span=rule.span,
        verb="path",
        site=body.sender,
        receiver=body.receiver,
        at=body.at,
        source=source,
        through_mlps=bool(body.through),
        frozen_norms=body.frozen,
    )


def lower_derived_runs(work: Statements, prompts: spec.Prompts) -> tuple[spec.DerivedRun, ...]:
    """Lower the runs that an experiment defines, in source order; a run may use those before it.

    Defines their names. Codes: E0101 for statements that are invalid in a run, E0108 for another
    model, E0202 for names that are taken, E0207 for lists of runs.
    """
    derived_runs: list[spec.DerivedRun] = []
    for definition in work.derived:
        name = definition.name
        taken = _taken(name, work, prompts)
        if taken is not None:
            work.diagnostics.append(DuplicateName(span=name.span, name=name.id, first=taken))
        derived_runs.append(_run(definition, work, prompts))
        work.known_runs.setdefault(name.id, name.span)
    return tuple(derived_runs)


def _taken(name: ast.Name, work: Statements, prompts: spec.Prompts) -> str | None:
    """Return where another run of this name is defined."""
    if name.id in work.known_runs:
        return line_reference(work.known_runs[name.id], name.span)
    corruption = next((c for c in prompts.corruptions if c.name == name.id), None)
    if corruption is not None:
        return f"a corruption of `{prompts.name}`"
    if name.id == CLEAN:
        return "the run without changes"
    first = work.scope.definitions.get(name.id)
    if first is not None and first.kind in ("prompts", "model"):
        return line_reference(first.span, name.span)
    return None


def _run(definition: ast.RunDef, work: Statements, prompts: spec.Prompts) -> spec.DerivedRun:
    inner = Statements(work.definition, work.parts, work.scope)
    inner.elsewhere, inner.known_runs = work.elsewhere, work.known_runs
    inner.derived = work.derived
    for statement in definition.statements:
        if isinstance(statement, ast.Rule | ast.FromInto):
            inner.collect([statement])
            continue
        work.unsupported = True
        word = statement.span.text.split()[0]
        work.diagnostics.append(
            UnexpectedToken(
                span=statement.span,
                found=f"`{word}` in a `run`",
                expected="`from … into …` or a rule",
                hint=ONE_CELL_HINT if word == "for" else "write it in the experiment",
            )
        )
    if not inner.rules and not inner.unsupported and not work.unsupported:
        work.diagnostics.append(
            BadArgument(
                span=definition.name.span,
                name=definition.name.id,
                reason="has no rule",
                hint="add one: `patch SITE at POSITION`; without rules it equals its base run",
            )
        )
    said = len(inner.diagnostics)
    source, base = _ends(inner, prompts)
    rules: list[spec.Rule] = []
    for rule, _ in inner.rules:
        mark_names_used(rule, inner)
        reject_during_in_run(rule, inner)
        rules += lower_rules(replace(rule, during=None), source, prompts, inner)
    _before_it_is_made(definition, inner, said)
    work.unsupported |= inner.unsupported
    name = definition.name
    return spec.DerivedRun(
        span=name.span, name=name.id, source=source, base=base, rules=tuple(rules)
    )


def _before_it_is_made(definition: ast.RunDef, inner: Statements, said: int) -> None:
    """Replace the help of E0201 for runs that are defined later, or that refer to themselves.

    Args:
        said: Number of diagnostics before this run.
    """
    later = {run.name.id: run for run in inner.derived if run.name.id not in inner.known_runs}
    for number, problem in enumerate(inner.diagnostics[said:], said):
        if not isinstance(problem, UnknownName) or problem.kind != "run":
            continue
        if problem.name not in later or problem.span is None:
            continue
        hint = f"a run can use only runs defined before it: define `{problem.name}` above this one"
        if later[problem.name] is definition:
            hint = "a run can't use itself: name another one"
        inner.diagnostics[number] = replace(problem, hint=hint)


def _ends(inner: Statements, prompts: spec.Prompts) -> tuple[str | None, str]:
    """Return (source, base) from the `from … into …` of a run."""
    if not inner.from_into:
        return None, CLEAN
    line = inner.from_into[0]
    ends: list[str | None] = []
    for first, *others in (line.sources, line.bases):
        inner.diagnostics.extend(
            BadArgument(
                span=other.span,
                name=other.span.written,
                reason="is a second one",
                hint="a `run` has one source and one base",
            )
            for other in others[:1]
        )
        ends.append(resolve_run_name(first, prompts, inner, shuffled=line.shuffled is not None))
    source, base = ends
    there = inner.elsewhere.get(base or CLEAN)
    if there is not None and there.model is not None:
        what = "a `run` with rules in another model"
        later = "write into a run of the experiment's model: `from RUN into clean`"
        inner.diagnostics.append(NotSupported(span=line.bases[0].span, what=what, later=later))
    return source, base or CLEAN
