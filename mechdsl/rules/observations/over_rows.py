"""Observations over all rows: what they share, and those that need nothing but vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.models.shape import ModelShape, units, width
from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import OverRows, OverTokens, RowVectors, every_token
from mechdsl.resolve.resolved_rule import Convention, ResolvedRule, SitePoint, SiteTargets
from mechdsl.resolve.site_targets import resolve_site
from mechdsl.rules.observations.registry import SiteObservation, observation
from mechdsl.vocab.sites import SITES

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats

ROW_NUMBERS = 1 << 29
"""Of the vectors that one cell is made of, at most: rows times width."""


def without_rules(rule: spec.Rule, work: Work, reason: str) -> bool:
    """E0207, with a reason, where rules act in the experiment."""
    if all(each.verb == "observe" for each in work.experiment.rules):
        return True
    assert rule.observed is not None
    hint = "write the rules as a run, and observe that: `run healed { … }`, then "
    refuse(rule, work, reason, f"{hint}`observe {rule.observed.word} … of healed`")
    return False


class OverRowsKind(OverRows, SiteObservation):
    """`observe WORD SITE at POSITIONS`, of vectors of all rows."""

    of_several: ClassVar[str] = "a row's vector is the mean over its tokens"

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        made = "is made of vectors of all rows, and reads no run in which rules act"
        return found if without_rules(rule, work, made) else None

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
        """E0207 for vectors that differ in width between rows, and for more than there is room."""
        for points in sites.points.values():
            over_keys = [point.site for point in points if SITES[point.site].width == "key"]
            if over_keys:
                reason = f"can't be made of `{over_keys[0]}`, whose width is that of each prompt"
                refuse(rule, work, reason, "name a site whose vectors are equally wide: `z`")
                return False
            numbers = len(work.table) * sum(numbers_of(point, work.sites.shape) for point in points)
            if numbers > ROW_NUMBERS:
                reason = f"would hold {numbers:,} numbers at a time, more than {ROW_NUMBERS:,}"
                refuse(rule, work, reason, "write a smaller `limit` behind `prompts`")
                return False
        return True

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = self.form.meaning[0].lower() + self.form.meaning[1:]
        assert rule.sites is not None
        parts = [f"{self.word}: {said}"]
        if any(len(points) > 1 for points in rule.sites.points.values()):
            parts.append("joined sites are one vector, side by side")
        cells = rule.positions.written.values()
        several = any(sum(map(len, row)) > 1 for cell in cells for row in cell.hits)
        if several and not self.of_directions:
            parts.append(self.of_several)
        yield Convention("observed", "; ".join([*parts, *self.said(rule)]))

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        """What else a table has to say of it."""
        yield from ()


class OverTokensKind(OverTokens, OverRowsKind):
    """The same of vectors of all tokens of its positions."""

    of_several: ClassVar[str] = "a row's number is the mean over its tokens"

    def positions_fit(self, rule: spec.Rule, found: ResolvedRule, work: Work) -> bool:
        """E0207 for more than there is room for."""
        assert found.sites is not None
        every = every_token(found.positions.written.values())
        tokens = sum(len(tokens) for row in every.hits for tokens in row)
        shape = work.sites.shape
        widths = (sum(numbers_of(p, shape) for p in own) for own in found.sites.points.values())
        numbers = tokens * max(widths, default=0)
        if numbers <= ROW_NUMBERS:
            return True
        reason = f"would hold {numbers:,} numbers at a time, more than {ROW_NUMBERS:,}"
        refuse(rule, work, reason, "write a smaller `limit`, or name fewer tokens")
        return False


def numbers_of(point: SitePoint, shape: ModelShape) -> int:
    """How many there are in one vector."""
    several = units(shape, point.site, point.layer) if point.unit is None else 1
    return several * width(shape, point.site, point.layer)


def other_sites(rule: spec.Rule, work: Work) -> SiteTargets | None:
    """The sites behind `with`, whose axes are `to_layer`, `to_head`; None after an error."""
    assert rule.receiver is not None
    found, axes = resolve_site(rule.receiver, work.sites)
    for axis in axes:
        work.add_axis(replace(axis, name=f"to_{axis.name}"))
    own = {axis.name for axis in axes}
    if found is None:
        return None
    return replace(found, axes=tuple(f"to_{n}" if n in own else n for n in found.axes))


def several(sites: SiteTargets, axis: str, count: int) -> SiteTargets:
    """Each combination `count` times, along an axis of its own."""
    return replace(
        sites,
        axes=(*sites.axes, axis),
        points={(*key, n): here for key, here in sites.points.items() for n in range(count)},
        labels={(*key, n): label for key, label in sites.labels.items() for n in range(count)},
    )


def refuse(rule: spec.Rule, work: Work, reason: str, hint: str) -> None:
    """E0207 at the word of an observation."""
    assert rule.observed is not None
    name = f"observe {rule.observed.word}"
    found = BadArgument(span=rule.observed.span, name=name, reason=reason, hint=hint)
    work.diagnostics.append(found)


class _Spread(OverRowsKind):
    """How many dimensions the vectors take up: one number of all rows."""

    spread: Literal["rows", "unknown", "none"] = "unknown"

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield "of the rows around their mean"

    def number(self, singular: Floats, seen: RowVectors) -> float:
        """singular: [value] of the centred rows."""
        raise NotImplementedError

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        from mechdsl.fits.components import singular_values

        found = self.number(singular_values(seen.vectors, centred=True), seen)
        return [np.full(len(seen.vectors), found)]


@observation("rank", unit="dimensions")
class Rank(_Spread):
    """The dimensions in which the vectors of the rows differ by more than rounding.

    returns: 0 to the smaller of width and rows − 1
    source: Golub and Van Loan 2013, section 5.4.1
    """

    def number(self, singular: Floats, seen: RowVectors) -> float:
        from mechdsl.fits.components import rank

        return float(rank(singular, seen.vectors.shape, seen.precision))

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield "singular values above max(rows, width) · the model's rounding · the largest count"
        yield from super().said(rule)


@observation("effective_rank", unit="dimensions")
class EffectiveRank(_Spread):
    """The exponential of the entropy of the vectors' singular values, as shares of their sum.

    returns: 1 to the rank; 0 where no two rows differ
    source: Roy and Vetterli 2007, equation 3
    """

    def number(self, singular: Floats, seen: RowVectors) -> float:
        from mechdsl.fits.components import effective_rank, rank

        real = singular[: rank(singular, seen.vectors.shape, seen.precision)]
        return effective_rank(real)
