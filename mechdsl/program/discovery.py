"""`discover` and `search`: circuits and groups that an experiment chooses and tests.

`discover c over heads, mlps using eap_ig(steps: 5) top 20 edges` stands for a definition and a
rule. With `prompts ioi`, `from clean into abc` and `measure M as recovery`, they are `circuit c =
fit(eap_ig(steps: 5, size: 20), prompts: ioi, from: abc, maximise: M)` and `ablate all but c at
tokens * with abc`. For `kl`, `js`, `loss` and `rank`, `maximise` is `minimise`. The circuit has the
values of the run `clean`, all other edges those of `abc`, and the recovery of the measure is its
faithfulness: the experiment is `from abc into clean`, with `measure M as faithfulness`. As for
every circuit, the rows of a block without `split` are split.

`over heads, mlps, features of f` also stands for `group c_nodes = features * of f`; the training
then has `nodes: c_nodes`. `over heads, mlps, g` names the group `g` of neurons or features. With
several groups or dictionaries, `c_nodes` has all their sites. `over heads, mlps at P, Q` names the
positions of the training; the rule then is `ablate all but c at {P, Q} with abc`. `over vision`
names the edges of the vision encoder of prompts, as `stack: vision` does in the training.

`search greedy heads up to 3` stands for a definition and a change of the experiment's rule. With
`prompts fruit`, `ablate layer * head * at last token with zero` and `measure M as delta`, the
experiment `e` stands for `group e_heads = fit(forward_selection(size: 3), prompts: fruit, with:
zero, maximise: M) at layers * heads * at last token` and for an experiment with `ablate e_heads at
last token with zero`. As for a discovered circuit, one half of the rows chooses the group, and the
other half tests it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.syntax import BadArgument, UnknownName
from mechdsl.program.bases import NODES_EXAMPLE
from mechdsl.program.direction_methods import FILLS
from mechdsl.program.effect_trainers import NODE_EXAMPLE
from mechdsl.program.references import all_tokens, lists_positions
from mechdsl.program.spec import CLEAN
from mechdsl.program.trainers import TRAINERS, EdgeScoreTrainer, EdgeSearchTrainer
from mechdsl.program.trainings import DISCOVERED_SHARE, find_unsplit_blocks, with_split
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import rewrite

NODES = ("heads", "mlps")
"""What a circuit's edges connect: the candidates of every search."""

VISION = "vision"
"""Stands for the heads and MLPs of the vision encoder of prompts."""

SCORING_TRAINERS = (EdgeScoreTrainer, EdgeSearchTrainer)

RECOVERY, FAITHFULNESS = "recovery", "faithfulness"

LESS_IS_BETTER = ("kl", "js", "loss", "rank")
"""Metrics that a circuit lowers. A search keeps edges that raise any other one."""


class Discoveries(NamedTuple):
    """A file without `discover`."""

    tree: ast.File
    circuits: frozenset[str]
    """Names of the circuits that its experiments discover."""
    problems: list[Diagnostic]
    groups: frozenset[str]
    """Names of the groups whose sites another group has, which joins the nodes of a circuit."""


def expand_discoveries(tree: ast.File) -> Discoveries:
    """Replace each `discover` by the definition of its circuit and by the rule that tests it.

    A statement with an error, whose code is E0207, remains in its experiment. Its block is split
    nevertheless, so that other lines may name the parts.
    """
    defs = {
        statement.name.id: statement
        for statement in tree.statements
        if isinstance(statement, ast.PromptsDef)
    }
    unsplit = find_unsplit_blocks(tree).keys()
    metrics = {
        statement.name.id: statement.value
        for statement in tree.statements
        if isinstance(statement, ast.MetricDef)
    }
    imports = any(isinstance(statement, ast.Use) for statement in tree.statements)
    groups = {
        statement.name.id: statement
        for statement in tree.statements
        if isinstance(statement, ast.GroupDef)
    }
    names: set[str] = set()
    joined: set[str] = set()
    wrongly_tested: set[str] = set()
    problems: list[Diagnostic] = []
    definitions: list[ast.TopLevel] = []
    for statement in tree.statements:
        if not isinstance(statement, ast.ExperimentDef):
            definitions.append(statement)
            continue
        due = [line for line in statement.statements if isinstance(line, ast.Discover)]
        wrong = list(_problems(statement, due, groups, imports=imports)) if due else []
        problems += wrong
        if due and not wrong and may_exist(statement, defs, imports=imports):
            names.add(due[0].what.id)
            joined |= {name.id for name in _named_groups(due[0])}
            definitions += _expanded(statement, due[0], unsplit, metrics, groups)
        else:
            definitions.append(statement)
        if wrong:
            wrongly_tested |= unsplit & list_blocks(statement)
    statements = tuple(split_blocks(definitions, wrongly_tested))
    return Discoveries(
        replace(tree, statements=statements), frozenset(names), problems, frozenset(joined)
    )


