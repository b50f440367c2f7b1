"""Resolve what `fit(…)` trains: the facts of a dictionary, a rotation, vector or mask before it is
trained, the measure that it is trained on, and whether training rows differ from measured rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mechdsl.base.files import SafetensorsFile
from mechdsl.base.hashing import digest_number, stable_hash
from mechdsl.base.records import Record
from mechdsl.base.text import Percent, Span, count_noun
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.experiments import NoEstimate
from mechdsl.diagnostics.rules import (
    AxisDoesNotFit,
    BadBasis,
    FewDrawnRows,
    MeasuredOnTrainingRows,
    MeasuredSavedRows,
)
from mechdsl.diagnostics.syntax import NotSupported
from mechdsl.dictionaries.folder import ENCODED_SITES, DictionaryFile
from mechdsl.models.shape import ModelShape, vector_width
from mechdsl.program import spec
from mechdsl.program.direction_methods import PROBE_OPTIONS, TRAINING_DEFAULTS
from mechdsl.program.directions import fit_rows_of_basis, last_token
from mechdsl.program.spec import CLEAN, SEED_AXIS, Constant
from mechdsl.program.trainers import (
    ChoosingTrainer,
    DictionaryTrainer,
    DirectionTrainer,
    EdgeScoreTrainer,
    EditTrainer,
    NodeSearchTrainer,
    OwnTrainer,
    RotationTrainer,
    find_trainer,
    trainer_call,
)
from mechdsl.program.trainings import constant_options, list_seeds, used_saved_groups
from mechdsl.prompts.data_files import StreamedRecords
from mechdsl.prompts.positions.cells import is_after_prompts, resolve_positions
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, PromptRun, RunRow
from mechdsl.resolve.conflicts import (
    computes_attention,
    explain_missing_rule,
    explain_no_dropped_layers,
    find_flat_part,
    find_lacking_row,
    list_sites_without_gradient,
)
from mechdsl.resolve.types import (
    BasisMember,
    BasisTargets,
    CrossLayerFiles,
    FitSample,
    JacobianBasis,
    MaskCandidate,
    ModelContext,
    PlacedEdge,
    PlaceOrder,
    PositionChoice,
    RecordStream,
    ResolvedExperiment,
    SiteCoordinate,
    SitePoint,
    TrainedDictionary,
    TrainedLens,
    TrainedMask,
    TrainedProbe,
    TrainedRotation,
    TrainedVector,
    Training,
    count_numbers,
)
from mechdsl.syntax import ast
from mechdsl.syntax.printer import format_position
from mechdsl.vocab.sites import SITES, in_stack

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mechdsl.base.arrays import Bools

    TextDigests = NDArray[np.uint64]

TEXTS_FILE = "texts.npy"
"""Ascending digests, in the folder of a training on rows that are read in parts."""

FEW_DRAWN_ROWS = 32
"""Rows of a block with drawn values below which a training without `limit` is reported."""

UNTRAINED_FOLDER = "untrained"
"""Folder of the dictionary before its training, in the folder of the training."""

FEWEST_ROWS = 2
"""Rows of a training: one to learn from, and one that is held out."""

ROTATION = "rotation"
"""Name of the tensor with the directions of a trained rotation, one per row."""

STREAM = "resid_post"
"""The site of the vectors of a lens."""

VECTOR = "vector"
"""Name of the tensor of a trained vector."""

EDIT = "edit"
"""Start of the names of the tensors of a trained edit."""


def split_by_seed(
    definition: spec.Basis, program: spec.Program
) -> tuple[tuple[spec.Basis, ...], tuple[int, ...]]:
    """Return a definition for each seed, and the seeds; the definition alone if it has no seeds."""
    seeds = list_seeds(definition, program)
    every = (definition.model_copy(update={"seed": seed}) for seed in seeds)
    return tuple(every) or (definition,), seeds


def name_without_seed(name: str, seed: int) -> str:
    """Return `d[layer 3]` for `d[layer 3, seed 1]`."""
    return name.replace(f"[{SEED_AXIS} {seed}]", "").replace(f", {SEED_AXIS} {seed}]", "]")


def name_with_seed(training: Training) -> str:
    """Return the name of a group, a lens or a probe; with several seeds, `g[seed 1]`."""
    seed = f"[{SEED_AXIS} {training.seed}]" if training.is_one_of_several else ""
    return f"{training.definition}{seed}"


def explain_seeds(name: str, what: str, seeds: tuple[int, ...]) -> tuple[str, str]:
    """Return the problem and the hint where one training is needed, and a name has several."""
    said = f"`{name}` is {what} for each of {len(seeds)} seeds, and one is needed here"
    hint = f"declare one more {what.split()[-1]} for it, with `seed: {seeds[0]}` instead of `seeds`"
    return said, hint


def name_prompt_vector(index: int) -> str:
    """Return the name of a vector of a soft prompt in its file: `vector.position0`."""
    return f"{VECTOR}.position{index}"


def name_edit_tensors(key: str) -> tuple[str, str, str]:
    """Return the names of the tensors of an edit in its file: its matrices B and A, [rank, width],
    and its vector c [width]. It adds Aᵀ B x + c to an activation x."""
    return f"{key}.reads", f"{key}.writes", f"{key}.offset"


def list_tensor_shapes(training: Training, width: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in the file of a trained direction."""
    trainer = training.trainer_of(DirectionTrainer)
    if isinstance(trainer, EditTrainer):
        matrix = trainer.rank(training.of_trainer), width
        return dict(zip(name_edit_tensors(EDIT), (matrix, matrix, (width,)), strict=True))
    count = trainer.count_tokens(training.of_trainer)
    names = [VECTOR] if count is None else map(name_prompt_vector, range(count))
    return dict.fromkeys(names, (width,))


def outline_training(
    definition: spec.Basis,
    options: Mapping[str, Constant],
    source: FitSample | BasisMember,
    point: SitePoint,
    program: spec.Program,
    model: ModelContext,
) -> TrainedDictionary | TrainedRotation:
    """Return what a `fit` line declares, with its weights if they are known.

    Args:
        options: Constants of the call.
        source: The rows that it is trained on, or a dictionary for its decoder.
        point: The site of the basis.
        model: The model of the experiment.
    """
    training = _describe_training(definition, options, source, point, program, model)
    trainer = training.trainer
    file = program.trained.get(training.name, (None, ""))[0]
    if isinstance(trainer, RotationTrainer):
        if isinstance(file, SafetensorsFile):
            size = file.shapes[ROTATION][0]
            return TrainedRotation(file.path, ROTATION, file.digest, size, training)
        size = trainer.size(training.of_trainer, count_numbers(point, model.shape))
        return TrainedRotation(Path(), ROTATION, "", size, training)
    if isinstance(file, CrossLayerFiles):
        assert point.layer is not None
        file = file.layers[point.layer]
    if isinstance(file, DictionaryFile):
        facts = {field.name: getattr(file, field.name) for field in fields(DictionaryFile)}
        return TrainedDictionary(**facts, training=training)
    return _without_weights(training, model.shape)


