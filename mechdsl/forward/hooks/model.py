# pyright: reportPrivateUsage=false
"""A loaded and verified model: how it is called, and how its blocks are exchanged."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mechdsl.base.arrays import Ints
from mechdsl.forward.hooks.batch import Batch, BlockPairs, array_to_device
from mechdsl.forward.hooks.module_exchange import (
    AttentionEntry,
    BlockStub,
    find_attention_entry,
    load_weights,
    replace_forward,
)
from mechdsl.models.anatomy import Anatomy, HookPoint
from mechdsl.models.shape import ModelShape

if TYPE_CHECKING:
    from mechdsl.prompts.tokens.tokenizer import TextTokenizer


BASE_PREFIX, PYTHON_PREFIX = "base ", "python "
"""What keys of a model's provenance begin with: see `LoadedModel.made_of`."""


@dataclass(frozen=True)
class CheckOutcome:
    """One check of a model's anatomy."""

    identity: str
    """What has to hold, in words: `resid_pre + attn_out + mlp_out = resid_post`."""
    error: float
    """The largest difference, relative to the size of what was compared."""
    tolerance: float
    detail: str = ""
    """Where the largest difference is: `layer 3`."""
    failure: str = ""
    """What it means not to pass, where that isn't being off by `error`."""
    compared: int = 1
    """Tensors that were compared; a check without any says nothing, and isn't kept."""
    asks_effect: bool = False
    """It asks that something has an effect, which parts without one don't have."""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class CallConvention:
    """How the model wants to be called; found by trying it."""

    accepts: frozenset[str]
    """Names of its forward's arguments."""
    block_returns: int | None = None
    """Length of the tuple that a block returns; None for a bare tensor."""
    first_position: int | None = 0
    """Position id of a prompt's first token; None where the model is left to count by itself."""
    places_images: bool = False
    """An image's tokens are counted as others are, so that positions are given with images too."""
    side: Literal["left", "right"] = "left"
    """Where padding is harmless: on the right alone for models that count columns."""
    reads: Literal["every token", "first token", "last token", "all tokens"] = "every token"
    """What its output is made of: each token's is its own, or there is one output for a whole image
    or prompt, made of its first token (the class token), its last one, or of all."""
    skips: int | None = None
    """The pad token, where `reads` is the last token that isn't this one, and not the very last."""
    scores: str | None = None
    """Path of the module that gives each token its output, where the model returns only that of a
    prompt's last token, as classifiers built on decoders do; `reads` is every token then."""
    packs: Literal["tokens", "one prompt"] = "tokens"
    """What a pass over packed rows is called with: their tokens, or one prompt, where the model
    counts positions or looks at whole prompts by itself, and for images."""
    narrows: bool = True
    """The unembedding may compute some tokens' logits alone: nothing is added to them behind it."""


