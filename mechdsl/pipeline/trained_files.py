"""What a file declares with `fit(…)`, and what its store has of it: keys and trained files.

A training is a folder of the store, `fits/KEY`, with a card `fit.json` and
the digests of all its files in `SHA256SUMS`: a dictionary in the layout
of SAELens, the directions of a rotation in `rotation.safetensors`, a vector or scales in
`vector.safetensors`, the maps of a lens in `lens.safetensors` or of a
probe in `probe.safetensors`, or the sites of a mask in
`mask.json`. The key is a digest of
everything that the weights depend on. Checkpoints of a training under way are in `fits/KEY.part`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechdsl.base import limits
from mechdsl.base.files import (
    SafetensorsFile,
    UnreadableFile,
    compute_digest,
    inspect_safetensors,
    is_intact,
)
from mechdsl.base.hashing import digest
from mechdsl.base.runtime import numeric_settings
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rules import NotTrained
from mechdsl.dictionaries.folder import DictionaryFile, read_cross_decoder, read_dictionary
from mechdsl.execute.run_record import NUMERIC_VERSION, TRAINING_VERSION, StoredTraining
from mechdsl.fits.reports import (
    CARD_FILE,
    LENS_FILE,
    MASK_FILE,
    PROBE_FILE,
    ROTATION_FILE,
    VECTOR_FILE,
    FitReport,
)
from mechdsl.models.folder import json_digest
from mechdsl.pipeline.identities import (
    VERSIONED_PACKAGES,
    CodeKeyError,
    ModelIdentities,
    RunKeyError,
    find_device,
)
from mechdsl.pipeline.options import RunOptions
from mechdsl.program.code_hashes import CodeHashError, hash_imported_code
from mechdsl.program.directions import last_token, name_nodes
from mechdsl.program.plugins import hash_extension_code
from mechdsl.program.prompts import texts_within
from mechdsl.program.python_functions import block_functions
from mechdsl.program.spec import Program
from mechdsl.program.trainers import ChoosingTrainer, OwnTrainer, RotationTrainer
from mechdsl.resolve.trainings import (
    ROTATION,
    MaskFile,
    key_of_candidate,
    list_tensor_shapes,
    name_probe_map,
    name_with_seed,
    paired_cells,
    read_texts,
)
from mechdsl.resolve.types import (
    BasisMember,
    CrossLayerFiles,
    PairedVectors,
    ProbeVector,
    RecordStream,
    ResolvedExperiment,
    TrainedDictionary,
    TrainedLens,
    TrainedMask,
    TrainedProbe,
    TrainedRotation,
    TrainedVector,
    Training,
    count_numbers,
    iter_leaf_vectors,
)
from mechdsl.results.results import package_version
from mechdsl.store.files import StoreProblem, take_lock
from mechdsl.store.store import FITS_FOLDER, Store

if TYPE_CHECKING:
    from mechdsl.forward.hooks.model import LoadedModel
    from mechdsl.planner.training_cost import TrainingCost
    from mechdsl.planner.value_keys import RunContents


@dataclass(frozen=True, eq=False)
class DeclaredFit:
    """A training of a file, with the first experiment that needs it."""

    basis: str
    """`f[layer 3]`, or the name of a lens, a probe or a group."""
    file: (
        TrainedDictionary
        | TrainedRotation
        | TrainedVector
        | TrainedMask
        | TrainedLens
        | TrainedProbe
    )
    experiment: ResolvedExperiment
    objective: ResolvedExperiment | None = None
    """What a rotation, vector or mask is trained on; None for others, and where only the name is
    needed."""

    @property
    def training(self) -> Training:
        assert self.file.training is not None
        return self.file.training

    @property
    def model(self) -> str:
        """Key of the loaded model that runs the rows, whose candidates may differ from those of the
        experiment."""
        rows = self.experiment if self.objective is None else self.objective
        return self.training.model or rows.model.key

    @property
    def waits(self) -> bool:
        """Whether the training needs a basis or a group that isn't trained yet."""
        basis = None if self.objective is None else self.objective.rules[0].basis
        trained = (TrainedDictionary, TrainedRotation, TrainedVector)
        used = (self.training.decoder,) if basis is None else basis.saved
        if any(isinstance(own, trained) and not own.is_trained for own in used):
            return True
        nodes = () if self.objective is None else self.objective.masks
        return any(not node.is_trained for node in nodes)


