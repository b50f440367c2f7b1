"""Computation of a checked file: load, plan, execute, collect, finish."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.base.files import package_digest
from mechdsl.base.hashing import digest
from mechdsl.base.runtime import computation_settings, numeric_settings
from mechdsl.base.text import Source, name_list
from mechdsl.checks.expectations import (
    check_cell_units,
    check_reachable_p,
    row_unit,
    tested_measures,
)
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source, group_variants
from mechdsl.checks.prompt_tables import attach_replies
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, filter_certain
from mechdsl.diagnostics.experiments import (
    ExperimentFailed,
    MissingPickResult,
    NoRowsKept,
    PickBySign,
    RowsLeftOut,
    SkewedFamily,
)
from mechdsl.diagnostics.syntax import UnknownName
from mechdsl.execute.cache import RunCache
from mechdsl.execute.image_vectors import find_image_problem
from mechdsl.execute.measurement.values import MeasuredValues
from mechdsl.execute.pass_layout import PassSizer
from mechdsl.execute.run.panel import Execution, choose_pass_sizes, execute
from mechdsl.execute.run.saves import RowParts, RowsRefused, save_feature_rows, save_vectors
from mechdsl.execute.run_record import NUMERIC_VERSION, ExecutionOptions, RowCounts, SavedFile
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.anatomy_proof import NoteStore
from mechdsl.loading.identity import compute_identity
from mechdsl.loading.loader import (
    GivenModels,
    adopt_models,
    build_model,
    build_model_contexts,
    check_modules,
)
from mechdsl.models.folder import FileHasher, hash_file
from mechdsl.pipeline.identities import VERSIONED_PACKAGES
from mechdsl.pipeline.loaded_models import load_needed_models
from mechdsl.pipeline.options import RunOptions
from mechdsl.pipeline.trained_files import find_untrained
from mechdsl.planner.passes import make_plan
from mechdsl.planner.plan import ExperimentPlan, Plan
from mechdsl.program import spec
from mechdsl.program.code_hashes import CodeHashError, hash_imported_code
from mechdsl.program.lowering import expectation_experiments, lower_program
from mechdsl.program.plugins import hash_extension_code
from mechdsl.program.python_functions import program_functions
from mechdsl.program.spec import PROMPTS_AXIS, SEED_AXIS
from mechdsl.prompts.data_files import DataFile
from mechdsl.prompts.other_runs import remove_replies
from mechdsl.prompts.rows import PromptTable
from mechdsl.resolve.expansion import (
    find_selections,
    get_whole_spec,
    select_exact_cells,
    split_by_group,
)
from mechdsl.resolve.experiment import resolve_experiment
from mechdsl.resolve.findings import Finding
from mechdsl.resolve.types import ResolvedExperiment
from mechdsl.results.assembly.collection import (
    ExactRunner,
    add_base_observations,
    add_circuit_baselines,
    add_control,
    add_statistics,
    add_verdicts,
    add_verification,
    build_finding,
    build_lost_experiment,
    check_denominators,
    collect_result,
    drop_measures,
    name_observed_features,
)
from mechdsl.results.assembly.combination import (
    PromptSetResult,
    average_over_axis,
    merge_prompt_sets,
    merge_variants,
)
from mechdsl.results.assembly.population import add_population, check_explained_variance
from mechdsl.results.assembly.seed_means import add_statistics_over_seeds, describe_agreements
from mechdsl.results.experiment_result import (
    ExpectOutcome,
    ExperimentResult,
    FileResult,
    LostExperiment,
    SkippedExperiment,
    UndecidedExpectation,
)
from mechdsl.results.results import package_version
from mechdsl.rules.kinds import RULES, registered_words
from mechdsl.store.files import StoreProblem
from mechdsl.store.runs import OpenRun
from mechdsl.syntax.frontend import parse

MAX_LISTED_ROWS = 5
"""Maximum number of rows that a warning lists."""


@dataclass
class FileRun:
    """The experiments of a file during the run, in waves. A failure affects only the experiment and
    those that use its results."""

    checked: CheckedFile
    models: Mapping[str, LoadedModel]
    options: RunOptions
    sizes: PassSizer
    diagnostics: list[Diagnostic]
    kept: RunCache | None = None
    """Cache of values."""
    counts: RowCounts | None = None
    """Counter of computed rows."""
    results: dict[str, ExperimentResult] = field(default_factory=dict[str, ExperimentResult])
    lost: dict[str, list[Diagnostic]] = field(default_factory=dict[str, list[Diagnostic]])
    findings: dict[str, Finding] = field(default_factory=dict[str, Finding])
    _replied: dict[tuple[object, ...], tuple[PromptTable, tuple[PromptTable, list[Diagnostic]]]] = (
        field(default_factory=dict[Any, Any])
    )
    """By table and source of replies: the table, and the table with the replies."""
    failure: Exception | None = None
    """The last exception that ended an experiment."""
    before: int = 0
    """Rows of earlier waves, for a single progress bar."""

    def wave(self, wave: Sequence[ResolvedExperiment], later: Sequence[ResolvedExperiment]) -> None:
        """Run experiments whose results don't depend on pending ones. After a failure, each is run
        separately; one that fails again is lost (E0650).

        Raises:
            OSError: Then no experiment can be run.
            StoreProblem: Then no experiment can be run.
        """
        try:
            self.together(wave, later)
        except (OSError, StoreProblem):
            raise
        except Exception as failure:
            done = {*self.results, *self.lost}
            left = group_variants(each for each in wave if each.name not in done)
            if len(left) > 1:
                for variants in left:
                    self.wave(variants, later)
                return
            for experiment, *_ in left:
                self._lose(experiment.name, [self.broke_off(experiment, failure)])

    def broke_off(self, experiment: ResolvedExperiment, failure: Exception) -> Diagnostic:
        """Return E0650 for an experiment that an unexpected exception ended."""
        self.failure = failure
        reason = f"{type(failure).__name__}: {failure}"
        return ExperimentFailed(
            span=experiment.spec.span, experiment=experiment.name, reason=reason
        )

    def together(
        self, wave: Sequence[ResolvedExperiment], later: Sequence[ResolvedExperiment]
    ) -> None:
        """Run the experiments of a wave together; exceptions are passed on."""
        ready = [experiment for experiment in map(self.ready, wave) if experiment is not None]
        ready = [experiment for experiment in ready if experiment.name not in self.lost]
        if not ready:
            return
        plan = make_plan(ready, without=self.options.without)
        told = self._with_progress(later)
        execution = self._execute(plan, told)
        for experiment in ready:
            if experiment.key in execution.lost:
                self._lose(experiment.name, execution.lost[experiment.key])
        plans = {p.experiment.key: p for panel in plan.panels for p in panel.experiments}
        for variants in group_variants(ready):
            if variants[0].name not in self.lost:
                self._collect(variants, plans, execution)

    def _execute(self, plan: Plan, options: ExecutionOptions) -> Execution:
        """Execute a plan, and pass on its counts and diagnostics."""
        execution = execute(
            plan, self.models, options, self.kept, self.sizes, check=check_denominators
        )
        if self.counts is not None:
            self.counts.add(execution.profile)
        if self.options.on_profile is not None:
            self.options.on_profile(plan, execution.profile)
        self._say(execution.diagnostics)
        return execution

    def _say(self, found: Sequence[Diagnostic]) -> None:
        for problem in found:
            if problem not in self.diagnostics and not self._has_pick(problem):
                self.diagnostics.append(problem)

    def _has_pick(self, problem: Diagnostic) -> bool:
        """Whether W0751 is reported for the same pick in another cell, experiment or variant."""
        if not isinstance(problem, PickBySign):
            return False
        earlier = (
            diagnostic for diagnostic in self.diagnostics if isinstance(diagnostic, PickBySign)
        )
        return any(
            (diagnostic.span, diagnostic.of) == (problem.span, problem.of) for diagnostic in earlier
        )

    def _lose(self, name: str, reasons: Sequence[Diagnostic]) -> None:
        self._say(reasons)
        problems = self.lost.setdefault(name, [])
        problems += [reason for reason in reasons if reason not in problems]

    def ready(self, experiment: ResolvedExperiment) -> ResolvedExperiment | None:
        """Return the experiment with results instead of placeholders; None if it is lost."""
        resolved = self._with_results(experiment)
        problem = None if resolved is None else find_image_problem(resolved, self.models)
        if problem is not None:
            self._lose(experiment.name, [problem])
            return None
        return resolved

    def _with_results(self, experiment: ResolvedExperiment) -> ResolvedExperiment | None:
        """As `ready`, of the results alone."""
        for name in experiment.spec.after:
            if name not in self.findings:
                what = "its result" if name in self.lost else "its first measure"
                lacking = MissingPickResult(
                    span=experiment.spec.span, experiment=experiment.name, of=name, what=what
                )
                self._lose(experiment.name, [lacking])
                return None
        has_store = self.options.store is not None
        untrained = find_untrained(
            experiment, self.checked.program, has_store=has_store, tried_all=self.options.fits
        )
        if untrained:
            self._lose(experiment.name, untrained)
            return None
        if not experiment.spec.after:
            return experiment
        experiment, problems = self._with_replies(experiment)
        errors = [problem for problem in problems if problem.severity == "error"]
        if errors:
            self._lose(experiment.name, errors)
            return None
        resolved, more = _with_findings(experiment, self.findings, self.checked.program)
        problems += more
        if resolved is not None:
            problems += check_modules([resolved], self.models)
        self._say([problem for problem in problems if problem.severity == "warning"])
        errors = [problem for problem in problems if problem.severity == "error"]
        if errors:
            self._lose(experiment.name, errors)
        if resolved is None and not errors:
            if experiment.spec.replies is not None and experiment.place is not None:
                return None  # the token occurs in no reply
            raise RuntimeError(f"nothing says why `{experiment.name}` can't be run")
        return None if errors else resolved

    def row_parts(self, experiment: ResolvedExperiment) -> RowParts | None:
        """Return the rows of an experiment that reads them in parts; None for others."""
        program, build, rows = self.checked.program, self.checked.part, experiment.table.block_rows
        block = program.prompts.get(experiment.table.name)
        if block is None or not block.streamed:
            return None
        assert build is not None
        assert rows is not None

        def part(ids: Sequence[int]) -> tuple[ResolvedExperiment | None, int]:
            made, again = build(experiment.table.name, experiment.model, ids), None
            problems = made.diagnostics
            if made.table is not None:
                table = replace(made.table, other_tables=experiment.table.other_tables)
                resolved = replace(experiment, table=table)
                again, more = _with_findings(resolved, self.findings, program)
                problems = [*problems, *more]
            errors = [problem for problem in problems if problem.severity == "error"]
            if errors:
                raise RowsRefused(errors)
            if again is None and made.table is not None:  # rows must never be dropped silently
                raise RuntimeError(f"nothing says why rows of `{experiment.name}` can't be read")
            return again, made.too_long

        limit, count = self.checked.settings.limit, rows.block.data_size
        count = count if limit is None else min(limit, count)
        return RowParts(count, part, self._parts_key(experiment, rows.block.data))

    def _parts_key(self, experiment: ResolvedExperiment, data: DataFile | None) -> bytes | None:
        """Return a digest of all that determines what is saved of rows that are read in parts; None
        if a model or code can't be hashed, or a basis is fitted on rows."""
        program, model = self.checked.program, self.models[experiment.model.key]
        bases = [save.basis for save in experiment.saves if save.basis is not None]
        identities = [compute_identity(model) for model in self.models.values()]
        fitted = any(True for basis in bases for _ in basis.fits)
        if None in identities or fitted or data is None:
            return None
        try:
            code = _code(self.checked)
            code |= {
                program_function.name: repr(program_function.read_code())
                for program_function in program_functions(program)
            }
        except CodeHashError:
            return None
        return digest(
            NUMERIC_VERSION,
            package_digest(),
            [package_version(package) for package in VERSIONED_PACKAGES],
            numeric_settings(),
            identities,
            [str(model.dtype), model.device.type, model.provenance.get("attention")],
            data.digest,
            [vector.digest for basis in bases for vector in basis.saved],
            [basis.coordinates[()].which for basis in bases],
            sorted(code.items()),
            sorted(experiment.picks.items()),
            [source.text for source in program.sources],
            sorted(program.parameters.items()),
        )

    def _with_replies(
        self, experiment: ResolvedExperiment
    ) -> tuple[ResolvedExperiment, list[Diagnostic]]:
        """Return the experiment with replies after its prompts, shared by variants with one
        table."""
        named, table = experiment.spec.replies, experiment.table
        if named is None:
            return experiment, []
        key = (id(table), named.span)
        if key not in self._replied:
            said = get_whole_spec(experiment)
            finding, model = self.findings[named.of], experiment.model
            self._replied[key] = (
                table,
                attach_replies(remove_replies(table), said, self.checked.program, finding, model),
            )
        replied, problems = self._replied[key][1]
        return replace(experiment, table=replied), list(problems)

    def _collect(
        self,
        variants: Sequence[ResolvedExperiment],
        plans: Mapping[str, ExperimentPlan],
        execution: Execution,
    ) -> None:
        """Compute the result of one experiment from all its variants."""
        first, measured = variants[0], execution.measured
        raw: list[ExperimentResult] = []
        for variant in variants:
            plan, profile = plans[variant.key], execution.profile
            experiment_result = collect_result(
                plan, measured[variant.key], self.models, profile, self.sizes
            )
            experiment_result = add_base_observations(
                experiment_result, plan, plans, measured, self.models
            )
            experiment_result = add_circuit_baselines(experiment_result, plan, plans, measured)
            raw.append(add_control(experiment_result, plan, measured))
        refused = {n: d for variant in variants for n, d in measured[variant.key].refused.items()}
        if len(refused) == len(first.measures):
            self._lose(first.name, list(refused.values()))
            return
        whole = drop_measures(_run_together(variants, raw), refused)
        if not whole.prompts:
            self._lose(first.name, [_nothing_left(first)])
            return
        if 0 not in refused:
            named = [name_observed_features(variant, measured[variant.key]) for variant in variants]
            parts = tuple(build_finding(*pair) for pair in zip(named, raw, strict=True))
            self.findings[first.name] = Finding(parts)
        if whole.left_out:
            self._say([_rows_left_out(variants, whole)])
        parameters = self.checked.program.parameters
        if parameters:
            said = {"parameters": _parameter_words(parameters)}
            whole = replace(whole, conventions={**whole.conventions, **said})
        over, seeds = first.spec.over, first.seeds
        if over is not None and not (seeds and over == SEED_AXIS):
            whole = average_over_axis(whole, over, area=first.spec.area)
        whole = replace(whole, selected=find_selections(variants))
        if seeds:
            whole = replace(
                whole, conventions={**whole.conventions, **describe_agreements(variants)}
            )
            result = add_statistics_over_seeds(whole, first.spec, first.seed, seeds)
        else:
            result = add_statistics(whole, first.spec, first.seed)
        if first.spec.estimator is not None and first.spec.estimator.verify is not None:
            try:
                result = add_verification(result, first, self._exact_runner(plans[first.key]))
            except _ExactCellsLost as lost:
                self._lose(first.name, lost.reasons)
                return
        self._say(_few_units(variants, result))
        self._say(_too_skewed(variants, result))
        self._say(check_explained_variance(result, first.spec, first.table.exhausted))
        self.results[first.name] = result

    def _exact_runner(self, plan: ExperimentPlan) -> ExactRunner:
        """Return a function that runs cells of an estimated experiment, given by their numbers in
        its result."""
        shape = (len(plan.coordinates), plan.n_cells)  # without axes, there is one cell
        indices = np.array(plan.coordinates, dtype=np.int64).reshape(shape).T[plan.exists]

        def run(cells: Ints) -> ExperimentResult:
            chosen = map(tuple, indices[np.sort(cells)].tolist())
            exact = select_exact_cells(plan.experiment, chosen)
            made = make_plan([exact], without=self.options.without)
            how = replace(self.options.execution, on_progress=None)
            execution = self._execute(made, how)
            measured = execution.measured.get(exact.key)
            lost = list(execution.lost.get(exact.key, ()))
            if lost or measured is None:
                raise _ExactCellsLost(lost)
            plans = {
                experiment.experiment.key: experiment
                for panel in made.panels
                for experiment in panel.experiments
            }
            experiment_plan = plans[exact.key]
            result = collect_result(
                experiment_plan, measured, self.models, execution.profile, self.sizes
            )
            result = add_circuit_baselines(result, experiment_plan, plans, execution.measured)
            result = drop_measures(_run_together([exact], [result]), measured.refused)
            return add_statistics(result, exact.spec, exact.seed)

        return run

    def _with_progress(self, later: Sequence[ResolvedExperiment]) -> ExecutionOptions:
        """Return the options of one wave for a single progress bar; the rows of later waves are
        counted with placeholders."""
        options = self.options.execution
        tell = options.on_progress
        if tell is None or (not later and not self.before):
            return options
        panels = make_plan(later).panels
        left = sum(experiment.count() for panel in panels for experiment in panel.experiments)
        before = self.before

        def advance(done: int, total: int) -> None:
            self.before = before + done
            tell(before + done, before + total + left)

        return replace(options, on_progress=advance)


