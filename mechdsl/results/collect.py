"""From measured values to experiment results: cells named, hits shown, conventions written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import compress, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Floats, Ints
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.measured_values import MeasuredValues, base_per_cell, per_cell
from mechdsl.execute.no_value import gap_words
from mechdsl.execute.not_finite import place_words
from mechdsl.execute.pass_size import Sizes
from mechdsl.execute.profile import Profile
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.plan import ExperimentPlan
from mechdsl.program import spec
from mechdsl.resolve.name_cells import cell_keys
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.run_conventions import conventions, fallbacks, model_words, pass_sizes
from mechdsl.statistics.measure_data import MeasureData, Missing
from mechdsl.statistics.null_bands import null_bands
from mechdsl.vocab.effects import EFFECTS
from mechdsl.vocab.metrics import Form

PACKAGES = ("mechdsl", "torch", "transformers", "tokenizers", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def collect(
    plan: ExperimentPlan,
    measured: MeasuredValues,
    models: Mapping[str, LoadedModel],
    profile: Profile,
    sizes: Sizes,
) -> ExperimentResult:
    """The result of one experiment, or of one variant of it, without statistics."""
    experiment = plan.experiment
    model, *read = (models[name] for name in experiment.models)
    table, kept = experiment.table, measured.kept
    rows = table.runs["clean"].rows
    source = experiment.spec.source
    there = plan.exists
    measures: list[MeasureData] = []
    for number, (resolved, said) in enumerate(
        zip(experiment.measures, experiment.spec.measures, strict=True)
    ):
        truth = None
        if resolved.truth is not None:
            truth = np.array([[resolved.truth[i] for i in kept]], dtype=np.float64)
        measures.append(
            MeasureData(
                label=resolved.label,
                metric=resolved.text,
                effect=said.effect,
                kind=resolved.kind,
                per_prompt=said.per_prompt,
                patched=measured.patched[number][there],
                base=_of(there, base_per_cell(plan, measured, experiment.spec.base, number)),
                source=None
                if source is None
                else _of(there, base_per_cell(plan, measured, source, number)),
                inert=plan.inert[there],
                truth=truth,
                unit=resolved.unit,
                rounding=_of(there, per_cell(plan, measured, measured.rounding[number])),
                word=resolved.word,
                at=said.place,
                gaps=tuple(gap_words(measured, number, c) for c in np.flatnonzero(there).tolist()),
            )
        )
    return ExperimentResult(
        name=experiment.name,
        model=model.name,
        axes=tuple(axis.name for axis in experiment.axes),
        aliases={axis.alias: axis.name for axis in experiment.axes if axis.alias is not None},
        centres=tuple(axis.name for axis in experiment.axes if axis.of_windows),
        cells=tuple(cell_keys(experiment)),
        measures=tuple(measures),
        runs={
            run: {m.label: values[n].mean(axis=0) for n, m in enumerate(experiment.measures)}
            for run, values in measured.unpatched.items()
        },
        accuracy=measured.accuracy,
        accuracy_rounding=measured.accuracy_rounding,
        base=experiment.spec.base,
        source=source,
        called=_called(experiment),
        conventions={
            **conventions(plan, measured, model),
            **{f"model {other.name}": model_words(other) for other in read},
            **fallbacks(model, profile),
            **pass_sizes(sizes.kept),
        },
        hashes={
            **_hashes(experiment, model),
            **{f"model {other.name}": other.provenance.get("weights", "") for other in read},
            **{key: value for other in read for key, value in other.made_of.items()},
        },
        left_out={
            table.row_ids[row]: place_words(unusable, experiment)
            for row, unusable in sorted(measured.unusable.items())
        },
        row_ids=tuple(table.row_ids[i] for i in kept),
        row_values=_row_values([rows[i].values for i in kept]),
        reports=experiment.spec.reports or (_table(experiment),),
        rounding=_rounding_words(experiment, model),
        **_overlaid(experiment, kept, there),
    )


def _rounding_words(experiment: ResolvedExperiment, model: LoadedModel) -> str:
    """What bounds of rounding come from."""
    dtype = str(model.dtype).removeprefix("torch.")
    words = [
        f"{model.rounding:.2g} of the largest logit that a metric reads, by this model's "
        f"self-check in {dtype}"
    ]
    measures = (*experiment.measures, *experiment.accuracies.values())
    words += words_of_forms([atom.form for measure in measures for atom in measure.atoms])
    return "; ".join(words)


def words_of_forms(forms: Sequence[Form]) -> Iterator[str]:
    """What bounds are of that are no numbers in logits."""
    if any(form.unit == "rank" for form in forms):
        yield "a rank moves over the tokens whose logits are within twice that"
    shares = {form.takes for form in forms if form.unit == "share"}
    if shares - {"label"}:
        yield "`correct` changes in rows whose two best logits are within twice that"
    if "label" in shares:
        yield "`correct` changes in rows whose label has a logit within that of 0"
    if any(form.kind == "category" for form in forms):
        yield "a category changes in rows whose two best numerals are within twice that"


def _called(experiment: ResolvedExperiment) -> dict[str, str]:
    """The clean run beside that of another block or model is called by its own."""
    ends = (experiment.spec.base, experiment.spec.source or "clean")
    runs = [experiment.table.runs[name] for name in ends]
    if any(run.prompts is not None for run in runs):
        return {"clean": experiment.table.name}
    if any(run.model is not None for run in runs):
        return {"clean": experiment.model.name}
    return {}


def _of(there: NDArray[np.bool_], values: Floats) -> Floats:
    """Of [1 or cell, prompt], the cells that there are."""
    return values[there] if len(values) == len(there) else values


def _overlaid(
    experiment: ResolvedExperiment, kept: Ints, there: NDArray[np.bool_]
) -> dict[str, Any]:
    """The tokens of every prompt, and which of them each cell hits: what an overlay draws on."""
    if not any(report.kind == "overlay" for report in experiment.spec.reports):
        return {}
    rows = experiment.table.runs[experiment.spec.base].rows
    tokenizer = experiment.model.tokenizer
    texts = tuple(
        tuple(
            ("" if row.special[p] else row.text[slice(*row.offsets[p])])
            or tokenizer.token_text(row.ids[p])
            for p in range(len(row.ids))
        )
        for row in (rows[i] for i in kept)
    )
    names = [axis.name for axis in experiment.axes]
    made: dict[tuple[object, ...], tuple[tuple[int, ...], ...]] = {}

    def hits(index: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        keys = [
            tuple(index[names.index(axis)] for axis in rule.positions.axes)
            for rule in experiment.rules
        ]
        if tuple(keys) not in made:  # cells of one position share their tuples
            cells = [r.positions.written[k] for r, k in zip(experiment.rules, keys, strict=True)]
            made[tuple(keys)] = tuple(
                tuple(
                    sorted(
                        {p for cell in cells for run in cell.hits[i] for p in run if p < len(own)}
                    )
                )
                for i, own in zip(kept, texts, strict=True)
            )
        return made[tuple(keys)]

    every = product(*(range(len(axis)) for axis in experiment.axes))
    return {"texts": texts, "hits": tuple(hits(index) for index in compress(every, there))}


def with_control(
    result: ExperimentResult, plan: ExperimentPlan, measured: Mapping[str, MeasuredValues]
) -> ExperimentResult:
    """The result with what its control gave, where it has one."""
    experiment, control = plan.experiment, plan.experiment.control
    if control is None:
        return result
    bands = null_bands(
        result.measures,
        [
            values[np.tile(plan.exists, control.draws)]
            for values in measured[control.experiment.key].patched
        ],
        control.draws,
        control.what,
        confidence=experiment.spec.statistics.confidence,
        effects=EFFECTS,
    )
    return replace(result, controls=bands)


def without_measures(
    result: ExperimentResult, missing: Mapping[int, Diagnostic]
) -> ExperimentResult:
    """The result without values of the measures that could not be computed."""

    def gone(data: MeasureData, problem: Diagnostic) -> MeasureData:
        nothing = np.full_like(data.patched, np.nan)
        return replace(data, patched=nothing, missing=why(problem))

    return replace(
        result,
        measures=tuple(
            gone(data, missing[number]) if number in missing else data
            for number, data in enumerate(result.measures)
        ),
        controls=tuple(
            None if number in missing else band for number, band in enumerate(result.controls)
        ),
    )


def why(problem: Diagnostic) -> Missing:
    """What a diagnostic says, in one line."""
    label = problem.label_text
    return Missing(problem.code, f"{problem.message}: {label}" if label else problem.message)


def _table(experiment: ResolvedExperiment) -> spec.Report:
    """What is shown where the file asks for nothing."""
    return spec.Report(span=experiment.spec.span, kind="table")


def _row_values(rows: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = list(rows[0]) if rows else []
    return {name: [row.get(name) for row in rows] for name in names}


def _hashes(experiment: ResolvedExperiment, model: LoadedModel) -> dict[str, str]:
    found = {"model": model.provenance.get("weights", ""), **model.made_of}
    found["tokenizer"] = experiment.model.tokenizer.hash
    if experiment.table.data_hash:
        found["data"] = experiment.table.data_hash
    found.update({f"data of {name}": d for name, d in experiment.table.other_data.items()})
    for each in experiment.python:
        key = f"python {each.file}"
        # Files that are called the same lie beside different `.mech` files.
        found[key if found.get(key, each.digest) == each.digest else f"python {each.path}"] = (
            each.digest
        )
    return found