def find_fits(experiments: Iterable[ResolvedExperiment]) -> dict[str, DeclaredFit]:
    """Return the trainings that experiments need, by name."""
    fits: dict[str, DeclaredFit] = {}
    for experiment in experiments:
        bases = [basis for rule in experiment.every_rule for basis in rule.bases]
        bases += [save.basis for save in experiment.saves if save.basis is not None]
        for member in (basis_member for basis in bases for basis_member in basis.members):
            for declared in _trained_bases(member, experiment):
                fits.setdefault(declared.training.name, declared)
        for vector in _trained_vectors(experiment):
            declared = DeclaredFit(vector.name, vector, experiment)
            if isinstance(vector, ProbeVector):
                probe = vector.probe
                declared = DeclaredFit(name_with_seed(probe.training), probe, experiment)
            fits.setdefault(vector.training.name, declared)
        for rule in experiment.every_rule:
            read = rule.does.trained
            if read is not None:
                declared = DeclaredFit(name_with_seed(read.training), read, experiment)
                fits.setdefault(read.training.name, declared)
        for mask in experiment.masks:
            declared = DeclaredFit(name_with_seed(mask.training), mask, experiment)
            fits.setdefault(mask.training.name, declared)
    return fits


def _trained_bases(member: BasisMember, experiment: ResolvedExperiment) -> Iterator[DeclaredFit]:
    """Yield the training of a basis, after those of dictionaries whose decoders it reads."""
    operand = member.operand
    if not isinstance(operand, TrainedDictionary | TrainedRotation) or operand.training is None:
        return
    if isinstance(operand.training.source, BasisMember):
        yield from _trained_bases(operand.training.source, experiment)
    crosses = isinstance(operand, TrainedDictionary) and operand.crosses_layers
    yield DeclaredFit(
        name_with_seed(operand.training) if crosses else member.name, operand, experiment
    )


def _trained_vectors(experiment: ResolvedExperiment) -> Iterator[TrainedVector]:
    """Yield the trained vectors that rules, bases and saved directions of an experiment use."""
    rules = experiment.every_rule
    used = [rule.direction.members for rule in rules if rule.direction is not None]
    used += [file.members for file in experiment.direction_files]
    leaves = [
        leaf
        for direction_members in used
        for direction_member in direction_members.values()
        for leaf in iter_leaf_vectors(direction_member.vector)
    ]
    bases = [basis for rule in rules for basis in rule.bases]
    bases += [save.basis for save in experiment.saves if save.basis is not None]
    saved = (each for basis in bases for each in basis.saved)
    yield from (leaf for leaf in (*leaves, *saved) if isinstance(leaf, TrainedVector))


def fits_of_file(checked: CheckedFile, *, discovered: bool = False) -> dict[str, DeclaredFit]:
    """Return the trainings that the experiments of a file need, by name.

    Args:
        checked: The file.
        discovered: Whether to return only the trainings of circuits that experiments discover, and
            of the nodes of these circuits.
    """
    fits: dict[str, DeclaredFit] = {}
    for fit in find_fits([*checked.experiments, *checked.saving]).values():
        _add_fit(fit, checked, fits)
    if not discovered:
        return fits
    names = list_searched(checked.program)
    return {name: fit for name, fit in fits.items() if fit.training.definition in names}


def _add_fit(fit: DeclaredFit, checked: CheckedFile, fits: dict[str, DeclaredFit]) -> None:
    """Add a training with its objective, after the trainings that the objective needs, such as that
    of the dictionary whose features are nodes of a circuit."""
    training = fit.training
    if isinstance(fit.file, TrainedRotation | TrainedVector | TrainedMask):
        objective = checked.objectives[training.definition, fit.experiment.model.name]
        fit = replace(fit, objective=objective)
        for own in find_fits([objective]).values():
            if own.training.definition != training.definition:
                _add_fit(replace(own, experiment=fit.experiment), checked, fits)
    fits.setdefault(training.name, fit)


def list_searched(program: Program, more: Sequence[str] = ()) -> dict[str, str | None]:
    """Return what a run trains for `search` and `discover`, each with the name of the trained
    group whose members are its nodes.

    Args:
        more: Further groups and circuits.
    """
    searched: dict[str, str | None] = {}
    for name in (*program.discovered, *more):
        nodes = name_nodes(program.masks[name]) if name in program.masks else None
        searched[name] = None if nodes is None else nodes.id
    groups = [name for name in searched.values() if name is not None]
    return searched | dict.fromkeys(groups)


