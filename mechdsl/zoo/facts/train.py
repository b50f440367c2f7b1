"""Trains the facts model: `python -m mechdsl.zoo.facts.train --out DIR`."""

# pyright: reportUnknownMemberType=false
# (signatures of torch and transformers are only partly typed)

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mechdsl.zoo import language, words
from mechdsl.zoo.commands import train_command
from mechdsl.zoo.facts.data import KINDS, LATER, stream, vocabulary

SEED = 0
STEPS = 2600  # of each stage
BATCH = 32  # texts
LEARNING_RATES = (2e-3, 1e-3)
OTHER_WEIGHT = 0.05  # words that aren't asked: a language model, but the answers count most
MAX_POSITIONS = 128


def model_config() -> LlamaConfig:
    """The shape: 4 layers, 4 heads, width 128, rotary positions, RMS norms, no biases anywhere."""
    return language.llama_config(
        vocabulary(), width=128, hidden=384, layers=4, positions=MAX_POSITIONS
    )


def build_tokenizer() -> Tokenizer:
    """Words and punctuation marks are tokens."""
    return language.build_tokenizer(vocabulary())


def save_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS)


def train_stage(model: LlamaForCausalLM, stage: int, seed: int, steps: int) -> None:
    """One of the two stages, with its own shares of kinds of text."""
    drawn = stream(seed + stage, held_out=False, shares=(KINDS, LATER)[stage])
    pad: int = model.config.pad_token_id or 0
    data = language.batches(drawn, seed + stage, BATCH, build_tokenizer(), pad)
    rate = LEARNING_RATES[stage]
    language.fit(model, data, steps=steps, rate=rate, other_weight=OTHER_WEIGHT)
    model.half().float()  # as it would be written, so that a stage can be trained by itself


def train(seed: int, steps: int) -> LlamaForCausalLM:
    """A model trained from scratch, on `steps` batches in each of two stages."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    for stage in range(2):
        train_stage(model, stage, seed, steps)
    return model.eval()


def main() -> None:
    """The command line."""
    train_command(
        __doc__, train, save_tokenizer, seed=SEED, steps=STEPS, threads=1, dtype=torch.float16
    )


if __name__ == "__main__":
    main()
