"""Every site of every verified family against plain hooks (A1, A8).

The package gets ragged prompts in one padded batch, or many packed rows that start in the middle;
the reference gets each prompt alone, without mask or positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite, gather_vectors
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.packed.activation_cache import ActivationCache, record_activations
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.models.restart import Shortcuts
from mechdsl.models.shape import Anatomy, HookPoint, PaddingSide, TensorLayout
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES, stop_layer

from ..quick import in_turn, some
from ..reference.forward import (
    SITES,
    WITHOUT_LAYER,
    Changes,
    Place,
    Run,
    Write,
    forward,
    side_by_side,
)
from . import families

SIDED = in_turn(families.VERIFIED, ("left", "right"), families.VERIFIED_KINDS)

BASES = [[1, 9, 22, 31, 17, 40, 5, 28], [1, 14, 8, 51, 33], [1, 30, 11, 6, 45, 19]]
SOURCES = [[1, 12, 37, 5, 23], [1, 44, 29, 16, 50, 3, 21, 8], [1, 25, 42, 13]]
TOKENS = (7, 41)
"""Tokens of the logit difference, taken at the last token."""

ABSOLUTE = 1e-4
RELATIVE = 1e-3


@dataclass(frozen=True)
class Case:
    """A patch of one base prompt: read positions, written positions, units."""

    source: tuple[int, ...]
    base: tuple[int, ...]
    unit: tuple[int, ...]


def cases(count: int, seed: int) -> list[Case]:
    """Two positions per prompt, one of them the last token; some of `count` units at each.

    Effects of several heads at one position must add up; a single neuron may have almost none.
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
def _unpatched(family: str, ids: tuple[int, ...]) -> Run:
    return forward(family, _bare(family), ids)


def unpatched(family: str, ids: Sequence[int]) -> Run:
    return _unpatched(family, tuple(ids))


@cache
def expected(
    family: str, site: str, layer: int
) -> tuple[list[Case], list[Tensor], list[Tensor], list[Tensor]]:
    """The cases, then logits of each prompt: unpatched, patched, ablated with zero."""
    plain = [unpatched(family, base).logits for base in BASES]
    changed = [_changed(family, number)[site, layer] for number in range(len(BASES))]
    patched, ablated = zip(*changed, strict=True)
    return _cases_at(family, site, layer), plain, [*patched], [*ablated]


def _place(site: str, layer: int) -> Place:
    return site, None if site in WITHOUT_LAYER else layer


def _cases_at(family: str, site: str, layer: int) -> list[Case]:
    return cases(unpatched(family, BASES[0])[_place(site, layer)].shape[1], seed=layer)


@cache
def _changed(family: str, number: int) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """Logits of one prompt, patched and ablated, at every site of every layer."""
    seen = unpatched(family, SOURCES[number]).seen
    layers = _bare(family).config.num_hidden_layers
    cells = [(s, n) for s in available(family) for n in range(1 if s in WITHOUT_LAYER else layers)]
    each: list[Changes] = []
    for site, layer in cells:
        case, place = _cases_at(family, site, layer)[number], _place(site, layer)
        values = [seen[place][p, u] for p, u in zip(case.source, case.unit, strict=True)]
        writes = [
            Write(*place, v, p, u) for p, u, v in zip(case.base, case.unit, values, strict=True)
        ]
        zeros = [replace(write, vector=torch.zeros_like(write.vector)) for write in writes]
        each += [(writes, ()), (zeros, ())]
    runs = side_by_side(family, _bare(family), BASES[number], each)
    logits = [run.logits for run in runs]
    return dict(zip(cells, zip(logits[::2], logits[1::2], strict=True), strict=True))


@dataclass(frozen=True)
class Way:
    """How the package computes patched rows."""

    name: str
    packed: bool = True
    shortcuts: Shortcuts | None = None
    last: bool = False
    """Request only the last token's logits, so that the last block is cut."""


WHOLE = Way("whole", packed=False)
PACKED = Way("packed")
CUT = Way("packed, last token", last=True)
WAYS = (WHOLE, PACKED, CUT)
OFF: dict[str, Shortcuts] = {
    "resume": Shortcuts(resume=False),
    "inside": Shortcuts(inside=False),
    "prefix": Shortcuts(prefix=False),
    "last": Shortcuts(last=False),
    "all": Shortcuts(resume=False, inside=False, prefix=False, last=False),
}
"""Shortcuts by the name of the one that is switched off."""


