"""`-` as a file name: standard input."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from .conftest import HEADS, Command

Pipe = Callable[[str | bytes], None]
LOOSE = HEADS.replace("limit 16", "limit   16")
"""Not in canonical form."""

TIMES = re.compile(
    r"about [\d.]+ \w+|[\d.]+ \w+ as a plain loop|[\d.]+ GFLOP|(?s:of these .*? for\s+statistics)"
)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pipe:
    """Return a function that sets standard input; the working directory is empty."""
    monkeypatch.chdir(tmp_path)

    def hold(text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return hold


@pytest.mark.parametrize(
    "arguments", ["validate", "plan", "graph", "explain --limit 2", "run --limit 8", "fmt"]
)
def test_stdin_output_equals_that_of_a_file(arguments: str, pipe: Pipe, command: Command) -> None:
    Path("heads.mech").write_text(HEADS, encoding="utf-8")
    pipe(HEADS)
    named, piped = command(*arguments.split(), "heads.mech"), command(*arguments.split(), "-")
    assert (piped.status, named.status) == (0, 0)
    if arguments == "plan":  # how long it takes is measured
        named, piped = (replace(done, out=TIMES.sub("", done.out)) for done in (named, piped))
    assert piped.err == named.err.replace("heads.mech", "<stdin>")
    assert piped.out == (HEADS if arguments == "fmt" else named.out)
    assert [path.name for path in Path().iterdir()] == ["heads.mech"]


@pytest.mark.parametrize("name", ["validate", "plan", "graph", "explain", "run", "fmt"])
def test_diagnostics_of_stdin_name_it(name: str, pipe: Pipe, command: Command) -> None:
    wrong = "{" if name == "fmt" else "head 14"
    pipe(HEADS.replace("head *", wrong))
    done = command(name, "-")
    assert (done.status, done.out) == (2, "")
    assert "┌─ <stdin>:" in done.err
    pipe(b"\xff")
    assert "[E0110]: `<stdin>` is not a text file: byte 0 is not UTF-8" in command(name, "-").err


def test_machine_readable_formats_name_stdin(pipe: Pipe, command: Command) -> None:
    said = {}
    for form in ("json", "github", "sarif"):
        pipe(HEADS.replace("head *", "head 14"))
        said[form] = command("validate", "--format", form, "-").out
    assert json.loads(said["json"])[0]["file"] == "<stdin>"
    assert said["github"].startswith("::error file=<stdin>,line=")
    assert '"uri": "stdin"' in said["sarif"]
    pipe(HEADS)
    document = json.loads(command("run", "--limit", 8, "--format", "json", "-").out)
    assert document["files"][0]["file"] == "<stdin>"


def test_paths_in_stdin_start_from_the_working_directory(pipe: Pipe, command: Command) -> None:
    head, _, rest = HEADS.partition("\nexperiment")
    Path("below").mkdir()
    Path("below/common.mech").write_text(head, encoding="utf-8")
    report = "report table\n  report csv to"
    rest = rest.replace("report table", f'{report} "below/cells.csv"')
    pipe(f'mech 1\nuse "below/common.mech"\n\nexperiment{rest}')
    done = command("run", "--limit", 8, "--out", "runs", "-")
    assert done.status == 0, done.err
    assert Path("below/cells.csv").is_file()
    assert Path("runs/stdin").is_dir()
    pipe(HEADS.replace("report table", f'{report} "../cells.csv"'))
    assert "[E0531]" in command("validate", "-").err


def test_stdin_in_the_root_directory_has_no_folder(
    pipe: Pipe, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the file could write anywhere, and read anywhere with `--untrusted`."""
    monkeypatch.chdir("/")
    for path in ("tmp/cells.csv", "/tmp/cells.csv"):
        pipe(HEADS.replace("report table", f'report csv to "{path}"'))
        said = command("validate", "-").err
        assert "error[E0531]" in said
        assert "the working directory is the root of the file system" in said
    pipe('mech 1\nuse "etc/common.mech"\n')
    assert "error[E0535]" in command("validate", "--untrusted", "-").err


def test_fmt_of_stdin_prints_the_formatted_text(pipe: Pipe, command: Command) -> None:
    Path("other.mech").write_text(LOOSE, encoding="utf-8")
    pipe(LOOSE)
    done = command("fmt", "-", "other.mech")
    assert (done.status, done.out, done.err) == (0, HEADS, "formatted other.mech\n")
    pipe(LOOSE)
    done = command("fmt", "--check", "-")
    assert (done.status, done.out) == (2, "would change <stdin>\n")


def test_stdin_given_twice_is_rejected(pipe: Pipe, command: Command) -> None:
    pipe(HEADS)
    for name in ("validate", "run", "fmt"):
        done = command(name, "-", "-")
        assert done.status == 2
        assert "[E0208]: `-` is given twice" in done.err


def test_closed_stdin_is_an_error(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    done = command("validate", "-")
    assert done.status == 2
    assert "[E0208]: cannot read standard input: it is closed" in done.err


def test_use_does_not_read_stdin(pipe: Pipe, command: Command) -> None:
    pipe('mech 1\nuse "-"\n')
    assert "[E0204]" in command("validate", "-").err
