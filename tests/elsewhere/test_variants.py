"""Several sources, bases and models in one experiment: axes, base and source values, exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.pipeline.options import RunOptions

from ..execute.support import DIFFERENCE, MODES, PROMPTS, ROWS, experiment, prompts
from ..quick import in_turn
from ..reference.points import Point
from .support import OTHERS, by_prompt, layers, models, q, run, same

FAMILIES = ("gpt2", "llama", "gpt_neox")


def sources_of(name: str) -> list:
    return [q(record) for record in ROWS] if name == "q" else prompts(name)


@pytest.mark.parametrize(("family", "mode"), in_turn(FAMILIES, ["planned", "plain"]))
def test_each_combination_of_source_and_base_equals_reference(
    folder: Path, family: str, mode: str
) -> None:
    """Each cell is compared with its own base and source."""
    text = experiment(
        "e", "prompts p", "from clean, q, other into turned, longer",
        "patch resid_post layer * at last token", DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models(family), MODES[mode])["e"]
    assert found.axes == ("source", "base", "layer")
    combinations = [(s, b) for s in ("clean", "q", "other") for b in ("turned", "longer")]
    labels = [(c.coords["source"], c.coords["base"]) for c in found.cells]
    assert labels == [pair for pair in combinations for _ in range(3)]
    for number, (source, base) in enumerate(combinations):
        sources, bases = sources_of(source), prompts(base)
        where = [((s.last,), (b.last,)) for s, b in zip(sources, bases, strict=True)]
        expected = by_prompt(family, layers("resid_post"), sources, bases, where)
        same(found.measures[0], expected, slice(3 * number, 3 * number + 3))
    assert set(found.runs) == {"clean", "q", "other", "turned", "longer"}
    assert len(found.measures[0].inert) == 18


def test_rule_with_an_explicit_run_does_not_depend_on_the_source(folder: Path) -> None:
    text = experiment(
        "e", "prompts p", "from other, longer into clean",
        "patch mlp_out layer 0 at cue token with blank", DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models("gpt2"))["e"]
    assert len(found.cells) == 2
    np.testing.assert_array_equal(found.measures[0].patched[0], found.measures[0].patched[1])
    assert abs(found.measures[0].source[0] - found.measures[0].source[1]).max() > 0.01


def test_each_combination_of_model_and_source_equals_reference(folder: Path) -> None:
    text = experiment(
        "e", "prompts p", "from other, q into clean", "patch z layer 2 head 0..1 at last token",
        DIFFERENCE, "measure prob(answer) as raw",
    ).replace("model m", "model m, tuned")  # fmt: skip
    found = run(text, folder, models("llama", "m", "tuned"))["e"]
    assert found.axes == ("model", "source", "head")
    cells = [[Point("z", 2, head)] for head in range(2)]
    number = 0
    for name in ("m", "tuned"):
        for source in ("other", "q"):
            sources, bases = sources_of(source), prompts()
            where = [((s.last,), (b.last,)) for s, b in zip(sources, bases, strict=True)]
            expected = by_prompt("llama", cells, sources, bases, where, read=name, model=name)
            same(found.measures[0], expected, slice(number, number + 2))
            number += 2
    assert found.conventions["model"] == "LlamaForCausalLM, passed from Python"


def test_export_of_several_sources_is_one_file(folder: Path) -> None:
    text = experiment(
        "e", "prompts p", "from clean, other into longer", "patch z layer 1 head * at last token",
        DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models("gpt2"), RunOptions(out=folder / "out"))["e"]
    path = folder / "out" / "file" / "e.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0]["axes"] == ["source", "head"]
    runs = [line for line in lines if "run" in line]
    assert [line["run"] for line in runs] == ["longer", "clean", "other"]
    cells = [line for line in lines if "cell" in line]
    assert {line["cell"] for line in cells} == set(range(8))
    for line in cells:
        assert line["coords"] == dict(found.cells[line["cell"]].coords)
        for row, value in zip(line["rows"], line["values"][0], strict=True):
            assert abs(found.measures[0].patched[line["cell"], row] - value) < 1e-12


def test_sweep_has_cells_only_for_occurrences_of_each_base(folder: Path) -> None:
    """A base with one occurrence has a single cell."""
    blocks = PROMPTS + OTHERS + 'prompts short {\n  item = "w9"\n  template "w8 {item} w7"\n}\n'
    text = experiment(
        "e", "prompts p", "from clean into other, short",
        "patch resid_post layer 1 at each item token", DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models("gpt2"), prompts=blocks)["e"]
    assert found.axes == ("base", "position")
    assert [c.coords["position"] for c in found.cells if c.coords["base"] == "short"] == ["item 1"]
    assert len(found.cells) == 6


def checked(text: str, folder: Path):
    whole = f'mech 1\nmodel m = zoo("counting")\n{PROMPTS}{OTHERS}{text}'
    return check_source(Source(whole, folder / "file.mech"))


def test_loop_variable_named_like_an_axis_is_rejected(folder: Path) -> None:
    text = experiment(
        "e", "prompts p", "from clean, other into longer", "for source in 0..1 {",
        "patch z layer source head 0 at last token", "}", DIFFERENCE,
    )  # fmt: skip
    found = [d for d in checked(text, folder).diagnostics if d.code == "E0202"]
    assert len(found) == 1
