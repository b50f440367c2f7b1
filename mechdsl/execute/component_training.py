"""Training of linear components: their files, and how independent their coordinates are."""

from __future__ import annotations

import torch

from mechdsl.execute.run_record import IndependenceReport
from mechdsl.execute.training import DictionaryWriter, TrainingJob, solve_twice
from mechdsl.execute.training_vectors import RowVectors
from mechdsl.fits.components import median_kurtosis
from mechdsl.fits.training import TrainingState, assess, principal_axes
from mechdsl.resolve.types import TrainedDictionary


def train_components(
    declared: TrainedDictionary, vectors: RowVectors, job: TrainingJob
) -> IndependenceReport:
    """Compute independent components of all vectors, write them, and compare them with controls.

    Raises:
        NotFactored: The vectors have fewer components, or don't fit into memory together.
        OSError: A file can't be written.
    """
    untrained, trained = solve_twice(declared, vectors, job)
    writer = DictionaryWriter.of_solution(declared, job)
    own, _ = vectors.chunk(0)
    held_out, _ = vectors.held_out()
    measured = held_out if len(held_out) else own
    with torch.no_grad():
        random = writer.load(writer.write(job.folder, untrained.tensors)).encode(measured)
        system = writer.load(writer.write(job.folder, trained.tensors))
        coordinates = system.encode(measured)
        explained = assess(coordinates, system.reconstruct(measured), measured).explained
        center, axes = principal_axes(own, declared.features)
        principal = (measured.double() - center) @ axes.T
    rows, count = vectors.amounts(TrainingState())
    report = IndependenceReport(
        rows=rows,
        vectors=count,
        held_out_rows=vectors.held_out_count,
        held_out_vectors=len(held_out),
        steps=trained.steps,
        stopped_early=trained.stopped_early,
        explained=explained,
        kurtosis=median_kurtosis(coordinates),
        untrained_kurtosis=median_kurtosis(random),
        components_kurtosis=median_kurtosis(principal),
    )
    job.write_card(report)
    return report
