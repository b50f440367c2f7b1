"""A file that was checked is run: from its store where nothing has changed, else by computing it.

Without torch, until something has to be computed.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechdsl.base.random_numbers import kept_random_numbers
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e02_names import BadCommandLine
from mechdsl.diagnostics.raised import Diagnostics
from mechdsl.diagnostics.w07_store import StoreNotUsed
from mechdsl.execute.counts import Counts
from mechdsl.execute.options import Options
from mechdsl.models.identity import Hashed, file_hash
from mechdsl.pipeline.check_folders import check_folders
from mechdsl.pipeline.device_word import found_device, known_device
from mechdsl.pipeline.run_key import NoKey, run_key
from mechdsl.pipeline.run_options import RunOptions
from mechdsl.results.archive import ArchiveProblem, pack, unpack
from mechdsl.results.experiment_result import FileResult
from mechdsl.results.export import export, export_content
from mechdsl.results.results import Results
from mechdsl.results.run_facts import about_results
from mechdsl.results.versions import versions
from mechdsl.store.problem import StoreProblem
from mechdsl.store.runs import OpenRun, StoredRun
from mechdsl.store.store import Store
from mechdsl.validate.check_file import Checked, Settings

if TYPE_CHECKING:
    from mechdsl.hooks.loaded import LoadedModel

Starting = Callable[[bool], None]
"""Called before anything is computed, with whether the store keeps what is finished."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


class StoreStopped(Exception):
    """The store takes nothing more, and the run has ended for it."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic)
        self.diagnostic = diagnostic


@dataclass(frozen=True)
class Ran:
    """What came of a file."""

    result: FileResult | None
    """None where it could not be run: then there are errors."""
    diagnostics: list[Diagnostic]
    """Those of the run; what checking has found isn't repeated."""
    notes: tuple[str, ...] = ()
    """What there is to say of the store, a line each."""
    run: str = ""
    """Its id in the store; empty where it isn't there as a whole."""


def run_file(
    checked: Checked,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel] | None = None,
    starting: Starting | None = None,
) -> Ran:
    """Run a file that was checked without errors, or give again what its store has of it.

    loaded: models of Python, by name. Raises StoreStopped, OSError where `options.out` can't be
    written, and what computing raises.
    """
    return _Run(checked, options, loaded or {}, starting).done()


class _Unusable(Exception):
    """The store isn't used, and why."""


@contextmanager
def _asking() -> Generator[None]:
    """Whatever is wrong with the store before anything is computed costs the store alone."""
    try:
        yield
    except StoreProblem as problem:
        raise _Unusable(str(problem)) from problem
    except OSError as error:
        raise _Unusable((error.strerror or str(error)).lower()) from error


