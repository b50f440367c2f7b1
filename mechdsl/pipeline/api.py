"""The Python API: `run`, `fit`, `validate`, `plan`, `graph`, `explain`, `runs`, `diff` and more.

Each function names its keyword arguments, although several share most of them: notebooks complete
them statically, and don't expand `**options: Unpack[…]`. `run` has their documentation, and a test
compares their types and defaults between functions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from mechdsl.base import limits
from mechdsl.base.files import write_atomically
from mechdsl.base.runtime import restores_random_state
from mechdsl.base.text import Source, dump_json
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.models import NoTokenizer
from mechdsl.diagnostics.rendering import Diagnostics, MechdslError, warn_diagnostics
from mechdsl.pipeline import build_lazily
from mechdsl.pipeline.options import (
    dtype_name,
    dtype_problem,
    measure_problem,
    size_problems,
    store_problem,
    to_names,
    word_problem,
)
from mechdsl.program.plugins import load_plugins
from mechdsl.program.python_functions import python_mode

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mechdsl.checks.file_check import CheckedFile, CheckSettings
    from mechdsl.execute.measurement.values import MeasuredValues
    from mechdsl.execute.objective import ObjectiveMode
    from mechdsl.execute.run_record import ExecutionProfile, PassSizes, TrainedFit
    from mechdsl.forward.hooks.model import LoadedModel
    from mechdsl.pipeline.loaded_models import ExportedModel
    from mechdsl.pipeline.objectives import Objective
    from mechdsl.pipeline.options import RunOptions
    from mechdsl.planner.plan import Plan
    from mechdsl.program.python_functions import CallableKind, PythonMode
    from mechdsl.results.differences.comparison import Differences
    from mechdsl.results.experiment_result import EarlierRun
    from mechdsl.results.results import Results
    from mechdsl.results.runs import Run, Runs
    from mechdsl.show.output import PlanText, PrintedText
    from mechdsl.show.progress import ProgressBar
    from mechdsl.syntax import ast


BorrowedModels = Mapping[str, tuple[Any, Any]]
"""Name in the file → (transformers model, fast tokenizer)."""

MetricFunctions = Mapping[str, Callable[..., object]]
"""Name of a metric in the file → a function from logits [row, vocab] to [row]."""

RuleFunctions = Mapping[str, Callable[["torch.Tensor"], object]]
"""Name after `set … to` in the file → a function from vectors [row, position, width] to vectors of
the same shape."""

ParameterValues = Mapping[str, str | int | float | bool]
"""Name of a `param` → its value."""

_ONE_THREAD = RLock()


def make_source(file: str | Path) -> tuple[Source | None, list[Diagnostic]]:
    """Create the source of a file's path, or of a text that begins like one (`mech 1`)."""
    from mechdsl.syntax.frontend import read_source

    if isinstance(file, str) and ("\n" in file or file.lstrip().startswith("mech ")):
        return Source(file), []
    return read_source(Path(file))


def read_file(file: str | Path) -> Source:
    source, problems = make_source(file)
    if source is None:
        raise MechdslError(problems)
    return source


def check_source_with(
    source: Source, models: BorrowedModels | None, settings: CheckSettings
) -> tuple[CheckedFile, dict[str, LoadedModel]]:
    if not models:  # without torch
        from mechdsl.checks.file_check import check_source

        return check_source(source, settings), {}
    with borrowed_models(models):
        from mechdsl.pipeline.computation import check_with_models

        return check_with_models(source, settings, model_pairs(models))


@contextmanager
def borrowed_models(models: BorrowedModels | None) -> Generator[None]:
    """Restore models passed from Python afterwards; without any, torch isn't needed.

    One thread at a time enters: attention functions and hooks of a run belong to the process.
    """
    pairs = model_pairs(models)
    with _ONE_THREAD:
        if not pairs:
            yield
            return
        from mechdsl.loading.devices import restore_models

        with restore_models(module for module, _ in pairs.values()):
            yield


def require_valid_file(
    source: Source, models: BorrowedModels | None, settings: CheckSettings
) -> tuple[CheckedFile, dict[str, LoadedModel]]:
    """Return a file without errors and show its warnings; MechdslError if it has errors."""
    checked, loaded = check_source_with(source, models, settings)
    if has_errors(checked.diagnostics):
        raise MechdslError(checked.diagnostics)
    warn_diagnostics(checked.diagnostics)
    return checked, loaded