class _ExactCellsLost(Exception):
    """Raised if cells that `verify` runs can't be computed."""

    def __init__(self, reasons: Sequence[Diagnostic]) -> None:
        super().__init__(*reasons)
        self.reasons = reasons


def _run_together(
    variants: Sequence[ResolvedExperiment], raw: Sequence[ExperimentResult]
) -> ExperimentResult:
    """Combine the results of all variants, and add the population of their rows."""
    blocks: dict[object, list[int]] = {}
    for number, variant in enumerate(variants):
        blocks.setdefault(dict(variant.spec.variant).get(PROMPTS_AXIS), []).append(number)
    results: list[PromptSetResult] = []
    for label, numbers in blocks.items():
        first = variants[numbers[0]]
        whole = merge_variants([(variants[n].spec.variant, raw[n]) for n in numbers])
        whole = add_population(whole, first.table, first.spec.statistics)
        results.append(PromptSetResult(((PROMPTS_AXIS, str(label)),), first.table.name, whole))
    if len(results) == 1:
        return results[0].result
    return merge_variants(merge_prompt_sets(results))


def _rows_left_out(variants: Sequence[ResolvedExperiment], result: ExperimentResult) -> Diagnostic:
    """Return W0750."""
    experiment = variants[0]
    every = {(variant.table.name, row) for variant in variants for row in variant.table.row_ids}
    out = list(result.left_out.items())
    listed = ", ".join(f"row {row} ({where})" for row, where in out[:MAX_LISTED_ROWS])
    more = f" … and {len(out) - MAX_LISTED_ROWS} more" if len(out) > MAX_LISTED_ROWS else ""
    return RowsLeftOut(
        span=experiment.spec.span,
        experiment=experiment.name,
        count=len(out),
        rows=len(every),
        listed=f"{listed}{more}",
    )


