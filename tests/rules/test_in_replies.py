"""What is measured and observed in replies, beside a loop of plain passes over all tokens so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.resolve.cell_key import Coord
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import token
from ..models import families
from ..reference.forward import Changes, Run, Write, forward
from .models import double
from .support import (
    QUICK,
    Array,
    compare,
    experiment,
    product,
    records,
    rows,
    run_file,
)

NAMES = ("gpt2", "llama", "gpt_neox", "gemma2")
MOST = 6
GENERATE = f'generate {MOST} until " w4"'
"""Rows stop at different steps."""
Act = Callable[..., Changes]
"""What is done to row `n` of a model, whose reply has so many tokens by now, in a cell."""


@dataclass(frozen=True)
class Reply:
    """What a row has written, and the pass over all of it in which rules act where they acted."""

    prompt: int
    ids: tuple[int, ...]
    run: Run

    def at(self, reply_token: int) -> int | None:
        """Where a token of the reply stands, 0 the prompt's last one; None where there is none."""
        return self.prompt - 1 + reply_token if reply_token <= len(self.ids) else None


def word(number: int) -> str:
    return f"w{number - len(families.SPECIAL)}"


def write(name: str, ids: Sequence[int], act: Callable[[int], Changes]) -> Reply:
    """Token by token, each time from the start."""
    found: list[int] = []
    ends = {double(name).config.eos_token_id}
    while len(found) < MOST:
        whole = [*ids, *found]
        run = forward(name, double(name), whole, *act(len(found)))
        newest = int(run.logits[-1].argmax())
        if newest in ends or (found and word(newest).startswith("w4")):
            break
        found.append(newest)
    run = forward(name, double(name), [*ids, *found], *act(len(found)))
    return Reply(len(ids), tuple(found), run)


def behind(name: str, ids: Sequence[int], reply: Reply) -> Run:
    """The same reply behind a prompt, without rules."""
    return forward(name, double(name), [*ids, *reply.ids])


def const(value: float) -> Callable[[Tensor], Tensor]:
    return lambda now: torch.full_like(now, value)


def set_everywhere(
    layer: int, first: int = 0, last: int = MOST, value: float = 0.6, site: str = "attn_out"
) -> Callable[[int], Callable[[int], Changes]]:
    """`set SITE layer L at last token to 0.6 during step first..last`, of a prompt's length."""

    def of(prompt: int) -> Callable[[int], Changes]:
        def act(written: int) -> Changes:
            steps = range(first, min(last, written) + 1)
            return [Write(site, layer, const(value), prompt - 1 + s) for s in steps], []

        return act

    return of


@cache
def replies(name: str, layer: int, first: int = 0, last: int = MOST) -> tuple[Reply, ...]:
    """Of all rows."""
    return tuple(
        write(name, text.ids, set_everywhere(layer, first, last)(len(text.ids))) for text in rows()
    )


def entropy(logits: Tensor) -> float:
    log = logits.log_softmax(-1)
    return float(-(log.exp() * log).sum())


def kl(reference: Tensor, logits: Tensor) -> float:
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def two(logits: Tensor, n: int) -> float:
    own = records()[n]
    return float(logits[token(own["a"])] - logits[token(own["b"])])


SET = "set attn_out layer 0..1 at last token to 0.6"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    from .support import write_data

    write_data(tmp_path)
    return tmp_path


def values(
    keys: Sequence[tuple[Coord, ...]], of: Callable[..., tuple[float, float] | None]
) -> tuple[Array, Array]:
    """([cell, row] with rules, [cell, row] without them), NaN where a row has no such place."""
    found = [[of(n, *key) or (np.nan, np.nan) for n in range(len(rows()))] for key in keys]
    both = np.array(found)
    return both[..., 0], both[..., 1]


def at_token(
    name: str, layer: int, n: int, place: int, of: Callable[[Tensor, int], float]
) -> tuple[float, float] | None:
    """A metric of the logits at a token of the reply, with the rules and without."""
    reply = replies(name, layer)[n]
    at = reply.at(place)
    if at is None:
        return None
    bare = behind(name, rows()[n].ids, reply)
    return of(reply.run.logits[at], n), of(bare.logits[at], n)


def hold(
    found: ExperimentResult, axis: str, places: Sequence[Coord], of: Any, *, base: bool = True
) -> None:
    """of: (with rules, without) of a layer, a row and the number of a place."""
    assert found.axes == (axis, "layer")
    own = [(cell.coords[axis], cell.coords["layer"]) for cell in found.cells]
    assert own == product(places, (0, 1))
    keys = product(range(len(places)), (0, 1))
    patched, unpatched = values(keys, lambda n, place, layer: of(layer, n, place))
    assert np.isnan(patched).any()
    compare(found.measures[0], patched, unpatched if base else None)


def measured(data: Path, name: str, mode: str, measure: str, effect: str) -> ExperimentResult:
    text = experiment("e", GENERATE, SET, measure=f"measure {measure} as {effect}")
    return run_file(text, data, name, mode)["e"]


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", NAMES)
def test_entropy_at_each_step(data: Path, name: str, mode: str) -> None:
    """Step s is where token s + 1 is predicted; the base run reads the same text."""

    def of(layer: int, n: int, step: int) -> Any:
        return at_token(name, layer, n, step, lambda logits, n: entropy(logits))

    found = measured(data, name, mode, "entropy at each step", "delta")
    hold(found, "step", range(MOST), of)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", NAMES)
def test_logits_at_each_token(data: Path, name: str, mode: str) -> None:
    def of(layer: int, n: int, place: int) -> Any:
        return at_token(name, layer, n, place + 1, two)

    places = [f"reply {n + 1}" for n in range(MOST)]
    for said in ("each reply token", "each token of reply"):
        measure = f"logit(answer) - logit(wrong) at {said}"
        hold(measured(data, name, mode, measure, "delta"), "measured", places, of)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", NAMES)
def test_loss_of_each_token(data: Path, name: str, mode: str) -> None:
    """It is read in front of the token, where that is predicted."""

    def of(layer: int, n: int, place: int) -> Any:
        reply = replies(name, layer)[n]
        if place >= len(reply.ids):
            return None
        own = reply.ids[place]
        return at_token(
            name, layer, n, place, lambda logits, n: -float(logits.log_softmax(-1)[own])
        )

    places = [f"reply {n + 1}" for n in range(MOST)]
    found = measured(data, name, mode, "loss at each reply token", "delta")
    hold(found, "measured", places, of)
