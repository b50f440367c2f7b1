"""The `model` lines of a file: sources, adapters, edited and rounded models, sums of models."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

from mechdsl.base.limits import is_number
from mechdsl.base.records import Record
from mechdsl.base.text import Span
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.models import BadModelSum, ModelCircle
from mechdsl.diagnostics.rules import BadWeights
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.program import spec
from mechdsl.program.directions import (
    declared_training,
    direction_dependencies,
    fit_rows_of_direction,
    read_probe_names,
)
from mechdsl.program.measures import lower_statistics
from mechdsl.program.names import Namespace
from mechdsl.program.paths import WILDCARD, expand_checkpoints
from mechdsl.program.prompts import no_prompts
from mechdsl.program.rules import lower_rules
from mechdsl.program.spec import Constant, Definitions, constant_value
from mechdsl.program.statements import Statements, mark_names_used
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

BASE_ARGUMENT = "base"
"""Name of the argument for an adapter's base model."""

MODEL_DTYPES = ("float32", "bfloat16", "float16", "float64")

MODEL_KINDS = ("zoo", "hf", "local", "python")

ROUNDED = "rounded"
"""Name of the call that rounds the weights of a model."""

MOST_BITS = 16
"""Weights of more bits wouldn't differ from float32."""

_ARGUMENTS = {
    "zoo": ("dtype", "bos"),
    "hf": ("revision", "dtype", "bos", "base"),
    "local": ("dtype", "bos", "base"),
    "python": (),
}
"""Arguments of each model source besides its path."""


def lower_model(statement: ast.ModelDef, parts: Definitions, scope: Namespace) -> spec.Model | None:
    """Lower a `model` line; the edits of a model follow in `lower_edits`.

    Codes: E0207 for sources and rounded models, E0344 for edits, E0457 for sums. None after an
    error.
    """
    source = statement.source
    if statement.is_edited:
        return _edited(statement, scope)
    if isinstance(source, ast.Name):
        source = ast.Call(source.id, (), span=source.span)
    if isinstance(source, ast.Call) and source.name == ROUNDED:
        return _rounded(statement, source, parts, scope)
    if isinstance(source, ast.Call):
        return _from_source(statement, source, parts, scope)
    if isinstance(source, ast.String):
        hint = f"write `hf({source.span.written})`"
        scope.diagnostics.append(
            BadArgument(
                span=source.span, name=source.value, reason="is not a model source", hint=hint
            )
        )
        return None
    return _sum(statement, parts, scope)


def define_model(model: spec.Model, parts: Definitions, scope: Namespace) -> None:
    """Define a model, or all that match the `*` in its path.

    Codes: those of `expand_checkpoints`.
    """
    members = expand_checkpoints(model, scope.diagnostics)
    parts.models.update((member.name, member) for member in members)
    if WILDCARD in model.path:
        parts.checkpoints[model.name] = tuple(member.name for member in members)


def _edited(statement: ast.ModelDef, scope: Namespace) -> spec.Model | None:
    """Lower `model cured = toy with { … }`, apart from its edits."""
    name, source = statement.name.id, statement.source
    if not isinstance(source, ast.Name):
        what = "sum" if isinstance(source, ast.Binary) else "model"
        reason = "edits change a model of the file, which is named before `with`"
        hint = f"write the {what} on a separate line: `model base = {source.span.written}`"
        scope.diagnostics.append(BadWeights(span=source.span, reason=reason, hint=hint))
        return None
    if not statement.edits and not _has_lost_edits(statement):
        reason = f"`{name}` has no edits"
        hint = f"add one: `scale weights of layer 3 neuron 5 by 0`, or use `{source.id}`"
        scope.diagnostics.append(BadWeights(span=statement.name.span, reason=reason, hint=hint))
        return None
    return spec.Model(
        span=statement.span,
        name=name,
        kind="edited",
        path="",
        base=source.id,
        written="; ".join(edit.span.written for edit in statement.edits),
    )


def _has_lost_edits(statement: ast.ModelDef) -> bool:
    """Whether the braces have text, of which no line is an edit; that is already reported."""
    inside = statement.span.text.partition("{")[2].rpartition("}")[0]
    return any(line.partition("#")[0].strip() for line in inside.splitlines())


