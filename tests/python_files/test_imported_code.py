"""Hashes of code that Python files import: user modules by content, packages by version."""

from __future__ import annotations

import sys
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import pytest

from mechdsl.program import code_hashes as module
from mechdsl.program.code_hashes import CodeHashError, hash_imported_code, hash_module_code


@pytest.fixture
def lib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path."""
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
def test_each_form_of_import_is_hashed(text: str, lib: Path) -> None:
    digest = write(lib / "one_of_these.py", "x = 1\n")
    assert hash_imported_code([text.encode()]) == {"one_of_these": digest}


def test_transitive_and_circular_imports_are_hashed(lib: Path) -> None:
    found = {
        "one_of_these": write(lib / "one_of_these.py", "import two_of_these\n"),
        "two_of_these": write(lib / "two_of_these.py", "import one_of_these\n"),
    }
    assert hash_imported_code([b"import one_of_these"]) == found


def test_all_modules_of_an_imported_package_are_hashed(lib: Path) -> None:
    found = {
        "pack_of_these": write(lib / "pack_of_these" / "__init__.py", "from . import a\n"),
        "pack_of_these.a": write(lib / "pack_of_these" / "a.py", "import far_of_these\n"),
        "pack_of_these.b.c": write(lib / "pack_of_these" / "b" / "c.py"),
        "far_of_these": write(lib / "far_of_these.py"),
    }
    assert hash_imported_code([b"from pack_of_these.a import x"]) == found


def test_namespace_package_is_hashed(lib: Path) -> None:
    found = {"bare_of_these.a": write(lib / "bare_of_these" / "a.py")}
    assert hash_imported_code([b"import bare_of_these.a"]) == found


def test_standard_library_and_missing_modules_are_not_hashed(lib: Path) -> None:
    text = b"import os, sys, json, collections.abc, mechdsl, not_there_at_all\nfrom . import x"
    assert hash_imported_code([text]) == {}
    assert hash_imported_code([b"not python"]) == {}


def test_installed_package_is_hashed_by_version(lib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lib / "site-packages"
    write(root / "some_of_these.py")
    (root / "some_of_these-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(root)
    one = hash_imported_code([b"import some_of_these"])
    assert list(one) == ["beside site-packages"]
    write(root / "some_of_these.py", "x = 1\n")
    assert hash_imported_code([b"import some_of_these"]) == one
    (root / "some_of_these-1.0.dist-info").rename(root / "some_of_these-1.1.dist-info")
    assert hash_imported_code([b"import some_of_these"]) != one


def test_package_in_a_pip_target_folder_is_hashed_by_version(lib: Path) -> None:
    """`pip install --target` records its files; other modules of the folder are user code."""
    listed = "installed_of_these/__init__.py,sha256=x,1\nsingle_of_these.py,sha256=x,1\n"
    write(lib / "of_these-1.0.dist-info" / "RECORD", listed)
    write(lib / "installed_of_these" / "__init__.py")
    write(lib / "single_of_these.py")
    digest = write(lib / "own_of_these.py")
    found = hash_imported_code([b"import installed_of_these, single_of_these, own_of_these"])
    assert found.pop("own_of_these") == digest
    assert list(found) == [f"beside {lib.name}"]
    for name in ("installed_of_these", "single_of_these", "own_of_these"):
        import_module(name)
        try:
            assert module.is_installed(name) == (name != "own_of_these")
        finally:
            del sys.modules[name]


def test_package_with_too_many_files_is_rejected(
    lib: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PACKAGE_FILES", 3)
    for number in range(4):
        write(lib / "large_of_these" / f"a{number}.py")
    with pytest.raises(CodeHashError, match="`large_of_these` has more than 3 files"):
        hash_imported_code([b"import large_of_these"])


def test_module_edited_after_its_import_is_rejected(lib: Path) -> None:
    write(lib / "kept_of_these.py", "x = 1\n")
    before = hash_imported_code([b"import kept_of_these"])
    __import__("kept_of_these")
    assert hash_imported_code([b"import kept_of_these"]) == before
    write(lib / "kept_of_these.py", "x = 2\n")
    with pytest.raises(CodeHashError, match="may have changed since this process imported it"):
        hash_imported_code([b"import kept_of_these"])
    write(lib / "kept_of_these.py", "x = 1\n")
    assert hash_imported_code([b"import kept_of_these"]) == before
    del sys.modules["kept_of_these"]  # for good, unlike with monkeypatch


@pytest.mark.parametrize("compiled", [True, False])
def test_module_imported_before_hashing_is_checked_by_its_bytecode(
    compiled: bool, lib: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled bytecode tells whether the file was edited after the import."""
    name = f"early_of_these_{compiled}"
    path = lib / f"{name}.py"
    monkeypatch.setattr(sys, "dont_write_bytecode", not compiled)
    digest = write(path, "x = 1\n")
    __import__(name)
    if compiled:
        assert hash_imported_code([f"import {name}".encode()]) == {name: digest}
        assert hash_module_code(name) == {name: digest}
    monkeypatch.setattr(module, "_IMPORTED", {})
    write(path, "x = 22\n")
    for look in (
        lambda: hash_imported_code([f"import {name}".encode()]),
        lambda: hash_module_code(name),
    ):
        with pytest.raises(CodeHashError, match="may have changed"):
            look()
    del sys.modules[name]


def test_module_without_source_is_rejected() -> None:
    with pytest.raises(CodeHashError, match="the source of `sys` can't be read"):
        hash_module_code("sys")
