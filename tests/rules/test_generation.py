"""Rules during generation, against a loop of full forward passes over one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, token
from ..quick import in_turn
from ..reference.forward import Changes, Edge, Write, forward
from .models import double
from .support import codes, experiment, plain, rows, run_file, tokens

slow = pytest.mark.slow
FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2")
TOKENS = 5
LAST, CUE = "last token", "cue token"
Act = Callable[[str, int, int], Changes]
"""From a family, a prompt's number and a position: the changes at that position."""


@dataclass(frozen=True)
class Case:
    """A rule, and its changes at a token of the prompt and at the newest token."""

    rule: str
    at: str
    act: Act
    first: int = 0
    last: int = TOKENS - 1
    follows: bool = True


def zero(site: str, layer: int, unit: int | None = None) -> Act:
    return lambda name, n, at: ([Write(site, layer, torch.tensor(0.0), at, unit)], [])


def scaled(site: str, layer: int, by: float, unit: int | None = None) -> Act:
    return lambda name, n, at: ([Write(site, layer, lambda x: x * by, at, unit)], [])


def left_out(layer: int) -> Act:
    """The block adds nothing to the stream."""
    sites = ("attn_out", "mlp_out")
    return lambda name, n, at: (
        [Write(site, layer, torch.tensor(0.0), at) for site in sites],
        [],
    )


def longer(site: str, layer: int, where: str) -> Act:
    """The vector of the run `longer`, for any written position."""

    def act(name: str, n: int, at: int) -> Changes:
        text = rows("longer")[n]
        vector = plain(name, text)[site, layer][tokens(text, where)[0]]
        return [Write(site, layer, vector, at)], []

    return act


def mean(site: str, layer: int, where: str) -> Act:
    """The mean over the prompts, for any written position."""

    def act(name: str, n: int, at: int) -> Changes:
        every = [plain(name, text)[site, layer][tokens(text, where)[0]] for text in rows()]
        return [Write(site, layer, torch.stack(every).mean(0), at)], []

    return act


def steered(layer: int) -> Act:
    def act(name: str, n: int, at: int) -> Changes:
        head = double(name).get_output_embeddings().weight.detach()
        vector = 2.5 * (head[token("w3")] - head[token("w9")])
        return [Write("resid_post", layer, lambda x: x + vector, at)], []

    return act


def without(layer: int) -> Act:
    """Without the component along the direction."""

    def act(name: str, n: int, at: int) -> Changes:
        head = double(name).get_output_embeddings().weight.detach()
        unit = head[token("w3")] - head[token("w9")]
        unit = unit / unit.norm()

        def change(x: Tensor) -> Tensor:
            return x - (x @ unit)[..., None] * unit

        return [Write("resid_post", layer, change, at)], []

    return act


Kind = Literal["block", "reweight", "uniform", "set"]


def edge(
    kind: Kind,
    keys: Callable[[int, int], Sequence[int]],
    amount: float = 0.0,
    heads: Sequence[int] | None = None,
) -> Act:
    """keys: from a prompt's number and the query."""

    def act(name: str, n: int, at: int) -> Changes:
        return [], [Edge(kind, 1, [at], keys(n, at), amount, heads)]

    return act


def to_cue(n: int, at: int) -> list[int]:
    return tokens(rows()[n], CUE)


