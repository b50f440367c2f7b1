"""`set SITE … to value(SITE …) of RUN`, `add … to SITE`, against reference passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.hashing import stable_hash
from mechdsl.resolve.cells import Coord

from ..execute.support import MODES
from ..quick import in_turn
from ..reference.forward import Changes, Write
from .support import (
    agree,
    codes,
    experiment,
    plain,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
    worked_out,
)

Where = tuple[str, int, int]
"""Site, layer and unit."""


@dataclass(frozen=True)
class Case:
    """One rule, and the reference reads and writes of each cell."""

    rule: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    ends: Callable[..., Sequence[tuple[Where, Where, float]]]
    """From a cell's coordinates: (read, written, factor)."""
    read: str = "last token"
    written: str = "last token"
    run: str = "clean"
    base: str = "clean"
    adds: bool = False


CASES = {
    "one": Case(
        "set resid_post layer 1 at last token to value(mlp_out layer 2)",
        (), [()], lambda: [(("mlp_out", 2, 0), ("resid_post", 1, 0), 1)],
    ),
    "swept": Case(
        "set attn_out layer * at cue token to 2 * value(mlp_out layer 0 at last token) of longer",
        ("layer",), [(0,), (1,), (2,)],
        lambda layer: [(("mlp_out", 0, 0), ("attn_out", layer, 0), 2)],
        written="cue token", run="longer",
    ),
    "what is read is swept": Case(
        "set mlp_out layer 2 at {cue token, last token} to -1 * value(attn_out layer *)",
        ("layer",), [(0,), (1,), (2,)],
        lambda layer: [(("attn_out", layer, 0), ("mlp_out", 2, 0), -1)],
        read="{cue token, last token}", written="{cue token, last token}",
    ),
    "loops": Case(
        "for l in 0..1 { for c in [0.5, 2] { set resid_post layer l at cue token to "
        "c * value(resid_post layer l + 1) of turned } }",
        ("l", "c"), [(n, c) for n in (0, 1) for c in (0.5, 2)],
        lambda n, c: [(("resid_post", n + 1, 0), ("resid_post", n, 0), c)],
        read="cue token", written="cue token", run="turned",
    ),
    "a head of another": Case(
        "set z layer 2 heads 0..1 at last token to value(z layer 0 head 3)",
        (), [()],
        lambda: [(("z", 0, 3), ("z", 2, unit), 1) for unit in range(2)],
    ),
    "heads side by side": Case(
        "from clean into longer set z layer 2 at last token to value(z layer 1) of other",
        (), [()],
        lambda: [(("z", 1, unit), ("z", 2, unit), 1) for unit in range(4)],
        run="other", base="longer",
    ),
    "a head's part of the stream": Case(
        "set attn_out layer 1 at last token to 3 * value(head_out layer 0 head *)",
        ("head",), [(0,), (1,), (2,), (3,)],
        lambda head: [(("head_out", 0, head), ("attn_out", 1, 0), 3)],
    ),
    "added": Case(
        "add 0.7 * value(attn_out layer 0) of longer to resid_post layer * at last token",
        ("layer",), [(0,), (1,), (2,)],
        lambda layer: [(("attn_out", 0, 0), ("resid_post", layer, 0), 0.7)],
        run="longer", adds=True,
    ),
    "added in doses": Case(
        "for c in [-2, 0, 1] { add c * value(mlp_out layer 1 at cue token) to attn_out layer 2 "
        "at last token }",
        ("c",), [(-2,), (0,), (1,)],
        lambda c: [(("mlp_out", 1, 0), ("attn_out", 2, 0), c)],
        read="cue token", adds=True,
    ),
    "added to joined places": Case(
        "add value(z layer 0 head 3) of other to z layers 1..2 heads 0..1 at subject tokens",
        (), [()],
        lambda: [(("z", 0, 3), ("z", n, u), 1) for n in (1, 2) for u in (0, 1)],
        read="subject tokens", written="subject tokens", run="other", adds=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("mode", "name"), in_turn(list(MODES), ["gpt2", "llama", "gpt_neox"]))
def test_set_and_add_of_a_read_value_equal_the_reference(data: Path, name: str, mode: str) -> None:
    text = "".join(experiment(f"e{n}", case.rule) for n, case in enumerate(CASES.values()))
    found = run_file(text, data, name, mode)
    for number, case in enumerate(CASES.values()):

        def changes(n: int, *cell: Coord, case: Case = case) -> Sequence[Changes]:
            of, to = rows(case.run)[n], rows(case.base)[n]

            def change(vector: Tensor) -> Tensor | Callable[[Tensor], Tensor]:
                return (lambda here: here + vector) if case.adds else vector

            vectors = plain(name, of)
            writes = [
                Write(out, at, change(amount * vectors[site, layer][origin, unit]), target, own)
                for (site, layer, unit), (out, at, own), amount in case.ends(*cell)
                for origin, target in zip(
                    tokens(of, case.read), tokens(to, case.written), strict=True
                )
            ]
            return [(writes, ())]

        expected = worked_out(name, case.cells, changes, rows(case.base), records())
        base = unpatched(name, case.base)
        agree(found[f"e{number}"], case.axes, expected, base, large=0.05)


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("set resid_post layer 1 at last token to value(z layer 1 head 0)", "E0337"),
        ("set resid_post layer 1 at last token to value(head_out layer 1)", "E0337"),
        ("set resid_post layers 0..1 at last token to value(mlp_out layers 0..2)", "E0337"),
        ("set z layer 1 head 0 at last token to value(pattern layer 1 head 0)", "E0108"),
        ("set scores layer 1 head 0 at last token to value(scores layer 0 head 0)", "E0108"),
        ("set resid_post layer * at last token to value(mlp_out layer *)", "E0320"),
        ("set resid_post layer 1 at last token to value(mlp_out layer 9)", "E0302"),
        ("set resid_post layer 1 at last token to value(mlp_uot layer 1)", "E0203"),
        ("set resid_post layer 1 at last token to value(mlp_out layer 1) of nobody", "E0201"),
        ("set resid_post layer 1 at last token to x * value(mlp_out layer 1)", "E0337"),
        ("add value(z layer 1 head 0) to resid_post layer 1 at last token", "E0337"),
        ("add value(mlp_out layer 9) to resid_post layer 1 at last token", "E0302"),
        ("add value(mlp_out layer 1) of nobody to resid_post layer 1 at last token", "E0201"),
        ("add value(mlp_out layer 1) + d to resid_post layer 1 at last token", "E0101"),
    ],
)
def test_invalid_value_reads_are_errors(data: Path, rule: str, code: str) -> None:
    assert code in codes(experiment("e", rule), data)


