"""`mechdsl.run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from mechdsl.api.shared import (
    Models,
    Values,
    borrowed_models,
    checked_file,
    mode_of,
    read_file,
    refuse,
    settings_of,
)
from mechdsl.base.random_numbers import keeps_random_numbers
from mechdsl.base.source import Source
from mechdsl.diagnostics.raised import Diagnostics, MechdslError, warn
from mechdsl.pipeline.arguments import (
    dtype_problem,
    name_of,
    names,
    size_problems,
    store_problem,
)

if TYPE_CHECKING:
    import torch

    from mechdsl.execute.profile import Profile
    from mechdsl.execute.sizes import PassSizes
    from mechdsl.pipeline.run_options import RunOptions
    from mechdsl.plan.plan import Plan
    from mechdsl.results.against import Earlier
    from mechdsl.results.results import Results
    from mechdsl.show.progress import Bar
    from mechdsl.validate.check_file import Checked


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
    with borrowed_models(models):
        # Inside, as what is imported may draw random numbers too.
        from mechdsl.execute.options import Options
        from mechdsl.pipeline.run_options import RunOptions
        from mechdsl.show.progress import Bar
        from mechdsl.store.place import store_folder

        source = read_file(file)
        found = size_problems(limit, pass_tokens, prompt_tokens)
        refuse(dtype_problem(dtype), found, store_problem(store, fresh))
        profiles: list[tuple[Plan, Profile]] = []
        bar = Bar(source.name, shown=progress)
        named = Path(store) if isinstance(store, str) else store
        options = RunOptions(
            settings=settings_of(
                set,
                limit,
                only,
                mode_of(allow_python),
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

    checked, loaded = checked_file(source, models, options.settings)
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
