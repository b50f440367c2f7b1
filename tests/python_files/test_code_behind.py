"""What Python files import: their own modules by content, others by version."""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

import pytest

from mechdsl.program import code_behind as module
from mechdsl.program.code_behind import CodeUnknown, code_behind, code_of_module


@pytest.fixture
def lib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that modules are imported from."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "_IMPORTED", {})
    return tmp_path


def write(path: Path, text: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "text",
    [
        "import one_of_these",
        "import one_of_these as other",
        "from one_of_these import x",
        "def f():\n    import one_of_these",
        "try:\n    import one_of_these\nexcept ImportError:\n    pass",
        "import importlib\nx = importlib.import_module('one_of_these')",
        "__import__('one_of_these')",
    ],
)
def test_ways_to_import(text: str, lib: Path) -> None:
    digest = write(lib / "one_of_these.py", "x = 1\n")
    assert code_behind([text.encode()]) == {"one_of_these": digest}


def test_on_and_on(lib: Path) -> None:
    found = {
        "one_of_these": write(lib / "one_of_these.py", "import two_of_these\n"),
        "two_of_these": write(lib / "two_of_these.py", "import one_of_these\n"),
    }
    assert code_behind([b"import one_of_these"]) == found


def test_whole_packages(lib: Path) -> None:
    found = {
        "pack_of_these": write(lib / "pack_of_these" / "__init__.py", "from . import a\n"),
        "pack_of_these.a": write(lib / "pack_of_these" / "a.py", "import far_of_these\n"),
        "pack_of_these.b.c": write(lib / "pack_of_these" / "b" / "c.py"),
        "far_of_these": write(lib / "far_of_these.py"),
    }
    assert code_behind([b"from pack_of_these.a import x"]) == found


def test_folders_without_init(lib: Path) -> None:
    found = {"bare_of_these.a": write(lib / "bare_of_these" / "a.py")}
    assert code_behind([b"import bare_of_these.a"]) == found


def test_what_is_no_code_of_the_user_s(lib: Path) -> None:
    text = b"import os, sys, json, collections.abc, mechdsl, not_there_at_all\nfrom . import x"
    assert code_behind([text]) == {}
    assert code_behind([b"not python"]) == {}


def test_installed_packages(lib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lib / "site-packages"
    write(root / "some_of_these.py")
    (root / "some_of_these-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(root)
    one = code_behind([b"import some_of_these"])
    assert list(one) == ["beside site-packages"]
    write(root / "some_of_these.py", "x = 1\n")
    assert code_behind([b"import some_of_these"]) == one
    (root / "some_of_these-1.0.dist-info").rename(root / "some_of_these-1.1.dist-info")
    assert code_behind([b"import some_of_these"]) != one


def test_a_package_that_is_a_home_folder(lib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_FILES", 3)
    for number in range(4):
        write(lib / "large_of_these" / f"a{number}.py")
    with pytest.raises(CodeUnknown, match="`large_of_these` has more than 3 files"):
        code_behind([b"import large_of_these"])


def test_changed_since_it_was_imported(lib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(lib / "kept_of_these.py", "x = 1\n")
    before = code_behind([b"import kept_of_these"])
    __import__("kept_of_these")
    assert code_behind([b"import kept_of_these"]) == before
    write(lib / "kept_of_these.py", "x = 2\n")
    with pytest.raises(CodeUnknown, match="may have changed since this process imported it"):
        code_behind([b"import kept_of_these"])
    write(lib / "kept_of_these.py", "x = 1\n")
    assert code_behind([b"import kept_of_these"]) == before
    monkeypatch.delitem(sys.modules, "kept_of_these")


@pytest.mark.parametrize("compiled", [True, False])
def test_imported_before_anybody_looked(
    compiled: bool, lib: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python has compiled tells whether the file is the same still."""
    name = f"early_of_these_{compiled}"
    path = lib / f"{name}.py"
    monkeypatch.setattr(sys, "dont_write_bytecode", not compiled)
    digest = write(path, "x = 1\n")
    __import__(name)
    if compiled:
        assert code_behind([f"import {name}".encode()]) == {name: digest}
        assert code_of_module(name) == {name: digest}
    monkeypatch.setattr(module, "_IMPORTED", {})
    write(path, "x = 22\n")
    for look in (lambda: code_behind([f"import {name}".encode()]), lambda: code_of_module(name)):
        with pytest.raises(CodeUnknown, match="may have changed"):
            look()
    monkeypatch.delitem(sys.modules, name)


def test_sources_that_are_not_there() -> None:
    with pytest.raises(CodeUnknown, match="the source of `sys` can't be read"):
        code_of_module("sys")
