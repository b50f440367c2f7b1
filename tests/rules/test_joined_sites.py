"""`using` with cells that write several sites, against plain hooks on the bare model in 64 bits,
one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.patching import estimates

from ..execute.support import MODES, ROWS, Prompt, Record, experiment, prompt, run_file, try_file
from ..quick import some
from ..reference.decomposed import decompose_held
from ..reference.gradients import Where, taken
from .models import bare, double
from .test_estimates import (
    ONE,
    call_metric,
    count_planned_passes,
    logits_at_the_end,
    measured,
    read,
    where,
)
from .test_smoothgrad import waves

FAMILIES = ("gpt2", "llama", "gpt_neox", "mixtral")
LINES = ("prompts p", "from other into clean")
DELTA, RAW = measured(ONE, "delta"), measured(ONE, "raw")
Vectors = dict[tuple[int, int], Tensor]


def vectors_of(family: str, record: Record, site: str, layer: int, units: range | None) -> Vectors:
    """The vectors that the source run has at the last token, by position and unit."""
    at, own, source = where(family, site, layer), prompt(record), prompt(record, "other")
    theirs = read(family, tuple(source.ids), at)
    chosen = range(at.units) if units is None else units
    return {(own.last, unit): theirs[source.last, unit] for unit in chosen}


def metric_of(family: str, record: Record) -> Any:
    source = prompt(record, "other")
    last = logits_at_the_end(family, tuple(source.ids))
    return call_metric(family, ONE, prompt(record), record, last)


# --- several layers, by contextual decomposition --------------------------------------------------

Sites = Mapping[tuple[str, int], range | None]
"""Site and layer → the written units, or None for all."""
LAYERED: dict[str, tuple[str, Sites]] = {
    "heads": ("patch h at last token", {("z", 0): range(1, 2), ("z", 2): range(1)}),
    "mlps": (
        "patch mlp_out layers 0..1 at last token",
        {("mlp_out", 0): None, ("mlp_out", 1): None},
    ),
    "rules": (
        "patch z layer 1 head 2 at last token\n  patch mlp_out layer 0 at last token",
        {("z", 1): range(2, 3), ("mlp_out", 0): None},
    ),
    "stream": (
        "patch L0H1 at last token\n  patch resid_post layer 1 at last token",
        {("resid_post", 1): None},
    ),
}


@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", some(FAMILIES, ["gpt2", "llama"]))
def test_cdt_of_several_layers_equals_plain_hooks(family: str, mode: str, tmp_path: Path) -> None:
    """The last case overwrites all that its first rule changes, at the only token that changes."""
    text = "group h = L0H1, L2H0\n" + "".join(
        experiment(name, *LINES, DELTA, rule, "using cdt") for name, (rule, _) in LAYERED.items()
    )
    found = run_file(text, tmp_path, bare(family), MODES[mode])
    for name, (_, sites) in LAYERED.items():
        data = found[name].measures[0]
        expected = [
            decompose_held(
                double(family),
                metric_of(family, record),
                [(where(family, *at), vectors_of(family, record, *at, own))
                 for at, own in sites.items()],
                (),
                (),
            )[0]
            for record in ROWS
        ]  # fmt: skip
        values = data.patched - data.base
        np.testing.assert_allclose(values, [expected], atol=1e-4, rtol=0, err_msg=name)
        assert np.abs(expected).max() > 1e-2, name


def test_cdt_of_two_rules_on_one_vector_keeps_the_later_value(tmp_path: Path) -> None:
    lines = ("patch L1H2 at last token", "ablate L1H2 at last token with zero")
    text = experiment("both", *LINES, DELTA, *lines, "using cdt")
    text += experiment("later", "prompts p", DELTA, lines[1], "using cdt")
    found = run_file(text, tmp_path, bare("llama"))
    both, later = (found[name].measures[0] for name in ("both", "later"))
    np.testing.assert_allclose(both.patched, later.patched, atol=1e-5, rtol=0)
    assert np.abs(both.patched - both.base).max() > 1e-3


def test_verify_runs_cells_of_several_layers(tmp_path: Path) -> None:
    rules = "for l in 0..1 {\n    patch L0H1 at last token\n"
    rules += "    patch mlp_out layer l at last token\n  }"
    text = experiment("run", *LINES, DELTA, rules)
    text += experiment("estimate", *LINES, DELTA, rules, "using cdt verify top 2")
    found = run_file(text, tmp_path, bare("gpt2"))
    (verified,) = found["estimate"].verified
    exact = found["run"].statistics[0].mean
    assert len(verified.cells) == len(exact) == 2
    np.testing.assert_allclose(verified.exact, exact[verified.cells], rtol=1e-3, atol=1e-5)
    assert np.abs(exact).max() > 1e-3


# --- queries, keys and values of one layer --------------------------------------------------------

JOINED = {("q", 1): 2, ("k", 1): 0, ("v", 1): 1}
GROUP = "group g = L1H2.q, k layer 1 head 0, v layer 1 head 1\n"


def place_of(family: str, site: str, layer: int) -> Where:
    if site != "q":
        return where(family, site, layer)
    heads = double(family).config.num_attention_heads
    return Where(f"model.layers.{layer}.self_attn.q_proj", "out", heads)


def changes(family: str, record: Record) -> dict[Where, Tensor]:
    """What the cell adds at each place: [T, units, width]."""
    own, source, found = prompt(record), prompt(record, "other"), dict[Where, Tensor]()
    for at, unit in JOINED.items():
        place = place_of(family, *at)
        now, theirs = (read(family, tuple(each.ids), place) for each in (own, source))
        found[place] = torch.zeros_like(now)
        found[place][own.last, unit] = (theirs[source.last] - now[own.last])[unit]
    return found


def gradients(family: str, record: Record, moves: Mapping[Where, Tensor]) -> list[Tensor]:
    """The gradient at each place, [T, units, width], while all of them move."""
    metric = metric_of(family, record)

    def moved(others: list[Where], module: Any) -> Tensor:
        if not others:
            return metric(module)
        first, *rest = others
        part = module.get_submodule(first.path)
        handle = part.register_forward_hook(
            lambda part, args, out: out + moves[first].reshape(out.shape)
        )
        try:
            return moved(rest, module)
        finally:
            handle.remove()

    return [
        taken(
            double(family), at, partial(moved, [each for each in moves if each != at]), way
        ).gradient
        for at, way in moves.items()
    ]


def mean_gradients(family: str, record: Record, moves: list[dict[Where, Tensor]]) -> list[Tensor]:
    every = [gradients(family, record, each) for each in moves]
    return [torch.stack(own).mean(0) for own in zip(*every, strict=True)]


def scaled(ways: Mapping[Where, Tensor], share: float) -> dict[Where, Tensor]:
    return {at: way * share for at, way in ways.items()}


def noisy(family: str, own: Prompt, ways: Mapping[Where, Tensor]) -> list[dict[Where, Tensor]]:
    """Three copies with the numbers of `waves` at all places."""
    values = {at: read(family, tuple(own.ids), at) for at in ways}
    scales = {at: 0.4 * float(value.max() - value.min()) for at, value in values.items()}
    return [
        {at: torch.from_numpy(waves([n], way.shape)) * scales[at] for at, way in ways.items()}
        for n in range(3)
    ]


def estimate(family: str, record: Record, kind: str) -> float:
    ways, own = changes(family, record), prompt(record)
    if kind == "smoothgrad(samples: 3, noise: 0.4)":
        moves = noisy(family, own, ways)
    elif kind == "integrated_gradients(steps: 4)":
        moves = [scaled(ways, (step + 0.5) / 4) for step in range(4)]
    else:
        moves = [scaled(ways, 0.0)]
    found = mean_gradients(family, record, moves)
    if kind in ("gradient_input", "integrated_gradients(steps: 4)"):
        return float(sum((a * b).sum() for a, b in zip(found, ways.values(), strict=True)))
    parts = [own_[own.last, unit] for own_, unit in zip(found, JOINED.values(), strict=True)]
    return float(torch.cat(parts).norm())


KINDS = {
    "gradient_input": DELTA,
    "integrated_gradients(steps: 4)": DELTA,
    "gradient": RAW,
    "smoothgrad(samples: 3, noise: 0.4)": RAW,
}


@pytest.mark.parametrize("mode", ["planned", pytest.param("small passes", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", some(["llama", "mixtral"], ["llama"]))
def test_estimates_of_joined_queries_keys_and_values_equal_autograd(
    family: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sites of a cell move together on the line, and have noise together."""
    monkeypatch.setattr(estimates, "draw_noise", waves)
    rule = "patch g at last token"
    text = GROUP + "".join(
        experiment(f"e{n}", *LINES, rule, f"using {kind}", measure)
        for n, (kind, measure) in enumerate(KINDS.items())
    )
    found = run_file(text, tmp_path, bare(family), MODES[mode])
    for n, (kind, measure) in enumerate(KINDS.items()):
        data = found[f"e{n}"].measures[0]
        values = data.patched if measure == RAW else data.patched - data.base
        expected = [estimate(family, record, kind) for record in ROWS]
        np.testing.assert_allclose(values, [expected], atol=1e-4, rtol=1e-3, err_msg=kind)
        assert np.abs(expected).max() > 1e-3, kind


