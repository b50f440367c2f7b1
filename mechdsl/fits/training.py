"""The training loop: batches from a source of vectors, Adam, checkpoints, early stopping.

A training is a function of the source, the settings and the seed. Interrupted after any step and
continued from its state, it ends with the same weights bit for bit.

Parameters, moments of the optimiser and evaluations have the precision of the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mechdsl.base.hashing import stable_hash
from mechdsl.base.text import count_noun, name_list
from mechdsl.fits.processes import ONE_PROCESS_HINT, own_processes

EVALUATIONS = 20
"""How often the loss on held-out vectors is computed during a training."""

MOST_ASSESSED = 1024
"""Largest number of vectors whose features are in memory at once after a training."""

DECAY = 0.2
"""Share of the steps, at the end, in which the learning rate falls to 0."""


RISE = 0.01
"""Rise of the loss on a batch from before the first step to after the last one, as a share of it,
above which a training has diverged."""


class Diverged(Exception):
    """A training that leaves the parameters worse than they were."""


class NotFinite(Diverged):
    """The loss or a weight became NaN or infinite."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} finite after {count_noun(step, 'step')}")


class IndivisibleMemory(Exception):
    """Parts of a step that several processes can't compute at once."""

    hint = ONE_PROCESS_HINT

    def __init__(self, names: Iterable[str]) -> None:
        reason = f"its losses may change {name_list(names)} one after another"
        super().__init__(f"several processes can't divide a step: {reason}")


class Trainable(Protocol):
    """Parameters while they are trained.

    The inputs and targets of a dictionary are centred at their mean and scaled, so that the squared
    length of a vector is its width on average. Those of a rotation are numbers of rows.
    """

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        ...

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """Further tensors that the next steps depend on, which a checkpoint needs."""
        ...

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        """Return the loss of a batch, a mean over its vectors or rows.

        Args:
            inputs: [vector, width], or [row] numbers.
            targets: As `inputs`; of a transcoder, other vectors.
            step: Number of the step, from 0.
            progress: Share of the steps that are done, from 0 to below 1.
        """
        ...

    def after_step(self) -> None:
        """Restore what must hold after every step, such as decoder rows of length 1."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return the trained tensors; of a dictionary, for centred and scaled vectors."""
        ...


@runtime_checkable
class DivisibleLoss(Protocol):
    """A loss whose value on a part of a batch depends on the other parts."""

    def loss_of_part(
        self, parts: Sequence[tuple[Tensor, Tensor]], number: int, step: int, progress: float
    ) -> Tensor:
        """Return the loss of a part; the mean over parts, weighted by size, is that of the batch.

        Args:
            parts: Inputs and targets of each part of the batch of a step.
            number: Number of the part, from 0; losses are computed in this order.
            step: As in `Trainable.loss`.
            progress: As in `Trainable.loss`.
        """
        ...


