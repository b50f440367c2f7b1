"""What a store says of a run beside its results: `StoredRun.about`, written and read.

When a run begins: `file` as it was given, `path` (whole, links followed; null for a text),
`settings` (option → value, those that were given), `parameters`, `versions` and `hashes` (name →
text). When it is finished: what `about_results` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, cast

from mechdsl.base.plural import plural
from mechdsl.results.results import Results
from mechdsl.store.runs import StoredRun


def about_results(
    results: Results, *, computed: int, stored: int, seconds: float
) -> dict[str, Any]:
    """What a finished run adds to what is said of it.

    computed, stored: rows that were run, and rows whose values the store had. seconds: that this
    and earlier attempts took.
    """
    outcomes = [outcome for each in results for outcome in each.outcomes]
    lost = [outcome for file in results.files for each in file.lost for outcome in each.outcomes]
    return {
        "experiments": len(results),
        "lost": sum(len(file.lost) for file in results.files),
        "held": sum(bool(outcome.holds) for outcome in outcomes),
        "expectations": len(outcomes) + len(lost),
        "computed": computed,
        "stored": stored,
        "seconds": round(seconds, 3),
    }


@dataclass(frozen=True)
class RunFacts:
    """What can be said of a run in a list; None where the store doesn't say it."""

    id: str
    state: str
    began: datetime
    """In the time zone of the reader."""
    file: str
    seconds: float | None
    experiments: int | None
    held: int | None
    expectations: int | None
    computed: int | None
    stored: int | None
    settings: Mapping[str, str]
    parameters: Mapping[str, str]
    versions: Mapping[str, str]
    hashes: Mapping[str, str]
    size: int
    """Bytes of its results."""

    @property
    def verdict(self) -> str:
        """`2 of 3 hold`; empty where nothing is expected."""
        return f"{self.held} of {self.expectations}" if self.expectations else ""

    @property
    def rows(self) -> str:
        """`96 computed, 32 from the store`."""
        if self.computed is None or self.stored is None:
            return ""
        return f"{plural(self.computed, 'row')} computed, {self.stored:,} from the store"

    def as_json(self) -> dict[str, Any]:
        """For programs: times as ISO 8601, what isn't known as null."""
        return {**vars(self), "began": self.began.isoformat(timespec="seconds")}


def facts_of(run: StoredRun) -> RunFacts:
    """The facts of a run; whoever wrote the store, what isn't of the right type isn't there."""
    about: Mapping[str, Any] = run.about

    def number(name: str) -> int | None:
        found = about.get(name)
        return found if type(found) is int else None

    def texts(name: str) -> dict[str, str]:
        found = about.get(name)
        if not isinstance(found, dict):
            return {}
        return {str(k): str(v) for k, v in cast("dict[Any, Any]", found).items() if v is not None}

    seconds, file = about.get("seconds"), about.get("file")
    if type(seconds) not in (int, float) and run.ended is not None:
        seconds = run.ended - run.began
    return RunFacts(
        id=run.id,
        state=run.state,
        began=datetime.fromtimestamp(run.began).astimezone(),
        file=file if type(file) is str else "",
        seconds=seconds if type(seconds) in (int, float) else None,
        experiments=number("experiments"),
        held=number("held"),
        expectations=number("expectations"),
        computed=number("computed"),
        stored=number("stored"),
        settings=texts("settings"),
        parameters=texts("parameters"),
        versions=texts("versions"),
        hashes=texts("hashes"),
        size=run.size,
    )


def with_hashes(facts: RunFacts, results: Results) -> RunFacts:
    """The facts with the hashes of what the results were made of, each once."""
    found: dict[str, str] = {}
    for each in results:
        for name, value in each.hashes.items():
            if value and value not in found.values():
                found[name if name not in found else f"{name} of {each.name}"] = value
    return replace(facts, hashes={**found, **facts.hashes})
