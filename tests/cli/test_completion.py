"""Tab completion and its shell scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mechdsl.cli.entry import app

from .conftest import Command

ROOT = Path(__file__).parents[2]
Tab = Callable[..., list[str]]


@pytest.fixture
def tab(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tab:
    """Return completions of a line, in a folder with files and a subfolder."""
    monkeypatch.chdir(tmp_path)
    Path("below").mkdir()
    for name in ("heads.mech", "my heads.mech", "heads.svg", ".hidden.mech", "below/a.mech"):
        Path(name).touch()

    def answers(line: str, shell: str = "bash") -> list[str]:
        words = line.split(" ")
        monkeypatch.setenv("_MECHDSL_COMPLETE", f"{shell}_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words) - 1))
        done = command()
        assert (done.status, done.err) == (0, "")
        return done.out.splitlines()

    return answers


def test_tab_completes_commands_and_options(tab: Tab) -> None:
    assert sorted(tab("mechdsl ")) == sorted(f"plain,{name}" for name in app.commands)
    assert tab("mechdsl va") == ["plain,validate"]
    assert tab("mechdsl run --allow-p") == ["plain,--allow-python"]
    assert tab("mechdsl graph --format s") == ["plain,svg"]
    assert tab("mechdsl run --out ") == ["file,"]
    assert tab("mechdsl run --ju") == ["plain,--junit"]
    assert tab("mechdsl run --junit ") == ["file,"]
    assert tab("mechdsl run --ag") == ["plain,--against"]
    assert tab("mechdsl run --against ") == ["file,"]
    assert tab("mechdsl run --fail") == ["plain,--fail-fast"]


@pytest.mark.parametrize("name", ["run", "validate", "plan", "graph", "fmt", "explain", "diff"])
def test_tab_completes_files(name: str, tab: Tab) -> None:
    words = [
        "half",
        "head",
        "head_out",
        "heads",
        "healed",
        "heatmap",
        "hf_dataset",
        "hidden",
        "holm",
    ]
    assert tab(f"mechdsl {name} h") == [
        *(f"plain,{word}" for word in words if name == "explain"),
        "plain,heads.mech",
        "dir,h",
    ]
    assert tab(f"mechdsl {name} below/") == ["plain,below/a.mech", "dir,below/"]
    assert tab(f"mechdsl {name} nowhere/") == ["dir,nowhere/"]
    assert tab(f"mechdsl {name} ~/") == ["file,~/"]


def test_tab_completes_pages_of_explain(tab: Tab) -> None:
    assert tab("mechdsl explain E030") == [
        *(f"plain,{path.stem}" for path in sorted((ROOT / "docs/errors").glob("E030*"))),
        "dir,E030",
    ]
    words = ["language", "last", "layer", "layers"]
    assert tab("mechdsl explain la") == [*(f"plain,{word}" for word in words), "dir,la"]


def test_zsh_and_fish_get_the_same_completions(tab: Tab) -> None:
    assert tab("mechdsl run h", "zsh")[:2] == ["plain", "heads.mech"]
    assert tab("mechdsl run h", "fish") == ["plain,heads.mech", "dir,h"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_each_shell(shell: str, command: Command) -> None:
    done = command("completion", shell)
    assert (done.status, done.err) == (0, "")
    assert f"_MECHDSL_COMPLETE={shell}_complete" in done.out


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_script_parses_in_its_shell(
    shell: str, command: Command, tmp_path: Path
) -> None:
    """Skipped if the shell is missing; completion itself is tested only in bash."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} on this machine to parse its script")
    script = tmp_path / f"completion.{shell}"
    script.write_text(command("completion", shell).out, encoding="utf-8")
    done = subprocess.run([program, "-n", str(script)], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")


ASKING = """
compopt() { local IFS=' '; echo "option $*"; }
eval "$("$1" completion bash)"
COMP_WORDS=(mechdsl run my)
COMP_CWORD=2
_mechdsl_completion "$1"
printf '%s\\n' "${COMPREPLY[@]}"
complete -p mechdsl
"""


def test_bash_script_completes_files(tab: Tab, tmp_path: Path) -> None:
    """The function of the script is called directly, as bash does on Tab."""
    program = tmp_path / "bin" / "mechdsl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mechdsl "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COMP_", "_MECHDSL"))}
    done = subprocess.run(
        ["bash", "--norc", "-c", ASKING, "bash", str(program)],
        capture_output=True,
        encoding="utf-8",
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "option -o filenames -o plusdirs",
        "my heads.mech",
        "complete -o nosort -F _mechdsl_completion mechdsl",
    ]
