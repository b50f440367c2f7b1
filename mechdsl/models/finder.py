"""Find the anatomy of a stack of blocks in its module tree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import eq
from typing import Any

from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import ComponentNotFound
from mechdsl.models.block import (
    ATTENTION_NAME,
    MIXER_NAME,
    BlockComponents,
    BlockContext,
    MissingComponent,
    bert_components,
    find_mixer,
    is_norm,
    last_name,
    linear_sizes,
)
from mechdsl.models.config import has_mixer_blocks
from mechdsl.models.shape import (
    Anatomy,
    BlockAnatomy,
    BlockArrangement,
    Family,
    HookPoint,
    ModelShape,
    TensorLayout,
    add_output_sites,
    find_family,
    unit_count,
    vector_width,
)
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES, ATTENTION_SITES, sites_of_module


def find_anatomies(
    modules: Iterable[tuple[str, Any]],
    shape: ModelShape,
    *,
    stack: str = "",
    model: str = "model",
    span: Span | None = None,
) -> tuple[list[Anatomy], list[Diagnostic]]:
    """Find the possible anatomies of one stack, most likely first.

    Args:
        modules: The model's `named_modules()`.
        shape: The shape of the stack.
        stack: The name of the stack; empty for the main one.
        model: The model's name in messages.
        span: The model statement.

    Returns:
        The anatomies, and E0409 with the component that the first arrangement lacks if there are
        none.
    """
    tree = _without_adapters(dict(modules))
    anatomies: list[Anatomy] = []
    missing: MissingComponent | None = None
    try:
        finder = _Finder(tree, shape, stack)
        for arrangement in finder.arrangements():
            try:
                anatomy = finder.anatomy(arrangement)
            except MissingComponent as problem:
                missing = missing or problem
            else:
                anatomies += [anatomy] if anatomy not in anatomies else []
    except MissingComponent as problem:
        missing = problem
    if anatomies or missing is None:
        return anatomies, []
    return [], [
        ComponentNotFound(
            span=span,
            model=model,
            architecture=shape.architecture,
            part=missing.part,
            reason=missing.reason,
        )
    ]


def _without_adapters(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the modules without peft's additions inside adapted modules."""
    adapted = tuple(f"{path}." for path, part in tree.items() if hasattr(part, "base_layer"))
    return {path: part for path, part in tree.items() if not path.startswith(adapted)}


