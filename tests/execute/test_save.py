"""`save`: files, against plain passes over one prompt at a time."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.results.experiment_result import FileResult
from mechdsl.store import files

from ..quick import in_turn
from ..reference.noise import noise
from ..reference.points import Point, copied
from .support import (
    ABSOLUTE,
    MODES,
    PROMPTS,
    ROWS,
    adopted,
    bare,
    check_file,
    patched_run,
    prompt,
    try_file,
    unpatched,
)

FAMILIES = ("gpt2", "llama", "gpt_neox")
EXPERIMENT = "experiment e {{\n  model m\n  prompts p\n  {}\n}}\n"


def saved(
    folder: Path, family: str, *lines: str, mode: str = "planned", prompts: str = PROMPTS
) -> FileResult:
    text = EXPERIMENT.format("\n  ".join(lines))
    result, found = try_file(text, folder, bare(family), MODES[mode], prompts=prompts)
    assert result is not None, found
    return result


def codes(folder: Path, *lines: str) -> list[str]:
    _, found = try_file(EXPERIMENT.format("\n  ".join(lines)), folder, bare("llama"))
    return [each.code for each in found if each.severity == "error"]


def seen(family: str, row: int, run: str = "clean") -> dict[Any, Tensor]:
    if run != "healed":
        return unpatched(family, prompt(ROWS[row], run))[1]
    other, own = prompt(ROWS[row], "longer"), prompt(ROWS[row])
    ends = [Point("resid_post", 0)]
    writes = copied(ends, unpatched(family, other)[1], [other.cue], [own.cue])
    return patched_run(family, own, writes)


HEALED = "run healed { from longer into clean patch resid_post layer 0 at cue token }"


@pytest.mark.parametrize("run", ["clean", "longer", "healed"])
@pytest.mark.parametrize(
    ("mode", "family"),
    in_turn(["plain", "planned", "padded on the right", "small passes"], FAMILIES),
)
def test_saved_vectors_equal_the_reference(
    family: str, mode: str, run: str, tmp_path: Path
) -> None:
    """Every site, at several positions of prompts of different lengths."""
    where = "at cue token, subject tokens"
    lines = [
        HEALED if run == "healed" else "",
        f'save resid_post layer * of {run} {where} to "a.safetensors"',
        f'save z layer 1 head * of {run} {where} to "b.safetensors"',
        f'save mlp_hidden layer 2 of {run} {where} to "c.safetensors"',
        f'save logits of {run} {where} to "d.safetensors"',
    ]
    result = saved(tmp_path, family, *lines, mode=mode)
    names = {
        "a": {f"resid_post.layer{n}": Point("resid_post", n) for n in range(3)},
        "b": {f"z.layer1.head{n}": Point("z", 1, n) for n in range(4)},
        "c": {"mlp_hidden.layer2": Point("mlp_hidden", 2)},
        "d": {"logits": Point("logits")},
    }
    for (name, points), said in zip(names.items(), result.saved, strict=True):
        tensors = load_file(tmp_path / f"{name}.safetensors")
        assert tensors.keys() == {*points, "row", "token", "position"}
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open(encoding="utf-8")]
        order = [each["row"] for each in rows]
        assert sorted(order) == list(range(len(ROWS)))
        expected: list[tuple[int, int, int]] = []
        for row, about in zip(order, rows, strict=True):
            own = prompt(ROWS[row], "longer" if run == "longer" else "clean")
            assert about["ids"] == own.ids
            assert about["text"].split() == list(own.words)
            expected += [(row, own.cue, 0), *((row, at, 1) for at in own.subject)]
        columns = (tensors["row"].tolist(), tensors["token"].tolist(), tensors["position"].tolist())
        assert list(zip(*columns, strict=True)) == expected
        assert (said.vectors, said.rows, said.tensors) == (len(expected), len(ROWS), len(points))
        assert said.bytes == (tmp_path / f"{name}.safetensors").stat().st_size
        for tensor, point in points.items():
            for vector, (row, token, _) in zip(tensors[tensor], expected, strict=True):
                value = seen(family, row, run)[point.site, point.layer][token]
                value = value.flatten() if point.unit is None else value[point.unit]
                torch.testing.assert_close(vector, value, atol=ABSOLUTE, rtol=1e-3)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["positions"]) == ["cue token", "subject tokens"]
    assert about["run"] == run


def test_saved_vectors_in_half_precision_are_rounded_float32(tmp_path: Path) -> None:
    lines = [
        f'save resid_post layer 1 at last token to "{name}.safetensors" as {name}'
        for name in ("float16", "bfloat16", "float32")
    ]
    saved(tmp_path, "llama", *lines)
    whole = load_file(tmp_path / "float32.safetensors")["resid_post.layer1"]
    for name in ("float16", "bfloat16"):
        found = load_file(tmp_path / f"{name}.safetensors")["resid_post.layer1"]
        assert found.dtype == getattr(torch, name)
        torch.testing.assert_close(found, whole.to(found.dtype))


NOISED = "corrupt noised { add gaussian(std: 1.5, samples: 3) to embed at subject tokens }"


@pytest.mark.parametrize("run", ["noised", "mixed"])
def test_saved_vectors_of_each_noise_draw_equal_the_reference(run: str, tmp_path: Path) -> None:
    """Vectors of all draws are listed for each token, also in a run whose rules read noise."""
    text = PROMPTS.replace("corrupt other", f"{NOISED}\n  corrupt other")
    mixed = "run mixed { from noised into clean patch embed at subject tokens }"
    line = f'save embed of {run} at subject tokens, cue token to "a.safetensors"'
    lines = [mixed, line] if run == "mixed" else [line]
    (result,) = saved(tmp_path, "llama", *lines, mode="small passes", prompts=text).saved
    tensors = load_file(result.path)
    checked = check_file(EXPERIMENT.format(line.replace("mixed", "noised")), tmp_path,
                         adopted("llama"), text)  # fmt: skip
    table = checked.experiments[0].table if checked.experiments else checked.saving[0].table
    keys = dict(zip(table.row_ids, table.row_keys, strict=True))
    order = [json.loads(each)["row"] for each in result.rows_path.open(encoding="utf-8")]
    expected = [
        (row, token, position, draw)
        for row in order
        for position, places in enumerate([prompt(ROWS[row]).subject, (prompt(ROWS[row]).cue,)])
        for draw in range(3)
        for token in places
    ]
    names = ("row", "token", "position", "draw")
    assert sorted(zip(*(tensors[name].tolist() for name in names), strict=True)) == sorted(expected)
    assert tensors["row"].tolist() == [row for row, *_ in expected]
    assert result.vectors == len(expected)
    for vector, *where in zip(tensors["embed"], *(tensors[n].tolist() for n in names), strict=True):
        row, token, position, draw = where
        plain = unpatched("llama", prompt(ROWS[row]))[1]["embed", None][token, 0]
        drawn = 1.5 * noise(keys[row], draw, token, len(plain)) if position == 0 else 0
        torch.testing.assert_close(vector, (plain + drawn).to(plain), atol=ABSOLUTE, rtol=1e-3)


def test_saved_rows_keep_their_number_and_skip_missing_positions(tmp_path: Path) -> None:
    """Rows keep their number in the data if others are left out."""
    text = PROMPTS.replace("  xs =", '  where cue != "w28"\n  xs =')
    assert [row["cue"] == "w28" for row in ROWS] == [False, True, False, False]
    line = 'save mlp_out layer 1 at each item token, last token to "a.safetensors"'
    (result,) = saved(tmp_path, "llama", line, prompts=text).saved
    tensors = load_file(result.path)
    about = [json.loads(each) for each in result.rows_path.open(encoding="utf-8")]
    assert {each["row"] for each in about} == {0, 2, 3} == set(tensors["row"].tolist())
    assert {each["row"]: each["values"]["words"] for each in about} == {
        row: ROWS[row]["words"] for row in (0, 2, 3)
    }
    found = list(zip(*(tensors[n].tolist() for n in ("row", "token", "position")), strict=True))
    most = max(len(ROWS[row]["words"]) for row in (0, 2, 3))
    expected = [
        each
        for row in tensors["row"].unique_consecutive().tolist()
        for each in (
            *((row, n + 1, n) for n in range(len(ROWS[row]["words"]))),
            (row, prompt(ROWS[row]).last, most),
        )
    ]
    assert found == expected
    assert len(expected) < 3 * (most + 1)
    for vector, (row, token, _) in zip(tensors["mlp_out.layer1"], found, strict=True):
        value = unpatched("llama", prompt(ROWS[row]))[1]["mlp_out", 1][token].flatten()
        torch.testing.assert_close(vector, value, atol=ABSOLUTE, rtol=1e-3)


def test_save_of_a_derived_run_holds_at_most_two_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any number of batches, only those of one and the next are in memory."""
    held: list[int] = []
    whole = UnpatchedRuns.lanes

    def counted(self: UnpatchedRuns, *args: Any, **kwargs: Any) -> Any:
        found = whole(self, *args, **kwargs)
        held.append(len(vars(self)["_lanes"]))
        return found

    monkeypatch.setattr(UnpatchedRuns, "lanes", counted)
    line = 'save resid_post layer 1 of healed at cue token to "a.safetensors"'
    saved(tmp_path, "llama", HEALED, line, mode="small passes")
    assert len(held) == len(ROWS), "one batch for each row"
    assert max(held) <= 2


