"""Trains the facts model: `python -m zoo.facts.train`."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import MODELS, language, words
from zoo.commands import train_command
from zoo.facts.data import STAGES, stream, vocabulary

SEED = 0
STEPS = 1200  # of a stage, at most
STAGE_STEPS = (1200, 1200, 700)
SCHEDULES = (2600, 1200, 700)  # of the rate, in steps
BATCH = 44  # texts
LEARNING_RATES = (1.5e-3, 1e-3, 7e-4)  # by stage
LAYERS = 6
INDUCTION_LAYERS = (1, 4)  # which start with the head of zoo("induction") that finds
OTHER_WEIGHT = 0.05  # words that aren't asked: a language model, but the answers count most
MAX_POSITIONS = 128


def model_config() -> LlamaConfig:
    """The shape: 6 layers, 4 heads, width 128, rotary positions, RMS norms, no biases anywhere."""
    return language.llama_config(
        vocabulary(), width=128, hidden=384, layers=LAYERS, positions=MAX_POSITIONS
    )


def build_tokenizer() -> Tokenizer:
    """Words and punctuation marks are tokens."""
    return language.build_tokenizer(vocabulary())


def save_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS)


def train(seed: int, steps: int) -> LlamaForCausalLM:
    """A model trained from the circuit of zoo("induction") on, in stages of at most `steps`."""
    torch.manual_seed(seed)
    config = model_config()
    model = LlamaForCausalLM(config)
    language.begin_with_induction(model, INDUCTION_LAYERS)
    pad: int = config.pad_token_id or 0
    for stage, (schedule, rate) in enumerate(zip(SCHEDULES, LEARNING_RATES, strict=True)):
        drawn = stream(seed + stage, held_out=False, stage=STAGES[stage])
        data = language.batches(drawn, seed + stage, BATCH, build_tokenizer(), pad, pool_size=1)
        shown = itertools.islice(data, min(steps, STAGE_STEPS[stage]))
        language.fit(model, shown, steps=schedule, rate=rate, other_weight=OTHER_WEIGHT)
    return model.eval()


def main() -> None:
    """The command line."""
    train_command(
        __doc__,
        train,
        save_tokenizer,
        folder=MODELS / "facts",
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
