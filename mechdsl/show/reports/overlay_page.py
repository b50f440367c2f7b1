"""Shaded prompts as a page (HTML, the text flows) or as a picture (SVG, PNG)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len

from mechdsl.base.visible import visible, xml_text
from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.chart_labels import text_width
from mechdsl.show.reports.charts import FONT, INK, QUIET
from mechdsl.show.reports.image_maps import MAP_STYLE, draw_maps, page_of_maps
from mechdsl.show.reports.matrix import Colour, colour, takes_white
from mechdsl.show.reports.svg_canvas import MARGIN, TITLE, WIDTH, Canvas
from mechdsl.show.reports.text import facts_of, map_format, measure_name, missing_note
from mechdsl.show.reports.token_shades import Overlay, Shaded, maps_of, overlays, remarks
from mechdsl.show.tokens import shown_token

LETTER, DIGIT = 8.0, 6.3
"""Widths of a letter of a token and of a number."""
BOX, LINE = 24, 44
"""Heights of a token's box, and of a line with its numbers."""
GAP = 2
"""Between two boxes."""
NO_SHADE = (255, 255, 255)
MONO = "DejaVu Sans Mono, Menlo, Consolas, monospace"


def save_overlay(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """In the format of the file's ending."""
    found = overlays(result, report)
    if path.suffix.lower() == ".html":
        path.write_text(_page(result, found), encoding="utf-8")
        return
    _picture(result, found).save(path)


def _heads(result: ExperimentResult, measure: int, shown: Overlay) -> Iterator[str]:
    """The title, then what stands below it."""
    data = result.measures[measure]
    yield f"{result.name}: {measure_name(data)}"
    yield facts_of(result, data)
    yield from remarks(result, measure, shown)
    missing = missing_note(result)
    if missing is not None:
        yield missing


def _nothing(result: ExperimentResult) -> tuple[str, str]:
    """What a picture says where no measure that it shows could be computed."""
    return f"{result.name}: nothing to draw", missing_note(result) or ""


def rgb(shade: Colour | None) -> str:
    """A background as HTML, SVG and charts write it."""
    return f"rgb{shade or NO_SHADE}".replace(" ", "")


def ink_on(shade: Colour | None) -> str:
    """The colour of letters on it."""
    return "white" if shade is not None and takes_white(shade) else INK


# --- the page -----------------------------------------------------------------------------------

STYLE = f"""
body {{ font-family: {FONT}; color: {INK}; margin: 24px; }}
h1 {{ font-size: 18px; margin: 24px 0 4px; }}
h2 {{ font-size: 13px; margin: 16px 0 4px; }}
p, small {{ color: {QUIET}; font-size: 12px; margin: 2px 0; }}
.row {{ display: flex; margin: 2px 0; }}
.row > span {{ flex: 0 0 auto; min-width: 72px; padding: 3px 8px 0 0; font-size: 12px; }}
.row > div {{ display: flex; flex-wrap: wrap; gap: 2px; }}
.token {{ display: inline-block; text-align: center; font-family: {MONO}; font-size: 13px; }}
.token b {{ display: block; font-weight: normal; padding: 3px 5px; border-radius: 3px; }}
.token small {{ display: block; font-size: 10px; min-height: 13px; }}
{MAP_STYLE}"""


def _page(result: ExperimentResult, found: Mapping[int, Overlay]) -> str:
    body = "".join(_measure(result, measure, shown) for measure, shown in found.items())
    if not found:
        title, why = map(xml_text, _nothing(result))
        body = f"<h1>{title}</h1><p>{why}</p>"
    title = xml_text(result.name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _measure(result: ExperimentResult, measure: int, shown: Overlay) -> str:
    first, *facts = _heads(result, measure, shown)
    write = map_format([shown.limit])
    lines = [f"<h1>{xml_text(first)}</h1>", *(f"<p>{xml_text(fact)}</p>" for fact in facts)]
    if result.seen:
        maps = [maps_of(each, write) for each in shown.prompts]
        return "\n".join([*lines, page_of_maps(maps, shown.limit, write)])
    for each in shown.prompts:
        lines.append(f"<h2>prompt {each.prompt + 1}</h2>")
        columns = columns_of(each, write)
        for title, values in each.rows:
            label = f"<span>{xml_text(title)}</span>" if title else ""
            tokens = "".join(
                _span(token, value, colour(value, shown.limit), column)
                for token, value, column in zip(each.tokens, values, columns, strict=True)
            )
            lines.append(f'<div class="row">{label}<div>{tokens}</div></div>')
    return "\n".join(lines)


@dataclass(frozen=True)
class TokenColumn:
    """One token of a prompt, with its numbers in all rows."""

    text: str
    letters: int
    digits: int
    write: Callable[[float], str]

    def number(self, value: float) -> str:
        return self.write(value) if math.isfinite(value) else ""


def columns_of(each: Shaded, write: Callable[[float], str]) -> list[TokenColumn]:
    """As wide in every row, so that rows can be compared."""
    return [
        TokenColumn(
            shown_token(token),
            cell_len(shown_token(token)),
            max(len(write(row[i])) for _, row in each.rows),
            write,
        )
        for i, token in enumerate(each.tokens)
    ]


def widths_of(columns: Sequence[TokenColumn]) -> list[float]:
    """Of the tokens' boxes in a picture."""
    return [max(c.letters * LETTER + 10, c.digits * DIGIT + 4) for c in columns]


def left_of(each: Shaded) -> float:
    """Where the first token of a line stands: behind the titles of the rows."""
    longest = max(text_width(title, TITLE) for title, _ in each.rows)
    return longest + 12 if longest else 0


def places_of(widths: Sequence[float], left: float) -> list[tuple[int, float]]:
    """Of each box the line that it stands in, and where it begins."""
    places: list[tuple[int, float]] = []
    line, x = 0, left
    for width in widths:
        if x > left and x + width > WIDTH - MARGIN:
            line, x = line + 1, left
        places.append((line, x))
        x += width + GAP
    return places


def hover(token: str, number: str) -> str:
    """What stands under the pointer: the token with its spaces, and its number."""
    return f"{visible(repr(token))} {number or 'no value'}"


def _span(token: str, value: float, shade: Colour | None, column: TokenColumn) -> str:
    style = f"background:{rgb(shade)};color:{ink_on(shade)}"
    number = column.number(value)
    width = f"min-width:{max(column.letters + 1, 0.8 * column.digits):.1f}ch"
    return (
        f'<span class="token" style="{width}" title="{xml_text(hover(token, number))}">'
        f'<b style="{style}">{xml_text(column.text)}</b><small>{number}</small></span>'
    )


# --- the picture --------------------------------------------------------------------------------


def _picture(result: ExperimentResult, found: Mapping[int, Overlay]) -> Canvas:
    canvas = Canvas()
    for measure, shown in found.items():
        canvas.heads(*_heads(result, measure, shown))
        canvas.y += 8
        write = map_format([shown.limit])
        if result.seen:
            draw_maps(canvas, [maps_of(each, write) for each in shown.prompts], shown.limit, write)
        for each in () if result.seen else shown.prompts:
            canvas.words(f"prompt {each.prompt + 1}", TITLE, INK, "bold")
            canvas.y += 4
            _prompt(canvas, each, shown.limit, write)
            canvas.y += 6
        canvas.y += 14
    if not found:
        canvas.heads(*_nothing(result))
    return canvas


def _prompt(canvas: Canvas, each: Shaded, limit: float, write: Callable[[float], str]) -> None:
    """Its tokens once per row of numbers, in columns that line up."""
    columns = columns_of(each, write)
    widths = widths_of(columns)
    places = places_of(widths, MARGIN + left_of(each))
    for title, values in each.rows:
        if title:
            canvas.line(title, MARGIN, canvas.y + 16, TITLE, INK)
        first = canvas.y
        for token, column, value, width, (line, x) in zip(
            each.tokens, columns, values, widths, places, strict=True
        ):
            canvas.y = first + line * LINE
            said, shade = hover(token, column.number(value)), colour(value, limit)
            canvas.shapes.append(f"<g><title>{xml_text(said)}</title>")
            canvas.shapes.append(
                _token(column.text, column.number(value), shade, x, canvas.y, width)
            )
            canvas.shapes.append("</g>")
            canvas.right = max(canvas.right, x + width + GAP)
        canvas.y += LINE


def _token(text: str, number: str, shade: Colour | None, x: float, y: float, width: float) -> str:
    middle = x + width / 2
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BOX}" rx="3" '
        f'fill="{rgb(shade)}"/>'
        f'<text x="{middle:.1f}" y="{y + 16:.1f}" font-size="13" text-anchor="middle" '
        f'font-family="{MONO}" fill="{ink_on(shade)}">{xml_text(text)}</text>'
        f'<text x="{middle:.1f}" y="{y + BOX + 12:.1f}" font-size="10" '
        f'text-anchor="middle" font-family="{MONO}" fill="{QUIET}">{number}</text>'
    )
