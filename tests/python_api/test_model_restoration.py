"""A model passed from Python is restored exactly, whatever happens during the run."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mechdsl
from mechdsl.loading.devices import restore_models

from ..models import families, lora
from .conftest import FILE

SHORT = FILE.replace("limit 16", "limit 4").replace("limit 8", "limit 4")
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


def state(module: nn.Module) -> dict[str, Any]:
    """All visible state of a model and of random number generators."""
    found: dict[str, Any] = {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": [str(each) for each in np.random.get_state()],
        "python": random.getstate(),
    }
    for name, part in module.named_modules():
        found[name] = {key: id(value) for key, value in vars(part).items()}
        found[f"{name}.training"] = part.training
        for key, value in vars(part).items():
            if isinstance(value, dict):
                found[f"{name}.{key}"] = {k: id(v) for k, v in value.items()}
        config = getattr(part, "config", None)
        if config is not None:
            found[f"{name}.config"] = str(vars(config))
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        found[name] = (weight.device, weight.dtype, weight.requires_grad, weight.is_inference())
        found[f"{name} values"] = weight.detach().double().sum().item()
    return found


class Breaking:
    """A hook that raises an error at its call number `at`."""

    calls, at = 0, 0
    error: type[BaseException] = ZeroDivisionError

    def __call__(self, *given: object) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error


@pytest.fixture
def breaking() -> Breaking:
    return Breaking()


@pytest.fixture
def used(pair: tuple[Any, Any], breaking: Breaking) -> Iterator[tuple[Any, Any]]:
    """A model in use: partly in training mode, partly frozen, with a hook."""
    model, tokenizer = pair
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.requires_grad_(False)
    handle = model.model.layers[2].register_forward_hook(breaking)
    yield model, tokenizer
    handle.remove()
    model.eval().requires_grad_(True)


def test_run_restores_the_model(used: tuple[Any, Any], inside: Path) -> None:
    before = state(used[0])
    mechdsl.run(SHORT, {"toy": used}, write_reports=False)
    assert state(used[0]) == before


def test_run_on_model_in_training_mode_computes_without_dropout(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    model = deepcopy(model)
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5

    lines = "{ prompts fruit limit 4 measure logit(answer) as raw }"
    text = f"{SHORT.partition('experiment heads')[0]}experiment plain {lines}\n"

    def values(*, training: bool) -> list[Any]:
        given = {"toy": (model.train(training), tokenizer)}
        ran = mechdsl.run(text, given)["plain"].measures[0].patched
        own = mechdsl.objective(text, models=given, site="embed", at="last token")
        return [ran[0], own(own.start).detach().numpy()]

    for found, expected in zip(values(training=True), values(training=False), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_run_on_model_that_returns_tuples_gives_the_same_values(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    """`config.return_dict` is false, in a model from Python and in a folder."""
    lines = "{ prompts fruit limit 4 measure logit(answer) as raw }"
    text = f"{SHORT.partition('experiment heads')[0]}experiment plain {lines}\n"
    model = deepcopy(pair[0])
    model.config.return_dict = False
    model.save_pretrained(tmp_path / "saved")
    pair[1].save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["return_dict"] is False

    expected = mechdsl.run(text, {"toy": pair})["plain"].measures[0].patched
    found = mechdsl.run(text, {"toy": (model, pair[1])})["plain"].measures[0].patched
    np.testing.assert_array_equal(found, expected)
    assert model.config.return_dict is False
    text = text.replace('zoo("counting")', f'local("{tmp_path}/saved")')
    found = mechdsl.run(text)["plain"].measures[0].patched
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_estimates_do_not_depend_on_no_grad_or_inference_mode(
    mode: Callable[[], Any], pair: tuple[Any, Any]
) -> None:
    prompts, _, lines = SHORT.partition("experiment positions")
    text = prompts.partition("experiment heads")[0]
    text += "basis b = jacobian(fruit, embed -> resid_post layer 0, dims: 1, limit: 1) at embed\n"
    lines = lines.partition("  measure argmax")[0].replace("each item token", "token -2..-1")
    lines = lines.replace("layer 2", "layer 0")
    text += f"experiment estimated {lines}  using gradient_input\n}}\n"
    text += f"experiment in_basis {lines}}}\n".replace("resid_post layer 0", "embed in basis b")

    def values(given: dict[str, tuple[Any, Any]]) -> list[Any]:
        ran = mechdsl.run(text, given, limit=2)
        return [each.measures[0].patched for each in ran]

    expected = values({"toy": pair})
    for given in ({"toy": pair}, {}):
        with mode():
            found = values(given)
        for own, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-5)
    assert np.abs(expected[0] - expected[0][0]).max() > 1e-3


@pytest.mark.slow
def test_adapter_on_the_model_keeps_weights_and_gradients(
    used: tuple[Any, Any], inside: Path
) -> None:
    """Each weight keeps its value and its gradient, so training can continue."""
    model = used[0]
    lora.save(lora.wrapped(deepcopy(model), "llama"), inside / "tuned")
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    before = state(model)
    gradients = [None if w.grad is None else w.grad.clone() for w in model.parameters()]
    line = 'model toy = zoo("counting")\n'
    text = SHORT.partition("experiment positions")[0].replace("model toy\n", "model tuned\n")
    text = text.replace(line, f'{line}model tuned = local("tuned", base: toy)\n')
    mechdsl.run(text, {"toy": used}, write_reports=False)
    assert state(model) == before
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        assert str(weight.grad) == str(gradient)
    model.zero_grad()


def test_rejected_run_restores_the_model(used: tuple[Any, Any]) -> None:
    before = state(used[0])
    with pytest.raises(mechdsl.MechdslError, match="E0301"):
        mechdsl.run(SHORT.replace("head *", "head 14"), {"toy": used})
    assert state(used[0]) == before


@pytest.mark.parametrize("call", [mechdsl.validate, mechdsl.plan, mechdsl.graph, mechdsl.explain])
def test_validate_plan_graph_and_explain_restore_the_model(
    call: Callable[..., object], used: tuple[Any, Any]
) -> None:
    before = state(used[0])
    call(SHORT, {"toy": used})
    assert state(used[0]) == before


RUNS_ALONE = """
import io, random, sys, warnings
warnings.simplefilter("ignore")
import mechdsl

