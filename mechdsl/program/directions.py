"""`direction NAME = …` as typed data, with a check for dependency cycles."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mechdsl.base.limits import is_integer
from mechdsl.base.records import Record
from mechdsl.base.text import Source, Span, name_list
from mechdsl.diagnostics.core import did_you_mean, has_errors
from mechdsl.diagnostics.rules import BadDirection
from mechdsl.diagnostics.syntax import BadArgument, NotSupported, UnknownName, UnknownWord
from mechdsl.program import spec
from mechdsl.program.direction_methods import (
    BASIS_METHODS,
    DIRECTION_METHODS,
    ROW_OPERANDS,
    BasisMethod,
    DirectionMethod,
)
from mechdsl.program.names import Namespace, suggest_split
from mechdsl.program.spec import Constant, constant_value
from mechdsl.program.trainers import DirectionTrainer, find_trainer, trainer_call
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

if TYPE_CHECKING:
    from mechdsl.program.spec import Definitions

PROBE_CALL = "probe"
"""Direction method that fits a probe, or reads a trained one."""


def lower_direction(
    statement: ast.DirectionDef, parts: Definitions, scope: Namespace
) -> spec.Direction | None:
    """Lower a definition and report errors that don't depend on the model; None after an error.

    Codes: E0201, E0203, E0207, E0341.
    """
    before = len(scope.diagnostics)
    if training_call(statement.value) is None:  # or else `check_trained_direction` has checked it
        _check(statement.value, parts, scope)
    if has_errors(scope.diagnostics[before:]):
        return None
    calls = method_calls(statement.value)
    probes = [name for call in calls if (name := read_probe_name(call)) is not None]
    fits = [c for c in calls if DIRECTION_METHODS[c.name].at_a_site and not read_probe_name(c)]
    word = fits[0].name if fits else ""
    if fits and statement.site is None:
        _bad(
            fits[0],
            f"`{word}` is computed from activations, but the line names no site",
            f"write where: `{DIRECTION_METHODS[word].example} at resid_post layer 2 at last token`",
            scope,
        )
    site = statement.site
    free = any(c.name in ("unembedding", "saved") for c in calls)
    if site is not None and not fits and not free:
        of = f"the probe `{probes[0]}`" if probes else "the other directions"
        hint = f"leave `at {site.span.written}` out: its site is that of {of}"
        _bad(statement.value, "it is computed from directions that have a site", hint, scope)
    if has_errors(scope.diagnostics[before:]):
        return None
    return spec.Direction(
        span=statement.span,
        name=statement.name.id,
        value=statement.value,
        site=site,
        at=statement.at,
    )


def training_call(node: ast.Node) -> ast.Call | None:
    """Return the call `fit(…)` if a direction is such a call; None otherwise."""
    if isinstance(node, ast.Call) and node.name in DIRECTION_METHODS:
        return node if DIRECTION_METHODS[node.name].takes == "training" else None
    return None


def declared_training(direction: spec.Direction) -> spec.Basis | None:
    """Return what a direction declares with `fit(…)`, as a basis; None for other directions."""
    call, site = training_call(direction.value), direction.site
    if call is None or site is None:
        return None
    return spec.Basis(
        span=direction.span,
        name=direction.name,
        method=call,
        site=site,
        at=direction.at,
        changed_by=direction.changed_by,
        seed=direction.seed,
    )


def count_prompt_tokens(
    name: str, directions: Mapping[str, spec.Direction], parameters: Mapping[str, Constant]
) -> int | None:
    """Return the number of vectors of a direction that is a soft prompt or computed from one; None
    for other directions."""
    definition = directions.get(name)
    if definition is None:
        return None
    every = [definition, *direction_dependencies([definition.value], directions)]
    for call in (training_call(direction.value) for direction in every):
        if call is not None:
            inner = trainer_call(call)
            given = (
                (argument.name, constant_value(argument.value, parameters))
                for argument in inner.arguments
            )
            own = {key: value for key, value in given if key is not None and value is not None}
            trainer = find_trainer(inner)
            assert isinstance(trainer, DirectionTrainer)
            count = trainer.count_tokens(own)
            if count is not None:
                return count
    return None


def method_calls(node: ast.Node) -> list[ast.Call]:
    """Return the calls of direction methods in an expression."""
    return [
        part for part in walk(node) if isinstance(part, ast.Call) and part.name in DIRECTION_METHODS
    ]


def read_probe_name(call: ast.Call) -> str | None:
    """Return the name of the trained probe whose weights a call denotes, as `probe(told)`; None for
    other calls, such as `probe(count, fruit)`."""
    match [argument.value for argument in call.arguments if argument.name is None]:
        case [ast.Name(id=name)] if call.name == PROBE_CALL:
            return name
        case _:
            return None


def read_probe_names(
    nodes: Iterable[ast.Node], directions: Mapping[str, spec.Direction]
) -> Iterator[str]:
    """Yield the names of the probes whose weights are directions that expressions use."""
    every = list(nodes)
    every += [each.value for each in direction_dependencies(every, directions)]
    names = (read_probe_name(call) for node in every for call in method_calls(node))
    yield from (name for name in names if name is not None)


def direction_names(node: ast.Node | None, directions: Container[str]) -> list[str]:
    """Return the names of directions in an expression."""
    if node is None:
        return []
    names: dict[str, None] = {}
    for part in walk(node):
        match part:
            case ast.Name(id=name) | ast.Index(name=name) if name in directions:
                names[name] = None
            case _:
                pass
    return list(names)


def direction_dependencies(
    nodes: Iterable[ast.Node], directions: Mapping[str, spec.Direction]
) -> list[spec.Direction]:
    """Return the definitions that expressions use, directly or through other directions."""
    dependencies: dict[str, spec.Direction] = {}
    todo = [name for node in nodes for name in direction_names(node, directions)]
    while todo:
        name = todo.pop(0)
        if name not in dependencies and name in directions:
            dependencies[name] = directions[name]
            todo += direction_names(directions[name].value, directions)
    return list(dependencies.values())


def used_directions(experiment: spec.Experiment, program: spec.Program) -> list[spec.Direction]:
    """Return the directions that an experiment's rules and bases use, and those that it saves."""
    nodes = list_direction_expressions(experiment)
    nodes += [basis.method for basis in used_bases(experiment, program)]
    return direction_dependencies(nodes, program.directions)


