"""`save` lines: vectors go from the passes to a file, a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e05_paths import CannotWrite
from mechdsl.execute.derived_runs import DerivedRuns
from mechdsl.execute.directions import DirectionFits
from mechdsl.execute.options import Options
from mechdsl.execute.read_vectors import prompt_batches, read_vectors
from mechdsl.execute.saved import Saved
from mechdsl.execute.saved_replies import SavedRows, rows_to_save
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.make_plan import make_plan
from mechdsl.plan.plan import PROMPT_TOKENS
from mechdsl.plan.save_plan import SaveLayout, save_panel
from mechdsl.program.named_paths import path_to_write
from mechdsl.prompts.prompt_table import Run
from mechdsl.resolve.resolved import ResolvedExperiment, ResolvedSave
from mechdsl.resolve.saves import tensor_name
from mechdsl.store.tensor_files import TensorFile, TensorPlace, beside, tensor_file, write_lines

_KINDS = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
}  # fmt: skip


def save_vectors(
    experiment: ResolvedExperiment, models: Mapping[str, LoadedModel], options: Options
) -> tuple[list[Saved], list[Diagnostic]]:
    """Write the files of an experiment's `save` lines, one after the other, as their rows come out
    of the model.

    E0533 for a file that can't be written, of which nothing is left then.
    """
    panel = save_panel(experiment)
    model = models[experiment.model.key]
    others = {name: models[name] for name in panel.models[1:]}
    plan = make_plan([])
    runs = UnpatchedRuns(panel, model, (), plan=plan, side=options.side, others=others)
    size = options.prompt_tokens or PROMPT_TOKENS
    saved: list[Saved] = []
    problems: list[Diagnostic] = []
    for save in experiment.saves:
        run = runs.named(save.run)
        batches = prompt_batches(runs.model_of(run), run, save.points, tokens=size)
        fits = DirectionFits(model, others, runs.seed, options.side)
        found = DerivedRuns.define(panel.derived, runs, batches, fits)[1]
        if found:
            return saved, [*problems, *found]
        rows = rows_to_save(save, run, runs, batches)
        if rows.replies:
            batches = prompt_batches(runs.model_of(run), rows.run, save.points, tokens=size)
        try:
            saved.append(_Saving(experiment, rows, runs).written(batches))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            span, file = save.spec.span, save.spec.file
            problems.append(CannotWrite(span=span, construct="save", path=file, reason=reason))
        runs.forget()
    return saved, problems


@dataclass(frozen=True, eq=False)
class _Saving:
    """One line on its way to the disk."""

    experiment: ResolvedExperiment
    rows: SavedRows
    runs: UnpatchedRuns

    @property
    def save(self) -> ResolvedSave:
        """With the places of the rows."""
        return self.rows.save

    @property
    def run(self) -> Run:
        """What is read."""
        return self.rows.run

    def written(self, batches: Sequence[Ints]) -> Saved:
        """Raises OSError where the file, or what stands beside it, can't be written."""
        path, problems = path_to_write("save", self.save.spec.file, self.save.spec.span)
        if path is None:
            raise OSError(problems[0].message)
        rows_path, layout = path.with_suffix(".jsonl"), self.layout
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(rows_path) as rows, beside(path) as aside:
            write_lines(rows, self._rows())
            with tensor_file(aside, self._places(), self._metadata()) as file:
                self._fill(file, batches)
        said = self.save.spec
        return Saved(
            experiment=self.experiment.key,
            site=said.site.span.written,
            at=said.at.span.written,
            run=self.save.run,
            path=path,
            rows_path=rows_path,
            dtype=str(self._dtype()).removeprefix("torch."),
            tensors=len(layout.widths),
            vectors=layout.vectors,
            rows=len(np.unique(self.rows.of[layout.counts > 0])),
            bytes=file.size,
        )

    @cached_property
    def layout(self) -> SaveLayout:
        shape, also = self.runs.model_of(self.run).shape, tuple(self.rows.told_apart)
        return SaveLayout.of(self.save, self.run, shape, also)

    def _dtype(self) -> torch.dtype:
        name = self.save.spec.dtype
        return self.runs.model_of(self.run).dtype if name is None else getattr(torch, name)

    def _places(self) -> dict[str, TensorPlace]:
        """Every tensor of the file; how many vectors there are hangs on positions alone."""
        count, kind = self.layout.vectors, _KINDS[self._dtype()]
        found = {name: TensorPlace(kind, (count, n)) for name, n in self.layout.widths.items()}
        return found | {name: TensorPlace("I64", (count,)) for name in self.layout.columns}

    def _fill(self, file: TensorFile, batches: Sequence[Ints]) -> None:
        """Vectors in the order of the table: row by row, there reply by reply, and position by
        position."""
        lanes = self.runs.reader(self.run, self.save.points)
        found = read_vectors(lanes, self.save.points, self.save.cells, batches)
        row_ids = np.array(self.experiment.table.row_ids, dtype=np.int64)
        begin, told_apart = 0, self.rows.told_apart
        for _, batch in groupby(found, key=lambda each: each.batch):
            parts = list(batch)
            own = [part for part in parts if part.point == 0]
            position = np.concatenate([np.full(len(p.prompts), p.position) for p in own])
            columns = {
                name: np.concatenate([getattr(p, of) for p in own])
                for name, of in (("row", "prompts"), ("token", "tokens"), ("draw", "draws"))
            } | {"position": position}
            order = np.lexsort((columns["draw"], position, columns["row"]))
            columns |= {name: which[columns["row"]] for name, which in told_apart.items()}
            columns["row"] = row_ids[self.rows.of[columns["row"]]]
            for name, values in columns.items():
                if name in self.layout.columns:
                    file.put(name, begin, values[order].astype("<i8").tobytes())
            for number, point in enumerate(self.save.points):
                vectors = torch.cat([p.vectors for p in parts if p.point == number])
                file.put(tensor_name(point), begin, _bytes(vectors, order, self._dtype()))
            begin += len(order)
            if len(batches) > 1:  # what runs with rules are made of
                self.runs.forget()

    def _rows(self) -> Iterator[str]:
        """A line for each row, or reply, that has a vector."""
        counts, replies = self.layout.counts, self.rows.replies
        tokenizer = self.experiment.model.tokenizer
        for number, row in enumerate(self.run.rows):
            if counts[number]:
                about = {
                    "row": self.experiment.table.row_ids[self.rows.of[number]],
                    **{name: int(each[number]) for name, each in self.rows.told_apart.items()},
                    "text": row.text,
                    **({"reply": replies[number].text} if replies else {}),
                    "tokens": [tokenizer.token_text(token) for token in row.ids],
                    "ids": list(row.ids),
                    "values": dict(row.values),
                }
                yield json.dumps(about, ensure_ascii=False, default=str)

    def _metadata(self) -> dict[str, str]:
        save, experiment = self.save, self.experiment
        return {
            "experiment": experiment.key,
            "model": self.run.model or experiment.model.name,
            "prompts": experiment.table.name,
            "run": save.run,
            "at": save.spec.at.span.written,
            "positions": json.dumps([cell.label for cell in save.cells], ensure_ascii=False),
        }


def _bytes(vectors: Tensor, order: Ints, dtype: torch.dtype) -> memoryview:
    """[K, width] in an order, as the file has them."""
    own = vectors[torch.from_numpy(order).to(vectors.device)].to(dtype).cpu().contiguous()
    whole: Any = own.view(torch.uint8).numpy()
    return memoryview(whole.reshape(-1))