def outline_vector(
    definition: spec.Basis,
    name: str,
    options: Mapping[str, Constant],
    sample: FitSample,
    point: SitePoint,
    program: spec.Program,
    model: ModelContext,
) -> tuple[TrainedVector, ...]:
    """Return what a `fit` line of a direction declares, with its file if it is trained: one vector,
    or one for each token.

    See `outline_training` for the other arguments.

    Args:
        name: `v[layer 3]`.
    """
    training = _describe_training(definition, options, sample, point, program, model)
    edits = isinstance(training.trainer, EditTrainer)
    keys = [EDIT] if edits else list_tensor_shapes(training, count_numbers(point, model.shape))
    file = program.trained.get(training.name, (None, ""))[0]
    path, digest = Path(), ""
    if isinstance(file, SafetensorsFile):
        path, digest = file.path, file.digest
    return tuple(TrainedVector(path, key, digest, training, name) for key in keys)


def outline_lens(
    definition: spec.Basis,
    sample: FitSample,
    layers: tuple[int, ...],
    program: spec.Program,
    model: ModelContext,
) -> TrainedLens:
    """Return what a `lens` line declares, with its file if it is trained.

    Args:
        layers: Those that have a map, ascending.
    """
    options, first = constant_options(definition, program), SitePoint(STREAM, layers[0], None)
    training = _describe_training(definition, options, sample, first, program, model)
    last = SitePoint(STREAM, model.shape.n_layers - 1, None)
    cells = tuple(replace(first, layer=layer) for layer in layers)
    training = replace(training, cells=cells, made=last)
    file = program.trained.get(training.name, (None, ""))[0]
    if isinstance(file, SafetensorsFile):
        return TrainedLens(file.path, file.digest, training)
    return TrainedLens(Path(), "", training)


def outline_probe(
    definition: spec.Basis,
    sample: FitSample,
    points: tuple[SitePoint, ...],
    classes: tuple[float | str, ...],
    program: spec.Program,
    model: ModelContext,
) -> TrainedProbe:
    """Return what a `probe` line declares, with its file if it is trained.

    Args:
        sample: The rows, with a number or the number of the class of each as targets.
        points: One site, in each layer and head that has a map.
        classes: The classes; empty for a number.
    """
    options = constant_options(definition, program)
    options = {name: option for name, option in options.items() if name not in PROBE_OPTIONS}
    training = _describe_training(definition, options, sample, points[0], program, model)
    # It depends on the model that runs the rows, not on that of the experiment.
    name = _name(definition, sample.run.model or model.key)
    training = replace(training, name=name, cells=points)
    widths = tuple(count_numbers(point, model.shape) for point in points)
    (target,) = (
        argument.value for argument in definition.method.arguments if argument.name == "target"
    )
    file = program.trained.get(training.name, (None, ""))[0]
    path, digest = Path(), ""
    if isinstance(file, SafetensorsFile):
        path, digest = file.path, file.digest
    return TrainedProbe(path, digest, classes, widths, target.span.written, training)


def name_probe_map(point: SitePoint) -> str:
    """Return the beginning of the names of a probe's tensors in its file: `layer.2`,
    `layer.2.head.0`."""
    name = point.site if point.layer is None else f"layer.{point.layer}"
    return name if point.unit is None else f"{name}.head.{point.unit}"


class MaskFile(Record):
    """What a stored training chose."""

    chosen: tuple[MaskCandidate, ...]
    scores: tuple[float, ...]
    """Of each candidate: see `TrainedMask`."""
    digest: str


def outline_mask(
    definition: spec.Basis, objective: ResolvedExperiment, program: spec.Program
) -> TrainedMask:
    """Return what a group with `fit` declares, with what it chose if that is known; otherwise with
    placeholders, half of the candidates if the training decides the number, or if the file names
    too many, which `check_mask_size` reports.

    Args:
        objective: As in `mechdsl.program.trainings`, resolved.
    """
    options = constant_options(definition, program)
    candidates, table = list_candidates(objective), objective.table
    (point, *_) = mask_points(objective)
    sample = FitSample(table, table.runs[objective.spec.base], paired_positions(objective)[0])
    training = _describe_training(definition, options, sample, point, program, objective.model)
    own = _count_share(training.of_trainer, len(candidates))
    training = replace(training, name=_name(definition, objective.model.key), of_trainer=own)
    size = training.trainer_of(ChoosingTrainer).size(training.of_trainer)
    if size is None or _leaves_none_out(training, len(candidates)):
        size = (len(candidates) + 1) // 2
    file = program.trained.get(training.name, (None, ""))[0]
    if isinstance(file, MaskFile):
        return TrainedMask(candidates, file.chosen, file.digest, training, scores=file.scores)
    return TrainedMask(candidates, _choose_first(candidates, size), "", training)


def _count_share(options: Mapping[str, Constant], candidates: int) -> Mapping[str, Constant]:
    """Return options with a number instead of `size: 25%`, a share of the candidates; rounded half
    up, and at least 1, as `top 25% of` does."""
    share = options.get("size")
    if not isinstance(share, Percent):
        return options
    return {**options, "size": max(1, int(share * candidates / 100 + 0.5))}


