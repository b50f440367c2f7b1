"""Experiment results from measured values: named cells, tokens hit, statistics and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from itertools import compress, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.hashing import digest_number
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.execute.measurement.values import (
    ActiveRow,
    GraphNode,
    MeasuredValues,
    describe_gap,
    describe_run,
    expand_base_values,
    expand_to_cells,
)
from mechdsl.execute.pass_layout import PassSizer
from mechdsl.execute.run_record import ExecutionProfile
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.images.layouts import THUMBNAIL
from mechdsl.images.picture import MediaError, Picture
from mechdsl.planner.plan import ExperimentPlan
from mechdsl.program import spec
from mechdsl.program.significance import MIN_UNITS
from mechdsl.prompts.rows import row_in_patches
from mechdsl.prompts.runs import PlacedPicture, PromptRun, RunRow
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer, TextTokenizer
from mechdsl.resolve.cells import CellKey
from mechdsl.resolve.circuits import label_places, list_feature_ends
from mechdsl.resolve.expansion import name_cells
from mechdsl.resolve.findings import VariantFinding
from mechdsl.resolve.measures import MEASURED_AXIS
from mechdsl.resolve.node_circuits import describe_everything
from mechdsl.resolve.observations import Observation, RowSetObservation
from mechdsl.resolve.sites import label_candidates, label_node
from mechdsl.resolve.types import (
    CircuitTargets,
    PlacedEdge,
    ResolvedControl,
    ResolvedExperiment,
    ResolvedMeasure,
    SitePoint,
)
from mechdsl.results.assembly.conventions import (
    fallback_conventions,
    model_text,
    pass_size_convention,
    run_conventions,
)
from mechdsl.results.assembly.sampling_units import RowViews, number_equal_cells, plan_sampling
from mechdsl.results.experiment_result import (
    DEFAULT_SHOWN_PROMPTS,
    TARGET_LABEL,
    ActiveText,
    ExpectOutcome,
    ExperimentResult,
    LostExperiment,
    Replies,
    RepliesByPrompt,
    ResultCircuit,
    ResultGraph,
    ResultNode,
    SeenImage,
    missing_reason,
)
from mechdsl.results.statistics_conventions import statistics_conventions
from mechdsl.results.verdicts.decision import decide_all_expectations
from mechdsl.rules.observations.features import FEATURE_AXIS
from mechdsl.statistics.cell_statistics import check_denominator, compute_cell_statistics
from mechdsl.statistics.measurements import (
    MeasureData,
    NullBand,
    RandomControlValues,
    SpreadSource,
    effect_parts,
)
from mechdsl.statistics.null_bands import compute_null_bands
from mechdsl.statistics.verification import ExactEffects, VerifiedCells, verify_cells
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import EFFECTS, MetricForm, Reply

PromptHits = tuple[tuple[int, ...], ...]


def overlay_data(experiment: ResolvedExperiment, kept: Ints, there: Bools) -> dict[str, Any]:
    """Return the tokens of every prompt and the tokens that each cell hits; for image rows, also
    the first images. Empty if no report shows them.

    Args:
        kept: Rows in the experiment.
        there: Whether each cell exists, shape [cell].
    """
    asked = [
        report.top or DEFAULT_SHOWN_PROMPTS
        for report in experiment.spec.reports
        if report.kind == "overlay"
    ]
    if not asked:
        return {}
    rows = [experiment.table.runs[experiment.spec.base].rows[i] for i in kept]
    texts = tuple(_token_texts(row, experiment) for row in rows)
    hits = _token_hits(experiment, [len(names) for names in texts], kept, there)
    data: dict[str, Any] = {"texts": texts, "hits": hits}
    if any(row.image is not None or row.pictures for row in rows):
        data["seen"] = _shown_images(experiment, kept, hits, max(asked))
    return data


def _token_texts(row: RunRow, experiment: ResolvedExperiment) -> tuple[str, ...]:
    """Return the names of a row's tokens."""
    tokenizer = experiment.model.tokenizer
    if row.image is not None and isinstance(tokenizer, ImageTokenizer):
        return tuple(map(tokenizer.label, range(len(row.ids))))
    return tuple(
        row.image_label(p)
        or ("" if row.special[p] else row.text[slice(*row.offsets[p])])
        or tokenizer.token_text(row.ids[p])
        for p in range(len(row.ids))
    )


def _spaced_texts(row: RunRow, experiment: ResolvedExperiment) -> tuple[str, ...]:
    """Return the texts of a row's tokens, each with the white space before it."""
    texts: list[str] = []
    end = 0
    for place, text in enumerate(_token_texts(row, experiment)):
        begin, last = row.offsets[place] if row.image is None else (0, 0)
        if row.image is not None or row.special[place] or last <= begin:
            texts.append(text)
            continue
        if row.image_label(place) is not None:  # all tokens of an image have its offsets
            texts.append(f" {text}")
            end = last
            continue
        between = row.text[end:begin]
        texts.append(between + text if between.isspace() else text)
        end = last
    return tuple(texts)


def _token_hits(
    experiment: ResolvedExperiment, lengths: Sequence[int], kept: Ints, there: Bools
) -> tuple[PromptHits, ...]:
    """Return the hit tokens per cell and prompt; of attention, those that `position` names."""
    names = [axis.name for axis in experiment.axes]
    positions = [rule.named_positions for rule in experiment.rules]
    made: dict[tuple[object, ...], PromptHits] = {}

    def hits(index: tuple[int, ...]) -> PromptHits:
        keys = [tuple(index[names.index(axis)] for axis in position.axes) for position in positions]
        if tuple(keys) not in made:  # cells of one position share their tuples
            cells = [each.written[key] for each, key in zip(positions, keys, strict=True)]
            made[tuple(keys)] = tuple(
                tuple(
                    sorted({p for cell in cells for run in cell.hits[i] for p in run if p < length})
                )
                for i, length in zip(kept, lengths, strict=True)
            )
        return made[tuple(keys)]

    every = product(*(range(len(axis)) for axis in experiment.axes))
    return tuple(hits(index) for index in compress(every, there))


