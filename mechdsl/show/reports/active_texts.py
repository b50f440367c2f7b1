"""Prompts in which observed features are most active, with shaded tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from rich.console import Console
from rich.text import Text

from mechdsl.base.text import escape_hidden, escape_xml
from mechdsl.results.experiment_result import ActiveText, ExperimentResult
from mechdsl.show.reports.matrix import cell_style, diverging_colour, needs_white_text
from mechdsl.show.reports.text import number_format

SHOWN_FEATURES = 20
"""Maximum number of features whose prompts are displayed."""

SHOWN_PROMPTS = 3
"""Maximum number of displayed prompts of a feature; JSON has all that are stored."""

SHOWN_BEFORE, SHOWN_AFTER = 24, 8
"""Maximum number of displayed tokens before and after the one with the highest activation."""

CHARACTERS_BEFORE, CHARACTERS_AFTER = 160, 60
"""Maximum length of these tokens together; names of image tokens are long."""


@dataclass(frozen=True)
class _Excerpt:
    """Part of a prompt, around the token with the highest activation."""

    highest: float
    pieces: tuple[tuple[str, float | None], ...]
    """Texts and activations of its tokens."""
    place: int
    """Index of the token with the highest activation."""


def _excerpt(prompt: ActiveText) -> _Excerpt:
    values = [float("-inf") if value is None else value for value in prompt.values]
    highest = max(values)
    place = values.index(highest)
    before = _count_shown(prompt.tokens[:place][::-1], SHOWN_BEFORE, CHARACTERS_BEFORE)
    after = _count_shown(prompt.tokens[place + 1 :], SHOWN_AFTER, CHARACTERS_AFTER)
    begin, end = place - before, place + after + 1
    pieces = list(zip(prompt.tokens[begin:end], prompt.values[begin:end], strict=True))
    if begin:
        pieces[0] = (f"… {pieces[0][0].lstrip()}", pieces[0][1])
    if end < len(values):
        pieces[-1] = (f"{pieces[-1][0].rstrip()} …", pieces[-1][1])
    return _Excerpt(highest, tuple(pieces), place - begin)


def _count_shown(tokens: Sequence[str], most: int, characters: int) -> int:
    """Return how many of the first tokens are displayed."""
    lengths = accumulate(map(len, tokens[:most]))
    return sum(length <= characters for length in lengths)


def _by_feature(
    result: ExperimentResult, order: Sequence[int]
) -> Iterator[tuple[str, list[_Excerpt]]]:
    """Yield each feature in the order of the table, with its prompts."""
    done: set[str] = set()
    for cell in order:
        key = result.cells[cell]
        name = f"feature {key.coords['feature']}"
        if name not in done and len(done) < SHOWN_FEATURES:
            done.add(name)
            title = f"{name} · {escape_hidden(key.label)}" if key.label else name
            yield title, [_excerpt(each) for each in result.active[cell][:SHOWN_PROMPTS]]


def print_active_texts(result: ExperimentResult, order: Sequence[int], console: Console) -> None:
    """Print the prompts of each feature of a table; brackets mark the highest activation.

    Args:
        order: The displayed cells.
    """
    found = list(_by_feature(result, order)) if result.active else []
    if not any(prompts for _, prompts in found):
        return
    console.print(Text("\nmost active prompts", style="bold"), highlight=False)
    write = number_format([each.highest for _, prompts in found for each in prompts])
    for name, prompts in found:
        limit = max((each.highest for each in prompts), default=0.0)
        console.print(Text(name), highlight=False)
        for each in prompts:
            line = Text(f"  {write(each.highest)}  ")
            for place, (token, value) in enumerate(each.pieces):
                text, space = _split_space(token)
                marked = f"[{text}]" if place == each.place else text
                colour = None if not value else diverging_colour(value, limit)
                line.append(space).append(marked, cell_style(colour))
            console.print(line, highlight=False, soft_wrap=False)


def _split_space(token: str) -> tuple[str, str]:
    """Return a token's text without hidden characters, and the white space before it."""
    text = token.lstrip()
    return escape_hidden(text) or "␣", " " if len(text) < len(token) else ""


def active_texts_html(result: ExperimentResult, order: Sequence[int]) -> str:
    """Return the prompts of each feature of a table as HTML; every text is escaped."""
    rows: list[str] = []
    for name, prompts in _by_feature(result, order) if result.active else ():
        limit = max((each.highest for each in prompts), default=0.0)
        for each in prompts:
            pieces = "".join(_piece_html(token, value, limit) for token, value in each.pieces)
            rows.append(
                f'<tr><td style="text-align:left">{escape_xml(name)}</td>'
                f'<td style="text-align:right">{each.highest:.3g}</td>'
                f'<td style="text-align:left">{pieces}</td></tr>'
            )
    if not rows:
        return ""
    return f"<p><b>most active prompts</b></p><table><tbody>{''.join(rows)}</tbody></table>"


def _piece_html(token: str, value: float | None, limit: float) -> str:
    text, space = _split_space(token)
    colour = None if not value else diverging_colour(value, limit)
    if colour is None:
        return f"{space}{escape_xml(text)}"
    ink = "#fff" if needs_white_text(colour) else "#000"
    style = f"background:rgb({','.join(map(str, colour))});color:{ink}"
    return f'{space}<span style="{style}" title="{value:.3g}">{escape_xml(text)}</span>'
