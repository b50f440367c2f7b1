"""Unpatched runs of a panel, with generated text, and metrics read in replies.

Each run is computed once per batch of prompts and shared by all experiments. Replies are looked up
in the store or generated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.hashing import digest, digest_number
from mechdsl.execute.image_vectors import encode_changed_images, provide_images
from mechdsl.execute.measurement.readout import (
    MeasureFailure,
    ObservedValues,
    Readout,
    ReadoutInput,
    ReadoutResult,
    ReplyTokenMap,
    RowObserver,
    ValueGap,
    average_present,
    build_observer,
    read_samples,
)
from mechdsl.execute.unpatched_batch import (
    MeasuredPosition,
    UnpatchedBatch,
    UnpatchedRequest,
    build_noise_writes,
    collect_measured_positions,
    compute_unpatched,
    find_positions,
    has_loss,
    select_positions,
)
from mechdsl.execute.vectors import BatchReader, request_sites
from mechdsl.forward.generation.decoding import Decoding
from mechdsl.forward.generation.replies import ReplyRequest, generate_replies
from mechdsl.forward.generation.rules import GenerationRules, RowChoice, merge_steps
from mechdsl.forward.hooks.batch import (
    Batch,
    RuleWrites,
    SiteRead,
    SiteWrite,
    array_to_device,
    indices_to_device,
    to_device,
)
from mechdsl.forward.hooks.coordinates import CoordinateSystem
from mechdsl.forward.hooks.full_pass import FullPassResult, run_full
from mechdsl.forward.hooks.model import (
    LoadedModel,
    apply_position_ids,
    build_batch,
    replace_blocks,
    split_vision,
)
from mechdsl.forward.hooks.weight_maps import FrozenNorms
from mechdsl.forward.packed.unembedding import ModelUnembedding
from mechdsl.models.restart import Shortcuts
from mechdsl.models.shape import PaddingSide
from mechdsl.planner.plan import ExperimentPlan, Panel, Plan, is_read_only
from mechdsl.planner.rows import PassMember, RowTable, RulePlan
from mechdsl.planner.value_keys import ExperimentKeys, RunContents
from mechdsl.program.spec import Generation
from mechdsl.prompts.positions.cells import find_reply_tokens
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun, ReplyPosition
from mechdsl.resolve.runs import reads_observation, reads_reply_tokens
from mechdsl.resolve.types import ExternalRun, ItemNumber, MetricTerm, SiteLayer, SitePoint
from mechdsl.store.runs import OpenRun, ValueBlock
from mechdsl.vocab.metrics import Reply

_END_REASONS = ("end", "stop", "length")


class ReplyCache:
    """Stored replies of one panel."""

    def __init__(
        self,
        run: OpenRun,
        contents: RunContents,
        table: PromptTable,
        settings: tuple[object, ...],
        ends: frozenset[int],
    ) -> None:
        """Open the cache; settings: of `generate`; ends: tokens that end a reply."""
        self._run = run
        self._contents = contents
        self._table = table
        self._shared = digest("reply", settings, ends)
        self.keys: dict[str, ExperimentKeys] = {}
        """By key of an experiment; without experiments whose content has no digest."""

    def of_run(self, run: PromptRun, prompts: Ints) -> list[bytes]:
        """Return, per prompt, the digest that a run's reply depends on, apart from random draws."""
        model = self._contents.models[run.model or self._contents.model]
        rows = self._contents.of(run, self._table)[prompts].tolist()
        return [digest("run", self._shared, model, row) for row in rows]

    def of_rows(self, experiment: str, rows: RowTable) -> list[bytes] | None:
        """Return the digest per row of an experiment; None if there is none."""
        keys = self.keys.get(experiment)
        return None if keys is None else keys.of_rows(rows, self._shared)

    def find(self, keys: Sequence[bytes], model: LoadedModel) -> dict[int, Reply]:
        """Look up replies, by number of the key."""
        entries = {**self._run.earlier(keys), **self._run.own(keys)}
        return {
            number: _decode_reply(entries[key][1][:, 0].astype(np.int64).tolist(), model)
            for number, key in enumerate(keys)
            if key in entries
        }

    def keep(self, keys: Sequence[bytes], replies: Sequence[Reply]) -> None:
        """Store replies on disk."""
        every = zip(keys, replies, strict=True)
        known = {key: reply for key, reply in every if reply.ended != "broken"}
        if not known:
            return
        parts = [
            [_END_REASONS.index(reply.ended), len(reply.text), *reply.ids]
            for reply in known.values()
        ]
        starts = np.cumsum([0, *map(len, parts)]).astype(np.int64)
        rows = np.concatenate([np.arange(len(part), dtype=np.uint64) for part in parts])
        values = np.concatenate([np.array(part, dtype=np.float64) for part in parts])
        self._run.keep(ValueBlock(list(known), starts, rows, values[:, None]))


def _decode_reply(numbers: Sequence[int], model: LoadedModel) -> Reply:
    ended, length, *ids = numbers
    assert model.tokenizer is not None
    return Reply(tuple(ids), model.tokenizer.decode(ids)[:length], _END_REASONS[ended])


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """Rows that generate text, with the rules that act in them."""

    run: PromptRun
    prompts: Ints
    """[row]"""
    draw: Ints
    """[row] noise draw."""
    keys: Sequence[int]
    """[row] digest of the row apart from its prompt, which sampling depends on."""
    prefill: RuleWrites
    later: GenerationRules
    contents: Sequence[bytes] | None = None
    """[row] digest that its reply depends on, apart from random draws; None if it isn't cached."""


