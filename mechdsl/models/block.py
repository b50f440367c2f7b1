"""Find the components of one block: sublayers, norms, projections, heads and experts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mechdsl.models.shape import (
    BlockAnatomy,
    BlockArrangement,
    BlockSizes,
    Family,
    HookPoint,
    ModelShape,
    TensorLayout,
)

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


class MissingComponent(Exception):
    """A component that the finder doesn't find, and the reason."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(part, reason)
        self.part = part
        self.reason = reason


def last_name(path: str) -> str:
    """Return the last component of a path."""
    return path.rpartition(".")[2]


def linear_sizes(module: Any) -> tuple[int, int] | None:
    """Return (features in, features out) of a linear map; None for other modules.

    GPT-2's `Conv1D` stores its weight as [in, out], every other linear map as [out, in].
    """
    module = unwrap_adapter(module)
    weight = getattr(module, "weight", None)
    if weight is None or getattr(weight, "ndim", 0) != 2 or hasattr(module, "num_embeddings"):
        return None
    rows, columns = (int(n) for n in weight.shape)
    return (rows, columns) if is_transposed(module) else (columns, rows)


def is_transposed(module: Any) -> bool:
    """Return whether a linear map stores its weight as [in, out]."""
    return type(unwrap_adapter(module)).__name__ == "Conv1D"


