"""`against random(n) except …`: components excluded from random controls."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.models.shape import ModelShape
from mechdsl.resolve.controls import ExcludedSite, group_excluded_units
from mechdsl.resolve.types import SitePoint
from mechdsl.show.console import visible_console
from mechdsl.show.prompts import print_prompts

from ..parsing import format_file, parse
from .test_controls import PATCH, START, WHICH, check, checked, control, drawn, effects, explicit

HEADS = "patch layer * head * at last-item token"


def units(*lines: str) -> dict[tuple[int, int], set[int | None]]:
    """Layer and head of each cell → its random heads."""
    found: dict[tuple[int, int], set[int | None]] = {}
    for (_, layer, head), (point,) in drawn(control("e", check(*PATCH, *lines))).items():
        if point.unit != head:  # a cell without draws has its own head
            found.setdefault((layer, head), set()).add(point.unit)
    return found


@pytest.mark.parametrize(
    "written", ["counters", "L0H1, L1H2", "layer 0 head 1, layer 1 head 2", "layer 0..1 heads 1..2"]
)
def test_excluded_heads_are_never_drawn(written: str) -> None:
    apart = {(0, 1), (1, 2)}
    if "heads" in written:
        apart |= {(0, 2), (1, 1)}
    for (layer, head), others in units(HEADS, f"against random(20) except {written}").items():
        left = {unit for unit in range(4) if unit != head and (layer, unit) not in apart}
        assert others == left


def test_heads_ranked_by_another_experiment_are_excluded() -> None:
    """The ranking experiment is later in the file but runs first."""
    lines = (*PATCH, "patch L1H1 at last-item token", "against random(9) except top 2 of which")
    body = "".join(f"  {line}\n" for line in lines)
    text = f"{START}experiment e {{\n  prompts fruit limit 12\n{body}}}\n"
    text += WHICH.replace("limit 6", "limit 12")
    with pytest.warns(mechdsl.MechdslWarning) as said:
        results = mechdsl.run(text)
    assert not any("W0721" in str(each.message) for each in said), "it isn't tested on them"
    every = results["which"].statistics[0].mean
    best = np.argsort(-every)[:2]
    assert sorted(best.tolist()) == [6, 8], "L1H2 and L2H0"
    band = results["e"].control(0)
    assert band is not None
    values = effects(explicit([f"patch L1H{n} at last-item token" for n in (0, 3)], *PATCH))
    assert band.draws[0] == 2
    assert [band.low[0], band.high[0]] == pytest.approx([values.min(), values.max()], rel=1e-3)
    conventions = results["e"].conventions
    assert conventions["controls"].endswith("except `top 2 of which`")
    assert conventions["top 2 of which"].startswith("L2H0.z (")
    only = mechdsl.run(text, only="e")["e"].control(0)
    assert only is not None
    assert only.low == pytest.approx(band.low)


def test_joined_heads_are_drawn_from_heads_not_excluded() -> None:
    """Two of four heads are joined and one is excluded, so each pair includes one of the joined
    heads."""
    rule = "ablate layer 0 heads 0, 1 at last token with zero"
    lines = (*PATCH, rule, "against random(20) except L0H3")
    sets = {
        frozenset(p.unit for p in points) for points in drawn(control("e", check(*lines))).values()
    }
    assert sets == {frozenset(s) for s in combinations((0, 1, 2), 2) if s != (0, 1)}


def test_excluded_layers_are_never_drawn() -> None:
    lines = ("patch resid_post layer 0 at last-item token", "against random(9) except ")
    found = check(*PATCH, lines[0], f"{lines[1]}mlp_out layer 2")
    assert {p.layer for (p,) in drawn(control("e", found)).values()} == {1, 3}
    rule = "ablate L1H2 at last-item token with zero"
    found = check(*PATCH, rule, "against random(9, layers) except L3H2, L2H1")
    assert {(p.layer, p.unit) for (p,) in drawn(control("e", found)).values()} == {(0, 2), (2, 2)}


def test_excluded_neurons_are_never_drawn() -> None:
    rule = "ablate layer 1 neurons 0..4 at last token with mean"
    last = checked().experiments[0].model.shape.blocks[0].neurons - 1
    apart = f"against random(21) except layer 1 neurons 12..{last}, layer 0 neuron 7"
    found = control("e", check(*PATCH, rule, apart))
    sets = {frozenset(p.unit for p in points) for points in drawn(found).values()}
    assert sets == {frozenset(each) for each in combinations(range(5, 12), 5)}, "all 21 there are"
    assert found.draws == 21


def shape_with(heads: int, kv_heads: int) -> ModelShape:
    shape = checked().experiments[0].model.shape
    blocks = (replace(block, heads=heads, kv_heads=kv_heads) for block in shape.blocks)
    return replace(shape, blocks=tuple(blocks))


@pytest.mark.parametrize(
    ("point", "left_out"),
    [
        (SitePoint("z", 1, 5), {8: (5,), 2: (1,)}),
        (SitePoint("k", 1, 1), {2: (1,), 8: (4, 5, 6, 7)}),
        (SitePoint("q", 1, 0), {8: (0,), 2: (0,)}),
    ],
)
def test_exclusion_of_a_head_covers_its_key_group(
    point: SitePoint, left_out: dict[int, tuple[int, ...]]
) -> None:
    site = checked().program.groups["counters"].sites[0]
    found = group_excluded_units([ExcludedSite(site, (point,))], shape_with(8, 2))
    assert {slot.size: here for slot, here in found.items()} == left_out
    assert {slot.layer for slot in found} == {1}


def test_formatter_normalizes_exceptions() -> None:
    text = (
        f"{START}experiment e {{\n  prompts fruit\n  {HEADS} with clean\n"
        "  measure logit(answer) as delta\n"
        "  against random( 20 )  except\n top 25% of which,counters , L1H2,\n"
        "   layer 3 head 1\n}\n"
    )
    tree, _ = parse(Source(text))
    once = format_file(tree)
    line = "  against random(20) except top 25% of which, counters, L1H2, layer 3 head 1\n"
    assert line in once
    again, _ = parse(Source(once))
    assert format_file(again) == once


def test_apart_and_from_here_remain_valid_names() -> None:
    text = START.replace("seed 3", "seed 3\nparam apart = 2").replace("item", "apart")
    text = text.replace("last-apart", "last-item").replace("group counters", "group from_here")
    text += (
        "experiment e {\n  prompts fruit limit 6\n  ablate L0H1 at last token with zero\n"
        "  measure logit(answer) as delta\n  against random(apart)\n"
        "  for layer_of in [1, 2] { ablate layer layer_of head 0 at last token with zero }\n}\n"
    )
    found = check_source(Source(text))
    assert [d for d in found.diagnostics if d.severity == "error"] == []
    assert found.experiments[0].spec.against is not None
    assert found.experiments[0].spec.against.draws == 2


def test_explain_lists_exceptions(capsys: pytest.CaptureFixture[str]) -> None:
    lines = (*PATCH, "patch L0H0 at last-item token", "against random(20) except counters")
    print_prompts(check(*lines), visible_console(width=120))
    shown = " ".join(capsys.readouterr().out.split())
    assert "none named by a rule; except `counters`" in shown
    assert "draws: L0H2.z, L0H3.z" in shown or "draws: L0H3.z, L0H2.z" in shown


def test_invalid_exception_is_rejected() -> None:
    def codes(*lines: str) -> list[str]:
        return [f"{d.code} {d.span.written}" for d in check(*PATCH, *lines).diagnostics if d.span]

    one = "patch L0H0 at last-item token"
    none_left = "against random(20) except layer 0 head *"
    assert "E0630 random(20)" in codes(one, none_left)
    layers = "against random(20) except resid_post layer 1"
    assert "E0630 resid_post layer 1" in codes(one, layers)
    positions = "against random(20, positions) except counters"
    assert "E0630 counters" in codes(one, positions)
    assert "E0201 top 2 of wich" in codes(one, "against random(20) except top 2 of wich")
    assert "E0210 top 2 of e" in codes(one, "against random(20) except top 2 of e")
    assert "E0302 L9H0" in codes(one, "against random(20) except L9H0")
