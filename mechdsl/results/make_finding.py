"""What an experiment found once it has run, for those that pick from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mechdsl.resolve.findings import VariantFinding
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.statistics.effect_parts import parts
from mechdsl.vocab.effects import EFFECTS


def found_by(experiment: ResolvedExperiment, result: ExperimentResult) -> VariantFinding:
    """What a measured experiment found, by its first measure."""
    data = result.measures[0]
    ids = result.row_ids if result.row_ids is not None else experiment.table.row_ids
    name = data.label if data.called == "raw" else f"{data.called} of {data.label}"
    replies = tuple(result.replies.cells)
    found = VariantFinding(experiment, name, row_ids=ids, cells=result.cells, replies=replies)
    if data.kind == "category":  # has no effect; picking by it is refused before anything runs
        none = np.full(len(data.patched), np.nan)
        return replace(found, means=none, values=data.patched)
    effect = EFFECTS[data.effect]
    with np.errstate(divide="ignore", invalid="ignore"):
        means = parts(data, effect, slice(None)).mean()
        values = effect.of_means(data.patched, data.base, data.source)
    return replace(found, means=means, values=np.broadcast_to(values, data.patched.shape))
