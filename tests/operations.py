"""A counter of floating-point operations that knows the products of experts and attention."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _count_grouped(first: Sequence[int], second: Sequence[int], *given: Any, **named: Any) -> int:
    """The operations of [rows, in] times [expert, in, out], each row with one expert."""
    return 2 * first[0] * first[1] * second[-1]


def _count_attention(queries: Sequence[int], keys: Sequence[int], *given: Any, **named: Any) -> int:
    """The operations of scores and sums of values, for [row, head, token, width] each."""
    return 4 * prod(queries) * keys[2]


class OperationCounter(FlopCounterMode):
    """Counts operations; `FlopCounterMode` alone leaves out grouped products, and attention on a
    CPU."""

    def __init__(self) -> None:
        aten = torch.ops.aten
        known = {
            aten._grouped_mm: _count_grouped,
            aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
        }
        super().__init__(display=False, custom_mapping=known)
