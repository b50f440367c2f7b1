"""Random experiments from the whole language: plans equal full padded passes.

Files consist of random positions, sites, rules and measures. The checks reject invalid files before
anything runs; all others run twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import event
from hypothesis import strategies as st
from safetensors.torch import save_file

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import PASS_NAMES
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from . import support
from .drawn import Case, both_ways, few, many, same

MORE = """
prompts elsewhere {
  rows "data.jsonl"
  template "w7 {subject} w40 {alt} w41 {cue2} w42"
}
prompts fewer {
  rows "data.jsonl"
  where cue != "w28"
  xs = list(item, from: more, sep: " ")
  template "w41 {xs} w40 {subject} {cue} w42"
  answer " {b}"
  wrong " {a}"
  corrupt other { subject = alt }
  corrupt longer { more = words  cue = cue2 }
  corrupt turned { more = turned }
  corrupt noised { add gaussian(std: 0.5) to embed at subject tokens }
}
prompts single {
  template "w3 w4 w40 w1 w2 w41 w26 w42"
  span subject = "w1 w2"
}
group few = L0H1, L2H0, L1H3
group ends = L2H1.q, L2H0.v, logits
group mlp_and_end = mlp_norm layer 1, final_norm
direction d = mean_difference(p.other, elsewhere) at resid_post layer 1 at last token
direction by_layer = mean_difference(p, p.longer) at resid_pre layer 1..2 at last token
basis parts = pca(p, dims: 3) at resid_post layer 1 at last token
basis axes = random(dims: 4) at resid_pre layer *
basis sparse = sae("sae.safetensors") at resid_post layer 1
basis head_axes = random(dims: 2) at z layer 2 head 1
"""
FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "mistral", "bloom")
RUNS = ("clean", "other", "longer", "turned", "noised")
NOISED = "  corrupt noised { add gaussian(std: 0.5, samples: 2) to embed at subject tokens }\n}\n"
PROMPTS = support.PROMPTS.rstrip().removesuffix("}") + NOISED
LAYERS = 3

ONE = (
    "last token",
    "first token",
    "token -2",
    "subject token",
    "first-item token",
    "last-item token",
    "item 2 token",
    '"w41" token',
    "last-item token + 1",
    "first token of answer",
)
EARLY = ("first token", "subject token", "first-item token", "token 1")
JOINED = (
    "subject tokens",
    "tokens *",
    "{first-item token, last token}",
    "tokens except subject tokens",
    "tokens between first-item token and last-item token",
    "tokens * and answer",
    "answer tokens",
)
SWEPT = (
    "each item token",
    "each token of subject",
    "first-item token, last token",
    "token 1..3",
    "each token of answer",
)
VECTORS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "attn_norm", "mlp_norm")
HEADS = ("q", "k", "v", "z", "head_out", "q_rot", "k_rot", "scores", "pattern")
MEASURES = (
    "measure logit(answer) - logit(wrong) as delta",
    "measure prob(answer) as raw",
    "measure logprob(answer) as delta",
    'measure logprob("w3 w9 w1") as delta',
    "measure kl(clean) as raw",
    "measure prob(answer, wrong) as delta",
    'measure rank(answer, ["w7", wrong]) as raw',
    "measure entropy as delta",
    "measure logit(answer) at subject token as delta",
    "measure cosine(L1.resid, clean) at subject token as raw",
    "measure entropy at each item token as delta",
    "measure loss at token * align right as delta",
    "measure loss at each item token as raw",
)


@st.composite
def positions(draw: Any, *, swept: bool = True) -> str:
    """One position of the language."""
    kinds = [ONE, ONE, JOINED, *([SWEPT] if swept else [])]
    return draw(st.sampled_from(draw(st.sampled_from(kinds))))


@st.composite
def axis(draw: Any, word: str, size: int, *, swept: bool) -> str:
    """`layer 1`, `layers 0..2`, `head *`."""
    low = draw(st.integers(0, size - 1))
    high = draw(st.integers(low, size - 1))
    joined = [f"{word}s {low}..{high}", f"{word}s *", f"{word} {low}"]
    sweeps = [f"{word} *", f"{word} {low}..{high}"]
    return draw(st.sampled_from([*joined, *(sweeps if swept else [])]))


@st.composite
def sites(draw: Any, *, swept: bool) -> str:
    """A component with its axes."""
    kinds = ["vector", "vector", "head", "head", "neuron", "embed", "few", "L1H2.q", "L2.mlp"]
    kind = draw(st.sampled_from(kinds))
    if kind not in ("vector", "head", "neuron"):
        return kind
    layer = draw(axis("layer", LAYERS, swept=swept))
    if kind == "vector":
        return f"{draw(st.sampled_from(VECTORS))} {layer}"
    if kind == "neuron":
        return f"mlp_hidden {layer} neurons 1..{draw(st.integers(2, 9))}"
    return f"{draw(st.sampled_from(HEADS))} {layer} {draw(axis('head', 2, swept=swept))}"


@st.composite
def edges(draw: Any, *, swept: bool) -> str:
    """Layers, heads, queries and keys."""
    layer = draw(axis("layer", LAYERS, swept=swept))
    head = draw(st.sampled_from(["", " head 1", " heads 0..2", "few"]))
    if head == "few":
        layer, head = head, ""
    queries = draw(st.sampled_from((*ONE, "tokens *", "subject tokens")))
    keys = draw(positions(swept=swept))
    return f"attention {layer}{head} from {queries} to {keys}"


@st.composite
def rules(draw: Any, *, swept: bool) -> str:
    """Any rule but a path."""
    verb = draw(
        st.sampled_from(
            [
                *("patch", "patch", "onto", "into", "ablate", "swap", "freeze", "set", "edge"),
                *("observe", "allow", "renumber", "block"),
                *("add", "scale", "project out", "clamp", "project", "basis", "basis"),
            ]
        )
    )
    if verb == "edge":
        what = draw(
            st.sampled_from(
                ["block {}", "reweight {} by 2.5", "set {} to uniform", "set {} to 0.05"]
            )
        )
        return what.format(draw(edges(swept=swept)))
    if verb == "allow":
        back = draw(st.sampled_from(["tokens *", "first token", "first-item token"]))
        where = draw(st.sampled_from(["layers *", "layer 1", "layers 0..1 head 1", "few"]))
        return f"allow attention {where} from {back} to {draw(positions(swept=swept))}"
    if verb == "block":
        which = draw(axis("layer", LAYERS, swept=swept))
        what = draw(st.sampled_from(["identity", "block layer 0", "block layer 2"]))
        return f"replace block {which} with {what}"
    if verb == "renumber":
        return f"renumber {draw(positions(swept=swept))} from {draw(st.integers(0, 40))}"
    if verb == "basis":
        return draw(in_bases(swept=swept))
    if verb == "observe":
        where = f"layer {draw(st.integers(0, LAYERS - 1))} at {draw(positions(swept=swept))}"
        others = [
            f"norm resid_post {where}",
            f"entropy pattern {where}",
            f"distance(2) pattern {where}",
            f"received(1..3) pattern {where.split(' at ')[0]} at {draw(st.sampled_from(EARLY))}",
            "direct_logit layers 0..1 head 1 toward answer at last token",
        ]
        return f"observe {draw(st.sampled_from([draw(edges(swept=swept)), *others]))}"
    site, at = draw(sites(swept=swept)), draw(positions(swept=swept))
    along = draw(st.sampled_from(["d", "by_layer", "by_layer[layer 2]", "(unit(d) - 0.5 * d)"]))
    match verb:
        case "add":
            own = [
                f"value(attn_out layer 1) of {draw(st.sampled_from(RUNS))} to {site} at {at}",
                f"step(q) to q layer {draw(st.integers(0, 2))} head 1 at {at}",
                f"0.5 * step(mlp_out) to mlp_out layers 0..1 at {at}",
            ]
            if draw(st.booleans()):
                return f"add {draw(st.sampled_from(own))}"
            return f"add {draw(st.sampled_from(['', '-2 * ', '0 * ']))}{along} to {site} at {at}"
        case "scale":
            return f"scale {site} at {at} by {draw(st.sampled_from(['-1', '0', '1', '2.5']))}"
        case "project out":
            where = draw(st.sampled_from([f"{site} at {at}", "weights"]))
            return f"project out d from {where}"
        case "project":
            return f"project {site} at {at} onto d"
        case "clamp":
            return f"clamp {draw(st.sampled_from(['d', 'by_layer']))} of {site} at {at} to 2"
        case "onto":
            return f"patch {site} at {at} onto {draw(st.sampled_from(ONE))}"
        case "into":
            return f"patch {site} at {at} into layer {draw(st.integers(0, LAYERS - 1))}"
        case "ablate":
            kinds = ["zero", "mean", "resample", "mean of turned", "resample of elsewhere"]
            fill = draw(st.sampled_from([*kinds, *(["zero, mean, resample"] if swept else [])]))
            return f"ablate {site} at {at} with {fill}"
        case "swap":
            return f"swap {site} at {at} with {draw(st.sampled_from(ONE))}"
        case "set":
            python = 'python("own.py:centred")'
            value = f"2 * value({draw(st.sampled_from(['mlp_out', 'head_out']))} layer 1)"
            value = value.replace("head_out layer 1", "head_out layer 1 head 2")
            read = f"{value} of {draw(st.sampled_from(RUNS))}"
            what = draw(st.sampled_from(["0.5", "-1", "0", python, value, read]))
            return f"set {site} at {at} to {what}"
        case _:
            return f"{verb} {site} at {at}"


@st.composite
def in_bases(draw: Any, *, swept: bool) -> str:
    """A rule on coordinates in a basis, or on features of a dictionary."""
    at = draw(positions(swept=swept))
    name, size = draw(
        st.sampled_from([("parts", 3), ("sparse", 12), ("head_axes", 2), ("sparse", 12)])
    )
    target = draw(axis("feature", size, swept=swept)) + f" of {name}"
    if draw(st.sampled_from([False, False, True])):
        target = f"resid_pre {draw(axis('layer', LAYERS, swept=swept))} in basis axes"
    elif "*" in target and draw(st.booleans()):
        target = "resid_post layer 1 in basis sparse"
    fill = draw(st.sampled_from(["zero", "mean", "resample", "mean of turned"]))
    number = draw(st.sampled_from(["0", "1", "-2.5"]))
    return draw(
        st.sampled_from(
            [
                f"patch {target} at {at}",
                f"patch {target} at {at} onto {draw(st.sampled_from(ONE))}",
                f"ablate {target} at {at} with {fill}",
                f"clamp {target} at {at} to {number}",
                f"scale {target} at {at} by {number}",
                f"add {number} to {target} at {at}",
                f"set resid_post layer 1 at {at} to reconstruction of sparse",
                f"set resid_pre layers * at {at} to reconstruction of axes",
            ]
        )
    )


@st.composite
def paths(draw: Any) -> str:
    """A single path."""
    kinds = ["z", "attn_out", "mlp_out", "resid_post", "embed", "mlp_hidden", "head_out"]
    kind = draw(st.sampled_from(kinds))
    sender = kind
    if kind != "embed":
        sender = f"{kind} {draw(axis('layer', LAYERS, swept=True))}"
    if kind in ("z", "head_out"):
        sender += f" {draw(axis('head', 4, swept=True))}"
    if kind == "mlp_hidden":
        sender += " neurons 0..7"
    to = draw(
        st.sampled_from(
            [
                *("q", "k", "v", "mlp_norm", "mlp_hidden", "attn_norm", "resid_pre"),
                *("logits", "final_norm", "ends", "mlp_and_end"),
            ]
        )
    )
    receiver = to
    if to not in ("logits", "final_norm", "ends", "mlp_and_end"):
        receiver = f"{to} {draw(axis('layer', LAYERS, swept=True))}"
    if to in ("q", "k", "v"):
        receiver += f" {draw(axis('head', 2, swept=True))}"
        receiver = draw(st.sampled_from([receiver, f"{to} few"]))
    if to == "mlp_hidden":
        receiver += " neurons 3..9"
    through = ""
    if to not in ("ends", "mlp_and_end"):
        through = draw(st.sampled_from(["", " through mlps"]))
        through += draw(st.sampled_from(["", "", " with frozen norms"]))
    return f"path {sender} -> {receiver} at {draw(positions())}{through}"


LOOPED = (
    "item i token",
    "item i + 1 of xs tokens",
    "token -i",
    "last token - i",
    "subject token + i",
    "{item i token, last token}",
    "tokens except item i tokens",
    "tokens between item i token and last token",
)


@st.composite
def loops(draw: Any) -> str:
    """A rule within a `for`, whose variable is its amount or sets its positions."""
    at = draw(st.sampled_from(LOOPED))
    site = draw(sites(swept=False))
    inside = draw(
        st.sampled_from(
            [
                f"reweight {draw(edges(swept=False))} by i",
                f"ablate {site} at {at} with {draw(st.sampled_from(['zero', 'resample']))}",
                f"patch {site} at {at}",
                "block attention layers * from token i + 3 to token i",
                f"block attention layer * from {draw(st.sampled_from(ONE))} to {at}",
                "observe attention layer 1 head * from item i + 1 token to item i token",
            ]
        )
    )
    return f"for i in {draw(st.sampled_from(['1..3', '[0, 2]']))} {{ {inside} }}"


@st.composite
def nests(draw: Any) -> str:
    """A rule in nested loops in which the inner values depend on the outer ones."""
    site = draw(st.sampled_from(["attn_out", "mlp_out", "resid_pre", "k", "z"]))
    at, low = draw(positions(swept=False)), draw(st.sampled_from(["a..2", "[a, 2]", "a..a + 1"]))
    inside = draw(
        st.sampled_from(
            [
                f"patch {site} layers a..b at {at}",
                f"ablate {site} layers 0..b window a at {at} with zero, resample",
                f"reweight attention layers a..b head 1 from {at} to first token by b - a",
                f"scale {site} layer b at {at} by a",
                "block attention layers a - 1..b - 1 from item b token to item a token",
            ]
        )
    )
    return f"for a in 1..2 {{ for b in {low} {{ {inside} }} }}"


@st.composite
def estimates(draw: Any) -> list[str]:
    """A rule whose effects are estimated by gradients."""
    at, site = draw(positions()), draw(sites(swept=True))
    fill = draw(st.sampled_from(["", "", "zero", "mean", "resample"]))
    rule = f"ablate {site} at {at} with {fill}" if fill else f"patch {site} at {at}"
    kinds = ["gradient", "gradient_input", "integrated_gradients(steps: 2)", "gradient_attention"]
    kind = draw(st.sampled_from(kinds))
    if kind == "gradient_attention":
        layer, to = draw(axis("layer", 3, swept=True)), draw(positions(swept=False))
        rule = f"block attention {layer} {draw(axis('head', 4, swept=True))} from {at} to {to}"
    return [rule, f"using {kind}"]


@st.composite
def experiments(draw: Any) -> str:
    """An experiment with one to three rules; only the first sweeps, as sweeps would collide."""
    source, base, more = draw(st.permutations(RUNS))[:3]
    ends = draw(st.integers(0, 7))
    if ends == 0:
        base = f"{base}, {more}"
    elif ends == 1:
        source = f"{source}, {more}"
    elif ends == 2:
        base = draw(st.sampled_from(["elsewhere", "single"]))
    elif ends == 3:
        source = draw(st.sampled_from(["elsewhere", "single"]))
    match draw(st.integers(0, 9)):
        case 0 | 1:
            lines = [draw(paths())]
            others = draw(st.lists(rules(swept=False), max_size=2))
            lines = draw(st.permutations([*lines, *others]))
        case 2:
            at = draw(positions(swept=False))
            lines = [f"for c in [attn_out, mlp_out, z] {{ patch c layer * at {at} }}"]
        case 3:
            lines = [
                f"for l in 0..1 {{ patch resid_post layer l at {draw(st.sampled_from(ONE))}",
                f"freeze attn_out layer l + 1 at {draw(positions(swept=False))} }}",
            ]
        case 4:
            lines = [draw(draw(st.sampled_from([loops, nests]))())]
        case 5:
            lines = draw(estimates())
        case _:
            count = draw(st.integers(1, 3))
            lines = [draw(rules(swept=number == 0)) for number in range(count)]
            lines += [draw(together())] if draw(st.integers(0, 3)) == 0 else []
            acts = any(not line.startswith("observe") for line in lines)
            lines += draw(changes_seen()) if acts and draw(st.integers(0, 3)) == 0 else []
    source, base, first = draw(defined(source, base))
    measures = draw(st.lists(st.sampled_from(MEASURES), min_size=1, max_size=2, unique=True))
    against = draw(st.sampled_from(["", "", "", "against random(3)"]))
    if lines[-1].startswith("using"):
        raw = ("using gradient", "using gradient_attention")
        effect = "raw" if lines[-1] in raw else "delta"
        measures = [line.rpartition(" as ")[0] + f" as {effect}" for line in measures]
        against = ""
    blocks = draw(st.sampled_from(["prompts p"] * 4 + ["prompts p, fewer", "prompts fewer, p"]))
    text = MORE + support.experiment(
        "e", blocks, *first, f"from {source} into {base}", *lines, *measures, against
    )
    return text + (draw(onward()) if draw(st.integers(0, 3)) == 0 else "")


@st.composite
def defined(draw: Any, source: str, base: str) -> tuple[str, str, list[str]]:
    """(source, base, lines): derived runs, which may be the source or the base, and saved
    activations."""
    lines: list[str] = []
    runs = [source.partition(",")[0], base.partition(",")[0]]
    for name in ("made", "again")[: draw(st.sampled_from([0, 0, 0, 1, 2]))]:
        first, second = draw(st.permutations([*runs, *RUNS]))[:2]
        inner = [draw(rules(swept=False)) for _ in range(draw(st.integers(1, 2)))]
        lines.append(f"run {name} {{ from {first} into {second} {' '.join(inner)} }}")
        runs.append(name)
        match draw(st.integers(0, 3)):
            case 0:
                source = name
            case 1:
                base = name
            case 2:
                lines.append(f"measure kl({name}) as raw")
            case _:
                lines.append(f"patch resid_post layer 2 at last token with {name}")
    for number in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        site, at = draw(sites(swept=True)), draw(positions())
        run, kind = draw(st.sampled_from(runs)), draw(st.sampled_from(["", " as float16"]))
        lines.append(f'save {site} of {run} at {at} to "{number}.safetensors"{kind}')
    return source, base, lines


@st.composite
def changes_seen(draw: Any) -> list[str]:
    """An observation, and the change of it by the rules."""
    at = draw(st.sampled_from(ONE))
    what = ["norm resid_post layer 2", "entropy pattern layer 1", "logit_lens resid_pre layer 2"]
    return [f"observe {draw(st.sampled_from(what))} at {at} as looked", "measure looked as delta"]


@st.composite
def together(draw: Any) -> str:
    """An observation over all rows of a run without rules, or of the weights."""
    at = draw(st.sampled_from(ONE))
    tokens = draw(positions(swept=False))
    return draw(
        st.sampled_from(
            [
                f"observe similarity z layer * head 1 of turned at {tokens} with {at} as seen",
                f"observe similarity resid_post layer * of turned at {tokens} as seen",
                f"observe logit_lens resid_post layer * of turned at {at} top 3 as seen",
                'observe tuned_lens("lens.safetensors") resid_post layer 0..1 of turned '
                f"at {at} as seen",
                f"observe effective_rank resid_post layer * of turned at {tokens} as seen",
                f"observe rank attn_out layers 0..1 of turned at {at} as seen",
                f"observe probe(a, folds: 2) at resid_post layer * of turned at {at} as seen",
                f"observe clusters(2) resid_post layer * of turned at {tokens} as seen",
                "observe clusters(2) resid_post layer * of turned with clean at last token as seen",
                "observe similarity resid_pre layer * of turned with mlp_out layer * "
                "at last token as seen",
                "observe similarity attn_out layer * of turned with clean at last token as seen",
                f"observe cka resid_post layer * of turned with clean at {tokens} as seen",
                "observe copying layer * head 1..2 of turned as seen",
                "observe matching layer 0 head 0..1 of turned as seen",
                "observe singular_values(qk) at layer * head 1..2 of turned top 3 as seen",
                "observe value_vectors layer 1 neuron 0..3 of turned toward answer - wrong top 2 "
                "as seen",
                'observe successor(" w1", " w2", " w3") at layer * head 0 of turned as seen',
                "observe composition(k) at layer * head 0 of turned with layer * head 1 as seen",
            ]
        )
    )


@st.composite
def onward(draw: Any) -> str:
    """Experiments on the sites with the largest effects in others, which are far from zero."""
    measure = "measure logit(answer) - logit(wrong) as delta"
    heads = "ablate z layer * head * at tokens * with zero"
    words = "ablate embed at token 1..4 with zero"
    first = support.experiment("heads", "prompts p", heads, measure)
    second = support.experiment("words", "prompts p", words, measure)
    look = "observe attention layer 1 head 2 from last token to token 1..5 as eyes"
    second += support.experiment("look", "prompts p", look)
    at = draw(positions())
    rule = draw(
        st.sampled_from(
            [
                f"ablate top {draw(st.integers(1, 5))} of heads at {at} with mean",
                f"ablate top 25% of heads at {at} with zero",
                "ablate resid_pre layer * at top 2 of words tokens with zero",
                "ablate embed at tokens except top 50% of words tokens with zero",
                "for k in 0%..100% step 50% { ablate embed at top k of words tokens with zero }",
                "block attention layer * from last token to top 2 of words tokens",
                "ablate resid_pre layer 1 at top 2 of eyes tokens with zero",
                "reweight attention top 3 of heads from last token to subject tokens by 3",
                "for k in 0..2 { block attention top k of heads from last token to token 1..3 }",
            ]
        )
    )
    last = support.experiment("then", "prompts p", rule, draw(st.sampled_from(MEASURES)))
    return first + second + last


@st.composite
def cases(draw: Any) -> Case:
    off = draw(st.sets(st.sampled_from(PASS_NAMES), max_size=3))
    return draw(st.sampled_from(FAMILIES)), draw(experiments()), frozenset(off)


def compare(case: Case, tmp_path: Path) -> None:
    """Assert that plain and planned runs are equal, or rejected with the same messages."""
    family, text, off = case
    model = support.bare(family)
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    save_file(LENS[model.config.hidden_size], tmp_path / "lens.safetensors")
    save_file(DICTIONARIES[model.config.hidden_size], tmp_path / "sae.safetensors")

    def run(options: RunOptions) -> tuple[FileResult | None, list[Diagnostic]]:
        return support.try_file(text, tmp_path, model, options, prompts=PROMPTS)

    found = both_ways(run, off, tmp_path)
    if found is None:
        return
    plain, planned = found
    event("run: " + text.split("\n  from ")[1].splitlines()[1].split()[0])
    event(f"experiments: {len(plain.experiments)}, against: {'against' in text}")
    event(f"runs with rules: {'run made' in text}, files: {len(plain.saved)}")
    for one, other in zip(plain.experiments, planned.experiments, strict=True):
        if one.name == "then" and any(map(tied, plain.experiments)):
            event("what is picked depends on rounding")
            break
        same(one, other, text)


def tied(result: ExperimentResult) -> bool:
    """Whether two tokens of a row differ only by rounding, as do those outside a sliding window."""
    if result.name not in ("words", "look.eyes"):
        return False
    values = np.sort(result.measures[0].patched, axis=0)
    return bool((np.diff(values, axis=0) <= support.ABSOLUTE).any())


OWN = """
def centred(vectors):
    return 2 * vectors.nan_to_num() - vectors.nanmean(0, keepdim=True).nan_to_num()
