"""The Python API: `run`, `check`, `plan_of`, `graph_of`, `explain`, `runs` and `diff`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from mechdsl.base.files import write_atomically
from mechdsl.base.runtime import restores_random_state
from mechdsl.base.source import Source
from mechdsl.base.text import dump_json
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.models import NoTokenizer
from mechdsl.diagnostics.rendering import Diagnostics, MechdslError, warn_diagnostics
from mechdsl.loading.lazy_builder import build_lazily
from mechdsl.pipeline.options import (
    dtype_name,
    dtype_problem,
    size_problems,
    store_problem,
    to_names,
    word_problem,
)
from mechdsl.program.plugins import load_plugins

if TYPE_CHECKING:
    import torch

    from mechdsl.checks.file_check import CheckedFile, CheckSettings
    from mechdsl.execute.run_record import ExecutionProfile, PassSizes
    from mechdsl.forward.hooks.model import LoadedModel
    from mechdsl.pipeline.options import RunOptions
    from mechdsl.planner.plan import Plan
    from mechdsl.program.python_functions import PythonMode
    from mechdsl.results.differences.comparison import Differences
    from mechdsl.results.experiment_result import EarlierRun
    from mechdsl.results.results import Results
    from mechdsl.results.runs import Run, Runs
    from mechdsl.show.output import PrintedText
    from mechdsl.show.progress import ProgressBar


BorrowedModels = Mapping[str, tuple[Any, Any]]
"""Name in the file → (transformers model, fast tokenizer)."""

ParameterValues = Mapping[str, object]
"""Name of a `param` → its value."""


def make_source(file: str | Path) -> tuple[Source | None, list[Diagnostic]]:
    """A file by its path, or a text that begins like one (`mech 1`)."""
    from mechdsl.syntax.frontend import read_source

    if isinstance(file, str) and ("\n" in file or file.lstrip().startswith("mech ")):
        return Source(file), []
    return read_source(Path(file))


def read_file(file: str | Path) -> Source:
    source, found = make_source(file)
    if source is None:
        raise MechdslError(found)
    return source


def check_source_with(
    source: Source, models: BorrowedModels | None, settings: CheckSettings
) -> tuple[CheckedFile, dict[str, LoadedModel]]:
    if not models:  # and so without torch
        from mechdsl.checks.file_check import check_source

        return check_source(source, settings), {}
    with borrowed_models(models):
        from mechdsl.pipeline.computation import check_with_models

        return check_with_models(source, settings, model_pairs(models))


def borrowed_models(models: BorrowedModels | None) -> AbstractContextManager[None]:
    """Models of Python's, which are afterwards as they were; without any, torch isn't needed."""
    pairs = model_pairs(models)
    if not pairs:
        return nullcontext()
    from mechdsl.loading.devices import restore_models

    return restore_models(module for module, _ in pairs.values())


def require_valid_file(
    source: Source, models: BorrowedModels | None, settings: CheckSettings
) -> tuple[CheckedFile, dict[str, LoadedModel]]:
    """A file without errors, its warnings shown; MechdslError where it has some."""
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
    """Models with their tokenizers; MechdslError (E0412) for those that have none, TypeError for
    what is no dict."""
    if models is None:
        return {}
    if not isinstance(models, Mapping):
        raise TypeError('models are a dict: `models={"toy": (model, tokenizer)}`')
    found: list[Diagnostic] = []
    for name, pair in cast("Mapping[str, Any]", models).items():
        hint = f'write `models={{"{name}": (model, tokenizer)}}`'
        if not isinstance(pair, tuple | list) or len(cast("Sequence[Any]", pair)) != 2:
            reason = "it was handed over alone"
            found.append(NoTokenizer(model=name, reason=reason, hint=hint))
        elif pair[1] is None:
            reason = "`None` stands where the tokenizer should"
            found.append(NoTokenizer(model=name, reason=reason, hint=hint))
        elif hasattr(pair[0], "encode") and hasattr(pair[1], "forward"):
            reason = "the model stands where the tokenizer should"
            found.append(NoTokenizer(model=name, reason=reason, hint=hint))
    raise_errors(found)
    return cast("BorrowedModels", models)


def settings_from_arguments(
    set: ParameterValues | None,
    limit: int | None = None,
    only: str | None = None,
    python: PythonMode = "refuse",
    *,
    require_models: bool = True,
    allow_outside: bool,
    untrusted: bool,
) -> CheckSettings:
    from mechdsl.checks.file_check import CheckSettings

    given = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in (set or {}).items()
    }
    return CheckSettings(
        given,
        limit,
        only,
        python,
        require_models,
        allow_outside,
        untrusted,
        build=build_lazily,
    )


def python_mode_of(allow_python: bool) -> PythonMode:
    return "run" if allow_python else "refuse"


def raise_errors(*found: Sequence[Diagnostic]) -> None:
    """MechdslError where anything was found."""
    problems = [each for some in found for each in some]
    if problems:
        raise MechdslError(problems)


@restores_random_state
def run(
    file: str | Path,
    models: BorrowedModels | None = None,
    *,
    set: ParameterValues | None = None,
    limit: int | None = None,
    only: str | None = None,
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
    store: str | Path | Literal[False] | None = None,
    fresh: bool = False,
    against: str | Path | Results | None = None,
    fail_fast: bool = False,
) -> Results:
    """Run a file as `mechdsl run` does, and return its results.

    file: its path, or its text (what has a line break or begins with `mech `); paths in a text
        start from the working directory.
    models: name in the file → (transformers model, fast tokenizer), in place of what the file
        declares under that name. They run where and as they are, so `device` and `dtype` don't
        apply, and they are left exactly as they were.
    set: values of the file's `param` lines.
    limit: rows per experiment at most. only: the one experiment to run, with what it needs.
    device: `auto`, `cpu`, `cuda`, `cuda:1`. dtype: in place of what the file says.
    offload: folder for weights that fit into no memory. out: folder that keeps every prompt's
        values.
    write_reports: write the reports that the file sends to a file (`report … to "x.png"`).
    profile: compare estimated with measured work in `Results.profile`.
    progress: whether standard error shows a bar while rows are run; None does in terminals and
        notebooks only, as the command line.
    allow_python: run the Python files that the file refers to. allow_outside: let reports go
        anywhere. untrusted: list the paths that the file names, confine all of them, run no Python.
    plugins: names of installed plugins to load, which add to the language. They stay loaded until
        the process ends.
    no_pass: planner passes to switch off. pass_tokens, prompt_tokens: most tokens of a pass over
        patched rows, and of a batch of unpatched prompts.
    allow_nan: leave rows where the model gives NaN out of everything, and count them.
    store: folder where all that is computed is kept, and looked up before anything is computed;
        None: what `MECHDSL_STORE` names, or `.mechdsl` beside the file (of a text: none); False:
        none. fresh: compute all anew, and keep that.
    against: an earlier run, by its id, `last`, its `.mech` file or a folder that `out` has made, or
        its results: what has changed since is in `Results.against`.
    fail_fast: stop at the first expectation that fails (with `against`: that held there, or is
        new); `not_run` of the file says what was left out.

    An experiment or a measure that can't be computed costs no other: `complete` of the results is
    False then, `lost` of the file and `missing` of the measure say why, and a warning is shown.
    Warnings are shown through `warnings` as MechdslWarning, and kept in `Results.diagnostics`.
    Raises MechdslError where the file, its data, a model or an argument is wrong, and where nothing
    can be computed.
    """
    with borrowed_models(models):
        # Inside, as what is imported may draw random numbers too.
        from mechdsl.execute.run_record import ExecutionOptions
        from mechdsl.pipeline.options import RunOptions
        from mechdsl.show.progress import ProgressBar
        from mechdsl.store.store import store_folder

        raise_errors(load_plugins(plugins))
        source = read_file(file)
        found = size_problems(limit, pass_tokens, prompt_tokens)
        raise_errors(dtype_problem(dtype), found, store_problem(store, fresh))
        profiles: list[tuple[Plan, ExecutionProfile]] = []
        bar = ProgressBar(source.name, shown=progress)
        named = Path(store) if isinstance(store, str) else store
        options = RunOptions(
            settings=settings_from_arguments(
                set,
                limit,
                only,
                python_mode_of(allow_python),
                allow_outside=allow_outside,
                untrusted=untrusted,
            ),
            device=str(device),
            dtype=None if dtype is None else dtype_name(dtype),
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
            store=store_folder(source.path, named, untrusted=untrusted),
            fresh=fresh,
        )
        verdicts = VerdictRequest(against, fail_fast)
        results = _run(source, models, options, bar, verdicts, write_reports=write_reports)
        sizes = results.files[0].sizes
        return replace(results, profile=_profile_text(profiles, sizes))


class VerdictRequest(NamedTuple):
    """What is asked of verdicts."""

    against: str | Path | Results | None
    fail_fast: bool


def _earlier_run(against: object, checked: CheckedFile, store: Path | None) -> EarlierRun | None:
    """The run that a file is set against; MechdslError where there is none."""
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
        assert sizes is not None  # something was run
        texts.append(capture_text(partial(print_profile, planned, done, sizes)))
    return "".join(texts)


def runs(store: str | Path | None = None) -> Runs:
    """The runs that a store keeps, the newest first, as `mechdsl runs` lists them.

    store: its folder; None: what `MECHDSL_STORE` names, or `.mechdsl` in the working folder, and an
        empty list where that isn't there.
    Returns a list; each run has `id`, `state`, `file`, `began`, `about`, its `results`, which are
    read when they are asked for, `export(folder)` and `remove()`.
    Raises MechdslError (E0208) where a folder that is named is no store, or can't be read.
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
    """What changed from one run to another, as `mechdsl diff` prints it: inputs, verdicts, effects
    beyond noise, what is new and gone.

    old, new: `Results`, a run of `mechdsl.runs()`, or what a run is called by: its id or the
        beginning of one, `last`, a `.mech` file (its latest finished run), a folder of `out`.
    store: the folder that runs are in; None: beside the `.mech` file, or of the working folder.
    Returns `Differences`: `changed` is whether the command's exit status is 1.
    Raises MechdslError (E0208) where a run can't be found or read.
    """
    from mechdsl.results.differences.comparison import diff_runs

    return diff_runs(old, new, None if store is None else Path(store))


