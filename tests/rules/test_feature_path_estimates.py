"""Estimates of paths that start or end at features, against autograd through the exact paths with
plain hooks on the bare model, one unpadded prompt at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.diagnostics.rendering import render_full
from mechdsl.planner.cost import gradient_work
from mechdsl.planner.passes import make_plan

from ..execute.support import check_file, shared
from . import test_feature_paths as sending
from . import test_joint_paths
from . import test_receiving_features as receiving
from .models import bare, double
from .support import MODES, Array, experiment, records, run_file, token, try_file
from .test_feature_paths import FEATURES, KINDS
from .test_joint_paths import FAMILIES, NOTHING, cells


@pytest.fixture(autouse=True)
def _with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls of the bare model record gradients."""
    call: Any = test_joint_paths.called
    monkeypatch.setattr(test_joint_paths, "called", call.__wrapped__)


def differentiate(call: Callable[..., Tensor], n: int) -> float:
    """The derivative of the metric of a row by the share of the senders' change, at 0."""
    share = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logits, record = call(share=share), records()[n]
    value = logits[-1, token(record["a"])] - logits[-1, token(record["b"])]
    (found,) = torch.autograd.grad(value, share, allow_unused=True, materialize_grads=True)
    return float(found)


def estimated(module: Any, name: str, key: str, own: Any) -> Array:
    """[cell, prompt] the first-order effects of a case."""
    return np.array(
        [
            [
                differentiate(partial(module.patched, name, key, own, cell, n), n)
                for n in range(len(records()))
            ]
            for cell in module.CASES[key].cells
        ]
    )


OTHERS = ("group_of_components_to_sae", "sae_from_neurons_of_layers")
"""Cases that are E0608."""


def equal_autograd(
    data: Path, module: Any, name: str, mode: str, kind: str, part: slice = slice(None)
) -> None:
    """Compare the cases whose path is the only rule."""
    own = module.dictionaries(data, name, kind)
    every = module.CASES if module is sending else module.cases(name)
    keys = [key for key, case in every.items() if case.other_rules is NOTHING]
    keys = [key for key in keys if key not in OTHERS][part]
    text = module.definitions(name, kind) + (sending.GROUP if module is sending else "")
    for key in keys:
        text += experiment(key, "from longer into clean", *every[key].lines, "using eap")
    found = run_file(text, data, name, mode, precise=True)
    moved: list[str] = []
    for key in keys:
        of = own[every[key].basis] if module is sending else own
        values = estimated(module, name, key, of)
        effects = cells(found[key]) - found[key].measures[0].base
        np.testing.assert_allclose(effects, values, atol=1e-6, rtol=1e-5, err_msg=key)
        moved += [key] if np.abs(values).max() > 1e-3 else []
    assert len(moved) > len(keys) // 2, moved


MODULES = [sending, receiving]
IDS = ["from_features", "to_features"]
PARTS = [(name, kind, n) for n, (name, kind) in enumerate(zip(FAMILIES, KINDS[1:], strict=True))]


