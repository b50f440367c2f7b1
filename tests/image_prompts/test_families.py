"""Families of vision-language models, with tiles and marks between the tokens of their images,
against plain hooks on the bare model with its own processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mechdsl.base.source import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.images.layouts import ImageTokens, image_layout
from mechdsl.loading.loader import adopt_model
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, run_on
from ..families import build
from ..images import prompts_of_images as vlm
from ..shared_models import unchanged
from .reference import Bare, at
from .support import RECORDS, experiment, succeeded, write_data

NAMES = (
    "llava_class",
    "vipllava",
    "video_llava",
    "llava_next",
    "llava_onevision",
    "idefics2",
    "idefics3",
    "smolvlm",
    "internvl",
)
WORDS = ("w1", "w2 w1", "w3 w1 w2", "w2")
BLOCK = """
prompts ask {
  rows "data.jsonl"
  image photo = "{file}"
  words = if n = 1 then "w1" else if n = 2 then "w2 w1" else if n = 3 then "w3 w1 w2" else "w2"
  template "w3 w2 {photo} w1 {words} w3"
  answer " w1"
  wrong " w2"
  corrupt changed { file = other }
}
"""


@cache
def folder() -> Path:
    made = Path(mkdtemp(prefix="mechdsl-families-"))
    write_data(made)
    return made


@cache
def bare(name: str) -> Bare:
    model = build.model(vlm.architecture(name), **vlm.FAMILIES[name].overrides)
    torch.manual_seed(0)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(3 if "embed" in path else 2)
    return Bare(model, vlm.processor(name))


@cache
def loaded(name: str) -> LoadedModel:
    model, found = adopt_model("m", bare(name).model, bare(name).processor)
    assert model is not None, found
    return unchanged(model)


@cache
def inputs(name: str, number: int, image: int) -> dict[str, Tensor]:
    picture = Image.open(folder() / f"{image}.png").convert("RGB")
    return bare(name).with_pictures(f"w3 w2 <image> w1 {WORDS[number]} w3", [picture])


@cache
def layout_of(name: str, number: int, image: int) -> ImageTokens:
    size = Image.open(folder() / f"{image}.png").size[::-1]
    own = bare(name)
    [found] = image_layout(own.processor, own.model.config, inputs(name, number, image), [size])
    return found


def cells(name: str, number: int, image: int) -> dict[tuple[int, int], int]:
    """Row and column → position in the prompt, without the thumbnail of tiles."""
    found = layout_of(name, number, image)
    tiles = [cell for cell in found.cells if cell.tile != 0] or found.cells
    return {(cell.row, cell.col): cell.position for cell in tiles}


def every_cell(name: str, number: int, image: int) -> list[int]:
    return [cell.position for cell in layout_of(name, number, image).cells]


def tile_cells(name: str, number: int, image: int, tile: int) -> list[list[int]]:
    """Positions of a tile's cells, row by row."""
    own = [cell for cell in layout_of(name, number, image).cells if cell.tile == tile]
    rows = sorted({cell.row for cell in own})
    return [[cell.position for cell in own if cell.row == row] for row in rows]


def difference(logits: Tensor) -> float:
    return float(logits[-1, vlm.WORDS["w1"]] - logits[-1, vlm.WORDS["w2"]])


@cache
def blocks(name: str, number: int, image: int) -> list[Tensor]:
    return bare(name).states(inputs(name, number, image))["blocks"]


Run = Callable[[str, int], Tensor]
ALL = range(len(RECORDS))


def one_cell(name: str, n: int) -> Tensor:
    other = (n + 1) % 4
    value = blocks(name, n, n)[0][cells(name, n, n)[1, 2]]
    edit = at([cells(name, n, other)[1, 2]], value)
    return bare(name).run(inputs(name, n, other), blocks={0: edit})


def all_cells(name: str, n: int) -> Tensor:
    other = (n + 1) % 4
    edit = at(every_cell(name, n, other), torch.zeros(()))
    return bare(name).run(inputs(name, n, other), blocks={0: edit})


def last_token(name: str, n: int) -> Tensor:
    edit = at([-1], blocks(name, n, n)[1][-1])
    return bare(name).run(inputs(name, n, (n + 1) % 4), blocks={1: edit})


CASES: dict[str, tuple[str, Run]] = {
    "one cell": ("patch resid_post layer 0 at photo row 1 col 2 token", one_cell),
    "all cells": ("ablate resid_post layer 0 at photo tokens with zero", all_cells),
    "last token": ("patch resid_post layer 1 at last token", last_token),
}


def values(run: Run, name: str) -> Sequence[float]:
    return [difference(run(name, n)) for n in ALL]


