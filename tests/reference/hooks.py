"""Interventions by plain hooks on the bare model, one unpadded prompt at a time.

A model is called only with its prompt, or copies of it. If a site is between modules, its writes
follow from its definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..families.parts import Architecture, Block, Heads, Stack

ORDER = (
    "embed", "resid_pre", "attn_norm", "mixer_norm", "q", "k", "v", "z", "head_out", "attn_out",
    "mixer_out", "resid_mid", "mlp_norm", "router", "expert_out", "mlp_hidden", "mlp_out",
    "resid_post", "final_norm", "logits",
)  # fmt: skip
WITHOUT_LAYER = ("embed", "final_norm", "logits")


@dataclass(frozen=True)
class Change:
    """A vector to write: at a position, in a head, neuron or expert (0 for whole vectors)."""

    position: int
    unit: int
    vector: Tensor


Writes = tuple[str, Sequence[Change]]
"""A site and its writes."""


@dataclass
class Session:
    """One forward pass of copies of a prompt: every site of one layer is read, and in each copy one
    of them is written."""

    each: Sequence[Writes]
    """Writes of every copy."""
    seen: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def writes(self, site: str) -> bool:
        """Whether any copy is changed there."""
        return any(site == written for written, _ in self.each)

    def edit(self, site: str, value: Tensor) -> Tensor:
        """Return `value` [copies * T, units, width], changed if this is the site."""
        if self.writes(site):
            value = value.clone()
            for own, (written, changes) in zip(
                value.tensor_split(len(self.each)), self.each, strict=True
            ):
                for change in changes if written == site else ():
                    own[change.position, change.unit] = change.vector
        assert site not in self.seen, f"{site} came by twice"
        self.seen[site] = value.detach().clone()
        return value


def sites(stack: Stack, layer: int, *, main: bool = True) -> list[str]:
    """The sites of one layer, in the order of a forward pass."""
    block = stack.at(layer)
    found = {
        "embed": stack.embed is not None,
        "resid_pre": block.resid,
        "attn_norm": block.attn_norm is not None,
        "mixer_norm": block.mixer_norm is not None,
        "q": block.q is not None,
        "k": block.k is not None,
        "v": block.v is not None,
        "z": block.output is not None,
        "head_out": block.output is not None,
        "attn_out": block.attn_out is not None,
        "mixer_out": block.mixer_out is not None,
        "resid_mid": block.middle != "none" and block.resid,
        "mlp_norm": block.mlp_norm is not None,
        "router": block.experts is not None,
        "expert_out": block.experts is not None,
        "mlp_hidden": block.mlp_hidden is not None,
        "mlp_out": block.mlp_out is not None,
        "resid_post": block.resid,
        "final_norm": stack.final_norm is not None,
        "logits": main,
    }
    return [site for site in ORDER if found[site]]


@torch.no_grad()
def side_by_side(
    architecture: Architecture,
    module: nn.Module,
    prompt: Mapping[str, Tensor],
    layer: int,
    each: Sequence[Writes],
    stack: str = "",
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Run a copy of one prompt for each of `each`, the writes at sites of this layer.

    Returns, for every copy, the model's output ([T, …] logits, or hidden states without an
    unembedding) and all sites of this layer of one stack, [T, units, width] each, after the
    change. `prompt` has the arguments of the model.
    """
    session = Session(each)
    parts = architecture.others[stack] if stack else architecture.main
    with hooked(module, parts, layer, session):
        copies = {name: torch.cat([value] * len(each)) for name, value in prompt.items()}
        output = module(**copies)
        logits = output.logits if "logits" in output else output.last_hidden_state
    if not stack:
        shape = logits.shape
        logits = session.edit("logits", logits.reshape(-1, 1, shape[-1])).reshape(shape)
    seen = {site: value.tensor_split(len(each)) for site, value in session.seen.items()}
    return [
        (logits[copy], {site: values[copy] for site, values in seen.items()})
        for copy in range(len(each))
    ]


