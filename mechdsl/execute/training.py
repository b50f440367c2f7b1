"""Training of a declared dictionary or lens: its vectors chunk by chunk, run, files, checkpoints.

Vectors are those of the named tokens of the rows of a table, or of the records of files that are
read in parts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from mechdsl.base.arrays import Ints
from mechdsl.base.files import compute_digest, dump_sealed, load_sealed, replace_file
from mechdsl.base.hashing import stable_hash
from mechdsl.base.runtime import delay_signals
from mechdsl.base.text import format_size
from mechdsl.dictionaries.features import Dictionary, load_dictionary
from mechdsl.dictionaries.folder import CONFIG_FILE, HOOK_SITES, WEIGHT_FILES, read_dictionary
from mechdsl.execute.vectors import build_reader, read_vectors, split_prompts
from mechdsl.fits.factors import NotFactored, Solution
from mechdsl.fits.lenses import LensLoss, LensMaps, divergence_from_average
from mechdsl.fits.processes import own_processes
from mechdsl.fits.reports import CARD_FILE, LENS_FILE, FitReport, LensReport, TrainingReport
from mechdsl.fits.sparse_training import unscale_weights
from mechdsl.fits.training import (
    Fit,
    Training,
    TrainingSettings,
    TrainingState,
    VectorSource,
    assess,
    components_explain,
)
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.packed.unembedding import ModelUnembedding
from mechdsl.models.shape import PaddingSide
from mechdsl.planner.training_cost import (
    CHUNK_BYTES,
    count_patches,
    count_vector_numbers,
    most_held_out,
    most_vectors,
)
from mechdsl.program.direction_methods import BFLOAT16
from mechdsl.program.spec import CLEAN
from mechdsl.program.trainers import IterativeTrainer, LensTrainer, SolvedTrainer
from mechdsl.prompts.data_files import GROUP_BYTES, GROUP_COUNT
from mechdsl.resolve.trainings import (
    UNTRAINED_FOLDER,
    count_held_out,
    hash_texts,
    order_rows,
    write_texts,
)
from mechdsl.resolve.types import (
    FitSample,
    RecordStream,
    SitePoint,
    TrainedDictionary,
    TrainedLens,
    count_numbers,
)
from mechdsl.resolve.types import Training as DeclaredTraining

if TYPE_CHECKING:
    from mechdsl.resolve.trainings import TextDigests

PART_ROWS = 256
"""Number of records that are read together."""

NEIGHBOURS = 16
"""Number of successive records of a file that stay together when records are shuffled."""


class TrainingVectors(VectorSource, Protocol):
    """The vectors of a training, and those that are held out."""

    @property
    def held_out_count(self) -> int:
        """Number of rows that the training doesn't use."""
        ...

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return vectors of these rows, as `chunk` does."""
        ...

    def amounts(self, state: TrainingState) -> tuple[int, int]:
        """Return the numbers of rows and of vectors that a training has learned from."""
        ...

    def texts(self, state: TrainingState) -> TextDigests | None:
        """Return digests of the texts that a training has read from files; None without files."""
        ...


class _LastChunk:
    """The chunk that was read last, which stays in memory."""

    def __init__(self, read: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self._read = read
        self._kept: tuple[int, tuple[Tensor, Tensor]] | None = None

    def get(self, number: int) -> tuple[Tensor, Tensor]:
        """Return a chunk."""
        if self._kept is None or self._kept[0] != number:
            self._kept = None  # two chunks may not fit into memory
            self._kept = number, self._read(number)
        return self._kept[1]


class VectorCache:
    """The vectors that were read last: trainings with other seeds and sizes use the same ones."""

    def __init__(self) -> None:
        self._kept: tuple[Hashable, tuple[Tensor, ...]] | None = None

    def get(self, key: Hashable, read: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return the vectors with a key, which must identify everything that they depend on."""
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            self._kept = key, read()
        return self._kept[1]