def require_valid_source(
    file: str | Path, models: BorrowedModels | None, settings: CheckSettings
) -> CheckedFile:
    return require_valid_file(read_file(file), models, settings)[0]


def model_pairs(models: Any) -> BorrowedModels:
    """Return models with their tokenizers.

    Raises:
        MechdslError: If a tokenizer is missing (E0412).
        TypeError: If `models` isn't a dict.
    """
    if models is None:
        return {}
    if not isinstance(models, Mapping):
        raise TypeError('models are a dict: `models={"toy": (model, tokenizer)}`')
    problems: list[Diagnostic] = []
    for name, pair in cast("Mapping[str, Any]", models).items():
        hint = f'write `models={{"{name}": (model, tokenizer)}}`'
        if not isinstance(pair, tuple | list) or len(cast("Sequence[Any]", pair)) != 2:
            reason = "it was passed without a tokenizer"
            problems.append(NoTokenizer(model=name, reason=reason, hint=hint))
        elif pair[1] is None:
            reason = "`None` is in the place of the tokenizer"
            problems.append(NoTokenizer(model=name, reason=reason, hint=hint))
        elif hasattr(pair[0], "encode") and hasattr(pair[1], "forward"):
            reason = "the model is in the place of the tokenizer"
            problems.append(NoTokenizer(model=name, reason=reason, hint=hint))
    raise_errors(problems)
    return cast("BorrowedModels", models)


def settings_from_arguments(
    set: ParameterValues | None,
    limit: int | None = None,
    only: str | Sequence[str] | None = None,
    python: PythonMode = "refuse",
    *,
    require_models: bool = True,
    allow_outside: bool,
    untrusted: bool,
    metrics: MetricFunctions | None = None,
    rules: RuleFunctions | None = None,
) -> CheckSettings:
    from mechdsl.checks.file_check import CheckSettings

    given = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in (set or {}).items()
    }
    return CheckSettings(
        given,
        limit,
        (only,) if isinstance(only, str) else tuple(only or ()),
        python,
        require_models,
        allow_outside,
        untrusted,
        build=build_lazily,
        callables=(*_definitions("metrics", metrics), *_definitions("rules", rules)),
    )


def _definitions(kind: CallableKind, functions: Any) -> list[ast.Call]:
    """Return the definitions of functions passed as `metrics=` or `rules=`; TypeError for anything
    but a dict of functions."""
    from mechdsl.program.python_functions import callable_definition

    if functions is None:
        return []
    example = "margin" if kind == "metrics" else "halve"
    if not isinstance(functions, Mapping):
        raise TypeError(f'{kind} are a dict of functions: `{kind}={{"{example}": {example}}}`')
    definitions: list[ast.Call] = []
    for name, function in cast("Mapping[object, Any]", functions).items():
        if not isinstance(name, str) or not callable(function):
            reason = f"`{name}` is a `{type(function).__name__}`"
            raise TypeError(
                f'{kind} are a dict of functions: `{kind}={{"{example}": {example}}}`; {reason}'
            )
        definitions.append(callable_definition(kind, name, function))
    return definitions


def raise_errors(*diagnostics: Sequence[Diagnostic]) -> None:
    """Raise MechdslError if anything was found."""
    problems = [problem for some in diagnostics for problem in some]
    if problems:
        raise MechdslError(problems)


