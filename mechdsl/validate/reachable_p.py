"""What is known of p before anything is measured: how small it can get. No numpy here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.w07_statistics import TooFewPrompts
from mechdsl.program import spec
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.vocab.effects import EFFECTS

EXACT_UP_TO = 14
"""Prompts with a non-zero delta up to which all sign flips are enumerated."""

CORRECTION_NAMES: Mapping[str, str] = {
    "holm": "Holm",
    "bh": "Benjamini-Hochberg",
    "max": "max-statistic",
    "none": "none",
}
"""How `stats correct WORD` is called."""


def check_rows(
    variants: Sequence[ResolvedExperiment], row_ids: Collection[int]
) -> list[Diagnostic]:
    """W0720 where no p of an experiment can be small enough, however large the effect.

    row_ids: those of its rows that are run.
    """
    experiment = variants[0]
    known = [m for m in experiment.spec.measures if m.effect in EFFECTS]
    tested = [m for m in known if EFFECTS[m.effect].tested]
    if not tested or not experiment.rules:
        return []
    settings, table = experiment.spec.statistics, experiment.table
    run = zip(table.row_ids, table.runs["clean"].rows, strict=True)
    rows = [row for row_id, row in run if row_id in row_ids]
    units = len(rows)
    if settings.by is not None and rows and settings.by in rows[0].values:
        units = len({str(row.values.get(settings.by)) for row in rows})
    tests = len(tested) * sum(each.n_cells for each in variants)
    fewer = len(rows) < len(table) and experiment.spec.keep
    return check_prompts(units, tests, settings, fewer[0].span if fewer else tested[0].span)


def check_prompts(
    units: int, tests: int, settings: spec.Statistics, span: Span | None
) -> list[Diagnostic]:
    """W0720 where so few prompts (or groups) leave no p that is small enough."""
    smallest = 2.0 ** (1 - units)
    # Holm multiplies the smallest p by the number of tests; the others may leave it as it is
    corrected = min(1.0, smallest * (tests if settings.correction == "holm" else 1))
    if units > EXACT_UP_TO or tests == 0 or corrected < 1 - settings.confidence / 100:
        return []
    return [
        TooFewPrompts(
            span=span,
            n=units,
            smallest=f"{smallest:.3g}",
            corrected=f"{corrected:.3g}",
            correction=CORRECTION_NAMES[settings.correction],
            cells=tests,
        )
    ]
