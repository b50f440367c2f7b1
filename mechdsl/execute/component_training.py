"""Training of linear components and of mixtures: their files, how independent or correlated
coordinates are, and how likely vectors are."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from mechdsl.dictionaries.features import log_densities, mean_log_likelihood
from mechdsl.execute.training import (
    DictionaryWriter,
    TrainingJob,
    read_together,
    report_amounts,
    solve_twice,
    start_generator,
)
from mechdsl.execute.training_vectors import RowVectors
from mechdsl.fits.correlations import pair_components
from mechdsl.fits.factors import NotFactored, fit_mixture, median_kurtosis, shuffle_axes
from mechdsl.fits.reports import CorrelationReport, IndependenceReport, MixtureReport
from mechdsl.fits.training import TrainingState, principal_axes
from mechdsl.program.trainers import PairedTrainer
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
        random = writer.load(writer.write(job.start_folder, untrained.tensors)).encode(measured)
        system = writer.load(writer.write(job.folder, trained.tensors))
        coordinates = system.encode(measured)
        explained = writer.assess(job.folder, (measured, measured)).explained
        center, axes = principal_axes(own, declared.features)
        principal = (measured.double() - center) @ axes.T
    report = IndependenceReport(
        **report_amounts(vectors, TrainingState(), trained, len(held_out)),
        explained=explained,
        kurtosis=median_kurtosis(coordinates),
        untrained_kurtosis=median_kurtosis(random),
        components_kurtosis=median_kurtosis(principal),
    )
    job.write_card(report)
    return report


def train_mixture(
    declared: TrainedDictionary, vectors: RowVectors, job: TrainingJob
) -> MixtureReport:
    """Fit a mixture of Gaussians to all vectors, write it, and compare it with controls.

    Raises:
        NotFactored: There are too few different vectors, or they don't fit into memory together.
        OSError: A file can't be written.
    """
    untrained, trained = solve_twice(declared, vectors, job)
    writer = DictionaryWriter.of_solution(declared, job)
    writer.write(job.start_folder, untrained.tensors)
    writer.write(job.folder, trained.tensors)
    own, _ = vectors.chunk(0)
    held_out, _ = vectors.held_out()
    measured = held_out if len(held_out) else own
    found = trained.tensors
    weights = found["W_dec"], found["precision"], found["log_weights"]
    likely = log_densities(measured - found["b_dec"].to(measured), *weights).argmax(1)
    assert declared.training is not None
    random, steps = start_generator(declared.training), int(declared.training.options["steps"])
    single = fit_mixture(own, 1, declared.covariance, 1, random)
    report = MixtureReport(
        **report_amounts(vectors, TrainingState(), trained, len(held_out)),
        log_likelihood=mean_log_likelihood(measured, trained.tensors),
        untrained=mean_log_likelihood(measured, untrained.tensors),
        single=mean_log_likelihood(measured, single.tensors),
        shuffled=_shuffled_likelihood(declared, (own, held_out), steps, random),
        components=declared.features,
        empty=declared.features - len(likely.unique()),
    )
    job.write_card(report)
    return report


def _shuffled_likelihood(
    declared: TrainedDictionary, vectors: tuple[Tensor, Tensor], steps: int, random: Generator
) -> float:
    """Return the mean log likelihood of shuffled vectors under a mixture of shuffled vectors.

    Args:
        vectors: [vector, width] those of the training, and those that are held out; none of these:
            it is computed on the training vectors.
        steps: As in the training.
    """
    own, held_out = vectors
    _, axes = principal_axes(own, own.shape[1])
    own = shuffle_axes(own, axes, random)
    found = fit_mixture(own, declared.features, declared.covariance, steps, random)
    measured = shuffle_axes(held_out, axes, random) if len(held_out) else own
    return mean_log_likelihood(measured, found.tensors)


FEWEST_PAIRS = 3
"""Pairs of vectors from which a correlation can be computed."""


def train_correlated(
    declared: TrainedDictionary, vectors: RowVectors, job: TrainingJob
) -> CorrelationReport:
    """Compute correlated coordinates of two sets of vectors, write those of the first set, and
    compare them with controls.

    Raises:
        NotFactored: The vectors have fewer components, or don't fit into memory together.
        OSError: A file can't be written.
    """
    training = declared.training
    assert training is not None
    trainer, steps = training.trainer_of(PairedTrainer), int(training.options["steps"])
    own, other = read_together(vectors)
    held_out = vectors.held_out()
    measured = held_out if len(held_out[0]) else (own, other)
    if min(len(measured[0]), len(own)) < FEWEST_PAIRS:
        raise NotFactored(
            f"correlations need {FEWEST_PAIRS} held-out vectors, and there are {len(measured[0])}",
            "name more rows or tokens, or hold out more rows: `validation: 50%`",
        )
    given = training.of_trainer
    pair = trainer.solve(own, other, given, steps, start_generator(training))
    random = trainer.solve(own, other, given, 0, start_generator(training)).align(own, other)
    order = torch.randperm(len(other), generator=start_generator(training)).to(other.device)
    shuffled = trainer.solve(own, other[order], given, steps, start_generator(training))
    components = pair_components(own, other, declared.features)
    job.on_step(steps, steps)
    writer, solution = DictionaryWriter.of_solution(declared, job), pair.solution(own)
    writer.write(job.start_folder, random.solution(own).tensors)
    folder = writer.write(job.folder, solution.tensors)
    report = CorrelationReport(
        **report_amounts(vectors, TrainingState(), solution, len(held_out[0])),
        explained=writer.assess(folder, (measured[0], measured[0])).explained,
        correlations=tuple(pair.correlate(*measured).tolist()),
        training=float(pair.correlate(own, other).mean()),
        shuffled=float(shuffled.correlate(*measured).mean()),
        untrained=float(random.correlate(*measured).mean()),
        components=float(components.correlate(*measured).mean()),
        numbers=float((pair.own.encoder != 0).sum(0).double().mean()),
    )
    job.write_card(report)
    return report
