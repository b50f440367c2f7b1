"""Trains the induction model once more and keeps it as it was on the way:
`python -m zoo.induction.steps` writes `mechdsl/zoo/induction/step-50`, `step-100` and so on.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from zoo import MODELS
from zoo.commands import save
from zoo.induction.tokenizer import save_tokenizer
from zoo.induction.train import SEED, STEPS, renumber, strongest_heads, train

KEPT = (50, 100, 200, 400, 800, 1600)
"""Doubled, so that nobody chose where something happens."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODELS / "induction", help="folder to write to")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kept: dict[int, LlamaForCausalLM] = {}

    def keep(step: int, model: LlamaForCausalLM) -> None:
        if step in KEPT:
            kept[step] = copy.deepcopy(model)

    working = strongest_heads(train(SEED, STEPS, keep))
    for step, model in kept.items():
        renumber(model, working)  # a head keeps its number from step to step
        save(model.eval(), args.out / f"step-{step}", save_tokenizer, torch.float16)


if __name__ == "__main__":
    main()
