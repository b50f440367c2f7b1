"""Works out the anatomy of a decoder from its module tree.

It reads names, class names and sizes of modules (duck typing, no torch); what it says is proved
on the loaded model, so it may guess, but must not be silent where it finds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mechdsl.diagnostics import Diagnostic
from mechdsl.diagnostics.e04_model import PartNotFound
from mechdsl.models.adapters import Family, family_of
from mechdsl.models.anatomy import Anatomy, Layout, Tap
from mechdsl.models.shape import ModelShape
from mechdsl.source import Span

_ATTENTION = re.compile(r"(?<!cross)(?<!cross_)(attn|attention)$")
_MLP = re.compile(r"(mlp|feed_forward|ffn|moe)$")
_OUTPUT = ("o_proj", "c_proj", "out_proj", "dense", "wo", "linear_proj")
_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "out_proj", "c_fc2")
_SPLIT = {
    "q": ("q_proj", "query", "wq", "q_lin"),
    "k": ("k_proj", "key", "wk", "k_lin"),
    "v": ("v_proj", "value", "wv", "v_lin"),
}
_BLOCKS = ("c_attn", "qkv_proj", "Wqkv", "qkv")
"""Fused projections that return all queries, then all keys, then all values."""
_INTERLEAVED = ("query_key_value",)
"""Fused projections that return query, key and value of each head in turn; with a single key-value
head (Falcon) they can't, and are like the ones above."""
_QK_NORMS = {"q": ("q_norm", "q_layernorm"), "k": ("k_norm", "k_layernorm")}
_BEHIND_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
_BEHIND_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")
_MLP_NORMS = (
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "ln_2",
    "ln2",
    "norm2",
    "norm_2",
    "ffn_norm",
    "feedforward_layernorm",
    "ln_mlp",
)


class _Missing(Exception):
    """A part that wasn't found, and why."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(part, reason)
        self.part = part
        self.reason = reason


def find_anatomy(
    modules: Iterable[tuple[str, Any]],
    shape: ModelShape,
    *,
    model: str = "model",
    span: Span | None = None,
) -> tuple[Anatomy | None, list[Diagnostic]]:
    """The anatomy of a model whose `named_modules()` are given; E0409 names what is missing."""
    try:
        return _Finder(dict(modules), shape).anatomy(), []
    except _Missing as missing:
        return None, [
            PartNotFound(
                span=span,
                model=model,
                architecture=shape.architecture,
                part=missing.part,
                reason=missing.reason,
            )
        ]


def sizes(module: Any) -> tuple[int, int] | None:
    """(features in, features out) of a linear map; None for other modules.

    GPT-2's `Conv1D` keeps its weight as [in, out], everything else as [out, in].
    """
    weight = getattr(module, "weight", None)
    if weight is None or getattr(weight, "ndim", 0) != 2 or hasattr(module, "num_embeddings"):
        return None
    rows, columns = (int(n) for n in weight.shape)
    return (rows, columns) if transposed(module) else (columns, rows)


def transposed(module: Any) -> bool:
    """Whether a linear map keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


