"""`mechdsl explain`: prompts token by token, or an error's page."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mechdsl.base.visible import json_text
from mechdsl.cli.mech_files import checked_file
from mechdsl.cli.options import (
    allow_outside_option,
    allow_python_option,
    limit_option,
    python_mode,
    set_option,
    settings,
    untrusted_option,
)
from mechdsl.cli.output import make_console, print_diagnostics
from mechdsl.cli.status import FINE, WRONG
from mechdsl.cli.streams import write_json
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.pages import is_code, page_of


@click.command(short_help="Show prompts token by token, or an error's page.")
@click.argument("what", metavar="FILE|CODE")
@set_option
@limit_option
@click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@allow_python_option
@allow_outside_option
@untrusted_option
def explain(
    what: str,
    parameters: tuple[str, ...],
    limit: int | None,
    form: str,
    allow_python: bool,
    allow_outside: bool,
    untrusted: bool,
) -> int:
    """Show each prompt's tokens with the positions marked; or explain an error's code."""
    if is_code(what):
        return _explain_code(what)
    how = settings(
        parameters,
        limit,
        python=python_mode(allow_python),
        allow_outside=allow_outside,
        untrusted=untrusted,
    )
    checked, problems = checked_file(Path(what), how)
    print_diagnostics(problems)
    if checked is None or has_errors(problems):
        return WRONG
    from mechdsl.show import prompts as explaining

    if form == "json":
        write_json(json_text(explaining.as_json(checked), indent=1))
    else:
        explaining.explain(checked, make_console())
    return FINE


def _explain_code(code: str) -> int:
    """The page of an error or a warning."""
    text, problems = page_of(code)
    print_diagnostics(problems)
    sys.stdout.write(text)
    return WRONG if problems else FINE