@restores_random_state
def run(
    file: str | Path,
    models: BorrowedModels | None = None,
    *,
    metrics: MetricFunctions | None = None,
    rules: RuleFunctions | None = None,
    set: ParameterValues | None = None,
    limit: int | None = None,
    only: str | Sequence[str] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    offload: str | Path | None = None,
    out: str | Path | None = None,
    write_reports: bool = True,
    profile: bool = False,
    progress: bool | None = None,
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
    plugins: Sequence[str] = (),
    no_pass: Sequence[str] = (),
    pass_tokens: int | None = None,
    prompt_tokens: int | None = None,
    allow_nan: bool = False,
    safe_csv: bool = False,
    store: str | Path | Literal[False] | None = None,
    fresh: bool = False,
    against: str | Path | Results | None = None,
    fail_fast: bool = False,
    fit: bool = False,
) -> Results:
    """Run a file as `mechdsl run` does, and return its results.

    An experiment or a measure that can't be computed doesn't affect others: `complete` of the
    results is then False, `lost` of the file and `missing` of the measure give the reason, and a
    warning is shown. Warnings are shown through `warnings` as MechdslWarning, and stored in
    `Results.diagnostics`.

    Args:
        file: The path of a file, or its text (with a line break, or beginning with `mech `). Paths
            in a text are relative to the working directory.
        models: Name in the file → (transformers model, fast tokenizer), which replaces the file's
            model of that name. The model keeps its device and dtype, so `device` and `dtype` don't
            apply. The run leaves it unchanged.
        metrics: Name in the file → a function that takes logits [row, vocab], and the rows if it
            requires a second argument, and returns [row]. It replaces a `metric` line of that name.
            If its first parameter is called `replies`, it takes the generated texts instead of
            logits. A run with a function that can't be hashed isn't stored.
        rules: Name after `set … to` in the file → a function that takes vectors [row, position,
            width] of one cell, and returns the vectors to write, of the same shape.
        set: Values of the file's `param` lines.
        limit: Maximum number of rows per experiment.
        only: The only experiment or experiments to run; those whose results they use run too.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        dtype: Overrides the file's dtype.
        offload: Folder for weights that don't fit in memory.
        out: Folder for every prompt's values.
        write_reports: Write the reports that the file sends to a file (`report … to "x.png"`).
        profile: Compare estimated with measured work in `Results.profile`.
        progress: Whether standard error shows a progress bar; None: only in terminals and
            notebooks, as on the command line.
        allow_python: Run the Python files that the file refers to.
        allow_outside: Allow reports outside the file's folder.
        untrusted: List the paths that the file names, restrict all of them, and run no Python.
        plugins: Names of installed plugins to load. They stay loaded until the process ends.
        no_pass: Planner passes to disable.
        pass_tokens: Maximum number of tokens of a pass over patched rows.
        prompt_tokens: Maximum number of tokens of a batch of unpatched prompts.
        allow_nan: Exclude rows where the model gives NaN from everything, and count them.
        safe_csv: In CSV files of reports, write `'` before cells that a spreadsheet would read as
            formulas.
        store: Folder where computed values are cached and looked up; None: the folder in
            `MECHDSL_STORE`, or `.mechdsl` next to the file (for a text: none); False: none.
        fresh: Recompute everything, and cache that.
        against: An earlier run, by its id, `last`, its `.mech` file or a folder of `out`, or its
            results; `Results.against` contains the changes since.
        fail_fast: Stop at the first expectation that fails (with `against`: that held before, or is
            new); `not_run` of the file lists the skipped parts.
        fit: First run the trainings that the file declares with `fit(…)`, unless the store has
            them.

    Raises:
        MechdslError: If the file, its data, a model or an argument is invalid, or nothing can be
            computed.
    """
    with borrowed_models(models):
        # Inside the function, because imported modules may draw random numbers too.
        from mechdsl.execute.run_record import ExecutionOptions
        from mechdsl.results.experiment_result import quote_formulas
        from mechdsl.show.progress import ProgressBar

        raise_errors(load_plugins(plugins))
        source = read_file(file)
        settings = settings_from_arguments(
            set,
            limit,
            only,
            python_mode(allow_python),
            allow_outside=allow_outside,
            untrusted=untrusted,
            metrics=metrics,
            rules=rules,
        )
        problems = size_problems(limit, pass_tokens, prompt_tokens)
        plain = _options_with_store(source, settings, device, dtype, store, problems, fresh=fresh)
        profiles: list[tuple[Plan, ExecutionProfile]] = []
        bar = ProgressBar(source.name, shown=progress)
        options = replace(
            plain,
            offload=None if offload is None else Path(offload),
            out=None if out is None else Path(out),
            without=to_names(no_pass),
            execution=ExecutionOptions(
                on_progress=bar.advance,
                pass_tokens=pass_tokens,
                prompt_tokens=prompt_tokens,
                allow_nan=allow_nan,
            ),
            on_profile=(lambda *done: profiles.append(done)) if profile else None,
            fits=fit,
        )
        with quote_formulas(safe_csv):
            results = _train_and_run(
                source,
                models,
                options,
                bar,
                VerdictRequest(against, fail_fast),
                progress=progress,
                write_reports=write_reports,
            )
        return replace(results, profile=_profile_text(profiles, results.files[0].sizes))


