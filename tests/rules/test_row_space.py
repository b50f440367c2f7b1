"""Directions split by the weights that read the site, against plain hooks on the bare model.

The unread part has no effect, although it differs between runs; a direction with a large unread
part carries more than its read part (the illusion of Makelov et al. 2023).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.execute.vectors import read_next_weights
from mechdsl.resolve.types import SitePoint

from ..execute.support import shared
from ..reference.forward import Changes, Write
from .models import bare, double
from .support import (
    MANY,
    agree,
    codes,
    experiment,
    plain,
    records,
    rows,
    run_file,
    try_file,
    unpatched,
    worked_out,
)

HERE = ("gpt2", "llama", "gpt_neox")
LAYER = 1


def next_weights(family: str) -> Tensor:
    """[output, neuron]: the MLP's second map."""
    model = double(family)
    match family:
        case "gpt2":
            return model.transformer.h[LAYER].mlp.c_proj.weight.detach().T
        case "llama":
            return model.model.layers[LAYER].mlp.down_proj.weight.detach()
        case _:
            return model.gpt_neox.layers[LAYER].mlp.dense_4h_to_h.weight.detach()


def split(vector: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Split a direction into its read and unread parts by least squares."""
    read = weights.T @ torch.linalg.lstsq(weights.T, vector[:, None]).solution
    return read[:, 0], vector - read[:, 0]


def draw(family: str, folder: Path) -> Tensor:
    width = plain(family, rows()[0])["mlp_hidden", LAYER].shape[-2:].numel()
    vector = torch.randn(width, generator=torch.Generator().manual_seed(5))
    save_file({"d": vector}, folder / "d.safetensors")
    return vector.double()


DEFINED = f"""direction d = saved("d.safetensors", "d")
basis whole = directions(d) at mlp_hidden layer {LAYER}
basis row_space = row_space(d) at mlp_hidden layer {LAYER}
basis null_space = null_space(d) at mlp_hidden layer {LAYER}
"""
LOOP = (
    "from other into clean  for part in [whole, row_space, null_space] "
    f"{{ patch mlp_hidden layer {LAYER} in basis part at last token }}"
)


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", HERE)
def test_row_space_and_null_space_of_a_direction_equal_plain_hooks(
    family: str, mode: str, data: Path
) -> None:
    vector, weights = draw(family, data), next_weights(family)
    read, unread = split(vector, weights)
    parts = {"whole": vector, "row_space": read, "null_space": unread}
    found = run_file(DEFINED + experiment("e", LOOP), data, family, mode)["e"]

    def changes(n: int, part: str) -> list[Changes]:
        direction = parts[part] / parts[part].norm()
        text, other = rows()[n], rows("other")[n]
        source = plain(family, other)["mlp_hidden", LAYER][other.last].flatten()

        own = plain(family, text)["mlp_hidden", LAYER][text.last].flatten()
        new = own + ((source - own) @ direction) * direction
        return [([Write("mlp_hidden", LAYER, new[:, None], text.last)], ())]

    cells = [(part,) for part in parts]
    expected = worked_out(family, cells, changes, rows(), records())
    agree(found, ("part",), expected, unpatched(family), most=False, large=0.01)
    effects = np.abs(found.measures[0].patched - found.measures[0].base).max(axis=1)
    assert effects[2] < 1e-4 < effects[1]


def drawn(width: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(0))


def test_row_space_of_one_head_is_the_whole_direction(data: Path) -> None:
    """A head's vectors are narrower than the stream, so that all of them is read."""
    width = plain("llama", rows()[0])["z", LAYER].shape[-1]
    save_file({"d": drawn(width)}, data / "d.safetensors")
    text = 'direction d = saved("d.safetensors", "d")\n'
    text += "basis whole = directions(d) at z layer 1 head 2\n"
    text += "basis read = row_space(d) at z layer 1 head 2\n"
    rule = "for b in [whole, read] { patch z layer 1 head 2 in basis b at last token }"
    found = run_file(
        text + experiment("e", f"from other into clean  {rule}"), data, "llama", "planned"
    )
    patched = found["e"].measures[0].patched
    np.testing.assert_allclose(patched[0], patched[1], atol=1e-5)
    null = text.replace("row_space", "null_space")
    result, problems = try_file(
        null + experiment("e", f"from other into clean  {rule}"), data, "llama"
    )
    assert result is None or not result.experiments
    (problem,) = [each for each in problems if each.code == "E0641"]
    assert "no part in the null space" in problem.message


def test_next_weights_of_a_head_are_its_columns_of_the_output_map(data: Path) -> None:
    model = shared(bare("llama"))
    whole = double("llama").model.layers[LAYER].self_attn.o_proj.weight.detach()
    width = plain("llama", rows()[0])["z", LAYER].shape[-1]
    for head in (0, 2):
        found = read_next_weights(model, SitePoint("z", LAYER, head))
        own = whole[:, head * width : (head + 1) * width]
        torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)
    every = read_next_weights(model, SitePoint("z", LAYER, None))
    torch.testing.assert_close(every, whole, atol=1e-5, rtol=1e-5)


def test_null_space_of_all_heads_has_no_effect(data: Path) -> None:
    shape = plain("llama", rows()[0])["z", LAYER].shape
    width = shape[-1] * shape[-2]
    assert width > bare("llama").config.hidden_size
    save_file({"d": drawn(width)}, data / "d.safetensors")
    text = 'direction d = saved("d.safetensors", "d")\nbasis b = null_space(d) at z layer 1\n'
    rule = "from other into clean  patch z layer 1 in basis b at last token"
    found = run_file(text + experiment("e", rule), data, "llama", "planned")["e"]
    effect = np.abs(found.measures[0].patched - found.measures[0].base)
    assert effect.max() < 1e-4
    whole = text.replace("null_space", "directions")
    full = run_file(whole + experiment("e", rule), data, "llama", "planned")["e"]
    assert np.abs(full.measures[0].patched - full.measures[0].base).max() > 0.01


@pytest.mark.parametrize(
    ("basis", "code"),
    [
        ("row_space(d) at resid_post layer 1", "E0342"),
        ("null_space(d) at mlp_out layer 1", "E0342"),
        ("row_space(nothing) at mlp_hidden layer 1", "E0201"),
        ("row_space(d, dims: 3) at mlp_hidden layer 1", "E0207"),
    ],
)
def test_invalid_row_and_null_spaces_are_errors(basis: str, code: str, data: Path) -> None:
    draw("llama", data)
    text = f'direction d = saved("d.safetensors", "d")\nbasis b = {basis}\n'
    rule = "from other into clean  patch feature 0 of b at last token"
    assert code in codes(text + experiment("e", rule), data)
