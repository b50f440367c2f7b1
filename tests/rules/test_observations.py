"""Values of `observe` lines, against plain code on the same vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.rules.observations.lenses import load_translator

from ..execute.support import MODES, token
from ..models import families
from ..quick import in_turn
from ..reference.forward import Run, Write, side_by_side
from .models import FAMILIES, double
from .paths import End
from .support import (
    QUICK,
    Key,
    agree,
    codes,
    difference,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    table,
    tokens,
    try_file,
)
from .test_attention import PAIR, parts_of_span, taken

LAYERS, HEADS = range(3), range(4)
LAST, CUE, SUBJECT = "last token", "cue token", "subject token"
Value = Callable[..., float]
"""From a run, its text and the cell's coordinates; KeyError if the text lacks the position."""


@dataclass(frozen=True)
class Case:
    """An observation, and its reference value in each cell."""

    lines: tuple[str, ...]
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    value: Value
    label: str = "norm"
    act: Callable[..., list[Write]] = lambda name, n, *at: []
    base: str = "clean"
    large: float = 0.1


def norm(vector: Tensor) -> float:
    return float(vector.flatten().norm())


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def spread(weights: Tensor) -> float:
    there = weights[weights > 0]
    return float(-(there * there.log()).sum())


def back(weights: Tensor, at: int, most: int = 1000) -> float:
    return float(sum(weight * min(at - key, most) for key, weight in enumerate(weights.tolist())))


def later(weights: Tensor, at: int, low: int = 1, high: int = 1000) -> float:
    """The mean attention of later tokens to a key, from [query, key]; KeyError without any."""
    found = [float(own[at]) for query, own in enumerate(weights) if low <= query - at <= high]
    if not found:
        raise KeyError(at)
    return mean(found)


def patched(where: str, layer: int = 0) -> Callable[..., list[Write]]:
    return lambda name, n, *at: taken(name, n, "longer", [End("resid_post", layer)], where)


