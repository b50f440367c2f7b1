"""Rules on coordinates of linear bases, against forward passes of the bare model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.resolve.cells import Coord

from ..execute.support import token
from ..quick import in_turn
from ..reference.forward import Changes, Write
from .models import double
from .support import (
    BLOCKS,
    MANY,
    agree,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
    worked_out,
)

LAYERS = range(3)
HERE = ("gpt2", "llama", "gpt_neox", "gemma2")
SOURCE = "from other into clean  "


def vectors(name: str, site: str, layer: int, unit: int | None = 0, run: str = "clean") -> Tensor:
    """[row, width] at the last token; without a unit, all units concatenated."""
    found = [plain(name, text)[site, layer][text.last] for text in rows(run)]
    return torch.stack([each.flatten() if unit is None else each[unit] for each in found])


@dataclass(frozen=True)
class Basis:
    """Directions and center; coordinates by least squares."""

    directions: Tensor
    center: Tensor

    def encode(self, x: Tensor) -> Tensor:
        flat = (x - self.center).reshape(-1, x.shape[-1])
        found = torch.linalg.lstsq(self.directions.T, flat.T).solution.T
        return found.reshape(*x.shape[:-1], -1)

    def moved(self, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A change of coordinates, as a change of vectors."""

        def act(x: Tensor) -> Tensor:
            before = self.encode(x)
            return x + (change(before) - before) @ self.directions

        return act


def components(x: Tensor, count: int) -> Basis:
    """Principal components, with the sign of the largest coordinate."""
    values = x.numpy()
    found = np.linalg.svd(values - values.mean(0))[2][:count]
    sign = np.sign([row[np.abs(row).argmax()] for row in found])
    return Basis(torch.from_numpy(found * sign[:, None]), x.mean(0))


def pca(name: str, layer: int = 1) -> Basis:
    return components(vectors(name, "resid_post", layer), 3)


def read(name: str, basis: Basis, n: int, at: str, site: str = "resid_post", layer: int = 1):
    """Coordinates of the source run of a row: [token, coordinate]."""
    text = rows("other")[n]
    return basis.encode(plain(name, text)[site, layer][tokens(text, at), 0])


def put(now: Tensor, which: Sequence[int], value: Tensor | float) -> Tensor:
    now = now.clone()
    index = list(which)
    now[..., index] = value[..., index] if isinstance(value, Tensor) else value
    return now


def at_tokens(
    n: int, at: str, act: Callable[[Tensor], Tensor], site: str = "resid_post", layer: int = 1
) -> list[Write]:
    return [Write(site, layer, act, position) for position in tokens(rows()[n], at)]


@dataclass(frozen=True)
class Case:
    rule: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    writes: Callable[..., list[Write]]
    """From the model, the row and the coordinates of the cell."""


LAST = "last token"
COMPONENTS: list[tuple[Coord, ...]] = [(0,), (1,), (2,)]


def changed(
    at: str, change: Callable[..., Callable[[Tensor], Tensor]]
) -> Callable[..., list[Write]]:
    """Writes at layer 1 with a change of coordinates, of the model, row and cell."""
    return lambda name, n, *cell: at_tokens(n, at, pca(name).moved(change(name, n, *cell)))


def mean_coordinates(name: str, at: str) -> Tensor:
    basis = pca(name)
    found = [
        basis.encode(plain(name, text)["resid_post", 1][tokens(text, at), 0]).mean(0)
        for text in rows()
    ]
    return torch.stack(found).mean(0)