def keep(model: LoadedModel, batch: Batch) -> ActivationCache:
    with record_activations(model, batch, 0) as kept:
        run_full(model, batch)
    return kept


def places(
    chosen: Sequence[int], lengths: Sequence[int], *, last: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, position) of every token of these rows, or of their last ones."""
    found = [
        (row, position)
        for row in chosen
        for position in range(lengths[row] - 1 if last else 0, lengths[row])
    ]
    row, position = np.array(found).T
    return row, position


def in_the_pass(
    model: LoadedModel,
    base: Batch,
    kept: ActivationCache | None,
    lanes: Sequence[int],
    writes: Sequence[SiteWrite],
    way: Way,
    tokens: Tensor | None = None,
) -> list[Tensor]:
    """Logits of each row, [T, vocab]; [1, vocab] if only the last token is requested."""
    lengths = [len(BASES[lane]) for lane in lanes]
    final = places(range(len(lanes)), lengths, last=way.last)
    if not way.packed:
        rows = base.take(torch.tensor(lanes))
        logits = run_full(model, rows, writes=writes, tokens=tokens).logits
        assert logits is not None
        row = torch.from_numpy(final[0])
        found = logits[row, rows.columns(row, torch.from_numpy(final[1]))]
    else:
        assert kept is not None
        found = run_packed(
            model,
            kept,
            np.array(lanes),
            writes=writes,
            final=final,
            tokens=tokens,
            shortcuts=way.shortcuts,
        ).logits
    return list(found.split([1 if way.last else n for n in lengths]))


def patches(
    model: LoadedModel,
    site: str,
    layer: int,
    source: Batch,
    reads: Mapping[SiteRead, Tensor],
    chosen: list[Case],
) -> SiteWrite:
    """Rows 0 to 2 are patched from the sources, rows 3 to 5 are ablated."""

    def column(field: str) -> Tensor:
        return torch.tensor([value for case in chosen for value in getattr(case, field)])

    rows = torch.tensor([i for i, case in enumerate(chosen) for _ in case.unit])
    where = site_of(site, layer)
    values = gather_vectors(reads[where], source, rows, column("source"), column("unit"))
    return SiteWrite(
        site,
        where.layer,
        torch.cat([rows, rows + len(BASES)]),
        column("base").repeat(2),
        column("unit").repeat(2),
        torch.cat([values, torch.zeros_like(values)]),
    )


def site_of(site: str, layer: int) -> SiteRead:
    return SiteRead(site, None if site in WITHOUT_LAYER else layer)


def layers_of(model: LoadedModel, site: str) -> range:
    return range(1) if site in WITHOUT_LAYER else range(model.shape.n_layers)


def compare(
    model: LoadedModel, family: str, site: str, side: PaddingSide, ways: Sequence[Way] = WAYS
) -> tuple[float, float, float]:
    """Largest absolute and relative error of the logits, and the smallest effect."""
    worst = relative = 0.0
    smallest = float("inf")
    base = Batch.of(BASES, model.pad_id, side)
    source = Batch.of(SOURCES, model.pad_id, side)
    kept = keep(model, base) if any(way.packed for way in ways) else None
    for layer in layers_of(model, site):
        chosen, plain, patched, ablated = expected(family, site, layer)
        where = site_of(site, layer)
        stop = stop_layer(site, where.layer, model.shape.n_layers)
        reads = run_full(model, source, reads=[where], stop=stop).reads
        write = patches(model, site, layer, source, reads, chosen)
        for way in ways:
            rows = in_the_pass(model, base, kept, [0, 1, 2, 0, 1, 2], [write], way)
            for i, (got, want) in enumerate(zip(rows, [*patched, *ablated], strict=True)):
                before = plain[i % len(plain)]
                worst = max(worst, _furthest(got, want[-len(got) :]))
                effect = _difference(want) - _difference(before)
                error = abs(_difference(got) - _difference(before) - effect)
                relative = max(relative, error / max(abs(effect), 1e-2))
                smallest = min(smallest, float((want - before)[-1].abs().max()))
    return worst, relative, smallest


def _furthest(got: Tensor, want: Tensor) -> float:
    """The largest difference; infinite where one isn't a number."""
    assert got.shape == want.shape
    return float((got - want).abs().nan_to_num(nan=float("inf")).max())


