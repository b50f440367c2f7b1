"""Trains the nested model in two stages: `python -m zoo.nested.train`.

Writes the model after the second stage to `mechdsl/zoo/nested`, and as it was after the first,
which has seen brackets only, to `formal` in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import MODELS, language, words
from zoo.commands import save
from zoo.nested.data import BRACKETS, stream, vocabulary

SEED = 0
STEPS = 1500  # of each stage
BATCH = 64  # texts
LEARNING_RATE = 2e-3
OTHER_WEIGHT = 0.2
MAX_POSITIONS = 64


def model_config() -> LlamaConfig:
    """The shape: 3 layers, 4 heads, width 96, rotary positions, RMS norms."""
    return language.llama_config(
        vocabulary(), width=96, hidden=192, layers=3, positions=MAX_POSITIONS
    )


def build_tokenizer() -> Tokenizer:
    """Words and punctuation marks are tokens."""
    return language.build_tokenizer(vocabulary())


def save_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS)


def train(seed: int, steps: int, out: Path) -> None:
    """Both stages, `steps` batches each; the model is written after each."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    pad: int = model.config.pad_token_id or 0
    for kind, folder in ((BRACKETS, out / "formal"), ("sentences", out)):
        drawn = stream(seed, kind, held_out=False)
        data = language.batches(drawn, seed, BATCH, build_tokenizer(), pad)
        language.fit(model, data, steps=steps, rate=LEARNING_RATE, other_weight=OTHER_WEIGHT)
        save(model, folder, save_tokenizer, torch.float16)
        model.float()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODELS / "nested", help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.seed, args.steps, args.out)


if __name__ == "__main__":
    main()
