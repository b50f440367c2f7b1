"""From measured values to experiment results: cells named, hits shown, conventions written down."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.plural import plural
from mechdsl.base.reply import Reply
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.measured_values import MeasuredValues, base_per_cell, per_cell
from mechdsl.execute.no_value import gap_words
from mechdsl.execute.not_finite import place_words
from mechdsl.execute.pass_size import Sizes
from mechdsl.execute.profile import Profile
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.program import spec
from mechdsl.program.spec import GRADIENT
from mechdsl.prompts.prompt_table import Run
from mechdsl.resolve.cell_key import CellKey
from mechdsl.resolve.measured_places import MEASURED
from mechdsl.resolve.name_cells import cell_keys
from mechdsl.resolve.observation import Observation
from mechdsl.resolve.over_rows import OverRows
from mechdsl.resolve.resolved import ResolvedControl, ResolvedExperiment, ResolvedMeasure
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.overlaid import overlaid
from mechdsl.results.replies import Replies, Texts
from mechdsl.results.run_conventions import conventions, fallbacks, model_words, pass_sizes
from mechdsl.results.seen_rows import SeenRows
from mechdsl.statistics.measure_data import DrawnValues, MeasureData, Missing, Spread
from mechdsl.validate.reachable_p import FEWEST_UNITS
from mechdsl.vocab.metrics import Form

WEIGHTS_ALONE = (
    f"none: of weights alone; the text `{spec.NO_TEXT}` stands in, which nothing hangs on"
)
UNLISTED = "not listed: rows that can't be used are among those that they were made of"


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
    accuracies = _accuracies(measured)
    there = plan.exists
    item = None if experiment.place is None else experiment.measures[0].item
    seen = SeenRows(plan, kept, lambda name: models[name or model.name].shape.causal)
    return ExperimentResult(
        name=experiment.name,
        model=model.name,
        axes=tuple(axis.name for axis in experiment.axes),
        aliases={
            **{axis.alias: axis.name for axis in experiment.axes if axis.alias is not None},
            **({} if item is None else {"item": MEASURED}),
        },
        centres=tuple(axis.name for axis in experiment.axes if axis.of_windows),
        cells=tuple(_cells(experiment, measured, there)),
        measures=tuple(_measures(plan, measured, seen)),
        runs={
            run: {
                measure.label: values.mean(axis=0)
                for measure, values in zip(experiment.measures, found, strict=True)
                if not measure.observed  # has values in cells alone
            }
            for run, found in measured.unpatched.items()
        },
        **accuracies,
        base=experiment.spec.base,
        source=experiment.spec.source,
        called=_called(experiment),
        conventions={
            **conventions(plan, measured, model),
            **({} if table.name != spec.NO_PROMPTS else {"rows": WEIGHTS_ALONE}),
            **({} if measured.listed or not plan.lists else {"top tokens": UNLISTED}),
            **{f"model {other.name}": model_words(other) for other in read},
            **_accuracy_words(experiment, accuracies["accuracy_units"]),
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
        row_keys=tuple(table.row_keys[i] for i in kept),
        row_values=_row_values([rows[i].values for i in kept]),
        reports=experiment.spec.reports or (_table(experiment),),
        rounding=_rounding_words(experiment, model),
        replies=_replies(experiment, measured, there),
        **overlaid(experiment, kept, there),
    )


def _replies(
    experiment: ResolvedExperiment, measured: MeasuredValues, there: NDArray[np.bool_]
) -> Replies:
    """What was written behind the prompts that are in the experiment."""
    if not measured.unpatched_replies and not measured.replies:
        return Replies()
    table, kept = experiment.table, measured.kept.tolist()
    base = table.runs[experiment.spec.base].rows
    runs = dict.fromkeys(run for run, _ in measured.unpatched_replies)

    def of(found: Mapping[tuple[Any, int], tuple[Reply, ...]], name: object) -> Texts:
        return {table.row_ids[n]: found[name, n] for n in kept if (name, n) in found}

    return Replies(
        tuple(of(measured.replies, cell) for cell in np.flatnonzero(there).tolist()),
        {run: of(measured.unpatched_replies, run) for run in runs},
        {table.row_ids[n]: base[n].text for n in kept},
    )


def _measures(
    plan: ExperimentPlan, measured: MeasuredValues, seen: SeenRows
) -> Iterator[MeasureData]:
    """The values of each measure, in the cells that there are."""
    experiment = plan.experiment
    kept, there, source = measured.kept, plan.exists, experiment.spec.source
    estimator = experiment.spec.estimator
    for number, (resolved, said) in enumerate(
        zip(experiment.measures, experiment.spec.measures, strict=True)
    ):
        truth = None
        if resolved.truth is not None:
            truth = np.array([[resolved.truth[i] for i in kept]], dtype=np.float64)
        yield MeasureData(
            label=resolved.label,
            metric=resolved.text,
            effect=said.effect,
            kind=resolved.kind,
            per_prompt=said.per_prompt,
            patched=_present(measured.patched[number][there], resolved, kept),
            base=_of(there, base_per_cell(plan, measured, experiment.spec.base, number)),
            source=None
            if source is None
            else _of(there, base_per_cell(plan, measured, source, number)),
            inert=plan.inert[there],
            truth=truth,
            unit="" if estimator is not None and estimator.name == GRADIENT else resolved.unit,
            # How far rounding moves an estimate isn't known: no cell's metric was computed.
            rounding=None
            if estimator is not None
            else _of(there, per_cell(plan, measured, measured.rounding[number])),
            word=resolved.word,
            at=said.place,
            gaps=tuple(gap_words(measured, number, c) for c in np.flatnonzero(there).tolist()),
            seen=seen.of(number, there),
            spread=_spread(experiment) if resolved.observed else "rows",
            estimator="" if estimator is None else estimator.text,
        )


def _cells(
    experiment: ResolvedExperiment, measured: MeasuredValues, there: NDArray[np.bool_]
) -> Iterator[CellKey]:
    """The cells that there are, with the tokens that are listed of them."""
    text = experiment.model.tokenizer.token_text
    for key, cell in zip(cell_keys(experiment), np.flatnonzero(there).tolist(), strict=True):
        listed = measured.listed.get(cell, ())
        texts = tuple(text(each.token) for each in listed)
        shares = tuple(each.over_rows for each in listed if each.over_rows is not None)
        yield replace(key, listed=texts, shares=shares)


def _rounding_words(experiment: ResolvedExperiment, model: LoadedModel) -> str:
    """What bounds of rounding come from."""
    dtype = str(model.dtype).removeprefix("torch.")
    words = [
        f"{model.rounding:.2g} of the largest logit where a metric reads, by this model's "
        f"self-check in {dtype}"
    ]
    measures = (*experiment.measures, *experiment.accuracies.values())
    if experiment.bare is not None:
        words.append("of what is observed, as much of its size, or of 1 where it is smaller")
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


def _accuracies(measured: MeasuredValues) -> dict[str, Any]:
    """Of all rows, whatever `keep` keeps, but for those that can't be used."""
    found, experiment = measured.accuracies, measured.experiment
    table, by = experiment.table, experiment.spec.statistics.by
    rows = [i for i in range(len(table)) if i not in measured.unusable]
    clean = table.runs["clean"].rows

    def unit(run: Run, row: int) -> Hashable:
        """Rows of one unit are right or wrong together."""
        if by is not None:
            return str(clean[row].values.get(by))
        if run.noise is not None:
            return row
        answer = clean[row].texts.get("answer")
        return run.rows[row].ids, None if answer is None else (answer.text, answer.ids)

    def units(run: str) -> Ints:
        numbers: dict[Hashable, int] = {}
        keys = (unit(table.runs[run], row) for row in rows)
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    return {
        "accuracy": {run: values[rows] for run, values in found.values.items()},
        "accuracy_rounding": {run: values[rows] for run, values in found.rounding.items()},
        "accuracy_rows": {run: tuple(table.row_ids[i] for i in rows) for run in found.values},
        "accuracy_units": {run: units(run) for run in found.values},
    }


