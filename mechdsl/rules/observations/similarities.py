"""How alike vectors are: within a row, and between sites over all rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.base.names import name_list
from mechdsl.diagnostics.e02_names import UnknownWord, did_you_mean
from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import RowVectors
from mechdsl.resolve.resolved_rule import EdgeTargets, ResolvedRule
from mechdsl.resolve.targets import plain_targets, sweeps
from mechdsl.rules.observations.over_rows import OverRowsKind, numbers_of, other_sites, refuse
from mechdsl.rules.observations.registry import observation
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats

CKA_ROWS = 5000
"""Rows of a CKA at most: it holds all pairs of them."""


@observation("similarity", unit="cosine")
class Similarity(OverRowsKind):
    """The cosine of two vectors of a row.

    At two positions, or at the tokens of one; `with SITE`: at two sites; `with RUN`: in two runs.
    returns: −1 to 1, averaged over the pairs of different tokens
    """

    takes: ClassVar = ("with", "with site")
    of_directions: ClassVar[bool] = True

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        run = work.table.runs[work.experiment.base]
        if run.draws > 1:
            refuse(rule, work, "has no meaning over draws of noise", "take one draw: `samples: 1`")
            return None
        if rule.receiver is None:
            return self._of_positions(rule, work)
        if rule.onto is not None:
            reason = "is of two positions, or of one at two sites or in two runs"
            refuse(rule, work, reason, "leave one `with …` out")
            return None
        other = run_named(rule.receiver, work)
        found = self._of_runs(rule, other, work) if other else self._of_sites(rule, work)
        several = found is not None and any(
            sum(map(len, row)) > 1
            for cells in (found.positions.written, found.positions.read)
            for cell in cells.values()
            for row in cell.hits
        )
        if several:
            reason = "compares one token at a time with itself"
            refuse(rule, work, reason, "sweep them: `each SPAN token`, `token *`")
            return None
        return found

    def _of_positions(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule.model_copy(update={"onto": None}), work)
        if rule.onto is None or found is None:
            return found
        both = sweeps(rule.at, work) and sweeps(rule.onto, work)
        if both:
            reason = "can't sweep at both positions"
            refuse(rule, work, reason, "sweep at one, and name the other or join it: `{A, B}`")
            return None
        others = plain_targets(rule.onto, work)
        return None if others is None else replace(found, spec=rule, edge=EdgeTargets(None, others))

    def _of_sites(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        assert rule.receiver is not None
        found, nothing = super().resolve(rule, work), is_nothing(rule.receiver, work)
        others = None if nothing else other_sites(rule, work)
        if found is None or others is None or not self.sites_fit(rule, others, work):
            return None
        shape = work.sites.shape
        widths = {
            sum(numbers_of(point, shape) for point in points)
            for sites in (found.sites, others)
            if sites is not None
            for points in sites.points.values()
        }
        if len(widths) > 1 and not shape.stands_in:
            reason = f"is of vectors of one width, not of {' and '.join(map(str, sorted(widths)))}"
            refuse(rule, work, reason, "name sites of the same space, or `cka`")
            return None
        return replace(found, beside=others)

    def _of_runs(self, rule: spec.Rule, other: str, work: Work) -> ResolvedRule | None:
        if work.table.runs[other].draws > 1:
            refuse(rule, work, "has no meaning over draws of noise", "take one draw: `samples: 1`")
            return None
        found = super().resolve(rule, work)
        return None if found is None else replace(found, does=BetweenRuns())

    def read_run(self, rule: spec.Rule, work: Work) -> str:
        other = None if rule.receiver is None else run_named(rule.receiver, work)
        return other or super().read_run(rule, work)

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        other = seen.vectors if seen.other is None else seen.other
        different, same = seen.pairs.T
        total = (seen.vectors * other).sum(axis=1) - same
        if np.isnan(total).any():
            raise ValueError("a vector is 0, which has no direction")
        return [np.divide(total, different, out=np.full(len(total), np.nan), where=different > 0)]

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        if rule.beside is not None:
            yield "of the same token at two sites"
            return
        yield "the mean over pairs of different tokens, one at either position"
        yield "rows without such a pair aren't part of the cell"


class BetweenRuns(Similarity):
    """The cosine with the vector at the same position of another run."""

    reads: ClassVar = "run"

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield f"with the vector at the same position of `{rule.run}`"


def run_named(site: ast.Site, work: Work) -> str | None:
    """The run that stands where a site may."""
    name = "" if site.bare is None else site.bare.id
    return name if name in work.table.runs and name not in SITES else None


def is_nothing(site: ast.Site, work: Work) -> bool:
    """E0203 for a name that is neither a run nor one of a site."""
    name = site.bare
    if name is None or name.id in (*SITES, *work.loops, *work.program.groups):
        return False
    blocks = (block for block in work.program.prompts if block != work.table.name)
    runs = dict.fromkeys((*work.table.runs, *blocks))
    known = f"runs are {name_list(runs)}, and a site is such as `resid_post layer *`"
    hint = did_you_mean(name.id, [*runs, *SITES], known)
    found = UnknownWord(span=name.span, kind="site or run", word=name.id, hint=hint)
    work.diagnostics.append(found)
    return True


@observation("cka", unit="CKA")
class Cka(OverRowsKind):
    """Linear CKA of two sites: how alike they set the rows apart from each other.

    `with RUN`: of the same site in two runs.
    returns: about 0 to 1, corrected for few rows
    source: Kornblith et al. 2019, arXiv 1905.00414, section 3; Song et al. 2012, equation 5
    """

    takes: ClassVar = ("with site",)

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        if rule.receiver is None:
            hint = "name the other: `with resid_post layer *`, or a run: `with fewer`"
            refuse(rule, work, "compares two sites", hint)
            return None
        if len(work.table) > CKA_ROWS:
            reason = f"of {len(work.table):,} rows is too large: it holds all pairs of rows"
            refuse(rule, work, reason, f"write `limit {CKA_ROWS}` behind `prompts`")
            return None
        if run_named(rule.receiver, work) is not None:
            return None if found is None else replace(found, does=CkaOfRuns())
        others = None if is_nothing(rule.receiver, work) else other_sites(rule, work)
        if found is None or others is None or not self.sites_fit(rule, others, work):
            return None
        return replace(found, beside=others)

    def read_run(self, rule: spec.Rule, work: Work) -> str:
        other = None if rule.receiver is None else run_named(rule.receiver, work)
        return other or super().read_run(rule, work)

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


class CkaOfRuns(Cka):
    """Of a site with itself in another run."""

    reads: ClassVar = "run"

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield f"with the same site at the same position of `{rule.run}`"
        yield from super().said(rule)
