"""Trial calls and test inputs for a model, and all activations read on them."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.hook_points import apply_scale, get_scale
from mechdsl.forward.hooks.model import (
    BlockStack,
    CallConvention,
    CheckOutcome,
    LoadedModel,
    VisionColumns,
    build_arguments,
    build_text_inputs,
    call_model,
    call_module,
    call_with_batch,
    narrow_unembedding,
    without_vectors,
)
from mechdsl.forward.hooks.module_exchange import get_activation
from mechdsl.models.shape import (
    ATTENDED,
    Anatomy,
    Family,
    HookPoint,
    ModelInputs,
    ModelShape,
    OutputPosition,
    find_family,
    output_labels,
)
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
        (function for part in parts if (function := getattr(part, "get_image_features", None))),
        None,
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
        tensor = self.reads.get(SiteRead(site, layer, stack))
        if tensor is None:
            return None
        mask = self.batch.of_site(site, stack).mask.to(tensor.device).bool()
        return (tensor[mask] if tensor.shape[:2] == mask.shape else tensor).squeeze(1)

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
        return torch.cat([get_first(self.module(path)(part[None]))[0] for part in parts])

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
        for where, tensor, expected, *added in pairs:
            error = compute_difference(tensor, expected, *added)
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
    block_stack = model.stack(stack)
    return [name for name in SITES if name in block_stack.shape.sites]


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


def compute_difference(difference: Tensor, expected: Tensor, added: Tensor | None = None) -> float:
    """Return the largest difference, relative to the largest expected value or summand.

    Infinite if a value is NaN.
    """
    if difference.shape != expected.shape:
        return float("inf")
    if not difference.numel():
        return 0.0
    error = float((difference.double() - expected.double()).abs().max())
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


class OneOutputOnly(Exception):
    """A single output for a whole prompt that doesn't come from one token; the text says why."""


def probe_classifier(model: LoadedModel, ids: Tensor) -> LoadedModel:
    """Determine the tokens that a classifier's outputs are computed from.

    Args:
        ids: [1, T] a prompt.

    Raises:
        OneOutputOnly: The model has a single output that doesn't come from one token. Errors of the
            model's own forward are raised too.
    """
    output, outside = _record_outputs(model, ids)
    if "logits" not in output:
        return model
    if output.logits.dim() == 3:
        model = replace(model, shape=replace(model.shape, output_at="every token"))
        return model if model.shape.task == "tokens" else _probe_causality(model, ids)
    if model.shape.task == "tokens":
        raise OneOutputOnly(
            "classifiers have a class name that ends in `ForSequenceClassification`"
        )
    model = _drop_unembedding(model)
    places: tuple[tuple[OutputPosition, int], ...] = (("last token", -1), ("first token", 0))
    for at, place in sorted(places, key=lambda each: each[0] != model.shape.output_at):
        for path, made in outside.items():
            if made.shape[-1:] == output.logits.shape[-1:] and torch.equal(
                made[:, place], output.logits
            ):
                calling = replace(model.calling, scores=path)
                shape = replace(model.shape, output_at=at)
                return _probe_causality(replace(model, calling=calling, shape=shape), ids)
        if _depends_on_one_token(model, ids, place, output.logits):
            skips = _find_skipped_token(model, ids) if at == "last token" else None
            calling = replace(model.calling, reads=at, skips=skips)
            shape = replace(model.shape, output_at=at, causal=False)
            return _drop_final_norm(replace(model, calling=calling, shape=shape))
    raise OneOutputOnly("it is computed from several tokens jointly")


