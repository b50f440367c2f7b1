"""A checked file, computed: load, plan, execute, collect, finish."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, cast

import numpy as np

from mechdsl.base.hashing import digest
from mechdsl.base.records import EXTERNAL_MODULES
from mechdsl.base.runtime import numeric_settings
from mechdsl.base.source import Source
from mechdsl.base.text import name_list
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source, group_variants
from mechdsl.checks.p_values import check_cell_units, check_reachable_p, row_unit, tested_measures
from mechdsl.checks.prompt_tables import attach_replies
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.experiments import ExperimentFailed, NoRowsKept
from mechdsl.diagnostics.names import UnknownName
from mechdsl.diagnostics.statistics import MissingPickResult, PickBySign, RowsLeftOut, SkewedFamily
from mechdsl.execute.cache import RunCache
from mechdsl.execute.measurement.values import MeasuredValues
from mechdsl.execute.pass_layout import PassSizer
from mechdsl.execute.run.panel import Execution, choose_pass_sizes, execute
from mechdsl.execute.run.vector_files import save_vectors
from mechdsl.execute.run_record import NUMERIC_VERSION, ExecutionOptions, RowCounts, SavedFile
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.anatomy_proof import NoteStore
from mechdsl.loading.devices import explain_device_problem
from mechdsl.loading.identity import compute_identity
from mechdsl.loading.loader import (
    GivenModels,
    add_tower_views,
    adopt_models,
    build_model,
    build_model_contexts,
    check_modules,
    load_models,
)
from mechdsl.models.folder import FileHasher, hash_file
from mechdsl.pipeline.options import RunOptions, check_folders
from mechdsl.planner.passes import check_pass_names, make_plan
from mechdsl.planner.plan import ExperimentPlan
from mechdsl.program import spec
from mechdsl.program.code_hashes import CodeHashError, hash_imported_code, hash_module_code
from mechdsl.program.lowering import lower_program
from mechdsl.program.plugins import hash_plugin_code
from mechdsl.program.python_functions import program_functions
from mechdsl.program.run_order import expectation_experiments
from mechdsl.program.spec import PROMPTS_AXIS
from mechdsl.prompts.other_runs import remove_replies
from mechdsl.prompts.rows import PromptTable
from mechdsl.resolve.expansion import find_selections, get_whole_spec, split_by_group
from mechdsl.resolve.experiment import resolve_experiment
from mechdsl.resolve.findings import Finding
from mechdsl.resolve.types import ResolvedExperiment
from mechdsl.results.assembly.collection import (
    add_base_observations,
    add_control,
    add_statistics,
    add_verdicts,
    build_finding,
    build_lost_experiment,
    check_denominators,
    collect_result,
    drop_measures,
)
from mechdsl.results.assembly.combination import (
    PromptSetResult,
    average_over_axis,
    merge_prompt_sets,
    merge_variants,
)
from mechdsl.results.assembly.population import add_population, check_explained_variance
from mechdsl.results.experiment_result import (
    ExpectOutcome,
    ExperimentResult,
    FileResult,
    LostExperiment,
    SkippedExperiment,
    UndecidedExpectation,
)
from mechdsl.results.results import package_version
from mechdsl.rules.kinds import RULES
from mechdsl.store.index import StoreProblem
from mechdsl.store.runs import OpenRun
from mechdsl.syntax.frontend import parse

MAX_LISTED_ROWS = 5
"""Rows that a warning names."""


@dataclass
class FileRun:
    """A file's experiments while they run, in waves. One that can't be computed costs itself and
    those that pick from it."""

    checked: CheckedFile
    models: Mapping[str, LoadedModel]
    options: RunOptions
    sizes: PassSizer
    diagnostics: list[Diagnostic]
    kept: RunCache | None = None
    """Where values are looked up and kept."""
    counts: RowCounts | None = None
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
            left = group_variants(each for each in wave if each.name not in done)
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
        return ExperimentFailed(
            span=experiment.spec.span, experiment=experiment.name, reason=reason
        )

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
        for variants in group_variants(ready):
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
                lacking = MissingPickResult(
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
            problems += check_modules([found], self.models)
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
        """The result of one experiment, all variants together."""
        first, measured = variants[0], execution.measured
        raw: list[ExperimentResult] = []
        for each in variants:
            plan, profile = plans[each.key], execution.profile
            own = collect_result(plan, measured[each.key], self.models, profile, self.sizes)
            own = add_base_observations(own, plan, plans, measured, self.models)
            raw.append(add_control(own, plan, measured))
        refused = {n: d for each in variants for n, d in measured[each.key].refused.items()}
        if len(refused) == len(first.measures):
            self._lose(first.name, list(refused.values()))
            return
        whole = drop_measures(_run_together(variants, raw), refused)
        if not whole.prompts:
            self._lose(first.name, [_nothing_left(first)])
            return
        if 0 not in refused:
            parts = tuple(build_finding(*pair) for pair in zip(variants, raw, strict=True))
            self.findings[first.name] = Finding(parts)
        if whole.left_out:
            self._say([_rows_left_out(variants, whole)])
        parameters = self.checked.program.parameters
        if parameters:
            said = {"parameters": _parameter_words(parameters)}
            whole = replace(whole, conventions={**whole.conventions, **said})
        if first.spec.over is not None:
            whole = average_over_axis(whole, first.spec.over, area=first.spec.area)
        whole = replace(whole, selected=find_selections(variants))
        result = add_statistics(whole, first.spec, first.seed)
        self._say(_few_units(variants, result))
        self._say(_too_skewed(variants, result))
        self._say(check_explained_variance(result, first.spec, first.table.exhausted))
        self.results[first.name] = result

    def _with_progress(self, later: Sequence[ResolvedExperiment]) -> ExecutionOptions:
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


def _run_together(
    variants: Sequence[ResolvedExperiment], raw: Sequence[ExperimentResult]
) -> ExperimentResult:
    """The results of all variants as one, with what its rows stand for."""
    blocks: dict[object, list[int]] = {}
    for number, each in enumerate(variants):
        blocks.setdefault(dict(each.spec.variant).get(PROMPTS_AXIS), []).append(number)
    found: list[PromptSetResult] = []
    for label, numbers in blocks.items():
        first = variants[numbers[0]]
        whole = merge_variants([(variants[n].spec.variant, raw[n]) for n in numbers])
        whole = add_population(whole, first.table, first.spec.statistics)
        found.append(PromptSetResult(((PROMPTS_AXIS, str(label)),), first.table.name, whole))
    if len(found) == 1:
        return found[0].result
    return merge_variants(merge_prompt_sets(found))


def _rows_left_out(variants: Sequence[ResolvedExperiment], result: ExperimentResult) -> Diagnostic:
    """W0750."""
    experiment = variants[0]
    every = {(each.table.name, row) for each in variants for row in each.table.row_ids}
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
    """What every `param` is in this run: `--set` may have changed it."""
    texts = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in parameters.items()}
    return ", ".join(f"{name} = {text}" for name, text in texts.items())


def _nothing_left(experiment: ResolvedExperiment) -> Diagnostic:
    """E0613 where each model has kept other rows."""
    keep = experiment.spec.keep
    span = keep[0].span if keep else experiment.spec.span
    return NoRowsKept(span=span, rows=len(experiment.table))


def _few_units(
    variants: Sequence[ResolvedExperiment], result: ExperimentResult
) -> list[Diagnostic]:
    """W0720 where cells turn out to stand on so few prompts or groups; of all rows it was said
    before."""
    first = variants[0]
    tested = tested_measures(first)
    if not tested or check_reachable_p(variants):
        return []
    units = [n for each in result.statistics for n in each.units[each.tested].tolist()]
    tables = {id(each.table): each.table for each in variants}
    fewer = first.spec.keep if result.prompts < sum(map(len, tables.values())) else ()
    return check_cell_units(
        units, first.spec.statistics, (fewer or tested)[0].span, row_unit(first)
    )


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
            unit=row_unit(variants[0]),
        )
    ]


def iterate_waves(
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
        get_whole_spec(experiment), program, experiment.model, experiment.table, RULES, own
    )
    if again is not None:
        parts = split_by_group(again)
        again = next((p for p in parts if p.spec.variant == experiment.spec.variant), None)
    # Other warnings have been said.
    return again, [d for d in said if d.severity == "error" or isinstance(d, PickBySign)]


class FailFastVerdicts:
    """The verdicts of a file whose experiments run one by one, until one ends the run."""

    def __init__(
        self, run: FileRun, experiments: Sequence[spec.Experiment], options: RunOptions
    ) -> None:
        """experiments: those that are reported, in the order of the file, each once."""
        self.run = run
        self.experiments = experiments
        self.ends = options.ends
        self.decided: dict[str, dict[int, ExpectOutcome]] = {}
        self.stopped = False

    def stop(self) -> bool:
        """Decide what can be decided by now; whether that ends the run. False without
        `fail_fast`."""
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
        """Those of its expectations that could not be decided before."""
        known = self.decided.setdefault(experiment.name, {})
        waiting = self._waiting()
        labels = [measure.label for measure in experiment.measures]
        ready = [
            number
            for number, each in enumerate(experiment.expects)
            if number not in known and waiting.isdisjoint(expectation_experiments(each, labels))
        ]
        if experiment.statistics.verdicts != "none" and len(ready) < len(experiment.expects):
            return  # they are decided together
        asked = experiment.model_copy(
            update={"expects": tuple(experiment.expects[number] for number in ready)}
        )
        run = self.run
        found = add_verdicts(run.results[experiment.name], asked, run.results, run.lost)
        known.update(zip(ready, found.outcomes, strict=True))

    def _waiting(self) -> set[str]:
        """Experiments of the file that haven't run so far."""
        every = {each.name for each in self.run.checked.experiments}
        return every - self.run.results.keys() - self.run.lost.keys()

    def _of(self, name: str) -> tuple[ExpectOutcome, ...]:
        known = self.decided.get(name, {})
        return tuple(known[number] for number in sorted(known))

    def results(self) -> tuple[ExperimentResult, ...]:
        """What was found, with its verdicts."""
        run = self.run
        return tuple(
            replace(run.results[e.name], outcomes=self._of(e.name))
            if self.ends is not None
            else add_verdicts(run.results[e.name], e, run.results, run.lost)
            for e in self.experiments
            if e.name in run.results
        )

    def lost(self) -> tuple[LostExperiment, ...]:
        """What could not be computed."""
        lost = self.run.lost
        return tuple(
            build_lost_experiment(e, lost[e.name]) for e in self.experiments if e.name in lost
        )

    def not_run(self) -> tuple[SkippedExperiment, ...]:
        """What the verdict that ended the run has left out."""
        if not self.stopped:
            return ()
        waiting = self._waiting()
        left: list[SkippedExperiment] = []
        for experiment in self.experiments:
            known = self.decided.get(experiment.name, {})
            expects = tuple(
                UndecidedExpectation(each.text, each.span.line)
                for number, each in enumerate(experiment.expects)
                if number not in known
            )
            if expects or experiment.name in waiting:
                left.append(SkippedExperiment(experiment.name, expects))
        return tuple(left)