@restores_random_state
def check(
    file: str | Path,
    models: BorrowedModels | None = None,
    *,
    set: ParameterValues | None = None,
    allow_outside: bool = False,
    untrusted: bool = False,
    plugins: Sequence[str] = (),
    require_models: bool = False,
) -> Diagnostics:
    """All errors and warnings of a file, as `mechdsl validate` finds them: without weights, and
    without torch but for models that are handed over.

    file: its path, or its text (what has a line break or begins with `mech `).
    models, set, allow_outside, untrusted, plugins: as for `run`.
    require_models: whether a model that isn't on this machine, or has no weights, is an error; all
        that doesn't depend on it is checked either way.
    Returns a list of diagnostics, empty where nothing is wrong; raises nothing about the file.
    """
    from mechdsl.models.folder import report_missing_weights

    found = load_plugins(plugins)
    if found:
        return Diagnostics(found)
    source, found = make_source(file)
    if source is None:
        return Diagnostics(found)
    try:
        settings = settings_from_arguments(
            set,
            python="look",
            require_models=require_models,
            allow_outside=allow_outside,
            untrusted=untrusted,
        )
        checked, _ = check_source_with(source, models, settings)
    except MechdslError as error:
        return error.diagnostics
    given = () if models is None else models
    own = [each for name, each in checked.program.models.items() if name not in given]
    return Diagnostics(
        checked.diagnostics + (report_missing_weights(own) if require_models else [])
    )


