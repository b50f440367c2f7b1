"""Videos in prompts, whose frames models read as consecutive images, against plain hooks on the
bare model with its processor: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from shutil import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.images.layouts import image_layout
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, as_in_the_data, run_on
from ..quick import some
from . import support, test_families
from .models import GRID, LAYERS
from .reference import at
from .support import RECORDS, experiment, succeeded
from .test_rules import ANY, Key, agree, difference

BLOCK = """
prompts ask {
  rows "data.jsonl"
  video clip = ["{file}", "{other}", "2.png"]
  template "{clip} how many {what} are there ? answer :"
  answer " {n}"
  wrong " {m}"
  corrupt changed { file = other }
}
"""
TEMPLATE = "<image><image><image> how many {what} are there ? answer :"
CELLS, FRAMES = GRID**2, 3
ROWS = range(len(RECORDS))


def run(text: str, mode: str = "planned", block: str = BLOCK) -> dict[str, ExperimentResult]:
    return succeeded(*support.try_file(text, "llava", mode, block))


@cache
def inputs(number: int, first: int) -> dict[str, Tensor]:
    """The prompt of a record, with this image as first frame."""
    folder = support.folder_of("llava")
    files = [folder / f"{image}.png" for image in (first, (number + 1) % 4, 2)]
    return support.bare("llava").inputs(TEMPLATE.format(**RECORDS[number]), files)


@cache
def states(number: int, first: int) -> list[Tensor]:
    return support.bare("llava").states(inputs(number, first))["blocks"]


def tokens(
    frame: int, rows: Sequence[int] = range(GRID), cols: Sequence[int] = range(GRID)
) -> list[int]:
    """The positions of a frame's cells, which follow `<s>`; all count from 0."""
    return [1 + frame * CELLS + row * GRID + col for row in rows for col in cols]


def changed(number: int, **edits: Any) -> float:
    """The difference of logits in a changed prompt under these edits."""
    given = inputs(number, (number + 1) % 4)
    logits = support.bare("llava").run(given, **edits)
    return difference("llava", logits, number)


@pytest.mark.parametrize("mode", ANY)
def test_patched_frame_equals_hooks(mode: str) -> None:
    line = "patch resid_post layer * at each frame of clip tokens"
    found = run(experiment("e", "from clean into changed", line), mode)["e"]
    expected: dict[Key, Sequence[float]] = {}
    for layer in range(LAYERS):
        for frame in range(FRAMES):
            own = tokens(frame)
            expected[layer, f"frame {frame + 1} of clip"] = [
                changed(n, blocks={layer: at(own, states(n, n)[layer][own])}) for n in ROWS
            ]
    agree(found, expected, ["layer", "position"])


@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
def test_ablated_cells_of_all_frames_equal_hooks(mode: str) -> None:
    line = "ablate resid_post layer 0 at each frame row 2 col 1..2 token with zero"
    found = run(experiment("e", "from clean into changed", line), mode)["e"]
    expected: dict[Key, Sequence[float]] = {}
    for frame in range(FRAMES):
        for col in range(2):
            edit = {0: at(tokens(frame, [1], [col]), torch.zeros(()))}
            label = f"frame {frame + 1} row 2 col {col + 1}"
            expected[(label,)] = [changed(n, blocks=edit) for n in ROWS]
    agree(found, expected, ["position"])


@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
def test_blocked_edges_between_frames_equal_hooks(mode: str) -> None:
    line = "block attention layers * from frame k + 1 tokens to frame k tokens"
    loop = f"for k in 1..2 {{ {line} }}"
    last = "for k in 1..3 { block attention layer 1 from last token to frame k tokens }"
    text = experiment("between", "from clean into changed", loop)
    found = run(text + experiment("last", "from clean into changed", last), mode)
    between: dict[Key, Sequence[float]] = {}
    for k in (1, 2):
        hidden, queries = dict.fromkeys(range(LAYERS), tokens(k - 1)), tokens(k)
        between[(k,)] = [changed(n, blocked=hidden, queries=queries) for n in ROWS]
    agree(found["between"], between, ["k"])
    from_last: dict[Key, Sequence[float]] = {
        (k,): [changed(n, blocked={1: tokens(k - 1)}) for n in ROWS] for k in (1, 2, 3)
    }
    agree(found["last"], from_last, ["k"])


def test_ablated_cells_of_the_next_frame_equal_hooks() -> None:
    line = "ablate resid_post layer 0 at frame k + 1 row 1..2 col 3 tokens with zero"
    found = run(experiment("e", "from clean into changed", f"for k in 1..2 {{ {line} }}"))["e"]
    zero = torch.zeros(())
    expected: dict[Key, Sequence[float]] = {
        (k,): [changed(n, blocks={0: at(tokens(k, [0, 1], [2]), zero)}) for n in ROWS]
        for k in (1, 2)
    }
    agree(found, expected, ["k"])


