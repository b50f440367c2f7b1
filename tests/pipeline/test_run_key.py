"""The key of a run depends on everything that may affect a result, and on nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from mechdsl.base import records
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.images.processing import PREPROCESSOR_FILE, PROCESSOR_FILE
from mechdsl.models.folder import IDENTITY_TOKENIZER_FILES, hash_file
from mechdsl.pipeline import file_run as module
from mechdsl.pipeline.file_run import (
    EXCLUDED_FIELDS,
    EXECUTION_FIELDS,
    OPTIONS_FIELDS,
    SETTINGS_FIELDS,
    RunKeyError,
)
from mechdsl.pipeline.options import RunOptions
from mechdsl.program import plugins
from mechdsl.program.code_hashes import note_package_code
from mechdsl.prompts.tokens.tokenizer import TOKENIZER_FILES
from mechdsl.syntax.frontend import read_source

from ..cli.conftest import HEADS


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "heads.mech"
    path.write_text("mech 1\nparam depth = 1\n" + HEADS.removeprefix("mech 1\n"), encoding="utf-8")
    return path


def checked(file: Path, **settings: Any) -> CheckedFile:
    source, _ = read_source(file)
    assert source is not None
    found = check_source(source, CheckSettings(**settings))
    assert not [d for d in found.diagnostics if d.severity == "error"], found.diagnostics
    return found


def key(
    file: CheckedFile | Path,
    options: RunOptions | None = None,
    *,
    device: str = "cpu",
    **loaded: Any,
) -> str:
    if isinstance(file, Path):
        file = checked(file)
    options = options or RunOptions()
    return module.run_key(file, options, loaded, device=device, hashed=hash_file)


def test_run_key_includes_or_excludes_every_option() -> None:
    """A new option is in the key, or in the list of exclusions with a reason."""
    for kind, keyed in (
        (CheckSettings, SETTINGS_FIELDS),
        (RunOptions, OPTIONS_FIELDS),
        (ExecutionOptions, EXECUTION_FIELDS),
    ):
        own = {each.name for each in fields(kind)}
        assert own == {*keyed, *EXCLUDED_FIELDS[kind]}, kind
        assert not set(keyed) & set(EXCLUDED_FIELDS[kind])


def test_run_key_of_an_unmodified_file_is_the_same(file: Path) -> None:
    assert key(file) == key(file)


SETTINGS: dict[str, Any] = {
    "parameters": {"depth": "2"},
    "limit": 3,
    "only": "heads",
    "python": "run",
    "require_models": True,
    "allow_outside": True,
    "untrusted": True,
    "prompts_enough": 4,
}


@pytest.mark.parametrize("name", SETTINGS_FIELDS)
def test_run_key_depends_on_check_settings(name: str, file: Path) -> None:
    plain, other = checked(file), checked(file)
    other.settings = replace(other.settings, **{name: SETTINGS[name]})
    assert key(plain) != key(other)


OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "offload": Path("there"),
    "without": frozenset({"inert"}),
}
EXECUTION: dict[str, Any] = {
    "side": "right",
    "pass_tokens": 64,
    "prompt_tokens": 64,
    "allow_nan": True,
}


@pytest.mark.parametrize("name", OPTIONS_FIELDS)
def test_run_key_depends_on_run_options(name: str, file: Path) -> None:
    assert key(file) != key(file, replace(RunOptions(), **{name: OPTIONS[name]}))


@pytest.mark.parametrize("name", EXECUTION_FIELDS)
def test_run_key_depends_on_execution_options(name: str, file: Path) -> None:
    other = replace(ExecutionOptions(), **{name: EXECUTION[name]})
    assert key(file) != key(file, RunOptions(execution=other))


@pytest.mark.parametrize(
    "name", sorted(EXCLUDED_FIELDS[RunOptions].keys() - {"ends", "execution", "settings"})
)
def test_run_key_ignores_excluded_options(name: str, file: Path) -> None:
    """The key has the detected device instead of the option `device`."""
    values: dict[str, Any] = {
        "device": "cuda",
        "out": Path("out"),
        "on_profile": print,
        "store": Path("store"),
        "fresh": True,
        "fits": True,
        "hashes": False,
    }
    assert key(file) == key(file, replace(RunOptions(), **{name: values[name]}))


def test_run_key_depends_on_whether_an_end_condition_is_set(file: Path) -> None:
    """The key records whether experiments run one by one, not the condition: a run that it ends
    is incomplete and isn't stored under the key."""
    one, other = (RunOptions(ends=end) for end in (lambda *_: True, lambda *_: False))
    assert key(file, one) == key(file, other) != key(file)


