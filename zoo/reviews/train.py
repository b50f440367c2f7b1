"""Trains the classifier of reviews: `python -m zoo.reviews.train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from zoo import MODELS, language, words
from zoo.commands import train_command
from zoo.reviews.data import LABELS, Review, stream, vocabulary

SEED = 0
STEPS = 1500
BATCH = 64  # texts
LEARNING_RATE = 2e-3
MAX_POSITIONS = 32


def model_config() -> BertConfig:
    """The shape: 3 layers, 4 heads, width 64, learned positions, norms after sums."""
    every = vocabulary()
    return BertConfig(
        vocab_size=len(every),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=MAX_POSITIONS,
        type_vocab_size=1,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=every.index("<pad>"),
        id2label=dict(enumerate(LABELS)),
        label2id={name: number for number, name in enumerate(LABELS)},
        architectures=["BertForSequenceClassification"],
    )


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer, in which words are tokens."""
    return language.build_tokenizer(vocabulary())


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS, padding_side="right")


def encode(tokenizer: Tokenizer, texts: Sequence[Review], pad: int) -> tuple[Tensor, Tensor]:
    """Convert texts to tokens, padded at the right, and a mask of the tokens of texts.

    Returns:
        Both [row, position].
    """
    encodings = tokenizer.encode_batch([each.text for each in texts])
    width = max(len(each.ids) for each in encodings)
    ids = torch.full((len(texts), width), pad)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
    return ids, (ids != pad).long()


def train(seed: int, steps: int) -> BertForSequenceClassification:
    """Train a model on `steps` batches."""
    torch.manual_seed(seed)
    model: Any = BertForSequenceClassification(model_config())
    tokenizer, pad = build_tokenizer(), model.config.pad_token_id
    drawn = stream(seed, held_out=False)
    groups = language.groups(drawn, seed, BATCH, lambda each: len(each.text), 1)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        texts = next(groups)
        ids, mask = encode(tokenizer, texts, pad)
        labels = torch.tensor([LABELS.index(each.label) for each in texts])
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        right = (logits.argmax(-1) == labels).float().mean()
        return nn.functional.cross_entropy(logits, labels), right

    language.optimise(model.parameters(), loss, steps=steps, rate=LEARNING_RATE)
    return model.eval()


def main() -> None:
    """Run the command line."""
    train_command(
        __doc__,
        train,
        save_tokenizer,
        folder=MODELS / "reviews",
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
