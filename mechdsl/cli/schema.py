"""`mechdsl schema`: the JSON schemas."""

from __future__ import annotations

import json

import click

from mechdsl.cli.status import FINE


@click.command(short_help="Print a JSON schema.")
@click.argument(
    "what", type=click.Choice(["results", "differences", "experiment"]), default="results"
)
def schema(what: str) -> int:
    """Print a JSON schema: of what `run` or `diff` prints as JSON, or of an experiment."""
    if what == "results":
        from mechdsl.results.document import results_schema

        found = results_schema()
    elif what == "differences":
        from mechdsl.results.differences_document import differences_schema

        found = differences_schema()
    else:
        from mechdsl.program import spec

        found = spec.Program.model_json_schema()
    print(json.dumps(found, indent=2))
    return FINE
