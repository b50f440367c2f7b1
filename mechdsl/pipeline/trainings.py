"""`mechdsl fit`: train what a file declares with `fit(…)`, and copy it to a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from errno import EEXIST
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechdsl.base.files import SEAL_FILE, seal_folder
from mechdsl.base.runtime import computation_settings, preserve_random_state
from mechdsl.checks.file_check import CheckedFile
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rules import OpposedSearch, TrainingFailed, UndecidedMask
from mechdsl.execute.run_record import TrainedFit, name_fits
from mechdsl.fits.processes import ONE_PROCESS_HINT, Processes, own_processes
from mechdsl.fits.reports import (
    CARD_FILE,
    CircuitReport,
    CorrelationReport,
    FitReport,
    IndependenceReport,
    MaskReport,
    MixtureReport,
    RotationReport,
    TrainingReport,
)
from mechdsl.pipeline.identities import RunKeyError
from mechdsl.pipeline.options import RunOptions
from mechdsl.pipeline.trained_files import (
    DeclaredFit,
    FitKeys,
    attach_fits,
    fits_of_file,
    packages_of_fit,
    read_fit,
)
from mechdsl.program.python_functions import PythonFailure
from mechdsl.program.trainers import (
    EdgeSearchTrainer,
    OwnTrainer,
    PairedTrainer,
    ProbeTrainer,
    ScoringTrainer,
    SolvedTrainer,
)
from mechdsl.resolve.sites import label_all_points, label_candidates, label_points
from mechdsl.resolve.trainings import UNTRAINED_FOLDER, name_without_seed, resolve_part
from mechdsl.resolve.types import (
    FitSample,
    TrainedDictionary,
    TrainedLens,
    TrainedMask,
    TrainedProbe,
    TrainedRotation,
    TrainedVector,
    Training,
    describe_rotation,
)
from mechdsl.results.results import NOT_INSTALLED, package_version
from mechdsl.store.files import StoreProblem, make_folder, sync_folder, take_lock
from mechdsl.store.store import FITS_FOLDER, Store

if TYPE_CHECKING:
    from mechdsl.execute.training import TrainingJob, VectorCache
    from mechdsl.forward.hooks.model import LoadedModel
    from mechdsl.models.shape import PaddingSide

SECONDS_BETWEEN_CHECKPOINTS = 30.0


UNSHARED_STORE = (
    "a process can't read the stored training that another one reads",
    "name a store that all processes share: `--store FOLDER`",
)
"""Reason and fix, where processes run on several machines."""

FitProgress = Callable[[str, int, int], None]
"""Called with the basis, and its finished and all steps."""


def train_file(
    checked: CheckedFile,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel] | None = None,
    *,
    on_progress: FitProgress | None = None,
    discovered: bool = False,
) -> tuple[list[TrainedFit], list[Diagnostic]]:
    """Train what a checked file declares and its store doesn't have.

    A training that fails doesn't affect others.

    Args:
        loaded: Models from Python, by name.
        discovered: Train only the circuits that experiments discover.

    Returns:
        What is trained, and diagnostics: E0643 and those of loading models.

    Raises:
        OSError: If the store can't be written.
        KeyboardInterrupt: After a checkpoint was written.
    """
    assert options.store is not None
    try:
        with Store(options.store) as store:
            if not store.writable:
                return [], [_store_problem(options.store, "is read-only")]
            known = loaded or {}
            return _train_missing(checked, options, known, store, on_progress, discovered)
    except StoreProblem as problem:
        return [], [_store_problem(options.store, f"can't be used: {problem}")]


def _store_problem(folder: Path, reason: str) -> Diagnostic:
    hint = "name another folder: `--store FOLDER`"
    return BadCommandLine(reason=f"the store `{folder}` {reason}", hint=hint)


def _train_missing(
    checked: CheckedFile,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel],
    store: Store,
    on_progress: FitProgress | None,
    discovered: bool,
) -> tuple[list[TrainedFit], list[Diagnostic]]:
    """Train what the store doesn't have, and after it masks over it. Raises StoreProblem,
    OSError."""
    done: list[TrainedFit] = []
    problems: list[Diagnostic] = []
    tried: set[str] = set()
    if discovered and any(fit.waits for fit in fits_of_file(checked, discovered=True).values()):
        checked = attach_fits(checked, options, loaded)  # the nodes may be features of a basis
    while True:
        declared = fits_of_file(checked, discovered=discovered)
        fits = {name: fit for name, fit in declared.items() if name not in tried}
        ready = {name: fit for name, fit in fits.items() if not fit.waits}
        if not ready:
            break
        trained, found = _train_ready(checked, ready.values(), options, loaded, store, on_progress)
        done += trained
        problems += found
        tried |= ready.keys()
        if len(ready) == len(fits):
            return done, problems
        checked = attach_fits(checked, options, loaded)
    if discovered:  # the run reports what isn't trained
        return done, problems
    hint = "see the other problem"
    reason = "a basis or group that it needs isn't trained"
    problems += [_failed(fit, reason, hint) for fit in fits.values()]
    return done, problems


def _train_ready(
    checked: CheckedFile,
    fits: Collection[DeclaredFit],
    options: RunOptions,
    loaded: Mapping[str, LoadedModel],
    store: Store,
    on_progress: FitProgress | None,
) -> tuple[list[TrainedFit], list[Diagnostic]]:
    """Train those of some trainings that the store doesn't have. Raises StoreProblem, OSError."""
    keys, processes = FitKeys(checked, options, loaded, store), own_processes()
    done: list[TrainedFit] = []
    due: list[tuple[DeclaredFit, Path]] = []
    problems: list[Diagnostic] = []
    for fit in fits:
        try:
            folder = store.folder / FITS_FOLDER / keys.of(fit)
        except RunKeyError as unknown:
            problems.append(_failed(fit, str(unknown), unknown.hint))
            continue
        known = None if options.fresh else read_fit(folder, fit)
        is_due = processes.agree(known is None)
        missing = (_missing_package(fit) or _undivided(fit, processes)) if is_due else None
        if missing is not None:
            problems.append(missing)
        elif is_due:
            due.append((fit, folder))
        elif known is not None:
            done.append(_finished(fit, folder, known[1], 0.0))
        else:
            problems.append(_failed(fit, *UNSHARED_STORE))
    if due:
        with computation_settings():
            trained, found = _train_due(checked, options, loaded, due, store, on_progress)
        done += trained
        problems += found
    return done, [*problems, *_undecided(done, fits), *_opposed(done, fits)]