@restores_random_state
def plan_of(
    file: str | Path,
    models: BorrowedModels | None = None,
    *,
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
) -> PrintedText:
    """What `mechdsl plan` prints: the intervention graph, the cells, rows and forward passes of a
    file, what effects its rows can show, what each planner pass saves, and how long the rest takes.
    Nothing is run.

    measure: load the models, run base and source runs (no rule), and say in the metric's units what
        can be shown.
    The other arguments are those of `run`. Raises MechdslError where something is wrong.
    """
    from mechdsl.planner.passes import check_pass_names, make_plan
    from mechdsl.planner.plan import PASS_TOKENS, PROMPT_TOKENS
    from mechdsl.show.output import capture_text
    from mechdsl.show.plan import print_plan

    raise_errors(load_plugins(plugins), size_problems(limit, pass_tokens, prompt_tokens))
    without = to_names(no_pass)
    how = settings_from_arguments(
        set,
        limit,
        python=python_mode_of(allow_python),
        allow_outside=allow_outside,
        untrusted=untrusted,
    )
    sizes = pass_tokens or PASS_TOKENS, prompt_tokens or PROMPT_TOKENS
    if not measure:
        checked, measured = require_valid_source(file, models, how), None
        raise_errors(check_pass_names(sorted(without)))
    else:
        with borrowed_models(models):
            from mechdsl.execute.run_record import ExecutionOptions
            from mechdsl.pipeline.computation import measure_unpatched
            from mechdsl.pipeline.options import RunOptions

            checked, loaded = require_valid_file(read_file(file), models, how)
            raise_errors(check_pass_names(sorted(without)))
            execution = ExecutionOptions(pass_tokens=pass_tokens, prompt_tokens=prompt_tokens)
            measured, found = measure_unpatched(checked, RunOptions(execution=execution), loaded)
        raise_errors([each for each in found if each.severity == "error"])
        warn_diagnostics(found)
    made = make_plan(checked.experiments, without=without)
    return capture_text(
        lambda console: print_plan(made, console, *sizes, measured, saving=checked.saving)
    )


