"""Sites that a module outside the package registers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.models.config import available_sites
from mechdsl.vocab.sites import SITES

from ..execute.support import shared
from ..quick import in_turn
from .support import QUICK, experiment, run_file
from .test_kinds import TOY

NAMES = ("attn_proj", "mlp_proj")
SAME = {"attn_proj": "attn_out", "mlp_proj": "mlp_out"}
"""Built-in sites with the same tensor if no norm follows the module."""


@pytest.fixture
def entries() -> Iterator[None]:
    name = f"{__package__}.gizmo_site"
    sys.modules.pop(name, None)
    importlib.import_module(name)
    shared.cache_clear()  # cached models were analysed without these sites
    yield
    for name in NAMES:
        SITES._entries.pop(name)  # type: ignore[attr-defined]
    shared.cache_clear()


@pytest.mark.parametrize(("model", "mode"), in_turn(["gpt2", "llama"], QUICK))
def test_rule_at_a_custom_site_equals_the_builtin_site(
    entries: None, data: Path, model: str, mode: str
) -> None:
    lines = [
        (f"{name}_{which}", f"set {name} layer * at {at} to 0.5")
        for name in (*SAME, *SAME.values())
        for which, at in (("cue", "cue token"), ("subject", "subject tokens"))
    ]
    text = "".join(experiment(key, line) for key, line in lines)
    found = {key: one.measures[0] for key, one in run_file(text, data, model, mode).items()}
    for site, name in SAME.items():
        for which in ("cue", "subject"):
            own, same = found[f"{site}_{which}"], found[f"{name}_{which}"]
            np.testing.assert_allclose(own.patched, same.patched, atol=1e-5, rtol=0)
            assert np.abs(own.patched - own.base).max() > 0.1


def test_custom_sites_are_accepted_by_the_checker(entries: None) -> None:
    line = "stretch resid_post layer 0..1 at last token by 0.5"
    text = TOY.replace(line, "ablate attn_proj layer 0..1 at last token with zero")
    found = check_source(Source(text), CheckSettings()).diagnostics
    assert [one.code for one in found if one.severity == "error"] == []
    swept = check_source(Source(text.replace("attn_proj layer", "atn_proj layer")), CheckSettings())
    assert "E0203" in [one.code for one in swept.diagnostics]


def test_custom_sites_are_unavailable_without_their_module(entries: None) -> None:
    every = available_sites(parallel=False, experts=False, dense=True, mixers=False)
    assert set(NAMES) <= every
    without = available_sites(parallel=False, experts=True, dense=False, mixers=True)
    assert not set(NAMES) & without
