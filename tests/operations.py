"""A counter of floating-point operations that knows the products of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _count_grouped(first: Sequence[int], second: Sequence[int], *given: Any, **named: Any) -> int:
    """The operations of [rows, in] times [expert, in, out], each row with one expert."""
    return 2 * first[0] * first[1] * second[-1]


class OperationCounter(FlopCounterMode):
    """Counts operations; `FlopCounterMode` alone leaves out grouped products."""

    def __init__(self) -> None:
        known = {torch.ops.aten._grouped_mm: _count_grouped}
        super().__init__(display=False, custom_mapping=known)