def list_direction_expressions(experiment: spec.Experiment) -> list[ast.Node]:
    """Return the directions as written in rules and `save` lines, and the values of the `for`
    variables in them."""
    nodes: list[ast.Node] = [
        rule.direction for rule in experiment.every_rule if rule.direction is not None
    ]
    nodes += [save.direction for save in experiment.saved_directions]
    loops = {loop.name: loop.domain for loop in experiment.loops}
    looped = [loops[name] for node in nodes for name in direction_names(node, loops)]
    return [*nodes, *looped]


def fit_rows_of_experiment(experiment: spec.Experiment, program: spec.Program) -> list[FitRows]:
    """Return the rows that the fits for an experiment's rules, bases, probes and saved directions
    read."""
    directions = used_directions(experiment, program)
    fit_rows = [
        rows for direction in directions for rows in fit_rows_of_direction(direction, program)
    ]
    bases = (fit_rows_of_basis(basis, program) for basis in used_bases(experiment, program))
    fit_rows += [rows for rows in bases if rows is not None]
    for rule in experiment.every_rule:
        train = None if rule.observed is None else training_rows(rule.observed.call)
        rows = None if train is None else parse_fit_rows(train, program.prompts)
        fit_rows += [] if rows is None else [rows]
    return list(dict.fromkeys(fit_rows))


