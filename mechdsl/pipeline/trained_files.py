"""What a file declares with `fit(…)`, and what its store has of it: keys and trained files.

A training is a folder of the store, `fits/KEY`, with a card `fit.json`: a dictionary in the layout
of SAELens, the directions of a rotation in `rotation.safetensors`, a vector or scales in
`vector.safetensors`, the maps of a lens in `lens.safetensors` or of a
probe in `probe.safetensors`, or the sites of a mask in
`mask.json`. The key is a digest of
everything that the weights depend on. Checkpoints of a training under way are in `fits/KEY.part`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechdsl.base import limits
from mechdsl.base.hashing import digest
from mechdsl.base.runtime import numeric_settings
from mechdsl.base.safetensors_files import (
    SafetensorsFile,
    UnreadableFile,
    compute_digest,
    inspect_safetensors,
)
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rules import NotTrained
from mechdsl.dictionaries.folder import DictionaryFile, read_dictionary
from mechdsl.execute.run_record import (
    CARD_FILE,
    LENS_FILE,
    MASK_FILE,
    NUMERIC_VERSION,
    PROBE_FILE,
    ROTATION_FILE,
    TRAINING_VERSION,
    VECTOR_FILE,
    CircuitReport,
    CorrelationReport,
    DecoderReport,
    EditReport,
    IndependenceReport,
    LensReport,
    MaskReport,
    MixtureReport,
    ProbeReport,
    Report,
    RotationReport,
    ScaleReport,
    SoftPromptReport,
    TrainingReport,
    VectorReport,
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
from mechdsl.program.directions import last_token
from mechdsl.program.own_trainers import OwnTrainer
from mechdsl.program.plugins import hash_extension_code
from mechdsl.program.prompts import texts_within
from mechdsl.program.python_functions import block_functions
from mechdsl.program.trainers import (
    ChoosingTrainer,
    CircuitTrainer,
    DirectionTrainer,
    PairedTrainer,
    RotationTrainer,
    SolvedTrainer,
)
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
    BasisTargets,
    PairedVectors,
    RecordStream,
    ResolvedExperiment,
    SitePoint,
    TrainedDictionary,
    TrainedLens,
    TrainedMask,
    TrainedProbe,
    TrainedRotation,
    TrainedVector,
    Training,
    VectorRole,
    count_numbers,
    iter_leaf_vectors,
)
from mechdsl.results.results import package_version
from mechdsl.store.index import StoreProblem
from mechdsl.store.store import Store

if TYPE_CHECKING:
    from mechdsl.forward.hooks.model import LoadedModel
    from mechdsl.planner.training_cost import TrainingCost
    from mechdsl.planner.value_keys import RunContents

FITS_FOLDER = "fits"
"""Folder of trainings in a store."""


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
        """Key of the loaded model that runs the rows."""
        return self.training.model or self.experiment.model.key

    @property
    def waits(self) -> bool:
        """Whether it needs a basis that isn't trained yet."""
        basis = None if self.objective is None else self.objective.rules[0].basis
        trained = (TrainedDictionary, TrainedRotation, TrainedVector)
        used = (self.training.decoder,) if basis is None else basis.saved
        return any(isinstance(own, trained) and not own.is_trained for own in used)


def find_fits(experiments: Iterable[ResolvedExperiment]) -> dict[str, DeclaredFit]:
    """Return the trainings that experiments need, by name."""
    found: dict[str, DeclaredFit] = {}
    for experiment in experiments:
        bases = [rule.basis for rule in experiment.every_rule]
        bases += [save.basis for save in experiment.saves]
        for member in (each for own in bases if own is not None for each in own.members):
            for declared in _trained_bases(member, experiment):
                found.setdefault(declared.training.name, declared)
        for vector in _trained_vectors(experiment):
            declared = DeclaredFit(vector.name, vector, experiment)
            found.setdefault(vector.training.name, declared)
        for rule in experiment.every_rule:
            read = rule.does.trained
            if read is not None:
                declared = DeclaredFit(name_with_seed(read.training), read, experiment)
                found.setdefault(read.training.name, declared)
        for mask in experiment.masks:
            declared = DeclaredFit(name_with_seed(mask.training), mask, experiment)
            found.setdefault(mask.training.name, declared)
    return found