@dataclass(frozen=True, eq=False)
class RowVectors:
    """The vectors of a training on the rows of a table."""

    declared: DeclaredTraining
    model: LoadedModel
    """The model that runs the rows."""
    seed: int
    """Seed of noise."""
    side: PaddingSide | None
    chunk_bytes: int = CHUNK_BYTES
    cache: VectorCache = field(default_factory=VectorCache)
    partner: LoadedModel | None = None
    """The model that runs the rows of `declared.paired.sample`, if there are any."""

    @cached_property
    def counts(self) -> Ints:
        """[row] vectors of each row."""
        sample = self.declared.sample
        tokens = [sum(map(len, runs)) for runs in sample.cell.hits]
        hits = np.array(tokens, dtype=np.int64)
        return hits * sample.run.draws * count_patches(self.declared, self.model.shape)

    @cached_property
    def rows(self) -> Ints:
        """[row] the numbers of all rows with the position, in a random order that depends on the
        seed and on their contents."""
        rows = np.flatnonzero(self.counts).tolist()
        order = order_rows(self.declared, self.declared.sample.table, rows)
        return np.array(order, dtype=np.int64)

    @property
    def held_out_count(self) -> int:
        """Number of rows at the start of `rows` that the training doesn't use."""
        return count_held_out(self.declared, len(self.rows))

    @cached_property
    def _groups(self) -> list[Ints]:
        """The rows of each chunk."""
        rows = self.rows[self.held_out_count :]
        most = most_vectors(self.declared, self.model.shape, self.chunk_bytes)
        ends = np.cumsum(self.counts[rows])
        number = (ends - 1) // most  # by the last vector of each row
        return [rows[number == each] for each in np.unique(number)]

    @property
    def chunks(self) -> int:
        """Number of chunks that together have every vector once."""
        return len(self._groups)

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the vectors of a chunk that are encoded, and those that are reconstructed.

        [vector, width] float32 each, on the model's device; one tensor if both are the same. The
        last chunk that was read stays in memory.
        """
        return self._last.get(number)

    @cached_property
    def _last(self) -> _LastChunk:
        return _LastChunk(lambda number: self._read(self._groups[number]))

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return vectors of the rows that the training doesn't use, as `chunk` does."""
        rows = self.rows[: self.held_out_count]
        most = most_held_out(self.declared, self.model.shape, self.chunk_bytes)
        few = rows[: int(np.searchsorted(np.cumsum(self.counts[rows]), most)) + 1]
        return self._read(few)

    def amounts(self, state: TrainingState) -> tuple[int, int]:
        """Return the numbers of rows and of vectors that a training learns from."""
        rows = self.rows[self.held_out_count :]
        return len(rows), int(self.counts[rows].sum())

    def texts(self, state: TrainingState) -> None:
        """Return None: rows of a table are found by their keys."""

    @cached_property
    def _is_shared(self) -> bool:
        """Whether all vectors are read at once and stay in memory."""
        most = most_vectors(self.declared, self.model.shape, self.chunk_bytes)
        return self.declared.sample.run.draws == 1 and int(self.counts.sum()) <= most

    def _read(self, rows: Ints) -> tuple[Tensor, Tensor]:
        run = self._select(rows) if self._is_shared else self._run(rows)
        paired = self.declared.paired
        if paired is None or paired.point is not None:
            return run
        ordered = np.sort(rows)
        values = np.array(paired.values)[ordered].repeat(self.counts[ordered], axis=0)
        return run[0], torch.from_numpy(values).to(run[0])

    def _select(self, rows: Ints) -> tuple[Tensor, Tensor]:
        """Return what `_run` returns, of vectors that are in memory."""
        every, sample = np.sort(self.rows), self.declared.sample
        key = (
            id(self.model), sample.table.name, sample.table.row_keys, sample.run.name,
            sample.cell.hits, self.declared.points, self.seed, self.side, self._partner_key,
        )  # fmt: skip
        tensor, other = self.cache.get(key, lambda: self._run(every))
        wanted = np.isin(np.arange(len(self.counts)), rows)
        which = torch.from_numpy(np.flatnonzero(np.repeat(wanted, self.counts)))
        vectors = tensor[which.to(tensor.device)]
        return vectors, vectors if tensor is other else other[which.to(other.device)]

    @property
    def _partner_key(self) -> Hashable:
        """What identifies the vectors of another run, with the rows of this one."""
        paired = self.declared.paired
        if paired is None or paired.sample is None:
            return None
        run = paired.sample.run
        return id(self.partner), run.name, paired.sample.cell.hits, paired.point

    def _run(self, rows: Ints) -> tuple[Tensor, Tensor]:
        read = partial(read_rows, rows=rows, seed=self.seed, side=self.side)
        count = len(self.declared.outputs)
        run = read(self.declared.points, self.model, self.declared.sample, outputs=count)
        paired = self.declared.paired
        if paired is None or paired.sample is None:
            return run
        assert paired.point is not None
        assert self.partner is not None
        return run[0], read((paired.point,), self.partner, paired.sample)[0]


