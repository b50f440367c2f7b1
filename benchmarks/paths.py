"""Path patching from every head to the queries, keys and values of every later one.

    python -m benchmarks.paths [--positions last|all] [--layers 12] [--cells 24] [--threads 1]

The brute-force loop runs two hooked passes of the bare GPT-2 over all prompts for every pair: one
in which the sender is patched and every other head and MLP is held, and one with what the receiver
read in it. Of its pairs, which take equally long, some are timed and compared. Both sides are timed
in processor seconds of this process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import HEAD, random_pairs, words, write_pairs
from benchmarks.model import build
from benchmarks.work import Shape
from mechdsl.base.text import Source, Span
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute.run.panel import execute
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.program import spec
from mechdsl.resolve.types import ModelContext
from mechdsl.results.assembly.collection import check_denominators
from mechdsl.show.plan import count_work, estimate_time, measure_host_pace, measure_matmul_rate

PROMPTS, TOKENS = 8, 16
MECH = (
    HEAD
    + """
experiment sweep {{
  model gpt2
  prompts pairs
  from corrupted into clean
  for r in [q, k, v] {{
    path layer * head * -> r layer * head * at {positions}
  }}
  measure logit(answer) - logit(wrong) as raw
}}
"""
)


@dataclass(frozen=True)
class Pair:
    """A sender, and what it reaches."""

    layer: int
    head: int
    receiver: str
    to_layer: int
    to_head: int


class BruteForce:
    """GPT-2 with plain hooks, all prompts in one batch."""

    def __init__(self, model: Any, clean: Tensor, corrupted: Tensor, positions: slice) -> None:
        self.model = model
        self.clean = clean
        self.positions = positions
        self.width = model.config.n_embd
        self.d_head = self.width // model.config.n_head
        self.base = self._kept(clean)
        self.source = self._kept(corrupted)

    def _kept(self, ids: Tensor) -> Mapping[tuple[str, int], Tensor]:
        """What enters output projections, and what MLPs return, of every layer."""
        kept: dict[tuple[str, int], Tensor] = {}
        handles: list[Any] = []
        for layer, block in enumerate(self.model.transformer.h):

            def z(module: Any, args: Any, layer: int = layer) -> None:
                kept["z", layer] = args[0]

            def mlp(module: Any, args: Any, output: Tensor, layer: int = layer) -> None:
                kept["mlp", layer] = output

            handles.append(block.attn.c_proj.register_forward_pre_hook(z))
            handles.append(block.mlp.register_forward_hook(mlp))
        self._run(ids, handles)
        return kept

    def _run(self, ids: Tensor, handles: Sequence[Any]) -> Tensor:
        try:
            with torch.inference_mode():
                return self.model(ids).logits
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, pair: Pair) -> Tensor:
        """[prompt, vocab] at the last token."""
        own = slice(pair.head * self.d_head, (pair.head + 1) * self.d_head)
        part = "qkv".index(pair.receiver) * self.width + pair.to_head * self.d_head
        there = slice(part, part + self.d_head)
        recorded: list[Tensor] = []
        handles: list[Any] = []
        blocks = self.model.transformer.h
        for layer, block in enumerate(blocks):

            def z(module: Any, args: Any, layer: int = layer) -> Any:
                held = self.base["z", layer].clone()
                if layer == pair.layer:
                    source = self.source["z", layer]
                    held[:, self.positions, own] = source[:, self.positions, own]
                return (held,)

            def mlp(module: Any, args: Any, output: Tensor, layer: int = layer) -> Tensor:
                return self.base["mlp", layer]

            handles.append(block.attn.c_proj.register_forward_pre_hook(z))
            handles.append(block.mlp.register_forward_hook(mlp))

        def record(module: Any, args: Any, output: Tensor) -> None:
            recorded.append(output[:, self.positions, there])

        receiver = blocks[pair.to_layer].attn.c_attn
        handles.append(receiver.register_forward_hook(record))
        self._run(self.clean, handles)

        def write(module: Any, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, self.positions, there] = recorded[0]
            return output

        return self._run(self.clean, [receiver.register_forward_hook(write)])[:, -1]


def main() -> None:
    """Time both, compare them, and print what `plan` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", choices=("last", "all"), default="last")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--cells", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shape = Shape(layers=given.layers, heads=12, width=768)
    with tempfile.TemporaryDirectory() as folder:
        compare(shape, Path(folder), given.positions, given.cells)


