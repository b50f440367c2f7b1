"""Test inputs for a model, and all activations read on them."""

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
from mechdsl.forward.hooks.model import (
    CheckOutcome,
    LoadedModel,
    VisionColumns,
    call_model,
    without_vectors,
)
from mechdsl.forward.hooks.module_exchange import get_activation
from mechdsl.models.anatomy import ATTENDED, Anatomy, Family, HookPoint, ModelInputs, find_family
from mechdsl.models.shape import ModelShape
from mechdsl.vocab.sites import SITES

_IMAGE_MASKS = ("token_type_ids", "mm_token_type_ids")
"""Names that models use for their mask of image tokens."""

_TOKENS_BEFORE_IMAGE = 2
"""Number of prompt tokens before the image."""


def get_config(model: LoadedModel) -> Mapping[str, Any]:
    """Return the whole model's config."""
    return cast(Any, model.module).config.to_dict()


def get_family(model: LoadedModel) -> Family:
    """Return the entry of the whole model, not only of its language model."""
    return find_family(str(get_config(model).get("model_type")))


def draw_noise(shape: tuple[int, ...], model: LoadedModel) -> Tensor:
    """Return noise that is the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(model.device, model.dtype)


def build_inputs(model: LoadedModel, inputs: ModelInputs) -> dict[str, Tensor]:
    """Build inputs of two prompts, concatenated."""
    return {
        name: torch.tensor([*one, *one], device=model.device)
        if isinstance(one, list)
        else draw_noise((2 * one[0], *one[1:]), model)
        for name, one in inputs.items()
    }


def build_image_inputs(model: LoadedModel) -> dict[str, Tensor]:
    """Build the inputs for two images."""
    return build_inputs(model, get_family(model).picture(get_config(model)))


def add_encoded(model: LoadedModel, tokens: Batch) -> Batch:
    """Add a sound or an image for the encoder to each decoder prompt."""
    family, config = get_family(model), get_config(model)
    if model.shape.attends_to_image:
        given = build_inputs(model, family.picture(config))
        frames = {"encoder": Batch.grid(2, given[ATTENDED].shape[1], model.device)}
        if "vision" in model.others:
            columns = VisionColumns.of(model.shape)
            frames["vision"] = Batch.grid(2, columns.count, model.device)
        return tokens.with_inputs(given, **frames)
    images = model.shape.takes == "image to text"
    given = build_inputs(
        model, family.picture(config["encoder"]) if images else family.sound(config)
    )
    last = model.stack("encoder").anatomy.blocks[-1].path
    cross = model.others.get("cross")
    read = last if cross is None else cross.anatomy.blocks[0].projections[-1]
    count = count_module_tokens(model, read, {**given, "decoder_input_ids": tokens.ids})
    return tokens.with_inputs(given, encoder=Batch.grid(2, count, model.device))


def build_image_prompts(model: LoadedModel, texts: Sequence[Sequence[int]]) -> Batch:
    """Build two prompts, each with an image after its second token."""
    extra = build_image_inputs(model)
    count = _count_image_tokens(model, extra)
    mark = get_image_token(model)
    rows = [
        [*text[:_TOKENS_BEFORE_IMAGE], *([mark] * count), *text[_TOKENS_BEFORE_IMAGE:]]
        for text in texts
    ]
    batch = Batch.of(rows, model.pad_id, model.calling.side, model.device)
    known = inspect.signature(model.module.forward).parameters
    mask = (batch.ids == mark).long() * (not get_family(model).prefix)
    extra |= {name: mask for name in _IMAGE_MASKS if name in known}
    given = {"input_ids": batch.ids, "attention_mask": batch.mask, **extra}
    patches = count_module_tokens(model, model.stack("vision").anatomy.blocks[0].path, given)
    return batch.with_inputs(extra, vision=Batch.grid(2, patches, model.device))


_POSITION_TABLES = re.compile(
    r"(^|[._])(wpe|w_?pos|pos(ition(al|s)?)?(_\w+)?|embed_positions)$", re.I
)
"""Pattern of names of learned position tables."""


def find_max_tokens(model: LoadedModel) -> int | None:
    """Return the maximum number of tokens in a text, from the config and learned position tables.

    None if neither limits it.
    """
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
        # Some tables begin with rows for padding.
        padding = getattr(owner, "padding_idx", None)
        unused = getattr(owner, "offset", 0 if padding is None else padding + 1)
        most.append(int(weight.shape[-2]) - unused)
    return min((one for one in most if one > 0), default=None)


def get_image_token(model: LoadedModel) -> int:
    """Return the placeholder token of images. Raises ValueError if the config names none."""
    config = get_config(model)
    for key in ("image_token_id", "image_token_index"):
        if isinstance(token := config.get(key), int):
            return token
    raise ValueError("its config doesn't state the token that represents an image")


def _count_image_tokens(model: LoadedModel, extra: Mapping[str, Tensor]) -> int:
    """Return the number of tokens that one image occupies in a prompt."""
    parts: Any = (model.module, getattr(model.module, "model", None))
    features_of = next(
        (found for part in parts if (found := getattr(part, "get_image_features", None))), None
    )
    if features_of is None:
        raise ValueError(
            "it has no `get_image_features` that returns the number of tokens of an image"
        )
    known = inspect.signature(features_of).parameters
    with torch.inference_mode():
        features = features_of(**{name: value for name, value in extra.items() if name in known})
    if (pooled := getattr(features, "pooler_output", None)) is not None:
        features = pooled
    features = getattr(features, "last_hidden_state", features)
    rows = features if isinstance(features, (tuple, list)) else [features]
    return sum(int(one.numel() // one.shape[-1]) for one in rows) // 2


def count_module_tokens(model: LoadedModel, path: str, given: Mapping[str, Tensor]) -> int:
    """Return the number of tokens per row that enter a module; rows may share one dimension."""
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
"""Numbers of tokens in the two prompts, if the model has that many positions."""


def build_text_sample(model: LoadedModel) -> Batch:
    """Build two rows of tokens only."""
    rows = draw_prompts(model, PROMPT_LENGTHS, seed=0)
    return Batch.of(rows, model.pad_id, model.calling.side, model.device)


def draw_prompts(model: LoadedModel, lengths: tuple[int, int], seed: int) -> list[list[int]]:
    """Draw ragged prompts of different tokens, without padding and image tokens.

    The second prompt contains the mask token, if there is one, because models may treat it
    specially. Prompts begin like the tokenizer's texts, and fit the model's positions.
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
    torch.float64: 1e-5,  # some models compute components in float32 anyway
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Relative to the largest compared value; a wrong tap has an error of about 1."""


def amplify(values: Tensor, site: str, anatomy: Anatomy) -> Tensor:
    """Multiply values by 100, with a change of sign for most sites.

    A norm after the site would undo a pure change of scale, so the sign changes too. Queries and
    keys keep their sign in families without a norm after rotary, where no norm may follow them.
    """
    limit = torch.finfo(values.dtype).max / 100  # the maximum in half precision is 65504
    bare = site in ("q", "k") and not anatomy.norms_after_rotary
    return (values.double() * (100 if bare else -100)).clamp(-limit, limit)


_MAX_LAYERS = 6
"""Depth up to which writes are tried on every layer; deeper models try first, middle and last."""

_MAX_TOKENS = 64
"""For longer rows (images, sounds), only one row is used, and outputs of single heads and experts
are read in a few layers."""

_WIDE_SITES = ("head_out", "expert_out")

MAX_CHECK_TOKENS = 4096
"""Maximum number of tokens of the rows that are written in one pass."""

TensorComparison = tuple[str, Tensor, Tensor] | tuple[str, Tensor, Tensor, Tensor]
"""(location, actual, expected), optionally with the summands of `actual`."""

_WORSE_FACTOR = 1.01
"""Factor by which a comparison must be worse to be named instead of an earlier one."""


@dataclass
class CheckBench:
    """Padded ragged batch with all activations of one stack."""

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
        batch = without_vectors(batch) if stack == "vision" else batch
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
        """Return the blocks in which all of these sites exist and were read."""
        there = [{SiteRead(site, n, self.stack) for site in sites} for n in self.layers]
        return [n for n in self.layers if there[n] <= self.reads.keys()]

    def some(self, site: str) -> Sequence[int | None]:
        """Return the blocks in which writes to a site are tried."""
        if not SITES[site].has_layer:
            return (None,)
        return _choose_layers(self.anatomy, site, few=True)

    def read(self, site: str, layer: int | None = None) -> Tensor:
        """Return [tokens, units, width]: one site on the real tokens."""
        return self.real(self.reads[SiteRead(site, layer, self.stack)], site)

    def vectors(self, site: str, layer: int | None = None) -> Tensor:
        """Return [tokens, width] of a whole-vector site."""
        return self.read(site, layer).squeeze(1)

    def of_stack(self, stack: str, site: str, layer: int | None = None) -> Tensor | None:
        """Return [tokens, width] of a linked stack's site (`list_linked_reads`), if it was read."""
        found = self.reads.get(SiteRead(site, layer, stack))
        if found is None:
            return None
        mask = self.batch.of_site(site, stack).mask.to(found.device).bool()
        return (found[mask] if found.shape[:2] == mask.shape else found).squeeze(1)

    def between(self, layer: int) -> Tensor | None:
        """Return [tokens, d_model]: the stream before the MLP's norm, after any cross attention.

        None if the block has no `resid_mid`.
        """
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
        """Return [tokens, …] of [B, T, …] without padding; the whole tensor for whole images."""
        mask = self.batch.of_site(site, self.stack).mask.to(tensor.device).bool()
        return tensor[mask] if tensor.shape[:2] == mask.shape else tensor

    def output(self, logits: Tensor) -> Tensor:
        """Return the model's output on the real tokens of the main stack."""
        mask = self.batch.mask.to(logits.device).bool()
        return logits[mask] if logits.shape[:2] == mask.shape else logits

    def read_of(self, prompt: int, site: str, layer: int | None) -> Tensor:
        """Return [tokens, units, width]: one site of one prompt."""
        return self.real_of(prompt, self.reads[SiteRead(site, layer, self.stack)], self.batch)

    @staticmethod
    def real_of(row: int, tensor: Tensor, batch: Batch) -> Tensor:
        """Return [tokens, …] of one row of a [B, T, …] tensor."""
        mask = batch.mask[row].to(tensor.device).bool()
        return tensor[row][mask] if tensor.shape[1] == len(mask) else tensor[row]

    def module(self, path: str) -> torch.nn.Module:
        return self.model.module.get_submodule(path)

    def through(self, path: str, tokens: Tensor) -> Tensor:
        """Return [tokens, width]: a module's output, with each prompt passed separately."""
        lengths = self.own.lengths.tolist()
        if sum(lengths) != len(tokens):
            return get_first(self.module(path)(tokens))
        parts = tokens.split(lengths)
        return torch.cat([get_first(self.module(path)(own[None]))[0] for own in parts])

    def scaled(self, tap: HookPoint, value: Tensor) -> Tensor:
        """Scale a tapped tensor to its value in the stream."""
        return apply_scale(value, get_scale(self.model.module, tap))

    @property
    def tolerance(self) -> float:
        return _TOLERANCE.get(self.model.dtype, 1e-1)

    def equal(
        self, identity: str, pairs: Iterable[TensorComparison], tolerance: float = 0.0
    ) -> CheckOutcome:
        """Summarize comparisons as one outcome: the worst of them.

        Sums come with their summands, because rounding depends on the size of these.
        """
        worst, named, at, compared = 0.0, 0.0, "", 0
        for where, found, expected, *added in pairs:
            error = compute_difference(found, expected, *added)
            compared += 1
            worst = max(worst, error)
            if error > _WORSE_FACTOR * named:  # name the first of nearly equal errors
                named, at = error, where
        limit = tolerance or self.tolerance
        return CheckOutcome(identity, worst, limit, at, compared=compared)