def _accuracy_words(experiment: ResolvedExperiment, units: Mapping[str, Ints]) -> dict[str, str]:
    """Which rows an accuracy is of, and where its interval comes from."""
    if not units:
        return {}
    said = f"of all {plural(len(next(iter(units.values()))), 'row')}"
    said += ", before `keep`" if experiment.spec.keep else ""
    counts = {run: len(np.unique(own)) for run, own in units.items()}
    by = experiment.spec.statistics.by
    few = any(counts[run] < min(len(own), FEWEST_UNITS) for run, own in units.items())
    none = f", none below {FEWEST_UNITS}" if few else ""
    if by is not None:
        number = next(iter(counts.values()))
        said += f"; exact interval over {plural(number, 'group')} by {by} (Korn-Graubard){none}"
    elif all(counts[run] == len(own) for run, own in units.items()):
        said += "; exact interval (Clopper-Pearson)"
    else:
        distinct = ", ".join(f"{number} distinct in {run}" for run, number in counts.items())
        said += f", {distinct}; exact interval over these (Korn-Graubard){none}"
    table = experiment.table
    others = [f"`{run}`" for run in units if table.runs[run].prompts not in (None, table.name)]
    if others:
        said += f"; {' and '.join(others)} set against the answers of `{table.name}`"
    return {"accuracy": said}


