"""Rules during generation, written once for the package and for a loop of plain passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mechdsl.forward.generation import replies as write_replies_module
from mechdsl.forward.generation.decoding import Decoding
from mechdsl.forward.generation.replies import ReplyRequest, generate_replies
from mechdsl.forward.generation.rules import GenerationRules, StepEdge, StepRules
from mechdsl.forward.hooks.batch import EdgeWrite, EditWrite, RuleWrites, SiteWrite, WriteMode
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.vocab.metrics import Reply

from ..reference.forward import Edge, Run, Write, forward
from ..rules.models import double

Also = Literal["", "newest", "written"]
Kind = Literal["block", "reweight", "uniform", "set"]
NEAR = 1e-4
"""Tolerance of logits, relative to the largest."""


@dataclass(frozen=True)
class Act:
    """A write to one vector of one row."""

    row: int
    site: str
    layer: int | None
    mode: WriteMode
    values: tuple[float, ...]
    unit: int = 0
    to: float = 0.0
    position: int | None = None
    """In the prompt, in the prefill; None: the newest token of `steps`."""
    steps: tuple[int, int | None] = (1, None)

    def changed(self, now: Tensor) -> Tensor:
        """The vector after the write, by the definition of the mode."""
        values = torch.tensor(self.values, dtype=now.dtype)
        match self.mode:
            case "set":
                return values.expand_as(now)
            case "add":
                return now + values
            case "scale":
                return now * values
            case "along":
                unit = values / values.norm()
                return now + (self.to - now @ unit)[..., None] * unit
            case EditWrite(matrix=matrix):
                rank = len(matrix) // 2
                parts = zip(matrix[:rank], matrix[rank:-1], strict=True)
                added = [(now * read).sum(-1, keepdim=True) * write for read, write in parts]
                return now + values * (sum(added) + matrix[-1])
            case _:
                raise ValueError(self.mode)

    @property
    def write(self) -> SiteWrite:
        """For the package."""
        values = torch.tensor([self.values])
        if self.mode == "along":
            values = values / values.norm()
        return SiteWrite(
            self.site,
            self.layer,
            torch.tensor([self.row]),
            torch.tensor([self.position or 0]),
            torch.tensor([self.unit]),
            values,
            self.mode,
            torch.tensor([self.to]) if self.mode == "along" else None,
        )


@dataclass(frozen=True)
class Look:
    """An edit of one row's attention, from one query token."""

    row: int
    kind: Kind
    layer: int
    head: int
    keys: tuple[int, ...]
    amount: float = 0.0
    query: int | None = None
    """In the prompt, in the prefill; None: the newest token of `steps`."""
    also: Also = ""
    steps: tuple[int, int | None] = (1, None)

    @property
    def edge(self) -> EdgeWrite:
        """For the package."""
        return EdgeWrite(
            self.layer,
            "weight" if self.kind == "set" else self.kind,
            torch.tensor([self.row]),
            torch.tensor([self.query or 0]),
            torch.tensor([self.head]),
            torch.zeros(len(self.keys), dtype=torch.long),
            torch.tensor(self.keys, dtype=torch.long),
            torch.tensor([self.amount]),
        )


@dataclass(frozen=True)
class Rules:
    """All rules on the rows of a batch."""

    acts: Sequence[Act] = ()
    looks: Sequence[Look] = ()
    kept: Sequence[Act] = ()
    """Edits of cached `k` and `v` at positions of the prompt, between prefill and step 1."""

    def given(self) -> dict[str, Any]:
        """Keyword arguments for the package."""
        prefill = RuleWrites(
            [act.write for act in self.acts if act.position is not None],
            [look.edge for look in self.looks if look.query is not None],
        )
        steps = [
            StepRules(*act.steps, writes=[act.write]) for act in self.acts if act.position is None
        ] + [
            StepRules(*look.steps, edges=[StepEdge(look.edge, look.also)])
            for look in self.looks
            if look.query is None
        ]
        kept = tuple(act.write for act in self.kept)
        return {"prefill": prefill, "later": GenerationRules(kept, tuple(steps))}

    def of(self, rows: Sequence[int]) -> Rules:
        """The rules on these rows, renumbered."""

        def some(each: Sequence[Any]) -> list[Any]:
            return [replace(x, row=rows.index(x.row)) for x in each if x.row in rows]

        return Rules(some(self.acts), some(self.looks), some(self.kept))


@dataclass(frozen=True)
class Written:
    """The completion of each prompt, and the logits [step, vocab] of its tokens."""

    replies: list[Reply]
    logits: list[Tensor]


