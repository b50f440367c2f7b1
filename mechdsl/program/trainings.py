"""What a rotation, vector or mask is trained on: rows, a rule and a measure, as an experiment that
no user sees.

`basis d = fit(das(dims: 2), prompts: p.train, from: fewer, maximise: M) at SITE at POSITIONS` is
trained on the rows of `prompts p.train` with `from fewer into clean`, `patch SITE at POSITIONS` and
`measure M as raw`. So are `direction v = fit(vector(…), …)` and `group g = fit(mask(…), …)`;
without `from`, the rule is `ablate SITE at POSITIONS with zero`, which names the vectors that are
edited, or has the fill of a mask.

An experiment that uses a group, a circuit, a lens or a probe with `seeds: 3` is three experiments,
one for each seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from mechdsl.diagnostics.core import did_you_mean, has_errors
from mechdsl.diagnostics.rules import BadBasis
from mechdsl.diagnostics.syntax import BadArgument, NotSupported, UnknownName
from mechdsl.program import spec
from mechdsl.program.direction_methods import BASIS_METHODS, OBJECTIVES
from mechdsl.program.directions import (
    FitRows,
    declared_training,
    fit_rows_of_basis,
    last_token,
    name_nodes,
    used_bases,
    used_directions,
)
from mechdsl.program.measures import lower_measure, lower_statistics
from mechdsl.program.names import Namespace
from mechdsl.program.prompts import named_corruptions
from mechdsl.program.spec import SEED_AXIS, Constant, constant_value
from mechdsl.program.statements import Statements, mark_names_used, resolve_run_name
from mechdsl.program.trainers import (
    EdgeScoreTrainer,
    EffectTrainer,
    RotationTrainer,
    Trainer,
    find_trainer,
    trainer_call,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

TRAINED_SHARE, DISCOVERED_SHARE = 80.0, 50.0
"""Percentages of the rows of a block that circuits are trained on, if the file doesn't split it: in
general, and if an experiment discovers one of them."""


def split_rows_of_circuits(
    tree: ast.File, discovered: Collection[str] = ()
) -> tuple[ast.File, dict[str, tuple[str, ...]]]:
    """Split the rows of circuits that are trained and tested on the same rows.

    If an experiment on a block without `split` uses a circuit that is trained on this block, the
    block has the line `split 80%`, or `split 50%` if an experiment discovers the circuit. Circuits
    are trained on its part `train`, and experiments that use them have the part `test`. The same
    is done for groups that experiments search for, and for groups that are nodes of circuits.

    Args:
        discovered: Circuits that experiments discover, and groups that they search for.

    Returns:
        The file, and the names of the circuits that are trained on each block that is split.
    """
    unsplit_blocks, nodes = find_unsplit_blocks(tree), _find_nodes(tree)
    groups = {*discovered, *nodes.values()}
    trained = {
        statement.name.id: block
        for statement in tree.statements
        if _is_split_for(statement, groups) and (block := _block_of(statement)) in unsplit_blocks
    }
    uses = {
        number: used
        for number, statement in enumerate(tree.statements)
        if isinstance(statement, ast.ExperimentDef)
        and (used := _tested_blocks(statement, trained, nodes))
    }
    blocks = dict.fromkeys(block for used in uses.values() for block in used)
    if not blocks:
        return tree, {}
    split = {block: tuple(name for name, of in trained.items() if of == block) for block in blocks}
    definitions: list[ast.TopLevel] = []
    for number, statement in enumerate(tree.statements):
        if isinstance(statement, ast.PromptsDef) and statement.name.id in split:
            here = any(name in discovered for name in split[statement.name.id])
            statement = with_split(statement, DISCOVERED_SHARE if here else TRAINED_SHARE)
        elif _is_split_for(statement, groups) and trained.get(statement.name.id) in split:
            assert statement.source is not None
            arguments = tuple(map(_train_part, statement.source.arguments))
            statement = replace(statement, source=replace(statement.source, arguments=arguments))
        elif isinstance(statement, ast.ExperimentDef) and number in uses:
            lines = (_test_part(line, uses[number]) for line in statement.statements)
            statement = replace(statement, statements=tuple(lines))
        definitions.append(statement)
    return replace(tree, statements=tuple(definitions)), split


def _is_split_for(
    statement: ast.TopLevel, groups: Collection[str]
) -> TypeGuard[ast.CircuitDef | ast.GroupDef]:
    """Whether a block without `split` is split for the definition: true for circuits, and for the
    given groups."""
    if not isinstance(statement, ast.CircuitDef | ast.GroupDef) or statement.source is None:
        return False
    return isinstance(statement, ast.CircuitDef) or statement.name.id in groups


def _find_nodes(tree: ast.File) -> dict[str, str]:
    """Return the name of the group of nodes of each circuit with `nodes`, by the circuit's name."""
    return {
        statement.name.id: argument.value.id
        for statement in tree.statements
        if isinstance(statement, ast.CircuitDef) and statement.source is not None
        for argument in statement.source.arguments
        if argument.name == "nodes" and isinstance(argument.value, ast.Name)
    }


