"""A file with its imports as one `Program`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from mechdsl.base import limits
from mechdsl.base.names import name_list
from mechdsl.base.source import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported, NotText, Unreadable
from mechdsl.diagnostics.e02_names import (
    BadArgument,
    BadSetting,
    ImportFailed,
    MissingLine,
    RepeatedStatement,
    UnknownName,
    did_you_mean,
)
from mechdsl.diagnostics.e05_paths import NotMech, ReadsElsewhere, SpecialFile
from mechdsl.diagnostics.w07_names import UnusedName
from mechdsl.program import spec
from mechdsl.program.averaged_images import check_averaged
from mechdsl.program.checkpoints import STAR, checkpoints
from mechdsl.program.constants import constant
from mechdsl.program.definitions import Definitions
from mechdsl.program.lower_directions import lower_direction, without_circles
from mechdsl.program.lower_experiment import lower_experiment
from mechdsl.program.lower_prompts import lower_prompts
from mechdsl.program.model_bases import BASE, check_bases
from mechdsl.program.named_paths import USE, named_paths, path_to_read
from mechdsl.program.namespace import Namespace
from mechdsl.program.run_order import with_order
from mechdsl.program.unused_names import pools_named, unused_in_blocks
from mechdsl.syntax import ast
from mechdsl.syntax.parse import parse, parse_setting, read_source
from mechdsl.syntax.walk import walk

DTYPES = ("float32", "bfloat16", "float16", "float64")
_MANY = f"more than {limits.FILES} files are imported"
MODEL_KINDS = ("zoo", "hf", "local", "python")
_ARGUMENTS = {
    "zoo": ("dtype", "bos"),
    "hf": ("revision", "dtype", "bos", "base"),
    "local": ("dtype", "bos", "base"),
    "python": (),
}
"""What a source of models takes beside its path."""


def lower_program(
    tree: ast.File, source: Source, settings: Mapping[str, str] | None = None
) -> tuple[spec.Program, list[Diagnostic]]:
    """The typed program of a parsed file; `settings` are the `--set k=v` of the command line.

    Codes: E0108 for what is not supported yet, E02xx for names, imports and parameters, E0532 and
    E0535 for imports that may not be read, E06xx for experiments that lack a part, W0730 for unused
    names, W0780 for paths of an untrusted file.
    """
    scope = Namespace()
    files = _with_imports(tree, source, scope.diagnostics)
    parts = Definitions()
    _parameters(files, parts, scope, settings or {})
    if source.reach.reads is not None:
        trees = [file for file, _ in files]
        scope.diagnostics.extend(named_paths(trees, parts.parameters))
    # Definitions before experiments: a file may use a name before the line that defines it.
    for file, imported in files:
        for statement in file.statements:
            _define(statement, imported, parts, scope)
    check_bases([file for file, _ in files], parts, scope)
    check_averaged(parts, scope)
    for file, _ in files:
        for name in pools_named(file):
            scope.has("prompts", name)
    for block in parts.prompts.values():
        _scored_with(block, parts, scope)
    _directions(files, parts, scope)
    for file, imported in files:
        if imported:
            continue
        for statement in file.statements:
            if isinstance(statement, ast.ExperimentDef):
                is_new = scope.define("experiment", statement.name, imported=False)
                found = lower_experiment(statement, parts, scope)
                if is_new:
                    parts.experiments.extend(found)
    parts.experiments = with_order(tree, parts, scope)
    # What is not supported yet may be what uses a name.
    supported = not any(isinstance(d, NotSupported) for d in scope.diagnostics)
    if supported and any(isinstance(s, ast.ExperimentDef) for s in tree.statements):
        scope.warn_unused()
        scope.diagnostics.extend(unused_in_blocks(tree))
    whole = spec.Program(
        span=tree.span,
        files=tuple(path for file, _ in files if (path := file.span.source.path) is not None),
        sources=tuple(file.span.source for file, _ in files),
        models=parts.models,
        checkpoints=parts.checkpoints,
        prompts=parts.prompts,
        groups=parts.groups,
        directions=parts.directions,
        metrics=parts.metrics,
        parameters=parts.parameters,
        experiments=tuple(parts.experiments),
        seed=parts.seed,
        lost=tuple(lost for file, _ in files for lost in file.lost),
    )
    if any(isinstance(d, ImportFailed | ReadsElsewhere | SpecialFile) for d in scope.diagnostics):
        # What seems to be missing may stand in the file that can't be read.
        missing = (MissingLine, UnknownName, UnusedName)
        return whole, [d for d in scope.diagnostics if not isinstance(d, missing)]
    return whole, scope.diagnostics


def _with_imports(
    tree: ast.File, source: Source, diagnostics: list[Diagnostic]
) -> list[tuple[ast.File, bool]]:
    """The file and everything it imports, imported files first, each once."""
    found: list[tuple[ast.File, bool]] = []
    done: set[Path] = set()

    def visit(file: ast.File, origin: Source, chain: tuple[Path, ...]) -> None:
        for statement in file.statements:
            if isinstance(statement, ast.Use):
                follow(statement, origin, chain)
        found.append((file, origin is not source))

    def follow(use: ast.Use, origin: Source, chain: tuple[Path, ...]) -> None:
        path, problems = path_to_read(USE, use.path.value, use.path.span)
        if path is None:
            diagnostics.extend(problems)
            return
        real = path.resolve()
        if real in chain:
            diagnostics.append(
                ImportFailed(
                    span=use.path.span,
                    path=use.path.value,
                    reason="it imports this file",
                    hint="move what both need into a third file",
                )
            )
            return
        if real in done:
            return
        if len(done) == limits.FILES:
            if not any(isinstance(d, ImportFailed) and d.reason == _MANY for d in diagnostics):
                diagnostics.append(
                    ImportFailed(
                        span=use.path.span,
                        path=use.path.value,
                        reason=_MANY,
                        hint="put what several files define into one",
                    )
                )
            return
        done.add(real)
        imported, problems = read_source(path)
        if imported is None:
            diagnostics.append(
                ImportFailed(
                    span=use.path.span,
                    path=use.path.value,
                    reason=_why(problems[0]),
                    hint="paths are relative to the file that has the `use` line",
                )
            )
            return
        imported = replace(imported, reach=origin.reach)
        file, problems = parse(imported)
        diagnostics.extend(problems)
        visit(file, imported, (*chain, real))

    start = (Path(os.path.realpath(source.path)),) if source.path is not None else ()
    visit(tree, source, start)
    return found


def _why(problem: Diagnostic) -> str:
    """Why a file can't be read, without its path, which the `use` line has."""
    if isinstance(problem, NotMech):
        return "it is no `.mech` file"
    return problem.reason if isinstance(problem, Unreadable | NotText) else problem.message


