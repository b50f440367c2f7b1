"""Trains the dual encoder: `python -m zoo.dual.train`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.random import default_rng
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, ViTForImageClassification

from zoo import MODELS, language, pictures, words
from zoo.commands import train_command
from zoo.dual.data import END, PARTS, SPECIAL, alike, caption, fits, told, vocabulary
from zoo.pictures import Scene

SEED = 0
STEPS = 1400
NAMED_STEPS = 700
BATCH = 48  # images, each with a caption
LEARNING_RATE = 1e-3
SHAPES = MODELS / "shapes"
WIDTH = 96
SHARED = 64  # dimensions of the space that images and captions meet in
TOWER = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "projection_dim": SHARED,
    "hidden_act": "gelu",
}
MAX_POSITIONS = 16


def model_config() -> CLIPConfig:
    """The shape: 4 layers for images (64 patches of 4 × 4 pixels), 3 for captions, 4 heads, width
    96, and 64 dimensions to meet in."""
    known = vocabulary()
    named = {name: known.index(f"<{name}>") for name in ("s", "end", "pad")}
    ids = {"bos_token_id": named["s"], "eos_token_id": named["end"], "pad_token_id": named["pad"]}
    return CLIPConfig(
        text_config={
            **TOWER,
            **ids,
            "num_hidden_layers": 3,
            "vocab_size": len(known),
            "max_position_embeddings": MAX_POSITIONS,
        },
        vision_config={
            **TOWER,
            "num_hidden_layers": 4,
            "image_size": pictures.SIZE,
            "patch_size": pictures.PATCH,
        },
        projection_dim=SHARED,
        architectures=["CLIPModel"],
    )


def build_tokenizer() -> Tokenizer:
    """Words are tokens; `<end>` stands behind every caption, where the model reads it off."""
    return language.build_tokenizer(vocabulary(), SPECIAL, END)


def save_processors(folder: Path) -> None:
    """Writes the tokenizer and what prepares images."""
    words.save_tokenizer(
        build_tokenizer(), folder, longest=MAX_POSITIONS, end=END, padding_side="right"
    )
    pictures.save_processor(folder, "CLIPImageProcessor", crops=True)


def encode(tokenizer: Tokenizer, texts: Sequence[str], pad: int) -> dict[str, Tensor]:
    """Captions as the model takes them, padded behind their end."""
    rows = [each.ids for each in tokenizer.encode_batch(list(texts))]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {"input_ids": ids, "attention_mask": torch.tensor(mask)}


def contrast(scores: Tensor, also_true: Tensor) -> Tensor:
    """The loss of scores [image, caption] whose diagonal is right. also_true: other captions that
    are true of an image, which neither help nor harm."""
    left = scores.masked_fill(also_true, -math.inf)
    right = torch.arange(len(scores))
    of_images = nn.functional.cross_entropy(left, right)
    return (of_images + nn.functional.cross_entropy(left.T, right)) / 2


@torch.no_grad()
def begin_with_shapes(seeing: Any) -> None:
    """Gives a new encoder of images the places, patches and first layers of zoo("shapes")."""
    source: Any = pictures.load(ViTForImageClassification, SHAPES).vit
    of, to = source.embeddings, seeing.embeddings
    to.patch_embedding.weight.copy_(of.patch_embeddings.projection.weight)
    to.position_embedding.weight.copy_(of.position_embeddings[0])
    to.position_embedding.weight[1:] += of.patch_embeddings.projection.bias
    to.class_embedding.copy_(of.cls_token[0, 0])
    for layer, known in zip(seeing.encoder.layers, source.layers, strict=False):
        for part in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, part).load_state_dict(
                getattr(known.attention, part).state_dict()
            )
        layer.self_attn.out_proj.load_state_dict(known.attention.o_proj.state_dict())
        layer.layer_norm1.load_state_dict(known.layernorm_before.state_dict())
        layer.layer_norm2.load_state_dict(known.layernorm_after.state_dict())
        layer.mlp.load_state_dict(known.mlp.state_dict())


class Named(nn.Module):
    """Asks the encoder of images for kind, colour and texture, in the first steps of a training
    and ever less: its first layers, those of zoo("shapes"), look past textures. It isn't kept."""

    def __init__(self) -> None:
        super().__init__()
        self.named = nn.Linear(SHARED, sum(map(len, PARTS)))

    def forward(self, seen: Tensor, scenes: Sequence[Scene], step: int) -> Tensor:
        """What is added to the loss. seen: [image, SHARED]."""
        each = self.named(seen).split([len(names) for names in PARTS], -1)
        lost = [
            nn.functional.cross_entropy(
                logits, torch.tensor([names.index(scene[n]) for scene in scenes])
            )
            for n, (logits, names) in enumerate(zip(each, PARTS, strict=True))
        ]
        return max(0.0, 1 - step / NAMED_STEPS) * torch.stack(lost).sum()


def train(seed: int, steps: int) -> CLIPModel:
    """A model after `steps` batches."""
    torch.manual_seed(seed)
    model: Any = CLIPModel(model_config())
    begin_with_shapes(model.vision_model)
    random, named = default_rng(seed), Named()
    tokenizer, pad = build_tokenizer(), vocabulary().index("<pad>")

    def loss(step: int) -> tuple[Tensor, Tensor]:
        if step % 2:
            seen = alike(random)
            said = seen
        else:
            known = pictures.scenes(False)
            seen = [known[int(random.integers(len(known)))] for _ in range(BATCH)]
            said = [told(each, random) for each in seen]
        drawn = [pictures.of_scene(each, random) for each in seen]
        texts = encode(tokenizer, [caption(*each) for each in said], pad)
        found = model(pixel_values=pictures.as_input([each.pixels for each in drawn]), **texts)
        scores: Tensor = found.logits_per_image
        true = torch.tensor([[fits(text, image) for text in said] for image in seen])
        right = true[torch.arange(len(seen)), scores.argmax(-1)].float().mean()
        others = true & ~torch.eye(len(seen), dtype=torch.bool)
        asked = named(found.vision_model_output.pooler_output, seen, step)
        return contrast(scores, others) + asked, right

    trained = [*model.parameters(), *named.parameters()]
    language.optimise(trained, loss, steps=steps, rate=LEARNING_RATE)
    return model


def main() -> None:
    """The command line."""
    train_command(
        __doc__,
        train,
        save_processors,
        folder=MODELS / "dual",
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
