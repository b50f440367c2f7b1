"""Tokens that `insert 3 tokens after last token` adds to images, and vectors written at them.

The reference is the bare model in fp64 on one image: a hook appends the vectors to the output of
its embedding (Jia et al. 2022, arXiv 2203.12119).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult, MeasureData

from ..quick import in_turn, some
from ..reference.forward import Write
from . import support
from .reference import Act, Seen
from .support import ANSWERS, FRONT, GRID, token
from .test_blocks import codes, folder_of

NAMES = ("vit", "deit", "dinov2_with_registers", "clip", "siglip", "ijepa", "clip/dual")
FAMILIES = some(NAMES, ("vit", "dinov2_with_registers", "clip/dual"))
MODES = ("planned", "plain", "small passes")
COUNT = 3
LETTERS = "abc"
DIRECTIONS = "\n".join(f'direction {n} = saved("drawn.safetensors", "{n}")' for n in LETTERS)
WITHOUT_FILES = """
images scenes {
  kind in ["circle", "square"]
  image shapes(n: 1, kind: kind)
  answer "{kind}"
  corrupt longer { insert 3 tokens after last token }
}
"""
SET = "set embed at inserted tokens to 2 * [a, b - a, c]"
INTO = "from clean into longer"
FILLED = f"run filled {{ {INTO} {SET} }}"
CORRUPTIONS = f"""
  corrupt longer {{ insert {COUNT} tokens after last token }}
  corrupt five {{ insert 2 tokens after last token insert 3 tokens after last token }}
  corrupt masked {{ mask image row 1 col 1..2 tokens insert {COUNT} tokens after last token }}
  corrupt also_masked {{
    insert {COUNT} tokens after last token
    mask image row 1 col 1..2 tokens
  }}
  corrupt noised {{
    insert {COUNT} tokens after last token
    add gaussian(std: 1) to embed at inserted tokens
  }}
"""


def blocks(name: str) -> str:
    own = support.blocks_of(name)
    return own.replace("  wrong ", f"{CORRUPTIONS}  wrong ") + DIRECTIONS + "\n"


def width(name: str) -> int:
    return int(support.plain(name, 0).sites["resid_post", 0].shape[-1])


def drawn(name: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return {letter: torch.randn(width(name), generator=random) for letter in LETTERS}


def written(name: str) -> Tensor:
    """The vectors of `SET`, [token, width]."""
    a, b, c = (each.double() for each in drawn(name).values())
    return 2 * torch.stack([a, b - a, c])


def placeholders(name: str, count: int = COUNT) -> Tensor:
    return torch.zeros(count, width(name), dtype=torch.float64)


@contextmanager
def appended(name: str, vectors: Tensor) -> Generator[None]:
    """Append vectors to the output of the bare model's embedding."""
    embed = support.stack(name).embed
    assert embed is not None
    part = support.double(name).get_submodule(embed[0])
    handle = part.register_forward_hook(
        lambda module, args, output: torch.cat([output, vectors[None]], 1)
    )
    try:
        yield
    finally:
        handle.remove()


def run(name: str, number: int, vectors: Tensor, acts: Iterable[Act] = ()) -> Seen:
    """One image with vectors after its patches."""
    with appended(name, vectors):
        return support.forward(name, support.pixels(name, number), acts=acts)


def measure_of(name: str) -> str:
    return support.OF_SCORES if name in support.DUALS else support.DIFFERENCE


def _source(measure: MeasureData) -> NDArray[np.float64]:
    assert measure.source is not None
    return measure.source[0]


def results(
    name: str, folder: Path, mode: str = "planned", **experiments: Sequence[str]
) -> dict[str, ExperimentResult]:
    save_file(drawn(name), folder / "drawn.safetensors")
    text = "".join(
        support.experiment(key, *lines, measure="" if "observe" in lines[-1] else measure_of(name))
        for key, lines in experiments.items()
    )
    return support.run_file(text, folder, name, mode, blocks(name))