def list_blocks(experiment: ast.ExperimentDef) -> set[str]:
    """Return the names of an experiment's blocks of prompts."""
    uses = (
        statement for statement in experiment.statements if isinstance(statement, ast.UsePrompts)
    )
    return {prompt.name for use in uses for prompt in use.prompts}


def split_blocks(
    statements: Iterable[ast.TopLevel], names: Collection[str]
) -> Iterator[ast.TopLevel]:
    """Yield statements with blocks of some names split as for a circuit, so that other lines may
    name the parts."""
    for statement in statements:
        if isinstance(statement, ast.PromptsDef) and statement.name.id in names:
            yield with_split(statement, DISCOVERED_SHARE)
        else:
            yield statement


def _expanded(
    experiment: ast.ExperimentDef,
    line: ast.Discover,
    unsplit: Collection[str],
    metrics: Mapping[str, ast.Expr],
    groups: Mapping[str, ast.GroupDef],
) -> Iterator[ast.TopLevel]:
    """Yield the definition of the circuit, and the experiment that tests it.

    Args:
        unsplit: Blocks that aren't split yet.
        metrics: Metrics that the file defines.
        groups: Groups that the file defines.
    """
    [into] = (
        statement for statement in experiment.statements if isinstance(statement, ast.FromInto)
    )
    [use] = (
        statement for statement in experiment.statements if isinstance(statement, ast.UsePrompts)
    )
    metric = next(
        statement.metric
        for statement in experiment.statements
        if isinstance(statement, ast.Measure)
    )
    span, other = line.span, into.bases[0]
    rows, tested = divide_rows(use, unsplit)
    arguments = [
        ast.Argument(None, _method(line), span=line.using.span),
        ast.Argument("prompts", rows, span=rows.span),
        ast.Argument("from", ast.Name(other.name, span=other.span), span=other.span),
        ast.Argument(_aim(metric, metrics), metric, span=metric.span),
    ]
    if use.limit is not None:
        arguments.append(ast.Argument("limit", amount_of(use.limit, use), span=use.span))
    nodes, group = _further_nodes(line, groups)
    if group is not None:
        yield group
    if nodes is not None:
        arguments.append(ast.Argument("nodes", nodes, span=nodes.span))
    if _is_in_vision(line):
        span_of_stack = line.over[0].span
        stack = ast.Name(VISION, span=span_of_stack)
        arguments.append(ast.Argument("stack", stack, span=span_of_stack))
    fit = ast.Call("fit", tuple(arguments), span=span)
    yield ast.CircuitDef(line.what, source=fit, at=line.at, span=span)
    site = ast.Site((line.what,), span=span)
    fill = ast.Name(other.name, span=other.span)
    at = all_tokens() if line.at is None else _joined(line.at)
    rule = ast.Rule(ast.Ablate(site, at, fill, all_but=True, span=span), span=span)
    changed = {id(line): rule, id(into): _swapped(into), id(use): tested}
    lines = (
        changed.get(id(statement)) or _with_faithfulness(statement)
        for statement in experiment.statements
    )
    yield replace(experiment, statements=tuple(lines))


def _joined(at: ast.Positions) -> ast.Positions:
    """Return the tokens of all positions as one position."""
    if len(at.items) == 1:
        return at
    point = ast.Point(ast.PositionUnion(at, span=at.span), span=at.span)
    return ast.Positions((ast.Position(point, span=at.span),), span=at.span)


