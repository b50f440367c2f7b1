"""Every architecture of the tables against the reference, and walks that have to fail."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.batch import Batch, SiteWrite
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.packed.packed_pass import PackedResult, run_packed
from mechdsl.models.anatomy import HookPoint

from ..quick import some
from ..reference import hooks
from . import tables
from .__main__ import PAGE, cells, image_tokens, prepare, reason
from .parts import Architecture, Refused
from .walk import KINDS, SMALLEST, Walked, kind, walk

ROWS = {row.name: row for row in tables.every()}
QUICK = ("gpt2", "mamba", "bert", "t5", "llava")
LEAST: dict[str, int] = dict(zip(KINDS, (60, 8, 3, 6, 4), strict=True))
"""Architectures of each kind that there have to be, variants not counted."""

REFUSED: dict[str, str] = dict.fromkeys(
    ("convbert", "fnet", "nystromformer", "yoso"), "padding changes its output"
)
"""Architectures that are in the tables with all their sites and that the package doesn't take, and
what it says of them."""


@cache
def recorded() -> dict[str, list[str]]:
    """Name → cells of its row in `docs/models.md`."""
    text = PAGE.read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in text.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): row for row in rows}


@pytest.mark.parametrize("name", some(ROWS, QUICK))
def test_every_site_is_as_by_hand_and_on_the_page(name: str) -> None:
    """The page says which sites there are, whether rows can start in the middle, and why a model is
    refused."""
    prepare()
    found, page = walk(ROWS[name]), recorded()[name]
    if found.refused:
        assert isinstance(ROWS[name], Refused) or REFUSED.get(name, "?") in found.refused
        assert page[1:] == [reason(found.refused)]
        return
    assert name not in REFUSED
    assert found.wrong() == []
    assert name not in ("gpt2", "llama") or found.precision == "float32", "broken ones stay at it"
    now = cells(found, ROWS[name])
    assert (page[1], page[2] == "all") == (now[1], now[2] == "all")


def test_page_lists_layouts_of_image_tokens() -> None:
    assert image_tokens() in PAGE.read_text(encoding="utf-8")


def test_there_are_enough_of_each_kind() -> None:
    page = recorded()
    assert set(page) == set(ROWS)
    taken = {
        (kind(row), name.partition("/")[0])
        for name, row in ROWS.items()
        if isinstance(row, Architecture) and len(page[name]) > 2
    }
    counts = Counter(which for which, _ in taken)
    assert {k: n for k, n in counts.items() if n < LEAST[k]} == {}
    assert set(counts) == set(KINDS)


def test_all_that_is_refused_is_in_the_tables() -> None:
    assert set(REFUSED) <= set(ROWS)
    assert not any(isinstance(ROWS[name], Refused) for name in REFUSED)


# --- the walk fails when it should ----------------------------------------------------------------


def row(name: str) -> Architecture:
    found = ROWS[name]
    assert isinstance(found, Architecture)
    return found


def broken(row: Architecture, change: Callable[[LoadedModel], LoadedModel] | None = None) -> Walked:
    """A walk that has to notice more than rounding."""
    return walk(row, change, finer=False)


def retapped(model: LoadedModel, **taps: Callable[[Any], HookPoint]) -> LoadedModel:
    """The model with other taps: site → tap, made of the block's anatomy."""
    blocks = [
        block.with_taps(**{site: make(block.taps) for site, make in taps.items()})
        for block in model.anatomy.blocks
    ]
    return replace(model, anatomy=replace(model.anatomy, blocks=tuple(blocks)))


def test_keys_taken_for_values() -> None:
    found = broken(row("llama"), lambda model: retapped(model, v=lambda taps: taps["k"]))
    assert not found.agrees
    assert any(" v " in text and "off by" in text for text in found.wrong())


def test_heads_in_another_order() -> None:
    """The layout of the third head begins where the first one's does."""

    def shifted(taps: Any) -> HookPoint:
        q = taps["q"]
        return replace(q, layout=replace(q.layout, offset=q.layout.offset + 1))

    found = broken(row("gpt2"), lambda model: retapped(model, q=shifted))
    assert any(" q " in text and "off by" in text for text in found.wrong())


def test_a_tap_that_is_not_there() -> None:
    def lost(taps: Any) -> HookPoint:
        return replace(taps["z"], path="nowhere")

    found = broken(row("gpt2"), lambda model: retapped(model, z=lost))
    assert any("reading z 1" in text for text in found.wrong())


def test_a_reference_that_writes_one_position_before(monkeypatch: pytest.MonkeyPatch) -> None:
    side_by_side = hooks.side_by_side

    def before(
        architecture: Architecture,
        module: nn.Module,
        prompt: Any,
        layer: int,
        each: Sequence[hooks.Writes],
        stack: str = "",
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        moved = [
            (site, [replace(c, position=max(c.position - 1, 0)) for c in changes])
            for site, changes in each
        ]
        return side_by_side(architecture, module, prompt, layer, moved, stack)

    monkeypatch.setattr(hooks, "side_by_side", before)
    assert not broken(row("gpt2")).agrees


def test_padding_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "columns", lambda self, rows, positions: positions)
    assert not broken(row("gpt2")).agrees


def test_rows_that_start_in_the_middle_with_other_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole passes agree, packed rows don't."""

    def louder(*args: Any, writes: Sequence[SiteWrite], **more: Any) -> PackedResult:
        writes = [replace(write, values=write.values * 1.01) for write in writes]
        return run_packed(*args, writes=writes, **more)

    monkeypatch.setattr(f"{walk.__module__}.run_packed", louder)
    found = broken(row("gpt2"))
    assert not found.agrees
    assert "packed" in found.where


def test_sites_that_only_one_side_knows_are_listed() -> None:
    full = row("gpt2")
    less = replace(full, main=replace(full.main, block=replace(full.main.block, q=None)))
    assert {str(spot) for spot in broken(less).extra} == {
        f"q {layer}" for layer in range(full.main.count)
    }

    def fewer(model: LoadedModel) -> LoadedModel:
        return replace(model, shape=replace(model.shape, sites=model.shape.sites - {"q"}))

    assert {spot.site for spot in broken(full, fewer).missing} == {"q"}


@pytest.mark.parametrize(
    "found",
    [
        Walked("a", KINDS[0], spots=1, smallest=SMALLEST / 2),
        Walked("a", KINDS[0], spots=1, smallest=1.0, difference=float("nan")),
        Walked("a", KINDS[0], spots=1, smallest=1.0, effect_error=1.0),
        Walked("a", KINDS[0], spots=1, smallest=1.0, single=1.0),
        Walked("a", KINDS[0], spots=0, smallest=1.0),
        Walked("a", KINDS[0], problems=["it broke"]),
    ],
)
def test_what_is_wrong_is_said(found: Walked) -> None:
    assert found.wrong()


def test_a_number_that_is_none_is_a_difference() -> None:
    found = Walked("a", KINDS[0])
    found.compare("here", float("nan"))
    found.compare_effect("there", float("nan"))
    assert (found.where, found.effect_where) == ("here", "there")
    assert not found.agrees
    assert torch.tensor(found.difference).isnan()
