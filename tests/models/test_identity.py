"""Identity of a model: equal for copies, different for any other model."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache, lru_cache, partial, wraps
from importlib import import_module
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import mechdsl
from mechdsl import zoo
from mechdsl.base.text import Source, Span
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading import identity as reached_code
from mechdsl.loading.identity import compute_identity, explain_identity
from mechdsl.loading.loader import adopt_model, load_model
from mechdsl.models.folder import folder_identity, hash_file, hash_weights
from mechdsl.program import spec

from . import lora

ZOO = Path(zoo.__path__[0]) / "counting"


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
    return folder_identity(statement(str(folder), **more), folder, base=base)


def test_identity_of_a_copied_folder_is_the_same(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert of(folder) == of(other) == of(other, dtype="bfloat16", revision="main")


def test_identity_ignores_files_that_loading_does_not_read(folder: Path) -> None:
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
def test_identity_depends_on_every_file_that_loading_reads(name: str, folder: Path) -> None:
    before = of(folder)
    path = folder / name
    path.write_bytes((path.read_bytes() if path.exists() else b"{}") + b" ")
    if name.endswith("index.json"):
        path.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}), encoding="utf-8")
    assert of(folder) != before


def test_identity_depends_on_shards_in_a_subfolder(folder: Path) -> None:
    (folder / "parts").mkdir()
    shard = folder / "parts" / "one.safetensors"
    shard.write_bytes(b"1")
    index = {"weight_map": {"a": "parts/one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    before = of(folder)
    shard.write_bytes(b"2")
    assert of(folder) != before


def test_folder_identity_uses_the_given_hash_function(folder: Path) -> None:
    asked: list[str] = []

    def hashed(path: Path) -> str:
        asked.append(path.name)
        return hash_file(path)

    found = folder_identity(statement(str(folder)), folder, hashed)
    assert asked == ["model.safetensors"]
    assert found == of(folder)


def test_weight_hash_depends_on_files_and_their_order(folder: Path) -> None:
    one = folder / "model.safetensors"
    two = folder / "two.safetensors"
    two.write_bytes(b"2")
    assert hash_weights([one]) == hash_file(one)
    assert len({hash_weights([one]), hash_weights([one, two]), hash_weights([two, one])}) == 3


def test_adapter_identity_depends_on_base_config_and_weights(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    assert of(adapter, base="toy") is None  # the base's identity is unknown
    first = of(adapter, base="toy", of_base="a")
    assert first != of(adapter, base="toy", of_base="b")
    (adapter / "adapter_model.safetensors").write_bytes(b"2")
    second = of(adapter, base="toy", of_base="a")
    (adapter / "adapter_config.json").write_text('{"r": 4}', encoding="utf-8")
    assert len({first, second, of(adapter, base="toy", of_base="a")}) == 3


def test_identity_of_a_loaded_model_equals_its_folder_identity(folder: Path) -> None:
    """Loading gives the same string as hashing the folder."""
    model, found = load_model(statement(str(folder)), base=Path())
    assert model is not None, found
    assert model.identity == compute_identity(model) == of(folder)


# --- from Python ----------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A block whose output is multiplied by `by`."""

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

    model, found = adopt_model("m", module, PreTrainedTokenizerFast.from_pretrained(ZOO))
    assert model is not None, found
    return model


@cache
def unchanged() -> LoadedModel:
    """The model of the zoo, adopted."""
    from transformers import AutoModelForCausalLM

    return handed(AutoModelForCausalLM.from_pretrained(ZOO).eval())


def described(module: Any) -> LoadedModel:
    """`unchanged` with another module; proving its sites again would take longer."""
    return replace(unchanged(), module=module)


def told(module: Any) -> str:
    found, reason = explain_identity(handed(module))
    assert found is not None, reason
    return found


def test_identity_of_a_model_from_python_is_reproducible(module: Any) -> None:
    assert told(module) == told(module) == compute_identity(unchanged())


