"""Measures accuracy on held-out texts: `python -m zoo.induction.evaluate`.

A text of the form of `repeat` (the half twice, then its first word) asks for one word; a mixed text
asks for every word of its later copies that the text before it determines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from zoo import MODELS
from zoo.commands import Tally, evaluate_command
from zoo.induction.data import InductionExample, repeats, stream
from zoo.induction.train import encode

SEED = 20261  # not the training seed; only held-out halves are drawn
EXAMPLE_LENGTH = 12  # words of a half, in the example experiments
LENGTHS = range(6, 21)

# Rows of the table.
OF_THE_EXAMPLE = f"repeats of {EXAMPLE_LENGTH} words"
REPEATS = f"repeats of {LENGTHS[0]} to {LENGTHS[-1]} words"
MIXED = "mixed, whole text"
EVERY_WORD = "mixed, every word"


def answers(
    model: LlamaForCausalLM, tokenizer: Tokenizer, examples: list[InductionExample], batch: int = 64
) -> Iterator[tuple[InductionExample, list[bool]]]:
    """For each text, whether each of the words to predict is the most likely next token."""
    pad: int = model.config.pad_token_id or 0
    for i in range(0, len(examples), batch):
        group = examples[i : i + batch]
        texts = encode(tokenizer, group, pad)
        with torch.no_grad():
            best: Tensor = model(input_ids=texts.ids, use_cache=False).logits.argmax(-1)
        for row, example in enumerate(group):
            asked = texts.labels[row] >= 0
            yield example, (best[row][asked] == texts.labels[row][asked]).tolist()


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Accuracy by form of text: `n` repeats of the example's length, about as many over all
    lengths, and `n` mixed texts.
    """
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    each = math.ceil(n / len(LENGTHS))
    groups = {
        OF_THE_EXAMPLE: list(islice(repeats(seed, EXAMPLE_LENGTH), n)),
        REPEATS: [e for k in LENGTHS for e in islice(repeats(seed + k, k), each)],
        MIXED: list(islice(stream(seed, held_out=True), n)),
    }
    tallies = {name: Tally() for name in (*groups, EVERY_WORD)}
    for name, examples in groups.items():
        for _, right in answers(model, tokenizer, examples):
            tallies[name].add(all(right))
            if name == MIXED:
                for hit in right:
                    tallies[EVERY_WORD].add(hit)
    return tallies


def main() -> None:
    """The command line."""
    folder = MODELS / "induction"
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="texts of each form")


if __name__ == "__main__":
    main()
