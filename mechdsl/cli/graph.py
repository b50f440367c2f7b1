"""`mechdsl graph`: the intervention graph, drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mechdsl.base.files import write_whole
from mechdsl.cli.mech_files import checked_file
from mechdsl.cli.options import (
    allow_outside_option,
    allow_python_option,
    file_argument,
    python_mode,
    set_option,
    settings,
    untrusted_option,
)
from mechdsl.cli.output import print_diagnostics
from mechdsl.cli.status import FINE, WRONG
from mechdsl.diagnostics.core import has_errors


@click.command()
@file_argument
@set_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["dot", "mermaid", "svg", "text"]),
    default="mermaid",
    show_default=True,
)
@click.option("--to", type=click.Path(path_type=Path), help="Write it to this file.")
@click.option(
    "--before/--after", help="Before the planner's passes, or as it is run.  [default: after]"
)
@allow_python_option
@allow_outside_option
@untrusted_option
def graph(
    file: Path,
    parameters: tuple[str, ...],
    form: str,
    to: Path | None,
    before: bool,
    allow_python: bool,
    allow_outside: bool,
    untrusted: bool,
) -> int:
    """Draw the intervention graph of a file. `-` is standard input."""
    checked, problems = checked_file(
        file,
        settings(
            parameters,
            python=python_mode(allow_python),
            allow_outside=allow_outside,
            untrusted=untrusted,
        ),
    )
    print_diagnostics(problems)
    if checked is None or has_errors(problems):
        return WRONG
    from mechdsl.show.graph import draw

    text = draw(checked.experiments, checked.saving, form, before=before)
    if to is None:
        sys.stdout.write(text)
    else:
        write_whole(to, text)
    return FINE
