"""Worker processes as seen from the outside: started in an environment, asked, ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.tools.names import TOOLS

ROOT = Path(__file__).parent.parent


PEERS = ROOT / ".venv-bench" / "bin" / "python"
"""Where the other libraries are installed."""


def python(name: str) -> Path:
    """The interpreter that a tool, or `rate`, runs in."""
    return PEERS if name in TOOLS and TOOLS[name].is_peer else Path(sys.executable)


class Client:
    """One worker, in this process group and with the same threads as all others."""

    def __init__(self, name: str, threads: int, log: Path) -> None:
        """log: a file for what the tool says on stderr."""
        self.name = name
        self.log = log
        numbers = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(python(name)), "-m", "benchmarks.worker", name],
                cwd=ROOT,
                env={**os.environ, **numbers, **quiet},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self._failed(f"ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self._failed(answer["error"])
        return answer

    def _failed(self, reason: str) -> NoReturn:
        print(f"--- {self.name}\n{self.log.read_text()[-3000:]}", file=sys.stderr)
        raise WorkerFailed(f"{self.name}: {reason}")

    def close(self) -> None:
        """End the process; it ends with its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class WorkerFailed(RuntimeError):
    """A tool raised, or its process ended."""
