"""`ablate … without each edge … using eap`: estimates of a circuit without one edge, against
autograd by what receivers read in an explicit pass of one unpadded prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.patching.estimates import GradientEstimates
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.cost import PanelCount
from mechdsl.planner.passes import plan_cost
from mechdsl.planner.plan import PASS_TOKENS, PROMPT_TOKENS, Plan
from mechdsl.results.experiment_result import ExperimentResult

from ..execute import support as of_files
from ..execute.support import MODES, Record, token
from ..operations import OperationCounter
from ..quick import in_turn
from ..reference.ruled import ruled
from . import test_neuron_circuits as neurons
from . import test_placed_circuits as placed
from .circuits import EMBED, LOGITS, circuit_pass, mlp
from .models import EXACT, WITHOUT_NORMS, bare, double
from .support import Array, experiment, records, rows, run_file, tokens, try_file, unpatched
from .test_ablated_circuits import PAIR, Case, edges, fills, find_donors

Edge = tuple[str, str]
CASES = {
    "all_but_zero": Case("all but c", "zero"),
    "all_but_other": Case("all but c", "other", PAIR),
    "all_but_mean": Case("all but c", "mean", PAIR),
    "all_but_resample": Case("all but c", "resample", PAIR),
    "only_zero": Case("c", "zero", "last token"),
    "only_other": Case("c", "other"),
    "into_other": Case("all but c", "clean", base="other"),
}
LOGIT = "measure logit(answer) - logit(wrong) as delta"
FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2" + EXACT, "qwen3", "gpt_oss")


# --- the reference --------------------------------------------------------------------------------


def estimate(
    name: str,
    case: Case,
    donors: Mapping[int, int],
    circuit: Set[Edge],
    every: Set[Edge],
    rules: str = "",
    **nodes: Any,
) -> dict[Edge, list[float]]:
    """By edge of the circuit, [prompt] the value of a run of the circuit plus the product of what
    the edge would carry less what it carries with the gradient by what its receiver reads."""
    keeps = case.rule.startswith("all but")
    ablated, sign = (every - circuit, 1) if keeps else (circuit, -1)
    model = ruled(double(name), rules) if rules else double(name)
    found: dict[Edge, list[float]] = {edge: [] for edge in circuit}
    every_fill = fills(name, case, donors, **nodes)
    call: Any = circuit_pass
    for own, text, record in zip(every_fill, rows(case.base), records(), strict=True):
        at = tokens(text, case.at)
        pass_ = partial(
            call.__wrapped__, name, model, text.ids, own, positions=at, rules=rules, **nodes
        )
        with torch.enable_grad():
            ends = _by_shares if "gemma2" in name else _by_inputs
            value, changes = ends(pass_, own, ablated, circuit, at, record)
        for edge in circuit:
            found[edge].append(float(value + sign * changes[edge]))
    return found


def _metric(logits: Tensor, record: Record) -> Tensor:
    return logits[-1, token(record["a"])] - logits[-1, token(record["b"])]


def _by_inputs(
    run: Callable[..., Tensor],
    fill: Mapping[str, Tensor],
    ablated: Set[Edge],
    circuit: Set[Edge],
    at: Sequence[int],
    record: Record,
) -> tuple[Tensor, dict[Edge, Tensor]]:
    """The value, and by edge the product of the change with the gradient by the receiver's input:
    the stream, whose norm follows."""
    size, values = next(iter(fill.values())).shape, dict[str, Tensor]()
    leaves = {to: torch.zeros(size, dtype=torch.float64) for _, to in sorted(circuit)}
    given = {to: leaf.requires_grad_() for to, leaf in leaves.items()}
    value = _metric(run(ablated=ablated, added=given, record=values), record)
    slopes = dict(zip(leaves, torch.autograd.grad(value, [*leaves.values()]), strict=True))
    return value.detach(), {
        (of, to): ((fill[of] - values[of].detach()) * slopes[to])[at].sum() for of, to in circuit
    }


def _by_shares(
    run: Callable[..., Tensor],
    fill: Mapping[str, Tensor],
    ablated: Set[Edge],
    circuit: Set[Edge],
    at: Sequence[int],
    record: Record,
) -> tuple[Tensor, dict[Edge, Tensor]]:
    """The same by the share of the fill, if norms follow the sums of heads."""
    shares = {edge: torch.tensor(float(edge in ablated)) for edge in sorted(circuit)}
    given = {edge: share.requires_grad_() for edge, share in shares.items()}
    value = _metric(run(ablated={**dict.fromkeys(ablated, 1.0), **given}), record)
    return value.detach(), dict(
        zip(given, torch.autograd.grad(value, [*given.values()]), strict=True)
    )


def as_table(found: ExperimentResult, expected: Mapping[Edge, list[float]]) -> Array:
    """[edge, prompt] the reference, in the order of the table's edges."""
    labels = [tuple(str(cell.coords["edge"]).split(" -> ")) for cell in found.cells]
    assert sorted(labels) == sorted(expected)
    return np.array([expected[of, to] for of, to in labels])


