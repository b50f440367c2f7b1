"""Training of a declared mask: its edits, its controls and its file.

A gate m of a site writes x + m (y − x), where x is the vector of the running pass, after the writes
at earlier layers, and y the vector of the source run, the mean of the training rows, or 0. In a
training step, every row has its own sample of the gates. After the training, the gates with the
largest probabilities are 1 and the others 0.

References:
    Louizos et al. 2018, arXiv 1712.01312; Cao et al. 2021, arXiv 2104.03514 (masks that find
    subnetworks).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.base.hashing import stable_hash
from mechdsl.execute.objective_rows import EffectRows
from mechdsl.execute.patching.differentiated_run import DrawLanes
from mechdsl.execute.run_record import MASK_FILE, MaskReport
from mechdsl.execute.training import TrainingJob, read_settings
from mechdsl.fits.gates import Gates
from mechdsl.fits.training import Training, TrainingSettings
from mechdsl.forward.hooks.batch import SiteWrite
from mechdsl.models.shape import unit_count
from mechdsl.program.trainers import TRAINERS
from mechdsl.resolve.sites import label_points
from mechdsl.resolve.types import SiteLayer, SitePoint, TrainedMask

RANDOM_CHOICES = 8
"""Random choices of sites that a mask is compared with."""

SINGLE_ROWS = 32, 8
"""Largest and smallest number of training rows that effects of single sites are computed on."""

UNDECIDED = 0.1, 0.9
"""Probabilities between which a gate is undecided."""


@dataclass(frozen=True, eq=False)
class MaskRows(EffectRows[Tensor]):
    """The rows of a training that writes several sites, each to the share of its gate.

    An edit is [row, gate] or [gate] shares from 0 to 1; rows are in ascending order.
    """

    points: Sequence[SitePoint]
    """[gate]"""

    @cached_property
    def _gates(self) -> dict[SiteLayer, Ints]:
        """The gates at each site and layer."""
        found: dict[SiteLayer, list[int]] = {}
        for number, point in enumerate(self.points):
            found.setdefault((point.site, point.layer), []).append(number)
        return {where: np.array(own, dtype=np.int64) for where, own in found.items()}

    @cached_property
    def _incoming(self) -> dict[SiteLayer, Tensor] | None:
        """[vector, units, width] that come in at each site and layer; None if they are 0."""
        rule = self.objective.rules[0].spec
        fill = None if rule.fill is None else rule.fill.span.written
        if fill == "zero":
            return None
        whole = [SitePoint(site, layer, None) for site, layer in self._gates]
        read = self._read(self._runs[1], self._cells[1], whole)
        if fill == "mean":
            trained = np.sort(self.rows[self.held_out_count :])
            which = torch.from_numpy(self._vectors_of(trained)[0])
            read = [own[which.to(own.device)].mean(0).expand_as(own) for own in read]
        shape = self.model.shape
        return {
            where: own.unflatten(1, (unit_count(shape, *where), -1))
            for where, own in zip(self._gates, read, strict=True)
        }

    def _writes(self, rows: Ints, lanes: DrawLanes, edit: Tensor) -> list[SiteWrite]:
        """Return (1 − m) x and + m y of each site, in this order."""
        which, counts = self._vectors_of(rows)
        lane, token = self._places(rows, lanes)
        shares = edit.to(self.model.device, torch.float32).expand(len(rows), -1)
        shares = shares.repeat_interleave(torch.from_numpy(counts).to(shares.device), dim=0)
        found: list[SiteWrite] = []
        for (site, layer), gates in self._gates.items():
            units = unit_count(self.model.shape, site, layer)
            named = [self.points[gate].unit for gate in gates.tolist()]
            unit = torch.arange(units) if None in named else torch.tensor(named)
            own = shares[:, torch.from_numpy(gates).to(shares.device)]
            own = own.expand(-1, len(unit)).reshape(-1, 1)
            at = (
                lane.repeat_interleave(len(unit)),
                token.repeat_interleave(len(unit)),
                unit.repeat(len(which)),
            )
            found.append(SiteWrite(site, layer, *at, 1 - own, mode="scale"))
            if self._incoming is not None:
                every = self._incoming[site, layer]
                incoming = every[torch.from_numpy(which).to(every.device)][:, unit.to(every.device)]
                found.append(SiteWrite(site, layer, *at, own * incoming.flatten(0, 1), mode="add"))
        return found


@dataclass(frozen=True, eq=False)
class GateLoss:
    """Gates with their loss, as `mechdsl.fits.training` trains them."""

    gates: Gates
    rows: MaskRows
    batch: int
    """Largest number of rows of a pass."""
    keeps: bool

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self.gates.parameters

    @property
    def memory(self) -> Mapping[str, Tensor]:
        return {}

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        """Return the mean loss of the rows with these numbers."""
        sign, rows = 1 if self.rows.declared.minimises else -1, inputs.numpy()
        if progress >= 1:  # held-out rows, without gradients
            return torch.tensor(sign * self.mean(rows, self.gates.chosen()))
        drawn = self.gates.sample(len(rows), step)
        return sign * self.rows.values(rows, 1 - drawn if self.keeps else drawn).mean()

    def mean(self, rows: Ints, chosen: Sequence[int]) -> float:
        """Return the mean of the measure over rows with these sites chosen."""
        hard = torch.zeros(len(self.rows.points))
        hard[list(chosen)] = 1
        return self.rows.mean(rows, 1 - hard if self.keeps else hard, self.batch)

    def after_step(self) -> None:
        """Leave the scores as they are."""

    def weights(self) -> dict[str, Tensor]:
        return {name: each.detach() for name, each in self.parameters.items()}


def train_mask(
    declared: TrainedMask,
    rows: MaskRows,
    job: TrainingJob,
) -> MaskReport:
    """Train a mask, and write its sites.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NotFinite: The measure or a score became NaN or infinite.
        OSError: A file can't be written.
    """
    training, settings = declared.training, read_settings(declared.training)
    trainer = TRAINERS[training.trainer]
    with torch.enable_grad():
        gates = trainer.start_mask(len(rows.points), training.of_trainer, training.seed)
        model = GateLoss(gates, rows, settings.batch, declared.keeps)
        loop = Training(model, rows, rows.held_out(), settings, lambda own, other: (own, other))
        job.run(loop)
    likely = gates.probabilities().detach()
    chosen = gates.chosen()
    measured = rows.measured
    single, single_rows = _choose_single_effects(model, settings)
    random = [model.mean(measured, each) for each in _random_choices(model, training.seed)]
    every = torch.ones(len(rows.points))
    report = MaskReport(
        rows=len(rows.rows) - rows.held_out_count,
        held_out_rows=rows.held_out_count,
        steps=loop.state.step,
        stopped_early=loop.state.stopped,
        objective=rows.text,
        chosen={label_points((rows.points[each],)): float(likely[each]) for each in chosen},
        candidates=len(rows.points),
        undecided=int(((likely >= UNDECIDED[0]) & (likely <= UNDECIDED[1])).sum()),
        keeps=declared.keeps,
        trained=model.mean(measured, chosen),
        random=float(np.mean(random)),
        draws=len(random),
        single=None if single is None else model.mean(measured, single),
        single_rows=single_rows,
        unpatched=rows.mean(measured, None, settings.batch),
        whole=rows.mean(measured, every, settings.batch),
    )
    _write_sites(job.folder / MASK_FILE, rows.points, likely, chosen)
    job.write_card(report, MASK_FILE)
    return report


def _write_sites(
    path: Path, points: Sequence[SitePoint], likely: Tensor, chosen: Sequence[int]
) -> None:
    content = {
        "sites": [[each.site, each.layer, each.unit] for each in points],
        "probabilities": likely.tolist(),
        "chosen": list(chosen),
    }
    path.write_text(json.dumps(content) + "\n", "utf-8")


def _random_choices(model: GateLoss, seed: int) -> Iterator[list[int]]:
    """Yield random choices of as many sites."""
    for number in range(RANDOM_CHOICES):
        random = torch.Generator().manual_seed(stable_hash(seed, "choice", number) % 2**63)
        order = torch.randperm(len(model.rows.points), generator=random)
        yield sorted(order[: model.gates.size].tolist())


def _choose_single_effects(
    model: GateLoss, settings: TrainingSettings
) -> tuple[list[int] | None, int]:
    """Return the sites with the largest effects of writing them alone, as many as the mask chooses,
    and the number of training rows; None if that costs more rows than the training.

    Sites that are kept are those whose own writes have the worst effects.
    """
    rows = model.rows.rows[model.rows.held_out_count :]
    count, (most, least) = len(model.rows.points), SINGLE_ROWS
    few = rows[: min(most, settings.steps * settings.batch // count)]
    if len(few) < min(least, len(rows)):
        return None, 0
    alone = torch.eye(count)
    effects = [model.rows.mean(few, each, settings.batch) for each in alone]
    wants_low = model.rows.declared.minimises != model.keeps
    order = np.argsort(np.array(effects) * (1 if wants_low else -1), kind="stable")
    return sorted(order[: model.gates.size].tolist()), len(few)
