"""`path … using eap`: estimates of edges, against autograd on an explicit forward pass of one
unpadded prompt, and against runs where the model is linear."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.patching import differentiated_run, held_passes
from mechdsl.planner.cost import gradient_work
from mechdsl.planner.passes import make_plan
from mechdsl.results.experiment_result import ExperimentResult

from ..execute import support
from ..execute.support import Record, check_file, execute_file, prompt, token
from ..execute.support import shared as shared_model
from ..execute.test_stored_values import check_case
from ..quick import some
from ..reference.forward import Changes, Run, Write, side_by_side
from ..reference.gradients import Where, taken
from ..reference.noise import keyed_by_number
from ..reference.ruled import ruled
from . import test_classifier_circuits as bert
from .models import bare, double
from .paths import LAST, End, Way, held, leads, plain
from .support import (
    Key,
    agree,
    experiment,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
    write_data,
)
from .test_estimates import ONE, agrees, by_hand, call_metric, metrics, read, where, whole_subject
from .test_paths import (
    CASES,
    DRAWS,
    GROUPS,
    NOISED,
    Case,
    Cell,
    draw_of,
    grid,
    joined,
    parallel,
    precise,
    swept,
    ways_of_prompts,
)

KEYS = (
    "heads_to_queries",
    "heads_to_keys",
    "heads_to_logits",
    "heads_to_logits_through_mlps",
    "heads_to_queries_through_mlps",
    "everywhere_through_mlps",
    "positions_are_swept",
    "heads_are_joined",
    "mlps_to_mlps",
    "heads_to_mlps",
    "neurons_send",
    "heads_to_blocks",
    "a_block_to_blocks",
    "from_the_clean_run",
    "a_group_sends",
    "windows_of_senders",
    "a_group_to_logits",
    "neurons_and_what_comes_before",
)
OWN = {key: CASES[key] for key in KEYS} | {
    "embedding_to_norms": Case(
        joined("embed", End("embed")),
        swept("attn_norm", "attn_norm layer *", "layer", range(3), ()),
        "tokens *",
        run="other",
    ),
    "inputs_of_one_layer": Case(
        grid("z", (0, 2)), joined("inputs", End("q", 2, 1), End("k", 2, 0), End("v", 2, 1))
    ),
    "neurons_receive": Case(
        swept("z", "layer 0 head *", "head", [0], range(4)),
        joined("L2N3", End("mlp_hidden", 2, 3)),
    ),
}
INPUTS = "group inputs = L2H1.q, L2H0.k, L2H1.v\n"
FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2")


# --- the reference --------------------------------------------------------------------------------


def with_gradients(name: str, ids: Sequence[int], each: Sequence[Changes]) -> list[Run]:
    call: Any = side_by_side
    with torch.enable_grad():
        return call.__wrapped__(name, double(name), ids, each) if each else []


def moved(ends: Sequence[End], run: Run, places: Sequence[int]) -> tuple[list[Write], list[Tensor]]:
    """Writes that add zeros at the ends, and these zeros: [place, unit, width] of each end."""
    writes: list[Write] = []
    leaves: list[Tensor] = []
    for end in ends:
        own = run[end.site, end.layer][list(places)]
        leaf = torch.zeros_like(own, requires_grad=True)
        leaves.append(leaf)
        for unit in range(own.shape[1]) if end.unit is None else [end.unit]:
            for n, place in enumerate(places):
                part = leaf[n, unit]
                add = lambda value, part=part: value + part  # noqa: E731
                writes.append(Write(end.site, end.layer, add, place, unit))
    return writes, leaves


def metric(run: Run, record: Record, at: int) -> Tensor:
    return run.logits[at, token(record["a"])] - run.logits[at, token(record["b"])]


def received(
    name: str, ids: Sequence[int], runs: tuple[Run, Run], ways: Sequence[Way], record: Record,
    at: int, points: int, moving: tuple[str, int | None] | None = None,
) -> list[Tensor]:  # fmt: skip
    """The mean gradients of a metric by the receivers of all paths. At each point, the stream that
    enters block 0, or another site, is nearer to that of the base run, which is the last point."""
    reads = [moved(way.receivers, runs[0], way.written) for way in ways]
    flat = [leaf for _, leaves in reads for leaf in leaves]
    total = torch.zeros(())
    base, source = (run[moving or ("resid_pre", 0)] for run in runs)
    for point in range(1, points + 1):
        far = 1 - point / points
        more = [
            Write(
                *(moving or ("resid_pre", 0)), lambda value, far=far: value + far * (source - base)
            )
        ]
        before = [*runs[0].writes, *(more if far else ())]
        writes = [([*before, *own], ()) for own, _ in reads]
        for run in with_gradients(name, ids, writes):
            total = total + metric(run, record, at) / points
    return list(torch.autograd.grad(total, flat)) if flat else []


def estimated(
    name: str, ids: Sequence[int], runs: tuple[Run, Run], ways: Sequence[Way], case: Case,
    record: Record, at: int, points: int = 1, moving: tuple[str, int | None] | None = None,
) -> list[float]:  # fmt: skip
    """The estimate of each path: the gradient by its receivers' inputs, and that of these inputs by
    its senders while all else is held. Each path has a separate copy of the prompt."""
    base, source = runs
    if points > 1:
        end = End("resid_post", double(name).config.num_hidden_layers - 1)
        onto = [[end if to.site in LAST else to for to in way.receivers] for way in ways]
        ways = [replace(way, receivers=own) for way, own in zip(ways, onto, strict=True)]
    ended = [any(to.site in LAST for to in way.receivers) for way in ways]
    inner = [way for way, end in zip(ways, ended, strict=True) if not end]
    slopes = iter(received(name, ids, runs, inner, record, at, points, moving))
    layers = range(double(name).config.num_hidden_layers)
    sent = [moved(way.senders, base, way.written) for way in ways]
    kept = [held(base, way.senders, len(layers), mlps=case.mlps) for way in ways]
    changes = [([*base.writes, *own, *adds], ()) for own, (adds, _) in zip(kept, sent, strict=True)]
    totals: list[Tensor] = []
    for way, end, run in zip(ways, ended, with_gradients(name, ids, changes), strict=True):
        if end:
            totals.append(metric(run, record, at))
        for to in () if end else way.receivers:
            totals.append((run[to.site, to.layer][list(way.written)] * next(slopes)).sum())
    leaves = [leaf for _, own in sent for leaf in own]
    whole = sum(totals, torch.zeros(()))
    gradients = iter(torch.autograd.grad(whole, leaves, materialize_grads=True, allow_unused=True))
    values: list[float] = []
    for way in ways:
        value = 0.0
        for of in way.senders:
            change = source[of.site, of.layer][list(way.read)]
            change = change - base[of.site, of.layer][list(way.written)]
            estimate = float((change * next(gradients)).sum())
            value += estimate if moving in (None, (of.site, of.layer)) else 0
        values.append(value)
    return values


@cache
def expected(
    name: str, key: str, points: int = 1, *, senders_move: bool = False
) -> dict[Key, list[float]]:
    case = aligned(OWN[key]) if points > 1 else OWN[key]
    found: dict[Key, list[float]] = {}
    cells: list[Cell] = []
    combined = itertools.product(case.sender.cells, case.receiver.cells, case.positions)
    for (of, senders), (to, receivers), place in combined:
        if any(leads(s, r, parallel=parallel(name)) for s in senders for r in receivers):
            found[(*of, *to, *((place,) if len(case.positions) > 1 else ()))] = []
            cells.append((senders, receivers, place))
    model = double(name)
    for record, base, source, ways in ways_of_prompts(case, cells):
        runs = plain(name, model, base.ids), plain(name, model, source.ids)
        at = tokens(base, case.measured)[0]
        given = name, base.ids, runs, ways, case, record, at, points
        if senders_move:
            sites = dict.fromkeys((of.site, of.layer) for way in ways for of in way.senders)
            each = [estimated(*given, moving=site) for site in sites]
            own = [sum(parts) for parts in zip(*each, strict=True)]
        else:
            own = estimated(*given)
        whole = float(metric(runs[0], record, at))
        for values, value in zip(found.values(), own, strict=True):
            values.append(whole + value)
    return found


def aligned(case: Case) -> Case:
    """The case with runs whose prompts have the same number of tokens."""
    return replace(case, run="other", base="clean")


def lines(case: Case, *more: str) -> tuple[str, ...]:
    return (f"from {case.run} into {case.base}", case.rule, *more)


def measure(case: Case) -> str:
    return f"measure logit(answer) - logit(wrong) at {case.measured} as delta"


@cache
def results(
    data: Path, name: str, mode: str, keys: tuple[str, ...], points: int = 1, word: str = "eap_ig"
) -> dict[str, ExperimentResult]:
    """The cases in one file."""
    using = "using eap" if points == 1 else f"using {word}(steps: {points})"
    groups = (line for line in GROUPS.splitlines() if name != "gpt_oss" or "mixed" not in line)
    text = "\n".join(groups) + "\n" + INPUTS
    for key in keys:
        case = aligned(OWN[key]) if points > 1 else OWN[key]
        text += experiment(key, *lines(case, using), measure=measure(case))
    return run_file(text, data, name, mode, precise=precise(name))


def equal_autograd(
    data: Path, name: str, mode: str, keys: tuple[str, ...], points: int = 1, word: str = "eap_ig"
) -> None:
    fine = precise(name)
    large = 1e-3 if fine else 1e-2
    for key, found in results(data, name, mode, keys, points, word).items():
        base = unpatched(name, "clean" if points > 1 else OWN[key].base, at=OWN[key].measured)
        values = expected(name, key, points, senders_move=word == "eap_ig_activations")
        agree(found, OWN[key].axes, values, base, large=large, most=False, precise=fine)


PARTS = {
    family: tuple(OWN)[number::3] for number, family in enumerate(("llama", "gpt2", "gpt_neox"))
}


@pytest.mark.parametrize("part", list(PARTS))
def test_estimates_of_edges_equal_autograd(data: Path, part: str) -> None:
    """Each case in one family, in passes of few prompts, padded."""
    equal_autograd(data, part, "small passes", PARTS[part])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["planned", "plain", "small passes", "padded on the right"])
@pytest.mark.parametrize("family", [*PARTS, "gemma2", "gpt_neox_sequential", "qwen3", "gpt_oss"])
def test_estimates_of_edges_equal_autograd_in_every_family(
    data: Path, family: str, mode: str
) -> None:
    keys = (key for key in OWN if family != "gpt_oss" or not key.startswith("neurons"))
    equal_autograd(data, family, mode, tuple(keys))


MOVED = {
    "llama": ("heads_to_queries", "neurons_send", "heads_to_logits_through_mlps"),
    "gpt2": ("inputs_of_one_layer", "mlps_to_mlps"),
    "gpt_neox": ("embedding_to_norms", "heads_to_queries_through_mlps"),
}
"""Cases of `eap_ig` in each family."""


@pytest.mark.parametrize("family", list(MOVED))
def test_estimates_with_moved_inputs_equal_autograd(data: Path, family: str) -> None:
    equal_autograd(data, family, "small passes", MOVED[family], points=3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["planned", "plain", "padded on the right"])
@pytest.mark.parametrize("family", [*PARTS, "gemma2", "gpt_neox_sequential", "qwen3"])
def test_estimates_of_all_cases_with_moved_inputs_equal_autograd(
    data: Path, family: str, mode: str
) -> None:
    quiet = ["neurons_receive"] if family == "gemma2" else []
    keys = [key for key in OWN if key not in quiet]
    equal_autograd(data, family, mode, tuple(keys), points=4)


SENDERS = {
    "llama": ("heads_to_queries", "a_group_to_logits"),
    "gpt2": ("mlps_to_mlps",),
    "gpt_neox": ("windows_of_senders",),
}
"""Cases of `eap_ig_activations` in each family; senders of two of them are in several layers."""


@pytest.mark.parametrize("family", list(SENDERS))
def test_estimates_with_moved_senders_equal_autograd(data: Path, family: str) -> None:
    keys, word = SENDERS[family], "eap_ig_activations"
    equal_autograd(data, family, "small passes", keys, points=2, word=word)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["planned", "plain", "padded on the right"])
@pytest.mark.parametrize("family", [*PARTS, "gemma2", "gpt_neox_sequential", "qwen3"])
def test_estimates_of_all_cases_with_moved_senders_equal_autograd(
    data: Path, family: str, mode: str
) -> None:
    quiet = ["neurons_receive"] if family == "gemma2" else []
    keys = [key for key in OWN if key not in quiet]
    equal_autograd(data, family, mode, tuple(keys), points=3, word="eap_ig_activations")


def test_estimates_at_one_point_are_those_of_the_base_run(data: Path) -> None:
    """Both experiments of the file are separate in the store, too."""
    given = "from other into clean", "path layer 0..1 head * -> q layer 2 head * at last token"
    usings = {
        "plain": "eap",
        "one": "eap_ig(steps: 1)",
        "five": "eap_ig",
        "five_too": "eap_ig(steps: 5)",
    }
    text = "".join(experiment(key, *given, f"using {each}") for key, each in usings.items())
    found = run_file(text, data, "llama", "small passes", precise=True)
    values = {key: own.measures[0].patched for key, own in found.items()}
    np.testing.assert_allclose(values["one"], values["plain"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(values["five"], values["five_too"])
    assert np.abs(values["five"] - values["one"]).max() > 1e-3
    said = found["five"].conventions["estimates"]
    assert "at 5 points" in said
    assert "moves from the other run to the clean run, which is the last point" in said
    assert "between the clean run and the written values" not in said


@pytest.mark.parametrize(
    "way", some(["noised into clean", "clean into noised"], ["noised into clean"])
)
def test_inputs_move_between_noise_draws(
    data: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed_by_number(monkeypatch)
    name, case = "llama", CASES["heads_to_queries"]
    source, into = way.split(" into ")
    text = experiment("e", f"from {way}", case.rule, "using eap_ig(steps: 2)")
    found = run_file(text, data, name, "small passes", precise=True, blocks=NOISED)["e"]
    cells = [
        (senders, receivers)
        for (_, senders), (_, receivers) in itertools.product(
            case.sender.cells, case.receiver.cells
        )
        if any(leads(s, r, parallel=False) for s in senders for r in receivers)
    ]
    expected = np.zeros((len(cells), len(records())))
    for n, record in enumerate(records()):
        text = rows()[n]
        ways = [Way(*cell, *[tokens(text, case.at)] * 2) for cell in cells]
        for draw in range(DRAWS):
            runs = draw_of(name, into, n, draw), draw_of(name, source, n, draw)
            own = estimated(name, text.ids, runs, ways, case, record, text.last, 2)
            expected[:, n] += np.array(own) / DRAWS
    own = found.measures[0]
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(own.patched - own.base, expected, rtol=0, atol=1e-6)


# --- linear models and sums -----------------------------------------------------------------------

MODELS_OF_SLOW_CASES = ("llama without norms", "gpt2 without norms")
LINEAR = (
    ("gpt2", "path layer * head * -> logits at last token with frozen norms"),
    ("llama", "path mlp_out layer * -> logits at last token with frozen norms"),
    ("gpt_neox", "path resid_pre layer 1 -> final_norm at last token with frozen norms"),
    ("llama without norms", "path layer * head * -> logits at last token"),
    ("gpt2 without norms", "path layer 0 neuron 0..3 -> logits at last token"),
    ("gpt_neox without norms", "path layer * head 1 -> v layer 2 heads * at tokens *"),
)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(*own, marks=pytest.mark.slow if own[0] in MODELS_OF_SLOW_CASES else ())
        for own in LINEAR
    ],
)
def test_estimates_of_linear_paths_equal_their_runs(data: Path, name: str, rule: str) -> None:
    """With frozen norms, logits are linear in a sender. Without norms, the last block of a model
    with parallel sublayers is linear in values."""
    given = ("from other into clean", rule)
    text = experiment("run", *given) + experiment("estimate", *given, "using eap")
    found = run_file(text, data, name, "small passes", precise=True)
    own, run = (found[key].measures[0] for key in ("estimate", "run"))
    assert np.abs(run.patched - run.base).max() > 1e-3
    np.testing.assert_allclose(own.patched, run.patched, rtol=0, atol=1e-5)
    whole = "full forward pass" in found["run"].conventions.get("passes", "")
    assert whole == ("frozen norms" in rule)
    assert "full forward pass" not in found["estimate"].conventions.get("passes", "")


def test_estimate_of_receivers_together_is_the_sum_of_their_estimates(data: Path) -> None:
    given = "from longer into clean", "using eap"
    groups = "group ends = L2H1.q, L2H3.v, logits\n"
    receivers = {"q": "q layer 2 head 1", "v": "v layer 2 head 3", "end": "logits", "all": "ends"}
    text = groups
    for key, receiver in receivers.items():
        rule = f"path layer 0..1 head * -> {receiver} at {{cue token, last token}}"
        text += experiment(key, rule, *given)
    found = run_file(text, data, "gpt2", "planned", precise=True)
    effects = {key: own.measures[0].patched - own.measures[0].base for key, own in found.items()}
    parts = [effects[key] for key in ("q", "v", "end")]
    assert all(np.abs(part).max() > 1e-3 for part in parts)
    np.testing.assert_allclose(effects["all"], sum(parts), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "ways", some(["clean into noised", "noised into clean"], ["noised into clean"])
)
def test_estimates_of_linear_paths_are_averaged_over_noise_draws(data: Path, ways: str) -> None:
    given = f"from {ways}", "path layer * head * -> logits at last token with frozen norms"
    text = experiment("run", *given) + experiment("estimate", *given, "using eap")
    found = run_file(text, data, "llama", "planned", precise=True, blocks=NOISED)
    own, run = (found[key].measures[0] for key in ("estimate", "run"))
    assert np.abs(run.patched - run.base).max() > 1e-3
    np.testing.assert_allclose(own.patched, run.patched, rtol=0, atol=1e-5)


# --- every metric ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 2])
def test_estimates_of_all_metrics_equal_autograd(data: Path, layer: int) -> None:
    """From a stream to the same stream, a path is a patch, whose estimate the bare model gives."""
    name, site = "gpt_neox", f"resid_post layer {layer}"
    receiver = "logits" if layer == 2 else f"resid_pre layer {layer + 1}"
    measures = [f"measure {text} as delta" for text in metrics(name)]
    rule = f"path {site} -> {receiver} at subject tokens"
    text = experiment("e", "from other into clean", rule, "using eap", *measures, measure="")
    found = run_file(text, data, name, "small passes")["e"]
    for number, metric in enumerate(metrics(name)):
        given = (name, "resid_post", layer, whole_subject, metric, "gradient_input")
        largest = agrees(found, number, by_hand(*given), None)
        assert layer == 2 or largest > 1e-3, metric


# --- changed derivatives --------------------------------------------------------------------------

QUERIES = Where("model.layers.2.self_attn.q_proj", "out", 4)
END = Where("model.layers.2", "out")


def change(site: Where, ids: Sequence[int], other: Sequence[int], at: int) -> Tensor:
    """[units, width]: a source value at a token less that of the base run."""
    source, base = (read("llama", tuple(own), site) for own in (other, ids))
    return source[at] - base[at]


@torch.no_grad()
def reaches(change: Tensor, head: int, stream: Tensor) -> Tensor:
    """[head, width]: the change of the queries of layer 2, whose norm divides by a constant, by
    that of a head's output in layer 1."""
    model = double("llama").model
    width = change.shape[-1]
    weight = model.layers[1].self_attn.o_proj.weight[:, head * width : (head + 1) * width]
    norm = model.layers[2].input_layernorm
    size = (stream.pow(2).mean() + norm.variance_epsilon).sqrt()
    found = model.layers[2].self_attn.q_proj.weight @ (norm.weight * (weight @ change) / size)
    return found.unflatten(0, (4, -1))


