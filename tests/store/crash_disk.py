"""Simulated power cuts: what a process wrote to a disk, without unsynced writes.

`recorded` runs a process under strace and returns all its steps in a folder. `Disk` replays them
and tracks which state is durable: after a power cut, writes to a file since its last fsync, and
names in a folder since the folder's last fsync, may or may not survive, in any combination; steps
on one name keep their order. A lost write may be torn at multiples of 512 bytes.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

Step = tuple[str, ...] | tuple[str, str, int, bytes]
CALLS = (
    "?open,openat,?creat,write,?writev,pwrite64,?pwritev,?pwritev2,fsync,fdatasync,?rename,?renameat,"
    "renameat2,?unlink,unlinkat,?mkdir,mkdirat,?rmdir,ftruncate,?truncate,fallocate,?link,linkat,"
    "?symlink,symlinkat,?sendfile,?copy_file_range,?dup,?dup2,?dup3"
)
_LINE = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)(?:<(.*?)>)?( .*)?$")
_FILE = re.compile(r"(\d+)<(.*)>")
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
SECTOR = 512


def recorded(folder: Path, log: Path, *arguments: str) -> list[Step]:
    """Return the steps of `tests.store.writer` in the folder, and `("mark", output)` steps."""
    subprocess.run(
        [
            *("strace", "-o", str(log), "-xx", "-y", "-s", "10000000", "-e", f"trace={CALLS}"),
            *(sys.executable, "-m", "tests.store.writer", str(folder), *arguments),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    reader = _Reader(str(folder))
    for line in log.read_text(encoding="ascii").splitlines():
        reader.read(line)
    return reader.steps


class _Reader:
    """Convert lines of strace to steps."""

    def __init__(self, folder: str) -> None:
        self.steps: list[Step] = []
        self._folder = folder
        self._at: dict[str, int] = {}
        """File descriptor → offset of the next write."""

    def read(self, line: str) -> None:
        found = _LINE.match(line)
        if found is None or int(found[3]) < 0:
            return
        call, inside = found[1], found[2]
        texts = [bytes.fromhex(text.replace("\\x", "")) for text in _BYTES.findall(inside)]
        file = _FILE.match(inside)
        path = _path(file[2]) if file and call not in ("openat", "mkdirat") else None
        if call == "write" and file and file[1] == "1":
            self.steps.append(("mark", texts[0].decode().strip()))
            return
        names = [text.decode("utf-8", "replace") for text in texts]
        if not any(self._inside(name) for name in [path, *names] if name):
            return
        number, result = (file[1] if file else ""), found[3]
        if call in ("write", "pwrite64"):
            assert path is not None
            length = int(result)
            assert len(texts[0]) >= length, "strace left bytes out"
            at = int(inside.rsplit(",", 1)[1]) if call == "pwrite64" else self._at[number]
            self._at[number] = at + length
            self.steps.append(("write", path, at, texts[0][:length]))
        elif call in ("fsync", "fdatasync"):
            assert path is not None
            self.steps.append(("sync", path))
        elif call == "ftruncate":
            assert path is not None
            self.steps.append(("truncate", path, int(inside.rsplit(",", 1)[1]), b""))
        elif call in ("openat", "open"):
            self._at[result] = 0
            if "O_CREAT" in inside:
                self.steps.append(("create", names[0]))
            if "O_TRUNC" in inside:
                self.steps.append(("truncate", names[0], 0, b""))
        elif call in ("rename", "mkdir", "unlink"):
            self.steps.append((call, *names))
        else:
            raise AssertionError(f"a call that the replay doesn't know: {line[:200]}")

    def _inside(self, name: str) -> bool:
        return name == self._folder or name.startswith(f"{self._folder}/")


def _path(text: str) -> str:
    return bytes.fromhex(text.replace("\\x", "")).decode("utf-8", "replace")


@dataclass
class _Node:
    """A file, or a folder: `names` is None for a file."""

    durable: bytes = b""
    bytes: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Writes since the last sync: offset and bytes; None truncates the file there."""
    names: dict[str, _Node] | None = None
    durable_names: dict[str, _Node] = field(default_factory=dict)
    pending_names: list[tuple[str, _Node | None]] = field(default_factory=list)


