"""The model line of a file whose model comes from Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mechdsl

from ..execute.support import bare, ids_of, word_tokenizer

TEXT = """mech 1
model m = zoo("counting"OPTION)
prompts p { a in ["w1", "w2"]  template "{a} w7"  answer " w3" }
experiment e {
  prompts p
  ablate mlp_out layer 1 at last token with zero
  measure logit(answer) as raw
}
"""


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
@pytest.mark.parametrize(("option", "start"), [("", 1), (", bos: true", 1), (", bos: false", 0)])
def test_bos_of_the_model_line_applies_to_a_model_from_python(
    option: str, start: int, tmp_path: Path
) -> None:
    path = tmp_path / "file.mech"
    path.write_text(TEXT.replace("OPTION", option), encoding="utf-8")
    passed = bare("llama"), word_tokenizer()
    (measure,) = mechdsl.run(path, {"m": passed}, store=False)["e"].measures
    with torch.no_grad():
        expected = [
            float(
                bare("llama")(torch.tensor([ids_of([word, "w7"])[1 - start :]])).logits[0, -1, of]
            )
            for word in ("w1", "w2")
            for of in ids_of(["w3"])[1:]
        ]
    np.testing.assert_allclose(np.sort(measure.base[0]), np.sort(expected), atol=1e-4)


def test_refused_model_from_python_reports_nothing_about_the_declared_model(tmp_path: Path) -> None:
    path = tmp_path / "file.mech"
    path.write_text(TEXT.replace("OPTION", ""), encoding="utf-8")
    passed = torch.nn.Linear(2, 2), word_tokenizer()
    with pytest.raises(mechdsl.MechdslError) as error:
        mechdsl.run(path, {"m": passed}, store=False)
    assert [each.code for each in error.value.diagnostics] == ["E0411"]
