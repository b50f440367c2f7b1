"""Circuits with known edges and nodes against what trainers of circuits, estimators and patching
find: two tables of docs/estimators.md.

    python -m benchmarks.known_circuits [MODEL…] [--write]

The weights of three models of 2 layers, 4 heads and 110 edges are set, not trained. Heads and MLPs
outside of the circuit add small random vectors. All norms are identities. The fourth model is
trained: `zoo("induction")`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mechdsl
from benchmarks.estimators import PAGE, write_table
from mechdsl.fits.reports import CircuitReport
from mechdsl.results.experiment_result import ExperimentResult

BEGIN, END = "<!-- circuits: begin -->", "<!-- circuits: end -->"
NODES_BEGIN, NODES_END = "<!-- nodes: begin -->", "<!-- nodes: end -->"
SIZE, SPACES, HEADS, LAYERS = 16, 5, 4, 2
"""Tokens and positions, spaces of the stream, heads and layers."""
TOKEN, POSITION, MIDDLE, TARGET, OUTPUT = (slice(SIZE * n, SIZE * (n + 1)) for n in range(SPACES))
WIDTH, HEAD = SIZE * SPACES, SIZE * SPACES // HEADS
SPECIAL = ("<pad>", "<s>", "<unk>")
MARK, FIRST = SIZE - 1, SIZE - 2
"""Tokens with a function: the end of a list, and its begin."""
NOISE = 0.003
"""Size of the random weights."""
THRESHOLDS = (0.05, 0.1, 0.2, 0.5)
"""Thresholds of searches, in nats: a decade."""


@dataclass(frozen=True)
class KnownCircuit:
    """A model whose weights are set, with a known circuit, and its prompts."""

    edges: tuple[str, ...]
    set_weights: Callable[[Any], None]
    draw: Callable[[np.random.Generator], tuple[list[int], int]]
    """Draw the tokens of a prompt, and its answer."""


def head_weights(block: Any, head: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return [d, HEAD] weights of queries, keys and values, [HEAD, d] of the output, and the
    [HEAD] bias of queries, as views."""
    columns = [slice(WIDTH * n + HEAD * head, WIDTH * n + HEAD * (head + 1)) for n in range(3)]
    weight = block.attn.c_attn.weight.data
    own = {name: weight[:, each] for name, each in zip("qkv", columns, strict=True)}
    output = block.attn.c_proj.weight.data[HEAD * head : HEAD * (head + 1)]
    return own, output, block.attn.c_attn.bias.data[columns[0]]


def link(weight: Tensor, rows: slice, scale: float = 1.0, shift: int = 0) -> None:
    """Copy a space of the stream to the coordinates of a head, moved by a shift."""
    weight[rows, :SIZE] += scale * torch.eye(SIZE).roll(shift, dims=1)


def write(output: Tensor, columns: slice) -> None:
    """Copy the coordinates of a head to a space of the stream."""
    output[:SIZE, columns] += torch.eye(SIZE)


SHARP = 7.0
"""Size of queries and of keys; a score of attention is 49 divided by the root of 20."""


def set_induction(model: Any) -> None:
    """Set head 0.0 to read the previous token, and head 1.0 the token after an equal one."""
    own, output, _ = head_weights(model.transformer.h[0], 0)
    link(own["q"], POSITION, SHARP)
    link(own["k"], POSITION, SHARP, shift=1)
    link(own["v"], TOKEN)
    write(output, MIDDLE)
    own, output, _ = head_weights(model.transformer.h[1], 0)
    link(own["q"], TOKEN, SHARP)
    link(own["k"], MIDDLE, SHARP)
    link(own["v"], TOKEN)
    write(output, OUTPUT)


