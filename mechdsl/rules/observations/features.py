"""Observation of the coordinates of a basis, such as the features of a sparse autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.diagnostics.core import has_errors
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.program import spec
from mechdsl.resolve.bases import resolve_observed_basis
from mechdsl.resolve.observations import evaluate_rows
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.types import Axis, BasisMember, Convention, ResolvedRule
from mechdsl.rules.observations.registry import observation, report_bad_observation
from mechdsl.rules.observations.rows import (
    SiteRowSetObservation,
    check_token_numbers,
    repeat_sites,
)
from mechdsl.rules.observations.vectors import STREAM_SITES
from mechdsl.vocab.metrics import MetricForm

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats

FEATURE_AXIS = "feature"

LISTED_TOKENS = 5
"""Number of tokens listed for a feature: those whose logits it raises most."""

_RANKED_BY = {
    "mean": "mean",
    "difference": "mean difference",
    "correlation": "correlation",
}


@observation("features", unit="activation")
class FeatureActivations(SiteRowSetObservation):
    """The activation of a feature, the mean over the row's tokens.

    `top 10` keeps the features with the largest mean over rows, `by difference(RUN)` those whose
    mean differs most from another run, and `by correlation(VALUE)` those whose activation
    correlates most with a value of the rows, positively or negatively.
    returns: any number; at least 0 for most sparse autoencoders. With `difference` the row's
        activation minus that in the other run; with `correlation` Pearson's r over rows
    source: Bricken et al. 2023 (Towards Monosemanticity); of the interval of r Efron 1982, The
        Jackknife, the Bootstrap and Other Resampling Plans, chapter 6
    """

    takes: ClassVar = ("top", "with site")
    counts = FEATURE_AXIS
    keeps_cells = False  # the rows decide which features the cells are
    controls: ClassVar = ("density",)

    def __init__(
        self,
        member: BasisMember | None = None,
        count: int = 0,
        ranked_by: spec.RankingQuantity = "mean",
        targets: tuple[float, ...] | None = None,
        *,
        selects: bool = False,
        unembeds: bool = False,
        one_token: bool = False,
    ) -> None:
        """Create the observation.

        Args:
            member: The basis; None only in the registered instance.
            count: Number of observed features.
            ranked_by: What they are ranked by.
            targets: Value of each row of the table that they are correlated with.
            selects: Whether only some features are kept, which are known after the run.
            unembeds: Whether tokens are listed whose logits a feature raises.
            one_token: Whether each position is one token, so that a row's density is 0 or 1.
        """
        self.member, self.count, self.ranked_by = member, count, ranked_by
        self.targets, self.selects, self.unembeds = targets, selects, unembeds
        self.one_token = one_token
        if ranked_by == "correlation":
            self.form = replace(self.form, unit="correlation")

    def form_of(self, name: str) -> MetricForm:
        if name != "density":
            return self.form
        unit = "share" if self.one_token else "part"
        return replace(self.form, unit=unit, meaning="the share of tokens at which it isn't 0")

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        if rule.site is None:  # the basis was rejected
            return None
        said, before = rule.observed, len(work.diagnostics)
        assert said is not None
        resolved = super().resolve(rule, work)
        targets = self._targets(rule, work)
        if resolved is None or resolved.sites is None or has_errors(work.diagnostics[before:]):
            return None
        basis = resolve_observed_basis(rule, resolved.sites, work)
        if basis is None or not self._reads_plain_runs(rule, resolved.run, work):
            return None
        (member,), ((key, points),) = basis.members, resolved.sites.points.items()
        if resolved.in_vision and not _encodes_patches(member, rule, work):
            return None
        count = min(said.top or member.size, member.size)
        selects = count < member.size
        kind = FeatureDifferences if said.ranked_by == "difference" else FeatureActivations
        shape = work.sites.shape
        unembeds = points[0].site in STREAM_SITES and (shape.task, shape.causal) == ("tokens", True)
        does = kind(
            member,
            count,
            said.ranked_by,
            targets,
            selects=selects,
            unembeds=unembeds and shape.takes == "text" and not member.reads,
            one_token=all(
                len(tokens) == 1
                for cell in resolved.positions.written.values()
                for row in cell.in_patches(shape.merged_side**2 if resolved.in_vision else 1).hits
                for tokens in row
            ),
        )
        labels = tuple(range(1, count + 1)) if selects else tuple(range(count))
        work.add_axis(Axis(FEATURE_AXIS, labels, said.span))
        if member.reads:
            points = tuple(replace(point, site=member.reads) for point in points)
        named = {
            key: f"{label} in {basis.definition}" for key, label in resolved.sites.labels.items()
        }
        site_targets = replace(resolved.sites, points={key: points}, labels=named)
        sites = repeat_sites(site_targets, FEATURE_AXIS, count)
        return replace(resolved, does=does, sites=sites, basis=basis)

    def _targets(self, rule: spec.Rule, work: ExperimentContext) -> tuple[float, ...] | None:
        """Evaluate the value that features are correlated with; E0207 if it isn't a number."""
        said = rule.observed
        assert said is not None
        if said.column is None:
            return None
        values = evaluate_rows(said.column, work.table, work.diagnostics)
        if values is None:
            return None
        numbers = [float(v) for v in values if isinstance(v, int | float)]
        if len(numbers) < len(values):
            report_bad_observation(
                rule, work, f"can't be correlated with `{said.column.span.written}`, which isn't "
                "a number in every row", "name a number of the rows: `by correlation(count)`"
            )  # fmt: skip
            return None
        if len(set(numbers)) < 2 and not work.table.stands_in:
            report_bad_observation(
                rule, work, f"can't be correlated with `{said.column.span.written}`, which is the "
                "same in all rows", "name a value that differs between rows"
            )  # fmt: skip
            return None
        return tuple(numbers)

    def _reads_plain_runs(self, rule: spec.Rule, other: str, work: ExperimentContext) -> bool:
        """Report E0207 for a run with noise, whose features differ between draws."""
        names = dict.fromkeys((work.experiment.base, other))
        noisy = next((name for name in names if work.table.runs[name].noise is not None), None)
        if noisy is None:
            return True
        report_bad_observation(
            rule, work, f"doesn't read `{noisy}`, whose vectors differ between draws of noise",
            "observe a run without noise",
        )  # fmt: skip
        return False

    def positions_fit(self, rule: spec.Rule, found: ResolvedRule, work: ExperimentContext) -> bool:
        return check_token_numbers(rule, found, work)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = rule.spec.observed
        assert said is not None
        assert self.member is not None
        what = {
            "mean": "the activation of each feature",
            "difference": f"the activation of each feature minus that in `{rule.run}`",
            "correlation": "the correlation (Pearson) of each feature's activation with "
            f"`{'' if said.column is None else said.column.span.written}`",
        }[self.ranked_by]
        yield Convention("observed", f"{what}; a row's activation is the mean over its tokens")
        if self.ranked_by == "correlation":
            yield Convention(
                "interval of r",
                "from each row's influence on r: r + xy − r(x² + y²)/2 for standardised x and y",
            )
        yield Convention("density", "the share of tokens at which the feature isn't 0")
        if self.selects:
            yield Convention(
                "selected",
                f"up to {self.count:,} of {self.member.size:,} features, those of the largest "
                f"{_RANKED_BY[self.ranked_by]} in size over all positions; the same rows choose "
                "the features and give their values, so that the largest are overestimated",
            )
        if self.unembeds:
            yield Convention(
                "top tokens",
                "the tokens whose logits the feature raises most: its direction through the final "
                "norm's gain and the unembedding, without the norm's scale",
            )