def used_bases(experiment: spec.Experiment, program: spec.Program) -> list[spec.Basis]:
    """Return the bases that an experiment's rules and saves use, and those whose decoders they are
    trained on, once each."""
    ends = (end for rule in experiment.every_rule for end in (rule.site, rule.receiver))
    sites = [end for end in ends if end is not None]
    sites += [save.site for save in experiment.saves]
    names = dict.fromkeys(site.basis_name for site in sites)
    names |= {rule.exchanged.of: None for rule in experiment.every_rule if rule.exchanged}
    names |= {rule.observed.basis: None for rule in experiment.every_rule if rule.observed}
    names |= dict.fromkeys(_list_circuit_bases(experiment, program))
    observed = (rule.observed.bases for rule in experiment.every_rule if rule.observed)
    names |= {name: None for bases in observed for name in bases}
    written = list_direction_expressions(experiment)
    names |= dict.fromkeys(read_probe_names(written, program.directions))
    looped = [loop for loop in experiment.loops if loop.name in names]
    for loop in looped:  # `for b in [more, less] { patch SITE in basis b }`
        names |= dict.fromkeys(p.id for p in walk(loop.domain) if isinstance(p, ast.Name))
    todo = [program.bases[name] for name in names if name in program.bases]
    used: dict[str, spec.Basis] = {}
    while todo:
        basis = todo.pop(0)
        used[basis.name] = basis
        read = read_probe_names([basis.method], program.directions)
        todo += [program.bases[each] for each in read if each in program.bases]
        decoder = decoded_basis(basis.method, program.prompts)
        of = None if decoder is None else program.bases.get(decoder.of.whole)
        todo += [] if of is None or of.name in used else [of]
    return list(used.values())


def _list_circuit_bases(experiment: spec.Experiment, program: spec.Program) -> Iterator[str | None]:
    """Yield the bases whose features are nodes of the circuits that rules name."""
    for rule in experiment.every_rule:
        name = rule.circuit_name or ""
        circuit, trained = program.circuits.get(name), program.masks.get(name)
        walked = () if circuit is None else walk(circuit.edges)
        sites = [node for node in walked if isinstance(node, ast.Site)]
        named = [site.bare for site in sites]
        named += [site.bare for site in (() if circuit is None else circuit.nodes)]
        named += [rule.nodes, None if trained is None else name_nodes(trained)]
        yield from (site.basis_name for site in sites)
        for node in named:
            group = None if node is None else program.groups.get(node.id)
            chosen = None if node is None else program.masks.get(node.id)
            yield from () if group is None else (site.basis_name for site in group.sites)
            yield from () if chosen is None else (chosen.site.basis_name,)


def name_nodes(circuit: spec.Basis) -> ast.Name | None:
    """Return the name of the group of neurons or features that are nodes of a trained circuit."""
    given = (argument.value for argument in circuit.method.arguments if argument.name == "nodes")
    return next((name for name in given if isinstance(name, ast.Name)), None)


def fitted_block(method: BasisMethod, call: ast.Call) -> ast.Node:
    """Return the argument of a basis method's call that names its prompt set."""
    if method.takes == "training":
        return next(argument.value for argument in call.arguments if argument.name == "prompts")
    values = [argument.value for argument in call.arguments if argument.name is None]
    return values[1] if method.takes == "value and block" else values[0]


def decoded_basis(call: ast.Call, blocks: Container[str]) -> ast.QualifiedRef | None:
    """Return `decoder of BASIS` if a training reads the decoder of a dictionary; None for rows."""
    for argument in call.arguments:
        node = argument.value
        if argument.name == "prompts" and isinstance(node, ast.QualifiedRef):
            return node if node.name == "decoder" and node.of.name not in blocks else None
    return None


def last_token(call: ast.Call) -> ast.Positions:
    """Create the position `last token`."""
    span = Span(Source("last token", call.span.source.path), 0, len("last token"))
    edge = ast.EdgeToken("last", span=span)
    point = ast.Position(ast.Point(edge, span=span), span=span)
    return ast.Positions((point,), span=span)


def fit_rows_of_basis(basis: spec.Basis, program: spec.Program | Definitions) -> FitRows | None:
    """Return the rows that a basis is fitted on; None for a method without rows."""
    method = BASIS_METHODS.get(basis.method.name)
    if method is None or method.takes not in ROW_OPERANDS:
        return None
    rows = parse_fit_rows(fitted_block(method, basis.method), program.prompts)
    if rows is None:
        return None
    limit, trains = _limit(basis.method, program.parameters), method.takes == "training"
    model = next(
        (argument.value for argument in basis.method.arguments if argument.name == "model"), None
    )
    named = model.id if isinstance(model, ast.Name) and trains else None
    used = rows.used | basis.changed_by
    return replace(rows, limit=limit, trains=trains, used=used, model=named, partner=basis.partner)


