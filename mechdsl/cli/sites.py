"""`mechdsl sites`: a model taken apart."""

from __future__ import annotations

import json

import click

from mechdsl.cli.options import format_option
from mechdsl.cli.output import make_console, print_diagnostics
from mechdsl.cli.status import FINE, WRONG


@click.command(short_help="Take a model apart: its sites, the checks, the passes that apply.")
@click.argument("model", metavar="MODEL")
@format_option("text", "json")
def sites(model: str, form: str) -> int:
    """Print a model's blocks and sites, the outcome of each check, and the planner passes that
    apply. MODEL is a name of the zoo, a folder, or `org/name` in the Hugging Face cache."""
    from mechdsl.loading.load import import_library, look

    import_library()
    found, problems = look(model)
    if found is None:
        print_diagnostics(problems)
        return WRONG
    from mechdsl.show import anatomy as anatomy_table

    if form == "json":
        print(json.dumps(anatomy_table.as_json(found, problems), indent=1))
    else:
        anatomy_table.print_sites(found, problems, make_console())
    return FINE