def _trained_bases(member: BasisMember, experiment: ResolvedExperiment) -> Iterator[DeclaredFit]:
    """Yield the training of a basis, after those of dictionaries whose decoders it reads."""
    own = member.operand
    if not isinstance(own, TrainedDictionary | TrainedRotation) or own.training is None:
        return
    if isinstance(own.training.source, BasisMember):
        yield from _trained_bases(own.training.source, experiment)
    yield DeclaredFit(member.name, own, experiment)


def _trained_vectors(experiment: ResolvedExperiment) -> Iterator[TrainedVector]:
    """Yield the trained vectors that rules, bases and saved directions of an experiment use."""
    rules = experiment.every_rule
    used = [own.direction.members for own in rules if own.direction is not None]
    used += [file.members for file in experiment.direction_files]
    leaves = [
        leaf for own in used for each in own.values() for leaf in iter_leaf_vectors(each.vector)
    ]
    bases = [own.basis for own in (*rules, *experiment.saves) if own.basis is not None]
    saved = (each for basis in bases for each in basis.saved)
    yield from (each for each in (*leaves, *saved) if isinstance(each, TrainedVector))


def fits_of_file(checked: CheckedFile) -> dict[str, DeclaredFit]:
    """Return the trainings that the experiments of a file need, by name."""
    found = find_fits([*checked.experiments, *checked.saving])
    for name, fit in found.items():
        if isinstance(fit.file, TrainedRotation | TrainedVector | TrainedMask):
            key = fit.training.definition, fit.experiment.model.name
            found[name] = replace(fit, objective=checked.objectives[key])
    return found


def list_training_costs(checked: CheckedFile) -> list[TrainingCost]:
    """Return the costs of the trainings of a file, those that the store has included."""
    from mechdsl.planner.training_cost import training_cost

    return [
        training_cost(fit.basis, fit.file, fit.objective, fit.experiment.model.shape)
        for fit in fits_of_file(checked).values()
    ]


def packages_of_fit(fit: DeclaredFit) -> tuple[str, ...]:
    """Return the packages whose version may change the weights of a training."""
    own = fit.training.trainer.package
    return (*VERSIONED_PACKAGES, own) if own else VERSIONED_PACKAGES


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
            "sites": [[each.site, each.layer, each.unit] for each in training.points],
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
                [key_of_candidate(each) for each in fit.file.candidates],
                None if fill is None else fill.span.written,
            ]
            if rule.basis is not None:
                parts["basis"] = self._basis(rule.basis, training.made, name)
        return json_digest(parts)

    def _basis(self, basis: BasisTargets, point: SitePoint, name: str) -> str:
        """Return the digest of the basis whose coordinates a mask chooses from."""
        from mechdsl.planner.value_keys import OperandKeys

        told, contents = self._model(name)
        keys = OperandKeys(contents, digest(json_digest(told)))
        return keys.basis({None: basis.at(point)}).hex()

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
            code = [repr(each.read_code()) for each in block_functions(block)]
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
        found = find_device(self.store, self.options.device)
        if found is None:
            raise RunKeyError(f"there is no device `{self.options.device}`")
        return found

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
    found = [contents.of(run, table).tolist() for run in runs]
    hits = [[list(own) for own in cell.hits] for cell in cells]
    rows = zip(table.row_keys, *found, *hits, measured, strict=True)
    return [minimises, measure_digest(measure).hex(), [list(own) for own in rows]]


def _told(options: Mapping[str, Any]) -> dict[str, str]:
    left_out = ("measure_on_training_rows", "seed", "prompts", "limit")
    return {name: repr(value) for name, value in options.items() if name not in left_out}


# --- trained files --------------------------------------------------------------------------------