def _further_nodes(
    line: ast.Discover, groups: Mapping[str, ast.GroupDef]
) -> tuple[ast.Name | None, ast.GroupDef | None]:
    """Return the name of the group of neurons or features that are nodes, and the definition of
    this group if the statement names dictionaries or several groups."""
    further = _list_further(line)
    if not further:
        return None, None
    if len(further) == 1 and isinstance(further[0], ast.Name):
        return further[0], None
    sites: list[ast.Site] = []
    for each in further:
        if isinstance(each, ast.Name):
            sites += groups[each.id].sites
            continue
        star = ast.Star(span=each.span)
        every = ast.Axis("feature", True, (star,), of=each.basis.id, span=each.span)
        sites.append(ast.Site((), (every,), span=each.span))
    span = further[0].span if len(further) == 1 else line.what.span
    name = ast.Name(f"{line.what.id}_nodes", span=span)
    return name, ast.GroupDef(name, tuple(sites), span=line.span)


def _list_further(line: ast.Discover) -> list[ast.Name | ast.FeaturesOf]:
    """Return the groups and dictionaries whose neurons or features are nodes."""
    every = () if _is_in_vision(line) else line.over
    return [each for each in every if not isinstance(each, ast.Name) or each.id not in NODES]


def _is_in_vision(line: ast.Discover) -> bool:
    """Return whether a statement chooses from the edges of the vision encoder."""
    return [name.id if isinstance(name, ast.Name) else "" for name in line.over] == [VISION]


def _named_groups(line: ast.Discover) -> list[ast.Name]:
    """Return the names of the groups that are nodes."""
    return [name for name in _list_further(line) if isinstance(name, ast.Name)]


def _aim(metric: ast.Expr, metrics: Mapping[str, ast.Expr]) -> str:
    """Return the argument of the training that has the metric."""
    name = _metric_name(metric)
    if name in metrics:
        name = _metric_name(metrics[name])
    return "minimise" if name in LESS_IS_BETTER else "maximise"


def _metric_name(metric: ast.Expr) -> str:
    if isinstance(metric, ast.Call):
        return metric.name
    return metric.id if isinstance(metric, ast.Name) else ""


def divide_rows(
    use: ast.UsePrompts, unsplit: Collection[str]
) -> tuple[ast.Name | ast.Attribute, ast.UsePrompts]:
    """Return the rows of a training, and the line of the experiment with the rows of its test.

    unsplit: blocks that aren't split yet, whose parts `split_rows_of_circuits` names.
    """
    block = use.prompts[0]
    if block.name in unsplit:
        return ast.Name(block.name, span=block.span), use
    rows = ast.Attribute(block.name, "train", span=block.span)
    return rows, replace(use, prompts=(replace(block, part="test"),))


def _swapped(into: ast.FromInto) -> ast.FromInto:
    """Return the runs of an experiment whose rule ablates what isn't in the circuit."""
    return replace(into, sources=into.bases, bases=into.sources)


def _with_faithfulness(line: ast.Statement) -> ast.Statement:
    """Return a line that names faithfulness where it named recovery."""

    def renamed(node: ast.Node) -> ast.Node:
        is_effect = isinstance(node, ast.Name) and node.id == RECOVERY
        return replace(node, id=FAITHFULNESS) if is_effect else node

    is_read = isinstance(line, ast.Measure | ast.Expect | ast.Report)
    return rewrite(line, renamed) if is_read else line


def _method(line: ast.Discover) -> ast.Call:
    """Return the trainer with the size of the circuit."""
    made = _call(line)
    if line.until is not None:
        assert isinstance(line.until, ast.Compare)
        name, value = FAITHFULNESS, line.until.right
    elif line.top is not None:
        name, value = "size", amount_of(line.top, line)
    else:
        return made
    more = ast.Argument(name, value, span=line.span)
    return replace(made, arguments=(*made.arguments, more))


def _call(line: ast.Discover) -> ast.Call:
    name = line.using
    return ast.Call(name.id, (), span=name.span) if isinstance(name, ast.Name) else name


def amount_of(amount: int | str, of: ast.Node) -> ast.Number | ast.Name:
    """Return a count, or the parameter that has it."""
    if isinstance(amount, str):
        return ast.Name(amount, span=of.span)
    return ast.Number(amount, span=of.span)


