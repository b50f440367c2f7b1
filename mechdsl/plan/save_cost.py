"""What `save` lines cost: passes over prompts, and room on the disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mechdsl.graph.nodes import highest_read
from mechdsl.models.shape import ModelShape
from mechdsl.plan.cost import Cost, reply_cost, run_cost
from mechdsl.plan.plan import PASS_TOKENS, PROMPT_TOKENS
from mechdsl.plan.read_batches import read_batches
from mechdsl.plan.reply_cost import reading_work, reply_work
from mechdsl.plan.save_plan import SIZES, SaveLayout, layout_of, reads_of, save_panel
from mechdsl.plan.sweeps import save_sweeps
from mechdsl.program.spec_replies import Generation
from mechdsl.prompts.prompt_table import Run
from mechdsl.resolve.resolved import ResolvedExperiment, ResolvedSave


@dataclass(frozen=True, eq=False)
class SaveCost:
    """Of one line."""

    experiment: str
    save: ResolvedSave
    layout: SaveLayout
    bytes: int
    """Of its file's tensors."""
    cost: Cost
    """Without cells or rows, as nothing is patched beyond what its run says."""


def save_costs(
    saving: Sequence[ResolvedExperiment], prompt_tokens: int = PROMPT_TOKENS
) -> list[SaveCost]:
    """Of every line. saving: the experiments with `save` lines."""
    return [each for experiment in saving for each in _of(experiment, prompt_tokens)]


def _of_replies(
    said: Generation, run: Run, shape: ModelShape, stop: int | None, batches: int
) -> Cost:
    """All that a run writes, and a pass over prompts and replies that stops where nothing more is
    read."""
    lengths = np.repeat(run.lengths, run.draws)
    first = replace(run_cost(shape, run, None), forwards=batches)
    given = (said.tokens, said.samples)
    writing = reply_work(lengths, *given, kept=True, pass_tokens=PASS_TOKENS)
    reading = reading_work(lengths + said.tokens, 0, said.samples, PROMPT_TOKENS)
    blocks = shape.n_layers if stop is None else min(stop, shape.n_layers)
    return first + reply_cost(shape, writing) + reply_cost(shape, reading, blocks)


def _of(experiment: ResolvedExperiment, prompt_tokens: int) -> Iterator[SaveCost]:
    panel, shape = save_panel(experiment), experiment.model.shape
    own = experiment.model.spec.dtype
    for save, read in zip(experiment.saves, reads_of(experiment), strict=True):
        run = panel.table.runs[save.run]
        batches = len(read_batches(shape, SIZES[own], run, save.points, tokens=prompt_tokens))
        times = save_sweeps(panel, save.run, several=batches > 1)
        cost = run_cost(shape, run, highest_read(read))
        for name, count in (times - Counter([save.run])).items():
            cost += count * run_cost(shape, panel.table.runs[name], None)
        joined = Cost(0, 0, times.total() * batches, cost.tokens, cost.multiply_adds)
        if experiment.generation is not None and save.in_reply:
            joined = _of_replies(experiment.generation, run, shape, highest_read(read), batches)
        layout = layout_of(experiment, save)
        size = layout.bytes(save.spec.dtype or own)
        yield SaveCost(experiment.key, save, layout, size, joined)
