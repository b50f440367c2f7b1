"""Measure accuracy on held-out texts: `python -m zoo.reviews.evaluate`.

Training has no text with this question and these adjectives.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertForSequenceClassification

from zoo import MODELS, language
from zoo.commands import Tally, evaluate_command
from zoo.reviews.data import KINDS, LABELS, stream
from zoo.reviews.train import encode

SEED = 20280  # not the training seed; only held-out texts are drawn
BATCH = 64  # texts


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Return the accuracy by kind of text, on `n` different held-out texts of each."""
    model, tokenizer = language.load(BertForSequenceClassification, folder)
    pad: int = model.config.pad_token_id
    tallies = {kind: Tally() for kind in KINDS}
    for kind, tally in tallies.items():
        texts = language.different(stream(seed, held_out=True, kind=kind), n)
        for start in range(0, len(texts), BATCH):
            group = texts[start : start + BATCH]
            ids, mask = encode(tokenizer, group, pad)
            with torch.no_grad():
                best = model(input_ids=ids, attention_mask=mask).logits.argmax(-1).tolist()
            for text, number in zip(group, best, strict=True):
                tally.add(LABELS[number] == text.label)
    return tallies


def main() -> None:
    """Run the command line."""
    evaluate_command(
        __doc__,
        evaluate,
        folder=MODELS / "reviews",
        seed=SEED,
        counted="texts of each kind",
    )


if __name__ == "__main__":
    main()
