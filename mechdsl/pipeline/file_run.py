"""Run of a checked file: from its store if nothing changed, otherwise computed.

Torch is imported only if something must be computed.
"""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechdsl.base.files import package_digest
from mechdsl.base.runtime import active_torch_mode, numeric_settings, preserve_random_state
from mechdsl.base.text import Span
from mechdsl.checks.file_check import CheckedFile, CheckSettings, needed_models
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.files import StoreNotUsed
from mechdsl.diagnostics.rendering import Diagnostics
from mechdsl.execute.run_record import ExecutionOptions, RowCounts
from mechdsl.models.folder import FileHasher, hash_file, json_digest
from mechdsl.pipeline.identities import ModelIdentities, RunKeyError, find_device
from mechdsl.pipeline.options import RunOptions, check_folders
from mechdsl.pipeline.trained_files import attach_fits, list_untrained
from mechdsl.program.code_hashes import CodeHashError, hash_imported_code
from mechdsl.program.plugins import LOADED_PLUGINS, hash_extension_code
from mechdsl.program.python_functions import program_functions
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun, RunRow
from mechdsl.resolve.observations import Observation
from mechdsl.resolve.types import ResolvedExperiment
from mechdsl.results.experiment_result import FileResult
from mechdsl.results.results import (
    ArchiveError,
    Results,
    pack_results,
    package_version,
    package_versions,
    unpack_results,
)
from mechdsl.results.runs import about_results, export_archive, export_results
from mechdsl.store.files import StoreProblem
from mechdsl.store.runs import OpenRun, StoredRun
from mechdsl.store.store import Store

if TYPE_CHECKING:
    from mechdsl.forward.hooks.model import LoadedModel


SETTINGS_FIELDS = (
    "parameters",
    "limit",
    "only",
    "python",
    "require_models",
    "allow_outside",
    "untrusted",
    "prompts_enough",
)

OPTIONS_FIELDS = ("dtype", "offload", "without")

EXECUTION_FIELDS = ("side", "pass_tokens", "prompt_tokens", "allow_nan")
"""Fields that are part of the key unchanged."""

EXCLUDED_FIELDS: Mapping[type, Mapping[str, str]] = {
    CheckSettings: {
        "build": "what it makes goes in as the models do",
        "callables": "their code goes in with that of the file's functions",
        "trained": "their digests go in with the prompts of each experiment",
    },
    RunOptions: {
        "settings": "those that the file was checked with go in",
        "device": "what it means on this machine goes in",
        "execution": "field by field",
        "out": "what is written there goes with the archived run",
        "on_profile": "only looks on",
        "ends": "whether experiments run one by one goes in; a run that was ended isn't archived",
        "store": "where it lies changes nothing",
        "fresh": "asks for the same",
        "fits": "changes only the message on a training that failed",
        "hashes": "a run with a key has them",
    },
    ExecutionOptions: {"on_progress": "only looks on"},
}
"""Excluded fields with reasons; `tests/pipeline/test_run_key.py` checks that all are listed."""


def run_key(
    checked: CheckedFile,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel],
    *,
    device: str,
    hashed: FileHasher,
) -> str:
    """Return SHA-256 of everything that a run's results depend on.

    Args:
        loaded: Models from Python, by name.
        device: Type of the device that `options.device` refers to.
        hashed: Computes SHA-256 of a file.

    Raises:
        RunKeyError: If an input can't be identified.
        OSError: If a file can't be read.
    """
    return json_digest(key_parts(checked, options, loaded, device=device, hashed=hashed))


