"""`mechdsl run`: run files, print their tables, and report verdicts to CI."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from mechdsl.base.files import special_file_kind, write_obstacle
from mechdsl.base.runtime import read_launch
from mechdsl.cli.arguments import (
    CheckOptions,
    PassOptions,
    StoreOptions,
    allow_outside_option,
    allow_python_option,
    check_mech_file,
    collect_check_options,
    device_option,
    dtype_option,
    files_argument,
    find_mech_files,
    format_option,
    limit_option,
    load_plugins,
    option_group,
    pass_options,
    plugin_option,
    safe_csv_option,
    set_option,
    store_options,
    untrusted_option,
)
from mechdsl.cli.output import (
    EXPECTATION_FAILED,
    INCOMPLETE,
    INVALID_INPUT,
    RESUME_NOTE,
    SUCCESS,
    OutputLost,
    make_console,
    print_csv,
    print_diagnostics,
    print_json,
    print_line,
    report_failure,
    report_interruption,
    report_lost_output,
)
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, has_errors

if TYPE_CHECKING:
    from mechdsl.checks.file_check import CheckedFile, CheckSettings
    from mechdsl.execute.run_record import ExecutionProfile
    from mechdsl.pipeline.file_run import RunOutcome
    from mechdsl.pipeline.options import RunOptions
    from mechdsl.planner.plan import Plan
    from mechdsl.results.experiment_result import (
        EarlierRun,
        FileResult,
        StopCondition,
        VerdictComparison,
    )
    from mechdsl.results.results import Results
    from mechdsl.show.junit import JunitSuite


class VerdictOptions(NamedTuple):
    """Command-line options for verdicts."""

    junit: Path | None = None
    against: str | None = None
    fail_fast: bool = False


verdict_options = option_group(
    "asked",
    VerdictOptions,
    click.option(
        "--junit",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write verdicts to this JUnit XML file, for CI.",
    ),
    click.option(
        "--against",
        metavar="RUN",
        type=click.Path(),  # Tab completes folders of runs, and files
        help=(
            "Fail only for expectations that held in this earlier run or are new. Takes a "
            "run id, `last`, a .mech file or a folder written by `--out`."
        ),
    ),
    click.option("--fail-fast", is_flag=True, help="Stop at the first failed expectation."),
)
"""Adds `--junit`, `--against` and `--fail-fast`, which the command receives as `asked`."""


class VerdictReporter:
    """The verdicts of a command's files, from before the first run on."""

    def __init__(self, asked: VerdictOptions) -> None:
        self.asked = asked
        self.earlier: EarlierRun | None = None
        self.writable = asked.junit is not None
        """Whether to write a report; False if its path was rejected."""
        self.unwritten = False
        self.waiting: list[CheckedFile] = []
        self.done: list[FileResult | JunitSuite] = []

    # --- before the runs

    def refused(
        self, files: Sequence[CheckedFile], out: Path | None, store: Path | None
    ) -> list[Diagnostic]:
        """Report E0208 for a report that can't be written, and for an unknown earlier run.

        Args:
            store: The given store.
        """
        from mechdsl.diagnostics.rendering import MechdslError

        problems: list[Diagnostic] = []
        if self.asked.against is not None:
            from mechdsl.results.runs import find_earlier_run, prepare_file

            try:
                asked = [prepare_file(file) for file in files]
                self.earlier = find_earlier_run(self.asked.against, asked, store)
            except MechdslError as error:
                problems += error.diagnostics
        if self.asked.junit is not None:
            problem = _unfit(self.asked.junit, files, out, self.asked.against)
            self.writable = problem is None
            problems += [] if problem is None else [problem]
        return problems

    def wrong(self, paths: Sequence[Path], problems: Sequence[Diagnostic]) -> None:
        """Write the report of a command that runs nothing because of errors."""
        if not self.writable:
            return
        from mechdsl.show.junit import JunitSuite, JunitTest, diagnostic_suite

        names = {str(path): list[JunitTest]() for path in paths}
        for problem in problems:
            if problem.severity == "error":
                name = "mechdsl" if problem.span is None else problem.span.source.name
                names.setdefault(name, []).append(diagnostic_suite(problem))
        left = JunitTest("the file runs", "skipped", "not run because of other errors")
        self.done = [JunitSuite(name, tests=tests or [left]) for name, tests in names.items()]
        self._write()

    def begin(self, files: Sequence[CheckedFile]) -> bool:
        """Write a report that is valid if nothing follows; return whether that succeeded."""
        self.waiting = list(files)
        return self._write()

    @property
    def ends(self) -> StopCondition | None:
        """The stop condition of `--fail-fast`."""
        if not self.asked.fail_fast:
            return None
        from mechdsl.results.experiment_result import stop_condition

        return stop_condition(self.earlier)

    # --- during the runs

    def lost(self, checked: CheckedFile, problems: Sequence[Diagnostic]) -> None:
        """Record a file of which nothing could be computed."""
        from mechdsl.results.assembly.collection import build_lost_experiment
        from mechdsl.results.experiment_result import FileResult

        first = {experiment.name: experiment for experiment in reversed(checked.reported)}
        errors = [problem for problem in problems if problem.severity == "error"]
        lost = tuple(
            build_lost_experiment(experiment, errors) for experiment in reversed(first.values())
        )
        self.add(checked, FileResult(checked.source.name, (), lost=lost))

    def add(self, checked: CheckedFile, result: FileResult) -> None:
        """Record the result of a file's run."""
        self.waiting = [file for file in self.waiting if file is not checked]
        self.done.append(result)
        self._write()

    def trouble(self, checked: CheckedFile, reason: str) -> None:
        """Record a problem of a file's run besides its result."""
        if not self.writable:
            return
        from mechdsl.show.junit import JunitSuite, JunitTest

        test = JunitTest("the run completes", "error", reason, "broke off")
        self.waiting = [file for file in self.waiting if file is not checked]
        self.done.append(JunitSuite(checked.source.name, tests=[test]))
        self._write()

    def stop(self, form: str) -> bool:
        """Whether `--fail-fast` ends the command now; if so, print what is skipped."""
        results = self._results()
        if self.ends is None or not results:
            return False
        last = results[-1]
        verdicts = (*last.experiments, *last.lost)
        if not any(self.ends(last.file, verdict.name, verdict.outcomes) for verdict in verdicts):
            return False
        left, self.waiting = self.waiting, []
        self.done += [_not_run(file) for file in left]
        self._write()
        unrun, undecided = _left_out(self._results())
        for what, names in (("not run", unrun), ("not decided", undecided)):
            if names:
                told = f"{what} after a failed expectation: {', '.join(names)}"
                print_line(told, out=form == "table")
        return True

    @property
    def not_run(self) -> tuple[FileResult, ...]:
        """Whole files that `--fail-fast` skipped."""
        return tuple(result for result in self._results() if result.not_run and not _ran(result))

    def interrupted(self) -> None:
        """Write the report of an interrupted run."""
        self._write("the run was interrupted")

    def _results(self) -> list[FileResult]:
        from mechdsl.results.experiment_result import FileResult

        return [result for result in self.done if isinstance(result, FileResult)]

    # --- after the runs

    def against(self) -> VerdictComparison | None:
        """Return the changes since the earlier run."""
        return None if self.earlier is None else self.earlier.compare(self._results())

    def tell(self, form: str) -> None:
        """Print the changes, after all tables."""
        against = self.against()
        if against is not None:
            from mechdsl.show.runs import print_verdict_comparison

            print_verdict_comparison(against, make_console(stderr=form != "table"))

    def status(self, results: Results, broke_off: bool, form: str) -> int:
        """Print the changes, and return the exit status."""
        self.tell(form)
        against = results.against
        lost = not all(file.computable for file in results.files)
        if broke_off or lost or self.unwritten:
            return INCOMPLETE
        failed = against.fails if against is not None else not results.holds
        return EXPECTATION_FAILED if failed else SUCCESS

    def _write(self, why: str = "the run ended before it") -> bool:
        """Write the report with the results so far; return whether that succeeded."""
        if not self.writable:
            return True
        from mechdsl.base.files import write_atomically
        from mechdsl.show.junit import JunitSuite, JunitTest, build_suites, junit_text

        assert self.asked.junit is not None
        against = self.against()
        suites: list[JunitSuite] = []
        for suite in self.done:
            suites += [suite] if isinstance(suite, JunitSuite) else build_suites([suite], against)
        unfinished = JunitTest("the file runs", "error", why, "not finished")
        suites += [JunitSuite(file.source.name, tests=[unfinished]) for file in self.waiting]
        try:
            write_atomically(self.asked.junit, junit_text(suites))
        except OSError as error:
            print_diagnostics([_unwritten(self.asked.junit, error.strerror or str(error))])
            self.writable, self.unwritten = False, True  # reported once
            return False
        return True