REPORTS: Mapping[
    str, type[TrainingReport | IndependenceReport | CorrelationReport | MixtureReport]
] = {
    "features": TrainingReport,
    "independence": IndependenceReport,
    "correlation": CorrelationReport,
    "likelihood": MixtureReport,
}
"""Reports on dictionaries, by `measured` of their trainer."""

VECTOR_REPORTS: Mapping[VectorRole, type[VectorReport | ScaleReport | EditReport]] = {
    "direction": VectorReport,
    "scales": ScaleReport,
    "edit": EditReport,
}
"""Reports on trained vectors, by their use."""

TrainedFile = DictionaryFile | SafetensorsFile | MaskFile


def read_fit(folder: Path, fit: DeclaredFit) -> tuple[TrainedFile, Report] | None:
    """Read a training with its report; None if the folder has no complete one."""
    try:
        card = json.loads((folder / CARD_FILE).read_text("utf-8"))
        if fit.training.stream is not None:
            read_texts(folder)
        if isinstance(fit.file, TrainedRotation):
            return _read_rotation(folder, fit, card["sha256"]), RotationReport.read(card)
        if isinstance(fit.file, TrainedVector):
            trainer, options = fit.training.trainer_of(DirectionTrainer), fit.training.of_trainer
            kind = VECTOR_REPORTS[fit.file.role]
            kind = kind if trainer.count_tokens(options) is None else SoftPromptReport
            return _read_vector(folder, fit, card["sha256"]), kind.read(card)
        if isinstance(fit.file, TrainedLens):
            return _read_lens(folder, fit, card["sha256"]), LensReport.read(card)
        if isinstance(fit.file, TrainedProbe):
            return _read_probe(folder, fit.file, card["sha256"]), ProbeReport.read(card)
        if isinstance(fit.file, TrainedMask):
            of_circuit = isinstance(fit.training.trainer, CircuitTrainer)
            kind = CircuitReport if of_circuit else MaskReport
            return _read_mask(folder, fit.file, card["sha256"]), kind.read(card)
        transcodes = bool(card["transcodes"])
        file = read_dictionary(folder, str(folder), transcodes=transcodes)
        own = fit.training.trainer
        measured = own.measured if isinstance(own, SolvedTrainer | PairedTrainer) else "features"
        kind = DecoderReport if fit.training.decoder else REPORTS[measured]
        return file, kind.read(card)
    except (OSError, ValueError, KeyError, TypeError, IndexError, UnreadableFile):
        return None


def _read_rotation(folder: Path, fit: DeclaredFit, digest: str) -> SafetensorsFile:
    """Read the header of a rotation. Raises UnreadableFile, and ValueError for another matrix."""
    path = folder / ROTATION_FILE
    file = inspect_safetensors(path, str(path), limits.DIRECTION_FILE, "train it again")
    assert isinstance(fit.file, TrainedRotation)
    width = count_numbers(fit.training.made, fit.experiment.model.shape)
    count, *found = file.shapes.get(ROTATION, (0,))
    learned = fit.training.trainer_of(RotationTrainer).learns_size
    fits = 0 < count <= fit.file.size if learned else count == fit.file.size
    if file.digest != digest or found != [width] or not fits:
        raise ValueError("the file is damaged")
    return file


def _read_vector(folder: Path, fit: DeclaredFit, digest: str) -> SafetensorsFile:
    """Read the header of a vector. Raises UnreadableFile, and ValueError for another shape."""
    path = folder / VECTOR_FILE
    file = inspect_safetensors(path, str(path), limits.DIRECTION_FILE, "train it again")
    width = count_numbers(fit.training.made, fit.experiment.model.shape)
    if file.digest != digest or file.shapes != list_tensor_shapes(fit.training, width):
        raise ValueError("the file is damaged")
    return file


