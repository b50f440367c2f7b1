"""Trainings in several processes, compared with the same trainings in one process."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest

import mechdsl
from mechdsl.cli.entry import app
from mechdsl.cli.output import INVALID_INPUT
from mechdsl.execute import training
from mechdsl.fits import sparse_training
from mechdsl.fits import training as training_loop
from mechdsl.fits.processes import Processes

from . import test_batches_and_precision as batches
from . import test_killed_training as killed
from . import test_own_trainers as own
from . import test_streamed_trainings as streamed
from . import test_trained_dictionaries as dictionaries
from . import training_processes
from .test_batches_and_precision import DECLARED
from .test_trained_rotations import HERE

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
ROOT = Path(__file__).parents[2]
OPTIONS = "steps: 8, batch: 2, accumulate: 3"
"""An odd number of batches, so that the second process has none at the end."""
KINDS = {
    "topk": dictionaries.SAE,
    **{
        kind: dictionaries.SAE.replace("k: 4", f'penalty: 0.1, kind: "{kind}"')
        for kind in ("relu", "jump_relu", "gated")
    },
}


ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
"""Without a GPU, the processes use CPUs."""


def launch(*command: str | Path, count: int = 2) -> subprocess.CompletedProcess[str]:
    """Start processes as `torchrun` does."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return start(*(launcher if count > 1 else ()), "-m", *command)


def fork(count: int, work: Callable[[], object]) -> None:
    """Fork processes with a launcher's environment; they need no new imports."""
    from accelerate import PartialState

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children: list[int] = []
    for number in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        numbers = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in numbers.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        try:
            PartialState._reset_state()  # other tests may have used accelerate in one process
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


