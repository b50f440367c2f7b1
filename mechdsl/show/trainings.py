"""Trained dictionaries as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mechdsl.execute.run_record import TrainedFit
from mechdsl.show.reports.text import print_hanging

NOTES = {
    "explained": "share of the variance of the held-out vectors; without any, of training vectors",
    "untrained": "the same with the first, random weights",
    "components": "the same for principal components, as many as features are active on average",
    "active": "mean number of active features of a vector",
    "inactive": "features that are active for none of these vectors",
}
"""Columns, as the lines below the table explain them."""


def print_trained_fits(fits: Sequence[TrainedFit], console: Console) -> None:
    """Print a line per dictionary, with its controls, and where it is stored."""
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("basis", no_wrap=True)
    for name in ("rows", "held out", "steps", *NOTES, "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for fit in fits:
        report = fit.report
        table.add_row(
            fit.basis,
            f"{report.rows:,}",
            f"{report.held_out_rows:,}",
            f"{report.steps:,}" + ("*" if report.stopped_early else ""),
            f"{report.explained:.3f}",
            f"{report.untrained_explained:.3f}",
            f"{report.components_explained:.3f}",
            f"{report.active:.1f}",
            f"{report.inactive:,}",
            f"{fit.seconds:.1f}" if fit.seconds else "stored",
        )
    console.print(table)
    for name, note in NOTES.items():
        print_hanging(f"  {name}: ", note, console)
    if any(fit.report.stopped_early for fit in fits):
        print_hanging("  *: ", "stopped early, with the best weights", console)
    for fit in fits:
        print_hanging(f"  {fit.basis}: ", f"{fit.what} at {fit.site}, in {fit.folder}", console)