def list_training_costs(checked: CheckedFile) -> list[TrainingCost]:
    """Return the costs of the trainings of a file, those that the store has included."""
    from mechdsl.planner.training_cost import training_cost

    return [
        training_cost(fit.basis, fit.file, fit.objective, model.shape, model.tokenizer)
        for fit in fits_of_file(checked).values()
        for model in [fit.experiment.model]
    ]


def packages_of_fit(fit: DeclaredFit) -> tuple[str, ...]:
    """Return the packages whose version may change the weights of a training."""
    package = fit.training.trainer.package
    return (*VERSIONED_PACKAGES, package) if package else VERSIONED_PACKAGES


# --- keys -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FitKeys:
    """Keys of the trainings of one file."""

    checked: CheckedFile
    options: RunOptions
    loaded: Mapping[str, LoadedModel]
    """Models from Python, by name."""
    store: Store

    def of(self, fit: DeclaredFit) -> str:
        """Return the key of a training: SHA-256 of everything that its weights depend on.

        Raises:
            RunKeyError: The model can't be identified, or the device doesn't exist.
            OSError: A file can't be read.
        """
        training = fit.training
        name = training.model or fit.experiment.model.name
        told, contents = self._model(name)
        parts: dict[str, object] = {
            "version": [TRAINING_VERSION, NUMERIC_VERSION],
            "packages": [package_version(package) for package in packages_of_fit(fit)],
            "numbers": numeric_settings(),
            "code": self._code,
            "trainer": [training.trainer.name, _told(training.of_trainer)],
            "options": _told(training.options),
            "seed": training.seed,
            "sites": [[point.site, point.layer, point.unit] for point in training.points],
            "model": told,
            **self._rows(training, contents),
            "run": [self.options.dtype, self._device, self.options.execution.side],
        }
        if training.paired is not None:
            parts["values"] = [list(each) for each in training.paired.values]
            parts |= self._view(training.paired, name)
        if isinstance(training.trainer, OwnTrainer):
            parts["own code"] = _own_code(training.trainer)
        if training.stream is not None:
            parts["stream"] = self._stream(training, training.stream)
        if fit.objective is not None:
            from mechdsl.planner.training_cost import CHUNK_BYTES, count_edited_bytes

            parts["objective"] = _objective(fit.objective, training.minimises, contents)
            size = count_edited_bytes(fit.file, fit.objective, fit.objective.model.shape)
            if size > CHUNK_BYTES:
                parts["first rows"] = CHUNK_BYTES  # a training starts with the vectors of these
        if isinstance(fit.file, TrainedProbe):
            parts["targets"] = [list(training.sample.targets), fit.file.outputs]
        if isinstance(fit.file, TrainedMask):
            assert fit.objective is not None
            rule = fit.objective.rules[0]
            fill = rule.spec.fill
            parts["mask"] = [
                [key_of_candidate(candidate) for candidate in fit.file.candidates],
                None if fill is None else fill.span.written,
            ]
            if rule.circuit is not None and rule.circuit.features:
                nodes = rule.circuit.features.items()
                parts["nodes"] = [
                    [n, self._basis(feature_nodes.member, name)] for n, feature_nodes in nodes
                ]
            elif rule.basis is not None:
                parts["basis"] = self._basis(rule.basis.at(training.made), name)
        return json_digest(parts)

    def _basis(self, member: BasisMember, name: str) -> str:
        """Return the digest of a basis whose coordinates a mask chooses from, or whose features are
        nodes of its edges."""
        from mechdsl.planner.value_keys import OperandKeys

        told, contents = self._model(name)
        keys = OperandKeys(contents, digest(json_digest(told)))
        return keys.basis({None: member}).hex()

    def _rows(self, training: Training, contents: RunContents) -> dict[str, object]:
        """Return what identifies the vectors of a training, with the model and the tokens."""
        if training.decoder is not None:
            return {"decoder": training.decoder.digest}
        sample = training.sample
        content = contents.of(sample.run, sample.table).tolist()
        rows = zip(sample.table.row_keys, content, sample.cell.hits, strict=True)
        return {
            "rows": [[key, own, list(hits)] for key, own, hits in rows],
            "noise": self.checked.program.seed if sample.run.noise is not None else None,
        }

    def _view(self, paired: PairedVectors, name: str) -> dict[str, object]:
        """Return what identifies vectors of another run or of other tokens that those of a training
        are correlated with; nothing for those of the same tokens.

        Args:
            name: The model of the training's rows.
        """
        sample, point = paired.sample, paired.point
        if sample is None or point is None or paired.shape is None:
            return {}
        told, contents = self._model(sample.run.model or name)
        rows = zip(contents.of(sample.run, sample.table).tolist(), sample.cell.hits, strict=True)
        site = [paired.shape.side, point.site, point.layer, point.unit]
        return {"with": [told, site, [[own, list(hits)] for own, hits in rows]]}

    def _stream(self, training: Training, stream: RecordStream) -> list[object]:
        """Return what the rows of a training depend on that reads files in parts."""
        program = self.checked.program
        block = program.prompts[training.sample.table.name]
        definition = program.bases[training.definition]
        at = definition.at or last_token(definition.method)
        try:
            code = [repr(block_function.read_code()) for block_function in block_functions(block)]
        except CodeHashError as unknown:
            raise CodeKeyError(str(unknown)) from None
        texts = {*texts_within((block, at))}
        used = {
            name: repr(value)
            for name, value in program.parameters.items()
            if any(name in text for text in texts)
        }
        return [stream.count, stream.digest, stream.groups, repr(block), repr(at), code, used]

    # --- what the trainings of a file share

    @cached_property
    def _code(self) -> dict[str, str]:
        """The code of modules that extend the language, such as trainers and sites."""
        try:
            return hash_extension_code()
        except CodeHashError as unknown:
            raise CodeKeyError(str(unknown)) from None

    @cached_property
    def _device(self) -> str:
        device = find_device(self.store, self.options.device)
        if device is None:
            raise RunKeyError(f"there is no device `{self.options.device}`")
        return device

    @cached_property
    def _models(self) -> dict[str, tuple[dict[str, Any], RunContents]]:
        return {}

    def _model(self, name: str) -> tuple[dict[str, Any], RunContents]:
        """Return the identity of a model, and the contents of its rows."""
        if name not in self._models:
            from mechdsl.planner.value_keys import RunContents

            known = {**self.checked.built, **self.loaded}
            told = ModelIdentities(self.checked, known, self.store.file_hash).told(name)
            model = digest(json_digest(told))
            contents = RunContents({name: model}, name, self.checked.program.seed)
            self._models[name] = told, contents
        return self._models[name]