class _Run:
    """One file on its way."""

    def __init__(
        self,
        checked: Checked,
        options: RunOptions,
        loaded: Mapping[str, LoadedModel],
        starting: Starting | None,
    ) -> None:
        self._checked = checked
        self._options = options
        self._loaded = loaded
        self._starting = starting
        self._counts = Counts()
        self._warnings: list[Diagnostic] = []
        self._notes: list[str] = []

    def done(self) -> Ran:
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

    def _without(self) -> Ran:
        """Compute without the store."""
        # Each file once, although the hash of the weights and the model's identity both ask for it.
        result, found = self._computed(None, cache(file_hash) if self._options.hashes else None)
        results = self._results(result, found)
        if results is not None and self._options.out is not None and not results.files[0].not_run:
            export(results, self._options.out, self._checked.source.text)
        return Ran(result, [*self._warnings, *found], tuple(self._notes))

    # --- with the store ---------------------------------------------------------------------------

    def _with(self, store: Store) -> Ran:
        with _asking():
            device = self._device(store)
            if device is None:
                return self._without()
            try:
                key = self._key(store, device)
            except NoKey as unknown:
                self._note(f"nothing of it is kept in the store: {unknown}")
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
                self._warn("can only be read, so nothing is kept")
            return self._kept(store, key, device, run)

    def _device(self, store: Store) -> str | None:
        """What the name of the device means; None where there is no such device."""
        name = self._options.device
        found = known_device(store, name)
        if found is None:
            from mechdsl.loading.devices import device_problem

            if device_problem(name) is not None:  # which is said when it is to be computed
                return None
            found = found_device(store, name)
        return found

    def _key(self, store: Store, device: str) -> str:
        """Raises NoKey, StoreProblem, OSError."""
        return run_key(
            self._checked, self._options, self._loaded, device=device, hashed=store.file_hash
        )

    def _again(self, store: Store, key: str) -> tuple[StoredRun, Results] | None:
        """What the store has of this very run; None where activations are to be written, too."""
        if self._checked.saving:
            return None
        stored = store.finished(key)
        if stored is None:
            return None
        try:
            return stored, unpack(store.content(stored), self._checked.source)
        except (ArchiveProblem, StoreProblem):  # of another version, or torn since
            return None

    def _shown(self, stored: StoredRun, results: Results) -> Ran:
        """The same as a run would give: under the file's name of today."""
        result = replace(results.files[0], file=self._checked.source.name)
        found = [self._here(each) for each in results.diagnostics[stored.about["checked"] :]]
        now = self._results(result, found)
        if self._options.out is not None and now is not None:
            export(now, self._options.out, self._checked.source.text)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(stored.ended))
        self._note(
            f"unchanged since {when}: from the store ({stored.id}); `--fresh` computes it again"
        )
        return Ran(result, found, tuple(self._notes), stored.id)

    def _here(self, diagnostic: Diagnostic) -> Diagnostic:
        """A diagnostic whose span is in the files of today; they may lie elsewhere by now."""
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
        self, run: OpenRun | None, hashed: Hashed | None, store: Store | None = None
    ) -> tuple[FileResult | None, list[Diagnostic]]:
        if self._starting is not None:
            self._starting(run is not None and bool(run.id))
        import_module("torch")  # whose random numbers are kept, too

        with kept_random_numbers():
            from mechdsl.loading.load import import_library

            import_library()
            from mechdsl.pipeline.compute import run_checked

            return run_checked(
                self._checked,
                self._options,
                self._loaded,
                run=run,
                counts=self._counts,
                hashed=hashed,
                notes=store,
            )

    def _kept(self, store: Store, key: str, device: str, run: OpenRun) -> Ran:
        """Compute, and keep what that gives."""
        began = time.monotonic()

        def hashed(path: Path) -> str:
            with suppress(StoreProblem):
                return store.file_hash(path)
            return file_hash(path)

        with self._until_full(run):
            result, found = self._computed(run, hashed, store)
        results = self._results(result, found)
        content: Mapping[str, bytes] | None = None
        id = ""
        if results is not None:
            content = self._packed(results)
            if content is not None and results.complete and run.id:
                about = self._ending(results, time.monotonic() - began)
                id = self._finished(store, key, device, run, content, about)
            if self._options.out is not None and not results.files[0].not_run:
                export_content(content or self._pack(results), results, self._options.out)
        for name, reason in self._counts.not_kept.items():
            self._note(f"patched values of `{name}` are not kept in the store: {reason}")
        if self._counts.stored:
            total = self._counts.stored + self._counts.computed
            self._note(f"{self._counts.stored:,} of {total:,} rows from the store")
        return Ran(result, [*self._warnings, *found], tuple(self._notes), id)

    @contextmanager
    def _until_full(self, run: OpenRun) -> Generator[None]:
        """StoreStopped where the store fails while it is written to."""
        try:
            yield
        except (StoreProblem, OSError) as error:
            full = isinstance(error, StoreProblem) or error.errno in _FULL
            if not run.id or not full:
                raise
            said = (error.strerror if isinstance(error, OSError) else None) or str(error)
            reason = f"the store `{self._options.store}` takes nothing more: {said.lower()}"
            hint = (
                "what is finished is kept: make room, and the same command goes on from there; "
                "`--no-store` runs without a store"
            )
            raise StoreStopped(BadCommandLine(reason=reason, hint=hint)) from error

    def _packed(self, results: Results) -> Mapping[str, bytes] | None:
        try:
            return self._pack(results)
        except ArchiveProblem as problem:
            self._note(f"its results are not kept in the store: {problem}")
            return None

    def _pack(self, results: Results) -> dict[str, bytes]:
        return pack(results, self._checked.source.text)

    def _finished(
        self,
        store: Store,
        key: str,
        device: str,
        run: OpenRun,
        content: Mapping[str, bytes],
        about: Mapping[str, Any],
    ) -> str:
        """The run's id, once it is kept under its key; empty where it can't be."""
        try:
            if self._key(store, device) != key:
                raise NoKey("a file that it read has changed meanwhile")
            run.finish(content, about)
            return run.id
        except NoKey as unknown:
            self._note(f"its results are not kept in the store: {unknown}")
        except (StoreProblem, OSError) as error:  # what it gave is there all the same
            said = error.strerror if isinstance(error, OSError) else None
            self._warn(f"does not take the results: {(said or str(error)).lower()}")
        return ""

    def _results(self, result: FileResult | None, found: list[Diagnostic]) -> Results | None:
        if result is None:
            return None
        return Results((result,), versions(), Diagnostics([*self._checked.diagnostics, *found]))

    # --- what the store says of it ----------------------------------------------------------------

    def _about(self) -> dict[str, Any]:
        source, options = self._checked.source, self._options
        return {
            "file": source.name,
            "path": None if source.path is None else os.path.realpath(source.path),
            "settings": _given(self._checked, options),
            "parameters": {n: str(v) for n, v in self._checked.program.parameters.items()},
            "versions": versions(),
        }

    def _ending(self, results: Results, seconds: float) -> dict[str, Any]:
        counts = self._counts
        found = about_results(
            results, computed=counts.computed, stored=counts.stored, seconds=seconds
        )
        return {**found, "checked": len(self._checked.diagnostics)}


def _given(checked: Checked, options: RunOptions) -> dict[str, str]:
    """The options that aren't as they are by themselves, by their names on the command line."""
    found: dict[str, str] = {}
    for own, usual, names in (
        (checked.settings, Settings(), ("limit", "only", "allow_outside", "untrusted")),
        (options, RunOptions(), ("device", "dtype", "offload", "without", "fresh")),
        (options.execution, Options(), ("side", "pass_tokens", "prompt_tokens", "allow_nan")),
    ):
        for name in names:
            value = getattr(own, name)
            if value != getattr(usual, name):
                words = ", ".join(sorted(value)) if isinstance(value, frozenset) else str(value)
                found[_CALLED.get(name, name.replace("_", "-"))] = words
    if checked.settings.python == "run":
        found["allow-python"] = "True"
    found.update({f"set {name}": value for name, value in checked.settings.parameters.items()})
    return found


_CALLED = {"without": "no-pass"}