def _opposed(done: Iterable[TrainedFit], fits: Iterable[DeclaredFit]) -> Iterator[Diagnostic]:
    """Yield W0739 for each search whose measure is better with every edge ablated."""
    spans = {fit.basis: fit for fit in fits}
    for fit in done:
        training, report = spans[fit.basis].training, fit.report
        is_search = isinstance(training.trainer, EdgeSearchTrainer)
        if not is_search or not isinstance(report, CircuitReport):
            continue
        if report.is_opposed(minimises=training.minimises):
            yield OpposedSearch(
                span=training.span,
                circuit=fit.basis,
                whole=f"{report.whole:.3g}",
                unpatched=f"{report.unpatched:.3g}",
                aim="smaller" if training.minimises else "larger",
                other="maximise" if training.minimises else "minimise",
            )


def _undecided(done: Iterable[TrainedFit], fits: Iterable[DeclaredFit]) -> Iterator[Diagnostic]:
    """Yield W0736 for each mask with undecided sites."""
    spans = {fit.basis: fit for fit in fits}
    for fit in done:
        report = fit.report
        if isinstance(report, MaskReport) and report.undecided:
            yield UndecidedMask(
                span=spans[fit.basis].training.span,
                group=fit.basis,
                undecided=report.undecided,
                sites=report.candidates,
                noun=report.noun,
                steps=max(2 * report.steps, 300),
            )


def _missing_package(fit: DeclaredFit) -> Diagnostic | None:
    """Return E0643 if a package that a training needs isn't installed."""
    package = fit.training.trainer.package
    if not package or package_version(package) != NOT_INSTALLED:
        return None
    reason = f"`{fit.training.trainer.name}` needs {package}, which isn't installed"
    return _failed(fit, reason, 'install it: `pip install "mechdsl[fits]"`')


