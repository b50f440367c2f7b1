"""Figures name the measures that could not be computed, in every format."""

from __future__ import annotations

from pathlib import Path

import pytest

import mechdsl

from ..fruit import FRUIT

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

FIGURES = ["heatmap", "lines", "bars", "confusion", "overlay"]
FILES = [  # few charts, as they take seconds to render
    'report lines layer by head to "lines.svg"',
    'report overlay to "overlay.svg"',
    'report overlay to "page.html"',
    'report table to "table.svg"',
]
LINES = [
    "from clean into fewer",
    "patch layer 0..1 head 0..1 at each item token",
    "measure logit(answer) - logit(answer) as recovery",
    "measure argmax(1..9) as raw",
    "measure logit(answer) as delta",
    *FILES,
]
SAID = "not computed: recovery of logit(answer) - logit(answer) (E0604)"


def run(folder: Path, lines: list[str]) -> mechdsl.Results:
    inside = "".join(f"  {line}\n" for line in lines)
    path = folder / "a.mech"
    path.write_text(FRUIT + f"\nexperiment e {{\n  prompts fruit limit 4\n{inside}}}\n", "utf-8")
    found = mechdsl.run(path)
    assert [each.code for each in found.diagnostics.errors] == ["E0604"]
    assert len(found.written) == len(FILES)
    return found


@pytest.mark.slow
def test_figures_name_lost_measures(tmp_path: Path) -> None:
    found = run(tmp_path, LINES)
    for path in found.written:
        text = path.read_text(encoding="utf-8")
        assert (SAID if path.stem != "table" else "E0604") in text, path
    for kind in FIGURES:
        assert SAID in found["e"].plot(kind).to_dict()["vconcat"][0]["title"]["subtitle"], kind
    assert "nothing to draw" not in (tmp_path / "lines.svg").read_text(encoding="utf-8")


def test_figure_without_drawable_measures_states_it(tmp_path: Path) -> None:
    """Only a category was computed, but the figures need numbers."""
    found = run(tmp_path, [line for line in LINES if line != "measure logit(answer) as delta"])
    for name in ("lines.svg", "overlay.svg", "page.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "e: nothing to draw" in text, name
        assert SAID in text, name
    assert SAID in str(found["e"].plot("overlay").to_dict())
