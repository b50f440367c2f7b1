"""Measures accuracy on held-out lists: `python -m zoo.counting.evaluate`.

Every question is answered with the right answers before it in the text. A text is right when
all its questions are, which is the same as answering them one after another by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from zoo import MODELS
from zoo.commands import Tally, evaluate_command
from zoo.counting.data import BARRED, PLAIN, CountingExample, stream
from zoo.counting.train import encode

SEED = 20260  # not the training seed; only held-out lists are drawn
ORDINALS = ("first count asked", "second count asked", "third count asked")


def held_out(n: int, seed: int) -> list[CountingExample]:
    """The first `n` different held-out texts, without running numbers."""
    texts: dict[str, CountingExample] = {}
    for example in stream(seed, held_out=True, numbered_share=0.0):
        texts.setdefault(example.text, example)
        if len(texts) == n:
            break
    return list(texts.values())


def answers(
    model: LlamaForCausalLM, tokenizer: Tokenizer, examples: list[CountingExample], batch: int = 64
) -> Iterator[tuple[CountingExample, list[bool]]]:
    """For each text, whether each of its numerals is the most likely next token."""
    pad: int = model.config.pad_token_id or 0
    for i in range(0, len(examples), batch):
        group = examples[i : i + batch]
        texts = encode(tokenizer, group, pad)
        with torch.no_grad():  # nothing is hidden here: the plain causal model
            best: Tensor = model(input_ids=texts.ids, use_cache=False).logits.argmax(-1)
        for row, example in enumerate(group):
            asked = texts.labels[row] >= 0
            yield example, (best[row][asked] == texts.labels[row][asked]).tolist()


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Accuracy by kind of question and by form of text, on `n` held-out texts."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = (*ORDINALS, "total after the counts", "total at once", "every question",
            "whole text, plain", "whole text, with separators", "whole text, other forms",
            "whole text")  # fmt: skip
    tallies = {name: Tally() for name in rows}
    forms = {PLAIN: "whole text, plain", BARRED: "whole text, with separators"}
    for example, right in answers(model, tokenizer, held_out(n, seed)):
        for place, (target, hit) in enumerate(zip(example.targets, right, strict=True)):
            # The counts come first, so a count's place is its ordinal.
            if target.kind == "count":
                tallies[ORDINALS[place]].add(hit)
            else:
                direct = target.kind == "direct"
                tallies["total at once" if direct else "total after the counts"].add(hit)
            tallies["every question"].add(hit)
        tallies[forms.get(example.form, "whole text, other forms")].add(all(right))
        tallies["whole text"].add(all(right))
    return tallies


def main() -> None:
    """The command line."""
    folder = MODELS / "counting"
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="held-out texts")


if __name__ == "__main__":
    main()