def _unwritten(path: Path, reason: str) -> BadCommandLine:
    return BadCommandLine(
        reason=f"`--junit {path}`: {reason.lower()}",
        hint="choose a path in a writable folder",
    )


def _unfit(
    path: Path, files: Sequence[CheckedFile], out: Path | None, against: str | None
) -> BadCommandLine | None:
    """Return why a report can't be written to a path, if so."""
    what = special_file_kind(path, stream=True)
    if what is not None:
        return _unwritten(path, f"it is {what}; reports are written to regular files")
    reason = write_obstacle(path)
    if reason is not None:
        return _unwritten(path, reason)
    from mechdsl.checks.file_check import find_overwritten

    over = find_overwritten(path, [(file.program, file.reported) for file in files])
    said = None if over is None else f"would overwrite {over}"
    kept: dict[Path, str] = {}
    if against is not None:
        from mechdsl.results.runs import is_export

        folders = [Path(against), *(Path(against) / file.source.stem for file in files)]
        its = "the run given by `--against`"
        kept = {folder: its for folder in folders if is_export(folder)}
    if out is not None:
        kept |= {
            out / file.source.stem: f"the `--out` folder of {file.source.name}" for file in files
        }
    real = path.resolve()
    for folder, its in kept.items():
        if real.is_relative_to(folder.resolve()):
            said = f"is in `{folder}`, {its}"
    if said is None:
        return None
    return BadCommandLine(reason=f"`--junit {path}` {said}", hint="choose another path")


