"""Replies while rules act: 48 cells on 16 prompts, 32 tokens each.

    python -m benchmarks.writing [--shapes counting gpt2 ...] [--trained] [--tokens 32] [--cells 48]
                                 [--threads 1] [--seconds 10] [--ways mechdsl generate nnsight]
                                 [--peers PYTHON]

Shapes are those of the shipped models, and GPT-2 small; weights are random, and prompts are random
tokens. `--trained` takes the weights of shipped models, and prompts that are the first two thirds
of texts that they weren't trained on. A cell scales one head's z at the last token of the prompt
and at each newest token. `generate` is a loop of the library's `model.generate` over cells, all
prompts in one batch, with a hook. `expert` has all cells and prompts as rows of one
`model.generate`. `nnsight` has all cells as invokes of one `model.generate`; it runs in the
interpreter that has it. Each way is a process of its own, which runs for as long as the
others, timed in processor seconds and in wall seconds (the median); tokens are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mechdsl.forward.hooks.model import LoadedModel

ROOT = Path(__file__).parent.parent
PROMPTS, TOKENS = 16, 16
FACTORS = (0.0, 0.5, 1.5, -1.0, 2.0, 0.25)
SHIPPED = {path.parent.name: path for path in sorted((ROOT / "mechdsl/zoo").glob("*/config.json"))}
GPT2 = {"vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
CLOCKS = {"processor": process_time, "wall": perf_counter}
OF_TEXTS: dict[str, dict[str, str]] = {"nested": {"kind": "a clause between"}}
"""What a model's texts are asked for with."""
Replies = list[list[list[int]]]
"""[cell][prompt] tokens."""


