"""Groups of features that `saved("mask.json", f)` reads, against hooks on the bare model and the
training that wrote the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mechdsl
from mechdsl.diagnostics.core import Diagnostic

from ..quick import in_turn
from ..reference.forward import Write
from ..rules.models import bare
from ..rules.support import records, rows, tokens, worked_out
from .test_trained_coordinate_masks import FEATURES, RULES, SITE, sae, weights
from .test_trained_dictionaries import MEASURE, OTHER, experiment, run, train, write
from .test_trained_masks import HERE, fit

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
READ = 'group g = saved("out/g/mask.json", f)\n'
ABLATE = experiment("ablate g at tokens * with zero")


def declare(call: str) -> str:
    """A group that a training chooses from the features of `f`."""
    if call == "mask":
        return fit(at="features * of f at last token")
    rest = "prompts: p, from: other, maximise: logit(answer) - logit(wrong)"
    return f"group g = fit({call}(size: 3), {rest}) at features * of f at last token\n"


def export(folder: Path, basis: str, group: str, *more: str, family: str = "llama") -> Any:
    """Train a group, write its file, and return the run with the trained group."""
    path = write(folder, basis, group, *(more or (ABLATE,)))
    train(path, family, out=folder / "out")
    return run(path, family, fresh=True)


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "g" / "mask.json").read_text("utf-8"))


def read(folder: Path, basis: str, *more: str, group: str = READ, family: str = "llama") -> Any:
    return run(write(folder, basis, group, *(more or (ABLATE,))), family, store=False)


def error_of(folder: Path, basis: str, *more: str, group: str = READ) -> Diagnostic:
    """The only error of a file that reads the group."""
    with pytest.raises(mechdsl.MechdslError) as found:
        read(folder, basis, *more, group=group)
    (error,) = [each for each in found.value.diagnostics if each.severity == "error"]
    return error


def assert_equal(one: Any, other: Any, tolerance: float = 0) -> None:
    pairs = list(zip(one.files[0].experiments, other.files[0].experiments, strict=True))
    assert pairs
    for own, theirs in pairs:
        for mine, each in zip(own.measures, theirs.measures, strict=True):
            np.testing.assert_allclose(mine.patched, each.patched, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("call", "family"), in_turn(["mask", "atp", "forward_selection"], HERE, ["mask", "atp"])
)
def test_saved_features_equal_plain_passes_and_their_training(
    call: str, family: str, tmp_path: Path
) -> None:
    basis = sae(tmp_path, family)
    trained = export(tmp_path, basis, declare(call), family=family)
    file = content(tmp_path)
    chosen = [file["sites"][number][4] for number in file["chosen"]]
    assert 0 < len(chosen) < FEATURES
    found = read(tmp_path, basis, family=family)
    assert_equal(found, trained)
    own = weights(bare(family).config.hidden_size)

    def without(x: Tensor) -> Tensor:
        given = {name: each.to(x.dtype) for name, each in own.items()}
        codes = ((x - given["b_dec"]) @ given["W_enc"] + given["b_enc"]).clamp(min=0)
        return x - codes[..., chosen] @ given["W_dec"][chosen]

    def changes(n: int, _: int) -> Any:
        places = tokens(rows("second")[n], "tokens *")
        return [([Write("resid_post", 1, without, each, 0) for each in places], ())]

    expected = worked_out(family, [(0,)], changes, rows("second"), records("second"))
    patched = found["e"].measures[0].patched
    np.testing.assert_allclose(patched, list(expected.values()), atol=1e-4)
    assert np.abs(patched - found["e"].measures[0].base).max() > 1e-3
    said = found["e"].conventions["group g"]
    assert said.startswith(f"{len(chosen)} of {FEATURES} features of out/g/mask.json: resid_post ")
    assert "feature" in said
    assert " of f" in said
    assert "chosen on 4 prompts" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patch", "mean", "without error", "derived", "replies"])
def test_saved_features_equal_their_training_in_rules(name: str, tmp_path: Path) -> None:
    generates = name == "replies"
    measure = "measure logit(answer) as raw" if generates else MEASURE
    text = experiment(*RULES[name], measure=measure) + OTHER
    basis = sae(tmp_path)
    trained, found = export(tmp_path, basis, declare("mask"), text), read(tmp_path, basis, text)
    assert_equal(found, trained, 2e-6 if generates else 0)
    file = content(tmp_path)
    numbers = ", ".join(str(file["sites"][number][4]) for number in file["chosen"])
    text = text.replace(" g at ", f" features {numbers} of f at ")
    assert_equal(found, read(tmp_path, basis, text, group=""))


def mlp_weights(width: int) -> dict[str, Tensor]:
    return {name: 0.5 * each for name, each in weights(width).items()}


BASES: Mapping[str, tuple[str, str, str]] = {
    "transcoder": ('transcoder("sae.safetensors")', "mlp_out layer 1", "features * of f"),
    "layers": (
        'sae("sae.safetensors")',
        "resid_post layer *",
        "resid_post layer 1 features * of f",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_saved_features_of_other_bases_equal_their_training(name: str, tmp_path: Path) -> None:
    call, site, at = BASES[name]
    save_file(mlp_weights(bare("llama").config.hidden_size), tmp_path / "sae.safetensors")
    basis = f"basis f = {call} at {site}\n"
    group = fit(at=f"{at} at last token")
    trained = export(tmp_path, basis, group)
    assert_equal(trained, read(tmp_path, basis))
    same = READ.replace(", f)", ", other)")
    assert_equal(trained, read(tmp_path, basis.replace("basis f", "basis other"), group=same))


def test_features_of_another_dictionary_are_an_error(tmp_path: Path) -> None:
    basis = sae(tmp_path)
    export(tmp_path, basis, declare("mask"))
    (digest,) = content(tmp_path)["dictionaries"].values()
    sae(tmp_path, scale=1.5)
    error = error_of(tmp_path, basis)
    assert error.code == "E0342"
    said = f"the file of `g` has features of a dictionary with SHA-256 {digest[:12]}…, and `f` has "
    assert said in error.message


def test_features_of_a_basis_that_is_no_dictionary_are_an_error(tmp_path: Path) -> None:
    export(tmp_path, sae(tmp_path), declare("mask"))
    basis = f"basis f = pca(p, dims: 3) at {SITE} at last token\n"
    error = error_of(tmp_path, basis)
    assert error.code == "E0342"
    assert "and `f` isn't a dictionary" in error.message


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ('saved("out/g/mask.json")', "has features of one dictionary, `f`"),
        ('saved("out/g/mask.json", f, h)', "has features of one dictionary, `f`"),
        ('saved("out/g/mask.json", "capital", f)', "without supernodes"),
    ],
)
def test_call_that_does_not_name_one_dictionary_is_an_error(
    call: str, reason: str, tmp_path: Path
) -> None:
    basis = sae(tmp_path)
    export(tmp_path, basis, declare("mask"))
    basis += basis.replace("basis f", "basis h")
    error = error_of(tmp_path, basis, group=f"group g = {call}\n")
    assert error.code == "E0342"
    assert reason in error.message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dictionaries": {}}, "and doesn't identify this basis"),
        ({"dictionaries": {"h": "0" * 64}}, "and doesn't identify this basis"),
        ({"dictionaries": {"f": 3}}, "`dictionaries.f` of"),
        ({"dictionaries": 3}, "`dictionaries` of"),
        ({"sites": (["resid_post", 1, None, "h", 1], "of another basis")}, "has no group"),
        ({"sites": (["resid_post", 2, None, "f", 1], "of another layer")}, "has no group"),
        ({"sites": (["resid_post", 1, None, None, 1], "a dimension")}, "has no group"),
    ],
)
def test_malformed_file_of_features_is_an_error(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    basis = sae(tmp_path)
    sites: list[Any] = [["resid_post", 1, None, "f", number] for number in range(4)]
    if "sites" in change:
        change = {"sites": [*sites[:1], change["sites"][0], *sites[2:]]}
    file = {"sites": sites, "labels": [""] * 4, "scores": [1.0, 2.0, 3.0, 4.0], "chosen": [0, 2]}
    (tmp_path / "out" / "g").mkdir(parents=True)
    text = json.dumps({**file, "dictionaries": {"f": "0" * 64}, **change})
    (tmp_path / "out" / "g" / "mask.json").write_text(text, "utf-8")
    error = error_of(tmp_path, basis)
    assert error.code == "E0342"
    assert reason in error.message


def test_prompts_that_chose_features_are_reported_if_measured(tmp_path: Path) -> None:
    """A group of features is replaced by its features in rules, and is still compared."""
    basis = sae(tmp_path)
    export(tmp_path, basis, declare("mask"))
    text = experiment("ablate g at tokens * with zero", block="p")
    found = read(tmp_path, basis, text)
    assert [each.code for each in found.diagnostics].count("W0738") == 1
    text = experiment("ablate features 1 of f at tokens * with zero", block="p")
    found = read(tmp_path, basis, text)
    assert "W0738" not in [each.code for each in found.diagnostics]


def test_circuit_of_features_from_a_file_is_described_and_compared(tmp_path: Path) -> None:
    """A group from a file is described also if only a circuit names it."""
    basis = sae(tmp_path).replace("resid_post", "mlp_out")
    group = declare("mask")
    export(tmp_path, basis, group)
    read_group = f"{READ}circuit c = g -> logits\n"
    text = experiment("ablate c at tokens * with zero", block="p")
    found = read(tmp_path, basis, text, group=read_group)
    assert [each.code for each in found.diagnostics].count("W0738") == 1
    said = found.files[0].experiments[0].conventions["group g"]
    assert "chosen on 4 prompts; 4 of the 4 rows here have one of them" in said