def start(*command: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    every = [sys.executable, *map(str, command)]
    return subprocess.run(
        every, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


# --- all trainers, on models of several families --------------------------------------------------

OWN = ("own dictionary", "own vector", "own rotation")
"""Custom trainers whose modules have buffers."""
QUICK = ("topk", "streamed", "transcoder", "rotation", "mask", "lens")


def write_file(kind: str, family: str, folder: Path) -> list[str]:
    """Write a file with a training, and return its path, the family and the trained file."""
    folder.mkdir(parents=True)
    options, weights = f"{batches.USUAL}, {OPTIONS}", batches.WEIGHTS
    if kind in DECLARED:
        return [str(batches.declare(kind, folder, OPTIONS)), family, DECLARED[kind][2]]
    if kind == "streamed":
        streamed.write_texts(folder, streamed.texts())
        line = streamed.BLOCK + streamed.fit(options)
    else:
        line = dictionaries.fit(KINDS[kind], f"{options}, patience: 3")
    return [str(dictionaries.write(folder, line, dictionaries.ABLATES)), family, weights]


def train_all(
    kinds: Sequence[str], folder: Path, count: int, *, forked: bool
) -> dict[str, bytes | str]:
    """Train each file in `count` processes, forked or launched; return the trained files and
    problems."""
    files = [
        write_file(kind, family, folder / kind)
        for kind, family in zip(kinds, cycle(HERE), strict=False)
    ]
    listed, result = folder / "list.json", folder / "result.json"
    listed.write_text(json.dumps([file[:2] for file in files]), "utf-8")
    if count == 1:  # in this process, which saves the start
        written = training_processes.train_all(listed)
    elif forked:
        fork(count, partial(training_processes.train_together, listed, result))
        written = json.loads(result.read_text("utf-8"))
    else:
        done = launch("tests.pipeline.training_processes", listed, result, count=count)
        assert done.returncode == 0, done.stderr
        written = json.loads(result.read_text("utf-8"))
    found = map(Path, written)
    return {
        kind: (own / file[2]).read_bytes() if own.is_dir() else str(own)
        for kind, file, own in zip(kinds, files, found, strict=True)
    }


EVERY = [kind for kind in (*DECLARED, *KINDS, "streamed") if kind not in OWN]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "count", "forked"),
    [
        pytest.param(QUICK, 2, True, id="quick"),
        pytest.param(EVERY, 3, False, id="all", marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_the_weights_of_one(
    kinds: Sequence[str],
    count: int,
    forked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, also with idle features, several batch layouts and streams."""
    for module, name in ((sparse_training, "IDLE_STEPS"), (training, "split_prompts")):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after `train_all`
    one, several = (train_all(kinds, tmp_path / str(n), n, forked=forked) for n in (1, count))
    assert [own for own in (*one.values(), *several.values()) if isinstance(own, str)] == []
    assert [kind for kind in one if one[kind] != several[kind]] == []


# --- the command line -----------------------------------------------------------------------------

FILE = (
    killed.REPEATS
    + """
basis f = fit(sae(features: 32, k: 4), prompts: repeats.train, limit: 40, steps: 20, accumulate: 2)
  at resid_post layer 0 at tokens *
group g = fit(mask(size: 4), prompts: repeats.train, limit: 40, steps: 4, accumulate: 2,
  with: zero, maximise: logit(answer)) at features * of f at last token
basis c = fit(ica(components: 4), prompts: repeats.train, limit: 40) at resid_post layer 0
basis b = fit(sae(features: 32, k: 4, kind: "batch_topk"), prompts: repeats.train, limit: 40,
  steps: 20) at resid_post layer 0 at tokens *
basis s = fit(sae(features: 32, k: 4), prompts: repeats.train, limit: 40, steps: 20)
  at resid_post layer 0 at tokens *
"""
)
USES = """
experiment {0} {{
  model toy
  prompts repeats.test limit 16
  {1}
  measure logit(answer) as delta
}}
"""


@pytest.mark.slow
def test_fit_command_trains_only_divisible_trainings_in_processes(tmp_path: Path) -> None:
    """A mask over a dictionary waits for its training; only the first process prints."""
    file = tmp_path / "file.mech"
    write = "set resid_post layer 0 at last token to reconstruction of {0}"
    rules = {name: write.format(name) for name in "fcbs"}
    rules["g"] = "ablate g at last token with zero"
    parts = [USES.format(f"e{name}", rule) for name, rule in rules.items()]
    file.write_text(FILE + "".join(parts), "utf-8")
    options = ("--format", "json", "--store", tmp_path / "store")
    done = start(*ACCELERATE, "-m", "mechdsl", "fit", file, *options)
    printed = json.loads(done.stdout[done.stdout.index("{") :])
    assert {each["basis"] for each in printed["fits"]} == {"f", "g"}, done.stderr
    failed = {each["message"].split(" can't be trained: ")[-1] for each in printed["diagnostics"]}
    assert failed == {
        "the mask of `g` is undecided at 31 of 31 features",
        "`ica` uses all vectors together, so 2 processes can't divide it",
        "2 processes can't divide a step: `batch_topk` compares the features of a whole batch, "
        "which `accumulate` divides",
        "2 processes divide the batches of a step, and its steps have one batch",
    }


@pytest.mark.slow
def test_interrupted_training_resumes_in_two_processes(tmp_path: Path) -> None:
    file = write_file("rotation", "llama", tmp_path / "rotation")
    listed, result, copy = (tmp_path / name for name in ("list.json", "result.json", "copy"))
    listed.write_text(json.dumps([file[:2]]), "utf-8")
    for count, more in ((1, [copy]), (2, [])):
        module = "tests.pipeline.training_processes"
        ended = launch(module, listed, result, *more, count=count)
        assert ended.returncode == 0, ended.stderr
        (folder,) = map(Path, json.loads(result.read_text("utf-8")))
        assert folder.exists() == (count == 2)
        assert folder.with_name(f"{folder.name}.part").exists() == (count == 1)
    assert (folder / file[2]).read_bytes() == (copy / file[2]).read_bytes()


PROGRAM = """
import os, sys
from mechdsl.pipeline import trainings
trainings.SECONDS_BETWEEN_CHECKPOINTS = 0.05
from mechdsl.cli import main
with open(sys.argv[3] + os.environ["RANK"], "w") as file:
    file.write(str(os.getpid()))
sys.argv = ["mechdsl", "fit", sys.argv[1], "--store", sys.argv[2]]
main()
"""


@pytest.mark.slow
def test_training_resumes_after_one_of_two_processes_is_killed(tmp_path: Path) -> None:
    """Processes are killed in turn, three times; the final weights equal those of one process."""
    file, program, ids = (tmp_path / name for name in ("file.mech", "program.py", "id"))
    more = "steps: 3000, batch: 64, accumulate: 2"
    file.write_text(killed.FILE.replace("steps: 3000, batch: 64", more), "utf-8")
    program.write_text(PROGRAM, "utf-8")
    whole = start("-m", "mechdsl", "fit", file, "--store", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    store, drawn = tmp_path / "killed", random.Random(5)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *ACCELERATE, program, file, store, ids]
    steps: list[int] = []

    def saved() -> list[int]:
        states = (store / "fits").glob("*.part/state.json")
        return [json.loads(path.read_text("utf-8"))["step"] for path in states]

    for turn in range(4):
        before = saved()
        one = subprocess.Popen(
            [*map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        end = time.monotonic() + 120
        while turn < 3 and saved() == before and time.monotonic() < end and one.poll() is None:
            time.sleep(0.01)
        if turn < 3:
            time.sleep(drawn.uniform(0, 0.3))
            os.kill(int(Path(f"{ids}{turn % 2}").read_text("utf-8")), signal.SIGKILL)
        out = one.communicate(timeout=120)[0].decode()
        assert (one.returncode == 0) == (turn == 3), out
        steps += saved()
    assert steps == sorted(set(steps))
    assert len(steps) == 3
    assert killed.weights(store) == killed.weights(tmp_path / "whole")


@pytest.mark.parametrize("kind", OWN)
def test_training_a_module_with_buffers_in_processes_is_rejected(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a batch may depend on buffers that the preceding batch modified."""
    path, family, _ = write_file(kind, "llama", tmp_path / kind)
    monkeypatch.setattr(training_loop, "own_processes", lambda: Processes(2, 0))
    with pytest.raises(mechdsl.MechdslError, match="several processes can't divide a step"):
        own.train(Path(path), family)


def launched(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run a command in this process, as if a launcher had started it."""
    file = folder / "file.mech"
    file.write_text(FILE + USES.format("e", "observe features of f at last token"), "utf-8")
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    return app.main([*words, str(file)], standalone_mode=False)


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
MISTAKES = {
    "run": (("run", "--fit"), "several processes train together with `mechdsl fit`"),
    "one device": (("fit", "--device", "cpu:0"), "is one device, and each process needs its own"),
    "no device": (("fit", "--device", "gpu"), "`--device gpu`: there is no such device"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_invalid_command_in_several_processes_is_rejected(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, said = MISTAKES[case]
    assert launched(tmp_path, monkeypatch, *words) == INVALID_INPUT
    assert said in capsys.readouterr().err


def test_fit_in_processes_without_accelerate_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mechdsl.cli.fit.find_spec", lambda name: None)
    assert launched(tmp_path, monkeypatch, "fit") == INVALID_INPUT
    assert 'pip install "mechdsl[offload]"' in capsys.readouterr().err
