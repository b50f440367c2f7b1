"""Kept keys and values as a cache of the model library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class KeptLayer(DynamicLayer):
    """Keys and values of whole prompts, of which the last columns are computed anew.

    Written in place: appending would copy what is kept once more for every block of every pass.
    """

    def __init__(self, keys: Tensor, values: Tensor, columns: int) -> None:
        """keys, values: [B, key-value heads, T, d_head], owned; columns: how many are kept."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self.kept = self.keys, self.values = keys, values
        self.columns = columns

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the new columns behind the kept ones and return all."""
        keys, values = self.kept
        keys[:, :, self.columns :] = key_states
        values[:, :, self.columns :] = value_states
        return keys, values

    def get_seq_length(self) -> int:
        """How many columns the model takes to be there before it runs."""
        return self.columns


def kept_cache(layers: Sequence[tuple[Tensor, Tensor]], columns: int) -> DynamicCache:
    """A cache with these keys and values.

    Made without a config: one that knows of sliding windows would forget what lies before them,
    and the masks that the model makes do that already.
    """
    cache = DynamicCache()
    cache.layers.extend(KeptLayer(keys, values, columns) for keys, values in layers)
    return cache
