"""Training of a declared steering vector: its controls and its files.

The edit is x + v, where x are the vectors of the base run and v is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechdsl.base.hashing import stable_hash
from mechdsl.execute.objective_rows import Edit, EditLoss, ObjectiveRows
from mechdsl.execute.run_record import VECTOR_FILE, VectorReport
from mechdsl.execute.training import TrainingJob, read_settings, start_generator
from mechdsl.fits.training import Training
from mechdsl.fits.vectors import SteeringVector, rescale
from mechdsl.program.trainers import TRAINERS
from mechdsl.resolve.trainings import VECTOR
from mechdsl.resolve.types import TrainedVector

RANDOM_VECTORS = 8
"""Random vectors that a trained one is compared with."""


def train_vector(
    declared: TrainedVector,
    rows: ObjectiveRows,
    job: TrainingJob,
) -> VectorReport:
    """Train a vector, and write it.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NotFinite: The measure or a weight became NaN or infinite.
        OSError: A file can't be written.
    """
    training, settings = declared.training, read_settings(declared.training)
    own, _ = rows.vectors
    trainer = TRAINERS[training.trainer]
    with torch.enable_grad():
        steering = trainer.start_vector(own, training.of_trainer, start_generator(training))
        model = EditLoss(steering, rows, settings.batch)
        loop = Training(model, rows, rows.held_out(), settings, lambda own, other: (own, other))
        job.run(loop)
    vector = steering.vector().detach()
    job.write_tensor(VECTOR_FILE, VECTOR, vector)
    report = VectorReport(
        len(rows.rows) - rows.held_out_count,
        rows.held_out_count,
        loop.state.step,
        loop.state.stopped,
        rows.text,
        float(vector.norm()),
        float(own.norm(dim=1).mean()),
        *_controls(steering, rows, vector, settings.batch),
    )
    job.write_card(report, VECTOR_FILE)
    return report


def _controls(
    steering: SteeringVector, rows: ObjectiveRows, vector: Tensor, batch: int
) -> tuple[float, float, float, float | None]:
    """Return means of the measure with the vector, with random vectors of its length, without a
    vector, and with the mean difference from the source run at its length; None without one."""
    length = float(vector.norm())

    def mean(added: Tensor | None) -> float:
        edit: Edit | None = None if added is None else (lambda own, other: own + added)
        return rows.mean(rows.measured, edit, batch)

    seed = stable_hash(rows.declared.seed, "random vectors") % 2**63
    random = torch.Generator().manual_seed(seed)
    drawn = [rescale(steering.draw(random), length) for _ in range(RANDOM_VECTORS)]
    randoms = sum(map(mean, drawn)) / len(drawn)
    difference = rows.mean_difference()
    return (
        mean(vector),
        randoms,
        mean(None),
        None if difference is None else mean(rescale(difference, length)),
    )
