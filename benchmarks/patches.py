"""Causal attribution over all patches of images: a vision transformer of ViT-B/16's shape.

    python -m benchmarks.patches [--images 1] [--threads 2] [--cells 48] [--first 5] [--last 8]

The residual stream behind a range of blocks goes from each image into a gray one, one patch at a
time (CAAP). The loop runs a pass of the bare model for each cell, with hooks; the batched loop one
for 16 cells. Some of their cells, which take equally long, are timed and compared.

The bound counts multiply-adds as `bound.py` does: a cell starts at the first block whose output is
written, in the block behind it queries, keys and values are new at one patch alone, and the last
block makes keys and values of all tokens and the rest for the class token alone. Attention of each
query over all keys is counted whole wherever a key is new.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.bound import matmul_rate
from mechdsl.base.text import Source, Span
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.run.panel import execute
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import make_plan
from mechdsl.program import spec
from mechdsl.resolve.types import ModelContext
from mechdsl.results.assembly.collection import check_denominators

LAYERS, WIDTH, SIDE, PATCH, LABELS = 12, 768, 224, 16, 10
TOKENS = (SIDE // PATCH) ** 2 + 1
PACK = 16
MECH = """mech 1
model vit = local("handed over")
images scenes {{
  rows "data.jsonl"
  image "{{file}}"
  answer "{{label}}"
}}
images neutral {{
  image gray
}}
experiment caap {{
  model vit
  from scenes into neutral
  images scenes
  patch resid_post layers {first}..{last} at each token of image
  measure logit(answer) as raw
}}
"""
Values = NDArray[np.float64]


def build() -> Any:
    """ViT-B/16 with seeded random weights, wide enough that patches move the logits, and its
    processor."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    labels = {number: f"label {number}" for number in range(LABELS)}
    config = ViTConfig(
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
        id2label=labels,
        label2id={label: number for number, label in labels.items()},
    )
    model = ViTForImageClassification(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        draw = torch.Generator().manual_seed(crc32(name.encode()))
        values = torch.randn(parameter.shape, generator=draw)
        is_norm = "layernorm" in name and name.endswith("weight")
        width = 0.5 if name.startswith("classifier") else 0.05
        parameter.copy_(1 + 0.1 * values if is_norm else width * values)
    return model, ViTImageProcessorPil()


def write_images(folder: Path, count: int) -> list[Image.Image]:
    """Blots of colour, with a label each."""
    random = np.random.default_rng(0)
    images: list[Image.Image] = []
    lines: list[str] = []
    for number in range(count):
        small = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        grown = Image.fromarray(small).resize((SIDE, SIDE), resample=Image.Resampling.BICUBIC)
        grown.save(folder / f"{number}.png")
        images.append(grown)
        lines.append(f'{{"file": "{number}.png", "label": "label {number % LABELS}"}}\n')
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return images


class Loop:
    """Plain hooks on the bare model: `pack` cells of an image in one pass."""

    def __init__(self, model: Any, neutral: Tensor, written: Sequence[int], pack: int) -> None:
        self.model, self.neutral, self.written, self.pack = model, neutral, written, pack
        self.blocks = model.vit.layers

    @torch.inference_mode()
    def source(self, pixels: Tensor) -> dict[int, Tensor]:
        """What the written blocks return, [1, token, width]."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                kept[layer] = output

            return hook

        handles = [self.blocks[layer].register_forward_hook(keep(layer)) for layer in self.written]
        self.model(pixels)
        for handle in handles:
            handle.remove()
        return kept

    @torch.inference_mode()
    def cells(self, source: dict[int, Tensor], patches: Sequence[int], label: int) -> list[float]:
        """The label's logit with each patch's vectors, one at a time."""
        found: list[float] = []
        for start in range(0, len(patches), self.pack):
            own = torch.tensor(patches[start : start + self.pack]) + 1
            rows = torch.arange(len(own))
            handles = [
                self.blocks[layer].register_forward_hook(_write(source[layer][0, own], rows, own))
                for layer in self.written
            ]
            logits = self.model(self.neutral.expand(len(own), -1, -1, -1)).logits
            for handle in handles:
                handle.remove()
            found += logits[:, label].tolist()
        return found


def _write(vectors: Tensor, rows: Tensor, own: Tensor) -> Callable[..., Tensor]:
    def hook(module: Any, args: Any, output: Any) -> Tensor:
        changed = output.clone()
        changed[rows, own] = vectors
        return changed

    return hook


def multiply_adds(images: int, first: int) -> int:
    """The lower bound of the whole work; the gray image is run once."""
    d, t = WIDTH, TOKENS
    attention = 2 * d * t * t
    head = 2 * d * t + d * d * 10
    last = 2 * d * d * t + head
    embed = (t - 1) * 3 * PATCH * PATCH * d
    whole = embed + (LAYERS - 1) * (12 * d * d * t + attention) + last
    joining = 3 * d * d + attention + 9 * d * d * t
    between = max(0, LAYERS - 1 - (first + 2)) * (12 * d * d * t + attention)
    cell = joining + between + last
    return (images + 1) * whole + images * (t - 1) * cell


def main() -> None:
    """Time all three, compare them, and print how far each is from the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=int, default=48, help="of the loops, timed per image")
    parser.add_argument("--first", type=int, default=5)
    parser.add_argument("--last", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), given.images, given.cells, given.first, given.last)