def _own_code(trainer: OwnTrainer) -> list[object]:
    """Return what identifies a trainer of a Python file: its file and what that imports. Raises
    CodeKeyError, OSError."""
    function = trainer.own.function
    try:
        return [function.digest, hash_imported_code([function.read_code()])]
    except CodeHashError as unknown:
        raise CodeKeyError(str(unknown)) from None


def _objective(
    objective: ResolvedExperiment, minimises: bool, contents: RunContents
) -> list[object]:
    """Return what the loss of a training depends on: rows and tokens of both runs, and
    the measure."""
    from mechdsl.planner.value_keys import measure_digest, measure_row_keys

    table, (measure,) = objective.table, objective.measures
    runs = table.runs[objective.spec.base], table.runs[objective.rules[0].run]
    cells = [cell for pair in paired_cells(objective) for cell in pair]
    measured = measure_row_keys(measure, runs[0], None, table, contents).tolist()
    texts = [contents.of(run, table).tolist() for run in runs]
    hits = [[list(own) for own in cell.hits] for cell in cells]
    rows = zip(table.row_keys, *texts, *hits, measured, strict=True)
    return [minimises, measure_digest(measure).hex(), [list(row) for row in rows]]


def _told(options: Mapping[str, Any]) -> dict[str, str]:
    left_out = ("measure_on_training_rows", "seed", "prompts", "limit")
    return {name: repr(value) for name, value in options.items() if name not in left_out}


# --- trained files --------------------------------------------------------------------------------


TrainedFile = DictionaryFile | CrossLayerFiles | SafetensorsFile | MaskFile


