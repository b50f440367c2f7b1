"""Run commands on hostile files in this process."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from mechdsl.cli.entry import app

from .cases import FILE, Files

COMMANDS = ("validate", "fmt", "plan", "graph", "explain")
"""Commands that must not crash; only the time of the first is limited."""


@dataclass(frozen=True)
class Said:
    """Output, time and crash of a command."""

    output: str
    seconds: float
    """Processor time."""
    broke: str | None
    """Traceback of an uncaught exception, or the crash report."""

    @property
    def refused(self) -> bool:
        return "error[" in self.output

    @property
    def long(self) -> bool:
        """Whether `validate` skipped rows, all of which the other commands read."""
        return "[W0790]" in self.output


def write(files: Files, folder: Path) -> Path:
    """Write the files of a case; return the path of the `.mech` file."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / FILE


def say(command: str, file: Path) -> Said:
    """Run one command on one file. A crash report of the command line counts as a crash."""
    arguments = [command, str(file), *(["--check"] if command == "fmt" else [])]
    started = time.process_time()
    found = CliRunner().invoke(app, arguments, env={"MECHDSL_DEBUG": "1", "HF_HUB_OFFLINE": "1"})
    seconds = time.process_time() - started
    broke = None
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        broke = "".join(traceback.format_exception(found.exception)[-8:])
    return Said(found.output, seconds, broke)
