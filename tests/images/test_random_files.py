"""Random experiments on images, and on texts scored with images: planned execution equals full
forward passes, one cell at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import event
from hypothesis import strategies as st
from PIL import Image

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import PASS_NAMES
from mechdsl.results.experiment_result import FileResult

from ..execute.drawn import Case, both_ways, few, many, same
from ..execute.support import run_on
from . import support, texts
from .cases import FUNCTIONS
from .support import CLASSIFIERS, DUALS, FRONT, GRID, LAYERS, MORE

BLOCKS = """
images scenes {
  rows "boxes.jsonl"
  image "{file}"
  region object = box
  region part = mask
  answer "{label}"
  wrong "{other}"
  corrupt hidden { mask object }
  corrupt blurred { blur image radius 2 }
  corrupt noisy { noise object by 80 }
  corrupt both { blur part radius 1  noise image by 20 }
  corrupt another { file = elsewhere  mask = mask_there }
  corrupt patched { mask image row 2..3 col 1..2 tokens }
}
images drawn {
  label in ["circle", "square", "cross"]
  image shapes(n: 1, kind: label, size: 24)
  region object = mask
  answer "{label}"
  wrong "ring"
}
images neutral { image gray }
images dark { image gray(40) }
images speckled { image noise }
images average { image mean of scenes }
group few = L0H1, L2H0, L1.mlp
direction d = mean_difference(scenes, neutral) at resid_post layer 1 at image tokens
direction by_layer = mean_difference(scenes.noisy, scenes) at resid_pre layer 0..1 at FRONT
"""
WITH_TEXTS = BLOCKS.replace(
    'answer "{label}"', 'answer "a photo of a {label}"  classes "a photo of a {label}"'
).replace('wrong "', 'wrong "the ')
CAPTIONS = """
prompts captions {
  rows "texts.jsonl"
  image from scenes
  template "{before} {thing}{behind}"
  corrupt changed { thing = other_thing }
  corrupt noisy { add gaussian(std: 0.5) to embed at thing tokens }
}
prompts elsewhere {
  rows "texts.jsonl"
  image from neutral
  template "the photo of {other_thing} and a {thing}"
}
group few = L0H1, L2H0, L1.mlp
direction d = mean_difference(captions, elsewhere) at resid_post layer 1 at token -1
direction by_layer = mean_difference(captions.changed, captions) at resid_pre layer 0..1 at FRONT
"""


@dataclass(frozen=True)
class Words:
    """The parts of random files for one type of row."""

    blocks: str
    experiment: tuple[str, ...]
    """Lines that name the blocks of an experiment."""
    runs: tuple[str, ...]
    others: tuple[str, ...]
    """Further blocks whose activations are patched."""
    one: tuple[str, ...]
    joined: tuple[str, ...]
    swept: tuple[str, ...]
    measures: tuple[str, ...]
    fills: tuple[str, ...]
    towers: tuple[str, ...] = ("",)
    """Prefixes of `layer` that name a tower."""


COMMON = (
    "measure prob(answer) as raw",
    "measure logprob(answer) as delta",
    "measure kl(clean) as raw",
    "measure rank(answer) as raw",
    "measure entropy as delta",
    "measure correct as raw",
)
IMAGES = Words(
    BLOCKS,
    experiment=(*["images scenes"] * 4, "images scenes limit 2", "images scenes, drawn"),
    runs=("clean", "hidden", "blurred", "noisy", "both", "another", "patched"),
    others=("neutral", "dark", "speckled", "average"),
    one=("FRONT", "image row 2 col 3 token", "image row 4 col 1 token"),
    joined=(
        "image tokens",
        "object tokens",
        "part tokens",
        "tokens *",
        "image row 2..3 col * tokens",
        "image row * col 4 tokens",
        "{FRONT, image row 1 col 2 token}",
    ),
    swept=(
        "each token of image",
        "each token of object",
        "image row 2 col * token",
        "image row 1..2 col 3..4 token",
        "FRONT, image row 3 col 3 token",
    ),
    measures=(
        support.DIFFERENCE,
        *COMMON,
        "measure cosine(resid_post layer 1, clean) at image row 2 col 2 token as raw",
    ),
    fills=("mean", "mean of neutral", "resample of drawn"),
)
TILED = replace(
    IMAGES,
    blocks=BLOCKS.replace("  region object", "  tiles 2 by 1\n  region object", 1),
    experiment=(*["images scenes"] * 4, "images scenes limit 3"),
)
"""Some tiles contain no part of a region."""
SCORED = replace(
    IMAGES,
    blocks=WITH_TEXTS,
    measures=(*IMAGES.measures, support.OF_SCORES, 'measure score("the red ring") as raw'),
    towers=("", "vision "),
)
"""Images scored with texts."""
TEXTS = Words(
    support.BLOCKS + CAPTIONS,
    experiment=(*["prompts captions"] * 3, "prompts captions limit 2"),
    runs=("clean", "changed", "noisy"),
    others=("elsewhere",),
    one=("FRONT", "token 1", "first token of thing"),
    joined=("thing tokens", "tokens *", "token 1..2", "{FRONT, token 1}"),
    swept=("each token of thing", "token 0..2", "FRONT, last token of thing"),
    measures=(
        *["measure score as delta"] * 3,
        *(line.replace("answer", "image") for line in COMMON),
        "measure cosine(resid_post layer 1, clean) at token -1 as raw",
    ),
    fills=("mean", "mean of elsewhere", "resample of elsewhere"),
    towers=("", "text "),
)
VECTORS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "attn_norm", "mlp_norm")
HEADS = ("q", "k", "v", "z", "head_out", "scores", "pattern")


def write(folder: Path) -> None:
    """Write images, a box and a mask for each, and texts."""
    support.write_images(folder)
    texts.write(folder)
    random = np.random.default_rng(7)
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for number, record in enumerate(records):
        height, width = support.SIZES[number]
        corner = [width // 4, height // 3]
        record["box"] = [*corner, corner[0] + width // 2, corner[1] + height // 3]
        record["mask"] = f"mask{number}.png"
        mask = random.integers(0, 8, (height, width)) == 0
        Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(folder / record["mask"])
        there = (number + 1) % len(records)
        record |= {"elsewhere": f"{there}.png", "mask_there": f"mask{there}.png"}
    (folder / "boxes.jsonl").write_text("\n".join(map(json.dumps, records)))


@st.composite
def positions(draw: Any, words: Words, *, swept: bool = True) -> str:
    kinds = [words.one, words.joined, words.joined, *([words.swept] if swept else [])]
    return draw(st.sampled_from(draw(st.sampled_from(kinds))))


@st.composite
def axis(draw: Any, words: Words, word: str, size: int, *, swept: bool) -> str:
    low = draw(st.integers(0, size - 1))
    high = draw(st.integers(low, size - 1))
    if word == "layer":
        word = draw(st.sampled_from(words.towers)) + word
    joined = [f"{word}s {low}..{high}", f"{word}s *", f"{word} {low}"]
    return draw(st.sampled_from([*joined, *([f"{word} *", f"{word} {low}..{high}"] * swept)]))


@st.composite
def sites(draw: Any, words: Words, *, swept: bool) -> str:
    kind = draw(st.sampled_from(["vector", "vector", "head", "neuron", "embed", "few", "L1H2.q"]))
    if kind not in ("vector", "head", "neuron"):
        return kind
    layer = draw(axis(words, "layer", LAYERS, swept=swept))
    if kind == "vector":
        return f"{draw(st.sampled_from(VECTORS))} {layer}"
    if kind == "neuron":
        return f"mlp_hidden {layer} neurons 1..{draw(st.integers(2, 9))}"
    return f"{draw(st.sampled_from(HEADS))} {layer} {draw(axis(words, 'head', 4, swept=swept))}"


@st.composite
def edges(draw: Any, words: Words, *, swept: bool) -> str:
    layer = draw(axis(words, "layer", LAYERS, swept=swept))
    head = draw(st.sampled_from(["", " head 1", " heads 0..2"]))
    queries = draw(st.sampled_from((*words.one, *words.joined)))
    return f"attention {layer}{head} from {queries} to {draw(positions(words, swept=swept))}"


@st.composite
def rules(draw: Any, words: Words, *, swept: bool) -> str:
    site, at = draw(sites(words, swept=swept)), draw(positions(words, swept=swept))
    along = draw(st.sampled_from(["d", "by_layer", "by_layer[layer 0]"]))
    stream = f"{draw(st.sampled_from(VECTORS))} {draw(axis(words, 'layer', LAYERS, swept=swept))}"
    run = draw(st.sampled_from((*words.runs, *words.others)))
    fills = ["zero", "resample", "mean by kind", *words.fills, *["zero, resample"] * swept]
    number = draw(st.sampled_from(["-1", "0", "2.5"]))
    layer = draw(st.integers(0, LAYERS - 1))
    edge = draw(edges(words, swept=swept))
    return draw(
        st.sampled_from(
            [
                *[f"patch {site} at {at}"] * 4,
                f"patch {site} at {at} with {run}",
                f"patch {site} at {at} onto {draw(st.sampled_from(words.one))}",
                f"patch {site} at {at} into layer {layer}",
                f"ablate {site} at {at} with {draw(st.sampled_from(fills))}",
                f"swap {site} at {at} with {draw(st.sampled_from(words.one))}",
                f"freeze {site} at {at}",
                f"set {site} at {at} to {number}",
                f"set {site} at {at} to 2 * value(mlp_out layer {layer}) of {run}",
                f'set {site} at {at} to python("own.py:turned")',
                f"add {number} * {along} to {stream} at {at}",
                f"add value(attn_out layer {layer}) of {run} to {site} at {at}",
                f"add 0.5 * step(q) to q layer {layer} head 1 at {at}",
                f"scale {site} at {at} by {number}",
                f"project out {along} from {stream} at {at}",
                f"clamp {along} of {stream} at {at} to {number}",
                f"block {edge}",
                f"reweight {edge} by 3",
                f"set {edge} to {draw(st.sampled_from(['uniform', '0.04']))}",
                f"replace block layer {layer} with "
                f"{draw(st.sampled_from(['identity', 'block layer 0']))}",
                f"observe {edge}",
                f"observe norm {site} at {at}",
                f"observe entropy pattern layer {layer} at {at}",
            ]
        )
    )


@st.composite
def alone(draw: Any, words: Words) -> str:
    """A loop or a path rule, which must be the only rule."""
    site, at = draw(sites(words, swept=False)), draw(positions(words, swept=False))
    vector = draw(st.sampled_from(("embed", "resid_pre layer 1", "mlp_out layer *", "L0H1")))
    end = draw(st.sampled_from(("logits", "q layer 2 head *", "v layer 1 heads *", "mlp_norm L")))
    way = draw(st.sampled_from(("", " through mlps", " with frozen norms")))
    return draw(
        st.sampled_from(
            [
                f"for a in 0..2 {{ for b in a..2 {{ patch resid_post layers a..b at {at} }} }}",
                f"for w in [1, 2] {{ patch mlp_out layer * window w at {at} }}",
                f"for c in [attn_out, mlp_out, z] {{ patch c layer * at {at} }}",
                f"for c in [-2, 0.5] {{ add c * d to {site} at {at} }}",
                f"path {vector} -> {end.replace(' L', ' layer 1..2')} at {at}{way}",
            ]
        )
    )


@st.composite
def experiments(draw: Any, words: Words) -> str:
    """An experiment with one to three rules, of which the first may sweep."""
    source, base = draw(st.permutations((*words.runs, *words.runs, *words.others)))[:2]
    lines: list[str] = []
    if draw(st.integers(0, 3)) == 0:
        lines.append(f"run made {{ from {source} into {base} {draw(rules(words, swept=False))} }}")
        source, base = draw(st.sampled_from([("made", base), (source, "made")]))
    if draw(st.integers(0, 3)) == 0:
        which = draw(st.sampled_from((base, "clean", "noisy")))
        lines.append(
            f'save resid_post layer * of {which} at {draw(positions(words))} to "a.safetensors"'
        )
    lines.append(f"from {source} into {base}")
    if draw(st.integers(0, 4)) == 0:
        lines.append(draw(alone(words)))
    else:
        count = draw(st.integers(1, 3))
        lines += [draw(rules(words, swept=number == 0)) for number in range(count)]
    measures = draw(st.lists(st.sampled_from(words.measures), min_size=1, max_size=2, unique=True))
    on = draw(st.sampled_from(words.experiment))
    more = draw(st.sampled_from(["", "", "against random(2)"]))
    text = written(on, "e", *lines, *measures, more)
    return text + (draw(onward(words)) if draw(st.integers(0, 4)) == 0 else "")


def written(on: str, name: str, *lines: str) -> str:
    every = ("model m", on, *lines, support.STATS)
    return f"experiment {name} {{\n" + "\n".join(f"  {line}" for line in every if line) + "\n}\n"


@st.composite
def onward(draw: Any, words: Words) -> str:
    """A derived experiment at the positions or heads with the largest effects."""
    on, measure, each = words.experiment[0], words.measures[0], words.swept[0]
    first = written(on, "words", f"ablate embed at {each} with zero", measure)
    first += written(on, "heads", "ablate layer * head * at tokens * with zero", measure)
    rule = draw(
        st.sampled_from(
            [
                "ablate embed at top 25% of words tokens with zero",
                "ablate embed at tokens except top 4 of words tokens with zero",
                f"ablate top 3 of heads at {draw(positions(words, swept=False))} with resample",
                "for k in 0%..100% step 50% { ablate embed at top k of words tokens with zero }",
                f"reweight attention top 2 of heads from FRONT to {words.joined[0]} by 4",
            ]
        )
    )
    return first + written(on, "then", rule, measure)


@st.composite
def cases(draw: Any) -> Case:
    words = draw(st.sampled_from((IMAGES, TILED, SCORED, TEXTS)))
    name = draw(st.sampled_from((*CLASSIFIERS, *MORE) if words in (IMAGES, TILED) else DUALS))
    front = "cls token" if FRONT[name] else f"image row {GRID} col {GRID} token"
    front = "token -1" if words is TEXTS else front
    text = (words.blocks + draw(experiments(words))).replace("FRONT", front)
    return name, text, frozenset(draw(st.sets(st.sampled_from(PASS_NAMES), max_size=3)))


def compare(case: Case, tmp_path: Path) -> None:
    """Plain and planned runs give equal results, or both give the same errors."""
    name, text, off = case
    (tmp_path / "own.py").write_text(FUNCTIONS, encoding="utf-8")
    if not (tmp_path / "boxes.jsonl").exists():
        write(tmp_path)
    file = f'mech 1\nmodel m = local("handed over")\n{text}'
    source = Source(file, tmp_path / "file.mech")

    def run(options: RunOptions) -> tuple[FileResult | None, list[Diagnostic]]:
        return run_on(source, {"m": support.shared(name)}, options)

    found = both_ways(run, off, tmp_path)
    if found is None:
        return
    plain, planned = found
    event("run: " + text.split("\n  from ")[1].splitlines()[1].split()[0])
    for one, other in zip(plain.experiments, planned.experiments, strict=True):
        if one.name == "then" and any(map(tied, plain.experiments)):
            event("what is picked depends on rounding")
            break
        same(one, other, text)


def tied(result: Any) -> bool:
    """Whether two cells of a row differ by no more than rounding."""
    values = np.sort(result.measures[0].patched, axis=0)
    return result.name in ("words", "heads") and bool((np.diff(values, axis=0) <= 1e-4).any())


test_random_image_experiment_equals_full_passes = few(cases(), 8)(compare)
test_many_random_image_experiments_equal_full_passes = many(cases(), 300)(compare)
