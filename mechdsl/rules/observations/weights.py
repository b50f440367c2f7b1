"""Observations of a model's weights alone: what heads do to tokens, and to each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from mechdsl.diagnostics.e02_names import BadArgument, did_you_mean
from mechdsl.models.shape import width
from mechdsl.program import spec
from mechdsl.prompts.prompt_table import PositionCell
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import OverRows
from mechdsl.resolve.resolved import Axis
from mechdsl.resolve.resolved_rule import Convention, PositionTargets, ResolvedRule, SiteTargets
from mechdsl.resolve.site_targets import resolve_site
from mechdsl.rules.observations.over_rows import other_sites, refuse, several
from mechdsl.rules.observations.registry import Kind, observation
from mechdsl.syntax import ast

FOLDED = (
    "gains of norms are folded in; their scales, biases and rotary are not, so queries meet keys "
    "at distance 0"
)


class OfWeights(OverRows, Kind):
    """`observe WORD layer * head *`: a number of each head's weights, or of each neuron's."""

    spread: Literal["rows", "unknown", "none"] = "none"
    unplaced = "last token"
    reads_vectors = False
    of_weights = True
    folded: ClassVar[str] = FOLDED
    """What of norms, biases and positions is in the maps."""
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
            others = other_sites(rule, work)
            fits = fits and others is not None
        if sites is None or not fits:
            return None
        parts = [sites] if others is None else [sites, others]
        if not all(self.sites_fit(rule, part, work) for part in parts):
            return None
        nothing = (((),),) * len(work.table)
        cell = PositionCell("weights", nothing)
        places = PositionTargets((), {(): cell}, {(): cell})
        base = work.experiment.base
        return ResolvedRule(
            spec=rule, does=self, run=base, sites=sites, positions=places, beside=others
        )

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
        """E0207 where a cell isn't one head."""
        return one_each(rule, sites, work, "z", "head", "write `layer * head *`, or `L1H2`")

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = self.form.meaning[0].lower() + self.form.meaning[1:]
        parts = [f"{self.word}: {said}", *self.said(), self.folded]
        yield Convention("observed", "; ".join(parts))

    def said(self) -> Iterator[str]:
        """What else a table has to say of it."""
        yield from ()


def one_each(
    rule: spec.Rule, sites: SiteTargets, work: Work, site: str, unit: str, hint: str
) -> bool:
    """E0207 where a cell isn't one unit of a site."""
    for points in sites.points.values():
        if [(point.site, point.unit is None) for point in points] != [(site, False)]:
            refuse(rule, work, f"is of one {unit} at a time", hint)
            return False
    return True


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


def word_of(rule: spec.Rule, words: Mapping[str, str], reason: str, work: Work) -> str | None:
    """The one word in brackets; E0207 for another, with `reason`, and for none."""
    said = rule.observed
    assert said is not None
    call = said.call
    argument = None if call is None or len(call.arguments) != 1 else call.arguments[0]
    by = argument.value if argument is not None and argument.name is None else None
    if isinstance(by, ast.Name) and by.id in words:
        return by.id
    usage = " or ".join(f"`{said.word}({word})`" for word in words)
    hint = did_you_mean(by.id if isinstance(by, ast.Name) else "", words, f"write {usage}")
    span, name = (said.span, said.word) if by is None else (by.span, by.span.written)
    reason = reason if by is not None else "says none of its ways"
    work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
    return None


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
        by = word_of(rule, COMPOSITIONS, "is no way in which heads compose", work)
        return None if found is None or by is None else replace(found, does=Composition(by))

    def said(self) -> Iterator[str]:
        maps = "OV" if self.by == "v" else "QK"
        of = COMPOSITIONS[self.by]
        yield f"‖AB‖ / (‖A‖ ‖B‖) of the first head's OV and the later one's {maps}, by its {of}"
        yield "pairs of which the second head isn't in a later layer are left out"


CIRCUITS: Mapping[str, str] = {"ov": "W_V W_O", "qk": "W_Q W_Kᵀ, not divided by the root of width"}


@observation("singular_values", unit="of a vector's length")
class SingularValues(OfWeights):
    """The largest singular values of what a head does to a vector, the largest first.

    By how much it lengthens a vector along its directions (`ov`), or how large a score two vectors
    of length 1 can have (`qk`).
    source: Millidge and Black 2022, "The singular value decompositions of transformer weight
        matrices are highly interpretable"
    """

    takes: ClassVar = ("arguments", "top")
    counts = "value"

    def __init__(self, of: str = "") -> None:
        """of: ov or qk; empty only of the entry."""
        self.of = of

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        said = rule.observed
        assert said is not None
        of = word_of(rule, CIRCUITS, "is no map of a head", work)
        if said.top is None:
            refuse(rule, work, "doesn't say how many", "write `top 5`")
        if found is None or found.sites is None or of is None or said.top is None:
            return None
        site, shape = ("z" if of == "ov" else "q"), work.sites.shape
        layers = {point.layer for here in found.sites.points.values() for point in here}
        most = min(min(width(shape, site, n), shape.d_model) for n in layers)
        if said.top > most and not shape.stands_in:
            refuse(
                rule, work, f"has no {said.top} values: a head has {most}", f"write `top {most}`"
            )
            return None
        work.add_axis(Axis(self.counts, tuple(range(1, said.top + 1)), said.span))
        sites = several(found.sites, self.counts, said.top)
        return replace(found, does=SingularValues(of), sites=sites)

    def said(self) -> Iterator[str]:
        yield f"of {CIRCUITS[self.of]}"