CASES: dict[str, Case] = {
    "value_of_neurons": Case(
        ("observe value mlp_hidden layer * neuron 0, 3, 7 at last token",),
        ("layer", "neuron"),
        product(LAYERS, (0, 3, 7)),
        lambda run, text, layer, unit: float(run["mlp_hidden", layer][text.last, unit]),
        "value",
    ),
    "value_of_joined_neurons": Case(
        (f"observe value mlp_hidden layer * neurons 0..3 at {PAIR}",),
        ("layer",),
        product(LAYERS),
        lambda run, text, layer: float(run["mlp_hidden", layer][tokens(text, PAIR)][:, :4].mean()),
        "value",
        large=0.02,
    ),
    "entropy_of_attention": Case(
        ("observe entropy pattern layer * head * at last token, cue token",),
        ("layer", "head", "position"),
        product(LAYERS, HEADS, (LAST, CUE)),
        lambda run, text, layer, head, at: spread(run["pattern", layer][tokens(text, at)[0], head]),
        "entropy",
    ),
    "distance_of_attention": Case(
        (f"observe distance pattern layer * at {PAIR}",),
        ("layer",),
        product(LAYERS),
        lambda run, text, layer: mean(
            [
                back(run["pattern", layer][at, head], at)
                for at in tokens(text, PAIR)
                for head in HEADS
            ]
        ),
        "distance",
    ),
    "distance_within_a_window": Case(
        ("observe distance(2) pattern layer * head * at last token, cue token",),
        ("layer", "head", "position"),
        product(LAYERS, HEADS, (LAST, CUE)),
        lambda run, text, layer, head, at: back(
            run["pattern", layer][tokens(text, at)[0], head], tokens(text, at)[0], most=2
        ),
        "distance",
    ),
    "attention_that_is_received": Case(
        ("observe received pattern layer * head * at each item token, cue token",),
        ("layer", "head", "position"),
        product(LAYERS, HEADS, [*(f"item {n}" for n in range(1, 6)), CUE]),
        lambda run, text, layer, head, at: later(
            run["pattern", layer][:, head], tokens(text, at if at == CUE else f"{at} token")[0]
        ),
        "received",
    ),
    "attention_that_is_received_within_a_window": Case(
        ("observe received(2..4) pattern layer * at token 0..6 as nearly",),
        ("layer", "position"),
        product(LAYERS, map(str, range(7))),
        lambda run, text, layer, at: mean(
            [later(run["pattern", layer][:, head], int(at), 2, 4) for head in HEADS]
        ),
        "nearly",
        large=0.05,
    ),
    "attention_that_is_received_in_a_patched_run": Case(
        (
            "from longer into clean",
            "patch resid_post layer 0 at cue token",
            "observe received(1..3) pattern layer 1..2 head 0, 2 at cue token as paid",
            "measure logit(answer) as raw",
        ),
        ("layer", "head"),
        product((1, 2), (0, 2)),
        lambda run, text, layer, head: later(
            run["pattern", layer][:, head], tokens(text, CUE)[0], 1, 3
        ),
        "paid",
        patched(CUE),
        large=0.02,
    ),
    "norm_of_the_stream": Case(
        ("observe norm resid_post layer * at last token, cue token, subject token",),
        ("layer", "position"),
        product(LAYERS, (LAST, CUE, SUBJECT)),
        lambda run, text, layer, at: norm(run["resid_post", layer][tokens(text, at)[0]]),
    ),
    "norm_of_heads": Case(
        ("observe norm layer * head * at last token",),
        ("layer", "head"),
        product(LAYERS, HEADS),
        lambda run, text, layer, head: norm(run["z", layer][text.last, head]),
    ),
    "norm_of_all_heads": Case(
        ("observe norm z layer * at cue token",),
        ("layer",),
        product(LAYERS),
        lambda run, text, layer: norm(run["z", layer][tokens(text, CUE)[0]]),
    ),
    "norm_of_joined_sites": Case(
        (f"observe norm head_out layers 1..2 head * at {PAIR}",),
        ("head",),
        product(HEADS),
        lambda run, text, head: mean(
            [norm(run["head_out", n][at, head]) for n in (1, 2) for at in tokens(text, PAIR)]
        ),
    ),
    "norm_of_a_head_and_of_all": Case(
        ("observe norm both at last token",),
        (),
        [()],
        lambda run, text: mean([norm(run["z", 1][text.last]), norm(run["z", 1][text.last, 2])]),
    ),
    "norm_of_each_item": Case(
        ("observe norm mlp_out layer 1..2 at each item token",),
        ("layer", "position"),
        product((1, 2), [f"item {n}" for n in range(1, 6)]),
        lambda run, text, layer, at: norm(run["mlp_out", layer][tokens(text, f"{at} token")[0]]),
    ),
    "norm_of_a_patched_run": Case(
        (
            "from longer into clean",
            "patch resid_post layer 0 at cue token",
            "observe norm resid_post layer * at last token as lengths",
            "measure logit(answer) as raw",
        ),
        ("layer",),
        product(LAYERS),
        lambda run, text, layer: norm(run["resid_post", layer][text.last]),
        "lengths",
        patched(CUE),
    ),
    "norm_of_another_run": Case(
        (
            "from longer into clean",
            "patch resid_post layer 0 at cue token",
            "observe norm resid_post layer * of longer at last token as others",
            "measure logit(answer) as raw",
        ),
        ("layer",),
        product(LAYERS),
        lambda run, text, layer: norm(run["resid_post", layer][text.last]),
        "others",
        base="longer",
    ),
}


# --- reference for the end of the model -----------------------------------------------------------

NORMS = {
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "gemma2": "model.norm",
}


def end_of(name: str) -> tuple[Any, Any]:
    """The final norm and the unembedding."""
    return double(name).get_submodule(NORMS[name]), double(name).get_output_embeddings()


def by_lens(name: str, vector: Tensor) -> Tensor:
    """[vocab]"""
    norm, head = end_of(name)
    with torch.no_grad():
        logits = head(norm(vector.reshape(1, 1, -1)))[0, 0]
    cap = double(name).config.to_dict().get("final_logit_softcapping")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def folded(name: str, vector: Tensor, stream: Tensor) -> Tensor:
    """[vocab]: the contribution of a vector to the logits, by the formula of the norm."""
    norm, head = end_of(name)
    vector, stream = vector.flatten(), stream.flatten()
    gain = norm.weight + 1 if name == "gemma2" else norm.weight
    if isinstance(norm, torch.nn.LayerNorm):
        vector, scale = vector - vector.mean(), (stream.var(unbiased=False) + norm.eps).sqrt()
    else:
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        scale = (stream.square().mean() + eps).sqrt()
    return (head.weight @ (gain * vector / scale)).detach()


def toward(text_number: int, logits: Tensor) -> float:
    return difference(logits[None], records()[text_number])


def cases_of(name: str) -> list[str]:
    """Neurons of experts have no site, so `gpt_oss` lacks these cases."""
    return [
        key
        for key, case in CASES.items()
        if name != "gpt_oss" or not any("mlp_hidden" in line for line in case.lines)
    ]


