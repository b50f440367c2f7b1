"""Resolve the vector that a direction expression denotes in every cell.

With `d[layer own]`, a rule writes the direction of layer 2 in layer 2, that of layer 3 in layer 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import isfinite
from typing import TypeVar

from mechdsl.base import limits
from mechdsl.base.files import UnreadableFile, inspect_safetensors
from mechdsl.base.limits import is_integer
from mechdsl.base.records import Record
from mechdsl.base.text import HintedError, count_noun, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.experiments import BadPick
from mechdsl.diagnostics.rules import BadBasis, BadDirection
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.models.shape import vector_width
from mechdsl.program import spec
from mechdsl.program.direction_methods import (
    BASIS_METHODS,
    DIRECTION_METHODS,
    TRAINING_OPTIONS,
    FittedMethod,
    MethodError,
    RowSummary,
    description,
    fitted_method,
    option_defaults,
    option_problem,
    sample_problem,
)
from mechdsl.program.directions import (
    FitRows,
    count_prompt_tokens,
    declared_training,
    direction_names,
    fit_rows_of_basis,
    fit_rows_of_call,
    last_token,
    read_probe_name,
)
from mechdsl.program.paths import SAVED_PATH, path_to_read
from mechdsl.program.python_functions import FIT_CALL
from mechdsl.program.spec import SEED_AXIS, Constant, constant_value
from mechdsl.program.trainers import EditTrainer, trainer_call
from mechdsl.program.trainings import SEEDS_DIFFER, SEEDS_HINT
from mechdsl.prompts.positions.cells import resolve_positions
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.findings import Finding, PickError, VariantFinding
from mechdsl.resolve.loops import evaluate_arithmetic
from mechdsl.resolve.sites import ExperimentContext, SiteContext, describe_position, resolve_site
from mechdsl.resolve.trainings import (
    AnyTrained,
    check_training_rows,
    describe_training,
    explain_few_rows,
    explain_shared_images,
    name_edit_tensors,
    name_probe_map,
    outline_vector,
    split_by_seed,
)
from mechdsl.resolve.types import (
    Axis,
    AxisIndices,
    AxisLabel,
    DirectionFamily,
    DirectionMember,
    DirectionTargets,
    DirectionVector,
    FitSample,
    FittedVector,
    PositionTargets,
    ProbeVector,
    ResolvedExperiment,
    SavedEdit,
    SavedVector,
    SitePoint,
    SiteTargets,
    TrainedProbe,
    Training,
    UnembeddingVector,
    UnitVector,
    VectorRole,
    WeightedSum,
    count_numbers,
    find_training_seed,
    find_vector_role,
)
from mechdsl.syntax import ast
from mechdsl.syntax.printer import format_expression
from mechdsl.syntax.traversal import rewrite, walk
from mechdsl.vocab.sites import SITES

TrainedT = TypeVar("TrainedT")


class DirectionError(HintedError):
    """Error for an invalid direction, with a hint on what to write instead."""

    def __init__(self, node: ast.Node, reason: str, hint: str) -> None:
        super().__init__(reason, hint)
        self.node = node


def name_member(name: str, axes: Sequence[Axis], key: AxisIndices) -> str:
    """Return the name of a member: `refusal[layer 3, token -1]`."""
    said = [name_coordinate(axis, axis.labels[i]) for axis, i in zip(axes, key, strict=True)]
    return f"{name}[{', '.join(said)}]" if said else name


def name_coordinate(axis: Axis, label: AxisLabel) -> str:
    """Return a coordinate of a family's member: `layer 3`, `token -1`."""
    return describe_position(label) if axis.name == "position" else f"{axis.name} {label}"


class DirectionUse(Record):
    """The only use of what `direction` names if it isn't a direction."""

    verb: str
    """Of the rule."""
    what: str
    """What it has instead of one vector."""
    rule: str
    """The rule, with {} for the name."""

    def hint(self, name: str) -> str:
        """Return what to write."""
        return f"write `{self.rule.format(name)}`"


USES: Mapping[VectorRole, DirectionUse] = {
    "scales": DirectionUse(
        "scale", "has a factor for each channel", "scale SITE at POSITIONS by {}"
    ),
    "edit": DirectionUse(
        "add", "computes a vector from each activation", "add {} to SITE at POSITIONS"
    ),
}


def list_axis_indices(axes: Sequence[Axis]) -> list[AxisIndices]:
    return list(product(*(range(len(axis)) for axis in axes)))


def combine_families(
    node: ast.Node,
    parts: Sequence[DirectionFamily],
    make: Callable[[Sequence[DirectionVector]], DirectionVector],
) -> DirectionFamily:
    """Combine several families into one, by members of the same layer, head and position."""
    for part in parts:
        use = find_use(part)
        if use is not None:
            raise DirectionError(
                node,
                f"`{part.name}` {use.what} and isn't a direction of a sum",
                f"{use.hint(part.name)}, with a number as `0.5 * {part.name}`",
            )
    axes: dict[str, Axis] = {}
    for axis in (axis for part in parts for axis in part.axes):
        known = axes.setdefault(axis.name, axis)
        if known.labels != axis.labels:
            raise DirectionError(
                node,
                f"its parts sweep different values of `{axis.name}`",
                "sweep the same values, or name a member of each",
            )
    widths = {part.width for part in parts if part.width is not None}
    if len(widths) > 1:
        several = " and ".join(map(str, sorted(widths)))
        raise DirectionError(
            node, f"its parts have {several} numbers", "combine directions of sites of equal width"
        )
    names = list(axes)
    members: dict[AxisIndices, DirectionMember] = {}
    text = format_expression(node)
    for key in list_axis_indices(list(axes.values())):
        direction_members = [
            part.members[tuple(key[names.index(axis.name)] for axis in part.axes)] for part in parts
        ]
        made = "; ".join(
            dict.fromkeys(direction_member.made for direction_member in direction_members)
        )
        vector = make([direction_member.vector for direction_member in direction_members])
        name = _name_vector(text, list(axes.values()), key, vector)
        members[key] = DirectionMember(name, vector, made)
    definitions = dict.fromkeys(definition for part in parts for definition in part.definitions)
    width = next(iter(widths), None)
    return DirectionFamily(text, tuple(axes.values()), members, width, tuple(definitions))


