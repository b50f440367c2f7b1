"""Runs that an experiment defines: `run healed { from clean into noised  patch … }`."""

from __future__ import annotations

from dataclasses import replace

from mechdsl.diagnostics.e01_syntax import NotSupported, UnexpectedToken
from mechdsl.diagnostics.e02_names import BadArgument, DuplicateName, UnknownName
from mechdsl.program import spec
from mechdsl.program.lower_generation import within_run
from mechdsl.program.lower_other_runs import run_of
from mechdsl.program.lower_prompts import CLEAN
from mechdsl.program.lower_rules import lower_rules
from mechdsl.program.namespace import place
from mechdsl.program.sort_statements import Statements, use_names
from mechdsl.syntax import ast

ONE_CELL = "a `run` has one cell: let it name one layer, head and position, or join them (`layers`)"
"""What is to be done about a sweep in a run."""


def derived_runs(work: Statements, prompts: spec.Prompts) -> tuple[spec.DerivedRun, ...]:
    """The runs that an experiment defines, in the order of the file, which is that in which they
    may use each other. Their names are known from then on.

    E0101 for statements that no run has, E0108 for another model, E0202 for names that are taken,
    E0207 for lists of runs.
    """
    found: list[spec.DerivedRun] = []
    for definition in work.derived:
        name = definition.name
        taken = _taken(name, work, prompts)
        if taken is not None:
            work.diagnostics.append(DuplicateName(span=name.span, name=name.id, first=taken))
        found.append(_run(definition, work, prompts))
        work.known_runs.setdefault(name.id, name.span)
    return tuple(found)


def _taken(name: ast.Name, work: Statements, prompts: spec.Prompts) -> str | None:
    """Where another run of this name is from."""
    if name.id in work.known_runs:
        return place(work.known_runs[name.id], name.span)
    corruption = next((c for c in prompts.corruptions if c.name == name.id), None)
    if corruption is not None:
        return f"a corruption of `{prompts.name}`"
    if name.id == CLEAN:
        return "the run without changes"
    first = work.scope.definitions.get(name.id)
    if first is not None and first.kind in ("prompts", "model"):
        return place(first.span, name.span)
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
                hint=ONE_CELL if word == "for" else "write it in the experiment",
            )
        )
    if not inner.rules and not inner.unsupported and not work.unsupported:
        work.diagnostics.append(
            BadArgument(
                span=definition.name.span,
                name=definition.name.id,
                reason="has no rule",
                hint="write one: `patch SITE at POSITION`; without rules it is its base run",
            )
        )
    said = len(inner.diagnostics)
    source, base = _ends(inner, prompts)
    rules: list[spec.Rule] = []
    for rule, _ in inner.rules:
        use_names(rule, inner)
        within_run(rule, inner)
        rules += lower_rules(replace(rule, during=None), source, prompts, inner)
    _before_it_is_made(definition, inner, said)
    work.unsupported |= inner.unsupported
    name = definition.name
    return spec.DerivedRun(
        span=name.span, name=name.id, source=source, base=base, rules=tuple(rules)
    )


def _before_it_is_made(definition: ast.RunDef, inner: Statements, said: int) -> None:
    """The help of E0201 for runs that are defined further down, or by this very run; said: how many
    diagnostics there were before it."""
    later = {each.name.id: each for each in inner.derived if each.name.id not in inner.known_runs}
    for number, problem in enumerate(inner.diagnostics[said:], said):
        if not isinstance(problem, UnknownName) or problem.kind != "run":
            continue
        if problem.name not in later or problem.span is None:
            continue
        hint = f"a run is made of those before it: define `{problem.name}` above this one"
        if later[problem.name] is definition:
            hint = "a run can't be made of itself: name another one"
        inner.diagnostics[number] = replace(problem, hint=hint)


def _ends(inner: Statements, prompts: spec.Prompts) -> tuple[str | None, str]:
    """(source, base) of the `from … into …` of a run."""
    if not inner.from_into:
        return None, CLEAN
    line = inner.from_into[0]
    found: list[str | None] = []
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
        found.append(run_of(first, prompts, inner, shuffled=line.shuffled is not None))
    source, base = found
    there = inner.elsewhere.get(base or CLEAN)
    if there is not None and there.model is not None:
        what = "a `run` with rules in another model"
        inner.diagnostics.append(NotSupported(span=line.bases[0].span, what=what))
    return source, base or CLEAN