def test_tokens_of_videos_frames_and_cells_have_labels() -> None:
    lines = ("each token of clip", "each token of frame 2", "frame * row 1 col 3 token")
    text = "".join(
        experiment(f"e{n}", "from clean into changed", f"patch resid_post layer 0 at {line}")
        for n, line in enumerate(lines)
    )
    found = run(text)
    labels = [[cell.coords["position"] for cell in found[f"e{n}"].cells] for n in range(3)]
    frame = [f"row {row} col {col}" for row in (1, 2, 3) for col in (1, 2, 3)]
    assert labels[0] == [f"frame {k} {cell}" for k in (1, 2, 3) for cell in frame]
    assert labels[1] == [f"frame 2 {cell}" for cell in frame]
    assert labels[2] == [f"frame {k} row 1 col 3" for k in (1, 2, 3)]
    all_cells = {cell.coords["position"]: n for n, cell in enumerate(found["e0"].cells)}
    values = found["e0"].measures[0].patched
    for n, label in enumerate(labels[1]):
        np.testing.assert_allclose(
            found["e1"].measures[0].patched[n], values[all_cells[label]], atol=1e-5
        )


def test_video_from_a_folder_equals_a_list_of_frames() -> None:
    folder = support.folder_of("llava")
    for record in RECORDS:
        own = folder / f"clip-{record['file']}"
        own.mkdir(exist_ok=True)
        for number, file in enumerate((record["file"], record["other"], "2.png")):
            copy(folder / str(file), own / f"{number}.png")
    line = "ablate resid_post layer 0 at frame 2 tokens with zero"
    listed = run(experiment("e", line), block=BLOCK)["e"]
    by_folder = BLOCK.replace('["{file}", "{other}", "2.png"]', '"clip-{file}"')
    found = run(experiment("e", line), block=by_folder)["e"]
    np.testing.assert_allclose(found.measures[0].patched, listed.measures[0].patched, atol=1e-5)
    assert "3 frames, which the model reads as images in a row" in str(found.conventions)


def test_frames_of_two_videos_are_selected_by_their_video() -> None:
    block = BLOCK.replace("{clip} how", "{clip} and {late} how").replace(
        "  template", '  video late = ["1.png", "{file}"]\n  template'
    )
    lines = ("frame 2 of late tokens", "frame 5 tokens", "frame 2 row * col * of late tokens")
    text = "".join(
        experiment(f"e{n}", f"ablate resid_post layer 0 at {line} with zero")
        for n, line in enumerate(lines)
    )
    found = run(text, block=block)
    values = [found[f"e{n}"].measures[0].patched for n in range(3)]
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_array_equal(values[0], values[2])
    assert np.abs(np.array(values[0]) - found["e0"].measures[0].base[0]).max() > 0.1


def test_completions_with_an_ablated_frame_equal_hooks() -> None:
    rule = "ablate resid_post layer 0 at frame 1 tokens with zero"
    measure = 'measure contains("1") as raw\n  report texts'
    text = experiment("e", "generate 3", "from clean into changed", rule, measure=measure)
    found = run(text)["e"]
    bare, edit = support.bare("llava"), {0: at(tokens(0), torch.zeros(()))}
    assert found.replies is not None
    for n in ROWS:
        expected = bare.reply(inputs(n, (n + 1) % 4), 3, blocks=edit)
        [reply] = found.replies.cells[0][n]
        assert list(reply.ids) == expected


# --- families -------------------------------------------------------------------------------------

FAMILY_BLOCK = test_families.BLOCK.replace(
    'image photo = "{file}"', 'video photo = ["{file}", "2.png"]'
)
FAMILIES = ("llava_class", "vipllava", "llava_next", "idefics3")


