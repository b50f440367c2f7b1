"""Path patching by its definition, without shortcuts.

A path leads from senders to receivers. In a first pass the senders have what the source run has
there, every other head's z and, unless paths may lead through MLPs, every other MLP's output what
the base run has; what the receivers get then is written in a second pass, in which nothing else is
held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..reference.forward import Run, Write, forward, side_by_side

SENDERS = (
    "embed",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "z",
    "head_out",
    "attn_out",
    "mlp_hidden",
    "mlp_out",
)
RECEIVERS = ("resid_pre", "q", "k", "v", "attn_norm", "mlp_norm", "final_norm", "logits")
LAST = ("final_norm", "logits")


@dataclass(frozen=True)
class End:
    """Where a path starts or ends; unit None stands for all heads or neurons."""

    site: str
    layer: int | None = None
    unit: int | None = None


def leads(sender: End, receiver: End, *, parallel: bool) -> bool:
    """Whether the sender is part of the stream before the receiver reads it."""
    if receiver.site in LAST or sender.site == "embed":
        return True
    assert sender.layer is not None
    assert receiver.layer is not None
    if sender.layer < receiver.layer:
        return True
    if sender.layer > receiver.layer:
        return False
    if receiver.site == "resid_pre":
        return False
    before_the_block = sender.site == "resid_pre"
    between = sender.site in ("z", "head_out", "attn_out", "resid_mid")
    if receiver.site == "mlp_norm" and not parallel:
        return before_the_block or between
    return before_the_block


def copied(
    ends: Sequence[End], run: Run, read: Sequence[int], written: Sequence[int]
) -> list[Write]:
    """Writes that carry values of one run over to another, from position to position."""
    found: list[Write] = []
    for end in ends:
        value = run[end.site, end.layer]
        for unit in range(value.shape[1]) if end.unit is None else [end.unit]:
            found.extend(
                Write(end.site, end.layer, value[origin, unit], target, unit)
                for origin, target in zip(read, written, strict=True)
            )
    return found


def held(base: Run, senders: Sequence[End], layers: int, *, mlps: bool) -> list[Write]:
    """Hold all but the senders at the base run's value; values of senders are written later.

    An MLP with neurons as senders is held neuron by neuron; its output is the sum over neurons.
    """
    found: list[Write] = []
    for layer in range(layers):
        places = ["z"]
        if not mlps:
            neurons = any(s.site == "mlp_hidden" and s.layer == layer for s in senders)
            places.append("mlp_hidden" if neurons else "mlp_out")
        for place in places:
            found.append(Write(place, layer, base[place, layer]))
    return found


_PLAIN: dict[tuple[str, tuple[int, ...]], Run] = {}


def plain(name: str, model: Any, ids: Sequence[int]) -> Run:
    """The unpatched run of a prompt; there is one model of a name."""
    key = (name, tuple(ids))
    if key not in _PLAIN:
        _PLAIN[key] = forward(name, model, ids)
    return _PLAIN[key]


@dataclass(frozen=True)
class Way:
    """A path from senders to receivers; `read` and `written` are its positions in the source run
    and in the base run."""

    senders: Sequence[End]
    receivers: Sequence[End]
    read: Sequence[int]
    written: Sequence[int]


def paths(
    name: str,
    model: Any,
    base_ids: Sequence[int],
    base: Run,
    source: Run,
    ways: Sequence[Way],
    *,
    mlps: bool = False,
) -> list[Tensor]:
    """The logits [T, vocab] of each path, from which the metric is computed.

    Writes of the base run (noise) happen in both passes.
    """
    layers = model.config.num_hidden_layers
    sent = [
        [
            *base.writes,
            *held(base, way.senders, layers, mlps=mlps),
            *copied(way.senders, source, way.read, way.written),
        ]
        for way in ways
    ]
    first = side_by_side(name, model, base_ids, [(writes, ()) for writes in sent])
    got = [
        [*base.writes, *copied(way.receivers, run, way.written, way.written)]
        for way, run in zip(ways, first, strict=True)
    ]
    second = side_by_side(name, model, base_ids, [(writes, ()) for writes in got])
    return [
        (once if any(receiver.site in LAST for receiver in way.receivers) else twice).logits
        for way, once, twice in zip(ways, first, second, strict=True)
    ]
