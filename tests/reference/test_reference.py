"""The references, compared with the bare model and with each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ..families import build, tables
from ..families.parts import Architecture
from ..quick import some
from ..rules.models import BIASED_OUTPUT, FAMILIES, STRAIGHT, WITHOUT_NORMS, bare, double
from . import hooks
from .forward import STACKS, Changes, Edge, Run, Write, forward, side_by_side, stack

NAMES = (*FAMILIES, *(name + WITHOUT_NORMS for name in STRAIGHT))
IDS = [1, 5, 17, 40, 22, 9, 31, 33, 46, 12]
T = len(IDS)


@pytest.mark.parametrize("name", NAMES)
def test_forward_without_edits_equals_the_bare_model(name: str) -> None:
    run = forward(name, double(name), IDS)
    with torch.no_grad():
        expected = double(name)(torch.tensor([IDS])).logits[0]
        single = bare(name)(torch.tensor([IDS])).logits[0].double()
    large = max(1.0, float(expected.abs().max()))  # some norms have 32 bits in any case
    assert (run.logits - expected).abs().max() <= 1e-5 * large
    assert (run.logits - single).abs().max() <= 1e-5 * large
    assert expected.std() > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_forward_pattern_equals_eager_attention(name: str) -> None:
    model: Any = copy.deepcopy(double(name))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([IDS]), output_attentions=True).attentions
    run = forward(name, double(name), IDS)
    for layer, pattern in enumerate(found):
        assert (run["pattern", layer] - pattern[0].transpose(0, 1)).abs().max() <= 1e-5


ROWS = {row.name.replace("/", "_"): row for row in tables.every() if isinstance(row, Architecture)}
PLAIN_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
"""`forward` doesn't implement YaRN, which the table uses here."""


@pytest.mark.parametrize("name", some(STACKS, list(STACKS)[::2]))
def test_forward_sites_and_writes_equal_hooks(name: str) -> None:
    """Every layer is compared, also with a write at each site in turn."""
    row = ROWS[name]
    rotary = {"rope_parameters": PLAIN_ROTARY} if name == "gpt_oss" else {}
    model = build.model(row, **rotary).double()
    model.config._experts_implementation = "eager"  # the others have no 64 bits
    prompt = {"input_ids": torch.tensor([IDS])}
    generator = torch.Generator().manual_seed(3)
    run = forward(name, model, IDS)
    large = max(1.0, float(run.logits.abs().max()))
    for layer in range(row.main.count):
        _, seen = hooks.run(row, model, prompt, layer)
        for site, value in seen.items():
            place = (site, None if site in hooks.WITHOUT_LAYER else layer)
            if place not in run.seen:
                assert site in ("router", "expert_out")
                continue
            assert (run[place] - value).abs().max() <= 1e-5 * large, place
            position, unit = 4, value.shape[1] - 1
            vector = torch.randn(value.shape[2], generator=generator, dtype=torch.float64)
            change = hooks.Change(position, unit, vector)
            expected, _ = hooks.run(row, model, prompt, layer, site, [change])
            written = forward(name, model, IDS, [Write(*place, vector, position, unit)])
            assert (written.logits - expected).abs().max() <= 1e-5 * large, place
            assert (written.logits - run.logits).abs().max() > 1e-4 * large, place


def test_forward_writes_in_two_layers_equal_hooks() -> None:
    row = ROWS["llama"]
    model = build.model(row).double()
    plain = forward("llama", model, IDS)
    writes = [
        Write(site, layer, plain[site, layer][3, -1] * -2 + 1, position, unit)
        for site, layer, position, unit in (("z", 0, 4, 3), ("mlp_hidden", 1, 6, 5))
    ]
    vectors = [write.vector for write in writes if isinstance(write.vector, torch.Tensor)]
    first, second = (
        hooks.Change(write.position or 0, write.unit or 0, vector)
        for write, vector in zip(writes, vectors, strict=True)
    )
    with hooks.hooked(model, row.main, 0, hooks.Session([("z", [first])])):
        prompt = {"input_ids": torch.tensor([IDS])}
        expected, seen = hooks.run(row, model, prompt, 1, "mlp_hidden", [second])
    run = forward("llama", model, IDS, writes)
    assert (run.logits - expected).abs().max() <= 1e-5
    assert (run["mlp_hidden", 1] - seen["mlp_hidden"]).abs().max() <= 1e-5
    for write in writes:
        alone = forward("llama", model, IDS, [write])
        assert (alone.logits - run.logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_writes_of_read_values_change_nothing(name: str) -> None:
    plain = forward(name, double(name), IDS)
    writes = [
        Write(site, layer, value[position, unit], position, unit)
        for (site, layer), value in plain.seen.items()
        for position in range(T)
        for unit in range(value.shape[1])
        if site != "mlp_hidden" or unit == 0
    ]
    again = forward(name, double(name), IDS, writes)
    assert torch.equal(again.logits, plain.logits)


def test_head_outputs_and_bias_sum_to_the_attention_output() -> None:
    for name in FAMILIES:
        plain = forward(name, double(name), IDS)
        bias = stack(name, double(name)).output(stack(name, double(name)).block(1))[1]
        assert (bias is not None) == (name in BIASED_OUTPUT)
        if name == "gemma2":
            continue
        total = plain["head_out", 1].sum(1) + (0 if bias is None else bias)
        assert (total - plain["attn_out", 1][:, 0]).abs().max() <= 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_copies_equal_separate_passes(name: str) -> None:
    plain = forward(name, double(name), IDS)
    vector = -2 * plain["resid_pre", 1][3, 0] + 1
    head, stream = Write("z", 0, plain["z", 0][3, -1] + 1, 4, 1), Write("resid_pre", 1, vector, 5)
    block, fixed = Edge("block", 1, [9], [8, 9]), Edge("set", 1, [9], [8], 0.2, [2])
    each: list[Changes] = [([], []), ([head], []), ([], [block]), ([stream, head], [fixed])]
    runs = side_by_side(name, double(name), IDS, each)
    for n, (run, (writes, edges)) in enumerate(zip(runs, each, strict=True)):
        alone = forward(name, double(name), IDS, writes, edges)
        assert (run.logits - alone.logits).abs().max() <= 1e-5
        for place, value in alone.seen.items():
            assert torch.allclose(run[place], value, atol=1e-5), place
        assert not n or (run.logits - plain.logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "bloom", "mixtral", "falcon"])
