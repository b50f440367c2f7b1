"""Windows of three layers × each row of a grid of image tokens, in a model of LLaVA's shape.

    python -m benchmarks.image_rows [--grid 24] [--threads 2] [--device cpu] [--loop-cells 16]

A CLIP tower (12 layers of width 768) reads two images of 336 × 336 pixels, in 24 × 24 patches. The
language model is a Llama with as many layers, dimensions and parameters per layer as GPT-2 small,
and random weights. In two prompts, `attn_out` and `mlp_out` are patched from one image into the
other: 12 windows of layers × 24 rows × 2 sites are 576 cells. The time of a run includes the tower
and all unpatched runs, but not loading the model or checking the file.

The loop is what an expert writes first: vectors of the images are computed once, then a batch of 16
cells is one whole pass with hooks. It runs a sample of the cells; its time is scaled to all.

The bound is the number of multiply-adds of the language model that a restart can't avoid, divided
by the rate of a large product (2048³, on a GPU 8192³): positions before the first patched one are
those of the unpatched run, and so are layers before the window. Vectors that a later layer of the
window computes and the patch replaces aren't counted, and neither are the tower's passes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor

from benchmarks.bound import restarted, unpatched
from benchmarks.gpu import finish, large_product
from benchmarks.work import Shape
from mechdsl.base.text import Source, Span
from mechdsl.checks.file_check import CheckedFile, check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.run.panel import execute
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import make_plan
from mechdsl.program import spec
from mechdsl.resolve.types import ModelContext
from mechdsl.results.assembly.collection import check_denominators

PATCH = 14
WORDS = 512
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
IMAGE = SPECIAL.index("<image>")
SHAPE = Shape(layers=12, heads=12, width=768, vocabulary=WORDS)
WINDOW = 3
SITES = ("attn_out", "mlp_out")
BATCH = 16
"""Cells in a pass of the loop."""
PROMPTS = 2
FILE = """mech 1

model vlm = local("handed over")

