"""Interchange interventions in subspaces, as in the experiments of causalab: rotations from files,
principal components, and masks over dimensions and heads (Geiger et al. 2023, arXiv 2303.02536).

The reference registers hooks on modules of the bare model and runs one unpadded prompt at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, by_name, token, try_file
from ..quick import in_turn
from .models import bare
from .support import Text, difference, experiment, records, rows, run_file, tokens

HERE = ("gpt2", "llama", "gpt_neox")
FILE = """
basis r = saved("rotation.safetensors", "resid") at resid_post layer 1
basis h = saved("rotation.safetensors", "head") at z layer 1 head 0
basis g = saved("rotation.safetensors", "other head") at z layer 2 head 0
basis c = pca(p, dims: 3) at resid_post layer 1 at last token
"""
"""The rotations would be fitted by DAS; here they are orthonormal and random."""
DOCUMENTS = {
    "answer by layer and position": (
        "from other into clean  patch resid_post layer * in basis r at subject token, last token"
    ),
    "mask over rotated dimensions": (
        "from longer into clean  patch features 0, 3 of r at last token"
    ),
    "each head": "from longer into clean  patch z layer 1 head * in basis h at last token",
    "joint heads": (
        "from longer into clean  patch z layer 1 heads 0..1 in basis h at last token  "
        "patch z layer 2 head 3 in basis g at last token"
    ),
    "principal components": "from longer into clean  patch features 0, 2 of c at last token",
    "two counterfactuals": (
        "patch resid_post layer 1 in basis r at subject token with other  "
        "patch features 2..3 of r at last token with longer"
    ),
}


def rotations(width: int, head: int) -> dict[str, Tensor]:
    """[dimensions, width] each, orthonormal."""
    random = torch.Generator().manual_seed(width)

    def drawn(count: int, size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, count, generator=random)).Q.T.contiguous()

    return {"resid": drawn(4, width), "head": drawn(2, head), "other head": drawn(3, head)}


# --- hooks ----------------------------------------------------------------------------------------


def blocks(model: Any) -> Any:
    return next(
        module
        for name, module in model.named_modules()
        if name in ("transformer.h", "model.layers", "gpt_neox.layers")
    )


def output_map(block: Any) -> Any:
    """The module whose input is z."""
    for path in ("attn.c_proj", "self_attn.o_proj", "attention.dense"):
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError


Edit = Callable[[Tensor], Tensor]
"""The vectors after the edit, from [T, width]."""


@contextmanager
def hooked(model: Any, edits: Sequence[tuple[str, int, Edit]]) -> Generator[None]:
    with ExitStack() as stack:
        for site, layer, edit in edits:
            block = blocks(model)[layer]

            def after(_: Any, __: Any, out: Any, edit: Edit = edit) -> Any:
                if isinstance(out, tuple):
                    return (edit(out[0][0])[None], *out[1:])
                return edit(out[0])[None]

            def before(_: Any, given: Any, edit: Edit = edit) -> Any:
                return (edit(given[0][0])[None], *given[1:])

            if site == "resid_post":
                handle = block.register_forward_hook(after)
            else:
                handle = output_map(block).register_forward_pre_hook(before)
            stack.callback(handle.remove)
        yield


def run_plain(model: Any, text: Text, edits: Sequence[tuple[str, int, Edit]] = ()) -> Tensor:
    with torch.no_grad(), hooked(model, edits):
        return model(torch.tensor([text.ids])).logits[0]


def vectors(model: Any, text: Text, site: str, layer: int) -> Tensor:
    """[T, width] of an unpatched run."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x.clone())
        return x

    run_plain(model, text, [(site, layer, keep)])
    return found[0]


def swapped(basis: Tensor, source: Tensor, at: int, part: slice, center: Tensor | None = None):
    """An edit that sets coordinates of one vector, or of a head in it, to the source's."""
    mean = torch.zeros(basis.shape[1]) if center is None else center

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        now, new = x[at, part] - mean, source[part] - mean
        x[at, part] += ((new - now) @ basis.T) @ basis
        return x

    return edit