def agrees(found: ExperimentResult, expected: Mapping[Edge, list[float]], base: Array) -> None:
    data, values = found.measures[0], as_table(found, expected)
    np.testing.assert_allclose(data.patched, values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(data.base, base[None], atol=1e-5)
    assert np.ptp(values, axis=0).max() > 1e-4


# --- estimates ------------------------------------------------------------------------------------


def file_of(case: Case, word: str = "eap", measure: str = LOGIT) -> str:
    ends = "" if case.base == "clean" else f"from clean into {case.base}"
    rule = f"ablate {case.rule} without each edge at {case.at} with {case.fill}"
    return experiment("e", ends, rule, f"using {word}", measure=measure)


def compared(
    data: Path, name: str, mode: str, case: Case, line: str, word: str = "eap", **given: Any
) -> None:
    text = line + file_of(case, word)
    found = run_file(text, data, name, mode, precise=True)["e"]
    compute = partial(estimate, **given)
    own = found.measures[0].patched[0]
    of, to = str(found.cells[0].coords["edge"]).split(" -> ")
    donors = find_donors(name, case, own, lambda *each: compute(*each)[of, to])
    agrees(found, compute(name, case, donors), unpatched(name, case.base))


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, list(MODES)))
def test_estimates_are_values_times_gradients_in_the_circuit(
    data: Path, name: str, mode: str, key: str
) -> None:
    line, circuit, every = edges(name)
    compared(data, name, mode, CASES[key], line, circuit=circuit, every=every)


RULED = ("gpt2", "llama", "gpt_neox", "qwen3")


@pytest.mark.parametrize("word", ["relp", "gim"])
@pytest.mark.parametrize(("name", "key"), in_turn(RULED, ["all_but_other", "only_zero"]))
def test_changed_derivatives_apply_in_the_circuit(
    data: Path, name: str, key: str, word: str
) -> None:
    line, circuit, every = edges(name)
    given: dict[str, Any] = {"circuit": circuit, "every": every, "rules": word}
    compared(data, name, "planned", CASES[key], line, word, **given)


@pytest.mark.parametrize(
    ("name", "key"), in_turn(neurons.HERE, ["all_but_other", "all_but_zero", "only_other"])
)
def test_neurons_send_and_receive(data: Path, name: str, key: str) -> None:
    line, circuit = neurons.edges(name)
    every, split = neurons.every_edge(name), neurons.split(name)
    given: dict[str, Any] = {"circuit": circuit, "every": every, "split": split}
    compared(data, name, "planned", CASES[key], line, **given)


ON_PATHS: list[placed.Written] = [
    ("embed -> L0H1.v", "{cue token, last token}", [(EMBED, "L0H1.v")]),
    ("embed -> L0H1.v", "subject tokens", [(EMBED, "L0H1.v")]),
    ("L0H1 -> L1.mlp", "last token", [("L0H1", mlp(1))]),
    ("L0.mlp -> L1H0.k", "cue token", [(mlp(0), "L1H0.k")]),
    ("embed -> v layer 1 head 0", "", [(EMBED, "L1H0.v")]),
    ("L1H0 -> logits", "last token", [("L1H0", LOGITS)]),
    ("L1.mlp -> logits", "", [(mlp(1), LOGITS)]),
    ("embed -> logits", "token 1", [(EMBED, LOGITS)]),  # the last token isn't at this position
]


