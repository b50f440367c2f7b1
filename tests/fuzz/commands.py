"""What the command line does with a hostile file, in this process."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from mechdsl.cli.entry import app

from .cases import FILE, Files

COMMANDS = ("validate", "fmt", "plan", "graph", "explain")
"""The first is the one whose time is bounded; all mustn't break off."""


@dataclass(frozen=True)
class Said:
    """What a command said."""

    output: str
    seconds: float
    """Of the processor."""
    broke: str | None
    """The exception that came out."""

    @property
    def refused(self) -> bool:
        return "error[" in self.output

    @property
    def long(self) -> bool:
        """Whether `validate` left rows out, all of which the other commands look at."""
        return "[W0790]" in self.output


def write(files: Files, folder: Path) -> Path:
    """The case as files; the path of the `.mech` file."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / FILE


def say(command: str, file: Path) -> Said:
    """One command on one file. A crash report of the command line counts as breaking off."""
    arguments = [command, str(file), *(["--check"] if command == "fmt" else [])]
    started = time.process_time()
    found = CliRunner().invoke(app, arguments, env={"MECHDSL_DEBUG": "1", "HF_HUB_OFFLINE": "1"})
    seconds = time.process_time() - started
    broke = None
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        broke = "".join(traceback.format_exception(found.exception)[-8:])
    return Said(found.output, seconds, broke)
