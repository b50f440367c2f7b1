"""Measures accuracy on held-out lists: `python -m mechdsl.zoo.counting.evaluate`.

Every question is answered with the right answers before it in the text. A text is right when
all its questions are, which is the same as answering them one after another by itself.
"""

# pyright: reportUnknownMemberType=false
# (signatures of torch, transformers and tokenizers are only partly typed)

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from mechdsl.zoo.counting.data import BARRED, PLAIN, Example, stream
from mechdsl.zoo.counting.train import encode

SEED = 20260  # not the training seed; only held-out lists are drawn
ORDINALS = ("first count asked", "second count asked", "third count asked")


@dataclass
class Tally:
    """How many of `n` were right."""

    right: int = 0
    n: int = 0

    def add(self, right: bool) -> None:
        self.right += right
        self.n += 1

    @property
    def share(self) -> float:
        return self.right / self.n if self.n else math.nan

    def interval(self, z: float = 1.959964) -> tuple[float, float]:
        """Wilson's score interval, 95 % by default."""
        if not self.n:
            return math.nan, math.nan
        p, n = self.share, self.n
        middle = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return (middle - half) / scale, (middle + half) / scale


def held_out(n: int, seed: int) -> list[Example]:
    """The first `n` different held-out texts, without running numbers."""
    texts: dict[str, Example] = {}
    for example in stream(seed, held_out=True, numbered_share=0.0):
        texts.setdefault(example.text, example)
        if len(texts) == n:
            break
    return list(texts.values())


def answers(
    model: LlamaForCausalLM, tokenizer: Tokenizer, examples: list[Example], batch: int = 64
) -> Iterator[tuple[Example, list[bool]]]:
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="model folder")
    parser.add_argument("--n", type=int, default=4000, help="number of held-out texts")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tallies = evaluate(args.model, args.n, args.seed)
    if args.json:
        print(json.dumps({
            name: {"n": t.n, "right": t.right, "accuracy": t.share, "interval": t.interval()}
            for name, t in tallies.items()
        }, indent=2))  # fmt: skip
        return
    print(f"{'held-out texts':<28} {'n':>6} {'right':>6} {'accuracy':>9}   95 % interval (Wilson)")
    for name, t in tallies.items():
        low, high = t.interval()
        print(f"{name:<28} {t.n:>6} {t.right:>6} {t.share:>9.4f}   {low:.4f} .. {high:.4f}")


if __name__ == "__main__":
    main()
