"""Ctrl-C and the signals that ask a process to end: what is kept is said."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from mechdsl.cli.status import SIGNALLED

_WORDS = {
    getattr(signal, name): word
    for name, word in (("SIGTERM", "terminated"), ("SIGHUP", "the terminal was closed"))
    if hasattr(signal, name)
}

GOES_ON = "what is finished is kept; the same command goes on from there"


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end a run just as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def terminable() -> Generator[None]:
    """These signals raise `Terminated` inside; one that is ignored (`nohup`) stays ignored."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    before = {each: signal.getsignal(each) for each in _WORDS}
    ours = [each for each, handler in before.items() if handler is signal.SIG_DFL]
    for each in ours:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, before[each])


def interrupted(error: KeyboardInterrupt, kept: str = "") -> int:
    """Say that the command was ended, and what it keeps; the exit status."""
    number = error.number if isinstance(error, Terminated) else signal.SIGINT
    word = _WORDS.get(signal.Signals(number), "interrupted")
    print(f"{word}{kept}", file=sys.stderr)
    return SIGNALLED + number