VERSIONED_PACKAGES = ("torch", "transformers")
"""Whose versions may change any number."""


def open_value_cache(
    run: OpenRun, checked: CheckedFile, models: Mapping[str, LoadedModel], options: RunOptions
) -> RunCache:
    """Where a run's values are kept. A model that can't be told from others is left out."""
    try:
        code = _code(checked)
    except CodeHashError:
        return RunCache(run, {})
    merged = any(model.base is not None for model in checked.program.models.values())
    packages = (*VERSIONED_PACKAGES, "peft") if merged else VERSIONED_PACKAGES
    images = any(block.kind == "images" for block in checked.program.prompts.values())
    packages = (*packages, "pillow") if images else packages
    common = digest(
        NUMERIC_VERSION,
        [package_version(package) for package in packages],
        numeric_settings(),
        sorted(options.without),
        options.execution.side,
        code,
    )
    found: dict[str, bytes] = {}
    for name, model in models.items():
        identity = compute_identity(model)
        if identity is not None:
            attention = model.provenance.get("attention")
            found[name] = digest(common, identity, str(model.dtype), model.device.type, attention)
    return RunCache(run, found)


def _code(checked: CheckedFile) -> dict[str, str]:
    """The user's own code that may make numbers: modules that have added to the language, and what
    the file's functions import. The functions themselves are in the keys of what hangs on them."""
    found = hash_imported_code(
        [each.path.read_bytes() for each in program_functions(checked.program)]
    )
    for module in sorted(EXTERNAL_MODULES):
        found |= hash_module_code(module)
    return found | hash_plugin_code()