def _problems(
    experiment: ast.ExperimentDef,
    due: Sequence[ast.Discover],
    groups: Mapping[str, ast.GroupDef],
    *,
    imports: bool,
) -> Iterator[Diagnostic]:
    """Yield E0207 for what keeps an experiment from discovering a circuit.

    Args:
        groups: Groups that the file defines.
        imports: Whether imported files may define others.
    """
    line = due[0]
    for more in due[1:]:
        yield _wrong(more, "is the second one of its experiment", "write an experiment for each")
    for statement in experiment.statements:
        if isinstance(statement, ast.Rule | ast.For | ast.Using | ast.Generate | ast.Search):
            reason = "tests its circuit alone, without further rules, loops or replies"
            hint = f"move this line to another experiment, which may use `{line.what.id}` too"
            yield _wrong(statement, reason, hint)
    yield from _candidate_problems(line, groups, imports=imports)
    yield from _size_problems(line)
    yield from _run_problems(experiment, line)
    yield from _effect_problems(experiment, line)


def _candidate_problems(
    line: ast.Discover, groups: Mapping[str, ast.GroupDef], *, imports: bool
) -> Iterator[Diagnostic]:
    if _is_in_vision(line):
        return
    further, named = _list_further(line), _named_groups(line)
    for each in named:
        if not imports and each.id not in groups:
            reason = f"can't use `{each.id}`: it is neither a type of node nor a group of the file"
            hint = f"define a group, such as {NODES_EXAMPLE}, or write `features of f`; to choose "
            hint = did_you_mean(
                each.id, [*NODES, VISION, *groups], f"{hint}nodes instead of edges: {NODE_EXAMPLE}"
            )
            if each.id == VISION:
                hint = "write `over vision` alone, for the heads and MLPs of the vision encoder"
            yield _wrong(each, reason, hint)
            return
    if len(line.over) - len(further) < len(NODES):
        reason = "always chooses from the edges of heads and MLPs, the embedding and the logits"
        more = "".join(f", {each.span.written}" for each in further)
        yield _wrong(line.over[0], reason, f"write `over heads, mlps{more}`")
    for each in named if len(further) > 1 else ():
        if each.id not in groups or groups[each.id].source is not None:
            name = each.span.written
            reason = f"joins `{name}` with other nodes, and this file doesn't list its sites"
            hint = f"write `over heads, mlps, {name}`, or list the sites in a group of this file: "
            hint += "`group g = L0N3, features 3, 12 of f`"
            yield _wrong(each, reason, hint)
    written = [each.span.written for each in line.over]
    if len(set(written)) < len(written):
        twice = next(each for n, each in enumerate(line.over) if written[n] in written[:n])
        yield _wrong(twice, f"names `{twice.span.written}` twice", "remove one of them")
    if line.unit is not None and line.unit.id != "edges":
        hint = f"write `top {line.top} edges`; for a number of nodes, fit a group: {NODE_EXAMPLE}"
        yield _wrong(line.unit, "counts edges", hint)


def _size_problems(line: ast.Discover) -> Iterator[Diagnostic]:
    until, call = line.until, _call(line)
    if until is not None and not _is_faithfulness(until):
        hint = "write `until faithfulness > 0.9`, for example, or `top 20 edges`"
        yield _wrong(until, "ends when `faithfulness` exceeds a number", hint)
    trainer = TRAINERS.get(call.name)
    if trainer is None:  # an unknown name, which the definition reports
        return
    if not isinstance(trainer, SCORING_TRAINERS):
        known = (each for each, own in TRAINERS.items() if isinstance(own, SCORING_TRAINERS))
        hint = f"write one of {name_list(sorted(known))}"
        yield _wrong(line.using, "finds edges by scores or by a search", hint)
        return
    size = FAITHFULNESS if until is not None else "size" if line.top is not None else None
    given = [
        argument.name for argument in call.arguments if argument.name in ("size", FAITHFULNESS)
    ]
    if size is not None and given:
        reason = f"has two sizes, `{given[0]}: …` and that after the call"
        yield _wrong(line.using, reason, "remove one of them")
    elif size is not None and size not in trainer.options:
        if until is not None and "size" in trainer.options:
            hint = f"write `top 20 edges` instead of `until {until.span.written}`"
            yield _wrong(until, f"needs a number of edges for `{call.name}`", hint)
            return
        ends = f"top {line.top} edges" if until is None else f"until {until.span.written}"
        hint = f"remove `{ends}`; another experiment can ablate `all but top 10 of {line.what.id}`"
        yield _wrong(line, f"leaves the number of edges to `{trainer.example}`", hint)


