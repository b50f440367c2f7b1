"""Keys of cached values depend on more than the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from mechdsl.checks.file_check import check_source, needed_models
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.loading.loader import load_models
from mechdsl.models.folder import hash_file
from mechdsl.pipeline import computation as module
from mechdsl.pipeline.loaded_models import edit_model
from mechdsl.pipeline.options import RunOptions
from mechdsl.store.runs import OpenRun
from mechdsl.syntax.frontend import read_source

from ..cli.conftest import HEADS


def test_value_key_of_a_merged_adapter_depends_on_the_peft_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "heads.mech"
    file.write_text(HEADS, encoding="utf-8")
    source, _ = read_source(file)
    assert source is not None
    checked = check_source(source)
    loaded: dict[str, Any] = {}
    edit = partial(edit_model, checked, ExecutionOptions(), hashes=True)
    names = needed_models(checked)
    how: Any = {"device": "cpu", "dtype": None, "offload": None, "hashed": hash_file}
    load_models(checked, loaded, edit, names, **how)
    ((name, model),) = checked.program.models.items()
    tuned = model.model_copy(update={"name": "tuned", "base": name})
    more = checked.program.model_copy(update={"models": {name: model, "tuned": tuned}})
    run = cast("OpenRun", None)

    def models() -> list[Mapping[str, bytes]]:
        both = (checked, replace(checked, program=more))
        return [module.open_value_cache(run, each, loaded, RunOptions()).models for each in both]

    alone, merged = models()
    real = module.package_version
    monkeypatch.setattr(module, "package_version", lambda p: "9" if p == "peft" else real(p))
    again, other = models()
    assert alone[name] == again[name]
    assert merged[name] != other[name]