def _train_and_run(
    source: Source,
    models: BorrowedModels | None,
    options: RunOptions,
    bar: ProgressBar,
    asked: VerdictRequest,
    *,
    progress: bool | None,
    write_reports: bool,
) -> Results:
    """Run the trainings that the run needs, then the file."""
    problems: list[Diagnostic] = []
    finds = "discover" in source.text or "search" in source.text
    if options.fits or finds:  # few files need a second check
        _, problems = _train(source, models, options, progress, discovered=not options.fits)
    failed = [problem for problem in problems if problem.severity == "error"]
    warn_diagnostics([problem for problem in problems if problem not in failed])
    try:
        results = _run(source, models, options, bar, asked, write_reports=write_reports)
    except MechdslError as error:  # probably because of what wasn't trained
        again = [diagnostic for diagnostic in error.diagnostics if diagnostic not in failed]
        raise MechdslError([*failed, *again]) from error
    warn_diagnostics(failed)
    return results


@restores_random_state
def fit(
    file: str | Path,
    models: BorrowedModels | None = None,
    *,
    set: ParameterValues | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    out: str | Path | None = None,
    progress: bool | None = None,
    allow_python: bool = False,
    untrusted: bool = False,
    plugins: Sequence[str] = (),
    store: str | Path | None = None,
    fresh: bool = False,
) -> list[TrainedFit]:
    """Run the trainings that a file declares with `fit(…)`, as `mechdsl fit` does.

    Stored trainings aren't repeated, and an interrupted training resumes. A training that fails
    doesn't affect others: a warning is shown.

    The other arguments are those of `run`.

    Args:
        out: Folder below which each dictionary is also copied, into a new folder with a model card.
        untrusted: As in `run`; then `store` must be given.
        store: As in `run`, without False. A text needs one.
        fresh: Repeat stored trainings.

    Returns:
        The trained dictionaries: `basis`, `folder`, and a `report` of how well each reconstructs.

    Raises:
        MechdslError: If the file, a model or an argument is invalid, or nothing can be trained.
        OSError: If a folder can't be written; FileExistsError if a copy exists already.
    """
    with borrowed_models(models):
        raise_errors(load_plugins(plugins))
        source, python = read_file(file), python_mode(allow_python)
        settings = settings_from_arguments(
            set, python=python, allow_outside=False, untrusted=untrusted
        )
        options = _options_with_store(source, settings, device, dtype, store, fresh=fresh)
        done, problems = _train(source, models, options, progress)
        _report_and_copy(done, problems, out)
        return done


def _options_with_store(
    source: Source,
    settings: CheckSettings,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    store: str | Path | Literal[False] | None,
    problems: Sequence[Diagnostic] = (),
    *,
    fresh: bool = False,
) -> RunOptions:
    """Return the options of a function with a store.

    Raises:
        MechdslError: For invalid arguments, and for the problems that were `problems` before.
    """
    from mechdsl.pipeline.options import RunOptions
    from mechdsl.store.store import store_folder

    raise_errors(dtype_problem(dtype), problems, store_problem(store, fresh))
    named = Path(store) if isinstance(store, str) else store
    return RunOptions(
        settings,
        device=str(device),
        dtype=None if dtype is None else dtype_name(dtype),
        store=store_folder(source.path, named, untrusted=settings.untrusted),
        fresh=fresh,
    )


def _report_and_copy(
    done: Sequence[TrainedFit], problems: list[Diagnostic], out: str | Path | None
) -> None:
    """Raise MechdslError if nothing was trained, warn about other problems, and copy the rest."""
    from mechdsl.pipeline.trainings import export_fits

    if not done:
        raise_errors([problem for problem in problems if problem.severity == "error"])
    warn_diagnostics(problems)
    if out is not None:
        list(export_fits(done, Path(out)))