def _not_run(checked: CheckedFile) -> FileResult:
    """Return the result of a file after the one that ended the command."""
    from mechdsl.results.experiment_result import (
        FileResult,
        SkippedExperiment,
        UndecidedExpectation,
    )

    first = {experiment.name: experiment for experiment in reversed(checked.reported)}
    left = [
        SkippedExperiment(
            experiment.name,
            tuple(UndecidedExpectation(e.text, e.span.line) for e in experiment.expects),
        )
        for experiment in reversed(first.values())
    ]
    text = checked.source.text.encode()
    return FileResult(
        checked.source.name,
        (),
        hash=sha256(text).hexdigest(),
        seed=checked.program.seed,
        not_run=tuple(left),
    )


def _ran(file: FileResult) -> bool:
    return bool(file.experiments or file.lost)


def _left_out(files: Sequence[FileResult]) -> tuple[list[str], list[str]]:
    """Return experiments that were not run (whole files by name), and undecided expectations."""
    unrun: list[str] = []
    undecided: list[str] = []
    for file in files:
        ran = {experiment.name for experiment in (*file.experiments, *file.lost)}
        if not _ran(file) and file.not_run:
            unrun.append(file.file)
            continue
        place = f"{file.file}: " if len(files) > 1 else ""
        for skipped_experiment in file.not_run:
            if skipped_experiment.name in ran:
                undecided += [
                    f"{place}{skipped_experiment.name}: expect {e.text}"
                    for e in skipped_experiment.expects
                ]
            else:
                unrun.append(f"{place}{skipped_experiment.name}")
    return unrun, undecided