def unwrap_adapter(module: Any) -> Any:
    """Return the module that peft wrapped in adapters; the module itself if it has none."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def head_sizes(
    block: BlockSizes, attention: Any, projections: Mapping[str, tuple[int, int]]
) -> tuple[BlockSizes, bool]:
    """Return the sizes of a block's heads: the module's if they differ from the config's.

    Returns:
        The sizes, and whether only the projections show the number of heads.
    """

    def number(default: int, *names: str) -> int:
        values = (getattr(attention, name, None) for name in names)
        return next((value for value in values if isinstance(value, int)), default)

    latent = _LATENT in {last_name(p) for p in projections}
    n_heads = number(block.heads, "num_heads", "num_attention_heads")
    shared = number(block.heads // block.kv_heads, "num_key_value_groups")
    d_head = number(block.d_head, "qk_head_dim" if latent else "head_dim")
    same = block.d_value if d_head == block.d_head else d_head
    d_value = number(same, "v_head_dim")
    widths = replace(block, d_head=d_head, d_value=d_value)
    if latent:
        return replace(widths, heads=n_heads, kv_heads=n_heads), False
    is_odd = shared * block.kv_heads != block.heads
    return widths, is_odd or n_heads != block.heads or d_head != block.d_head


def find_qkv(
    attention: str,
    projections: Mapping[str, tuple[int, int]],
    inside: Mapping[str, Any],
    heads: BlockSizes,
    family: Family,
    parts: Mapping[str, str],
    *,
    is_odd: bool,
) -> tuple[dict[str, HookPoint], tuple[str, ...]]:
    """Find queries, keys and values as attention reads them (after their norm, if there is one).

    Args:
        is_odd: Whether the projections show the number of heads.

    Returns:
        Site to hook point, and the linear maps that compute queries, keys and values; paths within
        the block.
    """
    taps = _split(projections, heads, parts, is_odd=is_odd) or _fused(projections, heads, family)
    inputs = tuple(dict.fromkeys(tap.path for tap in taps.values()))
    raw = {site: tap.layout for site, tap in taps.items()}
    for site, names in _QK_NORMS.items():
        if site in taps and not family.norms_after_rotary:
            norm = _qk_norm(attention, inside, names, taps[site].layout)
            taps[site] = norm or taps[site]
    if "k" in taps and "v" not in taps:  # one projection for both, each with a separate norm
        norm = _qk_norm(attention, inside, _QK_NORMS["v"], raw["k"])
        taps |= {} if norm is None else {"v": norm}
    return taps, inputs


def _split(
    projections: Mapping[str, tuple[int, int]],
    heads: BlockSizes,
    parts: Mapping[str, str],
    *,
    is_odd: bool,
) -> dict[str, HookPoint]:
    """Find a separate linear map for each of q, k and v; empty if there are none."""
    latent = next((p for p in projections if last_name(p) == _LATENT), None)
    counts = {"q": heads.heads, "k": heads.kv_heads, "v": heads.kv_heads}
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
            if not is_odd:
                raise MissingComponent(
                    f"`{site}`", f"`{path}` gives {out} features, not {count} heads of {width}"
                )
            count = out // width
        layout = TensorLayout(count, width, stride=step)
        taps[site] = HookPoint(_wrapper(path), "out", layout)
    if latent is not None:
        each = projections[latent][1] // heads.heads
        layout = TensorLayout(heads.heads, heads.d_value, offset=each - heads.d_value, stride=each)
        taps["v"] = HookPoint(latent, "out", layout)
    return taps


def _wrapper(path: str) -> str:
    """Return the module that represents a linear map: its parent if the map is called `linear`."""
    return path.removesuffix(".linear")


def _called(path: str) -> str:
    return last_name(_wrapper(path))


def _any_of(projections: Mapping[str, tuple[int, int]], names: tuple[str, ...]) -> bool:
    return any(last_name(path) in names for path in projections)


def _fused(
    projections: Mapping[str, tuple[int, int]], heads: BlockSizes, family: Family
) -> dict[str, HookPoint]:
    """Find one linear map for queries, keys and values."""
    n, kv, d = heads.heads, heads.kv_heads, heads.d_head
    for path, (_, out) in projections.items():
        if last_name(path) not in _FUSED or out != (n + 2 * kv) * d:
            continue
        tensor_layouts = family.fused(n, kv, d)
        if tensor_layouts is not None:
            layouts = dict(tensor_layouts)
        elif (family.interleaved or last_name(path) == "query_key_value") and kv > 1:
            shared = n // kv
            step = (shared + 2) * d
            layouts = {
                "q": TensorLayout(n, d, stride=step, group=shared),
                "k": TensorLayout(kv, d, offset=shared * d, stride=step),
                "v": TensorLayout(kv, d, offset=(shared + 1) * d, stride=step),
            }
        else:
            layouts = {
                "q": TensorLayout.heads(n, d),
                "k": TensorLayout.heads(kv, d, offset=n * d),
                "v": TensorLayout.heads(kv, d, offset=(n + kv) * d),
            }
        return {site: HookPoint(path, "out", layouts[site]) for site in layouts}
    raise MissingComponent("query, key and value projections", f"known names: {_known_names()}")


def _qk_norm(
    attention: str,
    inside: Mapping[str, Any],
    names: tuple[str, ...],
    raw: TensorLayout,
) -> HookPoint | None:
    """Find the norm after a query or key projection; attention reads the norm's output."""
    for path, module in inside.items():
        if not path.startswith(attention + ".") or last_name(path) not in names:
            continue
        if type(module).__name__ == "Identity":
            continue
        weight = getattr(module, "weight", None)
        over_all = weight is not None and weight.ndim == 1 and int(weight.shape[0]) != raw.width
        if over_all:
            layout = TensorLayout.heads(raw.units, raw.width)
        else:  # `heads` or `heads_first`: only the tensors at run time distinguish them
            layout = TensorLayout(raw.units, raw.width, axes="heads")
        return HookPoint(path, "out", layout)
    return None


def _known_names() -> str:
    names = [name for names in _SPLIT.values() for name in names[:1]]
    return ", ".join(f"`{n}`" for n in (*names, *_FUSED))


_CROSS = re.compile(r"cross|encoder_attn|EncDec|inter_attn", re.IGNORECASE)

ATTENTION_NAME = re.compile(r"(attn|attention|attn_layer|self_attn_block)$", re.IGNORECASE)

MIXER_NAME = re.compile(
    r"(^|\.)(mixer|mamba|mamba_mixer|linear_attn|short_conv|conv|temporal_block|ssm|delta_net|mlstm_layer)$"
)
"""The sublayer that replaces attention in state-space, convolution and recurrent blocks."""

