"""Edges of a circuit in a full pass: each receiver reads the sum of its senders.

A receiver's input is the stream of this pass plus mask * (fill - value) summed over the senders
before it. If all fills are 0 and most edges of a receiver are ablated, its input is the sum of the
other senders instead, because a difference of equal numbers is noise, which a norm would amplify.
Queries, keys and values of each head read separately, through the norm of the block and
the head's columns of the projection; the MLP and the end of the model read through their norms.

In an encoder-decoder, the streams of the encoder and of the decoder have separate circuits. Queries
of the attention to the encoder read the decoder's stream, through the norm of this sublayer; its
keys and values read the encoder's stream after the last block, through the encoder's final norm.

The vision encoder of a vision-language model has a separate circuit, whose end is the projector:
it reads the encoder's stream after each block that the language model reads. Each time, its input
is the stream with the shares of the senders so far; the next block continues with the stream.

If norms follow the sums (BERT), the input of a receiver is the stream recomputed from the outputs
of this pass: after each sublayer, the norm of the sum of the stream, the sublayer's output and
mask * (fill - value) of its senders. If norms follow the outputs of attention (Gemma 2), the
recomputed stream gains, after each attention, the norm of the sum of its heads, each with its value
or its fill. If a norm also follows an MLP whose neurons are nodes, so does the sum of its neurons.

If features of the output of an attention are nodes, each of them, and the rest of this output,
reads its own sum of the heads, each with its value or its fill, through the norm of the output, if
there is one, and the encoder. Other receivers read these nodes instead of the heads.

References:
    Conmy et al. 2023 (arXiv 2304.14997), section 3: edges between nodes of the residual stream.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any, cast

import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.backward_rules import compute_gradients
from mechdsl.forward.hooks.batch import (
    Batch,
    CircuitRead,
    CircuitWrite,
    EdgeTap,
    SenderFill,
    SiteRead,
    SiteWrite,
    TokenFrame,
    WriteMismatch,
    indices_to_device,
    number_senders,
    to_device,
)
from mechdsl.forward.hooks.coordinates import OTHERS
from mechdsl.forward.hooks.hook_points import (
    HookStep,
    apply_scale,
    get_head_weights,
    get_linear_map,
    get_scale,
    put_layout,
    undo_scale,
    view_layout,
)
from mechdsl.forward.hooks.model import LoadedModel, find_image_readers
from mechdsl.forward.hooks.module_exchange import load_weights, replace_forward, suspend_hooks
from mechdsl.models.block import linear_sizes, unwrap_adapter
from mechdsl.models.shape import BlockAnatomy, HookPoint, HookSide, TensorLayout, unit_count
from mechdsl.vocab.sites import SITES, write_order

ATTENTION_INPUTS = ("q", "k", "v")
"""Inputs of a head, as receivers of edges."""

MLP_INPUTS = ("mlp_norm", "mlp_hidden")
"""Receivers in an MLP: all of it, and its neurons."""

_PROJECTED = {"z": "attn_out", "mlp_hidden": "mlp_out"}
"""Sites of senders that a linear map adds to the stream, and the site of its output."""

_SHARED = 0.5
"""Share of the heads of a projection that read its input; below it, the heads are computed instead
of the projection."""

_EARLIER = 2
"""Steps at receivers precede those that read a site before its writes, whose order is one less than
that of the site."""

_FIRST = (-2, 0)
"""Order of the steps that precede all others at a module."""

_SUMMED = 0.5
"""Share of a receiver's edges that are ablated with 0; from there on, its input is the sum of the
other senders."""

_AHEAD = 2
"""Number of vectors ahead of the changes of senders: the stream and the sum of biases."""

_IN_THE_STREAM = ("resid_pre", "attn_out", "mixer_out", "resid_mid", "resid_post")
"""Sites whose writes change the stream, but no sender."""

_ACTIVATIONS = ("activation_fn", "intermediate_act_fn")
"""Attributes of modules with the function between two linear maps of an MLP."""

_NEURON_NUMBERS = 1 << 23
"""Number of activations of neurons that are differentiated together."""

_REPLACED = -1
"""Number of the input of a projection whose output isn't used."""

_SAME_INPUT = 1e-2
"""Largest difference between the input of a projection and the norm of the stream, relative to the
largest number."""


def explain_no_circuits(model: LoadedModel, stack: str = "") -> str:
    """Return why edges between the components of a model can't be separated; empty if they can.

    Args:
        stack: `vision` for its vision encoder; empty for all other stacks.
    """
    if stack:
        after = has_normed_sums(model, stack)
        for number in range(model.stack(stack).shape.read_layers):
            reason = _explain_joined_block(model, stack, number, after=after)
            if reason:
                return f"in block {number} of the vision encoder, {reason}"
        return ""
    anatomy, shape = model.anatomy, model.shape
    headed = shape.takes == "image" or (
        shape.task != "tokens" and (has_normed_sums(model) or anatomy.final_norm is not None)
    )
    if "logits" not in shape.sites or (anatomy.unembedding is None and not headed):
        return "its output isn't computed from the residual stream by an unembedding"
    stacks = ("encoder", "") if "encoder" in model.others and "cross" in model.others else ("",)
    for stack in stacks:
        after = has_normed_sums(model, stack)
        for number in range(model.stack(stack).shape.n_layers):
            reason = _explain_joined_block(model, stack, number, after=after)
            if not reason and len(stacks) == 2 and not stack:
                reason = _explain_joined_attention(model, "cross", number)
            if reason:
                where = f"in block {number} of the encoder" if stack else f"in block {number}"
                return f"{where}, {reason}"
    return ""


def _explain_joined_block(model: LoadedModel, stack: str, number: int, *, after: bool) -> str:
    """Return why the heads and the MLP of a block can't be nodes; empty if they can.

    Args:
        after: Whether norms follow the sums of the stream.
    """
    block, attends = model.stack(stack).anatomy.blocks[number], _attends_to_image(model, number)
    adds_up = block.adds_up
    if attends:
        adds_up = model.stack("cross").anatomy.blocks[number].adds_up and "mlp_out" in block.taps
    if not adds_up or block.stream_scale != 1 or block.fed:
        return "the stream isn't the sum of the outputs of heads and MLPs"
    if not after and (block.middle or block.end):
        return "the stream isn't the sum of the outputs of heads and MLPs"
    return _explain_joined_attention(model, "cross" if attends else stack, number)


def _attends_to_image(model: LoadedModel, layer: int) -> bool:
    """Return whether a block attends to an image instead of to earlier tokens of its stream."""
    return model.shape.attends_to_image and model.stack("cross").shape.has("q", layer)


def _explain_joined_attention(model: LoadedModel, stack: str, number: int) -> str:
    """Return why the heads of an attention can't be nodes; empty if they can."""
    block_stack = model.stack(stack)
    block = block_stack.anatomy.blocks[number]
    if block.output is None:
        return "attention's output isn't a linear map of its heads"
    if block.attn_output_norm is not None and block_stack.shape.parallel_block:
        return "a norm follows attention, which reads the same stream as the MLP"
    if not block.reads_stream:
        return "attention doesn't read the stream through a norm"
    entrance = () if stack == "cross" else ("resid_pre",)
    if not all(block_stack.shape.has(site, number) for site in (*ATTENTION_INPUTS, "z", *entrance)):
        return "there are no heads with queries, keys and values"
    of_image = stack == "cross" and model.shape.attends_to_image
    for site in ATTENTION_INPUTS[:1] if of_image else ATTENTION_INPUTS:
        where = SiteRead(site, number, stack)
        if _find_projection(model, where) is None:
            stream = "the encoder's stream" if reads_encoder(where) else "the stream"
            spelled = f"{site} {stack}".strip()
            return f"`{spelled}` isn't a linear map of the norm of {stream}"
    return ""


def explain_no_neurons(model: LoadedModel, places: Iterable[tuple[str, int | None]]) -> str:
    """Return why neurons of some layers can't be nodes of a circuit; empty if they can.

    Args:
        places: Sites of neurons (`mlp_hidden encoder`), each with a layer.
    """
    for site, layer in places:
        assert layer is not None
        stack = SITES[site].stack
        where, block = f"in block {layer}", model.stack(stack).anatomy.blocks[layer]
        where += " of the encoder" if stack else ""
        if not stack and _attends_to_image(model, layer):
            return f"{where}, a gate follows the MLP, whose neurons can't be nodes yet"
        if block.mlp_output_norm is not None and not find_normed_sublayers(model, stack):
            return f"{where}, a norm follows the MLP, but not attention"
        if block.down is None or not {"mlp_norm", "mlp_hidden", "mlp_out"} <= block.taps.keys():
            return f"{where}, the MLP isn't the sum of the outputs of its neurons"
        if _find_activation(model, block) is not None:
            continue
        if len(block.mlp) != 1 or not block.down.startswith(f"{block.mlp[0]}."):
            return f"{where}, the neurons aren't computed inside one module"
        if not _reads_alone(model.module.get_submodule(block.mlp[0])):
            return f"{where}, the MLP isn't a function of the stream alone"
    return ""


def _find_activation(model: LoadedModel, block: BlockAnatomy) -> Callable[[Tensor], Tensor] | None:
    """Return the function between the two linear maps of an MLP that isn't a module (BART, BERT);
    None for other MLPs."""
    if len(block.mlp) != 2 or block.down != block.mlp[1]:
        return None
    up, down = (linear_sizes(model.module.get_submodule(path)) for path in block.mlp)
    if up is None or down is None or up != down[::-1]:
        return None
    parent = model.module.get_submodule(block.mlp[0].rpartition(".")[0])
    named = (getattr(parent, name, None) for name in _ACTIVATIONS)
    activation: Any = next(filter(callable, named), None)
    return cast("Callable[[Tensor], Tensor] | None", activation)


def _reads_alone(mlp: nn.Module) -> bool:
    """Return whether a module needs no other input than one tensor."""
    kind: Any = type(mlp)
    given = list(inspect.signature(kind.forward).parameters.values())[2:]
    rest = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return all(
        parameter.default is not parameter.empty or parameter.kind in rest for parameter in given
    )


def is_plain_mlp(model: LoadedModel, layer: int | None, *, normed: bool = False) -> bool:
    """Return whether the MLP is a module from a token's vector to what is added to the stream.

    Args:
        normed: Whether a norm may follow the module.
    """
    assert layer is not None
    block = model.anatomy.blocks[layer]
    tap = block.taps["mlp_out"]
    is_output = (tap.side, tap.item, tap.layout.axes) == ("out", 0, "flat")
    if "router" in block.taps or not is_output or len(block.mlp) != 1:
        return False
    return tap.path == block.mlp[0] or (normed and tap.path == block.mlp_output_norm)


def explain_no_features(model: LoadedModel, outputs: Iterable[tuple[str, int | None]]) -> str:
    """Return why features of some outputs can't be nodes of a circuit; empty if they can.

    Args:
        outputs: `mlp_out` or `attn_out`, each with a layer.
    """
    for site, layer in outputs:
        assert layer is not None
        where, block = f"in block {layer}", model.anatomy.blocks[layer]
        if site == "attn_out":
            tap = block.taps.get(site)
            if tap is None or (tap.side, tap.layout.axes) != ("out", "flat"):
                return f"{where}, the output of attention isn't one tensor that a module returns"
            continue
        if _attends_to_image(model, layer):
            return f"{where}, a gate follows the MLP, whose features can't be nodes yet"
        if not {"mlp_norm", "mlp_out"} <= block.taps.keys() or not is_plain_mlp(model, layer):
            return f"{where}, the MLP isn't one module whose output is added to the stream"
        if not _reads_alone(model.module.get_submodule(block.mlp[0])):
            return f"{where}, the MLP isn't a function of the stream alone"
    return ""