CASES: dict[str, Case] = {
    "subspace": Case(
        f"{SOURCE}patch resid_post layer 1 in basis b at last token",
        (),
        [()],
        changed(LAST, lambda name, n: lambda f: read(name, pca(name), n, LAST).expand_as(f)),
    ),
    "each coordinate": Case(
        f"{SOURCE}patch feature * of b at last token",
        ("feature",),
        COMPONENTS,
        changed(LAST, lambda name, n, i: lambda f: put(f, [i], read(name, pca(name), n, LAST)[0])),
    ),
    "joined coordinates": Case(
        f"{SOURCE}patch features 0, 2 of b at cue token, last token",
        ("position",),
        [("cue token",), ("last token",)],
        lambda name, n, at: at_tokens(
            n,
            at,
            pca(name).moved(lambda f: put(f, [0, 2], read(name, pca(name), n, at)[0])),
        ),
    ),
    "coordinates of a loop": Case(
        f"{SOURCE}" + "for k in 0..2 { patch features 0..k of b at last token }",
        ("k",),
        COMPONENTS,
        changed(
            LAST,
            lambda name, n, k: lambda f: put(f, range(k + 1), read(name, pca(name), n, LAST)[0]),
        ),
    ),
    "zero": Case(
        "ablate features 0..1 of b at tokens * with zero",
        (),
        [()],
        changed("tokens *", lambda name, n: lambda f: put(f, [0, 1], 0.0)),
    ),
    "zero and mean": Case(
        "ablate feature * of b at cue token with zero, mean",
        ("fill", "feature"),
        product(("zero", "mean"), (0, 1, 2)),
        changed(
            "cue token",
            lambda name, n, fill, i: (
                lambda f: put(
                    f, [i], 0.0 if fill == "zero" else mean_coordinates(name, "cue token")
                )
            ),
        ),
    ),
    "clamp": Case(
        "clamp feature * of b at tokens * to 3",
        ("feature",),
        COMPONENTS,
        changed("tokens *", lambda name, n, i: lambda f: put(f, [i], 3.0)),
    ),
    "set": Case(
        "set features 1..2 of b at last token to -2",
        (),
        [()],
        changed(LAST, lambda name, n: lambda f: put(f, [1, 2], -2.0)),
    ),
    "add": Case(
        "for c in [-9, 0.5, 12] { add c to feature 0 of b at last token }",
        ("c",),
        [(-9,), (0.5,), (12,)],
        changed(LAST, lambda name, n, c: lambda f: put(f, [0], f + c)),
    ),
    "scale": Case(
        "for c in [-2, 0, 3] { scale features * of b at tokens * by c }",
        ("c",),
        [(-2,), (0,), (3,)],
        changed("tokens *", lambda name, n, c: lambda f: f * c),
    ),
    "in order": Case(
        "scale resid_post layer 1 at last token by 2  add 2 to feature 0 of b at last token  "
        "clamp feature 0..2 of b at last token to 1",
        ("feature",),
        COMPONENTS,
        lambda name, n, i: [
            Write(
                "resid_post",
                1,
                lambda x: pca(name).moved(lambda f: put(put(f, [0], f + 2), [i], 1.0))(2 * x),
                rows()[n].last,
            )
        ],
    ),
    "at another site": Case(
        "clamp resid_post layer 0, 2 feature 0 of b at last token to 3",
        ("layer",),
        [(0,), (2,)],
        lambda name, n, layer: at_tokens(
            n, LAST, pca(name).moved(lambda f: put(f, [0], 3.0)), layer=layer
        ),
    ),
    "reconstruction": Case(
        "set resid_post layer 1 at tokens * to reconstruction of b",
        (),
        [()],
        lambda name, n: at_tokens(
            n,
            "tokens *",
            lambda x: pca(name).center + pca(name).encode(x) @ pca(name).directions,
        ),
    ),
}


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", HERE)
def test_rules_on_coordinates_equal_the_reference(family: str, mode: str, data: Path) -> None:
    names = {key: f"e{number}" for number, key in enumerate(CASES)}
    text = "basis b = pca(p, dims: 3) at resid_post layer 1 at last token\n" + "".join(
        experiment(names[key], case.rule) for key, case in CASES.items()
    )
    found = run_file(text, data, family, mode)
    for key, case in CASES.items():

        def changes(n: int, *cell: Coord, case: Case = case) -> list[Changes]:
            return [(case.writes(family, n, *cell), ())]

        expected = worked_out(family, case.cells, changes, rows(), records())
        try:
            agree(found[names[key]], case.axes, expected, unpatched(family), most=False)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