class _Finder:
    def __init__(self, modules: Mapping[str, Any], shape: ModelShape, stack: str) -> None:
        self.modules = modules
        self.shape = shape
        self.stack = stack
        self.family: Family = find_family(shape.family)
        refused = self.family.refused(shape.config)
        if refused:
            raise MissingComponent("list of blocks", refused)
        self.parts = self.family.parts(shape.config)
        self.scales = self.family.scales(shape.config)
        self.without = self.family.without(shape.config)
        self.block_paths = self._block_paths()
        self.root = self.block_paths[0].rpartition(".")[0]
        self.hybrid = (
            self.family.mixes
            or has_mixer_blocks(shape.config)
            or any(find_mixer(self.within(self.block_path(n))) for n in self.layers)
        )

    @property
    def layers(self) -> range:
        return range(self.shape.n_layers)

    def arrangements(self) -> Sequence[BlockArrangement]:
        """Return the possible arrangements of blocks, most likely first."""
        known = self.family.arrangement(self.shape.config)
        if known is not None:
            return (known,)
        inside = self.within(self.block_path(0))
        if bert_components(inside):
            return ("after the sum", "front", "parallel")
        norms = [p for p in inside if "." not in p and is_norm(inside[p])]
        if len(norms) == 1:
            return ("parallel", "front", "after the sum")
        return ("front", "after the sum", "parallel")

    def anatomy(self, arrangement: BlockArrangement) -> Anatomy:
        main = not self.stack
        around = BlockContext(
            shape=self.shape,
            stack=self.stack,
            family=self.family,
            parts=self.parts,
            scales=self.scales,
            without=self.without,
            hybrid=self.hybrid,
        )
        paths = [self.block_path(n) for n in self.layers]
        blocks = [
            BlockComponents(around, n, path, self.within(path), arrangement).anatomy()
            for n, path in enumerate(paths)
        ]
        anatomies = self._checked(blocks)
        blocks = tuple(
            add_output_sites(self.family.block(self.shape.config, n, b), self.shape.d_model)
            for n, b in enumerate(anatomies)
        )
        without = dict(self.without)
        if self.hybrid:
            reason = "not all of its blocks use attention; `mixer_out` is the layer in its place"
            attention = {*ATTENTION_SITES, *sites_of_module("output")}
            without |= dict.fromkeys(sorted(attention - {*ATTENTION_INTERNAL_SITES}), reason)
        embedding = self._embedding() if main or self.stack == "encoder" else None
        unembedding = self._unembedding() if main else None
        taps = self._outer_taps(embedding, unembedding)
        blocks = tuple(
            replace(b, taps={site: t for site, t in b.taps.items() if site not in without})
            for b in blocks
        )
        return Anatomy(
            blocks=blocks,
            taps={site: tap for site, tap in taps.items() if site not in without},
            embedding=embedding,
            final_norm=self._final_norm(),
            unembedding=unembedding,
            parallel=arrangement == "parallel",
            arrangement=arrangement,
            additive_positions=self.family.additive_positions,
            norms_after_rotary=self.family.norms_after_rotary,
            whole=self._whole(),
            without=without,
        )

    def _whole(self) -> str:
        """Return the reason that rows can't start at a middle block."""
        if self.hybrid:
            return "some of its blocks don't use attention, and mechdsl doesn't cache their state"
        if any(last_name(path) == "indexer" for path in self.within(self.block_path(0))):
            return "an indexer selects the tokens to attend to"
        return self.family.whole(self.shape.config)

    def _checked(self, blocks: Sequence[BlockAnatomy]) -> Sequence[BlockAnatomy]:
        """Return the blocks if some have the number and width of heads that the config gives
        (in an unknown family, others may differ)."""
        for site in ("q", "k", "v", "z"):
            taps = [(n, block.taps[site]) for n, block in enumerate(blocks) if site in block.taps]
            own = [(tap.layout.units, tap.layout.width) for _, tap in taps]
            expected = [
                (unit_count(self.shape, site, n), vector_width(self.shape, site, n))
                for n, _ in taps
            ]
            if taps and not any(map(eq, own, expected)) and site not in self.without:
                has = f"`{taps[0][1].path}` has {own[0][0]} heads of {own[0][1]}"
                units, width = expected[0]
                raise MissingComponent(f"`{site}`", f"{has}, not {units} heads of {width}")
        return blocks

    # --- the trunk ------------------------------------------------------------------------

    def block_path(self, layer: int) -> str:
        return self.block_paths[layer]

    def _block_paths(self) -> Sequence[str]:
        """Return the paths of all blocks, from one list or several."""
        lists = self.family.block_lists(self.shape.config) if self.stack else {}
        if not lists:
            root = self._blocks()
            return [f"{root}.{layer}" for layer in self.layers]
        block_paths: list[str] = []
        for name, count in lists.items():
            paths = [
                path
                for layer in range(count)
                for path in self.modules
                if f".{path}".endswith(f".{name}.{layer}")
            ]
            if len(paths) != count:
                raise MissingComponent("list of blocks", f"no list of {count} modules at `{name}`")
            block_paths += paths
        return block_paths

    def _blocks(self) -> str:
        """Return the path of the list of blocks."""
        n = self.shape.n_layers
        fitting: list[str] = []
        for path in self.modules:
            prefix, _, index = path.rpartition(".")
            if index != "0" or f"{prefix}.{n - 1}" not in self.modules:
                continue
            if f"{prefix}.{n}" in self.modules or not self._is_block(self.within(path)):
                continue
            fitting.append(prefix)
        wanted = [p for p in fitting if self._is_ours(p)]
        if not wanted:
            raise MissingComponent(
                "list of blocks", f"no list of {n} modules with attention inside"
            )
        near = self._embedding_path()
        return max(wanted, key=lambda p: _common(p, near)) if near else wanted[0]

    def _is_ours(self, path: str) -> bool:
        """Return whether a list of blocks may be the requested stack."""
        vision = bool(re.search(r"vision|visual|image|audio|video_tower", path))
        match self.stack:
            case "vision":
                return vision and not re.search(r"audio|video_tower", path)
            case "encoder":
                return "encoder" in path
            case _:
                if self._has_decoder:
                    return "decoder" in path
                return not vision or self.shape.takes == "image"

    def _embedding_path(self) -> str:
        if self.stack == "vision" or self.shape.takes == "image":
            return ""
        try:
            return self._embedding() or ""
        except MissingComponent:
            return ""

    def _is_block(self, inside: Mapping[str, Any]) -> bool:
        attention = self.parts.get("attention")
        if attention is not None and attention in inside:
            return True
        return any(ATTENTION_NAME.search(p) or MIXER_NAME.search(p) for p in inside)

    def within(self, path: str) -> dict[str, Any]:
        start = path + "."
        return {p[len(start) :]: m for p, m in self.modules.items() if p.startswith(start)}

    def _named(self, module: Any, part: str) -> str:
        path = next((p for p, m in self.modules.items() if m is module), None)
        if path is None:
            raise MissingComponent(part, "the model names a module that isn't in its module tree")
        return path

    @property
    def _has_decoder(self) -> bool:
        """Whether the main stack is the decoder of an encoder-decoder."""
        return self.shape.has_encoder and not self.shape.attends_to_image

    def _embedding(self) -> str | None:
        if self.shape.takes == "image" and not self.stack:
            return None
        if self.stack or self._has_decoder:
            modules = [
                p for p in self.modules if last_name(p) == "embed_tokens" and self._is_ours(p)
            ]
            return modules[0] if modules else None
        getter = getattr(self.modules.get(""), "get_input_embeddings", None)
        vocabulary = self.shape.vocab_size
        try:
            module = getter() if getter is not None else None
        except NotImplementedError:
            module = None
        rows = getattr(getattr(module, "weight", None), "shape", (0,))[0]
        if module is not None and (hasattr(module, "num_embeddings") or rows >= vocabulary > 0):
            return self._named(module, "token embedding")
        for path, module in self.modules.items():
            if getattr(module, "num_embeddings", 0) >= self.shape.vocab_size:
                return path
        raise MissingComponent("token embedding", f"no embedding of {self.shape.vocab_size} tokens")

    def _unembedding(self) -> str | None:
        if self.shape.takes == "image":
            return None
        getter = getattr(self.modules.get(""), "get_output_embeddings", None)
        if getter is not None and (module := getter()) is not None:
            size = linear_sizes(module)
            if size is None or size[1] >= self.shape.vocab_size:
                return self._named(module, "unembedding")
        embedding = self._embedding_path()
        for path, module in self.modules.items():
            size = linear_sizes(module)
            inside = path.startswith(f"{self.root}.")
            if inside or path == embedding or size is None:
                continue
            if size[1] == self.shape.vocab_size:
                return path
        return None

    def _final_norm(self) -> str | None:
        """Return the norm next to the list of blocks, or at a level above it."""
        parent = self.root.rpartition(".")[0]
        if "final_norm" in self.parts:
            said = self.parts["final_norm"]
            if said and said not in self.modules:
                said = f"{parent}.{said}"
            return said if said and said in self.modules else None
        while True:
            norms = [
                path
                for path, module in self.modules.items()
                if path.rpartition(".")[0] == parent
                and is_norm(module)
                and not re.search(r"embed|pre_?(layer)?norm|pre_layrnorm|ln_pre", last_name(path))
            ]
            if norms:
                return norms[-1]
            if not parent:
                return None
            parent = parent.rpartition(".")[0]

    def _outer_taps(self, embedding: str | None, unembedding: str | None) -> dict[str, HookPoint]:
        shape = self.shape
        taps: dict[str, HookPoint] = {}
        merged = self._merged()
        width = getattr(self.modules.get(embedding or ""), "embedding_dim", shape.d_model)
        if merged is not None and not self.stack:
            taps["embed"] = HookPoint(merged, "in", TensorLayout.whole(shape.d_model))
        elif embedding is not None:
            taps["embed"] = HookPoint(embedding, "out", TensorLayout.whole(width))
        elif (not self.stack or shape.takes == "image") and (
            of_images := self._embeddings_of_images()
        ):
            made, patches = of_images
            taps["embed"] = HookPoint(
                made, "out", TensorLayout.whole(shape.d_model), patches=patches
            )
        if unembedding is not None:
            read = linear_sizes(self.modules[unembedding])
            width = shape.d_model if read is None else read[0]
            taps["final_norm"] = HookPoint(unembedding, "in", TensorLayout.whole(width))
        elif not self.stack and (head := self.parts.get("head")) in self.modules:
            taps["final_norm"] = HookPoint(str(head), "out", TensorLayout.whole(shape.d_model))
        elif self.stack != "cross" and (norm := self._final_norm()) is not None:
            taps["final_norm"] = HookPoint(norm, "out", TensorLayout.whole(shape.d_model))
        elif self.stack == "encoder":
            last = self.block_path(shape.n_layers - 1)
            taps["final_norm"] = HookPoint(last, "out", TensorLayout.whole(shape.d_model))
        return taps

    def _merged(self) -> str | None:
        """Return the language model that reads embeddings with image features merged in."""
        if self.shape.takes != "image and text":
            return None
        parent = self.root.rpartition(".")[0]
        return parent or None

    def _embeddings_of_images(self) -> tuple[str, str] | None:
        """Return the module that embeds an image, and its submodule that embeds the patches."""
        parent = self.root.rpartition(".")[0]
        while True:
            for name in ("embeddings", "embed", "patch_embed", "patch_embedder"):
                path = f"{parent}.{name}" if parent else name
                if path in self.modules and (patches := self._patches(path)) is not None:
                    return path, patches
            if not parent:
                return None
            parent = parent.rpartition(".")[0]

    def _patches(self, path: str) -> str | None:
        """Return the submodule that embeds patches, before the module adds positions and the tokens
        that precede patches; None if several submodules qualify."""
        inside = {f"{path}.{name}" if name else path: m for name, m in self.within(path).items()}
        norms = [name for name, module in inside.items() if is_norm(module)]
        width = self.shape.d_model
        names = [
            name
            for name, module in inside.items()
            if width in (getattr(module, "out_channels", 0), getattr(module, "out_features", 0))
        ]
        if len(names) != 1 or len(norms) > 1:
            return None
        return (norms or names)[0]


def _common(path: str, other: str) -> int:
    """Count the equal leading components of two paths."""
    count = 0
    for a, b in zip(path.split("."), other.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count