def _undivided(fit: DeclaredFit, processes: Processes) -> Diagnostic | None:
    """Return E0643 if several processes can't train something together."""
    training, count = fit.training, processes.count
    if count == 1:
        return None
    trainer = training.trainer
    if isinstance(trainer, SolvedTrainer | PairedTrainer | ProbeTrainer):
        reason = f"`{trainer.name}` uses all vectors together, so {count} processes can't divide it"
        return _failed(fit, reason, ONE_PROCESS_HINT)
    if isinstance(trainer, ScoringTrainer):
        reason = f"`{trainer.name}` isn't trained in steps that {count} processes can divide"
        return _failed(fit, reason, ONE_PROCESS_HINT)
    indivisible, parts = trainer.check_parts(training.of_trainer), training.options["accumulate"]
    if indivisible is not None:
        reason = f"{count} processes can't divide a step: {indivisible[0]}"
        return _failed(fit, reason, ONE_PROCESS_HINT)
    if int(parts) >= count:
        return None
    has = "one batch" if parts == 1 else f"{parts} batches"
    reason = f"{count} processes divide the batches of a step, and its steps have {has}"
    return _failed(fit, reason, f"write `accumulate: {count}`")


def _train_due(
    checked: CheckedFile,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel],
    due: Iterable[tuple[DeclaredFit, Path]],
    store: Store,
    on_progress: FitProgress | None,
) -> tuple[list[TrainedFit], list[Diagnostic]]:
    import torch

    from mechdsl.execute.training import VectorCache

    with preserve_random_state():
        from mechdsl.loading.loader import add_tower_views, import_library

        import_library()
        from mechdsl.pipeline.loaded_models import load_needed_models

        models, problems = load_needed_models(checked, options, loaded, store.file_hash)
        if models is None:
            return [], problems
        due = list(due)
        objectives = (fit.objective for fit, _ in due)
        # Rows of a training may have other candidates than those of all experiments.
        add_tower_views([objective for objective in objectives if objective is not None], models)
        done: list[TrainedFit] = []
        cache = VectorCache()
        run = partial(_run_training, models=models, checked=checked, options=options, cache=cache)
        with torch.random.fork_rng(devices=[]):
            for fit, folder in _group_by_vectors(due):
                refused = _find_image_problem(fit, models)
                if refused is not None:
                    problems += [] if refused in problems else [refused]
                    continue
                found, problem = _train_one(fit, folder, partial(run, on_progress=on_progress))
                done += [] if found is None else [found]
                problems += [] if problem is None else [problem]
        return done, problems


def _find_image_problem(fit: DeclaredFit, models: Mapping[str, LoadedModel]) -> Diagnostic | None:
    """Return E0458 or E0413 if a training can't run on the images of its prompts."""
    from mechdsl.execute.image_vectors import find_image_problem, find_sample_problem

    if fit.objective is not None:
        return find_image_problem(fit.objective, models)
    if fit.training.decoder is not None:
        return None
    partner, paired = _partner_model(fit, models), fit.training.paired
    problem = find_sample_problem(models[fit.model], fit.training.sample)
    if problem is None and partner is not None and paired is not None and paired.sample is not None:
        return find_sample_problem(partner, paired.sample)
    return problem


def _group_by_vectors(
    due: Iterable[tuple[DeclaredFit, Path]],
) -> list[tuple[DeclaredFit, Path]]:
    """Return trainings on the vectors of the same rows and sites one after another."""
    groups: dict[object, list[tuple[DeclaredFit, Path]]] = {}
    for each in due:
        training = each[0].training
        rows = training.sample.table.name if training.decoder is None else None
        groups.setdefault((rows, training.points), []).append(each)
    return [each for group in groups.values() for each in group]


def _train_one(
    fit: DeclaredFit, folder: Path, run: Callable[[DeclaredFit, Path], FitReport]
) -> tuple[TrainedFit | None, Diagnostic | None]:
    """Train one of them; a result or a problem.

    Args:
        run: Trains it, and writes it to a folder.
    """
    part = folder.with_name(f"{folder.name}.part")
    make_folder(part)
    processes = own_processes()
    lock = take_lock(folder.with_name(f"{folder.name}.lock")) if processes.is_first else None
    if processes.agree(lock is None):
        hint = "wait until it ends; then the same command uses its result"
        return None, _failed(fit, "another process is training it", hint)
    began = time.monotonic()
    result = part / ("result" if processes.is_first else f"result {processes.number}")
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    try:
        report = run(fit, result)
    except Exception as error:
        problem = _explain_failure(fit, error)
        if problem is None:
            raise
        shutil.rmtree(part, ignore_errors=True)
        return None, problem
    finally:
        if lock is not None:
            lock.free(remove=True)
    if processes.is_first:
        shutil.rmtree(folder, ignore_errors=True)
        seal_folder(result)
        os.replace(result, folder)
        sync_folder(folder.parent)
    processes.agree(True)  # the others read the folder
    shutil.rmtree(part, ignore_errors=True)
    return _finished(fit, folder, report, time.monotonic() - began), None