def _parameter_words(parameters: Mapping[str, object]) -> str:
    """Format the value of every `param`, which `--set` may have changed."""
    texts = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in parameters.items()}
    return ", ".join(f"{name} = {text}" for name, text in texts.items())


def _nothing_left(experiment: ResolvedExperiment) -> Diagnostic:
    """Return E0613 if the models share no rows."""
    keep = experiment.spec.keep
    span = keep[0].span if keep else experiment.spec.span
    return NoRowsKept(span=span, rows=len(experiment.table))


def _few_units(
    variants: Sequence[ResolvedExperiment], result: ExperimentResult
) -> list[Diagnostic]:
    """Return W0720 for cells that turn out to have too few prompts or groups; checks before the run
    cover all rows."""
    first = variants[0]
    tested = tested_measures(first)
    if not tested or check_reachable_p(variants):
        return []
    counted = [statistic.tested & ~statistic.repeated for statistic in result.statistics]
    units = [
        n
        for statistic, mask in zip(result.statistics, counted, strict=True)
        for n in statistic.units[mask].tolist()
    ]
    tables = {id(variant.table): variant.table for variant in variants}
    fewer = first.spec.keep if result.prompts < sum(map(len, tables.values())) else ()
    return check_cell_units(
        units,
        first.spec.statistics,
        (fewer or tested)[0].span,
        row_unit(first),
        measured=True,
    )