def written(
    model: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    decoding: Decoding,
    rules: Rules | None = None,
    **settings: Any,
) -> Written:
    """Generate with the package."""
    found: dict[int, list[Tensor]] = {row: [] for row in range(len(prompts))}
    choose = write_replies_module.choose_next_tokens

    def listening(
        logits: Tensor, states: Sequence[int], how: Decoding, keys: Any, step: int
    ) -> Any:
        for state, (row, *_) in zip(states, keys, strict=True):
            assert len(found[row]) == step
            found[row].append(logits[state].double())
        return choose(logits, states, how, keys, step)

    names = ("prefill", "later", "groups", "sources")
    asked = {name: settings.pop(name) for name in names if name in settings}
    asked["random"] = [(row,) for row in range(len(prompts))]
    request = ReplyRequest(prompts, **{**(rules or Rules()).given(), **asked})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_replies_module, "choose_next_tokens", listening)
        replies = generate_replies(model, request, decoding, **settings)
    return Written(replies, [torch.stack(found[row]) for row in range(len(prompts))])


def agree(found: Written, expected: Sequence[tuple[Sequence[int], Tensor]]) -> None:
    """Check equal tokens, and equal logits up to float32 rounding."""
    for row, (ids, logits) in enumerate(expected):
        assert found.replies[row].ids == tuple(ids), row
        error = (found.logits[row] - logits).abs().amax() / logits.abs().amax()
        assert error < NEAR, (row, error)


def greedy(tokens: int, **settings: Any) -> Decoding:
    """Greedy decoding; the text has token ids as numbers."""
    return Decoding(tokens, lambda ids: " ".join(map(str, ids)), **settings)


def by_hand(name: str, prompts: Sequence[tuple[int, ...]], rules: Rules, tokens: int) -> list[Any]:
    """[row] (tokens of the completion, their logits [step, vocab])."""
    return [_row(name, row, prompt, rules, tokens) for row, prompt in enumerate(prompts)]


def _row(
    name: str, row: int, prompt: tuple[int, ...], rules: Rules, tokens: int
) -> tuple[list[int], Tensor]:
    reply: list[int] = []
    found: list[Tensor] = []
    was: list[Write] = []
    for step in range(tokens):
        writes, edges = _acting(row, prompt, rules, step)
        run = forward(name, double(name), [*prompt, *reply], [*writes, *was], edges)
        found.append(run.logits[-1])
        reply.append(int(run.logits[-1].argmax()))
        if step == 0 and any(act.row == row for act in rules.kept):
            was = _as_they_were(run, [act for act in rules.kept if act.row == row])
    return reply, torch.stack(found)


def _acting(
    row: int, prompt: tuple[int, ...], rules: Rules, step: int
) -> tuple[list[Write], list[Edge]]:
    """Rules on the prompt and on the generated tokens up to a step."""
    writes = [
        Write(act.site, act.layer, act.changed, act.position, act.unit)
        for act in rules.acts
        if act.row == row and act.position is not None
    ]
    edges = [
        Edge(look.kind, look.layer, [look.query], look.keys, look.amount, [look.head])
        for look in rules.looks
        if look.row == row and look.query is not None
    ]
    for earlier in range(1, step + 1):
        at = len(prompt) + earlier - 1

        def acts(steps: tuple[int, int | None], now: int = earlier) -> bool:
            return steps[0] <= now <= (now if steps[1] is None else steps[1])

        writes += [
            Write(act.site, act.layer, act.changed, at, act.unit)
            for act in rules.acts
            if act.row == row and act.position is None and acts(act.steps)
        ]
        for look in rules.looks:
            if look.row == row and look.query is None and acts(look.steps):
                more = {"": [], "newest": [at], "written": list(range(len(prompt), at + 1))}
                keys = [*look.keys, *more[look.also]]
                edges.append(Edge(look.kind, look.layer, [at], keys, look.amount, [look.head]))
    return writes, edges


def _as_they_were(run: Run, kept: Sequence[Act]) -> list[Write]:
    """Edited keys and values of the full prompt, as all later passes see them."""
    found = {place: value.clone() for place, value in run.seen.items() if place[0] in ("k", "v")}
    for act in kept:
        vectors = found[act.site, act.layer]
        here = act.position, act.unit
        vectors[here] = act.changed(vectors[here][None])[0]
    return [
        Write(site, layer, value[position, unit], position, unit)
        for (site, layer), value in found.items()
        for position in range(value.shape[0])
        for unit in range(value.shape[1])
    ]