class ReplyGenerator:
    """Generator of replies with an experiment's settings."""

    def __init__(
        self,
        model_of: Callable[[PromptRun], LoadedModel],
        table: PromptTable,
        seed: int,
        generation: Generation,
        *,
        cached: bool,
        shares: bool,
    ) -> None:
        self.model_of = model_of
        self.table = table
        self.seed = seed
        self.generation = generation
        self.cached = cached
        self.shares = shares
        self.kept: ReplyCache | None = None
        self._of_runs: dict[tuple[object, ...], list[tuple[Reply, ...]]] = {}

    def forget(self) -> None:
        """Free the replies of runs."""
        self._of_runs.clear()

    def of_run(self, run: PromptRun, prompts: Ints) -> list[tuple[Reply, ...]]:
        """Return the replies of an unpatched run, one for each sample.

        The list is ordered by prompt, then by noise draw.
        """
        key = (id(run), prompts.tobytes())
        if key not in self._of_runs:
            rows = np.repeat(prompts, run.draws)
            self._of_runs[key] = self.of_rows(
                GenerationRequest(
                    run=run,
                    prompts=rows,
                    draw=np.tile(np.arange(run.draws), len(prompts)),
                    keys=[_random_key(run, prompt) for prompt in rows.tolist()],
                    prefill=RuleWrites(),
                    later=GenerationRules(),
                    contents=self.kept and self.kept.of_run(run, rows),
                )
            )
        return self._of_runs[key]

    def of_rows(self, rows: GenerationRequest) -> list[tuple[Reply, ...]]:
        """Return, per row, one reply for each sample."""
        model, samples = self.model_of(rows.run), self.generation.samples
        provide_images(model, (rows.run.rows[prompt] for prompt in rows.prompts.tolist()))
        count, table = len(rows.prompts), self.table
        noise = build_noise_writes(model, rows.run.noise, rows.prompts, table.row_keys, self.seed)
        prefill = self._embedded(model, rows, RuleWrites(noise).then(rows.prefill))
        later = rows.later
        if samples > 1:
            parts = [torch.arange(count) * samples + n for n in range(samples)]
            first, others = parts[0], parts[1:]
            whole, after = prefill.moved(first), later.moved(first)
            for part in others:
                whole, after = whole.then(prefill.moved(part)), after.then(later.moved(part))
            prefill, later = whole, after
        lanes = [
            (prompt, draw, key, sample)
            for prompt, draw, key in zip(
                rows.prompts.tolist(), rows.draw.tolist(), rows.keys, strict=True
            )
            for sample in range(samples)
        ]
        asked = ReplyRequest(
            prompts=[rows.run.rows[prompt].ids for prompt, *_ in lanes],
            sources=[source for prompt, *_ in lanes if (source := rows.run.rows[prompt].source)],
            random=[(self.seed, table.row_keys[prompt], *drawn) for prompt, *drawn in lanes],
            groups=np.repeat(np.arange(count), samples),
            prefill=prefill,
            later=later,
        )
        replies = self._known(model, rows, asked)
        return [tuple(replies[n : n + samples]) for n in range(0, len(replies), samples)]

    @staticmethod
    def _embedded(model: LoadedModel, rows: GenerationRequest, prefill: RuleWrites) -> RuleWrites:
        """Return the changes of prompts, with those in the vision encoder as writes at `embed`."""
        if model.shape.encodes_apart or not _acts_in_vision(prefill):
            return prefill
        ids = [rows.run.rows[prompt].ids for prompt in rows.prompts.tolist()]
        batch = build_batch(model, ids, [0] * len(ids), model.calling.side)
        with replace_blocks(model, prefill.blocks):
            text = split_vision(model, batch, prefill.writes, (), prefill.edges)
        return replace(prefill.outside("vision"), writes=text.writes, edges=text.edges)

    def _known(
        self, model: LoadedModel, rows: GenerationRequest, asked: ReplyRequest
    ) -> list[Reply]:
        """Return replies from the store, and generate missing ones."""
        if self.kept is None or rows.contents is None:
            return self._write(model, asked)
        samples = self.generation.samples
        drawn = (
            asked.random if self.generation.sampled else [numbers[2::2] for numbers in asked.random]
        )
        keys = [digest(rows.contents[n // samples], *numbers) for n, numbers in enumerate(drawn)]
        found = self.kept.find(keys, model)
        missing = [n for n in range(len(keys)) if n not in found]
        if missing:
            replies = self._write(model, asked.some(missing))
            self.kept.keep([keys[n] for n in missing], replies)
            found |= dict(zip(missing, replies, strict=True))
        return [found[n] for n in range(len(keys))]

    def _write(self, model: LoadedModel, asked: ReplyRequest) -> list[Reply]:
        """Generate replies. If rules act in an encoder of images that blocks attend to, it encodes
        those of each changed row once, before all passes."""
        if not (model.shape.attends_to_image and _acts_in_vision(asked.prefill)):
            return self._generate(model, asked)
        assert asked.groups is not None
        size = max(asked.sources) * model.shape.d_model * model.dtype.itemsize
        most, replies = max(1, _MAX_CHANGED_BYTES // size), list[Reply]()
        groups, lane = np.unique(asked.groups, return_inverse=True)
        for first in range(0, len(groups), most):
            lanes = np.flatnonzero((lane >= first) & (lane < first + most))
            part = asked.some(lanes.tolist())
            assert part.groups is not None
            _, leading, row = np.unique(part.groups, return_index=True, return_inverse=True)
            rows = part.some(leading.tolist())
            given = rows.prompts, rows.sources, rows.prefill
            with encode_changed_images(model, *given) as prompts:
                own = [prompts[n] for n in row.tolist()]
                outside = part.prefill.outside("vision")
                replies += self._generate(model, replace(part, prompts=own, prefill=outside))
        return replies

    def _generate(self, model: LoadedModel, asked: ReplyRequest) -> list[Reply]:
        return generate_replies(
            model,
            asked,
            _build_decoding(model, self.generation),
            cached=self.cached,
            shares=self.shares,
        )


_MAX_CHANGED_BYTES = 1 << 30
"""Bytes of the vectors of changed images that are known at the same time."""


def _acts_in_vision(rules: RuleWrites) -> bool:
    inside = rules.inside("vision")
    return bool(inside.writes or inside.edges or inside.blocks)


def _build_decoding(model: LoadedModel, generation: Generation) -> Decoding:
    assert model.tokenizer is not None
    suppressed, first = (find_suppressed(model, name) for name in SUPPRESSING)
    return Decoding(
        tokens=generation.tokens,
        decode=model.tokenizer.decode,
        ends=find_end_tokens(model),
        stops=generation.stops,
        suppressed=suppressed,
        suppressed_first=first,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
    )


def find_end_tokens(model: LoadedModel) -> frozenset[int]:
    """Return the tokens that end generation, from the configs and the tokenizer (end of text)."""
    tokens: list[Any] = []
    for name in ("generation_config", "config"):
        named = getattr(getattr(model.module, name, None), "eos_token_id", None)
        tokens += named if isinstance(named, list | tuple) else [named]
    if model.tokenizer is not None:
        tokens.append(model.tokenizer.role_ids.get("eos"))
    return frozenset(token for token in tokens if isinstance(token, int))


SUPPRESSING = ("suppress_tokens", "begin_suppress_tokens")
"""Settings of a generation config with tokens that replies don't contain, or don't begin with."""


def find_suppressed(model: LoadedModel, setting: str) -> frozenset[int]:
    """Return the tokens of a setting in `SUPPRESSING` of a speech model; none of other models."""
    given = getattr(getattr(model.module, "generation_config", None), setting, None) or ()
    follows = model.shape.takes == "sound to text"
    return frozenset(each for each in given if follows and 0 <= each < model.shape.vocab_size)


def _random_key(run: PromptRun, prompt: int) -> int:
    """Return the key for random draws of an unpatched run's reply, apart from the row's key.

    It depends on tokens and noise, but not on the run's name.
    """
    noise = run.noise
    said = None if noise is None else (noise.kind, noise.site, noise.std, noise.sds)
    return digest_number("run", run.rows[prompt].ids, said)


@dataclass(frozen=True, eq=False)
class GeneratedRows:
    """Rows of a pass with their replies, and the writes that acted in them."""

    run: PromptRun
    prompts: Ints
    """[row]"""
    replies: Sequence[Reply]
    """[row]"""
    prefill: RuleWrites = field(default_factory=RuleWrites)
    later: GenerationRules = field(default_factory=GenerationRules)


@dataclass(frozen=True, eq=False)
class ReplyReader:
    """Part of some rows' replies that one experiment reads."""

    plan: ExperimentPlan | None
    """None for an unpatched run, in which nothing is observed."""
    readout: Readout
    rows: RowTable
    at: Ints
    """[row] index of the row in the pass."""
    items: Sequence[ItemNumber]
    """[row]"""
    skip: Collection[int] = ()
    systems: Mapping[str, CoordinateSystem] = field(default_factory=dict[str, CoordinateSystem])
    """Bases by name."""

    @property
    def as_base(self) -> bool:
        """Whether replies are read without rules."""
        return self.plan is not None and self.plan.experiment.as_base

    @cached_property
    def looks(self) -> RulePlan | None:
        """The rule that observes replies, if there is one."""
        observes = None if self.plan is None else self.plan.observes
        return observes if observes is not None and reads_reply_tokens(observes.rule) else None

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """Numbers of the measures of observed values."""
        every = enumerate(self.readout.measures) if self.looks is not None else ()
        return tuple(n for n, measure in every if reads_observation(measure) and n not in self.skip)


def build_reply_readers(
    members: Sequence[PassMember],
    plans: Sequence[ExperimentPlan],
    readouts: Sequence[Readout],
    skip: Sequence[Collection[int]],
    systems: Sequence[Mapping[str, CoordinateSystem]],
) -> dict[int, ReplyReader]:
    """Build the readers of these rows' replies, by number of the experiment."""
    readers: dict[int, ReplyReader] = {}
    for member in members:
        plan = plans[member.number]
        items = [plan.items[cell] for cell in member.rows.cell]
        given = (plan, readouts[member.number], member.rows, member.at, items, skip[member.number])
        reader = ReplyReader(*given, systems[member.number])
        if reader.readout.in_replies or reader.seen:
            readers[member.number] = reader
    return readers


def merge_reply_values(result: ReadoutResult, in_replies: ReadoutResult) -> ReadoutResult:
    """Combine values read on prompts with values read in replies."""
    pairs = zip(result.values, in_replies.values, strict=True)
    rounding = zip(result.rounding, in_replies.rounding, strict=True)
    return replace(
        result,
        values=[np.where(np.isnan(a), b, a) for a, b in pairs],
        rounding=[a + b for a, b in rounding],
        broken=result.broken | in_replies.broken,
        failed={**result.failed, **in_replies.failed},
        gaps={**result.gaps, **in_replies.gaps},
    )


def average_samples(samples: Sequence[ReadoutResult]) -> ReadoutResult:
    """Average over the samples that have a value."""
    if len(samples) == 1:
        return samples[0]

    def mean(every: Sequence[Floats]) -> Floats:
        averages = np.stack(every, axis=1)
        return average_present(averages, ~np.isnan(averages))

    return ReadoutResult(
        [mean(own) for own in zip(*(sample.values for sample in samples), strict=True)],
        np.any([sample.broken for sample in samples], axis=0),
        [mean(own) for own in zip(*(sample.rounding for sample in samples), strict=True)],
        {n: measure_failure for one in samples for n, measure_failure in one.failed.items()},
        {n: gap for one in samples for n, gap in one.gaps.items()},
    )


REPLY_PASS_TOKENS = 1 << 15
"""Maximum number of tokens in a pass."""

REPLY_PASS_LOGITS = 1 << 27
"""Maximum number of logits in a pass."""


def read_replies(
    runs: UnpatchedRuns,
    rows: GeneratedRows,
    replies: Sequence[tuple[Reply, ...]],
    readers: Mapping[int, ReplyReader],
    relative: float = 0.0,
) -> dict[int, ReadoutResult]:
    """Read measures in replies, averaged over the samples that contain their position.

    Args:
        replies: [row] its samples.
        relative: As in `Readout.read`.

    Returns:
        The values of each reader; NaN for other measures, and in rows whose replies are too short.
    """
    if not readers:
        return {}
    every = [
        _ReplyPasses(runs, replace(rows, replies=own), list(readers.values()), relative).read()
        for own in zip(*replies, strict=True)
    ]
    return dict(zip(readers, map(average_samples, zip(*every, strict=True)), strict=True))


@dataclass(frozen=True, eq=False)
class _MeasureGroup:
    """Measures that one reader reads at one position."""

    numbers: tuple[int, ...]
    readout: Readout
    tokens: Ints
    """[row of the reader] index of the reply token that the logits predict; -1 where the reply has
    no such position."""
    own: bool
    """Whether its metric scores the reply token that follows the logits."""


@dataclass(eq=False)
class _RunRequest:
    """Requested values of passes without rules, or with the rules of the rows."""

    run: PromptRun | None
    """None: with the rules of the rows."""
    wanted: Bools
    """[row, tokens of the reply] where logits are requested."""
    readouts: list[Readout] = field(default_factory=list[Readout])
    whole: bool = False
    """Whether all logits are requested."""


@dataclass(frozen=True, eq=False)
class _Pass:
    """Result of a pass over some rows."""

    result: FullPassResult
    batch: Batch
    logits: Tensor
    """[row, slot, vocab]"""
    slots: Ints
    """[row, tokens of the reply] slot in `logits`."""
    tokens: Tensor | None

    def at(self, rows: Ints, tokens: Ints) -> Tensor:
        """Return [K, vocab]: the logits before these reply tokens."""
        slot = self.slots[rows, tokens]
        index = torch.from_numpy(rows), torch.from_numpy(slot)
        return self.logits[indices_to_device(index, self.logits.device)]

    def site(self, read: SiteRead, rows: Ints, positions: Ints) -> Tensor:
        """Return [K, units, width]: values read at these positions."""
        vectors = self.result.reads[read]
        row = torch.from_numpy(rows)
        index = row, self.batch.of_read(read).columns(row, torch.from_numpy(positions))
        return vectors[indices_to_device(index, vectors.device)]


_WITH_RULES = 0


class _ReplyPasses:
    """Reader of one sample of each row."""

    def __init__(
        self,
        runs: UnpatchedRuns,
        rows: GeneratedRows,
        readers: Sequence[ReplyReader],
        relative: float,
    ) -> None:
        self.runs, self.rows, self.readers, self.relative = runs, rows, readers, relative
        self.count = len(rows.prompts)
        self.longest = max((len(reply.ids) for reply in rows.replies), default=0)
        self._places: dict[ReplyPosition, list[tuple[int, ...]]] = {}
        self.asked: dict[int, _RunRequest] = {}
        self.groups = [list(self._groups(reader)) for reader in readers]
        for reader in readers:
            if reader.looks is not None:
                self._ask(self._source(reader))
        self.found = [self._nothing(reader) for reader in readers]

    def read(self) -> list[ReadoutResult]:
        """Return the values of each reader."""
        for chunk in self._chunks():
            local = np.full(self.count, -1, dtype=np.int64)
            local[chunk] = np.arange(len(chunk))
            looking = [self._look(reader, local) for reader in self.readers]
            reads: dict[int, dict[SiteRead, None]] = {key: {} for key in self.asked}
            for reader, numbers in zip(self.readers, looking, strict=True):
                if numbers is not None:
                    reads[self._key(self._source(reader))].update(dict.fromkeys(numbers[1].places))
            passes = {
                key: self._pass(asked, chunk, list(reads[key])) for key, asked in self.asked.items()
            }
            for number, (reader, numbers) in enumerate(zip(self.readers, looking, strict=True)):
                for group in self.groups[number]:
                    self._read_group(number, reader, group, local, passes)
                if numbers is not None:
                    self._read_look(number, reader, *numbers, passes)
        return self.found

    # --- requests -----------------------------------------------------------------------------

    def _source(self, reader: ReplyReader) -> PromptRun | None:
        """Return the unpatched run that a reader reads; None for the rows with their rules."""
        if not reader.as_base:
            return None
        assert reader.plan is not None
        return self.runs.named(reader.plan.experiment.spec.base)

    def _key(self, run: PromptRun | None) -> int:
        return _WITH_RULES if run is None else id(run)

    def _ask(self, run: PromptRun | None) -> _RunRequest:
        empty = np.zeros((self.count, self.longest + 1), dtype=np.bool_)
        return self.asked.setdefault(self._key(run), _RunRequest(run, empty))

    def _groups(self, reader: ReplyReader) -> Iterator[_MeasureGroup]:
        """Group the measures that are read at positions of replies, and request their logits."""
        places: dict[tuple[ReplyPosition, bool], list[int]] = {}
        for n in reader.readout.in_replies:
            measure = reader.readout.measures[n]
            own = any(atom.form.takes == "own" for atom in measure.atoms)
            if measure.in_reply is not None and n not in reader.skip:
                places.setdefault((measure.in_reply, own), []).append(n)
        asked = self._ask(self._source(reader)) if places else None
        for (place, own), numbers in places.items():
            assert asked is not None
            every = self.tokens_of(place)
            first = [every[row][0] if every[row] else -1 for row in reader.at.tolist()]
            tokens = np.array(first, dtype=np.int64).reshape(-1)
            tokens = np.where(tokens < 0, -1, tokens - own)
            measures = [reader.readout.measures[n] for n in numbers]
            readout = Readout.of([replace(each, at={}, in_reply=None) for each in measures])
            self._want(asked, reader, tokens)
            asked.readouts.append(readout)
            for _, atom in readout.atoms:
                if atom.run is not None:
                    other = self._ask(self.runs.named(atom.run))
                    self._want(other, reader, tokens)
                    other.whole = True
            yield _MeasureGroup(tuple(numbers), readout, tokens, own)

    @staticmethod
    def _want(asked: _RunRequest, reader: ReplyReader, tokens: Ints) -> None:
        there = tokens >= 0
        asked.wanted[reader.at[there], tokens[there]] = True

    def tokens_of(self, place: ReplyPosition) -> list[tuple[int, ...]]:
        """Return [row]: the tokens of its reply at a position."""
        if place not in self._places:
            tokenizer = self.runs.model_of(self.rows.run).tokenizer
            assert tokenizer is not None
            self._places[place] = [
                find_reply_tokens(place.of_row(row), reply.ids, reply.text, tokenizer.decode)
                for row, reply in zip(self.rows.prompts.tolist(), self.rows.replies, strict=True)
            ]
        return self._places[place]

    def _lengths(self, run: PromptRun) -> Ints:
        """Return [row]: number of prompt tokens."""
        lengths = [len(run.rows[prompt].ids) for prompt in self.rows.prompts.tolist()]
        return np.array(lengths, dtype=np.int64)

    def _chunks(self) -> Iterator[Ints]:
        """Split the rows into chunks that share a pass."""
        if not self.asked:
            return
        runs = [asked.run or self.rows.run for asked in self.asked.values()]
        longest = max(int(self._lengths(run).max()) for run in runs) + self.longest
        slots = max(int(asked.wanted.sum(1).max()) for asked in self.asked.values())
        if any(write.site == "logits" for write in self._every_write()):
            slots = longest
        logits = max(slots, 1) * self.runs.model.shape.vocab_size
        size = max(1, min(REPLY_PASS_TOKENS // longest, REPLY_PASS_LOGITS // logits))
        for begin in range(0, self.count, size):
            yield np.arange(begin, min(begin + size, self.count))

    def _every_write(self) -> Iterator[SiteWrite]:
        yield from self.rows.prefill.writes
        for step in self.rows.later.steps:
            yield from step.writes

    # --- passes -------------------------------------------------------------------------------

    def _pass(self, asked: _RunRequest, chunk: Ints, reads: Sequence[SiteRead]) -> _Pass:
        run = asked.run or self.rows.run
        model = self.runs.model_of(run)
        prompts = self.rows.prompts[chunk]
        texts = [
            (*run.rows[prompt].ids, *self.rows.replies[row].ids)
            for prompt, row in zip(prompts.tolist(), chunk.tolist(), strict=True)
        ]
        side = self.runs.side or model.calling.side
        provide_images(model, (run.rows[prompt] for prompt in prompts.tolist()))
        acting = self._acting(asked.run, chunk)
        sources = [run.rows[prompt].source for prompt in prompts.tolist()]
        batch = apply_position_ids(model, build_batch(model, texts, sources, side), acting)
        wanted = asked.wanted[chunk].copy()
        wanted[:, 0] |= ~wanted.any(1)
        slots = np.where(wanted, wanted.cumsum(1) - 1, 0)
        row, token = np.nonzero(wanted)
        last = self._lengths(run)[chunk] - 1
        at = np.repeat(last[:, None], int(slots.max()) + 1, axis=1)
        at[row, slots[row, token]] += token
        every = any(write.site == "logits" for write in acting.writes)
        full = every or asked.whole
        tokens = None if full else self.runs.tokens(asked.readouts, np.unique(prompts))
        self.runs.passes += 1
        with replace_blocks(model, acting.blocks):
            result = run_full(
                model,
                batch,
                writes=acting.writes,
                reads=reads,
                logits_at=None if every else torch.from_numpy(at),
                tokens=tokens,
                edges=acting.edges,
            )
        assert result.logits is not None
        logits = result.logits
        if every:
            logits = select_positions(logits, batch, torch.from_numpy(at))
        return _Pass(result, batch, logits, slots, tokens)

    def _acting(self, run: PromptRun | None, chunk: Ints) -> RuleWrites:
        """Build the writes at all positions of prompts and replies."""
        rows, prompt_run = self.rows, run or self.rows.run
        model, table = self.runs.model_of(prompt_run), self.runs.table
        noise = build_noise_writes(
            model, prompt_run.noise, rows.prompts, table.row_keys, self.runs.seed
        )
        prefill = RuleWrites(noise)
        if run is None:
            prefill = prefill.then(rows.prefill)
        writes = RowChoice(self.count, chunk.tolist()).rules(prefill)
        if run is not None:
            return writes
        assert not rows.later.kept  # rejected earlier: prompt and replies would see different keys
        lengths = torch.from_numpy(self._lengths(prompt_run))
        written = np.array([len(reply.ids) for reply in rows.replies], dtype=np.int64)
        later: list[RuleWrites] = []
        for step in range(1, self.longest + 1):
            place = np.flatnonzero(written[chunk] >= step)
            there = torch.from_numpy(chunk[place])
            newest = lengths[there] + step - 1
            acting = RowChoice(self.count, there.tolist()).step(
                rows.later.steps, step, lengths[there], newest
            )
            later.append(acting.moved(torch.from_numpy(place)))
        return merge_steps(writes, later)

    # --- values -------------------------------------------------------------------------------

    def _nothing(self, reader: ReplyReader) -> ReadoutResult:
        count = len(reader.at)
        values = [np.full(count, np.nan) for _ in reader.readout.measures]
        rounding = [np.zeros(count) for _ in reader.readout.measures]
        return ReadoutResult(values, np.zeros(count, dtype=np.bool_), rounding, {}, {})

    def _read_group(
        self,
        number: int,
        reader: ReplyReader,
        group: _MeasureGroup,
        local: Ints,
        passes: Mapping[int, _Pass],
    ) -> None:
        """Read the measures of one position, in those rows of these passes that contain it."""
        rows = np.flatnonzero((local[reader.at] >= 0) & (group.tokens >= 0))
        if not len(rows):
            return
        here, tokens = local[reader.at[rows]], group.tokens[rows]
        own = passes[self._key(self._source(reader))]
        standing = None
        if group.own:
            replies = (self.rows.replies[row].ids for row in reader.at[rows].tolist())
            pairs = zip(replies, tokens.tolist(), strict=True)
            standing = np.array([ids[token] for ids, token in pairs], dtype=np.int64)
        reading = self._reading(reader, rows, own.at(here, tokens)[:, None], own.tokens)
        references = {
            n: passes[id(self.runs.named(atom.run))].at(here, tokens)
            for n, (_, atom) in enumerate(group.readout.atoms)
            if atom.run is not None
        }
        reading = replace(reading, references=references, standing=standing)
        self._take(number, group.numbers, rows, group.readout.read(reading, self.relative))

    def _reading(
        self, reader: ReplyReader, rows: Ints, logits: Tensor | None, tokens: Tensor | None
    ) -> ReadoutInput:
        return ReadoutInput(
            run=self.rows.run.name,
            prompts=reader.rows.prompt[rows],
            items=[reader.items[row] for row in rows.tolist()],
            logits=logits,
            continued={},
            loss=None,
            activations={},
            references={},
            tokens=tokens,
        )

    def _look(self, reader: ReplyReader, local: Ints) -> tuple[Ints, RowObserver] | None:
        """Build the observer for those rows of these passes that contain all its positions."""
        plan = reader.looks
        if plan is None or not reader.seen:
            return None
        run = self._source(reader) or self.rows.run
        places = ReplyTokenMap(self.tokens_of, self._lengths(run), reader.at)
        rows = np.flatnonzero((local[reader.at] >= 0) & places.there(plan, reader.rows))
        if not len(rows):
            return None
        reply_token_map = replace(places, at=reader.at[rows])
        shape = self.runs.model.shape
        return rows, build_observer(
            plan,
            reader.rows.take(rows),
            local[reader.at[rows]],
            shape,
            reply_token_map,
            systems=reader.systems,
        )

    def _read_look(
        self,
        number: int,
        reader: ReplyReader,
        rows: Ints,
        seen: RowObserver,
        passes: Mapping[int, _Pass],
    ) -> None:
        own = passes[self._key(self._source(reader))]
        vectors = {read: own.site(read, *places) for read, places in seen.places.items()}
        measures = [replace(reader.readout.measures[n], at={}) for n in reader.seen]
        readout, prompts = Readout.of(measures), np.unique(reader.rows.prompt[rows])
        tokens = self.runs.observed_tokens(readout, prompts)
        observed: ObservedValues = seen.observed(vectors, self.runs.unembedding, tokens)
        reading = replace(self._reading(reader, rows, None, None), observed=observed)
        self._take(number, reader.seen, rows, readout.read(reading))

    def _take(self, number: int, measures: Sequence[int], rows: Ints, own: ReadoutResult) -> None:
        """Store the values of some rows of a reader."""
        whole = self.found[number]
        for n, values, rounding in zip(measures, own.values, own.rounding, strict=True):
            whole.values[n][rows], whole.rounding[n][rows] = values, rounding
        whole.broken[rows] |= own.broken
        failed: dict[int, MeasureFailure] = {
            measures[n]: measure_failure for n, measure_failure in own.failed.items()
        }
        gaps = {
            measures[n]: ValueGap(rows[value_gap.rows], value_gap.reason)
            for n, value_gap in own.gaps.items()
        }
        for n, gap in gaps.items():
            before = whole.gaps.get(n)
            if before is not None:
                gaps[n] = ValueGap(np.concatenate([before.rows, gap.rows]), before.reason)
        self.found[number] = replace(
            whole, failed={**whole.failed, **failed}, gaps={**whole.gaps, **gaps}
        )


MAX_SHARED_TOKENS = 512
"""Largest number of tokens of a run that shares its pass with further runs."""


class UnpatchedRuns:
    """Runs without rules on the prompts of one panel, for its readouts and rows."""

    def __init__(
        self,
        panel: Panel,
        model: LoadedModel,
        readouts: Sequence[Readout],
        *,
        plan: Plan,
        side: PaddingSide | None,
        others: Mapping[str, LoadedModel] | None = None,
    ) -> None:
        """Prepare the runs; others: by name, the models that runs of different models use."""
        self.panel = panel
        self.model = model
        self.others = others or {}
        self.table: PromptTable = panel.table
        self.seed = panel.experiments[0].experiment.seed
        self.side: PaddingSide | None = side
        self.plan = plan
        self.only_looks = is_read_only(panel)
        self.readouts = readouts
        narrow = all(readout.narrow for readout in readouts)
        accuracies = any(experiment.experiment.accuracies for experiment in panel.experiments)
        self.narrow = plan.narrows_logits and narrow and not accuracies
        self.spots = collect_measured_positions(
            [m for readout in readouts for m in readout.measures]
        )
        if {} not in self.spots:  # accuracies read the last token
            self.spots = (*self.spots, {})
        self.in_answers = any(experiment.in_answers for experiment in panel.experiments)
        self.needs_full_passes = any(
            experiment.experiment.needs_full_passes for experiment in panel.experiments
        )
        self.loss = next((g.loss for g in readouts if g.loss is not None), None)
        self.rules_of: Callable[[PromptRun, Ints, Ints, Ints], RuleWrites] | None = None
        """Builds the writes of a derived run: see `DerivedRuns.rules`."""
        self._lanes: dict[tuple[object, ...], UnpatchedBatch] = {}
        generation = panel.experiments[0].experiment.generation
        self.writer = generation and ReplyGenerator(
            self.model_of,
            panel.table,
            self.seed,
            generation,
            cached=plan.keeps_tokens,
            shares=plan.shares_rows,
        )
        """Generator of replies; None if no text is generated."""
        self._in_replies: dict[tuple[object, ...], dict[int, ReadoutResult]] = {}
        self.passes = 0
        """Number of forward passes so far."""

    @property
    def shortcuts(self) -> Shortcuts | None:
        """Computations that rows reuse from these runs; None if rows are full passes."""
        whole = self.model.shape.encodes_apart or not self.model.restartable
        whole |= self.needs_full_passes
        return self.plan.shortcuts if self.plan.restarts and not whole else None

    def named(self, name: str) -> PromptRun:
        return self.table.runs[name]

    def forget(self) -> None:
        """Free all computed values."""
        self._lanes.clear()
        self._in_replies.clear()
        if self.writer is not None:
            self.writer.forget()

    def lanes(
        self,
        run: PromptRun,
        prompts: Ints,
        continuation: MetricTerm | None = None,
        *,
        alone: bool = False,
    ) -> UnpatchedBatch:
        """Return the unpatched run on these prompts, computed once per batch.

        If the prompts are few, further runs that are needed share the pass, because one pass reads
        the weights once. `alone` prevents this.
        """
        key = self._key(run, prompts, continuation)
        if key not in self._lanes:
            due = [run]
            if not alone and continuation is None and self._is_own(run):
                due += self._companions(run, prompts)
            rules = self._rules(run, prompts)  # may run others
            self.passes += 1
            batches = compute_unpatched(
                self.model_of(run),
                [
                    (prompt_run, self._request(prompt_run, prompts, continuation))
                    for prompt_run in due
                ],
                prompts,
                self.table.row_keys,
                seed=self.seed,
                side=self.side,
                rules=rules,
            )
            for prompt_run, lanes in zip(due, batches, strict=True):
                self._lanes[self._key(prompt_run, prompts, continuation)] = lanes
        return self._lanes[key]

    def external_lanes(
        self, external: ExternalRun, prompts: Ints, places: Iterable[SiteLayer]
    ) -> UnpatchedBatch:
        """Return a run of a different prompt set with these sites; computed once per batch."""
        table, run = external.table, external.table.runs[external.run]
        reads = frozenset(places)
        key = (*self._key(run, prompts, None), reads)
        if key in self._lanes:
            return self._lanes[key]
        self.passes += 1
        stop, shares = self.model.shape.n_layers + 1, self.plan.shares_rows
        request = UnpatchedRequest(reads=reads, stop=stop, shares=shares)
        (batch,) = compute_unpatched(
            self.model, [(run, request)], prompts, table.row_keys, seed=self.seed, side=self.side
        )
        self._lanes[key] = batch
        return batch

    def everything(
        self,
        run: PromptRun,
        prompt: int,
        reads: Sequence[SiteRead],
        continuation: MetricTerm | None,
    ) -> Mapping[SiteRead, Tensor]:
        """Read sites on all tokens of one prompt in a separate pass, in the order of `reads`."""
        self.passes += 1
        places = frozenset((read.site, read.layer) for read in reads)
        request = UnpatchedRequest(reads=places, continuation=continuation)
        prompts = np.array([prompt], dtype=np.int64)
        (unpatched,) = compute_unpatched(
            self.model_of(run),
            [(run, request)],
            prompts,
            self.table.row_keys,
            seed=self.seed,
            side=self.side,
            rules=self._rules(run, prompts),
        )
        return {read: unpatched.reads[read] for read in reads}

    def reader(self, run: PromptRun, points: Iterable[SitePoint]) -> BatchReader:
        """Build a reader of these sites of a run, including its rules.

        Its passes stop after the highest site: see `mechdsl.execute.vectors.read_vectors`.
        """
        model = self.model_of(run)
        request = replace(request_sites(points, model.shape), shares=self.plan.shares_rows)

        def lanes(prompts: Ints) -> UnpatchedBatch:
            rules = self._rules(run, prompts)
            self.passes += 1
            (unpatched,) = compute_unpatched(
                model,
                [(run, request)],
                prompts,
                self.table.row_keys,
                seed=self.seed,
                side=self.side,
                rules=rules,
            )
            return unpatched

        return lanes

    def rules(self, run: PromptRun, prompts: Ints, draw: Ints, batch: Ints) -> RuleWrites:
        """Build the writes of a derived run in rows that start from it: see `DerivedRuns.rules`."""
        assert self.rules_of is not None
        return self.rules_of(run, prompts, draw, batch)

    def _rules(self, run: PromptRun, prompts: Ints) -> RuleWrites | None:
        """Build the writes of a run in separate lanes; None for a run without rules."""
        if run.derived is None:
            return None
        lanes, draw = np.repeat(prompts, run.draws), np.tile(np.arange(run.draws), len(prompts))
        return self.rules(run, lanes, draw, prompts)

    def model_of(self, run: PromptRun) -> LoadedModel:
        """Return the model that a run uses."""
        return self.model if run.model is None else self.others[run.model]

    def _companions(self, run: PromptRun, prompts: Ints) -> list[PromptRun]:
        """List further runs of similar depth that can share a pass with few prompts."""
        few = sum(len(run.rows[prompt].ids) for prompt in prompts) <= MAX_SHARED_TOKENS
        if not few or run.derived is not None or not self._goes_far(run):
            return []
        others = [self.named(name) for name in self.panel.runs]
        return [
            other
            for other in others
            if other is not run
            and other.model == run.model
            and other.derived is None
            and _share_a_pass(other, run)
            and self._key(other, prompts, None) not in self._lanes
            and self._goes_far(other)
        ]

    def _goes_far(self, run: PromptRun) -> bool:
        stop = self._stop(run)
        return stop is None or stop >= 0.75 * self.model.shape.n_layers

    @staticmethod
    def _key(run: PromptRun, prompts: Ints, continuation: MetricTerm | None) -> tuple[object, ...]:
        return id(run), prompts.tobytes(), None if continuation is None else id(continuation)

    def _is_own(self, run: PromptRun) -> bool:
        """Return whether this is the table's run; others insert text, and only their rows count."""
        return run is self.table.runs.get(run.name)

    def _request(
        self, run: PromptRun, prompts: Ints, continuation: MetricTerm | None
    ) -> UnpatchedRequest:
        """Build the request for everything that experiments need of a run."""
        if self.only_looks:  # only the tokens are needed
            return UnpatchedRequest(stop=0)
        own = self._is_own(run)
        needs = self.panel.runs.get(run.name) if own else None
        packed = [plan for plan in self._starting(run) if not plan.whole]
        lowest = min((int(plan.lowest.min()) for plan in packed), default=None)
        if self.shortcuts is None:
            lowest = None
        elif lowest is not None and not self.shortcuts.resume:
            lowest = 0
        measured = own and (needs is None or needs.measured or needs.stop is None)
        reads = set(needs.reads) if needs is not None else set[SiteLayer]()
        reads |= self._gauge_reads() if own else set[SiteLayer]()
        reads |= set[SiteLayer]().union(*(plan.observed_sites for plan in self._starting(run)))
        return UnpatchedRequest(
            reads=frozenset(reads if continuation is None or self.in_answers else ()),
            lowest=lowest,
            spots=self.spots if measured else (),
            stop=self._stop(run),
            tokens=self.tokens(self.readouts, prompts) if self.narrow else None,
            fuse=self.plan.fuses_kernels,
            shares=self.plan.shares_rows,
            loss=self.loss if measured and continuation is None else None,
            continuation=continuation,
        )

    def _starting(self, run: PromptRun) -> list[ExperimentPlan]:
        """List the experiments with rows that start from a run."""
        plans = self.panel.experiments
        return [plan for plan in plans if any(run is start for start in plan.starting_runs)]

    def _stop(self, run: PromptRun) -> int | None:
        """Return how many blocks of a run are needed; None for the full pass."""
        if not self._is_own(run):
            return self.model.shape.n_layers
        needs = self.panel.runs.get(run.name)
        if needs is None or self._starting(run) or self._gauge_reads():
            return None
        return needs.stop

    def tokens(self, readouts: Iterable[Readout], prompts: Ints) -> Tensor | None:
        """Return [K] ascending: tokens whose logits these readouts read; None for all."""
        if not self.plan.narrows_logits or not all(readout.narrow for readout in readouts):
            return None
        tokens = sorted(set[int]().union(*(readout.tokens(prompts) for readout in readouts)))
        return to_device(torch.tensor(tokens, dtype=torch.long), self.model.device)

    def observed_tokens(self, readout: Readout, prompts: Ints) -> Tensor | None:
        """Return [K] ascending: tokens whose observed logits a readout reads; None for all."""
        observed_tokens = readout.observed_tokens(prompts)
        if observed_tokens is None:
            return None
        return to_device(torch.tensor(observed_tokens, dtype=torch.long), self.model.device)

    @cached_property
    def unembedding(self) -> ModelUnembedding:
        """The model's computation after its last block."""
        return ModelUnembedding(self.model)

    @cached_property
    def norms(self) -> FrozenNorms:
        """The norms that paths may freeze."""
        return FrozenNorms(self.model)

    def _gauge_reads(self) -> set[SiteLayer]:
        """Return the sites that measures compare (`cosine`)."""
        return {
            (atom.point.site, atom.point.layer)
            for readout in self.readouts
            for _, atom in readout.atoms
            if atom.point is not None
        }

    def values(
        self,
        readout: Readout,
        run: str,
        prompts: Ints,
        environment: int | None,
        *,
        relative: float = 0.0,
        skip: Collection[int] = (),
    ) -> ReadoutResult:
        """Read every prompt, averaged over noise draws.

        `relative` and `skip` are those of `Readout.read`.
        """
        if self.only_looks:
            return self._unseen(readout, prompts)
        written = self._written(readout, run, prompts)
        if readout.only_replies:
            reading = self._nothing_read(run, prompts, environment)
            result = read_samples(readout, reading, written, relative, skip=skip)
            result = self._with_replies(result, readout, run, prompts, environment, relative)
            return result.over_draws(self.named(run).draws)
        plain = self.lanes(self.named(run), prompts)
        lanes = np.repeat(prompts, plain.draws)
        draws = np.tile(np.arange(plain.draws), len(prompts))
        reading = ReadoutInput(
            run=run,
            prompts=lanes,
            items=[environment] * len(lanes),
            logits=self._of_spots(readout, plain.logits),
            continued={
                n: require_logits(self.lanes(self.named(run), prompts, readout.atoms[n][1]).logits)
                for n in readout.continuations
            },
            loss=plain.loss,
            activations={
                n: self._activation(atom, readout.spots[spot], plain, np.arange(len(lanes)))
                for n, (spot, atom) in enumerate(readout.atoms)
                if atom.point is not None
            },
            references=self.references(readout, prompts, lanes, draws),
            tokens=plain.tokens,
            largest=self._of_spots(readout, plain.largest),
            has_loss=None if plain.loss is None else has_loss(self.named(run), lanes),
        )
        result = read_samples(readout, reading, written, relative, skip=skip)
        result = self._with_replies(result, readout, run, prompts, environment, relative)
        return result.over_draws(plain.draws)

    def _with_replies(
        self,
        found: ReadoutResult,
        readout: Readout,
        run: str,
        prompts: Ints,
        environment: int | None,
        relative: float,
    ) -> ReadoutResult:
        """Add the values read in the run's own replies.

        They are computed for all readouts at once, which share the passes.
        """
        if not readout.in_replies:
            return found
        assert self.writer is not None
        key = (run, prompts.tobytes(), environment, relative)
        if key not in self._in_replies:
            lanes = np.repeat(prompts, self.named(run).draws)
            none = np.zeros_like(lanes)
            rows, at = RowTable(none, lanes, none), np.arange(len(lanes))
            items = [environment] * len(lanes)
            readers = {
                id(each): ReplyReader(None, each, rows, at, items)
                for each in self.readouts
                if each.in_replies
            }
            replies = self.writer.of_run(self.named(run), prompts)
            have = GeneratedRows(self.named(run), lanes, ())
            self._in_replies[key] = read_replies(self, have, replies, readers, relative)
        return merge_reply_values(found, self._in_replies[key][id(readout)])

    @cached_property
    def _shown(self) -> set[str | None]:
        """The runs whose replies are shown next to those of cells, whatever is measured."""
        specs = [plan.experiment.spec for plan in self.panel.experiments]
        return {name for spec in specs for name in (spec.base, spec.source)}

    def _written(self, readout: Readout, run: str, prompts: Ints) -> list[tuple[Reply, ...]]:
        """Return, per lane, the replies of a run; empty if they are neither measured nor shown."""
        if self.writer is None or not (readout.reads_replies or run in self._shown):
            return []
        return self.writer.of_run(self.named(run), prompts)

    def _nothing_read(self, run: str, prompts: Ints, environment: int | None) -> ReadoutInput:
        """Create the input for lanes of a run of which only replies are read."""
        lanes = np.repeat(prompts, self.named(run).draws)
        return ReadoutInput(run, lanes, [environment] * len(lanes), None, {}, None, {}, {})

    def _unseen(self, readout: Readout, prompts: Ints) -> ReadoutResult:
        """Return no value for any measure: observed values come from rows only."""
        count = len(prompts)
        values = [np.full(count, np.nan) for _ in readout.measures]
        rounding = [np.zeros(count) for _ in readout.measures]
        return ReadoutResult(values, np.zeros(count, dtype=np.bool_), rounding, {}, {})

    def _of_spots(self, readout: Readout, vectors: Tensor | None) -> Tensor | None:
        """Select [lane, spot of the readout, ...] from [lane, spot, ...]."""
        if vectors is None or not readout.needs_plain:
            return None
        spots = torch.tensor([self.spots.index(spot) for spot in readout.spots])
        return vectors[:, to_device(spots, vectors.device)]

    def references(
        self, readout: Readout, prompts: Ints, row_prompts: Ints, draws: Ints
    ) -> dict[int, Tensor]:
        """Return the values that `kl(run)`, `js(run)` and `cosine(SITE, run)` compare rows with."""
        references: dict[int, Tensor] = {}
        for number, (spot, atom) in enumerate(readout.atoms):
            if atom.run is None or readout.in_reply[number]:
                continue
            reference = self.lanes(self.named(atom.run), prompts)
            lane = reference.lane(row_prompts, draws)
            if atom.point is not None:
                references[number] = self._activation(atom, readout.spots[spot], reference, lane)
            else:
                logits = require_logits(reference.logits)
                index = array_to_device(lane, logits.device)
                references[number] = logits[index, self.spots.index(readout.spots[spot])]
        return references

    def _activation(
        self, atom: MetricTerm, spot: MeasuredPosition, lanes: UnpatchedBatch, lane: Ints
    ) -> Tensor:
        """Return [row, 1, width]: the site of a `cosine` at the measured position."""
        assert atom.point is not None
        where = SiteRead(atom.point.site, atom.point.layer)
        read, tokens = lanes.reads[where], lanes.batch.of_read(where)
        prompts = np.repeat(lanes.prompts, lanes.draws)[lane]
        position = find_positions(spot, lanes.run, prompts, lanes.lengths[lane])
        row = torch.from_numpy(lane)
        index = row, tokens.columns(row, torch.from_numpy(np.ascontiguousarray(position)))
        return flatten_units(read[indices_to_device(index, read.device)], atom)


def _share_a_pass(run: PromptRun, other: PromptRun) -> bool:
    """Return whether prompts of two runs can be in one pass: images of different numbers of tokens
    can't, because no model pads them."""
    first, second = run.rows[0], other.rows[0]
    return first.image is None or len(first.ids) == len(second.ids)


def flatten_units(vectors: Tensor, atom: MetricTerm) -> Tensor:
    """Flatten [row, units, width] to [row, 1, width]; only the named unit, if there is one."""
    assert atom.point is not None
    if atom.point.unit is not None:
        vectors = vectors[:, [atom.point.unit]]
    return vectors.flatten(1)[:, None]


def require_logits(logits: Tensor | None) -> Tensor:
    """Return the logits of a measured run."""
    assert logits is not None, "a measured run was stopped early"
    return logits