@pytest.mark.parametrize(
    ("rule", "position"),
    [
        ("set resid_post layer 1 at last token to value(mlp_out layer 2)", "the written position"),
        (
            "add value(mlp_out layer 2 at cue token) to resid_post layer 1 at last token",
            "`cue token`",
        ),
    ],
)
def test_conventions_name_the_run_and_position_of_a_value(
    data: Path, rule: str, position: str
) -> None:
    result, _ = try_file(experiment("e", rule), data, "llama")
    assert result is not None
    assert result.experiments[0].conventions["value"] == (
        f"`mlp_out layer 2` is the vector at {position} in the clean run, without the rules of the "
        "experiment"
    )


def test_set_to_a_value_of_the_base_run_gives_no_self_patch_warning(data: Path) -> None:
    rule = "set resid_post layer 1 at last token to value(mlp_out layer 2) of clean"
    _, diagnostics = try_file(experiment("e", rule), data, "llama")
    assert "W0732" not in [found.code for found in diagnostics]


@pytest.mark.parametrize(("mode", "name"), in_turn(["planned", "plain"], ["llama", "gpt2"]))
def test_random_directions_of_added_values_equal_the_reference(
    data: Path, name: str, mode: str
) -> None:
    """Each draw adds one direction to all rows, with the norm of the row's own vector."""
    rule = "add 0.7 * value(attn_out layer 0) of longer to resid_post layer 1 at last token"
    found = run_file(experiment("e", rule, "against random(2, directions)"), data, name, mode)["e"]
    width = plain(name, rows()[0])["attn_out", 0].shape[-1]

    def changes(n: int, draw: int) -> Sequence[Changes]:
        of, to = rows("longer")[n], rows()[n]
        seed = stable_hash(0, "direction", f"random {draw} of {width} numbers")
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
        drawn = torch.from_numpy(random.standard_normal(width))
        size = plain(name, of)["attn_out", 0][of.last, 0].norm()
        vector = 0.7 * size * drawn / drawn.norm()
        write = Write("resid_post", 1, lambda here: here + vector, to.last)
        return [([write], ())]

    expected = worked_out(name, [(0,), (1,)], changes, rows(), records())
    base = unpatched(name)
    means = [float(np.mean(np.array(expected[draw,]) - base)) for draw in (0, 1)]
    band = found.control(0)
    assert band is not None
    np.testing.assert_allclose([band.low[0], band.high[0]], sorted(means), atol=1e-4)
    assert abs(means[0] - means[1]) > 0.01
    own = found.measures[0]
    assert abs(float(np.mean(own.patched[0] - own.base[0])) - means[0]) > 0.01


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("set resid_post layer 1 at last token to value(mlp_out layer 2)", "has directions"),
        ("ablate resid_post layer 1 at last token with zero", "has directions"),
    ],
)
def test_random_directions_of_rules_that_add_nothing_are_errors(
    data: Path, rule: str, reason: str
) -> None:
    _, found = try_file(experiment("e", rule, "against random(2, directions)"), data, "llama")
    assert [each.code for each in found if each.severity == "error"] == ["E0630"]
    assert reason in str(found[0])
