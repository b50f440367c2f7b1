"""Consoles that make every character visible, whatever a prompt, a name or a path contains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from mechdsl.base.text import escape_hidden


def visible_console(
    *,
    file: TextIO | None = None,
    stderr: bool = False,
    width: int | None = None,
    plain: bool = False,
) -> Console:
    """Return a console whose texts can't control the terminal. `plain`: without colours."""
    made = Console(
        file=file,
        stderr=stderr,
        width=width,
        color_system=None if plain else "auto",
        markup=False,  # `[b]` and `:cat:` may be tokens
        emoji=False,
    )
    made.push_render_hook(_VisibleHook(made))
    return made


class _VisibleHook(RenderHook):
    """Replaces hidden characters after the layout. Text whose layout depends on its width is made
    visible beforehand."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_VisibleRenderable(self.console, renderable) for renderable in renderables]


class _VisibleRenderable:
    def __init__(self, console: Console, renderable: ConsoleRenderable) -> None:
        self.console = console
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments: Iterable[Segment] = self.console.render(self.renderable, options)
        for segment in segments:
            text = segment.text if segment.control else escape_hidden(segment.text, keep="\n")
            yield Segment(text, segment.style, segment.control)
