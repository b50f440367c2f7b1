"""`save` lines: directions, vectors from passes or their means, and rows of features, as files."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from time import monotonic
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.base.files import replace_file
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.experiments import NoEstimate
from mechdsl.diagnostics.files import ReportNotWritable
from mechdsl.diagnostics.rules import EmptyDirection
from mechdsl.execute.measurement.readout import Readout
from mechdsl.execute.observation.features import ActiveRows, FeatureSummary
from mechdsl.execute.observation.token_vectors import read_token_vectors
from mechdsl.execute.patching.differentiated_run import read_gradients
from mechdsl.execute.patching.rule_inputs import DerivedRuns
from mechdsl.execute.run_record import ExecutionOptions, SavedFile
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.vectors import DirectionFits, SiteVectors, read_vectors, split_prompts
from mechdsl.fits.vectors import split_edit
from mechdsl.forward.hooks.backward_rules import AutogradFailed
from mechdsl.forward.hooks.batch import try_pass
from mechdsl.forward.hooks.coordinates import CoordinateSystem
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.shape import ModelShape
from mechdsl.planner.passes import make_plan
from mechdsl.planner.plan import PROMPT_TOKENS, SaveLayout, build_save_panel, split_gradient_batches
from mechdsl.program import spec
from mechdsl.program.paths import path_to_write
from mechdsl.prompts.positions.cells import find_reply_tokens
from mechdsl.prompts.rows import row_in_patches
from mechdsl.prompts.runs import Hits, PositionCell, PromptRun, RunRow
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.resolve.observations import join_positions
from mechdsl.resolve.runs import name_tensor
from mechdsl.resolve.trainings import name_edit_tensors
from mechdsl.resolve.types import (
    BasisMember,
    ResolvedDirectionFile,
    ResolvedExperiment,
    ResolvedSave,
)
from mechdsl.store.files import (
    TensorEntry,
    TensorFile,
    create_tensor_file,
    sync_file,
    write_aside,
    write_lines,
)
from mechdsl.vocab.metrics import Reply


def write_direction_file(
    file: ResolvedDirectionFile,
    experiment: ResolvedExperiment,
    model: LoadedModel,
    fits: DirectionFits,
) -> tuple[SavedFile | None, list[Diagnostic]]:
    """Compute the directions of a line and write them.

    Args:
        model: The experiment's model.

    Returns:
        The file; E0641 for a direction that can't be computed or is 0, and OSError is passed on.
    """
    span, written = file.spec.span, file.spec.direction.span.written
    found, problems = fits.of_members(list(file.members.values()), span)
    if problems:
        return None, problems
    path, refused = path_to_write("save", file.spec.file, span)
    if path is None:
        return None, refused
    dtype = getattr(torch, file.spec.stored_dtype)
    tensors: dict[str, Tensor] = {}
    for name, member in file.members.items():
        tensors |= _name_tensors(name, found[member.name].to(dtype))
    made = {name: member.made for name, member in file.members.items()}
    metadata = {
        "experiment": experiment.key,
        "model": experiment.model.name,
        "direction": written,
        "made": json.dumps(made, ensure_ascii=False),
    }
    if file.control_vector:
        size = _write_control_vector(path, tensors, metadata, model)
    else:
        size = write_tensors(path, tensors, metadata)
    notes = [f"selected {experiment.picks[written]}"] if written in experiment.picks else []
    notes += ["without layer 0, to which llama.cpp adds nothing"] if file.without_first else []
    return SavedFile(
        experiment=experiment.key,
        kind="control vector" if file.control_vector else "direction",
        direction=written,
        path=path,
        dtype=file.spec.stored_dtype,
        tensors=len(tensors),
        vectors=1,
        bytes=size,
        note="; ".join(notes),
    ), []


def _name_tensors(name: str, vector: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a vector [width], or of the matrix of an edit, by their names."""
    if vector.ndim == 1:
        return {name: vector}
    return dict(zip(name_edit_tensors(name), split_edit(vector), strict=True))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write a safetensors file and return its size. Raises OSError."""
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside:
        aside.write_bytes(data)
        sync_file(aside)
    return len(data)


def _write_control_vector(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: LoadedModel
) -> int:
    """Write a GGUF file of `direction.LAYER` tensors and return its size. Raises OSError.

    llama.cpp adds `direction.n` to the residual stream after block n, at every token.
    """
    from gguf import GGUFWriter

    config: object = getattr(model.module, "config", None)
    hint = getattr(config, "model_type", None) or model.shape.architecture
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside:
        writer = GGUFWriter(aside, "controlvector")
        writer.add_string("controlvector.model_hint", str(hint))
        writer.add_uint32("controlvector.layer_count", len(tensors))
        for name, text in metadata.items():
            writer.add_string(f"mechdsl.{name}", text)
        for name, vector in tensors.items():
            writer.add_tensor(name, vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        sync_file(aside)
        return aside.stat().st_size


def report_not_written(save: spec.Save | spec.SavedDirection, error: OSError) -> Diagnostic:
    """Return E0533."""
    reason = (error.strerror or str(error)).lower()
    return ReportNotWritable(span=save.span, construct="save", path=save.file, reason=reason)


# --- vectors --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SavedRows:
    """Rows that a `save` line reads: rows of a run, or one row for each reply."""

    line: ResolvedSave
    """With cells for these rows."""
    run: PromptRun
    of: Ints
    """[row] its number in the table."""
    replies: Sequence[Reply] = ()
    """[row] the reply after its prompt; empty if no replies are read."""
    told_apart: Mapping[str, Ints] = field(default_factory=dict[str, Ints])
    """[row] its draw and sample, if a prompt has several replies."""


def select_rows_to_save(
    save: ResolvedSave, run: PromptRun, runs: UnpatchedRuns, batches: Sequence[Ints]
) -> SavedRows:
    """Select the rows that a line reads.

    These are the rows of its run; for a line that reads replies, one row for each draw and sample,
    with resolved positions in the reply.

    Args:
        run: Its run.
        batches: Batches of rows for generation, which together contain all rows in order.
    """
    prompts = np.arange(len(run.rows), dtype=np.int64)
    if runs.writer is None or not save.in_reply:
        return SavedRows(save, run, prompts)
    samples, draws = runs.writer.generation.samples, run.draws
    replies = [
        reply for batch in batches for own in runs.writer.of_run(run, batch) for reply in own
    ]
    of = np.repeat(prompts, draws * samples)
    draw = np.tile(np.repeat(np.arange(draws), samples), len(prompts))
    sample = np.tile(np.arange(samples), len(prompts) * draws)
    tokenizer = runs.model_of(run).tokenizer
    assert tokenizer is not None
    decode = tokenizer.decode
    numbers = of.tolist()
    prompts_and_replies = list(zip(numbers, replies, strict=True))

    def found(cell: PositionCell) -> PositionCell:
        if cell.reply is None:
            return replace(cell, hits=tuple(cell.hits[row] for row in numbers))
        hits: list[Hits] = []
        for row, reply in prompts_and_replies:
            tokens = find_reply_tokens(cell.reply.of_row(row), reply.ids, reply.text, decode)
            placed = tuple(len(run.rows[row].ids) - 1 + token for token in tokens)
            hits.append((placed,) if placed else ())
        return replace(cell, hits=tuple(hits), reply=None)

    rows = tuple(_append_reply(run.rows[row], reply) for row, reply in prompts_and_replies)
    noise = run.noise
    if noise is not None:
        keys = runs.table.row_keys if noise.row_keys is None else noise.row_keys
        noise = replace(
            noise,
            positions=tuple(noise.positions[row] for row in numbers),
            row_keys=tuple(keys[row] for row in numbers),
            samples=1,
            drawn=tuple(draw.tolist()),
        )
    several = [("draw", draw, draws), ("sample", sample, samples)]
    return SavedRows(
        replace(save, cells=tuple(map(found, save.cells))),
        replace(run, rows=rows, noise=noise),
        of,
        replies,
        {name: which for name, which, count in several if count > 1},
    )


def _append_reply(row: RunRow, reply: Reply) -> RunRow:
    return replace(
        row,
        ids=(*row.ids, *reply.ids),
        offsets=(*row.offsets, *((0, 0) for _ in reply.ids)),
        special=(*row.special, *(False for _ in reply.ids)),
    )


_DTYPE_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
}  # fmt: skip


def save_vectors(
    experiment: ResolvedExperiment, models: Mapping[str, LoadedModel], options: ExecutionOptions
) -> tuple[list[SavedFile], list[Diagnostic]]:
    """Write the files of an experiment's `save` lines except rows of features, batch by batch.

    Returns:
        The files, and diagnostics: E0533 for a file that can't be written, of which nothing
        remains; E0641 for directions and means that can't be computed.
    """
    panel = build_save_panel(experiment)
    model = models[experiment.model.key]
    others = {name: models[name] for name in panel.models[1:]}
    plan = make_plan([])
    size = options.prompt_tokens
    saved: dict[int, SavedFile] = {}
    problems: list[Diagnostic] = []
    fits = DirectionFits(model, others, experiment.seed, options.side)
    for save in (each for each in experiment.saves if each.basis is None):
        readouts = () if save.gradient is None else (Readout.of([save.gradient]),)
        runs = UnpatchedRuns(panel, model, readouts, plan=plan, side=options.side, others=others)
        run = runs.named(save.run)
        if save.gradient is None:
            batches = split_prompts(runs.model_of(run), run, save.points, tokens=size)
        else:
            batches = split_gradient_batches(
                runs.model_of(run).shape, save, run, size or PROMPT_TOKENS
            )
        diagnostics = DerivedRuns.define(panel.derived, runs, batches, fits)[1]
        if diagnostics:
            problems += diagnostics
            break
        rows = select_rows_to_save(save, run, runs, batches)
        if rows.replies:
            batches = split_prompts(runs.model_of(run), rows.run, save.points, tokens=size)
        writer = _SavedMeans if save.spec.mean else _SavedRun
        try:
            saved[save.spec.span.start] = writer(experiment, rows, runs).written(batches)
        except OSError as error:
            problems.append(report_not_written(save.spec, error))
        except _NoMean as error:
            problems.append(error.diagnostic)
        except AutogradFailed as refused:
            problems.append(_report_no_gradient(save, str(refused)))
    for file in experiment.direction_files:
        try:
            written, diagnostics = write_direction_file(file, experiment, model, fits)
        except OSError as error:
            problems.append(report_not_written(file.spec, error))
            continue
        if written is not None:
            saved[file.spec.span.start] = written
        problems += diagnostics
    return [saved[start] for start in sorted(saved)], problems


def _report_no_gradient(save: ResolvedSave, said: str) -> NoEstimate:
    """Return E0608 for a model that autograd can't differentiate."""
    return NoEstimate(
        span=save.spec.span,
        statement="save gradient",
        verb="differentiate",
        what=f"`{save.spec.metric}`",
        reason=f"autograd can't follow the model ({said[:200]})",
        hint="save gradients of a model without in-place operations",
    )


