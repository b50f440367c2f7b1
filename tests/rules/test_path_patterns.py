"""`path … using atp_qk` and `path … using atp_star`: exact weights of attention along edges, and
gradients without a layer, on an explicit forward pass of one unpadded prompt in 64 bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.patching import differentiated_run, estimates, held_passes
from mechdsl.planner.cost import gradient_work
from mechdsl.planner.passes import make_plan

from ..execute import support
from ..execute.support import Record, check_file, execute_file
from ..execute.support import shared as shared_model
from ..execute.test_stored_values import check_case
from ..quick import some
from ..reference.forward import Run, Write
from .models import bare, double
from .paths import LAST, End, Way, held, leads, plain
from .support import (
    Key,
    agree,
    experiment,
    records,
    run_file,
    tokens,
    try_file,
    unpatched,
    write_data,
)
from .test_estimates import ONE, measured
from .test_path_estimates import INPUTS, OWN, lines, measure, metric, moved, with_gradients
from .test_paths import GROUPS, Cell, parallel, precise, ways_of_prompts

CASES = (
    "heads_to_queries",
    "heads_to_keys",
    "heads_to_queries_through_mlps",
    "positions_are_swept",
    "inputs_of_one_layer",
    "heads_to_mlps",
    "heads_to_logits",
    "neurons_send",
    "a_group_sends",
)
FAMILIES: dict[str, tuple[str, ...]] = {
    "llama": ("heads_to_queries", "heads_to_keys", "heads_to_queries_through_mlps"),
    "gpt2": ("inputs_of_one_layer", "heads_to_mlps", "positions_are_swept"),
    "gpt_neox": ("heads_to_keys", "heads_to_logits", "a_group_sends"),
    "gemma2": ("heads_to_queries", "inputs_of_one_layer"),
}


def dropped(name: str, run: Run, layer: int) -> list[Write]:
    """Writes after which the outputs of attention and MLP of a layer have no gradient."""
    return [Write(site, layer, lambda value: value.detach()) for site in ("attn_out", "mlp_out")]


def differentiated(value: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(value, list(leaves), allow_unused=True, materialize_grads=True)


def slope_of(
    name: str, ids: Sequence[int], base: Run, writes: Sequence[Write], own: Sequence[Tensor],
    record: Record, at: int, layer: int | None,
) -> Sequence[Tensor]:  # fmt: skip
    """Gradients of the metric by zeros that are written, without the gradient through a layer."""
    more = [] if layer is None else dropped(name, base, layer)
    (run,) = with_gradients(name, ids, [([*base.writes, *writes, *more], ())])
    return differentiated(metric(run, record, at), own)


def of_pattern(
    name: str, ids: Sequence[int], runs: tuple[Run, Run], way: Way, end: End, sent: Run,
    record: Record, at: int, layer: int | None,
) -> float:  # fmt: skip
    """The exact change of the weights of one query or key times the gradient by the weights."""
    base = runs[0]
    new = [
        Write(end.site, end.layer, sent[end.site, end.layer][place, end.unit], place, end.unit)
        for place in way.written
    ]
    changed, free = with_gradients(name, ids, [([*base.writes, *new], ()), (list(base.writes), ())])
    own = free["pattern", end.layer].detach()
    leaf = torch.zeros_like(own, requires_grad=True)
    add = [
        Write("pattern", end.layer, lambda v, p=p, u=u: v + leaf[p, u], p, u)
        for p in range(own.shape[0]) for u in range(own.shape[1])
    ]  # fmt: skip
    (slope,) = slope_of(name, ids, base, add, [leaf], record, at, layer)
    return float(((changed["pattern", end.layer] - own).detach() * slope).sum())


def estimated(
    name: str, ids: Sequence[int], runs: tuple[Run, Run], way: Way, record: Record, at: int,
    mlps: bool, layer: int | None,
) -> float:  # fmt: skip
    """One path: exact weights at queries and keys, and first order at other receivers."""
    base, source = runs
    layers = double(name).config.num_hidden_layers
    kept = held(base, way.senders, layers, mlps=mlps)
    adds, leaves = moved(way.senders, base, way.written)
    values = [source[of.site, of.layer][list(way.read)] for of in way.senders]
    new = [
        Write(of.site, of.layer, own[n, unit], place, unit)
        for of, own in zip(way.senders, values, strict=True)
        for n, place in enumerate(way.written)
        for unit in (range(own.shape[1]) if of.unit is None else [of.unit])
    ]
    run, sent = with_gradients(
        name, ids, [([*base.writes, *kept, *adds], ()), ([*base.writes, *kept, *new], ())]
    )
    total, value = torch.zeros(()), 0.0
    for to in way.receivers:
        if to.site in ("q", "k"):
            value += of_pattern(name, ids, runs, way, to, sent, record, at, layer)
            continue
        end = End("resid_post", layers - 1) if to.site in LAST else to
        writes, own = moved([end], base, way.written)
        (slope,) = slope_of(name, ids, base, writes, own, record, at, layer)
        total = total + (run[end.site, end.layer][list(way.written)] * slope).sum()
    if total.requires_grad:
        gradients = differentiated(total, leaves)
        for of, sends, gradient in zip(way.senders, values, gradients, strict=True):
            part = (sends - base[of.site, of.layer][list(way.written)]) * gradient
            value += float((part if of.unit is None else part[:, of.unit]).sum())
    return value


def rounds(name: str, way: Way, word: str) -> list[int | None]:
    """The layers that are left out, one by one."""
    if word == "atp_qk":
        return [None]
    layers = {to.layer if to.site not in LAST else None for to in way.receivers}
    every = range(double(name).config.num_hidden_layers)
    return [n for n in every if layers != {n}]


def expected(name: str, key: str, word: str) -> dict[Key, list[float]]:
    case, found, cells = OWN[key], dict[Key, list[float]](), list[Cell]()
    combined = itertools.product(case.sender.cells, case.receiver.cells, case.positions)
    for (of, senders), (to, receivers), place in combined:
        if any(leads(s, r, parallel=parallel(name)) for s in senders for r in receivers):
            found[(*of, *to, *((place,) if len(case.positions) > 1 else ()))] = []
            cells.append((senders, receivers, place))
    for record, base, source, ways in ways_of_prompts(case, cells):
        model = double(name)
        runs = plain(name, model, base.ids), plain(name, model, source.ids)
        at = tokens(base, case.measured)[0]
        whole = float(metric(runs[0], record, at)) if word == "atp_qk" else 0.0
        for values, way in zip(found.values(), ways, strict=True):
            own = [
                estimated(name, base.ids, runs, way, record, at, case.mlps, layer)
                for layer in rounds(name, way, word)
            ]
            value = own[0] if word == "atp_qk" else float(np.abs(own).mean())
            values.append(whole + value)
    return found


def equal_reference(data: Path, name: str, mode: str, keys: Sequence[str], word: str) -> None:
    text = GROUPS + "\n" + INPUTS
    for key in keys:
        own = measure(OWN[key])
        own = own if word == "atp_qk" else own.replace("as delta", "as raw")
        text += experiment(key, *lines(OWN[key], f"using {word}"), measure=own)
    fine = precise(name)
    for key, found in run_file(text, data, name, mode, precise=fine).items():
        base = unpatched(name, OWN[key].base, at=OWN[key].measured) if word == "atp_qk" else None
        values = expected(name, key, word)
        large = 1e-3 if fine else 1e-2
        agree(found, OWN[key].axes, values, base, large=large, most=False, precise=fine)


QUICK = {"llama": "heads_to_queries", "gpt2": "inputs_of_one_layer", "gpt_neox": "heads_to_keys"}


@pytest.mark.parametrize("family", list(QUICK))
def test_atp_qk_of_edges_recomputes_attention_weights(data: Path, family: str) -> None:
    equal_reference(data, family, "small passes", [QUICK[family]], "atp_qk")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize("family", [*QUICK, "gemma2", "qwen3", "gpt_oss"])
def test_atp_qk_of_edges_recomputes_attention_weights_in_every_family(
    data: Path, family: str, mode: str
) -> None:
    """Also with heads that share keys, caps on scores, windows and sinks."""
    keys = [key for key in CASES if family != "gpt_oss" or key != "neurons_send"]
    equal_reference(data, family, mode, keys, "atp_qk")


STARS = {
    "llama": ("heads_to_queries", "heads_to_mlps"),
    "gpt2": ("inputs_of_one_layer", "heads_to_logits"),
    "gpt_neox": ("heads_to_keys", "heads_to_queries_through_mlps"),
}


@pytest.mark.parametrize("family", [*some(list(STARS), ["gpt2"])])
def test_atp_star_of_edges_drops_each_layer_but_that_of_the_receivers(
    data: Path, family: str
) -> None:
    equal_reference(data, family, "small passes", STARS[family], "atp_star")


RULE = "path layer 0..1 head * -> q layer 2 head * at last token"
LINES = ("from other into clean", RULE)


def test_receivers_together_have_the_sum_of_their_estimates(data: Path) -> None:
    """Queries, keys, values and the end of the model in one cell, also of one head."""
    receivers = {"q": "q layer 2 head 1", "k": "k layer 2 head 1", "v": "v layer 2 head 1"}
    ends = {**receivers, "end": "logits", "all": "ends"}
    text = "group ends = L2H1.q, L2H1.k, L2H1.v, logits\n"
    for key, receiver in ends.items():
        rule = f"path layer 0..1 head * -> {receiver} at {{cue token, last token}}"
        text += experiment(key, "from longer into clean", rule, "using atp_qk")
    found = run_file(text, data, "gpt2", "planned", precise=True)
    effects = {key: own.measures[0].patched - own.measures[0].base for key, own in found.items()}
    parts = [effects[key] for key in ("q", "k", "v", "end")]
    assert all(np.abs(part).max() > 1e-4 for part in parts)
    np.testing.assert_allclose(effects["all"], sum(parts), rtol=0, atol=1e-9)


def test_receivers_without_queries_and_keys_have_the_estimates_of_eap(data: Path) -> None:
    rule = "path layer 0..1 head * -> mlp_norm layer 2 at last token"
    text = "".join(
        experiment(word, "from other into clean", rule, f"using {word}")
        for word in ("eap", "atp_qk")
    )
    found = run_file(text, data, "llama", "small passes", precise=True)
    one, two = (found[word].measures[0].patched for word in ("eap", "atp_qk"))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)
    assert np.abs(one - found["eap"].measures[0].base).max() > 1e-3


def test_several_metrics_have_separate_gradients_by_attention_weights(data: Path) -> None:
    measures = ["logit(answer)", "logit(wrong)", "logit(answer) - logit(wrong)"]
    given = [f"measure {own} as delta" for own in measures]
    text = experiment("e", *LINES, "using atp_qk verify top 2, random 2", *given, measure="")
    found = run_file(text, data, "gpt2", "small passes", precise=True)["e"]
    first, second, both = (own.patched - own.base for own in found.measures)
    assert np.abs(first).max() > 1e-3
    np.testing.assert_allclose(first - second, both, rtol=0, atol=1e-9)


@pytest.mark.parametrize("word", ["atp_qk", "atp_star"])
def test_plan_counts_the_passes_of_attention_weights(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All senders share passes: with all else held, one reads what is held, and one the keys."""
    rounds, effect = (1, "delta") if word == "atp_qk" else (3, "raw")
    measure = f"measure logit(answer) - logit(wrong) as {effect}"
    rule = "path layer 0 head 0..1 -> k layer 2 head * at last token"
    text = experiment("e", LINES[0], rule, f"using {word}", measure=measure)
    write_data(tmp_path)
    checked = check_file(text, tmp_path, shared_model(bare("gpt2")))
    ((own,),) = (panel.experiments for panel in make_plan(checked.experiments).panels)
    work = gradient_work(
        own, np.arange(len(records())), lambda lengths, sources: (lengths, lengths), 10_000
    )
    calls = list[str]()

    def count(module: Any, name: str) -> None:
        run = getattr(module, name)

        def counted(*given: Any, **more: Any) -> Any:
            calls.append(name)
            return run(*given, **more)

        monkeypatch.setattr(module, name, counted)

    for module in (differentiated_run, held_passes, estimates):
        count(module, "run_full")
    execute_file(checked, shared_model(bare("gpt2")))
    assert work.joined_forwards == len(calls) == rounds + 2 + 1 + 2
    assert work.forwards == len(records()) * (rounds + 2 + 1 + 2 * 2)
    assert work.joined_backwards == rounds


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("gpt2", (RULE, "using atp_star"), "which isn't an effect of a write"),
        (
            "gpt2",
            ("path layer 0 head * -> k layer 2 head * at last token", "using atp_qk"),
            "tokens of a text after the prompt attend to the keys, too",
        ),
    ],
)
def test_paths_without_exact_attention_weights_are_errors(
    data: Path, name: str, lines: Sequence[str], said: str
) -> None:
    measure = 'measure logprob("w3 w9") as delta'
    result, problems = try_file(experiment("e", LINES[0], *lines, measure=measure), data, name)
    written = render_full(problems, color=False, width=300)
    assert result is None
    assert "E0608" in written, written
    assert said in written, written
    assert "gradient_input" not in written


@pytest.mark.slow
@pytest.mark.parametrize("word", ["atp_qk", "atp_star"])
def test_interrupted_estimates_of_edges_resume(tmp_path: Path, word: str) -> None:
    effect = "delta" if word == "atp_qk" else "raw"
    text = support.experiment("e", "prompts p", *LINES, f"using {word}", measured(ONE, effect))
    check_case("llama", text, tmp_path, cut=1)
