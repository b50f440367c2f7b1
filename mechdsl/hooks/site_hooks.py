# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateUsage=false
"""What is read and written during one forward pass, site by site.

Hooks stand only where something is read or written. Where a pass lays its tokens is its `Frame`'s
to say: whole padded prompts, or packed rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.hooks.batch import to_device, together_on_device
from mechdsl.hooks.experts import ExpertHook, RouterHook
from mechdsl.hooks.hook_points import InHook, OutHook, Step, scale_of
from mechdsl.hooks.inside_attention import EdgeWrite, LayerWork, by_layer, layer_work
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import Frame, ReadMismatch, SiteRead, SiteWrite, WriteMismatch
from mechdsl.hooks.site_steps import PlacedWrite, SiteSteps
from mechdsl.models.anatomy import HookPoint, Layout, Side
from mechdsl.models.shape import units, width
from mechdsl.vocab.sites import NO_STEPS, SITES, WITHIN_ATTENTION, stop_layer, write_order

_LAST = (1 << 31, 0)


class PassStopped(Exception):
    """Everything that was asked for has been computed."""


class SiteWork:
    """Everything that is read and written during one forward pass, and what came of it."""

    def __init__(
        self,
        model: LoadedModel,
        frame: Frame,
        writes: Sequence[SiteWrite],
        reads: Sequence[SiteRead],
        stop: int | None = None,
        edges: Sequence[EdgeWrite] = (),
    ) -> None:
        n_layers = model.shape.n_layers
        if stop is not None and not 0 <= stop <= n_layers + 1:
            raise ValueError(f"stop {stop} is not in 0..{n_layers + 1}")
        self.model = model
        self.frame = frame
        self.stop = stop
        self._sites = SiteSteps(len(writes))
        self.found = self._sites.found
        self._steps: dict[tuple[str, Side, int], list[tuple[tuple[int, int], Step]]]
        self._steps = defaultdict(list)
        self._by_heads: set[tuple[str, Side, int]] = set()
        self._called_again: set[str] = set()
        self._patches: set[str] = set()
        """What makes vectors of patches that a site is worked out from."""
        self._experts: list[tuple[str, ExpertHook | RouterHook]] = []
        stacks = [model.anatomy, *(stack.anatomy for stack in model.others.values())]
        self._blocks = {block.path for anatomy in stacks for block in anatomy.blocks}
        self._wanted = [int(write.rows.numel()) for write in writes]
        self._writes = list(writes)
        self._reads = list(dict.fromkeys(reads))
        self._logits: tuple[list[PlacedWrite], list[SiteRead]] = ([], [])
        self._kept: Callable[[Tensor], Tensor] | None = None
        """Takes the wanted positions out of the logits, where that isn't done before them."""
        self._edges = by_layer(edges)
        self.within = self._within()
        self._layers: dict[int, LayerWork] = {}
        self._plan()

    # --- planning -----------------------------------------------------------------------------

    def _plan(self) -> None:
        """A step for each site and layer that is read or written."""
        writes: dict[SiteRead, list[PlacedWrite]] = defaultdict(list)
        for number, write in enumerate(self._writes):
            where = write.where
            self._require(where, WriteMismatch)
            if self._wanted[number]:
                writes[where].append(self._place(number, write))
        PlacedWrite.move(
            [place for places in writes.values() for place in places], self.model.device
        )
        for read in self._reads:
            self._require(read, ReadMismatch)
        for where in dict.fromkeys([*writes, *self._reads]):
            if where.site in WITHIN_ATTENTION:
                self._set_once(where, writes[where])
                continue
            self._set_once(where, writes[where])
            self._add_site(where, writes[where], where in self._reads)

    def _require(self, where: SiteRead, problem: type[Exception]) -> None:
        """The site is one of the model's and lies in the part that is run."""
        kind = SITES.get(where.site)
        if kind is None or (where.site == "logits" and "logits" not in self.model.shape.sites):
            raise ValueError(f"`{self.model.name}` has no `{where.site}`")
        if kind.has_layer != (where.layer is not None):
            need = "needs a layer" if kind.has_layer else "has no layers"
            raise ValueError(f"`{where.site}` {need}")
        if where.site in WITHIN_ATTENTION:
            if where.stack or not self.model.shape.has(where.site, where.layer):
                raise ValueError(f"`{self.model.name}` has no {where.quoted}")
        elif where.site != "logits" or where.stack:
            self.model.tap(where.site, where.layer, where.stack)
        if where.stack not in ("", "cross"):  # comes before the main stack
            return
        needed = stop_layer(where.site, where.layer, self.model.shape.n_layers)
        if self.stop is not None and (needed is None or needed > self.stop):
            raise problem(f"{where.quoted} lies above layer {self.stop}, where the run stops")

    def _place(self, number: int, write: SiteWrite) -> PlacedWrite:
        """Indices of a write; ValueError for a place that isn't in the batch."""
        where = write.where
        site_units, site_width = self._extent(where)
        count = self._wanted[number]
        name = where.quoted
        if SITES[where.site].width == "key":  # what lies behind a prompt's end is never seen
            site_width = write.values.shape[1]
        if write.mode in ("scale", "step"):
            site_width = 1
        if write.values.shape != (count, site_width):
            raise ValueError(f"values for {name} must be [{count}, {site_width}]")
        if write.positions.shape != (count,) or write.units.shape != (count,):
            raise ValueError(f"rows, positions and units for {name} must be equally long")
        lengths = self.frame.lengths_of(where.site, where.stack)
        rows, positions, units = write.rows, write.positions, write.units
        if bool(((rows < 0) | (rows >= len(self.frame))).any()):
            raise ValueError(f"a row for {name} is not in the batch")
        if bool(((positions < 0) | (positions >= lengths[rows])).any()):
            raise ValueError(f"a position for {name} is not in its prompt")
        if bool(((units < 0) | (units >= site_units)).any()):
            raise ValueError(f"a unit for {name} is not in 0..{site_units - 1}")
        first, second, there = self.frame.locate(
            where.site, where.layer, where.stack, rows, positions
        )
        values, to, before = write.values, write.to, self._before(where, write, there)
        if not bool(there.all()):
            first, second, units = first[there], second[there], units[there]
            index = torch.nonzero(there)[:, 0]
            values = values[to_device(index, values.device)]
            to = None if to is None else to[to_device(index, to.device)]
            self._wanted[number] = len(index)
        return PlacedWrite(number, write, values, first, second, units, to, before)

    def _before(self, where: SiteRead, write: SiteWrite, there: Tensor) -> Tensor | None:
        """[K] of a step: where the position before lies, or the place itself if it is the first.

        there: which of the places are in the pass. WriteMismatch where one before isn't.
        """
        if write.mode != "step":
            return None
        if where.site in NO_STEPS:
            raise ValueError(f"steps of {where.quoted} can't be written")
        rows, earlier = write.rows[there], (write.positions[there] - 1).clamp(min=0)
        _, second, found = self.frame.locate(where.site, where.layer, where.stack, rows, earlier)
        if not bool(found.all()):
            raise WriteMismatch(f"{where.quoted} isn't computed at a position before a step")
        return second

    def _extent(self, where: SiteRead) -> tuple[int, int]:
        """(units, width) of a site."""
        if where.site == "logits":
            return 1, self.model.shape.outputs
        if where.site == "router":
            return 1, self.model.stack(where.stack).shape.n_experts
        if where.site in WITHIN_ATTENTION:
            shape = self.model.shape
            keys = SITES[where.site].width == "key"
            each = 0 if keys else width(shape, where.site, where.layer)
            return units(shape, where.site, where.layer), each
        layout = self.model.tap(where.site, where.layer, where.stack).layout
        return layout.units, layout.width

    def _set_once(self, where: SiteRead, places: list[PlacedWrite]) -> None:
        """No write has a vector twice: it would hang on chance which of the two stands."""
        for place in places:
            spots = _numbered(place.first, place.second, place.units)
            if place.write.mode != "add" and bool((spots.sort().values.diff() == 0).any()):
                raise ValueError(f"a vector of {where.quoted} is written twice in one write")

    def _within(self) -> frozenset[int]:
        """Layers where something is read or written within attention."""
        found: set[int] = set()
        for write in self._writes:
            if write.site in WITHIN_ATTENTION and write.layer is not None:
                self._note(found, write.site, write.layer, write.rows, write.positions)
        for layer, edges in self._edges.items():
            for edge in edges:
                self._note(found, "pattern", layer, edge.rows, edge.queries)
        read = {read.layer for read in self._reads if read.site in WITHIN_ATTENTION}
        found |= {layer for layer in read if layer is not None}
        return frozenset(found)

    def _note(
        self, found: set[int], site: str, layer: int, rows: Tensor, positions: Tensor
    ) -> None:
        """A layer counts where any of the places can be seen by a measure."""
        if bool(self.frame.locate(site, layer, "", rows, positions)[2].any()):
            found.add(layer)

    def layer(self, layer: int, query: Tensor) -> LayerWork | None:
        """What is done within the attention of a layer, which runs once; None where nothing is.

        query: [B, heads, T, d_head], whose tokens are counted row by row.
        """
        if layer not in self.within:
            return None
        if layer in self._layers:
            raise WriteMismatch(f"attention of layer {layer} ran twice in one run")
        writes = [w for w in self._writes if w.layer == layer and w.site in WITHIN_ATTENTION]
        self._layers[layer] = layer_work(
            layer,
            self.frame,
            int(query.shape[2]),
            self.frame.lane_starts,
            self.frame.key_width,
            writes=writes,
            edges=self._edges.get(layer, ()),
            reads=[read.site for read in self._reads if read.layer == layer],
        )
        return self._layers[layer]

    def _add_site(self, where: SiteRead, places: list[PlacedWrite], read: bool) -> None:
        reads = [where] if read else []
        order = write_order(where.site, where.layer)
        if where.before:
            order = order[0], order[1] - 1
        if where.site == "logits":
            self._logits = (places, reads)
            return
        tap = self._tap(where)
        match where.site:
            case "resid_mid" if self._is_sum(where, tap):
                stream = self._tap(replace(where, site="resid_pre"))
                remember_order = (order[0], SITES["resid_pre"].order + 1)
                self._on(self._spot(stream), remember_order, self._sites.remember(stream.path))
                step = self._sites.between(places, reads, stream.path, self._scale(tap))
            case "head_out":
                step = self._sites.heads(places, reads, self._tap(replace(where, site="z")).layout)
            case "router" | "expert_out":
                layout = Layout.whole(tap.layout.units)
                experts = tap.layout.width if where.site == "router" else tap.layout.units
                kind = RouterHook if where.site == "router" else ExpertHook
                change = self._sites.own_view(places, reads, layout)
                self._experts.append((tap.path, kind(change, experts, self.frame)))
                return
            case _ if tap.patches is not None:
                self._patches.add(tap.patches)
                step = self._sites.in_front_of_positions(places, reads, tap.layout, tap.patches)
            case _:
                step = self._sites.direct(places, reads, tap.layout, self._scale(tap))
        if tap.layout.axes != "flat":
            self._by_heads.add(self._spot(tap))
        if tap.again:
            self._called_again.add(tap.path)
        self._on(self._spot(tap), order, step)

    def _tap(self, where: SiteRead) -> HookPoint:
        return self.model.tap(where.site, where.layer, where.stack)

    def _is_sum(self, where: SiteRead, tap: HookPoint) -> bool:
        """Whether the stream between the sublayers is no module's output."""
        block = self.model.stack(where.stack).anatomy.blocks[where.layer or 0]
        return tap in (block.taps.get("attn_out"), block.taps.get("mixer_out"))

    def _scale(self, tap: HookPoint) -> float | Tensor:
        return scale_of(self.model.module, tap)

    def _spot(self, tap: HookPoint) -> tuple[str, Side, int]:
        return tap.path, tap.side, tap.item

    def _on(self, spot: tuple[str, Side, int], order: tuple[int, int], step: Step) -> None:
        self._steps[spot].append((order, step))

    def keep_logits(self, positions: Tensor) -> None:
        """Unembed only these positions ([B, n], on the host) of each row."""
        if self._logits[0] or self._logits[1]:
            raise ValueError("logits can't be read or written where only some are computed")
        if positions.shape[:1] != (len(self.frame),) or positions.dim() != 2:
            raise ValueError("logits_at must be [B, n]")
        lengths = self.frame.lengths_of("logits", "")
        if bool(((positions < 0) | (positions >= lengths[:, None])).any()):
            raise ValueError("a position in logits_at is not in its prompt")
        model = self.model
        every = torch.arange(len(positions))[:, None].expand_as(positions)
        found = self.frame.locate("logits", None, "", every, positions)
        rows, columns = (
            index.view(positions.shape)
            for index in together_on_device([each.reshape(-1) for each in found[:2]], model.device)
        )

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            return value[rows.to(value.device), columns.to(value.device)]

        if self.model.anatomy.unembedding is None:  # what stands there may count tokens
            self._kept = lambda logits: step(logits, self.model.module, logits)
        else:
            self._on(entrance(self.model, self.model.shape.n_layers + 1), _LAST, step)

    # --- running ----------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Generator[None]:
        """Hooks in place; gone afterwards, whatever happens inside."""
        handles: list[Any] = []
        try:
            for path in self._patches:
                module = self.model.module.get_submodule(path)
                handles.append(module.register_forward_hook(self._keep_patches(path)))
            for (path, side, item), steps in self._steps.items():
                flat = (path, side, item) not in self._by_heads
                once = path in self._called_again
                module = self.model.module.get_submodule(path)
                ordered = [step for _, step in sorted(steps, key=lambda entry: entry[0])]
                if side == "in":
                    hook = InHook(ordered, self.frame, flat=flat, once=once)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    out = OutHook(ordered, item, self.frame, flat=flat, once=once)
                    # On blocks in front of the library's own, which collect what these return.
                    handles.append(
                        module.register_forward_hook(
                            out, with_kwargs=True, prepend=path in self._blocks
                        )
                    )
            for path, hook in self._experts:
                module = self.model.module.get_submodule(path)
                if isinstance(hook, RouterHook):
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))
            if self.stop is not None:  # behind all other hooks of that place
                path, side, _ = entrance(self.model, self.stop)
                module = self.model.module.get_submodule(path)
                if side == "in":
                    handles.append(module.register_forward_pre_hook(_stop))
                else:
                    handles.append(module.register_forward_hook(_stop))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._sites.streams.clear()

    def _keep_patches(self, path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self._sites.patches[path] = output

        return keep

    @property
    def repeats(self) -> bool:
        """Whether hooks can do the same in a pass over other tokens that lie as these do."""
        return not (self.within or self._called_again or self._reads)

    def begin(self) -> None:
        """Of another pass."""
        self._sites.begin()

    def output(self, logits: Tensor) -> Tensor:
        """The model's logits, after what is written and read there."""
        places, reads = self._logits
        if (places or reads) and logits.shape[-1] != self.model.shape.outputs:
            raise ValueError("logits can't be read or written where only some tokens' are computed")
        if not (places or reads):
            return logits if self._kept is None else self._kept(logits)
        whole = logits.dim() == 2  # one output for a whole image
        logits = logits.unsqueeze(1) if whole else logits
        with torch.inference_mode():
            layout = Layout.whole(width(self.model.shape, "logits"))
            step = self._sites.direct(places, reads, layout)
            logits = step(logits, self.model.module, logits)
        return logits.squeeze(1) if whole else logits

    def check(self) -> None:
        """Every row of every write exactly once, every read once."""
        for layer in self.within:
            self._check_within(layer)
        counted = zip(self._writes, self._sites.applied, self._wanted, strict=True)
        for write, applied, wanted in counted:
            if write.site in WITHIN_ATTENTION:
                continue
            if applied != wanted:
                name = write.where.quoted
                raise WriteMismatch(f"{wanted} rows were to be written at {name}, {applied} were")
        for read in self._reads:
            if read not in self.found:
                raise ReadMismatch(f"{read.quoted} was not passed")

    def _check_within(self, layer: int) -> None:
        """Attention ran, all of its writes happened; what was read is put with the rest."""
        work = self._layers.get(layer)
        if work is None:
            raise WriteMismatch(f"attention of layer {layer} was not passed")
        if work.done != work.due:
            raise WriteMismatch(
                f"{work.due} changes were to be made in attention of layer {layer}, "
                f"{work.done} were"
            )
        for site, found in work.found.items():
            self.found[SiteRead(site, layer)] = found.unflatten(0, (self.frame.leading, -1))


def entrance(model: LoadedModel, layer: int) -> tuple[str, Side, int]:
    """What is read by block `layer`, what leaves the last block, what the unembedding reads."""
    anatomy, n_layers = model.anatomy, model.shape.n_layers
    if layer < n_layers:
        return anatomy.blocks[layer].path, "in", 0
    if layer > n_layers and anatomy.unembedding is not None:
        return anatomy.unembedding, "in", 0
    if layer > n_layers and (tap := anatomy.taps.get("final_norm")) is not None:
        return tap.path, tap.side, 0
    return anatomy.blocks[-1].path, "out", 0


def _stop(*args: Any) -> None:
    raise PassStopped


def _numbered(*indices: Tensor) -> Tensor:
    """[K] one number for each place, of its indices [K]."""
    found = indices[0]
    for index in indices[1:]:
        found = found * (1 + int(index.max())) + index if len(index) else found
    return found