def _is_faithfulness(until: ast.Expr) -> bool:
    """Whether a condition is `faithfulness > 0.9`."""
    return (
        isinstance(until, ast.Compare)
        and until.operator == ">"
        and isinstance(until.left, ast.Name)
        and until.left.id == FAITHFULNESS
        and isinstance(until.right, ast.Number | ast.Name)
    )


def _run_problems(experiment: ast.ExperimentDef, line: ast.Discover) -> Iterator[Diagnostic]:
    runs = [statement for statement in experiment.statements if isinstance(statement, ast.FromInto)]
    if not runs:
        reason = "needs a run whose values the edges outside of the circuit have"
        yield _wrong(line, reason, f"add a line such as `from {CLEAN} into fewer`")
    derived = {
        statement.name.id
        for statement in experiment.statements
        if isinstance(statement, ast.RunDef)
    }
    for run in runs:
        names = [ref.whole for ref in (*run.sources, *run.bases)]
        if len(names) != 2 or run.shuffled is not None or names[0] != CLEAN or names[1] in derived:
            reason = f"gives the circuit the values of `{CLEAN}`, and other edges those of one run"
            other = next((name for name in names if name not in {CLEAN, *derived}), "fewer")
            yield _wrong(run, reason, f"write `from {CLEAN} into {other}`")
    if not any(isinstance(statement, ast.UsePrompts) for statement in experiment.statements):
        reason = "needs the prompts that the circuit is chosen on"
        yield _wrong(line, reason, "add a line such as `prompts fruit`")
    for use, reason, hint in find_undivided(experiment, "circuit"):
        yield _wrong(use, reason, hint)


def find_undivided(
    experiment: ast.ExperimentDef, chosen: str
) -> Iterator[tuple[ast.UsePrompts, str, str]]:
    """Yield each line of prompts whose rows can't be divided, with the reason and the fix.

    chosen: `circuit` or `group`.
    """
    for statement in experiment.statements:
        if not isinstance(statement, ast.UsePrompts):
            continue
        if (
            len(statement.prompts) != 1
            or statement.replies is not None
            or statement.prompts[0].part is not None
        ):
            reason = f"divides the rows of one block: some choose the {chosen}, the others test it"
            yield statement, reason, f"write `prompts {statement.prompts[0].name}`"


def may_exist(
    experiment: ast.ExperimentDef, blocks: Mapping[str, ast.PromptsDef], *, imports: bool
) -> bool:
    """Whether the block and the runs of an experiment may exist. Their own lines report a misspelt
    one.

    imports: whether the file imports others, which may have the block.
    """
    use = next(
        statement for statement in experiment.statements if isinstance(statement, ast.UsePrompts)
    )
    into = (statement for statement in experiment.statements if isinstance(statement, ast.FromInto))
    runs = {ref.name for each in into for ref in (*each.sources, *each.bases)} - {CLEAN}
    block = blocks.get(use.prompts[0].name)
    if block is None:
        return imports
    return runs <= {line.name.id for line in block.lines if isinstance(line, ast.Corrupt)}


def _effect_problems(experiment: ast.ExperimentDef, line: ast.Discover) -> Iterator[Diagnostic]:
    measures = [
        statement for statement in experiment.statements if isinstance(statement, ast.Measure)
    ]
    if not measures:
        reason = "needs a measure that the circuit explains"
        hint = "add one, for example `measure logit(answer) - logit(wrong) as recovery`"
        yield _wrong(line, reason, hint)
    for measure in measures[:1]:
        where = measure.at or measure.per or measure.over
        if where is not None:
            reason = "chooses its circuit by a measure at the last token"
            yield _wrong(where, reason, "name no position, variable or axis in the first measure")
    for measure in measures:
        if measure.effect.id not in (RECOVERY, FAITHFULNESS, "raw"):
            reason = "tests its circuit by its faithfulness, the recovery of the measure"
            yield _wrong(
                measure.effect, reason, "write `as recovery`, `as faithfulness` or `as raw`"
            )


def _wrong(node: ast.Node, reason: str, hint: str) -> Diagnostic:
    return BadArgument(span=node.span, name="discover", reason=reason, hint=hint)


