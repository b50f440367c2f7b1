"""Train the names model again and save an earlier step: `python -m zoo.names.steps` writes
`mechdsl/zoo/names/step-400`.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from zoo import MODELS
from zoo.commands import save
from zoo.names.train import SEED, STEPS, save_tokenizer, train

SAVED = (400,)
"""The last of steps 50, 100, 200, … at which accuracy on coloured objects is below 1.00."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODELS / "names", help="folder to write to")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def save_step(step: int, model: LlamaForCausalLM) -> None:
        if step in SAVED:
            model = copy.deepcopy(model).eval()
            save(model, args.out / f"step-{step}", save_tokenizer, torch.float16)

    train(SEED, STEPS, save_step)


if __name__ == "__main__":
    main()