@cache
def found(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    text = "group both = z layer 1, z layer 1 head 2\n"
    text += "".join(experiment(key, *CASES[key].lines, measure="") for key in cases_of(name))
    return run_file(text, data, name, mode)


@cache
def expected(name: str, key: str) -> dict[Key, list[float]]:
    case = CASES[key]
    cells = [tuple(cell) for cell in case.cells]
    every: list[dict[Key, Run]] = []
    for n, text in enumerate(rows(case.base)):
        changes = [(case.act(name, n, *cell), []) for cell in cells]
        runs = side_by_side(name, double(name), text.ids, changes)
        every.append(dict(zip(cells, runs, strict=True)))

    def value(n: int, *at: Coord) -> float | None:
        try:
            return case.value(every[n][at], rows(case.base)[n], *at)
        except KeyError:
            return None

    return table(cells, value, len(every))


def hold(data: Path, key: str, name: str, mode: str) -> None:
    case = CASES[key]
    own = [line for line in case.lines if line.startswith("observe")]
    named = f"{key}.{case.label}" if " as " in own[0] and len(case.lines) > 1 else key
    result = found(data, name, mode)[named]
    assert (result.measures[0].label, result.measures[0].effect) == (case.label, "raw")
    agree(result, case.axes, expected(name, key), None, large=case.large)


@pytest.mark.parametrize(("key", "mode"), in_turn(list(CASES), QUICK))
def test_observations_equal_the_reference(data: Path, key: str, mode: str) -> None:
    hold(data, key, "llama", mode)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2"])
def test_observations_equal_the_reference_in_other_families(data: Path, name: str) -> None:
    for key in CASES:
        hold(data, key, name, "planned")


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(
    ("key", "name"), [(key, name) for name in FAMILIES for key in cases_of(name)]
)
def test_observations_equal_the_reference_in_every_family(
    data: Path, key: str, name: str, mode: str
) -> None:
    hold(data, key, name, mode)


# --- logit lens and direct logit attribution ------------------------------------------------------

LENS = ("gpt2", "llama", "gpt_neox", "gemma2")
SITES = ("resid_post", "attn_out", "mlp_out")
ATTRIBUTED = {
    "embed": ("resid_pre layer 0", ()),
    "attention": ("attn_out layer *", ("layer",)),
    "mlps": ("mlp_out layer *", ("layer",)),
}
DIRECT = "toward answer - wrong at last token"


@cache
def ends(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    patch = ("from longer into clean", "patch resid_post layer 0 at cue token")
    lenses = [
        experiment(site, f"observe logit_lens {site} layer * at last token, cue token")
        for site in SITES
    ]
    lenses.append(
        experiment("patched", *patch, "observe logit_lens resid_post layer * at last token")
    )
    lenses = [text.replace(" as delta", " as raw") for text in lenses]
    alone = experiment("alone", "observe logit_lens resid_post layer * at last token", measure="")
    parts = [
        experiment(key, f"observe direct_logit {site} {DIRECT}", measure="")
        for key, (site, _) in ATTRIBUTED.items()
    ]
    joined = experiment("joined", f"observe direct_logit mlp_out layers 0..2 {DIRECT}", measure="")
    stream = f"observe direct_logit resid_post layer * {DIRECT}"
    parts.append(experiment("stream", stream, measure=""))
    if name != "gemma2":  # a norm follows its heads
        parts.append(
            experiment("heads", f"observe direct_logit layer * head * {DIRECT}", measure="")
        )
        site = "mlp_hidden layer * neuron 0, 3, 5"
        parts.append(experiment("neurons", f"observe direct_logit {site} {DIRECT}", measure=""))
    return run_file("".join([*lenses, alone, *parts, joined]), data, name, mode)


def of_site(site: str, name: str, n: int, *at: Coord) -> Tensor:
    layer, where = at[0], at[1] if len(at) > 1 else LAST
    run = plain(name, rows()[n])
    return run[site, int(layer)][tokens(rows()[n], str(where))[0]]


def hold_ends(data: Path, name: str, mode: str) -> None:
    seen, count = ends(data, name, mode), len(rows())
    for site in SITES:
        values = table(
            product(LAYERS, (LAST, CUE)),
            lambda n, *at, site=site: toward(n, by_lens(name, of_site(site, name, n, *at))),
            count,
        )
        agree(seen[site], ("layer", "position"), values, None)
    alone = table(
        product(LAYERS),
        lambda n, *at: float(by_lens(name, of_site("resid_post", name, n, *at)).softmax(-1).max()),
        count,
    )
    agree(seen["alone"], ("layer",), alone, None, large=0.02, most=False)
    assert seen["alone"].measures[0].label == "logit_lens"
    changed = [
        side_by_side(name, double(name), rows()[n].ids, [(patched(CUE)(name, n), [])])[0]
        for n in range(count)
    ]
    values = table(
        product(LAYERS),
        lambda n, layer: toward(n, by_lens(name, changed[n]["resid_post", layer][rows()[n].last])),
        count,
    )
    agree(seen["patched"], ("layer",), values, None)
    logits = [toward(n, changed[n].logits[-1]) for n in range(count)]
    np.testing.assert_allclose(seen["patched"].measures[0].patched[-1], logits, atol=1e-4)


def hold_parts(data: Path, name: str, mode: str) -> None:
    seen, count = ends(data, name, mode), len(rows())

    def direct(vectors: Callable[..., Tensor]) -> Callable[..., float]:
        def value(n: int, *at: Coord) -> float:
            stream = plain(name, rows()[n])["resid_post", 2][rows()[n].last]
            return toward(n, folded(name, vectors(n, *at), stream))

        return value

    def at_last(n: int, site: str, layer: Coord) -> Tensor:
        return plain(name, rows()[n])[site, int(layer)][rows()[n].last]

    for key, (site, axes) in ATTRIBUTED.items():
        word = site.split()[0]
        values = table(
            product(LAYERS) if axes else [()],
            direct(lambda n, *at, word=word: at_last(n, word, *(at or (0,)))),
            count,
        )
        agree(seen[key], axes, values, None, large=0.05)
    values = table(product(LAYERS), direct(lambda n, layer: at_last(n, "resid_post", layer)), count)
    agree(seen["stream"], ("layer",), values, None, large=0.05)
    if "heads" in seen:
        values = table(
            product(LAYERS, HEADS),
            direct(lambda n, layer, head: at_last(n, "head_out", layer)[int(head)]),
            count,
        )
        agree(seen["heads"], ("layer", "head"), values, None, large=0.05)
    every = [seen[key].measures[0].patched.sum(axis=0) for key in ATTRIBUTED]
    np.testing.assert_allclose(
        seen["joined"].measures[0].patched[0], every[2], atol=1e-4, rtol=1e-4
    )
    norm, head = end_of(name)
    bias = getattr(norm, "bias", None)
    rest = torch.zeros(head.weight.shape[0]).double() if bias is None else head.weight @ bias
    rest = rest if head.bias is None else rest + head.bias
    for n, text in enumerate(rows()):
        logits = plain(name, text).logits[-1]
        cap = double(name).config.to_dict().get("final_logit_softcapping")
        logits = logits if cap is None else cap * torch.atanh(logits / cap)
        total = sum(float(part[n]) for part in every) + toward(n, rest.detach())
        assert abs(total - toward(n, logits)) < 1e-4


@pytest.mark.parametrize("name", LENS)
def test_logit_lens_equals_final_norm_and_unembedding(data: Path, name: str) -> None:
    hold_ends(data, name, "planned")


@pytest.mark.parametrize("name", LENS)
def test_direct_logits_of_components_sum_to_the_logit(data: Path, name: str) -> None:
    hold_parts(data, name, "planned")


@pytest.mark.slow
def test_logit_lens_and_direct_logits_equal_the_reference_without_planner(data: Path) -> None:
    hold_ends(data, "llama", "plain")
    hold_parts(data, "llama", "plain")


# --- listed tokens --------------------------------------------------------------------------------

TOP = 4


def by_rows(rows_of: Sequence[Sequence[Tensor]]) -> tuple[list[int], list[tuple[float, float]]]:
    """Tokens by mean probability, from [vocab] of each run of each row; with that probability and
    the share of rows in which each is first."""
    vocabulary = rows_of[0][0].shape[-1]
    means, firsts = np.zeros(vocabulary), np.zeros(vocabulary)
    for each in rows_of:
        for logits in each:
            shares = logits.softmax(-1).numpy()
            means += shares / len(each) / len(rows_of)
            firsts[shares.argmax()] += 1 / len(each) / len(rows_of)
    best = sorted(range(vocabulary), key=lambda one: -means[one])[:TOP]
    return best, [(means[one], firsts[one]) for one in best]


def _id(text: str) -> int:
    special = list(families.SPECIAL)
    return special.index(text) if text in special else token(text)


def hold_lists(data: Path, name: str, mode: str) -> None:
    patch = ("from longer into clean", "patch resid_post layer 0 at cue token")
    look = f"observe logit_lens resid_post layer * at each token of subject top {TOP}"
    text = experiment("plain", look, measure="")
    text += experiment("narrow", look, measure="measure logit(answer) as raw")
    end = f"observe logit_lens resid_post layer * at last token top {TOP}"
    text += experiment("patched", *patch, end, measure="")
    text += experiment("unlisted", end.removesuffix(f" top {TOP}"), measure="")
    seen = run_file(text, data, name, mode)
    for key in ("plain", "narrow", "patched"):
        assert len(seen[key].cells) == (3 if key == "patched" else 9)
        for cell in seen[key].cells:
            layer = int(cell.coords["layer"])
            every: list[list[Tensor]] = []
            for n, own in enumerate(rows()):
                if key == "patched":
                    run = side_by_side(name, double(name), own.ids, [(patched(CUE)(name, n), [])])
                    vectors = [run[0]["resid_post", layer][own.last]]
                else:
                    places = list(parts_of_span(tokens(own, "subject tokens"), str(cell.position)))
                    vectors = list(plain(name, own)["resid_post", layer][places])
                every += [[by_lens(name, each) for each in vectors]] if len(vectors) else []
            best, shares = by_rows(every)
            assert [_id(text.strip()) for text in cell.listed] == best
            np.testing.assert_allclose(cell.shares, shares, atol=1e-5)
    everywhere = [cell.listed for cell in seen["plain"].cells]
    assert len(set(everywhere)) > 3, "all cells have the same tokens"
    assert any(0 < first < 1 for cell in seen["plain"].cells for _, first in cell.shares)
    assert not any(cell.listed for cell in seen["unlisted"].cells)
    assert "mean probability" in seen["plain"].conventions["top tokens"]
    assert "top tokens" not in seen["unlisted"].conventions
    values = [seen[key].measures[0].patched for key in ("patched", "unlisted")]
    assert np.abs(values[0] - values[1]).max() > 1e-3


@pytest.mark.parametrize("name", LENS)
def test_listed_tokens_equal_the_reference(data: Path, name: str) -> None:
    hold_lists(data, name, "planned")


def test_listed_tokens_equal_the_reference_without_planner(data: Path) -> None:
    hold_lists(data, "gpt2", "plain")


# --- tuned lens -----------------------------------------------------------------------------------


def lens_of(
    data: Path, name: str, layers: Sequence[int] = (0, 1), other: dict[str, Tensor] | None = None
) -> str:
    """The name of a file with translators of these layers."""
    width = double(name).get_output_embeddings().weight.shape[1]
    draw = torch.Generator().manual_seed(5)
    found: dict[str, Tensor] = {}
    for layer in layers:
        found[f"layer.{layer}.weight"] = torch.randn(width, width, generator=draw) * 0.4
        found[f"layer.{layer}.bias"] = torch.randn(width, generator=draw)
    found.update(other or {})
    written = f"lens of {name} {len(layers)} {' '.join(other or ())}.safetensors"
    save_file(found, data / written)
    return written


def hold_tuned(data: Path, name: str, mode: str) -> None:
    written = lens_of(data, name)
    look = f'observe tuned_lens("{written}") resid_post layer * at'
    text = experiment("two", f"{look} last token, cue token").replace(" as delta", " as raw")
    text += experiment("alone", f"{look} last token as tuned", measure="")
    seen = run_file(text, data, name, mode)
    saved = {key: value.double() for key, value in load_file(data / written).items()}

    def through(vector: Tensor, layer: Coord) -> Tensor:
        if layer == 2:
            return by_lens(name, vector)
        vector = vector.flatten()
        moved = saved[f"layer.{layer}.weight"] @ vector + saved[f"layer.{layer}.bias"]
        return by_lens(name, vector + moved)

    values = table(
        product(LAYERS, (LAST, CUE)),
        lambda n, layer, at: toward(n, through(of_site("resid_post", name, n, layer, at), layer)),
        len(rows()),
    )
    agree(seen["two"], ("layer", "position"), values, None)
    alone = table(
        product(LAYERS),
        lambda n, layer: float(
            through(of_site("resid_post", name, n, layer), layer).softmax(-1).max()
        ),
        len(rows()),
    )
    agree(seen["alone"], ("layer",), alone, None, large=0.02, most=False)
    digest = sha256((data / written).read_bytes()).hexdigest()
    assert seen["alone"].hashes[f"file {written}"] == digest
    assert digest[:12] in " ".join(seen["alone"].conventions.values())
    assert "is used unchanged" in seen["alone"].conventions["last layer"]


@pytest.mark.parametrize("name", LENS)
def test_tuned_lens_equals_the_reference(data: Path, name: str) -> None:
    hold_tuned(data, name, "planned")


def test_tuned_lens_equals_the_reference_without_planner(data: Path) -> None:
    hold_tuned(data, "gpt2", "plain")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("tuned_lens", "needs a file"),
        ("tuned_lens(3)", "needs a file"),
        ('tuned_lens("nowhere.safetensors")', "can't be read"),
        ('tuned_lens("text")', "is not a safetensors file"),
        ('tuned_lens("one")', "has no `layer.1.weight`"),
        ('tuned_lens("narrow")', "has the shape [5] in `layer.1.bias`"),
        ('tuned_lens("half")', "has no `layer.2.weight`"),
    ],
)
def test_invalid_tuned_lens_file_is_an_error(data: Path, said: str, reason: str) -> None:
    files = {
        '"one"': lens_of(data, "llama", (0,)),
        '"narrow"': lens_of(data, "llama", (0, 1), {"layer.1.bias": torch.ones(5)}),
        '"half"': lens_of(data, "llama", (0, 1), {"layer.2.bias": torch.ones(20)}),
    }
    (data / "text").write_text("no tensors")
    for key, file in files.items():
        said = said.replace(key, f'"{file}"')
    text = experiment("e", f"observe {said} resid_post layer * at last token", measure="")
    result, problems = try_file(text, data, "llama")
    assert result is None
    (problem,) = [each for each in problems if each.severity == "error"]
    assert (problem.code, reason in problem.message + problem.label_text) == ("E0207", True)