def _read_lens(folder: Path, fit: DeclaredFit, digest: str) -> SafetensorsFile:
    """Read the header of a lens. Raises UnreadableFile, and ValueError for other maps."""
    path, width = folder / LENS_FILE, fit.experiment.model.shape.d_model
    file = inspect_safetensors(path, str(path), limits.LENS_FILE, "train it again")
    wanted = {
        f"layer.{layer}.{part}": size
        for layer in fit.training.layers
        for part, size in (("weight", (width, width)), ("bias", (width,)))
    }
    if file.digest != digest or dict(file.shapes) != wanted:
        raise ValueError("the file is damaged")
    return file


def _read_probe(folder: Path, probe: TrainedProbe, digest: str) -> SafetensorsFile:
    """Read the header of a probe. Raises UnreadableFile, and ValueError for other maps."""
    path, outputs = folder / PROBE_FILE, probe.outputs
    file = inspect_safetensors(path, str(path), limits.DIRECTION_FILE, "train it again")
    wanted: dict[str, tuple[int, ...]] = {}
    for point, width in zip(probe.training.inputs, probe.widths, strict=True):
        for name in (name_probe_map(point), f"shuffled.{name_probe_map(point)}"):
            wanted |= {f"{name}.weight": (outputs, width), f"{name}.bias": (outputs,)}
    if file.digest != digest or dict(file.shapes) != wanted:
        raise ValueError("the file is damaged")
    return file


def _read_mask(folder: Path, mask: TrainedMask, digest: str) -> MaskFile:
    """Read the sites that a mask chose. Raises OSError, KeyError, ValueError and IndexError."""
    path = folder / MASK_FILE
    content = json.loads(path.read_text("utf-8"))
    listed, candidates = content["sites"], mask.candidates
    size = mask.training.trainer_of(ChoosingTrainer).size(mask.training.of_trainer)
    if compute_digest(path) != digest or listed != [key_of_candidate(own) for own in candidates]:
        raise ValueError("the file is damaged")
    chosen = tuple(candidates[number] for number in content["chosen"])
    is_circuit = isinstance(mask.training.trainer, CircuitTrainer)
    scores = tuple(map(float, content["scores" if is_circuit else "probabilities"]))
    most = len(candidates) if size is None else size
    least = 1 if is_circuit else most
    if not least <= len(set(chosen)) <= most or len(scores) != len(candidates):
        raise ValueError("the file is damaged")
    return MaskFile(chosen, scores, digest)


def describe_report(file: TrainedFile, report: Report) -> str:
    """Describe how well something was trained, for conventions."""
    held_out = f"{report.held_out_rows:,} of them" if report.held_out_rows else "none"
    return f"{held_out} held out, {_describe_result(file, report)}"


def _describe_result(file: TrainedFile, report: Report) -> str:
    if isinstance(report, MaskReport):
        return _describe_mask(file, report)
    if isinstance(report, CircuitReport):
        return _describe_circuit(file, report)
    if isinstance(report, LensReport):
        return _describe_lens(file, report)
    if isinstance(report, MixtureReport):
        return _describe_mixture(file, report)
    if isinstance(report, CorrelationReport):
        return _describe_correlations(file, report)
    if isinstance(report, ProbeReport):
        return _describe_probe(file, report)
    if not isinstance(report, TrainingReport | IndependenceReport):
        rows = "held-out rows" if report.held_out_rows else "training rows"
        values = _effects(report)
        listed = ", ".join(
            f"{name} {value:.4g}" for name, value in values.items() if value is not None
        )
        said = f"to {report.objective}; mean over {rows}: {listed}"
        if isinstance(report, VectorReport | SoftPromptReport | EditReport):
            adds = " of what it adds" if isinstance(report, EditReport) else ""
            length = "length" if isinstance(report, VectorReport) else f"mean length{adds}"
            said += f"; {length} {report.length:.4g}, vectors of the site {report.site_length:.4g}"
        if isinstance(report, ScaleReport):
            said += f"; scales from {report.smallest:.4g} to {report.largest:.4g}"
        return f"{said}; SHA-256 {file.digest[:12]}…"
    what = "held-out vectors" if report.held_out_vectors else "training vectors"
    text = f"explains {report.explained:.3f} of the variance of {what}"
    if isinstance(report, IndependenceReport):
        text += f", median excess kurtosis {report.kurtosis:.2f} (random rotation "
        text += f"{report.untrained_kurtosis:.2f})"
    else:
        text += f", {report.active:.1f} features active"
    if isinstance(report, DecoderReport):
        text += f"; of normal vectors with the same covariance {report.normal_explained:.3f}"
    return f"{text}, SHA-256 {file.digest[:12]}…"


