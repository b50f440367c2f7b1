"""Trains the model of years: `python -m zoo.years.train`."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import MODELS, language, words
from zoo.commands import train_command
from zoo.years.data import stream, vocabulary

SEED = 0
STEPS = 1000
BATCH = 192
LEARNING_RATE = 3e-3
OTHER_WEIGHT = 0.01
MAX_POSITIONS = 16


def model_config() -> LlamaConfig:
    """The shape: 2 layers, 4 heads, width 64, rotary positions, RMS norms."""
    return language.llama_config(
        vocabulary(), width=64, hidden=128, layers=2, positions=MAX_POSITIONS
    )


def build_tokenizer() -> Tokenizer:
    """Words and pairs of digits are tokens."""
    return language.build_tokenizer(vocabulary())


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS)


def train(seed: int, steps: int) -> LlamaForCausalLM:
    """Train on `steps` batches."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    pad: int = model.config.pad_token_id or 0
    drawn = stream(seed, held_out=False)
    data = language.batches(drawn, seed, BATCH, build_tokenizer(), pad, pool_size=1)
    language.fit(model, data, steps=steps, rate=LEARNING_RATE, other_weight=OTHER_WEIGHT)
    return model.eval()


def main() -> None:
    """The command line."""
    train_command(
        __doc__,
        train,
        save_tokenizer,
        folder=MODELS / "years",
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
