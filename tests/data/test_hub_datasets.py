"""`rows hf_dataset(…)`: data sets saved by `datasets`, and those in the hub's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mechdsl.base import limits
from mechdsl.base.text import AllowedFolders, Source
from mechdsl.checks.file_check import check_source
from mechdsl.prompts import data_files
from mechdsl.prompts.data_files import DataFile, read_dataset
from mechdsl.syntax import ast

from .support import blocks

pa: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")

TRAIN = [{"input": f"w{n}", "output": f"v{n}", "tags": ["a", str(n)]} for n in range(7)]
TEST = [{"input": "x", "output": "y", "tags": []}]


def saved(folder: Path, records: list[dict[str, Any]], split: str, *, pieces: int = 2) -> None:
    """Write Arrow streams and their metadata as `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{pieces:05d}.arrow" for n in range(pieces)]
    size = -(-len(records) // pieces)
    for n, name in enumerate(names):
        part = pa.Table.from_pylist(records[n * size : (n + 1) * size], schema=SCHEMA)
        with pa.OSFile(str(folder / name), "wb") as out, pa.ipc.new_stream(out, SCHEMA) as writer:
            writer.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "dataset_info.json").write_text("{}", encoding="utf-8")


SCHEMA = pa.schema(
    [("input", pa.string()), ("output", pa.string()), ("tags", pa.list_(pa.string()))]
)


def both(folder: Path) -> None:
    saved(folder / "train", TRAIN, "train")
    saved(folder / "test", TEST, "test", pieces=1)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', encoding="utf-8")


def flat(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(records), str(path))


def read(
    folder: Path, what: str, reach: AllowedFolders | None = None
) -> tuple[DataFile | None, list[str]]:
    text = f'prompts p {{ rows {what} template "{{input}}" }}'
    (block,) = blocks(text, folder / "a.mech").values()
    assert isinstance(block.rows, ast.Call)
    if reach is not None:
        object.__setattr__(block.rows.span.source, "reach", reach)
    found, problems = read_dataset(block.rows)
    return found, [f"{each.code} {each.message} {each.help_text}" for each in problems]


def records(folder: Path, what: str) -> list[dict[str, Any]]:
    found, problems = read(folder, what)
    assert found is not None, problems
    return [dict(record) for record in found.records]


def test_saved_dataset_is_read_by_split(tmp_path: Path) -> None:
    both(tmp_path / "pairs")
    assert records(tmp_path, 'hf_dataset("pairs", split: "train")') == TRAIN
    assert records(tmp_path, 'hf_dataset("pairs", split: "test")') == TEST
    assert records(tmp_path, 'hf_dataset("pairs/test", split: "test")') == TEST


def test_folder_of_files_is_read_by_split(tmp_path: Path) -> None:
    flat(tmp_path / "d" / "data" / "train-00000-of-00002.parquet", TRAIN[:3])
    flat(tmp_path / "d" / "data" / "train-00001-of-00002.parquet", TRAIN[3:])
    flat(tmp_path / "d" / "data" / "test-00000-of-00001.parquet", TEST)
    flat(tmp_path / "d" / "data" / "constrained.parquet", TEST)  # `train` isn't a separate word
    flat(tmp_path / "d" / "data" / "pretrain.parquet", TEST)  # nor here
    assert records(tmp_path, 'hf_dataset("d", split: "train")') == TRAIN
    assert records(tmp_path, 'hf_dataset("d", split: "test")') == TEST
    lines = "".join(json.dumps(each) + "\n" for each in TRAIN)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "all.jsonl").write_text(lines, encoding="utf-8")
    assert records(tmp_path, 'hf_dataset("e", split: "train")') == TRAIN


def test_dataset_with_several_configs_requires_config(tmp_path: Path) -> None:
    flat(tmp_path / "d" / "en" / "train.parquet", TRAIN)
    flat(tmp_path / "d" / "fr" / "train.parquet", TEST)
    assert records(tmp_path, 'hf_dataset("d", split: "train", config: "fr")') == TEST
    found, (problem,) = read(tmp_path, 'hf_dataset("d", split: "train")')
    assert found is None
    assert "it has several configs" in problem
    assert "`en`, `fr`" in problem


def test_dataset_in_the_hub_cache_is_read_by_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    root = tmp_path / "cache" / "hub" / "datasets--org--pairs"
    flat(root / "snapshots" / "abc" / "data" / "train-0.parquet", TRAIN)
    flat(root / "snapshots" / "def" / "data" / "train-0.parquet", TEST)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc", encoding="utf-8")
    assert records(tmp_path, 'hf_dataset("org/pairs", split: "train")') == TRAIN
    assert records(tmp_path, 'hf_dataset("org/pairs", split: "train", revision: "de")') == TEST
    _, (problem,) = read(tmp_path, 'hf_dataset("org/other", split: "train")')
    assert problem.startswith("E0504")
    assert "save_to_disk" in problem


def test_dataset_digest_depends_on_the_split_and_its_content(tmp_path: Path) -> None:
    both(tmp_path / "a")
    both(tmp_path / "b")
    what = 'hf_dataset("{}", split: "{}")'
    digests = [read(tmp_path, what.format(*each))[0] for each in
               (("a", "train"), ("b", "train"), ("a", "test"))]  # fmt: skip
    first, second, third = (each.digest for each in digests if each is not None)
    assert first == second != third
    (tmp_path / "b" / "train" / "data-00001-of-00002.arrow").write_bytes(
        (tmp_path / "b" / "train" / "data-00000-of-00002.arrow").read_bytes()
    )
    changed = read(tmp_path, what.format("b", "train"))[0]
    assert changed is not None
    assert changed.digest != first


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ('hf_dataset("pairs", split: "tset")', "did you mean `test`"),
        ('hf_dataset("pairs", split: "dev")', "it has `train`, `test`"),
        ('hf_dataset("pairs/train", split: "test")', "no split `test`"),
        ('hf_dataset("empty", split: "train")', "it has no data files"),
        ('hf_dataset("broken", split: "train")', "E0505"),
        ('hf_dataset("gone", split: "train")', "files that `state.json` names are missing"),
        ('hf_dataset("odd", split: "train")', "`state.json` can't be read"),
    ],
)
def test_unreadable_dataset_reports_its_cause(what: str, said: str, tmp_path: Path) -> None:
    both(tmp_path / "pairs")
    (tmp_path / "empty").mkdir()
    saved(tmp_path / "broken", TRAIN, "train", pieces=1)
    (tmp_path / "broken" / "data-00000-of-00001.arrow").write_bytes(b"not arrow")
    saved(tmp_path / "gone", TRAIN, "train", pieces=1)
    (tmp_path / "gone" / "data-00000-of-00001.arrow").unlink()
    saved(tmp_path / "odd", TRAIN, "train", pieces=1)
    (tmp_path / "odd" / "state.json").write_text("[" * 5000, encoding="utf-8")
    found, (problem,) = read(tmp_path, what)
    assert found is None
    assert said in problem


@pytest.mark.parametrize("limit", ["DATA_SET", "COMBINATIONS"])
def test_dataset_over_a_limit_is_rejected(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(tmp_path / "pairs")
    monkeypatch.setattr(limits, limit, 5)
    _, (problem,) = read(tmp_path, 'hf_dataset("pairs", split: "train")')
    assert problem.startswith("E0506")


def test_missing_pyarrow_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both(tmp_path / "pairs")

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(data_files, "import_module", missing)
    _, (problem,) = read(tmp_path, 'hf_dataset("pairs", split: "train")')
    assert "pip install 'mechdsl[frames]'" in problem


def test_untrusted_file_cannot_read_datasets_outside_its_folder(tmp_path: Path) -> None:
    """Symbolic links to files outside are rejected as well."""
    both(tmp_path / "outside")
    (tmp_path / "in" / "pairs").mkdir(parents=True)
    (tmp_path / "in" / "pairs" / "train.parquet").symlink_to(tmp_path / "secret.parquet")
    flat(tmp_path / "secret.parquet", TRAIN)
    reach = AllowedFolders(reads=((tmp_path / "in").resolve(),), writes=())
    for path in ("../outside", "pairs"):
        found, (problem,) = read(tmp_path / "in", f'hf_dataset("{path}", split: "train")', reach)
        assert found is None
        assert problem.startswith("E0535")
    assert records(tmp_path / "in", 'hf_dataset("pairs", split: "train")') == TRAIN


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ('hf_dataset("d")', "needs a folder or name and a split"),
        ('hf_dataset(split: "train")', "needs a folder or name and a split"),
        ('hf_dataset("d", split: train)', "takes texts in quotes, each once"),
        ('hf_dataset("d", "e", split: "train")', "takes texts in quotes, each once"),
        ('hf_dataset("d", splt: "train")', "did you mean `split`"),
        ('hf_dataset("d", split: "train[:10]")', "takes whole splits"),
        ('hf_datset("d", split: "train")', "names no rows"),
        ("facts", "names no rows"),
    ],
)
def test_invalid_hf_dataset_call_is_rejected(what: str, said: str) -> None:
    text = f"""mech 1
model toy = zoo("counting")
prompts p {{ rows {what} template "{{input}}" answer " {{output}}" }}
experiment e {{ prompts p  measure logprob(answer) as raw }}
"""
    (found,) = [d for d in check_source(Source(text)).diagnostics if d.severity == "error"]
    assert found.code == "E0207"
    assert said in f"{found.message} {found.help_text}"