def weight(module: Any) -> None:
    module.model.norm.weight.data[0] += 1


def buffer(module: Any) -> None:
    """Modify a buffer that isn't saved with the weights."""
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
def test_identity_depends_on_weights_buffers_config_and_modules(
    change: Callable[[Any], None], module: Any
) -> None:
    change(module)
    assert told(module) != compute_identity(unchanged())


def test_identity_depends_on_a_number_in_a_custom_module(module: Any) -> None:
    wrapper(module)
    before = told(module)
    module.model.layers[1].mlp.by = 1.5
    assert told(module) != before


def test_identity_depends_on_the_source_of_a_custom_class(
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
        monkeypatch.setattr("mechdsl.program.code_hashes._IMPORTED", {})
        monkeypatch.setattr("mechdsl.program.code_hashes._compiled_from", lambda path: True)
        module.model.layers[1].mlp = __import__(path.stem).Own(inner)
        found.append(told(module))
    assert len(set(found)) == 2
    path.unlink()
    identity, reason = explain_identity(handed(module))
    assert identity is None
    assert reason == "the source of `own_block_of_a_test` can't be read"


class Level(Enum):
    LOW = 1.0


class Times:
    """A plain object that multiplies, and may contain itself."""

    def __init__(self, by: Any) -> None:
        self.by = by
        self.again = [self]

    def __call__(self, x: Any) -> Any:
        return x * self.by


@dataclass
class Settings:
    by: float = 1.0
    words: set[str] = field(default_factory=lambda: {"more", "fewer", "equal"})


class Numbers(dict[str, float]):
    by = 1.0

    def __getitem__(self, name: str) -> float:
        return self.by


class Pair(NamedTuple):
    by: float
    other: Any


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any, pytest.MonkeyPatch], object]]] = {
    "object": (lambda: Times(1.0), lambda held, patch: setattr(held, "by", 2.0)),
    "method": (lambda: Times(1.0), lambda held, patch: patch.setattr(Times, "__call__", other_two)),
    "dataclass": (Settings, lambda held, patch: setattr(held, "by", 2.0)),
    "set": (Settings, lambda held, patch: held.words.add("new")),
    "array": (lambda: np.ones(3), lambda held, patch: held.put(1, 2.0)),
    "number": (lambda: [np.float32(1.0)], lambda held, patch: held.insert(0, np.float32(2.0))),
    "type": (lambda: [np.float32(1.0)], lambda held, patch: held.__setitem__(0, np.float64(1.0))),
    "namespace": (lambda: SimpleNamespace(by=1.0), lambda held, patch: setattr(held, "by", 2.0)),
    "queue": (lambda: deque([1.0]), lambda held, patch: held.append(2.0)),
    "factory": (
        lambda: defaultdict(partial(float, 1)),
        lambda held, patch: setattr(held, "default_factory", partial(float, 2)),
    ),
    "dictionary": (
        lambda: Numbers(by=1.0),
        lambda held, patch: patch.setattr(Numbers, "__getitem__", other_two),
    ),
    "enumeration": (
        lambda: [Level.LOW],
        lambda held, patch: patch.setattr(Level.LOW, "_value_", 2),
    ),
    "named tuple": (lambda: Pair(1.0, [1.0]), lambda held, patch: held.other.append(2.0)),
}
"""Attributes of a module, and functions that modify their contents."""


def other_two(self: Any, x: Any) -> Any:
    return 2.0


