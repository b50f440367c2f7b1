"""`mechdsl explain`: prompts token by token, or the page of an error or of the language."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mechdsl.base.visible import json_text
from mechdsl.cli.completion import complete_page_or_file
from mechdsl.cli.mech_files import checked_file
from mechdsl.cli.options import (
    allow_outside_option,
    allow_python_option,
    format_option,
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
from mechdsl.diagnostics.pages import names_page, page_of


@click.command(short_help="Show prompts token by token; or print the page of an error.")
@click.argument("what", metavar="FILE|CODE|language", shell_complete=complete_page_or_file)
@set_option
@limit_option
@format_option("text", "json")
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
    """Show each prompt's tokens with the positions marked.

    Or print a page: `mechdsl explain E0301` says what an error means and how to mend it, `mechdsl
    explain language` has every construct of the language. `-` is standard input.
    """
    if names_page(what):
        return _print_page(what)
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


def _print_page(name: str) -> int:
    """The page of an error or a warning, or that of the language."""
    text, problems = page_of(name)
    print_diagnostics(problems)
    sys.stdout.write(text)
    return WRONG if problems else FINE
