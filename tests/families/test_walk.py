"""Every architecture of the tables compared with the reference, and comparisons that must fail."""

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
from mechdsl.models.shape import HookPoint

from ..quick import some
from ..reference import hooks
from . import tables
from .__main__ import PAGE, cells, image_tokens, prepare, reason
from .parts import Architecture, Refused
from .unlisted import written_section
from .walk import KINDS, SMALLEST, Walked, kind, walk

ROWS = {row.name: row for row in tables.every()}
QUICK = ("gpt2", "mamba", "bert", "t5", "llava")
LEAST: dict[str, int] = dict(zip(KINDS, (60, 8, 3, 6, 4), strict=True))
"""Minimum number of architectures of each kind, without variants."""

REFUSED: dict[str, str] = {
    **dict.fromkeys(("convbert", "fnet", "nystromformer", "yoso"), "padding changes its output"),
    **dict.fromkeys(("led", "pegasus_x"), "its encoder pads prompts to whole"),
    "t5gemma2": "its decoder attends to its own and the encoder's tokens in one operation",
    "switch_transformers": "each expert takes a fixed number of the tokens processed together",
}
"""Architectures that are in the tables with sites but that the package rejects, with part of
its message."""


@cache
def recorded() -> dict[str, list[str]]:
    """Cells of the row in `docs/models.md`, by name."""
    text = PAGE.read_text(encoding="utf-8").replace(written_section(), "")
    rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in text.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): row for row in rows}


@pytest.mark.parametrize("name", some(ROWS, QUICK))
def test_every_site_of_an_architecture_equals_hooks_and_is_documented(name: str) -> None:
    """The page lists the sites, whether rows can start in the middle, and why a model is
    rejected."""
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


def test_enough_architectures_of_each_kind_are_supported() -> None:
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


def test_rejected_architectures_are_in_the_tables() -> None:
    assert set(REFUSED) <= set(ROWS)
    assert not any(isinstance(ROWS[name], Refused) for name in REFUSED)


def test_encoder_decoder_with_dependent_rows_is_rejected_with_the_cause() -> None:
    prepare()
    for name in ("switch_transformers", "t5gemma2"):
        assert REFUSED[name] in walk(ROWS[name]).refused


# --- detected faults ------------------------------------------------------------------------------


def row(name: str) -> Architecture:
    found = ROWS[name]
    assert isinstance(found, Architecture)
    return found


def broken(row: Architecture, change: Callable[[LoadedModel], LoadedModel] | None = None) -> Walked:
    """Compare an architecture with a fault that exceeds rounding."""
    return walk(row, change, finer=False)


def retapped(model: LoadedModel, **taps: Callable[[Any], HookPoint]) -> LoadedModel:
    """The model with other taps; each function makes a site's tap from the block's taps."""
    blocks = [
        block.with_taps(**{site: make(block.taps) for site, make in taps.items()})
        for block in model.anatomy.blocks
    ]
    return replace(model, anatomy=replace(model.anatomy, blocks=tuple(blocks)))


def test_walk_detects_keys_taken_for_values() -> None:
    found = broken(row("llama"), lambda model: retapped(model, v=lambda taps: taps["k"]))
    assert not found.agrees
    assert any(" v " in text and "off by" in text for text in found.wrong())


@pytest.mark.slow
def test_walk_detects_shifted_heads() -> None:
    """The offset of all heads is wrong by one feature."""

    def shifted(taps: Any) -> HookPoint:
        q = taps["q"]
        return replace(q, layout=replace(q.layout, offset=q.layout.offset + 1))

    found = broken(row("gpt2"), lambda model: retapped(model, q=shifted))
    assert any(" q " in text and "off by" in text for text in found.wrong())


@pytest.mark.slow
def test_walk_reports_a_tap_at_a_missing_module() -> None:
    def lost(taps: Any) -> HookPoint:
        return replace(taps["z"], path="nowhere")

    found = broken(row("gpt2"), lambda model: retapped(model, z=lost))
    assert any("reading z 1" in text for text in found.wrong())


@pytest.mark.slow
def test_walk_detects_a_reference_with_shifted_positions(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_walk_detects_ignored_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "columns", lambda self, rows, positions: positions)
    assert not broken(row("gpt2")).agrees


def test_walk_detects_wrong_values_in_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full passes agree, packed rows don't."""

    def louder(*args: Any, writes: Sequence[SiteWrite], **more: Any) -> PackedResult:
        writes = [replace(write, values=write.values * 1.01) for write in writes]
        return run_packed(*args, writes=writes, **more)

    monkeypatch.setattr(f"{walk.__module__}.run_packed", louder)
    found = broken(row("gpt2"))
    assert not found.agrees
    assert "packed" in found.where


@pytest.mark.slow
def test_walk_lists_missing_and_extra_sites() -> None:
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
def test_each_defect_of_a_walk_is_reported(found: Walked) -> None:
    assert found.wrong()


def test_nan_in_a_walk_counts_as_a_difference() -> None:
    found = Walked("a", KINDS[0])
    found.compare("here", float("nan"))
    found.compare_effect("there", float("nan"))
    assert (found.where, found.effect_where) == ("here", "there")
    assert not found.agrees
    assert torch.tensor(found.difference).isnan()
