"""`mechdsl run`: run files and print their tables."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mechdsl.cli.mech_files import checked_file, mech_files
from mechdsl.cli.options import (
    allow_python_option,
    files_argument,
    limit_option,
    no_pass_option,
    pass_tokens_option,
    prompt_tokens_option,
    python_mode,
    set_option,
    settings,
)
from mechdsl.cli.output import broke_off, make_console, print_diagnostics
from mechdsl.cli.status import BROKE_OFF, FAILED, FINE, INTERRUPTED, WRONG
from mechdsl.diagnostics.core import has_errors

if TYPE_CHECKING:
    from mechdsl.execute.profile import Profile
    from mechdsl.pipeline import RunOptions
    from mechdsl.plan.plan import Plan
    from mechdsl.results.experiment_result import FileResult
    from mechdsl.validate.check_file import Checked


@click.command()
@files_argument
@set_option
@limit_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    help="Instead of what the file says.",
)
@click.option(
    "--offload",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Spread the model over devices, memory and this folder, with accelerate.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Keep every prompt's values here.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
)
@click.option("--only", metavar="EXPERIMENT", help="Run this experiment, and what it needs.")
@click.option("--profile", is_flag=True, help="Afterwards, estimated against measured work.")
@allow_python_option
@no_pass_option
@pass_tokens_option
@prompt_tokens_option
@click.option(
    "--allow-nan",
    is_flag=True,
    help="Leave rows where the model gives NaN out of everything, and count them.",
)
def run(
    files: tuple[Path, ...],
    parameters: tuple[str, ...],
    limit: int | None,
    device: str,
    dtype: str | None,
    offload: Path | None,
    out: Path | None,
    form: str,
    only: str | None,
    profile: bool,
    allow_python: bool,
    no_pass: tuple[str, ...],
    pass_tokens: int | None,
    prompt_tokens: int | None,
    allow_nan: bool,
) -> int:
    """Run files and print their tables.

    Exit status 0 when every expectation holds, 1 when one doesn't, 2 when something is wrong, 3
    when a part could not be computed.
    """
    how = settings(parameters, limit, only, python_mode(allow_python))
    paths, problems = mech_files(files)
    # All files are checked before the first one runs (and before torch is imported).
    everything: list[Checked] = []
    for path in paths:
        checked, found = checked_file(path, how)
        problems += found
        if checked is not None:
            everything.append(checked)
    print_diagnostics(problems)
    if has_errors(problems):
        return WRONG
    from mechdsl.execute.execute import Options
    from mechdsl.loading.load import import_library
    from mechdsl.pipeline import RunOptions

    import_library()
    gc.freeze()  # what was imported is no garbage,
    gc.enable()  # but models and results do make some
    options = RunOptions(
        device=device,
        dtype=dtype,
        offload=offload,
        out=out,
        without=frozenset(no_pass),
        execution=Options(
            pass_tokens=pass_tokens, prompt_tokens=prompt_tokens, allow_nan=allow_nan
        ),
    )
    return _run_all(everything, options, form, profile=profile)


def _run_all(files: list[Checked], options: RunOptions, form: str, *, profile: bool) -> int:
    """Run files one after another, printing what each has found. One that can't be computed costs
    no other."""
    from mechdsl.results.collect import versions
    from mechdsl.results.results import Results

    found: list[FileResult] = []
    failed: list[int] = []
    for checked in files:
        result = _run_file(checked, options, form, profile=profile)
        if result == INTERRUPTED:
            return INTERRUPTED
        if isinstance(result, int):
            failed.append(result)
        else:
            found.append(result)
    if not found and failed:
        return max(failed)
    results = Results(tuple(found), versions())
    if form == "json":
        sys.stdout.write(results.to_json() + "\n")
    elif form == "csv":
        from mechdsl.show.reports.files import results_csv

        sys.stdout.write(results_csv(results))
    if failed or not results.complete:
        return BROKE_OFF
    return FINE if results.holds else FAILED


def _run_file(
    checked: Checked, options: RunOptions, form: str, *, profile: bool
) -> FileResult | int:
    """Run a file and show its reports; an exit status where that broke off."""
    from mechdsl.pipeline import run_checked
    from mechdsl.show.plan import print_profile
    from mechdsl.show.progress import Bar

    source = checked.source
    bar = Bar(source.name)
    profiles: list[tuple[Plan, Profile]] = []  # several where experiments wait for others' results

    def keep(plan: Plan, done: Profile) -> None:
        profiles.append((plan, done))

    options = replace(
        options,
        execution=replace(options.execution, on_progress=bar.advance),
        on_profile=keep if profile else None,
    )
    try:
        with bar:
            result, diagnostics = run_checked(checked, options)
    except KeyboardInterrupt:
        kept = f"; what is finished is in {options.out}" if options.out is not None else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return broke_off(f"the run of {source.name}", error)
    print_diagnostics(diagnostics)
    if result is None:
        return WRONG
    if not result.experiments and not result.lost:
        print(f"{source.name} has no experiments: nothing was run", file=sys.stderr)
    try:
        _show(result, source.folder, tables=form == "table")
    except BrokenPipeError:
        raise
    except Exception as error:
        return broke_off(f"a report of {source.name}", error)
    if result.sizes is not None:
        for plan, done in profiles:
            print_profile(plan, done, result.sizes, make_console(stderr=form != "table"))
    return result


def _show(result: FileResult, folder: Path, *, tables: bool) -> None:
    """All reports of a file, each experiment with the verdicts on its expectations.

    tables: print them; else only those are made that go to a file.
    """
    from mechdsl.show.reports.verdicts import print_lost, print_verdicts
    from mechdsl.show.show_report import show_report

    console = make_console()
    for experiment in result.experiments:
        for report in experiment.reports:
            if not tables and report.file is None:
                continue
            written = show_report(experiment, report, console, folder)
            if written is not None:
                said = f"{experiment.name}: report {report.kind} written to {written}"
                print(said, file=sys.stdout if tables else sys.stderr)
        if tables:
            print_verdicts(experiment, console)
    if tables:
        for lost in result.lost:
            print_lost(lost, console)
