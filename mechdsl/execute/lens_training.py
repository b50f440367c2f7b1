"""Training of a declared lens: its controls and its file."""

from __future__ import annotations

import torch

from mechdsl.execute.run_record import LENS_FILE, LensReport
from mechdsl.execute.training import TrainingJob, read_settings
from mechdsl.execute.training_vectors import TrainingVectors
from mechdsl.fits.lenses import LensLoss, LensMaps, divergence_from_average
from mechdsl.fits.training import Training
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.packed.unembedding import ModelUnembedding
from mechdsl.program.trainers import LensTrainer
from mechdsl.resolve.types import TrainedLens


def train_lens(
    declared: TrainedLens, vectors: TrainingVectors, model: LoadedModel, job: TrainingJob
) -> LensReport:
    """Train a lens, and write its file.

    Args:
        model: The model whose final norm and unembedding it is trained with.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NotFinite: The loss or a weight became NaN or infinite.
        OSError: A file can't be written.
    """
    training = declared.training
    layers, trainer = training.layers, training.trainer_of(LensTrainer)
    held_out = vectors.held_out()
    width, device = model.shape.d_model, model.device
    logits = ModelUnembedding(model).differentiable_logits
    with torch.enable_grad():
        maps = trainer.start(width, layers, training.of_trainer, device)
        lens = LensLoss(maps, logits)
        settings = read_settings(training)
        loop = Training(lens, vectors, held_out, settings, lambda own, last: (own, last))
        job.run(loop)
    job.write_tensors(LENS_FILE, lens.weights())
    first = vectors.chunk(0)
    measured = held_out if len(held_out[0]) else first
    untrained = LensLoss(LensMaps(width, layers, device), logits)
    rows, count = vectors.amounts(loop.state)
    report = LensReport(
        rows=rows,
        held_out_rows=vectors.held_out_count,
        steps=loop.state.step,
        stopped_early=loop.state.stopped,
        vectors=count,
        held_out_vectors=len(held_out[0]),
        layers=list(layers),
        trained=lens.divergences(*measured).tolist(),
        untrained=untrained.divergences(*measured).tolist(),
        average=divergence_from_average(logits, first[1], measured[1]),
    )
    job.write_texts(vectors.texts(loop.state))
    job.write_card(report, LENS_FILE)
    return report