def resolve_fitted_family(
    call: ast.Call, definition: spec.Direction, work: ExperimentContext
) -> DirectionFamily | None:
    """Resolve a family with a member for each value that the definition's site and positions sweep.

    None after an error, and if a required model or prompt set isn't available.

    Raises:
        DirectionError: If a fit isn't possible.
    """
    assert definition.site is not None
    sites, axes = _sites(definition, work)
    if sites is None:
        return None
    points = {key: _points(call, definition, key, sites) for key in sites.points}
    rows = fit_rows_of_call(call, work.program)
    reading = work.reading(sites)
    samples = [resolve_samples(call, row, definition.at, reading) for row in rows]
    if any(fit_samples is None for fit_samples in samples):
        return None
    by_label = [fit_samples for fit_samples in samples if fit_samples is not None]
    labels = [
        label for label in by_label[0] if all(label in fit_samples for fit_samples in by_label[1:])
    ]
    if not labels:
        at = "last token" if definition.at is None else definition.at.span.written
        raise DirectionError(call, f"no row has `{at}` in all inputs", "name another position")
    swept = list(axes)
    if len(labels) > 1:
        assert definition.at is not None
        swept.append(Axis("position", tuple(labels), definition.at.span))
    members: dict[AxisIndices, DirectionMember] = {}
    options = _options(call, work)
    for key in list_axis_indices(swept):
        site_key, label = (key[:-1], labels[key[-1]]) if len(labels) > 1 else (key, labels[0])
        read = tuple(fit_samples[label] for fit_samples in by_label)
        check_row_count(call, read, rows, label, fitted_method(call.name).min_rows)
        made = _describe_fit(call, read, rows, options)
        fitted = FittedVector(call.name, read, points[site_key], options)
        made += f", at {sites.labels[site_key]}, {describe_position(label)}"
        members[key] = DirectionMember(name_member(definition.name, swept, key), fitted, made)
    some = next(iter(points.values()))
    return DirectionFamily(
        definition.name, tuple(swept), members, _width(some, work), (definition.name,)
    )


def _sites(
    definition: spec.Direction, work: ExperimentContext
) -> tuple[SiteTargets | None, tuple[Axis, ...]]:
    """Return the sites of a definition, None after an error, and the axes that it sweeps."""
    assert definition.site is not None
    before = len(work.diagnostics)
    sites, axes = resolve_site(definition.site, work.sites.of_definitions())
    return (None if has_errors(work.diagnostics[before:]) else sites), axes


def _resolve_trained_family(
    call: ast.Call, definition: spec.Direction, work: ExperimentContext
) -> DirectionFamily | None:
    """Resolve a vector that `fit` trains, or one for each value that the site sweeps.

    None after an error, and if a required model or prompt set isn't available.

    Raises:
        DirectionError: If the training isn't possible.
    """
    declared = declared_training(definition)
    assert declared is not None
    rows = fit_rows_of_basis(declared, work.program)
    sites, axes = _sites(definition, work)
    if sites is None or rows is None:
        return None
    samples = resolve_samples(call, rows, definition.at, work.reading(sites))
    if samples is None:
        return None
    if len(samples) != 1:
        assert definition.at is not None
        reason, hint = "a direction is trained at one position", "join them: `{A, B}`"
        raise DirectionError(definition.at, reason, hint)
    ((label, sample),) = samples.items()
    options = {
        argument.name: value
        for argument in call.arguments
        if argument.name in TRAINING_OPTIONS
        and (value := constant_value(argument.value, work.program.parameters)) is not None
    }
    every_seed, seeds = split_by_seed(declared, work.program)
    axes = [*axes, *([Axis(SEED_AXIS, seeds, call.span)] if seeds else [])]
    members: dict[AxisIndices, DirectionMember] = {}
    points = {key: _points(call, definition, key, sites) for key in sites.points}
    count = count_prompt_tokens(definition.name, work.program.directions, work.program.parameters)
    _check_token_count(call, definition, sample, count, work)
    tokens = [Axis("position", tuple(range(1, count + 1)), call.span)] if count is not None else []
    for key in list_axis_indices(axes):
        number, place = (key[-1], key[:-1]) if seeds else (0, key)
        (point,) = points[place]
        name = _name_with_seed(definition.name, axes, key, definition.seed)
        basis = every_seed[number]
        every = outline_vector(basis, name, options, sample, point, work.program, work.model)
        vector = every[0]
        _check_rank(call, vector.training, work)
        if problem := explain_shared_images(vector.training):
            raise DirectionError(call, *problem)
        text = f"{describe_rows(sample, rows)} at {describe_position(label)}"
        about = check_training(declared, vector, text, work)
        made = f"{about}, at {sites.labels[place]}"
        for token, each in enumerate(every):
            whole = (*key, token) if tokens else key
            called = name_member(definition.name, [*axes, *tokens], whole)
            said = made if token == 0 else f"trained together with {name} of token 1"
            members[whole] = DirectionMember(called, each, said)
    some = next(iter(points.values()))
    return DirectionFamily(
        definition.name, (*axes, *tokens), members, _width(some, work), (definition.name,)
    )


def _resolve_probe_family(
    call: ast.Call, definition: spec.Direction, work: ExperimentContext
) -> DirectionFamily | None:
    """Resolve `probe(told)`, the weights of a trained probe, or a family of those of its maps.

    None after an error, and if a required model or prompt set isn't available.

    Raises:
        DirectionError: If the maps have different widths, or a swept layer has none.
    """
    probe = work.probes.get(str(read_probe_name(call)))
    if probe is None:
        return None
    number = find_class(call, probe, work.program)
    if isinstance(number, BadArgument):
        work.diagnostics.extend([] if number in work.diagnostics else [number])
        return None
    name = probe.training.definition
    sites, axes = resolve_site(work.program.bases[name].site, work.sites.of_definitions())
    if sites is None:
        return None
    if sites.missing:
        reason = f"`{name}` has no map in {sites.labels[min(sites.missing)]}"
        raise DirectionError(call, reason, f"name layers that have the site in `probe {name}`")
    if len(set(probe.widths)) > 1:
        several = " and ".join(map(str, sorted(set(probe.widths))))
        reason = f"the maps of `{name}` have {several} numbers"
        raise DirectionError(call, reason, "train a probe for the layers of each width")
    toward = f" toward `{probe.classes[number]}`" if probe.classes else ""
    seed = probe.training.seed if probe.training.is_one_of_several else None
    members: dict[AxisIndices, DirectionMember] = {}
    for key, (point,) in sites.points.items():
        called = _name_with_seed(definition.name, axes, key, seed)
        tensor = f"{name_probe_map(point)}.weight"
        vector = ProbeVector(
            probe.path,
            tensor,
            probe.digest,
            probe.training,
            called,
            probe=probe,
            point=point,
            of_class=number,
        )
        made = f"weights of `{name}`{toward}, a {probe.made}, at {sites.labels[key]}"
        members[key] = DirectionMember(called, vector, made)
    return DirectionFamily(definition.name, axes, members, probe.widths[0], (definition.name,))