def _train(
    source: Source,
    models: BorrowedModels | None,
    options: RunOptions,
    progress: bool | None,
    *,
    discovered: bool = False,
) -> tuple[list[TrainedFit], list[Diagnostic]]:
    """Check a file and run the trainings that it declares. Raises MechdslError.

    discovered: run only those of circuits that experiments discover.
    """
    from mechdsl.diagnostics.command_line import BadCommandLine
    from mechdsl.pipeline.trained_files import fits_of_file
    from mechdsl.pipeline.trainings import train_file
    from mechdsl.show.progress import ProgressBar, StepCounter

    checked, loaded = require_valid_file(source, models, options.settings)
    if not fits_of_file(checked, discovered=discovered):
        return [], []
    if options.store is None:
        reason = "trainings are kept in a store, and there is none"
        hint = "name a folder: `store=FOLDER`"
        raise MechdslError([BadCommandLine(reason=reason, hint=hint)])
    with ProgressBar(source.name, shown=progress, unit="steps") as bar:
        advance = StepCounter(bar).advance
        return train_file(checked, options, loaded, on_progress=advance, discovered=discovered)


class VerdictRequest(NamedTuple):
    """Options for verdicts."""

    against: str | Path | Results | None
    fail_fast: bool


def _earlier_run(against: object, checked: CheckedFile, store: Path | None) -> EarlierRun | None:
    """Return the earlier run of a file; MechdslError if there is none."""
    if against is None:
        return None
    from mechdsl.results.runs import earlier_run_from_results, find_earlier_run, prepare_file

    files = [prepare_file(checked)]
    if isinstance(against, str | Path):
        return find_earlier_run(str(against), files, store)
    from mechdsl.results.results import Results

    if not isinstance(against, Results):
        raise TypeError("`against` is a run's name, a path or the results of `mechdsl.run`")
    return earlier_run_from_results(against, files)


def _run(
    source: Source,
    models: BorrowedModels | None,
    options: RunOptions,
    bar: ProgressBar,
    asked: VerdictRequest,
    *,
    write_reports: bool,
) -> Results:
    """Check, run, write reports, show warnings."""
    from mechdsl.pipeline.file_run import StoreStopped, run_file
    from mechdsl.results.experiment_result import stop_condition
    from mechdsl.results.results import Results, package_versions
    from mechdsl.show.output import write_reports as write_all

    checked, loaded = require_valid_file(source, models, options.settings)
    earlier = _earlier_run(asked.against, checked, options.store)
    if asked.fail_fast:
        options = replace(options, ends=stop_condition(earlier))
    try:
        with bar:
            ran = run_file(checked, options, loaded)
    except StoreStopped as stopped:
        raise MechdslError([stopped.diagnostic]) from stopped
    if ran.result is None:
        raise MechdslError(ran.diagnostics)
    done = write_all(ran.result.experiments) if write_reports else []
    unwritten = [problem for report in done for problem in report.diagnostics]
    warn_diagnostics([*ran.diagnostics, *unwritten])
    return Results(
        (ran.result,),
        package_versions(),
        diagnostics=Diagnostics([*checked.diagnostics, *ran.diagnostics, *unwritten]),
        written=tuple(report.path for report in done if report.path is not None),
        notes=ran.notes,
        against=None if earlier is None else earlier.compare([ran.result]),
    )


def _profile_text(
    profiles: Sequence[tuple[Plan, ExecutionProfile]], sizes: PassSizes | None
) -> str:
    if not profiles:
        return ""
    from mechdsl.show.output import capture_text
    from mechdsl.show.plan import print_profile

    texts: list[str] = []
    for planned, done in profiles:
        assert sizes is not None  # at least one experiment ran
        texts.append(capture_text(partial(print_profile, planned, done, sizes)))
    return "".join(texts)


def runs(store: str | Path | None = None) -> Runs:
    """Return the runs in a store, the newest first, as `mechdsl runs` lists them.

    Args:
        store: Its folder; None: the folder in `MECHDSL_STORE`, or `.mechdsl` in the working
            directory, with an empty list if it is missing.

    Returns:
        A list; each run has `id`, `state`, `file`, `began`, `about`, its `results`, which are read
        at first access, `export(folder)` and `remove()`.

    Raises:
        MechdslError: E0208 if a given folder isn't a store, or can't be read.
    """
    from mechdsl.results.runs import Runs, find_store_folder, has_store, load_runs

    folder = find_store_folder(None, None if store is None else Path(store))
    return Runs() if store is None and not has_store(folder) else load_runs(folder)


