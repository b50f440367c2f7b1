"""Videos in prompts that the model's video processor reads, against plain hooks on the bare model
with the same processor: one unpadded prompt at a time, with manually computed positions.

Without torchvision, a stand-in prepares the frames with the image processor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from transformers.utils.import_utils import is_torchvision_available

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.images.layouts import IMAGE_LAYOUTS
from mechdsl.images.processing import PROCESSOR_FILE
from mechdsl.loading.loader import adopt_model
from mechdsl.prompts.tokens import image_prompts
from mechdsl.prompts.tokens.image_prompts import (
    ImagePromptTokenizer,
    check_processor,
    read_prompt_tokenizer,
)
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..execute.support import MODES, check_file, run_on
from ..images import prompts_of_images as vlm
from ..quick import some
from ..shared_models import unchanged
from . import test_families as families
from .reference import Bare, at
from .support import experiment, succeeded
from .test_shared_beginnings import counted_images

WORDS = ("w1", "w2 w1", "w3 w1 w2", "w2")
SIZES = ((8, 16), (16, 8))
"""(height, width) of the frames of even and odd prompts."""
PICTURES = 5
BLOCK = """
prompts ask {
  rows "data.jsonl"
  video clip = ["{size}-{a}.png", "{size}-{a}.png", "{size}-4.png", "{size}-{a}.png"]
  template "w3 w2 {clip} w1 {words} w3"
  answer " w1"
  wrong " w2"
  corrupt changed { a = b }
}
"""
FIRST = 3
"""The position of the first token of a video, after `<s> w3 w2`."""
ALL = range(len(WORDS))


@dataclass(frozen=True)
class Layout:
    """Where the tokens of frames are, by their family."""

    start: int
    """Tokens before the first cell of each frame."""
    end: int
    """Tokens after the last cell of each frame."""
    opening: int = 0
    """Tokens before the first frame."""
    merged: int = 1
    """Number of frames that the processor merges."""
    cell: int = 4
    """Side of a cell in pixels; 0: each frame has 2 x 2 cells."""
    least: float = 0.1
    """A lower bound of the effect of one cell, which is small in long prompts."""

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return (size[0] // self.cell, size[1] // self.cell) if self.cell else (2, 2)

    def tokens(self, size: tuple[int, int], frame: int) -> list[int]:
        """The positions of the cells of a frame, row by row. frame: its number, from 1."""
        rows, cols = self.grid(size)
        each = self.start + rows * cols + self.end
        first = FIRST + self.opening + (frame - 1) * each + self.start
        return [*range(first, first + rows * cols)]


LAYOUTS: Mapping[str, Layout] = {
    "video_llava": Layout(1, 0, cell=0),  # a class token
    "llava_onevision_frames": Layout(0, 0, cell=0),
    "qwen2_vl": Layout(0, 0, opening=1, merged=2),  # <start>
    "qwen2_5_vl": Layout(0, 0, opening=1, merged=2),
    "qwen3_vl": Layout(3, 1, merged=2),  # "<0.2", "seconds>", <start>; <end>
    # "\nFrame", "from", "00:01:", two tags; a tag
    "smolvlm": Layout(5, 1, opening=13, cell=0, least=0.05),
    "internvl": Layout(2, 1, cell=0),  # "\nFrame2:", <start>; <end>
}
OF_IMAGES = ("smolvlm", "internvl")
"""Families whose frames have the token of images."""
QUICK = ("llava_onevision_frames", "qwen2_5_vl")


@cache
def folder() -> Path:
    made = Path(mkdtemp(prefix="mechdsl-videos-"))
    for number, (height, width) in enumerate(SIZES):
        for seed in range(PICTURES):
            random = np.random.default_rng(10 * number + seed)
            pixels = random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
            pixels = pixels.repeat(4, 0).repeat(4, 1)
            Image.fromarray(pixels).save(made / f"{number}-{seed}.png")
    (made / "data.jsonl").write_text("\n".join(map(json.dumps, map(record, ALL))) + "\n")
    return made


def record(n: int) -> dict[str, Any]:
    return {"size": n % 2, "a": n % 4, "b": (n + 1) % 4, "words": WORDS[n]}


@cache
def bare(name: str) -> Bare:
    return Bare(families.bare(name).model, vlm.with_videos(name))


@cache
def loaded(name: str) -> LoadedModel:
    model, found = adopt_model("m", bare(name).model, bare(name).processor)
    assert model is not None, found
    return unchanged(model)


def try_file(
    text: str,
    name: str,
    mode: str = "planned",
    block: str = BLOCK,
    model: LoadedModel | None = None,
) -> tuple[FileResult | None, list[Diagnostic]]:
    """model: the family's model; by default, one that other tests use too."""
    source = Source(f'mech 1\nmodel m = local("x")\n{block}\n{text}', folder() / "file.mech")
    return run_on(source, {"m": loaded(name) if model is None else model}, MODES[mode])


