"""The results of a run in memory, which are also a JSON document, a table and a data frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from mechdsl.base.files import write_whole
from mechdsl.base.names import name_list
from mechdsl.base.plural import plural
from mechdsl.base.visible import json_text
from mechdsl.diagnostics.raised import Diagnostics
from mechdsl.execute.saved import Saved
from mechdsl.results.against import Against, Change
from mechdsl.results.experiment_result import ExperimentResult, FileResult, csv_text, frame
from mechdsl.results.shown import AS_HTML, AS_JUNIT, LINE_WIDTH, MOST_LINES, shown_by

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class Results:
    """What `mechdsl.run` returns: `results["name"]` is an experiment, iterating gives them all."""

    files: tuple[FileResult, ...]
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of the packages that numbers depend on; `mechdsl` is among them."""
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    """The warnings of the run, and reports that could not be written."""
    written: tuple[Path, ...] = ()
    """The files of reports (`report … to "x.png"`), in the order of the program."""
    profile: str = ""
    """Estimated against measured work, with `profile=True`."""
    notes: tuple[str, ...] = ()
    """What the store had to do with it: that nothing was run, or why nothing of it is kept."""
    against: Against | None = None
    """What has changed since an earlier run, with `against=…`."""

    @property
    def experiments(self) -> tuple[ExperimentResult, ...]:
        """In the order of the program."""
        return tuple(each for file in self.files for each in file.experiments)

    @property
    def saved(self) -> tuple[Saved, ...]:
        """The files that `save` lines have written, in the order of the program."""
        return tuple(each for file in self.files for each in file.saved)

    @property
    def holds(self) -> bool:
        """Whether every expectation of every experiment does, and was decided."""
        lost = [each for file in self.files for each in file.lost]
        left = any(each.expects for file in self.files for each in file.not_run)
        if left or any(each.outcomes for each in lost):
            return False
        return all(each.holds for each in self.experiments)

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What held, or was computed, in the run that this one is set against, and isn't now.

        Raises ValueError where it is set against none: no regression would be known.
        """
        if self.against is None:
            raise ValueError(
                "these results are set against no other run: `mechdsl.run(…, against=…)` does that"
            )
        return self.against.regressions

    @property
    def complete(self) -> bool:
        """Whether every experiment and every measure was computed, and every expectation
        decided."""
        return all(file.complete for file in self.files)

    def __getitem__(self, name: str) -> ExperimentResult:
        """The experiment of this name (the first one, over several files); else KeyError."""
        for each in self.experiments:
            if each.name == name:
                return each
        known = name_list(each.name for each in self.experiments) or "none"
        raise KeyError(f"no experiment `{name}` in these results; there are: {known}")

    def __iter__(self) -> Iterator[ExperimentResult]:
        return iter(self.experiments)

    def __len__(self) -> int:
        return len(self.experiments)

    def records(self) -> list[dict[str, Any]]:
        """One flat record per cell and measure of every experiment, None where a number is
        missing."""
        return [
            {"file": file.file, **record}
            for file in self.files
            for each in file.experiments
            for record in each.records()
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """A frame with one row per cell and measure of every experiment.

        Raises ImportError without pandas, which the extra `mechdsl[frames]` installs.
        """
        return frame(self.records())

    def to_csv(self) -> str:
        """What `mechdsl run --format csv` prints: one line per cell and measure; an axis that an
        experiment lacks is empty."""
        return csv_text(self.records())

    def to_dict(self) -> dict[str, Any]:
        """The document of `mechdsl run --format json`."""
        from mechdsl.results.document import results_document  # which takes a while to import

        return results_document(self.files, self.versions, self.against).as_json()

    def to_json(self, path: str | Path | None = None, *, indent: int | None = 2) -> str:
        """The document as text, also written to `path` if one is given."""
        text = json_text(self.to_dict(), indent)
        if path is not None:
            write_whole(Path(path), text + "\n")
        return text

    def to_text(self, width: int = 100) -> str:
        """What the command line prints, `width` columns wide: tables, figures, verdicts, and what
        was saved."""
        texts = [each.to_text(width) for each in self.experiments]
        texts += [f"{each.line}\n" for each in self.saved]
        return "".join([*texts, "" if self.against is None else self.against.to_text(width)])

    def to_junit(self, path: str | Path | None = None) -> str:
        """What `mechdsl run --junit` writes: JUnit XML with a test per expectation, also written to
        `path` if one is given.

        Raises OSError where that can't be written.
        """
        text: str = shown_by(AS_JUNIT)(self)
        if path is not None:
            write_whole(Path(path), text)
        return text

    def __repr__(self) -> str:
        count = plural(len(self), "experiment")
        asked = sum(len(each.outcomes) for each in self)
        held = sum(outcome.holds for each in self for outcome in each.outcomes)
        verdict = f", {held} of {asked} expectations hold" if asked else ""
        files = ", ".join(file.file for file in self.files)
        lines = [f"{files}: {count}{verdict}", *(e.summary for e in self.experiments[:MOST_LINES])]
        if len(self) > MOST_LINES:
            lines.append(f"and {len(self) - MOST_LINES} more")
        shown = [shorten(line, LINE_WIDTH, placeholder=" …") for line in lines]
        return "<Results " + "\n  ".join(shown) + ">"

    def _repr_html_(self) -> str:
        return "".join(shown_by(AS_HTML)(each) for each in self.experiments)