@dataclass(frozen=True)
class Attention:
    """The attention of a block, whose queries, keys or values read one stream."""

    stack: str
    """Empty for that of the main stack to itself."""
    layer: int

    @staticmethod
    def of(where: SiteRead) -> Attention:
        """Return the attention that a site belongs to."""
        assert where.layer is not None
        return Attention(where.stack, where.layer)


@dataclass(frozen=True)
class Sublayer:
    """A sublayer of a stack with norms after outputs or sums."""

    senders: SiteRead
    """The components whose outputs the sublayer adds up."""
    output: HookPoint
    """Their sum."""
    output_norm: str | None = None
    """Path of the norm of their sum, before it is added to the stream."""
    sum_norm: str | None = None
    """Path of the norm after the sum with the stream, whose output is the stream from there on."""


def find_normed_sublayers(model: LoadedModel, stack: str = "") -> tuple[Sublayer, ...]:
    """Return the sublayers of a stack in forward order if norms follow their sums with the stream,
    or the outputs of attention; empty otherwise."""
    sums, outputs = list[Sublayer](), list[Sublayer]()
    for layer, block in enumerate(model.stack(stack).anatomy.blocks):
        attentions = [(stack, block)]
        if not stack and "cross" in model.others:
            attentions.append(("cross", model.stack("cross").anatomy.blocks[layer]))
        for name, of in attentions:
            where, added = SiteRead("z", layer, name), of.taps.get("attn_out")
            if added is not None and of.middle is not None:
                sums.append(Sublayer(where, added, sum_norm=of.middle))
            if of.output is not None and of.attn_output_norm is not None:
                width = TensorLayout.whole(model.stack(name).shape.d_model)
                joined = HookPoint(of.output, "out", width)
                outputs.append(Sublayer(where, joined, of.attn_output_norm))
            elif added is not None:
                outputs.append(Sublayer(where, added))
        where, added = SiteRead("mlp_out", layer, stack), block.taps.get("mlp_out")
        if added is not None:
            outputs.append(Sublayer(where, added))
            if block.end is not None:
                sums.append(Sublayer(where, added, sum_norm=block.end))
    blocks = model.stack(stack).anatomy.blocks
    in_front = any(block.attn_norm or block.mlp_norm for block in blocks)
    if len(sums) == len(outputs) and not in_front:
        return tuple(sums)
    return tuple(outputs) if any(output.output_norm for output in outputs) else ()


def has_normed_sums(model: LoadedModel, stack: str = "") -> bool:
    """Whether norms follow the sums of the stream and the outputs of sublayers."""
    return any(sublayer.sum_norm for sublayer in find_normed_sublayers(model, stack))


def _find_projection(model: LoadedModel, where: SiteRead) -> tuple[str, TensorLayout] | None:
    """Return the linear map from the norm of the stream to `q`, `k` or `v`, and the layout of its
    output; None if there is no such map."""
    block_stack, layer = model.stack(where.stack), where.layer
    assert layer is not None
    block, tap = block_stack.anatomy.blocks[layer], model.tap(where.site, layer, where.stack)
    if tap.path in block.projections:
        path, layout = tap.path, tap.layout
    elif len(block.projections) == len(ATTENTION_INPUTS):  # a norm of queries or keys follows
        path = block.projections[ATTENTION_INPUTS.index(where.site)]
        layout = TensorLayout.heads(
            unit_count(block_stack.shape, where.site, layer), tap.layout.width
        )
    else:
        return None
    module = model.module.get_submodule(path)
    read = model.stack("encoder" if reads_encoder(where) else where.stack)
    sizes = linear_sizes(unwrap_adapter(module))
    if sizes is None or sizes[0] != read.shape.d_model or sizes[1] < layout.end:
        return None
    if tap.path not in block.projections and sizes[1] != layout.end:
        return None
    return path, layout


def reads_encoder(where: SiteRead) -> bool:
    """Whether a receiver reads the stream of an encoder."""
    return where.stack == "encoder" or (where.stack == "cross" and where.site in ("k", "v"))


def _list_projections(
    model: LoadedModel, attention: Attention, stack: str
) -> dict[str, dict[str, TensorLayout]]:
    """Return the linear maps to queries, keys and values of an attention that read one stream, and
    the layouts of these in their outputs.

    Args:
        stack: The stack of the stream.
    """
    projections: dict[str, dict[str, TensorLayout]] = {}
    for site in ATTENTION_INPUTS:
        where = SiteRead(site, attention.layer, attention.stack)
        if reads_encoder(where) != (stack == "encoder"):
            continue
        projection = _find_projection(model, where)
        if projection is not None:
            path, layout = projection
            projections.setdefault(path, {})[site] = layout
    return projections


def _is_made_of(model: LoadedModel, path: str, layouts: Mapping[str, TensorLayout]) -> bool:
    """Return whether a linear map has no other outputs than queries, keys and values."""
    sizes = linear_sizes(unwrap_adapter(model.module.get_submodule(path)))
    return sizes is not None and sizes[1] == sum(
        layout.units * layout.width for layout in layouts.values()
    )


@torch.no_grad()
def _compute_bias(module: nn.Module, nothing: Tensor) -> Tensor:
    """Return the output of a linear map for zeros.

    Args:
        nothing: […, in] zeros.
    """
    # The class's own forward, because the instance's may leave out tokens.
    forward: Any = type(module).forward
    with load_weights(unwrap_adapter(module)):
        return forward(module, nothing)


@dataclass(frozen=True, eq=False)
class SkippedTokens:
    """Tokens at which a module isn't computed."""

    rows: Tensor
    columns: Tensor
    """[K] each, indices into its input."""
    vectors: Tensor | None
    """[K, out] its output there; None if nothing depends on it."""


@contextmanager
def skip_modules(
    model: LoadedModel, circuits: Sequence[CircuitHooks], leading: int
) -> Generator[None]:
    """Compute modules only at the tokens that circuits need, while the context is open.

    Args:
        leading: Number of rows of a pass, as in `TokenFrame`.
    """
    by_path: dict[str, list[SkippedTokens]] = defaultdict(list)
    for circuit in circuits:
        for path, skipped in circuit.skipped():
            by_path[path].append(skipped)
    with ExitStack() as stack:
        for path, parts in by_path.items():
            module = model.module.get_submodule(path)
            stack.enter_context(replace_forward(module, _PartialForward(module, parts, leading)))
        yield


class _PartialForward:
    """The forward of a module [B, T, in] → [B, T, out] that skips some tokens. Rows and tokens may
    be one dimension of its input, and tiles another one."""

    def __init__(self, module: nn.Module, parts: Sequence[SkippedTokens], leading: int) -> None:
        """Prepare the forward; leading: B."""
        self.forward, self.parts, self.leading = module.forward, parts, leading
        sizes = linear_sizes(module)
        self.width = None if sizes is None else sizes[1]

    def __call__(self, hidden: Tensor) -> Tensor:
        given = hidden.shape[:-1]
        hidden = hidden.reshape(self.leading, -1, hidden.shape[-1])
        due = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        for part in self.parts:
            due[part.rows.to(due.device), part.columns.to(due.device)] = False
        # Under autocast, the output may have another dtype than the input.
        computed = self.forward(hidden[due][None])[0] if bool(due.any()) else None
        like = hidden if computed is None else computed
        sums = like.new_zeros(*hidden.shape[:2], self.width or hidden.shape[2])
        if computed is not None:
            sums[due] = computed
        for part in self.parts:
            if part.vectors is not None:
                index = part.rows.to(due.device), part.columns.to(due.device)
                sums[index] = part.vectors.to(sums)
        return sums.view(*given, -1)


@dataclass(frozen=True)
class CircuitStep:
    """A step at the input or output of a module."""

    spot: tuple[str, HookSide, int]
    order: tuple[int, int]
    step: HookStep
    by_heads: bool = False
    """Whether the tensor isn't [B, T, features]."""


@dataclass(frozen=True, eq=False)
class DistinctInputs:
    """The distinct inputs of some receivers; number 0 is the stream without any change."""

    mask: Tensor
    """[input, sender] or [K, input, sender], as in `CircuitWrite`."""
    of_receiver: dict[int, int]


def number_inputs(mask: Tensor, receivers: Sequence[int]) -> DistinctInputs:
    """Number the inputs of receivers: those with equal masks have one number.

    Args:
        mask: As in `CircuitWrite`; if tokens differ, every receiver has a separate input.
        receivers: Rows of the mask.
    """
    nothing = torch.zeros_like(mask[..., :1, :])
    if mask.dim() == 3 or mask.requires_grad:
        chosen = torch.cat([nothing, mask[..., list(receivers), :]], dim=-2)
        return DistinctInputs(chosen, {row: n for n, row in enumerate(receivers, start=1)})
    tensor = torch.cat([nothing, mask[list(receivers)]])
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    of: list[int] = []
    for place, row in enumerate(tensor.cpu().numpy()):
        number = numbers.setdefault(row.tobytes(), len(numbers))
        first += [place] * (number == len(first))
        of.append(number)
    return DistinctInputs(tensor[first], dict(zip(receivers, of[1:], strict=True)))


def _take(tensor: Tensor, index: Sequence[int], dim: int = 0) -> Tensor:
    """Select along a dimension; a view if the numbers follow one another."""
    first, count = index[0], len(index)
    if list(index) == list(range(first, first + count)):
        return tensor.narrow(dim, first, count)
    return tensor.index_select(dim, to_device(torch.tensor(index), tensor.device))


def _sum_units(values: Tensor, weight: Tensor, count: int) -> Tensor:
    """Return [unit, K, d_model]: what heads or neurons add to the stream, the first ones each, and
    the others as one unit.

    Args:
        values: [K, unit, width]
        weight: [unit, width, d_model]
        count: Number of single units.
    """
    values = values.transpose(0, 1)
    units = torch.bmm(values[:count], weight[:count])
    if len(values) == count:
        return units
    joined = values[count:, :, 0].T @ weight[count:, 0]
    return torch.cat([units, joined[None]])


def _sum_shares(shares: Tensor, vectors: Tensor) -> Tensor:
    """Return [receiver, K, d_model]: the shares of senders' vectors, added up.

    It is a matrix product also for one sender, because changed derivatives of a model's products of
    activations don't apply to it.

    Args:
        shares: [receiver, sender] or [K, receiver, sender]
        vectors: [sender, K, d_model]
    """
    return torch.matmul(shares.to(vectors), vectors.transpose(0, 1)).transpose(0, 1)


def _by_input(numbers: Tensor) -> Tensor:
    """Return [input, K or 1, 1] of [input, 1] or [K, input, 1]."""
    return numbers[:, None] if numbers.dim() == 2 else numbers.movedim(1, 0)


