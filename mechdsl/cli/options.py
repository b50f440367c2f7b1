"""Arguments and options that several commands take."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from mechdsl.program.python_files import Mode
    from mechdsl.validate.check_file import Settings


class MechFile(click.Path):
    """A path of a `.mech` file, or of a folder that has some."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        if incomplete.startswith("~"):  # the shell knows whose folder that is, and how to write it
            return [CompletionItem(incomplete, type="file")]
        folder, slash, begun = incomplete.rpartition("/")
        try:
            names = sorted(os.listdir(folder + slash or "."))
        except OSError:
            names = []
        found = [
            name
            for name in names
            if name.startswith(begun) and name.endswith(".mech") and (begun or name[0] != ".")
        ]
        items = [CompletionItem(folder + slash + name) for name in found if name.isprintable()]
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
    help="At most this many rows per experiment.",
)


def format_option(default: str, *others: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """`--format`, which the command gets as `form`."""
    return click.option(
        "--format",
        "form",
        type=click.Choice([default, *others]),
        default=default,
        show_default=True,
    )


allow_python_option = click.option(
    "--allow-python", is_flag=True, help="Run the Python files that the file refers to."
)
allow_outside_option = click.option(
    "--allow-outside",
    is_flag=True,
    help="Let reports go anywhere, not only to the file's folder or below.",
)
untrusted_option = click.option(
    "--untrusted",
    is_flag=True,
    help="List the paths that the file names, confine all of them, run no Python.",
)


class PassOptions(NamedTuple):
    """What the command line says of passes."""

    without: tuple[str, ...]
    """Names of planner passes that are off; they may be wrong."""
    pass_tokens: int | None
    prompt_tokens: int | None


def pass_options(command: Callable[..., int]) -> Callable[..., int]:
    """`--no-pass`, `--pass-tokens` and `--prompt-tokens`, which the command gets as `passes`."""

    @click.option(
        "--no-pass",
        "no_pass",
        multiple=True,
        metavar="NAME",
        help="Switch a pass off; `plan` lists them.",
    )
    @click.option(
        "--pass-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="At most this many tokens in a pass over patched rows; else it is chosen.",
    )
    @click.option(
        "--prompt-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="At most this many tokens in a batch of unpatched prompts.",
    )
    @wraps(command)
    def told(
        *args: Any,
        no_pass: tuple[str, ...],
        pass_tokens: int | None,
        prompt_tokens: int | None,
        **others: Any,
    ) -> int:
        return command(*args, passes=PassOptions(no_pass, pass_tokens, prompt_tokens), **others)

    return told


class StoreOptions(NamedTuple):
    """What the command line says of stores."""

    named: Path | Literal[False] | None
    """As `store_folder` takes it."""
    fresh: bool


def store_options(command: Callable[..., int]) -> Callable[..., int]:
    """`--store`, `--no-store` and `--fresh`, which the command gets as `stores`. Raises UsageError
    where they contradict each other."""

    @click.option(
        "--store",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Keep what is computed here.  [default: .mechdsl beside the file]",
    )
    @click.option("--no-store", is_flag=True, help="Neither read nor write a store.")
    @click.option("--fresh", is_flag=True, help="Compute all anew, and keep that.")
    @wraps(command)
    def told(*args: Any, store: Path | None, no_store: bool, fresh: bool, **others: Any) -> int:
        for option, given in (("--store", store is not None), ("--fresh", fresh)):
            if no_store and given:
                raise click.UsageError(f"`--no-store` and `{option}` contradict each other")
        stores = StoreOptions(False if no_store else store, fresh)
        return command(*args, stores=stores, **others)

    return told


class MalformedSetting(click.UsageError):
    """`--set` without a name or a value."""

    hint = "write `--set NAME=VALUE`, for example `--set depth=12`"


def settings(
    parameters: tuple[str, ...],
    limit: int | None = None,
    only: str | None = None,
    python: Mode = "refuse",
    *,
    require_models: bool = True,
    allow_outside: bool,
    untrusted: bool,
) -> Settings:
    """How files are checked. Raises `MalformedSetting`."""
    from mechdsl.loading.when_needed import build_when_needed
    from mechdsl.validate.check_file import Settings

    given: dict[str, str] = {}
    for text in parameters:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise MalformedSetting(f"`--set {text}` has no {'name' if equals else '`=`'}")
        if name in given:
            raise MalformedSetting(f"`--set {name}=…` is given twice")
        given[name] = value.strip()
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


def python_mode(allow_python: bool) -> Mode:
    """What is done with Python files where `--allow-python` is an option."""
    return "run" if allow_python else "refuse"
