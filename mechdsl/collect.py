"""From measured values to experiment results: cells named, hits shown, conventions written down."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from mechdsl import spec
from mechdsl.execute import Measured, base_per_cell
from mechdsl.lanes import noise_scale
from mechdsl.loaded import LoadedModel
from mechdsl.plan import ExperimentPlan
from mechdsl.profile import Profile
from mechdsl.resolve.cells import cell_keys
from mechdsl.resolve.types import ResolvedExperiment
from mechdsl.results.experiment import ExperimentResult
from mechdsl.results.statistics import MeasureData

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
    plan: ExperimentPlan, measured: Measured, model: LoadedModel, profile: Profile
) -> ExperimentResult:
    """The result of one experiment, without statistics."""
    experiment = plan.experiment
    table, kept = experiment.table, measured.kept
    rows = table.runs["clean"].rows
    source = experiment.spec.source
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
                patched=measured.patched[number],
                base=base_per_cell(plan, measured, experiment.spec.base, number),
                source=None if source is None else base_per_cell(plan, measured, source, number),
                inert=plan.inert,
                truth=truth,
                unit=resolved.unit,
            )
        )
    return ExperimentResult(
        name=experiment.name,
        model=model.name,
        axes=tuple(axis.name for axis in experiment.axes),
        aliases={axis.alias: axis.name for axis in experiment.axes if axis.alias is not None},
        cells=tuple(cell_keys(experiment)),
        measures=tuple(measures),
        runs={
            run: {m.label: values[n].mean(axis=0) for n, m in enumerate(experiment.measures)}
            for run, values in measured.unpatched.items()
        },
        accuracy=measured.accuracy,
        base=experiment.spec.base,
        source=source,
        conventions={**conventions(plan, measured, model), **_fallbacks(model, profile)},
        hashes=_hashes(experiment, model),
        row_ids=tuple(table.row_ids[i] for i in kept),
        row_values=_row_values([rows[i].values for i in kept]),
        reports=experiment.spec.reports or (_table(experiment),),
    )


def _table(experiment: ResolvedExperiment) -> spec.Report:
    """What is shown where the file asks for nothing."""
    return spec.Report(span=experiment.spec.span, kind="table")


def _row_values(rows: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = list(rows[0]) if rows else []
    return {name: [row.get(name) for row in rows] for name in names}


def _hashes(experiment: ResolvedExperiment, model: LoadedModel) -> dict[str, str]:
    found = {"model": model.provenance.get("weights", "")}
    found["tokenizer"] = experiment.model.tokenizer.hash
    if experiment.table.data_hash:
        found["data"] = experiment.table.data_hash
    return found


def conventions(plan: ExperimentPlan, measured: Measured, model: LoadedModel) -> dict[str, str]:
    """What was defaulted, dropped or chosen, in words."""
    experiment = plan.experiment
    found = {
        "model": f"{model.shape.architecture}, {model.provenance.get('source', '')}",
        "dtype": f"{str(model.dtype).removeprefix('torch.')} on {model.device}",
        **experiment.table.conventions,
    }
    if experiment.keep:
        conditions = " and ".join(measure.text for measure in experiment.keep)
        dropped = len(experiment.table) - len(measured.kept)
        found["keep"] = f"{len(measured.kept)} rows kept, {dropped} dropped ({conditions})"
    for name, run in experiment.table.runs.items():
        noise = run.noise
        if noise is not None and noise.sds is not None:
            value = f"{noise.sds:g} sd = {noise_scale(model, noise):.4g}"
            found[f"noise of {name}"] = f"{found[f'noise of {name}']}, {value}"
    fills = [
        _fill_words(rule.rule.fill, rule.rule.run, rule.rule.spec.by)
        for rule in plan.rules
        if rule.rule.fill not in ("source", "text")
    ]
    if fills:
        found["fill"] = "; ".join(dict.fromkeys(fills))
    if measured.dropped:
        found["resample"] = (
            f"{measured.dropped} rows of cells left out: the other row lacks the position"
        )
    if len(plan.rules) > 1:
        found["rules"] = (
            "together in one run; where two write the same vector, the later one stands"
        )
    if any(_windowed(rule.rule.spec) for rule in plan.rules):
        found["window"] = "layers l − ⌊w/2⌋ … l + ⌈w/2⌉ − 1, cut at the ends"
    if any(_several(rule.positions) for rule in plan.rules):
        found["tokens"] = "several tokens under one label are separate runs, averaged per row"
    left_out = dict.fromkeys(x for rule in plan.rules for x in rule.rule.positions.left_out)
    if left_out:
        found["positions"] = f"left out, as no row has them in both runs: {', '.join(left_out)}"
    if measured.inert:
        found["inert"] = (
            f"{int(plan.inert.sum())} of {plan.n_cells} cells, and {measured.inert:,} of "
            f"{measured.rows:,} rows in all, can't differ from the base run"
        )
    return found


def _fallbacks(model: LoadedModel, profile: Profile) -> dict[str, str]:
    """Where the run did not go as planned."""
    found: dict[str, str] = {}
    if not model.restartable:
        found["planner"] = "every row is a whole forward pass: the model can't be restarted"
    if profile.halved:
        times = "once" if profile.halved == 1 else f"{profile.halved} times"
        found["memory"] = f"ran out {times}; passes were halved and run again"
    return found


def _fill_words(fill: str, run: str, by: str | None) -> str:
    match fill:
        case "zero":
            return "zero"
        case "mean":
            within = f", within each {by}" if by else ""
            return f"mean over the rows of {run}, per position{within}"
        case _:
            return f"{run} run of another row (a seeded permutation without fixed points)"


def _windowed(rule: Any) -> bool:
    return rule.site is not None and any(axis.window is not None for axis in rule.site.axes)


def _several(positions: Any) -> bool:
    return any(len(row) > 1 for cell in positions for row in cell.hits)
