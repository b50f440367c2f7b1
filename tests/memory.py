"""Memory of tensors and arrays, for tests of limits and cost estimates."""

from __future__ import annotations

import tracemalloc
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveTensors(TorchDispatchMode):
    """Count the bytes of tensors and arrays that are created while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self._there: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        for own in made if isinstance(made, tuple) else (made,):
            if isinstance(own, Tensor):
                storage = own.untyped_storage()
                self._there[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._there = {key: own for key, own in self._there.items() if not own[0].expired()}
        tensors = sum(size for _, size in self._there.values())
        self.largest = max(self.largest, tensors + tracemalloc.get_traced_memory()[0])
        return made