def test_tuned_lens_file_that_changed_after_the_check_is_an_error(data: Path) -> None:
    written = data / lens_of(data, "llama")
    digest = sha256(written.read_bytes()).hexdigest()
    assert load_translator(str(written), digest, 1)[1].shape == (20,)
    with pytest.raises(ValueError, match="has changed"):
        load_translator(str(written), "0" * 64, 1)


def test_overwritten_tuned_lens_file_is_read_again(data: Path) -> None:
    """The cache within one process depends on the file's content."""
    found: list[Any] = []
    for factor in (0.0, 1.0):
        width = double("llama").get_output_embeddings().weight.shape[1]
        square = torch.eye(width) * factor
        square[0, 1] = factor
        saved = {"layer.0.weight": square, "layer.0.bias": torch.ones(width) * factor}
        save_file(saved, data / "again.safetensors")
        look = 'observe tuned_lens("again.safetensors") resid_post layer 0 at last token'
        seen = run_file(experiment("e", look, measure=""), data, "llama", "planned")
        found.append(seen["e"].measures[0].patched)
    assert np.abs(found[0] - found[1]).max() > 1e-3


# --- effects of rules on observations -------------------------------------------------------------


def direct(name: str, run: Run, text: Any, n: int) -> float:
    stream, out = run["resid_post", 2][text.last], run["mlp_out", 2][text.last]
    return toward(n, folded(name, out, stream))


