"""How often all prompts of the unpatched runs go through the model.

A single batch of prompts serves every stage of a run. Of several, nothing is kept: base and source
are measured, then each mean is taken and each cell gathered whole (`set … to python(…)`), then rows
are run, and each of these stages computes what it reads anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TypeAlias

from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.plan import BATCH_ROWS, Panel
from mechdsl.plan.rule_rows import RulePlan
from mechdsl.prompts.prompt_table import PromptTable, Run

Stage: TypeAlias = Sequence[tuple[str, bool]]
"""Runs, and whether it is the donors of a batch that are run, which lie in others too."""


def batch_size(panel: Panel, prompt_tokens: int) -> int:
    """Prompts of one batch, of at most so many tokens where one has no more."""
    draws = max((run.draws for run in panel.table.runs.values()), default=1)
    cells = sum(each.n_cells for each in panel.experiments)
    tokens = longest_prompt(panel) * draws
    return max(1, min(prompt_tokens // tokens, BATCH_ROWS // max(1, cells)))


def longest_prompt(panel: Panel) -> int:
    """Its tokens, in any run."""
    runs = panel.table.runs.values()
    return max((int(run.lengths.max(initial=1)) for run in runs), default=1)


def sweeps(panel: Panel, *, several: bool) -> Counter[str]:
    """By name, how often a run is computed on all prompts; several: in several batches."""
    filtering = set(_filtering(panel))
    found = _counted(_stages(panel), panel, several=several)
    for name in panel.runs:
        found[name] = max(1, found[name])
    return found + Counter(filtering)  # of which nothing is kept


def save_sweeps(panel: Panel, run: str, *, several: bool) -> Counter[str]:
    """The same where vectors of one run are all that is wanted."""
    needed = set(_made_of(run, panel))
    stages: list[Stage] = [[(run, False)], *_averaged(panel, needed)]
    return _counted(stages, panel, several=several)


def _counted(stages: Iterable[Stage], panel: Panel, *, several: bool) -> Counter[str]:
    every = [set(_with_read(stage, panel)) for stage in stages]
    if several:
        return Counter(name for stage in every for name, _ in stage)
    return Counter({name for stage in every for name, _ in stage})


def beside(panel: Panel) -> list[tuple[PromptTable, Run]]:
    """The runs of other blocks that means and donors are taken of, each on all rows of its own."""
    found = {
        (id(rule.rule.apart.table), rule.rule.apart.run): rule.rule.apart
        for plan in (*panel.experiments, *panel.derived.values())
        for rule in plan.rules
        if rule.rule.apart is not None
    }
    return [(apart.table, apart.table.runs[apart.run]) for apart in found.values()]


def _filtering(panel: Panel) -> Iterator[str]:
    """The runs that `keep` reads."""
    keep = panel.experiments[0].experiment.keep
    yield from ("clean",) if keep else ()
    yield from (atom.run for measure in keep for atom in measure.atoms if atom.run is not None)


def _stages(panel: Panel) -> Iterator[Stage]:
    """The runs that each stage asks for."""
    yield [(name, False) for name, needs in panel.runs.items() if needs.measured]
    for plan in panel.experiments:
        yield from _gathered(plan.rules)
    yield from _averaged(panel, panel.runs)
    yield [each for plan in panel.experiments if plan.rules for each in _beside_rows(plan)]


def _gathered(rules: Iterable[RulePlan]) -> Iterator[Stage]:
    """Each run that is averaged or gathered whole for a rule."""
    for rule in rules:
        if rule.rule.does.reads in ("mean", "cell") and rule.rule.apart is None:
            yield [(rule.rule.run, False)]


def _averaged(panel: Panel, runs: Container[str]) -> Iterator[Stage]:
    """The same of the rules of runs."""
    for name, plan in panel.derived.items():
        if name in runs:
            yield from _gathered(plan.rules)


def _made_of(run: str, panel: Panel) -> Iterator[str]:
    """A run, and all those whose rules have to be known for it."""
    yield run
    if run in panel.derived:
        plan = panel.derived[run]
        for name in (plan.experiment.spec.base, *(rule.rule.run for rule in plan.rules)):
            if name != run:
                yield from _made_of(name, panel)


def _beside_rows(plan: ExperimentPlan) -> Iterator[tuple[str, bool]]:
    """What rows start from, read and are compared with."""
    yield plan.experiment.spec.base, False
    yield from _copied(plan.rules)
    for measure in plan.experiment.measures:
        yield from ((atom.run, False) for atom in measure.atoms if atom.run is not None)


def _copied(rules: Iterable[RulePlan]) -> Iterator[tuple[str, bool]]:
    """The runs whose vectors rules write as they are."""
    for rule in rules:
        if rule.rule.does.reads in ("run", "donor") and rule.rule.apart is None:
            yield rule.rule.run, rule.rule.does.reads == "donor"


def _with_read(asked: Stage, panel: Panel) -> Iterator[tuple[str, bool]]:
    """Runs, with those that their own rules read."""
    for name, donors in asked:
        yield name, donors
        within = name
        while within in panel.derived:
            yield from _with_read(list(_copied(panel.derived[within].rules)), panel)
            within = panel.derived[within].experiment.spec.base
