"""What `--out` keeps: every prompt's values, cell by cell, as they finish."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechdsl.execute.options import Options
from mechdsl.pipeline.run_options import RunOptions
from mechdsl.results.experiment_result import ExperimentResult

from .support import DIFFERENCE, bare, experiment, run_file

SECOND = "measure prob(answer) as raw"
TEXT = experiment(
    "items", "prompts p", "from longer into clean", "patch layer 1 head * at each item token",
    DIFFERENCE, SECOND,
) + experiment(
    "parts", "prompts p", "from other into clean",
    "patch attn_out layer * at each token of subject", DIFFERENCE,
)  # fmt: skip


def lines(folder: Path, name: str, run: str = "file") -> list[dict[str, Any]]:
    text = (folder / "out" / run / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def arrays(found: list[dict[str, Any]], result: ExperimentResult) -> list[np.ndarray]:
    """Per measure, [cell, prompt] rebuilt from the lines; runs under one label are averaged."""
    assert result.row_ids is not None
    place = {row: n for n, row in enumerate(result.row_ids)}
    shape = (len(result.cells), len(place))
    sums = [np.zeros(shape) for _ in result.measures]
    counts = np.zeros(shape)
    for line in found:
        if "cell" not in line:
            continue
        assert line["coords"] == dict(result.cells[line["cell"]].coords)
        for n, row in enumerate(line["rows"]):
            counts[line["cell"], place[row]] += 1
            for total, values in zip(sums, line["values"], strict=True):
                total[line["cell"], place[row]] += values[n]
    with np.errstate(invalid="ignore"):
        return [total / np.where(counts > 0, counts, np.nan) for total in sums]


@pytest.mark.parametrize("tokens", [20, 4096])
def test_the_lines_hold_what_the_arrays_hold(folder: Path, tokens: int) -> None:
    options = RunOptions(
        out=folder / "out", execution=Options(pass_tokens=tokens, prompt_tokens=tokens)
    )
    for name, result in run_file(TEXT, folder, bare("gpt2"), options).items():
        found = lines(folder, name)
        header = found[0]
        assert header["experiment"] == name
        assert header["axes"] == list(result.axes)
        assert [m["label"] for m in header["measures"]] == [m.label for m in result.measures]
        for measure, values in zip(result.measures, arrays(found, result), strict=True):
            np.testing.assert_allclose(values, measure.patched, atol=1e-12)
        base = next(line for line in found if line.get("run") == "clean")
        order = np.argsort(base["rows"])
        for measure, values in zip(result.measures, base["values"], strict=True):
            np.testing.assert_allclose(np.array(values)[order], measure.base[0], atol=1e-12)
        runs = {line["run"] for line in found if "run" in line}
        assert runs == {"clean", str(result.source)}


def test_the_document_lies_beside_the_lines(folder: Path) -> None:
    run_file(TEXT, folder, bare("gpt2"), RunOptions(out=folder / "out"))
    document = json.loads((folder / "out" / "file" / "results.json").read_text(encoding="utf-8"))
    assert [e["name"] for e in document["files"][0]["experiments"]] == ["items", "parts"]


def test_what_was_finished_before_an_interrupt_is_kept(folder: Path) -> None:
    whole = RunOptions(out=folder / "out", execution=Options(pass_tokens=40))
    full = run_file(TEXT, folder, bare("gpt2"), whole)
    complete = {name: lines(folder, name) for name in full}
    before = everything(folder / "out" / "file")
    assert state(folder / "out" / "file") == "finished"
    assert not (folder / "out" / "file.unfinished").exists()

    done: list[int] = []

    def stop(rows: int, total: int) -> None:
        done.append(rows)
        assert state(folder / "out" / "file.unfinished") == "running"
        if len(done) == 5:
            raise KeyboardInterrupt

    broken = replace(whole, execution=replace(whole.execution, on_progress=stop))
    with pytest.raises(KeyboardInterrupt):
        run_file(TEXT, folder, bare("gpt2"), broken)
    kept = {name: lines(folder, name, "file.unfinished") for name in full}
    assert all(found == complete[name][: len(found)] for name, found in kept.items())
    every = [line for found in kept.values() for line in found]
    finished = sum(len(line["rows"]) for line in every if "cell" in line)
    assert finished == done[-1] > 0
    assert len(every) < sum(map(len, complete.values()))
    assert state(folder / "out" / "file.unfinished") == "unfinished"
    assert not (folder / "out" / "file.unfinished" / "results.json").exists()
    assert everything(folder / "out" / "file") == before, "the run before is as it was"

    (again,) = {len(run_file(TEXT, folder, bare("gpt2"), whole))}
    assert again == 2
    assert everything(folder / "out" / "file") == before
    assert not (folder / "out" / "file.unfinished").exists()


def state(folder: Path) -> str:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))["state"]


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