CHANGED: dict[str, tuple[str, str, Callable[..., float]]] = {
    "lengths": (
        "observe norm resid_post layer 2 at last token as lengths",
        "lengths",
        lambda name, n, run, text: norm(run["resid_post", 2][text.last]),
    ),
    "entropies": (
        "observe entropy pattern layer 2 at last token as entropies",
        "entropies",
        lambda name, n, run, text: mean([spread(w) for w in run["pattern", 2][text.last]]),
    ),
    "attn": (
        "observe attention layer 2 head 1 from last token to cue token as attn",
        "2 * attn",
        lambda name, n, run, text: 2 * float(run["pattern", 2][text.last, 1, tokens(text, CUE)[0]]),
    ),
    "paid": (
        "observe received pattern layer 2 head 3 at cue token as paid",
        "paid",
        lambda name, n, run, text: later(run["pattern", 2][:, 3], tokens(text, CUE)[0]),
    ),
    "neuron": (
        "observe value mlp_hidden layer 2 neuron 4 at last token as unit_4",
        "unit_4",
        lambda name, n, run, text: float(run["mlp_hidden", 2][text.last, 4]),
    ),
    "lens": (
        "observe logit_lens resid_pre layer 2 at last token as lens",
        "logit(answer) - logit(wrong)",
        lambda name, n, run, text: toward(n, by_lens(name, run["resid_pre", 2][text.last])),
    ),
    "parts": (
        "observe direct_logit mlp_out layer 2 toward answer - wrong at last token as parts",
        "parts",
        lambda name, n, run, text: direct(name, run, text, n),
    ),
}
"""Line, measure, reference of one run."""


