"""What hooks do with the tensor that is tapped at a site: read it, write to it.

A site may be a slice of that tensor, or be worked out from it; there is a kind of step for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mechdsl.hooks.batch import to_device, together_on_device
from mechdsl.hooks.hook_points import (
    Step,
    head_weights,
    layout_put,
    layout_view,
    scaled,
    through_heads,
    unscaled,
)
from mechdsl.hooks.reads_and_writes import ReadMismatch, SiteRead, SiteWrite, written
from mechdsl.models.anatomy import Layout


@dataclass
class PlacedWrite:
    """One write with its indices in the tapped tensor, which are on the host."""

    number: int
    write: SiteWrite
    values: Tensor
    first: Tensor
    second: Tensor
    units: Tensor
    to: Tensor | None = None
    before: Tensor | None = None
    """[K] of `step`: index into the second dimension of the place before; its own where it is the
    first."""
    _moved: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The indices on the device, once `move` was called."""

    @staticmethod
    def move(places: Sequence[PlacedWrite], device: torch.device) -> None:
        """Move the indices of all these writes to the device in one transfer."""
        named = [
            (place, name, index)
            for place in places
            for name in ("first", "second", "units", "before")
            if (index := getattr(place, name)) is not None
        ]
        moved = together_on_device([index for _, _, index in named], device)
        for (place, name, _), index in zip(named, moved, strict=True):
            place._moved[name] = index

    def _index(self, view: Tensor, second: str = "second") -> tuple[Tensor, ...]:
        """Indices into the first three dimensions of a view, on its device."""
        return tuple(self._moved[name].to(view.device) for name in ("first", second, "units"))

    def put(self, view: Tensor, values: Tensor, *, add: bool) -> None:
        """Write `values` [K, width] into a [B, T, units, width] view."""
        view.index_put_(self._index(view), values, accumulate=add)

    def mark(self, there: Tensor) -> None:
        """Set what is written in [B, T]."""
        there[self._index(there)[:2]] = True

    def get(self, view: Tensor) -> Tensor:
        """[K, width] of a [B, T, units, width] view."""
        return view[self._index(view)]

    def values_like(self, view: Tensor) -> Tensor:
        """The values, on the device and of the type of what they are written to."""
        return to_device(self.values, view.device).to(view.dtype)

    def get_before(self, view: Tensor) -> Tensor | None:
        """[K, width] of a [B, T, units, width] view, one position before; None if none asks."""
        if self.before is None:
            return None
        return view[self._index(view, "before")]

    def changed(self, now: Tensor, before: Tensor | None = None) -> Tensor:
        """[K, width] of what stands there, [K, width], and of what stands one position before."""
        to = None if self.to is None else to_device(self.to, now.device)
        return written(self.write.mode, now, to_device(self.values, now.device), to, before)

    def change(self, view: Tensor, scale: float | Tensor = 1.0) -> None:
        """Write into a [B, T, units, width] view, which times `scale` is the site."""
        match self.write.mode:
            case "set" | "add" as mode:
                self.put(view, unscaled(self.values_like(view), scale), add=mode == "add")
            case _:
                now, before = scaled(self.get(view), scale), self.get_before(view)
                before = None if before is None else scaled(before, scale)
                self.put(view, unscaled(self.changed(now, before), scale), add=False)


