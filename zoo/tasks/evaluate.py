"""Measures accuracy on held-out texts: `python -m zoo.tasks.evaluate`.

Of each task the last word of texts, behind so many pairs as the text has before it.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaForCausalLM

from zoo import MODELS, language
from zoo.commands import Tally, evaluate_command
from zoo.tasks.data import TASKS, stream

SEED = 20265  # not the training seed; only held-out texts are drawn
PAIRS = (0, 1, 2, 4)


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Accuracy by task behind one pair or more, and by the number of pairs in front; `n` held-out
    texts of each task."""
    model, tokenizer = language.load(LlamaForCausalLM, folder)
    by_task = {task: Tally() for task in TASKS}
    by_pairs = {f"behind {count} pairs": Tally() for count in PAIRS}
    for task in TASKS:
        texts = language.different(stream(seed, held_out=True, task=task), n)
        for _, wanted, found in language.best_words(model, tokenizer, texts):
            for count, (word, said) in enumerate(zip(wanted, found, strict=True)):
                if count:
                    by_task[task].add(word == said)
                if count in PAIRS:
                    by_pairs[f"behind {count} pairs"].add(word == said)
    return {**by_task, **by_pairs}


def main() -> None:
    """The command line."""
    folder = MODELS / "tasks"
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="texts of each task")


if __name__ == "__main__":
    main()