def run(
    architecture: Architecture,
    module: nn.Module,
    prompt: Mapping[str, Tensor],
    layer: int,
    site: str = "",
    changes: Sequence[Change] = (),
    stack: str = "",
) -> tuple[Tensor, dict[str, Tensor]]:
    """`side_by_side` for one copy, changed at one site or nowhere."""
    (found,) = side_by_side(architecture, module, prompt, layer, [(site, changes)], stack)
    return found


@contextmanager
def hooked(module: nn.Module, stack: Stack, layer: int, session: Session) -> Iterator[None]:
    """Let the model read and write one layer as the session says."""
    handles = list(_handles(module, stack, layer, session))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Edit = Callable[[Tensor], Tensor]


def _handles(module: nn.Module, stack: Stack, layer: int, session: Session) -> Iterator[Any]:
    block = stack.at(layer)
    root = f"{stack.blocks}.{layer}"
    stream: list[Tensor] = []

    def part(path: str) -> nn.Module:
        return module.get_submodule(f"{root}.{path}" if path else root)

    def factor(scale: float | str) -> Any:
        return part("").get_parameter(scale) if isinstance(scale, str) else scale

    def whole(site: str, scale: Any = 1.0) -> Edit:
        def edit(value: Tensor) -> Tensor:
            width = value.shape[-1]
            flat = value.reshape(-1, 1, width) * scale
            changed = session.edit(site, flat)
            return value if not session.writes(site) else (changed / scale).reshape(value.shape)

        return edit

    if stack.embed is not None and (image := patch_projection(module, stack)) is not None:
        made: list[Tensor] = []
        yield _out(image, lambda value: made.append(value) or value)

        def patches(value: Tensor) -> Tensor:
            """The vectors of patches as they are made; what is written moves what comes behind."""
            own = patch_tokens(made.pop())
            if value.dim() == 4:  # [image, row, column, width]
                site = own.reshape(value.shape)
            else:
                own = own.reshape(len(value), -1, value.shape[-1])
                site = torch.cat([value[:, : value.shape[1] - own.shape[1]], own], 1)
            changed = whole("embed")(site)
            return value + (changed - site) if session.writes("embed") else value

        yield _out(module.get_submodule(stack.embed[0]), patches)
    elif stack.embed is not None:
        path, side = stack.embed
        yield (_out if side == "out" else _in)(module.get_submodule(path), whole("embed"))
    if block.resid:

        def entering(value: Tensor) -> Tensor:
            value = whole("resid_pre")(value)
            stream[:] = [value]
            return value

        yield _in(part(""), entering)
    if block.attn_norm is not None:
        yield _in(part(block.attn_norm), whole("attn_norm"))
    if block.mixer_norm is not None:
        yield _in(part(block.mixer_norm), whole("mixer_norm"))
    yield from _head_handles(block, part, session)
    if block.output is not None:
        yield from _output_handles(block, part(block.output), session)
    for site, path, scale in (
        ("attn_out", block.attn_out, block.attn_scale),
        ("mixer_out", block.mixer_out, block.mixer_scale),
    ):
        if path is not None:
            yield _out(part(path), whole(site, factor(scale)))
    adds = block.attn_out or block.mixer_out
    if block.resid and block.middle == "sum" and adds is not None:
        scale = factor(block.attn_scale if block.attn_out is not None else block.mixer_scale)

        def between(value: Tensor) -> Tensor:
            middle = stream[0] + value * scale
            width = middle.shape[-1]
            changed = session.edit("resid_mid", middle.reshape(-1, 1, width))
            if not session.writes("resid_mid"):
                return value
            return (changed.reshape(middle.shape) - stream[0]) / scale

        yield _out(part(adds), between)
    elif block.middle not in ("sum", "none"):
        yield _out(part(block.middle), whole("resid_mid"))
    if block.mlp_norm is not None:
        yield _in(part(block.mlp_norm), whole("mlp_norm"))
    if block.experts is not None:
        yield _experts(part(block.experts), block.n_experts, session)
    if block.mlp_hidden is not None:

        def neurons(value: Tensor) -> Tensor:
            width = value.shape[-1]
            return session.edit("mlp_hidden", value.reshape(-1, width, 1)).reshape(value.shape)

        yield _in(part(block.mlp_hidden), neurons)
    if block.mlp_out is not None:
        yield _out(part(block.mlp_out), whole("mlp_out", factor(block.mlp_scale)))
    if block.resid:
        # Before the library's hooks, which collect the outputs of blocks.
        yield _out(part(""), whole("resid_post"), first=True)
    if stack.final_norm is not None:
        path, side = stack.final_norm
        yield (_out if side == "out" else _in)(module.get_submodule(path), whole("final_norm"))