_LINEAR_ATTENTION = re.compile(r"linear_attn|lightning", re.IGNORECASE)

_MLP = re.compile(
    r"(^|\.)(mlp|feed_forward|ffn|ff|moe|moe_block|block_sparse_moe|mlp_block|ffn_block|"
    r"DenseReluDense|feedforward|shared_mlp)$"
)

_PAIRS = (
    ("fc1", "fc2"),
    ("linear1", "linear2"),
    ("intermediate.dense", "output.dense"),
    ("intermediate.up_proj", "output.down_proj"),
    ("lin1", "lin2"),
)
"""Linear maps of an MLP that isn't a separate module."""

_OUTPUT = (
    "o_proj", "c_proj", "out_proj", "dense", "wo", "linear_proj", "out_lin", "proj", "Wo", "o",
    "projection_layer", "O", "projection", "output",
)  # fmt: skip

_DOWN = (
    "down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "out_proj", "c_fc2", "wo", "Wo",
    "lin2", "output_linear", "linear_2", "linear_fc2", "output.dense", "proj_out", "proj_down",
)  # fmt: skip

_NORMS_AFTER_ATTENTION = (
    "post_self_attn_layernorm", "post_mixer_norm", "post_norm1", "post_operator_norm",
    "post_attention_layernorm",
    "attn_post_norm", "post_attn_norm", "temporal_post_norm",
)  # fmt: skip

_NORMS_AFTER_MLP = (
    "post_feedforward_layernorm", "post_mlp_layernorm", "mlp_post_norm", "post_ffn_norm",
    "post_moe_norm", "post_ff_layernorm", "post_norm2",
)  # fmt: skip

_SCALES = (("layer_scale1", "layer_scale2"), ("ls1", "ls2"))
"""Modules that scale sublayer outputs before the addition (layer scale)."""

_MLP_NORMS = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "pre_ff_layernorm",
    "pre_moe_layernorm",
    "post_attention_layernorm",
    "ln_2",
    "ln2",
    "norm2",
    "norm_2",
    "ffn_norm",
    "norm_ffn",
    "feedforward_layernorm",
    "ln_mlp",
    "layernorm_after",
    "layer_norm2",
    "mlp_norm",
    "final_layer_norm",
    "output_layer_norm",
)


def is_norm(module: Any) -> bool:
    """Return whether a module is a norm, judged by its class name: norms share no base class.

    Composite modules of a family with "norm" in its name don't count.
    """
    name = type(module).__name__
    part = re.search(r"attention|(pooler|embeddings|encoder|intermediate|output|head)$", name, re.I)
    return "norm" in name.lower() and part is None


_NORMED = (
    "attention.output.LayerNorm", "attention.LayerNorm", "attention.ln",
    "attention.output.layer_norm", "attention.self_attn_layer_norm",
)  # fmt: skip

_NORMED_AGAIN = (
    "output.LayerNorm", "LayerNorm", "ln", "intermediate.LayerNorm", "output.layer_norm",
)  # fmt: skip


def bert_components(inside: Mapping[str, Any]) -> dict[str, str]:
    """Return the components of a BERT-style block, whose output modules add the residual."""
    if "attention.output.dense" not in inside or "intermediate.dense" not in inside:
        return {}
    first = next((p for p in _NORMED if p in inside), "")
    second = next((p for p in _NORMED_AGAIN if p in inside), "")
    own = "attention.self" if "attention.self" in inside else "attention.attention"
    return {
        "attention": own,
        "output": "attention.output.dense",
        "attn_out": "attention.output.dense",
        "mlp": "intermediate.dense, output.dense",
        "mlp_out": "output.dense",
        "down": "output.dense",
        "norms": f"{first}, {second}" if first and second else "",
    }


def _as_t5(inside: Mapping[str, Any]) -> dict[str, str]:
    """Return the norms of a block that lists its sublayers, each with its norm and residual sum."""
    last = max((int(p.split(".")[1]) for p in inside if re.fullmatch(r"layer\.\d+", p)), default=0)
    norms = ("layer.0.layer_norm", f"layer.{last}.layer_norm")
    return {"norms": ", ".join(norms)} if last and all(n in inside for n in norms) else {}