def find_class(call: ast.Call, probe: TrainedProbe, program: spec.Program) -> int | BadArgument:
    """Return the number of the class after `class:`, of two classes that of the second one without
    it; 0 for a number. Or the problem with the call, `probe(told)` or `prediction(told)`."""
    given = [each for each in call.arguments if each.name is not None]
    classes, name, word = probe.classes, probe.training.definition, call.name
    wrong = next((each for each in given if each.name != "class"), None)
    if wrong is not None or (given and not classes):
        argument = wrong or given[0]
        reason = f"isn't an option of `{word}`"
        hint = f"write `{word}({name}, class: {_written(classes[0])})`" if classes else "remove it"
        return BadArgument(span=argument.span, name=str(argument.name), reason=reason, hint=hint)
    if not classes:
        return 0
    known = name_list(map(str, classes[:8]))
    if not given:
        if len(classes) == 2:
            return 1
        reason = f"needs a class, because `{name}` has {len(classes)}"
        hint = f"write `{word}({name}, class: {_written(classes[0])})`; classes are {known}"
        return BadArgument(span=call.span, name=word, reason=reason, hint=hint)
    value = constant_value(given[0].value, program.parameters)
    key = str(value) if isinstance(value, bool) else value
    if key is not None and key in classes:
        return classes.index(key)
    reason, hint = f"`{name}` has no such class", f"classes are {known}"
    return BadArgument(
        span=given[0].span, name=given[0].value.span.written, reason=reason, hint=hint
    )


def _written(key: float | str) -> str:
    return f'"{key}"' if isinstance(key, str) else f"{key:g}"


def _name_vector(name: str, axes: Sequence[Axis], key: AxisIndices, vector: DirectionVector) -> str:
    """Return the name of a member, with the seed of the training that it is computed from."""
    swept = any(axis.name == SEED_AXIS for axis in axes)
    return _name_with_seed(name, axes, key, None if swept else find_training_seed(vector))


def _name_with_seed(name: str, axes: Sequence[Axis], key: AxisIndices, seed: int | None) -> str:
    if seed is None:
        return name_member(name, axes, key)
    names = [name_coordinate(axis, axis.labels[i]) for axis, i in zip(axes, key, strict=True)]
    return f"{name}[{', '.join((*names, f'{SEED_AXIS} {seed}'))}]"


def _check_rank(call: ast.Call, training: Training, work: ExperimentContext) -> None:
    """Check that an edit has at most as many directions as vectors have numbers. Raises
    DirectionError."""
    trainer, site = training.trainer, training.made.site
    if not isinstance(trainer, EditTrainer) or work.model.shape.stands_in:
        return
    rank, width = trainer.rank(training.of_trainer), count_numbers(training.made, work.model.shape)
    if rank > width:
        raise DirectionError(
            call,
            f"its rank is {rank:,}, but vectors of `{site}` have {width:,} numbers",
            f"write at most `rank: {width}`",
        )


def _check_token_count(
    call: ast.Call,
    definition: spec.Direction,
    sample: FitSample,
    count: int | None,
    work: ExperimentContext,
) -> None:
    """Check that every row has a token for each vector of a soft prompt.

    Raises:
        DirectionError: For the first row with another number of tokens.
    """
    if count is None or work.model.stands_in or sample.table.stands_in:
        return
    for row, hits in enumerate(sample.cell.hits):
        there = sum(map(len, hits))
        if hits and there != count:
            node = definition.at or call
            reason = f"it has {count_noun(count, 'vector')}, and row {row} of `{sample.run.name}` "
            reason += f"has {count_noun(there, 'token')} there"
            raise DirectionError(node, reason, "name as many tokens: `at embed at inserted tokens`")


def _points(
    call: ast.Call, definition: spec.Direction, key: AxisIndices, sites: SiteTargets
) -> tuple[SitePoint, ...]:
    """Return the points of a member: a single vector, or heads whose outputs are summed."""
    points, site = sites.points[key], definition.site
    assert site is not None
    if any(SITES[point.site].width in ("key", "one") for point in points):
        kind = SITES[points[0].site].width
        what = "vectors over keys" if kind == "key" else "single numbers"
        raise DirectionError(site, f"it has {what}, which have no directions",
                         "name a site of vectors, such as `resid_post layer 2`")  # fmt: skip
    heads = all(point.site in ("z", "head_out") for point in points)
    method = DIRECTION_METHODS[call.name]
    summed = heads and isinstance(method, FittedMethod) and method.sums_heads
    if summed and all(point.unit is not None for point in points):
        return points
    if len(points) == 1 and (points[0].unit is not None or SITES[points[0].site].unit is None):
        return points
    several = "heads" if SITES[points[0].site].unit is not None else "layers"
    hint = f"name one, or sweep them: `{several.removesuffix('s')} *` computes a direction for each"
    raise DirectionError(site, f"it joins {several}, but a direction belongs to one site", hint)


def _width(points: Sequence[SitePoint], work: ExperimentContext) -> int:
    first = points[0]
    if len(points) > 1:
        return work.model.shape.d_model
    return vector_width(work.model.shape, first.site, first.layer)


def resolve_samples(
    call: ast.Call, rows: FitRows, at: ast.Positions | None, work: ExperimentContext
) -> dict[str, FitSample] | None:
    """Resolve the rows of a fit, by position label; None after an error.

    Raises:
        DirectionError: For some trainings in a vision encoder.
    """
    if call.name == FIT_CALL and work.side == "image":
        _check_trainer_in_vision(call)
    table = work.table if rows.key == "" else work.table.other_tables.get(rows.key)
    if table is None or table.stands_in or rows.run not in table.runs:
        return None
    run = table.runs[rows.run]
    if rows.model is not None and rows.model != work.model.name:
        run = replace(run, model=rows.model)
    cells, problems = resolve_positions(
        at or last_token(call),
        table,
        rows.run,
        tokenizer=work.model.tokenizer,
        loop_values=work.program.numbers,
        side=work.side,
    )
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    if has_errors(problems):
        return None
    targets = _targets(call, table.runs[rows.run].rows)
    return {cell.label: FitSample(table, run, cell, targets) for cell in cells}


def _check_trainer_in_vision(call: ast.Call) -> None:
    """Check that a training writes or reads patches. Raises DirectionError."""
    name = trainer_call(call).name
    if name in _NOT_IN_VISION:
        raise DirectionError(call, *_NOT_IN_VISION[name])


_NOT_IN_VISION = {
    "soft_prompt": (
        "`soft_prompt(…)` replaces tokens of the prompt, and the vision encoder reads patches",
        "train it at `embed` at tokens of the image, or train `vector` here",
    ),
    "cross_layer_transcoder": (
        "features that write to several layers of the vision encoder aren't computed yet",
        "train `transcoder(…)` at one layer",
    ),
} | dict.fromkeys(
    ("cca", "sparse_cca"),
    (
        "correlations of patches in the vision encoder aren't computed yet",
        "compute it at `embed`, at tokens of the image",
    ),
)
"""Trainings that aren't possible in a vision encoder → the reason and a hint."""


def _names_value(call: ast.Call) -> bool:
    """Whether the first argument of a method is a value of its rows."""
    method = DIRECTION_METHODS.get(call.name) or BASIS_METHODS.get(call.name)
    return method is not None and method.takes == "value and block"


