"""Texts scored with images by models with two towers: measures against plain hooks on the bare
model, one image and one text at a time, in fp64; store keys and errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mechdsl
from mechdsl.diagnostics.rendering import MechdslError
from mechdsl.loading import anatomy_proof
from mechdsl.results.experiment_result import ExperimentResult

from ..rules.support import agree
from . import duals, support, texts
from .support import LAYERS, save
from .texts import TextView, forward
from .views import PART

BLOCKS = support.BLOCKS + texts.BLOCKS


def run(folder: Path, name: str, *lines: str, blocks: str = BLOCKS) -> ExperimentResult:
    texts.write(folder)
    text = TextView(name, 0, "own").experiment("e", *lines)
    return support.run_file(text, folder, name, blocks=blocks)["e"]


@pytest.mark.slow
def test_eos_token_is_the_largest_id_if_the_config_has_none(tmp_path: Path) -> None:
    line = "patch resid_post layer * at thing tokens"
    found = run(tmp_path, duals.OLD, "from clean into changed", line)
    every = [TextView(duals.OLD, n, "gray") for n in range(3)]
    expected = {
        (layer,): [v.value(v.run(v.copy("resid_post", layer, PART))) for v in every]
        for layer in range(LAYERS)
    }
    agree(found, ("layer",), expected, np.array([v.value(v.start) for v in every]))


@pytest.mark.parametrize("name", ["clip/dual", "siglip/dual"])
def test_texts_scored_with_one_image_equal_hooks(name: str, tmp_path: Path) -> None:
    blocks = BLOCKS.replace("image from scenes", "image from neutral")
    found = run(
        tmp_path, name, "ablate mlp_out layers 0..1 at thing tokens with zero", blocks=blocks
    )
    acts = [TextView(name, n, "own").make("mlp_out", (0, 1), PART, 0.0) for n in range(3)]
    expected = [float(forward(name, n, None, own).output) for n, own in enumerate(acts)]
    base = np.array([float(forward(name, n, None).output) for n in range(3)])
    agree(found, (), {(): expected}, base, most=False)


@pytest.mark.parametrize(("name", "at_once"), [("clip/dual", 2), ("siglip/dual", 16)])
def test_metrics_of_texts_compare_all_images_of_the_block(
    name: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of rows that aren't run are included."""
    monkeypatch.setattr(anatomy_proof, "_IMAGES_PER_PASS", at_once)
    texts.write(tmp_path)
    measures = ("rank(image)", "correct", "score(image)", "prob(image)")
    written = [
        f"experiment e{n} {{ model m\n prompts captions\n measure {each} as raw }}\n"
        for n, each in enumerate(measures)
    ]
    blocks = BLOCKS.replace("  corrupt", '  where thing != "red square"\n  corrupt')
    found = support.run_file("".join(written), tmp_path, name, blocks=blocks)
    said = found["e0"].conventions
    assert said["images"] == "`scenes`: 3, each encoded once by the image tower, where no rule acts"
    assert said["classes"].startswith("3 images: `0.png #")
    assert found["e2"].conventions["images"].startswith("`scenes`: 2, each")
    assert "classes" not in found["e2"].conventions
    scores = np.array([[float(forward(name, n, i).output) for i in range(3)] for n in range(3)])
    scores = scores[[0, 2]]
    own = scores[[0, 1], [0, 2]]
    softmax = np.exp(own) / np.exp(scores).sum(1)
    expected = [
        1 + (scores > own[:, None]).sum(1),
        (scores.argmax(1) == [0, 2]).astype(float),
        own,
        1 / (1 + np.exp(-own)) if name in duals.PADDED else softmax,
    ]
    for n, values in enumerate(expected):
        np.testing.assert_allclose(found[f"e{n}"].measures[0].patched[0], values, atol=2e-4)
    assert (scores[:, 1] > own).any(), "the image that no row has is never the better one"


def test_keep_and_expect_of_texts_use_ranks_among_all_images(tmp_path: Path) -> None:
    """The measure uses only the score with the row's own image."""
    texts.write(tmp_path)
    line = "ablate resid_post layer 0 at thing tokens with zero"
    view = TextView("siglip/dual", 0, "own")
    text = view.experiment("kept", line, "keep rank(image) < 2")
    text += view.experiment("expected", line, "expect accuracy(clean) < 1")
    found = support.run_file(text, tmp_path, "siglip/dual", blocks=BLOCKS)
    scores = [[float(forward("siglip/dual", n, i).output) for i in range(3)] for n in range(3)]
    first = [max(row) == row[n] for n, row in enumerate(scores)]
    assert 0 < sum(first) < 3
    assert len(found["kept"].row_ids) == sum(first)
    assert found["expected"].outcomes[0].value == pytest.approx(np.mean(first))


FILE = """\
mech 1
model clip = local("clip")
BLOCKS
experiment e {
  model clip
  prompts captions
  from clean into changed
  patch resid_post layer 0 at thing tokens
  measure score as delta
  measure rank(image) as raw
}
"""


def write(folder: Path, blocks: str = BLOCKS) -> Path:
    support.write_images(folder)
    texts.write(folder)
    save("clip/dual", folder)
    (folder / "file.mech").write_text(FILE.replace("BLOCKS", blocks), encoding="utf-8")
    return folder / "file.mech"


def values(path: Path, **how: object) -> np.ndarray:
    results = mechdsl.run(path, **how)  # type: ignore[arg-type]
    return results["e"].measures[0].patched


def test_store_key_depends_on_the_scored_images(tmp_path: Path) -> None:
    from PIL import Image

    store = tmp_path / "store"
    path = write(tmp_path)
    before = values(path, store=store)
    np.testing.assert_array_equal(values(path, store=store), before)
    handed = {"clip": support.handed("clip/dual")}
    np.testing.assert_allclose(values(path, models=handed, store=False), before, atol=1e-5)
    Image.fromarray(255 - support.image(1)).save(tmp_path / "1.png")
    fresh = values(path, store=False)
    assert np.abs(fresh - before).max() > 0.01
    np.testing.assert_allclose(values(path, store=store), fresh, atol=1e-5)


def test_store_key_depends_on_images_of_filtered_rows(tmp_path: Path) -> None:
    from PIL import Image

    def chosen(**how: object) -> np.ndarray:
        return mechdsl.run(path, **how)["e"].measures[0].patched  # type: ignore[arg-type]

    path = write(tmp_path, BLOCKS.replace("  corrupt", '  where thing != "red square"\n  corrupt'))
    path.write_text(path.read_text().replace("score as delta", "prob(image) as raw"))
    before = chosen(store=tmp_path / "store")
    Image.fromarray(255 - support.image(1)).save(tmp_path / "1.png")
    fresh = chosen(store=False)
    assert np.abs(fresh - before).max() > 1e-3
    np.testing.assert_allclose(chosen(store=tmp_path / "store"), fresh, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "codes"),
    [
        ("  image from scenes\n", "", ["E0207"]),
        ("image from scenes", "image from scene", ["E0201"]),
        ("image from scenes", "image from captions", ["E0207"]),
        ('template "{before}', 'template "{image} {before}', ["E0207", "E0501"]),
        ("resid_post layer 0", "resid_post vision layer 0", ["E0207"]),
    ],
)
def test_invalid_use_of_images_in_prompts_is_rejected(
    old: str, new: str, codes: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace(old, new), encoding="utf-8")
    with pytest.raises(MechdslError) as refused:
        mechdsl.run(path, store=False)
    assert [e.code for e in refused.value.diagnostics if e.severity == "error"] == codes