def read_rows(
    sites: Sequence[SitePoint],
    model: LoadedModel,
    sample: FitSample,
    rows: Ints,
    *,
    seed: int,
    side: PaddingSide | None,
    outputs: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the vectors of some rows that are encoded, and those that are reconstructed.

    Processes that train together read batches of rows in turn.

    Args:
        sites: Those of the vectors that are encoded, and then those of the vectors that are
            reconstructed.
        sample: The rows and their tokens.
        seed: Seed of noise.
        outputs: Number of several sites that are reconstructed together; 0: the last site is.

    Returns:
        [vector, width] float32 each, in ascending order of the rows, on the model's device; one
        tensor if both are the same. The vectors of several layers are one after another, [vector,
        layers * width].
    """
    points = list(dict.fromkeys(sites))
    parts: list[list[Tensor]] = [[] for _ in points]
    rows, processes = np.sort(rows), own_processes()
    batches = split_prompts(model, sample.run, points, rows) if len(rows) else []
    turn = batches[processes.number :: processes.count]
    for tensors in _read_batches(model, sample, turn, points, seed, side):
        for part, vectors in zip(parts, tensors, strict=True):
            part.append(vectors)
    if batches:
        parts = [processes.share(part, len(batches)) for part in parts]
    joined = [
        torch.cat(part)
        if part
        else torch.zeros(0, count_numbers(point, model.shape), device=model.device)
        for point, part in zip(points, parts, strict=True)
    ]
    if outputs:
        return torch.cat(joined[:-outputs], dim=1), torch.cat(joined[-outputs:], dim=1)
    encoded = joined[:-1] if len(joined) > 2 else joined[:1]
    return torch.cat(encoded, dim=1) if len(encoded) > 1 else encoded[0], joined[-1]


def _read_batches(
    model: LoadedModel,
    sample: FitSample,
    batches: Sequence[Ints],
    points: Sequence[SitePoint],
    seed: int,
    side: PaddingSide | None,
) -> Iterator[list[Tensor]]:
    """Yield the vectors of each site, batch by batch."""
    reader = build_reader(model, sample.table, sample.run, points, seed=seed, side=side)
    with torch.no_grad():
        tensors: list[Tensor] = []
        for vector in read_vectors(reader, points, [sample.cell], batches):
            tensors.append(vector.vectors.float().clone())
            if len(tensors) == len(points):
                yield tensors
                tensors = []


# --- records of files -----------------------------------------------------------------------------


class NoVectors(Exception):
    """No row of a file has the position."""


@dataclass(frozen=True, eq=False)
class StreamedVectors:
    """The vectors of a training on the records of files, which are never all in memory.

    The records are in a random order of blocks of neighbours. The first blocks are held out; the
    others are divided into chunks of as many blocks as have about `chunk_bytes` of vectors, by the
    tokens of the first records. Records that a file stores together, such as those of a row group
    of Parquet, are in successive chunks, so that a pass through all chunks reads them once.
    """

    declared: DeclaredTraining
    model: LoadedModel
    part: Callable[[Sequence[int]], FitSample | None]
    """Returns the rows of records, in their order; None if none is left."""
    side: PaddingSide | None
    chunk_bytes: int = CHUNK_BYTES

    @property
    def _stream(self) -> RecordStream:
        stream = self.declared.stream
        assert stream is not None
        return stream

    @cached_property
    def _blocks(self) -> list[Ints]:
        """The numbers of the records of each block of neighbours, in a random order."""
        stream = self._stream
        size = max(1, min(NEIGHBOURS, stream.count // 32))
        blocks: list[Ints] = []
        for first, end in _ranges(stream):
            numbers = np.arange(first, end)
            blocks += [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]
        order = np.arange(len(blocks))
        self._random("training records").shuffle(order)
        return [blocks[number] for number in order.tolist()]

    def _random(self, what: str) -> np.random.Generator:
        seed = stable_hash(self.declared.seed, what, self._stream.digest) % 2**63
        return np.random.default_rng(seed)

    @cached_property
    def _held_out_blocks(self) -> int:
        return count_held_out(self.declared, len(self._blocks))

    @property
    def held_out_count(self) -> int:
        """Number of records that the training doesn't use."""
        return sum(map(len, self._blocks[: self._held_out_blocks]))

    @cached_property
    def _chunks(self) -> list[Ints]:
        """The records of each chunk, in the order in which they are read."""
        blocks, windows = self._blocks[self._held_out_blocks :], self._windows
        blocks.sort(key=lambda block: windows[block[0]])  # stable: random within a window
        many = self._block_count(most_vectors(self.declared, self.model.shape, self.chunk_bytes))
        parts = [np.concatenate(blocks[i : i + many]) for i in range(0, len(blocks), many)]
        return [part[np.lexsort((part, windows[part]))] for part in parts]

    @cached_property
    def _windows(self) -> Ints:
        """[record] the number of the window that it belongs to: groups of records of the files, in
        a random order, as many as are in memory at once."""
        ranges, sizes = list(_ranges(self._stream)), [size for _, size in self._stream.groups]
        order = np.arange(len(ranges))
        self._random("training windows").shuffle(order)
        windows = np.empty(self._stream.count, dtype=np.int64)
        window = size = count = 0
        for number in order.tolist():
            own = sizes[number]
            if own and (size + own > GROUP_BYTES or count == GROUP_COUNT):
                window, size, count = window + 1, 0, 0
            size, count = size + own, count + (own > 0)
            windows[slice(*ranges[number])] = window
        return windows

    def _block_count(self, vectors: int) -> int:
        """Return how many blocks have about so many vectors, by the tokens of the first records."""
        first = self.declared.sample.cell.hits
        tokens = max(1.0, sum(len(run) for row in first for run in row) / max(1, len(first)))
        return max(1, int(vectors / (tokens * max(map(len, self._blocks)))))

    @property
    def chunks(self) -> int:
        """Number of chunks that together have every record once."""
        return len(self._chunks)

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the vectors of a chunk, as `RowVectors.chunk` does.

        For a chunk without vectors, those of the next one that has some. Raises NoVectors.
        """
        return self._last.get(number)

    @cached_property
    def _last(self) -> _LastChunk:
        return _LastChunk(self._read_chunk)

    def _read_chunk(self, number: int) -> tuple[Tensor, Tensor]:
        for later in range(self.chunks):
            vectors = self._read(self._chunks[(number + later) % self.chunks])
            if len(vectors[0]):
                return vectors
        raise NoVectors(self.declared.sample.cell.label)

    @cached_property
    def _held_out(self) -> Ints:
        """The held-out records that are read, in the order of the files."""
        most = most_held_out(self.declared, self.model.shape, self.chunk_bytes)
        few = min(self._held_out_blocks, self._block_count(most))
        blocks = self._blocks[:few]
        return np.sort(np.concatenate(blocks)) if blocks else np.empty(0, dtype=np.int64)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return vectors of records that the training doesn't use, as `chunk` does."""
        return self._read(self._held_out)

    def amounts(self, state: TrainingState) -> tuple[int, int]:
        """Return the number of different records of the chunks that were begun, and the number of
        vectors in all steps."""
        begun = self._chunks[: state.passes + 1] if state.step else []
        return sum(map(len, begun)), state.step * int(self.declared.options["batch"])

    def texts(self, state: TrainingState) -> TextDigests:
        """Return digests of the texts of the chunks that were begun, and of held-out records."""
        begun = [self._held_out, *self._chunks[: state.passes + 1]]
        texts: list[TextDigests] = []
        for key, records in (part for each in begun for part in self._parts(each)):
            if key not in self._texts:  # read before an interruption
                self._texts[key] = _hash_rows(self.part(records.tolist()))
            texts.append(self._texts[key])
        return np.concatenate(texts)

    @cached_property
    def _texts(self) -> dict[tuple[int, int], TextDigests]:
        """Digests of the texts of the parts that were read, by their first and last record."""
        return {}

    def _read(self, records: Ints) -> tuple[Tensor, Tensor]:
        """Return the vectors of records."""
        batches: list[tuple[Tensor, Tensor]] = []
        for key, part in self._parts(records):
            sample = self.part(part.tolist())
            self._texts[key] = _hash_rows(sample)
            if sample is not None:
                batches.append(self._read_sample(sample, _rows_with_position(sample)))
        if not batches:
            return self._read_sample(self.declared.sample, np.empty(0, dtype=np.int64))
        tensor = torch.cat([each for each, _ in batches])
        same = batches[0][0] is batches[0][1]
        return tensor, tensor if same else torch.cat([each for _, each in batches])

    def _parts(self, records: Ints) -> list[tuple[tuple[int, int], Ints]]:
        """Return parts of records that are read together, with the first and the last of each.

        A part is within a window, because its rows may be read more than once.
        """
        cuts = np.flatnonzero(np.diff(self._windows[records])) + 1
        parts = [
            numbers[begin : begin + PART_ROWS]
            for numbers in np.split(records, cuts)
            for begin in range(0, len(numbers), PART_ROWS)
        ]
        return [((int(part[0]), int(part[-1])), part) for part in parts]

    def _read_sample(self, sample: FitSample, rows: Ints) -> tuple[Tensor, Tensor]:
        points, count = self.declared.points, len(self.declared.outputs)
        return read_rows(points, self.model, sample, rows, seed=0, side=self.side, outputs=count)


def _ranges(stream: RecordStream) -> list[tuple[int, int]]:
    """Return the first record of each group of the files, and the one after its last."""
    ends = np.minimum(np.cumsum([count for count, _ in stream.groups]), stream.count).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _rows_with_position(sample: FitSample) -> Ints:
    return np.flatnonzero([bool(sum(map(len, row))) for row in sample.cell.hits])


def _hash_rows(sample: FitSample | None) -> TextDigests:
    """Return digests of the texts of the rows with the position; none without rows."""
    if sample is None:
        return hash_texts(())
    rows = sample.table.runs[CLEAN].rows
    return hash_texts(rows[row].text for row in _rows_with_position(sample).tolist())


STATE_FILES = ("state.json", "state.safetensors")
"""Files of a checkpoint."""


def read_settings(declared: DeclaredTraining, device: torch.device) -> TrainingSettings:
    """Return how long and how fast to train.

    Args:
        device: Where losses are computed.
    """
    options = declared.options
    return TrainingSettings(
        steps=int(options["steps"]),
        batch=int(options["batch"]),
        rate=float(options["rate"]),
        seed=declared.seed,
        patience=int(options["patience"]) if "patience" in options else None,
        accumulate=int(options["accumulate"]),
        mixed_on=device.type if options["precision"] == BFLOAT16 else None,
    )


def start_generator(declared: DeclaredTraining) -> Generator:
    """Return the source of random numbers of the parameters at the start."""
    return torch.Generator().manual_seed(stable_hash(declared.seed, "weights") % 2**63)


class Search(Protocol):
    """A search that can be continued."""

    @property
    def progress(self) -> tuple[int, int]:
        """Number of finished and of all steps."""
        ...

    def run(self) -> Iterator[None]:
        """Search, and yield after each step."""
        ...

    def capture(self) -> dict[str, Any]:
        """Return the state as JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises KeyError and ValueError."""
        ...


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """Where a training writes, and whom it tells."""

    folder: Path
    """An existing empty folder for the result."""
    facts: Mapping[str, Any]
    """What the card says besides the report, as JSON."""
    checkpoints: Path
    """Folder of the checkpoint, from which an interrupted training continues."""
    is_due: Callable[[], bool]
    """Whether a checkpoint is due after a step."""
    on_step: Callable[[int, int], None]
    """Called after a step with the finished and all steps."""

    def run(self, loop: Training) -> None:
        """Train to the end, from a checkpoint if there is one."""
        _restore(loop, self.checkpoints)

        with delay_signals() as deliver:

            def after_step(done: int) -> None:
                if own_processes().is_first and self.is_due():
                    _keep(loop, self.checkpoints)
                self.on_step(done, loop.settings.steps)
                deliver()

            try:
                loop.run(after_step)
            except KeyboardInterrupt:
                if own_processes().is_first and not loop.is_torn:
                    _keep(loop, self.checkpoints)
                raise

    def search(self, search: Search) -> None:
        """Search to the end, from a checkpoint if there is one."""
        path = self.checkpoints / STATE_FILES[0]
        with suppress(OSError, ValueError, KeyError, TypeError):
            search.restore(load_sealed(path.read_text("utf-8")))

        def keep() -> None:
            with replace_file(path) as made:
                made.write_text(dump_sealed(search.capture()), "utf-8")

        with delay_signals() as deliver:
            for _ in search.run():
                if self.is_due():
                    keep()
                try:
                    self.on_step(*search.progress)
                    deliver()
                except KeyboardInterrupt:
                    keep()
                    raise

    def write_tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file with tensors. Raises OSError."""
        content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(content, self.folder / file)
        (self.folder / file).chmod(0o644)

    @property
    def start_folder(self) -> Path:
        """The folder of what is trained as it is before the training, which is created."""
        folder = self.folder / UNTRAINED_FOLDER
        folder.mkdir(exist_ok=True)
        return folder

    def write_texts(self, digests: TextDigests | None) -> None:
        """Write the digests of texts that were read in parts, if there are any. Raises OSError."""
        if digests is not None:
            write_texts(self.folder, digests)

    def write_card(self, report: FitReport) -> None:
        """Write the card of a training. Raises OSError."""
        card = json.dumps({**self.facts, **asdict(report)}, indent=1) + "\n"
        (self.folder / CARD_FILE).write_text(card, "utf-8")


def train_dictionary(
    declared: TrainedDictionary,
    vectors: TrainingVectors,
    job: TrainingJob,
) -> TrainingReport:
    """Train a dictionary, and write it in the layout of SAELens.

    Raises:
        NotFinite: The loss or a weight became NaN or infinite.
        OSError: A file can't be written.
    """
    training = declared.training
    assert training is not None
    widths = declared.width_in, declared.width_out
    trainer = training.trainer_of(IterativeTrainer)
    first, first_targets = vectors.chunk(0)
    held_out = vectors.held_out()
    scaling = Scaling.of(first, first_targets)
    with torch.enable_grad():
        random = start_generator(training)
        model = trainer.start(widths, training.of_trainer, random, first.device)
        untrained = model.weights()
        settings = read_settings(training, first.device)
        loop = Training(model, vectors, held_out, settings, scaling.apply)
        job.run(loop)
    trained = Solution(model.weights(), loop.state.step, loop.state.stopped)
    finish = DictionaryWriter(declared, scaling, job.facts)
    weights = untrained, trained
    return _finish_dictionary(finish, vectors, held_out, weights, loop.state, job)


def solve_dictionary(
    declared: TrainedDictionary,
    vectors: RowVectors,
    job: TrainingJob,
) -> TrainingReport:
    """Compute a dictionary from all vectors together; otherwise as `train_dictionary`.

    Raises:
        NotFactored: The vectors have no such dictionary, or don't fit into memory together.
        OSError: A file can't be written.
    """
    untrained, trained = solve_twice(declared, vectors, job)
    finish = DictionaryWriter.of_solution(declared, job)
    weights, held_out = (untrained.tensors, trained), vectors.held_out()
    return _finish_dictionary(finish, vectors, held_out, weights, TrainingState(), job)


def solve_twice(
    declared: TrainedDictionary, vectors: RowVectors, job: TrainingJob
) -> tuple[Solution, Solution]:
    """Compute a dictionary from all vectors together: with no iterations, and with all of them.

    Raises NotFactored.
    """
    training = declared.training
    assert training is not None
    tensors, _ = read_together(vectors)
    trainer, steps = training.trainer_of(SolvedTrainer), int(training.options["steps"])
    untrained, trained = (
        trainer.solve(tensors, training.of_trainer, count, start_generator(training))
        for count in (0, steps)
    )
    job.on_step(steps, steps)
    return untrained, trained


def read_together(vectors: RowVectors) -> tuple[Tensor, Tensor]:
    """Return all vectors of a training, as `RowVectors.chunk` does.

    Raises NotFactored if they don't fit into memory together.
    """
    if vectors.chunks > 1:
        numbers = count_vector_numbers(vectors.declared, vectors.model.shape)
        need = int(vectors.counts[vectors.rows].sum()) * 4 * numbers
        raise NotFactored(
            f"its vectors need {format_size(need)} of memory, and "
            f"`{vectors.declared.trainer.name}` uses all of them together, at most "
            f"{format_size(vectors.chunk_bytes)}",
            "use fewer rows: `limit: 400`",
        )
    return vectors.chunk(0)


def report_amounts(
    vectors: TrainingVectors, state: TrainingState, solution: Solution, held_out: int
) -> dict[str, Any]:
    """Return the fields that all reports on the vectors of a dictionary have.

    Args:
        held_out: Number of held-out vectors.
    """
    rows, count = vectors.amounts(state)
    return {
        "rows": rows,
        "vectors": count,
        "held_out_rows": vectors.held_out_count,
        "held_out_vectors": held_out,
        "steps": solution.steps,
        "stopped_early": solution.stopped_early,
    }


def _finish_dictionary(
    finish: DictionaryWriter,
    vectors: TrainingVectors,
    held_out: tuple[Tensor, Tensor],
    weights: tuple[Mapping[str, Tensor], Solution],
    state: TrainingState,
    job: TrainingJob,
) -> TrainingReport:
    """Write a trained dictionary, and compare it with its controls.

    Args:
        held_out: Vectors that the training didn't use; the report is on training vectors if there
            are none.
        weights: At the start, and in the end.
        state: Of the loop at the end; its start without a loop.
    """
    untrained, trained = weights
    first = vectors.chunk(0)
    measured = held_out if len(held_out[0]) else first
    before = finish.assess(finish.write(job.start_folder, untrained), measured)
    fit = finish.assess(finish.write(job.folder, trained.tensors), measured)
    components = components_explain(first[1], measured[1], max(1, round(fit.active)))
    report = TrainingReport(
        **report_amounts(vectors, state, trained, len(held_out[0])),
        explained=fit.explained,
        active=fit.active,
        inactive=fit.inactive,
        untrained_explained=before.explained,
        components_explained=components,
    )
    job.write_texts(vectors.texts(state))
    job.write_card(report)
    return report


@dataclass(frozen=True, eq=False)
class Scaling:
    """Centres and factors of the vectors of a training."""

    centers: tuple[Tensor, Tensor]
    """[width] means of encoded and of reconstructed vectors."""
    scales: tuple[float, float]
    """Factors that make their mean squared length, after centring, their width."""

    @classmethod
    def none(cls, width: int) -> Scaling:
        """Return the scaling of a dictionary that is computed from the vectors as they are."""
        return cls((torch.zeros(width), torch.zeros(width)), (1.0, 1.0))

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> Scaling:
        """Compute them from vectors, [vector, width] each."""
        centers = inputs.double().mean(0).float(), targets.double().mean(0).float()
        scales = [
            _scale(vectors - center)
            for vectors, center in zip((inputs, targets), centers, strict=True)
        ]
        return cls(centers, (scales[0], scales[1]))

    def apply(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return centred and scaled vectors."""
        (center, made), (scale, made_scale) = self.centers, self.scales
        scaled = (inputs - center) * scale
        return scaled, (scaled if targets is inputs else (targets - made) * made_scale)


def _scale(vectors: Tensor) -> float:
    length = float(vectors.double().square().sum(1).mean())
    return math.sqrt(vectors.shape[1] / length) if length > 0 else 1.0


@dataclass(frozen=True, eq=False)
class DictionaryWriter:
    """Writes the files of a dictionary."""

    declared: TrainedDictionary
    scaling: Scaling
    facts: Mapping[str, Any]

    @classmethod
    def of_solution(cls, declared: TrainedDictionary, job: TrainingJob) -> DictionaryWriter:
        """Return the writer of a dictionary that is computed from the vectors as they are."""
        return cls(declared, Scaling.none(declared.width_in), job.facts)

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """Write weights and configuration."""
        dictionary = self.declared
        made = unscale_weights(
            weights,
            self.scaling.centers,
            self.scaling.scales,
            subtracts_bias=not dictionary.transcodes,
        )
        made = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
        config: dict[str, Any]
        if dictionary.transcodes and dictionary.architecture == "topk":
            path, config = folder / WEIGHT_FILES["sparsify"], self._sparsify_config()
            made["encoder.weight"] = made.pop("W_enc").T.contiguous()
            made["encoder.bias"] = made.pop("b_enc")
        else:
            path, config = folder / WEIGHT_FILES["SAELens"], self._sae_lens_config()
        save_file(made, path)
        path.chmod(0o644)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        return folder

    def _sparsify_config(self) -> dict[str, Any]:
        dictionary = self.declared
        return {
            "activation": "topk",
            "k": dictionary.k,
            "num_latents": dictionary.features,
            "d_in": dictionary.width_in,
            "transcode": True,
            "skip_connection": dictionary.skips,
        }

    def _sae_lens_config(self) -> dict[str, Any]:
        dictionary, training = self.declared, self.declared.training
        assert training is not None
        suffix = "skip_transcoder" if dictionary.skips else "transcoder"
        names = {"standard": suffix, "jumprelu": f"jumprelu_{suffix}"}
        hooks = [hook_name(point) for point in (training.encoded, training.made)]
        metadata = {
            "hook_name": hooks[0],
            "hook_name_out": hooks[1] if dictionary.transcodes else None,
        }
        metadata["model_name"] = self.facts.get("model_name")
        return {
            "architecture": names[dictionary.architecture]
            if dictionary.transcodes
            else dictionary.architecture,
            "d_in": dictionary.width_in,
            "d_sae": dictionary.features,
            **({} if dictionary.k is None else {"k": dictionary.k}),
            **({"d_out": dictionary.width_out} if dictionary.transcodes else {}),
            "dtype": "float32",
            "apply_b_dec_to_input": not dictionary.transcodes,
            "normalize_activations": "none",
            "metadata": {name: value for name, value in metadata.items() if value is not None},
        }

    def load(self, folder: Path) -> Dictionary:
        """Return a written dictionary, as rules will read it."""
        return load_dictionary(
            read_dictionary(folder, str(folder), transcodes=self.declared.transcodes)
        )

    def assess(self, folder: Path, measured: tuple[Tensor, Tensor]) -> Fit:
        """Assess a written dictionary, as rules will read it."""
        system = self.load(folder)
        return assess(lambda tensor: (system.encode(tensor), system.reconstruct(tensor)), *measured)


def hook_name(point: SitePoint) -> str | None:
    """Return the name of a site in TransformerLens, without a head; None if it has none."""
    names = {site: hook for hook, site in reversed(HOOK_SITES.items())}
    if point.layer is None or point.site not in names:
        return None
    return f"blocks.{point.layer}.{names[point.site]}"


# --- checkpoints ----------------------------------------------------------------------------------


def _keep(loop: Training, folder: Path) -> None:
    """Write a checkpoint: the tensors first, then the numbers with the step of the tensors."""
    state = loop.capture()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"state-{state.step}.safetensors"
    with replace_file(folder / name) as made:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.tensors.items()}, made)
    with replace_file(folder / STATE_FILES[0]) as made:
        numbers = {**state.numbers(), "tensors": name, "digest": compute_digest(folder / name)}
        made.write_text(dump_sealed(numbers), "utf-8")
    for other in folder.glob("state-*.safetensors"):
        if other.name != name:
            other.unlink(missing_ok=True)


