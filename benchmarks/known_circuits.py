"""Circuits with known edges against what trainers of circuits find: a table of docs/estimators.md.

    python -m benchmarks.known_circuits [MODEL…] [--write]

The weights of three models of 2 layers, 4 heads and 110 edges are set, not trained. Heads and MLPs
outside of the circuit add small random vectors. All norms are identities.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
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

BEGIN, END = "<!-- circuits: begin -->", "<!-- circuits: end -->"
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
    """A model with a known circuit, and its prompts."""

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
    random, known = np.random.default_rng(5), KNOWN[name]
    drawn = {tuple(ids): answer for ids, answer in (known.draw(random) for _ in range(64))}
    words = [" ".join(f"w{n}" for n in ids) for ids in drawn]
    rows = zip(words, drawn.values(), strict=True)
    lines = [json.dumps({"text": text, "target": f"w{answer}"}) for text, answer in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    trained = "prompts: p.train, limit: 24, with: zero, maximise: logprob(answer)"
    text = [
        'mech 1\nmodel m = local("handed over")',
        'prompts p {\n  rows "rows.jsonl"\n  template "{text}"\n  answer " {target}"',
        "  split 50%\n}",
        f"circuit known = {', '.join(known.edges)}",
        *(f"circuit {own} = fit({trainer}, {trained})" for own, trainer in circuits.items()),
        *parts,
    ]
    path = folder / "known.mech"
    path.write_text("\n".join(text) + "\n", "utf-8")
    return path


TRAINERS: Mapping[str, str] = {
    "eap": "eap(size: {size})",
    "eap_ig": "eap_ig(size: {size}, steps: 5)",
    "eap_ig_activations": "eap_ig_activations(size: {size}, steps: 5)",
    **{f"acdc_{n}": f"acdc(threshold: {value})" for n, value in enumerate(THRESHOLDS)},
    **{f"coarse_{n}": f"coarse_to_fine(threshold: {value})" for n, value in enumerate(THRESHOLDS)},
}


@dataclass(frozen=True)
class Recovery:
    """What a trainer finds of a known circuit."""

    trainer: str
    auroc: float
    """Share of pairs of a known and another edge whose scores are in the right order."""
    found: int
    """Known edges in its circuit."""
    others: int
    """Other edges in its circuit."""


def recover(name: str, folder: Path) -> list[Recovery]:
    """Find a known circuit with each trainer."""
    known = {*KNOWN[name].edges}
    calls = {own: call.format(size=len(known)) for own, call in TRAINERS.items()}
    parts = [
        f"experiment e_{own} {{\n  model m\n  observe edge_auroc {own} with known as of_{own}\n}}"
        for own in calls
    ]
    given = {"m": (make_model(name), make_tokenizer())}
    path = write_file(name, folder, calls, *parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mechdsl.MechdslWarning)
        trained = {
            each.basis: each.report for each in mechdsl.fit(path, given, store=folder / "store")
        }
        found = mechdsl.run(path, given, store=folder / "store")
    chosen = {n: {*own.chosen} for n, own in trained.items() if isinstance(own, CircuitReport)}
    ranked = {each.name: float(each.measures[0].patched.mean()) for each in found.experiments}
    return [
        Recovery(call, ranked[f"e_{own}"], len(known & chosen[own]), len(chosen[own] - known))
        for own, call in calls.items()
    ]


def table(found: Mapping[str, Sequence[Recovery]]) -> str:
    """Format the table of the page: a row for each trainer, the models in columns."""
    models = [f"{name}, {len(KNOWN[name].edges)} edges" for name in found]
    head = ["trainer", *models]
    lines = [head, ["---"] * len(head)]
    for number, key in enumerate(TRAINERS):
        own = [each[number] for each in found.values()]
        cells = [f"{each.auroc:.3f} ({each.found} and {each.others})" for each in own]
        lines.append([f"`{TRAINERS[key].format(size='n')}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(KNOWN)}")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args()
    found: dict[str, list[Recovery]] = {}
    for name in given.models or KNOWN:
        with TemporaryDirectory() as folder:
            found[name] = recover(name, Path(folder))
    print(table(found))
    if given.write:
        write_table(table(found), BEGIN, END)


if __name__ == "__main__":
    main()
