"""A sweep of steering vectors during generation, against a loop of `model.generate`.

    python -m benchmarks.steering [--rounds 5] [--threads 1] [--pass-tokens N]
    python -m benchmarks.steering --growth 32 64 128 256 512

The file adds a direction with 12 factors behind each of the 4 layers of `zoo("refusal")`, at all
tokens of prompts and replies: 48 cells on 16 prompts, up to 32 tokens each, which most rows end
before. The loop is one `model.generate` per cell: all prompts in one batch with a hook, which stops
where all rows have ended. Both run in one process, in turns; loading and checking are not timed,
planning is. Replies have to be equal. `--growth` times the file on rows that don't end, by tokens
of a reply, and prints the exponents of seconds and of memory above the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from math import log
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mechdsl.base.text import Source, Span
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute import unpatched_runs as writer
from mechdsl.execute.run.panel import Execution, execute
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.execute.unpatched_runs import find_end_tokens
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import make_plan
from mechdsl.program import spec
from mechdsl.resolve.types import ModelContext
from mechdsl.results.assembly.collection import check_denominators

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "mechdsl" / "zoo" / "refusal"
QUESTIONS = ROOT / "examples" / "data" / "questions.jsonl"
TEMPLATE = "user : how do i {verb} the {thing} ? bot :"
FACTORS = (-1.2, -1.0, -0.8, -0.6, -0.4, -0.2, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
LAYERS, PROMPTS, TOKENS = 4, 16, 32
DIRECTION = 1
"""The layer behind which the direction is found."""
FILE = """mech 1

model lm = zoo("refusal")

prompts forbidden {{
  rows "questions.jsonl"
  where forbidden = 1
  template "{template}"
  answer " {{tool}}"
}}

prompts harmless {{
  rows "questions.jsonl"
  where forbidden = 0
  template "{template}"
  answer " {{tool}}"
}}

direction refusing =
  mean_difference(forbidden, harmless) at resid_post layer {direction} at last token

experiment sweep {{
  prompts forbidden limit {prompts}
  generate {tokens}
  for c in {factors} {{
    add c * refusing to resid_post layer * at tokens *
  }}
  measure contains("can not help") as raw
}}
"""
Replies = list[list[list[int]]]
"""[cell][prompt] tokens, cells by factor and layer."""


class Task:
    """The file, the model, and what both sides write."""

    def __init__(self, tokens: int, pass_tokens: int | None = None) -> None:
        self.tokens = tokens
        self.options = ExecutionOptions(pass_tokens=pass_tokens)
        module = AutoModelForCausalLM.from_pretrained(
            FOLDER,
            dtype=torch.float32,
            max_position_embeddings=max(128, tokens + 64),  # rotary: weights don't depend on it
        )
        self.module: Any = module.eval()
        self.tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        loaded, found = adopt_model("lm", self.module, self.tokenizer)
        if loaded is None:
            raise RuntimeError(str(found))
        self.model = loaded
        text = FILE.format(
            template=TEMPLATE,
            direction=DIRECTION,
            prompts=PROMPTS,
            tokens=tokens,
            factors=list(FACTORS),
        )
        self.checked = self._check(Source(text, QUESTIONS.with_name("steering.mech")))
        (experiment,) = self.checked.experiments
        run = experiment.table.runs[experiment.spec.base]
        self.prompts = [list(row.ids) for row in run.rows]
        self.cells = [(c, layer) for c in FACTORS for layer in range(LAYERS)]
        assert experiment.n_cells == len(self.cells)

    def _check(self, source: Source) -> CheckedFile:
        assert self.model.tokenizer is not None
        statement = spec.Model(span=Span(source, 0, 0), name="lm", kind="local", path="")
        context = ModelContext(statement, self.model.shape, self.model.tokenizer)
        checked = check_source(source, CheckSettings(), {"lm": context})
        if has_errors(checked.diagnostics):
            raise RuntimeError(str(checked.diagnostics))
        return checked

    def by_mechdsl(self) -> Execution:
        """Plan and run the file."""
        plan = make_plan(self.checked.experiments)
        found = execute(plan, {"lm": self.model}, self.options, check=check_denominators)
        if found.diagnostics:
            raise RuntimeError(str(found.diagnostics))
        return found

    def written(self, execution: Execution) -> Replies:
        """The tokens of the replies, without the one that ends each."""
        replies = execution.measured["sweep"].replies
        return [
            [list(replies[cell, prompt][0].ids) for prompt in range(PROMPTS)]
            for cell in range(len(self.cells))
        ]

    def by_loop(self) -> Replies:
        """One `model.generate` for each cell."""
        directions = self._direction()
        longest = max(map(len, self.prompts))
        pad = self.module.generation_config.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(own)) + own for own in self.prompts])
        lengths = torch.tensor([len(own) for own in self.prompts])
        mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
        return [self._cell(factor * directions, layer, ids, mask) for factor, layer in self.cells]

    def _cell(self, vector: Tensor, layer: int, ids: Tensor, mask: Tensor) -> list[list[int]]:
        def add(module: nn.Module, given: Any, output: Any) -> Any:
            return output + vector

        handle = self.module.model.layers[layer].register_forward_hook(add)
        try:
            found = self.module.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=self.tokens,
                do_sample=False,
                eos_token_id=sorted(find_end_tokens(self.model)),
            )
        finally:
            handle.remove()
        return [self._until_end(own) for own in found[:, ids.shape[1] :].tolist()]

    def _until_end(self, ids: Sequence[int]) -> list[int]:
        ends = find_end_tokens(self.model)
        return list(takewhile(lambda token: token not in ends, ids))

    def _direction(self) -> Tensor:
        """[width] the difference of means over both blocks, at the last token of each prompt."""
        questions = [
            json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()
        ]
        means: list[Tensor] = []
        for forbidden in (1, 0):
            texts = [
                TEMPLATE.format(**each) for each in questions if each["forbidden"] == forbidden
            ]
            every = [self.tokenizer.encode(text).ids for text in texts]
            if forbidden:
                assert all(ids in every for ids in self.prompts)
            width = len(every[0])
            assert all(len(ids) == width for ids in every)
            hidden = self.module(torch.tensor(every), output_hidden_states=True).hidden_states
            means.append(hidden[DIRECTION + 1][:, -1].mean(0))
        return means[0] - means[1]


def main() -> int:
    """Time what the command line asks for; the exit status says whether replies are equal."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(grown(arguments.one)))
        return 0
    if arguments.growth:
        _growth(arguments)
        return 0
    return _against_loop(arguments)


