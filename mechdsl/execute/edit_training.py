"""Training of declared rotations, vectors, edits and scales: their controls and their files.

x are the vectors of the base run. A rotation is trained on x + (y − x) RᵀR, where y are the vectors
of the source run and the rows of R the directions that are trained; a steering vector v on x + v; a
soft prompt on x + v_k, where k is the token in the named position; an edit on x + Δ(x), with an
affine function Δ of low rank; and scales s on x ⊙ s.

References:
    Geiger et al. 2023, arXiv 2303.02536 (rotations); Wu et al. 2024, arXiv 2404.03592 (edits).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor

from mechdsl.base.hashing import stable_hash
from mechdsl.execute.objective_rows import Edit, EditLoss, ObjectiveRows, take_source
from mechdsl.execute.training import TrainingJob, read_settings, start_generator
from mechdsl.fits.reports import (
    ROTATION_FILE,
    VECTOR_FILE,
    EditReport,
    RotationReport,
    ScaleReport,
    SoftPromptReport,
    VectorReport,
)
from mechdsl.fits.training import Training
from mechdsl.fits.vectors import (
    LowRankEdit,
    Rotation,
    SoftPrompt,
    TrainedVectors,
    rescale,
    split_edit,
)
from mechdsl.planner.training_cost import RANDOM_CONTROLS
from mechdsl.program.spec import CLEAN
from mechdsl.program.trainers import RotationTrainer, ScaleTrainer, VectorTrainer
from mechdsl.resolve.trainings import EDIT, ROTATION, VECTOR, name_edit_tensors, name_prompt_vector
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
    training, settings = declared.training, read_settings(declared.training, rows.model.device)
    trainer = training.trainer_of(RotationTrainer)
    with torch.enable_grad():
        rotation = trainer.start(rows.first_vectors, training.of_trainer, start_generator(training))
        start = rotation.matrix.clone()
        model = EditLoss(rotation, rows, settings.batch)
        loop = Training(
            model, rows, rows.held_out(), settings, lambda tensor, other: (tensor, other)
        )
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
    job.write_card(report)
    return report


def train_vector(
    declared: TrainedVector,
    rows: ObjectiveRows,
    job: TrainingJob,
) -> VectorReport | SoftPromptReport | EditReport:
    """Train a vector, a soft prompt or an edit, and write it.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NotFinite: The measure or a weight became NaN or infinite.
        OSError: A file can't be written.
    """
    training, settings = declared.training, read_settings(declared.training, rows.model.device)
    trainer = training.trainer_of(VectorTrainer)
    with torch.enable_grad():
        random = start_generator(training)
        trained = trainer.start(rows.first_vectors, training.of_trainer, random)
        if isinstance(trained, SoftPrompt) and (others := rows.image_vectors) is not None:
            trained.draw_start(others, random)
        start = trained.vector().detach().clone()
        model = EditLoss(trained, rows, settings.batch)
        loop = Training(
            model, rows, rows.held_out(), settings, lambda tensor, other: (tensor, other)
        )
        job.run(loop)
    vector = trained.vector().detach()
    count = trainer.count_tokens(training.of_trainer)
    job.write_tensors(VECTOR_FILE, _name_tensors(trained, vector, count))
    common = rows.outcome(loop.state)
    values = _Values(trained, rows, vector, settings.batch)
    if isinstance(trained, LowRankEdit):
        lengths = trained.mean_length(vector), trained.like_length
        report = EditReport(*common, *lengths, len(vector) // 2, *values.edit_means(trained))
    elif count is None:
        length = float(vector.norm())
        report = VectorReport(*common, length, trained.like_length, *values.all_means())
    else:
        length = float(vector.norm(dim=1).mean())
        report = SoftPromptReport(
            *common,
            length,
            trained.like_length,
            count,
            *values.edited_means(),
            values.clean_mean(),
            values.mean(start),
        )
    job.write_card(report)
    return report


def _name_tensors(trained: TrainedVectors, vector: Tensor, count: int | None) -> dict[str, Tensor]:
    """Return the tensors of the file of a vector, a soft prompt or an edit.

    Args:
        vector: [width], one for each token [token, width], or the matrix of an edit.
        count: Number of tokens; None for one vector.
    """
    if isinstance(trained, LowRankEdit):
        return dict(zip(name_edit_tensors(EDIT), split_edit(vector), strict=True))
    names = [VECTOR] if count is None else [name_prompt_vector(n) for n in range(count)]
    return dict(zip(names, vector.reshape(len(names), -1), strict=True))


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
            edit = lambda tensor, other: self.trained.write(tensor, vector)  # noqa: E731
        return self.rows.mean(self.rows.measured, edit, self.batch)

    def edited_means(self) -> tuple[float, float, float]:
        """Return means with the vector, with random vectors of its length, and of the base run."""
        randoms = self._mean_of_draws("random vectors", self.trained.draw_like)
        return self.mean(self.vector), randoms, self.mean(None)

    def _mean_of_draws(self, label: str, draw: Callable[[Tensor, Generator], Tensor]) -> float:
        """Return the mean over draws that are like the vector."""
        random = torch.Generator()
        random.manual_seed(stable_hash(self.rows.declared.seed, label) % 2**63)
        drawn = [draw(self.vector, random) for _ in range(RANDOM_CONTROLS)]
        return sum(map(self.mean, drawn)) / len(drawn)

    def edit_means(self, edit: LowRankEdit) -> tuple[float, float, float, float, float]:
        """Return means with the edit, in random subspaces, with random edits, with the mean of what
        it adds, and of the base run."""
        means, turned, unedited = self.edited_means()
        random = self._mean_of_draws("random edits", edit.draw_random)
        return means, turned, random, self.mean(edit.mean_change(self.vector)), unedited

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
    training, settings = declared.training, read_settings(declared.training, rows.model.device)
    trainer = training.trainer_of(ScaleTrainer)
    with torch.enable_grad():
        scales = trainer.start(rows.first_vectors, training.of_trainer, start_generator(training))
        model = EditLoss(scales, rows, settings.batch)
        loop = Training(
            model, rows, rows.held_out(), settings, lambda tensor, other: (tensor, other)
        )
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
    job.write_card(report)
    return report


def _controls(
    rows: ObjectiveRows, factors: Tensor, batch: int
) -> tuple[float, float, float, float, float]:
    """Return means of the measure with the factors, with the factors in random orders, with their
    mean for all channels, with 0, and without scales."""

    def mean(scale: Tensor | None) -> float:
        edit: Edit | None = None if scale is None else (lambda tensor, other: tensor * scale)
        return rows.mean(rows.measured, edit, batch)

    random = torch.Generator().manual_seed(stable_hash(rows.declared.seed, "orders") % 2**63)
    orders = [torch.randperm(len(factors), generator=random) for _ in range(RANDOM_CONTROLS)]
    shuffled = sum(mean(factors[order.to(factors.device)]) for order in orders) / RANDOM_CONTROLS
    uniform = factors.mean().expand_as(factors)
    return mean(factors), shuffled, mean(uniform), mean(torch.zeros_like(factors)), mean(None)