def compare(shape: Shape, folder: Path, positions: str, sampled: int) -> None:
    """One shape: both timed on the same prompts."""
    tokenizer = words(shape.vocabulary)
    write_pairs(folder, random_pairs(PROMPTS, TOKENS, shape.vocabulary))
    bare = build(shape)
    model, found = adopt_model("gpt2", bare, tokenizer)
    if model is None or model.tokenizer is None:
        raise RuntimeError(str(found))
    text = MECH.format(positions="last token" if positions == "last" else "tokens *")
    source = Source(text, folder / "sweep.mech")
    statement = spec.Model(span=Span(source, 0, 0), name="gpt2", kind="local", path="")
    context = ModelContext(statement, model.shape, model.tokenizer)
    checked = check_source(source, models={"gpt2": context})
    if has_errors(checked.diagnostics):
        raise RuntimeError(str(checked.diagnostics))
    (experiment,) = checked.experiments
    plan = make_plan(checked.experiments)
    (planned,) = plan.panels[0].experiments
    cost = plan_cost(plan).planned
    work = count_work(plan, cost, shape.layers)
    seconds = estimate_time(
        work, cost.multiply_adds, measure_matmul_rate(), measure_host_pace()
    ).passes
    print(
        f"plan: {int(planned.exists.sum()):,} pairs, {cost.rows:,} rows, "
        f"{cost.tokens:,} tokens through blocks, {cost.flops / 1e12:.1f} TFLOP, "
        f"about {seconds:.0f} s"
    )
    start = process_time()
    execution = execute(plan, {"gpt2": model}, check=check_denominators)
    own = process_time() - start
    values = execution.measured["sweep"].patched[0]
    rows = experiment.table.runs
    clean = torch.tensor([row.ids for row in rows["clean"].rows])
    corrupted = torch.tensor([row.ids for row in rows["corrupted"].rows])
    where = slice(-1, None) if positions == "last" else slice(None)
    answers = [
        (row.texts["answer"].ids[0], row.texts["wrong"].ids[0]) for row in rows["clean"].rows
    ]
    loop = BruteForce(bare, clean, corrupted, where)
    cells = np.flatnonzero(planned.exists)
    chosen = np.random.default_rng(0).permutation(cells)[:sampled]
    axes = [axis.name for axis in experiment.axes]
    worst = effect = 0.0
    loop.logits(pair_of(planned.coordinates, axes, int(chosen[0])))
    start = process_time()
    found_logits = [
        loop.logits(pair_of(planned.coordinates, axes, cell)) for cell in chosen.tolist()
    ]
    each = (process_time() - start) / len(chosen)
    base = execution.measured["sweep"].unpatched["clean"][0][0]
    for cell, logits in zip(chosen.tolist(), found_logits, strict=True):
        by_hand = [float(row[a] - row[b]) for row, (a, b) in zip(logits, answers, strict=True)]
        worst = max(worst, float(np.abs(values[cell] - by_hand).max()))
        effect = max(effect, float(np.abs(np.array(by_hand) - base).max()))
    whole = each * len(cells)
    print(
        f"{positions}: {own:.1f} s planned, {whole:.0f} s by hand ({len(chosen)} of "
        f"{len(cells):,} pairs timed, {each * 1e3:.0f} ms each): {whole / own:.1f} times; "
        f"largest difference {worst:.1e}, largest effect {effect:.2f}"
    )


def pair_of(coordinates: Sequence[Any], axes: Sequence[str], cell: int) -> Pair:
    """The pair of a cell."""
    at: Callable[[str], int] = lambda name: int(coordinates[axes.index(name)][cell])  # noqa: E731
    return Pair(at("layer"), at("head"), "qkv"[at("r")], at("to_layer"), at("to_head"))


if __name__ == "__main__":
    main()
