"""Observations of a model's weights alone: what heads do to tokens, and to each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from mechdsl.diagnostics.e02_names import BadArgument, did_you_mean
from mechdsl.program import spec
from mechdsl.prompts.prompt_table import PositionCell
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import OverRows
from mechdsl.resolve.resolved import Convention, PositionTargets, ResolvedRule, SiteTargets
from mechdsl.resolve.site_targets import resolve_site
from mechdsl.rules.observations.over_rows import refuse
from mechdsl.rules.observations.registry import Kind, observation
from mechdsl.syntax import ast

FOLDED = (
    "gains of norms are folded in; their scales, biases and rotary are not, so queries meet keys "
    "at distance 0"
)


class OfWeights(OverRows, Kind):
    """`observe WORD layer * head *`: a number of each head's weights."""

    spread: Literal["rows", "unknown", "none"] = "none"
    unplaced = "last token"
    reads_vectors = False
    compares: ClassVar[bool] = False
    """Whether a second site stands behind `with`."""

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        assert rule.site is not None
        assert rule.observed is not None
        fits = self.clauses_fit(rule, work)
        if rule.observed.placed:
            refuse(rule, work, "is of the weights, not of a token", "leave `at …` out")
            fits = False
        sites, axes = resolve_site(rule.site, work.sites)
        for axis in axes:
            work.add_axis(axis)
        others = None
        if self.compares and rule.receiver is None:
            refuse(rule, work, "is of two heads", "name the later one: `with layer * head *`")
            fits = False
        elif rule.receiver is not None:
            others, more = resolve_site(rule.receiver, work.sites)
            for axis in more:
                work.add_axis(replace(axis, name=f"to_{axis.name}"))
            own = {axis.name for axis in more}
            names = () if others is None else others.axes
            names = tuple(f"to_{name}" if name in own else name for name in names)
            others = None if others is None else replace(others, axes=names)
            fits = fits and others is not None
        if sites is None or not fits:
            return None
        parts = [sites] if others is None else [sites, others]
        if not all(self.heads(rule, part, work) for part in parts):
            return None
        nothing = (((),),) * len(work.table)
        cell = PositionCell("weights", nothing)
        places = PositionTargets((), {(): cell}, {(): cell})
        base = work.experiment.base
        return ResolvedRule(
            spec=rule, does=self, run=base, sites=sites, positions=places, beside=others
        )

    def heads(self, rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
        """E0207 where a cell isn't one head."""
        for points in sites.points.values():
            if [(point.site, point.unit is None) for point in points] != [("z", False)]:
                refuse(rule, work, "is of one head at a time", "write `layer * head *`, or `L1H2`")
                return False
        return True

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = self.form.meaning[0].lower() + self.form.meaning[1:]
        yield Convention("observed", "; ".join([f"{self.word}: {said}", *self.said(), FOLDED]))

    def said(self) -> Iterator[str]:
        """What else a table has to say of it."""
        yield from ()


@observation("copying", unit="share of eigenvalues")
class Copying(OfWeights):
    """Whether a head raises the logits of the tokens that it attends to.

    returns: −1 to 1, Σ λ / Σ |λ| over the eigenvalues of embedding → OV → unembedding
    source: Elhage et al. 2021, transformer-circuits.pub/2021/framework
    """

    def said(self) -> Iterator[str]:
        yield "Σ λ / Σ |λ| of the eigenvalues of embedding → OV → unembedding"


@observation("matching", unit="share of eigenvalues")
class Matching(OfWeights):
    """Whether a head attends to tokens that are equal to its own.

    returns: −1 to 1, Σ λ / Σ |λ| over the eigenvalues of embedding → QK ← embedding
    source: Elhage et al. 2021, transformer-circuits.pub/2021/framework
    """

    def said(self) -> Iterator[str]:
        yield "Σ λ / Σ |λ| of the eigenvalues of embedding → QK ← embedding"


COMPOSITIONS: Mapping[str, str] = {"q": "queries", "k": "keys", "v": "values"}


@observation("composition", unit="of its norm")
class Composition(OfWeights):
    """How much of what a head writes a later head reads.

    returns: 0 to 1, ‖AB‖ / (‖A‖ ‖B‖), Frobenius
    source: Elhage et al. 2021, transformer-circuits.pub/2021/framework
    """

    takes: ClassVar = ("arguments", "with site")
    compares = True
    leads_on = True

    def __init__(self, by: str = "") -> None:
        """by: q, k or v; empty only of the entry."""
        self.by = by

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        assert rule.observed is not None
        call = rule.observed.call
        argument = None if call is None or len(call.arguments) != 1 else call.arguments[0]
        by = argument.value if argument is not None and argument.name is None else None
        if not isinstance(by, ast.Name) or by.id not in COMPOSITIONS:
            span = rule.observed.span if by is None else by.span
            word = by.id if isinstance(by, ast.Name) else ""
            hint = did_you_mean(word, COMPOSITIONS, "write `composition(q)`, `(k)` or `(v)`")
            reason = "is no way in which heads compose" if by is not None else "says no way"
            name = "composition" if by is None else by.span.written
            work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
            return None
        return None if found is None else replace(found, does=Composition(by.id))

    def said(self) -> Iterator[str]:
        maps = "OV" if self.by == "v" else "QK"
        of = COMPOSITIONS[self.by]
        yield f"‖AB‖ / (‖A‖ ‖B‖) of the first head's OV and the later one's {maps}, by its {of}"
        yield "pairs of which the second head isn't in a later layer are left out"
