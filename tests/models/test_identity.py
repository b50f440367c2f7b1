"""What a model is: the same for a copy of it, another one for any other."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from mechdsl.base.source import Source, Span
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.loading.identity import identity_of_loaded, identity_or_reason
from mechdsl.loading.load import adopt, load
from mechdsl.models.identity import file_hash, identity_of_folder, weights_hash
from mechdsl.program import spec
from mechdsl.zoo import counting

ZOO = Path(counting.__file__).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ZOO / name, made)
    return made


def statement(path: str, **more: Any) -> spec.Model:
    span = Span(Source("", Path("x.mech")), 0, 0)
    return spec.Model(span=span, name="m", kind="local", path=path, **more)


def of(folder: Path, **more: Any) -> str | None:
    base = more.pop("of_base", None)
    return identity_of_folder(statement(str(folder), **more), folder, base=base)


def test_a_copy_is_the_same(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert of(folder) == of(other) == of(other, dtype="bfloat16", revision="main")


def test_what_changes_nothing(folder: Path) -> None:
    before = of(folder)
    for name in ("README.md", "training_args.bin", "trainer_state.json", ".gitattributes"):
        (folder / name).write_text("{}", encoding="utf-8")
    assert of(folder) == before


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "model.safetensors",
        "more.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ],
)
def test_any_file_that_is_read(name: str, folder: Path) -> None:
    before = of(folder)
    path = folder / name
    path.write_bytes((path.read_bytes() if path.exists() else b"{}") + b" ")
    if name.endswith("index.json"):
        path.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}), encoding="utf-8")
    assert of(folder) != before


def test_shards_in_a_folder_of_their_own(folder: Path) -> None:
    (folder / "parts").mkdir()
    shard = folder / "parts" / "one.safetensors"
    shard.write_bytes(b"1")
    index = {"weight_map": {"a": "parts/one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    before = of(folder)
    shard.write_bytes(b"2")
    assert of(folder) != before


def test_weights_go_through_the_memo(folder: Path) -> None:
    asked: list[str] = []

    def hashed(path: Path) -> str:
        asked.append(path.name)
        return file_hash(path)

    found = identity_of_folder(statement(str(folder)), folder, hashed)
    assert asked == ["model.safetensors"]
    assert found == of(folder)


def test_hash_of_weights(folder: Path) -> None:
    one = folder / "model.safetensors"
    two = folder / "two.safetensors"
    two.write_bytes(b"2")
    assert weights_hash([one]) == file_hash(one)
    assert len({weights_hash([one]), weights_hash([one, two]), weights_hash([two, one])}) == 3


def test_adapters(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    assert of(adapter, base="toy") is None  # what the base is can't be told
    first = of(adapter, base="toy", of_base="a")
    assert first != of(adapter, base="toy", of_base="b")
    (adapter / "adapter_model.safetensors").write_bytes(b"2")
    second = of(adapter, base="toy", of_base="a")
    (adapter / "adapter_config.json").write_text('{"r": 4}', encoding="utf-8")
    assert len({first, second, of(adapter, base="toy", of_base="a")}) == 3


def test_loaded_from_a_folder(folder: Path) -> None:
    """The same string as without loading it."""
    model, found = load(statement(str(folder)), base=Path())
    assert model is not None, found
    assert model.identity == identity_of_loaded(model) == of(folder)


# --- from Python ----------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A block's output, `by` times."""

    def __init__(self, inner: nn.Module, by: float) -> None:
        super().__init__()
        self.inner = inner
        self.by = by

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.inner(*args, **named) * self.by


@pytest.fixture
def module() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ZOO).eval()


def handed(module: Any) -> LoadedModel:
    from transformers import PreTrainedTokenizerFast

    model, found = adopt("m", module, PreTrainedTokenizerFast.from_pretrained(ZOO))
    assert model is not None, found
    return model


def told(module: Any) -> str:
    found, reason = identity_or_reason(handed(module))
    assert found is not None, reason
    return found


def test_twice_the_same(module: Any) -> None:
    from transformers import AutoModelForCausalLM

    assert told(module) == told(module)
    assert told(AutoModelForCausalLM.from_pretrained(ZOO)) == told(module)


def weight(module: Any) -> None:
    module.model.norm.weight.data[0] += 1


