"""Training of a declared probe: its maps, its controls and its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.hashing import stable_hash
from mechdsl.base.text import HintedError, name_list
from mechdsl.execute.observation.token_vectors import average_rows, digest_inputs
from mechdsl.execute.training import TrainingJob, VectorCache
from mechdsl.execute.vectors import build_reader, read_vectors, split_prompts
from mechdsl.fits.regression import (
    LinearMap,
    assign_folds,
    fit_standardiser,
    hold_out,
    r_squared,
    shuffle_targets,
)
from mechdsl.fits.reports import PROBE_FILE, ProbeReport
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.shape import PaddingSide
from mechdsl.planner.training_cost import CHUNK_BYTES, FLOAT, GATHERED_BYTES
from mechdsl.program.trainers import ProbeTrainer
from mechdsl.resolve.sites import label_node
from mechdsl.resolve.trainings import name_probe_map
from mechdsl.resolve.types import SitePoint, TrainedProbe
from mechdsl.rules.observations.probes import DEFAULT_FOLDS
from mechdsl.vocab.sites import SITES

RANDOM_DIRECTIONS = 8
"""Number of random directions that a probe is compared with."""


class NoProbe(HintedError):
    """The rows permit no probe; with a hint."""


@dataclass(frozen=True, eq=False)
class ProbeRows:
    """The rows of a training, with their values."""

    declared: TrainedProbe
    model: LoadedModel
    seed: int
    """Seed of noise."""
    side: PaddingSide | None
    rows: Ints
    """[row] numbers in the table, of all rows with the position, ascending."""
    keys: Sequence[bytes]
    """[row] digests of their inputs up to the position; of prompts that share an image, one for
    vectors in a vision encoder."""
    targets: Floats
    """[row] numbers, or numbers of classes."""
    held_out: Bools
    """[row]"""
    cache: VectorCache
    """Vectors of earlier probes: those of other seeds use the same ones."""

    @classmethod
    def of(
        cls,
        declared: TrainedProbe,
        model: LoadedModel,
        seed: int,
        side: PaddingSide | None,
        cache: VectorCache,
    ) -> ProbeRows:
        """Choose the rows that are held out: of each class, and rows with equal inputs together.

        Raises NoProbe.
        """
        training, sample = declared.training, declared.training.sample
        rows = np.flatnonzero([any(hits) for hits in sample.cell.hits])
        read = [sample.cell], rows, [sample.run], sample.table
        in_vision = SITES[training.inputs[0].site].stack == "vision"
        given = [model.shape.reads_prefix]
        keys = digest_inputs(*read, given, in_vision=in_vision, by_image=True)
        targets = np.array(sample.targets, dtype=np.float64)[rows]
        strata = targets.tolist() if declared.classes else None
        share = float(training.options["validation"]) / 100
        held_out = hold_out(keys, share, training.seed, strata)
        probe_rows = cls(declared, model, seed, side, rows, keys, targets, held_out, cache)
        probe_rows.check()
        return probe_rows

    @property
    def training_keys(self) -> list[bytes]:
        """Digests of the training rows."""
        return [key for key, held in zip(self.keys, self.held_out, strict=True) if not held]

    @property
    def training_targets(self) -> Floats:
        """[training row]"""
        return self.targets[~self.held_out]

    @property
    def measured(self) -> Bools:
        """[row] the rows that the result is measured on: all, if none is held out."""
        return self.held_out if self.held_out.any() else np.ones_like(self.held_out)

    def check(self) -> None:
        """Raise NoProbe unless training rows differ and have every class."""
        where = self.declared.training.sample.cell.label
        in_vision = SITES[self.declared.training.inputs[0].site].stack == "vision"
        if len(set(self.training_keys)) < 2 and in_vision:
            raise NoProbe("all training rows have the same image", "use rows with different images")
        if len(set(self.training_keys)) < 2:
            raise NoProbe(
                f"all training rows have the same tokens up to `{where}`",
                "name a later position, or rows that differ before it",
            )
        if len(set(self.training_targets.tolist())) < 2:
            raise NoProbe(
                f"`{self.declared.target}` is the same in all training rows",
                "use more rows, or hold out fewer: `validation: 10%`",
            )
        there = set(self.training_targets.tolist())
        classes = enumerate(self.declared.classes)
        lost = [str(name) for number, name in classes if float(number) not in there]
        if lost:
            what = f"`{self.declared.target}` is {name_list(lost[:4])} in held-out rows only"
            if in_vision:
                raise NoProbe(
                    f"{what}: rows with the same image have several values",
                    "use more images, or hold out no rows: `validation: 0%`",
                )
            raise NoProbe(
                f"{what}: rows with the same tokens up to `{where}` have several values",
                "name a later position, or hold out no rows: `validation: 0%`",
            )

    def vectors(self) -> Iterator[tuple[SitePoint, Floats]]:
        """Yield each site with its vectors, [row, width]."""
        training, widths = self.declared.training, self.declared.widths
        if FLOAT * len(self.rows) * sum(widths) > CHUNK_BYTES:
            yield from self._read()
            return
        sample = training.sample
        key = (
            id(self.model), sample.table.name, sample.table.row_keys, sample.run.name,
            sample.cell.hits, training.inputs, self.seed, self.side,
        )  # fmt: skip
        read = self.cache.get(
            key, lambda: tuple(torch.from_numpy(values) for _, values in self._read())
        )
        yield from zip(training.inputs, (tensor.numpy() for tensor in read), strict=True)

    def _read(self) -> Iterator[tuple[SitePoint, Floats]]:
        training = self.declared.training
        sample, points = training.sample, training.inputs
        size = 4 * len(self.rows) * max(self.declared.widths)
        many = max(1, GATHERED_BYTES // size)
        for begin in range(0, len(points), many):
            some = points[begin : begin + many]
            widths = self.declared.widths[begin : begin + many]
            lanes = build_reader(
                self.model, sample.table, sample.run, some, seed=self.seed, side=self.side
            )
            batches = split_prompts(self.model, sample.run, some, self.rows)
            vectors = read_vectors(lanes, some, [sample.cell], batches)
            for point, row in zip(some, average_rows(vectors, widths, self.rows), strict=True):
                yield point, row.astype(np.float64)

    def fit(self, vectors: Floats, targets: Floats) -> LinearMap:
        """Fit a probe, with an output for every class.

        Args:
            vectors: [training row, width].
            targets: [training row].

        Raises:
            ValueError, ArithmeticError: The vectors have no such probe.
        """
        keys, training = self.training_keys, self.declared.training
        folds = assign_folds(keys, min(DEFAULT_FOLDS, len(set(keys))), training.seed)
        trainer, options = training.trainer_of(ProbeTrainer), training.of_trainer
        if not self.declared.classes:
            return trainer.fit(vectors, targets, folds, options)
        there, index = np.unique(targets, return_inverse=True)
        linear_map = trainer.fit(vectors, index.astype(np.float64), folds, options)
        # Shuffled values may lack a class, which is then never predicted.
        weights = np.zeros((vectors.shape[1], self.declared.outputs))
        intercept = np.full(self.declared.outputs, -np.inf)
        numbers = there.astype(np.int64)
        weights[:, numbers], intercept[numbers] = linear_map.weights, linear_map.intercept
        return LinearMap(weights, intercept)

    def score(self, probe: LinearMap, vectors: Floats) -> float | None:
        """Return accuracy or R² on the measured rows; None without an R².

        Args:
            vectors: [row, width] of all rows.
        """
        made, wanted = probe(vectors[self.measured]), self.targets[self.measured]
        if self.declared.classes:
            return float((made.argmax(axis=1) == wanted).mean())
        score = float(r_squared(wanted, made).mean())
        return score if np.isfinite(score) else None

    def score_constant(self) -> float | None:
        """Return the same for the most common class, or the mean, of training rows."""
        training_targets, width = self.training_targets, 1
        if self.declared.classes:
            counts = np.bincount(training_targets.astype(np.int64), minlength=self.declared.outputs)
            intercept = counts.astype(np.float64)
        else:
            intercept = np.array([training_targets.mean()])
        nothing = LinearMap(np.zeros((width, len(intercept))), intercept)
        return self.score(nothing, np.zeros((len(self.rows), width)))

    def score_random(self, point: SitePoint, vectors: Floats) -> float | None:
        """Return the mean of the same over probes of one random direction of the vectors."""
        scale = fit_standardiser(vectors[~self.held_out])
        scaled, scores = scale(vectors), list[float | None]()
        for draw in range(RANDOM_DIRECTIONS):
            key = self.declared.training.seed, "random direction", name_probe_map(point), draw
            random = np.random.default_rng(stable_hash(*key))
            along = scaled @ random.standard_normal((scaled.shape[1], 1))
            probe = self.fit(along[~self.held_out], self.training_targets)
            scores.append(self.score(probe, along))
        known = [score for score in scores if score is not None]
        return float(np.mean(known)) if known else None


def train_probe(
    declared: TrainedProbe,
    model: LoadedModel,
    job: TrainingJob,
    *,
    seed: int,
    side: PaddingSide | None,
    cache: VectorCache,
) -> ProbeReport:
    """Fit a probe in each of its layers, and write its file.

    Args:
        model: The model that runs the rows.
        seed: Seed of noise.
        cache: Vectors of earlier trainings.

    Raises:
        NoProbe: The rows permit no probe.
        OSError: A file can't be written.
    """
    rows = ProbeRows.of(declared, model, seed, side, cache)
    training, tensors = declared.training, dict[str, torch.Tensor]()
    dealt = shuffle_targets(rows.training_keys, rows.training_targets[:, None], training.seed)[:, 0]
    scores: list[tuple[float | None, ...]] = []
    for number, (point, vectors) in enumerate(rows.vectors()):
        vector, name = vectors[~rows.held_out], name_probe_map(point)
        try:
            maps = {name: rows.fit(vector, rows.training_targets)}
            maps[f"shuffled.{name}"] = rows.fit(vector, dealt)
            made = [rows.score(linear_map, vectors) for linear_map in maps.values()]
            scores.append((*made, rows.score_random(point, vectors)))
        except (ValueError, ArithmeticError) as problem:
            hint = "use other rows, another position, or a larger `penalty`"
            raise NoProbe(str(problem), hint) from problem
        for key, linear_map in maps.items():
            tensors[f"{key}.weight"] = torch.from_numpy(np.ascontiguousarray(linear_map.weights.T))
            tensors[f"{key}.bias"] = torch.from_numpy(linear_map.intercept)
        job.on_step(number + 1, len(training.inputs))
    job.write_tensors(PROBE_FILE, tensors)
    trained, shuffled, random = (list(each) for each in zip(*scores, strict=True))
    report = ProbeReport(
        rows=int((~rows.held_out).sum()),
        held_out_rows=int(rows.held_out.sum()),
        steps=0,
        stopped_early=False,
        predicts=declared.target,
        unit="accuracy" if declared.classes else "R²",
        distinct_rows=len(set(rows.training_keys)),
        layers=[
            site_point.layer if site_point.unit is None else label_node(site_point)
            for site_point in training.inputs
        ],
        trained=trained,
        shuffled=shuffled,
        random=random,
        draws=RANDOM_DIRECTIONS,
        constant=rows.score_constant(),
    )
    job.write_card(report)
    return report
