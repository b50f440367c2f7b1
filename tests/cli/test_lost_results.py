"""Lost measures and experiments: printed tables, JSON, exit status, and expectations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mechdsl

from ..fruit import FRUIT
from .conftest import Command

OBSERVED = """
experiment looked {
  model toy
  prompts fruit limit 8
  observe attention layer * head * from last token to fruits tokens
  report heatmap layer by head
}
"""
TWO = """
experiment heads {
  model toy
  prompts fruit limit 8
  from clean into fewer
  patch layer 1 head * at last token
  measure logit(answer) - logit(answer) as recovery
  measure logit(answer) as delta
  report table
  report lines head
  expect max(recovery) > 0
  expect not (max(recovery) > 0)
}
"""
LOST = TWO.replace("  measure logit(answer) as delta\n", "").replace("heads", "lost")


def written(folder: Path, text: str, name: str = "a.mech") -> Path:
    path = folder / name
    path.write_text(FRUIT + text, encoding="utf-8")
    return path


def test_lost_measure_leaves_other_measures(command: Command, tmp_path: Path) -> None:
    done = command("run", written(tmp_path, TWO))
    assert done.status == 3
    assert "E0604" in done.err
    assert done.out.count("heads: recovery of logit(answer) - logit(answer): not computed") == 2
    assert "heads: delta of logit(answer)\n" in done.out
    assert done.out.count("fails  expect") == 2


def test_json_lists_missing_experiments_and_measures(command: Command, tmp_path: Path) -> None:
    done = command("run", written(tmp_path, TWO + OBSERVED + LOST), "--format", "json")
    assert done.status == 3
    (file,) = json.loads(done.out)["files"]
    assert [each["name"] for each in file["experiments"]] == ["heads", "looked"]
    whole, part = file["missing"]
    assert (whole["experiment"], whole["code"]) == ("lost", "E0604")
    assert "label" not in whole
    assert [each["holds"] for each in whole["expect"]] == [False] * 2
    assert (part["experiment"], part["effect"], part["code"]) == ("heads", "recovery", "E0604")
    cell = file["experiments"][0]["cells"][0]
    assert cell["measures"][0]["mean"] is None
    assert cell["measures"][0]["reason"].startswith("not computed (E0604)")
    assert cell["measures"][1]["mean"] is not None
    assert cell["n"] == 8


def test_lost_experiment_leaves_other_experiments(command: Command, tmp_path: Path) -> None:
    done = command("run", written(tmp_path, LOST + OBSERVED))
    assert done.status == 3
    assert "looked: attention" in done.out
    assert "lost: not computed" in done.out


def test_lost_file_leaves_other_files(command: Command, tmp_path: Path) -> None:
    first, second = written(tmp_path, LOST), written(tmp_path, OBSERVED, "b.mech")
    done = command("run", first, second)
    assert done.status == 3
    assert "looked: attention" in done.out
    assert command("run", first).status == 2


def test_python_run_returns_the_rest_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="E0604"):
        results = mechdsl.run(FRUIT + LOST + OBSERVED)
    assert [each.name for each in results] == ["looked"]
    assert not results.complete
    assert [each.name for each in results.files[0].lost] == ["lost"]
    with pytest.raises(mechdsl.MechdslError, match="E0604"):
        mechdsl.run(FRUIT + LOST)


def test_allow_nan_still_rejects_a_run_without_finite_rows(
    command: Command, tmp_path: Path
) -> None:
    """A patched run that is infinite in all rows is an error, even with the option."""
    text = """
experiment huge {
  model toy
  prompts fruit limit 8
  set resid_post layer 1 at last token to 1e39
  measure logit(answer) as delta
}
"""
    path = tmp_path / "a.mech"
    path.write_text(FRUIT.replace("  corrupt fewer { count = count - 1 }\n", "") + text)
    done = command("run", path, "--allow-nan")
    assert done.status == 2
    assert "E0621" in done.err
    assert "in 8 of 8 rows" in done.err
