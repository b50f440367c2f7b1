"""Full forward passes with reads and writes of activations at sites."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.attention import (
    AttentionCall,
    attend_across,
    attend_across_tiles,
    attend_full,
    attend_tiles,
    join_windows,
    replace_block_attention,
)
from mechdsl.forward.hooks.attention_hooks import (
    AttentionHooks,
    build_attention_hooks,
    group_by_layer,
)
from mechdsl.forward.hooks.backward_rules import (
    RuledPass,
    disable_checkpoints,
    recompute_blocks,
    suspend_decomposition,
)
from mechdsl.forward.hooks.batch import (
    Batch,
    CircuitRead,
    CircuitWrite,
    EdgeWrite,
    EditWrite,
    PassStopped,
    ReadMismatch,
    SiteRead,
    SiteWrite,
    TokenFrame,
    WriteMismatch,
    apply_write,
    indices_to_device,
    to_device,
)
from mechdsl.forward.hooks.circuits import open_circuit, skip_modules
from mechdsl.forward.hooks.coordinates import CoordinateWrite, EarlierChange
from mechdsl.forward.hooks.hook_points import (
    HookStep,
    InputHook,
    OutputHook,
    apply_scale,
    get_head_weights,
    get_scale,
    project,
    project_heads,
    put_layout,
    undo_scale,
    view_layout,
)
from mechdsl.forward.hooks.model import (
    Derivatives,
    LoadedModel,
    VisionColumns,
    call_with_batch,
    narrow_unembedding,
    reads_pixels,
    select_token_logits,
    split_vision,
    with_encoded,
)
from mechdsl.models.shape import HookPoint, HookSide, TensorLayout, unit_count, vector_width
from mechdsl.program.estimators import BackwardRules
from mechdsl.vocab.sites import (
    ATTENTION_INTERNAL_SITES,
    SITES,
    SITES_WITHOUT_STEPS,
    stop_layer,
    write_order,
)


@dataclass
class PlacedWrite:
    """One write with its indices into the tapped tensor, on the host."""

    number: int
    write: SiteWrite
    values: Tensor
    first: Tensor
    second: Tensor
    units: Tensor
    to: Tensor | None = None
    before: Tensor | None = None
    """[K] for `step`: index into the second dimension of the preceding position; the first
    position's own index if there is none."""
    source: SiteRead | None = None
    """Site whose coordinates are written here, if it is another one."""
    source_first: Tensor | None = None
    source_second: Tensor | None = None
    """[K]: indices into its tapped tensor."""
    earlier: list[EarlierChange] = field(default_factory=list[EarlierChange])
    """Changes of the same features by earlier writes, which `source` doesn't contain."""
    _moved: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Indices on the device, after a call of `move`."""

    @staticmethod
    def move(places: Sequence[PlacedWrite], device: torch.device) -> None:
        """Move the indices of all these writes to the device in one transfer."""
        named = [
            (place, name, index)
            for place in places
            for name in ("first", "second", "units", "before", "source_first", "source_second")
            if (index := getattr(place, name)) is not None
        ]
        moved = indices_to_device([index for _, _, index in named], device)
        for (place, name, _), index in zip(named, moved, strict=True):
            place._moved[name] = index

    def _index(self, view: Tensor, second: str = "second") -> tuple[Tensor, ...]:
        """Return indices into the first three dimensions of a view, on its device."""
        return tuple(self._moved[name].to(view.device) for name in ("first", second, "units"))

    @property
    def _joins_units(self) -> bool:
        return isinstance(self.write.mode, CoordinateWrite) and self.write.mode.joins_units

    def put(self, view: Tensor, values: Tensor, *, add: bool) -> None:
        """Write `values` [K, width] into a [B, T, units, width] view."""
        if self._joins_units:
            values = values.unflatten(1, view.shape[2:])
            view.index_put_(self._index(view)[:2], values, accumulate=add)
            return
        view.index_put_(self._index(view), values, accumulate=add)

    def mark(self, there: Tensor) -> None:
        """Mark written places in [B, T]."""
        there[self._index(there)[:2]] = True

    def get(self, view: Tensor) -> Tensor:
        """Return [K, width] of a [B, T, units, width] view."""
        if self._joins_units:
            return view[self._index(view)[:2]].flatten(1)
        return view[self._index(view)]

    def values_like(self, view: Tensor) -> Tensor:
        """Return the values on the device and in the dtype of their target."""
        return to_device(self.values, view.device).to(view.dtype)

    def get_before(self, view: Tensor) -> Tensor | None:
        """Return [K, width] of [B, T, units, width] at preceding positions; None if not needed."""
        if self.before is None:
            return None
        return view[self._index(view, "before")]

    def get_source(self, view: Tensor) -> Tensor:
        """Return [K, units * width] of the [B, T, units, width] view of `source`."""
        index = (self._moved[name].to(view.device) for name in ("source_first", "source_second"))
        return view[tuple(index)].flatten(1)

    def changed(
        self, now: Tensor, before: Tensor | None = None, inputs: Tensor | None = None
    ) -> Tensor:
        """Return [K, width]: the new values, from current ones and those one position before.

        Args:
            inputs: [K, width] current values of `source`.
        """
        to = None if self.to is None else to_device(self.to, now.device)
        inputs = None if inputs is None else inputs.to(now.device)
        values = to_device(self.values, now.device)
        earlier = [change.to(now.device) for change in self.earlier]
        with suspend_decomposition():  # encoders and plugins call layers
            return apply_write(self.write.mode, now, values, to, before, inputs, earlier)

    def find_earlier(self, others: Sequence[PlacedWrite]) -> Iterator[EarlierChange]:
        """Yield the changes of the same transcoder's features by earlier writes to the site.

        A write of whole vectors replaces what the writes before it changed.
        """
        mode = self.write.mode
        if not isinstance(mode, CoordinateWrite) or not mode.reads or self.write.rule < 0:
            return
        index_of = {spot: number for number, spot in enumerate(self._spots)}
        is_open = torch.ones(len(index_of), dtype=torch.bool)
        changes: list[EarlierChange] = []
        for other in reversed(others):
            index = torch.zeros(len(index_of), dtype=torch.long)
            there = torch.zeros_like(is_open)
            for number, spot in enumerate(other._spots):
                if spot in index_of:
                    index[index_of[spot]], there[index_of[spot]] = number, True
            there &= is_open
            if not bool(there.any()):
                continue
            own = other.write.mode
            if isinstance(own, CoordinateWrite) and mode.changes_same(own):
                changes.append(other._change_at(own, index, there))
            elif own == "set" or (isinstance(own, CoordinateWrite) and own.replaces_vectors):
                is_open &= ~there
        yield from reversed(changes)

    @property
    def _spots(self) -> list[tuple[int, int, int]]:
        """Tokens and units of the vectors."""
        indices = (self.first, self.second, self.units)
        return list(zip(*(index.tolist() for index in indices), strict=True))

    def _change_at(self, mode: CoordinateWrite, index: Tensor, there: Tensor) -> EarlierChange:
        """Return the change of the vectors `index` [K], for those that are `there` [K]."""
        to = self.to
        if to is not None and mode.inserted is not None:
            to = to[:, : -mode.count_inserted]
        which = None if to is None else to[to_device(index, to.device)]
        values = self.values[to_device(index, self.values.device)]
        return EarlierChange(mode.operation, there, values, which)

    def change(
        self, view: Tensor, scale: float | Tensor = 1.0, inputs: Tensor | None = None
    ) -> None:
        """Write into a [B, T, units, width] view; the view times `scale` is the site."""
        match self.write.mode:
            case "set" | "add" as mode:
                self.put(view, undo_scale(self.values_like(view), scale), add=mode == "add")
            case _:
                now, before = apply_scale(self.get(view), scale), self.get_before(view)
                before = None if before is None else apply_scale(before, scale)
                self.put(view, undo_scale(self.changed(now, before, inputs), scale), add=False)


class SiteSteps:
    """Builder of the steps of one forward pass, which collects their results."""

    def __init__(self, inserted: int) -> None:
        self.found: dict[SiteRead, Tensor] = {}
        """[B, T, units, width] values that were read."""
        self.applied: list[int] = []
        """Number of vectors of each write that were written so far."""
        self.streams: dict[str, Tensor] = {}
        """Path of a tapped module → the stream that enters its block, for `resid_mid`."""
        self.patches: dict[str, Tensor] = {}
        """Path of the module that embeds patches → its output."""
        self.inserted = inserted
        """As in `Batch`."""
        self.sources: dict[SiteRead, Tensor | None] = {}
        """Site whose coordinates are written elsewhere → its current values, once passed."""
        self.asked: set[SiteRead] = set()
        """Sites whose values are returned."""

    def begin(self) -> None:
        """Start a further pass, in which nothing is read."""
        self.applied = [0] * len(self.applied)

    def _done(self, place: PlacedWrite) -> None:
        self.applied[place.number] += int(place.first.numel())

    def _keep(self, reads: list[SiteRead], view: Tensor) -> None:
        for read in reads:
            if read in self.sources:
                self.sources[read] = view.clone()
            if read not in self.asked:
                continue
            if read in self.found:
                raise ReadMismatch(f"{read.quoted} was passed twice in one run")
            self.found[read] = view.clone(memory_format=torch.contiguous_format)

    def _inputs(self, place: PlacedWrite) -> Tensor | None:
        """Return [K, width]: the vectors whose coordinates are written; None for the site's own."""
        if place.source is None:
            return None
        view = self.sources[place.source]
        if view is None:
            raise WriteMismatch(f"{place.source.quoted} wasn't passed before it was needed")
        return place.get_source(view)

    def direct(
        self,
        places: list[PlacedWrite],
        reads: list[SiteRead],
        layout: TensorLayout,
        scale: float | Tensor = 1.0,
    ) -> HookStep:
        """Build a step for a site that is a slice of the tapped tensor, times `scale`."""

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            if places:
                value = value.detach() if places[0].write.holds else value
                value = value.clone(memory_format=torch.contiguous_format)
            view = view_layout(value, layout)
            for place in places:
                place.change(view, scale, self._inputs(place))
                self._done(place)
            if places:
                put_layout(value, layout, view)
            self._keep(reads, apply_scale(view, scale))
            return value

        return step

    def in_front_of_positions(
        self, places: list[PlacedWrite], reads: list[SiteRead], layout: TensorLayout, patches: str
    ) -> HookStep:
        """Build a step for a site that is the tapped tensor without the positions of patches."""
        direct = self.direct(places, reads, layout)

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            added = _find_additions(value, self.patches.pop(patches), self.inserted)
            change = direct(value - added, module, given)
            if not places:
                return value
            # tokens that aren't written keep their exact values
            there = torch.zeros(value.shape[:2], dtype=torch.bool, device=value.device)
            for place in places:
                place.mark(there)
            return torch.where(there[..., None], change + added, value)

        return step

    def own_view(
        self, places: list[PlacedWrite], reads: list[SiteRead]
    ) -> Callable[[Tensor], Tensor]:
        """Build a change of a site that is computed only for mechdsl, as [B, T, units, width]."""

        def change(view: Tensor) -> Tensor:
            if places:
                view = view.clone()
            for place in places:
                place.change(view)
                self._done(place)
            self._keep(reads, view)
            return view

        return change

    def remember(self, path: str) -> HookStep:
        """Build a step that stores the stream before a block, for `resid_mid` in that block."""

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            self.streams[path] = value
            return value

        return step

    def between(
        self, places: list[PlacedWrite], reads: list[SiteRead], path: str, scale: float | Tensor
    ) -> HookStep:
        """Build a step for `resid_mid`: it changes attention's contribution to fit the sum.

        The stream between the sublayers isn't the output of any module; a hook on the second norm
        would not affect the residual branch.
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
                        new = place.changed(below + apply_scale(place.get(view), scale)) - below
                place.put(view, undo_scale(new, scale), add=add)
                self._done(place)
            if reads:
                self._keep(reads, stream + apply_scale(view, scale))
            return value

        return step

    def heads(
        self, places: list[PlacedWrite], reads: list[SiteRead], layout: TensorLayout
    ) -> HookStep:
        """Build a step for `head_out`: it replaces outputs of heads in the projection's output."""

        @suspend_decomposition()
        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            if places:
                value = value.clone()
                vectors = _WrittenHeads(places, given, layout, module)
                for place in places:
                    vectors.change(place)
                    self._done(place)
                vectors.put(value)
            if reads:
                z, weight = view_layout(given, layout), get_head_weights(module, layout)
                per_head = torch.einsum("bthd,hdm->bthm", z, weight)
                for place in places:
                    place.change(per_head)
                self._keep(reads, per_head)
            return value

        return step


