"""Training of a declared rotation: its controls and its files.

The edit is x + (y − x) RᵀR, where x are the vectors of the base run and y those of the source run.
The rows of R are the directions that are trained.

References:
    Geiger et al. 2023, arXiv 2303.02536.
"""

from __future__ import annotations

import torch

from mechdsl.execute.objective_rows import EditLoss, ObjectiveRows, take_source
from mechdsl.execute.run_record import ROTATION_FILE, RotationReport
from mechdsl.execute.training import TrainingJob, read_settings, start_generator
from mechdsl.fits.rotations import Rotation
from mechdsl.fits.training import Training
from mechdsl.program.trainers import RotationTrainer
from mechdsl.resolve.trainings import ROTATION
from mechdsl.resolve.types import TrainedRotation


def train_rotation(
    declared: TrainedRotation,
    rows: ObjectiveRows,
    job: TrainingJob,
) -> RotationReport:
    """Train a rotation, and write it.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NotFinite: The measure or a weight became NaN or infinite.
        OSError: A file can't be written.
    """
    training, settings = declared.training, read_settings(declared.training)
    trainer = training.trainer_of(RotationTrainer)
    with torch.enable_grad():
        rotation = trainer.start(rows.vectors[0], training.of_trainer, start_generator(training))
        start = rotation.matrix.clone()
        model = EditLoss(rotation, rows, settings.batch)
        loop = Training(model, rows, rows.held_out(), settings, lambda own, other: (own, other))
        job.run(loop)
    directions = rotation.directions().detach()
    job.write_tensors(ROTATION_FILE, {ROTATION: directions})
    untrained = Rotation(start[: len(directions)])
    cases = (rotation.edit, untrained.edit, None, take_source)
    means = [rows.mean(rows.measured, each, settings.batch) for each in cases]
    report = RotationReport(
        *rows.outcome(loop.state),
        len(directions),
        *means,
    )
    job.write_card(report, ROTATION_FILE)
    return report
