"""An experiment with observations alone costs one pass per prompt, for any sweep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mechdsl.base.text import Source
from mechdsl.results.document import experiment_document

from ..rules.models import bare
from ..rules.support import BLOCKS, experiment, rows, run_file, write_data
from .support import run_on, shared

LINES = (
    "observe norm head_out layer * head * at last token, cue token as lengths",
    "observe logit_lens resid_post layer * at last token as lens",
    "observe entropy pattern layer * head * at last token as spread",
)


def test_sweep_of_observations_runs_one_pass_per_prompt(tmp_path: Path) -> None:
    write_data(tmp_path)
    text = experiment("look", *LINES[::2], measure="")
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{text}'
    model = bare("gpt2")
    handed = shared(model)
    passed: list[int] = []

    def counted(module: torch.nn.Module, args: object, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, torch.Tensor)
        passed.append(len(hidden))

    handle = model.transformer.h[0].register_forward_hook(counted)
    try:
        result, problems = run_on(Source(whole, tmp_path / "file.mech"), {"m": handed})
    finally:
        handle.remove()
    assert result is not None, problems
    names = [each.name for each in result.experiments]
    assert names == ["look.lengths", "look.spread"]
    assert sum(passed) == len(rows())


def test_observations_do_not_depend_on_measures_in_the_experiment(tmp_path: Path) -> None:
    write_data(tmp_path)
    alone = run_file(experiment("look", *LINES, measure=""), tmp_path, "llama", "planned")
    kept = "keep logit(answer) > -1000"  # so that the unpatched run is measured
    beside = run_file(experiment("look", *LINES, kept, measure=""), tmp_path, "llama", "planned")
    for name, result in alone.items():
        other = beside[name].measures[0].patched
        np.testing.assert_allclose(result.measures[0].patched, other, rtol=1e-4, atol=1e-5)


def test_runs_without_cells_have_no_value_of_observations(tmp_path: Path) -> None:
    """Regression: JSON had a mean of null, with the reason that it is not a number."""
    write_data(tmp_path)
    text = experiment("look", *LINES, measure="measure logit(answer) as raw")
    result = run_file(text, tmp_path, "llama", "planned")
    assert len(result) == 3
    for name, each in result.items():
        labels = [] if "." in name else ["logit(answer)"]
        assert [list(own) for own in each.runs.values()] == [labels] * len(each.runs)
        document = experiment_document(each)
        assert all(run.n > 0 for own in document.runs.values() for run in own)