def _called(experiment: ResolvedExperiment) -> dict[str, str]:
    """The clean run beside that of another block or model is called by its own."""
    ends = (experiment.spec.base, experiment.spec.source or "clean")
    runs = [experiment.table.runs[name] for name in ends]
    if any(run.prompts is not None for run in runs):
        return {"clean": experiment.table.name}
    if any(run.model is not None for run in runs):
        return {"clean": experiment.model.name}
    return {}


def _present(patched: Floats, measure: ResolvedMeasure, kept: Ints) -> Floats:
    """[cell, kept row], without the rows that lack the position that is measured."""
    if not measure.absent:
        return patched
    return np.where(np.isin(kept, measure.absent), np.nan, patched)


def _spread(experiment: ResolvedExperiment) -> Spread:
    """Where intervals of what is observed come from."""
    for rule in experiment.rules:
        if isinstance(rule.does, OverRows):
            return rule.does.spread
    return "rows"


def _of(there: NDArray[np.bool_], values: Floats) -> Floats:
    """Of [1 or cell, prompt], the cells that there are."""
    return values[there] if len(values) == len(there) else values


def with_control(
    result: ExperimentResult, plan: ExperimentPlan, measured: Mapping[str, MeasuredValues]
) -> ExperimentResult:
    """The result with what its control measured, where it has one."""
    control = plan.experiment.control
    if control is None:
        return result
    counts = draw_counts(control)[plan.exists]
    values = tuple(
        each.reshape(control.draws, plan.n_cells, -1)[:, plan.exists]
        for each in measured[control.experiment.key].patched
    )
    drawn = DrawnValues(values, counts, control.asked, control.what)
    return replace(result, drawn=drawn)


def with_bare(
    result: ExperimentResult,
    plan: ExperimentPlan,
    plans: Mapping[str, ExperimentPlan],
    measured: Mapping[str, MeasuredValues],
    models: Mapping[str, LoadedModel],
) -> ExperimentResult:
    """The result with what its observations see of the base run, where effects are asked for."""
    bare = plan.experiment.bare
    if bare is None:
        return result
    other = measured[bare.experiment.key]
    cells = _cells_without_rules(plan, plans[bare.experiment.key])[plan.exists]
    columns = np.searchsorted(other.kept, measured[plan.experiment.key].kept)
    relative = models[plan.experiment.model.key].rounding
    measures = list(result.measures)
    for number in bare.numbers:
        own = measures[number]
        base = other.patched[number][np.ix_(cells, columns)]
        gaps = tuple(
            gap or gap_words(other, number, cell)
            for gap, cell in zip(own.gaps, cells.tolist(), strict=True)
        )
        rounding = relative * np.maximum(np.abs(base), 1)
        given = {"base": base, "source": None, "rounding": rounding, "gaps": gaps}
        measures[number] = replace(own, **given, as_patched=bare.experiment.as_base)
    said = "base run: what is observed there without the rules, in the same rows and cells"
    told = {"effects of observations": said}
    if bare.experiment.as_base:
        said = "base run: without the rules, behind the same prompts and the replies made with them"
        told = {"effects in replies": said}
    return replace(result, measures=tuple(measures), conventions={**result.conventions, **told})


def _cells_without_rules(plan: ExperimentPlan, bare: ExperimentPlan) -> Ints:
    """[cell] the one that is observed at the same places; axes of rules are none there."""
    names = [axis.name for axis in plan.experiment.axes]
    found = np.zeros(plan.n_cells, dtype=np.int64)
    for axis in bare.experiment.axes:
        found = found * len(axis) + plan.coordinates[names.index(axis.name)]
    return found


def draw_counts(control: ResolvedControl) -> Ints:
    """[cell] of the experiment itself: how many different targets were drawn for it."""
    drawn, shape = control.experiment.drawn, control.experiment.shape[1:]
    assert drawn is not None
    names = [axis.name for axis in control.experiment.axes[1:]]
    places = [names.index(name) for name in drawn.axes]
    cells = product(*map(range, shape))
    counts = [drawn.counts[tuple(cell[place] for place in places)] for cell in cells]
    return np.array(counts, dtype=np.int64)


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
    )


def why(problem: Diagnostic) -> Missing:
    """What a diagnostic says, in one line."""
    label = problem.label_text
    said = not label or problem.message.endswith(label)
    return Missing(problem.code, problem.message if said else f"{problem.message}: {label}")


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
    for rule in experiment.rules:
        if isinstance(rule.does, Observation):
            found.update({f"file {name}": d for name, d in rule.does.made_of.items()})
    for each in experiment.python:
        key = f"python {each.file}"
        # Files that are called the same lie beside different `.mech` files.
        found[key if found.get(key, each.digest) == each.digest else f"python {each.path}"] = (
            each.digest
        )
    return found
