"""Trained dictionaries, rotations, vectors, scales, lenses, probes and masks as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mechdsl.base.text import format_size
from mechdsl.execute.run_record import (
    CircuitReport,
    CorrelationReport,
    DecoderReport,
    EditReport,
    FitReport,
    IndependenceReport,
    LensReport,
    MaskReport,
    MixtureReport,
    ProbeReport,
    Report,
    RotationReport,
    ScaleReport,
    SoftPromptReport,
    StoredTraining,
    TrainedFit,
    TrainingReport,
    VectorReport,
)
from mechdsl.results.assembly.seed_means import SetAgreement, measure_agreement
from mechdsl.show.reports.text import print_hanging
from mechdsl.statistics.intervals import mean_half_width

NOTES = {
    "explained": "share of the variance of the held-out vectors; without any, of training vectors",
    "untrained": "the same with the first, random weights",
    "components": "the same for principal components, as many as features are active on average",
    "active": "mean number of active features of a vector",
    "inactive": "features that are active for none of these vectors",
}
"""Columns of dictionaries, as the lines below the table explain them."""

DECODER_NOTES = {
    "explained": "share of the variance of the held-out decoder directions; without any, of "
    "training directions",
    "normal": "the same for a dictionary of normal vectors with the same mean and covariance",
    **{name: note for name, note in NOTES.items() if name != "explained"},
}
"""Columns of dictionaries of a decoder."""

INDEPENDENCE_NOTES = {
    "explained": "share of the variance of the held-out vectors; without any, of training vectors",
    "kurtosis": "median over components of the size of the excess kurtosis of the coordinates of "
    "these vectors; 0 for a normal distribution",
    "random": "the same for a random rotation of the whitened vectors",
    "components": "the same for principal components, which explain the same share",
}
"""Columns of independent components."""

CORRELATION_NOTES = {
    "paired": "mean over components of the correlation of both coordinates on held-out vectors; "
    "without any, on training vectors",
    "train": "the same on training vectors",
    "shuffled": "the same on held-out vectors after a training on pairs in a random order",
    "random": "the same for random directions",
    "pca": "the same for pairs of principal components",
}
"""Columns of correlated components."""

MIXTURE_NOTES = {
    "mixture": "mean log likelihood of the held-out vectors in nats; without any, of training "
    "vectors",
    "random": "the same for random training vectors as means",
    "one": "the same for one Gaussian",
    "shuffled": "the same for a mixture of vectors whose coordinates along their principal axes "
    "are exchanged at random, on held-out vectors that are changed in this way",
    "empty": "components that are the most likely one of none of these vectors",
}
"""Columns of mixtures."""

ROTATION_NOTES = {
    "trained": "mean of the measure over held-out rows while the trained subspace is patched; "
    "without any, over training rows",
    "random": "the same for a random subspace of the same size",
    "no patch": "the same in the clean run",
    "whole": "the same while the whole vector is patched",
}
"""Columns of rotations."""

VECTOR_NOTES = {
    "length": "length of the vector",
    "trained": "mean of the measure over held-out rows while the vector is added; without held-out "
    "rows, over training rows",
    "random": "mean of the same over 8 random vectors of this length",
    "no vector": "the same in the clean run",
    "difference": "the same for the mean difference between `from` and the clean run over training "
    "rows, scaled to this length; –: no `from`",
}
"""Columns of vectors."""

SOFT_PROMPT_NOTES = {
    "length": "mean length of the vectors",
    "trained": "mean of the measure over held-out rows while the vectors are written; without "
    "held-out rows, over training rows",
    "random": "mean of the same over 8 draws of random vectors of these lengths",
    "start": "the same for the vectors from which the training starts",
    "no vector": "the same for the run without a written vector",
    "clean": "the same in the clean run, without inserted tokens; –: trained on the clean run",
}
"""Columns of soft prompts."""

EDIT_NOTES = {
    "length": "mean length of the vectors that the edit adds",
    "trained": "mean of the measure over held-out rows while the edit is added; without held-out "
    "rows, over training rows",
    "subspace": "mean of the same over 8 edits that add vectors of the same lengths to the same "
    "activations, in a random subspace of this rank",
    "random": "mean of the same over 8 random edits of this rank and mean length",
    "constant": "the same while the mean of the vectors that the edit adds is always added",
    "no edit": "the same in the clean run",
}
"""Columns of edits."""

SCALE_NOTES = {
    "scales": "smallest and largest scale of a channel",
    "trained": "mean of the measure over held-out rows while the vectors are scaled; without "
    "held-out rows, over training rows",
    "random": "mean of the same over 8 random orders of the channels",
    "mean": "the same while all channels have the mean scale",
    "zero": "the same while the vectors are 0",
    "no scale": "the same in the clean run",
}
"""Columns of scales."""

MASK_NOTES = {
    "trained": "mean of the measure over held-out rows while the group is written, or with `keep` "
    "everything else; without held-out rows, over training rows",
    "random": "mean of the same over random groups of this size",
    "single": "the same for the group with the largest effects alone on training rows; –: it "
    "costs more than the training",
    "no patch": "the same in the clean run",
    "all": "the same while everything that the mask chooses from is written",
    "undecided": "chosen with a probability below 0.9, or not chosen with one above 0.1",
}
"""Columns of masks."""

CIRCUIT_NOTES = {
    "edges": "edges of the circuit, of all edges of the model",
    "trained": "mean of the measure over held-out rows while all other edges carry the other "
    "values; without held-out rows, over training rows",
    "random": "mean of the same over 8 random circuits of this size",
    "no patch": "the same in the clean run",
    "all": "the same while every edge carries the other value",
}
"""Columns of circuits without gates."""

LENS_NOTES = {
    "layer": "layer whose vectors the lens reads",
    "trained": "mean KL in nats from the model's distribution to that of the lens, over held-out "
    "vectors; without any, over training vectors",
    "logit lens": "the same without training",
    "average": "the same for the mean of the model's distributions over training vectors",
}
"""Columns of lenses."""


PROBE_NOTES = {
    "layer": "layer whose vectors the probe reads",
    "trained": "accuracy for a class, R² for a number, on held-out rows; without any, on training "
    "rows",
    "shuffled": "the same for the probe of shuffled training values",
    "random": "mean of the same over probes that read one random direction of the vectors",
    "constant": "the same for the most common class, or the mean, of training rows",
}
"""Columns of probes."""

ON_VECTORS = (TrainingReport, IndependenceReport, CorrelationReport, MixtureReport, LensReport)
"""Reports on vectors, without a measure."""


def print_trained_fits(fits: Sequence[TrainedFit], console: Console) -> None:
    """Print a line per training, with its controls, and where it is stored."""
    kinds: Sequence[tuple[type[Report], Mapping[str, str], str]] = (
        (TrainingReport, NOTES, "basis"),
        (DecoderReport, DECODER_NOTES, "basis"),
        (IndependenceReport, INDEPENDENCE_NOTES, "basis"),
        (CorrelationReport, CORRELATION_NOTES, "basis"),
        (MixtureReport, MIXTURE_NOTES, "basis"),
        (RotationReport, ROTATION_NOTES, "basis"),
        (VectorReport, VECTOR_NOTES, "direction"),
        (SoftPromptReport, SOFT_PROMPT_NOTES, "direction"),
        (EditReport, EDIT_NOTES, "direction"),
        (ScaleReport, SCALE_NOTES, "direction"),
        (MaskReport, MASK_NOTES, "group"),
        (CircuitReport, CIRCUIT_NOTES, "circuit"),
        (LensReport, LENS_NOTES, "lens"),
        (ProbeReport, PROBE_NOTES, "probe"),
    )
    for kind, notes, what in kinds:
        own = [fit for fit in fits if type(fit.report) is kind]
        if own:
            _print_table(own, notes, what, console)
    if any(fit.report.stopped_early for fit in fits):
        print_hanging(
            "  *: ",
            "stopped before the maximum number of steps, because the result no longer improved",
            console,
        )
    for fit in fits:
        what = f"{fit.what} at {fit.site}, in {fit.folder}"
        if isinstance(fit.report, ProbeReport):
            rows = f"{fit.report.distinct_rows:,} different training rows"
            what = f"{fit.report.unit} for `{fit.report.predicts}`, {rows}; {what}"
        elif not isinstance(fit.report, ON_VECTORS):
            what = f"{fit.report.objective}; {what}"
        if isinstance(fit.report, VectorReport | SoftPromptReport | EditReport):
            what = f"vectors of the site have length {fit.report.site_length:.3g}; {what}"
        if isinstance(fit.report, CorrelationReport):
            what = f"{fit.report.summary}; {what}"
        if isinstance(fit.report, MaskReport):
            what = f"{_list_inactive(fit.report)}{fit.report.list_chosen()}; {what}"
        if isinstance(fit.report, CircuitReport):
            what = f"scores {fit.report.list_chosen()}; {fit.report.made}; {what}"
        print_hanging(f"  {fit.basis}: ", what, console)


def _list_inactive(report: MaskReport) -> str:
    """Return how many candidates of a mask have no gate; empty if all have one."""
    if not report.inactive:
        return ""
    return f"{report.inactive:,} further {report.noun}s change no training row; "


def _print_table(
    fits: Sequence[TrainedFit], notes: Mapping[str, str], what: str, console: Console
) -> None:
    """Print a table of trainings of one kind, a line for each layer of a lens or a probe, and the
    meaning of its columns.

    Args:
        what: What the file declares: `basis` or `direction`.
    """
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column(what, no_wrap=True)
    for name in ("rows", "held out", "steps", *notes, "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for fit in fits:
        report = fit.report
        first, *others = _lines(report)
        table.add_row(
            fit.basis,
            f"{report.rows:,}",
            f"{report.held_out_rows:,}",
            "–"
            if isinstance(report, ProbeReport)
            else f"{report.steps:,}" + ("*" if report.stopped_early else ""),
            *first,
            f"{fit.seconds:.1f}" if fit.seconds else "stored",
        )
        for numbers in others:
            table.add_row(*[""] * 4, *numbers)
    several = group_by_seeds(fits)
    for each in several:
        mean, far = f"{each.basis}: mean of {len(each.fits)} seeds", f"{each.basis}: ±"
        for name, lines in ((mean, _lines(each.mean)), (far, _lines(each.half_width))):
            for number, line in enumerate(lines):
                cells = (own.replace("nan", "–") for own in line)
                table.add_row("" if number else name, *[""] * 3, *cells)
    console.print(table)
    for name, note in notes.items():
        print_hanging(f"  {name}: ", note, console)
    for name, agreement in ((own.basis, own.agreement) for own in several):
        if agreement is not None:
            print_hanging(f"  {name}: ", agreement.text, console)
    if several:
        note = f"half the width of the {CONFIDENCE:g} % interval over seeds, by Student's t over "
        note += "these trainings, each with its own held-out rows; –: all are equal"
        print_hanging("  ±: ", note, console)


def _lines(report: Report) -> list[list[str]]:
    """Return the cells of the columns of the notes: one line, or one for each layer."""
    if isinstance(report, LensReport):
        return _lens_numbers(report)
    if isinstance(report, ProbeReport):
        scores = zip(report.trained, report.shuffled, report.random, strict=True)
        return [
            [
                "–" if layer is None else f"{layer}",
                *("–" if one is None else f"{one:.3f}" for one in (*own, report.constant)),
            ]
            for layer, own in zip(report.layers, scores, strict=True)
        ]
    return [_numbers(report)]


def _lens_numbers(report: LensReport) -> list[list[str]]:
    """Return the cells of the columns of the notes, for each layer."""
    columns = zip(report.layers, report.trained, report.untrained, strict=True)
    return [
        [f"{layer}", f"{trained:.3f}", f"{untrained:.3f}", f"{report.average:.3f}"]
        for layer, trained, untrained in columns
    ]


def _numbers(report: Report) -> list[str]:
    """Return the cells of the columns of the notes for this kind; not for a lens or a probe."""
    assert not isinstance(report, LensReport | ProbeReport)
    if isinstance(report, VectorReport):
        means = (report.trained, report.random, report.unsteered, report.difference)
        return [f"{report.length:.3g}", *("–" if mean is None else f"{mean:.3f}" for mean in means)]
    if isinstance(report, SoftPromptReport):
        controls = (report.random, report.untrained, report.placeholders, report.clean)
        means = (report.trained, *controls)
        return [f"{report.length:.3g}", *("–" if mean is None else f"{mean:.3f}" for mean in means)]
    if isinstance(report, EditReport):
        controls = (report.turned, report.random, report.constant, report.unedited)
        means = (f"{mean:.3f}" for mean in (report.trained, *controls))
        return [f"{report.length:.3g}", *means]
    if isinstance(report, ScaleReport):
        means = (report.trained, report.shuffled, report.uniform, report.zero, report.unscaled)
        span = f"{report.smallest:.2f}..{report.largest:.2f}"
        return [span, *(f"{mean:.3f}" for mean in means)]
    if isinstance(report, MaskReport):
        single = "–" if report.single is None else f"{report.single:.3f}"
        controls = (f"{each:.3f}" for each in (report.unpatched, report.whole))
        undecided = _share(report.undecided, report.candidates)
        return [f"{report.trained:.3f}", f"{report.random:.3f}", single, *controls, undecided]
    if isinstance(report, CircuitReport):
        means = (report.trained, report.random, report.unpatched, report.whole)
        edges = f"{len(report.chosen):,} of {report.candidates:,}"
        return [edges, *(f"{mean:.3f}" for mean in means)]
    if isinstance(report, IndependenceReport):
        others = (report.untrained_kurtosis, report.components_kurtosis)
        numbers = (report.explained, report.kurtosis, *others)
        return [f"{number:.3f}" for number in numbers]
    if isinstance(report, CorrelationReport):
        controls = (report.shuffled, report.untrained, report.components)
        return [f"{number:.3f}" for number in (report.mean, report.training, *controls)]
    if isinstance(report, MixtureReport):
        others = (report.untrained, report.single, report.shuffled)
        likelihoods = (f"{number:.2f}" for number in (report.log_likelihood, *others))
        return [*likelihoods, _share(report.empty, report.components)]
    if isinstance(report, RotationReport):
        means = (report.trained, report.untrained, report.unpatched, report.whole)
        return [f"{mean:.3f}" for mean in means]
    normal = [f"{report.normal_explained:.3f}"] if isinstance(report, DecoderReport) else []
    return [
        f"{report.explained:.3f}",
        *normal,
        f"{report.untrained_explained:.3f}",
        f"{report.components_explained:.3f}",
        f"{report.active:.1f}",
        f"{round(report.inactive, 1):,}",
    ]


def _share(count: float, every: float) -> str:
    """Return `0 of 16`; of means over seeds `0.3 of 16`, and of their intervals `0.5`."""
    of = "" if np.isnan(every) else f" of {every:g}"
    return f"{round(count, 1):g}{of}"


def print_stored_trainings(trainings: Sequence[StoredTraining], console: Console) -> None:
    """Print a line per training of a store, in the given order."""
    table = Table(box=None, padding=(0, 1), show_edge=False)
    for title in ("key", "ended", "name", "trainer"):
        table.add_column(title, no_wrap=True)
    for title in ("file", "model", "prompts"):
        table.add_column(title, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for each in trainings:
        facts = (each.name, each.trainer, each.file, each.model, each.prompts)
        table.add_row(
            each.short_key,
            f"{each.ended:%Y-%m-%d %H:%M}",
            *(facts if each.finished else ("unfinished", *[""] * 4)),
            format_size(each.size),
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
    def mean(self) -> Report:
        """A report with the mean of each number."""
        return self._combined(lambda values: float(np.mean(values)))

    @property
    def half_width(self) -> Report:
        """A report with half the width of each mean's interval over seeds, by Student's t; NaN
        where all numbers are equal."""
        return self._combined(lambda values: mean_half_width(np.array(values), CONFIDENCE))

    def _combined(self, combine: Callable[[list[float]], float]) -> Report:
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
        sets, candidates = [own.chosen.keys() for own in masks], [own.candidates for own in masks]
        return measure_agreement(sets, min(candidates), masks[0].noun)

    def to_dict(self) -> dict[str, Any]:
        """Return the mean and both ends of the interval of each number as JSON; None for an end
        where all numbers are equal."""
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
    several = ((name, own) for (name, _), own in groups.items() if len(own) > 1)
    return [SeedReports(name, tuple(own)) for name, own in several]
