"""A trained dictionary of a zoo model retains more of the answer than principal components with the
same number of values per vector, on held-out prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.execute.training import RowVectors
from mechdsl.pipeline.loaded_models import load_needed_models
from mechdsl.pipeline.options import RunOptions
from mechdsl.pipeline.trained_files import fits_of_file

FILE = """mech 1

model toy = zoo("induction")

prompts repeats {{
  word in words(toy)
  half = list(word, 12, sep: " ", distinct: true)
  template "{{half}} {{again = half}} {{cue = half[1]}}"
  answer " {{half[2]}}"
  split 80%
}}

{bases}
basis components = python("components.py:Components", features: {k})
  at resid_post layer 1

experiment kept {{
  model toy
  prompts repeats.test limit 128
  for b in [{names}, components] {{
    set resid_post layer 1 at tokens * to reconstruction of b
  }}
  measure logprob(answer) as delta
}}
"""
FIT = (
    "basis f{seed} = fit(sae(features: 256, k: {k}), prompts: repeats.train, limit: 400, "
    "steps: 600, rate: 0.004, seed: {seed}) at resid_post layer 1 at tokens *"
)
COMPONENTS = """
import numpy as np
import torch
from pathlib import Path

class Components:
    def __init__(self):
        saved = np.load(Path(__file__).with_name("components.npz"))
        self.center, self.axes = map(torch.from_numpy, (saved["center"], saved["axes"]))

    def encode(self, vectors):
        return (vectors - self.center) @ self.axes.T

    def decode(self, features):
        return features @ self.axes + self.center
"""


@pytest.mark.slow
@pytest.mark.parametrize("k", [8, 16, 32])
def test_trained_dictionaries_retain_more_than_principal_components(k: int, tmp_path: Path) -> None:
    """Three seeds; components are computed from the same training vectors, one per token."""
    bases = "\n".join(FIT.format(seed=seed, k=k) for seed in range(3))
    text = FILE.format(bases=bases, names="f0, f1, f2", k=k)
    path = tmp_path / "file.mech"
    path.write_text(text, "utf-8")
    (tmp_path / "components.py").write_text(COMPONENTS, "utf-8")
    checked = check_source(Source(text, path))
    fit = next(iter(fits_of_file(checked).values()))
    models, problems = load_needed_models(checked, RunOptions(), None)
    assert models is not None, problems
    vectors = RowVectors(fit.training, models[fit.model], 0, None).chunk(0)[0].double()
    center = vectors.mean(0)
    axes = torch.linalg.svd(vectors - center, full_matrices=False)[2][:k]
    arrays = {"center": center.float().numpy(), "axes": axes.float().numpy()}
    np.savez(tmp_path / "components.npz", **arrays)
    found = mechdsl.run(path, store=tmp_path / "store", fit=True, allow_python=True)
    (done,) = found.files[0].experiments
    lost = {
        str(cell.coords["b"]): -float(done.measures[0].patched[n].mean())
        for n, cell in enumerate(done.cells)
    }
    base = -float(done.measures[0].base.mean())
    for seed in range(3):
        assert lost[f"f{seed}"] - base < (lost["components"] - base) / 3