@pytest.mark.slow
def test_identity_depends_on_user_objects_in_a_module(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explain() -> str:
        found, reason = explain_identity(described(module))
        assert found is not None, reason
        return found

    made = {name: make() for name, (make, _) in HELD.items()}
    module.model.own = made
    before = explain()
    for name, (make, change) in HELD.items():
        made[name] = make()
        with monkeypatch.context() as patch:
            change(made[name], patch)
            assert explain() != before, name
        made[name] = make()
    assert explain() == before


def test_identity_of_a_named_tuple_field_is_defined(module: Any) -> None:
    pair = Pair(2.0, None)
    module.model.own = lambda x: x * pair.by
    assert explain_identity(described(module))[1] == ""


def test_model_with_an_array_of_objects_has_no_identity(module: Any) -> None:
    module.model.own = np.array([object()])
    assert "is an array of objects" in explain_identity(described(module))[1]


def adapted(module: Any, **settings: Any) -> Any:
    return lora.wrapped(module, "llama", target_modules=["q_proj", "v_proj"], **settings)


def projection(peft: Any) -> Any:
    return peft.get_base_model().model.layers[0].self_attn.q_proj


ADAPTERS: dict[str, Callable[[Any], object]] = {
    "scale": lambda peft: projection(peft).set_scale("default", 3.0),
    "rank": lambda peft: peft.peft_config["default"].rank_pattern.update(q_proj=2),
    "targets": lambda peft: peft.peft_config["default"].target_modules.add("o_proj"),
    "weight": lambda peft: next(w for n, w in peft.named_parameters() if "lora_B" in n).data.add_(
        1
    ),
    "off": lambda peft: peft.base_model.disable_adapter_layers(),
    "merged": lambda peft: peft.merge_adapter(),
    "other": lambda peft: peft.add_adapter("other", peft.peft_config["default"]),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("change", ADAPTERS)
def test_identity_depends_on_scale_rank_and_state_of_an_adapter(change: str, module: Any) -> None:
    made = adapted(module)
    before = told(made)
    assert told(made) == before != compute_identity(unchanged())
    ADAPTERS[change](made)
    assert told(made) != before


def reads_variables(module: Any) -> None:
    module.model.own = lambda x: x * len(os.environ)


def asks_for_a_variable(module: Any) -> None:
    get = os.getenv
    module.model.own = lambda x: x if get("VARIABLE") else 2 * x


def calls_an_operator(module: Any) -> None:
    module.model.own = lambda x: torch.ops.aten.relu(x)


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
    module.model.own = partial(other_forward, object())


def keeps_an_object(module: Any) -> None:
    by = Slotted(2.0)
    module.model.own = lambda x: x * by.by


class Slotted:
    """Its attributes aren't in a dictionary."""

    __slots__ = ("by",)

    def __init__(self, by: float) -> None:
        self.by = by


def method_of_another_module(module: Any) -> None:
    module.model.own = nn.Linear(1, 1).forward


def partial_hook(module: Any) -> None:
    module.model.layers[0].register_forward_hook(partial(lambda by, *_: None, 2.0))


def backward_hook(module: Any) -> None:
    module.model.layers[0].register_full_backward_hook(lambda *_: None)


def hook_of_a_weight(module: Any) -> None:
    module.model.norm.weight.register_hook(lambda gradient: 2 * gradient)


def nested(module: Any) -> None:
    held = Times(1.0)
    for _ in range(5000):
        held = Times(held)
    module.model.own = held


def of_a_tensor(module: Any) -> None:
    module.model.own = torch.ones(1).mul


def keeps_results(module: Any) -> None:
    module.model.own = lru_cache(other_forward)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hooked, "`model.layers.0` has forward hooks"),
        (hooked_before, "`model.layers.0` has forward hooks"),
        (own_forward, "`model.layers.0.mlp` has a `forward` that differs"),
        (an_object, "is a `object`, which can't be told"),
        (hidden_module, "is a module that isn't among its own"),
        (partly, "is a `object`, which can't be told"),
        (keeps_an_object, "`by`, which `keeps_an_object.<locals>.<lambda>` keeps, is a `Slotted"),
        (method_of_another_module, "is a method of an object that can't be told"),
        (partial_hook, "`model.layers.0` has forward hooks"),
        (backward_hook, "`model.layers.0` has backward hooks"),
        (hook_of_a_weight, "`model.norm` has a tensor with hooks"),
        (nested, "it has a value that is nested too deeply"),
        (of_a_tensor, "is a `builtin_function_or_method`, which can't be told"),
        (reads_variables, "`os.environ` is the environment, which may change"),
        (asks_for_a_variable, "keeps, is the environment, which may change"),
        (calls_an_operator, "`torch.ops` is compiled code, which can't be told"),
        (keeps_results, "is a `_lru_cache_wrapper`, which can't be told"),
    ],
)
def test_model_with_unidentifiable_state_has_no_identity(
    change: Callable[[Any], None], said: str, module: Any
) -> None:
    model = described(module)
    change(model.module)
    identity, reason = explain_identity(model)
    assert identity is None
    assert said in reason
    assert compute_identity(model) is None


