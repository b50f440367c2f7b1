"""Runs of files with images: models in folders, the store, and `explain`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.rendering import MechdslError
from mechdsl.show.prompts import print_prompts

from . import support

FILE = """\
mech 1
model vit = local("vit")
images scenes {
  rows "data.jsonl"
  image "{file}"
  answer "{label}"
  wrong "{other}"
}
images neutral { image gray }
experiment caap {
  model vit
  from scenes into neutral
  images scenes
  patch resid_post layers 0..1 at each token of image
  measure logit(answer) - logit(wrong) as delta
}
experiment apart {
  model vit
  images scenes
  ablate embed at image row 1..2 col * tokens with zero
  measure prob(answer) as delta
  expect mean(delta) < 1
}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    support.write_images(tmp_path)
    support.bare("vit").save_pretrained(tmp_path / "vit")
    support.processor("vit").save_pretrained(tmp_path / "vit")
    (tmp_path / "file.mech").write_text(FILE, encoding="utf-8")
    return tmp_path


def values(folder: Path, **how: object) -> np.ndarray:
    """Effects of the patches, [cell, prompt]."""
    results = mechdsl.run(folder / "file.mech", **how)  # type: ignore[arg-type]
    measure = results["caap"].measures[0]
    return measure.patched - measure.base


@pytest.mark.slow
def test_image_model_in_a_folder_equals_the_one_passed_from_python(folder: Path) -> None:
    own = values(folder, store=False)
    handed = {"vit": (support.bare("vit"), support.processor("vit"))}
    np.testing.assert_allclose(own, values(folder, models=handed, store=False), atol=1e-5)
    assert np.abs(own).max() > 0.05


def test_store_key_depends_on_image_content(folder: Path) -> None:
    store = folder / "store"
    before = values(folder, store=store)
    np.testing.assert_array_equal(values(folder, store=store), before)
    Image.fromarray(255 - support.image(1)).save(folder / "1.png")
    fresh = values(folder, store=False)
    assert np.abs(fresh - before).max() > 0.01
    np.testing.assert_allclose(values(folder, store=store), fresh, atol=1e-6)


def test_store_key_depends_on_image_processing(folder: Path) -> None:
    store = folder / "store"
    before = values(folder, store=store)
    path = folder / "vit" / "preprocessor_config.json"
    config = json.loads(path.read_text())
    config["image_mean"] = [0.1, 0.2, 0.9]
    path.write_text(json.dumps(config))
    fresh = values(folder, store=False)
    assert np.abs(fresh - before).max() > 0.01
    np.testing.assert_allclose(values(folder, store=store), fresh, atol=1e-6)


def test_damaged_image_file_is_rejected_before_the_run(folder: Path) -> None:
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    with pytest.raises(MechdslError) as refused:
        mechdsl.run(folder / "file.mech", store=False)
    assert [d.code for d in refused.value.diagnostics] == ["E0560"]


def test_untrusted_file_cannot_read_images_outside_its_folder(folder: Path) -> None:
    outside = folder.parent / "outside.png"
    Image.fromarray(support.image(0)).save(outside)
    text = (folder / "data.jsonl").read_text().replace("0.png", "../outside.png")
    (folder / "data.jsonl").write_text(text)
    assert not mechdsl.validate(folder / "file.mech").errors
    found = mechdsl.validate(folder / "file.mech", untrusted=True)
    assert "E0535" in [d.code for d in found.errors]
    assert "W0780" in [d.code for d in found.warnings]


def test_explain_shows_image_tokens_and_patch_positions(folder: Path) -> None:
    checked = check_source(Source(FILE, folder / "file.mech"))
    out = io.StringIO()
    print_prompts(checked, Console(file=out, width=100))
    shown = out.getvalue()
    assert "4 x 4 patches" in shown
    assert "image → 1..16" in shown
    assert "cls → 0" in shown
    assert "\n    ■■■■\n    ■■■■\n    ····\n    ····\n" in shown
    assert "image 3" not in shown  # image tokens aren't shown as numbers
