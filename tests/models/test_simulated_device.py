"""Files on a simulated device whose tensors can't be combined with host tensors: results equal the
CPU's, with few synchronisations."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from benchmarks.synchronisations import SIMULATED, counted_synchronisations, to_simulated
from mechdsl.base.text import Source
from mechdsl.forward.generation.cached_pass import choose_method
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.pipeline.options import RunOptions

from ..execute import support
from ..execute.support import DIFFERENCE
from .test_synchronisations import own

INTO = ("prompts p", "from turned into clean")
PATCH = "patch resid_post layer * at last token"
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "stream": (8, (*INTO, "patch resid_post layer * at tokens *", DIFFERENCE)),
    "heads": (8, (*INTO, "patch layer * head * at last token", DIFFERENCE)),
    "pattern": (9, (*INTO, "patch pattern layer 1 head * at last token", DIFFERENCE)),
    "mean": (9, ("prompts p", "ablate layer * head * at last token with mean", DIFFERENCE)),
    "paths": (8, (*INTO, "path layer * head * -> q layer * head * at tokens *", DIFFERENCE)),
    "divergence": (8, (*INTO, PATCH, "measure kl(clean) as raw")),
    "loss": (8, (*INTO, PATCH, "measure loss as delta")),
    "continuation": (9, (*INTO, PATCH, 'measure logprob("w3 w4") as raw')),
    "attention": (
        4,
        ("prompts p", "observe attention layer * head * from last token to subject token"),
    ),
    "logits of heads": (
        7,
        ("prompts p", "observe direct_logit layer * head * toward answer - wrong at last token"),
    ),
    "edges": (
        6,
        (
            "prompts p",
            "block attention layer * head * from last token to subject token",
            DIFFERENCE,
        ),
    ),
    "replies": (
        8,
        (
            "prompts p",
            "scale z layer * head * at last token by 0.5",
            "generate 4",
            'measure contains("w3") as raw',
        ),
    ),
}
"""Maximum synchronisations of a run, without the library's, and experiment lines by name."""


@cache
def model(*, simulated: bool) -> LoadedModel:
    found, said = adopt_model("m", copy.deepcopy(support.bare("llama")), support.word_tokenizer())
    assert found is not None, said
    if not simulated:
        return found
    to_simulated(found.module)
    found = replace(found, device=SIMULATED)
    with counted_synchronisations(SIMULATED):
        choose_method(found)
    return found


WHOLE = {"heads": 29, "loss": 11, "edges": 27}
"""Maximum synchronisations of some cases in full passes: two per pass, one pass per cell."""
MODES = [
    *((name, RunOptions(), most) for name, (most, _) in CASES.items()),
    *((name, support.WITHOUT_PLAN, most) for name, most in WHOLE.items()),
]
QUICK = ("heads", "logits of heads", "loss", "replies")
"""Cases that aren't marked slow."""


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        pytest.param(
            *mode, marks=() if mode[0] in QUICK else pytest.mark.slow, id=f"{mode[0]}-{mode[2]}"
        )
        for mode in MODES
    ],
)
def test_file_on_a_simulated_device_equals_the_cpu_with_few_synchronisations(
    tmp_path: Path, name: str, options: RunOptions, most: int
) -> None:
    _, lines = CASES[name]
    support.write_rows(tmp_path)
    text = f'mech 1\nmodel m = local("m")\n{support.PROMPTS}{support.experiment("e", *lines)}'
    source = Source(text, tmp_path / "file.mech")
    expected = support.by_name(*support.run_on(source, {"m": model(simulated=False)}, options))["e"]
    with counted_synchronisations(SIMULATED) as places:
        ran = support.run_on(source, {"m": model(simulated=True)}, options)
    found = support.by_name(*ran)["e"]
    pairs = list(zip(found.measures, expected.measures, strict=True))
    assert pairs
    for mine, its in pairs:
        np.testing.assert_allclose(mine.patched, its.patched, rtol=0, atol=1e-5)
    assert sum(own(places).values()) <= most, own(places)