def _describe_mixture(file: TrainedFile, report: MixtureReport) -> str:
    what = "held-out vectors" if report.held_out_vectors else "training vectors"
    return (
        f"mean log likelihood of {what} {report.log_likelihood:.2f} nats (one Gaussian "
        f"{report.single:.2f}, shuffled {report.shuffled:.2f}), SHA-256 {file.digest[:12]}…"
    )


def _describe_correlations(file: TrainedFile, report: CorrelationReport) -> str:
    what = "held-out vectors" if report.held_out_vectors else "training vectors"
    return (
        f"correlations on {what} {report.listed} (mean {report.mean:.3f}, after shuffled pairs "
        f"{report.shuffled:.3f}, random {report.untrained:.3f}, principal components "
        f"{report.components:.3f}), SHA-256 {file.digest[:12]}…"
    )


def _effects(
    report: RotationReport | VectorReport | SoftPromptReport | EditReport | ScaleReport,
) -> dict[str, float | None]:
    """Return the means of a measure after a training, by what was written."""
    if isinstance(report, RotationReport):
        return {
            "trained": report.trained,
            "random subspace": report.untrained,
            "no patch": report.unpatched,
            "whole vector": report.whole,
        }
    if isinstance(report, SoftPromptReport):
        return {
            "trained": report.trained,
            "random vectors of these lengths": report.random,
            "placeholders": report.placeholders,
            "untrained": report.untrained,
            "clean run": report.clean,
        }
    if isinstance(report, EditReport):
        return {
            "trained": report.trained,
            "in a random subspace": report.turned,
            "random edits of this length": report.random,
            "always the mean of what it adds": report.constant,
            "no edit": report.unedited,
        }
    if isinstance(report, ScaleReport):
        return {
            "trained": report.trained,
            "in a random order": report.shuffled,
            "mean scale for all channels": report.uniform,
            "scale 0": report.zero,
            "no scale": report.unscaled,
        }
    return {
        "trained": report.trained,
        "random vectors of this length": report.random,
        "no vector": report.unsteered,
        "mean difference at this length": report.difference,
    }


def _describe_lens(file: TrainedFile, report: LensReport) -> str:
    rows = "held-out vectors" if report.held_out_vectors else "training vectors"
    columns = zip(report.layers, report.untrained, report.trained, strict=True)
    listed = ", ".join(f"layer {n} {before:.4g} → {after:.4g}" for n, before, after in columns)
    return (
        f"mean KL in nats on {rows}, logit lens → trained: {listed}; average prediction "
        f"{report.average:.4g}; SHA-256 {file.digest[:12]}…"
    )


def _describe_probe(file: TrainedFile, report: ProbeReport) -> str:
    rows = "held-out rows" if report.held_out_rows else "training rows"
    values: dict[str, list[float | None]] = {"trained": report.trained}
    values |= {"shuffled values": report.shuffled}
    values |= {f"{report.draws} random directions": report.random}
    best = max(report.trained, key=lambda own: float("-inf") if own is None else own)
    number = report.trained.index(best)
    several = len(report.layers) > 1 and best is not None
    where = f" in layer {report.layers[number]}, the best one" if several else ""
    listed = ", ".join(f"{name} {show_score(own[number])}" for name, own in values.items())
    return (
        f"{report.unit} on {rows}{where}: {listed}, always the same "
        f"{show_score(report.constant)}; SHA-256 {file.digest[:12]}…"
    )


