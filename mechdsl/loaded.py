"""A model that was loaded and verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mechdsl.models.anatomy import Anatomy
from mechdsl.models.shape import ModelShape

if TYPE_CHECKING:
    from mechdsl.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Outcome:
    """One check of a model's anatomy."""

    identity: str
    """What has to hold, in words: `resid_pre + attn_out + mlp_out = resid_post`."""
    error: float
    """The largest difference, relative to the size of what was compared."""
    tolerance: float
    detail: str = ""
    """Where the largest difference is: `layer 3`."""
    failure: str = ""
    """What it means not to pass, where that isn't being off by `error`."""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Calling:
    """How the model wants to be called; found by looking at it."""

    accepts: frozenset[str]
    """Names of its forward's arguments."""
    block_returns: int | None
    """Length of the tuple that a block returns; None for a bare tensor."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode with its anatomy, its tokenizer and what was proved about it."""

    name: str
    """As the file calls it."""
    module: torch.nn.Module
    anatomy: Anatomy
    shape: ModelShape
    tokenizer: TextTokenizer | None
    """None only while a model is looked at without text."""
    pad_id: int
    device: torch.device
    dtype: torch.dtype
    calling: Calling
    provenance: Mapping[str, str]
    """Hash of the weights, revision, versions: what a result has to be kept with."""
    checks: tuple[Outcome, ...] = ()
    restartable: bool = True
    """Rows that compute only what changes gave the logits of whole passes."""

    @property
    def parallel(self) -> bool:
        return self.anatomy.parallel
