"""The whole way of a file: check, load, plan, execute, collect, finish."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from mechdsl.base.names import name_list
from mechdsl.base.source import Source
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e02_names import BadCommandLine, UnknownName, did_you_mean
from mechdsl.diagnostics.e06_experiment import NothingKept
from mechdsl.diagnostics.e06_numbers import NothingToPickFrom, PickedBySign, RowsLeftOut
from mechdsl.execute.execute import Execution, Options, execute, sizes_of
from mechdsl.execute.measured_values import MeasuredValues
from mechdsl.execute.pass_size import Sizes
from mechdsl.execute.profile import Profile
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.loading.build import build
from mechdsl.loading.devices import device_problem
from mechdsl.loading.file_models import Models, adopt_models, contexts, load_models, not_there
from mechdsl.plan.make_plan import make_plan
from mechdsl.plan.passes import unknown_passes
from mechdsl.plan.plan import ExperimentPlan, Plan
from mechdsl.program import spec
from mechdsl.program.lower_file import lower_program
from mechdsl.resolve.findings import Finding
from mechdsl.resolve.resolve_experiment import resolve_experiment
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.results.collect import collect, versions, with_control, without_measures
from mechdsl.results.denominators import check_denominators
from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.results.explained_by_values import explained_by_values
from mechdsl.results.finish import lost_experiment, with_statistics, with_verdicts
from mechdsl.results.make_finding import found_by
from mechdsl.results.population import with_population
from mechdsl.results.results import Results
from mechdsl.results.store import Store
from mechdsl.results.variants import merged
from mechdsl.rules import RULES
from mechdsl.syntax.parse import parse
from mechdsl.validate.check_file import Checked, Settings, by_name, check_source
from mechdsl.validate.reachable_p import check_cells, check_rows, tested_measures

LISTED = 5
"""Rows that a warning names."""


@dataclass(frozen=True)
class RunOptions:
    """How a file is run; nothing here changes what it means."""

    settings: Settings = field(default_factory=Settings)
    device: str = "auto"
    dtype: str | None = None
    offload: Path | None = None
    """Folder for weights that fit into no device and not into memory, with accelerate."""
    out: Path | None = None
    without: frozenset[str] = frozenset()
    """Graph and plan passes that are switched off."""
    execution: Options = field(default_factory=Options)
    on_profile: Callable[[Plan, Profile], None] | None = None
    """Takes what was planned and what was done, after the run."""


def run_source(
    source: Source, options: RunOptions | None = None, models: Models | None = None
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Check and run one file; None where it, its data or its model is wrong, or none of its
    experiments could be computed. A part that could not be is in the result's `lost` and `missing`,
    and its reason among the diagnostics, as an error."""
    options = options or RunOptions()
    checked, loaded = check_with_models(source, options.settings, models or {})
    if has_errors(checked.diagnostics):
        return None, checked.diagnostics
    result, found = run_checked(checked, options, loaded)
    return result, [*checked.diagnostics, *found]


def check_with_models(
    source: Source, settings: Settings, models: Models
) -> tuple[Checked, dict[str, LoadedModel]]:
    """Check a file with models of Python's in place of those that it declares by these names.

    Adds E0201 for names that the file doesn't define, and what is wrong with the models.
    """
    syntax, found = parse(source)
    declared = lower_program(syntax, source, settings.parameters)[0].models
    # Before a model is proved, which takes a while; a broken line may be the one that defines it.
    unknown = [name for name in models if name not in declared] if not found else []
    loaded, diagnostics = adopt_models({n: pair for n, pair in models.items() if n in declared})
    settings = replace(settings, build=build)
    checked = check_source(source, settings, contexts(source, loaded))
    refused = models.keys() - loaded.keys()
    said = [_no_such_model(name, declared) for name in unknown]
    # What the file declares under the name of a model that is refused isn't missed.
    own = [d for d in checked.diagnostics if getattr(d, "model", None) not in refused]
    checked.diagnostics = [*said, *diagnostics, *own]
    return checked, loaded


def _no_such_model(name: str, declared: Collection[str]) -> Diagnostic:
    listed = name_list(declared)
    known = f"the file's models are {listed}" if listed else "the file has no `model` line"
    return UnknownName(kind="model", name=name, hint=did_you_mean(name, declared, known))


