"""Processors of vision-language models from small settings, and models that read their prompts.

Nothing of the package is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_utils import VideoMetadata

from mechdsl.images.layouts import ImageTokens
from tests.families import build, rows_vlm
from tests.families.parts import Architecture

Pixels = NDArray[np.uint8]

TAGS = {f"<row_{row}_col_{col}>": 3 * row + col + 40 for row in (1, 2, 3) for col in (1, 2, 3)}
SPECIAL = {
    "<pad>": 0,
    "<s>": 1,
    "<unk>": 2,
    "<fake_token_around_image>": 42,
    "<global-img>": 43,
    **TAGS,
    "<end_of_utterance>": 53,
    "<video>": 54,
    "<image>": 55,
    "<start>": 56,
    "<end>": 57,
}
"""Tokens that the processors need, below `build.VOCABULARY`."""
WORDS = {"w1": 3, "w2": 4, "w3": 5, "\n": 40, "\n\n": 41}
FRAME_WORDS = ["Frame1:", "\nFrame2:", "\nFrame3:", "\nFrame4:", "3", "4", "0:00:02", "0:00:03"]
FRAME_WORDS += ["video.\n\nFrame", "\nFrame", "00:00:", "00:01:", "00:02:", "00:03:"]
"""Words that processors write between frames."""
NAMED = {
    "image_token": "<image>",
    "video_token": "<video>",
    "fake_image_token": "<fake_token_around_image>",
    "image_boundary_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "boi_token": "<start>",
    "eoi_token": "<end>",
    "start_image_token": "<start>",
    "end_image_token": "<end>",
    "context_image_token": "<image>",
    "vision_start_token": "<start>",
    "vision_end_token": "<end>",
}


def tokenizer(*, dense: bool = False) -> PreTrainedTokenizerFast:
    """Words between blanks, and `<s>` before each text.

    dense: all numbers below the size of the models' vocabularies are tokens. Those that a processor
    adds get numbers from the size of the vocabulary on.
    """
    known = {**SPECIAL, **WORDS}
    others = set(range(build.VOCABULARY)) - {*known.values()} if dense else ()
    known |= {f"other{number}": number for number in others}
    if not dense:
        known |= {word: 6 + number for number, word in enumerate(FRAME_WORDS)}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="<end_of_utterance>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=NAMED,
    )


@dataclass(frozen=True)
class Family:
    """A processor and a model from small settings."""

    processor: str
    """The class in transformers."""
    images: str
    """The class of the image processor, without `Pil`."""
    settings: Mapping[str, Any]
    """The image processor's settings."""
    also: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The processor's settings."""
    row: str = ""
    """The row in `tests/families/rows_vlm.py`; the family's name if empty."""
    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Changes of the model's config."""
    marker: str = "<image>"
    """The text that marks an image in a prompt."""
    before_end: str = ""
    """Text at the end of a prompt, before the line break that the processor writes."""
    tower: str = "model.vision_tower"


CROP = {"height": 8, "width": 8}
CLIP_PATCHES = {
    "patch_size": 4,
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}
ANYRES = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
ONEVISION = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16], [24, 24]]}
QWEN = {
    "patch_size": 2,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 256},
}
SPLIT = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
SQUARE = {"size": {"height": 16, "width": 16}}
PATCH_2 = {**rows_vlm.SIGLIP, "image_size": 16, "patch_size": 2}

LONG = {"max_position_embeddings": 128}