def _find_output(senders: SiteRead) -> SiteRead:
    """Return the site of what a sublayer adds to the stream."""
    site = "mlp_out" if senders.site in ("mlp_out", "mlp_hidden") else "attn_out"
    return replace(senders, site=site)


def _select_units(vectors: Tensor, units: Sequence[Sequence[int]]) -> Tensor:
    """Return [selection, K, unit, width]: [K, unit, width] with 0 for all but some units."""
    found = vectors.new_zeros(len(units), *vectors.shape)
    for tensor, selected in zip(found, units, strict=True):
        there = to_device(torch.tensor(selected), tensor.device)
        tensor[:, there] = vectors[:, there]
    return found


def open_circuit(
    model: LoadedModel,
    frame: TokenFrame,
    circuit: CircuitWrite | CircuitRead,
    writes: Sequence[SiteWrite] = (),
) -> CircuitHooks:
    """Return the steps of a circuit; writes: those of the pass."""
    if isinstance(circuit, CircuitRead):
        return _ReadHooks(model, frame, circuit)
    changed = (write.rows for write in writes if write.site in _IN_THE_STREAM)
    adds_up = not any(bool(torch.isin(rows, circuit.rows).any()) for rows in changed)
    return _WriteHooks(model, frame, circuit, adds_up=adds_up)


def _find_image_tokens(
    model: LoadedModel, frame: TokenFrame, circuit: CircuitWrite | CircuitRead
) -> Tensor | None:
    """Return [K]: 1 for tokens that attend to an image, 0 for others; None if no block does."""
    if not model.shape.attends_to_image:
        return None
    assert isinstance(frame, Batch)
    index = circuit.rows, frame.columns(circuit.rows, circuit.positions)
    rows, columns = indices_to_device(index, frame.ids.device)
    return find_image_readers(model, frame.ids)[rows, columns].to(model.dtype)


