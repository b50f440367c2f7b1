"""The plan of a whole file: panels of experiments that share unpatched runs, and what passes do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mechdsl.graph.needs import Asked, RunNeeds, asked, needs
from mechdsl.graph.nodes import EncodeNode, ForwardNode, Graph
from mechdsl.plan.experiment_plan import ExperimentPlan, plan_experiment
from mechdsl.plan.restart import WHOLE_PASS, Shortcuts
from mechdsl.prompts.prompt_table import PromptTable

PROMPT_TOKENS = 4096
"""Tokens of one batch of unpatched prompts, at most."""
PASS_TOKENS = 2048
"""Of the first pass over rows. On two cores 1,000 to 4,000 are equally good; fewer read the weights
too often, more fall out of the cache."""
BATCH_ROWS = 1 << 18
"""Rows that are laid out at a time: columns of integers, a hundred bytes a row."""


@dataclass(frozen=True, eq=False)
class Panel:
    """Experiments on the same model and prompts, which share their unpatched runs."""

    model: str
    encode: EncodeNode
    """Of the clean run."""
    experiments: tuple[ExperimentPlan, ...]
    runs: Mapping[str, RunNeeds]
    derived: Mapping[str, ExperimentPlan] = field(default_factory=dict[str, "ExperimentPlan"])
    """Runs that have rules, each after those that it uses: of one cell."""

    @cached_property
    def table(self) -> PromptTable:
        """The prompts, with the runs of all experiments."""
        tables = [plan.experiment.table for plan in self.experiments]
        runs = {name: run for table in tables for name, run in table.runs.items()}
        return replace(tables[0], runs=runs)

    @property
    def models(self) -> tuple[str, ...]:
        """The model that it runs on, and others that are read."""
        return tuple(dict.fromkeys(m for plan in self.experiments for m in plan.experiment.models))


@dataclass(frozen=True)
class Rewrite:
    """What one pass did to the graph: its nodes before and after."""

    name: str
    changed: bool
    before: int
    after: int


@dataclass(frozen=True, eq=False)
class Plan:
    """The whole file: what is run, and which work the planner passes leave out of it.

    As it is made it is the plain loop; `mechdsl/plan/passes.py` lists the passes.
    """

    graph: Graph
    panels: tuple[Panel, ...]
    passes: tuple[str, ...] = ()
    """Names of those that were applied."""
    rewrites: tuple[Rewrite, ...] = ()
    """What those on the graph did."""
    skips_inert: bool = False
    """Rows that can't differ from the base run are not run."""
    shares_rows: bool = False
    """Rows that are equal are run once."""
    shortcuts: Shortcuts = WHOLE_PASS
    """What a row takes over from the run that it starts from."""
    narrows_logits: bool = False
    """Only logits that metrics name are computed, where they name all that they read."""
    joins_rows: bool = False
    """Rows of all cells ride in one pass."""
    keeps_tokens: bool = False
    """Keys and values of tokens are kept while a model writes, and only the newest is computed."""
    fuses_kernels: bool = False
    """Activation functions written out step by step run in one kernel."""

    def does(self, name: str) -> bool:
        """Whether a pass was applied."""
        return name in self.passes

    @property
    def restarts(self) -> bool:
        """Whether rows take anything over; else they are whole passes."""
        return self.shortcuts != WHOLE_PASS


def plan_of(graph: Graph) -> Plan:
    """The plain loop over what a graph asks for."""
    by_panel: dict[tuple[object, ...], list[Asked]] = {}
    for each in asked(graph):
        # The same definitions give the same runs; others of the same name are other runs.
        defined = tuple(run.spec.span for run in each.experiment.derived.values())
        model, generation = each.experiment.model.key, each.experiment.generation
        written = None if generation is None else generation.key(each.experiment.seed)
        by_panel.setdefault((model, each.clean, defined, written), []).append(each)
    found = needs(graph)
    panels = tuple(
        panel_of(own[0].experiment.model.key, own[0].clean, _on_the_same_runs(own), found)
        for own in by_panel.values()
    )
    return Plan(graph, panels)


def _on_the_same_runs(own: Sequence[Asked]) -> list[Asked]:
    """Experiments that define the same runs, with those of the first of them."""
    derived = own[0].experiment.derived
    runs = {name: own[0].experiment.table.runs[name] for name in derived}
    if not runs or len(own) == 1:
        return list(own)
    found: list[Asked] = []
    for each in own:
        table = each.experiment.table
        table = replace(table, runs={**table.runs, **runs})
        experiment = replace(each.experiment, table=table, derived=derived)
        found.append(replace(each, experiment=experiment))
    return found


def panel_of(
    model: str, encode: EncodeNode, own: Sequence[Asked], found: Mapping[ForwardNode, RunNeeds]
) -> Panel:
    """Experiments on the same prompts, with what their runs have to give."""
    derived = {
        name: plan_experiment(replace(own[0], experiment=run, runs=()))
        for name, run in own[0].experiment.derived.items()
    }
    return Panel(model, encode, tuple(map(plan_experiment, own)), _needed(own, found), derived)


def _needed(own: Sequence[Asked], found: Mapping[ForwardNode, RunNeeds]) -> dict[str, RunNeeds]:
    """What the graph asks of every unpatched run of a panel, and what only rows need."""
    needed: dict[str, RunNeeds] = {}
    for each in own:
        for forward in each.runs:
            whole = replace(forward, stop=None)
            run = found.get(whole, RunNeeds(whole))
            if forward.run == "clean" and each.experiment.keep:  # filters rows before that
                run = replace(run, measured=True, stop=None)
            needed[forward.run] = run
    return needed
