"""Ctrl-C and SIGTERM: finished results are stored, and the model is restored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from mechdsl.base.text import Source
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.pipeline.options import RunOptions
from mechdsl.show.progress import ProgressBar
from mechdsl.store.store import Store

from ..run_source import run_source
from .conftest import HEADS, Command, Done

LONG = HEADS.replace("layer 0..1 head * at", "layer * neuron * at last token,")


def default_interrupt() -> None:
    """Restore SIGINT, which shells ignore in background jobs, so that the child receives it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_interrupted_run_stores_finished_results(tmp_path: Path) -> None:
    """The store lists the run as unfinished."""
    (tmp_path / "long.mech").write_text(LONG, encoding="utf-8")
    begun = tmp_path / "begun"
    program = (
        "import sys\nfrom pathlib import Path\nfrom mechdsl import cli\n"
        "from mechdsl.show.progress import ProgressBar\nadvance = ProgressBar.advance\n"
        "def told(self, done, total):\n"
        "    Path('begun').touch()\n    advance(self, done, total)\n"
        "ProgressBar.advance = told\n"
        "sys.argv = ['mechdsl', 'run', 'long.mech', '--store', 'kept']\ncli.main()\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_interrupt,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        until = time.monotonic() + 120
        while not begun.exists():
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < until, "no row was finished"
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    assert err.endswith(
        "interrupted; finished results are stored; run the same command to resume\n"
    )
    assert out == ""
    with Store(tmp_path / "kept") as store:
        assert [run.state for run in store.runs()] == ["unfinished"]


@pytest.mark.parametrize(
    ("sent", "word", "status"), [("SIGINT", "interrupted", 130), ("SIGTERM", "terminated", 143)]
)
def test_interrupted_run_without_a_store_writes_nothing(
    sent: str, word: str, status: int, command: Command, monkeypatch: Any, tmp_path: Path
) -> None:
    """This process sends the signal to itself when the first row is finished."""
    (tmp_path / "long.mech").write_text(LONG, encoding="utf-8")
    number = getattr(signal, sent)

    def tell(bar: ProgressBar, done: int, total: int) -> None:
        assert signal.getsignal(number) is not signal.SIG_DFL  # else the signal ends the process
        os.kill(os.getpid(), number)

    monkeypatch.setattr(ProgressBar, "advance", tell)
    before = signal.getsignal(signal.SIGINT)
    default_interrupt() if sent == "SIGTERM" else signal.signal(number, signal.default_int_handler)
    try:
        done = command("run", tmp_path / "long.mech", "--out", tmp_path / "kept")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == Done(status, "", f"{word}; nothing of this file was stored\n")
    assert list((tmp_path / "kept").iterdir()) == []


def test_interrupt_during_the_check_exits_with_status_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    from mechdsl import cli

    monkeypatch.setattr("mechdsl.cli.run.check_mech_file", stop)
    monkeypatch.setattr(sys, "argv", ["mechdsl", "run", "x.mech"])
    with pytest.raises(SystemExit) as found:
        cli.main()
    assert found.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def hooks(model: Any) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_interrupted_run_leaves_no_hooks() -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = str(files("mechdsl") / "zoo" / "counting")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def stop(done: int, total: int) -> None:
        assert 0 < done < total
        raise KeyboardInterrupt

    assert hooks(model) == 0
    with pytest.raises(KeyboardInterrupt):
        run_source(
            Source(LONG),
            RunOptions(device="cpu", execution=ExecutionOptions(on_progress=stop)),
            {"toy": (model, tokenizer)},
        )
    assert hooks(model) == 0
