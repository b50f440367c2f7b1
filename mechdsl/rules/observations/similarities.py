"""How alike vectors are: within a row, and between sites over all rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import RowVectors
from mechdsl.resolve.resolved import EdgeTargets, ResolvedRule
from mechdsl.resolve.site_targets import resolve_site
from mechdsl.resolve.targets import plain_targets, sweeps
from mechdsl.rules.observations.over_rows import OverRowsKind, refuse
from mechdsl.rules.observations.registry import observation

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats

CKA_ROWS = 5000
"""Rows of a CKA at most: it holds all pairs of them."""


@observation("similarity", unit="cosine")
class Similarity(OverRowsKind):
    """The cosine of a row's vectors at two positions, or at the tokens of one.

    returns: −1 to 1, averaged over the pairs of different tokens
    """

    takes: ClassVar = ("with",)
    of_directions: ClassVar[bool] = True

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule.model_copy(update={"onto": None}), work)
        run = work.table.runs[work.experiment.base]
        drawn = getattr(run, "draws", 1)  # of runs with rules, which may read others with noise
        if drawn > 1 or (run.noise is not None and run.noise.samples > 1):
            refuse(rule, work, "has no meaning over draws of noise", "take one draw: `samples: 1`")
            return None
        if rule.onto is None or found is None:
            return found
        both = sweeps(rule.at, work) and sweeps(rule.onto, work)
        if both:
            reason = "can't sweep at both positions"
            refuse(rule, work, reason, "sweep at one, and name the other or join it: `{A, B}`")
            return None
        others = plain_targets(rule.onto, work)
        return None if others is None else replace(found, spec=rule, edge=EdgeTargets(None, others))

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        other = seen.vectors if seen.other is None else seen.other
        different, same = seen.pairs.T
        total = (seen.vectors * other).sum(axis=1) - same
        if np.isnan(total).any():
            raise ValueError("a vector is 0, which has no direction")
        return [np.divide(total, different, out=np.full(len(total), np.nan), where=different > 0)]

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield "the mean over pairs of different tokens, one at either position"
        yield "rows without such a pair aren't part of the cell"


@observation("cka", unit="CKA")
class Cka(OverRowsKind):
    """Linear CKA of two sites: how alike they set the rows apart from each other.

    returns: about 0 to 1, corrected for few rows
    source: Kornblith et al. 2019, arXiv 1905.00414, section 3; Song et al. 2012, equation 5
    """

    takes: ClassVar = ("with site",)

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        if rule.receiver is None:
            refuse(rule, work, "compares two sites", "name the other: `with resid_post layer *`")
            return None
        if len(work.table) > CKA_ROWS:
            reason = f"of {len(work.table):,} rows is too large: it holds all pairs of rows"
            refuse(rule, work, reason, f"write `limit {CKA_ROWS}` behind `prompts`")
            return None
        others, axes = resolve_site(rule.receiver, work.sites)
        for axis in axes:
            work.add_axis(replace(axis, name=f"to_{axis.name}"))
        if found is None or others is None or not self.sites_fit(rule, others, work):
            return None
        own = {axis.name for axis in axes}
        names = tuple(f"to_{name}" if name in own else name for name in others.axes)
        return replace(found, beside=replace(others, axes=names))

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        from mechdsl.fits.similarity import cka_per_row, linear_kernel

        assert seen.other is not None
        numbers = {key: number for number, key in enumerate(dict.fromkeys(seen.keys))}
        index = np.array([numbers[key] for key in seen.keys])
        first = np.unique(index, return_index=True)[1]
        kernels = (linear_kernel(each[first]) for each in (seen.vectors, seen.other))
        each = cka_per_row(*kernels)
        # Rows that look alike share what one of them contributes, so that the mean stays.
        copies, mean = np.bincount(index), each.mean()
        shared = mean + (each - mean) * len(seen.keys) / len(first) / copies
        return [shared[index]]

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield "the estimator without bias for few rows (Song et al. 2012), over distinct rows"
        yield "its interval is that of the jackknife over rows"
