"""Models with changed derivatives, from functions that replace those of their modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface


def ruled(model: nn.Module, kind: str) -> nn.Module:
    """A copy of a model, with the derivatives of `relp` or `gim`."""
    model = copy.deepcopy(model)
    for name, part in model.named_modules():
        words = name.split(".")
        if "encoder" in words or words[-1] in ("EncDecAttention", "encoder_attn", "cross_attn"):
            vars(part)["causal_in_reference"] = False
    for part in list(model.modules()):
        name = type(part).__name__
        if "norm" in name.lower():
            norm = _layer_norm(part) if isinstance(part, nn.LayerNorm) else _rms_norm(part)
            setattr(part, "forward", norm)  # noqa: B010
        elif kind == "relp" and ("GELU" in name or "SiLU" in name or name == "ReLU"):
            part.forward = _ratio(part.forward)
        elif hasattr(part, "gate_proj"):
            vars(part)["product_in_reference"] = _product
            part.forward = _gated(part.act_fn, part.gate_proj, part.up_proj, part.down_proj)
        elif hasattr(part, "wi_1"):  # T5
            vars(part)["product_in_reference"] = _product
            part.forward = _gated(part.act, part.wi_0, part.wi_1, part.wo)
    if kind == "gim":
        AttentionInterface.register("flattened", attend_flattened)
        AttentionMaskInterface.register("flattened", lambda *_, **__: None)
        model.set_attn_implementation("flattened")  # pyright: ignore[reportCallIssue]
    return model


def _layer_norm(part: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        left = x - x.mean(-1, keepdim=True)
        deviation = torch.sqrt(left.pow(2).mean(-1, keepdim=True) + part.eps)
        return left / deviation.detach() * part.weight + part.bias

    return forward


def _rms_norm(part: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if hasattr(part, "variance_epsilon"):
            eps, weight = part.variance_epsilon, part.weight
        else:  # Gemma
            eps, weight = part.eps, 1 + part.weight
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps).detach() * weight

    return forward


def _ratio(own: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x * (own(x) / x).detach()


def _gated(act: Any, gate_proj: Any, up_proj: Any, down_proj: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return down_proj(_product(act(gate_proj(x)), up_proj(x)))

    return forward


def _product(gate: Tensor, up: Tensor) -> Tensor:
    return (gate * up.detach() + gate.detach() * up) / 2


def multiply_gate(module: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """The product of a gated MLP's activated gate and its other factor, in a copy of a model with
    its derivatives."""
    return getattr(module, "product_in_reference", torch.mul)(gate, up)


class FlatSoftmax(torch.autograd.Function):
    """Softmax with the derivatives at twice the temperature."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(torch.softmax(scores / 2, -1))
        return torch.softmax(scores, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (flat,) = ctx.saved_tensors
        jacobian = torch.diag_embed(flat) - flat[..., :, None] * flat[..., None, :]
        return (jacobian @ grad[..., None])[..., 0]


def attend_flattened(
    module: Any, q: Tensor, k: Tensor, v: Tensor, *masks: Any, **given: Any
) -> Any:
    shared = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(shared, 1) for each in (k, v))
    for part, divisor in ((q, 4), (k, 4), (v, 2)):
        if part.requires_grad:
            part.register_hook(lambda grad, divisor=divisor: grad / divisor)
    scale = given.get("scaling") or q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2) * scale
    if (cap := given.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    if (bias := given.get("position_bias")) is not None:
        scores = scores + bias
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if sees_earlier_tokens(module):
        seen = seen.tril()
    if (window := given.get("sliding_window")) is not None:
        seen = seen.triu(1 - window)
    if masks and isinstance(masks[0], Tensor):  # a mask that the model makes itself
        scores = scores + masks[0]
    weights = FlatSoftmax.apply(scores.masked_fill(~seen, float("-inf")))
    return (weights @ v).transpose(1, 2).contiguous(), None


def sees_earlier_tokens(module: nn.Module) -> bool:
    """Whether queries see no later keys, of an attention module of a copy of a model."""
    return getattr(module, "causal_in_reference", True)
