"""What a CI job is told of verdicts: `--junit`, `--against` and `--fail-fast`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mechdsl.base.files import special_file, unwritable
from mechdsl.cli.output import make_console, print_diagnostics, say
from mechdsl.cli.status import BROKE_OFF, FAILED, FINE
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine

if TYPE_CHECKING:
    from mechdsl.results.against import Against, Earlier, Ends
    from mechdsl.results.experiment_result import FileResult
    from mechdsl.results.results import Results
    from mechdsl.show.junit import Suite
    from mechdsl.validate.check_file import Checked


class VerdictOptions(NamedTuple):
    """What the command line says of verdicts."""

    junit: Path | None = None
    against: str | None = None
    fail_fast: bool = False


def verdict_options(command: Callable[..., int]) -> Callable[..., int]:
    """`--junit`, `--against` and `--fail-fast`, which the command gets as `asked`."""

    @click.option(
        "--junit",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write verdicts here as JUnit XML, for CI.",
    )
    @click.option(
        "--against",
        metavar="RUN",
        type=click.Path(),  # Tab completes folders of runs, and files
        help="Fail only where an expectation held in that run, or is new: a run's id, `last`, "
        "a .mech file or a folder of `--out`.",
    )
    @click.option(
        "--fail-fast", is_flag=True, help="Stop at the first expectation that fails the job."
    )
    @wraps(command)
    def told(
        *args: Any, junit: Path | None, against: str | None, fail_fast: bool, **others: Any
    ) -> int:
        return command(*args, asked=VerdictOptions(junit, against, fail_fast), **others)

    return told


class Verdicts:
    """The verdicts of a command's files, from before the first one runs."""

    def __init__(self, asked: VerdictOptions) -> None:
        self.asked = asked
        self.earlier: Earlier | None = None
        self.writable = asked.junit is not None
        """Whether there is a report to write; not where its path was refused."""
        self.unwritten = False
        self.waiting: list[Checked] = []
        self.done: list[FileResult | Suite] = []

    # --- before anything runs

    def refused(
        self, files: Sequence[Checked], out: Path | None, store: Path | None
    ) -> list[Diagnostic]:
        """E0208 for a report that can't be written, and for an earlier run that there isn't.

        store: the one that is named.
        """
        from mechdsl.diagnostics.raised import MechdslError

        found: list[Diagnostic] = []
        if self.asked.against is not None:
            from mechdsl.results.earlier_runs import earlier_run, to_run

            try:
                asked = [to_run(each) for each in files]
                self.earlier = earlier_run(self.asked.against, asked, store)
            except MechdslError as error:
                found += error.diagnostics
        if self.asked.junit is not None:
            problem = _unfit(self.asked.junit, files, out, self.asked.against)
            self.writable = problem is None
            found += [] if problem is None else [problem]
        return found

    def wrong(self, paths: Sequence[Path], problems: Sequence[Diagnostic]) -> None:
        """The report where nothing runs, as something is wrong."""
        if not self.writable:
            return
        from mechdsl.show.junit import Suite, Test, of_diagnostic

        names = {str(path): list[Test]() for path in paths}
        for each in problems:
            if each.severity == "error":
                name = "mechdsl" if each.span is None else each.span.source.name
                names.setdefault(name, []).append(of_diagnostic(each))
        left = Test("the file is run", "skipped", "not run, as something else is wrong")
        self.done = [Suite(name, tests=tests or [left]) for name, tests in names.items()]
        self._write()

    def begin(self, files: Sequence[Checked]) -> bool:
        """Write a report that is right should nothing follow; whether that can be done."""
        self.waiting = list(files)
        return self._write()

    @property
    def ends(self) -> Ends | None:
        """What ends a run, with `--fail-fast`."""
        if not self.asked.fail_fast:
            return None
        from mechdsl.results.against import first_failure

        return first_failure(self.earlier)

    # --- while files run

    def lost(self, checked: Checked, problems: Sequence[Diagnostic]) -> None:
        """A file of which nothing could be computed."""
        from mechdsl.results.experiment_result import FileResult
        from mechdsl.results.finish import lost_experiment

        first = {each.name: each for each in reversed(checked.reported)}
        errors = [each for each in problems if each.severity == "error"]
        lost = tuple(lost_experiment(each, errors) for each in reversed(first.values()))
        self.add(checked, FileResult(checked.source.name, (), lost=lost))

    def add(self, checked: Checked, result: FileResult) -> None:
        """What a file's run has found."""
        self.waiting = [each for each in self.waiting if each is not checked]
        self.done.append(result)
        self._write()

    def trouble(self, checked: Checked, reason: str) -> None:
        """Something that went wrong in a file's run, beside what was found."""
        if not self.writable:
            return
        from mechdsl.show.junit import Suite, Test

        test = Test("the run is whole", "error", reason, "broke off")
        self.waiting = [each for each in self.waiting if each is not checked]
        self.done.append(Suite(checked.source.name, tests=[test]))
        self._write()

    def stop(self, form: str) -> bool:
        """Whether `--fail-fast` ends the command here; what is left then is named."""
        results = self._results()
        if self.ends is None or not results:
            return False
        last = results[-1]
        verdicts = (*last.experiments, *last.lost)
        if not any(self.ends(last.file, each.name, each.outcomes) for each in verdicts):
            return False
        left, self.waiting = self.waiting, []
        self.done += [_not_run(each) for each in left]
        self._write()
        unrun, undecided = _left_out(self._results())
        for what, names in (("not run", unrun), ("not decided", undecided)):
            if names:
                told = f"{what}, as an expectation fails: {', '.join(names)}"
                say(told, out=form == "table")
        return True

    @property
    def not_run(self) -> tuple[FileResult, ...]:
        """Whole files that `--fail-fast` left out."""
        return tuple(each for each in self._results() if each.not_run and not _ran(each))

    def interrupted(self) -> None:
        """The report of a run that somebody ended."""
        self._write("the run was interrupted")

    def _results(self) -> list[FileResult]:
        from mechdsl.results.experiment_result import FileResult

        return [each for each in self.done if isinstance(each, FileResult)]

    # --- behind the last file

    def against(self) -> Against | None:
        """What has changed since the earlier run."""
        return None if self.earlier is None else self.earlier.compare(self._results())

    def tell(self, form: str) -> None:
        """Print what has changed, behind all tables."""
        against = self.against()
        if against is not None:
            from mechdsl.show.reports.against import print_against

            print_against(against, make_console(stderr=form != "table"))

    def status(self, results: Results, broke_off: bool, form: str) -> int:
        """Say what has changed, and the exit status."""
        self.tell(form)
        against = results.against
        lost = not all(file.computable for file in results.files)
        if broke_off or lost or self.unwritten:
            return BROKE_OFF
        failed = against.fails if against is not None else not results.holds
        return FAILED if failed else FINE

    def _write(self, why: str = "the run did not come to it") -> bool:
        """The report as far as it is known; whether it could be written."""
        if not self.writable:
            return True
        from mechdsl.base.files import write_whole
        from mechdsl.show.junit import Suite, Test, junit_text, suites_of

        assert self.asked.junit is not None
        against = self.against()
        suites: list[Suite] = []
        for each in self.done:
            suites += [each] if isinstance(each, Suite) else suites_of([each], against)
        unfinished = Test("the file is run", "error", why, "not finished")
        suites += [Suite(each.source.name, tests=[unfinished]) for each in self.waiting]
        try:
            write_whole(self.asked.junit, junit_text(suites))
        except OSError as error:
            print_diagnostics([_unwritten(self.asked.junit, error.strerror or str(error))])
            self.writable, self.unwritten = False, True  # said once
            return False
        return True


