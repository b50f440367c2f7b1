"""Write the model of `examples/systems/06-subspace-illusion.mech`, and its directions.

It is a transformer whose MLP is the three-unit example of Makelov et al. 2023 (arXiv 2311.17030):
h = x (1, 0, 1), output h · (0, 2, 1) = x. The number x is a token. The model has no attention, and
its logits depend on the MLP's output alone. Run it with `python -m zoo.illusion`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[1] / "examples" / "systems" / "illusion"
DIRECTIONS = FOLDER.parent / "illusion-directions.safetensors"
NUMBERS = {"minus_two": -2.0, "minus_one": -1.0, "zero": 0.0, "one": 1.0, "two": 2.0}
WORDS = ["<s>", "<pad>", "<unk>", "the", *NUMBERS, "up", "down"]
SCALE = 0.25
"""x times this stands in the stream, so that its norm can be constant."""
NUMBER, FIXED, OUTPUT = (0, 1), (2, 3), 4
"""Coordinates of the stream: x and −x, a complement that keeps the norm, and the MLP's output."""


def config() -> GPT2Config:
    return GPT2Config(
        vocab_size=len(WORDS),
        n_positions=8,
        n_embd=5,
        n_layer=1,
        n_head=1,
        n_inner=3,
        activation_function="linear",
        layer_norm_epsilon=1e-12,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def model() -> GPT2LMHeadModel:
    made = GPT2LMHeadModel(config())
    weights: dict[str, Any] = dict(made.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            weight.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        embedding = weights["transformer.wte.weight"]
        for word, x in NUMBERS.items():
            row, x = embedding[WORDS.index(word)], x * SCALE
            rest = (2.5 - x * x) ** 0.5  # a variance of 1, so that the norm changes nothing
            row[list(NUMBER)] = torch.tensor([x, -x])
            row[list(FIXED)] = torch.tensor([rest, -rest])
        first = weights["transformer.h.0.mlp.c_fc.weight"]
        first[NUMBER[0]] = torch.tensor([1.0, 0.0, 1.0]) / SCALE
        second = weights["transformer.h.0.mlp.c_proj.weight"]
        second[:, OUTPUT] = torch.tensor([0.0, 2.0, 1.0])
        head = weights["lm_head.weight"]
        head[WORDS.index("up"), OUTPUT] = 1.0
        head[WORDS.index("down"), OUTPUT] = -1.0
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=8, **special)


def directions() -> dict[str, torch.Tensor]:
    """Directions of the three units."""
    return {
        "illusion": torch.tensor([1.0, 1.0, 0.0]),
        "disconnected": torch.tensor([1.0, 0.0, 0.0]),
        "dormant": torch.tensor([0.0, 1.0, 0.0]),
        "faithful": torch.tensor([0.0, 0.0, 1.0]),
    }


def main() -> None:
    model().save_pretrained(FOLDER)
    tokenizer().save_pretrained(FOLDER)
    save_file(directions(), DIRECTIONS)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    for path in FOLDER.glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