def with_split(block: ast.PromptsDef, share: float) -> ast.PromptsDef:
    """Return a block with the line `split 50%`, for a share of 50."""
    percent = ast.Percent(share, span=block.name.span)
    line = ast.SplitLine(percent, span=block.name.span)
    return replace(block, lines=(*block.lines, line))


def find_unsplit_blocks(tree: ast.File) -> dict[str, ast.PromptsDef]:
    """Return the blocks of prompts that don't divide their rows, by name."""
    return {
        statement.name.id: statement
        for statement in tree.statements
        if isinstance(statement, ast.PromptsDef)
        and not any(isinstance(line, ast.SplitLine) for line in statement.lines)
    }


def _block_of(circuit: ast.CircuitDef | ast.GroupDef) -> str | None:
    """Return the block that a circuit or a group is trained on, without a part or a run; None if
    its rows may be measured."""
    if circuit.source is None or circuit.source.name != "fit":
        return None
    given = {argument.name: argument.value for argument in circuit.source.arguments}
    rows = given.get("prompts")
    if "measure_on_training_rows" in given or not isinstance(rows, ast.Name):
        return None
    return rows.id


def _tested_blocks(
    experiment: ast.ExperimentDef, trained: Mapping[str, str], nodes: Mapping[str, str]
) -> set[str]:
    """Return the whole blocks of an experiment on which a circuit or group of it is trained.

    Args:
        trained: The block that each circuit or group is trained on, by its name.
        nodes: As in `_find_nodes`.
    """
    names = {node.id for node in walk(experiment) if isinstance(node, ast.Name)}
    names |= {node.of for node in walk(experiment) if isinstance(node, ast.RankedSelection)}
    names -= {node.name.id for node in walk(experiment) if isinstance(node, ast.For)}
    names |= {group for circuit, group in nodes.items() if circuit in names}
    uses = [
        statement for statement in experiment.statements if isinstance(statement, ast.UsePrompts)
    ]
    whole = {ref.name for use in uses for ref in use.prompts if ref.part is None}
    return {block for name, block in trained.items() if name in names} & whole


def _train_part(argument: ast.Argument) -> ast.Argument:
    if argument.name != "prompts" or not isinstance(argument.value, ast.Name):
        return argument
    part = ast.Attribute(argument.value.id, "train", span=argument.value.span)
    return replace(argument, value=part)


def _test_part(line: ast.Statement, blocks: Collection[str]) -> ast.Statement:
    if not isinstance(line, ast.UsePrompts):
        return line
    refs = tuple(
        replace(ref, part="test") if ref.part is None and ref.name in blocks else ref
        for ref in line.prompts
    )
    return replace(line, prompts=refs)


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
        given = {argument.name: argument.value for argument in basis.method.arguments}
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
        corruptions = {corruption.name for corruption in block.corruptions}
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
    objective = None if rows is None else _lower_objective(basis, rows, parts, scope)
    if objective is None:
        return None
    parts.objectives[basis.name] = objective
    return named_corruptions(objective, parts.prompts[objective.prompts])


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
    given = {argument.name: argument.value for argument in call.arguments}
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
            BadArgument(span=node.span, name=node.span.written, reason="isn't a measure", hint=hint)
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
        differentiated=trainer.differentiates(spec.call_constants(inner, parts.parameters)),
        trains=f"fit({inner.name}(…))",
        **_describe_scores(trainer),
    )


def _describe_scores(trainer: Trainer) -> dict[str, Any]:
    """Return how a training scores edges, as fields of its experiment."""
    if not isinstance(trainer, EdgeScoreTrainer):
        return {}
    return {
        "backward": trainer.backward,
        "gradient_path": trainer.path,
        "fixes_attention": trainer.fixes_attention,
        "drops_layers": trainer.drops_layers,
    }


