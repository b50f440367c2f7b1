"""Trains the names model: `python -m zoo.names.train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import MODELS, language, words
from zoo.commands import train_command
from zoo.names.data import MOST_IN_FRONT, stream, vocabulary

SEED = 0
STEPS = 1000  # of each stage: with nothing in front, then with other sentences
BATCH = 64  # texts
LEARNING_RATE = 1e-3
OTHER_WEIGHT = 0.02  # words that aren't asked: a language model, but the answers count most
MAX_POSITIONS = 128


def model_config() -> LlamaConfig:
    """The shape: 2 layers, 4 heads, width 128, rotary positions, RMS norms, no biases anywhere."""
    return language.llama_config(
        vocabulary(), width=128, hidden=256, layers=2, positions=MAX_POSITIONS
    )


def build_tokenizer() -> Tokenizer:
    """Words and punctuation marks are tokens."""
    return language.build_tokenizer(vocabulary())


def save_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS)


def train(
    seed: int,
    steps: int,
    each_step: Callable[[int, LlamaForCausalLM], None] = lambda step, model: None,
) -> LlamaForCausalLM:
    """A model trained on `steps` batches in each of two stages, from the circuit of
    zoo("induction") on.

    each_step: called with the number of steps done in both stages, and the model.
    """
    torch.manual_seed(seed)
    config = model_config()
    model = LlamaForCausalLM(config)
    language.begin_with_induction(model, (1,))
    pad: int = config.pad_token_id or 0
    for stage, most in enumerate((0, MOST_IN_FRONT)):
        drawn = stream(seed + stage, held_out=False, most_in_front=most)
        data = language.batches(drawn, seed + stage, BATCH, build_tokenizer(), pad, pool_size=1)
        language.fit(
            model,
            data,
            steps=steps,
            rate=LEARNING_RATE,
            other_weight=OTHER_WEIGHT,
            each_step=lambda step, done=stage * steps: each_step(done + step, model),
        )
    return model.eval()


def main() -> None:
    """The command line."""
    train_command(
        __doc__,
        train,
        save_tokenizer,
        folder=MODELS / "names",
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