def check_with_models(
    source: Source, settings: CheckSettings, models: GivenModels
) -> tuple[CheckedFile, dict[str, LoadedModel]]:
    """Check a file with models of Python's in place of those that it declares by these names.

    Adds E0201 for names that the file doesn't define, and what is wrong with the models.
    """
    syntax, found = parse(source)
    declared = lower_program(syntax, source, settings.parameters)[0].models
    # Before a model is proved, which takes a while; a broken line may be the one that defines it.
    unknown = [name for name in models if name not in declared] if not found else []
    loaded, diagnostics = adopt_models({n: pair for n, pair in models.items() if n in declared})
    settings = replace(settings, build=build_model)
    checked = check_source(source, settings, build_model_contexts(source, loaded))
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
    checked: CheckedFile,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel] | None = None,
    *,
    run: OpenRun | None = None,
    counts: RowCounts | None = None,
    hashed: FileHasher | None = hash_file,
    notes: NoteStore | None = None,
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Run a file that was checked. Its own diagnostics are not repeated.

    run: where values are looked up and kept. counts: told how many rows were computed. hashed:
    SHA-256 of a file, None to hash no weights. notes: where outcomes of the self-check are kept,
    besides the user's cache.
    """
    models, diagnostics = _models_of(checked, options, loaded, hashed, notes)
    if models is None:
        return None, diagnostics
    kept = None if run is None else open_value_cache(run, checked, models, options)
    return _run(checked, models, options, diagnostics, kept, counts)


def measure_unpatched(
    checked: CheckedFile, options: RunOptions, loaded: Mapping[str, LoadedModel] | None = None
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
    checked: CheckedFile,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel] | None,
    hashed: FileHasher | None = hash_file,
    notes: NoteStore | None = None,
) -> tuple[dict[str, LoadedModel] | None, list[Diagnostic]]:
    """The models of a checked file, with their weights; None where one can't be had."""
    diagnostics = check_options(options)
    if has_errors(diagnostics):
        return None, diagnostics
    models = {**cast("dict[str, LoadedModel]", checked.built), **(loaded or {})}
    diagnostics.extend(
        load_models(
            checked,
            models,
            device=options.device,
            dtype=options.dtype,
            offload=options.offload,
            hashed=hashed,
            notes=notes,
        )
    )
    if not has_errors(diagnostics):
        every = [*checked.experiments, *_only_saving(checked)]
        add_tower_views(every, models)
        diagnostics.extend(check_modules(every, models))
    return (None if has_errors(diagnostics) else models), diagnostics


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
    known = {each.name for each in (*every, *checked.saving)}
    unsaid = [each.name for each in checked.reported if each.name not in known]
    if unsaid:  # never leave one out without a word
        raise RuntimeError(f"nothing says why `{unsaid[0]}` can't be run")
    reported = [e.spec for e in every if e.name not in checked.unreported]
    verdicts = FailFastVerdicts(file, reported, options)
    for wave, later in iterate_waves(checked.experiments, one_by_one=options.ends is not None):
        file.wave(wave, later)
        if verdicts.stop():
            break
    not_run = verdicts.not_run()
    saved: list[SavedFile] = []
    for each in checked.saving if not not_run else ():
        try:
            own, problems = save_vectors(each, models, options.execution)
        except OSError:
            raise
        except Exception as failure:
            own, problems = [], [file.broke_off(each, failure)]
        saved += own
        file.diagnostics.extend(problems)
    if file.lost and not file.results and not not_run and not saved:
        if file.failure is not None:  # there is nothing that it would take along
            raise file.failure
        return None, file.diagnostics
    # Verdicts last: an expectation may name an experiment that comes later in the file.
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


def _only_saving(checked: CheckedFile) -> list[ResolvedExperiment]:
    """Experiments that measure nothing."""
    return [each for each in checked.saving if not each.measures]


def check_options(options: RunOptions) -> list[Diagnostic]:
    """E0208 for devices and passes that don't exist, and for what `check_folders` finds."""
    found = check_pass_names(sorted(options.without))
    problem = explain_device_problem(options.device)
    if problem is not None:
        found.append(
            BadCommandLine(
                reason=f"`--device {options.device}`: {problem}",
                hint="write `auto`, `cpu`, `cuda` or `cuda:0`",
            )
        )
    found.extend(check_folders(options))
    return found
