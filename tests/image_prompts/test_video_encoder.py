"""Rules in the two vision encoders of Video-LLaVA, one for images and one for frames, against plain
hooks on the bare model: one unpadded prompt at a time, with manually computed patches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.loading.loader import adopt_model

from ..execute.support import MODES, run_on
from ..quick import some
from . import test_video_processors as videos
from .reference import Edit, at, edited_module, one_head, record_value
from .support import experiment
from .test_families import difference
from .test_video_processors import ALL, BLOCK, WORDS, bare, folder, inputs, record

NAME = "video_llava"
FRAMES, EACH, HEADS, WIDTH = 4, 5, 2, 16
"""Each of the four frames has a class token and 2 x 2 patches."""
TOWER = "model.video_tower"
PLACES = {
    "resid_pre": ("", True),
    "resid_post": ("", False),
    "z": (".self_attn.out_proj", True),
    "attn_out": (".self_attn", False),
    "mlp_out": (".mlp", False),
}
"""Site → part of a block, and whether the site is its input."""


def patch(frame: int, row: int, col: int) -> int:
    """The number of a patch in the encoder of frames, which counts them all."""
    return (frame - 1) * EACH + 1 + 2 * (row - 1) + col - 1


def frame_patches(frame: int) -> list[int]:
    return [patch(frame, row, col) for row in (1, 2) for col in (1, 2)]


def edited(site: str, layer: int, edit: Edit, tower: str = TOWER) -> AbstractContextManager[None]:
    """Change a site, [token of all frames or of the image, width]."""
    part, is_input = PLACES[site]
    module = bare(NAME).model.get_submodule(f"{tower}.encoder.layers.{layer}{part}")
    return edited_module(module, lambda value: edit(value.flatten(0, -2)), is_input=is_input)


@cache
def state(site: str, layer: int, n: int) -> Tensor:
    """The values of a site in the clean run of a prompt."""
    given = inputs(NAME, n, record(n)["a"])
    return record_value(partial(edited, site, layer), partial(bare(NAME).run, given))


def changed(n: int, *edits: AbstractContextManager[None]) -> float:
    """The difference of a prompt with its other frames."""
    with ExitStack() as stack:
        for each in edits:
            stack.enter_context(each)
        return difference(bare(NAME).run(inputs(NAME, n, record(n)["b"])))


def scaled(patches: Sequence[int], factor: float) -> Edit:
    def edit(value: Tensor) -> Tensor:
        value[list(patches)] *= factor
        return value

    return edit


def exchanged(first: int, second: int) -> Edit:
    def edit(value: Tensor) -> Tensor:
        value[[first, second]] = value[[second, first]]
        return value

    return edit


def copied(site: str, layer: int, n: int, patches: Sequence[int]) -> Edit:
    return at(patches, state(site, layer, n)[list(patches)])


def cells_of(n: int) -> list[list[float]]:
    """The values of a prompt under each rule of `RULES`, one after the other in each cell."""
    one, zero = [patch(2, 2, 1)], torch.zeros(())
    whole = [each for k in range(1, FRAMES + 1) for each in frame_patches(k)]
    clean = state("resid_post", 0, n)
    mean = torch.stack([state("resid_post", 0, m)[one] for m in ALL]).mean(0)
    direction = torch.cat([state("resid_post", 0, m)[[patch(1, 1, 1)]] for m in ALL]).mean(0)

    def head(h: int) -> Edit:
        return one_head(at(frame_patches(3), zero), h, WIDTH // HEADS)

    def added(value: Tensor) -> Tensor:
        value[one] += 3 * direction
        return value

    held = at(whole, record_value(partial(edited, "mlp_out", 1), partial(changed, n))[whole])
    return [
        [changed(n, edited("resid_post", m, copied("resid_post", m, n, one))) for m in (0, 1)],
        [changed(n, edited("z", 0, head(h))) for h in range(HEADS)],
        [
            changed(n, edited("mlp_out", 0, copied("mlp_out", 0, n, frame_patches(k))))
            for k in range(1, FRAMES + 1)
        ],
        [changed(n, edited("resid_pre", 1, scaled(whole, -2)))],
        [changed(n, edited("resid_pre", 0, exchanged(patch(1, 1, 1), patch(4, 2, 2))))],
        [changed(n, edited("resid_post", 0, at(one, mean)))],
        [changed(n, edited("resid_post", 0, added))],
        [changed(n, edited("attn_out", 1, copied("attn_out", 1, n, frame_patches(1))))],
        [changed(n, edited("resid_post", 0, at(one, clean[one])), edited("mlp_out", 1, held))],
    ]


RULES = (
    "patch resid_post vision layer * at frame 2 row 2 col 1 token",
    "ablate z vision layer 0 head * at frame 3 tokens with zero",
    "patch mlp_out vision layer 0 at each frame tokens",
    "scale resid_pre vision layer 1 at clip tokens by -2",
    "swap resid_pre vision layer 0 at frame 1 row 1 col 1 token with frame 4 row 2 col 2 token",
    "ablate resid_post vision layer 0 at frame 2 row 2 col 1 token with mean of clean",
    "add 3 * d to resid_post vision layer 0 at frame 2 row 2 col 1 token",
    "patch attn_out vision layer 1 at frame 1 row * col * tokens",
    "patch resid_post vision layer 0 at frame 2 row 2 col 1 token\n"
    "  freeze mlp_out vision layer 1 at clip tokens",
)
DIRECTION = "direction d = mean(ask) at resid_post vision layer 0 at frame 1 row 1 col 1 token\n"


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_rules_at_patches_of_frames_equal_hooks_on_the_video_tower(mode: str) -> None:
    text = DIRECTION + "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(RULES)
    )
    found = videos.run(text, NAME, mode)
    base = [changed(n) for n in ALL]
    expected = [cells_of(n) for n in ALL]
    for number, (rule, result) in enumerate(zip(RULES, found.values(), strict=True)):
        values = np.array([each[number] for each in expected]).T
        [measure] = result.measures
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched, values, atol=1e-4, err_msg=rule)
        assert np.abs(values - base).max() > 0.05, rule
    assert np.abs(found["e0"].measures[0].patched - base).max() > 0.1


def test_replies_and_observed_norms_at_frames_equal_hooks() -> None:
    rule = "scale resid_post vision layer 0 at frame 2 tokens by -3"
    text = experiment("r", "generate 4", rule, measure='measure matches("w") as raw')
    line = "observe norm resid_post vision layer * at frame 2 row 2 col 1 token"
    text += experiment("o", line, measure="")
    found = videos.run(text, NAME)
    replies, differ = found["r"].replies, 0
    assert replies is not None
    for n in ALL:
        given = inputs(NAME, n, record(n)["a"])
        plain = bare(NAME).reply(given, 4)
        with edited("resid_post", 0, scaled(frame_patches(2), -3)):
            expected = bare(NAME).reply(given, 4)
        assert list(replies.runs["clean"][n][0].ids) == plain
        assert list(replies.cells[0][n][0].ids) == expected
        differ += plain != expected
    assert differ
    norms = [[float(state("resid_post", m, n)[patch(2, 2, 1)].norm()) for n in ALL] for m in (0, 1)]
    np.testing.assert_allclose(found["o"].measures[0].patched, norms, rtol=1e-4)


PHOTO = 'image photo = "{size}-3.png"\n  template'


def with_photo(n: int) -> dict[str, Tensor]:
    """The inputs of a prompt with a video and an image."""
    own = record(n)
    files = [f"{own['size']}-{each}.png" for each in (own["a"], own["a"], 4, own["a"])]
    frames = [np.asarray(Image.open(folder() / file).convert("RGB")) for file in files]
    given = bare(NAME).processor(
        text=[f"w3 w2 <video> w1 <image> {WORDS[n]} w3"],
        images=[[Image.open(folder() / f"{own['size']}-3.png").convert("RGB")]],
        videos=[np.stack(frames)],
        do_sample_frames=False,
        video_metadata=[{"total_num_frames": 4, "fps": 2, "frames_indices": [0, 1, 2, 3]}],
        return_tensors="pt",
    )
    return {key: value for key, value in given.items() if key != "video_metadata"}


def test_rules_on_an_image_and_a_video_of_one_prompt_equal_hooks() -> None:
    """Each rule alone, and both together."""
    block = BLOCK.replace("template", PHOTO).replace("{clip} w1", "{clip} w1 {photo}")
    block = block.replace("  corrupt changed { a = b }\n", "")
    rules = (
        "scale resid_post vision layer 0 at photo row 1 col 2 token by -3",
        "scale resid_post vision layer 0 at frame 1 row 1 col 2 token by -3",
    )
    text = "".join(experiment(f"e{k}", rule) for k, rule in enumerate(rules))
    found = videos.run(text + experiment("both", *rules), NAME, block=block)
    edits = (
        lambda: edited("resid_post", 0, scaled([2], -3), "model.image_tower"),
        lambda: edited("resid_post", 0, scaled([patch(1, 1, 2)], -3)),
    )
    model, own = bare(NAME), list(map(with_photo, ALL))
    base = [difference(model.run(given)) for given in own]
    for result, chosen in zip(found.values(), (edits[:1], edits[1:], edits), strict=True):
        values: list[float] = []
        for given in own:
            with ExitStack() as stack:
                for each in chosen:
                    stack.enter_context(each())
                values.append(difference(model.run(given)))
        np.testing.assert_allclose(result.measures[0].base[0], base, atol=1e-4)
        np.testing.assert_allclose(result.measures[0].patched[0], values, atol=1e-4)
        assert np.abs(np.array(values) - base).max() > 0.05


@pytest.mark.slow
def test_different_encoders_of_images_and_videos_report_e0413() -> None:
    """Rules outside of the encoder keep their results."""
    own: Any = deepcopy(bare(NAME).model)
    own.model.video_tower.encoder.layers[1].mlp.activation_fn = torch.nn.Tanh()
    model, found = adopt_model("m", own, bare(NAME).processor)
    assert model is not None, found
    inside = "scale resid_post vision layer 0 at clip tokens by -2"
    text = experiment("inside", inside) + experiment("e", inside.replace("vision ", ""))
    source = Source(f'mech 1\nmodel m = local("x")\n{BLOCK}\n{text}', folder() / "file.mech")
    result, found = run_on(source, {"m": model}, MODES["planned"])
    [error] = [each for each in found if each.severity == "error"]
    assert error.code == "E0413"
    assert "its encoders of images and videos differ" in str(error)
    assert result is not None
    assert [each.name for each in result.experiments] == ["e"]


def test_rule_at_a_class_token_of_a_frame_reports_e0310() -> None:
    text = experiment("e", "ablate resid_post vision layer 0 at tokens 3..5 with zero")
    _, found = videos.try_file(text, NAME)
    assert [each.code for each in found if each.severity == "error"] == ["E0310"]


# --- frames that the encoder of images reads ------------------------------------------------------

MERGED = {
    "smolvlm": ("model.vision_model.encoder.layers", 0),
    "internvl": ("model.vision_tower.encoder.layer", 1),
}
"""Family → blocks of the encoder, and class tokens of each frame, before 4 x 4 patches."""
MERGED_RULES = (
    "patch resid_post vision layer * at frame 2 row 2 col 1 token",
    "scale resid_pre vision layer 1 at each frame tokens by -2",
    "swap resid_pre vision layer 0 at frame 1 row 1 col 1 token with frame 4 row 2 col 2 token",
    "patch mlp_out vision layer 0 at clip tokens",
)


def merged(name: str, frame: int, row: int, col: int) -> list[int]:
    """The numbers of the 2 x 2 patches of a token in the encoder, which counts those of all
    frames."""
    front = MERGED[name][1]
    first = (frame - 1) * (front + 16) + front + 8 * (row - 1) + 2 * (col - 1)
    return [first + down + along for down in (0, 4) for along in (0, 1)]


def merged_frame(name: str, frame: int) -> list[int]:
    return [own for row in (1, 2) for col in (1, 2) for own in merged(name, frame, row, col)]


def in_frames(name: str, site: str, layer: int, edit: Edit) -> AbstractContextManager[None]:
    part, is_input = PLACES[site]
    module = bare(name).model.get_submodule(f"{MERGED[name][0]}.{layer}{part}")
    return edited_module(module, lambda value: edit(value.flatten(0, -2)), is_input=is_input)


def frame_state(name: str, site: str, layer: int, n: int) -> Tensor:
    given = inputs(name, n, record(n)["a"])
    return record_value(partial(in_frames, name, site, layer), partial(bare(name).run, given))


def under(name: str, n: int, site: str, layer: int, edit: Edit) -> float:
    with in_frames(name, site, layer, edit):
        return videos.changed(name, n)


def merged_cells(name: str, n: int) -> list[list[float]]:
    """As `cells_of`, for `MERGED_RULES`."""
    one, frames = merged(name, 2, 2, 1), [merged_frame(name, k) for k in range(1, FRAMES + 1)]
    first, last = merged(name, 1, 1, 1), merged(name, 4, 2, 2)
    every = [own for frame in frames for own in frame]

    def exchange(value: Tensor) -> Tensor:
        value[first + last] = value[last + first]
        return value

    def clean(site: str, layer: int, patches: Sequence[int]) -> Edit:
        return at(patches, frame_state(name, site, layer, n)[list(patches)])

    return [
        [under(name, n, "resid_post", m, clean("resid_post", m, one)) for m in (0, 1)],
        [under(name, n, "resid_pre", 1, scaled(own, -2)) for own in frames],
        [under(name, n, "resid_pre", 0, exchange)],
        [under(name, n, "mlp_out", 0, clean("mlp_out", 0, every))],
    ]


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", MERGED)
def test_rules_at_merged_patches_of_frames_equal_hooks_on_the_encoder(name: str, mode: str) -> None:
    rules = MERGED_RULES if name == "smolvlm" else MERGED_RULES[:3]  # scaled after the MLP
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(rules)
    )
    found = videos.run(text, name, mode)
    base = [videos.changed(name, n) for n in ALL]
    expected = [merged_cells(name, n) for n in ALL]
    for number, (rule, result) in enumerate(zip(rules, found.values(), strict=True)):
        values = np.array([each[number] for each in expected]).T
        [measure] = result.measures
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched, values, atol=1e-4, err_msg=rule)
        assert np.abs(values - base).max() > 0.02, rule
