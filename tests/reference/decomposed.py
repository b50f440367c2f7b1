"""Contextual decomposition by plain hooks on a bare model, one unpadded prompt at a time.

A first pass stores the inputs and outputs of each module. A second pass has irrelevant parts: hooks
replace the results of linear maps and norms, and give queries and keys their stored values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .gradients import Where

Vectors = Mapping[tuple[int, int], Tensor | Callable[[Tensor], Tensor]]
"""Vectors by position and unit, or functions of the irrelevant part that is there."""
OF_IMAGES = ("vision", "visual", "image_tower", "video_tower", "connector", "projector")
"""Words in the names of modules that come before a language model, and whose values are whole."""
QUERIES_AND_KEYS = ("q_proj", "k_proj", "query", "key", "q", "k")


def decompose(
    model: nn.Module, call: Callable[[nn.Module], Tensor], at: Where, written: Vectors
) -> float:
    """The metric of irrelevant parts minus that of the whole, with these vectors written."""
    return decompose_held(model, call, [(at, written)], (), ())[0]


def decompose_held(
    model: nn.Module,
    call: Callable[[nn.Module], Tensor],
    writes: Sequence[tuple[Where, Vectors]],
    held: Sequence[Where],
    ends: Sequence[Where],
) -> tuple[float, list[Tensor]]:
    """The same with the values of the whole at some sites except for the written vectors, and the
    irrelevant parts of other sites, [position, unit, width] each."""
    seen: dict[Where, Tensor] = {}
    heads = getattr(model.config, "num_attention_heads", 0)  # only of GPT-NeoX
    taken: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    routed: dict[str, tuple[Tensor, ...]] = {}
    parts = {
        name: part
        for name, part in model.named_modules()
        if not any(word in name for word in OF_IMAGES)
        and (
            isinstance(part, nn.Linear)
            or type(part).__name__ == "Conv1D"
            or "norm" in type(part).__name__.lower()
            or name.endswith(".experts")
        )
    }

    def store(name: str) -> Any:
        def hook(part: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            taken[name], given[name] = args[0], out
            routed[name] = args[1:]

        return hook

    def replace(name: str) -> Any:
        def hook(part: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if name.endswith(".experts"):
                return _sum_of_experts(part, args[0], *routed[name])
            return _irrelevant(name, part, args[0], taken[name], given[name], heads)

        return hook

    def write(at: Where, written: Vectors) -> tuple[Any, Any]:
        def put(value: Tensor) -> Tensor:
            flat = value.reshape(value.shape[1], at.units, -1).clone()
            for (position, unit), vector in written.items():
                now = flat[position, unit]
                flat[position, unit] = vector(now) if callable(vector) else vector
            return flat.reshape(value.shape)

        def entering(part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (put(args[0]), *args[1:])

        def leaving(part: nn.Module, args: Any, out: Any) -> Any:
            return (put(out[0]), *out[1:]) if isinstance(out, tuple) else put(out)

        return entering, leaving

    def keep(end: Where) -> Any:
        def hook(part: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
            value = args[0] if end.side == "in" else (out[0] if isinstance(out, tuple) else out)
            seen[end] = value.detach().reshape(value.shape[1], end.units, -1)

        return hook

    def fix(name: str, side: str) -> tuple[Any, Any]:
        def before(part: nn.Module, args: tuple[Tensor, ...]) -> Any:
            return (fixed[name, side], *args[1:])

        def after(part: nn.Module, args: Any, out: Any) -> Any:
            return fixed[name, side]

        def record(part: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            fixed[name, side] = args[0] if side == "in" else out

        return record, before if side == "in" else after

    fixed: dict[tuple[str, str], Tensor] = {}
    holds = {own: fix(own.path, own.side) for own in held}

    def change(own: Where, entering: Any, leaving: Any) -> Any:
        part = model.get_submodule(own.path)
        if own.side == "in":
            return part.register_forward_pre_hook(entering)
        return part.register_forward_hook(leaving)

    with torch.no_grad():
        handles = [part.register_forward_hook(store(name)) for name, part in parts.items()]
        for own, (record, _) in holds.items():
            handles.append(model.get_submodule(own.path).register_forward_hook(record))
        whole = float(call(model))
        for handle in handles:
            handle.remove()
        handles = [part.register_forward_hook(replace(name)) for name, part in parts.items()]
        handles += [change(own, hook, hook) for own, (_, hook) in holds.items()]
        handles += [model.get_submodule(end.path).register_forward_hook(keep(end)) for end in ends]
        handles += [change(at, *write(at, written)) for at, written in writes]
        found = float(call(model))
        for handle in handles:
            handle.remove()
    return found - whole, [seen[end] for end in ends]


def _sum_of_experts(experts: Any, now: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The outputs of experts for irrelevant parts, with the selection of the whole."""
    found = torch.zeros_like(now)
    for token, value in enumerate(now):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ value).chunk(2)
            found[token] += weight * (experts.down_proj[expert] @ (experts.act_fn(gate) * up))
    return found


def _irrelevant(
    name: str, part: Any, now: Tensor, before: Tensor, whole: Tensor, heads: int
) -> Tensor:
    """The irrelevant part of a module's output."""
    last = name.rsplit(".", 1)[-1]
    if last in QUERIES_AND_KEYS:
        return whole
    if "norm" in type(part).__name__.lower():
        centers = isinstance(part, nn.LayerNorm)
        eps = part.variance_epsilon if hasattr(part, "variance_epsilon") else part.eps
        middle = [x.mean(-1, keepdim=True) if centers else 0 for x in (now, before)]
        size = torch.sqrt((before - middle[1]).pow(2).mean(-1, keepdim=True) + eps)
        weight = 1 + part.weight if "Gemma" in type(part).__name__ else part.weight
        mapped = (now - middle[0]) / size * weight
        relevant = (before - now - middle[1] + middle[0]) / size * weight
    else:
        weight = part.weight if type(part).__name__ == "Conv1D" else part.weight.T
        mapped, relevant = now @ weight, (before - now) @ weight
    bias = getattr(part, "bias", None)
    if bias is not None:
        size = mapped.abs() + relevant.abs()
        mapped = mapped + bias * torch.where(size > 0, mapped.abs() / size, 1)
    if last == "c_attn":
        width = mapped.shape[-1] // 3
        mapped = torch.cat([whole[..., : 2 * width], mapped[..., 2 * width :]], -1)
    if last == "query_key_value":  # of GPT-NeoX, by head
        parts = [each.unflatten(-1, (heads, 3, -1)) for each in (whole, mapped)]
        mapped = torch.cat([parts[0][..., :2, :], parts[1][..., 2:, :]], -2).flatten(-3)
    return mapped
