"""`mechdsl version`."""

from __future__ import annotations

import click

from mechdsl.cli.status import FINE


@click.command()
def version() -> int:
    """Print the version."""
    from mechdsl import __version__

    print(__version__)
    return FINE
