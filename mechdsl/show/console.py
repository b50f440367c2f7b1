"""Consoles that print every text visibly, whatever a prompt, a name or a path holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from mechdsl.base.visible import visible


def visible_console(
    *,
    file: TextIO | None = None,
    stderr: bool = False,
    width: int | None = None,
    plain: bool = False,
) -> Console:
    """A console whose texts can't steer the terminal. plain: without colours."""
    made = Console(
        file=file,
        stderr=stderr,
        width=width,
        color_system=None if plain else "auto",
        markup=False,  # `[b]` and `:cat:` may be tokens
        emoji=False,
    )
    made.push_render_hook(_Visible(made))
    return made


class _Visible(RenderHook):
    """Writes hidden characters out, behind all layout: what is laid out by width is made visible
    before that, where it may hold any."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(self.console, each) for each in renderables]


class _Shown:
    def __init__(self, console: Console, renderable: ConsoleRenderable) -> None:
        self.console = console
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments: Iterable[Segment] = self.console.render(self.renderable, options)
        for segment in segments:
            text = segment.text if segment.control else visible(segment.text, keep="\n")
            yield Segment(text, segment.style, segment.control)
