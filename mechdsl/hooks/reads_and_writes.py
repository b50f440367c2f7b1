"""Where the tokens of a forward pass lie, and what of it is read and written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from mechdsl.hooks.batch import to_device

Mode = Literal["set", "add", "scale", "along", "step"]
"""How what is written meets what is there: it replaces it, is added to it, or multiplies it; along
directions of length 1, only the component along these is set; steps from the position before are
multiplied, and added."""


class WriteMismatch(RuntimeError):
    """A write didn't happen, or happened more than once; the run's numbers mean nothing."""


class ReadMismatch(RuntimeError):
    """A site that was to be read was not passed, or more than once."""


@dataclass(frozen=True, eq=False)
class SiteWrite:
    """K vectors written at one site of one layer.

    At one site, writes act in the order in which they are given, each on what those before it left.
    """

    site: str
    layer: int | None
    """None for `embed`, `final_norm`, `logits`."""
    rows: Tensor
    """[K] long, row of the batch."""
    positions: Tensor
    """[K] long, token position in the unpadded prompt."""
    units: Tensor
    """[K] long, head or neuron; 0 for whole vectors."""
    values: Tensor
    """[K, width], cast to the activation's dtype and device; of `scale` and `step` [K, 1], the
    factors."""
    mode: Mode = "set"
    to: Tensor | None = None
    """[K] of `along`: the component along `values` afterwards."""
    stack: str = ""
    """Of which stack; the main one has no name."""
    rule: int = -1
    """The number of the rule that writes, in the order of the file; of rules whose vectors are one
    write, the last one. -1 is before all rules."""

    @property
    def where(self) -> SiteRead:
        """The site that is written."""
        return SiteRead(self.site, self.layer, self.stack)

    def moved(self, rows: Tensor) -> SiteWrite:
        """The same writes where row i is row `rows[i]`."""
        return replace(self, rows=rows[self.rows])

    def some(self, there: Tensor) -> SiteWrite:
        """Some of the vectors, by [K] bool."""
        index = there.nonzero()[:, 0]
        if len(index) == len(there):
            return self
        return replace(
            self,
            rows=self.rows[index],
            positions=self.positions[index],
            units=self.units[index],
            values=self.values[to_device(index, self.values.device)],
            to=None if self.to is None else self.to[to_device(index, self.to.device)],
        )


def written(
    mode: Mode,
    now: Tensor,
    values: Tensor,
    to: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """[K, width]: what stands where `now` [K, width] stood, in its precision.

    values, to: as in `SiteWrite`, on the device of `now`. before: [K, width] of `step`, what stands
    one position before; what stands there itself, where there is none.
    """
    match mode:
        case "set":
            return values.to(now).expand_as(now)
        case "add":
            return now + values.to(now)
        case "scale":
            wide = now.to(torch.promote_types(now.dtype, torch.float32))
            return (wide * values.to(wide)).to(now)
        case "along":
            assert to is not None
            wide = now.to(torch.promote_types(now.dtype, torch.float32))
            along = values.to(wide)
            left = to.to(wide)[:, None] - (wide * along).sum(-1, keepdim=True)
            return (wide + left * along).to(now)
        case "step":
            assert before is not None
            wide = now.to(torch.promote_types(now.dtype, torch.float32))
            return (wide + (wide - before.to(wide)) * values.to(wide)).to(now)


@dataclass(frozen=True)
class SiteRead:
    """One site of one layer, on all rows and positions."""

    site: str
    layer: int | None = None
    stack: str = ""
    before: bool = False
    """What comes by before anything is written there."""

    @property
    def quoted(self) -> str:
        """What messages call it, as `resid_pre layer 3`."""
        words = [self.site]
        if self.stack:
            words.append(self.stack)
        if self.layer is not None:
            words.append(f"layer {self.layer}")
        return f"`{' '.join(words)}`"


class Frame(Protocol):
    """Where the tokens of a pass lie in the model's tensors."""

    def __len__(self) -> int:
        """Rows."""
        ...

    @property
    def leading(self) -> int:
        """Size of the first dimension of the model's tensors."""
        ...

    def lengths_of(self, site: str, stack: str) -> Tensor:
        """[row] long, tokens of each row that a site has vectors of."""
        ...

    @property
    def lane_starts(self) -> Tensor:
        """[lane] long, column of the first token of each prompt that keys lie in."""
        ...

    @property
    def key_width(self) -> int:
        """Columns of these prompts."""
        ...

    def columns(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Columns of the padded prompts in which positions lie."""
        ...

    def locate(
        self, site: str, layer: int | None, stack: str, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices into the first two dimensions of the tensor tapped at a site, and which of the
        places are there at all; the others can't be seen by any measure."""
        ...