def test_save_creates_missing_folders(tmp_path: Path) -> None:
    result = saved(tmp_path, "llama", 'save embed at last token to "no/such/a.safetensors"')
    assert result.saved[0].path == tmp_path / "no" / "such" / "a.safetensors"
    assert (tmp_path / "no" / "such" / "a.jsonl").exists()
    assert load_file(tmp_path / "no" / "such" / "a.safetensors")["embed"].shape[0] == len(ROWS)


def test_save_runs_in_an_experiment_with_measures(tmp_path: Path) -> None:
    result = saved(
        tmp_path, "llama", 'save resid_post layer 1 at last token to "a.safetensors"',
        "measure prob(answer) as raw",
    )  # fmt: skip
    assert [each.name for each in result.experiments] == ["e"]
    assert len(result.saved) == 1


def test_save_on_a_full_disk_leaves_the_old_file_and_no_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"before")
    calls: list[int] = []

    def full(handle: int, data: Any, at: int) -> None:
        calls.append(at)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", full)
    text = EXPERIMENT.format('save resid_post layer 1 at last token to "a.safetensors"')
    result, found = try_file(text, tmp_path, bare("llama"))
    assert "E0533" in [each.code for each in found]
    assert result is None or not result.saved
    assert (tmp_path / "a.safetensors").read_bytes() == b"before"
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".part", ".jsonl")
                and path.name != "data.jsonl"]  # fmt: skip