class Task:
    """A model, prompts, and what each cell writes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        shape = arguments.shapes[0]
        if (path := SHIPPED.get(shape)) is None:
            self.config = AutoConfig.for_model("gpt2", **GPT2)
        else:
            self.config = AutoConfig.from_pretrained(path)
        self.config.bos_token_id = self.config.eos_token_id = None
        self.config.pad_token_id = 0
        random = torch.Generator().manual_seed(0)
        if arguments.trained and path is not None:
            of = AutoModelForCausalLM.from_pretrained
            self.model: Any = of(path.parent, config=self.config, dtype=torch.float32).eval()
            self.prompts = _texts(shape, path.parent)
        else:
            found = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
            self.model = found.eval()
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
                if parameter.dim() >= 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=random))
                    parameter.mul_(1.5 / self.config.hidden_size**0.5)
            size = PROMPTS, TOKENS
            self.prompts = torch.randint(3, self.config.vocab_size, size, generator=random).tolist()
        self.tokens, self.cells = arguments.tokens, arguments.cells
        self.arrange()

    def arrange(self) -> None:
        """Set what follows from the model and its prompts."""
        self.model.generation_config.eos_token_id = None
        self.heads = self.config.num_attention_heads
        self.layers = self.config.num_hidden_layers
        self.width = self.config.hidden_size // self.heads
        self.longest = max(map(len, self.prompts))
        padded = [[0] * (self.longest - len(ids)) + ids for ids in self.prompts]
        self.ids = torch.tensor(padded)
        own = torch.tensor([len(ids) for ids in self.prompts])
        self.mask = (torch.arange(self.longest) >= self.longest - own[:, None]).long()

    def place(self, cell: int) -> tuple[int, int]:
        """(layer, head)"""
        return cell % self.layers, cell // self.layers % self.heads

    def factor(self, cell: int) -> float:
        """What z is scaled with."""
        return FACTORS[cell // (self.layers * self.heads) % len(FACTORS)]

    def output(self, layer: int) -> nn.Module:
        """The linear map that z goes into."""
        if hasattr(self.model, "transformer"):
            return self.model.transformer.h[layer].attn.c_proj
        return self.model.model.layers[layer].self_attn.o_proj

    def span(self, head: int) -> slice:
        """Features of a head."""
        return slice(head * self.width, (head + 1) * self.width)

    def settings(self) -> dict[str, Any]:
        """Of `model.generate`."""
        return {"max_new_tokens": self.tokens, "do_sample": False, "pad_token_id": 0}


def _texts(name: str, folder: Path) -> list[list[int]]:
    """Token ids of the first two thirds of texts that a shipped model wasn't trained on."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stream = import_module(f"zoo.{name}.data").stream
    texts = stream(5, held_out=True, **OF_TEXTS.get(name, {}))
    every = [tokenizer.encode(each.text).ids for each in islice(texts, PROMPTS)]
    return [ids[: max(4, 2 * len(ids) // 3)] for ids in every]


def multiply_adds(task: Task, replies: Replies) -> float:
    """What can't be avoided: prompts but for their last token once; of that token, and of each of
    the reply but the last, what stands in front of all that acts on it once for all cells that have
    written the same so far. A cell acts on z, behind the attention of its block."""
    unembedding = task.model.get_output_embeddings().weight.numel()
    block = next(
        part
        for part in task.model.modules()
        if isinstance(part, nn.ModuleList) and len(part) == task.layers
    )[0]
    maps = {name: each.numel() for name, each in block.named_parameters() if each.dim() == 2}
    before = sum(count for name, count in maps.items() if _makes_queries(name))
    behind = sum(maps.values()) - before

    def attention(keys: int) -> float:
        return before + 2 * task.config.hidden_size * keys

    total = 0.0
    for prompt, ids in enumerate(task.prompts):
        total += task.layers * sum(attention(keys) + behind for keys in range(1, len(ids)))
        for step in range(task.tokens):
            so_far = [tuple(replies[cell][prompt][:step]) for cell in range(task.cells)]

            def apart(layer: int, so_far: Sequence[tuple[int, ...]] = so_far) -> int:
                """Distinct rows, where cells that act below a layer have one of their own."""
                return len(
                    {
                        (text, cell if task.place(cell)[0] < layer else -1)
                        for cell, text in enumerate(so_far)
                    }
                )

            for layer in range(task.layers):
                total += apart(layer) * attention(len(ids) + step) + apart(layer + 1) * behind
        total += task.cells * task.tokens * unembedding
    return total


def _makes_queries(name: str) -> bool:
    """Whether a linear map makes queries, keys or values."""
    return any(part in name.split(".") for part in ("q_proj", "k_proj", "v_proj", "c_attn"))


def adopted(task: Task) -> LoadedModel:
    """The model as mechdsl takes it over."""
    from tokenizers import Tokenizer, models

    from mechdsl.loading.loader import adopt_model

    words = {f"w{n}": n for n in range(task.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    model, found = adopt_model("m", task.model, tokenizer)
    assert model is not None, found
    return model


def by_mechdsl(task: Task, model: LoadedModel | None = None) -> Callable[[], Replies]:
    """All cells and prompts as rows of one call."""
    from mechdsl.forward.generation.cached_pass import choose_method
    from mechdsl.forward.generation.decoding import Decoding
    from mechdsl.forward.generation.replies import generate_replies
    from mechdsl.forward.generation.rules import StepRules
    from mechdsl.forward.hooks.batch import RuleWrites, SiteWrite

    model = model or adopted(task)
    assert choose_method(model).kind == "cached"
    writes: list[SiteWrite] = []
    for cell in range(task.cells):
        layer, head = task.place(cell)
        rows = torch.arange(cell * PROMPTS, (cell + 1) * PROMPTS)
        last = torch.tensor([len(ids) - 1 for ids in task.prompts])
        heads, factors = torch.full((PROMPTS,), head), torch.full((PROMPTS, 1), task.factor(cell))
        writes.append(SiteWrite("z", layer, rows, last, heads, factors, "scale"))
    prompts = [tuple(ids) for ids in task.prompts] * task.cells
    decoding = Decoding(task.tokens, lambda ids: "")

    def run() -> Replies:
        steps = [StepRules(1, writes=[write]) for write in writes]
        replies = generate_replies(
            model, prompts, decoding, prefill=RuleWrites(writes), steps=steps
        )
        every = [list(reply.ids) for reply in replies]
        return [every[n : n + PROMPTS] for n in range(0, len(every), PROMPTS)]

    return run


def by_generate(task: Task) -> Callable[[], Replies]:
    """A loop over cells."""

    def cell(number: int) -> list[list[int]]:
        layer, head = task.place(number)

        def write(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            changed = args[0].clone()
            changed[:, -1, task.span(head)] *= task.factor(number)
            return (changed,)

        handle = task.output(layer).register_forward_pre_hook(write)
        try:
            found = task.model.generate(task.ids, attention_mask=task.mask, **task.settings())
        finally:
            handle.remove()
        return found[:, task.longest :].tolist()

    return lambda: [cell(number) for number in range(task.cells)]


def by_expert(task: Task) -> Callable[[], Replies]:
    """All cells and prompts as rows of one `model.generate`."""
    device = task.ids.device
    ids, mask = (each.repeat(task.cells, 1) for each in (task.ids, task.mask))
    hidden = task.heads * task.width
    scales: dict[int, Tensor] = {}
    """By layer, [row, feature]."""
    for cell in range(task.cells):
        layer, head = task.place(cell)
        scale = scales.setdefault(layer, torch.ones(len(ids), hidden, dtype=task.model.dtype))
        scale[cell * PROMPTS : (cell + 1) * PROMPTS, task.span(head)] = task.factor(cell)

    def write(scale: Tensor, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        changed = args[0].clone()
        changed[:, -1] *= scale
        return (changed,)

    def run() -> Replies:
        handles = [
            task.output(layer).register_forward_pre_hook(partial(write, scale.to(device)))
            for layer, scale in scales.items()
        ]
        try:
            found = task.model.generate(ids, attention_mask=mask, **task.settings())
        finally:
            for handle in handles:
                handle.remove()
        return found[:, task.longest :].unflatten(0, (task.cells, PROMPTS)).tolist()

    return run


def by_nnsight(task: Task) -> Callable[[], Replies]:
    """All cells as invokes of one trace."""
    from nnsight.modeling.transformers import TransformersModel
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(task.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    )
    tokenizer.pad_token_id = 0
    model: Any = TransformersModel(task.model, task="text-generation", tokenizer=tokenizer)
    if hasattr(task.model, "transformer"):
        outputs = [block.attn.c_proj for block in model.transformer.h]
    else:
        outputs = [block.self_attn.o_proj for block in model.model.layers]

    def run() -> Replies:
        with model.generate(**task.settings()) as tracer:
            for cell in range(task.cells):
                with tracer.invoke({"input_ids": task.ids, "attention_mask": task.mask}):
                    layer, head = task.place(cell)
                    for _ in tracer.iter[: task.tokens]:
                        outputs[layer].input[:, -1, task.span(head)] *= task.factor(cell)
            with tracer.invoke():
                found = tracer.result.save()
        every = found[:, task.longest :].tolist()
        return [every[n : n + PROMPTS] for n in range(0, len(every), PROMPTS)]

    return run


WAYS: dict[str, Callable[[Task], Callable[[], Replies]]] = {
    "mechdsl": by_mechdsl,
    "generate": by_generate,
    "expert": by_expert,
    "nnsight": by_nnsight,
}


def main() -> None:
    """Time what the command line asks for, each way in a process of its own."""
    arguments = _arguments()
    if arguments.one:
        print(json.dumps(_timed(arguments)))
        return
    for shape in arguments.shapes:
        found = {way: _process(way, shape, arguments) for way in arguments.ways}
        mine = found.get("mechdsl")
        for way, result in found.items():
            print(f"{shape:9} {way:9} {_line(result)}{_against(mine, result, way)}", flush=True)


def _line(result: dict[str, Any]) -> str:
    """Seconds, and what of them the bound is."""
    parts: list[str] = []
    for clock, seconds in result["seconds"].items():
        bound = result["multiply_adds"] / result["rates"][clock]
        parts.append(
            f"{seconds:7.2f} s {clock}, {bound / seconds:.2f} of the bound ({bound:.2f} s)"
        )
    return "   ".join(parts)


def _against(mine: dict[str, Any] | None, result: dict[str, Any], way: str) -> str:
    """How much faster mechdsl is, and how many replies are equal."""
    if mine is None or way == "mechdsl":
        return ""
    times = [result["seconds"][clock] / mine["seconds"][clock] for clock in CLOCKS]
    pairs = [
        a == b
        for own, other in zip(mine["replies"], result["replies"], strict=True)
        for a, b in zip(own, other, strict=True)
    ]
    ratios = " and ".join(f"{each:.1f}" for each in times)
    return f"   mechdsl is {ratios} times faster; {sum(pairs)} of {len(pairs)} replies are equal"


def _process(way: str, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    python = arguments.peers if way == "nnsight" else sys.executable
    command = [str(python), "-m", "benchmarks.writing", "--one", "--ways", way, "--shapes", shape]
    for name in ("tokens", "cells", "threads", "repeats", "seconds"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--trained"] * arguments.trained
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def _timed(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    task = Task(arguments)
    run = WAYS[arguments.ways[0]](task)
    times: list[list[float]] = []
    replies, start = run(), perf_counter()  # the first one warms up
    while len(times) < arguments.repeats or perf_counter() - start < arguments.seconds:
        before = [clock() for clock in CLOCKS.values()]
        replies = run()
        times.append([clock() - b for clock, b in zip(CLOCKS.values(), before, strict=True)])
    return {
        "seconds": dict(zip(CLOCKS, map(median, zip(*times, strict=True)), strict=True)),
        "replies": replies,
        "multiply_adds": multiply_adds(task, replies),
        "rates": _rates(),
    }


def _rates(side: int = 2048, repeats: int = 5) -> dict[str, float]:
    """Multiply-adds in a second of a large product, by each clock."""
    a, out = torch.randn(side, side), torch.empty(side, side)
    torch.mm(a, a, out=out)
    before = {name: clock() for name, clock in CLOCKS.items()}
    for _ in range(repeats):
        torch.mm(a, a, out=out)
    return {name: repeats * side**3 / (CLOCKS[name]() - b) for name, b in before.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    shapes = [*SHIPPED, "gpt2"]
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=["counting"])
    parser.add_argument("--trained", action="store_true", help="weights and texts of the models")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--cells", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="at least so many")
    parser.add_argument("--seconds", type=float, default=10, help="for at least so long")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["mechdsl", "generate"])
    peers = ROOT / ".venv-bench" / "bin" / "python"
    parser.add_argument("--peers", type=Path, default=peers, help="where nnsight is installed")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks."""


if __name__ == "__main__":
    main()