CASES = {
    "zero": Case(f"ablate resid_pre layer 1 at {LAST} with zero", LAST, zero("resid_pre", 1)),
    "prefill": Case(
        f"ablate resid_pre layer 1 at {LAST} with zero during prefill",
        *(LAST, zero("resid_pre", 1), 0, 0),
    ),
    "range": Case(
        f"ablate resid_pre layer 1 at {LAST} with zero during step 2..3",
        *(LAST, zero("resid_pre", 1), 2, 3),
    ),
    "late": Case(
        f"patch resid_post layer 1 at {LAST} during step 1",
        *(LAST, longer("resid_post", 1, LAST), 1, 1),
    ),
    "patch": Case(f"patch mlp_out layer 1 at {LAST}", LAST, longer("mlp_out", 1, LAST)),
    "prompt": Case(
        f"patch resid_post layer 0 at {CUE}", CUE, longer("resid_post", 0, CUE), follows=False
    ),
    "head": Case(f"scale z layer 1 head 2 at {LAST} by -3", LAST, scaled("z", 1, -3.0, 2)),
    "key": Case(f"scale k layer 1 head 0 at {LAST} by 3", LAST, scaled("k", 1, 3.0, 0)),
    "neuron": Case(
        f"scale mlp_hidden layer 0 neuron 3 at {LAST} by 40", LAST, scaled("mlp_hidden", 0, 40.0, 3)
    ),
    "mean": Case(
        f"ablate resid_post layer 1 at {LAST} with mean", LAST, mean("resid_post", 1, LAST)
    ),
    "every": Case("ablate mlp_out layer 1 at tokens * with zero", "tokens *", zero("mlp_out", 1)),
    "every in range": Case(
        "ablate mlp_out layer 0 at tokens * with zero during step 1..2",
        *("tokens *", zero("mlp_out", 0), 1, 2),
    ),
    "add": Case(f"add 2.5 * u to resid_post layer 1 at {LAST}", LAST, steered(1)),
    "project": Case("project out u from resid_post layer 0 at tokens *", "tokens *", without(0)),
    "block": Case(f"block attention layer 1 from {LAST} to {CUE}", LAST, edge("block", to_cue)),
    "block later": Case(
        f"block attention layer 1 from {LAST} to {CUE} during step 1..4",
        *(LAST, edge("block", to_cue), 1, 4),
    ),
    "block itself": Case(
        f"block attention layer 1 from {LAST} to {LAST}", LAST, edge("block", lambda n, at: [at])
    ),
    "reweight": Case(
        f"reweight attention layer 1 from {LAST} to {CUE} by 20",
        *(LAST, edge("reweight", to_cue, 20.0)),
    ),
    "joined queries": Case(
        f"reweight attention layer 1 from {{{LAST}, {CUE}}} to {LAST} by 50",
        *(f"{{{LAST}, {CUE}}}", edge("reweight", lambda n, at: [max(at, rows()[n].last)], 50.0)),
    ),
    "a block less": Case("replace block layer 1 with identity", "tokens *", left_out(1)),
    "set": Case(
        f"set attention layer 1 from {LAST} to {CUE} to 0.7", LAST, edge("set", to_cue, 0.7)
    ),
    "uniform": Case(
        f"set attention layer 1 from {LAST} to tokens * to uniform",
        *(LAST, edge("uniform", lambda n, at: range(at + 1))),
    ),
}
BOTH = ("every", "add", "block")
"""Cases that act together."""


def written(name: str, n: int, cases: Sequence[Case], count: int = TOKENS) -> list[int]:
    """The reply to a prompt, with a full forward pass per token; no two top logits are close."""
    text, reply = rows()[n], list[int]()
    for step in range(count):
        writes: list[Write] = []
        edges: list[Edge] = []
        for case in cases:
            spots = tokens(text, case.at) if case.first == 0 else []
            if case.follows:
                spots += [text.last + s for s in range(1, step + 1) if case.first <= s <= case.last]
            for at in spots:
                own = case.act(name, n, at)
                writes += own[0]
                edges += own[1]
        logits = forward(name, double(name), [*text.ids, *reply], writes, edges).logits[-1]
        best, second = logits.topk(2).values.tolist()
        assert best - second > (1e-4 if name == "gemma2" else 1e-8)
        reply.append(int(logits.argmax()))
    return reply