def test_interrupted_save_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.TensorFile, "put", stopped)
    text = EXPERIMENT.format('save resid_post layer 1 at last token to "a.safetensors"')
    with pytest.raises(KeyboardInterrupt):
        try_file(text, tmp_path, bare("llama"))
    left = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in left if name.startswith((".a", "a."))]


REFUSED = {
    'save resid_post layer 1 at last token to "a.pt"': "E0207",
    'save resid_post layer 1 at last token to "a.safetensors" as int8': "E0203",
    'save resid_post layer 1 of nowhere at last token to "a.safetensors"': "E0201",
    'save pattern layer 1 head 1 at last token to "a.safetensors"': "E0333",
    'save resid_post layer 9 at last token to "a.safetensors"': "E0302",
    'save resid_post layer 1 at token * to "a.safetensors"': "E0305",
    'save resid_post layer 1 at last token to "../../a.safetensors"': "E0531",
    'save resid_post layer 1 at last token to "data.jsonl/a.safetensors"': "E0533",
    'save resid_post layer 1 at last token to "a.safetensors"\n'
    '  save resid_post layer 2 at last token to "a.safetensors"': "E0207",
    'save resid_post layer 1 at last token to "a.safetensors"\n'
    "  ablate resid_post layer 1 at last token with zero": "E0108",
    'save resid_post layer 1 at last token to "data.safetensors"': "E0207",
}


@pytest.mark.parametrize("lines", list(REFUSED))
def test_invalid_saves_are_errors(lines: str, tmp_path: Path) -> None:
    assert REFUSED[lines] in codes(tmp_path, *lines.split("\n"))


@pytest.mark.parametrize(
    "observations",
    [
        ["observe norm resid_post layer * at last token as lengths"],
        ["observe norm resid_post layer * of longer at last token as lengths"],
        ["observe norm resid_post layer * of longer at last token"],
        [
            "observe logit_lens resid_post layer * at last token as lens",
            "observe norm mlp_out layer * at last token as lengths",
            "measure prob(answer) as raw",
        ],
    ],
    ids=["named", "of another run", "without a name", "a lens that measures read"],
)
def test_save_in_an_experiment_with_observations_reads_the_base_run(
    observations: list[str], tmp_path: Path
) -> None:
    """The base run is saved once, for any results of the experiment."""
    line = 'save resid_post layer 1 at cue token to "a.safetensors"'
    result = saved(tmp_path, "llama", line, *observations)
    assert [each.path.name for each in result.saved] == ["a.safetensors"]
    assert {each.name.split(".")[0] for each in result.experiments} == {"e"}
    tensors = load_file(tmp_path / "a.safetensors")
    for vector, row in zip(tensors["resid_post.layer1"], tensors["row"].tolist(), strict=True):
        value = seen("llama", row)["resid_post", 1][prompt(ROWS[row]).cue].flatten()
        torch.testing.assert_close(vector, value, atol=ABSOLUTE, rtol=1e-3)
