"""Helpers that run the command line, in this process or in a separate one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mechdsl import cli

from ..fruit import FRUIT

HEADS = (
    FRUIT
    + """
experiment heads {
  model toy
  prompts fruit limit 16
  from clean into fewer
  patch layer 0..1 head * at last-item token
  measure logit(answer) - logit(answer of fewer) as recovery
  stats correct max by count
  report table
}
"""
)
"""A valid file, which tests modify."""


@dataclass(frozen=True)
class Done:
    """A finished command."""

    status: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `mechdsl ARGUMENTS` in this process, 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["mechdsl", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as found:
            cli.main()
        printed = capsys.readouterr()
        assert isinstance(found.value.code, int)
        return Done(found.value.code, printed.out, printed.err)

    return run


def process(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> Done:
    """Run `mechdsl ARGUMENTS` in a separate process."""
    done = subprocess.run(
        [sys.executable, "-m", "mechdsl", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", **(env or {})},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """A file that runs."""
    path = tmp_path / "heads.mech"
    path.write_text(HEADS, encoding="utf-8")
    return path
