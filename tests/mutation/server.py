"""One process of pytest that has imported and collected everything; a fork of it for each mutant.

In a fork, the functions of a module get the code of the changed module. Code that runs at import
(defaults, constants) can't be replaced this way: such mutants are imported again, in a fork of a
process that has not imported the package.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import os
import pickle
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest

from .mutants import Mutant

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mechdsl"
NEEDED = (
    "torch",
    "transformers",
    "transformers.models.auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "tokenizers",
    "safetensors.torch",
    "scipy.stats",
    "networkx",
    "pydantic",
    "lark",
    "rich.console",
    "click",
    "hypothesis.extra.numpy",
)
"""Modules to import before the package, for mutants that import it again."""
QUICK = 0.3
"""Maximal seconds of a traced test all of whose cases are traced."""
OPTIONS = ["-q", "-x", "-s", "-p", "no:cacheprovider", "--tb=line", "-m", "not slow"]


def prepare() -> None:
    """Import the dependencies of the package and its tests, once."""
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in NEEDED:
        importlib.import_module(name)
    import hypothesis
    import torch

    torch.set_num_threads(1)
    quick = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile(
        "mutation", database=None, phases=quick, derandomize=True, deadline=None
    )
    hypothesis.settings.load_profile("mutation")


@dataclass(frozen=True)
class Ran:
    """The outcome of tests."""

    passed: bool
    failed: str = ""
    """The first failed test, or another cause."""


class Watch:
    """Records the first failing test or file."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (import)"


def imported(mutant: Mutant, tests: Sequence[str], limit: float) -> Ran:
    """Run tests on the module imported from the changed text."""
    assert not any(name.startswith("mechdsl") for name in sys.modules)

    def run(folder: Path) -> Ran:
        sys.meta_path.insert(0, Changed(mutant.module, mutant.source))
        watch = Watch()
        status = pytest.main([*OPTIONS, f"--basetemp={folder / 'tmp'}", *tests], plugins=[watch])
        return Ran(int(status) == 0, watch.failed or "the import")

    return _forked(run, limit)


