"""What stands in for the sizes of a model that isn't at hand."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.models.shape import ModelShape
from mechdsl.vocab.sites import SITES

LEAST, MOST = 12, 200
"""Layers, heads and the like: at least as many as a small model has, at most what can be real."""


def stand_in_shape(largest: Mapping[str, int]) -> ModelShape:
    """A model with every site, with as many heads, neurons and experts as are named, and a layer
    more: a path may lead on from the last one that is.

    largest: the highest index of each (`layer`, `head`, …) that a file names. So whatever is found
    wrong with a file that is checked against it would be wrong on a real model too, but for what
    `Diagnostic.hangs_on` names.
    """
    named = {word: largest.get(word, 0) + 1 for word in ("layer", "head", "expert")}
    named["layer"] += 1
    sizes = {word: min(MOST, max(LEAST, number)) for word, number in named.items()}
    return ModelShape(
        architecture="",
        family="",
        n_layers=sizes["layer"],
        n_heads=sizes["head"],
        n_kv_heads=sizes["head"],
        d_model=sizes["head"],
        d_head=1,
        d_mlp=max(LEAST, largest.get("neuron", 0) + 1),
        vocab_size=1,
        max_positions=None,
        parallel_block=False,
        sites=frozenset(SITES),
        d_value=1,
        d_embed=sizes["head"],
        n_experts=sizes["expert"],
        causal=True,
        stands_in=True,
    )