class SiteSteps:
    """Makes the steps of one forward pass, and keeps what they have found."""

    def __init__(self, writes: int) -> None:
        self.found: dict[SiteRead, Tensor] = {}
        """[B, T, units, width] of what was read."""
        self.applied = [0] * writes
        """Vectors of each write that were written so far."""
        self.streams: dict[str, Tensor] = {}
        """Path of a tapped module → the stream that enters its block, for `resid_mid`."""
        self.patches: dict[str, Tensor] = {}
        """Path of what makes vectors of patches → these, as they come out of it."""

    def begin(self) -> None:
        """Of another pass, in which nothing is read."""
        self.applied = [0] * len(self.applied)

    def _done(self, place: PlacedWrite) -> None:
        self.applied[place.number] += int(place.first.numel())

    def _keep(self, reads: list[SiteRead], view: Tensor) -> None:
        for read in reads:
            if read in self.found:
                raise ReadMismatch(f"{read.quoted} was passed twice in one run")
            self.found[read] = view.clone(memory_format=torch.contiguous_format)

    def direct(
        self,
        places: list[PlacedWrite],
        reads: list[SiteRead],
        layout: Layout,
        scale: float | Tensor = 1.0,
    ) -> Step:
        """A site that is a slice of the tapped tensor, times `scale`."""

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            if places:
                value = value.clone(memory_format=torch.contiguous_format)
            view = layout_view(value, layout)
            for place in places:
                place.change(view, scale)
                self._done(place)
            if places:
                layout_put(value, layout, view)
            self._keep(reads, scaled(view, scale))
            return value

        return step

    def in_front_of_positions(
        self, places: list[PlacedWrite], reads: list[SiteRead], layout: Layout, patches: str
    ) -> Step:
        """A site that is the tapped tensor without what is added to patches: their positions."""
        direct = self.direct(places, reads, layout)

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            added = _added_to(value, self.patches.pop(patches))
            found = direct(value - added, module, given)
            if not places:
                return value
            # tokens that aren't written stay as they are, to the last bit
            there = torch.zeros(value.shape[:2], dtype=torch.bool, device=value.device)
            for place in places:
                place.mark(there)
            return torch.where(there[..., None], found + added, value)

        return step

    def own_view(
        self, places: list[PlacedWrite], reads: list[SiteRead], layout: Layout
    ) -> Callable[[Tensor], Tensor]:
        """A site that is worked out for us alone, as [B, T, units, width]."""

        def change(view: Tensor) -> Tensor:
            if places:
                view = view.clone()
            for place in places:
                place.change(view)
                self._done(place)
            self._keep(reads, view)
            return view

        return change

    def remember(self, path: str) -> Step:
        """Keeps the stream that enters a block, for `resid_mid` in the same block."""

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            self.streams[path] = value
            return value

        return step

    def between(
        self, places: list[PlacedWrite], reads: list[SiteRead], path: str, scale: float | Tensor
    ) -> Step:
        """`resid_mid`: what attention adds is changed so that the sum is the value written.

        The stream between the sublayers is no module's output; a hook on the second norm would
        leave the residual branch as it was.
        """

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            stream = self.streams[path].unsqueeze(2)
            if places:
                value = value.clone()
            view = value.unsqueeze(2)
            for place in places:
                below, add = place.get(stream), place.write.mode == "add"
                match place.write.mode:
                    case "add":
                        new = place.values_like(view)
                    case "set":
                        new = place.values_like(view) - below
                    case _:
                        new = place.changed(below + scaled(place.get(view), scale)) - below
                place.put(view, unscaled(new, scale), add=add)
                self._done(place)
            if reads:
                self._keep(reads, stream + scaled(view, scale))
            return value

        return step

    def heads(self, places: list[PlacedWrite], reads: list[SiteRead], layout: Layout) -> Step:
        """`head_out`: a head's part of the projection's output, changed by its difference.

        Several heads of one row and position add up.
        """

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            z, weight = layout_view(given, layout), head_weights(module, layout)
            if places:
                value = value.clone()
                vectors = _WrittenHeads(places, z, weight)
                for place in places:
                    vectors.change(place)
                    self._done(place)
                vectors.add_to(value)
            if reads:
                per_head = torch.einsum("bthd,hdm->bthm", z, weight)
                for place in places:
                    place.change(per_head)
                self._keep(reads, per_head)
            return value

        return step


def _added_to(value: Tensor, patches: Tensor) -> Tensor:
    """[B, T, width]: what an embedding has added to its patches, 0 at tokens in front of these.

    patches: [image, width, …] of a convolution, or [image, patch, width].
    """
    width = value.shape[-1]
    if patches.dim() > 3 or patches.shape[-1] != width:
        patches = patches.flatten(2).transpose(1, 2)
    by_image = value.reshape(len(patches), -1, width)
    added = torch.zeros_like(by_image)
    front = by_image.shape[1] - patches.shape[1]
    added[:, front:] = by_image[:, front:] - patches
    return added.reshape(value.shape)


class _WrittenHeads:
    """What the written heads give, each vector once, however many writes change it."""

    def __init__(self, places: list[PlacedWrite], z: Tensor, weight: Tensor) -> None:
        spots = [torch.stack([p.units, p.first, p.second]) for p in places]
        distinct, index = torch.cat(spots, dim=1).unique(dim=1, return_inverse=True)
        by_place = index.split([spot.shape[1] for spot in spots])
        moved = together_on_device([*distinct, *by_place], z.device)
        units, self.first, self.second = moved[:3]
        self.before = through_heads(z[self.first, self.second, units], distinct[0], weight)
        self.now = self.before.clone()
        self._index = iter(moved[3:])

    def change(self, place: PlacedWrite) -> None:
        """The next write, in the order in which they were given."""
        index = next(self._index)
        self.now[index] = place.changed(self.now[index])

    def add_to(self, value: Tensor) -> None:
        """Add what has changed to what the projection returned, [B, T, d_model]."""
        difference = self.now - self.before
        value.index_put_((self.first, self.second), difference, accumulate=True)
