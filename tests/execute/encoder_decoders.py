"""Small encoder-decoders, and their values under plain hooks for one unpadded prompt."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput

from mechdsl.pipeline.options import RunOptions

from ..models import families
from ..shared_models import unchanged
from .support import PROMPTS, Array, Record, by_name, prompt, token, try_file

SIZES = {"vocab_size": families.VOCABULARY, "d_model": 16, "pad_token_id": 0, "eos_token_id": 1}

T5 = {
    **SIZES,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}

BART = {
    **SIZES,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "decoder_start_token_id": 1,
}

GEMMA = {
    "vocab_size": families.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": None,
    "max_position_embeddings": 40,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
T5GEMMA: dict[str, Any] = {
    "encoder": {**GEMMA, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    "decoder": {**GEMMA, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
    "vocab_size": families.VOCABULARY,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,  # the model doesn't attend to padding, which T5 begins with
}

CONFIGS: dict[str, dict[str, Any]] = {
    "t5": T5,
    "mt5": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": BART,
    "marian": {**BART, "decoder_start_token_id": 0},
    "mbart": BART,
    "pegasus": {**BART, "decoder_start_token_id": 0},
    "umt5": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "m2m_100": BART,
    "t5gemma": T5GEMMA,
}

SHALLOW: dict[str, dict[str, Any]] = {"t5 shallow": {**T5, "num_layers": 1}}
"""Models with one layer in the encoder."""

WINDOWED = {
    stack: {**T5GEMMA[stack], "sliding_window": 3, "layer_types": ["sliding_attention", *types]}
    for stack, types in (("encoder", ["full_attention"]), ("decoder", ["full_attention"] * 2))
}
SLIDING = {"t5gemma sliding split": {**T5GEMMA, **WINDOWED}}
"""Models whose first layers attend to the nearest tokens."""

LIKE_T5 = ("t5", "mt5", "umt5")
SLOW = ("umt5", "m2m_100")
"""Families whose code differs little from that of others."""

WRITERS: dict[str, dict[str, Any]] = {
    f"{family} writing": {**CONFIGS[family], "tie_word_embeddings": False}
    for family in ("t5", "mt5", "bart", "marian", "pegasus", "umt5", "m2m_100", "t5gemma")
}
"""Models that don't repeat their last token: their unembedding isn't their embedding."""
WITH_SECOND = ("t5 forced", "umt5 forced")
"""Models with position biases whose decoder begins with two tokens."""

FORCED = {"bart": 5, **dict.fromkeys(WITH_SECOND, 6)}
"""Second tokens of decoders, by family or type."""

SEEDS = {"bart writing": 11, "t5gemma": 6}
"""Seeds of weights with which every edit changes the measure by more than 0.1; otherwise 0."""

HEADS, WIDTH, ENCODER_LAYERS, LAYERS = 2, 8, 2, 3


def name_of(family: str) -> str:
    """The type of a model in the library."""
    return family.partition(" ")[0]


def cases(families: Iterable[str]) -> list[Any]:
    """Families as parameters of a test; those of `SLOW` run only in slow tests."""
    slow = pytest.mark.slow
    return [pytest.param(each, marks=[slow] * (name_of(each) in SLOW)) for each in families]


@cache
def model(family: str) -> Any:
    """A model whose heads all matter."""
    seed = SEEDS.get(family, 0)
    config = {**CONFIGS, **WRITERS, **SHALLOW, **SLIDING}.get(family, CONFIGS[name_of(family)])
    made = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name_of(family), **config))
    families.draw(made, seed)
    for name, parameter in made.named_parameters():
        if parameter.dim() >= 2 and "shared" not in name and "embed" not in name:
            crosses = "EncDecAttention.o" in name or "encoder_attn.out_proj" in name
            parameter.data.mul_(3 if crosses else 1.3)
    if (forced := forced_token(family)) is not None:
        made.generation_config.forced_bos_token_id = forced
    if family in WRITERS:
        head = made.get_output_embeddings()
        shape, generator = head.weight.shape, torch.Generator().manual_seed(seed)
        head.weight = nn.Parameter(torch.randn(shape, generator=generator))
        made.get_input_embeddings().weight.data.mul_(4)
        for name, parameter in made.named_parameters():
            if "encoder_attn.out_proj" in name and "pegasus" not in family:
                parameter.data.mul_(0.3)  # otherwise attention outweighs the token
            if "decoder" in name and name.endswith("bias"):
                parameter.data.zero_()
    return unchanged(made.eval())


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, and `<s>` after the text, as `</s>` of T5."""
    made = families.tokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="$A <s>", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<s>")


