"""Inputs that a model is tested on, and all activations read on them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.hook_points import apply_scale, get_scale
from mechdsl.forward.hooks.model import CheckOutcome, LoadedModel, call_model
from mechdsl.forward.hooks.module_exchange import get_activation
from mechdsl.models.anatomy import Anatomy, Family, HookPoint, ModelInputs, find_family
from mechdsl.models.shape import ModelShape
from mechdsl.vocab.sites import SITES

_IMAGE_MASKS = ("token_type_ids", "mm_token_type_ids")
"""What models call their mask of an image's tokens."""

_TOKENS_BEFORE_IMAGE = 2
"""Tokens of a prompt in front of its image."""


def get_config(model: LoadedModel) -> Mapping[str, Any]:
    """The whole model's config."""
    return cast(Any, model.module).config.to_dict()


def get_family(model: LoadedModel) -> type[Family]:
    """The entry of the whole model, not of its language model alone."""
    return find_family(str(get_config(model).get("model_type")))


def draw_noise(shape: tuple[int, ...], model: LoadedModel) -> Tensor:
    """Noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(model.device, model.dtype)


def build_inputs(model: LoadedModel, inputs: ModelInputs) -> dict[str, Tensor]:
    """Inputs of two prompts, one behind the other."""
    return {
        name: torch.tensor([*one, *one], device=model.device)
        if isinstance(one, list)
        else draw_noise((2 * one[0], *one[1:]), model)
        for name, one in inputs.items()
    }


def build_image_inputs(model: LoadedModel) -> dict[str, Tensor]:
    """What two images are given as."""
    return build_inputs(model, get_family(model).picture(get_config(model)))


def add_sounds(model: LoadedModel, tokens: Batch) -> Batch:
    """Prompts of a decoder, each with a sound for the encoder."""
    heard = build_inputs(model, get_family(model).sound(get_config(model)))
    read = model.stack("cross").anatomy.blocks[0].projections[-1]
    count = count_module_tokens(model, read, {**heard, "decoder_input_ids": tokens.ids})
    return tokens.with_inputs(heard, encoder=Batch.grid(2, count, model.device))


def build_image_prompts(model: LoadedModel, texts: Sequence[Sequence[int]]) -> Batch:
    """Two prompts, each with an image behind its second token."""
    extra = build_image_inputs(model)
    count = _count_image_tokens(model, extra)
    mark = get_image_token(model)
    rows = [
        [*text[:_TOKENS_BEFORE_IMAGE], *([mark] * count), *text[_TOKENS_BEFORE_IMAGE:]]
        for text in texts
    ]
    batch = Batch.of(rows, model.pad_id, model.calling.side, model.device)
    known = inspect.signature(model.module.forward).parameters
    extra |= {name: (batch.ids == mark).long() for name in _IMAGE_MASKS if name in known}
    given = {"input_ids": batch.ids, "attention_mask": batch.mask, **extra}
    patches = count_module_tokens(model, model.stack("vision").anatomy.blocks[0].path, given)
    return batch.with_inputs(extra, vision=Batch.grid(2, patches, model.device))


_POSITION_TABLES = re.compile(
    r"(^|[._])(wpe|w_?pos|pos(ition(al|s)?)?(_\w+)?|embed_positions)$", re.I
)
"""What tables of learned positions are called."""


def find_max_tokens(model: LoadedModel) -> int | None:
    """How many tokens a text may have, by the config and the tables of learned positions; None
    where neither says it."""
    most = [model.shape.max_positions] if model.shape.max_positions else []
    width = (model.shape.d_model, model.shape.d_embed)
    if model.shape.takes != "text":
        return min(most, default=None)
    for path, weight in model.module.named_parameters():
        table = path.removesuffix(".weight")
        if not _POSITION_TABLES.search(table) or weight.dim() not in (2, 3):
            continue
        if weight.shape[-1] not in width:
            continue
        owner = model.module.get_submodule(table) if table != path else None
        # Some leave rows in front for padding.
        padding = getattr(owner, "padding_idx", None)
        unused = getattr(owner, "offset", 0 if padding is None else padding + 1)
        most.append(int(weight.shape[-2]) - unused)
    return min((one for one in most if one > 0), default=None)


def get_image_token(model: LoadedModel) -> int:
    """The token that stands for a part of an image; ValueError where the config names none."""
    config = get_config(model)
    for key in ("image_token_id", "image_token_index"):
        if isinstance(token := config.get(key), int):
            return token
    raise ValueError("its config doesn't say which token stands for an image")


def _count_image_tokens(model: LoadedModel, extra: Mapping[str, Tensor]) -> int:
    """How many tokens one image takes up in a prompt."""
    parts: Any = (model.module, getattr(model.module, "model", None))
    features_of = next(
        (found for part in parts if (found := getattr(part, "get_image_features", None))), None
    )
    if features_of is None:
        raise ValueError("it has no `get_image_features` that tells how many tokens an image takes")
    known = inspect.signature(features_of).parameters
    with torch.inference_mode():
        features = features_of(**{name: value for name, value in extra.items() if name in known})
    if (pooled := getattr(features, "pooler_output", None)) is not None:
        features = pooled
    features = getattr(features, "last_hidden_state", features)
    rows = features if isinstance(features, (tuple, list)) else [features]
    return sum(int(one.numel() // one.shape[-1]) for one in rows) // 2


def count_module_tokens(model: LoadedModel, path: str, given: Mapping[str, Tensor]) -> int:
    """How many tokens of a row enter a module; rows may lie in one dimension."""
    seen: list[int] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = get_activation(args, kwargs)
        seen.append(hidden.numel() // hidden.shape[-1] // 2)

    handle = model.module.get_submodule(path).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.inference_mode():
            call_model(model, given)
    finally:
        handle.remove()
    return seen[0]


PROMPT_LENGTHS = (5, 4)
"""Tokens of the two prompts, where the model has as many positions."""


def build_text_sample(model: LoadedModel) -> Batch:
    """Two rows of nothing but tokens."""
    rows = draw_prompts(model, PROMPT_LENGTHS, seed=0)
    return Batch.of(rows, model.pad_id, model.calling.side, model.device)


def draw_prompts(model: LoadedModel, lengths: tuple[int, int], seed: int) -> list[list[int]]:
    """Ragged prompts of different tokens, none of which stands for padding or an image; the second
    has the token for masked ones in it, where there is one, as that may be treated apart. They
    begin as the tokenizer begins its texts, and have no more tokens than the model has positions.
    """
    longest = min(lengths[0], find_max_tokens(model) or lengths[0])
    lengths = longest, min(lengths[1], max(1, longest - 1))
    opening = list(model.tokenizer.opening) if model.tokenizer is not None else []
    special = {model.pad_id} | {
        value
        for key, value in get_config(model).items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randperm(model.shape.vocab_size, generator=generator).tolist()
    draws = [token for token in draws if token not in special] or draws
    draws = draws * (1 + sum(lengths) // len(draws))
    rows = [[*opening, *draws[: lengths[0]]], [*opening, *draws[lengths[0] :]]]
    mask = get_config(model).get("mask_token_id")
    if isinstance(mask, int) and 0 <= mask < model.shape.vocab_size and mask != model.pad_id:
        rows[1][1] = mask
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


_TOLERANCE = {
    torch.float64: 1e-5,  # some models compute parts in float32 all the same
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Relative to the largest value compared; a wrong tap is off by about 1."""