def hold_changes(data: Path, name: str, mode: str) -> None:
    patch = ("from longer into clean", "patch resid_post layer 0..1 at cue token")
    text = ""
    for key, (line, measure, _) in CHANGED.items():
        text += experiment(f"e_{key}", *patch, line, measure=f"measure {measure} as delta")
    seen = run_file(text, data, name, mode)
    for key, (_, _, value) in CHANGED.items():
        whole, largest = seen[f"e_{key}"], 0.0
        (measure,) = [each for each in whole.measures if each.effect == "delta"]
        found = measure.patched - measure.base
        assert found.shape == (2, len(rows()))
        for layer, n in product((0, 1), range(len(rows()))):
            own = rows()[int(n)]
            changes = taken(name, int(n), "longer", [End("resid_post", int(layer))], CUE)
            (run,) = side_by_side(name, double(name), own.ids, [(changes, [])])
            after, before = (value(name, int(n), each, own) for each in (run, plain(name, own)))
            close = max(1e-4, 1e-3 * abs(after - before))
            assert abs(found[int(layer), int(n)] - (after - before)) < close
            largest = max(largest, abs(after - before))
        assert largest > 0.02, f"nothing is changed of {key}"
        mean = whole.statistics[list(whole.measures).index(measure)].mean
        np.testing.assert_allclose(mean, found.mean(axis=1), atol=1e-6)
        assert "without the rules" in whole.conventions["effects of observations"]