@dataclass(frozen=True, eq=False)
class _SavedRun:
    """Writer of one line's file."""

    experiment: ResolvedExperiment
    rows: SavedRows
    runs: UnpatchedRuns

    @property
    def save(self) -> ResolvedSave:
        """The line, with positions for the rows."""
        return self.rows.line

    @property
    def run(self) -> PromptRun:
        """The run that is read."""
        return self.rows.run

    def written(self, batches: Sequence[Ints]) -> SavedFile:
        """Write the file and its rows. Raises OSError if that fails."""
        path = self._path()
        rows_path = path.with_suffix(".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(rows_path) as rows, write_aside(path) as aside:
            write_lines(rows, self._rows())
            with create_tensor_file(aside, self._places(), self._metadata()) as file:
                self._fill(file, batches)
        return self._summary(path, "vectors", file.size, rows_path)

    def _path(self) -> Path:
        """Return the path of the file. Raises OSError if it may not be written."""
        path, problems = path_to_write("save", self.save.spec.file, self.save.spec.span)
        if path is None:
            raise OSError(problems[0].message)
        return path

    def _summary(
        self, path: Path, kind: Literal["vectors", "means"], size: int, rows_path: Path | None
    ) -> SavedFile:
        said, layout = self.save.spec, self.layout
        return SavedFile(
            experiment=self.experiment.key,
            kind=kind,
            site=said.what,
            at=said.at.span.written,
            run=self.save.run,
            path=path,
            rows_path=rows_path,
            dtype=str(self._dtype()).removeprefix("torch."),
            tensors=len(layout.widths),
            vectors=layout.vectors,
            rows=len(np.unique(self.rows.of[layout.counts > 0])),
            bytes=size,
        )

    @property
    def _shape(self) -> ModelShape:
        return self.runs.model_of(self.run).shape

    @cached_property
    def layout(self) -> SaveLayout:
        also = tuple(self.rows.told_apart)
        return SaveLayout.of(self.save, self.run, self._shape, also)

    def _dtype(self) -> torch.dtype:
        computed = str(self.runs.model_of(self.run).dtype).removeprefix("torch.")
        return getattr(torch, self.save.spec.stored_dtype(computed))

    def _places(self) -> dict[str, TensorEntry]:
        """Describe every tensor of the file; the number of vectors depends only on positions."""
        count, kind = self.layout.vectors, _DTYPE_NAMES[self._dtype()]
        tensor_entries = {
            name: TensorEntry(kind, (count, n)) for name, n in self.layout.widths.items()
        }
        return tensor_entries | {name: TensorEntry("I64", (count,)) for name in self.layout.columns}

    def _fill(self, file: TensorFile, batches: Sequence[Ints]) -> None:
        """Write vectors in the order of the table: by row, then by reply, then by position."""
        row_ids = np.array(self.experiment.table.row_ids, dtype=np.int64)
        begin, told_apart = 0, self.rows.told_apart
        for parts in self._read(batches):
            own = [part for part in parts if part.point == 0]
            position = np.concatenate([np.full(len(p.prompts), p.position) for p in own])
            columns = {
                name: np.concatenate([getattr(p, of) for p in own])
                for name, of in (("row", "prompts"), ("token", "tokens"), ("draw", "draws"))
            } | {"position": position}
            order = np.lexsort((columns["draw"], position, columns["row"]))
            if "patch" in self.layout.columns:
                columns |= self._number_patches(own)
            columns |= {name: which[columns["row"]] for name, which in told_apart.items()}
            columns["row"] = row_ids[self.rows.of[columns["row"]]]
            for name, values in columns.items():
                if name in self.layout.columns:
                    file.put(name, begin, values[order].astype("<i8").tobytes())
            for number, point in enumerate(self.save.points):
                vectors = torch.cat([p.vectors for p in parts if p.point == number])
                file.put(name_tensor(point), begin, _pack_bytes(vectors, order, self._dtype()))
            begin += len(order)

    def _number_patches(self, parts: Sequence[SiteVectors]) -> dict[str, Ints]:
        """Return the token and the patch of each vector.

        Patches are numbered within their token, or within their image if its tokens are resampled
        from patches: the token is then the first one of the image.
        """
        reader, count = self.experiment.model.tokenizer, self.save.count_patches(self._shape)
        if not self._shape.resamples:
            patches = [np.arange(len(part.tokens)) % count for part in parts]
            return {"patch": np.concatenate(patches)}
        assert isinstance(reader, ImagePromptTokenizer)
        numbers: dict[int, dict[int, tuple[int, int]]] = {}
        for row in np.unique(np.concatenate([part.prompts for part in parts])).tolist():
            numbers[row] = {}
            for picture in row_in_patches(reader, self.run.rows[row]).whole_pictures:
                expansion = picture.picture.expansion
                token = (picture.first + expansion.is_image.index(True)) // count
                places = sorted(picture.first + cell.position for cell in expansion.layout.cells)
                numbers[row] |= {place: (token, n) for n, place in enumerate(places)}
        found = np.array(
            [
                numbers[row][token]
                for part in parts
                for row, token in zip(part.prompts.tolist(), part.tokens.tolist(), strict=True)
            ]
        ).reshape(-1, 2)
        return {"token": found[:, 0], "patch": found[:, 1]}

    def _read(self, batches: Sequence[Ints]) -> Iterator[list[SiteVectors]]:
        """Yield the vectors of each batch, and forget the batch's runs afterwards."""
        if self.save.gradient is not None:
            site_vectors = read_gradients(self.runs, self.run, self.save, batches)
        else:
            lanes = self.runs.reader(self.run, self.save.points)
            site_vectors = read_vectors(lanes, self.save.points, self.save.cells, batches)
        for _, batch in groupby(site_vectors, key=lambda vectors: vectors.batch):
            yield list(batch)
            if len(batches) > 1:  # also frees the runs that derived runs depend on
                self.runs.forget()

    def _rows(self) -> Iterator[str]:
        """Yield a line for each row, or reply, that has a vector."""
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
        metric = save.spec.metric
        return ({} if metric is None else {"gradient": metric}) | {
            "experiment": experiment.key,
            "model": self.run.model or experiment.model.name,
            "prompts": experiment.table.name,
            "run": save.run,
            "at": save.spec.at.span.written,
            "positions": json.dumps([cell.label for cell in save.cells], ensure_ascii=False),
        }


class _NoMean(Exception):
    """Error for a mean over no rows, or over numbers that aren't finite."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(str(diagnostic))
        self.diagnostic = diagnostic


class _SavedMeans(_SavedRun):
    """Writer of the file of a `save mean of` line.

    Each row of the table counts once: its vector at a position is the mean over the position's
    tokens, and over the row's draws and replies.
    """

    def written(self, batches: Sequence[Ints]) -> SavedFile:
        """Write the file. Raises OSError if that fails, and _NoMean."""
        counts = self._counts(self.save.count_patches(self._shape))
        rows = [int((numbers > 0).sum()) for numbers in counts]
        labels = [cell.label for cell in self.save.cells]
        for label, count in zip(labels, rows, strict=True):
            if not count:
                raise self._no_mean(f"no row has `{label}`", "name a position that some rows have")
        tensors: dict[str, Tensor] = {}
        for cell, totals in enumerate(self._totals(counts, batches)):
            for point, total in zip(self.save.points, totals, strict=True):
                if not total.isfinite().all():
                    hint = "look at the rows with `save` without `mean of`"
                    raise self._no_mean("it has NaN or infinity", hint)
                name = name_tensor(point) + (f".position{cell}" if len(labels) > 1 else "")
                tensors[name] = (total / rows[cell]).to(self._dtype())
        path = self._path()
        size = write_tensors(path, tensors, {**self._metadata(), "rows": json.dumps(rows)})
        return self._summary(path, "means", size, None)

    def _counts(self, patches: int) -> list[Ints]:
        """[position][row of the table]: the number of its vectors at the position.

        patches: The number of vectors of a token.
        """
        found: list[Ints] = []
        for cell in (
            position_cell if patches == 1 else position_cell.in_patches(patches)
            for position_cell in self.save.cells
        ):
            numbers = np.array([sum(map(len, hits)) for hits in cell.hits], dtype=np.int64)
            counts = np.zeros(len(self.experiment.table), dtype=np.int64)
            np.add.at(counts, self.rows.of, numbers * self.run.draws)
            found.append(counts)
        return found

    def _no_mean(self, reason: str, hint: str) -> _NoMean:
        """Return the error for a mean that can't be computed."""
        return _NoMean(
            EmptyDirection(
                span=self.save.spec.span,
                name=self.save.spec.site.span.written,
                reason=f"can't be computed: {reason}",
                made=f"over {count_noun(len(self.experiment.table), 'row')}",
                hint=hint,
                kind="mean of",
            )
        )

    def _totals(self, counts: Sequence[Ints], batches: Sequence[Ints]) -> list[list[Tensor]]:
        """[position][point]: the sum of the rows' vectors, [width] float64."""
        widths = list(self.layout.widths.values())
        totals = [[torch.zeros(width, dtype=torch.float64) for width in widths] for _ in counts]
        for parts in self._read(batches):
            for part in parts:
                weights = 1 / counts[part.position][self.rows.of[part.prompts]]
                vectors = part.vectors.double().cpu()
                own = (torch.from_numpy(weights)[:, None] * vectors).sum(0)
                totals[part.position][part.point] += own
        return totals


def _pack_bytes(vectors: Tensor, order: Ints, dtype: torch.dtype) -> memoryview:
    """Return the bytes of [K, width] vectors in an order."""
    tensors = vectors[torch.from_numpy(order).to(vectors.device)].to(dtype).cpu().contiguous()
    whole: Any = tensors.view(torch.uint8).numpy()
    return memoryview(whole.reshape(-1))


# --- rows of features -----------------------------------------------------------------------------


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
            written, diagnostics = _write_file(experiment, save, models, options, parts)
        except OSError as error:
            problems.append(report_not_written(save.spec, error))
            continue
        saved += [] if written is None else [written]
        problems += diagnostics
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
        active_rows = ActiveRows(which, save.spec.rows, explains=not member.reads)
        begun = 0
        if parts is None:
            self._read(self.experiment, system, active_rows)
        else:
            begun = self._read_parts(parts, system, active_rows)
        rows = self._rows_to_show(active_rows.kept_rows.tolist(), parts)
        with write_aside(self.path) as aside:
            write_lines(
                aside, (self._line(*summary, member, rows) for summary in active_rows.summaries())
            )
        if parts is not None:
            self._state_path.unlink(missing_ok=True)
        return self._summary(active_rows, member, begun)

    # --- reading ----------------------------------------------------------------------------------

    def _read_parts(
        self, parts: RowParts, system: CoordinateSystem, active_rows: ActiveRows
    ) -> int:
        """Read all parts; return the record at which an interrupted run was continued."""
        begun = done = self._restored(parts.key, active_rows)
        last = monotonic()
        while done < parts.count:
            end = min(done + PART_ROWS, parts.count)
            part, too_long = parts.part(range(done, end))
            if part is not None:
                self._read(part, system, active_rows)
            done = end
            self.too_long += too_long
            if self.options.on_progress is not None:
                self.options.on_progress(done, parts.count)
            if parts.key is not None and monotonic() - last >= SECONDS_BETWEEN_SAVES:
                self._keep(parts.key, done, active_rows)
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
            given = model, run, lanes, [points], spot, rows, [b""] * len(rows)
            read = partial(read_token_vectors, *given, encoding=(system, inputs))
            own = try_pass(read, can_shrink=len(rows) > 1)
            runs.forget()
            if own is None:
                due.extendleft(np.array_split(rows, 2)[::-1])
            else:
                found.add(own[points], numbers[rows], system, inputs)

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

    def _restored(self, key: bytes | None, active_rows: ActiveRows) -> int:
        """Return the number of records that an interrupted run has read, and restore its state."""
        if key is None or not self._state_path.is_file():
            return 0
        with suppress(OSError, ValueError, KeyError, BadZipFile), np.load(self._state_path) as kept:
            if kept["key"].tobytes() == key:
                active_rows.restore(kept)
                self.too_long = int(kept["too long"])
                return int(kept["done"])
        return 0

    # --- writing ----------------------------------------------------------------------------------

    def _rows_to_show(self, numbers: Sequence[int], parts: RowParts | None) -> dict[int, RunRow]:
        """Return the rows with these numbers."""
        if parts is None:
            return self._by_number(self.experiment)
        rows: dict[int, RunRow] = {}
        for begin in range(0, len(numbers), PART_ROWS):
            part, _ = parts.part(numbers[begin : begin + PART_ROWS])
            rows |= {} if part is None else self._by_number(part)
        return rows

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
                    "row": row.row,
                    "activation": max(row.values),
                    "text": rows[row.row].text,
                    "tokens": [text(token) for token in rows[row.row].ids],
                    "at": row.tokens,
                    "activations": row.values,
                    "values": dict(rows[row.row].values),
                }
                for row in about.rows
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
