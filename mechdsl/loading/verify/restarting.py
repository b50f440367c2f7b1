# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Rows that compute only what changes give what whole passes give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mechdsl.hooks.attention_functions import CannotPack
from mechdsl.hooks.batch import Batch
from mechdsl.hooks.loaded import LoadedModel, Outcome
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.loading.probe import texts
from mechdsl.loading.verify.bench import Bench, hundredfold, layers_of, sites_of, with_images
from mechdsl.loading.verify.writing import label_of, whole_site
from mechdsl.packed.activation_cache import keeping
from mechdsl.packed.packed_pass import run_packed
from mechdsl.vocab.sites import SITES

RESTART = "rows restarted at a block and token = whole passes"
"""An identity that a model may break: every row is a whole pass then."""
RESTART_IMAGES = "rows restarted at a block and token = whole passes (with an image)"
"""The same of rows with an image."""

_PREFIXES = ((2, 4), (1, 2))
"""Of each prompt, the tokens that rows are restarted at."""
_OF_SOME = 2
"""Rows that are also restarted for the logits of some tokens alone, which the last map makes."""


def rows_can_be_restarted(bench: Bench) -> Iterator[Outcome]:
    """From every block, at one token or another, and at every site of one block: with other values
    than the model's own, so that a part that is wrongly taken over shows."""
    try:
        encodes = bench.model.shape.takes in ("two texts", "audio")
        if encodes and "cross" not in bench.model.others:
            raise CannotPack("its decoder attends to its own tokens and an encoder's at once")
        if bench.anatomy.whole:
            raise CannotPack(bench.anatomy.whole)
        yield _restarted(bench)
    except Exception as error:  # a model that is built otherwise raises what it likes
        text = " ".join(str(error).split())[:100] or type(error).__name__
        yield Outcome(RESTART, float("inf"), bench.tolerance, failure=text)


def restarted_otherwise(model: LoadedModel, given: Batch) -> tuple[LoadedModel, Outcome] | None:
    """The model called with one prompt where calling it with tokens of many rows failed, with what
    came of it; None where there is no other way."""
    encodes = model.shape.takes in ("two texts", "audio")
    if model.calling.packs == "one prompt" or encodes or model.anatomy.whole:
        return None
    given = texts(model) if with_images(given) else given
    other = replace(model, calling=replace(model.calling, packs="one prompt"))
    with torch.inference_mode():
        outcome = next(rows_can_be_restarted(Bench.of(other, "", given)))
    return (other, outcome) if outcome.passed else None


def _restarted(bench: Bench) -> Outcome:
    model = bench.model
    # Of rows with images fewer places are tried, and the last tokens looked at.
    seeing = with_images(bench.batch)
    # From the last block backwards: the first rows are those that compute least.
    streams = [*(bench.some("resid_pre") if seeing else bench.with_sites("resid_pre"))][::-1]
    places = [(lane, which) for which in range(2) for lane in range(len(bench.batch))]
    starts = [("resid_pre", at, *places[n % len(places)]) for n, at in enumerate(streams[:-1])]
    # Where the whole prompt may take part, every place is tried.
    starts += [("resid_pre", layer, *place) for layer in streams[-1:] for place in places]
    starts += [("embed", None, *place) for place in places if "embed" in sites_of(model, "")]
    for name in sites_of(model, ""):
        layers = layers_of(model.anatomy, name) if SITES[name].has_layer else (None,)
        if name not in ("embed", "logits"):
            starts.append((name, layers[len(layers) // 2], *places[len(starts) % len(places)]))
    lanes = np.array([lane for _, _, lane, _ in starts])
    lengths = bench.batch.lengths.numpy()[lanes]
    writes: list[SiteWrite] = []
    tokens: list[int] = []
    for number, (name, layer, lane, which) in enumerate(starts):
        at = max(0, min(_PREFIXES[lane][which], int(lengths[number]) - 1 - which))
        own = bench.read_of(lane, name, layer)[at]
        values = hundredfold(own, name, model.anatomy)[None] / 50
        writes.append(whole_site(SiteRead(name, layer), number, (at,), values))
        tokens.append(at)
    batch = bench.batch.take(torch.from_numpy(lanes))
    seen = [range(max(0, n - 3) if seeing else 0, n) for n in lengths.tolist()]
    number = np.repeat(np.arange(len(starts)), [len(one) for one in seen])
    position = np.array([at for one in seen for at in one])
    wanted = torch.tensor([list(one) for one in seen]) if seeing else None
    expected = run_whole(model, batch, writes=writes, logits_at=wanted).logits
    assert expected is not None
    if model.shape.takes == "image" and model.calling.reads != "every token":
        number = np.arange(len(starts))  # one output for each
    some = torch.arange(0, model.shape.outputs, 2)

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        with keeping(model, bench.batch, 0) as kept:
            run_whole(model, bench.batch)
        ends: list[tuple[str, int, Tensor | None]] = [("", len(starts), None)]
        if model.anatomy.unembedding is not None:
            ends.append((", some tokens", _OF_SOME, some))
        for end, rows, columns in ends:
            count = int(np.searchsorted(number, rows))
            result = run_packed(
                model,
                kept,
                lanes[:rows],
                writes=writes[:rows],
                final=(number[:count], position[:count]),
                tokens=columns,
            )
            for i, (name, layer, *_) in enumerate(starts[:rows]):
                whole = expected[i] if seeing else bench.real_of(i, expected, batch)
                whole = whole if columns is None else whole[:, columns]
                whole = whole[None] if whole.dim() == 1 else whole
                where = f"{label_of(name, layer)}, token {tokens[i]}{end}"
                yield where, result.logits[number[:count] == i], whole

    exact = model.dtype in (torch.float32, torch.float64)
    return bench.equal(RESTART, pairs(), bench.tolerance / 10 if exact else bench.tolerance)