def _choose_first(candidates: Sequence[MaskCandidate], size: int) -> tuple[MaskCandidate, ...]:
    """Return the first candidates, as placeholders of chosen ones. Edges at positions have
    different edges, as long as there are others, and all positions: a sweep over the edges has the
    largest number of cells."""
    placed = [candidate for candidate in candidates if isinstance(candidate, PlacedEdge)]
    if not placed:
        return tuple(candidates[:size])
    places = len({edge.place for edge in placed})
    edges = len(placed) // places
    numbers = ((n % edges) * places + (n + n // edges) % places for n in range(size))
    return tuple(placed[number] for number in sorted(numbers))


def mask_points(objective: ResolvedExperiment) -> tuple[SitePoint, ...]:
    """Return the sites that a mask writes, once each."""
    sites = objective.rules[0].sites
    assert sites is not None
    return tuple(dict.fromkeys(point for here in sites.points.values() for point in here))


def list_candidates(objective: ResolvedExperiment) -> tuple[MaskCandidate, ...]:
    """Return what a mask chooses from: sites, positions, coordinates of the vector of a site, or
    edges, at each of several positions."""
    points, basis = mask_points(objective), objective.rules[0].basis
    circuit = objective.rules[0].circuit
    if circuit is not None and chooses_positions(objective):
        places = [format_position(item) for item in objective.rules[0].spec.at.items]
        each = product(circuit.every, enumerate(places))
        return tuple(PlacedEdge(edge, *place) for edge, place in each)
    if circuit is not None:
        return circuit.every
    if chooses_positions(objective):
        cells = enumerate(written for written, _ in paired_cells(objective))
        return tuple(PositionChoice(number, cell.label) for number, cell in cells)
    if basis is None:
        return points
    (coordinates,), point = basis.coordinates.values(), points[0]
    name = None if basis.definition == ast.STANDARD_BASIS else basis.definition
    numbers = coordinates.which or range(basis.at(point).size)
    return tuple(SiteCoordinate(point, name, number) for number in numbers)


def key_of_candidate(candidate: MaskCandidate) -> list[str | int | None]:
    """Return a candidate as a list: `["z", 2, 0]`, `["resid_post", 3, null, "f", 12]`, `[4]`,
    `["z", 0, 1, "q", 1, 0]`, and with the number of a position `["z", 0, 1, "q", 1, 0, 2]`."""
    if isinstance(candidate, PlacedEdge):
        return [*key_of_candidate(candidate.edge), candidate.place]
    if isinstance(candidate, tuple):
        return [part for end in candidate for part in key_of_candidate(end)]
    if isinstance(candidate, PositionChoice):
        return [candidate.number]
    if isinstance(candidate, SitePoint):
        return [candidate.site, candidate.layer, candidate.unit]
    return [*key_of_candidate(candidate.point), candidate.basis, candidate.number]


def _name(definition: spec.Basis, *words: str | int | None) -> str:
    """Return the name of a training in `Program.trained`."""
    seed = () if definition.seed is None else (SEED_AXIS, definition.seed)
    every = (definition.name, *words, *seed)
    return " ".join(str(word) for word in every if word is not None)


def _describe_training(
    definition: spec.Basis,
    options: Mapping[str, Constant],
    source: FitSample | BasisMember,
    point: SitePoint,
    program: spec.Program,
    model: ModelContext,
) -> Training:
    call = definition.method
    inner = trainer_call(call)
    own = spec.call_constants(inner, program.parameters)
    trainer = find_trainer(inner)
    assert trainer is not None
    outline = trainer.outline(own) if isinstance(trainer, DictionaryTrainer) else None
    transcodes = outline is not None and outline.transcodes
    outputs: tuple[SitePoint, ...] = ()
    if outline is not None and outline.crosses_layers:
        layers = range(model.shape.n_layers)
        outputs = tuple(replace(point, layer=layer) for layer in layers)
        point = outputs[0]
    encoded = point
    if transcodes:
        encoded = replace(point, site=in_stack(ENCODED_SITES[0], SITES[point.site].stack))
    run_by = source.run.model if isinstance(source, FitSample) else None
    name = _name(definition, point.site, point.layer, point.unit, run_by, model.key)
    seed, objective = definition.seed, program.objectives.get(definition.name)
    partner = None if objective is None else objective.source
    file = program.trained.get(name, (None, ""))[0]
    return Training(
        name=name,
        definition=definition.name,
        trainer=trainer,
        of_trainer=own,
        options={
            name: value
            for name, value in {**TRAINING_DEFAULTS, **trainer.defaults, **options}.items()
            if name not in (*trainer.unused, "seeds")
        },
        source=source,
        encoded=encoded,
        made=point,
        cells=tuple(replace(encoded, layer=output.layer) for output in outputs),
        outputs=outputs,
        seed=int(options.get("seed", program.seed)) if seed is None else seed,
        span=call.span,
        minimises=any(argument.name == "minimise" for argument in call.arguments),
        stream=_stream(source.table, definition, program, file)
        if isinstance(source, FitSample)
        else None,
        is_one_of_several=seed is not None,
        is_discovered=definition.name in program.discovered,
        partner=source.table.runs.get(partner)
        if partner is not None and isinstance(source, FitSample)
        else None,
    )


def _stream(
    table: PromptTable, definition: spec.Basis, program: spec.Program, file: object
) -> RecordStream | None:
    """Return the records of a block that is read in parts.

    Args:
        file: What was trained, if it is known.
    """
    rows = table.block_rows
    if rows is None or not rows.block.spec.streamed or rows.block.data is None:
        return None
    wanted, data = fit_rows_of_basis(definition, program), rows.block.data
    count = rows.block.data_size
    if wanted is not None and wanted.limit is not None:
        count = min(wanted.limit, count)
    assert isinstance(data.records, StreamedRecords)
    groups = tuple((group.count, group.size) for group in data.records.groups)
    files = zip(data.files, data.ends, strict=True)
    begun = frozenset(records.digest for records, end in files if end - records.count < count)
    first = file.layers[0] if isinstance(file, CrossLayerFiles) else file
    weights = first.path if isinstance(first, DictionaryFile) else None
    folder = None if weights is None else weights.parent
    return RecordStream(count, data.digest, begun, groups, folder)


def resolve_part(
    training: Training, table: PromptTable, program: spec.Program, model: ModelContext
) -> tuple[FitSample | None, list[Diagnostic]]:
    """Return rows of a training that reads a file in parts; None after an error.

    Args:
        table: The rows of some records.
        model: The model that runs them.
    """
    definition, run = program.bases[training.definition], training.sample.run.name
    at = definition.at or last_token(definition.method)
    cells, problems = resolve_positions(
        at, table, run, tokenizer=model.tokenizer, loop_values=program.numbers
    )
    if has_errors(problems):
        return None, problems
    (cell,) = cells
    return FitSample(table, table.runs[run], cell), problems


def _without_weights(training: Training, shape: ModelShape) -> TrainedDictionary:
    """Return a dictionary before it is trained."""
    outline = training.trainer_of(DictionaryTrainer).outline(training.of_trainer)
    width = count_numbers(training.made, shape)
    return TrainedDictionary(
        path=Path(),
        layout="circuit-tracer" if outline.crosses_layers else "SAELens",
        architecture=outline.architecture,
        features=outline.features,
        width_in=(
            vector_width(shape, training.encoded.site, training.encoded.layer)
            if outline.transcodes
            else width
        ),
        width_out=width,
        dtype="F32",
        digest="",
        weights_digest="",
        tensors={},
        k=outline.k,
        transcodes=outline.transcodes,
        skips=outline.skips,
        crosses_layers=outline.crosses_layers,
        subtracts_bias=not outline.transcodes,
        covariance=outline.covariance,
        training=training,
    )


def count_training_rows(training: Training, experiment: spec.Experiment, table: PromptTable) -> int:
    """Return how many of the rows that an experiment measures are also training rows.

    If the training reads files in parts, these are the records of these files, and, once it is
    trained, rows with a text that it has read. If it reads a vision encoder, they include rows with
    an image of a training row or of its run in `from:`.
    """
    read = training.with_rows
    if read is None or not experiment.measures or experiment.trains:
        return 0  # no result of a training is a measurement
    trained, stream = set(read.sample.table.row_keys), read.stream
    same = [key in trained for key in table.row_keys]
    if read.paired is not None and read.paired.sample is not None:
        viewed = read.paired.sample.run
        seen = {_content(row) for row in viewed.rows} if viewed.prompts == table.name else set()
        for number, row in enumerate(table.runs[CLEAN].rows):
            same[number] |= _content(row) in seen
    if _is_in_vision(training):
        images = _images_of_rows(read)
        for number, row in enumerate(table.runs[CLEAN].rows):
            same[number] |= not images.isdisjoint(row.images_at([range(len(row.ids))]))
    data = None if table.block_rows is None else table.block_rows.block.data
    if stream is not None and data is not None:
        count, files = len(data.records), stream.files
        for row, number in enumerate(table.row_ids):
            same[row] |= data.digest_of(number % count) in files
    if stream is not None and stream.folder is not None:
        texts = [row.text for row in table.runs[CLEAN].rows]
        counts = find_trained_texts(stream.folder, texts).tolist()
        same = [one or other for one, other in zip(same, counts, strict=True)]
    return sum(same)


def compare_prompts(
    chosen: str,
    prompts: Collection[str],
    noun: str,
    experiment: spec.Experiment,
    table: PromptTable,
) -> tuple[str, Diagnostic | None]:
    """Compare the prompts that a group or circuit in a file was chosen on with measured ones.

    Args:
        chosen: Name of the group or circuit.
        prompts: Digests of the prompts that it was chosen on; empty if the file has none.
        noun: What was chosen: `site`, `edge`.
        table: The rows of the experiment.

    Returns:
        The text of the convention about the rows, and W0738 if measured rows are among them.
    """
    if not prompts:
        unknown = f"it doesn't say which rows its {noun}s were chosen on"
        return f"{unknown}, so they may be measured here", None
    known, said = set(prompts), f"chosen on {count_noun(len(prompts), 'prompt')}"
    if not experiment.measures or experiment.trains:
        return said, None
    shared = sum(row.digest in known for row in table.runs[CLEAN].rows)
    if not shared:
        return f"{said}, none of which is measured here", None
    measured = f"{said}; {shared:,} of the {count_noun(len(table), 'row')} here have one of them"
    if experiment.broken:
        return measured, None
    warning = MeasuredSavedRows(
        span=experiment.span,
        experiment=experiment.name,
        chosen=chosen,
        shared=shared,
        rows=len(table),
    )
    return measured, warning


def describe_saved_groups(
    experiment: spec.Experiment, program: spec.Program, table: PromptTable
) -> tuple[dict[str, str], list[Diagnostic]]:
    """Return the trained groups that an experiment reads from files, `group g` → what was read,
    and a W0738 for each that was chosen on measured rows."""
    groups: dict[str, str] = {}
    problems: list[Diagnostic] = []
    for group in used_saved_groups(experiment, program):
        noun = "site" if group.at is None else "position"
        said, problem = compare_prompts(group.name, group.prompts, noun, experiment, table)
        groups[f"group {group.name}"] = f"{group.made}; {said}"
        problems += [] if problem is None else [problem]
    return groups, problems


def _is_in_vision(training: Training) -> bool:
    return any(SITES[point.site].stack == "vision" for point in training.inputs)


def _describe_overlap(training: Training) -> str:
    """Describe how measured rows overlap with those of a training."""
    return "have images of training rows" if _is_in_vision(training) else "are training rows"


def _images_of_rows(training: Training) -> set[str]:
    """Return digests of the images at the position of a training, and of those that replace them
    in the run of `from:`."""
    images: set[str] = set()
    partner, cell = training.partner, training.sample.cell
    for number, row in enumerate(training.sample.run.rows):
        here = row.pictures_at(cell.tokens(number))
        names = {picture.name for picture in here}
        others = () if partner is None else partner.rows[number].whole_pictures
        images |= {picture.unchanged_content for picture in here}
        images |= {picture.unchanged_content for picture in others if picture.name in names}
    return images


def _content(row: RunRow) -> tuple[object, ...]:
    """Return the tokens and the image of a row."""
    return row.ids, row.image and row.image.text


def count_held_out(training: Training, rows: int) -> int:
    """Return how many of the rows, or of groups of rows, are held out."""
    share = float(training.options["validation"]) / 100
    return min(max(1, round(share * rows)), rows - 1) if share else 0


def order_rows(training: Training, table: PromptTable, rows: Iterable[int]) -> list[int]:
    """Return rows in a random order that depends on the seed and on their contents; the first ones
    are held out."""
    keys, seed = table.row_keys, training.seed
    return sorted(rows, key=lambda row: stable_hash(seed, "training row", keys[row]))


def order_objective_rows(training: Training, objective: ResolvedExperiment) -> list[int]:
    """Return the rows with the position in both runs and with a value of the measure, ordered as in
    `order_rows`."""
    measure = objective.measures[0]
    lacking = {*measure.absent, *(row for atom in measure.atoms for row in atom.lacking)}
    hits = paired_positions(objective)[0].hits
    there = (row for row, own in enumerate(hits) if own and row not in lacking)
    return order_rows(training, objective.table, there)


_OTHER_SCORES_HINT = "use `eap`, `eap_ig` or a search such as `acdc`"
"""The fix for a circuit whose edges a trainer can't score."""

_OR_ALLOW_TRAINING_ROWS = "; or write `measure_on_training_rows: true` in `fit(…)`"


def check_node_rows(
    circuit: Training, objective: ResolvedExperiment, nodes: Training, of_nodes: ResolvedExperiment
) -> Diagnostic | None:
    """Return E0345 for held-out rows of a circuit that the training of its nodes uses, unless the
    file allows them.

    Args:
        circuit: The training of the circuit.
        objective: The objective of the circuit.
        nodes: The training of the group of its nodes.
        of_nodes: The objective of that group.
    """
    if nodes.options["measure_on_training_rows"]:
        return None
    keys = objective.table.row_keys
    rows = order_objective_rows(circuit, objective)
    held_out = {keys[row] for row in rows[: count_held_out(circuit, len(rows))]}
    used = order_objective_rows(nodes, of_nodes)
    used = used[count_held_out(nodes, len(used)) :]
    shared = len(held_out.intersection(of_nodes.table.row_keys[row] for row in used))
    if not shared:
        return None
    return MeasuredOnTrainingRows(
        span=circuit.span,
        experiment=circuit.definition,
        basis=nodes.definition,
        shared=shared,
        rows=len(held_out),
        relation="that `validation` holds out are training rows",
        fix="write the same `prompts`, `limit`, `validation` and `seed` for both"
        + _OR_ALLOW_TRAINING_ROWS,
    )


def check_mask_rows(mask: TrainedMask, definition: spec.Basis) -> Diagnostic | None:
    """Return E0342 for a mask with the mean of one training row: it is the row's own vector."""
    every = definition.method.arguments
    fill = next((argument.value.span.written for argument in every if argument.name == "with"), "")
    rows = sum(map(bool, mask.training.sample.cell.hits))
    held_out = count_held_out(mask.training, rows)
    if fill != "mean" or rows - held_out > 1:
        return None
    return BadBasis(
        span=mask.training.span,
        reason=f"it trains on {count_noun(rows - held_out, 'row')} and holds out {held_out}, and "
        "the mean over one row is the row's own vector",
        hint="name more rows, or write `validation: 0%`",
        what=mask.declares,
    )


def check_mask_size(mask: TrainedMask) -> Diagnostic | None:
    """Return E0342 for a mask whose size leaves none of its candidates out."""
    training, count = mask.training, len(mask.candidates)
    trainer = training.trainer_of(ChoosingTrainer)
    size = trainer.size(training.of_trainer)
    if size is None or not _leaves_none_out(training, count):
        return None
    sites = count_noun(count, mask.noun)
    reason = f"`size: {size}` leaves out none of the {sites}"
    if size > count:
        reason = f"`size` is {size:,}, but there are only {sites}"
    smaller = "a smaller `size`"
    if isinstance(trainer, NodeSearchTrainer):  # perhaps `up to 3` in the file
        reason = f"a group of {count_noun(size, mask.noun)} leaves out none of the {sites}"
        if size > count:
            reason = f"the group may have {size:,} {mask.noun}s, but there are only {sites}"
        smaller = "a smaller number"
    hint = f"name more {mask.noun}s, or write {smaller}"
    return BadBasis(
        span=training.span,
        reason=reason,
        hint="write a smaller number" if mask.noun == "edge" else hint,
        what=mask.declares,
    )


def _leaves_none_out(training: Training, candidates: int) -> bool:
    """Whether a mask of a given size chooses all of its candidates, or more; a circuit by scores of
    edges may have all."""
    trainer = training.trainer_of(ChoosingTrainer)
    size = trainer.size(training.of_trainer)
    return size is not None and size >= candidates + isinstance(trainer, EdgeScoreTrainer)


AnyTrained: TypeAlias = (
    TrainedDictionary | TrainedRotation | TrainedVector | TrainedMask | TrainedLens | TrainedProbe
)


def check_training_rows(
    definition: spec.Basis,
    training: Training,
    experiment: spec.Experiment,
    table: PromptTable,
) -> Iterator[Diagnostic]:
    """Yield E0345 for measured rows that are also training rows, unless the file allows them, and
    W0737 for a training on few rows of a block that can draw more.

    Args:
        table: The rows of the experiment.
    """
    shared, read = count_training_rows(training, experiment, table), training.with_rows
    if experiment.broken:
        shared = 0  # an unknown part of the block is an error, and stands for the whole block
    if shared and read is not None and not read.options["measure_on_training_rows"]:
        yield MeasuredOnTrainingRows(
            span=experiment.span,
            experiment=experiment.name,
            basis=definition.name,
            shared=shared,
            rows=len(table),
            relation=_describe_overlap(training),
            fix=_suggest_other_rows(training, table, experiment.span)
            + ("" if training.is_discovered else _OR_ALLOW_TRAINING_ROWS),
        )
    limited = any(argument.name == "limit" for argument in definition.method.arguments)
    if limited or training.decoder is not None or training.stream is not None:
        return
    trained = training.sample.table
    draws = trained.block_rows is not None and trained.block_rows.block.draws
    if (
        draws
        and FEWEST_ROWS <= len(trained) < FEW_DRAWN_ROWS
        and not trained.cut
        and not trained.stands_in
    ):
        held_out = count_held_out(training, len(trained))
        yield FewDrawnRows(
            span=definition.method.span,
            basis=definition.name,
            rows=count_noun(len(trained) - held_out, "row"),
            block=trained.name,
            held_out=f" ({held_out} held out)" if held_out else "",
        )


def _suggest_other_rows(training: Training, table: PromptTable, seen_from: Span) -> str:
    """Return what to train on instead of measured rows."""
    if _is_in_vision(training):
        return "train on rows with other images, such as a block with another `where`"
    line = f"a line such as `split 80%` in `prompts {table.name}`{_imported_from(table, seen_from)}"
    return f"train on `{table.name}.train` and measure `{table.name}.test`, with {line}"


def _imported_from(table: PromptTable, seen_from: Span) -> str:
    """Return ` of FILE` for rows of a block that another file defines."""
    if table.block_rows is None:
        return ""
    source = table.block_rows.block.spec.span.source
    return "" if source is seen_from.source else f" of {source.name}"


def describe_training(
    made: AnyTrained,
    rows: str,
    program: spec.Program,
    experiment: spec.Experiment,
    table: PromptTable,
) -> str:
    """Describe what is declared, for conventions and `explain`.

    Args:
        rows: `80 rows of fruit.train at tokens *`
        table: The rows of the experiment.
    """
    assert made.training is not None
    text = made.kind
    if isinstance(made.training.trainer, OwnTrainer):
        function = made.training.trainer.own.function
        text += f" ({function.file}, {function.identity})"
    model = f"in `{experiment.model}` " if len(program.models) > 1 else ""
    text += f" trained {model}on {rows}{made.training.manner}"
    if made.training.name in program.trained:
        text += f", {program.trained[made.training.name][1]}"
    shared = count_training_rows(made.training, experiment, table)
    if shared:
        relation = _describe_overlap(made.training)
        text += f"; {shared} of the {len(table)} rows measured here {relation}"
    return text


# --- the measure of a rotation --------------------------------------------------------------------


def chooses_positions(objective: ResolvedExperiment) -> bool:
    """Whether a training chooses positions: it has several."""
    return len(objective.rules[0].positions.written) > 1


def paired_cells(objective: ResolvedExperiment) -> list[tuple[PositionCell, PositionCell]]:
    """Return each position of a training: the tokens that it writes in the clean run, and those
    that it reads in the source run; at sites in a vision encoder, their patches.

    Rows that lack one of them have neither. An ablation reads those that it writes.
    """
    rule = objective.rules[0]
    positions, count = rule.positions, objective.model.shape.merged_side**2
    count = count if rule.in_vision else 1
    return [
        (written.in_patches(count), positions.read.get(key, written).in_patches(count))
        for key, written in positions.written.items()
    ]


def paired_positions(objective: ResolvedExperiment) -> tuple[PositionCell, PositionCell]:
    """Return the tokens of all positions of a training, as `paired_cells` does for each: a row has
    those of the first position, then those of the second."""
    pairs, label = paired_cells(objective), objective.rules[0].spec.at.span.written
    if len(pairs) == 1:
        return pairs[0]
    written, read = (_join(cells, label) for cells in zip(*pairs, strict=True))
    return written, read


def list_edited_images(objective: ResolvedExperiment) -> list[Hashable]:
    """Return the images of each row, with the patches that a training in a vision encoder writes
    and those that it reads in the source run: rows with equal ones get the same vectors."""
    rule, table = objective.rules[0], objective.table
    count = objective.model.shape.merged_side**2
    runs = table.runs[objective.spec.base], table.runs[rule.run]
    if any(run.derived is not None for run in runs):
        return list(range(len(table)))

    def describe(run: PromptRun, cell: PositionCell, number: int) -> Hashable:
        pictures = run.rows[number].whole_pictures
        firsts = [picture.first * count for picture in pictures]
        tokens = [token for tokens in cell.hits[number] for token in tokens]
        places = [bisect_right(firsts, token) - 1 for token in tokens]
        inside = [token - firsts[at] for token, at in zip(tokens, places, strict=True)]
        contents = tuple(picture.picture.picture.content() for picture in pictures)
        return contents, tuple(places), tuple(inside)

    pairs = list(zip(runs, paired_positions(objective), strict=True))
    return [tuple(describe(*pair, number) for pair in pairs) for number in range(len(table))]


def moved_positions(objective: ResolvedExperiment) -> tuple[PositionCell, PositionCell]:
    """Return the tokens at which senders move along the path of `eap_ig`, in both runs: all tokens
    of the prompts and those of the positions.

    Senders move only at the positions, those of `paired_positions`, in a vision encoder, or if
    other tokens have no other value: `mean` has means of the positions alone, and a run's tokens
    are paired by their number if in each row both runs have the same number of tokens and the
    positions at the same ones.
    """
    (written, read), rule, table = paired_positions(objective), objective.rules[0], objective.table
    fill, source = rule.spec.fill, table.runs[rule.run].rows
    if rule.in_vision or (fill is not None and fill.span.written == "mean"):
        return written, read
    moved: list[tuple[tuple[int, ...], ...]] = []
    for number, row in enumerate(table.runs[objective.spec.base].rows):
        own, other = written.hits[number], source[number]
        pairs = (row.source, len(row.ids), own)
        if own and fill is None and (other.source, len(other.ids), read.hits[number]) != pairs:
            return written, read
        moved.append((tuple(sorted({*range(len(row.ids)), *own[0]})),) if own else ())
    cell = PositionCell(written.label, tuple(moved))
    return cell, cell


def _join(cells: Sequence[PositionCell], label: str) -> PositionCell:
    """Return the tokens of some positions as one position."""
    rows = zip(*(cell.hits for cell in cells), strict=True)
    joined = ([token for hits in row for run in hits for token in run] for row in rows)
    hits = tuple((tuple(own),) if own else () for own in joined)
    return PositionCell(label, hits, vectors=cells[0].vectors)


def order_places(objective: ResolvedExperiment) -> PlaceOrder:
    """Return where information at the positions of a training moves to, in some row."""
    cells = [position_cell for position_cell, _ in paired_cells(objective)]
    rows = zip(*(cell.hits for cell in cells), strict=True)
    groups = [[{*chain(*hits)} for hits in row] for row in rows]
    return order_tokens(objective, len(cells), groups)


def order_tokens(
    experiment: ResolvedExperiment, count: int, groups: Sequence[Sequence[set[int]]]
) -> PlaceOrder:
    """Return where information moves to between groups of tokens, in some row.

    Args:
        experiment: Its measures read logits in its base run.
        count: Number of groups, without the last one.
        groups: [row][group] tokens.
    """
    causal = experiment.model.shape.causal
    reaches = [[False] * (count + 1) for _ in range(count + 1)]
    reads_end = [False] * (count + 1)
    rows = experiment.table.runs[experiment.spec.base].rows
    for number, (row, groups_of_row) in enumerate(zip(rows, groups, strict=True)):
        measured = _measured_tokens(experiment, number, row)
        rest = {*range(len(row.ids)), *measured}.difference(*groups_of_row)
        tokens = [*groups_of_row, rest]
        for one, numbers in enumerate(tokens):
            reads_end[one] |= bool(numbers & measured)
            for two, others in enumerate(tokens):
                if numbers and others:
                    reaches[one][two] |= not causal or min(numbers) <= max(others)
    return PlaceOrder(tuple(map(tuple, reaches)), tuple(reads_end))


def _measured_tokens(experiment: ResolvedExperiment, number: int, row: RunRow) -> set[int]:
    """Return the tokens at which a measure reads logits in a row of the base run; all tokens
    without measures."""
    every, tokens = set(range(len(row.ids))), set[int]()
    measures = [*experiment.measures, *chain(*(place.measures for place in experiment.places))]
    if not experiment.model.shape.causal or not measures:
        return every
    for measure in measures:
        at = measure.at.get(experiment.spec.base)
        tokens.add(len(row.ids) - 1 if at is None else at[number])
        for atom in measure.atoms:
            if atom.form.takes in ("prompt", "rows", "activations", "observation", "reply"):
                return every
            longest = max((len(own[number]) for own in atom.texts.values()), default=1)
            tokens |= set(range(len(row.ids), len(row.ids) + longest - 1))
    return tokens


def check_objective(objective: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield problems of the rows and the measure that a rotation, vector or mask is trained on.

    Codes: E0608 for a measure without a gradient, E0342 for runs and positions.

    Args:
        objective: As in `mechdsl.program.trainings`, resolved.
    """
    yield from _check_gradient(objective)
    rule, table = objective.rules[0], objective.table
    measure, said, what = objective.measures[0], objective.spec.trains, _statement(objective)
    runs = [table.runs[name] for name in dict.fromkeys((rule.run, *measure.compared_runs))]
    for run in (prompt_run for prompt_run in runs if prompt_run.noise is not None):
        yield BadBasis(
            span=rule.spec.span,
            reason=f"`{run.name}` has noise, and `{said}` trains on runs without noise",
            hint="name a corruption that changes the text",
            what=what,
        )
    if objective.model.stands_in or table.stands_in:
        return
    problem = _check_coordinates(objective)
    if problem is not None:
        yield problem
        return
    if chooses_positions(objective) and what not in ("group", "circuit"):
        return  # an error of the basis
    for cell, _ in paired_cells(objective):
        problem = _check_position(objective, cell)
        if problem is not None:
            yield problem
            return
    yield from _check_rows(objective)


def _check_coordinates(objective: ResolvedExperiment) -> Diagnostic | None:
    """Return E0342 for a mask over the coordinates of several vectors of a token, or of a basis of
    another model; or over positions of several vectors."""
    rule = objective.rules[0]
    assert rule.spec.site is not None
    count = len(mask_points(objective))
    if rule.circuit is not None:
        return _check_streams(objective) or _check_places(objective)
    if rule.basis is None:
        if count == 1 or not chooses_positions(objective):
            return None
        reason = f"`{rule.spec.site.span.written}` names {count} vectors of a token"
        hint = "a mask chooses positions at one site: name one"
    elif count > 1:
        reason = f"`{rule.spec.site.span.written}` names coordinates of {count} vectors of a token"
        hint = "name one site, such as one layer"
    elif rule.basis.crosses_layers:
        reason = f"`{rule.basis.definition}` is a cross-layer transcoder, whose features write to "
        reason += "several layers"
        hint = "name features of a dictionary of one layer"
    elif any(True for _ in _fit_models(rule.basis)):
        reason = f"`{rule.basis.definition}` is computed from rows of another model"
        hint = "compute it from rows of the model that the mask is trained on"
    else:
        return None
    return BadBasis(span=rule.spec.site.span, reason=reason, hint=hint, what="group")


def _check_streams(objective: ResolvedExperiment) -> Diagnostic | None:
    """Return E0108 for a circuit of a vision encoder or an encoder-decoder at several positions, or
    only at tokens of the latter's encoder, where no edge into `logits` is."""
    rule = objective.rules[0]
    if rule.circuit is not None and rule.circuit.stack and chooses_positions(objective):
        what = "training a circuit in the vision encoder at several positions"
        later = "name the tokens together: `at photo tokens`"
        return NotSupported(span=rule.spec.at.span, what=what, later=later)
    if rule.circuit is None or rule.circuit.encoder is None:
        return None
    place = "in an encoder-decoder"
    if len(rule.spec.at.items) > 1:
        what, later = f"training a circuit {place} at several positions", "write `at tokens *`"
    elif _has_only_encoded_positions(objective):
        what = f"training a circuit {place} only at tokens of the encoder"
        later = "write `at tokens *`, the tokens of both texts"
    else:
        return None
    return NotSupported(span=rule.spec.span, what=what, later=later)


def _has_only_encoded_positions(objective: ResolvedExperiment) -> bool:
    """Return whether an encoder reads all tokens at the positions of a training."""
    rows = objective.table.runs[objective.spec.base].rows
    cell, _ = paired_positions(objective)
    encoded = [
        token < row.source
        for row, hits in zip(rows, cell.hits, strict=True)
        for token in chain.from_iterable(hits)
    ]
    return bool(encoded) and all(encoded)


def _check_places(objective: ResolvedExperiment) -> Diagnostic | None:
    """Return E0304 for a sweep among several positions of a circuit's candidates, and E0310
    for one that some row lacks."""
    cells, rule = paired_cells(objective), objective.rules[0]
    items = rule.spec.at.items
    if len(cells) == 1 and len(items) == 1:
        return None
    if len(cells) != len(items):
        return AxisDoesNotFit(
            span=rule.spec.at.span,
            site=rule.spec.at.span.written,
            reason="sweeps inside a circuit, whose candidates are edges at the named positions",
            hint="name each position: `item 1 token, item 2 token, last token`",
        )
    for item, (written, _) in zip(items, cells, strict=True):
        run = objective.table.runs[objective.spec.base]
        problem = find_lacking_row(written, item.span, run, rule.spec.source)
        if problem is not None:
            return problem
    return None


def _fit_models(basis: BasisTargets) -> Iterator[str]:
    """Yield the names of other models whose rows a basis is computed from."""
    for fit in basis.fits:
        samples = (fit.sample,) if isinstance(fit, JacobianBasis) else fit.samples
        yield from (sample.run.model for sample in samples if sample.run.model is not None)


def _check_position(objective: ResolvedExperiment, cell: PositionCell) -> Diagnostic | None:
    """Return E0342 for a position that rows have several times, or that is in an answer."""
    rule, table, said = objective.rules[0], objective.table, objective.spec.trains
    repeated = next((row for row, hits in enumerate(cell.hits) if len(hits) > 1), None)
    if repeated is not None:
        row, many = table.row_ids[repeated], len(cell.hits[repeated])
        reason = f"row {row} has `{cell.label}` {many} times, and `{said}` trains at one"
        hint = "name one of them: `item 1 token`"
    elif is_after_prompts(cell, table.runs[objective.spec.base].rows):
        reason = f"`{said}` trains at tokens of the prompt, not of the answer"
        hint = "name a position of the prompt"
    else:
        return None
    what = _statement(objective)
    return BadBasis(span=rule.spec.at.span, reason=reason, hint=hint, what=what)


def explain_shared_images(training: Training) -> tuple[str, str] | None:
    """Return why held-out rows of a training in a vision encoder may have images of other rows, and
    a hint: vectors of patches depend on the image only."""
    if not training.options["validation"] or not _is_in_vision(training):
        return None
    row_of: dict[str, int] = {}
    cell = training.sample.cell
    for number, row in enumerate(training.sample.run.rows):
        for image in sorted(row.images_at(cell.tokens(number))):
            first = row_of.setdefault(image, number)
            if first != number:
                table = training.sample.table
                one, two = sorted(table.row_ids[row] for row in (first, number))
                reason = f"rows {one} and {two} of `{table.name}` have the same image, so it can't "
                reason += "be held out"
                hint = "train on a block with one row for each image"
                other = "" if training.is_discovered else ", or write `validation: 0%`"
                return reason, hint + other
    return None


def explain_few_rows(
    table: PromptTable, limit: int | None, fewest: int = FEWEST_ROWS
) -> tuple[str, str]:
    """Return why a fit has too few rows, and a hint.

    Args:
        table: The rows of the fit, fewer than `fewest`.
        limit: Its `limit`.
        fewest: The number of rows that it needs.
    """
    hint = "name more rows: a larger part of the split, or a block with more rows"
    if limit is not None and limit < fewest:
        hint = f"write a larger number than `limit: {limit}`"
    elif limit is None and table.block_rows is not None and table.block_rows.block.draws:
        hint = "write how many rows to sample: `limit: 400`"
    return f"`{table.name}` has {count_noun(len(table), 'row')}, fewer than {fewest}", hint


def _check_rows(objective: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0342 for positions that too few rows have, or that share tokens."""
    rule, table = objective.rules[0], objective.table
    cell, span = paired_positions(objective)[0], rule.spec.at.span
    rows = [row for row, hits in enumerate(cell.hits) if hits]
    if len(table) < FEWEST_ROWS:
        span = rule.spec.span
        reason, hint = explain_few_rows(table, objective.spec.limit)
    elif len(rows) < FEWEST_ROWS:
        where = " in both runs" if rule.spec.source is not None else ""
        reason = f"fewer than {FEWEST_ROWS} rows of `{table.name}` have `{cell.label}`{where}"
        hint = "name a position that more rows have"
    elif (clash := _shared_token(objective)) is not None:
        row, token, first, second = clash
        reason = f"`{first}` and `{second}` are both token {token} of row {row}"
        hint = "a mask chooses between positions without common tokens: leave one out"
        if rule.circuit is not None:
            hint = "each token is at one position: leave one out, or write `tokens except …`"
    else:
        return
    yield BadBasis(span=span, reason=reason, hint=hint, what=_statement(objective))


def _shared_token(objective: ResolvedExperiment) -> tuple[int, int, str, str] | None:
    """Return the first row, token and labels of two positions that share a token of a row."""
    cells = [written for written, _ in paired_cells(objective)]
    items, names = objective.rules[0].spec.at.items, [cell.label for cell in cells]
    if len(items) == len(cells):
        names = [format_position(item) for item in items]
    for row in range(len(objective.table)):
        owners: dict[int, int] = {}
        for number, cell in enumerate(cells):
            for token in (token for run in cell.hits[row] for token in run):
                first = owners.setdefault(token, number)
                if first != number:
                    return row, token, names[first], names[number]
    return None


def _statement(objective: ResolvedExperiment) -> str:
    """Return the first word of the statement that declares a training, such as `basis`."""
    return objective.spec.name.split()[0]


def _check_gradient(objective: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0608 for a measure or a site without a gradient."""
    (rule,), (measure,), (said,) = objective.rules, objective.measures, objective.spec.measures
    where = objective.spec.differentiated
    if where == "nowhere":
        yield from _check_decomposition(objective)
        return
    path = "eap_ig(size: 20, steps: 5)"
    if _statement(objective) == "group":
        path = "integrated_gradients(size: 4, steps: 16)"
    hint = f", or take the gradients along a path: `{path}`"
    problem = find_flat_part(
        measure, objective.spec.base, at_base=where == "clean run", along_path=hint
    )
    mistake = None if problem is None else (said.metric.span, f"`{problem[0]}`", *problem[1:])
    if mistake is None and measure.in_reply is not None:
        hint = "measure a logit, a probability or a difference of logits"
        mistake = said.span, "tokens of a reply", "a selected token has no gradient", hint
    rules, shape = objective.spec.backward, objective.model.shape
    acted = (shape.others.get(stack) for stack in objective.acted_stacks)
    stacks = [shape, *(own for own in acted if own is not None)]
    reasons = (explain_missing_rule(rules, stack) for stack in stacks)
    if mistake is None and (reason := next(filter(None, reasons), "")):
        assert rule.spec.site is not None
        hint = _OTHER_SCORES_HINT
        mistake = rule.spec.site.span, f"`{objective.model.name}`", reason, hint
    if mistake is None and (reason := _explain_fixed_image(objective)):
        assert rule.spec.site is not None
        hint = "use `eap`, `relp`, `gim` or a search such as `acdc`"
        mistake = rule.spec.site.span, f"`{objective.model.name}`", reason, hint
    if mistake is None:
        mistake = _find_unfixed_attention(objective)
    normalising = _find_normalising_dictionary(objective)
    if mistake is None and normalising is not None:
        span = (rule.spec.nodes or said).span
        reason = "it normalises the vectors that it encodes, and the changed derivatives of "
        reason += "norms are defined for the model only"
        hint = _OTHER_SCORES_HINT
        mistake = span, f"features of `{normalising}`", reason, hint
    points = () if rule.sites is None else (p for own in rule.sites.points.values() for p in own)
    flat = list_sites_without_gradient(points)
    if mistake is None and flat:
        assert rule.spec.site is not None
        hint = "name a site such as `resid_post`, `z` or `mlp_out`"
        reason = "mechdsl doesn't compute gradients at this site"
        mistake = rule.spec.site.span, f"with respect to `{flat[0]}`", reason, hint
    if mistake is not None:
        span, what, reason, hint = mistake
        statement = objective.spec.trains
        yield NoEstimate(
            span=span,
            statement=statement,
            verb="differentiate",
            what=what,
            reason=reason,
            hint=hint,
        )


def _check_decomposition(objective: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0608 for edges that can't be scored by contextual decomposition."""
    (rule,), circuit, shape = objective.rules, objective.rules[0].circuit, objective.model.shape
    rules = objective.spec.backward
    if rules is None or circuit is None:
        return
    assert rule.spec.site is not None
    span = rule.spec.site.span
    what, reason = f"`{objective.model.name}`", explain_missing_rule(rules, shape)
    if shape.takes != "text":
        reason = "circuits are decomposed in models of texts with one stack only"
    elif circuit.neurons or circuit.features:
        what, reason = "a neuron or a feature as a node", "edges of it aren't decomposed yet"
        span = (rule.spec.nodes or rule.spec.site).span
    if reason:
        yield NoEstimate(
            span=span,
            statement=objective.spec.trains,
            verb="decompose",
            what=what,
            reason=reason,
            hint=_OTHER_SCORES_HINT,
        )


def _explain_fixed_image(objective: ResolvedExperiment) -> str:
    """Return why edges aren't scored at points between two runs, if blocks attend to an image that
    these runs may not share; empty if they are."""
    if objective.spec.gradient_path is None or not objective.model.shape.attends_to_image:
        return ""
    return "points between two runs move the text, but not the image that blocks attend to"


def _find_unfixed_attention(
    objective: ResolvedExperiment,
) -> tuple[Span, str, str, str] | None:
    """Return the span, the name, the reason and the hint of a part whose edges can't be scored by
    exact attention weights, or with the gradient of one layer left out."""
    (rule,), (measure,), (said,) = objective.rules, objective.measures, objective.spec.measures
    if not objective.spec.fixes_attention:
        return None
    assert rule.spec.site is not None
    site, what, shape = rule.spec.site.span, f"`{objective.model.name}`", objective.model.shape
    stacks = [shape, *(shape.others[stack] for stack in objective.acted_stacks)]
    hint = _OTHER_SCORES_HINT
    if "vision" in objective.acted_stacks or shape.takes == "image":
        reason = "it recomputes attention of tokens, not of the patches of images"
        return site, f"a circuit in the vision encoder of {what}", reason, hint
    if shape.attends_to_image:
        reason = "attention to an image isn't recomputed along the edges of a circuit yet"
        return site, what, reason, "use `eap`, `relp`, `gim` or a search such as `acdc`"
    if not all(map(computes_attention, stacks)):
        return site, what, "its attention can't be computed separately", hint
    if any(any(atom.appended) for atom in measure.atoms):
        reason = "tokens of a text after the prompt attend to the keys, too"
        return said.metric.span, f"`{measure.label}`", reason, hint
    if objective.spec.drops_layers and (lacking := explain_no_dropped_layers(stacks)):
        return site, what, lacking, "use `atp_qk`"
    return None


def _find_normalising_dictionary(objective: ResolvedExperiment) -> str | None:
    """Return the name of a dictionary that normalises vectors and whose features are nodes of
    edges that are scored with changed derivatives."""
    circuit = objective.rules[0].circuit
    if circuit is None or objective.spec.backward is None:
        return None
    members = (feature.member for feature in circuit.features.values())
    names = (
        member.name
        for member in members
        if isinstance(member.operand, DictionaryFile) and member.operand.normalization != "none"
    )
    return next(names, None)


# --- texts that a training has read from files ----------------------------------------------------


def hash_texts(texts: Iterable[str]) -> TextDigests:
    """Return [text] digests."""
    import numpy as np

    return np.fromiter(map(digest_number, texts), dtype=np.uint64)


def write_texts(folder: Path, digests: TextDigests) -> None:
    """Write the digests of a training. Raises OSError."""
    import numpy as np

    np.save(folder / TEXTS_FILE, np.unique(digests), allow_pickle=False)
    (folder / TEXTS_FILE).chmod(0o644)


def read_texts(folder: Path) -> TextDigests:
    """Return the digests of a training, which stay on the disk. Raises OSError, ValueError."""
    import numpy as np

    texts = np.load(folder / TEXTS_FILE, mmap_mode="r", allow_pickle=False)
    if texts.dtype != np.uint64 or texts.ndim != 1:
        raise ValueError(f"{TEXTS_FILE} is damaged")
    return texts


def find_trained_texts(folder: Path, texts: Sequence[str]) -> Bools:
    """Return [text] whether a training has read a text. Raises OSError, ValueError."""
    import numpy as np

    kept, wanted = read_texts(folder), hash_texts(texts)
    at = np.searchsorted(kept, wanted)
    there = at < len(kept)
    there[there] = kept[at[there]] == wanted[there]
    return there