@dataclass(frozen=True)
class Hooks:
    """The experiments of `DOCUMENTS`, written with hooks."""

    family: str

    @property
    def model(self) -> Any:
        return bare(self.family)

    @property
    def head_size(self) -> int:
        config = self.model.config
        size = getattr(config, "head_dim", None)
        return size or config.hidden_size // config.num_attention_heads

    def file(self) -> dict[str, Tensor]:
        return rotations(self.model.config.hidden_size, self.head_size)

    def head(self, number: int) -> slice:
        return slice(number * self.head_size, (number + 1) * self.head_size)

    def edit(
        self, n: int, run: str, site: str, layer: int, basis: Tensor, at: str,
        part: slice = slice(None), center: Tensor | None = None,
    ) -> tuple[str, int, Edit]:  # fmt: skip
        source = rows(run)[n]
        new = vectors(self.model, source, site, layer)[tokens(source, at)[-1]]
        return site, layer, swapped(basis, new, tokens(rows()[n], at)[-1], part, center)

    def components(self) -> tuple[Tensor, Tensor]:
        found = [vectors(self.model, text, "resid_post", 1)[text.last] for text in rows()]
        x = torch.stack(found).double()
        mean = x.mean(0)
        values, axes = torch.linalg.eigh((x - mean).T @ (x - mean))
        order = values.argsort(descending=True)[:3]
        return axes[:, order].T.float(), mean.float()

    def cells(self, name: str, n: int) -> list[list[tuple[str, int, Edit]]]:
        file = self.file()
        r, h, g = file["resid"], file["head"], file["other head"]
        match name:
            case "answer by layer and position":
                return [
                    [self.edit(n, "other", "resid_post", layer, r, at)]
                    for layer in range(3)
                    for at in ("subject token", "last token")
                ]
            case "mask over rotated dimensions":
                return [[self.edit(n, "longer", "resid_post", 1, r[[0, 3]], "last token")]]
            case "each head":
                heads = range(self.model.config.num_attention_heads)
                return [
                    [self.edit(n, "longer", "z", 1, h, "last token", self.head(head))]
                    for head in heads
                ]
            case "joint heads":
                return [
                    [
                        self.edit(n, "longer", "z", 1, h, "last token", self.head(0)),
                        self.edit(n, "longer", "z", 1, h, "last token", self.head(1)),
                        self.edit(n, "longer", "z", 2, g, "last token", self.head(3)),
                    ]
                ]
            case "principal components":
                axes, mean = self.components()
                kept = axes[[0, 2]]
                return [[self.edit(n, "longer", "resid_post", 1, kept, "last token", center=mean)]]
            case _:
                return [
                    [
                        self.edit(n, "other", "resid_post", 1, r, "subject token"),
                        self.edit(n, "longer", "resid_post", 1, r[2:], "last token"),
                    ]
                ]

    def values(self, name: str) -> np.ndarray:
        """[cell, row]"""
        found = [
            [
                difference(run_plain(self.model, text, edits), record)
                for edits in self.cells(name, n)
            ]
            for n, (text, record) in enumerate(zip(rows(), records(), strict=True))
        ]
        return np.array(found).T


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), HERE))
def test_interchange_documents_equal_hooks(family: str, mode: str, data: Path) -> None:
    hooks = Hooks(family)
    save_file(hooks.file(), data / "rotation.safetensors")
    names = {name: f"e{number}" for number, name in enumerate(DOCUMENTS)}
    text = FILE + "".join(experiment(names[key], rule) for key, rule in DOCUMENTS.items())
    found = run_file(text, data, family, mode)
    for name in DOCUMENTS:
        measure, expected = found[names[name]].measures[0], hooks.values(name)
        np.testing.assert_allclose(measure.patched, expected, atol=1e-4, rtol=1e-4, err_msg=name)
        effects = np.abs(expected - measure.base)
        assert effects.max() > 0.01, name


# --- a planted subspace ---------------------------------------------------------------------------

PLANTED = """
prompts cued {
  a in ["w1", "w2", "w3"]
  b in ["w4", "w5"]
  cue in ["w20", "w21"]
  template "{a} {b} {cue}"
  said = if cue = "w20" then "w30" else "w31"
  answer " {said}"
  corrupt flipped { cue = if cue = "w20" then "w21" else "w20" }
}
"""


def plant(family: str) -> tuple[Any, Tensor]:
    """A model whose answer depends only on a plane of the stream, and the plane [2, width].

    Nothing writes to the plane except the embeddings of `w20` and `w21`.
    """
    model = copy.deepcopy(bare(family))
    width = model.config.hidden_size
    random = torch.Generator().manual_seed(7)
    plane = torch.linalg.qr(torch.randn(width, 2, generator=random)).Q.T.contiguous()
    outside = torch.eye(width) - plane.T @ plane
    ends = ("c_proj.weight", "c_proj.bias", "o_proj.weight", "down_proj.weight")
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "embed" in name or "wte" in name or "wpe" in name:
                weights.copy_(weights @ outside)
            elif name.endswith(ends):
                on_the_right = name.startswith("transformer") or weights.dim() == 1
                weights.copy_(weights @ outside if on_the_right else outside @ weights)
        table = model.get_input_embeddings().weight
        unembedding = model.get_output_embeddings().weight.clone() @ outside * 0.1
        for word, answer, sign in (("w20", "w30", 1.0), ("w21", "w31", -1.0)):
            table[token(word)] += sign * 30 * (plane[0] + plane[1])
            unembedding[token(answer)] = sign * 20 * (plane[0] + plane[1])
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(unembedding)
    return model, plane


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_the_planted_subspace_changes_the_answer(family: str, tmp_path: Path) -> None:
    model, plane = plant(family)
    save_file({"plane": plane}, tmp_path / "plane.safetensors")
    lines = [
        "seed 1",  # in 20 dimensions, the plane of seed 0 overlaps with the planted one by 0.44
        'basis planted = saved("plane.safetensors", "plane") at resid_post layer 1',
        "basis drawn = random(dims: 2) at resid_post layer 1",
    ]
    text = "\n".join(lines) + "\n"
    for basis in ("planted", "drawn"):
        text += f"""
experiment in_{basis} {{
  prompts cued
  from flipped into clean
  patch resid_post layer 1 in basis {basis} at last token
  measure correct(answer of flipped) as raw
}}
"""
    found: dict[str, ExperimentResult] = by_name(*try_file(text, tmp_path, model, prompts=PLANTED))
    assert found["in_planted"].measures[0].patched.tolist() == [[1.0] * 12]
    assert found["in_drawn"].measures[0].patched.tolist() == [[0.0] * 12]
