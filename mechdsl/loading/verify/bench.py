# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""What checks look at: a small batch, and everything that was read on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechdsl.hooks.batch import Batch
from mechdsl.hooks.hook_points import scale_of, scaled
from mechdsl.hooks.loaded import LoadedModel, Outcome
from mechdsl.hooks.reads_and_writes import SiteRead
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.models.anatomy import Anatomy, HookPoint
from mechdsl.models.shape import ModelShape
from mechdsl.vocab.sites import SITES

_TOLERANCE = {
    torch.float64: 1e-5,  # some models compute parts in float32 all the same
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Relative to the largest value compared; a wrong tap is off by about 1."""


def hundredfold(values: Tensor, site: str, anatomy: Anatomy) -> Tensor:
    """Values times 100. Behind queries and keys there must be no norm, but for families that norm
    them after rotary; behind other sites there is one, which undoes a change of scale alone, so
    their sign changes too."""
    limit = torch.finfo(values.dtype).max / 100  # half precision ends at 65504
    bare = site in ("q", "k") and not anatomy.norms_behind_rotary
    return (values.double() * (100 if bare else -100)).clamp(-limit, limit)


_MAX_LAYERS = 6
"""Writes are tried on every layer of a model up to this depth, else on first, middle and last."""
_LONG = 64
"""Of rows with more tokens (images, sounds) one is looked at, and what single heads and experts add
in some layers only."""
_WIDE = ("head_out", "expert_out")
TOKENS_PER_PASS = 4096
"""Tokens of the rows that are written in one pass."""


Pair = tuple[str, Tensor, Tensor] | tuple[str, Tensor, Tensor, Tensor]
"""(where, found, expected), and what `found` is the sum of."""


_CLEARLY = 1.01
"""How many times as far off a comparison has to be to be named in place of an earlier one."""


@dataclass
class Bench:
    """A ragged batch, padded, and everything that was read on it in one stack."""

    model: LoadedModel
    stack: str
    batch: Batch
    own: Batch
    """The tokens of the stack."""
    logits: Tensor
    reads: dict[SiteRead, Tensor]

    @staticmethod
    def of(model: LoadedModel, stack: str, batch: Batch) -> Bench:
        anatomy = model.stack(stack).anatomy
        long = max(batch.ids.shape[1], batch.of_site("z", stack).ids.shape[1]) > _LONG
        batch = batch.part(slice(0, 1)) if long else batch
        wanted = [
            SiteRead(name, layer, stack)
            for name in sites_of(model, stack)
            for layer in _read(anatomy, name, few=long and name in _WIDE)
        ]
        result = run_whole(model, batch, reads=[*wanted, *beside(model, stack)])
        assert result.logits is not None
        own = batch.of_site("z", stack)
        return Bench(model, stack, batch, own, result.logits, result.reads)

    @property
    def anatomy(self) -> Anatomy:
        return self.model.stack(self.stack).anatomy

    @property
    def shape(self) -> ModelShape:
        return self.model.stack(self.stack).shape

    @property
    def layers(self) -> range:
        return range(self.shape.n_layers)

    def with_sites(self, *sites: str) -> list[int]:
        """Blocks that have all of these sites, and where they were read."""
        there = [{SiteRead(site, n, self.stack) for site in sites} for n in self.layers]
        return [n for n in self.layers if there[n] <= self.reads.keys()]

    def some(self, site: str) -> Sequence[int | None]:
        """Blocks that writing a site is tried in."""
        if not SITES[site].has_layer:
            return (None,)
        return _read(self.anatomy, site, few=True)

    def read(self, site: str, layer: int | None = None) -> Tensor:
        """[tokens, units, width]: one site on the real tokens."""
        return self.real(self.reads[SiteRead(site, layer, self.stack)], site)

    def vectors(self, site: str, layer: int | None = None) -> Tensor:
        """[tokens, width] of a whole-vector site."""
        return self.read(site, layer).squeeze(1)

    def of_stack(self, stack: str, site: str, layer: int | None = None) -> Tensor | None:
        """[tokens, width] of a site beside this stack (`beside`); None where there is none."""
        found = self.reads.get(SiteRead(site, layer, stack))
        if found is None:
            return None
        mask = self.batch.of_site(site, stack).mask.to(found.device).bool()
        return (found[mask] if found.shape[:2] == mask.shape else found).squeeze(1)

    def between(self, layer: int) -> Tensor | None:
        """[tokens, d_model]: the stream that the MLP's norm reads, behind cross attention too where
        there is one; None where the block has no `resid_mid`."""
        if self.stack == "cross":
            return None
        if self.anatomy.parallel:
            return self.vectors("resid_pre", layer)
        block = self.anatomy.blocks[layer]
        if "resid_mid" not in block.taps:
            alone = block.adds_up and not {"attn_norm", "mixer_norm"} & block.taps.keys()
            return self.vectors("resid_pre", layer) if alone else None
        stream = self.vectors("resid_mid", layer)
        crossed = None if self.stack else self.of_stack("cross", "attn_out", layer)
        if crossed is None:
            return stream
        stream = stream + crossed
        middle = self.model.stack("cross").anatomy.blocks[layer].middle
        return stream if middle is None else self.module(middle)(stream)

    def real(self, tensor: Tensor, site: str = "z") -> Tensor:
        """[tokens, …] of a [B, T, …] tensor, padding left out; all of it for whole images."""
        mask = self.batch.of_site(site, self.stack).mask.to(tensor.device).bool()
        return tensor[mask] if tensor.shape[:2] == mask.shape else tensor

    def output(self, logits: Tensor) -> Tensor:
        """The model's output on the real tokens of the main stack."""
        mask = self.batch.mask.to(logits.device).bool()
        return logits[mask] if logits.shape[:2] == mask.shape else logits

    def read_of(self, prompt: int, site: str, layer: int | None) -> Tensor:
        """[tokens, units, width]: one site of one prompt."""
        return self.real_of(prompt, self.reads[SiteRead(site, layer, self.stack)], self.batch)

    @staticmethod
    def real_of(row: int, tensor: Tensor, batch: Batch) -> Tensor:
        """[tokens, …] of one row of a [B, T, …] tensor."""
        mask = batch.mask[row].to(tensor.device).bool()
        return tensor[row][mask] if tensor.shape[1] == len(mask) else tensor[row]

    def module(self, path: str) -> torch.nn.Module:
        return self.model.module.get_submodule(path)

    def through(self, path: str, tokens: Tensor) -> Tensor:
        """[tokens, width]: what a module makes of tokens, each prompt's by themselves."""
        lengths = self.own.lengths.tolist()
        if sum(lengths) != len(tokens):
            return first_of(self.module(path)(tokens))
        parts = tokens.split(lengths)
        return torch.cat([first_of(self.module(path)(own[None]))[0] for own in parts])

    def scaled(self, tap: HookPoint, value: Tensor) -> Tensor:
        """What a tapped tensor is to the stream."""
        return scaled(value, scale_of(self.model.module, tap))

    @property
    def tolerance(self) -> float:
        return _TOLERANCE.get(self.model.dtype, 1e-1)

    def equal(self, identity: str, pairs: Iterable[Pair], tolerance: float = 0.0) -> Outcome:
        """One outcome for many comparisons of (where, found, expected): the worst of them. Sums
        come with what is added up, as rounding goes by the size of that."""
        worst, named, at, compared = 0.0, 0.0, "", 0
        for where, found, expected, *added in pairs:
            error = difference(found, expected, *added)
            compared += 1
            worst = max(worst, error)
            if error > _CLEARLY * named:  # of equal ones the first, however they round
                named, at = error, where
        limit = tolerance or self.tolerance
        return Outcome(identity, worst, limit, at, compared=compared)


def beside(model: LoadedModel, stack: str) -> list[SiteRead]:
    """What belongs to another stack and is added to this one, or read by it, or made of it."""
    if stack == "vision":
        return [SiteRead("embed")]
    if "cross" not in model.others or stack not in ("", "cross"):
        return []
    site, other = ("resid_mid", "") if stack else ("attn_out", "cross")
    anatomy = model.stack(other).anatomy
    reads = [SiteRead(site, layer, other) for layer in anatomy.layers(site)]
    if stack and "encoder" in model.others and "final_norm" in model.stack("encoder").shape.sites:
        reads.append(SiteRead("final_norm", None, "encoder"))
    return reads


def sites_of(model: LoadedModel, stack: str) -> list[str]:
    own = model.stack(stack)
    return [name for name in SITES if name in own.shape.sites]


def layers_of(anatomy: Anatomy, site: str) -> tuple[int, ...]:
    return anatomy.layers(site)


def _read(anatomy: Anatomy, site: str, *, few: bool) -> Sequence[int | None]:
    """Layers that a site is read in, or tried in."""
    if not SITES[site].has_layer:
        return (None,)
    layers = layers_of(anatomy, site)
    n = len(layers)
    return (layers[0], layers[n // 2], layers[-1]) if few and n > _MAX_LAYERS else layers


def first_of(output: Any) -> Tensor:
    """What a module returns, without what else comes with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def difference(found: Tensor, expected: Tensor, added: Tensor | None = None) -> float:
    """Largest difference, relative to the largest value expected, or added up to it; infinite where
    one is NaN."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    error = float((found.double() - expected.double()).abs().max())
    size = max(float(one.double().abs().max()) for one in (expected, added) if one is not None)
    return error / (size or 1.0) if error == error and size == size else float("inf")


# --- the parts add up --------------------------------------------------------------------------


def with_images(batch: Batch) -> bool:
    return "vision" in batch.frames
