"""docs/own-models.md: LoRA adapters and models built by functions."""

from __future__ import annotations

import json
import runpy
import shlex
from pathlib import Path

import pytest
import torch

from ..markdown import fences
from .conftest import Command

PAGE = Path(__file__).parents[2] / "docs" / "own-models.md"
RUN = "mechdsl run twos.mech"
HEADINGS = ("Use a LoRA adapter", "Build a model in a function")


def test_own_models_page_scripts_and_expectations_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """Scripts and commands of the page run, and the `expect` lines of its files hold."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    said: dict[str, str] = {}
    printed = ""
    for fence in fences(PAGE.read_text(encoding="utf-8")):
        if fence.heading not in HEADINGS:
            continue
        if fence.file is not None:
            Path(fence.file).write_text(fence.content, encoding="utf-8")
            if fence.language == "mech":
                assert command("fmt", "--check", fence.file).status == 0
            continue
        assert fence.language == "sh"
        for line in fence.content.splitlines():
            program, *arguments = shlex.split(line)
            if program == "python":
                runpy.run_path(arguments[0])
                continue
            as_json = ("--format", "json") if line == RUN else ()
            done = command(*arguments, *as_json)
            assert done.status == 0, (line, done.out, done.err)
            said[line] = done.err
            if as_json:
                printed = done.out
    assert said.pop("mechdsl validate made.mech").startswith("warning[W0710]: `toy` is created by")
    assert said[RUN] == ""
    found = json.loads(printed)
    both, moved = found["files"][0]["experiments"]
    cells = [cell["coords"] for cell in both["cells"]]
    assert cells == [{"model": m, "layer": n} for m in ("ones", "twos") for n in range(3)]
    assert {"model", "base ones"} <= set(both["hashes"]) | set(moved["hashes"])
