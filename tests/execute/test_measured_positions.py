"""Measures at several positions: one more axis, each position against a plain forward pass."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult

from ..quick import in_turn
from ..reference.forward import Run, Write
from ..rules.support import (
    MANY,
    QUICK,
    Array,
    Text,
    agree,
    codes,
    edited,
    experiment,
    plain,
    rows,
    run_file,
    write_data,
)

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2")
LAYERS = range(3)
COUNT = len(rows())
ITEMS = max(len(text.spans["items"]) for text in rows())
LONGEST = max(text.last for text in rows()) + 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def nats(run: Run, at: int) -> float:
    probabilities = run.logits[at].softmax(-1)
    return float(-(probabilities * probabilities.log()).sum())


def own_loss(run: Run, text: Text, at: int) -> float:
    return float(-run.logits[at - 1].log_softmax(-1)[text.ids[at]])


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one, other) / (one.norm() * other.norm()))


@cache
def patched(name: str, n: int, layer: int) -> Run:
    """The run `other` with the clean vector of a layer at the subject's last token."""
    source, base = rows()[n], rows("other")[n]
    vector = plain(name, source)["resid_post", layer][source.spans["subject"][-1], 0]
    write = Write("resid_post", layer, vector, base.spans["subject"][-1], 0)
    return edited(name, base, [write])


def values(found: ExperimentResult) -> Array:
    return found.measures[0].patched


@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, QUICK))
def test_measure_at_each_item_equals_the_reference(folder: Path, name: str, mode: str) -> None:
    """Rows with fewer items aren't part of the positions that they lack."""
    text = experiment(
        "e",
        "from clean into other",
        "patch resid_post layer * at subject token",
        measure="measure entropy at each item token as delta",
    )
    found = run_file(text, folder, name, mode)["e"]
    expected: dict[tuple[str, int], list[float]] = {}
    base: list[list[float]] = []
    for item in range(ITEMS):
        for layer in LAYERS:
            cells, start = [], []
            for n, row in enumerate(rows("other")):
                at = row.spans["items"][item] if item < len(row.spans["items"]) else None
                cells.append(np.nan if at is None else nats(patched(name, n, layer), at))
                start.append(np.nan if at is None else nats(plain(name, row), at))
            expected[f"item {item + 1}", layer] = cells
            base.append(start)
    # Items precede the subject, so that a write at the subject can't change them.
    assert np.nanmax(np.abs(np.array(list(expected.values())) - np.array(base))) < 1e-12
    assert found.axes == ("measured", "layer")
    assert [(c.coords["measured"], c.coords["layer"]) for c in found.cells] == list(expected)
    np.testing.assert_allclose(values(found), list(expected.values()), atol=1e-4)
    assert found.measures[0].inert.all()


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_at_each_token_equals_the_reference(folder: Path, name: str, mode: str) -> None:
    """The loss of a token is read at the preceding token, for the text of the run."""
    text = experiment(
        "e",
        "from clean into other",
        "patch resid_post layer * at subject token",
        measure="measure loss at token * align right as delta",
    )
    found = run_file(text, folder, name, mode)["e"]
    expected: dict[tuple[str, int], list[float]] = {}
    base: dict[tuple[str, int], list[float]] = {}
    for back in range(LONGEST, 0, -1):
        for layer in LAYERS:
            own, start = [], []
            for n, row in enumerate(rows("other")):
                at = row.last + 1 - back
                there = at > 0  # the first token is predicted from nothing
                own.append(own_loss(patched(name, n, layer), row, at) if there else np.nan)
                start.append(own_loss(plain(name, row), row, at) if there else np.nan)
            if not np.isnan(own).all():
                expected[str(-back), layer], base[str(-back), layer] = own, start
    agree(found, ("measured", "layer"), expected, np.array(list(base.values())), most=False)


@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, QUICK))
def test_cosine_sweep_of_layers_equals_the_reference(folder: Path, name: str, mode: str) -> None:
    """The metric sweeps layers and the rule doesn't; the compared run is read at the position in
    its own text."""
    text = experiment(
        "e",
        "from clean into other",
        "patch resid_post layer 0 at subject token",
        measure="measure cosine(resid_post layer *, longer) at cue token as raw",
    )
    found = run_file(text, folder, name, mode)["e"]
    expected: dict[tuple[int], list[float]] = {}
    for layer in LAYERS:
        own = []
        for n, (row, longer) in enumerate(zip(rows("other"), rows("longer"), strict=True)):
            here = patched(name, n, 0)["resid_post", layer][row.spans["cue"][0], 0]
            there = plain(name, longer)["resid_post", layer][longer.spans["cue"][0], 0]
            own.append(cosine(here, there))
        expected[(layer,)] = own
    agree(found, ("layer",), expected, None, most=False)


@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, QUICK))
def test_loop_variable_in_a_measure_equals_the_reference(
    folder: Path, name: str, mode: str
) -> None:
    """The rule and the measure share one axis."""
    text = experiment(
        "e",
        "from clean into other",
        "for l in 0..1 {",
        "  patch resid_post layer l at subject token",
        "}",
        measure="measure cosine(resid_post layer l + 1, clean) at token * align right as raw",
    )
    found = run_file(text, folder, name, mode)["e"]
    expected: dict[tuple[int, str], list[float]] = {}
    for layer in (0, 1):
        for back in range(LONGEST, 0, -1):
            own = []
            for n, (row, clean) in enumerate(zip(rows("other"), rows(), strict=True)):
                at = row.last + 1 - back
                if at < 0:
                    own.append(np.nan)
                    continue
                here = patched(name, n, layer)["resid_post", layer + 1][at, 0]
                own.append(cosine(here, plain(name, clean)["resid_post", layer + 1][at, 0]))
            expected[layer, str(-back)] = own
    agree(found, ("l", "measured"), expected, None, most=False)


@pytest.mark.parametrize("mode", QUICK)
def test_measures_at_items_without_rules_equal_the_reference(folder: Path, mode: str) -> None:
    """Two measures of the unpatched run at the same positions."""
    text = experiment(
        "e",
        'measure entropy at each item token as raw measure prob(" {a}") at each item token as raw',
        measure="",
    )
    found = run_file(text, folder, "llama", mode)["e"]
    assert found.axes == ("measured",)
    for item, cell in enumerate(found.cells):
        assert cell.coords["measured"] == f"item {item + 1}"
        for n, row in enumerate(rows()):
            if item < len(row.spans["items"]):
                expected = nats(plain("llama", row), row.spans["items"][item])
                assert abs(found.measures[0].patched[item, n] - expected) < 1e-4
            else:
                assert np.isnan(found.measures[0].patched[item, n])


@pytest.mark.parametrize(
    ("measure", "code"),
    [
        ("measure entropy at each item token as raw measure entropy as raw", "E0612"),
        ("measure loss + entropy at each item token as raw", "E0612"),
        ("measure cosine(resid_post layer *, clean) as raw", "E0320"),
        ("measure cosine(resid_post layers *, clean) as raw", "E0304"),
        ("measure entropy at subject tokens as raw", "E0612"),
    ],
)
def test_invalid_measures_at_several_positions_are_errors(
    folder: Path, measure: str, code: str
) -> None:
    lines = ("from clean into other", "patch resid_post layer * at subject token")
    assert codes(experiment("e", *lines, measure=measure), folder) == [code]
