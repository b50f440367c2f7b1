"""`report overlay` on prompts with images: pictures with values at their cells, then the text."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.overlay import render
from mechdsl.show.reports.overlay_pages import Overlay, build_overlays, write_overlay

from ..results.synthetic import report
from .models import GRID
from .support import RECORDS, SIZES, experiment, folder_of, run_file

INTO = "from clean into changed"
IMAGES = "patch resid_post layer 0..1 at each token of photo"
BOTH = "patch resid_post layer 0 at token * align right"
TWO = """
prompts ask {
  rows "data.jsonl"
  image photo = "{file}"
  image second = "{other}"
  template "{photo} and {second} how many {what} ? answer :"
  answer " {n}"
  wrong " {m}"
  corrupt changed { file = other }
}
"""


def run(*lines: str, **more: str) -> ExperimentResult:
    return run_file(experiment("e", INTO, *lines, "report overlay top 3"), "llava", **more)["e"]


def overlay(result: ExperimentResult) -> Overlay:
    return build_overlays(result, report("overlay", top=3))[0]


def test_overlay_has_each_value_at_its_image_cell() -> None:
    result = run(IMAGES)
    shown = overlay(result)
    assert len(shown.images()) == 3
    assert not shown.texts()
    data = result.measures[0]
    effects = (data.patched - data.base).reshape(2, GRID**2, -1)  # layer, position, prompt
    for prompt, maps in enumerate(shown.images()):
        assert [values.shape for _, values in maps.maps] == [(GRID, GRID)] * 2
        assert [title for title, _ in maps.maps] == ["layer 1", "layer 0"]
        for layer, (_, values) in zip((1, 0), maps.maps, strict=True):
            np.testing.assert_allclose(values.ravel(), effects[layer, :, prompt], atol=1e-6)


def test_overlay_shows_images_of_the_base_run() -> None:
    sizes = {f"photo: {record['other']}": SIZES[(n + 1) % 4] for n, record in enumerate(RECORDS)}
    for each in overlay(run(IMAGES)).images():
        _, title = each.title.split(", ", 1)
        assert each.pixels.shape[:2] == sizes[title]


def test_overlay_shows_text_after_images_if_cells_select_it() -> None:
    shown = overlay(run(BOTH))
    assert len(shown.images()) == len(shown.texts()) == 3
    for each in shown.texts():
        assert not any("image" in token for token in each.tokens)
        assert each.tokens[-1] == ":"


def test_overlay_shows_each_image_of_a_prompt() -> None:
    shown = overlay(run("patch resid_post layer 0 at each token of second", block=TWO))
    first, second = shown.images()[:2]
    assert np.isnan(first.maps[0][1]).all()
    assert np.isfinite(second.maps[0][1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("line", [IMAGES, BOTH])
def test_overlay_of_image_prompts_is_written_in_each_format(line: str, tmp_path: Path) -> None:
    result = run(line)
    text = StringIO()
    render(result, report("overlay", top=3), Console(file=text, width=100))
    assert "⟦" not in text.getvalue()
    assert "photo" in text.getvalue()
    for ending in ("svg", "png", "html"):
        write_overlay(result, report("overlay", top=3), tmp_path / f"map.{ending}")
        assert (tmp_path / f"map.{ending}").stat().st_size > 1000
    assert "⟦" not in (tmp_path / "map.svg").read_text()
    chart = result.plot("overlay", top=3).to_dict()
    assert chart["$schema"]
    assert folder_of("llava").exists()


def test_overlay_titles_number_the_frames_of_a_video() -> None:
    block = TWO.replace('image photo = "{file}"', 'video clip = ["{file}", "{other}"]').replace(
        '  image second = "{other}"\n', ""
    )
    block = block.replace("{photo} and {second}", "{clip}")
    shown = overlay(run("patch resid_post layer 0 at each frame tokens", block=block))
    titles = [each.title.split(": ")[0] for each in shown.images()[:2]]
    assert titles == ["prompt 1, frame 1", "prompt 1, frame 2"]
