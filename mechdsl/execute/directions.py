"""Directions in numbers: fitted before the cells that use them, over the rows that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from mechdsl.base.arrays import Floats, Ints
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e03_directions import EmptyDirection
from mechdsl.execute.options import PaddingSide
from mechdsl.execute.read_vectors import FoundVectors, prompt_batches, read_vectors, reader
from mechdsl.fits.components import pca
from mechdsl.fits.linear import ridge
from mechdsl.fits.logistic import NotConverged, logistic
from mechdsl.hooks.hook_points import at_hand, head_weights, through_heads
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import RulePlan
from mechdsl.prompts.prompt_table import PositionCell
from mechdsl.prompts.seeded_draws import stable_hash
from mechdsl.resolve.direction_types import (
    Fitted,
    Member,
    RandomLike,
    Sample,
    SavedVector,
    Unembedded,
    UnitVector,
    Vector,
    WeightedSum,
    fits_of,
)
from mechdsl.resolve.resolved_rule import SitePoint

ROUNDING = 4.0
"""A difference of so many units of rounding, beside what it is a difference of, is none."""


@dataclass(eq=False)
class FittedDirections:
    """The directions of one experiment, by their names."""

    vectors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """[width] float64 each, on the CPU."""

    def of(self, plan: RulePlan, cells: Ints) -> Tensor:
        """[K, width]: the rule's direction in each of these cells."""
        assert plan.direction_of_cell is not None
        every = torch.stack([self.vectors[member.name] for member in plan.directions])
        return every[torch.from_numpy(plan.direction_of_cell[cells])]

    @property
    def lengths(self) -> Mapping[str, float]:
        """By name."""
        return {name: float(vector.norm()) for name, vector in self.vectors.items()}


class DirectionFits:
    """Makes the directions of a panel, each once."""

    def __init__(
        self,
        model: LoadedModel,
        others: Mapping[str, LoadedModel],
        seed: int,
        side: PaddingSide | None,
    ) -> None:
        self.model = model
        self.others = others
        self.seed = seed
        self.side: PaddingSide | None = side
        self.passes = 0
        """Forward passes so far."""
        self._made: dict[str, Tensor] = {}
        self._read: dict[int, list[list[_Rows]]] = {}
        """By the identity of a fit: per sample and point."""

    def of(self, plan: ExperimentPlan) -> tuple[FittedDirections, list[Diagnostic]]:
        """The directions that an experiment's rules use. E0641 for one that is nothing."""
        members = {m.name: m for rule in plan.rules for m in rule.directions}
        due = [member for name, member in members.items() if name not in self._made]
        fits = {id(fit): fit for member in due for fit in fits_of(member.vector)}
        self._gather([fit for key, fit in fits.items() if key not in self._read])
        problems: list[Diagnostic] = []
        for member in due:
            try:
                with torch.no_grad():
                    self._made[member.name] = self._vector(member.vector)
            except (ValueError, NotConverged) as error:
                problems.append(_empty(plan, member, f"can't be made: {error}"))
                continue
            if not self._made[member.name].isfinite().all():
                problems.append(_empty(plan, member, "has NaN or infinity"))
        made = {name: self._made[name] for name in members if name in self._made}
        for rule in plan.rules if not problems else ():
            # One of a family may be nothing: where all rows have the same token, say.
            if rule.directions and not any(made[m.name].any() for m in rule.directions):
                problems.append(_empty(plan, rule.directions[0], "is 0 everywhere"))
        return FittedDirections(made), problems

    # --- reading ----------------------------------------------------------------------------------

    def _gather(self, fits: Sequence[Fitted]) -> None:
        """Read all that fits need, each run of rows once."""
        runs: dict[tuple[int, int, str | None], list[tuple[Fitted, int, Sample]]] = {}
        for fit in fits:
            self._read[id(fit)] = [[] for _ in fit.samples]
            for number, sample in enumerate(fit.samples):
                key = id(sample.table), id(sample.run.rows), sample.run.model
                runs.setdefault(key, []).append((fit, number, sample))
        for wanted in runs.values():
            self._read_run(wanted)

    def _read_run(self, wanted: Sequence[tuple[Fitted, int, Sample]]) -> None:
        table, run = wanted[0][2].table, wanted[0][2].run
        model = self.model if run.model is None else self.others[run.model]
        points = list(dict.fromkeys(point for fit, _, _ in wanted for point in fit.points))
        cells: list[PositionCell] = []
        for _, _, sample in wanted:
            if sample.cell not in cells:
                cells.append(sample.cell)
        takers: dict[tuple[int, int], list[_Rows]] = {}
        for fit, number, sample in wanted:
            for point in fit.points:
                whole = fit.way in ("pca", "probe")
                rows = _Rows(len(run.rows), gathers=whole)
                self._read[id(fit)][number].append(rows)
                place = points.index(point), cells.index(sample.cell)
                takers.setdefault(place, []).append(rows)
        lanes = reader(model, table, run, points, seed=self.seed, side=self.side)
        batches = prompt_batches(model, run, points)
        self.passes += len(batches)
        for found in read_vectors(lanes, points, cells, batches):
            for rows in takers.get((found.point, found.position), ()):
                rows.take(found)

    # --- making -----------------------------------------------------------------------------------

    def _vector(self, vector: Vector) -> Tensor:
        """[width] float64"""
        match vector:
            case Fitted():
                return self._fitted(vector)
            case Unembedded(token=token, less=less):
                found = self._unembedding(token)
                return found if less is None else found - self._unembedding(less)
            case SavedVector():
                return _saved(vector)
            case WeightedSum(parts=parts):
                return torch.stack([weight * self._vector(part) for weight, part in parts]).sum(0)
            case UnitVector(of=of):
                found = self._vector(of)
                return found / found.norm() if found.any() else found
            case RandomLike(of=of, draw=draw, seed=seed):
                return _random(self._vector(of), draw, seed)

    def _fitted(self, fit: Fitted) -> Tensor:
        samples = self._read[id(fit)]
        match fit.way:
            case "mean_difference":
                a, b = samples[0][0], samples[1][0]
                found = a.mean() - b.mean()
                scale = max(float(a.mean().norm()), float(b.mean().norm()))
                least = ROUNDING * torch.finfo(self.model.dtype).eps * scale
                small = float(found.norm()) <= least / min(a.count, b.count) ** 0.5
                return torch.zeros_like(found) if small else found
            case "mean":
                parts = zip(fit.points, samples[0], strict=True)
                return torch.stack([self._through(fit, p, rows.mean()) for p, rows in parts]).sum(0)
            case "pca":
                component = int(fit.options.get("component", 1))
                components = pca(samples[0][0].matrix(), component)
                return torch.from_numpy(np.ascontiguousarray(components[component - 1]))
            case _:
                return _probe(fit, samples[0][0])

    def _through(self, fit: Fitted, point: SitePoint, mean: Tensor) -> Tensor:
        """[d_model] of a head's mean; itself where it is not summed with others'."""
        if point.site != "z" or len(fit.points) == 1:
            return mean
        layout = self.model.tap("z", point.layer).layout
        projection = self.model.module.get_submodule(self.model.tap("head_out", point.layer).path)
        weight = head_weights(projection, layout).double().cpu()
        assert point.unit is not None
        return through_heads(mean[None], torch.tensor([point.unit]), weight)[0]

    def _unembedding(self, token: int) -> Tensor:
        path = self.model.anatomy.unembedding
        assert path is not None
        module = self.model.module.get_submodule(path)
        with at_hand(module):
            return module.get_parameter("weight")[token].detach().double().cpu()