def drawn(what, call):
    before = random.getstate()
    found = call()
    assert random.getstate() == before, what
    return found

text = sys.stdin.read()
functions = ("validate", "plan", "graph", "explain", "run")
found = {name: drawn(name, lambda: getattr(mechdsl, name)(text)) for name in functions}
others = {"diff", "export", "fit", "objective", "runs"}
assert {*functions, *others} == {n for n in mechdsl.__all__ if n.islower()}, mechdsl.__all__
drawn("a page", lambda: mechdsl.explain("E0301"))
for each in (found["run"], found["run"]["heads"]):
    for show in ("to_text", "records", "to_csv", "__repr__", "_repr_html_"):
        drawn(show, getattr(each, show))
drawn("to_json", found["run"].to_json)
drawn("plot", lambda: found["run"]["heads"].plot("heatmap"))
drawn("validate", lambda: str(mechdsl.validate(text)))

open("file.mech", "w", encoding="utf-8").write(text)
for known in range(2):  # computed, and from the store
    drawn("a stored run", lambda: mechdsl.run("file.mech", store="store"))
kept = drawn("runs", lambda: mechdsl.runs("store"))
assert [run.state for run in kept] == ["finished"], kept
drawn("__repr__", kept.__repr__)
drawn("results of a run", lambda: kept[0].results.to_text())
drawn("export", lambda: kept[0].export("folder"))
found = drawn("diff", lambda: mechdsl.diff("folder/file", kept[0]))
for show in ("to_text", "to_json", "__repr__"):
    drawn(show, getattr(found, show))
drawn("remove", kept[0].remove)
"""


@pytest.mark.slow
def test_functions_do_not_consume_random_numbers(inside: Path) -> None:
    """Runs in a separate process, as the first import of a module may consume some."""
    command = [sys.executable, "-c", RUNS_ALONE]
    done = subprocess.run(command, input=SHORT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (1, KeyboardInterrupt),
        (12, KeyboardInterrupt),
        (0, KeyboardInterrupt),
        (0, ZeroDivisionError),
    ],
)
def test_interrupted_or_failed_run_restores_the_model(
    call: int, error: type[BaseException], used: tuple[Any, Any], breaking: Breaking
) -> None:
    """The error is raised during the model check, in unpatched runs, or in the last call (0)."""
    only = None if error is KeyboardInterrupt else "heads"  # the other experiments go on
    if not call:
        mechdsl.run(SHORT, {"toy": used}, only=only, write_reports=False)
        call = breaking.calls
    before = state(used[0])
    breaking.calls, breaking.at, breaking.error = 0, call, error
    with pytest.raises(error):
        mechdsl.run(SHORT, {"toy": used}, only=only, write_reports=False)
    assert breaking.calls == call
    assert state(used[0]) == before


@pytest.mark.parametrize("grad", [True, False])
def test_model_can_be_trained_after_a_run(grad: bool, used: tuple[Any, Any]) -> None:
    """The run leaves no inference-mode tensors in the model."""
    model = used[0]
    with torch.set_grad_enabled(grad):
        mechdsl.run(SHORT, {"toy": used}, only="heads", write_reports=False)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


def test_restore_models_undoes_all_edits_after_an_error() -> None:
    """Covers hooks, attributes, buffers, configs and random number generators."""
    module = families.module("llama").train()
    block: Any = module.get_submodule("model.layers.0")
    table = block._forward_hooks
    before = state(module)
    with pytest.raises(KeyboardInterrupt):
        _edit_everything(module, block)
    assert state(module) == before
    assert block._forward_hooks is table
    assert not hasattr(block, "gizmo")


def _edit_everything(module: Any, block: Any) -> None:
    with restore_models([module, "no model"]):
        module.eval()
        block.register_forward_hook(print)
        block.forward = print
        block.gizmo = 1
        module.get_submodule("model.rotary_emb").inv_freq = torch.zeros(2)
        module.config._attn_implementation_internal = "gizmo"
        module.config.gizmo = 2
        torch.rand(3), np.random.rand(3), random.random()
        raise KeyboardInterrupt