def _too_skewed(
    variants: Sequence[ResolvedExperiment], result: ExperimentResult
) -> list[Diagnostic]:
    """Return W0723 if the p of some measures isn't corrected."""
    pairs = zip(result.measures, result.statistics, strict=True)
    skewed = [(data, statistics) for data, statistics in pairs if statistics.withheld == "skewed"]
    if not skewed:
        return []
    tested = tested_measures(variants[0])
    named = {(data.label, data.effect) for data, _ in skewed}
    first = next(
        (measure for measure in tested if (measure.label, measure.effect) in named), tested[0]
    )
    units = np.concatenate(
        [statistics.units[statistics.tested & ~statistics.repeated] for _, statistics in skewed]
    )
    return [
        SkewedFamily(
            span=first.span,
            experiment=result.name,
            cells=len(units),
            units=int(np.median(units)),
            unit=row_unit(variants[0]),
        )
    ]


def iterate_waves(
    experiments: Sequence[ResolvedExperiment], *, one_by_one: bool = False
) -> Iterator[tuple[list[ResolvedExperiment], list[ResolvedExperiment]]]:
    """Yield (experiments whose results don't depend on pending ones, the remaining experiments)
    until all are run.

    Args:
        one_by_one: Yield only the first of them each time, with all its variants.
    """
    left = list(experiments)
    while left:
        names = {experiment.name for experiment in left}
        wave = [experiment for experiment in left if names.isdisjoint(experiment.spec.after)]
        if one_by_one:
            wave = [experiment for experiment in wave if experiment.name == wave[0].name]
        now = {
            experiment.name for experiment in wave
        }  # keeps the variants of an experiment together
        later = [experiment for experiment in left if experiment.name not in now]
        yield wave, later
        left = later


