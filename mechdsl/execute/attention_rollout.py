"""Attention rollout: what each token of a prompt is mixed of, by the patterns of all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.read_vectors import LanesOf, prompt_batches, read_vectors
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.models.shape import units
from mechdsl.prompts.prompt_table import PositionCell, Run
from mechdsl.resolve.resolved_rule import SitePoint


def rollouts(
    model: LoadedModel,
    run: Run,
    points: Sequence[SitePoint],
    prompts: Ints,
    lanes_of: Callable[[Sequence[SitePoint]], LanesOf],
) -> Iterator[tuple[int, Floats]]:
    """(prompt, [token, token] how much of the second one is in the first behind the last layer);
    of runs with noise the mean over draws.

    points: the patterns of all layers, the first one first.
    """
    everywhere = PositionCell("tokens *", tuple((tuple(range(len(r.ids))),) for r in run.rows))
    lanes = lanes_of(points)
    for batch in prompt_batches(model, run, points, prompts):
        mixed: dict[tuple[int, int], Floats] = {}
        for found in read_vectors(lanes, points, [everywhere], [batch]):
            heads = units(model.shape, "pattern", points[found.point].layer)
            patterns = found.vectors.double().reshape(len(found.vectors), heads, -1).mean(1)
            patterns = patterns.cpu().numpy()
            for prompt in batch.tolist():
                for draw in range(int(found.draws.max(initial=0)) + 1):
                    own = np.flatnonzero((found.prompts == prompt) & (found.draws == draw))
                    order = own[np.argsort(found.tokens[own])]
                    size = len(run.rows[prompt].ids)
                    step = patterns[order, :size] + np.eye(size)
                    step /= step.sum(1, keepdims=True)
                    key = prompt, draw
                    mixed[key] = step @ mixed[key] if key in mixed else step
        for prompt in batch.tolist():
            yield prompt, np.mean([each for (row, _), each in mixed.items() if row == prompt], 0)


def between(mixed: Floats, queries: Sequence[int], keys: Sequence[int]) -> float:
    """What some tokens have of others: added up over these, averaged over the first.

    mixed: [token, token]
    """
    return float(mixed[np.ix_(queries, keys)].sum(1).mean())