@pytest.mark.parametrize("name", LENS)
def test_effects_on_observations_equal_the_reference(data: Path, name: str) -> None:
    hold_changes(data, name, "planned")


def test_effects_on_observations_equal_the_reference_without_planner(data: Path) -> None:
    hold_changes(data, "gpt2", "plain")


@pytest.mark.parametrize(("mode", "name"), in_turn(list(MODES), LENS[:3]))
def test_kl_of_a_logit_lens_to_a_run_equals_the_reference(data: Path, name: str, mode: str) -> None:
    """Other measures read few logits; those of the run are complete nevertheless."""
    look = "observe logit_lens resid_post layer * at last token"
    text = experiment("lens", look, measure="measure kl(longer) as raw")
    text += experiment("narrow", measure="measure logit(answer) - logit(wrong) as raw")
    (measure,) = run_file(text, data, name, mode)["lens"].measures
    for n, layer in product(range(len(rows())), LAYERS):
        other = plain(name, rows("longer")[int(n)]).logits[-1].log_softmax(-1)
        lens = by_lens(name, of_site("resid_post", name, int(n), layer)).log_softmax(-1)
        wanted = float((other.exp() * (other - lens)).sum())
        assert abs(measure.patched[int(layer), int(n)] - wanted) < max(1e-4, 1e-3 * wanted)
        assert wanted > 0.01 or layer == LAYERS[-1]


def test_delta_of_an_observation_uses_the_base_value_of_its_cell(data: Path) -> None:
    """The base run has the axes of the observation, not those of the rule."""
    patch = ("from longer into clean", "patch resid_post layer 0..1 at cue token")
    look = "observe entropy pattern layer 2 head * at last token, cue token, item 1 token as"
    text = experiment("e", *patch, f"{look} spread", measure="measure spread as delta")
    text += experiment("b", f"{look} alone", measure="")
    seen = run_file(text, data, "llama", "planned")
    (alone,), (changed,) = seen["b"].measures, seen["e"].measures
    base = {
        (cell.coords["head"], cell.coords["position"]): alone.patched[n]
        for n, cell in enumerate(seen["b"].cells)
    }
    assert (len(base), changed.base.shape[0]) == (12, 24)
    for n, cell in enumerate(seen["e"].cells):
        wanted = base[cell.coords["head"], cell.coords["position"]]
        np.testing.assert_allclose(changed.base[n], wanted, atol=1e-5)
    assert len({tuple(row.round(4)) for row in alone.patched}) == 12


# --- comparisons of two observations --------------------------------------------------------------


def test_expectation_compares_two_observations(data: Path) -> None:
    patch = ("from longer into clean", "patch resid_post layer 0 at cue token")
    look = (
        "observe norm resid_post layer * at last token as one",
        "observe entropy pattern layer * head * at last token as two",
        "measure logit(answer) as delta",
    )
    expect = (
        "expect mean(one) > mean(two, layer 1..2)",
        "expect two(L1H2) > mean(one) + 100",
        "expect delta > mean(raw of two)",
    )
    other = "expect max(two) > mean(raw)"
    text = experiment("look", *patch, *look, *expect, measure="")
    text += experiment("other", other, measure="measure prob(answer) as raw")
    seen = run_file(text, data, "llama", "planned")
    one, two, base = (seen[name].measures[0].patched for name in ("look.one", "look.two", "look"))
    delta = base - seen["look"].measures[0].base
    alone = seen["other"].measures[0].patched
    values = {
        "look.one": [one.mean() - two[4:].mean()],
        "look.two": [two[6].mean() - one.mean() - 100, delta.mean() - two.mean()],
        "other": [two.mean(axis=1).max() - alone.mean()],
    }
    for name, own in values.items():
        found = [each.value for each in seen[name].outcomes]
        assert found == pytest.approx(own, abs=1e-6)


