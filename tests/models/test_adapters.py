"""Adapters of peft: loaded from a folder onto a base, and on models passed from Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.forward.hooks.batch import Batch, SiteRead
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading import loader
from mechdsl.loading.loader import adopt_model, load_adapter, load_model
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..elsewhere.support import same
from ..execute import classifiers
from ..execute.support import (
    DIFFERENCE,
    PROMPTS,
    ROWS,
    as_in_the_data,
    difference,
    experiment,
    fast,
    prompts,
    write_rows,
)
from ..quick import in_turn, some
from ..reference.forward import forward
from ..reference.points import Point, copied
from ..run_source import run_source
from . import families, lora
from .conftest import statement

IDS = [1, 9, 22, 31, 17]
LINES = ("prompts p", "from other into clean", "patch resid_post layer * at last token", DIFFERENCE)
TWO = 'model m = local("base")\nmodel tuned = local("tuned", base: m)\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


def program(text: str, models: str = TWO) -> str:
    return f"mech 1\n{models}{PROMPTS}{text}"


def attempt(
    text: str, folder: Path, models: Mapping[str, Any] | None = None
) -> tuple[FileResult | None, list[Diagnostic]]:
    return run_source(Source(text, folder / "file.mech"), None, models)


def other_codes(found: Sequence[Diagnostic]) -> list[str]:
    """Diagnostic codes except the two that these prompts always give."""
    return [each.code for each in found if each.code not in ("W0720", "W0730")]


def ran(
    text: str, folder: Path, models: Mapping[str, Any] | None = None
) -> dict[str, ExperimentResult]:
    result, found = attempt(text, folder, models)
    assert result is not None, [(d.code, d.message, d.label_text) for d in found]
    assert not other_codes(found), found
    return {each.name: as_in_the_data(each) for each in result.experiments}


def reference_values(
    family: str, read: Any, written: Any, points: Sequence[Sequence[Point]], source: str = "other"
) -> tuple[Any, Any, Any]:
    """Reference values of bare models, one prompt at a time: activations of `read` at the last
    token of `source`, patched into the clean run of `written`.

    Returns:
        ([cell, prompt] patched, [prompt] base, [prompt] source).
    """
    found = np.zeros((len(points), len(ROWS)))
    base, origin = np.zeros(len(ROWS)), np.zeros(len(ROWS))
    for n, (record, of, into) in enumerate(zip(ROWS, prompts(source), prompts(), strict=True)):
        there = forward(family, read, of.ids)
        origin[n] = difference(there.logits, record)
        base[n] = difference(forward(family, written, into.ids).logits, record)
        for cell, each in enumerate(points):
            edits = copied(each, there.seen, [of.last], [into.last])
            found[cell, n] = difference(forward(family, written, into.ids, edits).logits, record)
    return found, base, origin


LAYERS = [[Point("resid_post", layer)] for layer in range(3)]


# --- in a file ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", some(lora.TARGETS, ["gpt2"]))
def test_base_and_adapter_values_equal_merged_weights(folder: Path, family: str) -> None:
    """Both as an axis, and patched from one into the other, against merged weights."""
    lora.build(family, folder / "base")
    lora.save(lora.trained(family), folder / "tuned")
    both = experiment("both", *LINES).replace("model m", "model m, tuned")
    into = experiment("into", *LINES).replace("other into clean", "tuned into m")
    found = ran(program(both + into.replace("  model m\n", "")), folder)
    bare, tuned = lora.base(family), lora.merged_by_hand(family, lora.trained(family))
    cells = [cell.coords["model"] for cell in found["both"].cells]
    assert cells == ["m"] * 3 + ["tuned"] * 3
    values = [reference_values(family, each, each, LAYERS) for each in (bare, tuned)]
    for number, expected in enumerate(values):
        same(found["both"].measures[0], expected, slice(3 * number, 3 * number + 3))
    assert np.abs(values[0][1] - values[1][1]).max() > 1, "the adapter changes a lot"
    expected = reference_values(family, tuned, bare, LAYERS, "clean")
    same(found["into"].measures[0], expected, slice(0, 3))
    hashes = {
        name: sha256((folder / file).read_bytes()).hexdigest()
        for name, file in (
            ("base m", "base/model.safetensors"),
            ("model tuned", "tuned/adapter_model.safetensors"),
        )
    }
    assert hashes.items() <= found["into"].hashes.items()
    assert found["into"].hashes["model"] == hashes["base m"]
    assert (
        found["into"]
        .conventions["model tuned"]
        .startswith(f'{type(bare).__name__}, local("tuned", base: m), merged by peft ')
    )


@pytest.mark.slow
def test_adapters_of_a_path_pattern_load_their_base_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`*` in the path: each folder is put on one base, which no experiment uses and which is
    loaded once."""
    loads: list[str] = []
    monkeypatch.setattr(
        loader,
        "load_model",
        lambda model, **how: loads.append(model.name) or load_model(model, **how),
    )
    lora.build("llama", folder / "base")
    adapters = {4: lora.trained("llama", rounds=4), 20: lora.trained("llama")}
    for rounds, made in adapters.items():
        lora.save(made, folder / "runs" / f"step-{rounds}")
    models = 'model m = local("base")\nmodel steps = local("runs/step-*", base: m)\n'
    text = program(experiment("e", *LINES).replace("model m", "model steps"), models)
    found = ran(text, folder)["e"]
    assert loads == ["m"]
    assert [cell.coords["model"] for cell in found.cells] == [4] * 3 + [20] * 3
    for number, made in enumerate(adapters.values()):
        module = lora.merged_by_hand("llama", made)
        expected = reference_values("llama", module, module, LAYERS)
        same(found.measures[0], expected, slice(3 * number, 3 * number + 3))
    checked = check_source(Source(text, folder / "file.mech"))
    assert "`m` is never used" not in {d.message for d in checked.diagnostics}
    assert len({id(e.table) for e in checked.experiments}) == 1