METHOD, TRAINER = "greedy", "forward_selection"

AXES: Mapping[str, ast.AxisWord] = {
    "heads": "head",
    "neurons": "neuron",
    "features": "feature",
    "dims": "dim",
    "mlps": "layer",
    "layers": "layer",
}
"""Word for the candidates of a search → the last axis of its rule."""

EXAMPLES = {
    "heads": "layer * head *",
    "neurons": "mlp_hidden layer 2 neuron *",
    "features": "feature * of f",
    "dims": "resid_post layer 2 dim *",
    "mlps": "mlp_out layer *",
    "layers": "resid_post layer *",
}
"""Word for the candidates of a search → the sites of a rule."""

MAXIMISED = ("delta", "raw")
"""Effects that are largest where the measure is."""


class Searches(NamedTuple):
    """A file without `search`."""

    tree: ast.File
    groups: frozenset[str]
    """Names of the groups that its experiments search for."""
    problems: list[Diagnostic]


def expand_searches(tree: ast.File) -> Searches:
    """Replace each `search` by the definition of its group, and test the group.

    A statement with an error, whose code is E0207 or E0201, remains in its experiment. Its block is
    split nevertheless, so that other lines may name the parts.
    """
    blocks = {
        statement.name.id: statement
        for statement in tree.statements
        if isinstance(statement, ast.PromptsDef)
    }
    unsplit = find_unsplit_blocks(tree).keys()
    imports = any(isinstance(statement, ast.Use) for statement in tree.statements)
    names: set[str] = set()
    wrongly_tested: set[str] = set()
    problems: list[Diagnostic] = []
    definitions: list[ast.TopLevel] = []
    for statement in tree.statements:
        due = _searches_of(statement) if isinstance(statement, ast.ExperimentDef) else []
        if not isinstance(statement, ast.ExperimentDef) or not due:
            definitions.append(statement)
            continue
        lacks_rule = _lost_its_rule(statement, tree)
        wrong = [
            *_search_problems(statement, due, lacks_rule=lacks_rule),
            *_unknown_sizes(due, tree),
        ]
        problems += wrong
        if wrong or lacks_rule:
            wrongly_tested |= unsplit & list_blocks(statement)
        if (
            not (wrong or lacks_rule)
            and _is_complete(statement)
            and may_exist(statement, blocks, imports=imports)
        ):
            group, statement = _expand_search(statement, due[0], unsplit)
            names.add(group.name.id)
            definitions.append(group)
        definitions.append(statement)
    statements = tuple(split_blocks(definitions, wrongly_tested))
    return Searches(replace(tree, statements=statements), frozenset(names), problems)


def _searches_of(experiment: ast.ExperimentDef) -> list[ast.Search]:
    return [statement for statement in experiment.statements if isinstance(statement, ast.Search)]


def _lost_its_rule(experiment: ast.ExperimentDef, tree: ast.File) -> bool:
    """Whether an experiment has no rule, and lines that can't be parsed."""
    if any(isinstance(statement, ast.Rule) for statement in experiment.statements):
        return False
    span = experiment.span
    return any(span.start <= lost.span.start < span.end for lost in tree.lost)


def _expand_search(
    experiment: ast.ExperimentDef, line: ast.Search, unsplit: Collection[str]
) -> tuple[ast.GroupDef, ast.ExperimentDef]:
    """Return the definition of the group, and the experiment that tests it.

    Args:
        unsplit: Blocks that aren't split yet.
    """
    [use] = (each for each in experiment.statements if isinstance(each, ast.UsePrompts))
    [rule] = (each for each in experiment.statements if isinstance(each, ast.Rule))
    metric = next(each.metric for each in experiment.statements if isinstance(each, ast.Measure))
    body, span = rule.body, line.span
    assert isinstance(body, ast.Ablate | ast.Patch)
    rows, tested = divide_rows(use, unsplit)
    size = ast.Argument("size", amount_of(line.up_to, line), span=span)
    arguments = [
        ast.Argument(None, ast.Call(TRAINER, (size,), span=span), span=span),
        ast.Argument("prompts", rows, span=rows.span),
        _other_values(experiment, body),
        ast.Argument("maximise", metric, span=metric.span),
    ]
    if use.limit is not None:
        arguments.append(ast.Argument("limit", amount_of(use.limit, use), span=use.span))
    name = ast.Name(_name(experiment, line), span=line.what.span)
    fit = ast.Call("fit", tuple(arguments), span=span)
    sites = replace(body.site, axes=tuple(replace(own, plural=True) for own in body.site.axes))
    group = ast.GroupDef(name, source=fit, site=sites, at=body.at, span=span)
    site = ast.Site((name,), span=body.site.span)
    changed = {id(use): tested, id(rule): replace(rule, body=replace(body, site=site))}
    lines = (changed.get(id(each), each) for each in experiment.statements if each is not line)
    return group, replace(experiment, statements=tuple(lines))


