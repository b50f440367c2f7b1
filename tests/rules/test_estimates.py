"""`using`: estimates by gradients, in a file, against plain autograd on the bare model in 64 bits,
one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.execute.patching import differentiated_run, estimates
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.cost import gradient_work
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.results.differences.cells import match_measures
from mechdsl.results.document import experiment_document
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.graph import to_text
from mechdsl.show.reports.grid import value_title

from ..execute.support import MODES as WAYS
from ..execute.support import (
    PROMPTS,
    ROWS,
    Prompt,
    Record,
    check_file,
    execute_file,
    experiment,
    ids_of,
    prompt,
    run_file,
    shared,
    token,
    try_file,
    write_rows,
)
from ..execute.test_stored_values import check_case
from ..quick import in_turn
from ..reference.gradients import Where, estimated, taken
from .models import bare, double

FAMILIES = ("gpt2", "llama", "gpt_neox")
STEPS = 3


# --- modules of sites -----------------------------------------------------------------------------

OF_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
_LIKE_LLAMA = ("llama", "mistral", "qwen3", "gemma2", *OF_EXPERTS)
_BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    **dict.fromkeys(_LIKE_LLAMA, "model.layers"),
}
_EMBED = {"gpt2": "transformer.wte", "llama": "model.embed_tokens", "gpt_neox": "gpt_neox.embed_in"}
_OUTPUT = {
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    **dict.fromkeys(_LIKE_LLAMA, "self_attn.o_proj"),
}


def where(family: str, site: str, layer: int | None) -> Where:
    block = f"{_BLOCKS[family]}.{layer}"
    config = double(family).config
    heads = config.num_attention_heads
    match site:
        case "embed":
            return Where(_EMBED[family], "out")
        case "resid_pre" | "resid_post":
            return Where(block, "in" if site == "resid_pre" else "out")
        case "z":
            return Where(f"{block}.{_OUTPUT[family]}", "in", heads)
        case "mlp_out":
            return Where(f"{block}.mlp", "out")
        case "k" | "v":  # of llama, whose heads share them
            return Where(f"{block}.self_attn.{site}_proj", "out", config.num_key_value_heads)
        case _:
            raise AssertionError(site)


# --- reference metrics ----------------------------------------------------------------------------

LONG = "w7 w9 w2"
Metric = tuple[Sequence[int], Callable[[Tensor, Prompt, Record, Tensor], Tensor]]
"""The tokens after the prompt, and the value from the logits [T, vocab], the prompt, its record and
the final logits of the prompt of `other`."""


def _long(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    logs = logits[own.last : own.last + 3].log_softmax(-1)
    return sum((logs[n, one] for n, one in enumerate(ids_of(LONG.split())[1:])), torch.zeros(()))


def _kl(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    log_p, log_q = other.log_softmax(-1), logits[own.last].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def _loss(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    logs = logits[:-1].log_softmax(-1)
    return -logs[torch.arange(own.last), torch.tensor(own.ids[1:])].mean()


def _difference(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    return logits[own.last, token(record["a"])] - logits[own.last, token(record["b"])]


def _at_cue(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
    return logits[own.cue, token(record["a"])]


ONE = "logit(answer) - logit(wrong)"


@cache
def likely(family: str) -> str:
    """The most likely word after the first prompt."""
    ids = tuple(prompt(ROWS[0]).ids)
    return f"w{int(logits_at_the_end(family, ids).argmax()) - token('w0')}"


@cache
def metrics(family: str) -> Mapping[str, Metric]:
    word = likely(family)

    def prob(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
        return logits[own.last].softmax(-1)[token(word)]

    def product(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
        return logits[own.last, token(record["a"])] * prob(logits, own, record, other) / 2

    def either(logits: Tensor, own: Prompt, record: Record, other: Tensor) -> Tensor:
        single = logits[own.last].log_softmax(-1)[token(word)]
        return single.logaddexp(_long(logits, own, record, other))

    return {
        ONE: ((), _difference),
        f'prob(" {word}")': ((), prob),
        f'logprob(" {LONG}")': (ids_of(LONG.split())[1:3], _long),
        f'logprob(" {word}", " {LONG}")': (ids_of(LONG.split())[1:3], either),
        "kl(other)": ((), _kl),
        "loss": ((), _loss),
        f'logit(answer) * prob(" {word}") / 2': ((), product),
        "logit(answer) at cue token": ((), _at_cue),
    }


def call_metric(
    family: str, text: str, own: Prompt, record: Record, other: Tensor
) -> Callable[[Any], Tensor]:
    behind, number = metrics(family)[text]

    def forward(module: Any) -> Tensor:
        ids = torch.tensor([[*own.ids, *behind]])
        return number(module(input_ids=ids).logits[0], own, record, other)

    return forward


@cache
def logits_at_the_end(family: str, ids: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return double(family)(input_ids=torch.tensor([ids])).logits[0, -1]


@cache
def read(family: str, ids: tuple[int, ...], at: Where) -> Tensor:
    """[T, units, width] of an unpatched prompt."""
    found = taken(
        double(family), at, lambda module: module(input_ids=torch.tensor([ids])).logits.sum()
    )
    return found.value


# --- reference estimates --------------------------------------------------------------------------

Key = tuple[Any, ...]
Cells = Callable[[Prompt, int], Mapping[Key, Sequence[tuple[int, int]]]]
"""From a prompt and the units of a site: the vectors of each cell, by label (without the layer)."""


def by_hand(
    family: str,
    site: str,
    layer: int | None,
    cells: Cells,
    text: str,
    kind: str,
    ways: tuple[str, str] = ("other", "clean"),
    fill: Callable[[Prompt, Prompt, int], int | None] = lambda base, source, at: at,
    module: Any = None,
) -> dict[Key, list[float]]:
    """Return reference estimates by cell.

    fill: from both prompts and a base position, the source position; None means zeros. module:
    the model to differentiate, if its derivatives are changed."""
    module = double(family) if module is None else module
    at = where(family, site, layer)
    found: dict[Key, list[float]] = {}
    for record in ROWS:
        base, source = prompt(record, ways[1]), prompt(record, ways[0])
        theirs = read(family, tuple(source.ids), at)
        compared = logits_at_the_end(family, tuple(prompt(record, "other").ids))

        def written(position: int, unit: int, base: Prompt = base, source: Prompt = source,
                    theirs: Tensor = theirs) -> Tensor:  # fmt: skip
            there = fill(base, source, position)
            return torch.zeros_like(theirs[0, unit]) if there is None else theirs[there, unit]

        forward = call_metric(family, text, base, record, compared)
        own = cells(base, at.units)
        for key, value in estimated(module, at, forward, own, written, kind, STEPS).items():
            found.setdefault(key, []).append(value)
    return found


def heads_at_last(own: Prompt, units: int) -> dict[Key, list[tuple[int, int]]]:
    return {(unit,): [(own.last, unit)] for unit in range(units)}


def all_at_last(own: Prompt, units: int) -> dict[Key, list[tuple[int, int]]]:
    return {(): [(own.last, unit) for unit in range(units)]}


def whole_subject(own: Prompt, units: int) -> dict[Key, list[tuple[int, int]]]:
    return {(): [(at, unit) for at in own.subject for unit in range(units)]}


def heads_at_subject(own: Prompt, units: int) -> dict[Key, list[tuple[int, int]]]:
    return {(unit,): [(at, unit) for at in own.subject] for unit in range(units)}


def all_items(own: Prompt, units: int) -> dict[Key, list[tuple[int, int]]]:
    return {(): [(at, unit) for at in own.items for unit in range(units)]}


def two_places(own: Prompt, units: int) -> dict[Key, list[tuple[int, int]]]:
    return {("cue token",): [(own.cue, 0)], ("last token",): [(own.last, 0)]}


def agrees(
    result: ExperimentResult,
    number: int,
    expected: Mapping[Key, Sequence[float]],
    layer: int | None,
) -> float:
    """Assert that each cell of a layer has the expected values; return the largest."""
    data = result.measures[number]
    found = data.patched if data.effect == "raw" else data.patched - data.base
    largest, seen = 0.0, 0
    for values, cell in zip(found, result.cells, strict=True):
        if layer is not None and cell.coords["layer"] != layer:
            continue
        key = tuple(cell.coords[axis] for axis in result.axes if axis != "layer")
        wanted = np.array(expected[key])
        allowed = np.minimum(1e-4, np.maximum(1e-3 * np.abs(wanted), 2e-6))
        assert (np.abs(values - wanted) <= allowed).all(), (key, values, wanted)
        largest, seen = max(largest, float(np.abs(wanted).max())), seen + 1
    assert seen == len(expected)
    return largest


def measured(text: str, effect: str) -> str:
    return f"measure {text} as {effect}"


# --- tests ----------------------------------------------------------------------------------------

LAYERS = (0, 1, 2)
CASES: dict[str, tuple[str, str, Cells, tuple[int | None, ...]]] = {
    "heads": ("z", "patch layer * head * at last token", heads_at_last, LAYERS),
    "joined_heads": ("z", "patch layer * heads * at last token", all_at_last, LAYERS),
    "streams": ("resid_pre", "patch resid_pre layer * at subject tokens", whole_subject, LAYERS),
    "places": (
        "resid_post",
        "patch resid_post layer * at cue token, last token",
        two_places,
        LAYERS,
    ),
    # Equal in both runs: the patch changes nothing, and the gradient isn't 0.
    "items": ("resid_pre", "patch resid_pre layer * at item tokens", all_items, LAYERS),
    "embedding": ("embed", "patch embed at subject tokens", whole_subject, (None,)),
}
KINDS = ("gradient", "gradient_input", "integrated_gradients")
TWO = ["gradient_input", pytest.param(KINDS[-1], marks=pytest.mark.slow)]


def using(kind: str) -> str:
    return f"using {kind}" + (f"(steps: {STEPS})" if kind == KINDS[-1] else "")


def effect_of(kind: str) -> str:
    return "raw" if kind == "gradient" else "delta"


@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "kind"), in_turn(FAMILIES, KINDS, FAMILIES))
def test_estimates_of_sites_and_positions_equal_autograd(
    family: str, kind: str, mode: str, tmp_path: Path
) -> None:
    measure = measured(ONE, effect_of(kind))
    text = "".join(
        experiment(name, "prompts p", "from other into clean", rule, using(kind), measure)
        for name, (_, rule, _, _) in CASES.items()
    )
    found = run_file(text, tmp_path, bare(family), WAYS[mode])
    largest = 0.0
    for name, (site, _, cells, layers) in CASES.items():
        for layer in layers:
            expected = by_hand(family, site, layer, cells, ONE, kind)
            largest = max(largest, agrees(found[name], 0, expected, layer))
            if name == "items":
                assert all(all(own) == (kind == "gradient") for own in expected.values())
    assert largest > 0.3


@pytest.mark.parametrize(
    "mode", ["small passes", pytest.param("padded on the right", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_estimates_of_all_metrics_equal_autograd(
    family: str, kind: str, mode: str, tmp_path: Path
) -> None:
    lines = [measured(text, "delta") for text in metrics(family)]
    rule = "patch resid_post layer 1 at subject tokens"
    text = experiment("e", "prompts p", "from other into clean", rule, using(kind), *lines)
    found = run_file(text, tmp_path, bare(family), WAYS[mode])["e"]
    for number, metric in enumerate(metrics(family)):
        expected = by_hand(family, "resid_post", 1, whole_subject, metric, kind)
        assert agrees(found, number, expected, None) > 1e-3, metric


def test_estimates_from_prompts_of_other_lengths_equal_autograd(tmp_path: Path) -> None:
    """Source values are read at the same named position of a longer or shorter text."""
    text = experiment(
        "e",
        "prompts p",
        "from longer into clean",
        "patch mlp_out layer * at cue token, last token",
        "using integrated_gradients(steps: 3)",
        measured(ONE, "delta"),
    )
    found = run_file(text, tmp_path, bare("gpt_neox"))["e"]

    def fill(base: Prompt, source: Prompt, at: int) -> int:
        return source.cue if at == base.cue else source.last

    for layer in LAYERS:
        given = ("gpt_neox", "mlp_out", layer, two_places, ONE, KINDS[-1])
        agrees(found, 0, by_hand(*given, ways=("longer", "clean"), fill=fill), layer)


@pytest.mark.parametrize("site", ["k", "v"])
def test_estimates_of_shared_keys_and_values_equal_autograd(site: str, tmp_path: Path) -> None:
    rule = f"patch {site} layer 1 head * at subject tokens"
    lines = ("prompts p", "from other into clean", rule, using(KINDS[-1]), measured(ONE, "delta"))
    found = run_file(experiment("e", *lines), tmp_path, bare("llama"))["e"]
    assert len(found.cells) == double("llama").config.num_key_value_heads < 4
    expected = by_hand("llama", site, 1, heads_at_subject, ONE, KINDS[-1])
    assert agrees(found, 0, expected, None) > 1e-2


@pytest.mark.parametrize("kind", KINDS[1:])
def test_estimates_of_a_fill_axis_equal_separate_fills(kind: str, tmp_path: Path) -> None:
    """Zeros and means, separately and as an axis whose fills are interpolated independently."""
    lines = ("prompts p", using(kind), measured(ONE, "delta"))
    rule = "ablate resid_post layer 1 at cue token, last token with"
    fills = {"zero": "zero", "mean": "mean", "both": "zero, mean"}
    text = "".join(experiment(name, f"{rule} {fill}", *lines) for name, fill in fills.items())
    found = run_file(text, tmp_path, bare("gpt2"))
    given = ("gpt2", "resid_post", 1, two_places, ONE, kind)
    agrees(found["zero"], 0, by_hand(*given, fill=lambda *_: None), None)
    alone = {
        (name, cell.coords["position"]): values
        for name in ("zero", "mean")
        for cell, values in zip(found[name].cells, found[name].measures[0].patched, strict=True)
    }
    both = found["both"]
    assert not np.allclose(alone["zero", "cue token"], alone["mean", "cue token"])
    for cell, values in zip(both.cells, both.measures[0].patched, strict=True):
        key = (str(cell.coords["fill"]), cell.coords["position"])
        np.testing.assert_allclose(values, alone[key], rtol=0, atol=1e-6)


def test_estimate_of_a_mean_ablation_equals_autograd(tmp_path: Path) -> None:
    """`with mean`: over the rows, per position."""
    lines = ("prompts p", "using gradient_input", measured(ONE, "delta"))
    rule = "ablate resid_post layer 1 at cue token, last token with mean"
    found = run_file(experiment("e", rule, *lines), tmp_path, bare("gpt2"))["e"]
    at = where("gpt2", "resid_post", 1)
    own = [prompt(record) for record in ROWS]
    reads = [read("gpt2", tuple(each.ids), at) for each in own]
    mean = {
        "cue": torch.stack([v[p.cue, 0] for p, v in zip(own, reads, strict=True)]).mean(0),
        "last": torch.stack([v[p.last, 0] for p, v in zip(own, reads, strict=True)]).mean(0),
    }
    expected: dict[Key, list[float]] = {}
    for each, record in zip(own, ROWS, strict=True):
        forward = call_metric("gpt2", ONE, each, record, torch.zeros(()))
        written = {each.cue: mean["cue"], each.last: mean["last"]}
        given = (double("gpt2"), at, forward, two_places(each, 1))
        values = estimated(*given, lambda at, _, w=written: w[at], "gradient_input")
        for key, value in values.items():
            expected.setdefault(key, []).append(value)
    agrees(found, 0, expected, None)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_integrated_gradients_of_heads_sum_to_the_joint_effect(family: str, tmp_path: Path) -> None:
    """Cells of one site add up to the effect of all of them at once (completeness)."""
    lines = ("prompts p", "from other into clean", measured(ONE, "delta"))
    each = "patch layer * head * at subject tokens"
    joint = "patch layer * heads * at subject tokens"
    text = experiment("parts", each, "using integrated_gradients(steps: 60)", *lines)
    text += experiment("whole", joint, *lines)
    found = run_file(text, tmp_path, bare(family))
    whole = found["whole"].measures[0]
    parts = found["parts"].measures[0]
    changes = parts.patched - parts.base
    layer = np.array([cell.coords["layer"] for cell in found["parts"].cells])
    sums = np.stack([changes[layer == n].sum(0) for n in LAYERS])
    effect = whole.patched - whole.base
    assert np.abs(effect).max() > 0.1
    np.testing.assert_allclose(sums, effect, atol=2e-3, rtol=2e-3)
    assert np.abs(changes).max() < 10 * np.abs(effect).max()


@pytest.mark.slow
@pytest.mark.parametrize("ways", ["clean into noised", "noised into clean"])
def test_integrated_gradients_with_noise_draws_equal_the_run(ways: str, tmp_path: Path) -> None:
    """Gradients are computed in each noise draw, and estimates are averaged."""
    noised = PROMPTS.rstrip().removesuffix("}") + (
        "  corrupt noised { add gaussian(std: 1.5, samples: 3) to embed at subject tokens }\n}\n"
    )
    lines = (
        "prompts p",
        f"from {ways}",
        measured(ONE, "delta"),
        'measure logprob("w3 w9") as delta',
    )
    rule = "patch resid_post layer * at subject tokens"
    text = experiment("run", rule, *lines)
    text += experiment("joined", rule, "using integrated_gradients(steps: 30)", *lines)
    found = run_file(text, tmp_path, bare("llama"), prompts=noised)
    for run, joined in zip(found["run"].measures, found["joined"].measures, strict=True):
        effect = run.patched - run.base
        assert np.abs(effect).max() > 0.1
        np.testing.assert_allclose(joined.patched - joined.base, effect, atol=1e-3, rtol=1e-2)


def test_estimates_are_labelled_in_tables_records_and_json(tmp_path: Path) -> None:
    lines = ("prompts p", "from other into clean", "patch resid_post layer 1 at subject tokens")
    text = experiment("ig", *lines, "using integrated_gradients", measured(ONE, "delta"))
    text += experiment("size", *lines, "using gradient", measured(ONE, "raw"))
    text += experiment("run", *lines, measured(ONE, "delta"))
    found = run_file(text, tmp_path, bare("gpt2"))
    ig, size, run = found["ig"], found["size"], found["run"]
    assert "estimated delta of" in ig.to_text()
    assert "integrated_gradients(steps: 32)" in ig.conventions["estimates"]
    assert "clean run" in ig.conventions["estimates"]
    assert "m(patched)" not in ig.conventions["effect"]
    assert f"gradient of {ONE}" in size.to_text()
    assert np.isnan(size.statistics[0].p).all()
    assert {each["estimator"] for each in ig.records()} == {"integrated_gradients(steps: 32)"}
    assert not any("estimator" in each for each in run.records())
    (cell,) = experiment_document(ig).cells
    assert cell.measures[0].estimator == "integrated_gradients(steps: 32)"
    assert value_title(ig.measures[0]) == "Estimated change in logit difference (logits)"
    assert (
        value_title(size.measures[0]) == "Gradient of logit(answer) - logit(wrong)"
    )  # and not in logits
    assert len(match_measures(ig, ig)) == 1
    assert len(match_measures(ig, run)) == 0  # estimates aren't compared with runs
    assert ig.measures[0].rounding is None


def count_passes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the forward (`there`) and backward (`back`) passes of estimators."""
    calls = {"there": 0, "back": 0}
    run, back = estimates.run_full, torch.autograd.grad

    def counted_run(*given: Any, **named: Any) -> Any:
        calls["there"] += 1
        return run(*given, **named)

    def counted_back(*given: Any, **named: Any) -> Any:
        calls["back"] += 1
        return back(*given, **named)

    for module in (estimates, differentiated_run):
        monkeypatch.setattr(module, "run_full", counted_run)
    monkeypatch.setattr(estimates.torch.autograd, "grad", counted_back)
    return calls


