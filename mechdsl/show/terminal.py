"""What the command line prints, as text."""

from __future__ import annotations

import io
from collections.abc import Callable
from html import escape

from rich.console import Console

from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.verdicts import print_verdicts
from mechdsl.show.show_report import show_report


class Printed(str):
    """A text that is shown as it is, by `print` and alone at the end of a notebook's cell."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f'<pre style="line-height:1.2">{escape(self)}</pre>'


class Drawing(Printed):
    """A picture as SVG, which a notebook shows as a picture."""

    def _repr_html_(self) -> str:
        return str(self)


def printed(show: Callable[[Console], None], width: int = 100) -> Printed:
    """What a function prints to a console that has `width` columns and no colours."""
    text = io.StringIO()
    show(Console(file=text, width=width, color_system=None))
    return Printed(text.getvalue())


def as_text(result: ExperimentResult, width: int) -> Printed:
    """All reports of an experiment but those that go to a file, and the verdicts."""

    def show(console: Console) -> None:
        for report in result.reports:
            if report.file is None:
                show_report(result, report, console)
        print_verdicts(result, console)

    return printed(show, width)
