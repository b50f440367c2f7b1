"""`save top … rows of` lines: the rows in which features are most active, written to a file."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from mechdsl.base.files import replace_file
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.observation.active_rows import ActiveRows, FeatureSummary
from mechdsl.execute.observation.token_vectors import read_token_vectors
from mechdsl.execute.patching.rule_inputs import DerivedRuns
from mechdsl.execute.run.direction_files import report_not_written
from mechdsl.execute.run_record import ExecutionOptions, SavedFile
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.vectors import DirectionFits, split_prompts
from mechdsl.forward.hooks.batch import is_out_of_memory, release_memory
from mechdsl.forward.hooks.coordinates import CoordinateSystem
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.planner.passes import make_plan
from mechdsl.planner.plan import build_save_panel
from mechdsl.program.paths import path_to_write
from mechdsl.prompts.runs import RunRow
from mechdsl.resolve.observations import join_positions
from mechdsl.resolve.types import BasisMember, ResolvedExperiment, ResolvedSave
from mechdsl.store.files import write_aside, write_lines

PART_ROWS = 1024
"""Number of rows that are read together of a file that is read in parts."""

SECONDS_BETWEEN_SAVES = 60.0
"""Time after which the state of a long run is saved again."""


class RowsRefused(Exception):
    """Rows of a later part that have errors."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        super().__init__(str(diagnostics[0]))
        self.diagnostics = list(diagnostics)


@dataclass(frozen=True, eq=False)
class RowParts:
    """The rows of an experiment, read in parts."""

    count: int
    """Number of records of the file."""
    part: Callable[[Sequence[int]], tuple[ResolvedExperiment | None, int]]
    """Returns the experiment with these rows only, and how many are left out because they are
    longer than the model's context. None if no rows are left. Raises RowsRefused."""
    key: bytes | None
    """Digest of all that determines the results; None if it can't be computed. Then an interrupted
    run begins anew."""


def save_feature_rows(
    experiment: ResolvedExperiment,
    models: Mapping[str, LoadedModel],
    options: ExecutionOptions,
    parts: RowParts | None,
) -> tuple[list[SavedFile], list[Diagnostic]]:
    """Write the files of an experiment's `save top … rows of` lines.

    Args:
        parts: The rows; None for those of the experiment's table.

    Returns:
        The files, and diagnostics: E0533 for a file that can't be written, E0641 for a basis or a
        run that can't be computed, and errors of rows.
    """
    saved: list[SavedFile] = []
    problems: list[Diagnostic] = []
    for save in (each for each in experiment.saves if each.basis is not None):
        try:
            written, found = _write_file(experiment, save, models, options, parts)
        except OSError as error:
            problems.append(report_not_written(save.spec, error))
            continue
        saved += [] if written is None else [written]
        problems += found
    return saved, problems


def _write_file(
    experiment: ResolvedExperiment,
    save: ResolvedSave,
    models: Mapping[str, LoadedModel],
    options: ExecutionOptions,
    parts: RowParts | None,
) -> tuple[SavedFile | None, list[Diagnostic]]:
    """Write the file of a line; None after an error. Raises OSError."""
    assert save.basis is not None
    path, problems = path_to_write("save", save.spec.file, save.spec.span)
    if path is None:
        return None, problems
    writer = _FeatureRows(experiment, save, models, options, path)
    system, problems = writer.fits.of_basis(save.basis, save.spec.span)
    if system is None:
        return None, problems
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return writer.write(system, parts), []
    except RowsRefused as refused:
        return None, refused.diagnostics


