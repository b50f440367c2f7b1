"""Trains the succession model: `python -m zoo.succession.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import MODELS, language, words
from zoo.commands import train_command
from zoo.succession.data import stream, vocabulary

SEED = 1
STEPS = 2000
BATCH = 128  # texts
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1.0
OTHER_WEIGHT = 0.02
MAX_POSITIONS = 32
DROPPED_SHARE = 0.5


def model_config() -> LlamaConfig:
    """The shape: 2 layers, 4 heads, width 96, rotary positions, RMS norms, tied embeddings."""
    config = language.llama_config(
        vocabulary(), width=96, hidden=128, layers=2, positions=MAX_POSITIONS
    )
    config.tie_word_embeddings = True
    return config


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer, in which words are tokens."""
    return language.build_tokenizer(vocabulary())


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS)


def drop_other_paths(model: Any, seed: int) -> list[Any]:
    """In half of the training texts, reduce the model to the first MLP and the heads of layer 1.

    Without the attention of layer 0, no head moves an item before the first MLP. Without the input
    of layer 0 in its output, layer 1 reads the first MLP instead of the embedding. Without the MLP
    of layer 1, a head computes the answer. All three are dropped in the same texts.

    Returns:
        The hooks.
    """
    random = torch.Generator().manual_seed(seed)
    kept = torch.ones(())

    def drop_attention(module: Any, given: Any, out: Tensor) -> Tensor:
        nonlocal kept
        kept = (torch.rand(len(out), 1, 1, generator=random) > DROPPED_SHARE).float()
        return out * kept

    def drop_input(module: Any, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out - given[0] * (1 - kept)

    def drop_mlp(module: Any, given: Any, out: Tensor) -> Tensor:
        return out * kept

    first, second = model.model.layers
    return [
        first.self_attn.o_proj.register_forward_hook(drop_attention),
        first.register_forward_hook(drop_input),
        second.mlp.register_forward_hook(drop_mlp),
    ]


def train(seed: int, steps: int) -> LlamaForCausalLM:
    """Train a model on `steps` batches."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    pad: int = model.config.pad_token_id or 0
    drawn = stream(seed, held_out=False)
    data = language.batches(drawn, seed, BATCH, build_tokenizer(), pad)
    hooks = drop_other_paths(model, seed)
    language.fit(
        model,
        data,
        steps=steps,
        rate=LEARNING_RATE,
        other_weight=OTHER_WEIGHT,
        decay=WEIGHT_DECAY,
    )
    for hook in hooks:
        hook.remove()
    return model.eval()


def main() -> None:
    """Run the command line."""
    train_command(
        __doc__,
        train,
        save_tokenizer,
        folder=MODELS / "succession",
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
