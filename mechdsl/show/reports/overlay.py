"""`report overlay`: the effect at each token or image patch of the first prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mechdsl.base.text import escape_hidden, shown_token
from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.colours import diverging_colour
from mechdsl.show.reports.maps import Matrix, MatrixEntry
from mechdsl.show.reports.overlay_pages import ImageMaps, ShadedPrompt, build_overlays
from mechdsl.show.reports.text import (
    drawable_measures,
    print_conventions,
    print_heading,
    print_notes,
)


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print each prompt's tokens above the numbers, both shaded."""
    overlays = build_overlays(result, report)
    for measure, data in drawable_measures(result, console):
        print_heading(result, data, console)
        if measure not in overlays:
            print_notes(["a category has no shades: see `report table`"], console)
            continue
        shown = overlays[measure]
        write = shown.write
        for maps in shown.images():
            _patch_matrices(maps, shown.limit, write, console)
        for text in shown.texts():
            console.print(Text(f"prompt {text.prompt + 1}", style="bold"), highlight=False)
            _matrix(text, shown.limit, write).print(console)
        print_notes(shown.notes, console)
    print_conventions(result, report, console)


def _patch_matrices(
    maps: ImageMaps, limit: float, write: Callable[[float], str], console: Console
) -> None:
    """Print the numbers of patches in the layout of the image."""
    for title, values in maps.maps:
        said = f"{maps.title} · {title}" if len(maps.maps) > 1 else maps.title
        console.print(Text(escape_hidden(said), style="bold"), highlight=False)
        rows, columns = ([str(n + 1) for n in range(size)] for size in values.shape)
        entries = [[_overlay_entry(float(value), limit, write) for value in row] for row in values]
        Matrix(rows, columns, entries, "row", "col").print(console)


def _overlay_entry(value: float, limit: float, write: Callable[[float], str]) -> MatrixEntry:
    return MatrixEntry(
        f"{write(value)} " if math.isfinite(value) else "", diverging_colour(value, limit)
    )


def _matrix(shaded_prompt: ShadedPrompt, limit: float, write: Callable[[float], str]) -> Matrix:
    only: Sequence[float] = shaded_prompt.rows[0][1] if len(shaded_prompt.rows) == 1 else ()
    return Matrix(
        [title for title, _ in shaded_prompt.rows],
        [shown_token(token) for token in shaded_prompt.tokens],
        [
            [_overlay_entry(value, limit, write) for value in values]
            for _, values in shaded_prompt.rows
        ],
        header_colours=[diverging_colour(value, limit) for value in only],
    )


def chart(result: ExperimentResult, report: spec.Report) -> Any:
    """Return the altair chart."""
    from mechdsl.show.reports.map_charts import overlay_chart

    return overlay_chart(result, report)


def save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """Write a page with flowing text, or a picture."""
    from mechdsl.show.reports.overlay_pages import write_overlay

    write_overlay(result, report, path)