class _FeatureRows:
    """Writer of one line's file."""

    def __init__(
        self,
        experiment: ResolvedExperiment,
        save: ResolvedSave,
        models: Mapping[str, LoadedModel],
        options: ExecutionOptions,
        path: Path,
    ) -> None:
        self.experiment, self.save, self.options, self.path = experiment, save, options, path
        self.number = experiment.saves.index(save)
        self.too_long = 0
        """Number of rows that are left out because they are longer than the model's context."""
        self.model = models[experiment.model.key]
        self.others = {name: models[name] for name in build_save_panel(experiment).models[1:]}
        self.fits = DirectionFits(self.model, self.others, experiment.seed, options.side)

    def write(self, system: CoordinateSystem, parts: RowParts | None) -> SavedFile:
        """Read the rows and write the file. Raises OSError, RowsRefused."""
        save, basis = self.save, self.save.basis
        assert basis is not None
        assert save.spec.rows is not None
        (member,) = basis.members
        which = basis.coordinates[()].which or range(member.size)
        found = ActiveRows(which, save.spec.rows, explains=not member.reads)
        begun = 0
        if parts is None:
            self._read(self.experiment, system, found)
        else:
            begun = self._read_parts(parts, system, found)
        rows = self._rows_to_show(found.kept_rows.tolist(), parts)
        with write_aside(self.path) as aside:
            write_lines(aside, (self._line(*each, member, rows) for each in found.summaries()))
        if parts is not None:
            self._state_path.unlink(missing_ok=True)
        return self._summary(found, member, begun)

    # --- reading ----------------------------------------------------------------------------------

    def _read_parts(self, parts: RowParts, system: CoordinateSystem, found: ActiveRows) -> int:
        """Read all parts; return the record at which an interrupted run was continued."""
        begun = done = self._restored(parts.key, found)
        last = monotonic()
        while done < parts.count:
            end = min(done + PART_ROWS, parts.count)
            part, too_long = parts.part(range(done, end))
            if part is not None:
                self._read(part, system, found)
            done = end
            self.too_long += too_long
            if self.options.on_progress is not None:
                self.options.on_progress(done, parts.count)
            if parts.key is not None and monotonic() - last >= SECONDS_BETWEEN_SAVES:
                self._keep(parts.key, done, found)
                last = monotonic()
        return begun

    def _read(self, part: ResolvedExperiment, system: CoordinateSystem, found: ActiveRows) -> None:
        """Read the rows of one part's table."""
        save, panel = part.saves[self.number], build_save_panel(part)
        runs = UnpatchedRuns(
            panel, self.model, (), plan=make_plan([]), side=self.options.side, others=self.others
        )
        run, points = runs.named(save.run), save.points
        model, size = runs.model_of(run), self.options.prompt_tokens
        batches = split_prompts(model, run, points, tokens=size)
        problems = DerivedRuns.define(panel.derived, runs, batches, self.fits)[1]
        if problems:
            raise RowsRefused(problems)
        wide = torch.promote_types(model.dtype, torch.float32)
        inputs = torch.empty(0, dtype=wide, device=model.device)
        spot, lanes = join_positions(save.cells), runs.reader(run, points)
        there = np.flatnonzero([bool(hits) for hits in spot.hits])
        numbers = np.array(part.table.row_ids, dtype=np.int64)
        due = deque(split_prompts(model, run, points, there, size))
        while due:
            rows = due.popleft()
            try:
                keys = [b""] * len(rows)
                given = model, run, lanes, [points], spot, rows, keys
                own = read_token_vectors(*given, encoding=(system, inputs))[points]
            except Exception as error:
                if len(rows) == 1 or not is_out_of_memory(error):
                    raise
                own = None
            runs.forget()
            if own is None:
                release_memory()
                due.extendleft(np.array_split(rows, 2)[::-1])
            else:
                found.add(own, numbers[rows], system, inputs)

    # --- state of a long run ----------------------------------------------------------------------

    @property
    def _state_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.state.npz")

    def _keep(self, key: bytes, done: int, found: ActiveRows) -> None:
        """Save what is known after some records."""
        arrays: dict[str, Any] = found.state()
        arrays |= {"done": np.array(done), "too long": np.array(self.too_long)}
        with replace_file(self._state_path) as made, made.open("wb") as file:
            np.savez(file, key=np.frombuffer(key, np.uint8), **arrays)

    def _restored(self, key: bytes | None, found: ActiveRows) -> int:
        """Return the number of records that an interrupted run has read, and restore its state."""
        if key is None or not self._state_path.is_file():
            return 0
        with suppress(OSError, ValueError, KeyError, BadZipFile), np.load(self._state_path) as kept:
            if kept["key"].tobytes() == key:
                found.restore(kept)
                self.too_long = int(kept["too long"])
                return int(kept["done"])
        return 0

    # --- writing ----------------------------------------------------------------------------------

    def _rows_to_show(self, numbers: Sequence[int], parts: RowParts | None) -> dict[int, RunRow]:
        """Return the rows with these numbers."""
        if parts is None:
            return self._by_number(self.experiment)
        found: dict[int, RunRow] = {}
        for begin in range(0, len(numbers), PART_ROWS):
            part, _ = parts.part(numbers[begin : begin + PART_ROWS])
            found |= {} if part is None else self._by_number(part)
        return found

    def _by_number(self, part: ResolvedExperiment) -> dict[int, RunRow]:
        table = part.table
        return dict(zip(table.row_ids, table.runs[self.save.run].rows, strict=True))

    def _line(
        self,
        feature: int,
        about: FeatureSummary,
        member: BasisMember,
        rows: Mapping[int, RunRow],
    ) -> str:
        """Return the line of a feature."""
        label = None if member.labels is None else member.labels.texts.get(feature)
        text = self.experiment.model.tokenizer.token_text
        line = {
            "index": feature,
            **({} if label is None else {"description": label}),
            "density": about.density,
            "mean": about.mean,
            "rows": [
                {
                    "row": each.row,
                    "activation": max(each.values),
                    "text": rows[each.row].text,
                    "tokens": [text(token) for token in rows[each.row].ids],
                    "at": each.tokens,
                    "activations": each.values,
                    "values": dict(rows[each.row].values),
                }
                for each in about.rows
            ],
        }
        return json.dumps(line, ensure_ascii=False, default=str)

    def _summary(self, found: ActiveRows, member: BasisMember, begun: int) -> SavedFile:
        said, count = self.save.spec, len(found.features)
        note = f"{int(found.active.sum()):,} of {count_noun(count, 'feature')} are active"
        if found.explained is not None:
            note += f"; `{member.name}` explains {found.explained:.3f} of the variance"
        if self.too_long:
            left_out = count_noun(self.too_long, "row")
            note += f"; {left_out} longer than the model's context left out"
        if begun:
            note += f"; continued after {count_noun(begun, 'record')}"
        return SavedFile(
            experiment=self.experiment.key,
            kind="rows",
            site=said.site.span.written,
            at=said.at.span.written,
            run=self.save.run,
            path=self.path,
            dtype=str(torch.promote_types(self.model.dtype, torch.float32)).removeprefix("torch."),
            tensors=count,
            vectors=found.tokens,
            rows=found.rows,
            bytes=self.path.stat().st_size,
            note=note,
        )
