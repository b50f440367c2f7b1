"""The whole way of a file: check, load, plan, execute, collect, finish."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import cast

from mechdsl.base.names import name_list
from mechdsl.base.source import Source
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e02_names import BadCommandLine, UnknownName, did_you_mean
from mechdsl.execute.counts import Counts
from mechdsl.execute.execute import execute, sizes_of
from mechdsl.execute.kept_values import KeptRun
from mechdsl.execute.measured_values import MeasuredValues
from mechdsl.execute.save_vectors import save_vectors
from mechdsl.execute.saved import Saved
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.loading.build import build
from mechdsl.loading.devices import device_problem
from mechdsl.loading.file_models import (
    Models,
    adopt_models,
    contexts,
    load_models,
    not_there,
    with_views,
)
from mechdsl.loading.proof_store import Notes
from mechdsl.models.identity import Hashed, file_hash
from mechdsl.pipeline.check_folders import check_folders
from mechdsl.pipeline.fail_fast import Verdicts
from mechdsl.pipeline.kept_run import kept_run
from mechdsl.pipeline.run_options import RunOptions
from mechdsl.pipeline.waves import FileRun, waves
from mechdsl.plan.make_plan import make_plan
from mechdsl.plan.passes import unknown_passes
from mechdsl.program.lower_file import lower_program
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.results.denominators import check_denominators
from mechdsl.results.experiment_result import FileResult
from mechdsl.store.runs import OpenRun
from mechdsl.syntax.parse import parse
from mechdsl.validate.check_file import Checked, Settings, by_name, check_source


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
    checked: Checked,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel] | None = None,
    *,
    run: OpenRun | None = None,
    counts: Counts | None = None,
    hashed: Hashed | None = file_hash,
    notes: Notes | None = None,
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Run a file that was checked. Its own diagnostics are not repeated.

    run: where values are looked up and kept. counts: told how many rows were computed. hashed:
    SHA-256 of a file, None to hash no weights. notes: where outcomes of the self-check are kept,
    besides the user's cache.
    """
    models, diagnostics = _models_of(checked, options, loaded, hashed, notes)
    if models is None:
        return None, diagnostics
    kept = None if run is None else kept_run(run, checked, models, options)
    return _run(checked, models, options, diagnostics, kept, counts)


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
    checked: Checked,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel] | None,
    hashed: Hashed | None = file_hash,
    notes: Notes | None = None,
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
        with_views(every, models)
        diagnostics.extend(not_there(every, models))
    return (None if has_errors(diagnostics) else models), diagnostics


def _run(
    checked: Checked,
    models: Mapping[str, LoadedModel],
    options: RunOptions,
    diagnostics: list[Diagnostic],
    kept: KeptRun | None,
    counts: Counts | None,
) -> tuple[FileResult | None, list[Diagnostic]]:
    sizes = None if kept is None else kept.sizes
    if sizes is None:
        sizes = sizes_of(checked.experiments, models, options.execution)
    file = FileRun(checked, models, options, sizes, diagnostics, kept, counts)
    every = [variants[0] for variants in by_name(checked.experiments)]
    known = {each.name for each in (*every, *checked.saving)}
    unsaid = [each.name for each in checked.reported if each.name not in known]
    if unsaid:  # never leave one out without a word
        raise RuntimeError(f"nothing says why `{unsaid[0]}` can't be run")
    reported = [e.spec for e in every if e.name not in checked.unreported]
    verdicts = Verdicts(file, reported, options)
    for wave, later in waves(checked.experiments, one_by_one=options.ends is not None):
        file.wave(wave, later)
        if verdicts.stop():
            break
    not_run = verdicts.not_run()
    saved: list[Saved] = []
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


def _only_saving(checked: Checked) -> list[ResolvedExperiment]:
    """Experiments that measure nothing."""
    return [each for each in checked.saving if not each.measures]


def check_options(options: RunOptions) -> list[Diagnostic]:
    """E0208 for devices and passes that don't exist, and for what `check_folders` finds."""
    found = unknown_passes(sorted(options.without))
    problem = device_problem(options.device)
    if problem is not None:
        found.append(
            BadCommandLine(
                reason=f"`--device {options.device}`: {problem}",
                hint="write `auto`, `cpu`, `cuda` or `cuda:0`",
            )
        )
    found.extend(check_folders(options))
    return found