def run_text(name: str, text: str, mode: str = "planned") -> list[ExperimentResult]:
    """The results of a file on `BLOCK`, rows in the order of the data."""
    source = Source(f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{text}', folder() / "f.mech")
    return list(succeeded(*run_on(source, {"m": loaded(name)}, MODES[mode])).values())


@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize("name", NAMES)
def test_rules_are_what_hooks_give(name: str, mode: str) -> None:
    """All rules in one file, each with an effect of more than 0.1."""
    due = {key: case for key, case in CASES.items() if key != "one cell" or name != "idefics2"}
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule)
        for n, (rule, _) in enumerate(due.values())
    )
    experiments = run_text(name, text, mode)
    base = [difference(bare(name).run(inputs(name, n, (n + 1) % 4))) for n in ALL]
    largest = 0.0
    for found, (_, run) in zip(experiments, due.values(), strict=True):
        measure, expected = found.measures[0], values(run, name)
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched[0], expected, atol=1e-4)
        largest = max(largest, float(np.abs(np.array(expected) - base).max()))
    assert largest > 0.1


EVERY = slice(None)
VIEWS: dict[str, list[tuple[int, slice, slice]]] = {
    "photo tile 1 tokens": [(1, EVERY, EVERY)],
    "photo tile 2 row 2 col 1 token": [(2, slice(1, 2), slice(1))],
    "photo tile 1..2 row 1 col * tokens": [(1, slice(1), EVERY), (2, slice(1), EVERY)],
    "photo thumbnail row 1..2 col 2 tokens": [(0, EVERY, slice(1, 2))],
    "each token of photo thumbnail": [
        (0, slice(row, row + 1), slice(col, col + 1)) for row in range(2) for col in range(2)
    ],
    "photo tile t tokens": [(t, EVERY, EVERY) for t in range(1, 5)],
}
"""Position → tile, rows and columns; several are cells, or joined after `tokens`."""


def without(name: str, n: int, where: list[tuple[int, slice, slice]]) -> float:
    """The difference with zeros at parts of tiles; NaN if the image lacks one."""
    parts = [(tile_cells(name, n, n, tile), rows, cols) for tile, rows, cols in where]
    tokens = [t for grid, rows, cols in parts for row in grid[rows] for t in row[cols]]
    if not all(grid for grid, _, _ in parts):
        return float("nan")
    edit = at(tokens, torch.zeros(()))
    return difference(bare(name).run(inputs(name, n, n), blocks={0: edit}))


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "internvl"])
def test_tiles_and_thumbnails(name: str) -> None:
    """Positions in tiles; a `for` over tiles leaves out images with fewer of them."""
    rules = {at: f"ablate resid_post layer 0 at {at} with zero" for at in VIEWS}
    rules["photo tile t tokens"] = "for t in 1..4 { " + rules["photo tile t tokens"] + " }"
    text = "".join(experiment(f"e{n}", rule) for n, rule in enumerate(rules.values()))
    experiments = run_text(name, text)
    for found, (position, views) in zip(experiments, VIEWS.items(), strict=True):
        apart = "for" in rules[position] or position.startswith("each")
        cells = [[view] for view in views] if apart else [views]
        expected = [[without(name, n, cell) for n in ALL] for cell in cells]
        measure = found.measures[0]
        np.testing.assert_allclose(measure.patched, expected, atol=1e-4, err_msg=position)
        assert np.nanmax(np.abs(np.array(expected) - measure.base[0])) > 0.1
    labels = [cell.coords["position"] for cell in experiments[4].cells]
    assert labels == [f"photo thumbnail row {row} col {col}" for row in (1, 2) for col in (1, 2)]


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("paligemma", "E0459", "changes the text around images"),
        ("gemma3", "E0458", "by more than the vectors"),
        ("qwen2_vl", "E0458", "by more than the vectors"),
        ("qwen3_vl", "E0458", "by more than the vectors"),
    ],
)
def test_other_families_are_errors(name: str, code: str, said: str) -> None:
    errors = refused(name)
    assert errors[0].code == code
    assert said in " ".join(render_full(errors, color=False, width=1000).split())


def refused(name: str) -> list[Diagnostic]:
    """Return the errors of a file with an image for a model that doesn't take one."""
    file = """mech 1

model vlm = local("downloaded")

prompts ask {
  x in ["w1", "w2", "w3"]
  image photo = gray(100)
  template "{photo} w1 {x}"
  answer " w1"
}

experiment e {
  model vlm
  prompts ask
  ablate resid_post layer 0 at photo tokens with zero
  measure logit(answer) as delta
}
"""
    source = Source(file, Path("experiment.mech"))
    result, diagnostics = run_on(source, {"vlm": loaded(name)}, MODES["planned"])
    assert result is None or not result.experiments
    return [found for found in diagnostics if found.severity == "error"]
