"""`SITE except …`: the sites that a rule leaves out, against writes of the others by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.source import Source
from mechdsl.execute.run_record import ExecutionProfile
from mechdsl.pipeline.options import RunOptions
from mechdsl.resolve.cells import Coord

from ..execute.support import MODES, by_name, run_on, shared
from ..quick import in_turn
from ..reference.forward import Changes, Write
from .models import bare
from .support import (
    BLOCKS,
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

HERE = ("gpt2", "llama", "gpt_neox", "gemma2")
LAYERS, HEADS = range(3), range(4)
GROUPS = "group circuit = L0H1, L2H0, L1H3\ngroup few = L0H1, L2H0, L1H3, mlp_out layer 1\n"
SOURCE = "from other into clean  "
LAST = "last token"


def zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def zeroed(
    n: int, points: Sequence[tuple[str, int, int | None]], at: str = "tokens *"
) -> list[Write]:
    return [
        Write(site, layer, zero, position, unit)
        for site, layer, unit in points
        for position in tokens(rows()[n], at)
    ]


def from_other(
    name: str, n: int, points: Sequence[tuple[str, int, int]], at: str = LAST
) -> Iterator[Write]:
    source = rows("other")[n]
    for site, layer, unit in points:
        vector = plain(name, source)[site, layer][tokens(source, at)[-1], unit]
        yield Write(site, layer, vector, tokens(rows()[n], at)[-1], unit)


def heads(without: Sequence[tuple[int, int]], site: str = "z") -> list[tuple[str, int, int]]:
    return [
        (site, layer, head) for layer in LAYERS for head in HEADS if (layer, head) not in without
    ]


CIRCUIT = [(0, 1), (2, 0), (1, 3)]


@dataclass(frozen=True)
class Case:
    rule: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    changes: Callable[..., Sequence[Write]]


CASES = {
    "a group": Case(
        "ablate layers * heads * except circuit at tokens * with zero",
        (),
        [()],
        lambda m, n: zeroed(n, heads(CIRCUIT)),
    ),
    "a group of other sites too": Case(
        "ablate layers * heads * except few at tokens * with zero  "
        "ablate mlp_out layers * except few at last token with zero",
        (),
        [()],
        lambda m, n: [
            *zeroed(n, heads(CIRCUIT)),
            *zeroed(n, [("mlp_out", 0, 0), ("mlp_out", 2, 0)], LAST),
        ],
    ),
    "heads of another site": Case(
        f"{SOURCE}patch head_out layers * heads * except L0H1, L1H2 at {LAST}",
        (),
        [()],
        lambda m, n: list(from_other(m, n, heads([(0, 1), (1, 2)], "head_out"))),
    ),
    "a sweep with holes": Case(
        f"{SOURCE}patch layer 0..1 head * except circuit, layer 1 head 0 at {LAST}",
        ("layer", "head"),
        [(0, 0), (0, 2), (0, 3), (1, 1), (1, 2)],
        lambda m, n, layer, head: list(from_other(m, n, [("z", layer, head)])),
    ),
    "numbers of the last axis": Case(
        f"{SOURCE}patch resid_post layer * except 1 at {LAST}",
        ("layer",),
        [(0,), (2,)],
        lambda m, n, layer: list(from_other(m, n, [("resid_post", layer, 0)])),
    ),
    "joined heads of swept layers": Case(
        "ablate z layer * heads * except 0..1, layer 2 head 3 at tokens * with zero",
        ("layer",),
        product(LAYERS),
        lambda m, n, layer: zeroed(
            n, [("z", layer, head) for head in (2, 3) if (layer, head) != (2, 3)]
        ),
    ),
    "a whole layer": Case(
        "ablate z layers * heads * except layer 1, L0H0 at tokens * with zero",
        (),
        [()],
        lambda m, n: zeroed(n, heads([(0, 0), *((1, head) for head in HEADS)])),
    ),
    "dimensions": Case(
        "ablate resid_post layer 1 dims 0..9 except 3, 5..6 at last token with zero",
        (),
        [()],
        lambda m, n: [Write("resid_post", 1, without([0, 1, 2, 4, 7, 8, 9]), rows()[n].last, 0)],
    ),
    "swept dimensions": Case(
        "ablate resid_post layer 1 dim 0..3 except 1..2 at last token with zero",
        ("dim",),
        [(0,), (3,)],
        lambda m, n, dim: [Write("resid_post", 1, without([dim]), rows()[n].last, 0)],
    ),
}


def without(dims: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def act(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., list(dims)] = 0
        return x

    return act


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), HERE))
def test_the_other_sites_are_written(family: str, mode: str, data: Path) -> None:
    names = {key: f"e{number}" for number, key in enumerate(CASES)}
    text = GROUPS + "".join(experiment(names[key], case.rule) for key, case in CASES.items())
    found = run_file(text, data, family, mode)
    for key, case in CASES.items():

        def changes(n: int, *cell: Coord, case: Case = case) -> list[Changes]:
            return [(case.changes(family, n, *cell), ())]

        expected = worked_out(family, case.cells, changes, rows(), records())
        try:
            agree(found[names[key]], case.axes, expected, unpatched(family), most=False, large=0.01)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


def test_what_another_experiment_ranks_is_left_out(data: Path) -> None:
    """The faithfulness of a circuit: everything else is ablated."""
    first = experiment("ranked", "ablate layer * head * at tokens * with zero")
    rule = "ablate layers * heads * except top 3 of ranked, L2H2 at tokens * with zero"
    found = run_file(first + experiment("rest", rule), data, "llama", "planned")
    measure = found["ranked"].measures[0]
    means = (measure.patched - measure.base).mean(axis=1)
    best = np.argsort(-means)[:3]
    cells = [found["ranked"].cells[n].coords for n in best]
    kept = [(int(cell["layer"] or 0), int(cell["head"] or 0)) for cell in cells]

    def changes(n: int) -> list[Changes]:
        return [(zeroed(n, heads([*kept, (2, 2)])), ())]

    expected = worked_out("llama", [()], changes, rows(), records())
    agree(found["rest"], (), expected, unpatched("llama"), most=False)
    left = len({*kept, (2, 2)})
    said = "`layers * heads * except top 3 of ranked, L2H2`"
    assert found["rest"].conventions["except"] == f"{said}: {left} of 12 sites"


def test_a_sweep_has_only_the_other_cells(data: Path) -> None:
    """Rows of the others aren't run either."""
    profiles: list[ExecutionProfile] = []
    options = RunOptions(on_profile=lambda _, profile: profiles.append(profile))
    text = experiment("e", f"{SOURCE}patch layer * head * except circuit at {LAST}")
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{GROUPS}{text}'
    source = Source(whole, data / "file.mech")
    found = by_name(*run_on(source, {"m": shared(bare("gpt2"))}, options))["e"]
    assert sum(profile.rows for profile in profiles) == 9 * len(rows())
    cells = [(cell.coords["layer"], cell.coords["head"]) for cell in found.cells]
    assert cells == [(layer, head) for _, layer, head in heads(CIRCUIT)]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("patch layers 0..1 heads * except L2H0 at last token", "E0343"),
        ("patch layers * heads * except layers * heads * at last token", "E0343"),
        ("patch layer 1 head * except layer 1 at last token", "E0343"),
        ("patch resid_post layer 1 except 2 at last token", "E0343"),
        ("patch embed except 2 at last token", "E0343"),
        ("patch layers * heads * except nobody at last token", "E0203"),
        ("patch layers * heads * except L9H0 at last token", "E0302"),
        ("patch layers * heads * except layer * head 1 at last token", "E0343"),
        ("patch resid_post layer 1 dims 0..3 except 7 at last token", "E0343"),
        ("patch resid_post layer 1 dims 0..3 except 0..3 at last token", "E0343"),
        ("patch layers * heads * apart from L0H1 at last token", "E0101"),
        ("patch layers * heads * except at last token", "E0101"),
        ("patch layer 1 head 0 at last token against random(3) apart from L0H1", "E0101"),
    ],
)
def test_mistakes_with_exceptions(line: str, code: str, data: Path) -> None:
    assert code in codes(experiment("e", SOURCE + line), data)
