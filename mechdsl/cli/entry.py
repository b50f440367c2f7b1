"""The command line's entry point: every way out is an exit status, and no user sees a traceback."""

from __future__ import annotations

import atexit
import gc
import os
import sys

import click

from mechdsl.cli.completion import VARIABLE, complete, completion
from mechdsl.cli.examples import examples
from mechdsl.cli.explain import explain
from mechdsl.cli.fmt import fmt
from mechdsl.cli.graph import graph
from mechdsl.cli.interruption import interrupted, terminable
from mechdsl.cli.options import MalformedSetting
from mechdsl.cli.output import broke_off, print_diagnostics
from mechdsl.cli.plan import plan
from mechdsl.cli.run import run
from mechdsl.cli.schema import schema
from mechdsl.cli.sites import sites
from mechdsl.cli.status import FINE, WRONG
from mechdsl.cli.streams import OutputLost, prepare_streams, without_output
from mechdsl.cli.validate import validate
from mechdsl.cli.version import version
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine, did_you_mean


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Interpretability experiments as files: check, explain, plan and run them.",
    invoke_without_command=True,
)
@click.version_option(package_name="mechdsl", message="%(version)s")
@click.pass_context
def app(context: click.Context) -> None:
    """The commands; alone, the list of them."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


COMMANDS = (
    *(run, validate, plan, graph, explain, fmt, sites, schema),
    *(examples, completion, version),
)
for command in COMMANDS:
    app.add_command(command)


def main() -> None:
    """Run the command that the arguments name, and exit."""
    gc.disable()  # checking makes many objects and no garbage worth a tenth of its time
    atexit.register(gc.freeze)  # nor is it worth looking for at the end
    # Pydantic would read the metadata of every installed package to look for plugins of its own.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    # Torch's threads spin while they wait for each other: with a core taken by other work that took
    # thirty times as long. Sleeping instead costs nothing to speak of.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        prepare_streams()
        if VARIABLE in os.environ:
            sys.exit(complete(app, os.environ[VARIABLE]))
        with terminable():
            status = _status()
        sys.stdout.flush()
    except OutputLost as error:
        status = without_output(error)
    sys.exit(status if isinstance(status, int) else FINE)


def _status() -> int | str | None:
    """What the command that the arguments name exits with."""
    try:
        # Not `app(…)`: click would end broken pipes as if an expectation had failed.
        with app.make_context("mechdsl", sys.argv[1:]) as context:
            return app.invoke(context)
    except click.exceptions.Exit as error:
        return error.exit_code
    except KeyboardInterrupt as error:
        return interrupted(error)
    except click.ClickException as error:
        print_diagnostics([_usage(error)])
        return WRONG
    except OutputLost:
        raise
    except Exception as error:
        status = broke_off("mechdsl", error)
        return WRONG if isinstance(error, OSError) else status


def _usage(error: click.ClickException) -> Diagnostic:
    """A mistake on the command line as a diagnostic."""
    context: click.Context | None = getattr(error, "ctx", None)
    if context is None or context.parent is None:
        hint = "`mechdsl --help` lists the commands"
    else:
        hint = f"`mechdsl {context.info_name} --help` lists what it takes"
    if isinstance(error, click.NoSuchOption) and context is not None:
        options = [o for p in context.command.params for o in p.opts if o.startswith("--")]
        hint = did_you_mean(error.option_name, options, hint)
    elif isinstance(error, click.UsageError) and "No such command" in error.message:
        word = error.message.split("'")[1]
        hint = did_you_mean(word, app.list_commands(click.Context(app)), hint)
    elif isinstance(error, MalformedSetting):
        hint = error.hint
    reason = error.format_message().partition(" Did you mean")[0].rstrip(".")
    return BadCommandLine(reason=reason[0].lower() + reason[1:], hint=hint)
