"""Saved means and directions in the output of commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Command

TEXT = """mech 1

model toy = zoo("counting")

prompts fruit {
  count in 3..9
  item in ["apple", "pear"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
}

direction more = mean_difference(fruit, fruit.fewer) at resid_post layer * at last token

experiment vectors {
  save direction more to "more.safetensors"
  save direction more to "more.gguf"
}

experiment means {
  prompts fruit
  save mean of resid_post layer * of fewer at last token to "means.safetensors"
}
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.mech").write_text(TEXT, encoding="utf-8")
    return "file.mech"


def test_explain_lists_saved_directions_and_means(path: str, command: Command) -> None:
    done = command("explain", path)
    assert "experiment vectors · model toy · no prompts" in done.out
    assert "direction more[layer 3]: mean over 7 rows" in done.out
    assert "tensors: direction.1, direction.2, direction.3" in done.out
    assert "1 mean of 4 sites of `fewer` (7 rows, 2.0 kB as float32)" in done.out
    assert ".jsonl" not in done.out
    found: Any = json.loads(command("explain", path, "--format", "json").out)
    experiments = {each["name"]: each for each in found["experiments"]}
    first, second = experiments["vectors"]["saves"]
    assert first["tensors"] == [f"more.layer{n}" for n in range(4)]
    names = [each["name"] for each in second["directions"]]
    assert names == [f"more[layer {n}]" for n in (1, 2, 3)]
    assert experiments["means"]["saves"][0]["dtype"] == "float32"


def test_plan_and_graph_list_saved_files(path: str, command: Command) -> None:
    """The rows of a fit are run once for both files."""
    lines = [line.split() for line in command("plan", path).out.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line and line[0].endswith(("gguf", "tensors"))}
    assert rows["more.safetensors"][:2] == ["4", "1"]
    assert rows["more.gguf"][:2] == ["3", "1"]
    assert float(rows["more.safetensors"][-1]) > 0
    assert float(rows["more.gguf"][-1]) == 0
    assert float(rows["means.safetensors"][-1]) > 0
    graph = command("graph", path, "--format", "text").out
    for file in ("more.safetensors", "more.gguf", "means.safetensors"):
        assert f"to {file}" in graph


def test_run_json_describes_saved_files(path: str, command: Command) -> None:
    found: Any = json.loads(command("run", path, "--no-store", "--format", "json").out)
    direction, vector, means = found["files"][0]["saved"]
    assert direction == {
        "experiment": "vectors",
        "kind": "direction",
        "direction": "more",
        "file": "more.safetensors",
        "dtype": "float32",
        "tensors": 4,
        "vectors": 1,
        "bytes": Path("more.safetensors").stat().st_size,
    }
    assert vector["kind"] == "control vector"
    assert vector["note"] == "without layer 0, to which llama.cpp adds nothing"
    assert (means["kind"], means["rows"], means["run"]) == ("means", 7, "fewer")
    assert "rows_file" not in means
    out = command("run", path, "--no-store").out
    assert "vectors: direction more: 3 vectors (" in out
    assert "written to more.gguf as a control vector of llama.cpp; without layer 0" in out