def list_linked_reads(model: LoadedModel, stack: str) -> list[SiteRead]:
    """List sites of other stacks that are added to this stack, read by it, or computed from it."""
    if stack == "vision":
        return [] if "cross" in model.others else [SiteRead("embed")]
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
    """Return the layers in which a site is read or tried."""
    if not SITES[site].has_layer:
        return (None,)
    layers = list_layers(anatomy, site)
    n = len(layers)
    return (layers[0], layers[n // 2], layers[-1]) if few and n > _MAX_LAYERS else layers


def get_first(output: Any) -> Tensor:
    """Return a module's main output, without further items."""
    return output[0] if isinstance(output, (tuple, list)) else output


def compute_difference(found: Tensor, expected: Tensor, added: Tensor | None = None) -> float:
    """Return the largest difference, relative to the largest expected value or summand.

    Infinite if a value is NaN.
    """
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    error = float((found.double() - expected.double()).abs().max())
    size = max(float(one.double().abs().max()) for one in (expected, added) if one is not None)
    return error / (size or 1.0) if error == error and size == size else float("inf")


# --- helpers of checks -------------------------------------------------------------------------


def has_images(batch: Batch) -> bool:
    """Return whether tokens of the prompts stand for images."""
    return "vision" in batch.frames and "encoder" not in batch.frames


def write_whole_site(
    where: SiteRead, row: int, positions: Sequence[int], values: Tensor
) -> SiteWrite:
    """Write all units of a site at `positions` of a row; `values` is [positions, units, width]."""
    count, heads, size = values.shape
    rows = torch.full((count * heads,), row)
    places = torch.tensor(list(positions)).repeat_interleave(heads)
    which = torch.arange(heads).repeat(count)
    flat = values.reshape(-1, size)
    return SiteWrite(where.site, where.layer, rows, places, which, flat, stack=where.stack)


def label_site(site: str, layer: int | None) -> str:
    return site if layer is None else f"{site} layer {layer}"
