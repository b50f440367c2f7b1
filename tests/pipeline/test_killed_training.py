"""Killed or interrupted trainings resume and end with the same weights."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mechdsl
from mechdsl.fits.sparse_training import TopKDictionary

REPEATS = """mech 1

model toy = zoo("induction")

prompts repeats {
  word in words(toy)
  half = list(word, 12, sep: " ", distinct: true)
  template "{half} {again = half} {cue = half[1]}"
  answer " {half[2]}"
  split 80%
}
"""
FILE = (
    REPEATS
    + """
basis f = fit(sae(features: 64, k: 4), prompts: repeats.train, limit: 100, steps: 3000, batch: 64)
  at resid_post layer 0 at tokens *

experiment e {
  model toy
  prompts repeats.test limit 16
  ablate feature 0 of f at last token with zero
  measure logit(answer) as delta
}
"""
)
PROGRAM = """
import sys
from mechdsl.pipeline import trainings
trainings.SECONDS_BETWEEN_CHECKPOINTS = 0.05
from mechdsl.cli import main
sys.argv = ["mechdsl", "fit", sys.argv[1], "--store", sys.argv[2]]
main()
"""


def start(file: Path, store: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(file), str(store)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def weights(store: Path) -> bytes:
    (folder,) = (store / "fits").iterdir()
    return (folder / "sae_weights.safetensors").read_bytes()


@pytest.mark.slow
def test_training_killed_at_random_moments_ends_with_the_same_weights(tmp_path: Path) -> None:
    file = tmp_path / "file.mech"
    file.write_text(FILE, "utf-8")
    whole = start(file, tmp_path / "whole")
    out = whole.communicate()[0]
    assert whole.returncode == 0, out.decode()
    drawn = random.Random(5)
    steps: list[str] = []
    for _ in range(10):
        one = start(file, tmp_path / "killed")
        states = tmp_path / "killed" / "fits"
        before = {path: path.read_text() for path in states.glob("*.part/state.json")}
        end = time.monotonic() + 120
        while time.monotonic() < end and one.poll() is None:
            now = {path: path.read_text() for path in states.glob("*.part/state.json")}
            if now and now != before:  # there is a new checkpoint
                break
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, 0.3))
        if one.poll() is not None:
            break
        one.send_signal(signal.SIGKILL)
        one.wait()
        steps += [path.read_text() for path in states.glob("*.part/state.json")]
    assert len(set(steps)) >= 5  # it resumed from checkpoints
    last = start(file, tmp_path / "killed")
    out = last.communicate()[0]
    assert last.returncode == 0, out.decode()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert not list((tmp_path / "killed" / "fits").glob("*.part"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Restore the SIGINT handler, which processes in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("count", [1, 2])
def test_sigint_in_a_step_leaves_no_partial_checkpoint(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C stops the training after the step; a second one stops it at once, unsaved."""
    file = tmp_path / "file.mech"
    file.write_text(FILE.replace("steps: 3000", "steps: 20"), "utf-8")
    mechdsl.fit(file, store=tmp_path / "whole")
    steps: list[int] = []
    real = TopKDictionary.loss

    def loss(self: Any, inputs: Any, targets: Any, step: int, progress: float) -> Any:
        found = real(self, inputs, targets, step, progress)
        steps.append(step)
        if step == 7:
            for _ in range(count):
                signal.raise_signal(signal.SIGINT)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TopKDictionary, "loss", loss)
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            mechdsl.fit(file, store=tmp_path / "killed")
        assert signal.getsignal(signal.SIGINT) is before
    assert steps[-1] == 7
    states = [*(tmp_path / "killed" / "fits").glob("*.part/state.json")]
    assert [json.loads(each.read_text("utf-8"))["step"] for each in states] == [8] * (count == 1)
    mechdsl.fit(file, store=tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
