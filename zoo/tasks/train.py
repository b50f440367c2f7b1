"""Trains the tasks model: `python -m zoo.tasks.train`."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import MODELS, language, words
from zoo.commands import train_command
from zoo.tasks.data import stream, vocabulary

SEED = 0
STEPS = 800
BATCH = 64  # texts
LEARNING_RATE = 3e-3
OTHER_WEIGHT = 0.05
MAX_POSITIONS = 64


def model_config() -> LlamaConfig:
    """The shape: 4 layers, 4 heads, width 96, rotary positions, RMS norms."""
    return language.llama_config(
        vocabulary(), width=96, hidden=256, layers=4, positions=MAX_POSITIONS
    )


def build_tokenizer() -> Tokenizer:
    """Words and punctuation marks are tokens."""
    return language.build_tokenizer(vocabulary())


def save_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS)


def train(seed: int, steps: int) -> LlamaForCausalLM:
    """A model after `steps` batches."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    pad: int = model.config.pad_token_id or 0
    drawn = stream(seed, held_out=False)
    data = language.batches(drawn, seed, BATCH, build_tokenizer(), pad)
    language.fit(model, data, steps=steps, rate=LEARNING_RATE, other_weight=OTHER_WEIGHT)
    return model


def main() -> None:
    """The command line."""
    train_command(
        __doc__,
        train,
        save_tokenizer,
        folder=MODELS / "tasks",
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
