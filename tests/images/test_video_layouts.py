"""Layouts of video tokens, against manually computed arrays and against models.

Video processors need torchvision: without it, the tests pass the prompts that these would prepare.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.images.layouts import IMAGE_LAYOUTS, ImageTokens, PixelBox, video_layout
from mechdsl.images.processing import UnsupportedProcessor

from . import prompts_of_images as vlm

VIDEO = vlm.SPECIAL["<video>"]


def frames_of(own: ImageTokens) -> dict[int, list[int]]:
    """Return the positions of each frame."""
    found: dict[int, list[int]] = {}
    for cell in own.cells:
        found.setdefault(cell.tile, []).append(cell.position)
    return found


def box_of(own: ImageTokens, frame: int, row: int, col: int) -> PixelBox | None:
    [box] = [each.box for each in own.cells if (each.tile, each.row, each.col) == (frame, row, col)]
    return box


def test_frames_of_video_llava_begin_with_class_token() -> None:
    """Two frames of 8 x 16 pixels, of which the middle 8 x 8 are cut out: patches of 4 x 4."""
    size = {"shortest_edge": 8}
    settings = {"do_resize": True, "size": size, "do_center_crop": True, "crop_size": vlm.CROP}
    made, config = vlm.with_stand_in("video_llava", **settings), vlm.model("video_llava").config
    inputs = {"input_ids": [1, *[VIDEO] * 10, 3], "pixel_values_videos": np.zeros((1, 2, 3, 8, 8))}
    [own] = video_layout(made, config, inputs, [(8, 16)])
    assert frames_of(own) == {1: [2, 3, 4, 5], 2: [7, 8, 9, 10]}
    assert vlm.others(own) == (1, 6)
    assert (own.start, own.end, own.rows, own.cols) == (1, 11, 2, 2)
    assert box_of(own, 2, 2, 1) == (4, 4, 8, 8)


def test_frames_of_llava_onevision_are_pooled_before_one_row_end() -> None:
    """Three frames of 4 x 4 patches, pooled to 2 x 2."""
    name = "llava_onevision_frames"
    size = {"height": 16, "width": 16}
    made = vlm.with_stand_in(name, do_resize=True, size=size, do_center_crop=None)
    inputs = {
        "input_ids": [[1, 3, *[VIDEO] * 13, 3]],
        "pixel_values_videos": np.zeros((1, 3, 3, 16, 16)),
    }
    [own] = video_layout(made, vlm.model(name).config, inputs, [(10, 20)])
    assert frames_of(own) == {1: [2, 3, 4, 5], 2: [6, 7, 8, 9], 3: [10, 11, 12, 13]}
    assert vlm.others(own) == (14,)
    assert box_of(own, 3, 1, 2) == (10, 0, 20, 5)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_frames_of_qwen_are_merged_in_pairs(name: str) -> None:
    """Four frames of 8 x 16 pixels, resized to 4 x 8 patches of 2 x 2: 2 x 4 cells."""
    made = vlm.with_stand_in(name, do_resize=True, patch_size=2, merge_size=2)
    ids = [vlm.SPECIAL["<start>"], *[VIDEO] * 16, vlm.SPECIAL["<end>"], 3]
    inputs = {"input_ids": ids, "video_grid_thw": [[2, 4, 8]]}
    [own] = video_layout(made, vlm.model(name).config, inputs, [(8, 16)])
    assert frames_of(own) == {1: [*range(1, 9)], 2: [*range(9, 17)]}
    assert vlm.others(own) == (0, 17)
    assert box_of(own, 2, 2, 3) == (8, 4, 12, 8)


def test_pairs_of_qwen3_are_separated_by_time() -> None:
    name = "qwen3_vl"
    made = vlm.with_stand_in(name, do_resize=True, patch_size=2, merge_size=2)
    pair = [vlm.SPECIAL["<start>"], *[VIDEO] * 4, vlm.SPECIAL["<end>"]]
    inputs = {"input_ids": [1, 2, 2, *pair, 2, 2, *pair, 3], "video_grid_thw": [[2, 4, 4]]}
    [own] = video_layout(made, vlm.model(name).config, inputs, [(8, 8)])
    assert frames_of(own) == {1: [4, 5, 6, 7], 2: [12, 13, 14, 15]}
    assert vlm.others(own) == (3, 8, 9, 10, 11, 16)


def test_frames_of_smolvlm_follow_tokens_of_text_and_tags() -> None:
    """Two frames of 10 x 20 pixels, each resized to 16 x 16: 2 x 2 cells of 8 x 8."""
    settings = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    made = vlm.with_stand_in("smolvlm", do_resize=True, **settings)
    tag, whole, image = (
        vlm.SPECIAL[name] for name in ("<fake_token_around_image>", "<global-img>", "<image>")
    )
    frame = [2, 2, 2, tag, whole, *[image] * 4, tag]
    inputs = {"input_ids": [1, 2, *frame, *frame, 41], "pixel_values": np.zeros((1, 2, 3, 16, 16))}
    [own] = video_layout(made, vlm.model("smolvlm").config, inputs, [(10, 20)])
    assert frames_of(own) == {1: [7, 8, 9, 10], 2: [17, 18, 19, 20]}
    assert [(each.row, each.col) for each in own.cells] == [(1, 1), (1, 2), (2, 1), (2, 2)] * 2
    assert (own.start, own.end, own.rows, own.cols) == (5, 22, 2, 2)
    assert box_of(own, 2, 2, 1) == (0, 5, 10, 10)


def test_frames_of_internvl_follow_their_numbers() -> None:
    """Three frames of 10 x 20 pixels, each resized to 16 x 16: 2 x 2 cells of 8 x 8."""
    size = {"height": 16, "width": 16}
    made = vlm.with_stand_in("internvl", do_resize=True, size=size, do_center_crop=None)
    frame = [2, vlm.SPECIAL["<start>"], *[vlm.SPECIAL["<image>"]] * 4, vlm.SPECIAL["<end>"]]
    inputs = {"input_ids": [1, *frame * 3, 3], "pixel_values": np.zeros((3, 3, 16, 16))}
    [own] = video_layout(made, vlm.model("internvl").config, inputs, [(10, 20)])
    assert frames_of(own) == {1: [3, 4, 5, 6], 2: [10, 11, 12, 13], 3: [17, 18, 19, 20]}
    assert vlm.others(own) == (2, 7, 8, 9, 14, 15, 16, 21)
    assert box_of(own, 3, 1, 2) == (10, 0, 20, 5)


def test_frames_of_two_videos_of_internvl_are_assigned_to_their_video() -> None:
    size = {"height": 16, "width": 16}
    made = vlm.with_stand_in("internvl", do_resize=True, size=size, do_center_crop=None)
    frame = [2, vlm.SPECIAL["<start>"], *[vlm.SPECIAL["<image>"]] * 4, vlm.SPECIAL["<end>"]]
    inputs = {"input_ids": [*frame * 2, 3, *frame * 2], "pixel_values": np.zeros((4, 3, 16, 16))}
    first, second = video_layout(made, vlm.model("internvl").config, inputs, [(16, 16)] * 2)
    assert frames_of(first) == {1: [2, 3, 4, 5], 2: [9, 10, 11, 12]}
    assert frames_of(second) == {1: [17, 18, 19, 20], 2: [24, 25, 26, 27]}


STREAMS = {
    "video_llava": (8, 4, [VIDEO] * 15),
    "llava_onevision_frames": (16, 8, [VIDEO] * 13),
    "smolvlm": (16, 8, [42, 43, 55, 55, 55, 55, 42] * 3),
    "internvl": (16, 8, [56, 55, 55, 55, 55, 57] * 3),
}
"""Family → sides of frames and of cells in pixels, and the tokens of three frames."""


@pytest.mark.parametrize("name", STREAMS)
def test_changed_pixels_of_frame_change_vector_at_its_position(name: str) -> None:
    side, cell, tokens = STREAMS[name]
    size = {"height": side, "width": side}
    settings = {"size": size, "max_image_size": {"longest_edge": side}, "do_center_crop": None}
    made, config = vlm.with_stand_in(name, do_resize=True, **settings), vlm.model(name)
    shape = (3, 3, side, side) if name == "internvl" else (1, 3, 3, side, side)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    key = "pixel_values" if name in ("smolvlm", "internvl") else "pixel_values_videos"
    inputs = {"input_ids": torch.tensor([[1, 3, *tokens, 4]]), key: pixels}
    [own] = video_layout(made, config.config, inputs, [(side, side)])
    before = vlm.stream(name, inputs)
    assert len(own.cells) == 12
    for each in own.cells:
        other = pixels.clone()
        top, left = (each.row - 1) * cell, (each.col - 1) * cell
        frame = other.view(3, 3, side, side)[each.tile - 1]
        frame[:, top : top + cell, left : left + cell] += 1
        difference = (vlm.stream(name, {**inputs, key: other}) - before).norm(dim=-1)
        assert difference.nonzero().flatten().tolist() == [each.position]


@pytest.mark.parametrize("name", vlm.VIDEOS)
def test_changed_pixels_of_video_change_vector_at_position_of_processor(name: str) -> None:
    pytest.importorskip("torchvision")
    made, model = vlm.with_videos(name), vlm.model(name)
    size = (16, 16)
    video = np.stack([vlm.picture(*size, seed=n) for n in range(4)])
    inputs = vlm.video_prompt(made, vlm.FAMILIES[name].marker, video)
    [own] = video_layout(made, model.config, inputs, [size])
    before, merged = vlm.stream(name, inputs), 2 if "qwen" in name else 1
    for each in own.cells:
        assert each.box is not None
        left, top, right, bottom = (int(side) for side in each.box)
        other = video.copy()
        middle = slice(top + 1, bottom - 1), slice(left + 1, right - 1)
        other[(each.tile - 1) * merged, *middle] += 60
        after = vlm.stream(name, vlm.video_prompt(made, vlm.FAMILIES[name].marker, other))
        assert int((after - before).norm(dim=-1).argmax()) == each.position


# --- rejected processors --------------------------------------------------------------------------


def rejection(name: str, made: Any, inputs: dict[str, Any]) -> str:
    with pytest.raises(UnsupportedProcessor) as caught:
        video_layout(made, vlm.model(name).config, inputs, [(8, 8)])
    return str(caught.value)


def test_model_type_without_layout_of_videos_is_rejected_by_name() -> None:
    told = rejection("llava", vlm.processor("llava"), {"input_ids": [VIDEO]})
    assert "the positions of video tokens aren't known for models of the type `llava`" in told
    assert told.endswith(
        "known are video_llava, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, "
        "smolvlm, internvl"
    )


def test_video_processor_of_another_class_is_rejected_by_name() -> None:
    made = vlm.processor("video_llava")
    made.video_processor = object()
    told = rejection("video_llava", made, {"input_ids": [VIDEO]})
    assert "aren't known for `object` in models of the type `video_llava`" in told


def test_first_patch_that_the_model_drops_is_rejected() -> None:
    made = vlm.with_stand_in("llava_onevision_frames")
    made.vision_feature_select_strategy = "default"
    told = rejection("llava_onevision_frames", made, {"input_ids": [VIDEO]})
    assert told == "the model drops the first patch of each frame"


def test_frames_that_keep_their_size_are_rejected() -> None:
    made = vlm.with_stand_in("smolvlm", do_resize=False)
    told = rejection("smolvlm", made, {"input_ids": [VIDEO]})
    assert told == "it keeps the size of frames"


@pytest.mark.parametrize("rate", ["fast", 0, -1.0, 1e-300, float("inf"), float("nan")])
def test_invalid_rate_of_frames_is_rejected(rate: object) -> None:
    made = vlm.with_stand_in("smolvlm", fps=rate)
    with pytest.raises(UnsupportedProcessor) as caught:
        IMAGE_LAYOUTS["smolvlm"].video_text(made, vlm.model("smolvlm").config, 3)
    assert str(caught.value) == f"its `fps` is {rate!r}, not a number of frames per second"


def test_prompt_of_another_length_is_rejected_with_numbers() -> None:
    made = vlm.with_stand_in("qwen2_vl", do_resize=True, patch_size=2, merge_size=2)
    inputs = {"input_ids": [VIDEO] * 3, "video_grid_thw": [[1, 4, 4]]}
    assert rejection("qwen2_vl", made, inputs) == (
        "`Qwen2VLProcessor` prepares videos in another layout: the prompt has 3 video tokens, and "
        "its layout 4"
    )