def _with_findings(
    experiment: ResolvedExperiment, findings: Mapping[str, Finding], program: spec.Program
) -> tuple[ResolvedExperiment | None, list[Diagnostic]]:
    """Replace an experiment's placeholders by other experiments' results."""
    own = {name: findings[name] for name in experiment.spec.after}
    again, said = resolve_experiment(
        get_whole_spec(experiment), program, experiment.model, experiment.table, RULES, own
    )
    if again is not None:
        parts = split_by_group(again)
        again = next((p for p in parts if p.spec.variant == experiment.spec.variant), None)
    # Other warnings are already reported.
    return again, [d for d in said if d.severity == "error" or isinstance(d, PickBySign)]


class FailFastVerdicts:
    """The verdicts of a file whose experiments run one by one, until a verdict ends the run."""

    def __init__(
        self, run: FileRun, experiments: Sequence[spec.Experiment], options: RunOptions
    ) -> None:
        """Store the state; `experiments` are the reported ones, once each, in source order."""
        self.run = run
        self.experiments = experiments
        self.ends = options.ends
        self.decided: dict[str, dict[int, ExpectOutcome]] = {}
        self.stopped = False

    def stop(self) -> bool:
        """Decide what can be decided now; return whether it ends the run (only with
        `fail_fast`)."""
        if self.ends is None:
            return False
        for experiment in self.experiments:
            if experiment.name in self.run.lost:
                lost = build_lost_experiment(experiment, self.run.lost[experiment.name])
                self.decided[experiment.name] = dict(enumerate(lost.outcomes))
            elif experiment.name in self.run.results:
                self._decide(experiment)
            else:
                continue
            if self.ends(self.run.checked.source.name, experiment.name, self._of(experiment.name)):
                self.stopped = True
        return self.stopped

    def _decide(self, experiment: spec.Experiment) -> None:
        """Decide the experiment's expectations that could not be decided before."""
        known = self.decided.setdefault(experiment.name, {})
        waiting = self._waiting()
        labels = [measure.label for measure in experiment.measures]
        ready = [
            number
            for number, expect in enumerate(experiment.expects)
            if number not in known and waiting.isdisjoint(expectation_experiments(expect, labels))
        ]
        if experiment.statistics.verdicts != "none" and len(ready) < len(experiment.expects):
            return  # corrected verdicts are decided together
        asked = experiment.model_copy(
            update={"expects": tuple(experiment.expects[number] for number in ready)}
        )
        run = self.run
        result = add_verdicts(run.results[experiment.name], asked, run.results, run.lost)
        known.update(zip(ready, result.outcomes, strict=True))

    def _waiting(self) -> set[str]:
        """Return the experiments of the file that haven't run yet."""
        every = {experiment.name for experiment in self.run.checked.experiments}
        return every - self.run.results.keys() - self.run.lost.keys()

    def _of(self, name: str) -> tuple[ExpectOutcome, ...]:
        known = self.decided.get(name, {})
        return tuple(known[number] for number in sorted(known))

    def results(self) -> tuple[ExperimentResult, ...]:
        """Return the results with their verdicts."""
        run = self.run
        return tuple(
            replace(run.results[e.name], outcomes=self._of(e.name))
            if self.ends is not None
            else add_verdicts(run.results[e.name], e, run.results, run.lost)
            for e in self.experiments
            if e.name in run.results
        )

    def lost(self) -> tuple[LostExperiment, ...]:
        """Return the experiments that could not be computed."""
        lost = self.run.lost
        return tuple(
            build_lost_experiment(e, lost[e.name]) for e in self.experiments if e.name in lost
        )

    def not_run(self) -> tuple[SkippedExperiment, ...]:
        """Return what was skipped after the verdict that ended the run."""
        if not self.stopped:
            return ()
        waiting = self._waiting()
        left: list[SkippedExperiment] = []
        for experiment in self.experiments:
            known = self.decided.get(experiment.name, {})
            expects = tuple(
                UndecidedExpectation(expect.text, expect.span.line)
                for number, expect in enumerate(experiment.expects)
                if number not in known
            )
            if expects or experiment.name in waiting:
                left.append(SkippedExperiment(experiment.name, expects))
        return tuple(left)


