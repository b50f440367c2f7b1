"""`using cdt`: contextual decomposition in a file, against plain hooks on the bare model in 64
bits, one unpadded prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertForSequenceClassification

import mechdsl
from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.patching import differentiated_run, estimates, held_passes
from mechdsl.forward.hooks import backward_rules, full_pass
from mechdsl.forward.hooks.backward_rules import RuleNotApplied
from mechdsl.forward.hooks.full_pass import open_rules
from mechdsl.planner.cost import gradient_work
from mechdsl.planner.passes import make_plan
from mechdsl.program.estimators import ContextualDecomposition
from mechdsl.resolve.conflicts import explain_missing_rule
from mechdsl.results.experiment_result import ExperimentResult
from zoo import MODELS

from ..execute.support import (
    MODES,
    ROWS,
    Prompt,
    check_file,
    experiment,
    prompt,
    run_file,
    shared,
    try_file,
)
from ..quick import some
from ..reference.decomposed import Vectors, decompose, decompose_held
from ..reference.gradients import Where, taken
from . import test_dictionaries, test_transcoders
from .models import bare, double
from .test_estimates import (
    LAYERS,
    OF_EXPERTS,
    ONE,
    Cells,
    Key,
    call_metric,
    heads_at_last,
    logits_at_the_end,
    measured,
    read,
    two_places,
    where,
)

FAMILIES = ("gpt2", "llama", "gpt_neox", *some(OF_EXPERTS, ["mixtral"]))
LINES = ("prompts p", "from other into clean", measured(ONE, "delta"))
HEADS = "patch layer * head * at last token"
MLPS = "patch mlp_out layer * at cue token, last token"


def decomposed(family: str, site: str, layer: int, cells: Cells) -> dict[Key, list[float]]:
    """Return the estimates of one layer by cell and prompt."""
    at = where(family, site, layer)
    found: dict[Key, list[float]] = {}
    for record in ROWS:
        base, source = prompt(record, "clean"), prompt(record, "other")
        theirs = read(family, tuple(source.ids), at)
        call = call_metric(family, ONE, base, record, logits_at_the_end(family, tuple(source.ids)))
        for key, places in cells(base, at.units).items():
            written = {place: theirs[place] for place in places}
            found.setdefault(key, []).append(decompose(double(family), call, at, written))
    return found


def compare(result: ExperimentResult, expected: dict[Key, list[float]], layer: int) -> float:
    """Compare the cells of a layer; return the largest absolute value.

    Shares of biases have jumps where both parts of a number are near 0.
    """
    data, largest, seen = result.measures[0], 0.0, 0
    for values, cell in zip(data.patched - data.base, result.cells, strict=True):
        if cell.coords["layer"] == layer:
            key = tuple(cell.coords[axis] for axis in result.axes if axis != "layer")
            np.testing.assert_allclose(values, expected[key], atol=1e-4, rtol=0)
            largest, seen = max(largest, *map(abs, expected[key])), seen + 1
    assert seen == len(expected)
    return largest


@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_cdt_of_heads_and_mlps_equals_plain_hooks(family: str, mode: str, tmp_path: Path) -> None:
    text = experiment("heads", *LINES, HEADS, "using cdt")
    text += experiment("mlps", *LINES, MLPS, "using cdt")
    found = run_file(text, tmp_path, bare(family), MODES[mode])
    largest = 0.0
    for name, site, cells in (("heads", "z", heads_at_last), ("mlps", "mlp_out", two_places)):
        for layer in LAYERS:
            expected = decomposed(family, site, layer, cells)
            largest = max(largest, compare(found[name], expected, layer))
    assert largest > 0.3


def changed_head(family: str, layer: int, own: Prompt, source: Prompt, head: int | None,
                 places: Sequence[int]) -> dict[tuple[int, int], Tensor]:  # fmt: skip
    """Return attention's outputs at positions, with the source's head, or all of its heads."""
    inside = where(family, "z", layer)
    outside = Where(inside.path, "out")
    projection = double(family).get_submodule(inside.path)
    weight = projection.weight if family == "gpt2" else projection.weight.T
    z, theirs, out = (
        read(family, tuple(each.ids), at)
        for each, at in ((own, inside), (source, inside), (own, outside))
    )
    change = (theirs - z).unflatten(1, (inside.units, -1)) if theirs.dim() == 2 else theirs - z
    if head is not None:
        change = change * (torch.arange(inside.units) == head)[:, None]
    return {(at, 0): out[at, 0] + change[at].flatten() @ weight for at in places}


HEAD_OUTPUTS: dict[str, tuple[str, Callable[[Prompt], Sequence[int]], bool]] = {
    "heads": ("patch head_out layer * head * at last token", lambda own: [own.last], False),
    "joined": ("patch head_out layer * heads * at last token", lambda own: [own.last], True),
    "places": ("patch head_out layer * head * at subject tokens", lambda own: own.subject, False),
}


@pytest.mark.parametrize(
    ("family", "tokens"),
    [
        ("gpt2", 4096),
        pytest.param("gpt2", 1, marks=pytest.mark.slow),
        *(
            pytest.param(family, tokens, marks=pytest.mark.slow)
            for family in ("llama", "gpt_neox")
            for tokens in (4096, 80, 1)
        ),
    ],
)
def test_cdt_of_outputs_of_heads_equals_plain_hooks(
    family: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output projections have a bias; passes have from one to all four prompts."""
    monkeypatch.setattr(estimates, "DECOMPOSED_TOKENS", tokens)
    text = "".join(
        experiment(name, *LINES, rule, "using cdt") for name, (rule, _, _) in HEAD_OUTPUTS.items()
    )
    found, largest = run_file(text, tmp_path, bare(family)), 0.0
    for name, (_, places, joined) in HEAD_OUTPUTS.items():
        heads = [None] if joined else range(double(family).config.num_attention_heads)
        for layer in LAYERS:
            at = Where(where(family, "z", layer).path, "out")
            expected: dict[Key, list[float]] = {}
            for record in ROWS:
                own, source = prompt(record, "clean"), prompt(record, "other")
                last = logits_at_the_end(family, tuple(source.ids))
                call = call_metric(family, ONE, own, record, last)
                for head in heads:
                    written = changed_head(family, layer, own, source, head, places(own))
                    value = decompose(double(family), call, at, written)
                    expected.setdefault(() if joined else (head,), []).append(value)
            largest = max(largest, compare(found[name], expected, layer))
    assert largest > 0.3