@cache
def found(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    text = 'direction u = unembedding(" w3", " w9")\n'
    for key, case in CASES.items():
        source = ("from longer into clean",) if case.rule.startswith("patch") else ()
        lines = (*source, case.rule, f"generate {TOKENS}")
        text += experiment(f"e_{key.replace(' ', '_')}", *lines, measure="measure length as raw")
    rules = [CASES[key].rule for key in BOTH]
    text += experiment("both", *rules, f"generate {TOKENS}", measure="measure length as raw")
    return run_file(text, data, name, mode, precise=name != "gemma2")


def replies(result: ExperimentResult, cell: int = 0) -> list[list[int]]:
    return [list(own[0].ids) for _, own in sorted(result.replies.cells[cell].items())]


@pytest.mark.parametrize(("mode", "name"), in_turn(list(MODES), FAMILIES, list(MODES)[:2]))
def test_rules_during_generation_equal_full_forward_passes(
    data: Path, name: str, mode: str
) -> None:
    seen = found(data, name, mode)
    count, changed = len(rows()), set[str]()
    base = [written(name, n, []) for n in range(count)]
    for key, case in CASES.items():
        result = seen[f"e_{key.replace(' ', '_')}"]
        wanted = [written(name, n, [case]) for n in range(count)]
        assert replies(result) == wanted, key
        assert [list(own[0].ids) for _, own in sorted(result.replies.runs["clean"].items())] == base
        changed |= {key} if wanted != base else set()
    assert len(changed) >= 0.45 * len(CASES), CASES.keys() - changed
    both = [written(name, n, [CASES[key] for key in BOTH]) for n in range(count)]
    assert replies(seen["both"]) == both


def test_sweep_of_prompt_and_following_positions_equals_full_forward_passes(data: Path) -> None:
    joined = f"{{first token, {LAST}}}"
    rule = f"ablate resid_pre layer 1 at {CUE}, {LAST}, {joined} with zero"
    text = experiment("e", rule, f"generate {TOKENS}", measure="measure length as raw")
    found = run_file(text, data, "llama", "planned", precise=True)["e"]
    stays = Case(rule, CUE, zero("resid_pre", 1), follows=False)
    both = Case(rule, joined, zero("resid_pre", 1))
    for cell, case in enumerate((stays, CASES["zero"], both)):
        wanted = [written("llama", n, [case]) for n in range(len(rows()))]
        assert replies(found, cell) == wanted


@pytest.mark.parametrize("at", ["tokens *", f"{CUE}, {LAST}"])
def test_sweep_with_except_during_generation_equals_full_forward_passes(
    at: str, data: Path
) -> None:
    """`except` leaves a cell without a site; the others act at every step."""
    rule = f"scale z layer 1 head * except 1 at {at} by -3"
    text = experiment("e", rule, f"generate {TOKENS}", measure="measure length as raw")
    found = run_file(text, data, "llama", "planned", precise=True)["e"]
    changed = 0
    for cell, own in enumerate(found.cells):
        head, place = own.coords["head"], own.coords.get("position", at)
        case = Case(rule, str(place), scaled("z", 1, -3.0, int(head)), follows=place != CUE)
        cases = [] if head == 1 else [case]
        wanted = [written("llama", n, cases) for n in range(len(rows()))]
        assert replies(found, cell) == wanted, own.coords
        changed += wanted != [written("llama", n, []) for n in range(len(rows()))]
    assert changed >= 3


def test_sweep_with_except_during_steps_equals_full_forward_passes(data: Path) -> None:
    rule = "scale z layer 1 head * except 1 at last token by -3 during step 1..3"
    text = experiment("e", rule, f"generate {TOKENS}", measure="measure length as raw")
    found = run_file(text, data, "llama", "planned", precise=True)["e"]
    assert [cell.coords["head"] for cell in found.cells] == [0, 2, 3]
    for cell, head in enumerate((0, 2, 3)):
        case = Case(rule, LAST, scaled("z", 1, -3.0, head), first=1, last=3)
        wanted = [written("llama", n, [case]) for n in range(len(rows()))]
        assert replies(found, cell) == wanted


def test_loop_over_top_k_during_generation_equals_full_forward_passes(data: Path) -> None:
    """`top 0` has no head; the others act at every step, also on attention edges."""
    ranked = experiment("ranked", "ablate layer 1 head * at tokens * with zero")
    scale = "for k in 0..2 { scale top k of ranked at tokens * by -3 }"
    block = f"for k in 0..2 {{ block attention top k of ranked from {LAST} to {CUE} }}"
    text = ranked
    for name, rule in (("scaled", scale), ("blocked", block)):
        text += experiment(name, rule, f"generate {TOKENS}", measure="measure length as raw")
    found = run_file(text, data, "llama", "planned", precise=True)
    data_of = found["ranked"].measures[0]
    order = np.argsort(-(data_of.patched - data_of.base).mean(1))
    heads = [int(found["ranked"].cells[n].coords["head"]) for n in order]
    for k in range(3):
        cases = [Case(scale, "tokens *", scaled("z", 1, -3.0, head)) for head in heads[:k]]
        wanted = [written("llama", n, cases) for n in range(len(rows()))]
        assert replies(found["scaled"], k) == wanted
        edges = [Case(block, LAST, edge("block", to_cue, heads=[head])) for head in heads[:k]]
        wanted = [written("llama", n, edges) for n in range(len(rows()))]
        assert replies(found["blocked"], k) == wanted


def test_samples_attend_to_values_edited_after_prefill(data: Path) -> None:
    """The temperature is so low that the most likely token is always drawn."""
    rule = f"scale v layer * head * at {CUE} by 9 after prefill"
    text = "seed 1\n" + "".join(
        experiment(name, rule, f"generate {TOKENS} {how}", measure="measure length as raw")
        for name, how in (("one", ""), ("three", "with temperature 0.000001, samples 3"))
    )
    found = run_file(text, data, "llama", "planned", precise=True)
    one, three = (found[name].replies.cells[0] for name in ("one", "three"))
    assert found["one"].replies.runs["clean"] != one
    for n, (reply,) in one.items():
        assert [own.ids for own in three[n]] == [reply.ids] * 3


@pytest.mark.parametrize("during", ["during prefill", "during step 1..2"])
def test_identity_block_in_early_steps_only_is_an_error(data: Path, during: str) -> None:
    """The block would have no keys of earlier tokens."""
    rule = f"replace block layer 1 with identity {during}"
    text = experiment("e", rule, f"generate {TOKENS}", measure="measure length as raw")
    assert codes(text, data) == ["E0207"]
    later = rule.replace(during, f"during step 1..{TOKENS - 1}")
    run_file(text.replace(rule, later), data, "llama", "planned")


def test_blocks_replaced_in_different_steps_share_no_pass(data: Path) -> None:
    """In one file, replies are those of files with one experiment each."""
    rule = "replace block layer 1 with block layer 0"
    rules = [rule, f"{rule} during prefill", f"{rule} during step 1..{TOKENS - 1}"]
    texts = [
        experiment(f"e{n}", each, f"generate {TOKENS}", measure="measure length as raw")
        for n, each in enumerate(rules)
    ]
    together = run_file("".join(texts), data, "llama", "planned")
    found = [together[f"e{n}"].replies.cells[0] for n in range(len(rules))]
    alone = [run_file(text, data, "llama", "planned") for text in texts]
    assert found == [alone[n][f"e{n}"].replies.cells[0] for n in range(len(rules))]
    assert found[0] != found[1] != found[2] != found[0]


def test_generate_keeps_shared_answer_prefixes_out_of_the_prompt(data: Path) -> None:
    """Without `generate`, a word that starts all answers is moved to the end of the prompts."""
    block = 'prompts q {\n rows "data.jsonl"\n template "w41 {cue} w42"\n answer " w7 {a}"\n}\n'
    plainly = experiment("e", block="q", measure="measure prob(answer) as raw")
    writes = experiment("w", "generate 2", block="q", measure="measure exact_match as raw")
    moved = run_file(plainly, data, "llama", "planned", blocks=block)["e"]
    alone = run_file(writes, data, "llama", "planned", blocks=block)["w"]
    assert "w7" in moved.conventions["answer"]
    assert all(text.endswith("w42") for text in alone.replies.prompts.values())
