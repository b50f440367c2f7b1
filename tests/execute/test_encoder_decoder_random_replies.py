"""Random rules and schedules together in replies of encoder-decoders, against plain hooks on the
bare model: a full pass of one unpadded prompt for each token of a reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from .encoder_decoders import (
    HEADS,
    LAYERS,
    Change,
    Write,
    logits,
    model,
    place,
    read,
    run,
    starts,
    text,
    weights_times,
)
from .support import MODES, ROWS, Array, Record, experiment
from .test_encoder_decoder_blocks import replaced

FAMILIES = [
    f"{each} writing" for each in ("t5", "bart", "t5gemma", "marian", "pegasus", "umt5", "mt5")
]
TOKENS = 5

ENCODER = ("resid_post encoder", "mlp_out encoder", "z encoder", "attn_out encoder", "v encoder")
KEYS = ("k cross", "v cross")
DECODER = (
    "resid_post", "mlp_out", "z", "attn_out", "q", "k", "v", "z cross", "attn_out cross", "q cross",
)  # fmt: skip
SCHEDULES: dict[str, Sequence[int]] = {
    "": range(9),
    " during prefill": [0],
    " during step 1..4": range(1, 5),
    " during step 1..2": [1, 2],
    " during step 2": [2],
    " during step 3..4": [3, 4],
}
POSITIONS: dict[str, Callable[[Record], Sequence[int]]] = {
    "last token": lambda record: [text(record).last],
    "subject tokens": lambda record: text(record).subject,
    "item tokens": lambda record: text(record).items,
}
"""Tokens of the encoder."""


def half(old: Tensor) -> Tensor:
    return torch.full_like(old, 0.5)


def flipped(old: Tensor) -> Tensor:
    return -2 * old


CHANGES: dict[str, Change] = {
    "ablate SITE at AT with zero": torch.zeros_like,
    "scale SITE at AT by -2": flipped,
    "set SITE at AT to 0.5": half,
}
FROM_OTHER = ("patch SITE at AT", "add 2 * value(SITE at AT) of other to SITE at AT")


Edges = tuple[str, int, list[tuple[int, int, int]], float]
"""A stack and a layer, (head, query, key) of edges, and the factor of their weights."""


@dataclass(frozen=True)
class Rule:
    """A line, and what it changes in a pass after some tokens of a reply."""

    line: str
    writes: Callable[[str, Record, int], list[Write]] = lambda family, record, step: []
    edges: Callable[
        [str, Record, int], tuple[str, int, list[tuple[int, int, int]], float] | None
    ] = lambda family, record, step: None
    blocks: tuple[str, dict[int, int | None]] | None = None
    taken: frozenset[tuple[str, int]] = frozenset()
    """Stacks and layers whose attention a further rule can't change."""


def active(family: str, steps: Sequence[int], step: int) -> list[int]:
    """Tokens of the decoder at which a rule acts, in a pass after some tokens."""
    last = len(starts(family)) - 1
    return [last + each for each in range(step + 1) if each in steps]


def of_site(random: Random) -> Rule:
    """A rule at a site."""
    site = random.choice(random.choice((ENCODER, KEYS, DECODER, DECODER)))
    component, _, stack = site.partition(" ")
    layer = random.randrange(2 if stack == "encoder" else LAYERS)
    head = random.randrange(HEADS) if component in "zqkv" else None
    said = f"{site} layer {layer}" + ("" if head is None else f" head {head}")
    rule = random.choice((*CHANGES, *FROM_OTHER))
    encodes = site in ENCODER or site in KEYS
    others = rule in FROM_OTHER
    position = random.choice(list(POSITIONS)) if encodes and not others else "last token"
    schedule = random.choice(["", " during prefill"] if encodes else list(SCHEDULES))
    line = rule.replace("SITE", said).replace("AT", position) + schedule

    def writes(family: str, record: Record, step: int) -> list[Write]:
        own = place(family, site, layer, head)
        if encodes:
            tokens, source = POSITIONS[position](record), text(record, "other").last
        else:
            tokens, source = active(family, SCHEDULES[schedule], step), len(starts(family)) - 1
        if not tokens:
            return []
        if not others:
            return [(own, tokens, CHANGES[rule])]
        vector = read(family, text(record, "other"), own)[[source]]
        if rule.startswith("patch"):
            return [(own, tokens, lambda old: vector.expand_as(old))]
        return [(own, tokens, lambda old: old + 2 * vector)]

    return Rule(line, writes, taken=frozenset([(stack, layer)] if head is not None else []))


def of_step(random: Random) -> Rule:
    """A rule on the difference from the preceding token."""
    site, layer = (
        random.choice(("mlp_out", "resid_post", "attn_out cross")),
        random.randrange(LAYERS),
    )
    schedule = random.choice(list(SCHEDULES))
    line = f"add 2 * step({site.partition(' ')[0]}) to {site} layer {layer} at last token{schedule}"

    def writes(family: str, record: Record, step: int) -> list[Write]:
        tokens = [at for at in active(family, SCHEDULES[schedule], step) if at]
        if not tokens:
            return []
        every = list(range(max(tokens) + 1))

        def change(old: Tensor) -> Tensor:
            new = old.clone()
            for at in tokens:
                new[at] = old[at] + 2 * (old[at] - old[at - 1])
            return new

        return [(place(family, site, layer), every, change)]

    return Rule(line, writes)


