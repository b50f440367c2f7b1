"""The entry point of the command line: every outcome is an exit status, never a traceback."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from mechdsl.base.version import __version__
from mechdsl.cli.output import (
    COMPLETION_VARIABLE,
    INVALID_INPUT,
    SUCCESS,
    OutputLost,
    finish_output,
    prepare_streams,
    raise_on_signals,
    report_interruption,
    report_lost_output,
)

if TYPE_CHECKING:
    from mechdsl.diagnostics.core import Diagnostic


COMMANDS = {
    "completion": "Print the shell script for command completion.",
    "diff": "Show what changed between two runs.",
    "examples": "Copy the examples that come with mechdsl into a folder.",
    "explain": "Show prompts token by token, or explain an error code or keyword.",
    "export": "Write a model of a file, such as an edited one, to a folder.",
    "fit": "Train what files declare with `fit(…)`.",
    "fmt": "Format files.",
    "graph": "Draw the intervention graph of a file.",
    "new": "Write a first experiment from five questions.",
    "plan": "Print the graph and the estimated cost.",
    "run": "Run files and print their tables.",
    "runs": "List, show, export or remove stored runs.",
    "schema": "Print a JSON schema.",
    "sites": "Inspect a model: its sites, self-checks and planner passes.",
    "validate": "Check files without loading weights.",
    "version": "Print the version.",
}
"""The first line of each command's help."""
MODULES = {
    "completion": "info",
    "diff": "runs",
    "examples": "info",
    "explain": "views",
    "export": "fit",
    "fit": "fit",
    "fmt": "validate",
    "graph": "views",
    "new": "new",
    "plan": "views",
    "run": "run",
    "runs": "runs",
    "schema": "info",
    "sites": "views",
    "validate": "validate",
    "version": "info",
}
"""The module of `mechdsl.cli` that defines each command."""


class CommandTable(Mapping[str, click.Command]):
    """The commands by name, each imported on access."""

    def __getitem__(self, name: str) -> click.Command:
        if name not in COMMANDS:
            raise KeyError(name)
        return getattr(import_module(f"mechdsl.cli.{MODULES[name]}"), name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class CommandGroup(click.Group):
    """All commands, which are listed without being imported."""

    def __init__(self, *args: Any, **others: Any) -> None:
        commands: Any = CommandTable()  # click only reads it, as no command is added
        super().__init__(*args, commands=commands, **others)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Interpretability experiments as files: check, explain, plan and run them.",
    invoke_without_command=True,
)
@click.version_option(__version__, message="%(version)s")
@click.pass_context
def app(context: click.Context) -> None:
    """The commands; alone, the list of them."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> None:
    """Run the command that the arguments name, and exit."""
    gc.disable()  # checks create little garbage; collection would take a tenth of the time
    atexit.register(gc.freeze)  # also skip the collection at exit
    # Pydantic would read the metadata of every installed package to look for its plugins.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    # Torch's threads spin while they wait for one another: with a core in use by other work, that
    # took thirty times as long. Sleeping has no measurable cost.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if sys.argv[1:2] == ["validate"] and not any(name.startswith("--plugin") for name in sys.argv):
        _import_lark()  # no other code of this process uses lark
    try:
        prepare_streams()
        if COMPLETION_VARIABLE in os.environ:
            from mechdsl.cli.info import complete

            status = complete(app, os.environ[COMPLETION_VARIABLE])
        else:
            with raise_on_signals():
                status = _status()
        finish_output()
    except OutputLost as error:
        status = report_lost_output(error)
    status = status if isinstance(status, int) else SUCCESS
    if "WORLD_SIZE" in os.environ:  # one of several processes
        from mechdsl.base.runtime import exit_process

        exit_process(status)
    sys.exit(status)


def _import_lark() -> None:
    """Import lark without libraries that it imports if they are installed.

    The grammar needs none of them, and they take a twentieth of the time of `validate`.
    """
    unused = [name for name in ("interegular", "regex") if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(unused))  # None: Python reports that the module isn't there
    import_module("lark")
    for name in unused:
        del modules[name]


def _status() -> int | str | None:
    """Run the command that the arguments name, and return its exit status."""
    try:
        # Not `app(…)`: click would exit on a broken pipe as if an expectation had failed.
        with app.make_context("mechdsl", sys.argv[1:]) as context:
            return app.invoke(context)
    except click.exceptions.Exit as error:
        return error.exit_code
    except KeyboardInterrupt as error:
        return report_interruption(error)
    except click.exceptions.Abort:  # Ctrl-C or the end of input in a question
        return report_interruption(KeyboardInterrupt())
    except click.ClickException as error:
        from mechdsl.cli.output import print_diagnostics

        print_diagnostics([_usage(error)])
        return INVALID_INPUT
    except OutputLost:
        raise
    except Exception as error:
        from mechdsl.cli.output import report_failure

        status = report_failure("mechdsl", error)
        return INVALID_INPUT if isinstance(error, OSError) else status


OTHER_NAMES = {
    "check": "validate",
    "lint": "validate",
    "format": "fmt",
    "train": "fit",
    "show": "runs",
    "list": "runs",
}
"""Names that other tools give to commands."""


def _usage(error: click.ClickException) -> Diagnostic:
    """Convert an error of the command line to a diagnostic."""
    from mechdsl.cli.arguments import MalformedSetting
    from mechdsl.diagnostics.command_line import BadCommandLine
    from mechdsl.diagnostics.core import did_you_mean

    context: click.Context | None = getattr(error, "ctx", None)
    if context is None or context.parent is None:
        hint = "`mechdsl --help` lists the commands"
    else:
        hint = f"`{context.command_path} --help` lists its arguments and options"
    if isinstance(error, click.NoSuchOption) and context is not None:
        options = [o for p in context.command.params for o in p.opts if o.startswith("--")]
        hint = did_you_mean(error.option_name, options, hint)
    elif isinstance(error, click.UsageError) and "No such command" in error.message:
        word = error.message.split("'")[1]
        group = context.command if context is not None else app
        known = group.list_commands(context) if isinstance(group, click.Group) and context else []
        hint = did_you_mean(OTHER_NAMES.get(word, word), known, hint)
    elif isinstance(error, MalformedSetting):
        hint = error.hint
    reason = error.format_message().partition(" Did you mean")[0].rstrip(".")
    return BadCommandLine(reason=reason[0].lower() + reason[1:], hint=hint)