def run(
    text: str,
    name: str,
    mode: str = "planned",
    block: str = BLOCK,
    model: LoadedModel | None = None,
) -> dict[str, ExperimentResult]:
    return succeeded(*try_file(text, name, mode, block, model))


def metadata(name: str, frames: int) -> dict[str, Any]:
    """The rate of a family's frames, and all frames. frames: their number."""
    rate = 1 if name == "smolvlm" else 2
    return {"total_num_frames": frames, "fps": rate, "frames_indices": [*range(frames)]}


def inputs_of(name: str, text: str, files: Sequence[str], count: int | None = None) -> Any:
    """The inputs of a prompt with one video. count: the number of its frames, None for all."""
    frames = [np.asarray(Image.open(folder() / file).convert("RGB")) for file in files][:count]
    given = bare(name).processor(
        text=[text],
        videos=[np.stack(frames)],
        do_sample_frames=False,
        video_metadata=[metadata(name, len(frames))],
        return_tensors="pt",
    )
    return {key: value for key, value in given.items() if key != "video_metadata"}


@cache
def inputs(name: str, n: int, a: int, count: int | None = None) -> dict[str, Tensor]:
    """The inputs of prompt `n`, with picture `a` as first frame."""
    own = record(n)
    marker = "<video>" if name == "qwen3_vl" else vlm.FAMILIES[name].marker
    text = f"w3 w2 {marker.replace('<image>', '<video>')} w1 {WORDS[n]} w3"
    files = [f"{own['size']}-{each}.png" for each in (a, a, 4, a)]
    return inputs_of(name, text, files, count)


def changed(name: str, n: int, **edits: Any) -> float:
    return families.difference(bare(name).run(inputs(name, n, record(n)["b"]), **edits))


def tokens(name: str, n: int, frame: int) -> list[int]:
    return LAYOUTS[name].tokens(SIZES[n % 2], frame)


def cell(name: str, n: int, frame: int, row: int, col: int) -> int:
    _, cols = LAYOUTS[name].grid(SIZES[n % 2])
    return tokens(name, n, frame)[(row - 1) * cols + col - 1]


def compare(
    found: ExperimentResult,
    base: Sequence[float],
    expected: Sequence[Sequence[float]],
    least: float = 0.1,
) -> None:
    """base: [prompt]; expected: [cell, prompt]. Effects have to exceed `least`."""
    [measure] = found.measures
    np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
    np.testing.assert_allclose(measure.patched, expected, atol=2e-4)
    assert (np.abs(np.array(expected) - base).max(1) > least).all()


MIXED = [
    *((name, "planned") for name in LAYOUTS),
    ("llava_onevision_frames", "padded on the right"),
    ("qwen3_vl", "padded on the right"),
    ("qwen2_5_vl", "plain"),
]