@dataclass(frozen=True)
class BlockContext:
    """The facts about a stack that its blocks depend on."""

    shape: ModelShape
    stack: str
    family: Family
    parts: Mapping[str, str]
    scales: Mapping[str, float]
    without: Mapping[str, str]
    hybrid: bool
    """Some blocks have no attention."""


def find_mixer(inside: Mapping[str, Any]) -> str | None:
    """Find a sublayer that replaces attention."""
    return next((p for p in inside if "." not in p and MIXER_NAME.search(p)), None)


class BlockComponents:
    """The components of one block, found from its modules."""

    def __init__(
        self,
        around: BlockContext,
        layer: int,
        path: str,
        inside: Mapping[str, Any],
        arrangement: BlockArrangement,
    ) -> None:
        self.around = around
        self.shape = around.shape
        self.sizes = around.shape.blocks[layer]
        self.path = path
        self.inside = inside
        self.arrangement = arrangement
        self.parts = {**bert_components(inside), **_as_t5(inside), **around.parts}

    def anatomy(self) -> BlockAnatomy:
        if self.around.stack == "cross":
            return self._cross()
        attention = self._attention()
        if attention is None and self.around.family.attends_apart:
            return self._stream()
        mixer = find_mixer(self.inside) if self.around.hybrid else None
        mixer = self._given("mixer", mixer)
        first = mixer or attention
        if first is None:
            raise MissingComponent("attention", f"no such module in `{self.path}`")
        mlp = self._mlp(first)
        before_a, before_m, after_a, after_m = self._norms(first, mlp)
        if self.arrangement == "after the sum" and before_a is None and before_m is None:
            before_a, before_m, after_a, after_m = after_a, after_m, None, None
        whole = TensorLayout.whole(self.shape.d_model)
        taps = {"resid_pre": HookPoint(self.path, "in", whole)}
        output = None
        projections: tuple[str, ...] = ()
        name = "mixer" if self.around.hybrid else "attn"
        added = self._tap(self._given("attn_out", after_a or first), f"{name}_out")
        taps[f"{name}_norm"] = HookPoint(
            self._at(self._given("attn_reads", first) or ""), "in", whole
        )
        if not self.around.hybrid:
            assert attention is not None
            heads, projections, output = self._heads(attention)
            taps |= heads
        taps[f"{name}_out"] = added
        middle = end = None
        if self.arrangement == "after the sum":
            middle, end = self._given("middle", before_a), self._given("end", before_m)
            before_a = before_m = None
        if mlp and self.arrangement != "parallel":
            taps["resid_mid"] = (
                added if middle is None else HookPoint(self._at(middle), "out", whole)
            )
        has_other_mlp = self._has_other_mlp(mlp)
        down = self._down(mlp) if mlp and not has_other_mlp else None
        if mlp:
            taps |= self._mlp_taps(mlp, down, after_m, has_other_mlp=has_other_mlp)
        taps["resid_post"] = HookPoint(self.path, "out", whole)
        if self.arrangement == "parallel" and mlp and before_m is None:
            before_m = before_a
        return BlockAnatomy(
            path=self.path,
            taps=taps,
            projections=projections,
            output=output,
            mlp=() if has_other_mlp else tuple(self._at(p) for p in mlp),
            down=None if down is None else self._at(down),
            attn_norm=self._optional(self._given("attn_norm", before_a)),
            mlp_norm=self._optional(self._given("mlp_norm", before_m)),
            attn_output_norm=self._optional(after_a),
            mlp_output_norm=self._optional(after_m),
            middle=self._optional(middle),
            end=self._optional(end),
            adds_up=self.around.family.adds_up and (not mlp or "mlp_out" in taps),
        )

    def _stream(self) -> BlockAnatomy:
        """Return a block without its attention, which is part of the stack `cross`."""
        whole = TensorLayout.whole(self.shape.d_model)
        mlp = self._mlp("")
        down = self._down(mlp)
        taps = {
            "resid_pre": HookPoint(self.path, "in", whole),
            **self._mlp_taps(mlp, down, None, has_other_mlp=False),
            "resid_post": HookPoint(self.path, "out", whole),
        }
        norms = [p for p in self._direct_norms() if p in _MLP_NORMS]
        return BlockAnatomy(
            self.path,
            taps,
            mlp=tuple(self._at(p) for p in mlp),
            down=None if down is None else self._at(down),
            mlp_norm=self._optional(next(iter(norms), None)),
            adds_up=False,
            passes_on=False,
        )

    def _cross(self) -> BlockAnatomy:
        """Find the attention of a decoder's block to the encoder."""
        if self.around.family.attends_apart and self._attention() is not None:
            return BlockAnatomy(self.path, {}, adds_up=False, passes_on=False)
        paths = [p for p in self.inside if _CROSS.search(p) and self._projections(p)]
        cross = self._given("cross", min(paths, key=lambda p: p.count("."), default=None))
        if cross is None or cross not in self.inside:
            raise MissingComponent("cross attention", f"no such module in `{self.path}`")
        heads, projections, output = self._heads(cross)
        before, after = self._cross_norms()
        middle = None
        if self.arrangement == "after the sum":
            before, middle = None, before
        taps = {
            "attn_norm": HookPoint(self._at(cross), "in", TensorLayout.whole(self.shape.d_model)),
            **heads,
            "attn_out": self._tap(after or cross, "attn_out"),
        }
        return BlockAnatomy(
            self.path,
            taps,
            projections,
            output,
            attn_norm=self._optional(before),
            attn_output_norm=self._optional(after),
            middle=self._optional(middle),
        )

    def _cross_norms(self) -> tuple[str | None, str | None]:
        """Return (norm before cross attention or after its sum, norm between it and the sum)."""
        named = [p for p in self._direct_norms() if _CROSS.search(p)]
        if not named:  # the norm between those of attention and of the MLP
            listed = self.parts.get("norms", "").split(", ")
            between = "layer.1.layer_norm"
            named = [between] if listed[-1] == "layer.2.layer_norm" else self._direct_norms()[1:2]
        return (
            self._given("cross_norm", named[0] if named else None),
            named[1] if len(named) > 1 else None,
        )

    def _direct_norms(self) -> list[str]:
        return [p for p, m in self.inside.items() if "." not in p and is_norm(m)]

    # --- component lookup -----------------------------------------------------------------------

    def _at(self, part: str) -> str:
        return f"{self.path}.{part}" if part else self.path

    def _optional(self, part: str | None) -> str | None:
        return None if part is None else self._at(part)

    def _given(self, name: str, found: str | None) -> str | None:
        """Return the family's path for a component if this block has it, else `found`."""
        said = self.parts.get(name)
        if said is None:
            return found
        if said == "":
            return None
        return said if said in self.inside else found

    def _tap(self, part: str | None, site: str) -> HookPoint:
        assert part is not None
        scale = self.around.scales.get(site, 1.0)
        return HookPoint(self._at(part), "out", TensorLayout.whole(self.shape.d_model), scale=scale)

    def _linear(self, path: str) -> tuple[int, int]:
        size = linear_sizes(self.inside[path]) or linear_sizes(self.inside.get(f"{path}.linear"))
        assert size is not None
        return size

    def _projections(self, part: str) -> dict[str, tuple[int, int]]:
        """Return the linear maps inside a component of the block, with their sizes."""
        start = part + "."
        projections = ((p, linear_sizes(m)) for p, m in self.inside.items() if p.startswith(start))
        return {p: size for p, size in projections if size is not None}

    def _attention(self) -> str | None:
        paths = [
            p
            for p in self.inside
            if ATTENTION_NAME.search(p)
            and not _CROSS.search(p)
            and not _LINEAR_ATTENTION.search(p)
            and self._projections(p)
        ]
        return self._given("attention", min(paths, key=lambda p: p.count("."), default=None))

    def _mlp(self, first: str) -> tuple[str, ...]:
        """Return the MLP as one module or as linear maps; empty if the block has none."""
        said = self.parts.get("mlp")
        if said is not None:
            paths = [p.strip() for p in said.split(",") if p.strip()]
            if all(p in self.inside for p in paths):
                return tuple(paths)
        mlps = [
            p
            for p in self.inside
            if _MLP.search(p)
            and not p.startswith(first + ".")
            and (self._projections(p) or any(q.startswith(p + ".") for q in self.inside))
        ]
        if mlps:
            return (min(mlps, key=lambda p: p.count(".")),)
        for up, down in _PAIRS:
            if up in self.inside and down in self.inside:
                return (up, down)
        if self.around.hybrid or self._attention_alone(first):
            return ()
        raise MissingComponent("MLP", f"no such module in `{self.path}`")

    def _attention_alone(self, first: str) -> bool:
        """Return whether the block has no linear maps outside attention."""
        others = (m for p, m in self.inside.items() if p != first and not p.startswith(first + "."))
        return all(linear_sizes(module) is None for module in others)

    def _mlp_taps(
        self, mlp: tuple[str, ...], down: str | None, norm: str | None, *, has_other_mlp: bool
    ) -> dict[str, HookPoint]:
        """Return the hook points of the MLP.

        Args:
            down: The linear map that reads the neurons.
            norm: The norm after the MLP.
            has_other_mlp: Whether another MLP reads the same stream.
        """
        taps: dict[str, HookPoint] = {}
        if not has_other_mlp:
            whole = TensorLayout.whole(self.shape.d_model)
            taps["mlp_norm"] = HookPoint(self._at(mlp[0]), "in", whole)
        if down is not None:
            neurons = self._linear(down)[0]
            taps["mlp_hidden"] = HookPoint(self._at(down), "in", TensorLayout.neurons(neurons))
        taps |= self._experts(mlp)
        if not has_other_mlp or norm:
            taps["mlp_out"] = self._tap(self._given("mlp_out", norm or mlp[-1]), "mlp_out")
        return taps

    def _has_other_mlp(self, mlp: tuple[str, ...]) -> bool:
        """Return whether another MLP or experts read the same stream: no module returns the sum."""
        others = (p for p in self.inside if "." not in p and p not in mlp)
        return len(mlp) == 1 and any(_MLP.search(p) or p == "experts" for p in others)

    def _down(self, mlp: tuple[str, ...]) -> str | None:
        """Return the linear map that reads the neurons; None if no candidate is certain."""
        if (said := self._given("down", None)) is not None:
            return said
        if len(mlp) != 1:
            return mlp[-1] if mlp else None
        fitting = [
            p
            for p, (_, out) in self._projections(mlp[0]).items()
            if out == self.shape.d_model and (last_name(p) in _DOWN or p.endswith(".output.dense"))
        ]
        if not fitting:  # modules that wrap linear maps (Gemma 4's vision)
            fitting = [p for n in _DOWN if f"{(p := f'{mlp[0]}.{n}')}.linear" in self.inside]
        return fitting[0] if len(fitting) == 1 and not self._expert_list(mlp) else None

    def _expert_list(self, mlp: tuple[str, ...]) -> str | None:
        paths = (p for p in self.inside if last_name(p) == "experts")
        return next((p for p in paths if p == "experts" or p.startswith(mlp[0] + ".")), None)

    def _experts(self, mlp: tuple[str, ...]) -> dict[str, HookPoint]:
        """Return `router` and `expert_out`, if one experts module receives the expert weights."""
        path = self._expert_list(mlp)
        count = self.shape.n_experts
        if path is None or not count or not _takes_weights(self.inside[path]):
            return {}
        return {
            "router": HookPoint(self._at(path), "in", TensorLayout.whole(count)),
            "expert_out": HookPoint(
                self._at(path), "out", TensorLayout(count, self.shape.d_model, stride=0)
            ),
        }

    def _norms(
        self, first: str, mlp: tuple[str, ...]
    ) -> tuple[str | None, str | None, str | None, str | None]:
        """Return (norm before attention, before the MLP, after attention, after the MLP)."""
        direct = self._direct_norms()
        norms = [p for p in direct if not _CROSS.search(p)]
        if len(norms) == 3 and any(_CROSS.search(p) for p in self.inside):
            del norms[1]  # the norm of cross attention, though its name doesn't tell
        said = [p.strip() for p in self.parts.get("norms", "").split(",") if p.strip()]
        if said and all(p in self.inside for p in said):
            return said[0], said[-1] if len(said) > 1 else None, None, None
        after_m = next((n for n in _NORMS_AFTER_MLP if n in norms), None)
        after_a = None
        if after_m is not None:
            after_a = next((n for n in _NORMS_AFTER_ATTENTION if n in norms), None)
        for one, other in _SCALES:
            if one in self.inside and other in self.inside:
                after_a, after_m = one, other
        front = [n for n in norms if n not in (after_a, after_m)]
        mlp_norm = next((n for n in _MLP_NORMS if n in front), None) if mlp else None
        attn_norm = next((n for n in front if n != mlp_norm), None)
        if mlp and mlp_norm is None and len(front) > 1:
            mlp_norm = front[1]
        return (
            attn_norm,
            mlp_norm,
            self._given("attn_output_norm", after_a),
            self._given("mlp_output_norm", after_m),
        )

    def _heads(self, attention: str) -> tuple[dict[str, HookPoint], tuple[str, ...], str | None]:
        """Return the hook points of heads, the projections they come from, the output map."""
        shape, module = self.shape, self.inside[attention]
        projections = self._projections(attention)
        heads, is_odd = head_sizes(self.sizes, module, projections)
        try:
            points, inputs = find_qkv(
                attention,
                projections,
                self.inside,
                heads,
                self.around.family,
                self.parts,
                is_odd=is_odd,
            )
        except MissingComponent:
            if not {"q", "k", "v"} & self.around.without.keys():
                raise
            points, inputs = {}, ()
        taps = {site: replace(tap, path=self._at(tap.path)) for site, tap in points.items()}
        try:
            output = self._output(attention, projections)
        except MissingComponent:
            if "z" not in self.around.without:
                raise
            return taps, tuple(self._at(p) for p in inputs), None
        units = self._linear(output)[0] // heads.d_value
        taps["z"] = HookPoint(self._at(output), "in", TensorLayout.heads(units, heads.d_value))
        wide = TensorLayout(units, shape.d_model, stride=0)
        taps["head_out"] = HookPoint(self._at(output), "out", wide)
        return taps, tuple(self._at(p) for p in inputs), self._at(output)

    def _output(self, attention: str, projections: Mapping[str, tuple[int, int]]) -> str:
        if (said := self._given("output", None)) is not None:
            return said
        shape = self.shape
        fitting = [
            p
            for p, (_, out) in projections.items()
            if out == shape.d_model and (last_name(p) in _OUTPUT)
        ]
        fitting += [
            p for p, (_, out) in projections.items() if p not in fitting and _wraps(p, out, shape)
        ]
        width = self.sizes.heads * self.sizes.d_value
        exact = [p for p in fitting if projections[p][0] == width]
        if not exact and not fitting:
            raise MissingComponent(
                "output projection of attention",
                f"no linear map from {width} to {shape.d_model} features in "
                f"`{self._at(attention)}`",
            )
        return (exact or fitting)[-1]


def _takes_weights(experts: Any) -> bool:
    """Return whether `experts` is called with tokens, expert indices and expert weights."""
    try:
        arguments = list(inspect.signature(experts.forward).parameters)
    except (AttributeError, TypeError, ValueError):
        return False
    return len(arguments) == 3 and not hasattr(experts, "__len__")


def _wraps(path: str, out: int, shape: ModelShape) -> bool:
    """Return whether a path is the linear map within an output projection (`o_proj.linear`)."""
    return out == shape.d_model and last_name(path.rpartition(".")[0]) in _OUTPUT
