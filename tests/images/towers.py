"""Tiny models with a tower for images and one for texts, and scores by plain hooks on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mechdsl.base.source import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.loading.load import adopt
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..execute.support import MODES, run_on, unchanged
from ..families.parts import Heads, Stack
from ..families.rows_vision import CLIP
from ..reference import hooks
from ..reference.hooks import Change, Session
from . import support

NAMES = ("clip", "siglip", "metaclip_2")
OLD = "old clip"
"""Its config doesn't name the token that ends a text, which is taken to have the largest id."""
SIDE, PATCH = support.SIDE, support.PATCH
GRID = SIDE // PATCH
FRONT = {"clip": 1, "siglip": 0, "metaclip_2": 1, OLD: 1}
WORDS = ("a", "photo", "of", "the", "red", *support.LABELS, "and", "blue", "small")
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
LONGEST = 12
LAYERS, HEADS, WIDTH = 3, 4, 32
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
    """The whole model in 32 bits, with weights so wide that every head matters."""
    kinds = {"clip": "CLIP", "siglip": "Siglip", "metaclip_2": "MetaClip2", OLD: "CLIP"}
    prefix = kinds[name]
    text, vision, more = dict(_TEXT), dict(_VISION), {}
    if name == OLD:
        text["eos_token_id"] = 2
    if name != "siglip":
        text["projection_dim"] = vision["projection_dim"] = 24
        more = {"projection_dim": 24}
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text, vision_config=vision, **more
    )
    config._attn_implementation = "eager"
    model: Any = getattr(transformers, f"{prefix}Model")(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() < 2 and not path.endswith("class_embedding"):
                continue
            wide = 0.7 if "embedding" in path else 1.6 / weight.shape[-1] ** 0.5
            weight.copy_(wide * torch.randn(weight.shape, generator=generator))
        model.logit_scale.fill_(2.5)
        if name == "siglip":
            model.logit_bias.fill_(-1.5)
    return unchanged(model)


@cache
def double(name: str) -> Any:
    import copy

    return unchanged(copy.deepcopy(bare(name)).double())


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Words; in front `<s>` but for SigLIP, behind `</s>`."""
    ids = {word: n for n, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(SPECIAL))
    single = "$A </s>" if name == "siglip" else "<s> $A </s>"
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


def images_of(name: str) -> Any:
    """What makes images ready."""
    return support.processor("siglip" if name == "siglip" else "clip")


@cache
def shared(name: str) -> LoadedModel:
    model, found = adopt("m", bare(name), (images_of(name), tokenizer(name)))
    assert model is not None, [(d.message, d.label_text) for d in found]
    assert not [d for d in found if d.severity == "error"], [d.message for d in found]
    return model


# --- files ----------------------------------------------------------------------------------------

BLOCKS = """
images scenes {
  rows "data.jsonl"
  image "{file}"
  answer "a photo of a {label}"
  wrong "the {other}"
  classes "a photo of a {label}"
}
images neutral {
  image gray
}
"""


def run_file(
    text: str, folder: Path, name: str, mode: str = "planned", blocks: str = BLOCKS
) -> dict[str, ExperimentResult]:
    return support.succeeded(*try_file(text, folder, name, mode, blocks))


def try_file(
    text: str, folder: Path, name: str, mode: str = "planned", blocks: str = BLOCKS
) -> tuple[FileResult | None, list[Diagnostic]]:
    support.write_images(folder)
    whole = f'mech 1\nmodel m = local("handed over")\n{blocks}\n{text}'
    return run_on(Source(whole, folder / "file.mech"), {"m": shared(name)}, MODES[mode])


# --- one image and one text by plain hooks --------------------------------------------------------


def answer(number: int) -> str:
    return f"a photo of a {support.ANSWERS[number]}"


def wrong(number: int) -> str:
    return f"the {support.WRONG[number]}"


@cache
def pixels(name: str, number: int | None) -> Tensor:
    """[1, 3, side, side] of a file, or of gray (None), as the library's processor makes it."""
    given = support.GRAY if number is None else support.image(number)
    found = images_of(name)(Image.fromarray(given), return_tensors="pt")["pixel_values"]
    return found.double()


@cache
def inputs(name: str, text: str) -> Mapping[str, Tensor]:
    """As the model's processor gives them: SigLIP's texts are padded to the longest there are."""
    padding = "max_length" if name == "siglip" else False
    given = tokenizer(name)(text, return_tensors="pt", padding=padding, max_length=LONGEST)
    names = ("input_ids",) if name == "siglip" else ("input_ids", "attention_mask")
    return {key: given[key] for key in names}


def stack(tower: str) -> Stack:
    """Where the sites of a tower are; those of all these models are called alike."""
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


@dataclass(frozen=True)
class Seen:
    """What a pass over one image and one text gave."""

    score: float
    sites: Mapping[tuple[str, int], Tensor]
    """(site, layer) of the tower that is looked at → [T, units, width]."""


@torch.no_grad()
def forward(
    name: str,
    given: Tensor,
    text: str,
    writes: Mapping[tuple[str, int], Sequence[Change]] | None = None,
    tower: str = "vision_model",
) -> Seen:
    """One image and one text through the bare model in 64 bits, with vectors written in a tower."""
    module = double(name)
    sessions: list[Session] = []
    with ExitStack() as opened:
        for layer in range(LAYERS):
            own = [(site, changes) for (site, at), changes in (writes or {}).items() if at == layer]
            session = Session(own or [("", ())])
            sessions.append(session)
            opened.enter_context(hooks.hooked(module, stack(tower), layer, session))
        output = module(pixel_values=given, **inputs(name, text))
    assert output.logits_per_image.shape == (1, 1)
    sites = {
        (site, layer): value
        for layer, session in enumerate(sessions)
        for site, value in session.seen.items()
    }
    return Seen(float(output.logits_per_image), sites)