@pytest.mark.parametrize("held", [math.sqrt, lambda x: x * math.sqrt(1.0)])
def test_model_with_compiled_user_code_has_no_identity(
    held: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = described(module)
    module.model.own = held
    assert compute_identity(model) is not None
    real = reached_code.is_library
    monkeypatch.setattr(reached_code, "is_library", lambda home: home != "math" and real(home))
    identity, reason = explain_identity(model)
    assert identity is None
    assert "can't be told" in reason


@pytest.mark.parametrize(
    ("home", "name", "before", "after"),
    [
        # Layers of the models built so far: a table in transformers 5.17.
        ("utils.output_capturing", "_CAN_RECORD_REGISTRY", {}, {"other": {"layer": nn.Bilinear}}),
        ("modeling_flash_attention_utils", "_flash_fn", None, nn.functional.gelu),
        ("utils.hub", "_hf_api", None, SimpleNamespace()),
    ],
)
def test_identity_ignores_the_state_of_library_caches(
    home: str, name: str, before: Any, after: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, library = handed(module), import_module(f"transformers.{home}")
    monkeypatch.setattr(library, name, before)
    first = explain_identity(model)
    monkeypatch.setattr(library, name, after)
    assert explain_identity(model) == first


def test_model_under_global_torch_hooks_has_no_identity(module: Any) -> None:
    model = described(module)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert explain_identity(model)[1] == "torch has hooks for all modules"
    finally:
        hook.remove()


def test_identity_depends_on_a_replaced_library_method(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = described(module)
    before = compute_identity(model)
    kind = type(module.model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", other_forward)
    monkeypatch.setattr("mechdsl.program.code_hashes._compiled_from", lambda path: True)
    assert before is not None
    assert compute_identity(model) not in (None, before)
    found: list[str | None] = []
    for by in (torch.tensor(2.0), torch.tensor(3.0)):
        monkeypatch.setattr(kind, "forward", lambda self, x, by=by: x * by)
        found.append(compute_identity(model))
    assert len({None, before, *found}) == 4


def other_forward(self: Any, x: Any) -> Any:
    return x


# --- code in memory -------------------------------------------------------------------------------

HELPERS = """
LEVEL = 1.0


def shift(x):
    return x * LEVEL
"""
PARTS = """
from dataclasses import dataclass, field

import helpers_of_a_test
import numpy
import transformers
from torch import nn

K = 1.0
TABLE = {"by": [1.0]}


def inner(x):
    return x


def outer(x):
    return inner(x)


def scaled(x, by=[1.0], *, more={"by": 1.0}):
    return x * by[0] * more["by"]


def keeping(by):
    def multiply(x):
        return x * by

    return multiply


kept = keeping(1.0)


def through(by):
    return Through(keeping(by))


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def of_a_class(by):
    class Act(nn.Module):
        K = by

        def forward(self, x):
            return x * self.K

    return Act()


@dataclass
class Settings:
    words: set = field(default_factory=lambda: {"more", "fewer", "equal"})
    numbers: object = field(default_factory=lambda: numpy.ones(2))


class Act(nn.Module):
    K = 1.0
    TABLE = {"by": 1.0}

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.settings = Settings()

    @property
    def by(self):
        return getattr(self, "_by")

    _by = 1.0

    def forward(self, x):
        x = self.inner(x) * self.K * Act.TABLE["by"] * K * TABLE["by"][0] * self.by
        x = x * len(transformers.__version__)
        return helpers_of_a_test.shift(outer(scaled(kept(x))))
"""


class InMemory:
    """A model with a class from a file that the tests modify."""

    def __init__(self, model: LoadedModel, parts: Any, helpers: Any) -> None:
        self.model = model
        self.parts = parts
        self.helpers = helpers

    @property
    def layers(self) -> Any:
        return self.model.module.model.layers  # pyright: ignore

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model.module(torch.tensor([[1, 7, 9, 4]])).logits

    def told(self) -> str:
        found, reason = explain_identity(self.model)
        assert found is not None, reason
        return found


@pytest.fixture
def in_memory(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemory]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("mechdsl.program.code_hashes._compiled_from", lambda path: True)
    made: list[ModuleType] = []
    for name, text in (("helpers_of_a_test", HELPERS), ("parts_of_a_test", PARTS)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        made.append(import_module(name))
    helpers, parts = made
    layer = module.model.layers[1]
    layer.mlp = parts.Act(layer.mlp)
    yield InMemory(described(module), parts, helpers)
    for name in ("helpers_of_a_test", "parts_of_a_test"):
        sys.modules.pop(name, None)


def redefined(at: InMemory, patch: pytest.MonkeyPatch) -> None:
    """Redefine a function, as a notebook cell does."""
    exec("def inner(x):\n    return x * 2", vars(at.parts))


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return tuple(2 * each for each in found) if isinstance(found, tuple) else 2 * found

    return inner


def of_library(owner: str, name: str) -> Callable[[InMemory, pytest.MonkeyPatch], None]:
    """Replace a function of a library by a wrapper with its name."""

    def change(at: InMemory, patch: pytest.MonkeyPatch) -> None:
        found: Any = import_module(owner.partition(":")[0])
        for part in filter(None, owner.partition(":")[2].split(".")):
            found = getattr(found, part)
        patch.setattr(found, name, twice(getattr(found, name)))

    return change


LLAMA = "transformers.models.llama.modeling_llama"
IN_MEMORY: dict[str, Callable[[InMemory, pytest.MonkeyPatch], object]] = {
    "attribute of a class": lambda at, patch: setattr(at.parts.Act, "K", 3.0),
    "attribute by its name": lambda at, patch: setattr(at.parts.Act, "_by", 3.0),
    "table of a class": lambda at, patch: at.parts.Act.TABLE.update(by=3.0),
    "global": lambda at, patch: setattr(at.parts, "K", 3.0),
    "inside a global": lambda at, patch: at.parts.TABLE["by"].insert(0, 3.0),
    "function of a function": redefined,
    "default": lambda at, patch: at.parts.scaled.__defaults__[0].insert(0, 2.0),
    "default by name": lambda at, patch: at.parts.scaled.__kwdefaults__["more"].update(by=2.0),
    "closure": lambda at, patch: setattr(at.parts, "kept", at.parts.keeping(2.0)),
    "code": lambda at, patch: setattr(at.parts.inner, "__code__", (lambda x: x * 2).__code__),
    "function of another module": lambda at, patch: setattr(
        at.helpers, "shift", at.parts.keeping(2.0)
    ),
    "global of another module": lambda at, patch: setattr(at.helpers, "LEVEL", 2.0),
    "text of a library that is read": lambda at, patch: patch.setattr(
        "transformers.__version__", "changed"
    ),
    "function of the library": of_library(LLAMA, "apply_rotary_pos_emb"),
    "function that it calls": of_library(LLAMA, "rotate_half"),
    "method of the library": of_library(f"{LLAMA}:LlamaRMSNorm", "forward"),
    "function of torch": of_library("torch.nn.functional", "silu"),
    "function of torch that torch calls": of_library("torch.nn.functional", "embedding"),
    "function of attention": of_library("torch.nn.functional", "scaled_dot_product_attention"),
    "method of tensors": of_library("torch:Tensor", "pow"),
}


@pytest.mark.parametrize("change", IN_MEMORY)
def test_identity_depends_on_code_modified_in_memory(
    change: str, in_memory: InMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, logits = in_memory.told(), in_memory.logits()
    assert in_memory.told() == before
    with monkeypatch.context() as patch:
        IN_MEMORY[change](in_memory, patch)
        assert not torch.allclose(in_memory.logits(), logits)
        assert compute_identity(in_memory.model) != before


@pytest.mark.parametrize("name", ["through", "of_a_class"])
def test_identity_depends_on_the_order_of_functions_with_equal_names(
    name: str, in_memory: InMemory
) -> None:
    made = [getattr(in_memory.parts, name)(by) for by in (2.0, 3.0)]
    first, second = (in_memory.layers[0].mlp, in_memory.layers[1].mlp.inner)
    found: list[tuple[str, torch.Tensor]] = []
    for one, other in (made, made[::-1]):
        first.act_fn, second.act_fn = one, other
        found.append((in_memory.told(), in_memory.logits()))
    assert not torch.allclose(found[0][1], found[1][1])
    assert found[0][0] != found[1][0]


@pytest.mark.slow
def test_identity_is_the_same_in_another_process(in_memory: InMemory, tmp_path: Path) -> None:
    """With another hash seed, and after a call of `generate`."""
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from mechdsl.loading.identity import explain_identity
from mechdsl.loading.loader import adopt_model
from parts_of_a_test import Act
module = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
module.model.layers[1].mlp = Act(module.model.layers[1].mlp)
model, _ = adopt_model("m", module, PreTrainedTokenizerFast.from_pretrained(sys.argv[1]))
module.generate(torch.tensor([[1, 7]]), max_new_tokens=2)
print(*explain_identity(model))
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script, str(ZOO)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path},
    )
    assert done.stdout.split() == [told(in_memory.model.module)], done.stderr


FILE = """mech 1
model toy = local("handed over")
prompts p { word in ["apple", "pear"] template "{word} apple :" answer " 2" }
experiment e {
  prompts p
  ablate z layer 1 head 1 at last token with zero
  measure logit(answer) as delta
}
"""


@pytest.mark.filterwarnings("ignore:W0720")
def test_run_on_a_model_with_a_modified_class_is_recomputed(
    in_memory: InMemory, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "file.mech").write_text(FILE, encoding="utf-8")
    models = {"toy": (in_memory.model.module, PreTrainedTokenizerFast.from_pretrained(ZOO))}

    def run(**store: Any) -> tuple[list[float], bool]:
        found = mechdsl.run(tmp_path / "file.mech", models=models, **store)
        unchanged = any("unchanged since" in note for note in found.notes)
        return found["e"].measures[0].patched[0].tolist(), unchanged

    first, unchanged = run(store=tmp_path / "store")
    assert not unchanged
    assert run(store=tmp_path / "store") == (first, True)
    in_memory.parts.Act.K = 3.0
    second, unchanged = run(store=tmp_path / "store")
    assert not unchanged
    assert second == run(store=False)[0] != first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:W0720", "ignore:`is_gradient_checkpointing`")
def test_run_on_a_model_with_adapters_is_cached_until_a_scale_differs(
    module: Any, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "file.mech").write_text(FILE, encoding="utf-8")
    made = adapted(module)
    models = {"toy": (made, PreTrainedTokenizerFast.from_pretrained(ZOO))}

    def run() -> tuple[list[float], bool]:
        found = mechdsl.run(tmp_path / "file.mech", models=models, store=tmp_path / "store")
        unchanged = any("unchanged since" in note for note in found.notes)
        return found["e"].measures[0].patched[0].tolist(), unchanged

    first, unchanged = run()
    assert not unchanged
    assert run() == (first, True)
    projection(made).set_scale("default", 3.0)
    second, unchanged = run()
    assert not unchanged
    assert second != first