# --- errors ---------------------------------------------------------------------------------------

LENS_AT = "observe logit_lens resid_post layer 1 at last token"


@pytest.mark.parametrize(
    ("lines", "measure", "code"),
    [
        (("observe nrm resid_post layer 1 at last token",), "", "E0203"),
        (("observe nrm resid_post layer 1 at last token as size",), "", "E0203"),
        (("observe norm resid_post layer 1",), "", "E0207"),
        (("observe norm resid_post layer 1 toward answer at last token",), "", "E0207"),
        (("observe norm resid_post layer 1 at last token with cue token",), "", "E0207"),
        (("observe value z layer 1 head 0 at last token",), "", "E0207"),
        (("observe entropy z layer 1 head 0 at last token",), "", "E0207"),
        (("observe logit_lens z layer 1 head 0 at last token",), "", "E0207"),
        (("observe logit_lens embed at last token",), "", "E0207"),
        (("observe logit_lens head_out layer 1 at last token",), "", "E0207"),
        (("observe logit_lens resid_post layers 0..1 at last token",), "", "E0207"),
        ((LENS_AT,), "measure logit(answer) at cue token as raw", "E0612"),
        ((LENS_AT,), "measure loss as raw", "E0612"),
        ((LENS_AT,), "measure cosine(resid_post layer 1, clean) as raw", "E0612"),
        (
            ("from longer into clean", "patch embed at cue token", LENS_AT),
            "measure logit(answer) as recovery",
            "E0612",
        ),
        (("observe norm embed at last token as one",), "measure one as relative", "E0612"),
        (("observe norm embed at last token as one",), "measure one as delta", "E0611"),
        (
            ("observe attention layer 1 head 1 from last token to cue token",),
            "measure attention as delta",
            "E0611",
        ),
        (("observe direct_logit attn_out layer 1 at last token",), "", "E0207"),
        (
            (
                "observe norm embed at last token as one",
                "observe norm embed at cue token as two",
            ),
            "measure one - two as raw",
            "E0207",
        ),
        (("observe norm embed at last token as prob",), "", "E0207"),
        (("observe distance(0) pattern layer 1 head 0 at last token",), "", "E0207"),
        (("observe received pattern layer 1 head 0 at last token",), "", "E0310"),
        (("observe received(50..60) pattern layer 1 head 0 at cue token",), "", "E0310"),
        (("observe received(0..3) pattern layer 1 head 0 at cue token",), "", "E0207"),
        (("observe received(3) pattern layer 1 head 0 at cue token",), "", "E0207"),
        (("observe received(3..2) pattern layer 1 head 0 at cue token",), "", "E0207"),
        (("observe received z layer 1 head 0 at cue token",), "", "E0207"),
        (("observe received pattern layer 1 at {cue token, token 1}",), "", "E0207"),
        (("observe received pattern layer 1",), "", "E0207"),
        (("observe distance(2, 3) pattern layer 1 head 0 at last token",), "", "E0207"),
        (("observe distance(w: 3) pattern layer 1 head 0 at last token",), "", "E0207"),
        (('observe tuned_lens("x") resid_post layer 1 at last token',), "", "E0207"),
        (
            ("observe norm embed at last token", "observe norm embed at cue token"),
            "",
            "E0209",
        ),
    ],
)
def test_invalid_observations_are_errors(
    data: Path, lines: Sequence[str], measure: str, code: str
) -> None:
    found = codes(experiment("e", *lines, measure=measure), data)
    assert [each for each in found if each.startswith("E")] == [code]


def test_direct_logit_of_heads_before_an_output_norm_is_an_error(data: Path) -> None:
    text = experiment("e", f"observe direct_logit layer 0 head 0 {DIRECT}", measure="")
    assert "E0108" in codes(text, data, "gemma2")
    fine = experiment("e", f"observe direct_logit attn_out layer 0 {DIRECT}", measure="")
    assert run_file(fine, data, "gemma2", "planned")


@pytest.mark.parametrize(
    ("what", "place"),
    [
        ("norm", "last token"),
        ("norm", "reply token 1"),
        ("rank", "last token"),
    ],
)
def test_observation_of_top_zero_is_an_error(what: str, place: str, data: Path) -> None:
    ranked = experiment("r", "ablate layer 1 head * at last token with zero")
    line = f"for k in 0..1 {{ observe {what} top k of r at {place} as x }}"
    lines = [line, *(["generate 2"] if "reply" in place else [])]
    text = ranked + experiment("seen", *lines, measure="", stats="")
    result, found = try_file(text, data, "llama")
    assert [each.code for each in found if each.severity == "error"] == ["E0332"]
    assert result is None or "seen" not in [each.name for each in result.experiments]