def _targets(call: ast.Call, rows: Sequence[object]) -> tuple[float | str, ...]:
    """Return the value of each row that a method reads; empty for other methods."""
    if not _names_value(call):
        return ()
    value = call.arguments[0].value
    name = value.id if isinstance(value, ast.Name) else ""
    every = [getattr(row, "values") for row in rows]  # noqa: B009
    if not every or name not in every[0]:
        known = ", ".join(f"`{each}`" for each in (every[0] if every else ()))
        raise DirectionError(
            value, f"`{value.span.written}` is not a value of its rows", f"values are {known}"
        )
    targets = [own[name] for own in every]
    if not all(isinstance(target, int | float | str) for target in targets):
        raise DirectionError(
            value, f"`{name}` is not a number or word in every row", "name another value"
        )
    if any(isinstance(target, str) for target in targets):
        return tuple(map(str, targets))
    return tuple(map(float, targets))


def resolve_definition(
    name: str,
    what: str,
    resolve: Callable[[spec.Basis, ExperimentContext], TrainedT | None],
    work: ExperimentContext,
) -> TrainedT | None:
    """Resolve a lens or a probe by its name, and report the DirectionError of `resolve`.

    None after an error, and if a required model or prompt set isn't available.
    """
    definition = work.program.bases.get(name)
    if definition is None:  # rejected
        return None
    try:
        return resolve(definition, work)
    except DirectionError as problem:
        diagnostic = BadBasis(
            span=problem.node.span, reason=problem.reason, hint=problem.hint, what=what
        )
        work.diagnostics.extend([] if diagnostic in work.diagnostics else [diagnostic])
        return None


def check_training(
    definition: spec.Basis, made: AnyTrained, rows: str, work: ExperimentContext
) -> str:
    """Report problems with the rows of a training, once, and return its description.

    Args:
        rows: As in `describe_training`.
    """
    assert made.training is not None
    problems = check_training_rows(definition, made.training, work.measuring, work.table)
    work.diagnostics.extend(problem for problem in problems if problem not in work.diagnostics)
    return describe_training(made, rows, work.program, work.measuring, work.table)


def resolve_one_sample(
    definition: spec.Basis, what: str, fewest: int, work: ExperimentContext
) -> tuple[FitSample, str] | None:
    """Return the rows of a definition that has one position, and their description; None after
    other errors, and if a model or a prompt set isn't available.

    Args:
        what: `lens`
        fewest: Smallest number of rows with the position.

    Raises:
        DirectionError: If it has several positions or too few rows.
    """
    rows = fit_rows_of_basis(definition, work.program)
    if rows is None:
        return None
    samples = resolve_samples(definition.method, rows, definition.at, work)
    if samples is None or work.model.shape.stands_in:
        return None
    if len(samples) != 1:
        assert definition.at is not None
        reason, hint = f"a {what} is trained at one position", "join them: `{A, B}`"
        raise DirectionError(definition.at, reason, hint)
    ((label, sample),) = samples.items()
    check_row_count(definition.method, (sample,), (rows,), label, fewest)
    return sample, f"{describe_rows(sample, rows)} at {label}"


def check_row_count(
    call: ast.Call,
    read: Sequence[FitSample],
    rows: Sequence[FitRows],
    label: str,
    fewest: int,
) -> None:
    """Check that enough rows have a position. Raises DirectionError.

    Args:
        read: The samples, one for each of `rows`.
        label: The position.
    """
    for sample, row in zip(read, rows, strict=True):
        there = count_used_rows(sample.cell)
        if there >= fewest:
            continue
        if len(sample.table) < fewest and not sample.table.stands_in:
            raise DirectionError(call, *explain_few_rows(sample.table, row.limit, fewest))
        many = "no row" if not there else f"{count_noun(there, 'row')} only"
        raise DirectionError(
            call,
            f"{many} of `{sample.table.name}` has `{label}`",
            f"at least {fewest} are needed: name a position that more rows have",
        )


def count_used_rows(cell: PositionCell) -> int:
    """Return the number of rows that have the position."""
    return sum(1 for row in cell.hits if any(row))


def _options(call: ast.Call, work: ExperimentContext) -> dict[str, Constant]:
    """Evaluate the numbers and words after the prompt sets.

    Raises:
        DirectionError: If an option is invalid.
    """
    options: dict[str, Constant] = {}
    method = fitted_method(call.name)
    for argument in call.arguments:
        if argument.name is None or argument.name in ("prompts", "limit"):
            continue
        value = argument.value
        plain = constant_value(value, work.program.parameters)
        if argument.name in method.words:
            plain = value.id if isinstance(value, ast.Name) else None
            plain = value.value if isinstance(value, ast.String) else plain
        try:
            problem = option_problem(method, argument.name, plain)
        except MethodError as mistake:
            raise DirectionError(value, str(mistake), mistake.hint) from mistake
        if problem is not None or plain is None:
            raise DirectionError(value, *(problem or ("it is not a value", "write a number")))
        options[argument.name] = plain
    return options


def _describe_fit(
    call: ast.Call,
    read: Sequence[FitSample],
    rows: Sequence[FitRows],
    options: dict[str, Constant],
) -> str:
    """Return the method's description of a fit, once it accepts the rows; add the default options.

    Raises DirectionError.
    """
    method = fitted_method(call.name)
    takes_value = method.takes == "value and block"
    value = call.arguments[0].value.span.written if takes_value else ""
    summaries = [
        RowSummary(describe_rows(sample, row), value, sample.classes if takes_value else ())
        for sample, row in zip(read, rows, strict=True)
    ]
    try:
        for name, default in option_defaults(method, summaries).items():
            options.setdefault(name, default)
        problem = sample_problem(method, summaries, options)
        if problem is not None:
            raise DirectionError(call, *problem)
        return description(method, summaries, options)
    except MethodError as mistake:
        raise DirectionError(call, str(mistake), mistake.hint) from mistake


def describe_rows(sample: FitSample, rows: FitRows) -> str:
    """Describe the rows of a fit: `40 rows of fruit (fewer)`."""
    used, every = count_used_rows(sample.cell), len(sample.table)
    count = count_noun(used, "row") if used == every else f"{used} of {count_noun(every, 'row')}"
    part = f".{rows.part}" if rows.part else ""
    run = "" if rows.run == "clean" else f" ({rows.run})"
    model = "" if rows.model is None else f" in {rows.model}"
    return f"{count} of {sample.table.name}{part}{run}{model}"


def resolve_unfitted_family(
    call: ast.Call, definition: spec.Direction, work: ExperimentContext
) -> DirectionFamily | None:
    """Resolve `unembedding("…", "…")` or `saved("…", "…")`.

    Raises:
        DirectionError: If an argument is invalid.
    """
    texts = [str(constant_value(a.value, work.program.parameters)) for a in call.arguments]
    if call.name == "saved":
        written, key = texts
        return _saved_family(call, definition, written, key, work)
    tokens = find_tokens(call, texts, work)
    words = " − ".join(f'"{text}"' for text in texts)
    vector = UnembeddingVector(tokens[0], tokens[1] if len(tokens) > 1 else None)
    member = DirectionMember(definition.name, vector, f"unembedding of {words}")
    return DirectionFamily(
        definition.name, (), {(): member}, work.model.shape.d_model, (definition.name,)
    )