def check(name: str, found: NDArray[np.float64] | None, expected: Sequence[Seen]) -> None:
    values = [support.difference(seen, number) for number, seen in enumerate(expected)]
    assert found is not None
    np.testing.assert_allclose(found, values, atol=1e-4, rtol=1e-4)


def at_end(name: str, count: int = COUNT) -> list[int]:
    first = FRONT[name] + GRID * GRID
    return [*range(first, first + count)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_vectors_written_at_inserted_image_tokens_equal_reference(
    mode: str, name: str, tmp_path: Path
) -> None:
    """Two experiments in one file insert different numbers of tokens."""
    others = "set embed at inserted 2 tokens to [a, b, c]"
    found = results(name, tmp_path, mode, e=(INTO, SET), f=("from clean into five", others))
    (measure,) = found["e"].measures
    numbers = range(len(ANSWERS))
    check(name, measure.base[0], [run(name, n, placeholders(name)) for n in numbers])
    check(name, measure.patched[0], [run(name, n, written(name)) for n in numbers])
    assert np.abs(measure.patched[0] - measure.base[0]).max() > 1e-2
    (measure,) = found["f"].measures
    check(name, measure.base[0], [run(name, n, placeholders(name, 5)) for n in numbers])
    vectors = torch.stack([each.double() for each in drawn(name).values()])
    longer = torch.cat([placeholders(name, 2), vectors])
    check(name, measure.patched[0], [run(name, n, longer) for n in numbers])
    said = found["e"].conventions["inserted in longer"]
    assert said.startswith(f"{COUNT} tokens after last token: vectors of 0 at `embed`")


@pytest.mark.parametrize(("name", "site"), in_turn(NAMES, ("resid_pre", "resid_mid", "mlp_out")))
def test_vectors_written_at_layers_of_inserted_tokens_equal_reference(
    name: str, site: str, tmp_path: Path
) -> None:
    """Covers deep visual prompt tuning."""
    rule = f"for f in [0, 2] {{ set {site} layer 1 at inserted tokens to f * [a, b, c] }}"
    found = results(name, tmp_path, e=(INTO, rule))["e"]
    vectors = torch.stack([each.double() for each in drawn(name).values()])
    for cell, factor in enumerate((0, 2)):
        acts = [
            Write(site, 1, factor * vector, at, 0)
            for at, vector in zip(at_end(name), vectors, strict=True)
        ]
        expected = [run(name, n, placeholders(name), acts) for n in range(len(ANSWERS))]
        check(name, found.measures[0].patched[cell], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_patches_between_runs_with_and_without_inserted_tokens_equal_reference(
    mode: str, name: str, tmp_path: Path
) -> None:
    """Patches go into the clean run, which has fewer tokens, and in the other direction."""
    where = "image row 2 col 3 token"
    rules = (f"patch resid_post layer * at {where}", f"patch z layer 1 head * at {where}")
    found = results(
        name,
        tmp_path,
        mode,
        e=(FILLED, "from filled into clean", rules[0]),
        f=(FILLED, "from clean into filled", rules[1]),
        g=("from masked into longer", "patch embed at image row 1 col 1..2 tokens"),
    )
    at, numbers = token(name, 2, 3), range(len(ANSWERS))
    filled = [run(name, n, written(name)) for n in numbers]
    for layer in range(support.LAYERS):
        expected = [
            support.forward(
                name,
                support.pixels(name, n),
                acts=[
                    Write("resid_post", layer, filled[n].sites["resid_post", layer][at, 0], at, 0)
                ],
            )
            for n in numbers
        ]
        check(name, found["e"].measures[0].patched[layer], expected)
    clean = [support.plain(name, n) for n in numbers]
    check(name, found["f"].measures[0].base[0], filled)
    for head in range(found["f"].measures[0].patched.shape[0]):
        expected = [
            run(name, n, written(name), [Write("z", 1, clean[n].sites["z", 1][at, head], at, head)])
            for n in numbers
        ]
        check(name, found["f"].measures[0].patched[head], expected)
    # only the masked patches differ, so patching all of them gives the source run
    (measure,) = found["g"].measures
    np.testing.assert_allclose(measure.patched[0], _source(measure), atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "deit", "clip/dual"])
def test_blocked_attention_to_inserted_tokens_equals_the_clean_run(
    name: str, tmp_path: Path
) -> None:
    front = "cls token, distillation token" if name == "deit" else "cls token"
    others = f"{{{front}, image tokens}}"
    rule = f"block attention layers * heads * from {others} to inserted tokens"
    found = results(name, tmp_path, e=(INTO, SET, rule))["e"]
    check(name, found.measures[0].patched[0], [support.plain(name, n) for n in range(3)])


@pytest.mark.parametrize("name", FAMILIES)
def test_observed_attention_of_inserted_tokens_equals_reference(name: str, tmp_path: Path) -> None:
    front = "cls token" if FRONT[name] else "image row 1 col 1 token"
    edges = {
        "out": "inserted tokens to image row 2 col * tokens",
        "back": f"{front} to inserted tokens",
    }
    looks = {
        key: (FILLED, f"observe attention layer 1 head * of filled from {edge} as {key}_weight")
        for key, edge in edges.items()
    }
    found = results(name, tmp_path, "planned", **looks)
    own = at_end(name)
    row = [token(name, 2, col) for col in range(1, GRID + 1)]
    for number in range(len(ANSWERS)):
        seen = run(name, number, written(name))
        q, k = (seen.sites[site, 1].transpose(0, 1) for site in ("q", "k"))
        pattern = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        out = pattern[:, own][:, :, row].sum(-1).mean(-1)
        np.testing.assert_allclose(found["out"].measures[0].patched[:, number], out, atol=1e-5)
        back = pattern[:, 0, own].sum(-1)
        np.testing.assert_allclose(found["back"].measures[0].patched[:, number], back, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_inserted_tokens_affect_image_tokens_only_after_the_embedding(
    mode: str, name: str, tmp_path: Path
) -> None:
    """Image tokens differ after layer 1, but not at the embedding."""
    where = "image row 2 col 3 token"
    rules = (f"patch resid_post layer 1 at {where}", f"patch embed at {where}")
    ways = ("from clean into longer", "from longer into clean", "from five into longer")
    experiments = {
        f"e{way}{rule}": (ways[way], rules[rule]) for way in range(3) for rule in range(2)
    }
    found = results(name, tmp_path, mode, **experiments)
    at, numbers = token(name, 2, 3), range(len(ANSWERS))
    counts = {"clean": 0, "longer": COUNT, "five": 5}
    for way, text in enumerate(ways):
        _, source, _, base = text.split()
        plain = [run(name, n, placeholders(name, counts[base])) for n in numbers]
        check(name, found[f"e{way}1"].measures[0].patched[0], plain)
        expected: list[Seen] = []
        for n in numbers:
            other = run(name, n, placeholders(name, counts[source]))
            write = Write("resid_post", 1, other.sites["resid_post", 1][at, 0], at, 0)
            expected.append(run(name, n, placeholders(name, counts[base]), [write]))
        check(name, found[f"e{way}0"].measures[0].patched[0], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_corruptions_apply_to_images_with_inserted_tokens(name: str, tmp_path: Path) -> None:
    """Covers masks before and after `insert`, `replace` rules, and noise at inserted tokens."""
    gray = "image row 1 col 1..2 tokens"
    found = results(
        name,
        tmp_path,
        e=("from masked into longer", f"replace {gray} with gray"),
        f=("from also_masked into masked", "patch resid_post layer * at inserted tokens"),
        g=("from noised into longer", "patch embed at inserted tokens"),
    )
    (measure,) = found["e"].measures
    np.testing.assert_allclose(measure.patched[0], _source(measure), atol=1e-4)
    (measure,) = found["f"].measures
    assert measure.base[0] == pytest.approx(_source(measure))
    assert measure.patched[0] == pytest.approx(measure.base[0], abs=1e-4)
    (measure,) = found["g"].measures
    assert np.abs(_source(measure) - measure.base[0]).max() > 1e-3
    np.testing.assert_allclose(measure.patched[0], _source(measure), atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "clip/dual"])
def test_integrated_gradients_of_inserted_tokens_sum_to_their_effect(
    name: str, tmp_path: Path
) -> None:
    """Completeness of estimates along a path."""
    way, rule = "from noised into longer", "patch resid_post layer 1 at {}"
    each = (rule.format("each token of inserted"), "using integrated_gradients(steps: 100)")
    found = results(name, tmp_path, e=(way, *each), f=(way, rule.format("inserted tokens")))
    assert [cell.position for cell in found["e"].cells] == [
        f"inserted token {n}" for n in range(1, COUNT + 1)
    ]
    estimated, patched = (found[key].measures[0] for key in ("e", "f"))
    effect = (estimated.patched - estimated.base).sum(0)
    expected = (patched.patched - patched.base)[0]
    np.testing.assert_allclose(effect, expected, atol=0.01, rtol=0.01)
    assert np.abs(expected).max() > 1e-2


MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "text": ("after last token }", 'after last token with " a" }', "E0207", "leave it out"),
    "before": ("after last token }", "before last token }", "E0207", "after last token"),
    "elsewhere": ("after last token }", "after image row 1 col 1 token }", "E0207", "no effect"),
    "none": (f"insert {COUNT}", "insert 0", "E0515", "takes 1 to 1,000 tokens"),
    "unknown position": ("after last token }", "after objct token }", "E0308", "objct"),
    "fewer directions": ("[a, b - a, c]", "[a, b]", "E0341", "has 3 tokens"),
    "clean run": (INTO, "from longer into clean", "E0308", "inserted"),
    "replacement": (f"insert {COUNT} tokens after last token }}",
                    'replace last token with " a" }', "E0207", "gray"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_invalid_insertion_into_images_is_rejected(mistake: str, tmp_path: Path) -> None:
    old, new, code, said = MISTAKES[mistake]
    save_file(drawn("vit"), tmp_path / "drawn.safetensors")
    text, own = support.experiment("e", INTO, SET), blocks("vit")
    assert old in text + own
    found, diagnostics = support.try_file(
        text.replace(old, new), tmp_path, "vit", blocks=own.replace(old, new, 1)
    )
    errors = [each for each in diagnostics if each.severity == "error"]
    assert found is None
    assert errors[0].code == code, diagnostics
    assert said in f"{errors[0].message} {errors[0].label_text} {errors[0].help_text}"


@pytest.mark.parametrize("name", ["beit", "data2vec-vision", "dinov3_vit"])
def test_models_with_positions_in_attention_reject_inserted_tokens(
    name: str, tmp_path: Path
) -> None:
    found, diagnostics = support.try_file(
        support.experiment("e", INTO, "ablate resid_post layer 1 at inserted tokens with zero"),
        tmp_path,
        name,
        blocks=blocks(name).replace(DIRECTIONS, ""),
    )
    assert found is None
    (first, *_) = [each for each in diagnostics if each.severity == "error"]
    assert first.code == "E0207"
    assert "this model can't read: its attention" in first.message


RULE = "set embed at inserted tokens to 0"


def test_insertion_into_images_is_validated_without_weights(tmp_path: Path) -> None:
    """Without the model, tokens aren't counted."""
    folder_of(tmp_path)
    model = 'model vit = local("elsewhere")'
    assert codes(tmp_path, INTO, RULE, blocks=WITHOUT_FILES) == []
    assert codes(tmp_path, INTO, RULE, blocks=WITHOUT_FILES, model=model) == []
    called = WITHOUT_FILES.replace("  corrupt", "  region inserted = mask\n  corrupt")
    assert codes(tmp_path, INTO, RULE, blocks=called) == ["E0207"]
