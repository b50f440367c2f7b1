"""Shared arguments and options of commands, and the files that they name."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial, reduce, wraps
from importlib import import_module
from inspect import signature
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

import click

from mechdsl.cli.output import print_diagnostics
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, has_errors

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.sharedctypes import Synchronized

    from click.shell_completion import CompletionItem

    from mechdsl.base.text import Source
    from mechdsl.checks.file_check import CheckedFile, CheckSettings


class MechFile(click.Path):
    """A path of a `.mech` file, or of a folder with such files."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        if incomplete.startswith("~"):  # the shell expands and quotes it
            return [CompletionItem(incomplete, type="file")]
        folder, slash, begun = incomplete.rpartition("/")
        try:
            names = sorted(os.listdir(folder + slash or "."))
        except OSError:
            names = []
        completions = [
            name
            for name in names
            if name.startswith(begun) and name.endswith(".mech") and (begun or name[0] != ".")
        ]
        items = [
            CompletionItem(folder + slash + name) for name in completions if name.isprintable()
        ]
        return [*items, CompletionItem(incomplete, type="dir")]


files_argument = click.argument("files", nargs=-1, required=True, type=MechFile(path_type=Path))

file_argument = click.argument("file", type=MechFile(path_type=Path))

set_option = click.option(
    "--set", "parameters", multiple=True, metavar="K=V", help="Set a parameter: --set depth=12."
)

limit_option = click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use at most this many rows per experiment.",
)


def format_option(default: str, *others: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Add `--format`, which the command receives as `form`."""
    return click.option(
        "--format",
        "form",
        type=click.Choice([default, *others]),
        default=default,
        show_default=True,
    )


plugin_option = click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="NAME",
    help="Load an installed plugin that extends the language.",
)


def load_plugins(names: Sequence[str]) -> list[Diagnostic]:
    """Import the plugins that `--plugin` names. Codes: E0211."""
    if not names:  # a start without plugins imports nothing
        return []
    from mechdsl.program import plugins

    return plugins.load_plugins(names)


allow_python_option = click.option(
    "--allow-python", is_flag=True, help="Allow the Python files that the file refers to to run."
)

allow_outside_option = click.option(
    "--allow-outside",
    is_flag=True,
    help="Allow reports outside the file's folder and the working directory.",
)

untrusted_option = click.option(
    "--untrusted",
    is_flag=True,
    help="List the paths that the file names, reject those outside its folder, and run no Python.",
)


device_option = click.option(
    "--device", default="auto", show_default=True, help="Device: auto, cpu, cuda or cuda:1."
)

dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    help="Override the file's dtype.",
)


def option_group(
    name: str, build: Callable[..., object], *options: Callable[..., Callable[..., int]]
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return a decorator that adds options, which the command receives together as one argument.

    Args:
        name: The argument of the command.
        build: Creates its value from options called like its own parameters.
        options: The options to add; others of the command are passed to `build` too.
    """
    parameters = signature(build).parameters

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @wraps(command)
        def gathered(*args: Any, **values: Any) -> int:
            own = {each: values.pop(each) for each in parameters if each in values}
            return command(*args, **{name: build(**own)}, **values)

        return reduce(lambda decorated, option: option(decorated), reversed(options), gathered)

    return decorate


class PassOptions(NamedTuple):
    """Command-line options for passes."""

    without: tuple[str, ...]
    """Names of disabled planner passes; not yet checked."""
    pass_tokens: int | None
    prompt_tokens: int | None


pass_options = option_group(
    "passes",
    PassOptions,
    click.option(
        "--no-pass",
        "without",
        multiple=True,
        metavar="NAME",
        help="Switch off a planner pass; `mechdsl plan` lists them.",
    ),
    click.option(
        "--pass-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help=(
            "Limit the tokens of a forward pass over patched rows.  [default: chosen automatically]"
        ),
    ),
    click.option(
        "--prompt-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="Limit the tokens of a batch of unpatched prompts.",
    ),
)
"""Adds `--no-pass`, `--pass-tokens` and `--prompt-tokens`; the command receives `passes`."""


