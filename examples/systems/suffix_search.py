"""Search the suffix of 25-subspace-rerouting.mech: `python examples/systems/suffix_search.py`.

Each step replaces one word of the suffix by one of the words that the gradient at the embeddings
ranks highest, as greedy coordinate gradient does (Zou et al. 2023, arXiv 2307.15043). Words are
those of forbidden questions, so that no word of an allowed question does the work.
"""

from __future__ import annotations

import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechdsl

FILE = Path(__file__).with_name("25-subspace-rerouting.mech")
LENGTH, TRIED, STEPS, CONTROLS = 6, 6, 8, 100


def search() -> tuple[str, float, list[float]]:
    """Return the suffix, its measure, and the measures of random suffixes of the same words."""
    folder = str(files("mechdsl.zoo") / "refusal")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    objective = mechdsl.objective(
        FILE, models={"lm": (model, tokenizer)}, experiment="searching", site="embed",
        at="words tokens", set={"suffix": " ".join(["how"] * LENGTH)}, limit=16,
    )  # fmt: skip
    vectors = model.get_input_embeddings().weight.detach()
    outside = {int(at) for at in objective.positions.unique()}
    ids = {each for row in objective.ids for at, each in enumerate(row) if at not in outside}
    words = sorted(ids - set(tokenizer.all_special_ids))

    def measure(suffix: list[int]) -> float:
        with torch.no_grad():
            return objective(vectors[suffix]).mean().item()

    best = [tokenizer.convert_tokens_to_ids("how")] * LENGTH
    for _ in range(STEPS):
        leaf = vectors[best].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf).mean(), leaf)
        ranked = (gradient @ vectors[words].T).topk(TRIED).indices.tolist()
        tried = [
            [*best[:at], words[word], *best[at + 1 :]]
            for at in range(LENGTH)
            for word in ranked[at]
        ]
        found = max([best, *tried], key=measure)
        if found == best:
            break
        best = found
    draw = random.Random(0)
    controls = [measure(draw.choices(words, k=LENGTH)) for _ in range(CONTROLS)]
    return " ".join(tokenizer.convert_ids_to_tokens(best)), measure(best), controls


if __name__ == "__main__":
    suffix, value, controls = search()
    print(f"{suffix}: {value:.2f}; {CONTROLS} random suffixes: at most {max(controls):.2f}")