ENDS: dict[str, dict[str, Where]] = {
    "llama": {
        "v layer 2 head 1": Where("model.layers.2.self_attn.v_proj", "out", 2),
        "mlp_norm layer 1": Where("model.layers.1.post_attention_layernorm", "out"),
    },
    **{
        family: {
            "v layer 1 head 0": Where("model.layers.1.self_attn.v_proj", "out", 2),
            "mlp_norm layer 1": Where("model.layers.1.post_attention_layernorm", "out"),
            "mlp_norm layer 2": Where("model.layers.2.post_attention_layernorm", "out"),
        }
        for family in ("mixtral", "qwen3_moe")
    },
    "gpt2": {"mlp_norm layer 2": Where("transformer.h.2.ln_2", "out")},
    "gpt_neox": {
        "mlp_norm layer 2": Where("gpt_neox.layers.2.post_attention_layernorm", "out"),
    },
}


def along_edge(family: str, layer: int, head: int, end: Where, unit: int) -> list[float]:
    """Hold all else at the whole up to the receiver, and then write what it receives."""
    at, found = where(family, "z", layer), list[float]()
    held = [where(family, site, n) for n in LAYERS for site in ("z", "mlp_out")]
    for record in ROWS:
        base, source = prompt(record, "clean"), prompt(record, "other")
        call = call_metric(family, ONE, base, record, logits_at_the_end(family, tuple(source.ids)))
        theirs = read(family, tuple(source.ids), at)
        sent = {(base.last, head): theirs[source.last, head]}
        model = double(family)
        _, (received,) = decompose_held(model, call, [(at, sent)], held, [end])
        written = {(base.last, unit): received[base.last, unit]}
        found.append(decompose(model, call, end, written))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", *some(["gpt_neox", "mixtral"], ["mixtral"])])
