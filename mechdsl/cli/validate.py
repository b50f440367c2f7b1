"""`mechdsl validate`: check files without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from mechdsl.base import limits
from mechdsl.base.plural import plural
from mechdsl.cli.mech_files import checked_file, each_file, mech_files
from mechdsl.cli.options import (
    allow_outside_option,
    files_argument,
    format_option,
    set_option,
    settings,
    untrusted_option,
)
from mechdsl.cli.output import print_diagnostics
from mechdsl.cli.status import FINE, WRONG
from mechdsl.diagnostics.core import Diagnostic, has_errors

if TYPE_CHECKING:
    from mechdsl.validate.check_file import Settings


@click.command()
@files_argument
@set_option
@allow_outside_option
@untrusted_option
@format_option("full", "json", "github", "sarif")
@click.option(
    "--require-models",
    is_flag=True,
    help="A model that isn't here, or has no weights, is an error.",
)
def validate(
    files: tuple[Path, ...],
    parameters: tuple[str, ...],
    allow_outside: bool,
    untrusted: bool,
    form: str,
    require_models: bool,
) -> int:
    """Check files without weights, as in CI. Exit status 2 where one has an error.

    `-` is standard input.
    """
    how = settings(
        parameters,
        python="look",
        require_models=require_models,
        allow_outside=allow_outside,
        untrusted=untrusted,
    )
    how = replace(how, prompts_enough=limits.CHECKED_PROMPTS)
    paths, problems = mech_files(files)
    unchecked: list[str] = []
    unrun: list[str] = []
    hollow: list[Diagnostic] = []
    for path, one in zip(paths, each_file(_validated, paths, how), strict=True):
        problems += one.problems
        unchecked += [f"{path}: {name}" for name in one.unchecked]
        unrun += [f"{path}: {name}" for name in one.unrun]
        hollow += one.hollow
    problems += hollow if require_models else []
    print_diagnostics(problems, form, out=form != "full")
    if form == "full" and not has_errors(problems):
        count = f"{len(paths)} file" + ("s" if len(paths) != 1 else "")
        rest = _without(unchecked, "model") + _without(unrun, "Python")
        if hollow:
            rest += f", {plural(len(hollow), 'model')} without weights on this machine"
        print(f"{count} checked: no errors{rest}")
    return WRONG if has_errors(problems) else FINE


class _Validated(NamedTuple):
    """What is said of one file."""

    problems: Sequence[Diagnostic]
    unchecked: Sequence[str] = ()
    """Experiments without their model."""
    unrun: Sequence[str] = ()
    """Experiments without their Python."""
    hollow: Sequence[Diagnostic] = ()
    """E0406 for the models without weights."""


def _validated(path: Path, how: Settings) -> _Validated:
    from mechdsl.models.locate import without_weights

    checked, found = checked_file(path, how)
    if checked is None:
        return _Validated(found)
    hollow = without_weights(checked.program.models.values())
    return _Validated(found, checked.unchecked, checked.unrun, hollow)


def _without(experiments: list[str], what: str) -> str:
    """How many experiments were checked for all but what hangs on this."""
    if not experiments:
        return ""
    many = len(experiments) > 1
    whose = f"{len(experiments)} experiments without their" if many else "1 experiment without its"
    return f", {whose} {what}"
