"""Queries, keys and values: which linear map makes them, and where each head lies in what it
returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mechdsl.models.adapters import Family
from mechdsl.models.anatomy import HookPoint, Layout
from mechdsl.models.shape import ModelShape

_SPLIT = {
    "q": (
        "q_proj",
        "query",
        "wq",
        "q_lin",
        "Wq",
        "q",
        "query_proj",
        "q_b_proj",
        "linear_q",
        "q_gate_proj",
    ),
    "k": ("k_proj", "key", "wk", "k_lin", "Wk", "k", "key_proj", "linear_k"),
    "v": ("v_proj", "value", "wv", "v_lin", "Wv", "v", "value_proj", "linear_v"),
}
_FUSED = (
    "c_attn", "qkv_proj", "Wqkv", "qkv", "query_key_value", "in_proj", "attn_qkv", "qkv_linear",
)  # fmt: skip
_LATENT = "kv_b_proj"
"""Multi-head latent attention: each head's key without its rotary part, then its value."""
_QK_NORMS = {
    "q": (
        "q_norm",
        "q_layernorm",
        "query_norm",
        "query_layernorm",
        "q_ln",
        "qk_norm",
        "q_b_norm",
        "q_l2_clip",
    ),
    "k": ("k_norm", "k_layernorm", "key_norm", "key_layernorm", "k_ln", "qk_norm", "k_l2_clip"),
    "v": ("v_norm",),
}


class NotFound(Exception):
    """A part that wasn't found, and why."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(part, reason)
        self.part = part
        self.reason = reason


@dataclass(frozen=True)
class HeadSizes:
    """Of one block's attention."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    """Of queries and keys."""
    d_value: int
    odd: bool = False
    """Not those of the model, so that how many there are shows in the projections alone."""


def leaf(path: str) -> str:
    """The last part of a path."""
    return path.rpartition(".")[2]


def sizes(module: Any) -> tuple[int, int] | None:
    """(features in, features out) of a linear map; None for other modules.

    GPT-2's `Conv1D` keeps its weight as [in, out], everything else as [out, in].
    """
    module = without_adapter(module)
    weight = getattr(module, "weight", None)
    if weight is None or getattr(weight, "ndim", 0) != 2 or hasattr(module, "num_embeddings"):
        return None
    rows, columns = (int(n) for n in weight.shape)
    return (rows, columns) if transposed(module) else (columns, rows)


def transposed(module: Any) -> bool:
    """Whether a linear map keeps its weight as [in, out]."""
    return type(without_adapter(module)).__name__ == "Conv1D"