def _explain_failure(fit: DeclaredFit, error: Exception) -> Diagnostic | None:
    """Return the diagnostic of an expected failure of a training; None for another exception."""
    from mechdsl.execute.mask_training import NoBasis, NoCircuit, TooFewCandidates
    from mechdsl.execute.probe_training import NoProbe
    from mechdsl.execute.run.saves import RowsRefused
    from mechdsl.execute.training import NoVectors
    from mechdsl.fits.factors import NotFactored
    from mechdsl.fits.training import Diverged, IndivisibleMemory
    from mechdsl.forward.hooks.backward_rules import AutogradFailed, RuleNotApplied

    if isinstance(error, RuleNotApplied):
        reason = f"its rules of gradients don't cover the model ({str(error)[:200]})"
        return _failed(fit, reason, "use `eap`, `eap_ig` or a search such as `acdc`")
    if isinstance(error, AutogradFailed):
        reason = f"autograd can't follow the model ({str(error)[:200]})"
        return _failed(fit, reason, "train on a model without in-place operations")
    if isinstance(error, PythonFailure):
        return error.diagnostic
    if isinstance(error, RowsRefused | NoBasis):
        return error.diagnostics[0]
    if isinstance(error, NoVectors):
        return _failed(fit, f"no row has `{error}`", "name a position that more rows have")
    if isinstance(error, Diverged):
        rate = float(fit.training.options["rate"])
        hint = f"lower the learning rate: `rate: {rate / 10:g}`"
        hint += ", or the penalty" if "penalty" in fit.training.of_trainer else ""
        return _failed(fit, str(error), hint)
    if isinstance(error, NotFactored | TooFewCandidates | NoCircuit | NoProbe | IndivisibleMemory):
        return _failed(fit, str(error), error.hint)
    return None