def _are_known(at: ast.Positions, scope: Namespace) -> bool:
    """Whether positions are known before an experiment runs; E0207 otherwise."""
    ranked = next(
        (
            ranked_tokens
            for ranked_tokens in walk(at)
            if isinstance(ranked_tokens, ast.RankedTokens)
        ),
        None,
    )
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
    nodes = name_nodes(basis)
    if source is not None:
        return spec.Rule(span=span, verb=verb, site=basis.site, at=at, source=source, nodes=nodes)
    fills = (argument.value for argument in basis.method.arguments if argument.name == "with")
    fill = next(fills, ast.Name("zero", span=span))
    assert isinstance(fill, ast.Name)
    return spec.Rule(span=span, verb="ablate", site=basis.site, at=at, fill=fill, nodes=nodes)


def _source_run(node: ast.Node, block: spec.Prompts, scope: Namespace) -> str:
    """Return the run whose subspace comes in. Reports E0201 unless the block has it."""
    known = [corruption.name for corruption in block.corruptions]
    name = node.id if isinstance(node, ast.Name) else node.span.written
    if name not in known:
        listed = ", ".join(f"`{each}`" for each in known)
        hint = f"corruptions of `{block.name}` are {listed}"
        if not known:
            hint = f"add a corruption to `{block.name}`: `corrupt fewer {{ … }}`"
        hint = did_you_mean(name, known, hint)
        scope.diagnostics.append(UnknownName(span=node.span, kind="run", name=name, hint=hint))
    return name


# --- several seeds --------------------------------------------------------------------------------

SEEDS_DIFFER = "the experiment has another axis `seed`, with other values"
SEEDS_HINT = "write the same `seeds` and `seed` in each `fit`, and rename a `for` variable `seed`"
"""Problem where an experiment has two axes of seeds, and its hint."""


def constant_options(
    definition: spec.Basis, program: spec.Program | spec.Definitions
) -> dict[str, Constant]:
    """Return the constants of a call `fit(…)`, by option."""
    return {
        argument.name: value
        for argument in definition.method.arguments
        if argument.name is not None
        and (value := constant_value(argument.value, program.parameters)) is not None
    }


def list_seeds(definition: spec.Basis, program: spec.Program | spec.Definitions) -> tuple[int, ...]:
    """Return the seeds of `fit(…, seeds: 3)`: that of the training, and the next ones; none for a
    definition with one training, or for one of several."""
    if definition.seed is not None or BASIS_METHODS[definition.method.name].takes != "training":
        return ()
    options = constant_options(definition, program)
    first = int(options.get("seed", program.seed))
    return tuple(range(first, first + int(options.get("seeds", 0))))


def used_masks(experiment: spec.Experiment, program: spec.Program) -> list[spec.Basis]:
    """Return the trained groups that an experiment names anywhere, also in its directions and
    circuits."""
    names = set(_names(experiment)) if program.masks else set[tuple[str, bool]]()
    for direction in program.directions.values():
        if (direction.name, False) in names:
            names |= set(_names(direction))
    for circuit in program.circuits.values():
        if (circuit.name, False) in names:
            names |= set(_names((circuit.edges, circuit.nodes)))
    of_circuits = {name: name_nodes(mask) for name, mask in program.masks.items()}
    names |= {
        (nodes.id, False)
        for name, nodes in of_circuits.items()
        if nodes is not None and (name, False) in names
    }
    return [mask for name, mask in program.masks.items() if (name, mask.chooses_positions) in names]


def used_saved_groups(experiment: spec.Experiment, program: spec.Program) -> list[spec.Group]:
    """Return the trained groups that an experiment or its circuits read from files."""
    names = {name for name, _ in _names(experiment)}
    circuits = [circuit for circuit in program.circuits.values() if circuit.name in names]
    names |= {name for name, _ in _names(circuits)}
    groups = [
        group for group in program.groups.values() if group.candidates and group.name in names
    ]
    return [*groups, *used_saved_positions(experiment, program)]


def used_saved_positions(experiment: spec.Experiment, program: spec.Program) -> list[spec.Group]:
    """Return the trained groups of positions that an experiment reads from files."""
    if not program.positions:
        return []
    names = set(_names(experiment))
    return [position for position in program.positions.values() if (position.name, True) in names]


