"""Faults injected into packed rows: comparisons with hooks and the check on load find them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from mechdsl.forward.hooks.attention import CachedAttention
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.packed import packed_pass as packed
from mechdsl.forward.packed.activation_cache import ActivationCache
from mechdsl.forward.packed.packed_pass import ComputedTokens
from mechdsl.loading.anatomy_proof import verify_model
from mechdsl.models.restart import TokenMask

from .test_against_reference import ABSOLUTE, CUT, PACKED, WHOLE, compare


def _shifted_keys(keys: Tensor, values: Tensor, mask: Tensor | None, _: Any) -> CachedAttention:
    return CachedAttention(keys.roll(1, dims=2), values, mask)


def _shifted_values(keys: Tensor, values: Tensor, mask: Tensor | None, _: Any) -> CachedAttention:
    return CachedAttention(keys, values.roll(1, dims=2), mask)


def _keys_of_another_lane(
    keys: Tensor, values: Tensor, mask: Tensor | None, _: Any
) -> CachedAttention:
    return CachedAttention(keys.roll(1, dims=0), values, mask)


def _shifted_part(**fields: Any) -> ComputedTokens:
    return ComputedTokens(**{**fields, "taken_from": (fields["taken_from"] - 1).clamp(min=0)})


class _Below(dict[int, Tensor]):
    """Hidden states in which each block gets the input of the preceding one."""

    def get(self, key: int, default: Any = None) -> Any:
        return super().get(max(key - 1, 0), default)


def _hidden_of_the_block_below(batch: Any) -> ActivationCache:
    return ActivationCache(batch, hidden=_Below())


def _shifted_positions(model: LoadedModel, ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
    return _inputs(model, ids, positions + 1)


def _mixed_heads(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> None:
    """Attend with key-value heads repeated as 0 1 0 1 instead of 0 0 1 1."""
    *between, out = args
    shared = query.shape[0] // key.shape[0]
    order = [i + shared * j for i in range(shared) for j in range(key.shape[0])]
    mixed = out[:, order].contiguous()
    _attend(query[order], key, *between, mixed, **kwargs)
    out[:, order] = mixed


def _only_itself(mask: TokenMask) -> TokenMask:
    return mask


_inputs: Any = packed.__dict__["build_text_inputs"]
_attend: Any = packed.__dict__["attend"]

INPUTS = "forward.packed.packed_pass.build_text_inputs"

FAULTS: dict[str, tuple[str, str, Any]] = {
    "kept keys shifted by a column": (
        "llama",
        "forward.packed.activation_cache.CachedAttention",
        _shifted_keys,
    ),
    "kept values shifted by a column": (
        "gpt2",
        "forward.packed.activation_cache.CachedAttention",
        _shifted_values,
    ),
    "kept keys of another lane": (
        "gpt2",
        "forward.packed.activation_cache.CachedAttention",
        _keys_of_another_lane,
    ),
    "the mask ignored": ("llama", "forward.hooks.attention.GroupMasks.of", lambda *args: None),
    "the window ignored": (
        "mistral",
        "forward.hooks.attention.GroupMasks.of",
        lambda *args: None,
    ),
    "taken from the column before": (
        "gpt_neox",
        "forward.packed.packed_pass.ComputedTokens",
        _shifted_part,
    ),
    "the stream of the block below": (
        "qwen3",
        "forward.packed.activation_cache.ActivationCache",
        _hidden_of_the_block_below,
    ),
    "later tokens forgotten": ("gpt2", "models.restart.mask_from_first", _only_itself),
    "rotary positions shifted": ("llama", INPUTS, _shifted_positions),
    "learned positions shifted": ("gpt2", INPUTS, _shifted_positions),
    "heads of another group": ("qwen2", "forward.packed.packed_pass.attend", _mixed_heads),
}
"""Family, the replaced object, and its replacement."""

SITES = ("embed", "resid_pre", "k", "z")


@pytest.mark.parametrize("fault", FAULTS)
def test_packed_fault_is_found_by_hooks_and_by_the_load_check(
    loaded: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    family, name, put = FAULTS[fault]
    model = loaded[family]
    for one in name.split():
        monkeypatch.setattr(f"mechdsl.{one}", put)
    for way in (PACKED, CUT):
        worst = max(compare(model, family, site, "left", [way])[0] for site in SITES)
        assert worst > 100 * ABSOLUTE, way.name
    whole = max(compare(model, family, site, "left", [WHOLE])[0] for site in SITES)
    assert whole <= ABSOLUTE
    again = verify_model(model)
    assert again.model is not None
    assert not again.model.restartable
    assert [d.code for d in again.problems] == ["W0711"]


def test_ignored_padding_is_found_by_hooks_and_by_the_load_check(
    loaded: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded["gpt2"]  # loaded without the fault, whatever test runs first
    monkeypatch.setattr(
        "mechdsl.forward.packed.packed_pass.PromptColumns.of",
        lambda self, rows, positions: positions + 0,
    )
    right, left = (
        max(compare(model, "gpt2", site, side, [PACKED])[0] for site in SITES)
        for side in ("right", "left")
    )
    assert right <= ABSOLUTE
    assert left > 100 * ABSOLUTE
    again = verify_model(model)
    assert [d.code for d in again.problems] == ["W0711"]