def training_rows(call: ast.Call | None) -> ast.Node | None:
    """Return the argument `train:`, the rows that a probe is fitted on."""
    named = () if call is None else call.arguments
    return next((argument.value for argument in named if argument.name == "train"), None)


class FitRows(Record):
    """Rows of a fit: a run of a block, or one model's run of it."""

    block: str | None
    """None for the rows of the experiment that uses the fit."""
    part: Literal["train", "test"] | None = None
    run: str = "clean"
    model: str | None = None
    limit: int | None = None
    """The limit, as in `prompts fruit limit 64`."""
    used: frozenset[str] = frozenset()
    """Corruptions of the block that the fit reads; each of them changes all of the rows."""
    trains: bool = False
    """Whether `fit` trains on them, so that `--limit` doesn't apply."""
    partner: spec.ExternalRunSpec | None = None
    """The run whose vectors theirs are correlated with; None if it is the same run."""

    @property
    def models(self) -> list[str]:
        """Models that run the rows, other than the experiment's."""
        named = (self.model, None if self.partner is None else self.partner.model)
        return [name for name in named if name is not None]

    @property
    def blocks(self) -> list[str]:
        """Blocks of the rows, other than the experiment's."""
        named = (self.block, None if self.partner is None else self.partner.prompts)
        return [name for name in named if name is not None]

    @property
    def key(self) -> str:
        """Name of the rows in tables."""
        part = f".{self.part}" if self.part else ""
        limit = f" limit {self.limit}" if self.limit else ""
        model = f" on {self.model}" if self.model else ""
        used = f" changed by {', '.join(sorted(self.used))}" if self.used else ""
        trains = " for a training" if self.trains else ""
        partner = f" with {self.partner.name}" if self.partner else ""
        return f"{self.block or ''}{part}{limit}{model}{used}{trains}{partner}"


def fit_rows_of_direction(
    direction: spec.Direction, program: spec.Program | Definitions
) -> list[FitRows]:
    """Return the rows that a direction is computed or trained on."""
    training = declared_training(direction)
    if training is not None:
        rows = fit_rows_of_basis(training, program)
        return [] if rows is None else [rows]
    calls = method_calls(direction.value)
    return [rows for call in calls for rows in fit_rows_of_call(call, program)]


def fit_rows_of_call(call: ast.Call, program: spec.Program | Definitions) -> list[FitRows]:
    """Return the rows that a method reads; names are known, except in rejected definitions."""
    given = {argument.name: argument.value for argument in call.arguments}
    own = given.get("prompts")
    values = [a.value for a in call.arguments if a.name is None]
    if DIRECTION_METHODS[call.name].takes == "value and block":
        values = values[1:]
    if not DIRECTION_METHODS[call.name].at_a_site:
        return []
    shared = None if own is None else parse_fit_rows(own, program.prompts)
    limit = _limit(call, program.parameters)
    return _paired([replace(_rows(value, shared, program), limit=limit) for value in values])


def _paired(fitted: Sequence[FitRows]) -> list[FitRows]:
    """Restrict the rows of one fit: of each block, those that every read run changes."""
    pairs: list[FitRows] = []
    for rows in fitted:
        named = {other.run for other in fitted if other.block == rows.block} - {"clean"}
        pairs.append(replace(rows, used=frozenset(named if rows.block else ())))
    return pairs


def _limit(call: ast.Call, parameters: Mapping[str, Constant]) -> int | None:
    """Return the number of `limit: 64`; None without a valid one."""
    written = [a.value for a in call.arguments if a.name == "limit"]
    limit = constant_value(written[0], parameters) if written else None
    if not is_integer(limit, least=1):
        return None
    return limit


