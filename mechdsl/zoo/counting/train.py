"""Trains the counting model: `python -m mechdsl.zoo.counting.train --out DIR`."""

# pyright: reportUnknownMemberType=false
# (signatures of torch, transformers and tokenizers are only partly typed)

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mechdsl.zoo.commands import train_command
from mechdsl.zoo.counting.data import CountingExample, stream, vocabulary
from mechdsl.zoo.counting.tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer

SEED = 0
STEPS = 4500
BATCH = 48  # sequences
LEARNING_RATE = 2e-3
RUNNING_WEIGHT = 0.5  # running numbers teach the items their index; counts matter more
POOL = 32  # batches drawn at once and sorted by length, so that little of them is padding


@dataclass(frozen=True)
class ListBatch:
    """Right-padded texts."""

    ids: Tensor  # [row, position]
    labels: Tensor  # [row, position], the next token where it is to be predicted, else -100
    weights: Tensor  # [row, position], of the loss
    mask: Tensor  # [row, 1, query, key], added to the attention scores; 0 or a huge negative


def model_config() -> LlamaConfig:
    """The shape: 4 layers, 4 heads, width 128, rotary positions, RMS norms."""
    words = vocabulary()
    return LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=words.index("<s>"),
        pad_token_id=words.index("<pad>"),
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
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
    examples = stream(seed, held_out=False)
    order = random.Random(seed)
    while True:
        pool = sorted(itertools.islice(examples, POOL * BATCH), key=lambda e: len(e.text))
        groups = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        order.shuffle(groups)
        for group in groups:
            yield encode(tokenizer, group, pad)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to nothing; a share of the highest rate."""
    warm = 150
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def train(seed: int, steps: int) -> LlamaForCausalLM:
    """A model trained from scratch on `steps` batches."""
    torch.manual_seed(seed)
    config = model_config()
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, steps))
    data = batches(seed, build_tokenizer(), config.pad_token_id or 0)
    began = time.perf_counter()
    for step, batch in enumerate(itertools.islice(data, steps)):
        output = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        wanted = batch.labels >= 0
        logits: Tensor = output.logits[wanted]
        labels, weight = batch.labels[wanted], batch.weights[wanted]
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            right = (logits.argmax(-1) == labels).float()
            answers = right[weight == 1.0].mean().item()
            spent = time.perf_counter() - began
            print(f"{step:5d}  loss {loss.item():.4f}  answers {answers:.3f}  {spent:.0f} s",
                  flush=True)  # fmt: skip
    return model.eval()


def main() -> None:
    """The command line."""
    train_command(__doc__, train, save_tokenizer, seed=SEED, steps=STEPS, threads=2)


if __name__ == "__main__":
    main()
