"""The results of a run in memory, which are also a JSON document and a data frame."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechdsl.results.document import results_document
from mechdsl.results.experiment_result import ExperimentResult, FileResult, frame, html_table

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Results:
    """What `mechdsl.run` returns."""

    files: tuple[FileResult, ...]
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of the packages that numbers depend on; `mechdsl` is among them."""

    @property
    def experiments(self) -> tuple[ExperimentResult, ...]:
        return tuple(each for file in self.files for each in file.experiments)

    @property
    def holds(self) -> bool:
        """Whether every expectation of every experiment does."""
        lost = [each for file in self.files for each in file.lost]
        return all(each.holds for each in self.experiments) and not any(e.outcomes for e in lost)

    @property
    def complete(self) -> bool:
        """Whether every experiment and every measure could be computed."""
        return all(file.complete for file in self.files)

    def __getitem__(self, name: str) -> ExperimentResult:
        """The experiment of this name (the first one, over several files)."""
        for each in self.experiments:
            if each.name == name:
                return each
        known = ", ".join(f"`{each.name}`" for each in self.experiments) or "none"
        raise KeyError(f"no experiment `{name}` in these results; there are: {known}")

    def __iter__(self) -> Iterator[ExperimentResult]:
        return iter(self.experiments)

    def __len__(self) -> int:
        return len(self.experiments)

    def to_pandas(self) -> pandas.DataFrame:
        """A frame with one row per cell and measure of every experiment (needs pandas)."""
        records = [
            {"file": file.file, **record}
            for file in self.files
            for each in file.experiments
            for record in each.records()
        ]
        return frame(records)

    def to_dict(self) -> dict[str, Any]:
        """The document of `mechdsl run --format json`."""
        return results_document(self.files, self.versions).as_json()

    def to_json(self, path: Path | None = None, *, indent: int | None = 2) -> str:
        """The document as text, also written to `path` if one is given."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=indent)
        if path is not None:
            path.write_text(text + "\n", encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        return "".join(html_table(each) for each in self.experiments)