# --- rounded weights ------------------------------------------------------------------------------


def _rounded(
    statement: ast.ModelDef, call: ast.Call, parts: Definitions, scope: Namespace
) -> spec.Model | None:
    """Lower `model q = rounded(m, bits: 8)`."""
    base = bits = None
    problem: tuple[ast.Argument | ast.Call, str, str] | None = None
    for argument in call.arguments:
        if argument.name is None and base is None and isinstance(argument.value, ast.Name):
            base = argument.value.id
        elif argument.name == "bits" and bits is None:
            bits = constant_value(argument.value, parts.parameters)
            if type(bits) is not int or not 2 <= bits <= MOST_BITS:
                reason = "must be a whole number of bits"
                problem = problem or (argument, reason, f"from 2 to {MOST_BITS}, such as `bits: 8`")
        elif argument.name is None and base is None:
            hint = "write it on a separate line, and name it: `model m = …`"
            problem = problem or (argument, "rounds the weights of a model of the file", hint)
        else:
            hint = f"arguments are a model of the file and `bits`: `{_ROUNDED_EXAMPLE}`"
            problem = problem or (argument, f"has an invalid argument `{argument.span.text}`", hint)
    if problem is None and (base is None or bits is None):
        lacks = "the model whose weights are rounded" if base is None else "a number of bits"
        problem = call, f"needs {lacks}", f"write `{_ROUNDED_EXAMPLE}`"
    if problem is not None:
        place, reason, hint = problem
        named = isinstance(place, ast.Argument) and place.name == "bits"
        name = "bits" if named else ROUNDED
        scope.diagnostics.append(BadArgument(span=place.span, name=name, reason=reason, hint=hint))
        return None
    return spec.Model(
        span=statement.span,
        name=statement.name.id,
        kind="rounded",
        path="",
        base=base,
        bits=cast("int", bits),
    )


_ROUNDED_EXAMPLE = "rounded(m, bits: 8)"

# --- sums -----------------------------------------------------------------------------------------


class _Terms(Record):
    """A sum of models with factors, plus a number."""

    models: Mapping[str, float]
    number: float = 0.0

    def scaled(self, factor: float) -> _Terms:
        models = {name: factor * model for name, model in self.models.items()}
        return _Terms(models, factor * self.number)

    def plus(self, other: _Terms) -> _Terms:
        names = dict.fromkeys((*self.models, *other.models))
        models = {n: self.models.get(n, 0.0) + other.models.get(n, 0.0) for n in names}
        return _Terms(models, self.number + other.number)