def rotation(width: int) -> Tensor:
    """Three directions that aren't orthogonal."""
    return torch.randn(3, width, generator=torch.Generator().manual_seed(5))


def unembedding(name: str) -> Basis:
    weight = double(name).get_output_embeddings().weight.detach()
    found = torch.stack([weight[token("w3")], weight[token("w9")]])
    return Basis(found, torch.zeros(found.shape[1]).double())


def of_width(name: str, directions: Callable[[int], Tensor]) -> Basis:
    width = vectors(name, "resid_post", 1).shape[1]
    return Basis(directions(width).double(), torch.zeros(width).double())


METHODS: dict[str, tuple[str, Callable[[str], Basis]]] = {
    "saved": ('saved("r.safetensors", "r")', lambda name: of_width(name, rotation)),
    "rows": ('rows(unembed, " w3", " w9")', unembedding),
    "neurons": ("neurons", lambda name: of_width(name, torch.eye)),
}


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_pca_with_and_without_each_token_equals_the_reference(family: str, data: Path) -> None:
    """Each token is a row; otherwise, a row is the mean over its tokens."""
    texts = [plain(family, text)["resid_post", 1][:, 0] for text in rows()]
    bases = {
        "each_vector": components(torch.cat(texts), 3),
        "mean_vector": components(torch.stack([text.mean(0) for text in texts]), 3),
    }
    text = "".join(
        f"basis {name} = pca(p, dims: 3, each_token: {str(name == 'each_vector').lower()}) "
        "at resid_post layer 1 at tokens *\n"
        + experiment(f"e{name}", f"scale feature 0..2 of {name} at last token by 3")
        for name in bases
    )
    found = run_file(text, data, family, "planned")
    for name, basis in bases.items():

        def changes(n: int, i: int, basis: Basis = basis) -> list[Changes]:
            return [(at_tokens(n, LAST, basis.moved(lambda f: put(f, [i], 3 * f))), ())]

        expected = worked_out(family, [(0,), (1,), (2,)], changes, rows(), records())
        agree(found[f"e{name}"], ("feature",), expected, unpatched(family), most=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_saved_rows_and_neurons_bases_equal_the_reference(
    family: str, method: str, data: Path
) -> None:
    written, make = METHODS[method]
    basis = make(family)
    save_file({"r": rotation(basis.directions.shape[1])}, data / "r.safetensors")
    rule = f"{SOURCE}patch feature 0..1 of b at last token"
    text = f"basis b = {written} at resid_post layer 1\n" + experiment("e", rule)

    def changes(n: int, i: int) -> list[Changes]:
        act = basis.moved(lambda f: put(f, [i], read(family, basis, n, LAST)[0]))
        return [(at_tokens(n, LAST, act), ())]

    expected = worked_out(family, [(0,), (1,)], changes, rows(), records())
    found = run_file(text, data, family, "planned")["e"]
    agree(found, ("feature",), expected, unpatched(family), large=1e-3, most=False)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_directions_basis_equals_the_reference(family: str, data: Path) -> None:
    """A family has a member for each layer; a direction without one is the same in all."""
    text = (
        "direction d = mean_difference(p.other, p) at resid_post layer * at last token\n"
        'direction u = unembedding(" w3", " w9")\n'
        "basis b = directions(d, u) at resid_post layer *\n"
        + experiment("e", "set resid_post layer * at last token to reconstruction of b")
        + experiment("f", f"{SOURCE}patch feature 0..1 of b at last token")
    )
    weight = double(family).get_output_embeddings().weight.detach()

    def basis(layer: int) -> Basis:
        here = [vectors(family, "resid_post", layer, run=run).mean(0) for run in ("other", "clean")]
        rows_ = torch.stack([here[0] - here[1], weight[token("w3")] - weight[token("w9")]])
        return Basis(rows_, torch.zeros(rows_.shape[1]).double())

    def reconstructed(n: int, layer: int) -> list[Changes]:
        own = basis(layer)
        act = at_tokens(n, LAST, lambda x: own.encode(x) @ own.directions, layer=layer)
        return [(act, ())]

    def patched(n: int, layer: int, i: int) -> list[Changes]:
        own = basis(layer)
        there = read(family, own, n, LAST, layer=layer)[0]
        return [(at_tokens(n, LAST, own.moved(lambda f: put(f, [i], there)), layer=layer), ())]

    found = run_file(text, data, family, "planned")
    expected = worked_out(family, product(LAYERS), reconstructed, rows(), records())
    agree(found["e"], ("layer",), expected, unpatched(family), most=False)
    expected = worked_out(family, product(LAYERS, (0, 1)), patched, rows(), records())
    agree(found["f"], ("layer", "feature"), expected, unpatched(family), large=1e-3, most=False)


@pytest.mark.parametrize("site", ["mlp_out", "attn_out"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_svd_basis_of_weights_equals_the_reference(family: str, site: str, data: Path) -> None:
    """The basis spans what the weights can write, the largest singular value first."""
    block = double(family).get_submodule(
        "transformer.h.1" if family == "gpt2" else "model.layers.1"
    )
    path = {
        ("gpt2", "mlp_out"): "mlp.c_proj",
        ("gpt2", "attn_out"): "attn.c_proj",
        ("llama", "mlp_out"): "mlp.down_proj",
        ("llama", "attn_out"): "self_attn.o_proj",
    }[family, site]
    weight = block.get_submodule(path).weight.detach()
    weight = weight.T if family == "gpt2" else weight
    found = torch.linalg.svd(weight, full_matrices=False).U.T[:2]
    sign = torch.stack([row[row.abs().argmax()].sign() for row in found])
    basis = Basis(found * sign[:, None], torch.zeros(found.shape[1]).double())
    rule = f"{SOURCE}patch feature 0..1 of b at last token"
    text = f"basis b = svd(weights: {site}, dims: 2) at {site} layer 1\n" + experiment("e", rule)

    def changes(n: int, i: int) -> list[Changes]:
        act = basis.moved(lambda f: put(f, [i], read(family, basis, n, LAST, site)[0]))
        return [(at_tokens(n, LAST, act, site), ())]

    expected = worked_out(family, [(0,), (1,)], changes, rows(), records())
    result = run_file(text, data, family, "planned")["e"]
    agree(result, ("feature",), expected, unpatched(family), large=1e-3, most=False)


@pytest.mark.parametrize(
    ("family", "mode"), in_turn(["gpt2", "llama", "gpt_neox"], ["planned", "plain"])
)
def test_basis_per_layer_and_head_equals_the_reference(family: str, mode: str, data: Path) -> None:
    """Each layer has a basis, swept or joined; each head, too."""
    text = (
        "basis b = pca(p, dims: 3) at resid_post layer *\n"
        "basis h = pca(p, dims: 2) at z layer 1 head *\n"
        + experiment("swept", f"{SOURCE}patch features 0..1 of b at last token")
        + experiment("joined", "scale resid_post layers 0..1 in basis b at last token by 3")
        + experiment("one", f"{SOURCE}patch resid_post layer 2 in basis b at last token")
        + experiment("heads", f"{SOURCE}patch feature * of h at last token")
    )
    found = run_file(text, data, family, mode)

    def swept(n: int, layer: int) -> list[Changes]:
        basis = pca(family, layer)
        there = read(family, basis, n, LAST, layer=layer)[0]
        act = basis.moved(lambda f: put(f, [0, 1], there))
        return [(at_tokens(n, LAST, act, layer=layer), ())]

    def joined(n: int) -> list[Changes]:
        writes = [
            write
            for layer in (0, 1)
            for write in at_tokens(n, LAST, pca(family, layer).moved(lambda f: 3 * f), layer=layer)
        ]
        return [(writes, ())]

    def one(n: int) -> list[Changes]:
        basis = pca(family, 2)
        there = read(family, basis, n, LAST, layer=2)[0]
        return [(at_tokens(n, LAST, basis.moved(lambda f: there.expand_as(f)), layer=2), ())]

    def heads(n: int, head: int, i: int) -> list[Changes]:
        basis = components(vectors(family, "z", 1, head), 2)
        text = rows("other")[n]
        there = basis.encode(plain(family, text)["z", 1][text.last, head][None])[0]
        act = basis.moved(lambda f: put(f, [i], there))
        return [([Write("z", 1, act, rows()[n].last, head)], ())]

    count = plain(family, rows()[0])["z", 1].shape[1]
    for name, axes, cells, changes in (
        ("swept", ("layer",), product(LAYERS), swept),
        ("joined", (), [()], joined),
        ("one", (), [()], one),
        ("heads", ("head", "feature"), product(range(count), (0, 1)), heads),
    ):
        expected = worked_out(family, cells, changes, rows(), records())
        try:
            agree(found[name], axes, expected, unpatched(family), large=1e-3, most=False)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("site", ["z", "mlp_hidden"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_basis_of_all_units_treats_them_as_one_vector(family: str, site: str, data: Path) -> None:
    basis = components(vectors(family, site, 1, None), 3)
    text = (
        f"basis b = pca(p, dims: 3) at {site} layer 1\n"
        + experiment("e", f"{SOURCE}patch feature * of b at last token")
        + experiment("means", "ablate features 0..1 of b at last token with mean")
    )

    def all_units(n: int, new: Tensor) -> list[Write]:
        every = plain(family, rows()[n])[site, 1]
        parts = new.reshape(every.shape[1], -1)
        return [Write(site, 1, part, rows()[n].last, unit) for unit, part in enumerate(parts)]

    def here(n: int, run: str = "clean") -> Tensor:
        text = rows(run)[n]
        return plain(family, text)[site, 1][text.last].flatten()

    def patched(n: int, i: int) -> list[Changes]:
        act = basis.moved(lambda f: put(f, [i], basis.encode(here(n, "other")[None])[0]))
        return [(all_units(n, act(here(n)[None])[0]), ())]

    def ablated(n: int) -> list[Changes]:
        act = basis.moved(lambda f: put(f, [0, 1], 0.0))  # the mean, at which it is centred
        return [(all_units(n, act(here(n)[None])[0]), ())]

    found = run_file(text, data, family, "planned")
    expected = worked_out(family, COMPONENTS, patched, rows(), records())
    agree(found["e"], ("feature",), expected, unpatched(family), large=1e-3, most=False)
    expected = worked_out(family, [()], ablated, rows(), records())
    agree(found["means"], (), expected, unpatched(family), large=1e-3, most=False)


def test_top_of_ranked_coordinates_as_whole_sites_is_an_error(data: Path) -> None:
    text = (
        "basis b = random(dims: 3) at resid_post layer *\n"
        + experiment("ranked", f"{SOURCE}patch feature 0 of b at last token")
        + experiment("picked", f"{SOURCE}patch top 2 of ranked at last token")
    )
    _, diagnostics = try_file(text, data, "llama")
    (found,) = [each for each in diagnostics if each.code == "E0620"]
    assert "`ranked` ranks coordinates of `b`" in found.message
    assert "features 0, 3 of b" in found.help_text


def test_random_basis_depends_on_the_seed_not_on_its_name(data: Path) -> None:
    def effect(name: str, top: str = "", before: str = "") -> np.ndarray:
        text = before + f"basis {name} = random(dims: 4) at resid_post layer 1\n"
        text += experiment("e", f"{SOURCE}patch resid_post layer 1 in basis {name} at last token")
        result = run_file(top + text, data, "llama", "planned")["e"]
        return result.statistics[0].mean

    first = effect("b")
    assert (effect("other") == first).all()
    assert (effect("b", top="seed 3\n") != first).any()


CUES = [row["cue"] for row in records()]
GROUPED = BLOCKS.replace(
    "  xs = list",
    f'  group = if cue = "{CUES[1]}" then "b" else if cue = "{CUES[2]}" then "c" else "a"\n'
    '  number = if group = "a" then 0.5 else 2\n  xs = list',
)
"""Rows have one of three words and one of two numbers: rows 0 and 3 share a class."""


@pytest.mark.parametrize(
    ("family", "mode"), in_turn(["gpt2", "llama", "gpt_neox"], ["planned", "padded on the right"])
)
def test_class_means_basis_equals_the_reference(family: str, mode: str, data: Path) -> None:
    """Each class counts once; 3 classes span 2 dimensions, and numbers are classes, too."""
    text = (
        "basis b = class_means(group, p) at resid_post layer 1 at last token\n"
        "basis one = class_means(number, p) at resid_post layer 1 at last token\n"
        "basis leading = class_means(group, p, dims: 1) at resid_post layer 1 at last token\n"
    )
    rules = {
        "b": (2, [[0, 3], [1], [2]]),
        "one": (1, [[0, 3], [1, 2]]),
        "leading": (1, [[0, 3], [1], [2]]),
    }
    rule = "set resid_post layer 1 at last token to reconstruction of"
    text += "".join(experiment(f"e_{name}", f"{rule} {name}") for name in rules)
    text += experiment("scaled", "scale feature * of b at last token by 3")
    found = run_file(text, data, family, mode, blocks=GROUPED)
    every = vectors(family, "resid_post", 1)

    made = {
        name: components(torch.stack([every[own].mean(0) for own in classes]), size)
        for name, (size, classes) in rules.items()
    }
    for name, basis in made.items():

        def projected(n: int, basis: Basis = basis) -> list[Changes]:
            def act(x: Tensor) -> Tensor:
                return basis.center + basis.encode(x) @ basis.directions

            return [(at_tokens(n, LAST, act), ())]

        expected = worked_out(family, [()], projected, rows(), records())
        agree(found[f"e_{name}"], (), expected, unpatched(family), most=False)

    def scaled(n: int, i: int) -> list[Changes]:
        act = made["b"].moved(lambda f: put(f, [i], 3 * f))
        return [(at_tokens(n, LAST, act), ())]

    expected = worked_out(family, [(0,), (1,)], scaled, rows(), records())
    agree(found["scaled"], ("feature",), expected, unpatched(family), most=False)
    said = found["scaled"].conventions["basis b"]
    assert said.startswith(
        "span of the class means of `group` in 4 rows of p at last token, centred"
    )


@pytest.mark.parametrize(
    ("basis", "line", "code", "message"),
    [
        ("class_means(p) at resid_post layer 1", "", "E0207", "`class_means(kind, fruit)`"),
        ("class_means(colour, p) at resid_post layer 1", "", "E0342", "not a value of its rows"),
        ("class_means(words, p) at resid_post layer 1", "", "E0342", "not a number or word"),
        ("class_means(cue, p, dims: 9) at resid_post layer 1", "", "E0342", "the most for"),
        ("class_means(cue, q) at resid_post layer 1", "", "E0201", ""),
        ("pca(p, dims: 3)", "", "E0342", "`b` has no site"),
        ("pca(p) at resid_post layer 1", "", "E0207", "needs `dims: …`"),
        (
            "fit(sae(features: 4, k: 2)) at resid_post layer 1 at tokens *",
            "",
            "E0207",
            "write `fit(sae(features: 4, k: 2), prompts: fruit.train, …)`",
        ),
        ("pca(p, dims: 0) at resid_post layer 1", "", "E0342", "from 1 on"),
        ("pca(p, dims: 90) at resid_post layer 1", "", "E0342", "is more than"),
        ("pca(p, size: 3) at resid_post layer 1", "", "E0207", "is not an argument of `pca`"),
        ("pca(p, dims: 3, each_token: 2) at resid_post layer 1", "", "E0342", "true or false"),
        (
            "class_means(k, p, each_token: true) at resid_post layer 1",
            "",
            "E0207",
            "not an argument",
        ),
        ("pcas(p, dims: 3) at resid_post layer 1", "", "E0203", "did you mean `pca`"),
        ("random(dims: 3) at resid_post layer 1 at last token", "", "E0342", "no position"),
        ("random(dims: 3) at resid_post layers 0..1", "", "E0342", "write the singular"),
        ("random(dims: 3) at q layer 1", "", "E0342", "no head is named"),
        ("random(dims: 3) at pattern layer 1 head 0", "", "E0342", "vectors over keys"),
        ("random(dims: 3) at resid_post layer 9", "", "E0302", ""),
        ('rows(unembed, " w3", " zebra crossing") at resid_post layer 1', "", "E0342", "tokens"),
        ('rows(embed, " w3") at resid_post layer 1', "", "E0207", "no matrix `embed`"),
        ("svd(weights: resid_post) at resid_post layer 1", "", "E0342", "`mlp_out`"),
        ('saved("none.safetensors", "r") at resid_post layer 1', "", "E0342", "can't be read"),
        ('sae("none") at resid_post layer 1', "", "E0342", "does not exist"),
        (
            "random(dims: 3) at resid_post layer 1",
            "patch feature 3 of b at last token",
            "E0301",
            "",
        ),
        (
            "random(dims: 3) at resid_post layer 1",
            "patch feature 0 of c at last token",
            "E0201",
            "",
        ),
        (
            "random(dims: 3) at resid_post layer 1",
            "patch z layer 1 head 0 in basis b at last token",
            "E0342",
            "is for vectors of",
        ),
        (
            "random(dims: 3) at resid_post layer 1..2",
            "patch resid_post layer 0 in basis b at last token",
            "E0342",
            "has no basis for layer 0",
        ),
        *(
            ("random(dims: 3) at resid_post layer 1", line, "E0101", hint)
            for line, hint in (
                ("patch feature 1 at last token", "name the basis: `feature 1 of b`"),
                ("patch feature 1 in basis b at last token", "write `feature 1 of b`"),
                ("patch latent 1 of b at last token", "`feature 1 of b`"),
                (
                    "project out feature 1 of b from resid_post layer 1 at last token",
                    "`project out resid_post layer 1 feature 1 of b at …`",
                ),
            )
        ),
        ("das(dims: 3) at resid_post layer 1", "", "E0203", '`saved("rotation.safetensors"'),
        ("pca(p, n_components: 3) at resid_post layer 1", "", "E0207", "write `dims: …`"),
        ('sae("x") at blocks.1.hook_resid_post', "", "E0101", "write `resid_post layer 1`"),
        (
            "random(dims: 3) at resid_post layer 1",
            "path resid_post layer 1 in basis b -> logits at last token",
            "E0342",
            "`b` isn't a dictionary",
        ),
        (
            "random(dims: 3) at resid_post layer 1",
            "patch feature 0 of b at last token into layer 2",
            "E0342",
            "the same layer",
        ),
        (
            "random(dims: 3) at resid_post layer 1",
            "against random(39, layers)  patch feature 0 of b at last token",
            "E0630",
            "random(39, subspaces)",
        ),
    ],
)
def test_invalid_bases_are_errors(
    basis: str, line: str, code: str, message: str, data: Path
) -> None:
    line = line or "patch feature 0 of b at last token"
    text = f"basis b = {basis}\n" + experiment("e", f"{SOURCE}{line}")
    result, diagnostics = try_file(text, data, "llama")
    assert result is None
    assert code in [each.code for each in diagnostics]
    (found, *_) = [each for each in diagnostics if each.code == code]
    assert message in f"{found.message} {found.help_text}"


def test_basis_at_experts_without_a_number_is_an_error(data: Path) -> None:
    text = "basis b = pca(p, dims: 1) at expert_out layer 1 at last token\n"
    rule = experiment("e", f"{SOURCE}patch feature 0 of b at last token")
    _, (found,) = try_file(text + rule, data, "gpt_oss")
    assert "a vector for each expert, and no expert is named" in found.message
    assert "`expert *`" in str(found.help_text)
