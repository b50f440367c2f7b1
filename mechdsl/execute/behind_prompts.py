"""What is read behind prompts: whole passes over prompts and the replies that were written, with
rules where they acted, or without any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.base.reply import Reply
from mechdsl.execute.found import Failed, Found, Gap
from mechdsl.execute.observed import InReplies, Look, Observed, look
from mechdsl.execute.readout import Reading, Readout
from mechdsl.execute.reply_readers import HaveWritten, Reader, averaged
from mechdsl.execute.unpatched_batch import at_positions, noise_writes
from mechdsl.generate.acting import Chosen, over_replies
from mechdsl.hooks.batch import Batch, together_on_device
from mechdsl.hooks.block_exchange import blocks_replaced
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.hooks.whole_pass import RunResult, run_whole
from mechdsl.prompts.prompt_table import ReplyPosition, Run
from mechdsl.prompts.reply_positions import tokens_in_reply

if TYPE_CHECKING:
    from mechdsl.execute.unpatched_runs import UnpatchedRuns

PASS_TOKENS = 1 << 15
"""Tokens of a pass, at most."""
PASS_LOGITS = 1 << 27
"""Logits of a pass, at most."""


def read_behind(
    runs: UnpatchedRuns,
    rows: HaveWritten,
    replies: Sequence[tuple[Reply, ...]],
    readers: Mapping[int, Reader],
    relative: float = 0.0,
) -> dict[int, Found]:
    """Of each reader, values of what it reads in replies, NaN of all else and in rows that are
    shorter; averaged over the samples that have the place.

    replies: [row] its samples. relative: as in `Readout.read`.
    """
    if not readers:
        return {}
    every = [
        _Behind(runs, replace(rows, replies=own), list(readers.values()), relative).read()
        for own in zip(*replies, strict=True)
    ]
    return dict(zip(readers, map(averaged, zip(*every, strict=True)), strict=True))


@dataclass(frozen=True, eq=False)
class _Group:
    """Measures that one reader reads at one place."""

    numbers: tuple[int, ...]
    readout: Readout
    tokens: Ints
    """[row of the reader] tokens of the reply in front of which logits stand; -1 where it has no
    such place."""
    own: bool
    """Its metric is of the token that stands behind them."""


@dataclass(eq=False)
class _Asked:
    """What passes without rules, or with those of the rows, are to give."""

    run: Run | None
    """None: with the rules of the rows."""
    wanted: Bools
    """[row, tokens of the reply] where logits are wanted."""
    readouts: list[Readout] = field(default_factory=list[Readout])
    whole: bool = False
    """All logits are wanted."""


@dataclass(frozen=True, eq=False)
class _Pass:
    """What a pass over some rows gave."""

    result: RunResult
    batch: Batch
    logits: Tensor
    """[row, slot, vocab]"""
    slots: Ints
    """[row, tokens of the reply]"""
    tokens: Tensor | None

    def at(self, rows: Ints, tokens: Ints) -> Tensor:
        """[K, vocab]"""
        slot = self.slots[rows, tokens]
        index = torch.from_numpy(rows), torch.from_numpy(slot)
        return self.logits[together_on_device(index, self.logits.device)]

    def site(self, read: SiteRead, rows: Ints, positions: Ints) -> Tensor:
        """[K, units, width]"""
        found = self.result.reads[read]
        row = torch.from_numpy(rows)
        index = row, self.batch.columns(row, torch.from_numpy(positions))
        return found[together_on_device(index, found.device)]


_WITH_RULES = 0


class _Behind:
    """Reads one sample of each row."""

    def __init__(
        self,
        runs: UnpatchedRuns,
        rows: HaveWritten,
        readers: Sequence[Reader],
        relative: float,
    ) -> None:
        self.runs, self.rows, self.readers, self.relative = runs, rows, readers, relative
        self.count = len(rows.prompts)
        self.longest = max((len(reply.ids) for reply in rows.replies), default=0)
        self._places: dict[ReplyPosition, list[tuple[int, ...]]] = {}
        self.asked: dict[int, _Asked] = {}
        self.groups = [list(self._groups(reader)) for reader in readers]
        for reader in readers:
            if reader.looks is not None:
                self._ask(self._source(reader))
        self.found = [self._nothing(reader) for reader in readers]

    def read(self) -> list[Found]:
        """Of each reader."""
        for chunk in self._chunks():
            local = np.full(self.count, -1, dtype=np.int64)
            local[chunk] = np.arange(len(chunk))
            looking = [self._look(reader, local) for reader in self.readers]
            reads: dict[int, dict[SiteRead, None]] = {key: {} for key in self.asked}
            for reader, own in zip(self.readers, looking, strict=True):
                if own is not None:
                    reads[self._key(self._source(reader))].update(dict.fromkeys(own[1].places))
            passes = {
                key: self._pass(asked, chunk, list(reads[key])) for key, asked in self.asked.items()
            }
            for number, (reader, own) in enumerate(zip(self.readers, looking, strict=True)):
                for group in self.groups[number]:
                    self._read_group(number, reader, group, local, passes)
                if own is not None:
                    self._read_look(number, reader, *own, passes)
        return self.found

    # --- what is wanted -----------------------------------------------------------------------

    def _source(self, reader: Reader) -> Run | None:
        """What a reader reads: an unpatched run, or, None, the rows with their rules."""
        if not reader.as_base:
            return None
        assert reader.plan is not None
        return self.runs.named(reader.plan.experiment.spec.base)

    def _key(self, run: Run | None) -> int:
        return _WITH_RULES if run is None else id(run)

    def _ask(self, run: Run | None) -> _Asked:
        empty = np.zeros((self.count, self.longest + 1), dtype=np.bool_)
        return self.asked.setdefault(self._key(run), _Asked(run, empty))

    def _groups(self, reader: Reader) -> Iterator[_Group]:
        """The measures that are read at places of replies."""
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
            yield _Group(tuple(numbers), readout, tokens, own)

    @staticmethod
    def _want(asked: _Asked, reader: Reader, tokens: Ints) -> None:
        there = tokens >= 0
        asked.wanted[reader.at[there], tokens[there]] = True

    def tokens_of(self, place: ReplyPosition) -> list[tuple[int, ...]]:
        """[row] the tokens of its reply that a place is."""
        if place not in self._places:
            tokenizer = self.runs.model_of(self.rows.run).tokenizer
            assert tokenizer is not None
            self._places[place] = [
                tokens_in_reply(place, reply.ids, reply.text, tokenizer.decode)
                for reply in self.rows.replies
            ]
        return self._places[place]

    def _lengths(self, run: Run) -> Ints:
        """[row] tokens of its prompt."""
        found = [len(run.rows[prompt].ids) for prompt in self.rows.prompts.tolist()]
        return np.array(found, dtype=np.int64)

    def _chunks(self) -> Iterator[Ints]:
        """Rows that are read together."""
        if not self.asked:
            return
        runs = [asked.run or self.rows.run for asked in self.asked.values()]
        longest = max(int(self._lengths(run).max()) for run in runs) + self.longest
        slots = max(int(asked.wanted.sum(1).max()) for asked in self.asked.values())
        if any(write.site == "logits" for write in self._every_write()):
            slots = longest
        logits = max(slots, 1) * self.runs.model.shape.vocab_size
        size = max(1, min(PASS_TOKENS // longest, PASS_LOGITS // logits))
        for begin in range(0, self.count, size):
            yield np.arange(begin, min(begin + size, self.count))

    def _every_write(self) -> Iterator[SiteWrite]:
        yield from self.rows.prefill.writes
        for step in self.rows.later.steps:
            yield from step.writes

    # --- passes -------------------------------------------------------------------------------

    def _pass(self, asked: _Asked, chunk: Ints, reads: Sequence[SiteRead]) -> _Pass:
        run = asked.run or self.rows.run
        model = self.runs.model if asked.run is None else self.runs.model_of(run)
        prompts = self.rows.prompts[chunk]
        texts = [
            (*run.rows[prompt].ids, *self.rows.replies[row].ids)
            for prompt, row in zip(prompts.tolist(), chunk.tolist(), strict=True)
        ]
        side = self.runs.side or model.calling.side
        acting = self._acting(asked.run, chunk)
        batch = acting.numbered(Batch.of(texts, model.pad_id, side, model.device))
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
        with blocks_replaced(model, acting.blocks):
            result = run_whole(
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
            logits = at_positions(logits, batch, torch.from_numpy(at))
        return _Pass(result, batch, logits, slots, tokens)

    def _acting(self, run: Run | None, chunk: Ints) -> RuleWrites:
        """What is written, at all its places in prompts and replies."""
        rows, own = self.rows, run or self.rows.run
        model, table = self.runs.model_of(own), self.runs.table
        noise = noise_writes(model, own.noise, rows.prompts, table.row_keys, self.runs.seed)
        prefill = RuleWrites(noise)
        if run is None:
            prefill = prefill.then(rows.prefill)
        found = Chosen(self.count, chunk.tolist()).rules(prefill)
        if run is not None:
            return found
        assert not rows.later.kept  # refused: what the prompt saw isn't what replies see
        lengths = torch.from_numpy(self._lengths(own))
        written = np.array([len(reply.ids) for reply in rows.replies], dtype=np.int64)
        later: list[RuleWrites] = []
        for step in range(1, self.longest + 1):
            place = np.flatnonzero(written[chunk] >= step)
            there = torch.from_numpy(chunk[place])
            newest = lengths[there] + step - 1
            acting = Chosen(self.count, there.tolist()).step(
                rows.later.steps, step, lengths[there], newest
            )
            later.append(acting.moved(torch.from_numpy(place)))
        return over_replies(found, later)

    # --- what is read -------------------------------------------------------------------------

    def _nothing(self, reader: Reader) -> Found:
        count = len(reader.at)
        values = [np.full(count, np.nan) for _ in reader.readout.measures]
        rounding = [np.zeros(count) for _ in reader.readout.measures]
        return Found(values, np.zeros(count, dtype=np.bool_), rounding, {}, {})

    def _read_group(
        self,
        number: int,
        reader: Reader,
        group: _Group,
        local: Ints,
        passes: Mapping[int, _Pass],
    ) -> None:
        """Measures at one place, in the rows of these passes that have it."""
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
        self, reader: Reader, rows: Ints, logits: Tensor | None, tokens: Tensor | None
    ) -> Reading:
        return Reading(
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

    def _look(self, reader: Reader, local: Ints) -> tuple[Ints, Look] | None:
        """What is looked at in the rows of these passes that have all places."""
        plan = reader.looks
        if plan is None or not reader.seen:
            return None
        run = self._source(reader) or self.rows.run
        places = InReplies(self.tokens_of, self._lengths(run), reader.at)
        rows = np.flatnonzero((local[reader.at] >= 0) & places.there(plan, reader.rows))
        if not len(rows):
            return None
        own = replace(places, at=reader.at[rows])
        shape = self.runs.model.shape
        return rows, look(plan, reader.rows.take(rows), local[reader.at[rows]], shape, own)

    def _read_look(
        self, number: int, reader: Reader, rows: Ints, seen: Look, passes: Mapping[int, _Pass]
    ) -> None:
        own = passes[self._key(self._source(reader))]
        found = {read: own.site(read, *places) for read, places in seen.places.items()}
        measures = [replace(reader.readout.measures[n], at={}) for n in reader.seen]
        readout, prompts = Readout.of(measures), np.unique(reader.rows.prompt[rows])
        tokens = self.runs.observed_tokens(readout, prompts)
        observed: Observed = seen.observed(found, self.runs.unembedding, tokens)
        reading = replace(self._reading(reader, rows, None, None), observed=observed)
        self._take(number, reader.seen, rows, readout.read(reading))

    def _take(self, number: int, measures: Sequence[int], rows: Ints, own: Found) -> None:
        """Keep what was found in some rows of a reader."""
        whole = self.found[number]
        for n, values, rounding in zip(measures, own.values, own.rounding, strict=True):
            whole.values[n][rows], whole.rounding[n][rows] = values, rounding
        whole.broken[rows] |= own.broken
        failed: dict[int, Failed] = {measures[n]: each for n, each in own.failed.items()}
        gaps = {measures[n]: Gap(rows[each.rows], each.reason) for n, each in own.gaps.items()}
        for n, gap in gaps.items():
            before = whole.gaps.get(n)
            if before is not None:
                gaps[n] = Gap(np.concatenate([before.rows, gap.rows]), before.reason)
        self.found[number] = replace(
            whole, failed={**whole.failed, **failed}, gaps={**whole.gaps, **gaps}
        )