@restores_random_state
def graph_of(
    file: str | Path,
    models: BorrowedModels | None = None,
    *,
    set: ParameterValues | None = None,
    format: Literal["dot", "mermaid", "svg", "text"] = "mermaid",
    to: str | Path | None = None,
    before: bool = False,
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
    plugins: Sequence[str] = (),
) -> PrintedText:
    """What `mechdsl graph` prints: the intervention graph of a file, drawn.

    format: as DOT, Mermaid, SVG or text. to: also write it to this file. before: without the
        planner's passes. The other arguments are those of `run`.
    Raises MechdslError where something is wrong, OSError where `to` can't be written.
    """
    from mechdsl.show.graph import GRAPH_FORMATS, draw_graph
    from mechdsl.show.output import PrintedText, SvgText

    raise_errors(load_plugins(plugins), word_problem("format", format, GRAPH_FORMATS))
    checked = require_valid_source(
        file,
        models,
        settings_from_arguments(
            set,
            python=python_mode_of(allow_python),
            allow_outside=allow_outside,
            untrusted=untrusted,
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
    set: ParameterValues | None = None,
    limit: int | None = None,
    format: Literal["text", "json"] = "text",
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
    plugins: Sequence[str] = (),
) -> PrintedText:
    """What `mechdsl explain` prints: the prompts of a file, token by token, with the positions that
    rules hit; or the page of a code (`explain("E0301")`) or of the language
    (`explain("language")`).

    format: `json` is every row of every run. The other arguments are those of `run`.
    Raises MechdslError where something is wrong.
    """
    from mechdsl.diagnostics.command_line import find_page, is_page_name
    from mechdsl.show.output import PrintedText, capture_text

    raise_errors(word_problem("format", format, ("text", "json")), size_problems(limit))
    if is_page_name(str(what)):
        text, problems = find_page(str(what))
        raise_errors(problems)
        return PrintedText(text)
    raise_errors(load_plugins(plugins))
    checked = require_valid_source(
        what,
        models,
        settings_from_arguments(
            set,
            limit,
            python=python_mode_of(allow_python),
            allow_outside=allow_outside,
            untrusted=untrusted,
        ),
    )
    from mechdsl.show import prompts

    if format == "json":
        return PrintedText(dump_json(prompts.prompts_document(checked), indent=1) + "\n")
    return capture_text(lambda console: prompts.print_prompts(checked, console))