FAMILIES: Mapping[str, Family] = {
    "llava": Family(
        "LlavaProcessor",
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 8}, "crop_size": CROP},
        CLIP_PATCHES,
    ),
    "llava_pad": Family(
        "LlavaProcessor",
        "LlavaImageProcessor",
        {"size": {"shortest_edge": 8}, "crop_size": CROP, "do_pad": True},
        CLIP_PATCHES,
        row="llava",
    ),
    "llava_class": Family(
        "LlavaProcessor",
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 8}, "crop_size": CROP},
        {**CLIP_PATCHES, "vision_feature_select_strategy": "full"},
        row="llava",
        overrides={"vision_feature_select_strategy": "full"},
    ),
    "vipllava": Family(
        "LlavaProcessor",
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 8}, "crop_size": CROP},
        CLIP_PATCHES,
    ),
    "video_llava": Family(
        "VideoLlavaProcessor",
        "VideoLlavaImageProcessor",
        {"size": {"shortest_edge": 8}, "crop_size": CROP},
        CLIP_PATCHES,
        tower="model.image_tower",
    ),
    "llava_next": Family(
        "LlavaNextProcessor",
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 8}, "crop_size": CROP, **ANYRES},
        CLIP_PATCHES,
        overrides=ANYRES,
    ),
    "llava_next_square": Family(
        "LlavaNextProcessor",
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 8}, "crop_size": CROP, "image_grid_pinpoints": [[24, 24]]},
        CLIP_PATCHES,
        row="llava_next",
        overrides={"image_grid_pinpoints": [[24, 24]]},
    ),
    "llava_onevision": Family(
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        {"size": CROP, **ONEVISION},
        {
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
        },
        overrides={**ONEVISION, "vision_aspect_ratio": "anyres_max_4"},
    ),
    "llava_onevision_frames": Family(
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        {"size": {"height": 16, "width": 16}, "image_grid_pinpoints": [[16, 16]]},
        {
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
        },
        row="llava_onevision",
        overrides={
            "vision_config": {**rows_vlm.SIGLIP, "image_size": 16},
            "image_grid_pinpoints": [[16, 16]],
        },
    ),
    "qwen2_vl": Family(
        "Qwen2VLProcessor",
        "Qwen2VLImageProcessor",
        QWEN,
        marker="<start><image><end>",
        tower="model.visual",
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLProcessor",
        "Qwen2VLImageProcessor",
        QWEN,
        marker="<start><image><end>",
        tower="model.visual",
    ),
    "qwen3_vl": Family(
        "Qwen3VLProcessor",
        "Qwen2VLImageProcessor",
        QWEN,
        marker="<start><image><end>",
        tower="model.visual",
    ),
    "idefics2": Family(
        "Idefics2Processor",
        "Idefics2ImageProcessor",
        {"size": {"shortest_edge": 4, "longest_edge": 8}, "do_image_splitting": True},
        {"image_seq_len": 3},
        tower="model.vision_model",
    ),
    "idefics2_wide": Family(  # its final token sees all tokens of an image
        "Idefics2Processor",
        "Idefics2ImageProcessor",
        {"size": {"shortest_edge": 4, "longest_edge": 8}, "do_image_splitting": True},
        {"image_seq_len": 3},
        row="idefics2",
        overrides={
            "text_config": {**rows_vlm.TEXT, "model_type": "mistral", "sliding_window": 64},
        },
        tower="model.vision_model",
    ),
    "idefics3": Family(
        "Idefics3Processor",
        "Idefics3ImageProcessor",
        SPLIT,
        {"image_seq_len": 4},
        tower="model.vision_model",
    ),
    "smolvlm": Family(
        "SmolVLMProcessor",
        "SmolVLMImageProcessor",
        SPLIT,
        {"image_seq_len": 4},
        overrides={"text_config": {**rows_vlm.IDEFICS3["text_config"], **LONG}},
        tower="model.vision_model",
    ),
    "paligemma": Family(
        "PaliGemmaProcessor",
        "SiglipImageProcessor",
        {"size": CROP, "image_seq_length": 4},
        before_end=" ",
    ),
    "paligemma2": Family(
        "PaliGemmaProcessor",
        "SiglipImageProcessor",
        {"size": CROP, "image_seq_length": 4},
        row="paligemma/2",
        before_end=" ",
    ),
    "internvl": Family(
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        {**SQUARE, "min_patches": 1, "max_patches": 4},
        {"image_seq_length": 4},
        overrides={"text_config": {**rows_vlm.TEXT, "model_type": "qwen2", **LONG}},
    ),
    "gemma3": Family(
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        SQUARE,
        {"image_seq_length": 4},
        overrides={"vision_config": PATCH_2},
        marker="<start>",
    ),
    "gemma3_pan": Family(
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        SQUARE,
        {"image_seq_length": 4},
        row="gemma3",
        overrides={"vision_config": PATCH_2},
        marker="<start>",
    ),
    "idefics3_whole": Family(
        "Idefics3Processor",
        "Idefics3ImageProcessor",
        {**SPLIT, "do_image_splitting": False},
        {"image_seq_len": 4},
        row="idefics3",
        tower="model.vision_model",
    ),
}
PAN_AND_SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 8,
    "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}

