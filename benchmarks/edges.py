"""Scores of all edges and ablated circuits in GPT-2 small's shape, against the passes they need.

    python -m benchmarks.edges [--only eap eap_ig curve] [--prompts 100] [--rounds 3] [--write]

Prompts have 20 tokens, weights are random, and the model has 32,491 edges. Times are processor
seconds of one thread. Each trainer runs in a separate process, whose peak of resident memory
includes libraries and weights. Passes over the bare model and an expert's loop take turns with
mechdsl.

The passes that `eap` needs are a forward pass over the other run, and a forward and a backward pass
over the base run for each step. The expert's loop gives each query, key and value of a head a
separate input; its gradients and the outputs of all senders are multiplied once per layer.

The curve ablates all edges but the largest 20 numbers of edges, evenly spaced on a log scale. Its
bound has a forward pass for each row, with the heads and MLPs on a path of remaining edges from the
embedding to the logits, and for each of their inputs a sum of the remaining edges or of the others.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.bound import SIDE, unpatched
from benchmarks.estimators import write_table
from benchmarks.features import WORDS, Inputs, make_tokenizer
from benchmarks.model import build
from benchmarks.work import Shape

SHAPE, TOKENS, HEADS = Shape(12, 12, 768), 20, 12
STEPS = {"eap": 1, "eap_ig": 5}
BATCH = 8
"""Rows of a pass of mechdsl's trainers by default, and of the loops."""
SIZES = [int(size) for size in np.geomspace(10, 32_000, 20)]
PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- edges: begin -->", "<!-- edges: end -->"
FILE = """mech 1

model m = local("handed over")

{blocks}
circuit c = {circuit}

experiment curve {{
  model m
  prompts {measured}
  from other into clean
  {rule}
  measure logit(answer) - logit(wrong) as delta
  stats bootstrap(100)
}}
"""
BLOCK = """prompts {name} {{
  rows "{name}.jsonl"
  template "{{clean}}"
  answer " {{right}}"
  wrong " {{rival}}"
  corrupt other {{ clean = other }}
}}
"""
OBJECTIVE = "prompts: rows, from: other, maximise: logit(answer) - logit(wrong), validation: 0%"