def test_hooked_copies_equal_separate_passes(name: str) -> None:
    """There is one copy for each site of a layer, and one without a change."""
    row = ROWS[name]
    model: Any = build.model(row).double()
    model.set_experts_implementation("eager")
    prompt = {"input_ids": torch.tensor([IDS])}
    plain, before = hooks.run(row, model, prompt, 1)
    each: list[hooks.Writes] = [
        (site, [hooks.Change(4, 0, 1 - 2 * value[3, 0]), hooks.Change(8, 0, value[2, 0])])
        for site, value in before.items()
    ]
    each.append(("", []))
    large = max(1.0, float(plain.abs().max()))
    runs = hooks.side_by_side(row, model, prompt, 1, each)
    for (site, changes), (logits, seen) in zip(each, runs, strict=True):
        alone, own = hooks.run(row, model, prompt, 1, site, changes)
        assert (logits - alone).abs().max() <= 1e-5 * large, site
        assert (logits - plain).abs().max() > 1e-4 * large or not site, site
        for place, value in own.items():
            assert torch.allclose(seen[place], value, atol=1e-5 * large), (site, place)


# --- edges ----------------------------------------------------------------------------------------


def edited(name: str, *edges: Edge) -> Run:
    return forward(name, double(name), IDS, (), edges)


def sums(run: Run, layer: int = 1) -> torch.Tensor:
    return run["pattern", layer].sum(2)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_edge_edits_equal_their_definition(name: str) -> None:
    plain = forward(name, double(name), IDS)
    before, keys = plain["pattern", 1][9, 2], [1, 8, 9]
    visible = plain["scores", 1][9, 2].isfinite()
    seen = [key for key in keys if visible[key]]
    rest = [key for key in range(T) if key not in keys]

    def row(kind: Any, amount: float = 0) -> torch.Tensor:
        return edited(name, Edge(kind, 1, [9], keys, amount, [2]))["pattern", 1][9, 2]

    # block and reweight equal the corresponding change of scores
    for kind, amount in (("block", 0.0), ("reweight", 1.5), ("reweight", 0.0)):
        scores = plain["scores", 1][9, 2].clone()
        scores[keys] += torch.tensor(amount).double().log()
        write = Write("scores", 1, scores, 9, 2)
        same = forward(name, double(name), IDS, [write])["pattern", 1][9, 2]
        assert (row(kind, amount) - same).abs().max() <= 1e-9
    even = row("uniform")
    assert (even[seen] - before[seen].mean()).abs().max() <= 1e-9
    assert torch.equal(even[rest], before[rest])
    fixed = row("set", 0.2)
    assert (fixed[seen] - 0.2).abs().max() <= 1e-9
    ratio = fixed[rest][before[rest] > 0] / before[rest][before[rest] > 0]
    assert (ratio - ratio[0]).abs().max() <= 1e-9
    sink = 1 - before.sum()
    assert (fixed.sum() + ratio[0] * sink - 1).abs() <= 1e-9
    for kind in ("block", "reweight", "uniform", "set"):
        run = edited(name, Edge(kind, 1, [9], keys, 0.2, [2]))
        same = torch.ones(T, run["pattern", 1].shape[1], dtype=torch.bool)
        same[9, 2] = False
        assert torch.equal(run["pattern", 1][same], plain["pattern", 1][same])
        assert (run.logits - plain.logits).abs().max() > 1e-3


def test_query_without_keys_has_zero_output() -> None:
    run = edited("llama", Edge("block", 1, [4], range(T)))
    assert (run["z", 1][4] == 0).all()
    assert (sums(run)[4] == 0).all()


def test_edits_of_one_row_act_in_order() -> None:
    one = Edge("reweight", 1, [9], [2, 3], 3.0)
    two = Edge("set", 1, [9], [3, 4], 0.2)
    first, second = edited("llama", one, two), edited("llama", two, one)
    assert (first.logits - second.logits).abs().max() > 1e-3
    assert (sums(first) - 1).abs().max() <= 1e-9


def test_edits_of_invisible_keys_change_nothing() -> None:
    plain = forward("mistral", double("mistral"), IDS)
    for kind in ("block", "reweight", "uniform", "set"):
        run = edited("mistral", Edge(kind, 1, [5], [0, 1, 2, 6, 7], 0.2))  # type: ignore[arg-type]
        assert torch.equal(run.logits, plain.logits)
