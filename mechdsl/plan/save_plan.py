"""What has to be run for `save` lines: the runs that they read, and those these are made of."""

from __future__ import annotations

from dataclasses import replace

from mechdsl.graph.needs import Asked, needs, with_own
from mechdsl.graph.nodes import ReadNode, graph_of, unpatched
from mechdsl.plan.plan import Panel, panel_of
from mechdsl.resolve.resolved import ResolvedExperiment, ResolvedSave


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
    return panel_of(
        experiment.model.name, clean, [Asked(alone, clean, tuple(runs.values()))], found
    )


def _read(experiment: ResolvedExperiment, save: ResolvedSave) -> ReadNode:
    cells = {(number,): cell for number, cell in enumerate(save.cells)}
    forward = unpatched(experiment, save.run)
    return ReadNode(forward, save.spec.at.span.written, {(): save.points}, cells)