class Changed(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Replaces the source of one module of the package at import."""

    def __init__(self, module: str, source: str) -> None:
        name = ".".join(("mechdsl", *Path(module).with_suffix("").parts)).removesuffix(".__init__")
        super().__init__(name, str(PACKAGE / module))
        self.source = source

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def _forked(action: Callable[[Path], Any], limit: float, *, quiet: bool = True) -> Any:
    """The result of a fork with a separate folder; a failed run if it ends or hangs."""
    folder = Path(tempfile.mkdtemp(prefix="mutation-"))
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reads)
        if quiet:
            log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
        try:
            found = action(folder)
        except BaseException as error:  # any effect of a mutant on pytest counts
            found = Ran(False, repr(error)[:200])
        with os.fdopen(writes, "wb") as out:
            pickle.dump(found, out)
        os._exit(0)
    os.close(writes)
    data = _read(reads, limit)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    shutil.rmtree(folder, ignore_errors=True)
    if data is None:
        return Ran(False, "takes too long")
    return pickle.loads(data) if data else Ran(False, "the process ends")


def _read(pipe: int, limit: float) -> bytes | None:
    """Read until the pipe is closed; None after the time limit."""
    end = time.monotonic() + min(limit, 1e7)
    chunks: list[bytes] = []
    with os.fdopen(pipe, "rb", buffering=0) as source:
        while True:
            ready, _, _ = select.select([source], [], [], max(0, end - time.monotonic()))
            if not ready:
                return None
            chunk = source.read(1 << 20)
            if not chunk:
                return b"".join(chunks)
            chunks.append(chunk)


Reached = dict[str, tuple[float, dict[str, list[int]]]]
"""Test → seconds, and lines by module."""


class Collected:
    """All tests of some files, ready to run in forks."""

    def __init__(self, session: pytest.Session) -> None:
        self.items = {item.nodeid: item for item in session.items}
        self.functions: dict[tuple[str, str], list[FunctionType]] = {}
        gc.unfreeze()  # what is frozen, as tests/conftest.py does, is not listed
        for found in gc.get_objects():
            if type(found) is FunctionType:  # `isinstance` asks objects that answer with warnings
                code = found.__code__
                if code.co_filename.startswith(str(PACKAGE)):
                    key = (code.co_filename, code.co_qualname)
                    self.functions.setdefault(key, []).append(found)
        gc.freeze()

    @staticmethod
    def of(files: Iterable[Path], action: Callable[[Collected], Any]) -> Any:
        """The result of an action on the tests of these files, in a fork."""

        class Loop:
            found: Any = None

            def pytest_runtestloop(self, session: pytest.Session) -> bool:
                self.found = action(Collected(session))
                return True

        def run(folder: Path) -> Any:
            loop = Loop()
            pytest.main([*OPTIONS, *map(str, files)], plugins=[loop])
            return loop.found

        return _forked(run, math.inf, quiet=False)

    def run(self, mutant: Mutant, tests: Sequence[str], limit: float) -> Ran:
        """Run tests with the functions of the changed module."""

        def run(folder: Path) -> Ran:
            self._exchange(mutant)
            watch = Watch()
            for test, following in zip(tests, [*tests[1:], None], strict=True):
                self._test(test, following, folder, [watch])
                if watch.failed:
                    return Ran(False, watch.failed)
            return Ran(True)

        return _forked(run, limit)

    def can_exchange(self, mutant: Mutant) -> bool:
        """Whether the change is in functions that can be found by name."""
        return mutant.in_body and bool(list(self._exchanges(mutant)))

    def _exchange(self, mutant: Mutant) -> None:
        for function, code in self._exchanges(mutant):
            function.__code__ = code

    def _exchanges(self, mutant: Mutant) -> Iterator[tuple[FunctionType, CodeType]]:
        """(function, its changed code); empty if that is impossible."""
        path = str(PACKAGE / mutant.module)
        old = _codes(compile((PACKAGE / mutant.module).read_text(encoding="utf-8"), path, "exec"))
        new = _codes(compile(mutant.source, path, "exec"))
        for name, codes in new.items():
            before = old.get(name, [])
            functions = self.functions.get((path, name), [])
            same = [(c.co_code, c.co_consts, c.co_names) for c in codes] == [
                (c.co_code, c.co_consts, c.co_names) for c in before
            ]
            if same or not functions:
                continue
            if len(codes) > 1 or codes[0].co_freevars != before[0].co_freevars:
                return
            for function in functions:
                yield function, codes[0]

    def reach(self, file: Path, modules: Sequence[str], limit: float) -> Reached:
        """Lines that each test of a file covers, within the time limit.

        The first and the last case of each function are traced; if they are slow, they represent
        the rest.
        """
        cases: dict[str, list[str]] = {}
        for test in self.items:
            if test.partition("::")[0] == str(file):
                cases.setdefault(function_of(test), []).append(test)

        def run(folder: Path) -> Reached:
            trace = Trace(modules)
            end = math.inf

            def look_at(tests: Sequence[str]) -> None:
                nonlocal end
                for test, following in zip(tests, [*tests, None][1:], strict=True):
                    if time.process_time() < end:
                        self._test(test, following, folder, [trace])
                        end = min(end, time.process_time() + limit)  # the first test builds models

            def known(own: Sequence[str]) -> list[tuple[float, dict[str, list[int]]]]:
                return [trace.found[case] for case in (own[0], own[-1]) if case in trace.found]

            look_at(list(dict.fromkeys(own[at] for at in (0, -1) for own in cases.values())))
            quick = [own for own in cases.values() if any(s < QUICK for s, _ in known(own))]
            look_at([case for own in quick for case in own[1:-1]])
            for own in cases.values():
                for case in own[1:-1] if known(own) else ():
                    trace.found.setdefault(case, max(known(own), key=lambda one: one[0]))
            return trace.found

        found = _forked(run, math.inf)
        if isinstance(found, Ran):
            raise RuntimeError(f"{file}: {found.failed}")
        return found

    def _test(self, test: str, following: str | None, folder: Path, plugins: Sequence[Any]) -> None:
        item = self.items[test]
        item.config._tmp_path_factory._basetemp = folder  # type: ignore[attr-defined]
        for plugin in plugins:
            if not item.config.pluginmanager.is_registered(plugin):
                item.config.pluginmanager.register(plugin)
        after = None if following is None else self.items[following]
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)


def _codes(code: CodeType) -> dict[str, list[CodeType]]:
    """Code of functions by qualified name; inner functions are part of theirs."""
    found: dict[str, list[CodeType]] = {}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found.setdefault(inner.co_qualname, []).append(inner)
            for name, codes in _codes(inner).items():
                found.setdefault(name, []).extend(codes)
    return found


def function_of(test: str) -> str:
    """A test's name without its case."""
    return test.partition("[")[0]


@dataclass(eq=False)
class Trace:
    """For each passing test: its seconds, and the covered lines of each module."""

    modules: Sequence[str]
    found: Reached = field(default_factory=dict)
    lines: dict[str, set[int]] = field(default_factory=dict)
    seconds: float = 0.0
    passed: bool = True

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        lines = self.lines.get(frame.f_code.co_filename)
        if lines is None:
            return None
        add = lines.add

        def local(frame: FrameType, event: str, arg: object) -> Any:
            if event == "line":
                add(frame.f_lineno)
            return local

        return local

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.lines = {str(PACKAGE / module): set() for module in self.modules}
        self.passed, self.seconds = True, 0.0
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(None)
            if self.passed:
                found = {
                    str(Path(name).relative_to(PACKAGE)): sorted(lines)
                    for name, lines in self.lines.items()
                    if lines
                }
                self.found[item.nodeid] = (self.seconds, found)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        self.passed = self.passed and not report.failed