def write_rows(folder: Path, prompts: int) -> None:
    """Write pairs of prompts of random words: those that are used, and one that is only measured,
    because an experiment can't measure a circuit on the rows of its scores."""
    random = torch.Generator().manual_seed(1)
    drawn = torch.randint(WORDS, (prompts + 1, 2, TOKENS - 1), generator=random).tolist()
    lines = [
        json.dumps(
            {
                "clean": " ".join(f"w{n}" for n in clean),
                "other": " ".join(f"w{n}" for n in other),
                "right": f"w{clean[0]}",
                "rival": f"w{(clean[0] + 1) % WORDS}",
            }
        )
        for clean, other in drawn
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    (folder / "further.jsonl").write_text(lines[-1] + "\n", encoding="utf-8")


def check_file(
    folder: Path, module: Any, circuit: str, rule: str, measured: str = "rows"
) -> tuple[Any, Any]:
    """Return the checked file and the loaded model."""
    from mechdsl.base.text import Source, Span
    from mechdsl.checks.file_check import check_source
    from mechdsl.diagnostics.core import has_errors
    from mechdsl.loading.loader import adopt_model
    from mechdsl.program import spec
    from mechdsl.resolve.types import ModelContext

    loaded, found = adopt_model("m", module, make_tokenizer())
    if loaded is None or loaded.tokenizer is None:
        raise RuntimeError(str(found))
    blocks = "".join(BLOCK.format(name=name) for name in ("rows", "further"))
    text = FILE.format(blocks=blocks, circuit=circuit, rule=rule, measured=measured)
    source = Source(text, folder / "edges.mech")
    said = spec.Model(span=Span(source, 0, 0), name="m", kind="local", path="")
    checked = check_source(source, models={"m": ModelContext(said, loaded.shape, loaded.tokenizer)})
    if has_errors(checked.diagnostics):
        raise RuntimeError(str(checked.diagnostics))
    return checked, loaded


def open_scores(folder: Path, module: Any, trainer: str) -> tuple[Callable[[], Tensor], list[str]]:
    """Return a function that scores all edges, and their names."""
    from mechdsl.execute.mask_training import EffectScoring, open_edges
    from mechdsl.execute.training import VectorCache
    from mechdsl.pipeline.trained_files import fits_of_file
    from mechdsl.program.trainers import EdgeScoreTrainer
    from mechdsl.resolve.sites import label_candidates

    steps = STEPS[trainer]
    call = f"{trainer}(size: 200, steps: {steps})" if steps > 1 else f"{trainer}(size: 200)"
    rule = "ablate all but c at tokens * with other"
    checked, loaded = check_file(folder, module, f"fit({call}, {OBJECTIVE})", rule, "further")
    (declared,) = fits_of_file(checked).values()
    mask: Any = declared.file

    def score() -> Tensor:
        edges = open_edges(mask, declared.objective, loaded, None, VectorCache())  # pyright: ignore[reportArgumentType]
        own = mask.training.trainer_of(EdgeScoreTrainer)
        scoring = EffectScoring(edges, lambda part: edges.score(part, own, steps))
        for _ in scoring.run():
            pass
        return torch.from_numpy(scoring.scores)

    return score, [label_candidates((each,)) for each in mask.candidates]


# --- the bare model -------------------------------------------------------------------------------


def run_forward(module: Any, ids: Tensor) -> None:
    """Run forward passes over prompts."""
    with torch.no_grad():
        for part in ids.split(BATCH):
            module.lm_head(module.transformer(part).last_hidden_state[:, -1])


def run_needed_passes(module: Any, inputs: Inputs, steps: int) -> None:
    """Run the passes that scores need, without reading anything."""
    run_forward(module, inputs.other)
    for _ in range(steps):
        for part in inputs.clean.split(BATCH):
            embedded = module.transformer.wte(part).requires_grad_()
            last = module.transformer(inputs_embeds=embedded).last_hidden_state[:, -1]
            module.lm_head(last)[:, 0].sum().backward()


class ExpertLoop:
    """Edge attribution patching as an expert writes it for GPT-2."""

    def __init__(self, module: Any, inputs: Inputs) -> None:
        self.model, self.inputs = module.transformer, inputs

    def run(self, steps: int) -> dict[str, Tensor]:
        """Return [receiver, sender] mean scores by group of receivers."""
        count = len(self.inputs.clean)
        every = [part.split(BATCH) for part in (self.inputs.clean, self.inputs.other)]
        ends = self.inputs.answers.split(BATCH), self.inputs.wrong.split(BATCH)
        found: dict[str, Tensor] = {}
        for clean, other, answer, wrong in zip(*every, *ends, strict=True):
            with torch.no_grad():
                there = torch.cat(list(self.senders(self.embed(other), {})[0]))
            begin = self.embed(clean)
            changes = there
            for step in range(steps, 0, -1):
                leaves: dict[str, Tensor] = {}
                moved = self.embed(other) + step / steps * (begin - self.embed(other))
                own, last = self.senders(moved, leaves)
                if step == steps:
                    changes = there - torch.cat(list(own)).detach()
                weights = self.model.wte.weight
                value = (last * (weights[answer] - weights[wrong])).sum()
                gradients = torch.autograd.grad(value, list(leaves.values()))
                before = 1
                for name, own in zip(leaves, gradients, strict=True):
                    before = len(changes) if name == "logits" else before + HEADS * ("m" in name)
                    score = own.flatten(1) @ changes[:before].flatten(1).T / (steps * count)
                    found[name] = found[name] + score if name in found else score
                    before += "m" in name
        return found

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.wte(ids) + self.model.wpe.weight[: ids.shape[1]]

    def senders(self, x: Tensor, leaves: dict[str, Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        """Return [sender, row, token, d_model] outputs, and [row, d_model] at the end.

        Args:
            x: [row, token, d_model]
            leaves: Filled with what is added to the inputs of receivers.
        """
        found = [x[None]]
        for number, block in enumerate(self.model.h):
            heads = x.new_zeros(3 * HEADS, *x.shape, requires_grad=True)
            leaves[f"a{number}"] = heads
            given = block.ln_1(x + heads)
            weight = block.attn.c_attn.weight.unflatten(1, (3 * HEADS, -1))
            bias = block.attn.c_attn.bias.unflatten(0, (3 * HEADS, -1))
            units = torch.einsum("hbtd,dhe->hbte", given, weight) + bias[:, None, None]
            q, k, v = units.split(HEADS)
            z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            out = block.attn.c_proj.weight.unflatten(0, (HEADS, -1))
            own = torch.einsum("hbte,hed->hbtd", z, out)
            x = x + own.sum(0) + block.attn.c_proj.bias
            mlp = leaves[f"m{number}"] = x.new_zeros(1, *x.shape, requires_grad=True)
            added = block.mlp(block.ln_2(x + mlp[0]))
            found += [own, added[None]]
            x = x + added
        end = leaves["logits"] = x.new_zeros(1, *x.shape, requires_grad=True)
        return found, self.model.ln_f(x + end[0])[:, -1]


def name_scores(scores: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Yield the scores of the expert's loop by the names of edges."""
    heads = [f"L{n}H{h}" for n in range(SHAPE.layers) for h in range(HEADS)]
    senders = ["embed"]
    for n in range(SHAPE.layers):
        senders += [*heads[n * HEADS : (n + 1) * HEADS], f"L{n}.mlp"]
    for name, table in scores.items():
        receivers = ["logits"]
        if name != "logits":
            n = name[1:]
            receivers = [f"L{n}.mlp"]
            if "a" in name:
                receivers = [f"L{n}H{h}.{site}" for site in "qkv" for h in range(HEADS)]
        for to, row in zip(receivers, table.tolist(), strict=True):
            yield from ((f"{of} -> {to}", own) for of, own in zip(senders, row, strict=False))


# --- the table ------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any]) -> float:
    """Return processor seconds."""
    begin = process_time()
    work()
    return process_time() - begin


def peak() -> float:
    """Return the peak of resident memory, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_scores(folder: Path, trainer: str, rounds: int) -> str:
    """Return the row of a trainer of scores."""
    module, inputs, steps = build(SHAPE), Inputs(folder), STEPS[trainer]
    score, names = open_scores(folder, module, trainer)
    own = score()
    memory = peak()
    taken: list[tuple[float, float, float]] = []
    expert = ExpertLoop(module, inputs)
    known = dict(name_scores(expert.run(steps)))
    expected = torch.tensor([known[name] for name in names])
    for _ in range(rounds):
        mine = seconds(score)
        needed = seconds(lambda: run_needed_passes(module, inputs, steps))
        taken.append((mine, needed, seconds(lambda: expert.run(steps))))
    mine, needed, loop = (median(own) for own in zip(*taken, strict=True))
    ratio, faster = (median(a / b for a, b in own) for own in _ratios(taken))
    difference = float((own - expected).abs().max() / expected.abs().max())
    said = [
        f"`{trainer}`, {steps} step{'s' * (steps > 1)}, {len(inputs.clean)} prompts",
        f"{memory:.1f} GiB", f"{mine:.1f} s", f"{needed:.1f} s", f"{ratio:.2f}",
        f"{loop:.1f} s", f"{faster:.2f}", f"{difference:.0e}",
    ]  # fmt: skip
    return f"| {' | '.join(said)} |"


def _ratios(taken: Sequence[tuple[float, float, float]]) -> Iterator[list[tuple[float, float]]]:
    """Yield (mechdsl, passes) and (loop, mechdsl) of each round."""
    yield [(mine, needed) for mine, needed, _ in taken]
    yield [(loop, mine) for mine, _, loop in taken]


def list_connected(labels: Sequence[str]) -> set[str]:
    """Return the heads and MLPs on a path from the embedding to the logits.

    Args:
        labels: Edges, such as `L0H1 -> L2H3.q`, in any order.
    """
    edges: dict[str, set[str]] = {}
    back: dict[str, set[str]] = {}
    for label in labels:
        of, to = label.split(" -> ")
        edges.setdefault(of, set()).add(name_node(to))
        back.setdefault(name_node(to), set()).add(of)
    return reach("embed", edges) & reach("logits", back) - {"embed", "logits"}


def name_node(receiver: str) -> str:
    """Return the head, MLP or end that a receiver is an input of."""
    return receiver if receiver.endswith(".mlp") else receiver.partition(".")[0]


def reach(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    """Return the nodes that edges lead to."""
    found, due = {start}, [start]
    while due:
        new = edges.get(due.pop(), set()) - found
        found |= new
        due += new
    return found


def count_needed(labels: Sequence[str]) -> int:
    """Count the multiply-adds of a prompt in a circuit."""
    nodes, d, length = list_connected(labels), SHAPE.width, TOKENS
    mlps = sum(name.endswith(".mlp") for name in nodes)
    head = d // HEADS * (4 * d * length + length * (length + 1))
    inputs = Counter[str]()
    for label in labels:
        of, to = label.split(" -> ")
        inputs[to] += of in nodes or of == "embed"
    sums = 0
    for to, kept in inputs.items():
        if to == "logits" or name_node(to) in nodes:
            sums += min(kept, count_before(to) - kept)
    return mlps * 8 * d * d * length + (len(nodes) - mlps) * head + sums * d * length + 2 * d


def count_before(receiver: str) -> int:
    """Count the senders before a receiver, such as `L2H3.q`."""
    if receiver == "logits":
        return 1 + SHAPE.layers * (HEADS + 1)
    layer = int(receiver[1:].partition("." if receiver.endswith(".mlp") else "H")[0])
    return 1 + layer * (HEADS + 1) + HEADS * receiver.endswith(".mlp")


def measure_curve(folder: Path, rounds: int) -> str:
    """Return a sentence about ablated circuits of 20 sizes."""
    from mechdsl.execute.run.panel import execute
    from mechdsl.planner.passes import make_plan
    from mechdsl.resolve.circuits import EdgeGraph
    from mechdsl.resolve.sites import label_candidates
    from mechdsl.resolve.trainings import key_of_candidate
    from mechdsl.results.assembly.collection import check_denominators

    module, inputs = build(SHAPE), Inputs(folder)
    checked, loaded = check_file(
        folder, module, "embed -> logits", "ablate c at tokens * with zero"
    )
    every = EdgeGraph(loaded.shape).every
    scores = np.random.default_rng(0).standard_normal(len(every))
    order: list[int] = np.argsort(-np.abs(scores)).tolist()
    labels = [label_candidates((each,)) for each in every]
    content = {
        "sites": [key_of_candidate(each) for each in every],
        "labels": labels,
        "scores": scores.tolist(),
        "chosen": order[: SIZES[-1]],
    }
    (folder / "mask.json").write_text(json.dumps(content), encoding="utf-8")
    rule = f"for n in {SIZES} {{ ablate all but top n of c at tokens * with other }}"
    checked, loaded = check_file(folder, module, 'saved("mask.json")', rule)

    def run() -> None:
        plan = make_plan(checked.experiments)
        found = execute(plan, {"m": loaded}, check=check_denominators)
        if found.diagnostics:
            raise RuntimeError(str(found.diagnostics))

    a, out = torch.randn(SIDE, SIDE), torch.empty(SIDE, SIDE)
    names = [labels[number] for number in order]
    full = unpatched(SHAPE, TOKENS)
    needed = sum(count_needed(names[:size]) for size in SIZES) + 2 * full
    bound = needed / ((len(SIZES) + 2) * full)
    adds, shares, plain = len(inputs.clean) * needed, list[float](), list[float]()
    for _ in range(rounds):
        rate = SIDE**3 / median(seconds(lambda: torch.mm(a, a, out=out)) for _ in range(3))
        mine = seconds(run)
        shares.append(adds / rate / mine)
        passes = seconds(lambda: run_forward(module, inputs.clean)) * (len(SIZES) + 2)
        plain.append(passes / mine)
    return (
        f"20 circuits on {len(inputs.clean)} prompts: {median(shares):.2f} of the bound, "
        f"{median(shares) / bound:.2f} of forward passes with every head and MLP at the same rate, "
        f"and {median(plain):.2f} of the speed of forward passes of the bare model in batches of "
        f"{BATCH}; peak {peak():.1f} GiB."
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=[*STEPS, "curve"], metavar="NAME")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if len(given.only) == 1:
        with TemporaryDirectory() as made:
            folder, (name,) = Path(made), given.only
            write_rows(folder, given.prompts)
            measured = (
                measure_curve(folder, given.rounds)
                if name == "curve"
                else measure_scores(folder, name, given.rounds)
            )
            print(measured)
        return
    options = ["--prompts", str(given.prompts), "--rounds", str(given.rounds)]
    command = [sys.executable, "-m", "benchmarks.edges", *options, "--only"]
    lines = [subprocess.check_output([*command, each], text=True) for each in given.only]
    head = [
        "scores", "peak memory", "mechdsl", "passes", "mechdsl / passes", "expert's loop",
        "loop / mechdsl", "largest difference",
    ]  # fmt: skip
    text = f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}\n"
    rows = "".join(each for each in lines if each.startswith("|"))
    text += rows + "\n" + "".join(each for each in lines if not each.startswith("|"))
    print(text)
    if given.write:
        write_table(text.strip(), BEGIN, END, PAGE)


if __name__ == "__main__":
    main()
