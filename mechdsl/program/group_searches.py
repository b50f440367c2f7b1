"""`search greedy heads up to 3`: a group that an experiment searches for and tests.

The statement stands for a definition and a change of the experiment's rule. With `prompts fruit`,
`ablate layer * head * at last token with zero` and `measure M as delta`, the experiment `e` stands
for `group e_heads = fit(forward_selection(size: 3), prompts: fruit, with: zero, maximise: M) at
layers * heads * at last token` and for an experiment with `ablate e_heads at last token with zero`.
As for a discovered circuit, the rows of a block without `split` are split: one half chooses the
group, and the other half tests it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.names import BadArgument, UnknownName
from mechdsl.program.basis_methods import FILLS
from mechdsl.program.discovery import (
    amount_of,
    divide_rows,
    find_undivided,
    list_blocks,
    may_exist,
    split_blocks,
)
from mechdsl.program.references import lists_positions
from mechdsl.program.spec import CLEAN
from mechdsl.program.trainings import find_unsplit_blocks
from mechdsl.syntax import ast

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
    blocks = {each.name.id: each for each in tree.statements if isinstance(each, ast.PromptsDef)}
    unsplit = find_unsplit_blocks(tree).keys()
    imports = any(isinstance(each, ast.Use) for each in tree.statements)
    names: set[str] = set()
    wrongly_tested: set[str] = set()
    problems: list[Diagnostic] = []
    found: list[ast.TopLevel] = []
    for each in tree.statements:
        due = _searches_of(each) if isinstance(each, ast.ExperimentDef) else []
        if not isinstance(each, ast.ExperimentDef) or not due:
            found.append(each)
            continue
        lacks_rule = _lost_its_rule(each, tree)
        wrong = [*_problems(each, due, lacks_rule=lacks_rule), *_unknown_sizes(due, tree)]
        problems += wrong
        if wrong or lacks_rule:
            wrongly_tested |= unsplit & list_blocks(each)
        if (
            not (wrong or lacks_rule)
            and _is_complete(each)
            and may_exist(each, blocks, imports=imports)
        ):
            group, each = _expanded(each, due[0], unsplit)
            names.add(group.name.id)
            found.append(group)
        found.append(each)
    statements = tuple(split_blocks(found, wrongly_tested))
    return Searches(replace(tree, statements=statements), frozenset(names), problems)


def _searches_of(experiment: ast.ExperimentDef) -> list[ast.Search]:
    return [each for each in experiment.statements if isinstance(each, ast.Search)]


def _lost_its_rule(experiment: ast.ExperimentDef, tree: ast.File) -> bool:
    """Whether an experiment has no rule, and lines that can't be parsed."""
    if any(isinstance(each, ast.Rule) for each in experiment.statements):
        return False
    span = experiment.span
    return any(span.start <= lost.span.start < span.end for lost in tree.lost)


