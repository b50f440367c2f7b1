"""How fast activations are saved, next to bare forward passes over the same prompts.

    python -m benchmarks.save [--full]

A GPT-2-small shape with random weights. Both sides run in one process, turn by turn, so that other
work on the machine slows both; the bare passes are `transformers` alone, on batches of as many
tokens, without logits, as saving needs none, and for the small counts with logits too. With
`--full` the last token of 10,000 prompts and all tokens of 1,000, else of 300 and 60. Memory is the
highest so far, so that a larger count that needs no more prints the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mechdsl.base.text import Span
from mechdsl.checks.file_check import check_source
from mechdsl.execute.run.saves import save_vectors
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.program.spec import Model
from mechdsl.resolve.types import ModelContext
from mechdsl.syntax.frontend import read_source

WORDS = 400
BATCH = 4096
"""Tokens."""
AGAINST = ("without logits", "with logits")
FILE = """mech 1
model m = local("handed over")
prompts p {{ rows "rows.jsonl"  template "{{text}}"  answer " w1" }}
experiment e {{
  prompts p
  save resid_post layer * at {at} to "acts.safetensors"
}}
"""


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{n}": n for n in range(WORDS)} | {"<unk>": WORDS}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def seconds(what: Callable[[], None]) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def compare(model: GPT2LMHeadModel, loaded: LoadedModel, count: int, at: str, turns: int) -> None:
    random = np.random.default_rng(0)
    rows = [random.integers(0, WORDS, int(random.integers(12, 33))) for _ in range(count)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"text": " ".join(f"w{n}" for n in row)}) for row in rows]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "save.mech").write_text(FILE.format(at=at), encoding="utf-8")

        source, problems = read_source(folder / "save.mech")
        assert source is not None, problems
        said = Model(span=Span(source, 0, 0), name="m", kind="local", path="")
        assert loaded.tokenizer is not None
        context = ModelContext(said, loaded.shape, loaded.tokenizer)
        (experiment,) = check_source(source, models={"m": context}).saving

        def save() -> None:
            written, problems = save_vectors(experiment, {"m": loaded}, ExecutionOptions())
            assert written, problems

        def bare(passes: nn.Module) -> None:
            size = BATCH // 32
            for begin in range(0, count, size):
                part = rows[begin : begin + size]
                ids = torch.zeros((len(part), max(map(len, part))), dtype=torch.long)
                mask = torch.zeros_like(ids)
                for n, row in enumerate(part):
                    ids[n, : len(row)], mask[n, : len(row)] = torch.from_numpy(row), 1
                with torch.inference_mode():
                    passes(input_ids=ids, attention_mask=mask)

        sides = (save, partial(bare, model.transformer), partial(bare, model))
        taken = [[seconds(side) for side in sides[: 3 if turns > 1 else 2]] for _ in range(turns)]
        size = (folder / "acts.safetensors").stat().st_size / 1e6
    rates = [median(turn[n] / turn[0] for turn in taken) for n in range(1, len(taken[0]))]
    told = " and ".join(
        f"{rate:.2f} of the bare rate {what}" for rate, what in zip(rates, AGAINST, strict=False)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{at} of {count:,} prompts, {size:,.0f} MB: {told} "
        f"(seconds: {', '.join(f'{s:.1f}' for s in taken[-1])}), peak {peak:,.0f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    full = parser.parse_args().full
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    loaded, problems = adopt_model("m", model, tokenizer())
    assert loaded is not None, problems
    for count in (300, 10_000) if full else (300,):
        compare(model, loaded, count, "last token", 1 if count == 10_000 else 3)
    for count in (60, 1_000) if full else (60,):
        compare(model, loaded, count, "tokens *", 1 if count == 1_000 else 3)


if __name__ == "__main__":
    main()