def _record_outputs(model: LoadedModel, ids: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Return the model's output, and per-token outputs of modules outside blocks."""
    blocks = [block.path for block in model.anatomy.blocks]
    outputs: dict[str, Tensor] = {}

    def look(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[:-1] == ids.shape:
                outputs[path] = output

        return hook

    with ExitStack() as stack:
        for path, module in model.module.named_modules():
            if path and not _is_in_blocks(path, blocks):
                stack.callback(module.register_forward_hook(look(path)).remove)
        output = call_module(model, {"input_ids": ids})
    return output, outputs


def _is_in_blocks(path: str, blocks: Iterable[str]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def _drop_unembedding(model: LoadedModel) -> LoadedModel:
    """Remove the unembedding: the module computes labels, possibly one set per prompt."""
    anatomy = model.anatomy
    tap = anatomy.taps.get("final_norm")
    if tap is not None and tap.path == anatomy.unembedding:
        model = _drop_final_norm(model)
    return replace(model, anatomy=replace(model.anatomy, unembedding=None))


def _drop_final_norm(model: LoadedModel) -> LoadedModel:
    """Remove `final_norm`, as only one token of each row remains after the last block."""
    anatomy, shape = model.anatomy, model.shape
    if "final_norm" not in anatomy.taps:
        return model
    taps = {site: point for site, point in anatomy.taps.items() if site != "final_norm"}
    reason = "after the last block, only the token for the output is processed"
    without = {**anatomy.without, "final_norm": reason}
    return replace(
        model,
        anatomy=replace(anatomy, taps=taps, without=without),
        shape=replace(shape, sites=shape.sites - {"final_norm"}),
    )


def _depends_on_one_token(model: LoadedModel, ids: Tensor, place: int, logits: Tensor) -> bool:
    """Return whether the output depends on only one token of the last block."""

    def other(module: nn.Module, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, (tuple, list)) else output
        changed = -2 * value
        changed[:, place] = value[:, place]
        return (changed, *output[1:]) if isinstance(output, (tuple, list)) else changed

    block = model.module.get_submodule(model.anatomy.blocks[-1].path)
    handle = block.register_forward_hook(other)
    try:
        return torch.equal(call_module(model, {"input_ids": ids}).logits, logits)
    finally:
        handle.remove()


def _find_skipped_token(model: LoadedModel, ids: Tensor) -> int | None:
    """Return the pad token if the output comes from the token before it."""
    pad = model.shape.config.get("pad_token_id")
    if not isinstance(pad, int) or not 0 <= pad < model.shape.vocab_size:
        return None
    ended = ids.clone()
    ended[:, -1] = pad
    logits = call_module(model, {"input_ids": ended}).logits
    return pad if _depends_on_one_token(model, ended, -2, logits) else None


def _probe_causality(model: LoadedModel, ids: Tensor) -> LoadedModel:
    """Determine whether tokens see later ones, which a classifier's class doesn't reveal."""
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    before, after = (call_model(model, {"input_ids": each})[:, :-1] for each in (ids, other))
    if not before.numel():
        return model
    size = before.abs().amax()
    causal = bool(((after - before).abs() <= 1e-4 * size).all())
    return replace(model, shape=replace(model.shape, causal=causal))


_ENCODER_LENGTHS = (6, 5)
"""Numbers of tokens in the input of encoders (encoder-decoders)."""

_IMAGE_PROMPT_LENGTHS = (5, 4)
"""Numbers of tokens in prompts with an image, without the image."""

_CLOSE_TOLERANCE = 1e-2
"""Two kinds of calls with a relative difference below this are equivalent."""


def build_sample(model: LoadedModel) -> Batch:
    """Build two rows; ragged prompts are padded on the model's side."""
    shape, device = model.shape, model.device
    if shape.takes == "image":
        pixels = build_image_inputs(model)
        count = count_module_tokens(model, model.anatomy.blocks[0].path, pixels)
        return Batch.grid(2, count, device).with_inputs(pixels)
    tokens = build_text_sample(model)
    match shape.takes:
        case "two texts":
            source = Batch.of(
                draw_prompts(model, _ENCODER_LENGTHS, seed=1), model.pad_id, "right", device
            )
            return tokens.with_inputs({}, encoder=source)
        case "audio" | "image to text" | "sound to text" | "attended image":
            return add_encoded(model, tokens)
        case "image and text" if "vision" in model.others:
            return build_image_prompts(model, draw_prompts(model, _IMAGE_PROMPT_LENGTHS, seed=0))
        case _:
            return tokens


# --- how the model is called --------------------------------------------------------------------


def probe_call(model: LoadedModel) -> LoadedModel:
    """Determine how the model is called; raises errors of the model's own forward."""
    # Not inference mode: routers cast weights in their first call, and these must allow gradients.
    with torch.no_grad():
        model = _probe_logits(_probe_inputs(_probe_structure(model)))
        return replace(model, calling=replace(model.calling, narrows=_can_narrow(model)))


def _probe_inputs(model: LoadedModel) -> LoadedModel:
    if model.shape.takes in ("text", "image and text"):
        model = _probe_text(_probe_token_types(model))
        if "vision" not in model.others:
            return model
        return replace(model, calling=replace(model.calling, places_images=_numbers_images(model)))
    if model.shape.takes == "image":
        return _probe_images(model)
    # On the right, because decoders that begin with padding count columns.
    calling = replace(model.calling, side="right", first_position=None, packs="one prompt")
    model = replace(model, calling=calling)
    return replace(model, calling=_probe_block_output(model))


def _probe_logits(model: LoadedModel) -> LoadedModel:
    """Adapt `logits` to the actual output: it may be missing, or not range over tokens."""
    shape, anatomy = model.shape, model.anatomy
    if shape.takes == "image":
        return model
    batch = build_sample(model)
    if shape.takes == "text":  # classifiers without a pad token accept only one prompt
        batch = batch.part(slice(0, 1))
    output = call_module(model, build_arguments(model, batch))
    if "logits" not in output:
        anatomy = replace(anatomy, unembedding=None)
        shape = replace(shape, sites=shape.sites - {"logits"}, d_logits=0)
        return replace(model, anatomy=anatomy, shape=shape)
    size = int(output.logits.shape[-1])
    sites = shape.sites | {"logits"}
    if shape.task == "tokens":
        d_logits = 0 if size == shape.vocab_size else size
        named = output_labels(get_config(model)) if d_logits else ()
        labels = named if len(named) == size else ()
        return replace(model, shape=replace(shape, sites=sites, d_logits=d_logits, labels=labels))
    labels = shape.labels if len(shape.labels) == size else tuple(map(str, range(size)))
    return replace(model, shape=replace(shape, sites=sites, d_logits=size, labels=labels))


def _numbers_images(model: LoadedModel) -> bool:
    """Return whether image tokens are numbered one by one; some models use two coordinates."""
    if model.calling.first_position is None:
        return False
    one = build_sample(model).part(slice(0, 1))
    plain = call_with_batch(model, one)
    placed = replace(model, calling=replace(model.calling, places_images=True))
    return _is_close(call_with_batch(placed, one), plain, _is_finite(model))


def _can_narrow(model: LoadedModel) -> bool:
    """Return whether logits come from the unembedding alone; some models add a bias later."""
    if model.anatomy.unembedding is None or model.shape.takes == "image":
        return False
    batch = build_sample(model)
    some = torch.arange(0, model.shape.outputs, 2, device=model.device)
    real = batch.mask.bool()
    every = call_with_batch(model, batch)[real]
    try:
        with narrow_unembedding(model, some):
            logits = call_with_batch(model, batch)[real]
    except Exception:  # from any later computation
        return False
    return _is_close(logits, every[:, some], _is_finite(model))


def _probe_token_types(model: LoadedModel) -> LoadedModel:
    """Remove `token_type_ids`, unless zeros equal the model's default.

    Some models look them up among the tokens, and some allow several.
    """
    accepts = model.calling.accepts
    if "token_type_ids" not in accepts:
        return model
    if get_family(model).prefix:
        return replace(model, calling=replace(model.calling, token_type=1))
    ids = torch.tensor([draw_prompts(model, PROMPT_LENGTHS, seed=0)[0]], device=model.device)
    looked_up: list[None] = []  # among the tokens, which may not show in the output
    embed = model.anatomy.taps.get("embed")
    handle = embed and model.module.get_submodule(embed.path).register_forward_hook(
        lambda *_: looked_up.append(None)
    )
    try:
        plain = call_model(model, {"input_ids": ids})
        given = call_model(model, {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
        if _is_close(given, plain, 1e-6) and len(looked_up) <= 2:
            return model
    except Exception:  # any error in the model's handling of them
        pass
    finally:
        if handle is not None:
            handle.remove()
    calling = replace(model.calling, accepts=accepts - {"token_type_ids"})
    return replace(model, calling=calling)


def _probe_structure(model: LoadedModel) -> LoadedModel:
    """Determine the layout of head norms, and remove sites of modules called several times.

    Norms of heads see [B, T, H, d] or [B, H, T, d].
    """
    stacks = {stack: model.stack(stack) for stack in ("", *model.others)}
    taps = [
        tap
        for block_stack in stacks.values()
        for b in block_stack.anatomy.blocks
        for tap in b.taps.values()
    ]
    taps += [tap for block_stack in stacks.values() for tap in block_stack.anatomy.taps.values()]
    calls: dict[str, int] = defaultdict(int)
    first: set[str] = set()

    def look(tap: HookPoint) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[tap.path] += 1
            made = output[tap.item] if isinstance(output, (tuple, list)) else output
            if tap.layout.axes == "heads" and _has_heads_first(args[0], made, tap.layout.units):
                first.add(tap.path)

        return hook

    batch = None if model.shape.takes == "text" else build_sample(model)
    if "vision" in model.others and batch is not None:
        batch = without_vectors(batch)
        stacks["vision"] = _find_token_norm(model, batch)
    with ExitStack() as stack:
        for tap in {tap.path: tap for tap in taps}.values():
            part = model.module.get_submodule(tap.path)
            stack.callback(part.register_forward_hook(look(tap)).remove)
        if batch is None:
            ids = torch.tensor(
                [draw_prompts(model, PROMPT_LENGTHS, seed=0)[0]], device=model.device
            )
            call_model(model, {"input_ids": ids})
        else:
            call_with_batch(model, batch)
    block_stacks = {
        name: _probe_visibility(block_stack, calls, first) for name, block_stack in stacks.items()
    }
    main = block_stacks.pop("")
    return replace(model, anatomy=main.anatomy, shape=main.shape, others=block_stacks)


def _find_token_norm(model: LoadedModel, batch: Batch) -> BlockStack:
    """Return the vision stack, without a last norm that has no effect on the language model.

    Many image encoders have a norm for the class token only, or an unused one.
    """
    block_stack = model.stack("vision")
    tap = block_stack.anatomy.taps.get("final_norm")
    if tap is None:
        return block_stack
    plain = call_with_batch(model, batch)
    module = model.module.get_submodule(tap.path)
    tokens = batch.frames["vision"].mask.numel()

    def other(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return -2 * output if output.numel() == tokens * output.shape[-1] else output

    handle = module.register_forward_hook(other)
    try:
        same = _is_close(call_with_batch(model, batch), plain, 1e-5)
    finally:
        handle.remove()
    if not same:
        return block_stack
    taps = {site: tap for site, tap in block_stack.anatomy.taps.items() if site != "final_norm"}
    without = {
        **block_stack.anatomy.without,
        "final_norm": "the language model reads the last block",
    }
    anatomy = replace(block_stack.anatomy, taps=taps, without=without)
    return BlockStack(
        anatomy, replace(block_stack.shape, sites=block_stack.shape.sites - {"final_norm"})
    )


def _has_heads_first(given: Tensor, output: Tensor, units: int) -> bool:
    """Return whether heads come before positions; for equal counts, strides decide."""
    if output.dim() != 4 or output.shape[1] != units:
        return False
    return output.shape[2] != units or given.stride(1) < given.stride(2)


def _probe_visibility(
    block_stack: BlockStack, calls: Mapping[str, int], first: Set[str]
) -> BlockStack:
    """Adapt a stack to the calls that were seen.

    Args:
        calls: By path, number of calls in one pass.
        first: Paths of modules that see heads first.
    """
    blocks = block_stack.anatomy.blocks
    parts = [block_stack.anatomy.taps, *(block.taps for block in blocks)]
    twice = {
        site
        for part in parts
        for site, tap in part.items()
        if calls[tap.path] > 1 and not tap.again
    }
    if not twice.isdisjoint(("resid_pre", "resid_post")):  # blocks that run several times
        twice = set[str]()
    kept = [
        replace(
            block,
            taps={
                site: replace(tap, layout=replace(tap.layout, axes="heads_first"))
                if tap.path in first and tap.layout.axes == "heads"
                else tap
                for site, tap in block.taps.items()
                if site not in twice
            },
        )
        for block in blocks
    ]
    reason = "the module that computes it is called several times in one pass"
    without = {**block_stack.anatomy.without, **dict.fromkeys(sorted(twice), reason)}
    outer = {site: tap for site, tap in block_stack.anatomy.taps.items() if site not in twice}
    anatomy = replace(block_stack.anatomy, blocks=tuple(kept), taps=outer, without=without)
    return BlockStack(anatomy, replace(block_stack.shape, sites=block_stack.shape.sites - twice))


def _probe_text(model: LoadedModel) -> LoadedModel:
    longer, shorter = draw_prompts(model, PROMPT_LENGTHS, seed=0)
    model = probe_classifier(model, torch.tensor([longer], device=model.device))
    alone = [
        call_model(model, build_text_inputs(model, torch.tensor([row], device=model.device), None))[
            0
        ]
        for row in (longer, shorter)
    ]
    fine = _is_finite(model)
    for first in _list_first_positions(model):
        calling = replace(model.calling, first_position=first)
        one = Batch.of([longer], model.pad_id, "left", model.device)
        if not _is_close(call_with_batch(replace(model, calling=calling), one)[0], alone[0], fine):
            continue
        for side in ("left", "right"):
            as_tried = replace(model, calling=replace(calling, side=side))
            batch = Batch.of([longer, shorter], model.pad_id, side, model.device)
            logits = call_with_batch(as_tried, batch)[1][batch.mask[1].bool()]
            if _is_close(logits, alone[1], fine):
                return _try_call(as_tried)
    return _try_call(model)


def _try_call(model: LoadedModel) -> LoadedModel:
    """Determine the block output, and how passes over packed rows call the model."""
    packs = model.calling.packs if _accepts_packed_rows(model) else "one prompt"
    return replace(model, calling=replace(_probe_block_output(model), packs=packs))


class _BlockReached(Exception):
    """Signal that the first block was reached."""


def _accepts_packed_rows(model: LoadedModel) -> bool:
    """Return whether the model can be called with more packed tokens than it has positions.

    This is tried only for models of few positions; others don't need it.
    """
    most = model.shape.max_positions or 0
    if not 0 < most <= 1024:
        return True

    def stop(block: nn.Module, args: Any) -> None:
        raise _BlockReached

    block = model.module.get_submodule(model.anatomy.blocks[0].path)
    handle = block.register_forward_pre_hook(stop)
    ids = torch.full((1, most + 1), model.pad_id, device=model.device)
    try:
        call_model(model, build_text_inputs(model, ids, torch.zeros_like(ids)))
    except _BlockReached:
        return True
    except Exception:  # any error about so many tokens
        return False
    finally:
        handle.remove()
    return True


def _list_first_positions(model: LoadedModel) -> list[int | None]:
    """List possible first position ids; some models count from after the pad id (RoBERTa)."""
    if "position_ids" not in model.calling.accepts:
        return [None]
    return [0, model.pad_id + 1, 2, None]


def _probe_images(model: LoadedModel) -> LoadedModel:
    """Determine which tokens of the last block the output comes from."""
    pixels = build_image_inputs(model)
    calling = replace(_probe_block_output(model), first_position=None, packs="one prompt")
    output = call_model(model, pixels)
    shape = replace(model.shape, vocab_size=int(output.shape[-1]))
    if not _norms_tokens(model, pixels):
        taps = {site: tap for site, tap in model.anatomy.taps.items() if site != "final_norm"}
        model = replace(model, anatomy=replace(model.anatomy, taps=taps))
        shape = replace(shape, sites=shape.sites - {"final_norm"})
    if output.dim() == 3:  # not a classifier: every token is an output
        shape = replace(shape, sites=shape.sites - {"logits"})
        return replace(model, shape=shape, calling=calling)

    def other(module: nn.Module, args: Any, hidden: Any) -> Any:
        value = hidden[0] if isinstance(hidden, tuple) else hidden
        value = torch.cat([value[:, :1], -2 * value[:, 1:]], dim=1)
        return (value, *hidden[1:]) if isinstance(hidden, tuple) else value

    block = model.module.get_submodule(model.anatomy.blocks[-1].path)
    handle = block.register_forward_hook(other)
    try:
        first = _is_close(call_model(model, pixels), output)
    finally:
        handle.remove()
    calling = replace(calling, reads="first token" if first else "all tokens")
    return replace(model, shape=shape, calling=calling)


def _norms_tokens(model: LoadedModel, pixels: Mapping[str, Tensor]) -> bool:
    """Return whether the last norm applies to tokens instead of the pooled vector."""
    tap = model.anatomy.taps.get("final_norm")
    if tap is None:
        return False
    seen: list[int] = []
    module = model.module.get_submodule(tap.path)
    handle = module.register_forward_hook(lambda m, a, output: seen.append(output.dim()))
    try:
        call_model(model, pixels)
    finally:
        handle.remove()
    return seen == [3]


def _probe_block_output(model: LoadedModel) -> CallConvention:
    """Determine the length of the tuple that the first block returns; None for a tensor."""
    returned: list[Any] = []

    def look(block: nn.Module, args: Any, output: Any) -> None:
        returned.append(output)

    block = model.module.get_submodule(model.anatomy.blocks[0].path)
    takes = model.shape.takes
    batch = build_sample(model) if model.shape.has_encoder else None
    handle = block.register_forward_hook(look)
    try:
        if takes == "image":
            call_model(model, build_image_inputs(model))
        elif batch is not None:
            call_with_batch(model, batch)
        else:
            ids = torch.tensor(
                [draw_prompts(model, PROMPT_LENGTHS, seed=0)[1]], device=model.device
            )
            call_model(model, {"input_ids": ids})
    finally:
        handle.remove()
    length = len(returned[0]) if isinstance(returned[0], (tuple, list)) else None
    return replace(model.calling, block_returns=length)


def _is_finite(model: LoadedModel) -> float:
    """Return the tolerance for rounding between equivalent calls."""
    return 1e-4 if model.dtype.itemsize > 2 else _CLOSE_TOLERANCE


def _is_close(output: Tensor, expected: Tensor, tolerance: float = _CLOSE_TOLERANCE) -> bool:
    if output.shape != expected.shape:
        return False
    error = (output.double() - expected.double()).abs().max()
    return bool(error <= tolerance * expected.double().abs().max())
