"""Runs a plan: panels of experiments on the same prompts, prompt batch by prompt batch.

The plain executor and the planned one are this code with plan passes off or on: whole passes over
the rows of one cell, or passes over what changes in the rows of many cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.kept_values import KeptRun
from mechdsl.execute.measured_values import MeasuredValues
from mechdsl.execute.no_value import cells_without_value
from mechdsl.execute.options import Options
from mechdsl.execute.panel_runner import PanelRunner
from mechdsl.execute.pass_size import Sizes, stopwatch
from mechdsl.execute.prepared_panel import Check
from mechdsl.execute.profile import Profile
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.plan import Plan
from mechdsl.resolve.resolved import ResolvedExperiment


@dataclass
class Execution:
    """What a run of a plan left: values, and what could not be computed."""

    measured: dict[str, MeasuredValues] = field(default_factory=dict[str, MeasuredValues])
    lost: dict[str, list[Diagnostic]] = field(default_factory=dict[str, list[Diagnostic]])
    """Experiments that could not be computed → why. Those that they are set against (controls) are
    not listed apart."""
    profile: Profile = field(default_factory=Profile)

    @property
    def diagnostics(self) -> list[Diagnostic]:
        """Why experiments, measures or cells could not be computed, each reason once."""
        parts = [d for each in self.measured.values() for d in each.refused.values()]
        whole = [d for found in self.lost.values() for d in found]
        own = [each for each in self.measured.values() if each.experiment.control_of is None]
        cells = [d for each in own for d in cells_without_value(each)]
        return list(dict.fromkeys([*whole, *parts, *cells]))


def sizes_of(
    experiments: Iterable[ResolvedExperiment],
    models: Mapping[str, LoadedModel],
    options: Options,
) -> Sizes:
    """What a run of these experiments is laid out by, before anything is measured."""
    uses = [(models[name], each.table) for each in experiments for name in each.models]
    return Sizes.of(options.pass_tokens, options.prompt_tokens, uses)


def execute(
    plan: Plan,
    models: Mapping[str, LoadedModel],
    options: Options | None = None,
    kept: KeptRun | None = None,
    sizes: Sizes | None = None,
    *,
    check: Check,
) -> Execution:
    """Run every panel. `keep` and what `check` looks at are checked for all before any cell runs;
    an experiment or a measure that can't be computed costs no other.

    kept: where values are looked up and kept. sizes: of the run that this is a part of; they are
    settled here if they aren't yet.
    Codes: E0223, E0613, E0621, E0631, W0762 and those of `check`. Raises what the model raises; it
    is left without hooks in any case.
    """
    options = options or Options()
    if sizes is None:
        experiments = [each.experiment for panel in plan.panels for each in panel.experiments]
        sizes = sizes_of(experiments, models, options)
    execution = Execution()
    if kept is not None:
        kept.settle(sizes)  # batches of prompts hang on them too
    runners = _prepared(plan, models, options, sizes, execution, kept, check)
    if runners and not sizes.settled:
        max(runners, key=lambda runner: runner.due_rows()).measure_sizes()
    sizes.settled = True
    if kept is not None:
        kept.settle(sizes)
    total = sum(runner.total_rows() for runner in runners)
    done = 0
    for runner in runners:
        for count in runner.run():
            done += count
            if options.on_progress is not None:
                options.on_progress(done, total)
        execution.profile.unpatched_passes += runner.runs.passes
        execution.lost.update(runner.lost)
    return execution


def _prepared(
    plan: Plan,
    models: Mapping[str, LoadedModel],
    options: Options,
    sizes: Sizes,
    execution: Execution,
    kept: KeptRun | None,
    check: Check,
) -> list[PanelRunner]:
    """Runners whose unpatched runs are done."""
    runners = [
        PanelRunner(
            panel,
            models[panel.model],
            plan,
            options.side,
            sizes,
            execution.profile,
            kept,
            allow_nan=options.allow_nan,
            others={name: models[name] for name in panel.models[1:]},
        )
        for panel in plan.panels
    ]
    for runner in runners:
        with stopwatch() as seconds:
            runner.prepare(check)
        execution.profile.unpatched_seconds += seconds[0]
        execution.measured.update(runner.measured)
    return runners
