"""Models whose blocks `apply_activation_checkpointing` of torch wraps."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import mechdsl

from ..execute.support import word_tokenizer
from . import families

TEXT = """mech 1
model m = local("handed over")
prompts p {
  name in ["anna", "ben"]
  template "{name}"
}
experiment e {
  model m
  prompts p
  ablate layer 0 head 0 at last token with zero
  measure loss as delta
}
"""


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_failed_check_of_a_wrapped_model_names_the_wrapper(family: str, tmp_path: Path) -> None:
    path = tmp_path / "file.mech"
    path.write_text(TEXT, encoding="utf-8")
    model = families.module(family)
    blocks = [
        *model.get_submodule("transformer.h" if family == "gpt2" else "model.layers").children()
    ]
    apply_activation_checkpointing(model, check_fn=lambda part: any(part is b for b in blocks))
    with pytest.raises(mechdsl.MechdslError) as found:
        mechdsl.run(path, {"m": (model, word_tokenizer())}, store=False)
    (error,) = [each for each in found.value.diagnostics if each.severity == "error"]
    assert error.code == "E0410"
    assert "is in a `CheckpointWrapper`" in error.help_text
    assert "`apply_activation_checkpointing`" in error.help_text
    assert "identified wrongly" not in error.help_text
