"""The classifier of docs/own-models.md: its blocks run in order and print the shown output."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ..cli.conftest import Command, command
from ..markdown import fences

__all__ = ["command"]
PAGE = Path(__file__).parents[2] / "docs" / "own-models.md"


def test_documented_classifier_blocks_print_the_documented_table(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: Command,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, object] = {}
    printed = ""
    for fence in fences(PAGE.read_text(encoding="utf-8")):
        if fence.heading != "Use a classifier":
            continue
        if fence.file is not None:
            Path(fence.file).write_text(fence.content, encoding="utf-8")
        if fence.language == "python":
            names = {"__name__": "__main__"}
            exec(compile(fence.content, fence.file or PAGE.name, "exec"), names)
            printed = capsys.readouterr().out
        elif fence.language == "text":
            held(fence.content, printed)
    results = names["results"]
    assert results["where_is_the_mood"].holds  # type: ignore[index]
    for part in ("model", "tokenizer"):  # the last paragraph
        names[part].save_pretrained("moods")  # type: ignore[attr-defined]
    done = command("run", "moods.mech")
    assert done.status == 0, done.err
    assert done.out.count("L1.resid_post") == 3
    sys.modules.pop("train_moods")


def held(said: str, printed: str) -> None:
    """Check that tables have the same cells and, up to training noise, the same recoveries."""
    tables = []
    for text in (said, printed):
        lines = [line.split() for line in text.splitlines() if ".resid_post " in line]
        tables.append([(line[0], line[1], line[-1] == "inert", line) for line in lines])
    assert [each[:3] for each in tables[0]] == [each[:3] for each in tables[1]]
    assert len(tables[0]) == 6
    for one, other in zip(*tables, strict=True):
        assert recovery(one[3]) == pytest.approx(recovery(other[3]), abs=0.1)


def recovery(line: list[str]) -> float:
    """The number before the interval, or before the dash in its place."""
    return float(line[next(n for n, word in enumerate(line) if word[0] in "[–") - 1])