def _saved_family(
    call: ast.Call, definition: spec.Direction, written: str, key: str, work: ExperimentContext
) -> DirectionFamily | None:
    """Resolve a vector from a file, whose header specifies the width; or one for each value that
    the definition's site sweeps, with the names that `save direction` writes."""
    path, problems = path_to_read(SAVED_PATH, written, call.span)
    work.diagnostics.extend(p for p in problems if p not in work.diagnostics)
    if path is None:
        return None
    try:
        saved = inspect_safetensors(path, written, limits.DIRECTION_FILE, "save it separately")
    except UnreadableFile as problem:
        raise DirectionError(call, problem.reason, problem.hint) from None
    shapes = saved.shapes
    axes = () if key in shapes else _swept(definition, work)
    if axes is None:
        return None
    members: dict[AxisIndices, DirectionMember] = {}
    widths: dict[int, str] = {}
    for index in list_axis_indices(axes):
        name = name_tensor_of_member(key, axes, index)
        parts = name_edit_tensors(name)
        if name not in shapes and parts[0] in shapes:
            widths[_edit_width(call, shapes, name)] = parts[0]
            made = f"edit `{name}` of {written}, SHA-256 {saved.digest[:12]}…"
            vector = SavedEdit(path, name, saved.digest)
            members[index] = DirectionMember(
                name_member(definition.name, axes, index), vector, made
            )
            continue
        if name not in shapes:
            known = f"it has {name_list(list(shapes)) or 'none'}"
            if not axes and any(shape.startswith(f"{key}.layer") for shape in shapes):
                known += "; `at resid_post layer *` reads one vector for each layer"
            raise DirectionError(call, f"`{written}` has no `{name}`", known)
        if len(shapes[name]) != 1:
            reason = f"`{name}` has the shape {list(shapes[name])}, not [width]"
            raise DirectionError(call, reason, "save each vector under a separate name")
        widths[shapes[name][0]] = name
        made = f"`{name}` of {written}, SHA-256 {saved.digest[:12]}…"
        vector = SavedVector(path, name, saved.digest)
        members[index] = DirectionMember(name_member(definition.name, axes, index), vector, made)
    if len(widths) > 1:
        (width, name), (other, second) = list(widths.items())[:2]
        reason = f"`{name}` has {width} numbers, `{second}` {other}"
        raise DirectionError(call, reason, "name vectors of equal width")
    return DirectionFamily(definition.name, axes, members, next(iter(widths)), (definition.name,))