def read_fit(folder: Path, fit: DeclaredFit) -> tuple[TrainedFile, FitReport] | None:
    """Read a training with its report; None if the folder has no complete and undamaged one."""
    try:
        if not is_intact(folder):
            return None
        card = json.loads((folder / CARD_FILE).read_text("utf-8"))
        if fit.training.stream is not None:
            read_texts(folder)
        trainer = fit.training.trainer
        kind = trainer.report_on(fit.training.of_trainer, decoder=fit.training.decoder is not None)
        return _read_file(folder, fit, card), kind.read(card)
    except (OSError, ValueError, KeyError, TypeError, IndexError, UnreadableFile):
        return None


def _read_file(folder: Path, fit: DeclaredFit, card: Mapping[str, Any]) -> TrainedFile:
    """Read the result of a training. Raises OSError, KeyError, ValueError and UnreadableFile."""
    if isinstance(fit.file, TrainedDictionary) and fit.file.crosses_layers:
        return _read_cross_layer(folder, fit)
    if isinstance(fit.file, TrainedDictionary):
        return read_dictionary(folder, str(folder), transcodes=bool(card["transcodes"]))
    if isinstance(fit.file, TrainedMask):
        return _read_mask(folder, fit.file)
    if isinstance(fit.file, TrainedRotation):
        return _read_rotation(folder, fit)
    if isinstance(fit.file, TrainedLens):
        return _read_lens(folder, fit)
    if isinstance(fit.file, TrainedProbe):
        return _read_probe(folder, fit.file)
    return _read_vector(folder, fit)


def _read_cross_layer(folder: Path, fit: DeclaredFit) -> CrossLayerFiles:
    """Read the headers of a cross-layer transcoder. Raises UnreadableFile."""
    layers, written = fit.training.layers, str(folder)
    encoders = [read_dictionary(folder, written, transcodes=True, layer=n) for n in layers]
    decoders = [
        read_cross_decoder(file, layer, len(layers))
        for layer, file in zip(layers, encoders, strict=True)
    ]
    every = digest([encoder.digest for encoder in (*encoders, *decoders)])
    return CrossLayerFiles(tuple(encoders), every.hex())


def _read_rotation(folder: Path, fit: DeclaredFit) -> SafetensorsFile:
    """Read the header of a rotation. Raises UnreadableFile, and ValueError for another matrix."""
    path = folder / ROTATION_FILE
    file = inspect_safetensors(path, str(path), limits.DIRECTION_FILE, "train it again")
    assert isinstance(fit.file, TrainedRotation)
    width = count_numbers(fit.training.made, fit.experiment.model.shape)
    count, *shape = file.shapes.get(ROTATION, (0,))
    learned = fit.training.trainer_of(RotationTrainer).learns_size
    fits = 0 < count <= fit.file.size if learned else count == fit.file.size
    if shape != [width] or not fits:
        raise ValueError("the file is damaged")
    return file


def _read_vector(folder: Path, fit: DeclaredFit) -> SafetensorsFile:
    """Read the header of a vector. Raises UnreadableFile, and ValueError for another shape."""
    path = folder / VECTOR_FILE
    file = inspect_safetensors(path, str(path), limits.DIRECTION_FILE, "train it again")
    width = count_numbers(fit.training.made, fit.experiment.model.shape)
    if file.shapes != list_tensor_shapes(fit.training, width):
        raise ValueError("the file is damaged")
    return file


def _read_lens(folder: Path, fit: DeclaredFit) -> SafetensorsFile:
    """Read the header of a lens. Raises UnreadableFile, and ValueError for other maps."""
    path, width = folder / LENS_FILE, fit.experiment.model.shape.d_model
    file = inspect_safetensors(path, str(path), limits.LENS_FILE, "train it again")
    wanted = {
        f"layer.{layer}.{part}": size
        for layer in fit.training.layers
        for part, size in (("weight", (width, width)), ("bias", (width,)))
    }
    if dict(file.shapes) != wanted:
        raise ValueError("the file is damaged")
    return file


def _read_probe(folder: Path, probe: TrainedProbe) -> SafetensorsFile:
    """Read the header of a probe. Raises UnreadableFile, and ValueError for other maps."""
    path, outputs = folder / PROBE_FILE, probe.outputs
    file = inspect_safetensors(path, str(path), limits.DIRECTION_FILE, "train it again")
    wanted: dict[str, tuple[int, ...]] = {}
    for point, width in zip(probe.training.inputs, probe.widths, strict=True):
        for name in (name_probe_map(point), f"shuffled.{name_probe_map(point)}"):
            wanted |= {f"{name}.weight": (outputs, width), f"{name}.bias": (outputs,)}
    if dict(file.shapes) != wanted:
        raise ValueError("the file is damaged")
    return file