def key_parts(
    checked: CheckedFile,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel],
    *,
    device: str,
    hashed: FileHasher,
) -> dict[str, Any]:
    """Return the content of the key as JSON. Arguments and exceptions as for `run_key`."""
    if checked.unchecked or checked.unrun:
        raise RunKeyError("a part of the file could not be checked")
    mode = active_torch_mode()
    if mode is not None:
        raise RunKeyError(f"torch's functions may be changed by a `{mode}`, which is active")
    known = {**checked.built, **loaded}
    models = ModelIdentities(checked, known, hashed)
    try:
        python = _python(checked)
    except CodeHashError as unknown:
        raise RunKeyError(str(unknown)) from None
    groups = {**checked.program.groups, **checked.program.positions}
    return {
        "schema": 1,
        "texts": [source.text for source in checked.program.sources],
        "parameters": _told(checked.program.parameters),
        "settings": {name: _told(getattr(checked.settings, name)) for name in SETTINGS_FIELDS},
        "options": {
            **{name: _told(getattr(options, name)) for name in OPTIONS_FIELDS},
            "offload": options.offload is not None,
            "one by one": options.ends is not None,
        },
        "execution": {name: _told(getattr(options.execution, name)) for name in EXECUTION_FIELDS},
        "device": device,
        "machine": [platform.system(), platform.machine(), platform.python_version()],
        "numbers": numeric_settings(),
        "groups": {n: group.digest for n, group in groups.items() if group.digest},
        "prompts": _tables([*checked.experiments, *checked.edits.values()]),
        "python": python,
        "models": {name: models.told(name) for name in needed_models(checked)},
        "versions": _versions(checked, options),
        "plugins": _loaded_plugins(),
        "code": package_digest(),
    }


def _told(value: Any) -> Any:
    """Convert a setting to JSON that distinguishes `1`, `1.0` and `"1"`."""
    if isinstance(value, Mapping):
        return {str(name): _told(each) for name, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_told, value))
    return repr(value)


def _versions(checked: CheckedFile, options: RunOptions) -> dict[str, str]:
    models = checked.program.models.values()
    more = ["safetensors"]
    more += ["peft"] if any(model.is_loaded and model.base for model in models) else []
    images = any(block.has_images for block in checked.program.prompts.values())
    more += ["pillow"] if images else []
    more += ["accelerate"] if options.offload is not None else []
    return {**package_versions(), **{package: package_version(package) for package in more}}


def _loaded_plugins() -> dict[str, list[str]]:
    """Plugin → its module, package and version; `python` has the code."""
    plugins = LOADED_PLUGINS.items()
    return {name: [plugin.module, plugin.package, plugin.version] for name, plugin in plugins}


def _python(checked: CheckedFile) -> dict[str, Any]:
    """Hash the user's code: files that the file names and modules that extend the language, each
    with its imports of the user's code."""
    files: dict[str, str] = {}
    contents: list[bytes] = []
    for function in program_functions(checked.program):
        contents.append(function.read_code())
        files[function.file] = function.digest
    imported = hash_imported_code(contents) | hash_extension_code()
    return {"files": files, "beside": imported}


# --- prompts --------------------------------------------------------------------------------------


def _tables(experiments: Iterable[ResolvedExperiment]) -> dict[str, str]:
    """Return a digest of the prompts of each experiment."""
    done: dict[int, str] = {}
    tables: dict[str, str] = {}
    for experiment in experiments:
        if id(experiment.table) not in done:
            done[id(experiment.table)] = _table(experiment.table)
        steered = [rule.direction for rule in experiment.every_rule if rule.direction is not None]
        bases = [basis for rule in experiment.every_rule for basis in rule.bases]
        saved = [vector.digest for made in (*steered, *bases) for vector in made.saved]
        saved += [labels.digest for basis in bases for labels in basis.labels]
        saved += [mask.digest for mask in experiment.masks]
        saved += [rule.circuit.digest for rule in experiment.every_rule if rule.circuit is not None]
        if experiment.control is not None and experiment.control.title == "untrained":
            before = [rule.basis for rule in experiment.control.experiment.rules if rule.basis]
            saved += [file.digest for basis in before for file in basis.saved]
        saved += [] if experiment.model.opposite is None else [experiment.model.opposite.digest]
        for rule in experiment.rules:
            if isinstance(rule.does, Observation):
                saved += rule.does.made_of.values()
        tables[experiment.key] = " ".join([done[id(experiment.table)], *saved])
    return tables