def _names(part: object) -> Iterator[tuple[str, bool]]:
    """Yield every name in a part of a program, and whether it names positions."""
    match part:
        case ast.Node():
            for node in walk(part):
                if isinstance(node, ast.Name):
                    yield node.id, False
                elif isinstance(node, ast.Index):
                    yield node.name, False
                elif isinstance(node, ast.RankedSelection):
                    yield node.of, False
                elif isinstance(node, ast.SpanTokens) and node.of.name is not None:
                    yield node.of.name, True
                elif isinstance(node, ast.ChosenTokens):
                    yield node.name, True
        case spec.Spec():
            if isinstance(part, spec.Rule):
                yield from ((name, False) for name, _ in part.read_groups)
            for name in spec.spec_fields(type(part)):
                yield from _names(getattr(part, name))
        case tuple() | list():
            for each in part:  # pyright: ignore[reportUnknownVariableType]
                yield from _names(each)  # pyright: ignore[reportUnknownArgumentType]
        case dict():
            yield from _names(list(part.values()))  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
        case _:
            pass


def split_by_seed(program: spec.Program, scope: Namespace) -> spec.Program:
    """Return a program with an experiment for each seed of the groups, circuits, lenses and probes
    that an experiment uses, and the experiment alone if none of them has several.

    Codes: E0108 for saved files, E0342 for different seeds.
    """
    experiments = [
        experiment
        for each in program.experiments
        for experiment in _at_each_seed(each, program, scope)
    ]
    return program.model_copy(update={"experiments": tuple(experiments)})


def _at_each_seed(
    experiment: spec.Experiment, program: spec.Program, scope: Namespace
) -> list[spec.Experiment]:
    bases = used_bases(experiment, program)
    read = [basis for basis in bases if _is_observed(basis)]
    chosen = [*used_masks(experiment, program), *read]
    named = next((basis for basis in chosen if list_seeds(basis, program)), None)
    if named is None:
        return [experiment]
    trained = map(declared_training, used_directions(experiment, program))
    every = [*chosen, *bases, *(basis for basis in trained if basis is not None)]
    seeds = list_seeds(named, program)
    loop = next((each for each in experiment.loops if each.name == SEED_AXIS), None)
    other = next((basis for basis in every if list_seeds(basis, program) not in ((), seeds)), None)
    if loop is not None or other is not None:
        reason = SEEDS_DIFFER
        if other is not None:
            reason = f"`{other.name}` and `{named.name}` are used together, with different seeds"
        span = named.method.span if other is None else other.method.span
        scope.diagnostics.append(BadBasis(span=span, reason=reason, hint=SEEDS_HINT))
        return [experiment]
    saves = [*experiment.saves, *experiment.saved_directions]
    if saves:
        what = f"a `save` in an experiment with `{named.name}`, which has several seeds,"
        later = f"declare one more {named.name} for it, with `seed: {seeds[0]}` instead of `seeds`"
        scope.diagnostics.append(NotSupported(span=saves[0].span, what=what, later=later))
        return [experiment]
    labels = ((*experiment.variant, (SEED_AXIS, seed)) for seed in seeds)
    return [experiment.model_copy(update={"variant": each, "seeds": seeds}) for each in labels]


def _is_observed(basis: spec.Basis) -> bool:
    """Whether a definition is that of a lens or a probe."""
    if BASIS_METHODS[basis.method.name].takes != "training":
        return False
    trainer = find_trainer(trainer_call(basis.method))
    return trainer is not None and trainer.declares in ("lens", "probe")


def select_seed(program: spec.Program, experiment: spec.Experiment) -> spec.Program:
    """Return a program with one training of each definition, that of the experiment's seed."""
    seed = dict(experiment.variant).get(SEED_AXIS)
    if not experiment.seeds:
        return program
    several = {"seed": seed}

    def of_seed(definition: spec.Basis) -> spec.Basis:
        has = list_seeds(definition, program)
        return definition.model_copy(update=several) if seed in has else definition

    def direction_of_seed(direction: spec.Direction) -> spec.Direction:
        training = declared_training(direction)
        has = () if training is None else list_seeds(training, program)
        return direction.model_copy(update=several) if seed in has else direction

    return program.model_copy(
        update={
            "bases": {name: of_seed(basis) for name, basis in program.bases.items()},
            "masks": {name: of_seed(mask) for name, mask in program.masks.items()},
            "directions": {
                n: direction_of_seed(direction) for n, direction in program.directions.items()
            },
        }
    )