def run(
    family: str, lines: str, folder: Path, options: RunOptions | None = None, prompts: str = PROMPTS
) -> dict[str, Any]:
    """Results of experiments on a model of `model`, by name."""
    ran = try_file(lines, folder, model(family), options, tokenizer=tokenizer(), prompts=prompts)
    return by_name(*ran)


def starts(family: str) -> list[int]:
    """The tokens that the decoder begins with."""
    first, second = CONFIGS[name_of(family)]["decoder_start_token_id"], forced_token(family)
    return [first] if second is None else [first, second]


def forced_token(family: str) -> int | None:
    return FORCED.get(family, FORCED.get(name_of(family)))


@dataclass(frozen=True)
class Text:
    """One row of one run, with the positions of its parts, counted without the package."""

    ids: tuple[int, ...]
    items: tuple[int, ...]
    subject: tuple[int, ...]

    @property
    def last(self) -> int:
        """The last token of the text, before the token that ends it."""
        return len(self.ids) - 2


def text(record: Record, run: str = "clean") -> Text:
    """The encoder's tokens of a record, without a leading `<s>`."""
    own = prompt(record, run)
    moved = [tuple(at - 1 for at in places) for places in (own.items, own.subject)]
    return Text((*own.ids[1:], 1), *moved)


@dataclass(frozen=True)
class Place:
    """A site of the bare model: a module, its input or its output, and a head."""

    path: str
    of_input: bool = False
    head: int | None = None


def place(family: str, site: str, layer: int, head: int | None = None) -> Place:
    """The module of a site, as the file spells it: `z cross`."""
    component, _, stack = site.partition(" ")
    stack = stack or "decoder"
    encodes = stack == "encoder"
    if name_of(family) in LIKE_T5:
        block = f"{'encoder' if encodes else 'decoder'}.block.{layer}"
        attention = f"{block}.layer.0.SelfAttention"
        attention = f"{block}.layer.1.EncDecAttention" if stack == "cross" else attention
        mlp, output = f"{block}.layer.{1 if encodes else 2}.DenseReluDense", "o"
        names = {"q": "q", "k": "k", "v": "v"}
    elif name_of(family) == "t5gemma":
        block = f"model.{'encoder' if encodes else 'decoder'}.layers.{layer}"
        kind = "cross_attn" if stack == "cross" else "self_attn"
        attention, output = f"{block}.{kind}", "o_proj"
        mlp = f"{block}.post_feedforward_layernorm"
        names = {each: f"{each}_proj" for each in "qkv"}
        if component == "attn_out":  # the norm before the sum
            return Place(f"{block}.post_{kind}_layernorm")
    else:
        block = f"model.{'encoder' if encodes else 'decoder'}.layers.{layer}"
        attention = f"{block}.{'encoder_attn' if stack == 'cross' else 'self_attn'}"
        mlp, output = f"{block}.fc2", "out_proj"
        names = {each: f"{each}_proj" for each in "qkv"}
    root = block.partition(".layers.")[0].partition(".block.")[0]
    match component:
        case "embed":
            return Place(f"{root}.embed_tokens")
        case "final_norm" if name_of(family) in LIKE_T5:
            return Place(f"{root}.final_layer_norm")
        case "final_norm" if name_of(family) == "t5gemma":
            return Place(f"{root}.norm")
        case "final_norm" if (found := f"{root}.layer_norm") in dict(model(family).named_modules()):
            return Place(found)
        case "final_norm":
            return Place(f"{root}.layers.{ENCODER_LAYERS - 1}")
        case "resid_post":
            return Place(block)
        case "resid_pre":
            return Place(block, of_input=True)
        case "attn_out":
            return Place(attention)
        case "mlp_out":
            return Place(mlp)
        case "z":
            return Place(f"{attention}.{output}", of_input=True, head=head)
        case _:
            return Place(f"{attention}.{names[component]}", head=head)


Change = Callable[[Tensor], Tensor]
"""Given the vectors of some tokens, [token, width], returns the new ones."""

Write = tuple[Place, Sequence[int], Change]
"""A place, its tokens in the encoder's or decoder's text, and the change of their vectors."""


def columns(own: Place, width: int) -> slice:
    return slice(width) if own.head is None else slice(own.head * WIDTH, (own.head + 1) * WIDTH)