def _table(table: PromptTable) -> str:
    digest = sha256()

    def take(*parts: object) -> None:
        digest.update(f"{parts!r}\n".encode("utf-8", "surrogatepass"))

    take(table.name, table.row_ids, table.row_keys, sorted(table.conventions.items()))
    take(table.data_hash, sorted(table.other_data.items()), table.moved, table.moved_text)
    take([(python_function.name, python_function.digest) for python_function in table.python])
    for name, run in table.runs.items():
        take(name, run.name, run.prompts, run.model, _noise(run))
        for row in run.rows:
            take(*_row(row))
    for name, other in sorted(table.other_tables.items()):
        take(name, _table(other))
    return digest.hexdigest()


def _noise(run: PromptRun) -> tuple[object, ...]:
    noise = run.noise
    if noise is None:
        return ()
    told = (noise.site, noise.positions, noise.std, noise.sds, noise.sd_tokens)
    return (*told, noise.samples, noise.kind, noise.row_keys)


def _row(row: RunRow) -> tuple[object, ...]:
    texts = [(name, text.text, text.ids, text.of_output) for name, text in row.texts.items()]
    spans = [tuple(span) for span in row.spans]
    read = (row.text, row.ids, row.offsets, row.special)
    return *read, *([row.source] if row.source else []), spans, list(row.values.items()), texts


StartCallback = Callable[[bool], None]
"""Called before the computation, with whether the store caches finished results."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


class StoreStopped(Exception):
    """The store can't be written any more, which ended the run."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic)
        self.diagnostic = diagnostic


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of running a file."""

    result: FileResult | None
    """None if the file could not be run; then there are errors."""
    diagnostics: list[Diagnostic]
    """Diagnostics of the run; those of the check aren't repeated."""
    notes: tuple[str, ...] = ()
    """Notes on the store, one per line."""
    run: str = ""
    """Id of the run in the store; empty if the store doesn't contain it completely."""


def run_file(
    checked: CheckedFile,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel] | None = None,
    starting: StartCallback | None = None,
) -> RunOutcome:
    """Run a file that was checked without errors, or return its results from the store.

    Args:
        loaded: Models from Python, by name.

    Raises:
        StoreStopped: If the store fails.
        OSError: If `options.out` can't be written. Exceptions of the computation are passed on.
    """
    return _Run(checked, options, loaded or {}, starting).done()


class _Unusable(Exception):
    """Raised with the reason why the store isn't used."""


@contextmanager
def _asking() -> Generator[None]:
    """Convert errors of the store before the computation, so that they only disable the store."""
    try:
        yield
    except StoreProblem as problem:
        raise _Unusable(str(problem)) from problem
    except OSError as error:
        raise _Unusable((error.strerror or str(error)).lower()) from error