def buffer(module: Any) -> None:
    """One that isn't saved with the weights."""
    rotary = module.model.rotary_emb
    assert "inv_freq" in rotary._non_persistent_buffers_set
    rotary.inv_freq *= 2


def number(module: Any) -> None:
    module.model.layers[0].self_attn.scaling *= 2


def config(module: Any) -> None:
    module.config.rms_norm_eps = 0.1


def activation(module: Any) -> None:
    module.model.layers[0].mlp.act_fn = nn.ReLU()


def wrapper(module: Any) -> None:
    module.model.layers[1].mlp = Doubled(module.model.layers[1].mlp, 1.0)


def precision(module: Any) -> None:
    module.double()


CHANGES = [weight, buffer, number, config, activation, wrapper, precision]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_it_holds(change: Callable[[Any], None], module: Any) -> None:
    before = told(module)
    change(module)
    assert told(module) != before


def test_a_number_of_a_class_of_its_own(module: Any) -> None:
    wrapper(module)
    before = told(module)
    module.model.layers[1].mlp.by = 1.5
    assert told(module) != before


def test_the_code_of_a_class_of_its_own(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own_block_of_a_test.py"
    text = (
        "from torch import nn\n\n\nclass Own(nn.Module):\n    def __init__(self, inner):\n"
        "        super().__init__()\n        self.inner = inner\n\n"
        "    def forward(self, x):\n        return self.inner(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found: list[str] = []
    inner = module.model.layers[1].mlp
    for number in range(2):
        path.write_text(text + "# more\n" * number, encoding="utf-8")
        sys.modules.pop(path.stem, None)
        monkeypatch.setattr("mechdsl.program.code_behind._IMPORTED", {})
        monkeypatch.setattr("mechdsl.program.code_behind._compiled_from", lambda path: True)
        module.model.layers[1].mlp = __import__(path.stem).Own(inner)
        found.append(told(module))
    assert len(set(found)) == 2
    path.unlink()
    identity, reason = identity_or_reason(handed(module))
    assert identity is None
    assert reason == "the source of `own_block_of_a_test` can't be read"


def hooked(module: Any) -> None:
    module.model.layers[0].register_forward_hook(lambda *_: None)


def hooked_before(module: Any) -> None:
    module.model.layers[0].register_forward_pre_hook(lambda *_: None)


def own_forward(module: Any) -> None:
    mlp = module.model.layers[0].mlp
    mlp.forward = MethodType(lambda self, x: x, mlp)


def keeps_something(module: Any) -> None:
    by = 2.0
    module.model.layers[0].mlp.act_fn = lambda x: x * by


def an_object(module: Any) -> None:
    module.model.own = object()


def hidden_module(module: Any) -> None:
    module.model.own = [nn.Linear(1, 1)]


def partly(module: Any) -> None:
    by = 2.0
    module.model.own = partial(lambda x: by)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hooked, "`model.layers.0` has forward hooks"),
        (hooked_before, "`model.layers.0` has forward hooks"),
        (own_forward, "`model.layers.0.mlp` has a `forward` of its own"),
        (an_object, "is a `object`, which can't be told"),
        (hidden_module, "is a module that isn't among its own"),
        (partly, "is a function that keeps values of its own"),
    ],
)
def test_what_cannot_be_told(change: Callable[[Any], None], said: str, module: Any) -> None:
    model = handed(module)
    change(model.module)
    identity, reason = identity_or_reason(model)
    assert identity is None
    assert said in reason
    assert identity_of_loaded(model) is None


def test_hooks_for_all_modules(module: Any) -> None:
    model = handed(module)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert identity_or_reason(model)[1] == "torch has forward hooks for all modules"
    finally:
        hook.remove()


def test_a_method_in_place_of_the_library_s(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = handed(module)
    before = identity_of_loaded(model)
    kind = type(module.model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", other_forward)
    monkeypatch.setattr("mechdsl.program.code_behind._compiled_from", lambda path: True)
    assert before is not None
    assert identity_of_loaded(model) not in (None, before)
    by = torch.tensor(2.0)
    monkeypatch.setattr(kind, "forward", lambda self, x: x * by)
    assert identity_of_loaded(model) is None


def other_forward(self: Any, x: Any) -> Any:
    return x
