"""`add NUMBER * step(COMPONENT) to SITE at POSITIONS`, against reference passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from mechdsl.resolve.cells import Coord

from ..quick import in_turn
from ..reference.forward import Changes, Write
from .support import (
    QUICK,
    Text,
    agree,
    codes,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    tokens,
    unpatched,
    worked_out,
)

LAYERS = range(3)
HEADS = range(4)


def stepped(at: Sequence[int], factor: float) -> Callable[[Tensor], Tensor]:
    """From [T, units, width]: a step at each of these positions, from the unchanged vectors."""

    def change(here: Tensor) -> Tensor:
        made = here.clone()
        for position in at:
            if position > 0:
                made[position] = here[position] + factor * (here[position] - here[position - 1])
        return made

    return change


def step(
    text: Text, site: str, layer: int, at: str, factor: float = 1.0, unit: int | None = None
) -> Write:
    return Write(site, layer, stepped(tokens(text, at), factor), None, unit)


@dataclass(frozen=True)
class Case:
    rule: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    writes: Callable[..., Sequence[Write]]
    """From a model's name, a text, the same row's `other`, and a cell's coordinates."""
    base: str = "clean"


CASES = {
    "queries": Case(
        "add 2 * step(q) to q layer * head * at tokens *",
        ("layer", "head"), product(LAYERS, HEADS),
        lambda name, text, _, n, h: [step(text, "q", n, "tokens *", 2, h)],
    ),
    "keys": Case(
        "for c in [-1, 0, 0.5] { add c * step(k) to k layer * head 1 at tokens * }",
        ("c", "layer"), product([-1, 0, 0.5], LAYERS),
        lambda name, text, _, c, n: [step(text, "k", n, "tokens *", c, 1)],
    ),
    "one query": Case(
        "add -3 * step(q) to q layer * at last token",
        ("layer",), product(LAYERS),
        lambda name, text, _, n: [step(text, "q", n, "last token", -3)],
    ),
    "values of some": Case(
        "add step(v) to v layer 1 head 0 at subject tokens",
        (), [()],
        lambda name, text, _: [step(text, "v", 1, "subject tokens", 1, 0)],
    ),
    "the first token": Case(
        "add 2 * step(resid_post) to resid_post layer * at {token 0, token 1, token 3}",
        ("layer",), product(LAYERS),
        lambda name, text, _, n: [step(text, "resid_post", n, "{token 0, token 1, token 3}", 2)],
    ),
    "neurons": Case(
        "add 5 * step(mlp_hidden) to mlp_hidden layer * neurons 0..9 at last token",
        ("layer",), product(LAYERS),
        lambda name, text, _, n: [
            step(text, "mlp_hidden", n, "last token", 5, u) for u in range(10)
        ],
    ),
    "what is added": Case(
        "add 4 * step(attn_out) to attn_out layers * at cue token  "
        "add 2 * step(mlp_out) to mlp_out layer 2 at last token",
        (), [()],
        lambda name, text, _: [
            *(step(text, "attn_out", n, "cue token", 4) for n in LAYERS),
            step(text, "mlp_out", 2, "last token", 2),
        ],
    ),
    "behind other rules": Case(
        "from other into clean  scale q layer 1 at tokens * by 2  "
        "patch resid_pre layer 0 at subject tokens  add 1.5 * step(q) to q layers * at tokens *",
        (), [()],
        lambda name, text, other: [
            *(
                Write("resid_pre", 0, plain(name, other)["resid_pre", 0][a, 0], b, 0)
                for a, b in zip(
                    tokens(other, "subject tokens"), tokens(text, "subject tokens"), strict=True
                )
            ),
            Write("q", 1, lambda here: here * 2),
            *(step(text, "q", n, "tokens *", 1.5) for n in LAYERS),
        ],
    ),
    "each on what the one before left": Case(
        "add step(z) to z layer 1 at tokens *  add 2 * step(z) to z layer 1 at last token",
        (), [()],
        lambda name, text, _: [
            step(text, "z", 1, "tokens *"), step(text, "z", 1, "last token", 2),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), in_turn(["gpt2", "llama", "gpt_neox"], QUICK))
def test_added_steps_equal_the_reference(data: Path, name: str, mode: str) -> None:
    text = "".join(experiment(f"e{n}", case.rule) for n, case in enumerate(CASES.values()))
    found = run_file(text, data, name, mode)
    for number, case in enumerate(CASES.values()):

        def changes(n: int, *cell: Coord, case: Case = case) -> Sequence[Changes]:
            return [(case.writes(name, rows(case.base)[n], rows("other")[n], *cell), ())]

        expected = worked_out(name, case.cells, changes, rows(case.base), records())
        base = unpatched(name, case.base)
        agree(found[f"e{number}"], case.axes, expected, base, large=0.05, most=False)


def test_steps_in_shared_passes_equal_separate_passes(data: Path) -> None:
    """The preceding token of each token is in the same row."""
    rule = "add 2 * step(q) to q layer 2 at last token"
    several = experiment(
        "e", "from other into clean", f"patch mlp_out layer * at each item token  {rule}"
    )
    planned, apart = (run_file(several, data, "llama", mode)["e"] for mode in ("planned", "plain"))
    a, b = planned.measures[0].patched, apart.measures[0].patched
    assert a.shape == b.shape
    assert abs(a - b)[~(a != a)].max() < 1e-4
    without = run_file(several.replace(rule, ""), data, "llama", "planned")["e"]
    assert abs(without.measures[0].patched - a)[~(a != a)].max() > 0.05


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("add step(k) to q layer 1 head 0 at tokens *", "E0341"),
        ("add step(head_out) to head_out layer 1 head 0 at tokens *", "E0341"),
        ("add step(pattern) to pattern layer 1 head 0 at tokens *", "E0341"),
        ("add step(embed) to embed at tokens *", "E0341"),
        ("add step(qq) to q layer 1 head 0 at tokens *", "E0203"),
        ("add x * step(q) to q layer 1 head 0 at tokens *", "E0337"),
        ("add step(q) + step(q) to q layer 1 head 0 at tokens *", "E0101"),
        ("set q layer 1 head 0 at tokens * to step(q)", "E0337"),
    ],
)
def test_invalid_steps_are_errors(data: Path, rule: str, code: str) -> None:
    assert code in codes(experiment("e", rule), data)