class FeatureDifferences(FeatureActivations):
    """The activation of a feature minus that in another run."""

    reads: ClassVar = "run"


def correlate(values: Floats, targets: Floats) -> tuple[float, Floats]:
    """Return Pearson's r and the values of each row whose mean is r: [row].

    The spread of the latter around r is that of the rows' influence on r.

    Raises:
        ValueError: One of both is constant.
    """
    import numpy as np

    spread = values.std(), targets.std()
    if min(spread) <= 1e-12 * max(1.0, float(np.abs(values).max(initial=0))):
        raise ValueError("a feature with the same activation in all rows has no correlation")
    x, y = (values - values.mean()) / spread[0], (targets - targets.mean()) / spread[1]
    r = float((x * y).mean())
    return r, r + x * y - r * (x**2 + y**2) / 2


def _encodes_patches(member: BasisMember, rule: spec.Rule, work: ExperimentContext) -> bool:
    """Report E0207 for a basis whose features depend on the order of patches."""
    operand = member.operand
    if not isinstance(operand, DictionaryFile) or not operand.context_layers:
        return True
    report_bad_observation(
        rule, work, "reads a temporal SAE, whose features depend on preceding tokens, but patches "
        "of an image have no order",
        "name a site of the language model, or another dictionary",
    )  # fmt: skip
    return False