def of_edges(random: Random) -> Rule:
    """A rule on attention of one head."""
    stack = random.choice(("encoder", "cross", "cross", ""))
    layer = random.randrange(2 if stack == "encoder" else LAYERS)
    head, factor = random.randrange(HEADS), random.choice((0.0, 5.0))
    schedule = random.choice(["", " during prefill"] if stack == "encoder" else list(SCHEDULES))
    if not stack:  # the only token of a decoder sees only itself
        schedule = random.choice(list(SCHEDULES)[2:])
    keys = random.choice(list(POSITIONS)) if stack else "first token"
    edge = f"attention {stack} layer {layer} head {head} from last token to {keys}"
    edge = " ".join(edge.split())
    line = f"block {edge}{schedule}" if not factor else f"reweight {edge} by 5{schedule}"

    def edges(family: str, record: Record, step: int) -> Edges:
        to = POSITIONS[keys](record) if stack else [0]
        queries = [text(record).last]
        if stack != "encoder":
            queries = active(family, SCHEDULES[schedule], step)
        return stack, layer, [(head, query, key) for query in queries for key in to], factor

    return Rule(line, edges=edges, taken=frozenset([(stack, layer)]))


def of_blocks(random: Random) -> Rule:
    if random.random() < 0.5:
        line = "replace block encoder layer 0 with block encoder layer 1"
        return Rule(line + random.choice(["", " during prefill"]), blocks=("encoder", {0: 1}))
    return Rule("replace block layer 1 with block layer 2", blocks=("decoder", {1: 2}))


def draw(random: Random) -> list[Rule]:
    """One to three rules; attention of a layer is changed once."""
    found: list[Rule] = []
    for _ in range(random.randint(1, 3)):
        made = random.choice((of_site, of_site, of_step, of_edges, of_blocks))(random)
        taken = frozenset[tuple[str, int]]().union(*(rule.taken for rule in found))
        same = made.blocks is not None and any(rule.blocks is not None for rule in found)
        if not (taken & made.taken or same):
            found.append(made)
    return found


def reply(family: str, record: Record, rules: Sequence[Rule]) -> tuple[list[int], list[Array]]:
    """A reply and the logits of its steps; no two of the largest logits are close."""
    ids, found = list[int](), list[Array]()
    for step in range(TOKENS):
        with ExitStack() as stack:
            writes: list[Write] = []
            every = [rule.writes(family, record, step) for rule in rules]
            for rule, own in zip(rules, every, strict=True):
                writes += own
                if rule.blocks is not None:
                    stack.enter_context(replaced(model(family), *rule.blocks))
            for rule in rules:
                changed = rule.edges(family, record, step)
                if changed is not None and changed[2]:
                    of_stack, layer, edges, factor = changed
                    stack.enter_context(weights_times(family, of_stack, layer, edges, factor))
            found.append(logits(family, text(record), writes, ids)[-1])
        ids.append(int(found[-1].argmax()))
        if ids[-1] == model(family).config.eos_token_id:
            return ids[:-1], found
    return ids, found


def entropies(found: Sequence[Array]) -> Array:
    scores = torch.tensor(np.array(found)).log_softmax(-1)
    return -(scores.exp() * scores).sum(-1).numpy()


def check(family: str, seed: int, folder: Path, mode: str, count: int) -> None:
    """Compare the replies and measures of several experiments of one file."""
    random = Random(seed)
    drawn = [draw(random) for _ in range(count)]
    measures = "measure length as raw", "measure entropy at each step as raw"
    lines = ""
    for number, rules in enumerate(drawn):
        source = ["from other into clean"] if any(r.line.startswith("patch") for r in rules) else []
        body = [*source, f"generate {TOKENS}", *(rule.line for rule in rules)]
        lines += experiment(f"l{number}", "prompts p", *body, measures[0])
        lines += experiment(f"e{number}", "prompts p", *body, measures[1])
    found = run(family, lines, folder, MODES[mode])
    for number, rules in enumerate(drawn):
        said = (family, seed, number, [rule.line for rule in rules])
        for column, record in enumerate(ROWS):
            ids, scores = reply(family, record, rules)
            assert list(found[f"l{number}"].replies.cells[0][column][0].ids) == ids, said
            expected = entropies(scores)[: len(ids) or 1]
            own = found[f"e{number}"].measures[0].patched[: len(expected), column]
            np.testing.assert_allclose(own, expected, atol=1e-3, err_msg=str(said))


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_random_rules_in_replies_equal_full_passes(family: str, tmp_path: Path) -> None:
    check(family, FAMILIES.index(family), tmp_path, "planned", 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 37))
def test_many_random_rules_in_replies_equal_full_passes(seed: int, tmp_path: Path) -> None:
    check(FAMILIES[seed % len(FAMILIES)], seed, tmp_path, [*MODES][seed % len(MODES)], 6)