VIDEO_LLAVA = Architecture(
    "video_llava",
    {**rows_vlm.LLAVA, "video_token_index": SPECIAL["<video>"]},
    rows_vlm.language(),
    build="VideoLlavaForConditionalGeneration",
    takes="image and text",
)


def architecture(name: str) -> Architecture:
    """Return the row of a family's model."""
    rows = {each.name: each for each in (*rows_vlm.TABLE, VIDEO_LLAVA)}
    return rows[FAMILIES[name].row or name]


@cache
def model(name: str) -> nn.Module:
    """Return a model with random weights whose vision encoder has no attention."""
    family = FAMILIES[name]
    made = build.model(architecture(name), **family.overrides)
    for path, part in made.named_modules():
        of_tower = path.startswith((family.tower, "model.video_tower"))
        if of_tower and path.rpartition(".")[2] in ("self_attn", "attn", "attention"):
            part.register_forward_hook(_no_attention)
    return made


def _no_attention(_: nn.Module, __: Any, output: Any) -> Any:
    """Replace the output of attention by zeros, so that patches don't mix."""
    if isinstance(output, tuple):
        return torch.zeros_like(output[0]), *output[1:]
    return torch.zeros_like(output)


def processor(name: str, backend: str = "Pil") -> Any:
    """Return a processor. backend: the end of the image processor's class.

    Some need torchvision for videos only: here they have no video processor. Without `num2words`,
    numbers of frames are digits.
    """
    import transformers

    family = FAMILIES[name]
    images: Any = getattr(transformers, family.images)
    images = getattr(transformers, f"{family.images}{backend}", images)
    kind = getattr(transformers, family.processor)
    with_video = "video_processor" in kind.get_attributes()
    given: dict[str, Any] = {"video_processor": None} if with_video else {}
    module: Any = import_module(kind.__module__)
    if hasattr(module, "num2words"):
        module.num2words = str
    with patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        made = kind(
            image_processor=images(**family.settings),
            tokenizer=tokenizer(dense=bool(family.before_end)),
            **given,
            **family.also,
        )
    if name == "gemma3_pan":
        if not hasattr(made, "images_kwargs"):
            pytest.skip("this transformers has no settings of a processor's images")
        made.images_kwargs = {**made.images_kwargs, **PAN_AND_SCAN}
    return made


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """Return an image of noise, [height, width, 3]."""
    generator = np.random.default_rng(seed)
    return generator.integers(60, 190, (height, width, 3), dtype=np.uint8)


def prompt(made: Any, marker: str, images: Sequence[Pixels]) -> Mapping[str, Any]:
    """Return the processor's output for `w1 IMAGE w2 IMAGE w3`."""
    text = " ".join(f"w1 {marker} w2" for _ in images)
    return made(
        text=[f"{text} w3"],
        images=[[Image.fromarray(each) for each in images]],
        return_tensors="pt",
    )


@torch.no_grad()
def stream(name: str, inputs: Mapping[str, Any]) -> Tensor:
    """Return the input of the first block of the language model, [position, feature]."""
    made, seen = model(name), list[Tensor]()
    block = made.get_submodule(f"{architecture(name).main.blocks}.0")

    def keep(_: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        seen.append(positional[0] if positional else named["hidden_states"])

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        left_out = ("labels", "text_replacement_offsets")
        made(**{key: value for key, value in inputs.items() if key not in left_out})
    finally:
        handle.remove()
    return seen[0][0]


# --- videos ---------------------------------------------------------------------------------------

QWEN_VIDEO = {**QWEN, "size": {"shortest_edge": 64, "longest_edge": 2048}}
VIDEOS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "video_llava": (
        "VideoLlavaVideoProcessor",
        {"size": {"shortest_edge": 8}, "crop_size": CROP},
    ),
    "llava_onevision_frames": (
        "LlavaOnevisionVideoProcessor",
        {"size": {"height": 16, "width": 16}},
    ),
    "qwen2_vl": ("Qwen2VLVideoProcessor", QWEN_VIDEO),
    "qwen2_5_vl": ("Qwen2VLVideoProcessor", QWEN_VIDEO),
    "qwen3_vl": ("Qwen3VLVideoProcessor", QWEN_VIDEO),
    "smolvlm": ("SmolVLMVideoProcessor", {**SPLIT, "fps": 1}),
    "internvl": ("InternVLVideoProcessor", SQUARE),
}
"""Family → class and settings of its video processor."""