def open_value_cache(
    run: OpenRun, checked: CheckedFile, models: Mapping[str, LoadedModel], options: RunOptions
) -> RunCache:
    """Open the cache of a run's values. Models that can't be identified are excluded."""
    try:
        code = _code(checked)
    except CodeHashError:
        return RunCache(run, {})
    merged = any(m.is_loaded and m.base for m in checked.program.models.values())
    packages = (*VERSIONED_PACKAGES, "peft") if merged else VERSIONED_PACKAGES
    images = any(block.has_images for block in checked.program.prompts.values())
    packages = (*packages, "pillow") if images else packages
    common = digest(
        NUMERIC_VERSION,
        [package_version(package) for package in packages],
        numeric_settings(),
        sorted(options.without),
        options.execution.side,
        code,
    )
    caches: dict[str, bytes] = {}
    for name, model in models.items():
        identity = compute_identity(model)
        if identity is not None:
            attention = model.provenance.get("attention")
            caches[name] = digest(common, identity, str(model.dtype), model.device.type, attention)
    return RunCache(run, caches)


def _code(checked: CheckedFile) -> dict[str, str]:
    """Hash the user's code that may affect numbers: modules that extend the language, and imports
    of the file's functions. The functions themselves are in the keys of the values that depend on
    them."""
    hashes = hash_imported_code(
        [program_function.read_code() for program_function in program_functions(checked.program)]
    )
    return hashes | hash_extension_code()