@restores_random_state
def diff(
    old: Results | Run | str | Path,
    new: Results | Run | str | Path,
    *,
    store: str | Path | None = None,
) -> Differences:
    """Compare two runs as `mechdsl diff` does: inputs, verdicts, effects beyond noise, new and
    missing results.

    Args:
        old: `Results`, a run of `mechdsl.runs()`, or the name of a run: its id or a prefix of it,
            `last`, a `.mech` file (its latest finished run), a folder of `out`.
        new: Like `old`.
        store: Folder of the runs; None: next to the `.mech` file, or in the working directory.

    Returns:
        `Differences`; `changed` is whether the command's exit status is 1.

    Raises:
        MechdslError: E0208 if a run is missing or unreadable.
    """
    from mechdsl.results.differences.comparison import diff_runs

    return diff_runs(old, new, None if store is None else Path(store))


@restores_random_state
def validate(
    file: str | Path,
    models: BorrowedModels | None = None,
    *,
    metrics: MetricFunctions | None = None,
    rules: RuleFunctions | None = None,
    set: ParameterValues | None = None,
    allow_outside: bool = False,
    untrusted: bool = False,
    plugins: Sequence[str] = (),
    require_models: bool = False,
) -> Diagnostics:
    """Return all errors and warnings of a file, as `mechdsl validate` does: without weights, and
    without torch unless models are passed.

    The other arguments are those of `run`.

    Args:
        metrics: As for `run`; they aren't called.
        rules: As for `run`; they aren't called.
        require_models: Whether a model that isn't on this machine, or has no weights, is an error;
            everything that doesn't depend on it is checked either way.

    Returns:
        A list of diagnostics, empty for a valid file. Errors in the file raise no exception.
    """
    from mechdsl.models.folder import report_missing_weights

    problems = load_plugins(plugins)
    if problems:
        return Diagnostics(problems)
    source, problems = make_source(file)
    if source is None:
        return Diagnostics(problems)
    try:
        settings = settings_from_arguments(
            set,
            python="look",
            require_models=require_models,
            allow_outside=allow_outside,
            untrusted=untrusted,
            metrics=metrics,
            rules=rules,
        )
        settings = replace(settings, prompts_enough=limits.CHECKED_PROMPTS)
        checked, _ = check_source_with(source, models, settings)
    except MechdslError as error:
        return error.diagnostics
    given = () if models is None else models
    own = [model for name, model in checked.program.models.items() if name not in given]
    return Diagnostics(
        checked.diagnostics + (report_missing_weights(own) if require_models else [])
    )


@restores_random_state
def plan(
    file: str | Path,
    models: BorrowedModels | None = None,
    *,
    metrics: MetricFunctions | None = None,
    rules: RuleFunctions | None = None,
    set: ParameterValues | None = None,
    limit: int | None = None,
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
    plugins: Sequence[str] = (),
    no_pass: Sequence[str] = (),
    pass_tokens: int | None = None,
    prompt_tokens: int | None = None,
    measure: bool = False,
) -> PlanText:
    """Return the output of `mechdsl plan`: the intervention graph, the cells, rows and forward
    passes of a file, the detectable effects, the savings of each planner pass, and the duration of
    the rest. Nothing is run.

    The other arguments are those of `run`.

    Args:
        measure: Load the models, run base and source runs (without rules), and give detectable
            effects in the metric's units.

    Returns:
        The printed text; its `cells` count the cells of each experiment, its `passes` are the
        planner passes that apply.

    Raises:
        MechdslError: If the file or an argument is invalid.
    """
    raise_errors(load_plugins(plugins), size_problems(limit, pass_tokens, prompt_tokens))
    how = settings_from_arguments(
        set,
        limit,
        python=python_mode(allow_python),
        allow_outside=allow_outside,
        untrusted=untrusted,
        metrics=metrics,
        rules=rules,
    )
    without, tokens = to_names(no_pass), (pass_tokens, prompt_tokens)
    checked, measured = _check_plan(file, models, how, without, tokens if measure else None)
    from mechdsl.pipeline.trained_files import list_training_costs
    from mechdsl.planner.passes import make_plan
    from mechdsl.resolve.expansion import add_exact_cells
    from mechdsl.show.output import PlanText, capture_text
    from mechdsl.show.plan import print_plan

    made = make_plan(list(add_exact_cells(checked.experiments)), without=without)
    trainings = list_training_costs(checked)

    def show(console: Console) -> None:
        print_plan(made, console, *tokens, measured, saving=checked.saving, trainings=trainings)

    text = capture_text(show)
    cells: dict[str, int] = {}
    for experiment in checked.experiments:  # an experiment may have several parts
        cells[experiment.name] = cells.get(experiment.name, 0) + experiment.n_there
    return PlanText(text, cells, made.passes)


