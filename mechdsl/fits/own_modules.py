"""User-defined modules during their training.

Random numbers of a module depend on the seed and the step alone, and checkpoints contain its
parameters and buffers. Everything else that a module changes is therefore an error.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from inspect import signature
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from mechdsl.base.hashing import stable_hash
from mechdsl.fits.gates import Gates
from mechdsl.fits.vectors import Rotation, SteeringVector, orthonormal_rows


class Failure(Protocol):
    """Returns the exception for a failure of the user's code."""

    def __call__(
        self, reason: str, hint: str, *, error: BaseException | None = None
    ) -> Exception: ...


class OwnModule:
    """A module, whose methods raise one exception for every failure."""

    def __init__(
        self, create: Callable[[], object], name: str, failure: Failure, seed: int, like: Tensor
    ) -> None:
        """Create a module.

        Args:
            name: Name of its class, for messages.
            seed: Determines its random numbers.
            like: A tensor whose device and dtype its parameters get.

        Raises:
            Exception: The one that `failure` returns: the module has no parameters, or it can't be
                created.
        """
        self._name, self._failure, self._seed = name, failure, seed
        module = self._guarded("__init__", create, "start")
        if not isinstance(module, Module):
            raise self.fail("__init__", "made no module", "make it a subclass of `torch.nn.Module`")
        self.module = module.to(like.device, like.dtype)
        every = dict(module.named_parameters())
        self.parameters = {
            name: parameter for name, parameter in every.items() if parameter.requires_grad
        }
        if not self.parameters:
            hint = "register them: `self.w = torch.nn.Parameter(…)`"
            raise self.fail("__init__", "made a module without parameters", hint)
        self._steps = 0
        self._attributes = self._read_attributes()

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """Frozen parameters and buffers."""
        every = self.module.named_parameters()
        frozen = {name: parameter for name, parameter in every if name not in self.parameters}
        return {**frozen, **dict(self.module.named_buffers())}

    def fail(
        self, method: str, reason: str, hint: str, error: BaseException | None = None
    ) -> Exception:
        """Return the exception for a failure of a method."""
        return self._failure(f"`{self._name}.{method}` {reason}", hint, error=error)

    def has(self, method: str) -> bool:
        return callable(getattr(self.module, method, None))

    def call(
        self, method: str, *arguments: object, at: object, progress: float | None = None
    ) -> Any:
        """Call a method.

        Args:
            at: The step, which determines random numbers.
            progress: Share of the steps that are done; for methods with a parameter of that name.
        """
        function = getattr(self.module, method)
        named: dict[str, object] = {}
        if progress is not None and "progress" in signature(function).parameters:
            named["progress"] = progress
        return self._guarded(method, lambda: function(*arguments, **named), at)

    def _guarded(self, method: str, function: Callable[[], object], at: object) -> Any:
        seed = stable_hash(self._seed, "own", method, at)
        torch.manual_seed(seed % 2**63)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            return function()
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise self.fail(method, f"raised {said}", "correct the method", error) from error

    def tensor(
        self,
        method: str,
        shape: tuple[int, ...],
        *arguments: object,
        at: object,
        progress: float | None = None,
    ) -> Tensor:
        """Return the tensor that a method returns, after a check of its shape and that gradients
        are known where they are needed."""
        output = self.call(method, *arguments, at=at, progress=progress)
        tensor = self.check_shape(method, output, shape)
        if torch.is_grad_enabled() and not tensor.requires_grad:
            hint = "compute it from the parameters, without `detach` or `no_grad`"
            raise self.fail(method, "doesn't depend on the parameters", hint)
        return tensor

    def check_shape(self, method: str, output: object, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of a shape; otherwise raise the exception of a failure."""
        if isinstance(output, Tensor) and tuple(output.shape) == shape:
            return output
        numbers = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        wanted = f"a tensor of {list(shape)}" if shape else "a tensor with one number, a mean"
        raise self.fail(method, f"returned {numbers}", f"it must return {wanted}")

    def penalty(self, at: object) -> Tensor | float:
        """Return what `penalty` adds to the loss; 0 for a module without it."""
        if not self.has("penalty"):
            return 0.0
        penalty = self.call("penalty", at=at)
        return (
            penalty
            if isinstance(penalty, int | float)
            else self.check_shape("penalty", penalty, ())
        )

    @torch.no_grad()
    def after_step(self) -> None:
        """Call `after_step`, if the module has it, and check what a checkpoint would lose."""
        if self.has("after_step"):
            self.call("after_step", at="after")
        self._steps += 1
        if self._steps & (self._steps - 1) == 0:
            self._check_attributes()

    def _check_attributes(self) -> None:
        """Raise the exception of a failure if what a checkpoint would lose has changed."""
        now, before = self._read_attributes(), self._attributes
        changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
        if changed:
            name = changed[0]
            reason = f"changes `self.{name}` during the training, which checkpoints don't contain"
            hint = f'make it a buffer of one shape: `self.register_buffer("{name}", …)`'
            raise self._failure(f"`{self._name}` {reason}", hint)

    def _read_attributes(self) -> dict[str, object]:
        """Return digests of the attributes of the module and of its modules, the identities of the
        trained tensors and the shapes of buffers."""
        usual = vars(Module()).keys()
        attributes = {
            f"{path}.{name}".lstrip("."): _digest_value(value)
            for path, module in self.module.named_modules()
            for name, value in vars(module).items()
            if name not in usual
        }
        attributes |= {name: id(parameter) for name, parameter in self.module.named_parameters()}
        return attributes | {name: tensor.shape for name, tensor in self.module.named_buffers()}


def _digest_value(value: object) -> object:
    """Return something that changes if the value of an attribute does."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    try:
        return sha256(pickle.dumps(value)).digest()
    except Exception:  # a function, for instance
        return repr(value)


class OfModule:
    """What is trained by a module: its tensors, and what it does after each step."""

    _module: OwnModule

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self._module.parameters

    @property
    def memory(self) -> Mapping[str, Tensor]:
        return self._module.memory

    def after_step(self) -> None:
        self._module.after_step()


class OwnDictionary(OfModule):
    """A dictionary; implements `mechdsl.fits.training.Trainable`."""

    def __init__(self, module: OwnModule, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """shapes: Those of the tensors of the file, by name."""
        self._module, self._shapes = module, shapes

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        """Return the loss of a batch of centred and scaled vectors."""
        return self._module.tensor("loss", (), inputs, at=step, progress=progress)

    def loss_of_part(
        self, parts: Sequence[tuple[Tensor, Tensor]], number: int, step: int, progress: float
    ) -> Tensor:
        """Return the loss of a part of a batch, with other random numbers in each part."""
        at = (step, number)
        return self._module.tensor("loss", (), parts[number][0], at=at, progress=progress)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of the file, for centred and scaled vectors."""
        weights = self._module.call("weights", at="weights")
        if not isinstance(weights, Mapping) or {*weights} != {*self._shapes}:
            names = ", ".join(f"`{name}`" for name in self._shapes)
            own = ", ".join(f"`{name}`" for name in weights) if isinstance(weights, Mapping) else ""
            reason = f"returned {own or type(weights).__name__}"
            raise self._module.fail("weights", reason, f"it must return a dict with {names}")
        tensors = cast("Mapping[str, object]", weights)
        return {
            name: self._module.check_shape(f'weights()["{name}"]', tensors[name], shape)
            .detach()
            .float()
            .clone()
            for name, shape in self._shapes.items()
        }


class OwnVector(OfModule, SteeringVector):
    """A vector that is added to others."""

    def __init__(self, module: OwnModule, like: Tensor) -> None:
        """like: [vector, width] vectors that it is added to."""
        super().__init__(like, torch.Generator(), length=None, penalty=0.0)
        self._module = module
        self.vector()

    def vector(self) -> Tensor:
        """Return v [width], which carries gradients of the parameters."""
        vector = self._module.tensor("vector", tuple(self.numbers.shape), at="vector")
        return vector.to(self.numbers)

    def penalty(self) -> Tensor | float:
        return self._module.penalty("penalty")


class OwnRotation(OfModule, Rotation):
    """Orthonormal directions of a subspace."""

    def __init__(self, module: OwnModule, shape: tuple[int, int]) -> None:
        """shape: Numbers of directions and of numbers of a vector."""
        self._module, self._shape = module, shape
        rows = self._rows().detach()
        if int(torch.linalg.matrix_rank(rows)) < shape[0]:
            hint = "return rows of which none is a sum of multiples of others"
            raise module.fail("directions", "returned dependent rows at the start", hint)
        super().__init__(rows)

    def _rows(self) -> Tensor:
        return self._module.tensor("directions", self._shape, at="directions")

    def directions(self) -> Tensor:
        """Return R [dims, width], the orthonormal factor of the rows of the module."""
        return orthonormal_rows(self._rows())

    def penalty(self) -> Tensor | float:
        return self._module.penalty("penalty")


class OwnGates(OfModule, Gates):
    """Gates of one mask."""

    def __init__(self, module: OwnModule, count: int, size: int, seed: int) -> None:
        """The arguments of `Gates`, and the module."""
        super().__init__(count, size, seed)
        self._module = module
        self.probabilities()
        self.sample(2, 0)

    def probabilities(self, progress: float = 1.0) -> Tensor:
        """Return [gate] probabilities that a gate is open."""
        return self._values("probabilities", (len(self.scores),), at="probabilities")

    def sample(self, rows: int, step: int, progress: float = 1.0) -> Tensor:
        """Draw [row, gate] values from 0 to 1 for a step."""
        return self._values("sample", (rows, len(self.scores)), rows, at=step)

    def _values(
        self, method: str, shape: tuple[int, ...], *arguments: object, at: object
    ) -> Tensor:
        values = self._module.tensor(method, shape, *arguments, at=at)
        if not bool(((values >= 0) & (values <= 1)).all()):
            hint = "it must return numbers from 0 to 1"
            raise self._module.fail(method, "returned other numbers", hint)
        return values.to(self.scores)