def test_adapter_folder_applies_to_a_base_from_python(folder: Path) -> None:
    config(base_model_name_or_path="org/other")(lora.save(lora.trained("llama"), folder / "tuned"))
    own: Any = lora.base("llama")
    text = program(experiment("e", *LINES).replace("model m", "model m, tuned"))
    found = ran(text, folder, {"m": (own, fast(families.tokenizer()))})["e"]
    tuned = lora.merged_by_hand("llama", lora.trained("llama"))
    same(found.measures[0], reference_values("llama", tuned, tuned, LAYERS), slice(3, 6))
    assert lora.same_weights(own, lora.base("llama"))


@pytest.mark.slow
def test_adapter_on_another_adapter_equals_peft(folder: Path) -> None:
    lora.build("llama", folder / "base")
    first = lora.trained("llama")
    lora.save(first, folder / "tuned")
    second = lora.wrapped(lora.merged_by_hand("llama", first), "llama", seed=5)
    lora.save(second, folder / "twice")
    models = TWO + 'model twice = local("twice", base: tuned)\n'
    found = ran(program(experiment("e", *LINES).replace("model m", "model twice"), models), folder)
    ends = [second(torch.tensor([p.ids])).logits[0].detach() for p in prompts()]
    expected = [difference(end, record) for end, record in zip(ends, ROWS, strict=True)]
    np.testing.assert_allclose(found["e"].measures[0].base[0], expected, atol=1e-4)
    assert {"base m", "base tuned"} <= found["e"].hashes.keys()


def test_adapter_uses_the_base_tokenizer_unless_its_own_differs(folder: Path) -> None:
    lora.build("llama", folder / "base")
    lora.save(lora.trained("llama"), folder / "tuned")
    text = program(experiment("e", *LINES).replace("model m", "model m, tuned"))
    source = Source(text, folder / "file.mech")

    def tokenizers() -> int:
        checked = check_source(source)
        assert not other_codes(checked.diagnostics)
        return len({id(e.model.tokenizer) for e in checked.experiments})

    assert tokenizers() == 1
    fast(families.tokenizer()).save_pretrained(folder / "tuned")
    assert tokenizers() == 1
    path = folder / "tuned" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<unk>", "<other>"), encoding="utf-8")
    assert tokenizers() == 2