def test_run_key_depends_on_the_device(file: Path) -> None:
    assert key(file) != key(file, device="cuda NVIDIA H200")


def test_run_key_ignores_the_number_of_threads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(file)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert key(file) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("limit 16", "limit 8"),
        ("count in 3..9", "count in 3..8"),
        ("param depth = 1", "param depth = 2"),
        ("report table", "report table top 5"),
        ("mech 1\n", "mech 1\n# another\n"),
    ],
)
def test_run_key_depends_on_the_file_text(old: str, new: str, file: Path) -> None:
    before = key(file)
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert key(file) != before


def test_run_key_depends_on_imported_files(file: Path) -> None:
    (file.parent / "more.mech").write_text("mech 1\nmetric two = 2 * prob(answer)\n", "utf-8")
    text = file.read_text("utf-8")
    file.write_text(text.replace("mech 1\n", 'mech 1\nuse "more.mech"\n', 1), encoding="utf-8")
    before = key(file)
    (file.parent / "more.mech").write_text("mech 1\nmetric two = 3 * prob(answer)\n", "utf-8")
    assert key(file) != before


def test_run_key_uses_the_text_read_by_the_check(file: Path) -> None:
    """The file is rewritten after the check."""
    read = checked(file)
    before = key(read)
    file.write_text("mech 1\n", encoding="utf-8")
    assert key(read) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda row: replace(row, text=f"{row.text} "),
        lambda row: replace(row, ids=(*row.ids[:-1], row.ids[-1] + 1)),
        lambda row: replace(row, special=(*row.special[:-1], True)),
        lambda row: replace(row, offsets=((0, 99), *row.offsets[1:])),
        lambda row: replace(row, values={**row.values, "count": 99}),
        lambda row: replace(row, spans=row.spans[:-1]),
        lambda row: replace(
            row, texts={**row.texts, "answer": replace(row.texts["answer"], ids=(1,))}
        ),
    ],
)
def test_run_key_depends_on_every_field_of_a_row(change: Callable[[Any], Any], file: Path) -> None:
    """Rows made by Python code may differ while everything else is equal."""
    plain, other = checked(file), checked(file)
    (experiment,) = other.experiments
    run = experiment.table.runs["fewer"]
    assert run.rows[3].spans
    rows = (*run.rows[:3], change(run.rows[3]), *run.rows[4:])
    runs = {**experiment.table.runs, "fewer": replace(run, rows=rows)}
    other.experiments = [replace(experiment, table=replace(experiment.table, runs=runs))]
    assert key(plain) != key(other)