def _restore(loop: Training, folder: Path) -> None:
    """Continue from a checkpoint, if there is one that can be read."""
    path = folder / STATE_FILES[0]
    if not path.is_file():
        return
    try:
        numbers = load_sealed(path.read_text("utf-8"))
        file = folder / numbers.pop("tensors")
        if compute_digest(file) != numbers.pop("digest"):
            raise ValueError("the file is damaged")
        tensors = load_file(file)
        loop.restore(TrainingState.read(numbers, tensors))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # it begins anew
        loop.state = TrainingState()


def train_lens(
    declared: TrainedLens, vectors: TrainingVectors, model: LoadedModel, job: TrainingJob
) -> LensReport:
    """Train a lens, and write its file.

    Args:
        model: The model whose final norm and unembedding it is trained with.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NotFinite: The loss or a weight became NaN or infinite.
        OSError: A file can't be written.
    """
    training = declared.training
    layers, trainer = training.layers, training.trainer_of(LensTrainer)
    held_out = vectors.held_out()
    width, device = model.shape.d_model, model.device
    logits = ModelUnembedding(model).differentiable_logits
    with torch.enable_grad():
        maps = trainer.start(width, layers, training.of_trainer, device)
        lens = LensLoss(maps, logits)
        settings = read_settings(training, device)
        loop = Training(lens, vectors, held_out, settings, lambda tensor, last: (tensor, last))
        job.run(loop)
    job.write_tensors(LENS_FILE, lens.weights())
    first = vectors.chunk(0)
    measured = held_out if len(held_out[0]) else first
    untrained = LensLoss(LensMaps(width, layers, device), logits)
    rows, count = vectors.amounts(loop.state)
    report = LensReport(
        rows=rows,
        held_out_rows=vectors.held_out_count,
        steps=loop.state.step,
        stopped_early=loop.state.stopped,
        vectors=count,
        held_out_vectors=len(held_out[0]),
        layers=list(layers),
        trained=lens.divergences(*measured).tolist(),
        untrained=untrained.divergences(*measured).tolist(),
        average=divergence_from_average(logits, first[1], measured[1]),
    )
    job.write_texts(vectors.texts(loop.state))
    job.write_card(report)
    return report