class _Finder:
    def __init__(self, modules: Mapping[str, Any], shape: ModelShape) -> None:
        self.modules = modules
        self.shape = shape
        self.family: type[Family] = family_of(shape.family)
        self.blocks = self._blocks()
        self.inside = self._within(f"{self.blocks}.0")

    def anatomy(self) -> Anatomy:
        attention = self._sublayer("attention", _ATTENTION)
        mlp = self._sublayer("MLP", _MLP)
        output = self._output_projection(attention)
        down = self._down_projection(mlp) if "mlp_hidden" in self.shape.sites else None
        norms = [p for p, m in self.inside.items() if "." not in p and _is_norm(m)]
        behind_attention, behind_mlp = _norms_behind(norms)
        front = [n for n in norms if n not in (behind_attention, behind_mlp)]
        mlp_norm = next((n for n in _MLP_NORMS if n in front), None)
        attn_norm = next((n for n in front if n != mlp_norm), None)
        parallel = self._parallel(front, behind_mlp)
        if parallel and mlp_norm is None:
            mlp_norm = attn_norm
        taps = self._taps(attention, mlp, output, down, behind_attention, behind_mlp)
        if parallel:
            del taps["resid_mid"]
        anatomy = Anatomy(
            embedding=self._embedding(),
            block=self._path(""),
            final_norm=self._final_norm(),
            unembedding=self._unembedding(),
            attention=self._path(attention),
            mlp=self._path(mlp),
            attn_norm=self._path(attn_norm) if attn_norm else None,
            mlp_norm=self._path(mlp_norm) if mlp_norm else None,
            projections=self._inputs(attention),
            output_projection=self._path(output),
            down_projection=self._path(down) if down else None,
            parallel=parallel,
            attn_norm_behind=behind_attention is not None,
            mlp_norm_behind=behind_mlp is not None,
            additive_positions=self.family.additive_positions,
            taps=taps,
        )
        self._require_in_every_block(anatomy)
        return anatomy

    # --- the trunk ------------------------------------------------------------------------

    def _blocks(self) -> str:
        """Path of the list of blocks."""
        n = self.shape.n_layers
        for path in self.modules:
            prefix, _, index = path.rpartition(".")
            if index != "0" or f"{prefix}.{n - 1}" not in self.modules:
                continue
            if f"{prefix}.{n}" in self.modules:
                continue
            if any(_ATTENTION.search(p) for p in self._within(path)):
                return prefix
        raise _Missing("list of blocks", f"no list of {n} modules with attention inside")

    def _within(self, path: str) -> dict[str, Any]:
        start = path + "."
        return {p[len(start) :]: m for p, m in self.modules.items() if p.startswith(start)}

    def _path(self, part: str) -> str:
        return _join(self.blocks, "{layer}", part)

    def _named(self, module: Any, part: str) -> str:
        path = next((p for p, m in self.modules.items() if m is module), None)
        if path is None:
            raise _Missing(part, "the model names a module that is not in its tree")
        return path

    def _embedding(self) -> str:
        getter = getattr(self.modules.get(""), "get_input_embeddings", None)
        if getter is not None and (module := getter()) is not None:
            return self._named(module, "token embedding")
        for path, module in self.modules.items():
            if getattr(module, "num_embeddings", 0) >= self.shape.vocab_size:
                return path
        raise _Missing("token embedding", f"no embedding of {self.shape.vocab_size} tokens")

    def _unembedding(self) -> str:
        getter = getattr(self.modules.get(""), "get_output_embeddings", None)
        if getter is not None and (module := getter()) is not None:
            return self._named(module, "unembedding")
        wanted = (self.shape.d_model, self.shape.vocab_size)
        for path, module in self.modules.items():
            if sizes(module) == wanted:
                return path
        raise _Missing("unembedding", f"no linear map from {wanted[0]} to {wanted[1]} features")

    def _final_norm(self) -> str:
        parent = self.blocks.rpartition(".")[0]
        beside = [
            path
            for path, module in self.modules.items()
            if path.rpartition(".")[0] == parent and path and _is_norm(module)
        ]
        if not beside:
            raise _Missing("final norm", f"no norm beside `{self.blocks}`")
        return beside[-1]

    def _parallel(self, front: list[str], behind_mlp: str | None) -> bool:
        if self.shape.parallel_block is not None:
            return self.shape.parallel_block
        block = self.modules[f"{self.blocks}.0"]
        for attribute in ("use_parallel_residual", "parallel_attn"):
            value = getattr(block, attribute, None)
            if isinstance(value, bool):
                return value
        return len(front) == 1 and behind_mlp is None

    # --- inside a block ---------------------------------------------------------------------

    def _sublayer(self, part: str, pattern: re.Pattern[str]) -> str:
        found = [p for p in self.inside if pattern.search(p) and self._projections(p)]
        if not found:
            raise _Missing(part, f"no such module in `{self.blocks}.0`")
        return min(found, key=lambda p: p.count("."))

    def _projections(self, part: str) -> dict[str, tuple[int, int]]:
        """Linear maps inside a part of the block, with their sizes."""
        start = part + "."
        found = ((p, sizes(m)) for p, m in self.inside.items() if p.startswith(start))
        return {p: size for p, size in found if size is not None}

    def _output_projection(self, attention: str) -> str:
        wanted = (self.shape.n_heads * self.shape.d_head, self.shape.d_model)
        fitting = [p for p, size in self._projections(attention).items() if size == wanted]
        named = [p for p in fitting if _leaf(p) in _OUTPUT]
        if not named:
            raise _Missing(
                "output projection of attention",
                f"no linear map from {wanted[0]} to {wanted[1]} features in `{attention}`",
            )
        return named[-1]

    def _down_projection(self, mlp: str) -> str | None:
        """None where there is none to be sure of."""
        fitting = [
            p
            for p, (_, out) in self._projections(mlp).items()
            if out == self.shape.d_model and _leaf(p) in _DOWN
        ]
        return fitting[0] if len(fitting) == 1 else None

    def _taps(
        self,
        attention: str,
        mlp: str,
        output: str,
        down: str | None,
        behind_attention: str | None,
        behind_mlp: str | None,
    ) -> dict[str, Tap]:
        whole = Layout.whole(self.shape.d_model)
        heads = Layout.heads(self.shape.n_heads, self.shape.d_head)
        wide = Layout(self.shape.n_heads, self.shape.d_model, stride=0)
        attn_out = Tap(self._path(behind_attention or attention), "out", whole)
        taps = {
            "embed": Tap(self._embedding(), "out", whole),
            "resid_pre": Tap(self._path(""), "in", whole),
            "attn_norm": Tap(self._path(attention), "in", whole),
            **self._queries_keys_values(attention),
            "z": Tap(self._path(output), "in", heads),
            "head_out": Tap(self._path(output), "out", wide),
            "attn_out": attn_out,
            "resid_mid": attn_out,
            "mlp_norm": Tap(self._path(mlp), "in", whole),
            "mlp_out": Tap(self._path(behind_mlp or mlp), "out", whole),
            "resid_post": Tap(self._path(""), "out", whole),
            "final_norm": Tap(self._final_norm(), "out", whole),
        }
        if down is not None:
            neurons = self._projections(mlp)[down][0]
            taps["mlp_hidden"] = Tap(self._path(down), "in", Layout.neurons(neurons))
        for site, (path, side) in self.family.taps.items():
            taps[site] = Tap(self._path(path), side, taps[site].layout)
            if site == "attn_out":
                taps["resid_mid"] = taps[site]
        return taps

    def _queries_keys_values(self, attention: str) -> dict[str, Tap]:
        """Queries, keys and values as attention reads them: behind their norm, if there is one."""
        taps = self._projected(attention)
        for site, names in _QK_NORMS.items():
            if (norm := self._qk_norm(attention, names, taps[site].layout.units)) is not None:
                taps[site] = norm
        return taps

    def _projected(self, attention: str) -> dict[str, Tap]:
        """Queries, keys and values as their projections return them."""
        shape = self.shape
        found = self._projections(attention)
        counts = {"q": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads}
        taps: dict[str, Tap] = {}
        for site, names in _SPLIT.items():
            path = next((p for p in found if _leaf(p) in names), None)
            if path is None:
                break
            if found[path][1] != counts[site] * shape.d_head:
                raise _Missing(
                    f"`{site}`",
                    f"`{path}` gives {found[path][1]} features, not {counts[site]} heads of "
                    f"{shape.d_head}",
                )
            taps[site] = Tap(self._path(path), "out", Layout.heads(counts[site], shape.d_head))
        if len(taps) < len(_SPLIT):
            taps = self._fused(found)
        return taps

    def _inputs(self, attention: str) -> tuple[str, ...]:
        """Paths of the linear maps that make queries, keys and values."""
        taps = self._projected(attention).values()
        return tuple(dict.fromkeys(tap.path for tap in taps))

    def _fused(self, found: Mapping[str, tuple[int, int]]) -> dict[str, Tap]:
        """One projection for queries, keys and values."""
        heads, kv, d = self.shape.n_heads, self.shape.n_kv_heads, self.shape.d_head
        for path, (_, out) in found.items():
            side_by_side = _leaf(path) in _BLOCKS or (_leaf(path) in _INTERLEAVED and kv == 1)
            if side_by_side and out == (heads + 2 * kv) * d:
                layouts = {
                    "q": Layout.heads(heads, d),
                    "k": Layout.heads(kv, d, offset=heads * d),
                    "v": Layout.heads(kv, d, offset=(heads + kv) * d),
                }
            elif _leaf(path) in _INTERLEAVED and out == 3 * heads * d and heads == kv:
                layouts = {
                    site: Layout(heads, d, offset=i * d, stride=3 * d)
                    for i, site in enumerate(("q", "k", "v"))
                }
            else:
                continue
            return {site: Tap(self._path(path), "out", layouts[site]) for site in layouts}
        raise _Missing("query, key and value projections", f"known names: {_known_names()}")

    def _qk_norm(self, attention: str, names: tuple[str, ...], heads: int) -> Tap | None:
        """The norm behind a query or key projection, which is what attention reads."""
        d = self.shape.d_head
        for path, module in self.inside.items():
            if not path.startswith(attention + ".") or _leaf(path) not in names:
                continue
            weight = getattr(module, "weight", None)
            over_all = weight is not None and weight.ndim == 1 and int(weight.shape[0]) != d
            if over_all:
                layout = Layout.heads(heads, d)
            elif self.family.qk_norm_heads_first:
                layout = Layout(heads, d, axes="heads_first")
            else:
                layout = Layout(heads, d, axes="heads")
            return Tap(self._path(path), "out", layout)
        return None

    def _require_in_every_block(self, anatomy: Anatomy) -> None:
        for site, tap in anatomy.taps.items():
            for layer in range(self.shape.n_layers):
                if tap.at(layer) not in self.modules:
                    raise _Missing(f"`{site}` in layer {layer}", f"there is no `{tap.at(layer)}`")


def _is_norm(module: Any) -> bool:
    return "norm" in type(module).__name__.lower()


def _norms_behind(norms: list[str]) -> tuple[str | None, str | None]:
    """The norms between the sublayers' outputs and the stream (attention's, the MLP's)."""
    mlp = next((n for n in _BEHIND_MLP if n in norms), None)
    if mlp is None:
        return None, None
    return next((n for n in _BEHIND_ATTENTION if n in norms), None), mlp


def _known_names() -> str:
    names = [name for names in _SPLIT.values() for name in names[:1]]
    return ", ".join(f"`{n}`" for n in (*names, *_BLOCKS, *_INTERLEAVED))
