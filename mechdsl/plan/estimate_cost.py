"""What estimates by gradients cost: passes forward and back over the prompts of the base run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.moved_together import sites_of_cells


@dataclass(frozen=True)
class GradientWork:
    """Of some prompts."""

    forwards: int = 0
    """Each prompt in passes of its own."""
    backwards: int = 0
    joined_forwards: int = 0
    """Several prompts in each pass."""
    joined_backwards: int = 0
    tokens: int = 0
    """Through each block, there and back."""
    adds: float = 0.0
    """Multiply-adds in each block, there and back."""
    logits: int = 0
    """Tokens whose logits are computed, or come back."""

    def __add__(self, other: GradientWork) -> GradientWork:
        return GradientWork(
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            self.joined_forwards + other.joined_forwards,
            self.joined_backwards + other.joined_backwards,
            self.tokens + other.tokens,
            self.adds + other.adds,
            self.logits + other.logits,
        )


def gradient_work(
    plan: ExperimentPlan, prompts: Ints, whole: Callable[[Ints], Ints], pass_tokens: int
) -> GradientWork:
    """whole: multiply-adds of prompts of these lengths in one block. pass_tokens: of a pass over
    rows, whose memory one that is gone back through shares among all blocks.

    A pass back takes as many as one forward: activations have gradients, weights have none.
    """
    experiment, said = plan.experiment, plan.experiment.spec.estimator
    if said is None:
        return GradientWork()
    run = experiment.table.runs[experiment.spec.base]
    own = prompts[plan.present(prompts).any(axis=0)]
    lengths = np.repeat(run.lengths[own], run.draws)
    by_item = any(atom.by_item for measure in experiment.measures for atom in measure.atoms)
    kinds = len(set(plan.items)) if by_item else 1
    each = max(1, pass_tokens // experiment.model.shape.n_layers)
    joined = -(-int(lengths.sum()) // each)
    plain, found = False, GradientWork()
    for measure in experiment.measures:
        texts = [atom.behind for atom in measure.atoms if any(atom.behind)]
        behind = [np.repeat(np.array(text)[own], run.draws) for text in texts]
        for more in behind:  # each has a pass of its own
            found += _pass(lengths + more, joined, whole, forwards=1, backwards=kinds)
        if len(texts) < len(measure.atoms):
            found += _pass(lengths, joined, whole, forwards=0 if plain else 1, backwards=kinds)
            plain = True
    if said.steps is None:
        return found
    times = said.steps * len(set(sites_of_cells(plan).tolist()))
    first = _pass(lengths, joined, whole, forwards=1, backwards=0)
    return sum((found for _ in range(times)), first)


def _pass(
    lengths: Ints, joined: int, whole: Callable[[Ints], Ints], *, forwards: int, backwards: int
) -> GradientWork:
    """All prompts so often there, and so often back. joined: passes that they take together."""
    times = forwards + backwards
    return GradientWork(
        forwards * len(lengths),
        backwards * len(lengths),
        forwards * joined,
        backwards * joined,
        times * int(lengths.sum()),
        times * float(whole(lengths).sum()),
        times * len(lengths),
    )
