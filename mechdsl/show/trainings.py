"""Trained dictionaries, rotations, vectors, scales, lenses, probes and masks as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mechdsl.base.text import format_size
from mechdsl.execute.run_record import StoredTraining, TrainedFit, name_fits
from mechdsl.fits.reports import FitReport, MaskReport
from mechdsl.program.significance import MIN_UNITS
from mechdsl.results.assembly.seed_means import SetAgreement, measure_agreement
from mechdsl.show.reports.text import print_hanging
from mechdsl.statistics.intervals import seed_half_width


def print_trained_fits(fits: Sequence[TrainedFit], console: Console) -> None:
    """Print a line per training, with its controls, and where it is stored."""
    for kind in dict.fromkeys(type(fit.report) for fit in fits):
        _print_table([fit for fit in fits if type(fit.report) is kind], kind, console)
    if any(fit.report.stopped_early for fit in fits):
        print_hanging(
            "  *: ",
            "stopped before the maximum number of steps, because the result no longer improved",
            console,
        )
    for fit, name in zip(fits, name_fits(fits), strict=True):
        site = fit.site.removeprefix("edges at ")  # `what` counts the edges
        what = "; ".join([*fit.report.remarks(), f"{fit.what} at {site}, in {fit.folder}"])
        print_hanging(f"  {name}: ", what, console)


def _print_table(fits: Sequence[TrainedFit], kind: type[FitReport], console: Console) -> None:
    """Print a table of trainings with one type of report, a line for each layer of a lens or a
    probe, and the meaning of its columns."""
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column(kind.declares, no_wrap=True)
    titles = [column.title for column in kind.columns]
    for name in ("rows", "held out", "steps", *titles, "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for fit, name in zip(fits, name_fits(fits), strict=True):
        report = fit.report
        first, *others = report.lines()
        table.add_row(
            name,
            f"{report.rows:,}",
            f"{report.held_out_rows:,}",
            f"{report.steps:,}" + ("*" if report.stopped_early else "") if kind.has_steps else "–",
            *first,
            f"{fit.seconds:.1f}" if fit.seconds else "stored",
        )
        for numbers in others:
            table.add_row(*[""] * 4, *numbers)
    several = group_by_seeds(fits)
    for reports in several:
        rows = [(f"{reports.basis}: mean of {len(reports.fits)} seeds", reports.mean.lines())]
        if len(reports.fits) >= MIN_UNITS:
            rows.append((f"{reports.basis}: ±", reports.half_width.lines()))
        for name, lines in rows:
            for number, line in enumerate(lines):
                cells = (own.replace("nan", "–") for own in line)
                table.add_row("" if number else name, *[""] * 3, *cells)
    console.print(table)
    for column in kind.columns:
        print_hanging(f"  {column.title}: ", column.note, console)
    for name, agreement in ((reports.basis, reports.agreement) for reports in several):
        if agreement is not None:
            print_hanging(f"  {name}: ", agreement.text, console)
    if any(len(reports.fits) >= MIN_UNITS for reports in several):
        note = f"half the width of the {CONFIDENCE:g} % interval over seeds, by Student's t over "
        note += "these trainings, each with its own held-out rows; –: all are equal"
        print_hanging("  ±: ", note, console)


def print_stored_trainings(trainings: Sequence[StoredTraining], console: Console) -> None:
    """Print a line per training of a store, in the given order."""
    table = Table(box=None, padding=(0, 1), show_edge=False)
    for title in ("key", "ended", "name", "trainer"):
        table.add_column(title, no_wrap=True)
    for title in ("file", "model", "prompts"):
        table.add_column(title, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for training in trainings:
        facts = (training.name, training.trainer, training.file, training.model, training.prompts)
        table.add_row(
            training.short_key,
            f"{training.ended:%Y-%m-%d %H:%M}",
            *(facts if training.finished else ("unfinished", *[""] * 4)),
            format_size(training.size),
        )
    console.print(table)


# --- several seeds --------------------------------------------------------------------------------

CONFIDENCE = 95.0
"""Level of the intervals over seeds, in percent."""


@dataclass(frozen=True)
class SeedReports:
    """The trainings of one `fit(…, seeds: 5)` at one site."""

    basis: str
    """`d`, or `d[layer 3]` of a family."""
    fits: tuple[TrainedFit, ...]

    @property
    def mean(self) -> FitReport:
        """A report with the mean of each number."""
        return self._combined(lambda values: float(np.mean(values)))

    @property
    def half_width(self) -> FitReport:
        """A report with half the width of each mean's interval over seeds, by Student's t; NaN
        below five trainings and where all numbers are equal."""
        return self._combined(lambda values: seed_half_width(np.array(values), CONFIDENCE))

    def _combined(self, combine: Callable[[list[float]], float]) -> FitReport:
        """Return a report with combined numbers, and the amounts of the first training."""
        first = self.fits[0].report
        found: dict[str, Any] = {field.name: getattr(first, field.name) for field in fields(first)}
        for name in found.keys() - {field.name for field in fields(FitReport)} - {"layers"}:
            values = [getattr(fit.report, name) for fit in self.fits]
            if all(isinstance(value, list) for value in values):  # one number for each layer
                each = zip(*values, strict=True)
                found[name] = [combine([*own]) if _are_numbers(own) else None for own in each]
            elif _are_numbers(values):
                found[name] = combine(values)
        return type(first)(**found)

    @property
    def agreement(self) -> SetAgreement | None:
        """How well the sets that masks chose agree; None for other trainings."""
        reports = [fit.report for fit in self.fits]
        masks = [report for report in reports if isinstance(report, MaskReport)]
        if len(masks) < len(reports):
            return None
        sets, candidates = (
            [mask.chosen.keys() for mask in masks],
            [mask.candidates for mask in masks],
        )
        return measure_agreement(sets, min(candidates), masks[0].noun)

    def to_dict(self) -> dict[str, Any]:
        """Return the mean and both ends of the interval of each number as JSON; None for an end
        below five trainings and where all numbers are equal."""
        mean, far = asdict(self.mean), asdict(self.half_width)
        numbers = {n: (own, far[n]) for n, own in mean.items() if type(own) is float}
        lists = {n: (own, far[n]) for n, own in mean.items() if isinstance(own, list)}
        lists.pop("layers", None)
        agreement = self.agreement
        return {
            "basis": self.basis,
            "seeds": [fit.seed for fit in self.fits],
            "confidence": CONFIDENCE,
            "mean": {name: own for name, (own, _) in (numbers | lists).items()},
            "low": {name: _end(own, width, -1) for name, (own, width) in numbers.items()}
            | {name: _ends(own, width, -1) for name, (own, width) in lists.items()},
            "high": {name: _end(own, width, 1) for name, (own, width) in numbers.items()}
            | {name: _ends(own, width, 1) for name, (own, width) in lists.items()},
            **({} if agreement is None else {"agreement": agreement.to_dict()}),
        }


def _are_numbers(values: Sequence[object]) -> bool:
    return all(type(value) in (int, float) for value in values)


def _end(mean: float | None, width: float | None, sign: int) -> float | None:
    """Return one end of an interval; None if there is none."""
    if mean is None or width is None or not np.isfinite(width):
        return None
    return mean + sign * width


def _ends(
    means: Sequence[float | None], widths: Sequence[float | None], sign: int
) -> list[float | None]:
    pairs = zip(means, widths, strict=True)
    return [_end(mean, width, sign) for mean, width in pairs]


def group_by_seeds(fits: Sequence[TrainedFit]) -> list[SeedReports]:
    """Return the trainings with several seeds, together; those that failed are missing."""
    groups: dict[tuple[str, str], list[TrainedFit]] = {}
    for fit in fits:
        if fit.family is not None:
            groups.setdefault((fit.family, fit.site), []).append(fit)
    several = ((name, group) for (name, _), group in groups.items() if len(group) > 1)
    return [SeedReports(name, tuple(own)) for name, own in several]