def set_reverser(model: Any) -> None:
    """Set head 0.0 to find the mark, MLP 0 to compute the position of the answer, and head 1.0 to
    read it."""
    own, output, bias = head_weights(model.transformer.h[0], 0)
    bias[0] += SHARP
    own["k"][TOKEN.start + MARK, 0] += SHARP
    link(own["v"], POSITION)
    write(output, MIDDLE)
    mlp = model.transformer.h[0].mlp
    pairs = [(end, place) for end in range(4, 8) for place in range(end, 2 * end - 1)]
    for neuron, (end, place) in enumerate(pairs):
        mlp.c_fc.weight.data[MIDDLE.start + end, neuron] += 2
        mlp.c_fc.weight.data[POSITION.start + place, neuron] += 2
        mlp.c_fc.bias.data[neuron] += -3
        mlp.c_proj.weight.data[neuron, TARGET.start + 2 * end - 1 - place] += 1
    own, output, _ = head_weights(model.transformer.h[1], 0)
    link(own["q"], TARGET, SHARP)
    link(own["k"], POSITION, SHARP)
    link(own["v"], TOKEN)
    write(output, OUTPUT)


def set_counter(model: Any) -> None:
    """Set head 0.0 to attend to one token and the begin of the list, MLP 0 to compute the count,
    and head 1.0 to move it from the mark to the last token."""
    own, output, bias = head_weights(model.transformer.h[0], 0)
    bias[0] += SHARP
    own["k"][TOKEN.start + FIRST, 0] += SHARP
    own["k"][TOKEN.start + COUNTED, 0] += SHARP
    own["v"][TOKEN.start + FIRST, 0] += 1
    write(output, MIDDLE)
    mlp = model.transformer.h[0].mlp
    for count in range(1, 5):  # the share 1 / (1 + count) is above the edge
        edge, slope = (1 / (1 + count) + 1 / (2 + count)) / 2, 100.0
        for side in range(2):
            neuron = 2 * count + side
            mlp.c_fc.weight.data[MIDDLE.start, neuron] += slope
            mlp.c_fc.bias.data[neuron] += -slope * edge + 0.5 - side
            sign = 1 - 2 * side
            mlp.c_proj.weight.data[neuron, TARGET.start + count] += sign
            if count < 4:
                mlp.c_proj.weight.data[neuron, TARGET.start + count + 1] -= sign
    own, output, bias = head_weights(model.transformer.h[1], 0)
    bias[0] += SHARP
    own["k"][TOKEN.start + MARK, 0] += SHARP
    link(own["v"], TARGET, shift=NUMBERS)
    write(output, OUTPUT)


COUNTED, LAST, NUMBERS = 3, 13, 6
"""Tokens of the counter: the counted one, the last of a prompt, and that before the number 1."""
READ = "embed -> L0H0.k", "embed -> L0H0.v"
OUT = "L1H0 -> logits"


def draw_induction(random: np.random.Generator) -> tuple[list[int], int]:
    """Return a list twice, then one of its tokens; the answer follows it in the list."""
    half = (3 + random.permutation(11)[:5]).tolist()
    at = int(random.integers(0, 4))
    return [*half, *half, half[at]], half[at + 1]


def draw_reverser(random: np.random.Generator) -> tuple[list[int], int]:
    """Return a list, the mark and the first tokens of the list in reverse."""
    own = (3 + random.permutation(11)[: random.integers(3, 7)]).tolist()
    done = int(random.integers(0, len(own) - 1))
    back = own[::-1]
    return [*own, MARK, *back[:done]], back[done]


def draw_counter(random: np.random.Generator) -> tuple[list[int], int]:
    """Return the begin, other and counted tokens, the mark and the last token."""
    count = int(random.integers(2, 5))
    own = [*(4 + random.integers(0, 8, 6 - count)).tolist(), *[COUNTED] * count]
    return [FIRST, *own, MARK, LAST], NUMBERS + count


KNOWN: Mapping[str, KnownCircuit] = {
    "induction": KnownCircuit(
        ("embed -> L0H0.q", *READ, "embed -> L1H0.q", "L0H0 -> L1H0.k", "embed -> L1H0.v", OUT),
        set_induction,
        draw_induction,
    ),
    "reverser": KnownCircuit(
        (
            *READ,
            "embed -> L0.mlp",
            "L0H0 -> L0.mlp",
            "L0.mlp -> L1H0.q",
            "embed -> L1H0.k",
            "embed -> L1H0.v",
            OUT,
        ),
        set_reverser,
        draw_reverser,
    ),
    "counter": KnownCircuit(
        (*READ, "L0H0 -> L0.mlp", "L0.mlp -> L1H0.v", "embed -> L1H0.k", OUT),
        set_counter,
        draw_counter,
    ),
}