class CircuitHooks(ABC):
    """The steps of one circuit, in the order in which a pass reaches them."""

    def __init__(
        self, model: LoadedModel, frame: TokenFrame, circuit: CircuitWrite | CircuitRead
    ) -> None:
        self.model = model
        self._fills = circuit.fills
        self._senders = number_senders(circuit.fills)
        self._receivers = circuit.receivers
        self._features = circuit.features
        self._stack = circuit.stack
        block_stack = model.stack(self._stack)
        self._anatomy, self._shape = block_stack.anatomy, block_stack.shape
        place = frame.locate("resid_pre", 0, self._stack, circuit.rows, circuit.positions)
        self._rows, self._columns = indices_to_device(place[:2], model.device)
        self._stream: Tensor | None = None
        """[K, d_model] that enters the current attention."""
        self._joined = {n for site, n in circuit.features if site == "attn_out"}
        """Layers whose heads send to nodes of the output of attention."""
        normed = find_normed_sublayers(model, self._stack)
        self._normed_attention_outputs = {
            sublayer.senders.layer: sublayer
            for sublayer in normed
            if sublayer.output_norm and self._sends_to_nodes(sublayer.senders)
        }
        """By layer, attention whose output is split into nodes after a norm."""
        self._sublayers = tuple(map(self._join_sublayer, normed))
        """Those that receivers' inputs are recomputed from; empty if no norms follow sublayers."""
        self._normed_heads = {
            sublayer.senders: sublayer
            for sublayer in self._sublayers
            if sublayer.output_norm or (sublayer.sum_norm and sublayer.senders.site == "z")
        }
        self._norms_follow_sums = any(sublayer.sum_norm for sublayer in self._sublayers)
        self._last_layer = self._shape.read_layers - 1
        """The last block that the end of the model reads."""
        self._ends_before_norm = self._norms_follow_sums or "final_norm" not in self._anatomy.taps
        """Whether the end of the model is the stream after the last block, because no norm of each
        token follows."""
        self._outputs: list[Tensor] = []
        """[K, d_model]: what entered the first block, then the outputs of sublayers so far; only
        with `_sublayers`."""
        self._like = torch.empty(0)
        """A tensor of the precision and device of the stream, with `_sublayers`."""
        self._due = self._done = 0
        self._sees_image = _find_image_tokens(model, frame, circuit)
        """[K] 1 for tokens that attend to an image, 0 for others; None without images."""

    def _join_sublayer(self, sublayer: Sublayer) -> Sublayer:
        """Return a sublayer with the nodes of the output of attention as senders instead of heads,
        if these are nodes; or with neurons that a norm follows, if they are nodes."""
        where = sublayer.senders
        neurons = replace(where, site="mlp_hidden")
        if where.site == "mlp_out" and where.layer is not None and neurons in self._senders:
            block = self._anatomy.blocks[where.layer]
            if block.mlp_output_norm is None or block.down is None:
                return sublayer
            output = HookPoint(block.down, "out", TensorLayout.whole(self._shape.d_model))
            return Sublayer(neurons, output, block.mlp_output_norm)
        if where.site != "z" or where.stack or where.layer not in self._joined:
            return sublayer
        output = self.model.tap("attn_out", where.layer)
        return Sublayer(SiteRead("attn_out", where.layer), output, sum_norm=sublayer.sum_norm)

    def _sends_to_nodes(self, where: SiteRead) -> bool:
        """Return whether senders are heads whose output only the nodes of attention read."""
        return where.site == "z" and not where.stack and where.layer in self._joined

    @property
    def stack(self) -> str:
        """The stack whose stream its edges are in."""
        return self._stack

    def check(self, *, stopped: bool) -> None:
        """Check that each step ran once. Raises WriteMismatch."""
        if not stopped and self._done != self._due:
            raise WriteMismatch(f"{self._due} steps of a circuit were due, {self._done} ran")

    def steps(self) -> Iterator[CircuitStep]:
        """Yield a step for each sender, each stream and each receiver."""
        split = self._list_split("mlp_out", "mlp_norm")
        for fill in self._fills:
            if (fill.where.site, fill.where.layer) not in self._features:
                yield self._sender(fill)
        if self._sublayers:
            first = SiteRead("resid_pre", 0, self._stack)
            yield self._output(self.model.tap("resid_pre", 0, self._stack), first)
        for sublayer in self._sublayers:
            yield self._output(sublayer.output, _find_output(sublayer.senders))
        receivers: dict[SiteRead, list[int]] = defaultdict(list)
        for row, (where, _) in enumerate(self._receivers):
            receivers[where].append(row)
        for layer in split:
            receivers.setdefault(SiteRead("mlp_norm", layer), [])
        for layer in self._list_split("attn_out", "attn_out"):
            receivers.setdefault(SiteRead("attn_out", layer), [])
        entrances = {
            self._find_entrance(Attention.of(where)): None
            for where in receivers
            if where.layer is not None and self._reads_entrance(where.layer, where.site)
        }
        for entrance in entrances:
            yield self._remember(entrance)
        by_path: dict[tuple[Attention, str], list[tuple[TensorLayout, list[int]]]]
        by_path = defaultdict(list)
        for where, rows in receivers.items():
            if where.site in ATTENTION_INPUTS:
                projection = _find_projection(self.model, where)
                assert projection is not None
                by_path[Attention.of(where), projection[0]].append((projection[1], rows))
            elif where.site == "mlp_hidden":
                yield from self._neurons(where, rows)
            elif where.site == "mlp_norm" and where.layer in split:
                yield from self._split_mlp(where, rows)
            elif where.site == "attn_out":
                yield from self._split_attention(where, rows)
            else:
                yield self._whole(where, rows[0])
            if where.layer is None:
                yield from self._earlier_ends(rows[0])
        for (attention, path), parts in by_path.items():
            yield from self._projection(attention, path, parts)

    def _list_split(self, sends: str, reads: str) -> list[int]:
        """List the layers in which features of an output send or receive.

        Args:
            sends: Site of the output.
            reads: Site of its nodes as receivers.
        """
        layers = {fill.where.layer for fill in self._fills if fill.where.site == sends}
        layers |= {where.layer for where, _ in self._receivers if where.site == reads}
        return [
            layer
            for site, layer in self._features
            if site == sends and layer in layers and layer is not None
        ]

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
        values = view[self._rows.to(view.device), self._columns.to(view.device)]
        return values.to(torch.promote_types(values.dtype, torch.float32))

    # --- senders ---

    def _sender(self, fill: SenderFill) -> CircuitStep:
        """Compute what the stream would gain if senders had their fills."""
        where = fill.where
        tap = self.model.tap(where.site, where.layer, where.stack)
        scale = get_scale(self.model.module, tap)
        if where.site in _PROJECTED:
            output = self.model.tap(_PROJECTED[where.site], where.layer, where.stack)
            if where in self._normed_heads:
                output = self._normed_heads[where].output
            elif self._sends_to_nodes(where) and where.layer in self._normed_attention_outputs:
                output = self._normed_attention_outputs[where.layer].output
            scale = get_scale(self.model.module, output)

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            every = (*fill.units, *fill.others)
            now = _take(self._at(view_layout(self._seen(value), tap.layout)), every, 1)
            values = to_device(fill.values, now.device).to(now)
            if where.site in _PROJECTED:
                weight = _take(get_head_weights(module, tap.layout), every).to(now)
                sums = partial(_sum_units, weight=weight, count=len(fill.units))
                gained = apply_scale(sums(values - now), scale)
                if where in self._normed_heads or self._sends_to_nodes(where):
                    self._remember_heads(where, now, values, sums)
                width = tap.layout.units * tap.layout.width
                self._remember_bias(where, module, value.new_zeros(1, 1, width), scale)
            else:
                gained = (values - apply_scale(now, scale)).transpose(0, 1)
            self._remember_change(where, self._without_skipped(where, gained))
            return value

        layer, order = _rank(where)
        by_heads = tap.layout.axes != "flat"
        return self._add(
            (tap.path, tap.side, tap.item), (layer, order + 1), step, by_heads=by_heads
        )

    def _without_skipped(self, where: SiteRead, gained: Tensor) -> Tensor:
        """Return [unit, K, d_model] without the tokens at which a block that attends to an image
        skips its MLP."""
        sees, layer = self._sees_image, where.layer
        if sees is None or layer is None or where.site not in ("mlp_out", "mlp_hidden"):
            return gained
        return gained * sees[:, None].to(gained) if _attends_to_image(self.model, layer) else gained

    def _seen(self, value: Tensor) -> Tensor:
        """Return the output of senders as changes are computed from it."""
        return value

    @abstractmethod
    def _remember_bias(
        self, where: SiteRead, module: nn.Module, nothing: Tensor, scale: float | Tensor
    ) -> None:
        """Keep the bias that is added after heads or neurons.

        Args:
            where: The heads or neurons.
            module: Their output projection.
            nothing: […, in] zeros.
            scale: Factor of its output.
        """

    @abstractmethod
    def _remember_heads(
        self, where: SiteRead, now: Tensor, values: Tensor, sums: Callable[[Tensor], Tensor]
    ) -> None:
        """Keep what heads or neurons add up to before a norm.

        Args:
            where: The heads or neurons.
            now: [K, unit, width] their outputs.
            values: [K, unit, width] their fills.
            sums: Returns [unit, K, d_model] of either, what units add up to.
        """

    def _output(self, tap: HookPoint, where: SiteRead) -> CircuitStep:
        """Keep the vectors that enter the first block, or the output of a sublayer."""
        scale = get_scale(self.model.module, tap)

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            self._like = value.new_empty(0)
            self._outputs.append(apply_scale(self._at(self._seen(value)), scale))
            return value

        layer_order, order = _rank(where)
        return self._add((tap.path, tap.side, tap.item), (layer_order, order + 2), step)

    def skipped(self) -> Iterator[tuple[str, SkippedTokens]]:
        """Yield the modules whose output isn't needed at some tokens, by path."""
        return iter(())

    @abstractmethod
    def _remember_change(self, where: SiteRead, gained: Tensor) -> None:
        """Keep [unit, K, d_model]: what the stream would gain with the fills of senders."""

    # --- receivers ---

    def _reads_entrance(self, layer: int, site: str) -> bool:
        """Return whether a receiver reads the stream that enters its block, at a module other than
        its norm."""
        return site in ATTENTION_INPUTS or (site in MLP_INPUTS and self._mlp_norm(layer) is None)

    def _mlp_norm(self, layer: int) -> str | None:
        """Return the norm that only the MLP reads."""
        block = self._anatomy.blocks[layer]
        return None if block.mlp_norm == block.attn_norm else block.mlp_norm

    def _find_entrance(self, attention: Attention) -> SiteRead:
        """Return the site of the stream that the inputs of an attention read."""
        if attention.stack == self._stack:
            return SiteRead("resid_pre", attention.layer, self._stack)
        if self._stack == "encoder":
            return SiteRead("resid_post", self._shape.n_layers - 1, self._stack)
        if self.model.shape.attends_to_image:  # in place of other attention
            return SiteRead("resid_pre", attention.layer)
        return SiteRead("resid_mid", attention.layer)

    def _attention_norm(self, attention: Attention) -> str | None:
        """Return the norm of the stream that the inputs of an attention read."""
        if attention.stack != self._stack == "encoder":
            return self._anatomy.final_norm
        return self.model.stack(attention.stack).anatomy.blocks[attention.layer].attn_norm

    def _remember(self, where: SiteRead) -> CircuitStep:
        """Add a step at a site of the stream that keeps it."""
        tap = self.model.tap(where.site, where.layer, where.stack)
        spot = tap.path, tap.side, tap.item
        if where.site == "resid_mid" and not self._norms_follow_sums:  # no module returns it
            norm = self._attention_norm(Attention("cross", where.layer or 0))
            assert norm is not None
            spot = norm, "in", 0

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            self._stream = self._at(value)
            return value

        layer_order, order = _rank(where)
        return self._add(spot, (layer_order, order + 2), step)

    def _normed(self, path: str | None, vectors: Tensor, like: Tensor) -> Tensor:
        """Return vectors after a norm of the model, without its hooks."""
        vectors = vectors.to(like)
        if path is not None:
            vectors = self.model.module.get_submodule(path).forward(vectors)
        return vectors.to(torch.promote_types(like.dtype, torch.float32))

    def _add_normed(self, sublayer: Sublayer, joined: Tensor) -> Tensor:
        """Return [..., d_model]: what a sublayer adds to the stream, of the sum of its heads."""
        return apply_scale(
            self._normed(sublayer.output_norm, joined, self._like), self._find_scale(sublayer)
        )

    def _find_scale(self, sublayer: Sublayer) -> float | Tensor:
        """Return the factor of the norm of a sublayer's output."""
        added = _find_output(sublayer.senders)
        return get_scale(self.model.module, self.model.tap(added.site, added.layer, added.stack))

    def _check_input(self, normed: Tensor, value: Tensor) -> None:
        """Check that the input of a receiver is the norm of the stream.

        Args:
            normed: [K, d_model] the stream after the norm.
            value: [B, T, d_model] the input.

        Raises:
            WriteMismatch: It isn't.
        """
        given = self._at(value)
        if (normed - given).abs().amax() > _SAME_INPUT * given.abs().amax():
            raise WriteMismatch("a receiver of a circuit doesn't read the norm of the stream")

    @abstractmethod
    def _projection(
        self, attention: Attention, path: str, parts: list[tuple[TensorLayout, list[int]]]
    ) -> Iterator[CircuitStep]:
        """Yield the steps at the queries, keys or values of heads, each of which reads separately.

        Args:
            path: The projection.
            parts: Queries, keys or values in its output, with the numbers of their receivers.
        """

    @abstractmethod
    def _neurons(self, where: SiteRead, rows: list[int]) -> Iterator[CircuitStep]:
        """Yield the steps at the neurons of a layer, each of which reads separately.

        Args:
            rows: The numbers of these receivers.
        """

    @abstractmethod
    def _split_mlp(self, where: SiteRead, rows: list[int]) -> Iterator[CircuitStep]:
        """Yield the steps at an MLP whose features read and send separately.

        Args:
            rows: The numbers of the receivers among them.
        """

    @abstractmethod
    def _split_attention(self, where: SiteRead, rows: list[int]) -> Iterator[CircuitStep]:
        """Yield the steps at the output of an attention whose features read and send separately.

        Args:
            rows: The numbers of the receivers among them.
        """

    def _stream_of_mlp(
        self, layer: int, norm: str | None, value: Tensor
    ) -> tuple[str | None, Tensor]:
        """Return the path of the norm between the stream and an MLP, and [K, d_model] the stream.

        Args:
            norm: Path of the norm whose output `value` is; None if `value` is the stream.
            value: [B, T, d_model]
        """
        if norm is None:
            return (None if self._norms_follow_sums else self._mlp_norm(layer)), self._at(value)
        assert self._stream is not None
        self._check_input(self._normed(norm, self._stream, value), value)
        return norm, self._stream

    def _compute_nodes(
        self,
        layer: int,
        outputs: Tensor,
        read: tuple[Tensor, Tensor],
        nodes: Sequence[int],
    ) -> Tensor:
        """Return [K, node, d_model]: what features, or the rest of an MLP, add to the stream.

        Args:
            outputs: [K, d_model] that the MLP adds.
            read: [K, d_model] each: the stream that it reads, and this after the norm.
            nodes: Features, or `OTHERS`.
        """
        split, (stream, normed) = self._features["mlp_out", layer], read
        encoded = {"": outputs, "mlp_norm": normed, "resid_mid": stream}
        return split.split(outputs, encoded[split.reads].to(outputs), nodes)

    def _send_nodes(self, where: SiteRead, compute: Callable[[Sequence[int]], Tensor]) -> None:
        """Keep what the stream would gain with the fills of the nodes of an output.

        Args:
            where: The output.
            compute: Returns [K, node, d_model], what nodes add to the stream.
        """
        for fill in (sender_fill for sender_fill in self._fills if sender_fill.where == where):
            now = compute(fill.units).transpose(0, 1)
            values = to_device(fill.values, now.device).to(now).transpose(0, 1)
            self._remember_change(fill.where, values - now)

    def _compute_mlp(self, layer: int, vectors: Tensor, like: Tensor) -> Tensor:
        """Return [K, d_model]: the output of an MLP for [K, d_model] inputs, without hooks."""
        mlp = self.model.module.get_submodule(self.model.anatomy.blocks[layer].mlp[0])
        with suspend_hooks(mlp):
            return mlp(vectors.to(like)[None])[0]

    def _keep_joined(self, sublayer: Sublayer, kept: list[Tensor]) -> CircuitStep:
        """Add a step that keeps [K, d_model], the sum of the heads before the norm of the output of
        attention.

        Args:
            kept: The list that it puts the sum into.
        """

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            self._like = value.new_empty(0)
            kept[:] = [self._at(value)]
            return value

        tap, (layer, order) = sublayer.output, _rank(SiteRead("attn_out", sublayer.senders.layer))
        return self._add((tap.path, tap.side, tap.item), (layer, order - _EARLIER), step)

    def _check_mlp(self, layer: int, normed: Tensor, outputs: Tensor) -> None:
        """Check that the first of some outputs is that of an input.

        Args:
            normed: [K, d_model] inputs of the pass.
            outputs: [K, d_model] in the pass.

        Raises:
            WriteMismatch: It isn't.
        """
        mlp = self._compute_mlp(layer, normed[:1], outputs)
        if (mlp - outputs[:1]).abs().amax() > _SAME_INPUT * outputs[:1].abs().amax():
            raise WriteMismatch("the MLP of a circuit isn't a function of its input")

    def _compute_neurons(self, layer: int, vectors: Tensor) -> Tensor:
        """Return [input, K, …]: what the last map of an MLP reads.

        Args:
            vectors: [input, K, d_model]
        """
        block, neurons = self._anatomy.blocks[layer], list[Tensor]()
        assert block.down is not None
        mlp, down = (self.model.module.get_submodule(each) for each in (block.mlp[0], block.down))
        activation = _find_activation(self.model, block)
        if activation is not None:
            with suspend_hooks(mlp):
                return activation(mlp(vectors)).view(*vectors.shape[:2], -1)

        def keep(hidden: Tensor) -> Tensor:
            neurons.append(hidden)
            return hidden.new_zeros(*hidden.shape[:-1], self._shape.d_model)

        with suspend_hooks(mlp), replace_forward(down, keep):
            mlp(vectors)
        (hidden,) = neurons
        return hidden.view(*vectors.shape[:2], -1)

    def _check_neurons(self, computed: Tensor, given: Tensor) -> None:
        """Check that neurons are functions of the MLP's input.

        Args:
            computed: [K, …] from the input of the pass.
            given: [K, …] in the pass.

        Raises:
            WriteMismatch: They aren't.
        """
        if (computed - given).abs().amax() > _SAME_INPUT * given.abs().amax():
            raise WriteMismatch("neurons of a circuit aren't functions of the MLP's input")

    def _whole(self, where: SiteRead, row: int) -> CircuitStep:
        """Add a step at the input of an MLP or of the end of the model."""
        return self._entrance(where.layer, lambda norm, value: self._at_whole(norm, row, value))

    def _earlier_ends(self, row: int) -> Iterator[CircuitStep]:
        """Yield the steps after each block that the end of the model reads before the last one: the
        end has its own input, and the next block continues with the stream.

        Args:
            row: The number of the end among the receivers.
        """
        for layer in self._shape.read_after[:-1]:
            kept = list[Tensor]()

            def read(
                value: Tensor,
                module: nn.Module,
                given: Tensor,
                layer: int = layer,
                kept: list[Tensor] = kept,
            ) -> Tensor:
                kept[:] = [self._at(value)]
                return self._at_earlier_end(row, value, SiteRead("q", layer, self._stack))

            def restore(
                value: Tensor, module: nn.Module, given: Tensor, kept: list[Tensor] = kept
            ) -> Tensor:
                index = self._rows.to(value.device), self._columns.to(value.device)
                return value.index_put(index, kept.pop().to(value))

            end = self.model.tap("resid_post", layer - 1, self._stack)
            last = _rank(SiteRead("final_norm", None, self._stack))
            yield self._add((end.path, end.side, end.item), last, read)
            begin = self.model.tap("resid_pre", layer, self._stack)
            yield self._add((begin.path, begin.side, begin.item), _FIRST, restore)

    @abstractmethod
    def _at_earlier_end(self, row: int, value: Tensor, reader: SiteRead) -> Tensor:
        """Return the input of the end of the model after an earlier block than the last one.

        Args:
            row: Number of the receiver.
            value: [B, T, d_model] the stream.
            reader: A receiver in the next block, which reads the same senders.
        """

    def _entrance(
        self, layer: int | None, act: Callable[[str | None, Tensor], Tensor]
    ) -> CircuitStep:
        """Add a step at the input of an MLP, or of the end of the model.

        Args:
            layer: None for the end of the model.
            act: (norm, value) → the value that the model continues with, as in `_at_whole`.
        """
        anatomy = self._anatomy
        after = layer is not None and self._mlp_norm(layer) is None
        path = None if self._norms_follow_sums or layer is None else self._mlp_norm(layer)
        if layer is None and not self._ends_before_norm:
            path = anatomy.final_norm
        spot: tuple[str, HookSide, int] = (path or "", "in", 0)
        if path is None:
            tap = self._input_tap(layer)
            spot = tap.path, tap.side, tap.item
        norm = anatomy.blocks[layer].mlp_norm if after and layer is not None else None

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            return act(norm, value)

        site = "final_norm" if layer is None else "mlp_norm"
        layer_order, order = _rank(SiteRead(site, layer, self._stack))
        return self._add(spot, (layer_order, order - _EARLIER), step)

    def _input_tap(self, layer: int | None) -> HookPoint:
        """Return the hook point of the input of an MLP, or of the end of the model."""
        if layer is not None:
            return self.model.tap("mlp_norm", layer, self._stack)
        if self._ends_before_norm:
            return self.model.tap("resid_post", self._last_layer, self._stack)
        return self.model.tap("final_norm", None, self._stack)

    @abstractmethod
    def _at_whole(self, norm: str | None, row: int, value: Tensor) -> Tensor:
        """Return the input of an MLP or of the end of the model.

        Args:
            norm: Path of the norm whose output `value` is; None if `value` is the stream.
            row: Number of the receiver.
            value: [B, T, d_model]
        """