def _check_plan(
    file: str | Path,
    models: BorrowedModels | None,
    settings: CheckSettings,
    without: frozenset[str],
    tokens: tuple[int | None, int | None] | None,
) -> tuple[CheckedFile, dict[str, MeasuredValues] | None]:
    """Check a file and the names of disabled passes. Raises MechdslError.

    Args:
        tokens: Maximum numbers of tokens of a pass over patched rows and of a batch of unpatched
            prompts, to measure unpatched runs with them; None: measure none.
    """
    from mechdsl.planner.passes import check_pass_names

    if tokens is None:
        checked = require_valid_source(file, models, settings)
        raise_errors(check_pass_names(sorted(without)))
        return checked, None
    with borrowed_models(models):
        from mechdsl.execute.run_record import ExecutionOptions
        from mechdsl.pipeline.computation import measure_unpatched
        from mechdsl.pipeline.options import RunOptions

        checked, loaded = require_valid_file(read_file(file), models, settings)
        raise_errors(check_pass_names(sorted(without)))
        execution = ExecutionOptions(pass_tokens=tokens[0], prompt_tokens=tokens[1])
        measured, found = measure_unpatched(checked, RunOptions(execution=execution), loaded)
    raise_errors([each for each in found if each.severity == "error"])
    warn_diagnostics(found)
    return checked, measured


@restores_random_state
def graph(
    file: str | Path,
    models: BorrowedModels | None = None,
    *,
    metrics: MetricFunctions | None = None,
    rules: RuleFunctions | None = None,
    set: ParameterValues | None = None,
    format: Literal["dot", "mermaid", "svg", "text"] = "mermaid",
    to: str | Path | None = None,
    before: bool = False,
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
    plugins: Sequence[str] = (),
) -> PrintedText:
    """Return the output of `mechdsl graph`: a drawing of a file's intervention graph.

    The other arguments are those of `run`.

    Args:
        format: DOT, Mermaid, SVG or text.
        to: File to write the graph to as well.
        before: Draw the graph before the planner's passes.

    Raises:
        MechdslError: If the file or an argument is invalid.
        OSError: If `to` can't be written.
    """
    from mechdsl.show.graph import GRAPH_FORMATS, draw_graph
    from mechdsl.show.output import PrintedText, SvgText

    raise_errors(load_plugins(plugins), word_problem("format", format, GRAPH_FORMATS))
    checked = require_valid_source(
        file,
        models,
        settings_from_arguments(
            set,
            python=python_mode(allow_python),
            allow_outside=allow_outside,
            untrusted=untrusted,
            metrics=metrics,
            rules=rules,
        ),
    )
    text = draw_graph(checked.experiments, checked.saving, format, before=before)
    if to is not None:
        write_atomically(Path(to), text)
    return SvgText(text) if format == "svg" else PrintedText(text)


@restores_random_state
def explain(
    what: str | Path,
    models: BorrowedModels | None = None,
    *,
    metrics: MetricFunctions | None = None,
    rules: RuleFunctions | None = None,
    set: ParameterValues | None = None,
    limit: int | None = None,
    format: Literal["text", "json"] = "text",
    for_agents: bool = False,
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
    plugins: Sequence[str] = (),
) -> PrintedText:
    """Return the output of `mechdsl explain`: the prompts of a file, token by token, with the
    positions of rules; or the page of a code (`explain("E0301")`), of a word (`explain("patch")`)
    or of the language (`explain("language")`).

    The other arguments are those of `run`.

    Args:
        what: A file, as for `run`, or the name of a page.
        format: `json` includes every row of every run.
        for_agents: With `explain("language")`, the language in at most 8,000 tokens.

    Raises:
        MechdslError: If the file or an argument is invalid.
    """
    from mechdsl.diagnostics.command_line import find_agent_page, find_page, is_page_name
    from mechdsl.show.output import PrintedText, capture_text

    raise_errors(word_problem("format", format, ("text", "json")), size_problems(limit))
    if for_agents or is_page_name(str(what)):
        text, problems = (find_agent_page if for_agents else find_page)(str(what))
        raise_errors(problems)
        return PrintedText(text)
    raise_errors(load_plugins(plugins))
    checked = require_valid_source(
        what,
        models,
        settings_from_arguments(
            set,
            limit,
            python=python_mode(allow_python),
            allow_outside=allow_outside,
            untrusted=untrusted,
            metrics=metrics,
            rules=rules,
        ),
    )
    from mechdsl.show import prompts

    if format == "json":
        return PrintedText(dump_json(prompts.prompts_document(checked), indent=1) + "\n")
    return capture_text(lambda console: prompts.print_prompts(checked, console))