def patch_projection(module: nn.Module, stack: Stack) -> nn.Module | None:
    """The module that embeds an image's patches, if the embedding is of patches: a convolution, the
    norm after it in AIMv2, or the linear map of RADIO and Gemma 4."""
    if stack.embed is None:
        return None
    inside = dict(module.get_submodule(stack.embed[0]).named_modules())
    for name in ("rms_norm", "patch_projection", "input_proj"):
        if name in inside:
            return inside[name]
    found = [part for part in inside.values() if isinstance(part, nn.Conv2d)]
    return found[0] if len(found) == 1 else None


def patch_tokens(made: Tensor) -> Tensor:
    """[image, patch, width] from the output of a convolution."""
    return made if made.dim() == 3 else made.flatten(2).transpose(1, 2)


def _head_handles(
    block: Block, part: Callable[[str], nn.Module], session: Session
) -> Iterator[Any]:
    for site, heads in (("q", block.q), ("k", block.k), ("v", block.v)):
        if heads is not None:
            edit = _head_edit(site, heads, session)
            yield _out(part(heads.path), _once(edit) if heads.again else edit)


def _once(edit: Edit) -> Edit:
    """Apply an edit only to the first output of a module in a pass."""
    done: list[Tensor] = []

    def first(value: Tensor) -> Tensor:
        if done:
            return value
        done.append(value)
        return edit(value)

    return first