def amplify(values: Tensor, site: str, anatomy: Anatomy) -> Tensor:
    """Values times 100. Behind queries and keys there must be no norm, but for families that norm
    them after rotary; behind other sites there is one, which undoes a change of scale alone, so
    their sign changes too."""
    limit = torch.finfo(values.dtype).max / 100  # half precision ends at 65504
    bare = site in ("q", "k") and not anatomy.norms_behind_rotary
    return (values.double() * (100 if bare else -100)).clamp(-limit, limit)


_MAX_LAYERS = 6
"""Writes are tried on every layer of a model up to this depth, else on first, middle and last."""

_MAX_TOKENS = 64
"""Of rows with more tokens (images, sounds) one is looked at, and what single heads and experts add
in some layers only."""

_WIDE_SITES = ("head_out", "expert_out")

MAX_CHECK_TOKENS = 4096
"""Tokens of the rows that are written in one pass."""

TensorComparison = tuple[str, Tensor, Tensor] | tuple[str, Tensor, Tensor, Tensor]
"""(where, found, expected), and what `found` is the sum of."""

_WORSE_FACTOR = 1.01
"""How many times as far off a comparison has to be to be named in place of an earlier one."""


@dataclass
class CheckBench:
    """A ragged batch, padded, and everything that was read on it in one stack."""

    model: LoadedModel
    stack: str
    batch: Batch
    own: Batch
    """The tokens of the stack."""
    logits: Tensor
    reads: dict[SiteRead, Tensor]

    @staticmethod
    def of(model: LoadedModel, stack: str, batch: Batch) -> CheckBench:
        anatomy = model.stack(stack).anatomy
        long = max(batch.ids.shape[1], batch.of_site("z", stack).ids.shape[1]) > _MAX_TOKENS
        batch = batch.part(slice(0, 1)) if long else batch
        wanted = [
            SiteRead(name, layer, stack)
            for name in list_sites(model, stack)
            for layer in _choose_layers(anatomy, name, few=long and name in _WIDE_SITES)
        ]
        result = run_full(model, batch, reads=[*wanted, *list_linked_reads(model, stack)])
        assert result.logits is not None
        own = batch.of_site("z", stack)
        return CheckBench(model, stack, batch, own, result.logits, result.reads)

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
        return _choose_layers(self.anatomy, site, few=True)

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
            return get_first(self.module(path)(tokens))
        parts = tokens.split(lengths)
        return torch.cat([get_first(self.module(path)(own[None]))[0] for own in parts])

    def scaled(self, tap: HookPoint, value: Tensor) -> Tensor:
        """What a tapped tensor is to the stream."""
        return apply_scale(value, get_scale(self.model.module, tap))

    @property
    def tolerance(self) -> float:
        return _TOLERANCE.get(self.model.dtype, 1e-1)

    def equal(
        self, identity: str, pairs: Iterable[TensorComparison], tolerance: float = 0.0
    ) -> CheckOutcome:
        """One outcome for many comparisons of (where, found, expected): the worst of them. Sums
        come with what is added up, as rounding goes by the size of that."""
        worst, named, at, compared = 0.0, 0.0, "", 0
        for where, found, expected, *added in pairs:
            error = compute_difference(found, expected, *added)
            compared += 1
            worst = max(worst, error)
            if error > _WORSE_FACTOR * named:  # of equal ones the first, however they round
                named, at = error, where
        limit = tolerance or self.tolerance
        return CheckOutcome(identity, worst, limit, at, compared=compared)


