"""`mechdsl.runs()`: the runs of a store as Python sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from mechdsl.results.export import export_content
from mechdsl.results.named_runs import (
    content_of,
    open_store,
    runs_of,
    store_refused,
    stored_results,
)
from mechdsl.results.results import Results
from mechdsl.results.run_facts import RunFacts, facts_of
from mechdsl.results.shown import MOST_LINES
from mechdsl.store.runs import StoredRun
from mechdsl.store.store import StoreProblem

MOST_RUNS = 4 * MOST_LINES
"""That a `repr` names."""


class Run:
    """A run that a store keeps."""

    def __init__(self, folder: Path, stored: StoredRun) -> None:
        self._folder = folder
        self._stored = stored

    @property
    def id(self) -> str:
        """What `mechdsl runs` calls it: `20261121-154210-3fa2`."""
        return self._stored.id

    @property
    def state(self) -> str:
        """`finished`, `running`, or `unfinished`, when the same command goes on with it. As it was
        when the runs were listed."""
        return self._stored.state

    @property
    def file(self) -> str:
        """The path of the file that was run, as it was given."""
        return self.facts.file

    @property
    def began(self) -> datetime:
        """When, in the local time zone."""
        return self.facts.began

    @property
    def about(self) -> Mapping[str, Any]:
        """Settings, versions, hashes, how many rows were computed: what the store says of it."""
        return self._stored.about

    @cached_property
    def facts(self) -> RunFacts:
        """The same with types, as `mechdsl runs` lists it."""
        return facts_of(self._stored)

    @cached_property
    def results(self) -> Results:
        """The results, read when they are first asked for.

        Raises MechdslError (E0208) where the run isn't finished or can't be read.
        """
        with open_store(self._folder) as store:
            return stored_results(store, self._stored)

    def export(self, folder: str | Path) -> Path:
        """Write the run into a folder in `folder`, which is called like its file, as `--out` does.

        Returns the new folder. Raises MechdslError (E0208) where the run has no results or they
        can't be read, OSError where they can't be written.
        """
        results = self.results
        with open_store(self._folder) as store:
            content = content_of(store, self._stored)
        return export_content(content, results, Path(folder))

    def remove(self) -> None:
        """Remove it from the store; values that it computed stay, for other runs.

        Raises MechdslError (E0208) where it goes on, or the store can only be read.
        """
        with open_store(self._folder) as store:
            try:
                store.remove(self._stored)
            except (StoreProblem, OSError) as error:
                raise store_refused(self._folder, error) from error

    def __repr__(self) -> str:
        return f"<Run {line_of(self.facts)}>"


class Runs(list[Run]):
    """What `mechdsl.runs` returns: a list of runs, the newest first."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        super().__init__(runs)

    def __repr__(self) -> str:
        if not self:
            return "<Runs: none>"
        lines = [line_of(each.facts) for each in self[:MOST_RUNS]]
        more = len(self) - MOST_RUNS
        return "<Runs " + "\n  ".join([*lines, f"and {more} more"] if more > 0 else lines) + ">"


def line_of(facts: RunFacts) -> str:
    """A run in one line."""
    held = f"{facts.verdict} expectations hold" if facts.verdict else ""
    state = "" if facts.state == "finished" else facts.state
    began = f"{facts.began:%Y-%m-%d %H:%M}"
    return ", ".join(filter(None, (f"{facts.id}: {facts.file}", began, state, held)))


def runs_in(folder: Path) -> Runs:
    """The runs of a store. Raises MechdslError (E0208) where there is none or it can't be read."""
    with open_store(folder) as store:
        return Runs(Run(folder, each) for each in runs_of(store))
