"""`observe probe(count) at SITE at POS`: what a linear map of the vectors tells of a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.base.plural import plural
from mechdsl.diagnostics.core import has_errors
from mechdsl.program import spec
from mechdsl.program.lower_directions import rows_named, train_of
from mechdsl.prompts.prompt_table import RunRow
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import RowVectors, TrainedOn, Training
from mechdsl.resolve.probe_targets import Probe, resolve_probe
from mechdsl.resolve.resolved_rule import ResolvedRule
from mechdsl.resolve.targets import cells_elsewhere
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

    def __init__(self, probe: Probe | None = None, trained_on: TrainedOn | None = None) -> None:
        """probe: None only of the entry."""
        self.probe, self.trained_on = probe, trained_on
        if probe is not None:
            self.form = replace(type(self).form, unit=UNITS[probe.kind])

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        said = rule.observed
        assert said is not None
        if said.call is None:
            refuse(rule, work, "doesn't say what is to be told", "name a value: `probe(count)`")
            return None
        parameters, before = work.program.parameters, len(work.diagnostics)
        train = None if found is None else trained_on(rule, found, work)
        if len(work.diagnostics) > before:
            return None
        other = None if train is None else train.table
        probe = resolve_probe(said.call, work.table, parameters, work.diagnostics, other)
        if found is None or probe is None:
            return None
        return replace(found, does=ProbeObservation(probe, train))

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        from mechdsl.fits.held_out import folds, shuffled

        probe = self.probe
        assert probe is not None
        y = targets_of(probe.targets, seen.prompts)
        if seen.training is not None and probe.train is not None:
            own = targets_of(probe.train, seen.training.prompts)
            dealt = shuffled(seen.training.keys, own, seed)
            return [_fitted(probe, seen, seen.training, each, y, seed) for each in (own, dealt)]
        strata = y[:, 0].tolist() if probe.kind == "logistic" else None
        fold = folds(seen.keys, probe.folds, seed, strata)
        return [
            _held_out(probe, seen.vectors, own, fold) for own in (y, shuffled(seen.keys, y, seed))
        ]

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        assert self.probe is not None
        return _said(self.probe)


def trained_on(rule: spec.Rule, found: ResolvedRule, work: Work) -> TrainedOn | None:
    """The rows behind `train:`, at the positions of the line; None where there are none, and after
    an error."""
    said = rule.observed
    named = None if said is None else train_of(said.call)
    if named is None or said is None:
        return None
    rows = rows_named(named, work.program.prompts)
    table = None if rows is None else work.table.beside.get(rows.key)
    if rows is None or table is None or (not table.stands_in and rows.run not in table.runs):
        known = ", ".join(f"`{name}`" for name in work.program.prompts)
        hint = f"write a block, its part or its run: `train: fruit.train`; there is {known}"
        refuse(rule, work, f"can't be fitted on `{named.span.written}`", hint)
        return None
    if work.table.stands_in or table.stands_in:
        return None
    own, fitted = work.table.runs[work.experiment.base].rows, table.runs[rows.run].rows
    keys, texts = set(table.row_keys), {row.ids for row in fitted}
    images = _images(fitted) if table.cut_from or work.table.cut_from else set()
    pairs = zip(work.table.row_keys, own, strict=True)
    shared = sum(
        key in keys or row.ids in texts or bool(_images([row]) & images) for key, row in pairs
    )
    if shared:
        reason = f"is told on {plural(shared, 'row')} that it is fitted on"
        refuse(rule, work, reason, "take parts of a split: `train: fruit.train` on `fruit.test`")
        return None
    cells, problems = cells_elsewhere(rule.at, table, rows.run, work)
    work.diagnostics.extend(problems)
    by_label = {cell.label: cell for cell in cells}
    labels = [cell.label for cell in found.positions.written.values()]
    lacking = [label for label in labels if label not in by_label]
    if lacking and not has_errors(problems):
        reason = f"is fitted on rows without `{lacking[0]}`"
        refuse(rule, work, reason, "name a position that both have")
        return None
    if has_errors(problems):
        return None
    return TrainedOn(table, table.runs[rows.run], tuple(by_label[label] for label in labels))


def _images(rows: Sequence[RunRow]) -> set[str]:
    """What the images are made of that rows are, or are tiles of."""
    images = (row.image for row in rows if row.image is not None)
    return {replace(image.uncut, changes=()).content() for image in images}


def targets_of(targets: Sequence[tuple[float, ...]], prompts: Ints) -> Floats:
    """[row, target]"""
    import numpy as np

    return np.array([targets[row] for row in prompts.tolist()], dtype=np.float64)


def _fitted(
    probe: Probe, seen: RowVectors, training: Training, own: Floats, y: Floats, seed: int
) -> Floats:
    """[row] how well each is told by a fit to other rows; own: [training row, target]."""
    import numpy as np

    from mechdsl.fits.held_out import LogisticProbe, RidgeProbe, folds, r_squared

    distinct = len(set(training.keys))
    if distinct < 2:
        raise ValueError("the rows that it is fitted on look alike there")
    if probe.kind == "ridge":
        inner = folds(training.keys, min(probe.folds, distinct), seed)
        predict = RidgeProbe(probe.penalty)(training.vectors, own, inner)
        return r_squared(y, predict(seen.vectors))
    fit = LogisticProbe(PENALTY if probe.penalty is None else probe.penalty)
    found, index = np.unique(own[:, 0], return_inverse=True)
    told = fit(training.vectors, index.astype(np.float64), index)(seen.vectors)
    return (found[told.astype(np.int64)] == y[:, 0]).astype(np.float64)


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
        held = "rows of other folds" if probe.train is None else "rows that it wasn't fitted on"
        yield f"ridge regression of {of}, R² in {held}"
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
    if probe.train is None:
        yield (
            f"vectors standardised by the rows of each fit; {probe.folds} folds, in which rows that"
            " look alike there (equal tokens) are together"
        )
    else:
        yield f"fitted on `{probe.trained_on}` ({len(probe.train):,} rows), which standardise"
    yield "values are the clean row's"
    yield "shuffled: the same with the values dealt to other rows (Hewitt and Liang 2019)"
