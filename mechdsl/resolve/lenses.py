"""Resolve lenses that a file trains: `lens NAME = fit(tuned_lens, …) at resid_post layer *`."""

from __future__ import annotations

from dataclasses import replace

from mechdsl.diagnostics.core import has_errors
from mechdsl.program import spec
from mechdsl.resolve.directions import (
    DirectionError,
    check_training,
    resolve_definition,
    resolve_one_sample,
)
from mechdsl.resolve.sites import ExperimentContext, resolve_site
from mechdsl.resolve.trainings import (
    FEWEST_ROWS,
    STREAM,
    outline_lens,
)
from mechdsl.resolve.types import TrainedLens


def resolve_lens(name: str, work: ExperimentContext) -> TrainedLens | None:
    """Resolve a lens that an observation names.

    None after an error, and if a required model or prompt set isn't available.

    Codes: E0342, E0345, and those of sites and positions.
    """
    return resolve_definition(name, "lens", _resolve, work)


def _resolve(definition: spec.Basis, work: ExperimentContext) -> TrainedLens | None:
    """Resolve a lens. Raises DirectionError."""
    layers = _layers(definition, work)
    if layers is None:
        return None
    found = resolve_one_sample(definition, "lens", FEWEST_ROWS, work)
    if found is None:
        return None
    sample, text = found
    lens = outline_lens(definition, sample, layers, work.program, work.model)
    stream = lens.training.stream
    if stream is not None:
        text = f"{stream.count:,} streamed rows of {sample.table.name} at {sample.cell.label}"
    return replace(lens, made=check_training(definition, lens, text, work))


def _layers(definition: spec.Basis, work: ExperimentContext) -> tuple[int, ...] | None:
    """Return the layers with a map, which is all named ones but the last of the model; None after
    other errors. Raises DirectionError."""
    before = len(work.diagnostics)
    sites, _ = resolve_site(definition.site, replace(work.sites, loops={}))
    if sites is None or has_errors(work.diagnostics[before:]):
        return None
    points = [
        point for key, here in sites.points.items() if key not in sites.missing for point in here
    ]
    other = next((point.site for point in points if point.site != STREAM), None)
    if other is not None:
        raise DirectionError(
            definition.site,
            f"a lens reads the stream after each block, not `{other}`",
            f"write `at {STREAM} layer * at tokens *`",
        )
    last = work.model.shape.n_layers - 1
    layers = {point.layer for point in points if point.layer is not None}
    if layers == {last} and not work.model.shape.stands_in:
        raise DirectionError(
            definition.site,
            f"the stream after the last block, layer {last}, needs no lens",
            f"name earlier layers: `at {STREAM} layer *`",
        )
    return tuple(sorted(layers - {last}))