def _find_additions(value: Tensor, patches: Tensor, inserted: int) -> Tensor:
    """Return [B, T, width]: the embedding's additions to patches; 0 at other tokens.

    Args:
        value: [B, T, width] the embedding's output.
        patches: [image, width, …] from a convolution, or [image, patch, width].
        inserted: Number of tokens after the patches.
    """
    width = value.shape[-1]
    if patches.dim() > 3 or patches.shape[-1] != width:
        patches = patches.flatten(2).transpose(1, 2)
    by_image = value.reshape(len(patches), -1, width)
    added = torch.zeros_like(by_image)
    end = by_image.shape[1] - inserted
    own = slice(end - patches.shape[1], end)
    added[:, own] = by_image[:, own] - patches
    return added.reshape(value.shape)


class _WrittenHeads:
    """Outputs of written heads; each vector appears once, even if several writes change it.

    Args:
        given: [B, T, …] the projection's input.
        layout: The heads in it.
    """

    def __init__(
        self, places: list[PlacedWrite], given: Tensor, layout: TensorLayout, projection: nn.Module
    ) -> None:
        spots = [torch.stack([p.units, p.first, p.second]) for p in places]
        distinct, index = torch.cat(spots, dim=1).unique(dim=1, return_inverse=True)
        tokens, token_of = distinct[1:].unique(dim=1, return_inverse=True)
        by_place = index.split([spot.shape[1] for spot in spots])
        moved = indices_to_device([*distinct, *tokens, token_of, *by_place], given.device)
        self._units, first, second, *self._tokens, self._token_of = moved[:6]
        z = view_layout(given, layout)
        weight = get_head_weights(projection, layout)
        self.before = project_heads(z[first, second, self._units], distinct[0], weight)
        self.now = self.before.clone()
        self._index = iter(moved[6:])
        self._given, self._layout, self._projection = given, layout, projection

    def change(self, place: PlacedWrite) -> None:
        """Apply the next write; writes must come in the order given to the constructor."""
        index = next(self._index)
        self.now[index] = place.changed(self.now[index])

    def put(self, value: Tensor) -> None:
        """Replace the projection's output, [B, T, d_model], at the tokens whose heads changed.

        It is the sum of the new outputs and of the other heads. Differences added to the old
        output would leave its rounding errors, which a norm can amplify.
        """
        first, second = self._tokens
        kept = self._given[first, second][None].clone()
        view_layout(kept, self._layout)[0, self._token_of, self._units] = 0
        output = project(self._projection, kept).reshape(len(first), value.shape[-1])
        output = output.index_add(0, self._token_of, self.now)
        if not self.now.requires_grad:  # equal vectors have a derivative, too
            moves = (self.now != self.before).any(dim=-1).to(output.dtype)
            changed = output.new_zeros(len(first)).index_add(0, self._token_of, moves) > 0
            output = torch.where(changed[:, None], output, value[first, second])
        value[first, second] = output


