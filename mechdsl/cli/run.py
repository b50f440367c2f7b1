"""`mechdsl run`: run files and print their tables."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mechdsl.cli.interruption import GOES_ON, interrupted
from mechdsl.cli.mech_files import checked_file, mech_files
from mechdsl.cli.options import (
    PassOptions,
    StoreOptions,
    allow_outside_option,
    allow_python_option,
    files_argument,
    format_option,
    limit_option,
    pass_options,
    python_mode,
    set_option,
    settings,
    store_options,
    untrusted_option,
)
from mechdsl.cli.output import broke_off, make_console, print_diagnostics, say
from mechdsl.cli.status import BROKE_OFF, WRONG
from mechdsl.cli.streams import OutputLost, without_output, write_json
from mechdsl.cli.verdicts import VerdictOptions, Verdicts, verdict_options
from mechdsl.diagnostics.core import Diagnostic, has_errors

if TYPE_CHECKING:
    from mechdsl.execute.profile import Profile
    from mechdsl.pipeline.run_options import RunOptions
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
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write results and every prompt's values into a folder in this one.",
)
@format_option("table", "json", "csv")
@click.option("--only", metavar="EXPERIMENT", help="Run this experiment, and what it needs.")
@click.option("--profile", is_flag=True, help="Afterwards, estimated against measured work.")
@allow_python_option
@allow_outside_option
@untrusted_option
@pass_options
@store_options
@click.option(
    "--allow-nan",
    is_flag=True,
    help="Leave rows where the model gives NaN out of everything, and count them.",
)
@verdict_options
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
    allow_outside: bool,
    untrusted: bool,
    passes: PassOptions,
    stores: StoreOptions,
    allow_nan: bool,
    asked: VerdictOptions,
) -> int:
    """Run files and print their tables.

    Exit status 0 when every expectation holds, 1 when one doesn't (with --against: when one fails
    that held there, or is new), 2 when something is wrong, 3 when a part could not be computed. `-`
    is standard input. A file that is unchanged isn't run again: its results come from the store
    beside it.
    """
    how = settings(
        parameters,
        limit,
        only,
        python_mode(allow_python),
        allow_outside=allow_outside,
        untrusted=untrusted,
    )
    paths, problems = mech_files(files)
    # All files are checked before the first one runs (and before torch is imported).
    everything: list[Checked] = []
    for path in paths:
        checked, found = checked_file(path, how)
        problems += found
        if checked is not None:
            everything.append(checked)
    if len(everything) > 1:
        problems += _written_by_several(everything, problems)
    verdicts = Verdicts(asked)
    problems += verdicts.refused(everything, out, stores.named or None)
    print_diagnostics(problems)
    if has_errors(problems):
        verdicts.wrong(paths, problems)
        return WRONG
    if not verdicts.begin(everything):
        return WRONG
    from mechdsl.execute.options import Options
    from mechdsl.pipeline.run_options import RunOptions

    options = RunOptions(
        settings=how,
        device=device,
        dtype=dtype,
        offload=offload,
        out=out,
        without=frozenset(passes.without),
        ends=verdicts.ends,
        execution=Options(
            pass_tokens=passes.pass_tokens,
            prompt_tokens=passes.prompt_tokens,
            allow_nan=allow_nan,
        ),
        fresh=stores.fresh,
        hashes=_shows_hashes(everything, form, out, asked),
    )
    return _run_all(everything, options, stores, form, verdicts, profile=profile)


def _shows_hashes(files: list[Checked], form: str, out: Path | None, asked: VerdictOptions) -> bool:
    """Whether hashes of weights are written or compared; tables and verdicts have none."""
    return (
        form == "json"
        or out is not None
        or asked.against is not None
        or any(map(_has_files, files))
    )


def _written_by_several(files: list[Checked], said: list[Diagnostic]) -> list[Diagnostic]:
    """Reports of one file that would write over what another one reads or writes."""
    from mechdsl.validate.written_files import check_written

    found = check_written([(checked.program, checked.reported) for checked in files])
    known = {(each.code, each.span) for each in said}
    return [each for each in found if (each.code, each.span) not in known]


def _run_all(
    files: list[Checked],
    options: RunOptions,
    stores: StoreOptions,
    form: str,
    verdicts: Verdicts,
    *,
    profile: bool,
) -> int:
    """Run files one after another, printing what each has found. One that can't be computed costs
    no other; where nobody reads what is printed any more, those are run that keep something."""
    from mechdsl.results.results import Results
    from mechdsl.results.versions import versions
    from mechdsl.store.place import store_folder

    found: list[FileResult] = []
    failed: list[int] = []
    lost = False
    not_run: list[str] = []
    whole = True
    for checked in files:
        store = store_folder(
            checked.source.path, stores.named, untrusted=options.settings.untrusted
        )
        keeps = options.out is not None or store is not None or verdicts.writable
        if lost and not keeps and not _has_files(checked):
            not_run.append(checked.source.name)
            continue
        keeping = _Keeping()
        try:
            own = replace(options, store=store)
            done = _run_file(checked, own, form, keeping, verdicts, profile=profile)
        except KeyboardInterrupt as error:
            verdicts.interrupted()
            return interrupted(error, keeping.said)
        except OutputLost as error:  # behind the file's own run, and the reports that it writes
            done, lost = without_output(error), True
        if isinstance(done, int):
            failed.append(done)
        else:
            result, shown = done
            found.append(result)
            whole &= shown
        if verdicts.stop(form):
            break
    if not_run:
        say(f"not run, as they keep nothing: {', '.join(not_run)}", out=False)
    if not found and failed:
        verdicts.tell(form)
        return max(failed)
    results = Results(tuple(found) + verdicts.not_run, versions(), against=verdicts.against())
    if form == "json":
        write_json(results.to_json())
    elif form == "csv":
        sys.stdout.write(results.to_csv())
    return verdicts.status(results, bool(failed) or not whole, form)


def _has_files(checked: Checked) -> bool:
    """Whether a report goes to a file."""
    return any(report.file for each in checked.reported for report in each.reports)


class _Keeping:
    """Whether the store keeps what a run has finished."""

    kept = False

    @property
    def said(self) -> str:
        """Where a run was interrupted."""
        return f"; {GOES_ON}" if self.kept else "; nothing of this file is kept"

    def start(self, kept: bool) -> None:
        """Called before anything is computed."""
        self.kept = kept
        from mechdsl.loading.load import import_library

        import_library()
        gc.freeze()  # what was imported is no garbage,
        gc.enable()  # but models and results do make some


def _run_file(
    checked: Checked,
    options: RunOptions,
    form: str,
    keeping: _Keeping,
    verdicts: Verdicts,
    *,
    profile: bool,
) -> tuple[FileResult, bool] | int:
    """Run a file and show its reports, and whether that and all that is saved could be done; an
    exit status where the run broke off."""
    from mechdsl.pipeline.run_file import StoreStopped, run_file
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
            ran = run_file(checked, options, starting=keeping.start)
    except StoreStopped as stopped:
        verdicts.trouble(checked, f"the run broke off: {stopped.diagnostic.message}")
        print_diagnostics([stopped.diagnostic])
        return BROKE_OFF
    except Exception as error:
        verdicts.trouble(checked, f"the run broke off: {type(error).__name__}: {error}")
        status = broke_off(f"the run of {source.name}", error)
        if keeping.kept:
            say(GOES_ON, out=False)
        return status
    print_diagnostics(ran.diagnostics)
    for note in ran.notes:
        say(note, out=False)
    result = ran.result
    if result is None:
        verdicts.lost(checked, ran.diagnostics)
        return WRONG
    verdicts.add(checked, result)
    if options.out is not None and result.not_run:
        say(f"nothing is written to {options.out}, as {source.name} was stopped", out=False)
    if not (result.experiments or result.lost or result.saved):
        say(f"{source.name} has no experiments: nothing was run", out=False)
    shown = _show(result, tables=form == "table")
    for saved in result.saved:
        say(saved.line, out=form == "table")
    if not shown:
        verdicts.trouble(checked, "a report could not be made")
    unsaved = has_errors(ran.diagnostics) and result.computable
    if unsaved:
        verdicts.trouble(checked, "a `save` could not be made")
    if result.sizes is not None and profiles:
        from mechdsl.show.plan import print_profile

        for plan, done in profiles:
            print_profile(plan, done, result.sizes, make_console(stderr=form != "table"))
    return result, shown and not unsaved


def _show(result: FileResult, *, tables: bool) -> bool:
    """All reports of a file, each experiment with the verdicts on its expectations; whether all
    could be made.

    tables: print them; else only those are made that go to a file.
    """
    from mechdsl.show.reports.verdicts import print_lost, print_verdicts
    from mechdsl.show.show_report import show_report, write_reports

    console = make_console()
    # Files first: what is printed may be cut short by its reader.
    written = iter(write_reports(result.experiments))
    whole = True
    for experiment in result.experiments:
        for report in experiment.reports:
            if report.file is not None:
                done = next(written)
                print_diagnostics(done.diagnostics)
                whole &= done.path is not None
                if done.path is not None:
                    said = f"{experiment.name}: report {report.kind} written to {done.path}"
                    say(said, out=tables)
            elif tables:
                try:
                    show_report(experiment, report, console)
                except OutputLost:
                    raise
                except Exception as error:
                    broke_off(f"report {report.kind} of {experiment.name}", error)
                    whole = False
        if tables:
            print_verdicts(experiment, console)
    if tables:
        for lost in result.lost:
            print_lost(lost, console)
    return whole