@restores_random_state
def export(
    file: str | Path,
    weights: str | Path,
    model: str | None = None,
    models: BorrowedModels | None = None,
    *,
    set: ParameterValues | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    allow_python: bool = False,
    untrusted: bool = False,
    plugins: Sequence[str] = (),
) -> ExportedModel:
    """Write a model of a file, such as an edited one, to a folder that transformers loads, as
    `mechdsl export` does.

    The other arguments are those of `run`.

    Args:
        weights: A new or empty folder.
        model: The name of the model; None: the file's only edited model or sum.

    Returns:
        `ExportedModel` with `folder`, `architecture`, `source`, `dtype`, `parameters` (the number
        of weights) and `has_tokenizer`. Models passed from Python are written without tokenizer.

    Raises:
        MechdslError: If the file, a model or an argument is invalid, or the folder has files.
        OSError: If the folder can't be written.
    """
    with borrowed_models(models):
        from mechdsl.pipeline.loaded_models import export_model
        from mechdsl.pipeline.options import RunOptions

        raise_errors(load_plugins(plugins), dtype_problem(dtype))
        how = settings_from_arguments(
            set, python=python_mode(allow_python), allow_outside=False, untrusted=untrusted
        )
        checked, loaded = require_valid_file(read_file(file), models, how)
        named = None if dtype is None else dtype_name(dtype)
        options = RunOptions(settings=how, device=str(device), dtype=named)
        exported_model, problems = export_model(checked, model, Path(weights), options, loaded)
        raise_errors([problem for problem in problems if problem.severity == "error"])
        warn_diagnostics(problems)
        if exported_model is None:
            raise RuntimeError("nothing says why the model can't be exported")
        return exported_model


@restores_random_state
def objective(
    file: str | Path,
    measure: str | None = None,
    models: BorrowedModels | None = None,
    *,
    site: str,
    at: str,
    mode: ObjectiveMode = "set",
    experiment: str | None = None,
    set: ParameterValues | None = None,
    limit: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    allow_python: bool = False,
    untrusted: bool = False,
    plugins: Sequence[str] = (),
    store: str | Path | None = None,
) -> Objective:
    """Return the measure of an experiment as a differentiable function of vectors of its base run,
    for optimisers in Python.

    The tensor is written before the rules of the experiment act. Rules read unpatched runs. The
    other arguments are those of `run`.

    Args:
        measure: The measure, as in tables; None: the only one. It is measured `as raw` or `as
            delta`.
        site: The vectors, as in rules: `embed`, `resid_post layer 3`, `z layer 1 head 2`.
        at: Their tokens, as in rules: `last token`, `tokens 5..8`. A row may have several.
        mode: Whether the tensor replaces the vectors (`set`) or is added to them (`add`).
        experiment: Its name; None: the only one. It has one cell.
        store: Folder with what the file trains with `fit(…)`, as in `fit`.

    Returns:
        `Objective`: `objective(tensor)` returns the values of the rows.

    Raises:
        MechdslError: If the file, a model or an argument is invalid; E0608 for a measure, a site or
            a rule without a gradient.
    """
    with borrowed_models(models):
        from mechdsl.pipeline.objectives import ObjectiveRequest, open_objective

        raise_errors(measure_problem(measure))
        raise_errors(load_plugins(plugins), word_problem("mode", mode, ("set", "add")))
        raise_errors(size_problems(limit))
        source, python = read_file(file), python_mode(allow_python)
        settings = settings_from_arguments(
            set, limit, python=python, allow_outside=False, untrusted=untrusted
        )
        options = _options_with_store(source, settings, device, dtype, store)
        checked, loaded = require_valid_file(source, models, settings)
        request = ObjectiveRequest(experiment, measure, site, at, mode)
        guard = partial(borrowed_models, models)
        opened, problems = open_objective(checked, request, options, loaded, guard)
        warn_diagnostics(problems)
        return opened
