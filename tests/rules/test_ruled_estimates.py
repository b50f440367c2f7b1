"""`using relp` and `using gim`: gradients with changed rules, against models whose modules have
these derivatives."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from mechdsl.diagnostics.rendering import render_full
from mechdsl.forward.hooks import backward_rules
from mechdsl.forward.hooks.backward_rules import RuledPass
from mechdsl.forward.hooks.batch import Batch
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.program.estimators import ESTIMATORS

from ..execute.support import MODES, ROWS, experiment, prompt, run_file, shared, try_file
from ..execute.test_stored_values import check_case
from ..quick import in_turn
from ..reference.ruled import ruled
from .models import bare, double
from .test_estimates import (
    LAYERS,
    ONE,
    Cells,
    agrees,
    all_items,
    by_hand,
    heads_at_last,
    heads_at_subject,
    measured,
    two_places,
    whole_subject,
)

FAMILIES = ("gpt2", "llama", "gpt_neox")
KINDS = ("relp", "gim")
CASES: dict[str, tuple[str, str, Cells, tuple[int | None, ...]]] = {
    "heads": ("z", "patch layer * head * at last token", heads_at_last, LAYERS),
    "streams": ("resid_pre", "patch resid_pre layer * at subject tokens", whole_subject, LAYERS),
    "mlps": ("mlp_out", "patch mlp_out layer * at cue token, last token", two_places, LAYERS),
    "items": ("resid_pre", "patch resid_pre layer * at item tokens", all_items, LAYERS),
    "embedding": ("embed", "patch embed at subject tokens", whole_subject, (None,)),
}
LINES = ("prompts p", "from other into clean", measured(ONE, "delta"))


@cache
def changed(family: str, kind: str) -> Any:
    return ruled(double(family), kind)


def compare(family: str, kind: str, mode: str, folder: Path, names: Collection[str]) -> None:
    """Compare cases with a model whose modules have the changed derivatives."""
    text = "".join(experiment(name, *LINES, CASES[name][1], f"using {kind}") for name in names)
    found = run_file(text, folder, bare(family), MODES[mode])
    largest = 0.0
    for name in names:
        site, _, cells, layers = CASES[name]
        for layer in layers:
            given = (family, site, layer, cells, ONE, "gradient_input")
            expected = by_hand(*given, module=changed(family, kind))
            largest = max(largest, agrees(found[name], 0, expected, layer))
    assert largest > 0.3


@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "kind"), in_turn(FAMILIES, KINDS, FAMILIES))
def test_relp_and_gim_of_sites_and_positions_equal_the_reference(
    family: str, kind: str, mode: str, tmp_path: Path
) -> None:
    compare(family, kind, mode, tmp_path, CASES)


@pytest.mark.parametrize(
    ("family", "kind"), in_turn(("qwen3", "gemma2", "mistral"), KINDS, ("qwen3", "gemma2"))
)
def test_relp_and_gim_with_norms_caps_and_windows_equal_the_reference(
    family: str, kind: str, tmp_path: Path
) -> None:
    """Qwen 3 has norms of queries and keys; Gemma 2 has norms after its sublayers, windows, and
    caps on scores; Mistral has windows."""
    compare(family, kind, "planned", tmp_path, ("heads", "streams"))


@pytest.mark.parametrize(("site", "kind"), in_turn(("k", "v"), KINDS, ("k", "v")))
def test_relp_and_gim_of_shared_keys_and_values_equal_the_reference(
    site: str, kind: str, tmp_path: Path
) -> None:
    """Factors of GIM apply to keys and values as attention reads them."""
    rule = f"patch {site} layer 1 head * at subject tokens"
    found = run_file(experiment("e", *LINES, rule, f"using {kind}"), tmp_path, bare("llama"))["e"]
    given = ("llama", site, 1, heads_at_subject, ONE, "gradient_input")
    assert agrees(found, 0, by_hand(*given, module=changed("llama", kind)), None) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_relp_and_gim_leave_the_forward_pass_unchanged(family: str, kind: str) -> None:
    model = shared(bare(family))
    ids = [prompt(record).ids for record in ROWS]
    batch = Batch.of(ids, 0, "left")
    plain = run_full(model, batch).logits
    rules = ESTIMATORS[kind].backward
    ruled = run_full(model, batch, gradients=True, backward=rules).logits
    assert plain is not None
    assert ruled is not None
    torch.testing.assert_close(ruled.detach(), plain.clone(), rtol=0, atol=2e-5)


def test_relp_of_a_function_without_a_rule_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An activation function that no rule changes is found in the graph of autograd."""
    monkeypatch.setattr(backward_rules, "is_activation", lambda module: False)
    rule = "patch mlp_out layer 0 at last token"
    text = experiment("e", *LINES, rule, "using relp") + experiment("run", *LINES, rule)
    result, problems = try_file(text, tmp_path, bare("llama"))
    assert result is not None
    assert [each.name for each in result.experiments] == ["run"]
    (error,) = (each for each in problems if each.severity == "error")
    assert error.code == "E0608"
    said = render_full([error], color=False, width=300)
    assert "its rules don't cover `m` (no rule applies to its function `Silu`)" in said


@pytest.mark.parametrize("kind", KINDS)
def test_relp_and_gim_of_a_model_with_experts_are_errors(kind: str, tmp_path: Path) -> None:
    rule = "patch mlp_out layer 0 at last token"
    result, problems = try_file(
        experiment("e", *LINES, rule, f"using {kind}"), tmp_path, bare("gpt_oss")
    )
    assert result is None
    assert [each.code for each in problems if each.severity == "error"] == ["E0608"]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_relp_and_gim_resume(kind: str, tmp_path: Path) -> None:
    rule = "patch z layer * head * at subject tokens, last token"
    check_case("llama", experiment("e", *LINES, rule, f"using {kind}"), tmp_path, cut=1)


def test_relp_rule_covers_activation_functions_outside_blocks() -> None:
    """BERT predicts words with an activation function and a norm after its blocks."""
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
    }
    module = BertForMaskedLM(BertConfig(num_attention_heads=2, **sizes)).double().eval()
    module.requires_grad_(False)
    start = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    found: list[torch.Tensor] = []
    rules = ESTIMATORS["relp"].backward
    assert rules is not None
    work = RuledPass(cast("LoadedModel", SimpleNamespace(module=module)), rules)
    with work.opened():
        logits = module(inputs_embeds=start).logits
    work.check(logits)
    for each in (logits, ruled(module, "relp")(inputs_embeds=start).logits):
        found += torch.autograd.grad(each[0, 2, 3], start)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert float(found[0].abs().max()) > 1e-3