def _parameters(
    files: list[tuple[ast.File, bool]],
    parts: Definitions,
    scope: Namespace,
    settings: Mapping[str, str],
) -> None:
    """Parameters first: everything else may use them."""
    for file, imported in files:
        for statement in file.statements:
            if not isinstance(statement, ast.Param):
                continue
            value = constant(statement.value, parts.parameters)
            if value is None:
                scope.diagnostics.append(
                    BadArgument(
                        span=statement.value.span,
                        name=statement.name.id,
                        reason="must be a number, a text, or true or false",
                        hint="write a plain value: `param depth = 12`",
                    )
                )
                value = 0
            if scope.define("param", statement.name, imported=imported):
                parts.parameters[statement.name.id] = value
    for name, text in settings.items():
        _override(name, text, parts, scope.diagnostics)


def _override(name: str, text: str, parts: Definitions, diagnostics: list[Diagnostic]) -> None:
    """`--set name=text`: only parameters can be set, to a value of the same kind."""
    setting = f"{name}={text}"
    if name not in parts.parameters:
        known = name_list(parts.parameters)
        hint = did_you_mean(
            name,
            parts.parameters,
            f"parameters are {known}" if known else f"add `param {name} = …` to the file",
        )
        diagnostics.append(
            BadSetting(setting=setting, reason=f"the file has no parameter `{name}`", hint=hint)
        )
        return
    old = parts.parameters[name]
    if isinstance(old, str):
        parts.parameters[name] = text
        return
    expression = parse_setting(text)
    value = None if expression is None else constant(expression, {})
    if value is None or isinstance(value, str) or isinstance(value, bool) != isinstance(old, bool):
        wanted = "true or false" if isinstance(old, bool) else "a number"
        diagnostics.append(
            BadSetting(
                setting=setting,
                reason=f"`{name}` is {wanted}",
                hint=f"for example `--set {name}={str(old).lower()}`",
            )
        )
        return
    parts.parameters[name] = value


def _define(statement: ast.TopLevel, imported: bool, parts: Definitions, scope: Namespace) -> None:
    match statement:
        case ast.ModelDef(name=name):
            model = _model(statement, parts, scope)
            if scope.define("model", name, imported=imported) and model is not None:
                members = checkpoints(model, scope.diagnostics)
                parts.models.update((each.name, each) for each in members)
                if STAR in model.path:
                    parts.checkpoints[name.id] = tuple(each.name for each in members)
        case ast.PromptsDef(name=name):
            if scope.define("prompts", name, imported=imported):
                parts.prompts[name.id] = lower_prompts(statement, scope, parts.parameters)
        case ast.MetricDef(name=name, value=value):
            if scope.define("metric", name, imported=imported):
                parts.metrics[name.id] = value
        case ast.GroupDef(name=name, sites=sites):
            if scope.define("group", name, imported=imported):
                for site in sites:
                    if site.ranked is not None and isinstance(site.ranked.amount, str):
                        scope.has("param", site.ranked.amount)
                parts.groups[name.id] = spec.Group(span=statement.span, name=name.id, sites=sites)
        case ast.Seed(value=value):
            first = parts.seeded
            if first is not None and first.source is statement.span.source:
                scope.diagnostics.append(
                    RepeatedStatement(
                        span=statement.span,
                        what="seed",
                        block=first.source.name,
                        first=first.line,
                    )
                )
            parts.seed, parts.seeded = value, statement.span
        case ast.BasisDef(name=name):
            _later(name, "basis", imported, scope)
        case _:
            pass


