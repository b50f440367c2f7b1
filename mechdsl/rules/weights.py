"""Where a model writes into its residual stream: what `from weights` stands for."""

from __future__ import annotations

from mechdsl.diagnostics.e03_directions import BadDirection
from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import SitePoint, SiteTargets

STRAIGHT = (
    *("codegen", "falcon", "gemma", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss"),
    *("gptj", "llama", "mistral", "mixtral", "phi", "phi3", "qwen2", "qwen3", "starcoder2"),
)
"""Families that add embeddings and what sublayers give to the stream as they are, without a norm
behind them."""


def weight_sites(rule: spec.Rule, work: Work) -> SiteTargets | None:
    """What enters the first block and what every sublayer adds, joined; E0341 for a model in which
    that isn't equal to weights that can't write a direction."""
    shape = work.model.shape
    assert rule.direction is not None
    reason = _why_not(work)
    if reason is not None:
        work.diagnostics.append(
            BadDirection(
                span=rule.span,
                text=rule.span.written,
                reason=reason,
                hint=f"take it out of activations: `project out {rule.direction.span.written} from "
                "resid_post layers * at tokens *`",
            )
        )
        return None
    points = [SitePoint("resid_pre", 0, None)]
    for layer in range(shape.n_layers):
        sites = [site for site in ("mixer_out", "attn_out") if shape.has(site, layer)][:1]
        sites += ["mlp_out"] if shape.has("mlp_out", layer) else []
        points += [SitePoint(site, layer, None) for site in sites]
    return SiteTargets((), {(): tuple(points)}, {(): "weights"})


def _why_not(work: Work) -> str | None:
    """What lies between the weights and the stream, as far as is known."""
    shape, name = work.model.shape, work.model.name
    if not shape.has("resid_pre", 0):
        return f"`{name}` has no residual stream"
    if shape.stands_in or shape.family in STRAIGHT:
        return None
    return (
        f"`{name}` ({shape.family}) may have norms between its weights and the stream, which turn "
        "what they write"
    )
