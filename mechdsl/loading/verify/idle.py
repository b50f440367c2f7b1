# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Parts without effect: whatever is written there, the output stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from mechdsl.hooks.batch import Batch
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.loading.probe import texts
from mechdsl.loading.verify.bench import TOKENS_PER_PASS, Bench, sites_of, with_images
from mechdsl.loading.verify.writing import whole_site

_ROUNDING = 16
"""Multiples of the spacing of numbers that rounding may move an output by."""


def idle_sites(model: LoadedModel, given: Batch, stack: str = "") -> list[tuple[str, int | None]]:
    """(site, layer) where noise at every token of the first prompt leaves the output as it is.

    given: what the model is run on, two rows. Images are left out: what the language model sees of
    them isn't the output of their encoder.
    """
    if stack == "vision":
        return []
    with torch.inference_mode():
        bench = Bench.of(model, stack, texts(model) if with_images(given) else given)
        places = [read for read in bench.reads if read.stack == stack]
        own = [read for read in places if read.site in sites_of(model, stack)]
        at_once = max(1, TOKENS_PER_PASS // max(bench.batch.ids.shape[1], bench.own.ids.shape[1]))
        idle: list[SiteRead] = []
        for first in range(0, len(own), at_once):
            idle += _unmoved(bench, own[first : first + at_once])
    return [(read.site, read.layer) for read in idle]


def _unmoved(bench: Bench, places: list[SiteRead]) -> list[SiteRead]:
    """Those of the places where noise does nothing, each in a row of its own."""
    generator = torch.Generator().manual_seed(0)
    writes: list[SiteWrite] = []
    for row, read in enumerate(places):
        tokens = bench.batch.of_site(read.site, bench.stack)
        values = bench.real_of(0, bench.reads[read], tokens)
        # As large as what is there, and large enough where nothing is.
        size = max(1.0, float(values.double().std(unbiased=False)))
        noise = torch.randn(values.shape, generator=generator).to(values) * size
        writes.append(whole_site(read, row, range(len(values)), noise))
    batch = bench.batch.take(torch.zeros(len(places), dtype=torch.long))
    after = run_whole(bench.model, batch, writes=writes).logits
    assert after is not None
    return [read for row, read in enumerate(places) if _same(after[row], bench.logits[0])]


def _same(after: Tensor, before: Tensor) -> bool:
    """Whether two outputs are one but for rounding: of each number of the output by itself, as some
    may be a million times as large as others."""
    room = _ROUNDING * torch.finfo(before.dtype).eps * before.abs().amax(0, keepdim=True)
    return bool(((after - before).abs() <= room).all())