@pytest.mark.parametrize(
    "changed",
    [
        {"row_ids": (*range(1, 17),)},
        {"row_keys": (*range(16),)},
        {"data_hash": "other"},
        {"other_data": {"b": "other"}},
        {"moved": (1,)},
        {"conventions": {"rows": "others"}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_run_key_depends_on_every_field_of_a_table(changed: dict[str, Any], file: Path) -> None:
    plain, other = checked(file), checked(file)
    (experiment,) = other.experiments
    other.experiments = [replace(experiment, table=replace(experiment.table, **changed))]
    assert key(plain) != key(other)


def test_run_key_depends_on_other_blocks_of_the_table(file: Path) -> None:
    """Mean ablations use the rows of these blocks."""
    plain, other = checked(file), checked(file)
    (experiment,) = other.experiments
    others = {"there": replace(experiment.table, row_keys=(*range(16),))}
    table = replace(experiment.table, other_tables=others)
    other.experiments = [replace(experiment, table=table)]
    assert key(plain) != key(other)


@pytest.mark.parametrize(
    "package", ["mechdsl", "torch", "transformers", "tokenizers", "numpy", "scipy", "safetensors"]
)
def test_run_key_depends_on_package_versions(
    package: str, file: Path, of_version: Callable[[str, str], None]
) -> None:
    before = key(file)
    of_version(package, "9")
    assert key(file) != before


def test_run_key_depends_on_the_pillow_version_only_with_images(
    file: Path, of_version: Callable[[str, str], None]
) -> None:
    with_images = checked(file)
    blocks = with_images.program.prompts
    images = {name: each.model_copy(update={"pictures": (None,)}) for name, each in blocks.items()}
    with_images.program = with_images.program.model_copy(update={"prompts": images})
    before = key(with_images), key(file)
    of_version("pillow", "9")
    assert key(with_images) != before[0]
    assert key(file) == before[1]


def test_run_key_depends_on_the_python_version(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(file)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert key(file) != before


def test_run_key_depends_on_the_processor_architecture(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(file)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert key(file) != before


def test_run_key_depends_on_environment_variables_of_libraries(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key(file)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert key(file) != before


def test_run_key_depends_on_torch_switches(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = key(file)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert key(file) != before


def test_run_has_no_key_under_an_active_torch_mode(file: Path) -> None:
    from torch.overrides import TorchFunctionMode

    with TorchFunctionMode(), pytest.raises(RunKeyError, match="changed by a `TorchFunctionMode`"):
        key(file)


def test_run_key_depends_on_the_code_of_mechdsl(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechdsl.base import files as own

    before = key(file)
    monkeypatch.setattr(module, "package_digest", lambda: "other")
    assert key(file) != before
    package, grammar = tmp_path / "package", tmp_path / "grammar"
    (package / "execute" / "__pycache__").mkdir(parents=True)
    grammar.mkdir()
    monkeypatch.setattr(own, "PACKAGE_FOLDER", package)
    monkeypatch.setattr(own, "shipped_path", lambda *_: grammar)
    digest = own.package_digest.__wrapped__
    seen = {digest()}
    for path in (
        package / "a.py",
        package / "execute" / "a.py",
        grammar / "mech.lark",
        package / "models" / "library_defaults.json",
    ):
        path.parent.mkdir(exist_ok=True)
        for text in ("a = 1\n", "a = 2\n"):
            path.write_text(text, encoding="utf-8")
            assert digest() not in seen, path
            seen.add(digest())
    (package / "execute" / "__pycache__" / "a.py").write_text("", encoding="utf-8")
    (package / "README.md").write_text("", encoding="utf-8")
    assert digest() in seen


def test_run_key_depends_on_modules_that_extend_registries(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """A custom rule may compute anything."""
    # This file names the module, so the keys of later tests may depend on it while it is imported.
    request.addfinalizer(lambda: sys.modules.pop("adds_an_entry", None))
    for registry in records.REGISTRIES:
        monkeypatch.setattr(registry, "external_modules", set[str]())
    before = key(file)
    path = tmp_path / "adds_an_entry.py"
    path.write_text(
        "from mechdsl.base.records import Registry\nREGISTRY = Registry('word')\n"
        "def add(): REGISTRY.add('new', 1)\nadd()\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    __import__("adds_an_entry")
    del sys.modules["adds_an_entry"]
    assert records.external_modules() == {"adds_an_entry"}
    with pytest.raises(RunKeyError, match="the source of `adds_an_entry` can't be read"):
        key(file)
    __import__("adds_an_entry")
    after = key(file)
    assert after != before
    path.write_text(path.read_text("utf-8") + "# changed\n", encoding="utf-8")
    with pytest.raises(RunKeyError, match=r"`adds_an_entry.py` may have changed"):
        key(file)


def test_run_key_depends_on_name_version_and_code_of_plugins(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: dict[str, plugins.Plugin] = {}
    monkeypatch.setattr(plugins, "LOADED_PLUGINS", loaded)
    monkeypatch.setattr(module, "LOADED_PLUGINS", loaded)
    monkeypatch.syspath_prepend(tmp_path)
    keys = {key(file)}
    for name in ("plugin_one", "plugin_two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text("", encoding="utf-8")
        (folder / "helper.py").write_text(f"a = {len(name)}\n", encoding="utf-8")
        note_package_code(name)
        __import__(name)
        for version in ("1", "2"):
            loaded["p"] = plugins.Plugin("p", name, "package", version)
            keys.add(key(file))
        assert {name, f"{name}.helper"} <= set(plugins.hash_plugin_code())
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "plugin_two" / "helper.py").write_text("a = 0\n", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "plugin_two", __import__("plugin_two"))
    keys.add(key(file))
    assert len(keys) == 6


def test_mechdsl_modules_are_not_external() -> None:
    import mechdsl.rules
    import mechdsl.vocab.metrics

    assert mechdsl.rules.RULES
    assert mechdsl.vocab.metrics.METRICS
    assert not {name for name in records.external_modules() if name.partition(".")[0] == "mechdsl"}


def test_file_with_unchecked_parts_has_no_run_key(file: Path) -> None:
    found = checked(file)
    found.unchecked.append("heads")
    with pytest.raises(RunKeyError, match="could not be checked"):
        key(found)


def test_tokenizer_files_of_the_identity_match_the_loader() -> None:
    assert (*TOKENIZER_FILES, PREPROCESSOR_FILE, PROCESSOR_FILE) == IDENTITY_TOKENIZER_FILES
