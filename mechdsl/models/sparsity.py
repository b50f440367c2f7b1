"""Which blocks of a mixture-of-experts model have one MLP instead, as far as its config tells."""

from __future__ import annotations

from typing import Any, cast

from mechdsl.models.adapters import Config


def dense_blocks(config: Config, n_layers: int) -> frozenset[int]:
    """Blocks without experts, counted from 0."""
    layers = frozenset(range(n_layers))
    for key, kind in (("mlp_layer_types", "dense"), ("layers_block_type", "mlp")):
        kinds = _listed(config, key)
        if len(kinds) == n_layers:
            return frozenset(layer for layer, own in enumerate(kinds) if own == kind)
    if "moe_layers" in config or "interleave_moe_layer_step" in config:  # Llama 4
        step = _number(config, "interleave_moe_layer_step", 1)
        return layers - frozenset(_listed(config, "moe_layers") or range(step - 1, n_layers, step))
    if period := _number(config, "expert_layer_period"):  # Jamba
        offset = _number(config, "expert_layer_offset")
        return frozenset(layer for layer in layers if layer % period != offset)
    first = max(_number(config, key) for key in ("first_k_dense_replace", "num_dense_layers"))
    dense = {*range(first), *_listed(config, "mlp_only_layers")}
    for key in ("decoder_sparse_step", "moe_layer_interval"):
        if step := _number(config, key):
            dense |= {layer for layer in layers if (layer + 1) % step}
    if "moe_layer_interval" in config:  # ERNIE 4.5
        end = _number(config, "moe_layer_end_index", -1)
        dense |= set(range(_number(config, "moe_layer_start_index")))
        dense |= set(range(end + 1, n_layers)) if end >= 0 else set()
    return frozenset(dense & layers)


def _number(config: Config, key: str, default: int = 0) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else default


def _listed(config: Config, key: str) -> list[Any]:
    value = config.get(key)
    return cast(list[Any], value) if isinstance(value, list) else []
