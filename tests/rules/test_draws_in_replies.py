"""Noise draws with replies of different lengths: each counts at the positions of its reply."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ..execute.support import PROMPTS
from ..quick import in_turn
from ..reference.forward import Changes, Write
from ..reference.noise import keyed_by_number, noise
from .support import compare, experiment, rows, run_file, tokens, write_data
from .test_in_replies import GENERATE, MOST, Reply, behind, entropy, write

DRAWS = 4
NOISED = f"corrupt noised {{ add gaussian(std: 2.0, samples: {DRAWS}) to embed at subject tokens }}"
BLOCKS = PROMPTS.replace("corrupt other", f"{NOISED}\n  corrupt other")


def noised(name: str, n: int, draw: int) -> Reply:
    """The reply of a row with the noise of a draw."""
    at = tokens(rows()[n], "subject tokens")

    def added(now: torch.Tensor, token: int) -> torch.Tensor:
        return now + 2.0 * noise(n, draw, token, now.shape[-1]).to(now)

    def act(written: int) -> Changes:
        return [Write("embed", None, lambda now, t=t: added(now, t), t) for t in at], []

    return write(name, rows()[n].ids, act)


@pytest.mark.parametrize(("name", "mode"), in_turn(["gpt2", "llama"], ["planned", "plain"]))
def test_noise_draws_count_only_where_their_reply_has_the_position(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's value is the mean over the draws whose reply has the position, with the rules, and
    without them after the same replies."""
    keyed_by_number(monkeypatch)
    write_data(tmp_path)
    lines = ("from noised into clean", "patch embed at subject tokens", GENERATE)
    text = experiment("e", *lines, measure="measure entropy at each step as delta")
    found = run_file(text, tmp_path, name, mode, precise=True, blocks=BLOCKS)["e"]
    every = [[noised(name, n, draw) for draw in range(DRAWS)] for n in range(len(rows()))]
    lengths = [[len(reply.ids) for reply in own] for own in every]
    assert any(min(own) < max(own) for own in lengths)
    patched, base = (np.full((MOST, len(rows())), np.nan) for _ in range(2))
    for step, n in np.ndindex(MOST, len(rows())):
        there = [reply for reply in every[n] if len(reply.ids) >= step]
        if there:
            at = len(rows()[n].ids) - 1 + step
            bare = [behind(name, rows()[n].ids, reply) for reply in there]
            patched[step, n] = np.mean([entropy(reply.run.logits[at]) for reply in there])
            base[step, n] = np.mean([entropy(run.logits[at]) for run in bare])
    compare(found.measures[0], patched, base, most=False)
    assert "the mean over its draws of noise whose reply has the position" in " ".join(
        found.conventions.values()
    )
