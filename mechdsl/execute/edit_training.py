"""Training of declared rotations, vectors and scales: their controls and their files.

x are the vectors of the base run. A rotation is trained on x + (y − x) RᵀR, where y are the vectors
of the source run and the rows of R the directions that are trained; a steering vector v on x + v; a
soft prompt on x + v_k, where k is the token in the named position; and scales s on x ⊙ s.

References:
    Geiger et al. 2023, arXiv 2303.02536 (rotations).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mechdsl.base.hashing import stable_hash
from mechdsl.execute.objective_rows import Edit, EditLoss, ObjectiveRows, take_source
from mechdsl.execute.run_record import (
    ROTATION_FILE,
    VECTOR_FILE,
    RotationReport,
    ScaleReport,
    SoftPromptReport,
    VectorReport,
)
from mechdsl.execute.training import TrainingJob, read_settings, start_generator
from mechdsl.fits.rotations import Rotation
from mechdsl.fits.training import Training
from mechdsl.fits.vectors import SoftPrompt, TrainedVectors, rescale
from mechdsl.planner.training_cost import RANDOM_CONTROLS
from mechdsl.program.spec import CLEAN
from mechdsl.program.trainers import RotationTrainer, ScaleTrainer, VectorTrainer
from mechdsl.resolve.trainings import ROTATION, VECTOR, name_prompt_vector
from mechdsl.resolve.types import TrainedRotation, TrainedVector


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


def train_vector(
    declared: TrainedVector,
    rows: ObjectiveRows,
    job: TrainingJob,
) -> VectorReport | SoftPromptReport:
    """Train a vector or a soft prompt, and write it.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NotFinite: The measure or a weight became NaN or infinite.
        OSError: A file can't be written.
    """
    training, settings = declared.training, read_settings(declared.training)
    own, _ = rows.vectors
    trainer = training.trainer_of(VectorTrainer)
    with torch.enable_grad():
        random = start_generator(training)
        trained = trainer.start(own, training.of_trainer, random)
        if isinstance(trained, SoftPrompt) and (others := rows.image_vectors) is not None:
            trained.draw_start(others, random)
        start = trained.vector().detach().clone()
        model = EditLoss(trained, rows, settings.batch)
        loop = Training(model, rows, rows.held_out(), settings, lambda own, other: (own, other))
        job.run(loop)
    vector = trained.vector().detach()
    count = trainer.count_tokens(training.of_trainer)
    names = [VECTOR] if count is None else [name_prompt_vector(n) for n in range(count)]
    job.write_tensors(VECTOR_FILE, dict(zip(names, vector.reshape(len(names), -1), strict=True)))
    common = rows.outcome(loop.state)
    values = _Values(trained, rows, vector, settings.batch)
    if count is None:
        length = float(vector.norm())
        report = VectorReport(*common, length, trained.like_length, *values.all_means())
    else:
        length = float(vector.norm(dim=1).mean())
        report = SoftPromptReport(
            *common,
            count,
            length,
            trained.like_length,
            *values.edited_means(),
            values.clean_mean(),
            values.mean(start),
        )
    job.write_card(report, VECTOR_FILE)
    return report


class _Values:
    """Means of the measure with a trained vector and with its controls."""

    def __init__(
        self, trained: TrainedVectors, rows: ObjectiveRows, vector: Tensor, batch: int
    ) -> None:
        self.trained, self.rows, self.vector, self.batch = trained, rows, vector, batch

    def mean(self, vector: Tensor | None) -> float:
        """Return the mean with a vector; None for the base run."""
        edit: Edit | None = None
        if vector is not None:
            edit = lambda own, other: self.trained.write(own, vector)  # noqa: E731
        return self.rows.mean(self.rows.measured, edit, self.batch)

    def edited_means(self) -> tuple[float, float, float]:
        """Return means with the vector, with random vectors of its length, and of the base run."""
        seed = stable_hash(self.rows.declared.seed, "random vectors") % 2**63
        random = torch.Generator().manual_seed(seed)
        drawn = [self.trained.draw_like(self.vector, random) for _ in range(RANDOM_CONTROLS)]
        randoms = sum(map(self.mean, drawn)) / len(drawn)
        return self.mean(self.vector), randoms, self.mean(None)

    def all_means(self) -> tuple[float, float, float, float | None]:
        """Return these means, and that with the mean difference from the source run at the length
        of the vector; None without a source run."""
        difference = self.rows.mean_difference()
        scaled = None if difference is None else rescale(difference, float(self.vector.norm()))
        return *self.edited_means(), None if scaled is None else self.mean(scaled)

    def clean_mean(self) -> float | None:
        """Return the mean of the clean run in the same rows; None if that is the base run."""
        objective = self.rows.objective
        if objective.spec.base == CLEAN:
            return None
        on_clean = objective.spec.model_copy(update={"base": CLEAN})
        clean = replace(self.rows, objective=replace(objective, spec=on_clean))
        return clean.mean(self.rows.measured, None, self.batch)


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