class _NotLinear(Exception):
    """Raised with the part of a sum that isn't linear, the reason and a fix."""

    def __init__(self, node: ast.Node, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.node, self.reason, self.hint = node, reason, hint


_SUM_EXAMPLE = "`model merged = base + 0.5 * (tuned - base)`"


def _sum(statement: ast.ModelDef, parts: Definitions, scope: Namespace) -> spec.Model | None:
    """Lower `model merged = base + 0.5 * (tuned - base)`."""
    source = statement.source
    try:
        terms = _terms(source, parts.parameters)
        if terms.number:
            reason = f"it adds the number {terms.number:g} to a model"
            raise _NotLinear(source, reason, f"multiply a model by it: {_SUM_EXAMPLE}")
        if not terms.models:
            raise _NotLinear(source, "it names no model", f"write {_SUM_EXAMPLE}")
        total = math.fsum(terms.models.values())
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            reason = f"the factors of its models add up to {total:g}, not to 1"
            hint = "add differences of models to a model: " + _SUM_EXAMPLE
            raise _NotLinear(source, reason, hint)
    except _NotLinear as problem:
        scope.diagnostics.append(
            BadModelSum(
                span=problem.node.span,
                model=statement.name.id,
                reason=problem.reason,
                hint=problem.hint,
            )
        )
        for node in walk(source):
            if isinstance(node, ast.Name):
                scope.has("param", node.id)
        return None
    for node in walk(source):
        if isinstance(node, ast.Name) and node.id not in terms.models:
            scope.has("param", node.id)
    return spec.Model(
        span=statement.span,
        name=statement.name.id,
        kind="sum",
        path="",
        base=next(iter(terms.models)),
        terms=tuple(terms.models.items()),
        written=source.span.written,
    )


def _terms(node: ast.Node, parameters: Mapping[str, Constant]) -> _Terms:
    """Return a sum as factors of models. Raises _NotLinear."""
    match node:
        case ast.Name(id=name) if name not in parameters:
            return _Terms({name: 1.0})
        case ast.Negative(operand=operand):
            return _terms(operand, parameters).scaled(-1.0)
        case ast.Binary(operator="+" | "-" as operator, left=left, right=right):
            second = _terms(right, parameters).scaled(1.0 if operator == "+" else -1.0)
            return _terms(left, parameters).plus(second)
        case ast.Binary(operator=operator, left=left, right=right):
            return _product(node, operator, *(_terms(part, parameters) for part in (left, right)))
        case _:
            value = constant_value(node, parameters)
            if is_number(value):
                return _Terms({}, float(value))
            if isinstance(node, ast.Call):
                hint = f"write it on a separate line: `model other = {node.span.written}`"
                raise _NotLinear(node, "its models have to be named", hint)
            raise _NotLinear(node, "it consists of models and numbers", f"write {_SUM_EXAMPLE}")


def _product(node: ast.Node, operator: str, left: _Terms, right: _Terms) -> _Terms:
    if operator == "*" and not left.models:
        return right.scaled(left.number)
    if right.models:
        what = "models are divided by" if operator == "/" else "models are multiplied with"
        reason = f"{what} a model"
        raise _NotLinear(node, reason, f"use a number: {_SUM_EXAMPLE}")
    if operator == "/" and not right.number:
        raise _NotLinear(node, "it divides by 0", f"write {_SUM_EXAMPLE}")
    return left.scaled(right.number if operator == "*" else 1 / right.number)


# --- bases ----------------------------------------------------------------------------------------


def check_bases(files: Iterable[ast.File], parts: Definitions, scope: Namespace) -> None:
    """Reject adapters and made models whose bases aren't models of the file, and remove them from
    the models.

    Codes: E0201 for an undefined name, E0207 for a name of several models, E0450 for models that
    are made from one another.
    """
    for file in files:
        for statement in file.statements:
            if isinstance(statement, ast.ModelDef):
                _check_bases(statement, parts, scope)


def _named_bases(statement: ast.ModelDef) -> Iterator[tuple[str, Span]]:
    """Yield the other models that a line names, with their locations."""
    if isinstance(statement.source, ast.Call):
        named = None if statement.source.name == ROUNDED else BASE_ARGUMENT
        for argument in statement.source.arguments:
            if argument.name == named and isinstance(argument.value, ast.Name):
                yield argument.value.id, argument.value.span
        return
    for node in walk(statement.source):
        if isinstance(node, ast.Name):
            yield node.id, node.span


def _check_bases(statement: ast.ModelDef, parts: Definitions, scope: Namespace) -> None:
    name = statement.name.id
    names = [each for each in parts.checkpoints.get(name, (name,)) if each in parts.models]
    bases = parts.models[names[0]].bases if names else ()
    if not bases:
        return
    made = _MADE_BY.get(parts.models[names[0]].kind, "an adapter has")
    circle = _circle(names[0], parts)
    fine = True
    for base, span in _named_bases(statement):
        if base not in bases:
            continue
        if not scope.use("model", base, span):
            fine = False
        elif base in parts.checkpoints:
            fine = False
            reason = f"refers to several models, but {made} one base"
            hint = 'define the base on a separate line: `model m = local("runs/step-9")`'
            if parts.models[names[0]].terms:
                reason = "refers to several models"
            scope.diagnostics.append(BadArgument(span=span, name=base, reason=reason, hint=hint))
        elif circle:
            fine = False
            said = " → ".join(f"`{each}`" for each in circle)
            scope.diagnostics.append(ModelCircle(span=span, model=name, circle=said))
            break
    if not fine:
        for each in names:
            del parts.models[each]


_MADE_BY = {"edited": "an edit changes", "rounded": "rounding has", "sum": "a sum has"}
"""Beginnings of a message, by the kind of a model."""


def _circle(name: str, parts: Definitions) -> list[str]:
    """Return the chain of bases from a model back to itself; empty if the model is in no cycle."""
    chains = [[name]]
    seen: set[str] = set()
    while chains:
        chain = chains.pop()
        model = parts.models.get(chain[-1])
        for base in () if model is None else model.bases:
            if base == name:
                return [*chain, name]
            if base not in seen:
                seen.add(base)
                chains.append([*chain, base])
    return []


# --- edits ----------------------------------------------------------------------------------------


def lower_edits(files: Iterable[ast.File], parts: Definitions, scope: Namespace) -> None:
    """Lower the edits of models, after the directions and groups that they name."""
    for file in files:
        for statement in file.statements:
            model = isinstance(statement, ast.ModelDef) and parts.models.get(statement.name.id)
            if isinstance(statement, ast.ModelDef) and model and model.kind == "edited":
                parts.edits[model.name] = _lower_edits(statement, model, parts, scope)


def _lower_edits(
    statement: ast.ModelDef, model: spec.Model, parts: Definitions, scope: Namespace
) -> spec.Experiment:
    """Lower the edits of a model to an experiment of rules, which are resolved on the base."""
    before = len([d for d in scope.diagnostics if d.severity == "error"])
    definition = ast.ExperimentDef(statement.name, (), span=statement.span)
    work = Statements(definition, parts, scope)
    rules: list[spec.Rule] = []
    prompts = parts.prompts.setdefault(spec.NO_PROMPTS, no_prompts())
    for edit in statement.edits:
        if isinstance(edit, ast.ProjectOut) and edit.site is not None:
            reason = "an edit changes weights, and the line names activations"
            named = "DIRECTION" if edit.direction is None else edit.direction.span.written
            hint = f"write `project out {named} from weights`"
            scope.diagnostics.append(BadWeights(span=edit.span, reason=reason, hint=hint))
            continue
        rule = ast.Rule(edit, span=edit.span)
        mark_names_used(rule, work)
        work.collect([rule])
    for rule, _ in work.rules:
        rules += lower_rules(rule, None, prompts, work)
    _check_directions(rules, parts, scope)
    assert model.base is not None
    broken = before != len([d for d in scope.diagnostics if d.severity == "error"])
    return spec.Experiment(
        span=statement.name.span,
        name=model.name,
        model=model.base,
        prompts=prompts.name,
        rules=tuple(rules),
        measures=(),
        statistics=lower_statistics(work),
        broken=broken or work.unsupported,
    )


def _check_directions(rules: Iterable[spec.Rule], parts: Definitions, scope: Namespace) -> None:
    """Report E0344 for directions of an experiment's own runs, which an edit doesn't have."""
    for rule in rules:
        if rule.direction is None:
            continue
        for used in direction_dependencies([rule.direction], parts.directions):
            if declared_training(used) is not None:
                reason = f"`{used.name}` is trained, and an edit can't use it yet"
                hint = "copy it with `mechdsl fit --out trained`, and write `direction d = saved("
                hint += f'"trained/{used.name}/vector.safetensors", "vector")`'
                scope.diagnostics.append(
                    BadWeights(span=rule.direction.span, reason=reason, hint=hint)
                )
                break
            probe = next(read_probe_names([used.value], {}), None)
            if probe is not None:
                reason = f"`{used.name}` is read from a trained probe, and an edit can't use it yet"
                hint = f'write `save direction {used.name} to "d.safetensors"` in an experiment, '
                hint += f'and `direction d = saved("d.safetensors", "{used.name}")`'
                scope.diagnostics.append(
                    BadWeights(span=rule.direction.span, reason=reason, hint=hint)
                )
                break
            rows = fit_rows_of_direction(used, parts)
            if any(row.block is None for row in rows):
                reason = f"`{used.name}` needs runs of an experiment, which an edit lacks"
                hint = f"name the block in the line of `{used.name}`, for example `fruit.fewer`"
                scope.diagnostics.append(
                    BadWeights(span=rule.direction.span, reason=reason, hint=hint)
                )
                break


# --- sources --------------------------------------------------------------------------------------


def _from_source(
    statement: ast.ModelDef, call: ast.Call, parts: Definitions, scope: Namespace
) -> spec.Model | None:
    """Lower `model toy = zoo("counting")`."""
    if call.name not in MODEL_KINDS:
        known = 'write `zoo("…")`, `hf("…")`, `local("…")` or `python("…")`'
        hint = did_you_mean(call.name, (*MODEL_KINDS, ROUNDED), known)
        scope.diagnostics.append(
            BadArgument(span=call.span, name=call.name, reason="is not a model source", hint=hint)
        )
        return None
    values: dict[str, Any] = {}
    for argument in call.arguments:
        name = argument.name or ("path" if "path" not in values else "")
        problem = _place_problem(name, call.name, values)
        if problem is None:
            if isinstance(argument.value, ast.Name) and name in ("dtype", BASE_ARGUMENT):
                values[name] = argument.value.id
            else:
                value = constant_value(argument.value, parts.parameters)
                values[name] = None if name == BASE_ARGUMENT else value
            problem = _argument_problem(name, values[name], call.name)
        if problem is not None:
            reason, hint = problem
            scope.diagnostics.append(
                BadArgument(span=argument.span, name=name or call.name, reason=reason, hint=hint)
            )
            return None
    if "path" not in values:
        scope.diagnostics.append(
            BadArgument(
                span=call.span,
                name=call.name,
                reason="needs a name or a path",
                hint=f'write `{call.name}("…")`',
            )
        )
        return None
    if BASE_ARGUMENT in values and (
        own := next((each for each in ("dtype", "bos") if each in values), "")
    ):
        scope.diagnostics.append(
            BadArgument(
                span=call.span,
                name=own,
                reason="can't be combined with `base:`; the base determines it",
                hint=f"move it to the line of `{values[BASE_ARGUMENT]}`",
            )
        )
        return None
    if call.name == "python":
        values["function"] = call
    return spec.Model(
        span=statement.span, name=statement.name.id, kind=cast("Any", call.name), **values
    )


def _place_problem(name: str, kind: str, given: Collection[str]) -> tuple[str, str] | None:
    """Return why one more argument of this name (or without a name) is invalid, if it is."""
    if not name:
        ways = [f"`{each}: …`" for each in _ARGUMENTS[kind]]
        hint = f", or name it: {', '.join(ways[:-1])} or {ways[-1]}" if ways else ""
        return "takes only one unnamed argument", f"leave it out{hint}"
    if name in given:
        return "is given twice", "remove one of them"
    return None


def _argument_problem(name: str, value: object, kind: str) -> tuple[str, str] | None:
    """Return why an argument of `hf(…)` is invalid, and a fix."""
    allowed = ("path", *_ARGUMENTS[kind])
    if name not in allowed:
        if kind == "python":
            return (
                "is not an argument of `python`",
                "remove it: the function must return the final model and tokenizer",
            )
        if name == "quantize":
            return "is not an argument", "round the weights: `model q = rounded(m, bits: 8)`"
        return (
            f"is not an argument of `{kind}`",
            did_you_mean(name, allowed, f"arguments are {', '.join(allowed[1:])}"),
        )
    if name == BASE_ARGUMENT and value is None:
        return (
            "must be the name of a model of this file",
            'write `base: m`, with a line such as `model m = hf("org/name")` before it',
        )
    if name == "dtype" and value not in MODEL_DTYPES:
        return f"must be one of {', '.join(MODEL_DTYPES)}", "write `dtype: float32`"
    if name == "bos" and not isinstance(value, bool):
        return (
            "must be true or false",
            "`bos: true` adds the token once, `bos: false` leaves it out",
        )
    if name in ("path", "revision") and not isinstance(value, str):
        return (
            "must be a text in quotes",
            f'write `{name}: "…"`' if name != "path" else f'write `{kind}("…")`',
        )
    return None