@pytest.mark.parametrize("kind", some(["relp", "gim"], ["relp"]))
def test_estimates_of_edges_with_changed_derivatives_equal_autograd(data: Path, kind: str) -> None:
    """The norm of a receiver divides by a constant, and its input has the coefficient of the bare
    model. MLPs on the way to the end have the rules too."""
    given = "from other into clean", f"using {kind}"
    text = experiment("queries", "path layer 1 head * -> q layer 2 head * at last token", *given)
    text += experiment("end", "path attn_out layer 1 -> logits at last token through mlps", *given)
    frozen = "path attn_out layer 1 -> logits at last token with frozen norms"
    text += experiment("frozen", frozen, *given) + experiment("run", frozen, given[0])
    found = run_file(text, data, "llama", "small passes", precise=True)
    said = found["queries"].conventions["estimates"]
    assert "the change of the senders, times" in said
    assert "along the edges, while all else is held" in said
    assert "what is written" not in said
    module = ruled(double("llama"), kind)
    expected = np.zeros((16, len(records())))
    ends = np.zeros(len(records()))
    for n, record in enumerate(records()):
        own, other = prompt(record), prompt(record, "other")
        forward = call_metric("llama", ONE, own, record, torch.zeros(()))
        slope = taken(module, QUERIES, forward).gradient[own.last]
        stream = read("llama", tuple(own.ids), Where("model.layers.2", "in"))[own.last, 0]
        heads = change(where("llama", "z", 1), own.ids, other.ids, own.last)
        for head, value in enumerate(heads):
            parts = (reaches(value, head, stream) * slope).sum(-1)
            expected[4 * head : 4 * head + 4, n] = parts.tolist()
        constant = module.get_submodule("model.layers.2.self_attn")
        handle = constant.register_forward_hook(lambda part, args, out: (out[0].detach(), *out[1:]))
        attention = Where("model.layers.1.self_attn", "out")
        slope = taken(module, attention, forward).gradient[own.last]
        handle.remove()
        ends[n] = float((change(attention, own.ids, other.ids, own.last) * slope).sum())
    effects = {key: own.measures[0].patched - own.measures[0].base for key, own in found.items()}
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(effects["queries"], expected, rtol=0, atol=1e-6)
    assert np.abs(ends).max() > 1e-2
    np.testing.assert_allclose(effects["end"][0], ends, rtol=0, atol=1e-6)
    np.testing.assert_allclose(effects["frozen"], effects["run"], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_estimates_of_all_edges_of_bert_equal_derivatives(tmp_path: Path) -> None:
    """Norms follow the sums of the stream. The reference has a share for each edge."""
    receivers = {site: f"{site} layer * head *" for site in "qkv"}
    receivers |= {"mlp": "mlp_norm layer *", "logits": "logits"}
    senders = {"head": "layer * head *", "mlp": "mlp_out layer *", "embed": "resid_pre layer 0"}
    effect = "measure logit(class answer) - logit(class wrong) as delta"
    text = "".join(
        support.experiment(
            f"{of}_{to}", "prompts p", "from other into clean",
            f"path {senders[of]} -> {receivers[to]} at tokens *", "using eap", effect,
        )
        for of in senders
        for to in receivers
    )  # fmt: skip
    found = support.run_file(text, tmp_path, bert.bare(), prompts=bert.PROMPTS)
    edges = bert.list_edges()
    total = torch.zeros(len(edges)).double()
    for own, other in zip(support.prompts(), support.prompts("other"), strict=True):
        with torch.no_grad():
            plain, filled = (bert.classify(each.ids)[1] for each in (own, other))
        unmoved = torch.zeros_like(plain[bert.EMBED])
        total += bert.derivatives(own.ids, plain, filled, edges, unmoved)
    expected = dict(zip(edges, (total / len(support.prompts())).tolist(), strict=True))
    assert np.ptp(list(expected.values())) > 0.01
    for key, result in found.items():
        of, to = key.split("_")
        data = result.measures[0]
        for cell, value in zip(result.cells, (data.patched - data.base).mean(1), strict=True):
            axes: list[Any] = list(cell.coords.values())
            count = {"head": 2, "mlp": 1, "embed": 0}[of]
            sender = (
                {"head": bert.head, "mlp": bert.mlp}[of](*axes[:count]) if count else bert.EMBED
            )
            receiver = bert.LOGITS
            if to == "mlp":
                receiver = bert.mlp(*axes[count:])
            elif to != "logits":
                receiver = f"{bert.head(*axes[count:])}.{to}"
            assert value == pytest.approx(expected.pop((sender, receiver)), abs=1e-5)
    assert not expected


# --- cells that are run, plans, stored values -----------------------------------------------------

HEADS = ("from other into clean", "path layer 0 head * -> q layer * head * at last token")


def test_verified_edges_have_the_effects_of_runs(data: Path) -> None:
    text = experiment("swept", *HEADS)
    text += experiment("some", *HEADS, "using eap verify top 3, random 6")
    text += experiment("stable", *HEADS, "using eap verify until stable")
    found = run_file(text, data, "llama", "planned")
    exact = found["swept"].statistics[0].mean
    assert np.abs(exact).max() > 1e-2
    for key in ("some", "stable"):
        (verified,) = found[key].verified
        np.testing.assert_allclose(verified.exact, exact[verified.cells], rtol=1e-3, atol=1e-5)
    (verified,) = found["some"].verified
    estimates = found["some"].statistics[0].mean
    order = np.argsort(-np.abs(estimates), kind="stable")
    assert verified.cells[:3].tolist() == order[:3].tolist()
    assert verified.over_random is not None
    assert "Spearman" in found["some"].to_text()


@pytest.mark.parametrize(
    ("through", "using", "gradients"),
    [("", "eap", 1), (" through mlps", "eap", 1), ("", "eap_ig(steps: 4)", 4)],
)
def test_plan_counts_the_passes_of_edges(
    tmp_path: Path, through: str, using: str, gradients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward passes from receivers only cost where they pass MLPs: here from 8 queries."""
    backwards = 2 * (gradients + (8 if through else 0))
    write_data(tmp_path)
    measures = "measure loss as delta", "measure logit(answer) as delta"
    text = experiment("e", HEADS[0], HEADS[1] + through, f"using {using}", *measures, measure="")
    checked = check_file(text, tmp_path, shared_model(bare("gpt2")))
    ((own,),) = (panel.experiments for panel in make_plan(checked.experiments).panels)
    work = gradient_work(
        own, np.arange(len(records())), lambda lengths, sources: (lengths, lengths), 10_000
    )
    assert (work.joined_forwards, work.joined_backwards) == (2 + gradients, backwards)
    calls: list[str] = []

    def count(module: Any, name: str) -> None:
        run = getattr(module, name)

        def counted(*given: Any, **more: Any) -> Any:
            calls.append(name)
            return run(*given, **more)

        monkeypatch.setattr(module, name, counted)

    for module in (differentiated_run, held_passes):
        count(module, "run_full")
    count(torch.autograd, "grad")
    execute_file(checked, shared_model(bare("gpt2")))
    assert calls.count("run_full") == 2 + gradients
    assert calls.count("grad") == 2 * (gradients + 8)


def test_interrupted_estimates_of_edges_resume(tmp_path: Path) -> None:
    text = experiment("e", *HEADS, "using eap", 'measure logprob("w3 w9") as delta')
    check_case("llama", text.replace("  model m\n", ""), tmp_path, cut=1)


# --- errors ---------------------------------------------------------------------------------------

EDGE = "path layer 0 head * -> q layer 1 head * at last token"
WRONG = {
    "patch": ("patch layer 0 head * at last token", "eap", "or `using atp`"),
    "circuit": ("ablate c at tokens * with zero", "eap", "write `ablate c without each edge`"),
    "block": ("block attention layer 0 from last token to subject token", "eap", "write `path"),
    "atp": (EDGE, "atp", "write `using eap`"),
    "cdt": (EDGE, "cdt", "write `using atp_qk`"),
    "streams": ("path late -> logits at last token", "eap", "sweep them"),
    "sublayer": ("path both -> logits at last token", "eap", "sweep them"),
    "mlps": ("path mlps -> logits at last token through mlps", "eap", "sweep them"),
    "layers": ("path embed -> q layers * head * at last token", "eap", "heads' inputs"),
    "input": ("path embed -> inner at last token", "eap", "heads' inputs"),
    "two rules": (f"{EDGE}\n  ablate L0H1 at last token with zero", "eap", "remove `using"),
    "answer": ("path layer 0 head * -> logits at answer token", "eap", "name tokens of the prompt"),
    "lengths": (f"from longer into clean\n  {EDGE}", "eap_ig", "texts with as many tokens"),
    "senders": (f"from longer into clean\n  {EDGE}", "eap_ig_activations", "as many tokens"),
    "ablation": ("ablate L0H1 at last token with zero", "eap_ig", "write `patch` with"),
    "node": ("patch L0H1 at last token", "eap_ig_activations", "or `using atp`"),
    "node lengths": (
        "from longer into clean\n  patch L0H1 at last token",
        "eap_ig",
        "or write `using gradient_input`",
    ),
    "norms": (
        "path layer 0 head * -> logits at last token with frozen norms",
        "eap_ig",
        "write `using eap`",
    ),
}
ENDS = """
group late = resid_post layer 0, L1H1
group both = L0H1, attn_out layer 0
group mlps = L0.mlp, L1.mlp
group inner = L1H1.q, attn_norm layer 1
circuit c = embed -> L1H1.q
"""


@pytest.mark.parametrize("key", list(WRONG))
def test_edges_without_an_estimate_are_errors(data: Path, key: str) -> None:
    rule, word, hint = WRONG[key]
    runs = () if rule.startswith("from") else ("from other into clean",)
    text = ENDS + experiment("e", *runs, rule, f"using {word}")
    found, problems = try_file(text, data, "gpt2")
    assert found is None
    written = render_full(problems[:1], color=False, width=100)
    assert "E0608" in written, written
    assert hint in written, written
