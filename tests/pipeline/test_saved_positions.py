"""Groups of positions in files: `group g = saved("mask.json")` of a training that chose positions.

Rules with them equal rules with the same positions listed, whose values other tests compare with
plain hooks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl

from ..quick import some
from .test_trained_dictionaries import experiment, run, train, write
from .test_trained_position_masks import CASES, fit
from .test_trained_rotations import training_errors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
READ = 'group g = saved("out/g/mask.json")\n'
SITE = "resid_post layer 1"
USE = experiment(f"ablate {SITE} at g tokens with zero", block="p")
QUICK = "steps: 3, batch: 2, validation: 25%, measure_on_training_rows: true"


def chosen(folder: Path, case: str = "spans", mask: str = "size: 1") -> tuple[Path, list[str]]:
    """Train a group of positions, and return its file and its positions."""
    site, places, _ = CASES[case]
    path = write(folder, fit(QUICK, mask=mask, at=f"{site} at {places}"), USE)
    train(path, out=folder / "out")
    file = folder / "out" / "g" / "mask.json"
    content = json.loads(file.read_text("utf-8"))
    return file, [CASES[case][2][number] for number in content["chosen"]]


def values(path: Path, **options: Any) -> Any:
    (own,) = run(path, **options).files[0].experiments
    return own


@pytest.mark.parametrize("case", some(list(CASES), ["joined"]))
def test_positions_of_a_file_equal_listed_positions(case: str, tmp_path: Path) -> None:
    _, places = chosen(tmp_path, case)
    line = f"ablate {SITE} at {{}} with zero"
    use = experiment(line.format("g tokens"), block="p")
    found = values(write(tmp_path, READ, use), store=False)
    listed = experiment(line.format(", ".join(places)), block="p")
    expected = values(write(tmp_path, listed), store=False)
    own, other = (each.measures[0].patched for each in (found, expected))
    np.testing.assert_array_equal(own, other)
    assert np.nanmax(np.abs(own - found.measures[0].base)) > 1e-4
    trained = fit(QUICK, mask="size: 1", at=" at ".join(CASES[case][:2]))
    again = values(write(tmp_path, trained, use))
    np.testing.assert_array_equal(own, again.measures[0].patched)


def test_each_position_of_a_file_is_a_cell(tmp_path: Path) -> None:
    _, places = chosen(tmp_path, "heads", "size: 2")
    line = f"ablate {SITE} at {{}} with zero"
    each = experiment(line.format("each g token"), block="p")
    found = values(write(tmp_path, READ, each), store=False)
    listed = experiment(line.format(", ".join(places)), block="p")
    expected = values(write(tmp_path, listed), store=False)
    own, other = (each.measures[0].patched for each in (found, expected))
    assert len(own) == 2
    np.testing.assert_array_equal(own, other)


def test_convention_names_the_file_and_the_positions(tmp_path: Path) -> None:
    _, places = chosen(tmp_path)
    said = values(write(tmp_path, READ, USE), store=False).conventions["group g"]
    assert said.startswith(f"1 of 2 positions of out/g/mask.json: {places[0]}; SHA-256 ")
    assert "; chosen on 4 prompts" in said


def test_stored_values_depend_on_the_chosen_positions(tmp_path: Path) -> None:
    file, _ = chosen(tmp_path)
    content = json.loads(file.read_text("utf-8"))
    path = write(tmp_path, READ, USE)
    first = values(path).measures[0].patched
    np.testing.assert_array_equal(values(path).measures[0].patched, first)
    (number,) = content["chosen"]
    file.write_text(json.dumps({**content, "chosen": [1 - number]}), "utf-8")
    other = values(path).measures[0].patched
    assert np.abs(other - first).max() > 1e-4
    np.testing.assert_array_equal(other, values(path, store=False).measures[0].patched)


def test_training_may_use_positions_of_a_file(tmp_path: Path) -> None:
    _, places = chosen(tmp_path)
    heads = "at layers * heads * at"
    rule = experiment("ablate h at last token with zero")
    call = "group h = fit(atp(size: 2), prompts: p, with: zero, minimise: logit(answer)) "
    own = train(write(tmp_path, READ, f"{call}{heads} g tokens", rule))[-1].folder
    listed = train(write(tmp_path, f"{call}{heads} {places[0]}", rule))[-1].folder
    assert own == listed


def edit(**changes: Any) -> Any:
    return lambda content: {**content, **changes}


WRONG = {
    "without text": (edit(positions=None), READ, "E0342", "without the text of `positions`"),
    "two labels": (
        edit(positions={"at": "cue token", "labels": ["cue token"] * 2}),
        READ,
        "E0342",
        "without the text",
    ),
    "chosen": (edit(chosen=[7]), READ, "E0342", "without the text of `positions`"),
    "negative": (edit(chosen=[-1]), READ, "E0342", "`chosen.0` of"),
    "text": (
        edit(positions={"at": "cue tok", "labels": ["a", "b"]}),
        READ,
        "E0342",
        "which aren't positions",
    ),
    "a second definition": (
        edit(positions={"at": "cue token\ngroup h = L0H1", "labels": ["a", "b"]}),
        READ,
        "E0342",
        "which aren't positions",
    ),
    "parameter": (
        edit(positions={"at": "token k, cue token", "labels": ["a", "b"]}),
        READ,
        "E0342",
        "without a number for `k`",
    ),
    "another span": (
        edit(positions={"at": "verb token, cue token", "labels": ["a", "cue token"]}),
        READ,
        "E0308",
        "no span called `verb`",
    ),
    "label": (
        edit(positions={"at": "token 1, cue token", "labels": ["token 2", "token 3"]}),
        READ,
        "E0310",
        "token",
    ),
    "supernode": (edit(), READ.replace('")', '", "a")'), "E0342", "without supernodes"),
    "basis": (
        edit(),
        f"basis f = pca(p, dims: 2) at {SITE}\n" + READ.replace('")', '", f)'),
        "E0342",
        "without supernodes and bases",
    ),
    "span": (edit(), READ.replace("g =", "cue ="), "E0207", "also a part of the prompts"),
}


@pytest.mark.parametrize("key", WRONG)
def test_mistake_in_a_file_of_positions_is_an_error(key: str, tmp_path: Path) -> None:
    change, line, code, said = WRONG[key]
    content = {
        "sites": [[0], [1]],
        "labels": ["subject", "cue"],
        "scores": [0.5, 0.25],
        "chosen": [0],
        "positions": {"at": "subject tokens, cue token", "labels": ["subject tokens", "cue token"]},
    }
    use = USE.replace("g tokens", "cue tokens") if key == "span" else USE
    path = write(tmp_path, line, use)
    (tmp_path / "out" / "g").mkdir(parents=True)
    file = tmp_path / "out" / "g" / "mask.json"
    file.write_text(json.dumps(change(content)), "utf-8")
    with pytest.raises(mechdsl.MechdslError) as found:
        run(path, store=False)
    errors = [each for each in found.value.diagnostics if each.severity == "error"]
    assert code in {each.code for each in errors}, errors
    assert said in " ".join(f"{each.message} {each.help_text}" for each in errors)


@pytest.mark.parametrize(
    ("rule", "said"),
    [("ablate g at last token with zero", "positions, not sites"), ("nodes", "group of positions")],
)
def test_positions_of_a_file_are_no_sites(rule: str, said: str, tmp_path: Path) -> None:
    chosen(tmp_path)
    circuit = ""
    if rule == "nodes":
        circuit = (
            "circuit c = fit(eap(size: 2), nodes: g, prompts: p, with: zero, minimise: "
            "logit(answer))\n"
        )
        rule = "ablate c at last token with zero"
    errors = training_errors(write(tmp_path, READ, circuit, experiment(rule)))
    assert "E0207" in {each.code for each in errors}
    assert said in " ".join(each.message for each in errors)
