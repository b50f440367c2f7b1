"""Reports that would overwrite an input of the command or another report are rejected."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from mechdsl.diagnostics.core import has_errors
from mechdsl.pipeline.api import validate

from .conftest import Command

ZOO = Path(str(files("mechdsl") / "zoo" / "counting"))

FILE = """mech 1

use "common.mech"
model toy = local("toy")
metric own = python("functions.py:own")

prompts facts {{
  rows "data.csv"
  template "Part 1: {{thing}} Count 1:"
  answer " {{count}}"
}}

experiment e {{
  model toy
  prompts facts
  measure prob(answer) as raw
  measure own as raw
{reports}
}}
"""


def folder_of(path: Path, *reports: str) -> Path:
    """Create a file with all its inputs and return its path."""
    lines = "\n".join(f"  report {report}" for report in reports)
    (path / "case.mech").write_text(FILE.format(reports=lines), encoding="utf-8")
    (path / "common.mech").write_text("mech 1\nseed 3\n", encoding="utf-8")
    (path / "data.csv").write_text("thing,count\napple,1\npear,2\n", encoding="utf-8")
    (path / "functions.py").write_text("def own(logits, rows):\n    return logits[:, 0]\n")
    (path / "toy").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ZOO / name, path / "toy" / name)
    return path / "case.mech"


def said(file: Path) -> list[str]:
    return [f"{each.code} {each.message}" for each in validate(file)]


@pytest.mark.parametrize(
    ("report", "what"),
    [
        ('csv to "data.csv"', "`data.csv`, the rows of prompts `facts`"),
        ('csv to "toy/../data.csv"', "`data.csv`, the rows of prompts `facts`"),
        ('table to "data.csv"', "`data.csv`, the rows of prompts `facts`"),
        ('json to "toy/config.json"', "`config.json` of the model `toy`"),
        ('json to "toy/tokenizer.json"', "`tokenizer.json` of the model `toy`"),
    ],
)
def test_report_over_an_input_is_rejected(tmp_path: Path, report: str, what: str) -> None:
    kind = report.split()[0]
    assert said(folder_of(tmp_path, report)) == [f"E0607 `report {kind}` would overwrite {what}"]


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("data.csv", "`data.csv`, the rows of prompts `facts`"),
        ("functions.py", "`functions.py`, which defines `own`"),
        ("case.mech", "`case.mech`, a `.mech` file that the run reads"),
        ("common.mech", "`common.mech`, a `.mech` file that the run reads"),
    ],
)
@pytest.mark.parametrize("hard", [False, True])
def test_report_over_an_input_through_links_is_rejected(
    tmp_path: Path, target: str, what: str, hard: bool
) -> None:
    file = folder_of(tmp_path, 'csv to "out/cells.csv"')
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    link = tmp_path / "real" / "cells.csv"
    if hard:
        link.hardlink_to(tmp_path / target)
    else:
        link.symlink_to(Path("..") / target)
    assert said(file) == [f"E0607 `report csv` would overwrite {what}"]


def test_two_reports_with_one_path_are_rejected(tmp_path: Path) -> None:
    reports = ('csv to "out/cells.csv"', 'table to "./real/../out/cells.csv"')
    file = folder_of(tmp_path, *reports)
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    expected = "has the same path, `./real/../out/cells.csv`, as the report on line 18"
    assert said(file) == [f"E0607 `report table` {expected}"]


def test_report_may_overwrite_a_file_that_is_no_input(tmp_path: Path) -> None:
    file = folder_of(tmp_path, 'csv to "cells.csv"', 'json to "toy/notes.json"')
    for name in ("cells.csv", "toy/notes.json"):
        (tmp_path / name).write_text("from the run before")
    assert not has_errors(validate(file))


SECOND = """mech 1

model toy = zoo("counting")

prompts facts {{
  rows "{rows}"
  template "Part 1: {{thing}} Count 1:"
  answer " {{count}}"
}}

experiment e {{
  model toy
  prompts facts
  measure prob(answer) as raw
  report csv to "{to}"
}}
"""


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("b.csv", "c.csv", "overwrite `b.csv`, the rows of prompts `facts` in `second.mech`"),
        ("c.csv", "c.csv", "has the same path, `c.csv`, as the report on line 15 of `first.mech`"),
    ],
)
def test_report_conflict_between_files_of_a_run_is_rejected(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    first: str,
    second: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "b.csv"):
        Path(name).write_text("thing,count\napple,1\npear,2\n")
    Path("first.mech").write_text(SECOND.format(rows="a.csv", to=first))
    Path("second.mech").write_text(SECOND.format(rows="b.csv", to=second))
    assert command("validate", "first.mech", "second.mech").status == 0  # each file alone is valid
    done = command("run", "first.mech", "second.mech")
    assert done.status == 2
    assert message in done.err
    assert done.err.count("error[") == 1
    assert Path("b.csv").read_text().startswith("thing,count")