def with_stand_in(name: str, **settings: Any) -> Any:
    """Return a processor whose video processor has only a class name and settings."""
    made = processor(name)
    made.video_processor = type(VIDEOS[name][0], (SimpleNamespace,), {})(**settings)
    return made


def with_videos(name: str) -> Any:
    """Return a processor that prepares videos; without torchvision, by `_StandIn`."""
    import transformers

    kind, settings = VIDEOS[name]
    if not is_torchvision_available():
        made = processor(name)
        made.video_processor = type(kind, (_StandIn,), {})(settings)
        return made
    made = processor(name, "")
    made.video_processor = getattr(transformers, kind)(do_sample_frames=False, **settings)
    return made


class _StandIn(dict[str, Any]):
    """A video processor that resizes frames with Pillow; a dictionary, to be written as JSON."""

    do_resize = True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.__dict__.update(settings, do_center_crop="crop_size" in settings)

    def __call__(self, videos: Any, video_metadata: Any, **_: Any) -> dict[str, Any]:
        metadata = [VideoMetadata(**each) for each in video_metadata]
        frames = [np.stack([self._prepared(own) for own in each]) for each in videos]
        if not hasattr(self, "merge_size"):
            pixels = torch.tensor(np.stack(frames)).movedim(-1, 2)
            if hasattr(self, "max_image_size"):
                mask = torch.ones(pixels[:, :, 0].shape, dtype=torch.int64)
                names = "pixel_values", "pixel_attention_mask", "video_metadata"
                return dict(zip(names, (pixels, mask, metadata), strict=True))
            return {"pixel_values_videos": pixels, "video_metadata": metadata}
        made = [self._patches(each) for each in frames]
        return {
            "pixel_values_videos": torch.cat([patches for patches, _ in made]),
            "video_grid_thw": torch.tensor([grid for _, grid in made]),
            "video_metadata": metadata,
        }

    def _prepared(self, frame: Pixels) -> NDArray[np.float32]:
        """Return [height, width, 3] from -1 to 1; Qwen's frames keep their size."""
        size: Mapping[str, int] = self.__dict__["size"]
        side = size.get("height", size["shortest_edge"] if "crop_size" in self.__dict__ else 0)
        side = self.__dict__.get("max_image_size", {}).get("longest_edge", side)
        image = Image.fromarray(frame)
        image = image.resize((side, side)) if side else image
        return np.asarray(image, np.float32) / 127.5 - 1

    def _patches(self, frames: NDArray[np.float32]) -> tuple[Tensor, list[int]]:
        """Return [patch, feature], merged patches next to each other, and the grid."""
        patch, merge = (self.__dict__[name] for name in ("patch_size", "merge_size"))
        frames = np.concatenate([frames, frames[-1:]])[: len(frames) + len(frames) % 2]
        pairs, height, width = len(frames) // 2, *(side // patch for side in frames.shape[1:3])
        split = torch.tensor(frames).unflatten(0, (pairs, 2))
        split = split.unflatten(3, (width // merge, merge, patch))
        split = split.unflatten(2, (height // merge, merge, patch))
        # pair, frame, row, its part, y, column, its part, x, channel
        order = split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
        return order.flatten(5).flatten(0, 4), [pairs, height, width]


def video_prompt(made: Any, marker: str, video: Pixels) -> Mapping[str, Any]:
    """Return the processor's output for `w1 VIDEO w2`. video: [frame, height, width, 3]."""
    text = f"w1 {marker.replace('<image>', '<video>')} w2"
    return made(text=[text], videos=[video], return_tensors="pt")


def others(own: ImageTokens) -> tuple[int, ...]:
    """The tokens of an image that read no part of it."""
    cells = {cell.position for cell in own.cells}
    return tuple(at for at in range(own.start, own.end) if at not in cells)