@dataclass(frozen=True, eq=False)
class BlockStack:
    """A list of blocks with its sizes."""

    anatomy: Anatomy
    shape: ModelShape


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode with its anatomy, its tokenizer and what was proved about it."""

    name: str
    """As the file calls it."""
    module: torch.nn.Module
    anatomy: Anatomy
    """Of the main stack: the language model's, the decoder's, or the only one."""
    shape: ModelShape
    tokenizer: TextTokenizer | None
    """None only while a model is looked at without text."""
    pad_id: int
    device: torch.device
    dtype: torch.dtype
    calling: CallConvention
    provenance: Mapping[str, str]
    """Hash of the weights, revision, versions: what a result has to be kept with."""
    checks: tuple[CheckOutcome, ...] = ()
    self_check_error: float = 0.0
    """The largest difference between logits of packed and of whole passes in its self-check,
    relative to the largest logit."""
    restartable: bool = True
    """Rows that compute only what changes gave the logits of whole passes; of a vision-language
    model, rows of text."""
    idle: tuple[tuple[str, str, int | None], ...] = ()
    """(stack, site, layer) of the parts without effect: whatever is written there alone, the output
    stays as it is. All that is compared holds for them, and what asks for an effect was shown on a
    copy with random weights."""
    identity: str | None = None
    """Of a model that was loaded from a folder, by `mechdsl/models/folder.py`. What any model is,
    `mechdsl/loading/identity.py:compute_identity` says."""
    texts: LoadedModel | None = None
    """The tower for texts, where this is that for images of a model with two."""
    others: Mapping[str, BlockStack] = field(default_factory=dict[str, BlockStack])
    """Stacks beside the main one: `encoder`, `cross` (the decoder's blocks, by their attention to
    the encoder), `vision`."""

    @cached_property
    def attention_configs(self) -> tuple[Any, ...]:
        """The distinct configs that modules read their attention function from."""
        found: dict[int, Any] = {}
        for part in self.module.modules():
            config = getattr(part, "config", None)
            if hasattr(config, "_attn_implementation_internal"):
                found[id(config)] = config
        return tuple(found.values())

    @cached_property
    def written_out(self) -> tuple[tuple[nn.Module, AttentionEntry], ...]:
        """Modules whose attention isn't the library's, with the entries that stand in for them."""
        every = self.module.modules()
        return tuple(
            (part, entry) for part in every if (entry := find_attention_entry(part)) is not None
        )

    @property
    def rounding(self) -> float:
        """How far rounding alone may move a logit, relative to the largest one: what the self-check
        has measured, and no less than the spacing of numbers of this precision."""
        return max(self.self_check_error, torch.finfo(self.dtype).eps)

    @property
    def made_of(self) -> dict[str, str]:
        """Hashes of what the model was made of beside its own weights: the base of an adapter
        (`base m`), the file of the function that gave it (`python toy.py`)."""
        return {
            key: value
            for key, value in self.provenance.items()
            if key.startswith((BASE_PREFIX, PYTHON_PREFIX))
        }

    @property
    def parallel(self) -> bool:
        return self.anatomy.parallel

    def stack(self, name: str) -> BlockStack:
        """A stack by name; the main one has none. ValueError where there isn't one."""
        if not name:
            return BlockStack(self.anatomy, self.shape)
        if name not in self.others:
            there = ", ".join(f"`{other}`" for other in self.others) or "none beside the main one"
            raise ValueError(f"`{self.name}` has no stack `{name}`; it has {there}")
        return self.others[name]

    def tap(self, site: str, layer: int | None, stack: str = "") -> HookPoint:
        """The tensor of a site; ValueError where there is none."""
        own = self.stack(stack)
        if layer is not None and not 0 <= layer < own.shape.n_layers:
            of = f" of `{stack}`" if stack else ""
            raise ValueError(f"layer {layer}{of} is not in 0..{own.shape.n_layers - 1}")
        tap = own.anatomy.tap(site, layer)
        if tap is None:
            where = "" if layer is None else f" in layer {layer}"
            where += f" of its stack `{stack}`" if stack else ""
            raise ValueError(f"`{self.name}` has no `{site}`{where}")
        return tap


def call_with_batch(model: LoadedModel, batch: Batch) -> Tensor:
    """The model's own forward, with nothing of ours but masks and positions: [B, T, vocab], what
    leaves a model without an unembedding, [B, T, d_model], or one output for a whole image."""
    return call_model(model, build_arguments(model, batch))


def has_single_output(model: LoadedModel) -> bool:
    """Whether logits are [B, labels], one row for a whole image."""
    return model.shape.takes == "image" and model.calling.reads != "every token"


def select_row_logits(model: LoadedModel, logits: Tensor, rows: Ints) -> Tensor:
    """[place, …]: the logits of places in these rows, where each row has one output for all."""
    return logits[array_to_device(rows, logits.device)] if has_single_output(model) else logits


