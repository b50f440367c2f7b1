# pyright: reportUnknownMemberType=false
"""Attention can be computed here, from queries, keys, values and masks, as the model does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from mechdsl.hooks.loaded import LoadedModel, Outcome
from mechdsl.hooks.reads_and_writes import SiteRead
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.loading.verify.bench import Bench
from mechdsl.vocab.sites import WITHIN_ATTENTION

OPENED = "attention, opened = the model's own"
"""An identity that a model may break: it has none of the sites within attention then."""


def attention_opens(bench: Bench) -> Iterator[Outcome]:
    """With all patterns read, what heads return and the logits are the model's."""
    layers = bench.with_sites("z")
    if bench.stack or not layers:
        return
    within = [SiteRead("pattern", layer) for layer in layers]
    heads = [SiteRead("z", layer) for layer in layers]
    try:
        model = with_sites_within(bench.model)
        result = run_whole(model, bench.batch, reads=[*within, *heads])
    except Exception as error:  # a model that attends otherwise raises what it likes
        text = " ".join(str(error).split())[:100] or type(error).__name__
        yield Outcome(OPENED, float("inf"), bench.tolerance, failure=text)
        return

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        assert result.logits is not None
        yield "logits", bench.output(result.logits), bench.output(bench.logits)
        for read in heads:
            found = bench.real(result.reads[read])
            yield f"z, layer {read.layer}", found, bench.read("z", read.layer)

    yield bench.equal(OPENED, pairs())


def with_sites_within(model: LoadedModel) -> LoadedModel:
    """The model with the sites within attention, in the blocks that have heads."""
    shape = model.shape
    layers = model.anatomy.layers("z")
    partly = dict(shape.partly)
    if len(layers) < shape.n_layers:
        partly |= dict.fromkeys(WITHIN_ATTENTION, frozenset(layers))
    sizes = dict(shape.sizes)
    for (site, layer), size in shape.sizes.items():
        if site in ("q", "k"):
            sizes[f"{site}_rot", layer] = size
    return replace(
        model,
        shape=replace(shape, sites=shape.sites | set(WITHIN_ATTENTION), partly=partly, sizes=sizes),
    )
