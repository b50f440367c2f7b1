"""`mechdsl diff`: what changed between two runs."""

from __future__ import annotations

from pathlib import Path

import click

from mechdsl.cli.options import format_option
from mechdsl.cli.output import make_console, print_diagnostics
from mechdsl.cli.runs import RunName, store_option
from mechdsl.cli.status import FAILED, FINE, WRONG
from mechdsl.cli.streams import write_json


@click.command(short_help="Show what changed between two runs.")
@click.argument("old", metavar="OLD", type=RunName())
@click.argument("new", metavar="NEW", type=RunName())
@store_option
@format_option("table", "json")
def diff(old: str, new: str, store: Path | None, form: str) -> int:
    """Show what changed between two runs: inputs, verdicts, cells beyond noise.

    OLD and NEW are runs (an id or its beginning, `last`), `.mech` files (their latest finished
    run), or folders of `run --out`. Exit status 0 when nothing changed beyond noise, 1 when an
    effect did, an expectation that held fails, or something is gone; 2 when something is wrong.
    """
    from mechdsl.diagnostics.raised import MechdslError
    from mechdsl.results.diff_sides import differences_of

    try:
        found = differences_of(old, new, store)
    except MechdslError as error:
        print_diagnostics(error.diagnostics)
        return WRONG
    if form == "json":
        write_json(found.to_json())
    else:
        from mechdsl.show.differences import print_differences

        print_differences(found, make_console())
    return FAILED if found.changed else FINE
