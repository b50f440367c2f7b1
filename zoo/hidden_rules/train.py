"""Trains the model of hidden rules: `python -m zoo.hidden_rules.train`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import MODELS, language, words
from zoo.commands import save
from zoo.hidden_rules.data import stream, vocabulary

SEED = 0
STEPS = 1500
BATCH = 192
LEARNING_RATE = 2e-3
OTHER_WEIGHT = 0.01
MAX_POSITIONS = 32


def model_config() -> LlamaConfig:
    """The shape: 3 layers, 4 heads, width 64, rotary positions, RMS norms."""
    return language.llama_config(
        vocabulary(), width=64, hidden=128, layers=3, positions=MAX_POSITIONS
    )


def build_tokenizer() -> Tokenizer:
    """Words, numbers and punctuation marks are tokens."""
    return language.build_tokenizer(vocabulary())


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS)


def train(seed: int, steps: int, out: Path) -> None:
    """Train on `steps` batches, and write the model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    pad: int = model.config.pad_token_id or 0
    drawn = stream(seed, held_out=False)  # sorted by length, a batch would have one answer only
    data = language.batches(drawn, seed, BATCH, build_tokenizer(), pad, pool_size=1)
    language.fit(model, data, steps=steps, rate=LEARNING_RATE, other_weight=OTHER_WEIGHT)
    save(model, out, save_tokenizer, torch.float16)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=MODELS / "hidden-rules", help="folder to write to"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.seed, args.steps, args.out)


if __name__ == "__main__":
    main()
