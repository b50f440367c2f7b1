"""The Python API: what the commands of the same names do, with results to go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from mechdsl.base.files import write_whole
from mechdsl.base.random_numbers import keeps_random_numbers
from mechdsl.base.source import Source
from mechdsl.base.visible import json_text
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e04_model import NoTokenizer
from mechdsl.diagnostics.raised import Diagnostics, MechdslError, MechdslWarning, warn
from mechdsl.loading.when_needed import build_when_needed
from mechdsl.pipeline.arguments import (
    dtype_problem,
    name_of,
    names,
    size_problems,
    store_problem,
    word_problem,
)

if TYPE_CHECKING:
    import torch

    from mechdsl.execute.profile import Profile
    from mechdsl.execute.sizes import PassSizes
    from mechdsl.hooks.loaded import LoadedModel
    from mechdsl.pipeline.run_options import RunOptions
    from mechdsl.plan.plan import Plan
    from mechdsl.program.python_files import Mode
    from mechdsl.results.against import Earlier
    from mechdsl.results.found_differences import Differences
    from mechdsl.results.kept_runs import Run, Runs
    from mechdsl.results.results import Results
    from mechdsl.show.progress import Bar
    from mechdsl.show.terminal import Printed
    from mechdsl.validate.check_file import Checked, Settings

__all__ = [
    "MechdslError",
    "MechdslWarning",
    "check",
    "diff",
    "explain",
    "graph_of",
    "plan_of",
    "run",
    "runs",
]

Models = Mapping[str, tuple[Any, Any]]
"""Name in the file → (transformers model, fast tokenizer)."""
Values = Mapping[str, object]
"""Name of a `param` → its value."""


@keeps_random_numbers
def check(
    file: str | Path,
    models: Models | None = None,
    *,
    set: Values | None = None,
    allow_outside: bool = False,
    untrusted: bool = False,
    require_models: bool = False,
) -> Diagnostics:
    """All errors and warnings of a file, as `mechdsl validate` finds them: without weights, and
    without torch but for models that are handed over.

    file: its path, or its text (what has a line break or begins with `mech `).
    models, set, allow_outside, untrusted: as for `run`.
    require_models: whether a model that isn't on this machine is an error; all that doesn't hang on
        it is checked either way.
    Returns a list of diagnostics, empty where nothing is wrong; raises nothing about the file.
    """
    source, found = _source(file)
    if source is None:
        return Diagnostics(found)
    try:
        settings = _settings(
            set,
            python="look",
            require_models=require_models,
            allow_outside=allow_outside,
            untrusted=untrusted,
        )
        checked, _ = _check(source, models, settings)
    except MechdslError as error:
        return error.diagnostics
    return Diagnostics(checked.diagnostics)


@keeps_random_numbers
def run(
    file: str | Path,
    models: Models | None = None,
    *,
    set: Values | None = None,
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
    with _borrowed(models):
        # Inside, as what is imported may draw random numbers too.
        from mechdsl.execute.options import Options
        from mechdsl.pipeline.run_options import RunOptions
        from mechdsl.show.progress import Bar
        from mechdsl.store.place import store_folder

        source = _read(file)
        found = size_problems(limit, pass_tokens, prompt_tokens)
        _refuse(dtype_problem(dtype), found, store_problem(store, fresh))
        profiles: list[tuple[Plan, Profile]] = []
        bar = Bar(source.name, shown=progress)
        named = Path(store) if isinstance(store, str) else store
        options = RunOptions(
            settings=_settings(
                set,
                limit,
                only,
                _mode(allow_python),
                allow_outside=allow_outside,
                untrusted=untrusted,
            ),
            device=str(device),
            dtype=None if dtype is None else name_of(dtype),
            offload=None if offload is None else Path(offload),
            out=None if out is None else Path(out),
            without=names(no_pass),
            execution=Options(
                on_progress=bar.advance,
                pass_tokens=pass_tokens,
                prompt_tokens=prompt_tokens,
                allow_nan=allow_nan,
            ),
            on_profile=(lambda *done: profiles.append(done)) if profile else None,
            store=store_folder(source.path, named, untrusted=untrusted),
            fresh=fresh,
        )
        verdicts = AskedVerdicts(against, fail_fast)
        results = _run(source, models, options, bar, verdicts, write_reports=write_reports)
        sizes = results.files[0].sizes
        return replace(results, profile=_profile_text(profiles, sizes))


@keeps_random_numbers
def plan_of(
    file: str | Path,
    models: Models | None = None,
    *,
    set: Values | None = None,
    limit: int | None = None,
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
    no_pass: Sequence[str] = (),
    pass_tokens: int | None = None,
    prompt_tokens: int | None = None,
    measure: bool = False,
) -> Printed:
    """What `mechdsl plan` prints: the intervention graph, the cells, rows and forward passes of a
    file, what effects its rows can show, what each planner pass saves, and how long the rest takes.
    Nothing is run.

    measure: load the models, run base and source runs (no rule), and say in the metric's units what
        can be shown.
    The other arguments are those of `run`. Raises MechdslError where something is wrong.
    """
    from mechdsl.plan.make_plan import make_plan
    from mechdsl.plan.passes import unknown_passes
    from mechdsl.plan.plan import PASS_TOKENS, PROMPT_TOKENS
    from mechdsl.show.plan import print_plan
    from mechdsl.show.terminal import printed

    _refuse(size_problems(limit, pass_tokens, prompt_tokens))
    without = names(no_pass)
    how = _settings(
        set, limit, python=_mode(allow_python), allow_outside=allow_outside, untrusted=untrusted
    )
    sizes = pass_tokens or PASS_TOKENS, prompt_tokens or PROMPT_TOKENS
    if not measure:
        checked, measured = _alone(file, models, how), None
        _refuse(unknown_passes(sorted(without)))
    else:
        with _borrowed(models):
            from mechdsl.execute.options import Options
            from mechdsl.pipeline.compute import measure_unpatched
            from mechdsl.pipeline.run_options import RunOptions

            checked, loaded = _checked(_read(file), models, how)
            _refuse(unknown_passes(sorted(without)))
            execution = Options(pass_tokens=pass_tokens, prompt_tokens=prompt_tokens)
            measured, found = measure_unpatched(checked, RunOptions(execution=execution), loaded)
        _refuse([each for each in found if each.severity == "error"])
        warn(found)
    made = make_plan(checked.experiments, without=without)
    return printed(lambda console: print_plan(made, console, *sizes, measured))


@keeps_random_numbers
def graph_of(
    file: str | Path,
    models: Models | None = None,
    *,
    set: Values | None = None,
    format: Literal["dot", "mermaid", "svg", "text"] = "mermaid",
    to: str | Path | None = None,
    before: bool = False,
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
) -> Printed:
    """What `mechdsl graph` prints: the intervention graph of a file, drawn.

    format: as DOT, Mermaid, SVG or text. to: also write it to this file. before: without the
        planner's passes. The other arguments are those of `run`.
    Raises MechdslError where something is wrong, OSError where `to` can't be written.
    """
    from mechdsl.show.graph import DRAWINGS, draw
    from mechdsl.show.terminal import Drawing, Printed

    _refuse(word_problem("format", format, DRAWINGS))
    checked = _alone(
        file,
        models,
        _settings(
            set, python=_mode(allow_python), allow_outside=allow_outside, untrusted=untrusted
        ),
    )
    text = draw(checked.experiments, format, before=before)
    if to is not None:
        write_whole(Path(to), text)
    return Drawing(text) if format == "svg" else Printed(text)


@keeps_random_numbers
def explain(
    what: str | Path,
    models: Models | None = None,
    *,
    set: Values | None = None,
    limit: int | None = None,
    format: Literal["text", "json"] = "text",
    allow_python: bool = False,
    allow_outside: bool = False,
    untrusted: bool = False,
) -> Printed:
    """What `mechdsl explain` prints: the prompts of a file, token by token, with the positions that
    rules hit; or the page of a code (`explain("E0301")`) or of the language
    (`explain("language")`).

    format: `json` is every row of every run. The other arguments are those of `run`.
    Raises MechdslError where something is wrong.
    """
    from mechdsl.diagnostics.pages import names_page, page_of
    from mechdsl.show.terminal import Printed, printed

    _refuse(word_problem("format", format, ("text", "json")), size_problems(limit))
    if names_page(str(what)):
        text, problems = page_of(str(what))
        _refuse(problems)
        return Printed(text)
    checked = _alone(
        what,
        models,
        _settings(
            set, limit, python=_mode(allow_python), allow_outside=allow_outside, untrusted=untrusted
        ),
    )
    from mechdsl.show import prompts

    if format == "json":
        return Printed(json_text(prompts.as_json(checked), indent=1) + "\n")
    return printed(lambda console: prompts.explain(checked, console))


def runs(store: str | Path | None = None) -> Runs:
    """The runs that a store keeps, the newest first, as `mechdsl runs` lists them.

    store: its folder; None: what `MECHDSL_STORE` names, or `.mechdsl` in the working folder, and an
        empty list where that isn't there.
    Returns a list; each run has `id`, `state`, `file`, `began`, `about`, its `results`, which are
    read when they are asked for, `export(folder)` and `remove()`.
    Raises MechdslError (E0208) where a folder that is named is no store, or can't be read.
    """
    from mechdsl.results.kept_runs import Runs, runs_in
    from mechdsl.results.named_runs import folder_of, has_store

    folder = folder_of(None, None if store is None else Path(store))
    return Runs() if store is None and not has_store(folder) else runs_in(folder)


@keeps_random_numbers
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
    from mechdsl.results.diff_sides import differences_of

    return differences_of(old, new, None if store is None else Path(store))


# --- what they share ----------------------------------------------------------------------------


def _source(file: str | Path) -> tuple[Source | None, list[Diagnostic]]:
    """A file by its path, or a text that begins like one (`mech 1`)."""
    from mechdsl.syntax.parse import read_source

    if isinstance(file, str) and ("\n" in file or file.lstrip().startswith("mech ")):
        return Source(file), []
    return read_source(Path(file))


def _read(file: str | Path) -> Source:
    source, found = _source(file)
    if source is None:
        raise MechdslError(found)
    return source


def _check(
    source: Source, models: Models | None, settings: Settings
) -> tuple[Checked, dict[str, LoadedModel]]:
    if not models:  # and so without torch
        from mechdsl.validate.check_file import check_source

        return check_source(source, settings), {}
    with _borrowed(models):
        from mechdsl.pipeline.compute import check_with_models

        return check_with_models(source, settings, _pairs(models))


def _borrowed(models: Models | None) -> AbstractContextManager[None]:
    """Models of Python's, which are afterwards as they were; without any, torch isn't needed."""
    pairs = _pairs(models)
    if not pairs:
        return nullcontext()
    from mechdsl.loading.borrowed import borrowed

    return borrowed(module for module, _ in pairs.values())


def _checked(
    source: Source, models: Models | None, settings: Settings
) -> tuple[Checked, dict[str, LoadedModel]]:
    """A file without errors, its warnings shown; MechdslError where it has some."""
    checked, loaded = _check(source, models, settings)
    if has_errors(checked.diagnostics):
        raise MechdslError(checked.diagnostics)
    warn(checked.diagnostics)
    return checked, loaded


class AskedVerdicts(NamedTuple):
    """What is asked of verdicts."""

    against: str | Path | Results | None
    fail_fast: bool


def _earlier(against: object, checked: Checked, store: Path | None) -> Earlier | None:
    """The run that a file is set against; MechdslError where there is none."""
    if against is None:
        return None
    from mechdsl.results.earlier_runs import earlier_run, given_results, to_run

    files = [to_run(checked)]
    if isinstance(against, str | Path):
        return earlier_run(str(against), files, store)
    from mechdsl.results.results import Results

    if not isinstance(against, Results):
        raise TypeError("`against` is a run's name, a path or the results of `mechdsl.run`")
    return given_results(against, files)


def _run(
    source: Source,
    models: Models | None,
    options: RunOptions,
    bar: Bar,
    asked: AskedVerdicts,
    *,
    write_reports: bool,
) -> Results:
    """Check, run, write reports, show warnings."""
    from mechdsl.pipeline.run_file import StoreStopped, run_file
    from mechdsl.results.against import first_failure
    from mechdsl.results.results import Results
    from mechdsl.results.versions import versions
    from mechdsl.show.show_report import write_reports as write_all

    checked, loaded = _checked(source, models, options.settings)
    earlier = _earlier(asked.against, checked, options.store)
    if asked.fail_fast:
        options = replace(options, ends=first_failure(earlier))
    try:
        with bar:
            ran = run_file(checked, options, loaded)
    except StoreStopped as stopped:
        raise MechdslError([stopped.diagnostic]) from stopped
    if ran.result is None:
        raise MechdslError(ran.diagnostics)
    done = write_all(ran.result.experiments) if write_reports else []
    unwritten = [problem for report in done for problem in report.diagnostics]
    warn([*ran.diagnostics, *unwritten])
    return Results(
        (ran.result,),
        versions(),
        diagnostics=Diagnostics([*checked.diagnostics, *ran.diagnostics, *unwritten]),
        written=tuple(report.path for report in done if report.path is not None),
        notes=ran.notes,
        against=None if earlier is None else earlier.compare([ran.result]),
    )


def _alone(file: str | Path, models: Models | None, settings: Settings) -> Checked:
    return _checked(_read(file), models, settings)[0]


def _pairs(models: Any) -> Models:
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
    _refuse(found)
    return cast("Models", models)


def _profile_text(profiles: Sequence[tuple[Plan, Profile]], sizes: PassSizes | None) -> str:
    if not profiles:
        return ""
    from mechdsl.show.plan import print_profile
    from mechdsl.show.terminal import printed

    texts: list[str] = []
    for planned, done in profiles:
        assert sizes is not None  # something was run
        texts.append(printed(partial(print_profile, planned, done, sizes)))
    return "".join(texts)


def _settings(
    set: Values | None,
    limit: int | None = None,
    only: str | None = None,
    python: Mode = "refuse",
    *,
    require_models: bool = True,
    allow_outside: bool,
    untrusted: bool,
) -> Settings:
    from mechdsl.validate.check_file import Settings

    given = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in (set or {}).items()
    }
    return Settings(
        given,
        limit,
        only,
        python,
        require_models,
        allow_outside,
        untrusted,
        build=build_when_needed,
    )


def _mode(allow_python: bool) -> Mode:
    return "run" if allow_python else "refuse"


def _refuse(*found: Sequence[Diagnostic]) -> None:
    """MechdslError where anything was found."""
    problems = [each for some in found for each in some]
    if problems:
        raise MechdslError(problems)
