"""Processes that train together, each of which computes a part of the gradients of every step.

A launcher such as `accelerate launch` or `torchrun` starts them with the same command. All of them
have the same weights, and add up the same gradients in the same order, so that they end with the
numbers of one process that computes all parts itself.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

ONE_PROCESS_HINT = "train it in one process: `mechdsl fit FILE`"


@dataclass(frozen=True)
class Processes:
    """The processes of a training, with the number of this one."""

    count: int = 1
    number: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the results."""
        return self.number == 0

    def agree(self, value: T) -> T:
        """Return the value of the first process; no process returns before all have called it."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        (values,) = broadcast_object_list([value])
        return values

    def gather(self, own: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which have the shape of this one's, in order."""
        if self.count == 1:
            return [own]
        from accelerate import PartialState
        from accelerate.utils import gather

        parts = cast("Tensor", gather(own[None].contiguous().to(PartialState().device)))
        return list(parts.to(own.device).unbind())

    def share(self, own: list[Tensor], count: int) -> list[Tensor]:
        """Return tensors that the processes computed in turn: `own[0]` is number `number`, and
        `own[1]` number `number + count of processes`.

        Args:
            own: Those of this process, with any shapes, on its device and with one dtype.
            count: Number of all tensors, at least 1.
        """
        if self.count == 1:
            return own
        import torch
        from accelerate import PartialState
        from accelerate.utils import broadcast, gather_object

        shapes = gather_object([[tuple(each.shape) for each in own]])
        dtype, device = gather_object([own[0].dtype if own else None])[0], PartialState().device
        shares: list[Tensor] = []
        for number in range(count):
            turn, owner = divmod(number, self.count)
            mine = owner == self.number
            empty = torch.empty(shapes[owner][turn], dtype=dtype, device=device)
            shares.append(broadcast(own[turn].contiguous() if mine else empty, owner))
        return shares


_JOINED: ContextVar[Processes | None] = ContextVar("processes", default=None)


def own_processes() -> Processes:
    """Return the processes that this one trains with; only itself if it didn't join others."""
    return _JOINED.get() or Processes()


@contextmanager
def join_processes(count: int, *, cpu: bool) -> Generator[Processes]:
    """Join the processes of a launcher within the block.

    Args:
        count: Number of processes.
        cpu: Whether they compute on CPUs.

    Raises:
        RuntimeError: accelerate finds another number of processes.
    """
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    joined = Processes(state.num_processes, state.process_index)
    if joined.count != count:
        raise RuntimeError(f"accelerate joined {joined.count} of {count} processes")
    token = _JOINED.set(joined)
    try:
        yield joined
        state.wait_for_everyone()  # no process closes what another one still reads from
    finally:
        _JOINED.reset(token)
        state.destroy_process_group()