TensorChange = Callable[[Tensor], Tensor]
"""Map from [B, T, units, width] to a tensor of the same shape."""


class RouterHook:
    """Hook that reads and writes router weights."""

    def __init__(self, change: TensorChange, experts: int, frame: TokenFrame) -> None:
        self.change = change
        self.experts = experts
        self.frame = frame

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens, index, weights = _read_call(args, kwargs)
        dense = weights.new_zeros(len(weights), self.experts)
        dense.scatter_(1, index, weights)
        given = dense.unflatten(0, (self.frame.leading, -1)).unsqueeze(2)
        value = self.change(given)
        if value is given:
            return None
        every = torch.arange(self.experts, dtype=index.dtype, device=index.device)
        every = every.expand(len(dense), -1).contiguous()
        return (tokens, every, value.squeeze(2).flatten(0, 1).contiguous()), {}


class ExpertHook:
    """Hook that reads and writes the contributions of single experts."""

    def __init__(self, change: TensorChange, experts: int, frame: TokenFrame) -> None:
        self.change = change
        self.experts = experts
        self.frame = frame

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Any:
        tokens, index, weights = _read_call(args, kwargs)
        shares = (self._alone(module, tokens, index, weights, e) for e in range(self.experts))
        each = torch.stack([share.reshape(len(weights), -1) for share in shares], dim=1)
        given = each.unflatten(0, (self.frame.leading, -1))
        value = self.change(given)
        if value is given:
            return None
        return output + (value - given).sum(2).reshape(output.shape)

    @staticmethod
    def _alone(
        module: nn.Module, tokens: Tensor, index: Tensor, weights: Tensor, expert: int
    ) -> Tensor:
        """Return [n, d_model]: one expert's contribution."""
        weight = (weights * (index == expert)).sum(1, keepdim=True)
        only = torch.full_like(index[:, :1], expert)
        # Not `module(...)`, which would run these hooks again.
        return module.forward(tokens, only, weight)