class StoreOptions(NamedTuple):
    """Command-line options for stores."""

    named: Path | Literal[False] | None
    """As for `store_folder`."""
    fresh: bool


def _choose_store(store: Path | None, no_store: bool, fresh: bool) -> StoreOptions:
    for option, given in (("--store", store is not None), ("--fresh", fresh)):
        if no_store and given:
            raise click.UsageError(f"`--no-store` and `{option}` contradict each other")
    return StoreOptions(False if no_store else store, fresh)


store_options = option_group(
    "stores",
    _choose_store,
    click.option(
        "--store",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Store results in this folder.  [default: .mechdsl next to the file]",
    ),
    click.option("--no-store", is_flag=True, help="Don't read or write a store."),
    click.option("--fresh", is_flag=True, help="Recompute everything and store the results."),
)
"""Adds `--store`, `--no-store` and `--fresh`, which the command receives as `stores`. Raises
UsageError if they contradict each other."""


class MalformedSetting(click.UsageError):
    """`--set` without a name or a value."""

    hint = "write `--set NAME=VALUE`, for example `--set depth=12`"


class CheckOptions(NamedTuple):
    """Command-line options for the check of a file."""

    parameters: tuple[str, ...]
    """`NAME=VALUE`, as given."""
    untrusted: bool
    limit: int | None = None
    only: tuple[str, ...] = ()
    allow_python: bool = False
    allow_outside: bool = False

    def settings(self) -> CheckSettings:
        """Return the settings of the check. Raises `MalformedSetting`."""
        from mechdsl.checks.file_check import CheckSettings
        from mechdsl.pipeline import build_lazily
        from mechdsl.program.python_functions import python_mode

        given: dict[str, str] = {}
        for text in self.parameters:
            name, equals, value = text.partition("=")
            name = name.strip()
            if not equals or not name:
                raise MalformedSetting(f"`--set {text}` has no {'name' if equals else '`=`'}")
            if name in given:
                raise MalformedSetting(f"`--set {name}=…` is given twice")
            given[name] = value.strip()
        return CheckSettings(
            given,
            self.limit,
            self.only,
            python_mode(self.allow_python),
            require_models=True,
            allow_outside=self.allow_outside,
            untrusted=self.untrusted,
            build=build_lazily,
        )


collect_check_options = option_group("checks", CheckOptions)
"""Passes the options of `CheckOptions` to a command together, as `checks`."""

ResultT = TypeVar("ResultT")

STDIN = Path("-")
"""The path for standard input."""

_FILES_EACH = 4
"""Minimum number of files per process."""


def find_mech_files(paths: tuple[Path, ...]) -> tuple[list[Path], list[Diagnostic]]:
    """Return the files; folders are searched recursively and sorted by name. Codes: E0208."""
    mech_files: list[Path] = []
    problems: list[Diagnostic] = []
    if paths.count(STDIN) > 1:
        problems.append(
            BadCommandLine(
                reason="`-` is given twice, and standard input can be read only once",
                hint="give it once; standard input holds one file",
            )
        )
    for path in paths:
        if path == STDIN:
            mech_files.append(path)
        elif os.path.isdir(path):  # unlike `Path.is_dir`, accepts any name
            inside = sorted(path.rglob("*.mech"))
            if not inside:
                problems.append(
                    BadCommandLine(
                        reason=f"there is no `.mech` file in `{path}`",
                        hint="name a `.mech` file, or a folder that contains one",
                    )
                )
            mech_files.extend(inside)
        else:
            mech_files.append(path)
    return list(dict.fromkeys(mech_files)), problems