class _Run:
    """The run of one file."""

    def __init__(
        self,
        checked: CheckedFile,
        options: RunOptions,
        loaded: Mapping[str, LoadedModel],
        starting: StartCallback | None,
    ) -> None:
        self._checked = checked
        self._options = options
        self._loaded = loaded
        self._starting = starting
        self._counts = RowCounts()
        self._warnings: list[Diagnostic] = []
        self._notes: list[str] = []

    def done(self) -> RunOutcome:
        self._checked = attach_fits(self._checked, self._options, self._loaded)
        errors = [
            diagnostic for diagnostic in self._checked.diagnostics if diagnostic.severity == "error"
        ]
        if errors:  # such as measured texts that a training has read
            return RunOutcome(None, errors)
        untrained = list_untrained(self._checked, self._options)
        if untrained is not None:
            return RunOutcome(None, untrained)
        folder = self._options.store
        if folder is None or has_errors(check_folders(self._options)):
            return self._without()
        store = None
        try:
            with _asking():
                store = Store(folder)
            return self._with(store)
        except _Unusable as problem:
            self._warn(f"can't be used: {problem}")
            return self._without()
        finally:
            if store is not None:
                store.close()

    def _warn(self, reason: str) -> None:
        folder = str(self._options.store)
        self._warnings.append(StoreNotUsed(folder=folder, reason=reason))

    def _note(self, text: str) -> None:
        self._notes.append(f"{self._checked.source.name}: {text}")

    def _without(self) -> RunOutcome:
        """Compute without the store."""
        # Cached: hashes of weights and the model's identity both need each file's hash.
        result, problems = self._computed(None, cache(hash_file) if self._options.hashes else None)
        results = self._results(result, problems)
        if results is not None and self._options.out is not None and not results.files[0].not_run:
            export_results(results, self._options.out, self._checked.source.text)
        return RunOutcome(result, [*self._warnings, *problems], tuple(self._notes))

    # --- with the store ---------------------------------------------------------------------------

    def _with(self, store: Store) -> RunOutcome:
        with _asking():
            device = find_device(store, self._options.device)
            if device is None:  # reported when the run is computed
                return self._without()
            try:
                key = self._key(store, device)
            except RunKeyError as unknown:
                self._note(f"nothing of it is stored: {unknown}")
                return self._without()
            again = None
            if not self._options.fresh and self._options.on_profile is None:
                again = self._again(store, key)
            run = None if again else store.begin(key, self._about(), fresh=self._options.fresh)
        if again is not None:
            stored, results = again
            return self._shown(stored, results)
        assert run is not None
        with run:
            if not store.writable:
                self._warn("is read-only, so nothing is stored")
            return self._kept(store, key, device, run)

    def _key(self, store: Store, device: str) -> str:
        """Return the run's key. Raises RunKeyError, StoreProblem, OSError."""
        return run_key(
            self._checked, self._options, self._loaded, device=device, hashed=store.file_hash
        )

    def _again(self, store: Store, key: str) -> tuple[StoredRun, Results] | None:
        """Return the stored results of this run; None if activations must be saved, too."""
        if self._checked.saving:
            return None
        stored = store.finished(key)
        if stored is None:
            return None
        try:
            return stored, unpack_results(store.content(stored), self._checked.source)
        except (ArchiveError, StoreProblem):  # of a different version, or damaged
            return None

    def _shown(self, stored: StoredRun, results: Results) -> RunOutcome:
        """Return stored results as a run would, under the file's current name."""
        result = replace(results.files[0], file=self._checked.source.name)
        problems = [
            self._here(problem) for problem in results.diagnostics[stored.about["checked"] :]
        ]
        now = self._results(result, problems)
        if self._options.out is not None and now is not None:
            export_results(now, self._options.out, self._checked.source.text)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(stored.ended))
        self._note(
            f"unchanged since {when}: from the store ({stored.id}); `--fresh` computes it again"
        )
        return RunOutcome(result, problems, tuple(self._notes), stored.id)

    def _here(self, diagnostic: Diagnostic) -> Diagnostic:
        """Move the span of a diagnostic to the current files, whose paths may have changed."""
        span = diagnostic.span
        if span is None:
            return diagnostic
        same = [s for s in self._checked.program.sources if s.text == span.source.text]
        own = self._checked.source
        source = own if own in same or not same else same[0]
        if source.text != span.source.text:
            return diagnostic
        return replace(diagnostic, span=Span(source, span.start, span.end))

    # --- computing --------------------------------------------------------------------------------

    def _computed(
        self, run: OpenRun | None, hashed: FileHasher | None, store: Store | None = None
    ) -> tuple[FileResult | None, list[Diagnostic]]:
        if self._starting is not None:
            self._starting(run is not None and bool(run.id))
        import_module("torch")  # its random state is restored, too

        with preserve_random_state():
            from mechdsl.loading.loader import import_library

            import_library()
            from mechdsl.pipeline.computation import run_checked

            return run_checked(
                self._checked,
                self._options,
                self._loaded,
                run=run,
                counts=self._counts,
                hashed=hashed,
                notes=store,
            )

    def _kept(self, store: Store, key: str, device: str, run: OpenRun) -> RunOutcome:
        """Compute and store the results."""
        began = time.monotonic()
        functions = list(program_functions(self._checked.program))
        run.is_valid = lambda: all(function.is_stable for function in functions)

        def hashed(path: Path) -> str:
            with suppress(StoreProblem):
                return store.file_hash(path)
            return hash_file(path)

        with self._until_full(run):
            result, problems = self._computed(run, hashed, store)
        results = self._results(result, problems)
        content: Mapping[str, bytes] | None = None
        id = ""
        if results is not None:
            content = self._packed(results)
            if content is not None and results.complete and run.id:
                about = self._ending(results, time.monotonic() - began)
                id = self._finished(store, key, device, run, content, about)
            if self._options.out is not None and not results.files[0].not_run:
                export_archive(content or self._pack(results), results, self._options.out)
        for name, reason in self._counts.not_kept.items():
            self._note(f"patched values of `{name}` are not stored: {reason}")
        if self._counts.stored:
            total = self._counts.stored + self._counts.computed
            self._note(f"{self._counts.stored:,} of {total:,} rows from the store")
        return RunOutcome(result, [*self._warnings, *problems], tuple(self._notes), id)

    @contextmanager
    def _until_full(self, run: OpenRun) -> Generator[None]:
        """Raise StoreStopped if the store fails while it is written."""
        try:
            yield
        except (StoreProblem, OSError) as error:
            full = isinstance(error, StoreProblem) or error.errno in _FULL
            if not run.id or not full:
                raise
            said = (error.strerror if isinstance(error, OSError) else None) or str(error)
            reason = f"the store `{self._options.store}` can't be written to: {said.lower()}"
            hint = (
                "free some space; the same command then resumes, and finished values stay in the "
                "store. `--no-store` runs without a store"
            )
            raise StoreStopped(BadCommandLine(reason=reason, hint=hint)) from error

    def _packed(self, results: Results) -> Mapping[str, bytes] | None:
        try:
            return self._pack(results)
        except ArchiveError as problem:
            self._note(f"its results are not stored: {problem}")
            return None

    def _pack(self, results: Results) -> dict[str, bytes]:
        return pack_results(results, self._checked.source.text)

    def _finished(
        self,
        store: Store,
        key: str,
        device: str,
        run: OpenRun,
        content: Mapping[str, bytes],
        about: Mapping[str, Any],
    ) -> str:
        """Return the run's id after storing it under its key; empty if that fails."""
        try:
            if self._key(store, device) != key:
                raise RunKeyError("a file that it read changed during the run")
            run.finish(content, about)
            return run.id
        except RunKeyError as unknown:
            self._note(f"its results are not stored: {unknown}")
        except (StoreProblem, OSError) as error:  # the results exist regardless
            said = error.strerror if isinstance(error, OSError) else None
            self._warn(f"rejects the results: {(said or str(error)).lower()}")
        return ""

    def _results(self, result: FileResult | None, found: list[Diagnostic]) -> Results | None:
        if result is None:
            return None
        return Results(
            (result,), package_versions(), Diagnostics([*self._checked.diagnostics, *found])
        )

    # --- facts in the store -----------------------------------------------------------------------

    def _about(self) -> dict[str, Any]:
        source, options = self._checked.source, self._options
        return {
            "file": source.name,
            "path": None if source.path is None else os.path.realpath(source.path),
            "settings": _given(self._checked, options),
            "parameters": {n: str(v) for n, v in self._checked.program.parameters.items()},
            "versions": package_versions(),
        }

    def _ending(self, results: Results, seconds: float) -> dict[str, Any]:
        counts = self._counts
        facts = about_results(
            results, computed=counts.computed, stored=counts.stored, seconds=seconds
        )
        return {**facts, "checked": len(self._checked.diagnostics)}


def _given(checked: CheckedFile, options: RunOptions) -> dict[str, str]:
    """Return the options that differ from their defaults, by their command-line names."""
    hashes: dict[str, str] = {}
    for own, usual, names in (
        (checked.settings, CheckSettings(), ("limit", "only", "allow_outside", "untrusted")),
        (options, RunOptions(), ("device", "dtype", "offload", "without", "fresh")),
        (
            options.execution,
            ExecutionOptions(),
            ("side", "pass_tokens", "prompt_tokens", "allow_nan"),
        ),
    ):
        for name in names:
            value = getattr(own, name)
            if value != getattr(usual, name):
                words = ", ".join(sorted(value)) if isinstance(value, frozenset) else str(value)
                hashes[_CALLED.get(name, name.replace("_", "-"))] = words
    if checked.settings.python == "run":
        hashes["allow-python"] = "True"
    hashes.update({f"set {name}": value for name, value in checked.settings.parameters.items()})
    return hashes


_CALLED = {"without": "no-pass"}
