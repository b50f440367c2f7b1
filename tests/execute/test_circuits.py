"""OV and QK circuits in bases, against slices of each family's parameters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mechdsl.base.text import Source
from mechdsl.results.experiment_result import ExperimentResult

from .support import MODES, PROMPTS, bare, by_name, run_on, shared, write_rows
from .test_observed_weights import FAMILIES, PLACES, Array, head

BASES = """
basis b = saved("own.safetensors", "b") at resid_pre layer 1
basis c = saved("own.safetensors", "c") at resid_post layer 2
basis n = neurons at resid_pre layer 1
basis s = sae("sae.safetensors") at resid_pre layer 1
"""
FEATURES = 5


def draw(folder: Path, width: int) -> dict[str, Array]:
    """The directions of each basis, and the vectors that read its coordinates."""
    random = torch.Generator().manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random)

    own = {"b": normal(3, width), "c": normal(2, width)}
    save_file(own, folder / "own.safetensors")
    sae = {
        "W_enc": normal(width, FEATURES),
        "b_enc": normal(FEATURES),
        "W_dec": normal(FEATURES, width),
        "b_dec": normal(width),
    }
    save_file(sae, folder / "sae.safetensors")
    found = {name: matrix.double().numpy() for name, matrix in own.items()}
    found |= {"n": np.eye(width), "s": sae["W_dec"].double().numpy()}
    readers = {name: np.linalg.pinv(found[name]) for name in ("b", "c", "n")}
    readers["s"] = sae["W_enc"].double().numpy()
    return found | {f"{name} reads": matrix for name, matrix in readers.items()}


def run(text: str, folder: Path, family: str, mode: str = "planned") -> dict[str, ExperimentResult]:
    write_rows(folder)
    whole = f'mech 1\nmodel m = local("handed over")\n{PROMPTS}{BASES}{text}'
    source = Source(whole, folder / "file.mech")
    return by_name(*run_on(source, {"m": shared(bare(family))}, MODES[mode]))


def table(found: ExperimentResult, *axes: str) -> dict[tuple[object, ...], float]:
    values = found.measures[0].patched[:, 0]
    keys = [tuple(key.coords[axis] for axis in axes) for key in found.cells]
    return dict(zip(keys, values.tolist(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_ov_and_qk_circuits_equal_the_reference(family: str, tmp_path: Path) -> None:
    width = bare(family).config.hidden_size
    arrays = draw(tmp_path, width)
    pairs = [("b", ""), ("b", "c"), ("s", "b"), ("b", "s"), ("c", "n")]
    lines = {}
    for word in ("ov", "qk"):
        for first, second in pairs:
            named = f"{first}, {second}" if second else first
            lines[f"{word}_{first}{second}"] = f"observe {word}({named}) layer * head *"
    text = "".join(
        f"experiment {name} {{ model m\n {line} as x{name} }}\n" for name, line in lines.items()
    )
    found = run(text, tmp_path, family)
    for name in lines:
        word, _, bases = name.partition("_")
        first, second = bases[0], bases[-1]
        values = table(found[name], "layer", "head", "from_feature", "to_feature")
        for layer, number in PLACES:
            own = head(family, layer, number)
            left = arrays[first]
            if word == "ov":
                expected = left @ own.v @ own.o @ arrays[f"{second} reads"]
            else:
                expected = left @ own.q @ own.k.T @ arrays[second].T
            size = np.abs(expected).max()
            assert size > 0.01
            for (i, j), value in np.ndenumerate(expected):
                assert abs(values[layer, number, i, j] - value) < 1e-4 * max(1, size), name
        assert len(values) == 12 * expected.size


def test_ov_circuit_in_a_fitted_basis_needs_no_prompts(tmp_path: Path) -> None:
    """A basis that is computed from prompts, in an experiment without any; and one of them read."""
    draw(tmp_path, bare("llama").config.hidden_size)
    text = (
        "basis d = pca(p, dims: 2) at resid_pre layer 1 at last token\n"
        "experiment e { model m\n  observe ov(d, b) layer 1 head 2 as x\n"
        "  expect x(from_feature: 0, to_feature: 2) < 100\n}\n"
    )
    found = run(text, tmp_path, "llama")["e"]
    assert found.outcomes[0].holds
    assert len(found.cells) == 6


ERRORS = {
    "observe ov layer 1 head 2 as x": ("E0207", "takes one or two bases"),
    "observe ov(b, c, n) layer 1 head 2 as x": ("E0207", "takes one or two bases"),
    "observe ov(bb) layer 1 head 2 as x": ("E0201", "there is no basis called `bb`"),
    "observe ov(z) layer 1 head 2 as x": ("E0342", "the residual stream has"),
    "observe qk(every) layer 1 head 2 as x": ("E0342", "is a basis for each of 3 sites"),
    "observe ov(b) mlp_out layer 1 as x": ("E0207", "reads one head at a time"),
    "observe ov(b) layer 1 head 2 at last token as x": ("E0207", "reads weights, not a token"),
}


@pytest.mark.parametrize("line", ERRORS)
def test_invalid_circuit_observations_are_errors(line: str, tmp_path: Path) -> None:
    draw(tmp_path, bare("llama").config.hidden_size)
    write_rows(tmp_path)
    more = (
        "basis z = neurons at z layer 1 head 0\n"
        "basis every = neurons at resid_pre layer *\n"
        f"experiment e {{ model m\n {line} }}\n"
    )
    whole = f'mech 1\nmodel m = local("handed over")\n{PROMPTS}{BASES}{more}'
    source = Source(whole, tmp_path / "file.mech")
    result, problems = run_on(source, {"m": shared(bare("llama"))}, MODES["planned"])
    assert result is None
    code, said = ERRORS[line]
    errors = [each for each in problems if each.severity == "error"]
    assert [each.code for each in errors] == [code]
    assert said in errors[0].message


@pytest.mark.parametrize("labelled", ["first", "second"])
def test_matched_cosine_equals_the_reference_and_has_labels(labelled: str, tmp_path: Path) -> None:
    """Each direction of a dictionary with the nearest of another; labels are those of the first."""
    width = bare("llama").config.hidden_size
    arrays = draw(tmp_path, width)
    lines = [json.dumps({"index": 1, "description": "counts"})]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    more = 'basis l = sae("sae.safetensors", labels: "labels.jsonl") at resid_pre layer 1\n'
    pair = {"first": "l, n", "second": "b, l"}[labelled]
    text = (
        more + f"experiment e {{ model m\n observe matched_cosine({pair}) resid_pre layer 1 as x }}"
    )
    result = run(text, tmp_path, "llama")
    found = result["e"]
    values = table(found, "feature")
    first, second = (arrays[{"l": "s"}.get(name, name)] for name in pair.split(", "))
    first, second = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (first, second))
    cosines = first @ second.T
    assert len(values) == len(cosines)
    for (feature,), value in values.items():
        assert abs(value - cosines[int(str(feature))].max()) < 1e-4
    partners = found.measures[1].patched[:, 0]
    assert partners.tolist() == cosines.argmax(axis=1).tolist()
    named = [cell.label for cell in found.cells if cell.label]
    assert named == (["counts"] if labelled == "first" else [])