def _difference(logits: Tensor) -> float:
    return float(logits[-1, TOKENS[0]] - logits[-1, TOKENS[1]])


def available(family: str) -> list[str]:
    parallel = family == "gpt_neox"
    return [site for site in SITES if not (parallel and site == "resid_mid")]


@pytest.mark.parametrize(("family", "side"), SIDED)
def test_patches_and_ablations_of_every_site_equal_hooks(
    loaded: dict[str, LoadedModel], family: str, side: PaddingSide
) -> None:
    """In full and packed passes, with logits of all tokens and of the last token alone."""
    for site in available(family):
        held(loaded[family], family, site, side, WAYS)


def held(
    model: LoadedModel, family: str, site: str, side: PaddingSide, ways: Sequence[Way]
) -> None:
    """Check that the package's logits for writes at a site equal those of plain hooks."""
    worst, relative, smallest = compare(model, family, site, side, ways)
    assert worst <= ABSOLUTE, f"{site}: logits off by {worst:.1e}"
    assert relative <= RELATIVE, f"{site}: effect off by {relative:.1e}"
    assert smallest > 1e-3, f"{site}: a write without effect proves nothing"


@pytest.mark.slow
@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("family", families.VERIFIED)
def test_patches_with_a_shortcut_off_equal_hooks(
    loaded: dict[str, LoadedModel], family: str, off: str
) -> None:
    """Tested site by site; the next test packs all sites into joint passes."""
    side: PaddingSide = "left" if len(off) % 2 else "right"
    ways = [Way(off, shortcuts=OFF[off]), Way(f"{off}, last", shortcuts=OFF[off], last=True)]
    for site in available(family):
        held(loaded[family], family, site, side, ways)


def joined(
    model: LoadedModel, family: str, side: PaddingSide
) -> tuple[Batch, list[int], list[SiteWrite], list[Tensor], list[str]]:
    """All cases of all sites and layers as rows of one pass, shuffled.

    The base prompts, each row's lane, the writes, the reference's logits and what each row is.
    """
    source = Batch.of(SOURCES, model.pad_id, side)
    cells = [(s, layer) for s in available(family) for layer in layers_of(model, s)]
    reads = run_full(model, source, reads=[site_of(*cell) for cell in cells]).reads
    rows = 2 * len(BASES)
    order = list(range(rows * len(cells)))
    random.Random(1).shuffle(order)
    place = torch.tensor(order)
    lanes, wanted = [0] * len(order), [torch.zeros(0)] * len(order)
    names, writes = [""] * len(order), list[SiteWrite]()
    for number, (site, layer) in enumerate(cells):
        chosen, _, patched, ablated = expected(family, site, layer)
        write = patches(model, site, layer, source, reads, chosen)
        mine = place[number * rows : (number + 1) * rows]
        writes.append(write.moved(mine))
        for i, want in enumerate([*patched, *ablated]):
            row = int(mine[i])
            lanes[row], wanted[row], names[row] = i % len(BASES), want, f"{site} layer {layer}"
    return Batch.of(BASES, model.pad_id, side), lanes, writes, wanted, names


@pytest.mark.parametrize(("family", "side"), SIDED)
def test_packed_rows_of_all_sites_layers_and_prompts_equal_hooks(
    loaded: dict[str, LoadedModel], family: str, side: PaddingSide
) -> None:
    model = loaded[family]
    base, lanes, writes, wanted, names = joined(model, family, side)
    kept = keep(model, base)
    assert len(lanes) > 230
    ways = [
        Way(f"{off}, last" if last else off, shortcuts=each, last=last)
        for off, each in OFF.items()
        for last in (False, True)
    ]
    for way in (PACKED, CUT, *ways):
        rows = in_the_pass(model, base, kept, lanes, writes, way)
        for got, want, name in zip(rows, wanted, names, strict=True):
            assert _furthest(got, want[-len(got) :]) <= ABSOLUTE, f"{way.name}: {name}"