# --- merging --------------------------------------------------------------------------------------


@cache
def base(family: str) -> LoadedModel:
    model, _ = adopt_model("m", lora.base(family), fast(families.tokenizer()))
    assert model is not None
    return model


def test_adapter_shares_unmodified_weights_with_its_base(tmp_path: Path) -> None:
    lora.save(lora.wrapped(lora.base("llama"), "llama", target_modules=["q_proj"]), tmp_path)
    tuned, found = load_adapter(statement(str(tmp_path), base="m"), base("llama"))
    assert tuned is not None, found
    own = dict(tuned.module.named_parameters())
    bare = base("llama").module.named_parameters()
    apart = {n for n, w in bare if w.data_ptr() != own[n].data_ptr()}
    q = {f"model.layers.{n}.self_attn.q_proj.{own}" for n in range(3) for own in ("weight", "bias")}
    assert apart == q


class Held:
    """A hook with a lock, which can't be copied."""

    def __init__(self) -> None:
        self.lock = Lock()

    def __call__(self, *given: object) -> None:
        pass


@pytest.mark.parametrize("wanted", ["a hook of its own", "another's hook"])
def test_merged_copy_binds_module_hooks_and_shares_other_hooks(tmp_path: Path, wanted: str) -> None:
    """Methods of a module are bound to its copy; other hooks are shared."""
    lora.save(lora.trained("llama"), tmp_path)
    bare: Any = lora.base("llama")
    block, held = bare.model.layers[1], Held()
    own = wanted == "a hook of its own"
    block.register_forward_hook(block.mlp.extra_repr if own else held)
    file = tmp_path / "adapter_model.safetensors"
    copy: Any = loader._merge_adapter(bare, file, _scaling(tmp_path))  # pyright: ignore[reportPrivateUsage]
    (hook,) = copy.model.layers[1]._forward_hooks.values()
    assert (hook.__self__ is copy.model.layers[1].mlp) if own else hook is held
    assert copy.model.layers[1]._forward_hooks is not block._forward_hooks


