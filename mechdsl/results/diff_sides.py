"""The two runs that `mechdsl diff` is given, found and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from mechdsl.results.differences import compare
from mechdsl.results.found_differences import Differences, Side
from mechdsl.results.kept_runs import Run
from mechdsl.results.named_runs import (
    SUFFIX,
    export_in,
    find_run,
    folder_of,
    open_store,
    results_of,
    stored_results,
)
from mechdsl.results.results import Results
from mechdsl.results.run_facts import RunFacts, facts_of
from mechdsl.syntax.parse import read_source

Given = Results | Run | str | Path
"""Results, a run of a store, or what a run is called by: its id, a file, a folder."""
NO_INPUTS = frozenset({"fresh", "allow-outside", "untrusted", "allow-python"})
"""Settings that no number hangs on."""


@dataclass(frozen=True, eq=False)
class _Found:
    side: Side
    results: Results
    id: str | None = None
    """Of a run of a store."""


def differences_of(old: Given, new: Given, store: Path | None = None) -> Differences:
    """What changed from one run to another.

    store: the folder that runs are in; None: that beside the `.mech` file, where one of both is
    one, or of the working folder. Raises MechdslError (E0208) where a run can't be found or read.
    """
    one, two = _found(old, new, store), _found(new, old, store)
    sides = [one.side, two.side]
    if one.id is not None and one.id == two.id:
        sides = [replace(each, note=_joined(each.note, "both are the same run")) for each in sides]
    elif sides[0].name == sides[1].name:
        sides = [
            replace(each, name=f"{each.name}, {word}")
            for each, word in zip(sides, ("old", "new"), strict=True)
        ]
    return compare(one.results, two.results, (sides[0], sides[1]))


def _joined(note: str, more: str) -> str:
    return f"{note}; {more}" if note else more


def _found(given: Given, beside: Given, store: Path | None) -> _Found:
    """beside: the other one, in whose store a run is looked for by its id."""
    if isinstance(given, Results):
        files = ", ".join(each.file for each in given.files) or "no file"
        return _Found(Side(files), given)
    if isinstance(given, Run):
        return _Found(_side(given.facts, given.about), given.results, given.id)
    text = str(given)
    if Path(text).is_dir():
        return _Found(Side(text), results_of(str(export_in(Path(text), str(beside))), store))
    with_file = text if text.endswith(SUFFIX) or isinstance(beside, Results | Run) else str(beside)
    with open_store(folder_of(with_file, store)) as opened:
        run = find_run(opened, text)
        results = stored_results(opened, run)
    side = _side(facts_of(run), run.about)
    return _Found(replace(side, note=_since(text, results)), results, run.id)


def _side(facts: RunFacts, about: Mapping[str, Any]) -> Side:
    """A run of a store, with its parameters, given or not, and what else it was asked for."""
    parameters = about.get("parameters")
    options = {name: v for name, v in facts.settings.items() if name not in NO_INPUTS}
    if isinstance(parameters, dict):
        own = cast("dict[Any, Any]", parameters)
        options = {name: v for name, v in options.items() if not name.startswith("set ")}
        options = {**{f"parameter {name}": str(v) for name, v in own.items()}, **options}
    name = f"{facts.file}, run {facts.id}" if facts.file else f"run {facts.id}"
    return Side(name, "", options)


def _since(text: str, results: Results) -> str:
    """That a file isn't any more what was run, where a file was named."""
    if not text.endswith(SUFFIX):
        return ""
    source, _ = read_source(Path(text))
    if source is None:
        return "the file can't be read now"
    now = sha256(source.text.encode()).hexdigest()
    if all(each.hash == now for each in results.files):
        return ""
    return "the file has changed since this run"