def check_with_models(
    source: Source, settings: CheckSettings, models: GivenModels
) -> tuple[CheckedFile, dict[str, LoadedModel]]:
    """Check a file with models from Python, which replace its own models of the same name.

    Adds E0201 for names that the file doesn't define, and errors of the models.
    """
    words = registered_words()
    syntax, found = parse(source, words)
    declared = lower_program(syntax, source, words, settings.parameters)[0].models
    # Before the slow verification of a model. A broken line may be its definition.
    unknown = [name for name in models if name not in declared] if not found else []
    passed = {name: pair for name, pair in models.items() if name in declared}
    loaded, diagnostics = adopt_models(passed, declared)
    settings = replace(settings, build=build_model)
    checked = check_source(source, settings, build_model_contexts(source, loaded))
    refused = models.keys() - loaded.keys()
    said = [_no_such_model(name, declared) for name in unknown]
    # Errors of a rejected model suppress those of the file's own model of that name.
    own = [d for d in checked.diagnostics if getattr(d, "model", None) not in refused]
    if refused & declared.keys():  # the checks used the file's own model
        own = filter_certain(own, ("shape", "tokens"))
    checked.diagnostics = [*said, *diagnostics, *own]
    return checked, loaded


def _no_such_model(name: str, declared: Collection[str]) -> Diagnostic:
    listed = name_list(declared)
    known = f"the file's models are {listed}" if listed else "the file has no `model` line"
    return UnknownName(kind="model", name=name, hint=did_you_mean(name, declared, known))