def _rows(value: ast.Node, shared: FitRows | None, program: spec.Program | Definitions) -> FitRows:
    if isinstance(value, ast.Name) and value.id in program.models:
        rows = shared or FitRows(None)
        return FitRows(rows.block, rows.part, rows.run, value.id)
    return parse_fit_rows(value, program.prompts) or FitRows(None)


def parse_fit_rows(node: ast.Node, blocks: Mapping[str, spec.Prompts]) -> FitRows | None:
    """Parse `fruit`, `fruit.train`, `fruit.fewer`, `fewer of fruit.train`; None if not a block."""
    match node:
        case ast.Name(id=name) if name in blocks:
            return FitRows(name)
        case ast.Attribute(name=name, attribute=word) if name in blocks:
            return _part(FitRows(name), word, blocks[name])
        case ast.QualifiedRef(name=run, of=of) if of.name in blocks:
            rows = (
                FitRows(of.name)
                if of.part is None
                else _part(FitRows(of.name), of.part, blocks[of.name])
            )
            return _of_run(rows, run) if rows.run == "clean" else None
        case _:
            return None


def _part(rows: FitRows, word: str, block: spec.Prompts) -> FitRows:
    if block.split is not None and (word == "train" or word == "test"):
        return FitRows(rows.block, word)
    return _of_run(rows, word)


def _of_run(rows: FitRows, run: str) -> FitRows:
    return FitRows(rows.block, rows.part, run, used=frozenset({run}) - {"clean"})


# --- checks of a definition -----------------------------------------------------------------------


def _check(node: ast.Node, parts: Definitions, scope: Namespace) -> None:
    match node:
        case ast.Binary(operator="+" | "-", left=left, right=right):
            _check(left, parts, scope)
            _check(right, parts, scope)
        case ast.Binary(operator="*", left=left, right=right):
            number = _is_number(left, parts)
            _check(right if number else left, parts, scope)
            _number(left if number else right, parts, scope)
        case ast.Binary(left=left, right=right):
            _check(left, parts, scope)
            _number(right, parts, scope)
        case ast.Negative(operand=operand):
            _check(operand, parts, scope)
        case ast.Name(id=name) if name in DIRECTION_METHODS and name not in scope.definitions:
            example = DIRECTION_METHODS[name].example
            _bad(node, f"`{name}` is written `{example}`", f"write `{example}`", scope)
        case ast.Name(id=name) | ast.Index(name=name):
            scope.use("direction", name, node.span)
        case ast.Call() if training_call(node) is not None:
            hint = f"give it a name: `direction d = {node.name}(…) at …`"
            _bad(node, f"`{node.name}` is trained separately", hint, scope)
        case ast.Call(name=name) if name in DIRECTION_METHODS:
            _arguments(node, DIRECTION_METHODS[name], parts, scope)
        case ast.Call(name=name):
            types = ", ".join(f"`{method.example}`" for _, method in DIRECTION_METHODS.items())
            hint = did_you_mean(name, DIRECTION_METHODS, f"types of direction are {types}")
            scope.diagnostics.append(
                UnknownWord(span=node.span, kind="type of direction", word=name, hint=hint)
            )
        case _:
            hint = f"write how it is made: `{DIRECTION_METHODS['mean_difference'].example}`"
            _bad(node, "it isn't a vector", hint, scope)


def _is_number(node: ast.Node, parts: Definitions) -> bool:
    named = (part for part in walk(node) if isinstance(part, ast.Name))
    found = [part for part in walk(node) if isinstance(part, ast.Call | ast.Index)]
    return not found and all(part.id in parts.parameters for part in named)


def _number(node: ast.Node, parts: Definitions, scope: Namespace) -> None:
    if not _is_number(node, parts):
        reason = f"`{node.span.written}` isn't a number, and directions are multiplied with numbers"
        _bad(node, reason, "write a number, or a `param`: `0.5 * refusal`", scope)
    for part in walk(node):
        if isinstance(part, ast.Name):
            scope.has("param", part.id)