def _read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens, indices, weights) of a call."""
    tokens, index, weights = (*args, *kwargs.values())[:3]
    return tokens, index.reshape(-1, index.shape[-1]), weights.reshape(-1, weights.shape[-1])


_LAST_ORDER = (1 << 31, 0)


class SiteHooks:
    """All reads and writes of one forward pass, and their results."""

    def __init__(
        self,
        model: LoadedModel,
        frame: TokenFrame,
        writes: Sequence[SiteWrite],
        reads: Sequence[SiteRead],
        stop: int | None = None,
        edges: Sequence[EdgeWrite] = (),
        circuits: Sequence[CircuitWrite | CircuitRead] = (),
        *,
        changes: BackwardRules | None = None,
    ) -> None:
        """Prepare the hooks; changes: of the derivatives that autograd computes."""
        changes = changes or BackwardRules()
        n_layers = model.shape.n_layers
        if stop is not None and not 0 <= stop <= n_layers + 1:
            raise ValueError(f"stop {stop} is not in 0..{n_layers + 1}")
        self.model = model
        self.frame = frame
        self.stop = stop
        self.again = partial(SiteHooks, model, frame, writes, reads, stop, edges, changes=changes)
        """Creates the hooks of a pass over the same tokens, without circuits."""
        # packed and generated tokens enter after the embedding, or are the model's own
        self._inserted = frame.inserted if isinstance(frame, Batch) else 0
        self._sites = SiteSteps(self._inserted)
        self.found = self._sites.found
        self._steps: dict[tuple[str, HookSide, int], list[tuple[tuple[int, int], HookStep]]]
        self._steps = defaultdict(list)
        self._by_heads: set[tuple[str, HookSide, int]] = set()
        self._called_again: set[str] = set()
        self._reads_stream = False
        """Whether a step in a block needs the stream before the block."""
        self._patches: set[str] = set()
        """Paths of modules that embed patches, whose output a site needs."""
        self._experts: list[tuple[str, ExpertHook | RouterHook]] = []
        stacks = [model.anatomy, *(stack.anatomy for stack in model.others.values())]
        self._blocks = {block.path for anatomy in stacks for block in anatomy.blocks}
        self._set_writes(writes)
        self._placed: dict[SiteRead, list[PlacedWrite]] = defaultdict(list)
        """Writes of each site, which its step reads in each pass."""
        self._reads = list(dict.fromkeys(reads))
        self._sites.asked.update(self._reads)
        self._logits: tuple[list[PlacedWrite], list[SiteRead]] = ([], [])
        self._kept: Callable[[Tensor], Tensor] | None = None
        """Selects the requested positions from logits, if that can't happen before the
        unembedding."""
        self._edges = group_by_layer(edges)
        stack = _find_differentiated_stack(model, frame)
        ruled = _list_attention(model, frame, stack) if changes.in_attention else set()
        self.within = self._within() | ruled
        self._layers: dict[tuple[str, int], AttentionHooks] = {}
        self._circuits = [open_circuit(model, frame, circuit, writes) for circuit in circuits]
        self._plan()
        dropped, encodes = changes.dropped_stack, reads_pixels(frame) and model.shape.encodes_apart
        is_passed = dropped in (stack, "encoder") or encodes
        if changes.dropped_layer is not None and is_passed:
            self._drop_gradients(changes.dropped_layer, dropped)

    # --- planning -----------------------------------------------------------------------------

    def _plan(self) -> None:
        """Add a step for each site and layer that is read or written."""
        self._place_writes()
        for read in self._reads:
            self._require(read, ReadMismatch)
        sources = [
            p.source for writes in self._placed.values() for p in writes if p.source is not None
        ]
        self._sites.sources.update(dict.fromkeys(sources))
        for where in dict.fromkeys([*self._placed, *self._reads, *sources]):
            if where.site not in ATTENTION_INTERNAL_SITES:
                self._add_site(where, self._placed[where], where in (*self._reads, *sources))
        for circuit in self._circuits:
            for step in circuit.steps():
                if step.by_heads:
                    self._by_heads.add(step.spot)
                self._on(step.spot, step.order, step.step)

    def _place_writes(self) -> None:
        """Compute the indices of all writes, by site."""
        for places in self._placed.values():
            places.clear()
        for number, write in enumerate(self._writes):
            self._require(write.where, WriteMismatch)
            if self._wanted[number]:
                self._placed[write.where].append(self._place(number, write))
        every = [place for places in self._placed.values() for place in places]
        PlacedWrite.move(every, self.model.device)
        for where, places in self._placed.items():
            self._set_once(where, places)
            for number, place in enumerate(places):
                place.earlier = list(place.find_earlier(places[:number]))

    def rewrite(self, writes: Sequence[SiteWrite]) -> bool:
        """Replace all writes for a further pass, and return whether the hooks allow that."""
        fixed = any(isinstance(write.mode, CoordinateWrite) for write in writes)
        if fixed or not self.repeats or not {write.where for write in writes} <= set(self._placed):
            return False
        self._set_writes(writes)
        self._place_writes()
        return True

    def _set_writes(self, writes: Sequence[SiteWrite]) -> None:
        self._writes = list(writes)
        self._wanted = [int(write.rows.numel()) for write in writes]
        self._sites.applied = [0] * len(writes)

    def _drop_gradients(self, layer: int, stack: str) -> None:
        """Let no gradient pass the outputs of a block's sublayers."""
        outputs = [SiteRead(site, layer, stack) for site in ("attn_out", "mixer_out", "mlp_out")]
        if not stack and "cross" in self.model.others:
            outputs.append(SiteRead("attn_out", layer, "cross"))
        for where in outputs:
            if self.model.stack(where.stack).shape.has(where.site, layer):
                order, rank = write_order(where.site, layer)
                spot = self._spot(self._tap(where))
                self._on(spot, (order, rank - 1), lambda value, module, given: value.detach())

    def _require(self, where: SiteRead, problem: type[Exception]) -> None:
        """Check that the model has the site, and that the pass reaches it."""
        kind = SITES.get(where.site)
        if kind is None or (where.site == "logits" and "logits" not in self.model.shape.sites):
            raise ValueError(f"`{self.model.name}` has no `{where.site}`")
        if kind.has_layer != (where.layer is not None):
            need = "needs a layer" if kind.has_layer else "has no layers"
            raise ValueError(f"`{where.site}` {need}")
        if where.site in ATTENTION_INTERNAL_SITES:
            if not self.model.stack(where.stack).shape.has(where.site, where.layer):
                raise ValueError(f"`{self.model.name}` has no {where.quoted}")
        elif where.site != "logits" or where.stack:
            self.model.tap(where.site, where.layer, where.stack)
        if where.stack not in ("", "cross"):  # comes before the main stack
            return
        needed = stop_layer(where.site, where.layer, self.model.shape.n_layers)
        if self.stop is not None and (needed is None or needed > self.stop):
            raise problem(f"{where.quoted} lies above layer {self.stop}, where the run stops")

    def _place(self, number: int, write: SiteWrite) -> PlacedWrite:
        """Compute the indices of a write. Raises ValueError for a position outside the batch."""
        where = write.where
        site_units, site_width = self._extent(where)
        count = self._wanted[number]
        name = where.quoted
        if SITES[where.site].width == "key":  # values after a prompt's end have no effect
            site_width = write.values.shape[1]
        one_factor = write.mode == "scale" and write.values.shape[1] == 1
        if one_factor or write.mode == "step" or isinstance(write.mode, EditWrite):
            site_width = 1
        elif isinstance(write.mode, CoordinateWrite):
            site_width = write.values.shape[1]
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
        place = PlacedWrite(number, write, values, first, second, units, to, before)
        self._place_source(place, there)
        return place

    def _place_source(self, place: PlacedWrite, there: Tensor) -> None:
        """Add the site whose coordinates are written at another one, with its indices.

        Args:
            there: Whether each position is in the pass.

        Raises:
            WriteMismatch: A position isn't computed there.
        """
        write = place.write
        if not isinstance(write.mode, CoordinateWrite) or not write.mode.reads:
            return
        mode, layer = write.mode, write.mode.find_layer(write.where.layer)
        source = replace(write.where, site=mode.reads, layer=layer)
        at = write.rows[there], write.positions[there]
        first, second, location = self.frame.locate(source.site, source.layer, source.stack, *at)
        if not bool(location.all()):
            written = write.where.quoted
            raise WriteMismatch(f"{source.quoted} isn't computed where {written} is written")
        place.source, place.source_first, place.source_second = source, first, second

    def _before(self, where: SiteRead, write: SiteWrite, there: Tensor) -> Tensor | None:
        """Return [K] for a step: index of the preceding position, or of the first position itself.

        Args:
            there: Whether each position is in the pass.

        Raises:
            WriteMismatch: A preceding position isn't in the pass.
        """
        if write.mode != "step":
            return None
        if where.site in SITES_WITHOUT_STEPS:
            raise ValueError(f"steps of {where.quoted} can't be written")
        rows, earlier = write.rows[there], (write.positions[there] - 1).clamp(min=0)
        if isinstance(self.frame, Batch):
            first = self.frame.first_positions(where.site, where.stack)
            earlier = torch.maximum(earlier, first.to(earlier)[rows])
        _, second, place = self.frame.locate(where.site, where.layer, where.stack, rows, earlier)
        if not bool(place.all()):
            raise WriteMismatch(f"{where.quoted} isn't computed at a position before a step")
        return second

    def _extent(self, where: SiteRead) -> tuple[int, int]:
        """Return (units, width) of a site."""
        if where.site == "logits":
            return 1, self.model.shape.outputs
        if where.site == "router":
            return 1, self.model.stack(where.stack).shape.n_experts
        if where.site in ATTENTION_INTERNAL_SITES:
            shape = self.model.stack(where.stack).shape
            keys = SITES[where.site].width == "key"
            extent = 0 if keys else vector_width(shape, where.site, where.layer)
            return unit_count(shape, where.site, where.layer), extent
        layout = self.model.tap(where.site, where.layer, where.stack).layout
        return layout.units, layout.width

    def _set_once(self, where: SiteRead, places: list[PlacedWrite]) -> None:
        """Check that no write contains a vector twice: which one remains would be arbitrary."""
        for place in places:
            if place.write.mode == "add":
                continue
            spots = _number_places(place.first, place.second, place.units)
            if bool((spots.sort().values.diff() == 0).any()):
                raise ValueError(f"a vector of {where.quoted} is written twice in one write")

    def _within(self) -> frozenset[tuple[str, int]]:
        """Return the stacks and layers with reads or writes within attention."""
        blocks: set[tuple[str, int]] = set()
        for write in self._writes:
            if write.site in ATTENTION_INTERNAL_SITES and write.layer is not None:
                place = write.stack, write.layer
                self._note(blocks, write.site, place, write.rows, write.positions)
        for place, edges in self._edges.items():
            for edge in edges:
                self._note(blocks, "pattern", place, edge.rows, edge.queries)
        read = [read for read in self._reads if read.site in ATTENTION_INTERNAL_SITES]
        blocks |= {(each.stack, each.layer) for each in read if each.layer is not None}
        return frozenset(blocks)

    def _note(
        self,
        found: set[tuple[str, int]],
        site: str,
        place: tuple[str, int],
        rows: Tensor,
        positions: Tensor,
    ) -> None:
        """Add a layer if any of the positions is relevant to a measure."""
        stack, layer = place
        if bool(self.frame.locate(site, layer, stack, rows, positions)[2].any()):
            found.add(place)

    def layer(self, place: tuple[str, int], query: Tensor) -> AttentionHooks | None:
        """Start the reads and writes within the attention of a layer; None if there are none.

        Attention of a layer must run only once for each token.

        Args:
            place: The stack and its layer.
            query: [B, heads, T, d_head], whose tokens are counted row by row.
        """
        stack, layer = place
        if place not in self.within:
            return None
        keys, patched = self.frame.keys_of(stack), self.is_patched(stack)
        if place in self._layers:
            work = self._layers[place]
            if patched and work.passed < len(work.starts) * work.width:  # another tile or window
                return work
            raise WriteMismatch(f"attention of layer {layer} ran twice in one run")
        inside = [w for w in self._writes if w.site in ATTENTION_INTERNAL_SITES]
        own = [read for read in self._reads if (read.stack, read.layer) == place]
        pools = keys.pools if isinstance(keys, Batch) and any(r.pooled for r in own) else None
        tiles = keys.tiles if isinstance(keys, Batch) else None
        self._layers[place] = build_attention_hooks(
            layer,
            self.frame,
            keys.key_width if patched else int(query.shape[2]),
            keys.lane_starts,
            keys.key_width,
            writes=[w for w in inside if (w.stack, w.layer) == place],
            edges=self._edges.get(place, ()),
            reads=[_name_read(read) for read in own if tiles is not None or not read.pooled],
            pools=pools,
            tiles=tiles,
        )
        return self._layers[place]

    @property
    def opened_tiles(self) -> frozenset[tuple[str, int]]:
        """The stacks and layers in which patches may see keys in other tiles of their image."""
        return frozenset(
            place
            for place in self.within
            if any(edge.change == "allow" for edge in self._edges.get(place, ()))
            and self.is_patched(place[0])
        )

    def is_patched(self, stack: str) -> bool:
        """Return whether attention of a stack may run tile by tile, in a vision encoder. If blocks
        attend to images, all tiles of an image attend to each other."""
        if stack != "vision" or not self.model.shape.attends_to_image:
            return stack == "vision"
        assert isinstance(self.frame, Batch)
        return self.frame.of_stack(stack).key_width > VisionColumns.of(self.model.shape).count

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
                self._reads_stream = True
                self._on(self._spot(stream), remember_order, self._sites.remember(stream.path))
                step = self._sites.between(places, reads, stream.path, self._scale(tap))
            case "head_out":
                step = self._sites.heads(places, reads, self._tap(replace(where, site="z")).layout)
            case "router" | "expert_out":
                experts = tap.layout.width if where.site == "router" else tap.layout.units
                kind = RouterHook if where.site == "router" else ExpertHook
                change = self._sites.own_view(places, reads)
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
        """Return whether the stream between the sublayers is a sum, not the output of a module."""
        block = self.model.stack(where.stack).anatomy.blocks[where.layer or 0]
        return tap in (block.taps.get("attn_out"), block.taps.get("mixer_out"))

    def _scale(self, tap: HookPoint) -> float | Tensor:
        return get_scale(self.model.module, tap)

    def _spot(self, tap: HookPoint) -> tuple[str, HookSide, int]:
        return tap.path, tap.side, tap.item

    def _on(self, spot: tuple[str, HookSide, int], order: tuple[int, int], step: HookStep) -> None:
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
        place = self.frame.locate("logits", None, "", every, positions)
        rows, columns = (
            index.view(positions.shape)
            for index in indices_to_device([each.reshape(-1) for each in place[:2]], model.device)
        )

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            return value[rows.to(value.device), columns.to(value.device)]

        if self.model.anatomy.unembedding is None:  # the last module may count tokens
            self._kept = lambda logits: step(logits, self.model.module, logits)
        else:
            self._on(find_entrance(self.model, self.model.shape.n_layers + 1), _LAST_ORDER, step)

    # --- running ----------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Generator[None]:
        """Install the hooks; they are removed on exit, also after errors."""
        handles: list[Any] = []
        try:
            for path in self._patches:
                module = self.model.module.get_submodule(path)
                handles.append(module.register_forward_hook(self._keep_patches(path)))
            if self._inserted:  # before reads and writes at this site
                embedding = self.model.module.get_submodule(self.model.tap("embed", None).path)
                append = _append_tokens(self._inserted)
                handles.append(embedding.register_forward_hook(append, prepend=True))
            for (path, side, item), steps in self._steps.items():
                flat = (path, side, item) not in self._by_heads
                once = path in self._called_again
                module = self.model.module.get_submodule(path)
                ordered = [step for _, step in sorted(steps, key=lambda entry: entry[0])]
                if side == "in":
                    hook = InputHook(ordered, self.frame, flat=flat, once=once)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    out = OutputHook(ordered, item, self.frame, flat=flat, once=once)
                    # On blocks, before the library's own hooks, which collect block outputs.
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
            if self.stop is not None:  # after all other hooks at that point
                path, side, _ = find_entrance(self.model, self.stop)
                module = self.model.module.get_submodule(path)
                if side == "in":
                    handles.append(module.register_forward_pre_hook(_stop_pass))
                else:
                    handles.append(module.register_forward_hook(_stop_pass))
            with skip_modules(self.model, self._circuits, self.frame.leading):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._sites.streams.clear()
            self._sites.sources.update(dict.fromkeys(self._sites.sources))

    def _keep_patches(self, path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self._sites.patches[path] = output

        return keep

    @property
    def repeats(self) -> bool:
        """Whether the hooks can run again in a pass over other tokens with the same layout."""
        return not (self.within or self._called_again or self._reads)

    @property
    def repeats_blocks(self) -> bool:
        """Whether a block's steps depend on its input alone, so that it can run again by itself."""
        outside = self._called_again, self._experts, self._circuits, self._reads_stream
        return not (self.within or any(outside))

    def skip_encoder(self, batch: Batch) -> Batch:
        """Return the batch with vectors that the encoder of an encoder-decoder computed before,
        unless there are reads, writes or edges of circuits in the encoder."""
        places = (*self._reads, *(write.where for write in self._writes))
        stacks = {*(place.stack for place in places), *(stack for stack, _ in self.within)}
        stacks.update(circuit.stack for circuit in self._circuits)
        return batch if "encoder" in stacks else with_encoded(self.model, batch)

    def begin(self) -> None:
        """Start a further pass."""
        self._sites.begin()

    def output(self, logits: Tensor) -> Tensor:
        """Return the model's logits after reads and writes of logits."""
        places, reads = self._logits
        if (places or reads) and logits.shape[-1] != self.model.shape.outputs:
            raise ValueError("logits can't be read or written where only some tokens' are computed")
        if not (places or reads):
            return logits if self._kept is None else self._kept(logits)
        whole = logits.dim() == 2  # one output for a whole image
        logits = logits.unsqueeze(1) if whole else logits
        with torch.inference_mode(logits.is_inference()):
            layout = TensorLayout.whole(vector_width(self.model.shape, "logits", None))
            step = self._sites.direct(places, reads, layout)
            logits = step(logits, self.model.module, logits)
        return logits.squeeze(1) if whole else logits

    def check(self) -> None:
        """Check that every write happened exactly once for every row, and every read once."""
        for place in self.within:
            self._check_within(place)
        counted = zip(self._writes, self._sites.applied, self._wanted, strict=True)
        for write, applied, wanted in counted:
            if write.site in ATTENTION_INTERNAL_SITES:
                continue
            if applied != wanted:
                name = write.where.quoted
                raise WriteMismatch(f"{wanted} rows were to be written at {name}, {applied} were")
        for circuit in self._circuits:
            circuit.check(stopped=self.stop is not None and circuit.stack != "vision")
        for read in self._reads:
            if read not in self.found:
                raise ReadMismatch(f"{read.quoted} was not passed")

    def _check_within(self, place: tuple[str, int]) -> None:
        """Check that attention ran and all of its writes happened; adds its reads to the others."""
        work, (stack, layer) = self._layers.get(place), place
        if work is None:
            raise WriteMismatch(f"attention of layer {layer} was not passed")
        if self.is_patched(stack) and work.passed != len(work.starts) * work.width:
            raise WriteMismatch(f"attention of layer {layer} did not pass all patches")
        if work.done != work.due:
            raise WriteMismatch(
                f"{work.due} changes were to be made in attention of layer {layer}, "
                f"{work.done} were"
            )
        named = {_name_read(read): read for read in _list_pattern_reads(layer, stack)}
        every = {
            named.get(name, SiteRead(name, layer, stack)): tensor
            for name, tensor in work.found.items()
        }
        if work.pooled is not None:
            every[named["tokens"]] = work.pooled
        for read, tensor in every.items():
            self.found[read] = tensor.unflatten(0, (self.frame.leading, -1))


def _name_read(read: SiteRead) -> str:
    """Return the name of a read within attention, as in `AttentionHooks.found`."""
    return "entropy" if read.entropy else "tokens" if read.pooled else read.site


def _list_pattern_reads(layer: int, stack: str) -> tuple[SiteRead, SiteRead]:
    """Return the reads of a layer that are computed from its pattern."""
    pattern = SiteRead("pattern", layer, stack)
    return replace(pattern, entropy=True), replace(pattern, pooled=True)


def _find_differentiated_stack(model: LoadedModel, frame: TokenFrame) -> str:
    """Return `vision` in a pass of the vision encoder on images of prompts, else the main stack."""
    encodes = isinstance(frame, Batch) and "vision" in frame.frames
    return "vision" if encodes and not model.shape.encodes_apart else ""


def _list_attention(model: LoadedModel, frame: TokenFrame, stack: str) -> set[tuple[str, int]]:
    """Return each stack with attention that the pass computes and whose activations reach the
    logits, and its layers.

    stack: As from `_find_differentiated_stack`.
    """
    stacks = {stack: model.stack(stack).shape}
    if model.shape.encodes_apart:
        stacks |= model.shape.others
    if model.shape.attends_to_image and not reads_pixels(frame):
        stacks.pop("vision", None)
    return {
        (name, layer)
        for name, shape in stacks.items()
        for layer in shape.partly.get("z", range(shape.n_layers))
    }


def find_entrance(model: LoadedModel, layer: int) -> tuple[str, HookSide, int]:
    """Return the hook point of block `layer`'s input, the last block's output, or the unembedding's
    input."""
    anatomy, n_layers = model.anatomy, model.shape.n_layers
    if layer < n_layers:
        return anatomy.blocks[layer].path, "in", 0
    if layer > n_layers and anatomy.unembedding is not None:
        return anatomy.unembedding, "in", 0
    if layer > n_layers and (tap := anatomy.taps.get("final_norm")) is not None:
        return tap.path, tap.side, 0
    return anatomy.blocks[-1].path, "out", 0


def _append_tokens(count: int) -> Callable[..., Tensor]:
    """Build a hook that appends vectors of 0 to the tokens [B, T, width] that a module returns."""

    def append(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return nn.functional.pad(output, (0, 0, 0, count))

    return append


def _stop_pass(*args: Any) -> None:
    raise PassStopped


def _number_places(*indices: Tensor) -> Tensor:
    """Return [K]: one number for each tuple of indices."""
    places = indices[0]
    for index in indices[1:]:
        places = places * (1 + int(index.max())) + index if len(index) else places
    return places


@dataclass
class FullPassResult:
    """Result of a pass."""

    logits: Tensor | None
    """[B, T, vocab], or [B, n, vocab] with `logits_at`; None if the run stopped early."""
    largest: Tensor | None = None
    """[B, n], with `tokens` and `ends`: magnitude of the largest logit of the whole vocabulary."""
    reads: dict[SiteRead, Tensor] = field(default_factory=dict[SiteRead, Tensor])
    """[B, T, units, width] each, copies (inference tensors, except with `gradients`) of the values
    after all writes at the same site."""


def run_full(
    model: LoadedModel,
    batch: Batch,
    *,
    stop: int | None = None,
    writes: Sequence[SiteWrite] = (),
    reads: Sequence[SiteRead] = (),
    logits_at: Tensor | None = None,
    tokens: Tensor | None = None,
    ends: bool = False,
    edges: Sequence[EdgeWrite] = (),
    circuits: Sequence[CircuitWrite | CircuitRead] = (),
    gradients: bool = False,
    recompute: bool = False,
    backward: BackwardRules | RuledPass | None = None,
) -> FullPassResult:
    """Run the whole model on padded rows, with writes and reads.

    Args:
        model: The model, which is unchanged afterwards.
        stop: Number of blocks to run; `n_layers + 1` adds the final norm. None also gives logits.
        writes, reads: Writes at sites, and sites to read.
        logits_at: [B, n] long, positions in the unpadded prompt of requested logits; default: all.
        tokens: [K] long, the only tokens whose logits are requested; `vocab` is then K.
        ends: With `tokens`, compute `largest`, which needs the logits of all tokens.
        edges: Changed attention edges.
        circuits: Edges between components that carry other values or are read; only without `stop`.
        gradients: Whether autograd tracks the effect of written values that require a gradient.
        recompute: Whether backward passes compute activations again if possible, to save memory.
        backward: Changes of the derivatives, or the pass with them that this pass is part of.

    Raises:
        ValueError: A site or position doesn't exist, or is that of logits, with `logits_at`.
        WriteMismatch: A write didn't happen exactly once.
        ReadMismatch: A read didn't happen.
        RuleNotApplied: A function of the model has no rule in `backward`.
    """
    ruled, changes = _find_rules(model, backward)
    derivatives = Derivatives(gradients=gradients, recompute=recompute, backward=ruled or changes)
    text = split_vision(model, batch, writes, reads, edges, circuits, stop, derivatives)
    given = text.writes, text.reads, stop, text.edges, text.circuits
    work = SiteHooks(model, text.batch, *given, changes=changes)
    if logits_at is not None:
        work.keep_logits(logits_at)
    narrow, batch = narrow_unembedding(model, tokens, ends=ends), work.skip_encoder(text.batch)
    mode = _enable_gradients(model) if gradients else torch.inference_mode()
    rules = nullcontext() if ruled is None else ruled.opened()
    blocks = _recompute(work) if recompute and ruled is None else nullcontext()
    logits = largest = None
    attention = open_attention(model, work, ruled)
    with mode, work.installed(), attention, narrow, rules, blocks, suppress(PassStopped):
        logits = call_with_batch(model, batch)
    if logits is not None:
        if ruled is not None:
            ruled.check(logits)
        logits = select_token_logits(model, work.output(logits), tokens, ends=ends)
        if tokens is not None and ends:
            logits, largest = logits[..., :-2], logits[..., -2:].abs().amax(-1)
    work.check()
    return FullPassResult(logits, largest, work.found | text.found)


def _find_rules(
    model: LoadedModel, backward: BackwardRules | RuledPass | None
) -> tuple[RuledPass | None, BackwardRules | None]:
    """Return the changes of functions, if there are any, and all changes of derivatives."""
    if isinstance(backward, RuledPass):
        return backward, backward.rules
    of_functions = backward is not None and backward.of_functions
    return RuledPass(model, backward) if backward and of_functions else None, backward


def _recompute(work: SiteHooks) -> AbstractContextManager[None]:
    """Let backward passes compute the activations of blocks again, if the hooks allow that."""
    if not work.repeats_blocks:
        return nullcontext()

    @contextmanager
    def run_again() -> Generator[None]:
        again = work.again()
        with _enable_gradients(work.model), again.installed(), open_attention(work.model, again):
            yield

    blocks = list(work.model.anatomy.blocks[: work.stop])
    if isinstance(work.frame, Batch) and "vision" in work.frame.frames:
        blocks += work.model.stack("vision").anatomy.blocks
    modules = [work.model.module.get_submodule(block.path) for block in blocks]
    return recompute_blocks(modules, run_again)


@contextmanager
def _enable_gradients(model: LoadedModel) -> Generator[None]:
    """Track gradients of written values only, not of weights.

    Values that depend on weights alone, such as position biases cached by a library, aren't
    tracked.
    """
    wanted = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad(), disable_checkpoints():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()


@contextmanager
def open_rules(model: LoadedModel, backward: BackwardRules | None) -> Generator[None]:
    """Apply changed derivatives to modules that are called outside of passes, such as norms."""
    rules = nullcontext() if backward is None else RuledPass(model, backward).opened()
    with _enable_gradients(model), rules:
        yield


@contextmanager
def open_attention(
    model: LoadedModel, work: SiteHooks, ruled: RuledPass | None = None
) -> Generator[None]:
    """Compute attention here in layers with reads or writes within attention; with changed
    derivatives of attention, also that of a resampler of patches, which is in no layer."""
    if not work.within:
        yield
        return

    is_read, opened = model.shape.resampler_attends, work.opened_tiles

    def attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        layer = work.layer(call.place, call.query)
        in_resampler = ruled is not None and ruled.rules.in_attention and is_read
        if layer is None and not in_resampler:
            return call.unchanged()
        given = call.query, call.key, call.value
        with nullcontext(given) if ruled is None else ruled.attention(*given) as given:
            if layer is None or call.across:
                return attend_across(*given, call.mask, layer, **call.arguments), None
            if call.place in opened:
                ends = windows.get(call.place)
                tiles = attend_across_tiles(*given, call.mask, layer, ends=ends, **call.arguments)
                return tiles, None
            attend = attend_tiles if work.is_patched(call.place[0]) else attend_full
            return attend(*given, call.mask, layer, **call.arguments), None

    exchanged = replace_block_attention(model, attention, masked=True)
    with join_windows(model, opened) as windows, exchanged:
        yield