@torch.no_grad()
def _against_loop(arguments: argparse.Namespace) -> int:
    """Rounds of both sides."""
    task = Task(TOKENS, arguments.pass_tokens)
    mine, loop = task.written(task.by_mechdsl()), task.by_loop()
    cells = zip(mine, loop, strict=True)
    pairs = [a == b for own, other in cells for a, b in zip(own, other, strict=True)]
    lengths = [len(ids) for cell in loop for ids in cell]
    print(
        f"{len(task.cells)} cells, {PROMPTS} prompts of {len(task.prompts[0])} tokens; replies of "
        f"{min(lengths)} to {max(lengths)} tokens, {sum(lengths) / len(lengths):.1f} in the mean; "
        f"{sum(pairs)} of {len(pairs)} are equal"
    )
    sides: dict[str, Callable[[], object]] = {"mechdsl": task.by_mechdsl, "generate": task.by_loop}
    for clock, now in (("wall", perf_counter), ("processor", process_time)):
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side, run in sides.items():
                before = now()
                run()
                seconds[side].append(now() - before)
        ratios = sorted(b / a for a, b in zip(*seconds.values(), strict=True))
        parts = ", ".join(f"{side} {median(own):.3f} s" for side, own in seconds.items())
        print(
            f"{clock:9} {parts}: mechdsl is {median(ratios):.1f} times as fast "
            f"({ratios[0]:.1f} to {ratios[-1]:.1f} in {arguments.rounds} rounds)",
            flush=True,
        )
    return 0 if all(pairs) else 1


@torch.no_grad()
def grown(tokens: int) -> dict[str, float]:
    """Seconds of the file with replies of so many tokens, none of which end before, and MiB above
    the model; in a process that has run nothing else."""
    writer.find_end_tokens = lambda model: frozenset()
    task = Task(tokens)
    Task(2).by_mechdsl()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = perf_counter(), process_time()
    task.by_mechdsl()
    return {
        "tokens": tokens,
        "wall": perf_counter() - start[0],
        "processor": process_time() - start[1],
        "MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def _growth(arguments: argparse.Namespace) -> None:
    """One process for each number of tokens; exponents from one to the next."""
    before: dict[str, float] = {}
    for tokens in arguments.growth:
        command = [sys.executable, "-m", "benchmarks.steering", "--one", str(tokens)]
        command += ["--threads", str(arguments.threads)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        exponents = ""
        if before:
            step = log(found["tokens"] / before["tokens"])
            each = {n: log(found[n] / before[n]) / step for n in ("wall", "processor", "MiB")}
            exponents = "; exponents " + ", ".join(f"{n} {own:.2f}" for n, own in each.items())
        print(
            f"{tokens:5} tokens: {found['wall']:.2f} s, {found['processor']:.2f} s of the processor"
            f", {found['MiB']:.0f} MiB above the model{exponents}",
            flush=True,
        )
        before = found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pass-tokens", type=int, help="of a pass; the default sizes them itself")
    parser.add_argument("--growth", type=int, nargs="+", help="tokens of a reply, ascending")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
