"""Metrics of what a row wrote behind its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.resolve.resolved import Atom


@dataclass(frozen=True)
class Written:
    """What one row wrote."""

    ids: tuple[int, ...]
    text: str


def of_reply(atom: Atom, replies: Sequence[Written], prompts: Ints, usable: Bools) -> Tensor:
    """[row]: the atom's metric of what was written."""
    raise NotImplementedError