def test_cdt_of_edges_equals_plain_hooks(family: str, tmp_path: Path) -> None:
    """In passes of several senders and edges, and of ragged prompts."""
    text = "".join(
        experiment(f"e{n}", *LINES, f"path layer 0 head * -> {end} at last token", "using cdt")
        for n, end in enumerate(ENDS[family])
    )
    found, largest = run_file(text, tmp_path, bare(family)), 0.0
    for n, (name, end) in enumerate(ENDS[family].items()):
        data = found[f"e{n}"].measures[0]
        unit = int(name.split()[-1]) if name.startswith("v") else 0
        for head, values in enumerate(data.patched - data.base):
            expected = along_edge(family, 0, head, end, unit)
            np.testing.assert_allclose(values, expected, atol=1e-4, rtol=0, err_msg=name)
            largest = max(largest, *map(abs, expected))
    assert largest > 0.01


Codes = Callable[[Tensor], Tensor]
Basis = tuple[Where, Codes, Sequence[tuple[Where, Sequence[Tensor]]]]
"""What a dictionary encodes, its encoder, and the vector of each feature at each written site."""


def dictionaries(family: str, folder: Path) -> dict[str, Basis]:
    """An autoencoder of the stream, a transcoder, and one that writes to two layers."""
    width = double(family).config.hidden_size
    autoencoder = test_dictionaries.make(folder, "standard", width)
    transcoder = test_transcoders.make(folder, "jumprelu_transcoder", width)
    hook = "ln2.hook_normalized"
    parts = test_transcoders.make_cross_layer(folder, width, hook, len(LAYERS))[1]
    stream, *mlps = (
        where(family, *at) for at in (("resid_post", 1), ("mlp_out", 1), ("mlp_out", 2))
    )
    read_by_mlp = replace(mlps[0], side="in")
    across = [(mlp, [*parts["W_dec"][:, n]]) for n, mlp in enumerate(mlps)]
    return {
        "f": (stream, autoencoder.encode, [(stream, [*autoencoder.w_dec])]),
        "t": (read_by_mlp, transcoder.encode, [(mlps[0], [*transcoder.weights["W_dec"]])]),
        "c": (read_by_mlp, partial(test_transcoders.encode_across, parts), across),
    }