def _other_values(experiment: ast.ExperimentDef, body: ast.Ablate | ast.Patch) -> ast.Argument:
    """Return the argument with the values that the group gets: a fill, or those of a run."""
    if isinstance(body, ast.Ablate):
        return ast.Argument("with", body.fill, span=body.fill.span)
    [into] = (
        statement for statement in experiment.statements if isinstance(statement, ast.FromInto)
    )
    run = into.sources[0]
    return ast.Argument("from", ast.Name(run.name, span=run.span), span=run.span)


# --- errors ---------------------------------------------------------------------------------------


def _search_problems(
    experiment: ast.ExperimentDef, due: Sequence[ast.Search], *, lacks_rule: bool
) -> Iterator[Diagnostic]:
    """Yield E0207 for what keeps an experiment from searching for a group.

    Args:
        lacks_rule: Whether its rule is a line that can't be parsed.
    """
    line = due[0]
    for more in due[1:]:
        yield _bad_line(more, "is the second one of its experiment", "write an experiment for each")
    if line.how.id != METHOD:
        hint = did_you_mean(line.how.id, (METHOD,), f"write `search {METHOD} heads up to 3`")
        yield _bad_line(line.how, f"has no method `{line.how.id}`", hint)
    if line.up_to == 0:
        yield _bad_line(line, "adds at least one of its candidates", "write `up to 3`, for example")
    if line.what.id not in AXES:
        hint = did_you_mean(line.what.id, AXES, f"write one of {name_list(AXES)}")
        yield _bad_line(line.what, f"has no candidates `{line.what.id}`", hint)
        return
    for each in experiment.statements:
        if isinstance(each, ast.For | ast.Using | ast.Generate | ast.RunDef | ast.Discover):
            reason = "tests its group alone, without loops, estimates, replies or derived runs"
            hint = (
                f"move this line to another experiment, which may use `{_name(experiment, line)}`"
            )
            yield _bad_line(each, reason, hint)
    rules = [each for each in experiment.statements if isinstance(each, ast.Rule)]
    if len(rules) != 1 and not lacks_rule:
        reason = "needs one rule, which it tries on each candidate"
        example = f"`ablate {EXAMPLES[line.what.id]} at last token with zero`"
        hint = "keep one of them" if rules else f"add a line such as {example}"
        yield _bad_line(rules[1] if rules else line, reason, hint)
    for rule in rules[:1]:
        yield from _rule_problems(rule, line)
    yield from _search_run_problems(experiment)
    yield from _measure_problems(experiment, line)


def _unknown_sizes(due: Sequence[ast.Search], tree: ast.File) -> Iterator[Diagnostic]:
    """Yield E0201 for sizes that no parameter has; imported files may have some."""
    known = [statement.name.id for statement in tree.statements if isinstance(statement, ast.Param)]
    if any(isinstance(statement, ast.Use) for statement in tree.statements):
        return
    for line in due:
        if isinstance(line.up_to, str) and line.up_to not in known:
            hint = did_you_mean(line.up_to, known, f"add `param {line.up_to} = 3`")
            yield UnknownName(span=line.span, kind="param", name=line.up_to, hint=hint)


def _name(experiment: ast.ExperimentDef, line: ast.Search) -> str:
    return f"{experiment.name.id}_{line.what.id}"


