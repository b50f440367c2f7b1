"""Training of a dictionary on the decoder directions of another one (meta-SAE), and its control.

References:
    Leask et al. 2025, arXiv 2502.04878.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mechdsl.base.hashing import stable_hash
from mechdsl.dictionaries.features import load_dictionary
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.execute.training import TrainingJob, train_dictionary
from mechdsl.fits.factors import NotFactored
from mechdsl.fits.reports import DecoderReport
from mechdsl.fits.training import TrainingState
from mechdsl.resolve.trainings import FEWEST_ROWS, count_held_out
from mechdsl.resolve.types import TrainedDictionary
from mechdsl.resolve.types import Training as DeclaredTraining

NORMAL_FOLDER = "normal"
"""Folder of the control, next to that of the result."""


@dataclass(frozen=True, eq=False)
class DirectionVectors:
    """Directions as the vectors of a training; the first ones in a random order are held out."""

    declared: DeclaredTraining
    directions: Tensor
    """[vector, width] float32."""

    @cached_property
    def _order(self) -> Tensor:
        seed = stable_hash(self.declared.seed, "decoder directions") % 2**63
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.directions), generator=random)
        return order.to(self.directions.device)

    @property
    def held_out_count(self) -> int:
        """Number of directions that the training doesn't use."""
        return count_held_out(self.declared, len(self.directions))

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return 1

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the training directions, [vector, width] float32, twice."""
        found = self.directions[self._order[self.held_out_count :]]
        return found, found

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return the other directions, as `chunk` does."""
        found = self.directions[self._order[: self.held_out_count]]
        return found, found

    def amounts(self, state: TrainingState) -> tuple[int, int]:
        """Return the number of training directions, twice."""
        count = len(self.directions) - self.held_out_count
        return count, count

    def texts(self, state: TrainingState) -> None:
        """Return None: directions aren't texts."""
        return


def decoder_directions(file: DictionaryFile) -> Tensor:
    """Return [feature, width] float32 the decoder directions of a dictionary, of length 1 each;
    features whose decoder is 0 have none.

    Raises ValueError if the file has changed since it was read.
    """
    rows = load_dictionary(file).rows().float()
    lengths = rows.norm(dim=1, keepdim=True)
    active = lengths[:, 0] > 0
    return rows[active] / lengths[active]


def draw_normal(trained_on: Tensor, count: int, seed: int) -> Tensor:
    """Return [count, width]: normal vectors with the mean and the covariance of others, each scaled
    to length 1, as directions are.

    Args:
        trained_on: [vector, width].
        seed: Determines the vectors.
    """
    random = torch.Generator().manual_seed(stable_hash(seed, "normal directions") % 2**63)
    own = trained_on.double().cpu()
    center = own.mean(0)
    variances, axes = torch.linalg.eigh((own - center).T @ (own - center) / len(own))
    root = axes * variances.clamp_min(0).sqrt() @ axes.T  # unique, unlike the axes
    drawn = torch.randn(count, own.shape[1], generator=random, dtype=torch.float64)
    found = center + drawn @ root
    return (found / found.norm(dim=1, keepdim=True)).to(trained_on)


def train_on_decoder(
    declared: TrainedDictionary, file: DictionaryFile, device: torch.device, job: TrainingJob
) -> DecoderReport:
    """Train a dictionary on decoder directions, and another one on normal vectors, its control.

    Raises:
        NotFinite: The loss or a weight became NaN or infinite.
        Diverged: The loss rose.
        NotFactored: There are fewer than two directions.
        OSError: A file can't be written.
        ValueError: The file of the dictionary has changed.
    """
    training = declared.training
    assert training is not None
    directions = decoder_directions(file).to(device)
    if len(directions) < FEWEST_ROWS:
        raise NotFactored(
            f"{len(directions)} of {file.features:,} features have a decoder that isn't 0",
            "name another dictionary",
        )
    own = DirectionVectors(training, directions)
    normal = draw_normal(own.chunk(0)[0], len(own.directions), training.seed)
    first = replace(job, on_step=lambda done, steps: job.on_step(done, 2 * steps))
    control = replace(
        job,
        folder=job.checkpoints / NORMAL_FOLDER,
        checkpoints=job.checkpoints / f"{NORMAL_FOLDER}-checkpoint",
        on_step=lambda done, steps: job.on_step(steps + done, 2 * steps),
    )
    control.folder.mkdir(exist_ok=True)
    report = train_dictionary(declared, own, first)
    chance = train_dictionary(declared, DirectionVectors(training, normal), control)
    found = DecoderReport(**asdict(report), normal_explained=chance.explained)
    job.write_card(found)
    return found