@click.command()
@files_argument
@set_option
@limit_option
@device_option
@dtype_option
@click.option(
    "--offload",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Spread the model over devices, memory and this folder with accelerate.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write results and per-prompt values into a subfolder of this folder.",
)
@format_option("table", "json", "csv")
@click.option(
    "--only",
    metavar="EXPERIMENT",
    multiple=True,
    help="Run only this experiment and those it depends on; may be repeated.",
)
@click.option(
    "--fit", "fits", is_flag=True, help="First train what the files declare with `fit(…)`."
)
@click.option("--profile", is_flag=True, help="After the run, compare estimated and measured cost.")
@allow_python_option
@allow_outside_option
@untrusted_option
@plugin_option
@pass_options
@store_options
@click.option(
    "--allow-nan",
    is_flag=True,
    help="Exclude and count rows where the model returns NaN or infinity.",
)
@safe_csv_option
@verdict_options
@collect_check_options
def run(
    files: tuple[Path, ...],
    device: str,
    dtype: str | None,
    offload: Path | None,
    out: Path | None,
    form: str,
    fits: bool,
    profile: bool,
    plugins: tuple[str, ...],
    passes: PassOptions,
    stores: StoreOptions,
    allow_nan: bool,
    safe_csv: bool,
    asked: VerdictOptions,
    checks: CheckOptions,
) -> int:
    """Run files and print their tables.

    Exit status 0 when every expectation holds, 1 when one doesn't (with --against: when one fails
    that held there, or is new), 2 when something is wrong, 3 when a part could not be computed. `-`
    is standard input. A file that is unchanged isn't run again: its results come from the store
    next to it.
    """
    how = checks.settings()
    paths, everything, problems = _check_all(files, how, plugins)
    verdicts = VerdictReporter(asked)
    problems += verdicts.refused(everything, out, stores.named or None)
    print_diagnostics(problems)
    if has_errors(problems):
        verdicts.wrong(paths, problems)
        return INVALID_INPUT
    if not verdicts.begin(everything):
        return INVALID_INPUT
    from mechdsl.execute.run_record import ExecutionOptions
    from mechdsl.pipeline.options import RunOptions
    from mechdsl.results.experiment_result import quote_formulas

    options = RunOptions(
        settings=how,
        device=device,
        dtype=dtype,
        offload=offload,
        out=out,
        without=frozenset(passes.without),
        ends=verdicts.ends,
        execution=ExecutionOptions(
            pass_tokens=passes.pass_tokens,
            prompt_tokens=passes.prompt_tokens,
            allow_nan=allow_nan,
        ),
        fresh=stores.fresh,
        fits=fits,
        hashes=_shows_hashes(everything, form, out, asked),
    )
    status = _train_first(everything, options, stores, discovered=not fits)
    if status is not None:
        verdicts.interrupted()
        return status
    with quote_formulas(safe_csv):
        return _run_all(everything, options, stores, form, verdicts, profile=profile)


def _check_all(
    files: tuple[Path, ...], settings: CheckSettings, plugins: Sequence[str]
) -> tuple[list[Path], list[CheckedFile], list[Diagnostic]]:
    """Check all files before the first one runs, and before torch is imported.

    Returns:
        The paths, the files that could be read, and the diagnostics.
    """
    paths, problems = find_mech_files(files)
    unloaded = load_plugins(plugins)
    problems += unloaded
    everything: list[CheckedFile] = []
    for path in paths if not unloaded else ():
        checked, found = check_mech_file(path, settings)
        problems += found
        if checked is not None:
            everything.append(checked)
    if len(everything) > 1:
        problems += _written_by_several(everything, problems)
    return paths, everything, problems


