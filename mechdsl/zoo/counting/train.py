"""Trains the counting model: `python -m mechdsl.zoo.counting.train --out DIR`."""

# pyright: reportUnknownMemberType=false
# (signatures of torch, transformers and tokenizers are only partly typed)

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mechdsl.zoo.counting.data import Example, stream, vocabulary
from mechdsl.zoo.counting.tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer

SEED = 0
STEPS = 3000
BATCH = 48  # sequences
LEARNING_RATE = 2e-3
RUNNING_WEIGHT = 0.5  # running numbers teach the items their index; counts matter more
POOL = 32  # batches drawn at once and sorted by length, so that little of them is padding

Batch = tuple[Tensor, Tensor, Tensor]  # ids [row, position], label of the next token, weight


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


def encode(tokenizer: Tokenizer, examples: list[Example], pad: int) -> Batch:
    """Right-padded ids `[row, position]`, and at each position what its next token should be.

    Labels are -100 and weights 0 where the next token is not a numeral to predict. Padding
    stands behind everything, so a causal model needs no mask for it.
    """
    encodings = tokenizer.encode_batch([e.text for e in examples])
    width = max(len(e.ids) for e in encodings)
    ids = torch.full((len(examples), width), pad)
    labels = torch.full((len(examples), width), -100)
    weights = torch.zeros(len(examples), width)
    for row, (example, encoding) in enumerate(zip(examples, encodings, strict=True)):
        ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
        for target in example.targets:
            at = encoding.char_to_token(target.start)
            assert at is not None
            labels[row, at - 1] = encoding.ids[at]
            weights[row, at - 1] = RUNNING_WEIGHT if target.kind == "running" else 1.0
    return ids, labels, weights


def batches(seed: int, tokenizer: Tokenizer, pad: int) -> Iterator[Batch]:
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
    for step, (ids, labels, weights) in enumerate(itertools.islice(data, steps)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        wanted = labels >= 0
        losses = nn.functional.cross_entropy(logits[wanted], labels[wanted], reduction="none")
        weight = weights[wanted]
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            right = (logits[wanted].argmax(-1) == labels[wanted]).float()
            answers = right[weight == 1.0].mean().item()
            spent = time.perf_counter() - began
            print(f"{step:5d}  loss {loss.item():.4f}  answers {answers:.3f}  {spent:.0f} s",
                  flush=True)  # fmt: skip
    return model.eval()


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes configuration, weights (safetensors) and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # nothing in it but defaults
    save_tokenizer(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    save(train(args.seed, args.steps), args.out)
    print(f"trained and saved in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
