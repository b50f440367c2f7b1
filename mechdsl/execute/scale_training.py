"""Training of declared scales: their controls and their files.

The edit is x ⊙ s, where x are the vectors of the base run and s is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechdsl.base.hashing import stable_hash
from mechdsl.execute.objective_rows import Edit, EditLoss, ObjectiveRows
from mechdsl.execute.run_record import VECTOR_FILE, ScaleReport
from mechdsl.execute.training import TrainingJob, read_settings, start_generator
from mechdsl.fits.training import Training
from mechdsl.planner.training_cost import RANDOM_CONTROLS
from mechdsl.program.trainers import ScaleTrainer
from mechdsl.resolve.trainings import VECTOR
from mechdsl.resolve.types import TrainedVector


def train_scales(declared: TrainedVector, rows: ObjectiveRows, job: TrainingJob) -> ScaleReport:
    """Train scales, and write them.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NotFinite: The measure or a weight became NaN or infinite.
        OSError: A file can't be written.
    """
    training, settings = declared.training, read_settings(declared.training)
    trainer = training.trainer_of(ScaleTrainer)
    with torch.enable_grad():
        scales = trainer.start(rows.vectors[0], training.of_trainer, start_generator(training))
        model = EditLoss(scales, rows, settings.batch)
        loop = Training(model, rows, rows.held_out(), settings, lambda own, other: (own, other))
        job.run(loop)
    factors = scales.factors().detach()
    job.write_tensors(VECTOR_FILE, {VECTOR: factors})
    report = ScaleReport(
        *rows.outcome(loop.state),
        float(factors.min()),
        float(factors.max()),
        float(factors.mean()),
        *_controls(rows, factors, settings.batch),
    )
    job.write_card(report, VECTOR_FILE)
    return report


def _controls(
    rows: ObjectiveRows, factors: Tensor, batch: int
) -> tuple[float, float, float, float, float]:
    """Return means of the measure with the factors, with the factors in random orders, with their
    mean for all channels, with 0, and without scales."""

    def mean(scale: Tensor | None) -> float:
        edit: Edit | None = None if scale is None else (lambda own, other: own * scale)
        return rows.mean(rows.measured, edit, batch)

    random = torch.Generator().manual_seed(stable_hash(rows.declared.seed, "orders") % 2**63)
    orders = [torch.randperm(len(factors), generator=random) for _ in range(RANDOM_CONTROLS)]
    shuffled = sum(mean(factors[order.to(factors.device)]) for order in orders) / RANDOM_CONTROLS
    uniform = factors.mean().expand_as(factors)
    return mean(factors), shuffled, mean(uniform), mean(torch.zeros_like(factors)), mean(None)
