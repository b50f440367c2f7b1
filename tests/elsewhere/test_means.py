"""`ablate … with mean of BLOCK`: means over the rows of another block."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from mechdsl.diagnostics.core import has_errors

from ..execute.support import (
    DIFFERENCE,
    MODES,
    PROMPTS,
    ROWS,
    Prompt,
    agree,
    difference,
    experiment,
    prompts,
)
from ..quick import in_turn
from ..reference.forward import Write
from .support import OTHERS, attempt, models, patched, run, unpatched

SIX = """
prompts six {
  x in ["w8", "w9"]
  y in ["w11", "w12", "w13"]
  template "w6 {x} w40 w7 {y} w42"
  corrupt plain { x = "w5" }
}
"""


def six(*, plain: bool = False) -> list[Prompt]:
    first = ("w5",) if plain else ("w8", "w9")
    words = product(first, ("w11", "w12", "w13"))
    return [Prompt(("w6", x, "w40", "w7", y, "w42"), (), (), 0) for x, y in words]


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), ["gpt2", "llama", "gpt_neox"]))
@pytest.mark.parametrize("of", ["six", "six.plain"])
def test_ablation_with_the_mean_of_another_block_equals_reference(
    folder: Path, family: str, mode: str, of: str
) -> None:
    text = experiment(
        "e", "prompts p", f"ablate z layer * heads 0..2 at last token with mean of {of}",
        DIFFERENCE,
    )  # fmt: skip
    found = run(text, folder, models(family), MODES[mode], prompts=PROMPTS + SIX)["e"]
    assert found.conventions["fill"] == f"mean over the 6 rows of {of}, per position"
    seen = [unpatched(family, row)[1] for row in six(plain=of == "six.plain")]
    bases = prompts()
    values = np.zeros((3, len(ROWS)))
    base = np.zeros(len(ROWS))
    for n, record in enumerate(ROWS):
        base[n] = difference(unpatched(family, bases[n])[0], record)
        for layer in range(3):
            mean = torch.stack([one["z", layer][-1] for one in seen]).mean(dim=0)
            writes = [Write("z", layer, mean[head], bases[n].last, head) for head in range(3)]
            logits = patched(family, bases[n], writes)
            values[layer, n] = difference(logits, record)
    agree(found.measures[0], values, base)


@pytest.mark.parametrize(("site", "mode"), in_turn(["final_norm", "logits"], ["planned", "plain"]))
def test_mean_of_another_block_after_the_last_layer_equals_reference(
    folder: Path, site: str, mode: str
) -> None:
    """The run of the other block must include the final norm or the logits."""
    text = experiment("e", "prompts p", f"ablate {site} at last token with mean of six", DIFFERENCE)
    found = run(text, folder, models("llama"), MODES[mode], prompts=PROMPTS + SIX)["e"]
    seen = [unpatched("llama", row)[1][site, None][-1] for row in six()]
    mean = torch.stack(seen).mean(dim=0)[0]
    values, base = np.zeros((1, len(ROWS))), np.zeros(len(ROWS))
    for n, (record, prompt) in enumerate(zip(ROWS, prompts(), strict=True)):
        base[n] = difference(unpatched("llama", prompt)[0], record)
        logits = patched("llama", prompt, [Write(site, None, mean, prompt.last, 0)])
        values[0, n] = difference(logits, record)
    agree(found.measures[0], values, base)


@pytest.mark.parametrize(
    ("rule", "code", "said"),
    [
        ("ablate z layer 1 head 0 at cue token with mean of six", "E0308", "`six`"),
        ("ablate z layer 1 head 0 at last token with mean of sixx", "E0201", "`sixx`"),
        ("ablate z layer 1 head 0 at last token with mean of six.plane", "E0201", "six.plain"),
        ("ablate pattern layer 1 head 0 at last token with mean of six", "E0333", "`pattern`"),
    ],
)
def test_invalid_mean_of_another_block_is_rejected(
    folder: Path, rule: str, code: str, said: str
) -> None:
    text = experiment("e", "prompts p", rule, DIFFERENCE)
    found, diagnostics = attempt(text, folder, models("llama"), prompts=PROMPTS + SIX + OTHERS)
    assert found is None
    assert has_errors(diagnostics)
    errors = [d for d in diagnostics if d.severity == "error"]
    assert [d.code for d in errors] == [code], [d.message for d in errors]
    told = errors[0].message + errors[0].help_text
    assert said in told, told