def run_checked(
    checked: CheckedFile,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel] | None = None,
    *,
    run: OpenRun | None = None,
    counts: RowCounts | None = None,
    hashed: FileHasher | None = hash_file,
    notes: NoteStore | None = None,
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Run a checked file; diagnostics of the check aren't repeated.

    Args:
        run: Cache of values.
        counts: Counter of computed rows.
        hashed: Computes SHA-256 of a file; None to hash no weights.
        notes: Cache for outcomes of the self-check, besides the user's cache.
    """
    with computation_settings():
        models, diagnostics = load_needed_models(checked, options, loaded, hashed, notes)
        if models is None:
            return None, diagnostics
        kept = None if run is None else open_value_cache(run, checked, models, options)
        return _run(checked, models, options, diagnostics, kept, counts)


def measure_unpatched(
    checked: CheckedFile, options: RunOptions, loaded: Mapping[str, LoadedModel] | None = None
) -> tuple[dict[str, MeasuredValues], list[Diagnostic]]:
    """Measure tested experiments on their base and source runs, by key. No rule is applied, and
    what can't be measured is omitted."""
    unpatched = [_without_rules(e) for e in checked.experiments if e.rules]
    models, diagnostics = load_needed_models(checked, options, loaded)
    if models is None or not unpatched:
        return {}, diagnostics
    with computation_settings():
        usable: list[ResolvedExperiment] = []
        for experiment in unpatched:
            problem = find_image_problem(experiment, models)
            if problem is None:
                usable.append(experiment)
            elif problem not in diagnostics:
                diagnostics.append(problem)
        if not usable:
            return {}, diagnostics
        plan = make_plan(usable, without=options.without)
        execution = execute(plan, models, options.execution, check=check_denominators)
    found = {key: values for key, values in execution.measured.items() if key not in execution.lost}
    return found, [*diagnostics, *execution.diagnostics]


def _without_rules(experiment: ResolvedExperiment) -> ResolvedExperiment:
    """Return an experiment with the same prompts and metrics on its base and source run only."""
    definition = experiment.spec
    effect = "raw" if definition.source is None else "total"
    measures = tuple(
        measure.model_copy(update={"effect": effect, "per_prompt": False})
        for measure in definition.measures
    )
    without = {
        "rules": (),
        "measures": measures,
        "expects": (),
        "reports": (),
        "after": (),
        "against": None,
    }
    return replace(
        experiment,
        spec=definition.model_copy(update=without),
        rules=(),
        accuracies={},
        control=None,
    )


def _run(
    checked: CheckedFile,
    models: Mapping[str, LoadedModel],
    options: RunOptions,
    diagnostics: list[Diagnostic],
    kept: RunCache | None,
    counts: RowCounts | None,
) -> tuple[FileResult | None, list[Diagnostic]]:
    sizes = None if kept is None else kept.sizes
    if sizes is None:
        sizes = choose_pass_sizes(checked.experiments, models, options.execution)
    file = FileRun(checked, models, options, sizes, diagnostics, kept, counts)
    every = [variants[0] for variants in group_variants(checked.experiments)]
    known = {experiment.name for experiment in (*every, *checked.saving)}
    unsaid = [experiment.name for experiment in checked.reported if experiment.name not in known]
    if unsaid:  # an experiment must never be dropped silently
        raise RuntimeError(f"nothing says why `{unsaid[0]}` can't be run")
    reported = [e.spec for e in every if e.name not in checked.unreported]
    verdicts = FailFastVerdicts(file, reported, options)
    for wave, later in iterate_waves(checked.experiments, one_by_one=options.ends is not None):
        file.wave(wave, later)
        if verdicts.stop():
            break
    not_run = verdicts.not_run()
    saved: list[SavedFile] = []
    for experiment in checked.saving if not not_run else ():
        try:
            ready = file.ready(experiment)
            if ready is None:
                continue
            saved_files, problems = save_vectors(ready, models, options.execution)
            parts = file.row_parts(ready)
            rows, saving_problems = save_feature_rows(ready, models, options.execution, parts)
            saved_files, problems = [*saved_files, *rows], [*problems, *saving_problems]
        except OSError:
            raise
        except Exception as failure:
            saved_files, problems = [], [file.broke_off(experiment, failure)]
        saved += saved_files
        file.diagnostics.extend(problems)
    if file.lost and not file.results and not not_run and not saved:
        if file.failure is not None:  # no other experiment would be lost
            raise file.failure
        return None, file.diagnostics
    # Verdicts come last: an expectation may name a later experiment of the file.
    result = FileResult(
        file=checked.source.name,
        experiments=verdicts.results(),
        hash=sha256(checked.source.text.encode()).hexdigest(),
        seed=checked.program.seed,
        sizes=sizes.kept,
        lost=verdicts.lost(),
        not_run=not_run,
        saved=tuple(saved),
    )
    return result, file.diagnostics
