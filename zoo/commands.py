"""What the command lines of the zoo's models share: training and saving, and accuracy tables."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel


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


def save(
    model: PreTrainedModel,
    folder: Path,
    save_rest: Callable[[Path], None],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes configuration and weights (safetensors, in that precision). save_rest: writes the
    tokenizer, or what prepares images."""
    folder.mkdir(parents=True, exist_ok=True)
    cast(Any, model).to(dtype).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # is written for its owner only
    (folder / "generation_config.json").unlink(missing_ok=True)  # nothing in it but defaults
    save_rest(folder)


def train_command(
    about: str | None,
    train: Callable[[int, int], PreTrainedModel],
    save_rest: Callable[[Path], None],
    *,
    folder: Path,
    seed: int,
    steps: int,
    threads: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The command line that trains a model, `train(seed, steps)`, and saves it in `dtype`."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, default=folder, help="folder to write to")
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--threads", type=int, default=threads)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    save(train(args.seed, args.steps), args.out, save_rest, dtype)
    print(f"trained and saved in {time.perf_counter() - began:.0f} s")


def evaluate_command(
    about: str | None,
    evaluate: Callable[[Path, int, int], dict[str, Tally]],
    *,
    folder: Path,
    seed: int,
    counted: str,
    below: Callable[[Path], str] | None = None,
) -> None:
    """The command line that prints what `evaluate(folder, n, seed)` finds; counted: what `n` is.
    below: what is printed under the table."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", type=Path, default=folder, help="model folder")
    parser.add_argument("--n", type=int, default=4000, help=f"number of {counted}")
    parser.add_argument("--seed", type=int, default=seed)
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
    if below is not None:
        print(below(args.model))
