"""Models that number the columns of their input get padding only after prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

import mechdsl
from mechdsl.loading.loader import adopt_model

from ..models import families

FILE = """\
mech 1
model m = local("none")
prompts p {
  a in ["w11", "w12 w13 w14", "w15 w16"]
  template "{a} w21 w9"
  answer " w3"
  corrupt other { a = "w18" }
}
experiment e {
  prompts p
  from other into clean
  patch resid_post layer * at last-a token
  measure logit(answer) as raw
}
"""


class PlainForCausalLM(GPT2LMHeadModel):
    """A model whose forward takes no position ids, like some custom models."""

    def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: Any = None) -> Any:  # type: ignore[override]
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_model_without_position_ids_gets_padding_on_the_right(tmp_path: Path) -> None:
    plain: Any = families.module("gpt2")
    module: Any = PlainForCausalLM(plain.config).eval()
    module.load_state_dict(plain.state_dict())
    model, _ = adopt_model("m", module, families.tokenizer())
    assert model is not None
    assert model.calling.side == "right"
    path = tmp_path / "file.mech"
    path.write_text(FILE, encoding="utf-8")
    found, expected = (
        mechdsl.run(path, models={"m": (each, families.tokenizer())})["e"].measures[0]
        for each in (module, plain)
    )
    assert found.base == pytest.approx(expected.base, abs=1e-4)
    assert found.patched == pytest.approx(expected.patched, abs=1e-4)
    with torch.no_grad():
        ids = families.tokenizer().encode("w11 w21 w9").ids
        alone = float(plain(torch.tensor([ids])).logits[0, -1, families.WORDS.index("w3") + 3])
    assert min(abs(found.base[0] - alone)) < 1e-4
