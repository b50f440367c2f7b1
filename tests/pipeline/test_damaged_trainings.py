"""A damaged file of a stored training: the training is run again, and no result changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.pipeline.options import RunOptions
from mechdsl.pipeline.trained_files import attach_fits, fits_of_file

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

HEAD = """mech 1
seed 3
model toy = zoo("counting")
prompts p {
  x in ["apple", "pear", "plum", "fig", "kiwi"]
  n in 1..6
  template "Part 1: {x} {x} plum Count {n}:"
  answer " 1"
  corrupt fewer { n = n + 1 }
  split 70%
}
"""

ROWS = "prompts: p.train, limit: 8"

STEPS = f"{ROWS}, steps: 4, batch: 8"

EFFECT = f"{ROWS}, from: fewer, maximise: logit(answer), steps: 2"

SCORED = f"{ROWS}, from: fewer, maximise: logit(answer)"

ACROSS = "cross_layer_transcoder(features: 8, k: 2)"

TRAININGS = f"""
basis sparse = fit(sae(features: 32, k: 4), {STEPS}) at resid_post layer 1 at tokens *
basis across = fit({ACROSS}, {STEPS}) at mlp_out layer * at tokens *
basis turned = fit(das(dims: 2), {EFFECT}) at resid_post layer 1 at last token
direction moved = fit(vector(length: 2), {STEPS}, maximise: logit(answer)) at resid_post layer 1
lens tuned = fit(tuned_lens, {STEPS}) at resid_post layer 1 at tokens *
probe told = fit(ridge, {ROWS}, target: n) at resid_post layer 1 at last token
group heads_of = fit(mask(size: 2), {EFFECT}) at layers * heads * at last token
group scored = fit(atp(size: 2), {SCORED}) at layers * heads * at last token
"""

RULES = {
    "sparse": "set resid_post layer 1 at last token to reconstruction of sparse",
    "across": "observe value mlp_out layer * feature * of across at last token as act",
    "turned": "from fewer into clean\n  patch resid_post layer 1 in basis turned at last token",
    "moved": "add 1 * moved to resid_post layer 1 at last token",
    "tuned": "observe tuned_lens(tuned) resid_post layer 1 at last token as seen",
    "told": "observe probe(told) resid_post layer 1 at last token as read",
    "heads_of": "ablate heads_of at last token with zero",
    "scored": "ablate scored at last token with zero",
}

MEASURE = "\n  measure logit(answer) as delta"

TEXT = (
    HEAD
    + TRAININGS
    + "".join(
        f"experiment e_{name} {{\n  prompts p.test limit 3\n  {rule}"
        f"{MEASURE if 'observe' not in rule else ''}\n}}\n"
        for name, rule in RULES.items()
    )
)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 0x40
    path.write_bytes(content)


def _edit_card(path: Path) -> None:
    text = path.read_text("utf-8")
    digits = [place for place, character in enumerate(text) if character in "12345678"]
    place = digits[len(digits) // 2]
    path.write_text(text[:place] + str(int(text[place]) + 1) + text[place + 1 :], "utf-8")


def _repeat_key(path: Path) -> None:
    (name, value), *_ = json.loads(path.read_text("utf-8")).items()
    text = path.read_text("utf-8").strip()
    path.write_text(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(value)}}}", "utf-8")


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "bit": ("*", _flip),
    "truncation": ("*", lambda path: path.write_bytes(path.read_bytes()[:-16])),
    "edit": ("*.json", _edit_card),
    "missing": ("*", Path.unlink),
    "key": ("*.json", _repeat_key),
}


def values(results: mechdsl.Results) -> dict[str, Any]:
    """The numbers of each measure, by experiment."""
    return {
        f"{own.name} {number}": np.asarray(measure.patched)
        for own in results
        for number, measure in enumerate(own.measures)
    }


def damage(store: Path, number: int, pattern: str, change: Callable[[Path], None]) -> int:
    """Change one file of each training; return how many trainings have a file of this number."""
    changed = 0
    for folder in sorted((store / "fits").iterdir()):
        files = [path for path in sorted(folder.rglob(pattern)) if path.is_file()]
        if number < len(files):
            change(files[number])
            changed += 1
    return changed


def test_damaged_file_of_any_training_is_trained_again(tmp_path: Path) -> None:
    path, store, kept = tmp_path / "file.mech", tmp_path / "store", tmp_path / "kept"
    path.write_text(TEXT, "utf-8")
    first = mechdsl.run(path, store=store, fit=True)
    assert first.complete
    expected = values(first)
    checked, options = check_source(Source(TEXT, path)), RunOptions(store=store)
    shutil.copytree(store / "fits", kept)
    for name, (pattern, change) in DAMAGES.items():
        for number in range(40):
            changed = damage(store, number, pattern, change)
            if not changed:
                break
            fits = fits_of_file(attach_fits(checked, options)).values()
            damaged = {fit.training.definition for fit in fits if not fit.file.is_trained}
            assert len(damaged) == changed, f"{name}, file {number}: {damaged}"
            shutil.rmtree(store / "fits")
            shutil.copytree(kept, store / "fits")
    assert damage(store, 0, "*", lambda path: path.write_bytes(path.read_bytes()[:-1])) == len(
        RULES
    )
    shutil.rmtree(store / "blobs")  # no run is reused
    again = values(mechdsl.run(path, store=store, fit=True))
    assert again.keys() == expected.keys()
    for measure, numbers in expected.items():
        np.testing.assert_array_equal(again[measure], numbers, err_msg=measure)
    for folder in kept.iterdir():
        for file in folder.rglob("*.safetensors"):
            healed = store / "fits" / file.relative_to(kept)
            assert healed.read_bytes() == file.read_bytes(), file.name