TRAINED = "trained induction"
"""The trained model: its heads attend to the previous token and to the token after an equal one."""
TRAINED_EDGES = (
    *(f"embed -> L0H2.{letter}" for letter in "qkv"),
    *("embed -> L1H1.q", "L0H2 -> L1H1.k", "embed -> L1H1.v", "L1H1 -> logits"),
)
TRAINED_PROMPTS = """mech 1
model m = zoo("induction")
prompts p {
  word in words(m)
  half = list(word, 8, sep: " ", distinct: true)
  template "{half} {again = half} {cue = half[1]}"
  answer " {half[2]}"
  split 60%
}"""
EDGES: Mapping[str, tuple[str, ...]] = {
    **{name: each.edges for name, each in KNOWN.items()},
    TRAINED: TRAINED_EDGES,
}
"""Model → its known edges."""


def make_model(name: str) -> Any:
    """Return a model with a known circuit."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=SIZE, n_positions=SIZE, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        activation_function="relu", tie_word_embeddings=False, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(NOISE * torch.randn(parameter.shape, generator=random))
        for block in model.transformer.h:
            block.ln_1 = block.ln_2 = nn.Identity()
        setattr(model.transformer, "ln_f", nn.Identity())  # noqa: B010  # typed as a LayerNorm
        embedding, places = model.transformer.wte.weight, model.transformer.wpe.weight
        embedding.zero_()[:, TOKEN] = torch.eye(SIZE)
        places.zero_()[:, POSITION] = torch.eye(SIZE)
        model.lm_head.weight.zero_()[:, OUTPUT] = 8 * torch.eye(SIZE)
        KNOWN[name].set_weights(model)
    return model


def make_tokenizer() -> Any:
    """Return a tokenizer with one token for each word, and `<s>` before each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{n}" for n in range(len(SPECIAL), SIZE))]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    single, special = "<s> $A", [("<s>", 1)]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )


def write_file(name: str, folder: Path, circuits: Mapping[str, str], *parts: str) -> Path:
    """Write the rows of a model and a file with its known circuit.

    Args:
        circuits: Name → trainer, such as `acdc(threshold: 0.1)`.
        parts: Further lines.
    """
    prompts = TRAINED_PROMPTS if name == TRAINED else _write_rows(name, folder)
    trained = f"prompts: p.train, limit: {ROWS}, {fill(name, ': ')}, maximise: {MEASURE}"
    text = [
        prompts,
        f"circuit known = {', '.join(EDGES[name])}",
        *(f"circuit {own} = fit({trainer}, {trained})" for own, trainer in circuits.items()),
        *parts,
    ]
    path = folder / "known.mech"
    path.write_text("\n".join(text) + "\n", "utf-8")
    return path


def fill(name: str, between: str = " ") -> str:
    """Return the fill of a model: `with zero`, and the mean for a trained one."""
    return f"with{between}{'mean' if name == TRAINED else 'zero'}"