@pytest.mark.parametrize(("family", "side"), SIDED)
def test_logits_of_selected_tokens_equal_a_slice_of_all(
    loaded: dict[str, LoadedModel], family: str, side: PaddingSide
) -> None:
    model = loaded[family]
    base, lanes, writes, wanted, names = joined(model, family, side)
    writes = [write for write in writes if write.site != "logits"]
    some = torch.tensor([TOKENS[1], 0, TOKENS[0], families.VOCABULARY - 1])
    kept = keep(model, base)
    for way in WAYS:
        rows = in_the_pass(model, base, kept, lanes, writes, way, some)
        for got, want, name in zip(rows, wanted, names, strict=True):
            if not name.startswith("logits"):
                assert _furthest(got, want[-len(got) :, some]) <= ABSOLUTE, f"{way.name}: {name}"


@pytest.mark.parametrize("family", some(families.VERIFIED, families.VERIFIED_KINDS))
def test_reads_of_every_site_equal_hooks(loaded: dict[str, LoadedModel], family: str) -> None:
    model = loaded[family]
    batch = Batch.of(BASES, model.pad_id, "left")
    for layer in range(model.shape.n_layers):
        wanted = {site: site_of(site, layer) for site in available(family)}
        reads = run_full(model, batch, reads=list(wanted.values())).reads
        for i, base in enumerate(BASES):
            seen = unpatched(family, base)
            for site, where in wanted.items():
                got, want = reads[where][i, -len(base) :], seen[site, where.layer]
                assert got.shape == want.shape, site
                assert float((got - want).abs().max()) <= ABSOLUTE, site


def test_shape_sites_are_those_of_the_reference(loaded: dict[str, LoadedModel]) -> None:
    for family in families.VERIFIED:
        assert loaded[family].shape.sites == {*available(family), *ATTENTION_INTERNAL_SITES}


def in_all(anatomy: Anatomy, site: str) -> HookPoint:
    """A site's tap, with `{layer}` in its path."""
    tap = anatomy.blocks[0].taps[site]
    return replace(tap, path=tap.path.replace(".0.", ".{layer}."))


def with_blocks(anatomy: Anatomy, **changed: HookPoint) -> Anatomy:
    """Replace taps in all blocks; `{layer}` in a path is the block's number."""
    blocks = [
        block.with_taps(
            **{
                site: replace(tap, path=tap.path.replace("{layer}", str(number)))
                for site, tap in changed.items()
            }
        )
        for number, block in enumerate(anatomy.blocks)
    ]
    return replace(anatomy, blocks=tuple(blocks))


def _with_tap(model: LoadedModel, site: str, tap: HookPoint) -> LoadedModel:
    return replace(model, anatomy=with_blocks(model.anatomy, **{site: tap}))


def _swapped(model: LoadedModel) -> LoadedModel:
    return _with_tap(model, "v", in_all(model.anatomy, "k"))


def _interleaved(model: LoadedModel) -> LoadedModel:
    heads, d = model.shape.blocks[0].heads, model.shape.blocks[0].d_head
    layout = TensorLayout(heads, d, offset=2 * d, stride=3 * d)
    return _with_tap(model, "v", replace(in_all(model.anatomy, "v"), layout=layout))


@pytest.mark.parametrize(("family", "broken"), [("llama", _swapped), ("gpt2", _interleaved)])
def test_comparison_fails_on_a_wrong_tap(
    loaded: dict[str, LoadedModel], family: str, broken: Callable[[LoadedModel], LoadedModel]
) -> None:
    worst, relative, _ = compare(broken(loaded[family]), family, "v", "left")
    assert worst > ABSOLUTE
    assert relative > RELATIVE


def test_comparison_fails_on_a_hook_that_misses_the_residual_branch(
    loaded: dict[str, LoadedModel],
) -> None:
    """Writing `resid_mid` only at the second norm's input leaves the residual stream as is."""
    model = loaded["llama"]
    norm = model.anatomy.blocks[0].mlp_norm
    assert norm is not None
    norm = norm.replace(".0.", ".{layer}.")
    tap = HookPoint(norm, "in", TensorLayout.whole(model.shape.d_model))
    worst, relative, _ = compare(_with_tap(model, "resid_mid", tap), "llama", "resid_mid", "left")
    assert worst > ABSOLUTE
    assert relative > RELATIVE


def test_comparison_fails_when_positions_ignore_padding(
    loaded: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batch, "columns", lambda self, rows, positions: positions)
    worst, _, _ = compare(loaded["gpt2"], "gpt2", "resid_pre", "left")
    assert worst > ABSOLUTE