@pytest.mark.parametrize("key", ["all_but_other", "all_but_zero", "only_other"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_edge_at_several_positions_is_left_out_at_all_of_them(
    data: Path, name: str, key: str
) -> None:
    case, written = replace(CASES[key], at="tokens *"), ON_PATHS
    found = run_file(placed.define(written) + file_of(case), data, name, "planned", precise=True)
    keeps, every_fill = case.rule.startswith("all but"), fills(name, case, {})
    expected: dict[Edge, list[float]] = {}
    for n, (text, record) in enumerate(zip(rows(), records(), strict=True)):
        at = placed.tokens_of_edges(written, text)
        shares = placed.shares(name, text, at, all_but=keeps)
        leaves = {edge: torch.zeros((), requires_grad=True) for edge in at}
        with torch.enable_grad():
            here = {edge: torch.zeros(len(text.ids), 1) for edge in at}
            for edge, tokens_ in at.items():
                here[edge][sorted(tokens_)] = 1
                shares[edge] = shares[edge] + leaves[edge] * here[edge] * (1 if keeps else -1)
            call: Any = circuit_pass
            given = every_fill[n], shares, tokens(text, case.at)
            value = _metric(call.__wrapped__(name, double(name), text.ids, *given), record)
            slopes = torch.autograd.grad(value, [*leaves.values()])
        for edge, slope in zip(leaves, slopes, strict=True):
            expected.setdefault(edge, []).append(float(value.detach() + slope))
    labels = [str(cell.coords["edge"]).partition(" at ")[0] for cell in found["e"].cells]
    edges_ = [tuple(label.split(" -> ")) for label in labels]
    values = [expected[of, to] for of, to in edges_]
    np.testing.assert_allclose(found["e"].measures[0].patched, values, rtol=1e-5, atol=1e-5)
    assert np.ptp(values, axis=0).max() > 1e-3


def test_fills_and_positions_are_estimated_separately(data: Path) -> None:
    """Each of their cells starts from a separate run of the circuit, in passes of several sizes."""
    name, line = "llama", edges("llama")[0]
    each = [(fill, at) for fill in ("zero", "mean") for at in ("cue token", "last token")]
    rule = "ablate all but c without each edge at {} with {}"
    text = experiment(
        "e", rule.format("cue token, last token", "zero, mean"), "using eap", measure=LOGIT
    )
    text += "".join(
        experiment(f"x{n}", rule.format(at, fill), "using eap", measure=LOGIT)
        for n, (fill, at) in enumerate(each)
    )
    found = run_file(line + text, data, name, "small passes", precise=True)
    whole = found["e"]
    for n, (fill, at) in enumerate(each):
        own = found[f"x{n}"]
        for cell, values in zip(own.cells, own.measures[0].patched, strict=True):
            (row,) = [
                row
                for row, other in enumerate(whole.cells)
                if other.coords["edge"] == cell.coords["edge"]
                and {str(other.coords["fill"]), str(other.coords["position"])} == {fill, at}
            ]
            np.testing.assert_allclose(whole.measures[0].patched[row], values, atol=1e-9)
    assert np.ptp([found[f"x{n}"].measures[0].patched[0] for n in range(4)], axis=0).min() > 1e-3


STRAIGHT = ("gpt2" + WITHOUT_NORMS, "llama" + WITHOUT_NORMS, "gpt_neox" + WITHOUT_NORMS)


@pytest.mark.parametrize("fill", ["zero", "other", "mean"])
@pytest.mark.parametrize("name", STRAIGHT)
def test_estimates_equal_runs_where_the_model_is_linear(data: Path, name: str, fill: str) -> None:
    """Without norms, logits are linear in what their edges carry, and values in what theirs do."""
    circuit = "circuit c = embed -> logits, layers * heads * -> logits, L0H1 -> v layer 2 heads *\n"
    rule = f"ablate all but c without each edge at {PAIR} with {fill}"
    text = circuit + experiment("e", rule, "using eap", measure=LOGIT)
    text += experiment("x", rule, measure=LOGIT)
    found = run_file(text, data, name, "planned", precise=True)
    estimates, runs = (found[each].measures[0].patched for each in "ex")
    np.testing.assert_allclose(estimates, runs, atol=1e-5)
    assert np.ptp(runs, axis=0).min() > 1e-3


@pytest.mark.parametrize("effect", ["delta", "minimality"])
def test_verified_estimates_have_the_values_of_runs(data: Path, effect: str) -> None:
    rule = "ablate all but c without each edge at tokens * with other"
    measure = f"{LOGIT.rpartition(' as ')[0]} as {effect}"
    given = {"measure": measure, "stats": "stats bootstrap(100) confidence 50% correct none"}
    text = edges("gpt2")[0]
    text += experiment("e", rule, "using eap verify top 3, random 4", **given)
    text += experiment("x", rule, **given)
    found = run_file(text, data, "gpt2", "planned", precise=True)
    (verified,) = found["e"].verified
    estimates, runs = (found[each].statistics[0].mean for each in "ex")
    assert len(verified.cells) == 7
    np.testing.assert_allclose(verified.exact, runs[verified.cells], atol=1e-9)
    top = np.argsort(-np.abs(estimates), kind="stable")[:3]
    assert {*top.tolist()} <= {*verified.cells.tolist()}
    assert not np.allclose(estimates, runs, atol=1e-3)


def test_measures_share_a_pass(data: Path) -> None:
    """Each has a backward pass, and texts of several tokens a forward pass, too."""
    rule = "ablate all but c without each edge at tokens * with zero"
    measures = (LOGIT, 'measure logprob("w3 w9") as delta', "measure kl(clean) as delta")
    text = edges("llama")[0] + experiment("e", rule, "using eap", measure="\n  ".join(measures))
    text += "".join(
        experiment(f"x{n}", rule, "using eap", measure=own) for n, own in enumerate(measures)
    )
    found = run_file(text, data, "llama", "planned", precise=True)
    for n, own in enumerate(found["e"].measures):
        other = found[f"x{n}"].measures[0].patched
        np.testing.assert_allclose(own.patched, other, atol=1e-9)
        assert np.ptp(other) > 1e-3


@pytest.mark.parametrize("at", ["tokens *", "last token, cue token"])
@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_plan_counts_operations_of_both_passes_within_a_factor_of_two(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: str
) -> None:
    done, plans, estimate_rows = [0], list[Plan](), GradientEstimates.of

    def counted(*given: Any) -> Any:
        with OperationCounter() as counter:
            found = estimate_rows(*given)
        done[0] += counter.get_total_flops()
        return found

    monkeypatch.setattr(GradientEstimates, "of", counted)
    rule = f"ablate all but c without each edge at {at} with other"
    text = edges(name)[0] + of_files.experiment("e", "prompts p", rule, "using eap", LOGIT)
    options = RunOptions(on_profile=lambda plan, _: plans.append(plan))
    of_files.run_file(text, data, bare(name), options)
    [panel] = plans[0].panels
    unpatched_cost = PanelCount(panel, PASS_TOKENS, PROMPT_TOKENS).unpatched(stopped=True)
    planned = plan_cost(plans[0]).planned.flops - unpatched_cost.flops
    assert done[0] / 2 < planned < done[0] * 2, (done, planned)


WRONG = {
    "together": ("ablate c", "eap", "write `ablate c without each edge`"),
    "all but": ("ablate all but c", "eap", "write `ablate all but c without each edge`"),
    "sites": ("ablate all but c without each edge", "atp", "write `using eap`"),
    "inputs": ("ablate all but c without each edge", "eap_ig", "write `using eap`"),
    "senders": ("ablate c without each edge", "eap_ig_activations", "write `using eap`"),
    "line": ("ablate c without each edge", "integrated_gradients", "write `using eap`"),
    "attention": ("ablate c without each edge", "atp_qk", "attention weights of an unpatched run"),
    "layers": ("ablate c without each edge", "atp_star", "attention weights of an unpatched run"),
    "parts": ("ablate c without each edge", "cdt", "attention weights of an unpatched run"),
    "answer": ("ablate c without each edge", "eap", "name tokens of the prompt"),
    "verified": ("ablate all but c without each edge", "gradient verify top 1", "`using eap`"),
    "measure": (
        "ablate all but c without each edge",
        "eap verify top 1",
        "such as `as delta` or `as minimality`",
    ),
    "rules": (
        "ablate L0H1 at tokens * with zero\n  ablate c without each edge",
        "eap",
        "`ablate` together with a circuit",
    ),
}


@pytest.mark.parametrize("key", WRONG)
def test_edges_without_an_estimate_are_errors(data: Path, key: str) -> None:
    rule, word, hint = WRONG[key]
    at = "tokens * and answer" if key == "answer" else "tokens *"
    measures = {"answer": 'measure logprob("w3 w9") as delta'}
    measures["measure"] = "measure logit(answer) as faithfulness"
    measure = measures.get(key, LOGIT)
    text = edges("gpt2")[0]
    text += experiment("e", f"{rule} at {at} with zero", f"using {word}", measure=measure)
    found, problems = try_file(text, data, "gpt2")
    assert found is None
    written = render_full(problems, color=False, width=100)
    assert "E0608" in written, written
    assert hint in " ".join(written.split()), written


def test_verification_without_a_defined_effect_says_so(data: Path) -> None:
    """The base run and the run with every edge ablated have one value."""
    rule = "ablate all but c without each edge at tokens * with other"
    measure = "measure logit(answer) - logit(answer) as minimality"
    text = edges("gpt2")[0] + experiment("e", rule, "using eap verify random 2", measure=measure)
    found = run_file(text, data, "gpt2", "planned")["e"]
    assert found.conventions["verified"] == "no cell was run, because no cell has a defined effect"
