"""`save mean of`: means over rows, against plain passes over one prompt at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..quick import in_turn
from ..reference.noise import noise
from ..reference.points import Point
from . import nan
from .support import (
    ABSOLUTE,
    PROMPTS,
    ROWS,
    Prompt,
    adopted,
    bare,
    check_file,
    prompt,
    try_file,
    unpatched,
)
from .test_save import EXPERIMENT, FAMILIES, HEALED, codes, saved, seen

AT: dict[str, Callable[[Prompt], Sequence[int]]] = {
    "cue token": lambda own: [own.cue],
    "subject tokens": lambda own: own.subject,
    **{f"item {n}": lambda own, n=n: own.items[n : n + 1] for n in range(9)},
}


def mean(family: str, run: str, point: Point, at: str) -> tuple[Tensor, int]:
    """The mean over rows, tokens of a row averaged first, and the number of rows."""
    found: list[Tensor] = []
    for row, record in enumerate(ROWS):
        own = prompt(record, "longer" if run == "longer" else "clean")
        value = seen(family, row, run)[point.site, point.layer]
        vectors = [
            value[token].flatten() if point.unit is None else value[token][point.unit]
            for token in AT[at](own)
        ]
        found += [torch.stack(vectors).double().mean(0)] if vectors else []
    return torch.stack(found).mean(0), len(found)


@pytest.mark.parametrize("run", ["clean", "longer", "healed"])
@pytest.mark.parametrize(
    ("mode", "family"),
    in_turn(["plain", "planned", "padded on the right", "small passes"], FAMILIES),
)
def test_saved_means_equal_the_reference(family: str, mode: str, run: str, tmp_path: Path) -> None:
    """Every site, at positions of one token, of several, and of none in some rows."""
    lines = [
        HEALED if run == "healed" else "",
        f'save mean of resid_post layer * of {run} at subject tokens to "a.safetensors"',
        f'save mean of z layer 1 head * of {run} at cue token, subject tokens to "b.safetensors"',
        f'save mean of mlp_hidden layer 2 of {run} at each item token to "c.safetensors"',
        f'save mean of logits of {run} at cue token to "d.safetensors"',
    ]
    result = saved(tmp_path, family, *lines, mode=mode)
    own = [prompt(record, "longer" if run == "longer" else "clean") for record in ROWS]
    most = max(len(each.items) for each in own)
    expected = {
        "a": {f"resid_post.layer{n}": (Point("resid_post", n), "subject tokens") for n in range(3)},
        "b": {
            f"z.layer1.head{head}.position{number}": (Point("z", 1, head), at)
            for head in range(4)
            for number, at in enumerate(("cue token", "subject tokens"))
        },
        "c": {
            f"mlp_hidden.layer2.position{n}": (Point("mlp_hidden", 2), f"item {n}")
            for n in range(most)
        },
        "d": {"logits": (Point("logits"), "cue token")},
    }
    for (name, points), said in zip(expected.items(), result.saved, strict=True):
        path = tmp_path / f"{name}.safetensors"
        tensors = load_file(path)
        assert tensors.keys() == points.keys()
        counts: list[int] = []
        for tensor, (point, at) in points.items():
            value, count = mean(family, run, point, at)
            counts.append(count)
            assert tensors[tensor].dtype == torch.float32
            torch.testing.assert_close(tensors[tensor].double(), value, atol=ABSOLUTE, rtol=1e-3)
        assert said.rows == max(counts)
        assert (said.kind, said.rows_path) == ("means", None)
        assert said.bytes == path.stat().st_size
        assert not path.with_suffix(".jsonl").exists()
        with safe_open(path, "pt") as file:
            about = file.metadata()
        assert about["run"] == run
        positions = len(json.loads(about["positions"]))
        assert json.loads(about["rows"]) == counts[:positions]
    assert min(len(each.items) for each in own) < most, "some rows lack the last item"


def test_saved_mean_weights_rows_with_noise_draws_equally(tmp_path: Path) -> None:
    noised = "corrupt noised { add gaussian(std: 1.5, samples: 3) to embed at subject tokens }"
    text = PROMPTS.replace("corrupt other", f"{noised}\n  corrupt other")
    line = 'save mean of embed of noised at subject tokens to "a.safetensors"'
    (result,) = saved(tmp_path, "llama", line, mode="small passes", prompts=text).saved
    checked = check_file(EXPERIMENT.format(line), tmp_path, adopted("llama"), text)
    table = checked.saving[0].table
    keys = dict(zip(table.row_ids, table.row_keys, strict=True))
    rows: list[Tensor] = []
    for row, record in enumerate(ROWS):
        own = prompt(record)
        plain = unpatched("llama", own)[1]["embed", None]
        drawn = [
            plain[token, 0] + 1.5 * noise(keys[row], draw, token, plain.shape[-1])
            for draw in range(3)
            for token in own.subject
        ]
        rows.append(torch.stack(drawn).double().mean(0))
    found = load_file(result.path)["embed"]
    expected = torch.stack(rows).mean(0)
    torch.testing.assert_close(found.double(), expected, atol=ABSOLUTE, rtol=1e-3)


@pytest.mark.parametrize("mode", ["planned", "small passes"])
def test_saved_mean_weights_rows_with_replies_equally(mode: str, tmp_path: Path) -> None:
    """The mean over the vectors that a plain `save` writes, each row of the table once."""
    generate = "generate 6 with temperature 2, samples 3"
    where = 'resid_post layer 1 at "w3" of reply token, each step'
    lines = [
        generate,
        "measure length as raw",
        f'save {where} to "all.safetensors"',
        f'save mean of {where} to "mean.safetensors"',
    ]
    saved(tmp_path, "llama", *lines, mode=mode, prompts=f"seed 7\n{PROMPTS}")
    every, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("all", "mean"))
    vectors, row, position = (every[n] for n in ("resid_post.layer1", "row", "position"))
    with safe_open(tmp_path / "mean.safetensors", "pt") as file:
        labels = json.loads(file.metadata()["positions"])
        counted = json.loads(file.metadata()["rows"])
    assert len(labels) == len(found)
    for number, count in enumerate(counted):
        rows = row[position == number].unique().tolist()
        assert len(rows) == count
        parts = [vectors[(position == number) & (row == each)].double().mean(0) for each in rows]
        expected = torch.stack(parts).mean(0)
        own = found[f"resid_post.layer1.position{number}"].double()
        torch.testing.assert_close(own, expected, atol=ABSOLUTE, rtol=1e-3)


def test_saved_files_are_listed_in_source_order(tmp_path: Path) -> None:
    lines = [
        'save direction d to "d.safetensors"',
        'save mean of resid_post layer 1 at cue token to "a.safetensors"',
        'save resid_post layer 1 at cue token to "b.safetensors"',
    ]
    direction = "direction d = mean(p) at resid_post layer 1\n"
    for own in (lines, lines[::-1]):
        text = direction + EXPERIMENT.format("\n  ".join(own))
        result, _ = try_file(text, tmp_path, bare("llama"))
        assert result is not None
        names = [line.split('"')[1] for line in own]
        assert [each.path.name for each in result.saved] == names


def test_mean_of_no_rows_is_an_error_of_its_save_alone(tmp_path: Path) -> None:
    lines = [
        "generate 2",
        "measure length as raw",
        'save mean of resid_post layer 1 at "w77" of reply token to "a.safetensors"',
        'save mean of resid_post layer 1 at cue token to "b.safetensors"',
    ]
    result, found = try_save(tmp_path, *lines)
    assert [each.code for each in found if each.severity == "error"] == ["E0641"]
    assert [each.path.name for each in result.saved] == ["b.safetensors"]
    assert [each.name for each in result.experiments] == ["e"]
    assert not (tmp_path / "a.safetensors").exists()


def try_save(folder: Path, *lines: str):
    text = EXPERIMENT.format("\n  ".join(lines))
    result, found = try_file(text, folder, bare("llama"))
    assert result is not None
    return result, found


def test_bfloat16_means_are_rounded_from_float32_means(tmp_path: Path) -> None:
    lines = [
        'save mean of resid_post layer 1 at cue token to "a.safetensors"',
        'save mean of resid_post layer 1 at cue token to "b.safetensors" as bfloat16',
    ]
    saved(tmp_path, "llama", *lines)
    whole, half = (load_file(tmp_path / f"{n}.safetensors")["resid_post.layer1"] for n in "ab")
    assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(half, whole.to(torch.bfloat16))


REFUSED = {
    'save mean of resid_post layer 1 at cue token to "a.gguf"': "E0207",
    'save mean of resid_post layer 1 of nowhere at cue token to "a.safetensors"': "E0201",
    'save mean resid_post layer 1 at cue token to "a.safetensors"': "E0203",
    'save mean of pattern layer 1 head 1 at cue token to "a.safetensors"': "E0333",
    'save mean of resid_post layer 1 at cue token to "a.safetensors"\n'
    '  save mean of resid_post layer 2 at cue token to "a.safetensors"': "E0207",
}


@pytest.mark.parametrize("lines", list(REFUSED))
def test_invalid_mean_saves_are_errors(lines: str, tmp_path: Path) -> None:
    assert REFUSED[lines] in codes(tmp_path, *lines.split("\n"))


def test_mean_save_writes_no_rows_file(tmp_path: Path) -> None:
    """The rows of `p` are in `data.jsonl`, which `save` alone would overwrite."""
    line = 'save mean of resid_post layer 1 at cue token to "data.safetensors"'
    assert not codes(tmp_path, line)
    assert codes(tmp_path, line.replace("mean of ", "")) == ["E0207"]


def test_means_and_directions_with_nan_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with a fruit whose embedding is NaN are errors; means of other rows are saved."""
    monkeypatch.chdir(tmp_path)
    text = "direction d = mean(pairs) at resid_post layer 1\n" + "".join(
        nan.experiment(name, line, prompts=block)
        for name, block, line in (
            ("a", "pairs", 'save mean of resid_post layer 1 at last token to "a.safetensors"'),
            ("b", "pairs", 'save direction d to "b.safetensors"\n  save direction d to "b.gguf"'),
            ("c", "others", 'save mean of resid_post layer 1 at last token to "c.safetensors"'),
        )
    )
    result, found = nan.run(text)
    assert result is not None
    errors = [each for each in found if each.severity == "error"]
    assert [each.code for each in errors] == ["E0641", "E0641", "E0641"]
    assert all("NaN or infinity" in each.message for each in errors)
    assert [each.path.name for each in result.saved] == ["c.safetensors"]