def _scored_with(block: spec.Prompts, parts: Definitions, scope: Namespace) -> None:
    """E0201 and E0207 for what texts can't be scored with."""
    ref = block.scored_with
    if ref is None or not scope.use("prompts", ref.name, ref.span):
        return
    images = parts.prompts[ref.name]
    if ref.part is not None or images.kind != "images" or images.tiles is not None:
        reason = "is a part of a block" if ref.part is not None else "is no block of images"
        hint = "name a block of images, all of it: `image from scenes`"
        if ref.part is None and images.tiles is not None:
            reason = "has several tiles of each image, and a text is scored with one image"
            hint = "name a block without `tiles`, or score the tiles: `measure score(answer)`"
        name = ref.span.written
        scope.diagnostics.append(BadArgument(span=ref.span, name=name, reason=reason, hint=hint))


def _directions(files: list[tuple[ast.File, bool]], parts: Definitions, scope: Namespace) -> None:
    """Directions last: they name blocks, models and one another, in any order."""
    found: list[ast.DirectionDef] = []
    for file, imported in files:
        for statement in file.statements:
            if isinstance(statement, ast.DirectionDef) and scope.define(
                "direction", statement.name, imported=imported
            ):
                found.append(statement)
    for statement in found:
        for part in walk(statement.site):
            if isinstance(part, ast.Name):
                _ = scope.has("group", part.id) or scope.has("param", part.id)
        direction = lower_direction(statement, parts, scope)
        if direction is not None:
            parts.directions[direction.name] = direction
    parts.directions = without_circles(parts.directions, scope)


def _later(name: ast.Name, kind: str, imported: bool, scope: Namespace) -> None:
    """A definition that parses but cannot be used yet; its name is known all the same."""
    if scope.define(kind, name, imported=imported):
        scope.definitions[name.id].used = True
    scope.diagnostics.append(NotSupported(span=name.span, what=f"`{kind}`"))


def _model(statement: ast.ModelDef, parts: Definitions, scope: Namespace) -> spec.Model | None:
    call = statement.source
    if call.name not in MODEL_KINDS:
        known = 'write `zoo("…")`, `hf("…")`, `local("…")` or `python("…")`'
        hint = did_you_mean(call.name, MODEL_KINDS, known)
        scope.diagnostics.append(
            BadArgument(
                span=call.span, name=call.name, reason="is not a source of models", hint=hint
            )
        )
        return None
    values: dict[str, object] = {}
    for argument in call.arguments:
        name = argument.name or ("path" if "path" not in values else "")
        problem = _place_problem(name, call.name, values)
        if problem is None:
            if isinstance(argument.value, ast.Name) and name in ("dtype", BASE):
                values[name] = argument.value.id
            else:
                value = constant(argument.value, parts.parameters)
                values[name] = None if name == BASE else value
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
    if BASE in values and (own := next((each for each in ("dtype", "bos") if each in values), "")):
        scope.diagnostics.append(
            BadArgument(
                span=call.span,
                name=own,
                reason="stands beside `base:`, and is that of the base",
                hint=f"write it in the line of `{values[BASE]}`",
            )
        )
        return None
    if call.name == "python":
        values["function"] = call
    return spec.Model.model_validate(
        {"span": statement.span, "name": statement.name.id, "kind": call.name, **values}
    )


def _place_problem(name: str, kind: str, given: Collection[str]) -> tuple[str, str] | None:
    """Why there can't be one more argument of this name, or without one."""
    if not name:
        ways = [f"`{each}: …`" for each in _ARGUMENTS[kind]]
        hint = f", or say what it is: {', '.join(ways[:-1])} or {ways[-1]}" if ways else ""
        return "takes one argument without a name", f"leave it out{hint}"
    if name in given:
        return "is given twice", "leave one of them out"
    return None


def _argument_problem(name: str, value: object, kind: str) -> tuple[str, str] | None:
    """Why an argument of `hf(…)` can't be taken, and what to write."""
    allowed = ("path", *_ARGUMENTS[kind])
    if name not in allowed:
        if kind == "python":
            return (
                "is not an argument of `python`",
                "leave it out: the function gives the model and the tokenizer as they are to be",
            )
        if name == "quantize":
            return "can't be done yet", "leave it out: weights are used as they were saved"
        return (
            f"is not an argument of `{kind}`",
            did_you_mean(name, allowed, f"arguments are {', '.join(allowed[1:])}"),
        )
    if name == BASE and value is None:
        return (
            "must be the name of a model of this file",
            'write `base: m`, with a line such as `model m = hf("org/name")` before it',
        )
    if name == "dtype" and value not in DTYPES:
        return f"must be one of {', '.join(DTYPES)}", "write `dtype: float32`"
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