@pytest.mark.parametrize(("name", "kind", "part"), PARTS)
@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_estimates_of_paths_with_features_equal_autograd(
    data: Path, module: Any, name: str, kind: str, part: int
) -> None:
    """Each case in one family, in passes of few prompts, padded."""
    equal_autograd(data, module, name, "small passes", kind, slice(part, None, 3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_estimates_of_all_paths_with_features_equal_autograd(
    data: Path, module: Any, name: str, mode: str, kind: str
) -> None:
    equal_autograd(data, module, name, mode, kind)


def write_complete(folder: Path, width: int) -> None:
    """Write a dictionary whose features are all active, and as many as a vector has numbers: their
    sum is a linear function of the vector, with the inverse as the decoder."""
    random = torch.Generator().manual_seed(3)
    encoder = torch.randn(width, width, generator=random, dtype=torch.float64)
    weights = {"W_enc": encoder, "W_dec": torch.linalg.inv(encoder).contiguous()}
    weights |= {"b_enc": torch.full((width,), 1e3), "b_dec": torch.zeros(width)}
    folder.mkdir(exist_ok=True)
    config = {"architecture": "standard", "metadata": {"hook_name": "blocks.1.hook_mlp_out"}}
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({n: own.double() for n, own in weights.items()}, folder / "sae_weights.safetensors")


WAYS = {
    "sent": ("mlp_out layer 1 -> logits", "mlp_out layer 1 in basis out -> logits",
             "feature * of out -> logits"),
    "got": ("L0H1 -> resid_pre layer 2", "L0H1 -> resid_pre layer 2 in basis pre",
            "L0H1 -> feature * of pre"),
}  # fmt: skip
"""Paths of whole vectors, of all features of a complete dictionary, and of each feature."""
USING = {"eap": "eap", "eap_ig": "eap_ig(steps: 3)", "relp": "relp", "gim": "gim"}


@pytest.mark.parametrize("name", FAMILIES)
def test_estimates_of_complete_features_add_up_to_those_of_whole_vectors(
    data: Path, name: str
) -> None:
    """For each estimator of paths, at both ends."""
    write_complete(data / f"complete_{name}", double(name).config.hidden_size)
    places = {"out": "mlp_out layer 1", "pre": "resid_pre layer 2"}
    text = "".join(f'basis {key} = sae("complete_{name}") at {at}\n' for key, at in places.items())
    for (key, paths), (word, call) in product(WAYS.items(), USING.items()):
        for number, path in enumerate(paths):
            lines = ("from other into clean", f"path {path} at last token", f"using {call}")
            text += experiment(f"{key}_{word}_{number}", *lines)
    found = run_file(text, data, name, "small passes", precise=True)
    effects = {key: cells(own) - own.measures[0].base for key, own in found.items()}
    for key, word in product(WAYS, USING):
        whole, joined, each = (effects[f"{key}_{word}_{number}"] for number in range(3))
        assert np.abs(whole).max() > 1e-3
        np.testing.assert_allclose(joined, whole, atol=1e-6, rtol=1e-5, err_msg=f"{key} {word}")
        np.testing.assert_allclose(each.sum(0), whole[0], atol=1e-6, rtol=1e-5, err_msg=word)
    for word in ("eap_ig", "relp", "gim"):
        assert np.abs(effects[f"got_{word}_0"] - effects["got_eap_0"]).max() > 1e-4, word


@pytest.mark.parametrize("name", FAMILIES)
def test_estimates_of_features_equal_runs_of_linear_paths(data: Path, name: str) -> None:
    """With frozen norms, logits are linear in the features. Runs in the same file load the
    dictionary without gradients; cells of `verify` are run."""
    sending.dictionaries(data, name, "standard")
    text = sending.definitions(name, "standard")
    rule = "path feature * of f -> logits at last token with frozen norms"
    text += experiment("exact", "from longer into clean", rule)
    text += experiment("estimated", "from longer into clean", rule, "using eap")
    to = "path L0H1 -> feature * of f at last token"
    text += experiment("runs", "from longer into clean", to)
    text += experiment("verified", "from longer into clean", to, "using eap verify top 3, random 2")
    found = run_file(text, data, name, "planned")
    values = [cells(found[key]) for key in ("exact", "estimated")]
    np.testing.assert_allclose(*values, atol=1e-5, rtol=1e-5)
    assert np.abs(values[0] - found["exact"].measures[0].base).max() > 1e-2
    (verified,) = found["verified"].verified
    exact = found["runs"].statistics[0].mean
    np.testing.assert_allclose(verified.exact, exact[verified.cells], rtol=1e-3, atol=1e-5)
    assert "in cells that `verify` runs, features of `f`" in found["verified"].conventions["path"]


NO_PATH = {
    "heads": ("z layer 0..2 head 1 -> feature 0..2 of attn", 2),
    "neurons": ("mlp_hidden layer 0..1 neuron 3 -> feature 0..2 of f", 1),
}
"""Paths with senders in the layer of their receivers, by the layer without a path."""


@pytest.mark.parametrize("using", ["eap", "eap_ig(steps: 2)", "eap_ig_activations(steps: 2)"])
@pytest.mark.parametrize("key", NO_PATH)
def test_senders_without_a_path_to_features_leave_other_estimates_unchanged(
    data: Path, key: str, using: str
) -> None:
    receiving.dictionaries(data, "llama", "standard")
    path, last = NO_PATH[key]
    text = receiving.definitions("llama", "standard")
    for name, own in (("swept", path), ("less", path.replace(f"0..{last}", f"0..{last - 1}", 1))):
        lines = "from other into clean", f"path {own} at last token"
        text += experiment(name, *lines, f"using {using}")
        text += experiment(f"runs_{name}", *lines)
    found = run_file(text, data, "llama", "small passes", precise=True)
    for kind in ("", "runs_"):
        swept, less = (found[f"{kind}{name}"] for name in ("swept", "less"))
        expected = cells(less) - less.measures[0].base
        effects = cells(swept) - swept.measures[0].base
        np.testing.assert_allclose(effects, expected, atol=1e-9, rtol=1e-9)
        assert len(expected) == 3 * last
        assert np.abs(expected).max() > 1e-4


def test_plan_counts_backward_passes_of_features(data: Path) -> None:
    """From each feature; passes from features of a transcoder pass no sublayer."""
    sending.dictionaries(data, "gpt2", "standard")
    for basis, backwards in (("f", 1 + FEATURES // 3), ("t", 1)):
        text = sending.definitions("gpt2", "standard")
        rule = f"path L0H1 -> feature * of {basis} at last token"
        text += experiment("e", "from longer into clean", rule, "using eap")
        checked = check_file(text, data, shared(bare("gpt2")))
        ((own,),) = (panel.experiments for panel in make_plan(checked.experiments).panels)
        prompts = np.arange(len(records()))
        work = gradient_work(own, prompts, lambda lengths, sources: (lengths, lengths), 10_000)
        assert (work.joined_forwards, work.joined_backwards) == (3, backwards)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("path z layer 0..2 head 1 -> attn_out layer 1..2 feature 3 of h", "heads of layer 1 are"),
        ("path several -> feature 3 of f", "the value of one replaces the change of another"),
    ],
)
def test_path_with_features_that_cannot_be_estimated_names_the_reason(
    data: Path, rule: str, reason: str
) -> None:
    receiving.dictionaries(data, "llama", "standard")
    text = receiving.definitions("llama", "standard")
    text += 'basis h = sae("llama_standard/sae") at attn_out layer 1..2\n'
    text += experiment("e", "from longer into clean", f"{rule} at last token", "using eap")
    result, diagnostics = try_file(text, data, "llama")
    assert result is None
    found = [each for each in diagnostics if each.code == "E0608"]
    assert reason in render_full(found), [each.code for each in diagnostics]
