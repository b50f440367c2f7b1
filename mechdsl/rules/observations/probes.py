"""`observe probe(count) at SITE at POS`: what a linear map of the vectors tells of a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import RowVectors
from mechdsl.resolve.probe_targets import Probe, resolve_probe
from mechdsl.resolve.resolved import ResolvedRule
from mechdsl.rules.observations.over_rows import OverRowsKind, refuse
from mechdsl.rules.observations.registry import observation

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats, Ints

PENALTY = 1.0
"""Of a logistic probe that says no other."""
UNITS: Mapping[str, str] = {"ridge": "R²", "logistic": "share"}


@observation("probe")
class ProbeObservation(OverRowsKind):
    """How well a linear probe tells the value, in rows that it was not fitted to.

    returns: whether the class is right, or 1 − (y − ŷ)² / mean((y − ȳ)²), whose mean is R²
    source: Alain and Bengio 2016, arXiv 1610.01644; its control: Hewitt and Liang 2019,
    arXiv 1909.03368
    """

    takes: ClassVar = ("arguments",)
    controls: ClassVar[tuple[str, ...]] = ("shuffled",)

    def __init__(self, probe: Probe | None = None) -> None:
        """probe: None only of the entry."""
        self.probe = probe
        if probe is not None:
            self.form = replace(type(self).form, unit=UNITS[probe.kind])

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        said = rule.observed
        assert said is not None
        if said.call is None:
            refuse(rule, work, "doesn't say what is to be told", "name a value: `probe(count)`")
            return None
        parameters = work.program.parameters
        probe = resolve_probe(said.call, work.table, parameters, work.diagnostics)
        if found is None or probe is None:
            return None
        return replace(found, does=ProbeObservation(probe))

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        from mechdsl.fits.held_out import folds, shuffled

        probe = self.probe
        assert probe is not None
        y = np.array([probe.targets[row] for row in seen.prompts.tolist()], dtype=np.float64)
        strata = y[:, 0].tolist() if probe.kind == "logistic" else None
        fold = folds(seen.keys, probe.folds, seed, strata)
        return [
            _held_out(probe, seen.vectors, own, fold) for own in (y, shuffled(seen.keys, y, seed))
        ]

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        assert self.probe is not None
        return _said(self.probe)


def _held_out(probe: Probe, vectors: Floats, y: Floats, fold: Ints) -> Floats:
    """[row] how well each is told by a fit to the other folds."""
    import numpy as np

    from mechdsl.fits.held_out import LogisticProbe, RidgeProbe, cross_validated, r_squared

    if probe.kind == "ridge":
        return r_squared(y, cross_validated(vectors, y, fold, RidgeProbe(probe.penalty)))
    fit = LogisticProbe(PENALTY if probe.penalty is None else probe.penalty)
    right = cross_validated(vectors, y[:, 0], fold, fit) == y[:, 0]
    return right.astype(np.float64)


def _said(probe: Probe) -> Iterator[str]:
    """How it is fitted, for the conventions."""
    if probe.kind == "ridge":
        several = len(probe.targets[0])
        of = f"{several} numbers together" if several > 1 else "a number"
        yield f"ridge regression of {of}, R² in rows of other folds"
        penalty = "on folds within the rows of each fit, of 0.01 to 10,000 by tens"
        yield f"penalty {probe.penalty:g}" if probe.penalty else f"penalty chosen {penalty}"
    else:
        names = ", ".join(probe.classes[:8]) + (", …" if len(probe.classes) > 8 else "")
        counts = [0] * len(probe.classes)
        for (number,) in probe.targets:
            counts[int(number)] += 1
        commonest = max(counts) / len(probe.targets)
        yield f"logistic regression, {len(probe.classes):,} classes ({names})"
        yield f"the commonest is {commonest:.3g} of the rows"
        yield f"penalty {PENALTY if probe.penalty is None else probe.penalty:g} / 2 · Σ weights²"
    yield (
        f"vectors standardised by the rows of each fit; {probe.folds} folds, in which rows that"
        " look alike there (equal tokens) are together"
    )
    yield "values are the clean row's"
    yield "shuffled: the same with the values dealt to other rows (Hewitt and Liang 2019)"