def _unwritten(path: Path, reason: str) -> BadCommandLine:
    return BadCommandLine(
        reason=f"`--junit {path}`: {reason.lower()}",
        hint="name a file in a folder that may be written to",
    )


def _unfit(
    path: Path, files: Sequence[Checked], out: Path | None, against: str | None
) -> BadCommandLine | None:
    """Why a report can't go to a path."""
    what = special_file(path, stream=True)
    if what is not None:
        return _unwritten(path, f"it is {what}, and the report goes to a plain file")
    reason = unwritable(path)
    if reason is not None:
        return _unwritten(path, reason)
    from mechdsl.validate.written_files import written_over

    over = written_over(path, [(each.program, each.reported) for each in files])
    said = None if over is None else f"would write over {over}"
    kept: dict[Path, str] = {}
    if against is not None:
        from mechdsl.results.export import is_export

        folders = [Path(against), *(Path(against) / each.source.stem for each in files)]
        its = "the run that this one is set against"
        kept = {folder: its for folder in folders if is_export(folder)}
    if out is not None:
        kept |= {
            out / each.source.stem: f"which `--out` writes of {each.source.name}" for each in files
        }
    real = path.resolve()
    for folder, its in kept.items():
        if real.is_relative_to(folder.resolve()):
            said = f"lies in `{folder}`, {its}"
    if said is None:
        return None
    return BadCommandLine(reason=f"`--junit {path}` {said}", hint="give it a file of its own")


def _not_run(checked: Checked) -> FileResult:
    """A file behind the one that ended the command."""
    from mechdsl.results.experiment_result import FileResult, NotRun, Undecided

    first = {each.name: each for each in reversed(checked.reported)}
    left = [
        NotRun(each.name, tuple(Undecided(e.text, e.span.line) for e in each.expects))
        for each in reversed(first.values())
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
    """Experiments that were not run, whole files by their names; expectations not decided."""
    unrun: list[str] = []
    undecided: list[str] = []
    for file in files:
        ran = {each.name for each in (*file.experiments, *file.lost)}
        if not _ran(file) and file.not_run:
            unrun.append(file.file)
            continue
        place = f"{file.file}: " if len(files) > 1 else ""
        for each in file.not_run:
            if each.name in ran:
                undecided += [f"{place}{each.name}: expect {e.text}" for e in each.expects]
            else:
                unrun.append(f"{place}{each.name}")
    return unrun, undecided
