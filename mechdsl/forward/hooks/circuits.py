"""Edges of a circuit in a full pass: each receiver reads its own sum of its senders.

A receiver's input is the stream of this pass plus mask * (fill - value) summed over the senders
before it. Queries, keys and values of each head read separately, through the norm of the block and
the head's columns of the projection; the MLP and the end of the model read through their norms.

References:
    Conmy et al. 2023 (arXiv 2304.14997), section 3: edges between nodes of the residual stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.batch import (
    CircuitRead,
    CircuitWrite,
    EdgeTap,
    SenderFill,
    SiteRead,
    TokenFrame,
    WriteMismatch,
    indices_to_device,
    number_senders,
    to_device,
)
from mechdsl.forward.hooks.gradients import compute_gradients
from mechdsl.forward.hooks.hook_points import (
    HookStep,
    apply_scale,
    get_head_weights,
    get_linear_map,
    get_scale,
    put_layout,
    view_layout,
)
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.anatomy import HookSide, TensorLayout
from mechdsl.models.block import linear_sizes, unwrap_adapter
from mechdsl.models.shape import unit_count
from mechdsl.vocab.sites import SITES, write_order

ATTENTION_INPUTS = ("q", "k", "v")
"""Inputs of a head, as receivers of edges."""

_SAME_INPUT = 1e-2
"""Largest difference between the input of a projection and the norm of the stream, relative to the
largest number."""


def explain_no_circuits(model: LoadedModel) -> str:
    """Return why edges between the components of a model can't be separated; empty if they can."""
    if "cross" in model.others:
        return "its decoder also attends to an encoder"
    if model.anatomy.unembedding is None or "logits" not in model.shape.sites:
        return "its output isn't computed from the residual stream by an unembedding"
    for number, block in enumerate(model.anatomy.blocks):
        where = f"in block {number}"
        if not block.adds_up or block.behind != 1 or block.fed or block.middle or block.end:
            return f"{where}, the stream isn't the sum of the outputs of heads and MLPs"
        if block.attn_behind is not None or block.output is None:
            return f"{where}, a norm or scale follows attention, so that its heads don't add up"
        if not block.reads_stream:
            return f"{where}, attention doesn't read the stream through a norm"
        if not all(model.shape.has(site, number) for site in (*ATTENTION_INPUTS, "z", "resid_pre")):
            return f"block {number} has no heads with queries, keys and values"
        for site in ATTENTION_INPUTS:
            if _find_projection(model, site, number) is None:
                return f"{where}, `{site}` isn't a linear map of the norm of the stream"
    return ""


def _find_projection(model: LoadedModel, site: str, layer: int) -> tuple[str, TensorLayout] | None:
    """Return the linear map from the norm of the stream to `q`, `k` or `v`, and the layout of its
    output; None if there is no such map."""
    block, tap = model.anatomy.blocks[layer], model.tap(site, layer)
    if tap.path in block.projections:
        path, layout = tap.path, tap.layout
    elif len(block.projections) == len(ATTENTION_INPUTS):  # a norm of queries or keys follows
        path = block.projections[ATTENTION_INPUTS.index(site)]
        layout = TensorLayout.heads(unit_count(model.shape, site, layer), tap.layout.width)
    else:
        return None
    module = model.module.get_submodule(path)
    sizes = linear_sizes(unwrap_adapter(module))
    if sizes is None or sizes[0] != model.shape.d_model or sizes[1] < layout.end:
        return None
    if tap.path not in block.projections and sizes[1] != layout.end:
        return None
    return path, layout


@dataclass(frozen=True)
class CircuitStep:
    """A step at the input or output of a module."""

    spot: tuple[str, HookSide, int]
    order: tuple[int, int]
    step: HookStep
    by_heads: bool = False
    """Whether the tensor isn't [B, T, features]."""


def open_circuit(
    model: LoadedModel, frame: TokenFrame, circuit: CircuitWrite | CircuitRead
) -> CircuitHooks:
    """Return the steps of a circuit."""
    if isinstance(circuit, CircuitRead):
        return _ReadHooks(model, frame, circuit)
    return _WriteHooks(model, frame, circuit)


