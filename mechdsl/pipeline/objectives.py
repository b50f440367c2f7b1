"""`mechdsl.objective`: the measure of a file as a differentiable function of written vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from mechdsl.base.runtime import exact_convolutions
from mechdsl.checks.file_check import CheckedFile
from mechdsl.checks.objectives import (
    ResolvedObjective,
    describe_autograd_failure,
    describe_overwrite,
    resolve_objective,
)
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import MechdslError
from mechdsl.pipeline.loaded_models import load_needed_models
from mechdsl.pipeline.options import RunOptions
from mechdsl.pipeline.trained_files import attach_fits, find_untrained

if TYPE_CHECKING:
    from torch import Tensor

    from mechdsl.execute.objective import ObjectiveMode, ObjectiveRun
    from mechdsl.forward.hooks.model import LoadedModel


class ModelGuard(Protocol):
    """Opens a context that restores models passed from Python."""

    def __call__(self) -> AbstractContextManager[None]:
        """Open the context."""
        ...


class Objective:
    """The measure of an experiment as a function of written vectors.

    `objective(tensor)` returns the measure of each row, [row] in 64 bits, with gradients. The
    tensor broadcasts to `shape`; numbers at positions that a row lacks have no effect.
    `objective(tensor, rows=[0, 3])` computes two rows, with a tensor that broadcasts to
    (2, *shape[1:]). Other shapes are a ValueError.
    """

    def __init__(
        self,
        resolved: ResolvedObjective,
        run: ObjectiveRun,
        mode: ObjectiveMode,
        guard: ModelGuard,
    ) -> None:
        """Read the vectors of the base run."""
        import torch

        self._resolved, self._run, self._guard = resolved, run, guard
        self._mode: ObjectiveMode = mode
        start = run.read_start()
        self._start = start if mode == "set" else torch.zeros_like(start)

    @property
    def measure(self) -> str:
        """The measure, as in tables, and its effect."""
        (measure,) = self._resolved.experiment.spec.measures
        return f"{measure.label} as {measure.effect}"

    @property
    def rows(self) -> tuple[int, ...]:
        """[row] numbers of the rows in the prompt set. Rows without a value are left out."""
        table = self._resolved.experiment.table
        return tuple(table.row_ids[prompt] for prompt in self._run.prompts)

    @property
    def texts(self) -> tuple[str, ...]:
        """[row] their prompts in the base run."""
        return tuple(self._run.run.rows[prompt].text for prompt in self._run.prompts)

    @property
    def ids(self) -> tuple[tuple[int, ...], ...]:
        """[row] the tokens of these prompts."""
        return tuple(self._run.run.rows[prompt].ids for prompt in self._run.prompts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, positions, width of a vector)."""
        return self._run.shape

    @property
    def positions(self) -> Tensor:
        """[row, position] index of the written token in `ids`; -1 where the row has none.

        In an encoder-decoder, the tokens of the decoder follow those of the encoder.
        """
        import torch

        positions, vectors = torch.full(self.shape[:2], -1), self._run.vectors
        positions[torch.from_numpy(vectors.row), torch.from_numpy(vectors.slot)] = torch.from_numpy(
            vectors.token
        )
        return positions

    @property
    def start(self) -> Tensor:
        """[row, position, width]: vectors of the unpatched base run; zeros with `mode="add"`."""
        return self._start.clone()

    def __call__(self, tensor: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return [row]: the measure with the tensor written, in 64 bits, with gradients.

        Args:
            tensor: Broadcasts to `shape`, or with `rows` to (len(rows), *shape[1:]). Numbers at
                positions that a row lacks have no effect.
            rows: Indices from 0 to shape[0] - 1, each at most once; None: all.

        Raises:
            ValueError: If the tensor has another shape or no real numbers, or `rows` are invalid.
            MechdslError: E0608 if autograd can't differentiate the model.
        """
        import torch

        from mechdsl.forward.hooks.backward_rules import AutogradFailed

        chosen = self._choose(rows)
        size = (len(chosen), *self.shape[1:])
        if not tensor.is_floating_point():
            raise ValueError(f"the tensor has numbers of the type `{tensor.dtype}`, not real ones")
        try:
            whole = torch.broadcast_to(tensor, size)
        except RuntimeError as error:
            given = list(tensor.shape)
            reason = f"the tensor has the shape {given}, which doesn't broadcast to {list(size)}"
            raise ValueError(reason) from error
        order = np.argsort(chosen)
        index = torch.from_numpy(order).to(whole.device)
        try:
            with self._guard(), exact_convolutions():
                values = self._run.values(whole[index], chosen[order], self._mode)
        except AutogradFailed as failed:
            problems = describe_autograd_failure(self._resolved, str(failed))
            raise MechdslError(problems) from failed
        return values[torch.from_numpy(np.argsort(order)).to(values.device)]

    def _choose(self, rows: Sequence[int] | None) -> Any:
        """Return [row] indices. Raises ValueError."""
        if rows is None:
            return np.arange(self.shape[0])
        chosen = np.asarray(rows, dtype=np.int64)
        fine = len(chosen) and chosen.min() >= 0 and chosen.max() < self.shape[0]
        if not fine or len(np.unique(chosen)) < len(chosen):
            raise ValueError(f"`rows` are indices from 0 to {self.shape[0] - 1}, each at most once")
        return chosen

    def __repr__(self) -> str:
        rows, positions, numbers = self.shape
        place = self._resolved.place
        verb = "replaces" if self._mode == "set" else "is added to"
        return (
            f"<Objective {self.measure} of {self._resolved.experiment.name}: "
            f"a tensor [{rows} rows, {positions} positions, {numbers}] {verb} {place}>"
        )


class ObjectiveRequest(NamedTuple):
    """Arguments of `mechdsl.objective`."""

    experiment: str | None
    measure: str | None
    site: str
    at: str
    mode: ObjectiveMode


def open_objective(
    checked: CheckedFile,
    request: ObjectiveRequest,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel],
    guard: ModelGuard,
) -> tuple[Objective, list[Diagnostic]]:
    """Return the objective of a checked file, and warnings of loading.

    Args:
        checked: A file without errors.
        request: What is differentiated.
        options: With the store of the file's trainings.
        loaded: Models from Python, by name.
        guard: Restores these models after each call.

    Raises:
        MechdslError: For a request that can't be met; E0642 for a basis that isn't trained.
    """
    from mechdsl.execute.objective import ObjectiveFailed, ObjectiveRun

    checked = attach_fits(checked, options, loaded)
    resolved, problems = resolve_objective(checked, *request[:4])
    if resolved is None:
        raise MechdslError(problems)
    problems = find_untrained(resolved.experiment, has_store=options.store is not None)
    if problems:
        raise MechdslError(problems)
    models, problems = load_needed_models(checked, options, loaded, None)
    if models is None:
        raise MechdslError(problems)
    own = resolved.experiment, resolved.point, resolved.cell
    with exact_convolutions():
        try:
            run = ObjectiveRun(*own, models, options.execution)
        except ObjectiveFailed as failed:
            raise MechdslError(failed.problems) from failed
        rule = run.find_overwriting_rule()
        if rule is not None:
            raise MechdslError(describe_overwrite(resolved, rule))
        return Objective(resolved, run, request.mode, guard), problems