def _rule_problems(rule: ast.Rule, line: ast.Search) -> Iterator[Diagnostic]:
    """Yield the problems with the rule that a search tries on each candidate."""
    body, what = rule.body, line.what.id
    if not isinstance(body, ast.Ablate | ast.Patch):
        hint = f"write `ablate {EXAMPLES[what]} at last token with zero`, for example"
        yield _bad_line(rule, "tries the rules `ablate` and `patch`", hint)
        return
    further: list[object] = [rule.during, rule.drops_error]
    if isinstance(body, ast.Patch):
        further += [body.onto, body.into_layer, body.source, body.features]
    else:
        further += [body.by, body.more, body.all_but, body.without_edge]
    if any(further):
        reason = "tries a rule without further clauses"
        hint = "write `patch SITE at POSITION`, or `ablate SITE at POSITION with zero`"
        yield _bad_line(rule, reason, hint)
    if isinstance(body, ast.Ablate) and body.fill.span.written not in FILLS:
        yield _bad_line(body.fill, "writes zero or a mean", "write `with zero` or `with mean`")
    if lists_positions(body.at):
        reason = "tries its rule at one position"
        yield _bad_line(body.at, reason, "name one position, or join some: `{A, B}`")
    axes = body.site.axes
    wrong = not axes or axes[-1].word != AXES[what]
    named = {name.id for name in body.site.names}
    if wrong or (what == "mlps" and "mlp_out" not in named):
        hint = f"write `{EXAMPLES[what]}`, for example"
        candidates = [name for name, word in AXES.items() if axes and word == axes[-1].word]
        if candidates:
            hint += f", or `search {METHOD} {candidates[-1]} …`"
        yield _bad_line(body.site, f"adds {what}, and the rule has no axis over them", hint)
        return
    for axis in axes:
        if axis.plural:
            one = f"{axis.word} {axis.span.written.split(maxsplit=1)[-1]}"
            reason = f"tries its rule on each {AXES[what]}, but `{axis.span.written}` is one site"
            yield _bad_line(axis, reason, f"write `{one}`")
        elif axis.window is not None:
            yield _bad_line(axis, "chooses single sites, not windows", "remove `window`")


def _is_complete(experiment: ast.ExperimentDef) -> bool:
    """Whether an experiment has prompts, and a source if it patches; otherwise, other diagnostics
    report the lack."""
    kinds = {type(statement) for statement in experiment.statements}
    rules = (statement for statement in experiment.statements if isinstance(statement, ast.Rule))
    patches = any(isinstance(rule.body, ast.Patch) for rule in rules)
    return ast.UsePrompts in kinds and (ast.FromInto in kinds or not patches)


def _search_run_problems(experiment: ast.ExperimentDef) -> Iterator[Diagnostic]:
    """Yield the problems with the runs and the rows of a search."""
    runs = [each for each in experiment.statements if isinstance(each, ast.FromInto)]
    for each in runs:
        sources, bases = ([own.whole for own in side] for side in (each.sources, each.bases))
        if len(sources) != 1 or bases != [CLEAN] or each.shuffled is not None or sources == bases:
            other = next((name for name in [*sources, *bases] if name != CLEAN), "fewer")
            reason = f"tries its rule in the run `{CLEAN}`, with the values of one other run"
            yield _bad_line(each, reason, f"write `from {other} into {CLEAN}`")
    for use, reason, hint in find_undivided(experiment, "group"):
        yield _bad_line(use, reason, hint)


def _measure_problems(experiment: ast.ExperimentDef, line: ast.Search) -> Iterator[Diagnostic]:
    """Yield the problems with the measure that a search maximises."""
    measures = [
        statement for statement in experiment.statements if isinstance(statement, ast.Measure)
    ]
    if not measures:
        reason = "needs a measure, whose first one it maximises"
        yield _bad_line(line, reason, "add one, for example `measure kl(clean) as raw`")
    for measure in measures[:1]:
        where = measure.at or measure.per or measure.over
        if where is not None:
            reason = "maximises a measure at the last token"
            yield _bad_line(
                where, reason, "name no position, variable or axis in the first measure"
            )
        if measure.effect.id not in MAXIMISED:
            reason = f"maximises the first measure, so it can't be `as {measure.effect.id}`"
            hint = "write `as delta` or `as raw`; negate a measure that the group should lower"
            yield _bad_line(measure.effect, reason, hint)


def _bad_line(node: ast.Node, reason: str, hint: str) -> Diagnostic:
    return BadArgument(span=node.span, name="search", reason=reason, hint=hint)