def run_checked(
    checked: Checked, options: RunOptions, loaded: Mapping[str, LoadedModel] | None = None
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Run a file that was checked. Its own diagnostics are not repeated."""
    models, diagnostics = _models_of(checked, options, loaded)
    if models is None:
        return None, diagnostics
    return _run(checked, models, options, diagnostics)


def measure_unpatched(
    checked: Checked, options: RunOptions, loaded: Mapping[str, LoadedModel] | None = None
) -> tuple[dict[str, MeasuredValues], list[Diagnostic]]:
    """The metrics of tested experiments on their base and source runs, by the experiments' keys;
    no rule is applied, and what can't be measured is left out."""
    unpatched = [_without_rules(e) for e in checked.experiments if e.rules]
    models, diagnostics = _models_of(checked, options, loaded)
    if models is None or not unpatched:
        return {}, diagnostics
    plan = make_plan(unpatched, without=options.without)
    execution = execute(plan, models, options.execution, check=check_denominators)
    found = {key: values for key, values in execution.measured.items() if key not in execution.lost}
    return found, [*diagnostics, *execution.diagnostics]


def _without_rules(experiment: ResolvedExperiment) -> ResolvedExperiment:
    """The same prompts and metrics, of the base run and, where there is one, of the source run."""
    own = experiment.spec
    effect = "raw" if own.source is None else "total"
    measures = tuple(
        each.model_copy(update={"effect": effect, "per_prompt": False}) for each in own.measures
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
        spec=own.model_copy(update=without),
        rules=(),
        accuracies={},
        control=None,
    )


def _models_of(
    checked: Checked, options: RunOptions, loaded: Mapping[str, LoadedModel] | None
) -> tuple[dict[str, LoadedModel] | None, list[Diagnostic]]:
    """The models of a checked file, with their weights; None where one can't be had."""
    diagnostics = check_options(options)
    if has_errors(diagnostics):
        return None, diagnostics
    models = {**cast("dict[str, LoadedModel]", checked.built), **(loaded or {})}
    diagnostics.extend(
        load_models(
            checked, models, device=options.device, dtype=options.dtype, offload=options.offload
        )
    )
    if not has_errors(diagnostics):
        diagnostics.extend(not_there(checked.experiments, models))
    return (None if has_errors(diagnostics) else models), diagnostics


def _run(
    checked: Checked,
    models: Mapping[str, LoadedModel],
    options: RunOptions,
    diagnostics: list[Diagnostic],
) -> tuple[FileResult | None, list[Diagnostic]]:
    sizes = sizes_of(checked.experiments, models, options.execution)
    store = None if options.out is None else Store(options.out, checked.source.stem)
    run = _FileRun(checked, models, options, sizes, store, diagnostics)
    try:
        for wave, later in _waves(checked.experiments):
            run.wave(wave, later)
    finally:
        if store is not None:
            store.close()
    if run.lost and not run.results:
        return None, run.diagnostics
    # Verdicts last: an expectation may name an experiment that comes later in the file.
    every = [variants[0] for variants in by_name(checked.experiments)]
    reported = [e for e in every if e.name not in checked.unreported]
    result = FileResult(
        file=checked.source.name,
        experiments=tuple(
            with_verdicts(run.results[e.name], e.spec, run.results, run.lost)
            for e in reported
            if e.name in run.results
        ),
        hash=sha256(checked.source.text.encode()).hexdigest(),
        seed=checked.program.seed,
        sizes=sizes.kept,
        lost=tuple(
            lost_experiment(e.spec, run.lost[e.name]) for e in reported if e.name in run.lost
        ),
    )
    if store is not None:
        store.finish(Results((result,), versions()).to_json())
    return result, run.diagnostics


@dataclass
class _FileRun:
    """A file's experiments while they run, in waves. One that can't be computed costs itself and
    those that pick from it."""

    checked: Checked
    models: Mapping[str, LoadedModel]
    options: RunOptions
    sizes: Sizes
    store: Store | None
    diagnostics: list[Diagnostic]
    results: dict[str, ExperimentResult] = field(default_factory=dict[str, ExperimentResult])
    lost: dict[str, list[Diagnostic]] = field(default_factory=dict[str, list[Diagnostic]])
    findings: dict[str, Finding] = field(default_factory=dict[str, Finding])
    before: int = 0
    """Rows of earlier waves, for the one bar over all of them."""

    def wave(self, wave: Sequence[ResolvedExperiment], later: Sequence[ResolvedExperiment]) -> None:
        """Run experiments whose results hang on none that is still to be run."""
        ready = [each for each in map(self._ready, wave) if each is not None]
        ready = [each for each in ready if each.name not in self.lost]
        if not ready:
            return
        plan = make_plan(ready, without=self.options.without)
        if self.store is not None:
            for panel in plan.panels:
                for experiment in panel.experiments:
                    self.store.open(experiment)
        told = self._with_progress(later)
        execution = execute(
            plan, self.models, told, self.store, self.sizes, check=check_denominators
        )
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
        found, problems = _with_findings(experiment, self.findings, self.checked.program)
        if found is not None:
            problems += not_there([found], self.models)
        self._say([each for each in problems if each.severity == "warning"])
        errors = [each for each in problems if each.severity == "error"]
        if errors:
            self._lose(experiment.name, errors)
        return None if errors else found

    def _collect(
        self,
        variants: Sequence[ResolvedExperiment],
        plans: Mapping[str, ExperimentPlan],
        execution: Execution,
    ) -> None:
        """The result of one experiment, all variants together."""
        first, measured = variants[0], execution.measured
        raw = [
            with_control(
                collect(
                    plans[each.key],
                    measured[each.key],
                    self.models,
                    execution.profile,
                    self.sizes,
                ),
                plans[each.key],
                measured,
            )
            for each in variants
        ]
        refused = {n: d for each in variants for n, d in measured[each.key].refused.items()}
        if len(refused) == len(first.measures):
            self._lose(first.name, list(refused.values()))
            return
        labels = [each.spec.variant for each in variants]
        whole = without_measures(merged(list(zip(labels, raw, strict=True))), refused)
        if not whole.prompts:
            self._lose(first.name, [_nothing_left(first)])
            return
        if 0 not in refused:
            parts = tuple(found_by(*pair) for pair in zip(variants, raw, strict=True))
            self.findings[first.name] = Finding(parts)
        if whole.left_out:
            self._say([_rows_left_out(first, whole)])
        parameters = self.checked.program.parameters
        if parameters:
            said = {"parameters": _parameter_words(parameters)}
            whole = replace(whole, conventions={**whole.conventions, **said})
        whole = with_population(whole, first.table, first.spec.statistics)
        result = with_statistics(whole, first.spec, first.seed)
        self._say(_few_units(variants, result))
        self._say(explained_by_values(result, first.spec))
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


def _rows_left_out(experiment: ResolvedExperiment, result: ExperimentResult) -> Diagnostic:
    """W0750."""
    rows = list(result.left_out.items())
    listed = ", ".join(f"row {row} ({where})" for row, where in rows[:LISTED])
    more = f" … and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
    return RowsLeftOut(
        span=experiment.spec.span,
        experiment=experiment.name,
        count=len(rows),
        rows=len(experiment.table),
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
    if not tested or check_rows(variants, first.table.row_ids):
        return []
    units = [n for each in result.statistics for n in each.units[each.tested].tolist()]
    fewer = first.spec.keep if result.prompts < len(first.table) else ()
    return check_cells(units, first.spec.statistics, (fewer or tested)[0].span)


def _waves(
    experiments: Sequence[ResolvedExperiment],
) -> Iterator[tuple[list[ResolvedExperiment], list[ResolvedExperiment]]]:
    """(experiments whose results don't hang on one that is still to be run, those that come after
    them), until all are run."""
    left = list(experiments)
    while left:
        names = {each.name for each in left}
        later = [each for each in left if not names.isdisjoint(each.spec.after)]
        yield [each for each in left if names.isdisjoint(each.spec.after)], later
        left = later


def _with_findings(
    experiment: ResolvedExperiment, found: Mapping[str, Finding], program: spec.Program
) -> tuple[ResolvedExperiment | None, list[Diagnostic]]:
    """An experiment with what others have found, in place of what stood in for it."""
    own = {name: found[name] for name in experiment.spec.after}
    again, said = resolve_experiment(
        experiment.spec, program, experiment.model, experiment.table, RULES, own
    )
    # Other warnings have been said.
    return again, [d for d in said if d.severity == "error" or isinstance(d, PickedBySign)]


def check_options(options: RunOptions) -> list[Diagnostic]:
    """E0208 for devices and passes that don't exist, folders that can't be written to, and a
    library that isn't installed."""
    found = unknown_passes(sorted(options.without))
    problem = device_problem(options.device)
    if problem is not None:
        found.append(
            BadCommandLine(
                reason=f"`--device {options.device}`: {problem}",
                hint="write `auto`, `cpu`, `cuda` or `cuda:0`",
            )
        )
    for option, folder in (("--out", options.out), ("--offload", options.offload)):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = f"`{option} {folder}`: {(error.strerror or str(error)).lower()}"
            hint = "name a folder that may be written to; it is made where there is none"
            found.append(BadCommandLine(reason=reason, hint=hint))
    if options.offload is not None and find_spec("accelerate") is None:
        reason = "`--offload` needs accelerate, which isn't installed"
        hint = "`pip install 'mechdsl[offload]'` installs it"
        found.append(BadCommandLine(reason=reason, hint=hint))
    return found