class CircuitHooks(ABC):
    """The steps of one circuit, in the order in which a pass reaches them."""

    def __init__(
        self, model: LoadedModel, frame: TokenFrame, circuit: CircuitWrite | CircuitRead
    ) -> None:
        self.model = model
        self._fills = circuit.fills
        self._senders = number_senders(circuit.fills)
        self._receivers = circuit.receivers
        found = frame.locate("resid_pre", 0, "", circuit.rows, circuit.positions)
        self._rows, self._columns = indices_to_device(found[:2], model.device)
        self._stream: Tensor | None = None
        """[K, d_model] that enters the current block."""
        self._due = self._done = 0

    def check(self, *, stopped: bool) -> None:
        """Check that each step ran once. Raises WriteMismatch."""
        if not stopped and self._done != self._due:
            raise WriteMismatch(f"{self._due} steps of a circuit were due, {self._done} ran")

    def steps(self) -> Iterator[CircuitStep]:
        """Yield a step for each sender, each stream and each receiver."""
        for fill in self._fills:
            yield self._sender(fill)
        receivers: dict[SiteRead, list[int]] = defaultdict(list)
        for row, (where, _) in enumerate(self._receivers):
            receivers[where].append(row)
        blocks = {
            where.layer
            for where in receivers
            if where.layer is not None and self._reads_entrance(where.layer, where.site)
        }
        for layer in sorted(blocks):
            yield self._remember(layer)
        by_path: dict[tuple[int, str], list[tuple[TensorLayout, list[int]]]] = defaultdict(list)
        for where, rows in receivers.items():
            if where.site in ATTENTION_INPUTS:
                assert where.layer is not None
                found = _find_projection(self.model, where.site, where.layer)
                assert found is not None
                by_path[where.layer, found[0]].append((found[1], rows))
            else:
                yield self._whole(where, rows[0])
        for (layer, path), parts in by_path.items():
            yield self._projection(layer, path, parts)

    def _add(
        self,
        spot: tuple[str, HookSide, int],
        order: tuple[int, int],
        step: HookStep,
        *,
        by_heads: bool = False,
    ) -> CircuitStep:
        self._due += 1

        def counted(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            self._done += 1
            return step(value, module, given)

        return CircuitStep(spot, order, counted, by_heads)

    def _at(self, view: Tensor) -> Tensor:
        """Return [K, …] of a [B, T, …] tensor, in at least float32."""
        found = view[self._rows.to(view.device), self._columns.to(view.device)]
        return found.to(torch.promote_types(found.dtype, torch.float32))

    # --- senders ---

    def _sender(self, fill: SenderFill) -> CircuitStep:
        """Compute what the stream would gain if senders had their fills."""
        where = fill.where
        tap = self.model.tap(where.site, where.layer)
        scale = get_scale(self.model.module, tap)
        if where.site == "z":
            scale = get_scale(self.model.module, self.model.tap("attn_out", where.layer))

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            now = self._at(view_layout(self._seen(value), tap.layout))[:, list(fill.units)]
            values = to_device(fill.values, now.device).to(now)
            if where.site == "z":
                weight = get_head_weights(module, tap.layout)[list(fill.units)].to(now)
                gained = apply_scale(torch.einsum("kuh,uhd->ukd", values - now, weight), scale)
            else:
                gained = (values - apply_scale(now, scale)).transpose(0, 1)
            self._remember_change(where, gained)
            return value

        layer, order = write_order(where.site, where.layer)
        by_heads = tap.layout.axes != "flat"
        return self._add(
            (tap.path, tap.side, tap.item), (layer, order + 1), step, by_heads=by_heads
        )

    def _seen(self, value: Tensor) -> Tensor:
        """Return the output of senders as changes are computed from it."""
        return value

    @abstractmethod
    def _remember_change(self, where: SiteRead, gained: Tensor) -> None:
        """Keep [unit, K, d_model]: what the stream would gain with the fills of senders."""

    # --- receivers ---

    def _reads_entrance(self, layer: int, site: str) -> bool:
        """Return whether a receiver reads the stream that enters its block, at a module other than
        its norm."""
        return site in ATTENTION_INPUTS or (site == "mlp_norm" and self._mlp_norm(layer) is None)

    def _mlp_norm(self, layer: int) -> str | None:
        """Return the norm that only the MLP reads."""
        block = self.model.anatomy.blocks[layer]
        return None if block.mlp_norm == block.attn_norm else block.mlp_norm

    def _remember(self, layer: int) -> CircuitStep:
        tap = self.model.tap("resid_pre", layer)

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            self._stream = self._at(value)
            return value

        order = (layer, SITES["resid_pre"].order + 2)
        return self._add((tap.path, tap.side, tap.item), order, step)

    def _normed(self, path: str | None, vectors: Tensor, like: Tensor) -> Tensor:
        """Return vectors after a norm of the model, without its hooks."""
        vectors = vectors.to(like)
        if path is not None:
            vectors = self.model.module.get_submodule(path).forward(vectors)
        return vectors.to(torch.promote_types(like.dtype, torch.float32))

    def _norm_of_stream(self, path: str | None, value: Tensor) -> Tensor:
        """Return [K, d_model]: the stream after a norm, which must be the input of a receiver.

        Args:
            value: [B, T, d_model] the input after the norm.

        Raises:
            WriteMismatch: The input isn't the norm of the stream.
        """
        assert self._stream is not None
        before = self._normed(path, self._stream, value)
        given = self._at(value)
        if (before - given).abs().amax() > _SAME_INPUT * given.abs().amax():
            raise WriteMismatch("a receiver of a circuit doesn't read the norm of the stream")
        return before

    def _projection(
        self, layer: int, path: str, parts: list[tuple[TensorLayout, list[int]]]
    ) -> CircuitStep:
        """Add a step at the queries, keys or values of heads, each of which reads separately."""
        norm = self.model.anatomy.blocks[layer].attn_norm

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            return self._at_projection(norm, parts, value, module, given)

        order = (layer, SITES["q"].order - 1)
        return self._add((path, "out", 0), order, step)

    @abstractmethod
    def _at_projection(
        self,
        norm: str | None,
        parts: list[tuple[TensorLayout, list[int]]],
        value: Tensor,
        module: nn.Module,
        given: Tensor,
    ) -> Tensor:
        """Return the output of a projection.

        Args:
            norm: Path of the norm that the projection reads the stream through.
            parts: Queries, keys or values in the output, with the numbers of their receivers.
            value: [B, T, out]
            given: [B, T, d_model] the input of the projection.
        """

    def _whole(self, where: SiteRead, row: int) -> CircuitStep:
        """Add a step at the input of an MLP or of the end of the model."""
        layer, anatomy = where.layer, self.model.anatomy
        after = layer is not None and self._mlp_norm(layer) is None
        path = anatomy.final_norm if layer is None else self._mlp_norm(layer)
        spot: tuple[str, HookSide, int] = (path or "", "in", 0)
        if path is None:
            tap = self.model.tap("final_norm" if layer is None else "mlp_norm", layer)
            spot = tap.path, tap.side, tap.item
        norm = anatomy.blocks[layer].mlp_norm if after and layer is not None else None

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            return self._at_whole(norm, row, value)

        layer_order, order = write_order("final_norm" if layer is None else "mlp_norm", layer)
        return self._add(spot, (layer_order, order - 1), step)

    @abstractmethod
    def _at_whole(self, norm: str | None, row: int, value: Tensor) -> Tensor:
        """Return the input of an MLP or of the end of the model.

        Args:
            norm: Path of the norm whose output `value` is; None if `value` is the stream.
            row: Number of the receiver.
            value: [B, T, d_model]
        """


class _WriteHooks(CircuitHooks):
    """The steps of a `CircuitWrite`."""

    def __init__(self, model: LoadedModel, frame: TokenFrame, write: CircuitWrite) -> None:
        super().__init__(model, frame, write)
        self._differences: list[tuple[int, Tensor]] = []
        """(column of the mask, [unit, K, d_model]) of the senders so far, if autograd follows."""
        self._changes: Tensor | None = None
        """[sender, K, d_model] otherwise; 0 for senders that haven't run."""
        self._end = 0
        """Number of senders so far."""
        self._mask = to_device(write.mask, model.device)

    def _remember_change(self, where: SiteRead, gained: Tensor) -> None:
        columns = self._senders[where]
        if torch.is_grad_enabled():
            self._differences.append((columns.start, gained))
            return
        if self._changes is None:
            size = self._mask.shape[-1], *gained.shape[1:]
            self._changes = torch.zeros(size, dtype=gained.dtype, device=self.model.device)
        self._changes[columns], self._end = gained, columns.stop

    def _put(self, value: Tensor, vectors: Tensor) -> Tensor:
        """Return [B, T, width] with [K, width] added to it."""
        index = self._rows.to(value.device), self._columns.to(value.device)
        return value.index_put(index, (self._at(value) + vectors.to(value.device)).to(value))

    def _gained(self, rows: list[int]) -> Tensor:
        """Return [receiver, K, d_model]: what each of some receivers reads besides the stream."""
        if self._changes is not None:
            changes = self._changes[: self._end]
            mask = self._mask[..., rows, : self._end].to(changes)
            if mask.dim() == 2:
                return (mask @ changes.flatten(1)).unflatten(1, changes.shape[1:])
            return torch.einsum("kru,ukd->rkd", mask, changes)
        found: Tensor | None = None
        sums = "ru,ukd->rkd" if self._mask.dim() == 2 else "kru,ukd->rkd"
        for column, gained in self._differences:
            mask = self._mask[..., rows, column : column + len(gained)].to(gained)
            part = torch.einsum(sums, mask, gained)
            found = part if found is None else found + part.to(found.device)
        assert found is not None
        return found

    def _moved(self, path: str | None, rows: list[int], value: Tensor) -> Tensor:
        """Return [receiver, K, d_model]: the change of the normed input of each receiver.

        Args:
            value: [B, T, d_model] the unchanged input after the norm.

        Raises:
            WriteMismatch: The input isn't the norm of the stream.
        """
        before = self._norm_of_stream(path, value)
        assert self._stream is not None
        gained = self._gained(rows).to(self._stream.device)
        return self._normed(path, self._stream + gained, value) - before

    def _at_projection(
        self,
        norm: str | None,
        parts: list[tuple[TensorLayout, list[int]]],
        value: Tensor,
        module: nn.Module,
        given: Tensor,
    ) -> Tensor:
        """Change queries, keys or values of heads as if each had its own input."""
        every = [row for _, rows in parts for row in rows]
        moved = self._moved(norm, every, given).split([len(rows) for _, rows in parts])
        weight = get_linear_map(module)
        value = value.clone(memory_format=torch.contiguous_format)
        for (layout, rows), own in zip(parts, moved, strict=True):
            heads = [self._receivers[row][1] for row in rows]
            view = view_layout(value, layout)
            columns = view_layout(weight[None], layout)[0][:, heads].to(own)
            added = torch.einsum("rkd,drh->krh", own, columns)
            units = to_device(torch.tensor(heads), value.device)
            index = (
                self._rows.to(value.device)[:, None],
                self._columns.to(value.device)[:, None],
                units[None],
            )
            view[index] = (view[index].to(added) + added).to(value)
            put_layout(value, layout, view)
        return value

    def _at_whole(self, norm: str | None, row: int, value: Tensor) -> Tensor:
        if norm is not None:
            return self._put(value, self._moved(norm, [row], value)[0])
        return self._put(value, self._gained([row])[0])


class _ReadHooks(CircuitHooks):
    """The steps of a `CircuitRead`: the tensors that the model continues with are copies of those
    that are differentiated by."""

    def __init__(self, model: LoadedModel, frame: TokenFrame, read: CircuitRead) -> None:
        super().__init__(model, frame, read)
        self._read = read
        if read.changes is None:
            size = sum(len(fill.units) for fill in read.fills), len(read.rows), model.shape.d_model
            dtype = torch.promote_types(model.dtype, torch.float32)
            read.changes = torch.empty(size, dtype=dtype, device=model.device)
        else:
            self._fills = ()

    def _seen(self, value: Tensor) -> Tensor:
        return value.detach()

    def _remember_change(self, where: SiteRead, gained: Tensor) -> None:
        assert self._read.changes is not None
        self._read.changes[self._senders[where]] = gained

    def _at_projection(
        self,
        norm: str | None,
        parts: list[tuple[TensorLayout, list[int]]],
        value: Tensor,
        module: nn.Module,
        given: Tensor,
    ) -> Tensor:
        """Differentiate by queries, keys or values; the norm of the stream has one input for each
        receiver."""
        self._norm_of_stream(norm, given.detach())
        assert self._stream is not None
        stream, weight = self._stream.detach(), get_linear_map(module).detach()

        def to_stream(gradient: Tensor) -> Tensor:
            found: list[Tensor] = []
            for layout, rows in parts:
                heads = [self._receivers[row][1] for row in rows]
                own = self._at(view_layout(gradient, layout))[:, heads]
                columns = view_layout(weight[None], layout)[0][:, heads].to(own)
                found.append(torch.einsum("krh,drh->rkd", own, columns))
            return self._before_norm(norm, stream, torch.cat(found), given)

        rows = [row for _, rows in parts for row in rows]
        self._read.taps.append(EdgeTap(value, rows, to_stream))
        return value.clone()

    def _at_whole(self, norm: str | None, row: int, value: Tensor) -> Tensor:
        if norm is not None:
            self._norm_of_stream(norm, value.detach())
        stream = None if self._stream is None else self._stream.detach()

        def to_stream(gradient: Tensor) -> Tensor:
            own = self._at(gradient)[None]
            if norm is None:
                return own
            assert stream is not None
            return self._before_norm(norm, stream, own, gradient)

        self._read.taps.append(EdgeTap(value, [row], to_stream))
        return value.clone()

    def _before_norm(
        self, path: str | None, stream: Tensor, gradient: Tensor, like: Tensor
    ) -> Tensor:
        """Return [receiver, K, d_model]: gradients by the stream of gradients by its norm.

        Args:
            stream: [K, d_model]
            gradient: [receiver, K, d_model]
        """
        if path is None:
            return gradient
        with torch.enable_grad():
            inputs = stream.expand_as(gradient).clone().requires_grad_()
            normed = self._normed(path, inputs, like)
            (found,) = torch.autograd.grad(normed, inputs, gradient.to(normed))
        return found


def compute_edge_scores(total: Tensor, read: CircuitRead, senders: slice) -> Tensor:
    """Return [receiver, sender]: the derivative of a value by the shares of edges, at shares of 0.

    All edges into the receivers of a module are one matrix product.

    Args:
        total: The value, from a pass with `read`.
        read: What the pass read; its `taps` are removed.
        senders: Those whose edges are wanted; others get 0.

    Raises:
        AutogradFailed: The model can't be differentiated.
    """
    changes = read.changes
    assert changes is not None
    gradients = compute_gradients(total, [tap.tensor for tap in read.taps], keep=False)
    found = total.new_zeros((len(read.receivers), len(changes)), dtype=torch.float64)
    for tap, gradient in zip(read.taps, gradients, strict=True):
        receiver, _ = read.receivers[tap.receivers[0]]
        before = [len(fill.units) for fill in read.fills if _is_before(fill.where, receiver)]
        due = range(sum(before))[senders]
        if due:
            vectors = tap.to_stream(gradient).to(changes).flatten(1)
            part = vectors @ changes[due.start : due.stop].flatten(1).T
            found[tap.receivers, due.start : due.stop] += part.to(found)
    read.taps.clear()
    return found


def _is_before(sender: SiteRead, receiver: SiteRead) -> bool:
    """Whether a receiver may read the output of a sender."""
    if receiver.layer is None or sender.site == "resid_pre":
        return True
    assert sender.layer is not None
    return sender.layer < receiver.layer or (
        sender.layer == receiver.layer and receiver.site == "mlp_norm" and sender.site == "z"
    )
