"""Every site of every verified family against hooks written by hand (A1, A8).

The package gets ragged prompts in one padded batch and may start above the embedding; the
reference gets each prompt alone, without mask or positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mechdsl.hooks import Batch, SiteRead, SiteWrite, gather, run_segment
from mechdsl.loaded import LoadedModel
from mechdsl.models.anatomy import Layout, Tap
from mechdsl.vocab.sites import start_layer, stop_layer

from . import families, reference

Side = Literal["left", "right"]

BASES = [[1, 9, 22, 31, 17, 40, 5, 28], [1, 14, 8, 51, 33], [1, 30, 11, 6, 45, 19]]
SOURCES = [[1, 12, 37, 5, 23], [1, 44, 29, 16, 50, 3, 21, 8], [1, 25, 42, 13]]
TOKENS = (7, 41)
"""The logit difference is between these, at the last token."""

ABSOLUTE = 1e-4
RELATIVE = 1e-3


@dataclass(frozen=True)
class Case:
    """What is written into one base prompt: read positions, written positions, units."""

    source: tuple[int, ...]
    base: tuple[int, ...]
    unit: tuple[int, ...]


def cases(count: int, seed: int) -> list[Case]:
    """Two positions per prompt, one of them the last token; some of `count` units at each.

    Several heads at one position have to add up, and one neuron alone may do next to nothing.
    """
    draw = random.Random(seed)
    made: list[Case] = []
    for source, base in zip(SOURCES, BASES, strict=True):
        chosen = draw.sample(range(count), 1 if count == 1 else 2 if count < 8 else 8)
        read = (draw.randrange(1, len(source)), len(source) - 1)
        written = (draw.randrange(1, len(base) - 1), len(base) - 1)
        made.append(
            Case(
                tuple(p for p in read for _ in chosen),
                tuple(p for p in written for _ in chosen),
                tuple(chosen) * 2,
            )
        )
    return made


@cache
def _bare(family: str) -> Any:
    return families.module(family)


@cache
def expected(
    family: str, site: str, layer: int
) -> tuple[list[Case], list[Tensor], list[Tensor], list[Tensor]]:
    """The cases, then logits of each prompt: unpatched, patched, ablated with zero."""
    model = _bare(family)
    _, sample = reference.run(family, model, BASES[0], layer)
    chosen = cases(sample[site].shape[1], seed=layer)
    plain, patched, ablated = [], [], []
    for case, source, base in zip(chosen, SOURCES, BASES, strict=True):
        _, seen = reference.run(family, model, source, layer)
        values = [seen[site][p, u] for p, u in zip(case.source, case.unit, strict=True)]
        places = list(zip(case.base, case.unit, values, strict=True))
        changes = [reference.Change(p, u, v) for p, u, v in places]
        zeros = [reference.Change(p, u, torch.zeros_like(v)) for p, u, v in places]
        plain.append(reference.run(family, model, base, layer)[0])
        patched.append(reference.run(family, model, base, layer, site, changes)[0])
        ablated.append(reference.run(family, model, base, layer, site, zeros)[0])
    return chosen, plain, patched, ablated


def found(
    model: LoadedModel, site: str, layer: int, side: Side, chosen: list[Case], start: int
) -> Tensor:
    """[2 × prompts, T, vocab]: patched and ablated logits, all in one batch."""
    n = len(BASES)
    at = None if site in reference.WITHOUT_LAYER else layer
    base = Batch.of(BASES, model.pad_id, side)
    source = Batch.of(SOURCES, model.pad_id, side)

    def column(field: str) -> Tensor:
        return torch.tensor([value for case in chosen for value in getattr(case, field)])

    rows = torch.tensor([i for i, case in enumerate(chosen) for _ in case.unit])
    where = SiteRead(site, at)
    stop = stop_layer(site, at, model.shape.n_layers)
    read = run_segment(model, source, reads=[where], stop=stop).reads[where]
    values = gather(read, source, rows, column("source"), column("unit"))

    hidden = None
    if start:
        below = SiteRead("resid_post", start - 1)
        hidden = run_segment(model, base, reads=[below], stop=start).reads[below].squeeze(2)
        hidden = hidden.repeat(2, 1, 1)
    write = SiteWrite(
        site,
        at,
        torch.cat([rows, rows + n]),
        column("base").repeat(2),
        column("unit").repeat(2),
        torch.cat([values, torch.zeros_like(values)]),
    )
    both = base.take(torch.arange(n).repeat(2))
    result = run_segment(model, both, start=start, hidden=hidden, writes=[write])
    assert result.logits is not None
    return result.logits


def compare(model: LoadedModel, family: str, site: str, side: Side) -> tuple[float, float, float]:
    """Largest difference of logits, the same relative to the effect, and the smallest effect."""
    worst = relative = 0.0
    smallest = float("inf")
    layers = range(1) if site in reference.WITHOUT_LAYER else range(model.shape.n_layers)
    for layer in layers:
        chosen, plain, patched, ablated = expected(family, site, layer)
        at = None if site in reference.WITHOUT_LAYER else layer
        for start in {0, start_layer(site, at, model.shape.n_layers)}:
            logits = found(model, site, layer, side, chosen, start)
            for i, want in enumerate([*patched, *ablated]):
                length = len(want)
                columns = slice(-length, None) if side == "left" else slice(length)
                got = logits[i, columns]
                worst = max(worst, float((got - want).abs().max()))
                before = _difference(plain[i % len(plain)])
                effect = _difference(want) - before
                error = abs(_difference(got) - before - effect)
                relative = max(relative, error / max(abs(effect), 1e-2))
                smallest = min(smallest, float((want - plain[i % len(plain)])[-1].abs().max()))
    return worst, relative, smallest


def _difference(logits: Tensor) -> float:
    return float(logits[-1, TOKENS[0]] - logits[-1, TOKENS[1]])


def available(family: str) -> list[str]:
    parallel = family == "gpt_neox"
    return [site for site in reference.SITES if not (parallel and site == "resid_mid")]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", families.VERIFIED)
def test_every_site_is_patched_and_ablated_as_by_hand(
    loaded: dict[str, LoadedModel], family: str, side: Side
) -> None:
    model = loaded[family]
    for site in available(family):
        worst, relative, smallest = compare(model, family, site, side)
        assert worst <= ABSOLUTE, f"{site}: logits off by {worst:.1e}"
        assert relative <= RELATIVE, f"{site}: effect off by {relative:.1e}"
        assert smallest > 1e-3, f"{site}: a write without effect proves nothing"


@pytest.mark.parametrize("family", families.VERIFIED)
def test_every_site_is_read_as_by_hand(loaded: dict[str, LoadedModel], family: str) -> None:
    model = loaded[family]
    batch = Batch.of(BASES, model.pad_id, "left")
    for layer in range(model.shape.n_layers):
        wanted = {
            site: SiteRead(site, None if site in reference.WITHOUT_LAYER else layer)
            for site in available(family)
        }
        reads = run_segment(model, batch, reads=list(wanted.values())).reads
        for i, base in enumerate(BASES):
            _, seen = reference.run(family, _bare(family), base, layer)
            for site, where in wanted.items():
                got = reads[where][i, -len(base) :]
                assert got.shape == seen[site].shape, site
                assert float((got - seen[site]).abs().max()) <= ABSOLUTE, site


def test_available_sites_are_the_models(loaded: dict[str, LoadedModel]) -> None:
    for family in families.VERIFIED:
        assert loaded[family].shape.sites == set(available(family))


def _with_tap(model: LoadedModel, site: str, tap: Tap) -> LoadedModel:
    return replace(model, anatomy=replace(model.anatomy, taps={**model.anatomy.taps, site: tap}))


def _swapped(model: LoadedModel) -> LoadedModel:
    return _with_tap(model, "v", model.anatomy.taps["k"])


def _interleaved(model: LoadedModel) -> LoadedModel:
    heads, d = model.shape.n_heads, model.shape.d_head
    layout = Layout(heads, d, offset=2 * d, stride=3 * d)
    return _with_tap(model, "v", replace(model.anatomy.taps["v"], layout=layout))


@pytest.mark.parametrize(("family", "broken"), [("llama", _swapped), ("gpt2", _interleaved)])
def test_the_comparison_fails_on_a_wrong_tap(
    loaded: dict[str, LoadedModel], family: str, broken: Callable[[LoadedModel], LoadedModel]
) -> None:
    worst, relative, _ = compare(broken(loaded[family]), family, "v", "left")
    assert worst > ABSOLUTE
    assert relative > RELATIVE


def test_the_comparison_fails_on_a_hook_that_misses_the_residual_branch(
    loaded: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resid_mid` written on the second norm's input alone leaves the stream as it was."""
    model = loaded["llama"]
    norm = model.anatomy.mlp_norm
    assert norm is not None
    tap = Tap(norm, "in", Layout.whole(model.shape.d_model))
    monkeypatch.setattr("mechdsl.hooks._Work._between", _norm_only)
    worst, relative, _ = compare(_with_tap(model, "resid_mid", tap), "llama", "resid_mid", "left")
    assert worst > ABSOLUTE
    assert relative > RELATIVE


def _norm_only(work: Any, places: Any, reads: Any, layer: int) -> Any:
    return work._direct(places, reads, Layout.whole(work.model.shape.d_model))


def test_the_comparison_fails_when_padding_is_forgotten(
    loaded: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batch, "columns", lambda self, rows, positions: positions)
    worst, _, _ = compare(loaded["gpt2"], "gpt2", "resid_pre", "left")
    assert worst > ABSOLUTE
