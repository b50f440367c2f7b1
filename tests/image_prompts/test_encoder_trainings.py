"""Trainings by an effect in TrOCR and Whisper, whose encoder reads an image or a sound, against
autograd and plain hooks on the bare model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute.objective_rows import ObjectiveRows
from mechdsl.pipeline.trained_files import fits_of_file

from ..execute.encoder_decoders import Write, changed
from ..execute.support import as_in_the_data, context
from ..quick import in_turn
from . import test_encoded_images as images
from . import test_sounds as sounds
from .support import experiment

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

READERS: dict[str, tuple[Any, str, str, int]] = {
    "trocr": (images, "vit", "photo row 1 col 2 token", images.patch("vit", 1, 2)),
    "whisper": (sounds, "multilingual", "a frame 3 token", 2),
}
"""The test module of a model, its name there, a position of the prompt, and its token."""

SITES = ("resid_post encoder", "attn_out cross", "mlp_out")
OPTIONS = (
    "prompts: ask, steps: 3, batch: 2, rate: 0.3, validation: 0%, measure_on_training_rows: true, "
    "maximise: logit(answer) - logit(wrong)"
)


def write_file(folder: Path, reader: str, text: str) -> Path:
    module = READERS[reader][0]
    module.write_data(folder)
    path = folder / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{module.BLOCK}\n{text}', "utf-8")
    return path


def place_of(reader: str, site: str) -> tuple[str, int, Any]:
    """The position of a site as the file names it, its token, and the module."""
    module, name, at, token = READERS[reader]
    own = module.place(site, 1)
    if site == "resid_post encoder":
        return at, token, own
    starts = 1 if reader == "trocr" else len(sounds.STARTS[name])
    return "last token", starts - 1, own


def run_with_gradients(reader: str, n: int, write: Write) -> Tensor:
    """The measure of one prompt, as a tensor of autograd."""
    module, name, *_ = READERS[reader]
    with torch.enable_grad(), changed(module.bare(name), [write]):
        if reader == "trocr":
            given = {"pixel_values": images.pixels(name, n)}
            ids = [images.START]
        else:
            given, ids = {"input_features": sounds.features(n)}, list(sounds.STARTS[name])
        found = module.bare(name)(decoder_input_ids=torch.tensor([ids]), use_cache=False, **given)
    answer, wrong = (module.token(str(module.RECORDS[n][key])) for key in ("n", "m"))
    return found.logits[0, -1, answer] - found.logits[0, -1, wrong]


@pytest.mark.parametrize(("reader", "site"), in_turn(list(READERS), SITES))
def test_loss_and_gradient_of_a_vector_equal_autograd(
    reader: str, site: str, tmp_path: Path
) -> None:
    at, token, own = place_of(reader, site)
    module, name, *_ = READERS[reader]
    lines = f"direction d = fit(vector, {OPTIONS}) at {site} layer 1 at {at}\n"
    lines += experiment("e", f"add d to {site} layer 1 at {at}")
    path, model = write_file(tmp_path, reader, lines), module.loaded(name)
    source = Source(path.read_text("utf-8"), path)
    checked = check_source(source, models={"m": context(source, "m", model)})
    assert not has_errors(checked.diagnostics), checked.diagnostics
    (fit,) = fits_of_file(checked).values()
    assert fit.objective is not None
    rows = ObjectiveRows(fit.training, fit.objective, model, None)
    ids = fit.objective.table.row_ids
    random = torch.Generator().manual_seed(5)
    start = 0.3 * torch.randn(rows.first_vectors.shape[1], generator=random)
    mine, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    with torch.enable_grad():
        values = rows.values(np.arange(len(ids)), lambda own, other: own + mine)
        wanted = torch.stack(
            [run_with_gradients(reader, n, (own, [token], lambda old: old + theirs)) for n in ids]
        )
        (slope,) = torch.autograd.grad(values.mean(), mine)
        (expected,) = torch.autograd.grad(wanted.mean(), theirs)
    np.testing.assert_allclose(values.detach(), wanted.detach(), atol=1e-4)
    np.testing.assert_allclose(slope, expected, atol=2e-5, rtol=1e-3)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("reader", READERS)
def test_trained_rotation_acts_as_hooks(reader: str, tmp_path: Path) -> None:
    """At the encoder, with the images or sounds of both runs."""
    site = "resid_post encoder"
    at, token, own = place_of(reader, site)
    module, name, *_ = READERS[reader]
    lines = f"basis d = fit(das(dims: 2), {OPTIONS}, from: changed) at {site} layer 1 at {at}\n"
    rule = f"patch {site} layer 1 in basis d at {at}"
    lines += experiment("e", "from changed into clean", rule)
    path = write_file(tmp_path, reader, lines)
    prepared = images.processor(name) if reader == "trocr" else sounds.processor()
    models = {"m": (module.bare(name), prepared)}
    [trained] = mechdsl.fit(path, models, store=tmp_path / "store")
    [found] = map(as_in_the_data, mechdsl.run(path, models, store=tmp_path / "store"))
    rotation = load_file(next(trained.folder.glob("*.safetensors")))["rotation"]
    values = []
    for n in range(len(module.RECORDS)):
        old, new = (module.read(name, each, own)[[token]] for each in (n, module.other(n)))
        written = old + (new - old) @ rotation.T @ rotation
        write = own, [token], lambda _, written=written: written
        values.append(module.difference(name, n, n, [write]))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=3e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.01


@pytest.mark.parametrize("reader", READERS)
def test_logit_lens_of_a_decoder_equals_its_unembedding(reader: str, tmp_path: Path) -> None:
    """Whisper's decoder has a final norm, and TrOCR's has none."""
    module, name, *_ = READERS[reader]
    lens = "observe logit_lens resid_post layer * at last token"
    lines = experiment("e", lens, measure="measure logit(answer) as raw")
    path = write_file(tmp_path, reader, lines)
    prepared = images.processor(name) if reader == "trocr" else sounds.processor()
    models = {"m": (module.bare(name), prepared)}
    [found] = map(as_in_the_data, mechdsl.run(path, models, store=tmp_path / "store"))
    values = np.zeros_like(found.measures[0].patched)
    for layer in range(module.LAYERS):
        for n, record in enumerate(module.RECORDS):
            vector = module.read(name, n, module.place("resid_post", layer))[-1]
            with torch.no_grad():
                if reader == "trocr":
                    logits = module.bare(name).decoder.output_projection(vector)
                else:
                    normed = module.bare(name).model.decoder.layer_norm(vector)
                    logits = module.bare(name).proj_out(normed)
            values[layer, n] = logits[module.token(str(record["n"]))]
    np.testing.assert_allclose(found.measures[0].patched, values, atol=2e-4)
    assert np.ptp(values) > 0.1
