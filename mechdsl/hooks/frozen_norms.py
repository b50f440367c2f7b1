# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Norms that divide by what they divide by in another pass: then they are linear."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mechdsl.base.arrays import Bools
from mechdsl.hooks.batch import on_device
from mechdsl.hooks.hook_points import given_to
from mechdsl.hooks.loaded import LoadedModel

TOLERANCE = 1e-3
"""How far a norm may be from a linear map divided by a scale, relative to what it gives."""
SMALL, LARGE = 1e-3, 1e3
"""Sizes of vectors by which ε is found: it is part of the one, and nothing beside the other."""

Scales = Mapping[str, list[Tensor]]
"""By path of a norm, what each of its calls divides by, [..., 1]."""


class FrozenNorms:
    """The norms of a model, of which some rows of a pass can have those of another pass."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    @cached_property
    def _norms(self) -> dict[str, _Norm]:
        wide = torch.promote_types(self.model.dtype, torch.float32)
        return {path: _Norm(module, wide) for path, module in norms_of(self.model.module)}

    @contextmanager
    def recorded(self, rows: Bools) -> Generator[Scales]:
        """What norms divide by in passes meanwhile; nothing, if no row asks for it."""
        found: dict[str, list[Tensor]] = {}
        with ExitStack() as stack:
            for path, norm in self._norms.items() if rows.any() else ():
                own = found.setdefault(path, [])

                def record(
                    module: nn.Module, args: Any, kwargs: Any, out: Tensor,
                    norm: _Norm = norm, own: list[Tensor] = own,
                ) -> None:  # fmt: skip
                    own.append(norm.scale(given_to(args, kwargs)))

                module = self.model.module.get_submodule(path)
                handle = module.register_forward_hook(record, with_kwargs=True)
                stack.callback(handle.remove)
            yield found

    @contextmanager
    def kept(self, rows: Bools, scales: Scales) -> Generator[None]:
        """These rows divide by what was recorded in a pass over the same tokens."""
        with ExitStack() as stack:
            for path, own in scales.items():
                due = iter(own)

                def divide(
                    module: nn.Module, args: Any, kwargs: Any, out: Tensor,
                    norm: _Norm = self._norms[path], due: Any = due,
                ) -> Tensor:  # fmt: skip
                    given, scale = given_to(args, kwargs), next(due)
                    frozen = norm.divided(given, out, scale)
                    each = np.repeat(rows, out.shape[0] // len(rows))
                    chosen = on_device(each, out.device)
                    return torch.where(chosen.view(-1, *[1] * (out.dim() - 1)), frozen, out)

                module = self.model.module.get_submodule(path)
                handle = module.register_forward_hook(divide, with_kwargs=True)
                stack.callback(handle.remove)
            yield


def norms_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every norm of a model, by its path."""
    return [
        (path, part)
        for path, part in module.named_modules()
        if "norm" in type(part).__name__.lower() and not any(part.children())
    ]


def not_linear(module: nn.Module, width: int) -> str | None:
    """The path of a norm that is no linear map divided by a scale; None where all are.

    width: of vectors, where a norm has no weights that tell it.
    """
    for path, norm in norms_of(module):
        try:
            own = next((p.shape[-1] for p in norm.parameters()), width)
            error = _Norm(norm, torch.float32).error(own)
        except (TypeError, RuntimeError, ValueError):
            return path
        if not error < TOLERANCE:
            return path
    return None


class _Norm:
    """A norm: g · (x − mean or x) / √(mean square + ε) + b, or without some of these."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module = copy.deepcopy(module).to(dtype)
        self.dtype = dtype
        self._found: dict[int, tuple[bool, float, Tensor]] = {}

    def scale(self, given: Tensor) -> Tensor:
        """[..., 1]: what vectors [..., width] are divided by."""
        centred, epsilon, _ = self._of(given)
        wide = given.to(self.dtype)
        if centred:
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()

    def divided(self, given: Tensor, out: Tensor, scale: Tensor) -> Tensor:
        """What it gives, `out`, divided by another scale."""
        bias = self._of(given)[2]
        frozen = bias + (out.to(self.dtype) - bias) * (self.scale(given) / scale)
        return frozen.to(out)

    def error(self, width: int) -> float:
        """How far it is from that on vectors that are drawn, large and small, relative to what it
        gives."""
        draw = torch.Generator().manual_seed(0)
        worst = 0.0
        for size in (1e-3, 1.0, 30.0):
            a, b = (torch.randn(1, width, generator=draw, dtype=self.dtype) for _ in range(2))
            a, b = (size * (each + 1).to(self._device) for each in (a, b))
            parts = [self._linear(each) for each in (a, b, a + b)]
            off = (parts[0] + parts[1] - parts[2]).abs().max() / parts[2].abs().max()
            worst = max(worst, float(off))
        return worst

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def _linear(self, vectors: Tensor) -> Tensor:
        return (self._given(vectors) - self._of(vectors)[2]) * self.scale(vectors)

    def _given(self, vectors: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.module(vectors).clone()

    def _of(self, like: Tensor) -> tuple[bool, float, Tensor]:
        """(whether the mean is taken off, ε, bias)"""
        width = like.shape[-1]
        if width not in self._found:
            sign = torch.ones(width, dtype=self.dtype, device=like.device)
            sign[1::2] = -1
            sign[width - width % 2 :] = 0  # its mean is 0
            bias = self._given(torch.zeros_like(sign)[None])
            small, large, raised = (
                self._given(each[None]) - bias
                for each in (SMALL * sign, LARGE * sign, LARGE * (sign + 0.5))
            )
            centred = bool(torch.allclose(raised, large, rtol=1e-3, atol=1e-3))
            share = float(small.norm() / large.norm())
            square = float(sign.square().mean()) * SMALL**2
            epsilon = max(0.0, square * (1 / share**2 - 1)) if share > 0 else float("nan")
            self._found[width] = centred, epsilon, bias
        return self._found[width]