class _Rows:
    """The vectors of one site at one position: their mean, or all of them."""

    def __init__(self, count: int, *, gathers: bool) -> None:
        self.gathers = gathers
        self.rows: list[Ints] = []
        self.parts: list[Floats] = []
        self.total: Tensor | None = None
        self.count = 0

    def take(self, found: FoundVectors) -> None:
        """One vector a row: the mean over its tokens, runs and draws."""
        if not len(found.prompts):
            return
        row, index, counts = np.unique(found.prompts, return_inverse=True, return_counts=True)
        vectors = found.vectors.double().cpu()
        own = torch.zeros(len(row), vectors.shape[1], dtype=torch.float64)
        own.index_add_(0, torch.from_numpy(index), vectors)
        own /= torch.from_numpy(counts)[:, None]
        self.count += len(row)
        if self.gathers:
            self.rows.append(row)
            self.parts.append(own.numpy())
            return
        total = own.sum(0)
        self.total = total if self.total is None else self.total + total

    def mean(self) -> Tensor:
        """[width]"""
        assert self.total is not None
        return self.total / self.count

    def matrix(self) -> Floats:
        """[row, width]"""
        return np.concatenate(self.parts)

    def numbers(self) -> Ints:
        """[row] which of the table's rows they are."""
        return np.concatenate(self.rows)


def _probe(fit: Fitted, rows: _Rows) -> Tensor:
    """[width]: the weights of a ridge regression, or those of the second class less those of the
    first."""
    wanted = [fit.samples[0].targets[row] for row in rows.numbers().tolist()]
    penalty = float(fit.options["penalty"])
    if fit.options["kind"] == "ridge":
        numbers = np.array(wanted, dtype=np.float64)
        return torch.from_numpy(ridge(rows.matrix(), numbers, penalty).weights[:, 0].copy())
    names = fit.samples[0].classes
    classes = np.array([names.index(each) for each in wanted], dtype=np.int64)
    weights = logistic(rows.matrix(), classes, penalty).logits.weights
    return torch.from_numpy(weights[:, 1] - weights[:, 0])


def _saved(vector: SavedVector) -> Tensor:
    """[width], of the file as it was when it was checked."""
    content = vector.path.read_bytes()
    if sha256(content).hexdigest() != vector.digest:
        raise ValueError(f"{vector.path.name} has changed since it was checked")
    return load(content)[vector.key].double()


def _random(like: Tensor, draw: str, seed: int) -> Tensor:
    """A direction of the same length, drawn evenly over all."""
    random = np.random.Generator(
        np.random.Philox(np.random.SeedSequence([stable_hash(seed, "direction", draw)]))
    )
    drawn = torch.from_numpy(random.standard_normal(len(like)))
    return drawn / drawn.norm() * like.norm()


def _empty(plan: ExperimentPlan, member: Member, reason: str) -> EmptyDirection:
    return EmptyDirection(
        span=plan.experiment.spec.span,
        name=member.name,
        reason=reason,
        made=member.made,
        hint="fit it on rows that differ, or at another site",
    )
