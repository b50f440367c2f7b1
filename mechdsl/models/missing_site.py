"""Why a site isn't one of a model."""

from __future__ import annotations

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import NoResidMid, SiteNotOnModel
from mechdsl.models.shape import ModelShape
from mechdsl.vocab.sites import SITES, WITHIN_ATTENTION


def missing_site(
    shape: ModelShape, site: str, *, model: str, span: Span | None = None
) -> Diagnostic | None:
    """Why a supported site of the language is not one of this model (E0402, E0413), or None."""
    if site in shape.sites:
        return None
    if site == "resid_mid" and shape.parallel_block:
        return NoResidMid(span=span, model=model)
    reason = f"not a part of {shape.architecture}"
    hint = "it has " + ", ".join(f"`{name}`" for name in SITES if name in shape.sites)
    if site in WITHIN_ATTENTION and "z" in shape.sites:
        reason = "its attention is computed outside of transformers' attention registry"
        hint = (
            "let its attention class call `ALL_ATTENTION_FUNCTIONS` (`attention_interface`), as "
            "transformers' own models do: docs/own-models.md"
        )
    return SiteNotOnModel(span=span, model=model, site=site, reason=reason, hint=hint)