def _train_first(
    files: list[CheckedFile], options: RunOptions, stores: StoreOptions, *, discovered: bool
) -> int | None:
    """Train what files declare; return an exit status only if that was interrupted or can't begin.
    Other failures are reported, and the experiments that need the trainings aren't run.

    discovered: train only the circuits that experiments discover.
    """
    if discovered:
        files = [checked for checked in files if checked.program.discovered]
        if not files:
            return None
    from mechdsl.cli.fit import CONTINUES, train_with_bar
    from mechdsl.pipeline.trained_files import fits_of_file
    from mechdsl.show.trainings import print_trained_fits

    if read_launch()[1] > 1:
        reason = "several processes train together with `mechdsl fit`, not with `run --fit`"
        hint = "train first, then run in one process: `mechdsl run FILE`"
        print_diagnostics([BadCommandLine(reason=reason, hint=hint)])
        return INVALID_INPUT
    for checked in files:
        if not fits_of_file(checked, discovered=discovered):
            continue
        try:
            run_options = replace(options, fresh=False)
            done, _, status = train_with_bar(checked, run_options, stores, discovered=discovered)
        except KeyboardInterrupt as error:
            return report_interruption(error, CONTINUES)
        if status == INVALID_INPUT:  # trainings without a store
            return status
        trained = [fit for fit in done if fit.seconds]
        if trained:
            print_trained_fits(trained, make_console(stderr=True))
    return None


def _shows_hashes(
    files: list[CheckedFile], form: str, out: Path | None, asked: VerdictOptions
) -> bool:
    """Whether hashes of weights are written or compared; tables and verdicts contain none."""
    return (
        form == "json"
        or out is not None
        or asked.against is not None
        or any(map(_has_files, files))
    )


def _written_by_several(files: list[CheckedFile], said: list[Diagnostic]) -> list[Diagnostic]:
    """Report reports of one file that would overwrite a file that another one reads or writes."""
    from mechdsl.checks.file_check import check_output_files

    problems = check_output_files([(checked.program, checked.reported) for checked in files])
    known = {(problem.code, problem.span) for problem in said}
    return [problem for problem in problems if (problem.code, problem.span) not in known]


def _run_all(
    files: list[CheckedFile],
    options: RunOptions,
    stores: StoreOptions,
    form: str,
    verdicts: VerdictReporter,
    *,
    profile: bool,
) -> int:
    """Run files one after another and print each result. A failure doesn't affect other files.
    After standard output is closed, only files with saved results are run."""
    from mechdsl.results.results import Results, package_versions
    from mechdsl.store.store import store_folder

    file_results: list[FileResult] = []
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
            run_options = replace(options, store=store)
            done = _run_file(checked, run_options, form, keeping, verdicts, profile=profile)
        except KeyboardInterrupt as error:
            verdicts.interrupted()
            return report_interruption(error, keeping.said)
        except OutputLost as error:  # after the file's run, with its reports written
            done, lost = report_lost_output(error), True
        if isinstance(done, int):
            failed.append(done)
        else:
            result, shown = done
            file_results.append(result)
            whole &= shown
        if verdicts.stop(form):
            break
    if not_run:
        print_line(
            f"not run because output is lost and nothing would be saved: {', '.join(not_run)}",
            out=False,
        )
    if not file_results and failed:
        verdicts.tell(form)
        return max(failed)
    results = Results(
        tuple(file_results) + verdicts.not_run, package_versions(), against=verdicts.against()
    )
    if form == "json":
        print_json(results.to_json())
    elif form == "csv":
        print_csv(results.to_csv())
    return verdicts.status(results, bool(failed) or not whole, form)


def _has_files(checked: CheckedFile) -> bool:
    """Whether any report is written to a file."""
    return any(report.file for experiment in checked.reported for report in experiment.reports)


class _Keeping:
    """Whether the store caches what a run has finished."""

    kept = False

    @property
    def said(self) -> str:
        """Message about cached values for an interrupted run."""
        return f"; {RESUME_NOTE}" if self.kept else "; nothing of this file was stored"

    def start(self, kept: bool) -> None:
        """Record the state before the computation."""
        self.kept = kept
        from mechdsl.loading.loader import import_library

        import_library()
        gc.freeze()  # imported modules are never garbage,
        gc.enable()  # but models and results create some


