"""Interventions written by hand for each family, on one unpadded prompt at a time.

Nothing here comes from the package: module names, slices and block rules are spelt out, the model
is called with nothing but token ids, and blocks are recomputed in place of hooks where a site lies
between modules. Tests hold the package to this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

Edit = Callable[[str, Tensor], Tensor]

SITES = (
    "embed",
    "resid_pre",
    "attn_norm",
    "q",
    "k",
    "v",
    "z",
    "head_out",
    "attn_out",
    "resid_mid",
    "mlp_norm",
    "mlp_hidden",
    "mlp_out",
    "resid_post",
    "final_norm",
    "logits",
)
WITHOUT_LAYER = ("embed", "final_norm", "logits")


@dataclass(frozen=True)
class Change:
    """A vector to write: at a position, in a head or neuron."""

    position: int
    unit: int
    vector: Tensor


@dataclass
class Session:
    """One forward pass with changes at one site of one layer; every site of it is read."""

    site: str = ""
    changes: Sequence[Change] = ()
    seen: dict[str, Tensor] = field(default_factory=dict)

    def edit(self, site: str, value: Tensor, *, heads: int = 1) -> Tensor:
        """`value` is [1, T, heads * width]; returns it changed if this is the site."""
        if site == self.site:
            value = value.clone()
            width = value.shape[-1] // heads
            for change in self.changes:
                at = slice(change.unit * width, (change.unit + 1) * width)
                value[0, change.position, at] = change.vector
        self.seen[site] = value.detach()[0].unflatten(-1, (heads, -1))
        return value


class GPT2:
    """`transformers` GPT-2: Conv1D weights are [in, out], c_attn is q, k, v side by side."""

    heads = kv_heads = 4
    parallel = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.width = model.config.n_embd

    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.model.transformer.wte, self.model.transformer.ln_f

    def block(self, layer: int) -> Any:
        return self.model.transformer.h[layer]

    def norms(self, block: Any) -> tuple[Any, Any]:
        return block.ln_1, block.ln_2

    def attention(self, block: Any, x: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        return block.attn(x, attention_mask=args[1])[0]

    def mlp(self, block: Any) -> Any:
        return block.mlp

    def output(self, block: Any) -> tuple[Any, Tensor, Tensor | None]:
        """The output projection, its weight as [in, out], its bias."""
        c = block.attn.c_proj
        return c, c.weight, c.bias

    def down(self, block: Any) -> Any:
        return block.mlp.c_proj

    def project(self, block: Any, session: Session) -> list[Any]:
        d = self.width

        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            q, k, v = out[..., :d], out[..., d : 2 * d], out[..., 2 * d :]
            return torch.cat(
                [
                    session.edit("q", q, heads=self.heads),
                    session.edit("k", k, heads=self.heads),
                    session.edit("v", v, heads=self.heads),
                ],
                dim=-1,
            )

        return [block.attn.c_attn.register_forward_hook(hook)]


class Llama:
    """Llama, Mistral, Qwen 2: separate projections, two key-value heads."""

    heads, kv_heads = 4, 2
    parallel = False

    def __init__(self, model: Any) -> None:
        self.model = model

    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.model.model.embed_tokens, self.model.model.norm

    def block(self, layer: int) -> Any:
        return self.model.model.layers[layer]

    def norms(self, block: Any) -> tuple[Any, Any]:
        return block.input_layernorm, block.post_attention_layernorm

    def attention(self, block: Any, x: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        return block.self_attn(
            x,
            position_embeddings=kwargs["position_embeddings"],
            attention_mask=kwargs["attention_mask"],
        )[0]

    def mlp(self, block: Any) -> Any:
        return block.mlp

    def output(self, block: Any) -> tuple[Any, Tensor, Tensor | None]:
        o = block.self_attn.o_proj
        return o, o.weight.T, o.bias

    def down(self, block: Any) -> Any:
        return block.mlp.down_proj

    def project(self, block: Any, session: Session) -> list[Any]:
        attention = block.self_attn
        return [
            _out(attention.q_proj, lambda x: session.edit("q", x, heads=4)),
            _out(attention.k_proj, lambda x: session.edit("k", x, heads=2)),
            _out(attention.v_proj, lambda x: session.edit("v", x, heads=2)),
        ]


class Qwen3(Llama):
    """Queries and keys are those behind their norms, which see [B, T, heads, d_head]."""

    def project(self, block: Any, session: Session) -> list[Any]:
        attention = block.self_attn

        def normed(site: str, heads: int) -> Callable[[Tensor], Tensor]:
            return lambda x: session.edit(site, x.flatten(2), heads=heads).unflatten(2, (heads, 6))

        return [
            _out(attention.q_norm, normed("q", 4)),
            _out(attention.k_norm, normed("k", 2)),
            _out(attention.v_proj, lambda x: session.edit("v", x, heads=2)),
        ]


class NeoX:
    """query_key_value gives, head by head, its query, its key and its value."""

    heads = kv_heads = 4

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parallel = model.config.use_parallel_residual

    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.model.gpt_neox.embed_in, self.model.gpt_neox.final_layer_norm

    def block(self, layer: int) -> Any:
        return self.model.gpt_neox.layers[layer]

    def norms(self, block: Any) -> tuple[Any, Any]:
        return block.input_layernorm, block.post_attention_layernorm

    def attention(self, block: Any, x: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        return block.attention(
            x,
            attention_mask=kwargs["attention_mask"],
            position_embeddings=kwargs["position_embeddings"],
        )[0]

    def mlp(self, block: Any) -> Any:
        return block.mlp

    def output(self, block: Any) -> tuple[Any, Tensor, Tensor | None]:
        dense = block.attention.dense
        return dense, dense.weight.T, dense.bias

    def down(self, block: Any) -> Any:
        return block.mlp.dense_4h_to_h

    def project(self, block: Any, session: Session) -> list[Any]:
        def hook(x: Tensor) -> Tensor:
            per_head = x.view(*x.shape[:2], 4, 3, 6)
            made = [
                session.edit(site, per_head[:, :, :, i].flatten(2), heads=4).unflatten(2, (4, 6))
                for i, site in enumerate(("q", "k", "v"))
            ]
            return torch.stack(made, dim=3).flatten(2)

        return [_out(block.attention.query_key_value, hook)]


FAMILIES: dict[str, type[Any]] = {
    "gpt2": GPT2,
    "llama": Llama,
    "mistral": Llama,
    "qwen2": Llama,
    "qwen3": Qwen3,
    "gpt_neox": NeoX,
    "gpt_neox_sequential": NeoX,
}


TUPLES = ("gpt2", "gpt_neox", "gpt_neox_sequential")
"""Families whose blocks were called, and returned, otherwise before 5.3."""


def _out(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    return module.register_forward_hook(lambda m, args, out: change(out))


def _in(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    return module.register_forward_pre_hook(lambda m, args: (change(args[0]),))


def _by_hand(family: Any, block: Any, session: Session) -> Callable[..., Tensor]:
    """The block's forward, written out."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, second = family.norms(block)
        x = session.edit("resid_pre", x)
        normed = session.edit("attn_norm", first(x))
        attn = session.edit("attn_out", family.attention(block, normed, args, kwargs))
        if family.parallel:
            mlp = family.mlp(block)(session.edit("mlp_norm", second(x)))
            return session.edit("resid_post", x + attn + session.edit("mlp_out", mlp))
        mid = session.edit("resid_mid", x + attn)
        mlp = family.mlp(block)(session.edit("mlp_norm", second(mid)))
        return session.edit("resid_post", mid + session.edit("mlp_out", mlp))

    return forward