@dataclass(frozen=True, eq=False)
class _BegunInput:
    """The input of an MLP without the heads of its block."""

    vectors: Tensor
    """[K, d_model] its sum, or only the changes of the senders before the block."""
    end: int
    """Number of these senders."""
    summed: bool
    biases: Tensor
    """[d_model] sum of the biases before the block."""


class _WriteHooks(CircuitHooks):
    """The steps of a `CircuitWrite`."""

    def __init__(
        self, model: LoadedModel, frame: TokenFrame, write: CircuitWrite, *, adds_up: bool
    ) -> None:
        """Prepare the steps; adds_up: whether the stream is the sum of senders and biases."""
        super().__init__(model, frame, write)
        self._of_zeros = adds_up and not any(bool(fill.values.any()) for fill in write.fills)
        """Whether the stream without all senders is the sum of biases."""
        wide = torch.promote_types(model.dtype, torch.float32)
        self._biases = torch.zeros(self._shape.d_model, dtype=wide, device=model.device)
        """[d_model] the sum of biases that were added after heads so far."""
        self._differences: list[tuple[int, Tensor]] = []
        """(column of the mask, [unit, K, d_model]) of the senders so far, if autograd follows."""
        self._changes: Tensor | None = None
        """[_AHEAD + sender, K, d_model] otherwise: the stream that receivers read, the sum of
        biases, and the changes of the senders so far."""
        self._end = 0
        """Number of senders so far."""
        self._gains: dict[SiteRead, Tensor] = {}
        """[unit, K, d_model] of the senders so far, with `_sublayers`."""
        self._of_heads: dict[SiteRead, tuple[Tensor, Tensor]] = {}
        """[unit, K, d_model] what heads or neurons add up to before a norm: their outputs, and
        their fills."""
        self._bias_of_heads: dict[SiteRead, Tensor] = {}
        """[d_model]"""
        self._mask = to_device(write.mask, model.device)
        self._distinct: dict[Attention, DistinctInputs] = {}
        self._normed_attention: Attention | None = None
        self._normed_of_attention = torch.empty(0)
        """[input, K, d_model] of its heads, after its norm."""
        self._heads, self._outputs_of_mlps = write.heads, write.outputs
        self._replaced: list[str] = []
        """Projections whose output is replaced."""
        self._begun: dict[int, _BegunInput] = {}
        """By number of an MLP."""
        self._before: dict[SiteRead, tuple[Tensor, bool]] = {}
        self._others = write.others
        self._entrance_biases: dict[int, Tensor] = {}
        """By layer, [d_model] the sum of biases before the attention of the block."""
        self._ends = self._locate_ends(frame, write)

    def _locate_ends(self, frame: TokenFrame, write: CircuitWrite) -> tuple[Tensor, ...]:
        """Return the tokens that the end of the model reads: their numbers among those of the
        circuit, and both indices into the input of the end. Packed passes continue after the last
        block with only the tokens that are read."""
        if self._stack == "encoder":  # the end reads the decoder
            return ()
        where = SiteRead("final_norm", None, self._stack)
        if self._ends_before_norm:
            where = SiteRead("resid_post", self._last_layer, self._stack)
        given = where.site, where.layer, where.stack, write.rows, write.positions
        rows, columns, present = frame.locate(*given)
        due = torch.nonzero(present)[:, 0]
        return indices_to_device((due, rows[due], columns[due]), self.model.device)

    def steps(self) -> Iterator[CircuitStep]:
        for fill in self._heads:
            yield self._written_heads(fill)
        yield from super().steps()

    def _written_heads(self, fill: SenderFill) -> CircuitStep:
        """Write the outputs of heads that aren't computed."""
        tap = self.model.tap("z", fill.where.layer)

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            value = value.clone(memory_format=torch.contiguous_format)
            view = view_layout(value, tap.layout)
            index = self._rows.to(view.device)[:, None], self._columns.to(view.device)[:, None]
            units = to_device(torch.tensor(fill.units), view.device)
            view[*index, units[None]] = to_device(fill.values, view.device).to(view)
            put_layout(value, tap.layout, view)
            return value

        by_heads = tap.layout.axes != "flat"
        spot = tap.path, tap.side, tap.item
        return self._add(spot, write_order("z", fill.where.layer), step, by_heads=by_heads)

    def skipped(self) -> Iterator[tuple[str, SkippedTokens]]:
        """Yield the modules whose output isn't needed at the tokens of the circuit."""
        index = self._rows, self._columns
        for layer, vectors in self._outputs_of_mlps.items():
            tap = self.model.tap("mlp_out", layer)
            scale = get_scale(self.model.module, tap)
            yield tap.path, SkippedTokens(*index, undo_scale(vectors, scale))
            (path,) = self.model.anatomy.blocks[layer].mlp
            if path != tap.path:  # a norm follows
                yield path, SkippedTokens(*index, None)
        for path in self._replaced:
            yield path, SkippedTokens(*index, None)
        for fill in self._heads:
            layer = fill.where.layer
            assert layer is not None
            if len(fill.units) == unit_count(self.model.shape, "z", layer):
                attention = Attention("", layer)
                for path, layouts in _list_projections(self.model, attention, "").items():
                    if _is_made_of(self.model, path, layouts):
                        yield path, SkippedTokens(*index, None)

    def _remember_change(self, where: SiteRead, gained: Tensor) -> None:
        columns = self._senders[where]
        if self._sends_to_nodes(where):
            return  # the stream gains what the nodes add
        if self._sublayers:
            self._gains[where] = gained
            return
        if torch.is_grad_enabled():
            self._differences.append((columns.start, gained))
            return
        if self._changes is None:
            size = _AHEAD + self._mask.shape[-1], *gained.shape[1:]
            self._changes = torch.zeros(size, dtype=gained.dtype, device=self.model.device)
        self._changes[_AHEAD + columns.start : _AHEAD + columns.stop] = gained
        self._end = columns.stop

    def _remember_bias(
        self, where: SiteRead, module: nn.Module, nothing: Tensor, scale: float | Tensor
    ) -> None:
        if self._sends_to_nodes(where):
            self._bias_of_heads[where] = _compute_bias(module, nothing)[0, 0]
        elif where in self._normed_heads:
            self._bias_of_heads[where] = apply_scale(_compute_bias(module, nothing), scale)[0, 0]
        elif self._of_zeros:
            if where.site == "z" and where.layer is not None:
                self._entrance_biases[where.layer] = self._biases
            bias = apply_scale(_compute_bias(module, nothing).flatten(), scale)
            self._biases = self._biases + bias.to(self._biases)

    def _remember_heads(
        self, where: SiteRead, now: Tensor, values: Tensor, sums: Callable[[Tensor], Tensor]
    ) -> None:
        self._of_heads[where] = sums(now), sums(values)

    def _inputs(self, mask: Tensor, stream: Tensor, reader: SiteRead) -> Tensor:
        """Return [input, K, d_model]: the stream and the shares of masked senders so far.

        Args:
            mask: [input, sender] or [K, input, sender]
            stream: [K, d_model]
            reader: A receiver of these inputs.
        """
        if self._sublayers:
            inputs = self._stream_of(mask)
            changed = stream + (inputs - self._stream_of(torch.zeros_like(mask)[..., :1, :]))
            if self._norms_follow_sums:
                return changed
            summed = _by_input(self._are_summed(mask, reader).bool())
            return torch.where(summed.to(inputs.device), inputs, changed)
        biases = self._biases
        if reader.site in MLP_INPUTS and self._shape.parallel_block:
            biases = self._entrance_biases.get(reader.layer or 0, biases)
        if self._changes is not None:
            self._changes[0], self._changes[1] = stream, biases
            changes = self._changes[: _AHEAD + self._end]
            inputs, summed = mask[..., : self._end], self._are_summed(mask, reader)
            due = self._find_before(reader)[0][: self._end]
            weights = torch.cat([1 - summed, summed, inputs - summed * due], dim=-1).to(changes)
            if mask.dim() == 2:
                changed = (weights @ changes.flatten(1)).unflatten(1, stream.shape)
            else:
                changed = torch.einsum("kru,ukd->rkd", weights, changes)
            return changed.to(stream.device)
        summed = self._are_summed(mask, reader)
        shares = mask - summed * self._find_before(reader)[0]
        of_input = _by_input(summed).to(stream)
        changed = (1 - of_input) * stream + of_input * biases.to(stream)
        for column, gained in self._differences:
            inputs = shares[..., column : column + len(gained)]
            changed = changed + _sum_shares(inputs, gained).to(changed.device)
        return changed

    def _are_summed(self, mask: Tensor, reader: SiteRead) -> Tensor:
        """Return [input, 1] or [K, input, 1]: 1 for an input that is the sum of the senders whose
        edges aren't ablated and of biases, 0 for the stream plus changes."""
        before, complete = self._find_before(reader)
        if not (self._of_zeros and complete):
            return torch.zeros_like(mask[..., :1])
        return (mask[..., before].mean(-1, keepdim=True) >= _SUMMED).to(mask)

    def _find_before(self, reader: SiteRead) -> tuple[Tensor, bool]:
        """Return [sender] bool, the senders in the mask that a receiver may read, and whether these
        are all that it reads."""
        if reader not in self._before:
            layer = reader.layer
            own = reader.site in MLP_INPUTS and not self._shape.parallel_block
            own = own or reader.stack != self._stack  # after the heads of the block
            every = sum(self._count_units(each) for each in self._list_before(reader, own=own))
            before = [fill for fill in self._fills if _is_before(fill.where, reader)]
            due = [
                fill
                for fill in before
                if (own or fill.where.layer != layer) and not self._sends_to_nodes(fill.where)
            ]
            units = sum(len(fill.units) + len(fill.others) for fill in due)
            columns = torch.zeros(self._mask.shape[-1], dtype=torch.bool, device=self._mask.device)
            for fill in due:
                columns[self._senders[fill.where]] = True
            self._before[reader] = columns, units == every
        return self._before[reader]

    def _list_before(self, reader: SiteRead, *, own: bool) -> Iterator[SiteRead]:
        """Yield all places of senders before a receiver.

        Args:
            own: Whether it also reads senders of the same block.
        """
        yield SiteRead("resid_pre", 0, self._stack)
        stacks = [self._stack, *["cross"][: not self._stack and "cross" in self.model.others]]
        for layer in range(self._shape.n_layers):
            heads = [SiteRead("z", layer, stack) for stack in stacks]
            heads[0] = SiteRead("attn_out", layer) if layer in self._joined else heads[0]
            for head in (*heads, SiteRead("mlp_out", layer, self._stack)):
                if _is_before(head, reader) and (own or layer != reader.layer):
                    yield head

    def _count_units(self, where: SiteRead) -> int:
        """Return the number of units of senders: of an MLP its neurons if they are senders,
        otherwise 1."""
        layer, shape = where.layer, self.model.stack(where.stack).shape
        if where.site == "mlp_out" and layer in self._others:
            return unit_count(shape, "mlp_hidden", layer)
        if (where.site, layer) in self._features:
            return len(self._features[where.site, layer].nodes)
        if where.site == "mlp_out":
            return int(shape.has("mlp_out", layer))
        if where.site == "z" and not shape.has("z", layer):  # the block attends to an image
            return 0
        return unit_count(shape, where.site, layer)

    def _stream_of(self, mask: Tensor) -> Tensor:
        """Return [receiver, K, d_model]: the stream that receivers read, with `_sublayers`.

        Args:
            mask: [receiver, sender] or [K, receiver, sender]
        """
        first, *outputs = self._outputs
        stream = first + self._shares(mask, SiteRead("resid_pre", 0, self._stack))
        for sublayer, output in zip(self._sublayers, outputs, strict=False):
            if sublayer.output_norm is None and sublayer.senders in self._of_heads:
                stream = stream + self._join_heads(mask, sublayer.senders, output)
            elif sublayer.output_norm is None:
                stream = stream + output.to(stream) + self._shares(mask, sublayer.senders)
            else:
                joined = self._join_heads(mask, sublayer.senders, output)
                stream = stream + self._add_normed(sublayer, joined)
            if sublayer.sum_norm is not None:
                stream = self._normed(sublayer.sum_norm, stream, self._like)
        return stream

    def _join_heads(self, mask: Tensor, where: SiteRead, output: Tensor) -> Tensor:
        """Return [receiver, K, d_model]: the sum of heads or neurons that a norm follows, directly
        or after the sum with the stream, or of heads that nodes of their output read, each with its
        output or its fill. A unit with the fill 0 adds exactly 0.

        Args:
            mask: [receiver, sender] or [K, receiver, sender]
            where: The heads or neurons.
            output: [K, d_model] their sum in this pass.
        """
        if where not in self._of_heads:
            return output.expand(mask.shape[-2], *output.shape)
        tensor, filled = self._of_heads[where]
        rest = self._bias_of_heads[where].to(tensor)
        named = (fill for fill in self._fills if fill.where == where)
        count = sum(len(fill.units) + len(fill.others) for fill in named)
        if count < self._count_units(where):
            rest = output.to(tensor) - tensor.sum(0)
        share = mask[..., self._senders[where]].to(tensor)
        return rest + _sum_shares(1 - share, tensor) + _sum_shares(share, filled)

    def _shares(self, mask: Tensor, where: SiteRead) -> Tensor:
        """Return [receiver, K, d_model]: what the masked senders of a sublayer add."""
        if where.site == "mlp_out" and where not in self._gains:
            where = SiteRead("mlp_hidden", where.layer, self._stack)
        gained = self._gains.get(where)
        if gained is None:
            size = mask.shape[-2], *self._outputs[0].shape
            return self._outputs[0].new_zeros(size)
        return _sum_shares(mask[..., self._senders[where]], gained)

    def _put(self, value: Tensor, vectors: Tensor) -> Tensor:
        """Return [B, T, width] with [K, width] in it."""
        index = self._rows.to(value.device), self._columns.to(value.device)
        return value.index_put(index, vectors.to(value))

    def _number_inputs(self, attention: Attention) -> DistinctInputs:
        """Return the distinct inputs of the heads of an attention, and, if it is the first sublayer
        of a block, of the MLP but for the heads."""
        distinct_inputs = self._distinct.get(attention)
        if distinct_inputs is None:
            sites = ATTENTION_INPUTS
            is_split = any(layer == attention.layer for _, layer in self._features)
            if self._mask.dim() == 2 and not self._sublayers and not is_split:
                sites = *ATTENTION_INPUTS, "mlp_norm"
            rows = [
                row
                for row, (where, _) in enumerate(self._receivers)
                if (where.stack, where.layer) == (attention.stack, attention.layer)
                and where.site in sites
            ]
            distinct_inputs = self._distinct[attention] = number_inputs(self._mask, rows)
        return distinct_inputs

    def _normed_inputs(self, attention: Attention, value: Tensor) -> Tensor:
        """Return [input, K, d_model] after the norm before an attention; the first one is that of
        the stream.

        Args:
            value: [B, T, d_model] the unchanged input after the norm.
        """
        if self._normed_attention != attention:
            assert self._stream is not None
            distinct = self._number_inputs(attention)
            at_the_end = attention.stack != self._stack == "encoder"
            reader = SiteRead("k" if at_the_end else "q", attention.layer, attention.stack)
            inputs = self._inputs(distinct.mask, self._stream, reader)
            if attention.stack == self._stack:
                self._begin_mlps(distinct, inputs, reader)
            normed = self._normed(self._attention_norm(attention), inputs, value)
            self._normed_of_attention, self._normed_attention = normed, attention
        self._check_input(self._normed_of_attention[0], value)
        return self._normed_of_attention

    def _begin_mlps(self, distinct: DistinctInputs, inputs: Tensor, reader: SiteRead) -> None:
        """Keep the inputs of the MLP of a block without its heads.

        Args:
            distinct: The distinct inputs of the block.
            inputs: [input, K, d_model]
            reader: The queries of the block.
        """
        self._begun = {}
        for row, number in distinct.of_receiver.items():
            where, _ = self._receivers[row]
            if where.site == "mlp_norm" and self._changes is not None:
                summed = bool(self._are_summed(distinct.mask[number], reader))
                summed = summed and self._find_before(where)[1]
                tensor = inputs[number] if summed else inputs[number] - inputs[0]
                self._begun[row] = _BegunInput(tensor, self._end, summed, self._biases)

    def _projection(
        self, attention: Attention, path: str, parts: list[tuple[TensorLayout, list[int]]]
    ) -> Iterator[CircuitStep]:
        """Yield a step that gives the projection the most common input of its heads, and one that
        computes the others as if each had a separate projection."""
        inputs, heads = self._number_inputs(attention), list[tuple[TensorLayout, list[int]]]()
        layouts = _list_projections(self.model, attention, self._stack)[path]
        shape = self.model.stack(attention.stack).shape
        for site, layout in layouts.items():
            numbers = [0] * unit_count(shape, site, attention.layer)
            for row, number in inputs.of_receiver.items():
                where, head = self._receivers[row]
                if where.site == site:
                    numbers[head] = number
            heads.append((layout, numbers))
        common = 0
        if _is_made_of(self.model, path, layouts):
            every = [n for _, numbers in heads for n in numbers]
            common, count = Counter(every).most_common(1)[0]
            if count < _SHARED * len(every):
                common = _REPLACED
                self._replaced.append(path)

        def before(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            normed = self._normed_inputs(attention, value)
            return self._put(value, normed[common]) if common > 0 else value

        def after(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            return self._project(heads, common, value, module)

        layer, order = _rank(SiteRead("q", attention.layer, attention.stack))
        yield self._add((path, "in", 0), (layer, order - _EARLIER), before)
        yield self._add((path, "out", 0), (layer, order - _EARLIER), after)

    def _project(
        self,
        heads: list[tuple[TensorLayout, list[int]]],
        common: int,
        value: Tensor,
        module: nn.Module,
    ) -> Tensor:
        """Return the output of a projection with the heads that don't read its input.

        Args:
            heads: Queries, keys or values in the output, with the number of the input of each head.
            common: Number of the projection's input.
            value: [B, T, out]
        """
        weight, normed = get_linear_map(module), self._normed_of_attention
        bias = _compute_bias(module, weight.new_zeros(1, 1, len(weight)))
        value = value.clone(memory_format=torch.contiguous_format)
        index = self._rows.to(value.device)[:, None], self._columns.to(value.device)[:, None]
        for layout, numbers in heads:
            own = [head for head, number in enumerate(numbers) if number != common]
            if not own:
                continue
            columns = _take(view_layout(weight[None], layout)[0], own, 1).to(normed)
            added = _take(view_layout(bias, layout)[0, 0], own).to(normed)
            vectors = _take(normed, [numbers[head] for head in own]).to(value.device)
            units = torch.baddbmm(added[:, None], vectors, columns.transpose(0, 1)).transpose(0, 1)
            view = view_layout(value, layout)
            view[*index, to_device(torch.tensor(own), value.device)[None]] = units.to(value)
            put_layout(value, layout, view)
        return value

    def _neurons(self, where: SiteRead, rows: list[int]) -> Iterator[CircuitStep]:
        """Yield a step that keeps the inputs of neurons, and one that writes the activations of
        those that don't read the stream as it is."""
        layer = where.layer
        assert layer is not None
        inputs, tap = (
            number_inputs(self._mask, rows),
            self.model.tap("mlp_hidden", layer, self._stack),
        )
        pairs = [
            (unit, inputs.of_receiver[row] - 1)
            for row in rows
            for unit in self._list_neurons(layer, self._receivers[row][1])
            if inputs.of_receiver[row]
        ]
        normed: list[Tensor] = []

        def read(norm: str | None, value: Tensor) -> Tensor:
            norm, stream = self._stream_of_mlp(layer, norm, value)
            normed[:] = [self._normed(norm, self._inputs(inputs.mask, stream, where), value)]
            return value

        def write(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            own_inputs = normed.pop().to(value)
            first = view_layout(self._compute_neurons(layer, own_inputs[:1, :1]), tap.layout)
            self._check_neurons(first[0], self._at(view_layout(value, tap.layout))[:1])
            hidden = view_layout(self._compute_neurons(layer, own_inputs[1:]), tap.layout)
            units, numbers = (torch.tensor(own) for own in zip(*pairs, strict=True))
            index = self._rows.to(value.device)[:, None], self._columns.to(value.device)[:, None]
            value = value.clone(memory_format=torch.contiguous_format)
            view = view_layout(value, tap.layout)
            tensor = hidden[to_device(numbers, value.device), :, to_device(units, value.device)]
            view[*index, to_device(units, value.device)[None]] = tensor.transpose(0, 1).to(view)
            put_layout(value, tap.layout, view)
            return value

        if pairs:
            yield self._entrance(layer, read)
            order = (layer, SITES["mlp_hidden"].order - _EARLIER)
            yield self._add((tap.path, tap.side, tap.item), order, write)

    def _split_mlp(self, where: SiteRead, rows: list[int]) -> Iterator[CircuitStep]:
        """Yield a step that keeps the inputs of an MLP, and those of `_write_nodes`."""
        layer, output = where.layer, SiteRead("mlp_out", where.layer)
        assert layer is not None
        inputs, by_input = self._group_nodes(output, rows)
        scale = get_scale(self.model.module, self.model.tap("mlp_out", layer))
        kept: list[Tensor] = []
        """[input, K, d_model]: the streams that are read, and these after the norm."""

        def read(norm: str | None, value: Tensor) -> Tensor:
            norm, stream = self._stream_of_mlp(layer, norm, value)
            streams = self._inputs(inputs.mask, stream, where)
            kept[:] = [streams, self._normed(norm, streams, value)]
            return value

        def compute(value: Tensor, now: Tensor) -> Callable[[int, Sequence[int]], Tensor]:
            streams, normed = (each.to(now) for each in kept)
            self._check_mlp(layer, normed[0], self._at(value))

            def of_input(number: int, nodes: Sequence[int]) -> Tensor:
                outputs = now
                if number:
                    made = self._compute_mlp(layer, normed[number], value)
                    outputs = apply_scale(made.to(now), scale)
                return self._compute_nodes(layer, outputs, (streams[number], normed[number]), nodes)

            return of_input

        yield self._entrance(layer, read)
        yield from self._write_nodes(output, by_input, compute)

    def _split_attention(self, where: SiteRead, rows: list[int]) -> Iterator[CircuitStep]:
        """Yield the steps of `_write_nodes` at the output of attention; before them, if a norm
        follows, one that keeps the sum of the heads before the norm."""
        layer, heads = where.layer, SiteRead("z", where.layer)
        assert layer is not None
        inputs, by_input = self._group_nodes(where, rows)
        split, normed = self._features["attn_out", layer], self._normed_attention_outputs.get(layer)
        scale = get_scale(self.model.module, self.model.tap("attn_out", layer))
        kept: list[Tensor] = []

        def compute(value: Tensor, now: Tensor) -> Callable[[int, Sequence[int]], Tensor]:
            joined = kept.pop() if normed is not None else self._at(value)
            sums = self._join_heads(inputs.mask, heads, joined)

            def of_input(number: int, nodes: Sequence[int]) -> Tensor:
                outputs = now
                if number and normed is not None:
                    outputs = self._add_normed(normed, sums[number]).to(now)
                elif number:
                    outputs = apply_scale(sums[number], scale).to(now)
                return split.split(outputs, outputs, nodes)

            return of_input

        if normed is not None:
            yield self._keep_joined(normed, kept)
        yield from self._write_nodes(where, by_input, compute)

    def _group_nodes(
        self, output: SiteRead, rows: list[int]
    ) -> tuple[DistinctInputs, Mapping[int, list[int]]]:
        """Return the distinct inputs of the nodes of an output, and the nodes of each input.

        Args:
            rows: The numbers of the receivers among the nodes; the others read input 0.
        """
        inputs, split = number_inputs(self._mask, rows), self._features[output.site, output.layer]
        numbers = {self._receivers[row][1]: inputs.of_receiver[row] for row in rows}
        by_input: dict[int, list[int]] = defaultdict(list)
        for node in split.nodes:
            by_input[numbers.get(node, 0)].append(node)
        return inputs, by_input

    def _write_nodes(
        self,
        output: SiteRead,
        by_input: Mapping[int, list[int]],
        compute: Callable[[Tensor, Tensor], Callable[[int, Sequence[int]], Tensor]],
    ) -> Iterator[CircuitStep]:
        """Yield a step that writes an output as the sum of its nodes, and one that computes what
        the stream would gain with their fills.

        Args:
            by_input: Number of an input → the nodes that read it.
            compute: Receives the output of the module and [K, d_model], what the stream gains from
                it. Returns a function from an input and its nodes to [K, node, d_model], what the
                nodes add to the stream.
        """
        assert output.layer is not None
        tap = self.model.tap(output.site, output.layer)
        scale = get_scale(self.model.module, tap)
        values: dict[int, Tensor] = {}
        """[K, d_model]: what each node adds to the stream."""

        def write(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            of_input = compute(value, apply_scale(self._at(value), scale))
            for number, nodes in by_input.items():
                values.update(zip(nodes, of_input(number, nodes).unbind(1), strict=True))
            if set(by_input) == {0}:
                return value
            whole = torch.stack([*values.values()]).sum(0)
            return self._put(value, undo_scale(whole, scale))

        def send(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            self._send_nodes(output, lambda units: torch.stack([values[u] for u in units], dim=1))
            return value

        spot: tuple[str, HookSide, int] = (tap.path, tap.side, tap.item)
        order = SITES[output.site].order
        yield self._add(spot, (output.layer, order - _EARLIER), write)
        yield self._add(spot, (output.layer, order + 1), send)

    def _list_neurons(self, layer: int, unit: int) -> Sequence[int]:
        return self._others[layer] if unit == OTHERS else (unit,)

    def _at_whole(self, norm: str | None, row: int, value: Tensor) -> Tensor:
        if self._receivers[row][0].layer is None:
            return self._at_end(row, value)
        if norm is None:
            return self._put(value, self._input(row, self._at(value)))
        assert self._stream is not None
        self._check_input(self._normed(norm, self._stream, value), value)
        return self._put(value, self._normed(norm, self._input(row, self._stream), value))

    def _at_earlier_end(self, row: int, value: Tensor, reader: SiteRead) -> Tensor:
        return self._at_end(row, value, reader)

    def _at_end(self, row: int, value: Tensor, reader: SiteRead | None = None) -> Tensor:
        """Return the input of the end of the model, [B, T, d_model].

        Args:
            reader: As in `_at_earlier_end`; None for the last block that the end reads.
        """
        due, *index = (end.to(value.device) for end in self._ends)
        dtype = torch.promote_types(value.dtype, torch.float32)
        stream = value.new_zeros(len(self._rows), value.shape[-1], dtype=dtype)
        stream = stream.index_put((due,), value[tuple(index)].to(dtype))
        vectors = self._input(row, stream, reader)[due.to(stream.device)]
        return value.index_put(tuple(index), vectors.to(value))

    def _input(self, row: int, stream: Tensor, reader: SiteRead | None = None) -> Tensor:
        """Return [K, d_model]: what an MLP or the end of the model reads; reader: as in
        `_at_end`."""
        where = reader or self._receivers[row][0]
        if row not in self._begun or self._changes is None:
            return self._inputs(self._mask[..., row : row + 1, :], stream, where)[0]
        begun = self._begun[row]
        if begun.summed and self._shape.parallel_block:
            return begun.vectors
        heads = self._changes[_AHEAD + begun.end : _AHEAD + self._end].flatten(1)
        share = self._mask[row, begun.end : self._end].to(heads)
        added = ((share - 1 if begun.summed else share) @ heads).view_as(begun.vectors)
        if begun.summed:
            return begun.vectors + (added + (self._biases - begun.biases)).to(stream.device)
        return stream + begun.vectors + added.to(stream.device)


class _ReadHooks(CircuitHooks):
    """The steps of a `CircuitRead`: the tensors that the model continues with are copies of those
    that are differentiated by."""

    def __init__(self, model: LoadedModel, frame: TokenFrame, read: CircuitRead) -> None:
        super().__init__(model, frame, read)
        self._read = read
        if read.changes is None:
            size = (
                sum(sender_fill.count for sender_fill in read.fills),
                len(read.rows),
                self._shape.d_model,
            )
            dtype = torch.promote_types(model.dtype, torch.float32)
            read.changes = torch.empty(size, dtype=dtype, device=model.device)
        else:
            self._fills = ()
        read.to_senders = self._list_sublayers if self._sublayers else None

    def _list_sublayers(self, gradient: Tensor, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the columns of the senders of each sublayer, and the gradient by their sum.

        Args:
            gradient: [receiver, K, d_model] by the stream after some sublayers.
            count: The number of these sublayers.
        """
        first, *outputs = self._outputs
        stream, normed = first, list[Tensor]()
        for sublayer, output in zip(self._sublayers[:count], outputs, strict=False):
            normed.append(output.to(stream))
            if sublayer.output_norm is not None:
                stream = stream + self._add_normed(sublayer, output)
                continue
            stream = stream + output.to(stream)
            if sublayer.sum_norm is not None:
                normed[-1] = stream
                stream = self._normed(sublayer.sum_norm, stream, self._like)
        for sublayer, inputs in reversed([*zip(self._sublayers, normed, strict=False)]):
            gradient = self._before_norm(sublayer.sum_norm, inputs, gradient, self._like)
            tensor = gradient
            if sublayer.output_norm is not None:
                scaled = apply_scale(gradient, self._find_scale(sublayer))
                tensor = self._before_norm(sublayer.output_norm, inputs, scaled, self._like)
            where = sublayer.senders
            if where.site == "mlp_out" and where not in self._senders:
                where = SiteRead("mlp_hidden", where.layer, self._stack)
            if where in self._senders:
                yield self._senders[where], tensor
        first = SiteRead("resid_pre", 0, self._stack)
        yield self._senders.get(first, slice(0, 0)), gradient

    def _seen(self, value: Tensor) -> Tensor:
        return value.detach()

    def _remember_change(self, where: SiteRead, gained: Tensor) -> None:
        assert self._read.changes is not None
        self._read.changes[self._senders[where]] = gained

    def _remember_bias(
        self, where: SiteRead, module: nn.Module, nothing: Tensor, scale: float | Tensor
    ) -> None:
        """Keep nothing: what receivers read is the stream itself."""

    def _remember_heads(
        self, where: SiteRead, now: Tensor, values: Tensor, sums: Callable[[Tensor], Tensor]
    ) -> None:
        if where.site == "mlp_hidden":
            self._read.activations[where] = (values - now)[..., 0]

    def _read_stream_of_mlp(
        self, layer: int
    ) -> tuple[Callable[[str | None, Tensor], Tensor], list[tuple[str | None, Tensor]]]:
        """Return a step that keeps the stream before an MLP and the path of its norm, and the list
        in which it keeps them."""
        seen: list[tuple[str | None, Tensor]] = []

        def read(norm: str | None, value: Tensor) -> Tensor:
            norm, stream = self._stream_of_mlp(layer, norm, value.detach())
            seen[:] = [(norm, stream.detach())]
            return value

        return read, seen

    def _neurons(self, where: SiteRead, rows: list[int]) -> Iterator[CircuitStep]:
        """Yield a step that keeps the stream before an MLP, and one that differentiates by the
        activations of its neurons."""
        layer = where.layer
        assert layer is not None
        tap = self.model.tap("mlp_hidden", layer, self._stack)
        others = next(fill.others for fill in self._read.fills if fill.where == where)
        named = [self._receivers[row][1] for row in rows]
        units = [others if unit == OTHERS else (unit,) for unit in named]
        read, seen = self._read_stream_of_mlp(layer)

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            (norm, stream), like = seen.pop(), value.detach()
            first = self._normed(norm, stream[:1], like).to(like)
            first = view_layout(self._compute_neurons(layer, first[None]), tap.layout)[0]
            self._check_neurons(first, self._at(view_layout(like, tap.layout))[:1])
            like = like.new_empty(0)

            def differentiate(tensor: Tensor, part: Sequence[Sequence[int]]) -> Tensor:
                with torch.enable_grad():
                    inputs = stream.expand(len(part), *stream.shape).clone().requires_grad_()
                    normed = self._normed(norm, inputs, like).to(like)
                    hidden = view_layout(self._compute_neurons(layer, normed), tap.layout)
                    given = _select_units(tensor, part).to(hidden)
                    (gradient,) = torch.autograd.grad(hidden, inputs, given)
                return gradient

            def to_stream(gradient: Tensor) -> Tensor:
                tensor = self._at(view_layout(gradient, tap.layout))
                size = max(1, _NEURON_NUMBERS // tensor.numel())
                parts = (units[first : first + size] for first in range(0, len(units), size))
                return torch.cat([differentiate(tensor, part) for part in parts])

            sublayers = len(self._outputs) - 1
            self._read.taps.append(EdgeTap(value, rows, to_stream, sublayers=sublayers))
            return value.clone()

        yield self._entrance(layer, read)
        order = (layer, SITES["mlp_hidden"].order - _EARLIER)
        yield self._add((tap.path, tap.side, tap.item), order, step)

    def _split_mlp(self, where: SiteRead, rows: list[int]) -> Iterator[CircuitStep]:
        """Yield a step that keeps the stream before an MLP, and one that computes what the stream
        would gain with the fills of its nodes, and differentiates by its output."""
        layer = where.layer
        assert layer is not None
        tap = self.model.tap("mlp_out", layer)
        scale = get_scale(self.model.module, tap)
        named = [self._receivers[row][1] for row in rows]
        read, seen = self._read_stream_of_mlp(layer)

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            (norm, stream), like = seen.pop(), value.detach()
            normed, made = self._normed(norm, stream, like), self._at(like)
            self._check_mlp(layer, normed, made.to(like))
            outputs, like = apply_scale(made, scale), like.new_empty(0)
            self._send_nodes(
                SiteRead("mlp_out", layer),
                lambda units: self._compute_nodes(layer, outputs, (stream, normed), units),
            )
            if not rows:
                return value

            def to_stream(gradient: Tensor) -> Tensor:
                given, gradients = undo_scale(self._at(gradient), scale), list[Tensor]()
                with torch.enable_grad():
                    inputs = stream.clone().requires_grad_()
                    normed = self._normed(norm, inputs, like)
                    made = apply_scale(self._compute_mlp(layer, normed, like).to(given), scale)
                    parts = self._compute_nodes(layer, made, (inputs, normed), named)
                    for part in parts.unbind(1):
                        gradients += torch.autograd.grad(part, inputs, given, retain_graph=True)
                return torch.stack(gradients)

            self._read.taps.append(
                EdgeTap(value, rows, to_stream, sublayers=len(self._outputs) - 1)
            )
            return value.clone()

        order = (layer, SITES["mlp_out"].order - _EARLIER)
        yield self._entrance(layer, read)
        yield self._add((tap.path, tap.side, tap.item), order, step)

    def _split_attention(self, where: SiteRead, rows: list[int]) -> Iterator[CircuitStep]:
        """Yield a step that computes what the stream would gain with the fills of the nodes of the
        output of attention, and differentiates by it; before it, one that keeps the sum of the
        heads before a norm."""
        layer = where.layer
        assert layer is not None
        tap, split = self.model.tap("attn_out", layer), self._features["attn_out", layer]
        scale, normed = get_scale(self.model.module, tap), self._normed_attention_outputs.get(layer)
        named = [self._receivers[row][1] for row in rows]
        heads = number_senders(self._read.fills).get(SiteRead("z", layer), slice(0, 0))
        kept: list[Tensor] = []

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            outputs = apply_scale(self._at(value.detach()), scale)
            joined = outputs if normed is None else kept.pop().detach()
            self._send_nodes(where, lambda units: split.split(outputs, outputs, units))
            if not rows:
                return value

            def to_heads(gradient: Tensor) -> Tensor:
                given, gradients = undo_scale(self._at(gradient), scale), list[Tensor]()
                with torch.enable_grad():
                    inputs = joined.clone().requires_grad_()
                    made = inputs if normed is None else self._add_normed(normed, inputs)
                    parts = split.split(made.to(given), made.to(given), named)
                    for part in parts.unbind(1):
                        gradients += torch.autograd.grad(part, inputs, given, retain_graph=True)
                return torch.stack(gradients)

            self._read.taps.append(EdgeTap(value, rows, to_heads, heads))
            return value.clone()

        if normed is not None:
            yield self._keep_joined(normed, kept)
        order = (layer, SITES["attn_out"].order - _EARLIER)
        yield self._add((tap.path, tap.side, tap.item), order, step)

    def _projection(
        self, attention: Attention, path: str, parts: list[tuple[TensorLayout, list[int]]]
    ) -> Iterator[CircuitStep]:
        """Yield a step that differentiates by queries, keys or values; the norm of the stream has
        one input for each receiver."""
        norm = self._attention_norm(attention)
        rows = [row for _, rows in parts for row in rows]

        def step(value: Tensor, module: nn.Module, given: Tensor) -> Tensor:
            assert self._stream is not None
            given = given.detach()
            stream, weight = self._stream.detach(), get_linear_map(module).detach()
            self._check_input(self._normed(norm, stream, given), given)

            def to_stream(gradient: Tensor) -> Tensor:
                gradients: list[Tensor] = []
                for layout, rows in parts:
                    heads = [self._receivers[row][1] for row in rows]
                    tensor = self._at(view_layout(gradient, layout))[:, heads]
                    columns = view_layout(weight[None], layout)[0][:, heads].to(tensor)
                    gradients.append(torch.einsum("krh,drh->rkd", tensor, columns))
                return self._before_norm(norm, stream, torch.cat(gradients), given)

            self._read.taps.append(
                EdgeTap(value, rows, to_stream, sublayers=len(self._outputs) - 1)
            )
            return value.clone()

        layer, order = _rank(SiteRead("q", attention.layer, attention.stack))
        yield self._add((path, "out", 0), (layer, order - _EARLIER), step)

    def _at_whole(self, norm: str | None, row: int, value: Tensor) -> Tensor:
        stream = None if self._stream is None else self._stream.detach()
        if norm is not None:
            assert stream is not None
            self._check_input(self._normed(norm, stream, value.detach()), value.detach())

        def to_stream(gradient: Tensor) -> Tensor:
            tensor = self._at(gradient)[None]
            if norm is None:
                return tensor
            assert stream is not None
            return self._before_norm(norm, stream, tensor, gradient)

        self._read.taps.append(EdgeTap(value, [row], to_stream, sublayers=len(self._outputs) - 1))
        return value.clone()

    def _at_earlier_end(self, row: int, value: Tensor, reader: SiteRead) -> Tensor:
        seen, every = value.clone(), self._read.fills
        count = sum(
            sender_fill.count for sender_fill in every if _is_before(sender_fill.where, reader)
        )
        tap = EdgeTap(
            seen,
            [row],
            lambda gradient: self._at(gradient)[None],
            None if self._sublayers else slice(0, count),
            len(self._outputs) - 1,
        )
        self._read.taps.append(tap)
        return seen.clone()

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


def compute_edge_scores(
    total: Tensor,
    reads: Sequence[CircuitRead],
    senders: Sequence[slice],
    leaves: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """Return [place, receiver, sender] for each read: the derivative of a value by the shares of
    edges at the tokens of each of `read.places`, at shares of 0; [1, receiver, sender] of all
    tokens without. Also return the derivative by further leaves.

    All edges into the receivers of a module are one matrix product for each place.

    Args:
        total: The value, from a pass with all reads.
        reads: What the pass read; their `taps` are removed.
        senders: Of each read, those whose edges are wanted; others get 0.
        leaves: Other tensors that the value depends on.

    Raises:
        AutogradFailed: The model can't be differentiated.
    """
    parts = [[own for _, own in read.parts] or [read] for read in reads]
    tapped = [tap.tensor for every in parts for part in every for tap in part.taps]
    gradients = iter(compute_gradients(total, [*tapped, *leaves], keep=False))
    edge_scores: list[Tensor] = []
    for read, every, sender in zip(reads, parts, senders, strict=True):
        scores = [
            _score_edges(part, [next(gradients) for _ in part.taps], sender) for part in every
        ]
        edge_scores.append(torch.stack(scores).sum(0))
        read.parts.clear()
    return edge_scores, [*gradients]


def _score_edges(read: CircuitRead, gradients: Sequence[Tensor], senders: slice) -> Tensor:
    """Return [place, receiver, sender]: the scores of the edges of one read.

    Args:
        gradients: Those by the tensors of its taps.
        senders: Those whose edges are wanted.
    """
    changes = read.changes
    assert changes is not None
    masks = [None]
    if read.places is not None:
        masks = [read.places == place for place in range(int(read.places.max()) + 1)]
    size = len(masks), len(read.receivers), len(changes)
    edges = torch.zeros(size, dtype=torch.float64, device=changes.device)
    for tap, gradient in zip(read.taps, gradients, strict=True):
        receiver, _ = read.receivers[tap.receivers[0]]
        before = [fill.count for fill in read.fills if _is_before(fill.where, receiver)]
        due = range(sum(before) if tap.senders is None else tap.senders.stop)[senders]
        if not due:
            continue
        vectors = tap.to_stream(gradient)
        parts = [(tap.senders or slice(due.start, due.stop), vectors)]
        if read.to_senders is not None and tap.senders is None:
            parts = read.to_senders(vectors, tap.sublayers)
        for columns, part in parts:
            own = slice(max(columns.start, due.start), min(columns.stop, due.stop))
            for place, mask in enumerate(masks if own.start < own.stop else ()):
                given, change = part.to(changes), changes[own]
                if mask is not None:
                    given, change = given[:, mask], change[:, mask]
                product = given.flatten(1) @ change.flatten(1).T
                edges[place, tap.receivers, own] += product.to(edges)
    read.taps.clear()
    return edges


def _is_before(sender: SiteRead, receiver: SiteRead) -> bool:
    """Whether a receiver may read the output of a sender of its stream."""
    return _find_sublayer(sender) < _find_sublayer(receiver)


def _find_sublayer(where: SiteRead) -> tuple[float, int]:
    """Return the layer and the number in it of the sublayer that a sender or receiver belongs to,
    in forward order."""
    if where.layer is None or (where.stack == "cross" and where.site in ("k", "v")):
        return inf, 0  # the end of the stream
    if where.site == "resid_pre":
        return -1, 0
    if where.site in (*MLP_INPUTS, "mlp_out"):
        return where.layer, 2
    return where.layer, int(where.stack == "cross")


def _rank(where: SiteRead) -> tuple[int, int]:
    """Return the order of a site among the steps at its module, as that of its writes."""
    return write_order(where.site, where.layer)