def _arguments(
    call: ast.Call, method: DirectionMethod, parts: Definitions, scope: Namespace
) -> None:
    values = [a.value for a in call.arguments if a.name is None]
    if read_probe_name(call) is not None:
        _check_probe(call, scope)
        return
    for argument in call.arguments:
        if argument.name is not None and argument.name not in method.options:
            known = ", ".join(f"`{option}: …`" for option in method.options)
            hint = did_you_mean(argument.name, method.options, f"it takes {known or 'none'}")
            reason = f"is not an argument of `{call.name}`"
            scope.diagnostics.append(
                BadArgument(span=argument.span, name=argument.name, reason=reason, hint=hint)
            )
    counts = {"two": (2,), "value and block": (2,), "texts": (1, 2), "file": (2,)}
    if len(values) not in counts.get(method.takes, (1,)):
        scope.diagnostics.append(
            BadArgument(
                span=call.span,
                name=call.name,
                reason=f"is written `{method.example}`",
                hint="write the same number of arguments",
            )
        )
        return
    match method.takes:
        case "direction":
            _check(values[0], parts, scope)
        case "two" | "block":
            models = [v for v in values if isinstance(v, ast.Name) and v.id in scope.names("model")]
            for value in values:
                check_fit_rows(
                    value, parts, scope, models=method.takes == "two" and len(models) == 2
                )
        case "value and block":
            check_fit_rows(values[1], parts, scope, models=False)
        case _:
            for value in values:
                if not isinstance(constant_value(value, parts.parameters), str):
                    reason = "takes texts in quotes"
                    scope.diagnostics.append(
                        BadArgument(
                            span=value.span,
                            name=call.name,
                            reason=reason,
                            hint=f"write `{method.example}`",
                        )
                    )
    for argument in call.arguments:
        if argument.name == "prompts":
            check_fit_rows(argument.value, parts, scope, models=False)
        if argument.name == "limit":
            check_row_limit(call, argument, parts, scope)


def _check_probe(call: ast.Call, scope: Namespace) -> None:
    """Report E0207 for a call that names no trained probe, and for options other than `class`."""
    name = str(read_probe_name(call))
    option = next(
        (argument for argument in call.arguments if argument.name not in (None, "class")), None
    )
    span, said, reason, hint = call.span, call.name, "", ""
    if not scope.has("probe", name):
        reason = "is written `probe(count, fruit)`, or `probe(told)` with a `probe` of the file"
        known = f"`{name}` isn't a `probe`: name the rows, or train one, `probe {name} = fit(…)`"
        hint = did_you_mean(name, scope.names("probe"), known)
    elif option is not None:
        span, said = option.span, str(option.name)
        reason = f"is an option of the fit, and `{name}` is a trained probe"
        hint = f"write it in `probe {name} = fit(…)`; `class: …` chooses a class"
    if reason:
        scope.diagnostics.append(BadArgument(span=span, name=said, reason=reason, hint=hint))


def check_row_limit(
    call: ast.Call, limit: ast.Argument, parts: Definitions, scope: Namespace
) -> None:
    """Report E0207 for an invalid limit, and for a limit without a named block."""
    if isinstance(limit.value, ast.Name):
        scope.has("param", limit.value.id)
    reason = hint = ""
    if _limit(call, parts.parameters) is None:
        reason, hint = "is a whole number from 1 on", "write `limit: 64`"
    elif all(
        isinstance(a.value, ast.Name) and scope.has("model", a.value.id)
        for a in call.arguments
        if a.name is None or a.name == "prompts"
    ):
        reason = "says how many rows of a block there are, and no block is named"
        hint = "name one, `prompts: fruit`; without it the rows are those of the experiment"
    if reason:
        scope.diagnostics.append(
            BadArgument(span=limit.span, name="limit", reason=reason, hint=hint)
        )