def _write_rows(name: str, folder: Path) -> str:
    """Write the rows of a model, and return its prompts."""
    random, known = np.random.default_rng(5), KNOWN[name]
    drawn = {tuple(ids): answer for ids, answer in (known.draw(random) for _ in range(64))}
    words = [" ".join(f"w{n}" for n in ids) for ids in drawn]
    rows = zip(words, drawn.values(), strict=True)
    lines = [json.dumps({"text": text, "target": f"w{answer}"}) for text, answer in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return (
        'mech 1\nmodel m = local("handed over")\n'
        'prompts p {\n  rows "rows.jsonl"\n  template "{text}"\n  answer " {target}"\n'
        "  split 50%\n}"
    )


ROWS = 24
MEASURE = "logprob(answer)"
TRAINERS: Mapping[str, str] = {
    "eap": "eap(size: {size})",
    "eap_ig": "eap_ig(size: {size}, steps: 5)",
    "eap_ig_activations": "eap_ig_activations(size: {size}, steps: 5)",
    "relp": "relp(size: {size})",
    "gim": "gim(size: {size})",
    "atp_qk": "atp_qk(size: {size})",
    "atp_star": "atp_star(size: {size})",
    "cdt": "cdt(size: {size})",
    **{f"acdc_{n}": f"acdc(threshold: {value})" for n, value in enumerate(THRESHOLDS)},
    **{f"coarse_{n}": f"coarse_to_fine(threshold: {value})" for n, value in enumerate(THRESHOLDS)},
}


@dataclass(frozen=True)
class Recovery:
    """What a method finds of a known circuit."""

    method: str
    auroc: float
    """Share of pairs of a known and another edge or node whose scores are in the right order."""
    found: int
    """Known edges or nodes that it finds."""
    others: int
    """Others that it finds."""


def recover(name: str, folder: Path) -> list[Recovery]:
    """Find a known circuit with each trainer, and by patching one edge at a time."""
    known = {*EDGES[name]}
    calls = {own: call.format(size=len(known)) for own, call in TRAINERS.items()}
    parts = [
        f"experiment e_{own} {{\n  model m\n  observe edge_auroc {own} with known as of_{own}\n}}"
        for own in calls
    ]
    every = _edge_names()
    parts += [f"circuit every = {', '.join(every)}", _sweep_of_edges(name)]
    given = models_of(name)
    path = write_file(name, folder, calls, *parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mechdsl.MechdslWarning)
        trained = {
            each.basis: each.report for each in mechdsl.fit(path, given, store=folder / "store")
        }
        found = mechdsl.run(path, given, store=folder / "store")
    chosen = {n: {*own.chosen} for n, own in trained.items() if isinstance(own, CircuitReport)}
    results = {each.name: each for each in found.experiments}
    sizes = sizes_of(results.pop("patched"))
    ranked = {own: float(each.measures[0].patched.mean()) for own, each in results.items()}
    return [
        *(
            Recovery(
                f"`{call.format(size='n')}`",
                ranked[f"e_{own}"],
                len(known & chosen[own]),
                len(chosen[own] - known),
            )
            for own, call in TRAINERS.items()
        ),
        *(compare_sizes(PATCHED.format(value), sizes, known, value) for value in THRESHOLDS),
    ]


PATCHED = "one edge at a time, above {}"


def models_of(name: str) -> dict[str, Any]:
    """Return the model that Python passes, if the file doesn't name it."""
    return {} if name == TRAINED else {"m": (make_model(name), make_tokenizer())}


def _edge_names() -> list[str]:
    """Return the edges of a model of these sizes, as a file writes them."""
    senders, found = ["embed"], list[str]()
    for layer in range(LAYERS):
        heads = [f"L{layer}H{head}" for head in range(HEADS)]
        inputs = [f"{head}.{letter}" for head in heads for letter in "qkv"]
        found += [f"{of} -> {to}" for of in senders for to in inputs]
        senders += heads
        found += [f"{of} -> L{layer}.mlp" for of in senders]
        senders.append(f"L{layer}.mlp")
    return [*found, *(f"{of} -> logits" for of in senders)]


def _sweep_of_edges(name: str) -> str:
    """Return an experiment in which one edge after another carries the fill."""
    return (
        f"experiment patched {{\n  model m\n  prompts p.train limit {ROWS}\n"
        f"  ablate all but every without each edge at tokens * {fill(name)}\n"
        f"  measure {MEASURE} as delta\n}}"
    )


def sizes_of(result: ExperimentResult) -> dict[str, float]:
    """Return the sizes of mean effects by the edges or sites of their cells."""
    means = np.abs(result.statistics[0].mean)
    where = [str(cell.coords.get("edge", cell.site)) for cell in result.cells]
    return dict(zip(where, np.nan_to_num(means).tolist(), strict=True))


def compare_sizes(
    method: str, sizes: Mapping[str, float], known: Collection[str], least: float | None = None
) -> Recovery:
    """Compare the sizes of effects or scores with the known ones.

    Args:
        least: Those that count as found; None for as many as are known.
    """
    order = sorted(sizes, key=lambda each: -sizes[each])
    found = order[: len(known)] if least is None else [e for e in order if sizes[e] >= least]
    there = np.array([sizes[each] for each in known])[:, None]
    others = np.array([size for each, size in sizes.items() if each not in known])[None]
    auroc = float(((there > others) + (there == others) / 2).mean())
    right = len({*found} & {*known})
    return Recovery(method, auroc, right, len(found) - right)


# --- nodes ----------------------------------------------------------------------------------------

ESTIMATORS = ("atp", "integrated_gradients(steps: 16)", "relp", "gim", "atp_qk", "atp_star", "cdt")
NODE_SITES = ("z", "q", "k", "v", "mlp_out")
NO_ESTIMATE = {"cdt": ("q", "k")}
"""Sites of nodes that an estimator rejects: its row has the other nodes only."""


def known_nodes(name: str) -> set[str]:
    """Return the outputs of the heads and MLPs of a circuit, and the inputs of its heads."""
    ends = {part.split(".")[0] for edge in EDGES[name] for part in edge.split(" -> ")}
    heads = {each for each in ends if "H" in each}
    mlps = {edge.split(" -> ")[1] for edge in EDGES[name] if edge.endswith(".mlp")}
    return {f"{each}.{letter}" for each in heads for letter in "zqkv"} | {
        each.replace(".mlp", ".mlp_out") for each in mlps
    }


def find_nodes(name: str, folder: Path) -> list[Recovery]:
    """Find the nodes of a circuit by patching and by each estimator."""
    uses = {"run": "", **{f"by_{n}": own for n, own in enumerate(ESTIMATORS)}}
    lines = {own: f"\n  using {using}" if using else "" for own, using in uses.items()}
    sites = {
        own: [each for each in NODE_SITES if each not in NO_ESTIMATE.get(using, ())]
        for own, using in uses.items()
    }
    parts = [
        f"experiment {own}_{site} {{\n  model m\n  prompts p.train limit {ROWS}\n"
        f"  ablate {site} layer *{'' if site == 'mlp_out' else ' head *'} at tokens * {fill(name)}"
        f"{lines[own]}\n  measure {MEASURE} as {'raw' if using == 'atp_star' else 'delta'}\n}}"
        for own, using in uses.items()
        for site in sites[own]
    ]
    path = write_file(name, folder, {}, *parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mechdsl.MechdslWarning)
        results = {each.name: each for each in mechdsl.run(path, models_of(name)).experiments}
    sizes: dict[str, dict[str, float]] = {}
    for own in uses:
        each = [sizes_of(results[f"{own}_{site}"]) for site in sites[own]]
        sizes[own] = {label: size for part in each for label, size in part.items()}
    known = known_nodes(name)
    return [
        *(compare_sizes(f"patching, above {t}", sizes["run"], known, t) for t in THRESHOLDS),
        *(_of_estimator(own, sizes[f"by_{n}"], known) for n, own in enumerate(ESTIMATORS)),
    ]


def _of_estimator(own: str, sizes: Mapping[str, float], known: Collection[str]) -> Recovery:
    """Compare estimates with the known nodes of the sites that the estimator accepts."""
    there = [each for each in known if each in sizes]
    note = f", without {' and '.join(NO_ESTIMATE[own])}" if own in NO_ESTIMATE else ""
    return compare_sizes(f"`{own}`{note}", sizes, there)


def table(found: Mapping[str, Sequence[Recovery]], known: Mapping[str, int], what: str) -> str:
    """Format a table of the page: a row for each method, the models in columns.

    Args:
        known: Model → the number of known edges or nodes.
        what: `edges` or `nodes`.
    """
    head = ["method", *(f"{name}, {known[name]} {what}" for name in found)]
    lines = [head, ["---"] * len(head)]
    for each in zip(*found.values(), strict=True):
        cells = [f"{own.auroc:.3f} ({own.found} and {own.others})" for own in each]
        lines.append([each[0].method, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(EDGES)}")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args()
    edges: dict[str, list[Recovery]] = {}
    nodes: dict[str, list[Recovery]] = {}
    for name in given.models or EDGES:
        with TemporaryDirectory() as folder:
            edges[name] = recover(name, Path(folder))
            nodes[name] = find_nodes(name, Path(folder))
    of_edges = table(edges, {name: len(EDGES[name]) for name in edges}, "edges")
    of_nodes = table(nodes, {name: len(known_nodes(name)) for name in nodes}, "nodes")
    print(of_edges, of_nodes, sep="\n\n")
    if given.write:
        write_table(of_edges, BEGIN, END)
        write_table(of_nodes, NODES_BEGIN, NODES_END)


if __name__ == "__main__":
    main()