def _read_mask(folder: Path, mask: TrainedMask) -> MaskFile:
    """Read the sites that a mask chose. Raises OSError, KeyError, ValueError and IndexError."""
    path = folder / MASK_FILE
    content = json.loads(path.read_text("utf-8"))
    listed, candidates = content["sites"], mask.candidates
    size = mask.training.trainer_of(ChoosingTrainer).size(mask.training.of_trainer)
    if listed != [key_of_candidate(candidate) for candidate in candidates]:
        raise ValueError("the file is damaged")
    chosen = tuple(candidates[number] for number in content["chosen"])
    given = content["scores" if mask.is_scored else "probabilities"]
    scores = tuple(math.nan if own is None else float(own) for own in given)
    most = len(candidates) if size is None else size
    least = 1 if mask.is_scored else most
    if not least <= len(set(chosen)) <= most or len(scores) != len(candidates):
        raise ValueError("the file is damaged")
    return MaskFile(chosen, scores, compute_digest(path))


def describe_report(file: TrainedFile, report: FitReport) -> str:
    """Describe how well something was trained, for conventions."""
    held_out = f"{report.held_out_rows:,} of them" if report.held_out_rows else "none"
    return f"{held_out} held out, {report.describe()}; SHA-256 {file.digest[:12]}…"


def attach_fits(
    checked: CheckedFile,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel] | None = None,
) -> CheckedFile:
    """Check a file again with the trainings that its store has; a file without any stays as it is.

    Args:
        loaded: Models from Python, by name.
    """
    folder = options.store
    if folder is None or not (folder / FITS_FOLDER).is_dir():
        return checked
    trained: dict[str, tuple[TrainedFile, str]] = {}
    waiting = True
    while waiting:  # once more for masks over what was found
        fits = fits_of_file(checked)
        more = _read_fits(checked, fits, folder, options, loaded or {})
        if more.keys() <= trained.keys():
            break
        trained |= more
        checked = check_again(checked, replace(checked.settings, trained=trained), loaded)
        waiting = any(fit.waits for fit in fits.values())
    return checked


def _read_fits(
    checked: CheckedFile,
    fits: Mapping[str, DeclaredFit],
    folder: Path,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel],
) -> dict[str, tuple[TrainedFile, str]]:
    """Read the trainings that a store has, with descriptions of their results."""
    trained: dict[str, tuple[TrainedFile, str]] = {}
    with suppress(StoreProblem), Store(folder) as store:
        keys = FitKeys(checked, options, loaded, store)
        for name, fit in fits.items():
            with suppress(RunKeyError, OSError):
                known = None if fit.waits else read_fit(folder / FITS_FOLDER / keys.of(fit), fit)
                if known is not None:
                    trained[name] = known[0], describe_report(*known)
    return trained


def check_again(
    checked: CheckedFile, settings: CheckSettings, loaded: Mapping[str, LoadedModel] | None
) -> CheckedFile:
    """Check a file with other settings, on the same models."""
    if not loaded:
        return check_source(checked.source, settings)
    from mechdsl.loading.loader import build_model_contexts

    return check_source(checked.source, settings, build_model_contexts(checked.source, loaded))


def find_untrained(
    experiment: ResolvedExperiment,
    program: Program | None = None,
    *,
    has_store: bool,
    tried_all: bool = False,
) -> list[Diagnostic]:
    """Return E0642 for each basis of an experiment that isn't trained.

    A training that the run itself tried isn't reported if it needs another one that failed, or if
    a basis isn't trained that the run didn't try.

    Args:
        program: The file, if the run trains what its `search` and `discover` lines need.
        tried_all: Whether the run trained everything, with `--fit`.
    """
    missing = [fit for fit in find_fits([experiment]).values() if not fit.file.is_trained]
    tried: dict[str, str | None] = {}
    if has_store and program is not None:
        masks = [*program.masks] if tried_all else []
        tried = dict.fromkeys(fit.training.definition for fit in missing if tried_all)
        tried |= list_searched(program, masks)
    fits = [fit for fit in missing if fit.training.definition in tried]
    others = [fit for fit in missing if fit not in fits]
    if others:
        return [report_untrained(fit, has_store=has_store) for fit in others]
    failed = {fit.training.definition for fit in fits}
    causes = [fit for fit in fits if tried[fit.training.definition] not in failed]
    return [report_untrained(fit, has_store=True, was_tried=True) for fit in causes]


