"""Attention outside transformers' registry: its pattern and scores can't be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mechdsl
from mechdsl.forward.hooks.batch import Batch, SiteRead
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.loading.loader import adopt_model

from ..reference.forward import forward
from . import families, own_models

FILE = """\
mech 1
model toy = local("toy")
prompts p {
  a in ["w11", "w12", "w14"]
  template "{a} w21 w9"
  answer " w3"
  corrupt other { a = "w15" }
}
experiment e {
  prompts p
  RULE
}
"""
PATCH = "from clean into other\n  patch SITE layer 0 head * at last token\n  "
MEASURE = "measure logit(answer) as raw"


@pytest.mark.parametrize(
    ("rule", "site"),
    [
        ("observe attention layer 0 head * from last token to a token", "attention"),
        (f"block attention layer 0 from last token to a token\n  {MEASURE}", "attention"),
        (PATCH.replace("SITE", "pattern") + MEASURE, "pattern"),
        (PATCH.replace("SITE", "scores") + MEASURE, "scores"),
    ],
)
def test_pattern_of_unregistered_attention_names_the_registry(
    rule: str, site: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.mech"
    path.write_text(FILE.replace("RULE", rule), encoding="utf-8")
    models = {"toy": (own_models.with_attention_by_hand(), families.tokenizer())}
    with pytest.raises(mechdsl.MechdslError) as found:
        mechdsl.run(path, models=models)
    (problem,) = [d for d in found.value.diagnostics if d.severity == "error"]
    assert problem.code == "E0413"
    assert problem.message == f"`toy` has no `{site}`"
    assert "outside of transformers' attention registry" in problem.label_text
    assert "call `ALL_ATTENTION_FUNCTIONS` (`attention_interface`)" in problem.help_text


def test_z_of_unregistered_attention_equals_hooks() -> None:
    model, _ = adopt_model("m", own_models.with_attention_by_hand(), families.tokenizer())
    assert model is not None
    ids = [1, 9, 22, 31, 17]
    read = SiteRead("z", 1)
    result = run_full(model, Batch.of([ids], model.pad_id, "left"), reads=[read])
    expected = forward("gpt2", families.module("gpt2"), ids)["z", 1]
    torch.testing.assert_close(result.reads[read][0], expected, atol=1e-5, rtol=1e-4)


def test_missing_router_of_unregistered_attention_keeps_its_message(tmp_path: Path) -> None:
    path = tmp_path / "file.mech"
    rule = "from clean into other\n  patch router layer 0 at last token\n  " + MEASURE
    path.write_text(FILE.replace("RULE", rule), encoding="utf-8")
    models = {"toy": (own_models.with_attention_by_hand(), families.tokenizer())}
    with pytest.raises(mechdsl.MechdslError, match="not a part of GPT2LMHeadModel"):
        mechdsl.run(path, models=models)