"""
LENS = {
    width: {
        name: torch.from_numpy(np.random.default_rng(number).normal(0, 0.2, shape))
        for number in range(2)
        for name, shape in (
            (f"layer.{number}.weight", (width, width)),
            (f"layer.{number}.bias", (width,)),
        )
    }
    for width in (20, 24)
}
"""Lenses for models of these widths."""
DICTIONARIES = {
    width: {
        name: torch.from_numpy(np.random.default_rng(width).normal(mean, 0.5, shape)).float()
        for name, mean, shape in (
            ("W_enc", 0, (width, 12)),
            ("b_enc", -4, (12,)),
            ("W_dec", 0, (12, width)),
            ("b_dec", 0, (width,)),
        )
    }
    for width in LENS
}
"""Dictionaries with few active features."""


def test_definitions_are_valid(tmp_path: Path) -> None:
    """Otherwise, every random file would be rejected and nothing compared."""
    model = support.bare("llama")
    save_file(DICTIONARIES[model.config.hidden_size], tmp_path / "sae.safetensors")
    rules = [f"clamp feature 0 of {basis} at last token to 1" for basis in ("parts", "sparse")]
    text = MORE + support.experiment("e", "prompts p", *rules, MEASURES[0])
    result, problems = support.try_file(text, tmp_path, model, prompts=PROMPTS)
    assert result is not None, problems


test_plan_equals_full_forward_passes = few(cases(), 12)(compare)
test_plan_equals_full_forward_passes_on_many_files = many(cases(), 600)(compare)