prompts questions {{
  rows "rows.jsonl"
  image photo = "{{file}}"
  template "{{photo}} {{text}}"
  answer "{{right}}"
  wrong "{{rival}}"
  corrupt other {{ file = replaced }}
}}
"""
EXPERIMENT = """
experiment {site} {{
  model vlm
  prompts questions
  from clean into other
  for r in 1..{grid} {{
    patch {site} layer * window {window} at photo row r col * tokens
  }}
  measure logit(answer) - logit(wrong) as raw
}}
"""
TEXT = 8
"""Words after the image."""


def make_processor(grid: int) -> Any:
    """LLaVA's, with a tokenizer of words w0, w1, …"""
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = {token: n for n, token in enumerate((*SPECIAL, *(f"w{n}" for n in range(WORDS - 4))))}
    made = Tokenizer(models.WordLevel(words, "<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    size = {"height": grid * PATCH, "width": grid * PATCH}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=made,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def make_model(grid: int) -> Any:
    """A model of LLaVA's shape with random weights, in float32."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "model_type": "llama",
        "vocab_size": WORDS,
        "hidden_size": SHAPE.width,
        "intermediate_size": 8 * SHAPE.width // 3,  # three matrices: 8 d² in all
        "num_hidden_layers": SHAPE.layers,
        "num_attention_heads": SHAPE.heads,
        "num_key_value_heads": SHAPE.heads,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": grid * PATCH,
        "patch_size": PATCH,
    }
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
    )
    model: Any = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "language_model" in name:
                weight.mul_(2)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Row:
    """A prompt: two images, the words after them, and two answers."""

    file: str
    replaced: str
    text: str
    right: str
    rival: str


def write_data(folder: Path, grid: int) -> list[Row]:
    """Write the images of coarse noise and the records that name them."""
    draw, noise = random.Random(0), np.random.default_rng(0)
    for number in range(2 * PROMPTS):
        cells = noise.integers(0, 256, (grid, grid, 3), dtype=np.uint8)
        side = grid * PATCH
        Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST).save(
            folder / f"{number}.png"
        )
    rows: list[Row] = []
    for number in range(PROMPTS):
        words = [f"w{draw.randrange(WORDS - 4)}" for _ in range(TEXT + 2)]
        files = f"{2 * number}.png", f"{2 * number + 1}.png"
        rows.append(Row(*files, " ".join(words[:TEXT]), *words[TEXT:]))
    lines = "".join(json.dumps(vars(row)) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    return rows


def check(folder: Path, grid: int, loaded: LoadedModel) -> CheckedFile:
    """The file, checked."""
    assert loaded.tokenizer is not None
    text = FILE.format() + "".join(
        EXPERIMENT.format(site=site, grid=grid, window=WINDOW) for site in SITES
    )
    source = Source(text, folder / "rows.mech")
    said = spec.Model(span=Span(source, 0, 0), name="vlm", kind="local", path="")
    checked = check_source(
        source, models={"vlm": ModelContext(said, loaded.shape, loaded.tokenizer)}
    )
    if has_errors(checked.diagnostics):
        raise RuntimeError(render_full(checked.diagnostics, color=False, width=100))
    return checked


def run_package(checked: CheckedFile, loaded: LoadedModel) -> Tensor:
    """[site, layer, row of the grid, prompt]: the measure, prompts in the order of the records."""
    found = execute(make_plan(checked.experiments), {"vlm": loaded}, check=check_denominators)
    if found.diagnostics:
        raise RuntimeError(render_full(found.diagnostics, color=False, width=100))
    values: list[Tensor] = []
    for experiment in checked.experiments:
        given = found.measured[experiment.name].patched[0]  # [row of the grid × layer, prompt]
        table = np.empty_like(given)
        table[:, list(experiment.table.row_ids)] = given
        values.append(torch.from_numpy(table).reshape(-1, SHAPE.layers, PROMPTS))
    return torch.stack(values).transpose(1, 2)


# --- the loop -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One site, window and row of the grid."""

    site: int
    centre: int
    row: int

    @property
    def layers(self) -> range:
        """As `layer * window 3` joins them, truncated at the ends."""
        half = WINDOW // 2
        return range(max(0, self.centre - half), min(SHAPE.layers, self.centre + half + 1))


def all_cells(grid: int) -> list[Cell]:
    """In the order of the values: sites, centres, rows."""
    return [
        Cell(site, centre, row)
        for site in range(len(SITES))
        for centre in range(SHAPE.layers)
        for row in range(grid)
    ]


class Hooked:
    """Whole passes of the language model on vectors of images that were computed once."""

    def __init__(self, model: Any, processor: Any, rows: list[Row], folder: Path) -> None:
        self.model, self.rows = model, rows
        self.blocks = list(model.model.language_model.layers)
        self.inputs: list[tuple[Tensor, Tensor]] = []
        """Prompt → [token, width] of the clean and of the other run."""
        self.reads: list[tuple[Tensor, Tensor]] = []
        """Prompt → ids of the two answers."""
        for row in rows:
            both = []
            for name in (row.file, row.replaced):
                with Image.open(folder / name) as image:
                    made = processor(
                        text=f"<image> {row.text}", images=image.convert("RGB"), return_tensors="pt"
                    ).to(model.device)
                with torch.inference_mode():
                    own = model.get_image_features(pixel_values=made["pixel_values"])
                    vectors = torch.cat(list(getattr(own, "pooler_output", own)))
                    embedded = model.get_input_embeddings()(made["input_ids"][0]).clone()
                    embedded[made["input_ids"][0] == IMAGE] = vectors
                both.append(embedded)
                self.first = int((made["input_ids"][0] == IMAGE).nonzero()[0])
            self.inputs.append((both[0], both[1]))
            ids = processor.tokenizer([row.right, row.rival], add_special_tokens=False)["input_ids"]
            self.reads.append((torch.tensor(ids[0]), torch.tensor(ids[1])))

    def run(self, cells: list[Cell], grid: int) -> Tensor:
        """[cell, prompt]"""
        found = torch.empty(len(cells), len(self.rows))
        for prompt, (clean, other) in enumerate(self.inputs):
            kept: dict[tuple[int, int], Tensor] = {}
            with self._hooks(partial(self._keep, kept)):
                self._logits(clean[None])
            for start in range(0, len(cells), BATCH):
                some = cells[start : start + BATCH]
                with self._hooks(partial(self._write, kept, some, grid)):
                    logits = self._logits(other.expand(len(some), -1, -1))
                right, rival = self.reads[prompt]
                found[start : start + BATCH, prompt] = (
                    logits[:, int(right)] - logits[:, int(rival)]
                ).cpu()
        return found

    def _logits(self, inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model(inputs_embeds=inputs, logits_to_keep=1, use_cache=False).logits[:, -1]

    @contextmanager
    def _hooks(self, hook: Callable[[int, int, Any], Any]) -> Generator[None]:
        """A hook after attention and after the MLP of each block; it gets their output."""
        handles = []
        for layer, block in enumerate(self.blocks):
            for site, module in enumerate((block.self_attn, block.mlp)):
                own = lambda m, a, out, site=site, layer=layer: hook(site, layer, out)  # noqa: E731
                handles.append(module.register_forward_hook(own))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, kept: dict[tuple[int, int], Tensor], site: int, layer: int, out: Any) -> None:
        kept[site, layer] = (out[0] if isinstance(out, tuple) else out)[0]

    def _write(
        self,
        kept: dict[tuple[int, int], Tensor],
        cells: list[Cell],
        grid: int,
        site: int,
        layer: int,
        out: Any,
    ) -> Any:
        tensor = out[0] if isinstance(out, tuple) else out
        for number, cell in enumerate(cells):
            if cell.site == site and layer in cell.layers:
                own = slice(self.first + cell.row * grid, self.first + (cell.row + 1) * grid)
                tensor[number, own] = kept[site, layer][own]
        return out


# --- the bound ------------------------------------------------------------------------------------


def multiply_adds(grid: int, length: int, first: int) -> int:
    """The lower bound of all cells and unpatched runs; `first`: the image's first position."""
    d, total = SHAPE.width, 2 * PROMPTS * unpatched(SHAPE, length)
    for cell in all_cells(grid):
        start = first + cell.row * grid
        written = range(start, start + grid)
        lowest, *later = cell.layers
        if SITES[cell.site] == "attn_out":
            middle = 8 * d * d * grid if lowest < SHAPE.layers - 1 else 0
            replaced = 2 * d * d * grid  # queries and the output projection
        else:
            middle, replaced = 0, 8 * d * d * grid
        row = middle + restarted(SHAPE, lowest + 1, written, length)
        row -= replaced * sum(layer < SHAPE.layers - 1 for layer in later)
        total += PROMPTS * row
    return total


def main() -> None:
    """Measure, compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--loop-cells", type=int, default=32, help="cells that the loop runs")
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    with TemporaryDirectory() as name:
        report(Path(name), given)


def report(folder: Path, given: argparse.Namespace) -> None:
    """Run both and print their times, the bound and the largest difference."""
    grid, device = given.grid, given.device
    rows = write_data(folder, grid)
    processor, module = make_processor(grid), make_model(grid).to(device)
    loaded, found = adopt_model("vlm", module, processor)
    if loaded is None:
        raise RuntimeError(render_full(found, color=False, width=100))
    checked = check(folder, grid, loaded)
    loop, cells = Hooked(module, processor, rows, folder), all_cells(grid)
    length = len(loop.inputs[0][0])
    picked = cells[:: max(1, len(cells) // given.loop_cells)][: given.loop_cells]
    bound = multiply_adds(grid, length, loop.first) / large_product(device)
    values = expected = torch.zeros(0)
    for number in range(given.rounds):
        start = perf_counter()
        values = run_package(checked, loaded)
        finish(device)
        own = perf_counter() - start
        start = perf_counter()
        expected = loop.run(picked, grid)
        by_loop = (perf_counter() - start) * len(cells) / len(picked)
        print(
            f"round {number + 1}: {len(cells)} cells on {PROMPTS} prompts of {length} tokens: "
            f"{own:.2f} s, {bound / own:.2f} of the bound ({bound:.2f} s); the loop {by_loop:.2f} "
            f"s ({by_loop / own:.1f} times as long), from {len(picked)} cells",
            flush=True,
        )
    mine = torch.stack([values[cell.site, cell.centre, cell.row] for cell in picked])
    spread = float(values.std(unbiased=False))
    print(
        f"largest difference from the loop {float((mine - expected).abs().max()):.1e} logits; the "
        f"values have a standard deviation of {spread:.2g}"
    )


if __name__ == "__main__":
    main()