Passes = tuple[int, int]
"""Forward and backward."""


def count_planned_passes(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, family: str = "gpt2"
) -> tuple[Passes, Passes]:
    """Passes of an experiment with the estimator: those that a plan counts and those that run."""
    write_rows(folder)
    checked = check_file(text, folder, shared(bare(family)))
    ((own,),) = (panel.experiments for panel in make_plan(checked.experiments).panels)
    work = gradient_work(
        own, np.arange(len(ROWS)), lambda lengths, sources: (lengths, lengths), 10_000
    )
    calls = count_passes(monkeypatch)
    execute_file(checked, shared(bare(family)))
    return (work.joined_forwards, work.joined_backwards), (calls["there"], calls["back"])


def test_plan_counts_the_passes_of_integrated_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    measures = [measured(text, "delta") for text in (ONE, 'logprob("w3 w9")', "loss")]
    rule = "patch z layer * head * at last token"
    lines = ("prompts p", "from other into clean", rule, "using integrated_gradients(steps: 4)")
    checked = check_file(experiment("e", *lines, *measures), tmp_path, shared(bare("gpt2")))
    plan = make_plan(checked.experiments)
    assert "Estimate · integrated_gradients(steps: 4)" in to_text(plan.graph)
    calls = count_passes(monkeypatch)
    execute_file(checked, shared(bare("gpt2")))
    (own,) = (each for panel in plan.panels for each in panel.experiments)
    work = gradient_work(
        own, np.arange(len(ROWS)), lambda lengths, sources: (lengths, lengths), 10_000
    )
    # Three layers, four steps; a text of several tokens has separate passes.
    assert (work.joined_forwards, work.joined_backwards) == (3 * 4 * 2 + 1, 3 * 4 * 3)
    assert (calls["there"], calls["back"]) == (3 * 4 * 2 + 1, 3 * 4 * 3)
    assert work.forwards == len(ROWS) * work.joined_forwards
    cost = plan_cost(plan)
    assert cost.plain.rows == cost.planned.rows == 0
    assert cost.planned.backwards == work.joined_backwards
    assert cost.plain.backwards == work.backwards


