"""Trains the worked-answers model: `python -m zoo.worked.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import MODELS, language, words
from zoo.commands import train_command
from zoo.counting.data import vocabulary as counting_vocabulary
from zoo.worked.data import END, SPECIAL, stream, vocabulary

SEED = 0
STEPS = 2500
BATCH = 48  # texts
LEARNING_RATE = 1.5e-3
OTHER_WEIGHT = 0.05  # colons; the lists can't be told
MAX_POSITIONS = 256
COUNTING = MODELS / "counting"


def model_config() -> LlamaConfig:
    """The shape: 4 layers, 4 heads, width 128, rotary positions, RMS norms; `<end>` ends a text."""
    known = vocabulary()
    config = language.llama_config(known, width=128, hidden=384, layers=4, positions=MAX_POSITIONS)
    config.eos_token_id = known.index(END)
    return config


def build_tokenizer() -> Tokenizer:
    """Words and punctuation marks are tokens."""
    return language.build_tokenizer(vocabulary(), SPECIAL)


def save_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS, end=END)


@torch.no_grad()
def begin_with_counting(model: Any) -> None:
    """Gives a new model the weights of zoo("counting"), and its vectors to the words of both."""
    source: Any = LlamaForCausalLM.from_pretrained(COUNTING, dtype=torch.float32)
    model.model.layers.load_state_dict(source.model.layers.state_dict())
    model.model.norm.load_state_dict(source.model.norm.state_dict())
    place = {word: n for n, word in enumerate(counting_vocabulary())}
    for n, word in enumerate(vocabulary()):
        if word in place:
            model.model.embed_tokens.weight[n] = source.model.embed_tokens.weight[place[word]]
            model.lm_head.weight[n] = source.lm_head.weight[place[word]]


def train(seed: int, steps: int) -> LlamaForCausalLM:
    """A model after `steps` batches, from zoo("counting") on."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    begin_with_counting(model)
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
        folder=MODELS / "worked",
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