def compare(folder: Path, count: int, sampled: int, first: int, last: int) -> None:
    """The rate of products is measured before and behind each way."""
    bare, processor = build()
    images = write_images(folder, count)
    rates = [matmul_rate()]
    values, own = with_mechdsl(folder, bare, processor, first, last)
    rates.append(matmul_rate())
    bound = multiply_adds(count, first) / float(np.mean(rates))
    print(
        f"mechdsl: {own:.1f} s for {values.size:,} cells, {bound / own:.2f} of the bound "
        f"({bound:.1f} s)"
    )
    ready: Callable[[Image.Image], Tensor] = lambda image: processor(  # noqa: E731
        image, return_tensors="pt"
    )["pixel_values"]
    neutral = ready(Image.fromarray(np.full((SIDE, SIDE, 3), 128, np.uint8)))
    order = np.random.default_rng(0).permutation(TOKENS - 1)[:sampled].tolist()
    for name, pack in (("loop", 1), (f"loop of {PACK} cells a pass", PACK)):
        loop = Loop(bare, neutral, range(first, last + 1), pack)
        worst = effect = 0.0
        start = perf_counter()
        found: list[list[float]] = []
        for number, image in enumerate(images):
            found.append(loop.cells(loop.source(ready(image)), order, number % LABELS))
        took = (perf_counter() - start) * (TOKENS - 1) / len(order)
        for number, by_hand in enumerate(found):
            ours = values[order, number]
            worst = max(worst, float(np.abs(ours - by_hand).max()))
            effect = max(effect, float(np.ptp(by_hand)))
        print(
            f"{name}: {took:.1f} s ({len(order)} of {TOKENS - 1} cells timed): mechdsl is "
            f"{took / own:.1f} times as fast; largest difference {worst:.1e}, effects apart by up "
            f"to {effect:.2f}"
        )


def with_mechdsl(
    folder: Path, bare: Any, processor: Any, first: int, last: int
) -> tuple[Values, float]:
    """[patch, image] the label's logit, and wall seconds of planning and running."""
    model, found = adopt_model("vit", bare, processor)
    if model is None or model.tokenizer is None:
        raise RuntimeError(str(found))
    source = Source(MECH.format(first=first, last=last), folder / "caap.mech")
    statement = spec.Model(span=Span(source, 0, 0), name="vit", kind="local", path="")
    context = ModelContext(statement, model.shape, model.tokenizer)
    checked = check_source(source, models={"vit": context})
    if has_errors(checked.diagnostics):
        raise RuntimeError(render_full(checked.diagnostics, color=False, width=100))
    start = perf_counter()
    plan = make_plan(checked.experiments)
    execution = execute(plan, {"vit": model}, check=check_denominators)
    took = perf_counter() - start
    return execution.measured["caap"].patched[0], took


if __name__ == "__main__":
    main()