def build_arguments(model: LoadedModel, batch: Batch) -> dict[str, Tensor]:
    """What the model is called with."""
    ids, mask = batch.ids, batch.mask
    match model.shape.takes:
        case "image":
            return dict(batch.extra)
        case "two texts" | "audio":
            given = dict(batch.extra)
            if model.shape.takes == "two texts":
                encoder = batch.of_stack("encoder")
                given = {"input_ids": encoder.ids, "attention_mask": encoder.mask}
            return given | {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        case _:
            plain = not batch.extra or model.calling.places_images
            given = build_text_inputs(model, ids, batch.position_ids() if plain else None)
            return {**given, **batch.extra, "attention_mask": mask}


def build_text_inputs(
    model: LoadedModel, ids: Tensor, positions: Tensor | None
) -> dict[str, Tensor]:
    """Tokens with their positions (0 for the first of a prompt), as the model counts them."""
    calling = model.calling
    given = {"input_ids": ids}
    if positions is not None and calling.first_position is not None:
        given["position_ids"] = positions + calling.first_position
    if "token_type_ids" in calling.accepts:
        given["token_type_ids"] = torch.zeros_like(ids)
    return given


def call_model(model: LoadedModel, arguments: Mapping[str, Tensor]) -> Tensor:
    """The model's output, without a cache: [B, T, …]. A classifier of prompts gives its output to
    each of their tokens, or, of tokens that packed rows have side by side, each token its own."""
    if model.calling.scores is not None:
        return _call_scores(model, model.calling.scores, arguments)
    output = call_module(model, arguments)
    if "logits" not in output:
        return output.last_hidden_state
    if model.shape.takes == "image" or model.calling.reads == "every token":
        return output.logits
    rows, tokens = arguments["input_ids"].shape
    if len(output.logits) != rows:
        return output.logits[None]
    return output.logits[:, None].expand(-1, tokens, -1)


class _ScoresComputed(Exception):
    """Each token has its output, and what the model makes of them isn't needed."""


def _call_scores(model: LoadedModel, path: str, arguments: Mapping[str, Tensor]) -> Tensor:
    """[B, T, labels] of the module that gives each token its output."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(output)
        raise _ScoresComputed

    handle = model.module.get_submodule(path).register_forward_hook(stop)
    try:
        call_module(model, arguments)
    except _ScoresComputed:
        pass
    finally:
        handle.remove()
    return found[0]


def call_module(model: LoadedModel, arguments: Mapping[str, Tensor]) -> Any:
    """All that the model returns."""
    cache = {"use_cache": False} if "use_cache" in model.calling.accepts else {}
    return model.module(**arguments, **cache)


MAX_BOUND_LOGITS = 2**24
"""Logits held at once while the largest and the least of all are looked for."""


@contextmanager
def narrow_unembedding(
    model: LoadedModel, tokens: Tensor | None, *, ends: bool = False
) -> Generator[None]:
    """The unembedding computes the logits of these tokens ([K] long) only, in this order, where it
    can; `chosen` takes them out of all logits else.

    ends: two columns more, the largest and the least logit of all tokens.
    """
    if tokens is None or model.anatomy.unembedding is None or not model.calling.narrows:
        yield
        return
    module = model.module.get_submodule(model.anatomy.unembedding)
    with load_weights(module):
        every, biases = module.get_parameter("weight"), getattr(module, "bias", None)
        rows = tokens.to(every.device)
        weight, bias = every[rows], None if biases is None else biases[rows]

    def forward(hidden: Tensor) -> Tensor:
        few = nn.functional.linear(hidden.to(weight.device), weight, bias)
        if not ends:
            return few
        with load_weights(module):
            every, biases = module.get_parameter("weight"), getattr(module, "bias", None)
            vectors = hidden.to(every.device).flatten(0, -2)
            parts = vectors.split(max(1, MAX_BOUND_LOGITS // len(every)))
            both = [_find_bounds(nn.functional.linear(part, every, biases)) for part in parts]
        return torch.cat([few, torch.cat(both).reshape(*few.shape[:-1], 2).to(few)], -1)

    with replace_forward(module, forward):
        yield


def select_token_logits(
    model: LoadedModel, logits: Tensor, tokens: Tensor | None, *, ends: bool = False
) -> Tensor:
    """The logits of these tokens, out of a pass that was `narrowed` to them, `ends` behind them."""
    narrow = model.anatomy.unembedding is not None and model.calling.narrows
    if tokens is None or narrow:
        return logits
    few = logits[..., tokens.to(logits.device)]
    return torch.cat([few, _find_bounds(logits)], -1) if ends else few


def _find_bounds(logits: Tensor) -> Tensor:
    """[..., 2] of [..., vocab]: the largest and the least, without tokens that are excluded."""
    least = logits.masked_fill(logits.isneginf(), torch.inf).amin(-1)
    return torch.stack([logits.amax(-1), least], -1)


_POSITION_ATTRIBUTES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
"""Attributes that say where a module stands, by which a cache finds its keys."""


@contextmanager
def replace_blocks(model: LoadedModel, pairs: BlockPairs) -> Generator[None]:
    """Blocks compute with the weights of others, for a while; hooks on them stay where they are."""
    with ExitStack() as stack:
        others = [
            None if of is None else _get_block_weights(_get_block(model, of)) for _, of in pairs
        ]
        for (to, _), weights in zip(pairs, others, strict=True):
            block = _get_block(model, to)
            if weights is None:
                stack.enter_context(replace_forward(block, BlockStub(model.calling.block_returns)))
                continue
            for part, own in zip(block.modules(), weights, strict=True):
                stack.callback(_put_weights, part, _get_own_weights(part))
                _put_weights(part, own)
        yield


def explain_block_mismatch(model: LoadedModel, to: int, of: int | None) -> str:
    """Why a block can't compute in the place of another; empty where it can."""
    block = _get_block(model, to)
    every = [block] if of is None else [block, _get_block(model, of)]
    if any("_hf_hook" in part.__dict__ for each in every for part in each.modules()):
        return "its weights are kept elsewhere while a block isn't running"
    if of is None:
        return ""
    for part, other in zip(*(_describe_parts(each) for each in every), strict=False):
        if part != other:
            return f"`{other[0] or 'the block'}` of block {of} is built in another way"
    if len(list(every[0].modules())) != len(list(every[1].modules())):
        return f"block {of} is built in another way"
    return ""


def _get_block(model: LoadedModel, layer: int) -> nn.Module:
    return model.module.get_submodule(model.anatomy.blocks[layer].path)


ModuleWeights = tuple[dict[str, Any], dict[str, Any]]


def _get_own_weights(part: nn.Module) -> ModuleWeights:
    return dict(part._parameters), dict(part._buffers)


def _get_block_weights(block: nn.Module) -> list[ModuleWeights]:
    """Of every module in it, in order."""
    return [_get_own_weights(part) for part in block.modules()]


def _put_weights(part: nn.Module, own: ModuleWeights) -> None:
    part._parameters.clear()
    part._parameters.update(own[0])
    part._buffers.clear()
    part._buffers.update(own[1])


def _describe_parts(block: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What a block is made of: its modules, their sizes and settings."""
    for name, part in block.named_modules():
        if isinstance(part, nn.Identity | nn.Dropout) or "DropPath" in type(part).__name__:
            yield name, "hands on"  # outside of training, whatever its rate
            continue
        sizes = [
            (key, None if each is None else (each.shape, each.dtype, each.device))
            for key, each in (*part._parameters.items(), *part._buffers.items())
        ]
        settings = [
            (key, value)
            for key, value in sorted(part.__dict__.items())
            if isinstance(value, bool | int | float | str) and key not in _POSITION_ATTRIBUTES
        ]
        loose = [key for key, value in part.__dict__.items() if isinstance(value, torch.Tensor)]
        alone = id(part) if loose else None  # tensors of its own that are no weights
        yield name, type(part), sizes, settings, alone