@pytest.mark.parametrize("name", some(FAMILIES, FAMILIES[2:3]))
def test_ablated_frame_of_each_family_equals_hooks(name: str) -> None:
    rule = "ablate resid_post layer 0 at frame 2 tokens with zero"
    whole = f'mech 1\nmodel m = local("x")\n{FAMILY_BLOCK}\n{experiment("e", rule)}'
    source = Source(whole, test_families.folder() / "file.mech")
    result, problems = run_on(source, {"m": test_families.loaded(name)}, MODES["planned"])
    found = succeeded(result, problems)["e"]
    own, values = test_families.bare(name), list[float]()
    for n in ROWS:
        pictures = [
            Image.open(test_families.folder() / f"{image}.png").convert("RGB") for image in (n, 2)
        ]
        text = f"w3 w2 <image><image> w1 {test_families.WORDS[n]} w3"
        given = own.with_pictures(text, pictures)
        sizes = [(each.height, each.width) for each in pictures]
        _, second = image_layout(own.processor, own.model.config, given, sizes)
        edit = at([cell.position for cell in second.cells], torch.zeros(()))
        values.append(test_families.difference(own.run(given, blocks={0: edit})))
    measure = as_in_the_data(found).measures[0]
    np.testing.assert_allclose(measure.patched[0], values, atol=1e-4)
    assert np.abs(np.array(values) - measure.base[0]).max() > 0.1


# --- errors ---------------------------------------------------------------------------------------

RULE = "ablate resid_post layer 0 at {} with zero"


@pytest.mark.parametrize(
    ("position", "code", "told"),
    [
        ("frame row 1 col 1 token", "E0306", "each frame row … col … token"),
        ("frame 4 tokens", "E0309", "each prompt has 3 frames"),
        ("frame 4 row 1 col 1 token", "E0309", "each prompt has 3 frames"),
        ("frame 0 row 1 col 1 token", "E0309", "count from 1"),
        ("frame 3..2 row 1 col 1 token", "E0321", "3..2"),
        ("frame 1 row 4 col 1 token", "E0310", "3 rows and 3 columns"),
        ("clip tile 2 tokens", "E0310", "`clip` has 3 rows and 3 columns of tokens"),
        ("clip row 1 col 1 token", "E0308", "frame 1 row 1 col 1 token"),
        ("clip frame 2 row 1 col 2 token", "E0308", "first: `frame 2 row 1 col 2 of clip`"),
        ("clip frame 2 row 1 col 2 token", "E0308", "`clip` is a video"),
        ("clip frame 2 tokens", "E0308", "name the frame first: `frame 2 of clip`"),
        ("each token of clip frame 2", "E0308", "name the frame first: `frame 2 of clip`"),
        ("frames 1 tokens", "E0308", "frame"),
    ],
)
def test_invalid_position_reports_code_and_fix(position: str, code: str, told: str) -> None:
    text = experiment("e", RULE.format(position))
    _, problems = support.try_file(text, "llava", block=BLOCK)
    assert [each.code for each in problems if each.severity == "error"] == [code]
    assert told in support.render_full(problems, color=False, width=100)


def test_frame_of_an_image_reports_that_images_have_none() -> None:
    block = BLOCK.replace('video clip = ["{file}", "{other}", "2.png"]', 'image clip = "{file}"')
    text = experiment("e", RULE.format("clip frame 2 tokens"))
    _, problems = support.try_file(text, "llava", block=block)
    assert [each.code for each in problems if each.severity == "error"] == ["E0308"]
    shown = support.render_full(problems, color=False, width=100)
    assert "`clip` is an image, which has no frames" in shown
    assert "`clip tokens`" in shown


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ('video clip = ["{file}"]', "E0207", "two frames or more"),
        ("video clip = gray", "E0207", "isn't a list of frames"),
        ('video clip = ["{file}", blob]', "E0203", "blob"),
        ('video clip = "clip-none"', "E0560", "the folder has 0 files"),
        ('frame = 3\n  video clip = ["{file}", "{other}"]', "E0202", "frame"),
        ('video clip = ["{file}", "{other}"]\n  region part of clip = n', "E0207", "region"),
    ],
)
def test_invalid_video_reports_code_and_fix(line: str, code: str, told: str) -> None:
    block = BLOCK.replace('video clip = ["{file}", "{other}", "2.png"]', line)
    text = experiment("e", RULE.format("last token"))
    _, problems = support.try_file(text, "llava", block=block)
    assert code in [each.code for each in problems if each.severity == "error"]
    assert told in support.render_full(problems, color=False, width=100)


@pytest.mark.parametrize("name", ["video_llava", "llava_onevision"])
def test_model_with_a_video_processor_is_rejected(name: str) -> None:
    text = experiment("e", RULE.format("last token"))
    source = Source(
        f'mech 1\nmodel m = local("x")\n{FAMILY_BLOCK}\n{text}',
        test_families.folder() / "file.mech",
    )
    _, problems = run_on(source, {"m": test_families.loaded(name)}, MODES["planned"])
    [found] = [each for each in problems if each.severity == "error"]
    assert found.code == "E0459"
    assert "write an `image` line for each frame" in support.render_full(
        [found], color=False, width=100
    )
