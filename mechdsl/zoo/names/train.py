"""Trains the names model: `python -m mechdsl.zoo.names.train --out DIR`."""

# pyright: reportUnknownMemberType=false
# (signatures of torch and transformers are only partly typed)

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from mechdsl.zoo import language, words
from mechdsl.zoo.commands import train_command
from mechdsl.zoo.names.data import stream, vocabulary

SEED = 0
STEPS = 3500
BATCH = 64  # texts
LEARNING_RATE = 2e-3
OTHER_WEIGHT = 0.1  # words that aren't asked: a language model, but the answers count most
MAX_POSITIONS = 128


def model_config() -> GPT2Config:
    """The shape: 4 layers, 6 heads, width 144, learned positions, layer norms, tied embeddings."""
    known = vocabulary()
    return GPT2Config(
        vocab_size=len(known),
        n_positions=MAX_POSITIONS,
        n_embd=144,
        n_layer=4,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=known.index("<s>"),
        pad_token_id=known.index("<pad>"),
        eos_token_id=None,
        architectures=["GPT2LMHeadModel"],
    )


def build_tokenizer() -> Tokenizer:
    """Words and punctuation marks are tokens."""
    return language.build_tokenizer(vocabulary())


def save_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS)


def train(seed: int, steps: int) -> GPT2LMHeadModel:
    """A model trained from scratch on `steps` batches."""
    torch.manual_seed(seed)
    config = model_config()
    model = GPT2LMHeadModel(config)
    drawn = stream(seed, held_out=False)
    pad: int = config.pad_token_id or 0
    data = language.batches(drawn, seed, BATCH, build_tokenizer(), pad)
    language.fit(model, data, steps=steps, rate=LEARNING_RATE, other_weight=OTHER_WEIGHT)
    return model.eval()


def main() -> None:
    """The command line."""
    train_command(
        __doc__, train, save_tokenizer, seed=SEED, steps=STEPS, threads=1, dtype=torch.float16
    )


if __name__ == "__main__":
    main()
