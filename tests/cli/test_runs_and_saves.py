"""Derived runs and saved activations in the output of commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import mechdsl
from mechdsl.results.document import results_schema

from ..markdown import fences
from .conftest import Command

PROMPTS = """mech 1

model toy = zoo("counting")

prompts fruit {
  count in 3..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
}
"""
HEALED = """
experiment hydra {
  prompts fruit limit 16
  run healed {
    from clean into fewer
    patch z layer 1 head 2 at last-item token
    ablate mlp_out layers 2..3 at last token with mean
  }
  from healed into clean
  patch layer 0..1 head * at last token
  measure logit(answer) as delta
  save resid_post layer * of healed at last token, first-item token to "acts.safetensors"
}
"""
SAVE = """
experiment keep {
  prompts fruit limit 16
  save z layer 0..1 head * at last token to "z.safetensors" as float16
}
"""


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    path = tmp_path / "a.mech"
    path.write_text(PROMPTS + HEALED + SAVE, encoding="utf-8")
    return path


def words(text: str) -> str:
    """Join the lines that consoles break."""
    return " ".join(text.split())


def test_explain_shows_sites_of_derived_runs_and_saves(path: Path, command: Command) -> None:
    said = words(command("explain", path).out)
    hydra, keep = said.split("experiment keep")
    first = "run healed, on fewer: patch z layer 1 head 2 at last-item token sites: L1H2.z "
    assert first + "read in `clean`" in hydra
    assert "run healed, on fewer: ablate mlp_out layers 2..3 at last token with mean" in hydra
    assert "healed: the texts of fewer" in hydra
    assert "tensors: resid_post.layer0, resid_post.layer1, resid_post.layer2, resid_post" in hydra
    amount = "32 vectors of 4 sites of `healed` (16 rows, 66 kB as float32)"
    assert f"{amount} to acts.safetensors, rows to acts.jsonl" in hydra
    assert "the same prompts as above" in keep
    assert "cells:" not in keep, "it has no rule"
    assert "16 vectors of 8 sites of `clean` (16 rows, 8.6 kB as float16) to z.safetensors" in keep


def test_explain_json_has_derived_runs_and_saves(path: Path, command: Command) -> None:
    hydra, keep = json.loads(command("explain", path, "--format", "json").out)["experiments"]
    (healed,) = hydra["derived"]
    assert (healed["name"], healed["base"]) == ("healed", "fewer")
    patch, ablate = healed["rules"]
    assert (patch["sites"], ablate["sites"]) == (["L1H2.z"], ["L2-3.mlp_out"])
    assert patch["reads"] != patch["positions"]
    (save,) = hydra["saves"]
    assert (save["run"], save["file"], save["dtype"]) == ("healed", "acts.safetensors", "float32")
    assert (save["vectors"], save["rows"], len(save["tensors"])) == (32, 16, 4)
    assert [each["label"] for each in save["positions"]] == ["last token", "first-item token"]
    assert keep["rules"] == []
    assert "derived" not in keep
    assert [each["file"] for each in keep["saves"]] == ["z.safetensors"]


def test_graph_has_nodes_for_derived_runs_and_saves(path: Path, command: Command) -> None:
    lines = command("graph", path, "--format", "text").out.splitlines()
    nodes = {name: rest for name, _, rest in (line.strip().partition("  ") for line in lines)}

    def inputs_of_node(text: str) -> list[str]:
        """Return the inputs of a node."""
        (found,) = [rest for rest in nodes.values() if rest.startswith(text)]
        _, _, waits = found.partition("← ")
        return [nodes[name] for name in waits.split(", ")]

    (read,) = inputs_of_node("Save · hydra · to acts.safetensors")
    assert read.startswith("Read · resid_post layers 0..3 · at last token, first-item token")
    healed = "Forward · toy on fewer · run healed, rules on fewer"
    writes = [each for each in inputs_of_node(healed) if each.startswith("Write")]
    assert sorted(each.split(" · ")[1] for each in writes) == ["L1H2.z", "L2-3.mlp_out"]
    assert inputs_of_node("Save · keep · to z.safetensors")[0].startswith("Read · z layers 0..1")
    for form in ("dot", "mermaid", "svg"):
        assert "acts.safetensors" in command("graph", path, "--format", form).out
    assert "acts.safetensors" in command("graph", path, "--before", "--format", "text").out


def test_plan_counts_saved_vectors_and_forward_passes(path: Path, command: Command) -> None:
    said = words(command("plan", path).out)
    head = "saved to sites vectors size forwards tokens×blocks FLOPs"
    assert f"{head} acts.safetensors 4 32 66 kB 2 " in said, "clean is read for healed"
    assert "z.safetensors 8 16 8.6 kB 1 " in said
    assert "Save · keep · to z.safetensors" in said
    assert words(mechdsl.plan(path)).partition("about")[0] == said.partition("about")[0]


def test_plan_with_smaller_batches_counts_more_forward_passes(path: Path, command: Command) -> None:
    """The run of the means is counted twice, since means are computed first."""
    said = words(command("plan", path, "--prompt-tokens", "60").out)
    assert "acts.safetensors 4 32 66 kB 12 " in said, "4 for healed, 4 for clean, 4 for the mean"
    assert "z.safetensors 8 16 8.6 kB 6 " in said, "prompts of clean are longer"


def test_saved_files_are_printed_and_in_json(path: Path, command: Command) -> None:
    """Saved files are listed below the tables, also in Python."""
    done = command("run", path)
    first, second = done.out.splitlines()[-2:]
    assert first.startswith(
        "hydra: resid_post layer * of healed at last token, first-item token: 32 vectors of 4 "
        "sites (16 rows, "
    )
    assert first.endswith("acts.safetensors, rows to acts.jsonl")
    assert second.startswith("keep: z layer 0..1 head * of clean at last token: 16 vectors")
    document = json.loads(command("run", path, "--format", "json").out)
    jsonschema.validate(document, results_schema())
    saved: list[dict[str, Any]] = document["files"][0]["saved"]
    size = (path.parent / "acts.safetensors").stat().st_size
    assert saved[0] == {
        "experiment": "hydra", "kind": "vectors", "site": "resid_post layer *", "run": "healed",
        "at": "last token, first-item token", "file": str(path.parent / "acts.safetensors"),
        "rows_file": str(path.parent / "acts.jsonl"), "dtype": "float32", "tensors": 4,
        "vectors": 32, "rows": 16, "bytes": size,
    }  # fmt: skip
    assert (saved[1]["dtype"], saved[1]["tensors"]) == ("float16", 8)
    results = mechdsl.run(path)
    assert [each.path.name for each in results.saved] == ["acts.safetensors", "z.safetensors"]
    assert results.to_dict()["files"][0]["saved"] == saved
    assert results.to_text().splitlines()[-2:] == [first, second]


def test_file_without_saves_has_no_saved_entry(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "b.mech"
    line = 'save resid_post layer * of healed at last token, first-item token to "acts.safetensors"'
    path.write_text(PROMPTS + HEALED.replace(line, ""), encoding="utf-8")
    assert "saved to" not in command("plan", path).out
    document = json.loads(command("run", path, "--format", "json").out)
    assert "saved" not in document["files"][0]


def test_exported_results_list_saved_files(path: Path, command: Command) -> None:
    out = path.parent / "out"
    assert command("run", path, "--out", out).status == 0
    (document,) = [json.loads(p.read_text(encoding="utf-8")) for p in out.rglob("results.json")]
    assert [each["experiment"] for each in document["files"][0]["saved"]] == ["hydra", "keep"]


def test_runs_and_saves_page_files_print_the_shown_output(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Files of the page run and print the shown output; invalid files are rejected."""
    monkeypatch.chdir(tmp_path)
    page = Path(mechdsl.__file__).parents[1] / "docs" / "runs-and-saves.md"
    printed = ""
    for fence in fences(page.read_text(encoding="utf-8")):
        if fence.language == "mech":
            assert fence.file is not None
            with Path(fence.file).open("a" if "add" in fence.words else "w") as file:
                file.write(fence.content)
            done = command("run", fence.file)
            printed = done.out + done.err
            assert done.status == (2 if "E0108" in printed else 0), printed
        elif fence.language == "python":
            exec(compile(fence.content, page.name, "exec"), {})
            printed = capsys.readouterr().out
        else:
            assert fence.content.strip() in printed
            printed = ""
