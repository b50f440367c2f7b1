"""Tiny models with an image tower and a text tower, and their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..families.parts import Heads, Stack
from ..families.rows_vision import CLIP
from ..shared_models import unchanged

NAMES = ("clip/dual", "siglip/dual", "metaclip_2/dual")
OLD = "clip/old"
"""Its config doesn't name the EOS token; the model uses the token with the largest id."""
Tower = Literal["vision_model", "text_model"]
PADDED = ("siglip/dual",)
"""Models that pad texts to the maximum length; only these add a bias to scores."""
SIDE, PATCH = 16, 4
LABELS = ("circle", "square", "triangle", "cross", "ring")
WORDS = ("a", "photo", "of", "the", "red", *LABELS, "and", "blue", "small")
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
LONGEST = 12
LAYERS, HEADS, WIDTH = 3, 4, 32
_KINDS = {
    "clip/dual": "CLIP", "siglip/dual": "Siglip", "metaclip_2/dual": "MetaClip2", OLD: "CLIP"
}  # fmt: skip
_TOWER: Mapping[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "hidden_act": "gelu",
}
_TEXT: Mapping[str, Any] = {
    **_TOWER,
    "vocab_size": len(SPECIAL) + len(WORDS),
    "max_position_embeddings": LONGEST,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_VISION: Mapping[str, Any] = {**_TOWER, "image_size": SIDE, "patch_size": PATCH}


@cache
def bare(name: str) -> Any:
    """The whole model in fp32, with weights so large that every head matters."""
    prefix = _KINDS[name]
    text, vision, more = dict(_TEXT), dict(_VISION), {}
    if name == OLD:
        text["eos_token_id"] = 2
    if name not in PADDED:
        text["projection_dim"] = vision["projection_dim"] = 24
        more = {"projection_dim": 24}
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text, vision_config=vision, **more
    )
    model: Any = getattr(transformers, f"{prefix}Model")(config).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() < 2 and not path.endswith("class_embedding"):
                continue
            wide = 0.7 if "embedding" in path else 1.6 / weight.shape[-1] ** 0.5
            wide *= 1.4 if "q_proj" in path or "k_proj" in path else 1
            weight.copy_(wide * torch.randn(weight.shape, generator=generator))
        model.logit_scale.fill_(2.5)
        if name in PADDED:
            model.logit_bias.fill_(-1.5)
    return unchanged(model)


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A word tokenizer; texts begin with `<s>`, except for SigLIP, and end with `</s>`."""
    ids = {word: n for n, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(SPECIAL))
    single = "$A </s>" if name in PADDED else "<s> $A </s>"
    named = [(word, ids[word]) for word in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=LONGEST,
        padding_side="right",
    )


@cache
def inputs(name: str, *texts: str) -> Mapping[str, Tensor]:
    """Model inputs as its processor returns them, for texts of equal length."""
    padding = "max_length" if name in PADDED else False
    given = tokenizer(name)(list(texts), return_tensors="pt", padding=padding, max_length=LONGEST)
    names = ("input_ids",) if name in PADDED else ("input_ids", "attention_mask")
    return {key: given[key] for key in names}


def stack(tower: Tower) -> Stack:
    """Module paths of the sites of a tower, which are the same in all these models."""
    own = Heads("self_attn.q_proj", HEADS, WIDTH // HEADS)
    block = replace(
        CLIP,
        q=own,
        k=replace(own, path="self_attn.k_proj"),
        v=replace(own, path="self_attn.v_proj"),
        width=WIDTH // HEADS,
    )
    embed = "embeddings" if tower == "vision_model" else "embeddings.token_embedding"
    return Stack(f"{tower}.encoder.layers", LAYERS, block, embed=(f"{tower}.{embed}", "out"))