def _run_file(
    checked: CheckedFile,
    options: RunOptions,
    form: str,
    keeping: _Keeping,
    verdicts: VerdictReporter,
    *,
    profile: bool,
) -> tuple[FileResult, bool] | int:
    """Run a file and show its reports.

    Returns:
        The result, and whether all reports and files could be written; an exit status if the run
        was interrupted or failed.
    """
    profiles: list[tuple[Plan, ExecutionProfile]] = []
    """Several if experiments depend on others' results."""

    def keep(plan: Plan, done: ExecutionProfile) -> None:
        profiles.append((plan, done))

    ran = _try_run(
        checked, replace(options, on_profile=keep if profile else None), keeping, verdicts
    )
    if isinstance(ran, int):
        return ran
    print_diagnostics(ran.diagnostics)
    for note in ran.notes:
        print_line(note, out=False)
    result = ran.result
    if result is None:
        verdicts.lost(checked, ran.diagnostics)
        return INVALID_INPUT
    verdicts.add(checked, result)
    name = checked.source.name
    if options.out is not None and result.not_run:
        print_line(f"nothing was written to {options.out} because {name} was stopped", out=False)
    if not (result.experiments or result.lost or checked.saving):
        print_line(f"{name} has no experiments, so nothing was run", out=False)
    shown = _show(result, tables=form == "table")
    for saved in result.saved:
        print_line(saved.line, out=form == "table")
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


def _try_run(
    checked: CheckedFile, options: RunOptions, keeping: _Keeping, verdicts: VerdictReporter
) -> RunOutcome | int:
    """Run a file with a progress bar; return the exit status if the run failed."""
    from mechdsl.pipeline.file_run import StoreStopped, run_file
    from mechdsl.show.progress import ProgressBar

    bar = ProgressBar(checked.source.name)
    execution = replace(options.execution, on_progress=bar.advance)
    try:
        with bar:
            return run_file(checked, replace(options, execution=execution), starting=keeping.start)
    except StoreStopped as stopped:
        verdicts.trouble(checked, f"the run failed: {stopped.diagnostic.message}")
        print_diagnostics([stopped.diagnostic])
        return INCOMPLETE
    except Exception as error:
        verdicts.trouble(checked, f"the run failed: {type(error).__name__}: {error}")
        status = report_failure(f"the run of {checked.source.name}", error)
        if keeping.kept:
            print_line(RESUME_NOTE, out=False)
        return status


def _show(result: FileResult, *, tables: bool) -> bool:
    """Show all reports of a file, each experiment with the verdicts on its expectations.

    Args:
        tables: Whether to print them; otherwise only reports with a file are written.

    Returns:
        Whether all reports succeeded.
    """
    from mechdsl.show.output import show_report, write_reports
    from mechdsl.show.reports.text import print_lost_experiment, print_verdicts

    console = make_console()
    # Files first: the reader may close standard output early.
    written = {
        (name, done.report.span, done.report.kind): done
        for done in write_reports(result.experiments)
        for name in done.experiments
    }
    whole = True
    for experiment in result.experiments:
        for report in experiment.reports:
            if report.file is not None:
                done = written[experiment.name, report.span, report.kind]
                if done.experiments[0] != experiment.name:
                    continue  # a chart of several results, reported with the first one
                print_diagnostics(done.diagnostics)
                whole &= done.path is not None
                if done.path is not None:
                    said = f"{', '.join(done.experiments)}: report {report.kind} written to "
                    apart = ", one file per result" if done.is_separate else ""
                    print_line(f"{said}{done.path}{apart}", out=tables)
            elif tables:
                try:
                    show_report(experiment, report, console)
                except OutputLost:
                    raise
                except Exception as error:
                    report_failure(f"report {report.kind} of {experiment.name}", error)
                    whole = False
        if tables:
            print_verdicts(experiment, console)
    if tables:
        for lost in result.lost:
            print_lost_experiment(lost, console)
    return whole
