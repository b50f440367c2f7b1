"""Trains the counting model: `python -m zoo.counting.train`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import MODELS, language
from zoo.commands import train_command
from zoo.counting.data import CountingExample, stream, vocabulary
from zoo.counting.tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer

SEED = 0
STEPS = 4500
BATCH = 48  # sequences
LEARNING_RATE = 2e-3
RUNNING_WEIGHT = 0.5  # running numbers teach the items their index; counts matter more


@dataclass(frozen=True)
class ListBatch:
    """Right-padded texts."""

    ids: Tensor  # [row, position]
    labels: Tensor  # [row, position], the next token where it is to be predicted, else -100
    weights: Tensor  # [row, position], of the loss
    mask: Tensor  # [row, 1, query, key], added to the attention scores; 0 or a huge negative


def model_config() -> LlamaConfig:
    """The shape: 4 layers, 4 heads, width 128, rotary positions, RMS norms."""
    return language.llama_config(
        vocabulary(), width=128, hidden=384, layers=4, positions=MAX_LENGTH
    )


def encode(tokenizer: Tokenizer, examples: list[CountingExample], pad: int) -> ListBatch:
    """Texts to tensors. Padding stands behind everything, where a causal model never looks.

    The mask is causal, and keeps the questions from what is hidden from them, and from `<s>`
    then too: the distance to it would tell the first part's length.
    """
    encodings = tokenizer.encode_batch([e.text for e in examples])
    rows, width = len(examples), max(len(e.ids) for e in encodings)
    ids = torch.full((rows, width), pad)
    labels = torch.full((rows, width), -100)
    weights = torch.zeros(rows, width)
    asks = torch.zeros(rows, width, dtype=torch.bool)
    hidden = torch.zeros(rows, width, dtype=torch.bool)
    for row, (example, encoding) in enumerate(zip(examples, encodings, strict=True)):
        length = len(encoding.ids)
        ids[row, :length] = torch.tensor(encoding.ids)
        starts = torch.tensor([start for start, _ in encoding.offsets])
        asks[row, :length] = starts >= example.questions
        for begin, end in example.hidden:
            hidden[row, :length] |= (starts >= begin) & (starts < end)
        for target in example.targets:
            at = encoding.char_to_token(target.start)
            assert at is not None
            labels[row, at - 1] = encoding.ids[at]
            weights[row, at - 1] = RUNNING_WEIGHT if target.kind == "running" else 1.0
    # `<s>` has the offsets (0, 0), so it is hidden with the first header.
    seen = torch.ones(width, width, dtype=torch.bool).tril()
    seen = seen & ~(asks[:, :, None] & hidden[:, None, :])
    mask = torch.zeros(rows, 1, width, width)
    mask.masked_fill_(~seen[:, None], torch.finfo(mask.dtype).min)
    return ListBatch(ids, labels, weights, mask)


def batches(seed: int, tokenizer: Tokenizer, pad: int) -> Iterator[ListBatch]:
    """Endless training batches of texts of similar length, in random order."""
    drawn = stream(seed, held_out=False)
    for group in language.groups(drawn, seed, BATCH, lambda each: len(each.text)):
        yield encode(tokenizer, group, pad)


def train(seed: int, steps: int) -> LlamaForCausalLM:
    """A model trained from scratch on `steps` batches."""
    torch.manual_seed(seed)
    config = model_config()
    model = LlamaForCausalLM(config)
    data = batches(seed, build_tokenizer(), config.pad_token_id or 0)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        batch = next(data)
        output = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        wanted = batch.labels >= 0
        logits: Tensor = output.logits[wanted]
        labels, weight = batch.labels[wanted], batch.weights[wanted]
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        right = (logits.argmax(-1) == labels).float()
        return (losses * weight).sum() / weight.sum(), right[weight == 1.0].mean()

    language.optimise(model.parameters(), loss, steps=steps, rate=LEARNING_RATE)
    return model.eval()


def main() -> None:
    """The command line."""
    train_command(
        __doc__,
        train,
        save_tokenizer,
        folder=MODELS / "counting",
        seed=SEED,
        steps=STEPS,
        threads=2,
    )


if __name__ == "__main__":
    main()
