"""Observations of attention patterns: how wide a query looks, and how far back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.images.patches import PatchLayout
from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.observation import Seen
from mechdsl.resolve.resolved_rule import Convention, ResolvedRule, SiteTargets
from mechdsl.rules.observations.registry import SiteObservation, every_point, observation

if TYPE_CHECKING:
    from torch import Tensor


class PatternObservation(SiteObservation):
    """A kind that looks at what queries attend to: `observe WORD pattern … at QUERIES`."""

    by_unit = True

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
        assert rule.site is not None
        if all(point.site == "pattern" for point in every_point(sites)):
            return True
        reason, hint = "is no attention pattern", "write `pattern layer * head *`"
        name, span = rule.site.span.written, rule.site.span
        work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
        return False


@observation("entropy", unit="nat")
class Entropy(PatternObservation):
    """The entropy of what the query attends to.

    returns: 0..ln(keys), nats; averaged over heads and queries that are joined
    """

    def each(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        weights = seen.vectors
        logs = weights.clamp_min(1e-38).log()
        return -(weights * logs).sum(-1)


@observation("distance", unit="token")
class Distance(PatternObservation):
    """How many tokens back the query attends, on average over its attention; in models that see
    both sides how many tokens away, and in images how many patches, of its attention to patches.

    `distance(W)` counts keys that are further away than W as W tokens away.
    returns: the sum of weight times min(query - key, W), in tokens; averaged over heads and queries
        that are joined
    source: of images Dosovitskiy et al. 2021, arXiv 2010.11929, appendix D.7
    """

    takes: ClassVar = ("arguments",)

    def __init__(
        self,
        window: int | None = None,
        *,
        causal: bool = True,
        grid: tuple[int, int, int] | None = None,
    ) -> None:
        """grid: of images, the tokens in front of the patches, rows and columns of these."""
        self.window, self.causal, self.grid = window, causal, grid

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        window, right = _window(rule, work)
        reader = work.model.tokenizer
        layout = reader.layout if isinstance(reader, ImageReader) else None
        grid = None if layout is None else (len(layout.front), layout.rows, layout.cols)
        if found is None or not right or (layout and not _patches(rule, found, layout, work)):
            return None
        does = Distance(window, causal=work.model.shape.causal, grid=grid)
        return replace(found, does=does)

    def each(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        weights = seen.vectors
        if self.grid is not None:
            weights = weights[:, self.grid[0] :]
            away = self._between_patches(seen.positions, weights)
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-38)
        else:
            keys = seen.positions.new_tensor(range(weights.shape[1]))
            away = seen.positions[:, None] - keys  # below 0 where a causal model has no weight
            away = away if self.causal else away.abs()
        if self.window is not None:
            away = away.clamp(-self.window, self.window)
        return (weights * away).sum(-1)

    def _between_patches(self, queries: Tensor, weights: Tensor) -> Tensor:
        """[query, patch] from middle to middle, in patches."""
        assert self.grid is not None
        front, _, cols = self.grid
        keys = queries.new_tensor(range(weights.shape[1]))
        own = (queries - front)[:, None]
        down, right = own // cols - keys // cols, own % cols - keys % cols
        return (down**2 + right**2).to(weights.dtype).sqrt()

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from super().conventions(rule, n_layers)
        tokens, side = "tokens", "back" if self.causal else "away"
        if self.grid is not None:
            tokens = "patches"
            said = "between the middles of patches, in patches, averaged over attention to patches"
            yield Convention("distance", said)
        elif not self.causal:
            yield Convention("distance", "in tokens, to either side")
        if self.window is not None:
            far = f"{self.window} {tokens}"
            yield Convention("window", f"keys further {side} than {far} count as {far} {side}")


def _window(rule: spec.Rule, work: Work) -> tuple[int | None, bool]:
    """How far away tokens are counted, and whether it is right: E0207."""
    assert rule.observed is not None
    call = rule.observed.call
    if call is None:
        return None, True
    one = call.arguments[0] if len(call.arguments) == 1 else None
    node = None if one is None or one.name is not None else one.value
    window = constant(node, work.program.parameters)
    if isinstance(window, int) and not isinstance(window, bool) and window >= 1:
        return window, True
    reason, hint = "takes one whole number of tokens, above 0", "write `distance(8)`"
    name = "observe distance"
    work.diagnostics.append(BadArgument(span=call.span, name=name, reason=reason, hint=hint))
    return None, False


def _patches(rule: spec.Rule, found: ResolvedRule, layout: PatchLayout, work: Work) -> bool:
    """E0207 for queries that have no place in an image."""
    cells = found.positions.written.values()
    tokens = {token for cell in cells for row in cell.hits for hit in row for token in hit}
    if all(layout.place(token) is not None for token in tokens):
        return True
    reason, hint = "is between patches, and other tokens have no place", "write `at image tokens`"
    name, span = "observe distance", rule.at.span
    work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
    return False
