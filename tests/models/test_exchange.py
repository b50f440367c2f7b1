"""Replacing and packing attention that bypasses the library's attention functions."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.attention import (
    CachedAttention,
    GroupMasks,
    attend,
    exchange_attention,
    get_own_attention,
)
from mechdsl.forward.hooks.attention_hooks import AttentionGroup
from mechdsl.forward.hooks.batch import Batch, DeviceIndex
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.module_exchange import (
    ATTENTION_ENTRIES,
    attend_eagerly,
    find_attention_entry,
)
from mechdsl.loading.loader import adopt_model

from ..quick import some
from . import families
from .clean import clean_model_check
from .test_hooks import nothing_left
from .test_packed import PaddingSide, kept_of, rows_of_whole_passes

_ALIBI: dict[str, Any] = {"alibi": True, "multi_query": False, "bias": True}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("gptj", {}),
    "codegen": ("codegen", {}),
    "gpt_neo": ("gpt_neo", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "xglm": ("xglm", {}),
    "bloom": ("bloom", {}),
    "bloom, heads not a power of two": ("bloom", {"n_head": 6}),
    "bloom, normed residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "mpt": ("mpt", {}),
    "mpt, heads not a power of two": ("mpt", {"n_heads": 6}),
    "mpt, a scale of its own": ("mpt", {"attn_config": {"softmax_scale": 0.6}}),
    "mpt, clipped": ("mpt", {"attn_config": {"clip_qkv": 0.7}}),
    "falcon": ("falcon", {}),
    "falcon, eager": ("falcon", {"attn_implementation": "eager"}),
    "falcon, a key for each head": ("falcon", {"multi_query": False, "bias": True}),
    "falcon, one after the other": ("falcon", {"parallel_attn": False}),
    "falcon, biases": ("falcon", {**_ALIBI, "parallel_attn": False}),
    "falcon, biases, eager": ("falcon", {**_ALIBI, "attn_implementation": "eager"}),
    "falcon, biases, one key": ("falcon", {"alibi": True}),
    "falcon, groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, groups, eager": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "attn_implementation": "eager"},
    ),
    "falcon, groups, biases": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": True},
    ),
}
"""Family and config changes by case."""

ROWS = [
    [1, 9, 22, 31, 17, 40, 5, 28, 33],
    [1, 14, 8, 51],
    [1, 30, 11, 6, 45, 19, 36],
]


@dataclass
class Bare:
    """The attributes of a model that `exchange_attention` needs."""

    module: nn.Module
    device: ClassVar[torch.device] = torch.device("cpu")
    attention_configs = LoadedModel.attention_configs
    written_out = LoadedModel.written_out


def build(case: str, seed: int = 0) -> nn.Module:
    family, changed = VARIANTS[case]
    return families.module(family, seed, **changed)


def logits(module: nn.Module, batch: Batch) -> Tensor:
    """Of real tokens."""
    with torch.inference_mode():
        found = module(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.position_ids()
        )
    return found.logits[batch.mask.bool()]


@contextmanager
def counted(module: nn.Module) -> Generator[list[nn.Module]]:
    """Record the modules whose attention ran through the replacement."""
    calls: list[nn.Module] = []

    def attend(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert get_own_attention(part, {}) is attend_eagerly
        calls.append(part)
        return attend_eagerly(part, *args, **kwargs)

    with exchange_attention(cast(LoadedModel, Bare(module)), attend, masked=True):
        yield calls


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", VARIANTS)
def test_replaced_attention_equals_the_original(case: str, side: PaddingSide) -> None:
    for seed in (0, 1):
        module = build(case, seed)
        batch = Batch.of(ROWS, 0, side)
        expected = logits(module, batch)
        with counted(module) as calls:
            found = logits(module, batch)
        assert len(calls) == 3
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(logits(module, batch), expected)
        assert nothing_left(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["gptj", "codegen", "gpt_neo", "bloom", "mpt", "falcon, biases"])
def test_replaced_attention_in_half_precision_equals_the_original(
    case: str, dtype: torch.dtype
) -> None:
    module = build(case).to(dtype)
    batch = Batch.of(ROWS, 0, "left")
    expected = logits(module, batch)
    with counted(module):
        found = logits(module, batch)
    assert found.dtype == dtype
    assert not found.isnan().any()
    tolerance = 8 * torch.finfo(dtype).eps
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# --- packed ---------------------------------------------------------------------------------------


def adopted(case: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    model, found = adopt_model("m", build(case).to(dtype), families.tokenizer())
    assert model is not None, [(d.message, d.label_text) for d in found]
    assert found == []
    assert model.restartable
    return model


@pytest.mark.parametrize("case", some(VARIANTS, list(VARIANTS)[::3]))
def test_packed_rows_with_replaced_attention_equal_full_passes(case: str) -> None:
    """Every site and layer, at an early token and at a late one."""
    model = adopted(case)
    for side in ("left", "right"):
        kept = kept_of(model, side, ROWS)
        rows_of_whole_passes(model, kept, (0, 3))
    assert nothing_left(model.module)


@pytest.mark.parametrize("case", ["codegen", "mpt", "bloom"])
def test_models_with_wide_positions_are_restartable_in_bfloat16(case: str) -> None:
    """Positions or biases have a wider dtype than the model."""
    assert adopted(case, torch.bfloat16).restartable


# --- masks ----------------------------------------------------------------------------------------


def test_alibi_biases_share_one_mask_in_all_blocks() -> None:
    model = adopted("bloom, heads not a power of two")
    masks = [kept.mask for kept in kept_of(model, "left", ROWS).attention.values()]
    assert all(mask is masks[0] for mask in masks)
    mask = masks[0]
    assert mask is not None
    assert mask.shape == (3, 6, 9, 9)
    lowest = torch.finfo(mask.dtype).min
    assert (mask[1, :, :, :5] <= lowest / 2).all()  # padding
    for query in range(5, 9):
        assert (mask[1, :, query, query + 1 :] <= lowest / 2).all()
    slopes = mask[1, :, 8, 6:] - mask[1, :, 8, 5:8]
    assert torch.allclose(slopes, slopes[:, :1].expand(-1, 3))
    assert slopes[:, 0].unique().numel() == 6


@pytest.mark.parametrize("case", ["bloom", "mpt", "gpt_neo", "falcon, biases, eager"])
def test_prompts_of_equal_length_share_one_mask(case: str) -> None:
    model = adopted(case)
    kept = kept_of(model, "left", [row[:4] for row in ROWS])
    masks = [each.mask for each in kept.attention.values()]
    if case == "gpt_neo":  # the first block sees everything
        masks = masks[1:]
    assert all(mask is masks[0] for mask in masks)
    assert masks[0] is not None
    assert masks[0].shape[0] == 1


def test_local_attention_mask_hides_tokens_outside_the_window() -> None:
    first, *others = kept_of(adopted("gpt_neo"), "left", ROWS).attention.values()
    assert first.mask is not None
    sees = [
        [int((mask[0, 0, query] > -1).sum()) for query in range(9)]
        for mask in (first.mask, *(each.mask for each in others if each.mask is not None))
    ]
    assert sees == [[*range(1, 10)], [1, 2, *[3] * 7], [1, 2, *[3] * 7]]


# --- cleanup --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["gptj", "bloom", "falcon"])
def test_interrupted_attention_replacement_restores_modules(
    family: str, error: type[BaseException]
) -> None:
    module = build(family)
    config = cast(Any, module).config
    batch, before = Batch.of(ROWS, 0, "left"), config._attn_implementation
    expected = logits(module, batch)

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise error

    bare = cast(LoadedModel, Bare(module))
    for masked in (True, False):
        with pytest.raises(error), exchange_attention(bare, interrupt, masked=masked):
            logits(module, batch)
        assert nothing_left(module)
        assert clean_model_check(module) == []
        assert config._attn_implementation == before
    with exchange_attention(bare, attend_eagerly, masked=True):
        assert len(clean_model_check(module)) == 3
    assert torch.equal(logits(module, batch), expected)


def test_custom_forward_is_restored_after_the_replacement() -> None:
    module = build("bloom")
    part = cast(Any, module).transformer.h[1].self_attention
    own = part.forward
    calls: list[int] = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    part.forward = theirs
    with counted(module) as attended:
        logits(module, Batch.of(ROWS, 0, "left"))
    assert (len(attended), calls) == (3, [])
    assert part.forward is theirs


def test_only_library_classes_have_attention_entries() -> None:
    assert all(find_attention_entry(build(case)) is None for case in ("bloom", "falcon"))
    attention = cast(Any, build("bloom")).transformer.h[0].self_attention
    assert find_attention_entry(attention) is ATTENTION_ENTRIES["BloomAttention"]

    class BloomAttention(nn.Module):
        pass

    assert find_attention_entry(BloomAttention()) is None


@pytest.mark.parametrize("way", ["plain", "packed"])
def test_float32_biases_keep_their_precision_in_bfloat16_attention(way: str) -> None:
    """256.5 rounds to 256 in bfloat16, which would merge the biases of distant tokens."""
    zeros = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16)
    values = torch.tensor([[1.0], [0.0]]).expand(2, 4).bfloat16()[None, None]
    mask = torch.tensor([256.5, 256.0]).expand(1, 1, 2, 2)
    if way == "plain":
        out, _ = attend_eagerly(nn.Identity(), zeros, zeros, values, mask, scaling=1.0)
        found = out[0, 1, 0]
    else:
        last = AttentionGroup(0, DeviceIndex.of([0]), 1, DeviceIndex.of([1]), DeviceIndex.of([0]))
        kept = CachedAttention(zeros, values, mask)
        query, value = zeros[0, :, :1], values[0, :, 1:]
        out = torch.empty(1, 1, 4, dtype=torch.bfloat16)
        attend(query, query, value, [last], kept, out, masks=GroupMasks(), scaling=1.0)
        found = out[0, 0]
    assert torch.allclose(found.float(), torch.tensor(1 / (1 + math.exp(-0.5))), atol=1e-2)