def show_score(score: float | None) -> str:
    """Format a score of a probe; – for one that isn't defined."""
    return "–" if score is None else f"{score:.3f}"


def _describe_mask(file: TrainedFile, report: MaskReport) -> str:
    rows = "held-out rows" if report.held_out_rows else "training rows"
    values = {
        "all others written" if report.keeps else "trained": report.trained,
        f"{report.draws} random choices": report.random,
        "largest single effects": report.single,
        "no patch": report.unpatched,
        f"all {report.noun}s": report.whole,
    }
    listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
    said = f"to {report.objective}; mean over {rows}: {listed}"
    if report.inactive:
        said += f"; {report.inactive:,} further {report.noun}s change no training row"
    return (
        f"{said}; probabilities: {report.list_chosen()}; {report.undecided} of "
        f"{report.candidates} {report.noun}s undecided; SHA-256 {file.digest[:12]}…"
    )


def _describe_circuit(file: TrainedFile, report: CircuitReport) -> str:
    rows = "held-out rows" if report.held_out_rows else "training rows"
    values = {
        "all other edges written": report.trained,
        f"{report.draws} random circuits": report.random,
        "no edge written": report.unpatched,
        "all edges": report.whole,
    }
    listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return (
        f"to {report.objective}; {report.made}; mean over {rows}: {listed}; scores, on training "
        f"rows: {report.list_chosen()}; SHA-256 {file.digest[:12]}…"
    )


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
    found: dict[str, tuple[TrainedFile, str]] = {}
    waiting = True
    while waiting:  # once more for masks over what was found
        fits = fits_of_file(checked)
        more = _read_fits(checked, fits, folder, options, loaded or {})
        if more.keys() <= found.keys():
            break
        found |= more
        checked = check_again(checked, replace(checked.settings, trained=found), loaded)
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
    found: dict[str, tuple[TrainedFile, str]] = {}
    with suppress(StoreProblem), Store(folder) as store:
        keys = FitKeys(checked, options, loaded, store)
        for name, fit in fits.items():
            with suppress(RunKeyError, OSError):
                known = None if fit.waits else read_fit(folder / FITS_FOLDER / keys.of(fit), fit)
                if known is not None:
                    found[name] = known[0], describe_report(*known)
    return found


def check_again(
    checked: CheckedFile, settings: CheckSettings, loaded: Mapping[str, LoadedModel] | None
) -> CheckedFile:
    """Check a file with other settings, on the same models."""
    if not loaded:
        return check_source(checked.source, settings)
    from mechdsl.loading.loader import build_model_contexts

    return check_source(checked.source, settings, build_model_contexts(checked.source, loaded))


def find_untrained(experiment: ResolvedExperiment, *, has_store: bool) -> list[Diagnostic]:
    """Return E0642 for each basis of an experiment that isn't trained."""
    return [
        report_untrained(fit, has_store=has_store)
        for fit in find_fits([experiment]).values()
        if not fit.file.is_trained
    ]


def list_untrained(checked: CheckedFile, *, has_store: bool) -> list[Diagnostic] | None:
    """Return E0642 for all experiments of a file if none of them has what it needs; then the model
    isn't loaded. None otherwise."""
    every = [*checked.experiments, *checked.saving]
    found = [find_untrained(each, has_store=has_store) for each in every]
    if not found or not all(found):
        return None
    return list({(each.code, each.span): each for own in found for each in own}.values())


def report_untrained(fit: DeclaredFit, *, has_store: bool) -> Diagnostic:
    """Return E0642 for a training that the store doesn't have."""
    source = fit.training.span.source
    file = source.name if source.path is not None else "FILE"
    hint = f"train it: `mechdsl fit {file}`, or train and run: `mechdsl run --fit {file}`"
    if not has_store:
        hint = "trainings are in the store: run with one, such as `--store FOLDER`"
    return NotTrained(
        span=fit.training.span,
        basis=fit.basis,
        reason=" for these rows, options and model" if has_store else ": the run has no store",
        experiment=fit.experiment.name,
        hint=hint,
    )