def _shown_images(
    experiment: ResolvedExperiment, kept: Ints, hits: Sequence[PromptHits], count: int
) -> tuple[tuple[SeenImage, ...], ...]:
    """Return the images of each prompt; none after the first `count` prompts that any cell hits."""
    clean, base = (experiment.table.runs[name].rows for name in ("clean", experiment.spec.base))
    images: list[tuple[SeenImage, ...]] = []
    for place, number in enumerate(kept):
        own: tuple[SeenImage, ...] = ()
        if count > 0 and any(cell[place] for cell in hits):
            row = clean[number] if clean[number].image is not None else base[number]
            own = tuple(_read_images(row, experiment.model.tokenizer))
        count -= bool(own)
        images.append(own)
    return tuple(images)


def _read_images(row: RunRow, reader: TextTokenizer | ImageTokenizer | None) -> Iterator[SeenImage]:
    """Read a row's images; files that have become unreadable are left out."""
    if row.image is not None:
        assert isinstance(reader, ImageTokenizer)
        with suppress(MediaError):
            yield _read_image(row.image, reader)
    for placed in row.placed_pictures:
        if placed.picture.expansion.is_sound:
            continue
        with suppress(MediaError):
            yield from _read_placed(placed)


def _read_image(picture: Picture, reader: ImageTokenizer) -> SeenImage:
    """Read the image of a row. Raises MediaError."""
    from mechdsl.images.pixels import process_picture

    plain = replace(reader.processing, rescale=None, mean=None, std=None)
    values = process_picture(picture, plain)
    levels = np.moveaxis(values, 0, -1).round().clip(0, 255).astype(np.uint8)
    layout = reader.layout
    front, count = len(layout.front), layout.rows * layout.cols
    patches = tuple(range(front, front + count))
    return SeenImage(picture.words, levels, (0, front + count), patches, layout.rows, layout.cols)


def _read_placed(placed: PlacedPicture) -> Iterator[SeenImage]:
    """Read the part of an image in a prompt that its tokens read, without a thumbnail.

    Nothing is yielded for an image whose tokens read no part each. Raises MediaError.
    """
    from PIL import Image

    from mechdsl.images.pixels import render_pixels

    expansion, first = placed.picture.expansion, placed.first
    layout = expansion.layout
    cells = {(cell.row, cell.col): cell for cell in layout.cells if cell.tile != THUMBNAIL}
    grid = [(row + 1, col + 1) for row in range(layout.rows) for col in range(layout.cols)]
    if not grid or set(grid) != cells.keys():
        return
    boxes = [cell.box for cell in cells.values() if cell.box is not None]
    image = Image.fromarray(render_pixels(placed.picture.picture))
    if boxes:
        left, top = (min(box[side] for box in boxes) for side in (0, 1))
        right, bottom = (max(box[side] for box in boxes) for side in (2, 3))
        image = image.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
    yield SeenImage(
        f"{placed.title}: {placed.picture.picture.words}",
        np.asarray(image),
        (first, first + len(expansion.ids)),
        tuple(first + cells[place].position for place in grid),
        layout.rows,
        layout.cols,
    )


WEIGHTS_ONLY_TEXT = (
    f"none: read from weights only; the text `{spec.NO_TEXT}` is a placeholder and affects no "
    "number"
)

UNLISTED_TEXT = "not listed: unusable rows are among those they were computed from"


def _average_runs(
    experiment: ResolvedExperiment, measured: MeasuredValues
) -> dict[str, dict[str, Floats]]:
    """Return each measure of each unpatched run [prompt], averaged over draws."""
    return {
        run: {
            measure.label: values.mean(axis=0)
            for measure, values in zip(experiment.measures, found, strict=True)
            if not measure.observed  # observations have values only in cells
        }
        for run, found in measured.unpatched.items()
    }


def collect_result(
    plan: ExperimentPlan,
    measured: MeasuredValues,
    models: Mapping[str, LoadedModel],
    profile: ExecutionProfile,
    sizes: PassSizer,
) -> ExperimentResult:
    """Build the result of one experiment, or of one variant, without statistics."""
    experiment = name_observed_features(plan.experiment, measured)
    model, *read = (models[name] for name in experiment.models)
    table, kept = experiment.table, measured.kept
    rows = table.runs["clean"].rows
    accuracies = _collect_accuracies(measured)
    there = _find_cells(plan, experiment)
    item = None if experiment.place is None else experiment.measures[0].item
    seen = RowViews(plan, kept, lambda name: models[name or model.name].shape.reads_prefix)
    return ExperimentResult(
        name=experiment.name,
        model=model.name,
        axes=tuple(axis.name for axis in experiment.axes),
        aliases={
            **{axis.alias: axis.name for axis in experiment.axes if axis.alias is not None},
            **({} if item is None else {"item": MEASURED_AXIS}),
        },
        centres=tuple(axis.name for axis in experiment.axes if axis.of_windows),
        cells=tuple(_collect_cells(experiment, measured, there)),
        measures=tuple(_collect_measures(plan, measured, seen, there)),
        runs=_average_runs(experiment, measured),
        **accuracies,
        base=experiment.spec.base,
        source=experiment.spec.source,
        called=_run_names(experiment),
        conventions={
            **run_conventions(plan, measured, model),
            **({} if table.name != spec.NO_PROMPTS else {"rows": WEIGHTS_ONLY_TEXT}),
            **({} if measured.listed or not plan.lists else {"top tokens": UNLISTED_TEXT}),
            **{f"model {other.name}": model_text(other) for other in read},
            **_accuracy_text(experiment, accuracies["accuracy_units"]),
            **fallback_conventions(model, measured, profile),
            **pass_size_convention(sizes.kept),
        },
        hashes={
            **_result_hashes(experiment, model),
            **{f"model {other.name}": other.provenance.get("weights", "") for other in read},
            **{key: value for other in read for key, value in other.made_of.items()},
        },
        left_out={
            table.row_ids[row]: describe_run(unusable, experiment)
            for row, unusable in sorted(measured.unusable.items())
        },
        row_ids=tuple(table.row_ids[i] for i in kept),
        row_keys=tuple(table.row_keys[i] for i in kept),
        row_values=_row_values([rows[i].values for i in kept]),
        reports=experiment.spec.reports or (spec.Report(span=experiment.spec.span, kind="table"),),
        rounding=_rounding_text(experiment, model),
        replies=_collect_replies(experiment, measured, there),
        **overlay_data(plan.experiment, kept, there),
        active=_collect_active_texts(experiment, plan, measured, there),
        circuit=_collect_circuit(experiment) or _collect_graph(experiment, measured),
    )


