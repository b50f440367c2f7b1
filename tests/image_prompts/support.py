"""Files of prompts with images, and comparisons of rules with reference values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from PIL import Image

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..execute.support import MODES, as_in_the_data, run_on
from ..shared_models import unchanged
from .models import MODELS
from .reference import Bare

SIZES = ((24, 24), (36, 30), (17, 40), (52, 28))
"""(height, width) of the images."""
RECORDS = [
    {"file": f"{n}.png", "other": f"{(n + 1) % 4}.png", "what": what, "n": n + 1, "m": 9 - n}
    for n, what in enumerate(("dots", "red dots", "circle", "green and blue square"))
]
"""Prompts of different lengths."""


def write_data(folder: Path) -> None:
    """Write the images and the records that name them."""
    for number, (height, width) in enumerate(SIZES):
        small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        grown = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        grown.save(folder / f"{number}.png")
    text = "\n".join(map(json.dumps, RECORDS)) + "\n"
    (folder / "data.jsonl").write_text(text, encoding="utf-8")


BLOCK = """
prompts ask {
  rows "data.jsonl"
  image photo = "{file}"
  template "{photo} how many {what} are there ? answer :"
  answer " {n}"
  wrong " {m}"
  corrupt changed { file = other }
}
"""
TEMPLATE = "<image> how many {what} are there ? answer :"
MEASURE = "measure logit(answer) - logit(wrong) as delta"
STATS = "stats bootstrap(100) confidence 95% correct none"


def experiment(name: str, *lines: str, measure: str = MEASURE) -> str:
    every = ("model m", "prompts ask", *lines, measure, STATS)
    return f"experiment {name} {{\n" + "\n".join(f"  {line}" for line in every if line) + "\n}\n"


@cache
def folder_of(name: str) -> Path:
    """A folder with the model and the images."""
    folder = Path(mkdtemp(prefix=f"mechdsl-{name}-"))
    write_data(folder)
    return MODELS[name](folder)


@cache
def bare(name: str) -> Bare:
    return Bare.of_folder(folder_of(name))


@cache
def loaded(name: str) -> LoadedModel:
    own = Bare.of_folder(folder_of(name))
    model, found = adopt_model("m", own.model, own.processor)
    assert model is not None, found
    return unchanged(model)


def try_file(
    text: str, name: str, mode: str = "planned", block: str = BLOCK
) -> tuple[FileResult | None, list[Diagnostic]]:
    whole = f'mech 1\nmodel m = local("handed over")\n{block}\n{text}'
    source = Source(whole, folder_of(name) / "file.mech")
    return run_on(source, {"m": loaded(name)}, MODES[mode])


def run_with(text: str, name: str, model: LoadedModel) -> dict[str, ExperimentResult]:
    """The results of a file with another model for its data."""
    source = Source(
        f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{text}', folder_of(name) / "file.mech"
    )
    return succeeded(*run_on(source, {"m": model}))


def run_file(
    text: str, name: str, mode: str = "planned", block: str = BLOCK
) -> dict[str, ExperimentResult]:
    """Experiment → result, rows in the order of the data."""
    return succeeded(*try_file(text, name, mode, block))


def succeeded(
    result: FileResult | None, diagnostics: list[Diagnostic]
) -> dict[str, ExperimentResult]:
    """Experiment → result, rows in the order of the data; an error fails the test."""
    errors = [found for found in diagnostics if found.severity == "error"]
    assert result is not None, render_full(errors, color=False, width=100)
    return {found.name: as_in_the_data(found) for found in result.experiments}


def check_rules(
    found: Sequence[ExperimentResult],
    rules: Sequence[str],
    base: Sequence[float],
    expected: Sequence[Sequence[float]],
) -> None:
    """Compare rules with a reference, whose effects have to exceed 0.1.

    Args:
        found: One experiment for each rule.
        base: [row] the measure without the rules.
        expected: [cell of all rules, row] the measure with them.
    """
    patched = np.concatenate([each.measures[0].patched for each in found])
    np.testing.assert_allclose(found[0].measures[0].base[0], base, atol=1e-4)
    np.testing.assert_allclose(patched, expected, atol=2e-4)
    first = 0
    for each, rule in zip(found, rules, strict=True):
        own = np.array(expected[first : first + len(each.cells)]) - base
        first += len(each.cells)
        assert np.abs(own).max() > 0.1, rule


def check_cells(
    found: ExperimentResult,
    axes: Sequence[str],
    cells: Mapping[tuple[Any, ...], Sequence[float]],
    base: Sequence[float],
    rule: str,
) -> float:
    """Compare the cells of an experiment with values of a reference.

    Args:
        axes: Those of the keys of `cells`.
        cells: Expected values by coordinates.
        base: Expected values of the base run.
        rule: The rule, for messages.

    Returns:
        The largest effect.
    """
    measure = found.measures[0]
    np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
    keys = {tuple(cell.coords[axis] for axis in axes): n for n, cell in enumerate(found.cells)}
    assert keys.keys() == cells.keys()
    for key, values in cells.items():
        where = f"{rule}: {key}"
        np.testing.assert_allclose(measure.patched[keys[key]], values, atol=1e-4, err_msg=where)
    return max(np.abs(np.array(values) - base).max() for values in cells.values())