@pytest.mark.parametrize(
    ("name", "mode"),
    [pytest.param(*each, marks=() if each in MIXED[1:4:2] else pytest.mark.slow) for each in MIXED],
)
def test_rules_at_frames_of_each_family_equal_hooks(name: str, mode: str) -> None:
    rules = (
        "patch resid_post layer 0 at frame 2 row 2 col 1 token",
        "ablate resid_post layer 0 at each frame tokens with zero",
        "for k in 1..2 { block attention layers * from last token to frame k tokens }",
        "patch resid_post layer 1 at clip tokens",
    )
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(rules)
    )
    found = run(text, name, mode)
    base = [changed(name, n) for n in ALL]
    own = bare(name)
    states = [own.states(inputs(name, n, record(n)["a"]))["blocks"] for n in ALL]
    steps = range(1, 4 // LAYOUTS[name].merged + 1)
    zero, layers = torch.zeros(()), range(len(states[0]))

    def patched(n: int, layer: int, positions: list[int]) -> float:
        return changed(name, n, blocks={layer: at(positions, states[n][layer][positions])})

    one = [patched(n, 0, [cell(name, n, 2, 2, 1)]) for n in ALL]
    compare(found["e0"], base, [one], LAYOUTS[name].least)
    each = [
        [changed(name, n, blocks={0: at(tokens(name, n, k), zero)}) for n in ALL] for k in steps
    ]
    compare(found["e1"], base, each)
    hidden = [
        [changed(name, n, blocked=dict.fromkeys(layers, tokens(name, n, k))) for n in ALL]
        for k in (1, 2)
    ]
    compare(found["e2"], base, hidden)
    whole = [[token for k in steps for token in tokens(name, n, k)] for n in ALL]
    compare(found["e3"], base, [[patched(n, 1, whole[n]) for n in ALL]])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *OF_IMAGES])
def test_completions_with_an_ablated_frame_equal_hooks(name: str) -> None:
    rule = "ablate resid_post layer 0 at frame 1 tokens with zero"
    measure = 'measure contains("w1") as raw\n  report texts'
    text = experiment("e", "generate 3", "from clean into changed", rule, measure=measure)
    found = run(text, name)["e"]
    assert found.replies is not None
    for n in ALL:
        edit = {0: at(tokens(name, n, 1), torch.zeros(()))}
        expected = bare(name).reply(inputs(name, n, record(n)["b"]), 3, blocks=edit)
        [reply] = found.replies.cells[0][n]
        assert list(reply.ids) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_video_folders_of_three_and_four_frames_equal_hooks(name: str) -> None:
    """The number of frames differs from prompt to prompt, and merged frames may be incomplete."""
    counts = [3 + n % 2 for n in ALL]
    for n in ALL:
        own, made = record(n), folder() / f"clip-{n}"
        made.mkdir(exist_ok=True)
        for number, each in enumerate((own["b"], own["b"], 4, own["b"])[: counts[n]]):
            file = folder() / f"{own['size']}-{each}.png"
            (made / f"{number}.png").write_bytes(file.read_bytes())
    start = BLOCK.index("  video"), BLOCK.index("  template")
    block = f'{BLOCK[: start[0]]}  video clip = "clip-{{a}}"\n{BLOCK[start[1] :]}'
    block = block.replace("a = b", 'words = "w1"')
    found = run(
        experiment("e", "ablate resid_post layer 0 at frame 2 tokens with zero"), name, block=block
    )
    base, expected = list[float](), list[float]()
    for n in ALL:
        given, zero = inputs(name, n, record(n)["b"], counts[n]), torch.zeros(())
        base.append(families.difference(bare(name).run(given)))
        edit = {0: at(tokens(name, n, 2), zero)}
        expected.append(families.difference(bare(name).run(given, blocks=edit)))
    compare(found["e"], base, [expected])


VIDEOS = ("clip", "late")