def _run_training(
    fit: DeclaredFit,
    result: Path,
    *,
    models: Mapping[str, LoadedModel],
    checked: CheckedFile,
    options: RunOptions,
    on_progress: FitProgress | None,
    cache: VectorCache,
) -> FitReport:
    """Train one of them, and write it to `result`, in the folder of checkpoints."""
    from mechdsl.execute.edit_training import train_rotation, train_scales, train_vector
    from mechdsl.execute.mask_training import (
        find_circuit,
        find_group,
        open_edges,
        open_rows,
        train_mask,
    )
    from mechdsl.execute.objective_rows import ObjectiveRows
    from mechdsl.execute.probe_training import train_probe
    from mechdsl.execute.training import TrainingJob

    last, model = time.monotonic(), models[fit.model]

    def is_due() -> bool:
        nonlocal last
        if time.monotonic() - last < SECONDS_BETWEEN_CHECKPOINTS:
            return False
        last = time.monotonic()
        return True

    def on_step(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(fit.basis, done, total)

    facts, side = _facts(fit, checked, model), options.execution.side
    job = TrainingJob(result, facts, result.parent, is_due, on_step)
    if isinstance(fit.file, TrainedMask):
        assert fit.objective is not None
        if fit.file.is_scored and fit.file.noun == "edge":
            edges = open_edges(fit.file, fit.objective, model, side, cache)
            return find_circuit(fit.file, edges, job)
        choose = find_group if fit.file.is_scored else train_mask
        return choose(fit.file, open_rows(fit.file, fit.objective, model, side, cache), job)
    if fit.objective is not None:
        rows = ObjectiveRows(fit.training, fit.objective, model, side, cache=cache)
        if isinstance(fit.file, TrainedVector):
            train = train_scales if fit.file.role == "scales" else train_vector
            return train(fit.file, rows, job)
        assert isinstance(fit.file, TrainedRotation)
        return train_rotation(fit.file, rows, job)
    if isinstance(fit.file, TrainedProbe):
        seed = checked.program.seed
        return train_probe(fit.file, model, job, seed=seed, side=side, cache=cache)
    partner = _partner_model(fit, models)
    return _train_on_vectors(fit, job, (model, partner), checked, side, cache)


def _partner_model(fit: DeclaredFit, models: Mapping[str, LoadedModel]) -> LoadedModel | None:
    """Return the model or the tower that runs the rows whose vectors others are correlated with;
    None without such rows."""
    paired, model = fit.training.paired, fit.experiment.model
    if paired is None or paired.sample is None or paired.shape is None:
        return None
    if paired.sample.run.model is not None:
        return models[paired.sample.run.model]
    if paired.shape.side == model.shape.side:
        return models[fit.model]
    both = models[model.name]
    return both.texts if paired.shape.side == "text" else both


def _train_on_vectors(
    fit: DeclaredFit,
    job: TrainingJob,
    models: tuple[LoadedModel, LoadedModel | None],
    checked: CheckedFile,
    side: PaddingSide | None,
    cache: VectorCache,
) -> FitReport:
    """Train a lens or a dictionary.

    Args:
        models: Those that run its rows, and the rows that these are correlated with.
    """
    from mechdsl.execute.dictionary_training import (
        train_components,
        train_correlated,
        train_cross_layer,
        train_mixture,
        train_on_decoder,
    )
    from mechdsl.execute.training import (
        RowVectors,
        StreamedVectors,
        solve_dictionary,
        train_dictionary,
        train_lens,
    )

    model, partner = models
    if fit.training.decoder is not None:
        assert isinstance(fit.file, TrainedDictionary)
        return train_on_decoder(fit.file, fit.training.decoder, model.device, job)
    if fit.training.stream is None:
        seed = checked.program.seed
        vectors = RowVectors(fit.training, model, seed, side, cache=cache, partner=partner)
    else:
        vectors = StreamedVectors(fit.training, model, partial(_read_part, checked, fit), side)
    if isinstance(fit.file, TrainedLens):
        return train_lens(fit.file, vectors, model, job)
    assert isinstance(fit.file, TrainedDictionary)
    trainer = fit.training.trainer
    if isinstance(vectors, RowVectors) and isinstance(trainer, SolvedTrainer | PairedTrainer):
        solvers: dict[
            type[FitReport], Callable[[TrainedDictionary, RowVectors, TrainingJob], FitReport]
        ] = {
            TrainingReport: solve_dictionary,
            IndependenceReport: train_components,
            CorrelationReport: train_correlated,
            MixtureReport: train_mixture,
        }
        solve = solvers[trainer.report]
        return solve(fit.file, vectors, job)
    if fit.file.crosses_layers:
        return train_cross_layer(fit.file, vectors, job)
    return train_dictionary(fit.file, vectors, job)


def _read_part(checked: CheckedFile, fit: DeclaredFit, ids: Sequence[int]) -> FitSample | None:
    """Return rows of a training that reads a file in parts; None if none are left.

    Raises RowsRefused.
    """
    from mechdsl.execute.run.saves import RowsRefused

    assert checked.part is not None
    model, name = fit.experiment.model, fit.training.sample.table.name
    made = checked.part(name, model, ids)
    fit_sample, problems = None, made.diagnostics
    if made.table is not None:
        fit_sample, more = resolve_part(fit.training, made.table, checked.program, model)
        problems = [*problems, *more]
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise RowsRefused(errors)
    return fit_sample


def _facts(fit: DeclaredFit, checked: CheckedFile, model: LoadedModel) -> dict[str, Any]:
    """Return what the card of a training says besides its report."""
    training = fit.training
    options = {**training.options, "seed": training.seed}
    own: dict[str, Any] = {}
    packages = packages_of_fit(fit)
    if isinstance(fit.file, TrainedDictionary):
        own["transcodes"] = fit.file.transcodes
    if training.paired is not None:
        own["with"] = training.paired.label
    if isinstance(training.trainer, OwnTrainer):
        code = training.trainer.own.function
        own["code"] = {"file": code.file, "name": code.name, "sha256": code.digest}
    if isinstance(fit.file, TrainedProbe):
        own["classes"] = list(fit.file.classes)
    if fit.objective is not None:
        own["from"] = fit.objective.spec.source
        fill = fit.objective.spec.rules[0].fill
        if isinstance(fit.file, TrainedMask) and fill is not None:
            own["with"] = fill.span.written
    return {
        **own,
        "basis": fit.basis,
        "trainer": training.trainer.name,
        "options": {**training.of_trainer, **options},
        "file": checked.source.name,
        "model_name": checked.program.models[training.model or fit.experiment.model.name].path,
        "source": model.provenance.get("source", ""),
        "dtype": str(model.dtype).removeprefix("torch."),
        "what": fit.file.kind,
        **_describe_source(training),
        "versions": {name: package_version(name) for name in ("mechdsl", *packages)},
    }


def _describe_source(training: Training) -> dict[str, Any]:
    """Return what the card of a training says about its rows."""
    source = training.source
    if not isinstance(source, FitSample):
        assert training.decoder is not None
        data = training.decoder.digest
        return {"prompts": f"decoder of {source.name}", "dictionary": source.made, "data": data}
    return {
        "prompts": source.table.name,
        "run": source.run.name,
        "positions": source.cell.label,
        "data": source.table.data_hash,
    }


def _finished(fit: DeclaredFit, folder: Path, report: FitReport, seconds: float) -> TrainedFit:
    point = fit.training.made
    site = label_points((point,))
    what = fit.file.kind
    if isinstance(fit.file, TrainedMask) and fit.file.noun in ("position", "edge"):
        site = "edges" if fit.file.noun == "edge" else site
        site = f"{site} at {fit.training.sample.cell.label}"
    elif isinstance(fit.file, TrainedMask):
        site = label_candidates(fit.file.candidates)
    if isinstance(fit.file, TrainedLens | TrainedProbe):
        site = label_all_points(fit.training.inputs)
    if fit.training.outputs:
        site = label_all_points(fit.training.outputs)
    if isinstance(report, RotationReport):
        what = describe_rotation(fit.training.trainer.name, report.directions)
    seed = fit.training.seed
    family = name_without_seed(fit.basis, seed) if fit.training.is_one_of_several else None
    what += fit.training.manner
    return TrainedFit(fit.basis, what, site, folder, report, seconds, seed, fit.model, family)


def _failed(fit: DeclaredFit, reason: str, hint: str) -> Diagnostic:
    return TrainingFailed(span=fit.training.span, basis=fit.basis, reason=reason, hint=hint)


def export_fits(fits: Sequence[TrainedFit], folder: Path) -> Iterator[tuple[str, Path]]:
    """Copy what is trained into new folders below `folder`, with model cards.

    Yields the name of each training and its new folder. Raises FileExistsError before anything is
    copied, and OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = name_fits(fits)
    targets = [folder / re.sub(r"[^\w-]+", "-", name).strip("-") for name in names]
    for target in targets:
        if target.exists():
            raise FileExistsError(EEXIST, "there already", str(target))
    for fit, name, target in zip(fits, names, targets, strict=True):
        shutil.copytree(
            fit.folder, target, ignore=shutil.ignore_patterns(UNTRAINED_FOLDER, SEAL_FILE)
        )
        (target / "README.md").write_text(_card_text(fit), "utf-8")
        yield name, target


def _card_text(fit: TrainedFit) -> str:
    """Return the model card of a training."""
    card = json.loads((fit.folder / CARD_FILE).read_text("utf-8"))
    report = fit.report
    options = ", ".join(f"{name}: {value}" for name, value in card["options"].items())
    versions = ", ".join(f"{name} {value}" for name, value in card["versions"].items())
    lines = [
        f"# {fit.basis}: {fit.what}",
        "",
        f"Trained with mechdsl on `{fit.site}` of {card['source'] or card['model_name']}.",
        "",
        f"- File: {card['file']}",
        *report.describe_rows(card),
        *([f"- Data: SHA-256 {card['data']}"] if card["data"] else []),
        *(
            [
                f"- Code: `{card['code']['name']}` of {card['code']['file']}, SHA-256 "
                f"{card['code']['sha256']}"
            ]
            if "code" in card
            else []
        ),
        f"- Options: {options}",
        f"- Steps: {report.steps:,}" + (" (stopped early)" if report.stopped_early else ""),
        f"- Precision of the model: {card['dtype']}",
        f"- Versions: {versions}",
        "",
    ]
    return "\n".join(lines)