@contextmanager
def changed(module: nn.Module, writes: Iterable[Write]) -> Generator[None]:
    """Plain hooks on the bare model."""
    handles: list[Any] = []

    def put(tensor: Tensor, own: Place, tokens: Sequence[int], change: Change) -> Tensor:
        new, at = tensor.clone(), columns(own, tensor.shape[-1])
        rows = list(tokens)
        new[0, rows, at] = change(new[0, rows, at])
        return new

    for own, tokens, change in writes:
        part = module.get_submodule(own.path)

        def before(
            _: Any, args: Any, own: Place = own, tokens: Any = tokens, change: Change = change
        ) -> Any:
            return (put(args[0], own, tokens, change), *args[1:])

        def after(
            _: Any,
            args: Any,
            output: Any,
            own: Place = own,
            tokens: Any = tokens,
            change: Change = change,
        ) -> Any:
            if not isinstance(output, tuple):
                return put(output, own, tokens, change)
            return (put(output[0], own, tokens, change), *output[1:])

        handles.append(
            part.register_forward_pre_hook(before)
            if own.of_input
            else part.register_forward_hook(after)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(
    family: str, of: Text, writes: Iterable[Write] = (), answer: Sequence[int] = ()
) -> Array:
    """[token of the decoder, vocab]; tokens see a padding token that the model has generated."""
    module = model(family)
    own = torch.tensor([[*starts(family), *answer]])
    with changed(module, writes):
        found = module(
            input_ids=torch.tensor([of.ids]),
            decoder_input_ids=own,
            decoder_attention_mask=torch.ones_like(own),
            use_cache=False,
        )
    return found.logits[0].double().numpy()


def read(family: str, of: Text, own: Place) -> Tensor:
    """[token, width] of a place in an unpatched run."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor.clone())
        return tensor

    every = list(range(len(of.ids) if "encoder." in own.path else len(starts(family))))
    if own.path.endswith((".k", ".v", ".k_proj", ".v_proj")) and is_cross(own):
        every = list(range(len(of.ids)))
    logits(family, of, [(own, every, keep)])
    return found[0]


def is_cross(own: Place) -> bool:
    return any(name in own.path for name in ("EncDecAttention", "encoder_attn", "cross_attn"))


def difference(found: Array, record: Record) -> float:
    """`logit(answer) - logit(wrong)` after the decoder's last token."""
    return float(found[-1, token(record["a"])] - found[-1, token(record["b"])])


def copied(family: str, of: Text, own: Place, to: Sequence[int], at: Sequence[int]) -> Write:
    """The vectors of another run."""
    vectors = read(family, of, own)[list(at)]
    return own, to, lambda _: vectors


def copied_columns(own: Place, tokens: Sequence[int], columns: slice, source: Tensor) -> Write:
    """Copy some numbers of tokens' vectors, such as those of one head, from [token, width]."""
    read = source[list(tokens), columns]

    def change(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, columns] = read
        return value

    return own, tokens, change


@contextmanager
def last_query_without(
    attention: nn.Module, queries: int, keys: int, hidden: Sequence[int]
) -> Generator[None]:
    """While it is open, the last query of an attention module skips some keys."""

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = torch.zeros(1, 1, queries, keys)
        mask[..., -1, list(hidden)] = torch.finfo(torch.float32).min
        return args, {**kwargs, "attention_mask": mask}

    handle = attention.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def zeroed(own: Place, tokens: Sequence[int]) -> Write:
    return own, tokens, torch.zeros_like


def grid(rows: Iterable[Iterable[float]]) -> Array:
    """[cell, prompt]."""
    return np.array([list(each) for each in rows])


@contextmanager
def weights_times(
    family: str,
    stack: str,
    layer: int,
    edges: Sequence[tuple[int, int, int]] = (),
    factor: float = 0.0,
    seen: list[Tensor] | None = None,
) -> Generator[None]:
    """Multiply weights of attention in one layer.

    Args:
        family: The family.
        stack: `encoder`, `cross`, or empty for the decoder's own attention.
        layer: The layer.
        edges: (head, query, key) whose weights are multiplied; a query's sum to 1 again.
        factor: The factor.
        seen: Receives the weights, [head, query, key].
    """

    def change(weights: Tensor) -> Tensor:
        for head, query, key in edges:
            weights[head, query, key] *= factor
        weights = weights / weights.sum(-1, keepdim=True)
        if seen is not None:
            seen.append(weights)
        return weights

    with explicit_attention(family, stack, layer, weighed=change):
        yield


def unchanged_values(values: Tensor) -> Tensor:
    return values


@contextmanager
def explicit_attention(
    family: str,
    stack: str,
    layer: int,
    *,
    scored: Change = unchanged_values,
    weighed: Change = unchanged_values,
) -> Generator[None]:
    """Compute the attention of one layer explicitly, from the projections of the bare model.

    Args:
        family: The family, which determines the scale and position biases of scores.
        stack: `encoder`, `cross`, or empty for the decoder's own attention.
        layer: The layer.
        scored: Returns new scores, [head, query, key].
        weighed: Returns new weights, [head, query, key].
    """
    whole, site = model(family), f"z {stack}".strip()
    of_t5 = name_of(family) in LIKE_T5
    path, first = (
        place(family, site, each).path.rpartition(".")[0]
        for each in (layer, layer if "umt5" in family else 0)
    )
    module, found = whole.get_submodule(path), {}
    handles: list[Any] = []
    for name in "qkv":

        def keep(_: Any, args: Any, result: Tensor, name: str = name) -> None:
            found[name] = result[0].unflatten(-1, (HEADS, WIDTH)).transpose(0, 1)

        part = module.get_submodule(name if of_t5 else f"{name}_proj")
        handles.append(part.register_forward_hook(keep))

    def instead(_: Any, args: Any) -> Any:
        if name_of(family) == "t5gemma" and stack != "cross":
            found.update({name: rotated(whole, stack, found[name]) for name in "qk"})
        scores = found["q"] @ found["k"].transpose(-1, -2)
        if not of_t5:
            scores = scores * WIDTH**-0.5
        elif stack != "cross":
            scores = scores + whole.get_submodule(first).compute_bias(*scores.shape[-2:])[0]
        if not stack:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        weights = weighed(scored(scores).softmax(-1))
        return ((weights @ found["v"]).transpose(0, 1).flatten(1)[None],)

    output = whole.get_submodule(place(family, site, layer).path)
    handles.append(output.register_forward_pre_hook(instead))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_attention(family: str, of: Text, site: str, stack: str, layer: int) -> Tensor:
    """[head, query, key] scores or weights of an unpatched run."""
    found: list[Tensor] = []

    def keep(values: Tensor) -> Tensor:
        found.append(values.clone())
        return values

    changes = {"scored" if site == "scores" else "weighed": keep}
    with explicit_attention(family, stack, layer, **changes):
        logits(family, of)
    return found[0]


@contextmanager
def written_query(
    family: str, site: str, stack: str, layer: int, head: int, query: int, change: Change
) -> Generator[None]:
    """Change the scores or weights of one query, [key]."""

    def whole(values: Tensor) -> Tensor:
        values = values.clone()
        values[head, query] = change(values[head, query])
        return values

    changes = {"scored" if site == "scores" else "weighed": whole}
    with explicit_attention(family, stack, layer, **changes):
        yield


def rotated(whole: Any, stack: str, vectors: Tensor) -> Tensor:
    """Queries or keys, [head, token, width], turned by their positions."""
    part = whole.model.encoder if stack else whole.model.decoder
    positions = torch.arange(vectors.shape[1])[None]
    cos, sin = part.rotary_emb(vectors, positions)
    first, second = vectors.chunk(2, -1)
    return vectors * cos + torch.cat([-second, first], -1) * sin


@torch.no_grad()
def written(
    family: str,
    of: Text,
    first: Sequence[Write] = (),
    newest: Callable[[int], Sequence[tuple[Place, Change]]] = lambda _: (),
    edit: Callable[[EncoderDecoderCache], None] | None = None,
    count: int = 5,
) -> tuple[list[int], list[Array]]:
    """A reply, token by token with the library's own cache, and the logits of each step.

    Args:
        family: The model.
        of: The text that the encoder reads.
        first: Hooks in the pass over the text and the decoder's first tokens.
        newest: Hooks at the single token of each later pass, of its step.
        edit: Changes the cache after the first pass.
        count: Number of tokens.
    """
    module, ids, found = model(family), torch.tensor([of.ids]), list[Array]()
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    given: dict[str, Any] = {"input_ids": ids}
    reply, own = list[int](), starts(family)
    for step in range(count):
        writes = first if step == 0 else [(place, [0], change) for place, change in newest(step)]
        with changed(module, writes):
            output = module(
                **given,
                decoder_input_ids=torch.tensor([own]),
                past_key_values=cache,
                use_cache=True,
            )
        if step == 0 and edit is not None:
            edit(cache)
        encoded = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
        given = {"encoder_outputs": encoded}
        found.append(output.logits[0, -1].double().numpy())
        chosen = int(found[-1].argmax())
        if chosen == module.config.eos_token_id:
            break
        reply.append(chosen)
        own = [chosen]
    return reply, found