def _edit_width(call: ast.Call, shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """Return the width of the vectors that a saved edit changes. Raises DirectionError."""
    reads, writes, offset = (shapes.get(part, ()) for part in name_edit_tensors(name))
    if len(reads) == 2 and writes == reads and offset == reads[1:]:
        return reads[1]
    listed = ", ".join(f"`{part}` {list(shapes.get(part, ()))}" for part in name_edit_tensors(name))
    raise DirectionError(
        call,
        f"an edit has two matrices [rank, width] and a vector [width], and the file has {listed}",
        'save the edit again: `save direction r to "edit.safetensors"`',
    )


def _swept(definition: spec.Direction, work: ExperimentContext) -> tuple[Axis, ...] | None:
    """Return the axes that a definition's site sweeps, if it has one; None after an error."""
    if definition.site is None:
        return ()
    sites, axes = resolve_site(definition.site, work.sites.of_definitions())
    return None if sites is None else axes


def name_tensor_of_member(name: str, axes: Sequence[Axis], key: AxisIndices) -> str:
    """Return the name of a family's member in a file: `refusal.layer3.position0`."""
    said = [name]
    for axis, index in zip(axes, key, strict=True):
        said.append(f"{axis.name}{index if axis.name == 'position' else axis.labels[index]}")
    return ".".join(said)


def find_tokens(call: ast.Call, texts: Sequence[str], work: ExperimentContext) -> tuple[int, ...]:
    """Return the token of each text. Raises DirectionError for a text of several tokens."""
    return tuple(_token(call, text, work) for text in texts)


def _token(call: ast.Call, text: str, work: ExperimentContext) -> int:
    ids = work.model.tokenizer.encode(text, add_special=False).ids
    if len(ids) != 1:
        raise DirectionError(
            call,
            f'"{text}" is {len(ids)} tokens, each with a separate row in the unembedding',
            "name texts of one token; a leading space is part of most words",
        )
    return ids[0]


def find_best_member(
    node: ast.Index, picked: ast.RankedSelection, family: DirectionFamily, work: ExperimentContext
) -> AxisIndices | None:
    """Find the member whose cell has the largest mean (signed) of the experiment's first measure.

    Returns:
        The key of the member, the first member if the experiment hasn't run. None after E0620, and
        if the experiment was rejected.
    """
    try:
        finding, _ = work.sites.onward.finding(picked, work.program.parameters)
        if finding is None:
            return None
        scored = [_best_of_variant(part, family, picked) for part in finding.parts]
    except PickError as refusal:
        text = node.span.written
        work.diagnostics.append(
            BadPick(span=node.span, text=text, reason=refusal.reason, hint=refusal.hint)
        )
        return None
    work.sites.onward.used_sites(picked, finding)
    best = max(scored, key=lambda each: each[0])
    _note_pick(node, finding, family, best, work)
    return best[1]


def _best_of_variant(
    part: VariantFinding, family: DirectionFamily, picked: ast.RankedSelection
) -> tuple[float, AxisIndices]:
    """Return the mean and the member of the best cell."""
    experiment = part.experiment
    axes = _family_axes(experiment, family)
    if part.means is None:
        return -1.0, (0,) * len(family.axes)
    import numpy as np

    means = np.where(np.isfinite(part.means), part.means, -np.inf)
    if not isfinite(float(means.max())):
        raise PickError(f"`{picked.of}` has no cell with a value", "check its measure")
    cell, place = max(part.grid(), key=lambda each: means[each[0]])
    key: list[int] = []
    for axis, own in zip(axes, family.axes, strict=True):
        label = experiment.axes[axis].labels[int(place[axis])]
        key.append(_index_label(own.labels, label, picked, family))
    return float(means[cell]), tuple(key)


def _family_axes(experiment: ResolvedExperiment, family: DirectionFamily) -> Sequence[int]:
    """Return the indices of the family's axes among the experiment's axes."""
    name = experiment.name
    using = [
        rule.direction
        for rule in experiment.rules
        if rule.direction is not None and set(family.definitions) & set(rule.direction.families)
    ]
    names = [axis.name for axis in experiment.axes]
    swept = {axis for direction in using for axis in direction.axes}
    missing = [axis.name for axis in family.axes if axis.name not in swept]
    if not using or missing:
        what = f"`{name}` doesn't sweep `{family.name}`"
        if using:
            what = f"`{name}` doesn't sweep every `{missing[0]}` of `{family.name}`"
        raise PickError(what, f"let a rule of `{name}` name the whole family: `{family.name}`")
    if experiment.measures and experiment.measures[0].kind == "category":
        raise PickError(
            f"the first measure of `{name}` is a category, which has no order",
            f"let `{name}` measure a number first",
        )
    return [names.index(axis.name) for axis in family.axes]


def _index_label(
    labels: Sequence[AxisLabel],
    label: AxisLabel,
    picked: ast.RankedSelection,
    family: DirectionFamily,
) -> int:
    if label not in labels:
        raise PickError(
            f"`{picked.of}` found `{label}`, which `{family.name}` doesn't have",
            "sweep the same values in both",
        )
    return labels.index(label)


def _note_pick(
    node: ast.Index,
    finding: Finding,
    family: DirectionFamily,
    best: tuple[float, AxisIndices],
    work: ExperimentContext,
) -> None:
    picks: dict[str, str] = work.sites.onward.picks
    value, key = best
    text = node.span.written
    if finding.stands_in:
        picks[text] = (
            f"known only after `{finding.name}` has run; the first member is a placeholder"
        )
        return
    picks[text] = f"{family.members[key].name} ({value:.3g}); by mean {finding.measure}, signed"


def resolve_direction(
    rule: spec.Rule, sites: SiteTargets, positions: PositionTargets, work: ExperimentContext
) -> DirectionTargets | None:
    """Resolve a rule's direction in every cell.

    Axes of the family that the rule doesn't sweep become axes of the experiment.

    Returns:
        The directions; None after E0341 or E0620, and if a required fact isn't available.
    """
    assert rule.direction is not None
    try:
        _check_loops(rule, work)
        family = _family(rule.direction, work, None)
        if family is None:
            return None
        _check_use(rule, family)
        _fits(rule.direction, family, sites, work)
        return _lay_out(rule.direction, family, (*sites.axes, *positions.axes), work)
    except DirectionError as problem:
        report_direction(problem, work)
        return None


def _check_loops(rule: spec.Rule, work: ExperimentContext) -> None:
    """Check that a rule is in the `for` whose variable it names. Raises DirectionError."""
    outside = set(work.loops) - set(rule.loops) - set(work.program.directions)
    for name in direction_names(rule.direction, outside):
        assert rule.direction is not None
        reason = f"`{name}` is the variable of a `for` that doesn't contain this rule"
        raise DirectionError(rule.direction, reason, f"move the rule into `for {name} in …`")


def _check_use(rule: spec.Rule, family: DirectionFamily) -> None:
    """Check that trained scales multiply activations, and that edits are added. Raises
    DirectionError."""
    assert rule.direction is not None
    use = find_use(family)
    if use is None or rule.verb == use.verb:
        return
    raise DirectionError(
        rule.direction,
        f"it {use.what}, and `{rule.verb}` takes a direction",
        use.hint(rule.direction.span.written),
    )


def find_use(family: DirectionFamily) -> DirectionUse | None:
    """Return the only use of a family whose members aren't directions; None for directions."""
    uses = (USES.get(find_vector_role(member.vector)) for member in family.members.values())
    return next((use for use in uses if use is not None), None)


def report_direction(problem: DirectionError, work: ExperimentContext) -> None:
    """Report E0341."""
    span = problem.node.span
    work.diagnostics.append(
        BadDirection(span=span, text=span.written, reason=problem.reason, hint=problem.hint)
    )


def resolve_family(node: ast.Expr, work: ExperimentContext) -> DirectionFamily | None:
    """Resolve an expression of named directions, such as `d[layer 3]`; None after an error.

    Raises:
        DirectionError: If it isn't valid.
    """
    return _family(node, work, None)


def _fits(
    node: ast.Expr, family: DirectionFamily, sites: SiteTargets, work: ExperimentContext
) -> None:
    """Check that the direction has the width of the vectors that it is added to."""
    shape = work.model.shape
    for point in {
        (p.site, p.layer): p for points in sites.points.values() for p in points
    }.values():
        if SITES[point.site].width in ("key", "one"):
            raise DirectionError(
                node, f"`{point.site}` has no vectors with directions",
                "name a site of vectors, such as `resid_post layer 2`",
            )  # fmt: skip
        there = vector_width(shape, point.site, point.layer)
        if family.width is not None and there != family.width and not shape.stands_in:
            raise DirectionError(
                node, f"its width is {family.width}, but vectors of `{point.site}` have {there}",
                "use it at a site of the same width as the one it was computed at",
            )  # fmt: skip


def _lay_out(
    node: ast.Expr, family: DirectionFamily, swept: Sequence[str], work: ExperimentContext
) -> DirectionTargets:
    names: list[str] = []
    columns: list[list[int]] = []
    for axis in family.axes:
        names.append(axis.name)
        if axis.name == SEED_AXIS and not work.add_seed_axis(
            tuple(map(int, axis.labels)), node.span
        ):
            raise DirectionError(node, SEEDS_DIFFER, SEEDS_HINT)
        there = work.axes.get(axis.name)
        if axis.name in work.loops or there is None or axis.name not in swept:
            if axis.name not in work.loops and work.family_axes.get(axis.name) != axis.labels:
                work.family_axes[axis.name] = axis.labels
                work.add_axis(Axis(axis.name, axis.labels, node.span))
            columns.append(list(range(len(axis))))
            continue
        columns.append([_shared(node, family, axis, label) for label in there.labels])
    members: dict[AxisIndices, DirectionMember] = {}
    for key in _keys(columns):
        members[key] = family.members[
            tuple(column[i] for column, i in zip(columns, key, strict=True))
        ]
    return DirectionTargets(tuple(names), members, family.definitions)


def _keys(columns: Sequence[Sequence[int]]) -> list[AxisIndices]:
    from itertools import product

    return list(product(*(range(len(column)) for column in columns)))


def _shared(node: ast.Expr, family: DirectionFamily, axis: Axis, label: AxisLabel) -> int:
    if label in axis.labels:
        return axis.labels.index(label)
    word = "token" if axis.name == "position" else axis.name
    example = f"{node.span.written}[{word} {axis.labels[0]}]"
    raise DirectionError(
        node,
        f"the rule sweeps `{axis.name}` too, and `{family.name}` has none for `{label}`",
        f"sweep the same values, or name a member: `{example}`",
    )


# --- expressions ----------------------------------------------------------------------------------


def _family(
    node: ast.Expr, work: ExperimentContext, within: spec.Direction | None
) -> DirectionFamily | None:
    """Resolve an expression in a rule, or in the definition `within`."""
    match node:
        case ast.Name(id=name):
            return resolve_named_family(name, node, work)
        case ast.Index(name=name, index=ast.RankedSelection() as picked):
            family = resolve_named_family(name, node, work)
            key = None if family is None else find_best_member(node, picked, family, work)
            return None if family is None or key is None else _member(family, key)
        case ast.Index(name=name, index=index):
            family = resolve_named_family(name, node, work)
            return None if family is None else _select_members(node, family, index, work)
        case ast.Call(name="unit", arguments=(argument,)):
            part = _family(_expression(argument.value), work, within)
            return part and combine_families(node, [part], lambda own: UnitVector(own[0]))
        case ast.Call() if read_probe_name(node) is not None and within is not None:
            return _resolve_probe_family(node, within, work)
        case ast.Call(name=name) if name in DIRECTION_METHODS and within is not None:
            if DIRECTION_METHODS[name].takes == "training":
                return _resolve_trained_family(node, within, work)
            if DIRECTION_METHODS[name].at_a_site:
                return resolve_fitted_family(node, within, work)
            return resolve_unfitted_family(node, within, work)
        case ast.Negative() | ast.Binary():
            return _arithmetic(node, work, within)
        case ast.Number(value=value):
            hint = f"write a direction, as in `{value} * d`; `set SITE to {value}` takes a number"
            raise DirectionError(node, "a number isn't a direction", hint)
        case _:
            raise DirectionError(
                node,
                "it is defined here and has no name",
                f"give it a name: `direction d = {node.span.written} at …`",
            )


def _expression(node: ast.Node) -> ast.Expr:
    return node  # pyright: ignore[reportReturnType]


def resolve_named_family(
    name: str, node: ast.Expr, work: ExperimentContext
) -> DirectionFamily | None:
    """Resolve a definition, once per experiment; None after an error."""
    if name not in work.families:
        definition = work.program.directions.get(name)
        work.families[name] = None
        if definition is not None:
            family = _family(definition.value, work, definition)
            work.families[name] = family and _called(name, family)
        elif name in work.loops:
            work.families[name] = _resolve_looped_family(name, node, work)
    return work.families[name]


def _resolve_looped_family(
    name: str, node: ast.Expr, work: ExperimentContext
) -> DirectionFamily | None:
    """Resolve the variable of a `for` over directions: a family with an axis of its values. None
    after an error.

    Raises:
        DirectionError: If the directions can't be used in one rule.
    """
    labels = work.loops[name]
    parts: list[DirectionFamily] = []
    for label in map(str, labels):
        if label in work.program.failed:
            return None
        if label not in work.program.directions:
            hint = "let the `for` loop over directions only"
            hint = did_you_mean(label, work.program.directions, hint)
            raise DirectionError(node, f"`{name}` is also `{label}`, which isn't a direction", hint)
        count = count_prompt_tokens(label, work.program.directions, work.program.parameters)
        if count is not None:
            hint = f"write a rule with `{label}` itself"
            raise DirectionError(node, f"`{label}` has a vector for each token", hint)
        part = resolve_named_family(label, node, work)
        if part is None:
            return None
        parts.append(part)
    first = parts[0]
    for part in parts[1:]:
        problem = _compare_families(first, part)
        if problem is not None:
            raise DirectionError(node, *problem)
    axis = Axis(name, labels, node.span)
    members = {
        (number, *key): member
        for number, part in enumerate(parts)
        for key, member in part.members.items()
    }
    definitions = dict.fromkeys(definition for part in parts for definition in part.definitions)
    return DirectionFamily(name, (axis, *first.axes), members, first.width, tuple(definitions))


def _compare_families(first: DirectionFamily, other: DirectionFamily) -> tuple[str, str] | None:
    """Return why one rule can't use both families, and what to write; None if it can."""
    names = f"`{first.name}` and `{other.name}`"
    if find_use(first) is not find_use(other):
        named = [part.name for part in (first, other) if find_use(part) is not None]
        return (
            f"`{named[0]}` isn't used like the others of the `for`",
            "write an experiment for each",
        )
    own, others = ({axis.name: axis.labels for axis in part.axes} for part in (first, other))
    if own == others:
        return (
            None
            if first.width == other.width
            else (
                f"{names} have {first.width} and {other.width} numbers",
                "combine directions of sites of equal width",
            )
        )
    if own.get(SEED_AXIS) != others.get(SEED_AXIS):
        return f"{names} have different seeds", SEEDS_HINT
    swept = next(n for n in (*own, *others) if own.get(n) != others.get(n))
    return f"{names} sweep different values of `{swept}`", "sweep the same values in both"


def _called(name: str, family: DirectionFamily) -> DirectionFamily:
    """Rename a family to the name of its definition."""
    from dataclasses import replace

    members = {
        key: replace(member, name=_name_vector(name, family.axes, key, member.vector))
        for key, member in family.members.items()
    }
    definitions = tuple(dict.fromkeys((name, *family.definitions)))
    return DirectionFamily(name, family.axes, members, family.width, definitions)


def _arithmetic(
    node: ast.Binary | ast.Negative, work: ExperimentContext, within: spec.Direction | None
) -> DirectionFamily | None:
    parts: list[DirectionFamily] = []
    weights: list[float] = []

    def add(part: ast.Expr, weight: float) -> bool:
        match part:
            case ast.Negative(operand=operand):
                return add(operand, -weight)
            case ast.Binary(operator="+", left=left, right=right):
                return add(left, weight) and add(right, weight)
            case ast.Binary(operator="-", left=left, right=right):
                return add(left, weight) and add(right, -weight)
            case ast.Binary(operator="*", left=left, right=right):
                first = _number(left, work)
                second = _number(right, work) if first is None else None
                if first is not None:
                    return add(right, weight * first)
                if second is not None:
                    return add(left, weight * second)
            case ast.Binary(operator="/", left=left, right=right):
                number = _number(right, work)
                if number:
                    return add(left, weight / number)
                raise DirectionError(right, "it is divided by 0", "write another number")
            case _:
                family = _family(part, work, within)
                if family is None:
                    return False
                parts.append(family)
                weights.append(weight)
                return True
        reason = "directions are multiplied with numbers"
        raise DirectionError(
            part, reason, "write a `for` variable as a factor: `add c * (a - b) to …`"
        )

    if not add(node, 1.0):
        return None
    return combine_families(
        node, parts, lambda own: WeightedSum(tuple(zip(weights, own, strict=True)))
    )


def _number(node: ast.Expr, work: ExperimentContext) -> float | None:
    """Evaluate a number of the file; None if it isn't a number, or depends on a loop."""

    def value(part: ast.Node) -> object:
        return work.program.parameters[getattr(part, "id", "")]

    try:
        number = evaluate_arithmetic(node, value)
    except (KeyError, TypeError, ZeroDivisionError, ValueError):
        return None
    return float(number) if isinstance(number, int | float) else None


# --- members --------------------------------------------------------------------------------------


def _member(family: DirectionFamily, key: AxisIndices) -> DirectionFamily:
    return DirectionFamily(
        family.members[key].name, (), {(): family.members[key]}, family.width, family.definitions
    )


def _select_members(
    node: ast.Index, family: DirectionFamily, index: ast.Node, work: ExperimentContext
) -> DirectionFamily:
    """Select the members with some coordinates."""
    if not isinstance(index, ast.Coordinates):
        raise DirectionError(
            node,
            f"`{node.span.written}` contains no coordinates of `{family.name}`",
            f"write them by name: `{_example(family)}`",
        )
    wanted: dict[str, tuple[str | None, list[int]]] = {}
    for item in index.items:
        name = "position" if item.word == "token" else item.word
        axis = family.axis(name)
        if axis is None:
            has = name_list([a.name for a in family.axes]) or "none: it is one direction"
            raise DirectionError(
                item, f"`{family.name}` doesn't sweep `{name}`", f"its axes: {has}"
            )
        if name in wanted:
            raise DirectionError(item, f"`{item.word}` is named twice", "remove one of them")
        wanted[name] = _values(item, axis, work)
    axes: list[Axis] = []
    for axis in family.axes:
        loop = wanted[axis.name][0] if axis.name in wanted else None
        if axis.name not in wanted:
            axes.append(axis)
        elif loop is not None and all(a.name != loop for a in axes):
            axes.append(Axis(loop, work.loops[loop], index.span))
    names = [axis.name for axis in axes]
    members: dict[AxisIndices, DirectionMember] = {}
    for key in list_axis_indices(axes):
        numbers: list[int] = []
        for axis in family.axes:
            loop, values = wanted.get(axis.name, (axis.name, list(range(len(axis)))))
            numbers.append(values[0] if loop is None else values[key[names.index(loop)]])
        members[key] = family.members[tuple(numbers)]
    return DirectionFamily(
        node.span.written, tuple(axes), members, family.width, family.definitions
    )


def _values(
    coordinate: ast.Coordinate, axis: Axis, work: ExperimentContext
) -> tuple[str | None, list[int]]:
    """Return the loop that a coordinate follows, if any, and the indices along the axis."""
    value = coordinate.value
    if isinstance(value, str) and value in work.loops:
        return value, [_index_of(coordinate, axis, label) for label in work.loops[value]]
    if isinstance(value, str):
        known = work.program.parameters.get(value)
        if not is_integer(known):
            raise DirectionError(
                coordinate,
                f"`{value}` is neither a `for` variable around it nor a whole number of a `param`",
                f"write a number: `{coordinate.word} {axis.labels[0]}`",
            )
        value = known
    return None, [_index_of(coordinate, axis, value)]


def _index_of(coordinate: ast.Coordinate, axis: Axis, value: AxisLabel) -> int:
    labels = [str(label).removeprefix("token ") for label in axis.labels]
    if str(value) not in labels:
        raise DirectionError(
            coordinate,
            f"there is no `{coordinate.word} {value}` in it",
            f"it has {name_list(labels)}",
        )
    return labels.index(str(value))


def _example(family: DirectionFamily) -> str:
    said = [
        f"{'token' if axis.name == 'position' else axis.name} {axis.labels[0]}"
        for axis in family.axes
    ]
    return f"{family.name}[{', '.join(said)}]" if said else family.name


# --- directions of own layers ---------------------------------------------------------------------


OWN = "own"
"""The value of a coordinate that stands for the layer of the written vector."""


def expand_own_layers(
    experiment: spec.Experiment, sites: SiteContext
) -> tuple[spec.Experiment, list[Diagnostic]]:
    """Replace each rule that writes `d[layer own]` by a rule for each layer that it writes.

    All act in the same cells. Codes: E0341.
    """
    diagnostics: list[Diagnostic] = []

    def expand(rules: tuple[spec.Rule, ...]) -> tuple[spec.Rule, ...]:
        return tuple(each for rule in rules for each in _expand_rule(rule, sites, diagnostics))

    rules = expand(experiment.rules)
    derived = tuple(
        run.model_copy(update={"rules": expand(run.rules)}) for run in experiment.derived
    )
    if rules == experiment.rules and derived == experiment.derived:
        return experiment, diagnostics
    return experiment.model_copy(update={"rules": rules, "derived": derived}), diagnostics


def _expand_rule(
    rule: spec.Rule, sites: SiteContext, diagnostics: list[Diagnostic]
) -> Iterator[spec.Rule]:
    """Yield the rules that a rule stands for; itself if it names no own layers."""
    direction = rule.direction
    node = next((each for each in walk(direction) if _is_own(each)), None) if direction else None
    if direction is None or node is None:
        yield rule
        return
    axes = () if rule.site is None else rule.site.axes
    axis = next((each for each in axes if each.word == "layer"), None)
    if rule.site is None or axis is None or axis.window is not None:
        text = "the rule names no layers" if axis is None else "windows have several layers"
        hint = "name the layers that it writes: `resid_post layers *`"
        diagnostics.append(
            BadDirection(span=node.span, text=direction.span.written, reason=text, hint=hint)
        )
        return
    if not axis.plural:  # the axis of the rule is that of the family
        yield rule.model_copy(update={"direction": _without_layer(direction)})
        return
    silent = replace(sites, diagnostics=[])
    site_targets, _ = resolve_site(rule.site, silent)
    if site_targets is None or has_errors(silent.diagnostics):
        yield rule.model_copy(update={"direction": _without_layer(direction)})  # is reported there
        return
    layers = sorted(
        {point.layer or 0 for points in site_targets.points.values() for point in points}
    )
    for layer in layers:
        bound = ast.Bound(layer, span=axis.span)
        one = replace(axis, values=(ast.AxisRange(bound, span=axis.span),))
        site = replace(
            rule.site, axes=tuple(one if each is axis else each for each in rule.site.axes)
        )
        yield rule.model_copy(update={"site": site, "direction": _of_layer(direction, layer)})


def _is_own(node: ast.Node) -> bool:
    return isinstance(node, ast.Coordinate) and node.value == OWN and node.word == "layer"


def _of_layer(direction: ast.Expr, layer: int) -> ast.Expr:
    """Name the layer's direction."""

    def change(node: ast.Node) -> ast.Node:
        if isinstance(node, ast.Coordinate) and _is_own(node):
            return replace(node, value=layer)
        return node

    return rewrite(direction, change)


def _without_layer(direction: ast.Expr) -> ast.Expr:
    """Name the directions of all layers."""

    def change(node: ast.Node) -> ast.Node:
        if not isinstance(node, ast.Index) or not isinstance(node.index, ast.Coordinates):
            return node
        items = tuple(item for item in node.index.items if not _is_own(item))
        if items:
            return replace(node, index=replace(node.index, items=items))
        return ast.Name(node.name, span=node.span)

    return rewrite(direction, change)
