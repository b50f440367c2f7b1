"""`add NUMBER * step(COMPONENT)` during generation, against passes over the whole text so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from ..quick import some
from ..reference.forward import Changes, Write
from .support import QUICK, Text, compare, experiment, rows, run_file, tokens, write_data
from .test_in_replies import GENERATE, MOST, Reply, behind, entropy, write
from .test_steps import stepped

MEASURE = "measure entropy at each step as delta"
Places = Callable[[Text, int], Sequence[int]]
"""The positions at which a rule acts, from a prompt and the number of reply tokens."""


def everywhere(text: Text, written: int) -> Sequence[int]:
    return range(len(text.ids) + written)


def from_last(text: Text, written: int) -> Sequence[int]:
    return range(len(text.ids) - 1, len(text.ids) + written)


def in_steps(first: int, last: int) -> Places:
    def places(text: Text, written: int) -> Sequence[int]:
        return [len(text.ids) - 1 + step for step in range(first, min(last, written) + 1)]

    return places


def at_subject(text: Text, written: int) -> Sequence[int]:
    return tokens(text, "subject tokens")


@dataclass(frozen=True)
class Act:
    """One rule: a change of the vectors of a site at some positions."""

    site: str
    layers: Sequence[int]
    places: Places
    change: Callable[[Sequence[int]], Callable[[Tensor], Tensor]]
    unit: int | None = None

    def writes(self, text: Text, written: int) -> list[Write]:
        change = self.change(self.places(text, written))
        return [Write(self.site, layer, change, None, self.unit) for layer in self.layers]


def step(
    factor: float,
    site: str,
    layers: Sequence[int],
    places: Places = everywhere,
    unit: int | None = None,
) -> Act:
    return Act(site, layers, places, lambda at: stepped(at, factor), unit)


def each(site: str, layer: int, places: Places, of: Callable[[Tensor], Tensor]) -> Act:
    """A rule that changes every vector separately."""

    def change(at: Sequence[int]) -> Callable[[Tensor], Tensor]:
        def made(here: Tensor) -> Tensor:
            out = here.clone()
            for position in at:
                out[position] = of(here[position])
            return out

        return made

    return Act(site, [layer], places, change)


CASES: dict[str, tuple[str, Sequence[Act]]] = {
    "tokens": ("add 2 * step(q) to q layer 0 heads * at tokens *", [step(2, "q", [0])]),
    "last token": (
        "add 2 * step(k) to k layer 1 head 1 at last token",
        [step(2, "k", [1], from_last, 1)],
    ),
    "some steps": (
        "add -1.5 * step(resid_post) to resid_post layer 1 at tokens * during step 1..3",
        [step(-1.5, "resid_post", [1], in_steps(1, 3))],
    ),
    "all layers": (
        "add 0.5 * step(mlp_out) to mlp_out layers * at tokens *  "
        "add -1 * step(v) to v layers * heads * at tokens *",
        [step(-1, "v", range(3)), step(0.5, "mlp_out", range(3))],
    ),
    "two steps at one site": (
        "add step(z) to z layer 1 at tokens *  add 2 * step(z) to z layer 1 at last token",
        [step(1, "z", [1]), step(2, "z", [1], from_last)],
    ),
    "after another rule": (
        "scale resid_pre layer 1 at tokens * by 3  "
        "add 2 * step(resid_pre) to resid_pre layer 1 at tokens *",
        [each("resid_pre", 1, everywhere, lambda x: x * 3), step(2, "resid_pre", [1])],
    ),
    "before another rule": (
        "add 2 * step(resid_pre) to resid_pre layer 1 at tokens *  "
        "scale resid_pre layer 1 at tokens * by 3",
        [step(2, "resid_pre", [1]), each("resid_pre", 1, everywhere, lambda x: x * 3)],
    ),
    "after a rule on the prompt": (
        "scale attn_norm layer 1 at subject tokens by 3  "
        "add 2 * step(attn_norm) to attn_norm layer 1 at tokens *",
        [each("attn_norm", 1, at_subject, lambda x: x * 3), step(2, "attn_norm", [1])],
    ),
    "between rules that set": (
        "set attn_out layer 1 at tokens * to 0.5  "
        "add 2 * step(attn_out) to attn_out layer 1 at last token during step 1..5  "
        "set attn_out layer 1 at last token to -0.5 during prefill",
        [
            each("attn_out", 1, everywhere, lambda x: x * 0 + 0.5),
            step(2, "attn_out", [1], in_steps(1, 5)),
            each("attn_out", 1, in_steps(0, 0), lambda x: x * 0 - 0.5),
        ],
    ),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


@pytest.mark.parametrize("mode", some(QUICK, ["planned"]))
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_steps_read_unwritten_vectors_in_replies(data: Path, name: str, mode: str) -> None:
    """A step starts from the vector before the rule's own writes, also at generated tokens."""
    text = "".join(
        experiment(f"e{n}", GENERATE, rule, measure=MEASURE)
        for n, (rule, _) in enumerate(CASES.values())
    )
    found = run_file(text, data, name, mode)
    for number, (_, acts) in enumerate(CASES.values()):
        replies = [write(name, text.ids, partial(changes_of, acts, text)) for text in rows()]
        values = np.array([entropies(name, n, reply) for n, reply in enumerate(replies)])
        values = values.transpose(2, 1, 0)
        own = found[f"e{number}"]
        assert [cell.coords["step"] for cell in own.cells] == list(range(MOST))
        compare(own.measures[0], values[0], values[1], large=0.02, most=False)


def changes_of(acts: Sequence[Act], text: Text, written: int) -> Changes:
    return [write for act in acts for write in act.writes(text, written)], []


def entropies(name: str, n: int, reply: Reply) -> list[tuple[float, float]]:
    """(with rules, without) before each token of a reply; NaN after its end."""
    bare = behind(name, rows()[n].ids, reply)
    places = [reply.at(step) for step in range(MOST)]
    return [
        (np.nan, np.nan)
        if at is None
        else (entropy(reply.run.logits[at]), entropy(bare.logits[at]))
        for at in places
    ]