def with_two(name: str, n: int) -> dict[str, Tensor]:
    """The inputs of a prompt with two videos of four frames."""
    own = record(n)
    marker = "<video>" if name == "qwen3_vl" else vlm.FAMILIES[name].marker
    marker = marker.replace("<image>", "<video>")
    videos = [
        np.stack([np.asarray(Image.open(folder() / f"{own['size']}-{k}.png")) for k in each])
        for each in ((own["a"], own["a"], 4, own["a"]), (own["b"], 4, own["b"], 4))
    ]
    count = metadata(name, 4)
    given = bare(name).processor(
        text=[f"w3 w2 {marker} w1 {marker} {WORDS[n]} w3"],
        videos=videos,
        do_sample_frames=False,
        video_metadata=[count, count],
        return_tensors="pt",
    )
    return {key: value for key, value in given.items() if key != "video_metadata"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize("name", some(LAYOUTS, ["qwen3_vl"]))
def test_rules_in_one_of_two_videos_are_what_hooks_give(name: str, mode: str) -> None:
    late = '["{size}-{b}.png", "{size}-4.png", "{size}-{b}.png", "{size}-4.png"]'
    block = BLOCK.replace("  template", f"  video late = {late}\n  template").replace(
        "{clip} w1", "{clip} w1 {late}"
    )
    rules = [f"ablate resid_post layer 0 at frame 2 of {own} tokens with zero" for own in VIDEOS]
    text = "".join(experiment(f"e{n}", rule) for n, rule in enumerate(rules))
    written = 'measure matches("w") as raw'
    found = run(text + experiment("r", "generate 3", rules[1], measure=written), name, mode, block)
    own, zero = bare(name), torch.zeros(())
    given = [with_two(name, n) for n in ALL]
    base = [families.difference(own.run(each)) for each in given]
    for video in range(len(VIDEOS)):
        values: list[float] = []
        for n in ALL:
            ids = given[n]["input_ids"][0].tolist()
            token = vlm.SPECIAL["<image>" if name in OF_IMAGES else "<video>"]
            places = [place for place, own in enumerate(ids) if own == token]
            later = (places[len(places) // 2] - places[0]) * video
            edit = {0: at([later + token for token in tokens(name, n, 2)], zero)}
            values.append(families.difference(own.run(given[n], blocks=edit)))
            if video:
                assert found["r"].replies is not None
                [reply] = found["r"].replies.cells[0][n]
                assert list(reply.ids) == own.reply(given[n], 3, blocks=edit)
        compare(found[f"e{video}"], base, [values])


SHORT = BLOCK.replace(
    "  template", '  video late = ["{size}-{b}.png", "{size}-4.png"]\n  template'
).replace("{clip} w1", "{clip} w1 {late}")
"""Prompts with a video of four frames and one of two."""


def embedded(name: str, n: int) -> tuple[Tensor, int]:
    """The vectors of a prompt of `SHORT`, with those of each video from a prompt of it alone, and
    the number of tokens before the second video."""
    own, marker = record(n), vlm.FAMILIES[name].marker.replace("<image>", "<video>")
    first = [f"{own['size']}-{each}.png" for each in (own["a"], own["a"], 4, own["a"])]
    second = [f"{own['size']}-{each}.png" for each in (own["b"], 4)]
    before, after = (
        bare(name).states(inputs_of(name, text, files))["embed"][0]
        for text, files in (
            (f"w3 w2 {marker} w1", first),
            (f"{marker} {WORDS[n]} w3", second),
        )
    )
    return torch.cat([before, after[1:]]), len(before)  # without `<s>`


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(["llava_onevision_frames", "video_llava", *OF_IMAGES], QUICK))
def test_videos_of_different_lengths_have_the_vectors_of_each_alone(name: str, mode: str) -> None:
    """With rules in either video, and replies."""
    rules = [f"ablate resid_post layer 0 at frame 2 of {own} tokens with zero" for own in VIDEOS]
    text = "".join(experiment(f"e{n}", rule) for n, rule in enumerate(rules))
    written = 'measure matches("w") as raw'
    text += experiment("r", "generate 3", rules[1], measure=written)
    found = run(text, name, mode, SHORT)
    own, zero, base = bare(name), torch.zeros(()), list[float]()
    values: tuple[list[float], list[float]] = [], []
    for n in ALL:
        vectors, before = embedded(name, n)

        def logits(edit: Any, more: Sequence[int] = (), vectors: Tensor = vectors) -> Tensor:
            ids = torch.full((1, len(vectors) + len(more)), vlm.WORDS["w1"])
            ids[0, len(vectors) :] = torch.tensor([*more], dtype=torch.long)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            place = at([*range(len(vectors))], vectors)
            return own.run(given, blocks=edit, embed=place)

        base.append(families.difference(logits({})))
        later = before - FIRST  # the second video follows the first one's prompt
        cells = tokens(name, n, 2), [later + each for each in tokens(name, n, 2)]
        for video, places in enumerate(cells):
            values[video].append(families.difference(logits({0: at(places, zero)})))
        reply: list[int] = []
        for _ in range(3):
            reply.append(int(logits({0: at(cells[1], zero)}, reply)[-1].argmax()))
        assert found["r"].replies is not None
        [seen] = found["r"].replies.cells[0][n]
        assert list(seen.ids) == reply
    for video in range(len(VIDEOS)):
        compare(found[f"e{video}"], base, [values[video]], least=LAYOUTS[name].least)
    for video, frames in zip(VIDEOS, (4, 2), strict=True):
        said = found["e0"].conventions[f"video `{video}`"]
        assert said.startswith(f"{frames} frames, ")
        assert "; each video of a prompt is prepared alone, because the processor needs" in said


def test_videos_of_qwen_of_different_lengths_are_prepared_together() -> None:
    rule = "ablate resid_post layer 0 at frame 1 of late tokens with zero"
    found = run(experiment("e", rule), "qwen2_5_vl", block=SHORT)["e"]
    assert "alone" not in found.conventions["video `late`"]


@pytest.mark.parametrize("name", ["qwen2_5_vl", *OF_IMAGES])
def test_tokens_of_a_video_are_written_as_its_processor_writes_them(name: str) -> None:
    text = experiment("e", "ablate resid_post layer 0 at clip tokens with zero")
    checked = check_file(text, folder(), loaded(name), BLOCK)
    reader = loaded(name).tokenizer
    assert reader is not None
    rows = checked.experiments[0].table.runs["clean"].rows
    due = [inputs(name, n, n)["input_ids"][0].tolist() for n in ALL]
    found = sorted([reader.token_text(token) for token in row.ids] for row in rows)
    assert found == sorted([reader.token_text(token) for token in ids] for ids in due)
    assert sorted(reader.decode(row.ids) for row in rows) == sorted(map(reader.decode, due))
    token = "<image>" if name in OF_IMAGES else "<video>"
    assert all(token in each for each in found)


@pytest.mark.slow
def test_image_and_video_in_one_prompt_equal_hooks() -> None:
    name = "qwen2_5_vl"
    block = BLOCK.replace("  template", '  image photo = "{size}-3.png"\n  template').replace(
        "{clip} w1", "{clip} w1 {photo}"
    )
    positions = "{ photo row 2 col 1 token, frame 2 row 2 col 1 token }"
    found = run(experiment("e", RULE.format(positions)), name, block=block)["e"]
    base, expected = list[float](), list[float]()
    for n in ALL:
        own = record(n)
        files = [f"{own['size']}-{each}.png" for each in (own["a"], own["a"], 4, own["a"])]
        frames = [np.asarray(Image.open(folder() / file).convert("RGB")) for file in files]
        given = dict(
            bare(name).processor(
                text=[f"w3 w2 <start><video><end> w1 <start><image><end> {WORDS[n]} w3"],
                images=[[Image.open(folder() / f"{own['size']}-3.png").convert("RGB")]],
                videos=[np.stack(frames)],
                do_sample_frames=False,
                video_metadata=[{"total_num_frames": 4, "fps": 2, "frames_indices": [0, 1, 2, 3]}],
                return_tensors="pt",
            )
        )
        given.pop("video_metadata", None)
        [*_, image] = (given["input_ids"][0] == vlm.SPECIAL["<image>"]).nonzero()[:, 0].tolist()
        _, cols = LAYOUTS[name].grid(SIZES[n % 2])
        first = image - 7 + cols  # of 8 cells
        edit = {0: at([first, cell(name, n, 2, 2, 1)], torch.zeros(()))}
        base.append(families.difference(bare(name).run(given)))
        expected.append(families.difference(bare(name).run(given, blocks=edit)))
    compare(found, base, [expected])


@pytest.mark.slow
def test_blurred_frames_equal_hooks() -> None:
    name = QUICK[0]
    block = BLOCK.replace("{ a = b }", "{ blur clip radius 2 }")
    text = experiment("e", "from clean into changed", "patch resid_post layer 0 at frame 3 tokens")
    found = run(text, name, block=block)["e"]
    base, expected = list[float](), list[float]()
    for n in ALL:
        own = record(n)
        clean, blurred = list[str](), list[str]()
        for each in (own["a"], own["a"], 4, own["a"]):
            clean.append(f"{own['size']}-{each}.png")
            blurred.append(f"blurred-{clean[-1]}")
            image = Image.open(folder() / clean[-1]).convert("RGB")
            image.filter(ImageFilter.GaussianBlur(2)).save(folder() / blurred[-1])
        prompt = f"w3 w2 <video> w1 {WORDS[n]} w3"
        state = bare(name).states(inputs_of(name, prompt, clean))["blocks"][0][tokens(name, n, 3)]
        given = inputs_of(name, prompt, blurred)
        base.append(families.difference(bare(name).run(given)))
        edit = {0: at(tokens(name, n, 3), state)}
        expected.append(families.difference(bare(name).run(given, blocks=edit)))
    compare(found, base, [expected])
    assert found.conventions["image of changed"] == "blur with a Gaussian of radius 2 pixels"


CHAT = """\
{% for turn in messages %}w2
{%- for part in turn['content'] %} {{ '<image>' if part['type'] == 'image' else part['text'] }}
{%- endfor %} w3{% endfor %} w1"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_onevision_frames", "qwen2_5_vl", "qwen3_vl", *OF_IMAGES])
def test_videos_in_chats_equal_hooks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Bare(bare(name).model, vlm.with_videos(name))
    marker = vlm.FAMILIES[name].marker
    own.processor.tokenizer.chat_template = CHAT.replace("<image>", marker)
    if name == "smolvlm":  # its processor has another template for videos
        kind = import_module(type(own.processor).__module__)
        monkeypatch.setattr(kind, "DEFAULT_CHAT_TEMPLATE", CHAT.replace("image", "video"))
        own.processor.tokenizer.chat_template = "{{ messages }}"
    model, found = adopt_model("m", deepcopy(own.model), own.processor)
    assert model is not None, found
    block = BLOCK.replace('template "w3 w2 {clip} w1 {words} w3"', 'chat { user "{clip} {words}" }')
    text = experiment("e", RULE.format("frame 2 tokens"))
    source = Source(f'mech 1\nmodel m = local("x")\n{block}\n{text}', folder() / "file.mech")
    chat = succeeded(*run_on(source, {"m": model}, MODES["planned"]))["e"]
    base, expected = list[float](), list[float]()
    for n in ALL:
        video = marker.replace("<image>", "<video>")
        if name == "qwen3_vl":  # its processor writes the tokens around the video
            video = "<video>"
        files = [f"{record(n)['size']}-{each}.png" for each in (n % 4, n % 4, 4, n % 4)]
        given = inputs_of(name, f"w2 {video} {WORDS[n]} w3 w1", files)
        shape = given["input_ids"].shape  # a chat without a beginning-of-sequence token
        given = {key: each[:, 1:] if each.shape == shape else each for key, each in given.items()}
        base.append(families.difference(own.run(given)))
        edit = {0: at([token - 2 for token in tokens(name, n, 2)], torch.zeros(()))}
        expected.append(families.difference(own.run(given, blocks=edit)))
    compare(chat, base, [expected])


@pytest.mark.parametrize("name", some(LAYOUTS, ["smolvlm"]))
def test_each_video_passes_the_vision_encoder_once(name: str) -> None:
    """Each of the four prompts has two videos, and the first one passes again in a check."""
    model, found = adopt_model("m", deepcopy(bare(name).model), bare(name).processor)
    assert model is not None, found
    lines = RULE.format("frame 2 tokens"), RULE.format("last token")
    text = "".join(
        experiment(f"e{n}", "from clean into changed", own) for n, own in enumerate(lines)
    )
    written = 'measure contains("w1") as raw'
    text += experiment("r", "generate 2", "from clean into changed", lines[0], measure=written)
    source = Source(f'mech 1\nmodel m = local("x")\n{BLOCK}\n{text}', folder() / "file.mech")
    with counted_images(model) as counts:
        succeeded(*run_on(source, {"m": model}, MODES["planned"]))
    distinct = len({(own["size"], own[key]) for own in map(record, ALL) for key in "ab"})
    assert sorted(counts.values()) == [*[1] * (distinct - 1), 2]


# --- conventions and errors -----------------------------------------------------------------------

RULE = "ablate resid_post layer 0 at {} with zero"


def test_conventions_name_the_video_processor_and_merged_frames() -> None:
    found = run(experiment("e", RULE.format("frame 2 tokens")), "qwen2_5_vl")["e"]
    said = found.conventions["video `clip`"]
    assert said.startswith(
        "4 frames, 2 per second, all read by the model's `Qwen2VLVideoProcessor`, which merges 2 "
        "frames: `frame 1` is the first 2; 2 x 4, 4 x 2 tokens"
    )


@pytest.mark.parametrize(
    ("name", "position", "code", "told"),
    [
        ("qwen2_5_vl", "frame 3 tokens", "E0309", "each prompt has 2 frames"),
        ("llava_onevision_frames", "frame 5 row 1 col 1 token", "E0309", "each prompt has 4"),
        ("llava_onevision_frames", "frame 1 row 3 col 1 token", "E0310", "2 rows and 2 columns"),
        ("llava_onevision_frames", "clip row 1 col 1 token", "E0308", "frame 1 row 1 col 1"),
        ("llava_onevision_frames", "clip frame 2 tokens", "E0308", "first: `frame 2 of clip`"),
    ],
)
def test_invalid_position_reports_code_and_fix(
    name: str, position: str, code: str, told: str
) -> None:
    _, problems = try_file(experiment("e", RULE.format(position)), name)
    assert [each.code for each in problems if each.severity == "error"] == [code]
    assert told in render_full(problems, color=False, width=100)


def test_conventions_of_a_video_name_the_rate_of_its_processor() -> None:
    found = run(experiment("e", RULE.format("frame 2 tokens")), "smolvlm")["e"]
    said = found.conventions["video `clip`"]
    assert said == (
        "4 frames, 1 per second, all read by the model's `SmolVLMVideoProcessor`; 2 x 2 tokens, "
        "rows and columns counted from 1 at the top left"
    )


SECOND = {
    "late": '  video late = ["{size}-{b}.png", "{size}-4.png"]\n  template',
    "photo": '  image photo = "{size}-3.png"\n  template',
}


@pytest.mark.parametrize(
    ("name", "second", "told"),
    [
        ("smolvlm", "photo", "it prepares images or videos, not both in a prompt"),
    ],
)
def test_pictures_that_a_processor_does_not_prepare_together_report_e0459(
    name: str, second: str, told: str
) -> None:
    block = BLOCK.replace("  template", SECOND[second])
    block = block.replace("{clip} w1", f"{{clip}} w1 {{{second}}}")
    _, problems = try_file(experiment("e", RULE.format("last token")), name, block=block)
    [error] = [each for each in problems if each.severity == "error"]
    assert error.code == "E0459"
    shown = render_full([error], color=False, width=1000)
    assert told in shown
    assert ("the videos of prompts" in shown) == ("videos of different" in told)


def test_frames_of_different_sizes_are_rejected() -> None:
    block = BLOCK.replace('"{size}-4.png"', '"1-4.png"')
    _, problems = try_file(experiment("e", RULE.format("frame 1 tokens")), QUICK[0], block=block)
    [found] = [each for each in problems if each.severity == "error"]
    shown = render_full([found], color=False, width=100)
    assert found.code == "E0207"
    assert "has frames of 16 x 8 and 8 x 16 pixels" in shown
    assert "reads frames of one size" in shown


def test_video_processor_with_unknown_layout_is_rejected() -> None:
    own = bare(QUICK[0])
    model, found = adopt_model("m", deepcopy(own.model), own.processor)
    assert model is not None, found
    source = f'mech 1\nmodel m = local("x")\n{BLOCK}\n{experiment("e", RULE.format("last token"))}'
    with patch.object(type(IMAGE_LAYOUTS["llava_onevision"]), "video_processors", ()):
        _, problems = run_on(Source(source, folder() / "file.mech"), {"m": model}, MODES["planned"])
    [error] = [each for each in problems if each.severity == "error"]
    assert error.code == "E0459"
    shown = render_full([error], color=False, width=1000)
    assert "`llava_onevision` read videos by a video processor with an unknown layout" in shown
    assert "write an `image` line for each frame" in shown


def write_processor(folder: Path) -> None:
    """Write the files of a processor, without settings for videos."""
    own = families.bare("qwen2_vl")
    own.model.config.save_pretrained(folder)
    own.processor.image_processor.save_pretrained(folder)
    own.processor.tokenizer.save_pretrained(folder)
    (folder / PROCESSOR_FILE).write_text('{"processor_class": "Qwen2VLProcessor"}')


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_processor_without_torchvision_names_the_extra(tmp_path: Path) -> None:
    write_processor(tmp_path)
    reader, found = read_prompt_tokenizer(tmp_path, None)
    assert reader is not None, found
    [error] = check_processor(reader, model="m", span=None)
    assert error.code == "E0459"
    shown = render_full([error], color=False, width=1000)
    assert "it also prepares videos, for which it needs torchvision" in shown
    assert 'pip install "mechdsl[video]"' in shown


def test_torchvision_for_another_torch_is_named(tmp_path: Path) -> None:
    """transformers reports only that a module can't be imported."""
    write_processor(tmp_path)
    reader, found = read_prompt_tokenizer(tmp_path, None)
    assert reader is not None, found
    missing = ModuleNotFoundError("Could not import module 'AutoProcessor'.")
    missing.__cause__ = RuntimeError("operator torchvision::nms does not exist")
    with patch("transformers.AutoProcessor.from_pretrained", side_effect=missing):
        [error] = check_processor(reader, model="m", span=None)
    assert error.code == "E0459"
    shown = render_full([error], color=False, width=1000)
    assert "the installed torchvision doesn't fit the installed torch" in shown


def test_processor_without_num2words_names_the_extra(tmp_path: Path) -> None:
    write_processor(tmp_path)
    reader, found = read_prompt_tokenizer(tmp_path, None)
    assert reader is not None, found
    missing = ImportError("Package `num2words` is required to run SmolVLM processor.")
    with patch("transformers.AutoProcessor.from_pretrained", side_effect=missing):
        [error] = check_processor(reader, model="m", span=None)
    assert error.code == "E0459"
    shown = render_full([error], color=False, width=1000)
    assert "it writes numbers of frames as words with num2words" in shown
    assert 'pip install "mechdsl[video]"' in shown


def test_hash_of_tokenizer_depends_on_torchvision_and_video_settings(tmp_path: Path) -> None:
    write_processor(tmp_path)

    def hash_of(version: str) -> str:
        with patch.object(image_prompts, "_library_version", lambda _: version):
            reader, found = read_prompt_tokenizer(tmp_path, None)
        assert reader is not None, found
        return reader.hash

    seen = {hash_of(version) for version in ("", "0.28.0", "0.29.1")}
    (tmp_path / "video_preprocessor_config.json").write_text("{}")
    assert len(seen | {hash_of("")}) == 4


def test_facts_of_videos_are_read_from_cache(tmp_path: Path) -> None:
    """The second tokenizer has no processor."""

    def reader(**changes: Any) -> ImagePromptTokenizer:
        made = loaded("smolvlm").tokenizer
        assert isinstance(made, ImagePromptTokenizer)
        other = made.with_processor(*made._read)
        other.__dict__.update({"_cache": tmp_path, **changes})
        return other

    def facts(own: ImagePromptTokenizer) -> list[object]:
        own.check_frames()
        return [
            own.reads_videos,
            own.video_text(3),
            own.video_text(4),
            own.video_id,
            own.frame_rate,
            own.video_chat,
            own.expansion((8, 16, 4)),
        ]

    plain = facts(reader())
    assert plain[1] != plain[2]
    assert facts(reader(_read=None)) == plain


def test_gray_frame_gets_the_size_of_other_frames() -> None:
    block = BLOCK.replace('"{size}-4.png"', "gray")
    found = run(experiment("e", RULE.format("frame 3 tokens")), QUICK[0], block=block)["e"]
    whole = run(experiment("e", RULE.format("frame 3 tokens")), QUICK[0])["e"]
    assert np.abs(found.measures[0].base[0] - whole.measures[0].base[0]).max() > 0.01
