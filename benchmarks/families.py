"""The planner on other families: how much faster than a plain loop it is, against GPT-2's figure.

    python -m benchmarks.families [FAMILY…] [--work W1a] [--threads 1] [--write]

Models have GPT-2 small's depth, width, heads and vocabulary, and random weights. Both sides are
timed in processor seconds of this process, the plain loop once, the planner three times (the best
counts), and their tables of effects are compared.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import nn

from benchmarks import model as gpt2_model
from benchmarks.data import make
from benchmarks.tools import mechdsl as ours
from benchmarks.tools import plain as loop
from benchmarks.work import Shape

REPEATS = 3
CLOSE = 1e-4
"""Of the largest effect."""
TABLE = Path(__file__).parent / "families.md"


@dataclass(frozen=True)
class Family:
    """How a family calls its sizes, and where its blocks lie."""

    model_type: str
    blocks: str
    output: str
    """Attention's output projection, within a block."""
    sizes: Mapping[str, str]
    """Config key → field of `Shape`."""
    more: Mapping[str, Any]

    def build(self, shape: Shape) -> nn.Module:
        """The model in eval mode; weights are seeded by name."""
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {key: getattr(shape, field) for key, field in self.sizes.items()}
        config = AutoConfig.for_model(
            self.model_type, bos_token_id=1, eos_token_id=None, **sizes, **self.more
        )
        made = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for name, parameter in made.named_parameters():
            draw = torch.Generator().manual_seed(shape.seed + crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() < 2:
                parameter.data.copy_(parameter.data + 0.1 * values)
            else:
                parameter.data.copy_(0.04 * values)
        return made


_LLAMA = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "heads",
    "vocab_size": "vocabulary",
}
_NEOX = {key: field for key, field in _LLAMA.items() if key != "num_key_value_heads"}
_BLOOM = {
    "hidden_size": "width",
    "n_layer": "layers",
    "n_head": "heads",
    "vocab_size": "vocabulary",
}
# Gated MLPs of about as many weights as GPT-2's.
_GATED = {"intermediate_size": 2048, "pad_token_id": 0}
FAMILIES = {
    "llama": Family("llama", "model.layers", "self_attn.o_proj", _LLAMA, _GATED),
    "gpt_neox": Family(
        "gpt_neox", "gpt_neox.layers", "attention.dense", _NEOX, {"intermediate_size": 3072}
    ),
    "gemma3": Family(
        "gemma3_text",
        "model.layers",
        "self_attn.o_proj",
        _LLAMA,
        {**_GATED, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512},
    ),
    "qwen3": Family(
        "qwen3", "model.layers", "self_attn.o_proj", _LLAMA, {**_GATED, "head_dim": 64}
    ),
    "bloom": Family("bloom", "transformer.h", "self_attention.dense", _BLOOM, {"pad_token_id": 0}),
}


class PlainLoop(loop.Plain):
    """A whole pass of the model per cell, with hooks where the family's blocks have them."""

    def __init__(self, family: Family | None) -> None:
        super().__init__()
        self.family = family

    def build(self, work: Any) -> None:
        if self.family is None:
            super().build(work)
            return
        self.model: Any = self.family.build(work.shape)
        self.d_head = work.shape.width // work.shape.heads
        self.blocks = list(self.model.get_submodule(self.family.blocks))

    def hook(self, layer: int, change: Any) -> Any:
        if self.family is None:
            return super().hook(layer, change)
        block = self.blocks[layer]
        first = self.work.site == "resid_pre"
        target = block if first else block.get_submodule(self.family.output)

        def before(module: nn.Module, arguments: Any, named: Any) -> Any:
            given = arguments[0] if arguments else named["hidden_states"]
            changed = change(given)
            if changed is None:
                return None
            if arguments:
                return (changed, *arguments[1:]), named
            return (), {**named, "hidden_states": changed}

        return target.register_forward_pre_hook(before, with_kwargs=True)


@dataclass(frozen=True)
class Timing:
    """Processor seconds of one family, and how far the tables are apart."""

    name: str
    plain: float
    planned: float
    difference: float
    """Of the largest effect."""

    @property
    def ratio(self) -> float:
        return self.plain / self.planned


def timed(name: str, work_name: str) -> Timing:
    """Both sides on one family; RuntimeError where their tables differ."""
    family = FAMILIES.get(name)
    with tempfile.TemporaryDirectory() as folder:
        work = make(work_name, Path(folder) / "work", ioi=None)
        ours.build = gpt2_model.build if family is None else family.build  # type: ignore[assignment]
        planner = ours.Mechdsl()
        planner.load(work, Path(folder) / "work")
        if not planner.model.restartable:
            raise RuntimeError(f"{name}: rows are whole passes")
        picks = work.picks()
        best = float("inf")
        for _ in range(REPEATS):
            start = process_time()
            found = planner.run(picks)
            best = min(best, process_time() - start)
        del planner
        plain = PlainLoop(family)
        plain.load(work, Path(folder) / "work")
        start = process_time()
        expected = plain.run(picks)
        seconds = process_time() - start
    size = float(np.nanmax(np.abs(expected.table)))
    difference = float(np.nanmax(np.abs(expected.table - found.table))) / size
    if difference > CLOSE:
        raise RuntimeError(f"{name}: tables differ by {difference:.1e} of the largest effect")
    return Timing(name, seconds, best, difference)


def table_of(timings: Sequence[Timing], work_name: str) -> str:
    """A table in Markdown; the first timing is GPT-2's."""
    lines = [
        f"| family | plain loop, s | planned, s | ratio on {work_name} | of GPT-2's | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in timings:
        share = one.ratio / timings[0].ratio
        lines.append(
            f"| {one.name} | {one.plain:.2f} | {one.planned:.2f} | {one.ratio:.2f} | {share:.2f} "
            f"| {one.difference:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--work", default="W1a")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"also to {TABLE.name}")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    timings: list[Timing] = []
    for name in ("gpt2", *given.families):
        timings.append(timed(name, given.work))
        print(table_of(timings, given.work).splitlines()[-1], flush=True)
    text = table_of(timings, given.work)
    print(text)
    if given.write:
        TABLE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
