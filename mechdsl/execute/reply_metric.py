"""Metrics of what a row wrote behind its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.generate.records import Reply
from mechdsl.resolve.resolved import Atom


def of_reply(
    atom: Atom, replies: Sequence[Reply], prompts: Ints, items: Sequence[int | None], usable: Bools
) -> Tensor:
    """[row]: the atom's metric of what was written; NaN in rows that can't be used."""
    raise NotImplementedError