def _expanded(
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
    [into] = (each for each in experiment.statements if isinstance(each, ast.FromInto))
    run = into.sources[0]
    return ast.Argument("from", ast.Name(run.name, span=run.span), span=run.span)


# --- errors ---------------------------------------------------------------------------------------


def _problems(
    experiment: ast.ExperimentDef, due: Sequence[ast.Search], *, lacks_rule: bool
) -> Iterator[Diagnostic]:
    """Yield E0207 for what keeps an experiment from searching for a group.

    Args:
        lacks_rule: Whether its rule is a line that can't be parsed.
    """
    line = due[0]
    for more in due[1:]:
        yield _wrong(more, "is the second one of its experiment", "write an experiment for each")
    if line.how.id != METHOD:
        hint = did_you_mean(line.how.id, (METHOD,), f"write `search {METHOD} heads up to 3`")
        yield _wrong(line.how, f"has no method `{line.how.id}`", hint)
    if line.up_to == 0:
        yield _wrong(line, "adds at least one of its candidates", "write `up to 3`, for example")
    if line.what.id not in AXES:
        hint = did_you_mean(line.what.id, AXES, f"write one of {name_list(AXES)}")
        yield _wrong(line.what, f"has no candidates `{line.what.id}`", hint)
        return
    for each in experiment.statements:
        if isinstance(each, ast.For | ast.Using | ast.Generate | ast.RunDef | ast.Discover):
            reason = "tests its group alone, without loops, estimates, replies or derived runs"
            hint = (
                f"move this line to another experiment, which may use `{_name(experiment, line)}`"
            )
            yield _wrong(each, reason, hint)
    rules = [each for each in experiment.statements if isinstance(each, ast.Rule)]
    if len(rules) != 1 and not lacks_rule:
        reason = "needs one rule, which it tries on each candidate"
        example = f"`ablate {EXAMPLES[line.what.id]} at last token with zero`"
        hint = "keep one of them" if rules else f"add a line such as {example}"
        yield _wrong(rules[1] if rules else line, reason, hint)
    for rule in rules[:1]:
        yield from _rule_problems(rule, line)
    yield from _run_problems(experiment)
    yield from _measure_problems(experiment, line)


def _unknown_sizes(due: Sequence[ast.Search], tree: ast.File) -> Iterator[Diagnostic]:
    """Yield E0201 for sizes that no parameter has; imported files may have some."""
    known = [each.name.id for each in tree.statements if isinstance(each, ast.Param)]
    if any(isinstance(each, ast.Use) for each in tree.statements):
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
        yield _wrong(rule, "tries the rules `ablate` and `patch`", hint)
        return
    further: list[object] = [rule.during, rule.drops_error]
    if isinstance(body, ast.Patch):
        further += [body.onto, body.into_layer, body.source, body.features]
    else:
        further += [body.by, body.more, body.all_but, body.without_edge]
    if any(further):
        reason = "tries a rule without further clauses"
        hint = "write `patch SITE at POSITION`, or `ablate SITE at POSITION with zero`"
        yield _wrong(rule, reason, hint)
    if isinstance(body, ast.Ablate) and body.fill.span.written not in FILLS:
        yield _wrong(body.fill, "writes zero or a mean", "write `with zero` or `with mean`")
    if lists_positions(body.at):
        reason = "tries its rule at one position"
        yield _wrong(body.at, reason, "name one position, or join some: `{A, B}`")
    axes = body.site.axes
    wrong = not axes or axes[-1].word != AXES[what]
    named = {each.id for each in body.site.names}
    if wrong or (what == "mlps" and "mlp_out" not in named):
        hint = f"write `{EXAMPLES[what]}`, for example"
        candidates = [own for own, word in AXES.items() if axes and word == axes[-1].word]
        if candidates:
            hint += f", or `search {METHOD} {candidates[-1]} …`"
        yield _wrong(body.site, f"adds {what}, and the rule has no axis over them", hint)
        return
    for axis in axes:
        if axis.plural:
            one = f"{axis.word} {axis.span.written.split(maxsplit=1)[-1]}"
            reason = f"tries its rule on each {AXES[what]}, but `{axis.span.written}` is one site"
            yield _wrong(axis, reason, f"write `{one}`")
        elif axis.window is not None:
            yield _wrong(axis, "chooses single sites, not windows", "remove `window`")


def _is_complete(experiment: ast.ExperimentDef) -> bool:
    """Whether an experiment has prompts, and a source if it patches; otherwise, other diagnostics
    report the lack."""
    kinds = {type(each) for each in experiment.statements}
    rules = (each for each in experiment.statements if isinstance(each, ast.Rule))
    patches = any(isinstance(each.body, ast.Patch) for each in rules)
    return ast.UsePrompts in kinds and (ast.FromInto in kinds or not patches)


def _run_problems(experiment: ast.ExperimentDef) -> Iterator[Diagnostic]:
    """Yield the problems with the runs and the rows of a search."""
    runs = [each for each in experiment.statements if isinstance(each, ast.FromInto)]
    for each in runs:
        sources, bases = ([own.whole for own in side] for side in (each.sources, each.bases))
        if len(sources) != 1 or bases != [CLEAN] or each.shuffled is not None or sources == bases:
            other = next((name for name in [*sources, *bases] if name != CLEAN), "fewer")
            reason = f"tries its rule in the run `{CLEAN}`, with the values of one other run"
            yield _wrong(each, reason, f"write `from {other} into {CLEAN}`")
    for use, reason, hint in find_undivided(experiment, "group"):
        yield _wrong(use, reason, hint)


def _measure_problems(experiment: ast.ExperimentDef, line: ast.Search) -> Iterator[Diagnostic]:
    """Yield the problems with the measure that a search maximises."""
    measures = [each for each in experiment.statements if isinstance(each, ast.Measure)]
    if not measures:
        reason = "needs a measure, whose first one it maximises"
        yield _wrong(line, reason, "add one, for example `measure kl(clean) as raw`")
    for each in measures[:1]:
        where = each.at or each.per or each.over
        if where is not None:
            reason = "maximises a measure at the last token"
            yield _wrong(where, reason, "name no position, variable or axis in the first measure")
        if each.effect.id not in MAXIMISED:
            reason = f"maximises the first measure, so it can't be `as {each.effect.id}`"
            hint = "write `as delta` or `as raw`; negate a measure that the group should lower"
            yield _wrong(each.effect, reason, hint)


def _wrong(node: ast.Node, reason: str, hint: str) -> Diagnostic:
    return BadArgument(span=node.span, name="search", reason=reason, hint=hint)