@runtime_checkable
class DivisibleMemory(Protocol):
    """Memory that the losses of the parts of a batch change, in any order and in any process."""

    def needs_notes(self, step: int) -> bool:
        """Whether the loss of a part depends on the memory after the losses of all parts."""
        ...

    def join_memory(self, copies: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the memory after some parts in each process.

        Args:
            copies: [process, ...] of each tensor.
        """
        ...


class VectorSource(Protocol):
    """Vectors or rows of a training, in chunks that fit into memory."""

    @property
    def chunks(self) -> int:
        """Number of chunks that together have every vector once."""
        ...

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a chunk, as `Trainable.loss` takes them; always the same."""
        ...


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast to train."""

    steps: int
    batch: int
    """Vectors or rows whose gradients are computed at once."""
    rate: float
    """Learning rate of Adam."""
    seed: int
    patience: int | None = None
    """Number of evaluations without improvement after which the training stops; None: never."""
    accumulate: int = 1
    """Batches per step, whose gradients are averaged."""
    mixed_on: str | None = None
    """Type of the device on which products of matrices in steps are computed in bfloat16, such as
    `cuda`; None: everything is computed in the precision of the vectors and the model."""

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the losses of steps are computed."""
        if self.mixed_on is None:
            return nullcontext()
        # Without the cache, a product without gradients can't hide the weights of a later one.
        return torch.autocast(self.mixed_on, torch.bfloat16, cache_enabled=False)


@dataclass
class TrainingState:
    """Everything that the next step depends on, besides the source and the settings."""

    step: int = 0
    passes: int = 0
    """Chunks that are done."""
    position: int = 0
    """Batches of the current chunk that are done."""
    best: float = math.inf
    """Smallest loss on held-out vectors."""
    waited: int = 0
    """Evaluations since then."""
    stopped: bool = False
    """Whether it stopped early."""
    start_loss: float = math.nan
    """Loss of the start on a batch; NaN before it is computed."""
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Parameters, further memory, moments of the optimiser, and the best parameters."""

    def numbers(self) -> dict[str, float]:
        """Return the numbers, for a file."""
        names = ("step", "passes", "position", "best", "waited", "stopped", "start_loss")
        return {name: float(getattr(self, name)) for name in names}

    @classmethod
    def read(cls, numbers: Mapping[str, float], tensors: Mapping[str, Tensor]) -> TrainingState:
        """Create the state from what `numbers` and `tensors` were. Raises KeyError."""
        return cls(
            *(int(numbers[name]) for name in ("step", "passes", "position")),
            best=float(numbers["best"]),
            waited=int(numbers["waited"]),
            stopped=bool(numbers["stopped"]),
            start_loss=float(numbers["start_loss"]),
            tensors=dict(tensors),
        )


class Training:
    """One training."""

    def __init__(
        self,
        model: Trainable,
        source: VectorSource,
        held_out: tuple[Tensor, Tensor],
        settings: TrainingSettings,
        scale: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        """Prepare a training.

        Args:
            model: The parameters at the start.
            held_out: Inputs and targets that the training doesn't use; empty for none.
            scale: Centres and scales inputs and targets.

        Raises:
            IndivisibleMemory: Several processes can't divide its steps.
        """
        self.model, self.source, self.settings, self._scale = model, source, settings, scale
        self._processes = own_processes()
        if self._processes.count > 1 and not isinstance(model, DivisibleMemory) and model.memory:
            raise IndivisibleMemory(model.memory)
        self._held_out = scale(*held_out)
        for tensor in model.parameters.values():
            tensor.requires_grad_()
        self._optimiser = torch.optim.Adam(model.parameters.values(), lr=settings.rate)
        self.state = TrainingState()
        self.is_torn = False
        """Whether a step or an evaluation has begun and not ended; a checkpoint would be wrong."""
        self._best: dict[str, Tensor] = {}
        self._chunk: tuple[int, tuple[Tensor, Tensor]] | None = None
        self._order: tuple[int, Tensor] | None = None
        """Number of the pass through a chunk, and the order of its vectors."""
        self._sample: tuple[Tensor, Tensor] | None = None
        """The batch on which the losses of the start and of the end are compared."""

    # --- state

    def capture(self) -> TrainingState:
        """Return a copy of the state, for a checkpoint."""
        tensors = {
            f"parameter {name}": parameter for name, parameter in self.model.parameters.items()
        }
        tensors |= {f"memory {name}": buffer for name, buffer in self.model.memory.items()}
        tensors |= {f"best {name}": tensor for name, tensor in self._best.items()}
        for name, parameter in self.model.parameters.items():
            for key, moment in self._optimiser.state.get(parameter, {}).items():
                tensors[f"{key} {name}"] = moment
        kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return TrainingState.read(self.state.numbers(), kept)

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        """Continue from the state of a checkpoint. Raises KeyError if it is of another training."""
        tensors = state.tensors
        for kind, own in (("parameter", self.model.parameters), ("memory", self.model.memory)):
            for name, tensor in own.items():
                tensor.copy_(tensors[f"{kind} {name}"])
        for name, tensor in self.model.parameters.items():
            moments = {key: f"{key} {name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            if moments["step"] in tensors:  # a parameter without a gradient has none
                own = {key: tensors[moment] for key, moment in moments.items()}
                # Adam counts steps on the CPU.
                own |= {key: own[key].to(tensor.device) for key in ("exp_avg", "exp_avg_sq")}
                self._optimiser.state[tensor] = own
        start = "best "
        device = next(iter(self.model.parameters.values())).device
        self._best = {
            name.removeprefix(start): values.to(device)
            for name, values in tensors.items()
            if name.startswith(start)
        }
        self.state = TrainingState.read(state.numbers(), {})

    # --- steps

    def run(self, after_step: Callable[[int], None]) -> None:
        """Train to the end.

        Args:
            after_step: Called with the number of finished steps.

        Raises:
            NotFinite: The loss or a weight became NaN or infinite.
            Diverged: The loss of a batch is larger after the training than before.
        """
        state, steps = self.state, self.settings.steps
        if math.isnan(state.start_loss) and steps:
            state.start_loss = self._sample_loss()
        every = max(1, steps // EVALUATIONS)
        while state.step < steps and not state.stopped:
            self._step()
            if state.step % every == 0 or state.step == steps:
                self._evaluate()
            after_step(state.step)
        if self._best:
            with torch.no_grad():
                for name, parameter in self.model.parameters.items():
                    parameter.copy_(self._best[name])
                for name, buffer in self.model.memory.items():
                    buffer.copy_(self._best[f"memory {name}"])
        if not all(bool(weight.isfinite().all()) for weight in self.model.weights().values()):
            raise NotFinite("the weights aren't", state.step)
        if steps:
            self._check_decrease()

    def _check_decrease(self) -> None:
        """Raise Diverged if the loss of a batch is larger than at the start."""
        begin, end = self.state.start_loss, self._sample_loss()
        if not math.isfinite(end):
            raise NotFinite("the loss isn't", self.state.step)
        if end > begin + RISE * abs(begin):
            steps = count_noun(self.state.step, "step")
            raise Diverged(f"the loss rose from {begin:.4g} to {end:.4g} in {steps}")

    def _sample_loss(self) -> float:
        """Return the loss of the last step on the first vectors or rows, always the same ones."""
        settings = self.settings
        if self._sample is None:
            inputs, targets = self._load(0)
            self._sample = inputs[: settings.batch], targets[: settings.batch]
        return self._loss(*self._sample, settings.steps, 1 - 1 / settings.steps)

    @torch.no_grad()
    def _loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> float:
        """Return the loss of vectors or rows, a batch at a time, and leave the model as it is."""
        self.is_torn = True
        memory = {name: buffer.clone() for name, buffer in self.model.memory.items()}
        parts = (vectors.split(self.settings.batch) for vectors in (inputs, targets))
        loss = 0.0
        for own, wanted in zip(*parts, strict=True):
            part = float(self.model.loss(own, wanted, step, progress))
            loss += part if len(own) == len(inputs) else part * len(own) / len(inputs)
        for name, buffer in self.model.memory.items():
            buffer.copy_(memory[name])
        self.is_torn = False
        return loss

    def _step(self) -> None:
        state, settings = self.state, self.settings
        self.is_torn = True
        inputs, targets = self._batch()
        progress = state.step / settings.steps
        left = (1 - progress) / DECAY
        for group in self._optimiser.param_groups:
            group["lr"] = settings.rate * min(1.0, left)
        self._optimiser.zero_grad()
        self._add_gradients(inputs, targets, progress)
        self._optimiser.step()
        self.model.after_step()
        state.step += 1
        self.is_torn = False

    def _add_gradients(self, inputs: Tensor, targets: Tensor, progress: float) -> None:
        """Compute the gradients of a step, part by part. Raises NotFinite."""
        split = (vectors.split(self.settings.batch) for vectors in (inputs, targets))
        parts = list(zip(*split, strict=True))
        processes, model = self._processes, self.model
        if len(parts) > 1 and isinstance(model, DivisibleMemory):
            self._note_parts(parts, model, progress)
        if processes.count == 1:
            for number in range(len(parts)):
                loss = self._loss_of_part(parts, number, progress)
                if not bool(loss.isfinite()):
                    raise NotFinite("the loss isn't", self.state.step)
                loss.backward()  # pyright: ignore[reportUnknownMemberType]
            return
        for first in range(0, len(parts), processes.count):
            self._add_in_turn(parts, first, progress)
        if isinstance(model, DivisibleMemory):
            self._join_memory(model)

    def _loss_of_part(
        self, parts: Sequence[tuple[Tensor, Tensor]], number: int, progress: float
    ) -> Tensor:
        """Return the loss of a part, times its share of the batch."""
        step, (tensor, wanted) = self.state.step, parts[number]
        with self.settings.autocast():
            if len(parts) > 1 and isinstance(self.model, DivisibleLoss):
                loss = self.model.loss_of_part(parts, number, step, progress)
            else:
                loss = self.model.loss(tensor, wanted, step, progress)
        return loss * (len(tensor) / sum(len(each) for each, _ in parts))

    @torch.no_grad()
    def _note_parts(
        self, parts: Sequence[tuple[Tensor, Tensor]], model: DivisibleMemory, progress: float
    ) -> None:
        """Let the memory have what all parts change, if their losses depend on it."""
        step, processes = self.state.step, self._processes
        if not model.needs_notes(step):
            return
        with self.settings.autocast():
            for inputs, targets in parts[processes.number :: processes.count]:
                self.model.loss(inputs, targets, step, progress)
        self._join_memory(model)

    @torch.no_grad()
    def _join_memory(self, model: DivisibleMemory) -> None:
        """Give the memory of every process what each of them changed."""
        memory = self.model.memory
        if self._processes.count > 1:
            copies = {name: torch.stack(self._processes.gather(t)) for name, t in memory.items()}
            for name, joined in model.join_memory(copies).items():
                memory[name].copy_(joined)

    def _add_in_turn(
        self, parts: Sequence[tuple[Tensor, Tensor]], first: int, progress: float
    ) -> None:
        """Add the gradients of the next parts, one of each process, in the order of the parts.

        This is the order of one process, so that the sums have the same bits.
        """
        parameters = [*self.model.parameters.values()]
        processes = self._processes
        number, count = first + processes.number, min(processes.count, len(parts) - first)
        loss, gradients = parameters[0].new_zeros(()), [None] * len(parameters)
        if number < len(parts):
            loss = self._loss_of_part(parts, number, progress)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        depends = [tensor is not None for tensor in gradients]
        facts = torch.tensor([bool(loss.isfinite()), *depends], dtype=torch.float32)
        told = processes.gather(facts)[:count]
        if not all(each[0] for each in told):
            raise NotFinite("the loss isn't", self.state.step)
        for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True), 1):
            copies = processes.gather(torch.zeros_like(parameter) if gradient is None else gradient)
            for copy, each in zip(copies, told, strict=False):
                if each[place]:
                    parameter.grad = copy if parameter.grad is None else parameter.grad + copy

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Return the vectors or rows of the next step, in a random order of the current chunk's."""
        state, size = self.state, self.settings.batch * self.settings.accumulate
        number = state.passes % self.source.chunks
        inputs, targets = self._load(number)
        count = max(1, len(inputs) // size)
        if state.position >= count:
            state.position, state.passes = 0, state.passes + 1
            return self._batch()
        if self._order is None or self._order[0] != state.passes:
            seed = stable_hash(self.settings.seed, "order", state.passes) % 2**63
            random = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(inputs), generator=random).to(inputs.device)
            self._order = state.passes, order
        which = self._order[1][state.position * size : (state.position + 1) * size]
        state.position += 1
        return inputs[which], targets[which]

    def _load(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the scaled vectors of a chunk, and keep them until another one is needed."""
        if self._chunk is None or self._chunk[0] != number:
            self._chunk = number, self._scale(*self.source.chunk(number))
        return self._chunk[1]

    def _evaluate(self) -> None:
        """Compare the loss on held-out vectors with the best one."""
        patience, (inputs, targets) = self.settings.patience, self._held_out
        if patience is None or not len(inputs):
            return
        state = self.state
        loss = self._loss(inputs, targets, state.step, 1.0)
        if loss < state.best:
            state.best, state.waited = loss, 0
            tensors = dict(self.model.parameters)
            tensors |= {f"memory {name}": buffer for name, buffer in self.model.memory.items()}
            self._best = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        else:
            state.waited += 1
        state.stopped = state.waited >= patience


@dataclass(frozen=True)
class Fit:
    """How well a dictionary reconstructs vectors that it wasn't trained on."""

    explained: float
    """Share of the variance of the targets."""
    active: float
    """Mean number of active features of a vector."""
    inactive: int
    """Features that are active for none of the vectors."""


@torch.no_grad()
def assess(
    compute: Callable[[Tensor], tuple[Tensor, Tensor]], inputs: Tensor, targets: Tensor
) -> Fit:
    """Assess reconstructions, of `MOST_ASSESSED` vectors at a time.

    Args:
        compute: Returns features, [vector, feature], and reconstructions, [vector, width], of
            some of the inputs.
        inputs: [vector, width].
        targets: [vector, width] what is reconstructed.
    """
    center = targets.mean(0)
    spread = error = count = 0.0
    seen: Tensor | None = None
    parts = (vectors.split(MOST_ASSESSED) for vectors in (inputs, targets))
    for own, wanted in zip(*parts, strict=True):
        features, made = compute(own)
        spread += float((wanted - center).double().square().sum())
        error += float((wanted - made).double().square().sum())
        active = features != 0
        count += int(active.sum())
        seen = active.any(0) if seen is None else seen | active.any(0)
    explained = 1 - error / spread if spread > 0 else math.nan
    inactive = 0 if seen is None else int((~seen).sum())
    return Fit(explained, count / len(inputs) if len(inputs) else math.nan, inactive)


def principal_axes(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return [width] the mean of vectors, and [count, width] their first principal axes.

    Of many vectors, no copy in 64 bits is made: the axes are those of their covariance.
    """
    center = _mean(vectors)
    if len(vectors) <= vectors.shape[1]:
        shifted = vectors.double() - center
        return center, torch.linalg.svd(shifted, full_matrices=False)[2][:count]
    products = torch.zeros(len(center), len(center), dtype=center.dtype, device=center.device)
    for part in vectors.split(MOST_ASSESSED):
        shifted = part.double() - center
        products += shifted.T @ shifted
    return center, torch.linalg.eigh(products)[1].flip(1).T[:count].contiguous()


def _mean(vectors: Tensor) -> Tensor:
    """Return [width] the mean of vectors in 64 bits, without a copy of all of them."""
    parts = [part.double().sum(0) for part in vectors.split(MOST_ASSESSED)]
    return torch.stack(parts).sum(0) / len(vectors)


def components_explain(trained_on: Tensor, targets: Tensor, count: int) -> float:
    """Return the share of the variance of vectors that principal components of others explain.

    Args:
        trained_on: [vector, width] that the components are computed from.
        count: Number of components.
    """
    center, axes = principal_axes(trained_on, count)
    own_center = _mean(targets)
    spread = rest = 0.0
    for part in targets.split(MOST_ASSESSED):
        shifted = part.double() - center
        rest += float((shifted - shifted @ axes.T @ axes).square().sum())
        spread += float((part.double() - own_center).square().sum())
    return 1 - rest / spread if spread else math.nan