def _head_edit(site: str, heads: Heads, session: Session) -> Edit:
    def edit(value: Tensor) -> Tensor:
        if heads.form == "heads_first":
            tokens = value.transpose(1, 2)  # [copies, T, heads, width]
            changed = session.edit(site, tokens.flatten(0, 1))
            return changed.reshape(tokens.shape).transpose(1, 2)
        if heads.form == "heads":
            return session.edit(site, value.reshape(-1, heads.heads, heads.width)).reshape(
                value.shape
            )
        step = heads.width if heads.step is None else heads.step
        flat = value.reshape(-1, value.shape[-1]).clone()
        columns = [
            slice(begin, begin + heads.width)
            for h in range(heads.heads)
            for begin in [heads.start + h // heads.group * step + h % heads.group * heads.width]
        ]
        changed = session.edit(site, torch.stack([flat[:, c] for c in columns], dim=1))
        for h, c in enumerate(columns):
            flat[:, c] = changed[:, h]
        return flat.reshape(value.shape)

    return edit


def _output_handles(block: Block, output: nn.Module, session: Session) -> Iterator[Any]:
    """`z`, and `head_out`: each head's share of the projection's output."""
    given: list[Tensor] = []
    weight: Any = output.weight
    if type(output).__name__ != "Conv1D":
        weight = weight.T  # [in, out]

    def entering(value: Tensor) -> Tensor:
        heads = value.reshape(-1, block.heads, block.width)
        changed = session.edit("z", heads)
        given[:] = [changed]
        return changed.reshape(value.shape)

    def leaving(value: Tensor) -> Tensor:
        slices = weight.reshape(block.heads, block.width, -1)
        before = torch.stack([given[0][:, h] @ slices[h] for h in range(block.heads)], dim=1)
        after = session.edit("head_out", before)
        if not session.writes("head_out"):
            return value
        return value + (after - before).sum(1).reshape(value.shape)

    yield _in(output, entering)
    yield _out(output, leaving)


def _experts(module: nn.Module, count: int, session: Session) -> Any:
    """`router`: the weight of every expert, 0 if not selected; `expert_out`: the output of each
    expert, including its weight."""
    forward = module.forward

    def hook(part: nn.Module, args: Any, kwargs: Any) -> Any:
        tokens, index, weights = args
        flat = tokens.reshape(-1, tokens.shape[-1])
        dense = torch.zeros(len(flat), count, dtype=weights.dtype)
        dense.scatter_add_(1, index.reshape(len(flat), -1), weights.reshape(len(flat), -1))
        dense = session.edit("router", dense[:, None])[:, 0]
        every = torch.arange(count).expand(len(flat), count).contiguous()
        return (tokens, every.to(index.dtype), dense), kwargs

    def leave(part: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        tokens, index, dense = args
        flat = tokens.reshape(-1, tokens.shape[-1])
        each = []
        for expert in range(count):
            one = torch.full((len(flat), 1), expert, dtype=index.dtype)
            made = forward(tokens, one, dense[:, expert : expert + 1].contiguous())
            each.append(made.reshape(flat.shape))
        before = torch.stack(each, dim=1)
        after = session.edit("expert_out", before)
        if not session.writes("expert_out"):
            return out
        return out + (after - before).sum(1).reshape(out.shape)

    class Both:
        handles = (
            module.register_forward_pre_hook(hook, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        )

        def remove(self) -> None:
            for handle in self.handles:
                handle.remove()

    return Both()


NAMES = ("hidden_states", "inputs_embeds", "hidden_state", "x", "input", "query")
"""Names of a module's activation argument, if it isn't the first."""


def _in(module: nn.Module, change: Edit) -> Any:
    def hook(part: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(name for name in NAMES if name in kwargs)
        return args, {**kwargs, name: change(kwargs[name])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _out(module: nn.Module, change: Edit, *, first: bool = False) -> Any:
    def hook(part: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, (tuple, list)):
            return type(out)([change(out[0]), *out[1:]])
        return change(out)

    return module.register_forward_hook(hook, prepend=first)


def prompts(architecture: Architecture, count: int, seed: int) -> list[dict[str, Tensor]]:
    """The arguments of the model for each of several prompts."""
    from ..families.build import ids

    rows = [(architecture.begins, *row[1:]) for row in ids(count, 8, seed)]
    texts = [{"input_ids": torch.tensor([row])} for row in rows]
    if architecture.takes == "text":
        return texts
    # Their lengths differ from those of the texts.
    decoder = [torch.tensor([row]) for row in ids(count + 1, 8, seed + 100)[1:]]
    if architecture.takes == "two texts":
        return [
            {**text, "decoder_input_ids": row} for text, row in zip(texts, decoder, strict=True)
        ]
    generator = torch.Generator().manual_seed(seed)
    if architecture.takes == "image":
        vision = architecture.config.get("vision_config", architecture.config)
        size = (1, vision["num_channels"], vision["image_size"], vision["image_size"])
        return [{"pixel_values": torch.randn(size, generator=generator)} for _ in range(count)]
    if architecture.takes == "audio":
        name, shape = _sound(architecture)
        sounds = [torch.randn(1, *shape, generator=generator) for _ in range(count)]
        return [
            {name: sound, "decoder_input_ids": row}
            for sound, row in zip(sounds, decoder, strict=True)
        ]
    from ..families.rows_vlm import with_picture

    return [with_picture(architecture, row, generator) for row in ids(count, 8, seed)]


def _sound(architecture: Architecture) -> tuple[str, tuple[int, ...]]:
    """The name of an audio model's sound argument, and its shape."""
    config = architecture.config
    if "num_mel_bins" in config:  # frames are read in pairs
        return "input_features", (config["num_mel_bins"], 2 * config["max_source_positions"])
    if "input_feat_per_channel" in config:
        return "input_features", (22, config["input_feat_per_channel"])
    return "input_values", (3000,)