@cache
def stream(family: str, ids: tuple[int, ...]) -> Tensor:
    """[T, d_model] after block 1."""
    with torch.no_grad():
        found = double(family)(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return found.hidden_states[2][0]


@pytest.mark.parametrize("kind", TWO)
def test_estimate_of_a_cosine_equals_autograd(kind: str, tmp_path: Path) -> None:
    """The measure reads activations inside the model."""
    rule = "patch resid_post layer 0 at subject tokens"
    measure = "measure cosine(L1.resid, longer) at cue token as delta"
    text = experiment("e", "prompts p", "from other into clean", rule, using(kind), measure)
    found = run_file(text, tmp_path, bare("llama"))["e"]
    at, expected = where("llama", "resid_post", 0), list[float]()
    for record in ROWS:
        own, source = prompt(record), prompt(record, "other")
        longer = prompt(record, "longer")
        theirs = stream("llama", tuple(longer.ids))[longer.cue]

        def forward(module: Any, own: Prompt = own, theirs: Tensor = theirs) -> Tensor:
            ids = torch.tensor([own.ids])
            states = module(input_ids=ids, output_hidden_states=True).hidden_states[2]
            return torch.cosine_similarity(states[0, own.cue], theirs, dim=0)

        values = read("llama", tuple(source.ids), at)
        given = (double("llama"), at, forward, whole_subject(own, 1))
        done = estimated(*given, lambda at, unit, v=values: v[at, unit], kind, STEPS)
        expected.append(done[()])
    assert agrees(found, 0, {(): expected}, None) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_use_the_measure_text_of_each_cell(kind: str, tmp_path: Path) -> None:
    """`{item.index}` and the gradient are those of the cell."""
    rule = "patch resid_post layer 0 at each item token"
    measure = f'measure logit("w{{item.index}}") as {effect_of(kind)}'
    text = experiment("e", "prompts p", "from turned into clean", rule, using(kind), measure)
    found = run_file(text, tmp_path, bare("gpt2"))["e"]
    data = found.measures[0]
    values = data.patched if kind == "gradient" else data.patched - data.base
    at, seen = where("gpt2", "resid_post", 0), 0
    for row, record in enumerate(ROWS):
        own, source = prompt(record), prompt(record, "turned")
        theirs = read("gpt2", tuple(source.ids), at)
        cells = {n: [(place, 0)] for n, place in enumerate(own.items, 1)}
        for n in cells:

            def forward(module: Any, own: Prompt = own, word: int = token(f"w{n}")) -> Tensor:
                return module(input_ids=torch.tensor([own.ids])).logits[0, own.last, word]

            given = (double("gpt2"), at, forward, cells)
            done = estimated(*given, lambda at, unit, v=theirs: v[at, unit], kind, STEPS)
            np.testing.assert_allclose(values[n - 1, row], done[n], rtol=1e-3, atol=2e-6)
            seen += 1
    assert seen == np.isfinite(values).sum() > 10


def test_estimates_leave_requires_grad_and_grad_unchanged(tmp_path: Path) -> None:
    module = bare("gpt2")
    parameters = dict(module.named_parameters())
    flags = {name: each.requires_grad for name, each in parameters.items()}
    some = next(iter(parameters))
    parameters[some].requires_grad_(not flags[some])
    try:
        lines = ("prompts p", "from other into clean", measured(ONE, "delta"))
        rule = "patch resid_post layer 1 at subject tokens"
        run_file(experiment("e", rule, "using gradient_input", *lines), tmp_path, module)
        assert parameters[some].requires_grad != flags[some]
        others = (name for name in parameters if name != some)
        assert all(parameters[name].requires_grad == flags[name] for name in others)
        assert all(each.grad is None for each in parameters.values())
    finally:
        parameters[some].requires_grad_(flags[some])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_estimates_halve_batches_when_memory_runs_out(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("prompts p", "from other into clean", measured(ONE, "delta"))
    rule = "patch resid_post layer * at subject tokens"
    text = experiment("e", rule, "using integrated_gradients(steps: 2)", *lines)
    whole = run_file(text, tmp_path, bare("gpt2"))["e"]
    run, raised = estimates.run_full, [0]

    def full(model: Any, batch: Any, **given: Any) -> Any:
        if len(batch) > 1:
            raised[0] += 1
            raise error
        return run(model, batch, **given)

    monkeypatch.setattr(estimates, "run_full", full)
    found = run_file(text, tmp_path, bare("gpt2"))["e"]
    assert raised[0] > 0
    assert "halved" in found.conventions["memory"]
    np.testing.assert_allclose(
        found.measures[0].patched, whole.measures[0].patched, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_estimates_of_long_prompts_are_unchanged_by_recomputed_activations(
    family: str, tmp_path: Path
) -> None:
    """In passes of fewer tokens than a prompt has in all layers, activations aren't stored."""
    lines = ("prompts p", "from other into clean", measured(ONE, "delta"))
    text = "".join(
        experiment(f"e{n}", f"patch {site} at subject tokens", f"using {using}", *lines)
        for n, (site, using) in enumerate(
            (("resid_post layer *", "atp"), ("z layer * head *", "integrated_gradients(steps: 2)"),
             ("mlp_hidden layer 1", "gradient_input"), ("attn_out layer *", "relp"))
        )
    )  # fmt: skip
    whole = run_file(text, tmp_path, bare(family))
    small = RunOptions(execution=ExecutionOptions(pass_tokens=5))
    found = run_file(text, tmp_path, bare(family), small)
    for name, each in found.items():
        expected = whole[name].measures[0].patched
        np.testing.assert_allclose(each.measures[0].patched, expected, rtol=0, atol=1e-5)
        assert np.abs(expected - whole[name].measures[0].base).max() > 1e-3
    assert "computed activations again where possible" in found["e0"].conventions["gradients"]
    assert "gradients" not in whole["e0"].conventions


def test_recomputed_activations_are_counted_for_each_experiment(tmp_path: Path) -> None:
    """Experiments without an estimator have no backward passes; others count their own prompts."""
    lines = (
        "from other into clean",
        "patch attn_out layer * at last token",
        measured(ONE, "delta"),
    )
    text = experiment("plain", "prompts p", *lines)
    text += experiment("all", "prompts p", "using gradient_input", *lines)
    text += experiment("few", "prompts p limit 2", "using gradient_input", *lines)
    small = RunOptions(execution=ExecutionOptions(pass_tokens=5))
    found = run_file(text, tmp_path, bare("gpt2"), small)
    assert "gradients" not in found["plain"].conventions
    counts = {name: len(found[name].row_ids or ()) for name in ("all", "few")}
    for name, count in counts.items():
        said = found[name].conventions["gradients"]
        assert said.startswith(f"backward passes of {count} prompts ")
    assert counts["all"] > counts["few"] == 2


def test_autograd_failure_is_an_error_of_the_estimate_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: Any, **named: Any) -> Any:
        raise RuntimeError("one of the variables has been modified by an inplace operation")

    monkeypatch.setattr(estimates.torch.autograd, "grad", refused)
    lines = ("prompts p", "from other into clean", measured(ONE, "delta"))
    rule = "patch resid_post layer 1 at subject tokens"
    text = experiment("e", rule, "using gradient_input", *lines)
    text += experiment("run", rule, *lines)
    result, problems = try_file(text, tmp_path, bare("gpt2"))
    assert result is not None
    assert [each.name for each in result.experiments] == ["run"]
    assert [each.code for each in problems if each.severity == "error"] == ["E0608"]


@pytest.mark.parametrize("kind", TWO)
def test_interrupted_estimates_resume(kind: str, tmp_path: Path) -> None:
    lines = ("prompts p", "from other into clean", measured(ONE, "delta"))
    rule = "patch z layer * head * at subject tokens, last token"
    text = experiment("e", rule, using(kind), *lines, 'measure logprob("w3 w9") as delta')
    check_case("llama", text, tmp_path, cut=1)