def without_adapter(module: Any) -> Any:
    """The module that peft has put adapters around; itself where there are none."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def heads_of(
    shape: ModelShape,
    attention: Any,
    projections: Mapping[str, tuple[int, int]],
    inside: Mapping[str, Any],
) -> HeadSizes:
    """The sizes of one block's heads: the module's own where it has other ones than the model."""

    def number(default: int, *names: str) -> int:
        values = (getattr(attention, name, None) for name in names)
        return next((value for value in values if isinstance(value, int)), default)

    latent = _LATENT in {leaf(p) for p in projections}
    n_heads = number(shape.n_heads, "num_heads", "num_attention_heads")
    shared = number(shape.n_heads // shape.n_kv_heads, "num_key_value_groups")
    d_head = number(shape.d_head, "qk_head_dim" if latent else "head_dim")
    same = shape.d_value if d_head == shape.d_head else d_head
    d_value = number(same, "v_head_dim")
    odd = shared * shape.n_kv_heads != shape.n_heads
    if latent and (n_heads, d_head, d_value) != (shape.n_heads, shape.d_head, shape.d_value):
        return HeadSizes(n_heads, n_heads, d_head, d_value)
    odd = odd or n_heads != shape.n_heads or d_head != shape.d_head
    return HeadSizes(shape.n_heads, shape.n_kv_heads, d_head, d_value, odd=odd)


def qkv_taps(
    attention: str,
    projections: Mapping[str, tuple[int, int]],
    inside: Mapping[str, Any],
    heads: HeadSizes,
    family: type[Family],
    parts: Mapping[str, str],
) -> tuple[dict[str, HookPoint], tuple[str, ...]]:
    """Queries, keys and values as attention reads them (behind their norm, if there is one), and
    the linear maps that make them; paths within the block."""
    taps = _split(projections, heads, parts) or _fused(projections, heads, family)
    inputs = tuple(dict.fromkeys(tap.path for tap in taps.values()))
    raw = {site: tap.layout for site, tap in taps.items()}
    for site, names in _QK_NORMS.items():
        if site in taps and not family.norms_behind_rotary:
            norm = _qk_norm(attention, inside, names, taps[site].layout, family)
            taps[site] = norm or taps[site]
    if "k" in taps and "v" not in taps:  # keys are values, each with a norm of its own
        norm = _qk_norm(attention, inside, _QK_NORMS["v"], raw["k"], family)
        taps |= {} if norm is None else {"v": norm}
    return taps, inputs


def _split(
    projections: Mapping[str, tuple[int, int]], heads: HeadSizes, parts: Mapping[str, str]
) -> dict[str, HookPoint]:
    """A linear map for each; empty where there are none."""
    latent = next((p for p in projections if leaf(p) == _LATENT), None)
    counts = {"q": heads.n_heads, "k": heads.n_kv_heads, "v": heads.n_kv_heads}
    widths = {"q": heads.d_head, "k": heads.d_head, "v": heads.d_value}
    taps: dict[str, HookPoint] = {}
    for site, names in _SPLIT.items():
        path = next((p for name in names for p in projections if _called(p) == name), None)
        if latent is not None and site != "q":
            continue
        if path is None and site != "q" and taps and not _any_of(projections, _FUSED):
            continue  # keys or values of another block (Gemma 3n)
        if path is None:
            return {}
        count, width, out = counts[site], widths[site], projections[path][1]
        step = width
        if site == "q" and out in (count * (width + heads.d_value), 2 * count * width):
            step = out // count  # each head's query, then its gate
        if out != count * step:
            if not heads.odd:
                raise NotFound(
                    f"`{site}`", f"`{path}` gives {out} features, not {count} heads of {width}"
                )
            count = out // width
        layout = Layout(count, width, stride=step)
        taps[site] = HookPoint(_wrapper(path), "out", layout)
    if latent is not None:
        each = projections[latent][1] // heads.n_heads
        layout = Layout(heads.n_heads, heads.d_value, offset=each - heads.d_value, stride=each)
        taps["v"] = HookPoint(latent, "out", layout)
    return taps


def _wrapper(path: str) -> str:
    """The module that stands for a linear map: what holds it, where it is called just that."""
    return path.removesuffix(".linear")


def _called(path: str) -> str:
    return leaf(_wrapper(path))


def _any_of(projections: Mapping[str, tuple[int, int]], names: tuple[str, ...]) -> bool:
    return any(leaf(path) in names for path in projections)


def _fused(
    projections: Mapping[str, tuple[int, int]], heads: HeadSizes, family: type[Family]
) -> dict[str, HookPoint]:
    """One linear map for queries, keys and values."""
    n, kv, d = heads.n_heads, heads.n_kv_heads, heads.d_head
    for path, (_, out) in projections.items():
        if leaf(path) not in _FUSED or out != (n + 2 * kv) * d:
            continue
        own = family.fused(n, kv, d)
        if own is not None:
            layouts = dict(own)
        elif (family.interleaved or leaf(path) == "query_key_value") and kv > 1:
            shared = n // kv
            step = (shared + 2) * d
            layouts = {
                "q": Layout(n, d, stride=step, group=shared),
                "k": Layout(kv, d, offset=shared * d, stride=step),
                "v": Layout(kv, d, offset=(shared + 1) * d, stride=step),
            }
        else:
            layouts = {
                "q": Layout.heads(n, d),
                "k": Layout.heads(kv, d, offset=n * d),
                "v": Layout.heads(kv, d, offset=(n + kv) * d),
            }
        return {site: HookPoint(path, "out", layouts[site]) for site in layouts}
    raise NotFound("query, key and value projections", f"known names: {_known_names()}")


def _qk_norm(
    attention: str,
    inside: Mapping[str, Any],
    names: tuple[str, ...],
    raw: Layout,
    family: type[Family],
) -> HookPoint | None:
    """The norm behind a query or key projection, which is what attention reads."""
    for path, module in inside.items():
        if not path.startswith(attention + ".") or leaf(path) not in names:
            continue
        if type(module).__name__ == "Identity":
            continue
        weight = getattr(module, "weight", None)
        over_all = weight is not None and weight.ndim == 1 and int(weight.shape[0]) != raw.width
        if over_all:
            layout = Layout.heads(raw.units, raw.width)
        else:  # or `heads_first`, which only its tensors tell
            layout = Layout(raw.units, raw.width, axes="heads")
        return HookPoint(path, "out", layout)
    return None


def _known_names() -> str:
    names = [name for names in _SPLIT.values() for name in names[:1]]
    return ", ".join(f"`{n}`" for n in (*names, *_FUSED))
