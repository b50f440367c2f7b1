"""Which senders of a path reach which receivers."""

from __future__ import annotations

from mechdsl.resolve.resolved_rule import SitePoint
from mechdsl.vocab.sites import SITES


def reached(
    senders: tuple[SitePoint, ...], receivers: tuple[SitePoint, ...], *, parallel: bool
) -> tuple[SitePoint, ...]:
    """The receivers that some sender comes before."""
    return tuple(
        to for to in receivers if any(_before(of, to, parallel=parallel) for of in senders)
    )


def _before(sender: SitePoint, receiver: SitePoint, *, parallel: bool) -> bool:
    """Whether what the sender adds is in the stream that the receiver reads."""
    if SITES[receiver.site].when == "output" or SITES[sender.site].when == "embedding":
        return True
    assert sender.layer is not None
    assert receiver.layer is not None
    if sender.layer != receiver.layer:
        return sender.layer < receiver.layer
    if receiver.site == "resid_pre":  # it is the sender, or comes before it
        return False
    if sender.site == "resid_pre":
        return True
    of_attention = sender.site in ("z", "head_out", "attn_out", "resid_mid")
    in_mlp = receiver.site in ("mlp_norm", "mlp_hidden")
    return in_mlp and of_attention and not parallel