def write_features(
    basis: Basis, which: Sequence[int], own: Tensor, new: Tensor, at: int
) -> list[tuple[Where, Vectors]]:
    """Change features from those of a vector to those of another one, [width] each."""
    _, encode, decoders = basis
    change = (encode(new[None]) - encode(own[None]))[0]

    def added(vectors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        total = torch.stack([change[n] * vectors[n] for n in which]).sum(0)
        return lambda now: now + total

    return [(to, {(at, 0): added(vectors)}) for to, vectors in decoders]


Feature = tuple[str, Sequence[int]]
"""A dictionary and some of its features."""
FEATURE_RULES: dict[str, Sequence[tuple[int | Feature, Feature | None]]] = {
    "path layer 0 head * -> feature 3 of f": [(head, ("f", [3])) for head in range(4)],
    "path layer 0 head 1 -> feature 0..5 of f": [(1, ("f", [n])) for n in range(6)],
    "path layer 0 head * -> features 0..5 of t": [(head, ("t", range(6))) for head in range(4)],
    "path layer 0 head 1 -> feature 0..5 of t": [(1, ("t", [n])) for n in range(6)],
    "path layer 0 head * -> features 0..5 of c": [(head, ("c", range(6))) for head in range(4)],
    "path feature 0..5 of t -> logits": [(("t", [n]), None) for n in range(6)],
    "path features 0..5 of c -> logits": [(("c", range(6)), None)],
    "patch feature 0..5 of t": [(("t", [n]), None) for n in range(6)],
    "patch features 0..5 of c": [(("c", range(6)), None)],
}
"""The sender, a head or features, and features that receive or the end, of each cell."""


def decompose_features(
    family: str, own: dict[str, Basis], sender: int | Feature, to: Feature | None, *, node: bool
) -> list[float]:
    """What the features read in a pass with all else at the whole changes them."""
    held = [where(family, site, n) for n in LAYERS for site in ("z", "mlp_out")]
    found: list[float] = []
    for record in ROWS:
        base, source = prompt(record, "clean"), prompt(record, "other")
        call = call_metric(family, ONE, base, record, logits_at_the_end(family, tuple(source.ids)))
        model, last = double(family), base.last
        runs = (tuple(base.ids), last), (tuple(source.ids), source.last)
        if isinstance(sender, int):
            at = where(family, "z", 0)
            theirs = read(family, tuple(source.ids), at)[source.last, sender]
            sent: list[tuple[Where, Vectors]] = [(at, {(last, sender): theirs})]
        else:
            basis = own[sender[0]]
            own_vector, theirs = (
                read(family, ids, basis[0])[place].flatten() for ids, place in runs
            )
            sent = write_features(basis, sender[1], own_vector, theirs, last)
        if node:
            found.append(decompose_held(model, call, sent, (), ())[0])
            continue
        end = where(family, "resid_post", LAYERS[-1]) if to is None else own[to[0]][0]
        _, [received] = decompose_held(model, call, sent, held, [end])
        if to is None:
            found.append(decompose(model, call, end, {(last, 0): received[last, 0]}))
            continue
        whole = read(family, tuple(base.ids), end)[last].flatten()
        given = write_features(own[to[0]], to[1], whole, received[last].flatten(), last)
        found.append(decompose_held(model, call, given, (), ())[0])
    return found


@pytest.mark.parametrize("family", ["llama", *some(["gpt2", "gpt_neox"], [])])
def test_cdt_of_features_at_both_ends_of_paths_equals_plain_hooks(
    family: str, tmp_path: Path
) -> None:
    """A feature that receives has the value that its encoder gives what it reads."""
    own = dictionaries(family, tmp_path)
    text = 'basis f = sae("sae") at resid_post layer 1\n'
    text += 'basis t = transcoder("of_mlp") at mlp_out layer 1\n'
    text += 'basis c = transcoder("clt") at mlp_out layer 1\n'
    for n, rule in enumerate(FEATURE_RULES):
        text += experiment(f"e{n}", *LINES, f"{rule} at last token", "using cdt")
    found = run_file(text, tmp_path, bare(family))
    for n, (rule, cells) in enumerate(FEATURE_RULES.items()):
        data = found[f"e{n}"].measures[0]
        node = rule.startswith("patch")
        expected = [decompose_features(family, own, *cell, node=node) for cell in cells]
        values = data.patched - data.base
        np.testing.assert_allclose(values, expected, atol=1e-4, rtol=1e-4, err_msg=rule)
        assert np.abs(expected).max() > 1e-3, rule


def test_cdt_of_edges_of_a_linear_model_equals_their_runs(tmp_path: Path) -> None:
    """Without norms and biases, logits are linear in what an MLP adds to the stream. Senders and
    positions are joined and swept, and the same file has a node."""
    rules = (
        "path mlp_out layer * -> logits at {cue token, last token}",
        "path layer 1 neuron 0..3 -> logits at last token, cue token",
        "path mlp_out layers 0..1 -> logits at last token with frozen norms",
    )
    text = ""
    for number, rule in enumerate(rules):
        text += experiment(f"run{number}", *LINES, rule)
        text += experiment(f"estimate{number}", *LINES, rule, "using cdt")
    text += experiment("node", *LINES, "patch mlp_out layer 2 at last token", "using cdt")
    found = run_file(text, tmp_path, bare("llama without norms"))
    for number, rule in enumerate(rules):
        run, own = (found[f"{name}{number}"].measures[0] for name in ("run", "estimate"))
        size = max(1.0, float(np.abs(run.base).max()))
        assert np.abs(run.patched - run.base).max() > 1e-4, rule
        assert np.abs(own.patched - run.patched).max() <= 1e-5 * size, rule


def test_cdt_of_edges_in_several_passes_has_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = "path layer 0 head * -> mlp_norm layer 1..2 at subject tokens"
    text = experiment("e", *LINES, rule, "using cdt")
    one = run_file(text, tmp_path, bare("gpt2"))["e"].measures[0]
    monkeypatch.setattr(estimates, "DECOMPOSED_TOKENS", 100)
    two = run_file(text, tmp_path, bare("gpt2"))["e"].measures[0]
    np.testing.assert_allclose(one.patched, two.patched, rtol=0, atol=1e-5)
    assert np.abs(one.patched - one.base).max() > 1e-3


def test_cdt_of_a_linear_model_equals_its_run(tmp_path: Path) -> None:
    """Without norms and biases, logits are linear in what the last block adds to the stream."""
    last = "at last token"
    rules = (
        f"ablate mlp_out layer 2 {last} with mean",
        f"ablate layer 2 neuron 0..3 {last} with mean",
        f"ablate resid_post layer 2 {last} with zero",
        f"ablate feature * of b {last} with zero",
    )
    text = f"basis b = pca(p, dims: 3) at resid_post layer 2 {last}\n"
    for number, rule in enumerate(rules):
        lines = ("prompts p", measured(ONE, "delta"), rule)
        text += experiment(f"run{number}", *lines)
        text += experiment(f"estimate{number}", *lines, "using cdt")
    found = run_file(text, tmp_path, bare("llama without norms"))
    for number, rule in enumerate(rules):
        run, own = (found[f"{name}{number}"].measures[0] for name in ("run", "estimate"))
        size = max(1.0, float(np.abs(run.base).max()))
        assert np.abs(run.patched - run.base).max() > 1e-4, rule
        assert np.abs(own.patched - run.patched).max() <= 1e-5 * size, rule


TEXTS = (
    "food ? the room was not very clean and the food was bland",
    "room ? the staff was rude but the food was never stale and the room was really quiet",
    "staff ? the staff was quick and the food was not warm",
)
REVIEWS = """mech 1
model m = zoo("reviews")
prompts p {
  text in TEXTS
  template "{text}"
}
experiment e {
  prompts p
  ablate layer * head * at token 0, last token with zero
  using cdt
  measure logit(class "positive") - logit(class "negative") as delta
}
""".replace("TEXTS", str(list(TEXTS)).replace("'", '"'))


@pytest.mark.slow
def test_cdt_of_a_bert_classifier_equals_plain_hooks(tmp_path: Path) -> None:
    """Prompts have different lengths, and BERT's attention would see padding."""
    file = tmp_path / "reviews.mech"
    file.write_text(REVIEWS, encoding="utf-8")
    (found,) = mechdsl.run(file, store=False, write_reports=False).experiments
    model: Any = BertForSequenceClassification.from_pretrained(MODELS / "reviews")
    model = model.double().eval()
    tokenizer = Tokenizer.from_file(str(MODELS / "reviews" / "tokenizer.json"))
    data, largest = found.measures[0], 0.0
    for text in TEXTS:
        ids = tokenizer.encode(text).ids

        def call(module: Any, ids: list[int] = ids) -> Tensor:
            logits = module(input_ids=torch.tensor([ids])).logits[0]
            return logits[1] - logits[0]

        bases = np.atleast_2d(data.base)[0]  # rows are in random order
        row = int(np.abs(bases - float(call(model).detach())).argmin())
        assert bases[row] == pytest.approx(float(call(model).detach()), abs=1e-4)
        for values, cell in zip(data.patched - data.base, found.cells, strict=True):
            at = Where(f"bert.encoder.layer.{cell.coords['layer']}.attention.output.dense", "in", 4)
            position = 0 if cell.coords["position"] in ("0", "token 0") else len(ids) - 1
            written = {
                (position, int(str(cell.coords["head"]))): torch.zeros(16, dtype=torch.float64)
            }
            expected = decompose(model, call, at, written)
            assert abs(values[row] - expected) <= 1e-4, (text, cell.coords)
            largest = max(largest, abs(expected))
    assert largest > 0.01


CHANGED = "staff ? the staff was rude and the food was bland"
EDGES = """
experiment edges {
  prompts p
  from other into clean
  path layer 0 head * -> v layer 1 heads * at token 0
  using cdt
  measure logit(class "positive") - logit(class "negative") as delta
}
"""


@pytest.mark.slow
def test_cdt_of_edges_of_a_bert_classifier_equals_plain_hooks(tmp_path: Path) -> None:
    """In blocks whose norms follow the sums."""
    file = tmp_path / "reviews.mech"
    text = REVIEWS.partition("experiment")[0].replace(
        'template "{text}"', f'template "{{text}}"\n  corrupt other {{ text = "{CHANGED}" }}'
    )
    file.write_text(text + EDGES, encoding="utf-8")
    (found,) = mechdsl.run(file, store=False, write_reports=False).experiments
    model: Any = BertForSequenceClassification.from_pretrained(MODELS / "reviews")
    model = model.double().eval()
    tokenizer = Tokenizer.from_file(str(MODELS / "reviews" / "tokenizer.json"))
    blocks = [f"bert.encoder.layer.{layer}" for layer in range(3)]
    at, end = (
        Where(f"{blocks[0]}.attention.output.dense", "in", 4),
        Where(f"{blocks[1]}.attention.self.value", "out"),
    )
    held = [Where(f"{block}.attention.output.dense", "in") for block in blocks]
    held += [Where(f"{block}.output.dense", "out") for block in blocks]

    def run(module: Any, text: str) -> Tensor:
        logits = module(input_ids=torch.tensor([tokenizer.encode(text).ids])).logits[0]
        return logits[1] - logits[0]

    theirs = taken(model, at, partial(run, text=CHANGED)).value
    data, expected = found.measures[0], list[tuple[float, ...]]()
    for text in TEXTS:
        call = partial(run, text=text)
        effects = [float(call(model))]
        for head in range(4):
            sent = {(0, head): theirs[0, head]}
            _, [received] = decompose_held(model, call, [(at, sent)], held, [end])
            effects.append(decompose(model, call, end, {(0, 0): received[0, 0]}))
        expected.append(tuple(effects))
    base = np.atleast_2d(data.base)[0]
    rows = np.argsort(base)  # rows are in random order
    expected.sort()
    np.testing.assert_allclose(base[rows], [first for first, *_ in expected], atol=1e-4)
    values = (data.patched - data.base)[:, rows]
    np.testing.assert_allclose(values.T, [own for _, *own in expected], atol=1e-4)
    assert np.abs(values).max() > 1e-3


def test_planned_tokens_of_cdt_of_edges_equal_those_of_its_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two copies of the prompt for each edge, and two passes of two copies for each sender."""
    rule = "path layer 0 head * -> mlp_norm layer 1..2 at cue token, last token"
    text = experiment("e", *LINES, rule, "using cdt")
    passes: list[int] = []

    def count(model: Any, batch: Any, **given: Any) -> Any:
        passes.append(int(batch.lengths.sum()))
        return full_pass.run_full(model, batch, **given)

    for module in (estimates, held_passes, differentiated_run):
        monkeypatch.setattr(module, "run_full", count)
    run_file(text, tmp_path, bare("gpt2"))
    checked = check_file(text, tmp_path, shared(bare("gpt2")))
    ((plan,),) = (panel.experiments for panel in make_plan(checked.experiments).panels)
    work = gradient_work(
        plan, np.arange(len(ROWS)), lambda lengths, sources: (lengths, lengths), 10_000
    )
    tokens = sum(len(prompt(record, "clean").ids) for record in ROWS)
    assert sum(passes) == work.tokens == 2 * tokens * (4 * 2 * 2 + 2 * 4 * 2)
    assert len(passes) == work.joined_forwards == 3


@pytest.mark.parametrize(
    ("family", "rule", "reason"),
    [
        ("llama", "patch q layer 0 head * at last token", "attention has the weights of the base"),
        ("gpt_oss", "patch mlp_out layer 0 at last token", "no rule shares the biases of its exp"),
        ("llama", "path layer 0 head * -> k layer 2 head * at last token", "weights of the base"),
    ],
)
def test_cdt_of_sites_and_models_without_a_rule_is_an_error(
    family: str, rule: str, reason: str, tmp_path: Path
) -> None:
    text = experiment("e", *LINES, rule, "using cdt")
    result, problems = try_file(text, tmp_path, bare(family))
    assert result is None
    (error,) = (each for each in problems if each.severity == "error")
    assert error.code == "E0608"
    assert reason in render_full([error], color=False, width=300)


@pytest.mark.parametrize(
    ("family", "biases", "layers", "reason"),
    [
        ("mixtral", False, (0, 1, 2), ""),
        ("mixtral", False, (0, 1), "the weights of its router can't be fixed"),
        ("mixtral", True, (0, 1, 2), "no rule applies to the biases of its experts"),
    ],
)
def test_experts_that_cdt_takes_have_a_router_and_no_biases(
    family: str, biases: bool, layers: Sequence[int], reason: str
) -> None:
    model = shared(copy.deepcopy(bare(family)) if biases else bare(family))
    shape, rules = model.shape, ContextualDecomposition.backward
    found = explain_missing_rule(rules, replace(shape, partly={"router": frozenset(layers)}))
    if biases:
        experts = model.module.get_submodule("model.layers.1.mlp.experts")
        experts.down_proj_bias = torch.nn.Parameter(torch.zeros(1))
        with pytest.raises(RuleNotApplied) as error, open_rules(model, rules):
            pass
        found = str(error.value)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


class PowerNorm(torch.nn.Module):
    """A norm as in Gemma 4."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.eps = like.weight, like.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + self.eps, -0.5))


def test_norm_that_computes_a_power_divides_by_the_size_of_the_whole(tmp_path: Path) -> None:
    text = experiment("e", *LINES, HEADS, "using cdt")
    expected = run_file(text, tmp_path, bare("llama"))["e"].measures[0].patched
    model = copy.deepcopy(bare("llama"))
    for part in [*model.modules()]:
        for name, child in [*part.named_children()]:
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(part, name, PowerNorm(child))
    found = run_file(text, tmp_path, model)["e"].measures[0].patched
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_cdt_with_an_unknown_norm_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward_rules, "_UNDECOMPOSED", frozenset({torch.rsqrt}))
    text = experiment("e", *LINES, HEADS, "using cdt") + experiment("run", *LINES, HEADS)
    result, problems = try_file(text, tmp_path, bare("llama"))
    assert result is not None
    assert [each.name for each in result.experiments] == ["run"]
    (error,) = (each for each in problems if each.severity == "error")
    assert "its rules don't cover `m` (no rule applies to its function `rsqrt`)" in render_full(
        [error], color=False, width=300
    )


def test_cdt_in_several_passes_has_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = experiment("e", *LINES, HEADS, "using cdt")
    once = run_file(text, tmp_path, bare("gpt2"))["e"].measures[0].patched
    monkeypatch.setattr(estimates, "DECOMPOSED_TOKENS", 60)
    again = run_file(text, tmp_path, bare("gpt2"))["e"].measures[0].patched
    np.testing.assert_allclose(again, once, atol=1e-5)