def test_atp_qk_adds_the_estimates_of_joined_queries_keys_and_values(tmp_path: Path) -> None:
    rules = ("g", "L1H2.q", "k layer 1 head 0", "v layer 1 head 1")
    text = GROUP + "".join(
        experiment(f"e{n}", *LINES, f"patch {rule} at last token", "using atp_qk", DELTA)
        for n, rule in enumerate(rules)
    )
    found = run_file(text, tmp_path, bare("llama"))
    joined, *parts = (
        each.patched - each.base for n in range(len(rules)) for each in found[f"e{n}"].measures
    )
    assert all(np.abs(part).max() > 1e-4 for part in parts)
    np.testing.assert_allclose(joined, sum(parts), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_plan_counts_the_passes_of_joined_sites(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = GROUP + experiment("e", *LINES, "patch g at last token", f"using {kind}", KINDS[kind])
    planned, counted = count_planned_passes(text, tmp_path, monkeypatch, "llama")
    assert planned == counted


CONFLICTS = {
    "patch h at last token": ("these sites together", "= help: remove `using`"),
    "patch resid_post layers 0..1 at last token": ("these sites together", "write `using cdt`, or"),
    "patch i at last token": ("these sites together", "write `using cdt`, or"),
    "patch L0H1 at last token\n  patch L0H2 at last token": (
        "several rules together",
        "write an experiment for each rule",
    ),
}
"""Rule → what can't be estimated, and the fix."""


@pytest.mark.parametrize("rule", CONFLICTS)
def test_joined_sites_that_reach_each_other_are_errors(rule: str, tmp_path: Path) -> None:
    """`z` is computed from the query, and the end of the model from each head."""
    text = "group h = L0H1.q, z layer 0 head 1\ngroup i = final_norm, L0H1\n"
    text += experiment("e", *LINES, DELTA, rule, "using integrated_gradients")
    _, errors = try_file(text, tmp_path, bare("gpt2"))
    assert [each.code for each in errors] == ["E0608"]
    what, fix = CONFLICTS[rule]
    said = render_full(errors, color=False, width=300)
    assert f"can't estimate {what}" in said
    assert fix in said


def test_groups_of_a_sweep_move_separately_on_the_line(tmp_path: Path) -> None:
    groups = GROUP + "group i = L1H2.q, L1H3.q\n"
    lines = (*LINES, DELTA, "using integrated_gradients(steps: 4)")
    rule = "for s in [g, i] {\n    patch s at last token\n  }"
    text = groups + experiment("both", *lines, rule)
    text += "".join(experiment(f"{s}0", *lines, f"patch {s} at last token") for s in ("g", "i"))
    found = run_file(text, tmp_path, bare("llama"))
    alone = [found[f"{s}0"].measures[0].patched[0] for s in ("g", "i")]
    np.testing.assert_allclose(found["both"].measures[0].patched, alone, atol=1e-6)


def test_cdt_of_queries_and_keys_of_two_layers_proposes_their_runs(tmp_path: Path) -> None:
    text = "group h = L0H1.q, L1H1.k\n"
    text += experiment("e", *LINES, DELTA, "patch h at last token", "using cdt")
    _, errors = try_file(text, tmp_path, bare("gpt2"))
    said = render_full(errors, color=False, width=300)
    assert "the estimate would be 0" in said
    assert "= help: remove `using`" in said


def test_cdt_of_a_path_and_a_site_together_is_an_error(tmp_path: Path) -> None:
    rules = ("path layer 0 head 1 -> logits at last token", "patch L1H1 at last token")
    text = experiment("e", *LINES, DELTA, *rules, "using cdt")
    _, errors = try_file(text, tmp_path, bare("gpt2"))
    assert [each.code for each in errors] == ["E0608"]
    said = render_full(errors, color=False, width=300)
    assert "can't estimate several rules together: a path is estimated alone" in said