def _applied(data: bytes, at: int, what: bytes | None) -> bytes:
    if what is None:
        return data[:at].ljust(at, b"\0")
    return data[:at].ljust(at, b"\0") + what + data[at + len(what) :]


class Disk:
    """A folder's current state, and its possible states after a power cut."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.top = _Node(names={})
        self.root = _Node(names={"top": self.top}, durable_names={"top": self.top})

    def _find(self, path: str) -> _Node:
        node = self.top
        for part in path[len(self.folder) :].strip("/").split("/"):
            if part:
                assert node.names is not None
                node = node.names[part]
        return node

    def _name(self, path: str, node: _Node | None) -> None:
        above, name = path.rsplit("/", 1)
        folder = self._find(above)
        assert folder.names is not None
        if node is None:
            del folder.names[name]
        else:
            folder.names[name] = node
        folder.pending_names.append((name, node))

    def do(self, step: Step) -> None:
        match step:
            case ("write", str(path), int(at), bytes(data)):
                self._write(path, at, data)
            case ("truncate", str(path), int(at), bytes()):
                self._write(path, at, None)
            case ("sync", str(path)):
                node = self._find(path)
                node.durable, node.pending = node.bytes, []
                node.durable_names, node.pending_names = dict(node.names or {}), []
            case ("create", str(path)):
                folder = self._find(path.rsplit("/", 1)[0])
                if path.rsplit("/", 1)[1] not in (folder.names or {}):
                    self._name(path, _Node())
            case ("mkdir", str(path)):
                if path != self.folder:
                    self._name(path, _Node(names={}))
            case ("rename", str(old), str(new)):
                node = self._find(old)
                self._name(new, node)
                self._name(old, None)
            case ("unlink", str(path)):
                self._name(path, None)
            case _:
                raise AssertionError(f"unknown step: {step[:2]}")

    def _write(self, path: str, at: int, what: bytes | None) -> None:
        node = self._find(path)
        node.bytes = _applied(node.bytes, at, what)
        node.pending.append((at, what))

    def after_power_cut(self, chance: float, draw: random.Random) -> dict[str, bytes | None]:
        """Return surviving files and folders (None) by their paths in the folder.

        chance: probability that an unsynced step survives.
        """
        left: dict[str, bytes | None] = {}
        self._leave(self.top, "", chance, draw, left)
        return left

    def _leave(
        self,
        node: _Node,
        path: str,
        chance: float,
        draw: random.Random,
        left: dict[str, bytes | None],
    ) -> None:
        if node.names is None:
            left[path] = _surviving(node, chance, draw)
            return
        if path:
            left[path] = None
        names = dict(node.durable_names)
        lost: set[str] = set()
        for name, what in node.pending_names:
            if name in lost or draw.random() >= chance:
                lost.add(name)
            elif what is None:
                names.pop(name, None)
            else:
                names[name] = what
        for name, below in sorted(names.items()):
            self._leave(below, f"{path}/{name}" if path else name, chance, draw, left)


def _surviving(node: _Node, chance: float, draw: random.Random) -> bytes:
    data = node.durable
    for at, what in node.pending:
        if draw.random() < chance:
            data = _applied(data, at, what)
        elif what is not None and chance and len(what) > SECTOR and draw.random() < 0.5:
            data = _applied(data, at, what[: draw.randrange(0, len(what), SECTOR)])
    return data


def laid_out(left: dict[str, bytes | None], folder: Path) -> None:
    """Write the surviving files into a new folder."""
    folder.mkdir()
    for path, data in left.items():
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)
