"""Peak memory and processor time of one patched prompt, as it gets longer.

    python -m benchmarks.long_prompts [--tokens 1024 2048 4096 8192] [--heads 4] [--threads 1]

A Llama with random weights runs one pair of prompts in a process per length. The patch is at the
first token, so that every token of the patched row attends to every earlier one. `--edges` blocks
an edge of attention, so that scores are computed where they can be changed. The last line has the
exponents of growth from the shortest to the longest prompt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from math import log
from pathlib import Path
from time import process_time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.data import HEAD, random_pairs, words, write_pairs
from benchmarks.worker import forget_peak, give_back, memory
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

VOCABULARY = 512
LAYERS = 2
D_HEAD = 16
PATCH = "from clean into corrupted\n  patch resid_pre layer 0 at token 0"
EDGE = "from clean into corrupted\n  block attention layer 0 head 0 from token 1 to token 0"
MECH = """
experiment sweep {{
  model llama
  prompts pairs
  {rule}
  measure logit(answer) - logit(wrong) as raw
}}
"""


def build(heads: int, attention: str) -> LlamaForCausalLM:
    """A Llama in fp32 with seeded random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=heads * D_HEAD,
        intermediate_size=4 * heads * D_HEAD,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        max_position_embeddings=1 << 17,
        initializer_range=0.2,
    )
    config._attn_implementation = attention  # pyright: ignore[reportPrivateUsage]
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def measure(tokens: int, heads: int, attention: str, edges: bool) -> dict[str, float]:
    """MiB above the loaded model, and processor seconds, of one run; and its value."""
    model, found = adopt_model("llama", build(heads, attention), words(VOCABULARY))
    if model is None or model.tokenizer is None:
        raise RuntimeError(str(found))
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder), random_pairs(1, tokens, VOCABULARY))
        text = HEAD.format().replace("gpt2", "llama") + MECH.format(rule=EDGE if edges else PATCH)
        source = Source(text, Path(folder) / "sweep.mech")
        statement = spec.Model(span=Span(source, 0, 0), name="llama", kind="local", path="")
        context = ModelContext(statement, model.shape, model.tokenizer)
        checked = check_source(source, models={"llama": context})
    if has_errors(checked.diagnostics):
        raise RuntimeError(render_full(checked.diagnostics, color=False, width=100))
    give_back()
    before, began = memory("VmRSS"), process_time()
    forget_peak()
    execution = execute(make_plan(checked.experiments), {"llama": model}, check=check_denominators)
    measured = execution.measured["sweep"]
    (value,) = measured.patched[0].ravel()
    return {
        "above": memory("VmHWM") - before,
        "peak": memory("VmHWM"),
        "seconds": process_time() - began,
        "value": float(value),
    }


def main() -> None:
    """Measure each length in a process, and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--edges", action="store_true", help="block an edge of attention")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        torch.set_num_threads(given.threads)
        (tokens,) = given.tokens
        print(json.dumps(measure(tokens, given.heads, given.attention, given.edges)))
        return
    print("tokens  peak MiB  above the model  CPU s  value")
    rows: list[dict[str, float]] = []
    for tokens in given.tokens:
        command = [sys.executable, "-m", "benchmarks.long_prompts", "--child"]
        command += ["--tokens", str(tokens), "--heads", str(given.heads)]
        command += ["--threads", str(given.threads), "--attention", given.attention]
        command += ["--edges"] if given.edges else []
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(ended.stdout.splitlines()[-1])
        print(
            f"{tokens:6}  {found['peak']:8.0f}  {found['above']:15.0f}  {found['seconds']:5.1f}  "
            f"{found['value']:.6f}",
            flush=True,
        )
        rows.append(found)
    if len(rows) > 1:
        longer = log(given.tokens[-1] / given.tokens[0])
        by = {name: log(rows[-1][name] / rows[0][name]) / longer for name in ("above", "seconds")}
        print(
            f"growth: memory above the model tokens^{by['above']:.2f}, "
            f"CPU time tokens^{by['seconds']:.2f}"
        )


if __name__ == "__main__":
    main()