def _collect_circuit(experiment: ResolvedExperiment) -> ResultCircuit | None:
    """Return the circuit that the rules of an experiment ablate, if any."""
    found = next((rule.circuit for rule in experiment.rules if rule.circuit is not None), None)
    if found is None:
        return None
    shape = experiment.model.shape
    stack = shape.others.get(found.stack, shape)
    named = {edge: at for own in found.named.values() for edge, at in own.items()}
    listed = [*named.items()]
    if found.scores:  # of each edge at each of its positions
        listed = [(edge, None if n is None else frozenset((n,))) for edge, n in found.scores]
    places = ["" if at is None else label_places(at, found.places) for _, at in listed]
    trained = [
        mask.training.sample.table
        for mask in experiment.masks
        if mask.training.definition == found.name
    ]
    others = _name_other_edges(experiment, found)
    operands = {own.member.name: own.member.operand for own in found.features.values()}
    return ResultCircuit(
        name=found.name,
        layers=stack.n_layers,
        heads=tuple(block.heads for block in stack.blocks),
        groups={
            name: tuple(block.heads // block.kv_heads for block in each.blocks)
            for name, each in {"": shape, **shape.others}.items()
        },
        width=stack.d_model,
        parallel=stack.parallel_block,
        edges=tuple((label_node(of), label_node(to)) for (of, to), _ in listed),
        scores=tuple(found.scores.values()),
        total=len(found.every),
        circuits=len({frozenset(own.items()) for own in found.named.values()}),
        places=tuple(places) if any(places) else (),
        features=tuple(
            (label_node(end), end.layer or 0)
            for output, own in found.features.items()
            for end in list_feature_ends("start", output, own)
        ),
        of_attention=tuple(
            label_node(end)
            for output, own in found.features.items()
            for end in list_feature_ends("start", output, own)
            if end.site == "attn_out"
        ),
        neurons=tuple(
            label_node(SitePoint(*where, unit))
            for where, own in found.neurons.items()
            for unit in own
        ),
        dictionaries=tuple(
            (name, own.digest) for name, own in operands.items() if isinstance(own, DictionaryFile)
        ),
        prompts=found.prompts
        or tuple(row.digest for table in trained for row in table.runs[spec.CLEAN].rows),
        others=tuple(others),
        other_scores=tuple(others.values()),
        named_places=tuple(
            tuple(found.place_texts[number] for number in sorted(at or ())) for _, at in listed
        )
        if any(places)
        else (),
    )


def _name_other_edges(
    experiment: ResolvedExperiment, circuit_targets: CircuitTargets
) -> dict[str, float]:
    """Return the scores of the edges outside of a circuit, by their names in a file."""
    scores = {
        label_candidates((edge if at is None else PlacedEdge(edge, 0, at),)): score
        for (edge, at), score in circuit_targets.others.items()
    }
    inside = {
        label_candidates((PlacedEdge(edge, n, circuit_targets.place_texts[n]),))
        for edge, n in circuit_targets.scores
        if n is not None
    }
    for mask in experiment.masks:
        if mask.training.definition == circuit_targets.name and circuit_targets.place_texts:
            named = map(label_candidates, zip(mask.candidates))
            listed = zip(named, mask.scores, strict=False)
            scores |= {
                name: own for name, own in listed if name not in inside and math.isfinite(own)
            }
    return scores


def _collect_graph(
    experiment: ResolvedExperiment, measured: MeasuredValues
) -> ResultCircuit | None:
    """Return the attribution graph that an experiment draws, if any."""
    graph = measured.graph
    if graph is None:
        return None
    table, shape = experiment.table, experiment.model.shape
    said = next(rule.spec.observed for rule in experiment.rules if rule.spec.observed is not None)
    row = table.runs[experiment.spec.base].rows[graph.row]
    tokens = _spaced_texts(row, experiment)
    nodes = tuple(_result_node(node, tokens, said.toward, experiment) for node in graph.nodes)
    supernodes = tuple(
        (name, tuple(nodes[number].label for number in numbers))
        for name, numbers in graph.supernodes.items()
    )
    return ResultCircuit(
        name=said.name or said.word,
        layers=shape.n_layers,
        heads=(1,) * shape.n_layers,
        groups={},
        width=shape.d_model,
        parallel=shape.parallel_block,
        edges=tuple((nodes[of].label, nodes[to].label) for of, to, _ in graph.edges),
        scores=tuple(weight for *_, weight in graph.edges),
        total=graph.total,
        graph=ResultGraph(table.row_ids[graph.row], tokens, nodes, supernodes),
    )


def _result_node(
    node: GraphNode, tokens: Sequence[str], toward: ast.Expr | None, experiment: ResolvedExperiment
) -> ResultNode:
    if node.kind == "logit" and toward is not None:
        label, text = TARGET_LABEL, " ".join(toward.span.written.split())
    elif node.kind == "logit":
        label, text = f"logit {node.number}", experiment.model.tokenizer.token_text(node.number)
    else:
        text = tokens[node.token]
        label = f"token {node.token}"
        if node.kind != "token":
            part = "error" if node.kind == "error" else f"f{node.number}"
            label = f"L{node.layer}.{part}@{node.token}"
    facts = node.kind, node.layer, node.token, node.number, text, node.amount, node.influence
    return ResultNode(label, *facts)


def _collect_active_texts(
    experiment: ResolvedExperiment, plan: ExperimentPlan, measured: MeasuredValues, there: Bools
) -> tuple[tuple[ActiveText, ...], ...]:
    """Return, for each cell, the rows in which its feature is most active."""
    if measured.features is None:
        return ()
    table = experiment.table
    rows = table.runs[experiment.spec.base].rows

    observed = (rule for rule in experiment.rules if rule.spec.observed is not None)
    in_vision = any(rule.in_vision for rule in observed)

    @cache
    def tokens_of(row: int) -> tuple[str, ...]:
        return _spaced_texts(rows[row], experiment)

    def text(active: ActiveRow) -> ActiveText:
        if in_vision:
            names = _name_patches(experiment, rows[active.row], active.tokens)
            return ActiveText(table.row_ids[active.row], names, active.values)
        values = dict(zip(active.tokens, active.values, strict=True))
        tokens = tokens_of(active.row)
        marks = tuple(values.get(token) for token in range(len(tokens)))
        return ActiveText(table.row_ids[active.row], tokens, marks)

    texts = [tuple(map(text, top_row)) for top_row in measured.features.top_rows]
    names = [axis.name for axis in experiment.axes]
    ranks = plan.coordinates[names.index(FEATURE_AXIS)][there]
    return tuple(texts[rank] for rank in ranks.tolist())


def _name_patches(
    experiment: ResolvedExperiment, row: RunRow, patches: Sequence[int]
) -> tuple[str, ...]:
    """Return the name of each patch, with a space before it.

    Args:
        experiment: The experiment.
        row: The row of the prompt.
        patches: Numbers of patches, those of a token next to each other.
    """
    shape, reader = experiment.model.shape, experiment.model.tokenizer
    each = shape.merged_side**2
    if shape.resamples and isinstance(reader, ImagePromptTokenizer):
        row, each = row_in_patches(reader, row), 1

    def name(patch: int) -> str:
        label = row.image_label(patch // each) or ""
        return f" {label}" if each == 1 else f" {label} patch {patch % each + 1}"

    return tuple(map(name, patches))


def _collect_replies(
    experiment: ResolvedExperiment, measured: MeasuredValues, there: NDArray[np.bool_]
) -> Replies:
    """Return the text generated after the experiment's prompts."""
    if not measured.unpatched_replies and not measured.replies:
        return Replies()
    table, kept = experiment.table, measured.kept.tolist()
    base = table.runs[experiment.spec.base].rows
    runs = dict.fromkeys(run for run, _ in measured.unpatched_replies)

    def of(replies: Mapping[tuple[Any, int], tuple[Reply, ...]], name: object) -> RepliesByPrompt:
        return {table.row_ids[n]: replies[name, n] for n in kept if (name, n) in replies}

    return Replies(
        tuple(of(measured.replies, cell) for cell in np.flatnonzero(there).tolist()),
        {run: of(measured.unpatched_replies, run) for run in runs},
        {table.row_ids[n]: base[n].text for n in kept},
    )


def name_observed_features(
    experiment: ResolvedExperiment, measured: MeasuredValues
) -> ResolvedExperiment:
    """Return the experiment with the observed features as the values of their axis."""
    if measured.features is None:
        return experiment
    axes = [
        replace(axis, labels=measured.features.features) if axis.name == FEATURE_AXIS else axis
        for axis in experiment.axes
    ]
    return replace(experiment, axes=tuple(axes))


def _find_cells(plan: ExperimentPlan, named: ResolvedExperiment) -> Bools:
    """Return [cell of the plan]: whether a cell exists, in an experiment with as many values along
    an axis as are known after the run."""
    there = plan.exists
    if named is plan.experiment:
        return there
    lengths = map(len, named.axes)
    for coordinate, length in zip(plan.coordinates, lengths, strict=True):
        there = there & (coordinate < length)
    return there


def _collect_measures(
    plan: ExperimentPlan, measured: MeasuredValues, seen: RowViews, there: Bools
) -> Iterator[MeasureData]:
    """Yield the values of each measure in the cells that are there."""
    experiment = plan.experiment
    kept, source = measured.kept, experiment.spec.source
    generation = experiment.spec.generation
    estimator = experiment.spec.estimator
    for number, (resolved, said) in enumerate(
        zip(experiment.measures, experiment.spec.measures, strict=True)
    ):
        truth = None
        if resolved.truth is not None:
            truth = np.array([[resolved.truth[i] for i in kept]], dtype=np.float64)
        base = expand_base_values(plan, measured, experiment.spec.base, number)
        values = measured.patched[number]
        if EFFECTS[said.effect].circuit is None:  # without rounding if another measure needs a row
            equal = plan.inert_of[number] & ~plan.inert
            values = np.where(equal[:, None] & ~np.isnan(values), base, values)
        yield MeasureData(
            label=resolved.label,
            metric=resolved.text,
            effect=said.effect,
            kind=resolved.kind,
            per_prompt=said.per_prompt,
            patched=_mask_absent_rows(values[there], resolved, kept),
            base=_select_cells(there, base),
            source=None
            if source is None
            else _select_cells(there, expand_base_values(plan, measured, source, number)),
            inert=(plan.inert_of[number] | measured.find_inactive_cells())[there],
            truth=truth,
            unit=resolved.unit if estimator is None or estimator.kind.keeps_unit else "",
            # The effect of rounding on an estimate is unknown: no cell's metric was computed.
            rounding=None
            if estimator is not None
            else _select_cells(there, expand_to_cells(plan, measured, measured.rounding[number])),
            most=generation.tokens if generation and resolved.word == "length" else None,
            word=resolved.word,
            at=said.place,
            gaps=tuple(describe_gap(measured, number, c) for c in np.flatnonzero(there).tolist()),
            seen=seen.of(number, there),
            same=None if resolved.observed else number_equal_cells(plan)[there],
            spread=_spread_source(experiment) if resolved.observed else "rows",
            estimator="" if estimator is None else estimator.text,
        )


def _collect_cells(
    experiment: ResolvedExperiment, measured: MeasuredValues, there: NDArray[np.bool_]
) -> Iterator[CellKey]:
    """Yield the existing cells with their listed tokens."""
    text = experiment.model.tokenizer.token_text
    labels = _feature_labels(experiment)
    for key, cell in zip(name_cells(experiment), np.flatnonzero(there).tolist(), strict=True):
        listed = measured.listed.get(cell, ())
        texts = tuple(text(token.token) for token in listed)
        shares = tuple(token.over_rows for token in listed if token.over_rows is not None)
        feature = key.coords.get(FEATURE_AXIS)
        label = labels.get(feature, "") if isinstance(feature, int) else ""
        yield replace(key, listed=texts, shares=shares, label=label)


def _feature_labels(experiment: ResolvedExperiment) -> Mapping[int, str]:
    """Return the descriptions of the features along the axis of features.

    An observation of two bases has those of the first along this axis.
    """
    labels: dict[str, Mapping[int, str]] = {}
    for rule in experiment.rules:
        basis, looks = rule.basis, rule.does.changes == "nothing"
        if basis is None or not (looks or FEATURE_AXIS in basis.axes):
            continue
        members = basis.bases[0].values() if looks else basis.members
        labels |= {m.labels.digest: m.labels.texts for m in members if m.labels is not None}
    return next(iter(labels.values())) if len(labels) == 1 else {}


def _rounding_text(experiment: ResolvedExperiment, model: LoadedModel) -> str:
    """Describe the origin of rounding bounds."""
    dtype = str(model.dtype).removeprefix("torch.")
    words = [
        f"{model.rounding:.2g} of the largest logit where a metric reads, by this model's "
        f"self-check in {dtype}"
    ]
    measures = (*experiment.measures, *experiment.accuracies.values())
    if experiment.bare is not None:
        words.append("for observations, the same share of their size, or of 1 if that is larger")
    words += rounding_unit_texts([atom.form for measure in measures for atom in measure.atoms])
    return "; ".join(words)


def rounding_unit_texts(forms: Sequence[MetricForm]) -> Iterator[str]:
    """Yield the units of bounds that aren't in logits."""
    if any(form.unit == "rank" for form in forms):
        yield "a rank can change by the tokens whose logits are within twice that"
    shares = {form.takes for form in forms if form.unit == "share"}
    if shares - {"label"}:
        yield "`correct` can change in rows whose two largest logits are within twice that"
    if "label" in shares:
        yield "`correct` can change in rows whose label has a logit within that of 0"
    if any(form.kind == "category" for form in forms):
        yield "a category can change in rows whose two likeliest numerals are within twice that"


def _collect_accuracies(measured: MeasuredValues) -> dict[str, Any]:
    """Return accuracies over all usable rows, regardless of `keep`."""
    accuracies, experiment = measured.accuracies, measured.experiment
    table, by = experiment.table, experiment.spec.statistics.by
    rows = [i for i in range(len(table)) if i not in measured.unusable]
    clean = table.runs["clean"].rows

    def unit(run: PromptRun, row: int) -> Hashable:
        """Return the unit of a row; rows of one unit are right or wrong together."""
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
        "accuracy": {run: values[rows] for run, values in accuracies.values.items()},
        "accuracy_rounding": {run: values[rows] for run, values in accuracies.rounding.items()},
        "accuracy_rows": {run: tuple(table.row_ids[i] for i in rows) for run in accuracies.values},
        "accuracy_units": {run: units(run) for run in accuracies.values},
    }


def _accuracy_text(experiment: ResolvedExperiment, units: Mapping[str, Ints]) -> dict[str, str]:
    """Describe the rows of accuracies and the origin of their intervals."""
    if not units:
        return {}
    said = f"of all {count_noun(len(next(iter(units.values()))), 'row')}"
    said += ", before `keep`" if experiment.spec.keep else ""
    counts = {run: len(np.unique(unit)) for run, unit in units.items()}
    by = experiment.spec.statistics.by
    few = any(counts[run] < min(len(unit), MIN_UNITS) for run, unit in units.items())
    none = f", none below {MIN_UNITS}" if few else ""
    if by is not None:
        number = next(iter(counts.values()))
        said += f"; exact interval over {count_noun(number, 'group')} by {by} (Korn-Graubard){none}"
    elif all(counts[run] == len(unit) for run, unit in units.items()):
        said += "; exact interval (Clopper-Pearson)"
    else:
        distinct = ", ".join(f"{number} distinct in {run}" for run, number in counts.items())
        said += f", {distinct}; exact interval over these (Korn-Graubard){none}"
    table = experiment.table
    others = [f"`{run}`" for run in units if table.runs[run].prompts not in (None, table.name)]
    if others:
        said += f"; {' and '.join(others)} compared with the answers of `{table.name}`"
    return {"accuracy": said}


def _run_names(experiment: ResolvedExperiment) -> dict[str, str]:
    """Return display names: the clean run is named after its block or model if others occur too."""
    ends = (experiment.spec.base, experiment.spec.source or "clean")
    runs = [experiment.table.runs[name] for name in ends]
    if any(run.prompts is not None for run in runs):
        return {"clean": experiment.table.name}
    if any(run.model is not None for run in runs):
        return {"clean": experiment.model.name}
    return {}


def _mask_absent_rows(patched: Floats, measure: ResolvedMeasure, kept: Ints) -> Floats:
    """Mask rows without the measured position. Shape [cell, kept row]."""
    if not measure.absent:
        return patched
    return np.where(np.isin(kept, measure.absent), np.nan, patched)


def _spread_source(experiment: ResolvedExperiment) -> SpreadSource:
    """Return the origin of intervals of observations."""
    for rule in experiment.rules:
        if isinstance(rule.does, RowSetObservation):
            return rule.does.spread
    return "rows"


def _select_cells(there: NDArray[np.bool_], values: Floats) -> Floats:
    """Select the existing cells of [1 or cell, prompt]."""
    return values[there] if len(values) == len(there) else values


def add_control(
    result: ExperimentResult, plan: ExperimentPlan, measured: Mapping[str, MeasuredValues]
) -> ExperimentResult:
    """Add the measurements of an experiment's control, if it has one."""
    control = plan.experiment.control
    if control is None:
        return result
    counts = count_control_draws(control)[plan.exists]
    values = tuple(
        each.reshape(control.draws, plan.n_cells, -1)[:, plan.exists]
        for each in measured[control.experiment.key].patched
    )
    title = control.title
    drawn = RandomControlValues(values, counts, control.asked, control.what, title)
    return replace(result, drawn=drawn)


def add_base_observations(
    result: ExperimentResult,
    plan: ExperimentPlan,
    plans: Mapping[str, ExperimentPlan],
    measured: Mapping[str, MeasuredValues],
    models: Mapping[str, LoadedModel],
) -> ExperimentResult:
    """Add the observations of the base run, which effects of observations need."""
    bare = plan.experiment.bare
    if bare is None:
        return result
    other = measured[bare.experiment.key]
    cells = _cells_of_baseline(plan, plans[bare.experiment.key])[plan.exists]
    columns = np.searchsorted(other.kept, measured[plan.experiment.key].kept)
    relative = models[plan.experiment.model.key].rounding
    measures = list(result.measures)
    for number in bare.numbers:
        measure = measures[number]
        base = other.patched[number][np.ix_(cells, columns)]
        gaps = tuple(
            gap or describe_gap(other, number, cell)
            for gap, cell in zip(measure.gaps, cells.tolist(), strict=True)
        )
        rounding = relative * np.maximum(np.abs(base), 1)
        given = {"base": base, "source": None, "rounding": rounding, "gaps": gaps}
        measures[number] = replace(measure, **given, as_patched=bare.experiment.as_base)
    said = "base run: the observations without the rules, in the same rows and cells"
    told = {"effects of observations": said}
    if bare.experiment.as_base:
        said = (
            "base run: without the rules, after the same prompts and the replies generated with "
            "the rules"
        )
        told = {"effects in replies": said}
    return replace(result, measures=tuple(measures), conventions={**result.conventions, **told})


def add_circuit_baselines(
    result: ExperimentResult,
    plan: ExperimentPlan,
    plans: Mapping[str, ExperimentPlan],
    measured: Mapping[str, MeasuredValues],
) -> ExperimentResult:
    """Add the runs that effects of a circuit are compared with, in the same rows and cells."""
    measures, said = list(result.measures), dict[str, str]()
    for which, baseline in plan.experiment.circuit_baselines.items():
        other = measured[baseline.experiment.key]
        cells = _cells_of_baseline(plan, plans[baseline.experiment.key])[plan.exists]
        columns = np.searchsorted(other.kept, measured[plan.experiment.key].kept)
        for number in baseline.numbers:
            measure, effect = measures[number], EFFECTS[result.measures[number].effect]
            values = other.patched[number][np.ix_(cells, columns)]
            if which == "circuit":  # the other baseline comes first
                measures[number] = replace(measure, base=values)
            elif effect.from_circuit:
                measures[number] = replace(measure, source=measure.base - values)
            else:
                measures[number] = replace(measure, source=values)
            said["∅"] = "every edge of the model has the fill, at the same tokens of the same rows"
            rules = plan.experiment.rules
            if any(rule.circuit is None and rule.does.changes != "nothing" for rule in rules):
                said["∅"] += ", with the other rules"
            if plan.experiment.everything:
                said["∅"] = describe_everything(plan.experiment)
    return replace(result, measures=tuple(measures), conventions={**result.conventions, **said})


def _cells_of_baseline(plan: ExperimentPlan, bare: ExperimentPlan) -> Ints:
    """Return the cell of a baseline for the same values of its axes. Shape [cell]."""
    names = [axis.name for axis in plan.experiment.axes]
    cells = np.zeros(plan.n_cells, dtype=np.int64)
    for axis in bare.experiment.axes:
        cells = cells * len(axis) + plan.coordinates[names.index(axis.name)]
    return cells


def count_control_draws(control: ResolvedControl) -> Ints:
    """Return the number of distinct targets drawn for each cell of the experiment. Shape [cell]."""
    drawn, shape = control.experiment.drawn, control.experiment.shape[1:]
    assert drawn is not None
    names = [axis.name for axis in control.experiment.axes[1:]]
    places = [names.index(name) for name in drawn.axes]
    cells = product(*map(range, shape))
    counts = [drawn.counts[tuple(cell[place] for place in places)] for cell in cells]
    return np.array(counts, dtype=np.int64)


def drop_measures(result: ExperimentResult, missing: Mapping[int, Diagnostic]) -> ExperimentResult:
    """Remove the values of measures that could not be computed."""

    def gone(data: MeasureData, problem: Diagnostic) -> MeasureData:
        nothing = np.full_like(data.patched, np.nan)
        return replace(data, patched=nothing, missing=missing_reason(problem))

    return replace(
        result,
        measures=tuple(
            gone(data, missing[number]) if number in missing else data
            for number, data in enumerate(result.measures)
        ),
    )


def _row_values(rows: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = list(rows[0]) if rows else []
    return {name: [row.get(name) for row in rows] for name in names}


def _result_hashes(experiment: ResolvedExperiment, model: LoadedModel) -> dict[str, str]:
    result_hashes = {"model": model.provenance.get("weights", ""), **model.made_of}
    result_hashes["tokenizer"] = experiment.model.tokenizer.hash
    if experiment.table.data_hash:
        result_hashes["data"] = experiment.table.data_hash
    result_hashes.update({f"data of {name}": d for name, d in experiment.table.other_data.items()})
    for rule in experiment.rules:
        if isinstance(rule.does, Observation):
            result_hashes.update({f"file {name}": d for name, d in rule.does.made_of.items()})
    for python_function in experiment.python:
        key, content_hash = f"python {python_function.file}", python_function.content_hash
        if content_hash is not None:
            # Different `.mech` files may have different Python files of the same name.
            result_hashes[
                key
                if result_hashes.get(key, content_hash) == content_hash
                else f"python {python_function.path}"
            ] = content_hash
    return result_hashes


def build_finding(experiment: ResolvedExperiment, result: ExperimentResult) -> VariantFinding:
    """Return what other experiments may use of a result, by its first measure."""
    data = result.measures[0]
    ids = result.row_ids if result.row_ids is not None else experiment.table.row_ids
    name = data.label if data.called == "raw" else f"{data.called} of {data.label}"
    replies = tuple(result.replies.cells)
    finding = VariantFinding(experiment, name, row_ids=ids, cells=result.cells, replies=replies)
    if data.kind == "category":  # no effect; selecting by it is rejected before the run
        none = np.full(len(data.patched), np.nan)
        return replace(finding, means=none, values=data.patched)
    effect = EFFECTS[data.effect]
    with np.errstate(divide="ignore", invalid="ignore"):
        means = effect_parts(data, effect, slice(None)).mean()
        values = effect.of_means(data.patched, data.base, data.source)
    return replace(finding, means=means, values=np.broadcast_to(values, data.patched.shape))


def add_statistics(
    result: ExperimentResult, experiment: spec.Experiment, seed: int
) -> ExperimentResult:
    """Add means, intervals and p-values, and their methods as conventions."""
    measures = tuple(
        data
        if EFFECTS[data.effect].of_intervention
        else replace(data, inert=np.zeros_like(data.inert))
        for data in result.measures
    )
    result = replace(
        result,
        measures=measures,
        settings=experiment.statistics,
        seed=seed,
        reports=result.reports or experiment.reports,
    )
    statistics = compute_cell_statistics(
        result.measures,
        experiment.statistics,
        seed,
        result.groups,
        effects=EFFECTS,
        ids=result.sampling.keys,
        strata=result.strata,
        blocks=result.blocks,
        picked=bool(result.selected),
    )
    result = replace(result, statistics=tuple(statistics))
    result = replace(result, controls=_null_bands(result), drawn=None)
    conventions = {
        **result.conventions,
        **statistics_conventions(result, EFFECTS),
        **_verdict_level_text(experiment),
    }
    return replace(result, conventions=conventions)


ExactRunner = Callable[[Ints], ExperimentResult]
"""Runs cells of an estimated experiment, by their numbers, and returns their results in order."""


def add_verification(
    result: ExperimentResult, experiment: ResolvedExperiment, run: ExactRunner
) -> ExperimentResult:
    """Run the cells that `verify` chooses, and add their exact effects.

    Args:
        result: The estimates, with statistics.
    """
    said, settings = experiment.spec.estimator, experiment.spec.statistics
    assert said is not None
    assert said.verify is not None
    exact = _ExactCellCache(result, run)
    verified: list[VerifiedCells] = []
    for number, data in result.computed():
        if not EFFECTS[data.effect].is_tested_intervention:
            continue
        statistic = result.statistics[number]
        seed = digest_number("verify", experiment.seed)
        estimates = np.where(data.inert, np.nan, statistic.mean)
        numbers = (number, estimates, statistic.n, said.verify, seed, settings.confidence)
        verified.append(verify_cells(*numbers, partial(exact.of, number)))
    conventions = dict(result.conventions)
    if verified:
        text = _verification_text(verified, said.verify, settings.confidence)
        conventions["verified"] = text
    return replace(result, verified=tuple(verified), conventions=conventions)


class _ExactCellCache:
    """Exact effects of cells, each of which is run once for all measures."""

    def __init__(self, result: ExperimentResult, run: ExactRunner) -> None:
        shape = (len(result.measures), len(result.cells))
        self._run = run
        self._is_known = np.zeros(len(result.cells), dtype=np.bool_)
        self._numbers = {name: np.full(shape, np.nan) for name in ("mean", "low", "high")}
        self._counts = np.zeros(shape, dtype=np.int64)

    def of(self, measure: int, cells: Ints) -> ExactEffects:
        """Return the effects of some cells; those that aren't known yet are run."""
        new = np.sort(cells[~self._is_known[cells]])
        if len(new):
            result = self._run(new)
            assert len(result.cells) == len(new)
            for number, statistic in enumerate(result.statistics):
                for name, values in self._numbers.items():
                    values[number, new] = getattr(statistic, name)
                self._counts[number, new] = statistic.n
            self._is_known[new] = True
        numbers = {name: values[measure, cells] for name, values in self._numbers.items()}
        return ExactEffects(**numbers, n=self._counts[measure, cells])


def _verification_text(
    verified: Sequence[VerifiedCells], asked: spec.Verification, confidence: float
) -> str:
    """Describe which cells were run, and what their intervals are over.

    Args:
        verified: Those of each measure, one or more.
    """
    found = verified[0]
    if found.search is not None:
        ended = [each for each in verified if each.search and not each.search.is_proved]
        if ended:
            return _search_text(ended[0])
        return (
            "of each measure, all cells that can have an effect were run, on the same rows: the "
            "largest exact effects are proved"
        )
    if not len(found.cells):
        return "no cell was run, because no cell has a defined effect"
    parts = [f"the {found.top} with the largest absolute estimates"] if found.top else []
    drawn = len(found.cells) - found.ranked
    drawn_cells = count_noun(drawn, "other" if parts else "cell")
    parts += [f"{drawn_cells} drawn at random with the seed"] if drawn else []
    verb = "was" if len(found.cells) == 1 else "were"
    text = f"of each measure, {' and '.join(parts)} {verb} also run, on the same rows"
    if len(found.cells) < asked.top + asked.random:
        text += ": no other cell can have an effect"
    if not drawn or drawn == found.others:
        return f"{text}; the correlations are of these cells, not of a sample: no interval"
    return (
        f"{text}; {confidence:g} % intervals of correlations are over the random cells, by the "
        "jackknife on Fisher's scale and Student's t"
    )


def _search_text(found: VerifiedCells) -> str:
    """Describe a search for the largest exact effects and its assumption."""
    assert found.search is not None
    drawn = len(found.cells) - found.ranked
    text = "of each measure, cells were run in the order of their absolute estimates, on the same "
    text += "rows, "
    if found.search.until == "stable":
        return (
            f"{text}until the {found.top} largest exact effects hadn't changed for {found.top} "
            "runs: a heuristic, without a bound on what is missed"
        )
    return (
        f"{text}after {drawn} that were drawn at random with the seed, until the estimated "
        "probability that another cell is among the largest was at most "
        f"{100 - found.search.confidence:g} %. It assumes that the other cells' exact effects "
        "differ from a + b · estimate as those that were run do: by Student's t, with a scale that "
        "grows with the estimate. A cell whose estimate says nothing of its effect is found only "
        "if it was drawn"
    )


def _verdict_level_text(experiment: spec.Experiment) -> dict[str, str]:
    """Describe the level of several `expect` lines."""
    count = sum(not expect.on_mean for expect in experiment.expects)
    if count < 2:
        return {}
    if experiment.statistics.verdicts == "holm":
        return {"verdicts": f"{count} `expect` lines share one level, by Holm's correction"}
    return {
        "verdicts": f"each of {count} `expect` lines has a separate level; with `stats verdicts "
        "holm` they share one"
    }


def _null_bands(result: ExperimentResult) -> tuple[NullBand | None, ...]:
    """Return the null band of every measure; empty if no targets were drawn."""
    if result.drawn is None or result.settings is None:
        return ()
    return compute_null_bands(
        result.measures,
        result.drawn,
        means=[statistic.mean for statistic in result.statistics],
        rounding=[statistic.rounding for statistic in result.statistics],
        confidence=result.settings.confidence,
        effects=EFFECTS,
    )


def add_verdicts(
    result: ExperimentResult,
    experiment: spec.Experiment,
    others: Mapping[str, ExperimentResult] | None = None,
    lost: Collection[str] = (),
) -> ExperimentResult:
    """Add verdicts on the experiment's expectations.

    Args:
        others: Experiments with statistics, which an expectation may name
            (`spearman(recovery, other)`).
        lost: Experiments that could not be computed.
    """
    outcomes = tuple(decide_all_expectations(experiment.expects, result, others, lost))
    return replace(result, outcomes=outcomes)


def build_lost_experiment(
    experiment: spec.Experiment, reasons: Sequence[Diagnostic]
) -> LostExperiment:
    """Return an experiment that could not be computed; its expectations fail."""
    said = f"`{experiment.name}` could not be computed"
    outcomes = [
        ExpectOutcome(
            expect.text, False, None, None, None, said, line=expect.span.line, computed=False
        )
        for expect in experiment.expects
    ]
    return LostExperiment(experiment.name, tuple(map(missing_reason, reasons)), tuple(outcomes))


def check_denominators(measured: MeasuredValues) -> dict[int, Diagnostic]:
    """Return E0604 for measures with a denominator that may be 0, by index of the measure."""
    experiment = measured.experiment
    diagnostics: dict[int, Diagnostic] = {}
    for number, measure in enumerate(experiment.spec.measures):
        effect = EFFECTS[measure.effect]
        source = experiment.spec.source
        if effect.denominator is None or experiment.measures[number].kind == "category":
            continue
        base = measured.unpatched[experiment.spec.base][number]
        other = measured.unpatched[source][number] if source is not None else None
        if effect.circuit is not None or (effect.needs_source and other is None):
            continue
        if experiment.spec.variant:  # name the variant
            effect = replace(effect, divisor=f"{effect.divisor} of {experiment.key}")
        problems = check_denominator(
            base,
            other,
            plan_sampling(experiment, measured.kept),
            measure.span,
            effect=effect,
        )
        if problems:
            diagnostics[number] = problems[0]
    return diagnostics