SETTINGS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rank-stabilized": {"use_rslora": True},
    "ranks of their own": {
        "rank_pattern": {"v_proj": 2, "^model.layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"o_proj": 20},
    },
    "modules trained as a whole": {"modules_to_save": ["lm_head", "mlp.gate_proj"]},
    "biases": {"bias": "all"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "a rank for each": {"r": 64, "rank_pattern": dict.fromkeys(lora.TARGETS["llama"], 2)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_adapter_equals_unmerged_peft_model(tmp_path: Path, name: str) -> None:
    """The reference is the unmerged peft model, run without mechdsl."""
    tied = name == "the head"
    module: Any = families.module("llama", tie_word_embeddings=tied)
    bare: Any = families.module("llama", tie_word_embeddings=tied)
    made = lora.wrapped(module, "llama", **SETTINGS[name])
    with torch.no_grad():
        for path, weight in made.named_parameters():
            whole = "modules_to_save" in path or (name == "biases" and path.endswith("bias"))
            if whole or "magnitude" in path:
                weight.mul_(1.7).add_(0.1)
    lora.save(made, tmp_path)
    tuned = loader._merge_adapter(  # pyright: ignore[reportPrivateUsage]
        bare, tmp_path / "adapter_model.safetensors", _scaling(tmp_path)
    )
    ids = torch.tensor([IDS])
    expected = made(input_ids=ids).logits
    torch.testing.assert_close(tuned(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert (bare(input_ids=ids).logits - expected).abs().max() > 0.1
    assert lora.same_weights(bare, families.module("llama", tie_word_embeddings=tied))


CLASSES = """\
mech 1
model m = local("none")
model tuned = local("tuned", base: m)
prompts p {
  a in ["w11", "w12 w13"]
  mood in ["negative", "positive"]
  template "{a} w9"
  answer mood
  wrong if mood = "negative" then "positive" else "negative"
  corrupt other { a = "w18" }
}
experiment e {
  model tuned
  prompts p
  from other into clean
  patch resid_post layer 0 at last token
  measure logit(class answer) - logit(class wrong)PLACE as delta
}
"""
OF_CLASSIFIERS = {
    "SEQ_CLS": ("llama", "LlamaForSequenceClassification", ["q_proj", "up_proj"], ""),
    "TOKEN_CLS": ("bert", "BertForTokenClassification", ["query", "value"], " at last token"),
}


@pytest.mark.parametrize("task", OF_CLASSIFIERS)
def test_classifier_adapter_brings_its_head_and_rejects_other_tasks(
    tmp_path: Path, task: str
) -> None:
    """The adapter includes its head, so the base's head may be random: a run equals peft. On a
    classifier of another type it is rejected."""
    family, build, targets, place = OF_CLASSIFIERS[task]
    bare: Any = classifiers.classifier(family, build)[1]
    made = lora.wrapped(deepcopy(bare), family, task_type=task, target_modules=targets)
    with torch.no_grad():
        for path, weight in made.named_parameters():
            if "modules_to_save" in path:
                weight.copy_(torch.randn_like(weight))
    config(base_model_name_or_path=None)(lora.save(made, tmp_path / "tuned"))
    text, tokens = CLASSES.replace("PLACE", place), classifiers.tokenizer()
    result, found = attempt(text, tmp_path, {"m": (bare, tokens)})
    assert result is not None, [(d.code, d.message, d.label_text) for d in found]
    (only,) = result.experiments
    values = only.row_values
    for words, mood, found_here in zip(
        values["a"], values["mood"], only.measures[0].base[0], strict=True
    ):
        logits = made(**classifiers.prompt(f"{words} w9")).logits[0].detach()
        negative, _, positive = (logits[-1] if place else logits).tolist()
        expected = negative - positive if mood == "negative" else positive - negative
        assert found_here == pytest.approx(expected, abs=1e-4)
    (other,) = OF_CLASSIFIERS.keys() - {task}
    family, build, *_ = OF_CLASSIFIERS[other]
    _, found = attempt(text, tmp_path, {"m": (classifiers.classifier(family, build)[1], tokens)})
    assert next(d.code for d in found if d.severity == "error") == "E0453"


def _scaling(folder: Path) -> Any:
    from mechdsl.models.adapter_folder import read_scaling

    scaling, found = read_scaling(folder, statement(str(folder), base="m"))
    assert scaling is not None, [(d.message, d.label_text) for d in found]
    return scaling


# --- rejected adapters ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter")
    lora.build("llama", root / "base")
    lora.save(lora.trained("llama"), root / "tuned")
    write_rows(root)
    return root


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "there")
    return tmp_path / "there"


def config(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return change


def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return changed


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def renamed(found: dict[str, Any]) -> None:
    for key in list(found):
        found[key.replace("layers.2", "layers.7")] = found.pop(key)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "another kind": (config(peft_type="LOHA"), "E0451", "`LOHA`, which isn't read from a folder"),
    "of inputs": (config(peft_type="PREFIX_TUNING"), "E0451", "to the model's input"),
    "no kind": (config(peft_type=None), "E0451", "`None`"),
    "replicated layers": (config(layer_replication=[[0, 3], [1, 3]]), "E0452", "layer_replication"),
    "an unknown key": (config(use_more=True), "E0452", "`use_more`: true"),
    "PiSSA": (config(init_lora_weights="pissa"), "E0452", "before training"),
    "megatron": (config(megatron_config={"a": 1}), "E0452", "megatron_config"),
    "activated": (config(alora_invocation_tokens=[3]), "E0452", "alora_invocation_tokens"),
    "slow pattern": (config(alpha_pattern={"(a+)+$": 1}), "E0452", "not other patterns"),
    "rank 0": (config(r=0), "E0452", "a whole number above 0"),
    "alpha of text": (config(lora_alpha="8"), "E0452", "can't have this number"),
    "a switch": (config(use_dora="yes"), "E0452", "true or false"),
    "bias": (config(bias="some"), "E0452", "one of none, all, lora_only"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{") and None, "E0404", "JSON"),
    "no config": (removed("adapter_config.json"), "E0404", "no such file in `tuned`"),
    "no weights": (removed("adapter_model.safetensors"), "E0406", "`adapter_model.safetensors`"),
    "pickled": (pickled, "E0405", "adapter_model.bin"),
    "no such module": (weights(renamed), "E0453", "model.layers.7.mlp.down_proj"),
    "another width": (
        weights(lambda w: w.update({f"{Q}.lora_A.weight": torch.zeros(4, 7)})),
        "E0453",
        "size mismatch",
    ),
    "a rank below": (config(r=3), "E0453", "`model.layers.0.mlp.down_proj` are of rank 4, but"),
    "a rank above": (config(r=16), "E0453", "its config says 16"),
    "a rank above by a pattern": (
        config(rank_pattern={"layers.1.self_attn.q_proj": 5, "k_proj": 9}), "E0453",
        "`model.layers.1.self_attn.q_proj` are of rank 4, but its config says 5",
    ),
    "a part is gone": (weights(lambda w: w.pop(f"{Q}.lora_B.weight")), "E0453", "lack"),
    "a part too many": (
        weights(lambda w: w.update({f"{Q}.lora_C.weight": torch.zeros(4, 7)})),
        "E0453",
        "lora_C",
    ),
    "no parameter": (
        weights(lambda w: w.update({f"{Q}.scale": torch.zeros(2)})), "E0453", "q_proj.scale"
    ),
    "a whole of another size": (
        weights(lambda w: w.update({"base_model.model.model.norm.weight": torch.zeros(2)})),
        "E0453",
        "[2], but the base has [20]",
    ),
    "no adapter's": (weights(lambda w: w.update({"x": torch.zeros(2)})), "E0453", "`x`"),
    "nothing": (weights(lambda w: w.clear()), "E0453", "empty"),
    "no numbers": (
        weights(lambda w: w[f"{Q}.lora_A.weight"].fill_(float("nan"))), "E0411", "NaN"
    ),
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10") and None, "E0411", ""
    ),
}  # fmt: skip


OF_WEIGHTS = ("E0406", "E0411", "E0453")
"""Codes of problems that only the weights show."""
SAID = [name for name, (_, code, _) in REFUSED.items() if code not in OF_WEIGHTS]


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_adapter_folder_is_rejected(copy: Path, name: str) -> None:
    change, code, part = REFUSED[name]
    change(copy / "tuned")
    tuned, found = load_adapter(statement(str(copy / "tuned"), base="m"), base("llama"))
    assert tuned is None
    (problem,) = found
    said = f"{problem.message} {problem.label_text}".replace(str(copy / "tuned"), "tuned")
    assert (problem.code, part in said) == (code, True), said
    assert problem.help_text


@pytest.mark.parametrize("name", SAID)
def test_validate_reports_adapter_problems_that_need_no_weights(copy: Path, name: str) -> None:
    change, code, _ = REFUSED[name]
    change(copy / "tuned")
    text = program(experiment("e", *LINES).replace("model m", "model tuned"))
    found = check_source(Source(text, copy / "file.mech")).diagnostics
    assert other_codes(found) == [code]


def test_huge_default_rank_without_modules_takes_no_memory(copy: Path) -> None:
    config(r=10**12)(copy / "tuned")  # which no machine could allocate
    config(rank_pattern=dict.fromkeys(lora.TARGETS["llama"], lora.RANK))(copy / "tuned")
    tuned, found = load_adapter(statement(str(copy / "tuned"), base="m"), base("llama"))
    assert tuned is not None, found


def test_adapter_without_peft_names_the_extra_to_install(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "find_spec", lambda name: None)
    _, found = load_adapter(statement(str(copy / "tuned"), base="m"), base("llama"))
    assert [d.code for d in found] == ["E0454"]
    assert "mechdsl[adapters]" in found[0].help_text


@pytest.mark.parametrize(
    ("named", "warned"),
    [
        ("base", False),
        ("org/base", False),
        ("/home/somebody/models/Base/", False),
        ("C:\\models\\base", False),
        ("/cache/hub/models--org--base/snapshots/0a1b", False),
        ("", False),
        (None, False),
        ("org/other", True),
    ],
)
def test_adapter_trained_on_another_base_warns(copy: Path, named: str | None, warned: bool) -> None:
    config(base_model_name_or_path=named)(copy / "tuned")
    text = program(experiment("e", *LINES).replace("model m", "model tuned"))
    found = check_source(Source(text, copy / "file.mech")).diagnostics
    assert other_codes(found) == ["W0773"] * warned
    if warned:
        (warning,) = (each for each in found if each.code == "W0773")
        assert 'trained on `org/other`, but `m` is `local("base")`' in warning.message


def test_folder_with_both_model_and_adapter_is_rejected(copy: Path) -> None:
    """With peft installed, transformers would apply the adapter; without it, not."""
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(copy / "tuned" / file, copy / "base" / file)
    text = program(experiment("e", *LINES), 'model m = local("base")\n')
    found = check_source(Source(text, copy / "file.mech")).diagnostics
    assert other_codes(found) == ["E0440"]
    assert ("`base` is an adapter for another model, as well as a model") in {
        d.message for d in found
    }


def test_adapter_in_the_hub_cache_needs_a_base(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--org--twos" / "snapshots" / "0a1b"
    shutil.copytree(copy / "tuned", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0a1b")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    line = 'model tuned = hf("org/twos", base: m)\n'
    text = program(
        experiment("e", *LINES).replace("model m", "model tuned"),
        f'model m = local("base")\n{line}',
    )
    assert not other_codes(check_source(Source(text, copy / "file.mech")).diagnostics)
    alone = text.replace(", base: m", "").replace('model m = local("base")\n', "")
    assert other_codes(check_source(Source(alone, copy / "file.mech")).diagnostics) == ["E0440"]


def test_untrusted_file_rejects_adapters_outside_its_folder(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.move(copy / "tuned", tmp_path / "elsewhere" / "tuned")
    text = program(experiment("e", *LINES).replace("model m", "model tuned"))
    for line in ('local("../elsewhere/tuned"', 'local("tuned"'):
        if line == 'local("tuned"':
            (copy / "tuned").symlink_to(tmp_path / "elsewhere" / "tuned")
        source = Source(text.replace('local("tuned"', line), copy / "file.mech")
        found = check_source(source, CheckSettings(untrusted=True)).diagnostics
        assert "E0535" in {d.code for d in found}


# --- passed from Python ---------------------------------------------------------------------------


STATES = ("around it", "in its modules", "merged in place", "merged")


@pytest.mark.parametrize(
    ("family", "state"), in_turn(list(lora.TARGETS), STATES, ["llama", "gpt2", "gpt_neox"])
)
def test_model_from_python_with_active_adapter_equals_merged_weights(
    family: str, state: str
) -> None:
    """Active adapters are a part of the modules: logits, heads and neurons equal those of merged
    weights."""
    from peft import LoraConfig

    module: Any = lora.base(family)
    made = lora.wrapped(module, family, seed=3)
    bare = lora.merged_by_hand(family, made)
    if state == "in its modules":  # `add_adapter` of transformers, which has no wrapper
        given: Any = lora.base(family)
        targets = list(lora.TARGETS[family])
        given.add_adapter(LoraConfig(r=lora.RANK, lora_alpha=lora.ALPHA, target_modules=targets))
        own = {k.removeprefix("base_model.model."): v for k, v in made.state_dict().items()}
        given.load_state_dict(own)
    elif state == "merged":
        given = made.merge_and_unload()
    else:
        if state == "merged in place":
            made.merge_adapter()
        given = made
    model, found = adopt_model("m", given, families.tokenizer())
    assert model is not None, [(d.code, d.label_text) for d in found]
    assert not found
    batch = Batch.of([IDS], model.pad_id, "left", model.device)
    reads = [SiteRead("head_out", 1), SiteRead("z", 2), SiteRead("mlp_hidden", 0)]
    result = run_full(model, batch, reads=reads)
    expected = forward(family, bare, IDS)
    assert result.logits is not None
    torch.testing.assert_close(result.logits[0], expected.logits, atol=1e-4, rtol=1e-3)
    for read in reads:
        there = expected[read.site, read.layer]
        torch.testing.assert_close(result.reads[read][0], there, atol=1e-4, rtol=1e-3)
    plain = forward(family, lora.base(family), IDS).logits
    assert (plain - expected.logits).abs().max() > 0.5


def test_patching_a_model_with_unmerged_adapter_equals_merged_weights(folder: Path) -> None:
    made = lora.trained("gpt2")
    models = 'model m = local("handed over")\n'
    found = ran(
        program(experiment("e", *LINES), models), folder, {"m": (made, fast(families.tokenizer()))}
    )["e"]
    tuned = lora.merged_by_hand("gpt2", made)
    same(found.measures[0], reference_values("gpt2", tuned, tuned, LAYERS), slice(0, 3))
    assert {type(part).__name__ for part in made.modules()} >= {"Linear", "PeftModel"}


def test_head_out_of_an_unmerged_dora_adapter_equals_merged_weights() -> None:
    """Unlike those of other adapters, its heads aren't sums of weights and products."""
    made = lora.wrapped(lora.base("llama"), "llama", use_dora=True)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "magnitude" in name:
                weight.mul_(torch.linspace(0.5, 2, len(weight)))
    model, found = adopt_model("m", made, families.tokenizer())
    assert model is not None, [(d.code, d.label_text) for d in found]
    bare = made.merge_and_unload()
    read = SiteRead("head_out", 1)
    batch = Batch.of([IDS], model.pad_id, "left", model.device)
    expected = forward("llama", bare, IDS)["head_out", 1]
    result = run_full(model, batch, reads=[read]).reads[read][0]
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "ADAPTION_PROMPT", "ALORA"])
def test_adapters_of_model_inputs_are_rejected(kind: str) -> None:
    import peft

    task = {"task_type": "CAUSAL_LM"}
    configs: dict[str, Any] = {
        "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=3, **task),
        "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=3, **task),
        "ADAPTION_PROMPT": peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **task),
        "ALORA": peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3], **task),
    }
    module: Any = lora.base("llama")
    with pytest.raises(mechdsl.MechdslError) as raised:
        mechdsl.run(
            program(experiment("e", *LINES), 'model m = local("x")\n'),
            {"m": (peft.get_peft_model(module, configs[kind]), fast(families.tokenizer()))},
        )
    codes = [d.code for d in raised.value.diagnostics]
    assert codes[0] == "E0451"
    assert f"`{kind}`" in raised.value.diagnostics[0].message


def test_base_that_already_has_an_adapter_is_rejected(copy: Path) -> None:
    model, _ = adopt_model("m", lora.wrapped(lora.base("llama"), "llama"), families.tokenizer())
    assert model is not None
    _, found = load_adapter(statement(str(copy / "tuned"), base="m"), model)
    assert [d.code for d in found] == ["E0453"]
    assert "`merge_and_unload()`" in found[0].help_text


def test_base_that_cannot_be_copied_is_rejected(copy: Path) -> None:
    model, _ = adopt_model("m", lora.base("llama"), families.tokenizer())
    assert model is not None
    vars(model.module.get_submodule("model.layers.1"))["held"] = Lock()
    _, found = load_adapter(statement(str(copy / "tuned"), base="m"), model)
    assert [d.code for d in found] == ["E0453"]
    assert "`copy.deepcopy`" in found[0].label_text
    assert "lock" in found[0].label_text


def test_base_distributed_over_devices_is_rejected(copy: Path) -> None:
    model, _ = adopt_model("m", lora.base("llama"), families.tokenizer())
    assert model is not None
    vars(model.module.get_submodule("model.layers.1"))["_hf_hook"] = object()
    _, found = load_adapter(statement(str(copy / "tuned"), base="m"), model)
    assert [d.code for d in found] == ["E0453"]
    assert "are distributed over devices" in found[0].label_text


def test_failed_check_on_a_peft_model_suggests_merging(copy: Path) -> None:
    from peft import LNTuningConfig, get_peft_model

    module: Any = lora.base("llama")
    made = get_peft_model(module, LNTuningConfig(target_modules=["input_layernorm"]))
    model, found = adopt_model("m", made, families.tokenizer())
    assert model is None
    assert "`model.merge_and_unload()`" in found[0].help_text