def check_fit_rows(
    node: ast.Node, parts: Definitions, scope: Namespace, *, models: bool = False
) -> None:
    """Report E0201 for a name that isn't a block's (or, with `models`, a model's) or a run's of the
    block, and E0108 for a run with rules."""
    if models and isinstance(node, ast.Name) and scope.has("model", node.id):
        return
    name = node.name if isinstance(node, ast.Attribute) else None
    name = node.of.name if isinstance(node, ast.QualifiedRef) else name
    name = node.id if isinstance(node, ast.Name) else name
    if name is None:
        _bad(node, "it names no block of prompts", "write a block: `harmful`, `fruit.fewer`", scope)
        return
    if _is_derived(node, name, parts, scope):
        what = f"a fit on rows of `{node.span.written}`, a run with rules,"
        hint = "to write the mean of such a run, use `ablate SITE at POSITION with mean of RUN`"
        scope.diagnostics.append(NotSupported(span=node.span, what=what, later=hint))
        scope.has("prompts", name)
        return
    if not scope.use("prompts", name, node.span):
        return
    rows = parse_fit_rows(node, parts.prompts)
    block = parts.prompts.get(name)
    if block is None:
        return
    known = ["clean", *(corruption.name for corruption in block.corruptions)]
    if rows is None or rows.run not in known:
        runs = [f"{name}.{each}" for each in known[1:]]
        runs += [f"{name}.train", f"{name}.test"] if block.split is not None else []
        hint = f"it has {name_list(runs)}" if runs else f"write `{name}`: it has no other run"
        hint = did_you_mean(node.span.written, runs, hint)
        written = node.span.written
        if written in (f"{name}.train", f"{name}.test"):
            hint = suggest_split(name, block.span, node.span)
        scope.diagnostics.append(UnknownName(span=node.span, kind="run", name=written, hint=hint))


def _is_derived(node: ast.Node, block: str, parts: Definitions, scope: Namespace) -> bool:
    """Return whether rows are those of a run that an experiment defines with rules."""
    run = node.attribute if isinstance(node, ast.Attribute) else block
    run = node.name if isinstance(node, ast.QualifiedRef) else run
    known = parts.prompts.get(block)
    runs = () if known is None else (block, *(corruption.name for corruption in known.corruptions))
    return run in scope.derived and run not in runs


def _bad(node: ast.Node, reason: str, hint: str, scope: Namespace) -> None:
    text = node.span.written
    scope.diagnostics.append(BadDirection(span=node.span, text=text, reason=reason, hint=hint))


def drop_circular_directions(
    directions: Mapping[str, spec.Direction], scope: Namespace
) -> dict[str, spec.Direction]:
    """Return the other directions; E0341 for directions that depend on themselves."""
    circular_directions = dict(directions)
    for name, definition in directions.items():
        dependencies = direction_dependencies([definition.value], directions)
        if any(direction.name == name for direction in dependencies):
            text = definition.value.span.written
            reason = f"`{name}` is defined in terms of itself"
            hint = "define it with a fit, such as `mean_difference(…)`, or with other directions"
            scope.diagnostics.append(
                BadDirection(span=definition.value.span, text=text, reason=reason, hint=hint)
            )
            del circular_directions[name]
    return circular_directions


def split_factor(node: ast.Expr, directions: Container[str]) -> tuple[ast.Expr | None, ast.Expr]:
    """Split `4.0 * refusal` into its number (None without one) and its direction."""
    one = ast.Number(1, span=node.span)
    match node:
        case ast.Negative(operand=operand):
            factor, rest = split_factor(operand, directions)
            return ast.Negative(factor or one, span=node.span), rest
        case ast.Binary(operator="*", left=left, right=right):
            if not _has_vector(left, directions):
                factor, rest = split_factor(right, directions)
                return _times(left, factor, node), rest
            if not _has_vector(right, directions):
                factor, rest = split_factor(left, directions)
                return _times(right, factor, node), rest
        case ast.Binary(operator="/", left=left, right=right) if not _has_vector(right, directions):
            factor, rest = split_factor(left, directions)
            return ast.Binary("/", factor or one, right, span=node.span), rest
        case _:
            pass
    return None, node


def _times(number: ast.Expr, factor: ast.Expr | None, node: ast.Expr) -> ast.Expr:
    return number if factor is None else ast.Binary("*", number, factor, span=node.span)


def _has_vector(node: ast.Node, directions: Container[str]) -> bool:
    calls = (part for part in walk(node) if isinstance(part, ast.Call | ast.Index))
    return bool(direction_names(node, directions)) or any(True for _ in calls)
