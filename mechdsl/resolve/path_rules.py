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


def apart_from_the_end(
    senders: tuple[SitePoint, ...], receivers: tuple[SitePoint, ...], *, parallel: bool
) -> tuple[str, str] | None:
    """Why the end of the model can't stand beside these receivers, and what to write instead; None
    where it can, or doesn't.

    What a receiver changes must not reach other receivers, which read where all is held, nor
    senders, which would send that to the end too.
    """
    inner = reached(
        senders,
        tuple(p for p in receivers if SITES[p.site].when != "output"),
        parallel=parallel,
    )
    if not any(SITES[p.site].when == "output" for p in receivers) or not inner:
        return None
    whole = next((p for p in inner if p.site == "resid_pre"), None)
    if whole is not None:
        return (
            f"{_named(whole)} carries the senders on to the end by itself",
            "leave the end out, or name what reads in that block: `attn_norm`, `mlp_norm`",
        )
    inner = sorted(inner, key=lambda p: _sublayer(p, parallel=parallel))
    first, last = inner[0], inner[-1]
    if _sublayer(first, parallel=parallel) != _sublayer(last, parallel=parallel):
        return (
            f"{_named(last)} reads behind {_named(first)}: it would not see what that changes, and "
            "the end would",
            "beside the end, name receivers in the attention of one layer, or in one MLP",
        )
    pairs = ((of, to) for of in senders for to in inner)
    late = next((pair for pair in pairs if not _before(*pair, parallel=parallel)), None)
    if late is not None:
        return (
            f"{_named(late[0])} isn't before {_named(late[1])}, which may change what it sends",
            "beside the end, send from what comes before all other receivers",
        )
    return None


def _named(point: SitePoint) -> str:
    words = [point.site]
    words += [] if point.layer is None else [f"layer {point.layer}"]
    words += [] if point.unit is None else [f"{SITES[point.site].axes[-1]} {point.unit}"]
    return f"`{' '.join(words)}`"


def _sublayer(receiver: SitePoint, *, parallel: bool) -> tuple[int, bool]:
    """Where it reads: what receivers of one sublayer change doesn't reach each other."""
    assert receiver.layer is not None
    return receiver.layer, receiver.site in ("mlp_norm", "mlp_hidden") and not parallel


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
