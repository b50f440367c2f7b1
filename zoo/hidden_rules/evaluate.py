"""Measures accuracy on held-out texts: `python -m zoo.hidden_rules.evaluate`."""

from __future__ import annotations

from pathlib import Path

from zoo import MODELS, language
from zoo.commands import Tally, evaluate_command
from zoo.hidden_rules.data import KINDS, stream

SEED = 20265  # not the training seed; only held-out texts are drawn


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Return the accuracy by kind of text, on `n` held-out texts of each."""
    return language.evaluate_kinds(
        folder, KINDS, lambda kind: stream(seed, held_out=True, kind=kind), n
    )


def main() -> None:
    """The command line."""
    folder = MODELS / "hidden-rules"
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="texts of each kind")


if __name__ == "__main__":
    main()
