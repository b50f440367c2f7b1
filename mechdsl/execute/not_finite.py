"""Where a number that is none (NaN, or infinite) first arose in a run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e06_numbers import NotFinite
from mechdsl.execute.patched_rows import Patcher
from mechdsl.execute.readout import Readout
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.unusable import Unusable
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteRead
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.share import SharedRows
from mechdsl.prompts.prompt_table import Run
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.vocab.sites import SITES


def in_run(runs: UnpatchedRuns, readout: Readout, unusable: Unusable) -> Unusable:
    """With the place in an unpatched run, or in one that a metric compares it with: found by one
    more pass over the row."""
    prompt = unusable.row
    named = [unusable.run, *(a.run for _, a in readout.atoms if a.run is not None)]
    for name in dict.fromkeys(named):
        run = runs.named(name)
        model = runs.model_of(run)
        for text in (None, *(readout.atoms[n][1] for n in readout.continuations)):
            place = _first(runs.everything(run, prompt, stream(model), text))
            if place:
                return Unusable(prompt, name, place=place)
    return Unusable(prompt, unusable.run, place=_elsewhere(runs))


def in_cell(
    patcher: Patcher, shared: SharedRows, row: int, run: Run, batch: Ints, unusable: Unusable
) -> Unusable:
    """With the place in a patched run, found by one more pass over the row `row` of `shared`."""
    chosen = np.array([row], dtype=np.int64)
    reads = patcher.everything(shared, chosen, run, batch, stream(patcher.model))
    place = _first(reads) or _elsewhere(patcher.runs)
    return Unusable(unusable.row, unusable.run, unusable.cell, place)


def _elsewhere(runs: UnpatchedRuns) -> str:
    """Where it is, if no site of the prompt has it."""
    return "behind the last block" if runs.writer is None else "while it writes"


def cell_words(plan: ExperimentPlan, cell: int) -> str:
    """The coordinates of a cell; empty where the experiment has one only."""
    axes = zip(plan.experiment.axes, plan.coordinates, strict=True)
    found = [(axis.name, axis.labels[int(index[cell])]) for axis, index in axes]
    return ", ".join(str(at) if name == "position" else f"{name} {at}" for name, at in found)


def stream(model: LoadedModel) -> list[SiteRead]:
    """What a model's main stack adds up and hands on, in the order of a forward pass."""
    whole = [s for _, s in SITES.items() if s.width == "d_model" and s.unit is None]
    inside = sorted((s for s in whole if s.has_layer), key=lambda site: site.order)
    layers = {site.name: model.anatomy.layers(site.name) for site in inside}
    outside = [SiteRead(name) for name in ("embed", "final_norm") if name in model.anatomy.taps]
    blocks = [
        SiteRead(site.name, layer)
        for layer in range(model.shape.n_layers)
        for site in inside
        if layer in layers[site.name]
    ]
    first = [read for read in outside if read.site == "embed"]
    return [*first, *blocks, *(read for read in outside if read not in first)]


def _first(reads: Mapping[SiteRead, Tensor]) -> str:
    """The first site, in the order of the mapping, with a number that is none; empty where there
    is no such site."""
    for read, found in reads.items():
        if not bool(found.isfinite().all()):
            of = "" if read.layer is None else f" of layer {read.layer}"
            return f"in `{read.site}`{of}"
    return ""


def place_words(unusable: Unusable, experiment: ResolvedExperiment) -> str:
    """The run, or the cell, in which a row can't be used."""
    if unusable.cell is None:
        return f"run `{unusable.run}`"
    return f"patched run of {unusable.cell or f'`{experiment.key}`'}"


def row_words(unusable: Unusable, experiment: ResolvedExperiment) -> str:
    """The run or cell, and the row."""
    row = f"row {experiment.table.row_ids[unusable.row]} of `{experiment.table.name}`"
    return f"{place_words(unusable, experiment)}, {row}"


def not_finite(experiment: ResolvedExperiment, first: Unusable, count: int) -> Diagnostic:
    """E0621 for an experiment.

    first: with its place. count: rows in which there is such a number, as far as is known.
    """
    rows = len(experiment.table)
    return NotFinite(
        span=experiment.spec.measures[0].span,
        model=experiment.model.name,
        run=place_words(first, experiment),
        row=experiment.table.row_ids[first.row],
        prompts=experiment.table.name,
        where=", ".join(
            [
                *([f"first {first.place}"] if first.place else []),
                *([f"in {count} of {rows} rows"] if count > 1 or not first.place else []),
            ]
        ),
    )