def list_linked_reads(model: LoadedModel, stack: str) -> list[SiteRead]:
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


def list_sites(model: LoadedModel, stack: str) -> list[str]:
    own = model.stack(stack)
    return [name for name in SITES if name in own.shape.sites]


def list_layers(anatomy: Anatomy, site: str) -> tuple[int, ...]:
    return anatomy.layers(site)


def _choose_layers(anatomy: Anatomy, site: str, *, few: bool) -> Sequence[int | None]:
    """Layers that a site is read in, or tried in."""
    if not SITES[site].has_layer:
        return (None,)
    layers = list_layers(anatomy, site)
    n = len(layers)
    return (layers[0], layers[n // 2], layers[-1]) if few and n > _MAX_LAYERS else layers


def get_first(output: Any) -> Tensor:
    """What a module returns, without what else comes with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def compute_difference(found: Tensor, expected: Tensor, added: Tensor | None = None) -> float:
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


def has_images(batch: Batch) -> bool:
    return "vision" in batch.frames


def write_whole_site(
    where: SiteRead, row: int, positions: Sequence[int], values: Tensor
) -> SiteWrite:
    """All units of a site at `positions` of one row; `values` is [positions, units, width]."""
    count, heads, size = values.shape
    rows = torch.full((count * heads,), row)
    places = torch.tensor(list(positions)).repeat_interleave(heads)
    which = torch.arange(heads).repeat(count)
    flat = values.reshape(-1, size)
    return SiteWrite(where.site, where.layer, rows, places, which, flat, stack=where.stack)


def label_site(site: str, layer: int | None) -> str:
    return site if layer is None else f"{site} layer {layer}"
