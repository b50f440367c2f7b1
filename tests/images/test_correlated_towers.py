"""Components of one tower that correlate with vectors of the other: `fit(cca(…), with: SITE of
BLOCK)`, against plain hooks on the bare model, one image and one text at a time, in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.linalg import eigh

import mechdsl

from ..quick import in_turn
from . import support, texts
from .views import View

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
RIDGE = 0.2
LOOSE = "validation: 0%, measure_on_training_rows: true"
TRAINER = f"fit(cca(components: 1, ridge: {RIDGE}), prompts"
IMAGES, TEXTS = "image row 2 col 3 token", "token 1"
BASES = {
    "vision": f"{TRAINER}: scenes, {LOOSE}, with: resid_post text layer 0 of captions at {TEXTS})"
    f" at resid_post vision layer 1 at {IMAGES}",
    "text": f"{TRAINER}: captions, {LOOSE}, with: resid_post vision layer 1 of scenes at {IMAGES})"
    f" at resid_post text layer 0 at {TEXTS}",
}
USES = {
    "vision": support.experiment(
        "e", f"ablate feature 0 of f at {IMAGES} with zero", measure=support.OF_SCORES
    ),
    "text": "experiment e {\n  model m\n  prompts captions\n"
    f"  ablate feature 0 of f at {TEXTS} with zero\n  measure score as delta\n"
    f"  {support.STATS}\n}}\n",
}


def write(folder: Path, basis: str, used: str, blocks: str = texts.BLOCKS) -> Path:
    support.write_images(folder)
    texts.write(folder)
    path = folder / "file.mech"
    parts = ('mech 1\nmodel m = local("handed over")', support.OF_TEXTS, blocks)
    path.write_text("\n".join((*parts, f"basis f = {basis}", used)), "utf-8")
    return path


def vectors(name: str) -> dict[str, NDArray[np.float64]]:
    """[row, width] of each tower."""
    views = [View(name, number, "own") for number in range(3)]
    seen = [view.start.sites["resid_post", 1][view.at(IMAGES)] for view in views]
    read = [texts.plain(name, number, False).sites["resid_post", 0][1] for number in range(3)]
    return {
        "vision": torch.cat(seen).flatten(1).double().numpy(),
        "text": torch.cat(read).double().numpy(),
    }


def first_encoder(x: Any, y: Any) -> Any:
    """The first canonical direction of x, from the generalised eigenvalue problem."""
    first, second = (each.T @ each / len(each) for each in (x, y))
    first, second = (
        each + RIDGE * np.trace(each) / len(each) * np.eye(len(each)) for each in (first, second)
    )
    cross = x.T @ y / len(x)
    return eigh(cross @ np.linalg.solve(second, cross.T), first)[1][:, -1]


@pytest.mark.parametrize(
    ("name", "tower"), in_turn(["clip/dual", "siglip/dual"], ["vision", "text"], ["clip/dual"])
)
def test_cca_components_of_two_towers_equal_reference(
    name: str, tower: str, tmp_path: Path
) -> None:
    path = write(tmp_path, BASES[tower], USES[tower])
    handed = {"m": support.handed(name)}
    (found,) = mechdsl.fit(path, handed, store=tmp_path / "store")
    report: Any = found.report
    own, other = vectors(name)[tower], vectors(name)["text" if tower == "vision" else "vision"]
    x, y = own - own.mean(0), other - other.mean(0)
    mine, theirs = first_encoder(x, y), first_encoder(y, x)
    encoder = load_file(found.folder / "sae_weights.safetensors")["W_enc"][:, 0].double().numpy()
    coordinates = x @ encoder
    assert abs(np.corrcoef(x @ mine, coordinates)[0, 1]) == pytest.approx(1, abs=1e-4)
    assert report.training == pytest.approx(abs(np.corrcoef(x @ mine, y @ theirs)[0, 1]), abs=1e-3)
    (ran,) = mechdsl.run(path, handed, store=tmp_path / "store").files[0].experiments
    assert "of captions at token 1" in ran.conventions["basis f"] or tower == "text"
    assert np.isfinite(ran.measures[0].patched).all()


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({" of captions": ""}, "E0207", "isn't the tower that rules act in here"),
        ({"text layer 0": "vision layer 0"}, "E0207", "isn't the tower that rules act in here"),
        ({f"at {TEXTS}": "at cls token"}, "E0313", "captions"),
        ({"of captions": "of nothing"}, "E0201", "nothing"),
        ({"components: 1": "components: 99"}, "E0342", "write at most `components: "),
        ({f"at {TEXTS}": "at tokens 0..1"}, "E0342", "2 tokens"),
    ],
)
def test_invalid_second_site_of_cca_is_rejected(
    changes: dict[str, str], code: str, text: str, tmp_path: Path
) -> None:
    basis = BASES["vision"]
    for old, new in changes.items():
        assert old in basis
        basis = basis.replace(old, new)
    handed = {"m": support.handed("clip/dual")}
    problems = mechdsl.validate(write(tmp_path, basis, USES["vision"]), handed)
    assert problems[0].code.startswith(code), problems
    assert text in str(problems[0])


def test_cca_key_depends_on_texts_and_second_site(tmp_path: Path) -> None:
    handed = {"m": support.handed("clip/dual")}
    folders: set[str] = set()
    for blocks in (texts.BLOCKS, texts.BLOCKS.replace('"{before}', '"{thing} {before}')):
        for layer in ("0", "1"):
            basis = BASES["vision"].replace("text layer 0", f"text layer {layer}")
            path = write(tmp_path, basis, USES["vision"], blocks)
            (found,) = mechdsl.fit(path, handed, store=tmp_path / "store")
            folders.add(found.folder.name)
    assert len(folders) == 4