def list_untrained(checked: CheckedFile, options: RunOptions) -> list[Diagnostic] | None:
    """Return E0642 for all experiments of a file if none of them has what it needs; then the model
    isn't loaded. None otherwise."""
    every = [*checked.experiments, *checked.saving]
    given = {"has_store": options.store is not None, "tried_all": options.fits}
    problems = [find_untrained(experiment, checked.program, **given) for experiment in every]
    if not problems or not all(problems):
        return None
    return list(
        {
            (problem.code, problem.span): problem
            for diagnostics in problems
            for problem in diagnostics
        }.values()
    )


def report_untrained(fit: DeclaredFit, *, has_store: bool, was_tried: bool = False) -> Diagnostic:
    """Return E0642 for a training that the store doesn't have.

    Args:
        was_tried: Whether the run itself tried it, and failed.
    """
    source = fit.training.span.source
    file = source.name if source.path is not None else "FILE"
    hint = f"train it: `mechdsl fit {file}`, or train and run: `mechdsl run --fit {file}`"
    if not has_store:
        hint = "trainings are in the store: run with one, such as `--store FOLDER`"
    reason = " for these rows, options and model" if has_store else ": the run has no store"
    if was_tried:
        reason, hint = ": its training failed", "an error before this one reports the cause"
    return NotTrained(
        span=fit.training.span,
        basis=fit.basis,
        reason=reason,
        experiment=fit.experiment.name,
        hint=hint,
    )


_UNKNOWN = "unknown"


def list_trainings(store: Path) -> list[StoredTraining]:
    """Return the trainings of a store, the newest first; none for a folder that isn't a store."""
    return sorted(
        _trainings(store / FITS_FOLDER), key=lambda training: training.ended, reverse=True
    )


def _trainings(folder: Path) -> Iterator[StoredTraining]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir():
            continue
        files = [each for each in path.rglob("*") if each.is_file()]
        newest = max(file.stat().st_mtime for file in (path, *files))
        card = _read_card(path)
        yield StoredTraining(
            key=path.name.removesuffix(".part"),
            name=str(card.get("basis", _UNKNOWN)),
            trainer=str(card.get("trainer", _UNKNOWN)),
            file=str(card.get("file", _UNKNOWN)),
            model=str(card.get("model_name", _UNKNOWN)),
            prompts=str(card.get("prompts", _UNKNOWN)),
            finished=path.suffix != ".part",
            ended=datetime.fromtimestamp(newest, UTC).astimezone(),
            size=sum(file.stat().st_size for file in files),
            folder=path,
        )


def _read_card(folder: Path) -> dict[str, Any]:
    """Return the card of a training; empty if there is none that can be read."""
    try:
        card = json.loads((folder / CARD_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def remove_trainings(
    store: Path, keys: Sequence[str]
) -> tuple[list[StoredTraining], list[BadCommandLine]]:
    """Remove the trainings whose keys begin with these texts; all are found before one is removed.

    Returns:
        The removed ones, and E0208 for texts that no key or several keys begin with, and for a
        training that is running.

    Raises:
        OSError: A folder can't be removed.
    """
    every = list_trainings(store)
    trainings: dict[Path, StoredTraining] = {}
    for text in keys:
        begun = [training for training in every if training.key.startswith(text)]
        if len({training.key for training in begun}) != 1:
            many = "several trainings begin" if begun else "no training begins"
            hint = "`mechdsl runs trainings` lists them"
            return [], [BadCommandLine(reason=f"{many} with `{text}`", hint=hint)]
        trainings |= {training.folder: training for training in begun}
    removed: list[StoredTraining] = []
    for training in trainings.values():
        lock = take_lock(training.folder.with_name(f"{training.key}.lock"))
        if lock is None:
            reason = f"another process is training `{training.short_key}`"
            return removed, [BadCommandLine(reason=reason, hint="wait until it ends, or stop it")]
        shutil.rmtree(training.folder)
        lock.free(remove=True)
        removed.append(training)
    return removed, []