def read_mech_file(path: Path) -> tuple[Source | None, list[Diagnostic]]:
    """Read a file, or standard input; None if it can't be read.

    Codes: E0208 for standard input; those of `read_source`.
    """
    from mechdsl.syntax.frontend import decode_stdin, read_source

    if path != STDIN:
        return read_source(path)
    try:
        if sys.stdin is None:
            raise OSError(None, "it is closed")
        return decode_stdin(sys.stdin.buffer.read())
    except OSError as error:
        reason = f"cannot read standard input: {(error.strerror or str(error)).lower()}"
        hint = "pipe a file, as in `cat FILE | mechdsl validate -`, or give its path"
        return None, [BadCommandLine(reason=reason, hint=hint)]


def check_mech_file(
    file: Path, settings: CheckSettings
) -> tuple[CheckedFile | None, list[Diagnostic]]:
    """Check one file; None if it can't be read."""
    from mechdsl.checks.file_check import check_source

    source, problems = read_mech_file(file)
    if source is None:
        return None, problems
    checked = check_source(source, settings)
    return checked, checked.diagnostics


def check_and_print(
    file: Path, settings: CheckSettings, plugins: Sequence[str]
) -> CheckedFile | None:
    """Load plugins, check one file, and print the diagnostics; None after an error."""
    if problems := load_plugins(plugins):
        print_diagnostics(problems)
        return None
    checked, problems = check_mech_file(file, settings)
    print_diagnostics(problems)
    return None if has_errors(problems) else checked


def map_files(
    work: Callable[[Path, CheckSettings], ResultT], files: Sequence[Path], settings: CheckSettings
) -> Iterator[ResultT]:
    """Yield a function's result for each file, in order; many files use one process per core."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    processes = min(cores, len(files) // _FILES_EACH)
    # Torch's threads don't survive a fork, and only one process can read standard input.
    if processes < 2 or STDIN in files or "torch" in sys.modules:
        return map(work, files, repeat(settings))
    return _divided(work, files, settings, processes)


def _divided(
    work: Callable[[Path, CheckSettings], ResultT],
    files: Sequence[Path],
    settings: CheckSettings,
    processes: int,
) -> Iterator[ResultT]:
    """Divide files among processes for `map_files`: each takes the next file when it is done with
    one. No process waits for this one, so that all end if it is killed."""
    from multiprocessing import get_context
    from multiprocessing.connection import wait

    import_module("mechdsl.checks.file_check")  # once instead of in each process
    # There is already a process per core. Without the variable, tokenizers warn of a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = get_context("fork")
    taken = context.Value("L", 0)
    results: dict[int, ResultT | Exception] = {}
    with ExitStack() as stack:
        readers: list[Connection] = []
        for _ in range(processes):
            reader, writer = context.Pipe(duplex=False)
            part = partial(_work_through, writer, taken, work, files, settings)
            process = context.Process(target=part, daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
            writer.close()
            readers.append(reader)
        for number, file in enumerate(files):
            while number not in results:
                if not readers:
                    raise RuntimeError(f"the process checking {file} ended unexpectedly")
                for reader in cast("list[Connection]", wait(readers)):
                    try:
                        done, outcome = reader.recv()
                        results[done] = outcome
                    except EOFError:
                        readers.remove(reader)
            one = results.pop(number)
            if isinstance(one, Exception):
                raise one
            yield one


def _work_through(
    writer: Connection,
    taken: Synchronized[int],
    work: Callable[[Path, CheckSettings], ResultT],
    files: Sequence[Path],
    how: CheckSettings,
) -> None:
    """Send the number of each file that is taken with its result, or the exception.

    taken: the number of files that the processes have taken.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # handled by the parent process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(BrokenPipeError):
        while True:
            with taken:
                number = taken.value
                taken.value += 1
            if number >= len(files):
                return
            try:
                outcome = work(files[number], how)
            except Exception as error:
                writer.send((number, error))
                return
            writer.send((number, outcome))


safe_csv_option = click.option(
    "--safe-csv",
    is_flag=True,
    help="Write ' before CSV cells that a spreadsheet would read as formulas.",
)
