"""Tiny vision-language models with random weights and their processors, in folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

_WORDS = (
    "how many dots are there ? answer : what is in the first second picture 0 1 2 3 4 5 6 7 8 9 "
    "red green blue circle square and"
)
WORDS = _WORDS.split()
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
SIDE = 24
"""Height and width of the images that a model reads."""
PATCH = 8
GRID = SIDE // PATCH
LAYERS = 3


def tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of words, with the image token among its special tokens."""
    vocabulary = {token: n for n, token in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        made.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


VOCABULARY = len(SPECIAL) + len(WORDS)
IMAGE_ID = SPECIAL.index("<image>")
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 12,
}
MEAN = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}


def build(config: dict[str, Any], model_type: str) -> Any:
    """A model whose weights are large enough for effects of more than a tenth of a logit."""
    torch.manual_seed(0)
    made = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **config))
    for name, weight in made.named_parameters():
        with torch.no_grad():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.6 if "embed" in name else 0.35)
    with torch.no_grad():  # replies contain no special tokens
        made.get_output_embeddings().weight[: len(SPECIAL)] = 0
    return made.eval()


def llava(folder: Path, *, kind: str = "llava", **changes: Any) -> Path:
    """LLaVA with a CLIP tower; uses all tokens of its last block except the class token."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    config = {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": CLIP,
        "image_token_index": IMAGE_ID,
        "vision_feature_layer": -1,
        **changes,
    }
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False, **MEAN)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return saved(folder, build(config, kind), processor)


def saved(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {"llava": llava}
