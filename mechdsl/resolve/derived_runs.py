"""Runs that an experiment defines, made concrete: each is one cell of rules on another run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from mechdsl.base.registry import Registry
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e03_positions import AbsentOccurrence
from mechdsl.program import spec
from mechdsl.program.lower_derived_runs import ONE_CELL
from mechdsl.prompts.prompt_table import Derived, PromptTable
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.kinds import RuleKind
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.resolve.resolved_rule import ResolvedRule


def define_runs(work: Work, kinds: Registry[RuleKind]) -> dict[str, ResolvedExperiment]:
    """The experiment's own runs, which its table has from then on.

    After an error the others can still be named: a run that can't be made stands as its base.
    Codes: E0108, E0309 and those of rules.
    """
    found: dict[str, ResolvedExperiment] = {}
    for run in work.experiment.derived:
        if run.base not in work.table.runs:
            continue  # which has been refused
        rules = _rules(run, work, kinds)
        base = work.table.runs[run.base]
        reads = tuple(dict.fromkeys(rule.run for rule in rules if rule.apart is None))
        draws = max(work.table.runs[name].draws for name in (run.base, *reads))
        made = replace(base, name=run.name, derived=Derived(run.base, reads, draws))
        found[run.name] = ResolvedExperiment(
            spec=_alone(work.experiment, run),
            model=work.model,
            table=work.table,
            axes=(),
            rules=rules,
            measures=(),
            keep=(),
            accuracies={},
            seed=work.program.seed,
        )
        work.table = replace(work.table, runs={**work.table.runs, run.name: made})
    return found


def _alone(experiment: spec.Experiment, run: spec.DerivedRun) -> spec.Experiment:
    """A run as an experiment with nothing but its rules."""
    return experiment.model_copy(
        update={
            "name": run.name,
            "span": run.span,
            "variant": (),
            "source": run.source,
            "base": run.base,
            "rules": run.rules,
            "derived": (),
            "loops": (),
            "keep": (),
            "measures": (),
            "against": None,
            "reports": (),
            "expects": (),
        }
    )


def _rules(run: spec.DerivedRun, work: Work, kinds: Registry[RuleKind]) -> tuple[ResolvedRule, ...]:
    """Its rules, as far as they are right."""
    alone = _alone(work.experiment, run)
    sites = replace(work.sites, loops={}, words={})
    inner = Work(alone, work.program, work.model, work.table, sites)
    found: list[ResolvedRule] = []
    for rule in run.rules:
        resolved = kinds[rule.verb].resolve(rule, inner)
        if resolved is None:
            continue
        problems = list(_refused(resolved, inner.table, run))
        work.diagnostics.extend(problems)
        if not has_errors(problems):
            found.append(resolved)
    for axis in inner.axes.values():
        what = f"a sweep (`{axis.span.written}`) in a `run`"
        work.diagnostics.append(NotSupported(span=axis.span, what=what, later=ONE_CELL))
    inner.draws_agree()
    return tuple(found)


def _refused(rule: ResolvedRule, table: PromptTable, run: spec.DerivedRun) -> Iterator[Diagnostic]:
    """E0108 for a kind of rule that no run has, E0309 for rows that lack what it acts on: such rows
    would have no such run."""
    what, later = "", "write it in the experiment, on the run: `from … into NAME`"
    if rule.path is not None:
        what = "a `path` in a `run`"
    elif rule.does.changes == "input":
        what, later = "a `replace` in a `run`", "write a `corrupt` in the prompts block"
    elif rule.does.changes == "nothing":
        what = f"`{rule.spec.verb}` in a `run`"
    if what:
        yield NotSupported(span=rule.spec.span, what=what, later=later)
        return
    for cell in rule.positions.written.values():
        lacking = [row for row, hits in enumerate(cell.hits) if not hits]
        if lacking and not table.stands_in:
            rows = table.runs[run.base].rows
            yield AbsentOccurrence(
                span=rule.spec.at.span,
                position=rule.spec.at.span.written,
                run=run.base,
                lacking=len(lacking),
                total=len(rows),
                example=f'"{rows[lacking[0]].text}"',
                hint=f"every row needs it, or `{run.name}` is no run of all rows: leave the others "
                "out by a `where` in the prompts block",
            )


def on_derived(rules: Sequence[ResolvedRule | None], work: Work) -> Iterator[Diagnostic]:
    """E0108 for rules of the experiment that can't act on a run that has rules itself."""
    if work.table.runs[work.experiment.base].derived is None:
        return
    for rule in rules:
        if rule is not None and rule.does.changes == "input":
            what = f"a `{rule.spec.verb}` on a run that has rules"
            yield NotSupported(span=rule.spec.span, what=what)


def accuracies_known(
    asked: Iterable[str], derived: Mapping[str, ResolvedExperiment], experiment: spec.Experiment
) -> Iterator[Diagnostic]:
    """E0108 for the accuracy of a run that is made of the kept rows, beside a `keep`: an accuracy
    is of all rows."""
    for name in asked if experiment.keep else ():
        run = name
        while run in derived:
            if any(rule.does.of_all_rows for rule in derived[run].rules):
                what = f"`accuracy({name})` beside `keep`, as `{run}` is made of the rows it keeps,"
                yield NotSupported(span=experiment.keep[0].span, what=what)
                break
            run = derived[run].spec.base
