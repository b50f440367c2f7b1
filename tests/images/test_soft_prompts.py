"""Soft prompts at tokens inserted into images: `direction v = fit(soft_prompt(…), …)`.

The references are the bare model in fp64, with vectors that a hook appends to the output of its
embedding, and a training loop that shares only its seeds with the package.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.fits.reports import SoftPromptReport

from . import support
from .support import ANSWERS, LABELS, WRONG
from .test_inserted_tokens import appended

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
COUNT = 2
QUICK = "steps: 6, batch: 2, rate: 0.05, seed: 3, validation: 34%"
INSERTED = f"corrupt longer {{ insert {COUNT} tokens after last token }}"
DRAWN = f"""
images drawn {{
  label in ["circle", "square", "cross"]
  image shapes(n: 1, kind: label, size: 24)
  answer "{{label}}"
  wrong "ring"
  {INSERTED}
}}
"""
MEASURE = "logit(answer) - 0.5 * logit(wrong)"


def write(
    folder: Path, *, on: str = "images drawn", options: str = QUICK, at: str = "embed"
) -> Path:
    support.write_images(folder)
    blocks = support.BLOCKS.replace("  wrong ", f"  {INSERTED}\n  wrong ", 1) + DRAWN
    trained = (
        f"direction v = fit(soft_prompt(tokens: {COUNT}), prompts: longer of scenes, "
        f"maximise: {MEASURE}, {options}) at {at} at inserted tokens\n"
    )
    lines = (on, "from clean into longer", f"set {at} at inserted tokens to v")
    used = support.experiment("e", *lines).replace("  images scenes\n", "", 1)
    path = folder / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{blocks}{trained}{used}')
    return path


def train(path: Path, name: str) -> tuple[Tensor, SoftPromptReport]:
    (found,) = mechdsl.fit(path, {"m": support.handed(name)}, store=path.parent / "store")
    assert isinstance(found.report, SoftPromptReport)
    saved = load_file(found.folder / "vector.safetensors")
    return torch.stack([saved[f"vector.position{n}"] for n in range(COUNT)]), found.report


def value(name: str, number: int, vectors: Tensor) -> Tensor:
    """The measure of one image with vectors after its patches."""
    with appended(name, vectors):
        output = support.double(name)(**support.inputs(name, support.pixels(name, number)))
    answer, wrong = (LABELS.index(each[number]) for each in (ANSWERS, WRONG))
    return output.logits[0, answer] - 0.5 * output.logits[0, wrong]


def embeddings(name: str) -> Tensor:
    """[token, width] of all images, without positions at the patches."""
    return torch.cat([support.plain(name, n).sites["embed", 0][:, 0] for n in range(len(ANSWERS))])


def rescaled(vectors: Tensor, lengths: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1)[:, None] * lengths[:, None]


def draw(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(stable_hash(3, seed) % 2**63)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2_with_registers"])
def test_training_equals_manual_loop(name: str, tmp_path: Path) -> None:
    own, said = train(write(tmp_path), name)
    every = embeddings(name)
    length, width = float(every.norm(dim=1).mean()), every.shape[1]
    assert said.site_length == pytest.approx(length, rel=1e-4)
    unit = length / width**0.5
    start = torch.randn(COUNT, width, generator=draw("weights"), dtype=torch.float64)
    start = rescaled(start, torch.full((COUNT,), length, dtype=torch.float64))
    rows = _rows_of(name, own.double(), said)
    held_out, *trained = rows
    numbers = torch.zeros_like(start)
    first, second = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(6):
        random = torch.Generator().manual_seed(stable_hash(3, "order", step) % 2**63)
        batch = [trained[n] for n in torch.randperm(2, generator=random)[:2].tolist()]
        leaf = numbers.clone().requires_grad_()
        values = [value(name, row, start + unit * leaf) for row in batch]
        (slope,) = torch.autograd.grad(-torch.stack(values).mean(), leaf)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        size = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        rate = 0.05 * min(1.0, (1 - step / 6) / 0.2)
        numbers = numbers - rate * first / (1 - 0.9 ** (step + 1)) / size
    expected = start + unit * numbers
    assert torch.allclose(own.double(), expected, atol=2e-3 * float(expected.norm()))
    assert (expected - start).norm() > 0.1 * expected.norm()
    with torch.no_grad():
        lengths = own.double().norm(dim=1)
        random = draw("random vectors")
        drawn = [torch.randn(own.shape, generator=random, dtype=torch.float64) for _ in range(8)]
        randoms = [value(name, held_out, rescaled(each, lengths)).item() for each in drawn]
        none = value(name, held_out, torch.zeros(COUNT, width, dtype=torch.float64)).item()
        clean = value(name, held_out, torch.zeros(0, width, dtype=torch.float64)).item()
        assert said.random == pytest.approx(np.mean(randoms), abs=1e-3)
        assert said.untrained == pytest.approx(value(name, held_out, start).item(), abs=1e-3)
        assert said.placeholders == pytest.approx(none, abs=1e-3)
        assert said.clean == pytest.approx(clean, abs=1e-3)


def _rows_of(name: str, vectors: Tensor, said: SoftPromptReport) -> list[int]:
    """The held-out row, identified by the report's value, and the others."""
    assert (said.rows, said.held_out_rows) == (2, 1)
    with torch.no_grad():
        values = [value(name, n, vectors).item() for n in range(len(ANSWERS))]
    away = [abs(each - said.trained) for each in values]
    held_out = int(np.argmin(away))
    assert away[held_out] < 1e-3
    return [held_out, *(n for n in range(len(ANSWERS)) if n != held_out)]


def test_training_at_the_input_of_a_layer_improves_the_measure(tmp_path: Path) -> None:
    options = "steps: 40, batch: 3, rate: 0.1, validation: 0%"
    own, said = train(write(tmp_path, options=options, at="resid_pre layer 1"), "vit")
    assert said.untrained is not None
    assert said.trained > max(said.random, said.placeholders, said.untrained) + 0.5
    assert not torch.allclose(own[0], own[1])


def test_experiment_on_training_images_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, on="images scenes")
    with pytest.raises(mechdsl.MechdslError, match="measures rows that `v` is trained on"):
        mechdsl.run(path, {"m": support.handed("vit")}, store=tmp_path / "store")


def test_soft_prompt_key_depends_on_the_number_of_tokens(tmp_path: Path) -> None:
    path = write(tmp_path)
    train(path, "vit")
    path.write_text(
        path.read_text()
        .replace(f"insert {COUNT} tokens", "insert 1 tokens")
        .replace(f"soft_prompt(tokens: {COUNT})", "soft_prompt(tokens: 1)")
    )
    (found,) = mechdsl.fit(path, {"m": support.handed("vit")}, store=tmp_path / "store")
    assert found.seconds
