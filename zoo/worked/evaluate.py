"""Measures accuracy on held-out lists: `python -m zoo.worked.evaluate`.

An answer is right when all its words are, up to `<end>`, which is what greedy decoding would write.
By the way to answer and by the number of parts; sums are those of given counts.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaForCausalLM

from zoo import MODELS, language
from zoo.commands import Tally, evaluate_command
from zoo.worked.data import KINDS, MAX_PARTS, stream

SEED = 20267  # not the training seed; only held-out lists are drawn


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Accuracy by way to answer and by number of parts, on `n` held-out texts of each way."""
    model, tokenizer = language.load(LlamaForCausalLM, folder)
    tallies: dict[str, Tally] = {}
    for kind in KINDS:
        parts = {f"{kind}, {k} part{'s' * (k > 1)}": Tally() for k in range(1, MAX_PARTS + 1)}
        texts = language.different(stream(seed, held_out=True, kind=kind), n)
        for text, wanted, found in language.best_words(model, tokenizer, texts):
            [*parts.values()][text.content.count(" | ")].add(wanted == found)
        tallies |= parts
    return tallies


def main() -> None:
    """The command line."""
    folder = MODELS / "worked"
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="texts of each way")


if __name__ == "__main__":
    main()
