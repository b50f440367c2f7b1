"""`mechdsl schema`: the JSON schemas."""

from __future__ import annotations

import json

import click

from mechdsl.cli.status import FINE


@click.command(short_help="Print a JSON schema.")
@click.argument("what", type=click.Choice(["results", "experiment"]), default="results")
def schema(what: str) -> int:
    """Print a JSON schema: of the document that `run --format json` prints, or of an experiment."""
    from mechdsl.program import spec
    from mechdsl.results.document import results_schema

    found = results_schema() if what == "results" else spec.Program.model_json_schema()
    print(json.dumps(found, indent=2))
    return FINE
