"""`patch … using eap_ig`: gradients between the inputs of two runs, against plain autograd on the
bare model in 64 bits, one unpadded prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..execute.support import MODES, ROWS, experiment, prompt, run_file
from ..reference.gradients import taken
from .models import bare, double
from .test_estimates import (
    CASES,
    LONG,
    ONE,
    Cells,
    Key,
    agrees,
    call_metric,
    count_planned_passes,
    logits_at_the_end,
    measured,
    read,
    where,
)

POINTS = 3
LINES = ("prompts p", "from other into clean")
USING = f"using eap_ig(steps: {POINTS})"
LONGER = f'logprob(" {LONG}")'


def expected(
    family: str, site: str, layer: int | None, cells: Cells, text: str
) -> dict[Key, list[float]]:
    """Return the estimates of one layer by cell and prompt."""
    module, at, entrance = double(family), where(family, site, layer), where(family, "resid_pre", 0)
    block, found = module.get_submodule(entrance.path), dict[Key, list[float]]()
    for record in ROWS:
        base, source = prompt(record, "clean"), prompt(record, "other")
        change = read(family, tuple(source.ids), entrance) - read(family, tuple(base.ids), entrance)
        call = call_metric(family, text, base, record, logits_at_the_end(family, tuple(source.ids)))
        gradients: list[Tensor] = []
        for point in range(1, POINTS + 1):
            far = 1 - point / POINTS

            def move(part: Any, args: Any, far: float = far, by: Tensor = change) -> Any:
                value = args[0].clone()
                value[0, : len(by)] += far * by[:, 0]
                return (value, *args[1:])

            handle = block.register_forward_pre_hook(move)
            gradients.append(taken(module, at, call).gradient)
            handle.remove()
        mean = torch.stack(gradients).mean(0)
        own, theirs = (read(family, tuple(each.ids), at) for each in (base, source))
        for key, places in cells(base, at.units).items():
            parts = [((theirs[place] - own[place]) * mean[place]).sum() for place in places]
            found.setdefault(key, []).append(float(torch.stack(parts).sum()))
    return found


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("llama", "small passes"),
        *(
            pytest.param(family, mode, marks=pytest.mark.slow)
            for family in ("gpt2", "gpt_neox")
            for mode in ("planned", "plain", "padded on the right")
        ),
    ],
)
def test_estimates_between_inputs_equal_autograd(family: str, mode: str, tmp_path: Path) -> None:
    few = {"heads", "streams", "embedding"} if family == "llama" else CASES.keys()
    cases = {name: case for name, case in CASES.items() if name in few}
    text = "".join(
        experiment(name, *LINES, rule, USING, measured(ONE, "delta"))
        for name, (_, rule, _, _) in cases.items()
    )
    text += experiment("long", *LINES, CASES["heads"][1], USING, measured(LONGER, "delta"))
    found, largest = run_file(text, tmp_path, bare(family), MODES[mode]), 0.0
    for name, metric in [*((name, ONE) for name in cases), ("long", LONGER)]:
        site, _, cells, layers = CASES["heads" if name == "long" else name]
        for layer in layers:
            values = expected(family, site, layer, cells, metric)
            largest = max(largest, agrees(found[name], 0, values, layer))
    assert largest > 0.3


def test_estimates_between_inputs_of_a_linear_model_equal_its_run(tmp_path: Path) -> None:
    lines = (*LINES, "patch resid_post layer 2 at last token", measured(ONE, "delta"))
    text = experiment("run", *lines) + experiment("estimate", *lines, USING)
    found = run_file(text, tmp_path, bare("llama without norms"))
    run, own = (found[name].measures[0] for name in ("run", "estimate"))
    assert np.abs(run.patched - run.base).max() > 0.1
    np.testing.assert_allclose(own.patched, run.patched, atol=1e-4)


def test_verified_estimates_between_inputs_equal_their_cells(tmp_path: Path) -> None:
    lines = (*LINES, CASES["heads"][1], measured(ONE, "delta"))
    text = experiment("run", *lines) + experiment("e", *lines, f"{USING} verify top 2, random 2")
    found = run_file(text, tmp_path, bare("gpt2"))
    (verified,) = found["e"].verified
    data = found["run"].measures[0]
    effects = (data.patched - data.base).mean(axis=1)
    assert len(verified.cells) == 4
    np.testing.assert_allclose(verified.exact, effects[verified.cells], atol=1e-5)


def test_work_of_estimates_between_inputs_grows_with_the_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further forward pass reads the vectors of the base run, and two read the streams that enter
    block 0 and stop there."""
    for points in (2, 5):
        using = f"using eap_ig(steps: {points})"
        text = experiment("e", *LINES, CASES["heads"][1], using, measured(ONE, "delta"))
        planned, counted = count_planned_passes(text, tmp_path, monkeypatch)
        assert planned == (points + 1, points)
        assert counted == (points + 3, points)
