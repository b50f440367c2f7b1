"""What has to be run for `save` lines: the runs that they read, and those these are made of; and
what their files will hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.graph.build import unpatched
from mechdsl.graph.needs import Asked, needs, with_own
from mechdsl.graph.nodes import ReadNode, SaveNode, graph_of
from mechdsl.models.shape import ModelShape
from mechdsl.plan.plan import Panel, panel_of
from mechdsl.plan.read_batches import numbers_of
from mechdsl.program.spec_replies import Generation
from mechdsl.prompts.prompt_table import Run
from mechdsl.resolve.resolved import ResolvedExperiment, ResolvedSave
from mechdsl.resolve.saves import tensor_name

SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number, by its type."""


@dataclass(frozen=True, eq=False)
class SaveLayout:
    """What the file of a `save` line holds: it hangs on positions and the model's shape alone."""

    counts: Ints
    """[row of the run] how many vectors it has at each site."""
    widths: Mapping[str, int]
    """By tensor, the length of its vectors."""
    columns: tuple[str, ...]
    """Tensors of whole numbers beside: which row, token, position, draw, sample a vector is of."""

    at_most: bool = False
    """Replies may be shorter, and then there are fewer."""

    @staticmethod
    def of(
        save: ResolvedSave,
        run: Run,
        shape: ModelShape,
        also: tuple[str, ...] = (),
        *,
        written: Generation | None = None,
    ) -> SaveLayout:
        """run: the one that is saved; shape: of its model; also: more columns; written: replies
        whose tokens are saved, and which aren't there yet."""
        counts = np.zeros(len(run.rows), dtype=np.int64)
        for cell in save.cells:
            each = 1 if cell.reply is None or written is None else cell.reply.most(written.tokens)
            counts += each * np.array([sum(map(len, hits)) for hits in cell.hits], dtype=np.int64)
        counts *= 1 if written is None else written.samples
        keys = int(run.lengths.max())
        widths = {tensor_name(point): numbers_of(shape, point, keys) for point in save.points}
        names = ("row", "token", "position", *(("draw",) if run.draws > 1 else ()), *also)
        return SaveLayout(counts * run.draws, widths, names, written is not None)

    @property
    def vectors(self) -> int:
        """Of each site."""
        return int(self.counts.sum())

    @property
    def rows(self) -> int:
        """Those that have a vector."""
        return int((self.counts > 0).sum())

    def bytes(self, dtype: str) -> int:
        """Of all tensors; the file's header comes to that."""
        return self.vectors * (sum(self.widths.values()) * SIZES[dtype] + 8 * len(self.columns))


def layout_of(experiment: ResolvedExperiment, save: ResolvedSave) -> SaveLayout:
    """What a line will write. Models that are compared have the same sizes."""
    run, said = experiment.table.runs[save.run], experiment.generation
    written = said if save.in_reply else None
    also = ("sample",) if written and written.samples > 1 else ()
    return SaveLayout.of(save, run, experiment.model.shape, also, written=written)


def save_nodes(experiment: ResolvedExperiment) -> list[SaveNode]:
    """The `save` lines of an experiment, as nodes of a graph."""
    reads = zip(experiment.saves, reads_of(experiment), strict=True)
    return [SaveNode(experiment.key, read, save.spec.file) for save, read in reads]


def reads_of(experiment: ResolvedExperiment) -> list[ReadNode]:
    """What `save` lines read, as nodes of a graph."""
    return [_read(experiment, save) for save in experiment.saves]


def save_panel(experiment: ResolvedExperiment) -> Panel:
    """The runs of an experiment that its `save` lines read. It has no cells."""
    reads = reads_of(experiment)
    found = needs(graph_of(reads))
    runs = {each.run: each for read in reads for each in with_own(read.forward)}
    clean = replace(unpatched(experiment, "clean").encode, run="clean")
    alone = replace(experiment, rules=(), axes=(), measures=(), keep=(), accuracies={})
    return panel_of(experiment.model.key, clean, [Asked(alone, clean, tuple(runs.values()))], found)


def _read(experiment: ResolvedExperiment, save: ResolvedSave) -> ReadNode:
    cells = {(number,): cell for number, cell in enumerate(save.cells)}
    forward = unpatched(experiment, save.run)
    return ReadNode(forward, save.spec.at.span.written, {(): save.points}, cells)
