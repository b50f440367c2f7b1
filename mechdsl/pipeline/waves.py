"""The experiments of one file, in waves: those that pick from others' results wait for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e06_experiment import BrokeOff, NothingKept
from mechdsl.diagnostics.e06_numbers import NothingToPickFrom, PickedBySign, RowsLeftOut
from mechdsl.diagnostics.w07_statistics import SkewedFamily
from mechdsl.execute.counts import Counts
from mechdsl.execute.execute import Execution, execute
from mechdsl.execute.kept_values import KeptRun
from mechdsl.execute.options import Options
from mechdsl.execute.pass_size import Sizes
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.loading.file_models import not_there
from mechdsl.pipeline.run_options import RunOptions
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.make_plan import make_plan
from mechdsl.program import spec
from mechdsl.program.lower_other_runs import BLOCKS
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.replies_behind import alone
from mechdsl.resolve.findings import Finding
from mechdsl.resolve.measured_parts import in_parts, whole_spec
from mechdsl.resolve.resolve_experiment import resolve_experiment
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.resolve.selections import selections
from mechdsl.results.averaged import averaged
from mechdsl.results.blocks_beside import OfBlock, side_by_side
from mechdsl.results.collect import collect, with_bare, with_control, without_measures
from mechdsl.results.denominators import check_denominators
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.explained_by_values import explained_by_values
from mechdsl.results.finish import with_statistics
from mechdsl.results.make_finding import found_by
from mechdsl.results.population import with_population
from mechdsl.results.variants import merged
from mechdsl.rules import RULES
from mechdsl.store.problem import StoreProblem
from mechdsl.validate.check_file import Checked, by_name
from mechdsl.validate.reachable_p import check_cells, check_rows, tested_measures, unit_of
from mechdsl.validate.replies_named import replies_behind

LISTED = 5
"""Rows that a warning names."""


@dataclass
class FileRun:
    """A file's experiments while they run, in waves. One that can't be computed costs itself and
    those that pick from it."""

    checked: Checked
    models: Mapping[str, LoadedModel]
    options: RunOptions
    sizes: Sizes
    diagnostics: list[Diagnostic]
    kept: KeptRun | None = None
    """Where values are looked up and kept."""
    counts: Counts | None = None
    """Told how many rows were computed."""
    results: dict[str, ExperimentResult] = field(default_factory=dict[str, ExperimentResult])
    lost: dict[str, list[Diagnostic]] = field(default_factory=dict[str, list[Diagnostic]])
    findings: dict[str, Finding] = field(default_factory=dict[str, Finding])
    _replied: dict[tuple[object, ...], tuple[PromptTable, tuple[PromptTable, list[Diagnostic]]]] = (
        field(default_factory=dict[Any, Any])
    )
    """By a table and whose replies stand behind its prompts: it itself, and the same with these."""
    failure: Exception | None = None
    """The last that made an experiment break off."""
    before: int = 0
    """Rows of earlier waves, for the one bar over all of them."""

    def wave(self, wave: Sequence[ResolvedExperiment], later: Sequence[ResolvedExperiment]) -> None:
        """Run experiments whose results don't depend on one that is still to be run. Where that
        breaks off, each is run by itself: one that breaks off then is lost (E0650).

        Raises OSError and StoreProblem, after which no experiment can be run.
        """
        try:
            self.together(wave, later)
        except (OSError, StoreProblem):
            raise
        except Exception as failure:
            done = {*self.results, *self.lost}
            left = by_name(each for each in wave if each.name not in done)
            if len(left) > 1:
                for variants in left:
                    self.wave(variants, later)
                return
            for experiment, *_ in left:
                self._lose(experiment.name, [self.broke_off(experiment, failure)])

    def broke_off(self, experiment: ResolvedExperiment, failure: Exception) -> Diagnostic:
        """E0650 for one that something unforeseen ended."""
        self.failure = failure
        reason = f"{type(failure).__name__}: {failure}"
        return BrokeOff(span=experiment.spec.span, experiment=experiment.name, reason=reason)

    def together(
        self, wave: Sequence[ResolvedExperiment], later: Sequence[ResolvedExperiment]
    ) -> None:
        """The same, which raises what breaks it off."""
        ready = [each for each in map(self._ready, wave) if each is not None]
        ready = [each for each in ready if each.name not in self.lost]
        if not ready:
            return
        plan = make_plan(ready, without=self.options.without)
        told = self._with_progress(later)
        execution = execute(
            plan, self.models, told, self.kept, self.sizes, check=check_denominators
        )
        if self.counts is not None:
            self.counts.add(execution.profile)
        if self.options.on_profile is not None:
            self.options.on_profile(plan, execution.profile)
        self._say(execution.diagnostics)
        for each in ready:
            if each.key in execution.lost:
                self._lose(each.name, execution.lost[each.key])
        plans = {p.experiment.key: p for panel in plan.panels for p in panel.experiments}
        for variants in by_name(ready):
            if variants[0].name not in self.lost:
                self._collect(variants, plans, execution)

    def _say(self, found: Sequence[Diagnostic]) -> None:
        self.diagnostics += [each for each in found if each not in self.diagnostics]

    def _lose(self, name: str, reasons: Sequence[Diagnostic]) -> None:
        self._say(reasons)
        own = self.lost.setdefault(name, [])
        own += [each for each in reasons if each not in own]

    def _ready(self, experiment: ResolvedExperiment) -> ResolvedExperiment | None:
        """The experiment with what others have found in place of what stood in for it; None where
        it is lost."""
        for name in experiment.spec.after:
            if name not in self.findings:
                what = "its result" if name in self.lost else "its first measure"
                lacking = NothingToPickFrom(
                    span=experiment.spec.span, experiment=experiment.name, of=name, what=what
                )
                self._lose(experiment.name, [lacking])
                return None
        if not experiment.spec.after:
            return experiment
        experiment, problems = self._with_replies(experiment)
        errors = [each for each in problems if each.severity == "error"]
        if errors:
            self._lose(experiment.name, errors)
            return None
        found, more = _with_findings(experiment, self.findings, self.checked.program)
        problems += more
        if found is not None:
            problems += not_there([found], self.models)
        self._say([each for each in problems if each.severity == "warning"])
        errors = [each for each in problems if each.severity == "error"]
        if errors:
            self._lose(experiment.name, errors)
        if found is None and not errors:
            if experiment.spec.replies is not None and experiment.place is not None:
                return None  # of a token that no reply has
            raise RuntimeError(f"nothing says why `{experiment.name}` can't be run")
        return None if errors else found

    def _with_replies(
        self, experiment: ResolvedExperiment
    ) -> tuple[ResolvedExperiment, list[Diagnostic]]:
        """The experiment with what was written behind its prompts; variants that share a table
        share these too."""
        named, table = experiment.spec.replies, experiment.table
        if named is None:
            return experiment, []
        key = (id(table), named.span)
        if key not in self._replied:
            said = whole_spec(experiment)
            finding, model = self.findings[named.of], experiment.model
            self._replied[key] = (
                table,
                replies_behind(alone(table), said, self.checked.program, finding, model),
            )
        replied, problems = self._replied[key][1]
        return replace(experiment, table=replied), list(problems)

    def _collect(
        self,
        variants: Sequence[ResolvedExperiment],
        plans: Mapping[str, ExperimentPlan],
        execution: Execution,
    ) -> None:
        """The result of one experiment, all variants together."""
        first, measured = variants[0], execution.measured
        raw: list[ExperimentResult] = []
        for each in variants:
            plan, profile = plans[each.key], execution.profile
            own = collect(plan, measured[each.key], self.models, profile, self.sizes)
            own = with_bare(own, plan, plans, measured, self.models)
            raw.append(with_control(own, plan, measured))
        refused = {n: d for each in variants for n, d in measured[each.key].refused.items()}
        if len(refused) == len(first.measures):
            self._lose(first.name, list(refused.values()))
            return
        whole = without_measures(_together(variants, raw), refused)
        if not whole.prompts:
            self._lose(first.name, [_nothing_left(first)])
            return
        if 0 not in refused:
            parts = tuple(found_by(*pair) for pair in zip(variants, raw, strict=True))
            self.findings[first.name] = Finding(parts)
        if whole.left_out:
            self._say([_rows_left_out(variants, whole)])
        parameters = self.checked.program.parameters
        if parameters:
            said = {"parameters": _parameter_words(parameters)}
            whole = replace(whole, conventions={**whole.conventions, **said})
        if first.spec.over is not None:
            whole = averaged(whole, first.spec.over, area=first.spec.area)
        whole = replace(whole, selected=selections(variants))
        result = with_statistics(whole, first.spec, first.seed)
        self._say(_few_units(variants, result))
        self._say(_too_skewed(variants, result))
        self._say(explained_by_values(result, first.spec, first.table.exhausted))
        self.results[first.name] = result

    def _with_progress(self, later: Sequence[ResolvedExperiment]) -> Options:
        """The options of one wave, for one bar over all waves; how many rows a later one has is
        counted with stand-ins."""
        options = self.options.execution
        tell = options.on_progress
        if tell is None or (not later and not self.before):
            return options
        panels = make_plan(later).panels
        behind = sum(each.count() for panel in panels for each in panel.experiments)
        before = self.before

        def advance(done: int, total: int) -> None:
            self.before = before + done
            tell(before + done, before + total + behind)

        return replace(options, on_progress=advance)


def _together(
    variants: Sequence[ResolvedExperiment], raw: Sequence[ExperimentResult]
) -> ExperimentResult:
    """The results of all variants as one, with what its rows stand for."""
    blocks: dict[object, list[int]] = {}
    for number, each in enumerate(variants):
        blocks.setdefault(dict(each.spec.variant).get(BLOCKS), []).append(number)
    found: list[OfBlock] = []
    for label, numbers in blocks.items():
        first = variants[numbers[0]]
        whole = merged([(variants[n].spec.variant, raw[n]) for n in numbers])
        whole = with_population(whole, first.table, first.spec.statistics)
        found.append(OfBlock(((BLOCKS, str(label)),), first.table.name, whole))
    if len(found) == 1:
        return found[0].result
    return merged(side_by_side(found))


def _rows_left_out(variants: Sequence[ResolvedExperiment], result: ExperimentResult) -> Diagnostic:
    """W0750."""
    experiment = variants[0]
    every = {(each.table.name, row) for each in variants for row in each.table.row_ids}
    out = list(result.left_out.items())
    listed = ", ".join(f"row {row} ({where})" for row, where in out[:LISTED])
    more = f" … and {len(out) - LISTED} more" if len(out) > LISTED else ""
    return RowsLeftOut(
        span=experiment.spec.span,
        experiment=experiment.name,
        count=len(out),
        rows=len(every),
        listed=f"{listed}{more}",
    )


def _parameter_words(parameters: Mapping[str, object]) -> str:
    """What every `param` is in this run: `--set` may have changed it."""
    texts = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in parameters.items()}
    return ", ".join(f"{name} = {text}" for name, text in texts.items())


def _nothing_left(experiment: ResolvedExperiment) -> Diagnostic:
    """E0613 where each model has kept other rows."""
    keep = experiment.spec.keep
    span = keep[0].span if keep else experiment.spec.span
    return NothingKept(span=span, rows=len(experiment.table))


def _few_units(
    variants: Sequence[ResolvedExperiment], result: ExperimentResult
) -> list[Diagnostic]:
    """W0720 where cells turn out to stand on so few prompts or groups; of all rows it was said
    before."""
    first = variants[0]
    tested = tested_measures(first)
    if not tested or check_rows(variants):
        return []
    units = [n for each in result.statistics for n in each.units[each.tested].tolist()]
    tables = {id(each.table): each.table for each in variants}
    fewer = first.spec.keep if result.prompts < sum(map(len, tables.values())) else ()
    return check_cells(units, first.spec.statistics, (fewer or tested)[0].span, unit_of(first))


def _too_skewed(
    variants: Sequence[ResolvedExperiment], result: ExperimentResult
) -> list[Diagnostic]:
    """W0723 where no p is corrected."""
    found = next((each for each in result.statistics if each.withheld == "skewed"), None)
    if found is None:
        return []
    return [
        SkewedFamily(
            span=tested_measures(variants[0])[0].span,
            experiment=result.name,
            cells=found.tests,
            units=int(np.median(found.units[found.tested])),
            unit=unit_of(variants[0]),
        )
    ]


def waves(
    experiments: Sequence[ResolvedExperiment], *, one_by_one: bool = False
) -> Iterator[tuple[list[ResolvedExperiment], list[ResolvedExperiment]]]:
    """(experiments whose results don't hang on one that is still to be run, those that come after
    them), until all are run.

    one_by_one: only the first of them each time, with all its variants.
    """
    left = list(experiments)
    while left:
        names = {each.name for each in left}
        wave = [each for each in left if names.isdisjoint(each.spec.after)]
        if one_by_one:
            wave = [each for each in wave if each.name == wave[0].name]
        now = {each.name for each in wave}  # variants of one experiment wait together
        later = [each for each in left if each.name not in now]
        yield wave, later
        left = later


def _with_findings(
    experiment: ResolvedExperiment, found: Mapping[str, Finding], program: spec.Program
) -> tuple[ResolvedExperiment | None, list[Diagnostic]]:
    """An experiment with what others have found, in place of what stood in for it."""
    own = {name: found[name] for name in experiment.spec.after}
    again, said = resolve_experiment(
        whole_spec(experiment), program, experiment.model, experiment.table, RULES, own
    )
    if again is not None:
        parts = in_parts(again)
        again = next((p for p in parts if p.spec.variant == experiment.spec.variant), None)
    # Other warnings have been said.
    return again, [d for d in said if d.severity == "error" or isinstance(d, PickedBySign)]
