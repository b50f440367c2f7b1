"""`using smoothgrad`: the mean of gradients at moved vectors, by plain autograd on the bare model
in 64 bits, one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mechdsl.execute.patching import estimates

from ..execute.support import MODES, ROWS, experiment, prompt, run_file, try_file
from ..execute.test_stored_values import check_case
from ..reference.gradients import taken
from .models import bare, double
from .test_estimates import (
    ONE,
    Key,
    agrees,
    call_metric,
    count_planned_passes,
    heads_at_subject,
    measured,
    read,
    where,
    whole_subject,
)

RAW = measured(ONE, "raw")
CASES = {
    "embedding": ("embed", None, "patch embed at subject tokens", whole_subject),
    "streams": ("resid_pre", 1, "patch resid_pre layer 1 at subject tokens", whole_subject),
    "heads": ("z", 1, "patch z layer 1 head * at subject tokens", heads_at_subject),
}
LINES = ("prompts p", "from other into clean", RAW)


def waves(key: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Deterministic numbers instead of noise, different for each copy, token and dimension."""
    count = int(np.prod(size))
    return np.cos(np.arange(count) * 1.7 + key[-1]).reshape(size)


@pytest.mark.parametrize("mode", ["planned", pytest.param("small passes", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_smoothgrad_equals_the_mean_of_gradients_at_noisy_vectors(
    family: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "draw_noise", waves)
    using = "using smoothgrad(samples: 3, noise: 0.4)"
    text = "".join(experiment(name, *LINES, case[2], using) for name, case in CASES.items())
    found = run_file(text, tmp_path, bare(family), MODES[mode])
    for name, (site, layer, _, cells) in CASES.items():
        at, expected = where(family, site, layer), dict[Key, list[float]]()
        for record in ROWS:
            own = prompt(record)
            forward = call_metric(family, ONE, own, record, torch.zeros(()))
            base = read(family, tuple(own.ids), at)
            scale = 0.4 * float(base.max() - base.min())
            moved = [torch.from_numpy(waves([n], base.shape)) * scale for n in range(3)]
            gradients = [taken(double(family), at, forward, each).gradient for each in moved]
            mean = torch.stack(gradients).mean(0)
            for key, vectors in cells(own, at.units).items():
                size = torch.stack([mean[each] for each in vectors]).norm()
                expected.setdefault(key, []).append(float(size))
        assert agrees(found[name], 0, expected, None) > 1e-3


def test_smoothgrad_noise_depends_on_the_seed_not_on_the_batch(tmp_path: Path) -> None:
    rule = "patch embed at subject tokens"
    text = experiment("e", *LINES, rule, "using smoothgrad(samples: 2)")
    values = {
        mode: run_file(text, tmp_path, bare("gpt2"), MODES[mode])["e"].measures[0].patched
        for mode in ("planned", "small passes")
    }
    np.testing.assert_allclose(values["planned"], values["small passes"], rtol=1e-4)
    other = f"seed 7\n{text}"
    seeded = run_file(other, tmp_path, bare("gpt2"))["e"].measures[0].patched
    assert not np.allclose(values["planned"], seeded, rtol=1e-2)


@pytest.mark.parametrize("argument", ["samples: 0", "noise: 0", "samples: 2.5"])
def test_invalid_smoothgrad_options_are_errors(argument: str, tmp_path: Path) -> None:
    rule = "patch embed at subject tokens"
    text = experiment("e", *LINES, rule, f"using smoothgrad({argument})")
    result, problems = try_file(text, tmp_path, bare("gpt2"))
    assert result is None
    assert "E0207" in [each.code for each in problems]


def test_plan_counts_the_smoothgrad_passes_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = "patch z layer 0..1 head * at subject tokens"
    text = experiment("e", *LINES, rule, "using smoothgrad(samples: 3)")
    # Two sites have three copies each, after one pass that reads them.
    assert count_planned_passes(text, tmp_path, monkeypatch) == ((7, 6), (7, 6))


def test_interrupted_smoothgrad_resumes(tmp_path: Path) -> None:
    rule = "patch z layer * head * at subject tokens"
    text = experiment("e", *LINES, rule, "using smoothgrad(samples: 2)")
    check_case("llama", text, tmp_path, cut=1)
