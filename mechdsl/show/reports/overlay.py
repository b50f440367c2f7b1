"""`report overlay [top n]`: the effect at each token, on the tokens of the first prompts.

Shown are single prompts: what is averaged over them stands in tables and maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mechdsl.base.visible import visible
from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.matrix import Matrix, MatrixEntry, colour
from mechdsl.show.reports.text import conventions, heading, map_format, notes, shown_measures
from mechdsl.show.reports.token_shades import ImageMaps, Shaded, maps_of, overlays, remarks
from mechdsl.show.tokens import shown_token


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Per prompt its tokens over the numbers, both shaded."""
    found = overlays(result, report)
    for measure, data in shown_measures(result, console):
        heading(result, data, console)
        if measure not in found:
            notes(["a category has no shades: see `report table`"], console)
            continue
        shown = found[measure]
        write = map_format([shown.limit])
        for each in shown.prompts:
            if each.image is not None:
                _grids(maps_of(each, write), shown.limit, write, console)
                continue
            console.print(Text(f"prompt {each.prompt + 1}", style="bold"), highlight=False)
            _matrix(each, shown.limit, write).print(console)
        notes(remarks(result, measure, shown), console)
    conventions(result, report, console)


def _grids(each: ImageMaps, limit: float, write: Callable[[float], str], console: Console) -> None:
    """The numbers of patches where these lie in the image."""
    for title, values in each.maps:
        said = f"{each.title} · {title}" if len(each.maps) > 1 else each.title
        console.print(Text(visible(said), style="bold"), highlight=False)
        rows, columns = ([str(n + 1) for n in range(size)] for size in values.shape)
        entries = [[_entry(float(value), limit, write) for value in row] for row in values]
        Matrix(rows, columns, entries, "row", "col").print(console)


def _entry(value: float, limit: float, write: Callable[[float], str]) -> MatrixEntry:
    return MatrixEntry(f"{write(value)} " if math.isfinite(value) else "", colour(value, limit))


def _matrix(each: Shaded, limit: float, write: Callable[[float], str]) -> Matrix:
    only: Sequence[float] = each.rows[0][1] if len(each.rows) == 1 else ()
    return Matrix(
        [title for title, _ in each.rows],
        [shown_token(token) for token in each.tokens],
        [[_entry(value, limit, write) for value in values] for _, values in each.rows],
        header_colours=[colour(value, limit) for value in only],
    )


def chart(result: ExperimentResult, report: spec.Report) -> Any:
    """The altair chart."""
    from mechdsl.show.reports.overlay_chart import overlay_chart

    return overlay_chart(result, report)


def save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """As a page whose text flows, or as a picture."""
    from mechdsl.show.reports.overlay_page import save_overlay

    save_overlay(result, report, path)
