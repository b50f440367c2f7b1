"""`mechdsl validate`: check files without weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from mechdsl.base import limits
from mechdsl.cli.mech_files import checked_file, mech_files
from mechdsl.cli.options import files_argument, set_option, settings
from mechdsl.cli.output import print_diagnostics
from mechdsl.cli.status import FINE, WRONG
from mechdsl.diagnostics.core import has_errors


@click.command()
@files_argument
@set_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["full", "json", "github", "sarif"]),
    default="full",
    show_default=True,
)
def validate(files: tuple[Path, ...], parameters: tuple[str, ...], form: str) -> int:
    """Check files without weights, as in CI. Exit status 2 where one has an error."""
    how = replace(settings(parameters, python="look"), prompts_enough=limits.CHECKED_PROMPTS)
    paths, problems = mech_files(files)
    unchecked: list[str] = []
    unrun: list[str] = []
    for path in paths:
        checked, found = checked_file(path, how)
        problems += found
        if checked is not None:
            unchecked += [f"{path}: {name}" for name in checked.unchecked]
            unrun += [f"{path}: {name}" for name in checked.unrun]
    print_diagnostics(problems, form, out=form != "full")
    if form == "full" and not has_errors(problems):
        count = f"{len(paths)} file" + ("s" if len(paths) != 1 else "")
        rest = f", {len(unchecked)} experiments without their model" if unchecked else ""
        rest += f", {len(unrun)} experiments without their Python" if unrun else ""
        print(f"{count} checked: no errors{rest}")
    return WRONG if has_errors(problems) else FINE
