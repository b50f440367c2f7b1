"""`observe clusters(6) SITE at POSITIONS`: which of a few kinds of vectors a token has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.program.lower_directions import train_of
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import SeenTokens, TokenVectors, TrainedOn
from mechdsl.resolve.resolved import Axis
from mechdsl.resolve.resolved_rule import PositionTargets, ResolvedRule
from mechdsl.rules.observations.over_rows import OverTokensKind, refuse, several
from mechdsl.rules.observations.probes import trained_on
from mechdsl.rules.observations.registry import observation
from mechdsl.rules.observations.similarities import run_named

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats
    from mechdsl.fits.mixture import Mixture

MOST = 64
"""Clusters that a line may ask for."""


@observation("clusters", unit="probability")
class Clusters(OverTokensKind):
    """How likely a token's vector is of each of a few clusters.

    `with RUN`: whether its likeliest cluster is the same in both runs.
    returns: 0 to 1; those of all clusters add up to 1
    source: Lloyd 1982, IEEE Transactions on Information Theory 28(2); of patches: Wang, Tan and
    Wang 2024, arXiv 2406.12649
    """

    takes: ClassVar = ("arguments", "with site")
    counts = "cluster"

    def __init__(
        self, count: int = 0, trained_on: TrainedOn | None = None, train: str = ""
    ) -> None:
        """count: 0 only of the entry. train: what the rows that it is fitted on are called."""
        self.count, self.trained_on, self.train = count, trained_on, train

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        said = rule.observed
        assert said is not None
        count = _count(rule, work)
        before = len(work.diagnostics)
        train = None if found is None else trained_on(rule, found, work)
        if rule.receiver is not None and run_named(rule.receiver, work) is None:
            refuse(rule, work, "is set against a run", "name one: `with noised`")
        if count is None or found is None or found.sites is None or len(work.diagnostics) > before:
            return None
        named = None if train is None else train_of(said.call)
        called = "" if named is None else named.span.written
        if rule.receiver is not None:
            return replace(found, does=SameCluster(count, train, called))
        work.add_axis(Axis("cluster", tuple(range(1, count + 1)), said.span))
        sites = several(found.sites, "cluster", count)
        return replace(found, does=Clusters(count, train, called), sites=sites)

    def read_run(self, rule: spec.Rule, work: Work) -> str:
        other = None if rule.receiver is None else run_named(rule.receiver, work)
        return other or super().read_run(rule, work)

    def positions_fit(self, rule: spec.Rule, found: ResolvedRule, work: Work) -> bool:
        """E0207 too where tokens of two runs, in their order, aren't each other's."""
        for row in range(len(work.table)):
            pairs = sorted(_pairs(found.positions, row))
            if any(a == c or b >= d for (a, b), (c, d) in pairwise(pairs)):
                reason = "has tokens that stand in another order in the other run"
                refuse(rule, work, reason, "write a line for each position")
                return False
        return super().positions_fit(rule, found, work)

    def fitted(self, seen: SeenTokens, seed: int) -> Mixture:
        """The same whatever the order of rows."""
        import numpy as np

        from mechdsl.fits.mixture import mixture

        of = seen.own if seen.training is None else seen.training
        _, rank = np.unique([key.hex() for key in of.keys], return_inverse=True)
        order = np.argsort(rank[of.row], kind="stable")
        return mixture(of.vectors[order], self.count, seed)

    def per_token(self, seen: SeenTokens, seed: int) -> Sequence[Floats]:
        return [self.fitted(seen, seed)(seen.own.vectors).T]

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield (
            f"k-means of {self.count} clusters, the best of 5 starts, on standardised vectors of "
            "all tokens of the line; the largest cluster is the first"
        )
        yield f"fitted on `{self.train}`" if self.trained_on else "fitted on the same rows"
        yield from self.told()

    def told(self) -> Iterator[str]:
        """What its number is."""
        yield "its probability is that of Gaussians around the centres, of one variance in all"


class SameCluster(Clusters):
    """Whether the token's likeliest cluster is the same in another run."""

    reads: ClassVar = "run"
    counts = ""

    def per_token(self, seen: SeenTokens, seed: int) -> Sequence[Floats]:
        assert seen.other is not None
        fit = self.fitted(seen, seed)
        own, other = (_likeliest(fit, each) for each in (seen.own, seen.other))
        return [(own == other).astype(float)[None]]

    def told(self) -> Iterator[str]:
        yield "whether the likeliest is the same at the same place of the other run"


def _pairs(positions: PositionTargets, row: int) -> set[tuple[int, int]]:
    """(token, the token at the same place in the run that is read)."""
    cells = zip(positions.written.values(), positions.read.values(), strict=True)
    return {
        pair
        for own, other in cells
        for one, two in zip(own.hits[row], other.hits[row], strict=True)
        for pair in zip(one, two, strict=True)
    }


def _likeliest(fit: Mixture, tokens: TokenVectors) -> Floats:
    """[token]"""
    return fit(tokens.vectors).argmax(axis=1).astype(float)


def _count(rule: spec.Rule, work: Work) -> int | None:
    """How many clusters; E0207 for another argument, and for none."""
    said = rule.observed
    assert said is not None
    arguments = () if said.call is None else said.call.arguments
    plain = [each.value for each in arguments if each.name is None]
    other = next((each for each in arguments if each.name not in (None, "train")), None)
    if other is not None:
        hint = "there is train"
        work.diagnostics.append(
            BadArgument(span=other.span, name=other.name or "", reason="is no option", hint=hint)
        )
        return None
    number = constant(plain[0], work.program.parameters) if len(plain) == 1 else None
    if not isinstance(number, int) or isinstance(number, bool) or not 2 <= number <= MOST:
        hint = f"write a number from 2 to {MOST}: `clusters(6)`"
        refuse(rule, work, "doesn't say how many clusters", hint)
        return None
    return number
