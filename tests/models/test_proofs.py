"""Caching of the self-check: it runs again only if its inputs differ."""

from __future__ import annotations

import copy
import inspect
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import mechdsl
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading import anatomy_proof
from mechdsl.loading.loader import adopt_model, load_model
from mechdsl.models.shape import FAMILIES, BlockAnatomy, Family
from mechdsl.store.store import Store

from ..families import tables
from ..families.build import model
from ..fruit import FRUIT
from . import families
from .conftest import statement


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MECHDSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Ran(Exception):
    """The checks were run."""


def fail(*args: Any) -> Iterator[Any]:
    raise Ran


def opened(folder: Path, **fields: Any) -> LoadedModel:
    found, problems = load_model(statement(str(folder)), **fields)
    assert found is not None, problems
    return found


def test_loading_twice_runs_the_checks_once(
    folders: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(folders["gemma3_text"])
    monkeypatch.setattr(anatomy_proof, "run_checks", fail)
    second = opened(folders["gemma3_text"])
    assert second.checks == first.checks
    assert second.anatomy == first.anatomy
    assert second.calling == first.calling
    assert second.restartable


@pytest.mark.parametrize("change", ["precision", "config", "version", "switched off", "cut short"])
def test_cached_checks_depend_on_precision_config_and_version(
    folders: dict[str, Path],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    opened(folders["llama"])
    (kept,) = (cache / "checks").glob("*.json")
    folder = folders["llama"]
    fields: dict[str, Any] = {}
    match change:
        case "precision":
            fields = {"dtype": "bfloat16"}
        case "config":
            folder = families.build("llama", tmp_path / "other", rope_theta=5000.0)
        case "version":
            monkeypatch.setattr("mechdsl.loading.anatomy_proof.version", lambda name: "0")
        case "switched off":
            monkeypatch.setenv("MECHDSL_CACHE", "")
        case _:
            kept.write_text(kept.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    monkeypatch.setattr(anatomy_proof, "run_checks", fail)
    found, problems = load_model(statement(str(folder)), **fields)
    assert found is None
    assert [d.code for d in problems] == ["E0410"]  # raised by `fail`


def test_cached_checks_ignore_file_times_and_paths(
    folders: dict[str, Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reinstalled package has other file times, another checkout other paths."""
    first = opened(folders["llama"])
    shutil.copytree(folders["llama"], tmp_path / "elsewhere")
    known = Path.stat

    def later(path: Path, **more: Any) -> os.stat_result:
        found = known(path, **more)
        return os.stat_result((*found[:7], 0, 0, 0)) if path.suffix == ".py" else found

    monkeypatch.setattr(Path, "stat", later)
    monkeypatch.setattr(anatomy_proof, "run_checks", fail)
    assert opened(tmp_path / "elsewhere").checks == first.checks


@pytest.mark.parametrize("changed", ["mechdsl", "model"])
def test_cached_checks_depend_on_the_code_of_mechdsl_and_model(
    folders: dict[str, Path],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    opened(folders["llama"])
    if changed == "mechdsl":
        monkeypatch.setattr(anatomy_proof, "package_digest", lambda: "other")
    else:
        other = tmp_path / "modeling_llama.py"
        other.write_text("# other\n", encoding="utf-8")
        monkeypatch.setattr(inspect, "getsourcefile", lambda _: str(other))
    monkeypatch.setattr(anatomy_proof, "run_checks", fail)
    assert load_model(statement(str(folders["llama"])))[0] is None


@pytest.mark.parametrize("first", ["with the store", "without it"])
def test_checks_cached_in_a_store_work_without_the_user_cache(
    folders: dict[str, Path],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
) -> None:
    """As in a container whose only cache is the store of an earlier job. That job may have read
    the proof from its user's cache."""
    store = Store(tmp_path / "store")
    if first == "without it":
        opened(folders["llama"])
    told = opened(folders["llama"], notes=store)
    store.close()
    shutil.rmtree(cache)
    monkeypatch.setattr(anatomy_proof, "run_checks", fail)
    with closing(Store(tmp_path / "store")) as again:
        assert opened(folders["llama"], notes=again).checks == told.checks


def test_run_writes_the_checks_to_its_store(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.mech"
    body = "  model toy\n  prompts fruit limit 4\n  measure correct as raw\n"
    text = f"{FRUIT}\nexperiment plain {{\n{body}}}\n"
    file.write_text(text, encoding="utf-8")
    mechdsl.run(file, store=tmp_path / "store")
    shutil.rmtree(cache)
    monkeypatch.setattr(anatomy_proof, "run_checks", fail)
    file.write_text(text.replace("limit 4", "limit 8"), encoding="utf-8")
    mechdsl.run(file, store=tmp_path / "store")


def test_full_pass_warning_is_repeated_from_cached_checks(cache: Path, tmp_path: Path) -> None:
    row = next(row for row in tables.every() if row.name == "mamba")
    model(row).save_pretrained(tmp_path / "mamba")  # type: ignore[arg-type, operator]
    families.tokenizer().save(str(tmp_path / "mamba" / "tokenizer.json"))
    said = [load_model(statement(str(tmp_path / "mamba")))[1] for _ in range(2)]
    assert [d.code for d in said[0]] == ["W0711"]
    assert [d.label_text for d in said[0]] == [d.label_text for d in said[1]]


def swap_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a wrong entry for `llama`, as a plugin can."""

    class Swapped(Family):
        def block(self, config: Any, layer: int, block: BlockAnatomy) -> BlockAnatomy:
            return block.with_taps(k=block.taps["v"], v=block.taps["k"])

    monkeypatch.setattr(FAMILIES, "_entries", {**dict(FAMILIES.items()), "llama": Swapped()})


def test_cached_checks_depend_on_the_family_entry(
    folders: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(folders["llama"])
    swap_keys_and_values(monkeypatch)
    found, problems = load_model(statement(str(folders["llama"])))
    assert found is None
    assert [d.code for d in problems] == ["E0410"]


@pytest.fixture
def own_proofs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An empty store of the proofs of models from Python."""
    proofs: dict[str, Any] = {}
    monkeypatch.setattr(anatomy_proof.ProcessProofStore, "_proofs", proofs)
    return proofs


def test_unmodified_model_from_python_is_checked_once(
    cache: Path, own_proofs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = families.module("llama")
    first, _ = adopt_model("m", module, families.tokenizer())
    assert first is not None
    assert not cache.exists()
    monkeypatch.setattr(anatomy_proof, "run_checks", fail)
    second, _ = adopt_model("other", copy.deepcopy(module), families.tokenizer())
    assert second is not None
    assert second.checks == first.checks
    assert second.anatomy == first.anatomy


def change_model(module: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = module.model.layers[1]
    match what:
        case "weight":
            with torch.no_grad():
                layer.mlp.down_proj.weight[0, 0] += 1.0
        case "buffer":
            module.model.rotary_emb.inv_freq[0] *= 2.0
        case "hook":
            layer.register_forward_hook(lambda *_: None)
        case "method":
            attention = type(layer.self_attn)
            known = attention.forward
            monkeypatch.setattr(attention, "forward", lambda *a, **b: known(*a, **b))
        case "attention":
            module.config._attn_implementation = "eager"
        case "precision":
            module.double()
        case _:
            swap_keys_and_values(monkeypatch)


@pytest.mark.parametrize(
    "what", ["weight", "buffer", "hook", "method", "attention", "precision", "family"]
)
def test_modified_model_from_python_is_checked_again(
    own_proofs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    module = copy.deepcopy(families.module("llama"))
    assert adopt_model("m", module, families.tokenizer())[0] is not None
    change_model(module, what, monkeypatch)
    monkeypatch.setattr(anatomy_proof, "run_checks", fail)
    assert adopt_model("m", module, families.tokenizer())[0] is None


@pytest.mark.slow
def test_proof_cache_of_models_from_python_is_bounded(
    own_proofs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anatomy_proof, "_MAX_PROOFS", 1)
    module = copy.deepcopy(families.module("llama"))
    assert adopt_model("m", module, families.tokenizer())[0] is not None
    (first,) = own_proofs
    change_model(module, "weight", monkeypatch)
    assert adopt_model("m", module, families.tokenizer())[0] is not None
    assert len(own_proofs) == 1
    assert first not in own_proofs


EDITED = """
model q = rounded(toy, bits: {bits})
experiment plain {{
  model q
  prompts fruit limit 4
  measure correct as raw
}}
"""


@pytest.mark.slow
def test_edited_model_is_checked_once_per_edit(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-check of a large model can take longer than the rest of a run."""
    file = tmp_path / "a.mech"
    file.write_text(FRUIT + EDITED.format(bits=8), encoding="utf-8")
    first = mechdsl.run(file, store=tmp_path / "one")
    monkeypatch.setattr(anatomy_proof, "run_checks", fail)
    second = mechdsl.run(file, store=tmp_path / "two")
    assert first.records() == second.records()
    file.write_text(FRUIT + EDITED.format(bits=4), encoding="utf-8")
    with pytest.raises(mechdsl.MechdslError, match="E0410"):
        mechdsl.run(file, store=tmp_path / "two")
