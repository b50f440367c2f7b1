"""The model of `examples/systems/06-subspace-illusion.mech` equals its script's output."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from zoo import illusion


def test_illusion_files_equal_the_script_output() -> None:
    saved = load_file(illusion.FOLDER / "model.safetensors")
    made = illusion.model().state_dict()
    assert saved.keys() <= made.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, made[name], rtol=0, atol=0)
    for name, tensor in load_file(illusion.DIRECTIONS).items():
        torch.testing.assert_close(tensor, illusion.directions()[name], rtol=0, atol=0)


def test_illusion_mlp_computes_the_example_of_the_paper() -> None:
    """h = x (1, 0, 1), and the output is x."""
    model, words = illusion.model().eval(), illusion.WORDS
    seen: list[torch.Tensor] = []
    second = model.get_submodule("transformer.h.0.mlp.c_proj")

    def see(_: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.extend((*given, out))

    second.register_forward_hook(see)
    for word, x in illusion.NUMBERS.items():
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([[words.index("the"), words.index(word)]]))
        hidden, output = (each[0, -1] for each in seen)
        torch.testing.assert_close(hidden, torch.tensor([x, 0.0, x]), atol=1e-5, rtol=0)
        torch.testing.assert_close(output, torch.tensor([0.0, 0.0, 0.0, 0.0, x]), atol=1e-5, rtol=0)