def _projection(family: Any, block: Any, session: Session) -> Callable[[Tensor], Tensor]:
    """The output projection, head by head."""
    _, weight, bias = family.output(block)

    def forward(z: Tensor) -> Tensor:
        z = session.edit("z", z, heads=family.heads)
        width = z.shape[-1] // family.heads
        parts = [
            z[..., h * width : (h + 1) * width] @ weight[h * width : (h + 1) * width]
            for h in range(family.heads)
        ]
        each = session.edit("head_out", torch.cat(parts, dim=-1), heads=family.heads)
        total = each.unflatten(-1, (family.heads, -1)).sum(2)
        return total if bias is None else total + bias

    return forward


@torch.no_grad()
def run(
    name: str,
    model: Any,
    ids: Sequence[int],
    layer: int = 0,
    site: str = "",
    changes: Sequence[Change] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [T, vocab] of one prompt with `changes` at a site, and all sites of that layer.

    Sites are [T, units, width], after the change.
    """
    if name in TUPLES and Version(transformers.__version__) < Version("5.3"):
        pytest.skip(f"blocks of {name} return tuples in transformers {transformers.__version__}")
    family = FAMILIES[name](model)
    session = Session(site, changes)
    embedding, last = family.parts()
    block = family.block(layer)
    projection = family.output(block)[0]
    neurons = family.down(block)
    handles = [
        _out(embedding, lambda x: session.edit("embed", x)),
        *family.project(block, session),
        _in(neurons, lambda x: session.edit("mlp_hidden", x, heads=x.shape[-1])),
        _out(last, lambda x: session.edit("final_norm", x)),
    ]
    block.forward = _by_hand(family, block, session)
    projection.forward = _projection(family, block, session)
    try:
        logits = session.edit("logits", model(torch.tensor([list(ids)])).logits)
    finally:
        for handle in handles:
            handle.remove()
        del block.forward, projection.forward
    return logits[0], session.seen
